"""Whatever is in the directory of CNI configurations: planning never fails, is done after once, and is undone without a trace."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from ztunnel_py.cni.chain import PLUGIN, Plan, Write, is_configuration, plan_install, plan_removal

OURS = {"type": PLUGIN, "socket": "/s"}
NAMES = st.sampled_from(["00.conf", "10.conflist", "10.conf", "20.conflist", "20.json", "README"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
PLUGINS = st.fixed_dictionaries({"type": st.sampled_from(["ptp", "bridge", PLUGIN])}, optional={"ipam": VALUES})
CHAINS = st.fixed_dictionaries(
    {"cniVersion": st.sampled_from(["0.2.0", "0.3.1", "1.0.0"])}, optional={"name": st.text(), "x": VALUES}
).flatmap(
    lambda head: (
        st.lists(PLUGINS, max_size=3).map(lambda plugins: {**head, "plugins": plugins}) | PLUGINS.map(lambda plugin: {**head, **plugin})
    )
)
TEXTS = st.text(max_size=20) | VALUES.map(json.dumps) | CHAINS.map(json.dumps)
DIRECTORIES = st.dictionaries(NAMES, TEXTS, max_size=5)


def carried_out(files: dict[str, str], plan: Plan) -> dict[str, str]:
    now = dict(files)
    for step in plan.steps:
        if isinstance(step, Write):
            now[step.name] = step.text
        else:
            now.pop(step.name)
    return now


def plugin_types(text: str) -> list[str]:
    try:
        found = json.loads(text)
        return [plugin["type"] for plugin in found["plugins"]]
    except (ValueError, TypeError, KeyError, RecursionError):
        return []


@given(DIRECTORIES)
def test_installing_is_done_after_once_and_leaves_the_others_plugins_in_their_order(files: dict[str, str]) -> None:
    plan = plan_install(files, OURS)
    now = carried_out(files, plan)
    assert bool(plan.chained_in) != bool(plan.because)
    if plan.chained_in:
        again = plan_install(now, OURS)
        assert (again.steps, again.chained_in) == ((), plan.chained_in)
        chain = plugin_types(now[plan.chained_in])
        assert chain[-1] == PLUGIN
        assert chain.count(PLUGIN) == 1
        assert len(chain) > 1
    else:
        assert now == files


@given(DIRECTORIES)
def test_nothing_of_the_plugin_is_left_after_removal(files: dict[str, str]) -> None:
    installed = carried_out(files, plan_install(files, OURS))
    left = carried_out(installed, plan_removal(installed))
    assert plan_removal(left) == Plan()
    for step in plan_removal(installed).steps:
        assert PLUGIN not in plugin_types(left.get(step.name, "{}"))
    assert {name for name in files if not is_configuration(name)} == {name for name in left if not is_configuration(name)}

"""The plugin's entry in the node's chain: last, once, everything else as it was."""

from __future__ import annotations

import json

import pytest

from ztunnel_py.cni.chain import PLUGIN, Delete, Plan, Write, plan_install, plan_removal

OURS = {"type": PLUGIN, "socket": "/s"}
PRIMARY = {"type": "ptp", "ipMasq": False}


def conflist(*plugins: dict[str, object], name: str = "pods") -> str:
    return json.dumps({"cniVersion": "1.0.0", "name": name, "plugins": plugins, "x": [1]})


def after(files: dict[str, str], plan: Plan) -> dict[str, object]:
    """What the files say once the plan is carried out."""
    now = dict(files)
    for step in plan.steps:
        if isinstance(step, Write):
            now[step.name] = step.text
        else:
            assert isinstance(step, Delete)
            del now[step.name]
    return {name: json.loads(text) for name, text in now.items() if name.endswith(("conf", "conflist"))}


def test_the_plugin_is_appended_to_the_first_valid_configuration_by_name() -> None:
    files = {
        "00-broken.conflist": "{",
        "01-no-plugins.conflist": json.dumps({"name": "x", "plugins": []}),
        "02-no-type.conflist": json.dumps({"name": "x", "plugins": [{"name": "y"}]}),
        "05-notes.txt": conflist(PRIMARY),
        "10-pods.conflist": conflist(PRIMARY, {"type": "portmap"}),
        "20-other.conflist": conflist(PRIMARY),
    }
    plan = plan_install(files, OURS)
    assert (plan.chained_in, plan.because, len(plan.steps)) == ("10-pods.conflist", "", 1)
    written = after(files | {"00-broken.conflist": "{}"}, plan)["10-pods.conflist"]
    assert written == json.loads(conflist(PRIMARY, {"type": "portmap"}, OURS))


def test_what_is_in_place_is_left_alone_and_what_is_not_is_mended() -> None:
    assert plan_install({"10.conflist": conflist(PRIMARY, OURS)}, OURS) == Plan((), "10.conflist")
    for other in (conflist(OURS, PRIMARY), conflist(PRIMARY, OURS, OURS), conflist(PRIMARY, {**OURS, "socket": "/old"})):
        plan = plan_install({"10.conflist": other}, OURS)
        assert after({"10.conflist": other}, plan) == {"10.conflist": json.loads(conflist(PRIMARY, OURS))}


def test_a_single_plugin_becomes_a_list_that_takes_its_place() -> None:
    files = {"10-pods.conf": json.dumps({"cniVersion": "0.4.0", "name": "pods", **PRIMARY}), "10-pods.conflist": conflist(OURS)}
    plan = plan_install(files, OURS)
    assert [type(step) for step in plan.steps] == [Write, Delete]
    assert plan.chained_in == "10-pods.conflist"
    assert after(files, plan) == {"10-pods.conflist": {"cniVersion": "0.4.0", "name": "pods", "plugins": [PRIMARY, OURS]}}
    unnamed = {"10.conf": json.dumps(PRIMARY)}
    assert after(unnamed, plan_install(unnamed, OURS))["10.conflist"]["name"] == "k8s-pod-network"


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "there is no configuration"),
        ({"1.conflist": "nonsense"}, "1.conflist: not JSON"),
        ({"1.conflist": "[]"}, "expected an object"),
        ({"1.conflist": conflist(PRIMARY, name="")}, "name: expected a name"),
        ({"1.conflist": conflist(OURS)}, "there is no configuration"),
        ({"1.conf": json.dumps({"cniVersion": "0.2.0", **PRIMARY})}, "cniVersion: expected one of"),
        ({"1.conflist": "[" * 100_000}, "not JSON"),
    ],
)
def test_without_a_chain_to_join_the_reason_is_told(files: dict[str, str], reason: str) -> None:
    plan = plan_install(files, OURS)
    assert plan.steps == ()
    assert reason in plan.because


def test_removal_takes_the_plugin_out_of_every_file() -> None:
    files = {
        "05.conflist": conflist(OURS),
        "10.conflist": conflist(PRIMARY, OURS),
        "20.conflist": conflist(OURS, PRIMARY, OURS),
        "30.conflist": conflist(PRIMARY),
        "40.conflist": "broken",
        "50.conf": json.dumps({"cniVersion": "1.0.0", **OURS}),
    }
    plan = plan_removal(files)
    assert [step.name for step in plan.steps] == ["05.conflist", "10.conflist", "20.conflist", "50.conf"]
    left = after(files | {"40.conflist": "{}"}, plan)
    assert left == {name: json.loads(conflist(PRIMARY)) for name in ("10.conflist", "20.conflist", "30.conflist")} | {"40.conflist": {}}

"""The node's chain of CNI plugins, as text: where our plugin's entry goes, and how it is taken out again. Pure.

A container runtime takes the first valid file of ``/etc/cni/net.d`` by name. A ``.conflist`` has a list of plugins, to which ours is
appended; a ``.conf`` is a single plugin and becomes a ``.conflist`` of two. Everything that others wrote stays as it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

PLUGIN: Final = "ambient-mesh-cni"
MAX_FILE: Final = 1 << 20
VERSIONS: Final = ("0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
"""Of the specification, as our plugin speaks it; older ones know no chains."""
_SUFFIXES: Final = (".conf", ".conflist", ".json")
"""What libcni takes for configurations; ``.json`` for single plugins."""

Entry = Mapping[str, object]


class NotAChain(Exception):
    """The text is no configuration that a container runtime would take; the message says why."""


@dataclass(frozen=True, slots=True)
class Write:
    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Delete:
    name: str


Step = Write | Delete


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do to the directory, in this order, and in which file the plugin is then; ``because`` says why there is none."""

    steps: tuple[Step, ...] = ()
    chained_in: str = ""
    because: str = ""


def is_configuration(name: str) -> bool:
    """Whether a runtime would look into a file of this name."""
    return name.endswith(_SUFFIXES)


def plan_install(files: Mapping[str, str], entry: Entry) -> Plan:
    """How to have the runtime call our plugin last. ``files``: the text of each configuration by name."""
    because = "there is no configuration of a CNI plugin yet"
    for name in sorted(filter(is_configuration, files)):
        try:
            found = _read(name, files[name])
        except NotAChain as exc:
            because = f"no valid configuration of a CNI plugin: {name}: {exc}"
            continue
        others = _without_ours(found["plugins"])
        if not others:
            continue  # what only we wrote gives no pod a network
        wanted = found | {"plugins": [*others, dict(entry)]}
        if found.get("cniVersion") not in VERSIONS:
            return Plan(because=f"{name}: cniVersion: expected one of {', '.join(VERSIONS)}, found {found.get('cniVersion')!r}")
        target = name if name.endswith(".conflist") else f"{name.rpartition('.')[0]}.conflist"
        if target == name:
            return Plan(() if found == wanted else (Write(name, _render(wanted)),), name)
        return Plan((Write(target, _render(wanted)), Delete(name)), target)
    return Plan(because=because)


def plan_removal(files: Mapping[str, str]) -> Plan:
    """How to take our plugin out of every file, also of those that no runtime takes now."""
    steps: list[Step] = []
    for name in sorted(filter(is_configuration, files)):
        try:
            found = _read(name, files[name])
        except NotAChain:
            continue
        others = _without_ours(found["plugins"])
        if len(others) < len(found["plugins"]):
            steps.append(Write(name, _render(found | {"plugins": others})) if others else Delete(name))
    return Plan(tuple(steps))


def _read(name: str, text: str) -> dict[str, Any]:
    """A configuration as a list of plugins, whichever it is. Raises NotAChain."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise NotAChain(f"not JSON: {exc}") from exc
    if not isinstance(found, dict):
        raise NotAChain("expected an object")
    if not name.endswith(".conflist"):
        if not _is_plugin(found):
            raise NotAChain("type: expected the name of a plugin")
        shared = {"cniVersion": found.get("cniVersion", "0.3.1"), "name": found.get("name") or "k8s-pod-network"}
        return {**shared, "plugins": [{key: value for key, value in found.items() if key not in ("cniVersion", "name")}]}
    plugins = found.get("plugins")
    if not (isinstance(plugins, list) and plugins and all(map(_is_plugin, plugins))):
        raise NotAChain("plugins: expected a list of plugins, each with its type")
    if not (isinstance(found.get("name"), str) and found["name"]):
        raise NotAChain("name: expected a name")
    return found


def _is_plugin(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("type"), str) and bool(value["type"])


def _without_ours(plugins: Sequence[Mapping[str, object]]) -> list[Mapping[str, object]]:
    return [plugin for plugin in plugins if plugin["type"] != PLUGIN]


def _render(chain: Mapping[str, object]) -> str:
    return json.dumps(chain, indent=2, ensure_ascii=False) + "\n"

"""What a policy is attached to by ``targetRef`` and ``targetRefs``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from mesh.kube.fields import Fields, Rule, Text
from mesh.kube.objects import KubeObject

GROUPS: Final[Mapping[str, str]] = {
    "Gateway": "gateway.networking.k8s.io",
    "GatewayClass": "gateway.networking.k8s.io",
    "Service": "",
    "ServiceEntry": "networking.istio.io",
}
"""The kinds a policy can be attached to, and the API group of each; ``core`` is another name for the group without one."""
MAX_TARGETS: Final = 16
MAX_NAME: Final = 253


@dataclass(frozen=True, slots=True)
class TargetRef:
    """An object of the policy's own namespace, or a GatewayClass."""

    kind: str
    name: str


class Audience(Enum):
    """Who enforces a policy. `EITHER`: a mistake leaves it open, and both must fear that they are meant."""

    AGENTS = auto()
    WAYPOINTS = auto()
    EITHER = auto()

    @property
    def has_waypoints(self) -> bool:
        return self is not Audience.AGENTS

    @property
    def has_agents(self) -> bool:
        return self is not Audience.WAYPOINTS


@dataclass(frozen=True, slots=True)
class Attachment:
    """``selector`` None: none given; an empty one selects every pod."""

    selector: Mapping[str, str] | None
    targets: tuple[TargetRef, ...]
    audience: Audience


def audience_of(obj: KubeObject) -> Audience:
    """Of a policy, right or not. With targets, even unreadable ones, it is for waypoints alone; without, for node agents.

    Not certain, and never of a policy without mistakes: a ``spec`` that is none, or goes by another name; ``targetRefs`` with nothing in
    it, which Istio reads as no targets at all; a field that seems to be meant for targets (``targetrefs``, ``targets``), or stands beside
    ``spec``.
    """
    beside = obj.raw.keys() - _BESIDE_SPEC
    spec = obj.raw.get("spec", {})
    if not isinstance(spec, Mapping) or ("spec" not in obj.raw and beside):
        return Audience.EITHER
    if any(spec.get(key) for key in ("targetRef", "targetRefs")):
        return Audience.WAYPOINTS
    return Audience.EITHER if any(key.lower().startswith("target") for key in (*spec, *beside)) else Audience.AGENTS


_BESIDE_SPEC: Final = frozenset({"apiVersion", "kind", "metadata", "spec", "status"})


def read_attachment(spec: Fields) -> Attachment:
    """``selector``, ``targetRef`` and ``targetRefs`` of a policy's ``spec``."""
    selector = spec.mapping("selector")
    if selector is not None:
        selector.refuse_unknown("matchLabels")
    labels = selector.string_map("matchLabels") if selector is not None else None
    one = spec.mapping("targetRef")
    several = spec.mappings("targetRefs", empty="is empty: add an item, or leave 'targetRefs' out", most=MAX_TARGETS)
    found = [_read_target(item) for item in ((one,) if one is not None else ()) + several]
    spec.demand(_SELECTOR_OR_TARGETS, [("selector",)] if labels is not None and (one is not None or several) else ())
    spec.demand(_ONE_OR_SEVERAL, [("targetRef",)] if one is not None and several else ())
    return Attachment(labels, tuple(dict.fromkeys(target for target in found if target is not None)), audience_of(spec.whole))


def _read_target(item: Fields) -> TargetRef | None:
    """None where it does not say what it is."""
    item.refuse_unknown("group", "kind", "name", "namespace", hints={"sectionName": "; policies are for all ports of a target"})
    group = item.string("group", text=_GROUP)
    kind = item.string("kind", required=True, choices=tuple(GROUPS))
    name = item.string("name", required=True, text=_NAME)
    item.string("namespace", text=_NOWHERE_ELSE)
    wrong = bool(kind) and ("" if group == "core" else group) != GROUPS[kind]
    item.demand(_GROUP_OF_KIND, [("group",)] if wrong else ())
    return TargetRef(kind, name) if kind and name and not wrong else None


def _find_name_mistake(name: str) -> str | None:
    if not name:
        return "names what the policy is for, and is empty"
    return f"has {len(name)} characters, of at most {MAX_NAME}" if len(name) > MAX_NAME else None


def _find_namespace_mistake(namespace: str) -> str | None:
    return "must be left out: a policy is for what is in its own namespace" if namespace else None


_NAME: Final = Text(_find_name_mistake, {"minLength": 1, "maxLength": MAX_NAME})
_GROUP: Final = Text(lambda group: None, {"maxLength": 253})
_NOWHERE_ELSE: Final = Text(_find_namespace_mistake, {"maxLength": 0})
_GROUP_OF_KIND: Final = Rule(
    "the group of a Service is empty, of a ServiceEntry networking.istio.io, of a Gateway or GatewayClass gateway.networking.k8s.io",
    "self.kind == 'Service' ? (!has(self.group) || self.group in ['', 'core']) : (has(self.group) && self.group == "
    "(self.kind == 'ServiceEntry' ? 'networking.istio.io' : 'gateway.networking.k8s.io'))",
    "group",
)
_SELECTOR_OR_TARGETS: Final = Rule(
    "a policy takes a selector or targetRefs, not both",
    "!has(self.selector) || !(has(self.targetRef) || has(self.targetRefs))",
    "selector",
)
_ONE_OR_SEVERAL: Final = Rule(
    "a policy takes targetRef or targetRefs, not both", "!has(self.targetRef) || !has(self.targetRefs)", "targetRef"
)

"""What a policy is attached to by ``targetRef`` and ``targetRefs``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from mesh.kube.fields import Fields, Rule, Text

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


@dataclass(frozen=True, slots=True)
class Attachment:
    """``selector`` None: none given; an empty one selects every pod. ``has_targets``: some were given, whether they could be read or not;
    such a policy is for waypoints alone."""

    selector: Mapping[str, str] | None
    targets: tuple[TargetRef, ...]
    has_targets: bool


def read_attachment(spec: Fields) -> Attachment:
    """``selector``, ``targetRef`` and ``targetRefs`` of a policy's ``spec``."""
    selector = spec.mapping("selector")
    if selector is not None:
        selector.refuse_unknown("matchLabels")
    labels = selector.string_map("matchLabels") if selector is not None else None
    one = spec.mapping("targetRef")
    several = spec.mappings("targetRefs", empty="is empty: add an item, or leave 'targetRefs' out", most=MAX_TARGETS)
    found = [_read_target(item) for item in ((one,) if one is not None else ()) + several]
    has_targets = one is not None or bool(several)
    spec.demand(_SELECTOR_OR_TARGETS, [("selector",)] if labels is not None and has_targets else ())
    spec.demand(_ONE_OR_SEVERAL, [("targetRef",)] if one is not None and several else ())
    return Attachment(labels, tuple(dict.fromkeys(target for target in found if target is not None)), has_targets)


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

"""A DestinationRule: how to choose among the endpoints of a host, and how to reach them. Checked as Istio's webhook checks it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from mesh.kube.fields import Fields, Text
from mesh.kube.hostnames import HOSTNAME_PATTERN, MAX_LENGTH, is_hostname, is_wildcard
from mesh.kube.objects import KubeObject, SourceProblem
from mesh.kube.trafficpolicy import PolicySettings, read_policy

MAX_SUBSETS: Final = 4096


@dataclass(frozen=True, slots=True)
class RuleSubset:
    name: str
    labels: Mapping[str, str]
    policy: PolicySettings | None


@dataclass(frozen=True, slots=True)
class KubeDestinationRule:
    """``host`` as it is written: a short name is one of the rule's namespace."""

    namespace: str
    name: str
    host: str
    policy: PolicySettings | None
    subsets: tuple[RuleSubset, ...]
    export_to: tuple[str, ...]
    """``*``, ``.`` or namespaces; empty: as the mesh has it."""
    selects_workloads: bool
    """It has a ``workloadSelector``, and so is for proxies beside workloads of its own namespace."""


def read_destination_rule(obj: KubeObject) -> tuple[KubeDestinationRule, tuple[SourceProblem, ...]]:
    """The rule and every mistake in it; with a mistake it is not for use."""
    fields = Fields(obj)
    return parse_destination_rule(fields), tuple(fields.problems)


def parse_destination_rule(fields: Fields) -> KubeDestinationRule:
    """``fields`` of the whole object."""
    obj = fields.whole
    spec = fields.mapping("spec", required=True) or Fields(obj, ("spec",), {}, fields.problems)
    spec.refuse_unknown("host", "trafficPolicy", "subsets", "exportTo", "workloadSelector")
    policy, selector = spec.mapping("trafficPolicy"), spec.mapping("workloadSelector")
    subsets = tuple(_read_subset(item) for item in spec.mappings("subsets", most=MAX_SUBSETS))
    seen: set[str] = set()
    for index, subset in enumerate(subsets):
        if subset.name in seen:
            spec.complain("subsets", f"the subset '{subset.name}' is given twice", index, "name")
        seen.add(subset.name)
    if selector is not None:
        selector.refuse_unknown("matchLabels")
        selector.string_map("matchLabels")
    return KubeDestinationRule(
        namespace=obj.namespace,
        name=obj.name,
        host=spec.string("host", required=True, text=_HOST).rstrip(".").lower(),
        policy=read_policy(policy) if policy is not None else None,
        subsets=subsets,
        export_to=_read_export_to(spec, obj.namespace, selector is not None),
        selects_workloads=selector is not None,
    )


def _read_subset(item: Fields) -> RuleSubset:
    item.refuse_unknown("name", "labels", "trafficPolicy")
    policy = item.mapping("trafficPolicy")
    return RuleSubset(
        name=item.string("name", required=True, text=_SUBSET),
        labels=item.string_map("labels"),
        policy=read_policy(policy) if policy is not None else None,
    )


def _read_export_to(spec: Fields, namespace: str, selects_workloads: bool) -> tuple[str, ...]:
    exported = spec.strings("exportTo", text=_EXPORT)
    seen: set[str] = set()
    for index, item in enumerate(exported):
        place = namespace if item == "." else item
        if place in seen:
            spec.complain("exportTo", f"'{item}' is given twice", index)
        elif place == "*" and len(exported) > 1:
            spec.complain("exportTo", "'*' is everywhere: leave the others out", index)
        elif selects_workloads and place != namespace:
            spec.complain("exportTo", "a rule with a workloadSelector is for its own namespace alone", index)
        seen.add(place)
    return exported


def _find_host_mistake(host: str) -> str | None:
    if host == "*" or is_wildcard(host) or is_hostname(host):
        return None
    return f"expected a hostname, *.hostname or *, found '{host}'"


def _find_subset_mistake(name: str) -> str | None:
    return None if re.fullmatch(_LABEL, name) else f"expected a DNS label (lower case, digits and '-', at most 63), found '{name}'"


def _find_export_mistake(place: str) -> str | None:
    if place in ("*", ".") or re.fullmatch(_LABEL, place):
        return None
    return f"expected '.', '*' or the name of a namespace, found '{place}'"


_LABEL: Final = "[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
_HOST: Final = Text(_find_host_mistake, {"pattern": rf"^(\*|(\*\.)?{HOSTNAME_PATTERN})$", "maxLength": MAX_LENGTH + len("*.")})
_SUBSET: Final = Text(_find_subset_mistake, {"pattern": f"^{_LABEL}$"})
_EXPORT: Final = Text(_find_export_mistake, {"pattern": rf"^(\*|\.|{_LABEL})$"})

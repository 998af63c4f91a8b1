"""Which DestinationRules decide about a destination, seen from a waypoint's namespace (reference: Istio's `destination_rule.go` and
`push_context.go`).

Looked for in three places: the waypoint's own namespace, the service's, the root namespace; the first with a rule for the host decides
alone. Within a namespace the most specific host does, and of several rules for one host the oldest, to which later ones may add subsets.
A rule with a ``workloadSelector`` is for proxies beside workloads, and no waypoint's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from istiod_py.translate.l7.sources import RouteDefaults, expand
from istiod_py.translate.reading import Read
from mesh.kube.destinationrule import KubeDestinationRule
from mesh.kube.objects import ObjectKey, mapping_at
from mesh.kube.trafficpolicy import PolicySettings


@dataclass(frozen=True, slots=True)
class Piece:
    """A trafficPolicy of a rule, or of a subset. ``broken``: the rule has mistakes and never was good, and it speaks of TLS: what it meant
    is not known, and plaintext is surely not it."""

    settings: PolicySettings = field(default_factory=PolicySettings)
    broken: str = ""


@dataclass(frozen=True, slots=True)
class MergedSubset:
    name: str
    labels: Mapping[str, str]
    piece: Piece


@dataclass(frozen=True, slots=True)
class Merged:
    """All that decides about a host. ``keys``: the rules, oldest first."""

    keys: tuple[ObjectKey, ...] = ()
    piece: Piece = Piece()
    subsets: tuple[MergedSubset, ...] = ()

    def pieces(self) -> Iterator[Piece]:
        yield self.piece
        yield from (subset.piece for subset in self.subsets)


NOTHING = Merged()


@dataclass(frozen=True, slots=True)
class _Rule:
    """One that counts. ``exported``: ``*``, or namespaces; ``piece`` None: it has no trafficPolicy."""

    key: ObjectKey
    host: str
    exported: frozenset[str]
    piece: Piece | None
    subsets: tuple[MergedSubset, ...]

    def is_seen_from(self, namespace: str) -> bool:
        return "*" in self.exported or namespace in self.exported

    @property
    def is_private(self) -> bool:
        return self.exported == {self.key.namespace}


class DestinationRules:
    """All DestinationRules, found by namespace and host."""

    def __init__(self, reads: Iterable[Read[KubeDestinationRule]], defaults: RouteDefaults, root_namespace: str) -> None:
        """``defaults``: ``export_to`` is that of DestinationRules."""
        self._root = root_namespace
        self._by_namespace: dict[str, dict[str, list[_Rule]]] = {}
        """Hosts, each with its rules; oldest first."""
        for read in sorted(reads, key=_age):
            rule = _as_rule(read, defaults)
            if rule is not None:
                self._by_namespace.setdefault(rule.key.namespace, {}).setdefault(rule.host, []).append(rule)

    def find(self, hostname: str, namespace: str, viewpoint: str) -> Merged:
        """For the service ``hostname`` of ``namespace``, at waypoints of namespace ``viewpoint``."""
        own = self._most_specific(viewpoint, hostname, local=True)
        if own:
            return _merge(own)
        for place in dict.fromkeys((namespace, self._root)):
            seen = [rule for rule in self._most_specific(place, hostname, local=False) if rule.is_seen_from(viewpoint)]
            if seen:
                return _merge(seen)
        return NOTHING

    def _most_specific(self, namespace: str, hostname: str, *, local: bool) -> list[_Rule]:
        """``local``: what a proxy of the namespace itself would look at; else what others would, whether they may see it or not."""
        hosts = self._by_namespace.get(namespace)
        for host in _patterns(hostname) if hosts else ():
            assert hosts is not None
            rules = [rule for rule in hosts.get(host, ()) if (self._is_local(rule) if local else not rule.is_private)]
            if rules:
                return rules
        return []

    def _is_local(self, rule: _Rule) -> bool:
        """What the root namespace exports is for everybody, and would else stand before what a service's owner says."""
        namespace = rule.key.namespace
        return rule.is_private if namespace == self._root else rule.is_seen_from(namespace)


def _age(read: Read[KubeDestinationRule]) -> tuple[bool, str, str, str]:
    """Istio's order; objects without a time (files have none) are younger than all others."""
    return read.obj.created == "", read.obj.created, read.obj.name, read.obj.namespace


def _patterns(hostname: str) -> Iterator[str]:
    """The hosts that mean it, the most specific first."""
    yield hostname
    labels = hostname.removeprefix("*.").split(".")
    for index in range(0 if hostname.startswith("*.") else 1, len(labels)):
        pattern = f"*.{'.'.join(labels[index:])}"
        if pattern != hostname:
            yield pattern
    if hostname != "*":
        yield "*"


def _merge(rules: list[_Rule]) -> Merged:
    """The oldest, and those after it that are exported to the same places or more."""
    oldest = rules[0]
    merged = [rule for rule in rules if rule.exported >= oldest.exported]
    subsets: dict[str, MergedSubset] = {}
    for rule in merged:
        for subset in rule.subsets:
            subsets.setdefault(subset.name, subset)
    piece = next((rule.piece for rule in merged if rule.piece is not None), Piece())
    return Merged(tuple(rule.key for rule in merged), piece, tuple(subsets.values()))


def _as_rule(read: Read[KubeDestinationRule], defaults: RouteDefaults) -> _Rule | None:
    rule = read.value
    if rule.selects_workloads or not rule.host:
        return None
    places = rule.export_to or defaults.export_to
    exported = frozenset(rule.namespace if place == "." else place for place in places)
    host = expand(rule.host, rule.namespace, defaults)
    if not read.good:
        return _feared(read, host, exported)
    subsets = tuple(MergedSubset(s.name, s.labels, Piece(s.policy) if s.policy is not None else Piece()) for s in rule.subsets)
    return _Rule(read.obj.key, host, exported, Piece(rule.policy) if rule.policy is not None else None, subsets)


def _feared(read: Read[KubeDestinationRule], host: str, exported: frozenset[str]) -> _Rule | None:
    """Of a rule with mistakes, where it speaks of TLS; None where it does not, and counts for nothing."""
    because = f"DestinationRule {read.value.namespace}/{read.value.name} has a mistake: {read.problems[0]}"
    broken = Piece(broken=because)
    piece = broken if _speaks_of_tls(mapping_at(read.obj.spec, "trafficPolicy")) else None
    raw = read.obj.spec.get("subsets")
    given = [item for item in raw if isinstance(item, Mapping)] if isinstance(raw, list) else []
    subsets = tuple(
        MergedSubset(subset.name, subset.labels, broken)
        for subset, item in zip(read.value.subsets, given, strict=True)
        if subset.name and _speaks_of_tls(mapping_at(item, "trafficPolicy"))
    )
    return _Rule(read.obj.key, host, exported, piece, subsets) if piece is not None or subsets else None


def _speaks_of_tls(policy: Mapping[str, object]) -> bool:
    ports = policy.get("portLevelSettings")
    return "tls" in policy or (isinstance(ports, list) and any(isinstance(port, Mapping) and "tls" in port for port in ports))

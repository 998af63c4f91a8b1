"""Which of a destination's hosts are near and which are for when those fail: priorities, localities, and the share of each. Pure.

The rules are Istio's: a DestinationRule's ``localityLbSetting`` (with outlier detection: without it nobody would notice a failure), else
what the service's ``trafficDistribution`` asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mesh.model.l7.destination import Distribute, Locality
from mesh.model.workload import Locality as Place
from mesh.model.workload import Workload
from waypoint_py.upstream.algorithms import Host

_OVERPROVISIONED = 1.4
"""Envoy's factor: a level carries its whole share until fewer than 1/1.4 of its hosts are healthy."""
_REGION = "topology.kubernetes.io/region"
_ZONE = "topology.kubernetes.io/zone"
_SUBZONE = "topology.istio.io/subzone"
_NETWORK = "topology.istio.io/network"
_CLUSTER = "topology.istio.io/cluster"
_NODE = "kubernetes.io/hostname"

Labels = Mapping[str, Mapping[str, str]]
"""Of workloads, by uid."""


@dataclass(frozen=True, slots=True)
class Group:
    """Hosts that are alike near, and their weight among the groups of their level."""

    hosts: tuple[Host, ...]
    weight: float


@dataclass(frozen=True, slots=True)
class Level:
    """Groups of one priority. ``because``: in what they are near, for reasons."""

    groups: tuple[Group, ...]
    because: str

    @property
    def hosts(self) -> list[Host]:
        return [host for group in self.groups for host in group.hosts]


def arrange(hosts: Sequence[Host], setting: Locality | None, source: Workload, labels: Labels, *, detects: bool) -> tuple[Level, ...]:
    """The levels, nearest first; none of them is empty. ``setting`` None: nobody says anything, and near is what is near by its place, as
    everywhere in Istio. ``detects``: outlier detection is on."""
    setting = setting or Locality()
    if not setting.enabled or not (detects or setting.without_outlier_detection):
        return (Level((Group(tuple(hosts), 1.0),), f"one of {len(hosts)}"),) if hosts else ()
    if setting.distribute:
        rule = next((rule for rule in setting.distribute if _covers(rule.source, source.locality)), None)
        if rule is not None:
            return _distribute(hosts, rule)
        return (Level((Group(tuple(hosts), 1.0),), f"one of {len(hosts)}"),) if hosts else ()
    rank = _by_labels(setting.priority, source, labels) if setting.priority else _by_place(dict(setting.failover), source.locality)
    return _rank(hosts, rank)


def _rank(hosts: Sequence[Host], rank: Callable[[Workload], int]) -> tuple[Level, ...]:
    ranked: dict[int, list[Host]] = {}
    for host in hosts:
        ranked.setdefault(rank(host.workload), []).append(host)
    levels = [ranked[number] for number in sorted(ranked)]
    return tuple(
        Level((Group(tuple(level), 1.0),), f"one of the {len(level)} of priority {number} of {len(levels)}")
        for number, level in enumerate(levels)
    )


def _by_place(failover: Mapping[str, str], here: Place) -> Callable[[Workload], int]:
    """0 same subzone, 1 same zone, 2 same region, 3 elsewhere; with ``failover``, 4 elsewhere but in the region named for ours."""

    def rank(workload: Workload) -> int:
        there = workload.locality
        if there.region != here.region:
            target = failover.get(here.region)
            return 3 if target is None or there.region == target else 4
        if there.zone != here.zone:
            return 2
        return 1 if there.subzone != here.subzone else 0

    return rank


def _by_labels(priority: Sequence[str], source: Workload, labels: Labels) -> Callable[[Workload], int]:
    """How many of the labels, from the first, are not shared; ``key=value`` asks the endpoint for that value whatever ours is."""
    own = _labels_of(source, labels)
    wanted = [(key, value if given else own.get(key, "")) for key, given, value in (label.partition("=") for label in priority)]

    def rank(workload: Workload) -> int:
        theirs = _labels_of(workload, labels)
        for number, (key, value) in enumerate(wanted):
            if theirs.get(key, "") != value:
                return len(wanted) - number
        return 0

    return rank


def _labels_of(workload: Workload, labels: Labels) -> Mapping[str, str]:
    return {
        **labels.get(workload.uid, {}),
        _REGION: workload.locality.region,
        _ZONE: workload.locality.zone,
        _SUBZONE: workload.locality.subzone,
        _NETWORK: workload.network,
        _CLUSTER: workload.cluster_id,
        _NODE: workload.node,
    }


def _distribute(hosts: Sequence[Host], rule: Distribute) -> tuple[Level, ...]:
    """One level whose localities share the load as written; those that nothing names get nothing."""
    groups: list[Group] = []
    left = list(hosts)
    for pattern in sorted(rule.to, key=_vagueness):
        there = [host for host in left if _covers(pattern, host.workload.locality)]
        left = [host for host in left if not _covers(pattern, host.workload.locality)]
        if there and rule.to[pattern] > 0:
            groups.append(Group(tuple(there), float(rule.to[pattern])))
    return (Level(tuple(groups), f"one of {len(groups)} localities by their shares"),) if groups else ()


def _vagueness(pattern: str) -> tuple[int, str]:
    """The most exact first: a locality that is named belongs to its name, not to ``region/*`` beside it."""
    parts = [part for part in pattern.split("/") if part != "*"]
    return -len(parts), pattern


def _covers(pattern: str, place: Place) -> bool:
    """``*``, ``region``, ``region/zone``, ``region/zone/subzone``, with ``*`` for any from there on."""
    for wanted, there in zip(pattern.split("/"), (place.region, place.zone, place.subzone), strict=False):
        if wanted == "*":
            return True
        if wanted != there:
            return False
    return True


def share_out(healthy: Sequence[tuple[int, int]]) -> list[float]:
    """The part of the load of each level, of ``(healthy, all)`` hosts: the first level takes what it can carry, the next what is left. All
    0: nobody can. Source: Envoy's priority load with its overprovisioning factor."""
    carried = [capacity(good, everybody) for good, everybody in healthy]
    total = min(1.0, sum(carried))
    if total <= 0.0:
        return [0.0] * len(carried)
    left, shares = 1.0, []
    for part in carried:
        share = min(left, part / total)
        shares.append(share)
        left -= share
    return shares


def capacity(well: int, everybody: int) -> float:
    """The part of its full load that a level or locality carries when some of its hosts are ill."""
    return min(1.0, _OVERPROVISIONED * well / everybody) if everybody else 0.0

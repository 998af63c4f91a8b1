"""Which endpoints of a service may take a connection, and one of them by weight.

The list is made once for a service, port and place of the source, and kept until one of them changes (`MeshState.picks`); a connection
then costs one random number, whatever the number of endpoints.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple, assert_never

from mesh.model.service import HealthPolicy, LoadBalancing, LoadBalancingMode, LoadBalancingScope, Service
from mesh.model.workload import HealthStatus, PortMapping, Workload


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A workload as one service sees it. Whether it is healthy is the workload's ``status``."""

    workload: Workload
    ports: tuple[PortMapping, ...]


@dataclass(frozen=True, slots=True)
class Candidate:
    """An endpoint that may be chosen, and the port it serves the wanted one on."""

    workload: Workload
    target_port: int


@dataclass(frozen=True, slots=True)
class PickList:
    """The candidates of a service for sources of one place. ``because`` completes a sentence, with or without candidates."""

    candidates: tuple[Candidate, ...]
    because: str
    _weights: tuple[int, ...] | None = field(init=False)
    """Running sums of the capacities; None if they are all the same."""

    def __post_init__(self) -> None:
        capacities = [candidate.workload.capacity for candidate in self.candidates]
        object.__setattr__(self, "_weights", tuple(accumulate(capacities)) if len(set(capacities)) > 1 else None)

    def without(self, uids: frozenset[str]) -> PickList:
        """The same without these workloads."""
        return PickList(tuple(candidate for candidate in self.candidates if candidate.workload.uid not in uids), self.because)

    def pick(self, rng: random.Random) -> Candidate | None:
        """One candidate, by weight; None if there is none."""
        if not self.candidates:
            return None
        if len(self.candidates) == 1:
            return self.candidates[0]  # no dice: the route can be kept
        if self._weights is None:
            return self.candidates[int(rng.random() * len(self.candidates))]
        return self.candidates[bisect_right(self._weights, int(rng.random() * self._weights[-1]))]


class Wanted(NamedTuple):
    """What a connection wants of a service. ``waypoint``: to be taken in by its endpoints as by a waypoint, in HBONE on ``port``."""

    port: int
    waypoint: bool = False


class Place(NamedTuple):
    """Of a source all that its choice of endpoints depends on; sources that share it share their pick lists."""

    network: str
    preferred: tuple[str, ...]
    """Its own values of the scopes that the service prefers, in their order."""


def place_of(source: Workload, service: Service) -> Place:
    """The place of a source as this service's load balancing looks at it."""
    balancing = service.load_balancing
    if balancing is None:
        return Place(source.network, ())
    return Place(source.network, tuple(scope_value(source, scope) for scope in balancing.routing_preference))


def list_picks(service: Service, endpoints: Iterable[Endpoint], wanted: Wanted, place: Place) -> PickList:
    """The endpoints among which connections from ``place`` to ``wanted`` are spread."""
    balancing = service.load_balancing or LoadBalancing()
    known = list(endpoints)
    healthy = [endpoint for endpoint in known if takes_connections(endpoint.workload, balancing)]
    reachable = [
        Candidate(endpoint.workload, port)
        for endpoint in healthy
        if _is_reachable(endpoint.workload, place.network) and (port := _port_for(service, endpoint, wanted))
    ]
    # Independent of the order in which the endpoints became known, so that a choice can be repeated.
    reachable.sort(key=lambda candidate: candidate.workload.uid)
    if not reachable:
        return PickList((), _why_none(known, healthy, wanted))
    return _by_locality(reachable, balancing, place)


def takes_connections(workload: Workload, balancing: LoadBalancing) -> bool:
    """Whether an endpoint counts among those of a service."""
    healthy = workload.status is HealthStatus.HEALTHY or balancing.health_policy is HealthPolicy.ALLOW_ALL
    return healthy and workload.capacity > 0


def target_port(service: Service, endpoint_ports: tuple[PortMapping, ...], port: int) -> int | None:
    """The port that an endpoint serves the service's ``port`` on: its own word goes before the service's. None if it does not serve it."""
    of_service = next((offered.target_port for offered in service.ports if offered.service_port == port), None)
    if of_service is None:
        return None
    own = next((mapping.target_port for mapping in endpoint_ports if mapping.service_port == port), 0)
    return own or of_service or None


def scope_value(workload: Workload, scope: LoadBalancingScope) -> str:
    """What a workload has to share with another to be in the same scope; each scope looks at its own field only."""
    match scope:
        case LoadBalancingScope.REGION:
            return workload.locality.region
        case LoadBalancingScope.ZONE:
            return workload.locality.zone
        case LoadBalancingScope.SUBZONE:
            return workload.locality.subzone
        case LoadBalancingScope.NODE:
            return workload.node
        case LoadBalancingScope.CLUSTER:
            return workload.cluster_id
        case LoadBalancingScope.NETWORK:
            return workload.network
        case _:
            assert_never(scope)


def _is_reachable(workload: Workload, network: str) -> bool:
    if workload.addresses or workload.hostname:
        return True
    return workload.network != network and workload.network_gateway is not None


def _port_for(service: Service, endpoint: Endpoint, wanted: Wanted) -> int | None:
    port = target_port(service, endpoint.ports, wanted.port)
    if port is None and wanted.waypoint and endpoint.workload.application_tunnel is not None:
        return wanted.port
    return port


def _why_none(known: list[Endpoint], healthy: list[Endpoint], wanted: Wanted) -> str:
    if not known:
        return "it has no endpoints"
    if not healthy:
        return f"none of its {len(known)} endpoints is healthy"
    return f"none of its {len(healthy)} healthy endpoints serves port {wanted.port}"


def _by_locality(candidates: list[Candidate], balancing: LoadBalancing, place: Place) -> PickList:
    scopes = balancing.routing_preference
    match balancing.mode:
        case LoadBalancingMode.STANDARD | LoadBalancingMode.PASSTHROUGH:
            return PickList(tuple(candidates), f"one of {len(candidates)}")
        case LoadBalancingMode.STRICT:
            near = [c for c in candidates if all(_shared(c.workload, scopes, place))]
            if not near:
                return PickList((), f"none of its {len(candidates)} healthy endpoints is in the same {_names(scopes)}, as it demands")
            return PickList(tuple(near), f"one of {len(near)} in the same {_names(scopes)}, as the service demands")
        case LoadBalancingMode.FAILOVER:
            ranks = [_rank(c.workload, scopes, place) for c in candidates]
            best = max(ranks)
            near = [c for c, rank in zip(candidates, ranks, strict=True) if rank == best]
            if len(near) == len(candidates):
                return PickList(tuple(near), f"one of {len(near)}, equally near by {_names(scopes)}" if len(near) > 1 else "one of 1")
            return PickList(tuple(near), f"one of the {len(near)} nearest by {_names(scopes)} of {len(candidates)}")
        case _:
            assert_never(balancing.mode)


def _shared(workload: Workload, scopes: tuple[LoadBalancingScope, ...], place: Place) -> list[bool]:
    return [scope_value(workload, scope) == own for scope, own in zip(scopes, place.preferred, strict=True)]


def _rank(workload: Workload, scopes: tuple[LoadBalancingScope, ...], place: Place) -> int:
    """How many leading preferences are shared, up to the first that is not.

    NETWORK in the first place is special: the same network outranks all else, and on another one the later scopes still count.
    """
    shared = _shared(workload, scopes, place)
    rank = 0
    if scopes and scopes[0] is LoadBalancingScope.NETWORK:
        rank = len(scopes) if shared[0] else 0
        shared = shared[1:]
    for same in shared:
        if not same:
            break
        rank += 1
    return rank


def _names(scopes: tuple[LoadBalancingScope, ...]) -> str:
    return ", ".join(scope.name.lower() for scope in scopes)

"""Which endpoint of a destination takes a try of a request, or a connection: what the exchange asks, and the plainest answer."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from mesh.model.address import NamespacedHostname, SocketAddress
from mesh.model.l7.destination import DestinationConfig, Subset, TrafficPolicy
from mesh.model.l7.routing import Destination
from mesh.model.service import Service
from mesh.model.workload import Workload
from mesh.state.balance import Candidate, Wanted
from mesh.state.resolve import choose_ip
from mesh.state.store import MeshState
from waypoint_py.context import Connection
from waypoint_py.http.message import Request
from waypoint_py.upstream.session import Endpoint, UpstreamFailure


@dataclass(frozen=True, slots=True)
class NoEndpoint:
    """Nobody can take it. ``unknown``: there is no such service or subset at all, rather than none that is healthy."""

    because: str
    unknown: bool = False


Outcome: TypeAlias = int | UpstreamFailure | None
"""How a try went: the status of its response, what failed, or None where it was given up for a reason of ours or the client's."""


class Chooser(Protocol):
    """Chooses, and is told how it went: that is all that balancing by load and ejecting outliers need."""

    def choose(
        self, destination: Destination, request: Request | None, connection: Connection, tried: Collection[str]
    ) -> Endpoint | NoEndpoint:
        """``request`` None: for a TCP connection. ``tried``: `Endpoint.key` of those that this request has tried, to be avoided."""

    def began(self, endpoint: Endpoint) -> None:
        """A try or a connection of its own is under way there."""

    def ended(self, endpoint: Endpoint, outcome: Outcome) -> None:
        """It is over. Once for every `began`."""


class HealthyPick:
    """One of the healthy endpoints, by capacity, as the node agents choose; of those that were not tried yet, while there are any.

    ``configured`` gives a destination's configuration, ``place`` the workload that we are.
    """

    def __init__(
        self,
        state: MeshState,
        configured: Callable[[str], DestinationConfig | None],
        place: Callable[[], Workload],
        rng: random.Random,
    ) -> None:
        self._state = state
        self._configured = configured
        self._place = place
        self._rng = rng

    def choose(
        self, destination: Destination, request: Request | None, connection: Connection, tried: Collection[str]
    ) -> Endpoint | NoEndpoint:
        service = self._state.find_service(NamespacedHostname(destination.namespace, destination.hostname))
        if service is None:
            return NoEndpoint(f"service {destination.namespace}/{destination.hostname} is not known", unknown=True)
        config = self._configured(str(service.key))
        subset = find_subset(config, destination.subset)
        if destination.subset and subset is None:
            return NoEndpoint(f"service {service.key} has no subset {destination.subset!r}", unknown=True)
        picks = self._state.picks(service, Wanted(destination.port), self._place())
        candidates: Collection[Candidate] = picks.candidates
        if subset is not None and config is not None:
            labels = config.labels
            candidates = [each for each in candidates if matches(labels.get(each.workload.uid, {}), subset)]
            if not candidates:
                return NoEndpoint(f"no endpoint of service {service.key} is in subset {destination.subset!r}")
        if not candidates:
            return NoEndpoint(f"service {service.key}: {picks.because}")
        policy = policy_of(config, destination)
        endpoints = [
            found
            for each in candidates
            if (found := endpoint_of(each, service, destination, policy, connection, picks.because)) is not None
        ]
        if not endpoints:
            return NoEndpoint(f"no endpoint of service {service.key} has an address that can be dialled")
        fresh = [each for each in endpoints if each.key not in tried] or endpoints
        weights = [each.workload.capacity if each.workload is not None else 1 for each in fresh]
        return self._rng.choices(fresh, weights)[0]

    def began(self, endpoint: Endpoint) -> None:
        pass

    def ended(self, endpoint: Endpoint, outcome: Outcome) -> None:
        pass


def find_subset(config: DestinationConfig | None, name: str) -> Subset | None:
    """The subset of that name; None if there is none, or none is wanted."""
    return next((subset for subset in config.subsets if subset.name == name), None) if config is not None and name else None


def policy_of(config: DestinationConfig | None, destination: Destination) -> TrafficPolicy:
    """What holds for a destination: that of its subset's port, of its subset, of its port, of the service, in this order."""
    if config is None:
        return _DEFAULT
    subset = find_subset(config, destination.subset)
    if subset is not None:
        return subset.ports.get(destination.port, subset.policy)
    return config.ports.get(destination.port, config.policy)


def matches(labels: Mapping[str, str], subset: Subset) -> bool:
    """Whether an endpoint with these labels is in the subset."""
    return subset.labels.items() <= labels.items()


def endpoint_of(
    candidate: Candidate, service: Service, destination: Destination, policy: TrafficPolicy, connection: Connection, because: str
) -> Endpoint | None:
    """A candidate as it is dialled: at an address of the client's family, if it has one."""
    ip = choose_ip(candidate.workload, service, connection.destination.ip, like=connection.destination.ip)
    if ip is None:
        return None
    return Endpoint(SocketAddress(ip, candidate.target_port), candidate.workload, service, destination, policy, because)


_DEFAULT = TrafficPolicy()

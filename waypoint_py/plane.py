"""What all connections of a waypoint share. One thread, so no lock: a callback sees all of a change or none."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final, Protocol, TypeVar

from mesh.model.l7.destination import TrafficPolicy
from mesh.model.l7.routing import Destination
from mesh.reactor.loop import Reactor
from mesh.state.store import MeshState
from waypoint_py.admission import Ourselves
from waypoint_py.observer import Local, Observer
from waypoint_py.policy.ext_authz import ExtAuthz
from waypoint_py.policy.jwks import Authenticator
from waypoint_py.routing.retry import Room
from waypoint_py.store import Store
from waypoint_py.upstream.balancer import Balancer
from waypoint_py.upstream.session import Cancel, Connections

IDLE_SECONDS: Final = 3600.0
"""How long a client's connection may stay that carries nothing (Envoy's default)."""

T = TypeVar("T")


class Waits(Protocol):
    """The way into trio, for what cannot be decided at once."""

    def wait(self, run: Callable[[], Awaitable[T]], on_done: Callable[[T], None], on_crash: Callable[[Exception], None]) -> Cancel:
        """Run it, then call ``on_done`` within the loop, never within this call; after ``cancel`` never. If ``run`` raises, which is a
        defect and reported, ``on_crash`` is called instead: whoever waits must not wait for ever."""


class Load:
    """What is under way towards one destination, for bounds on retries."""

    __slots__ = ("requests", "retries")

    def __init__(self) -> None:
        self.requests = 0
        self.retries = 0

    def room(self, policy: TrafficPolicy) -> Room:
        return Room(self.requests, self.retries, policy.pool.max_retries, policy.retry_budget)


class Loads:
    """One `Load` for each destination that has any."""

    def __init__(self) -> None:
        self._loads: dict[Destination, Load] = {}

    def enter(self, destination: Destination) -> Load:
        load = self._loads.get(destination)
        if load is None:
            load = self._loads[destination] = Load()
        load.requests += 1
        return load

    def leave(self, destination: Destination, load: Load) -> None:
        load.requests -= 1
        if not load.requests and self._loads.get(destination) is load:
            del self._loads[destination]


@dataclass(slots=True)
class Counts:
    """For operators; read by the metrics page."""

    connections: int = 0
    """Of clients, under way."""
    exchanges: int = 0
    stalled_sniffs: int = 0
    """Connections on ports without a declared protocol that said nothing for a while: a server that speaks first waits for ever there."""
    mirrors_dropped: int = 0
    """Copies that were given up, because their destination was too slow."""


@dataclass(slots=True)
class Plane:
    reactor: Reactor
    state: MeshState
    store: Store
    connections: Connections
    balancer: Balancer
    observer: Observer
    waits: Waits
    authenticator: Authenticator
    ext_authz: ExtAuthz
    us: Callable[[], Ourselves]
    local: Local
    rng: random.Random
    wall: Callable[[], float]
    """Unix time."""
    loads: Loads = field(default_factory=Loads)
    counts: Counts = field(default_factory=Counts)
    draining: bool = False

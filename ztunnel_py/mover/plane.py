"""What all connections of one mover share."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from mesh.reactor.loop import Reactor
from mesh.reactor.pool import PoolLimits
from mesh.state.memo import PeerMemo, RouteMemo
from mesh.state.store import MeshState
from ztunnel_py.mover.credentials import CredentialStore
from ztunnel_py.mover.ledger import Ledger
from ztunnel_py.mover.missed import MissedWaypoints
from ztunnel_py.mover.shares import Shares
from ztunnel_py.mover.waiting import WaitingRoom

POLICY_GRACE_SECONDS = 0.5
"""How long a policy that a workload names may be on its way: control planes send workloads and policies in separate messages, workloads
first. Until then nobody is let in, and nobody who is in is ended."""


@dataclass(slots=True)
class Plane:
    """The mesh as this mover knows it, and the means to serve it. One thread, so no lock: a callback sees all of a change or none."""

    reactor: Reactor
    state: MeshState
    credentials: CredentialStore
    ledger: Ledger
    workloads_wanted: WaitingRoom[str]
    """Connections whose own pod is not in the state yet, by pod uid."""
    policies_awaited: WaitingRoom[None]
    """Connections whose workload names a policy that has not arrived yet."""
    synced: bool
    """Both workloads and policies have come once. Before that nobody is served: a workload without its policies would admit anybody."""
    trust_domain: str
    home: int
    """The mover's own network namespace, to come back to from a pod's."""
    rng: random.Random
    pool: PoolLimits
    """Of each pod's tunnels."""
    shares: Shares | None = None
    """With the movers that accept on the same listeners, if there are others."""
    missed: MissedWaypoints = field(default_factory=MissedWaypoints)
    routes: RouteMemo = field(init=False)
    admissions: PeerMemo = field(init=False)

    def __post_init__(self) -> None:
        self.routes = RouteMemo(self.state)
        self.admissions = PeerMemo(self.state)

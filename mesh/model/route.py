"""What the agent does with one outbound connection, and why (`mesh.state.resolve` decides, the mover carries out)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from mesh.model.address import GatewayAddress, SocketAddress
from mesh.model.identity import SpiffeId
from mesh.model.service import Service
from mesh.model.workload import Workload


@dataclass(frozen=True, slots=True)
class Tunnel:
    """Carry the connection in an HBONE stream to ``next_hop``; the peer must prove one of ``identities``."""

    next_hop: SocketAddress
    authority: str
    identities: frozenset[SpiffeId]
    workload: Workload
    """The workload at ``next_hop``: the destination itself, or its waypoint."""
    service: Service | None
    because: str
    waypoint: GatewayAddress | None = None
    """What ``workload`` is an instance of, if a waypoint's."""


@dataclass(frozen=True, slots=True)
class Direct:
    """Plain TCP to ``next_hop``: a known workload that takes no HBONE, or (``workload`` None) a destination unknown to the mesh."""

    next_hop: SocketAddress
    workload: Workload | None
    service: Service | None
    because: str


@dataclass(frozen=True, slots=True)
class Refusal:
    """No route: close the connection. ``because`` is the access log's ``error``. ``waypoint``: none of its instances can be sent to now."""

    because: str
    service: Service | None = None
    waypoint: GatewayAddress | None = None


Route: TypeAlias = Tunnel | Direct | Refusal

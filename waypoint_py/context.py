"""Facts about a connection to the waypoint: made of TLS and CONNECT alone. No header of a request can change them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from mesh.model.address import SocketAddress
from mesh.model.identity import SpiffeId
from mesh.model.service import Service
from mesh.model.workload import Workload

REMEMBERED: Final = 256
"""Things in the memo of one connection: ends of requests, and how they ended."""


@dataclass(frozen=True, slots=True)
class Connection:
    """One client connection, carried in one CONNECT stream.

    ``peer``: whom the client's certificate proves. ``peer_address``: the client's, as its agent kept it. ``destination``: as the client
    dialled it (a service's virtual address, or a pod's). ``service``: what is fronted there; None for traffic to a workload.
    ``workload``: the client's, if it is known.
    """

    peer: SpiffeId
    peer_address: SocketAddress
    destination: SocketAddress
    service: Service | None
    target: Workload | None
    """The destination, when it was a pod's address."""
    workload: Workload | None
    traceparent: str | None = None
    """What the client's agent sent with CONNECT: of the connection, not of any request in it."""
    memo: dict[object, object] = field(default_factory=dict, init=False, repr=False, compare=False)
    """For telemetry: what it has worked out of these facts, which is to be forgotten when they are (`remember`)."""

    service_key: str = field(init=False, repr=False, compare=False)
    """``namespace/hostname`` of the service; empty for traffic to a workload."""

    def remember(self, key: object, value: object) -> None:
        """Put it into ``memo``, which begins anew when there is much."""
        if len(self.memo) >= REMEMBERED:
            self.memo.clear()
        self.memo[key] = value

    def __post_init__(self) -> None:
        object.__setattr__(self, "service_key", "" if self.service is None else str(self.service.key))

"""What the exchange sees of an upstream: an endpoint that was chosen, an HTTP stream on a connection to it, or why there is none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from mesh.http.message import Headers, Request, Response
from mesh.model.address import SocketAddress
from mesh.model.l7.destination import TrafficPolicy
from mesh.model.l7.routing import Destination
from mesh.model.service import Service
from mesh.model.workload import Workload
from waypoint_py.context import Connection
from waypoint_py.stream import ByteStream
from waypoint_py.upstream.algorithms import Host


class UpstreamProtocol(Enum):
    """What is spoken to the application."""

    HTTP1 = "http1"
    HTTP2 = "http2"
    TCP = "tcp"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where one try of a request, or a connection, goes. ``address``: the application's, as it is dialled plainly or named in CONNECT.
    ``workload`` None: an address outside the mesh. ``because``: how it was chosen."""

    address: SocketAddress
    workload: Workload | None
    service: Service | None
    destination: Destination | None
    policy: TrafficPolicy
    because: str
    host: Host | None = field(default=None, repr=False, compare=False)
    """What the balancer counts of it; None: it was not chosen among several."""
    key: str = field(init=False, repr=False, compare=False)
    """What tries, ejections and counts go by."""

    def __post_init__(self) -> None:
        key = str(self.address) if self.workload is None else f"{self.workload.uid} {self.address}"
        object.__setattr__(self, "key", key)


class FailureKind(Enum):
    """What went wrong upstream, as retries, outlier detection and response flags distinguish it."""

    CONNECT = "connection failure"
    CONNECT_TIMEOUT = "connection timeout"
    TLS = "TLS error"
    REFUSED = "refused"
    """HBONE's peer said no to CONNECT (policy at the destination, nobody listening)."""
    TERMINATED = "connection termination"
    RESET = "remote reset"
    REFUSED_STREAM = "remote refused stream reset"
    """The peer surely did nothing with the request."""
    PROTOCOL = "protocol error"
    OVERFLOW = "overflow"


@dataclass(frozen=True, slots=True)
class UpstreamFailure:
    """Before or after the response began. ``transport``: Envoy's ``UPSTREAM_TRANSPORT_FAILURE_REASON``, where
    the connection itself was not made."""

    kind: FailureKind
    because: str
    transport: str = ""


class ResponseSink(Protocol):
    """Who gets the response. After `complete`, `failed` or a response that ``ended`` nothing comes."""

    def informational(self, status: int, headers: Headers) -> None: ...

    def response(self, response: Response, ended: bool) -> None:
        """The head; ``ended``: it is all, and `complete` will not be called."""

    def data(self, data: bytes | memoryview) -> None:
        """Valid during the call. Give credit back with `UpstreamStream.consumed`."""

    def complete(self, trailers: Headers) -> None: ...

    def failed(self, failure: UpstreamFailure) -> None: ...

    def writable(self) -> None:
        """`UpstreamStream.room` has grown."""


class UpstreamStream(Protocol):
    """One request under way on an upstream connection. After the sink's last call every method is without effect."""

    local_address: SocketAddress | None

    def room(self) -> int:
        """Bytes that `send_data` takes now."""

    def send_data(self, data: bytes | memoryview) -> None: ...

    def send_end(self, trailers: Headers | None = None) -> None: ...

    def consumed(self, size: int) -> None: ...

    def reset(self) -> None:
        """Give it up; the sink is told nothing."""


class Cancel(Protocol):
    """Something under way that may be called off."""

    def cancel(self) -> None: ...


class Connections(Protocol):
    """Connections to endpoints, made and kept (`waypoint_py.upstream.pool`)."""

    def request(
        self,
        endpoint: Endpoint,
        protocol: UpstreamProtocol,
        request: Request,
        ended: bool,
        sink: ResponseSink,
        on_open: Callable[[UpstreamStream], None],
        *,
        client: Connection | None = None,
    ) -> Cancel:
        """Send a request on a pooled or new connection. ``on_open`` when its head has been written, from within this call if a connection
        is at hand: send the body then, and it leaves with the head. Failures go to the sink, never from within this call. ``client``: who
        asks, for the PROXY header if the endpoint gets one."""

    def connect(
        self,
        endpoint: Endpoint,
        on_open: Callable[[ByteStream | UpstreamFailure], None],
        *,
        client: Connection | None = None,
        host: str = "",
    ) -> Cancel:
        """A connection of its own, for TCP. ``on_open`` is not called from within this call. ``client``: whose bytes it will carry.
        ``host``: what TLS asks for and verifies where the destination's rule names nothing; by default the destination's hostname."""

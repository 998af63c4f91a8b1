"""What a format's operators ask, as a value: nothing is known of a request unless a test says so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from mesh.http.message import Headers, Request
from mesh.model.address import SocketAddress
from mesh.telemetry.operators import Facts
from waypoint_py.routing.predicates import header_values


@dataclass
class Known:
    """`mesh.telemetry.operators.Facts`, from a request and what a test fills in."""

    request: Request | None = None
    response_headers: Headers | None = None
    response_trailers: Headers | None = None
    start_time: float = 0.0
    protocol: str | None = None
    upstream_protocol: str | None = None
    response_code: int | None = None
    response_code_details: str | None = None
    response_flags: tuple[str, ...] = ()
    connection_termination_details: str | None = None
    upstream_transport_failure_reason: str | None = None
    bytes_received: int = 0
    bytes_sent: int = 0
    duration: float | None = None
    request_duration: float | None = None
    request_tx_duration: float | None = None
    response_duration: float | None = None
    response_tx_duration: float | None = None
    upstream_host: SocketAddress | None = None
    upstream_cluster: str | None = None
    upstream_local_address: SocketAddress | None = None
    upstream_attempts: int = 0
    downstream_local_address: SocketAddress | None = None
    downstream_remote_address: SocketAddress | None = None
    downstream_direct_remote_address: SocketAddress | None = None
    requested_server_name: str | None = None
    route_name: str | None = None
    hostname: str | None = None
    downstream_peer_uri_san: str | None = None
    downstream_local_uri_san: str | None = None
    grpc_status: int | None = None
    connection_id: int | None = None
    trace_id: str | None = None

    known: dict[str, str] = field(default_factory=dict)
    """What decided."""

    def metadata(self, key: str) -> str | None:
        return self.known.get(key)

    def steady(self, render: Callable[[Facts], str]) -> str:
        return render(self)

    def request_header(self, name: bytes) -> bytes | None:
        values = () if self.request is None else header_values(self.request, name)
        return values[0] if values else None

    def request_headers(self) -> dict[bytes, bytes]:
        if self.request is None:
            return {}
        names = (":method", ":path", ":scheme", ":authority", "host")
        pseudo = {name.encode(): header_values(self.request, name.encode())[0] for name in names}
        return dict(reversed(self.request.headers)) | pseudo

    def response_header(self, name: bytes) -> bytes | None:
        return dict(reversed(self.response_headers or [])).get(name)

    def response_trailer(self, name: bytes) -> bytes | None:
        return dict(reversed(self.response_trailers or [])).get(name)


def asked(path: str = "/", *headers: tuple[str, str], method: str = "GET", authority: str = "b", scheme: str = "http") -> Request:
    """A request, of texts."""
    pairs = [(name.encode(), value.encode()) for name, value in headers]
    return Request(method.encode(), scheme.encode(), authority.encode(), path.encode(), pairs)

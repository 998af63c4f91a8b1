"""What is told of every request and connection, once, when it is over: access log, metrics and traces are made of nothing else.

One record type for each holds all that Istio's log formats, metrics and spans ask for, so that an observer needs to look at nothing itself.
A record is also what Envoy's operators are rendered of (`mesh.telemetry.operators.Facts`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeAlias, cast

from mesh.http.message import Headers, Request, Response, Version
from mesh.model.address import SocketAddress
from mesh.model.identity import SpiffeId
from mesh.model.l7.routing import Destination
from mesh.telemetry.operators import Facts
from waypoint_py.context import Connection
from waypoint_py.policy.authorize import DryRunVerdict, Judgement
from waypoint_py.telemetry.context import SpanContext
from waypoint_py.upstream.session import Endpoint, UpstreamProtocol
from waypoint_py.verdict import Flag

_HTTP_1_1, _HTTP_2 = Version.HTTP_1_1, Version.HTTP_2  # members of an enum, and their values, are slower to find
_UNREAD = Request(b"", b"http", b"", b"", [])
_Rendered: TypeAlias = tuple[str, object, object, object]
_NO_HEADERS: Mapping[bytes, bytes] = {}
_PSEUDO = frozenset((b":method", b":path", b":scheme", b":authority", b"host"))
_PROTOCOLS = {UpstreamProtocol.HTTP1: "HTTP/1.1", UpstreamProtocol.HTTP2: "HTTP/2"}


class Local:
    """What is the same in all records of a process, for operators that ask for it."""

    __slots__ = ("hostname", "identity")

    def __init__(self, hostname: str, identity: SpiffeId) -> None:
        self.hostname = hostname
        self.identity = identity


class _Record:
    """Common to both. Times in seconds: ``start_time`` is Unix time, the others are on the reactor's clock, whose ``started`` is the
    record's beginning; None where it did not come to that."""

    __slots__ = (
        "audited", "because", "bytes_received", "bytes_sent", "connection", "connection_id", "destination", "details", "dry_run", "ended",
        "flags", "local", "policy", "server_name", "start_time", "started", "transport_failure", "upstream", "upstream_local_address",
    )  # fmt: skip

    def __init__(self, connection: Connection, local: Local, began: float, started: float) -> None:
        self.connection = connection
        self.local = local
        self.start_time = began
        self.started = started
        self.ended: float | None = None
        self.flags: tuple[Flag, ...] = ()
        self.details = ""
        """Envoy's ``response_code_details``; ``via_upstream`` for an application's answer."""
        self.because = ""
        """For people: what decided."""
        self.policy = ""
        """``ns[shop]-policy[name]-rule[0]``, when a policy decided."""
        self.destination: Destination | None = None
        self.upstream: Endpoint | None = None
        """Of the last try."""
        self.upstream_local_address: SocketAddress | None = None
        self.transport_failure = ""
        self.bytes_received = 0
        """From the client, of the body."""
        self.bytes_sent = 0
        self.connection_id: int | None = None
        self.server_name: str | None = None
        """SNI, of TLS that is carried on as it is."""
        self.dry_run: tuple[DryRunVerdict, ...] = ()
        """What policies that are only tried would have done."""
        self.audited: tuple[str, ...] = ()
        """Rules of AUDIT policies that matched."""

    def judged(self, judgement: Judgement) -> None:
        """Policies have decided."""
        self.because, self.policy = judgement.because, judgement.policy
        self.dry_run, self.audited = judgement.dry_run, judgement.audited

    def add_flags(self, *flags: Flag) -> None:
        self.flags = (*self.flags, *(flag for flag in flags if flag not in self.flags))

    # For operators

    def metadata(self, key: str) -> str | None:
        match key:
            case "because":
                return self.because
            case "policy":
                return self.policy
            case "dry_run":
                return "; ".join([verdict.because for verdict in self.dry_run])
            case "audit":
                return ",".join(self.audited)
        return None

    @property
    def duration(self) -> float | None:
        return None if self.ended is None else self.ended - self.started

    @property
    def response_code_details(self) -> str | None:
        return self.details or None

    @property
    def response_flags(self) -> Sequence[str]:
        return [flag.value for flag in self.flags] if self.flags else ()

    @property
    def upstream_transport_failure_reason(self) -> str | None:
        return self.transport_failure or None

    @property
    def upstream_host(self) -> SocketAddress | None:
        return self.upstream.address if self.upstream is not None else None

    @property
    def upstream_cluster(self) -> str | None:
        """By Istio's names: of the service that came in as such, of any other as ``outbound``, of a workload ``encap``."""
        destination = self.destination
        if destination is None:
            return "encap" if self.upstream is not None and self.connection.service is None else None
        service = self.connection.service
        if service is not None and (service.namespace, service.hostname) == (destination.namespace, destination.hostname):
            kind = "http" if isinstance(self, RequestRecord) else "tcp"
            part = f"{kind}/{destination.subset}" if destination.subset else kind
            return f"inbound-vip|{destination.port}|{part}|{destination.hostname}"
        return f"outbound|{destination.port}|{destination.subset}|{destination.hostname}"

    @property
    def downstream_local_address(self) -> SocketAddress | None:
        return self.connection.destination

    @property
    def downstream_remote_address(self) -> SocketAddress | None:
        return self.connection.peer_address

    @property
    def downstream_direct_remote_address(self) -> SocketAddress | None:
        return self.connection.peer_address

    @property
    def requested_server_name(self) -> str | None:
        return self.server_name

    @property
    def hostname(self) -> str | None:
        return self.local.hostname or None

    @property
    def downstream_peer_uri_san(self) -> str | None:
        return str(self.connection.peer)

    @property
    def downstream_local_uri_san(self) -> str | None:
        return str(self.local.identity)

    def _since_start(self, moment: float | None) -> float | None:
        return None if moment is None else moment - self.started


class RequestRecord(_Record):
    """One HTTP request. Filled while it lives; nothing changes after an observer has got it."""

    __slots__ = (
        "_named", "_steady", "attempts", "authority", "grpc_status", "is_grpc", "method", "path", "request", "request_complete",
        "request_messages", "request_sent", "response", "response_began", "response_messages", "response_trailers", "route",
        "route_because", "span", "termination", "trace", "upstream_began", "upstream_kind", "version",
    )  # fmt: skip

    def __init__(self, connection: Connection, local: Local, began: float, started: float, request: Request | None) -> None:
        super().__init__(connection, local, began, started)
        self.request = request
        """As it stands: with what was added and changed on the way. None: it could not be read."""
        self._named: dict[bytes, bytes] | None = None
        self._steady: tuple[object, ...] | None = None
        if request is None:
            request = _UNREAD
        self.method = request.method
        self.authority = request.authority
        self.path = request.path
        """With its query, as it was routed and judged: normalised, before any rewrite."""
        self.version = request.version
        self.is_grpc = request.is_grpc
        self.response: Response | None = None
        """As the client got it. None: it went before there was one."""
        self.response_trailers: Headers = []
        self.grpc_status: int | None = None
        self.request_messages = 0
        self.response_messages = 0
        """gRPC messages that were complete."""
        self.termination = ""
        self.route = ""
        """Its name."""
        self.route_because = ""
        """The resource and rule that it was made of, and what matched."""
        self.upstream_kind: UpstreamProtocol | None = None
        self.attempts = 0
        self.trace: str | None = None
        """The id of its trace, where traces are recorded; ``span`` None: this one is not."""
        self.span: SpanContext | None = None
        self.request_complete: float | None = None
        """From the client."""
        self.request_sent: float | None = None
        """To the upstream."""
        self.upstream_began: float | None = None
        """The last try's beginning."""
        self.response_began: float | None = None
        """Its first byte from upstream."""

    @property
    def status(self) -> int:
        """0: the client went before there was one."""
        return self.response.status if self.response is not None else 0

    @property
    def upstream_service_time(self) -> float | None:
        """What ``x-envoy-upstream-service-time`` says, in seconds."""
        if self.response_began is None or self.upstream_began is None:
            return None
        return self.response_began - self.upstream_began

    # For operators

    def steady(self, render: Callable[[Facts], str]) -> str:
        """As `mesh.telemetry.operators.Facts.steady`: by identity of what is the record's own, on the memo of the connection. Nothing
        changes any more."""
        steady = self._steady
        if steady is None:
            response = self.response
            ends = (id(self.upstream), id(self.upstream_local_address), id(self.destination), self.route, self.server_name)
            outcome = (0 if response is None else response.status, self.flags, self.details, self.termination, self.transport_failure)
            steady = self._steady = (*ends, *outcome, id(self.version))
        key = (render, steady)
        known = self.connection.memo.get(key)
        if known is None:
            known = (render(self), self.upstream, self.upstream_local_address, self.destination)  # held: no other can have their numbers
            self.connection.remember(key, known)
        return cast("_Rendered", known)[0]

    def metadata(self, key: str) -> str | None:
        return self.route_because if key == "route" else super().metadata(key)

    def request_header(self, name: bytes) -> bytes | None:
        request = self.request
        if request is None:
            return None
        if self.ended is not None:
            return self.request_headers().get(name)
        if name not in _PSEUDO:
            return request.first(name)
        match name:
            case b":method":
                return request.method
            case b":path":
                return request.path
            case b":scheme":
                return request.scheme
        return request.authority

    def request_headers(self) -> Mapping[bytes, bytes]:
        named, request = self._named, self.request
        if named is None:
            named = {} if request is None else dict(reversed(request.headers))
            if request is not None:
                named[b":method"], named[b":path"], named[b":scheme"] = request.method, request.path, request.scheme
                named[b":authority"] = named[b"host"] = request.authority
            if self.ended is not None:  # nothing changes any more
                self._named = named
        return named

    def response_header(self, name: bytes) -> bytes | None:
        if self.response is None:
            return None
        return b"%d" % self.response.status if name == b":status" else self.response.first(name)

    def response_trailer(self, name: bytes) -> bytes | None:
        return next((value for key, value in self.response_trailers if key == name), None)

    @property
    def protocol(self) -> str | None:
        version = self.version
        return "HTTP/1.1" if version is _HTTP_1_1 else "HTTP/2" if version is _HTTP_2 else version.value

    @property
    def upstream_protocol(self) -> str | None:
        return _PROTOCOLS.get(self.upstream_kind) if self.upstream_kind is not None else None

    @property
    def response_code(self) -> int | None:
        return self.response.status if self.response is not None else 0

    @property
    def connection_termination_details(self) -> str | None:
        return self.termination or None

    @property
    def request_duration(self) -> float | None:
        return self._since_start(self.request_complete)

    @property
    def request_tx_duration(self) -> float | None:
        return self._since_start(self.request_sent)

    @property
    def response_duration(self) -> float | None:
        return self._since_start(self.response_began)

    @property
    def response_tx_duration(self) -> float | None:
        return self.ended - self.response_began if self.ended is not None and self.response_began is not None else None

    @property
    def upstream_attempts(self) -> int:
        return self.attempts

    @property
    def route_name(self) -> str | None:
        return self.route or None

    @property
    def trace_id(self) -> str | None:
        return self.trace


class _WithoutHttp:
    """What operators say where there is no request."""

    __slots__ = ()

    def request_header(self, name: bytes) -> bytes | None:
        return None

    def request_headers(self) -> Mapping[bytes, bytes]:
        return _NO_HEADERS

    def response_header(self, name: bytes) -> bytes | None:
        return None

    def response_trailer(self, name: bytes) -> bytes | None:
        return None

    protocol: str | None = None
    upstream_protocol: str | None = None
    response_code: int | None = 0
    connection_termination_details: str | None = None
    request_duration: float | None = None
    request_tx_duration: float | None = None
    response_duration: float | None = None
    response_tx_duration: float | None = None
    upstream_attempts: int = 0
    route_name: str | None = None
    grpc_status: int | None = None
    trace_id: str | None = None


class ConnectionRecord(_WithoutHttp, _Record):
    """One TCP connection that was carried on as such."""

    def steady(self, render: Callable[[Facts], str]) -> str:
        return render(self)


class RefusalRecord(_WithoutHttp):
    """A connection, or a CONNECT within one, that was not let in. ``status`` 0: there was no request to answer."""

    def __init__(self, at: float, peer: SpiffeId | None, peer_address: SocketAddress, authority: str, status: int, because: str) -> None:
        self.start_time = at
        self.peer = peer
        self.peer_address = peer_address
        self.authority = authority
        self.status = status
        self.because = because
        self.protocol = "HTTP/2" if status else None
        self.response_code = status
        # What decided is the one thing that such a line is for.
        self.response_code_details = because if status else None
        self.connection_termination_details = None if status else because

    def steady(self, render: Callable[[Facts], str]) -> str:
        return render(self)

    def request_header(self, name: bytes) -> bytes | None:
        return self.request_headers().get(name)

    def request_headers(self) -> Mapping[bytes, bytes]:
        if not self.status:
            return _NO_HEADERS
        authority = self.authority.encode()
        return {b":method": b"CONNECT", b":authority": authority, b"host": authority}

    def metadata(self, key: str) -> str | None:
        return self.because if key == "because" else None

    @property
    def downstream_remote_address(self) -> SocketAddress | None:
        return self.peer_address

    @property
    def downstream_direct_remote_address(self) -> SocketAddress | None:
        return self.peer_address

    @property
    def downstream_peer_uri_san(self) -> str | None:
        return str(self.peer) if self.peer is not None else None

    response_flags: Sequence[str] = ()
    upstream_transport_failure_reason: str | None = None
    bytes_received: int = 0
    bytes_sent: int = 0
    duration: float | None = 0.0
    upstream_host: SocketAddress | None = None
    upstream_cluster: str | None = None
    upstream_local_address: SocketAddress | None = None
    downstream_local_address: SocketAddress | None = None
    requested_server_name: str | None = None
    hostname: str | None = None
    downstream_local_uri_san: str | None = None
    connection_id: int | None = None


class Observer(Protocol):
    """Who is told. Within the loop, so it must not wait; what it raises is a defect that costs the record alone."""

    def request_began(self, record: RequestRecord) -> None:
        """Before anything is decided; may add to the request's headers, as trace context."""

    def request_ended(self, record: RequestRecord) -> None: ...

    def connection_opened(self, record: ConnectionRecord) -> None: ...

    def connection_closed(self, record: ConnectionRecord) -> None: ...

    def refused(self, record: RefusalRecord) -> None: ...

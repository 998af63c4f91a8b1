"""A waypoint and an Envoy configured as Istio configures a waypoint's inner listener, before one application: the same bytes to both, and
what came of them in one shape, so that a test can say `assert ours == theirs`.

Left out of the comparison is what differs from one request to the next: dates, durations, generated request IDs; and the framing of one
hop, which is each proxy's own.
"""

from __future__ import annotations

import json
import re
import socket
import struct
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h11
import trio

from mesh.model.address import NamespacedHostname, SocketAddress, parse_ip
from mesh.model.l7.destination import DestinationConfig, TrafficPolicy
from mesh.model.l7.routing import Route
from mesh.model.l7.waypoint import PathNormalization, WaypointSettings
from mesh.model.service import AppProtocol, Service, ServicePort
from mesh.model.workload import PortMapping
from mesh.state.store import Delta
from mesh.testing.envoy import Config, free_address, http_filter, running
from tests.unit.waypoint_py.harness import World, loopback

TYPE = "type.googleapis.com/envoy.extensions"
HOST = "web.shop"
_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_OF_ONE_HOP = {"content-length", "transfer-encoding", "date", "keep-alive"}
_CHANGING = ("x-envoy-upstream-service-time", "x-envoy-expected-rq-timeout-ms")


@dataclass(frozen=True)
class Case:
    """A request as bytes. ``method`` so that its answer can be read; ``then``: what is sent once the head was answered with 1xx, and read
    again after 101. ``ends``: the client ends its direction, ``leaves``: it goes, once the application has its request."""

    name: str
    raw: bytes
    method: str = "GET"
    then: bytes = b""
    ends: bool = False
    leaves: bool = False


@dataclass(frozen=True)
class Http2Case:
    """A request by HTTP/2, its header block as it is: nothing is checked or put right. ``trailers`` None: none. ``stays``: it does not
    end, as tunnels do not."""

    name: str
    headers: tuple[tuple[str, str], ...]
    body: bytes = b""
    trailers: tuple[tuple[str, str], ...] | None = None
    stays: bool = False


@dataclass(frozen=True)
class Seen:
    """What the application got: header names in lower case, sorted."""

    line: str
    headers: tuple[tuple[str, str], ...]
    body: bytes = b""
    trailers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What came of a request. ``status`` 0: the connection ended without an answer. ``broken``: the answer was not whole."""

    status: int
    headers: tuple[tuple[str, str], ...] = ()
    body: str = ""
    trailers: tuple[tuple[str, str], ...] = ()
    informational: tuple[int, ...] = ()
    broken: bool = False
    seen: tuple[Seen, ...] = ()
    flags: str = ""
    details: str = ""


def request(
    target: str = "/", *headers: tuple[str, str], method: str = "GET", host: str | None = HOST, body: bytes = b"", version: str = "1.1"
) -> bytes:
    """The bytes of an HTTP/1 request."""
    lines = [
        f"{method} {target} HTTP/{version}",
        *([] if host is None else [f"Host: {host}"]),
        *(f"{name}: {value}" for name, value in headers),
    ]
    if body:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


# The application


Behaviour = Callable[[socket.socket], None]
"""What is done after a request was read, in place of an answer; the connection is closed after it."""


def say(data: bytes) -> Behaviour:
    return lambda sock: sock.sendall(data)


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def stay_silent(sock: socket.socket) -> None:
    while sock.recv(65536):
        pass


class Application:
    """HTTP/1.1 on a thread for each connection: keeps what it saw, answers 200 with the request's line, or does what its path says."""

    def __init__(self, behaviours: Mapping[str, Behaviour], ip: str = "") -> None:
        self.seen: list[Seen] = []
        self.open: set[socket.socket] = set()
        self._behaviours = behaviours
        address = parse_ip(ip) if ip else loopback()
        self._listener = socket.create_server((str(address), 0))
        self.address = SocketAddress(address, self._listener.getsockname()[1])
        threading.Thread(target=self._serve, daemon=True).start()

    def hang_up(self) -> None:
        """End the connections that there are: they are descriptors of this process, and a `World` looks for what it has left."""
        for sock in list(self.open):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.open.add(connection)
            threading.Thread(target=self._take, args=(connection,), daemon=True).start()

    def _take(self, sock: socket.socket) -> None:
        with suppress(OSError, h11.RemoteProtocolError):
            self._talk(sock)
        sock.close()
        self.open.discard(sock)

    def _talk(self, sock: socket.socket) -> None:
        http = h11.Connection(h11.SERVER)
        while (seen := self._read(http, sock)) is not None:
            self.seen.append(seen)
            behaviour = self._behaviours.get(seen.line.split(" ")[1].partition("?")[0])
            if behaviour is not None:
                behaviour(sock)
                return
            body = seen.line.encode("latin-1")
            headers = [("x-app", "1"), ("server", "app"), ("content-length", str(len(body)))]
            data = http.send(h11.Response(status_code=200, headers=headers)) or b""
            if not seen.line.startswith("HEAD "):
                data += http.send(h11.Data(body)) or b""
            sock.sendall(data + (http.send(h11.EndOfMessage()) or b""))
            if http.our_state is not h11.DONE:
                return
            http.start_next_cycle()

    def _read(self, http: h11.Connection, sock: socket.socket) -> Seen | None:
        head: h11.Request | None = None
        body = b""
        while True:
            event = http.next_event()
            if event is h11.NEED_DATA:
                if http.they_are_waiting_for_100_continue:
                    sock.sendall(http.send(h11.InformationalResponse(status_code=100, headers=[])) or b"")
                http.receive_data(sock.recv(65536))
            elif isinstance(event, h11.Request):
                head = event
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage) or event is h11.PAUSED:
                assert head is not None
                trailers = event.headers if isinstance(event, h11.EndOfMessage) else []
                line = f"{head.method.decode()} {head.target.decode('latin-1')}"
                return Seen(line, _kept(head.headers, "connection"), body, _sorted(trailers))
            else:
                return None


def _sorted(headers: Any) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((name.decode().lower(), value.decode("latin-1")) for name, value in headers))


def _kept(headers: Any, *without: str) -> tuple[tuple[str, str], ...]:
    """Headers that matter, of one name joined: several lines or one mean the same (RFC 9110 section 5.3)."""
    joined: dict[str, list[str]] = {}
    for name, value in headers:
        joined.setdefault(name.decode().lower(), []).append(value.decode("latin-1"))
    return tuple(
        sorted((name, _steady(name, ",".join(values))) for name, values in joined.items() if name not in (_OF_ONE_HOP | {*without}))
    )


def _steady(name: str, value: str) -> str:
    if name == "x-request-id" and _UUID.fullmatch(value):
        return "(generated)"
    return "(time)" if name in _CHANGING and value.isdigit() else value


# Envoy as Istio would have it

RETRIES = {
    "retry_on": "connect-failure,refused-stream,unavailable,cancelled,retriable-status-codes",
    "num_retries": 2,
    "retry_host_predicate": [
        {"name": "previous_hosts", "typed_config": {"@type": f"{TYPE}.retry.host.previous_hosts.v3.PreviousHostsPredicate"}}
    ],
    "host_selection_retry_max_attempts": 5,
}
"""Those of a route that says nothing, as `tests.unit.waypoint_py.harness.default_route` has them."""


def forwards(cluster: str = "application", **action: Any) -> Config:
    """An action to forward."""
    none = {"max_stream_duration": "0s", "grpc_timeout_header_max": "0s"}
    return {"route": {"cluster": cluster, "timeout": "0s", "retry_policy": RETRIES, "max_stream_duration": none, **action}}


def envoy_route(path: str, action: Config, **more: Any) -> Config:
    return {"match": {"prefix": path}, **action, **more}


DEFAULT = envoy_route("/", forwards())


def manager(log: Path, routes: Sequence[Config], paths: PathNormalization = PathNormalization.BASE, **more: Any) -> Config:
    """The HTTP connection manager of a waypoint's inner listener."""
    decode = paths is PathNormalization.DECODE_AND_MERGE_SLASHES
    fields = {"status": "%RESPONSE_CODE%", "flags": "%RESPONSE_FLAGS%", "details": "%RESPONSE_CODE_DETAILS%"}
    sink = {"@type": f"{TYPE}.access_loggers.file.v3.FileAccessLog", "path": str(log), "log_format": {"json_format": fields}}
    return {
        "@type": f"{TYPE}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "waypoint",
        "server_name": "istio-envoy",
        "use_remote_address": False,
        "proxy_100_continue": True,
        "stream_idle_timeout": "0s",
        "delayed_close_timeout": "0.02s",  # not a second for each request that is refused
        "forward_client_cert_details": "SANITIZE",
        "upgrade_configs": [{"upgrade_type": "websocket"}],
        "normalize_path": paths is not PathNormalization.NONE,
        "merge_slashes": decode or paths is PathNormalization.MERGE_SLASHES,
        "path_with_escaped_slashes_action": "UNESCAPE_AND_FORWARD" if decode else "KEEP_UNCHANGED",
        "access_log": [{"name": "file", "typed_config": sink}],
        "route_config": {
            "virtual_hosts": [{"name": "all", "domains": ["*"], "routes": list(routes)}],
            "validate_clusters": False,
        },
        "http_filters": [
            http_filter("envoy.filters.http.fault", {}, "fault.v3.HTTPFault"),
            http_filter("envoy.filters.http.cors", {}, "cors.v3.Cors"),
            http_filter("router", {}, "router.v3.Router"),
        ],
        **more,
    }


def cluster(name: str, *endpoints: SocketAddress, http2: bool = False, **more: Any) -> Config:
    options = {
        "@type": f"{TYPE}.upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": {"http2_protocol_options" if http2 else "http_protocol_options": {}},
    }
    hosts = [{"endpoint": {"address": _address(endpoint)}} for endpoint in endpoints]
    return {
        "name": name,
        "type": "STATIC",
        "connect_timeout": "10s",
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": hosts}] if hosts else []},
        "typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": options},
        **more,
    }


def _address(address: SocketAddress) -> Config:
    return {"socket_address": {"address": str(address.ip), "port_value": address.port}}


@dataclass
class Beside:
    """An Envoy that runs."""

    address: SocketAddress
    log: Path
    asked: int = 0

    def records(self) -> list[dict[str, Any]]:
        """Its access log, once all that was asked is in it."""
        deadline = time.monotonic() + 20
        while True:
            lines = self.log.read_text().splitlines() if self.log.exists() else []
            if len(lines) >= self.asked or time.monotonic() > deadline:
                assert len(lines) == self.asked, f"{len(lines)} of {self.asked} requests in Envoy's log: {lines}"
                return [json.loads(line) for line in lines]
            time.sleep(0.05)


@contextmanager
def envoy(clusters: Sequence[Config], make_manager: Callable[[Path], Config]) -> Iterator[Beside]:
    with TemporaryDirectory() as directory:
        log = Path(directory, "access.log")
        listen = free_address()
        filters = [{"name": "hcm", "typed_config": make_manager(log)}]
        listener = {"name": "inner", "address": _address(listen), "filter_chains": [{"filters": filters}]}
        # As in Istio's bootstrap: a fragment is cut off, not refused.
        layer = {"envoy.reloadable_features.http_reject_path_with_fragment": False}
        config = {
            "static_resources": {"listeners": [listener], "clusters": list(clusters)},
            "layered_runtime": {"layers": [{"name": "istio", "static_layer": layer}]},
        }
        with running(config, listen):
            yield Beside(listen, log)


# Asking both


async def ask(stream: trio.abc.HalfCloseableStream, case: Case, arrived: Callable[[], Awaitable[None]]) -> Outcome:
    """Send a request and read its answer, to its end if it has one. ``arrived`` waits until the application has the request."""
    http = h11.Connection(h11.CLIENT, max_incomplete_event_size=1 << 20)
    # For h11 to know what may follow: which method was asked with.
    http.send(h11.Request(method=case.method, target="/", headers=[("host", "x")]))
    http.send(h11.EndOfMessage())
    head: h11.Response | None = None
    informational: list[int] = []
    body = b""
    trailers: tuple[tuple[str, str], ...] = ()
    broken = False
    with suppress(trio.BrokenResourceError):
        await stream.send_all(case.raw)
        if case.ends:
            await arrived()
            await stream.send_eof()
        elif case.leaves:
            await arrived()
            await stream.aclose()
            return Outcome(0)
    then = case.then
    with trio.fail_after(10):
        while True:
            try:
                event = http.next_event()
                if event is h11.NEED_DATA:
                    http.receive_data(bytes(await stream.receive_some(65536)))
                    continue
            except (h11.RemoteProtocolError, trio.BrokenResourceError):
                broken = True
                break
            if isinstance(event, h11.InformationalResponse):
                informational.append(event.status_code)
                if then:
                    await stream.send_all(then)
                    then = b""
                if event.status_code == 101:
                    head = h11.Response(status_code=200, headers=event.headers)
                    while len(body) < len(case.then) and (data := await stream.receive_some(65536)):
                        body += data
                    break
            elif isinstance(event, h11.Response):
                head = event
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                trailers = _sorted(event.headers)
                break
            else:
                break
    await stream.aclose()
    if head is None:
        return Outcome(0, broken=True)
    status = informational.pop() if informational[-1:] == [101] else head.status_code
    return Outcome(status, _kept(head.headers), body.decode("latin-1"), trailers, tuple(informational), broken)


async def ask_http2(stream: trio.abc.Stream, case: Http2Case) -> Outcome:
    """Likewise by HTTP/2. A stream that is reset and a connection that ends are one: the answer, if there is any, is broken."""
    config = h2.config.H2Configuration(
        header_encoding=None, validate_outbound_headers=False, normalize_outbound_headers=False, validate_inbound_headers=False
    )
    http = h2.connection.H2Connection(config)
    http.initiate_connection()
    over = not case.body and case.trailers is None
    http.send_headers(1, [(name.encode("latin-1"), value.encode("latin-1")) for name, value in case.headers], end_stream=over)
    if case.body:
        http.send_data(1, case.body, end_stream=case.trailers is None and not case.stays)
    if case.trailers is not None:
        http.send_headers(1, [(name.encode(), value.encode()) for name, value in case.trailers], end_stream=True)
    with suppress(trio.BrokenResourceError):
        await stream.send_all(http.data_to_send())
    found: Outcome | None = None
    body = b""
    with trio.fail_after(10), suppress(trio.BrokenResourceError, h2.exceptions.ProtocolError):
        while data := await stream.receive_some(65536):
            for event in http.receive_data(bytes(data)):
                match event:
                    case h2.events.ResponseReceived():
                        headers = [(name, value) for name, value in event.headers if name != b":status"]
                        found = Outcome(int(dict(event.headers)[b":status"]), _kept(headers))
                    case h2.events.DataReceived():
                        body += event.data
                    case h2.events.TrailersReceived() if found is not None:
                        found = replace(found, trailers=_sorted(event.headers))
                    case h2.events.StreamEnded() if found is not None:
                        await stream.aclose()
                        return replace(found, body=body.decode("latin-1"))
                    case h2.events.StreamReset() | h2.events.ConnectionTerminated():
                        await stream.aclose()
                        return replace(found or Outcome(0), body=body.decode("latin-1"), broken=True)
            with suppress(trio.BrokenResourceError):
                await stream.send_all(http.data_to_send())
    await stream.aclose()
    return replace(found or Outcome(0), body=body.decode("latin-1"), broken=True)


@dataclass
class Pair:
    """Both, before one application."""

    world: World
    beside: Beside
    application: Application
    ours: dict[str, Outcome] = field(default_factory=dict)
    theirs: dict[str, Outcome] = field(default_factory=dict)

    async def ask(self, cases: Sequence[Case]) -> None:
        """One request after the other, each on a connection of its own; and what both logs say of them."""
        began = len(self.world.log.requests)
        for case in cases:
            await self._ask_both(case.name, lambda stream, case=case: ask(stream, case, self._arrived))
            self.beside.asked += 1
            await self.world.until(lambda: len(self.world.log.requests) == began + len(self.ours))
        records = await trio.to_thread.run_sync(self.beside.records)
        for case, record, logged in zip(cases, records, self.world.log.requests[began:], strict=True):
            flags = ",".join(flag.value for flag in logged.flags) or "-"
            self.ours[case.name] = replace(self.ours[case.name], flags=flags, details=logged.details)
            self.theirs[case.name] = replace(self.theirs[case.name], flags=record["flags"] or "-", details=record["details"])

    async def ask_http2(self, cases: Sequence[Http2Case]) -> None:
        """Likewise; logs are not looked at, since what is malformed may not become a request at all."""
        for case in cases:
            await self._ask_both(case.name, lambda stream, case=case: ask_http2(stream, case))

    async def _ask_both(self, name: str, how: Callable[[trio.abc.HalfCloseableStream], Awaitable[Outcome]]) -> None:
        if not self.world.links:
            await self.world.link()
        ours = await self.world.open(link=self.world.links[0])
        theirs = await trio.open_tcp_stream(str(self.beside.address.ip), self.beside.address.port)
        for stream, outcomes in ((ours, self.ours), (theirs, self.theirs)):
            self.application.seen.clear()
            answer = await how(stream)
            outcomes[name] = replace(answer, seen=tuple(sorted(self.application.seen, key=repr)))

    async def _arrived(self) -> None:
        await self.world.until(lambda: self.application.seen)

    def different(self, *, logged: bool = True) -> dict[str, tuple[Outcome, Outcome]]:
        """Ours and theirs. ``logged``: flags and details count too."""
        pairs = {name: (ours, self.theirs[name]) for name, ours in self.ours.items()}
        if not logged:
            pairs = {
                name: (replace(ours, flags="", details=""), replace(theirs, flags="", details="")) for name, (ours, theirs) in pairs.items()
            }
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def told(different: Mapping[str, tuple[Outcome, Outcome]]) -> str:
    """What differs, readable."""
    lines = []
    for name, (ours, theirs) in different.items():
        lines.append(name)
        for each in fields(Outcome):
            mine, other = getattr(ours, each.name), getattr(theirs, each.name)
            if mine != other:
                lines.append(f"    {each.name}: ours {mine!r}, theirs {other!r}")
    return "\n".join(lines)


@dataclass(frozen=True)
class Reached:
    """Another destination: by what routes call it. ``theirs``: what the policy is in Envoy's words."""

    endpoints: tuple[SocketAddress, ...] = ()
    policy: TrafficPolicy = field(default_factory=TrafficPolicy)
    theirs: Config = field(default_factory=dict)
    http2: bool = False


def compare(
    cases: Sequence[Case] = (),
    *,
    application: Application | None = None,
    paths: PathNormalization = PathNormalization.BASE,
    ours: Sequence[Route] | None = None,
    theirs: Sequence[Config] = (DEFAULT,),
    others: Mapping[str, Reached] | None = None,
    by_http2: Sequence[Http2Case] = (),
    manages: Mapping[str, Any] | None = None,
) -> Pair:
    """Ask both with one application behind them. The routes are the same said twice; by default that of a service without any.
    ``manages``: more for Envoy's connection manager."""
    application = application or Application({})
    world = World()
    others = others or {}
    clusters = [cluster("application", application.address)]
    clusters += [cluster(name, *each.endpoints, http2=each.http2, **each.theirs) for name, each in others.items()]
    with closing(application), envoy(clusters, lambda log: manager(log, theirs, paths, **(manages or {}))) as beside:
        pair = Pair(world, beside, application)

        async def main() -> None:
            world.describe(world.endpoint(application.address), routes=ours)
            for name, each in others.items():
                _describe(world, name, each)
            world.push(WaypointSettings("shop", "waypoint", "all", path_normalization=paths))
            await pair.ask(cases)
            await pair.ask_http2(by_http2)
            application.hang_up()
            await world.until(lambda: not application.open)

        world.run(main)
    return pair


def _describe(world: World, name: str, reached: Reached) -> None:
    """A service beside that of the waypoint, and its endpoints."""
    protocol = AppProtocol.HTTP2 if reached.http2 else AppProtocol.HTTP11
    ports = (ServicePort(80, endpoint.port, app_protocol=protocol) for endpoint in reached.endpoints or (SocketAddress(loopback(), 80),))
    service = Service(name, "shop", name, (), ports=(next(ports),))
    pods = [world.endpoint(each, services={NamespacedHostname("shop", name): (PortMapping(80, each.port),)}) for each in reached.endpoints]
    world.state.apply(Delta(services=(service,), workloads=tuple(pods)))
    world.push(DestinationConfig("shop", name, policy=reached.policy))

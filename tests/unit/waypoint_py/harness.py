"""A waypoint without its process: real reactor, TLS, HBONE and loopback sockets on both sides of it; no control plane, no namespaces."""

from __future__ import annotations

import itertools
import os
import random
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from ipaddress import ip_address

import h2.config
import h2.connection
import h2.events
import h2.settings
import h11
import trio
from msgspec import structs

from mesh.http.codec import BodyData, BodyEnd, GoingAway
from mesh.http.h2 import Http2Client
from mesh.http.message import Request, Version
from mesh.linux.sockets import set_connection_options
from mesh.model.address import GatewayAddress, IpAddress, NamespacedHostname, NetworkAddress, SocketAddress, parse_ip
from mesh.model.identity import SpiffeId
from mesh.model.l7.routing import Destination, Forward, Origin, Retry, Route, WeightedDestination
from mesh.model.l7.waypoint import Assigned, L7Resource, PortConfig, Protocol, ServiceConfig, WaypointSettings
from mesh.model.service import Service, ServicePort
from mesh.model.workload import TunnelProtocol, Workload
from mesh.reactor.hbone import HboneLink, Tunnel, TunnelFailure, TunnelRequest, connect_hbone, serve_hbone
from mesh.reactor.loop import Reactor
from mesh.reactor.relay import relay_tunnel
from mesh.reactor.tcp import listen_on
from mesh.state.store import Delta, MeshState
from mesh.testing.ca import FakeCa
from mesh.tls.contexts import hbone_context
from waypoint_py.admission import Ourselves
from waypoint_py.app import make_client_codec
from waypoint_py.context import Connection
from waypoint_py.credentials import Credentials
from waypoint_py.listener import HboneListener
from waypoint_py.observer import ConnectionRecord, Local, RefusalRecord, RequestRecord
from waypoint_py.plane import Plane
from waypoint_py.policy.ext_authz import ExtAuthz
from waypoint_py.policy.jwks import Authenticator, KeyStore
from waypoint_py.reach import reach
from waypoint_py.store import Store
from waypoint_py.stream import ByteStream
from waypoint_py.streams.tunnel import TunnelStream
from waypoint_py.upstream.announce import announce
from waypoint_py.upstream.balancer import Balancer
from waypoint_py.upstream.dial import Dialler
from waypoint_py.upstream.pool import Pool
from waypoint_py.upstream.session import (
    Cancel,
    Connections,
    Endpoint,
    ResponseSink,
    UpstreamFailure,
    UpstreamProtocol,
    UpstreamStream,
)
from waypoint_py.waiting import NurseryWaits, TaskStream

CA = FakeCa()
PATIENCE = 20.0
CLIENT = SpiffeId("cluster.local", "shop", "client")
WAYPOINT = SpiffeId("cluster.local", "shop", "waypoint")
SERVER = SpiffeId("cluster.local", "shop", "web")
GATEWAY = GatewayAddress(NamespacedHostname("shop", "waypoint.shop.svc.cluster.local"))
HOST = "web.shop.svc.cluster.local"
KEY = f"shop/{HOST}"
VIP = SocketAddress(ip_address("10.96.0.1"), 80)
ORIGIN = Origin("HTTPRoute", "shop", "web")
ITSELF = WeightedDestination(Destination("shop", HOST, 80))
_NUMBERS = itertools.count(1)

Handler = Callable[[trio.SocketStream], Awaitable[None]]


def default_route(**changes: object) -> Route:
    """What a service without any resource that routes has."""
    made = Route(Origin("Service", "shop", HOST), Forward((ITSELF,)), name="default", retry=Retry())
    return replace_struct(made, **changes)


def replace_struct(value: Route, **changes: object) -> Route:
    import msgspec

    return msgspec.structs.replace(value, **changes)


def loopback() -> IpAddress:
    """Another address of this machine, each time."""
    number = next(_NUMBERS)
    return parse_ip(f"127.{64 + os.getpid() % 128}.{number // 250}.{number % 250 + 1}")


@dataclass
class Log:
    """An observer that keeps what it is told."""

    requests: list[RequestRecord] = field(default_factory=list)
    connections: list[ConnectionRecord] = field(default_factory=list)
    refusals: list[RefusalRecord] = field(default_factory=list)
    opened: int = 0
    began: int = 0

    def request_began(self, record: RequestRecord) -> None:
        self.began += 1

    def request_ended(self, record: RequestRecord) -> None:
        assert record not in self.requests
        self.requests.append(record)

    def connection_opened(self, record: ConnectionRecord) -> None:
        self.opened += 1

    def connection_closed(self, record: ConnectionRecord) -> None:
        assert record not in self.connections
        self.connections.append(record)

    def refused(self, record: RefusalRecord) -> None:
        self.refusals.append(record)


class Led:
    """`Connections` that all go to one address: no pod can be announced at one of this machine."""

    def __init__(self, connections: Connections, address: SocketAddress) -> None:
        self._connections = connections
        self._address = address

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
        led = replace(endpoint, address=self._address)
        return self._connections.request(led, protocol, request, ended, sink, on_open, client=client)

    def connect(
        self,
        endpoint: Endpoint,
        on_open: Callable[[ByteStream | UpstreamFailure], None],
        *,
        client: Connection | None = None,
        host: str = "",
    ) -> Cancel:
        return self._connections.connect(replace(endpoint, address=self._address), on_open, client=client, host=host)


class World:
    """The waypoint under test, the mesh around it, and who talks through it. Use it within `run`."""

    def __init__(self) -> None:
        self.errors: list[BaseException] = []
        self.reactor = Reactor(on_error=self._failed)
        self.log = Log()
        self.state = MeshState()
        self.us = Workload("Kubernetes//Pod/shop/waypoint-1", "waypoint-1", "shop", (loopback(),), service_account="waypoint")
        self.credentials = Credentials(WAYPOINT)
        self.credentials.put(CA.issue(WAYPOINT))
        self.rng = random.Random(7)
        self.keys = KeyStore()
        self.store = Store(WaypointSettings("shop", "waypoint", "all"), self.keys.find)
        self.waits = NurseryWaits(self.reactor)
        dialler = Dialler(self.reactor, self.credentials, lambda endpoint, client: announce(self.us, endpoint, client, self.rng))
        self.pool = Pool(self.reactor, dialler, make_client_codec)
        self.synced = True
        self.plane = Plane(
            reactor=self.reactor,
            state=self.state,
            store=self.store,
            connections=self.pool,
            balancer=Balancer(self.state, self.store.find_destination, lambda: self.us, self.rng),
            observer=self.log,
            waits=self.waits,
            authenticator=Authenticator(self.keys),
            ext_authz=ExtAuthz(self._reach),
            us=lambda: Ourselves(NamespacedHostname("shop", "waypoint.shop.svc.cluster.local"), "", frozenset(self.us.addresses), self.us),
            local=Local("waypoint-1", WAYPOINT),
            rng=self.rng,
            wall=time.time,
        )
        self.listener = HboneListener(self.plane, self.credentials, max_streams=100, synced=lambda: self.synced)
        self.address = self._listen()
        self.links: list[HboneLink] = []
        self._nursery: trio.Nursery
        self._agents: list[socket.socket] = []

    def _failed(self, error: BaseException, where: str) -> None:
        self.errors.append(error)

    def _listen(self) -> SocketAddress:
        sock = socket.create_server((str(self.us.addresses[0]), 0), backlog=128)
        self._socket = sock
        self.listener.listen(sock)
        return SocketAddress(self.us.addresses[0], sock.getsockname()[1])

    def run(self, main: Callable[[], Awaitable[None]]) -> None:
        """Run a test within the loop. No callback may have failed, no descriptor be left, and every request be told of once."""

        async def bounded() -> None:
            with trio.fail_after(PATIENCE):
                async with trio.open_nursery() as nursery:
                    self._nursery = nursery
                    await nursery.start(self.waits.run)
                    await nursery.start(self.keys.run)
                    await nursery.start(self.plane.ext_authz.run)
                    await main()
                    for link in self.links:
                        link.abort("the test is over")
                    self.listener.abort("the test is over")
                    self.pool.close(gracefully=False)
                    await self.until(lambda: not self.plane.counts.connections and not self.plane.counts.exchanges)
                    nursery.cancel_scope.cancel()
                await trio.sleep(0.01)

        before = len(os.listdir("/proc/self/fd"))
        self.reactor.run(bounded)
        self._socket.close()
        for sock in self._agents:
            sock.close()
        self.reactor.close()
        assert not self.errors, self.errors
        assert len(os.listdir("/proc/self/fd")) <= before
        assert self.plane.counts.exchanges == 0
        assert self.log.opened == len(self.log.connections)

    async def until(self, condition: Callable[[], object]) -> None:
        while not condition():  # noqa: ASYNC110  # callbacks of the reactor set no events
            await trio.sleep(0.005)

    # The mesh

    def push(self, *resources: L7Resource) -> None:
        """As the control plane does."""
        self.store.apply(Delta(l7=tuple(Assigned("shop/waypoint", resource) for resource in resources)))

    def describe(
        self, *endpoints: Workload, protocol: Protocol = Protocol.HTTP, routes: Sequence[Route] | None = None, **port: object
    ) -> None:
        """The service ``web`` with these endpoints."""
        service = Service(
            "web", "shop", HOST, (NetworkAddress("", VIP.ip),), ports=(ServicePort(80, 8080), ServicePort(81, 8081)), waypoint=GATEWAY
        )
        self.state.apply(Delta(services=(service,), workloads=(self.us, *endpoints)))
        self.configure(protocol, routes, **port)

    def configure(self, protocol: Protocol = Protocol.HTTP, routes: Sequence[Route] | None = None, **port: object) -> None:
        """What is pushed for it."""
        made = PortConfig(80, protocol, routes=tuple(routes if routes is not None else (default_route(),)), **port)
        self.push(ServiceConfig("shop", HOST, (made,)))

    def endpoint(self, address: SocketAddress, name: str = "", *, hbone: bool = False, **changes: object) -> Workload:
        """A pod of the service, whose application is at ``address``."""
        from mesh.model.workload import PortMapping

        name = name or f"web-{next(_NUMBERS)}"
        made = Workload(
            f"Kubernetes//Pod/shop/{name}",
            name,
            "shop",
            (address.ip,),
            service_account="web",
            tunnel_protocol=TunnelProtocol.HBONE if hbone else TunnelProtocol.NONE,
            services={NamespacedHostname("shop", HOST): (PortMapping(80, address.port),)},
        )
        return structs.replace(made, **changes)

    def agent(self, ip: IpAddress) -> list[TunnelRequest]:
        """The node agent of the pod at this address: takes HBONE and hands it to the application. The requests that came."""
        seen: list[TunnelRequest] = []

        def requested(request: TunnelRequest) -> None:
            seen.append(request)
            target = SocketAddress.parse(request.authority)
            sock = socket.create_connection((str(target.ip), target.port))
            sock.setblocking(False)
            relay_tunnel(self.reactor, sock, request.accept({}), lambda result: None, sock_is="upstream")

        context = hbone_context(CA.issue(SERVER))

        def accepted(sock: socket.socket, peer: SocketAddress) -> None:
            serve_hbone(self.reactor, sock, context, on_handshake=lambda der: None, on_request=requested, on_close=lambda reason: None)

        listening = socket.create_server((str(ip), 15008))
        self._agents.append(listening)
        listen_on(self.reactor, listening, accepted)
        return seen

    # Who serves

    @asynccontextmanager
    async def application(
        self, handler: Handler, *, buffer: int | None = None, at: SocketAddress | None = None
    ) -> AsyncIterator[SocketAddress]:
        """A TCP server; ``handler`` gets each connection, which closes after it. ``buffer``: bytes that its kernel takes ahead of it.
        ``at``: where; else anywhere."""
        address, port = (at.ip, at.port) if at is not None else (loopback(), 0)

        async def serve(stream: trio.SocketStream) -> None:
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                await handler(stream)

        listeners = await trio.open_tcp_listeners(port, host=str(address))
        if buffer is not None:
            listeners[0].socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, serve, listeners)
            yield SocketAddress(address, listeners[0].socket.getsockname()[1])
            nursery.cancel_scope.cancel()

    # Who asks

    async def link(self, identity: SpiffeId = CLIENT) -> HboneLink:
        """An HBONE connection to the waypoint, as a client pod's agent makes it."""
        sock = socket.create_connection((str(self.address.ip), self.address.port))
        sock.setblocking(False)
        set_connection_options(sock)
        ready = trio.Event()
        made = connect_hbone(
            self.reactor,
            sock,
            hbone_context(CA.issue(identity)),
            verify_peer=lambda der: None,
            on_ready=lambda link: ready.set(),
            on_close=lambda reason: ready.set(),
        )
        self.links.append(made)
        await ready.wait()
        return made

    async def connect(self, target: str = str(VIP), *, link: HboneLink | None = None, identity: SpiffeId = CLIENT) -> TaskStream | int:
        """One client connection, to the service by default; or the status that CONNECT was answered with (0: none)."""
        link = link or await self.link(identity)
        answered = trio.Event()
        result: list[Tunnel | TunnelFailure] = []

        def on_response(answer: Tunnel | TunnelFailure) -> None:
            result.append(answer)
            answered.set()

        link.open_tunnel(target, {}, on_response)
        await answered.wait()
        answer = result[0]
        if isinstance(answer, TunnelFailure):
            return answer.status or 0
        return TaskStream(TunnelStream(self.reactor, answer))

    async def open(self, target: str = str(VIP), *, link: HboneLink | None = None, identity: SpiffeId = CLIENT) -> TaskStream:
        stream = await self.connect(target, link=link, identity=identity)
        assert isinstance(stream, TaskStream), stream
        return stream

    async def client(self, **options: object) -> H1Client:
        return H1Client(await self.open(**options))

    async def h2_client(self, **options: object) -> H2Client:
        client = H2Client(await self.open(**options))
        self._nursery.start_soon(client.run)
        await client.start()
        return client

    async def codec_client(self, **options: object) -> CodecClient:
        client = CodecClient(await self.open(**options))
        self._nursery.start_soon(client.run)
        return client

    async def _reach(self, namespace: str, hostname: str, port: int) -> trio.abc.Stream:
        return await reach(self.plane.balancer, self.pool, self.reactor.now, Destination(namespace, hostname, port))


# HTTP/1.1, by h11


@dataclass
class Answer:
    """A response. ``broken``: it ended before it was whole."""

    status: int
    headers: dict[str, str]
    body: bytes = b""
    informational: list[int] = field(default_factory=list)
    trailers: dict[str, str] = field(default_factory=dict)
    broken: str = ""

    @property
    def text(self) -> str:
        return self.body.decode()


class H1Client:
    """One request after the other."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self.http = h11.Connection(h11.CLIENT)

    async def get(self, path: str = "/", method: str = "GET", body: bytes = b"", headers: Mapping[str, str] | None = None) -> Answer:
        """A whole exchange."""
        await self.send(path, method, body, headers)
        return await self.answer()

    async def send(self, path: str = "/", method: str = "GET", body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        if self.http.our_state is h11.DONE:
            self.http.start_next_cycle()
        fields = {"host": HOST, **(headers or {})}
        if body and "transfer-encoding" not in fields:
            fields.setdefault("content-length", str(len(body)))
        data = self.http.send(h11.Request(method=method, target=path, headers=list(fields.items())))
        if body:
            data = (data or b"") + (self.http.send(h11.Data(body)) or b"")
        data = (data or b"") + (self.http.send(h11.EndOfMessage()) or b"")
        await self.stream.send_all(data)

    async def answer(self) -> Answer:
        informational: list[int] = []
        answer: Answer | None = None
        while True:
            try:
                event = self.http.next_event()
                if event is h11.NEED_DATA:
                    self.http.receive_data(bytes(await self.stream.receive_some()))
                    continue
            except (h11.RemoteProtocolError, trio.BrokenResourceError) as exc:
                if answer is None:
                    raise AssertionError("no response") from exc
                answer.broken = str(exc) or "broken"
                return answer
            if isinstance(event, h11.InformationalResponse):
                informational.append(event.status_code)
                if event.status_code == 101:
                    return Answer(101, _decoded(event.headers))
            elif isinstance(event, h11.Response):
                answer = Answer(event.status_code, _decoded(event.headers), informational=informational)
            elif isinstance(event, h11.Data):
                assert answer is not None
                answer.body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                assert answer is not None
                answer.trailers = _decoded(event.headers)
                return answer
            else:
                assert answer is not None, f"no response but {event}"
                answer.broken = "closed"
                return answer


def _decoded(headers: h11._headers.Headers | list[tuple[bytes, bytes]]) -> dict[str, str]:
    joined: dict[str, str] = {}
    for name, value in headers:
        key = name.decode()
        joined[key] = f"{joined[key]},{value.decode()}" if key in joined else value.decode()
    return joined


@dataclass
class Seen:
    """A request as the application saw it."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes = b""
    trailers: dict[str, str] = field(default_factory=dict)


Respond = Callable[[Seen], "tuple[int, dict[str, str], bytes]"]


class Echo:
    """An HTTP/1.1 application; keeps what it saw. ``respond`` makes the answer: by default the path and the body."""

    def __init__(self, respond: Respond | None = None, *, name: str = "") -> None:
        self.seen: list[Seen] = []
        self.connections = 0
        self.name = name
        self._respond = respond or (lambda seen: (200, {"x-app": self.name}, f"{seen.method} {seen.target}\n".encode() + seen.body))

    async def __call__(self, stream: trio.SocketStream) -> None:
        self.connections += 1
        http = h11.Connection(h11.SERVER)
        while True:
            seen = await self._read(http, stream)
            if seen is None:
                return
            self.seen.append(seen)
            status, headers, body = self._respond(seen)
            fields = [*headers.items()]
            if status not in (204, 304):
                fields.append(("content-length", str(len(body))))
            data = http.send(h11.Response(status_code=status, headers=fields)) or b""
            if body and seen.method != "HEAD" and status not in (204, 304):
                data += http.send(h11.Data(body)) or b""
            data += http.send(h11.EndOfMessage()) or b""
            await stream.send_all(data)
            if http.our_state is not h11.DONE or http.their_state is not h11.DONE:
                return
            http.start_next_cycle()

    async def _read(self, http: h11.Connection, stream: trio.SocketStream) -> Seen | None:
        seen: Seen | None = None
        while True:
            event = http.next_event()
            if event is h11.NEED_DATA:
                if http.they_are_waiting_for_100_continue:
                    await stream.send_all(http.send(h11.InformationalResponse(status_code=100, headers=[])) or b"")
                http.receive_data(await stream.receive_some(65536))
            elif isinstance(event, h11.Request):
                seen = Seen(event.method.decode(), event.target.decode(), _decoded(event.headers))
            elif isinstance(event, h11.Data):
                assert seen is not None
                seen.body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                assert seen is not None
                seen.trailers = _decoded(event.headers)
                return seen
            else:
                return None


# WebSocket

HANDSHAKE = (
    b"GET /chat HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


async def websocket_echo(stream: trio.SocketStream) -> None:
    """An application that changes to WebSocket as `HANDSHAKE` asks, and says back what it hears."""
    head = b""
    while b"\r\n\r\n" not in head:
        head += await stream.receive_some(4096)
    assert b"upgrade: websocket" in head.lower()
    assert b"sec-websocket-key" in head.lower()
    await stream.send_all(
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n"
    )
    async for data in stream:
        await stream.send_all(data)


# HTTP/2, by h2


class H2Client:
    """Several requests at once. `run` must be running."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        config = h2.config.H2Configuration(client_side=True, header_encoding="utf-8")
        self.http = h2.connection.H2Connection(config)
        self.answers: dict[int, Answer] = {}
        self.done: dict[int, trio.Event] = {}
        self.going_away = False
        self.hold: set[int] = set()
        """Streams whose data is not acknowledged."""
        self._window = trio.Event()
        self.ready = trio.Event()
        self.closed = trio.Event()

    async def start(self) -> None:
        self.http.initiate_connection()
        await self.flush()
        await self.ready.wait()

    async def run(self) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while data := await self.stream.receive_some():
                for event in self.http.receive_data(data):
                    self._take(event)
                await self.flush()
        self.closed.set()
        for stream, done in self.done.items():
            if not done.is_set():
                self.answers.setdefault(stream, Answer(0, {})).broken = "connection closed"
                done.set()

    def _take(self, event: h2.events.Event) -> None:
        match event:
            case h2.events.RemoteSettingsChanged():
                self.ready.set()
                self._window.set()
            case h2.events.InformationalResponseReceived():
                headers = dict(event.headers)
                self.answers.setdefault(event.stream_id, Answer(0, {})).informational.append(int(headers[":status"]))
            case h2.events.ResponseReceived():
                headers = dict(event.headers)
                answer = self.answers.setdefault(event.stream_id, Answer(0, {}))
                answer.status = int(headers.pop(":status"))
                answer.headers = headers
            case h2.events.DataReceived():
                self.answers[event.stream_id].body += event.data
                if event.stream_id not in self.hold:
                    self.http.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            case h2.events.TrailersReceived():
                self.answers[event.stream_id].trailers = dict(event.headers)
            case h2.events.StreamEnded():
                self.done[event.stream_id].set()
            case h2.events.StreamReset():
                answer = self.answers.setdefault(event.stream_id, Answer(0, {}))
                if not self.done[event.stream_id].is_set():
                    answer.broken = f"reset {int(event.error_code)}"
                    self.done[event.stream_id].set()
            case h2.events.WindowUpdated():
                self._window.set()
            case h2.events.ConnectionTerminated():
                self.going_away = True

    async def flush(self) -> None:
        data = self.http.data_to_send()
        if data:
            await self.stream.send_all(data)

    async def send(
        self,
        path: str = "/",
        method: str = "GET",
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        *,
        ended: bool = True,
        trailers: Mapping[str, str] | None = None,
        protocol: str = "",
    ) -> int:
        stream = self.http.get_next_available_stream_id()
        self.done[stream] = trio.Event()
        fields = [(":method", method), (":scheme", "http"), (":authority", HOST), (":path", path)]
        if protocol:
            fields.insert(1, (":protocol", protocol))
        fields += list((headers or {}).items())
        over = ended and not body and trailers is None
        self.http.send_headers(stream, fields, end_stream=over)
        await self.flush()
        if not over:
            await self.data(stream, body, ended=ended and trailers is None)
        if trailers is not None:
            self.http.send_headers(stream, list(trailers.items()), end_stream=True)
            await self.flush()
        return stream

    async def data(self, stream: int, body: bytes, *, ended: bool) -> None:
        view = memoryview(body)
        while view:
            room = min(self.http.local_flow_control_window(stream), self.http.max_outbound_frame_size, len(view))
            if room <= 0:
                self._window = trio.Event()
                await self._window.wait()
                continue
            self.http.send_data(stream, bytes(view[:room]))
            view = view[room:]
            await self.flush()
        if ended:
            self.http.end_stream(stream)
            await self.flush()

    async def answer(self, stream: int) -> Answer:
        await self.done[stream].wait()
        return self.answers[stream]

    async def get(self, path: str = "/", method: str = "GET", body: bytes = b"", headers: Mapping[str, str] | None = None) -> Answer:
        return await self.answer(await self.send(path, method, body, headers))

    async def reset(self, stream: int) -> None:
        self.http.reset_stream(stream, 8)
        self.done[stream].set()
        await self.flush()


class CodecClient:
    """HTTP/2 by our own codec, which goes on after a GOAWAY. `run` must be running."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self.http = Http2Client(now=time.monotonic)
        self.bodies: dict[int, bytes] = {}
        self.ended: set[int] = set()
        self.going_away = False

    async def run(self) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while data := await self.stream.receive_some():
                for event in self.http.receive(bytes(data)):
                    match event:
                        case BodyData():
                            self.bodies[event.stream] = self.bodies.get(event.stream, b"") + bytes(event.data)
                            self.http.consumed(event.stream, len(event.data))
                        case BodyEnd():
                            self.ended.add(event.stream)
                        case GoingAway():
                            self.going_away = True
                        case _:
                            pass
                await self.stream.send_all(self.http.take_outgoing())

    async def send(self, path: bytes = b"/") -> int:
        stream = self.http.send_request(Request(b"GET", b"http", HOST.encode(), path, [], Version.HTTP_2), ended=True)
        await self.stream.send_all(self.http.take_outgoing())
        return stream


Respond2 = Callable[[Seen], "tuple[int, dict[str, str], bytes, dict[str, str] | None]"]


class Echo2:
    """An HTTP/2 application (prior knowledge). ``respond`` may give trailers; without a body and trailers the head is all."""

    def __init__(self, respond: Respond2 | None = None, *, extended_connect: bool = False) -> None:
        self.seen: list[Seen] = []
        self.connections = 0
        self.resets: list[int] = []
        self._extended = extended_connect
        self._respond = respond or (lambda seen: (200, {}, f"{seen.method} {seen.target}\n".encode() + seen.body, None))

    async def __call__(self, stream: trio.SocketStream) -> None:
        self.connections += 1
        http = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding="utf-8"))
        http.initiate_connection()
        if self._extended:
            http.update_settings({h2.settings.SettingCodes.ENABLE_CONNECT_PROTOCOL: 1})
        await stream.send_all(http.data_to_send())
        requests: dict[int, Seen] = {}
        waiting: dict[int, tuple[bytes, dict[str, str] | None]] = {}
        while data := await stream.receive_some(65536):
            for event in http.receive_data(data):
                match event:
                    case h2.events.RequestReceived():
                        headers = dict(event.headers)
                        requests[event.stream_id] = Seen(headers[":method"], headers.get(":path", ""), headers)
                        if ":protocol" in headers:
                            http.send_headers(event.stream_id, [(":status", "200")])
                    case h2.events.DataReceived():
                        requests[event.stream_id].body += event.data
                        http.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                        if ":protocol" in requests[event.stream_id].headers:
                            http.send_data(event.stream_id, event.data)
                    case h2.events.TrailersReceived():
                        requests[event.stream_id].trailers = dict(event.headers)
                    case h2.events.StreamEnded():
                        seen = requests[event.stream_id]
                        self.seen.append(seen)
                        if ":protocol" in seen.headers:
                            http.end_stream(event.stream_id)
                            continue
                        status, headers, body, trailers = self._respond(seen)
                        ended = not body and trailers is None
                        http.send_headers(event.stream_id, [(":status", str(status)), *headers.items()], end_stream=ended)
                        if not ended:
                            waiting[event.stream_id] = (body, trailers)
                    case h2.events.StreamReset():
                        self.resets.append(event.stream_id)
                        waiting.pop(event.stream_id, None)
                for each in list(waiting):
                    self._send(http, each, waiting)
            await stream.send_all(http.data_to_send())

    def _send(self, http: h2.connection.H2Connection, stream: int, waiting: dict[int, tuple[bytes, dict[str, str] | None]]) -> None:
        body, trailers = waiting[stream]
        while body and (room := min(http.local_flow_control_window(stream), http.max_outbound_frame_size)) > 0:
            http.send_data(stream, body[:room])
            body = body[room:]
        waiting[stream] = (body, trailers)
        if not body:
            del waiting[stream]
            if trailers is not None:
                http.send_headers(stream, list(trailers.items()), end_stream=True)
            else:
                http.end_stream(stream)

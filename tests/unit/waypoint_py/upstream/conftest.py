"""A destination for pools and dials: real sockets, and a protocol of frames that stands for HTTP where its details do not matter.

A frame is ``KIND STREAM SIZE\\n`` and ``SIZE`` bytes: H a head, D data, E the end, R a reset, G going away.
"""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from ipaddress import ip_address

import pytest
from OpenSSL import SSL

from mesh.http.codec import BodyData, BodyEnd, Event, GoingAway, ResponseHead, StreamReset
from mesh.http.message import Headers, Request, Response
from mesh.model.address import SocketAddress
from mesh.model.identity import SpiffeId
from mesh.model.l7.destination import ConnectionPool, TrafficPolicy
from mesh.model.l7.routing import Destination
from mesh.model.service import Service
from mesh.model.workload import TunnelProtocol, Workload
from mesh.reactor.hbone import HboneLink, TunnelRequest, serve_hbone
from mesh.reactor.relay import relay_tunnel
from mesh.reactor.tcp import connect, listen_on, socket_address
from mesh.testing.ca import FakeCa
from mesh.testing.proxies import ReactorThread, tcp_listener, wait_until
from mesh.tls.bundle import CertificateBundle
from mesh.tls.contexts import hbone_context
from mesh.wire.errors import RemoteProtocolError
from waypoint_py.upstream.announce import announce
from waypoint_py.upstream.dial import Dialler
from waypoint_py.upstream.pool import Pool
from waypoint_py.upstream.session import Cancel, Endpoint, UpstreamFailure, UpstreamProtocol, UpstreamStream

CA = FakeCa()
WAYPOINT = SpiffeId("cluster.local", "shop", "waypoint")
SERVER = SpiffeId("cluster.local", "shop", "reviews")
SERVICE = Service("reviews", "shop", "reviews.shop.svc.cluster.local")
DESTINATION = Destination("shop", "reviews.shop.svc.cluster.local", 80)


# --- a protocol of frames


class FrameCodec:
    """A `ClientCodec`: one request at a time where ``serial``, as HTTP/1.1, else ``most``, as HTTP/2."""

    def __init__(self, serial: bool, most: int = 100) -> None:
        self._serial = serial
        self._most = 1 if serial else most
        self._active: set[int] = set()
        self._next = 1
        self._out = bytearray()
        self._in = bytearray()
        self._unconsumed: dict[int, int] = {}
        """Of streams that are under way: what nobody wants any more must not hold up the others."""
        self.going_away = False
        self.finished = False
        self.upgrades: bool | None = True
        self.pings = 0

    def ping(self) -> None:
        self.pings += 1
        self._frame("P", 0)

    @property
    def wants_data(self) -> bool:
        return sum(self._unconsumed.values()) < 100_000

    @property
    def capacity(self) -> int:
        return self._most - len(self._active) if self.reusable else 0

    @property
    def reusable(self) -> bool:
        return not (self.going_away or self.finished)

    def send_request(self, request: Request, *, ended: bool) -> int:
        stream, self._next = self._next, self._next + 2
        self._active.add(stream)
        self._frame("H", stream, request.path)
        if ended:
            self._frame("E", stream)
        return stream

    def room(self, stream: int) -> int:
        return 1 << 20

    def send_data(self, stream: int, data: bytes | memoryview) -> None:
        self._frame("D", stream, data)

    def send_end(self, stream: int, trailers: Headers | None = None) -> None:
        self._frame("E", stream)

    def _forget(self, stream: int) -> None:
        self._active.discard(stream)
        self._unconsumed.pop(stream, None)

    def reset(self, stream: int, code: int) -> None:
        self._forget(stream)
        if self._serial:
            self.finished = True
        else:
            self._frame("R", stream)

    def consumed(self, stream: int, size: int) -> None:
        if stream in self._unconsumed:
            self._unconsumed[stream] -= size

    def take_outgoing(self) -> bytes:
        out = bytes(self._out)
        self._out.clear()
        return out

    @property
    def unsent(self) -> int:
        return len(self._out)

    def receive(self, data: bytes | memoryview) -> Sequence[Event]:
        self._in += data
        events: list[Event] = []
        while b"\n" in self._in:
            line, _, rest = bytes(self._in).partition(b"\n")
            kind, stream, size = line.split()
            if len(rest) < int(size):
                break
            self._in = bytearray(rest[int(size) :])
            events.append(self._event(kind, int(stream), rest[: int(size)]))
        return events

    def receive_eof(self) -> Sequence[Event]:
        self.finished = True
        return []

    def _event(self, kind: bytes, stream: int, payload: bytes) -> Event:
        match kind:
            case b"H":
                ended = payload.endswith(b".")
                if ended:
                    self._forget(stream)
                return ResponseHead(stream, Response(int(payload.strip(b".")), []), ended)
            case b"D":
                if stream in self._active:
                    self._unconsumed[stream] = self._unconsumed.get(stream, 0) + len(payload)
                return BodyData(stream, payload)
            case b"E":
                self._forget(stream)
                return BodyEnd(stream, [])
            case b"R":
                self._forget(stream)
                return StreamReset(stream, 8, "reset by peer", untouched=payload == b"untouched")
            case b"P":
                self.pings = 0
                return StreamReset(0, 0, "an answer to a ping")
            case b"S":
                self.upgrades = payload == b"1"
                return StreamReset(0, 0, "settings")
            case b"G":
                self.going_away = True
                return GoingAway()
        raise RemoteProtocolError(f"no such frame: {kind!r}")

    def _frame(self, kind: str, stream: int, payload: bytes | memoryview = b"") -> None:
        self._out += f"{kind} {stream} {len(payload)}\n".encode() + payload


class ServerEnd:
    """The application's end of one connection, for scripts of tests: blocking, with a deadline."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._in = bytearray()

    def read(self) -> tuple[str, int, bytes] | None:
        """The next frame; None at the end."""
        while b"\n" not in self._in:
            if not self._more():
                return None
        line, _, rest = bytes(self._in).partition(b"\n")
        kind, stream, size = line.split()
        self._in = bytearray(rest)
        while len(self._in) < int(size):
            if not self._more():
                return None
        payload = bytes(self._in[: int(size)])
        del self._in[: int(size)]
        return kind.decode(), int(stream), payload

    def _more(self) -> bool:
        """More of what came; False when the other side is gone, however it went."""
        try:
            piece = self.sock.recv(1 << 18)
        except ConnectionResetError:
            return False
        self._in += piece
        return bool(piece)

    def send(self, kind: str, stream: int, payload: bytes = b"") -> None:
        self.sock.sendall(f"{kind} {stream} {len(payload)}\n".encode() + payload)

    def read_request(self) -> tuple[int, bytes, bytes] | None:
        """Stream, path and body of a whole request."""
        path, body = b"", bytearray()
        while (frame := self.read()) is not None:
            kind, stream, payload = frame
            if kind == "H":
                path = payload
            elif kind == "D":
                body += payload
            elif kind == "E":
                return stream, path, bytes(body)
        return None

    def answer(self, stream: int, body: bytes = b"", status: int = 200) -> None:
        self.send("H", stream, str(status).encode())
        if body:
            self.send("D", stream, body)
        self.send("E", stream)


def serve_echo(end: ServerEnd) -> None:
    """Answers every request with its path and body."""
    while (request := end.read_request()) is not None:
        stream, path, body = request
        end.answer(stream, path + body)


class Application:
    """Accepts on a loopback address; each connection gets a thread with the script."""

    def __init__(self, script: Callable[[ServerEnd], None] = serve_echo, ip: str = "127.0.0.1") -> None:
        self.script = script
        self.listener = tcp_listener(SocketAddress(ip_address(ip), 0))
        self.address = socket_address(self.listener.getsockname())
        self.ends: list[ServerEnd] = []
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def connections(self) -> int:
        return len(self.ends)

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            sock.settimeout(20)
            end = ServerEnd(sock)
            self.ends.append(end)
            threading.Thread(target=self._serve, args=(end,), daemon=True).start()

    def _serve(self, end: ServerEnd) -> None:
        try:
            self.script(end)
            end.sock.close()
        except OSError:
            end.sock.close()

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for end in self.ends:
            end.sock.close()


# --- a node's agent


class Agent:
    """Serves HBONE on a port of a loopback address, and connects tunnels to what they name."""

    def __init__(self, thread: ReactorThread, ip: str = "127.0.0.1", bundle: CertificateBundle | None = None) -> None:
        self.thread = thread
        self.bundle = bundle or CA.issue(SERVER)
        self.judge: Callable[[bytes], str | None] = lambda _der: None
        self.refuse_with: int | None = None
        self.ignore = False
        self.links: list[HboneLink] = []
        self.headers: list[dict[str, str]] = []
        self.authorities: list[str] = []
        self._listener = tcp_listener(SocketAddress(ip_address(ip), 0))
        self.port = self._listener.getsockname()[1]
        self._listening = thread.call(lambda: listen_on(thread.reactor, self._listener, self._on_accept))

    def close(self) -> None:
        def end() -> None:
            self._listening.close()
            for link in self.links:
                link.abort("the agent ends")

        self.thread.call(end)
        self._listener.close()

    def _on_accept(self, sock: socket.socket, _peer: SocketAddress) -> None:
        self.links.append(
            serve_hbone(
                self.thread.reactor,
                sock,
                hbone_context(self.bundle),
                on_handshake=lambda der: self.judge(der),
                on_request=self._on_request,
                on_close=lambda _: None,
            )
        )

    def _on_request(self, request: TunnelRequest) -> None:
        self.headers.append(dict(request.headers))
        self.authorities.append(request.authority)
        if self.ignore:
            return
        if self.refuse_with is not None:
            request.refuse(self.refuse_with)
            return
        target = request.target
        assert isinstance(target, SocketAddress)
        sock = socket.socket(socket.AF_INET6 if target.ip.version == 6 else socket.AF_INET)
        sock.setblocking(False)

        def connected(error: OSError | None) -> None:
            if error is not None:
                sock.close()
                request.refuse(503)
            else:
                relay_tunnel(self.thread.reactor, sock, request.accept({}), lambda _: None, sock_is="upstream")

        connect(self.thread.reactor, sock, target, 10.0, connected)


class HeldCredentials:
    """`waypoint_py.upstream.dial.Credentials` with a certificate of the test's authority."""

    def __init__(self) -> None:
        self.identity = WAYPOINT
        self.held: SSL.Context | str = hbone_context(CA.issue(WAYPOINT))

    def context(self) -> SSL.Context | str:
        return self.held


# --- who asks


class Answer:
    """A `ResponseSink` that keeps all it hears. ``credit``: whether it takes what comes."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.status = 0
        self.body = bytearray()
        self.failure: UpstreamFailure | None = None
        self.stream: UpstreamStream | None = None
        self.cancel: Cancel | None = None
        self.credit = True
        self.on_open: Callable[[UpstreamStream], None] = lambda _stream: None
        self.on_response: Callable[[], None] = lambda: None
        self.on_writable: Callable[[], None] = lambda: None

    def opened(self, stream: UpstreamStream) -> None:
        self.calls.append("open")
        self.stream = stream
        self.on_open(stream)

    def informational(self, status: int, headers: Headers) -> None:
        self.calls.append(f"informational {status}")

    def response(self, response: Response, ended: bool) -> None:
        self.calls.append("response, ended" if ended else "response")
        self.status = response.status
        self.on_response()

    def data(self, data: bytes | memoryview) -> None:
        self.body += data
        if self.credit and self.stream is not None:
            self.stream.consumed(len(data))

    def complete(self, trailers: Headers) -> None:
        self.calls.append("complete")

    def failed(self, failure: UpstreamFailure) -> None:
        self.calls.append("failed")
        self.failure = failure

    def writable(self) -> None:
        self.calls.append("writable")
        self.on_writable()

    @property
    def over(self) -> bool:
        return self.calls[-1:] in (["complete"], ["failed"], ["response, ended"])

    def wait(self) -> Answer:
        wait_until(lambda: self.over, f"the end of a request; {self.calls}")
        return self


@dataclass
class World:
    """A pool on a loop of its own thread."""

    thread: ReactorThread
    credentials: HeldCredentials
    dialler: Dialler
    pool: Pool

    def call(self, fn: Callable[[], object]) -> object:
        return self.thread.call(fn)

    def ask(
        self,
        endpoint: Endpoint,
        path: str = "/",
        *,
        protocol: UpstreamProtocol = UpstreamProtocol.HTTP1,
        body: bytes | None = None,
        ended: bool = True,
        answer: Answer | None = None,
    ) -> Answer:
        """Send a request; with ``body`` once it is open, or with one of the caller's own if it has not ``ended``."""
        found = answer or Answer()
        if body is not None:

            def send(stream: UpstreamStream) -> None:
                stream.send_data(body)
                stream.send_end()

            found.on_open = send
        request = Request(b"GET", b"http", b"reviews", path.encode(), [])

        def start() -> None:
            before = len(found.calls)
            found.cancel = self.pool.request(endpoint, protocol, request, ended and body is None, found, found.opened)
            assert found.calls[before:] in ([], ["open"]), "nothing else is called from within"

        self.call(start)
        return found

    def get(self, endpoint: Endpoint, path: str = "/", **options: UpstreamProtocol) -> Answer:
        """A request and its whole answer."""
        return self.ask(endpoint, path, **options).wait()


@pytest.fixture
def world() -> Iterator[World]:
    with ReactorThread() as thread:
        credentials = HeldCredentials()
        rng = random.Random(1)
        workload = Workload("w", "waypoint", "shop", service_account="waypoint", workload_name="waypoint", canonical_name="waypoint")
        dialler = Dialler(thread.reactor, credentials, lambda endpoint, client: announce(workload, endpoint, client, rng))
        pool = Pool(thread.reactor, dialler, lambda protocol: FrameCodec(protocol is UpstreamProtocol.HTTP1))
        yield World(thread, credentials, dialler, pool)
        thread.call(lambda: pool.close(gracefully=False))
        settle(thread)
        assert thread.call(lambda: pool.connections) == 0
        assert thread.call(lambda: (pool._shelves, pool._breakers, pool._recent, pool.connecting)) == ({}, {}, {}, {})
    assert thread.errors == []


def settle(thread: ReactorThread) -> None:
    """What was called for soon has been called."""
    for _ in range(5):
        thread.call(lambda: None)
    time.sleep(0)


def endpoint_at(address: SocketAddress, policy: TrafficPolicy | None = None, destination: Destination | None = DESTINATION) -> Endpoint:
    """Outside the mesh, so plain TCP."""
    return Endpoint(address, None, SERVICE, destination, policy or TrafficPolicy(), "a test")


def in_mesh(endpoint: Endpoint, identity: SpiffeId = SERVER) -> Endpoint:
    """The same in HBONE."""
    workload = Workload(
        f"pod at {endpoint.address}",
        "reviews",
        identity.namespace,
        addresses=(endpoint.address.ip,),
        tunnel_protocol=TunnelProtocol.HBONE,
        service_account=identity.service_account,
    )
    return replace(endpoint, workload=workload)


def limited(**bounds: float) -> TrafficPolicy:
    """A policy with these bounds of a connection pool."""
    return TrafficPolicy(pool=ConnectionPool(**bounds))


@pytest.fixture
def application() -> Iterator[Application]:
    found = Application()
    yield found
    found.close()


@pytest.fixture
def serve() -> Iterator[Callable[..., Application]]:
    """Applications with scripts of their own."""
    made: list[Application] = []

    def make(script: Callable[[ServerEnd], None] = serve_echo, ip: str = "127.0.0.1") -> Application:
        made.append(Application(script, ip))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def make_agent(world: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Agent]]:
    """Agents; dials go to the last one's port."""
    made: list[Agent] = []

    def make(ip: str = "127.0.0.1", bundle: CertificateBundle | None = None) -> Agent:
        made.append(Agent(world.thread, ip, bundle))
        monkeypatch.setattr("waypoint_py.upstream.dial.INBOUND_HBONE", made[-1].port)
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def agent(make_agent: Callable[..., Agent]) -> Agent:
    return make_agent()

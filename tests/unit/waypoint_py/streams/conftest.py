"""Lines: a byte stream of ours on a reactor, with a blocking socket at its far end, over every carrier there is."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from OpenSSL import SSL, crypto

from mesh.model.address import SocketAddress, parse_ip
from mesh.model.identity import SpiffeId
from mesh.reactor.hbone import HboneLink, Tunnel, TunnelFailure, TunnelRequest, connect_hbone, serve_hbone
from mesh.reactor.tcp import listen_on, socket_address
from mesh.reactor.tls import verify_peers
from mesh.testing.ca import FakeCa
from mesh.testing.proxies import EgressProxy, IngressProxy, ReactorThread, tcp_listener, wait_until
from mesh.tls.bundle import CertificateBundle
from mesh.tls.contexts import hbone_context
from tests.unit.waypoint_py.stage import Wire
from waypoint_py.stream import HIGH_WATER, ByteStream
from waypoint_py.streams.tcp import TcpStream
from waypoint_py.streams.tls import TlsStream
from waypoint_py.streams.tunnel import TunnelStream

BUNDLE = FakeCa().issue(SpiffeId("cluster.local", "default", "client"))


class Collector:
    """A sink that keeps all it hears, in order; neighbouring data is one event."""

    def __init__(self) -> None:
        self.received = bytearray()
        self.events: list[str] = []
        self.reason: str | None = None
        self.on_data: Callable[[], None] = lambda: None
        self.on_drained: Callable[[], None] = lambda: None

    def data(self, data: memoryview) -> None:
        self.received += data
        if self.events[-1:] != ["data"]:
            self.events.append("data")
        self.on_data()

    def ended(self) -> None:
        self.events.append("ended")

    def drained(self) -> None:
        self.events.append("drained")
        self.on_drained()

    def closed(self, reason: str | None) -> None:
        self.events.append("closed")
        self.reason = reason

    def wait_for(self, event: str) -> None:
        wait_until(lambda: event in self.events, f"{event}; there were {self.events}")


@contextmanager
def tls_that_stands() -> Iterator[tuple[ReactorThread, Wire, TlsStream]]:
    """TLS over a carrier with nothing in it."""
    with ReactorThread() as thread:
        reactor, outcomes = thread.reactor, list[str | None]()

        def start() -> tuple[Wire, TlsStream, Wire]:
            near, far = Wire(reactor), Wire(reactor)
            TlsStream(reactor, far, tls_server_context(BUNDLE), outcomes.append, server_side=True)
            return near, TlsStream(reactor, near, tls_client_context(BUNDLE), outcomes.append), far

        near, stream, far = thread.call(start)

        def carry() -> bool:
            for source, target in ((near, far), (far, near)):
                assert target.sink is not None
                target.sink.data(memoryview(source.read(source.unsent)))
            return len(outcomes) == 2 and not near.unsent and not far.unsent

        wait_until(lambda: thread.call(carry), "TLS to stand")
        assert outcomes == [None, None]
        yield thread, near, stream
    assert thread.errors == []


class Pipe:
    """Joins two streams, with back-pressure: what a TCP proxy does."""

    def __init__(self, one: ByteStream, other: ByteStream) -> None:
        one.attach(PipeEnd(one, other))
        other.attach(PipeEnd(other, one))


class PipeEnd:
    def __init__(self, source: ByteStream, target: ByteStream) -> None:
        self.source, self.target = source, target

    def data(self, data: memoryview) -> None:
        self.target.write(data)
        if self.target.unsent > HIGH_WATER:
            self.source.pause()

    def ended(self) -> None:
        self.target.end()

    def drained(self) -> None:
        self.target.resume()

    def closed(self, reason: str | None) -> None:
        if reason is not None:
            self.target.abort(reason)


@dataclass
class Line:
    """``stream`` belongs to the loop of ``thread``: touch it by `do`."""

    thread: ReactorThread
    stream: TcpStream | TunnelStream | TlsStream
    far: socket.socket
    sink: Collector = field(default_factory=Collector)

    def do(self, fn: Callable[[], object]) -> None:
        self.thread.call(fn)

    def attach(self) -> Collector:
        self.do(lambda: self.stream.attach(self.sink))
        return self.sink

    def write(self, data: bytes) -> None:
        self.do(lambda: self.stream.write(data))

    def end(self) -> None:
        self.do(self.stream.end)

    def unsent(self) -> int:
        return self.thread.call(lambda: self.stream.unsent)


KINDS = ["tcp", "tcp6", "tunnel", "served-tunnel", "tls", "tls-in-tunnel"]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def line(kind: str) -> Iterator[Line]:
    with ReactorThread() as thread, ExitStack() as stack:
        yield _MAKERS[kind](thread, stack)
    assert thread.errors == []


@pytest.fixture
def open_line() -> Iterator[Callable[[str], Line]]:
    """For tests of one kind, or of several lines."""
    with ReactorThread() as thread, ExitStack() as stack:
        yield lambda kind: _MAKERS[kind](thread, stack)
    assert thread.errors == []


def _tcp_pair(thread: ReactorThread, stack: ExitStack, ip: str = "127.0.0.1") -> tuple[TcpStream, socket.socket]:
    with tcp_listener(SocketAddress(parse_ip(ip), 0)) as listener:
        near = socket.create_connection(listener.getsockname()[:2])
        far, _ = listener.accept()
    near.setblocking(False)
    far.settimeout(10)
    stack.enter_context(far)
    stream = thread.call(lambda: TcpStream(thread.reactor, near))
    stack.callback(thread.call, lambda: stream.abort("the test is over"))
    return stream, far


def _tcp(thread: ReactorThread, stack: ExitStack) -> Line:
    return Line(thread, *_tcp_pair(thread, stack))


def _tcp6(thread: ReactorThread, stack: ExitStack) -> Line:
    return Line(thread, *_tcp_pair(thread, stack, "::1"))


def _tunnel(thread: ReactorThread, stack: ExitStack) -> Line:
    """We opened it; a relay at the other end connects the far socket."""
    server, listener = stack.enter_context(tcp_listener()), stack.enter_context(tcp_listener())
    server.settimeout(10)
    reactor, opened = thread.reactor, list[TunnelStream]()
    ingress = thread.call(lambda: IngressProxy(reactor, listener, hbone_context(BUNDLE)))
    stack.callback(thread.call, ingress.close)
    sock = socket.create_connection((str(ingress.address.ip), ingress.address.port))

    def ready(link: HboneLink) -> None:
        link.open_tunnel(str(socket_address(server.getsockname())), {}, answered)

    def answered(answer: Tunnel | TunnelFailure) -> None:
        assert isinstance(answer, Tunnel), answer
        opened.append(TunnelStream(reactor, answer))

    link = thread.call(
        lambda: connect_hbone(reactor, sock, hbone_context(BUNDLE), verify_peer=lambda _: None, on_ready=ready, on_close=lambda _: None)
    )
    stack.callback(thread.call, lambda: link.abort("the test is over"))
    far, _ = server.accept()
    stack.enter_context(far)
    far.settimeout(10)
    wait_until(lambda: bool(opened), "the tunnel")
    return Line(thread, opened[0], far)


def _served_tunnel(thread: ReactorThread, stack: ExitStack) -> Line:
    """A peer opened it: as a waypoint's clients do."""
    served, entry = stack.enter_context(tcp_listener()), stack.enter_context(tcp_listener())
    reactor, accepted, links = thread.reactor, list[TunnelStream](), list[HboneLink]()

    def on_request(request: TunnelRequest) -> None:
        accepted.append(TunnelStream(reactor, request.accept({})))

    def on_accept(sock: socket.socket, _peer: SocketAddress) -> None:
        links.append(
            serve_hbone(
                reactor,
                sock,
                hbone_context(BUNDLE),
                on_handshake=lambda _: None,
                on_request=on_request,
                on_close=lambda _: None,
            )
        )

    address = socket_address(served.getsockname())
    thread.call(lambda: listen_on(reactor, served, on_accept))
    egress = thread.call(lambda: EgressProxy(reactor, entry, hbone_context(BUNDLE), address, "10.0.0.1:80"))
    stack.callback(thread.call, egress.close)
    far = stack.enter_context(socket.create_connection((str(egress.address.ip), egress.address.port), timeout=10))
    wait_until(lambda: bool(accepted), "the tunnel")
    stack.callback(lambda: [thread.call(lambda link=link: link.abort("the test is over")) for link in links])
    return Line(thread, accepted[0], far)


def _tls_within(thread: ReactorThread, stack: ExitStack, carrier: Line) -> Line:
    """TLS over the carrier; at its far end, in the same loop, the server that passes plaintext on to the far socket."""
    reactor = thread.reactor
    inner, far = _tcp_pair(thread, stack)
    carrier.far.setblocking(False)
    outcomes: list[str | None] = []

    def start() -> TlsStream:
        server_end = TcpStream(reactor, carrier.far)
        server = TlsStream(reactor, server_end, tls_server_context(BUNDLE), outcomes.append, server_side=True)
        Pipe(server, inner)
        return TlsStream(reactor, carrier.stream, tls_client_context(BUNDLE), outcomes.append)

    stream = thread.call(start)
    wait_until(lambda: len(outcomes) == 2, "both ends of TLS")
    assert outcomes == [None, None]
    stack.callback(thread.call, lambda: stream.abort("the test is over"))
    return Line(thread, stream, far)


def _tls(thread: ReactorThread, stack: ExitStack) -> Line:
    return _tls_within(thread, stack, _tcp(thread, stack))


def _tls_in_tunnel(thread: ReactorThread, stack: ExitStack) -> Line:
    return _tls_within(thread, stack, _tunnel(thread, stack))


_MAKERS = {
    "tcp": _tcp,
    "tcp6": _tcp6,
    "tunnel": _tunnel,
    "served-tunnel": _served_tunnel,
    "tls": _tls,
    "tls-in-tunnel": _tls_in_tunnel,
}


def tls_server_context(bundle: CertificateBundle) -> SSL.Context:
    context = SSL.Context(SSL.TLS_METHOD)
    context.use_certificate(x509.load_pem_x509_certificate(bundle.chain_pem[0]))
    context.use_privatekey(load_pem_private_key(bundle.key_pem, password=None))
    return context


def tls_client_context(bundle: CertificateBundle) -> SSL.Context:
    context = SSL.Context(SSL.TLS_METHOD)
    context.get_cert_store().add_cert(crypto.X509.from_cryptography(x509.load_pem_x509_certificate(bundle.roots_pem)))
    verify_peers(context, SSL.VERIFY_PEER)
    return context


def python_server_context(bundle: CertificateBundle, directory: str) -> ssl.SSLContext:
    """Python's own TLS, as another implementation at the far end."""
    path = f"{directory}/bundle.pem"
    with open(path, "wb") as file:
        file.write(bundle.key_pem + b"".join(bundle.chain_pem))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    return context

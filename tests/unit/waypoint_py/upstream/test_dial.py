"""Connections to endpoints: every way there, and every way it can fail."""

from __future__ import annotations

import random
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from msgspec import structs

from mesh.http.message import Request
from mesh.model.address import SocketAddress
from mesh.model.identity import SpiffeId
from mesh.model.l7.destination import ConnectionPool, Keepalive, TlsMode, TrafficPolicy, UpstreamTls
from mesh.model.workload import TunnelProtocol, Workload
from mesh.reactor.tcp import socket_address
from mesh.testing.ca import FakeCa
from mesh.testing.proxies import open_descriptors, tcp_listener, wait_until
from mesh.testing.serving import ServingCertificate, write_serving_certificate
from mesh.wire.proxy_protocol import encode_header, encode_local
from tests.unit.waypoint_py.streams.conftest import Collector
from tests.unit.waypoint_py.upstream.conftest import (
    CA,
    SERVER,
    SERVICE,
    Agent,
    Answer,
    Application,
    ServerEnd,
    World,
    endpoint_at,
    in_mesh,
    limited,
    serve_echo,
    settle,
)
from waypoint_py.context import Connection
from waypoint_py.stream import ByteStream
from waypoint_py.upstream import pool
from waypoint_py.upstream.announce import announce
from waypoint_py.upstream.dial import make_socket, proxy_header
from waypoint_py.upstream.session import Endpoint, FailureKind, UpstreamFailure, UpstreamProtocol

CLIENT = Connection(
    SpiffeId("cluster.local", "shop", "client"),
    SocketAddress.parse("10.0.0.7:40000"),
    SocketAddress.parse("10.96.0.1:80"),
    SERVICE,
    None,
    None,
    "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
)


def outcome(world: World, endpoint: Endpoint, **options: object) -> ByteStream | UpstreamFailure:
    """What comes of a connection of its own."""
    results: list[ByteStream | UpstreamFailure] = []

    def start() -> None:
        world.pool.connect(endpoint, results.append, **options)
        assert results == []

    world.call(start)
    wait_until(lambda: bool(results), "the outcome of a dial")
    assert len(results) == 1
    return results[0]


def failure(world: World, endpoint: Endpoint, **options: object) -> UpstreamFailure:
    result = outcome(world, endpoint, **options)
    assert isinstance(result, UpstreamFailure), result
    wait_until(lambda: world.call(lambda: world.pool.connections) == 0, "the connection to be counted no more")
    return result


def echoed(world: World, endpoint: Endpoint, **options: object) -> Collector:
    """A connection that carries bytes there and back."""
    stream = outcome(world, endpoint, **options)
    assert not isinstance(stream, UpstreamFailure), stream
    sink = Collector()
    world.call(lambda: (stream.attach(sink), stream.write(b"hello")))
    wait_until(lambda: sink.received == b"hello", "the echo")
    address = world.call(lambda: stream.local_address)
    assert isinstance(address, SocketAddress)
    assert address.ip.is_loopback
    world.call(stream.end)
    sink.wait_for("closed")
    assert sink.reason is None
    return sink


def echo_bytes(end: ServerEnd) -> None:
    while piece := end.sock.recv(1 << 16):
        end.sock.sendall(piece)


# --- the way there


@pytest.mark.parametrize("ip", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("mesh", [False, True])
def test_bytes_reach_the_application_by_either_family_plainly_and_in_a_tunnel(
    world: World, serve: Callable[..., Application], make_agent: Callable[..., Agent], ip: str, mesh: bool
) -> None:
    agent = make_agent(ip)
    endpoint = endpoint_at(serve(echo_bytes, ip).address)
    echoed(world, in_mesh(endpoint) if mesh else endpoint)
    assert agent.authorities == ([str(endpoint.address)] if mesh else [])


def test_tunnels_to_one_node_share_a_connection(world: World, serve: Callable[..., Application], agent: Agent) -> None:
    one, other = serve(echo_bytes), serve(echo_bytes)
    with ExitStack():
        streams = [outcome(world, in_mesh(endpoint_at(each.address))) for each in (one, other, one) for _ in range(10)]
    assert not any(isinstance(stream, UpstreamFailure) for stream in streams)
    assert len(agent.links) == 1
    assert len(agent.authorities) == 30


def test_a_workload_outside_hbone_is_dialled_plainly(world: World, serve: Callable[..., Application], agent: Agent) -> None:
    endpoint = endpoint_at(serve(echo_bytes).address)
    workload = Workload("pod", "reviews", "shop", addresses=(endpoint.address.ip,), tunnel_protocol=TunnelProtocol.NONE)
    echoed(world, replace(endpoint, workload=workload))
    assert agent.authorities == []


def test_connect_says_whose_connection_it_is(world: World, serve: Callable[..., Application], agent: Agent) -> None:
    echoed(world, in_mesh(endpoint_at(serve(echo_bytes).address)), client=CLIENT)
    (headers,) = agent.headers
    assert headers["x-istio-source"] == "waypoint"
    assert headers["forwarded"] == 'for="10.0.0.7:40000";host=reviews.shop.svc.cluster.local'
    assert headers["traceparent"] == CLIENT.traceparent
    assert "k8s.namespace.name=shop" in headers["baggage"]
    assert "service.name=waypoint" in headers["baggage"]


def test_a_tunnel_that_many_share_names_none_of_them(world: World, application: Application, agent: Agent) -> None:
    world.get(in_mesh(endpoint_at(application.address)))
    (headers,) = agent.headers
    assert headers["forwarded"] == "host=reviews.shop.svc.cluster.local"
    assert headers["traceparent"].startswith("00-")


def test_without_a_service_or_a_workload_there_is_less_to_say() -> None:
    endpoint = replace(endpoint_at(SocketAddress.parse("10.0.0.1:80")), service=None)
    assert set(announce(None, endpoint, None, random.Random(1))) == {"x-istio-source", "traceparent"}


def test_keepalive_is_as_the_rule_says() -> None:
    with make_socket(SocketAddress.parse("[::1]:80"), Keepalive(probes=3, time=75.0, interval=0.2)) as sock:
        assert sock.family == socket.AF_INET6
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        options = (socket.TCP_KEEPCNT, socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL)
        assert [sock.getsockopt(socket.IPPROTO_TCP, option) for option in options] == [3, 75, 1]
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
    with make_socket(SocketAddress.parse("127.0.0.1:80")) as sock:
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 0


# --- the PROXY header


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("mesh", [False, True])
def test_the_proxy_header_names_the_client_and_what_it_dialled(
    world: World, serve: Callable[..., Application], agent: Agent, version: int, mesh: bool
) -> None:
    endpoint = endpoint_at(serve(echo_bytes).address, TrafficPolicy(proxy_protocol=version))
    stream = outcome(world, in_mesh(endpoint) if mesh else endpoint, client=CLIENT)
    assert not isinstance(stream, UpstreamFailure)
    sink = Collector()
    world.call(lambda: (stream.attach(sink), stream.write(b"and the rest")))
    header = b"PROXY TCP4 10.0.0.7 10.96.0.1 40000 80\r\n" if version == 1 else encode_header(CLIENT.peer_address, CLIENT.destination)
    wait_until(lambda: sink.received == header + b"and the rest", "the header, echoed")


def test_clients_share_no_connection_that_names_them(world: World, serve: Callable[..., Application]) -> None:
    def script(end: ServerEnd) -> None:
        while end.sock.recv(1, socket.MSG_PEEK) != b"H":
            end.sock.recv(1)
        serve_echo(end)

    application = serve(script)
    endpoint = endpoint_at(application.address, TrafficPolicy(proxy_protocol=1))
    clients = [CLIENT, CLIENT, replace(CLIENT, peer_address=SocketAddress.parse("10.0.0.8:1")), None, None]
    for client in clients:
        answer, request = Answer(), Request(b"GET", b"http", b"reviews", b"/", [])
        world.call(
            lambda client=client, answer=answer, request=request: world.pool.request(
                endpoint, UpstreamProtocol.HTTP1, request, True, answer, answer.opened, client=client
            )
        )
        assert answer.wait().status == 200
    assert application.connections == 3


def test_a_connection_that_is_nobodys_says_so() -> None:
    assert proxy_header(1, None) == b"PROXY UNKNOWN\r\n"
    assert proxy_header(2, None) == encode_local()


# --- no connection


def closed_port() -> SocketAddress:
    with tcp_listener() as listener:
        return socket_address(listener.getsockname())


@pytest.fixture
def blackhole() -> Iterator[SocketAddress]:
    """A listener that accepts nothing, its queue full: the kernel drops what comes."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        time.sleep(0.05)
        yield socket_address(listener.getsockname())


def test_a_port_that_nobody_listens_on_is_a_connection_failure(world: World) -> None:
    found = failure(world, endpoint_at(closed_port()))
    assert found.kind is FailureKind.CONNECT
    assert "refused" in found.because


def test_every_request_that_waited_hears_of_the_failure(world: World) -> None:
    endpoint = endpoint_at(closed_port())
    for protocol in (UpstreamProtocol.HTTP1, UpstreamProtocol.HTTP2):
        answers = [world.ask(endpoint, protocol=protocol) for _ in range(10)]
        assert [answer.wait().failure.kind for answer in answers] == [FailureKind.CONNECT] * 10


def test_a_silent_host_is_given_up_after_the_rules_timeout(world: World, blackhole: SocketAddress) -> None:
    began = time.monotonic()
    found = failure(world, endpoint_at(blackhole, limited(connect_timeout=0.2)))
    assert found.kind is FailureKind.CONNECT_TIMEOUT
    assert "within 0.2 s" in found.because
    assert time.monotonic() - began < 3


def test_a_silent_node_is_given_up_after_the_rules_timeout(world: World, blackhole: SocketAddress, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("waypoint_py.upstream.dial.INBOUND_HBONE", blackhole.port)
    monkeypatch.setattr("waypoint_py.upstream.dial.CONNECT_TIMEOUT", 0.4)
    endpoint = in_mesh(endpoint_at(blackhole, limited(connect_timeout=0.2)))
    assert failure(world, endpoint).kind is FailureKind.CONNECT_TIMEOUT
    patient = replace(endpoint, policy=limited(connect_timeout=5.0))
    found = failure(world, patient)
    assert found.kind is FailureKind.CONNECT_TIMEOUT
    assert "NetworkPolicy" in found.because


def test_a_node_without_an_agent_is_a_connection_failure(world: World, application: Application, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("waypoint_py.upstream.dial.INBOUND_HBONE", closed_port().port)
    found = failure(world, in_mesh(endpoint_at(application.address)))
    assert found.kind is FailureKind.CONNECT
    assert "HBONE to shop/reviews" in found.because


def test_an_agent_that_never_answers_is_given_up(world: World, application: Application, agent: Agent) -> None:
    agent.ignore = True
    found = failure(world, in_mesh(endpoint_at(application.address, limited(connect_timeout=0.3))))
    assert found.kind is FailureKind.CONNECT_TIMEOUT


@pytest.mark.parametrize("status", [401, 503, 404])
def test_an_agent_that_says_no_is_a_refusal(world: World, application: Application, agent: Agent, status: int) -> None:
    agent.refuse_with = status
    found = failure(world, in_mesh(endpoint_at(application.address)))
    assert found.kind is FailureKind.REFUSED
    assert f"http status: {status}" in found.because
    assert found.transport == ""


def test_an_application_that_does_not_listen_is_a_refusal_of_its_agent(world: World, agent: Agent) -> None:
    assert failure(world, in_mesh(endpoint_at(closed_port()))).kind is FailureKind.REFUSED


def test_an_agent_of_another_identity_is_not_trusted(world: World, application: Application, agent: Agent) -> None:
    other = SpiffeId("cluster.local", "shop", "impostor")
    found = failure(world, in_mesh(endpoint_at(application.address), other))
    assert found.kind is FailureKind.TLS
    assert "did not present the expected SAN" in found.transport
    assert agent.authorities == []


def test_a_service_may_vouch_for_another_identity(world: World, serve: Callable[..., Application], agent: Agent) -> None:
    endpoint = in_mesh(endpoint_at(serve(echo_bytes).address), SpiffeId("cluster.local", "shop", "moved"))
    echoed(world, replace(endpoint, service=structs.replace(SERVICE, subject_alt_names=(str(SERVER),))))


@pytest.mark.parametrize("flaw", ["unknown", "expired"])
def test_an_agent_whose_certificate_does_not_hold_is_not_trusted(
    world: World, application: Application, make_agent: Callable[..., Agent], flaw: str
) -> None:
    make_agent(bundle=FakeCa().issue(SERVER) if flaw == "unknown" else CA.issue(SERVER, timedelta(hours=-1)))
    found = failure(world, in_mesh(endpoint_at(application.address)))
    assert found.kind is FailureKind.TLS
    assert "certificate verify failed" in found.transport


def test_an_agent_that_does_not_trust_us_is_a_tls_failure(world: World, application: Application, agent: Agent) -> None:
    agent.judge = lambda _der: "not welcome"
    found = failure(world, in_mesh(endpoint_at(application.address)))
    assert found.kind is FailureKind.TLS
    assert "refused by peer" in found.transport


def test_without_a_certificate_nothing_is_dialled_in_hbone(world: World, application: Application, agent: Agent) -> None:
    held, world.credentials.held = world.credentials.held, "the authority does not answer"
    found = failure(world, in_mesh(endpoint_at(application.address)))
    assert found.kind is FailureKind.TLS
    assert "the authority does not answer" in found.because
    world.credentials.held = held
    assert world.get(in_mesh(endpoint_at(application.address))).status == 200


def test_a_connection_to_the_node_that_died_is_replaced_before_anybody_notices(
    world: World, application: Application, agent: Agent
) -> None:
    endpoint = in_mesh(endpoint_at(application.address))
    world.get(endpoint)
    for _ in range(3):
        world.call(lambda: agent.links[-1].abort("the agent was killed"))
        answer = world.get(endpoint)
        assert answer.status == 200, answer.failure


def test_a_dial_that_is_called_off_leaves_nothing(
    world: World, serve: Callable[..., Application], agent: Agent, blackhole: SocketAddress
) -> None:
    agent.ignore = True
    before = open_descriptors()
    opened: list[object] = []
    application = serve(lambda end: end.sock.recv(1 << 16) and end.sock.recv(1))
    tls = TrafficPolicy(tls=UpstreamTls(TlsMode.SIMPLE, skip_verify=True))
    for endpoint in (endpoint_at(blackhole), in_mesh(endpoint_at(application.address)), endpoint_at(application.address, tls)):
        connecting = world.thread.call(lambda endpoint=endpoint: world.pool.connect(endpoint, opened.append))
        time.sleep(0.1)
        world.call(lambda connecting=connecting: (connecting.cancel(), connecting.cancel()))
    assert opened == []
    assert world.call(lambda: world.pool.connections) == 0
    world.call(lambda: world.dialler.close(gracefully=False))
    wait_until(lambda: open_descriptors() <= before + 1, "descriptors to be given back")


def test_an_application_that_closes_at_once_costs_its_own_requests_alone(world: World, serve: Callable[..., Application]) -> None:
    endpoint = endpoint_at(serve(lambda end: end.sock.close()).address)
    for _ in range(20):
        answer = world.get(endpoint)
        assert answer.failure is not None
        assert answer.failure.kind in (FailureKind.TERMINATED, FailureKind.CONNECT)


# --- TLS within


class TlsApplication(Application):
    """Python's own TLS before the script. ``server_names`` and ``client_names``: what clients asked for, and who they proved to be."""

    def __init__(self, chain: Path, key: Path, script: Callable[[ServerEnd], None], *, alpn: str | None = None, clients: str = "") -> None:
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(chain, key)
        if alpn is not None:
            self.context.set_alpn_protocols([alpn])
        if clients:
            self.context.load_verify_locations(cadata=clients)
            self.context.verify_mode = ssl.CERT_REQUIRED
        self.context.sni_callback = lambda _sock, name, _context: self.server_names.append(name)
        self.server_names: list[str | None] = []
        self.alpn: list[str | None] = []
        self.errors: list[str] = []
        super().__init__(self._shake_hands)
        self._plain_script = script

    def _shake_hands(self, end: ServerEnd) -> None:
        try:
            with self.context.wrap_socket(end.sock, server_side=True) as sock:
                self.alpn.append(sock.selected_alpn_protocol())
                self._plain_script(ServerEnd(sock))
                sock.unwrap()
        except ssl.SSLError as exc:
            self.errors.append(str(exc))


@pytest.fixture
def certificate(tmp_path: Path) -> ServingCertificate:
    return write_serving_certificate(tmp_path, "reviews.example", "127.0.0.1")


@pytest.fixture
def serve_tls(certificate: ServingCertificate) -> Iterator[Callable[..., TlsApplication]]:
    made: list[TlsApplication] = []

    def make(script: Callable[[ServerEnd], None] = echo_bytes, **options: str) -> TlsApplication:
        made.append(TlsApplication(certificate.chain, certificate.key, script, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


def secured(application: Application, **options: object) -> Endpoint:
    mode = options.pop("mode", TlsMode.SIMPLE)
    return endpoint_at(application.address, TrafficPolicy(tls=UpstreamTls(mode, **options)))


@pytest.mark.parametrize("mesh", [False, True])
def test_tls_of_a_rule_is_spoken_with_the_application_also_in_a_tunnel(
    world: World, serve_tls: Callable[..., TlsApplication], certificate: ServingCertificate, agent: Agent, mesh: bool
) -> None:
    application = serve_tls()
    endpoint = secured(application, roots=certificate.root_pem, sni="reviews.example")
    echoed(world, in_mesh(endpoint) if mesh else endpoint)
    assert application.server_names == ["reviews.example"]


def test_the_requests_host_is_asked_for_and_verified_where_the_rule_names_nothing(
    world: World, serve_tls: Callable[..., TlsApplication], certificate: ServingCertificate
) -> None:
    application = serve_tls()
    endpoint = secured(application, roots=certificate.root_pem)
    echoed(world, endpoint, host="Reviews.example:8443")
    assert application.server_names == ["reviews.example"]
    echoed(world, endpoint, host="127.0.0.1:8443")
    assert application.server_names == ["reviews.example", None]
    found = failure(world, endpoint, host="ratings.example")
    assert found.kind is FailureKind.TLS
    assert "not ratings.example" in found.transport


def test_names_of_the_rule_are_verified_instead_of_the_host(
    world: World, serve_tls: Callable[..., TlsApplication], certificate: ServingCertificate
) -> None:
    application = serve_tls()
    echoed(world, secured(application, roots=certificate.root_pem, names=("reviews.example",)), host="whatever.example")
    found = failure(world, secured(application, roots=certificate.root_pem, names=("other.example",)), host="reviews.example")
    assert found.kind is FailureKind.TLS
    assert found.transport.startswith("TLS_error: tls handshake error: certificate names reviews.example")


def test_a_server_of_an_unknown_authority_is_not_trusted(world: World, serve_tls: Callable[..., TlsApplication], tmp_path: Path) -> None:
    application = serve_tls()
    for roots in (FakeCa().root_pem.decode(), None):  # None: the system's
        found = failure(world, secured(application, roots=roots), host="reviews.example")
        assert found.kind is FailureKind.TLS
        assert "certificate verify failed" in found.transport
    wait_until(lambda: len(application.errors) == 2, "the server to learn of it")
    assert application.connections == 2


def test_an_expired_certificate_is_not_trusted(world: World, tmp_path: Path) -> None:
    bundle = CA.issue(SERVER, timedelta(hours=-1))
    (tmp_path / "expired").write_bytes(bundle.key_pem + bundle.chain_pem[0])
    application = TlsApplication(tmp_path / "expired", tmp_path / "expired", echo_bytes)
    found = failure(world, secured(application, roots=CA.root_pem.decode(), uris=(str(SERVER),)))
    assert found.kind is FailureKind.TLS
    assert "expired" in found.transport
    application.close()


def test_whoever_asks_not_to_verify_gets_any_server(world: World, serve_tls: Callable[..., TlsApplication]) -> None:
    echoed(world, secured(serve_tls(), skip_verify=True))


def test_a_client_certificate_is_shown_where_the_rule_has_one(
    world: World, serve_tls: Callable[..., TlsApplication], certificate: ServingCertificate
) -> None:
    bundle = CA.issue(SpiffeId("cluster.local", "shop", "client"))
    application = serve_tls(clients=CA.root_pem.decode())
    mutual = secured(
        application,
        mode=TlsMode.MUTUAL,
        roots=certificate.root_pem,
        names=("reviews.example",),
        certificate=b"".join(bundle.chain_pem).decode(),
        key=bundle.key_pem.decode(),
    )
    echoed(world, mutual)
    # In TLS 1.3 a server refuses a client after the client believes that the handshake is over.
    answer = world.ask(secured(application, roots=certificate.root_pem, names=("reviews.example",))).wait()
    assert answer.failure is not None
    assert answer.failure.kind is FailureKind.TLS
    assert "refused by peer" in answer.failure.because


@pytest.mark.parametrize(
    ("protocol", "alpn"), [(UpstreamProtocol.HTTP1, "http/1.1"), (UpstreamProtocol.HTTP2, "h2"), (UpstreamProtocol.TCP, None)]
)
def test_the_protocol_is_offered_by_alpn(
    world: World,
    serve_tls: Callable[..., TlsApplication],
    certificate: ServingCertificate,
    protocol: UpstreamProtocol,
    alpn: str | None,
) -> None:
    for served in (alpn or "h2", None):  # a server that knows no ALPN is spoken to all the same
        application = serve_tls(serve_echo if protocol is not UpstreamProtocol.TCP else echo_bytes, alpn=served)
        endpoint = secured(application, roots=certificate.root_pem, sni="reviews.example")
        if protocol is UpstreamProtocol.TCP:
            echoed(world, endpoint)
        else:
            assert world.get(endpoint, protocol=protocol).status == 200
        assert application.alpn == [alpn if served else None]


def test_a_rule_that_cannot_be_used_fails_and_never_goes_in_plaintext(world: World, application: Application) -> None:
    for options in ({"broken": "secret shop/client not found"}, {"roots": "nonsense"}):
        found = failure(world, secured(application, **options), host="reviews.example")
        assert found.kind is FailureKind.TLS
    found = failure(world, replace(secured(application, broken="no such secret"), destination=None))
    assert "no such secret" in found.because
    settle(world.thread)
    assert all(end.sock.fileno() < 0 or end.read() is None for end in application.ends)


def test_a_plaintext_server_is_no_tls_server(world: World, serve: Callable[..., Application]) -> None:
    application = serve(lambda end: end.sock.recv(1 << 16) and end.sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n"))
    policy = TrafficPolicy(tls=UpstreamTls(TlsMode.SIMPLE, skip_verify=True))
    found = failure(world, endpoint_at(application.address, policy))
    assert found.kind is FailureKind.TLS


def test_the_proxy_header_comes_before_tls(world: World, certificate: ServingCertificate, serve: Callable[..., Application]) -> None:
    heads: list[bytes] = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.chain, certificate.key)

    def script(end: ServerEnd) -> None:
        head = b""
        while not head.endswith(b"\r\n"):
            head += end.sock.recv(1)
        heads.append(head)
        with context.wrap_socket(end.sock, server_side=True) as sock:
            echo_bytes(ServerEnd(sock))
            sock.unwrap()

    policy = TrafficPolicy(tls=UpstreamTls(TlsMode.SIMPLE, sni="reviews.example", roots=certificate.root_pem), proxy_protocol=1)
    echoed(world, endpoint_at(serve(script).address, policy), client=CLIENT)
    assert heads == [b"PROXY TCP4 10.0.0.7 10.96.0.1 40000 80\r\n"]


def test_a_server_that_never_shakes_hands_is_given_up(world: World, serve: Callable[..., Application]) -> None:
    stop = threading.Event()
    application = serve(lambda _end: bool(stop.wait(20)))
    policy = TrafficPolicy(tls=UpstreamTls(TlsMode.SIMPLE, skip_verify=True), pool=ConnectionPool(connect_timeout=0.3))
    assert failure(world, endpoint_at(application.address, policy)).kind is FailureKind.CONNECT_TIMEOUT
    stop.set()


def test_names_that_clients_choose_leave_no_end_of_connections(
    world: World, serve_tls: Callable[..., TlsApplication], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A certificate may be good for any name, and a client asks for another one with every request."""
    monkeypatch.setattr(pool, "MOST_NAMES", 3)
    application = serve_tls(serve_echo)
    endpoint = secured(application, skip_verify=True)
    for number in range(12):
        answer = Answer()
        request = Request(b"GET", b"http", b"%d.reviews" % number, b"/", [])
        world.call(lambda a=answer, r=request: world.pool.request(endpoint, UpstreamProtocol.HTTP1, r, True, a, a.opened))
        assert answer.wait().status == 200
        wait_until(lambda: world.call(lambda: world.pool.connections) <= 3, "older connections go")
    assert len(application.server_names) == 12
    assert world.call(lambda: sum(map(len, world.pool._named.values()))) <= 3

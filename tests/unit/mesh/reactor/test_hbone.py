import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from datetime import timedelta

import pytest
from OpenSSL import SSL

from mesh.model.identity import SpiffeId
from mesh.reactor import hbone, tls
from mesh.reactor.hbone import (
    RESPONSE_TIMEOUT,
    TUNNELS_AT_ONCE,
    HboneLink,
    OnResponse,
    Tunnel,
    TunnelFailure,
    TunnelRequest,
    connect_hbone,
)
from mesh.reactor.loop import Timer
from mesh.reactor.relay import RelayResult, TunnelRelay, relay_tunnel
from mesh.reactor.tcp import reset as reset_tcp
from mesh.testing.ca import FakeCa
from mesh.testing.proxies import EgressProxy, IngressProxy, Path, ReactorThread, open_descriptors, read_all, tcp_listener, wait_until
from mesh.tls.contexts import hbone_context
from mesh.tls.peer import verify_client, verify_server
from mesh.wire.frames import FrameType, frame_header, header_frames, rst_stream_frame, window_update_frame
from mesh.wire.hbone import HboneClient, TunnelResponded, patience

MIB = 1 << 20
ID = SpiffeId("cluster.local", "default", "client")
CA = FakeCa()
BUNDLE = CA.issue(ID)
SERVER, CLIENT = hbone_context(BUNDLE), hbone_context(BUNDLE)


@pytest.fixture
def thread() -> Iterator[ReactorThread]:
    with ReactorThread() as thread:
        yield thread


@pytest.fixture
def path() -> Iterator[Path]:
    with ReactorThread() as thread, Path(thread, (SERVER, CLIENT)) as path:
        yield path
    assert thread.errors == []


@pytest.fixture
def ingress(thread: ReactorThread) -> Iterator[IngressProxy]:
    with tcp_listener() as listener:
        ingress = thread.call(lambda: IngressProxy(thread.reactor, listener, SERVER))
        ingress.judge = judge
        yield ingress
        thread.call(ingress.close)


def judge(der: bytes) -> str | None:
    verdict = verify_client(der, "cluster.local")
    return verdict if isinstance(verdict, str) else None


def near(path: Path) -> EgressProxy:
    assert isinstance(path.near, EgressProxy)
    return path.near


def far(path: Path) -> IngressProxy:
    assert path.ingress is not None
    return path.ingress


def is_reset(egress: EgressProxy) -> bool:
    """Whether a connection to the egress is answered with RST, at once or once it stands."""
    try:
        with socket.create_connection(("127.0.0.1", egress.address.port), timeout=10) as sock:
            sock.recv(1)
    except ConnectionResetError:
        return True
    return False


class RawClient:
    """A client of an ingress that does what it likes: TLS on a blocking socket, and the bytes of a core or any others."""

    def __init__(self, ingress: IngressProxy, context: SSL.Context = CLIENT, *, receive_buffer: int | None = None) -> None:
        self.sock = socket.socket()
        if receive_buffer is not None:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.sock.settimeout(10)
        self.sock.connect((str(ingress.address.ip), ingress.address.port))
        self.sock.setblocking(True)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 10, 0))
        self.tls = SSL.Connection(context, self.sock)
        self.tls.set_verify(context.get_verify_mode(), lambda _connection, _certificate, _error, _depth, ok: bool(ok))
        self.tls.set_connect_state()
        self.core = HboneClient(now=time.monotonic)

    def __enter__(self) -> "RawClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def shake_hands(self) -> None:
        self.tls.do_handshake()

    def send_preface(self) -> None:
        self.tls.send(self.core.take_outgoing())

    def request(self, authority: str) -> int:
        stream = self.core.request_tunnel(authority, {})
        self.tls.send(self.core.take_outgoing())
        return stream

    def events(self) -> list[object]:
        return list(self.core.receive(memoryview(self.tls.recv(65536))))

    def read_to_end(self) -> bytes:
        pieces = []
        try:
            while piece := self.tls.recv(65536):
                pieces.append(piece)
        except (SSL.ZeroReturnError, SSL.SysCallError):
            pass
        return b"".join(pieces)


# --- peers that must be refused


def ending_of(ingress: IngressProxy, number: int = 1) -> str | None:
    wait_until(lambda: len(ingress.closed) >= number, "the link to be closed")
    return ingress.closed[number - 1]


def test_garbage_is_refused(ingress: IngressProxy) -> None:
    for number, garbage in enumerate((b"\0" * 100, os.urandom(300_000), b"GET / HTTP/1.1\r\n\r\n"), 1):
        with socket.create_connection(("127.0.0.1", ingress.address.port)) as sock:
            try:
                sock.sendall(garbage)
            except OSError:
                pass  # cut off while sending
            reason = ending_of(ingress, number)
            assert reason is not None
            assert reason.startswith("tls handshake error: ")


def test_a_handshake_that_stops_half_way_meets_its_deadline(ingress: IngressProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hbone, "HANDSHAKE_TIMEOUT", 0.1)
    with socket.create_connection(("127.0.0.1", ingress.address.port)) as sock:
        sock.sendall(b"\x16\x03\x01\x02\x00\x01")
        assert ending_of(ingress) == "tls handshake error: not complete within 0.1 s"


def test_a_peer_that_says_nothing_after_the_handshake_meets_the_same_deadline(
    ingress: IngressProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hbone, "HANDSHAKE_TIMEOUT", 0.2)
    with RawClient(ingress) as client:
        client.shake_hands()
        client.tls.send(b"PRI * HTTP/2.0\r\n")
        assert ending_of(ingress) == "protocol error: no HTTP/2 preface within 0.2 s"


def test_a_peer_that_leaves_within_the_handshake_is_named(ingress: IngressProxy) -> None:
    with socket.create_connection(("127.0.0.1", ingress.address.port)) as sock:
        sock.sendall(b"\x16\x03\x01")
    assert ending_of(ingress) == "tls handshake error: connection closed by peer"


def without_certificate() -> SSL.Context:
    context = SSL.Context(SSL.TLS_METHOD)
    context.set_alpn_protos([b"h2"])
    return context


@pytest.mark.parametrize(
    ("context", "reason"),
    [
        (without_certificate(), "tls handshake error: no client certificate"),
        (hbone_context(CA.issue(ID, timedelta(minutes=-1))), "tls handshake error: certificate verify failed: certificate has expired"),
        (
            hbone_context(CA.issue(ID, uris=("spiffe://foreign.example/ns/default/sa/client",))),
            "tls handshake error: client identity spiffe://foreign.example/ns/default/sa/client is not of trust domain cluster.local",
        ),
        (
            hbone_context(CA.issue(ID, uris=("https://example.com/",))),
            "tls handshake error: client certificate holds no SPIFFE identity",
        ),
    ],
)
def test_refused_certificates_have_their_reason(ingress: IngressProxy, context: SSL.Context, reason: str) -> None:
    with RawClient(ingress, context) as client:
        client.shake_hands()  # under TLS 1.3 the refusal comes after the client's side is done
        with pytest.raises(SSL.Error):
            client.tls.recv(1)
        assert ending_of(ingress) == reason


def test_our_client_learns_why_it_was_refused(thread: ReactorThread, ingress: IngressProxy) -> None:
    ingress.judge = lambda _der: "no"
    with tcp_listener() as listener:
        egress = thread.call(lambda: EgressProxy(thread.reactor, listener, CLIENT, ingress.address, "127.0.0.1:1"))
        assert is_reset(egress)
        thread.call(egress.close)
    reasons = [reason or "" for reason in egress.failures] + [failure.because for failure in egress.refused]
    assert any("refused by peer" in reason for reason in reasons), reasons


def test_our_client_refuses_a_server_of_another_identity(thread: ReactorThread, ingress: IngressProxy) -> None:
    other = frozenset({SpiffeId("cluster.local", "default", "other")})
    with tcp_listener() as listener:
        egress = thread.call(
            lambda: EgressProxy(thread.reactor, listener, CLIENT, ingress.address, "127.0.0.1:1", lambda der: verify_server(der, other))
        )
        assert is_reset(egress)
        assert egress.failures[0] is not None
        assert egress.failures[0].startswith("tls handshake error: peer did not present the expected SAN")
        thread.call(egress.close)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (struct.pack(">IBI", 0xFFFFFF << 8, 0, 1)[0:9], "protocol error"),  # a frame of 16 MiB
        (b"\0\0\x05\x04\0\0\0\0\0" + b"12345", "protocol error"),  # SETTINGS of no multiple of six bytes
        (b"\xff" * 5000, "protocol error"),
        (b"\0\0\0\x08\0\0\0\0\0", "protocol error"),  # an empty WINDOW_UPDATE
    ],
)
def test_a_peer_that_breaks_http_2_is_told_and_closed(ingress: IngressProxy, data: bytes, reason: str) -> None:
    with RawClient(ingress) as client:
        client.shake_hands()
        client.send_preface()
        client.tls.send(data)
        answer = client.read_to_end()
        ending = ending_of(ingress)
        assert ending is not None
        assert ending.startswith(reason)
        assert b"\x07\0\0\0\0\0" in answer  # GOAWAY


def test_refused_handshakes_and_broken_links_leave_no_descriptor(ingress: IngressProxy) -> None:
    no_certificate = without_certificate()

    def one(number: int) -> None:
        with RawClient(ingress, no_certificate if number % 3 == 0 else CLIENT) as client:
            if number % 3 == 2:
                client.sock.sendall(b"garbage, and more of it")
                return
            client.shake_hands()
            if number % 3 == 1:
                client.send_preface()
                client.tls.send(os.urandom(100))

    one(0)
    ending_of(ingress, 1)
    before = open_descriptors()
    for number in range(90):
        one(number)
    ending_of(ingress, 91)
    wait_until(lambda: open_descriptors() <= before, "the descriptors to be closed")
    assert ingress.links == []


# --- truncation and ends


def test_a_link_cut_without_close_notify_breaks_its_tunnels(path: Path) -> None:
    client, server = path.connect()
    with client, server:
        client.sendall(b"x")
        assert server.recv(1) == b"x"
        link = far(path).links[0]
        path.thread.call(lambda: link._sock.shutdown(socket.SHUT_WR))
        with pytest.raises(ConnectionResetError):
            client.recv(1)
        assert path.results()[0].error == "connection truncated by peer"
        with pytest.raises(ConnectionResetError):
            server.recv(1)


def test_a_client_that_closes_in_order_ends_the_link_without_an_error(path: Path) -> None:
    client, server = path.connect()
    with client, server:
        link = near(path).link
        assert link is not None
        path.thread.call(link.close_gracefully)
        assert not link.usable
        client.sendall(b"still open")  # the living tunnel goes on
        assert server.recv(100) == b"still open"
        client.shutdown(socket.SHUT_WR)
        assert server.recv(1) == b""
        server.sendall(b"last")
        server.close()
        assert read_all(client) == b"last"
    wait_until(lambda: far(path).closed == [None], "the server to see an orderly end")
    wait_until(lambda: near(path).failures == [None], "the client to end")


def test_a_draining_server_lets_tunnels_end_and_the_client_goes_elsewhere(path: Path) -> None:
    client, server = path.connect()
    with client, server:
        first = near(path).link
        assert first is not None
        path.thread.call(lambda: far(path).links[0].close_gracefully())
        wait_until(lambda: not first.usable, "the client to learn of it")
        second_client, second_server = path.connect()
        with second_client, second_server:
            assert near(path).link is not first
            client.sendall(b"first")
            assert server.recv(10) == b"first"
            second_client.sendall(b"second")
            assert second_server.recv(10) == b"second"
        client.shutdown(socket.SHUT_WR)
        server.shutdown(socket.SHUT_WR)
        assert client.recv(1) == server.recv(1) == b""
        wait_until(lambda: first.closed, "the drained link to close")
    assert near(path).failures[0] is None
    assert {result.error for result in path.results(2)} == {None}


@pytest.mark.parametrize("orderly", [True, False])
def test_a_link_tells_once_that_a_tunnel_of_its_has_ended(path: Path, orderly: bool) -> None:
    told: list[int] = []
    with ExitStack() as stack:
        ends = [path.connect() for _ in range(2)]
        for pair in ends:
            for sock in pair:
                stack.enter_context(sock)
        link = near(path).link
        assert link is not None
        link.on_room = lambda: told.append(link.active)
        for client, server in ends:
            client.shutdown(socket.SHUT_WR)
            assert server.recv(1) == b""
            assert not orderly or told == [1] * (len(ends) - link.active), "half a tunnel is one still"
            if not orderly:
                reset_tcp(server)
            server.close()
        wait_until(lambda: link.active == 0, "both tunnels to end")
    assert told == [1]


def test_draining_an_idle_link_closes_it(path: Path) -> None:
    client, server = path.connect()
    for sock in (client, server):
        sock.close()
    path.results()
    path.thread.call(lambda: far(path).links[0].close_gracefully())
    wait_until(lambda: far(path).closed == [None] and near(path).failures == [None], "both ends to close")


def test_abort_breaks_every_tunnel_with_its_reason(path: Path) -> None:
    with ExitStack() as stack:
        ends = [path.connect() for _ in range(5)]
        for pair in ends:
            for sock in pair:
                stack.enter_context(sock)
        link = near(path).link
        assert link is not None
        wait_until(lambda: len(near(path).relays) == 5, "the client's relays to begin")
        path.thread.call(lambda: link.abort("connection closed due to connection drain"))
        for pair in ends:
            for sock in pair:
                with pytest.raises(ConnectionResetError):
                    sock.recv(1)
    assert {result.error for result in path.results(5)} == {"connection closed due to connection drain"}


# --- keepalive


def test_a_frozen_peer_is_found_by_ping(ingress: IngressProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hbone, "PING_INTERVAL", 0.05)
    monkeypatch.setattr(hbone, "PING_TIMEOUT", 0.1)
    with RawClient(ingress) as client, tcp_listener() as target:
        client.shake_hands()
        client.send_preface()
        client.request(f"127.0.0.1:{target.getsockname()[1]}")
        with target.accept()[0]:
            assert ending_of(ingress) == "keepalive: no sign of life for 0.1 s after a ping"


def test_a_living_link_is_kept_by_its_pings(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hbone, "PING_INTERVAL", 0.02)
    monkeypatch.setattr(hbone, "PING_TIMEOUT", 0.04)
    client, server = path.connect()
    with client, server:
        pings: set[float | None] = set()
        link = near(path).link
        assert link is not None
        wait_until(lambda: pings.add(link._ping_sent_at) or len(pings) > 6, "some pings")
        client.sendall(b"x")
        assert server.recv(1) == b"x"
    assert far(path).closed == []


def test_an_idle_served_link_is_not_pinged(ingress: IngressProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hbone, "PING_INTERVAL", 0.02)
    with RawClient(ingress) as client:
        client.shake_hands()
        client.send_preface()
        wait_until(lambda: bool(ingress.links) and ingress.links[0]._heard, "the preface")
        link = ingress.links[0]
        pings: set[float | None] = set()
        ticks: set[Timer | None] = set()

        def look() -> bool:
            ticks.add(link._timer)
            pings.add(link._ping_sent_at)  # stays until it is answered, which nobody does
            return len(ticks) > 6

        wait_until(look, "some quiet intervals")
        assert pings == {None}


# --- requests and answers


class Asking:
    """A link to an ingress whose requests the test answers itself."""

    def __init__(self, thread: ReactorThread, ingress: IngressProxy) -> None:
        self.thread = thread
        self.requests: list[TunnelRequest] = []
        self.answers: list[Tunnel | TunnelFailure] = []
        self.closed: list[str | None] = []
        ingress._on_request = self.requests.append
        self.sock = socket.create_connection(("127.0.0.1", ingress.address.port))
        ready = threading.Event()
        self.link: HboneLink = thread.call(
            lambda: connect_hbone(
                thread.reactor,
                self.sock,
                CLIENT,
                verify_peer=lambda _der: None,
                on_ready=lambda _link: ready.set(),
                on_close=self.closed.append,
            )
        )
        assert ready.wait(10)

    def ask(self, headers: Mapping[str, str] | None = None) -> Tunnel:
        before = len(self.requests)
        tunnel = self.thread.call(lambda: self.link.open_tunnel("10.0.0.1:80", headers or {}, self.answers.append))
        wait_until(lambda: len(self.requests) > before, "the request")
        return tunnel

    def answer(self) -> Tunnel | TunnelFailure:
        wait_until(lambda: bool(self.answers), "the answer")
        return self.answers.pop(0)

    def do(self, fn: Callable[[], object]) -> None:
        self.thread.call(fn)


@pytest.fixture
def asking(thread: ReactorThread, ingress: IngressProxy) -> Iterator[Asking]:
    asking = Asking(thread, ingress)
    yield asking
    thread.call(lambda: asking.link.abort("end of test"))


def test_request_and_response_carry_headers(asking: Asking) -> None:
    asking.ask({"baggage": "k8s.namespace.name=default", "traceparent": "00-1-2-00"})
    request = asking.requests[0]
    assert request.authority == "10.0.0.1:80"
    assert dict(request.headers) == {"baggage": "k8s.namespace.name=default", "traceparent": "00-1-2-00"}
    assert request.link.peer_certificate is not None
    asking.do(lambda: request.accept({"baggage": "service.name=x"}))
    tunnel = asking.answer()
    assert isinstance(tunnel, Tunnel)
    assert dict(tunnel.headers) == {"baggage": "service.name=x"}


@pytest.mark.parametrize("status", [400, 401, 503])
def test_a_refusal_arrives_as_a_failure_with_its_status(asking: Asking, status: int) -> None:
    asking.ask()
    asking.do(lambda: asking.requests[0].refuse(status))
    failure = asking.answer()
    assert isinstance(failure, TunnelFailure)
    assert (failure.status, failure.because, failure.retryable) == (status, f"http status: {status}", False)
    assert asking.link.active == 0


def test_each_request_that_is_never_answered_times_out_by_itself(asking: Asking, monkeypatch: pytest.MonkeyPatch) -> None:
    """One timer serves them all: whoever was answered meanwhile is passed over."""
    monkeypatch.setattr(hbone, "RESPONSE_TIMEOUT", 0.2)
    for _ in range(3):
        asking.ask()
    asking.do(lambda: asking.requests[1].refuse(503))
    because = [failure.because for failure in (asking.answer(), asking.answer(), asking.answer()) if isinstance(failure, TunnelFailure)]
    assert because == ["http status: 503", *["no response to CONNECT within 0.2 s"] * 2]
    assert not asking.link._unanswered


def test_who_waits_for_room_is_told_when_the_peer_allows_more_tunnels(asking: Asking, ingress: IngressProxy) -> None:
    asking.ask()
    told: list[bool] = []
    asking.link.on_room = lambda: told.append(asking.link.usable)
    peer = ingress.links[0]

    def allow(number: int) -> None:
        peer._core.outgoing += frame_header(6, FrameType.SETTINGS, 0, 0) + struct.pack(">HI", 3, number)
        peer._schedule_pump()

    asking.do(lambda: allow(1))
    wait_until(lambda: not asking.link.usable, "the link to be full")
    assert told == []
    asking.do(lambda: allow(2))
    wait_until(lambda: bool(told), "word of the room")
    assert told == [True]


def test_whoever_asks_again_when_nobody_answered_leaves_one_timer_for_all(asking: Asking) -> None:
    link, reactor = asking.link, asking.thread.reactor

    def ask(on_response: OnResponse = lambda answer: None) -> Tunnel:
        return link.open_tunnel("10.0.0.1:80", {}, on_response)

    def ask_again(failure: Tunnel | TunnelFailure) -> None:
        ask()

    def pending() -> list[float]:
        return [due for due, _, timer in reactor._timers if timer._fn == link._give_up_unanswered]

    def run() -> None:
        oldest, other = ask(ask_again), ask()
        for tunnel, earlier in ((oldest, RESPONSE_TIMEOUT), (other, RESPONSE_TIMEOUT / 2)):
            link._unanswered[tunnel] -= earlier
        assert link._answer_timer is not None
        link._answer_timer.cancel()  # it is due
        link._give_up_unanswered()
        assert len(link._unanswered) == 2
        (due,) = pending()
        assert due - reactor.now() <= RESPONSE_TIMEOUT / 2, "for the one that has waited longest"
        link.abort("over")
        assert not pending()

    asking.do(run)


def test_a_request_never_answered_times_out_and_is_withdrawn(asking: Asking, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hbone, "RESPONSE_TIMEOUT", 0.2)
    gone: list[str] = []
    asking.ask()
    asking.requests[0].on_gone = gone.append
    failure = asking.answer()
    assert isinstance(failure, TunnelFailure)
    assert failure.because == "no response to CONNECT within 0.2 s"
    wait_until(lambda: bool(gone), "the server to learn of it")
    assert gone == ["tunnel reset by peer: CANCEL"]
    assert not asking.requests[0].alive


def test_a_request_withdrawn_before_accept_gives_a_dead_tunnel(asking: Asking) -> None:
    tunnel = asking.ask()
    asking.do(tunnel.reset)
    wait_until(lambda: not asking.requests[0].alive, "the server to learn of it")
    results: list[RelayResult] = []
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        asking.do(lambda: relay_tunnel(asking.thread.reactor, ours, asking.requests[0].accept({}), results.append, sock_is="upstream"))
        assert results == [RelayResult(0, 0, "tunnel reset by peer: CANCEL", "downstream")]
    assert asking.thread.errors == []


@pytest.mark.parametrize("ending", ["reset", "window"])
def test_a_request_withdrawn_in_the_same_read_costs_nobody_else(ingress: IngressProxy, ending: str) -> None:
    requests: list[TunnelRequest] = []
    ingress._on_request = requests.append
    with RawClient(ingress) as client:
        client.shake_hands()
        client.send_preface()
        client.request("10.0.0.1:80")
        wait_until(lambda: len(requests) == 1, "the first request")
        withdrawn = client.core.request_tunnel("10.0.0.1:81", {})
        if ending == "reset":
            client.core.reset(withdrawn)
            more = b""
        else:
            more = window_update_frame(withdrawn, 0)  # an error of this stream alone
        client.tls.send(client.core.take_outgoing() + more)
        third = client.request("10.0.0.1:82")
        wait_until(lambda: ingress.closed or requests[-1].authority == "10.0.0.1:82", "the third request")
        assert not ingress.closed
        assert [request.authority for request in requests if request.alive] == ["10.0.0.1:80", "10.0.0.1:82"]
        requests[-1].link._reactor.run_soon_threadsafe(lambda: requests[-1].refuse(503))
        while not any(isinstance(event, TunnelResponded) and event.stream == third for event in client.events()):
            pass


def test_payload_that_waits_for_an_answer_is_counted_until_its_stream_is_gone(ingress: IngressProxy) -> None:
    """Also what comes in the same read as the reset, which nobody will ever consume."""
    requests: list[TunnelRequest] = []
    ingress._on_request = requests.append
    with RawClient(ingress) as client:
        client.shake_hands()
        client.send_preface()
        stream = client.request("10.0.0.1:80")
        wait_until(lambda: len(requests) == 1, "the request")
        link = requests[0].link
        client.events()
        client.tls.send(client.core.data_header(stream, 3) + b"one")
        wait_until(lambda: link._waiting == 3, "the payload")
        client.tls.send(client.core.data_header(stream, 3) + b"two" + rst_stream_frame(stream, 8))
        wait_until(lambda: not requests[0].alive, "the reset")
        wait_until(lambda: link._waiting == 0, "nothing to wait any more")
        client.request("10.0.0.1:81")
        wait_until(lambda: len(requests) == 2, "the next request")
        assert link._waiting == 0


def test_requests_awaiting_an_answer_fail_when_the_link_goes(asking: Asking) -> None:
    gone: list[str] = []
    asking.ask()
    asking.requests[0].on_gone = gone.append
    asking.do(lambda: asking.link.abort("link lost"))
    failure = asking.answer()
    assert isinstance(failure, TunnelFailure)
    assert failure.because == "link lost"
    assert not failure.retryable, "the peer has never answered here, as if it refused our certificate"
    wait_until(lambda: bool(gone), "the server to learn of it")


def test_requests_awaiting_an_answer_of_a_peer_that_did_answer_before_may_be_made_again(asking: Asking) -> None:
    asking.ask()
    asking.do(lambda: asking.requests[0].accept({}))
    assert isinstance(asking.answer(), Tunnel)
    asking.ask()
    asking.do(lambda: asking.link.abort("link lost"))
    failure = asking.answer()
    assert isinstance(failure, TunnelFailure)
    assert failure.retryable, "nothing of the application's went with it"


def test_a_link_that_takes_no_tunnels_fails_the_request_as_retryable(asking: Asking) -> None:
    asking.do(lambda: asking.link.abort("gone"))
    asking.do(lambda: asking.link.open_tunnel("10.0.0.1:80", {}, asking.answers.append))
    failure = asking.answer()
    assert isinstance(failure, TunnelFailure)
    assert failure.retryable


def test_an_owner_that_raises_costs_its_own_tunnel_only(asking: Asking) -> None:
    asking.ask()
    asking.do(lambda: asking.requests[0].accept({}))
    assert isinstance(asking.answer(), Tunnel)

    def fail(request: TunnelRequest) -> None:
        asking.requests.append(request)
        raise RuntimeError("bug")

    asking.requests[0].link._on_request = fail
    asking.ask()
    failure = asking.answer()
    assert isinstance(failure, TunnelFailure)
    assert failure.because == "tunnel reset by peer: INTERNAL_ERROR"
    assert [str(error) for error in asking.thread.errors] == ["bug"]
    assert asking.link.active == 1


@pytest.mark.parametrize("size", [1, 100_000, 3 * MIB])
def test_data_that_comes_before_the_relay_is_not_lost(asking: Asking, size: int) -> None:
    """Also what comes before the answer: a client may send at once."""
    data = os.urandom(size)
    asking.ask()
    asking.do(lambda: asking.requests[0].accept({}))
    tunnel = asking.answer()
    assert isinstance(tunnel, Tunnel)
    ours, theirs = socket.socketpair()
    near_app, near_relay = socket.socketpair()
    results: list[RelayResult] = []
    with ours, theirs, near_app, near_relay:
        for sock in (ours, near_relay):
            sock.setblocking(False)
        asking.do(lambda: relay_tunnel(asking.thread.reactor, near_relay, tunnel, results.append))
        sender = threading.Thread(target=lambda: (near_app.sendall(data), near_app.shutdown(socket.SHUT_WR)))
        sender.start()
        waiting = asking.requests[0]._tunnel
        wait_until(lambda: len(waiting._held) == size and waiting._ended, "all of it to wait")
        asking.do(lambda: relay_tunnel(asking.thread.reactor, ours, waiting, results.append, sock_is="upstream"))
        assert read_all(theirs) == data
        theirs.shutdown(socket.SHUT_WR)
        assert near_app.recv(1) == b""
        sender.join()
        wait_until(lambda: len(results) == 2, "both relays to finish")
    assert [result.error for result in results] == [None, None]


class Speaker:
    """Says one byte, and notes that it was asked for it."""

    def __init__(self, number: int, asked: list[int | None]) -> None:
        self.readable = True
        self._number = number
        self._asked = asked

    def read_into(self, view: memoryview, most: int) -> int | None:
        assert most >= 1
        self._asked.append(self._number)
        self.readable = False
        view[:1] = b"x"
        return 1

    def read_into_many(self, views: list[memoryview]) -> int | None:
        return self.read_into(views[0], 1)

    def tunnel_data(self, chunks: Sequence[memoryview]) -> int:
        raise AssertionError("nobody answers")

    def tunnel_ended(self) -> None:
        pass

    def tunnel_reset(self, reason: str, code: int | None) -> None:
        pass


def test_a_send_takes_a_part_of_the_tunnels_that_speak_and_the_next_turns_the_rest(asking: Asking) -> None:
    count = TUNNELS_AT_ONCE + 8
    for number in range(count):
        asking.ask()
        asking.do(lambda number=number: asking.requests[number].accept({}))
    wait_until(lambda: len(asking.answers) == count, "the answers")
    asked: list[int | None] = []

    def speak() -> None:
        for number, tunnel in enumerate(asking.answers):
            assert isinstance(tunnel, Tunnel)
            tunnel.attach(Speaker(number, asked))
            tunnel.want_write()
        asking.thread.reactor.call_last(lambda: asked.append(None))  # after the send of the turn

    asking.do(speak)
    wait_until(lambda: len(asked) == count + 1, "all to be asked")
    assert asked == [*range(TUNNELS_AT_ONCE), None, *range(TUNNELS_AT_ONCE, count)]
    wait_until(lambda: all(request._tunnel._held == b"x" for request in asking.requests), "all to arrive")


def test_the_streams_of_one_link_are_limited_by_the_peer(asking: Asking) -> None:
    asking.ask()  # its SETTINGS have come with it, or will have by the answer
    asking.do(lambda: asking.requests[0].accept({}))
    asking.answer()
    for _ in range(199):
        asking.do(lambda: asking.link.open_tunnel("10.0.0.1:80", {}, asking.answers.append))
    assert not asking.link.usable
    wait_until(lambda: len(asking.requests) == 200, "200 requests")
    assert asking.link.active == 200


# --- bounds


def test_slow_readers_together_are_bounded_and_lose_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hbone, "STORED_AT_MOST", 2 * MIB)
    with ExitStack() as stack:
        ends = [path.connect() for _ in range(8)]
        sent = [0] * len(ends)

        def fill(number: int) -> None:
            client = ends[number][0]
            client.settimeout(0.5)
            try:
                while sent[number] < 40 * MIB:
                    sent[number] += client.send(b"x" * MIB)
            except TimeoutError:
                pass
            client.settimeout(10)
            client.shutdown(socket.SHUT_WR)

        threads = [threading.Thread(target=fill, args=(number,)) for number in range(len(ends))]
        for thread in threads:
            thread.start()
        for pair in ends:
            for sock in pair:
                stack.enter_context(sock)
        for thread in threads:
            thread.join()
        link = far(path).links[0]
        assert link._holding_credit
        assert link._waiting <= 2 * MIB + 16 * MIB + tls.READ_SIZE
        received = [0] * len(ends)
        for number, (_, server) in enumerate(ends):
            reader = threading.Thread(target=lambda n=number, s=server: received.__setitem__(n, len(read_all(s))))
            reader.start()
            stack.callback(reader.join)
        wait_until(lambda: received == sent, "every byte")
        assert not link._holding_credit
        assert link._waiting == 0


def test_a_peer_that_does_not_read_is_bounded_too(path: Path) -> None:
    """Our own backlog to a stopped peer: one send's worth, and the application waits."""
    client, server = path.connect()
    with client, server:
        link = near(path).link
        assert link is not None
        far_link = far(path).links[0]
        path.thread.call(lambda: path.thread.reactor.remove(far_link._fd))
        client.settimeout(0.5)
        sent = 0
        try:
            while sent < 100 * MIB:
                sent += client.send(b"x" * MIB)
        except TimeoutError:
            pass
        assert sent < 100 * MIB
        assert len(link._backlog or b"") <= tls.PLAIN_OUT_SIZE + 64 * 1024


def test_an_idle_link_holds_little_memory(path: Path) -> None:
    client, server = path.connect()
    with client, server:
        thread = threading.Thread(target=lambda: (client.sendall(b"x" * 8 * MIB), client.shutdown(socket.SHUT_WR)))
        thread.start()
        read_all(server)
        thread.join()
        link = near(path).link
        assert link is not None
        assert link._backlog is None
        relay = path.near.relays[0]
        assert isinstance(relay, TunnelRelay)
        assert relay._pending == b""


def test_the_portable_engine_carries_tunnels_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls, "BINDING", None)
    with ReactorThread() as thread, Path(thread, (SERVER, CLIENT)) as path:
        client, server = path.connect()
        data = os.urandom(MIB) * 4
        with client, server:
            sender = threading.Thread(target=lambda: (client.sendall(data), client.shutdown(socket.SHUT_WR)))
            sender.start()
            assert read_all(server) == data
            sender.join()


def test_a_dial_to_a_closed_port_is_answered_503(thread: ReactorThread, ingress: IngressProxy) -> None:
    with tcp_listener() as closed:
        port = closed.getsockname()[1]
    with tcp_listener() as listener:
        egress = thread.call(lambda: EgressProxy(thread.reactor, listener, CLIENT, ingress.address, f"127.0.0.1:{port}"))
        assert is_reset(egress)
        assert egress.refused[0].status == 503
        thread.call(egress.close)


def test_a_peer_that_asks_and_never_reads_is_cut_off(thread: ReactorThread, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hbone, "UNSENT_AT_MOST", 2000)
    monkeypatch.setattr(patience, "CAPACITY", 1e9)  # a read may bring more requests than there are streams
    with tcp_listener() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        ingress = thread.call(lambda: IngressProxy(thread.reactor, listener, SERVER))
        monkeypatch.setattr(ingress, "_on_request", lambda request: request.refuse(503))
        with RawClient(ingress, receive_buffer=4096) as client:
            client.shake_hands()
            client.send_preface()
            with pytest.raises((SSL.SysCallError, SSL.ZeroReturnError)):  # noqa: PT012  # it ends after some of these
                for stream in range(1, 200_001, 2):
                    # Requests that end at once: neither the limit of streams nor the count of resets ever sees them.
                    block = client.core._writer.request("10.0.0.1:80", {})
                    client.tls.send(header_frames(stream, block, end_stream=True, max_frame_size=16384))
        assert ending_of(ingress) == "protocol error: the peer sends and does not read"
        thread.call(ingress.close)

"""HTTP/2 through pools, with the codec that serves in production and servers on the h2 library."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.settings
import pytest

from mesh.http.h2 import Http2Client
from mesh.http.message import Headers, Request
from mesh.testing.proxies import wait_until
from tests.unit.waypoint_py.upstream.conftest import Agent, Answer, Application, ServerEnd, World, endpoint_at, in_mesh, limited
from waypoint_py.upstream.session import Endpoint, FailureKind, UpstreamProtocol, UpstreamStream

HTTP2 = UpstreamProtocol.HTTP2
OnEvent = Callable[["H2Server", h2.events.Event], None]


class H2Server:
    """One connection's end on the h2 library; ``act`` answers its events."""

    def __init__(self, end: ServerEnd, act: OnEvent, *, upgrades: bool = False, streams: int = 100) -> None:
        self.sock = end.sock
        self.act = act
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding="utf-8"))
        codes = h2.settings.SettingCodes
        values = {codes.ENABLE_CONNECT_PROTOCOL: int(upgrades), codes.MAX_CONCURRENT_STREAMS: streams}
        self.h2.local_settings = h2.settings.Settings(client=False, initial_values=values)
        self.h2.initiate_connection()
        self.paths: dict[int, str] = {}
        self.closing = False

    def run(self) -> None:
        self.flush()
        while not self.closing and (data := self.sock.recv(1 << 16)):
            for event in self.h2.receive_data(data):
                self.act(self, event)
            self.flush()

    def flush(self) -> None:
        if data := self.h2.data_to_send():
            self.sock.sendall(data)

    def answer(self, stream: int, body: bytes = b"", status: int = 200, *, trailers: list[tuple[str, str]] | None = None) -> None:
        self.h2.send_headers(stream, [(":status", str(status))], end_stream=not body and trailers is None)
        if body:
            self.h2.send_data(stream, body, end_stream=trailers is None)
        if trailers is not None:
            self.h2.send_headers(stream, trailers, end_stream=True)


def echo(server: H2Server, event: h2.events.Event) -> None:
    """The path, when the request is complete."""
    if isinstance(event, h2.events.RequestReceived):
        server.paths[event.stream_id] = dict(event.headers)[":path"]
    elif isinstance(event, h2.events.DataReceived):
        server.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
    elif isinstance(event, h2.events.StreamEnded):
        server.answer(event.stream_id, server.paths[event.stream_id].encode())


@pytest.fixture
def http(world: World) -> World:
    world.pool.make_codec = lambda _protocol: Http2Client(now=world.thread.reactor.now)
    return world


@pytest.fixture(params=["plain", "mesh"])
def reach(request: pytest.FixtureRequest, agent: Agent) -> Callable[[Application], Endpoint]:
    def endpoint(application: Application) -> Endpoint:
        found = endpoint_at(application.address)
        return in_mesh(found) if request.param == "mesh" else found

    return endpoint


class Whole(Answer):
    def __init__(self) -> None:
        super().__init__()
        self.trailers: Headers = []

    def complete(self, trailers: Headers) -> None:
        self.trailers = trailers
        super().complete(trailers)


def send(
    world: World, endpoint: Endpoint, request: Request, *, ended: bool = True, on_open: Callable[[UpstreamStream], None] | None = None
) -> Whole:
    answer = Whole()
    if on_open is not None:
        answer.on_open = on_open
    world.call(lambda: world.pool.request(endpoint, HTTP2, request, ended, answer, answer.opened))
    return answer


def get(path: bytes = b"/", method: bytes = b"GET", **options: object) -> Request:
    return Request(method, b"http", b"reviews.shop", path, [(b"x-test", b"1")], **options)


def h2_application(serve: Callable[..., Application], act: OnEvent, **options: object) -> Application:
    return serve(lambda end: H2Server(end, act, **options).run())


def test_many_requests_share_a_connection(http: World, serve: Callable[..., Application], reach: Callable[[Application], Endpoint]) -> None:
    application = h2_application(serve, echo)
    endpoint = reach(application)
    for _ in range(3):
        answers = [send(http, endpoint, get(b"/%d" % number)) for number in range(60)]
        assert [bytes(answer.wait().body) for answer in answers] == [b"/%d" % number for number in range(60)]
    assert application.connections == 1


def test_more_than_the_server_takes_at_once_waits_or_goes_elsewhere(http: World, serve: Callable[..., Application]) -> None:
    application = h2_application(serve, echo, streams=5)
    endpoint = endpoint_at(application.address, limited(max_connections=1))
    send(http, endpoint, get()).wait()  # its SETTINGS are known now
    answers = [send(http, endpoint, get(b"/%d" % number)) for number in range(40)]
    assert [bytes(answer.wait().body) for answer in answers] == [b"/%d" % number for number in range(40)]
    assert application.connections == 1


def test_trailers_come_with_the_end(http: World, serve: Callable[..., Application], reach: Callable[[Application], Endpoint]) -> None:
    def act(server: H2Server, event: h2.events.Event) -> None:
        if isinstance(event, h2.events.StreamEnded):
            server.answer(event.stream_id, b"hello", trailers=[("grpc-status", "0")])

    request = Request(b"POST", b"http", b"reviews.shop", b"/a.B/C", [(b"content-type", b"application/grpc"), (b"te", b"trailers")])

    def on_open(stream: UpstreamStream) -> None:
        stream.send_data(b"message")
        stream.send_end()

    answer = send(http, reach(h2_application(serve, act)), request, ended=False, on_open=on_open).wait()
    assert (answer.body, answer.trailers) == (b"hello", [(b"grpc-status", b"0")])


@pytest.mark.parametrize("size", [1, 65_535, 3_000_000])
def test_a_request_body_keeps_to_the_servers_windows(
    http: World, serve: Callable[..., Application], reach: Callable[[Application], Endpoint], size: int
) -> None:
    received = 0

    def act(server: H2Server, event: h2.events.Event) -> None:
        nonlocal received
        if isinstance(event, h2.events.DataReceived):
            received += len(event.data)
            server.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, h2.events.StreamEnded):
            server.answer(event.stream_id, str(received).encode())

    left, answer = size, Whole()

    def pump() -> None:
        nonlocal left
        stream = answer.stream
        assert stream is not None
        while left and (room := stream.room()):
            stream.send_data(b"x" * min(room, left))
            left -= min(room, left)
        if not left:
            stream.send_end()

    answer.on_open = lambda _stream: pump()
    answer.on_writable = pump
    endpoint = reach(h2_application(serve, act))
    http.call(lambda: http.pool.request(endpoint, HTTP2, get(method=b"POST"), False, answer, answer.opened))
    assert answer.wait().body == str(size).encode()


def test_a_slow_reader_holds_up_its_own_stream_alone(
    http: World, serve: Callable[..., Application], reach: Callable[[Application], Endpoint]
) -> None:
    size = 2_000_000
    left: dict[int, int] = {}

    def push(server: H2Server) -> None:
        for stream in list(left):
            while left[stream] and (room := server.h2.local_flow_control_window(stream)):
                piece = min(room, left[stream], server.h2.max_outbound_frame_size)
                left[stream] -= piece
                server.h2.send_data(stream, b"x" * piece, end_stream=not left[stream])
            if not left[stream]:
                del left[stream]

    def act(server: H2Server, event: h2.events.Event) -> None:
        if isinstance(event, h2.events.StreamEnded):
            server.h2.send_headers(event.stream_id, [(":status", "200")])
            left[event.stream_id] = size
            push(server)
        elif isinstance(event, h2.events.WindowUpdated):
            push(server)

    endpoint = reach(h2_application(serve, act))
    slow = Whole()
    slow.credit = False
    http.call(lambda: http.pool.request(endpoint, HTTP2, get(), True, slow, slow.opened))
    wait_until(lambda: len(slow.body) > 0, "a beginning")
    for _ in range(3):
        assert len(send(http, endpoint, get()).wait().body) == size
    assert len(slow.body) < 1_000_000
    stream = slow.stream
    assert stream is not None
    slow.credit = True
    http.call(lambda: stream.consumed(len(slow.body)))
    assert len(slow.wait().body) == size


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (h2.errors.ErrorCodes.CANCEL, FailureKind.RESET),
        (h2.errors.ErrorCodes.INTERNAL_ERROR, FailureKind.RESET),
        (h2.errors.ErrorCodes.REFUSED_STREAM, FailureKind.REFUSED_STREAM),
    ],
)
def test_a_reset_stream_fails_as_what_it_is(
    http: World, serve: Callable[..., Application], code: h2.errors.ErrorCodes, kind: FailureKind
) -> None:
    resets = 0

    def act(server: H2Server, event: h2.events.Event) -> None:
        nonlocal resets
        if isinstance(event, h2.events.RequestReceived):
            resets += 1
            server.h2.reset_stream(event.stream_id, code)

    application = h2_application(serve, act)
    answer = send(http, endpoint_at(application.address), get()).wait()
    assert answer.failure is not None
    assert answer.failure.kind is kind
    assert resets == (2 if kind is FailureKind.REFUSED_STREAM else 1)
    assert application.connections == 1


def test_a_server_that_goes_away_serves_what_it_took_and_nothing_is_lost(
    http: World, serve: Callable[..., Application], reach: Callable[[Application], Endpoint]
) -> None:
    def act(server: H2Server, event: h2.events.Event) -> None:
        if isinstance(event, h2.events.RequestReceived) and event.stream_id == 5:
            server.h2.close_connection(last_stream_id=3)
            frames = server.h2.data_to_send()
            server.sock.sendall(frames)
            time.sleep(0.05)
            server.closing = True
        elif isinstance(event, h2.events.StreamEnded) and event.stream_id < 5:
            server.answer(event.stream_id, b"here")

    def run(end: ServerEnd) -> None:
        nonlocal first
        server = H2Server(end, act if first else echo)
        first = False
        server.run()

    first = True
    application = serve(run)
    endpoint = reach(application)
    assert send(http, endpoint, get(b"/a")).wait().body == b"here"
    answers = [send(http, endpoint, get(path)) for path in (b"/b", b"/c", b"/d")]
    assert [bytes(answer.wait().body) for answer in answers] == [b"here", b"/c", b"/d"]
    assert application.connections == 2


def test_a_server_that_speaks_http1_breaks_the_protocol(http: World, serve: Callable[..., Application]) -> None:
    def run(end: ServerEnd) -> None:
        end.sock.recv(1 << 16)
        end.sock.sendall(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")
        end.sock.recv(1)

    answer = send(http, endpoint_at(serve(run).address), get()).wait()
    assert answer.failure is not None
    assert answer.failure.kind is FailureKind.PROTOCOL


def test_a_peer_that_breaks_the_protocol_is_told_so(http: World, serve: Callable[..., Application]) -> None:
    said = bytearray()

    def run(end: ServerEnd) -> None:
        end.sock.recv(1 << 16)
        end.sock.sendall(bytes.fromhex("000004040000000000") + b"\0\0\0\1" + bytes.fromhex("000001000000000001") + b"x")
        while piece := end.sock.recv(1 << 16):
            said.extend(piece)

    answer = send(http, endpoint_at(serve(run).address), get()).wait()
    assert answer.failure is not None
    assert answer.failure.kind is FailureKind.PROTOCOL
    wait_until(lambda: b"\x07\x00\x00\x00\x00\x00" in bytes(said), "a GOAWAY")


def test_a_websocket_goes_as_extended_connect(
    http: World, serve: Callable[..., Application], reach: Callable[[Application], Endpoint]
) -> None:
    heads: list[dict[str, str]] = []

    def act(server: H2Server, event: h2.events.Event) -> None:
        if isinstance(event, h2.events.RequestReceived):
            heads.append(dict(event.headers))
            server.h2.send_headers(event.stream_id, [(":status", "200")])
        elif isinstance(event, h2.events.DataReceived):
            server.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            server.h2.send_data(event.stream_id, event.data.upper())
        elif isinstance(event, h2.events.StreamEnded):
            server.h2.end_stream(event.stream_id)

    application = h2_application(serve, act, upgrades=True)
    endpoint = reach(application)
    for _ in range(2):
        answer = send(http, endpoint, get(b"/chat", upgrade=b"websocket"), ended=False)
        wait_until(lambda answer=answer: answer.status == 101, "the upgrade")
        stream = answer.stream
        assert stream is not None
        http.call(lambda stream=stream: stream.send_data(b"hello"))
        wait_until(lambda answer=answer: answer.body == b"HELLO", "an echo")
        http.call(stream.send_end)
        assert answer.wait().calls[-1] == "complete"
    assert heads[0][":method"] == "CONNECT"
    assert heads[0][":protocol"] == "websocket"
    assert application.connections == 1


def test_a_server_without_extended_connect_fails_a_websocket(http: World, serve: Callable[..., Application]) -> None:
    application = h2_application(serve, echo)
    endpoint = endpoint_at(application.address)
    answer = send(http, endpoint, get(upgrade=b"websocket"), ended=False).wait()
    assert answer.failure is not None
    assert answer.failure.kind is FailureKind.PROTOCOL
    assert "takes no upgrades" in answer.failure.because
    assert send(http, endpoint, get(b"/still")).wait().body == b"/still"
    assert application.connections == 1


def test_pings_keep_a_connection_and_find_a_dead_one(http: World, serve: Callable[..., Application]) -> None:
    silent = threading.Event()
    pings = 0

    def act(server: H2Server, event: h2.events.Event) -> None:
        nonlocal pings
        if isinstance(event, h2.events.PingReceived):
            pings += 1
            if pings > 3:
                server.h2.data_to_send()  # swallowed
                silent.set()
        else:
            echo(server, event)

    endpoint = endpoint_at(h2_application(serve, act).address, limited(h2_keepalive_interval=0.05, h2_keepalive_timeout=0.2))
    assert send(http, endpoint, get(b"/x")).wait().body == b"/x"
    assert silent.wait(10)
    wait_until(lambda: http.call(lambda: http.pool.connections) == 0, "the dead connection to be given up")
    assert pings == 4


def test_an_answer_before_the_body_was_sent_keeps_the_connection(http: World, serve: Callable[..., Application]) -> None:
    def act(server: H2Server, event: h2.events.Event) -> None:
        if isinstance(event, h2.events.RequestReceived):
            server.answer(event.stream_id, b"no!", 413)

    application = h2_application(serve, act)
    endpoint = endpoint_at(application.address)
    for _ in range(3):
        answer = send(http, endpoint, get(method=b"POST"), ended=False).wait()
        assert (answer.status, answer.body, answer.calls[-1]) == (413, b"no!", "complete")
    assert application.connections == 1


@pytest.mark.parametrize("how", ["end", "reset"])
@pytest.mark.parametrize("when", ["before the head", "after the head"])
def test_a_connection_that_breaks_fails_every_stream(
    http: World, serve: Callable[..., Application], reach: Callable[[Application], Endpoint], how: str, when: str
) -> None:
    seen = 0

    def act(server: H2Server, event: h2.events.Event) -> None:
        nonlocal seen
        if not isinstance(event, h2.events.RequestReceived):
            return
        seen += 1
        if when == "after the head":
            server.h2.send_headers(event.stream_id, [(":status", "200")])
        if seen == 5:
            server.flush()
            time.sleep(0.05)
            if how == "reset":
                server.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            server.closing = True

    endpoint = reach(h2_application(serve, act))
    answers = [send(http, endpoint, get()) for _ in range(5)]
    for answer in answers:
        assert answer.wait().failure is not None
        assert answer.failure is not None
        assert answer.failure.kind is FailureKind.TERMINATED
        assert ("response" in answer.calls) == (when == "after the head")

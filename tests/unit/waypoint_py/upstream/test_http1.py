"""HTTP/1.1 through pools, with the codec that serves in production and servers that write what they like."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from mesh.http.h1 import Http1Client
from mesh.http.message import Headers, Request, Response
from mesh.testing.proxies import wait_until
from tests.unit.waypoint_py.upstream.conftest import Agent, Answer, Application, ServerEnd, World, endpoint_at, in_mesh, settle
from waypoint_py.upstream.session import Endpoint, FailureKind, UpstreamProtocol, UpstreamStream


@pytest.fixture
def http(world: World) -> World:
    world.pool.make_codec = lambda _protocol: Http1Client()
    return world


@pytest.fixture(params=["plain", "mesh"])
def reach(request: pytest.FixtureRequest, agent: Agent) -> Callable[[Application], Endpoint]:
    """An application as an endpoint, outside the mesh or in it."""

    def endpoint(application: Application) -> Endpoint:
        found = endpoint_at(application.address)
        return in_mesh(found) if request.param == "mesh" else found

    return endpoint


class Whole(Answer):
    """With headers and trailers."""

    def __init__(self) -> None:
        super().__init__()
        self.response_head: Response | None = None
        self.trailers: Headers = []

    def response(self, response: Response, ended: bool) -> None:
        self.response_head = response
        super().response(response, ended)

    def complete(self, trailers: Headers) -> None:
        self.trailers = trailers
        super().complete(trailers)


def send(
    world: World, endpoint: Endpoint, request: Request, *, ended: bool = True, on_open: Callable[[UpstreamStream], None] | None = None
) -> Whole:
    answer = Whole()
    if on_open is not None:
        answer.on_open = on_open
    world.call(lambda: world.pool.request(endpoint, UpstreamProtocol.HTTP1, request, ended, answer, answer.opened))
    return answer


def get(path: bytes = b"/", method: bytes = b"GET", **options: object) -> Request:
    return Request(method, b"http", b"reviews.shop", path, [(b"x-test", b"1")], **options)


def read_head(end: ServerEnd) -> bytes:
    """A request's head; empty at the end."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        piece = end.sock.recv(1)
        if not piece:
            return b""
        head += piece
    return head


def script(*answers: bytes, close: bool = False) -> Callable[[ServerEnd], None]:
    """One answer for each request without a body."""

    def serve(end: ServerEnd) -> None:
        for answer in answers:
            if not read_head(end):
                return
            end.sock.sendall(answer)
        if not close:
            end.sock.recv(1)

    return serve


OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


@pytest.mark.parametrize(
    ("answer", "body", "again"),
    [
        (OK, b"ok", True),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\no\r\n1;x=y\r\nk\r\n0\r\n\r\n", b"ok", True),
        (b"HTTP/1.1 204 No Content\r\n\r\n", b"", True),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", b"", True),
        (b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n" + OK, b"ok", True),
        (b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok", b"ok", False),
        (b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok", b"ok", False),
        (OK + b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nfake", b"ok", False),
        (OK + b"\r\n", b"ok", False),
    ],
)
def test_only_a_connection_whose_last_answer_ended_cleanly_is_used_again(
    http: World, serve: Callable[..., Application], reach: Callable[[Application], Endpoint], answer: bytes, body: bytes, again: bool
) -> None:
    application = serve(script(*[answer] * 3))
    endpoint = reach(application)
    for _ in range(2):
        answered = send(http, endpoint, get()).wait()
        assert (answered.status // 100, bytes(answered.body)) == (2, body), answered.failure
        settle(http.thread)
        time.sleep(0.02)
    assert application.connections == (1 if again else 2)


def test_what_is_asked_is_what_the_server_reads(http: World, serve: Callable[..., Application]) -> None:
    heads: list[bytes] = []

    def serve_one(end: ServerEnd) -> None:
        heads.append(read_head(end))
        assert end.sock.recv(5, socket.MSG_WAITALL) == b"hello"
        end.sock.sendall(OK)
        end.sock.recv(1)

    endpoint = endpoint_at(serve(serve_one).address)

    def on_open(stream: UpstreamStream) -> None:
        stream.send_data(b"he")
        stream.send_data(b"llo")
        stream.send_end()

    answer = send(http, endpoint, get(b"/a?b=c", b"POST", content_length=5), ended=False, on_open=on_open)
    assert answer.wait().status == 200
    assert heads == [b"POST /a?b=c HTTP/1.1\r\nhost: reviews.shop\r\nx-test: 1\r\ncontent-length: 5\r\n\r\n"]


def test_a_head_has_no_body_whatever_its_length_says(http: World, serve: Callable[..., Application]) -> None:
    application = serve(script(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n", OK))
    endpoint = endpoint_at(application.address)
    assert send(http, endpoint, get(method=b"HEAD")).wait().calls[-1] == "response, ended"
    assert send(http, endpoint, get()).wait().body == b"ok"
    assert application.connections == 1


def test_a_body_that_ends_with_the_connection_is_whole(
    http: World, serve: Callable[..., Application], reach: Callable[[Application], Endpoint]
) -> None:
    body = b"x" * 300_000
    application = serve(script(b"HTTP/1.1 200 OK\r\n\r\n" + body, close=True))
    endpoint = reach(application)
    for _ in range(2):
        answer = send(http, endpoint, get()).wait()
        assert (answer.calls[-1], len(answer.body)) == ("complete", len(body))
    assert application.connections == 2


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\nshort", FailureKind.TERMINATED),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nshort", FailureKind.TERMINATED),
        (b"HTTP/1.1 200 OK\r\ncontent-le", FailureKind.TERMINATED),
        (b"", FailureKind.TERMINATED),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", FailureKind.PROTOCOL),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello", FailureKind.PROTOCOL),
        (b"SSH-2.0-OpenSSH\r\n\r\n", FailureKind.PROTOCOL),
        (b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n", FailureKind.PROTOCOL),
    ],
)
def test_an_answer_that_is_none_or_breaks_off_fails_the_request(
    http: World, serve: Callable[..., Application], reach: Callable[[Application], Endpoint], answer: bytes, kind: FailureKind
) -> None:
    application = serve(script(answer, close=True))
    found = send(http, reach(application), get()).wait()
    assert found.failure is not None
    assert found.failure.kind is kind, found.failure
    assert found.calls.count("failed") == 1
    wait_until(lambda: http.call(lambda: http.pool.connections) == 0, "the connection to be given up")


def test_100_continue_is_passed_on_before_the_body(http: World, serve: Callable[..., Application]) -> None:
    def serve_one(end: ServerEnd) -> None:
        assert b"expect: 100-continue" in read_head(end)
        end.sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        assert end.sock.recv(5, socket.MSG_WAITALL) == b"hello"
        end.sock.sendall(OK)
        end.sock.recv(1)

    endpoint = endpoint_at(serve(serve_one).address)
    answer = send(http, endpoint, get(method=b"POST", content_length=5, expect_continue=True), ended=False)
    wait_until(lambda: "informational 100" in answer.calls, "100 Continue")
    stream = answer.stream
    assert stream is not None
    http.call(lambda: (stream.send_data(b"hello"), stream.send_end()))
    assert answer.wait().calls == ["open", "informational 100", "response", "complete"]


def test_trailers_of_a_grpc_answer_go_on(http: World, serve: Callable[..., Application]) -> None:
    answer = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\ngrpc-status: 0\r\n\r\n"
    request = get()
    request.append(b"te", b"trailers")
    assert send(http, endpoint_at(serve(script(answer)).address), request).wait().trailers == [(b"grpc-status", b"0")]


@pytest.mark.parametrize(("declared", "sent"), [(10, b"short"), (3, b"too long")])
def test_a_body_of_another_length_than_was_said_fails_the_request(
    http: World, serve: Callable[..., Application], declared: int, sent: bytes
) -> None:
    seen: list[bytes] = []

    def serve_one(end: ServerEnd) -> None:
        read_head(end)
        while piece := end.sock.recv(100):
            seen.append(piece)

    def on_open(stream: UpstreamStream) -> None:
        stream.send_data(sent)
        stream.send_end()

    endpoint = endpoint_at(serve(serve_one).address)
    answer = send(http, endpoint, get(method=b"POST", content_length=declared), ended=False, on_open=on_open).wait()
    assert answer.failure is not None
    assert answer.failure.kind is FailureKind.PROTOCOL
    assert "than it was said to be" in answer.failure.because
    assert b"".join(seen) in (b"", b"short")


def test_a_request_that_http1_cannot_carry_costs_no_connection(http: World, serve: Callable[..., Application]) -> None:
    application = serve(script(OK, OK))
    endpoint = endpoint_at(application.address)
    send(http, endpoint, get()).wait()
    bad = get()
    bad.append(b"x-bad", b"a\r\nx-injected: 1")
    answer = send(http, endpoint, bad).wait()
    assert answer.calls == ["failed"]
    assert answer.failure is not None
    assert answer.failure.kind is FailureKind.PROTOCOL
    assert send(http, endpoint, get()).wait().status == 200
    assert application.connections == 1


# --- upgrades


def upgrading(end: ServerEnd) -> None:
    """Takes an upgrade, says hello at once, then echoes until the end."""
    head = read_head(end)
    assert b"upgrade: websocket\r\nconnection: upgrade\r\n" in head
    end.sock.sendall(b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\nhello ")
    while piece := end.sock.recv(1 << 16):
        end.sock.sendall(piece)


def upgrade_request() -> Request:
    return get(upgrade=b"websocket")


def test_an_upgraded_request_carries_bytes_both_ways(
    http: World, serve: Callable[..., Application], reach: Callable[[Application], Endpoint]
) -> None:
    answer = send(http, reach(serve(upgrading)), upgrade_request(), ended=False)
    wait_until(lambda: answer.body == b"hello ", "the server's first words")
    assert answer.status == 101
    stream = answer.stream
    assert stream is not None
    for word in (b"to ", b"and ", b"fro"):
        assert http.thread.call(stream.room) > 0
        http.call(lambda word=word: stream.send_data(word))
        wait_until(lambda word=word: answer.body.endswith(word), "an echo")
    assert answer.body == b"hello to and fro"
    http.call(stream.send_end)
    assert answer.wait().calls == ["open", "response", "complete"]


def test_a_server_that_ends_an_upgraded_stream_completes_it_and_hears_the_rest(http: World, serve: Callable[..., Application]) -> None:
    rest: list[bytes] = []

    def serve_one(end: ServerEnd) -> None:
        read_head(end)
        end.sock.sendall(b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\nbye")
        assert end.sock.recv(1) == b"x"
        end.sock.shutdown(socket.SHUT_WR)
        while piece := end.sock.recv(1 << 16):
            rest.append(piece)

    answer = send(http, endpoint_at(serve(serve_one).address), upgrade_request(), ended=False)
    wait_until(lambda: answer.body == b"bye", "the server's words")
    stream = answer.stream
    assert stream is not None
    http.call(lambda: stream.send_data(b"x" + b"y" * 100_000))
    assert answer.wait().calls[-1] == "complete"
    wait_until(lambda: len(b"".join(rest)) == 100_000, "what was still to be said")


def test_an_offer_to_upgrade_that_is_not_taken_leaves_an_ordinary_answer(
    http: World, serve: Callable[..., Application], reach: Callable[[Application], Endpoint]
) -> None:
    application = serve(script(OK, b"HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\n\r\n", OK))
    endpoint = reach(application)
    answer = send(http, endpoint, upgrade_request(), ended=False).wait()
    assert (answer.status, answer.body) == (200, b"ok")
    assert send(http, endpoint, upgrade_request(), ended=False).wait().status == 403
    assert send(http, endpoint, get()).wait().status == 200
    assert application.connections == 1


# --- one turn's surprises


def test_an_answer_before_the_body_was_sent_ends_the_connection_not_the_answer(http: World, serve: Callable[..., Application]) -> None:
    stuck = threading.Event()

    def serve_one(end: ServerEnd) -> None:
        if b"POST" in read_head(end):
            end.sock.sendall(b"HTTP/1.1 413 Payload Too Large\r\ncontent-length: 3\r\n\r\nno!")
            stuck.wait(20)
        else:
            end.sock.sendall(OK)
            end.sock.recv(1)

    application = serve(serve_one)
    endpoint = endpoint_at(application.address)

    def on_open(stream: UpstreamStream) -> None:
        while stream.room():
            stream.send_data(b"x" * 60_000)

    answer = send(http, endpoint, get(method=b"POST"), ended=False, on_open=on_open).wait()
    assert (answer.status, answer.body, answer.calls[-1]) == (413, b"no!", "complete")
    wait_until(lambda: http.call(lambda: http.pool.connections) == 0, "the connection to be cut")
    assert send(http, endpoint, get()).wait().status == 200
    stuck.set()


def test_a_timeout_of_the_server_that_meets_the_next_request_does_not_answer_it(
    http: World, serve: Callable[..., Application], reach: Callable[[Application], Endpoint]
) -> None:
    """A server says 408 to a connection that it finds idle, and closes: another request's answer it must not become."""

    def serve_one(end: ServerEnd) -> None:
        read_head(end)
        end.sock.sendall(OK)
        time.sleep(0.05)
        end.sock.sendall(b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")

    application = serve(serve_one)
    endpoint = reach(application)
    for _ in range(3):
        answer = send(http, endpoint, get()).wait()
        assert answer.status == 200, answer.failure
        wait_until(lambda: http.call(lambda: http.pool.connections) == 0, "the connection to be gone")
    assert application.connections == 3


def large(end: ServerEnd) -> None:
    read_head(end)
    end.sock.sendall(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
    for _ in range(300):
        end.sock.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")
    end.sock.sendall(b"0\r\n\r\n")
    end.sock.recv(1)


def test_a_slow_reader_of_a_large_answer_gets_all_of_it(
    http: World, serve: Callable[..., Application], reach: Callable[[Application], Endpoint]
) -> None:
    waiting = 0

    class Slow(Whole):
        def data(self, data: bytes | memoryview) -> None:
            nonlocal waiting
            waiting += len(data)
            assert waiting < 1_500_000, "held back"
            super().data(data)

            def later(size: int = len(data)) -> None:
                nonlocal waiting
                waiting -= size
                if self.stream is not None:
                    self.stream.consumed(size)

            http.thread.reactor.call_later(0.001, later)

    slow = Slow()
    slow.credit = False
    endpoint = reach(serve(large))
    http.call(lambda: http.pool.request(endpoint, UpstreamProtocol.HTTP1, get(), True, slow, slow.opened))
    wait_until(lambda: slow.over, "the end of the answer", 30)
    assert len(slow.body) == 300 * 65536
    assert slow.calls[-1] == "complete"


def test_requests_to_one_endpoint_by_tunnel_and_plainly_do_not_meet(http: World, serve: Callable[..., Application], agent: Agent) -> None:
    application = serve(script(OK, OK))
    plain = endpoint_at(application.address)
    for endpoint in (plain, in_mesh(plain), plain, in_mesh(plain)):
        assert send(http, replace(endpoint), get()).wait().status == 200
    assert application.connections == 2
    assert len(agent.authorities) == 1

"""Who shares a connection, who waits for one, and who is one too many."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from mesh.http.h2 import Http2Client
from mesh.http.message import Request
from mesh.model.l7.destination import ConnectionPool, TlsMode, TrafficPolicy, UpstreamTls
from mesh.model.l7.routing import Destination
from mesh.testing.proxies import open_descriptors, wait_until
from tests.unit.waypoint_py.streams.conftest import Collector, tls_that_stands
from tests.unit.waypoint_py.upstream.conftest import (
    Agent,
    Answer,
    Application,
    FrameCodec,
    ServerEnd,
    World,
    endpoint_at,
    in_mesh,
    limited,
    serve_echo,
    settle,
)
from waypoint_py.stream import ByteStream
from waypoint_py.streams.tunnel import TunnelStream
from waypoint_py.upstream import pool
from waypoint_py.upstream.client import Call, HttpSession
from waypoint_py.upstream.session import FailureKind, UpstreamFailure, UpstreamProtocol

HTTP2 = UpstreamProtocol.HTTP2


def close_with_reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


class Gate:
    """Holds a script's answers back."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self.requests = 0

    def open(self) -> None:
        self._open.set()

    def script(self, end: ServerEnd) -> None:
        while (request := end.read_request()) is not None:
            self.requests += 1
            if not self._open.wait(20):
                return  # a test that is over already never wanted the answer
            end.answer(request[0], request[1])


# --- sharing


def test_requests_one_after_the_other_share_a_connection(world: World, application: Application) -> None:
    endpoint = endpoint_at(application.address)
    for number in range(20):
        assert world.get(endpoint, f"/{number}").body == f"/{number}".encode()
    assert application.connections == 1


def test_http1_requests_at_once_have_a_connection_each_and_leave_them_for_later(world: World, serve: Callable[..., Application]) -> None:
    gate = Gate()
    application = serve(gate.script)
    endpoint = endpoint_at(application.address)
    answers = [world.ask(endpoint, f"/{number}") for number in range(5)]
    wait_until(lambda: gate.requests == 5, "five requests at once")
    gate.open()
    assert [answer.wait().body for answer in answers] == [f"/{number}".encode() for number in range(5)]
    for _ in range(5):
        world.get(endpoint)
    assert application.connections == 5


def test_http2_requests_at_once_share_one_connection(world: World, application: Application) -> None:
    endpoint = endpoint_at(application.address)
    answers = [world.ask(endpoint, f"/{number}", protocol=HTTP2) for number in range(50)]
    assert [answer.wait().body for answer in answers] == [f"/{number}".encode() for number in range(50)]
    assert application.connections == 1


def test_streams_beyond_what_a_connection_takes_get_another(world: World, serve: Callable[..., Application]) -> None:
    gate = Gate()

    def script(end: ServerEnd) -> None:
        streams = []
        while (request := end.read_request()) is not None:
            streams.append(request[0])
            gate.requests += 1
            if gate.requests >= 7:
                gate.open()
            if len(streams) == 3 or gate._open.is_set():
                gate._open.wait(20)
                for stream in streams:
                    end.answer(stream)
                streams.clear()

    application = serve(script)
    endpoint = endpoint_at(application.address, limited(max_concurrent_streams=3))
    answers = [world.ask(endpoint, protocol=HTTP2) for _ in range(6)]
    wait_until(lambda: gate.requests == 6, "two connections are full")
    answers.append(world.ask(endpoint, protocol=HTTP2))
    assert {answer.wait().status for answer in answers} == {200}
    assert application.connections == 3


@pytest.mark.parametrize("other", ["destination", "protocol", "tls"])
def test_requests_that_differ_share_no_connection(world: World, application: Application, other: str) -> None:
    endpoint = endpoint_at(application.address)
    world.get(endpoint)
    if other == "destination":
        world.get(replace(endpoint, destination=Destination("shop", "reviews.shop.svc.cluster.local", 80, "v2")))
        assert application.connections == 2
    elif other == "protocol":
        world.get(endpoint, protocol=HTTP2)
        assert application.connections == 2
    else:
        secure = replace(endpoint, policy=TrafficPolicy(tls=UpstreamTls(TlsMode.SIMPLE)))
        world.ask(secure)
        wait_until(lambda: application.connections == 2, "a second connection")


def test_an_equal_endpoint_that_is_another_object_shares_the_connection(world: World, application: Application) -> None:
    for _ in range(5):
        world.get(endpoint_at(application.address))
    assert application.connections == 1


def test_what_is_remembered_of_endpoints_is_bounded(world: World, application: Application, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "REMEMBERED", 4)
    for _ in range(50):
        world.get(endpoint_at(application.address))
    (shelf,) = world.pool._shelves.values()
    assert len(world.pool._recent) <= 4
    assert len(shelf.remembered_as) <= 4


def test_a_connection_serves_as_many_requests_as_it_may(world: World, application: Application) -> None:
    endpoint = endpoint_at(application.address, limited(max_requests_per_connection=3))
    for _ in range(7):
        assert world.get(endpoint).status == 200
    assert application.connections == 3
    single = endpoint_at(application.address, limited(max_requests_per_connection=1))
    for _ in range(2):
        world.get(single)
    assert application.connections == 5, "the bound was lowered below what the third has served"
    wait_until(lambda: world.call(lambda: world.pool.connections) == 1, "connections that are used up to close")


def test_a_connection_that_nobody_used_for_a_while_goes(world: World, serve: Callable[..., Application]) -> None:
    ended: list[float] = []

    def script(end: ServerEnd) -> None:
        serve_echo(end)
        ended.append(time.monotonic())

    application = serve(script)
    endpoint = endpoint_at(application.address, limited(http_idle_timeout=0.15))
    for _ in range(4):
        world.get(endpoint)
        time.sleep(0.07)  # used again in time
    last = time.monotonic()
    wait_until(lambda: bool(ended), "the end of the idle connection")
    assert application.connections == 1
    assert ended[0] - last > 0.05
    assert world.get(endpoint).status == 200
    assert application.connections == 2


def test_a_connection_that_is_too_old_takes_no_more_and_ends_when_idle(world: World, serve: Callable[..., Application]) -> None:
    gate = Gate()
    application = serve(gate.script)
    endpoint = endpoint_at(application.address, limited(max_connection_duration=0.1))
    slow = world.ask(endpoint)
    time.sleep(0.2)
    gate.open()
    assert slow.wait().status == 200
    assert world.get(endpoint).status == 200
    assert application.connections == 2


# --- hygiene


def test_an_unfinished_request_leaves_no_connection_to_reuse(world: World, serve: Callable[..., Application]) -> None:
    """The server answers before it has heard all: what it hears next would be the rest of the body."""

    def script(end: ServerEnd) -> None:
        frame = end.read()
        assert frame is not None
        end.answer(frame[1], b"early", 413)
        end.read()

    application = serve(script)
    endpoint = endpoint_at(application.address)
    early = world.ask(endpoint, ended=False)
    assert early.wait().calls[-1] == "complete"
    assert (early.status, early.body) == (413, b"early")
    assert early.stream is not None
    world.call(lambda: (early.stream.room(), early.stream.send_data(b"x"), early.stream.send_end(), early.stream.reset()))
    world.get(endpoint)
    assert application.connections == 2


@pytest.mark.parametrize("protocol", [UpstreamProtocol.HTTP1, HTTP2])
def test_a_request_that_was_given_up_is_heard_of_no_more(
    world: World, serve: Callable[..., Application], protocol: UpstreamProtocol
) -> None:
    gate = Gate()
    application = serve(gate.script)
    endpoint = endpoint_at(application.address)
    given_up = world.ask(endpoint, protocol=protocol)
    wait_until(lambda: gate.requests == 1, "the request")
    world.call(lambda: (given_up.stream.reset(), given_up.stream.reset()))
    gate.open()
    assert world.get(endpoint, "/next", protocol=protocol).body == b"/next"
    assert given_up.calls == ["open"]
    assert application.connections == (2 if protocol is UpstreamProtocol.HTTP1 else 1)


def test_unsolicited_bytes_on_an_idle_connection_end_it(world: World, serve: Callable[..., Application]) -> None:
    def script(end: ServerEnd) -> None:
        request = end.read_request()
        assert request is not None
        end.answer(request[0])
        end.sock.sendall(b"nonsense 1 0\n")
        assert end.read() is None

    application = serve(script)
    endpoint = endpoint_at(application.address)
    world.get(endpoint)
    wait_until(lambda: world.call(lambda: world.pool.connections) == 0, "the end of the connection")
    world.get(endpoint)
    assert application.connections == 2


def test_an_idle_connection_that_the_server_ended_is_not_used(world: World, serve: Callable[..., Application]) -> None:
    def script(end: ServerEnd) -> None:
        request = end.read_request()
        assert request is not None
        end.answer(request[0])

    application = serve(script)
    endpoint = endpoint_at(application.address)
    for number in range(20):
        answer = world.get(endpoint)
        assert answer.status == 200, answer.failure
        wait_until(lambda: world.call(lambda: world.pool.connections) == 0, "the end of the connection")
        assert application.connections == number + 1


# --- the peer closes, at every point


@pytest.mark.parametrize("how", ["end", "reset"])
@pytest.mark.parametrize("protocol", [UpstreamProtocol.HTTP1, HTTP2])
@pytest.mark.parametrize("mesh", [False, True])
@pytest.mark.parametrize("when", ["at once", "within the request", "before the response", "after the head", "within the body"])
def test_a_peer_that_closes_fails_the_request_once(
    world: World, serve: Callable[..., Application], agent: Agent, when: str, mesh: bool, protocol: UpstreamProtocol, how: str
) -> None:
    def script(end: ServerEnd) -> None:
        if when != "at once":
            end.read()
        if when in ("before the response", "after the head", "within the body"):
            end.read()
        if when in ("after the head", "within the body"):
            end.send("H", 1, b"200")
        if when == "within the body":
            end.send("D", 1, b"half")
            end.sock.sendall(b"D 1 100\nand a part")
        if when in ("after the head", "within the body"):
            time.sleep(0.05)  # a reset may destroy what was not read yet
        if how == "reset":
            close_with_reset(end.sock)

    application = serve(script)
    endpoint = endpoint_at(application.address)
    answer = world.ask(in_mesh(endpoint) if mesh else endpoint, protocol=protocol, body=b"x" * 1000).wait()
    assert answer.calls.count("failed") == 1
    assert answer.failure is not None
    assert answer.failure.kind in (FailureKind.TERMINATED, FailureKind.CONNECT, FailureKind.REFUSED)
    if when not in ("at once",):
        assert answer.failure.kind is FailureKind.TERMINATED
    assert ("response" in answer.calls) == (when in ("after the head", "within the body"))
    assert bytes(answer.body) == (b"half" if when == "within the body" else b"")
    world.call(lambda: (answer.stream.room(), answer.stream.send_data(b"x"), answer.stream.consumed(1)) if answer.stream else None)
    wait_until(lambda: world.call(lambda: world.pool.connections) == 0, "the connection to be forgotten")


def test_a_storm_of_resets_fails_every_request_once_and_leaves_nothing(world: World, serve: Callable[..., Application]) -> None:
    def script(end: ServerEnd) -> None:
        end.read()
        close_with_reset(end.sock)

    application = serve(script)
    endpoint = endpoint_at(application.address)
    before = open_descriptors()
    answers = [world.ask(endpoint, protocol=protocol) for _ in range(50) for protocol in (UpstreamProtocol.HTTP1, HTTP2)]
    for answer in answers:
        assert answer.wait().calls.count("failed") == 1
    wait_until(lambda: world.call(lambda: world.pool.connections) == 0, "no connection")
    wait_until(lambda: open_descriptors() <= before, f"descriptors to be {before}, not {open_descriptors()}")


def test_streams_that_are_reset_leave_the_others_alone(world: World, serve: Callable[..., Application]) -> None:
    def script(end: ServerEnd) -> None:
        while (request := end.read_request()) is not None:
            if request[1] == b"/bad":
                end.send("R", request[0])
            else:
                end.answer(request[0], request[1])

    endpoint = endpoint_at(serve(script).address)
    answers = [world.ask(endpoint, "/bad" if number % 2 else "/good", protocol=HTTP2) for number in range(20)]
    for number, answer in enumerate(answers):
        answer.wait()
        if number % 2:
            assert answer.failure is not None
            assert answer.failure.kind is FailureKind.RESET
        else:
            assert answer.body == b"/good"


def test_a_peer_that_breaks_the_protocol_fails_all_its_streams(world: World, serve: Callable[..., Application]) -> None:
    def script(end: ServerEnd) -> None:
        end.read_request()
        end.read_request()
        end.sock.sendall(b"nonsense 1 0\n")
        end.read()

    endpoint = endpoint_at(serve(script).address)
    answers = [world.ask(endpoint, protocol=HTTP2) for _ in range(2)]
    assert {answer.wait().failure.kind for answer in answers} == {FailureKind.PROTOCOL}


# --- begun anew


def test_a_request_that_the_peer_surely_did_not_touch_is_begun_anew_once(world: World, serve: Callable[..., Application]) -> None:
    refused = 0

    def script(end: ServerEnd) -> None:
        nonlocal refused
        while (request := end.read_request()) is not None:
            if request[1] == b"/never" or refused == 0:
                refused += 1
                end.send("R", request[0], b"untouched")
            else:
                end.answer(request[0], request[1])

    endpoint = endpoint_at(serve(script).address)
    answer = world.get(endpoint, "/once", protocol=HTTP2)
    assert answer.body == b"/once"
    assert answer.calls.count("open") == 1
    never = world.get(endpoint, "/never", protocol=HTTP2)
    assert never.failure is not None
    assert never.failure.kind is FailureKind.REFUSED_STREAM
    assert refused == 3


def test_streams_that_a_server_going_away_did_not_serve_go_to_another_connection(world: World, serve: Callable[..., Application]) -> None:
    first = True

    def script(end: ServerEnd) -> None:
        nonlocal first
        if not first:
            serve_echo(end)
            return
        first = False
        one, two = end.read_request(), end.read_request()
        assert one is not None
        assert two is not None
        end.send("G", 0)
        end.send("R", two[0], b"untouched")
        end.answer(one[0], one[1])
        assert end.read() is None

    application = serve(script)
    endpoint = endpoint_at(application.address)
    answers = [world.ask(endpoint, f"/{number}", protocol=HTTP2) for number in range(2)]
    assert [answer.wait().body for answer in answers] == [b"/0", b"/1"]
    assert application.connections == 2


@pytest.mark.parametrize("mesh", [False, True])
def test_a_request_whose_bytes_have_not_left_is_begun_anew(world: World, application: Application, agent: Agent, mesh: bool) -> None:
    """An idle connection's end and the next request meet in one turn of the loop."""
    endpoint = endpoint_at(application.address)
    endpoint = in_mesh(endpoint) if mesh else endpoint
    world.get(endpoint)
    answer = Answer()
    request = Request(b"POST", b"http", b"reviews", b"/again", [])

    def meet() -> None:
        world.pool.request(endpoint, UpstreamProtocol.HTTP1, request, True, answer, answer.opened)
        (shelf,) = world.pool._shelves.values()
        (session,) = shelf._open
        session.ended()

    world.call(meet)
    assert answer.wait().body == b"/again", answer.failure
    assert answer.calls.count("open") == 1
    assert application.connections == 2


class Keeper:
    """An `Owner` that takes nothing back, and keeps what it is offered."""

    waits = False
    limits = ConnectionPool()

    def __init__(self) -> None:
        self.offered: list[Call] = []

    def take_back(self, call: Call) -> bool:
        self.offered.append(call)
        return False

    def session_free(self, session: HttpSession) -> None: ...

    def session_gone(self, session: HttpSession) -> None: ...

    def session_closed(self, session: HttpSession) -> None: ...

    def call_over(self, call: Call) -> None: ...


def test_a_request_whose_record_has_left_is_not_begun_anew_for_the_length_of_later_ones() -> None:
    """What TLS adds to each record makes up for the plaintext that has gone."""
    with tls_that_stands() as (thread, carrier, stream):
        owner, answers = Keeper(), [Answer() for _ in range(2)]

        def ask(answer: Answer) -> Call:
            call = Call(owner, Request(b"GET", b"http", b"reviews", b"/", []), True, answer, answer.opened)
            assert session.begin(call) is None
            session._flush()
            stream._flush()
            return call

        def leave() -> None:
            assert carrier.read(carrier.unsent)

        def begin() -> HttpSession:
            session = HttpSession(thread.reactor, stream, Http2Client(now=thread.reactor.now), owner)
            stream.attach(session)
            session._flush()
            stream._flush()
            return session

        session = thread.call(begin)
        thread.call(leave)
        first = thread.call(lambda: ask(answers[0]))
        thread.call(leave)
        others = [thread.call(lambda: ask(answers[1])) for _ in range(10)]
        thread.call(lambda: session.discard("the test is over"))
        assert {answer.wait().failure.kind for answer in answers} == {FailureKind.TERMINATED}
        assert first not in owner.offered
        assert not set(others) & set(owner.offered), "sealed, so the carrier may have sent it"


def test_a_request_whose_bytes_have_left_is_not_begun_anew(world: World, serve: Callable[..., Application]) -> None:
    requests = 0

    def script(end: ServerEnd) -> None:
        nonlocal requests
        while (request := end.read_request()) is not None:
            requests += 1
            if requests == 2:
                return
            end.answer(request[0])

    endpoint = endpoint_at(serve(script).address)
    world.get(endpoint)
    answer = world.get(endpoint)
    assert answer.failure is not None
    assert answer.failure.kind is FailureKind.TERMINATED
    assert requests == 2


def test_a_body_that_has_begun_is_not_begun_anew(world: World, serve: Callable[..., Application]) -> None:
    def script(end: ServerEnd) -> None:
        while (request := end.read_request()) is not None:
            end.send("R", request[0], b"untouched")

    endpoint = endpoint_at(serve(script).address)
    answer = world.ask(endpoint, protocol=HTTP2, body=b"once only").wait()
    assert answer.failure is not None
    assert answer.failure.kind is FailureKind.REFUSED_STREAM


# --- bounds


def test_requests_beyond_the_bound_of_connections_wait_their_turn(world: World, serve: Callable[..., Application]) -> None:
    gate = Gate()
    application = serve(gate.script)
    endpoint = endpoint_at(application.address, limited(max_connections=2))
    answers = [world.ask(endpoint, f"/{number}") for number in range(6)]
    wait_until(lambda: gate.requests == 2, "two requests at once")
    breaker = world.pool.breaker_of(endpoint)
    assert (breaker.connections, breaker.requests, breaker.pending) == (2, 2, 4)
    gate.open()
    assert [answer.wait().body for answer in answers] == [f"/{number}".encode() for number in range(6)]
    assert application.connections == 2
    settle(world.thread)
    assert (breaker.connections, breaker.requests, breaker.pending) == (2, 0, 0)


def test_one_request_too_many_waits_not_but_overflows(world: World, serve: Callable[..., Application]) -> None:
    gate = Gate()
    endpoint = endpoint_at(serve(gate.script).address, limited(max_connections=1, max_pending=1))
    first = world.ask(endpoint)
    wait_until(lambda: gate.requests == 1, "the first request")
    second, third = world.ask(endpoint), world.ask(endpoint)
    assert third.wait().failure is not None
    assert third.failure is not None
    assert third.failure.kind is FailureKind.OVERFLOW
    gate.open()
    assert (first.wait().status, second.wait().status) == (200, 200)


@pytest.mark.parametrize("protocol", [UpstreamProtocol.HTTP1, HTTP2])
def test_requests_under_way_are_bounded_whatever_the_connections(
    world: World, serve: Callable[..., Application], protocol: UpstreamProtocol
) -> None:
    started, gate = 0, threading.Event()

    def script(end: ServerEnd) -> None:
        nonlocal started
        streams = []
        while (request := end.read_request()) is not None:
            started += 1
            streams.append(request[0])
            if len(streams) == 3 or protocol is UpstreamProtocol.HTTP1:
                gate.wait(20)
                for stream in streams:
                    end.answer(stream)
                streams.clear()

    endpoint = endpoint_at(serve(script).address, limited(max_requests=3))
    answers = [world.ask(endpoint, protocol=protocol) for _ in range(3)]
    wait_until(lambda: started == 3, "three requests at once")
    refused = world.ask(endpoint, protocol=protocol).wait()
    assert refused.failure is not None
    assert refused.failure.kind is FailureKind.OVERFLOW
    gate.set()
    assert {answer.wait().status for answer in answers} == {200}
    again = [world.ask(endpoint, protocol=protocol) for _ in range(3)]
    assert {answer.wait().status for answer in again} == {200}


def test_subsets_and_ports_are_counted_apart(world: World, serve: Callable[..., Application]) -> None:
    gate = Gate()
    application = serve(gate.script)
    policy = limited(max_requests=1)
    one = endpoint_at(application.address, policy)
    others = [
        replace(one, destination=Destination("shop", "reviews.shop.svc.cluster.local", 80, "v1")),
        replace(one, destination=Destination("shop", "reviews.shop.svc.cluster.local", 81)),
        replace(one, destination=None),
    ]
    answers = [world.ask(endpoint) for endpoint in (one, *others)]
    wait_until(lambda: gate.requests == 4, "one request each")
    gate.open()
    assert {answer.wait().status for answer in answers} == {200}


def test_an_idle_connection_to_one_endpoint_is_given_up_for_another(world: World, serve: Callable[..., Application]) -> None:
    one, other = serve(), serve()
    policy = limited(max_connections=1)
    for _ in range(3):
        assert world.get(endpoint_at(one.address, policy)).status == 200
        assert world.get(endpoint_at(other.address, policy)).status == 200
        assert world.call(lambda: world.pool.connections) == 1
    assert (one.connections, other.connections) == (3, 3)


def test_a_busy_connection_is_given_up_for_another_endpoint_when_it_becomes_idle(world: World, serve: Callable[..., Application]) -> None:
    gate = Gate()
    one, other = serve(gate.script), serve()
    policy = limited(max_connections=1)
    slow = world.ask(endpoint_at(one.address, policy))
    wait_until(lambda: gate.requests == 1, "the slow request")
    waiting = world.ask(endpoint_at(other.address, policy))
    settle(world.thread)
    assert other.connections == 0
    gate.open()
    assert slow.wait().status == 200
    assert waiting.wait().status == 200


def test_a_request_that_waits_can_be_called_off(world: World, serve: Callable[..., Application]) -> None:
    gate = Gate()
    endpoint = endpoint_at(serve(gate.script).address, limited(max_connections=1, max_pending=1))
    first = world.ask(endpoint)
    wait_until(lambda: gate.requests == 1, "the first request")
    called_off = world.ask(endpoint)
    cancel = called_off.cancel
    assert cancel is not None
    world.call(lambda: (cancel.cancel(), cancel.cancel()))
    third = world.ask(endpoint)
    gate.open()
    assert first.wait().status == 200
    assert third.wait().status == 200, "its place was free again"
    assert called_off.calls == []


def test_bounds_of_connections_hold_for_plain_connections_too(world: World, application: Application) -> None:
    endpoint = endpoint_at(application.address, limited(max_connections=2))
    opened: list[ByteStream | UpstreamFailure] = []
    world.call(lambda: [world.pool.connect(endpoint, opened.append) for _ in range(3)])
    wait_until(lambda: len(opened) == 3, "three results")
    failures = [each for each in opened if isinstance(each, UpstreamFailure)]
    streams = [each for each in opened if not isinstance(each, UpstreamFailure)]
    assert [failure.kind for failure in failures] == [FailureKind.OVERFLOW]
    world.call(lambda: streams[0].abort("done"))
    world.call(lambda: world.pool.connect(endpoint, opened.append).cancel())
    world.call(lambda: world.pool.connect(endpoint, opened.append))
    wait_until(lambda: len(opened) == 4, "a place that was left")
    assert not isinstance(opened[3], UpstreamFailure)


def test_a_plain_connection_ends_when_it_is_too_old(world: World, application: Application) -> None:
    sink = Collector()
    endpoint = endpoint_at(application.address, limited(max_connection_duration=0.1))
    world.call(lambda: world.pool.connect(endpoint, lambda stream: stream.attach(sink)))
    sink.wait_for("closed")
    assert sink.reason == "connection older than 0.1 s"


# --- back-pressure


@pytest.mark.parametrize("mesh", [False, True])
def test_a_response_that_nobody_reads_holds_its_server_back(
    world: World, serve: Callable[..., Application], agent: Agent, mesh: bool
) -> None:
    sent = 0

    def script(end: ServerEnd) -> None:
        nonlocal sent
        end.read_request()
        end.send("H", 1, b"200")
        for _ in range(400):
            end.send("D", 1, b"x" * 100_000)
            sent += 100_000
        end.send("E", 1)

    endpoint = endpoint_at(serve(script).address)
    answer = Answer()
    answer.credit = False
    world.ask(in_mesh(endpoint) if mesh else endpoint, answer=answer)
    wait_until(lambda: len(answer.body) > 0, "a beginning")
    wait_until_still(lambda: sent)
    assert len(answer.body) < 2_000_000
    assert sent < 40_000_000
    stream = answer.stream
    assert stream is not None
    answer.credit = True
    world.call(lambda: stream.consumed(len(answer.body)))
    assert len(answer.wait().body) == 40_000_000


@pytest.mark.parametrize("mesh", [False, True])
def test_a_request_body_waits_for_a_server_that_does_not_read(
    world: World, serve: Callable[..., Application], agent: Agent, mesh: bool
) -> None:
    read_on = threading.Event()

    def script(end: ServerEnd) -> None:
        read_on.wait(20)
        request = end.read_request()
        assert request is not None
        end.answer(request[0], str(len(request[2])).encode())

    left, answer = 40_000_000, Answer()

    def pump() -> None:
        nonlocal left
        stream = answer.stream
        assert stream is not None
        while left and (room := stream.room()):
            size = min(room, left, 60_000)
            stream.send_data(b"x" * size)
            left -= size
        if not left:
            stream.send_end()

    answer.on_open = lambda _stream: pump()
    answer.on_writable = pump
    endpoint = endpoint_at(serve(script).address)
    world.ask(in_mesh(endpoint) if mesh else endpoint, ended=False, answer=answer)
    wait_until(lambda: left < 40_000_000, "a beginning")
    wait_until_still(lambda: left)
    assert left > 10_000_000
    read_on.set()
    assert answer.wait().body == b"40000000"


def wait_until_still(measure: Callable[[], int]) -> None:
    """Until it has not changed for a while."""
    before = None
    while before != (now := measure()):
        before = now
        time.sleep(0.3)


# --- what only HTTP/2 has


def silent_about_upgrades(_protocol: UpstreamProtocol) -> FrameCodec:
    codec = FrameCodec(serial=False)
    codec.upgrades = None
    return codec


@pytest.mark.parametrize("takes", [True, False])
def test_an_upgrade_waits_until_the_server_has_said_whether_it_takes_any(
    world: World, serve: Callable[..., Application], takes: bool
) -> None:
    say = threading.Event()

    def script(end: ServerEnd) -> None:
        say.wait(20)
        end.send("S", 0, b"1" if takes else b"0")
        while (frame := end.read()) is not None:
            if frame[0] == "H":
                end.send("H", frame[1], b"101")
                end.send("D", frame[1], frame[2])
                end.send("E", frame[1])

    world.pool.make_codec = silent_about_upgrades
    application = serve(script)
    endpoint = endpoint_at(application.address)
    answers = [Answer() for _ in range(3)]
    for number, answer in enumerate(answers):
        request = Request(b"GET", b"http", b"reviews", b"/%d" % number, [], upgrade=b"websocket")
        world.call(
            lambda answer=answer, request=request: setattr(
                answer, "cancel", world.pool.request(endpoint, HTTP2, request, False, answer, answer.opened)
            )
        )
    wait_until(lambda: application.connections == 1, "a connection")
    settle(world.thread)
    time.sleep(0.05)
    assert [answer.calls for answer in answers] == [[], [], []]
    world.call(answers[1].cancel.cancel)
    say.set()
    for number in (0, 2):
        answers[number].wait()
        if takes:
            assert (answers[number].status, answers[number].body) == (101, b"/%d" % number)
        else:
            assert answers[number].failure is not None
            assert answers[number].failure.kind is FailureKind.PROTOCOL
    assert answers[1].calls == []
    assert application.connections == 1


def test_an_upgrade_that_waited_on_a_connection_that_broke_goes_to_another(world: World, serve: Callable[..., Application]) -> None:
    first = True

    def script(end: ServerEnd) -> None:
        nonlocal first
        if first:
            first = False
            return
        end.send("S", 0, b"1")
        frame = end.read()
        assert frame is not None
        end.send("H", frame[1], b"200.")
        end.read()

    world.pool.make_codec = silent_about_upgrades
    request = Request(b"GET", b"http", b"reviews", b"/", [], upgrade=b"websocket")
    answer, endpoint = Answer(), endpoint_at(serve(script).address)
    world.call(lambda: world.pool.request(endpoint, HTTP2, request, False, answer, answer.opened))
    assert answer.wait().status == 200, answer.failure


@pytest.mark.parametrize("answers", [True, False])
def test_a_peer_that_answers_no_ping_is_gone(world: World, serve: Callable[..., Application], answers: bool) -> None:
    pings = 0

    def script(end: ServerEnd) -> None:
        nonlocal pings
        while (frame := end.read()) is not None:
            if frame[0] == "E":
                end.answer(frame[1])
            if frame[0] == "P":
                pings += 1
                if answers:
                    end.send("P", 0)

    endpoint = endpoint_at(serve(script).address, limited(h2_keepalive_interval=0.05, h2_keepalive_timeout=0.1))
    assert world.get(endpoint, protocol=HTTP2).status == 200
    if answers:
        wait_until(lambda: pings > 3, "several pings")
        assert world.call(lambda: world.pool.connections) == 1
    else:
        wait_until(lambda: world.call(lambda: world.pool.connections) == 0, "the connection to be given up")
        assert pings == 1


# --- life


def test_a_removed_endpoint_loses_its_idle_connections_and_ends_busy_ones_later(world: World, serve: Callable[..., Application]) -> None:
    gate = Gate()
    removed, kept = serve(gate.script), serve()
    gate.open()
    endpoint = endpoint_at(removed.address)
    world.get(endpoint)
    world.get(endpoint_at(kept.address))
    gate._open.clear()
    busy, busy_too = world.ask(endpoint), world.ask(endpoint)
    wait_until(lambda: gate.requests == 3, "two slow requests")
    world.call(lambda: world.pool.forget(lambda each: each.address == removed.address))
    gate.open()
    assert (busy.wait().status, busy_too.wait().status) == (200, 200)
    wait_until(lambda: world.call(lambda: world.pool.connections) == 1, "only the other endpoint's connection")
    world.get(endpoint_at(kept.address))
    assert kept.connections == 1
    assert removed.connections == 2


def test_nobody_waits_for_a_removed_endpoint_to_answer(world: World, application: Application, agent: Agent) -> None:
    agent.ignore = True
    endpoint = in_mesh(endpoint_at(application.address))
    answer = world.ask(endpoint)
    wait_until(lambda: agent.authorities, "the agent has been asked")
    world.call(lambda: world.pool.forget(lambda each: each.address == endpoint.address))
    failure = answer.wait().failure
    assert failure is not None
    assert (failure.kind, failure.because) == (FailureKind.CONNECT, f"connection to {endpoint.address} failed: the endpoint is no more")
    assert world.call(lambda: world.pool.connections) == 0


def test_a_removed_endpoint_is_not_dialled_again_for_who_waited_for_room(world: World, application: Application, agent: Agent) -> None:
    agent.ignore = True
    endpoint = in_mesh(endpoint_at(application.address, limited(max_connections=1)))
    answers = [world.ask(endpoint, f"/{number}") for number in range(3)]
    wait_until(lambda: agent.authorities, "the agent has been asked")
    breaker = world.call(lambda: world.pool.breaker_of(endpoint))
    world.call(lambda: world.pool.forget(lambda each: each.address == endpoint.address))
    assert (breaker.connections, breaker.pending) == (0, 0)
    failures = {answer.wait().failure for answer in answers}
    assert failures == {UpstreamFailure(FailureKind.CONNECT, f"connection to {endpoint.address} failed: the endpoint is no more")}
    assert len(agent.authorities) == 1


def test_a_connection_of_its_own_waits_for_no_removed_endpoint_and_goes_on_if_it_stands(
    world: World, application: Application, agent: Agent
) -> None:
    results: list[ByteStream | UpstreamFailure] = []
    endpoint = in_mesh(endpoint_at(application.address))
    world.call(lambda: world.pool.connect(endpoint, results.append))
    wait_until(lambda: bool(results), "a connection")
    agent.ignore = True
    world.call(lambda: world.pool.connect(endpoint, results.append))
    wait_until(lambda: len(agent.authorities) == 2, "the agent has been asked")
    world.call(lambda: world.pool.forget(lambda each: each.address == endpoint.address))
    stream, failure = results
    assert failure == UpstreamFailure(FailureKind.CONNECT, f"connection to {endpoint.address} failed: the endpoint is no more")
    assert isinstance(stream, TunnelStream)
    assert not world.call(lambda: stream.over)
    assert world.call(lambda: world.pool.connections) == 1
    world.call(lambda: stream.abort("the test is over"))
    assert world.call(lambda: world.pool.connections) == 0


def test_who_fails_over_a_removed_endpoint_keeps_no_other_waiting(world: World, application: Application, agent: Agent) -> None:
    agent.ignore = True
    endpoint = in_mesh(endpoint_at(application.address))
    results: list[ByteStream | UpstreamFailure] = []

    def fail(result: ByteStream | UpstreamFailure) -> None:
        raise ValueError("a bug")

    for on_open in (fail, results.append):
        world.call(lambda on_open=on_open: world.pool.connect(endpoint, on_open))
    wait_until(lambda: len(agent.authorities) == 2, "the agent has been asked")
    world.call(lambda: world.pool.forget(lambda each: each.address == endpoint.address))
    assert [type(result) for result in results] == [UpstreamFailure]
    assert world.call(lambda: world.pool.connections) == 0
    assert [str(error) for error in world.thread.errors] == ["a bug"]
    world.thread.errors.clear()


def test_draining_serves_what_comes_and_keeps_nothing(world: World, serve: Callable[..., Application], agent: Agent) -> None:
    gate = Gate()
    application = serve(gate.script)
    plain = endpoint_at(application.address)
    tunnelled = in_mesh(plain)
    gate.open()
    for endpoint in (plain, tunnelled):
        world.get(endpoint)
    gate._open.clear()
    busy = [world.ask(endpoint) for endpoint in (plain, tunnelled) for _ in range(2)]
    wait_until(lambda: gate.requests == 6, "four slow requests")
    world.call(lambda: world.pool.close(gracefully=True))
    late = [world.ask(endpoint) for endpoint in (plain, tunnelled)]
    gate.open()
    assert {answer.wait().status for answer in (*busy, *late)} == {200}
    wait_until(lambda: world.call(lambda: world.pool.connections) == 0, "no connection")


def test_ending_fails_whatever_is_under_way(world: World, serve: Callable[..., Application]) -> None:
    gate = Gate()
    endpoint = endpoint_at(serve(gate.script).address, limited(max_connections=1))
    answers = [world.ask(endpoint) for _ in range(3)]
    wait_until(lambda: gate.requests == 1, "a request")
    opened: list[object] = []
    other = replace(endpoint, destination=None, policy=limited())
    world.call(lambda: world.pool.connect(other, opened.append))
    world.call(lambda: world.pool.close(gracefully=False))
    for answer in (*answers, world.ask(endpoint)):
        assert answer.wait().failure is not None
        assert answer.failure is not None
        assert answer.failure.kind is FailureKind.TERMINATED
    wait_until(lambda: len(opened) == 1, "the connection under way")


def test_a_sink_that_fails_costs_no_other_stream(world: World, application: Application) -> None:
    endpoint = endpoint_at(application.address)
    bad = Answer()

    def fail() -> None:
        raise ValueError("a bug")

    bad.on_response = fail
    answers = [world.ask(endpoint, protocol=HTTP2), world.ask(endpoint, protocol=HTTP2, answer=bad), world.ask(endpoint, protocol=HTTP2)]
    assert bad.wait().failure is not None
    assert [answers[0].wait().status, answers[2].wait().status] == [200, 200]
    assert application.connections == 1
    assert [str(error) for error in world.thread.errors] == ["a bug"]
    world.thread.errors.clear()

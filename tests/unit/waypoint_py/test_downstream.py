"""A client's HTTP/1.1 connection that must not come to a halt, nor end before its time, whatever comes when."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest

from mesh.http.h1 import DISCARDED, HELD, UNCONSUMED, Http1Server
from mesh.http.message import Response
from mesh.model.l7.routing import Fault
from mesh.wire.frames import PREFACE, FrameType, frame_header
from tests.unit.mesh.http.h2_peer import GET as H2_GET
from tests.unit.mesh.http.h2_peer import Peer
from tests.unit.waypoint_py.stage import ROUTE, Call, Stage
from waypoint_py.downstream import HEAD_SECONDS, LINGER_SECONDS, REQUESTS_A_TURN, HttpConnection
from waypoint_py.listener import SERVER_OPTIONS
from waypoint_py.stream import HIGH_WATER
from waypoint_py.upstream.session import FailureKind, UpstreamFailure

PLAIN = msgspec.structs.replace(ROUTE, fault=None, mirrors=(), retry=None, timeout=None)
REFUSING = msgspec.structs.replace(PLAIN, fault=Fault(status=403, abort_percent=100.0))
GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
CLOSING_GET = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
WEBSOCKET = (
    b"GET /ws HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


def post(size: int, *headers: bytes) -> bytes:
    return b"\r\n".join([b"POST / HTTP/1.1", b"Host: a", b"Content-Length: %d" % size, *headers, b"", b""])


class Talk:
    """A client and an application that do whatever they can at once; nothing here waits, so what does not come has stalled."""

    def __init__(self, route: object = PLAIN) -> None:
        self.stage = Stage(1, serial=True, route=route)
        self.heard = b""

    def say(self, data: bytes, cut: int = 1 << 20) -> None:
        """All of it, in pieces; the client reads when it may not write."""
        for at in range(0, len(data), cut):
            if self.stage.wire.paused:
                self.hear()
            assert not self.stage.wire.paused, "nobody listens any more"
            assert not self.stage.wire.ending, "the connection has ended"
            self.stage.say(data[at : at + cut])

    def hear(self, most: int = 1 << 40) -> bytes:
        """What has come for the client."""
        before = len(self.heard)
        while most and (data := self.stage.wire.read(min(most, 1 << 16))):
            self.heard += data
            most -= len(data)
            self.stage.clock.turn()
        return self.heard[before:]

    def upstream(self, *, window: int = 1 << 40) -> Call:
        """The one try that is under way, let in."""
        (call,) = self.stage.upstreams.living
        if not call.opened:
            call.opened, call.window = True, window
            call.on_open(call)
            self.stage.clock.turn()
        return call

    def respond(self, body: bytes = b"ok", *, chunked: bool = False, status: int = 200) -> None:
        """The application's answer, whole and at once."""
        call = self.upstream()
        call.responded = True
        length = None if chunked else len(body)
        if not body:
            call.over = True
        call.sink.response(Response(status, [], content_length=length), not body)
        if body:
            call.unconsumed += len(body)
            call.sink.data(body)
            call.over = True
            call.sink.complete([])
        self.stage.clock.turn()

    def finish(self) -> list[tuple[int, str]]:
        """Everything is over; what the log says: status and details of each request."""
        self.stage.finish()
        return [(record.status, record.details) for record in self.stage.log.ended]


@pytest.fixture
def talk() -> Iterator[Talk]:
    made = Talk()
    yield made
    if not made.stage.gone:
        made.finish()


# Requests that follow one another


def test_any_number_of_requests_that_we_answer_ourselves_may_come_at_once() -> None:
    talk = Talk(REFUSING)
    talk.say(GET * 4000)
    assert talk.hear().count(b"HTTP/1.1 403 ") == 4000
    talk.say(GET)
    assert talk.hear().startswith(b"HTTP/1.1 403 ")
    talk.finish()


@pytest.mark.parametrize("serial", [True, False])
def test_requests_that_come_at_once_take_turns_with_those_of_others(serial: bool) -> None:
    stage = Stage(1, serial=serial, route=REFUSING)
    writer = Peer()
    heads = b"".join(writer.head(stream, H2_GET) for stream in range(1, 200, 2))
    said = GET * 100 if serial else PREFACE + frame_header(0, FrameType.SETTINGS, 0, 0) + heads
    stage.connection.data(memoryview(said))
    assert len(stage.log.ended) == REQUESTS_A_TURN
    assert stage.wire.paused, "nothing more is listened to meanwhile"
    turns = 0
    while len(stage.log.ended) < 100:
        before = len(stage.log.ended)
        stage.clock.step()
        assert len(stage.log.ended) - before <= REQUESTS_A_TURN
        turns += 1
    assert turns >= 100 // REQUESTS_A_TURN
    stage.clock.turn()
    assert not stage.wire.paused
    stage.finish()


@pytest.mark.parametrize("serial", [True, False])
def test_requests_that_come_one_by_one_wait_for_nobody(serial: bool) -> None:
    stage = Stage(1, serial=serial, route=REFUSING)
    writer = Peer()
    if not serial:
        stage.say(PREFACE + frame_header(0, FrameType.SETTINGS, 0, 0))
    for number in range(3 * REQUESTS_A_TURN):
        stage.connection.data(memoryview(GET if serial else writer.head(2 * number + 1, H2_GET)))
        assert len(stage.log.ended) == number + 1
        assert not stage.wire.paused
        stage.clock.turn()
    stage.finish()


def test_a_request_that_came_while_the_answer_before_it_was_read_slowly_is_served(talk: Talk) -> None:
    talk.say(GET)
    talk.respond(b"x" * (4 * HIGH_WATER))
    talk.say(GET + GET)
    while talk.hear(10_000):
        pass
    talk.respond(b"second")
    assert talk.hear().endswith(b"second")
    talk.respond(b"third")
    assert talk.hear().endswith(b"third")


@pytest.mark.parametrize("more", [HELD - 1, HELD, HELD + 1, 3 * HELD])
def test_a_client_that_sends_ahead_more_than_is_held_is_held_back_and_then_heard(talk: Talk, more: int) -> None:
    body = b"y" * more
    talk.say(GET + post(len(body)))
    talk.stage.say(body[: more // 2])
    talk.stage.say(body[more // 2 : more])  # not read, if paused
    told = more if not talk.stage.wire.paused or more <= HELD else None
    talk.respond(b"first")
    assert talk.hear().endswith(b"first")
    assert not talk.stage.wire.paused
    call = talk.upstream()
    if told is not None:
        assert (call.received, call.ended) == (more, True)


def test_one_byte_at_a_time_is_heard_like_all_at_once(talk: Talk) -> None:
    talk.say(GET, 1)
    talk.respond()
    talk.say(post(5) + b"hello", 1)
    assert talk.upstream().received == 5
    talk.respond(b"a" * 1000, chunked=True)
    talk.say(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0a;x=y\r\n0123456789\r\n0\r\nT: u\r\n\r\n", 1)
    assert (talk.upstream().received, talk.upstream().ended) == (13, True)
    talk.respond(b"end")
    assert talk.hear().endswith(b"end")
    assert talk.finish() == [(200, "via_upstream")] * 3


def test_a_request_that_came_before_the_waypoint_ends_is_served_and_is_the_last() -> None:
    talk = Talk()
    stage = talk.stage
    connection = HttpConnection(stage.plane, stage.wire, Http1Server(SERVER_OPTIONS), stage.facts, serial=True, on_gone=lambda: None)
    connection.wind_down()
    connection.start(GET)
    talk.respond()
    assert b"connection: close" in talk.hear()
    assert talk.heard.endswith(b"ok")
    assert stage.wire.ending


# Bodies


@pytest.mark.parametrize("size", [UNCONSUMED + delta for delta in (-1, 0, 1)] + [HIGH_WATER * 5, DISCARDED, 1])
def test_a_body_of_any_size_reaches_an_application_that_takes_it_bit_by_bit(talk: Talk, size: int) -> None:
    talk.say(post(size))
    call = talk.upstream(window=0)
    body, moved = b"z" * size, 0
    while moved < size or not call.ended:
        if not talk.stage.wire.paused and moved < size:
            talk.say(body[moved : moved + 16384])
            moved += 16384
            continue
        before = call.received
        call.window += 10_000
        call.sink.writable()
        talk.stage.clock.turn()
        assert call.received > before, "it has room, and gets nothing"
    assert call.received == size
    talk.respond()
    talk.say(GET)
    talk.respond(b"next")
    assert talk.hear().endswith(b"next")


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("size", [HIGH_WATER + delta for delta in (-200, -1, 0, 1, 64 * 1024, 64 * 1024 + 1)] + [10 * HIGH_WATER, 1])
def test_an_answer_of_any_size_reaches_a_client_that_stops_and_goes_on(talk: Talk, size: int, chunked: bool) -> None:
    talk.say(GET)
    body = bytes(range(256)) * (size // 256) + b"!" * (size % 256)
    call = talk.upstream()
    call.responded = True
    call.sink.response(Response(200, [], content_length=None if chunked else size), False)
    for at in range(0, size, 100_000):
        piece = body[at : at + 100_000]
        call.unconsumed += len(piece)
        call.sink.data(piece)
    call.over = True
    call.sink.complete([])
    talk.stage.clock.turn()
    while talk.hear(7_000):
        pass
    rest = talk.heard.partition(b"\r\n\r\n")[2]
    assert (_unchunked(rest) if chunked else rest) == body
    talk.say(GET)
    talk.respond(b"next")
    assert talk.hear().endswith(b"next")


def _unchunked(data: bytes) -> bytes:
    body = b""
    while True:
        size, _, data = data.partition(b"\r\n")
        if not int(size, 16):
            assert data == b"\r\n"
            return body
        body += data[: int(size, 16)]
        data = data[int(size, 16) + 2 :]


@pytest.mark.parametrize("sized", [True, False])
def test_an_answer_that_breaks_off_is_not_ended_as_if_it_were_whole(talk: Talk, sized: bool) -> None:
    talk.say(GET)
    call = talk.upstream()
    call.responded = True
    call.sink.response(Response(200, [], content_length=10 if sized else None), False)
    call.unconsumed += 3
    call.sink.data(b"abc")
    call.over = True
    call.sink.failed(UpstreamFailure(FailureKind.TERMINATED, "gone"))
    talk.stage.clock.turn()
    assert talk.hear().endswith(b"abc" if sized else b"3\r\nabc\r\n")
    assert talk.stage.wire.ending
    assert talk.finish() == [(200, "upstream_reset_after_response_started{connection_termination}")]


# Answers before the request is over


@pytest.mark.parametrize(
    ("request_head", "first", "rest"),
    [
        (post(1000), b"a" * 10, b"a" * 990),
        (post(DISCARDED), b"", b"a" * DISCARDED),
        (post(1000), b"", b"a" * 1000),
    ],
)
def test_what_is_left_of_a_refused_upload_is_read_for_nothing(request_head: bytes, first: bytes, rest: bytes) -> None:
    talk = Talk(REFUSING)
    talk.say(request_head + first)
    answer = talk.hear()
    assert answer.startswith(b"HTTP/1.1 403 ")
    assert b"connection: close" not in answer
    talk.say(rest + GET, 1000)
    assert talk.hear().startswith(b"HTTP/1.1 403 ")
    talk.finish()


@pytest.mark.parametrize(
    "request_head",
    [
        post(DISCARDED + 1),
        post(100, b"Expect: 100-continue"),
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n",
    ],
)
def test_an_upload_that_cannot_be_read_for_nothing_ends_with_its_refusal(request_head: bytes) -> None:
    talk = Talk(REFUSING)
    talk.say(request_head)
    answer = talk.hear()
    assert answer.startswith(b"HTTP/1.1 403 ")
    assert b"connection: close" in answer
    assert talk.stage.wire.ending
    talk.stage.clock.advance(2 * LINGER_SECONDS + 1)
    assert talk.stage.wire.over
    talk.finish()


@pytest.mark.parametrize("rest", [b"", b"b" * 50])
def test_an_application_that_answers_before_it_has_heard_all_ends_the_request(talk: Talk, rest: bytes) -> None:
    talk.say(post(100, b"Expect: 100-continue") + b"a" * 10)
    talk.upstream()
    talk.respond(b"early", status=413)
    assert talk.hear().endswith(b"early")
    assert talk.stage.wire.ending
    assert talk.finish() == [(413, "via_upstream")]


def test_an_application_that_answers_while_it_listens_is_heard_out(talk: Talk) -> None:
    talk.say(post(100) + b"a" * 10)
    call = talk.upstream()
    call.responded = True
    call.sink.response(Response(200, [], content_length=4), False)
    call.unconsumed += 2
    call.sink.data(b"ab")
    talk.stage.clock.turn()
    assert talk.hear().endswith(b"ab")
    talk.say(b"a" * 90)
    assert (call.received, call.ended) == (100, True)
    call.unconsumed += 2
    call.sink.data(b"cd")
    call.over = True
    call.sink.complete([])
    talk.stage.clock.turn()
    assert talk.hear().endswith(b"cd")
    talk.say(GET)
    talk.respond(b"next")
    assert talk.hear().endswith(b"next")


def test_a_client_that_ends_its_direction_is_gone(talk: Talk) -> None:
    talk.say(GET)
    talk.upstream()
    talk.stage.connection.ended()
    talk.stage.clock.turn()
    assert not talk.stage.upstreams.living
    assert talk.stage.wire.ending
    assert talk.finish() == [(0, "downstream_remote_disconnect")]


# Upgrades


@pytest.mark.parametrize("cut", [1, 7, 1 << 20])
def test_what_came_with_an_upgrade_reaches_the_application_once_it_has_agreed(talk: Talk, cut: int) -> None:
    talk.say(WEBSOCKET + b"early frames", cut)
    call = talk.upstream()
    assert not call.received
    call.responded = True
    call.sink.response(Response(101, [(b"sec-websocket-accept", b"x")]), False)
    talk.stage.clock.turn()
    assert talk.hear().startswith(b"HTTP/1.1 101 ")
    assert call.received == len(b"early frames")
    talk.say(b"more")
    assert call.received == len(b"early framesmore")
    call.unconsumed += 5
    call.sink.data(b"hello")
    talk.stage.clock.turn()
    assert talk.hear() == b"hello"


def test_what_came_with_an_upgrade_that_is_refused_is_the_next_request(talk: Talk) -> None:
    talk.say(WEBSOCKET + GET)
    talk.respond(b"no", status=400)
    talk.respond(b"next")
    assert talk.hear().endswith(b"next")


# Time


def test_a_head_that_does_not_come_to_its_end_is_answered_with_408(talk: Talk) -> None:
    talk.say(GET[:-4])
    talk.stage.clock.advance(HEAD_SECONDS - 1)
    talk.say(b"\r\nX: y")
    assert not talk.hear()
    talk.stage.clock.advance(2)
    answer = talk.hear()
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"connection: close" in answer
    assert talk.stage.wire.ending
    assert talk.finish() == [(408, "request_header_timeout")]


def test_a_head_of_which_the_beginning_was_held_back_has_no_more_time_than_others(talk: Talk) -> None:
    talk.say(GET + GET[:-4])
    talk.stage.clock.advance(HEAD_SECONDS * 2)
    talk.respond()
    assert talk.hear().endswith(b"ok")
    talk.stage.clock.advance(HEAD_SECONDS + 1)
    assert talk.hear().startswith(b"HTTP/1.1 408 ")


def test_the_end_of_a_refused_body_begins_no_head() -> None:
    talk = Talk(REFUSING)
    talk.say(post(20) + b"a" * 10)
    talk.say(b"a" * 10)
    talk.hear()
    talk.stage.clock.advance(HEAD_SECONDS * 2)
    assert not talk.stage.wire.over
    talk.say(GET)
    assert talk.hear().startswith(b"HTTP/1.1 403 ")
    talk.finish()


def test_a_client_that_reads_slowly_gets_the_last_answer_whole(talk: Talk) -> None:
    talk.say(CLOSING_GET)
    talk.respond(b"x" * HIGH_WATER)
    while talk.stage.wire.unsent:
        assert not talk.stage.wire.over
        talk.hear(10_000)
        talk.stage.clock.advance(LINGER_SECONDS * 0.9)
    assert len(talk.heard.partition(b"\r\n\r\n")[2]) == HIGH_WATER
    talk.stage.clock.advance(LINGER_SECONDS * 2)
    assert talk.stage.wire.over


def test_a_client_that_stops_reading_the_last_answer_is_cut_off(talk: Talk) -> None:
    talk.say(CLOSING_GET)
    talk.respond(b"x" * HIGH_WATER)
    talk.hear(10_000)
    talk.stage.clock.advance(LINGER_SECONDS * 2.5)
    assert talk.stage.wire.over


@pytest.mark.parametrize("pieces", [2, 5])
def test_an_answer_goes_on_when_the_network_takes_at_once_what_was_kept_for_the_turns_end(
    talk: Talk, monkeypatch: pytest.MonkeyPatch, pieces: int
) -> None:
    taken = bytearray()
    monkeypatch.setattr(talk.stage.wire, "write", taken.extend)  # it never has anything unsent, so it never tells that it has drained
    talk.say(GET)
    call = talk.upstream()
    call.responded = True
    piece = b"x" * (HIGH_WATER // 2 + 1)
    call.sink.response(Response(200, [], content_length=pieces * len(piece)), False)
    for _ in range(pieces):
        call.unconsumed += len(piece)
        call.sink.data(piece)
    call.over = True
    call.sink.complete([])
    talk.stage.clock.turn()
    assert bytes(taken).endswith(b"\r\n\r\n" + pieces * piece)


# What is told of it


@pytest.mark.parametrize("request_head", [GET, CLOSING_GET])
def test_an_answer_without_a_body_is_an_answer_also_when_it_is_the_last(talk: Talk, request_head: bytes) -> None:
    talk.say(request_head)
    talk.respond(b"", status=204)
    assert talk.hear().startswith(b"HTTP/1.1 204 ")
    (record,) = talk.stage.log.ended
    assert (record.status, record.details, record.flags) == (204, "via_upstream", ())

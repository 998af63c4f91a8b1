"""The h2 library as the other side of the waypoint's HTTP/2: it raises when we break the protocol, and its frames are not ours."""

from __future__ import annotations

import random
from typing import TypeVar

import h2.events
import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.settings import SettingCodes, Settings

from mesh.http.codec import BodyEnd, Event, GoingAway, RefusedHead, RequestHead, ResponseHead, StreamReset
from mesh.http.h2 import CONNECTION_WINDOW, Http2Client, Http2Server
from mesh.http.message import Request, Response, Version
from mesh.http.options import HeadLimits, ServerOptions
from mesh.testing.hbone import StoppedClock
from mesh.wire.errors import ErrorCode, LocalProtocolError
from mesh.wire.frames import MAX_STREAM_ID
from tests.unit.mesh.http.h2_peer import body_of, deliver, frames_of, plain, request

ANSWER = Response(200, [(b"content-type", b"text/plain")])
E1 = TypeVar("E1")

Fields = list[tuple[str, str]]
GET: Fields = [(":method", "GET"), (":scheme", "http"), (":authority", "shop.test"), (":path", "/")]
POST: Fields = [(":method", "POST"), *GET[1:]]


class Against:
    """One of our codecs and an h2 connection, with what either saw."""

    def __init__(self, codec: Http2Client | Http2Server, settings: dict[SettingCodes, int] | None = None) -> None:
        self.codec = codec
        is_client = isinstance(codec, Http2Server)
        self.h2 = H2Connection(H2Configuration(client_side=is_client, header_encoding="utf-8"))
        self.h2.local_settings = Settings(client=is_client, initial_values=settings or {})
        self.h2.max_inbound_frame_size = self.h2.local_settings.max_frame_size
        self.h2.initiate_connection()
        self.ours: list[Event] = []
        self.theirs: list[h2.events.Event] = []
        self.settle()

    def settle(self) -> None:
        """Carry bytes both ways until neither side has any."""
        while True:
            outgoing, incoming = self.codec.take_outgoing(), self.h2.data_to_send()
            if not outgoing and not incoming:
                return
            self.theirs += self.h2.receive_data(outgoing)
            self.ours += deliver(self.codec, incoming)

    def heard(self, kind: type[E1]) -> list[E1]:
        """What h2 saw of a kind since the last time."""
        found = [event for event in self.theirs if type(event) is kind]
        self.theirs = [event for event in self.theirs if type(event) is not kind]
        return found

    def seen(self, kind: type[E1]) -> list[E1]:
        """What our codec saw of a kind since the last time."""
        found = [event for event in self.ours if type(event) is kind]
        self.ours = [event for event in self.ours if type(event) is not kind]
        return found

    def body(self) -> bytes:
        """All DATA that h2 has seen since the last time."""
        return b"".join(event.data for event in self.heard(h2.events.DataReceived))

    def send(self, stream: int, payload: bytes) -> bytes:
        """As much as the codec may send now; returns the rest."""
        while payload and (room := self.codec.room(stream)):
            piece, payload = payload[:room], payload[room:]
            self.codec.send_data(stream, piece)
        self.settle()
        return payload

    def h2_sends(self, stream: int, payload: bytes, *, end: bool = True) -> bytes:
        """As much as h2 may send now; returns the rest. END_STREAM goes with the last of it."""
        while payload and (room := min(self.h2.local_flow_control_window(stream), self.h2.max_outbound_frame_size)):
            piece, payload = payload[:room], payload[room:]
            self.h2.send_data(stream, piece, end_stream=end and not payload)
        self.settle()
        return payload


def server(settings: dict[SettingCodes, int] | None = None, options: ServerOptions | None = None) -> tuple[Against, Http2Server]:
    """Our server, and h2 as its client."""
    codec = Http2Server(options or ServerOptions(), now=StoppedClock())
    return Against(codec, settings), codec


def client(settings: dict[SettingCodes, int] | None = None) -> tuple[Against, Http2Client]:
    """Our client, and h2 as its server."""
    codec = Http2Client(now=StoppedClock())
    return Against(codec, settings), codec


# --- messages -----------------------------------------------------------------------------------------------------------------------------


def test_h2_asks_and_our_server_answers() -> None:
    peer, ours = server()
    peer.h2.send_headers(1, [*GET, ("accept", "*/*"), ("cookie", "a=1"), ("cookie", "b=2")], end_stream=True)
    peer.settle()
    (head,) = peer.seen(RequestHead)
    assert head.ended
    assert plain(head.request) == plain(
        Request(b"GET", b"http", b"shop.test", b"/", [(b"accept", b"*/*"), (b"cookie", b"a=1; b=2")], Version.HTTP_2)
    )
    ours.send_response(1, Response(200, [(b"server", b"x")], content_length=4), ended=False)
    ours.send_data(1, b"text")
    ours.send_end(1)
    peer.settle()
    (answer,) = peer.heard(h2.events.ResponseReceived)
    assert list(answer.headers) == [(":status", "200"), ("server", "x"), ("content-length", "4")]
    assert peer.body() == b"text"
    assert peer.heard(h2.events.StreamEnded)
    assert ours.active_streams == 0


def test_our_client_asks_and_h2_answers() -> None:
    peer, ours = client()
    stream = ours.send_request(request(headers=[(b"accept", b"*/*")]), ended=True)
    peer.settle()
    (asked,) = peer.heard(h2.events.RequestReceived)
    assert list(asked.headers) == [*GET, ("accept", "*/*")]
    assert peer.heard(h2.events.StreamEnded)
    peer.h2.send_headers(stream, [(":status", "200"), ("server", "x"), ("content-length", "4")])
    peer.h2.send_data(stream, b"text", end_stream=True)
    peer.settle()
    (head,) = peer.seen(ResponseHead)
    assert (head.response.status, head.response.headers, head.ended) == (200, [(b"server", b"x"), (b"content-length", b"4")], False)
    assert body_of(peer.ours, stream) == b"text"
    assert peer.seen(BodyEnd) == [BodyEnd(stream, [])]
    assert ours.active_streams == 0


def test_bodies_and_trailers_go_both_ways_through_our_server() -> None:
    peer, ours = server()
    peer.h2.send_headers(1, [*POST, ("te", "trailers")])
    peer.h2.send_data(1, b"question")
    peer.h2.send_headers(1, [("x-checksum", "1"), ("host", "elsewhere.test")], end_stream=True)
    peer.settle()
    assert not peer.seen(RequestHead)[0].ended
    assert body_of(peer.ours, 1) == b"question"
    assert peer.seen(BodyEnd) == [BodyEnd(1, [(b"x-checksum", b"1")])]
    ours.send_response(1, ANSWER, ended=False)
    ours.send_data(1, b"answer")
    ours.send_end(1, [(b"grpc-status", b"0")])
    peer.settle()
    assert peer.body() == b"answer"
    assert [list(event.headers) for event in peer.heard(h2.events.TrailersReceived)] == [[("grpc-status", "0")]]
    assert ours.active_streams == 0


def test_bodies_and_trailers_go_both_ways_through_our_client() -> None:
    peer, ours = client()
    stream = ours.send_request(request(b"POST"), ended=False)
    ours.send_data(stream, b"question")
    ours.send_end(stream, [(b"x-checksum", b"1")])
    peer.settle()
    assert peer.body() == b"question"
    assert [list(event.headers) for event in peer.heard(h2.events.TrailersReceived)] == [[("x-checksum", "1")]]
    peer.h2.send_headers(stream, [(":status", "200")])
    peer.h2.send_data(stream, b"answer")
    peer.h2.send_headers(stream, [("grpc-status", "0")], end_stream=True)
    peer.settle()
    assert body_of(peer.ours, stream) == b"answer"
    assert peer.seen(BodyEnd) == [BodyEnd(stream, [(b"grpc-status", b"0")])]


@pytest.mark.parametrize(("method", "status"), [(b"HEAD", 200), (b"HEAD", 204), (b"HEAD", 304), (b"GET", 204), (b"GET", 304)])
def test_a_response_without_a_body_may_say_how_long_it_would_be(method: bytes, status: int) -> None:
    answering, codec = server()
    answering.h2.send_headers(1, [(":method", method.decode()), *GET[1:]], end_stream=True)
    answering.settle()
    codec.send_response(1, Response(status, [], content_length=10), ended=False)
    assert codec.room(1) > 0
    codec.send_data(1, b"never sent")
    codec.send_end(1)
    # Not to h2, which misses ten bytes after a 304 (RFC 9113 section 8.1.1).
    head, end = frames_of(codec.take_outgoing())
    assert "END_STREAM" not in head.flags
    assert (end.data, end.flags) == (b"", {"END_STREAM"})
    assert codec.active_streams == 0

    peer, ours = client()
    stream = ours.send_request(request(method), ended=True)
    peer.settle()
    peer.h2.send_headers(stream, [(":status", str(status)), ("content-length", "10")], end_stream=True)
    peer.settle()
    (answer,) = peer.seen(ResponseHead)
    assert (answer.response.status, answer.ended) == (status, True)
    assert not peer.ours


def test_a_body_after_the_answer_to_head_resets_its_stream() -> None:
    peer, ours = client()
    stream = ours.send_request(request(b"HEAD"), ended=True)
    peer.settle()
    peer.h2.send_headers(stream, [(":status", "200")])
    peer.h2.send_data(stream, b"body")
    peer.settle()
    assert [event.code for event in peer.seen(StreamReset)] == [ErrorCode.PROTOCOL_ERROR]


def test_informational_responses_come_before_the_final_one() -> None:
    peer, ours = server()
    peer.h2.send_headers(1, [*POST, ("expect", "100-continue")])
    peer.settle()
    assert peer.seen(RequestHead)[0].request.expect_continue
    ours.send_informational(1, 100, [])
    ours.send_informational(1, 103, [(b"link", b"</a.css>")])
    ours.send_informational(1, 102, [])
    peer.settle()
    heard = [list(event.headers) for event in peer.heard(h2.events.InformationalResponseReceived)]
    assert heard == [[(":status", "100")], [(":status", "103"), ("link", "</a.css>")]]

    asked, codec = client()
    stream = codec.send_request(request(b"POST", expect_continue=True), ended=False)
    asked.settle()
    (question,) = asked.heard(h2.events.RequestReceived)
    assert ("expect", "100-continue") in list(question.headers)
    for status in ("100", "102", "103"):
        asked.h2.send_headers(stream, [(":status", status)])
    asked.h2.send_headers(stream, [(":status", "200")], end_stream=True)
    asked.settle()
    assert [head.response.status for head in asked.seen(ResponseHead)] == [100, 103, 200]


def test_an_answer_before_the_request_is_complete_ends_the_stream_without_blame() -> None:
    peer, ours = server()
    peer.h2.send_headers(1, POST)
    peer.h2.send_data(1, b"some")
    peer.settle()
    ours.send_response(1, Response(413, []), ended=True)
    peer.settle()
    assert peer.heard(h2.events.StreamEnded)
    assert [event.error_code for event in peer.heard(h2.events.StreamReset)] == [ErrorCodes.NO_ERROR]
    assert ours.active_streams == 0


def test_a_refused_head_is_answered_and_the_connection_goes_on() -> None:
    peer, ours = server()
    peer.h2.send_headers(1, [*GET[:3], (":path", "/a b")], end_stream=True)
    peer.h2.send_headers(3, GET, end_stream=True)
    peer.settle()
    (refused,) = peer.seen(RefusedHead)
    assert (refused.stream, refused.status) == (1, 400)
    ours.send_response(1, Response(400, []), ended=True)
    ours.send_response(3, Response(200, []), ended=True)
    peer.settle()
    assert [dict(event.headers)[":status"] for event in peer.heard(h2.events.ResponseReceived)] == ["400", "200"]


# --- flow control -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 100, 65_535, 1 << 20])
def test_a_response_keeps_to_the_windows_of_the_client(window: int) -> None:
    peer, ours = server({SettingCodes.INITIAL_WINDOW_SIZE: window})
    payload = random.Random(window).randbytes(300 * min(window, 1000))
    peer.h2.send_headers(1, GET, end_stream=True)
    peer.settle()
    ours.send_response(1, ANSWER, ended=False)
    got = b""
    rest = payload
    while rest:
        rest = peer.send(1, rest)
        for event in peer.heard(h2.events.DataReceived):
            got += event.data
            peer.h2.acknowledge_received_data(event.flow_controlled_length, 1)
        peer.settle()
    ours.send_end(1)
    peer.settle()
    assert got == payload


def test_windows_narrowed_amid_a_response_may_fall_below_zero() -> None:
    peer, ours = server({SettingCodes.INITIAL_WINDOW_SIZE: 1000})
    for stream in (1, 3):
        peer.h2.send_headers(stream, GET, end_stream=True)
    peer.settle()
    for stream in (1, 3):
        ours.send_response(stream, ANSWER, ended=False)
    assert peer.send(1, b"x" * 2000) == b"x" * 1000
    peer.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 300})
    peer.settle()
    assert (ours.room(1), ours.room(3)) == (0, 300)
    with pytest.raises(LocalProtocolError):
        ours.send_data(1, b"x")
    peer.h2.increment_flow_control_window(700, 1)
    peer.settle()
    assert ours.room(1) == 0
    peer.h2.increment_flow_control_window(10, 1)
    peer.settle()
    assert ours.room(1) == 10
    peer.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 1300})
    peer.settle()
    assert peer.send(1, b"x" * 2000) == b"x" * 990
    assert len(peer.body()) == 2010


def test_a_request_keeps_to_the_windows_of_the_server_as_they_change() -> None:
    peer, ours = client({SettingCodes.INITIAL_WINDOW_SIZE: 100})
    stream = ours.send_request(request(b"POST"), ended=False)
    peer.settle()
    assert peer.send(stream, b"x" * 150) == b"x" * 50
    peer.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 0})
    peer.settle()
    assert ours.room(stream) == 0
    peer.h2.increment_flow_control_window(150, stream)
    peer.settle()
    assert peer.send(stream, b"x" * 60) == b"x" * 10
    assert len(peer.body()) == 150


def test_the_connections_window_bounds_all_streams_together() -> None:
    peer, ours = server({SettingCodes.INITIAL_WINDOW_SIZE: 1 << 20})
    for stream in (1, 3):
        peer.h2.send_headers(stream, GET, end_stream=True)
    peer.settle()
    for stream in (1, 3):
        ours.send_response(stream, ANSWER, ended=False)
    assert len(peer.send(1, bytes(60_000))) == 0
    assert len(peer.send(3, bytes(60_000))) == 60_000 - 5_535
    assert ours.room(1) == ours.room(3) == 0
    peer.h2.increment_flow_control_window(1)
    peer.settle()
    assert (ours.room(1), ours.room(3)) == (1, 1)


def test_a_body_that_does_not_move_on_stops_its_client_and_no_other_stream() -> None:
    peer, ours = server(options=ServerOptions(stream_window=100_000))
    peer.h2.send_headers(1, POST)
    peer.h2.send_headers(3, POST)
    peer.settle()
    rest = peer.h2_sends(1, bytes(300_000))
    assert len(rest) == 200_000
    assert peer.h2_sends(3, bytes(100_000)) == b""
    ours.consumed(1, 24_999)
    peer.settle()
    assert peer.h2.local_flow_control_window(1) == 0, "credit is returned in portions of a quarter of the window"
    ours.consumed(1, 1)
    peer.settle()
    assert peer.h2.local_flow_control_window(1) == 25_000
    while rest:
        ours.consumed(1, 25_000)
        peer.settle()
        rest = peer.h2_sends(1, rest)
    assert len(body_of(peer.ours, 1)) == 300_000
    assert [event.stream for event in peer.seen(BodyEnd)] == [3, 1]


def test_credit_of_the_connection_is_held_back_while_too_much_waits() -> None:
    peer, ours = server(options=ServerOptions(stream_window=1 << 20))
    streams = range(1, 21, 2)
    for stream in streams:
        peer.h2.send_headers(stream, POST)
    peer.settle()
    left = {stream: peer.h2_sends(stream, bytes(1 << 20)) for stream in streams}
    taken = sum((1 << 20) - len(rest) for rest in left.values())
    assert CONNECTION_WINDOW <= taken < 2 * CONNECTION_WINDOW
    assert peer.h2.outbound_flow_control_window == 0
    for stream in streams:
        peer.h2.reset_stream(stream)
    peer.settle()
    assert peer.h2.outbound_flow_control_window == CONNECTION_WINDOW, "what streams leave behind is forgotten with them"
    assert ours.active_streams == 0


def test_padding_is_no_body_and_its_credit_comes_back() -> None:
    peer, ours = server(options=ServerOptions(stream_window=65_536))
    peer.h2.send_headers(1, POST)
    for _ in range(1000):
        peer.h2.send_data(1, b"x", pad_length=255)
        peer.settle()
        ours.consumed(1, 1)
    peer.h2.send_data(1, b"", pad_length=7, end_stream=True)
    peer.settle()
    assert body_of(peer.ours, 1) == b"x" * 1000
    assert [event.stream for event in peer.seen(BodyEnd)] == [1]


def test_a_large_frame_size_is_used_once_it_is_agreed() -> None:
    peer, ours = server({SettingCodes.MAX_FRAME_SIZE: 1 << 17, SettingCodes.INITIAL_WINDOW_SIZE: 1 << 20})
    peer.h2.increment_flow_control_window(1 << 20)
    peer.h2.send_headers(1, GET, end_stream=True)
    peer.settle()
    ours.send_response(1, ANSWER, ended=False)
    peer.send(1, bytes(1 << 18))
    assert [len(event.data) for event in peer.heard(h2.events.DataReceived)] == [1 << 17, 1 << 17]


# --- header blocks ------------------------------------------------------------------------------------------------------------------------


def test_large_heads_and_trailers_go_in_continuations_both_ways() -> None:
    large = [(b"x-%d" % number, random.Random(number).randbytes(300).hex().encode()) for number in range(60)]
    text = [(name.decode(), value.decode()) for name, value in large]
    peer, ours = server()
    peer.h2.send_headers(1, [*POST, *text])
    peer.h2.send_headers(1, text, end_stream=True)
    peer.settle()
    assert peer.seen(RequestHead)[0].request.headers == large
    assert peer.seen(BodyEnd) == [BodyEnd(1, large)]
    ours.send_response(1, Response(200, large), ended=False)
    ours.send_end(1, large)
    peer.settle()
    assert list(peer.heard(h2.events.ResponseReceived)[0].headers)[1:] == text
    assert list(peer.heard(h2.events.TrailersReceived)[0].headers) == text


def test_a_head_over_the_limit_is_refused_and_the_next_request_is_read() -> None:
    peer, ours = server(options=ServerOptions(limits=HeadLimits(size=4096, count=50)))
    peer.h2.send_headers(1, [*GET, ("x", "y" * 5000)], end_stream=True)
    peer.h2.send_headers(3, [*GET, *(("x", str(number)) for number in range(51))], end_stream=True)
    peer.h2.send_headers(5, [*GET, *(("x", str(number)) for number in range(50))], end_stream=True)
    peer.settle()
    assert [(refused.stream, refused.status) for refused in peer.seen(RefusedHead)] == [(1, 431), (3, 431)]
    assert [head.stream for head in peer.seen(RequestHead)] == [5]
    ours.send_response(1, Response(431, []), ended=True)
    peer.settle()
    assert dict(peer.heard(h2.events.ResponseReceived)[0].headers)[":status"] == "431"


def test_many_requests_in_a_row_keep_the_header_tables_in_step() -> None:
    peer, ours = server()
    chance = random.Random(1)
    for stream in range(1, 801, 2):
        fields = [(f"x-{chance.randrange(9)}", str(chance.randrange(20)) * chance.choice([1, 50, 600])) for _ in range(chance.randrange(9))]
        peer.h2.send_headers(stream, [*GET, *fields], end_stream=True)
        peer.settle()
        (head,) = peer.seen(RequestHead)
        assert head.request.headers == [(name.encode(), value.encode()) for name, value in fields]
        ours.send_response(stream, Response(chance.choice([200, 418]), head.request.headers), ended=True)
        peer.settle()
        assert list(peer.heard(h2.events.ResponseReceived)[0].headers)[1:] == fields


@pytest.mark.parametrize("sizes", [[0], [100], [4096, 0], [0, 4096], [1 << 20], [64, 4096, 128]])
def test_the_header_table_of_the_peer_may_change_size_at_any_time(sizes: list[int]) -> None:
    peer, ours = server()
    fields = [("x-common", "y" * 30), ("x-other", "z" * 30)]
    expected = [(name.encode(), value.encode()) for name, value in fields]
    for number in range(8):
        stream = 1 + 2 * number
        peer.h2.send_headers(stream, [*GET, *fields], end_stream=True)
        if number == 4:
            for size in sizes:
                peer.h2.update_settings({SettingCodes.HEADER_TABLE_SIZE: size})
        peer.settle()
        ours.send_response(stream, Response(200, expected), ended=True)
        peer.settle()
        assert list(peer.heard(h2.events.ResponseReceived)[0].headers)[1:] == fields
    assert peer.h2.decoder.header_table.maxsize <= sizes[-1]


def test_a_peer_that_shrinks_its_own_table_is_followed() -> None:
    peer, _ = server()
    for number, size in enumerate([4096, 100, 0, 4096]):
        peer.h2.encoder.header_table_size = size
        peer.h2.send_headers(1 + 2 * number, [*GET, ("x-common", "y")], end_stream=True)
        peer.settle()
        assert peer.seen(RequestHead)[0].request.headers == [(b"x-common", b"y")]


def test_credentials_are_never_indexed_and_always_read() -> None:
    peer, ours = client()
    for _ in range(3):
        ours.send_request(request(headers=[(b"authorization", b"Bearer x"), (b"cookie", b"short=1")]), ended=True)
        peer.settle()
        (asked,) = peer.heard(h2.events.RequestReceived)
        assert list(asked.headers)[4:] == [("authorization", "Bearer x"), ("cookie", "short=1")]
        assert all(not field.indexable for field in asked.headers[4:])


# --- streams and connections --------------------------------------------------------------------------------------------------------------


def test_priority_changes_nothing() -> None:
    peer, _ = server()
    peer.h2.send_headers(1, GET, end_stream=True, priority_weight=10, priority_depends_on=0, priority_exclusive=True)
    peer.h2.prioritize(3, weight=7, depends_on=1)
    peer.h2.send_headers(3, GET, end_stream=True)
    peer.settle()
    assert [head.stream for head in peer.seen(RequestHead)] == [1, 3]


def test_pings_are_answered_both_ways() -> None:
    peer, _ = server()
    peer.h2.ping(b"12345678")
    peer.settle()
    assert [event.ping_data for event in peer.heard(h2.events.PingAckReceived)] == [b"12345678"]
    peer, asking = client()
    asking.ping()
    assert asking.pings == 1
    peer.settle()
    assert asking.pings == 0


def test_a_server_that_goes_away_serves_what_crosses_its_goodbye() -> None:
    peer, ours = server()
    peer.h2.send_headers(1, POST)
    peer.settle()
    ours.go_away()
    ours.go_away()
    peer.h2.send_headers(3, GET, end_stream=True)
    peer.ours += deliver(ours, peer.h2.data_to_send())  # sent before the GOAWAY was read
    assert [head.stream for head in peer.seen(RequestHead)] == [1, 3]
    assert not ours.finished
    goodbye, ping = frames_of(ours.take_outgoing())
    (gone,) = peer.h2.receive_data(goodbye.serialize())  # no PING: h2 takes nothing after a GOAWAY
    assert isinstance(gone, h2.events.ConnectionTerminated)
    assert (gone.last_stream_id, gone.error_code) == (MAX_STREAM_ID, ErrorCodes.NO_ERROR)
    ping.flags.add("ACK")
    deliver(ours, ping.serialize())
    (goodbye,) = frames_of(ours.take_outgoing())
    assert (goodbye.last_stream_id, goodbye.error_code) == (3, ErrorCode.NO_ERROR)
    ours.send_response(1, ANSWER, ended=True)
    assert not ours.finished
    ours.send_response(3, ANSWER, ended=True)
    assert ours.finished


def test_after_the_last_goaway_streams_below_it_finish_and_those_above_are_passed_over() -> None:
    codec, asking = Http2Server(now=StoppedClock()), Http2Client(now=StoppedClock())

    def settle() -> tuple[list[Event], list[Event]]:
        at_client: list[Event] = []
        at_server: list[Event] = []
        while True:
            questions, answers = asking.take_outgoing(), codec.take_outgoing()
            if not questions and not answers:
                return at_client, at_server
            at_server += deliver(codec, questions)
            at_client += deliver(asking, answers)

    settle()
    first = asking.send_request(request(b"POST"), ended=False)
    settle()
    codec.go_away()
    assert settle() == ([GoingAway()], [])
    assert not asking.reusable
    assert asking.capacity == 0
    with pytest.raises(LocalProtocolError):
        asking.send_request(request(), ended=True)
    asking.send_data(first, b"the rest")
    asking.send_end(first)
    _, at_server = settle()
    assert body_of(at_server, first) == b"the rest"
    assert not codec.finished
    assert not asking.finished
    codec.send_response(first, ANSWER, ended=True)
    (head,) = settle()[0]
    assert isinstance(head, ResponseHead)
    assert codec.finished
    assert asking.finished


def test_a_client_learns_which_requests_a_server_that_went_away_has_not_seen() -> None:
    peer, ours = client()
    streams = [ours.send_request(request(), ended=True) for _ in range(3)]
    peer.settle()
    peer.h2.close_connection(last_stream_id=1)
    peer.settle()
    assert peer.seen(GoingAway) == [GoingAway()]
    assert [(event.stream, event.untouched) for event in peer.seen(StreamReset)] == [(3, True), (5, True)]
    assert not ours.reusable
    assert ours.active_streams == 1
    assert not ours.finished
    ours.reset(streams[0], ErrorCode.CANCEL)
    assert ours.finished


def test_a_reset_by_the_peer_is_told_with_what_it_means() -> None:
    peer, ours = server()
    peer.h2.send_headers(1, POST)
    peer.settle()
    peer.h2.reset_stream(1, ErrorCodes.CANCEL)
    peer.settle()
    assert [(event.stream, event.code, event.untouched) for event in peer.seen(StreamReset)] == [(1, ErrorCode.CANCEL, False)]
    ours.send_response(1, ANSWER, ended=False)
    ours.send_data(1, b"nobody hears")
    ours.send_end(1)
    ours.consumed(1, 10)
    assert ours.take_outgoing() == b""

    asked, codec = client()
    for code in (ErrorCodes.REFUSED_STREAM, ErrorCodes.INTERNAL_ERROR):
        stream = codec.send_request(request(), ended=True)
        asked.settle()
        asked.h2.reset_stream(stream, code)
        asked.settle()
    assert [(event.code, event.untouched) for event in asked.seen(StreamReset)] == [(7, True), (2, False)]


def test_a_reset_of_ours_reaches_the_peer_and_what_it_had_sent_is_passed_over() -> None:
    peer, ours = server()
    peer.h2.send_headers(1, POST)
    peer.settle()
    ours.reset(1, ErrorCode.CANCEL)
    peer.h2.send_data(1, b"crosses")
    peer.h2.send_headers(1, [("x", "y")], end_stream=True)
    crossing = peer.h2.data_to_send()
    peer.theirs += peer.h2.receive_data(ours.take_outgoing())
    assert deliver(ours, crossing) == []
    assert [event.error_code for event in peer.heard(h2.events.StreamReset)] == [ErrorCodes.CANCEL]
    assert ours.take_outgoing() == b""
    peer.h2.send_headers(3, GET, end_stream=True)
    peer.settle()
    assert [head.stream for head in peer.seen(RequestHead)] == [1, 3]


def test_more_streams_than_allowed_are_refused_and_may_be_asked_for_again() -> None:
    peer, ours = server(options=ServerOptions(max_streams=2))
    assert peer.h2.remote_settings.max_concurrent_streams == 2
    peer.h2.remote_settings[SettingCodes.MAX_CONCURRENT_STREAMS] = 100
    peer.h2.remote_settings.acknowledge()
    for stream in (1, 3, 5):
        peer.h2.send_headers(stream, GET, end_stream=True)
    peer.settle()
    assert [head.stream for head in peer.seen(RequestHead)] == [1, 3]
    assert [(event.stream_id, event.error_code) for event in peer.heard(h2.events.StreamReset)] == [(5, ErrorCodes.REFUSED_STREAM)]
    ours.send_response(1, ANSWER, ended=True)
    peer.h2.send_headers(7, GET, end_stream=True)
    peer.settle()
    assert [head.stream for head in peer.seen(RequestHead)] == [7]


def test_a_client_keeps_to_the_number_of_streams_that_the_server_allows() -> None:
    peer, ours = client({SettingCodes.MAX_CONCURRENT_STREAMS: 2})
    assert ours.capacity == 2
    first = ours.send_request(request(), ended=True)
    ours.send_request(request(), ended=True)
    assert ours.capacity == 0
    with pytest.raises(LocalProtocolError):
        ours.send_request(request(), ended=True)
    peer.settle()
    peer.h2.update_settings({SettingCodes.MAX_CONCURRENT_STREAMS: 1})
    peer.h2.send_headers(first, [(":status", "200")], end_stream=True)
    peer.settle()
    assert ours.capacity == 0
    assert ours.reusable


def test_an_end_of_the_connection_ends_what_is_under_way() -> None:
    peer, ours = client()
    stream = ours.send_request(request(), ended=True)
    peer.settle()
    assert [(event.stream, event.code, event.untouched) for event in ours.receive_eof()] == [(stream, ErrorCode.CANCEL, False)]
    assert ours.finished
    answering, codec = server()
    answering.h2.send_headers(1, GET, end_stream=True)
    answering.settle()
    assert [event.stream for event in codec.receive_eof()] == [1]
    assert codec.finished


# --- upgrades -----------------------------------------------------------------------------------------------------------------------------

CONNECT: Fields = [(":method", "CONNECT"), (":scheme", "http"), (":authority", "shop.test"), (":path", "/chat"), (":protocol", "websocket")]


def test_a_websocket_is_opened_through_our_server() -> None:
    peer, ours = server()
    assert peer.h2.remote_settings.enable_connect_protocol == 1
    peer.h2.send_headers(1, [*CONNECT, ("sec-websocket-version", "13")])
    peer.settle()
    (head,) = peer.seen(RequestHead)
    assert (head.request.method, head.request.upgrade, head.request.path, head.ended) == (b"GET", b"websocket", b"/chat", False)
    ours.send_response(1, Response(101, [(b"sec-websocket-accept", b"x"), (b"sec-websocket-protocol", b"chat")]), ended=False)
    peer.settle()
    assert list(peer.heard(h2.events.ResponseReceived)[0].headers) == [(":status", "200"), ("sec-websocket-protocol", "chat")]
    peer.h2.send_data(1, b"ping")
    peer.settle()
    assert body_of(peer.ours, 1) == b"ping"
    ours.send_data(1, b"pong")
    peer.settle()
    assert peer.body() == b"pong"
    peer.h2.end_stream(1)
    peer.settle()
    ours.send_end(1)
    peer.settle()
    assert peer.heard(h2.events.StreamEnded)
    assert not peer.heard(h2.events.StreamReset)


def test_a_websocket_is_opened_through_our_client() -> None:
    peer, ours = client({SettingCodes.ENABLE_CONNECT_PROTOCOL: 1})
    assert ours.upgrades
    asked = request(path=b"/chat", headers=[(b"sec-websocket-key", b"x"), (b"sec-websocket-version", b"13")], upgrade=b"websocket")
    stream = ours.send_request(asked, ended=True)
    peer.settle()
    (question,) = peer.heard(h2.events.RequestReceived)
    assert list(question.headers) == [*CONNECT, ("sec-websocket-version", "13")]
    peer.h2.send_headers(stream, [(":status", "200")])
    peer.settle()
    assert peer.seen(ResponseHead)[0].response.status == 101
    ours.send_data(stream, b"ping")
    peer.settle()
    assert peer.body() == b"ping"
    peer.h2.send_data(stream, b"pong", end_stream=True)
    peer.settle()
    assert body_of(peer.ours, stream) == b"pong"
    ours.send_end(stream)
    peer.settle()
    assert ours.active_streams == 0


def test_a_server_may_refuse_a_websocket() -> None:
    peer, ours = client({SettingCodes.ENABLE_CONNECT_PROTOCOL: 1})
    stream = ours.send_request(request(upgrade=b"websocket"), ended=True)
    peer.settle()
    peer.h2.send_headers(stream, [(":status", "403")], end_stream=True)
    peer.settle()
    assert peer.seen(ResponseHead)[0].response.status == 403
    ours.send_end(stream)
    peer.settle()
    assert ours.active_streams == 0


def test_a_server_without_extended_connect_is_never_asked_for_an_upgrade() -> None:
    peer, ours = client()
    assert ours.upgrades is False
    stream = ours.send_request(request(upgrade=b"websocket"), ended=True)
    (refused,) = ours.receive(b"")
    assert isinstance(refused, StreamReset)
    assert (refused.stream, refused.untouched) == (stream, True)
    peer.settle()
    assert not peer.heard(h2.events.RequestReceived)


@pytest.mark.parametrize(("fields", "status"), [([*CONNECT[:-1], (":protocol", "telnet")], 501), ([CONNECT[0], CONNECT[2]], 403)])
def test_other_tunnels_are_refused(fields: Fields, status: int) -> None:
    peer, _ = server()
    peer.h2.config.validate_outbound_headers = False
    peer.h2.send_headers(1, fields)
    peer.settle()
    assert [refused.status for refused in peer.seen(RefusedHead)] == [status]

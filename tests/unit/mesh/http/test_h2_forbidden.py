"""What HTTP/2 forbids (RFC 9113, RFC 7541, RFC 8441), row by row, and whose end it is: a stream's or the connection's, with which code."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mesh.http.codec import BodyEnd, ClientCodec, RefusedHead, RequestHead, ResponseHead, StreamReset
from mesh.http.h1 import Http1Client
from mesh.http.h2 import Http2Client, Http2Server
from mesh.http.message import Request, Response
from mesh.testing.hbone import StoppedClock
from mesh.wire.errors import ErrorCode, LocalProtocolError
from mesh.wire.frames import (
    ACK,
    END_HEADERS,
    END_STREAM,
    MAX_STREAM_ID,
    MAX_WINDOW,
    PADDED,
    PREFACE,
    PRIORITY_FLAG,
    FrameType,
    frame_header,
    goaway_frame,
    rst_stream_frame,
    window_update_frame,
)
from tests.unit.mesh.http.h2_peer import GET, POST, Fields, Peer, request

PROTOCOL, FLOW, SIZE = ErrorCode.PROTOCOL_ERROR, ErrorCode.FLOW_CONTROL_ERROR, ErrorCode.FRAME_SIZE_ERROR
CLOSED, COMPRESSION, CALM = ErrorCode.STREAM_CLOSED, ErrorCode.COMPRESSION_ERROR, ErrorCode.ENHANCE_YOUR_CALM

METHOD, SCHEME, AUTHORITY, PATH = GET


def frame(kind: FrameType | int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> bytes:
    return frame_header(len(payload), kind, flags, stream) + payload


def settings(*pairs: tuple[int, int]) -> bytes:
    return frame(FrameType.SETTINGS, payload=b"".join(code.to_bytes(2) + value.to_bytes(4) for code, value in pairs))


def data(stream: int, payload: bytes = b"", flags: int = 0) -> bytes:
    return frame(FrameType.DATA, flags, stream, payload)


def asked_client() -> Peer:
    """A client whose request, on stream 1, waits for its answer."""
    peer = Peer(Http2Client(now=StoppedClock()))
    peer.client.send_request(request(), ended=True)
    peer.client.take_outgoing()
    return peer


# --- heads of requests --------------------------------------------------------------------------------------------------------------------

MALFORMED_REQUESTS: dict[str, Fields] = {
    "connection": [*GET, ("connection", "close")],
    "keep-alive": [*GET, ("keep-alive", "1")],
    "proxy-connection": [*GET, ("proxy-connection", "close")],
    "transfer-encoding": [*GET, ("transfer-encoding", "chunked")],
    "upgrade": [*GET, ("upgrade", "h2c")],
    "te other than trailers": [*GET, ("te", "gzip")],
    "te with more than trailers": [*GET, ("te", "trailers, deflate")],
    "an upper-case name": [*GET, ("X-Name", "v")],
    "a name with a blank": [*GET, ("x name", "v")],
    "a name with a colon": [*GET, ("x:name", "v")],
    "a name with a line end": [*GET, ("x\r\ny", "v")],
    "a name with NUL": [*GET, ("x\0", "v")],
    "a name beyond ASCII": [*GET, (b"x-\xe4", b"v")],
    "an empty name": [*GET, ("", "v")],
    "an empty name and value": [*GET, ("", "")],
    "CR LF in a value": [*GET, ("x", "v\r\nhost: evil")],
    "CR in a value": [*GET, ("x", "v\rw")],
    "LF in a value": [*GET, ("x", "v\nw")],
    "NUL in a value": [*GET, ("x", "v\0w")],
    "DEL in a value": [*GET, ("x", "v\x7f")],
    "a value that begins with a blank": [*GET, ("x", " v")],
    "a value that ends with a tab": [*GET, ("x", "v\t")],
    "a pseudo-header after others": [METHOD, SCHEME, AUTHORITY, ("x", "v"), PATH],
    "two methods": [*GET, METHOD],
    "two paths": [*GET, (":path", "/other")],
    "two authorities": [*GET, AUTHORITY],
    "two schemes": [*GET, SCHEME],
    "an unknown pseudo-header": [*GET, (":port", "80")],
    "a pseudo-header of responses": [*GET, (":status", "200")],
    "a colon alone as a name": [*GET, (":", "v")],
    "a pseudo-header in upper case": [(":METHOD", "GET"), *GET[1:]],
    "no method": GET[1:],
    "no scheme": [METHOD, AUTHORITY, PATH],
    "no path": GET[:3],
    "an empty path": [*GET[:3], (":path", "")],
    "an empty method": [(":method", ""), *GET[1:]],
    "an empty scheme": [METHOD, (":scheme", ""), AUTHORITY, PATH],
    "a method with a blank": [(":method", "GET /x HTTP/1.1"), *GET[1:]],
    "a method with a line end": [(":method", "GET\r\n"), *GET[1:]],
    "a path with a line end": [*GET[:3], (":path", "/ HTTP/1.1\r\nhost: evil\r\n\r\n")],
    "a path with NUL": [*GET[:3], (":path", "/\0")],
    "an authority with a line end": [METHOD, SCHEME, (":authority", "shop.test\r\nx: y"), PATH],
    "a scheme with a line end": [METHOD, (":scheme", "http\r\n"), AUTHORITY, PATH],
    "host other than authority": [*GET, ("host", "evil.test")],
    "host with another port": [*GET, ("host", "shop.test:81")],
    "two hosts": [METHOD, SCHEME, PATH, ("host", "a.test"), ("host", "b.test")],
    "two content-lengths": [*POST, ("content-length", "1"), ("content-length", "2")],
    "a signed content-length": [*POST, ("content-length", "+1")],
    "a negative content-length": [*POST, ("content-length", "-1")],
    "a hexadecimal content-length": [*POST, ("content-length", "0x1")],
    "a list as content-length": [*POST, ("content-length", "1,1")],
    "an empty content-length": [*POST, ("content-length", "")],
    "an endless content-length": [*POST, ("content-length", "9" * 19)],
    "content-length without a body": [*POST, ("content-length", "1")],
    "CONNECT with a path": [(":method", "CONNECT"), AUTHORITY, PATH],
    "CONNECT with a scheme": [(":method", "CONNECT"), SCHEME, AUTHORITY],
    "a protocol for another method": [*GET, (":protocol", "websocket")],
    "CONNECT with a protocol and no path": [(":method", "CONNECT"), SCHEME, AUTHORITY, (":protocol", "websocket")],
    "nothing at all": [],
}


@pytest.mark.parametrize("fields", MALFORMED_REQUESTS.values(), ids=MALFORMED_REQUESTS.keys())
def test_a_malformed_request_is_reset_and_its_neighbours_are_served(fields: Fields) -> None:
    peer = Peer()
    events = peer.sends(peer.head(1, fields), peer.head(3, GET))
    reset, head = events
    assert isinstance(reset, StreamReset)
    assert (reset.stream, reset.code) == (1, PROTOCOL)
    assert isinstance(head, RequestHead)
    assert head.stream == 3
    (frame,) = peer.hears()
    assert (frame.stream_id, frame.error_code) == (1, PROTOCOL)
    peer.answers(1, 200)
    assert peer.hears() == [], "nothing more is said on a stream that was reset"


REFUSED_REQUESTS: dict[str, tuple[int, Fields]] = {
    "a blank in the path": (400, [*GET[:3], (":path", "/a b")]),
    "a blank before the path": (400, [*GET[:3], (":path", " /a")]),
    "a tab in the path": (400, [*GET[:3], (":path", "/a\tb")]),
    "a path beyond ASCII": (400, [*GET[:3], (b":path", b"/\xe4")]),
    "a path without a slash": (400, [*GET[:3], (":path", "a")]),
    "a whole URL as path": (400, [*GET[:3], (":path", "http://shop.test/")]),
    "an asterisk for GET": (400, [*GET[:3], (":path", "*")]),
    "an unknown scheme": (400, [METHOD, (":scheme", "ftp"), AUTHORITY, PATH]),
    "no host": (400, [METHOD, SCHEME, PATH]),
    "an empty authority": (400, [METHOD, SCHEME, (":authority", ""), PATH]),
    "user information": (400, [METHOD, SCHEME, (":authority", "me@shop.test"), PATH]),
    "an authority with a blank": (400, [METHOD, SCHEME, (":authority", "shop.test evil.test"), PATH]),
    "an authority with a tab": (400, [METHOD, SCHEME, (":authority", "shop.test\t"), PATH]),
    "an authority with a slash": (400, [METHOD, SCHEME, (":authority", "shop.test/x"), PATH]),
    "an authority with a comma": (400, [METHOD, SCHEME, (":authority", "shop,test"), PATH]),
    "an authority with two ports": (400, [METHOD, SCHEME, (":authority", "shop.test:1:2"), PATH]),
    "a port beyond all": (400, [METHOD, SCHEME, (":authority", "shop.test:65536"), PATH]),
    "an address without its end": (400, [METHOD, SCHEME, (":authority", "[::1"), PATH]),
    "an endless authority": (400, [METHOD, SCHEME, (":authority", "a" * 300), PATH]),
    "host with a blank": (400, [METHOD, SCHEME, PATH, ("host", "a b")]),
    "an unknown expectation": (417, [*POST, ("expect", "miracles")]),
    "an ordinary CONNECT": (403, [(":method", "CONNECT"), AUTHORITY]),
    "a protocol nobody knows": (501, [(":method", "CONNECT"), *GET[1:], (":protocol", "telnet")]),
    "too many headers": (431, [*GET, *(("x", str(number)) for number in range(101))]),
    "too large a header": (431, [*GET, ("x", "y" * 60_000), ("z", "y" * 1500)]),
    "too long a path": (431, [*GET[:3], (":path", "/" + "x" * 61_440)]),
}


@pytest.mark.parametrize(("status", "fields"), REFUSED_REQUESTS.values(), ids=REFUSED_REQUESTS.keys())
def test_a_request_that_must_not_go_on_is_answered(status: int, fields: Fields) -> None:
    peer = Peer()
    (event,) = peer.sends(peer.head(1, fields))
    assert isinstance(event, RefusedHead)
    assert (event.stream, event.status) == (1, status)
    assert peer.hears() == []
    peer.answers(1, status)
    (head,) = peer.hears()
    assert peer.decoder.decode(head.data, raw=True) == [(b":status", b"%d" % status)]
    assert peer.codec.active_streams == 0


def test_the_body_of_a_refused_request_is_passed_over_and_its_credit_returned() -> None:
    peer = Peer()
    peer.sends(peer.head(1, [*POST[:3], (":path", "/a b")], end=False))
    events = [event for _ in range(150) for event in peer.sends(data(1, bytes(16_384)))]
    assert events == []
    assert {frame.stream_id for frame in peer.hears()} == {0, 1}, "credit for stream and connection"
    peer.answers(1, 400)
    assert [frame.type for frame in peer.hears()] == [FrameType.HEADERS, FrameType.RST_STREAM]


# --- bodies and trailers of requests ------------------------------------------------------------------------------------------------------

LENGTH_4: Fields = [*POST, ("content-length", "4")]


@pytest.mark.parametrize(
    "frames",
    [
        [data(1, b"12345")],
        [data(1, b"123", END_STREAM)],
        [data(1, b"123"), data(1, b"", END_STREAM)],
        [data(1, b"12"), data(1, b"345", END_STREAM)],
        [frame(FrameType.DATA, PADDED | END_STREAM, 1, b"\x01123\0")],
    ],
    ids=["more", "less", "less, and an empty end", "more in two pieces", "padding is no body"],
)
def test_a_body_of_another_length_than_was_said_is_reset(frames: list[bytes]) -> None:
    peer = Peer()
    peer.sends(peer.head(1, LENGTH_4, end=False))
    events = peer.sends(*frames, peer.head(3, GET))
    assert not any(isinstance(event, BodyEnd) for event in events), "a body cut short is never taken for a whole one"
    assert [(event.stream, event.code) for event in events if isinstance(event, StreamReset)] == [(1, PROTOCOL)]
    assert isinstance(events[-1], RequestHead)


def test_trailers_before_the_body_is_complete_are_reset() -> None:
    peer = Peer()
    peer.sends(peer.head(1, LENGTH_4, end=False), data(1, b"123"))
    (event,) = peer.sends(peer.head(1, [("x", "y")]))
    assert isinstance(event, StreamReset)
    assert event.code == PROTOCOL


@pytest.mark.parametrize(
    "fields",
    [
        [(":path", "/")],
        [(":status", "200")],
        [("x", "y"), (":x", "z")],
        [("connection", "close")],
        [("transfer-encoding", "chunked")],
        [("X", "y")],
        [("x", "y\r\n")],
        [("", "y")],
        [("x", "y" * 61_500)],
        [("x", "y")] * 101,
    ],
)
def test_malformed_trailers_reset_their_stream(fields: Fields) -> None:
    peer = Peer()
    peer.sends(peer.head(1, POST, end=False))
    (event,) = peer.sends(peer.head(1, fields))
    assert isinstance(event, StreamReset)
    assert (event.stream, event.code) == (1, PROTOCOL)


def test_trailers_that_do_not_end_the_stream_reset_it() -> None:
    peer = Peer()
    peer.sends(peer.head(1, POST, end=False))
    (event,) = peer.sends(peer.head(1, [("x", "y")], end=False))
    assert isinstance(event, StreamReset)
    assert (event.stream, event.code) == (1, PROTOCOL)


@pytest.mark.parametrize(
    "name",
    ["content-length", "host", "te", "expect", "authorization", "cookie", "x-forwarded-for", "content-type", "trailer", "set-cookie"],
)
def test_trailers_cannot_change_what_the_head_said(name: str) -> None:
    peer = Peer()
    peer.sends(peer.head(1, POST, end=False))
    assert peer.sends(peer.head(1, [(name, "1"), ("grpc-status", "0")])) == [BodyEnd(1, [(b"grpc-status", b"0")])]


# --- frames of streams --------------------------------------------------------------------------------------------------------------------

AFTER_THE_END: dict[str, bytes] = {"DATA": data(1, b"x"), "an end": data(1, b"", END_STREAM)}


@pytest.mark.parametrize("frames", AFTER_THE_END.values(), ids=AFTER_THE_END.keys())
def test_data_after_the_end_of_a_request_resets_its_stream(frames: bytes) -> None:
    peer = Peer()
    peer.sends(peer.head(1, GET))
    (event,) = peer.sends(frames)
    assert isinstance(event, StreamReset)
    assert (event.stream, event.code) == (1, CLOSED)
    assert [(frame.stream_id, frame.error_code) for frame in peer.hears()] == [(1, CLOSED)]


def test_a_head_after_the_end_of_a_request_resets_its_stream_and_the_table_has_seen_it() -> None:
    peer = Peer()
    peer.sends(peer.head(1, GET))
    events = peer.sends(peer.head(1, [("x-new", "in the table")]), peer.head(3, [*GET, ("x-new", "in the table")]))
    assert isinstance(events[0], StreamReset)
    assert events[0].code == CLOSED
    assert isinstance(events[1], RequestHead)
    assert events[1].request.headers == [(b"x-new", b"in the table")]


def test_data_on_a_stream_that_is_over_is_answered_once_and_its_credit_is_returned() -> None:
    peer = Peer()
    peer.sends(peer.head(1, GET))
    peer.answers(1)
    peer.hears()
    assert peer.sends(*[data(1, bytes(16_384))] * 150) == []
    resets = [frame for frame in peer.hears() if frame.type == FrameType.RST_STREAM]
    assert [(frame.stream_id, frame.error_code) for frame in resets] == [(1, CLOSED)]
    assert isinstance(peer.sends(peer.head(3, GET))[0], RequestHead)


STREAM_ERRORS: dict[str, tuple[int, bytes]] = {
    "WINDOW_UPDATE by 0": (PROTOCOL, window_update_frame(1, 0)),
    "a window beyond 2^31-1": (FLOW, window_update_frame(1, MAX_WINDOW)),
    "DATA beyond the stream's window": (FLOW, b"".join([data(1, bytes(16_384))] * 17)),
}


@pytest.mark.parametrize(("code", "frames"), STREAM_ERRORS.values(), ids=STREAM_ERRORS.keys())
def test_what_breaks_a_stream_spares_the_connection(code: int, frames: bytes) -> None:
    peer = Peer()
    peer.sends(peer.head(1, POST, end=False))
    events = peer.sends(frames, peer.head(3, GET))
    assert [(event.stream, event.code) for event in events if isinstance(event, StreamReset)] == [(1, code)]
    assert isinstance(events[-1], RequestHead)
    assert [(frame.stream_id, frame.error_code) for frame in peer.hears() if frame.type == FrameType.RST_STREAM] == [(1, code)]


CONNECTION_ERRORS: dict[str, tuple[int, bytes]] = {
    "DATA on an idle stream": (PROTOCOL, data(5, b"x")),
    "DATA on a stream of ours": (PROTOCOL, data(2, b"x")),
    "DATA on stream 0": (PROTOCOL, data(0, b"x")),
    "RST_STREAM on an idle stream": (PROTOCOL, rst_stream_frame(5, 8)),
    "RST_STREAM on stream 0": (PROTOCOL, rst_stream_frame(0, 8)),
    "RST_STREAM of 3 bytes": (SIZE, frame(FrameType.RST_STREAM, 0, 1, bytes(3))),
    "WINDOW_UPDATE on an idle stream": (PROTOCOL, window_update_frame(5, 1)),
    "WINDOW_UPDATE by 0 for all": (PROTOCOL, window_update_frame(0, 0)),
    "WINDOW_UPDATE beyond 2^31-1 for all": (FLOW, window_update_frame(0, MAX_WINDOW)),
    "WINDOW_UPDATE of 5 bytes": (SIZE, frame(FrameType.WINDOW_UPDATE, 0, 1, bytes(5))),
    "PING of 7 bytes": (SIZE, frame(FrameType.PING, 0, 0, bytes(7))),
    "PING on a stream": (PROTOCOL, frame(FrameType.PING, 0, 1, bytes(8))),
    "SETTINGS on a stream": (PROTOCOL, frame(FrameType.SETTINGS, 0, 1)),
    "SETTINGS of 5 bytes": (SIZE, frame(FrameType.SETTINGS, 0, 0, bytes(5))),
    "an acknowledgement with settings": (SIZE, frame(FrameType.SETTINGS, ACK, 0, bytes(6))),
    "ENABLE_PUSH of 2": (PROTOCOL, settings((2, 2))),
    "INITIAL_WINDOW_SIZE beyond 2^31-1": (FLOW, settings((4, 1 << 31))),
    "MAX_FRAME_SIZE below 2^14": (PROTOCOL, settings((5, 16_383))),
    "MAX_FRAME_SIZE beyond 2^24-1": (PROTOCOL, settings((5, 1 << 24))),
    "ENABLE_CONNECT_PROTOCOL of 2": (PROTOCOL, settings((8, 2))),
    "PRIORITY on stream 0": (PROTOCOL, frame(FrameType.PRIORITY, 0, 0, bytes(5))),
    "PRIORITY of 4 bytes": (SIZE, frame(FrameType.PRIORITY, 0, 1, bytes(4))),
    "GOAWAY on a stream": (PROTOCOL, frame(FrameType.GOAWAY, 0, 1, bytes(8))),
    "GOAWAY of 7 bytes": (SIZE, frame(FrameType.GOAWAY, 0, 0, bytes(7))),
    "PUSH_PROMISE by a client": (PROTOCOL, frame(FrameType.PUSH_PROMISE, END_HEADERS, 1, b"\0\0\0\2\x82")),
    "CONTINUATION of nothing": (PROTOCOL, frame(FrameType.CONTINUATION, END_HEADERS, 1, b"\x82")),
    "HEADERS on stream 0": (PROTOCOL, frame(FrameType.HEADERS, END_HEADERS, 0, b"\x82")),
    "HEADERS on an even stream": (PROTOCOL, frame(FrameType.HEADERS, END_HEADERS, 4, b"\x82")),
    "HEADERS with more padding than fits": (PROTOCOL, frame(FrameType.HEADERS, END_HEADERS | PADDED, 5, b"\x05\x82")),
    "HEADERS without their padding length": (SIZE, frame(FrameType.HEADERS, END_HEADERS | PADDED, 5)),
    "HEADERS without their priority": (SIZE, frame(FrameType.HEADERS, END_HEADERS | PRIORITY_FLAG, 5, b"\0\0\0\0")),
    "padded HEADERS without their priority": (SIZE, frame(FrameType.HEADERS, END_HEADERS | PADDED | PRIORITY_FLAG, 5, b"\0\0\0\0\0")),
    "padding over the priority": (PROTOCOL, frame(FrameType.HEADERS, END_HEADERS | PADDED | PRIORITY_FLAG, 5, b"\x01\0\0\0\0\0")),
    "DATA with more padding than fits": (PROTOCOL, data(1, b"\x02x", PADDED)),
    "DATA without their padding length": (SIZE, data(1, b"", PADDED)),
    "DATA amid a header block": (PROTOCOL, frame(FrameType.HEADERS, 0, 5, b"\x82") + data(1, b"x")),
    "PING amid a header block": (PROTOCOL, frame(FrameType.HEADERS, 0, 5, b"\x82") + frame(FrameType.PING, 0, 0, bytes(8))),
    "an unknown frame amid a header block": (PROTOCOL, frame(FrameType.HEADERS, 0, 5, b"\x82") + frame(0x42, 0, 5)),
    "another stream amid a header block": (
        PROTOCOL,
        frame(FrameType.HEADERS, 0, 5, b"\x82") + frame(FrameType.CONTINUATION, 4, 7, b"\x87"),
    ),
    "a frame over the agreed size": (SIZE, frame_header(65_537, FrameType.DATA, 0, 1)),
    "an unknown frame over the agreed size": (SIZE, frame_header(65_537, 0x42, 0, 1)),
    "an index beyond the table": (COMPRESSION, frame(FrameType.HEADERS, END_HEADERS, 5, b"\xfe")),
    "index 0": (COMPRESSION, frame(FrameType.HEADERS, END_HEADERS, 5, b"\x80")),
    "a block that ends amid a field": (COMPRESSION, frame(FrameType.HEADERS, END_HEADERS, 5, b"\x82\x40\x05x")),
    "an integer without end": (COMPRESSION, frame(FrameType.HEADERS, END_HEADERS, 5, b"\xff" + b"\xff" * 10)),
    "a Huffman code of EOS": (COMPRESSION, frame(FrameType.HEADERS, END_HEADERS, 5, b"\x00\x84\xff\xff\xff\xff\x00")),
    "a table larger than allowed": (COMPRESSION, frame(FrameType.HEADERS, END_HEADERS, 5, b"\x3f\xe2\x1f")),
    "a table resized after a field": (COMPRESSION, frame(FrameType.HEADERS, END_HEADERS, 5, b"\x82\x20")),
    "a broken block on a stream that is gone": (COMPRESSION, frame(FrameType.HEADERS, END_HEADERS, 3, b"\x80")),
}


@pytest.mark.parametrize(("code", "frames"), CONNECTION_ERRORS.values(), ids=CONNECTION_ERRORS.keys())
def test_what_breaks_the_connection_ends_it_with_its_code(code: int, frames: bytes) -> None:
    peer = Peer()
    peer.sends(peer.head(1, POST, end=False), peer.head(3, GET))
    peer.codec.reset(3, ErrorCode.CANCEL)
    failure = peer.fails(frames)
    assert failure.code == code
    assert peer.codec.active_streams == 0
    assert peer.fails_again() == failure.code


def test_goaway_names_the_last_request_that_was_looked_at() -> None:
    peer = Peer()
    peer.sends(peer.head(1, GET), peer.head(7, GET))
    with pytest.raises(Exception, match="nobody opened"):
        peer.sends(data(9))
    assert peer.hears()[-1].last_stream_id == 7


@pytest.mark.parametrize("stream", [1, 5, 7])
def test_streams_are_opened_in_order(stream: int) -> None:
    peer = Peer()
    peer.sends(peer.head(1, GET), peer.head(7, GET))
    for open_stream in (1, 7):
        peer.answers(open_stream)
    peer.hears()
    assert peer.fails(peer.head(stream, GET)).code == PROTOCOL


def test_windows_of_all_streams_may_not_be_widened_beyond_what_one_may_have() -> None:
    peer = Peer()
    peer.sends(peer.head(1, GET), window_update_frame(1, MAX_WINDOW - 65_535))
    assert peer.fails(settings((4, 65_536))).code == FLOW


def test_data_beyond_the_connections_window_ends_it() -> None:
    peer = Peer()
    streams = range(1, 41, 2)
    peer.sends(*[peer.head(stream, POST, end=False) for stream in streams])
    full = [data(stream, bytes(16_384)) for stream in streams for _ in range(16)]
    peer.sends(*full)  # twenty windows of 256 KiB, of which nothing moves on: the connection's credit came back until 4 MiB waited
    more = range(41, 400, 2)
    failure = peer.fails(*[peer.head(stream, POST, end=False) + data(stream, bytes(16_384)) * 16 for stream in more])
    assert failure.code == FLOW


@pytest.mark.parametrize(
    "first",
    [frame(FrameType.PING, 0, 0, bytes(8)), frame(FrameType.SETTINGS, ACK), frame(FrameType.HEADERS, 5, 1, b"\x82"), goaway_frame(0, 0)],
    ids=["PING", "an acknowledgement", "HEADERS", "GOAWAY"],
)
def test_settings_come_first(first: bytes) -> None:
    peer = Peer.__new__(Peer)
    for codec, preface in ((Http2Server(now=StoppedClock()), PREFACE), (Http2Client(now=StoppedClock()), b"")):
        peer.codec, peer.events = codec, []
        codec.take_outgoing()
        assert peer.fails(preface + first).code == PROTOCOL


def test_another_preface_than_http2s_is_refused_at_its_first_wrong_byte() -> None:
    peer = Peer.__new__(Peer)
    peer.codec, peer.events = Http2Server(now=StoppedClock()), []
    peer.codec.take_outgoing()
    assert peer.sends(b"PRI * HTTP/2.0\r\n") == []
    assert peer.fails(b"x").code == PROTOCOL


@pytest.mark.parametrize("kind", [0x42, 0x0A, 0xFF])
def test_unknown_frames_settings_and_flags_mean_nothing(kind: int) -> None:
    peer = Peer()
    events = peer.sends(
        frame(kind, 0xFF, 9, b"whatever"),
        settings((0x99, 7), (0, 1)),
        frame(FrameType.PING, 0xFE, 0, bytes(8)),
        window_update_frame(1 << 31, 5),  # the reserved bit
        peer.head(1, GET),
    )
    assert [type(event) for event in events] == [RequestHead]


# --- responses ----------------------------------------------------------------------------------------------------------------------------

MALFORMED_RESPONSES: dict[str, Fields] = {
    "no status": [("server", "x")],
    "two statuses": [(":status", "200"), (":status", "200")],
    "a status of two digits": [(":status", "20")],
    "a status of four digits": [(":status", "2000")],
    "a status with a sign": [(":status", "+20")],
    "a status below 100": [(":status", "099")],
    "a status over 599": [(":status", "600")],
    "a status after others": [("server", "x"), (":status", "200")],
    "a pseudo-header of requests": [(":status", "200"), (":path", "/")],
    "connection": [(":status", "200"), ("connection", "close")],
    "transfer-encoding": [(":status", "200"), ("transfer-encoding", "chunked")],
    "upgrade": [(":status", "200"), ("upgrade", "h2c")],
    "keep-alive": [(":status", "200"), ("keep-alive", "1")],
    "an upper-case name": [(":status", "200"), ("Server", "x")],
    "an empty name": [(":status", "200"), ("", "x")],
    "a line end in a value": [(":status", "200"), ("x", "y\r\nset-cookie: a=b")],
    "NUL in a value": [(":status", "200"), ("x", "y\0")],
    "two content-lengths": [(":status", "200"), ("content-length", "1"), ("content-length", "2")],
    "a signed content-length": [(":status", "200"), ("content-length", "-1")],
    "101": [(":status", "101")],
    "too many headers": [(":status", "200"), *(("x", "y") for _ in range(101))],
    "too large a head": [(":status", "200"), ("x", "y" * 61_500)],
}


@pytest.mark.parametrize("fields", MALFORMED_RESPONSES.values(), ids=MALFORMED_RESPONSES.keys())
def test_a_malformed_response_resets_its_stream_only(fields: Fields) -> None:
    peer = asked_client()
    other = peer.client.send_request(request(), ended=True)
    peer.client.take_outgoing()
    reset, head = peer.sends(peer.head(1, fields, end=False), peer.head(other, [(":status", "200")]))
    assert isinstance(reset, StreamReset)
    assert (reset.stream, reset.code, reset.untouched) == (1, PROTOCOL, False)
    assert isinstance(head, ResponseHead)
    assert [(frame.stream_id, frame.error_code) for frame in peer.hears()] == [(1, PROTOCOL)]


@pytest.mark.parametrize("status", ["100", "103", "199"])
def test_an_informational_response_that_ends_its_stream_is_malformed(status: str) -> None:
    peer = asked_client()
    (event,) = peer.sends(peer.head(1, [(":status", status)]))
    assert isinstance(event, StreamReset)
    assert event.code == PROTOCOL


@pytest.mark.parametrize("frames", [[data(1, b"12345")], [data(1, b"123", END_STREAM)]], ids=["more", "less"])
def test_a_response_of_another_length_than_was_said_is_never_a_whole_one(frames: list[bytes]) -> None:
    peer = asked_client()
    events = peer.sends(peer.head(1, [(":status", "200"), ("content-length", "4")], end=False), *frames)
    assert not any(isinstance(event, BodyEnd) for event in events)
    last = events[-1]
    assert isinstance(last, StreamReset)
    assert last.code == PROTOCOL


def test_a_response_that_ends_with_its_head_may_promise_no_body() -> None:
    peer = asked_client()
    (event,) = peer.sends(peer.head(1, [(":status", "200"), ("content-length", "4")]))
    assert isinstance(event, StreamReset)
    assert event.code == PROTOCOL


def test_data_before_the_answer_resets_its_stream() -> None:
    peer = asked_client()
    (event,) = peer.sends(data(1, b"x"))
    assert isinstance(event, StreamReset)
    assert event.code == PROTOCOL


SERVER_MISTAKES: dict[str, tuple[int, bytes]] = {
    "PUSH_PROMISE": (PROTOCOL, frame(FrameType.PUSH_PROMISE, END_HEADERS, 1, b"\0\0\0\2\x82")),
    "ENABLE_PUSH": (PROTOCOL, settings((2, 1))),
    "an answer to nothing": (PROTOCOL, frame(FrameType.HEADERS, END_HEADERS, 3, b"\x88")),
    "HEADERS on a stream of its own": (PROTOCOL, frame(FrameType.HEADERS, END_HEADERS, 2, b"\x88")),
    "DATA of nothing": (PROTOCOL, data(3, b"x")),
    "a reset of nothing": (PROTOCOL, rst_stream_frame(MAX_STREAM_ID, 8)),
}


@pytest.mark.parametrize(("code", "frames"), SERVER_MISTAKES.values(), ids=SERVER_MISTAKES.keys())
def test_what_only_servers_can_do_wrong_ends_their_connection(code: int, frames: bytes) -> None:
    assert asked_client().fails(frames).code == code


# --- what we say ourselves ----------------------------------------------------------------------------------------------------------------

UNSENDABLE = [(b"x", b"a\r\nb"), (b"x", b"a\0"), (b"X", b"a"), (b"x y", b"a"), (b"x:", b"a"), (b"", b"a"), (b":path", b"/"), (b"x\n", b"a")]


@pytest.mark.parametrize("pair", UNSENDABLE)
def test_a_header_that_http2_cannot_carry_is_never_written(pair: tuple[bytes, bytes]) -> None:
    peer = Peer()
    peer.sends(peer.head(1, GET))
    for call in (
        lambda: peer.server.send_response(1, Response(200, [pair]), ended=True),
        lambda: peer.server.send_informational(1, 103, [pair]),
    ):
        with pytest.raises(LocalProtocolError):
            call()
    assert peer.hears() == []
    peer.answers(1, 502)
    assert len(peer.hears()) == 1, "another answer may follow"

    asking = Peer(Http2Client(now=StoppedClock()))
    with pytest.raises(LocalProtocolError):
        asking.client.send_request(request(headers=[pair]), ended=True)
    assert asking.hears() == []


@pytest.mark.parametrize(
    "name", [b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade", b"host", b"http2-settings"]
)
def test_headers_of_a_connection_are_left_out(name: bytes) -> None:
    peer = Peer()
    peer.sends(peer.head(1, GET))
    peer.server.send_response(1, Response(200, [(name, b"x")]), ended=True)
    (head,) = peer.hears()
    assert peer.decoder.decode(head.data, raw=True) == [(b":status", b"200")]
    asking = Peer(Http2Client(now=StoppedClock()))
    asking.client.send_request(request(headers=[(name, b"x")]), ended=True)
    (head,) = asking.hears()
    assert len(asking.decoder.decode(head.data, raw=True)) == 4


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("method", b""),
        ("method", b"CONNECT"),
        ("method", b"GET /x HTTP/1.1"),
        ("method", b"GET\r\n"),
        ("path", b""),
        ("path", b"x"),
        ("path", b"/a b"),
        ("path", b"/a\tb"),
        ("path", b"/\r\nx: y"),
        ("path", b"/\0"),
        ("authority", b"a b"),
        ("authority", b"a\nb"),
        ("scheme", b"http\r\n"),
    ],
)
def test_a_request_that_the_next_hop_could_read_as_two_is_never_written(part: str, value: bytes) -> None:
    """A route's rewrite, say, may put anything there."""
    asking = Peer(Http2Client(now=StoppedClock()))
    asked = request()
    setattr(asked, part, value)
    with pytest.raises(LocalProtocolError):
        asking.client.send_request(asked, ended=True)
    assert asking.hears() == []


@pytest.mark.parametrize("sent", [b"123", b"12345"])
def test_a_body_of_ours_that_differs_from_its_length_is_reset_not_ended(sent: bytes) -> None:
    peer = Peer()
    peer.sends(peer.head(1, GET))
    peer.server.send_response(1, Response(200, [], content_length=4), ended=False)
    peer.server.send_data(1, sent)
    peer.server.send_end(1)
    frames = peer.hears()
    assert not any("END_STREAM" in frame.flags for frame in frames)
    assert (frames[-1].type, frames[-1].error_code) == (FrameType.RST_STREAM, ErrorCode.INTERNAL_ERROR)


@pytest.mark.parametrize("between", [False, True])
def test_our_end_goes_with_the_data_that_it_follows_and_with_no_other_frame(between: bool) -> None:
    peer = Peer()
    peer.sends(peer.head(1, GET), peer.head(3, GET))
    peer.server.send_response(1, Response(200, []), ended=False)
    peer.server.send_data(1, b"body")
    if between:
        peer.server.reset(3, ErrorCode.CANCEL)
    peer.server.send_end(1)
    frames = [(frame.stream_id, frame.type, "END_STREAM" in frame.flags) for frame in peer.hears()[1:]]
    if between:
        assert frames == [(1, FrameType.DATA, False), (3, FrameType.RST_STREAM, False), (1, FrameType.DATA, True)]
    else:
        assert frames == [(1, FrameType.DATA, True)]


def test_a_table_resized_twice_at_once_is_emptied() -> None:
    """RFC 7541 section 4.2: the smallest size between two blocks must be told, for the peer may have evicted down to it."""
    peer = Peer()
    common = [(b"x-common", b"y" * 30)]
    for stream in (1, 3, 5):
        peer.sends(peer.head(stream, GET))
        peer.server.send_response(stream, Response(200, common), ended=True)
        for head in peer.hears():
            peer.decoder.decode(head.data)
    peer.sends(settings((1, 0), (1, 4096)), peer.head(7, GET))
    peer.decoder.header_table_size = 0
    peer.decoder.header_table_size = 4096
    peer.server.send_response(7, Response(200, common), ended=True)
    head = peer.hears()[-1]
    assert head.data.startswith(b"\x20")
    assert peer.decoder.decode(head.data, raw=True) == [(b":status", b"200"), *common]


@pytest.mark.parametrize("make", [lambda: Http2Client(now=lambda: 0.0), Http1Client])
@pytest.mark.parametrize("blank", [b" ", b"\t"])
@pytest.mark.parametrize("where", ["path", "authority"])
def test_no_blank_is_sent_in_a_request_line(make: Callable[[], ClientCodec], blank: bytes, where: str) -> None:
    words = {"path": b"/a", "authority": b"web"}
    words[where] += blank + b"b"
    codec = make()
    with pytest.raises(LocalProtocolError, match="blank"):
        codec.send_request(Request(b"GET", b"http", words["authority"], words["path"], []), ended=True)

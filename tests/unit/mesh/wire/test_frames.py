import struct

import pytest

from mesh.wire.errors import ErrorCode, RemoteProtocolError
from mesh.wire.frames import (
    ACK,
    END_HEADERS,
    END_STREAM,
    MAX_CONTINUATIONS,
    PADDED,
    PREFACE,
    PRIORITY_FLAG,
    FrameSplitter,
    FrameType,
    frame_header,
    goaway_frame,
    header_frames,
    rst_stream_frame,
    window_update_frame,
)

SETTINGS = frame_header(0, FrameType.SETTINGS, 0, 0)


class Recorder:
    """A sink that writes down its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []

    def on_data(self, stream: int, charged: int, piece: memoryview, end: bool) -> None:
        self.calls.append(("data", stream, charged, bytes(piece), end))

    def on_padding(self, stream: int, length: int) -> None:
        self.calls.append(("padding", stream, length))

    def on_headers(self, stream: int, block: bytes, end: bool) -> None:
        self.calls.append(("headers", stream, block, end))

    def on_reset(self, stream: int, code: int) -> None:
        self.calls.append(("reset", stream, code))

    def on_window_update(self, stream: int, increment: int) -> None:
        self.calls.append(("window", stream, increment))

    def on_goaway(self, last_stream: int, code: int, debug: bytes) -> None:
        self.calls.append(("goaway", last_stream, code, debug))

    def on_settings(self, flags: int, payload: bytes) -> None:
        self.calls.append(("settings", flags, payload))

    def on_ping(self, flags: int, payload: bytes) -> None:
        self.calls.append(("ping", flags, payload))

    def on_ignored(self, kind: int) -> None:
        self.calls.append(("ignored", kind))


def split(wire: bytes, *, settings: bool = True, max_frame_size: int = 20_000, max_block_size: int = 1000) -> list[tuple[object, ...]]:
    recorder = Recorder()
    splitter = FrameSplitter(recorder, max_frame_size=max_frame_size, max_block_size=max_block_size, expect_preface=False)
    splitter.feed(memoryview(SETTINGS + wire if settings else wire))
    return recorder.calls[1:] if settings else recorder.calls


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return frame_header(len(payload), kind, flags, stream) + payload


def test_a_whole_frame_of_data_is_one_slice_of_the_buffer() -> None:
    assert split(frame(FrameType.DATA, 0, 1, b"hello")) == [("data", 1, 5, b"hello", False)]
    assert split(frame(FrameType.DATA, END_STREAM, 1, b"hello")) == [("data", 1, 5, b"hello", True)]


def test_data_is_handed_on_before_its_frame_is_complete() -> None:
    recorder = Recorder()
    splitter = FrameSplitter(recorder, max_frame_size=20_000, max_block_size=1000, expect_preface=False)
    wire = frame(FrameType.DATA, END_STREAM, 3, b"hello")
    splitter.feed(memoryview(SETTINGS + wire[:11]))
    assert recorder.calls[1:] == [("data", 3, 5, b"", False), ("data", 3, 0, b"he", False)]
    splitter.feed(memoryview(wire[11:]))
    assert recorder.calls[3:] == [("data", 3, 0, b"llo", True)]


def test_padding_is_charged_but_never_handed_on() -> None:
    padded = frame(FrameType.DATA, PADDED | END_STREAM, 1, b"\x03abc\0\0\0")
    assert split(padded) == [("data", 1, 7, b"", False), ("padding", 1, 4), ("data", 1, 0, b"abc", True)]
    only_padding = frame(FrameType.DATA, PADDED | END_STREAM, 1, b"\x02\0\0")
    assert split(only_padding + frame(FrameType.DATA, 0, 1, b"x")) == [
        ("data", 1, 3, b"", True),
        ("padding", 1, 3),
        ("data", 1, 1, b"x", False),
    ]


def test_the_reserved_bit_of_a_stream_is_passed_over() -> None:
    assert split(frame(FrameType.DATA, 0, 0x8000_0001, b"x")) == [("data", 1, 1, b"", False), ("data", 1, 0, b"x", False)]


def test_header_blocks_are_joined_from_fragments() -> None:
    wire = (
        frame(FrameType.HEADERS, END_STREAM, 1, b"ab")
        + frame(FrameType.CONTINUATION, 0, 1)
        + frame(FrameType.CONTINUATION, END_HEADERS, 1, b"c")
    )
    assert split(wire + frame(FrameType.HEADERS, END_HEADERS, 3, b"d")) == [("headers", 1, b"abc", True), ("headers", 3, b"d", False)]


def test_headers_are_unwrapped_from_padding_and_priority() -> None:
    payload = b"\x02" + b"\0\0\0\0\x10" + b"block" + b"\0\0"
    assert split(frame(FrameType.HEADERS, END_HEADERS | PADDED | PRIORITY_FLAG, 1, payload)) == [("headers", 1, b"block", False)]


def test_small_frames_are_read() -> None:
    wire = rst_stream_frame(1, 8) + window_update_frame(0, 5) + window_update_frame(3, 2**31 - 1) + goaway_frame(7, 11, b"why")
    assert split(wire) == [("reset", 1, 8), ("window", 0, 5), ("window", 3, 2**31 - 1), ("goaway", 7, 11, b"why")]
    assert split(frame(FrameType.PING, ACK, 0, b"12345678")) == [("ping", ACK, b"12345678")]
    assert split(frame(FrameType.SETTINGS, 0, 0, bytes(12))) == [("settings", 0, bytes(12))]


def test_unknown_frames_and_priority_are_passed_over_and_counted() -> None:
    wire = frame(0x42, 0xFF, 9, b"x" * 5000) + frame(FrameType.PRIORITY, 0, 1, bytes(5)) + frame(FrameType.DATA, 0, 1)
    assert split(wire) == [("ignored", 0x42), ("ignored", FrameType.PRIORITY), ("data", 1, 0, b"", False), ("ignored", FrameType.DATA)]


def test_a_preface_is_recognised_in_any_portions() -> None:
    recorder = Recorder()
    splitter = FrameSplitter(recorder, max_frame_size=20_000, max_block_size=1000, expect_preface=True)
    for byte in PREFACE + SETTINGS:
        splitter.feed(memoryview(bytes([byte])))
    assert recorder.calls == [("settings", 0, b"")]


@pytest.mark.parametrize("wire", [b"GET / HTTP/1.1\r\n", b"PRI * HTTP/2.0\r\n\r\nXX", SETTINGS, b"\x16\x03\x01"])
def test_a_wrong_preface_is_refused_at_its_first_wrong_byte(wire: bytes) -> None:
    splitter = FrameSplitter(Recorder(), max_frame_size=20_000, max_block_size=1000, expect_preface=True)
    with pytest.raises(RemoteProtocolError, match="preface"):
        splitter.feed(memoryview(wire))


@pytest.mark.parametrize(
    "first", [frame(FrameType.PING, 0, 0, bytes(8)), frame(FrameType.SETTINGS, ACK, 0), frame(0x42, 0, 0), window_update_frame(0, 1)]
)
def test_the_first_frame_must_be_settings(first: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="first frame"):
        split(first, settings=False)


P, S, C = ErrorCode.PROTOCOL_ERROR, ErrorCode.FRAME_SIZE_ERROR, ErrorCode.ENHANCE_YOUR_CALM


@pytest.mark.parametrize(
    ("code", "wire"),
    [
        pytest.param(P, frame(FrameType.DATA, 0, 0, b"x"), id="DATA on stream 0"),
        pytest.param(P, frame(FrameType.HEADERS, END_HEADERS, 0, b"x"), id="HEADERS on stream 0"),
        pytest.param(P, frame(FrameType.RST_STREAM, 0, 0, bytes(4)), id="RST_STREAM on stream 0"),
        pytest.param(P, frame(FrameType.SETTINGS, 0, 1), id="SETTINGS on a stream"),
        pytest.param(P, frame(FrameType.PING, 0, 1, bytes(8)), id="PING on a stream"),
        pytest.param(P, frame(FrameType.GOAWAY, 0, 1, bytes(8)), id="GOAWAY on a stream"),
        pytest.param(P, frame(FrameType.PUSH_PROMISE, END_HEADERS, 1, bytes(8)), id="PUSH_PROMISE"),
        pytest.param(P, frame(FrameType.CONTINUATION, END_HEADERS, 1, b"x"), id="CONTINUATION of nothing"),
        pytest.param(P, frame(FrameType.HEADERS, 0, 1, b"x") + frame(FrameType.DATA, 0, 1, b"x"), id="DATA amid a header block"),
        pytest.param(P, frame(FrameType.HEADERS, 0, 1, b"x") + frame(0x42, 0, 1), id="unknown frame amid a header block"),
        pytest.param(P, frame(FrameType.HEADERS, 0, 1, b"x") + frame(FrameType.CONTINUATION, 0, 3), id="CONTINUATION of another stream"),
        pytest.param(P, frame(FrameType.DATA, PADDED, 1, b"\x03\0\0"), id="more padding than DATA"),
        pytest.param(S, frame(FrameType.DATA, PADDED, 1), id="no padding length in DATA"),
        pytest.param(P, frame(FrameType.HEADERS, PADDED | END_HEADERS, 1, b"\x03\0\0"), id="more padding than HEADERS"),
        pytest.param(
            P,
            frame(FrameType.HEADERS, PADDED | PRIORITY_FLAG | END_HEADERS, 1, b"\x01\0\0\0\0\0"),
            id="more padding than is beside priority",
        ),
        pytest.param(P, frame(FrameType.PRIORITY, 0, 0, bytes(5)), id="PRIORITY on stream 0"),
        pytest.param(S, frame(FrameType.HEADERS, PADDED | END_HEADERS, 1), id="no padding length in HEADERS"),
        pytest.param(S, frame(FrameType.HEADERS, PRIORITY_FLAG | END_HEADERS, 1, b"\0\0"), id="no room for priority"),
        pytest.param(S, frame_header(20_001, FrameType.DATA, 0, 1), id="DATA over the frame size"),
        pytest.param(S, frame_header(20_001, 0x42, 0, 1), id="unknown frame over the frame size"),
        pytest.param(S, frame(FrameType.RST_STREAM, 0, 1, bytes(5)), id="RST_STREAM of 5 bytes"),
        pytest.param(S, frame(FrameType.WINDOW_UPDATE, 0, 1, bytes(3)), id="WINDOW_UPDATE of 3 bytes"),
        pytest.param(S, frame(FrameType.PING, 0, 0, bytes(7)), id="PING of 7 bytes"),
        pytest.param(S, frame(FrameType.GOAWAY, 0, 0, bytes(7)), id="GOAWAY of 7 bytes"),
        pytest.param(S, frame(FrameType.SETTINGS, 0, 0, bytes(7)), id="SETTINGS of 7 bytes"),
        pytest.param(S, frame(FrameType.SETTINGS, ACK, 0, bytes(6)), id="SETTINGS with ACK and a payload"),
        pytest.param(S, frame(FrameType.PRIORITY, 0, 1, bytes(4)), id="PRIORITY of 4 bytes"),
        pytest.param(C, frame_header(16_386, FrameType.SETTINGS, 0, 0), id="SETTINGS without end"),
        pytest.param(C, frame_header(16_390, FrameType.GOAWAY, 0, 0), id="GOAWAY with a novel"),
        pytest.param(C, frame_header(1300, FrameType.HEADERS, END_HEADERS, 1), id="a header block over the limit, before it is read"),
        pytest.param(
            C, frame(FrameType.HEADERS, 0, 1, bytes(900)) + frame_header(400, FrameType.CONTINUATION, 0, 1), id="the same in fragments"
        ),
        pytest.param(
            C, frame(FrameType.HEADERS, 0, 1) + frame(FrameType.CONTINUATION, 0, 1) * (MAX_CONTINUATIONS + 1), id="CONTINUATION without end"
        ),
    ],
)
def test_a_frame_that_breaks_the_rules_is_refused(code: ErrorCode, wire: bytes) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        split(wire)
    assert caught.value.code == code


def test_a_block_larger_than_a_frame_is_written_in_fragments() -> None:
    block = bytes(range(250)) * 3
    wire = header_frames(5, block, end_stream=True, max_frame_size=300)
    assert [struct.unpack_from(">I", wire, at)[0] >> 8 for at in (0, 309, 618)] == [300, 300, 150]
    assert split(wire) == [("headers", 5, block, True)]
    assert split(header_frames(5, block, end_stream=False, max_frame_size=750)) == [("headers", 5, block, False)]

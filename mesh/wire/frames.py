"""Cuts a byte stream into HTTP/2 frames, and nothing more: no stream states, no windows, no HPACK (RFC 9113 section 4 and 6).

Payload of DATA is never collected: a piece of a frame is handed on as a slice of the very buffer that was fed. Header blocks are
joined from HEADERS and CONTINUATION, other frames are small; both are bounded before a byte of them is kept.
"""

from __future__ import annotations

from enum import Enum, IntEnum
from struct import Struct
from typing import Final, Protocol

from mesh.wire.errors import ErrorCode, RemoteProtocolError

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

MAX_STREAM_ID: Final = 2**31 - 1
MAX_WINDOW: Final = 2**31 - 1
DEFAULT_WINDOW: Final = 65_535
DEFAULT_FRAME_SIZE: Final = 16_384

# SETTINGS and GOAWAY (with its free text) are read whole, whatever frame size was agreed for DATA: this is the least that RFC 9113
# section 4.2 obliges us to take, and room for 2730 settings.
MAX_CONTROL_PAYLOAD: Final = DEFAULT_FRAME_SIZE

# h2 takes 64 CONTINUATIONs, Go's net/http refuses blocks over the header list's size. A 64 KiB block in 16 KiB frames has 3;
# room for a peer that cuts finely, but an endless sequence ends here (CVE-2024-27316 and its siblings).
MAX_CONTINUATIONS: Final = 16

END_STREAM: Final = 0x1
ACK: Final = 0x1  # of SETTINGS and PING
END_HEADERS: Final = 0x4
PADDED: Final = 0x8
PRIORITY_FLAG: Final = 0x20

FRAME_HEADER_SIZE: Final = 9


class FrameType(IntEnum):
    DATA = 0x0
    HEADERS = 0x1
    PRIORITY = 0x2
    RST_STREAM = 0x3
    SETTINGS = 0x4
    PUSH_PROMISE = 0x5
    PING = 0x6
    GOAWAY = 0x7
    WINDOW_UPDATE = 0x8
    CONTINUATION = 0x9


_DATA, _HEADERS = int(FrameType.DATA), int(FrameType.HEADERS)  # members of an enum are slower to find and to compare

_CONTINUATION, _WINDOW_UPDATE = int(FrameType.CONTINUATION), int(FrameType.WINDOW_UPDATE)

_HEADER = Struct(">IBI")  # length and type share the first 32 bits
_read_header = _HEADER.unpack_from
_U32 = Struct(">I")
_U32_U32 = Struct(">II")

_NOTHING = memoryview(b"")

_BLOCK_FRAMES = frozenset({FrameType.HEADERS, FrameType.CONTINUATION})
_CONNECTION_FRAMES = frozenset({FrameType.SETTINGS, FrameType.PING, FrameType.GOAWAY})
_SMALL_FRAMES = _BLOCK_FRAMES | _CONNECTION_FRAMES | {FrameType.RST_STREAM, FrameType.WINDOW_UPDATE}
_FIXED_SIZES: dict[int, int] = {FrameType.RST_STREAM: 4, FrameType.WINDOW_UPDATE: 4, FrameType.PING: 8}
_BLOCK_OVERHEAD = 1 + 255 + 5  # padding and priority of HEADERS, which are no part of the block


def frame_header(length: int, kind: int, flags: int, stream: int) -> bytes:
    """The 9 bytes before a payload of ``length`` bytes."""
    return _HEADER.pack(length << 8 | kind, flags, stream)


def window_update_frame(stream: int, increment: int) -> bytes:
    return _HEADER.pack(4 << 8 | _WINDOW_UPDATE, 0, stream) + _U32.pack(increment)


def rst_stream_frame(stream: int, code: int) -> bytes:
    return _HEADER.pack(4 << 8 | FrameType.RST_STREAM, 0, stream) + _U32.pack(code)


def goaway_frame(last_stream: int, code: int, debug: bytes = b"") -> bytes:
    return _HEADER.pack((8 + len(debug)) << 8 | FrameType.GOAWAY, 0, 0) + _U32_U32.pack(last_stream, code) + debug


def header_frames(stream: int, block: bytes, *, end_stream: bool, max_frame_size: int) -> bytes:
    """A header block as HEADERS and as many CONTINUATIONs as the peer's frame size asks for."""
    flags = END_STREAM if end_stream else 0
    if len(block) <= max_frame_size:
        return _HEADER.pack(len(block) << 8 | _HEADERS, flags | END_HEADERS, stream) + block
    frames = bytearray()
    for start in range(0, len(block), max_frame_size):
        fragment = block[start : start + max_frame_size]
        kind = _CONTINUATION if start else _HEADERS
        last = END_HEADERS if start + max_frame_size >= len(block) else 0
        frames += frame_header(len(fragment), kind, last | (0 if start else flags), stream) + fragment
    return bytes(frames)


class FrameSink(Protocol):
    """What a `FrameSplitter` found, in the order of the wire. Any of these may raise RemoteProtocolError; the splitter is then dead."""

    def on_data(self, stream: int, charged: int, piece: memoryview, end: bool) -> None:
        """A piece of DATA, maybe empty. ``charged`` is the frame's whole length with its padding on the first piece (which may come before
        any payload has) and 0 on the others: what flow control deducts. ``end``: END_STREAM is set and no more payload follows."""

    def on_padding(self, stream: int, length: int) -> None:
        """So many of the bytes that ``on_data`` charged will never be handed on."""

    def on_headers(self, stream: int, block: bytes, end: bool) -> None:
        """A whole header block, fragments joined."""

    def on_reset(self, stream: int, code: int) -> None: ...

    def on_window_update(self, stream: int, increment: int) -> None:
        """``stream`` 0 is the connection. ``increment`` is 0 to 2^31-1; 0 is an error that the sink must raise."""

    def on_goaway(self, last_stream: int, code: int, debug: bytes) -> None:
        """``debug``: the peer's own words."""

    def on_settings(self, flags: int, payload: bytes) -> None: ...

    def on_ping(self, flags: int, payload: bytes) -> None:
        """``payload`` has 8 bytes."""

    def on_ignored(self, kind: int) -> None:
        """A frame that changes nothing (PRIORITY, unknown type, empty DATA): only to be counted."""


class _Reading(Enum):
    """What the next byte belongs to."""

    PREFACE = "preface"
    FRAME_HEADER = "frame header"
    PAD_LENGTH = "first byte of a padded DATA"
    DATA = "payload of DATA, handed on as it comes"
    SMALL = "payload of any other frame, collected"
    SKIPPED = "bytes that nobody needs: padding, unknown frames"


_FRAME_HEADER, _SMALL = _Reading.FRAME_HEADER, _Reading.SMALL  # members of an enum are slower to find


class FrameSplitter:
    """Feed it bytes in any portions; it calls its sink. However the bytes are cut, the calls are the same but for the pieces of DATA."""

    __slots__ = (
        "_block",
        "_block_ends_stream",
        "_block_frames",
        "_block_stream",
        "_flags",
        "_kind",
        "_left",
        "_max_block_size",
        "_padding",
        "_partial",
        "_plain",
        "_reading",
        "_settings_seen",
        "_sink",
        "_stream",
        "between_frames",
        "max_frame_size",
    )

    def __init__(self, sink: FrameSink, *, max_frame_size: int, max_block_size: int, expect_preface: bool) -> None:
        self._sink = sink
        self.max_frame_size = max_frame_size
        self._max_block_size = max_block_size
        self._reading = _Reading.PREFACE if expect_preface else _Reading.FRAME_HEADER
        self._left = len(PREFACE) if expect_preface else FRAME_HEADER_SIZE  # bytes still to come of what `_reading` names
        self._partial = bytearray()  # what has come of a preface, frame header or small payload
        self._settings_seen = False
        self._plain = False  # any frame may come now: SETTINGS came first, and no header block is open
        self.between_frames = False
        """Any frame may come now, and no other is half read. One that a sink takes by itself leaves no trace here."""
        # The frame being read.
        self._kind = 0
        self._flags = 0
        self._stream = 0
        self._padding = 0  # bytes to skip after its payload
        # The header block being joined.
        self._block = bytearray()
        self._block_stream = 0  # 0: none is open
        self._block_frames = 0
        self._block_ends_stream = False

    def feed(self, data: memoryview) -> None:
        """Take the next bytes (a one-dimensional view of unsigned bytes). Raises RemoteProtocolError; then feed it no more."""
        at = 0
        size = len(data)
        self.between_frames = False  # and so it stays when the sink raises
        on_data, on_headers = self._sink.on_data, self._sink.on_headers
        largest, last = self.max_frame_size << 8 | 0xFF, size - FRAME_HEADER_SIZE
        while at < size:
            if at > last or self._reading is not _FRAME_HEADER or self._partial:
                at = self._go_on(data, at, size)
                continue
            # One after the other, frames that are there whole and have nothing peculiar about them: payload, an end of a tunnel, a request
            # or an answer. They leave the state as it is.
            word, flags, stream = _read_header(data, at)
            start = at + FRAME_HEADER_SIZE
            end = start + (word >> 8)
            while self._plain and end <= size and word <= largest and 0 < stream <= MAX_STREAM_ID:
                kind = word & 0xFF
                if kind == _DATA:
                    if flags & PADDED or not (word or flags & END_STREAM):
                        break
                    on_data(stream, word >> 8, data[start:end], flags & END_STREAM != 0)
                elif kind == _HEADERS and flags & ~END_STREAM == END_HEADERS and word >> 8 <= self._max_block_size:
                    on_headers(stream, bytes(data[start:end]), flags & END_STREAM != 0)
                else:
                    break
                at = end
                if at > last:
                    break
                word, flags, stream = _read_header(data, at)
                start = at + FRAME_HEADER_SIZE
                end = start + (word >> 8)
            if at > last:
                continue
            self._start_frame(word >> 8, word & 0xFF, flags, stream & MAX_STREAM_ID)
            at = start
            if end <= size and self._reading is _SMALL:  # all of it is there: nothing to collect
                self._finish_small(bytes(data[at:end]))
                at = end
        self.between_frames = self._plain and self._reading is _FRAME_HEADER and not self._partial

    def _go_on(self, data: memoryview, at: int, size: int) -> int:
        """Take what is there of what is half read; returns the position after it."""
        end = min(at + self._left, size)
        piece = data[at:end]
        self._left -= end - at
        complete = self._left == 0
        match self._reading:
            case _Reading.DATA:
                if complete:
                    self._skip(self._padding)
                self._sink.on_data(self._stream, 0, piece, complete and self._flags & END_STREAM != 0)
            case _Reading.SKIPPED:
                if complete:
                    self._skip(0)
            case _Reading.PAD_LENGTH:
                self._start_padded_data(piece[0])
            case _Reading.FRAME_HEADER:
                self._partial += piece
                if complete:
                    word, flags, stream = _HEADER.unpack(self._taken())
                    self._start_frame(word >> 8, word & 0xFF, flags, stream & MAX_STREAM_ID)
            case _Reading.SMALL:
                self._partial += piece
                if complete:
                    self._finish_small(self._taken())
            case _Reading.PREFACE:
                self._partial += piece
                if not PREFACE.startswith(self._partial):
                    raise RemoteProtocolError("no HTTP/2 preface")
                if complete:
                    self._taken()
                    self._skip(0)
        return end

    def _taken(self) -> bytes:
        whole = bytes(self._partial)
        self._partial.clear()
        return whole

    def _read(self, reading: _Reading, length: int) -> None:
        self._reading = reading
        self._left = length

    def _skip(self, length: int) -> None:
        """Pass over so many bytes, then read the next frame."""
        if length:
            self._read(_Reading.SKIPPED, length)
        else:
            self._read(_FRAME_HEADER, FRAME_HEADER_SIZE)

    # --- the start of a frame: everything that can be refused by its header is refused before its payload is read ----------------------

    def _start_frame(self, length: int, kind: int, flags: int, stream: int) -> None:
        self._kind, self._flags, self._stream = kind, flags, stream
        if length > self.max_frame_size:
            raise RemoteProtocolError(f"frame of {length} bytes, over the {self.max_frame_size} agreed", ErrorCode.FRAME_SIZE_ERROR)
        if not self._plain:
            self._check_sequence(kind, flags, stream)
        if kind == FrameType.DATA:
            self._start_data(length)
        elif kind in _SMALL_FRAMES:
            self._check_small(length)
            if length:
                self._read(_Reading.SMALL, length)
            else:
                self._finish_small(b"")
        elif kind == FrameType.PUSH_PROMISE:
            raise RemoteProtocolError("PUSH_PROMISE, which nobody may send here")
        else:  # unknown types are ignored (RFC 9113 section 4.1), PRIORITY means nothing any more (section 5.3.2)
            if kind == FrameType.PRIORITY and (stream == 0 or length != 5):
                code = ErrorCode.FRAME_SIZE_ERROR if stream else ErrorCode.PROTOCOL_ERROR
                raise RemoteProtocolError(f"PRIORITY of {length} bytes on stream {stream}", code)
            self._skip(length)
            self._sink.on_ignored(kind)

    def _check_sequence(self, kind: int, flags: int, stream: int) -> None:
        if not self._settings_seen:  # RFC 9113 section 3.4
            if kind != FrameType.SETTINGS or flags & ACK:
                raise RemoteProtocolError("the first frame is not SETTINGS")
            self._settings_seen = self._plain = True
        elif kind != FrameType.CONTINUATION or stream != self._block_stream:  # section 4.3
            raise RemoteProtocolError("a frame amid the header block of another")

    def _start_data(self, length: int) -> None:
        if self._stream == 0:
            raise RemoteProtocolError("DATA on stream 0")
        if self._flags & PADDED:
            if length == 0:
                raise RemoteProtocolError("padded DATA without a padding length", ErrorCode.FRAME_SIZE_ERROR)
            self._padding = length - 1  # what is left for payload and padding: the next byte tells them apart
            self._read(_Reading.PAD_LENGTH, 1)
            return
        self._padding = 0
        self._charge_data(length, length)

    def _start_padded_data(self, padding: int) -> None:
        payload = self._padding - padding
        if payload < 0:
            raise RemoteProtocolError("more padding than frame")
        charged = self._padding + 1
        self._padding = padding
        self._charge_data(charged, payload)
        self._sink.on_padding(self._stream, padding + 1)

    def _charge_data(self, charged: int, payload: int) -> None:
        if payload:
            self._read(_Reading.DATA, payload)
        else:
            self._skip(self._padding)
        end = self._flags & END_STREAM != 0
        self._sink.on_data(self._stream, charged, _NOTHING, end and not payload)
        if not payload and not end:
            self._sink.on_ignored(FrameType.DATA)

    def _check_small(self, length: int) -> None:
        kind, stream = self._kind, self._stream
        if (stream == 0) != (kind in _CONNECTION_FRAMES) and kind != FrameType.WINDOW_UPDATE:
            raise RemoteProtocolError(f"{FrameType(kind).name} on stream {stream}")
        if kind in _BLOCK_FRAMES:
            if kind == FrameType.CONTINUATION and not self._block_stream:
                raise RemoteProtocolError("CONTINUATION without HEADERS")
            if self._block_frames > MAX_CONTINUATIONS:
                raise RemoteProtocolError("header block in too many pieces", ErrorCode.ENHANCE_YOUR_CALM)
            if len(self._block) + length > self._max_block_size + _BLOCK_OVERHEAD:
                raise RemoteProtocolError(f"header block of over {self._max_block_size} bytes", ErrorCode.ENHANCE_YOUR_CALM)
            return
        exact = _FIXED_SIZES.get(kind)
        if exact is not None and length != exact:
            raise RemoteProtocolError(f"{FrameType(kind).name} of {length} bytes", ErrorCode.FRAME_SIZE_ERROR)
        if length > MAX_CONTROL_PAYLOAD:
            raise RemoteProtocolError(f"{FrameType(kind).name} of {length} bytes", ErrorCode.ENHANCE_YOUR_CALM)
        if kind == FrameType.GOAWAY and length < 8:
            raise RemoteProtocolError(f"GOAWAY of {length} bytes", ErrorCode.FRAME_SIZE_ERROR)
        if kind == FrameType.SETTINGS and (length if self._flags & ACK else length % 6):
            raise RemoteProtocolError(f"SETTINGS of {length} bytes", ErrorCode.FRAME_SIZE_ERROR)

    # --- the end of a small frame ----------------------------------------------------------------------------------------------------

    def _finish_small(self, payload: bytes) -> None:
        self._skip(0)
        sink = self._sink
        match self._kind:
            case FrameType.HEADERS | FrameType.CONTINUATION:
                self._join_block(payload)
            case FrameType.RST_STREAM:
                sink.on_reset(self._stream, _U32.unpack(payload)[0])
            case FrameType.WINDOW_UPDATE:
                sink.on_window_update(self._stream, _U32.unpack(payload)[0] & MAX_WINDOW)
            case FrameType.GOAWAY:
                last_stream, code = _U32_U32.unpack_from(payload)
                sink.on_goaway(last_stream & MAX_STREAM_ID, code, payload[8:])
            case FrameType.SETTINGS:
                sink.on_settings(self._flags, payload)
            case FrameType.PING:
                sink.on_ping(self._flags, payload)

    def _join_block(self, payload: bytes) -> None:
        if self._kind == FrameType.HEADERS:
            payload = _unwrapped(payload, self._flags)
            ends_stream = self._flags & END_STREAM != 0
            if self._flags & END_HEADERS:  # nearly always
                self._sink.on_headers(self._stream, payload, ends_stream)
                return
            self._block_stream, self._block_frames, self._block_ends_stream = self._stream, 0, ends_stream
            self._plain = False
        self._block_frames += 1
        self._block += payload
        if self._flags & END_HEADERS:
            block = bytes(self._block)
            self._block.clear()
            self._block_stream, self._block_frames = 0, 0
            self._plain = True
            self._sink.on_headers(self._stream, block, self._block_ends_stream)


def _unwrapped(payload: bytes, flags: int) -> bytes:
    """The header block fragment of a HEADERS frame, without padding and the priority fields (RFC 9113 section 6.2)."""
    start, end = 0, len(payload)
    if flags & PADDED:
        if not payload:
            raise RemoteProtocolError("padded HEADERS without a padding length", ErrorCode.FRAME_SIZE_ERROR)
        start, end = 1, end - payload[0]
    if flags & PRIORITY_FLAG:
        start += 5
        if start > len(payload):
            raise RemoteProtocolError("HEADERS too short for their priority", ErrorCode.FRAME_SIZE_ERROR)
    if start > end:
        raise RemoteProtocolError("HEADERS with more padding than fits")
    return payload[start:end]

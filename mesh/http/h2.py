"""HTTP/2 without its I/O, both ends (RFC 9113, and RFC 8441 for WebSockets).

Theory of operation. Frames are cut, header blocks read and SETTINGS kept by what HBONE uses too (`mesh.wire.frames`, `mesh.wire.headers`,
`mesh.wire.settings`); streams, windows, floods and the meaning of headers are here. Why all this, and not the h2 library, which the
tests have as the other side: docs/design/decisions/0007-http2.md.

- What breaks one stream resets that stream; `StreamReset` says why, also of streams that no `RequestHead` told of: pass over those. What
  breaks the connection is a RemoteProtocolError, with GOAWAY among the outgoing bytes; events of the same portion are lost with it.
- A stream may end by the peer's doing at any time. Whatever names a stream that is no more does nothing, and `room` is 0.
- The connection's credit returns on arrival, a stream's when its bytes were `consumed`: one slow body holds up no other. Beyond
  `MAX_WAITING` bytes that wait on one connection its credit is held back.
- Useless frames (PING, SETTINGS, PRIORITY, empty DATA, WINDOW_UPDATE beyond what our own traffic explains, stream errors) are counted in
  points that grow back with time (`mesh.wire.hbone.patience`), CONTINUATIONs by the block, and streams that a client gives up before they
  are answered as Envoy counts them: from 500 on they may not be half of all.
- A protocol that is upgraded to has one form, HTTP/1.1's: the method is GET, the answer 101. On the wire they are CONNECT and 200.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from struct import Struct
from typing import Final, Generic, NamedTuple, TypeVar

from mesh.http.blocks import BlockWriter
from mesh.http.codec import BodyData, BodyEnd, Event, GoingAway, RefusedHead, RequestHead, ResponseHead, StreamReset
from mesh.http.headers import (
    FIELD_TEXT,
    FRAMING,
    LOWER_TOKEN,
    SPACE,
    TAB,
    TOKEN,
    BadHead,
    check_authority,
    clean_trailers,
    read_length,
)
from mesh.http.message import Headers, Request, Response, Version
from mesh.http.options import HeadLimits, ServerOptions
from mesh.http.path import BadPath, normalise
from mesh.wire.errors import ErrorCode, LocalProtocolError, RemoteProtocolError
from mesh.wire.frames import (
    ACK,
    DEFAULT_FRAME_SIZE,
    DEFAULT_WINDOW,
    END_HEADERS,
    END_STREAM,
    MAX_STREAM_ID,
    MAX_WINDOW,
    FrameSplitter,
    FrameType,
    frame_header,
    goaway_frame,
    header_frames,
    rst_stream_frame,
    window_update_frame,
)
from mesh.wire.hbone import patience
from mesh.wire.hbone.streams import Direction, Stream
from mesh.wire.headers import REMEMBERED_BLOCKS, Fields, HeaderReader, MalformedHeaders
from mesh.wire.settings import SETTINGS_ACK, PeerSettings, SettingCode, opening

CONNECTION_WINDOW: Final = 4 << 20
_LOW_WINDOW: Final = CONNECTION_WINDOW // 2
MAX_WAITING: Final = 4 << 20
"""Bytes handed out and not consumed, of all streams together, beyond which the connection's credit is held back."""
MAX_FRAME_SIZE: Final = 64 * 1024
MAX_BLOCK: Final = 96 * 1024
"""Bytes of a header block: Huffman's code costs us 0.2 us a byte. A larger one ends the connection."""
MAX_LIST: Final = 256 * 1024
"""Bytes of the fields in it, likewise. What is below both and over the head's limits gets a 431."""
MAX_HEADS: Final = 8 << 20
"""Bytes of the heads of all requests under way, beyond which more get REFUSED_STREAM: a thousand of the usual size, and not a thousand of
60 KiB, each of which HPACK lets a client ask for with a few bytes."""
ASSUMED_STREAMS: Final = 100
"""Requests at once that a server is taken to allow before its SETTINGS have come."""
MIN_STREAMS_TO_JUDGE: Final = 500
MAX_COURTESY: Final = 10_000

_REMEMBERED_RESETS: Final = 1024
_CROSSING: Final = 4
"""Weightless frames on a stream that may have been sent before our reset was read: two informational responses, a head, and an end."""
_LONGEST_WHY: Final = 200
_OWN_PING: Final = b"\xffgoodbye"
_OPEN, _SILENT, _ENDED = Direction.OPEN, Direction.SILENT, Direction.ENDED  # members of an enum are slower to find
_DATA, _HEADERS = int(FrameType.DATA), int(FrameType.HEADERS)
_pack_header: Final = Struct(">IBI").pack
"""`frame_header` for payload, whose first word is its length and type."""
_UNCOUNTED: Final = -1
_OVERSIZED: Final = 50
"""Points of patience for a head that gets a 431."""
_BLANKS: Final = b" \t"


T = TypeVar("T")


class _Remembered(Generic[T]):
    """What was made of fields, for as long as their reader may give the same object again. Held by it, so that no other can have its id."""

    __slots__ = ("_made", "_reader")

    def __init__(self, reader: HeaderReader) -> None:
        self._reader = reader
        self._made: dict[int, tuple[Fields, T]] = {}

    def find(self, fields: Fields) -> T | None:
        made = self._made.get(id(fields))
        return None if made is None else made[1]

    def keep(self, fields: Fields, made: T) -> T:
        """Of fields that were read last; it is nobody's to change."""
        if self._reader.steady:
            if len(self._made) >= REMEMBERED_BLOCKS:
                self._made.clear()
            self._made[id(fields)] = fields, made
        return made


class _Stream(Stream):
    """One request and its response. ``left`` and ``to_send``: bytes of either body that are still due, or `_UNCOUNTED`."""

    __slots__ = ("answered", "bodiless", "dropped", "head", "left", "to_send", "upgrade", "weight")

    def __init__(self, stream_id: int, receive_window: int, send_window: int) -> None:
        super().__init__(stream_id, receive_window, send_window)
        self.left = _UNCOUNTED
        self.to_send = _UNCOUNTED
        self.head = False
        """The method is HEAD."""
        self.bodiless = False
        """Server: the response has no body, whatever its content-length says."""
        self.dropped = False
        """Server: the request was refused, and nobody wants the rest of it."""
        self.upgrade = False
        self.answered = False
        self.weight = 0
        """Server: bytes of the request's head."""


class _Http2(ABC):
    """What both ends have in common. See the module."""

    __slots__ = (
        "_courtesy", "_ended", "_events", "_failure", "_goaway_received", "_goaway_sent", "_heads", "_initial_send_window",
        "_known_trailers", "_limits", "_max_frame_size", "_parts", "_patience", "_peer", "_peer_max_streams", "_reader",
        "_receive_window", "_reset_here", "_send_window", "_settings_seen", "_splitter", "_stream_credit_portion",
        "_stream_window", "_streams", "_tail", "_waiting", "_writer", "pings", "unsent",
    )  # fmt: skip

    def __init__(
        self,
        *,
        now: Callable[[], float],
        server: bool,
        limits: HeadLimits,
        stream_window: int,
        settings: Mapping[SettingCode, int],
    ) -> None:
        self._limits = limits
        self._patience = patience.Patience(now)
        self._courtesy = 0  # WINDOW_UPDATEs and PINGs that our own traffic explains
        self._peer = PeerSettings(of_server=not server)
        self._splitter = FrameSplitter(self, max_frame_size=MAX_FRAME_SIZE, max_block_size=MAX_BLOCK, expect_preface=server)
        self._reader = HeaderReader(MAX_LIST, remembers=True)
        self._known_trailers: _Remembered[Headers] = _Remembered(self._reader)
        self._writer = BlockWriter()
        self._events: list[Event] = []
        self._parts: list[bytes] = []
        self.unsent = 0
        self._tail = 0  # the stream whose DATA is the last thing in `_parts`
        self._failure: RemoteProtocolError | None = None
        self._ended = False
        self._streams: dict[int, _Stream] = {}
        self._reset_here: dict[int, int] = {}  # in order of age; how many weightless frames may still cross our reset
        self._stream_window = stream_window
        self._stream_credit_portion = stream_window // 4
        self._receive_window = CONNECTION_WINDOW
        self._waiting = 0
        self._heads = 0
        self._send_window = DEFAULT_WINDOW
        self._initial_send_window = DEFAULT_WINDOW
        self._max_frame_size = DEFAULT_FRAME_SIZE
        self._peer_max_streams = ASSUMED_STREAMS
        self._settings_seen = False
        self._goaway_received = False
        self._goaway_sent = False
        self.pings = 0
        """Of ours, that wait for their answer."""
        said = {
            **settings,
            SettingCode.INITIAL_WINDOW_SIZE: stream_window,
            SettingCode.MAX_FRAME_SIZE: MAX_FRAME_SIZE,
            SettingCode.MAX_HEADER_LIST_SIZE: limits.size,
        }
        self._write(opening(said, server=server))
        self._write(window_update_frame(0, CONNECTION_WINDOW - DEFAULT_WINDOW))

    # --- facts -------------------------------------------------------------------------------------------------------------------------

    @property
    def wants_data(self) -> bool:
        """Windows hold bodies back; everything else must always be read."""
        return True

    @property
    @abstractmethod
    def finished(self) -> bool: ...

    @property
    def active_streams(self) -> int:
        return len(self._streams)

    def take_outgoing(self) -> bytes:
        parts = self._parts
        if not parts:
            return b""
        self._parts = []
        self.unsent = self._tail = 0
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def room(self, stream: int) -> int:
        state = self._streams.get(stream)
        if state is None or state.sending is not _OPEN:
            return 0
        window = self._send_window
        if state.send_window < window:
            window = state.send_window
        return window if window > 0 else 0

    # --- what the driver does ----------------------------------------------------------------------------------------------------------

    def receive(self, data: bytes | memoryview) -> Sequence[Event]:
        """Raises RemoteProtocolError, and again on every later call."""
        if self._failure is not None:
            raise RemoteProtocolError(self._failure.reason, self._failure.code)
        events: list[Event] = []
        if self._events:  # made by a call of the driver's
            events, self._events = self._events, events
        self._events = events
        try:
            self._splitter.feed(memoryview(data))
        except RemoteProtocolError as exc:
            self._failure = exc
            self._goaway_sent = True
            self._streams.clear()
            self._write(goaway_frame(self._last_peer_stream(), exc.code, exc.reason.encode("ascii", "replace")[:256]))
            raise
        self._events = []
        return events

    def receive_eof(self) -> Sequence[Event]:
        events: list[Event] = []
        for state in self._streams.values():
            if not self._is_complete(state):
                events.append(StreamReset(state.id, ErrorCode.CANCEL, "the peer closed the connection"))
            state.drop()
        self._streams.clear()
        self._ended = True
        return events

    def send_data(self, stream: int, data: bytes | memoryview) -> None:
        """Raises LocalProtocolError for more than `room`. A body longer than was said is a reset, as a shorter one is."""
        state = self._streams.get(stream)
        size = len(data)
        if state is None or state.sending is not _OPEN or not size or state.bodiless:
            return
        if size > state.send_window or size > self._send_window:
            raise LocalProtocolError(f"{size} bytes on stream {stream}, which takes {self.room(stream)}")
        if state.to_send >= 0:
            state.to_send -= size
            if state.to_send < 0:
                self._reset(stream, ErrorCode.INTERNAL_ERROR)
                return
        state.send_window -= size
        self._send_window -= size
        self._tail = stream
        most = self._max_frame_size
        if size <= most:
            self._parts += (_pack_header(size << 8 | _DATA, 0, stream), bytes(data))
            self.unsent += size + 9
            self._courtesy += 10
            return
        view = memoryview(data)
        for at in range(0, size, most):
            piece = bytes(view[at : at + most])
            self._parts += (frame_header(len(piece), _DATA, 0, stream), piece)
            self.unsent += len(piece) + 9
            self._courtesy += 10

    def send_end(self, stream: int, trailers: Headers | None = None) -> None:
        state = self._streams.get(stream)
        if state is None or state.sending is not _OPEN:
            return
        if state.to_send > 0 and not state.bodiless:  # never a shorter body than was said
            self._reset(stream, ErrorCode.INTERNAL_ERROR)
            return
        if trailers and (kept := clean_trailers(trailers)):
            self._send_block(state, [], kept, end=True)
        elif self._tail == stream:
            self._parts[-2] = _pack_header(len(self._parts[-1]) << 8 | _DATA, END_STREAM, stream)
        else:
            self._write(frame_header(0, _DATA, END_STREAM, stream))
        self._sent_end(state)

    def reset(self, stream: int, code: int) -> None:
        """No event follows."""
        if stream in self._streams:
            self._reset(stream, code)

    def consumed(self, stream: int, size: int) -> None:
        state = self._streams.get(stream)
        if state is None:
            return
        self._waiting -= size
        state.owed += size
        if state.owed >= self._stream_credit_portion and state.receiving is _OPEN:
            state.receive_window += state.owed
            self._write(window_update_frame(stream, state.owed))
            state.owed = 0
        if self._receive_window < _LOW_WINDOW:
            self._refresh_connection_credit()

    def ping(self) -> None:
        """Ask for a sign of life; `pings` is 0 again when it has come."""
        self.pings += 1
        self._write(frame_header(8, FrameType.PING, 0, 0) + b"keepaliv")

    # --- frames of the connection (called by the splitter) -----------------------------------------------------------------------------

    def on_settings(self, flags: int, payload: bytes) -> None:
        self._patience.spend(patience.SETTINGS, "SETTINGS")
        if flags & ACK:
            return
        settings = self._peer
        settings.take(payload)
        self._write(SETTINGS_ACK)
        self._settings_seen = True
        self._max_frame_size = settings.max_frame_size
        self._peer_max_streams = MAX_STREAM_ID if settings.max_concurrent_streams is None else settings.max_concurrent_streams
        for size in settings.table_sizes:
            self._writer.resize(size)
        by = settings.initial_window_size - self._initial_send_window
        self._initial_send_window = settings.initial_window_size
        for stream in self._streams.values():  # RFC 9113 section 6.9.2: also below zero
            stream.send_window += by
            if stream.send_window > MAX_WINDOW:
                raise RemoteProtocolError("SETTINGS widen a window beyond 2^31-1", ErrorCode.FLOW_CONTROL_ERROR)

    def on_ping(self, flags: int, payload: bytes) -> None:
        self._spend_courtesy("PING")
        if not flags & ACK:
            self._write(frame_header(8, FrameType.PING, ACK, 0) + payload)
        elif payload == _OWN_PING:
            self._on_goodbye()
        else:
            self.pings = 0

    def on_goaway(self, last_stream: int, code: int, debug: bytes) -> None:
        self._patience.spend(patience.IGNORED_FRAME, "GOAWAY")
        if code or not self._goaway_received:
            self._events.append(GoingAway(code, debug[:_LONGEST_WHY].decode("utf-8", "replace")))
        self._goaway_received = True

    def on_ignored(self, kind: int) -> None:
        self._patience.spend(patience.IGNORED_FRAME, f"frames of type {kind} that change nothing")

    # --- frames of streams (called by the splitter) ------------------------------------------------------------------------------------

    def on_data(self, stream: int, charged: int, piece: memoryview, end: bool) -> None:
        if charged:
            self._receive_window = left = self._receive_window - charged
            if left < 0:
                raise RemoteProtocolError("DATA beyond the connection's window", ErrorCode.FLOW_CONTROL_ERROR)
            if left < _LOW_WINDOW:
                self._refresh_connection_credit()
        state = self._streams.get(stream)
        if state is None or state.receiving is not _OPEN:
            self._on_data_out_of_place(stream, state, weightless=not (charged or piece))
            return
        if charged:
            state.receive_window -= charged
            self._waiting += charged
            if state.receive_window < 0:
                self._fail_stream(stream, ErrorCode.FLOW_CONTROL_ERROR, "DATA beyond the stream's window")
                return
        if piece:
            size = len(piece)
            if state.left >= 0:
                state.left -= size
                if state.left < 0:
                    self._fail_stream(stream, ErrorCode.PROTOCOL_ERROR, "more DATA than content-length")
                    return
            if state.dropped:
                self.consumed(stream, size)
            else:
                self._events.append(BodyData(stream, piece))
        if end:
            self._on_end(state, [])

    def _on_data_out_of_place(self, stream: int, state: _Stream | None, *, weightless: bool) -> None:
        if state is None:
            self._on_frame_of_no_stream(stream, answer=ErrorCode.STREAM_CLOSED, weightless=weightless)
        elif state.receiving is _SILENT:
            self._fail_stream(stream, ErrorCode.PROTOCOL_ERROR, "DATA before a head")
        else:
            self._fail_stream(stream, ErrorCode.STREAM_CLOSED, "DATA after the end")

    def on_padding(self, stream: int, length: int) -> None:
        self.consumed(stream, length)

    def on_headers(self, stream: int, block: bytes, end: bool) -> None:
        fields = self._reader.read(block)  # also for streams that are gone: the table must see every block
        state = self._streams.get(stream)
        if state is None:
            self._on_headers_of_no_stream(stream, fields, end)
        elif state.receiving is _SILENT:
            self._on_answer(state, fields, end)
        elif state.receiving is _ENDED:
            self._fail_stream(stream, ErrorCode.STREAM_CLOSED, "a head after the end")
        else:
            self._on_trailers(state, fields, end)

    def _on_trailers(self, state: _Stream, fields: Fields, end: bool) -> None:
        try:
            if not end:
                raise MalformedHeaders("trailers that do not end the stream")
            trailers = self._known_trailers.find(fields)
            if trailers is None:
                trailers = self._known_trailers.keep(fields, self._read_trailers(fields))
        except MalformedHeaders as exc:
            self._fail_stream(state.id, ErrorCode.PROTOCOL_ERROR, str(exc))
            return
        self._on_end(state, trailers.copy())

    def _read_trailers(self, fields: Fields) -> Headers:
        """Raises MalformedHeaders."""
        pseudo, headers, special, size = _sort(fields)
        if pseudo or any(name in _MALFORMED for name, _ in special):
            raise MalformedHeaders("pseudo-headers or connection-specific headers in trailers")
        if size > self._limits.size or len(fields) > self._limits.count:
            raise MalformedHeaders("trailers too large")
        return clean_trailers(headers)

    def _on_end(self, state: _Stream, trailers: Headers) -> None:
        if state.left > 0:
            self._fail_stream(state.id, ErrorCode.PROTOCOL_ERROR, "less DATA than content-length")
            return
        state.receiving = _ENDED
        if not state.dropped:
            self._events.append(BodyEnd(state.id, trailers))
        if state.sending is _ENDED:
            self._forget(state)

    def on_reset(self, stream: int, code: int) -> None:
        state = self._streams.get(stream)
        if state is None:
            self._patience.spend(patience.STALE_FRAME, "resets of closed streams")
            self._on_frame_of_no_stream(stream, answer=None)
            return
        complete = self._is_complete(state)
        self._forget(state)
        if not complete:
            self._events.append(StreamReset(stream, code, "the peer reset the stream", self._is_untouched(code)))
            self._count_reset(state)

    def on_window_update(self, stream: int, increment: int) -> None:
        self._spend_courtesy("WINDOW_UPDATE")
        if stream == 0:
            if increment == 0:
                raise RemoteProtocolError("WINDOW_UPDATE by 0")
            self._send_window += increment
            if self._send_window > MAX_WINDOW:
                raise RemoteProtocolError("the connection's window beyond 2^31-1", ErrorCode.FLOW_CONTROL_ERROR)
            return
        state = self._streams.get(stream)
        if state is None:
            self._on_frame_of_no_stream(stream, answer=None)
        elif increment == 0:
            self._fail_stream(stream, ErrorCode.PROTOCOL_ERROR, "WINDOW_UPDATE by 0")
        elif state.send_window + increment > MAX_WINDOW:
            self._fail_stream(stream, ErrorCode.FLOW_CONTROL_ERROR, "a window beyond 2^31-1")
        else:
            state.send_window += increment

    # --- what the ends differ in -------------------------------------------------------------------------------------------------------

    @abstractmethod
    def _on_headers_of_no_stream(self, stream: int, fields: Fields, end: bool) -> None: ...

    @abstractmethod
    def _on_answer(self, state: _Stream, fields: Fields, end: bool) -> None: ...

    @abstractmethod
    def _is_idle(self, stream: int) -> bool:
        """No frame has ever opened this stream."""

    @abstractmethod
    def _last_peer_stream(self) -> int: ...

    @abstractmethod
    def _is_complete(self, state: _Stream) -> bool:
        """The exchange is over for whoever drives us, whatever else may come on the stream."""

    @abstractmethod
    def _is_untouched(self, code: int) -> bool: ...

    @abstractmethod
    def _count_reset(self, state: _Stream) -> None: ...

    @abstractmethod
    def _on_goodbye(self) -> None: ...

    @abstractmethod
    def _sent_end(self, state: _Stream) -> None: ...

    # --- shared ends -------------------------------------------------------------------------------------------------------------------

    def _on_frame_of_no_stream(self, stream: int, *, answer: int | None, weightless: bool = False) -> None:
        """``weightless``: it has no byte that a window would hold back."""
        if self._is_idle(stream):
            raise RemoteProtocolError(f"a frame on stream {stream}, which nobody opened")
        if answer is None:
            return
        crossing = self._reset_here.get(stream)
        if crossing is None:
            self._patience.spend(patience.STALE_FRAME, "frames on closed streams")
            self._write(rst_stream_frame(stream, answer))
            self._remember_reset(stream)
        elif weightless:
            if crossing:
                self._reset_here[stream] = crossing - 1
            else:
                self._patience.spend(patience.STALE_FRAME, "frames on closed streams")

    def _fail_stream(self, stream: int, code: int, reason: str) -> None:
        """The peer broke the rules of one stream: the others must not suffer."""
        self._patience.spend(patience.STREAM_ERROR, "stream errors")
        state = self._streams.get(stream)
        told = state is not None and not self._is_complete(state)
        self._reset(stream, code)
        if told:
            self._events.append(StreamReset(stream, code, reason))

    def _reset(self, stream: int, code: int) -> None:
        state = self._streams.get(stream)
        if state is not None:
            self._forget(state)
        self._write(rst_stream_frame(stream, code))
        self._remember_reset(stream)

    def _remember_reset(self, stream: int) -> None:
        self._reset_here[stream] = _CROSSING
        if len(self._reset_here) > _REMEMBERED_RESETS:
            del self._reset_here[next(iter(self._reset_here))]

    def _forget(self, state: _Stream) -> None:
        del self._streams[state.id]
        state.receiving = state.sending = _ENDED  # `drop`
        self._heads -= state.weight
        self._waiting -= self._stream_window - state.receive_window - state.owed  # nobody will say that they were consumed
        if self._receive_window < _LOW_WINDOW:
            self._refresh_connection_credit()

    def _forget_if_over(self, state: _Stream) -> None:
        if state.receiving is _ENDED and state.sending is _ENDED:
            self._forget(state)

    def _refresh_connection_credit(self) -> None:
        """When it is low, unless too much waits."""
        if self._receive_window < _LOW_WINDOW and self._waiting < MAX_WAITING:
            self._write(window_update_frame(0, CONNECTION_WINDOW - self._receive_window))
            self._receive_window = CONNECTION_WINDOW

    def _spend_courtesy(self, on: str) -> None:
        if self._courtesy:
            self._courtesy = min(self._courtesy, MAX_COURTESY) - 1
        else:
            self._patience.spend(patience.PING, on)

    def _write(self, data: bytes) -> None:
        self._parts.append(data)
        self.unsent += len(data)
        self._tail = 0

    def _send_block(self, state: _Stream, pseudo: Headers, headers: Headers, *, end: bool) -> None:
        """Raises LocalProtocolError, as `BlockWriter.write` does."""
        block = self._writer.write(pseudo, headers)
        size = len(block)
        if size > self._max_frame_size:
            self._write(header_frames(state.id, block, end_stream=end, max_frame_size=self._max_frame_size))
            return
        self._parts += (_pack_header(size << 8 | _HEADERS, END_HEADERS | END_STREAM if end else END_HEADERS, state.id), block)
        self.unsent += size + 9
        self._tail = 0


_MALFORMED: Final = frozenset({b"connection", b"proxy-connection", b"keep-alive", b"transfer-encoding", b"upgrade", b""})
_SPECIAL: Final = FRAMING | {b"te", b"expect", b"cookie", b""}
_DEFAULTS: Final = ServerOptions()


def _sort(fields: Iterable[tuple[bytes, bytes]]) -> tuple[dict[bytes, bytes], Headers, Headers, int]:
    """Pseudo-headers, ordinary headers, headers of special meaning, and the size as RFC 9113 section 6.5.2 has it. Raises MalformedHeaders
    for what section 8.2.1 forbids: among it everything that could end a line where this goes on as HTTP/1.1."""
    pseudo: dict[bytes, bytes] = {}
    headers: Headers = []
    special: Headers = []
    names: list[bytes] = []
    values: list[bytes] = []
    for field in fields:
        name, value = field
        values.append(value)
        if name[:1] == b":":
            if names or name in pseudo:
                raise MalformedHeaders("pseudo-headers twice or after others")
            pseudo[name] = value
            continue
        names.append(name)
        if value.strip(_BLANKS) != value:
            raise MalformedHeaders("outer blanks in a header value")
        if name in _SPECIAL:
            special.append(field)
        else:
            headers.append(field)
    all_names, all_values = b"".join(names), b"".join(values)
    if all_names.translate(None, LOWER_TOKEN) or all_values.translate(None, FIELD_TEXT):
        raise MalformedHeaders("invalid character in a header")
    size = len(all_names) + len(all_values) + 32 * len(values) + sum(map(len, pseudo))
    return pseudo, headers, special, size


def _length_of(message: Request | Response) -> int | None:
    """By the attribute, or for messages made by hand by the header, which is in `_NOT_WRITTEN`."""
    if message.content_length is not None:
        return message.content_length
    value = message.first(b"content-length")
    return int(value) if value is not None and value.isdigit() else None


class _RequestFacts(NamedTuple):
    """A head that was found good. ``request``: to be copied."""

    request: Request
    ended: bool
    size: int
    left: int
    head: bool
    upgrade: bool


class _ResponseFacts(NamedTuple):
    """What a response's head says, whatever it answers. ``lengths``: of ``content-length``, which is not among ``headers``."""

    status: int
    headers: Headers
    lengths: list[bytes]


class Http2Server(_Http2):
    """The end that answers. See the module and `codec.ServerCodec`."""

    __slots__ = (
        "_given_up", "_highest", "_highest_taken", "_known_heads", "_last_accepted", "_opened", "_options",
    )  # fmt: skip

    def __init__(self, options: ServerOptions = _DEFAULTS, *, now: Callable[[], float]) -> None:
        """``now``: seconds, monotonic; it only bounds how often a client may do useless things."""
        super().__init__(
            now=now,
            server=True,
            limits=options.limits,
            stream_window=options.stream_window,
            settings={SettingCode.MAX_CONCURRENT_STREAMS: options.max_streams}
            | ({SettingCode.ENABLE_CONNECT_PROTOCOL: 1} if options.upgrades else {}),
        )
        self._options = options
        self._known_heads: _Remembered[_RequestFacts] = _Remembered(self._reader)
        self._highest = 0  # of the streams the client opened
        self._highest_taken = 0  # of those that we looked at
        self._last_accepted = MAX_STREAM_ID  # by our GOAWAY
        self._opened = 0
        self._given_up = 0

    @property
    def finished(self) -> bool:
        if self._ended or self._failure is not None:
            return True
        return not self._streams and self._goaway_sent and self._last_accepted != MAX_STREAM_ID

    holds = False
    amid_head = False

    def give_up_head(self) -> Sequence[Event]:
        return ()

    # --- requests ----------------------------------------------------------------------------------------------------------------------

    def _on_headers_of_no_stream(self, stream: int, fields: Fields, end: bool) -> None:
        if stream <= self._highest or stream % 2 == 0:
            if stream in self._reset_here:  # trailers that crossed our reset
                self._on_frame_of_no_stream(stream, answer=ErrorCode.STREAM_CLOSED, weightless=True)
                return
            raise RemoteProtocolError(f"HEADERS on stream {stream} after {self._highest}")
        self._highest = stream
        if stream > self._last_accepted:  # the client reads in our GOAWAY that we pass over these
            self._patience.spend(patience.REFUSED, "requests after GOAWAY")
            self._remember_reset(stream)
            return
        self._opened += 1
        if len(self._streams) >= self._options.max_streams or self._heads > MAX_HEADS:
            self._patience.spend(patience.REFUSED, "requests over the limit of streams")
            self._reset(stream, ErrorCode.REFUSED_STREAM)
            return
        self._highest_taken = stream
        self._courtesy += 2
        self._on_request(stream, fields, end)

    def _on_request(self, stream: int, fields: Fields, end: bool) -> None:
        state = _Stream(stream, self._stream_window, self._initial_send_window)
        self._streams[stream] = state
        state.receiving = _ENDED if end else _OPEN
        facts = self._known_heads.find(fields)
        if facts is None or facts.ended is not end:
            request = Request(b"", b"", b"", b"", [], Version.HTTP_2)
            try:
                facts = self._known_heads.keep(fields, self._read_request(request, fields, end))
            except MalformedHeaders as exc:
                self._fail_stream(stream, ErrorCode.PROTOCOL_ERROR, f"malformed request: {exc}")
                return
            except BadHead as bad:  # not `exc`: compiled, a name has one type
                state.dropped = True
                self._patience.spend(_OVERSIZED if bad.status == 431 else patience.BAD_REQUEST, "bad requests")
                self._events.append(RefusedHead(stream, bad.status, bad.reason, request))
                return
        state.weight = facts.size
        self._heads += facts.size
        state.left, state.head, state.upgrade = facts.left, facts.head, facts.upgrade
        self._events.append(RequestHead(stream, facts.request.copy(), end))

    def _read_request(self, request: Request, fields: Fields, end: bool) -> _RequestFacts:
        """Fills ``request``, as far as it comes. Raises MalformedHeaders, BadHead."""
        pseudo, headers, special, size = _sort(fields)
        request.headers = headers
        self._take_pseudo(request, pseudo)
        self._take_special(request, special, end)
        if size > self._limits.size or len(fields) - len(pseudo) > self._limits.count:
            raise BadHead("head too large", 431)
        self._judge(request)
        upgrade = request.upgrade is not None
        left = _UNCOUNTED if request.content_length is None or upgrade else request.content_length
        return _RequestFacts(request, end, size, left, request.method == b"HEAD", upgrade)

    def _take_pseudo(self, request: Request, pseudo: dict[bytes, bytes]) -> None:
        """RFC 9113 section 8.3.1, RFC 8441 section 4."""
        method = pseudo.get(b":method", b"")
        if not method or method.translate(None, TOKEN):
            raise MalformedHeaders("no method, or none that may be one")
        request.method = method
        request.authority = pseudo.get(b":authority", b"")
        request.scheme = pseudo.get(b":scheme", b"")
        request.path = pseudo.get(b":path", b"")
        known = 1 + (b":authority" in pseudo)
        if method == b"CONNECT" and b":protocol" not in pseudo:
            if len(pseudo) != known:
                raise MalformedHeaders("CONNECT with more than an authority")
            return
        if not request.scheme or not request.path:
            raise MalformedHeaders("no scheme or no path")
        known += 2
        if method == b"CONNECT":
            known += 1
            request.upgrade = pseudo[b":protocol"].lower()
            request.method = b"GET"
        if len(pseudo) != known:
            raise MalformedHeaders("unknown pseudo-headers")

    def _take_special(self, request: Request, special: Headers, end: bool) -> None:
        lengths: list[bytes] = []
        cookies: list[bytes] = []
        for name, value in special:
            if name in _MALFORMED:
                raise MalformedHeaders(f"{name.decode()} or a header without a name")
            if name == b"content-length":
                lengths.append(value)
            elif name == b"host":
                if request.authority and value.lower() != request.authority.lower():
                    raise MalformedHeaders("host other than authority")
                request.authority = request.authority or value
            elif name == b"te":
                if value.lower() != b"trailers":
                    raise MalformedHeaders("te other than trailers")
                request.headers.append((b"te", b"trailers"))
            elif name == b"cookie":
                cookies.append(value)
            elif name == b"expect":
                if value.lower() != b"100-continue":
                    raise BadHead("unknown expectation", 417)
                request.expect_continue = not end
        if cookies:  # RFC 9113 section 8.2.3: one header everywhere else
            request.headers.append((b"cookie", b"; ".join(cookies)))
        if lengths and request.upgrade is None:
            try:
                length = read_length(lengths)
            except BadHead as exc:
                raise MalformedHeaders(exc.reason) from exc
            if end and length:
                raise MalformedHeaders("no DATA, where content-length promises some")
            request.content_length = length
            request.headers.append((b"content-length", lengths[0]))

    def _judge(self, request: Request) -> None:
        """What is well-formed, and must not go on all the same."""
        if request.method == b"CONNECT":
            raise BadHead("CONNECT", 403)
        if request.upgrade is not None and request.upgrade not in self._options.upgrades:
            raise BadHead("unknown protocol to upgrade to", 501)
        if request.scheme not in (b"http", b"https"):
            raise BadHead("unknown scheme")
        if not request.authority:
            raise BadHead("no host")
        check_authority(request.authority)
        if request.path == b"*" and request.method != b"OPTIONS":
            raise BadHead("invalid request target")
        path = normalise(request.path, self._options.paths)
        if isinstance(path, BadPath):
            raise BadHead(path.reason)
        request.path = path

    def _on_answer(self, state: _Stream, fields: Fields, end: bool) -> None:
        raise AssertionError("a server's streams begin with the client's HEADERS")

    def _count_reset(self, state: _Stream) -> None:
        """Rapid reset (CVE-2023-44487): it must not cost a client nothing to make us begin requests."""
        if state.answered:
            return
        self._given_up += 1
        if self._opened >= MIN_STREAMS_TO_JUDGE and self._given_up * 2 > self._opened:
            raise RemoteProtocolError("too many streams given up", ErrorCode.ENHANCE_YOUR_CALM)

    def _is_complete(self, state: _Stream) -> bool:
        return state.sending is _ENDED

    def _is_untouched(self, code: int) -> bool:
        return False

    # --- responses ---------------------------------------------------------------------------------------------------------------------

    def send_informational(self, stream: int, status: int, headers: Headers) -> None:
        state = self._streams.get(stream)
        if state is None or state.sending is not _SILENT or status not in (100, 103):
            return
        self._send_block(state, [(b":status", b"%d" % status)], [pair for pair in headers if pair[0] not in _NOT_WRITTEN], end=False)

    def send_response(self, stream: int, response: Response, *, ended: bool) -> None:
        """Raises LocalProtocolError for a header that cannot be sent, and for a status that has no place here."""
        state = self._streams.get(stream)
        if state is None or state.sending is not _SILENT:
            return
        status = response.status
        headers = [pair for pair in response.headers if pair[0] not in _NOT_WRITTEN]
        length = response.content_length if len(headers) == len(response.headers) else _length_of(response)
        if status == 101:
            if not state.upgrade:
                raise LocalProtocolError("101 to a request that asked for no upgrade")
            status = 200
            headers = [pair for pair in headers if pair[0] != b"sec-websocket-accept"]
        elif not 200 <= status <= 599:
            raise LocalProtocolError(f"status {status} of a response")
        if length is not None and response.status in (101, 204):
            length = None
        if length is not None:
            headers.append((b"content-length", b"%d" % length))
        bodiless = state.head or status in (204, 304)
        if ended and length and not bodiless:
            self._reset(stream, ErrorCode.INTERNAL_ERROR)
            return
        self._send_block(state, [(b":status", b"%d" % status)], headers, end=ended)
        # Only now: a response that could not be written may be followed by another.
        state.sending, state.answered, state.bodiless = _OPEN, True, bodiless
        if length is not None:
            state.to_send = length
        if ended:
            self._sent_end(state)

    def _sent_end(self, state: _Stream) -> None:
        state.sending = _ENDED
        if state.receiving is not _ENDED:  # RFC 9113 section 8.1: the rest of the request is not wanted, and nothing is wrong with it
            self._reset(state.id, ErrorCode.NO_ERROR)
        else:
            self._forget_if_over(state)

    # --- the end -----------------------------------------------------------------------------------------------------------------------

    def go_away(self) -> None:
        """RFC 9113 section 6.8: now GOAWAY with the highest stream there is and a PING; once that has come back, by itself, GOAWAY with the
        last stream that was taken. Requests in between are still served."""
        if self._goaway_sent:
            return
        self._goaway_sent = True
        self._write(goaway_frame(MAX_STREAM_ID, ErrorCode.NO_ERROR))
        self._write(frame_header(8, FrameType.PING, 0, 0) + _OWN_PING)

    def give_up(self, code: int) -> None:
        """For who closes at once: GOAWAY says which requests were taken, so that the others may go elsewhere."""
        self._goaway_sent = True
        self._last_accepted = self._highest_taken
        self._write(goaway_frame(self._last_accepted, code))

    def _on_goodbye(self) -> None:
        if self._goaway_sent and self._last_accepted == MAX_STREAM_ID:
            self._last_accepted = self._highest_taken
            self._write(goaway_frame(self._last_accepted, ErrorCode.NO_ERROR))

    def _is_idle(self, stream: int) -> bool:
        return stream % 2 == 0 or stream > self._highest

    def _last_peer_stream(self) -> int:
        return self._highest_taken


class Http2Client(_Http2):
    """The end that asks. See the module and `codec.ClientCodec`."""

    __slots__ = (
        "_known_heads", "_last_served", "_next_stream",
    )  # fmt: skip

    def __init__(self, limits: HeadLimits | None = None, *, now: Callable[[], float], stream_window: int = 256 * 1024) -> None:
        super().__init__(
            now=now, server=False, limits=limits or HeadLimits(), stream_window=stream_window, settings={SettingCode.ENABLE_PUSH: 0}
        )
        self._known_heads: _Remembered[_ResponseFacts] = _Remembered(self._reader)
        self._next_stream = 1
        self._last_served = MAX_STREAM_ID

    @property
    def finished(self) -> bool:
        return self._ended or self._failure is not None or (not self._streams and not self.reusable)

    @property
    def reusable(self) -> bool:
        return not (self._ended or self._goaway_received or self._failure is not None) and self._next_stream <= MAX_STREAM_ID

    @property
    def capacity(self) -> int:
        if self._ended or self._goaway_received or self._failure is not None or self._next_stream > MAX_STREAM_ID:  # not `reusable`
            return 0
        free = self._peer_max_streams - len(self._streams)
        return free if free > 0 else 0

    @property
    def upgrades(self) -> bool | None:
        """Whether the server takes extended CONNECT; None until its SETTINGS have come. Asking earlier fails the request, untouched."""
        return self._peer.connect_protocol if self._settings_seen else None

    # --- requests ----------------------------------------------------------------------------------------------------------------------

    def send_request(self, request: Request, *, ended: bool) -> int:
        """Raises LocalProtocolError when `capacity` is 0, and for what no request can carry."""
        if self.capacity <= 0:
            raise LocalProtocolError("the server takes no more requests on this connection")
        method, path, authority = request.method, request.path, request.authority
        if method == b"CONNECT" or not method or method.translate(None, TOKEN):
            raise LocalProtocolError(f"method {method!r}")
        if path[:1] != b"/" and path != b"*":
            raise LocalProtocolError("a path without a slash")
        if SPACE in path or SPACE in authority or TAB in path or TAB in authority:
            raise LocalProtocolError("a blank in path or authority")
        headers = [pair for pair in request.headers if pair[0] not in _NOT_WRITTEN]
        length = request.content_length if len(headers) == len(request.headers) else _length_of(request)
        if ended and length:
            raise LocalProtocolError(f"no body, where {length} bytes were said to come")
        stream = self._next_stream
        self._next_stream += 2
        if request.upgrade is not None and not self._peer.connect_protocol:
            self._events.append(StreamReset(stream, ErrorCode.HTTP_1_1_REQUIRED, "the server takes no extended CONNECT", True))
            return stream
        state = _Stream(stream, self._stream_window, self._initial_send_window)
        pseudo = [(b":method", method), (b":scheme", request.scheme), (b":authority", authority), (b":path", path)]
        if request.upgrade is not None:
            pseudo[0] = (b":method", b"CONNECT")
            pseudo.append((b":protocol", request.upgrade))
            headers = [pair for pair in headers if pair[0] != b"sec-websocket-key"]
            state.upgrade = True
            ended = False
        elif length is not None:
            headers.append((b"content-length", b"%d" % length))
            state.to_send = length
        if request.expect_continue and not ended:
            headers.append((b"expect", b"100-continue"))
        self._send_block(state, pseudo, headers, end=ended)
        state.sending = _ENDED if ended else _OPEN
        state.head = method == b"HEAD"
        self._streams[stream] = state
        self._courtesy += 2
        return stream

    # --- responses ---------------------------------------------------------------------------------------------------------------------

    def _on_answer(self, state: _Stream, fields: Fields, end: bool) -> None:
        try:
            self._take_response(state, fields, end)
        except MalformedHeaders as exc:
            self._fail_stream(state.id, ErrorCode.PROTOCOL_ERROR, f"malformed response: {exc}")

    def _read_response(self, fields: Fields) -> _ResponseFacts:
        """Raises MalformedHeaders."""
        pseudo, headers, special, size = _sort(fields)
        digits = pseudo.get(b":status", b"")
        if len(pseudo) != 1 or len(digits) != 3 or not digits.isdigit() or not 100 <= int(digits) <= 599:
            raise MalformedHeaders("no status, or more than that")
        if size > self._limits.size or len(fields) - 1 > self._limits.count:
            raise MalformedHeaders("head too large")
        lengths: list[bytes] = []
        for name, value in special:
            if name in _MALFORMED:
                raise MalformedHeaders(f"{name.decode()} or a header without a name")
            if name == b"content-length":
                lengths.append(value)
            elif name == b"cookie":
                headers.append((name, value))
        return _ResponseFacts(int(digits), headers, lengths)

    def _take_response(self, state: _Stream, fields: Fields, end: bool) -> None:
        facts = self._known_heads.find(fields)
        if facts is None:
            facts = self._known_heads.keep(fields, self._read_response(fields))
        status, headers, lengths = facts.status, facts.headers.copy(), facts.lengths
        if status < 200:
            self._take_informational(state, status, headers, end)
            return
        if state.upgrade and status < 300:
            state.receiving = _OPEN
            self._events.append(ResponseHead(state.id, Response(101, headers), False))
            if end:
                self._on_end(state, [])
            return
        response = Response(status, headers)
        bodiless = state.head or status in (204, 304)
        if lengths and status != 204:
            try:
                response.content_length = read_length(lengths)
            except BadHead as exc:
                raise MalformedHeaders(exc.reason) from exc
            headers.append((b"content-length", lengths[0]))
        if bodiless:
            state.left = 0
        elif response.content_length is not None:
            state.left = response.content_length
        if end and state.left > 0:
            raise MalformedHeaders("no DATA, where content-length promises some")
        state.receiving = _ENDED if end else _OPEN
        self._events.append(ResponseHead(state.id, response, end))
        if end:
            self._forget_if_over(state)

    def _take_informational(self, state: _Stream, status: int, headers: Headers, end: bool) -> None:
        if end or status == 101:
            raise MalformedHeaders("an informational response that ends the stream, or 101")
        self._patience.spend(patience.IGNORED_FRAME, "informational responses")
        if status in (100, 103):
            self._events.append(ResponseHead(state.id, Response(status, headers), False))

    def _on_headers_of_no_stream(self, stream: int, fields: Fields, end: bool) -> None:
        self._on_frame_of_no_stream(stream, answer=ErrorCode.STREAM_CLOSED, weightless=True)

    def on_goaway(self, last_stream: int, code: int, debug: bytes) -> None:
        """RFC 9113 section 6.8: a later GOAWAY may only lower the last stream."""
        super().on_goaway(last_stream, code, debug)
        self._last_served = min(last_stream, self._last_served)
        for stream in [stream for stream in self._streams if stream > self._last_served]:
            self._forget(self._streams[stream])
            self._remember_reset(stream)
            self._events.append(StreamReset(stream, ErrorCode.REFUSED_STREAM, "the server went away before the request", True))

    def _sent_end(self, state: _Stream) -> None:
        state.sending = _ENDED
        self._forget_if_over(state)

    def _is_complete(self, state: _Stream) -> bool:
        return state.receiving is _ENDED

    def _is_untouched(self, code: int) -> bool:
        return code == ErrorCode.REFUSED_STREAM

    def _count_reset(self, state: _Stream) -> None:
        return

    def _on_goodbye(self) -> None:
        return

    def _is_idle(self, stream: int) -> bool:
        return stream % 2 == 0 or stream >= self._next_stream

    def _last_peer_stream(self) -> int:
        return 0  # push is refused, so a server has no streams


_NOT_WRITTEN: Final = FRAMING | {b"expect"}

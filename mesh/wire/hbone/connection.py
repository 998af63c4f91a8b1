"""One HBONE connection without its I/O: bytes and facts in, events and bytes out.

Theory of operation. `FrameSplitter` cuts what the peer sent into frames and calls the ``on_...`` methods here. Nothing of it is left to the
h2 library, through which streams and windows cost more than all the rest of a tunnel, and settings a tenth of a new connection. There is no
payload in here: what arrives leaves `receive` as slices of the driver's buffer, what is sent never passes through (`data_header`).

Contract with the driver
- ``receive(view)`` may be fed any portion of the decrypted byte stream. It returns the events of that portion, in order. The slices in
  `TunnelData` point into ``view``.
- After every call of any method here, ``take_outgoing()`` may have bytes. Bytes go out in the order in which they were made: a frame header
  from ``data_header`` comes after everything that was outgoing before that call, is followed by exactly its payload, and only then by
  what ``take_outgoing`` gives later. The driver therefore takes outgoing bytes before it asks for a frame header.
- ``RemoteProtocolError`` from ``receive``: the connection is over. The last outgoing bytes hold GOAWAY; send what can be sent without
  waiting and close. Every open tunnel is broken; there are no events for them, and none of the same portion.
- A stream may end at any time by the peer's doing, also within the events of one ``receive``. So whatever names a stream that is no more is
  no error: ``accept``, ``refuse``, ``consumed``, ``end``, ``reset`` then do nothing, ``sendable`` is 0.
- Nothing here knows the time but by ``now`` (seconds, monotonic), which only bounds how often a peer may do useless things.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from struct import Struct
from typing import Final

from mesh.wire.errors import ErrorCode, LocalProtocolError, RemoteProtocolError
from mesh.wire.frames import (
    ACK,
    DEFAULT_FRAME_SIZE,
    DEFAULT_WINDOW,
    END_STREAM,
    FRAME_HEADER_SIZE,
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
from mesh.wire.hbone.events import (
    GoingAway,
    HboneEvent,
    MoreStreamsAllowed,
    PingAcknowledged,
    TunnelData,
    TunnelEnded,
    TunnelReset,
    WindowOpened,
)
from mesh.wire.hbone.streams import Direction, Signal, Stream
from mesh.wire.headers import Fields, HeaderReader, HeaderWriter, MalformedHeaders, check_trailers
from mesh.wire.settings import SETTINGS_ACK, PeerSettings


@dataclass(frozen=True, slots=True)
class Limits:
    """What we advertise, in bytes and streams. The defaults of both roles are ztunnel's."""

    stream_window: int = 4 << 20
    connection_window: int = 16 << 20
    max_frame_size: int = 1 << 20
    max_header_list_size: int = 64 << 10
    max_concurrent_streams: int = 200
    """Server only: more are refused with REFUSED_STREAM."""

    def __post_init__(self) -> None:
        """Raises ValueError for what SETTINGS cannot say."""
        if not (0 < self.stream_window <= MAX_WINDOW and DEFAULT_WINDOW <= self.connection_window <= MAX_WINDOW):
            raise ValueError("windows: 1 to 2^31-1 bytes for a stream, at least 65535 for the connection, which is never less")
        if not DEFAULT_FRAME_SIZE <= self.max_frame_size < 1 << 24:
            raise ValueError("frame size: 16384 to 2^24-1 bytes")


# How many streams that we reset are remembered, so that frames the peer sent before it knew are passed over. A peer that is further behind
# gets a reset it does not need, not an error.
_REMEMBERED_RESETS: Final = 1024

OWN_PING: Final = b"\xffgoodbye"
"""The PING of our own graceful GOAWAY; pings with this first byte are not the driver's."""

_OPEN: Final = Direction.OPEN
_HEADER = Struct(">IBI")
_DATA_HEADER = _HEADER.pack
_DATA_HEADER_INTO = _HEADER.pack_into


class HboneConnection(ABC):
    """What client and server have in common. See the module for the contract."""

    def __init__(self, *, now: Callable[[], float], limits: Limits, server: bool, opening: bytes) -> None:
        """``opening``: the first bytes of this end (`mesh.wire.settings.opening`)."""
        self._limits = limits
        self._patience = patience.Patience(now)
        self._peer = PeerSettings(of_server=not server)
        self._splitter = FrameSplitter(
            self, max_frame_size=limits.max_frame_size, max_block_size=limits.max_header_list_size, expect_preface=server
        )
        self._reader = HeaderReader(limits.max_header_list_size)
        self._writer = HeaderWriter()
        self._events: list[HboneEvent] = []
        self.outgoing = bytearray(opening)
        """What `take_outgoing` will give: to see whether there is anything, and how much. A peer that asks and never reads makes it grow:
        the driver must set a bound."""
        self._failure: RemoteProtocolError | None = None
        self._streams: dict[int, Stream] = {}
        self._reset_here: dict[int, None] = {}  # in order of age
        self._receive_window = limits.connection_window
        self._receive_window_low = limits.connection_window // 2
        self._stream_credit_portion = limits.stream_window // 4
        self._send_window = DEFAULT_WINDOW
        self._initial_send_window = DEFAULT_WINDOW
        self.max_frame_size = DEFAULT_FRAME_SIZE
        """The largest DATA payload that the peer takes in one frame, in bytes."""
        self._peer_max_streams = MAX_STREAM_ID
        self._settings_received = False
        self._goaway_received = False
        self._goaway_sent = False
        if limits.connection_window > DEFAULT_WINDOW:
            self.outgoing += window_update_frame(0, limits.connection_window - DEFAULT_WINDOW)

    # --- facts ---------------------------------------------------------------------------------------------------------------------------

    @property
    def active_streams(self) -> int:
        """Tunnels that have not ended in both directions."""
        return len(self._streams)

    @property
    def going_away(self) -> bool:
        """GOAWAY was sent or received: no new tunnels; the connection may close when `active_streams` is 0."""
        return self._goaway_sent or self._goaway_received

    @property
    def settings_received(self) -> bool:
        """The peer's SETTINGS have come: its windows, frame size and number of streams are known rather than RFC 9113's defaults."""
        return self._settings_received

    @property
    def peer_max_concurrent_streams(self) -> int:
        return self._peer_max_streams

    def sendable(self, stream: int) -> int:
        """Bytes of DATA that both windows allow on a stream; 0 if it is not open for sending. `WindowOpened` tells when a 0 has grown."""
        state = self._streams.get(stream)
        return 0 if state is None else self.room(state)

    # --- what the driver does ------------------------------------------------------------------------------------------------------------

    def receive(self, data: memoryview) -> list[HboneEvent]:
        """Take bytes of the peer. Raises RemoteProtocolError, and again on every later call; the outgoing bytes then end with GOAWAY."""
        if self._failure is not None:
            raise RemoteProtocolError(self._failure.reason, self._failure.code)
        events: list[HboneEvent] = []
        self._events = events
        try:
            self._splitter.feed(data)
        except RemoteProtocolError as exc:
            self._failure = exc
            self._goaway_sent = True
            self.outgoing += goaway_frame(self._last_peer_stream(), exc.code, exc.reason.encode("ascii", "replace")[:256])
            raise
        return events

    def receive_lone_data(self, data: memoryview, size: int) -> Stream | None:
        """`receive` for what comes most often: the first ``size`` bytes of ``data`` are one frame of DATA for an open tunnel, and call for
        no answer. Returns its stream; the payload is all but the first 9 bytes. None: it is anything else, and `receive` must be given it.
        """
        splitter = self._splitter
        if not splitter.between_frames or size <= FRAME_HEADER_SIZE:
            return None
        word, flags, number = _HEADER.unpack_from(data)
        length = size - FRAME_HEADER_SIZE
        stream = self._streams.get(number)
        # Type 0 is DATA. END_STREAM, padding, a reserved bit, a wrong size or a window that it oversteps are `receive`'s to judge.
        if word != length << 8 or flags or stream is None or stream.receiving is not _OPEN or length > stream.receive_window:
            return None
        left = self._receive_window - length
        if left < self._receive_window_low or left < 0 or length > splitter.max_frame_size:
            return None
        self._receive_window = left
        stream.receive_window -= length
        return stream

    def consumed_at_once(self, stream: Stream, length: int) -> None:
        """`consumed` for no more than what has just been handed out of this stream."""
        if stream.receiving is _OPEN:
            stream.owed += length
            if stream.owed >= self._stream_credit_portion:
                self._return_stream_credit(stream)

    def write_header(self, buffer: memoryview, at: int, stream: Stream, length: int) -> None:
        """`data_header` into the 9 bytes of ``buffer`` from ``at`` on, for a ``length`` of at most what `room` gave."""
        stream.send_window -= length
        self._send_window -= length
        _DATA_HEADER_INTO(buffer, at, length << 8, 0, stream.id)

    def room(self, stream: Stream) -> int:
        """`sendable` for who holds the stream itself."""
        if stream.sending is not _OPEN:
            return 0
        window = self._send_window
        if stream.send_window < window:
            window = stream.send_window
        return window if window > 0 else 0

    def find_stream(self, stream: int) -> Stream | None:
        """The state of a living stream. Also one that an event of the last `receive` tells of may be gone by that call's end."""
        return self._streams.get(stream)

    def take_outgoing(self) -> bytes:
        """What must be sent now: SETTINGS, HEADERS, WINDOW_UPDATE, RST_STREAM, PING, GOAWAY, empty DATA with END_STREAM. Often nothing."""
        if not self.outgoing:
            return b""
        outgoing = bytes(self.outgoing)
        self.outgoing.clear()
        return outgoing

    def data_header(self, stream: int, length: int, end: bool = False) -> bytes:
        """The 9 bytes to send before ``length`` bytes of payload, which this deducts from the windows. ``end``: they are our last.

        Raises LocalProtocolError when ``length`` is over ``sendable(stream)`` or ``max_frame_size``.
        """
        state = self._streams.get(stream)
        if (
            state is None
            or state.sending is not _OPEN
            or (length and (length > state.send_window or length > self._send_window or length > self.max_frame_size))
        ):
            raise LocalProtocolError(
                f"{length} bytes on stream {stream}, which takes {self.sendable(stream)} in frames of {self.max_frame_size}"
            )
        state.send_window -= length
        self._send_window -= length
        if end:
            state.sent(Signal.END)
            self._forget_if_over(state)
            return _DATA_HEADER(length << 8, END_STREAM, stream)
        return _DATA_HEADER(length << 8, 0, stream)

    def consumed(self, stream: int, length: int) -> None:
        """So many bytes of `TunnelData` have moved on: the peer may send as many again on this stream.

        The connection's own credit went back when they arrived, so that a slow tunnel starves no other, and holds at most its own window.
        Raises LocalProtocolError for more than was handed out.
        """
        state = self._streams.get(stream)
        if state is None or state.receiving is not _OPEN:
            return
        state.owed += length
        if state.owed + state.receive_window > self._limits.stream_window:
            raise LocalProtocolError(f"more consumed on stream {stream} than received")
        if state.owed >= self._stream_credit_portion:
            self._return_stream_credit(state)

    def _return_stream_credit(self, state: Stream) -> None:
        state.receive_window += state.owed
        self.outgoing += window_update_frame(state.id, state.owed)
        state.owed = 0

    def hold_credit(self, hold: bool) -> None:
        """While ``hold``, return none of the connection's credit: for a driver whose tunnels together have more waiting than it will store.

        It stops the payload of all tunnels within one connection window; PING, WINDOW_UPDATE and requests still pass.
        """
        self._receive_window_low = -1 if hold else self._limits.connection_window // 2
        if self._receive_window < self._receive_window_low:
            self._return_connection_credit()

    def _return_connection_credit(self) -> None:
        self.outgoing += window_update_frame(0, self._limits.connection_window - self._receive_window)
        self._receive_window = self._limits.connection_window

    def end(self, stream: int) -> None:
        """No more bytes from us on this stream (END_STREAM on an empty DATA); the other direction goes on."""
        state = self._streams.get(stream)
        if state is None or state.sending is Direction.ENDED:
            return
        if not state.sent(Signal.END):
            raise LocalProtocolError(f"stream {stream} ended before it was answered")
        self.outgoing += frame_header(0, FrameType.DATA, END_STREAM, stream)
        self._forget_if_over(state)

    def reset(self, stream: int, code: int = ErrorCode.CANCEL) -> None:
        """Drop a stream in both directions. No event follows for it."""
        if stream in self._streams:
            self._reset(stream, code)

    def ping(self, data: bytes) -> None:
        """Send a PING of 8 bytes; `PingAcknowledged` brings them back. The first byte must not be 0xFF: those are our own."""
        if len(data) != 8 or data[0] == OWN_PING[0]:
            raise LocalProtocolError("a PING carries 8 bytes, the first not 0xFF")
        self._ping(data)

    def go_away(self, code: int = ErrorCode.NO_ERROR, last_stream: int | None = None) -> None:
        """Send GOAWAY: streams of the peer above ``last_stream`` (by default the last one that we took) are not looked at.

        Those up to it go on; the driver closes when they are over, or at once.
        """
        self._goaway_sent = True
        last = self._accept_no_more_than(self._last_peer_stream() if last_stream is None else last_stream)
        self.outgoing += goaway_frame(last, code)

    # --- frames of the connection (called by the splitter) -------------------------------------------------------------------------------

    def on_settings(self, flags: int, payload: bytes) -> None:
        self._patience.spend(patience.SETTINGS, "SETTINGS")
        if flags & ACK:
            return
        settings = self._peer
        settings.take(payload)
        self.outgoing += SETTINGS_ACK
        self._settings_received = True
        self.max_frame_size = settings.max_frame_size
        if settings.max_concurrent_streams is not None:
            before, self._peer_max_streams = self._peer_max_streams, min(settings.max_concurrent_streams, MAX_STREAM_ID)
            if self._peer_max_streams > before:
                self._events.append(MoreStreamsAllowed())
        for size in settings.table_sizes:
            self._writer.resize(size)
        self._shift_windows(settings.initial_window_size - self._initial_send_window)
        self._initial_send_window = settings.initial_window_size

    def _shift_windows(self, by: int) -> None:
        """RFC 9113 section 6.9.2: a changed initial window moves the windows of living streams by the difference, below zero too."""
        if by == 0:
            return
        for stream in self._streams.values():
            self._widen(stream, by)
            if stream.send_window > MAX_WINDOW:
                raise RemoteProtocolError("SETTINGS widen a window beyond 2^31-1", ErrorCode.FLOW_CONTROL_ERROR)

    def on_ping(self, flags: int, payload: bytes) -> None:
        self._patience.spend(patience.PING, "PING")
        if flags & ACK:
            self._on_ping_acknowledged(payload)
        else:
            self.outgoing += frame_header(8, FrameType.PING, ACK, 0) + payload

    def _on_ping_acknowledged(self, payload: bytes) -> None:
        self._events.append(PingAcknowledged(payload))

    def on_goaway(self, last_stream: int, code: int, debug: bytes) -> None:
        self._goaway_received = True
        self._events.append(GoingAway(last_stream, code))

    def on_ignored(self, kind: int) -> None:
        self._patience.spend(patience.IGNORED_FRAME, f"frames of type {kind} that change nothing")

    # --- frames of streams (called by the splitter) --------------------------------------------------------------------------------------

    def on_data(self, stream: int, charged: int, piece: memoryview, end: bool) -> None:
        if charged:
            left = self._receive_window - charged
            if left < 0:
                raise RemoteProtocolError("DATA beyond the connection's window", ErrorCode.FLOW_CONTROL_ERROR)
            self._receive_window = left
            if left < self._receive_window_low:
                self._return_connection_credit()
        state = self._streams.get(stream)
        if state is None or state.receiving is not _OPEN:
            self._on_data_out_of_place(stream, state)
            return
        if charged:  # the table's one step that is not looked up: DATA leaves an open direction open
            state.receive_window -= charged
            if state.receive_window < 0:
                self._fail_stream(stream, ErrorCode.FLOW_CONTROL_ERROR)
                return
        if piece:
            self._events.append(TunnelData(stream, piece))
        if end:
            self._on_end(state)

    def _on_data_out_of_place(self, stream: int, state: Stream | None) -> None:
        if state is None:
            self._on_frame_of_no_stream(stream, answer=ErrorCode.STREAM_CLOSED)
        elif state.receiving is Direction.SILENT:
            self._fail_stream(stream, ErrorCode.PROTOCOL_ERROR)
        else:
            self._fail_stream(stream, ErrorCode.STREAM_CLOSED)

    def on_padding(self, stream: int, length: int) -> None:
        self.consumed(stream, length)

    def on_headers(self, stream: int, block: bytes, end: bool) -> None:
        # Each of these reads the block, whatever it means to them: the table must see every one, also of streams that are gone.
        state = self._streams.get(stream)
        if state is None:
            self._on_headers_of_no_stream(stream, block, end)
        elif state.receiving is Direction.SILENT:
            self._on_answer(state, block, end)
        else:
            self._on_trailers(state, self._reader.read(block), end)

    def _on_trailers(self, state: Stream, fields: Fields, end: bool) -> None:
        """A tunnel has no use for trailers; they end it as an empty DATA does."""
        if state.receiving is Direction.ENDED:
            self._fail_stream(state.id, ErrorCode.STREAM_CLOSED)
            return
        try:
            check_trailers(fields)
        except MalformedHeaders:
            end = False
        if end:
            self._on_end(state)
        else:
            self._fail_stream(state.id, ErrorCode.PROTOCOL_ERROR)

    def _on_end(self, state: Stream) -> None:
        state.received(Signal.END)
        self._events.append(TunnelEnded(state.id))
        self._forget_if_over(state)

    def on_reset(self, stream: int, code: int) -> None:
        state = self._streams.pop(stream, None)
        if state is None:
            self._on_frame_of_no_stream(stream, answer=None)
            return
        answered = state.sending is not Direction.SILENT
        state.drop()
        self._events.append(TunnelReset(stream, code))
        self._patience.spend(patience.RESET if answered else patience.RESET_BEFORE_ANSWER, "RST_STREAM")

    def on_window_update(self, stream: int, increment: int) -> None:
        if stream == 0:
            self._on_connection_window_update(increment)
            return
        state = self._streams.get(stream)
        if state is None:
            self._on_frame_of_no_stream(stream, answer=None)
        elif increment == 0:
            self._fail_stream(stream, ErrorCode.PROTOCOL_ERROR)
        elif state.send_window + increment > MAX_WINDOW:
            self._fail_stream(stream, ErrorCode.FLOW_CONTROL_ERROR)
        else:
            self._widen(state, increment)

    def _on_connection_window_update(self, increment: int) -> None:
        if increment == 0:
            raise RemoteProtocolError("WINDOW_UPDATE by 0")
        closed = self._send_window == 0
        self._send_window += increment
        if self._send_window > MAX_WINDOW:
            raise RemoteProtocolError("the connection's window beyond 2^31-1", ErrorCode.FLOW_CONTROL_ERROR)
        if closed:
            self._events.append(WindowOpened(None))

    def _widen(self, state: Stream, by: int) -> None:
        closed = state.send_window <= 0
        state.send_window += by
        if closed and state.send_window > 0 and state.sending is _OPEN:
            self._events.append(WindowOpened(state.id))

    # --- what the roles differ in --------------------------------------------------------------------------------------------------------

    @abstractmethod
    def _on_headers_of_no_stream(self, stream: int, block: bytes, end: bool) -> None: ...

    @abstractmethod
    def _on_answer(self, state: Stream, block: bytes, end: bool) -> None: ...

    @abstractmethod
    def _is_idle(self, stream: int) -> bool:
        """No frame has ever opened this stream."""

    @abstractmethod
    def _last_peer_stream(self) -> int:
        """The last stream of the peer that we took."""

    @abstractmethod
    def _accept_no_more_than(self, last_stream: int) -> int:
        """Pass over the peer's streams above ``last_stream``. Returns what GOAWAY may say: never more than an earlier one."""

    # --- shared ends ---------------------------------------------------------------------------------------------------------------------

    def _on_frame_of_no_stream(self, stream: int, *, answer: int | None) -> None:
        """A frame of a stream that is over or never was. ``answer``: the code of a reset, unless the peer could not know it was over.

        What was under way when we reset a stream (whole windows of DATA, when a policy closes many at once) is passed over in silence.
        """
        if self._is_idle(stream):
            raise RemoteProtocolError(f"a frame on stream {stream}, which nobody opened")
        if answer is not None and stream not in self._reset_here:
            self._patience.spend(patience.STALE_FRAME, "frames on closed streams")
            self.outgoing += rst_stream_frame(stream, answer)
            self._remember_reset(stream)

    def _fail_stream(self, stream: int, code: int) -> None:
        """The peer broke the rules of one stream: the others must not suffer."""
        self._patience.spend(patience.STREAM_ERROR, "stream errors")
        self._reset(stream, code)
        self._events.append(TunnelReset(stream, code))

    def _reset(self, stream: int, code: int) -> None:
        state = self._streams.pop(stream, None)
        if state is not None:
            state.drop()
        self.outgoing += rst_stream_frame(stream, code)
        self._remember_reset(stream)

    def _remember_reset(self, stream: int) -> None:
        self._reset_here[stream] = None
        if len(self._reset_here) > _REMEMBERED_RESETS:
            del self._reset_here[next(iter(self._reset_here))]

    def _forget_if_over(self, state: Stream) -> None:
        if state.is_over:
            self._streams.pop(state.id, None)

    def _send_headers(self, stream: int, block: bytes, *, end: bool) -> None:
        self.outgoing += header_frames(stream, block, end_stream=end, max_frame_size=self.max_frame_size)

    def _ping(self, data: bytes) -> None:
        self.outgoing += frame_header(8, FrameType.PING, 0, 0) + data

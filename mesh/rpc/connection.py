"""One HTTP/2 connection of h2 over a trio stream, the same for client and server: streams of messages, windows, keepalive, GOAWAY.

The reader never waits for a stream: what arrives is kept per stream, bounded by the stream's window; connection credit goes back on
arrival, stream credit when a consumer has taken the bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, runtime_checkable

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h2.settings
import trio
from h2.connection import ConnectionInputs, ConnectionState, H2ConnectionStateMachine

from mesh.rpc.errors import RpcError
from mesh.rpc.metadata import Header
from mesh.wire.errors import ErrorCode, RemoteProtocolError
from mesh.wire.grpc import HEADER_SIZE, MessageReader, MessageTooLarge, Status, message_header, status_from_reset

READ_SIZE: Final = 64 * 1024
MAX_QUEUED_DATA: Final = 256 * 1024
"""DATA accepted from callers but not yet by the transport; a peer with a huge window that reads slowly costs no more than this."""
MAX_QUEUED_CONTROL: Final = 1024 * 1024
"""Beyond MAX_QUEUED_DATA only answers to the peer's own frames are queued: this many mean that it sends and does not read."""
INITIAL_WINDOW: Final = 65535
SMALL_MESSAGE: Final = 16 * 1024 - HEADER_SIZE
"""A message up to this size goes out with its header in one frame: two frames are often two packets, and two turns of both ends' loops."""
CLOSE_TIMEOUT: Final = 1.0
"""For what is queued at the end (the last trailers, GOAWAY) to go out."""
RESET_BURST: Final = 200
RESETS_PER_SECOND: Final = 20.0
"""Streams a peer may cancel; more is the rapid-reset attack (CVE-2023-44487)."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a peer may make us hold. Sizes in bytes, times in seconds. h2 holds a peer to windows and stream count from the first byte,
    before it can have read our SETTINGS: a window below HTTP/2's initial 65 535 would break honest peers."""

    max_message: int
    max_streams: int = 100
    max_header_list: int = 64 * 1024
    stream_window: int = 256 * 1024
    connection_window: int = 4 * 1024 * 1024
    keepalive_interval: float = 30.0
    keepalive_timeout: float = 10.0

    def __post_init__(self) -> None:
        if min(self.stream_window, self.connection_window) < INITIAL_WINDOW:
            raise ValueError("windows below HTTP/2's initial one")


_GRACEFUL_GOAWAY: Final = {
    # h2 closes its connection at the first GOAWAY it receives; RFC 9113 section 6.8 lets the streams up to last_stream_id go on, and
    # istiod ends every connection that way once in half an hour.
    **H2ConnectionStateMachine._transitions,
    (ConnectionState.CLIENT_OPEN, ConnectionInputs.RECV_GOAWAY): (None, ConnectionState.CLIENT_OPEN),
    (ConnectionState.SERVER_OPEN, ConnectionInputs.RECV_GOAWAY): (None, ConnectionState.SERVER_OPEN),
}


@runtime_checkable
class Direct(Protocol):
    """What a transport may be able to do besides: send without a task that waits."""

    def send_now(self, data: bytearray) -> bool:
        """Take all of it, and send what there is room for. False: the rest goes with `flush`."""

    async def flush(self) -> None: ...


class Http2Stream:
    """One call's stream. Made by the connection; every method may raise the RpcError by which the stream failed."""

    def __init__(self, connection: Http2Connection, stream_id: int) -> None:
        self.id = stream_id
        self.headers: list[Header] | None = None
        self.trailers: list[Header] | None = None
        self.ended = False
        """The peer has ended its direction."""
        self.closed_here = False
        self.failure: RpcError | None = None
        self.on_failure: Callable[[], None] | None = None
        self._connection = connection
        self._reader = MessageReader(connection.limits.max_message)
        self._arrived = bytearray()
        self._owed = 0
        self._changed = trio.lowlevel.ParkingLot()
        self._sending = trio.Lock()

    async def wait_headers(self) -> list[Header]:
        """Until the peer's first header block is there."""
        while self.headers is None:
            self._raise_failure()
            await self._changed.park()
        return self.headers

    def limit_messages(self, max_message: int) -> None:
        """Another limit than the connection's; before the first `receive_message`."""
        self._reader = MessageReader(max_message)

    async def receive_message(self) -> bytes | None:
        """The next message; None when the peer has ended. Messages that came whole before a failure are still delivered."""
        waited = False
        while True:
            if (message := self._reader.next_message()) is not None:
                if not waited:  # others get their turn between messages, also when many are there already
                    await trio.lowlevel.checkpoint()
                return message
            if self._arrived:
                self._take_arrived()
                continue
            if self.ended:  # before a failure: a reset after the end only says that the peer wants no more from us
                self._finish_reading()
                return None
            self._raise_failure()
            await self._changed.park()
            waited = True

    async def send_message(self, payload: bytes, *, end: bool = False) -> None:
        """Waits for the peer's windows and for room in the output. Messages of concurrent callers do not mix."""
        header = message_header(len(payload))
        small = len(payload) <= SMALL_MESSAGE
        if small and not self._sending.locked() and self._connection.send_at_once(self, header + payload, end=end):
            return
        try:
            self._sending.acquire_nowait()  # a turn of the loop cheaper than to acquire what is free
        except trio.WouldBlock:
            await self._sending.acquire()
        try:
            if small:
                await self._connection.send_data(self, memoryview(header + payload), end=end)
            else:
                await self._connection.send_data(self, memoryview(header), end=False)
                await self._connection.send_data(self, memoryview(payload), end=end)
        finally:
            self._connection.send_queued()
            self._sending.release()

    def send_headers(self, headers: Sequence[Header], *, end: bool = False) -> None:
        self._connection.send_headers(self, headers, end=end)

    def end(self) -> None:
        """End our direction."""
        self._connection.end_stream(self)

    def reset(self, code: int = ErrorCode.CANCEL) -> None:
        """Give the stream up, both ways; nothing when it is over already."""
        self._connection.reset_stream(self, code)

    @property
    def over(self) -> bool:
        return self.failure is not None or (self.ended and self.closed_here)

    def fail(self, failure: RpcError) -> None:
        """For the connection: the stream is dead. The first failure stays."""
        if self.failure is None:
            self.failure = failure
            if self.on_failure is not None:
                self.on_failure()
        self.wake()

    def feed(self, data: bytes, credit: int) -> None:
        """For the connection: DATA arrived, ``credit`` bytes of window with it (padding counts)."""
        self._arrived += data
        self._owed += credit
        self.wake()

    def wake(self) -> None:
        self._changed.unpark_all()

    def _take_arrived(self) -> None:
        data, self._arrived = bytes(self._arrived), bytearray()
        try:
            self._reader.receive(data)
        except RemoteProtocolError as exc:
            self._refuse(exc)
        if self._owed >= self._connection.limits.stream_window // 4 and not self.ended:
            owed, self._owed = self._owed, 0
            self._connection.return_credit(self, owed)

    def _finish_reading(self) -> None:
        try:
            self._reader.finish()
        except RemoteProtocolError as exc:
            self._refuse(exc)

    def _refuse(self, exc: RemoteProtocolError) -> None:
        status = Status.RESOURCE_EXHAUSTED if isinstance(exc, MessageTooLarge) else Status.INTERNAL
        failure = RpcError(status, exc.reason)
        raise failure from exc

    def _raise_failure(self) -> None:
        if self.failure is not None:
            raise RpcError(self.failure.status, self.failure.message)


class Http2Connection:
    """Drive with `run` in a task; `open_stream` (client) or ``on_request`` (server) give streams."""

    def __init__(
        self, transport: trio.abc.Stream, *, client_side: bool, limits: Limits, on_request: Callable[[Http2Stream], None] | None = None
    ) -> None:
        self.limits = limits
        self.lost: str | None = None
        """Why the connection is over."""
        self.going_away = False
        self._transport = transport
        self._direct = transport if isinstance(transport, Direct) else None
        self._on_request = on_request
        self._streams: dict[int, Http2Stream] = {}
        self._out = bytearray()
        self._in_flight = 0
        self._wake_writer = trio.lowlevel.ParkingLot()
        self._progress = trio.lowlevel.ParkingLot()
        self._heard = 0
        self._scope = trio.CancelScope()
        self._credit = 0
        self._resets = RESET_BURST * 1.0
        self._resets_at = 0.0
        config = h2.config.H2Configuration(client_side=client_side)
        self._h2 = h2.connection.H2Connection(config)
        self._h2.state_machine._transitions = _GRACEFUL_GOAWAY  # shadows the class's table for this connection
        self._h2.decoder.max_header_list_size = limits.max_header_list
        self._h2.local_settings = h2.settings.Settings(client=client_side, initial_values=self._settings(client_side))

    def _settings(self, client_side: bool) -> dict[h2.settings.SettingCodes, int]:
        code = h2.settings.SettingCodes
        settings: dict[h2.settings.SettingCodes, int] = {
            code.INITIAL_WINDOW_SIZE: self.limits.stream_window,
            code.MAX_HEADER_LIST_SIZE: self.limits.max_header_list,
        }
        if client_side:
            settings[code.ENABLE_PUSH] = 0
        else:
            settings[code.MAX_CONCURRENT_STREAMS] = self.limits.max_streams
        return settings

    # --- life ---

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until the connection is lost or closed; then every stream has failed, ``lost`` says why and the transport is closed."""
        self._h2.initiate_connection()
        self._h2.increment_flow_control_window(self.limits.connection_window - INITIAL_WINDOW)
        self._pump()
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._run_writer)
                    nursery.start_soon(self._run_keepalive)
                    task_status.started()
                    await self._run_reader()
        finally:
            self._send_goaway(ErrorCode.NO_ERROR)
            self._lose("closed here")
            await self._close_transport()

    def close(self, code: int = ErrorCode.NO_ERROR) -> None:
        """GOAWAY and the end of every stream; `run` returns soon."""
        self._send_goaway(code)
        self._lose("closed here")

    async def wait_closing(self) -> None:
        """Until the connection is lost or either side has said GOAWAY."""
        while self.lost is None and not self.going_away:
            await self._progress.park()

    def _send_goaway(self, code: int) -> None:
        if self.lost is None and not self.going_away:
            self.going_away = True
            self._h2.close_connection(error_code=code)
            self._pump()

    def _lose(self, reason: str) -> None:
        if self.lost is None:
            self.lost = reason
            for stream in list(self._streams.values()):
                stream.fail(RpcError(Status.UNAVAILABLE, reason))
            self._streams.clear()
            self._progress.unpark_all()
            self._wake_writer.unpark_all()  # it ends the connection when all is sent
            self._scope.deadline = trio.current_time() + CLOSE_TIMEOUT

    async def _close_transport(self) -> None:
        """When `run` was cancelled, what was queued still goes, if the transport takes it soon."""
        with trio.move_on_after(CLOSE_TIMEOUT, shield=True):
            try:
                if self._out and not self._in_flight:
                    await self._transport.send_all(bytes(self._out))
                await self._transport.aclose()
            except (trio.BrokenResourceError, trio.ClosedResourceError, OSError):
                pass  # the peer was quicker
        await trio.aclose_forcefully(self._transport)

    # --- what streams ask for ---

    async def open_stream(self, headers: Sequence[Header]) -> Http2Stream:
        """Client: a new stream with its request headers; waits while the peer allows no more streams. Raises RpcError UNAVAILABLE."""
        while True:
            if self.lost is not None:
                raise RpcError(Status.UNAVAILABLE, self.lost)
            if self.going_away:
                raise RpcError(Status.UNAVAILABLE, "the peer is going away")
            if self._h2.open_outbound_streams < self._h2.remote_settings.max_concurrent_streams:
                break
            await self._progress.park()
        stream = Http2Stream(self, self._h2.get_next_available_stream_id())
        self._streams[stream.id] = stream
        self.send_headers(stream, headers)
        return stream

    def send_headers(self, stream: Http2Stream, headers: Sequence[Header], *, end: bool = False) -> None:
        stream._raise_failure()
        try:
            self._h2.send_headers(stream.id, headers, end_stream=end)
        except h2.exceptions.H2Error as exc:
            raise RpcError(Status.INTERNAL, f"headers cannot be sent: {exc}") from exc
        self._sent(stream, end)

    def send_at_once(self, stream: Http2Stream, data: bytes, *, end: bool) -> bool:
        """Send this in one frame, if there is room for it. False: not a byte went.

        No look at whether the caller was cancelled, which costs as much as the frame: who sends for ever waits in the end, for a window or
        for room in the output.
        """
        if len(data) > self._room(stream):
            return False
        self._h2.send_data(stream.id, data, end_stream=end)
        self._sent(stream, end, wake=self._direct is None)
        self.send_queued()
        return True

    async def send_data(self, stream: Http2Stream, data: memoryview, *, end: bool) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        while data:
            room = self._room(stream)
            if room <= 0:
                self._wake_writer.unpark_all()
                await self._progress.park()
                continue
            last = len(data) <= room
            self._h2.send_data(stream.id, bytes(data[:room]), end_stream=end and last)
            data = data[room:]
            self._sent(stream, end and last, wake=not last or self._direct is None)

    def send_queued(self) -> None:
        """Send what waits in the output, without waking the writer for it where the transport takes it now."""
        if self._direct is None or self._in_flight or not self._out:
            return
        data, self._out = self._out, bytearray()
        try:
            if not self._direct.send_now(data):
                self._in_flight = len(data)
                self._wake_writer.unpark_all()
            elif len(data) >= MAX_QUEUED_DATA:  # others wait for room, and the writer finds nothing left to make some of
                self._progress.unpark_all()
        except (trio.BrokenResourceError, trio.ClosedResourceError, OSError) as exc:
            self._lose(f"connection lost: {_reason(exc)}")

    def _room(self, stream: Http2Stream) -> int:
        """Bytes that may be sent now. Raises RpcError when none ever will."""
        stream._raise_failure()
        if stream.closed_here:
            raise RpcError(Status.CANCELLED, "the stream is closed")
        try:
            window = self._h2.local_flow_control_window(stream.id)
        except h2.exceptions.H2Error as exc:
            raise RpcError(Status.CANCELLED, "the stream is closed") from exc
        return min(window, self._h2.max_outbound_frame_size, MAX_QUEUED_DATA - len(self._out) - self._in_flight)

    def end_stream(self, stream: Http2Stream) -> None:
        stream._raise_failure()
        if not stream.closed_here:
            self._h2.end_stream(stream.id)
            self._sent(stream, True)

    def reset_stream(self, stream: Http2Stream, code: int) -> None:
        if stream.over or self.lost is not None:
            return
        try:
            self._h2.reset_stream(stream.id, code)
        except h2.exceptions.H2Error:
            pass  # h2 saw it close before we did
        stream.fail(RpcError(Status.CANCELLED, "cancelled here"))
        self._forget(stream)
        self._pump()

    def return_credit(self, stream: Http2Stream, size: int) -> None:
        if self.lost is not None or stream.over:
            return
        try:
            self._h2.increment_flow_control_window(size, stream.id)
        except h2.exceptions.H2Error:
            return  # closed meanwhile: no window to open
        self._pump()

    def _sent(self, stream: Http2Stream, end: bool, *, wake: bool = True) -> None:
        if end:
            stream.closed_here = True
            if stream.ended:
                self._forget(stream)
        self._pump(wake=wake)

    def _forget(self, stream: Http2Stream) -> None:
        if self._streams.pop(stream.id, None) is not None:
            self._progress.unpark_all()

    def _pump(self, *, wake: bool = True) -> None:
        """``wake``: else whoever calls sees to it that it is sent."""
        data = self._h2.data_to_send()
        if data:
            self._out += data
            if wake:
                self._wake_writer.unpark_all()

    # --- tasks ---

    async def _run_writer(self) -> None:
        while self._out or self._in_flight or self.lost is None:
            if not self._out and not self._in_flight:
                await self._wake_writer.park()
                continue
            try:
                if self._in_flight and self._direct is not None:
                    await self._direct.flush()
                else:
                    data, self._out = self._out, bytearray()
                    self._in_flight = len(data)
                    await self._transport.send_all(data)
            except (trio.BrokenResourceError, trio.ClosedResourceError, OSError) as exc:
                self._lose(f"connection lost: {_reason(exc)}")
                break
            self._in_flight = 0
            self._progress.unpark_all()
        self._scope.cancel()

    async def _run_keepalive(self) -> None:
        """A peer that answers nothing, not even a PING, is gone: half-open connections show no other sign."""
        while True:
            await trio.sleep(self.limits.keepalive_interval)
            heard = self._heard
            self._h2.ping(b"liveness")
            self._pump()
            with trio.move_on_after(self.limits.keepalive_timeout) as patience:
                while self._heard == heard:
                    await self._progress.park()
            if patience.cancelled_caught:
                return self._lose("no answer to a keepalive PING")

    async def _run_reader(self) -> None:
        while True:
            try:
                data = await self._transport.receive_some(READ_SIZE)
            except (trio.BrokenResourceError, trio.ClosedResourceError, OSError) as exc:
                return self._lose(f"connection lost: {_reason(exc)}")
            if not data:
                return self._lose("closed by the peer")
            self._heard += 1
            try:
                self._receive(bytes(data))
            except h2.exceptions.ProtocolError as exc:
                self._pump()  # h2 has queued the GOAWAY
                return self._lose(f"protocol error: {exc}")
            except RemoteProtocolError as exc:
                self._send_goaway(exc.code)
                return self._lose(f"protocol error: {exc.reason}")

    def _receive(self, data: bytes) -> None:
        for event in self._h2.receive_data(data):
            self._handle(event)
        self._pump()
        self._progress.unpark_all()
        if len(self._out) > MAX_QUEUED_DATA + MAX_QUEUED_CONTROL:
            raise RemoteProtocolError("the peer sends and does not read", ErrorCode.ENHANCE_YOUR_CALM)

    def _handle(self, event: h2.events.Event) -> None:
        match event:
            case h2.events.DataReceived():
                self._handle_data(event)
            case h2.events.RequestReceived():
                self._handle_request(event)
            case h2.events.ResponseReceived():
                if stream := self._streams.get(event.stream_id):
                    stream.headers = _text(event.headers)
                    stream.wake()
            case h2.events.TrailersReceived():
                if stream := self._streams.get(event.stream_id):
                    stream.trailers = _text(event.headers)
            case h2.events.StreamEnded():
                self._handle_end(event.stream_id)
            case h2.events.StreamReset():
                self._handle_reset(event)
            case h2.events.ConnectionTerminated():
                self._handle_goaway(event)
            case _:
                pass  # windows, settings, pings: h2 has answered, and _receive wakes who waits for them

    def _handle_request(self, event: h2.events.RequestReceived) -> None:
        assert self._on_request is not None, "h2 gives requests to servers only"
        stream = Http2Stream(self, event.stream_id)
        stream.headers = _text(event.headers)
        self._streams[stream.id] = stream
        self._on_request(stream)

    def _handle_data(self, event: h2.events.DataReceived) -> None:
        size = event.flow_controlled_length or 0
        self._credit += size
        if self._credit >= self.limits.connection_window // 4:
            self._h2.increment_flow_control_window(self._credit)
            self._credit = 0
        if stream := self._streams.get(event.stream_id):
            stream.feed(event.data or b"", size)

    def _handle_end(self, stream_id: int) -> None:
        if stream := self._streams.get(stream_id):
            stream.ended = True
            if stream.closed_here:
                self._forget(stream)
            stream.wake()

    def _handle_reset(self, event: h2.events.StreamReset) -> None:
        if event.remote_reset:
            self._count_reset()
        if stream := self._streams.get(event.stream_id):
            if not stream.ended:  # after its end a reset only means: send no more
                stream.fail(
                    RpcError(status_from_reset(event.error_code or 0), f"stream reset by the peer with {_code_name(event.error_code)}")
                )
            elif not stream.closed_here:
                stream.fail(RpcError(Status.CANCELLED, "the peer wants no more"))
            self._forget(stream)

    def _count_reset(self) -> None:
        now = trio.current_time()
        self._resets = min(float(RESET_BURST), self._resets + (now - self._resets_at) * RESETS_PER_SECOND) - 1
        self._resets_at = now
        if self._resets < 0:
            raise RemoteProtocolError("the peer resets too many streams", ErrorCode.ENHANCE_YOUR_CALM)

    def _handle_goaway(self, event: h2.events.ConnectionTerminated) -> None:
        self.going_away = True
        why = (event.additional_data or b"").decode("utf-8", "replace")[:200]
        failure = RpcError(Status.UNAVAILABLE, f"received GOAWAY {_code_name(event.error_code)}" + (f": {why}" if why else ""))
        last = event.last_stream_id or 0
        for stream in list(self._streams.values()):
            if event.error_code or stream.id > last:
                stream.fail(failure)
                self._forget(stream)


def _text(headers: Iterable[tuple[bytes, bytes]] | None) -> list[Header]:
    """Decoded here: h2's own decoding lets a UnicodeDecodeError out. What is no UTF-8 becomes U+FFFD, which equals nothing we expect."""
    return [(name.decode("utf-8", "replace"), value.decode("utf-8", "replace")) for name, value in headers or ()]


def _code_name(code: int | None) -> str:
    return ErrorCode(code).name if code is not None and code in ErrorCode._value2member_map_ else f"code {code}"


def _reason(exc: BaseException) -> str:
    """The innermost cause: trio wraps socket and TLS errors in BrokenResourceError."""
    while exc.__cause__ is not None:
        exc = exc.__cause__
    return str(exc) or type(exc).__name__

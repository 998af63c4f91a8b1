"""One HTTP/2 connection over a trio stream: streams of messages, windows, keepalive, GOAWAY. `mesh.http.h2` does the protocol.

The reader never waits for a stream: what arrives is kept per stream, bounded by the stream's window; credit goes back when a consumer has
taken the bytes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol, assert_never, runtime_checkable

import trio

from mesh.http.codec import BodyData, BodyEnd, Event, GoingAway, RefusedHead, RequestHead, ResponseHead, StreamReset
from mesh.http.h2 import Http2Client, Http2Server
from mesh.http.message import Headers, Request, Response
from mesh.http.options import ServerOptions
from mesh.model.l7.waypoint import PathNormalization
from mesh.rpc.errors import RpcError
from mesh.wire.errors import ErrorCode, LocalProtocolError, RemoteProtocolError
from mesh.wire.frames import DEFAULT_WINDOW
from mesh.wire.grpc import HEADER_SIZE, MessageReader, MessageTooLarge, Status, message_header, status_from_reset
from mesh.wire.hbone.patience import Patience

READ_SIZE: Final = 64 * 1024
MAX_QUEUED_DATA: Final = 256 * 1024
"""DATA accepted from callers but not yet by the transport; a peer with a huge window that reads slowly costs no more than this."""
MAX_QUEUED_CONTROL: Final = 1024 * 1024
"""Beyond MAX_QUEUED_DATA only answers to the peer's own frames are queued: this many mean that it sends and does not read."""
SMALL_MESSAGE: Final = 16 * 1024 - HEADER_SIZE
"""A message up to this size goes out with its header in one frame: two frames are often two packets, and two turns of both ends' loops."""
CLOSE_TIMEOUT: Final = 1.0
"""For what is queued at the end (the last trailers, GOAWAY) to go out."""
RESET_BURST: Final = 200.0
RESETS_PER_SECOND: Final = 20.0
"""Calls a client may give up; more is the rapid-reset attack (CVE-2023-44487). The codec counts too, but in halves of all calls, as suits a
gateway: here one call may cost a signature."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a peer may make us hold. Sizes in bytes, times in seconds. A peer is held to the window from the first byte, before it can have
    read our SETTINGS: one below HTTP/2's initial 65 535 would break honest peers."""

    max_message: int
    max_streams: int = 100
    stream_window: int = 256 * 1024
    keepalive_interval: float = 30.0
    keepalive_timeout: float = 10.0

    def __post_init__(self) -> None:
        if self.stream_window < DEFAULT_WINDOW:
            raise ValueError("a window below HTTP/2's initial one")


@runtime_checkable
class Direct(Protocol):
    """What a transport may be able to do besides: send without a task that waits."""

    def send_now(self, data: bytes) -> bool:
        """Take all of it, and send what there is room for. False: the rest goes with `flush`."""

    async def flush(self) -> None: ...


class Http2Stream:
    """One call's stream. Made by the connection; every method may raise the RpcError by which the stream failed."""

    def __init__(self, connection: Http2Connection, stream_id: int) -> None:
        self.id = stream_id
        self.trailers: Headers = []
        self.ended = False
        """The peer has ended its direction."""
        self.closed_here = False
        self.failure: RpcError | None = None
        self.on_failure: Callable[[], None] | None = None
        self._connection = connection
        self._reader = MessageReader(connection.limits.max_message)
        self._arrived = bytearray()
        self._changed = trio.lowlevel.ParkingLot()
        self._sending = trio.Lock()

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
            if self.ended:  # before a failure: one after the end only says that the peer wants no more from us
                self._finish_reading()
                return None
            self.raise_failure()
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

    def end(self, trailers: Headers | None = None) -> None:
        """End our direction."""
        self._connection.end_stream(self, trailers)

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

    def feed(self, data: bytes | memoryview) -> None:
        """For the connection: DATA arrived."""
        self._arrived += data
        self.wake()

    def wake(self) -> None:
        self._changed.unpark_all()

    def raise_failure(self) -> None:
        if self.failure is not None:
            raise RpcError(self.failure.status, self.failure.message)

    def _take_arrived(self) -> None:
        data, self._arrived = self._arrived, bytearray()
        try:
            self._reader.receive(data)
        except RemoteProtocolError as exc:
            self._refuse(exc)
        self._connection.return_credit(self, len(data))

    def _finish_reading(self) -> None:
        try:
            self._reader.finish()
        except RemoteProtocolError as exc:
            self._refuse(exc)

    def _refuse(self, exc: RemoteProtocolError) -> None:
        status = Status.RESOURCE_EXHAUSTED if isinstance(exc, MessageTooLarge) else Status.INTERNAL
        failure = RpcError(status, exc.reason)
        raise failure from exc


class OutboundStream(Http2Stream):
    """One that we opened."""

    response: Response | None = None

    async def wait_response(self) -> Response:
        """Until the head of the answer is there."""
        while self.response is None:
            self.raise_failure()
            await self._changed.park()
        return self.response


class InboundStream(Http2Stream):
    """One that the peer opened."""

    def __init__(self, connection: ServerConnection, stream_id: int, request: Request) -> None:
        super().__init__(connection, stream_id)
        self.request = request
        self._server = connection

    def respond(self, response: Response, *, ended: bool) -> None:
        """The head of the answer; ``ended``: that is all of it."""
        self._server.respond(self, response, ended=ended)


class Http2Connection(ABC):
    """Drive with `run` in a task."""

    def __init__(self, transport: trio.abc.Stream, codec: Http2Client | Http2Server, limits: Limits) -> None:
        self.limits = limits
        self.lost: str | None = None
        """Why the connection is over."""
        self.going_away = False
        self._transport = transport
        self._direct = transport if isinstance(transport, Direct) else None
        self._codec = codec
        self._streams: dict[int, Http2Stream] = {}
        self._in_flight = 0
        """Bytes that the transport has, and has not sent."""
        self._wake_writer = trio.lowlevel.ParkingLot()
        self._progress = trio.lowlevel.ParkingLot()
        self._heard = 0
        self._scope = trio.CancelScope()

    # --- life ---

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until the connection is lost or closed; then every stream has failed, ``lost`` says why and the transport is closed."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._run_writer)
                    nursery.start_soon(self._run_keepalive)
                    task_status.started()
                    await self._run_reader()
        finally:
            self.close()
            await self._close_transport()

    def close(self) -> None:
        """The end of every stream; `run` returns soon."""
        self._lose("closed here")

    async def wait_closing(self) -> None:
        """Until the connection is lost or either side has said GOAWAY."""
        while self.lost is None and not self.going_away:
            await self._progress.park()

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
                if self._codec.unsent and not self._in_flight:
                    await self._transport.send_all(self._codec.take_outgoing())
                await self._transport.aclose()
            except (trio.BrokenResourceError, trio.ClosedResourceError, OSError):
                pass  # the peer was quicker
        await trio.aclose_forcefully(self._transport)

    # --- what streams ask for ---

    def send_at_once(self, stream: Http2Stream, data: bytes, *, end: bool) -> bool:
        """Send this in one frame, if there is room for it. False: not a byte went.

        No look at whether the caller was cancelled, which costs as much as the frame: who sends for ever waits in the end, for a window or
        for room in the output.
        """
        if len(data) > self._room(stream):
            return False
        self._codec.send_data(stream.id, data)
        if end:
            self._end(stream, None)
        if self._direct is None:
            self._wake_writer.unpark_all()
        else:
            self.send_queued()
        return True

    async def send_data(self, stream: Http2Stream, data: memoryview, *, end: bool) -> None:
        """What goes with it in the end waits for `send_queued`, where the transport is a direct one."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while data:
            room = self._room(stream)
            if room <= 0:
                self._wake_writer.unpark_all()
                await self._progress.park()
                continue
            self._codec.send_data(stream.id, data[:room])
            data = data[room:]
        if end:
            self._end(stream, None)
        if self._direct is None:
            self._wake_writer.unpark_all()

    def send_queued(self) -> None:
        """Send what waits in the output, without waking the writer for it where the transport takes it now."""
        if self._direct is None or self._in_flight or not self._codec.unsent:
            return
        data = self._codec.take_outgoing()
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
        stream.raise_failure()
        if stream.closed_here:
            raise RpcError(Status.CANCELLED, "the stream is closed")
        return min(self._codec.room(stream.id), MAX_QUEUED_DATA - self._codec.unsent - self._in_flight)

    def end_stream(self, stream: Http2Stream, trailers: Headers | None) -> None:
        stream.raise_failure()
        if not stream.closed_here:
            self._end(stream, trailers)
            self._pump()

    def _end(self, stream: Http2Stream, trailers: Headers | None) -> None:
        try:
            self._codec.send_end(stream.id, trailers)
        except LocalProtocolError as exc:
            raise _unsendable(exc) from exc
        self._ended_here(stream)

    @abstractmethod
    def _ended_here(self, stream: Http2Stream) -> None:
        """Our direction is over; for the codec too."""

    def reset_stream(self, stream: Http2Stream, code: int) -> None:
        if stream.over or self.lost is not None:
            return
        self._codec.reset(stream.id, code)
        stream.fail(RpcError(Status.CANCELLED, "cancelled here"))
        self._forget(stream.id)
        self._pump()

    def return_credit(self, stream: Http2Stream, size: int) -> None:
        if self.lost is None:
            self._codec.consumed(stream.id, size)
            self._pump()

    def _forget(self, stream_id: int) -> None:
        if self._streams.pop(stream_id, None) is not None:
            self._progress.unpark_all()

    def _pump(self) -> None:
        """Have sent what nobody else will see to."""
        if self._codec.unsent:
            self._wake_writer.unpark_all()

    # --- tasks ---

    async def _run_writer(self) -> None:
        while self._codec.unsent or self._in_flight or self.lost is None:
            if not self._codec.unsent and not self._in_flight:
                await self._wake_writer.park()
                continue
            try:
                if self._in_flight and self._direct is not None:
                    await self._direct.flush()
                else:
                    data = self._codec.take_outgoing()
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
            self._codec.ping()
            self._pump()
            with trio.move_on_after(self.limits.keepalive_timeout) as patience:
                while self._heard == heard:
                    await self._progress.park()
            if patience.cancelled_caught:
                return self._lose("no answer to a keepalive PING")

    async def _run_reader(self) -> None:
        while self.lost is None:
            try:
                data = await self._transport.receive_some(READ_SIZE)
            except (trio.BrokenResourceError, trio.ClosedResourceError, OSError) as exc:
                self._lose(f"connection lost: {_reason(exc)}")
                break
            if not data:
                self._lose("closed by the peer")
                break
            self._heard += 1
            try:
                self._receive(bytes(data))
            except RemoteProtocolError as exc:  # the codec has queued the GOAWAY
                self._lose(f"protocol error: {exc.reason}")

    def _receive(self, data: bytes) -> None:
        for event in self._codec.receive(data):
            if self.lost is None:
                self._handle(event)
        if self._codec.unsent > MAX_QUEUED_DATA + MAX_QUEUED_CONTROL:
            self._lose("the peer sends and does not read")
        self._pump()
        self._progress.unpark_all()

    def _handle(self, event: Event) -> None:
        match event:
            case BodyData(stream_id, data):
                if stream := self._streams.get(stream_id):
                    stream.feed(data)
            case BodyEnd(stream_id, trailers):
                if stream := self._streams.get(stream_id):
                    stream.trailers = trailers
                    self._handle_end(stream)
            case StreamReset(stream_id, code, reason):
                if stream := self._streams.get(stream_id):
                    self._handle_reset(stream, RpcError(status_from_reset(code), f"{reason} ({_code_name(code)})"))
            case GoingAway(code, why):
                self.going_away = True
                if code:
                    self._lose(f"received GOAWAY {_code_name(code)}" + (f": {why}" if why else ""))
            case RequestHead() | RefusedHead() | ResponseHead():
                self._handle_head(event)
            case _:
                assert_never(event)

    @abstractmethod
    def _handle_head(self, event: RequestHead | RefusedHead | ResponseHead) -> None: ...

    def _handle_end(self, stream: Http2Stream) -> None:
        stream.ended = True
        stream.wake()

    def _handle_reset(self, stream: Http2Stream, failure: RpcError) -> None:
        stream.fail(failure)
        self._forget(stream.id)


class ClientConnection(Http2Connection):
    """The end that asks, with `open_stream`."""

    def __init__(self, transport: trio.abc.Stream, *, limits: Limits) -> None:
        self._client = Http2Client(now=trio.current_time, stream_window=limits.stream_window)
        super().__init__(transport, self._client, limits)

    async def open_stream(self, request: Request) -> OutboundStream:
        """Waits while the peer allows no more streams. Raises RpcError: UNAVAILABLE, INTERNAL for a head that cannot be sent."""
        while True:
            if self.lost is not None:
                raise RpcError(Status.UNAVAILABLE, self.lost)
            if self.going_away:
                raise RpcError(Status.UNAVAILABLE, "the peer is going away")
            if self._client.capacity > 0:
                break
            await self._progress.park()
        try:
            stream = OutboundStream(self, self._client.send_request(request, ended=False))
        except LocalProtocolError as exc:
            raise _unsendable(exc) from exc
        self._streams[stream.id] = stream
        self._pump()
        if not self._client.reusable:  # that was the last number: whoever holds us opens another connection
            self.going_away = True
            self._progress.unpark_all()
        return stream

    def _ended_here(self, stream: Http2Stream) -> None:
        stream.closed_here = True

    def _handle_head(self, event: RequestHead | RefusedHead | ResponseHead) -> None:
        assert isinstance(event, ResponseHead), "only a server is asked"
        stream = self._streams.get(event.stream)
        if event.response.status >= 200 and isinstance(stream, OutboundStream):
            stream.response = event.response
            if event.ended:
                self._handle_end(stream)
            else:
                stream.wake()

    def _handle_end(self, stream: Http2Stream) -> None:
        """The answer is whole, whatever we still had to say."""
        super()._handle_end(stream)
        if not stream.closed_here:
            self._codec.reset(stream.id, ErrorCode.NO_ERROR)
            stream.fail(RpcError(Status.CANCELLED, "the peer wants no more"))
        self._forget(stream.id)


class ServerConnection(Http2Connection):
    """The end that answers: ``on_request`` is called with each stream."""

    def __init__(self, transport: trio.abc.Stream, *, limits: Limits, on_request: Callable[[InboundStream], None]) -> None:
        options = ServerOptions(
            paths=PathNormalization.NONE, upgrades=frozenset(), max_streams=limits.max_streams, stream_window=limits.stream_window
        )
        self._server = Http2Server(options, now=trio.current_time)
        super().__init__(transport, self._server, limits)
        self._on_request = on_request
        self._patience = Patience(trio.current_time, capacity=RESET_BURST, refill=RESETS_PER_SECOND)

    def close(self) -> None:
        if self.lost is None:
            self._server.give_up(ErrorCode.NO_ERROR)
        super().close()

    def respond(self, stream: InboundStream, response: Response, *, ended: bool) -> None:
        """Raises RpcError: INTERNAL for a head that cannot be sent."""
        stream.raise_failure()
        try:
            self._server.send_response(stream.id, response, ended=ended)
        except LocalProtocolError as exc:
            raise _unsendable(exc) from exc
        if ended:
            self._ended_here(stream)
        self._pump()

    def _ended_here(self, stream: Http2Stream) -> None:
        """The codec has reset what was still to come (RFC 9113 section 8.1)."""
        stream.closed_here = True
        self._forget(stream.id)

    def _handle_reset(self, stream: Http2Stream, failure: RpcError) -> None:
        super()._handle_reset(stream, failure)
        try:
            self._patience.spend(1, "calls given up")
        except RemoteProtocolError as exc:
            self._server.give_up(exc.code)
            self._lose(exc.reason)

    def _handle_head(self, event: RequestHead | RefusedHead | ResponseHead) -> None:
        match event:
            case RequestHead(stream_id, request, ended):
                stream = self._streams[stream_id] = InboundStream(self, stream_id, request)
                stream.ended = ended
                self._on_request(stream)
            case RefusedHead(stream_id, status):
                self._server.send_response(stream_id, Response(status, []), ended=True)
            case ResponseHead():
                raise AssertionError("only a client is answered")


def _unsendable(exc: LocalProtocolError) -> RpcError:
    return RpcError(Status.INTERNAL, f"headers cannot be sent: {exc}")


def _code_name(code: int) -> str:
    return ErrorCode(code).name if code in ErrorCode._value2member_map_ else f"code {code}"


def _reason(exc: BaseException) -> str:
    """The innermost cause: trio wraps socket and TLS errors in BrokenResourceError."""
    while exc.__cause__ is not None:
        exc = exc.__cause__
    return str(exc) or type(exc).__name__

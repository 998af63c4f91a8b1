"""An HTTP connection to an endpoint: drives a `ClientCodec` over a byte stream, and hands out what it says to whoever asked.

One `Call` is one try of a request, from waiting for a connection to the end of its response. What it may do is decided by where it stands:
without a session it waits; with one it is under way; once `over`, nothing is said to its sink any more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Final, Protocol, TypeAlias

from mesh.model.address import SocketAddress
from mesh.model.l7.destination import ConnectionPool
from mesh.reactor.loop import Reactor, Timer
from mesh.wire.errors import ErrorCode, LocalProtocolError, RemoteProtocolError
from waypoint_py.http.codec import BodyData, BodyEnd, ClientCodec, Event, GoingAway, RefusedHead, RequestHead, ResponseHead, StreamReset
from waypoint_py.http.message import Headers, Request, Response
from waypoint_py.stream import HIGH_WATER, ByteStream
from waypoint_py.upstream.session import FailureKind, ResponseSink, UpstreamFailure, UpstreamStream

LINGER: Final = 2.0
"""Seconds for the peer to end a connection after we have ended it."""

SWITCHING_PROTOCOLS: Final = 101

_OfStream: TypeAlias = RequestHead | RefusedHead | ResponseHead | BodyData | BodyEnd | StreamReset


class Place(Enum):
    """Where a call is, for who counts them."""

    NOWHERE = "nowhere"
    WAITING = "waiting"
    SESSION = "session"


class Owner(Protocol):
    """Who keeps a session and hears of it (`waypoint_py.upstream.pool`)."""

    @property
    def waits(self) -> bool:
        """Whether calls wait for a session."""

    @property
    def limits(self) -> ConnectionPool:
        """As they are now."""

    def session_free(self, session: HttpSession) -> None:
        """It may take another call, and may not have been able to before."""

    def session_gone(self, session: HttpSession) -> None:
        """It takes no more calls; those under way go on."""

    def session_closed(self, session: HttpSession) -> None:
        """Its connection is no more."""

    def call_over(self, call: Call) -> None:
        """It is over, wherever it was."""

    def take_back(self, call: Call) -> bool:
        """The session broke and surely nobody has done anything with the request: whether it will be begun anew, on another session. If
        so, the call is the owner's again."""


class Call:
    """`UpstreamStream` and `Cancel` in one."""

    __slots__ = (
        "_on_open",
        "_pending_end",
        "began_at",
        "body_begun",
        "head_ended",
        "local_address",
        "opened",
        "over",
        "owner",
        "place",
        "request",
        "responded",
        "retried",
        "room_seen",
        "sent_all",
        "session",
        "sink",
        "stream",
        "upgraded",
    )

    def __init__(
        self, owner: Owner, request: Request, head_ended: bool, sink: ResponseSink, on_open: Callable[[UpstreamStream], None]
    ) -> None:
        self.owner = owner
        self.request = request
        self.head_ended = head_ended
        """The request is a head alone."""
        self.sink = sink
        self._on_open = on_open
        self.session: HttpSession | None = None
        self.place = Place.NOWHERE
        """The owner's to set."""
        self.stream = 0
        self.local_address: SocketAddress | None = None
        self.over = False
        self.opened = False
        self.body_begun = False
        self.sent_all = False
        self.responded = False
        self.upgraded = False
        self.retried = False
        self.room_seen = 0
        """What `room` said last, less what was sent since."""
        self.began_at = 0
        """How many bytes the session had written before this call's."""
        self._pending_end: tuple[Headers | None] | None = None

    # --- UpstreamStream

    def room(self) -> int:
        session = self.session
        return 0 if session is None else session.room(self)

    def send_data(self, data: bytes | memoryview) -> None:
        if self.session is not None and data:
            self.body_begun = True
            self.session.send_data(self, data)

    def send_end(self, trailers: Headers | None = None) -> None:
        if self.session is not None:
            self.body_begun = True
            self.session.send_end(self, trailers)
        elif not self.over:
            self._pending_end = (trailers,)

    def consumed(self, size: int) -> None:
        if self.session is not None:
            self.session.consumed(self, size)

    def reset(self) -> None:
        if self.over:
            return
        self.over = True
        session, self.session = self.session, None
        self.owner.call_over(self)  # first: the session may begin another one at once
        if session is not None:
            session.give_up(self)

    # --- Cancel

    def cancel(self) -> None:
        self.reset()

    # --- session and owner

    def tell_open(self) -> None:
        """Its head has been written."""
        if self.over or self.session is None:
            return
        if self.opened:  # begun anew after all: it may have waited for room
            if self._pending_end is not None:
                (trailers,), self._pending_end = self._pending_end, None
                self.send_end(trailers)
            else:
                self.sink.writable()
        else:
            self.opened = True
            self._on_open(self)

    def fail(self, failure: UpstreamFailure) -> None:
        """Tell the sink that this try is over. Idempotent."""
        if not self.over:
            self.over = True
            self.session = None
            self.owner.call_over(self)
            self.sink.failed(failure)

    def finish(self) -> None:
        """Its response is complete; the sink is still to be told."""
        self.over = True
        self.session = None
        self.owner.call_over(self)


class HttpSession:
    """The sink of one connection. It keeps to those of its owner's bounds that concern one connection."""

    __slots__ = (
        "_broken",
        "_calls",
        "_closing",
        "_codec",
        "_cut",
        "_dispatching",
        "_eof",
        "_freed",
        "_heard",
        "_idle_timer",
        "_lifetime",
        "_limited",
        "_linger",
        "_owner",
        "_paused",
        "_reactor",
        "_served",
        "_stream",
        "_took_back",
        "_written",
        "idle_since",
        "local_address",
    )

    def __init__(self, reactor: Reactor, stream: ByteStream, codec: ClientCodec, owner: Owner) -> None:
        self._reactor = reactor
        self._stream = stream
        self._codec = codec
        self._owner = owner
        self._calls: dict[int, Call] = {}
        self._limited: set[Call] = set()
        """Calls that were told of less room than they may want."""
        self._served = 0
        self._written = 0  # bytes given to the stream
        self._heard = False
        self._paused = False
        self._dispatching = False
        self._freed = False  # a call has ended and the owner does not know
        self._took_back = False  # what is still unsent may be sent on another connection
        self._cut = False  # what is unsent of a request is not wanted any more
        self._eof = False
        self._closing = False
        self._broken = False
        self._linger: Timer | None = None
        self._idle_timer: Timer | None = None
        self._lifetime: Timer | None = None
        self.idle_since = reactor.now()
        """When the last call ended, by the loop's clock."""
        self.local_address = stream.local_address
        stream.attach(self)
        self._flush()
        self._watch_idleness()
        duration = owner.limits.max_connection_duration
        if duration:
            self._lifetime = reactor.call_later(duration, self.expire)

    # --- facts

    @property
    def active(self) -> int:
        """Calls under way."""
        return len(self._calls)

    @property
    def closing(self) -> bool:
        """Whether it takes no more calls, ever."""
        return self._closing

    @property
    def available(self) -> int:
        """How many calls may be begun now."""
        if self._closing or not self._codec.reusable:
            return 0
        limits = self._owner.limits
        free = min(self._codec.capacity, limits.max_concurrent_streams - len(self._calls))
        most = limits.max_requests_per_connection
        return min(free, most - self._served) if most else free

    # --- what the owner does

    def begin(self, call: Call) -> str | None:
        """Send the head of its request; `available` must not be 0. The call is told soon. Returns why it cannot be sent, if so."""
        try:
            call.stream = self._codec.send_request(call.request, ended=call.head_ended)
        except LocalProtocolError as exc:
            return str(exc)
        call.session = self
        call.local_address = self.local_address
        call.began_at = self._written
        call.sent_all = call.head_ended and call.request.upgrade is None
        self._served += 1
        self._calls[call.stream] = call
        self._flush()
        self._reactor.call_soon(call.tell_open)
        return None

    def expire(self) -> None:
        """Take no more calls; close when the last one is over. Idempotent."""
        self._leave_owner()
        if not self._calls:
            self._end()

    def discard(self, reason: str) -> None:
        """Close at once; calls under way fail."""
        self._break(FailureKind.TERMINATED, reason)

    # --- what calls do

    def room(self, call: Call) -> int:
        """As `UpstreamStream.room`."""
        room = self._room_now(call)
        call.room_seen = room
        if room < HIGH_WATER:
            self._limited.add(call)
        return room

    def _room_now(self, call: Call) -> int:
        if call.sent_all or self._stream.unsent > HIGH_WATER:
            return 0
        room = self._codec.room(call.stream)
        return room if room < HIGH_WATER else HIGH_WATER

    def send_data(self, call: Call, data: bytes | memoryview) -> None:
        if call.sent_all:
            return
        try:
            self._codec.send_data(call.stream, data)
        except LocalProtocolError as exc:
            self._cut_short_soon(call, str(exc))
            return
        self._flush()
        call.room_seen -= len(data)
        if call.room_seen <= 0:
            call.room_seen = 0
            self._limited.add(call)
            if self._room_now(call):
                self._reactor.call_soon(self._tell_of_room)

    def send_end(self, call: Call, trailers: Headers | None) -> None:
        if not call.sent_all:
            call.sent_all = True
            self._codec.send_end(call.stream, trailers)
            self._flush()
            if self._codec.finished:
                self._cut_short_soon(call, "the request's body is shorter than it was said to be")

    def _cut_short_soon(self, call: Call, because: str) -> None:
        """By what we said ourselves the connection is of no more use."""
        self._reactor.call_soon(lambda: self._cut_short(call, because))

    def _cut_short(self, call: Call, because: str) -> None:
        if call.over or self._broken:
            return
        if not call.upgraded:
            self._break(FailureKind.PROTOCOL, because)
            return
        # A byte stream in HTTP/1.1 has ended with our direction: what we have said may still arrive.
        self._forget(call)
        self._freed = True
        call.finish()
        self._settle()
        call.sink.complete([])

    def consumed(self, call: Call, size: int) -> None:
        self._codec.consumed(call.stream, size)
        if not self._dispatching:
            self._flush()
            self._regulate()

    def give_up(self, call: Call) -> None:
        """Nobody wants its response any more."""
        self._forget(call)
        self._freed = True
        self._codec.reset(call.stream, ErrorCode.CANCEL)
        if self._codec.finished and not self._calls:
            self._break(FailureKind.TERMINATED, "the request was given up")  # so that the peer need not go on with it
        else:
            self._flush()
            self._settle()

    # --- what the stream says

    def data(self, data: memoryview) -> None:
        self._heard = True
        try:
            events = self._codec.receive(data)
        except RemoteProtocolError as exc:
            self._break(FailureKind.PROTOCOL, exc.reason)
            return
        self._dispatch(events)

    def ended(self) -> None:
        self._eof = True
        try:
            events = self._codec.receive_eof()
        except RemoteProtocolError as exc:
            self._break(FailureKind.PROTOCOL, exc.reason)
            return
        self._dispatch(events)
        if self._broken:
            return
        self._leave_owner()
        if self._calls or self._took_back:
            self._break(FailureKind.TERMINATED, "connection closed by the peer")
        else:
            self._end()

    def drained(self) -> None:
        self._tell_of_room()

    def closed(self, reason: str | None) -> None:
        for timer in (self._linger, self._idle_timer, self._lifetime):
            if timer is not None:
                timer.cancel()
        kind = FailureKind.TLS if not self._heard and reason is not None and reason.startswith("tls ") else FailureKind.TERMINATED
        self._broken = True
        self._leave_owner()
        self._fail_calls(kind, reason or "connection closed by the peer")
        self._owner.session_closed(self)

    # --- events

    def _dispatch(self, events: Sequence[Event]) -> None:
        self._dispatching = True
        try:
            for event in events:
                if self._broken:
                    return
                if not isinstance(event, GoingAway):  # the codec is not reusable any more: `_settle` sees it
                    self._hand_out(event)
        finally:
            self._dispatching = False
        if self._broken:
            return
        self._flush()
        if self._limited:
            self._tell_of_room()
        self._settle()
        self._regulate()

    def _hand_out(self, event: _OfStream) -> None:
        call = self._calls.get(event.stream)
        if call is None:
            return  # given up meanwhile
        try:
            if isinstance(event, BodyData):
                call.sink.data(event.data)
            elif isinstance(event, ResponseHead):
                self._on_head(call, event.response, event.ended)
            elif isinstance(event, BodyEnd):
                self._complete(call)
                call.sink.complete(event.trailers)
            elif isinstance(event, StreamReset):
                self._on_reset(call, event)
        except Exception as exc:  # a mistake with one request must not cost the others
            self._reactor.report(exc, f"response to {call.request.method!r} {call.request.path!r}")
            if not call.over:
                self._forget(call)
                self._freed = True
                self._codec.reset(call.stream, ErrorCode.INTERNAL_ERROR)
                call.fail(UpstreamFailure(FailureKind.RESET, f"internal error: {exc!r}"))

    def _on_head(self, call: Call, response: Response, ended: bool) -> None:
        status = response.status
        if status < 200 and status != SWITCHING_PROTOCOLS:
            call.sink.informational(status, response.headers)
            return
        call.responded = True
        if call.request.upgrade is not None:
            call.upgraded = status == SWITCHING_PROTOCOLS or (status < 300 and not ended)
            if not call.upgraded and not call.sent_all:  # the offer was not taken: there is nothing to send
                call.sent_all = True
                self._codec.send_end(call.stream, None)
        if ended:
            self._complete(call)
        call.sink.response(response, ended)

    def _complete(self, call: Call) -> None:
        """The response is; whoever waits for the session gets it when all events have been handed out."""
        self._forget(call)
        self._freed = True
        if call.upgraded and not call.sent_all:
            self._codec.send_end(call.stream, None)  # the peer has ended its direction; what we have said may still arrive
        elif not call.sent_all:
            self._codec.reset(call.stream, ErrorCode.CANCEL)  # it has answered without hearing all, and need not hear the rest
            self._cut = self._codec.finished
        call.finish()

    def _on_reset(self, call: Call, event: StreamReset) -> None:
        self._forget(call)
        self._freed = True
        if self._eof:
            kind = FailureKind.TERMINATED
        elif event.untouched:
            kind = FailureKind.REFUSED_STREAM
        elif event.code == ErrorCode.PROTOCOL_ERROR:
            kind = FailureKind.PROTOCOL
        else:
            kind = FailureKind.RESET
        self._fail_call(call, UpstreamFailure(kind, event.reason), untouched=event.untouched)

    # --- what follows from events

    def _forget(self, call: Call) -> None:
        self._calls.pop(call.stream, None)
        self._limited.discard(call)

    def _flush(self) -> None:
        data = self._codec.take_outgoing()
        if data:
            self._written += len(data)
            self._stream.write(data)

    def _tell_of_room(self) -> None:
        for call in list(self._limited):
            if call in self._limited and self._room_now(call) > call.room_seen:
                self._limited.discard(call)
                call.sink.writable()

    def _regulate(self) -> None:
        """Read on, or not."""
        if self._codec.wants_data:
            if self._paused:
                self._paused = False
                self._stream.resume()
        elif not self._paused:
            self._paused = True
            self._stream.pause()

    def _settle(self) -> None:
        """What the end of a call, or news of the peer, leads to."""
        if self._broken or self._dispatching:
            return
        freed, self._freed = self._freed, False
        codec, most = self._codec, self._owner.limits.max_requests_per_connection
        if codec.finished or not codec.reusable or 0 < most <= self._served:
            self._leave_owner()
        if not self._calls and freed:
            self.idle_since = self._reactor.now()
            self._watch_idleness()
        if self._cut:
            self._break(FailureKind.TERMINATED, "answered before the request was complete")
        elif self._closing:
            if not self._calls:
                self._end()
        elif freed or self._owner.waits:
            self._owner.session_free(self)

    def _watch_idleness(self) -> None:
        """One timer for as long as the session lives, not one for each call."""
        timeout = self._owner.limits.http_idle_timeout
        if timeout and self._idle_timer is None and not self._closing:
            left = max(0.0, self.idle_since + timeout - self._reactor.now())
            self._idle_timer = self._reactor.call_later(left, self._look_at_idleness)

    def _look_at_idleness(self) -> None:
        self._idle_timer = None
        if self._calls:
            return  # the end of the last one begins anew
        if self._reactor.now() - self.idle_since >= self._owner.limits.http_idle_timeout > 0:
            self.expire()
        else:
            self._watch_idleness()

    # --- ends

    def _is_untouched(self, call: Call) -> bool:
        """Nothing of the call has left this process: all that was written since it began is unsent."""
        return self._written > call.began_at and self._stream.unsent >= self._written - call.began_at

    def _fail_call(self, call: Call, failure: UpstreamFailure, *, untouched: bool) -> None:
        call.session = None
        fresh = not (call.over or call.retried or call.body_begun or call.responded)
        if fresh and (untouched or self._is_untouched(call)) and self._owner.take_back(call):
            self._took_back = True
            return
        call.fail(failure)

    def _fail_calls(self, kind: FailureKind, because: str) -> None:
        calls, self._calls = self._calls, {}
        self._limited.clear()
        for call in calls.values():
            try:
                self._fail_call(call, UpstreamFailure(kind, because, because if kind is FailureKind.TLS else ""), untouched=False)
            except Exception as exc:  # the others must hear of it too
                self._reactor.report(exc, f"failure of {call.request.method!r} {call.request.path!r}")

    def _break(self, kind: FailureKind, because: str) -> None:
        """The connection is of no use any more, by the peer's fault or our will."""
        if self._broken:
            return
        self._broken = True
        self._flush()
        self._leave_owner()
        self._fail_calls(kind, because)
        self._stream.abort(because)  # after the calls: what is unsent shows which of them nobody has seen

    def _leave_owner(self) -> None:
        if not self._closing:
            self._closing = True
            self._owner.session_gone(self)

    def _end(self) -> None:
        """Nobody is served any more: say so, and wait a little for the peer's end."""
        if self._broken or self._linger is not None:
            return
        stream = self._stream
        if self._paused:
            self._paused = False
            stream.resume()
        stream.end()
        self._linger = self._reactor.call_later(LINGER, lambda: stream.abort("the peer does not end its connection"))

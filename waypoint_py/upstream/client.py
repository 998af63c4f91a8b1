"""An HTTP connection to an endpoint: drives a `ClientCodec` over a byte stream, and hands out what it says to whoever asked.

One `Call` is one try of a request, from waiting for a connection to the end of its response. What it may do is decided by where it stands:
without a session it waits; with one it is under way; once `over`, nothing is said to its sink any more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from itertools import count
from typing import Final, Protocol

from mesh.http.codec import BodyData, BodyEnd, ClientCodec, Event, GoingAway, ResponseHead, StreamReset
from mesh.http.message import Headers, Request, Response
from mesh.model.address import SocketAddress
from mesh.model.l7.destination import ConnectionPool
from mesh.reactor.loop import Reactor, Timer
from mesh.wire.errors import ErrorCode, LocalProtocolError, RemoteProtocolError
from waypoint_py.stream import HIGH_WATER, ByteStream
from waypoint_py.upstream.session import FailureKind, ResponseSink, UpstreamFailure, UpstreamStream

LINGER: Final = 2.0
"""Seconds for the peer to end a connection after we have ended it."""

UNREAD_ANSWERS: Final = 64 * 1024
"""Bytes of answers to what only wants answers (PING, SETTINGS) that a server may ask for and not read. Bodies have their own bound."""

FLUSHED_AT_ONCE: Final = 64 * 1024
"""Bytes that wait for the turn's end. With more, what is sent goes to the stream at once: `HttpSession.room` goes by what waits there."""

SWITCHING_PROTOCOLS: Final = 101


class Place(Enum):
    """Where a call is, for who counts them."""

    NOWHERE = "nowhere"
    WAITING = "waiting"
    SESSION = "session"


_NOWHERE: Final = Place.NOWHERE  # members of an enum are slower to find


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
        "body_left",
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
        self.place = _NOWHERE
        """The owner's to set."""
        self.stream = 0
        self.local_address: SocketAddress | None = None
        self.over = False
        self.opened = False
        self.body_begun = False
        self.body_left = -1 if request.content_length is None or request.upgrade is not None else request.content_length
        """Bytes that the head promises; below 0: it promises nothing."""
        self.sent_all = False
        self.responded = False
        self.upgraded = False
        self.retried = False
        self.room_seen = 0
        """What `room` said last, less what was sent since."""
        self.began_at = 0
        """How many bytes the session writes before this call's."""
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
    """The sink of one connection. It keeps to those of its owner's bounds that concern one connection. ``pings``: the codec has them."""

    __slots__ = (
        "_answers",
        "_answers_since",
        "_broken",
        "_calls",
        "_closing",
        "_codec",
        "_cut",
        "_dispatching",
        "_eof",
        "_flushing",
        "_freed",
        "_heard",
        "_idle_timer",
        "_lifetime",
        "_limited",
        "_linger",
        "_owner",
        "_paused",
        "_pinger",
        "_postponed",
        "_reactor",
        "_served",
        "_stream",
        "_took_back",
        "_written",
        "idle_since",
        "local_address",
    )

    def __init__(self, reactor: Reactor, stream: ByteStream, codec: ClientCodec, owner: Owner, *, pings: bool = False) -> None:
        self._reactor = reactor
        self._stream = stream
        self._codec = codec
        self._owner = owner
        self._calls: dict[int, Call] = {}
        self._limited: set[Call] = set()
        """Calls that were told of less room than they may want."""
        self._served = 0
        self._written = 0  # bytes given to the stream
        self._answers = 0  # bytes of them that only answer, from `_answers_since` on
        self._answers_since = 0
        self._heard = False
        self._paused = False
        self._dispatching = False
        self._freed = False  # a call has ended and the owner does not know
        self._took_back = False  # what is still unsent here will be sent on another connection
        self._cut = False  # what is unsent of a request is not wanted any more
        self._eof = False
        self._flushing = False  # `_flush_turn` will be called
        self._postponed = False
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
        self._pinger: Timer | None = None
        if pings and owner.limits.h2_keepalive_interval:
            self._pinger = reactor.call_later(owner.limits.h2_keepalive_interval, self._ping)
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
        if self._closing:
            return 0
        limits, free = self._owner.limits, self._codec.capacity
        most = limits.max_concurrent_streams - len(self._calls)
        if most < free:
            free = most
        most = limits.max_requests_per_connection
        return min(free, most - self._served) if most else free

    # --- what the owner does

    def begin(self, call: Call, *, soon: bool = True) -> str | None:
        """Send the head of its request; `available` must not be 0. The call is told of it ``soon``, or else within this call if it can be
        sent now. Returns why it cannot be sent, if so."""
        upgrades = call.request.upgrade is None or self._codec.upgrades
        if upgrades is None:
            self._postpone(call)
            return None
        if not upgrades:
            return "the server takes no upgrades"
        began_at = self._written + self._codec.unsent
        try:
            stream = self._codec.send_request(call.request, ended=call.head_ended)
        except LocalProtocolError as exc:
            return str(exc)
        self._served += 1
        self._enter(call, stream)
        call.began_at = began_at
        call.sent_all = call.head_ended and call.request.upgrade is None
        self._flush_soon()
        if soon:
            self._reactor.call_soon(call.tell_open)
        else:
            call.tell_open()
        return None

    def _enter(self, call: Call, stream: int) -> None:
        call.session, call.stream = self, stream
        call.local_address = self.local_address
        self._calls[stream] = call

    def _postpone(self, call: Call) -> None:
        """HTTP/2's SETTINGS say whether an upgrade may be asked for. Until they come the call has a number that no stream has."""
        self._postponed = True
        self._enter(call, next(number for number in count(-1, -1) if number not in self._calls))

    def _begin_postponed(self) -> None:
        for stream in [stream for stream in self._calls if stream < 0]:
            call = self._calls.pop(stream)
            unsendable = self.begin(call)
            if unsendable is not None:
                call.fail(UpstreamFailure(FailureKind.PROTOCOL, f"request cannot be sent: {unsendable}"))
                self._freed = True

    def expire(self) -> None:
        """Take no more calls; close when the last one is over. Idempotent."""
        self._leave_owner()
        if not (self._calls or self._broken):
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
        size = len(data)
        if call.body_left >= 0:
            call.body_left -= size
            if call.body_left < 0:
                self._cut_short_soon(call, "the request's body is longer than it was said to be")
                return
        self._codec.send_data(call.stream, data)
        self._flush_soon()
        call.room_seen -= size
        if call.room_seen <= 0:
            call.room_seen = 0
            self._limited.add(call)
            if self._room_now(call):
                self._reactor.call_soon(self._tell_of_room)

    def send_end(self, call: Call, trailers: Headers | None) -> None:
        if call.sent_all:
            return
        if call.body_left > 0:
            self._cut_short_soon(call, "the request's body is shorter than it was said to be")
            return
        call.sent_all = True
        self._codec.send_end(call.stream, trailers)
        self._flush_soon()
        if self._codec.finished:
            self._cut_short_soon(call, "the request ended its connection")

    def _cut_short_soon(self, call: Call, because: str) -> None:
        """By what we said ourselves there will be no more of it."""
        call.sent_all = True
        self._reactor.call_soon(lambda: self._cut_short(call, because))

    def _cut_short(self, call: Call, because: str) -> None:
        if call.over or self._broken:
            return
        self._forget(call)
        self._freed = True
        if call.upgraded:  # a byte stream in HTTP/1.1 has ended with our direction; what we have said may still arrive
            call.finish()
            self._settle()
            call.sink.complete([])
            return
        self._codec.reset(call.stream, ErrorCode.INTERNAL_ERROR)
        self._cut = self._codec.finished
        self._flush()
        call.fail(UpstreamFailure(FailureKind.PROTOCOL, because))
        self._settle()

    def consumed(self, call: Call, size: int) -> None:
        self._codec.consumed(call.stream, size)
        if not self._dispatching:
            self._flush_soon()
            self._regulate()

    def give_up(self, call: Call) -> None:
        """Nobody wants its response any more."""
        self._forget(call)
        self._freed = True
        if call.stream > 0:
            self._codec.reset(call.stream, ErrorCode.CANCEL)
        if self._codec.finished and not self._calls:
            self._break(FailureKind.TERMINATED, "the request was given up")  # so that the peer need not go on with it
        else:
            self._flush()
            self._settle()

    # --- what the stream says

    def data(self, data: memoryview) -> None:
        if self._broken:
            return
        self._heard = True
        ours = self._codec.unsent
        try:
            events = self._codec.receive(data)
        except RemoteProtocolError as exc:
            self._break(FailureKind.PROTOCOL, exc.reason, explained=True)
            return
        answers = self._codec.unsent - ours
        if answers and self._is_deaf(answers):
            self._break(FailureKind.PROTOCOL, "the peer sends and does not read")
            return
        self._dispatch(events)

    def _is_deaf(self, answers: int) -> bool:
        """Whether it has had us answer too much since it last took anything. Reading stops at nothing else here: a server that does not
        read while it cannot write would wait for us, and we for it."""
        if self._written - self._stream.unsent >= self._answers_since:  # what was written when we began to count has gone
            self._answers, self._answers_since = 0, self._written
        self._answers += answers
        return self._answers > UNREAD_ANSWERS

    def ended(self) -> None:
        if self._broken:
            return
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
        for timer in (self._linger, self._idle_timer, self._lifetime, self._pinger):
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
                if isinstance(event, GoingAway):
                    continue  # the codec is not reusable any more: `_settle` sees it
                call = self._calls.get(event.stream)
                if call is None:
                    continue  # given up meanwhile
                try:
                    if type(event) is BodyData:
                        call.sink.data(event.data)
                    elif type(event) is ResponseHead:
                        self._on_head(call, event.response, event.ended)
                    elif type(event) is BodyEnd:
                        self._complete(call)
                        call.sink.complete(event.trailers)
                    elif type(event) is StreamReset:
                        self._on_reset(call, event)
                except Exception as exc:
                    self._crashed(call, exc)
        finally:
            self._dispatching = False
        if self._broken:
            return
        if self._postponed and self._codec.upgrades is not None:
            self._postponed = False
            self._begin_postponed()
        self._flush()
        if self._limited:
            self._tell_of_room()
        self._settle()
        self._regulate()

    def _crashed(self, call: Call, error: Exception) -> None:
        """A mistake with one request must not cost the others."""
        self._reactor.report(error, f"response to {call.request.method!r} {call.request.path!r}")
        if not call.over:
            self._forget(call)
            self._freed = True
            self._codec.reset(call.stream, ErrorCode.INTERNAL_ERROR)
            call.fail(UpstreamFailure(FailureKind.RESET, f"internal error: {error!r}"))

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

    def _flush_soon(self) -> None:
        """Before the loop waits again: heads, bodies and their ends, of many calls, leave together."""
        if self._codec.unsent > FLUSHED_AT_ONCE:
            self._flush()
        elif not self._flushing:
            self._flushing = True
            self._reactor.call_soon(self._flush_turn, self._stream.abort)

    def _flush_turn(self) -> None:
        self._flushing = False
        self._flush()

    def _flush(self) -> None:
        if self._codec.unsent:
            data = self._codec.take_outgoing()
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
        # A server that allows no request at all will hardly be asked here again: kept, there would be one more connection with each.
        useful = codec.reusable if self._calls else codec.capacity
        if not useful or 0 < most <= self._served:
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

    def _ping(self) -> None:
        """A peer that is gone without a word is noticed though nothing is under way (http2KeepAlive)."""
        limits = self._owner.limits
        self._codec.ping()
        self._flush()
        self._pinger = self._reactor.call_later(limits.h2_keepalive_timeout or limits.h2_keepalive_interval or 1.0, self._look_for_life)

    def _look_for_life(self) -> None:
        interval = self._owner.limits.h2_keepalive_interval
        if self._codec.pings:
            self._break(FailureKind.TERMINATED, "keepalive: no answer to a ping")
        elif interval:
            self._pinger = self._reactor.call_later(interval, self._ping)

    # --- ends

    def _is_untouched(self, call: Call) -> bool:
        """Nothing of the call has left this process: all that was written since it began is still here, or nothing was."""
        return self._stream.unseen >= self._written - call.began_at

    def _fail_call(self, call: Call, failure: UpstreamFailure, *, untouched: bool) -> None:
        call.session = None
        fresh = not (call.over or call.retried or call.body_begun or call.responded)
        unseen = fresh and not untouched and self._is_untouched(call)
        if fresh and (untouched or unseen) and self._owner.take_back(call):
            self._took_back = self._took_back or unseen
            return
        call.fail(failure)

    def _fail_calls(self, kind: FailureKind, because: str) -> None:
        calls, self._calls = self._calls, {}
        self._limited.clear()
        for call in calls.values():
            try:
                failure = UpstreamFailure(kind, because, because if kind is FailureKind.TLS else "")
                self._fail_call(call, failure, untouched=call.stream < 0)
            except Exception as exc:  # the others must hear of it too
                self._reactor.report(exc, f"failure of {call.request.method!r} {call.request.path!r}")

    def _break(self, kind: FailureKind, because: str, *, explained: bool = False) -> None:
        """The connection is of no use any more, by the peer's fault or our will. ``explained``: the codec says why, which should arrive."""
        if self._broken:
            return
        self._broken = True
        self._flush()
        self._leave_owner()
        self._fail_calls(kind, because)
        if explained:
            self._end()
        else:  # and after the calls: what is unsent shows which of them nobody has seen
            self._stream.abort(because)

    def _leave_owner(self) -> None:
        if not self._closing:
            self._closing = True
            self._owner.session_gone(self)

    def _end(self) -> None:
        """Nobody is served any more: say so, and wait a little for the peer's end."""
        if self._linger is not None:
            return
        if self._took_back:
            self._stream.abort("the request goes another way")
            return
        stream = self._stream
        if self._paused:
            self._paused = False
            stream.resume()
        self._flush()
        stream.end()
        self._linger = self._reactor.call_later(LINGER, lambda: stream.abort("the peer does not end its connection"))

"""One client connection that speaks HTTP: drives its codec over its byte stream, and gives every request to an exchange of its own.

Back-pressure meets here. What a client does not take stays below `HIGH_WATER` in the stream, and exchanges that have more are told when
there is room (`wait_for_room`). What exchanges have not moved on is not consumed, so the codec gives the client no credit, or says that
nothing more should be read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, TypeVarTuple, assert_never

from mesh.http.codec import (
    BodyData,
    BodyEnd,
    Event,
    GoingAway,
    RefusedHead,
    RequestHead,
    ResponseHead,
    ServerCodec,
    StreamReset,
)
from mesh.http.message import Headers, Response
from mesh.reactor.loop import Timer
from mesh.wire.errors import ErrorCode, RemoteProtocolError
from waypoint_py.context import Connection
from waypoint_py.exchange import Exchange
from waypoint_py.plane import IDLE_SECONDS, Plane
from waypoint_py.stream import HIGH_WATER, ByteStream

Ts = TypeVarTuple("Ts")

HEAD_SECONDS = 60.0
"""For the head of a request that has begun to come (HTTP/1.1): a client that sends a byte now and then holds no connection for ever."""
LINGER_SECONDS: Final = 5.0
"""Until a client that was told that we are done must have closed, or read more of what it was told before (Envoy: delayed close)."""
_BEYOND: Final = 64 * 1024
"""How far above `HIGH_WATER` one writing may go."""
TOO_MUCH_UNSENT: Final = 2 * HIGH_WATER
"""Bytes that wait for the client to read, beyond which nothing of what it says is listened to. Bodies stop long before: these are answers
to what only wants answers (PING, SETTINGS, refused requests), which a client that never reads could have us store."""
REQUESTS_A_TURN: Final = 8
"""That a connection may begin before the others have their turn. One read brings thousands where a client does not wait for answers, and
each costs as much as any: a policy's refusal, too."""


class HttpConnection:
    """A `Sink`. ``serial``: requests follow one another (HTTP/1.1); ``on_gone`` is called once, at the end."""

    def __init__(
        self, plane: Plane, stream: ByteStream, codec: ServerCodec, facts: Connection, *, serial: bool, on_gone: Callable[[], None]
    ) -> None:
        self.plane = plane
        self.facts = facts
        self._stream = stream
        self._codec = codec
        self._serial = serial
        self._on_gone = on_gone
        self._exchanges: dict[int, Exchange] = {}
        self._blocked: dict[Exchange, None] = {}
        self._begun: deque[Exchange] = deque()  # they have come, and wait for their turn
        self._left = REQUESTS_A_TURN
        self._turn = plane.reactor.turns  # that `_left` is of
        self._yielding = False  # `_next_turn` will be called
        self._handling = False
        self._settling = False  # `_settle` will be called
        self._again = False  # an exchange ended: what waits behind it may begin
        self._paused = False
        self._over = False
        self._ending = False
        self._idle_since = plane.reactor.now()
        self._idle_timer = plane.reactor.call_later(IDLE_SECONDS, self._on_idle)
        self._head_timer: Timer | None = None
        self._linger: Timer | None = None
        self._unread = 0  # what the client had not taken when it was last looked for
        self._winding_down = False

    def start(self, early: bytes = b"") -> None:
        """Listen to the client; ``early``: what it has said already."""
        self._stream.attach(self)
        if early:
            self.data(memoryview(early))
        self._settle()

    @property
    def active(self) -> int:
        """Requests under way."""
        return len(self._exchanges)

    def wind_down(self) -> None:
        """The next answer is the last, and says so. Unlike `go_away` this closes no connection that a client may be about to ask on."""
        if self._serial and not self._exchanges:
            self._winding_down = True
        else:
            self.go_away()

    def go_away(self) -> None:
        """Take no further requests; those under way go on."""
        if not self._over:
            self._codec.go_away()
            self._settle()

    def abort(self, reason: str) -> None:
        """Cut it off, with all requests."""
        self._stream.abort(reason)

    # --- the stream

    def data(self, data: memoryview) -> None:
        if self._over or self._ending:
            return
        self._hear(self._codec.receive, data)  # and on, as `_handle`
        if self._blocked:
            self._tell_blocked()
        self._settle()

    def ended(self) -> None:
        if not (self._over or self._ending):
            self._handle(self._codec.receive_eof)

    def drained(self) -> None:
        self._tell_blocked()
        self._settle()

    def closed(self, reason: str | None) -> None:
        if self._over:
            return
        self._over = True
        self._begun.clear()
        for timer in (self._idle_timer, self._head_timer, self._linger):
            if timer is not None:
                timer.cancel()
        for exchange in list(self._exchanges.values()):
            exchange.gone("downstream_remote_disconnect", reason or "the client closed the connection")
        self._on_gone()

    # --- exchanges

    def room(self, stream: int) -> int:
        """Bytes of body that may be sent to the client now. None above `HIGH_WATER`: then alone the stream tells when it has drained."""
        unsent = self._stream.unsent + self._codec.unsent
        if unsent > HIGH_WATER:
            return 0
        room, most = self._codec.room(stream), HIGH_WATER + _BEYOND - unsent
        return room if room < most else most

    @property
    def is_crowded(self) -> bool:
        """Whether the client has enough to read, of all its requests together."""
        return self._stream.unsent + self._codec.unsent > HIGH_WATER

    def wait_for_room(self, exchange: Exchange) -> None:
        """Call `Exchange.writable` when there may be more."""
        self._blocked[exchange] = None

    def send_informational(self, stream: int, status: int, headers: Headers) -> None:
        self._codec.send_informational(stream, status, headers)
        self._settle_soon()

    def send_response(self, stream: int, response: Response, *, ended: bool) -> None:
        self._codec.send_response(stream, response, ended=ended)
        self._settle_soon()
        if self._serial and response.status == 101:  # what came behind the request is for the other side now
            self._again = True
            self.plane.reactor.call_soon(self._settle)

    def send_data(self, stream: int, data: bytes | memoryview) -> None:
        self._codec.send_data(stream, data)
        self._settle_soon()

    def send_end(self, stream: int, trailers: Headers) -> None:
        self._codec.send_end(stream, trailers or None)
        self._settle_soon()

    def reset(self, stream: int, code: int) -> None:
        self._codec.reset(stream, code)
        self._settle_soon()

    def consumed(self, stream: int, size: int) -> None:
        if size and not self._over:
            self._codec.consumed(stream, size)
            self._settle_soon()

    def last_answer(self) -> None:
        """The answer that comes next is the last on this connection, if requests follow one another: the present one is not read to its
        end, or cannot be trusted."""
        if self._serial:
            self._codec.go_away()

    @property
    def serial(self) -> bool:
        return self._serial

    def forget(self, stream: int) -> None:
        """The exchange is over."""
        exchange = self._exchanges.pop(stream, None)
        if exchange is None:
            return
        self._blocked.pop(exchange, None)
        if self._begun and exchange in self._begun:
            self._begun.remove(exchange)
        if not self._exchanges:
            self._idle_since = self.plane.reactor.now()
        if self._serial and not self._over:
            self._again = True
            self._settle_soon()

    # --- what the codec says

    def _handle(self, receive: Callable[[*Ts], Sequence[Event]], *arguments: *Ts) -> None:
        self._hear(receive, *arguments)
        self._tell_blocked()
        self._settle()

    def _hear(self, receive: Callable[[*Ts], Sequence[Event]], *arguments: *Ts) -> None:
        self._handling = True
        try:
            self._take(receive(*arguments))
            if self._turn != self.plane.reactor.turns and not self._yielding:
                self._turn, self._left = self.plane.reactor.turns, REQUESTS_A_TURN
            # After everything that came with them: a request whose body is here already is a whole one.
            while self._begun and self._left:
                self._left -= 1
                exchange = self._begun.popleft()
                try:
                    exchange.begin()
                except Exception as exc:
                    self._crashed(exchange, exc)
            if not self._left:
                self._yield()
        except RemoteProtocolError as broken:
            self._fail(broken.reason)
        finally:
            self._handling = False

    def _yield(self) -> None:
        if not self._yielding:
            self._yielding = True
            self.plane.reactor.call_soon(self._next_turn, self.abort)

    def _next_turn(self) -> None:
        self._yielding = False
        self._left = REQUESTS_A_TURN
        if not (self._over or self._ending):
            self._handle(lambda: ())

    def _take(self, events: Sequence[Event]) -> None:
        exchanges = self._exchanges
        for event in events:
            # What every request has goes without a match and a guard of its own, which are calls.
            if type(event) is BodyData:
                exchange = exchanges.get(event.stream)
                if exchange is None:
                    self._codec.consumed(event.stream, len(event.data))
                    continue
                try:
                    exchange.body(event.data)
                except Exception as exc:
                    self._crashed(exchange, exc)
            elif type(event) is RequestHead:
                if self._winding_down:
                    self._codec.go_away()
                exchange = Exchange(self, event.stream, event.request, ended=event.ended)
                exchanges[event.stream] = exchange
                self._begun.append(exchange)
            elif type(event) is BodyEnd:
                exchange = exchanges.get(event.stream)
                if exchange is None:
                    continue
                try:
                    exchange.body_ended(event.trailers)
                except Exception as exc:
                    self._crashed(exchange, exc)
            else:
                self._take_other(event)

    def _take_other(self, event: Event) -> None:
        exchanges = self._exchanges
        match event:
            case StreamReset():
                exchange = exchanges.get(event.stream)
                if exchange is not None:
                    self.guard(exchange, self._reset_came, exchange, event)
            case RefusedHead():
                if self._winding_down:
                    self._codec.go_away()
                exchange = Exchange(self, event.stream, event.request, ended=True)
                exchanges[event.stream] = exchange
                self.guard(exchange, exchange.refuse, event.status, event.reason)
            case GoingAway():
                pass  # what is under way goes on, and the client closes after it
            case BodyData() | RequestHead() | BodyEnd() | ResponseHead():
                raise AssertionError(f"{event} is not taken here")
            case _:
                assert_never(event)

    def _reset_came(self, exchange: Exchange, reset: StreamReset) -> None:
        broken = reset.code == ErrorCode.PROTOCOL_ERROR
        if not self._serial:
            exchange.gone("http2.remote_reset", reset.reason, broken=broken)
        elif broken:
            exchange.gone(f"http1.codec_error.{reset.reason.replace(' ', '_')[:100]}", reset.reason, broken=True)
        else:
            exchange.gone("downstream_remote_disconnect", reset.reason)

    def guard(self, exchange: Exchange, call: Callable[[*Ts], None], *arguments: *Ts) -> None:
        """A defect in one exchange must not cost the others."""
        try:
            call(*arguments)
        except Exception as exc:
            self._crashed(exchange, exc)

    def _crashed(self, exchange: Exchange, error: Exception) -> None:
        self.plane.reactor.report(error, "an exchange")
        exchange.crashed(error)

    def _tell_blocked(self) -> None:
        if self._blocked:
            blocked, self._blocked = self._blocked, {}
            for exchange in blocked:
                self.guard(exchange, exchange.writable)

    # --- after anything happened

    def _settle_soon(self) -> None:
        """Before the loop waits again: a head, its body and its end, and the answers of many streams, leave together. At once when `room`
        may be none: the stream tells that it has drained only of what it has been given."""
        if self._handling or self._over:
            return
        if self._stream.unsent + self._codec.unsent > HIGH_WATER:  # `is_crowded`
            self._settle()
        elif not self._settling:
            self._settling = True
            self.plane.reactor.call_soon(self._settle, self.abort)

    def _settle(self) -> None:
        """Send what is to be sent, listen or do not, and close when all is said."""
        self._settling = False
        if self._handling or self._over or self._ending:
            return
        codec, stream = self._codec, self._stream
        while self._again and self._left:  # requests that came at once may be answered at once
            self._again = False
            if codec.holds:
                self._hear(codec.receive, b"")
        if codec.amid_head is (self._head_timer is None):
            self._watch_head()
        if codec.unsent:
            stream.write(codec.take_outgoing())
        if codec.finished:
            self._end()
            return
        wants = not self._yielding and codec.wants_data and stream.unsent <= TOO_MUCH_UNSENT
        if wants is self._paused:
            self._paused = not wants
            if wants:
                stream.resume()
            else:
                stream.pause()

    def _watch_head(self) -> None:
        """Of the head that has begun to come last, and no longer of one that has come."""
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        else:
            self._head_timer = self.plane.reactor.call_later(HEAD_SECONDS, self._on_slow_head)

    def _end(self) -> None:
        """Nothing more is said on either side; the client has a moment to read and close."""
        if self._ending:
            return
        self._ending = True
        for exchange in list(self._exchanges.values()):
            exchange.gone("downstream_protocol_error", "the connection cannot go on")
        self._stream.end()
        self._stream.resume()
        self._wait_for_close()

    def _wait_for_close(self) -> None:
        self._unread = self._stream.unsent
        self._linger = self.plane.reactor.call_later(LINGER_SECONDS, self._on_lingered)

    def _on_lingered(self) -> None:
        if self._stream.unsent < self._unread:
            self._wait_for_close()  # slowly, but it reads
        else:
            self._stream.abort("the client did not close")

    def _fail(self, reason: str) -> None:
        """The client broke the protocol for the connection as a whole."""
        for exchange in list(self._exchanges.values()):
            self.guard(exchange, partial(exchange.gone, "downstream_protocol_error", reason, broken=True))
        outgoing = self._codec.take_outgoing()
        if outgoing:
            self._stream.write(outgoing)
        self._end()

    def _on_slow_head(self) -> None:
        self._head_timer = None
        self._handle(self._codec.give_up_head)

    def _on_idle(self) -> None:
        idle = self.plane.reactor.now() - self._idle_since
        if not self._exchanges and idle >= IDLE_SECONDS:
            self._codec.go_away()
            self._settle()
            self._end()
            return
        left = IDLE_SECONDS if self._exchanges else IDLE_SECONDS - idle
        self._idle_timer = self.plane.reactor.call_later(max(left, 1.0), self._on_idle)

"""Connections to endpoints, made and kept (`waypoint_py.upstream.session.Connections`): who shares one, who waits, and who is one too many.

A *shelf* holds the sessions of one endpoint that may serve the same requests, and the calls that wait for one. A *breaker* counts what a
destination (service, port and subset) has under way; its bounds hold exactly, since one thread counts. At the bound of connections a call
waits, and an idle connection to another endpoint of the destination is given up for it: no endpoint is starved by connections that others
do not use.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Final, NamedTuple, TypeAlias

from mesh.http.codec import ClientCodec
from mesh.http.message import Request
from mesh.model.address import SocketAddress
from mesh.model.l7.destination import ConnectionPool, UpstreamTls
from mesh.model.l7.routing import Destination
from mesh.reactor.loop import Reactor, Timer
from waypoint_py.context import Connection
from waypoint_py.stream import ByteStream
from waypoint_py.streams.base import Stream
from waypoint_py.upstream.client import Call, HttpSession, Place
from waypoint_py.upstream.dial import Dialler, Dialling, Wanted
from waypoint_py.upstream.session import Endpoint, FailureKind, ResponseSink, UpstreamFailure, UpstreamProtocol, UpstreamStream
from waypoint_py.upstream.tls import server_name_of

EXPECTED_STREAMS: Final = 100
"""Calls that wait for one HTTP/2 connection before a second is dialled: what servers commonly allow; they say so only once it stands."""

REMEMBERED = 4096
"""Endpoints whose shelf is found without looking at what they are."""

MOST_NAMES = 64
"""Shelves of one endpoint that differ by what clients say: beyond, one that nobody uses is emptied. A certificate may be good for any
number of names, and who asks for each of them once would leave a connection behind with every request."""

ENDING: Final = "the waypoint ends"
NEEDED_ELSEWHERE: Final = "another endpoint needs the connection"

MakeCodec: TypeAlias = Callable[[UpstreamProtocol], ClientCodec]
"""A codec for HTTP1 or HTTP2."""
OnConnection: TypeAlias = Callable[[ByteStream | UpstreamFailure], None]
_Recent: TypeAlias = tuple[int, bool]
"""An endpoint's number, and whether HTTP/2 is spoken: to hash a member of an enum is a call of Python's."""
_NOWHERE, _WAITING, _SESSION = Place.NOWHERE, Place.WAITING, Place.SESSION  # members of an enum are slower to find
_HTTP2: Final = UpstreamProtocol.HTTP2


class Breaker:
    """What one destination has under way."""

    __slots__ = ("_on_unused", "blocked", "connections", "pending", "requests", "shelves")

    def __init__(self, on_unused: Callable[[], None]) -> None:
        self._on_unused = on_unused
        self.connections = 0
        """Also those that are being dialled."""
        self.pending = 0
        """Calls that wait for a connection."""
        self.requests = 0
        """Calls on one."""
        self.shelves: dict[Shelf, None] = {}
        self.blocked: dict[Shelf, None] = {}
        """Those whose calls wait because there may be no more connections, in order."""

    def connection_gone(self) -> None:
        """There may be another one, for whoever has waited longest."""
        self.connections -= 1
        if self.blocked:
            shelf = next(iter(self.blocked))
            del self.blocked[shelf]
            shelf.dial_as_needed()
        self.look_if_unused()

    def make_room(self) -> bool:
        """Give up a connection that nobody uses; whether there was one."""
        for shelf in self.shelves:
            session = shelf.find_idle()
            if session is not None:
                session.discard(NEEDED_ELSEWHERE)
                return True
        return False

    def look_if_unused(self) -> None:
        """Nothing is kept of a destination that nobody asks for any more."""
        if not (self.connections or self.pending or self.requests or self.shelves):
            self._on_unused()


class _ShelfKey(NamedTuple):
    """What two requests must have in common to share a connection."""

    address: SocketAddress
    workload: str | None
    destination: Destination | None
    protocol: UpstreamProtocol
    tls: UpstreamTls | None
    server_name: str
    proxied: tuple[int, SocketAddress, SocketAddress] | None
    """The client whom a PROXY header names, and what it dialled: such a connection is that client's alone."""

    @property
    def is_clients_choice(self) -> bool:
        """Whether there may be as many as clients please."""
        return self.proxied is not None or (self.tls is not None and not self.tls.sni)


class Shelf:
    """The sessions of one key, and who waits for them (`waypoint_py.upstream.client.Owner`)."""

    __slots__ = (
        "_breaker",
        "_dialling",
        "_free",
        "_key",
        "_open",
        "_pool",
        "_sessions",
        "_waiting",
        "_wanted",
        "endpoint",
        "limits",
        "remembered_as",
    )

    def __init__(self, pool: Pool, key: _ShelfKey, endpoint: Endpoint, wanted: Wanted, breaker: Breaker) -> None:
        self._pool = pool
        self._key = key
        self.take_endpoint(endpoint)
        self._wanted = wanted
        self._breaker = breaker
        self._sessions: dict[HttpSession, None] = {}
        """Those that take calls, or will when one of theirs is over; the one that was used last is the last."""
        self._free: dict[HttpSession, None] = {}
        """Those that may take one now, in the same order."""
        self._open: dict[HttpSession, None] = {}
        """All whose connection is not closed yet."""
        self._waiting: OrderedDict[Call, None] = OrderedDict()
        self._dialling: dict[Dialling, None] = {}
        self.remembered_as: list[_Recent] = []
        breaker.shelves[self] = None

    # --- calls

    @property
    def waits(self) -> bool:
        return bool(self._waiting)

    def take_endpoint(self, endpoint: Endpoint) -> None:
        """As it was last asked for: bounds may have changed."""
        self.endpoint = endpoint
        self.limits: ConnectionPool = endpoint.policy.pool

    def admit(self, call: Call) -> None:
        """Begin it, let it wait, or fail it soon."""
        session = self._find_available() if not self._waiting else None
        if session is not None:
            self._start(call, session, soon=False)
        elif self._breaker.pending >= self.limits.max_pending:
            self._pool.fail_soon(call, _overflow(f"{self.limits.max_pending} requests wait for a connection"))
            self._forget_if_empty()
        else:
            self._wait(call)
            self.dial_as_needed()

    def call_over(self, call: Call) -> None:
        if call.place is _SESSION:
            self._breaker.requests -= 1
        elif call.place is _WAITING:
            self._leave_queue(call)
            self._forget_if_empty()
        call.place = _NOWHERE

    def take_back(self, call: Call) -> bool:
        if self._pool.ending:
            return False
        self._breaker.requests -= 1
        call.retried = True
        self._wait(call)
        self._waiting.move_to_end(call, last=False)
        self._pool.reactor.call_soon(self._serve_waiting)  # the session that broke is still telling of it
        return True

    def _wait(self, call: Call) -> None:
        call.place = _WAITING
        self._waiting[call] = None
        self._breaker.pending += 1

    def _leave_queue(self, call: Call) -> None:
        call.place = _NOWHERE
        del self._waiting[call]
        self._breaker.pending -= 1

    def _start(self, call: Call, session: HttpSession, *, soon: bool = True) -> None:
        limits, breaker = self.limits, self._breaker
        if breaker.requests >= limits.max_requests:
            self._pool.fail_soon(call, _overflow(f"{limits.max_requests} requests are under way"))
            return
        breaker.requests += 1
        call.place = _SESSION
        unsendable = session.begin(call, soon=soon)
        if unsendable is not None:
            self._pool.fail_soon(call, UpstreamFailure(FailureKind.PROTOCOL, f"request cannot be sent: {unsendable}"))

    def _serve_waiting(self) -> None:
        while self._waiting:
            session = self._find_available()
            if session is None:
                break
            call = next(iter(self._waiting))
            self._leave_queue(call)
            self._start(call, session)
        self.dial_as_needed()

    # --- sessions

    def session_free(self, session: HttpSession) -> None:
        for ranks in (self._sessions, self._free):
            ranks.pop(session, None)
            ranks[session] = None
        if self._waiting:
            self._serve_waiting()
        if session.active or session.closing:
            return
        if self._pool.draining:
            session.expire()
        elif self._breaker.blocked and not self._waiting:
            session.discard(NEEDED_ELSEWHERE)

    def session_gone(self, session: HttpSession) -> None:
        self._sessions.pop(session, None)
        self._free.pop(session, None)
        if self._waiting:
            self._pool.reactor.call_soon(self.dial_as_needed)

    def session_closed(self, session: HttpSession) -> None:
        self._open.pop(session, None)
        self._forget_if_empty()

    def find_idle(self) -> HttpSession | None:
        """One without calls, of a shelf whose own calls do not wait; the one that was used least lately."""
        if self._waiting:
            return None
        return next((session for session in self._sessions if not session.active), None)

    def expire(self) -> None:
        """The endpoint is no more: idle sessions close, busy ones when their calls have ended, and nobody waits for it to answer a dial:
        it may have gone without a word, and another is tried sooner."""
        for session in list(self._sessions):
            session.expire()
        # First of all nobody waits: a dial that ends makes room for another, to where nobody is.
        self._fail_first(len(self._waiting), UpstreamFailure(FailureKind.CONNECT, _no_more(self._key.address)))
        self._cancel_dials()
        self._forget_if_empty()

    def close_idle(self) -> None:
        """Sessions without calls close."""
        while (session := self.find_idle()) is not None:
            session.expire()

    def close(self) -> None:
        """Everything ends now."""
        self._cancel_dials()
        for session in list(self._open):
            session.discard(ENDING)
        while self._waiting:
            next(iter(self._waiting)).fail(UpstreamFailure(FailureKind.TERMINATED, ENDING))
        self._forget_if_empty()

    def _find_available(self) -> HttpSession | None:
        """The one that was used last: those that are not needed become idle, and go."""
        free = self._free
        while free:
            session = next(reversed(free))
            if session.available > 0:
                return session
            del free[session]
        return None

    # --- dials

    def dial_as_needed(self) -> None:
        """As many dials as the waiting calls need, and the breaker allows."""
        breaker, limits = self._breaker, self.limits
        at_once = 1 if self._key.protocol is UpstreamProtocol.HTTP1 else max(1, min(limits.max_concurrent_streams, EXPECTED_STREAMS))
        while len(self._waiting) > len(self._dialling) * at_once:
            if self._pool.ending:
                return
            if breaker.connections >= limits.max_connections:
                breaker.blocked[self] = None
                if breaker.make_room() and self in breaker.blocked:
                    continue  # it went to somebody who has waited longer
                return
            breaker.connections += 1
            self._dial()
        breaker.blocked.pop(self, None)

    def _dial(self) -> None:
        def done(result: Stream | UpstreamFailure) -> None:
            self._dialled(dialling, result)

        dialling = self._pool.dialler.dial(self.endpoint, self._wanted, done)
        self._dialling[dialling] = None

    def _cancel_dials(self) -> None:
        for dialling in list(self._dialling):
            dialling.cancel()
            self._dial_over(dialling)

    def _dial_over(self, dialling: Dialling) -> None:
        del self._dialling[dialling]
        self._breaker.connection_gone()

    def _dialled(self, dialling: Dialling, result: Stream | UpstreamFailure) -> None:
        if isinstance(result, Stream) and result.over:
            result = UpstreamFailure(FailureKind.CONNECT, f"{self._key.address}: connection closed as soon as it stood")
        if isinstance(result, UpstreamFailure):
            self._dial_over(dialling)
            self._fail_waiting(result)
            return
        del self._dialling[dialling]
        result.on_gone = self._breaker.connection_gone
        protocol = self._key.protocol
        pings = protocol is UpstreamProtocol.HTTP2
        session = HttpSession(self._pool.reactor, result, self._pool.make_codec(protocol), self, pings=pings)
        self._open[session] = None
        self.session_free(session)

    def _fail_waiting(self, failure: UpstreamFailure) -> None:
        """A dial failed. Each HTTP/1.1 call had its own; an HTTP/2 dial was everybody's whom no other serves."""
        count = 1 if self._key.protocol is UpstreamProtocol.HTTP1 else len(self._waiting) if not self._dialling else 0
        self._fail_first(count, failure)
        self.dial_as_needed()
        self._forget_if_empty()

    def _fail_first(self, count: int, failure: UpstreamFailure) -> None:
        for call in list(self._waiting)[:count]:
            try:
                call.fail(failure)
            except Exception as exc:  # the others must hear of it too
                self._pool.reactor.report(exc, f"failure of a request to {self._key.address}")

    def _forget_if_empty(self) -> None:
        if not (self._open or self._waiting or self._dialling):
            self._breaker.shelves.pop(self, None)
            self._breaker.blocked.pop(self, None)
            self._pool.forget_shelf(self._key, self)
            self._breaker.look_if_unused()


class Connecting:
    """A connection of its own on its way, or at work (`Cancel`)."""

    __slots__ = ("_breaker", "_dialling", "_lifetime", "_on_open", "_pool", "_stream", "endpoint")

    def __init__(self, pool: Pool, endpoint: Endpoint, breaker: Breaker, on_open: OnConnection) -> None:
        self._pool = pool
        self.endpoint = endpoint
        self._breaker = breaker
        self._on_open: OnConnection | None = on_open
        self._dialling: Dialling | None = None
        self._stream: Stream | None = None
        self._lifetime: Timer | None = None

    def cancel(self) -> None:
        if self._on_open is not None:
            self._on_open = None
            if self._dialling is not None:
                self._dialling.cancel()
                self._gone()

    def begin(self, wanted: Wanted) -> None:
        self._breaker.connections += 1
        self._pool.connecting[self] = None
        self._dialling = self._pool.dialler.dial(self.endpoint, wanted, self._dialled)

    def fail_soon(self, failure: UpstreamFailure) -> None:
        self._pool.reactor.call_soon(lambda: self._tell(failure))

    def end(self) -> None:
        """Everything ends now."""
        if self._stream is not None:
            self._stream.abort(ENDING)
        elif self._dialling is not None and self._on_open is not None:
            self._dialling.cancel()
            self._gone()
            self.fail_soon(UpstreamFailure(FailureKind.TERMINATED, ENDING))

    def expire(self) -> None:
        """The endpoint is no more: a dial fails, and what stands goes on, as on its node."""
        if self._dialling is not None:
            try:
                self._dialling.abandon(_no_more(self.endpoint.address))
            except Exception as exc:  # the others must hear of it too
                self._pool.reactor.report(exc, f"failure of a connection to {self.endpoint.address}")

    def _dialled(self, result: Stream | UpstreamFailure) -> None:
        if isinstance(result, UpstreamFailure) or result.over:
            self._gone()
        else:
            self._stream = result
            result.on_gone = self._gone
            longest = self.endpoint.policy.pool.max_connection_duration
            if longest:
                because = f"connection older than {longest:g} s"
                self._lifetime = self._pool.reactor.call_later(longest, lambda: result.abort(because))
        self._tell(result)

    def _tell(self, result: Stream | UpstreamFailure) -> None:
        on_open, self._on_open = self._on_open, None
        if on_open is not None:
            on_open(result)

    def _gone(self) -> None:
        if self._lifetime is not None:
            self._lifetime.cancel()
        del self._pool.connecting[self]
        self._breaker.connection_gone()


class Pool:
    """`Connections` of one waypoint process."""

    def __init__(self, reactor: Reactor, dialler: Dialler, make_codec: MakeCodec) -> None:
        self.reactor = reactor
        self.dialler = dialler
        self.make_codec = make_codec
        self.draining = False
        self.ending = False
        self.connecting: dict[Connecting, None] = {}
        self._shelves: dict[_ShelfKey, Shelf] = {}
        self._breakers: dict[Hashable, Breaker] = {}
        self._named: dict[SocketAddress, dict[Shelf, None]] = {}
        """Shelves that clients' words tell apart, in order of age."""
        self._recent: dict[_Recent, tuple[Endpoint, Shelf]] = {}
        """Shelves by the identity of an endpoint that is kept here, so that no other can have the same."""

    # --- Connections

    def request(
        self,
        endpoint: Endpoint,
        protocol: UpstreamProtocol,
        request: Request,
        ended: bool,
        sink: ResponseSink,
        on_open: Callable[[UpstreamStream], None],
        *,
        client: Connection | None = None,
    ) -> Call:
        """As `Connections.request`."""
        recent = self._recent.get((id(endpoint), protocol is _HTTP2))
        shelf = recent[1] if recent is not None else self._find_shelf(endpoint, protocol, request, client)
        call = Call(shelf, request, ended, sink, on_open)
        if self.ending:
            self.fail_soon(call, UpstreamFailure(FailureKind.TERMINATED, ENDING))
        else:
            shelf.admit(call)
        return call

    def connect(self, endpoint: Endpoint, on_open: OnConnection, *, client: Connection | None = None, host: str = "") -> Connecting:
        """As `Connections.connect`."""
        breaker, limits = self.breaker_of(endpoint), endpoint.policy.pool
        connecting = Connecting(self, endpoint, breaker, on_open)
        if self.ending:
            connecting.fail_soon(UpstreamFailure(FailureKind.TERMINATED, ENDING))
        elif breaker.connections >= limits.max_connections:
            connecting.fail_soon(_overflow(f"there are {limits.max_connections} connections"))
        else:
            name = host or (endpoint.destination.hostname if endpoint.destination is not None else "")
            connecting.begin(Wanted(UpstreamProtocol.TCP, name, client))
        return connecting

    # --- life

    def forget(self, is_gone: Callable[[Endpoint], bool]) -> None:
        """Endpoints were removed: their idle connections close, busy ones when their requests have ended, and dials are given up."""
        for shelf in list(self._shelves.values()):
            if is_gone(shelf.endpoint):
                shelf.expire()
        for connecting in list(self.connecting):
            if is_gone(connecting.endpoint):
                connecting.expire()

    def close(self, *, gracefully: bool) -> None:
        """Let connections go: each as soon as it is idle, while requests are still served; or all at once."""
        self.draining = True
        self.ending = self.ending or not gracefully
        for shelf in list(self._shelves.values()):
            if gracefully:
                shelf.close_idle()
            else:
                shelf.close()
        if not gracefully:
            for connecting in list(self.connecting):
                connecting.end()
        self.dialler.close(gracefully=gracefully)

    def breaker_of(self, endpoint: Endpoint) -> Breaker:
        """What counts for this endpoint's destination."""
        key: Hashable = endpoint.destination if endpoint.destination is not None else endpoint.key
        breaker = self._breakers.get(key)
        if breaker is None:
            breaker = self._breakers[key] = Breaker(lambda: self._forget_breaker(key))
        return breaker

    def _forget_breaker(self, key: Hashable) -> None:
        self._breakers.pop(key, None)

    @property
    def connections(self) -> int:
        """To all endpoints together, also those that are being dialled."""
        return sum(breaker.connections for breaker in self._breakers.values())

    # --- for shelves

    def fail_soon(self, call: Call, failure: UpstreamFailure) -> None:
        """Unless it is cancelled first."""
        self.reactor.call_soon(lambda: call.fail(failure))

    def forget_shelf(self, key: _ShelfKey, shelf: Shelf) -> None:
        """Nothing is on it any more."""
        if self._shelves.get(key) is shelf:
            del self._shelves[key]
            named = self._named.get(key.address)
            if named is not None:
                named.pop(shelf, None)
                if not named:
                    del self._named[key.address]
        for recent in shelf.remembered_as:
            self._recent.pop(recent, None)
        shelf.remembered_as.clear()

    def _find_shelf(self, endpoint: Endpoint, protocol: UpstreamProtocol, request: Request, client: Connection | None) -> Shelf:
        policy, workload = endpoint.policy, endpoint.workload
        host = request.authority.decode("latin-1")
        tls, version = policy.tls, policy.proxy_protocol
        key = _ShelfKey(
            endpoint.address,
            workload.uid if workload is not None else None,
            endpoint.destination,
            protocol,
            tls,
            server_name_of(tls, host) if tls is not None else "",
            (version, client.peer_address, client.destination) if version is not None and client is not None else None,
        )
        shelf = self._shelves.get(key)
        if shelf is None:
            wanted = Wanted(protocol, host, client if key.proxied is not None else None)
            shelf = self._shelves[key] = Shelf(self, key, endpoint, wanted, self.breaker_of(endpoint))
            if key.is_clients_choice:
                self._put_among_named(key.address, shelf)
        shelf.take_endpoint(endpoint)
        if version is None and (tls is None or tls.sni):  # no other request can belong to another shelf
            if len(self._recent) >= REMEMBERED:
                self._recent.clear()
                for each in self._shelves.values():
                    each.remembered_as.clear()
            recent = id(endpoint), protocol is _HTTP2
            self._recent[recent] = endpoint, shelf
            shelf.remembered_as.append(recent)
        return shelf

    def _put_among_named(self, address: SocketAddress, shelf: Shelf) -> None:
        named = self._named.setdefault(address, {})
        if len(named) >= MOST_NAMES:
            idle = next((each for each in named if each.find_idle() is not None), None)
            if idle is not None:
                idle.close_idle()
        named[shelf] = None


def _no_more(address: SocketAddress) -> str:
    return f"connection to {address} failed: the endpoint is no more"


def _overflow(because: str) -> UpstreamFailure:
    return UpstreamFailure(FailureKind.OVERFLOW, because)

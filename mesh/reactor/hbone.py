"""Drives HBONE connections: socket, TLS and the HTTP/2 core of `mesh.wire.hbone`, with many tunnels over each.

Nothing here blocks and nothing runs per chunk but what moves the chunk. What several tunnels have to say within one turn of the
loop leaves in one TLS write and one ``send``. Credit: the connection's returns on arrival (in the core), a stream's when its
consumer has passed the bytes on, so a slow reader stops its own sender by the stream window and nobody else.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias

from mesh.reactor.loop import CONNECTION, OUT, PEER_CLOSED, Reactor, Timer
from mesh.reactor.tcp import socket_address
from mesh.reactor.tls import PLAIN_OUT_SIZE, READ_SIZE, TlsEngine, TlsError, scratch, tls_engine
from mesh.wire.authority import Authority
from mesh.wire.errors import ErrorCode, LocalProtocolError, RemoteProtocolError
from mesh.wire.hbone import (
    SERVER_LIMITS,
    GoingAway,
    HboneClient,
    HboneConnection,
    HboneServer,
    Limits,
    MoreStreamsAllowed,
    PingAcknowledged,
    RequestRefused,
    TunnelData,
    TunnelEnded,
    TunnelRequested,
    TunnelReset,
    TunnelResponded,
    WindowOpened,
)

if TYPE_CHECKING:
    from OpenSSL import SSL

    from mesh.model.address import SocketAddress
    from mesh.wire.hbone.streams import Stream

# Those of these that are not Final are shortened by tests: compiled code has a Final's value built in.
HANDSHAKE_TIMEOUT = 10.0
"""Seconds for TLS and the peer's HTTP/2 preface together; ztunnel has no limit and so keeps slow-lorises."""

PING_INTERVAL = 10.0
PING_TIMEOUT = 20.0
"""Seconds; ztunnel's. Bytes that arrive count as an answer."""

RESPONSE_TIMEOUT = 30.0
"""Seconds a CONNECT may stay unanswered: the peer's own dial (10 s), and a waypoint's behind it, fit well into it."""

LINGER: Final = 2.0
"""Seconds to wait for the peer's close after ours. Closing with unread bytes would send RST and could destroy what it has not read."""

FAIR_SHARE: Final = 64 * 1024
"""Bytes one tunnel may put into a send while others wait."""

TUNNELS_AT_ONCE: Final = 32
"""Tunnels whose turn comes with one send; that of the others comes with the next. Where many speak at once, all of them in one send would
have the peer wait for the last, and then us for its answers: one processor rests while the other works."""

STORED_AT_MOST = 32 << 20
"""Bytes that wait in all tunnels of one link together before the connection's credit is held back: eight full stream windows. A peer may
open 200; without this bound it could make us store 800 MiB. What is under way then still comes, at most one connection window."""

UNSENT_AT_MOST = 1 << 20
"""Bytes of answers, resets and window updates that may wait for a peer to read: far more than one who reads ever leaves. No window holds
them back, so without this bound a peer that asks and never reads would fill our memory."""

_FRAME_HEADER: Final = 9
_LONE_FRAME: Final = PLAIN_OUT_SIZE - _FRAME_HEADER
_SMALLEST_READ: Final = 2048
"""With less room than this left, a send goes out as it is."""

_KEEPALIVE_PING: Final = b"keepaliv"
_DRAIN_PING: Final = b"drained?"

PROTOCOL_ERROR: Final = "protocol error: "
"""How the reason of a link begins that was closed because its peer, though proved, does not keep to HTTP/2."""

DRAIN_TIMEOUT: Final = 1.0
"""Seconds a draining server waits for the client to have read GOAWAY before it may close an idle connection."""


class TunnelFailure:
    """A tunnel that did not come to be. ``status`` is the peer's answer, None if there was none."""

    __slots__ = ("because", "headers", "retryable", "status")

    def __init__(
        self, because: str, *, status: int | None = None, headers: Mapping[str, str] | None = None, retryable: bool = False
    ) -> None:
        self.because = because
        self.status = status
        self.headers: Mapping[str, str] = headers or {}
        self.retryable = retryable
        """The peer has not acted on the request (RFC 9113 section 8.7): another connection may be tried."""

    def __repr__(self) -> str:
        return f"TunnelFailure({self.because!r}, status={self.status}, retryable={self.retryable})"


class TunnelConsumer(Protocol):
    """What is attached to an accepted tunnel and moves its bytes on (`mesh.reactor.relay`).

    All calls come from the link, within the loop. After ``tunnel_reset`` no call comes.
    """

    readable: bool
    """Whether `read_into` may have more. Set it and call `Tunnel.want_write`; the link drops it from its round when it is False."""

    def read_into(self, view: memoryview, most: int) -> int | None:
        """Put up to ``most`` bytes for the tunnel into ``view``; how many, or None for nothing at the moment (also after `Tunnel.end`)."""

    def read_into_many(self, views: list[memoryview]) -> int | None:
        """The same with as much as fits ``views``, in order."""

    def tunnel_data(self, chunks: Sequence[memoryview]) -> int:
        """Bytes from the tunnel, valid during the call. Returns how many moved on at once; call `Tunnel.consumed` when others have."""

    def tunnel_ended(self) -> None:
        """No more bytes come from the tunnel."""

    def tunnel_reset(self, reason: str, code: int | None) -> None:
        """The tunnel is gone in both directions; ``code`` is the peer's RST_STREAM code, None if the whole link went."""


class Tunnel:
    """One CONNECT stream. Data that arrives before a consumer is attached waits here, bounded by the stream window."""

    __slots__ = (
        "_chunks", "_ended", "_held", "_in_round", "_local_end", "_on_response", "_request", "_reset", "_state",
        "_waiting", "_window_shut", "authority", "consumer", "headers", "link", "stream",
    )  # fmt: skip

    def __init__(self, link: HboneLink, stream: int, authority: str, headers: Mapping[str, str]) -> None:
        self.link = link
        self.stream = stream
        self.authority = authority
        self.headers = headers
        """Of the peer: the request's on a server, the response's on a client. Lower-case names."""
        self.consumer: TunnelConsumer | None = None
        self._on_response: OnResponse | None = None
        self._request: TunnelRequest | None = None
        self._chunks: list[memoryview] = []
        self._held = bytearray()
        self._ended = False  # the peer's direction
        self._local_end = False
        self._reset: tuple[str, int | None] | None = None
        self._in_round = False
        self._window_shut = False
        self._waiting = 0  # bytes that came and were not yet consumed
        self._state: Stream  # the core's; of a tunnel that came to be

    @property
    def alive(self) -> bool:
        """Whether any byte may still pass, in either direction."""
        return self._reset is None and not (self._ended and self._local_end)

    @property
    def window_shut(self) -> bool:
        """Whether the consumer was kept from sending by a window of the peer's; its turn comes by itself when that opens."""
        return self._window_shut

    def attach(self, consumer: TunnelConsumer) -> None:
        """Hand the tunnel's bytes to ``consumer``, beginning with those that have waited here."""
        self.consumer = consumer
        if self._held:
            held, self._held = self._held, bytearray()
            self.consumed(consumer.tunnel_data([memoryview(held)]))
        if self._ended and self._reset is None:
            consumer.tunnel_ended()
        if self._reset is not None:
            consumer.tunnel_reset(*self._reset)

    def detach(self) -> None:
        """The consumer is done, with whatever it has not passed on. Every consumer calls this once at its end."""
        self.consumer = None
        self._held = bytearray()
        self.link._waiting -= self._waiting
        self._waiting = 0
        if self.link._holding_credit:
            self.link._return_credit()

    def write_alone(self) -> None:
        """As `want_write`, for a consumer whose event is the turn's only one: what nobody could add to leaves at once."""
        self.link._send_alone(self)

    def want_write(self) -> None:
        """The consumer is `readable`: take its turn at the link's next send."""
        if not (self._in_round or self._local_end or self._window_shut) and self._reset is None:
            self._in_round = True
            self.link._round.append(self)
            self.link._schedule_pump()

    def consumed(self, size: int) -> None:
        """So many bytes of the tunnel have moved on: the peer may send as many again."""
        link = self.link
        counted = size if size < self._waiting else self._waiting
        self._waiting -= counted
        link._waiting -= counted
        if link._holding_credit:
            link._return_credit()
        if self._reset is None and not self._ended:
            core = link._core
            core.consumed(self.stream, size)
            if core.outgoing:
                link._schedule_pump()

    def end(self) -> None:
        """No more bytes from us (END_STREAM). The other direction goes on."""
        if not self._local_end and self._reset is None:
            self._local_end = True
            self.link._core.end(self.stream)
            self.link._tunnel_moved(self)

    def reset(self, code: int = ErrorCode.CANCEL, reason: str = "reset by us") -> None:
        """Drop the tunnel in both directions at once. Its consumer is not told; a response still awaited is (as a failure)."""
        if self._reset is None:
            self._reset = (reason, None)
            self.link._core.reset(self.stream, code)
            self.link._tunnel_moved(self)
            self._fail_response(TunnelFailure(reason))
            if self.consumer is None:
                self.detach()

    # --- the link's side

    def _deliver(self) -> None:
        """Pass on what one read of the link brought."""
        chunks, consumer = self._chunks, self.consumer
        if chunks:
            size = len(chunks[0]) if len(chunks) == 1 else sum(map(len, chunks))
            if consumer is None:
                if self._reset is None:
                    self._held += b"".join(chunks)
                    self.link._keep_waiting(self, size)
                chunks.clear()
                return
            try:
                passed = consumer.tunnel_data(chunks)
            finally:
                chunks.clear()
            self.link._passed_on(self, size, passed)
        elif consumer is None:
            return
        if self._ended and self._reset is None:
            consumer.tunnel_ended()
        elif self._reset is not None:
            consumer.tunnel_reset(*self._reset)

    def _lost(self, reason: str, code: int | None, *, retryable: bool = False) -> None:
        """The stream is no more by the peer's doing, or the link's."""
        if self._reset is None:
            self._reset = (reason, code)
            self._fail_response(TunnelFailure(reason, retryable=retryable))
            if self._request is not None:
                self._request._peer_gone(reason)
            if self.consumer is None:
                self.detach()

    def _fail_response(self, failure: TunnelFailure) -> None:
        on_response = self._take_on_response()
        if on_response is not None:
            on_response(failure)

    def _take_on_response(self) -> OnResponse | None:
        on_response, self._on_response = self._on_response, None
        if on_response is not None:
            self.link._unanswered.pop(self, None)
        return on_response


OnResponse: TypeAlias = Callable[["Tunnel | TunnelFailure"], None]


class TunnelRequest:
    """A CONNECT that awaits our answer, from a peer whose certificate was verified (``link.peer_certificate``)."""

    __slots__ = ("_tunnel", "authority", "headers", "link", "on_gone", "target")

    def __init__(self, tunnel: Tunnel, target: Authority) -> None:
        self._tunnel = tunnel
        self.link = tunnel.link
        self.authority = tunnel.authority
        self.target = target
        """The authority, parsed."""
        self.headers = tunnel.headers
        self.on_gone: Callable[[str], None] | None = None
        """Called with a reason if the peer withdraws before it is answered: stop dialling."""
        tunnel._request = self

    @property
    def alive(self) -> bool:
        """Whether the peer still waits for the answer."""
        return self._tunnel._reset is None

    def accept(self, headers: Mapping[str, str]) -> Tunnel:
        """Answer 200. If the peer has withdrawn meanwhile, the tunnel returned is dead and tells its consumer so at once."""
        self._tunnel._request = None
        self.link._accept(self._tunnel, headers)
        return self._tunnel

    def refuse(self, status: int, headers: Mapping[str, str] | None = None) -> None:
        """Answer ``status`` and be done."""
        self._tunnel._request = None
        self.link._refuse(self._tunnel, status, headers or {})

    def _peer_gone(self, reason: str) -> None:
        self._tunnel._request = None
        if self.on_gone is not None:
            self.on_gone(reason)


JudgePeer: TypeAlias = Callable[[bytes], str | None]
OnRequest: TypeAlias = Callable[[TunnelRequest], None]
OnRefused: TypeAlias = Callable[[RequestRefused], None]
OnClose: TypeAlias = Callable[[str | None], None]


class HboneLink:
    """One HBONE connection, either end. It owns its socket from the start."""

    def __init__(
        self, reactor: Reactor, sock: socket.socket, engine: TlsEngine, core: HboneClient | HboneServer, on_close: OnClose
    ) -> None:
        self._reactor = reactor
        self._sock = sock
        self._fd = sock.fileno()
        self._engine = engine
        self._core: HboneConnection = core
        self._client = core if isinstance(core, HboneClient) else None
        self._server = core if isinstance(core, HboneServer) else None
        self._on_close: OnClose | None = on_close
        self._on_ready: Callable[[HboneLink], None] | None = None
        self._on_request: OnRequest | None = None
        self._on_refused: OnRefused | None = None
        buffers = scratch()  # the thread's own, at hand: they are asked for with every message
        self._cipher_in, self._cipher_out = buffers.cipher_in, buffers.cipher_out
        self._plain_in, self._plain_out, self._lone_payload = buffers.plain_in, buffers.plain_out, buffers.lone_payload
        self._tunnels: dict[int, Tunnel] = {}
        self._round: deque[Tunnel] = deque()
        self._shut_out: set[Tunnel] = set()
        self._waiting = 0
        self._holding_credit = False
        self._backlog: memoryview | None = None
        self._pump_scheduled = False
        self._peer_hung_up = False
        self._read_scheduled = False
        self._closing = False
        self._closed = False
        self._draining = False
        self._answered = False  # client: the peer has let us in, and answered
        self._drain_read = False  # the peer knows that we drain, so no request of its can be under way any more
        self._heard = False
        self._heard_since_tick = False
        self._ping_sent_at: float | None = None
        self._timer: Timer | None = None
        self._unanswered: dict[Tunnel, float] = {}
        """Requests by the time of their CONNECT, the oldest first."""
        self._answer_timer: Timer | None = None
        self._local_address: SocketAddress | None = None
        self.peer_certificate: bytes | None = None
        """DER, once `ready`; verified up to a root of ours and by the caller's judgement."""
        self.pooled = False
        """The owner keeps this link for later tunnels: ping it also when it carries none."""
        self.on_room: Callable[[], None] | None = None
        """Called once, when a tunnel has ended or the peer allows more of them, and then forgotten. It may not end the link."""
        self.owner: object = None
        """For whoever holds the link; not touched here."""

    # --- facts

    @property
    def active(self) -> int:
        """Tunnels and requests under way."""
        return len(self._tunnels)

    @property
    def ready(self) -> bool:
        """The TLS handshake is done and the link is not closed."""
        return self._engine.established and not self._closed

    @property
    def usable(self) -> bool:
        """Client: whether `open_tunnel` may be called now: not closed or closing, and within the peer's number of streams."""
        if self._closed or self._closing or self._draining or self._client is None:
            return False
        return self._engine.established and self._client.takes_tunnels

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def local_address(self) -> SocketAddress | None:
        """Our end of the connection; None once it is closed, if nobody asked before."""
        if self._local_address is None and not self._closed:
            try:
                self._local_address = socket_address(self._sock.getsockname())
            except OSError:
                return None
        return self._local_address

    # --- what the owner does

    def open_tunnel(self, authority: str, headers: Mapping[str, str], on_response: OnResponse) -> Tunnel:
        """Client: send CONNECT. ``on_response`` gets the tunnel (status 200) or a TunnelFailure, within `RESPONSE_TIMEOUT` and never within
        this call.

        Attach a consumer within ``on_response`` or later; no byte is lost meanwhile. The returned tunnel is only good for ``reset``
        (with which a dial is cancelled) until then.
        """
        client = self._client
        if client is None or not self.usable:
            tunnel = Tunnel(self, 0, authority, headers)
            tunnel._reset = ("connection takes no more tunnels", None)
            failure = TunnelFailure("connection takes no more tunnels", retryable=True)
            self._reactor.call_soon(lambda: on_response(failure))
            return tunnel
        stream = client.request_tunnel(authority, headers)
        state = client.find_stream(stream)
        assert state is not None  # made by this call
        tunnel = self._enter(Tunnel(self, stream, authority, {}), state)
        tunnel._on_response = on_response
        self._unanswered[tunnel] = self._reactor.now()
        if self._answer_timer is None:
            self._answer_timer = self._reactor.call_later(RESPONSE_TIMEOUT, self._give_up_unanswered)
        self._schedule_pump()
        return tunnel

    def _give_up_unanswered(self) -> None:
        """One timer for all requests: the oldest is due first."""
        self._answer_timer = None
        now = self._reactor.now()
        due: list[Tunnel] = []
        for tunnel, asked in self._unanswered.items():
            left = asked + RESPONSE_TIMEOUT - now
            if left > 0:
                # Before anybody is told: who asks again at once would set another.
                self._answer_timer = self._reactor.call_later(left, self._give_up_unanswered)
                break
            due.append(tunnel)
        for tunnel in due:
            self._guard(tunnel, partial(tunnel.reset, ErrorCode.CANCEL, f"no response to CONNECT within {RESPONSE_TIMEOUT:g} s"))

    def _enter(self, tunnel: Tunnel, state: Stream) -> Tunnel:
        self._tunnels[tunnel.stream] = tunnel
        tunnel._state = state
        state.owner = tunnel
        return tunnel

    def close_gracefully(self) -> None:
        """Take no new tunnels, let the living ones end, then close. A server says so by GOAWAY first. Idempotent."""
        if self._closed or self._draining:
            return
        self._draining = True
        if self._engine.established:
            self._announce_drain()
        self._schedule_pump()

    def _announce_drain(self) -> None:
        if self._server is None:
            self._drain_read = True
            return
        self._server.drain()
        self._server.ping(_DRAIN_PING)  # answered after the core's own ping, so after the final GOAWAY was made
        self._reactor.call_later(DRAIN_TIMEOUT, self._on_drain_read)

    def _on_drain_read(self) -> None:
        self._drain_read = True
        self._schedule_pump()

    def abort(self, reason: str) -> None:
        """Close at once; every tunnel breaks with ``reason``. Idempotent."""
        self._finish(reason)

    # --- start

    def _start(self) -> None:
        self._sock.setblocking(False)
        self._timer = self._reactor.call_later(HANDSHAKE_TIMEOUT, self._on_handshake_timeout)
        self._reactor.add(self._fd, CONNECTION & ~OUT, self._on_event, self.abort)  # a new socket has room: no news
        if self._client is not None:
            self._shake_hands()

    def _on_handshake_timeout(self) -> None:
        what = f"{PROTOCOL_ERROR}no HTTP/2 preface" if self._engine.established else "tls handshake error: not complete"
        self._finish(f"{what} within {HANDSHAKE_TIMEOUT:g} s")

    def _shake_hands(self) -> None:
        try:
            self._engine.handshake()
        except TlsError as exc:
            self._flush()  # the alert, so that the peer learns why
            self._finish(f"tls handshake error: {exc.reason}")
            return
        if self._engine.established:
            self._on_established()
        else:
            self._flush()

    def _on_established(self) -> None:
        self.peer_certificate = self._engine.peer_certificate()
        if self._engine.alpn not in (b"h2", b""):
            self._finish(f"tls handshake error: peer chose protocol {self._engine.alpn!r}")
            return
        if self._client is not None:
            self._heard_in_time()
        if self._draining:
            self._announce_drain()
        self._schedule_pump()
        on_ready, self._on_ready = self._on_ready, None
        if on_ready is not None:
            on_ready(self)

    def _heard_in_time(self) -> None:
        """The peer is what it should be: the handshake's deadline becomes the keepalive's clock."""
        self._heard = True
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._reactor.call_later(PING_INTERVAL, self._tick)

    # --- events

    def _on_event(self, mask: int) -> None:
        if mask & PEER_CLOSED:
            self._peer_hung_up = True
        if mask & OUT and self._backlog is not None and self._flush_backlog():
            self._pump()
        if mask & ~OUT:
            self._read()

    def _read(self) -> None:
        if self._closed:
            return
        try:
            size = self._sock.recv_into(self._cipher_in)
        except BlockingIOError:
            return
        except OSError as exc:
            self._finish(f"connection lost: {exc.strerror}")
            return
        if size == 0:
            self._on_eof()
            return
        self._heard_since_tick = True
        engine = self._engine
        try:
            plain = engine.open(size) if engine.established else self._go_on_shaking_hands(size)
        except TlsError as broken:
            self._flush()
            self._finish(broken.reason)
            return
        if plain and not self._closing:
            stream = self._core.receive_lone_data(self._plain_in, plain)
            if stream is not None:
                self._deliver_alone(stream, plain - _FRAME_HEADER)
            else:
                self._receive(self._plain_in[:plain])
        if engine.peer_closed and not self._closed:
            self._on_peer_closed()
        # A short read found the socket empty, and a later byte or FIN makes a new edge; but a FIN that this event already announced
        # does not. A full one goes on after the other connections' turns.
        if (size == READ_SIZE or self._peer_hung_up) and not (self._closed or self._read_scheduled):
            self._read_scheduled = True  # once, whatever events come in between
            self._reactor.call_soon(self._read_on, self.abort)

    def _read_on(self) -> None:
        self._read_scheduled = False
        self._read()

    def _go_on_shaking_hands(self, size: int) -> int:
        """Give the handshake what came; the number of decrypted bytes behind its end."""
        self._engine.feed(size)
        self._shake_hands()
        return self._engine.read() if self._engine.established and not self._closed else 0

    def _on_eof(self) -> None:
        if self._closing or self._engine.peer_closed:
            self._finish(None)
        elif not self._engine.established:
            self._finish("tls handshake error: connection closed by peer")
        elif self._tunnels:
            self._finish("connection truncated by peer")
        else:
            self._finish(None)

    def _on_peer_closed(self) -> None:
        if self._tunnels and not self._closing:
            self._finish("connection closed by peer")
        else:
            self._begin_close()

    def _receive(self, data: memoryview) -> None:
        try:
            events = self._core.receive(data)
        except RemoteProtocolError as exc:
            self._pump()
            self._finish(f"{PROTOCOL_ERROR}{exc.reason}")
            return
        if not self._heard and self._core.settings_received:
            self._heard_in_time()
        touched: list[Tunnel] = []
        for event in events:
            if type(event) is TunnelData:
                tunnel = self._tunnels.get(event.stream)
                if tunnel is not None:
                    if not tunnel._chunks:
                        touched.append(tunnel)
                    tunnel._chunks.append(event.data)
            else:
                tunnel = self._on_ended(event.stream) if type(event) is TunnelEnded else self._on_core_event(event)
                if tunnel is not None and tunnel not in touched:
                    touched.append(tunnel)
        for tunnel in touched:
            try:
                tunnel._deliver()
            except Exception as mistake:
                self._tunnel_crashed(tunnel, mistake)
        if len(self._core.outgoing) > UNSENT_AT_MOST:
            self._finish(f"{PROTOCOL_ERROR}the peer sends and does not read")
        if not self._closed and (self._core.outgoing or self._draining):
            self._schedule_pump()

    def _deliver_alone(self, stream: Stream, size: int) -> None:
        """What `_receive` would do about one frame of payload, when that is all that came."""
        tunnel = stream.owner
        assert type(tunnel) is Tunnel
        payload = self._plain_in[_FRAME_HEADER : _FRAME_HEADER + size]
        consumer = tunnel.consumer
        if consumer is None:
            tunnel._held += payload
            self._keep_waiting(tunnel, size)
            return
        try:
            passed = consumer.tunnel_data((payload,))
        except Exception as exc:
            self._tunnel_crashed(tunnel, exc)
            return
        self._passed_on(tunnel, size, passed)

    def _passed_on(self, tunnel: Tunnel, size: int, passed: int) -> None:
        """Of ``size`` bytes that have just come so many have moved on; the others wait."""
        core = self._core
        core.consumed_at_once(tunnel._state, passed)
        if core.outgoing and not self._pump_scheduled:
            self._schedule_pump()
        if passed < size and tunnel.consumer is not None:
            self._keep_waiting(tunnel, size - passed)

    def _keep_waiting(self, tunnel: Tunnel, size: int) -> None:
        tunnel._waiting += size
        self._waiting += size
        if self._waiting > STORED_AT_MOST:
            self._hold_credit()

    def _hold_credit(self) -> None:
        if not self._holding_credit:
            self._holding_credit = True
            self._core.hold_credit(True)

    def _return_credit(self) -> None:
        if self._waiting <= STORED_AT_MOST // 2:
            self._holding_credit = False
            self._core.hold_credit(False)
            self._schedule_pump()

    def _on_core_event(self, event: object) -> Tunnel | None:
        """Act on anything but payload and its end; returns a tunnel whose consumer has to be told once its payload is delivered."""
        match event:
            case TunnelRequested():
                self._on_requested(event)
            case TunnelResponded():
                self._on_responded(event)
            case WindowOpened(stream=None):
                shut_out, self._shut_out = self._shut_out, set()
                for tunnel in shut_out:
                    self._let_in(tunnel)
            case WindowOpened(stream=int(stream)):
                self._let_in(self._tunnels.get(stream))
            case TunnelReset(stream=stream, code=code):
                gone = self._tunnels.get(stream)
                if gone is not None:
                    self._leave(gone)
                    self._guard(gone, lambda: gone._lost(f"tunnel reset by peer: {_code_name(code)}", code, retryable=event.is_retryable))
                return gone
            case GoingAway():
                self._draining = self._drain_read = True
            case PingAcknowledged(data=data) if data == _DRAIN_PING:
                self._on_drain_read()
            case MoreStreamsAllowed():
                self._tell_of_room()
            case RequestRefused():
                if self._on_refused is not None:
                    self._on_refused(event)
            case PingAcknowledged():
                pass
        return None

    def _on_ended(self, stream: int) -> Tunnel | None:
        ended = self._tunnels.get(stream)
        if ended is not None:
            ended._ended = True
            self._tunnel_moved(ended)
        return ended

    def _on_requested(self, event: TunnelRequested) -> None:
        state = self._core.find_stream(event.stream)
        if state is None:
            return  # withdrawn within the same read: nobody waits for an answer
        tunnel = self._enter(Tunnel(self, event.stream, event.authority, event.headers), state)
        on_request = self._on_request
        assert on_request is not None  # only a server is asked
        request = TunnelRequest(tunnel, event.target)
        self._guard(tunnel, lambda: on_request(request))

    def _on_responded(self, event: TunnelResponded) -> None:
        tunnel = self._tunnels.get(event.stream)
        on_response = tunnel._take_on_response() if tunnel is not None else None
        if tunnel is None or on_response is None:
            return
        tunnel.headers = event.headers
        self._answered = True
        if event.status == 200:
            self._guard(tunnel, lambda: on_response(tunnel))
            return
        because = f"http status: {event.status}"
        tunnel._reset = (because, None)
        self._tunnel_moved(tunnel)
        self._guard(tunnel, lambda: on_response(TunnelFailure(because, status=event.status, headers=event.headers)))

    def _guard(self, tunnel: Tunnel, call: Callable[[], None]) -> None:
        """A caller's mistake with one tunnel must not cost the others."""
        try:
            call()
        except Exception as exc:
            self._tunnel_crashed(tunnel, exc)

    def _tunnel_crashed(self, tunnel: Tunnel, error: Exception) -> None:
        self._reactor.report(error, f"tunnel to {tunnel.authority}")
        reason = f"internal error: {error!r}"
        consumer = tunnel.consumer
        tunnel.detach()
        tunnel.reset(ErrorCode.INTERNAL_ERROR, reason)
        if consumer is not None:
            try:
                consumer.tunnel_reset(reason, None)
            except Exception as exc:
                self._reactor.report(exc, f"tunnel to {tunnel.authority}")

    # --- answers (TunnelRequest)

    def _accept(self, tunnel: Tunnel, headers: Mapping[str, str]) -> None:
        if tunnel._reset is None and self._server is not None:
            self._server.accept(tunnel.stream, headers)
            self._schedule_pump()

    def _refuse(self, tunnel: Tunnel, status: int, headers: Mapping[str, str]) -> None:
        if tunnel._reset is None and self._server is not None:
            tunnel._reset = (f"refused with {status}", None)
            tunnel.detach()
            self._server.refuse(tunnel.stream, status, headers)
            self._tunnel_moved(tunnel)

    # --- sending

    def _schedule_pump(self) -> None:
        """Send at the end of the turn, so that what all that it does has to say goes out together."""
        if not self._pump_scheduled:
            self._pump_scheduled = True
            self._reactor.call_last(self._pump, self.abort)

    def _tunnel_moved(self, tunnel: Tunnel) -> None:
        if not tunnel.alive:
            self._leave(tunnel)
        self._schedule_pump()

    def _leave(self, tunnel: Tunnel) -> None:
        """The tunnel is one of the link's no more."""
        self._tunnels.pop(tunnel.stream, None)
        self._shut_out.discard(tunnel)
        self._tell_of_room()

    def _tell_of_room(self) -> None:
        on_room = self.on_room
        if on_room is not None:
            self.on_room = None
            on_room()

    def _let_in(self, tunnel: Tunnel | None) -> None:
        if tunnel is not None and tunnel._window_shut:
            tunnel._window_shut = False
            self._shut_out.discard(tunnel)
            tunnel.want_write()

    def _pump(self) -> None:
        if self._closed or self._closing or self._backlog is not None or not self._engine.established:
            self._pump_scheduled = False
            return
        try:
            size = self._fill()
            # Not before: what ends while it is read, as a socket does, is in this send already.
            self._pump_scheduled = False
            if size and not self._transmit(self._engine.seal(size)):
                return
        except TlsError as exc:
            self._finish(exc.reason)
            return
        if self._round or self._unsent_control:
            self._schedule_pump()
        elif self._draining and self._drain_read and not self._tunnels and not self._closed:
            self._begin_close()

    _unsent_control = b""

    def _send_alone(self, tunnel: Tunnel) -> None:
        """What `_pump` would do about one tunnel's payload, when nobody else has anything to say."""
        core, consumer, stream = self._core, tunnel.consumer, tunnel._state
        room = core.room(stream)
        if (
            consumer is None
            or not room
            or self._pump_scheduled
            or core.outgoing
            or self._backlog is not None
            or core.max_frame_size < _LONE_FRAME
        ):
            tunnel.want_write()
            return
        try:
            size = consumer.read_into(self._lone_payload, room if room < _LONE_FRAME else _LONE_FRAME)
        except Exception as exc:
            self._tunnel_crashed(tunnel, exc)
            return
        if size:
            core.write_header(self._plain_out, 0, stream, size)
            try:
                self._transmit(self._engine.seal(_FRAME_HEADER + size))
            except TlsError as broken:
                self._finish(broken.reason)
                return
        if consumer.readable:
            tunnel.want_write()

    def _fill(self) -> int:
        """Put control bytes and the tunnels' payload in turn into ``plain_out``; the number of bytes."""
        core, round_, out = self._core, self._round, self._plain_out
        largest = core.max_frame_size
        position = 0
        left = TUNNELS_AT_ONCE
        while True:
            # Before each frame header whatever the core wants said earlier, as it demands.
            if core.outgoing or self._unsent_control:
                position = self._fill_control(position)
            room = PLAIN_OUT_SIZE - position - _FRAME_HEADER
            if not round_ or room < _SMALLEST_READ or not left:
                return position
            left -= 1
            tunnel = round_.popleft()
            tunnel._in_round = False
            consumer = tunnel.consumer
            if consumer is None or tunnel._reset is not None or tunnel._local_end:
                continue
            stream = tunnel._state
            limit = core.room(stream)
            if not limit:
                tunnel._window_shut = True
                self._shut_out.add(tunnel)
                continue
            if limit > room:
                limit = room
            if limit > FAIR_SHARE and round_:
                limit = FAIR_SHARE
            try:
                if limit <= largest:
                    start = position + _FRAME_HEADER
                    size = consumer.read_into(out[start:], limit)
                    if size:
                        core.write_header(out, position, stream, size)
                        position = start + size
                else:
                    position += self._fill_frames(tunnel, consumer, position, limit)
            except LocalProtocolError:
                raise
            except Exception as exc:
                self._tunnel_crashed(tunnel, exc)
                continue
            if consumer.readable:
                tunnel.want_write()

    def _fill_frames(self, tunnel: Tunnel, consumer: TunnelConsumer, position: int, limit: int) -> int:
        """One read spread over several frames, for a peer that takes small ones (16 KiB is HTTP/2's default)."""
        out, largest = self._plain_out, self._core.max_frame_size
        views, start = [], position
        while limit > 0 and start + _FRAME_HEADER < PLAIN_OUT_SIZE:
            take = min(limit, largest, PLAIN_OUT_SIZE - start - _FRAME_HEADER)
            views.append(out[start + _FRAME_HEADER : start + _FRAME_HEADER + take])
            start += _FRAME_HEADER + take
            limit -= take
        left = consumer.read_into_many(views) or 0
        at = position
        for view in views:
            if left <= 0:
                break
            size = min(left, len(view))
            out[at : at + _FRAME_HEADER] = self._core.data_header(tunnel.stream, size)
            at += _FRAME_HEADER + size
            left -= size
        return at - position

    def _fill_control(self, position: int) -> int:
        """Put what the core and earlier sends have to say into ``plain_out``, as far as it fits; the position behind it."""
        control = self._unsent_control + self._core.take_outgoing()
        fits = min(len(control), PLAIN_OUT_SIZE - position)
        self._plain_out[position : position + fits] = control[:fits]
        self._unsent_control = control[fits:]
        return position + fits

    def _flush(self) -> bool:
        """Send what the engine has ready. False if the socket takes no more for now, or is gone."""
        if self._backlog is not None:
            return False
        size = self._engine.take()
        return self._transmit(size) if size else True

    def _transmit(self, size: int) -> bool:
        out = self._cipher_out
        try:
            sent = self._sock.send(out[:size])
        except BlockingIOError:
            sent = 0
        except OSError as exc:
            self._send_failed(exc)
            return False
        if sent == size:
            return True
        self._backlog = memoryview(bytes(out[sent:size]))
        self._reactor.modify(self._fd, CONNECTION)
        return False

    def _flush_backlog(self) -> bool:
        assert self._backlog is not None
        try:
            sent = self._sock.send(self._backlog)
        except BlockingIOError:
            return False
        except OSError as exc:
            self._send_failed(exc)
            return False
        if sent < len(self._backlog):
            self._backlog = self._backlog[sent:]
            return False
        self._backlog = None
        if self._closing:
            self._say_goodbye()
            return False
        return True

    def _send_failed(self, error: OSError) -> None:
        if not self._closing:
            # The peer may have said why before it went: its alert or GOAWAY can still be read.
            self._reactor.call_soon(lambda: self._finish(f"connection lost: {error.strerror}"))
            self._read()
        else:
            self._finish(None)

    # --- keepalive

    def _tick(self) -> None:
        self._timer = self._reactor.call_later(PING_INTERVAL, self._tick)
        if self._heard_since_tick:
            self._heard_since_tick = False
            self._ping_sent_at = None
            return
        self._engine.release_memory()
        if not (self._tunnels or self.pooled):
            return
        now = self._reactor.now()
        if self._ping_sent_at is None:
            self._ping_sent_at = now
            self._core.ping(_KEEPALIVE_PING)
            self._schedule_pump()
        elif now - self._ping_sent_at >= PING_TIMEOUT - PING_INTERVAL / 2:
            self._finish(f"keepalive: no sign of life for {PING_TIMEOUT:g} s after a ping")

    # --- end

    def _begin_close(self) -> None:
        """Orderly: GOAWAY, close_notify, FIN; then wait a little for the peer's."""
        if self._closing or self._closed:
            return
        try:
            if self._client is not None and not self._core.going_away:
                self._core.go_away()
            size = self._fill_control(0)
            if size:
                self._engine.write(size)
        except TlsError as exc:
            self._finish(exc.reason)
            return
        self._closing = True
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._reactor.call_later(LINGER, lambda: self._finish(None))
        if self._flush():
            self._say_goodbye()

    def _say_goodbye(self) -> None:
        self._engine.close_notify()
        self._flush()
        if self._closed:
            return
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError:
            self._finish(None)
            return
        if self._engine.peer_closed:
            self._finish(None)

    def _finish(self, reason: str | None) -> None:
        if self._closed:
            return
        self._closed = True
        self._reactor.remove(self._fd)
        self._sock.close()
        for timer in (self._timer, self._answer_timer):
            if timer is not None:
                timer.cancel()
        self._round.clear()
        self._shut_out.clear()
        tunnels, self._tunnels = self._tunnels, {}
        for tunnel in tunnels.values():
            self._guard(tunnel, partial(self._break, tunnel, reason or "connection closed"))
        on_close, self._on_close = self._on_close, None
        self._on_ready = self._on_request = self._on_refused = None
        if on_close is not None:
            on_close(reason)

    def _break(self, tunnel: Tunnel, reason: str) -> None:
        # A request that was not answered may have been seen, but nothing of the application's went with it: it may be made again. A peer
        # that never answered on this connection would not on another: with TLS 1.3 that is how it refuses a certificate.
        tunnel._lost(reason, None, retryable=self._answered)
        if tunnel.consumer is not None:
            tunnel.consumer.tunnel_reset(reason, None)


def _code_name(code: int) -> str:
    try:
        return ErrorCode(code).name
    except ValueError:
        return f"code {code}"


def serve_hbone(
    reactor: Reactor,
    sock: socket.socket,
    context: SSL.Context,
    *,
    on_handshake: JudgePeer,
    on_request: OnRequest,
    on_close: OnClose,
    on_refused: OnRefused | None = None,
    limits: Limits = SERVER_LIMITS,
    wrong_method: int = 400,
) -> HboneLink:
    """Serve HBONE on an accepted socket (`mesh.reactor.tcp.listen_on`), which is the link's from now on.

    ``on_handshake(peer_der)`` is asked within the TLS handshake, once the chain is verified: None takes the peer, text refuses it (the
    peer gets an alert). ``on_request`` gets each valid CONNECT; ``on_refused`` is told of each other request, which has been answered
    400, or ``wrong_method`` where that was what was wrong.
    ``on_close(reason)`` is the last call: a reason when something was cut off or refused, None for an orderly end.
    """
    engine = tls_engine(context, server_side=True, verify_peer=on_handshake)
    link = HboneLink(reactor, sock, engine, HboneServer(now=reactor.now, limits=limits, wrong_method=wrong_method), on_close)
    link._on_request = on_request
    link._on_refused = on_refused
    link._start()
    return link


def connect_hbone(
    reactor: Reactor,
    connected_sock: socket.socket,
    context: SSL.Context,
    *,
    verify_peer: JudgePeer,
    on_ready: Callable[[HboneLink], None],
    on_close: OnClose,
) -> HboneLink:
    """Speak HBONE to a server on a connected socket, which is the link's from now on; its options are the caller's to set.

    ``verify_peer(der)``: None takes the server, text refuses it. ``on_ready(link)`` comes after the handshake, never within this call;
    ``on_close`` as in `serve_hbone`, also when the handshake failed (then without ``on_ready``). Under TLS 1.3 a server's refusal of
    our certificate arrives after ``on_ready``.
    """
    engine = tls_engine(context, server_side=False, verify_peer=verify_peer)
    link = HboneLink(reactor, connected_sock, engine, HboneClient(now=reactor.now), on_close)
    link._on_ready = on_ready
    link._start()
    return link

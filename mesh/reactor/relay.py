"""Moves the bytes of one connection between two ends until both have said all they have to say.

Half-close passes in either direction, at any time. A reset passes as a reset: ztunnel turns RST into a clean end of file, so that a
client takes a truncated answer for a whole one. Memory is bounded: what a slow socket does not take waits in at most one stream
window (`TunnelRelay`) or one kernel pipe (`SpliceRelay`), and the sender is held back.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Sequence
from select import EPOLLERR
from typing import Final, Literal, NamedTuple, Protocol, TypeAlias

from mesh.reactor.hbone import Tunnel
from mesh.reactor.loop import BYTE_BUDGET, CONNECTION, IN, OUT, PEER_CLOSED, Reactor, Timer
from mesh.reactor.pipes import Pipe, borrow_pipe, discard_pipe, return_pipe
from mesh.reactor.tcp import reset as reset_socket
from mesh.reactor.tls import scratch
from mesh.wire.errors import ErrorCode

Side: TypeAlias = Literal["downstream", "upstream"]

LINGER: Final = 5.0
"""Seconds in which a socket may read the rest of what it was sent, after the far side stopped listening to it."""

_MOST_VIEWS: Final = 64
"""Chunks given to one ``sendmsg``; above that they are joined, since a peer may send frames of one byte."""


class RelayResult(NamedTuple):
    """How a relayed connection went. Bytes are payload; ``sent`` came from the first socket."""

    sent: int
    received: int
    error: str | None
    """None if both directions ended with end of file."""
    first_closed: Side | None
    """Whose end of file or reset came first; None if neither (we aborted it)."""


OnRelayClose: TypeAlias = Callable[[RelayResult], None]


class Relay(Protocol):
    """A relay at work. The counters are live."""

    @property
    def sent(self) -> int: ...

    @property
    def received(self) -> int: ...

    def abort(self, reason: str) -> None:
        """Cut both ends off with resets. ``on_close`` gets ``reason`` as the error. Idempotent."""


class TunnelRelay:
    """A socket on one end, an HBONE tunnel on the other."""

    __slots__ = (
        "_fd", "_first_closed", "_hung_up", "_linger", "_on_close", "_pending", "_reactor", "_side", "_sock", "_sock_ended",
        "_told_of_room", "_tunnel", "_tunnel_done", "readable", "received", "sent",
    )  # fmt: skip

    def __init__(self, reactor: Reactor, sock: socket.socket, tunnel: Tunnel, on_close: OnRelayClose, side: Side) -> None:
        self._reactor = reactor
        self._sock = sock
        self._fd = sock.fileno()
        self._tunnel = tunnel
        self._on_close: OnRelayClose | None = on_close
        self._side: Side = side
        self._pending = bytearray()  # from the tunnel, not yet taken by the socket
        self._told_of_room = False  # epoll was asked to, since the socket once did not take all
        self._hung_up = False  # epoll announced the end of what the socket has to give: read up to it
        self._sock_ended = False
        self._tunnel_done = False
        self._first_closed: Side | None = None
        self._linger: Timer | None = None
        self.readable = False
        self.sent = 0
        self.received = 0

    def abort(self, reason: str) -> None:
        self._break(reason, ErrorCode.CANCEL)

    # --- socket to tunnel

    def _on_event(self, mask: int) -> None:
        if mask == IN and self._linger is None and not self._sock_ended:
            self.readable = True
            if self._reactor.alone:
                self._tunnel.write_alone()
            else:
                self._tunnel.want_write()
            return
        if mask & OUT and self._pending:
            self._drain()
        if self._linger is not None:
            self._discard()
        elif mask & ~OUT and self._on_close is not None:
            if mask & PEER_CLOSED:
                self._hung_up = True
                # An error while we read nothing, because the window is shut or all was read, would go unnoticed.
                if mask & EPOLLERR and (self._sock_ended or self._tunnel.window_shut):
                    self._check_error()
            if not self._sock_ended:
                self.readable = True
                self._tunnel.want_write()

    def _check_error(self) -> None:
        code = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self._socket_failed(OSError(code, os.strerror(code)))

    def read_into(self, view: memoryview, most: int) -> int | None:
        """For the link: bytes of the socket, straight into its send buffer."""
        if self._sock_ended or self._on_close is None:
            self.readable = False
            return None
        try:
            size = self._sock.recv_into(view, most)
        except OSError as exc:
            self._nothing_received(exc)
            return None
        if size == 0:
            self._socket_ended()
            return None
        self.sent += size
        # After a short read the socket is empty and anything later is a new edge, unless the event that brought us here announced
        # the end as well: then there is no further one.
        self.readable = size == most or self._hung_up
        return size

    def read_into_many(self, views: list[memoryview]) -> int | None:
        """The same for a peer that takes small frames."""
        if self._sock_ended or self._on_close is None:
            self.readable = False
            return None
        try:
            size = self._sock.recvmsg_into(views)[0]
        except OSError as exc:
            self._nothing_received(exc)
            return None
        if size == 0:
            self._socket_ended()
            return None
        self.sent += size
        self.readable = size == sum(map(len, views)) or self._hung_up
        return size

    def _nothing_received(self, error: OSError) -> None:
        if isinstance(error, BlockingIOError):
            self.readable = False
        else:
            self._socket_failed(error)

    def _socket_ended(self) -> None:
        self._sock_ended = True
        self.readable = False
        self._closed_first(self._side)
        self._tunnel.end()
        self._finish_if_over()

    # --- tunnel to socket

    def tunnel_data(self, chunks: Sequence[memoryview]) -> int:
        if self._pending:
            for chunk in chunks:
                self._pending += chunk
            return 0
        if self._on_close is None:
            return 0
        try:
            if len(chunks) == 1:
                sent = self._sock.send(chunks[0])
                if sent == len(chunks[0]):
                    self.received += sent
                    return sent
            elif len(chunks) <= _MOST_VIEWS:
                sent = self._sock.sendmsg(chunks)
            else:
                sent = self._sock.send(b"".join(chunks))
        except BlockingIOError:
            sent = 0
        except OSError as exc:
            self._socket_failed(exc)
            return 0
        self._keep_rest(chunks, sent)
        self.received += sent
        return sent

    def _keep_rest(self, chunks: Sequence[memoryview], sent: int) -> None:
        """What the socket did not take becomes pending."""
        pending = self._pending
        for chunk in chunks:
            if sent >= len(chunk):
                sent -= len(chunk)
            else:
                pending += chunk[sent:]
                sent = 0
        if pending and not self._told_of_room:
            self._told_of_room = True
            self._reactor.modify(self._fd, CONNECTION)

    def tunnel_ended(self) -> None:
        self._closed_first(self._other_side)
        self._tunnel_done = True
        if not self._pending:
            self._pass_end_on()

    def tunnel_reset(self, reason: str, code: int | None) -> None:
        self._closed_first(self._other_side)
        if code != ErrorCode.NO_ERROR:
            self._finish(reason)
            return
        # A peer that got all it wanted (RFC 9113 section 8.1; Envoy, when its upstream ended first): what it sent is complete, what the
        # socket still says nobody wants. Closing now would send RST for the unread bytes and destroy what the socket has not read.
        self._tunnel_done = True
        self._linger = self._reactor.call_later(LINGER, lambda: self._finish(None))
        if not self._pending:
            self._pass_end_on()
        self._discard()

    def _discard(self) -> None:
        buffer = scratch().cipher_in
        try:
            while self._on_close is not None and not self._sock_ended:
                self._sock_ended = self._sock.recv_into(buffer) == 0
        except BlockingIOError:
            return
        except OSError:
            self._sock_ended = True
            self._pending.clear()
        self._finish_if_over()

    def _drain(self) -> None:
        pending = self._pending
        try:
            sent = self._sock.send(pending)
        except BlockingIOError:
            return
        except OSError as exc:
            self._socket_failed(exc)
            return
        del pending[:sent]
        self.received += sent
        self._tunnel.consumed(sent)
        if not pending:
            self._pending = bytearray()  # a burst's size is not kept for life
            if self._tunnel_done:
                self._pass_end_on()

    def _pass_end_on(self) -> None:
        if self._sock_ended:  # closing says it as well
            self._finish(None)
            return
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError as exc:
            if exc.errno != errno.ENOTCONN:
                self._socket_failed(exc)

    # --- end

    @property
    def _other_side(self) -> Side:
        return "upstream" if self._side == "downstream" else "downstream"

    def _closed_first(self, side: Side) -> None:
        if self._first_closed is None:
            self._first_closed = side

    def _socket_failed(self, error: OSError) -> None:
        self._closed_first(self._side)
        if error.errno in (errno.ECONNRESET, errno.EPIPE):
            reason = f"connection reset by {self._side}"
        else:
            reason = f"{self._side}: {error.strerror}"
        self._break(reason, ErrorCode.CANCEL)

    def _break(self, reason: str, code: int) -> None:
        if self._on_close is not None:
            self._tunnel.reset(code, reason)
            self._finish(reason)

    def _finish_if_over(self) -> None:
        if self._sock_ended and self._tunnel_done and not self._pending:
            self._finish(None)

    def _finish(self, error: str | None) -> None:
        on_close, self._on_close = self._on_close, None
        if on_close is None:
            return
        self.readable = False
        if self._linger is not None:
            self._linger.cancel()
        self._reactor.forget(self._fd)
        self._tunnel.detach()
        if error is None:
            self._sock.close()
        else:
            reset_socket(self._sock)
        on_close(RelayResult(self.sent, self.received, error, self._first_closed))


class _Direction:
    """One way of a spliced connection."""

    __slots__ = ("ended", "held", "pipe", "readable", "scheduled", "sink", "source", "total")

    def __init__(self, source: int, sink: int) -> None:
        self.source = source
        self.sink = sink
        self.pipe: Pipe | None = None  # borrowed while bytes are in it
        self.held = 0
        self.readable = False
        self.scheduled = False
        self.ended = False
        self.total = 0


class SpliceRelay:
    """Two sockets; the bytes never enter this process. A pipe is borrowed while bytes are on their way, so idle relays have none."""

    __slots__ = ("_a", "_b", "_down", "_fd_a", "_fd_b", "_first_closed", "_on_close", "_reactor", "_up")

    def __init__(self, reactor: Reactor, sock_a: socket.socket, sock_b: socket.socket, on_close: OnRelayClose) -> None:
        self._reactor = reactor
        self._a = sock_a
        self._b = sock_b
        self._fd_a = sock_a.fileno()
        self._fd_b = sock_b.fileno()
        self._on_close: OnRelayClose | None = on_close
        self._first_closed: Side | None = None
        self._up = _Direction(self._fd_a, self._fd_b)
        self._down = _Direction(self._fd_b, self._fd_a)

    @property
    def sent(self) -> int:
        return self._up.total

    @property
    def received(self) -> int:
        return self._down.total

    def abort(self, reason: str) -> None:
        self._finish(reason)

    def _on_a(self, mask: int) -> None:
        self._on_event(mask, self._up, self._down)

    def _on_b(self, mask: int) -> None:
        self._on_event(mask, self._down, self._up)

    def _on_event(self, mask: int, outgoing: _Direction, incoming: _Direction) -> None:
        if mask & ~OUT:
            outgoing.readable = True
            if mask & EPOLLERR and (outgoing.ended or outgoing.held):
                self._check_error(outgoing.source)
            self._move(outgoing)
        if mask & OUT and incoming.held:
            self._move(incoming)

    def _check_error(self, fd: int) -> None:
        sock = self._a if fd == self._fd_a else self._b
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self._failed(fd, OSError(code, os.strerror(code)))

    def _move(self, way: _Direction) -> None:
        """Move until the source is empty, the sink is full, or the others should have their turn."""
        budget = BYTE_BUDGET
        while self._on_close is not None:
            if way.held and not self._push(way):
                return
            if way.ended or not way.readable:
                return
            if budget <= 0:
                # Once: every event that comes in between finds the budget used up as well, and calls would become ever more.
                if not way.scheduled:
                    way.scheduled = True
                    self._reactor.call_soon(lambda: self._go_on(way), self.abort)
                return
            budget -= self._pull(way)

    def _go_on(self, way: _Direction) -> None:
        way.scheduled = False
        self._move(way)

    def _pull(self, way: _Direction) -> int:
        if way.pipe is None:
            try:
                way.pipe = borrow_pipe()
            except OSError as exc:
                self._finish(f"no pipe: {exc.strerror}")
                return 0
        try:
            size = os.splice(way.source, way.pipe.write_fd, BYTE_BUDGET, flags=os.SPLICE_F_NONBLOCK | os.SPLICE_F_MOVE)
        except BlockingIOError:
            way.readable = False
            self._give_back(way)
            return 0
        except OSError as exc:
            self._failed(way.source, exc)
            return 0
        if size == 0:
            way.ended = True
            self._give_back(way)
            if self._first_closed is None:
                self._first_closed = self._side_of(way.source)
            self._pass_end_on(way)
            return 0
        way.held = size
        return size

    def _push(self, way: _Direction) -> bool:
        """Empty the pipe into the sink; False if the sink takes no more for now, or is gone."""
        assert way.pipe is not None
        try:
            while way.held:
                size = os.splice(way.pipe.read_fd, way.sink, way.held, flags=os.SPLICE_F_NONBLOCK | os.SPLICE_F_MOVE)
                way.held -= size
                way.total += size
        except BlockingIOError:
            return False
        except OSError as exc:
            self._failed(way.sink, exc)
            return False
        if not way.readable:
            self._give_back(way)
        return True

    def _give_back(self, way: _Direction) -> None:
        if way.pipe is not None:
            return_pipe(way.pipe)
            way.pipe = None

    def _pass_end_on(self, way: _Direction) -> None:
        sink = self._b if way is self._up else self._a
        try:
            sink.shutdown(socket.SHUT_WR)
        except OSError as exc:
            if exc.errno != errno.ENOTCONN:
                self._failed(way.sink, exc)
                return
        if self._up.ended and self._down.ended and not (self._up.held or self._down.held):
            self._finish(None)

    def _side_of(self, fd: int) -> Side:
        return "downstream" if fd == self._fd_a else "upstream"

    def _failed(self, fd: int, error: OSError) -> None:
        side = self._side_of(fd)
        if self._first_closed is None:
            self._first_closed = side
        if error.errno in (errno.ECONNRESET, errno.EPIPE):
            self._finish(f"connection reset by {side}")
        else:
            self._finish(f"{side}: {error.strerror}")

    def _finish(self, error: str | None) -> None:
        on_close, self._on_close = self._on_close, None
        if on_close is None:
            return
        self._reactor.forget(self._fd_a)
        self._reactor.forget(self._fd_b)
        for way in (self._up, self._down):
            if way.pipe is not None and way.held:
                discard_pipe(way.pipe)
                way.pipe = None
            self._give_back(way)
        for sock in (self._a, self._b):
            if error is None:
                sock.close()
            else:
                reset_socket(sock)
        on_close(RelayResult(self._up.total, self._down.total, error, self._first_closed))


def relay_tunnel(
    reactor: Reactor, sock: socket.socket, tunnel: Tunnel, on_close: OnRelayClose, *, sock_is: Side = "downstream"
) -> TunnelRelay:
    """Join a connected, non-blocking socket and an open tunnel; both are the relay's from now on.

    ``sent`` counts from the socket to the tunnel, ``received`` the other way. ``sock_is`` says which side the socket is, for
    ``first_closed`` and the error texts: downstream where we opened the tunnel, upstream where we serve it. ``on_close`` may come
    before this returns, if the tunnel is dead already.
    """
    relay = TunnelRelay(reactor, sock, tunnel, on_close, sock_is)
    reactor.add(relay._fd, CONNECTION & ~OUT, relay._on_event, relay.abort)  # nearly every socket has room at first: no news
    tunnel.attach(relay)
    if sock_is == "downstream" and tunnel.alive:
        relay.readable = True  # most clients have spoken by now: look at once rather than wake for it
        tunnel.want_write()
    return relay


def relay_tcp(reactor: Reactor, sock_a: socket.socket, sock_b: socket.socket, on_close: OnRelayClose) -> SpliceRelay:
    """Join two connected, non-blocking sockets (downstream, upstream); both are the relay's from now on. Bytes move by splice(2)."""
    relay = SpliceRelay(reactor, sock_a, sock_b, on_close)
    reactor.add(relay._fd_a, CONNECTION, relay._on_a, relay.abort)
    reactor.add(relay._fd_b, CONNECTION, relay._on_b, relay.abort)
    return relay

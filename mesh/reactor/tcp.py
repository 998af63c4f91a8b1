"""Plain TCP at the reactor: accept in bounded batches, connect with a deadline."""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
from collections.abc import Callable
from functools import lru_cache
from typing import TypeAlias

from mesh.linux.sockets import set_connection_options
from mesh.model.address import IpAddress, SocketAddress, ip_text, parse_ip
from mesh.reactor.loop import Reactor, Timer
from mesh.reactor.sharing import Share

ACCEPT_BATCH = 32
"""Connections taken from one listener per wake-up, so that a burst does not hold up the living ones."""

LOOK_AGAIN = 0.0005
"""Seconds from letting others go first to the next look at what they left."""

ACCEPT_PAUSE = 0.1
"""Seconds without accepting after the process ran out of descriptors or memory: the queue waits in the kernel, nothing spins."""

CONNECT_TIMEOUT = 10.0
"""Seconds; ztunnel's limit for every upstream connect."""

# What socket.socket wraps, which makes an enum's member of it each time: half of what connect() itself takes in the kernel.
_family_of: Callable[[socket.socket], int] = socket.SocketType.family.__get__
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)

OnAccept: TypeAlias = Callable[[socket.socket, SocketAddress], None]
OnConnect: TypeAlias = Callable[[OSError | None], None]

_cached_ip: Callable[[str], IpAddress] = lru_cache(maxsize=4096)(parse_ip)


def socket_address(name: tuple[str, int] | tuple[str, int, int, int]) -> SocketAddress:
    """What ``accept``, ``getpeername`` or ``getsockname`` return, IPv4-mapped addresses unmapped and zone dropped."""
    return SocketAddress(_cached_ip(name[0].partition("%")[0]), name[1])


def reset(sock: socket.socket) -> None:
    """Close ``sock`` with RST instead of FIN."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    except OSError:
        pass  # not a TCP socket, or dead already: closing is all that is left
    sock.close()


class Listener:
    """A listening socket at work. `close` stops accepting and leaves the socket itself to its owner."""

    __slots__ = ("_abandoned", "_aside", "_batch", "_family", "_fd", "_on_accept", "_pause", "_reactor", "_share", "_sock")

    def __init__(self, reactor: Reactor, sock: socket.socket, on_accept: OnAccept, share: Share | None) -> None:
        self._reactor = reactor
        self._sock = sock
        self._fd = sock.fileno()
        self._family = int(sock.family)
        self._on_accept = on_accept
        self._pause: Timer | None = None
        self._aside: Timer | None = None
        """While others go first."""
        self._share = share
        self._abandoned = False
        self._batch = 1
        self._resume()

    @property
    def paused(self) -> bool:
        """Whether accepting waits for descriptors or memory to become free."""
        return self._pause is not None

    def close(self) -> None:
        """Accept no more. Idempotent."""
        self._abandoned = True
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None
        self._leave()

    def finish(self) -> None:
        """Take what waits in the queue, then accept no more: of several processes that share the listener, the others may not have been
        woken for it. Out of the loop first: whatever comes later wakes one of them."""
        self._leave()
        while not self._abandoned and self._pause is None and self._take(ACCEPT_BATCH):
            pass
        self.close()

    def look_again(self) -> None:
        """Another process that shared the listener is dead, and may have been the one that was woken for a connection that waits."""
        if self._pause is None and not self._abandoned:
            self._leave()
            self._resume()  # the kernel looks at the queue when a listener enters an epoll set

    def _leave(self) -> None:
        self._reactor.remove(self._fd)
        if self._aside is not None:
            self._aside.cancel()
            self._aside = None

    def _resume(self) -> None:
        self._pause = self._aside = None
        # Level-triggered: what a bounded batch left over announces itself again. Exclusive: of several processes that share the
        # listener one wakes per connection.
        self._reactor.add(self._fd, select.EPOLLIN | select.EPOLLEXCLUSIVE, self._on_readable)

    def _on_readable(self, _events: int) -> None:
        # As many as waited last time, and twice that if there were more: one more accept than needed costs as much as a wake-up.
        if self._share is None:
            self._take(self._batch)
            return
        now = self._reactor.now()
        most = self._share.allowance(now, self._batch)
        if not most:
            self._reactor.remove(self._fd)
            self._aside = self._reactor.call_later(LOOK_AGAIN, self._resume)
            return
        self._take(most)
        if self._share.took(now) and not self._abandoned and self._pause is None:
            self._reactor.remove(self._fd)
            self._resume()  # at the end of the kernel's queue

    def _take(self, most: int) -> bool:
        """Accept so many at most; whether that many were there, and there may be more."""
        for taken in range(most):
            try:
                # What socket.accept() wraps, which makes enums of family and type each time.
                fd, name = self._sock._accept()  # type: ignore[attr-defined]  # not in typeshed
            except (BlockingIOError, InterruptedError):
                self._batch = max(1, taken)
                return False
            except OSError as exc:
                if exc.errno in _EXHAUSTED:
                    self._reactor.remove(self._fd)
                    self._pause = self._reactor.call_later(ACCEPT_PAUSE, self._resume)
                    self._reactor.exhausted(exc)
                    return False
                if exc.errno in (errno.EBADF, errno.EINVAL, errno.ENOTSOCK):
                    self.close()
                    raise
                continue  # the connection died in the queue (ECONNABORTED and the network errors of accept(2))
            sock = socket.socket(self._family, socket.SOCK_STREAM, 0, fd)
            sock.setblocking(False)
            try:
                self._on_accept(sock, socket_address(name))
            except Exception as mistake:
                self._reactor.report(mistake, f"accepted from {name}")
                reset(sock)
            if self._abandoned:
                return False
        self._batch = min(2 * most, ACCEPT_BATCH)
        return True


def listen_on(reactor: Reactor, listening_socket: socket.socket, on_accept: OnAccept, share: Share | None = None) -> Listener:
    """Hand every connection of a bound, listening socket to ``on_accept(socket, peer)``: non-blocking, with the options of connections.

    The socket may be shared with other processes, which have what they can take, or by ``share`` as many as this one. If ``on_accept``
    raises, that connection is reset and the error reported.
    """
    listening_socket.setblocking(False)
    set_connection_options(listening_socket)  # inherited by what is accepted
    return Listener(reactor, listening_socket, on_accept, share)


class Pending:
    """A connect under way."""

    __slots__ = ("_fd", "_on_done", "_reactor", "_sock", "_timer")

    def __init__(self, reactor: Reactor, sock: socket.socket, on_done: OnConnect) -> None:
        self._reactor = reactor
        self._sock = sock
        self._fd = sock.fileno()
        self._on_done: OnConnect | None = on_done
        self._timer: Timer | None = None

    def cancel(self) -> None:
        """``on_done`` will not be called. The socket stays the caller's, to close."""
        self._settle()

    def _start(self, address: SocketAddress, timeout: float) -> None:
        try:
            target = sockaddr(_family_of(self._sock), address)
            code = self._sock.connect_ex(target)
            if code == errno.EINPROGRESS:
                # On the same host, as from a proxy to its application, the handshake is over by now; only a further call learns of it.
                code = self._sock.connect_ex(target)
        except OSError as exc:
            failure = exc
            self._reactor.call_soon(lambda: self._done(failure))
            return
        if code == errno.EALREADY:
            self._timer = self._reactor.call_later(timeout, self._on_timeout)
            self._reactor.add(self._fd, select.EPOLLOUT | select.EPOLLET, self._on_writable, self._on_crash)
        else:
            error = OSError(code, os.strerror(code)) if code else None
            self._reactor.call_soon(lambda: self._done(error))

    def _on_writable(self, _events: int) -> None:
        code = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        self._done(OSError(code, os.strerror(code)) if code else None)

    def _on_timeout(self) -> None:
        self._done(TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)))

    def _on_crash(self, _reason: str) -> None:
        self._settle()
        if self._sock.fileno() == self._fd:
            self._reactor.remove(self._fd)
            self._sock.close()

    def _settle(self) -> OnConnect | None:
        on_done, self._on_done = self._on_done, None
        if on_done is not None:
            self._reactor.remove(self._fd)
            if self._timer is not None:
                self._timer.cancel()
        return on_done

    def _done(self, error: OSError | None) -> None:
        on_done = self._settle()
        if on_done is not None:
            on_done(error)


def connect(reactor: Reactor, sock: socket.socket, address: SocketAddress, timeout: float, on_done: OnConnect) -> Pending:
    """Connect a non-blocking socket the caller made; ``on_done(None)`` when it stands, ``on_done(OSError)`` when it cannot.

    ``timeout`` in seconds; its passing is a TimeoutError. ``on_done`` never runs inside this call. The socket stays the caller's
    in every case: close it when the connect failed. So are its options.
    """
    pending = Pending(reactor, sock, on_done)
    pending._start(address, timeout)
    return pending


def sockaddr(family: int, address: SocketAddress) -> tuple[str, int]:
    """``address`` as ``connect`` and ``bind`` take it for a socket of ``family``; IPv4 is mapped for an IPv6 socket."""
    if family == socket.AF_INET6 and address.ip.version == 4:
        return f"::ffff:{ip_text(address.ip)}", address.port
    return ip_text(address.ip), address.port

"""A TCP connection as a byte stream: read to the last byte under edge-triggered epoll, whatever the order of data, FIN and room."""

from __future__ import annotations

import errno
import os
import socket
from select import EPOLLERR

from mesh.model.address import SocketAddress
from mesh.reactor.loop import BYTE_BUDGET, CONNECTION, OUT, PEER_CLOSED, Reactor
from mesh.reactor.tcp import reset as reset_socket
from mesh.reactor.tcp import socket_address
from mesh.reactor.tls import scratch
from waypoint_py.streams.base import Stream


class TcpStream(Stream):
    """Takes over a connected, non-blocking socket. Nothing is read before a sink is attached, nor while it pauses: the kernel holds the
    peer back."""

    __slots__ = ("_broken", "_fd", "_flushing", "_hung_up", "_local_address", "_readable", "_reading", "_sock", "_told_of_room")

    def __init__(self, reactor: Reactor, sock: socket.socket) -> None:
        super().__init__(reactor)
        self._sock = sock
        self._fd = sock.fileno()
        self._local_address: SocketAddress | None = None
        self._readable = False
        self._reading = False  # a call to read on is due
        self._flushing = False  # a call to send is due
        self._hung_up = False  # epoll announced the end of what there is to read: read up to it
        self._told_of_room = False  # epoll was asked to, since the socket once did not take all
        self._broken: OSError | None = None  # nothing can be sent any more; what the peer said before may still be read
        reactor.add(self._fd, CONNECTION & ~OUT, self._on_event, self.abort)  # nearly every socket has room at first: no news

    @property
    def local_address(self) -> SocketAddress | None:
        if self._local_address is None and not self._over:
            try:
                self._local_address = socket_address(self._sock.getsockname())
            except OSError:
                return None
        return self._local_address

    # --- what the owner does

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._over or self._ending or self._broken is not None:
            return
        self._out += data
        self._note_unsent()
        self._flush_soon()

    def end(self) -> None:
        if not (self._over or self._ending):
            self._ending = True
            self._flush_soon()

    def abort(self, reason: str) -> None:
        if not self._over:
            self._reactor.remove(self._fd)
            reset_socket(self._sock)
        self._finish_by_abort(reason)

    def _passed_on(self, size: int) -> None:
        """Never asked: the kernel holds what nobody takes."""

    # --- reading

    def _on_event(self, mask: int) -> None:
        if mask & OUT and self._out:
            self._flush()
        if mask & ~OUT and not self._over:
            if mask & PEER_CLOSED:
                self._hung_up = True
                # An error while we read nothing, because of a pause or since all was read, would go unnoticed.
                if mask & EPOLLERR and (self._paused or self._sink is None or self._peer_ended):
                    self._check_error()
            self._readable = not self._peer_ended
            self._read()

    def _check_error(self) -> None:
        code = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self._fail(OSError(code, os.strerror(code)))

    def _tell(self) -> None:
        super()._tell()
        self._read()

    def _read_on(self) -> None:
        self._reading = False
        self._read()

    def _read(self) -> None:
        budget, buffer = BYTE_BUDGET, scratch().cipher_in
        while self._readable and not self._paused and not self._over:
            sink = self._sink
            if sink is None:
                return
            if budget <= 0:
                if not self._reading:
                    self._reading = True
                    self._reactor.call_soon(self._read_on, self.abort)
                return
            try:
                size = self._sock.recv_into(buffer)
            except BlockingIOError:
                self._readable = False
                return
            except OSError as exc:
                self._fail(exc)
                return
            if size == 0:
                self._on_eof()
                return
            budget -= size
            # After a short read the socket is empty and anything later is a new edge, unless the event that brought us here announced
            # the end as well: then there is no further one.
            self._readable = size == len(buffer) or self._hung_up
            sink.data(buffer[:size])

    def _on_eof(self) -> None:
        self._readable = False
        self._peer_ended = True
        if self._broken is not None:
            self._fail(self._broken)
        elif self._ending and not self._out and not self._flushing:
            self._close(None)
        self._tell_end()

    # --- sending

    def _flush_soon(self) -> None:
        if not self._flushing:
            self._flushing = True
            self._reactor.call_soon(self._flush_turn, self.abort)

    def _flush_turn(self) -> None:
        self._flushing = False
        self._flush()

    def _flush(self) -> None:
        if self._over or self._broken is not None:
            return
        if self._out:
            try:
                sent = self._sock.send(self._out)
            except BlockingIOError:
                sent = 0
            except OSError as exc:
                self._send_failed(exc)
                return
            if sent < len(self._out):
                del self._out[:sent]
                if not self._told_of_room:
                    self._told_of_room = True
                    self._reactor.modify(self._fd, CONNECTION)
            else:
                self._out = bytearray()  # a burst's size is not kept for life
            self._drained()
        if self._ending and not self._out:
            self._send_end()

    def _send_end(self) -> None:
        if self._peer_ended:  # closing says it as well
            self._close(None)
            return
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError as exc:
            if exc.errno != errno.ENOTCONN:
                self._send_failed(exc)

    def _send_failed(self, error: OSError) -> None:
        """The peer may have said why before it reset the connection: a server that refuses a body answers, and closes."""
        if self._peer_ended:
            self._fail(error)
            return
        self._broken = error
        self._readable = True
        self._hung_up = True
        self._read()

    # --- ends

    def _fail(self, error: OSError) -> None:
        error = self._broken or error
        if error.errno in (errno.ECONNRESET, errno.EPIPE):
            self._close("connection reset by peer")
        else:
            self._close(f"connection lost: {error.strerror}")

    def _close(self, reason: str | None) -> None:
        if self._over:
            return
        self._reactor.forget(self._fd)
        if reason is None:
            self._sock.close()
        else:
            reset_socket(self._sock)
        self._finish(reason)

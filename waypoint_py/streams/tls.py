"""TLS within another byte stream, either end of it.

Its buffers are not those of the link underneath: what that has decrypted for several tunnels is still being handed out while this decrypts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from OpenSSL import SSL

from mesh.model.address import SocketAddress
from mesh.reactor.loop import Reactor, Timer
from mesh.reactor.tls import READ_SIZE, TlsError, VerifyPeer, inner_scratch, tls_engine
from waypoint_py.stream import HIGH_WATER, ByteStream
from waypoint_py.streams.base import Stream

SEALED_AT_ONCE: Final = 64 * 1024
"""Plaintext encrypted at a time: OpenSSL keeps as much memory as it ever had to hold."""

LINGER: Final = 2.0
"""Seconds for the carrier to end after both directions of TLS have."""

HANDSHAKE_FAILED: Final = "tls handshake error: "
TRUNCATED: Final = "tls error: connection closed without close_notify"

OnEstablished = Callable[[str | None], None]
"""None: TLS stands and the peer is proved; else why not."""


class TlsStream(Stream):
    """A `Stream`, and the sink of the one that carries it."""

    __slots__ = ("_buffers", "_carrier", "_engine", "_established", "_flushing", "_linger", "_on_established")

    def __init__(
        self,
        reactor: Reactor,
        carrier: ByteStream,
        context: SSL.Context,
        on_established: OnEstablished,
        *,
        server_side: bool = False,
        server_name: str = "",
        verify_peer: VerifyPeer | None = None,
    ) -> None:
        """``on_established`` never comes from within this call. ``server_name``: SNI; ``verify_peer`` as of `mesh.reactor.tls`."""
        super().__init__(reactor)
        self._buffers = inner_scratch()
        self._engine = tls_engine(context, server_side=server_side, verify_peer=verify_peer, server_name=server_name, buffers=self._buffers)
        self._carrier = carrier
        self._on_established: OnEstablished | None = on_established
        self._established = False
        self._flushing = False
        self._linger: Timer | None = None
        carrier.attach(self)
        if not server_side:
            reactor.call_soon(self._begin, self.abort)

    @property
    def unsent(self) -> int:
        return len(self._out) + self._carrier.unsent

    @property
    def local_address(self) -> SocketAddress | None:
        return self._carrier.local_address

    @property
    def alpn(self) -> bytes:
        """What was agreed; empty if nothing was."""
        return self._engine.alpn

    # --- what the owner does

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._over or self._ending:
            return
        self._out += data
        self._note_unsent()
        self._flush_soon()

    def end(self) -> None:
        if not (self._over or self._ending):
            self._ending = True
            self._flush_soon()

    def abort(self, reason: str) -> None:
        self._carrier.abort(reason)
        self._finish_by_abort(reason)
        self._settle(reason)

    def pause(self) -> None:
        super().pause()
        if self._established:
            self._carrier.pause()

    def resume(self) -> None:
        super().resume()
        if not self._held:
            self._carrier.resume()

    def _passed_on(self, size: int) -> None:
        if not self._held and not self._paused:
            self._carrier.resume()

    # --- handshake

    def _begin(self) -> None:
        if not self._over:
            self._shake_hands()

    def _shake_hands(self) -> None:
        try:
            self._engine.handshake()
        except TlsError as exc:
            self._fail(f"{HANDSHAKE_FAILED}{exc.reason}")
            return
        self._send_records()
        if self._engine.established:
            self._established = True
            if self._paused:
                self._carrier.pause()
            if self._out or self._ending:
                self._flush_soon()
            self._settle(None)

    def _settle(self, failure: str | None) -> None:
        on_established, self._on_established = self._on_established, None
        if on_established is not None:
            self._reactor.call_soon(lambda: on_established(failure), self.abort)

    # --- what the carrier says

    def data(self, data: memoryview) -> None:
        while data and not self._over:
            piece, data = data[:READ_SIZE], data[READ_SIZE:]
            self._open(piece)

    def _open(self, cipher: memoryview) -> None:
        engine, size = self._engine, len(cipher)
        self._buffers.cipher_in[:size] = cipher
        try:
            if engine.established:
                plain = engine.open(size)
            else:
                engine.feed(size)
                self._shake_hands()
                if self._over or not engine.established:
                    return
                plain = engine.read()
        except TlsError as exc:
            self._fail(f"tls error: {exc.reason}")
            return
        self._send_records()  # OpenSSL may have had to answer: a key update
        closed = engine.peer_closed
        if plain and not self._deliver(self._buffers.plain_in[:plain]):
            self._carrier.pause()
        if closed and not self._over:
            self._on_close_notify()

    def ended(self) -> None:
        if not self._established:
            self._fail(f"{HANDSHAKE_FAILED}connection closed by peer")
        elif not self._engine.peer_closed:
            self._fail(TRUNCATED)

    def drained(self) -> None:
        if self._out:  # to be sealed yet, and the carrier may have less room than that: the flush that is due looks again
            self._above = True
        else:
            self._tell_of_room()

    def _tell_of_room(self) -> None:
        self._above = False
        if self._sink is not None and not self._over:
            self._sink.drained()

    def closed(self, reason: str | None) -> None:
        if self._linger is not None:
            self._linger.cancel()
        if reason is None and self._peer_ended:  # and whatever we had to say, nobody will hear
            self._finish(None)
            return
        reason = reason or "connection closed"
        self._settle(reason)
        self._finish(reason)

    # --- sending

    def _flush_soon(self) -> None:
        if self._established and not self._flushing:
            self._flushing = True
            self._reactor.call_soon(self._flush, self.abort)

    def _flush(self) -> None:
        self._flushing = False
        if self._over:
            return
        out, engine, buffers = self._out, self._engine, self._buffers
        large = len(out) > SEALED_AT_ONCE
        try:
            while out:
                size = min(len(out), SEALED_AT_ONCE)
                buffers.plain_out[:size] = memoryview(out)[:size]
                del out[:size]
                sealed = engine.seal(size)  # not within the slice: compiled, it would seal twice
                self._carrier.write(buffers.cipher_out[:sealed])
        except TlsError as exc:
            self._fail(f"tls error: {exc.reason}")
            return
        if large:
            engine.release_memory()
        if self._ending:
            engine.close_notify()
            self._send_records()
            self._carrier.end()
            if self._peer_ended:
                self._end_both()
        if self._above and self._carrier.unsent <= HIGH_WATER:  # so the carrier will not speak of it
            self._tell_of_room()

    def _send_records(self) -> None:
        size = self._engine.take()
        if size:
            self._carrier.write(self._buffers.cipher_out[:size])

    # --- ends

    def _on_close_notify(self) -> None:
        if self._peer_ended:
            return
        self._peer_ended = True
        self._tell_end()
        if self._ending and not self._flushing and not self._over:
            self._end_both()

    def _end_both(self) -> None:
        """Both have said all: the carrier need only carry the rest of it away."""
        if not self._over:
            self._leave_carrier("the peer does not end its connection")
            self._finish(None)

    def _fail(self, reason: str) -> None:
        """Broken by the peer, or refused by us: the alert goes first, so that the peer learns why."""
        if self._over:
            return
        try:
            self._send_records()
        except TlsError:
            pass  # too broken to say why
        self._leave_carrier(reason)
        self._settle(reason)
        self._finish(reason)

    def _leave_carrier(self, reason: str) -> None:
        carrier = self._carrier
        carrier.end()
        carrier.resume()  # or it would not notice the peer's end
        self._linger = self._reactor.call_later(LINGER, lambda: carrier.abort(reason))

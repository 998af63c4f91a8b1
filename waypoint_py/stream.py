"""A byte stream in both directions, whatever carries it: a CONNECT tunnel, a TCP connection, TLS within either.

HTTP and the TCP proxy are written against this and know no sockets. Everything happens on the reactor, in callbacks; nothing here is
called from another thread, and no callback comes from within a call that the receiver made, unless it says so.
"""

from __future__ import annotations

from typing import Protocol

from mesh.model.address import SocketAddress


class Sink(Protocol):
    """Who receives a stream's bytes. After `closed` nothing comes."""

    def data(self, data: memoryview) -> None:
        """Bytes, valid during the call. Whoever cannot take more for now calls `ByteStream.pause`."""

    def ended(self) -> None:
        """The peer sends no more (FIN, END_STREAM, TLS close_notify). Our direction goes on."""

    def drained(self) -> None:
        """There is room again: `ByteStream.unsent` has been above `HIGH_WATER`, and has fallen below `LOW_WATER`; of TLS, whose carrier
        speaks of itself alone, perhaps only to `HIGH_WATER`. Nobody asks twice: whoever waits for room goes on now."""

    def closed(self, reason: str | None) -> None:
        """The stream is gone in both directions; None: both had ended it properly. Comes once, also after `abort` (with its reason)."""


HIGH_WATER = 256 * 1024
"""Bytes that wait to be sent above which a writer should stop until `Sink.drained`: one window of a fast peer."""
LOW_WATER = 64 * 1024


class ByteStream(Protocol):
    """One stream. Writing never blocks and never fails: what goes wrong comes as `Sink.closed`."""

    @property
    def unsent(self) -> int:
        """Bytes written that the transport has not taken yet. Writers bound it by `HIGH_WATER`."""

    @property
    def unseen(self) -> int:
        """Of the bytes that were written last, so many that surely nobody has had a part of. Not those that TLS has sealed: its records
        are longer, and how many of them are gone is its carrier's to know."""

    @property
    def local_address(self) -> SocketAddress | None:
        """Of the socket underneath."""

    def attach(self, sink: Sink) -> None:
        """Bytes that came earlier are delivered soon; so is an end or a close that already happened. Attaching again replaces the sink
        (a connection that sniffed, then became HTTP)."""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send, after all that was written before. Copied if it cannot go at once. What one turn of the loop writes leaves together."""

    def end(self) -> None:
        """No more from us, after what was written. Idempotent."""

    def abort(self, reason: str) -> None:
        """Drop it in both directions at once, with a reset that the peer sees. Idempotent."""

    def pause(self) -> None:
        """Deliver no data until `resume`. A bounded amount may be held; beyond that the peer is held back."""

    def resume(self) -> None:
        """Deliver again. Idempotent."""

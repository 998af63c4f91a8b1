"""What every byte stream has in common: what it tells its sink, when, and in which order.

Order: bytes, then the end of the peer's direction, then the close. A close that is no orderly one overtakes bytes that a paused sink has
not taken, unless the peer had ended its direction: what it said is complete then, and is delivered first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Final

from mesh.model.address import SocketAddress
from mesh.reactor.loop import Reactor
from waypoint_py.stream import HIGH_WATER, LOW_WATER, Sink

PIECE: Final = 64 * 1024
"""Held bytes given to a sink at a time, so that one which can take no more may say so."""


class Stream(ABC):
    """A `ByteStream`. Subclasses move the bytes; `_tell` alone tells the sink of what did not come as it arrived."""

    __slots__ = (
        "_above",
        "_end_told",
        "_ending",
        "_held",
        "_out",
        "_over",
        "_paused",
        "_peer_ended",
        "_reactor",
        "_reason",
        "_sink",
        "_telling",
        "_told",
        "on_gone",
    )  # fmt: skip

    def __init__(self, reactor: Reactor) -> None:
        self._reactor = reactor
        self._sink: Sink | None = None
        self._paused = False
        self._held = bytearray()
        """Of the peer, not yet the sink's."""
        self._out = bytearray()
        """Of ours, not yet the transport's."""
        self._above = False  # `unsent` was above HIGH_WATER, and the sink waits to hear that it fell
        self._ending = False  # no more from us
        self._peer_ended = False
        self._end_told = False
        self._over = False
        self._reason: str | None = None
        self._told = False  # the sink knows that it is over
        self._telling = False
        self.on_gone: Callable[[], None] | None = None
        """Called once when the stream is over, whoever listens to it: for whoever counts connections."""

    @property
    def unsent(self) -> int:
        return len(self._out)

    @property
    def unseen(self) -> int:
        return len(self._out)

    @property
    @abstractmethod
    def local_address(self) -> SocketAddress | None: ...

    @property
    def over(self) -> bool:
        """Whether nothing passes any more, in either direction."""
        return self._over

    def attach(self, sink: Sink) -> None:
        self._sink = sink
        self._end_told = False
        self._tell_soon()

    def pause(self) -> None:
        self._paused = True

    def resume(self) -> None:
        if self._paused:
            self._paused = False
            self._tell_soon()

    @abstractmethod
    def write(self, data: bytes | bytearray | memoryview) -> None: ...

    @abstractmethod
    def end(self) -> None: ...

    @abstractmethod
    def abort(self, reason: str) -> None: ...

    # --- for subclasses

    @abstractmethod
    def _passed_on(self, size: int) -> None:
        """So many held bytes are the sink's now."""

    def _deliver(self, data: memoryview) -> bool:
        """Bytes that just came; False if they are held, because nobody takes them now."""
        sink = self._sink
        if sink is None or self._paused or self._held:
            self._held += data
            return False
        sink.data(data)
        return True

    def _drained(self) -> None:
        """Something has been sent: tell the sink if it waits for that. From a callback of the loop, while nothing looks at `_out`."""
        if self._above and self.unsent < LOW_WATER:
            self._above = False
            if self._sink is not None and not self._over:
                self._sink.drained()

    def _note_unsent(self) -> None:
        if self.unsent > HIGH_WATER:
            self._above = True

    def _finish(self, reason: str | None) -> None:
        """It is over; the sink is told soon."""
        if self._over:
            return
        self._over = True
        self._reason = reason
        if reason is not None and not self._peer_ended:
            self._held.clear()
        on_gone, self.on_gone = self.on_gone, None
        if on_gone is not None:
            on_gone()
        self._tell_soon()

    def _finish_by_abort(self, reason: str) -> None:
        """As `_finish`; nothing is delivered any more, also of what was said before."""
        if self._told:
            return
        self._held.clear()
        self._peer_ended = False
        if self._over and self._reason is None:
            self._reason = reason
        self._finish(reason)

    def _tell_soon(self) -> None:
        if not self._telling:
            self._telling = True
            self._reactor.call_soon(self._tell, self.abort)

    def _tell(self) -> None:
        """Tell the sink what it does not know yet."""
        self._telling = False
        while self._held:
            if self._sink is None or self._paused:
                return
            piece = bytes(memoryview(self._held)[:PIECE])
            del self._held[:PIECE]
            self._sink.data(memoryview(piece))
            self._passed_on(len(piece))
        self._tell_end()

    def _tell_end(self) -> None:
        """That the peer's direction, or all, has ended; after the last held byte."""
        if self._held or self._sink is None:
            return
        if self._peer_ended and not self._end_told:
            self._end_told = True
            self._sink.ended()
        sink = self._sink
        if self._over and not self._told:
            self._told = True
            sink.closed(self._reason)
            self._out.clear()

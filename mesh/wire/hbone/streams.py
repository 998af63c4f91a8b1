"""What may legally happen on one tunnel stream, as a table, and its two windows.

Rules about this file: everything that decides whether a frame is legal on a stream lives here. It does not know whether we are client
or server. A stream has two directions that do not depend on each other; RFC 9113's figure 2 is the product of two copies of the table,
and RST_STREAM, legal in all of them, ends a stream by removing it from its connection.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum, auto
from typing import Final


# IntEnum, for each is looked up several times for every tunnel: to hash a member of Enum is a call in Python.
class Direction(IntEnum):
    """How far one direction of a stream has come."""

    SILENT = auto()
    """Its header block (request or final response) has not been sent."""
    OPEN = auto()
    ENDED = auto()


class Signal(IntEnum):
    """What moves a direction on. A frame with END_STREAM is its signal, then END; trailers are END alone; a 1xx response is none."""

    HEADERS = auto()
    DATA = auto()
    END = auto()


TRANSITIONS: Final[Mapping[Direction, Mapping[Signal, Direction]]] = {
    Direction.SILENT: {Signal.HEADERS: Direction.OPEN},
    Direction.OPEN: {Signal.DATA: Direction.OPEN, Signal.END: Direction.ENDED},
    Direction.ENDED: {},
}


_SILENT: Final = Direction.SILENT  # members of an enum are slower to find, and these are wanted with every message
_ENDED: Final = Direction.ENDED


class Stream:
    """One tunnel's state at one end of a connection."""

    __slots__ = ("id", "owed", "owner", "receive_window", "receiving", "send_window", "sending")

    def __init__(self, stream_id: int, receive_window: int, send_window: int) -> None:
        self.id = stream_id
        self.receiving = _SILENT
        self.sending = _SILENT
        self.receive_window = receive_window
        """Bytes the peer may still send, as far as we told it."""
        self.owed = 0
        """Bytes that have moved on and whose credit we still hold back, to return it in larger portions."""
        self.send_window = send_window
        """Bytes we may still send; below zero when the peer lowered its initial window (RFC 9113 section 6.9.2)."""
        self.owner: object = None
        """For the connection's driver; not touched here."""

    def received(self, signal: Signal) -> bool:
        """Step the peer's direction. False: the table has no such step, and nothing changed."""
        following = TRANSITIONS[self.receiving].get(signal)
        if following is None:
            return False
        self.receiving = following
        return True

    def sent(self, signal: Signal) -> bool:
        """Step our direction. False: the table has no such step, and nothing changed."""
        following = TRANSITIONS[self.sending].get(signal)
        if following is None:
            return False
        self.sending = following
        return True

    def drop(self) -> None:
        """The stream was removed: who still holds it sees that nothing can follow."""
        self.receiving = self.sending = _ENDED

    @property
    def is_over(self) -> bool:
        return self.receiving is _ENDED and self.sending is _ENDED

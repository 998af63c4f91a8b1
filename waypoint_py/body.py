"""A request's body on its way: what waits to be sent, and what was sent and may have to be sent again. Pure."""

from __future__ import annotations

from typing import Final

from mesh.http.message import Headers

REPLAY_AT_MOST: Final = 1 << 20
"""Bytes of a body that are kept for another try (Envoy's bound). A larger body is sent all the same, but once."""
PIECE: Final = 64 * 1024
"""Bytes that are cut off a long piece at a time."""


class RequestBody:
    """Put in what comes with `push`; `take` gives it out for the present try, `rewind` begins anew for the next.

    What waits is bounded by whoever fills it: a client gets credit only for what `take` gave out for the first time.
    """

    __slots__ = ("_at", "_cut", "_furthest", "_granted", "_kept", "_pieces", "_position", "complete", "replayable", "trailers")

    def __init__(self, *, replayable: bool = False) -> None:
        self._pieces: list[bytes] = []
        self._kept = 0  # bytes in all pieces
        self._at = 0  # the piece that comes next
        self._cut = 0  # how much of it has been given out
        self._position = 0  # in the body, of the present try
        self._furthest = 0  # of any try
        self._granted = 0  # credit given ahead
        self.replayable = replayable
        """Whether the whole body is still at hand."""
        self.complete = False
        """Nothing more comes."""
        self.trailers: Headers = []

    @property
    def waiting(self) -> bool:
        """Whether there is something that the present try has not been given yet."""
        return self._at < len(self._pieces)

    @property
    def exhausted(self) -> bool:
        """The present try has been given all of it."""
        return self.complete and not self.waiting

    @property
    def empty(self) -> bool:
        """There is no body, and will be none."""
        return self.complete and not self._pieces and not self._position

    def push(self, data: bytes | memoryview) -> None:
        """More of it; copied unless ``bytes``."""
        if data:
            self._pieces.append(bytes(data))
            self._kept += len(data)
            if self.replayable and self._kept > REPLAY_AT_MOST:
                self.give_up_replay()

    def finish(self, trailers: Headers) -> None:
        self.complete = True
        self.trailers = trailers

    def pieces(self) -> tuple[bytes, ...]:
        """All that is at hand."""
        return tuple(self._pieces)

    def take(self, most: int) -> bytes | memoryview | None:
        """The next bytes of the present try, at most so many; None if there are none now."""
        if self._at >= len(self._pieces) or most <= 0:
            return None
        piece = self._pieces[self._at]
        size = len(piece)
        if size <= most and size <= PIECE and not self._cut:  # all of it, as most often
            self._position += size
            self._at += 1
            if not self.replayable:
                self._drop_sent()
            return piece
        end = min(len(piece), self._cut + most, self._cut + PIECE)
        taken = memoryview(piece)[self._cut : end]
        self._position += len(taken)
        if end == len(piece):
            self._at, self._cut = self._at + 1, 0
            if not self.replayable:
                self._drop_sent()
        else:
            self._cut = end
        return taken

    def credit(self) -> int:
        """Bytes that were given out for the first time since this was asked last: the client may send as many more."""
        fresh = self._position - self._furthest
        if fresh <= 0:
            return 0
        self._furthest += fresh
        if not self._granted:
            return fresh
        granted = min(fresh, self._granted)
        self._granted -= granted
        return fresh - granted

    def grant(self, size: int) -> None:
        """The client has got credit for so many bytes before they were given out."""
        self._granted += size

    def rewind(self) -> None:
        """From the beginning, for another try. Only while `replayable`."""
        assert self.replayable or not self._position
        self._at = self._cut = self._position = 0

    def give_up_replay(self) -> None:
        """Keep nothing that was sent: no other try will follow."""
        if self.replayable:
            self.replayable = False
            self._drop_sent()

    def clear(self) -> None:
        """Drop all of it: nobody wants it any more."""
        self._pieces.clear()
        self._kept = self._at = self._cut = 0

    def _drop_sent(self) -> None:
        for piece in self._pieces[: self._at]:
            self._kept -= len(piece)
        del self._pieces[: self._at]
        self._at = 0

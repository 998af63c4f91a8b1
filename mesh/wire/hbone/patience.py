"""How much a peer may make us do for nothing: resets, pings, settings, empty frames, counted in points that grow back with time.

The attacks have names (rapid reset CVE-2023-44487, MadeYouReset CVE-2025-8671, the floods of CVE-2019-9511 to 9518) and one shape: frames
that cost the sender next to nothing and us something, and that no window holds back. Payload and window updates are not counted: flow
control and the driver's byte budget bound those.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from mesh.wire.errors import ErrorCode, RemoteProtocolError

# nghttp2 allows 1000 resets at once and 33 a second. A node proxy's peer may see all its 200 streams cancelled at once when a pod
# is killed (5 points each), and pods with hundreds of short connections a second. Not Final: a test raises it, and compiled code has a
# Final's value built in.
CAPACITY = 2000.0
REFILL_PER_SECOND: Final = 200.0

IGNORED_FRAME: Final = 1
STALE_FRAME: Final = 1
REFUSED: Final = 1
BAD_REQUEST: Final = 5
PING: Final = 1
RESET: Final = 1
RESET_BEFORE_ANSWER: Final = 5
SETTINGS: Final = 10
STREAM_ERROR: Final = 10


class Patience:
    """A bucket of points, of which so many grow back each second."""

    __slots__ = ("_at", "_capacity", "_now", "_points", "_refill")

    def __init__(self, now: Callable[[], float], *, capacity: float | None = None, refill: float = REFILL_PER_SECOND) -> None:
        self._now = now
        self._points = self._capacity = CAPACITY if capacity is None else capacity
        self._refill = refill
        self._at = now()

    def spend(self, points: int, on: str) -> None:
        """Raises RemoteProtocolError (ENHANCE_YOUR_CALM) when the peer has used up our patience."""
        now = self._now()
        self._points = min(self._capacity, self._points + (now - self._at) * self._refill) - points
        self._at = now
        if self._points < 0:
            raise RemoteProtocolError(f"too much of {on}", ErrorCode.ENHANCE_YOUR_CALM)

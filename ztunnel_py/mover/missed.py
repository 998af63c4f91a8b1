"""Waypoints that nobody answers for, and how long a new connection waits for each: a process that ended is back in a second or two.

ztunnel fails such a connection. Nothing of the application's was sent yet, and it has heard nothing but that its connection is open.
"""

from __future__ import annotations

from typing import Final

from mesh.model.address import GatewayAddress

AWAITED_SECONDS = 10.0  # not Final: a test shortens it, and compiled code has a Final's value built in
"""From when a waypoint was first missed: as long as a dial is given that gets no answer. Whoever comes later fails at once: nobody knows
then whether it comes back."""
_MOST: Final = 1024


class MissedWaypoints:
    """Of one mover. Times are the reactor's."""

    def __init__(self) -> None:
        self._missed: dict[GatewayAddress, tuple[float, float]] = {}
        """When each was first and last missed, without having been reached in between."""

    def miss(self, waypoint: GatewayAddress, now: float) -> float:
        """Nobody answered for it; until when a connection waits that found it so."""
        first, last = self._missed.get(waypoint, (now, now))
        if now - last > AWAITED_SECONDS:  # nobody has looked for so long that it may have been back, and be gone again
            first = now
        if len(self._missed) >= _MOST:
            self._missed.clear()
        self._missed[waypoint] = first, now
        return first + AWAITED_SECONDS

    def reach(self, waypoint: GatewayAddress) -> None:
        """Somebody answered."""
        if self._missed:
            self._missed.pop(waypoint, None)

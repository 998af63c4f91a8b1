"""How processes that accept on one listener share what comes: who has more connections than the others lets them go first. Pure.

The kernel wakes one of those that wait, and while that one is at work the next; who runs first then takes all there is, and connections
that stay keep one process busy and leave another idle. So in a burst who is ahead waits a little for the others. A connection stays in the
queue meanwhile, where anybody may take it: who is stuck or dead costs it `PATIENCE` at most, and one that comes alone never waits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

BURST_OVER: Final = 0.01
"""Seconds after which what comes is no longer of the same burst."""
PATIENCE: Final = 0.008
"""Seconds that the others have to take something. A process that has a CPU needs a fraction; one that has to wait for its CPU, for somebody
else's turn of 4 ms at 250 Hz, comes in time."""
LONGEST: Final = 0.015
"""Seconds to wait in all while they do: batches that are small so that parts are equal cost more."""
AGAIN: Final = 0.1
"""Seconds from the end of patience to the next: whoever did not come is not waited for each time."""


class Share:
    """One process's part of one listener. ``lead()``: how many connections more than the others, on average, this process has.
    ``most_ahead``: as many may that be."""

    __slots__ = ("_behind", "_heard_at", "_lead", "_most_ahead", "_patient_until", "_took_at")

    def __init__(self, lead: Callable[[], float], most_ahead: int) -> None:
        self._lead = lead
        self._most_ahead = most_ahead
        self._took_at = float("-inf")
        self._patient_until = float("-inf")
        self._heard_at = 0.0
        self._behind = 0.0
        """How far the others were when something was heard of them."""

    def allowance(self, now: float, batch: int) -> int:
        """How many of ``batch`` to take; 0: let the others go first. ``now`` is in seconds."""
        if now - self._took_at > BURST_OVER:
            return 1
        lead = self._lead()
        allowed = int(self._most_ahead - lead)
        if allowed > 0:
            self._heard_at, self._behind = now, lead
            return min(batch, allowed)
        if now >= self._patient_until + AGAIN:
            self._patient_until = now + LONGEST
            self._heard_at, self._behind = now, lead
        elif lead < self._behind:
            self._heard_at, self._behind = now, lead
        if now < self._patient_until and now - self._heard_at < PATIENCE:
            return 0
        self._patient_until = min(now, self._patient_until)
        return batch

    def took(self, now: float) -> bool:
        """What was allowed was taken, or less; whether the next is another's: the kernel wakes the first in its queue that is idle."""
        self._took_at = now
        return self._lead() >= self._most_ahead


class Counts:
    """How many connections each of several processes has, of one kind, in memory that all of them map: ``column`` has a number for each."""

    __slots__ = ("_column", "_others", "_own")

    def __init__(self, column: memoryview, own: int) -> None:
        self._column = column
        self._own = own
        self._others = len(column) - 1
        column[own] = 0  # of a process that had the place before

    def set(self, count: int) -> None:
        """So many this process has now."""
        self._column[self._own] = count

    def change(self, by: int) -> None:
        """So many more than before."""
        self._column[self._own] += by

    def lead(self) -> float:
        """How many more than the others have on average."""
        own = int(self._column[self._own])
        return own - (sum(self._column) - own) / self._others if self._others else 0.0

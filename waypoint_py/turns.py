"""Work in steps, in the reactor's thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import trio

from waypoint_py.steps import Steps, T

TURN: Final = 0.002
"""Seconds of work between two turns of the reactor: about what ten requests take."""


async def finish_in_turns(steps: Steps[T], now: Callable[[], float]) -> T:
    """With everybody else's turn after every `TURN` seconds, and after one step at least."""
    while True:
        until = now() + TURN
        try:
            next(steps)
            while now() < until:
                next(steps)
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]  # a StopIteration's value is of any type
        await trio.lowlevel.checkpoint()

"""Many changes, one push: wait until changes stop coming for a moment, but never longer than a bound."""

from __future__ import annotations

import trio


class Debounce:
    """`notify` says that something changed; `wait` returns once nothing changed for ``quiet`` seconds, or ``longest`` after the first.

    One waiter. What is notified after `wait` has returned counts for the next `wait`.
    """

    def __init__(self, quiet: float, longest: float) -> None:
        self._quiet = quiet
        self._longest = longest
        self._notified = trio.Event()

    def notify(self) -> None:
        self._notified.set()

    async def wait(self) -> None:
        await self._notified.wait()
        deadline = trio.current_time() + self._longest
        while self._notified.is_set() and trio.current_time() < deadline:
            self._notified = trio.Event()
            with trio.move_on_after(min(self._quiet, deadline - trio.current_time())):
                await self._notified.wait()
        self._notified = trio.Event()

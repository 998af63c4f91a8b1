"""Callbacks that wait for something the brain will send, each until its own deadline."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from mesh.reactor.loop import Reactor, Timer

K = TypeVar("K", bound=Hashable)


class WaitingRoom(Generic[K]):
    """Who waits for what. A callback is called exactly once: by `settle`, or with its deadline's failure."""

    def __init__(self, reactor: Reactor) -> None:
        self._reactor = reactor
        self._waiting: dict[K, list[tuple[Callable[[], None], Timer]]] = {}

    def wait(self, key: K, seconds: float, on_settled: Callable[[], None], on_timeout: Callable[[], None]) -> bool:
        """Wait for ``key``. Returns True if nobody waited for it before: the caller may have to ask for it."""
        first = key not in self._waiting
        entry: tuple[Callable[[], None], Timer]

        def expire() -> None:
            self._waiting[key].remove(entry)
            if not self._waiting[key]:
                del self._waiting[key]
            on_timeout()

        entry = (on_settled, self._reactor.call_later(seconds, expire))
        self._waiting.setdefault(key, []).append(entry)
        return first

    def settle(self, key: K) -> None:
        """Call whoever waits for ``key``; they look for themselves what came. One that fails keeps none of the others waiting."""
        for on_settled, timer in self._waiting.pop(key, []):
            timer.cancel()
            try:
                on_settled()
            except Exception as exc:
                self._reactor.report(exc, f"who waited for {key}")

    def waited_for(self) -> tuple[K, ...]:
        """Every key that somebody waits for."""
        return tuple(self._waiting)

"""Results of pure functions, kept from one translation to the next for as long as what went in is the same."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Generic, TypeVar, TypeVarTuple

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")
Ts = TypeVarTuple("Ts")


class Memo(Generic[K, V]):
    """The results of one translation by key. What is not asked for again is not carried on."""

    __slots__ = ("_before", "_made")

    def __init__(self, before: Memo[K, V] | None = None) -> None:
        self._before: Mapping[K, tuple[tuple[object, ...], V]] = before._made if before is not None else {}
        self._made: dict[K, tuple[tuple[object, ...], V]] = {}

    def make(self, key: K, inputs: tuple[*Ts], function: Callable[[*Ts], V]) -> V:
        """``function(*inputs)``, or what it gave before for equal ``inputs``. They must be all that the result depends on besides the
        configuration. Inputs that are the same instances are equal at no cost."""
        known = self._before.get(key)
        if known is None or known[0] != inputs:
            known = inputs, function(*inputs)
        self._made[key] = known
        return known[1]

    def seal(self) -> None:
        """The translation is done: let go of the one before."""
        self._before = {}

    def __len__(self) -> int:
        return len(self._made)

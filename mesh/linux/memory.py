"""Memory that malloc keeps although nobody has it any more."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Final

_TRIM: Final[Callable[[int], int] | None] = getattr(ctypes.CDLL(None), "malloc_trim", None)
"""Of glibc; others give back by themselves or not at all."""


def return_free_memory() -> None:
    """Give it back to the kernel. Takes up to some ten milliseconds, in which other threads may run.

    For when something large has passed: its buffers lay below what stayed of it, and free places in the middle of the heap are given back
    only when asked for.
    """
    if _TRIM is not None:
        _TRIM(0)

"""Work that is done a step at a time, so that who does it can serve requests in between."""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeAlias, TypeVar

T = TypeVar("T")
Steps: TypeAlias = Generator[None, None, T]
"""Each step takes some microseconds; the result comes with the last one."""


def finish(steps: Steps[T]) -> T:
    """At one go."""
    while True:
        try:
            next(steps)
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]  # a StopIteration's value is of any type

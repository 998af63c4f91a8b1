"""What the movers of one agent know of each other: how many connections each of them has, in a file that all of them map.

Nothing depends on it being right: a mover that died leaves what it had until another takes its place, and one that cannot have the file
takes what it can.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mesh.reactor.sharing import Counts

_NUMBER: Final = 8
"""Bytes."""


@dataclass(frozen=True, slots=True)
class Shares:
    """By kind. ``connections``: living, of either direction. ``links``: HBONE connections of peers, each of which may bring many."""

    connections: Counts
    links: Counts


def join_shares(path: Path, places: int, own: int) -> Shares:
    """Take the place ``own`` of so many; what the process that had it before left there is gone. Raises OSError."""
    size = 2 * places * _NUMBER
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(fd, 0, size)  # on a full disk a file with holes would be a signal when it is written to
        numbers = memoryview(mmap.mmap(fd, size)).cast("q")
    finally:
        os.close(fd)
    # A place after the other, so that it is the same place for movers that were told of another number of them.
    return Shares(Counts(numbers[::2], own), Counts(numbers[1::2], own))

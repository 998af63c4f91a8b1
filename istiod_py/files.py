"""Secrets on disk: readable by their owner only, and refused when somebody else could read them."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from mesh.runtime.files import write_atomically as write_atomically

SECRET_MODE: Final = 0o600
PUBLIC_MODE: Final = 0o644
_MAX_SIZE: Final = 1024 * 1024


class UnsafeFile(Exception):
    """A secret that others may read, or that is not ours. The operator must act."""


def make_private_directory(path: Path) -> None:
    """Create the directory, for its owner only, if it is not there. An existing one is left as it is."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)


def read_secret(path: Path) -> bytes:
    """The content of a secret. Raises UnsafeFile if others have a right to it or another user owns it; OSError, also for a link."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(file.fileno())
        if found.st_mode & 0o077:
            raise UnsafeFile(f"{path}: mode {stat.S_IMODE(found.st_mode):04o} lets others at a secret (expected 0600)")
        if found.st_uid not in (os.geteuid(), 0):
            raise UnsafeFile(f"{path}: belongs to user {found.st_uid}, not to {os.geteuid()}")
        return file.read(_MAX_SIZE)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the directory for one process at a time: two control planes that start together must not make two roots."""
    descriptor = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, SECRET_MODE)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)

"""inotify: learn that something in some directories changed, through a file descriptor that can be waited for.

What changed is not told: readers look for themselves, so a lost or overflowed queue loses nothing. The watchfiles package was tried first;
its wait takes the interpreter lock in a thread every few milliseconds for as long as nothing happens.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Self

_IN_MODIFY = 0x2
_IN_ATTRIB = 0x4
_IN_CLOSE_WRITE = 0x8
_IN_MOVED_FROM = 0x40
_IN_MOVED_TO = 0x80
_IN_CREATE = 0x100
_IN_DELETE = 0x200
_IN_DELETE_SELF = 0x400
_IN_MOVE_SELF = 0x800
_IN_ONLYDIR = 0x1000000
# Not IN_OPEN or IN_ACCESS: the reader's own reading would wake it.
_MASK = (
    _IN_MODIFY
    | _IN_ATTRIB
    | _IN_CLOSE_WRITE
    | _IN_MOVED_FROM
    | _IN_MOVED_TO
    | _IN_CREATE
    | _IN_DELETE
    | _IN_DELETE_SELF
    | _IN_MOVE_SELF
    | _IN_ONLYDIR
)

_libc = ctypes.CDLL(None, use_errno=True)


class DirectoryWatch:
    """Watches the entries of directories, not those of their subdirectories. Raises OSError where inotify is used up (EMFILE)."""

    def __init__(self) -> None:
        self._fd = _check(_libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def fileno(self) -> int:
        """Readable when something happened since `drain`."""
        return self._fd

    def add(self, directory: Path) -> None:
        """Watch a directory; nothing happens when it is watched already. A directory that goes away is forgotten by the kernel.
        Raises OSError (ENOENT, ENOTDIR, EACCES, ENOSPC when watches are used up)."""
        _check(_libc.inotify_add_watch(self._fd, os.fsencode(directory), _MASK), directory)

    def drain(self) -> None:
        """Forget what happened so far."""
        try:
            while os.read(self._fd, 65536):
                pass
        except BlockingIOError:
            pass

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _check(result: int, path: Path | None = None) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path and str(path))
    return result

"""Pipes for splice(2), shared by all relays of a process: a relay borrows one while bytes are on their way."""

from __future__ import annotations

import fcntl
import os
from typing import Final, NamedTuple

PIPE_SIZE: Final = 1 << 20
KEPT: Final = 16
"""Empty pipes kept for the next borrower."""


class Pipe(NamedTuple):
    read_fd: int
    write_fd: int


_free: list[Pipe] = []


def borrow_pipe() -> Pipe:
    """An empty pipe. Raises OSError when the process has no descriptors left."""
    if _free:
        return _free.pop()
    pipe = Pipe(*os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK))
    try:
        fcntl.fcntl(pipe.write_fd, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
    except OSError:
        pass  # the user's share of pipe memory is used up: the default 64 KiB work as well, a little slower
    return pipe


def return_pipe(pipe: Pipe) -> None:
    """Give back a pipe, which must be empty."""
    if len(_free) < KEPT:
        _free.append(pipe)
    else:
        discard_pipe(pipe)


def discard_pipe(pipe: Pipe) -> None:
    """Close a pipe that may still hold bytes."""
    os.close(pipe.read_fd)
    os.close(pipe.write_fd)

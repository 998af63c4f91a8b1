"""Where a process on an event loop writes its log lines: a reader that stands still must not stop the loop.

A pipe's reader may fall behind (a container runtime under load) or stop (a pager). Making the descriptor non-blocking is no way out: it is
shared with other processes. So a pipe is asked first, and then given no more than it surely takes.
"""

from __future__ import annotations

import os
import select
import stat
from collections.abc import Callable
from typing import Final

KEPT_AT_MOST: Final = 1 << 20
"""Bytes that wait for the reader; further lines are lost, and how many is written when it reads again."""
_SURE: Final = select.PIPE_BUF
"""What a pipe takes without blocking once poll(2) calls it writable (pipe(7))."""


class LogOutput:
    """Takes whole lines. Looks like a text stream as far as `mesh.telemetry.log` needs one."""

    def __init__(self, fd: int = 1) -> None:
        self._fd = fd
        self._waiting = bytearray()
        self._lost = 0
        self._poll: select.poll | None = None
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            self._poll = select.poll()
            self._poll.register(fd, select.POLLOUT)
        self._asked = False
        self.when_blocked: Callable[[], object] = lambda: None
        """Called when lines are left waiting, once until it is done: have `try_again` called a little later."""

    def write(self, lines: str) -> int:
        """Never blocks and never raises; what can't be written (a full disk, a closed pipe) is lost."""
        if len(self._waiting) > KEPT_AT_MOST:
            self._lost += lines.count("\n")
        else:
            self._waiting += lines.encode("utf-8", "backslashreplace")
        return len(lines)

    def flush(self) -> None:
        """Write what the reader takes now."""
        try:
            while self._waiting and self._is_writable():
                del self._waiting[: os.write(self._fd, self._waiting if self._poll is None else self._waiting[:_SURE])]
                if not self._waiting and self._lost:
                    self._waiting += f"{self._lost} log lines are lost: nobody read them\n".encode()
                    self._lost = 0
        except OSError:
            self._waiting.clear()
        if self._waiting and not self._asked:
            self._asked = True
            self.when_blocked()

    def try_again(self) -> None:
        self._asked = False
        self.flush()

    def _is_writable(self) -> bool:
        return self._poll is None or bool(self._poll.poll(0))

"""What processes cost: CPU time, resident memory, descriptors."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

SETTLE = 0.1
"""Seconds after a measured piece of work: ends, credit and log lines are still on their way."""


def cpu_seconds(pids: Iterable[int]) -> float:
    """User and system time of the processes, threads that have ended included.

    From the kernel's CPU clock of each process (clock_getcpuclockid(3)): the counter behind ``/proc/PID/stat``, in nanoseconds where
    that file has ticks of 10 ms.
    """
    return sum(time.clock_gettime_ns(~pid << 3 | _SCHEDULED) for pid in pids) / 1e9


_SCHEDULED = 2
"""CPUCLOCK_SCHED in the kernel's posix-timers: what the scheduler accounts, user and system together."""


def measured(pids: Sequence[int], work: Callable[[], T]) -> tuple[float, T]:
    """CPU seconds that the processes spent on ``work``, and its result."""
    before = cpu_seconds(pids)
    result = work()
    time.sleep(SETTLE)
    return cpu_seconds(pids) - before, result


def proportional_kib(pids: Iterable[int]) -> int:
    """Resident KiB, a page that several processes map divided among them."""
    return sum(_rollup(pid, "Pss:") for pid in pids)


def resident_kib(pid: int) -> int:
    """Resident KiB of one process, what it shares included."""
    return _rollup(pid, "Rss:")


def _rollup(pid: int, field: str) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise OSError(f"/proc/{pid}/smaps_rollup has no {field}")


def descriptors(pids: Iterable[int]) -> int:
    """Open file descriptors."""
    return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids)

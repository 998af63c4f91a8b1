"""What a second mover gives where CPUs allow: each mover may use the same part of one, and rates are those of one and of two a node."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Final

from benches.cpu import cpu_seconds
from benches.figures import bulk
from benches.limits import NoController, limited
from benches.rows import OURS, OURS_TWO, Record, Row
from benches.stage import Say, Subject, subjects
from benches.turns import Quantity, Seen, Task, take_turns

FIGURE: Final = "movers"
ROUNDS: Final = 5
LIMIT: Final = 0.15
"""Of a CPU, for each mover: four of them and the load leave one of two CPUs idle. CPUs that are busy at once take longer for the same: with
a quarter each, a short connection cost two movers up to a quarter more CPU than one."""
CONNECTIONS: Final = 16
BYTES: Final = 256_000_000
"""Of one piece of work, all connections together: one or two seconds, beside which it does not count how it begins."""
PARALLEL: Final = 64
SHORT: Final = 2400
_TICKS: Final = os.sysconf("SC_CLK_TCK")


def measure(say: Say) -> list[Row]:
    """No rows where movers cannot be limited. Raises Broken."""
    record = Record(FIGURE)
    with subjects(say, (OURS, OURS_TWO)) as taking_part, ExitStack() as stack:
        try:
            for subject in taking_part:
                stack.enter_context(limited(_movers(subject), LIMIT))
        except NoController as exc:
            say(f"NOT MEASURED: {exc}")
            return []
        take_turns(record, taking_part, tasks(), ROUNDS, say)
    return record.rows()


def tasks() -> list[Task]:
    """Bytes on long connections, and short connections."""
    each = BYTES // CONNECTIONS
    return [
        _task("up", "GB/s", BYTES / 1e9, lambda subject: subject.do("bulk", connections=CONNECTIONS, up=each, down=0)),
        _task("down", "GB/s", BYTES / 1e9, lambda subject: subject.do("bulk", connections=CONNECTIONS, up=0, down=each)),
        _task(None, "connections/s", SHORT, lambda subject: subject.do("connect", count=SHORT, parallel=PARALLEL)),
    ]


def _task(way: str | None, unit: str, amount: float, work: Callable[[Subject], Seen]) -> Task:
    case = f"{way}, {bulk.count(CONNECTIONS)}" if way is not None else f"{PARALLEL} at a time"
    quantities: dict[str, Quantity] = {
        unit: lambda _, seen: amount / seen["seconds"],
        "cpu % of the limit, busiest mover": lambda _, seen: seen["busiest"],
        "CPUs idle": lambda _, seen: seen["idle"],
    }
    return Task(case, partial(_watched, work), quantities)


def _watched(work: Callable[[Subject], Seen], subject: Subject) -> Seen:
    """What the load saw, and whether the limit is what kept it waiting: how much of theirs movers used, and what nobody did."""
    movers = _movers(subject)
    before, idle, began = [cpu_seconds([pid]) for pid in movers], _idle_seconds(), time.monotonic()
    seen = work(subject)
    took = time.monotonic() - began
    used = [cpu_seconds([pid]) - was for pid, was in zip(movers, before, strict=True)]
    return {**seen, "busiest": max(used) / took / LIMIT * 100, "idle": (_idle_seconds() - idle) / took}


def _movers(subject: Subject) -> Sequence[int]:
    """Of the subject's processes."""
    return [pid for pid in subject.pids if b"mover" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")]


def _idle_seconds() -> float:
    """All CPUs together, since the machine began (proc_stat(5))."""
    return int(Path("/proc/stat").read_text().split(maxsplit=5)[4]) / _TICKS

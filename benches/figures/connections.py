"""CPU and rate of short connections in tunnels that are there: connect, 1 KB there, 1 KB back, close; one at a time and 64 at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from benches.rows import Record, Row
from benches.stage import DATA_PATH, Say, Subject, subjects
from benches.turns import Seen, Task, take_turns

FIGURE: Final = "connections"
ROUNDS: Final = 13
COUNTS: Final[Mapping[int, int]] = {1: 400, 64: 1200}
"""Connections of one piece of work, by how many are under way at once: some half a second."""


def measure(say: Say) -> list[Row]:
    """Raises Broken."""
    record = Record(FIGURE)
    with subjects(say, DATA_PATH) as taking_part:
        take_turns(record, taking_part, tasks(), ROUNDS, say)
    return record.rows()


def tasks() -> list[Task]:
    """One for each number of connections at once."""
    return [_task(parallel, number) for parallel, number in COUNTS.items()]


def _task(parallel: int, number: int) -> Task:
    def work(subject: Subject) -> Seen:
        return subject.do("connect", count=number, parallel=parallel)

    quantities = {"cpu us/connection": lambda cpu, _: cpu / number * 1e6, "connections/s": lambda _, seen: number / seen["seconds"]}
    return Task(f"{parallel} at a time", work, quantities)

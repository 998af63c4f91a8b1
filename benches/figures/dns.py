"""Look-ups of a service's name by a captured pod, answered by its own node's proxy: how many a CPU second and a second."""

from __future__ import annotations

from typing import Final

from benches.rows import ENVOY, OURS, Record, Row
from benches.stage import Say, Subject, subjects
from benches.turns import Seen, Task, take_turns

FIGURE: Final = "dns"
ROUNDS: Final = 7
COUNT: Final = 1000


def measure(say: Say) -> list[Row]:
    """Raises Broken."""
    record = Record(FIGURE)
    with subjects(say, (OURS, ENVOY)) as taking_part:
        for subject in taking_part:
            subject.look_up(count=COUNT, parallel=1)
        take_turns(record, taking_part, [_task(parallel) for parallel in (1, 16)], ROUNDS, say)
    return record.rows()


def _task(parallel: int) -> Task:
    def work(subject: Subject) -> Seen:
        return subject.look_up(count=COUNT, parallel=parallel)

    quantities = {
        "queries/cpu s": lambda cpu, _: COUNT / cpu,
        "cpu us/query": lambda cpu, _: cpu / COUNT * 1e6,
        "queries/s": lambda _, seen: COUNT / seen["seconds"],
    }
    return Task(f"{parallel} at a time", work, quantities)

"""CPU and latency of round trips of 1 KB on living connections: 500 a second on one, and as many as go on 64 at once."""

from __future__ import annotations

from typing import Final

from benches.rows import Record, Row
from benches.stage import DATA_PATH, Say, Subject, subjects
from benches.turns import Quantity, Seen, Task, take_turns

FIGURE: Final = "round-trip"
ROUNDS: Final = 5
RATE: Final = 500
SECONDS: Final = 1.5


def measure(say: Say) -> list[Row]:
    """Raises Broken."""
    record = Record(FIGURE)
    with subjects(say, DATA_PATH) as taking_part:
        take_turns(record, taking_part, tasks(), ROUNDS, say)
    return record.rows()


def tasks() -> list[Task]:
    """The low rate and the highest."""
    return [_task(f"{RATE}/s on 1 connection", 1, RATE), _task("64 connections, saturated", 64, 0)]


def _task(case: str, connections: int, rate: int) -> Task:
    def work(subject: Subject) -> Seen:
        return subject.do("trips", connections=connections, seconds=SECONDS, rate=rate)

    quantities: dict[str, Quantity] = {"cpu us/trip": lambda cpu, seen: cpu / seen["trips"] * 1e6}
    for name, shown in (("p50", "us p50"), ("p99", "us p99"), ("p999", "us p99.9")):
        quantities[shown] = lambda _, seen, name=name: seen[name] * 1e6  # type: ignore[misc]
    if not rate:
        quantities["trips/s"] = lambda _, seen: seen["trips"] / seen["seconds"]
    return Task(case, work, quantities)

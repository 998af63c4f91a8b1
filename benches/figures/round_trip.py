"""CPU and latency of round trips of 1 KB on living connections: 500 a second on one, and as many as go on 64 at once; and how late they are
beside a neighbour that sends as fast as it can and has another connection that it does not read."""

from __future__ import annotations

import time
from typing import Final

from benches.rows import Record, Row
from benches.stage import DATA_PATH, Say, Subject, subjects
from benches.turns import Quantity, Seen, Task, take_turns

FIGURE: Final = "round-trip"
ROUNDS: Final = 11
RATE: Final = 500
SECONDS: Final = 1.0
ALONE: Final = f"{RATE}/s on 1 connection"
CROWDED: Final = f"{ALONE}, crowded"
_UNTIL_CROWDED: Final = 0.3
"""Seconds in which the neighbour's windows fill."""


def measure(say: Say) -> list[Row]:
    """Raises Broken."""
    record = Record(FIGURE)
    with subjects(say, DATA_PATH) as taking_part:
        take_turns(record, taking_part, [*tasks(), _crowded()], ROUNDS, say)
    return record.rows()


def tasks() -> list[Task]:
    """The low rate and the highest."""
    return [_task(ALONE, 1, RATE), _task("64 connections, saturated", 64, 0)]


def _crowded() -> Task:
    def work(subject: Subject) -> Seen:
        with subject.crowded(SECONDS + 2 * _UNTIL_CROWDED):
            time.sleep(_UNTIL_CROWDED)
            return subject.do("trips", connections=1, seconds=SECONDS, rate=RATE)

    return Task(CROWDED, work, {"us p99": lambda _, seen: seen["p99"] * 1e6})


def _task(case: str, connections: int, rate: int) -> Task:
    def work(subject: Subject) -> Seen:
        return subject.do("trips", connections=connections, seconds=SECONDS, rate=rate)

    quantities: dict[str, Quantity] = {"cpu us/trip": lambda cpu, seen: cpu / seen["trips"] * 1e6}
    for name, shown in (("p50", "us p50"), ("p99", "us p99"), ("p999", "us p99.9")):
        quantities[shown] = lambda _, seen, name=name: seen[name] * 1e6  # type: ignore[misc]  # of the loop's variable
    if not rate:
        quantities["trips/s"] = lambda _, seen: seen["trips"] / seen["seconds"]
    return Task(case, work, quantities)

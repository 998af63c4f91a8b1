"""CPU of a gigabyte and gigabytes a second: to the server, to the client and both ways at once, over 1 and 16 connections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from benches.rows import Record, Row
from benches.stage import DATA_PATH, Say, Subject, subjects
from benches.turns import Seen, Task, take_turns

FIGURE: Final = "bulk"
ROUNDS: Final = 5
BYTES: Final = 384_000_000
"""Of one piece of work, all connections and directions together: about a second on an ordinary machine."""


def measure(say: Say) -> list[Row]:
    """Raises Broken."""
    record = Record(FIGURE)
    with subjects(say, DATA_PATH) as taking_part:
        take_turns(record, taking_part, tasks((1, 16), ("up", "down", "both")), ROUNDS, say)
    return record.rows()


def tasks(connections: Sequence[int], ways: Sequence[str]) -> list[Task]:
    """One for each number of connections and each way."""
    return [_task(way, number) for number in connections for way in ways]


def _task(way: str, connections: int) -> Task:
    each = BYTES // connections // (2 if way == "both" else 1)
    up, down = (each if way != "down" else 0), (each if way != "up" else 0)
    gigabytes = connections * (up + down) / 1e9

    def work(subject: Subject) -> Seen:
        return subject.do("bulk", connections=connections, up=up, down=down)

    quantities = {"cpu s/GB": lambda cpu, _: cpu / gigabytes, "GB/s": lambda _, seen: gigabytes / seen["seconds"]}
    return Task(f"{way}, {count(connections)}", work, quantities)


def count(connections: int) -> str:
    """``1 connection``, ``16 connections``."""
    return f"{connections} connection{'s' if connections != 1 else ''}"

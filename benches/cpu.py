"""CPU time of processes, and figures made of it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

SETTLE = 0.1
"""Seconds after a measured piece of work: ends, credit and log lines are still on their way."""


def cpu_seconds(pids: Iterable[int]) -> float:
    """User and system time of all threads alive. From schedstat, which counts nanoseconds; ``stat`` shows the same in ticks of 10 ms."""
    total = 0
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").iterdir():
            try:
                total += int((task / "schedstat").read_text().split()[0])
            except (FileNotFoundError, ProcessLookupError):
                continue
    return total / 1e9


def measured(pids: Sequence[int], work: Callable[[], T]) -> tuple[float, T]:
    """CPU seconds that the processes spent on ``work``, and its result."""
    before = cpu_seconds(pids)
    result = work()
    time.sleep(SETTLE)
    return cpu_seconds(pids) - before, result


class Turns:
    """CPU seconds of two subjects that took turns at some tasks: ours, and whom we compare with."""

    def __init__(self, tasks: Sequence[str]) -> None:
        self.seconds: dict[str, dict[str, list[float]]] = {task: {} for task in tasks}

    def add(self, task: str, subject: str, seconds: float) -> None:
        self.seconds[task].setdefault(subject, []).append(seconds)

    def ratio(self, task: str) -> float:
        """The median over the turns, each compared with its neighbour: what disturbed the one most likely disturbed the other."""
        first, second = self.seconds[task].values()
        return statistics.median(ours / theirs for ours, theirs in zip(first, second, strict=True))

    def table(self) -> str:
        """A line a task: the median and spread of either subject, and their ratio."""
        names = list(next(iter(self.seconds.values())))
        lines = [f"{'CPU seconds, median (least-most)':34}{names[0]:>24}{names[1]:>24}{f'{names[0]}/{names[1]}':>14}"]
        for task, of in self.seconds.items():
            lines.append(f"{task:34}{_spread(of[names[0]]):>24}{_spread(of[names[1]]):>24}{self.ratio(task):>14.2f}")
        return "\n".join(lines)

    def as_json(self) -> dict[str, object]:
        return {task: {"cpu_seconds": of, "ratio": round(self.ratio(task), 3)} for task, of in self.seconds.items()}


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f}-{max(values):.3f})"

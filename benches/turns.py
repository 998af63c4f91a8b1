"""Subjects take turns at tasks, round after round, so that a noisy machine is as noisy to one as to the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

from benches.cpu import measured
from benches.rows import Record
from benches.stage import Say, Subject

Seen: TypeAlias = dict[str, float]
"""What the load saw: seconds, percentiles."""
Quantity: TypeAlias = Callable[[float, Seen], float]
"""CPU seconds of the proxies, and what the load saw, to a figure."""


@dataclass(frozen=True, slots=True)
class Task:
    """A piece of work, and what is made of it, by unit. ``after`` follows it unmeasured."""

    case: str
    work: Callable[[Subject], Seen]
    quantities: Mapping[str, Quantity]
    after: Callable[[Subject], object] = field(default=lambda _: None)


def take_turns(record: Record, subjects: Sequence[Subject], tasks: Sequence[Task], rounds: int, say: Say) -> None:
    """Each round all subjects do all tasks, every other round in the opposite order. Quantities of CPU need proxies."""
    for task in tasks:
        for unit in task.quantities:
            record.expect(task.case, unit)
    for number in range(rounds):
        say(f"round {number + 1} of {rounds}")
        for task in tasks:
            for subject in subjects if number % 2 == 0 else reversed(subjects):
                cpu, seen = measured(subject.pids, partial(task.work, subject))
                task.after(subject)
                for unit, quantity in task.quantities.items():
                    if subject.pids or "cpu" not in unit:
                        record.add(task.case, unit, subject.name, quantity(cpu, seen))

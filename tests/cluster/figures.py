"""What tests measure, printed when all have run: times, memory, and what each event cost beside Istio's figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.cluster.workloads import Load


@dataclass
class Figures:
    """Rows in the order in which they were measured."""

    events: list[tuple[str, ...]] = field(default_factory=list)
    others: list[tuple[str, str]] = field(default_factory=list)

    def event(self, name: str, load: Load, istio_lost: str = "not measured", istio_refused: str = "not measured") -> None:
        """Note what a load saw of an event."""
        held = load.began["held"]
        first = min((lost["lived"] for lost in load.lost), default=0.0)
        lost = f"{len(load.lost)} of {held}" + (f" (lived {first:.1f} s or more)" if load.lost else "")
        refused = f"{len(load.refused)} of {load.answered + len(load.refused)}" + (
            f", for {load.refused_for():.2f} s" if load.refused else ""
        )
        self.events.append((name, lost, refused, istio_lost, istio_refused))

    def note(self, what: str, value: str) -> None:
        self.others.append((what, value))

    def parts(self) -> tuple[list[tuple[str, ...]], list[tuple[str, str]]]:
        """In built-in types, for another process's `add`."""
        return self.events, self.others

    def add(self, events: Sequence[Any], others: Sequence[Any]) -> None:
        """Also what another process measured."""
        self.events += map(tuple, events)
        self.others += map(tuple, others)

    def lines(self) -> list[str]:
        lines = [f"{what}: {value}" for what, value in self.others]
        if self.events:
            rows = [("event", "held lost", "new refused", "Istio: held lost", "Istio: new refused"), *self.events]
            widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
            lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return lines

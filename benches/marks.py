"""What the figures are to reach, and whether they do. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from benches.rows import OURS, OURS_TWO, Row

Find: TypeAlias = Callable[[Sequence[Row]], list[float]]
"""The values a mark is about, one for each case; none if they were not measured."""


@dataclass(frozen=True, slots=True)
class Mark:
    """``text`` says of what; ``unit`` is ``x`` for a ratio to the Envoy pair of the same run."""

    figure: str
    text: str
    limit: float
    unit: str
    find: Find
    at_most: bool = True

    def is_reached(self, values: Iterable[float]) -> bool:
        """In all cases."""
        return all(value <= self.limit if self.at_most else value >= self.limit for value in values)


def ratios(figure: str, unit: str, *, cases: Sequence[str] | None = None) -> Find:
    """Of our pair with one mover each to Envoy's."""

    def find(rows: Sequence[Row]) -> list[float]:
        chosen = [row for row in _of(rows, figure, unit, OURS) if cases is None or row.case.startswith(tuple(cases))]
        return [row.ratio_to_envoy for row in chosen if row.ratio_to_envoy is not None]

    return find


def medians(figure: str, unit: str, case: str | None = None) -> Find:
    """Ours, of one case or of all that have the unit."""
    return lambda rows: [row.median for row in _of(rows, figure, unit, OURS) if case in (None, row.case)]


def growth(figure: str, unit: str, case: str) -> Find:
    """How many times the first of the cases that begin so the largest of them is."""

    def find(rows: Sequence[Row]) -> list[float]:
        found = [row.median for row in _of(rows, figure, unit, OURS) if row.case.startswith(case)]
        return [max(found) / found[0]] if len(found) > 1 and found[0] else []

    return find


def raised(figure: str, unit: str, case: str, beside: str) -> Find:
    """How much more a case has that is called the same and then ``beside``."""

    def find(rows: Sequence[Row]) -> list[float]:
        found = {row.case: row.median for row in _of(rows, figure, unit, OURS)}
        return [found[case + beside] - found[case]] if {case, case + beside} <= found.keys() else []

    return find


def second_mover(figure: str, unit: str) -> Find:
    """How many times the rate of one mover two reach, in each case."""

    def find(rows: Sequence[Row]) -> list[float]:
        one = {row.case: row.median for row in _of(rows, figure, unit, OURS)}
        two = {row.case: row.median for row in _of(rows, figure, unit, OURS_TWO)}
        return [two[case] / one[case] for case in one if case in two and one[case]]

    return find


def _of(rows: Sequence[Row], figure: str, unit: str, subject: str) -> list[Row]:
    return [row for row in rows if (row.figure, row.unit, row.subject) == (figure, unit, subject)]


MARKS: Final = (
    Mark("bulk", "CPU of a gigabyte", 1.0, "x", ratios("bulk", "cpu s/GB")),
    Mark("connections", "CPU of a short connection", 1.1, "x", ratios("connections", "cpu us/connection")),
    Mark("connections", "rate of short connections", 1.0, "x", ratios("connections", "connections/s"), at_most=False),
    Mark("movers", "2 movers beside one, GB/s on 16 connections", 1.7, "times", second_mover("movers", "GB/s"), at_most=False),
    Mark("movers", "2 movers beside one, short connections a second", 1.7, "times", second_mover("movers", "connections/s"), at_most=False),
    Mark("round-trip", "CPU of a round trip", 1.2, "x", ratios("round-trip", "cpu us/trip")),
    Mark("round-trip", "median latency", 1.0, "x", ratios("round-trip", "us p50")),
    Mark(
        "round-trip",
        "p99 of a crowd's neighbour, more than alone",
        20_000.0,
        "us",
        raised("round-trip", "us p99", "500/s on 1 connection", ", crowded"),
    ),
    Mark("passthrough", "CPU of a gigabyte", 1.0, "x", ratios("passthrough", "cpu s/GB")),
    Mark("handshakes", "handshakes a CPU second", 0.8, "x", ratios("handshakes", "handshakes/cpu s"), at_most=False),
    Mark("idle", "memory of an idle connection and proxy", 5.0, "KiB", medians("idle", "KiB/connection", "on average")),
    Mark("state", "brain with 100 000 workloads", 400.0, "MB", medians("state", "MB", "loaded, brain")),
    Mark("state", "mover with 100 000 workloads", 250.0, "MB", medians("state", "MB", "loaded, mover")),
    Mark("state", "loading them, brain and mover", 10.0, "s of CPU", medians("state", "cpu s", "load, together")),
    Mark(
        "state", "one changed endpoint, brain and mover", 1000.0, "us of CPU", medians("state", "cpu us", "one changed endpoint, together")
    ),
    Mark("state", "resolution from 100 to 100 000 workloads", 1.5, "times", growth("state", "cpu us", "resolve one connection")),
    Mark("pods", "250 pods more than none", 150.0, "MB", medians("pods", "MB", "250 pods more than none")),
    Mark("waypoint", "CPU of a request, waypoint alone", 2.5, "x", ratios("waypoint", "cpu us/request")),
    Mark("waypoint", "median latency that it adds", 2000.0, "us", medians("waypoint", "us p50 added")),
    Mark("waypoint", "CPU of a request, many rules beside few", 1.1, "times", medians("waypoint", "cpu, times that of few rules")),
)

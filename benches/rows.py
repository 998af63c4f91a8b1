"""What a bench finds: samples of subjects that took turns, and the rows of ``bench.json`` made of them. Pure."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Final

NO_PROXY: Final = "no proxy"
OURS: Final = "ours"
OURS_TWO: Final = "ours, 2 movers"
ENVOY: Final = "envoy"
ZTUNNEL: Final = "ztunnel"
SUBJECTS: Final = (NO_PROXY, OURS, OURS_TWO, ENVOY, ZTUNNEL)
"""As rows name them, and in the order in which they stand."""


class InvalidRows(Exception):
    """A file that is no ``bench.json``; the text says where."""


@dataclass(frozen=True, slots=True)
class Row:
    """One quantity of one subject. ``low`` and ``high`` are the least and the most that was seen, in ``unit``.

    The ratio is that of the samples of the same turn, its median and spread; None where there is no Envoy to compare with. A unit that
    says ``cpu`` counts user and system time of the proxies' processes.
    """

    figure: str
    case: str
    subject: str
    unit: str
    median: float
    low: float
    high: float
    ratio_to_envoy: float | None
    ratio_low: float | None
    ratio_high: float | None


class Record:
    """The samples of one figure, in the order in which they came."""

    def __init__(self, figure: str) -> None:
        self.figure = figure
        self._samples: dict[tuple[str, str], dict[str, list[float]]] = {}

    def expect(self, case: str, unit: str) -> None:
        """Samples will come; rows stand in the order in which they were expected, or came."""
        self._samples.setdefault((case, unit), {})

    def add(self, case: str, unit: str, subject: str, value: float) -> None:
        """One sample. Of every round each subject gives one, or none at all."""
        self.expect(case, unit)
        self._samples[case, unit].setdefault(subject, []).append(value)

    def rows(self) -> list[Row]:
        """A row for each quantity and subject."""
        return [
            self._row(case, unit, subject, of) for (case, unit), of in self._samples.items() for subject in sorted(of, key=SUBJECTS.index)
        ]

    def _row(self, case: str, unit: str, subject: str, of: dict[str, list[float]]) -> Row:
        values, ratios = of[subject], ratios_of_turns(of[subject], of.get(ENVOY, ()))
        spread = (statistics.median(ratios), min(ratios), max(ratios)) if ratios else (None, None, None)
        return Row(self.figure, case, subject, unit, statistics.median(values), min(values), max(values), *spread)


def ratios_of_turns(values: Sequence[float], envoy: Sequence[float]) -> list[float]:
    """Each sample over Envoy's of the same turn: what disturbed the one most likely disturbed the other. Empty if they took no turns."""
    if len(values) != len(envoy) or not all(envoy):
        return []
    return [ours / theirs for ours, theirs in zip(values, envoy, strict=True)]


def dump(rows: Iterable[Row]) -> str:
    """As JSON, a row a line."""
    return "[\n" + ",\n".join(json.dumps(asdict(row)) for row in rows) + "\n]\n"


def load(text: str) -> list[Row]:
    """The rows of a ``bench.json``. Raises InvalidRows."""
    try:
        found = json.loads(text)
    except ValueError as exc:
        raise InvalidRows(f"not JSON: {exc}") from exc
    if not isinstance(found, list):
        raise InvalidRows("not a list of rows")
    names = {field.name for field in fields(Row)}
    for number, item in enumerate(found):
        if not isinstance(item, dict) or item.keys() != names:
            raise InvalidRows(f"row {number + 1} has not the fields {', '.join(sorted(names))}")
    return [Row(**item) for item in found]

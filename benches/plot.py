"""Two kinds of chart as SVG: ratios to Envoy on a logarithmic axis, and curves. Pure; text stays text, so that a diff can be read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Final
from xml.sax.saxutils import escape

from benches.rows import ENVOY, NO_PROXY, OURS, OURS_TWO, SUBJECTS, ZTUNNEL, Row
from benches.table import number

COLOURS: Final = {NO_PROXY: "#9aa0a6", OURS: "#1a66cc", OURS_TWO: "#7cb0f0", ENVOY: "#5f6368", ZTUNNEL: "#c2570c"}
_WIDTH: Final = 820
_TEXT: Final = "#202124"
_FAINT: Final = "#dadce0"
_LINE: Final = 15
_TOP: Final = 64
_LEFT: Final = 300
"""Where a chart of ratios begins; right of the longest label, if that needs more."""
_LETTER: Final = 6.6
"""Width of a letter on average, of a wide font: which one draws the page is not known here."""
_RIGHT: Final = 790
_TICK_DISTANCE: Final = 36

Series = Mapping[str, Sequence[tuple[float, float]]]
"""Points by subject."""


def ratio_chart(title: str, rows: Sequence[Row]) -> str:
    """A line for each case and unit, a dot with its spread for each subject that was compared with Envoy. Needs one row at least."""
    lines: dict[tuple[str, str], list[tuple[str, _Spread]]] = {}
    for row in rows:
        if row.subject not in (ENVOY, NO_PROXY) and (spread := _spread(row)) is not None:
            lines.setdefault((row.case, row.unit), []).append((row.subject, spread))
    subjects = sorted({subject for of_line in lines.values() for subject, _ in of_line}, key=SUBJECTS.index)
    edges = [value for of_line in lines.values() for _, (_, *ends) in of_line for value in ends]
    low, high = min([0.5, *edges]), max([2.0, *edges])
    step = _LINE * len(subjects) + 6
    height = _TOP + step * len(lines) + 40
    # Labels end where the chart begins, so the page grows to the left.
    longest = max(len(f"{case}: {unit}") for case, unit in lines)
    chart = _Chart(title, height, left=min(0, _LEFT - 10 - 12 - math.ceil(_LETTER * longest)))
    chart.legend(subjects)

    def at(ratio: float) -> float:
        return _LEFT + (_RIGHT - _LEFT) * (math.log(ratio) - math.log(low)) / (math.log(high) - math.log(low))

    for tick in _ratio_ticks(at, low, high):
        chart.line(at(tick), _TOP, at(tick), height - 34, _TEXT if tick == 1 else _FAINT)
        chart.text(at(tick), height - 20, f"{tick:g}x", anchor="middle")
    chart.text((_LEFT + _RIGHT) / 2, height - 5, "of Envoy's, in the same turn: median and spread", anchor="middle")
    for place, ((case, unit), of_line) in enumerate(lines.items()):
        top = _TOP + step * place
        chart.text(_LEFT - 10, top + step / 2 + 1, f"{case}: {unit}", anchor="end")
        for subject, (median, least, most) in of_line:
            y = top + 9 + _LINE * subjects.index(subject)
            chart.line(at(least), y, at(most), y, COLOURS[subject], width=2)
            chart.dot(at(median), y, COLOURS[subject])
    return chart.svg()


def curve_chart(title: str, x_name: str, y_name: str, series: Series, *, log_x: bool = False) -> str:
    """A line for each subject, from zero up. Needs one point at least."""
    height, bottom, left = 330, 280, 70
    xs = [x for points in series.values() for x, _ in points]
    top_y = max(y for points in series.values() for _, y in points) * 1.08 or 1.0
    place = (lambda x: math.log10(max(x, 1))) if log_x else float
    low_x, high_x = place(min(xs)), place(max(xs))
    chart = _Chart(title, height)
    chart.legend(list(series))

    def at(x: float, y: float) -> tuple[float, float]:
        return left + (_RIGHT - left) * ((place(x) - low_x) / ((high_x - low_x) or 1)), bottom - (bottom - _TOP) * y / top_y

    for tick in _even_ticks(top_y):
        _, y = at(xs[0], tick)
        chart.line(left, y, _RIGHT, y, _FAINT)
        chart.text(left - 6, y + 4, number(tick), anchor="end")
    for x in dict.fromkeys(xs):
        chart.text(at(x, 0)[0], bottom + 18, f"{x:,.0f}".replace(",", " "), anchor="middle")
    chart.line(left, bottom, _RIGHT, bottom, _TEXT)
    chart.text((left + _RIGHT) / 2, bottom + 38, x_name, anchor="middle")
    chart.text(left, _TOP - 10, y_name)
    for subject, points in series.items():
        places = [at(*point) for point in points]
        chart.path(places, COLOURS[subject])
        for x, y in places:
            chart.dot(x, y, COLOURS[subject])
    return chart.svg()


class _Chart:
    """The parts of one drawing, which begins at ``left``."""

    def __init__(self, title: str, height: float, left: int = 0) -> None:
        width = _WIDTH - left
        self._left = left
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{left} 0 {width} {height:g}" width="{width}" height="{height:g}" '
            f'font-family="system-ui, sans-serif" font-size="12" fill="{_TEXT}">',
            f"<title>{escape(title)}</title>",
            f'<rect x="{left}" width="{width}" height="{height:g}" fill="#ffffff"/>',
            f'<text x="{left + 12}" y="22" font-size="15" font-weight="600">{escape(title)}</text>',
        ]

    def legend(self, subjects: Sequence[str]) -> None:
        x = self._left + 12.0
        for subject in subjects:
            self.dot(x + 5, 38, COLOURS[subject])
            self.text(x + 14, 42, subject)
            x += 34 + 7 * len(subject)

    def text(self, x: float, y: float, text: str, anchor: str = "start") -> None:
        self._parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>')

    def line(self, x1: float, y1: float, x2: float, y2: float, colour: str, width: float = 1) -> None:
        self._parts.append(f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="{width:g}"/>')

    def path(self, points: Sequence[tuple[float, float]], colour: str) -> None:
        text = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self._parts.append(f'<polyline points="{text}" fill="none" stroke="{colour}" stroke-width="2"/>')

    def dot(self, x: float, y: float, colour: str) -> None:
        self._parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>')

    def svg(self) -> str:
        return "\n".join([*self._parts, "</svg>"]) + "\n"


_Spread = tuple[float, float, float]


def _spread(row: Row) -> _Spread | None:
    """The ratio's median, least and most; None where there is none, or none that a logarithm has a place for."""
    if not row.ratio_to_envoy or not row.ratio_low or not row.ratio_high:
        return None
    return row.ratio_to_envoy, row.ratio_low, row.ratio_high


def _ratio_ticks(at: Callable[[float], float], low: float, high: float) -> list[float]:
    """The most telling first; those after have to keep a distance on the page from those before."""
    kept: list[float] = []
    for tick in (1, 2, 0.5, 5, 0.2, 10, 0.1, 20, 0.05, 50, 1.5, 3, 0.8, 1.25):
        if low <= tick <= high and all(abs(at(tick) - at(other)) >= _TICK_DISTANCE for other in kept):
            kept.append(tick)
    return kept


def _even_ticks(top: float) -> list[float]:
    """Four to eight round numbers from zero."""
    power = 10 ** math.floor(math.log10(top))
    step = next(power * factor for factor in (0.1, 0.2, 0.5, 1, 2, 5) if top / (power * factor) <= 8)
    return [step * count for count in range(int(top / step) + 1)]

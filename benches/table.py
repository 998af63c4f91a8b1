"""Rows as a text table: a line a quantity, a column a subject, each with its spread and its ratio to Envoy."""

from __future__ import annotations

from collections.abc import Iterable

from benches.rows import ENVOY, SUBJECTS, Row


def text_table(rows: Iterable[Row]) -> str:
    """For a terminal. Subjects that no row has get no column."""
    table = cells(rows)
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    lines = ["  ".join([line[0].ljust(widths[0]), line[1].ljust(widths[1]), *_right(line[2:], widths[2:])]).rstrip() for line in table]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def markdown_table(rows: Iterable[Row]) -> str:
    """For a document."""
    header, *lines = cells(rows)
    rule = ["---", "---", *["--:"] * (len(header) - 2)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *lines))


def cells(rows: Iterable[Row]) -> list[list[str]]:
    """The header, then the lines."""
    rows = list(rows)
    subjects = sorted({row.subject for row in rows}, key=SUBJECTS.index)
    lines: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        lines.setdefault((row.case, row.unit), {})[row.subject] = row
    body = [[case, unit, *(_cell(of.get(subject)) for subject in subjects)] for (case, unit), of in lines.items()]
    return [["case", "unit", *subjects], *body]


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    text = number(row.median)
    if row.low != row.high:
        text += f" ({number(row.low)}-{number(row.high)})"
    if row.ratio_to_envoy is not None and row.subject != ENVOY:
        text += f" {row.ratio_to_envoy:.2f}x"
    return text


def number(value: float) -> str:
    """Three significant digits, no exponent."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.2g}"


def _right(texts: list[str], widths: list[int]) -> list[str]:
    return [text.rjust(width) for text, width in zip(texts, widths, strict=True)]

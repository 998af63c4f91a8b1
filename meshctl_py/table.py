"""How `meshctl` writes: aligned tables, colours only on terminals, JSON and YAML, times and sizes as people read them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from io import StringIO
from typing import Final

import click
import msgspec
from rich.console import Console
from rich.text import Text
from ruamel.yaml import YAML

OUT: Final = Console(highlight=False, soft_wrap=True)
ERR: Final = Console(stderr=True, highlight=False, soft_wrap=True)


class Table:
    """Columns as wide as they need to be. Rich would fold or cut them to the terminal, and addresses are there to be copied."""

    def __init__(self, *headings: str) -> None:
        self.rows: list[tuple[Text, ...]] = []
        self._headings = tuple(Text(heading, style="bold") for heading in headings)

    def add_row(self, *cells: str | Text) -> None:
        self.rows.append(tuple(Text(cell) if isinstance(cell, str) else cell for cell in cells))

    def print(self, *, headings: bool = True, least: Sequence[int] = ()) -> list[int]:
        """``least``: widths that columns have at least, as tables before this one had them. Returns the widths."""
        rows = [self._headings, *self.rows]
        widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
        widths = [max(pair) for pair in zip(widths, least, strict=True)] if least else widths
        for row in rows if headings else self.rows:
            line = Text("  ").join(cell + " " * (width - len(cell)) for cell, width in zip(row, widths, strict=True))
            line.rstrip()
            OUT.print(line)
        return widths


def colour_state(text: str, good: bool) -> Text:
    """What needs attention is yellow."""
    return Text(text, style="" if good else "yellow")


def show_data(value: object, output: str) -> None:
    """As ``json`` or ``yaml``; Structs and dataclasses become plain data."""
    click.echo(as_yaml(value) if output == "yaml" else msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def as_yaml(*values: object) -> str:
    """One document each, in the order of their fields, without a last newline."""
    yaml = YAML()
    yaml.width = 4096
    yaml.indent(sequence=4, offset=2)
    text = StringIO()
    yaml.dump_all([msgspec.to_builtins(value, builtin_types=()) for value in values], text)
    return text.getvalue().rstrip("\n")


def as_time(seconds: float | None) -> str:
    """RFC 3339, UTC."""
    return "" if seconds is None else f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%SZ}"


def as_duration(seconds: float) -> str:
    """Two units at most, as kubectl tells ages: ``45s``, ``3m12s``, ``5h8m``, ``2d4h``."""
    whole = max(0, int(seconds))
    for size, unit, below, lower in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            rest = whole % size // below
            return f"{whole // size}{unit}{rest}{lower}" if rest else f"{whole // size}{unit}"
    return f"{whole}s"


def as_size(size: int) -> str:
    """``512``, ``1.5Ki``, ``20Mi``."""
    amount, units = float(size), ["Ti", "Gi", "Mi", "Ki", ""]
    while amount >= 1024 and len(units) > 1:
        amount /= 1024
        units.pop()
    return f"{amount:.1f}".removesuffix(".0") + units[-1]

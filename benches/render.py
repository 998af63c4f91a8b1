"""What documents show of a run, made from ``bench.json`` and ``bench-machine.json`` alone: tables between markers, and plots.

A block begins with ``<!-- bench: NAME -->`` and ends with ``<!-- /bench -->``; what is between is replaced.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from benches import machine
from benches.figures import movers
from benches.marks import MARKS
from benches.plot import Series, curve_chart, ratio_chart
from benches.rows import ENVOY, OURS, ZTUNNEL, InvalidRows, Row, load
from benches.table import markdown_table, number

ROWS: Final = Path("bench.json")
DOCUMENTS: Final = (Path("README.md"), Path("docs/reference/performance.md"))
PLOTS: Final = Path("docs/reference")
DATA_PATH: Final = ("bulk", "connections", "round-trip", "passthrough", "handshakes", "dns", "waypoint")
_BLOCK: Final = re.compile(r"(<!-- bench: ([a-z-]+) -->\n).*?(<!-- /bench -->)", re.DOTALL)
_NO_MOVERS: Final = "Not measured in this run; it needs the CPU controller of cgroups, which not every machine gives."
_NUMBER: Final = re.compile(r"\d+")
_HEADLINES: Final = (
    ("bulk", "cpu s/GB", "CPU of a gigabyte"),
    ("connections", "cpu us/connection", "CPU of a short connection"),
    ("connections", "connections/s", "short connections a second"),
    ("round-trip", "cpu us/trip", "CPU of a round trip"),
    ("round-trip", "us p50", "latency of a round trip, median"),
    ("handshakes", "handshakes/cpu s", "new tunnels a CPU second"),
    ("passthrough", "cpu s/GB", "CPU of a gigabyte, plain"),
    ("dns", "queries/cpu s", "look-ups of names a CPU second"),
    ("idle", "KiB/connection", "memory of an idle connection"),
    ("waypoint", "cpu us/request", "CPU of a request, in a waypoint"),
    ("waypoint", "us p50 added", "latency that a waypoint adds, median"),
)


def render() -> None:
    """Write documents and plots. Raises InvalidRows, OSError."""
    rows = load(ROWS.read_text())
    blocks = make_blocks(rows, machine.Machine.load_from(machine.PATH.read_text()))
    texts = {path: replace_blocks(path.read_text(), blocks) for path in DOCUMENTS}
    for path, text in {**texts, **{PLOTS / name: svg for name, svg in make_plots(rows).items()}}.items():
        path.write_text(text)
        print(path)


def make_blocks(rows: Sequence[Row], ran_on: machine.Machine) -> Mapping[str, str]:
    """The text of every block, by name: ``machine``, ``marks``, ``headlines``, and a table for each figure."""
    blocks = {"machine": _machine(ran_on), "marks": _marks(rows), "headlines": _headlines(rows)}
    for figure in dict.fromkeys(row.figure for row in rows):
        blocks[figure] = markdown_table(row for row in rows if row.figure == figure)
    blocks.setdefault(movers.FIGURE, _NO_MOVERS)
    return blocks


def replace_blocks(text: str, blocks: Mapping[str, str]) -> str:
    """The text with its blocks anew. Raises InvalidRows for a block that nothing was measured for."""

    def replaced(match: re.Match[str]) -> str:
        name = match[2]
        if name not in blocks:
            raise InvalidRows(f"a document wants {name}, and there are no rows of it: run the whole bench")
        return f"{match[1]}{blocks[name]}\n{match[3]}"

    return _BLOCK.sub(replaced, text)


def make_plots(rows: Sequence[Row]) -> Mapping[str, str]:
    """SVG by file name; only of what was measured."""
    plots: dict[str, str] = {}
    for figure in DATA_PATH:
        if of_figure := [row for row in rows if row.figure == figure and row.ratio_to_envoy is not None and row.subject != ENVOY]:
            plots[f"performance-{figure}.svg"] = ratio_chart(f"{figure}: beside Envoy", of_figure)
    curves = (
        ("idle", "KiB/proxy", " connections", "idle connections", "MiB resident per proxy", 1 / 1024, False),
        ("pods", "MB", " pods", "captured pods", "MB resident, the whole agent", 1.0, False),
        ("state", "cpu us", " workloads", "workloads", "us to resolve and authorize a connection", 1.0, True),
    )
    for figure, unit, ending, x_name, y_name, scale, log_x in curves:
        series = _series([row for row in rows if row.figure == figure and row.unit == unit], ending, scale)
        if series:
            plots[f"performance-{figure}.svg"] = curve_chart(f"{figure}: {y_name}", x_name, y_name, series, log_x=log_x)
    return plots


def _series(rows: Sequence[Row], ending: str, scale: float) -> Series:
    """Points of the cases that end so; the last number of their name is how many there were, and those of none begin with ``no``."""
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        none = row.case == f"no{ending.rstrip('s')}"
        if none or row.case.endswith(ending):
            count = 0.0 if none else float(_NUMBER.findall(row.case)[-1])
            series.setdefault(row.subject, []).append((count, row.median * scale))
    return series


def _machine(ran_on: machine.Machine) -> str:
    facts = [
        ("when, commit", f"{ran_on.when}, `{ran_on.commit}`"),
        ("machine", f"{ran_on.cpus} CPUs ({ran_on.cpu}), {ran_on.memory_gib} GiB"),
        ("load before", f"{ran_on.load:.1f} runnable processes, of others as well"),
        ("kernel", f"Linux {ran_on.kernel}"),
        ("Python", f"{ran_on.python}, {ran_on.python_build}"),
        ("data path", ran_on.data_path),
        ("TLS", ran_on.tls),
        ("Envoy", ran_on.envoy),
        *([("ztunnel", ran_on.ztunnel)] if ran_on.ztunnel else []),
    ]
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in facts)])


def _marks(rows: Sequence[Row]) -> str:
    lines = ["| figure | of what | to reach | seen | reached |", "| --- | --- | --: | --: | --- |"]
    for mark in MARKS:
        values = mark.find(rows)
        if values:
            wanted = f"{'at most' if mark.at_most else 'at least'} {number(mark.limit)} {mark.unit}"
            seen = number(min(values)) if len(values) == 1 else f"{number(min(values))} to {number(max(values))}"
            lines.append(f"| {mark.figure} | {mark.text} | {wanted} | {seen} | {'yes' if mark.is_reached(values) else 'no'} |")
    return "\n".join(lines)


def _headlines(rows: Sequence[Row]) -> str:
    """Ratios to Envoy, least and most over the cases."""
    subjects = [subject for subject in (OURS, ZTUNNEL) if any(row.subject == subject for row in rows)]
    lines = [f"| beside Envoy (1.00) | {' | '.join(subjects)} |", f"| --- | {' | '.join('--:' for _ in subjects)} |"]
    for figure, unit, text in _HEADLINES:
        chosen = [row for row in rows if (row.figure, row.unit) == (figure, unit) and row.ratio_to_envoy is not None]
        if chosen:
            lines.append(f"| {text} | {' | '.join(_range(chosen, subject) for subject in subjects)} |")
    return "\n".join(lines)


def _range(rows: Sequence[Row], subject: str) -> str:
    found = sorted(row.ratio_to_envoy for row in rows if row.subject == subject and row.ratio_to_envoy is not None)
    if not found:
        return ""
    return f"{found[0]:.2f}" if len(found) == 1 else f"{found[0]:.2f} to {found[-1]:.2f}"

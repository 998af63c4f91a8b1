"""``python -m benches [FIGURE...]``: measure all figures or those named; ``python -m benches render``: write what documents show of them.

Tables go to standard output, rows to ``bench.json`` as figures are done, and what they were measured on to ``bench-machine.json``.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

from benches import http2, machine, relay, render, routes, wire
from benches.figures import bulk, connections, dns, handshakes, idle, movers, passthrough, pods, round_trip, state, waypoint
from benches.rows import InvalidRows, Row, dump
from benches.stage import Broken, Say
from benches.table import text_table

Measure = Callable[[Say], list[Row]]

FIGURES: Final[Mapping[str, Measure]] = {
    module.FIGURE: module.measure
    for module in (bulk, connections, movers, round_trip, passthrough, handshakes, idle, state, pods, dns, waypoint)
}
PARTS: Final[Mapping[str, Measure]] = {part.FIGURE: part.measure for part in (relay, wire, http2, routes)}
"""Of the data path and of configuration; run by name only."""


def main() -> None:
    """Exits with 1 when a figure could not be measured; the others are."""
    names = [*FIGURES, *PARTS, "render"]
    parser = argparse.ArgumentParser(prog="python -m benches", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="FIGURE", choices=[*names, []], help=f"one of: {', '.join(names)}")
    chosen = parser.parse_args().names
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was set up is taken down, as after Ctrl-C
    try:
        if chosen == ["render"]:
            render.render()
        else:
            _measure({name: measure for name, measure in {**FIGURES, **PARTS}.items() if name in (chosen or FIGURES)})
    except (Broken, InvalidRows, OSError) as exc:
        sys.exit(f"bench: {exc}")
    except KeyboardInterrupt:
        sys.exit(130)


def _measure(figures: Mapping[str, Measure]) -> None:
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:5.0f} s] {text}", flush=True)

    def say_of(figure: str, text: str) -> None:
        say(f"{figure}: {text}")

    found = machine.describe()
    machine.PATH.write_text(found.dump())
    print(found.text(), flush=True)
    rows: list[Row] = []
    broken: list[str] = []
    for number, (name, measure) in enumerate(figures.items()):
        say(f"{name} ({number + 1} of {len(figures)})")
        try:
            of_figure = measure(partial(say_of, name))
        except (Broken, OSError) as exc:
            broken.append(f"{name}: {exc}")
            say(f"BROKEN {broken[-1]}")
            continue
        if not of_figure:
            continue  # it has said why
        rows += of_figure
        render.ROWS.write_text(dump(rows))
        print(f"\n{name}\n{text_table(of_figure)}\n", flush=True)
    say(f"done; rows: {render.ROWS}")
    if broken:
        raise Broken("not measured: " + "; ".join(broken))


if __name__ == "__main__":
    main()

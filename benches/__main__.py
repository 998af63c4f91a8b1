"""``python -m benches [NAME...]``: run benches, all by default; tables on standard output, all figures in ``bench.json``."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from benches import agents, relay, wire

RESULTS: Final = Path("bench.json")
Say = Callable[[str], None]


def _agents(say: Say) -> object:
    turns = agents.run(say)
    print(f"\n{turns.table()}\n")
    return turns.as_json()


def _relay(say: Say) -> object:
    turns = relay.run(say)
    print(f"\n{turns.table()}\n")
    return turns.as_json()


BENCHES: Final[Mapping[str, tuple[Callable[[Say], object], str]]] = {
    "agents": (_agents, "two whole agents beside two Envoys, on two nodes of a lab"),
    "relay": (_relay, "the bare data path beside two Envoys, over loopback"),
    "wire": (wire.run, "single operations of the HBONE cores"),
}


def main() -> None:
    """Run what was named; exits with 1 when a bench could not be set up."""
    names = "\n".join(f"  {name:8} {about}" for name, (_, about) in BENCHES.items())
    parser = argparse.ArgumentParser(
        prog="python -m benches", description=f"{__doc__}\n\n{names}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", choices=[*BENCHES, []], help="which; by default all")
    options = parser.parse_args()
    if not _is_optimized():
        print(
            "this Python was built without --enable-optimizations: ours costs about a quarter more than with a distribution's", flush=True
        )
    results: dict[str, object] = {}
    for name in options.names or BENCHES:
        bench, about = BENCHES[name]
        print(f"==> {name}: {about}", flush=True)
        began = time.monotonic()
        try:
            results[name] = bench(lambda text: print(f"  {text}", flush=True))
        except (agents.Broken, RuntimeError, OSError) as exc:
            sys.exit(f"{name}: {exc}")
        print(f"  took {time.monotonic() - began:.0f} s", flush=True)
    RESULTS.write_text(json.dumps({"machine": _machine(), "benches": results}, indent=1) + "\n")
    print(f"figures: {RESULTS}")


def _machine() -> dict[str, object]:
    """What figures are worth nothing without."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "cpus": os.cpu_count(),
        "load": os.getloadavg(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "python_optimized": _is_optimized(),
    }


def _is_optimized() -> bool:
    """Whether the interpreter was built with profile-guided optimization, as distributions do."""
    return "--enable-optimizations" in (sysconfig.get_config_var("CONFIG_ARGS") or "")


if __name__ == "__main__":
    main()

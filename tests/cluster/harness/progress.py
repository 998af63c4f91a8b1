"""Long commands with their progress on the terminal, their output in a log, and no process or mount left when they are interrupted."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Final, TypeVar

from tests.cluster.harness.home import ClusterError

_T = TypeVar("_T")

_EVERY_ON_TERMINAL: Final = 0.2
_EVERY_IN_LOG: Final = 20.0
"""Seconds between signs of life: CI systems end what is silent for minutes."""
_TAIL: Final = 20
CONTAINED: Final = (
    *("setpriv", "--pdeathsig", "KILL"),
    *("unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "--mount-proc"),
)
"""A PID and mount namespace of its own that ends with us: what the command starts and mounts goes with it, however it ends."""


def tell(text: str) -> None:
    """One line for whoever waits."""
    print(f"==> {text}", flush=True)


def begin(function: Callable[[], _T]) -> Callable[[], _T]:
    """Begin something in a thread that goes with the main one; what is returned waits for the result, or raises what the thread raised."""
    future: Future[_T] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as exc:  # whoever waits raises it
            future.set_exception(exc)

    threading.Thread(target=run, daemon=True).start()
    return future.result


def run_long(
    what: str,
    command: Sequence[str],
    *,
    log: Path,
    describe: Callable[[int, str], str],
    environment: Mapping[str, str] | None = None,
    directory: Path | None = None,
) -> None:
    """Run a command of minutes. ``describe`` makes a short text of the count of output lines and the last one. Raises ClusterError."""
    tell(what)
    began = told = time.monotonic()
    terminal = sys.stdout.isatty()
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        log.open("w") as file,
        subprocess.Popen(
            [*CONTAINED, "nice", "-n", "19", *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=None if environment is None else {**os.environ, **environment},
            cwd=directory,
            text=True,
            errors="replace",
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for count, line in enumerate(process.stdout, 1):
                file.write(line)
                if time.monotonic() - told > (_EVERY_ON_TERMINAL if terminal else _EVERY_IN_LOG):
                    told = time.monotonic()
                    text = f"    {told - began:4.0f} s  {describe(count, line.strip())}"
                    print(f"\r\033[K{text[:110]}" if terminal else text, end="" if terminal else "\n", flush=True)
        finally:
            process.kill()  # nothing to do if it ended; --kill-child ends the rest if it did not
            if terminal:
                print("\r\033[K", end="", flush=True)
    if process.returncode != 0:
        last = "".join(f"\n    {line}" for line in log.read_text(errors="replace").splitlines()[-_TAIL:])
        raise ClusterError(f"{what}: failed with status {process.returncode}; the end of {log}:{last}")
    tell(f"{what}: done in {time.monotonic() - began:.0f} s")

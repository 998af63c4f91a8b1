"""Programs of the examples that use the cluster while something is done to it, and notice everything."""

from __future__ import annotations

import subprocess
import time
from typing import Final, TypeVar

import msgspec

from meshctl_py.lab.client import Popen
from meshctl_py.lab.demo.report import Unmet

T = TypeVar("T")

HELD: Final = 50
HOLD: Final = ("python3", "apps/hold.py", "server.shop", "7000", str(HELD))
VISIT: Final = ("python3", "apps/visit.py", "http://web.shop/visit")
_ALIVE: Final = 3
"""Messages that must come back on a connection, and requests of each visitor that must be answered, after it was asked about."""
_WITHIN: Final = 10.0
"""Seconds for that; it takes a fraction of one."""
_CLOSED_WITHIN: Final = 20.0


class Load:
    """One that runs: says that it has begun, then answers a line of input by a line of JSON. It ends with its input."""

    def __init__(self, process: Popen, begun: str) -> None:
        self._process = process
        assert process.stdout is not None
        if not (line := process.stdout.readline()).startswith(begun):
            raise Unmet(f"the load does not begin: {line!r}")

    def ask(self, kind: type[T]) -> T:
        """Where it stands."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return msgspec.json.decode(self._process.stdout.readline(), type=kind)

    def close(self) -> None:
        """End it."""
        close(self._process)


def close(process: Popen) -> None:
    """End a helper process by ending its input."""
    try:
        process.communicate(timeout=_CLOSED_WITHIN)
    except (subprocess.TimeoutExpired, OSError):
        process.kill()
        process.wait()


class _HeldReport(msgspec.Struct, frozen=True):
    """What ``apps/hold.py`` prints."""

    held: int
    broken: list[str]
    echoed: list[int]
    longest_ms: int


class Held(Load):
    """Connections that a pod holds to the echo server, a message on each ten times a second: `HOLD`."""

    def __init__(self, process: Popen) -> None:
        super().__init__(process, "holding")

    def check(self) -> str:
        """Evidence that all live: from now on a few more messages came back on each. Raises Unmet."""
        before = self.ask(_HeldReport)
        deadline = time.monotonic() + _WITHIN
        while True:
            seen = self.ask(_HeldReport)
            if seen.broken:
                raise Unmet(f"{len(seen.broken)} of {seen.held} broke: {seen.broken[0]}")
            silent = sum(new < old + _ALIVE for new, old in zip(seen.echoed, before.echoed, strict=True))
            if not silent:
                return f"0 of {seen.held} broke, {sum(seen.echoed)} messages echoed in order, longest wait {seen.longest_ms} ms"
            if time.monotonic() > deadline:
                raise Unmet(f"{silent} of {seen.held} fell silent")
            time.sleep(0.1)


class _VisitReport(msgspec.Struct, frozen=True):
    """What ``apps/visit.py`` prints."""

    fresh: int
    kept: int
    failed: list[str]


class Visitors(Load):
    """Requests without end, on connections of their own and on one that is kept: `VISIT`."""

    def __init__(self, process: Popen) -> None:
        super().__init__(process, "visiting")

    def check(self) -> str:
        """Evidence that none has failed, and that more are answered. Raises Unmet."""
        before = self.ask(_VisitReport)
        deadline = time.monotonic() + _WITHIN
        while True:
            seen = self.ask(_VisitReport)
            if seen.failed:
                total = seen.fresh + seen.kept + len(seen.failed)
                raise Unmet(f"{len(seen.failed)} of {total} requests failed: {', '.join(seen.failed[:3])}")
            if min(seen.fresh - before.fresh, seen.kept - before.kept) >= _ALIVE:
                return f"0 of {seen.fresh + seen.kept} requests failed, {seen.fresh} on connections of their own, {seen.kept} on kept ones"
            if time.monotonic() > deadline:
                raise Unmet(f"no more requests are answered after {seen.fresh + seen.kept}")
            time.sleep(0.1)

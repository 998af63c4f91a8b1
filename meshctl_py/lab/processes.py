"""Processes the lab runs: started in their place, logged to a file, started again with growing pauses when they end, stopped for good."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO, Final

import trio

from meshctl_py.lab.enter import Entry
from meshctl_py.lab.status import ProcessStatus
from meshctl_py.logs import tail

_FIRST_PAUSE: Final = 0.1
_LONGEST_PAUSE: Final = 10.0
"""Kubernetes ends at five minutes; here somebody is watching."""
_STEADY: Final = 10.0
"""A process that lived so many seconds is started again at once, as in Kubernetes, and starts the pauses anew."""
_MAX_LOG: Final = 32 << 20
"""Bytes after which a log starts again; the part before is kept as ``NAME.log.1``."""


class LabProcess:
    """One process under a name that lasts; each start is a new session, so that what it leaves behind can be found."""

    def __init__(self, name: str, log: Path, changed: Callable[[], None]) -> None:
        self.name = name
        self.log = log
        self._changed = changed
        self._status = ProcessStatus(name)
        self._process: trio.Process | None = None
        self._restart_now = trio.Event()
        self.status_changed = trio.Event()
        """Set at the next change; take it before looking at `status`."""

    @property
    def status(self) -> ProcessStatus:
        return self._status

    async def run_for_ever(self, entry: Entry, environment: Mapping[str, str], *, grace: float) -> None:
        """Start, and start again whenever it ends, until cancelled; then it is stopped within ``grace`` seconds."""
        pause = _FIRST_PAUSE
        while True:
            began = time.monotonic()
            await self.run_once(entry, environment, grace=grace)
            if time.monotonic() - began > _STEADY:
                pause = _FIRST_PAUSE
                continue
            self._set("pausing", because=f"{self._status.last_exit}; next start in {pause:g} s")
            self._restart_now = trio.Event()
            with trio.move_on_after(pause) as waited:
                await self._restart_now.wait()
            pause = min(pause * 2, _LONGEST_PAUSE) if waited.cancelled_caught else _FIRST_PAUSE

    async def run_once(self, entry: Entry, environment: Mapping[str, str], *, grace: float) -> int:
        """Run to the end and return the exit status (negative: a signal). Cancellation stops it: SIGTERM, then SIGKILL after ``grace``."""
        process = await self._start(entry, environment)
        try:
            status = await process.wait()
        finally:
            with trio.CancelScope(shield=True):
                await self._stop(process, grace)
            self._process = None
            self._set("ended", last_exit=describe_exit(process.returncode))
        return status

    def wait_for(self, because: str) -> None:
        """Say why the process has not been started."""
        self._set("waiting", because=because)

    def signal(self, number: int) -> bool:
        """Send a signal to the process itself; False if there is none."""
        if self._process is None or self._process.returncode is not None:
            return False
        self._process.send_signal(number)
        return True

    def restart(self) -> None:
        """End the process, or the pause before its next start.

        It counts as running no more before it has ended: in a cluster too a pod that is told to end leaves its services at once.
        """
        if self.signal(signal.SIGTERM):
            self._set("ending", pid=self._status.pid)
        else:
            self._restart_now.set()

    def tail(self, lines: int = 15) -> list[str]:
        """The end of its log."""
        return tail(self.log, lines)

    async def _start(self, entry: Entry, environment: Mapping[str, str]) -> trio.Process:
        with open_log(self.log) as log:
            process = await trio.lowlevel.open_process(
                entry.command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                start_new_session=True,
            )
        self._process = process
        self._set("running", pid=process.pid)
        return process

    async def _stop(self, process: trio.Process, grace: float) -> None:
        """End the process, and whatever of its session outlived it."""
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            with trio.move_on_after(grace):
                await process.wait()
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # it left nobody behind
        await process.wait()

    def _set(self, state: str, *, because: str = "", pid: int | None = None, last_exit: str | None = None) -> None:
        before = self._status
        starts = before.starts + (state == "running")
        self._status = ProcessStatus(self.name, state, pid, starts, before.last_exit if last_exit is None else last_exit, because)
        if self._status != before:
            self.status_changed.set()
            self.status_changed = trio.Event()
            self._changed()


def describe_exit(status: int | None) -> str:
    """``exit status 1``, ``killed by SIGKILL``."""
    if status is None:
        return ""
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"


def open_log(path: Path) -> BinaryIO:
    """Open a log for appending; one that has grown too large starts again, its past kept beside it."""
    try:
        if path.stat().st_size > _MAX_LOG:
            path.replace(path.with_name(path.name + ".1"))
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("ab")


def descendants(pid: int) -> dict[int, list[str]]:
    """Processes below ``pid``, oldest first, with their command lines, as /proc of this PID namespace shows them."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                # The name in parentheses may contain anything, so the fields are counted from its end (proc(5)).
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found: dict[int, list[str]] = {}
    queue = sorted(children.get(pid, []))
    while queue:
        child = queue.pop(0)
        try:
            found[child] = Path(f"/proc/{child}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
        except OSError:
            continue
        queue += sorted(children.get(child, []))
    return found


def processes_in_netns(path: Path) -> list[int]:
    """Who has its main thread in the network namespace bound at ``path``."""
    try:
        wanted = path.stat()
    except FileNotFoundError:
        return []
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                own = (entry / "ns/net").stat()
            except OSError:
                continue
            if (own.st_ino, own.st_dev) == (wanted.st_ino, wanted.st_dev):
                found.append(int(entry.name))
    return found

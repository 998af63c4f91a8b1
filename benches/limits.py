"""Processes limited to a part of a CPU each, by the kernel's CPU controller of cgroups (cgroups(7)), version 1 or 2.

A limited process is as fast as if its CPU were slower, and the rest of the machine stays free for whoever loads it: so a machine with few
CPUs can tell what a second process gives.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

PERIOD: Final = 10_000
"""Microseconds in which a process has its part. Of a long one it would use its part at once and stand still for the rest, and who speaks to
it would wait, with what it has of its own."""
_NAME: Final = f"ambient-mesh-bench-{os.getpid()}"
_PATIENCE: Final = 5.0
_MOUNTINFO: Final = Path("/proc/self/mountinfo")
_NOT_HERE: Final = "no CPU controller of cgroups can be had"


class NoController(Exception):
    """The kernel, or whoever runs us, gives us no CPU controller; the text says what was seen."""


@dataclass(frozen=True, slots=True)
class Controller:
    """A hierarchy of cgroups that has the CPU controller. ``own`` is the group that new ones are made in; ``v2``: the unified hierarchy.
    ``root``: its name in /proc/PID/cgroup, which in a container is not always ``/``."""

    own: Path
    v2: bool
    root: str = "/"

    def quota(self, share: float) -> dict[str, str]:
        """What to write, by file, so that a group has ``share`` of one CPU."""
        microseconds = round(PERIOD * share)
        if self.v2:
            return {"cpu.max": f"{microseconds} {PERIOD}"}
        return {"cpu.cfs_period_us": str(PERIOD), "cpu.cfs_quota_us": str(microseconds)}


def find_controller(mountinfo: str) -> Controller:
    """From the text of /proc/self/mountinfo (proc(5)); where both versions are mounted, the controller is usually version 1's.

    Raises NoController.
    """
    unified = None
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        (root, mounted_at), (kind, _, options) = before.split()[3:5], after.split(" ", 2)
        if kind == "cgroup" and "cpu" in options.split(","):
            return Controller(Path(mounted_at), False, root)
        if kind == "cgroup2":
            unified = Controller(Path(mounted_at), True, root)
    if unified is None:
        raise NoController(f"{_NOT_HERE}: none is mounted")
    return unified


@contextmanager
def limited(pids: Iterable[int], share: float) -> Iterator[None]:
    """Each of the processes has at most ``share`` of a CPU, in a group of its own. In the end they are back where they were, and the groups
    are gone.

    Raises NoController.
    """
    controller = find_controller(_MOUNTINFO.read_text())
    with ExitStack() as undo:
        try:
            if controller.v2 and _delegate(controller.own):
                undo.callback(_take_back, controller.own)
            for pid in pids:
                home, group = _group_of(controller, pid), controller.own / f"{_NAME}-{pid}"
                group.mkdir()
                undo.callback(_remove, group, pid, home)
                for file, text in controller.quota(share).items():
                    (group / file).write_text(text)
                (group / "cgroup.procs").write_text(str(pid))
        except OSError as exc:
            raise NoController(f"{_NOT_HERE}: {exc}") from exc
        yield


def _delegate(group: Path) -> bool:
    """Let groups within have the controller; whether they had not. Raises OSError where there is none, or processes are in the way."""
    control = group / "cgroup.subtree_control"
    if "cpu" in control.read_text().split():
        return False
    control.write_text("+cpu")
    return True


def _take_back(group: Path) -> None:
    with suppress(OSError):  # others use it by now
        (group / "cgroup.subtree_control").write_text("-cpu")


def _group_of(controller: Controller, pid: int) -> Path:
    """Where the process is now. Raises OSError, also where it could not be put back."""
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if (not controllers) if controller.v2 else ("cpu" in controllers.split(",")):
            below = os.path.relpath(path, controller.root)
            home = controller.own / below
            if below.startswith("..") or not (home / "cgroup.procs").exists():
                raise OSError(f"{path}, where process {pid} is, cannot be seen from here")
            return home
    raise OSError(f"/proc/{pid}/cgroup does not name its group")


def _remove(group: Path, pid: int, home: Path) -> None:
    """A group can be removed when nobody is in it; a process that ends is for a moment longer than it can be seen."""
    try:
        (home / "cgroup.procs").write_text(str(pid))
    except OSError:
        pass  # it has ended
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            group.rmdir()
            return
        except FileNotFoundError:
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)

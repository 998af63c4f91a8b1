"""A subtree of every control group hierarchy for each node, so that a kubelet finds only its own pods: made, mounted inside, removed.

Hierarchies of version 1 (one mount each), of version 2 (one mount for all), or both at once, of which the kubelet uses version 1.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from meshctl_py.lab import kernel

_TOP: Final = "ambient-mesh"
_INSIDE: Final = "/sys/fs/cgroup"
_SYSTEM: Final = "system"
"""Version 2 allows no processes beside child groups: a node's own programs move into a leaf of this name."""
_WEIGHT: Final = 16
"""Of the processor for all clusters together, as many single processes have: with the weight of one, dozens would starve beside it."""
_EMPTY_WITHIN: Final = 5.0
"""Seconds the kernel may take to let go of the control groups of killed processes."""


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """``options``: what mounts it, such as ``cpu,cpuacct`` or ``none,name=systemd``; empty for version 2."""

    mount: Path
    options: str

    @property
    def unified(self) -> bool:
        return not self.options


def find_hierarchies(mountinfo: str | None = None) -> tuple[Hierarchy, ...]:
    """Those mounted here, version 2 only when there is no other (proc(5), mountinfo)."""
    text = Path("/proc/self/mountinfo").read_text() if mountinfo is None else mountinfo
    old: dict[str, Hierarchy] = {}
    new: dict[str, Hierarchy] = {}
    for line in text.splitlines():
        fields, _, rest = line.partition(" - ")
        kind, _source, flags = rest.split(" ", 2)
        mount = Path(fields.split(" ")[4])
        if kind == "cgroup2":
            new.setdefault("", Hierarchy(mount, ""))
        elif kind == "cgroup":
            found = [flag for flag in flags.split(",") if flag not in ("rw", "ro", "xattr", "clone_children") and "agent=" not in flag]
            options = ",".join(found) if not found[0].startswith("name=") else f"none,{found[0]}"
            old.setdefault(options, Hierarchy(mount, options))
    return tuple((old or new).values())


def make_group(cluster: str, node: str) -> None:
    """A group of the node in every hierarchy. Raises OSError."""
    for hierarchy in find_hierarchies():
        with _alone_at(hierarchy.mount):
            _make_group(hierarchy, cluster, node)


def _make_group(hierarchy: Hierarchy, cluster: str, node: str) -> None:
    parent = hierarchy.mount
    for part in (_TOP, cluster, node):
        if hierarchy.unified:
            _delegate(parent)
        group = parent / part
        group.mkdir(exist_ok=True)
        if "cpuset" in hierarchy.options.split(","):
            for name in ("cpuset.cpus", "cpuset.mems"):  # a new group has none, and nothing can run in it
                (group / name).write_text((parent / name).read_text())
        if part == _TOP:
            _weigh(group)
        parent = group


@contextmanager
def _alone_at(mount: Path) -> Iterator[None]:
    """The last cluster to end takes the common parent away, while another may be about to make its own group in it: one at a time."""
    descriptor = os.open(mount, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _weigh(group: Path) -> None:
    for name, one in (("cpu.shares", 1024), ("cpu.weight", 100)):  # version 1, version 2
        if (group / name).exists():
            (group / name).write_text(str(one * _WEIGHT))


def members_files(cluster: str, node: str, *, first: bool = False) -> tuple[str, ...]:
    """The ``cgroup.procs`` files of a node. ``first``: of its first process, from which its control group namespace is made."""
    leaf = "" if first else _SYSTEM
    return tuple(
        str(hierarchy.mount / _TOP / cluster / node / (leaf if hierarchy.unified else "") / "cgroup.procs")
        for hierarchy in find_hierarchies()
    )


def processes_of(cluster: str, node: str, *, pod: str | None = None) -> list[int]:
    """The processes of a node, or of the pod with this UID on it, as the caller's PID namespace counts; the pod's oldest first."""
    hierarchy = find_hierarchies()[-1]
    top = hierarchy.mount / _TOP / cluster / node
    found: list[int] = []
    for path, _, _ in os.walk(top):
        # The systemd driver writes a UID with underscores; ours doesn't.
        if pod is None or f"pod{pod}" in path:
            try:
                found += [int(line) for line in Path(path, "cgroup.procs").read_text().split()]
            except FileNotFoundError:
                continue
    return sorted(pid for pid in found if pid)


def mount_inside(hierarchies: tuple[Hierarchy, ...]) -> None:
    """In a new control group namespace, over a fresh ``/sys``: the hierarchies as a machine of its own has them. Raises OSError."""
    flags = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
    if hierarchies[0].unified:
        kernel.mount("cgroup2", _INSIDE, "cgroup2", flags)
        leaf = Path(_INSIDE, _SYSTEM)
        leaf.mkdir(exist_ok=True)
        (leaf / "cgroup.procs").write_text("0")
        _delegate(Path(_INSIDE))
        return
    kernel.mount("tmpfs", _INSIDE, "tmpfs", flags, "mode=755")
    for hierarchy in hierarchies:
        names = hierarchy.options.removeprefix("none,name=")
        Path(_INSIDE, names).mkdir()
        kernel.mount("cgroup", f"{_INSIDE}/{names}", "cgroup", flags, hierarchy.options)
        for name in names.split(",") if "," in names else ():
            Path(_INSIDE, name).symlink_to(names)


def empty_group(cluster: str, node: str) -> None:
    """Remove what a node's killed kubelet left below the node's group."""
    for own in groups_of(cluster):
        for child in _below(own / node):
            _remove(child)


def groups_of(cluster: str) -> list[Path]:
    """Where a cluster has its groups, one place in each hierarchy."""
    return [hierarchy.mount / _TOP / cluster for hierarchy in find_hierarchies()]


def remove_groups(cluster: str) -> list[Path]:
    """Remove all groups of a cluster whose processes are gone, and the common parent when it was the last; what could not be removed."""
    left: list[Path] = []
    for own in groups_of(cluster):
        left += [group for group in [*_below(own), own] if not _remove(group)]
        with _alone_at(own.parent.parent), suppress(OSError):  # another cluster's groups are in it
            own.parent.rmdir()
    return left


def _below(group: Path) -> Iterator[Path]:
    for path, _, _ in os.walk(group, topdown=False):
        if Path(path) != group:
            yield Path(path)


def _remove(group: Path) -> bool:
    deadline = time.monotonic() + _EMPTY_WITHIN
    while True:
        try:
            group.rmdir()
        except FileNotFoundError:
            return True
        except OSError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        else:
            return True


def _delegate(group: Path) -> None:
    """Let children of a version 2 group have all controllers that it has."""
    for controller in (group / "cgroup.controllers").read_text().split():
        try:
            (group / "cgroup.subtree_control").write_text(f"+{controller}")
        except OSError:
            continue  # one that this kernel doesn't delegate; a kubelet says which one it misses

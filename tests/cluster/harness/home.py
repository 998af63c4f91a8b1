"""Where test clusters keep their files: a cache of what is built once, and one directory a cluster, locked while it lives."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_NAME: Final = re.compile(r"[a-z0-9]([-a-z0-9]{0,30}[a-z0-9])?")


class ClusterError(Exception):
    """The user must act, or the cluster did not come up; the text says all."""


@dataclass(frozen=True, slots=True)
class NodeHome:
    """The files of one node. Those of its root file system lie in an overlay of which ``upper`` is the changed part."""

    path: Path

    @property
    def root(self) -> Path:
        """Where the node's root is mounted, in the cluster's own mount namespace only."""
        return self.path / "root"

    @property
    def upper(self) -> Path:
        return self.path / "upper"

    @property
    def work(self) -> Path:
        return self.path / "work"

    @property
    def containerd(self) -> Path:
        """On a real file system: containers' own overlays can't lie on an overlay."""
        return self.path / "containerd"

    @property
    def kubelet(self) -> Path:
        return self.path / "kubelet"

    @property
    def pid(self) -> Path:
        """The node's first process, as the cluster's PID namespace counts."""
        return self.path / "pid"


@dataclass(frozen=True, slots=True)
class ClusterHome:
    """The files of the cluster ``name``."""

    name: str
    path: Path

    @property
    def lock(self) -> Path:
        """Held by the cluster's first processes as long as any of them lives."""
        return self.path / "lock"

    @property
    def control(self) -> Path:
        return self.path / "control.sock"

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def pid(self) -> Path:
        """The cluster's process 1, as the host counts."""
        return self.path / "pid"

    @property
    def undertaker(self) -> Path:
        """The process outside that cleans up after it, as the host counts."""
        return self.path / "undertaker.pid"

    @property
    def kubeconfig(self) -> Path:
        """The administrator's, for use on the host."""
        return self.path / "kubeconfig"

    @property
    def credentials(self) -> Path:
        """Keys, certificates and the kubeconfigs of the cluster's own programs."""
        return self.path / "credentials"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def audit(self) -> Path:
        """What the API server saw of the mesh's own programs: one JSON object a line."""
        return self.logs / "audit.log"

    @property
    def etcd(self) -> Path:
        return self.path / "etcd"

    def node(self, name: str) -> NodeHome:
        return NodeHome(self.path / "nodes" / name)

    @property
    def alive(self) -> bool:
        try:
            descriptor = os.open(self.lock, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    def wait_until_gone(self, within: float) -> bool:
        """Whether the cluster's processes ended within so many seconds."""
        deadline = time.monotonic() + within
        while self.alive:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True


def cache_directory(environ: Mapping[str, str] = os.environ) -> Path:
    """``~/.cache/ambient-mesh/cluster``: all that the clusters of a user need and leave, on one file system (hard links are made in it)."""
    return Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "ambient-mesh/cluster")


def clusters_directory() -> Path:
    return cache_directory() / "run"


def find_clusters() -> list[ClusterHome]:
    """All clusters that have a directory, also those whose processes were killed."""
    root = clusters_directory()
    return [ClusterHome(path.name, path) for path in sorted(root.iterdir()) if (path / "lock").exists()] if root.is_dir() else []


def claim_cluster(name: str) -> tuple[ClusterHome, int]:
    """A new cluster's empty home and the descriptor that holds its lock. Raises ClusterError when one of this name runs."""
    if not _NAME.fullmatch(name):
        raise ClusterError(f"{name!r} is no name for a cluster: at most 32 lower-case letters, digits and '-'")
    home = ClusterHome(name, clusters_directory() / name)
    while True:
        home.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(home.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise ClusterError(f"a cluster named {name} is running already: 'make cluster-down' ends it") from None
        try:
            if os.path.samestat(home.lock.stat(), os.fstat(descriptor)):
                return home, descriptor
        except FileNotFoundError:
            pass  # an ending cluster removed the file between our opening and locking it
        os.close(descriptor)


def clear(home: ClusterHome) -> None:
    """Remove what a killed cluster left in its directory; the lock stays."""
    for entry in home.path.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry != home.lock:
            entry.unlink()


@contextmanager
def building(target: Path) -> Iterator[Path | None]:
    """A directory to fill that becomes ``target`` when the block ends well, or None if ``target`` is there already.

    Several processes may want the same thing: one builds, the others wait.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.parent / f".{target.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            yield None
            return
        unfinished = target.parent / f".{target.name}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        yield unfinished
        unfinished.rename(target)
        os.utime(target)

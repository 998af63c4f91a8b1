"""Where a lab keeps its files, and which labs there are: one directory a lab, locked while it lives."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from meshctl_py.lab.init import PID_FILE

_NAME: Final = re.compile(r"[a-z0-9]([-a-z0-9]{0,30}[a-z0-9])?")
_FALLBACK: Final = "lab"


class LabError(Exception):
    """The user must act: no such lab, a name that is taken, a directory that isn't one. The text says all."""


@dataclass(frozen=True, slots=True)
class LabHome:
    """The files of the lab ``name``."""

    name: str
    path: Path

    @property
    def lock(self) -> Path:
        """Locked by the lab's first processes as long as any of them lives."""
        return self.path / "lock"

    @property
    def control(self) -> Path:
        return self.path / "control.sock"

    @property
    def copy(self) -> Path:
        """Of the user's directory, where the lab follows a copy."""
        return self.path / "source"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def netns(self) -> Path:
        return self.path / "netns"

    @property
    def files(self) -> Path:
        """The /etc files of pods and nodes."""
        return self.path / "files"

    @property
    def tokens(self) -> Path:
        return self.path / "tokens"

    @property
    def istiod(self) -> Path:
        return self.path / "istiod"

    @property
    def deployed(self) -> Path:
        """What the control plane deploys: objects beside the user's."""
        return self.path / "deployed"

    @property
    def status(self) -> Path:
        """Holds the overlays of all who report status."""
        return self.path / "status"

    def status_of(self, writer: str) -> Path:
        """The overlay of ``lab``, of ``istiod``, or of a node's agent."""
        return self.status / writer

    def run_of(self, node: str) -> Path:
        """Where a node's agent has its sockets."""
        return self.path / "run" / node

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

    def kill(self) -> None:
        """End the lab's process 1, and by that all others; for labs that do not listen."""
        try:
            pid = int((self.path / PID_FILE).read_text())
            if os.fsencode(self.path) in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)
        except (OSError, ValueError):
            return

    def wait_until_gone(self, within: float) -> bool:
        """Whether the lab's processes ended within so many seconds."""
        deadline = time.monotonic() + within
        while self.alive:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True


def labs_directory(environ: Mapping[str, str], uid: int) -> Path:
    """The directory of all labs of a user."""
    if uid == 0:
        return Path("/run/ambient-mesh/lab")
    runtime = environ.get("XDG_RUNTIME_DIR")
    if runtime and Path(runtime).is_dir():
        return Path(runtime, "ambient-mesh/lab")
    return Path(environ.get("XDG_CACHE_HOME") or Path(environ.get("HOME", "/"), ".cache"), "ambient-mesh/lab")


def own_labs() -> Path:
    return labs_directory(os.environ, os.geteuid())


def find_labs() -> list[LabHome]:
    """All labs of this user that have a directory, also those whose processes were killed."""
    root = own_labs()
    return [LabHome(path.name, path) for path in sorted(root.iterdir())] if root.is_dir() else []


def choose_lab(name: str | None, flag: str = "--name") -> LabHome:
    """The running lab of this name, or the only one that runs. ``flag``: what names one. Raises LabError."""
    running = [lab for lab in find_labs() if lab.alive]
    if name is not None:
        chosen = [lab for lab in running if lab.name == name]
        if not chosen:
            raise LabError(f"no lab named {name} is running" + (f" (running: {_names(running)})" if running else ""))
        return chosen[0]
    if not running:
        raise LabError("no lab is running: start one with 'meshctl lab up DIR'")
    if len(running) > 1:
        raise LabError(f"several labs are running ({_names(running)}): choose one with {flag}")
    return running[0]


def name_from_directory(directory: Path) -> str:
    """A lab's name where the user gives none: the directory's, as far as it can be one."""
    name = re.sub(r"[^a-z0-9]+", "-", directory.resolve().name.lower()).strip("-")[:32].strip("-")
    return name or _FALLBACK


def claim_lab(name: str) -> tuple[LabHome, int]:
    """A new lab's empty home and the descriptor that holds its lock; what a killed lab left there is removed. Raises LabError."""
    if not _NAME.fullmatch(name):
        raise LabError(f"{name!r} is no name for a lab: at most 32 lower-case letters, digits and '-'")
    home = LabHome(name, own_labs() / name)
    try:
        while (descriptor := _lock(home)) is None:
            pass
    except BlockingIOError:
        raise LabError(
            f"a lab named {name} is running already: 'meshctl lab down --name {name}' ends it, --name gives this one another"
        ) from None
    except OSError as exc:
        raise LabError(f"cannot make {home.path}: {exc.strerror}") from exc
    _clear(home)
    return home, descriptor


def _lock(home: LabHome) -> int | None:
    """None: somebody who cleaned up after another lab removed directory or file while it was being locked. Raises OSError."""
    home.path.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        descriptor = os.open(home.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(home.lock.stat(), os.fstat(descriptor)):
            return descriptor
    except FileNotFoundError:
        pass
    except BlockingIOError:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def remove_remains(home: LabHome) -> None:
    """Remove the files of a lab whose processes are gone."""
    shutil.rmtree(home.path, ignore_errors=True)


def _clear(home: LabHome) -> None:
    for entry in home.path.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry != home.lock:
            entry.unlink()
    for directory in (home.logs, home.netns, home.files, home.deployed, home.status_of("lab"), home.status_of("istiod")):
        directory.mkdir(parents=True)


def _names(labs: list[LabHome]) -> str:
    return ", ".join(lab.name for lab in labs)

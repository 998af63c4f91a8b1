"""The movers' processes: how they are started, and found again by the file of their slot.

It imports little: `start_early` runs before the brain is imported, so that two CPUs do both imports at once. Of a node whose agent was
killed with all its movers, connections are refused until both are done.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

from mesh.runtime.env import InvalidEnvironment
from ztunnel_py.config import read_config
from ztunnel_py.supervisor import LIFELINE


def start_early() -> dict[str, subprocess.Popen[bytes]]:
    """Start a process in every slot that has none that lives, by slot. Whatever fails the brain tries again, and says so."""
    started: dict[str, subprocess.Popen[bytes]] = {}
    try:
        config = read_config()
    except InvalidEnvironment:
        return started
    raise_descriptor_limit()
    try:
        config.own_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in slots(config.own_movers):
            if find_mover(config.own_dir, name) is None:
                started[name] = start_mover(name)
                note_mover(config.own_dir, name, started[name].pid)
    except OSError:
        pass
    return started


def slots(count: int) -> list[str]:
    """Names of the movers that a brain keeps running."""
    return [str(number) for number in range(count)]


def start_mover(name: str) -> subprocess.Popen[bytes]:
    """Raises OSError."""
    lifeline = os.environ.get(LIFELINE)
    return subprocess.Popen(
        [sys.executable, "-m", "ztunnel_py", "mover", name],
        pass_fds=(int(lifeline),) if lifeline else (),
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # a signal to the brain's group is the brain's to handle
    )


def note_mover(run_dir: Path, name: str, pid: int) -> None:
    """For brains to come. Raises OSError."""
    _pid_file(run_dir, name).write_text(str(pid))


def find_mover(run_dir: Path, name: str) -> int | None:
    """The living process that was noted for the slot."""
    try:
        pid = int(_pid_file(run_dir, name).read_text())
    except (OSError, ValueError):
        return None
    return pid if is_mover(pid, name) else None


def noted_slots(run_dir: Path) -> dict[str, Path]:
    """All slots that any brain has noted a process for, and where."""
    return {path.stem.removeprefix("mover-"): path for path in run_dir.glob("mover-*.pid")}


def is_mover(pid: int, name: str) -> bool:
    """Whether the process is a mover of ours and not one that got its number later."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[-4:-1] == [b"ztunnel_py", b"mover", name.encode()]
    except OSError:
        return False


def raise_descriptor_limit() -> None:
    """As many descriptors as we are allowed: a connection needs several, and movers inherit the limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _pid_file(run_dir: Path, name: str) -> Path:
    return run_dir / f"mover-{name}.pid"

"""Process 1 of a lab: makes its namespaces, starts the keeper, reaps orphans, and leaves nothing when the keeper ends.

Everything of a lab lives in namespaces that only its processes hold. When process 1 of a PID namespace ends, the kernel kills every other
process in it; with the last process go the network namespaces, their veths and rules, and the private mounts. So whatever happens to the
keeper, and whoever kills it, nothing stays behind; no clean-up code has to run for that.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

from meshctl_py.lab import kernel


@dataclass(frozen=True, slots=True)
class LabConfig:
    """What ``lab up`` tells the lab. Paths are absolute. ``lock`` and ``events`` are inherited descriptors.

    ``with_mesh`` False leaves control plane and agents out: nodes, pods, VIPs and DNS alone. ``patience``: seconds until everything must
    be ready; then the lab ends, unless ``keep``. ``tied``: it also ends when its starter does, however that ends. ``user_namespace``: the
    lab has one of its own, because no root started it. ``agents``: variables that every agent's environment has besides. ``istiod``:
    options that the control plane's command line has besides.
    """

    name: str
    source: str
    state: str
    lock: int
    events: int
    user_namespace: bool
    with_mesh: bool = True
    movers: int | None = None
    agents: Mapping[str, str] = field(default_factory=dict)
    istiod: Sequence[str] = ()
    patience: float = 60.0
    keep: bool = False
    tied: bool = False

    @classmethod
    def parse(cls, text: str) -> LabConfig:
        return cls(**json.loads(text))

    def dump(self) -> str:
        return json.dumps(asdict(self))


PID_FILE: Final = "pid"
"""In the lab's directory: process 1, as the host counts, for those who must end a lab that does not listen."""


def netns_directory(state: str) -> str:
    """Where the lab's network namespaces are bound: a tmpfs that only the lab's own mount namespace shows."""
    return f"{state}/netns"


class CannotIsolate(Exception):
    """The kernel refused a namespace or mount; the text says which and what may help."""


def main() -> None:
    """``python -m meshctl_py.lab.init CONFIG``: returns at once in the caller's PID namespace, lives on as process 1 of a new one."""
    config = LabConfig.parse(sys.argv[1])
    try:
        enter_new_namespaces(user_namespace=config.user_namespace)
        child = os.fork()
        if child != 0:
            Path(config.state, PID_FILE).write_text(str(child))
            os._exit(0)
        _private_mounts(config)
    except CannotIsolate as exc:
        os.write(config.events, json.dumps({"event": "failed", "because": str(exc)}).encode() + b"\n")
        os._exit(1)
    os._exit(_run_keeper(config))


def enter_new_namespaces(*, user_namespace: bool) -> None:
    """New PID (for children), mount, network and UTS namespaces, in a user namespace if asked for. Raises CannotIsolate."""
    uid, gid = os.geteuid(), os.getegid()
    try:
        if user_namespace:
            kernel.unshare(kernel.CLONE_NEWUSER)
            # One mapping is all that an unprivileged user may write, and setgroups must be denied before it (user_namespaces(7)).
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
            Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
        kernel.unshare(kernel.CLONE_NEWPID | kernel.CLONE_NEWNS | kernel.CLONE_NEWNET | kernel.CLONE_NEWUTS)
    except OSError as exc:
        hint = "" if not user_namespace else "; user namespaces may be switched off (user.max_user_namespaces, AppArmor): try as root"
        raise CannotIsolate(f"the kernel gives no namespaces: {exc.strerror}{hint}") from exc


def _private_mounts(config: LabConfig) -> None:
    try:
        kernel.mount("none", "/", flags=kernel.MS_REC | kernel.MS_PRIVATE)
        kernel.mount("proc", "/proc", "proc", kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC)
        kernel.mount("tmpfs", netns_directory(config.state), "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "mode=700,size=1m")
    except OSError as exc:
        raise CannotIsolate(f"the kernel refuses a private mount: {exc.strerror} (inside a container it may need more rights)") from exc


def _run_keeper(config: LabConfig) -> int:
    """Reap until the keeper has ended, then kill the rest and, unless the keeper crashed, remove the lab's files."""
    command = [sys.executable, "-m", "meshctl_py.lab.keeper", config.dump()]
    keeper = subprocess.Popen(command, pass_fds=(config.lock, config.events))
    os.close(config.events)  # or `up` would wait for an end of file that can't come
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda received, _frame: keeper.send_signal(signal.SIGTERM))
    status = _reap_until(keeper.pid)
    _kill_the_rest()
    if status == 0:
        _unmount_netns(config.state)
        shutil.rmtree(config.state, ignore_errors=True)
    return abs(status)


def _unmount_netns(state: str) -> None:
    try:
        kernel.unmount(netns_directory(state))
    except OSError:
        return  # somebody removed the directory under it; the mount is gone with it


def _reap_until(pid: int) -> int:
    while True:
        ended, status = os.wait()
        if ended == pid:
            return os.waitstatus_to_exitcode(status)


def _kill_the_rest() -> None:
    """Everything else in this PID namespace, so that nobody writes into the directory that goes next."""
    try:
        os.kill(-1, signal.SIGKILL)
        while True:
            os.wait()
    except (ProcessLookupError, ChildProcessError):
        return


if __name__ == "__main__":
    main()

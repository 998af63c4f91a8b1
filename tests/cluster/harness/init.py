"""The cluster's first processes: an undertaker outside, and process 1 of the PID namespace that everything else is in.

When process 1 ends, the kernel kills all others, and with the last of them go their network namespaces and mounts: nobody has to clean up,
whoever was killed. Only control groups and files stay; the undertaker removes those, and if it was killed too, the next command does.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import msgspec

from meshctl_py.lab import kernel
from tests.cluster.harness import cgroups
from tests.cluster.harness.home import ClusterHome
from tests.cluster.harness.rootfs import CLONE_NEWIPC
from tests.cluster.harness.settings import Settings


def main() -> None:
    """``python -m tests.cluster.harness.init``, with the settings as the argument: the undertaker."""
    settings = msgspec.json.decode(sys.argv[1], type=Settings)
    home = ClusterHome(settings.name, Path(settings.path))
    home.undertaker.write_text(str(os.getpid()))
    kernel.unshare(kernel.CLONE_NEWPID)
    child = os.fork()
    if child == 0:
        os._exit(_run_as_first(settings, home))
    os.close(settings.events)
    os.close(settings.listener)
    home.pid.write_text(str(child))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda _number, _frame: os.kill(child, signal.SIGKILL))
    os.waitpid(child, 0)
    bury(home)


def bury(home: ClusterHome) -> list[Path]:
    """Remove what a cluster whose processes are gone leaves, but the logs, which stay until the next of this name.

    Returns the control groups that could not be removed.
    """
    left = cgroups.remove_groups(home.name)
    for entry in home.path.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            if entry != home.logs:
                shutil.rmtree(entry)
        elif entry != home.lock:
            entry.unlink()
    return left


def _run_as_first(settings: Settings, home: ClusterHome) -> int:
    kernel.die_with_parent(signal.SIGKILL)
    kernel.unshare(kernel.CLONE_NEWNS | kernel.CLONE_NEWNET | kernel.CLONE_NEWUTS | CLONE_NEWIPC)
    kernel.mount("none", "/", flags=kernel.MS_REC | kernel.MS_PRIVATE)
    kernel.mount("proc", "/proc", "proc", kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC)
    # etcd waits for the disk at every write; nobody needs its data when the cluster has ended.
    home.etcd.mkdir(mode=0o700)
    kernel.mount("tmpfs", str(home.etcd), "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "mode=700")
    kernel.set_hostname(settings.name)
    command = [sys.executable, "-m", "tests.cluster.harness.keeper", sys.argv[1]]
    with (home.logs / "keeper.log").open("ab") as log:
        keeper = subprocess.Popen(command, pass_fds=(settings.lock, settings.events, settings.listener), stdout=log, stderr=log)
    os.close(settings.events)  # or whoever waits for its end would wait for ever
    os.close(settings.listener)
    while True:
        ended, status = os.wait()
        if ended == keeper.pid:
            return abs(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()

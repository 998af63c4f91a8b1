"""Run a program in a Debian tree of the cache as if on a machine of its own: an overlay of the tree, pivoted to, in namespaces of its own.

As a node's first process it makes all namespaces; as a tool (buildah, a containerd that unpacks images) only those that confine mounts
and processes. The tree itself never changes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from meshctl_py.lab import kernel
from tests.cluster.harness import cgroups

CLONE_NEWCGROUP: Final = 0x02000000
CLONE_NEWIPC: Final = 0x08000000
_MS_SHARED: Final = 0x100000
_DEVICES: Final = ("null", "zero", "full", "random", "urandom", "tty", "kmsg", "net/tun", "fuse")


@dataclass(frozen=True, slots=True)
class Machine:
    """``tree``: the file system's unchanging part; ``upper`` and ``work``: the overlay's changing ones; ``root``: an empty directory for
    the mount. ``binds``: directories laid over others of the root, source first; the target is made. ``hostname`` and ``members`` (see
    `cgroups.members_files`) make it a node, with network, IPC, host name and control groups of its own. ``tied``: it ends with the thread
    that started it (prctl(2), PR_SET_PDEATHSIG: not with the process, so trio's worker threads can't start it)."""

    tree: str
    upper: str
    work: str
    root: str
    argv: tuple[str, ...]
    binds: tuple[tuple[str, str], ...] = ()
    hostname: str | None = None
    members: tuple[str, ...] = ()
    tied: bool = False

    def command(self) -> list[str]:
        """The argument vector of a process that runs ``argv`` there and ends with it; killed, it takes everything along."""
        return [sys.executable, "-m", __name__, json.dumps(asdict(self))]


def main() -> None:
    machine = Machine(**json.loads(sys.argv[1]))
    if machine.tied:
        kernel.die_with_parent(signal.SIGKILL)
    for members in machine.members:
        Path(members).write_text("0")
    apart = kernel.CLONE_NEWNET | kernel.CLONE_NEWUTS | CLONE_NEWCGROUP | CLONE_NEWIPC if machine.hostname is not None else 0
    kernel.unshare(kernel.CLONE_NEWPID | kernel.CLONE_NEWNS | apart)
    child = os.fork()
    if child == 0:
        kernel.die_with_parent(signal.SIGKILL)
        _become(machine)
        os.execvp(machine.argv[0], machine.argv)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda _number, _frame: os.kill(child, signal.SIGKILL))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    sys.exit(status if status >= 0 else 128 - status)


def _become(machine: Machine) -> None:
    """Mount everything, then leave the old root for good."""
    hierarchies = cgroups.find_hierarchies()
    kernel.mount("none", "/", flags=kernel.MS_REC | kernel.MS_PRIVATE)
    root = Path(machine.root)
    for directory in (machine.upper, machine.work, machine.root):
        os.makedirs(directory, exist_ok=True)
    kernel.mount("overlay", machine.root, "overlay", options=f"lowerdir={machine.tree},upperdir={machine.upper},workdir={machine.work}")
    safe = kernel.MS_NOSUID | kernel.MS_NOEXEC | kernel.MS_NODEV
    kernel.mount("proc", f"{root}/proc", "proc", safe)
    if machine.hostname is None:
        kernel.mount("/sys", f"{root}/sys", flags=kernel.MS_BIND | kernel.MS_REC)
    else:
        kernel.mount("sysfs", f"{root}/sys", "sysfs", safe)
        kernel.set_hostname(machine.hostname)
    _mount_devices(root)
    kernel.mount("tmpfs", f"{root}/run", "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "mode=755")
    for source, target in machine.binds:
        inside = root / target.lstrip("/")
        inside.mkdir(parents=True, exist_ok=True)
        kernel.mount(source, str(inside), flags=kernel.MS_BIND)
    os.chdir(root)
    subprocess.run(["pivot_root", ".", "."], check=True)  # no wrapper in libc; root and directory of all processes here follow
    kernel.unmount(".")
    os.chdir("/")
    if machine.hostname is not None:
        cgroups.mount_inside(hierarchies)
        os.makedirs("/run/netns")
        kernel.mount("tmpfs", "/run/netns", "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "mode=755")
    # Volumes with mount propagation, and tools that mount inside their own namespaces, want a shared root.
    kernel.mount("none", "/", flags=kernel.MS_REC | _MS_SHARED)


def _mount_devices(root: Path) -> None:
    """A device directory of its own: the machine's has mounts and sockets of others in it."""
    devices = root / "dev"
    kernel.mount("tmpfs", str(devices), "tmpfs", kernel.MS_NOSUID, "mode=755,size=1m")
    for name in _DEVICES:
        if Path("/dev", name).exists():
            (devices / name).parent.mkdir(exist_ok=True)
            (devices / name).touch()
            kernel.mount(f"/dev/{name}", str(devices / name), flags=kernel.MS_BIND)
    for name in ("shm", "pts", "mqueue"):
        (devices / name).mkdir()
    kernel.mount("tmpfs", str(devices / "shm"), "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "mode=1777")
    kernel.mount("devpts", str(devices / "pts"), "devpts", kernel.MS_NOSUID | kernel.MS_NOEXEC, "newinstance,ptmxmode=666,mode=620,gid=5")
    for name, target in (("ptmx", "pts/ptmx"), ("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")):
        (devices / name).symlink_to(target)


if __name__ == "__main__":
    main()

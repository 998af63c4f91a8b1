"""Start one command inside a pod, a node or the router: `Entry` says where, `main` goes there and executes it.

A process of its own, because namespaces are joined before exec and the keeper has threads: between fork and exec of a threaded process
nothing safe can be done in Python. It imports little, so that a start costs some twenty milliseconds.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from meshctl_py.lab import kernel

NOT_FOUND = 127
NOT_ENTERED = 126


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a command runs and what it finds there. The environment is the starter's.

    ``join``: descriptors or paths of namespaces, joined in this order. ``hide``: a mount the command shall not see or hold (the lab's
    namespace handles: a copy of them would keep a deleted pod's namespace alive); None leaves it among the lab's own mounts, as the agents
    need. ``binds``: files that lie over others, source first. ``as_child``: the command becomes a child of this process, in the PID
    namespace that was joined, and dies with it. ``cgroups``: the ``cgroup.procs`` of the groups it belongs to, entered before all else.
    """

    argv: tuple[str, ...]
    join: tuple[int | str, ...] = ()
    hide: str | None = None
    binds: tuple[tuple[str, str], ...] = ()
    hostname: str | None = None
    directory: str | None = None
    as_child: bool = False
    cgroups: tuple[str, ...] = ()

    def command(self) -> list[str]:
        """The argument vector that starts a process with this entry."""
        root = str(Path(__file__).resolve().parents[2])
        code = f"import sys; sys.path.insert(0, {root!r}); from meshctl_py.lab.enter import main; main()"
        return [sys.executable, "-I", "-S", "-c", code, json.dumps(asdict(self))]


def main() -> None:
    """Carry out the entry given as the last argument; does not return."""
    entry = Entry(**json.loads(sys.argv[-1]))
    try:
        _join(entry)
    except OSError as exc:
        _fail(NOT_ENTERED, f"cannot enter: {exc.strerror}")
    if entry.as_child:
        _run_as_child(entry)
    _prepare_and_execute(entry)


def _join(entry: Entry) -> None:
    for members in entry.cgroups:
        with open(members, "w") as file:
            file.write("0")  # whoever writes
    for namespace in entry.join:
        descriptor = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC) if isinstance(namespace, str) else namespace
        kernel.setns(descriptor)
        os.close(descriptor)


def _run_as_child(entry: Entry) -> None:
    """Wait for the command in the terminal's foreground group: Ctrl-C reaches it directly, SIGTERM and SIGHUP are passed on."""
    child = os.fork()
    if child == 0:
        kernel.die_with_parent(signal.SIGKILL)
        _prepare_and_execute(entry)
    for number in (signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, _frame: os.kill(child, received))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os._exit(status if status >= 0 else 128 - status)


def _prepare_and_execute(entry: Entry) -> None:
    try:
        if entry.hide is not None:
            _make_private_mounts(entry.hide, entry.binds)
        if entry.hostname is not None:
            kernel.unshare(kernel.CLONE_NEWUTS)
            kernel.set_hostname(entry.hostname)
        if entry.directory is not None:
            os.chdir(entry.directory)
    except OSError as exc:
        _fail(NOT_ENTERED, f"cannot enter: {exc.strerror}" + (f": {exc.filename}" if exc.filename else ""))
    try:
        os.execvp(entry.argv[0], entry.argv)
    except OSError as exc:
        _fail(NOT_FOUND, f"{entry.argv[0]}: {exc.strerror}")


def _make_private_mounts(hide: str, binds: tuple[tuple[str, str], ...]) -> None:
    kernel.unshare(kernel.CLONE_NEWNS)
    kernel.mount("none", "/", flags=kernel.MS_REC | kernel.MS_PRIVATE)
    kernel.unmount(hide)
    for source, target in binds:
        if os.path.exists(target):  # a minimal system may have no /etc/resolv.conf; nothing can lie over what isn't there
            kernel.mount(source, target, flags=kernel.MS_BIND)


def _fail(status: int, message: str) -> None:
    print(f"meshctl lab: {message}", file=sys.stderr, flush=True)
    os._exit(status)

"""Network namespaces: open, identify, enter and leave them, run a function inside one, give one a name.

Python 3.11 has no `os.setns`. A namespace belongs to a thread, so whoever changes it must not share the thread with code that does
not know: `run_in_netns` uses a thread that then ends, `entered` is for a single-threaded loop that comes straight back.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Final, NamedTuple, TypeVar

import trio

CLONE_NEWNET: Final = 0x40000000
_NS_GET_NSTYPE: Final = 0xB703  # ioctl_ns(2)
_MS_BIND: Final = 0x1000
_MNT_DETACH: Final = 2
_OWN: Final = "/proc/thread-self/ns/net"

_T = TypeVar("_T")
_libc = ctypes.CDLL(None, use_errno=True)


class NotANetworkNamespace(Exception):
    """The path opens, but what is behind it is no network namespace (an unmounted name is a plain file)."""


class NetnsIdentity(NamedTuple):
    """What tells one network namespace from another while either is open. Paths and descriptors do not."""

    inode: int
    device: int


def open_netns(path: str | os.PathLike[str]) -> int:
    """A descriptor of the namespace at ``path``; the caller closes it. Raises OSError, NotANetworkNamespace."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        kind = fcntl.ioctl(fd, _NS_GET_NSTYPE)
    except OSError as exc:
        os.close(fd)
        raise NotANetworkNamespace(f"{os.fspath(path)} is not a network namespace") from exc
    if kind != CLONE_NEWNET:
        os.close(fd)
        raise NotANetworkNamespace(f"{os.fspath(path)} is a namespace of another kind")
    return fd


def open_own_netns() -> int:
    """A descriptor of the calling thread's namespace; the caller closes it."""
    return os.open(_OWN, os.O_RDONLY | os.O_CLOEXEC)


def netns_identity(fd: int) -> NetnsIdentity:
    """The identity of an open namespace. Raises OSError."""
    found = os.fstat(fd)
    return NetnsIdentity(found.st_ino, found.st_dev)


def setns(fd: int) -> None:
    """Move the calling thread into a network namespace. Raises OSError. Nothing brings the thread back."""
    if _libc.setns(fd, CLONE_NEWNET) != 0:
        _raise_errno("setns")


class entered:
    """Be in another network namespace for a few system calls, on a thread that must not stay there (a mover's main thread).

    ``home`` is a descriptor of the thread's own namespace, from `open_own_netns`: who comes here for every connection opens it once.
    No waiting, no checkpoint and no callback inside: all other code of the thread assumes its own namespace. A thread that cannot go
    back would open sockets of one pod in another, so the process aborts instead.
    """

    __slots__ = ("_fd", "_home")

    def __init__(self, fd: int, home: int) -> None:
        self._fd = fd
        self._home = home

    def __enter__(self) -> None:
        setns(self._fd)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if _libc.setns(self._home, CLONE_NEWNET) != 0:
            os.write(2, b"mesh.linux.netns: cannot return to the own network namespace, aborting\n")
            os.abort()


def run_in_netns(fd: int, function: Callable[[], _T]) -> _T:
    """Run ``function`` in a network namespace, in a thread of its own that then ends; its result or exception is handed on.

    Blocks the caller for as long. Raises OSError when the namespace cannot be entered.
    """

    def inside() -> _T:
        setns(fd)
        return function()

    return _in_own_thread(inside)


async def run_in_netns_from_trio(fd: int, function: Callable[[], _T]) -> _T:
    """`run_in_netns` without blocking trio. Not abandoned by cancellation: ``fd`` may be closed once this has returned or raised.

    trio's cached worker thread only waits: it must never change its own namespace, the next job would find itself there.
    """
    return await trio.to_thread.run_sync(run_in_netns, fd, function)


def create_named_netns(directory: Path, name: str) -> Path:
    """A new network namespace, kept alive by a bind mount at ``directory/name`` as ``ip netns add`` does. Raises OSError.

    Its loopback interface is down. `delete_named_netns` removes the name.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / name
    os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444))

    def make() -> None:
        if _libc.unshare(CLONE_NEWNET) != 0:
            _raise_errno("unshare")
        if _libc.mount(_OWN.encode(), os.fsencode(path), None, ctypes.c_ulong(_MS_BIND), None) != 0:
            _raise_errno(f"mount {path}")

    try:
        _in_own_thread(make)
    except OSError:
        path.unlink()
        raise
    return path


def delete_named_netns(path: Path) -> None:
    """Undo `create_named_netns`; a name that is gone already is fine. The namespace lives on while processes are in it. Raises OSError."""
    if not path.exists():
        return
    while _libc.umount2(os.fsencode(path), _MNT_DETACH) == 0:
        pass  # mounted twice by an interrupted run: every layer goes
    path.unlink(missing_ok=True)


def ipv6_enabled() -> bool:
    """Whether the calling thread's network namespace has IPv6 on its loopback, which listeners and the way of replies need.

    Absent files mean a kernel without IPv6. Same test as Istio's agent and ztunnel (N9).
    """
    try:
        return Path("/proc/sys/net/ipv6/conf/lo/disable_ipv6").read_text().strip() == "0"
    except FileNotFoundError:
        return False


def _in_own_thread(function: Callable[[], _T]) -> _T:
    outcome: list[_T] = []
    failure: list[BaseException] = []

    def body() -> None:
        try:
            outcome.append(function())
        except BaseException as exc:  # handed to the caller, whatever it is
            failure.append(exc)

    thread = threading.Thread(target=body, name="netns", daemon=True)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return outcome[0]


def _raise_errno(what: str) -> None:
    number = ctypes.get_errno()
    raise OSError(number, f"{what}: {os.strerror(number)}")

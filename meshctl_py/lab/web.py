"""HTTP GET for probes and status: a few bounded bytes, on a socket that was opened in another network namespace."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from mesh.linux.netns import open_netns, run_in_netns_from_trio
from meshctl_py.http import Answer, Unreachable, get

__all__ = ["Answer", "Unreachable", "fetch", "open_connection"]


@asynccontextmanager
async def open_connection(netns: Path, ip: str, port: int) -> AsyncIterator[trio.SocketStream]:
    """A TCP connection made inside the namespace at ``netns``; a socket stays where it was opened, whoever uses it. Raises Unreachable."""
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    try:
        sock = trio.socket.from_stdlib_socket(await _open_socket(netns, family))
    except OSError as exc:
        raise Unreachable(str(exc)) from exc
    with sock:
        try:
            await sock.connect((ip, port))
        except OSError as exc:
            raise Unreachable(f"port {port}: {os.strerror(exc.errno) if exc.errno else exc}") from exc
        yield trio.SocketStream(sock)


async def fetch(netns: Path, ip: str, port: int, path: str, *, within: float, host: str = "") -> Answer:
    """GET ``path``, in ``within`` seconds altogether. Raises Unreachable."""
    try:
        with trio.fail_after(within):
            async with open_connection(netns, ip, port) as stream:
                return await get(stream, path, host or (f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"))
    except trio.TooSlowError as exc:
        raise Unreachable("no answer in time") from exc
    except trio.BrokenResourceError as exc:
        raise Unreachable(f"no HTTP answer: {exc}") from exc


async def _open_socket(netns: Path, family: int) -> socket.socket:
    descriptor = open_netns(netns)
    try:
        sock = await run_in_netns_from_trio(descriptor, lambda: socket.socket(family, socket.SOCK_STREAM))
    finally:
        os.close(descriptor)
    sock.setblocking(False)
    return sock

"""Unix sockets at paths of any length."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def unix_address(path: Path) -> Iterator[str]:
    """An address to bind or connect a socket at ``path``, good within the context. Raises OSError.

    The kernel's addresses hold 107 bytes (sun_path of unix(7)), and a home directory of a long name uses them up. Through a descriptor of
    the directory only the file's own name counts.
    """
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


def listen_privately(path: Path, backlog: int = 16) -> tuple[socket.socket, os.stat_result]:
    """A non-blocking socket that listens at ``path``, for its owner alone, in place of what another process has left, or still has, there;
    and what the file is known by.

    ``backlog``: how many may wait to be accepted; a Unix socket refuses further ones at once, where TCP would let them try again.
    Raises OSError.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        os.fchmod(sock.fileno(), 0o600)  # the file that bind makes takes the socket's mode, so it is never open to others
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        unfinished.unlink(missing_ok=True)
        with unix_address(unfinished) as address:
            sock.bind(address)
        sock.listen(backlog)
        file = unfinished.stat()
        unfinished.replace(path)
    except OSError:
        sock.close()
        raise
    sock.setblocking(False)
    return sock, file

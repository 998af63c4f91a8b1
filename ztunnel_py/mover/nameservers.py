"""The name servers of /etc/resolv.conf, read anew when the file has changed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from mesh.model.address import InvalidAddress, SocketAddress, parse_ip
from mesh.model.ports import DOMAIN

RESOLV_CONF: Final = Path("/etc/resolv.conf")
_MOST_SERVERS: Final = 3
"""As many as resolvers use (resolv.conf(5), MAXNS)."""
_MOST_BYTES: Final = 1 << 16


def parse_resolv_conf(text: str) -> tuple[SocketAddress, ...]:
    """The servers that it names. Addresses with a zone are left out: they mean an interface of another namespace than the pods'."""
    found: list[SocketAddress] = []
    for line in text.splitlines():
        words = line.split()
        if len(words) > 1 and words[0] == "nameserver" and "%" not in words[1]:
            try:
                found.append(SocketAddress(parse_ip(words[1]), DOMAIN))
            except InvalidAddress:
                continue
    return tuple(found[:_MOST_SERVERS])


class ResolvConf:
    """Called, it gives the servers as they are now; none if the file cannot be read."""

    def __init__(self, path: Path = RESOLV_CONF) -> None:
        self._path = path
        self._seen: tuple[int, int] | None = None
        self._servers: tuple[SocketAddress, ...] = ()

    def __call__(self) -> Sequence[SocketAddress]:
        try:
            found = os.stat(self._path)
            seen = (found.st_mtime_ns, found.st_ino)
            if seen != self._seen:
                with self._path.open("rb") as file:
                    self._servers = parse_resolv_conf(file.read(_MOST_BYTES).decode("utf-8", "replace"))
                self._seen = seen
        except OSError:
            self._seen, self._servers = None, ()
        return self._servers

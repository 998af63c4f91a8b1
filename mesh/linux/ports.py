"""Local ports of a network namespace, taken in turn by whoever opens many connections for others.

The kernel's own choice costs more the more ports are taken: connect() looks at one after the other, and a closed connection keeps its port
for a minute (TIME_WAIT). Of a client that closes first, 38 us of CPU for each of 12 000 connections became 1.4 ms at 20 000, and at 28 000
EADDRNOTAVAIL; in turn, they stay at 38 us and go on. A port that was bound to may be had in spite of TIME_WAIT as soon as the kernel can
tell the connections apart, by their timestamps (`tcp_twsk_unique`).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Self

# Of IPv6 as well.
_RANGE: Final = Path("/proc/sys/net/ipv4/ip_local_port_range")
_RESERVED: Final = Path("/proc/sys/net/ipv4/ip_local_reserved_ports")


class LocalPorts:
    """What may be bound to of the range that connect() chooses from: the half that it leaves to bind() as long as it can, every other one.
    It passes over what somebody has bound, so from the other half applications of the namespace would find none for their own connections.
    """

    __slots__ = ("_next", "_ports", "_reserved")

    def __init__(self, ports: range, reserved: Sequence[range], first: int) -> None:
        self._ports = ports
        self._reserved = reserved
        self._next = first

    @classmethod
    def parse(cls, local_range: str, reserved: str, first: int) -> Self:
        """From the texts of `ip_local_port_range` and `ip_local_reserved_ports` (Linux, networking/ip-sysctl); ``first`` is the index to
        begin at, of any size. Raises ValueError."""
        lowest, highest = map(int, local_range.split())
        ports = range(lowest + 1, highest + 1, 2)
        kept = []
        for part in reserved.strip().split(",") if reserved.strip() else ():
            low, _, high = part.partition("-")
            kept.append(range(int(low), int(high or low) + 1))
        return cls(ports, kept, first % max(1, len(ports)))

    @classmethod
    def here(cls) -> Self:
        """Those of the calling thread's network namespace, begun anywhere, as others may open connections for the same ends; none
        where the kernel does not tell. Raises OSError."""
        try:
            return cls.parse(_RANGE.read_text(), _RESERVED.read_text(), random.randrange(1 << 16))
        except FileNotFoundError:
            return cls(range(0), (), 0)

    def take(self) -> int:
        """The next; 0 if there is none."""
        for _ in self._ports:
            port = self._ports[self._next]
            self._next = (self._next + 1) % len(self._ports)
            if not self._reserved or not any(port in kept for kept in self._reserved):
                return port
        return 0

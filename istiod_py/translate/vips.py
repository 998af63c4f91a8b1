"""Virtual addresses for hosts that have none: chosen from two reserved ranges by hashing, so that every istiod chooses alike.

Istio counts addresses up and keeps its choice in the object's status. A choice by hash needs no memory: it is the same after a restart, in
every replica, and in whatever order the objects came. What a status says already is kept all the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Final

from mesh.model.address import Cidr, IpAddress, NamespacedHostname

POOL_V4: Final = IPv4Network("240.240.0.0/16")
POOL_V6: Final = IPv6Network("2001:2::/48")


@dataclass(frozen=True, slots=True)
class Wanting:
    """A host that needs addresses; ``given``: those it was given before."""

    key: NamespacedHostname
    given: tuple[IpAddress, ...] = ()


def allocate(wanting: Sequence[Wanting], reserved: Iterable[Cidr]) -> dict[NamespacedHostname, tuple[IpAddress, ...]]:
    """One IPv4 and one IPv6 address for each host, none of them ``reserved``: what somebody else has by intent.

    Of two hosts that hash to one address the earlier in ``wanting`` has it. No address of a family whose pool is used up.
    """
    space = _Space(reserved)
    kept = [(want.key, [ip for ip in want.given if space.take(ip)]) for want in wanting]
    result: dict[NamespacedHostname, tuple[IpAddress, ...]] = {}
    for key, ips in kept:
        families = {ip.version for ip in ips}
        chosen = (None if 4 in families else space.choose_v4(key), None if 6 in families else space.choose_v6(key))
        result[key] = tuple(sorted((*ips, *(ip for ip in chosen if ip is not None)), key=lambda ip: (ip.version, ip)))
    return result


class _Space:
    """Which addresses are free. The IPv4 pool is small enough to fill up: a byte an address finds the next free one quickly."""

    def __init__(self, reserved: Iterable[Cidr]) -> None:
        self._v4 = bytearray(POOL_V4.num_addresses)
        self._v4[0] = self._v4[-1] = 1  # the network's own address and its broadcast address
        self._v6_ranges: list[IPv6Network] = []
        self._taken: set[IpAddress] = set()
        for cidr in reserved:
            if isinstance(cidr, IPv6Network):
                if cidr.overlaps(POOL_V6):
                    self._v6_ranges.append(cidr)
            elif cidr.overlaps(POOL_V4):
                first = max(_offset_v4(cidr.network_address), 0)
                last = min(_offset_v4(cidr.broadcast_address), POOL_V4.num_addresses - 1)
                self._v4[first : last + 1] = b"\1" * (last + 1 - first)

    def take(self, ip: IpAddress) -> bool:
        """Whether the address was free; now it is not."""
        if ip in self._taken or not self._is_free(ip):
            return False
        self._taken.add(ip)
        if isinstance(ip, IPv4Address) and ip in POOL_V4:
            self._v4[_offset_v4(ip)] = 1
        return True

    def _is_free(self, ip: IpAddress) -> bool:
        if isinstance(ip, IPv4Address):
            return ip not in POOL_V4 or not self._v4[_offset_v4(ip)]
        return not any(ip in cidr for cidr in self._v6_ranges)

    def choose_v4(self, key: NamespacedHostname) -> IPv4Address | None:
        start = _hash(key, 0) % POOL_V4.num_addresses
        offset = self._v4.find(0, start)
        if offset < 0:
            offset = self._v4.find(0)
        if offset < 0:
            return None
        self._v4[offset] = 1
        return POOL_V4[offset]

    def choose_v6(self, key: NamespacedHostname) -> IPv6Address | None:
        for attempt in range(_V6_ATTEMPTS):
            ip = POOL_V6[1 + _hash(key, attempt) % (POOL_V6.num_addresses - 1)]
            if self.take(ip):
                return ip
        return None


_V6_ATTEMPTS: Final = 64
"""Of 2^80 addresses the first will do, unless somebody reserved most of the pool."""


def _offset_v4(ip: IPv4Address) -> int:
    return int(ip) - int(POOL_V4.network_address)


def _hash(key: NamespacedHostname, attempt: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{key}#{attempt}".encode(), digest_size=16).digest(), "big")

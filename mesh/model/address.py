"""Addresses: where bytes go (`SocketAddress`), and how the mesh names a destination (`NetworkAddress`, `NamespacedHostname`).

IP addresses are `ipaddress` objects everywhere, IPv4-mapped IPv6 already unmapped: two spellings of one address never meet.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Final, NamedTuple, Self, TypeAlias

import msgspec

IpAddress: TypeAlias = IPv4Address | IPv6Address
Cidr: TypeAlias = IPv4Network | IPv6Network


class InvalidAddress(ValueError):
    """Bytes or text that are no IP address, CIDR or ``ip:port``."""


def unmapped(ip: IpAddress) -> IpAddress:
    """``::ffff:a.b.c.d`` as ``a.b.c.d``; anything else as it is."""
    if isinstance(ip, IPv6Address) and ip.ipv4_mapped is not None:
        return ip.ipv4_mapped
    return ip


def parse_ip(text: str) -> IpAddress:
    """An IP address from text, unmapped. Raises InvalidAddress."""
    try:
        return unmapped(ipaddress.ip_address(text))
    except ValueError as exc:
        raise InvalidAddress(f"not an IP address: {text!r}") from exc


def ip_from_bytes(packed: bytes) -> IpAddress:
    """An IP address from 4 or 16 network-order bytes, unmapped. Raises InvalidAddress."""
    if len(packed) == 4:
        return IPv4Address(packed)
    if len(packed) == 16:
        return unmapped(IPv6Address(packed))
    raise InvalidAddress(f"an IP address has 4 or 16 bytes, not {len(packed)}")


def parse_cidr(text: str) -> Cidr:
    """``ip`` or ``ip/length``; host bits may be set, as Istio takes them, and are masked. No netmask for a length and no zone, which
    Python would take and nobody else. Raises InvalidAddress."""
    _, slash, length = text.partition("/")
    if "%" in text or (slash and not (length.isascii() and length.isdigit())):
        raise InvalidAddress(f"not an IP address or CIDR: {text!r}")
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError as exc:
        raise InvalidAddress(f"not an IP address or CIDR: {text!r}") from exc


def kept_text(most: int) -> Callable[[object], str]:
    """``str`` of what does not change, for those that ask again of the same object: `ipaddress` puts an address's text together anew each
    time. At most ``most`` are kept."""
    texts: dict[int, tuple[object, str]] = {}
    """By the id of the object, which is held here so that no id gets another meaning: `ipaddress` hashes and compares in Python."""

    def text(value: object) -> str:
        kept = texts.get(id(value))
        if kept is None:
            if len(texts) >= most:
                texts.clear()
            kept = texts[id(value)] = value, str(value)
        return kept[1]

    return text


ip_text: Final[Callable[[IpAddress], str]] = kept_text(4096)
"""The text of an address: a connection asks several times."""


class SocketAddress(NamedTuple):
    """An IP address and a TCP port. ``str()`` gives ``10.0.0.1:80`` or ``[fd00::1]:80``, the form of an HBONE authority."""

    ip: IpAddress
    port: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse ``10.0.0.1:80`` or ``[fd00::1]:80``; port 1-65535, no signs or spaces. Raises InvalidAddress."""
        host, colon, port = text.rpartition(":")
        if not (colon and port.isascii() and port.isdigit() and 1 <= len(port) <= 5 and 0 < int(port) < 65536):
            raise InvalidAddress(f"not ip:port: {text!r}")
        bracketed = host.startswith("[") and host.endswith("]")
        ip = parse_ip(host[1:-1] if bracketed else host)
        if bracketed != (":" in host):
            raise InvalidAddress(f"not ip:port: {text!r}")
        return cls(ip, int(port))

    def __str__(self) -> str:
        ip = ip_text(self.ip)
        return f"[{ip}]:{self.port}" if ":" in ip else f"{ip}:{self.port}"


class NetworkAddress(msgspec.Struct, frozen=True, cache_hash=True):
    """An IP within a network (``""`` is the default one). ``str()`` is Istio's xDS key, ``network/ip``.

    A key of many indices, as is a `NamespacedHostname`: hashed once, and compared, without a line of Python but for the IP's.
    """

    network: str
    ip: IpAddress

    def __str__(self) -> str:
        return f"{self.network}/{self.ip}"


class NamespacedHostname(msgspec.Struct, frozen=True, order=True, cache_hash=True):
    """A service's name in the mesh. ``str()`` is Istio's xDS key, ``namespace/hostname``."""

    namespace: str
    hostname: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse ``namespace/hostname``. Raises InvalidAddress."""
        namespace, slash, hostname = text.partition("/")
        if not (slash and namespace and hostname) or "/" in hostname:
            raise InvalidAddress(f"not namespace/hostname: {text!r}")
        return cls(namespace, hostname)

    def __str__(self) -> str:
        return f"{self.namespace}/{self.hostname}"


@dataclass(frozen=True, slots=True)
class GatewayAddress:
    """Where a waypoint or network gateway is reached: by address or by service hostname, and its HBONE port."""

    destination: NetworkAddress | NamespacedHostname
    hbone_mtls_port: int = 15008

"""The `:authority` of a CONNECT: where the tunnel shall lead.

Forms (Istio): ``10.0.0.1:80``, ``[fd00::1]:80`` and, through a gateway, ``reviews.default.svc.cluster.local:80``.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple, TypeAlias

from mesh.model.address import InvalidAddress, SocketAddress
from mesh.wire.errors import RemoteProtocolError


class HostPort(NamedTuple):
    """A hostname, as it was spelled, and a TCP port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


Authority: TypeAlias = SocketAddress | HostPort

# What looks like an address must be one: the last label of a hostname is not all digits (RFC 3696 section 2), so 10.0.0.999 and
# 10.0.0.1.5 are nothing at all rather than names. No zone index: it would name an interface of the sender's.
_ADDRESS = re.compile(r"(?:[0-9]{1,3}(?:\.[0-9]{1,3}){3}|\[[0-9A-Fa-f:.]{2,45}\]):[0-9]{1,5}")
_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_HOST = re.compile(rf"((?:{_LABEL}\.)*(?![0-9]+:){_LABEL}):([0-9]{{1,5}})")
_LONGEST_HOST = 253
_LONGEST = _LONGEST_HOST + len(":65535")


def parse_authority(text: str) -> Authority:
    """Parse ``ip:port``, ``[v6]:port`` or ``hostname:port``, port 1-65535, no user information. Raises RemoteProtocolError."""
    if len(text) > _LONGEST:
        raise RemoteProtocolError(f"invalid authority: {text[:32]!r}... ({len(text)} characters)")
    return _parse(text)


# A server is asked for the same few addresses, its own, over and over. Failures are not cached, so an entry has at most 259 characters.
@lru_cache(maxsize=1024)
def _parse(text: str) -> Authority:
    if _ADDRESS.fullmatch(text):
        try:
            return SocketAddress.parse(text)
        except InvalidAddress as exc:
            raise RemoteProtocolError(f"invalid authority: {text!r}") from exc
    match = _HOST.fullmatch(text)
    if match is None or len(match[1]) > _LONGEST_HOST or not 0 < int(match[2]) < 65536:
        raise RemoteProtocolError(f"invalid authority: {text!r}")
    return HostPort(match[1], int(match[2]))

"""PROXY protocol (haproxy's proxy-protocol.txt): the header before a connection's bytes; in version 2 with Istio's identity TLV.

So a waypoint behind an application tunnel learns who the client is, and so does an application that asks for it by a DestinationRule.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from mesh.model.address import SocketAddress, ip_from_bytes, ip_text
from mesh.wire.errors import RemoteProtocolError

SIGNATURE: Final = b"\r\n\r\n\0\r\nQUIT\n"
IDENTITY_TLV: Final = 0xD0
"""The source's SPIFFE URI."""
MAX_HEADER: Final = 4096
"""More than addresses and any identity need; senders may say 64 KiB."""

_PREFIX: Final = len(SIGNATURE) + 4
_LOCAL, _PROXY = 0x20, 0x21
_UNSPECIFIED, _STREAM_4, _STREAM_6 = 0x00, 0x11, 0x21
_ADDRESS_BYTES: Final = {_STREAM_4: 12, _STREAM_6: 36}


@dataclass(frozen=True, slots=True)
class ProxyHeader:
    """``source`` and ``destination`` are None together: LOCAL (the sender speaks for itself) or an address family we do not take."""

    source: SocketAddress | None
    destination: SocketAddress | None
    identity: str | None = None
    size: int = 0
    """Bytes of the header: what follows is the connection's."""


def encode_header(source: SocketAddress, destination: SocketAddress, identity: str | None = None) -> bytes:
    """A PROXY header over TCP. Addresses of different families cannot be said together: then only the identity is."""
    if source.ip.version != destination.ip.version:
        family, body = _UNSPECIFIED, b""
    else:
        family = _STREAM_4 if source.ip.version == 4 else _STREAM_6
        body = source.ip.packed + destination.ip.packed + source.port.to_bytes(2, "big") + destination.port.to_bytes(2, "big")
    if identity is not None:
        value = identity.encode()
        body += bytes((IDENTITY_TLV,)) + len(value).to_bytes(2, "big") + value
    return SIGNATURE + bytes((_PROXY, family)) + len(body).to_bytes(2, "big") + body


def encode_local() -> bytes:
    """A header that says nothing of a client: the sender speaks for itself."""
    return SIGNATURE + bytes((_LOCAL, _UNSPECIFIED, 0, 0))


def encode_text(source: SocketAddress | None, destination: SocketAddress | None) -> bytes:
    """A header of version 1, one line. Without addresses, or with such of different families, it says UNKNOWN."""
    if source is None or destination is None or source.ip.version != destination.ip.version:
        return b"PROXY UNKNOWN\r\n"
    ends = f"{ip_text(source.ip)} {ip_text(destination.ip)} {source.port} {destination.port}"
    return f"PROXY TCP{source.ip.version} {ends}\r\n".encode()


def parse_header(data: bytes) -> ProxyHeader | None:
    """The header that ``data`` begins with; None while more bytes are needed (never more than MAX_HEADER). Raises RemoteProtocolError."""
    if not SIGNATURE.startswith(data[: len(SIGNATURE)]):
        raise RemoteProtocolError("no PROXY protocol version 2 header")
    if len(data) < _PREFIX:
        return None
    command, family = data[len(SIGNATURE)], data[len(SIGNATURE) + 1]
    size = _PREFIX + int.from_bytes(data[_PREFIX - 2 : _PREFIX], "big")
    if command not in (_LOCAL, _PROXY):
        raise RemoteProtocolError(f"PROXY protocol version and command {command:#04x}")
    if size > MAX_HEADER:
        raise RemoteProtocolError(f"PROXY header of {size} bytes")
    if len(data) < size:
        return None
    return _parse_body(command, family, data[_PREFIX:size], size)


def _parse_body(command: int, family: int, body: bytes, size: int) -> ProxyHeader:
    if command == _LOCAL:
        return ProxyHeader(None, None, None, size)
    if family == _UNSPECIFIED:
        return ProxyHeader(None, None, _find_identity(body), size)
    if (length := _ADDRESS_BYTES.get(family)) is None:
        return ProxyHeader(None, None, None, size)
    if len(body) < length:
        raise RemoteProtocolError("PROXY header without room for its addresses")
    width = (length - 4) // 2
    source = SocketAddress(ip_from_bytes(body[:width]), int.from_bytes(body[length - 4 : length - 2], "big"))
    destination = SocketAddress(ip_from_bytes(body[width : 2 * width]), int.from_bytes(body[length - 2 : length], "big"))
    return ProxyHeader(source, destination, _find_identity(body[length:]), size)


def _find_identity(tlvs: bytes) -> str | None:
    """The first identity TLV."""
    position = 0
    while position < len(tlvs):
        end = position + 3 + int.from_bytes(tlvs[position + 1 : position + 3], "big")
        if position + 3 > len(tlvs) or end > len(tlvs):
            raise RemoteProtocolError("PROXY header ends within a TLV")
        if tlvs[position] == IDENTITY_TLV:
            try:
                return tlvs[position + 3 : end].decode()
            except UnicodeDecodeError as exc:
                raise RemoteProtocolError("PROXY identity is not UTF-8") from exc
        position = end
    return None

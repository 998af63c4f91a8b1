"""The name that a TLS client asks for, read from its first bytes; everything else in them is nobody's business here. Pure.

RFC 8446 section 4.1.2 and RFC 6066 section 3. What is malformed has no name: whoever terminates the TLS refuses it.
"""

from __future__ import annotations

from typing import Final

MAX_HELLO: Final = 16 * 1024 + 5
"""Bytes looked at: one record. A hello that is spread over several names nobody."""
_HANDSHAKE: Final = 0x16
_CLIENT_HELLO: Final = 1
_SERVER_NAME: Final = 0
_HOST_NAME: Final = 0


class NotYet(Exception):
    """More bytes are needed."""


def is_tls(data: bytes) -> bool:
    """Whether these may be the first bytes of TLS."""
    return data[:1] == b"\x16" and data[1:2] in (b"", b"\x03")


def find_server_name(data: bytes) -> str | None:
    """The name, in lower case; None if there is none. Raises NotYet."""
    if not is_tls(data):
        if not data:
            raise NotYet
        return None
    if len(data) < 5:
        raise NotYet
    length = int.from_bytes(data[3:5], "big")
    if length > MAX_HELLO - 5:
        return None
    if len(data) < 5 + length:
        raise NotYet
    try:
        return _read_hello(_Reader(data[5 : 5 + length]))
    except _Short:
        return None


class _Short(Exception):
    """It ends too early."""


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def take(self, size: int) -> bytes:
        if self.at + size > len(self.data):
            raise _Short
        taken = self.data[self.at : self.at + size]
        self.at += size
        return taken

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def vector(self, size: int) -> _Reader:
        """Bytes with their length before them."""
        return _Reader(self.take(self.number(size)))

    @property
    def over(self) -> bool:
        return self.at >= len(self.data)


def _read_hello(record: _Reader) -> str | None:
    if record.number(1) != _CLIENT_HELLO:
        return None
    hello = record.vector(3)
    hello.take(2 + 32)  # version, random
    hello.vector(1)  # session
    hello.vector(2)  # cipher suites
    hello.vector(1)  # compression
    extensions = hello.vector(2)
    while not extensions.over:
        kind, body = extensions.number(2), extensions.vector(2)
        if kind == _SERVER_NAME:
            return _read_names(body.vector(2))
    return None


def _read_names(names: _Reader) -> str | None:
    while not names.over:
        kind, name = names.number(1), names.vector(2)
        if kind == _HOST_NAME:
            try:
                text = name.data.decode("ascii")
            except UnicodeDecodeError:
                return None
            return text.lower() if 0 < len(text) <= 253 and text.isprintable() else None
    return None

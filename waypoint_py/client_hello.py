"""The name that a TLS client asks for, read from its first bytes; everything else in them is nobody's business here. Pure.

RFC 8446 section 4.1.2 and RFC 6066 section 3. A server may understand more than we do, so what is no hello that we can read does not count
as one without a name: the name is `HIDDEN`.
"""

from __future__ import annotations

from enum import Enum
from typing import Final, TypeAlias

MAX_HELLO: Final = 16 * 1024
"""Bytes of a hello that is looked at; real ones have one or two thousand."""
MAX_RECORDS: Final = 64
"""Over which it may be spread."""
_RECORD_HEADER: Final = 5
_HANDSHAKE: Final = b"\x16"
_MAJOR_VERSION: Final = b"\x03"
_RECORD_TYPES: Final = frozenset(range(0x14, 0x18))
_CLIENT_HELLO: Final = b"\x01"
_SERVER_NAME: Final = 0
_HOST_NAME: Final = 0


class Hidden(Enum):
    """There may be a name, and nobody knows which."""

    HIDDEN = "hidden"


HIDDEN: Final = Hidden.HIDDEN
ServerName: TypeAlias = str | Hidden | None
"""In lower case; None: there is none."""


class NotYet(Exception):
    """More bytes are needed."""


def is_tls(data: bytes) -> bool:
    """Whether these may be the first bytes of TLS, be it an alert that comes before the hello."""
    return bool(data) and data[0] in _RECORD_TYPES and data[1:2] in (b"", _MAJOR_VERSION)


def find_server_name(data: bytes) -> ServerName:
    """The name. Raises NotYet."""
    if not data:
        raise NotYet
    hello = b""
    at = 0
    for _ in range(MAX_RECORDS):
        header = data[at : at + _RECORD_HEADER]
        if header[:1] not in (b"", _HANDSHAKE) or header[1:2] not in (b"", _MAJOR_VERSION):
            return HIDDEN
        if len(header) < _RECORD_HEADER:
            raise NotYet
        length = int.from_bytes(header[3:], "big")
        at += _RECORD_HEADER
        hello += data[at : at + length]
        at += length
        if not length or len(hello) + max(0, at - len(data)) > MAX_HELLO or hello[:1] not in (b"", _CLIENT_HELLO):
            return HIDDEN
        if len(hello) >= 4 and len(hello) >= 4 + int.from_bytes(hello[1:4], "big"):
            return _read(hello)
        if at > len(data):
            raise NotYet
    return HIDDEN


def _read(hello: bytes) -> ServerName:
    try:
        return _read_hello(_Reader(hello))
    except _Short:
        return HIDDEN


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


def _read_hello(message: _Reader) -> ServerName:
    message.take(1)
    hello = message.vector(3)
    hello.take(2 + 32)  # version, random
    hello.vector(1)  # session
    hello.vector(2)  # cipher suites
    hello.vector(1)  # compression
    if hello.over:
        return None
    extensions = hello.vector(2)
    while not extensions.over:
        kind, body = extensions.number(2), extensions.vector(2)
        if kind == _SERVER_NAME:
            return _read_names(body.vector(2))
    return None


def _read_names(names: _Reader) -> ServerName:
    while not names.over:
        kind, name = names.number(1), names.vector(2)
        if kind == _HOST_NAME:
            try:
                text = name.data.decode("ascii")
            except UnicodeDecodeError:
                return HIDDEN
            return text.lower() if 0 < len(text) <= 253 and text.isprintable() else HIDDEN
    return None

"""gRPC on the wire, without I/O: message framing, status, timeouts (grpc/doc/PROTOCOL-HTTP2.md).

HTTP/2 itself is not here, but in `mesh.http.h2`; `mesh.rpc` puts the two together.
"""

from __future__ import annotations

import math
import re
from collections import deque
from enum import IntEnum
from typing import Final

from mesh.wire.errors import ErrorCode, RemoteProtocolError

HEADER_SIZE: Final = 5


class Status(IntEnum):
    """Status codes (grpc/doc/statuscodes.md)."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class MessageTooLarge(RemoteProtocolError):
    """The peer announced a message beyond our limit; nothing of it was kept."""

    def __init__(self, size: int, limit: int) -> None:
        super().__init__(f"message of {size} bytes is larger than {limit}", ErrorCode.ENHANCE_YOUR_CALM)


def message_header(size: int) -> bytes:
    """The five bytes before an uncompressed message of ``size`` bytes."""
    return b"\0" + size.to_bytes(4, "big")


class MessageReader:
    """Cuts DATA payloads into messages. Keeps at most one unfinished message, never more than ``max_message`` + 5 bytes of it."""

    def __init__(self, max_message: int) -> None:
        self._max_message = max_message
        self._partial = bytearray()
        self._wanted: int | None = None
        self._complete: deque[bytes] = deque()

    def receive(self, data: bytes | bytearray) -> None:
        """Take the next bytes. Raises RemoteProtocolError for a compressed message, MessageTooLarge for one beyond the limit."""
        self._partial += data
        position = 0
        while True:
            if self._wanted is None:
                if len(self._partial) - position < HEADER_SIZE:
                    break
                self._wanted = self._read_header(position)
                position += HEADER_SIZE
            if len(self._partial) - position < self._wanted:
                break
            self._complete.append(bytes(memoryview(self._partial)[position : position + self._wanted]))
            position += self._wanted
            self._wanted = None
        if position:
            del self._partial[:position]

    def next_message(self) -> bytes | None:
        """The next whole message, or None when more bytes are needed."""
        return self._complete.popleft() if self._complete else None

    def finish(self) -> None:
        """The peer ended its stream. Raises RemoteProtocolError when it did so within a message."""
        if self._partial or self._wanted is not None:
            raise RemoteProtocolError("stream ended within a message")

    def _read_header(self, position: int) -> int:
        flags = self._partial[position]
        if flags:
            raise RemoteProtocolError(
                "compressed message although no encoding was offered" if flags == 1 else f"unknown message flags {flags:#x}"
            )
        size = int.from_bytes(self._partial[position + 1 : position + HEADER_SIZE], "big")
        if size > self._max_message:
            raise MessageTooLarge(size, self._max_message)
        return size


_TIMEOUT = re.compile(r"([0-9]{1,8})([HMSmun])", re.ASCII)
_UNITS: Final = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}


def encode_timeout(seconds: float) -> str:
    """``grpc-timeout`` in the finest unit whose value has at most eight digits, rounded up; a past deadline becomes ``1n``."""
    for unit, size in (("n", 1e-9), ("u", 1e-6), ("m", 1e-3), ("S", 1.0), ("M", 60.0)):
        if (value := max(1, math.ceil(seconds / size))) < 10**8:
            return f"{value}{unit}"
    return f"{min(10**8 - 1, math.ceil(seconds / 3600))}H"


def parse_timeout(text: str) -> float:
    """Seconds of a ``grpc-timeout``. Raises RemoteProtocolError."""
    if (match := _TIMEOUT.fullmatch(text)) is None:
        raise RemoteProtocolError(f"invalid grpc-timeout {text[:40]!r}")
    return int(match[1]) * _UNITS[match[2]]


def encode_status_message(text: str) -> str:
    """``grpc-message``: UTF-8, percent-encoded outside printable ASCII."""
    return "".join(chr(byte) if 0x20 <= byte <= 0x7E and byte != 0x25 else f"%{byte:02X}" for byte in text.encode("utf-8", "replace"))


_ESCAPE = re.compile(rb"%([0-9A-Fa-f]{2})")


def decode_status_message(text: str) -> str:
    """The text of a ``grpc-message``; what is not valid percent-encoding stays as it is, as the specification asks."""
    raw = text.encode("utf-8", "replace")
    return _ESCAPE.sub(lambda match: bytes((int(match[1], 16),)), raw).decode("utf-8", "replace")


_BY_TEXT: Final = {str(int(status)): status for status in Status}


def parse_status(text: str) -> Status:
    """``grpc-status``; numbers nobody defined are UNKNOWN."""
    known = _BY_TEXT.get(text)
    if known is not None:
        return known
    try:
        return Status(int(text)) if text.isascii() and text.isdigit() and len(text) < 4 else Status.UNKNOWN
    except ValueError:
        return Status.UNKNOWN


_FROM_HTTP: Final = {
    400: Status.INTERNAL,
    401: Status.UNAUTHENTICATED,
    403: Status.PERMISSION_DENIED,
    404: Status.UNIMPLEMENTED,
    429: Status.UNAVAILABLE,
    502: Status.UNAVAILABLE,
    503: Status.UNAVAILABLE,
    504: Status.UNAVAILABLE,
}


def status_from_http(status: int) -> Status:
    """What an HTTP status without ``grpc-status`` means (grpc/doc/http-grpc-status-mapping.md)."""
    return _FROM_HTTP.get(status, Status.UNKNOWN)


_FROM_RESET: Final[dict[int, Status]] = {
    ErrorCode.REFUSED_STREAM: Status.UNAVAILABLE,
    ErrorCode.CANCEL: Status.CANCELLED,
    ErrorCode.ENHANCE_YOUR_CALM: Status.RESOURCE_EXHAUSTED,
    ErrorCode.INADEQUATE_SECURITY: Status.PERMISSION_DENIED,
}


def status_from_reset(code: int) -> Status:
    """What an RST_STREAM code means for the call (PROTOCOL-HTTP2.md, Errors)."""
    return _FROM_RESET.get(code, Status.INTERNAL)

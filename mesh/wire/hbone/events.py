"""What an HBONE connection tells its driver. Reading these is reading the protocol.

Lifetime: `TunnelData.data` is a slice of the buffer given to ``receive``; it is valid until the next ``receive`` on the same
buffer, so a driver that cannot send it on at once copies it. Everything else may be kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from mesh.wire.authority import Authority
from mesh.wire.errors import ErrorCode


# Those of which every tunnel or every message has some are not frozen: a frozen one costs twice as much to make.
@dataclass(slots=True)
class TunnelRequested:
    """Server: a well-formed CONNECT. Answer with ``accept`` or ``refuse``. `TunnelData` may come before the answer.

    ``headers`` has lower-case names and no pseudo-headers; values of a repeated header are joined with a comma.
    """

    stream: int
    authority: str
    target: Authority
    """``authority``, parsed: an address and port, or a hostname and port."""
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class RequestRefused:
    """Server: a request that the core itself answered, since it is no CONNECT to a valid authority. Only to be logged."""

    stream: int
    status: int
    because: str


@dataclass(slots=True)
class TunnelResponded:
    """Client: the final answer to ``request_tunnel``. 200 opens the tunnel; after any other status the stream is already gone."""

    stream: int
    status: int
    headers: Mapping[str, str]


@dataclass(slots=True)
class TunnelData:
    """Payload, never empty; give its length back with ``consumed`` once it has moved on. A DATA frame may come as several of these."""

    stream: int
    data: memoryview


@dataclass(slots=True)
class TunnelEnded:
    """The peer sends no more on this stream (END_STREAM); our direction stays open until ``end``."""

    stream: int


@dataclass(frozen=True, slots=True)
class TunnelReset:
    """The stream is gone in both directions: the peer reset it, broke its rules, or said in GOAWAY that it never looked at it."""

    stream: int
    code: int

    @property
    def is_eof(self) -> bool:
        """NO_ERROR and CANCEL are how peers drop a stream that they are done with: to be read as end of file, not as an error."""
        return self.code in (ErrorCode.NO_ERROR, ErrorCode.CANCEL)

    @property
    def is_retryable(self) -> bool:
        """The peer promises that it has not acted on the request (RFC 9113 section 8.7): another connection may be tried."""
        return self.code == ErrorCode.REFUSED_STREAM


@dataclass(frozen=True, slots=True)
class WindowOpened:
    """A window that allowed nothing allows something now: of one stream, or of the connection (``None``). See ``sendable``."""

    stream: int | None


@dataclass(frozen=True, slots=True)
class MoreStreamsAllowed:
    """The peer has raised how many streams may be open at once."""


@dataclass(frozen=True, slots=True)
class GoingAway:
    """The peer sent GOAWAY. Streams above ``last_stream`` follow as `TunnelReset` with REFUSED_STREAM; the others go on."""

    last_stream: int
    code: int


@dataclass(frozen=True, slots=True)
class PingAcknowledged:
    """The answer to our ``ping`` with the same 8 bytes."""

    data: bytes


HboneEvent: TypeAlias = (
    TunnelRequested
    | RequestRefused
    | TunnelResponded
    | TunnelData
    | TunnelEnded
    | TunnelReset
    | WindowOpened
    | MoreStreamsAllowed
    | GoingAway
    | PingAcknowledged
)

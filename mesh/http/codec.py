"""What a codec is: bytes in, events out; calls in, bytes out. No socket, no clock. HTTP/1.1 and HTTP/2 are the same to whoever drives them.

A *stream* is one request and its response: an HTTP/2 stream, or one turn of an HTTP/1.1 connection (numbered 1, 3, 5 ... like HTTP/2's).
What breaks the protocol for the connection as a whole is a `RemoteProtocolError`; what breaks it for one stream is that stream's event.

Back-pressure: the driver says how much of a stream's body has moved on (`consumed`); what has not stays with the peer (HTTP/2: no window
is opened; HTTP/1.1: the driver stops reading while `wants_data` is False). In the other direction `room` says how much may be sent now.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from mesh.http.message import Headers, Request, Response


@dataclass(slots=True)
class RequestHead:
    """A request began. ``ended``: it has no body, and no `BodyEnd` will come."""

    stream: int
    request: Request
    ended: bool


@dataclass(slots=True)
class RefusedHead:
    """A request that must not go on: answer ``status`` (400, 403, 408, 417, 426, 431, 501) with ``reason`` in the access log. ``request``
    is what could be read of it, for the log. HTTP/1.1: the connection closes after the answer."""

    stream: int
    status: int
    reason: str
    request: Request | None = None


@dataclass(slots=True)
class ResponseHead:
    """A response began, or an informational one (1xx; 101 is final: the connection is a byte stream from then on)."""

    stream: int
    response: Response
    ended: bool


@dataclass(slots=True)
class BodyData:
    """A piece of a body, valid during the call that returned it, unless ``bytes``."""

    stream: int
    data: bytes | memoryview


@dataclass(slots=True)
class BodyEnd:
    """A body ended; ``trailers`` without framing and routing headers, empty if there were none."""

    stream: int
    trailers: Headers


@dataclass(slots=True)
class StreamReset:
    """The peer gave the stream up, or broke the protocol in it. ``code`` as of HTTP/2; ``untouched``: it surely did nothing with the
    request (REFUSED_STREAM, or GOAWAY below it), so that it may be sent again."""

    stream: int
    code: int
    reason: str
    untouched: bool = False


@dataclass(slots=True)
class GoingAway:
    """The peer takes no new streams on this connection. ``code`` as of HTTP/2, 0 where nothing is wrong, and the peer's ``why``."""

    code: int = 0
    why: str = ""


Event: TypeAlias = RequestHead | RefusedHead | ResponseHead | BodyData | BodyEnd | StreamReset | GoingAway


class Codec(Protocol):
    """Common to both ends."""

    @property
    def unsent(self) -> int:
        """Bytes that `take_outgoing` would return: the driver bounds them."""

    @property
    def wants_data(self) -> bool:
        """Whether to read on. False: what was read is enough until something is consumed or answered."""

    @property
    def finished(self) -> bool:
        """Whether the connection is of no more use once `take_outgoing` has been sent: close it then."""

    def receive(self, data: bytes | memoryview) -> Sequence[Event]:
        """Bytes of the peer; what they mean. Raises RemoteProtocolError; then send `take_outgoing` and close."""

    def receive_eof(self) -> Sequence[Event]:
        """The peer sends no more."""

    def take_outgoing(self) -> bytes:
        """Everything that is to be sent; empty if nothing is."""

    def room(self, stream: int) -> int:
        """Bytes of body that may be given to `send_data` now. Grows with the peer's windows: ask again after every `receive`."""

    def send_data(self, stream: int, data: bytes | memoryview) -> None:
        """A piece of our body, at most `room`. The bytes are copied or sent before this returns."""

    def send_end(self, stream: int, trailers: Headers | None = None) -> None:
        """Our body is complete."""

    def reset(self, stream: int, code: int) -> None:
        """Give the stream up. HTTP/1.1: the connection is `finished`."""

    def consumed(self, stream: int, size: int) -> None:
        """So many bytes of the peer's body have moved on."""


class ServerCodec(Codec, Protocol):
    """We answer."""

    @property
    def holds(self) -> bool:
        """HTTP/1.1: bytes of what comes next are here, to be looked at by ``receive(b"")`` when the request before is done with."""

    @property
    def amid_head(self) -> bool:
        """HTTP/1.1: a request's head has begun to come, and nothing else is waited for. The driver bounds how long."""

    def give_up_head(self) -> Sequence[Event]:
        """It has taken too long: a `RefusedHead` of 408."""

    def send_informational(self, stream: int, status: int, headers: Headers) -> None:
        """100 or 103. Ignored where the client cannot take it (HTTP/1.0)."""

    def send_response(self, stream: int, response: Response, *, ended: bool) -> None:
        """The head; ``ended``: no body follows. A 101 (or the 200 of an extended CONNECT) makes the stream one of raw bytes both ways."""

    def go_away(self) -> None:
        """Take no further requests: HTTP/2 GOAWAY, HTTP/1.1 ``connection: close`` with the next response. Idempotent."""


class ClientCodec(Codec, Protocol):
    """We ask."""

    @property
    def capacity(self) -> int:
        """Requests that may be begun now."""

    def send_request(self, request: Request, *, ended: bool) -> int:
        """The head; returns the stream. ``ended``: no body follows."""

    @property
    def reusable(self) -> bool:
        """Whether another request may follow on this connection, now or when the present one is over. Where none may, because it is
        `finished` or for another reason, `capacity` is 0 too."""

    @property
    def upgrades(self) -> bool | None:
        """Whether the server takes a request with ``upgrade``; None: it has not said yet, ask again when it has been heard."""

    @property
    def pings(self) -> int:
        """Pings of ours that wait for their answer; always 0 where the protocol has none."""

    def ping(self) -> None:
        """Ask for a sign of life."""

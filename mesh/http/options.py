"""What the server codecs may be told: how much a head may hold, how paths are spelt, which protocols may be upgraded to."""

from __future__ import annotations

from dataclasses import dataclass, field

from mesh.model.l7.waypoint import PathNormalization


@dataclass(frozen=True, slots=True)
class HeadLimits:
    """Of one request's or response's head, and of trailers: bytes (with the request line; in HTTP/2 as RFC 9113 counts them, 32 more a
    field) and fields. Envoy's defaults."""

    size: int = 60 * 1024
    count: int = 100


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Of a listener. Codecs of all its connections share one value."""

    scheme: bytes = b"http"
    """What an HTTP/1.1 request is taken to use; an HTTP/2 one says so itself."""
    paths: PathNormalization = PathNormalization.BASE
    http10: bool = False
    """Take HTTP/1.0 (426 otherwise). A request without ``host`` is for ``default_host`` then."""
    default_host: bytes = b""
    upgrades: frozenset[bytes] = frozenset({b"websocket"})
    """Protocols in lower case. A request to change to another is an ordinary request (HTTP/1.1) or gets 501 (HTTP/2)."""
    limits: HeadLimits = field(default_factory=HeadLimits)
    max_streams: int = 1024
    """HTTP/2: requests at once on one connection; more get REFUSED_STREAM. Envoy's default."""
    stream_window: int = 256 * 1024
    """HTTP/2: bytes of a body that a client may send ahead of what has moved on."""

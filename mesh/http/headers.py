"""What a header may look like, which headers end here, and what the rest of a head says about framing: the same for all four codecs.

Names and values are checked by deleting what is allowed (`bytes.translate`) from all of them joined: nothing may be left over.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Final

from mesh.http.message import Headers


class BadHead(Exception):
    """A head that must not go on. It stays within `mesh.http`: codecs make a `RefusedHead` or a `StreamReset` of it."""

    def __init__(self, reason: str, status: int = 400) -> None:
        super().__init__(reason)
        self.reason = reason
        self.status = status


LOWER_TOKEN: Final = b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyz"  # RFC 9110 section 5.6.2, as names are here
TOKEN: Final = LOWER_TOKEN + b"ABCDEFGHIJKLMNOPQRSTUVWXYZ"
FIELD_TEXT: Final = b"\t" + bytes(range(0x20, 0x7F)) + bytes(range(0x80, 0x100))
"""What a value may hold (RFC 9110 section 5.5): all but control characters."""

FRAMING: Final = frozenset(
    {b"connection", b"content-length", b"host", b"http2-settings", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade"}
)
"""Names that codecs write themselves or not at all, whatever a list of headers says."""

# A client that has these removed on the way (RFC 9110 section 7.6.1 would let it) changes the message's end, its destination, or what
# is known of who sent it. Nobody does that who means well.
_CRITICAL: Final = frozenset(
    {
        b"authorization",
        b"content-length",
        b"cookie",
        b"forwarded",
        b"host",
        b"x-forwarded-client-cert",
        b"x-forwarded-for",
        b"x-forwarded-host",
        b"x-forwarded-proto",
        b"x-request-id",
    }
)

# RFC 9110 section 6.5.1: framing, routing, request modifiers, authentication, response control. grpc-status and its like pass.
_NO_TRAILERS: Final = FRAMING | {
    b"age",
    b"authorization",
    b"cache-control",
    b"content-encoding",
    b"content-range",
    b"content-type",
    b"cookie",
    b"date",
    b"expect",
    b"expires",
    b"forwarded",
    b"location",
    b"max-forwards",
    b"pragma",
    b"proxy-authenticate",
    b"proxy-authorization",
    b"range",
    b"retry-after",
    b"set-cookie",
    b"te",
    b"trailer",
    b"vary",
    b"warning",
    b"www-authenticate",
    b"x-forwarded-client-cert",
    b"x-forwarded-for",
    b"x-forwarded-host",
    b"x-forwarded-proto",
}

_NOTHING_NAMED: Final[frozenset[bytes]] = frozenset()


def clean_trailers(fields: Iterable[tuple[bytes, bytes]]) -> Headers:
    """Trailers that may go on. What would change a head's meaning is dropped: somebody further on may merge the two."""
    return [pair for pair in fields if pair[0] not in _NO_TRAILERS]


def read_length(values: Sequence[bytes]) -> int:
    """The body's size as ``content-length`` says. Repetitions of one value are one; everything but digits is refused."""
    first = values[0]
    if not first.isdigit() or len(first) > 18:
        raise BadHead("invalid content-length")
    if any(value != first for value in values):
        raise BadHead("several content-lengths")
    return int(first)


def read_coding(values: Sequence[bytes], *, length: bool, http10: bool) -> None:
    """Return if ``transfer-encoding`` is ``chunked`` and nothing else, and nothing contradicts it (RFC 9112 section 6.1)."""
    if length:
        raise BadHead("transfer-encoding beside content-length")
    if http10:
        raise BadHead("transfer-encoding in HTTP/1.0")
    if len(values) != 1 or values[0].lower() != b"chunked":
        raise BadHead("transfer-encoding other than chunked", 501)


def read_connection(value: bytes) -> frozenset[bytes]:
    """The options of ``connection`` (several joined by ``,``), in lower case: ``close`` and names of headers that end here."""
    return _read_connection(value.lower()) if value else _NOTHING_NAMED


@lru_cache(maxsize=256)  # failures are not kept, and an option list of this size has at most 512 bytes
def _read_short_connection(value: bytes) -> frozenset[bytes]:
    named = frozenset(filter(None, [option.strip(b" \t") for option in value.split(b",")]))
    for option in named:
        if option.translate(None, LOWER_TOKEN):
            raise BadHead("connection names what is no header")
        if option in _CRITICAL:
            raise BadHead(f"connection names {option.decode()}")
    return named


def _read_connection(value: bytes) -> frozenset[bytes]:
    if len(value) > 512:
        raise BadHead("connection with too many options")
    return _read_short_connection(value)


_HOST_CHARACTERS: Final = b"-._~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz%!$&'()*+;=:[]"
_V6_CHARACTERS: Final = b"0123456789ABCDEFabcdef:."
SPACE: Final = ord(" ")
TAB: Final = ord("\t")
"""To be looked for by number, for every request: where it is told to look for bytes CPython takes them for a number first, and writes the
text of an error that nobody sees. That is most of what such a look costs."""
_LONGEST_AUTHORITY: Final = 261


def check_authority(authority: bytes) -> None:
    """``host``, ``host:port`` or ``[v6]:port`` without user information. Host names are not looked into further."""
    if len(authority) > _LONGEST_AUTHORITY:
        raise BadHead("authority too long")
    reason = _judge_authority(authority)
    if reason:
        raise BadHead(reason)


@lru_cache(maxsize=1024)  # clients name the same few; an entry has at most 261 bytes
def _judge_authority(authority: bytes) -> str:
    if b"@" in authority:
        return "user information in authority"
    if not authority or authority.translate(None, _HOST_CHARACTERS):
        return "invalid authority"
    if authority[:1] == b"[":
        host, bracket, port = authority[1:].partition(b"]")
        if not bracket or not host or host.translate(None, _V6_CHARACTERS) or port[:1] not in (b"", b":"):
            return "invalid authority"
        port = port[1:]
    else:
        host, _, port = authority.partition(b":")
        if not host or b"[" in host or b"]" in host:
            return "invalid authority"
    if port and (not port.isdigit() or len(port) > 5 or int(port) > 65535):
        return "invalid port in authority"
    return ""

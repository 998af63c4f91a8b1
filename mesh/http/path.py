"""One spelling for a request's path: what is routed, judged and forwarded is the same string, and normalising it again changes nothing.

Istio's four modes (mesh config ``pathNormalization``). BASE is Envoy's: ``\\`` is ``/``, dot segments are resolved, escapes of unreserved
characters are undone, what a URL's path may not hold is escaped. MERGE_SLASHES makes one slash of several besides; and
DECODE_AND_MERGE_SLASHES undoes ``%2F`` and ``%5C`` first. Whatever else is escaped stays so, in the case it came: double encodings and
overlong UTF-8 mean to the application what it thinks they mean. Query strings are never touched, fragments always dropped.

A dot segment is one with path parameters too: ``/..;/admin`` is ``/admin``, as servlet containers have it and as Envoy has it since
CVE-2026-73551. Unlike Envoy we see it also where the dots were escaped, or the second pass would change what the first one made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from mesh.model.l7.waypoint import PathNormalization


@dataclass(frozen=True, slots=True)
class BadPath:
    """The path must not go on: 400. ``reason`` for the access log."""

    reason: str


_UNRESERVED: Final = b"-._~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"  # RFC 3986 section 2.3
_UNCHANGED: Final = _UNRESERVED + b"!$&'()*+,;=:@/[]"
"""Characters of a path that normalising leaves alone wherever they stand (dot segments and double slashes apart)."""
_GRAPHIC: Final = bytes(range(0x21, 0x7F))
_HEX: Final = b"0123456789ABCDEFabcdef"
_ESCAPES: Final = {bytes([high, low]): int(bytes([high, low]), 16) for high in _HEX for low in _HEX}
"""The two characters after a ``%``, and the byte they mean."""
_UNDONE: Final = {digits: bytes([byte]) for digits, byte in _ESCAPES.items() if byte in _UNRESERVED}
_ESCAPED: Final = [bytes([byte]) if byte in _UNCHANGED else b"%%%02X" % byte for byte in range(256)]

_BASE, _NONE, _DECODE = PathNormalization.BASE, PathNormalization.NONE, PathNormalization.DECODE_AND_MERGE_SLASHES


def normalise(path: bytes, how: PathNormalization) -> bytes | BadPath:
    """A request target in origin form, with or without a query, or ``*``; the same string if there is nothing to do. Never raises."""
    # Most paths: no query, no escape, nothing that any mode would change.
    if not path.translate(None, _UNCHANGED) and path[:1] == b"/" and b"/." not in path and (how is _BASE or b"//" not in path):
        return path
    if path.translate(None, _GRAPHIC):
        return BadPath("blank, control character or raw non-ASCII in path")
    path = path.partition(b"#")[0]
    if path[:1] != b"/":
        return path if path == b"*" else BadPath("path does not begin with a slash")
    only, mark, query = path.partition(b"?")
    plain = not only.translate(None, _UNCHANGED)
    if not plain and b"%00" in only:
        return BadPath("%00 in path")
    if how is _NONE:
        return path
    if plain and only.find(b"/.") < 0 and (how is _BASE or only.find(b"//") < 0):  # not by ``in``: see `headers.SPACE`
        return path
    if how is _DECODE:
        only = _decode_slashes(only)
    only = _spell(only.replace(b"\\", b"/"))
    if b"/." in only:
        only = _resolve_dots(only)
    if how is not _BASE:
        while b"//" in only:
            only = only.replace(b"//", b"/")
    return only + mark + query


def _decode_slashes(path: bytes) -> bytes:
    return path.replace(b"%2f", b"/").replace(b"%2F", b"/").replace(b"%5c", b"\\").replace(b"%5C", b"\\")


def _spell(path: bytes) -> bytes:
    """Escapes of unreserved characters undone, once, and what must be escaped escaped.

    A percent sign that begins no escape stays one, unless what is undone behind it would make one of it: ``%%341`` is a percent sign and
    41, not an A. Then it says so (``%2541``). Read from behind, each knows what it will stand before.
    """
    first, *pieces = path.split(b"%")
    spelt: list[bytes] = []
    next_two = b""
    for piece in reversed(pieces):
        digits = piece[:2]
        if digits in _UNDONE:
            text = _UNDONE[digits] + _escape(piece[2:])
        else:
            text = b"%" + _escape(piece)
            if digits not in _ESCAPES and (text[1:3] + next_two)[:2] in _ESCAPES:
                text = b"%25" + text[1:]
        spelt.append(text)
        next_two = (text[:2] + next_two)[:2]
    spelt.append(_escape(first))
    spelt.reverse()
    return b"".join(spelt)


def _escape(text: bytes) -> bytes:
    return b"".join([_ESCAPED[byte] for byte in text]) if text.translate(None, _UNCHANGED) else text


def _resolve_dots(path: bytes) -> bytes:
    """``.`` and ``..`` segments (RFC 3986 section 5.2.4). An empty segment is one: ``..`` takes it away. Above the root is the root."""
    kept: list[bytes] = []
    bare = b""
    for segment in path.split(b"/")[1:]:
        bare = segment.partition(b";")[0]
        if bare == b"..":
            del kept[-1:]
        elif bare != b".":
            kept.append(segment)
    if bare in (b".", b".."):
        kept.append(b"")
    return b"/" + b"/".join(kept)

"""Header blocks as we write them (HPACK, RFC 7541): what a connection repeats is indexed, what it says once is not.

A field enters the dynamic table when it is written for the second time, and only while the table has room: nothing is ever evicted, so an
entry's place is known for good, and a request whose every header is new (ids, dates, paths) costs no bookkeeping. No Huffman code: it
costs more CPU than the bytes are worth inside a mesh. Credentials are never indexed (section 7.1.3), nor short cookies.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from hpack.hpack import encode_integer
from hpack.table import HeaderTable

MAX_TABLE_SIZE: Final = 4096
"""HTTP/2's default. A peer may allow more; a hundred entries are enough."""
_ENTRY_OVERHEAD: Final = 32  # RFC 7541 section 4.1
_FIRST_DYNAMIC: Final = len(HeaderTable.STATIC_TABLE) + 1
_MAX_ENTRIES: Final = MAX_TABLE_SIZE // _ENTRY_OVERHEAD
_MAX_SEEN: Final = 256
_MAX_INDEXED: Final = 512
"""Bytes of a field that may enter the table: one long one would take the place of many."""


def _integer(value: int, bits: int, first: int) -> bytes:
    encoded = encode_integer(value, bits)
    encoded[0] |= first
    return bytes(encoded)


_INDEXED: Final = [_integer(index, 7, 0x80) for index in range(_FIRST_DYNAMIC + _MAX_ENTRIES)]
_STATIC: Final = {pair: -index for index, pair in enumerate(HeaderTable.STATIC_TABLE, 1)}
_NAMES: Final = {name: index for index, (name, _) in reversed(list(enumerate(HeaderTable.STATIC_TABLE, 1)))}
_NEVER_INDEXED: Final = frozenset({b"authorization", b"proxy-authorization"})
_SHORT: Final = [_integer(length, 7, 0) for length in range(256)]


def _string(text: bytes) -> bytes:
    length = len(text)
    return (_SHORT[length] if length < 256 else _integer(length, 7, 0)) + text


_PLAIN_NAMES: Final = {name: _integer(index, 4, 0x00) for name, index in _NAMES.items()}
"""The start of a literal without indexing, by name."""


class BlockWriter:
    """One connection's encoder. Blocks must be sent in the order in which they were made."""

    __slots__ = ("_capacity", "_count", "_known", "_resized", "_room", "_seen")

    def __init__(self) -> None:
        self._capacity = self._room = MAX_TABLE_SIZE
        self._count = 0
        self._known: dict[tuple[bytes, bytes], int] = _STATIC.copy()
        """By field: minus its static index, or which insertion it was, from 0."""
        self._seen: set[tuple[bytes, bytes]] = set()
        self._resized = b""

    def resize(self, allowed: int) -> None:
        """The peer's SETTINGS_HEADER_TABLE_SIZE. A change empties the table, which the next block says first (section 4.2)."""
        capacity = min(allowed, MAX_TABLE_SIZE)
        if capacity != self._capacity:
            self._capacity = self._room = capacity
            self._count = 0
            self._known = _STATIC.copy()
            self._resized = b"\x20" + _integer(capacity, 5, 0x20)

    def write(self, fields: Iterable[tuple[bytes, bytes]]) -> bytes:
        """A block of fields with names in lower case, pseudo-headers first."""
        parts: list[bytes] = []
        if self._resized:
            parts.append(self._resized)
            self._resized = b""
        known = self._known
        for field in fields:
            place = known.get(field)
            if place is None:
                parts.append(self._literal(field))
            elif place < 0:
                parts.append(_INDEXED[-place])
            else:
                parts.append(_INDEXED[_FIRST_DYNAMIC + self._count - 1 - place])
        return b"".join(parts)

    def _literal(self, field: tuple[bytes, bytes]) -> bytes:
        name, value = field
        if name in _NEVER_INDEXED or (name == b"cookie" and len(value) < 20):
            return _integer(_NAMES[name], 4, 0x10) + _string(value)
        size = len(name) + len(value) + _ENTRY_OVERHEAD
        if size <= self._room and size <= _MAX_INDEXED:
            if field in self._seen:
                self._room -= size
                self._known[field] = self._count
                self._count += 1
                return (_integer(_NAMES[name], 6, 0x40) if name in _NAMES else b"\x40" + _string(name)) + _string(value)
            if len(self._seen) >= _MAX_SEEN:
                self._seen.clear()
            self._seen.add(field)
        plain = _PLAIN_NAMES.get(name)
        return (b"\x00" + _string(name) if plain is None else plain) + _string(value)

"""Header blocks as we write them (HPACK, RFC 7541): what a connection repeats is indexed, what it says once is not.

A field enters the dynamic table when it is written for the second time, and only while the table has room: nothing is ever evicted, so an
entry's place is known for good, and a request whose every header is new (ids, dates, paths) costs no bookkeeping. No Huffman code: it
costs more CPU than the bytes are worth inside a mesh. Credentials are never indexed (section 7.1.3), nor short cookies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, cast

from hpack.table import HeaderTable

from mesh.http.headers import FIELD_TEXT, LOWER_TOKEN
from mesh.http.message import Headers
from mesh.wire.errors import LocalProtocolError
from mesh.wire.headers import write_integer, write_string

MAX_TABLE_SIZE: Final = 4096
"""HTTP/2's default. A peer may allow more; a hundred entries are enough."""
_ENTRY_OVERHEAD: Final = 32  # RFC 7541 section 4.1
_FIRST_DYNAMIC: Final = len(HeaderTable.STATIC_TABLE) + 1
_MAX_ENTRIES: Final = MAX_TABLE_SIZE // _ENTRY_OVERHEAD
_MAX_SEEN: Final = 256
_MAX_INDEXED: Final = 512
"""Bytes of a field that may enter the table: one long one would take the place of many."""


_INDEXED: Final = [write_integer(index, 7, 0x80) for index in range(_FIRST_DYNAMIC + _MAX_ENTRIES)]
_STATIC: Final = {pair: _INDEXED[index] for index, pair in enumerate(HeaderTable.STATIC_TABLE, 1) if pair[0][:1] != b":"}
_STATIC_PSEUDO: Final = {pair: _INDEXED[index] for index, pair in enumerate(HeaderTable.STATIC_TABLE, 1) if pair[0][:1] == b":"}
_NAMES: Final = {name: index for index, (name, _) in reversed(list(enumerate(HeaderTable.STATIC_TABLE, 1)))}
_NEVER_INDEXED: Final = frozenset({b"authorization", b"proxy-authorization"})
_PLAIN_NAMES: Final = {name: write_integer(index, 4, 0x00) for name, index in _NAMES.items()}
"""The start of a literal without indexing, by name."""


class BlockWriter:
    """One connection's encoder. Blocks must be sent in the order in which they were made."""

    __slots__ = ("_capacity", "_known", "_order", "_pseudo", "_resized", "_room", "_seen")

    def __init__(self) -> None:
        self._capacity = MAX_TABLE_SIZE
        self._resized = b""
        self._seen: set[tuple[bytes, bytes]] = set()
        self._begin()

    def _begin(self) -> None:
        """With an empty table."""
        self._room = self._capacity
        self._order: list[tuple[bytes, bytes]] = []
        """What was inserted."""
        # A pseudo-header is known apart, so that no header can pass for one.
        self._pseudo = _STATIC_PSEUDO.copy()
        self._known = _STATIC.copy()
        """Fields that stand in a table, in their indexed form. They were checked when they came to stand there."""

    def resize(self, allowed: int) -> None:
        """The peer's SETTINGS_HEADER_TABLE_SIZE. A change empties the table, which the next block says first (section 4.2)."""
        capacity = min(allowed, MAX_TABLE_SIZE)
        if capacity != self._capacity:
            self._capacity = capacity
            self._begin()
            self._resized = b"\x20" + write_integer(capacity, 5, 0x20)

    def write(self, pseudo: Headers, headers: Headers) -> bytes:
        """A block; names are in lower case. Raises LocalProtocolError, and nothing has changed, for a field that no peer would take, or
        that a peer's HTTP/1.1 side might take for two."""
        known, known_pseudo = self._known, self._pseudo
        block = list(map(known_pseudo.get, pseudo))
        block += map(known.get, headers)
        if None in block:
            fields = [*pseudo, *headers]
            new = [place for place, part in enumerate(block) if part is None]
            # Of a pseudo-header the value alone is new.
            _check([fields[place][0] for place in new if place >= len(pseudo)], [fields[place][1] for place in new])
            for place in new:
                if block[place] is not None:
                    continue  # it came to stand in the table when it was written before
                room = self._room
                block[place] = self._literal(fields[place])
                if self._room != room:  # it was inserted: what stood there has moved on by one
                    rest = range(place + 1, len(fields))
                    block[place + 1 :] = [(known_pseudo if each < len(pseudo) else known).get(fields[each]) for each in rest]
        parts = cast("list[bytes]", block)
        if self._resized:
            parts.insert(0, self._resized)
            self._resized = b""
        return b"".join(parts)

    def _literal(self, field: tuple[bytes, bytes]) -> bytes:
        name, value = field
        if name in _NEVER_INDEXED or (name == b"cookie" and len(value) < 20):
            return write_integer(_NAMES[name], 4, 0x10) + write_string(value)
        size = len(name) + len(value) + _ENTRY_OVERHEAD
        if size <= self._room and size <= _MAX_INDEXED:
            if field in self._seen:
                self._insert(field, size)
                return (write_integer(_NAMES[name], 6, 0x40) if name in _NAMES else b"\x40" + write_string(name)) + write_string(value)
            if len(self._seen) >= _MAX_SEEN:
                self._seen.clear()
            self._seen.add(field)
        plain = _PLAIN_NAMES.get(name)
        return (b"\x00" + write_string(name) if plain is None else plain) + write_string(value)

    def _insert(self, field: tuple[bytes, bytes], size: int) -> None:
        """What stands in the table moves on by one. That is work for all of them, and there are not many insertions in a table's life."""
        self._room -= size
        self._order.append(field)
        for index, each in enumerate(reversed(self._order), _FIRST_DYNAMIC):
            (self._pseudo if each[0][:1] == b":" else self._known)[each] = _INDEXED[index]


def _check(names: Sequence[bytes], values: Sequence[bytes]) -> None:
    if b"".join(values).translate(None, FIELD_TEXT) or b"".join(names).translate(None, LOWER_TOKEN) or b"" in names:
        raise LocalProtocolError("a header that HTTP/2 cannot carry")

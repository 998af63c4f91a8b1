"""Header blocks of HBONE: HPACK (RFC 7541) for the few headers we send, and the checks that any field from the network must pass.

Stable headers (method, baggage) enter the dynamic table and cost a byte from then on; what changes with every connection
(authority, forwarded, traceparent) goes as literals without indexing, for it would only push the others out.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, NamedTuple, TypeAlias

from hpack.exceptions import HPACKError
from hpack.huffman_table import decode_huffman
from hpack.table import HeaderTable

from mesh.wire.errors import ErrorCode, RemoteProtocolError

Fields: TypeAlias = Sequence[tuple[bytes, bytes]]

# Both ways. HTTP/2's default, which we do not change; a peer may allow us up to 4 GiB, but our few stable headers need some hundred bytes.
MAX_TABLE_SIZE: Final = 4096

REMEMBERED_BLOCKS: Final = 16
"""Of one connection: what a client repeats is a handful of methods of a service and their answers."""
MAX_REMEMBERED_BLOCK: Final = 2048
"""Bytes of one."""
MAX_REMEMBERED_LIST: Final = 8192
"""Bytes of its fields as RFC 9113 section 6.5.2 counts them: by indices a peer has many times a block's length with it, and who remembers
what was made of them has it once more. A hostile connection makes us keep at most some hundred kilobytes."""

_ENTRY_OVERHEAD: Final = 32  # RFC 7541 section 4.1

_STATIC_FIELDS = {field: index for index, field in reversed(list(enumerate(HeaderTable.STATIC_TABLE, 1)))}
_STATIC_NAMES = {name: index for (name, _), index in _STATIC_FIELDS.items()}
"""Of a name the first of its entries."""
_STATIC_AUTHORITY = b"\x01"  # literal without indexing, name from the static table
_LITERAL_NAMES = {name: b"\x00" + bytes([len(name)]) + name.encode() for name in ("forwarded", "traceparent")}


_FORWARDED, _TRACEPARENT = (_LITERAL_NAMES[name] for name in ("forwarded", "traceparent"))
_MOST_KEPT: Final = 64
_LONGEST_KEPT: Final = 1024


class MalformedHeaders(Exception):
    """A header list that RFC 9113 section 8.1.1 calls malformed: an error of its stream, not of the connection. Stays in `mesh.wire`."""


class Request(NamedTuple):
    """A request's pseudo-headers, checked as far as HTTP/2 itself demands, and the other headers."""

    method: str
    authority: str
    """Empty when there is none."""
    headers: Mapping[str, str]


class Response(NamedTuple):
    status: int
    headers: Mapping[str, str]


class _Head(NamedTuple):
    """The beginning of a request: all but its last two fields, and what those may cost of the header list's size besides their values."""

    method: str
    authority: str
    headers: Mapping[str, str]
    size: int


class HeaderWriter:
    """One connection's HPACK encoder. Blocks must be sent in the order in which they were made.

    Our own, as the reader is: the library's encoder takes 15 us for a field that enters its table, which each end of each connection pays
    for two.
    """

    __slots__ = ("_entries", "_indexed", "_inserted", "_max_size", "_names", "_numbers", "_size", "_size_to_tell")

    def __init__(self) -> None:
        self._indexed: dict[tuple[str, str], bytes] = {}
        """Fields that stand in a table, in their indexed form. Any insertion shifts the dynamic ones, so it empties this."""
        self._entries: deque[tuple[bytes, bytes]] = deque()
        """The dynamic table, the oldest first."""
        self._size = 0
        self._max_size = MAX_TABLE_SIZE
        self._inserted = 0
        self._numbers: dict[tuple[bytes, bytes], int] = {}
        self._names: dict[bytes, int] = {}
        """How many had been inserted before a field of the table, and before the newest of its name."""
        self._size_to_tell: int | None = None
        """The least that the table had since a block told of its size."""

    def resize(self, allowed: int) -> None:
        """The peer's SETTINGS_HEADER_TABLE_SIZE."""
        size = min(allowed, MAX_TABLE_SIZE)
        if size != self._max_size:
            self._max_size = size
            self._size_to_tell = size if self._size_to_tell is None else min(size, self._size_to_tell)
            self._shrink_to(size)
            self._indexed.clear()

    def request(self, authority: str, headers: Mapping[str, str]) -> bytes:
        """The block of a CONNECT to ``authority``. Header names are lower-case."""
        parts = [self._size_update(), self._stable(":method", "CONNECT"), _STATIC_AUTHORITY, _literal(authority)]
        self._add(headers, parts)
        return b"".join(parts)

    def response(self, status: int, headers: Mapping[str, str]) -> bytes:
        parts = [self._size_update(), self._stable(":status", str(status))]
        self._add(headers, parts)
        return b"".join(parts)

    def _add(self, headers: Mapping[str, str], parts: list[bytes]) -> None:
        for name, value in headers.items():
            literal = _LITERAL_NAMES.get(name)
            if literal is None:
                parts.append(self._stable(name, value))
            else:
                parts.append(literal)
                parts.append(_literal(value))

    def _size_update(self) -> bytes:
        """A change of the table's size stands before the first field (RFC 7541 section 4.2): the least that it had, and what it has."""
        least, self._size_to_tell = self._size_to_tell, None
        if least is None:
            return b""
        now = write_integer(self._max_size, 5, 0x20)
        return now if least == self._max_size else write_integer(least, 5, 0x20) + now

    def _stable(self, name: str, value: str) -> bytes:
        known = self._indexed.get((name, value))
        if known is not None:
            return known
        field = _encoded(name), _encoded(value)
        index = _STATIC_FIELDS.get(field) or self._dynamic_index(self._numbers.get(field))
        if index:
            written = self._indexed[name, value] = write_integer(index, 7, 0x80)
            return written
        index = _STATIC_NAMES.get(field[0]) or self._dynamic_index(self._names.get(field[0]))
        written = (write_integer(index, 6, 0x40) if index else b"\x40" + write_string(field[0])) + write_string(field[1])
        self._insert(field)
        self._indexed.clear()
        return written

    def _dynamic_index(self, number: int | None) -> int:
        """RFC 7541 section 2.3.3: the newest entry comes right after the static ones. 0 if there is none."""
        return 0 if number is None else len(HeaderTable.STATIC_TABLE) + self._inserted - number

    def _insert(self, field: tuple[bytes, bytes]) -> None:
        """RFC 7541 section 4.4: what is larger than the table empties it and does not enter."""
        size = len(field[0]) + len(field[1]) + _ENTRY_OVERHEAD
        self._shrink_to(self._max_size - size)
        if size <= self._max_size:
            self._entries.append(field)
            self._size += size
            self._numbers[field] = self._names[field[0]] = self._inserted
            self._inserted += 1

    def _shrink_to(self, size: int) -> None:
        while self._entries and self._size > size:
            oldest = self._inserted - len(self._entries)
            field = self._entries.popleft()
            self._size -= len(field[0]) + len(field[1]) + _ENTRY_OVERHEAD
            del self._numbers[field]
            if self._names[field[0]] == oldest:
                del self._names[field[0]]


class HeaderReader:
    """One connection's HPACK decoder. It must see every block, in order, also those of streams that are gone.

    On hpack's table and Huffman code, but its own pass over the block: hpack's costs three times as much for a CONNECT, is quadratic in the
    number of literals, and takes a microsecond for each of the 65 thousand size updates that fit a block.
    """

    __slots__ = ("_blocks", "_changes", "_heads", "_known", "_max_list_size", "_remembers", "_responses", "_table", "steady")

    def __init__(self, max_list_size: int, *, remembers: bool = False) -> None:
        """``remembers``: whole blocks are looked up, for a connection on which they are repeated to the byte."""
        self._max_list_size = max_list_size
        self._remembers = remembers
        self._blocks: dict[bytes, Fields] = {}
        """What blocks said that changed no table. Any change of a table empties this."""
        self.steady = False
        """The fields that were read last are remembered: if the same block says the same again, they will be the same object."""
        self._table = HeaderTable()
        self._changes = 0
        self._known: dict[int, tuple[bytes, bytes]] = {}
        """Fields of the tables by the byte that means them. Any change of the table empties this, and what follows."""
        self._heads: dict[bytes, _Head] = {}
        self._responses: dict[bytes, Response] = {}
        """What beginnings of requests, and whole responses, meant."""

    def read_request(self, block: bytes) -> Request:
        """`read`, then `parse_request`. Raises RemoteProtocolError, MalformedHeaders."""
        cut = block.find(_FORWARDED)
        if cut <= 0:
            return parse_request(self.read(block))
        head = self._heads.get(block[:cut])
        if head is not None:
            request = self._read_on(head, block, cut)
            if request is not None:
                return request
        changes = self._changes
        request = parse_request(self.read(block))
        if self._changes == changes and head is None and cut <= _LONGEST_KEPT:
            self._keep_head(block[:cut])
        return request

    def read_response(self, block: bytes) -> Response:
        """`read`, then `parse_response`. Raises RemoteProtocolError, MalformedHeaders."""
        response = self._responses.get(block)
        if response is None:
            changes = self._changes
            response = parse_response(self.read(block))
            if self._changes == changes and len(block) <= _LONGEST_KEPT and len(self._responses) < _MOST_KEPT:
                self._responses[block] = response
        return response

    def _read_on(self, head: _Head, block: bytes, cut: int) -> Request | None:
        """A request whose beginning is known, if it goes on as our own writer's do: two short literals, then nothing."""
        size = len(block)
        at = cut + len(_FORWARDED)
        if at >= size or block[at] >= 0x7F:
            return None
        start = at + 1 + block[at]
        end = start + len(_TRACEPARENT)
        if end >= size or block[start:end] != _TRACEPARENT or block[end] >= 0x7F or end + 1 + block[end] != size:
            return None
        forwarded, traceparent = block[at + 1 : start], block[end + 1 :]
        if head.size + len(forwarded) + len(traceparent) > self._max_list_size:
            return None
        headers = {**head.headers, "forwarded": _checked_value(forwarded), "traceparent": _checked_value(traceparent)}
        return Request(head.method, head.authority, headers)

    def _keep_head(self, block: bytes) -> None:
        """Keep what the beginning of a request means, if it ends where a field does. The whole was read and changed nothing."""
        try:
            fields = self._read(block)
            request = parse_request(fields)
        except (IndexError, HPACKError, RemoteProtocolError, MalformedHeaders):
            return
        if "forwarded" in request.headers or "traceparent" in request.headers:
            return
        if len(self._heads) >= _MOST_KEPT:
            self._heads.clear()
        size = sum(len(name) + len(value) + _ENTRY_OVERHEAD for name, value in fields)
        self._heads[block] = _Head(*request, size + len("forwardedtraceparent") + 2 * _ENTRY_OVERHEAD)

    def _table_changed(self) -> None:
        """What stood in it stands elsewhere now, or nowhere."""
        self._changes += 1
        self._known.clear()
        self._heads.clear()
        self._responses.clear()
        self._blocks.clear()
        self.steady = False

    def read(self, block: bytes) -> Fields:
        """The fields of a block. Raises RemoteProtocolError, after which the table is lost and the connection must end."""
        remembered = self._blocks.get(block)
        if remembered is not None:
            self.steady = True
            return remembered
        try:
            return self._read(block)
        except IndexError:
            raise RemoteProtocolError("header block ends amid a field", ErrorCode.COMPRESSION_ERROR) from None
        except HPACKError as exc:  # an index beyond the table, a wrong Huffman code
            raise RemoteProtocolError(f"header block: {exc}", ErrorCode.COMPRESSION_ERROR) from exc

    def _read(self, block: bytes) -> Fields:
        """RFC 7541 section 6: the first byte of a representation tells its kind and holds the first bits of its integer."""
        size = len(block)
        at = self._read_size_updates(block) if size and block[0] & 0xE0 == 0x20 else 0
        known = self._known
        room = self._max_list_size
        self.steady = self._remembers and not at and size <= MAX_REMEMBERED_BLOCK
        fields: list[tuple[bytes, bytes]] = []
        while at < size:
            first = block[at]
            if first & 0x80:  # indexed
                if first in known:  # most of those we meet, in one byte
                    field = known[first]
                    at += 1
                else:
                    index, at = _read_integer(block, at, 0x7F)
                    field = self._table.get_by_index(index)
                    if first != 0xFF:
                        known[first] = field
                name, value = field
            elif first & 0xE0 == 0x20:
                raise RemoteProtocolError("table size update after the first field of a block", ErrorCode.COMPRESSION_ERROR)
            else:
                # Short strings without a Huffman code are cut out here: each call for one costs as much as all the rest of its field.
                if not first:  # not indexed, and the name follows
                    length = block[at + 1]
                    if length < 0x7F:
                        at += 2 + length
                        name = block[at - length : at]
                    else:
                        name, at = _read_string(block, at + 1)
                else:
                    mask = 0x3F if first & 0x40 else 0x0F
                    if first & mask < mask:
                        index, at = first & mask, at + 1
                    else:
                        index, at = _read_integer(block, at, mask)
                    if index:
                        name = self._table.get_by_index(index)[0]
                    else:
                        name, at = _read_string(block, at)
                length = block[at]
                if length < 0x7F:
                    at += 1 + length
                    value = block[at - length : at]
                    if at > size:
                        raise IndexError
                else:
                    value, at = _read_string(block, at)
                if first & 0x40:
                    self._table.add(name, value)
                    self._table_changed()
            room -= len(name) + len(value) + _ENTRY_OVERHEAD
            if room < 0:
                raise RemoteProtocolError(f"header list of over {self._max_list_size} bytes", ErrorCode.ENHANCE_YOUR_CALM)
            fields.append((name, value))
        self.steady = self.steady and self._max_list_size - room <= MAX_REMEMBERED_LIST
        if self.steady:
            if len(self._blocks) >= REMEMBERED_BLOCKS:
                self._blocks.clear()
            self._blocks[block] = fields
        return fields

    def _read_size_updates(self, block: bytes) -> int:
        """RFC 7541 section 4.2: before the first field, and two are enough to say everything. Returns the position after them."""
        at = 0
        for _ in range(2):
            if at == len(block) or block[at] & 0xE0 != 0x20:
                break
            size, at = _read_integer(block, at, 0x1F)
            if size > MAX_TABLE_SIZE:
                raise RemoteProtocolError(f"table size {size}, over the {MAX_TABLE_SIZE} allowed", ErrorCode.COMPRESSION_ERROR)
            self._table.maxsize = size
            self._table_changed()
        return at


def _read_integer(block: bytes, at: int, mask: int) -> tuple[int, int]:
    """RFC 7541 section 5.1: the integer and the position after it. ``mask`` covers its bits in the first byte."""
    value = block[at] & mask
    at += 1
    if value < mask:
        return value, at
    for shift in range(0, 35, 7):  # 32 bits are more than any length or index of ours
        byte = block[at]
        at += 1
        value += (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise RemoteProtocolError("integer of over 32 bits in a header block", ErrorCode.COMPRESSION_ERROR)


def _read_string(block: bytes, at: int) -> tuple[bytes, int]:
    """RFC 7541 section 5.2: the string and the position after it."""
    first = block[at]
    huffman = first & 0x80
    if first & 0x7F < 0x7F:
        length, at = first & 0x7F, at + 1
    else:
        length, at = _read_integer(block, at, 0x7F)
    end = at + length
    if end > len(block):
        raise IndexError
    text = block[at:end]
    return (decode_huffman(text) if huffman else text), end


def parse_request(fields: Fields) -> Request:
    """Check a request's header list by RFC 9113 sections 8.2, 8.3.1 and 8.5. Raises MalformedHeaders."""
    pseudo, headers = _split(fields, _REQUEST_PSEUDO)
    method = pseudo.get(b":method")
    if method is None:
        raise MalformedHeaders("no :method")
    if method == b"CONNECT" and (b":scheme" in pseudo or b":path" in pseudo):
        raise MalformedHeaders("CONNECT with :scheme or :path")
    return Request(_checked_value(method), _checked_value(pseudo.get(b":authority", b"")), headers)


def parse_response(fields: Fields) -> Response:
    """Check a response's header list by RFC 9113 sections 8.2 and 8.3.2. Raises MalformedHeaders."""
    pseudo, headers = _split(fields, _RESPONSE_PSEUDO)
    status = pseudo.get(b":status", b"")
    if len(status) != 3 or not status.isdigit() or status[0] == ord("0"):
        raise MalformedHeaders("no :status of three digits")
    return Response(int(status), headers)


def check_trailers(fields: Fields) -> None:
    """Check a trailer section by RFC 9113 section 8.1. Raises MalformedHeaders."""
    _split(fields, frozenset())


_REQUEST_PSEUDO = frozenset({b":method", b":authority", b":scheme", b":path"})
_RESPONSE_PSEUDO = frozenset({b":status"})
_CONNECTION_SPECIFIC = frozenset({b"connection", b"proxy-connection", b"keep-alive", b"transfer-encoding", b"upgrade"})
_KNOWN_NAMES = {
    name: name.decode() for name in (b"baggage", b"forwarded", b"traceparent", b"x-forwarded-network", b"content-type", b"date", b"server")
}
_NAME = re.compile(rb"[!#$%&'*+\-.^_`|~0-9a-z]+")  # a token of RFC 9110 section 5.6.2, without upper case
_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")  # RFC 9110 section 5.5: no control characters but HTAB


def _split(fields: Iterable[tuple[bytes, bytes]], allowed_pseudo: frozenset[bytes]) -> tuple[dict[bytes, bytes], dict[str, str]]:
    pseudo: dict[bytes, bytes] = {}
    headers: dict[str, str] = {}
    for name, value in fields:
        if name in allowed_pseudo:
            if headers or name in pseudo:
                raise MalformedHeaders(f"{name[:32]!r} after regular headers, or twice")
            pseudo[name] = value
            continue
        key = _KNOWN_NAMES.get(name) or _checked_name(name, value)
        text = _checked_value(value)
        headers[key] = f"{headers[key]},{text}" if key in headers else text
    return pseudo, headers


def _checked_name(name: bytes, value: bytes) -> str:
    if name[:1] == b":":
        raise MalformedHeaders(f"unknown pseudo-header {name[:32]!r}")
    if not _NAME.fullmatch(name):
        raise MalformedHeaders(f"header name {name[:32]!r}")
    if name in _CONNECTION_SPECIFIC or (name == b"te" and value != b"trailers"):
        raise MalformedHeaders(f"connection-specific header {name.decode()}")
    return name.decode()


def _checked_value(value: bytes) -> str:
    """Text of a field value. What is not UTF-8 becomes U+FFFD: fields are opaque to HTTP, and a log must be able to print them."""
    text = value.decode("utf-8", "replace")
    if text.isprintable() and text[:1] != " " and text[-1:] != " ":  # no control character is
        return text
    if _CONTROL.search(value) or value != value.strip(b" \t"):
        raise MalformedHeaders("control characters or outer blanks in a header value")
    return text


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "replace")


def _literal(text: str) -> bytes:
    """`write_string` of a text."""
    return write_string(_encoded(text))


def write_string(value: bytes) -> bytes:
    """A string literal of RFC 7541 section 5.2, not Huffman-coded: that costs more CPU than the few bytes are worth inside one mesh."""
    length = len(value)
    return (_LENGTHS[length] if length < len(_LENGTHS) else write_integer(length, 7, 0)) + value


def write_integer(value: int, bits: int, kind: int) -> bytes:
    """RFC 7541 section 5.1: in the last ``bits`` of a first byte, whose others are ``kind``, and as many more as it takes."""
    most = (1 << bits) - 1
    if value < most:
        return bytes([kind | value])
    written = bytearray([kind | most])
    value -= most
    while value >= 0x80:
        written.append(value & 0x7F | 0x80)
        value >>= 7
    written.append(value)
    return bytes(written)


_LENGTHS: Final = [write_integer(length, 7, 0) for length in range(256)]

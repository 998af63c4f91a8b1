"""HTTP/1.1 without its I/O, both ends: one turn after the other on a connection (RFC 9112).

Theory of operation. A head is read whole, up to the empty line, and judged as bytes before it is cut into fields: control characters,
bare CR or LF and folded lines have no way in. Bodies leave as slices of what was fed. A message is followed to its last byte and no
further: what comes after a request waits in a bounded buffer until its response has been sent; what comes after a response makes the
connection useless. Where two readers of the same bytes could disagree about where a message ends (request smuggling), there is no message.

The codecs never raise for what a peer sends. A head that must not go on is a `RefusedHead` (server) or `StreamReset` (client), a body that
breaks off or breaks the rules a `StreamReset`; the connection is `finished` then, once what is outgoing has been sent, with an answer of
400 among it if the response had not begun. However the same bytes are portioned, the events are the same but for the cuts of `BodyData`.

For whoever drives these
- After a response was completed, or bytes were consumed, call ``receive(b"")``: it gives what was held back of the next request.
- ``finished`` after `reset`, or with a body cut short: close so that the peer sees that (a reset of the stream). To a client of HTTP/1.0
  the end of the connection is the end of the body.
- A request with ``upgrade`` comes with ``ended`` False, as it does by HTTP/2: after a 101 its `BodyData` are the other protocol's bytes.
  With any other response it has no body, and no `BodyEnd` comes.

Trailers. Of a request they go on if it is gRPC, of a response if the request says ``te: trailers`` or is gRPC, both ways without framing,
routing and authentication; else they are read, judged and dropped, as Envoy does.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from base64 import b64encode
from collections.abc import Callable, Sequence
from enum import Enum
from hashlib import sha1
from http import HTTPStatus
from operator import itemgetter
from typing import Final, Generic, TypeVar

from mesh.http.codec import BodyData, BodyEnd, Event, RefusedHead, RequestHead, ResponseHead, StreamReset
from mesh.http.headers import (
    FIELD_TEXT,
    FRAMING,
    LOWER_TOKEN,
    TAB,
    TOKEN,
    BadHead,
    check_authority,
    clean_trailers,
    read_coding,
    read_connection,
    read_length,
)
from mesh.http.message import Headers, Request, Response, Version
from mesh.http.options import HeadLimits, ServerOptions
from mesh.http.path import BadPath, normalise
from mesh.wire.errors import ErrorCode, LocalProtocolError

UNCONSUMED: Final = 256 * 1024
"""Bytes of a body handed out and not consumed above which no more should be read."""
HELD: Final = 64 * 1024
"""Bytes of requests to come (pipelining) above which no more should be read."""
ROOM: Final = 1 << 20
"""HTTP/1.1 has no windows: what `room` says while a body is open."""
DISCARDED: Final = 64 * 1024
"""What may be left of a request's body when the response is complete: that much is read and dropped, for more the connection is closed."""
MAX_CHUNK_LINE: Final = 1024
"""A chunk's size with its extensions, which nobody uses and some have used for floods (CVE-2024-22019)."""
MAX_INFORMATIONAL: Final = 16
"""1xx responses to one request."""
REMEMBERED_HEADS: Final = 4
MAX_REMEMBERED_HEAD: Final = 2048
"""Bytes. Who asks the same again, as everybody who polls, does so to the byte."""

_END: Final = b"\r\n\r\n"
_CRLFS: Final = b"\r\n" * 128
_HEXDIGITS: Final = b"0123456789ABCDEFabcdef"
_WEBSOCKET_GUID: Final = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455 section 1.3


def _status_line(status: int) -> bytes:
    try:
        reason = HTTPStatus(status).phrase
    except ValueError:
        reason = "Unknown"
    return f"HTTP/1.1 {status} {reason}\r\n".encode()


_STATUS_LINES: Final = {status.value: _status_line(status) for status in HTTPStatus}


class _Reading(Enum):
    """What the next byte belongs to."""

    HEAD = "head"
    SIZED = "body with content-length"
    CHUNK_SIZE = "line before a chunk"
    CHUNK = "chunk"
    CHUNK_END = "line end after a chunk"
    TRAILERS = "trailers"
    UNTIL_CLOSE = "body that ends with the connection"
    RAW = "bytes of another protocol"
    HELD = "message to come, which nobody may look at yet"
    IGNORED = "nothing any more"


_HEAD, _SIZED, _CHUNK_SIZE, _CHUNK, _CHUNK_END = _Reading.HEAD, _Reading.SIZED, _Reading.CHUNK_SIZE, _Reading.CHUNK, _Reading.CHUNK_END
_TRAILERS, _UNTIL_CLOSE, _RAW, _HELD, _IGNORED = _Reading.TRAILERS, _Reading.UNTIL_CLOSE, _Reading.RAW, _Reading.HELD, _Reading.IGNORED


class _Sending(Enum):
    """How far our own message has come, and how its body is framed."""

    SILENT = "not begun"
    SIZED = "with content-length"
    CHUNKED = "chunked"
    UNTIL_CLOSE = "until the connection ends"
    RAW = "bytes of another protocol"
    NO_BODY = "begun, without a body"
    ENDED = "ended"


_SILENT, _CHUNKED, _NO_BODY, _ENDED = _Sending.SILENT, _Sending.CHUNKED, _Sending.NO_BODY, _Sending.ENDED
_SENDING_SIZED, _SENDING_UNTIL_CLOSE, _SENDING_RAW = _Sending.SIZED, _Sending.UNTIL_CLOSE, _Sending.RAW


class _Fields:
    """The fields of one head, sorted: what goes on, and what only concerns this connection."""

    __slots__ = ("coding", "connection", "expect", "headers", "hosts", "length", "plain", "te_trailers", "upgrade")

    def __init__(self, lines: Sequence[bytes], limits: HeadLimits) -> None:
        """Raises BadHead. ``lines``: without line ends, already free of control characters."""
        if len(lines) > limits.count:
            raise BadHead("too many header fields", 431)
        headers: Headers = []
        names: list[bytes] = []
        special: dict[bytes, list[bytes]] | None = None
        for line in lines:
            name, colon, value = line.partition(b":")
            if not colon or not name:
                raise BadHead("header field without a name")
            name = name.lower()
            names.append(name)
            if name in _SPECIAL:
                if special is None:
                    special = {}
                special.setdefault(name, []).append(value.strip(b" \t"))
            else:
                headers.append((name, value.strip(b" \t")))
        if b"".join(names).translate(None, LOWER_TOKEN):
            raise BadHead("invalid header name or folded line")
        self.headers = headers
        self.hosts: list[bytes] = []
        self.length: int | None = None
        self.coding: list[bytes] | None = None
        self.connection: frozenset[bytes] = frozenset()
        self.upgrade = b""
        self.expect = b""
        self.te_trailers = False
        self.plain = special is None or special.keys() <= _PLAIN
        """They say nothing of framing but a length, and nothing of the connection."""
        if special is not None:
            self._take_special(special)

    def _take_special(self, special: dict[bytes, list[bytes]]) -> None:
        self.hosts = special.get(b"host", [])
        self.coding = special.get(b"transfer-encoding")
        if b"connection" in special:
            self.connection = read_connection(b",".join(special[b"connection"]))
            named = self.connection
            self.headers = [pair for pair in self.headers if pair[0] not in named]
        lengths = special.get(b"content-length")
        if lengths is not None:
            self.length = read_length(lengths)
            self.headers.append((b"content-length", lengths[0]))
        if b"te" in special:
            self.te_trailers = any(option.strip(b" \t") == b"trailers" for option in b",".join(special[b"te"]).lower().split(b","))
            if self.te_trailers:
                self.headers.append((b"te", b"trailers"))
        if b"upgrade" in special and b"upgrade" in self.connection:
            self.upgrade = b",".join(special[b"upgrade"]).lower()
        if b"expect" in special:
            self.expect = b",".join(special[b"expect"]).lower()


_SPECIAL: Final = FRAMING | {b"te", b"expect"}
_PLAIN: Final = frozenset({b"host", b"content-length"})


Line = TypeVar("Line")
"""What a head's first line says."""


class _Http1(ABC, Generic[Line]):
    """What both ends have in common: cutting messages out of bytes, and writing them."""

    def __init__(self, limits: HeadLimits) -> None:
        self._limits = limits
        self._known: dict[bytes, tuple[Line, _Fields]] = {}
        """The first line and the fields of heads that came: they mean the same whenever the same bytes come."""
        self._active = False  # a turn of which the peer's message, or ours, is not over
        self._reading = _HEAD
        self._buffer = bytearray()
        self._scanned = 0  # bytes of the buffer in which no line end was found
        self._left = 0  # bytes of a sized body or chunk still to come
        self._pieces: list[bytes | memoryview] = []  # of the body, not handed out yet
        self._unconsumed = 0
        self._stream = 1
        self._sending = _SILENT
        self._to_send = 0  # of a sized body
        self._parts: list[bytes] = []
        self.unsent = 0
        self.finished = False

    # --- facts -------------------------------------------------------------------------------------------------------------------------

    @property
    def wants_data(self) -> bool:
        if self._reading is _HELD:
            return len(self._buffer) < HELD
        return self._unconsumed < UNCONSUMED

    def take_outgoing(self) -> bytes:
        parts = self._parts
        if not parts:
            return b""
        self._parts = []
        self.unsent = 0
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def consumed(self, stream: int, size: int) -> None:
        if stream == self._stream and self._unconsumed:
            self._unconsumed = max(0, self._unconsumed - size)

    # --- reading -----------------------------------------------------------------------------------------------------------------------

    def receive(self, data: bytes | memoryview) -> Sequence[Event]:
        events: list[Event] = []
        if self._buffer:
            self._buffer += data
            if not self._may_go_on():
                return events
            data = bytes(self._buffer)
            self._buffer.clear()
        self._scanned = 0
        view = memoryview(data)
        at, end = 0, len(view)
        while at < end:
            reading = self._reading
            if reading is _HEAD:
                at = self._read_head(view, at, events)
            elif reading is _SIZED or reading is _CHUNK:
                at = self._read_counted(view, at, events)
            elif reading is _CHUNK_SIZE:
                at = self._read_chunk_size(view, at, events)
            elif reading is _CHUNK_END:
                at = self._read_chunk_end(view, at, events)
            elif reading is _TRAILERS:
                at = self._read_trailers(view, at, events)
            elif reading is _HELD:
                self._hold(view, at, events)
                break
            elif reading is _IGNORED:
                break
            else:
                self._pieces.append(view[at:])
                break
        if self._pieces:
            self._flush_body(events)
        return events

    def _may_go_on(self) -> bool:
        """Whether the buffer has what is waited for, or enough to say that it will not come. Looks at new bytes only."""
        buffer, reading = self._buffer, self._reading
        if reading is _HELD:
            return False
        since = self._scanned
        if not since:
            return True  # of what was held back nothing has been looked at
        self._scanned = len(buffer)
        if reading is _CHUNK_SIZE:
            return len(buffer) >= MAX_CHUNK_LINE or buffer.find(b"\r\n", max(0, since - 1)) >= 0
        if reading is _HEAD or reading is _TRAILERS:
            return (
                len(buffer) >= self._limits.size + len(_END)
                or buffer.find(_END, max(0, since - 3)) >= 0
                or (reading is _TRAILERS and buffer.startswith(b"\r\n"))
                or _has_flaw(bytes(buffer[max(0, since - 1) :]))
            )
        return True

    def _wait(self, rest: bytes) -> int:
        self._buffer += rest
        self._scanned = len(rest)
        return 1 << 62

    def _read_head(self, view: memoryview, at: int, events: list[Event]) -> int:
        size = self._limits.size
        window = bytes(view[at : at + size + len(_END)])
        if window[0] not in TOKEN:
            return self._refuse(BadHead("does not begin with a token"), events)
        end = window.find(_END)
        if end < 0:
            if _has_flaw(window):
                return self._refuse(BadHead("control character or bare line end in head"), events)
            if len(window) >= size + len(_END):
                return self._refuse(BadHead("head too large", 431), events)
            return self._wait(window)
        head = window[:end]
        known = self._known.get(head)
        if known is not None:
            self._take_head(*known, events)
            return at + end + len(_END)
        lines = head.split(b"\r\n")
        if head.translate(None, FIELD_TEXT) != _line_ends(len(lines) - 1):
            return self._refuse(BadHead("control character or bare line end in head"), events)
        line = self._read_line(lines[0])
        try:
            fields = _Fields(lines[1:], self._limits)
        except BadHead as exc:
            self._take_head(line, exc, events)
            return at + end + len(_END)
        if not isinstance(line, BadHead) and len(head) <= MAX_REMEMBERED_HEAD:
            if len(self._known) >= REMEMBERED_HEADS:
                self._known.clear()
            self._known[head] = line, fields
        self._take_head(line, fields, events)
        return at + end + len(_END)

    def _read_counted(self, view: memoryview, at: int, events: list[Event]) -> int:
        piece = view[at : at + self._left]
        size = len(piece)
        self._left = left = self._left - size
        if self._reading is _CHUNK:
            self._pieces.append(piece)
            if not left:
                self._reading = _CHUNK_END
            return at + size
        if self._active:
            self._unconsumed += size
            events.append(BodyData(self._stream, piece))
        if not left:
            self._end_message([], events)
        return at + size

    def _read_chunk_size(self, view: memoryview, at: int, events: list[Event]) -> int:
        window = bytes(view[at : at + MAX_CHUNK_LINE])
        end = window.find(b"\r\n")
        if end < 0:
            if len(window) >= MAX_CHUNK_LINE:
                return self._break("line of a chunk too long", events)
            return self._wait(window)
        digits, _, extension = window[:end].partition(b";")
        if not digits or len(digits) > 15 or digits.translate(None, _HEXDIGITS) or extension.translate(None, FIELD_TEXT):
            return self._break("invalid chunk size", events)
        self._left = int(digits, 16)
        self._reading = _CHUNK if self._left else _TRAILERS
        return at + end + 2

    def _read_chunk_end(self, view: memoryview, at: int, events: list[Event]) -> int:
        window = bytes(view[at : at + 2])
        if window == b"\r\n":
            self._reading = _CHUNK_SIZE
            return at + 2
        if window == b"\r":
            return self._wait(window)
        return self._break("chunk longer than its size", events)

    def _read_trailers(self, view: memoryview, at: int, events: list[Event]) -> int:
        size = self._limits.size
        window = bytes(view[at : at + size + len(_END)])
        if window[:2] == b"\r\n":
            self._end_message([], events)
            return at + 2
        end = window.find(_END)
        if end < 0:
            if window[:1] == b"\n" or _has_flaw(window):
                return self._break("control character or bare line end in trailers", events)
            if len(window) >= size + len(_END):
                return self._break("trailers too large", events)
            return self._wait(window)
        section = window[:end]
        lines = section.split(b"\r\n")
        if section.translate(None, FIELD_TEXT) != _line_ends(len(lines) - 1):
            return self._break("control character or bare line end in trailers", events)
        try:
            headers = _Fields(lines, self._limits).headers
        except BadHead as exc:
            return self._break(f"trailers: {exc.reason}", events)
        self._end_message(clean_trailers(headers), events)
        return at + end + len(_END)

    def _flush_body(self, events: list[Event]) -> None:
        pieces = self._pieces
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        self._pieces = []
        if self._active:  # else nobody waits for it
            self._unconsumed += len(data)
            events.append(BodyData(self._stream, data))

    def _break(self, reason: str, events: list[Event]) -> int:
        if self._pieces:
            self._flush_body(events)
        self._fail(reason, ErrorCode.PROTOCOL_ERROR, events)
        return 1 << 62

    def _begin_body(self, length: int | None, chunked: bool) -> bool:
        """How the rest of this message is read; False if nothing is left of it."""
        if chunked:
            self._reading = _CHUNK_SIZE
            return True
        if length:
            self._reading, self._left = _SIZED, length
            return True
        return False

    # --- what the ends differ in -------------------------------------------------------------------------------------------------------

    @abstractmethod
    def _read_line(self, line: bytes) -> Line | BadHead:
        """A head's first line, or what is wrong with it. What it says is nobody's to change."""

    @abstractmethod
    def _take_head(self, line: Line | BadHead, fields: _Fields | BadHead, events: list[Event]) -> None:
        """``fields``: nobody's to change; or what is wrong with them."""

    @abstractmethod
    def _refuse(self, flaw: BadHead, events: list[Event]) -> int:
        """A head that is none. Returns a position beyond everything."""

    @abstractmethod
    def _end_message(self, trailers: Headers, events: list[Event]) -> None:
        """The peer's message is complete; its last pieces may still have to be handed out."""

    @abstractmethod
    def _fail(self, reason: str, code: int, events: list[Event]) -> None:
        """The turn and the connection are lost."""

    @abstractmethod
    def _hold(self, view: memoryview, at: int, events: list[Event]) -> None:
        """Bytes beyond the peer's message."""

    @abstractmethod
    def _message_sent(self) -> None:
        """Our own message is complete."""

    # --- writing -----------------------------------------------------------------------------------------------------------------------

    def room(self, stream: int) -> int:
        if stream != self._stream or self.finished:
            return 0
        sending = self._sending
        if sending is _SENDING_SIZED:
            return self._to_send
        return 0 if sending in _CLOSED else ROOM

    def send_data(self, stream: int, data: bytes | memoryview) -> None:
        """Raises LocalProtocolError for a body longer than was said, after which the connection is `finished`."""
        if stream != self._stream or self.finished or not data:
            return
        sending = self._sending
        size = len(data)
        if sending is _SENDING_SIZED:
            if size > self._to_send:
                self._finish()
                raise LocalProtocolError(f"{size} bytes of a body of which {self._to_send} are left")
            self._to_send -= size
            self._parts.append(bytes(data))
            self.unsent += size
            return
        if sending is _CHUNKED:
            self._write(b"%x\r\n" % size)
            self._write(bytes(data))
            self._write(b"\r\n")
        elif sending is _SENDING_UNTIL_CLOSE or sending is _SENDING_RAW:
            self._write(bytes(data))

    def send_end(self, stream: int, trailers: Headers | None = None) -> None:
        """A body that is shorter than was said is not ended: the connection is `finished`, and the peer sees that something is missing."""
        if stream != self._stream or self.finished:
            return
        sending = self._sending
        if sending is _SENDING_SIZED:
            if self._to_send:
                self._finish()
                return
        elif sending is _CHUNKED:
            self._write(self._last_chunk(trailers))
        elif sending is _SENDING_RAW or sending is _SENDING_UNTIL_CLOSE:
            self._finish()
        elif sending in _CLOSED and sending is not _NO_BODY:
            return
        self._sending = _ENDED
        self._message_sent()

    def _last_chunk(self, trailers: Headers | None) -> bytes:
        if trailers and self._may_send_trailers():
            trailers = clean_trailers(trailers)
            return _checked(b"0\r\n", trailers, [], len(trailers) + 1) + b"\r\n"
        return b"0\r\n\r\n"

    @abstractmethod
    def _may_send_trailers(self) -> bool: ...

    def reset(self, stream: int, code: int) -> None:
        if stream == self._stream:
            self._finish()

    def _finish(self) -> None:
        self.finished = True
        self._reading = _IGNORED
        self._sending = _ENDED
        self._buffer.clear()

    def _write(self, data: bytes) -> None:
        self._parts.append(data)
        self.unsent += len(data)


_CLOSED: Final = (_SILENT, _NO_BODY, _ENDED)  # no set: hashing a member of an enum is a call


def _line_ends(count: int) -> bytes:
    return _CRLFS[: 2 * count] if count <= 128 else b"\r\n" * count


def _has_flaw(part: bytes) -> bool:
    """Whether an unfinished head holds what no head may: a control character, a bare LF, or a CR that no LF follows."""
    rest = part.translate(None, FIELD_TEXT)
    count = part.count(b"\r\n")
    if part[:1] == b"\n":  # the rest of a line end that was cut
        rest = rest[1:]
    if part[-1:] == b"\r":
        rest = rest[:-1]
    return rest != b"\r\n" * count


def _checked(start: bytes, headers: Headers, framing: list[bytes], lines: int) -> bytes:
    """A head of ``lines`` lines without its empty line: nothing in it may end a line early, whoever put it there. ``framing``: whole lines.
    Raises LocalProtocolError."""
    head = b"".join([start, *map(_write_line, headers), *framing])
    if head.translate(None, FIELD_TEXT) != _line_ends(lines) or b"".join(map(_name_of, headers)).translate(None, LOWER_TOKEN):
        raise LocalProtocolError("a header that HTTP/1.1 cannot carry")
    return head


_write_line: Final = b"%b: %b\r\n".__mod__
_name_of: Final[Callable[[tuple[bytes, bytes]], bytes]] = itemgetter(0)


def _length_of(message: Request | Response) -> int | None:
    """What the body's size was said to be: by the attribute, or for messages made by hand by the header."""
    if message.content_length is not None:
        return message.content_length
    value = message.first(b"content-length")
    if value is None:
        return None
    if not value.isdigit():
        raise LocalProtocolError("content-length that is no number")
    return int(value)


_CLOSE: Final = b"connection: close\r\n"
_KEEP_ALIVE: Final = b"connection: keep-alive\r\n"
_TRANSFER_CHUNKED: Final = b"transfer-encoding: chunked\r\n"
_BAD_REQUEST: Final = b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
_DEFAULTS: Final = ServerOptions()


class Http1Server(_Http1[tuple[bytes, bytes, bytes]]):
    """The end that answers. See the module and `codec.ServerCodec`."""

    def __init__(self, options: ServerOptions = _DEFAULTS) -> None:
        super().__init__(options.limits)
        self._options = options
        self._request_done = False
        self._close = False  # after this turn
        self._next_stream = 1
        self._forget_request()

    def _forget_request(self) -> None:
        self._http10 = False
        self._head_only = False
        self._takes_trailers = False
        self._gives_trailers = False
        self._waits_for_100 = False
        self._upgrade: bytes | None = None
        self._websocket_key: bytes | None = None

    # --- requests ----------------------------------------------------------------------------------------------------------------------

    def _begin_turn(self) -> None:
        self._stream = self._next_stream
        self._next_stream += 2
        self._active, self._request_done, self._sending = True, False, _SILENT
        self._unconsumed = 0
        self._forget_request()

    def _read_line(self, line: bytes) -> tuple[bytes, bytes, bytes] | BadHead:
        """Method, target, version."""
        words = line.split(b" ")
        if len(words) != 3 or not words[0] or words[0].translate(None, TOKEN) or TAB in words[1]:
            return BadHead("invalid request line")
        return words[0], words[1], words[2]

    def _take_head(self, line: tuple[bytes, bytes, bytes] | BadHead, fields: _Fields | BadHead, events: list[Event]) -> None:
        self._begin_turn()
        request: Request | None = None
        try:
            if isinstance(line, BadHead):
                raise line
            method, target, version = line
            request = Request(method, self._options.scheme, b"", target, [])
            if version != b"HTTP/1.1":
                self._take_version(version, request)
            if isinstance(fields, BadHead):
                raise fields
            request.headers = fields.headers.copy()
            self._take_target(request, fields.hosts)
            chunked = self._take_framing(request, fields)
        except BadHead as exc:
            self._reading = _IGNORED
            self._close = True
            self._head_only = request is not None and request.method == b"HEAD"
            events.append(RefusedHead(self._stream, exc.status, exc.reason, request))
            return
        self._head_only = method == b"HEAD"
        ended = not self._begin_body(fields.length, chunked)
        events.append(RequestHead(self._stream, request, ended and self._upgrade is None))
        if ended:
            self._request_done = True
            self._reading = _HELD

    def _take_version(self, version: bytes, request: Request) -> None:
        if version != b"HTTP/1.0":
            raise BadHead("invalid or unknown HTTP version")
        request.version = Version.HTTP_1_0
        self._http10 = True  # also for the answer of 426
        if not self._options.http10:
            raise BadHead("HTTP/1.0", 426)

    def _take_target(self, request: Request, hosts: list[bytes]) -> None:
        target = request.path
        if len(hosts) > 1:
            raise BadHead("several hosts")
        if request.method == b"CONNECT":
            request.authority, request.path = target, b""
            raise BadHead("CONNECT", 403)
        if hosts:
            authority = hosts[0]
            check_authority(authority)
        elif self._http10:
            authority = self._options.default_host
        else:
            raise BadHead("no host")
        if target[:1] != b"/" and target != b"*":
            authority, target = _split_absolute(target, request.method)
            check_authority(authority)
        if target == b"*" and request.method != b"OPTIONS":
            raise BadHead("invalid request target")
        path = normalise(target, self._options.paths)
        if isinstance(path, BadPath):
            raise BadHead(path.reason)
        request.authority, request.path = authority, path

    def _take_framing(self, request: Request, fields: _Fields) -> bool:
        """Everything that concerns this turn and not the request; returns whether the body is chunked."""
        request.content_length = fields.length
        if fields.plain and not self._http10:
            return False
        chunked = fields.coding is not None
        if fields.coding is not None:
            read_coding(fields.coding, length=fields.length is not None, http10=self._http10)
        options = fields.connection
        self._close = self._close or b"close" in options or (self._http10 and b"keep-alive" not in options)
        self._gives_trailers = chunked and request.is_grpc
        self._takes_trailers = fields.te_trailers and not self._http10
        body = chunked or bool(fields.length)
        if fields.expect and not self._http10:
            if fields.expect != b"100-continue":
                raise BadHead("unknown expectation", 417)
            request.expect_continue = self._waits_for_100 = body
        if fields.upgrade in self._options.upgrades and request.method == b"GET" and not body and not self._http10:
            request.upgrade = self._upgrade = fields.upgrade
            self._websocket_key = request.first(b"sec-websocket-key")
        return chunked

    def _refuse(self, flaw: BadHead, events: list[Event]) -> int:
        self._begin_turn()
        self._close = True
        self._reading = _IGNORED
        events.append(RefusedHead(self._stream, flaw.status, flaw.reason, None))
        return 1 << 62

    def _end_message(self, trailers: Headers, events: list[Event]) -> None:
        if self._pieces:
            self._flush_body(events)
        self._request_done = True
        self._reading = _HELD
        if self._active:
            events.append(BodyEnd(self._stream, trailers if self._gives_trailers else []))
        else:  # it was only read to be rid of it
            self._end_turn()

    def _hold(self, view: memoryview, at: int, events: list[Event]) -> None:
        self._buffer += view[at:]
        self._scanned = 0

    def _fail(self, reason: str, code: int, events: list[Event]) -> None:
        if self._active:
            events.append(StreamReset(self._stream, code, reason))
            if self._sending is _SILENT and code == ErrorCode.PROTOCOL_ERROR:
                self._write(_BAD_REQUEST)
        self._active = False
        self._finish()

    @property
    def holds(self) -> bool:
        return bool(self._buffer)

    @property
    def amid_head(self) -> bool:
        return self._reading is _HEAD and bool(self._buffer)

    def give_up_head(self) -> Sequence[Event]:
        events: list[Event] = []
        if self.amid_head:
            self._buffer.clear()
            self._refuse(BadHead("the head took too long", 408), events)
        return events

    def receive_eof(self) -> Sequence[Event]:
        events: list[Event] = []
        if self.finished:
            return events
        if self._reading is _RAW:
            self._reading = _IGNORED
            events.append(BodyEnd(self._stream, []))
            return events
        self._fail("the client closed the connection", ErrorCode.CANCEL, events)
        return events

    # --- responses ---------------------------------------------------------------------------------------------------------------------

    def go_away(self) -> None:
        self._close = True
        if not self._active and self._reading is _HEAD and not self._buffer:
            self._finish()

    def send_informational(self, stream: int, status: int, headers: Headers) -> None:
        if stream != self._stream or not self._active or self._sending is not _SILENT or self._http10 or status not in (100, 103):
            return
        if status == 100:
            self._waits_for_100 = False
        kept = [pair for pair in headers if pair[0] not in FRAMING]
        self._write(_checked(_STATUS_LINES[status], kept, [b"\r\n"], len(kept) + 2))

    def send_response(self, stream: int, response: Response, *, ended: bool) -> None:
        """Raises LocalProtocolError for a header that would break out of its line, and for a status that has no place here."""
        if stream != self._stream or not self._active or self._sending is not _SILENT or self.finished:
            return
        status = response.status
        if status == 101:
            self._switch(response)
            return
        if not 200 <= status <= 599:
            raise LocalProtocolError(f"status {status} of a response")
        length = _length_of(response)
        framing: list[bytes] = []
        if status == 204:
            self._sending = _NO_BODY
        elif self._head_only or status == 304:
            self._sending = _NO_BODY
            if length is not None:
                framing.append(b"content-length: %d\r\n" % length)
        elif length is not None or ended:
            self._sending, self._to_send = _SENDING_SIZED, length or 0
            framing.append(b"content-length: %d\r\n" % self._to_send)
        elif self._http10:
            self._sending = _SENDING_UNTIL_CLOSE
            self._close = True
        else:
            self._sending = _CHUNKED
            framing.append(_TRANSFER_CHUNKED)
        if not self._request_done and not self._may_be_discarded():
            self._close = True  # whoever answers before the request is over does not know what the rest of it will be
        if self._close:
            framing.append(_CLOSE)
        elif self._http10:
            framing.append(_KEEP_ALIVE)
        framing.append(b"\r\n")
        kept = [pair for pair in response.headers if pair[0] not in FRAMING]
        line = _STATUS_LINES.get(status) or _status_line(status)
        try:
            self._write(_checked(line, kept, framing, len(kept) + len(framing) + 1))
        except LocalProtocolError:
            self._sending, self._to_send = _SILENT, 0  # another response may follow
            raise
        if ended:
            self.send_end(stream)

    def _switch(self, response: Response) -> None:
        """101: from here on bytes are bytes. What the client sent behind its request was the other protocol's first."""
        if self._upgrade is None:
            raise LocalProtocolError("101 to a request that asked for no upgrade")
        kept = [pair for pair in response.headers if pair[0] not in FRAMING]
        if self._websocket_key is not None and self._upgrade == b"websocket" and response.first(b"sec-websocket-accept") is None:
            # The response came by HTTP/2, where nobody proves that he read the request (RFC 8441 section 5).
            kept.append((b"sec-websocket-accept", b64encode(sha1(self._websocket_key + _WEBSOCKET_GUID, usedforsecurity=False).digest())))
        framing = [b"connection: upgrade\r\n", b"upgrade: %b\r\n" % self._upgrade, b"\r\n"]
        self._write(_checked(_STATUS_LINES[101], kept, framing, len(kept) + 4))
        self._sending, self._reading = _SENDING_RAW, _RAW

    def _may_be_discarded(self) -> bool:
        """Whether little enough is left of the request to read it for nothing."""
        return self._reading is _SIZED and self._left <= DISCARDED and not self._waits_for_100

    def _may_send_trailers(self) -> bool:
        return self._takes_trailers

    def _message_sent(self) -> None:
        self._active = False
        self._unconsumed = 0
        if self.finished:
            return
        if self._request_done:
            self._end_turn()
        elif self._close or not self._may_be_discarded():
            self._finish()

    def _end_turn(self) -> None:
        if self._close:
            self._finish()
            return
        self._reading = _HEAD


class Http1Client(_Http1[tuple[bool, int]]):
    """The end that asks. See the module and `codec.ClientCodec`."""

    def __init__(self, limits: HeadLimits | None = None, *, websocket_nonce: Callable[[], bytes] = lambda: os.urandom(16)) -> None:
        """``websocket_nonce``: 16 random bytes, for a handshake that came by HTTP/2 and has none."""
        super().__init__(limits or HeadLimits())
        self._websocket_nonce = websocket_nonce
        self._reading = _HELD
        self._next_stream = 1
        self._close = False
        self._head_only = False
        self._wants_trailers = False
        self._gives_trailers = False
        self._upgrade: bytes | None = None
        self._informational = 0

    @property
    def capacity(self) -> int:
        return 0 if self._active or not self.reusable else 1

    @property
    def reusable(self) -> bool:
        return not (self.finished or self._close)

    upgrades = True
    pings = 0

    def ping(self) -> None:
        """HTTP/1.1 has no way to ask."""

    # --- requests ----------------------------------------------------------------------------------------------------------------------

    def send_request(self, request: Request, *, ended: bool) -> int:
        """Raises LocalProtocolError when `capacity` is 0, and for what no request line or header can carry."""
        if self._active or self.finished or self._close:
            raise LocalProtocolError("a request amid another, or after the end")
        method, path, authority = request.method, request.path, request.authority
        if method == b"CONNECT" or not method or method.translate(None, TOKEN):
            raise LocalProtocolError(f"method {method!r}")
        if path[:1] != b"/" and path != b"*":
            raise LocalProtocolError("a path without a slash")
        start = b"%b %b HTTP/1.1\r\nhost: %b\r\n" % (method, path, authority)
        if start.count(b" ") != 3 or TAB in start:
            raise LocalProtocolError("a blank in path or authority")
        headers = [pair for pair in request.headers if pair[0] not in _NOT_FORWARDED]
        framing, sending, to_send = self._frame(request, headers, ended)
        self._wants_trailers = (b"te", b"trailers") in headers
        if request.upgrade is not None:
            framing.append(b"upgrade: %b\r\n" % request.upgrade)
            framing.append(b"connection: upgrade, te\r\n" if self._wants_trailers else b"connection: upgrade\r\n")
        elif self._wants_trailers:
            framing.append(b"connection: te\r\n")  # RFC 9110 section 10.1.4
        if request.expect_continue and not ended:
            framing.append(b"expect: 100-continue\r\n")
        framing.append(b"\r\n")
        self._write(_checked(start, headers, framing, len(headers) + len(framing) + 2))
        self._stream = self._next_stream
        self._next_stream += 2
        self._active, self._reading, self._sending, self._to_send = True, _HEAD, sending, to_send
        self._unconsumed = self._informational = 0
        self._head_only = method == b"HEAD"
        self._gives_trailers = sending is _CHUNKED and request.is_grpc
        self._wants_trailers = self._wants_trailers or self._gives_trailers
        self._upgrade = request.upgrade
        return self._stream

    def _frame(self, request: Request, headers: Headers, ended: bool) -> tuple[list[bytes], _Sending, int]:
        length = _length_of(request)
        if request.upgrade is not None:
            if request.upgrade == b"websocket" and not any(name == b"sec-websocket-key" for name, _ in headers):
                headers.append((b"sec-websocket-key", b64encode(self._websocket_nonce())))
            return [], _SILENT, 0
        if ended:
            if length:
                raise LocalProtocolError(f"no body, where {length} bytes were said to come")
            says = length is not None or request.method in _WITH_BODY
            return [b"content-length: 0\r\n"] if says else [], _ENDED, 0
        if length is not None:
            return [b"content-length: %d\r\n" % length], _SENDING_SIZED, length
        return [_TRANSFER_CHUNKED], _CHUNKED, 0

    def _may_send_trailers(self) -> bool:
        return self._gives_trailers

    def _message_sent(self) -> None:
        return

    # --- responses ---------------------------------------------------------------------------------------------------------------------

    def _read_line(self, line: bytes) -> tuple[bool, int] | BadHead:
        try:
            return _read_status_line(line)
        except BadHead as exc:
            return exc

    def _take_head(self, line: tuple[bool, int] | BadHead, fields: _Fields | BadHead, events: list[Event]) -> None:
        try:
            if isinstance(line, BadHead):
                raise line
            http10, status = line
            if isinstance(fields, BadHead):
                raise fields
            if status < 200:
                self._take_informational(status, fields, events)
                return
            self._take_response(http10, status, fields, events)
        except BadHead as exc:
            self._refuse(exc, events)

    def _take_informational(self, status: int, fields: _Fields, events: list[Event]) -> None:
        _check_no_body(status, fields)
        response = Response(status, [pair for pair in fields.headers if pair[0] != b"content-length"])
        if status == 101:
            if self._upgrade is None or fields.upgrade != self._upgrade:
                raise BadHead("101 without having been asked")
            self._reading, self._sending, self._close = _RAW, _SENDING_RAW, True
            events.append(ResponseHead(self._stream, response, False))
            return
        self._informational += 1
        if self._informational > MAX_INFORMATIONAL:
            raise BadHead("too many informational responses")
        if status in (100, 103):
            events.append(ResponseHead(self._stream, response, False))

    def _take_response(self, http10: bool, status: int, fields: _Fields, events: list[Event]) -> None:
        if status == 204:
            _check_no_body(status, fields)
        chunked = fields.coding is not None
        if fields.coding is not None:
            read_coding(fields.coding, length=fields.length is not None, http10=http10)
        options = fields.connection
        if b"close" in options or (http10 and b"keep-alive" not in options):
            self._close = True
        length = fields.length
        bodiless = self._head_only or status in (204, 304)
        headers = fields.headers.copy()
        if status == 204 and length is not None:
            length = None
            headers = [pair for pair in headers if pair[0] != b"content-length"]
        response = Response(status, headers, content_length=length)
        if self._upgrade is not None:
            self._sending = _ENDED  # the offer was not taken: there is nothing to send
        if bodiless or (length == 0 and not chunked):
            events.append(ResponseHead(self._stream, response, True))
            self._end_turn()
            return
        events.append(ResponseHead(self._stream, response, False))
        if not self._begin_body(length, chunked):
            self._reading = _UNTIL_CLOSE
            self._close = True

    def _end_message(self, trailers: Headers, events: list[Event]) -> None:
        if self._pieces:
            self._flush_body(events)
        events.append(BodyEnd(self._stream, trailers if self._wants_trailers else []))
        self._end_turn()

    def _end_turn(self) -> None:
        if self._close or self._sending is not _ENDED:  # a response before the request was over leaves the rest of it to whom?
            self._finish()
        self._active = False
        if not self.finished:
            self._reading = _HELD

    def _hold(self, view: memoryview, at: int, events: list[Event]) -> None:
        """Nobody asked for these bytes: whose answer would the next one be?"""
        self._finish()

    def _refuse(self, flaw: BadHead, events: list[Event]) -> int:
        return self._break(f"response: {flaw.reason}", events)

    def _fail(self, reason: str, code: int, events: list[Event]) -> None:
        if self._active:
            events.append(StreamReset(self._stream, code, reason))
        self._active = False
        self._finish()

    def receive_eof(self) -> Sequence[Event]:
        events: list[Event] = []
        if self.finished:
            return events
        if self._reading is _RAW:
            self._reading = _IGNORED
            events.append(BodyEnd(self._stream, []))
        elif self._reading is _UNTIL_CLOSE:
            self._end_message([], events)
        else:
            self._fail(f"the server closed the connection, reading {self._reading.value}", ErrorCode.CANCEL, events)
        return events


_NOT_FORWARDED: Final = FRAMING | {b"expect"}
_WITH_BODY: Final = frozenset({b"POST", b"PUT", b"PATCH"})


def _read_status_line(line: bytes) -> tuple[bool, int]:
    """Whether it is HTTP/1.0, and the status. The blank before an empty reason may be missing, as it often is."""
    version, status = line[:9], line[9:12]
    if version not in (b"HTTP/1.1 ", b"HTTP/1.0 ") or line[12:13] not in (b"", b" ") or not (len(status) == 3 and status.isdigit()):
        raise BadHead("invalid status line")
    number = int(status)
    if not 100 <= number <= 599:
        raise BadHead(f"status {number}")
    return version == b"HTTP/1.0 ", number


def _check_no_body(status: int, fields: _Fields) -> None:
    """1xx and 204 end with their head (RFC 9112 section 6.3) and may say nothing of a body (RFC 9110 section 8.6). Who does has one in
    mind, which would be taken for the next response. Raises BadHead, as Envoy does; a length of 0 is harmless and frequent."""
    if fields.coding is not None:
        raise BadHead(f"transfer-encoding in a response of {status}")
    if fields.length:
        raise BadHead(f"content-length in a response of {status}")


def _split_absolute(target: bytes, method: bytes) -> tuple[bytes, bytes]:
    """Authority and origin form of an absolute target (RFC 9112 section 3.2.2): it wins over ``host``."""
    scheme, mark, rest = target.partition(b"://")
    if not mark or scheme.lower() not in (b"http", b"https"):
        raise BadHead("invalid request target")
    rest = rest.partition(b"#")[0]
    cut = min((at for at in (rest.find(b"/"), rest.find(b"?")) if at >= 0), default=len(rest))
    authority, path = rest[:cut], rest[cut:]
    if not path:
        return authority, b"*" if method == b"OPTIONS" else b"/"
    return authority, path if path[:1] == b"/" else b"/" + path

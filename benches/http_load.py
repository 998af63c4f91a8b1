"""HTTP's load of the benches: a server, and a client that does the pieces of work it reads as JSON from standard input.

    python3 -m benches.http_load serve PORT
    python3 -m benches.http_load work

Requests and responses carry 1 KB: in HTTP/1.1 bodies of a told length, in HTTP/2 gRPC's unary calls of one message each way. As in
`benches.load`, one thread and one epoll loop; no more of either protocol is understood than a proxy at the other end needs.
"""

from __future__ import annotations

import select
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Final, Protocol, TypeAlias

from benches import load

HTTP1: Final = "HTTP/1.1"
GRPC: Final = "gRPC"

_READ: Final = 64 << 10
_BODY: Final = bytes(load.MESSAGE)
_RESPONSE: Final = b"HTTP/1.1 200 OK\r\ncontent-type: application/octet-stream\r\ncontent-length: %d\r\n\r\n" % load.MESSAGE + _BODY
_MESSAGE: Final = struct.pack("!BI", 0, load.MESSAGE) + _BODY
"""gRPC's: not compressed, its length, its bytes."""

Fields: TypeAlias = Mapping[str, str]


# --- HTTP/2, as much of it as both ends need

_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_ACK = _END_STREAM = 0x1
_END_HEADERS: Final = 0x4
_WINDOW: Final = 65535
"""Of a connection until the peer gives more, and of a stream, whose one message does not come near it (RFC 9113 section 6.9.2)."""


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack("!IBI", len(payload) << 8 | kind, flags, stream) + payload


_OPENING: Final = _frame(_SETTINGS, 0, 0, b"") + _frame(_WINDOW_UPDATE, 0, 0, struct.pack("!I", 0x7FFFFFFF - _WINDOW))
"""With all the room that a connection can be given: a bench sends less than that."""


class _HeaderWriter:
    """Header blocks in which a field is written once on a connection, and is an index from then on (RFC 7541), as gRPC's libraries do it.

    For less than 60 fields, of less than 4 KB together.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], int] = {}

    def write(self, fields: Fields) -> bytes:
        block = b""
        for field in fields.items():
            number = self._known.get(field)
            if number is None:
                self._known[field] = len(self._known)
                block += b"\x40" + _text(field[0]) + _text(field[1])
            else:
                block += bytes([0x80 | 61 + len(self._known) - number])
        return block


def _text(text: str) -> bytes:
    encoded = text.encode()
    length = bytearray([min(len(encoded), 127)])
    if len(encoded) >= 127:
        rest = len(encoded) - 127
        while rest > 127:
            length.append(rest & 127 | 128)
            rest >>= 7
        length.append(rest)
    return bytes(length) + encoded


class _Http2:
    """Frames that come, and those that the protocol itself answers them with. ``room``: what the connection may still send."""

    def __init__(self) -> None:
        self.room = _WINDOW
        self._rest = b""
        self._answers = b""

    def frames(self, data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
        """Type, flags, stream and payload of those that are about streams. Raises ConnectionError."""
        data, at = self._rest + data, 0
        while len(data) - at >= 9:
            size_and_kind, flags, stream = struct.unpack_from("!IBI", data, at)
            end = at + 9 + (size_and_kind >> 8)
            if end > len(data):
                break
            payload, kind = data[at + 9 : end], size_and_kind & 0xFF
            at = end
            if kind == _WINDOW_UPDATE:
                if not stream:
                    self.room += int.from_bytes(payload, "big")
            elif kind in (_SETTINGS, _PING):
                if not flags & _ACK:
                    self._answers += _frame(kind, _ACK, 0, payload if kind == _PING else b"")
            elif kind in (_GOAWAY, _RST_STREAM):
                raise ConnectionError(f"{'a stream was reset' if kind == _RST_STREAM else 'told to go away'}: {payload[-4:].hex()}")
            else:
                yield kind, flags, stream, payload
        self._rest = data[at:]

    def take_answers(self) -> bytes:
        answers, self._answers = self._answers, b""
        return answers


# --- the server


class _Answers(Protocol):
    """One connection of the server's: what came, to what is to be sent."""

    def receive(self, data: bytes) -> bytes: ...


class _Http1Answers:
    def __init__(self) -> None:
        self._rest = b""

    def receive(self, data: bytes) -> bytes:
        data, answers = self._rest + data, b""
        while (head := data.find(b"\r\n\r\n")) >= 0 and len(data) >= head + 4 + load.MESSAGE:
            data = data[head + 4 + load.MESSAGE :]
            answers += _RESPONSE
        self._rest = data
        return answers


class _GrpcAnswers:
    _HEAD: Final[Fields] = {":status": "200", "content-type": "application/grpc"}
    _TRAILERS: Final[Fields] = {"grpc-status": "0"}

    def __init__(self) -> None:
        self._http2 = _Http2()
        self._writer = _HeaderWriter()
        self._asked: deque[int] = deque()
        self._opening = _OPENING
        self._to_skip = len(_PREFACE)

    def receive(self, data: bytes) -> bytes:
        if self._to_skip:
            data, self._to_skip = data[self._to_skip :], max(self._to_skip - len(data), 0)
        for _, flags, stream, _ in self._http2.frames(data):
            if flags & _END_STREAM:
                self._asked.append(stream)
        answers, self._opening = self._opening + self._http2.take_answers(), b""
        while self._asked and self._http2.room >= len(_MESSAGE):
            self._http2.room -= len(_MESSAGE)
            stream, write = self._asked.popleft(), self._writer.write
            answers += _frame(_HEADERS, _END_HEADERS, stream, write(self._HEAD)) + _frame(_DATA, 0, stream, _MESSAGE)
            answers += _frame(_HEADERS, _END_HEADERS | _END_STREAM, stream, write(self._TRAILERS))
        return answers


class HttpServer(load.Server):
    """Serves for ever, on every connection what its client begins with."""

    def _greet(self, sock: socket.socket) -> None:
        data, descriptor = sock.recv(_READ), sock.fileno()
        if not data:
            self._close(descriptor)
            return
        answers: _Answers = _GrpcAnswers() if data[:3] == _PREFACE[:3] else _Http1Answers()

        def answer(_events: int) -> None:
            data = sock.recv(_READ)
            if data:
                sock.sendall(answers.receive(data))
            else:
                self._close(descriptor)

        sock.sendall(answers.receive(data))
        self._handlers[descriptor] = answer


# --- the client


class _Talk(Protocol):
    """One connection of the client's."""

    def ask(self, now: float) -> bytes:
        """One more request, if there is room for it; what is to be sent."""

    def receive(self, data: bytes, now: float) -> tuple[list[float], bytes]:
        """How long the requests took whose responses have come, and what is to be sent. Raises ConnectionError."""


class _Http1Talk:
    """A request at a time."""

    def __init__(self, host: str, path: str, fields: Fields) -> None:
        lines = [f"POST {path} HTTP/1.1", f"host: {host}", f"content-length: {load.MESSAGE}", *(f"{k}: {v}" for k, v in fields.items())]
        self._request = "\r\n".join([*lines, "", ""]).encode() + _BODY
        self._began = 0.0
        self._rest = b""

    def ask(self, now: float) -> bytes:
        self._began = now
        return self._request

    def receive(self, data: bytes, now: float) -> tuple[list[float], bytes]:
        data = self._rest + data
        head = data.find(b"\r\n\r\n")
        if head >= 0 and not data.startswith(b"HTTP/1.1 200 "):
            raise ConnectionError(f"answered {data[:300]!r}")
        if head < 0 or len(data) < head + 4 + load.MESSAGE:
            self._rest = data
            return [], b""
        self._rest = b""
        return [now - self._began], b""


class _GrpcTalk:
    """Calls, as many at once as are asked for."""

    def __init__(self, host: str, path: str, fields: Fields) -> None:
        fixed = {":method": "POST", ":scheme": "http", ":path": path, ":authority": host}
        self._fields = fixed | {"content-type": "application/grpc", "te": "trailers"} | dict(fields)
        self._http2 = _Http2()
        self._writer = _HeaderWriter()
        self._opening = _PREFACE + _OPENING
        self._next = 1
        self._wanted = 0
        self._began: dict[int, float] = {}
        self._missing: dict[int, int] = {}

    def ask(self, now: float) -> bytes:
        self._wanted += 1
        return self._begin(now)

    def _begin(self, now: float) -> bytes:
        data, self._opening = self._opening, b""
        while self._wanted and self._http2.room >= len(_MESSAGE):
            self._wanted -= 1
            self._http2.room -= len(_MESSAGE)
            stream, self._next = self._next, self._next + 2
            self._began[stream], self._missing[stream] = now, len(_MESSAGE)
            head = _frame(_HEADERS, _END_HEADERS, stream, self._writer.write(self._fields))
            data += head + _frame(_DATA, _END_STREAM, stream, _MESSAGE)
        return data

    def receive(self, data: bytes, now: float) -> tuple[list[float], bytes]:
        times = []
        for kind, flags, stream, payload in self._http2.frames(data):
            if kind == _DATA:
                self._missing[stream] -= len(payload)
            if flags & _END_STREAM:
                if self._missing.pop(stream):
                    raise ConnectionError("a call was answered without its message")
                times.append(now - self._began.pop(stream))
        return times, self._http2.take_answers() + self._begin(now)


_Kept: TypeAlias = tuple[socket.socket, _Talk]


class HttpClient(load.Client):
    """Keeps its connections from one piece of work to the next."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: dict[tuple[object, ...], list[_Kept]] = {}

    def ask(
        self, host: str, port: int, protocol: str, path: str, fields: Fields, parallel: int, seconds: float, rate: float = 0
    ) -> dict[str, float]:
        """Requests of 1 KB: with a rate so many a second, one at a time, without as many as go with so many under way: HTTP/1.1 on as many
        connections, gRPC on one. Percentiles are in seconds.
        """
        connections, each = (parallel, 1) if protocol == HTTP1 else (1, parallel)
        key = (host, port, protocol, path, *fields.items(), connections)
        kept = self._kept.setdefault(key, [])
        try:
            while len(kept) < connections:
                sock = socket.create_connection((host, port), timeout=load.PATIENCE)
                kept.append((sock, talk := _talk(protocol, f"{host}:{port}", path, fields)))
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                _one(sock, talk)
            began = time.perf_counter()
            times = _paced(*kept[0], seconds, rate) if rate else _saturated(kept, each, seconds)
        except OSError:
            _close(self._kept.pop(key))
            raise
        return {"seconds": time.perf_counter() - began, "requests": len(times), **load.percentiles(times)}

    def close(self) -> None:
        """All that is kept."""
        for kept in self._kept.values():
            _close(kept)
        self._kept.clear()


def _talk(protocol: str, host: str, path: str, fields: Fields) -> _Talk:
    return _Http1Talk(host, path, fields) if protocol == HTTP1 else _GrpcTalk(host, path, fields)


def _close(kept: list[_Kept]) -> None:
    for sock, _ in kept:
        sock.close()


def _one(sock: socket.socket, talk: _Talk) -> float:
    """One request and its response, on a socket that blocks."""
    sock.sendall(talk.ask(time.perf_counter()))
    while True:
        times, answers = talk.receive(_receive(sock), time.perf_counter())
        if answers:
            sock.sendall(answers)
        if times:
            return times[0]


def _receive(sock: socket.socket) -> bytes:
    if not (data := sock.recv(_READ)):
        raise ConnectionError("ended amid requests")
    return data


def _paced(sock: socket.socket, talk: _Talk, seconds: float, rate: float) -> list[float]:
    began, times = time.perf_counter(), []
    for number in range(int(seconds * rate)):
        time.sleep(max(0.0, began + number / rate - time.perf_counter()))
        times.append(_one(sock, talk))
    return times


def _saturated(connections: list[_Kept], each: int, seconds: float) -> list[float]:
    """The next request begins when one has ended."""
    epoll, clock, times = select.epoll(), time.perf_counter, list[float]()
    by_descriptor = {sock.fileno(): (sock, talk) for sock, talk in connections}
    deadline, under_way = clock() + seconds, 0
    for sock, talk in connections:
        epoll.register(sock.fileno(), select.EPOLLIN)
        for _ in range(each):
            sock.sendall(talk.ask(clock()))
            under_way += 1
    while under_way:
        for descriptor, _ in load.wait(epoll):
            sock, talk = by_descriptor[descriptor]
            now = clock()
            ended, data = talk.receive(_receive(sock), now)
            times += ended
            under_way -= len(ended)
            if now < deadline:
                for _ in ended:
                    data += talk.ask(now)
                    under_way += 1
            if data:
                sock.sendall(data)
    epoll.close()
    return times


if __name__ == "__main__":
    load.run(sys.argv[1:], HttpServer, HttpClient())

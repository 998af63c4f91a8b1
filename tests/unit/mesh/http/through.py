"""A waypoint's two HTTP/1.1 ends back to back: what a client's bytes become for an application, with nothing in between."""

from __future__ import annotations

from dataclasses import dataclass, field

from mesh.http.codec import BodyData, BodyEnd, Event, RefusedHead, RequestHead, StreamReset
from mesh.http.h1 import Http1Client, Http1Server
from mesh.http.message import Headers, Response
from mesh.http.options import ServerOptions
from waypoint_py.listener import SERVER_OPTIONS

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"


@dataclass
class Forwarded:
    """One request as it went to the application: the bytes, and what they mean. ``whole``: to its end."""

    raw: bytes
    body: bytes = b""
    whole: bool = False


@dataclass
class Through:
    """Feed it a client's bytes. A request is answered when the last of it has come."""

    options: ServerOptions = SERVER_OPTIONS
    forwarded: list[Forwarded] = field(default_factory=list)
    refused: list[int] = field(default_factory=list)
    """Statuses with which the codec had us answer."""
    answers: bytes = b""
    events: list[object] = field(default_factory=list)
    """All that was told, in words that do not depend on how bytes were cut."""

    def __post_init__(self) -> None:
        self.server = Http1Server(self.options)
        self.application = Http1Client(websocket_nonce=lambda: bytes(16))
        self.upstream = 0

    @property
    def closed(self) -> bool:
        return self.server.finished

    def feed(self, data: bytes, cut: int = 1 << 30) -> None:
        for at in range(0, len(data), cut):
            self._receive(data[at : at + cut])

    def _receive(self, data: bytes) -> None:
        """Several answers may follow one piece: whatever was held back comes after the turn before it."""
        while True:
            answered = False
            for event in self.server.receive(data):
                answered = self._take(event) or answered
            self.answers += self.server.take_outgoing()
            if not answered:
                return
            data = b""

    def _take(self, event: Event) -> bool:
        match event:
            case RequestHead():
                request = event.request
                self.events.append((request.method, request.authority, request.path, tuple(request.headers), request.version))
                self.upstream = self.application.send_request(request, ended=event.ended)
                self.forwarded.append(Forwarded(self.application.take_outgoing(), whole=event.ended))
                if request.upgrade is not None:  # an offer that nobody takes
                    self.application.send_end(self.upstream)
                    return self._answer(event.stream)
                return event.ended and self._answer(event.stream)
            case BodyData():
                if self.events and isinstance(self.events[-1], bytes):
                    self.events[-1] += bytes(event.data)
                else:
                    self.events.append(bytes(event.data))
                self.server.consumed(event.stream, len(event.data))
                self.application.send_data(self.upstream, event.data)
                self.forwarded[-1].body += event.data
                self.forwarded[-1].raw += self.application.take_outgoing()
                return False
            case BodyEnd():
                self.events.append(("end", tuple(event.trailers)))
                return self._end(event.stream, event.trailers)
            case RefusedHead():
                self.events.append(("refused", event.status, event.reason))
                self.refused.append(event.status)
                self.server.send_response(event.stream, Response(event.status, [], content_length=0), ended=True)
                return True
            case StreamReset():
                self.events.append(("reset", event.code, event.reason))
                return False
            case _:
                raise AssertionError(event)

    def _end(self, stream: int, trailers: Headers) -> bool:
        self.application.send_end(self.upstream, trailers)
        self.forwarded[-1].raw += self.application.take_outgoing()
        self.forwarded[-1].whole = True
        return self._answer(stream)

    def _answer(self, stream: int) -> bool:
        self.application.receive(ANSWER)
        assert self.application.reusable
        self.server.send_response(stream, Response(200, [], content_length=0), ended=True)
        return True

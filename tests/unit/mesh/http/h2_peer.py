"""What tests of the HTTP/2 codec share: events that outlive their buffer, and a peer whose every frame is made by hand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import hyperframe.frame
from hpack import Decoder, Encoder

from mesh.http.codec import BodyData, Event, RequestHead
from mesh.http.h2 import Http2Client, Http2Server
from mesh.http.message import Request, Response
from mesh.http.options import ServerOptions
from mesh.testing.hbone import StoppedClock
from mesh.wire.errors import RemoteProtocolError
from mesh.wire.frames import PREFACE, FrameType, frame_header, header_frames

DEFAULTS = ServerOptions()
Fields = Sequence[tuple[bytes | str, bytes | str]]
GET: Fields = [(":method", "GET"), (":scheme", "http"), (":authority", "shop.test"), (":path", "/")]
POST: Fields = [(":method", "POST"), *GET[1:]]


def kept(event: Event) -> Event:
    """An event that may outlive the buffer it came from."""
    return replace(event, data=bytes(event.data)) if isinstance(event, BodyData) else event


def deliver(codec: Http2Client | Http2Server, data: bytes, portions: Iterable[int] = ()) -> list[Event]:
    """Feed bytes, cut at the given lengths."""
    events: list[Event] = []
    at = 0
    for length in (*portions, len(data)):
        piece = data[at : at + length]
        at += len(piece)
        if piece:
            events += [kept(event) for event in codec.receive(memoryview(piece))]
    return events


def body_of(events: Iterable[Event], stream: int) -> bytes:
    """All of one stream's body."""
    return b"".join(bytes(event.data) for event in events if isinstance(event, BodyData) and event.stream == stream)


def plain(message: Request | Response) -> dict[str, object]:
    """A message's fields, to be compared."""
    return {name: getattr(message, name) for cls in type(message).__mro__ for name in getattr(cls, "__slots__", ())}


def request(method: bytes = b"GET", path: bytes = b"/", headers: list[tuple[bytes, bytes]] | None = None, **more: object) -> Request:
    return Request(method, b"http", b"shop.test", path, headers or [], **more)


class Peer:
    """One of our codecs, and what a peer without manners sends it. What the codec sends is read by hyperframe and hpack."""

    def __init__(self, codec: Http2Client | Http2Server | None = None, settings: bytes = b"", *, options: ServerOptions = DEFAULTS) -> None:
        self.clock = StoppedClock()
        self.codec = codec or Http2Server(options, now=self.clock)
        self.encoder = Encoder()
        self.decoder = Decoder()
        preface = PREFACE if isinstance(self.codec, Http2Server) else b""
        self.events: list[Event] = []
        self.sends(preface + frame_header(len(settings), FrameType.SETTINGS, 0, 0) + settings)
        self.codec.take_outgoing()

    @property
    def server(self) -> Http2Server:
        assert isinstance(self.codec, Http2Server)
        return self.codec

    @property
    def client(self) -> Http2Client:
        assert isinstance(self.codec, Http2Client)
        return self.codec

    def sends(self, *frames: bytes) -> list[Event]:
        """What the codec makes of it."""
        events = deliver(self.codec, b"".join(frames))
        self.events += events
        return events

    def head(self, stream: int, fields: Fields, *, end: bool = True, huffman: bool = False) -> bytes:
        """A head as HEADERS, and CONTINUATIONs if it is large."""
        return header_frames(stream, self.encoder.encode(fields, huffman=huffman), end_stream=end, max_frame_size=16384)

    def answers(self, stream: int, status: int = 200, body: bytes = b"") -> None:
        """The server's application answers."""
        self.server.send_response(stream, Response(status, []), ended=not body)
        if body:
            self.server.send_data(stream, body)
            self.server.send_end(stream)

    def hears(self) -> list[hyperframe.frame.Frame]:
        """The frames that the codec has sent since the last time."""
        return frames_of(self.codec.take_outgoing())

    def fails(self, *frames: bytes) -> RemoteProtocolError:
        """The connection breaks, and GOAWAY says why."""
        try:
            self.sends(*frames)
        except RemoteProtocolError as exc:
            failure = exc
        else:
            raise AssertionError(f"taken: {self.events[-5:]}")
        heard = self.hears()
        assert isinstance(heard[-1], hyperframe.frame.GoAwayFrame), heard
        assert heard[-1].error_code == failure.code
        assert self.codec.finished
        return failure

    def fails_again(self) -> int:
        """A broken connection stays so; the code."""
        try:
            self.codec.receive(b"\0")
        except RemoteProtocolError as exc:
            return exc.code
        raise AssertionError("taken")


def frames_of(data: bytes) -> list[hyperframe.frame.Frame]:
    """Frames as hyperframe, which is none of ours, reads them."""
    if data.startswith(PREFACE):
        data = data[len(PREFACE) :]
    frames = []
    while data:
        frame, length = hyperframe.frame.Frame.parse_frame_header(memoryview(data[:9]))
        frame.parse_body(memoryview(data[9 : 9 + length]))
        assert len(data) >= 9 + length
        data = data[9 + length :]
        frames.append(frame)
    return frames


def paths(events: Iterable[Event]) -> list[bytes]:
    """Of the requests that came."""
    return [event.request.path for event in events if isinstance(event, RequestHead)]

"""HTTP/2 by hand, for ends that mean ill: a connection whose every frame the test chooses, and frames that end one."""

from __future__ import annotations

import select
import ssl
import struct
from collections.abc import Iterator

import hpack
from hyperframe.frame import Frame, GoAwayFrame, HeadersFrame, RstStreamFrame, WindowUpdateFrame


class Link:
    """HTTP/2 by hand over a TLS connection."""

    def __init__(self, sock: ssl.SSLSocket) -> None:
        self.sock = sock
        self.name = "{}:{}".format(*sock.getsockname())
        self.encoder = hpack.Encoder()
        self._decoder = hpack.Decoder()
        self._buffer = b""

    def send(self, *parts: bytes) -> None:
        self.sock.sendall(b"".join(parts))

    def headers(self, stream: int, *fields: tuple[str, str], end: bool = False) -> bytes:
        frame = HeadersFrame(stream, self.encoder.encode(list(fields)))
        frame.flags = {"END_HEADERS", *(("END_STREAM",) if end else ())}
        return frame.serialize()

    def connect(self, stream: int, authority: str) -> bytes:
        return self.headers(stream, (":method", "CONNECT"), (":authority", authority))

    def receive(self) -> Frame | None:
        """The next frame; None at the end, in whatever manner it comes."""
        while (frame := self._take()) is None:
            try:
                data = self.sock.recv(65536)
            except (ConnectionError, ssl.SSLError):
                return None
            if not data:
                return None
            self._buffer += data
        return frame

    def _take(self) -> Frame | None:
        """The next frame if all of it has been read."""
        if len(self._buffer) < 9:
            return None
        frame, length = Frame.parse_frame_header(memoryview(self._buffer[:9]))
        if len(self._buffer) < 9 + length:
            return None
        frame.parse_body(memoryview(self._buffer[9 : 9 + length]))
        self._buffer = self._buffer[9 + length :]
        return frame

    def arrived(self) -> Iterator[Frame]:
        """The frames that are there already, and the rest of one that has begun."""
        while self._buffer or self.sock.pending() or select.select([self.sock], [], [], 0)[0]:
            if (frame := self.receive()) is None:
                return
            yield frame

    def status(self, stream: int, field: str = ":status") -> str:
        """A field of the answer on a stream; ``reset CODE``, ``goaway CODE`` or ``closed`` where there is no answer."""
        while (frame := self.receive()) is not None:
            if isinstance(frame, HeadersFrame):
                fields = dict(self._decoder.decode(frame.data))
                if frame.stream_id == stream:
                    return fields.get(field, f"no {field}")
            elif isinstance(frame, RstStreamFrame) and frame.stream_id == stream:
                return f"reset {frame.error_code}"
            elif isinstance(frame, GoAwayFrame) and frame.error_code:
                return f"goaway {frame.error_code}"
        return "closed"

    def end(self) -> int | None:
        """Read until the connection ends: the last GOAWAY's code."""
        code: int | None = None
        while (frame := self.receive()) is not None:
            if isinstance(frame, GoAwayFrame):
                code = frame.error_code
        return code


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


FRAMES: dict[str, tuple[bytes, int | None]] = {
    "DATA on stream 0": (frame(0, 0, 0, b"x"), 1),
    "DATA on an idle stream": (frame(0, 0, 5, b"x"), 1),
    "more padding than frame": (frame(0, 0x8, 1, b"\xffx"), 1),
    "HEADERS on an even stream": (frame(1, 0x4, 2, b"\x82"), 1),
    "a header block that is none": (frame(1, 0x4, 3, b"\xff\xff\xff\xff\xff\xff"), 9),
    "a header block with a bad index": (frame(1, 0x4, 3, b"\xfe"), 9),
    "CONTINUATION without HEADERS": (frame(9, 0x4, 1, b"\x82"), 1),
    "a frame amid a header block": (frame(1, 0, 3, b"") + frame(6, 0, 0, bytes(8)), 1),
    "CONTINUATION without end": (frame(1, 0, 3, b"") + frame(9, 0, 3, b"") * 100, 11),
    "a huge header block": (frame(1, 0, 3, b"") + frame(9, 0, 3, bytes(16000)) * 10, 11),
    "a frame beyond the size agreed": (struct.pack(">I", 2 << 20)[1:] + b"\0\0" + struct.pack(">I", 1), 6),
    "PUSH_PROMISE": (frame(5, 0x4, 1, b"\0\0\0\2\x82"), 1),
    "SETTINGS of 5 bytes": (frame(4, 0, 0, bytes(5)), 6),
    "SETTINGS with a window of 2^31": (frame(4, 0, 0, struct.pack(">HI", 4, 1 << 31)), 3),
    "WINDOW_UPDATE by 0": (WindowUpdateFrame(0).serialize()[:-4] + bytes(4), 1),
    "a window beyond 2^31-1": (frame(8, 0, 0, struct.pack(">I", (1 << 31) - 1)), 3),
    "RST_STREAM of an idle stream": (frame(3, 0, 99, bytes(4)), 1),
    "PING of 7 bytes": (frame(6, 0, 0, bytes(7)), 6),
    "the server's role": (frame(1, 0x4, 1, hpack.Encoder().encode([(":status", "200")])), None),
}
"""By name: bytes that a connection is ended for, with which code; None: it costs its stream alone."""

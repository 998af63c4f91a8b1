"""HTTP/2 frames as a peer might send them that means well, mostly, and bytes that began as such."""

from __future__ import annotations

from collections.abc import Sequence

from hpack import Encoder
from hypothesis import strategies as st

from mesh.wire.frames import FrameType, frame_header, header_frames, rst_stream_frame, window_update_frame

_STREAMS = st.sampled_from([1, 1, 1, 3, 3, 5, 7, 0, 2, 99])
_KINDS = ["headers", "headers", "data", "data", "fragments", "window", "reset", "settings", "ping", "goaway", "raw"]


@st.composite
def frames(draw: st.DrawFn, fields: Sequence[Sequence[tuple[str, str]]]) -> list[bytes]:
    """Up to a dozen, some of them several frames that belong together. ``fields``: what HEADERS may hold."""
    encoder = Encoder()
    wire: list[bytes] = []
    for _ in range(draw(st.integers(0, 12))):
        stream = draw(_STREAMS)
        kind = draw(st.sampled_from(_KINDS))
        match kind:
            case "headers" | "fragments":
                block = encoder.encode(draw(st.sampled_from(fields)), huffman=draw(st.booleans()))
                size = 16384 if kind == "headers" else draw(st.integers(1, 20))
                wire.append(header_frames(stream, block, end_stream=draw(st.booleans()), max_frame_size=size))
            case "data":
                flags = draw(st.sampled_from([0, 0, 1, 8, 9]))
                padding = draw(st.integers(0, 9)) if flags & 8 else 0
                payload = draw(st.binary(max_size=40))
                body = (bytes([padding]) if flags & 8 else b"") + payload + bytes(padding)
                wire.append(frame_header(len(body), FrameType.DATA, flags, stream) + body)
            case "window":
                wire.append(window_update_frame(stream, draw(st.sampled_from([0, 1, 1000, 2**31 - 1]))))
            case "reset":
                wire.append(rst_stream_frame(stream, draw(st.sampled_from([0, 1, 8, 2**32 - 1]))))
            case "settings":
                body = draw(st.binary(max_size=18))
                wire.append(frame_header(len(body), FrameType.SETTINGS, draw(st.integers(0, 1)), 0) + body)
                window = b"\0\4" + draw(st.integers(0, 2**31 - 1)).to_bytes(4)
                wire.append(frame_header(6, FrameType.SETTINGS, 0, 0) + window)
            case "ping":
                wire.append(frame_header(8, FrameType.PING, draw(st.integers(0, 1)), 0) + draw(st.binary(min_size=8, max_size=8)))
            case "goaway":
                wire.append(frame_header(8, FrameType.GOAWAY, 0, 0) + draw(st.binary(min_size=8, max_size=8)))
            case _:
                body = draw(st.binary(max_size=20))
                wire.append(frame_header(len(body), draw(st.integers(0, 12)), draw(st.integers(0, 255)), stream) + body)
    return wire


@st.composite
def mutated(draw: st.DrawFn, whole: st.SearchStrategy[list[bytes]]) -> bytes:
    """Such frames with a few bytes changed, lost, doubled or added."""
    wire = bytearray(b"".join(draw(whole)))
    for _ in range(draw(st.integers(0, 5))):
        if not wire:
            break
        at = draw(st.integers(0, len(wire) - 1))
        match draw(st.sampled_from(["flip", "drop", "double", "insert"])):
            case "flip":
                wire[at] ^= draw(st.integers(1, 255))
            case "drop":
                del wire[at : at + draw(st.integers(1, 10))]
            case "double":
                wire[at:at] = wire[at : at + draw(st.integers(1, 30))]
            case _:
                wire[at:at] = draw(st.binary(max_size=10))
    return bytes(wire)

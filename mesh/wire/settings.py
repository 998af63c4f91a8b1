"""SETTINGS of HTTP/2 (RFC 9113 section 6.5): what an end says of itself, and what the other has said.

`mesh.wire.frames` has checked a frame's size before anything here sees its payload.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from struct import Struct
from typing import Final

from mesh.wire.errors import ErrorCode, RemoteProtocolError
from mesh.wire.frames import ACK, DEFAULT_FRAME_SIZE, DEFAULT_WINDOW, MAX_WINDOW, PREFACE, FrameType, frame_header


class SettingCode(IntEnum):
    """Identifiers; the last is of RFC 8441 section 3."""

    HEADER_TABLE_SIZE = 1
    ENABLE_PUSH = 2
    MAX_CONCURRENT_STREAMS = 3
    INITIAL_WINDOW_SIZE = 4
    MAX_FRAME_SIZE = 5
    MAX_HEADER_LIST_SIZE = 6
    ENABLE_CONNECT_PROTOCOL = 8


_SETTING: Final = Struct(">HI")
_LARGEST_FRAME_SIZE: Final = (1 << 24) - 1
_DEFAULT_TABLE: Final = 4096
SETTINGS_ACK: Final = frame_header(0, FrameType.SETTINGS, ACK, 0)


def opening(settings: Mapping[SettingCode, int], *, server: bool) -> bytes:
    """The first bytes of an end: its SETTINGS, a client's behind the preface (RFC 9113 section 3.4)."""
    payload = b"".join(_SETTING.pack(code, value) for code, value in settings.items())
    frame = frame_header(len(payload), FrameType.SETTINGS, 0, 0) + payload
    return frame if server else PREFACE + frame


class PeerSettings:
    """What the peer has set so far, with the defaults of RFC 9113 for the rest. ``of_server``: who it is.

    What it asks of us only (the size of header lists) is its own business to enforce: our heads are bounded anyway. Identifiers that nobody
    knows are passed over, and nothing of them is kept.
    """

    __slots__ = ("_of_server", "connect_protocol", "initial_window_size", "max_concurrent_streams", "max_frame_size", "table_sizes")

    def __init__(self, *, of_server: bool) -> None:
        self._of_server = of_server
        self.table_sizes: tuple[int, int] = (_DEFAULT_TABLE, _DEFAULT_TABLE)
        """Of the header table: the smallest of the last frame and the last. Below the first, entries may have been evicted (RFC 7541
        section 4.2)."""
        self.max_concurrent_streams: int | None = None
        self.initial_window_size = DEFAULT_WINDOW
        self.max_frame_size = DEFAULT_FRAME_SIZE
        self.connect_protocol = False

    def take(self, payload: bytes) -> None:
        """A frame's payload. Raises RemoteProtocolError for what RFC 9113 section 6.5.2 forbids."""
        smallest = last = self.table_sizes[1]
        for code, value in _SETTING.iter_unpack(payload):
            match code:
                case SettingCode.HEADER_TABLE_SIZE:
                    smallest, last = min(smallest, value), value
                case SettingCode.ENABLE_PUSH:
                    if value > 1 or (value == 1 and self._of_server):
                        raise RemoteProtocolError(f"ENABLE_PUSH is {value}")
                case SettingCode.MAX_CONCURRENT_STREAMS:
                    self.max_concurrent_streams = value
                case SettingCode.INITIAL_WINDOW_SIZE:
                    if value > MAX_WINDOW:
                        raise RemoteProtocolError("INITIAL_WINDOW_SIZE beyond 2^31-1", ErrorCode.FLOW_CONTROL_ERROR)
                    self.initial_window_size = value
                case SettingCode.MAX_FRAME_SIZE:
                    if not DEFAULT_FRAME_SIZE <= value <= _LARGEST_FRAME_SIZE:
                        raise RemoteProtocolError(f"MAX_FRAME_SIZE is {value}")
                    self.max_frame_size = value
                case SettingCode.ENABLE_CONNECT_PROTOCOL:
                    if value > 1:
                        raise RemoteProtocolError("ENABLE_CONNECT_PROTOCOL is neither 0 nor 1")
                    self.connect_protocol = self.connect_protocol or value == 1  # RFC 8441 section 3: never 0 again
                case _:
                    pass
        self.table_sizes = (smallest, last)

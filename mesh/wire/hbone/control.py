"""The part of an HBONE connection that the h2 library keeps: preface, SETTINGS and PING, their validation and their acknowledgements.

h2 sees no frame of a stream, no WINDOW_UPDATE (flow control is our own accounting) and no GOAWAY: after one in either direction its state
machine refuses every other frame, while ours must go on answering PING and SETTINGS for as long as tunnels drain.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.exceptions import ProtocolError
from h2.settings import SettingCodes, Settings

from mesh.wire.errors import RemoteProtocolError
from mesh.wire.frames import PREFACE, FrameType, frame_header

# h2 keeps every identifier it ever saw: 65536 unknown ones would be 45 MiB of a peer's choosing.
_KNOWN_SETTINGS: Final = range(1, 7)


class Control:
    """h2's share of one connection: whole frames in, bytes to send out."""

    __slots__ = ("_h2",)

    def __init__(self, *, server: bool, settings: Mapping[SettingCodes, int]) -> None:
        self._h2 = H2Connection(H2Configuration(client_side=not server))
        self._h2.local_settings = Settings(client=not server, initial_values=dict(settings))
        self._h2.initiate_connection()
        if server:
            self._h2.receive_data(PREFACE)  # the splitter checks the real one, byte by byte

    @property
    def remote_settings(self) -> Settings:
        """What the peer set, with the defaults of RFC 9113 for what it did not."""
        return self._h2.remote_settings

    def take_outgoing(self) -> bytes:
        return self._h2.data_to_send()

    def receive_settings(self, flags: int, payload: bytes) -> None:
        """Take a SETTINGS frame's payload (a multiple of 6 bytes). Raises RemoteProtocolError."""
        settings = (payload[at : at + 6] for at in range(0, len(payload), 6))
        known = b"".join(setting for setting in settings if int.from_bytes(setting[:2]) in _KNOWN_SETTINGS)
        self._receive(FrameType.SETTINGS, flags, known)

    def receive_ping(self, flags: int, payload: bytes) -> None:
        """Take a PING's 8 bytes."""
        self._receive(FrameType.PING, flags, payload)

    def ping(self, data: bytes) -> None:
        self._h2.ping(data)

    def _receive(self, kind: int, flags: int, payload: bytes) -> None:
        try:
            self._h2.receive_data(frame_header(len(payload), kind, flags, 0) + payload)
        except ProtocolError as exc:
            raise RemoteProtocolError(str(exc), exc.error_code) from exc

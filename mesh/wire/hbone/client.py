"""The end of an HBONE connection that asks for tunnels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Final

from mesh.wire.errors import ErrorCode, LocalProtocolError
from mesh.wire.frames import MAX_STREAM_ID
from mesh.wire.hbone import patience
from mesh.wire.hbone.connection import HboneConnection, Limits
from mesh.wire.hbone.events import GoingAway, TunnelReset, TunnelResponded
from mesh.wire.hbone.streams import Signal, Stream
from mesh.wire.headers import MalformedHeaders
from mesh.wire.settings import SettingCode, opening

CLIENT_LIMITS: Final = Limits(max_header_list_size=16 << 10)


@lru_cache(maxsize=16)
def _opening(limits: Limits) -> bytes:
    settings = {
        SettingCode.ENABLE_PUSH: 0,
        SettingCode.INITIAL_WINDOW_SIZE: limits.stream_window,
        SettingCode.MAX_FRAME_SIZE: limits.max_frame_size,
        SettingCode.MAX_HEADER_LIST_SIZE: limits.max_header_list_size,
    }
    return opening(settings, server=False)


class HboneClient(HboneConnection):
    """The client core. Its preface and SETTINGS are outgoing from the start; tunnels may be requested at once."""

    def __init__(self, *, now: Callable[[], float], limits: Limits = CLIENT_LIMITS) -> None:
        super().__init__(now=now, limits=limits, server=False, opening=_opening(limits))
        self._next_stream = 1
        self._last_served = MAX_STREAM_ID

    @property
    def takes_tunnels(self) -> bool:
        """Whether a tunnel may be requested now: not after GOAWAY in either direction, and within the peer's concurrency."""
        return (
            len(self._streams) < self._peer_max_streams
            and not (self._goaway_sent or self._goaway_received)
            and self._next_stream <= MAX_STREAM_ID
            and self._failure is None
        )

    def request_tunnel(self, authority: str, headers: Mapping[str, str]) -> int:
        """Send CONNECT; returns the stream. `TunnelResponded` or `TunnelReset` follows; send no DATA before.

        ``authority`` is ``ip:port``, ``[v6]:port`` or ``hostname:port``; header names are lower-case. Raises LocalProtocolError when
        `takes_tunnels` is False.
        """
        if not self.takes_tunnels:
            raise LocalProtocolError("the peer takes no more tunnels on this connection")
        stream = Stream(self._next_stream, self._limits.stream_window, self._initial_send_window)
        self._next_stream += 2
        self._streams[stream.id] = stream
        stream.sent(Signal.HEADERS)
        self._send_headers(stream.id, self._writer.request(authority, headers), end=False)
        return stream.id

    def on_goaway(self, last_stream: int, code: int, debug: bytes) -> None:
        """RFC 9113 section 6.8: a later GOAWAY may only lower the last stream."""
        last_stream = min(last_stream, self._last_served)
        self._last_served = last_stream
        self._goaway_received = True
        self._events.append(GoingAway(last_stream, code))
        for stream in [stream for stream in self._streams if stream > last_stream]:
            self._streams.pop(stream).drop()
            self._remember_reset(stream)
            self._events.append(TunnelReset(stream, ErrorCode.REFUSED_STREAM))

    def _on_answer(self, state: Stream, block: bytes, end: bool) -> None:
        try:
            response = self._reader.read_response(block)
        except MalformedHeaders:
            self._fail_stream(state.id, ErrorCode.PROTOCOL_ERROR)
            return
        if response.status < 200:  # 101 has no place in HTTP/2; an interim response cannot be the last thing on a stream
            if end or response.status == 101:
                self._fail_stream(state.id, ErrorCode.PROTOCOL_ERROR)
            self._patience.spend(patience.IGNORED_FRAME, "interim responses")
            return
        state.received(Signal.HEADERS)
        self._events.append(TunnelResponded(state.id, response.status, response.headers))
        if response.status != 200:
            self._leave_refused(state, end)
        elif end:
            self._on_end(state)

    def _leave_refused(self, state: Stream, end: bool) -> None:
        """Close our side of a refused tunnel. A reset is only due if the peer still means to send: peers count resets."""
        if end:
            state.received(Signal.END)
            self.end(state.id)
        else:
            self.reset(state.id)

    def _on_headers_of_no_stream(self, stream: int, block: bytes, end: bool) -> None:
        self._reader.read(block)
        self._on_frame_of_no_stream(stream, answer=ErrorCode.STREAM_CLOSED)

    def _is_idle(self, stream: int) -> bool:
        return stream % 2 == 0 or stream >= self._next_stream

    def _last_peer_stream(self) -> int:
        return 0  # push is refused, so a server has no streams

    def _accept_no_more_than(self, last_stream: int) -> int:
        return 0

"""The end of an HBONE connection that is asked for tunnels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from h2.settings import SettingCodes

from mesh.wire.authority import parse_authority
from mesh.wire.errors import ErrorCode, LocalProtocolError, RemoteProtocolError
from mesh.wire.frames import MAX_STREAM_ID
from mesh.wire.hbone import patience
from mesh.wire.hbone.connection import OWN_PING, HboneConnection, Limits
from mesh.wire.hbone.events import RequestRefused, TunnelEnded, TunnelRequested
from mesh.wire.hbone.streams import Direction, Signal, Stream
from mesh.wire.headers import Fields, MalformedHeaders, parse_request

SERVER_LIMITS: Final = Limits()


class HboneServer(HboneConnection):
    """The server core. Its SETTINGS are outgoing from the start."""

    def __init__(self, *, now: Callable[[], float], limits: Limits = SERVER_LIMITS) -> None:
        settings = {
            SettingCodes.MAX_CONCURRENT_STREAMS: limits.max_concurrent_streams,
            SettingCodes.INITIAL_WINDOW_SIZE: limits.stream_window,
            SettingCodes.MAX_FRAME_SIZE: limits.max_frame_size,
            SettingCodes.MAX_HEADER_LIST_SIZE: limits.max_header_list_size,
        }
        super().__init__(now=now, limits=limits, server=True, settings=settings)
        self._highest = 0  # of the streams the peer opened
        self._highest_taken = 0  # of those that we looked at
        self._last_accepted = MAX_STREAM_ID  # by our GOAWAY

    def accept(self, stream: int, headers: Mapping[str, str]) -> None:
        """Answer 200: the tunnel is open, also for sending. Header names are lower-case."""
        self._answer(stream, 200, headers, end=False)

    def refuse(self, stream: int, status: int, headers: Mapping[str, str] | None = None) -> None:
        """Answer ``status`` (not 2xx) without a body, and be done with the stream; no event follows for it."""
        self._answer(stream, status, headers or {}, end=True)

    def drain(self) -> None:
        """Say goodbye without racing the peer's requests (RFC 9113 section 6.8): now GOAWAY with the highest stream there can be and a PING;
        once that has come back, by itself, GOAWAY with the last stream that was taken. Tunnels requested in between are still served."""
        if self._goaway_sent:
            return
        self.go_away(ErrorCode.NO_ERROR, MAX_STREAM_ID)
        self._ping(OWN_PING)

    def _answer(self, stream: int, status: int, headers: Mapping[str, str], *, end: bool) -> None:
        state = self._streams.get(stream)
        if state is None:
            return
        if not state.sent(Signal.HEADERS):
            raise LocalProtocolError(f"stream {stream} is already answered")
        self._send_headers(stream, self._writer.response(status, headers), end=end)
        if not end:
            return
        if state.receiving is Direction.ENDED:
            del self._streams[stream]
        else:
            # RFC 9113 section 8.1: a complete response and NO_ERROR ask the client to stop, without calling it wrong.
            self._reset(stream, ErrorCode.NO_ERROR)

    def _on_headers_of_no_stream(self, stream: int, fields: Fields, end: bool) -> None:
        if stream <= self._highest or stream % 2 == 0:
            if stream in self._reset_here:  # trailers that crossed our reset
                return
            raise RemoteProtocolError(f"HEADERS on stream {stream} after {self._highest}")
        self._highest = stream
        if stream > self._last_accepted:  # the peer reads in our GOAWAY that we pass over these
            self._remember_reset(stream)
            return
        if self.active_streams >= self._limits.max_concurrent_streams:
            self._patience.spend(patience.REFUSED, "requests over the limit of streams")
            self._reset(stream, ErrorCode.REFUSED_STREAM)
            return
        self._highest_taken = stream
        self._on_request(stream, fields, end)

    def _on_request(self, stream: int, fields: Fields, end: bool) -> None:
        state = Stream(stream, self._limits.stream_window, self._initial_send_window)
        self._streams[stream] = state
        state.received(Signal.HEADERS)
        if end:
            state.received(Signal.END)
        try:
            request = parse_request(fields)
            if request.method != "CONNECT":
                raise MalformedHeaders(f"expected method CONNECT, got {request.method[:32]}")
            if not request.authority:
                raise MalformedHeaders("no valid authority pseudo header: it is missing")
            target = parse_authority(request.authority)
        except MalformedHeaders as exc:
            self._refuse_request(stream, str(exc))
        except RemoteProtocolError as exc:
            self._refuse_request(stream, f"no valid authority pseudo header: {exc.reason}")
        else:
            self._events.append(TunnelRequested(stream, request.authority, target, request.headers))
            if end:
                self._events.append(TunnelEnded(stream))

    def _refuse_request(self, stream: int, because: str) -> None:
        self._patience.spend(patience.BAD_REQUEST, "bad requests")
        self.refuse(stream, 400)
        self._events.append(RequestRefused(stream, 400, because))

    def _on_answer(self, state: Stream, fields: Fields, end: bool) -> None:
        raise AssertionError("a server's streams begin with the peer's HEADERS")

    def _on_ping_acknowledged(self, payload: bytes) -> None:
        if payload != OWN_PING:
            super()._on_ping_acknowledged(payload)
        elif self._last_accepted == MAX_STREAM_ID and self._goaway_sent:
            self.go_away(ErrorCode.NO_ERROR)

    def _is_idle(self, stream: int) -> bool:
        return stream % 2 == 0 or stream > self._highest

    def _last_peer_stream(self) -> int:
        return self._highest_taken

    def _stop_accepting(self, last_stream: int) -> None:
        self._last_accepted = min(self._last_accepted, last_stream)

"""The end of an HBONE connection that is asked for tunnels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Final

from mesh.wire.authority import parse_authority
from mesh.wire.errors import ErrorCode, LocalProtocolError, RemoteProtocolError
from mesh.wire.frames import MAX_STREAM_ID
from mesh.wire.hbone import patience
from mesh.wire.hbone.connection import OWN_PING, HboneConnection, Limits
from mesh.wire.hbone.events import RequestRefused, TunnelEnded, TunnelRequested
from mesh.wire.hbone.streams import Signal, Stream
from mesh.wire.headers import MalformedHeaders, Request
from mesh.wire.settings import SettingCode, opening

SERVER_LIMITS: Final = Limits()


@lru_cache(maxsize=16)
def _opening(limits: Limits) -> bytes:
    settings = {
        SettingCode.MAX_CONCURRENT_STREAMS: limits.max_concurrent_streams,
        SettingCode.INITIAL_WINDOW_SIZE: limits.stream_window,
        SettingCode.MAX_FRAME_SIZE: limits.max_frame_size,
        SettingCode.MAX_HEADER_LIST_SIZE: limits.max_header_list_size,
    }
    return opening(settings, server=True)


class HboneServer(HboneConnection):
    """The server core. Its SETTINGS are outgoing from the start."""

    def __init__(self, *, now: Callable[[], float], limits: Limits = SERVER_LIMITS, wrong_method: int = 400) -> None:
        """``wrong_method``: what a request is answered that is no CONNECT."""
        self._wrong_method = wrong_method
        super().__init__(now=now, limits=limits, server=True, opening=_opening(limits))
        self._highest = 0  # of the streams the peer opened
        self._highest_taken = 0  # of those that we looked at
        self._last_accepted = MAX_STREAM_ID  # by our GOAWAY

    def accept(self, stream: int, headers: Mapping[str, str]) -> None:
        """Answer 200: the tunnel is open, also for sending. Header names are lower-case."""
        state = self._streams.get(stream)
        if state is not None:
            self._answer(state, 200, headers, end=False)

    def refuse(self, stream: int, status: int, headers: Mapping[str, str] | None = None) -> None:
        """Answer ``status`` (not 2xx) without a body, and be done with the stream; no event follows for it."""
        self._refuse(stream, status, headers or {}, ErrorCode.NO_ERROR)

    def drain(self) -> None:
        """Say goodbye without racing the peer's requests (RFC 9113 section 6.8): now GOAWAY with the highest stream there is and a PING;
        once that has come back, by itself, GOAWAY with the last stream that was taken. Tunnels requested in between are still served."""
        if self._goaway_sent:
            return
        self.go_away(ErrorCode.NO_ERROR, MAX_STREAM_ID)
        self._ping(OWN_PING)

    def _answer(self, state: Stream, status: int, headers: Mapping[str, str], *, end: bool) -> None:
        if not state.sent(Signal.HEADERS):
            raise LocalProtocolError(f"stream {state.id} is already answered")
        self._send_headers(state.id, self._writer.response(status, headers), end=end)

    def _refuse(self, stream: int, status: int, headers: Mapping[str, str], code: int) -> None:
        """A whole response, then a reset for what the client may still mean to send (RFC 9113 section 8.1: NO_ERROR calls it not wrong)."""
        state = self._streams.get(stream)
        if state is None:
            return
        self._answer(state, status, headers, end=True)
        state.sent(Signal.END)
        if state.is_over:
            del self._streams[stream]
        else:
            self._reset(stream, code)

    def _on_headers_of_no_stream(self, stream: int, block: bytes, end: bool) -> None:
        request: Request | MalformedHeaders
        try:
            request = self._reader.read_request(block)
        except MalformedHeaders as exc:
            request = exc  # answered if the stream is one that we take
        if stream <= self._highest or stream % 2 == 0:
            if stream in self._reset_here:  # trailers that crossed our reset
                self._patience.spend(patience.STALE_FRAME, "HEADERS on closed streams")
                return
            raise RemoteProtocolError(f"HEADERS on stream {stream} after {self._highest}")
        self._highest = stream
        if stream > self._last_accepted:  # the peer reads in our GOAWAY that we pass over these
            self._patience.spend(patience.REFUSED, "requests after GOAWAY")
            self._remember_reset(stream)
            return
        if self.active_streams >= self._limits.max_concurrent_streams:
            self._patience.spend(patience.REFUSED, "requests over the limit of streams")
            self._reset(stream, ErrorCode.REFUSED_STREAM)
            return
        self._highest_taken = stream
        self._on_request(stream, request, end)

    def _on_request(self, stream: int, request: Request | MalformedHeaders, end: bool) -> None:
        state = Stream(stream, self._limits.stream_window, self._initial_send_window)
        self._streams[stream] = state
        state.received(Signal.HEADERS)
        if end:
            state.received(Signal.END)
        if isinstance(request, MalformedHeaders):
            self._refuse_request(stream, f"malformed request: {request}", ErrorCode.PROTOCOL_ERROR)
            return
        if request.method != "CONNECT":
            self._refuse_request(stream, f"expected method CONNECT, got {request.method[:32]}", ErrorCode.NO_ERROR, self._wrong_method)
            return
        try:
            target = parse_authority(request.authority)
        except RemoteProtocolError as exc:
            self._refuse_request(stream, f"no valid authority pseudo header: {exc.reason}", ErrorCode.NO_ERROR)
            return
        self._events.append(TunnelRequested(stream, request.authority, target, request.headers))
        if end:
            self._events.append(TunnelEnded(stream))

    def _refuse_request(self, stream: int, because: str, code: int, status: int = 400) -> None:
        self._patience.spend(patience.BAD_REQUEST, "bad requests")
        self._refuse(stream, status, {}, code)
        self._events.append(RequestRefused(stream, status, because))

    def _on_answer(self, state: Stream, block: bytes, end: bool) -> None:
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

    def _accept_no_more_than(self, last_stream: int) -> int:
        self._last_accepted = min(self._last_accepted, last_stream)
        return self._last_accepted

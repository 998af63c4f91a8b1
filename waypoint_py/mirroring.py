"""A copy of a request, sent where nobody waits for the answer. It never holds up the request that it is a copy of."""

from __future__ import annotations

from typing import Final

from mesh.http.message import Headers, Request, Response
from mesh.model.l7.routing import Destination
from mesh.telemetry.log import get_logger
from waypoint_py.attempt import Attempt, protocol_towards
from waypoint_py.body import RequestBody
from waypoint_py.context import Connection
from waypoint_py.plane import Plane
from waypoint_py.upstream.balancer import NoEndpoint, Wish
from waypoint_py.upstream.session import UpstreamFailure

WAITING_AT_MOST: Final = 1 << 20
"""Bytes of a body that may wait for a slow destination: beyond, the copy is given up."""
PATIENCE_SECONDS: Final = 60.0
"""For the whole of it: without a route's timeout nothing else would end a copy that is never answered."""

_log = get_logger("mirror")


class MirrorCopy:
    """One copy (`waypoint_py.attempt.Listener`). Its answer is read and forgotten."""

    def __init__(self, plane: Plane, destination: Destination, request: Request, facts: Connection, *, ended: bool) -> None:
        self._plane = plane
        self._body = RequestBody()
        self._waiting = 0
        self._attempt: Attempt | None = None
        self._over = False
        if ended:
            self._body.finish([])
        wish = Wish(like=facts.destination.ip)
        endpoint = plane.balancer.choose(destination, wish, plane.reactor.now())
        if isinstance(endpoint, NoEndpoint):
            self._over = True
            _log.debug("not_sent", because=endpoint.because)
            return
        self._timer = plane.reactor.call_later(PATIENCE_SECONDS, self.cut_off)
        self._attempt = attempt = Attempt(self, plane, endpoint, ended=ended)
        attempt.begin(protocol_towards(endpoint, None, request, grpc=request.is_grpc), request, facts)

    # --- the request's body

    def push(self, data: bytes | memoryview) -> None:
        if self._over:
            return
        self._body.push(data)
        self._waiting += len(data)
        self._pump()
        if self._waiting > WAITING_AT_MOST:
            self._plane.counts.mirrors_dropped += 1
            self.cut_off()

    def finish(self, trailers: Headers) -> None:
        if not self._over:
            self._body.finish(trailers)
            self._pump()

    def cut_off(self) -> None:
        """Give it up. Idempotent."""
        if not self._over:
            self._end()

    def _pump(self) -> None:
        attempt = self._attempt
        stream = attempt.stream if attempt is not None else None
        if attempt is None or stream is None or attempt.sent:
            return
        while (room := stream.room()) > 0 and (piece := self._body.take(room)) is not None:
            stream.send_data(piece)
            self._waiting -= len(piece)
        if self._body.exhausted:
            attempt.send_end(self._body.trailers)

    # --- what the try hears

    def opened(self, attempt: Attempt) -> None:
        self._pump()

    def upstream_writable(self, attempt: Attempt) -> None:
        self._pump()

    def informational(self, attempt: Attempt, status: int, headers: Headers) -> None:
        pass

    def responded(self, attempt: Attempt, response: Response, ended: bool) -> None:
        if ended:
            self._end()

    def response_data(self, attempt: Attempt, data: bytes | memoryview) -> None:
        attempt.consumed(len(data))

    def completed(self, attempt: Attempt, trailers: Headers) -> None:
        self._end()

    def failed(self, attempt: Attempt, failure: UpstreamFailure) -> None:
        _log.debug("failed", because=failure.because)
        self._end()

    def crashed(self, error: Exception) -> None:
        self._end()

    def _end(self) -> None:
        if not self._over:
            self._over = True
            self._timer.cancel()
            self._body.clear()
            if self._attempt is not None:
                self._attempt.drop()

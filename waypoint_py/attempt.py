"""One try of a request on one endpoint: it hears the response and tells its exchange, until it is given up."""

from __future__ import annotations

from typing import Protocol as Shape

from mesh.http.message import Headers, Request, Response, Version
from mesh.model.address import SocketAddress
from mesh.model.l7.destination import H2Upgrade, TrafficPolicy
from mesh.model.l7.waypoint import Protocol
from mesh.model.service import AppProtocol
from waypoint_py.context import Connection
from waypoint_py.plane import Plane
from waypoint_py.upstream.session import Cancel, Endpoint, UpstreamFailure, UpstreamProtocol, UpstreamStream


class Listener(Shape):
    """Who is told how a try goes. It looks at ``attempt``, since what it has given up may still be heard of."""

    def opened(self, attempt: Attempt) -> None: ...

    def upstream_writable(self, attempt: Attempt) -> None: ...

    def informational(self, attempt: Attempt, status: int, headers: Headers) -> None: ...

    def responded(self, attempt: Attempt, response: Response, ended: bool) -> None: ...

    def response_data(self, attempt: Attempt, data: bytes | memoryview) -> None: ...

    def completed(self, attempt: Attempt, trailers: Headers) -> None: ...

    def failed(self, attempt: Attempt, failure: UpstreamFailure) -> None: ...

    def crashed(self, error: Exception) -> None: ...


class Attempt:
    """A `ResponseSink`. A defect of the listener ends the listener's request, not the connection that others share."""

    __slots__ = ("_cancel", "_ended", "_listener", "_plane", "begun", "endpoint", "sent", "stream")

    def __init__(self, listener: Listener, plane: Plane, endpoint: Endpoint, *, ended: bool) -> None:
        """``ended``: the request is a head alone."""
        self._listener = listener
        self._plane = plane
        self.endpoint = endpoint
        self.sent = ended
        """The request has been given away whole."""
        self.begun = False
        """Its head has been written."""
        self._ended = False
        self.stream: UpstreamStream | None = None
        """There once the head has been written, and no more when the response is over."""
        self._cancel: Cancel | None = None
        plane.balancer.began(endpoint)

    # --- what the exchange does

    def begin(self, kind: UpstreamProtocol, request: Request, facts: Connection) -> None:
        """Send the head, once. `Listener.opened` may be called from within this call."""
        cancel = self._plane.connections.request(self.endpoint, kind, request, self.sent, self, self._opened, client=facts)
        if not self._ended:
            self._cancel = cancel

    @property
    def local_address(self) -> SocketAddress | None:
        return self.stream.local_address if self.stream is not None else None

    def send_end(self, trailers: Headers) -> None:
        self.sent = True
        if self.stream is not None:
            self.stream.send_end(trailers or None)

    def consumed(self, size: int) -> None:
        if self.stream is not None:
            self.stream.consumed(size)

    def drop(self) -> None:
        """Give it up, if it is not over already. Idempotent."""
        stream, cancel = self.stream, self._cancel
        if self._ended:
            return
        self._over()
        if stream is not None:
            stream.reset()
        elif cancel is not None:
            cancel.cancel()

    # --- what it hears: each of these is called for every request, so each catches by itself

    def _opened(self, stream: UpstreamStream) -> None:
        if self._ended:
            stream.reset()
            return
        self.stream = stream
        self.begun = True
        try:
            self._listener.opened(self)
        except Exception as exc:
            self._crashed(exc)

    def informational(self, status: int, headers: Headers) -> None:
        try:
            self._listener.informational(self, status, headers)
        except Exception as exc:
            self._crashed(exc)

    def response(self, response: Response, ended: bool) -> None:
        if ended:
            self._over()
        try:
            self._listener.responded(self, response, ended)
        except Exception as exc:
            self._crashed(exc)

    def data(self, data: bytes | memoryview) -> None:
        try:
            self._listener.response_data(self, data)
        except Exception as exc:
            self._crashed(exc)

    def complete(self, trailers: Headers) -> None:
        self._over()
        try:
            self._listener.completed(self, trailers)
        except Exception as exc:
            self._crashed(exc)

    def failed(self, failure: UpstreamFailure) -> None:
        self._over()
        try:
            self._listener.failed(self, failure)
        except Exception as exc:
            self._crashed(exc)

    def writable(self) -> None:
        try:
            self._listener.upstream_writable(self)
        except Exception as exc:
            self._crashed(exc)

    def _crashed(self, error: Exception) -> None:
        self._plane.reactor.report(error, "a try of a request")
        self._listener.crashed(error)

    def _over(self) -> None:
        if not self._ended:
            self._ended = True
            self.stream = self._cancel = None  # which know us: nothing of a request is left to the collector of cycles
            self._plane.balancer.ended(self.endpoint)


def protocol_towards(endpoint: Endpoint, declared: Protocol | None, request: Request, *, grpc: bool) -> UpstreamProtocol:
    """What to speak to an application. ``declared``: by its port, where we stand before it; None: the mesh knows its service's ports.

    A port that declares nothing gets what the client speaks. gRPC is spoken in HTTP/2 whatever the port declares: in HTTP/1.1 it is none.
    """
    upgrade = endpoint.policy.pool.h2_upgrade
    if upgrade is _UPGRADE:
        return _HTTP2
    if upgrade is not _UPGRADE_AS_CLIENT:
        if grpc:
            return _HTTP2
        if declared is None:
            declared = _declared_by_service(endpoint)
        if declared in _BY_HTTP2:
            return _HTTP2
        if declared is _DECLARED_HTTP:
            return _HTTP1
    return _HTTP2 if request.version is _VERSION_2 else _HTTP1


_HTTP1, _HTTP2 = UpstreamProtocol.HTTP1, UpstreamProtocol.HTTP2  # members of an enum are slower to find
_VERSION_2, _DECLARED_HTTP = Version.HTTP_2, Protocol.HTTP
_BY_HTTP2 = (Protocol.HTTP2, Protocol.GRPC)
_UPGRADE, _UPGRADE_AS_CLIENT = H2Upgrade.UPGRADE, H2Upgrade.CLIENT


def direct_endpoint(facts: Connection) -> Endpoint:
    """Where traffic goes that was addressed to a workload itself."""
    return Endpoint(facts.destination, facts.target, None, None, TrafficPolicy(), "the workload that was dialled")


_PROTOCOLS = {AppProtocol.HTTP11: Protocol.HTTP, AppProtocol.HTTP2: Protocol.HTTP2, AppProtocol.GRPC: Protocol.GRPC}


def _declared_by_service(endpoint: Endpoint) -> Protocol:
    if endpoint.service is None or endpoint.destination is None:
        return Protocol.AUTO
    port = endpoint.destination.port
    declared = next((each.app_protocol for each in endpoint.service.ports if each.service_port == port), AppProtocol.UNKNOWN)
    return _PROTOCOLS.get(declared, Protocol.AUTO)

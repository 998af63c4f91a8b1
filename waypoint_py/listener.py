"""Port 15008: who comes in, what each of their CONNECT streams asks for, and what takes it from there.

The order is fixed: TLS proves the peer, `admit` says whether the target is ours, the facts of the connection are written down for good,
and only then is it answered and its bytes looked at.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from typing import Final

from mesh.http.h1 import Http1Server
from mesh.http.h2 import Http2Server
from mesh.http.options import ServerOptions
from mesh.model.address import NetworkAddress, SocketAddress
from mesh.model.identity import SpiffeId
from mesh.model.l7.routing import TcpRoute
from mesh.model.l7.waypoint import PathNormalization
from mesh.model.service import AppProtocol, Service
from mesh.model.workload import Workload
from mesh.reactor.hbone import PROTOCOL_ERROR, HboneLink, TunnelRequest, serve_hbone
from mesh.reactor.loop import Timer
from mesh.reactor.tcp import Listener, listen_on, reset
from mesh.runtime.env import host_and_port
from mesh.telemetry.log import get_logger
from mesh.tls.peer import verify_sole_client
from mesh.wire.hbone import Limits
from waypoint_py.admission import Refused, ToService, ToWorkload, admit, fronts
from waypoint_py.client_hello import HIDDEN, NotYet, ServerName, find_server_name, is_tls
from waypoint_py.context import Connection
from waypoint_py.credentials import Credentials
from waypoint_py.downstream import HEAD_SECONDS, HttpConnection
from waypoint_py.observer import RefusalRecord
from waypoint_py.plane import Plane
from waypoint_py.sniff import PREFACE, Carries, sniff
from waypoint_py.store import PortRuntime, speaks_http
from waypoint_py.stream import ByteStream
from waypoint_py.streams.tunnel import TunnelStream
from waypoint_py.tcp import TcpProxy

BACKLOG: Final = 4096
CONFIG_GRACE_SECONDS: Final = 1.0
"""How long what the mesh already calls ours may be without its configuration: the agents hear of a service and we of its routes in separate
messages. Until then nobody is let through, and then refused."""
STALL_SECONDS: Final = 5.0
"""Silence on a port without a declared protocol after which it is counted: perhaps both ends wait for the other to speak. It is not cut
off: nobody knows how long a client may think."""
NAME_SECONDS: Final = 5.0
"""For a whole ClientHello, where one is expected or has begun; after it the connection is judged as one whose name is hidden."""
DRAINED: Final = "the waypoint ends"
SERVER_OPTIONS: Final = ServerOptions(paths=PathNormalization.NONE)
"""Of connections within tunnels. Each request's path is normalised as is configured when it comes, not when its connection was made."""

_log = get_logger("listener")


def open_sockets(address: str) -> list[socket.socket]:
    """Listen on ``host:port``; the wildcard takes both families where the host has both. Raises OSError, ValueError."""
    host, port = host_and_port(address)
    if host == "::" and socket.has_dualstack_ipv6():
        return [socket.create_server((host, port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=BACKLOG)]
    if host == "::":
        host = "0.0.0.0"
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return [socket.create_server((host, port), family=family, backlog=BACKLOG)]
    except OSError as exc:
        if exc.errno != errno.EAFNOSUPPORT:
            raise
        return [socket.create_server(("0.0.0.0", port), backlog=BACKLOG)]


class HboneListener:
    """All of them: listening sockets, links and what they carry."""

    def __init__(self, plane: Plane, credentials: Credentials, *, max_streams: int, synced: Callable[[], bool]) -> None:
        self.plane = plane
        self.credentials = credentials
        self.limits = Limits(max_concurrent_streams=max_streams)
        self.synced = synced
        self._listeners: list[Listener] = []
        self._links: set[_Peer] = set()
        self.carried: set[Carried] = set()
        plane.store.when_changed(self._let_go)

    def _let_go(self) -> None:
        """Clients of a service that we no longer stand before are to come again elsewhere with their next request, without having to be
        refused one."""
        self.plane.store.when_changed(self._let_go)
        for carried in [each for each in self.carried if each.is_stranded]:
            carried.go_away()

    def listen(self, sock: socket.socket) -> None:
        """Take the connections of a listening socket."""
        self._listeners.append(listen_on(self.plane.reactor, sock, self._accepted))

    @property
    def links(self) -> int:
        """HBONE connections."""
        return len(self._links)

    def wind_down(self) -> None:
        """Still take connections; tell every client with its next answer to go elsewhere."""
        self.plane.draining = True
        for carried in list(self.carried):
            carried.wind_down()

    def wind_down_leavers(self) -> None:
        """The same for clients of services that the mesh sends elsewhere by now: before we lose the configuration of these (`_let_go`)."""
        for carried in [each for each in self.carried if each.is_leaving]:
            carried.wind_down()

    def drain(self) -> None:
        """Take no new connections; tell every peer to go elsewhere with its next one, and every client with its next request, or now if it
        has none under way."""
        self.plane.draining = True
        for listener in self._listeners:
            listener.finish()
        self._listeners.clear()
        for peer in list(self._links):
            peer.drain()
        for carried in list(self.carried):
            carried.go_away()

    def abort(self, reason: str) -> None:
        """End everything at once."""
        for carried in list(self.carried):
            carried.abort(reason)
        for peer in list(self._links):
            peer.abort(reason)

    def _accepted(self, sock: socket.socket, address: SocketAddress) -> None:
        context = self.credentials.context()
        if isinstance(context, str):
            reset(sock)
            self.refused(None, address, "", 0, f"identity error: {context}")
            return
        peer = _Peer(self, address)
        peer.link = serve_hbone(
            self.plane.reactor,
            sock,
            context,
            on_handshake=peer.verify,
            on_request=peer.requested,
            on_refused=lambda refused: self.refused(peer.identity, address, "", refused.status, refused.because),
            on_close=peer.closed,
            limits=self.limits,
            wrong_method=405,
        )
        self._links.add(peer)

    def forget(self, peer: _Peer) -> None:
        self._links.discard(peer)

    def refused(self, peer: SpiffeId | None, address: SocketAddress, authority: str, status: int, because: str) -> None:
        self.plane.observer.refused(RefusalRecord(self.plane.wall(), peer, address, authority, status, because))


class _Peer:
    """One HBONE connection: a client pod's agent with the pod's certificate."""

    def __init__(self, listener: HboneListener, address: SocketAddress) -> None:
        self._listener = listener
        self._plane = listener.plane
        self.address = address
        self.identity: SpiffeId | None = None
        self.link: HboneLink | None = None

    def verify(self, der: bytes) -> str | None:
        settings = self._plane.store.settings
        domains = settings.trust_domains or (self._listener.credentials.identity.trust_domain,)
        found = verify_sole_client(der, domains)
        if isinstance(found, str):
            return found
        self.identity = found
        return None

    def closed(self, because: str | None) -> None:
        self._listener.forget(self)
        if because is not None and (self.identity is None or because.startswith(PROTOCOL_ERROR)):
            self._listener.refused(self.identity, self.address, "", 0, because)

    def drain(self) -> None:
        if self.link is not None:
            self.link.close_gracefully()

    def abort(self, reason: str) -> None:
        if self.link is not None:
            self.link.abort(reason)

    def requested(self, request: TunnelRequest) -> None:
        identity = self.identity
        assert identity is not None  # a link without a verified certificate carries no request
        Opening(self._listener, self, identity, request).admit()


class Opening:
    """One CONNECT, until it is answered."""

    def __init__(self, listener: HboneListener, peer: _Peer, identity: SpiffeId, request: TunnelRequest) -> None:
        self._listener = listener
        self._plane = listener.plane
        self._peer = peer
        self._identity = identity
        self._request = request
        self._grace: Timer | None = None
        self._answered = False

    def admit(self) -> None:
        """Decide, at once or when the configuration has come that the mesh says must come."""
        if self._answered:
            return
        if not self._request.alive:
            self._settle()
            return
        if not self._listener.synced():
            self._refuse(503, "the waypoint is not configured yet")
            return
        plane = self._plane
        match admit(plane.state, plane.us(), plane.store.charge, self._identity.namespace, self._request.target):
            case Refused(status, because):
                self._refuse(status, because)
            case ToWorkload(workload, destination):
                self._accept(destination, None, workload, None)
            case ToService(service, destination):
                port = plane.store.find_port(str(service.key), destination.port)
                if port is None:
                    self._wait_for_config(f"nothing is configured for {service.key} port {destination.port}")
                else:
                    self._accept(destination, service, None, port)

    def _wait_for_config(self, because: str) -> None:
        if self._grace is None:
            self._grace = self._plane.reactor.call_later(CONFIG_GRACE_SECONDS, lambda: self._refuse(503, because))
        self._plane.store.when_changed(self.admit)

    def _accept(self, destination: SocketAddress, service: Service | None, target: Workload | None, port: PortRuntime | None) -> None:
        self._settle()
        plane, peer = self._plane, self._peer
        address = NetworkAddress(plane.us().network, peer.address.ip)
        workload = plane.state.find_workload_of_peer(address.ip, address.network, self._identity)
        facts = Connection(self._identity, peer.address, destination, service, target, workload, self._request.headers.get("traceparent"))
        stream = TunnelStream(plane.reactor, self._request.accept({}))
        Carried(self._listener, stream, facts).start(port)

    def _refuse(self, status: int, because: str) -> None:
        if not self._answered:
            self._settle()
            self._request.refuse(status)
            self._listener.refused(self._identity, self._peer.address, self._request.authority, status, because)

    def _settle(self) -> None:
        self._answered = True
        if self._grace is not None:
            self._grace.cancel()


class _NotYet:
    """More bytes are needed."""


_NOT_YET: Final = _NotYet()


class Carried:
    """One client connection within a CONNECT stream: listens to its first bytes where they decide, then has it taken over.

    A `Sink` until then.
    """

    def __init__(self, listener: HboneListener, stream: ByteStream, facts: Connection) -> None:
        self._listener = listener
        self._plane = listener.plane
        self._stream = stream
        self._facts = facts
        self._early = bytearray()
        self._port: PortRuntime | None = None
        self._only_http = False
        self._reads_name = False
        self._timer: Timer | None = None
        self._taken: HttpConnection | TcpProxy | None = None
        self._gone = False
        listener.carried.add(self)
        self._plane.counts.connections += 1

    def start(self, port: PortRuntime | None) -> None:
        """``port`` None: traffic to a workload, of which no protocol is declared."""
        self._port = port
        http = speaks_http(port.config.protocol) if port is not None else None
        if http is False:
            if not self._is_tls:
                self._take_over(Carries.BYTES)
                return
            self._wait_for_name()
            self._stream.attach(self)
            return
        self._only_http = http is True
        if not self._only_http:
            self._timer = self._plane.reactor.call_later(STALL_SECONDS, self._stalled)
        self._stream.attach(self)

    def _wait_for_name(self) -> None:
        self._reads_name = True
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._plane.reactor.call_later(NAME_SECONDS, lambda: self._take_over(Carries.BYTES))

    @property
    def _is_tls(self) -> bool:
        """Whether the service's port is declared as TLS: the client speaks first there, and says whom it wants."""
        service, port = self._facts.service, self._facts.destination.port
        return service is not None and any(each.service_port == port and each.app_protocol is AppProtocol.TLS for each in service.ports)

    @property
    def is_stranded(self) -> bool:
        """Whether it is to a service that is not ours any more."""
        service = self._facts.service
        return service is not None and self._plane.store.find_service(str(service.key)) is None

    @property
    def is_leaving(self) -> bool:
        """Whether the mesh sends clients of its service past us."""
        if self._facts.service is None:
            return False
        plane = self._plane
        service = plane.state.find_service(self._facts.service.key)
        return service is None or not fronts(plane.state, plane.us(), service)

    def wind_down(self) -> None:
        """One more answer; a connection that is none of HTTP goes on."""
        if isinstance(self._taken, HttpConnection):
            self._taken.wind_down()

    def go_away(self) -> None:
        """No further requests; a connection that is none of HTTP goes on."""
        if self._taken is None and self._only_http and not self._early:
            self._take_over(Carries.HTTP1)
        if isinstance(self._taken, HttpConnection):
            self._taken.go_away()

    def abort(self, reason: str) -> None:
        if self._taken is not None:
            self._taken.abort(reason)
        else:
            self._stream.abort(reason)

    # --- the first bytes

    def data(self, data: memoryview) -> None:
        self._early += data
        self._look(ended=False)

    def ended(self) -> None:
        if self._taken is None:
            self._look(ended=True)

    def drained(self) -> None:
        pass

    def closed(self, reason: str | None) -> None:
        self._forget()

    def _look(self, *, ended: bool) -> None:
        if self._reads_name:
            if ended or self._find_name() is not _NOT_YET:
                self._take_over(Carries.BYTES)
            return
        found = sniff(bytes(self._early), ended=ended)
        if self._only_http and found is not Carries.HTTP2 and (found is not None or not _may_be_preface(self._early)):
            found = Carries.HTTP1  # what it says of itself is the codec's to judge
        if found is Carries.BYTES and is_tls(bytes(self._early[:2])):
            self._wait_for_name()
            self._look(ended=ended)
        elif found is not None:
            self._take_over(found)
        elif self._only_http and self._timer is None:
            self._timer = self._plane.reactor.call_later(HEAD_SECONDS, lambda: self._stream.abort("no whole preface"))

    def _find_name(self) -> ServerName | _NotYet:
        """The name in a ClientHello."""
        try:
            return find_server_name(bytes(self._early))
        except NotYet:
            return _NOT_YET

    def _stalled(self) -> None:
        self._timer = None
        self._plane.counts.stalled_sniffs += 1
        facts = self._facts
        _log.warning(
            "sniff.stalled",
            destination=str(facts.destination),
            service=facts.service_key,
            peer=str(facts.peer),
            hint="the port declares no protocol and the client says nothing: if the server speaks first, declare it as TCP",
        )

    def _take_over(self, carries: Carries) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        name = self._find_name() if self._reads_name else None
        early, self._early = bytes(self._early), bytearray()
        plane, facts = self._plane, self._facts
        if carries is Carries.BYTES:
            sni: ServerName = HIDDEN if isinstance(name, _NotYet) else name
            port = self._port
            route: TcpRoute | None = port.tcp if port is not None else None
            declared = port is not None and speaks_http(port.config.protocol) is False
            proxy = self._taken = TcpProxy(plane, self._stream, facts, route, early=early, sni=sni, declared=declared, on_gone=self._forget)
            proxy.start()
            return
        serial = carries is Carries.HTTP1
        codec = Http1Server(SERVER_OPTIONS) if serial else Http2Server(SERVER_OPTIONS, now=plane.reactor.now)
        connection = self._taken = HttpConnection(plane, self._stream, codec, facts, serial=serial, on_gone=self._forget)
        if plane.draining or self.is_leaving:
            connection.wind_down()
        connection.start(early)

    def _forget(self) -> None:
        if not self._gone:
            self._gone = True
            if self._timer is not None:
                self._timer.cancel()
            self._listener.carried.discard(self)
            self._plane.counts.connections -= 1


def _may_be_preface(data: bytes | bytearray) -> bool:
    return PREFACE.startswith(bytes(data))

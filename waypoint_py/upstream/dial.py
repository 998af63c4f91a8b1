"""Makes a connection to an endpoint: a tunnel to its node's agent or plain TCP, the PROXY header, TLS within.

A dial's steps are callbacks of one object, in the order of the connection; whatever goes wrong ends in one `UpstreamFailure`.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Final, Protocol, TypeAlias

from OpenSSL import SSL

from mesh.linux.sockets import KEEPALIVE_IDLE_SECONDS, KEEPALIVE_INTERVAL_SECONDS, KEEPALIVE_PROBES
from mesh.model.address import SocketAddress
from mesh.model.identity import SpiffeId
from mesh.model.l7.destination import Keepalive, UpstreamTls
from mesh.model.ports import INBOUND_HBONE
from mesh.model.workload import TunnelProtocol, Workload
from mesh.reactor.hbone import HboneLink, Tunnel, TunnelFailure
from mesh.reactor.loop import Reactor, Timer
from mesh.reactor.pool import GONE, TIMED_OUT, OnLink, PoolKey, PoolLimits, TunnelPool, dial_error, open_link
from mesh.reactor.tcp import CONNECT_TIMEOUT, connect
from mesh.state.resolve import expected_identities
from mesh.tls.peer import verify_server
from mesh.wire.proxy_protocol import encode_header, encode_local, encode_text
from waypoint_py.context import Connection
from waypoint_py.streams.base import Stream
from waypoint_py.streams.tcp import TcpStream
from waypoint_py.streams.tls import TlsStream
from waypoint_py.streams.tunnel import TunnelStream
from waypoint_py.upstream.session import Endpoint, FailureKind, UpstreamFailure, UpstreamProtocol
from waypoint_py.upstream.tls import UnusableTls, plan_tls

LIMITS: Final = PoolLimits(max_streams=100, unused_release=300.0)
"""Of HBONE connections: agents serve 200 tunnels each, and fewer share the fate of one connection."""

MOST_RETRIES: Final = 3
"""As the agents: a peer's agent may have several movers that die at once, and each has pooled connections of which one hears one after the
other. Nothing of the application's has gone with an unanswered CONNECT."""

_LINK_KEEPALIVE: Final = Keepalive(KEEPALIVE_PROBES, KEEPALIVE_IDLE_SECONDS, KEEPALIVE_INTERVAL_SECONDS)
"""Of HBONE connections, which no rule is about."""

_ANYWHERE: Final = IPv4Address(0)
"""A waypoint's connections all come from its own address."""


class Credentials(Protocol):
    """The waypoint's certificate."""

    @property
    def identity(self) -> SpiffeId:
        """Its own."""

    def context(self) -> SSL.Context | str:
        """For HBONE with the certificate that is current now (`mesh.tls.contexts.hbone_context`); or why there is none."""


Announce: TypeAlias = Callable[[Endpoint, Connection | None], Mapping[str, str]]
"""Headers of a CONNECT (`waypoint_py.upstream.announce`). The client is None for connections that the requests of many share."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be spoken on a connection. ``host``: the request's, for SNI. ``client``: whose bytes alone it will carry, if known."""

    protocol: UpstreamProtocol
    host: str = ""
    client: Connection | None = None


OnDialled: TypeAlias = Callable[[Stream | UpstreamFailure], None]


class Dialler:
    """Dials for one waypoint process, and keeps its HBONE connections."""

    def __init__(self, reactor: Reactor, credentials: Credentials, announce: Announce, limits: PoolLimits = LIMITS) -> None:
        self.reactor = reactor
        self.announce = announce
        self._credentials = credentials
        self.links = TunnelPool(reactor, self._dial_link, limits)

    def dial(self, endpoint: Endpoint, wanted: Wanted, on_done: OnDialled) -> Dialling:
        """``on_done`` gets a stream without a sink, or the failure; once, never from within this call."""
        dialling = Dialling(self, endpoint, wanted, on_done)
        self.reactor.call_soon(dialling.begin, dialling.crashed)
        return dialling

    def close(self, *, gracefully: bool) -> None:
        """Let go of the HBONE connections: each when its tunnels have ended, or at once."""
        self.links.close(gracefully=gracefully)

    def find_link_key(self, workload: Workload, endpoint: Endpoint) -> PoolKey:
        """By which tunnels share a connection."""
        peer = SocketAddress(endpoint.address.ip, INBOUND_HBONE)
        return PoolKey(self._credentials.identity, expected_identities(workload, endpoint.service), peer, _ANYWHERE)

    def _dial_link(self, key: PoolKey, on_link: OnLink[HboneLink], on_closed: Callable[[HboneLink], None]) -> None:
        context = self._credentials.context()
        if isinstance(context, str):
            on_link(f"identity error: {context}")
            return
        try:
            sock = make_socket(key.peer, _LINK_KEEPALIVE)
        except OSError as exc:
            on_link(dial_error(exc))
            return

        def connected(error: OSError | None) -> None:
            if error is not None:
                sock.close()
                on_link(dial_error(error))
                return
            open_link(
                self.reactor,
                sock,
                context,
                verify_peer=lambda der: verify_server(der, key.expected),
                on_link=on_link,
                on_closed=on_closed,
            )

        connect(self.reactor, sock, key.peer, CONNECT_TIMEOUT, connected)


class Dialling:
    """One connection on its way."""

    __slots__ = ("_dialler", "_endpoint", "_on_done", "_retries", "_timer", "_undo", "_wanted")

    def __init__(self, dialler: Dialler, endpoint: Endpoint, wanted: Wanted, on_done: OnDialled) -> None:
        self._dialler = dialler
        self._endpoint = endpoint
        self._wanted = wanted
        self._on_done: OnDialled | None = on_done
        self._retries = 0
        self._timer: Timer | None = None
        self._undo: Callable[[], None] = _nothing
        """Gives up the step that is under way."""

    def cancel(self) -> None:
        """``on_done`` will not be called. Idempotent."""
        if self._settle() is not None:
            self._undo()

    def crashed(self, reason: str) -> None:
        """A callback of this dial failed, by a mistake of ours."""
        self._fail(FailureKind.CONNECT, reason)

    def abandon(self, because: str) -> None:
        """Fail now."""
        self._fail(FailureKind.CONNECT, because)

    def begin(self) -> None:
        """What `Dialler.dial` has the loop call."""
        if self._on_done is None:
            return
        tls = self._endpoint.policy.tls
        if tls is not None and tls.broken:
            self._fail(FailureKind.TLS, f"TLS is configured and cannot be used: {tls.broken}", _tls_error(tls.broken))
            return
        timeout = self._endpoint.policy.pool.connect_timeout
        self._timer = self._dialler.reactor.call_later(timeout, lambda: self._timed_out(timeout))
        workload = self._endpoint.workload
        if workload is not None and workload.tunnel_protocol is TunnelProtocol.HBONE:
            self._checkout(workload)
        else:
            self._connect()

    def _timed_out(self, timeout: float) -> None:
        self._fail(FailureKind.CONNECT_TIMEOUT, f"no connection to {self._endpoint.address} within {timeout:g} s")

    # --- plain TCP

    def _connect(self) -> None:
        endpoint, reactor = self._endpoint, self._dialler.reactor
        pool = endpoint.policy.pool
        try:
            sock = make_socket(endpoint.address, pool.keepalive)
        except OSError as exc:
            self._fail(FailureKind.CONNECT, f"connection failed: {exc}")
            return

        def connected(error: OSError | None) -> None:
            self._undo = _nothing
            if error is None:
                self._carried(TcpStream(reactor, sock))
                return
            sock.close()
            if isinstance(error, TimeoutError):
                self._timed_out(pool.connect_timeout)
            else:
                transport = f"delayed connect error: {error.strerror}"
                self._fail(FailureKind.CONNECT, f"connection to {endpoint.address} failed: {error}", transport)

        pending = connect(reactor, sock, endpoint.address, pool.connect_timeout, connected)

        def undo() -> None:
            pending.cancel()
            sock.close()

        self._undo = undo

    # --- HBONE

    def _checkout(self, workload: Workload) -> None:
        key = self._dialler.find_link_key(workload, self._endpoint)
        self._dialler.links.checkout(key, lambda link: self._got_link(link, workload))

    def _got_link(self, link: HboneLink | str, workload: Workload) -> None:
        if self._on_done is None:
            return
        if isinstance(link, str):
            self._tunnel_failed(kind_of(link), f"{_agent_of(self._endpoint, workload)}: {link}", link)
            return
        headers = self._dialler.announce(self._endpoint, self._wanted.client)
        tunnel = link.open_tunnel(str(self._endpoint.address), headers, lambda answer: self._answered(answer, workload))
        self._undo = tunnel.reset

    def _answered(self, answer: Tunnel | TunnelFailure, workload: Workload) -> None:
        if self._on_done is None:
            return
        self._undo = _nothing
        if isinstance(answer, Tunnel):
            self._carried(TunnelStream(self._dialler.reactor, answer))
        elif answer.retryable and self._retries < MOST_RETRIES:
            self._retries += 1
            self._checkout(workload)
        else:
            kind = FailureKind.REFUSED if answer.status is not None else kind_of(answer.because)
            because = f"{_agent_of(self._endpoint, workload)}: CONNECT {self._endpoint.address}: {answer.because}"
            self._tunnel_failed(kind, because, answer.because)

    def _tunnel_failed(self, kind: FailureKind, because: str, reason: str) -> None:
        self._fail(kind, because, _tls_error(reason) if kind is FailureKind.TLS else "")

    # --- within either

    def _carried(self, stream: Stream) -> None:
        """Bytes reach the application; what they mean there is still to be settled."""
        policy = self._endpoint.policy
        if policy.proxy_protocol is not None:
            stream.write(proxy_header(policy.proxy_protocol, self._wanted.client))
        if policy.tls is None:
            self._succeed(stream)
        else:
            self._secure(stream, policy.tls)

    def _secure(self, carrier: Stream, tls: UpstreamTls) -> None:
        try:
            plan = plan_tls(tls, self._wanted.protocol, self._wanted.host)
        except UnusableTls as exc:
            carrier.abort(exc.reason)
            self._fail(FailureKind.TLS, f"TLS is configured and cannot be used: {exc.reason}", _tls_error(exc.reason))
            return

        def established(failure: str | None) -> None:
            self._undo = _nothing
            if failure is None:
                self._succeed(stream)
            else:
                self._fail(FailureKind.TLS, f"TLS to {self._endpoint.address}: {failure}", _tls_error(failure))

        stream = TlsStream(self._dialler.reactor, carrier, plan.context, established, server_name=plan.server_name, verify_peer=plan.judge)
        self._undo = lambda: stream.abort("the dial was given up")

    # --- ends

    def _succeed(self, stream: Stream) -> None:
        on_done = self._settle()
        if on_done is None:
            stream.abort("nobody waits for this connection")
        else:
            on_done(stream)

    def _fail(self, kind: FailureKind, because: str, transport: str = "") -> None:
        on_done = self._settle()
        if on_done is not None:
            self._undo()
            on_done(UpstreamFailure(kind, because, transport))

    def _settle(self) -> OnDialled | None:
        on_done, self._on_done = self._on_done, None
        if self._timer is not None:
            self._timer.cancel()
        return on_done


def kind_of(because: str) -> FailureKind:
    """What a reason of an HBONE connection is, from its first words (`mesh.reactor.hbone`, `mesh.reactor.pool`)."""
    return next((kind for words, kind in _KINDS if because.startswith(words)), FailureKind.CONNECT)


_KINDS: Final = (
    (TIMED_OUT, FailureKind.CONNECT_TIMEOUT),
    ("no response to CONNECT", FailureKind.CONNECT_TIMEOUT),
    ("identity error", FailureKind.TLS),
    ("tls ", FailureKind.TLS),
    ("refused by peer", FailureKind.TLS),
    ("protocol error", FailureKind.PROTOCOL),
    (GONE, FailureKind.CONNECT),
)


def proxy_header(version: int, client: Connection | None) -> bytes:
    """The PROXY header of a connection for ``client``; of one that is nobody's, that it is ours."""
    if version == 1:
        return encode_text(None, None) if client is None else encode_text(client.peer_address, client.destination)
    return encode_local() if client is None else encode_header(client.peer_address, client.destination)


def make_socket(address: SocketAddress, keepalive: Keepalive | None = None) -> socket.socket:
    """A non-blocking TCP socket to connect to ``address``. Raises OSError."""
    family = socket.AF_INET6 if address.ip.version == 6 else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if keepalive is not None:
            _keep_alive(sock, keepalive)
    except OSError:
        sock.close()
        raise
    return sock


def _keep_alive(sock: socket.socket, keepalive: Keepalive) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_KEEPCNT, keepalive.probes),
        (socket.TCP_KEEPIDLE, keepalive.time),
        (socket.TCP_KEEPINTVL, keepalive.interval),
    ):
        if value:
            sock.setsockopt(socket.IPPROTO_TCP, option, max(1, round(value)))  # the kernel counts in whole seconds


def _agent_of(endpoint: Endpoint, workload: Workload) -> str:
    return f"HBONE to {workload.namespace}/{workload.name} at {endpoint.address.ip}"


def _tls_error(reason: str) -> str:
    return f"TLS_error: {reason}"


def _nothing() -> None:
    pass

"""Two minimal proxies on a reactor of their own thread: an egress that tunnels what it accepts, an ingress that ends tunnels.

They are the data path without policy, capture or discovery: what tests and benches of `mesh.reactor` put real sockets to.
"""

from __future__ import annotations

import os
import queue
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self, TypeAlias, TypeVar

import trio
from OpenSSL import SSL

from mesh.model.address import SocketAddress, parse_ip
from mesh.reactor.hbone import HboneLink, Tunnel, TunnelFailure, TunnelRequest, connect_hbone, serve_hbone
from mesh.reactor.loop import Reactor
from mesh.reactor.relay import Relay, RelayResult, relay_tcp, relay_tunnel
from mesh.reactor.tcp import CONNECT_TIMEOUT, Listener, connect, listen_on, reset, socket_address

T = TypeVar("T")

MakeSocket: TypeAlias = Callable[[int], socket.socket]
"""Makes a TCP socket of an address family; in another network namespace, for tests that need one."""

LOOPBACK = SocketAddress(parse_ip("127.0.0.1"), 0)


def tcp_listener(address: SocketAddress = LOOPBACK) -> socket.socket:
    """A listening TCP socket; by default on a free port of 127.0.0.1."""
    sock = socket.socket(socket.AF_INET6 if address.ip.version == 6 else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((str(address.ip), address.port))
    sock.listen(1024)
    return sock


class ReactorThread:
    """A reactor running in a thread while the ``with`` block lasts. ``errors`` and ``exhausted`` collect what its hooks were told."""

    def __init__(self) -> None:
        self.errors: list[BaseException] = []
        self.exhausted: list[OSError] = []
        self.reactor = Reactor(lambda error, _where: self.errors.append(error), self.exhausted.append)
        self._stop: trio.Event | None = None
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._started.wait(10)
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.reactor.run_soon_threadsafe(self._set_stop)
        self._thread.join(10)
        assert not self._thread.is_alive(), "the reactor does not stop"
        self.reactor.close()

    def call(self, fn: Callable[[], T]) -> T:
        """Run ``fn`` in the loop's thread and return what it returns or raises."""
        done: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

        def run() -> None:
            try:
                done.put((fn(), None))
            except BaseException as exc:
                done.put((None, exc))

        self.reactor.run_soon_threadsafe(run)
        result, error = done.get(timeout=30)
        if error is not None:
            raise error
        return result  # type: ignore[return-value]  # None only where T is None

    def _set_stop(self) -> None:
        assert self._stop is not None
        self._stop.set()

    def _run(self) -> None:
        self.reactor.run(self._main)

    async def _main(self) -> None:
        self._stop = trio.Event()
        self._started.set()
        await self._stop.wait()


class IngressProxy:
    """Serves HBONE on ``listener`` and connects each tunnel to the address its CONNECT names."""

    def __init__(self, reactor: Reactor, listener: socket.socket, context: SSL.Context, make_socket: MakeSocket = socket.socket) -> None:
        self.reactor = reactor
        self.context = context
        self._make_socket = make_socket
        self.judge: Callable[[bytes], str | None] = lambda _der: None
        self.links: list[HboneLink] = []
        self.closed: list[str | None] = []
        self.results: list[RelayResult] = []
        self.relays: list[Relay] = []
        self._listener: Listener = listen_on(reactor, listener, self._on_accept)
        self.address = socket_address(listener.getsockname())

    def close(self) -> None:
        self._listener.close()
        for link in list(self.links):
            link.abort("proxy closed")

    def _on_accept(self, sock: socket.socket, _peer: SocketAddress) -> None:
        link = serve_hbone(
            self.reactor, sock, self.context, on_handshake=lambda der: self.judge(der), on_request=self._on_request, on_close=self._on_close
        )
        self.links.append(link)

    def _on_close(self, reason: str | None) -> None:
        self.closed.append(reason)
        self.links = [link for link in self.links if not link.closed]

    def _on_request(self, request: TunnelRequest) -> None:
        if not isinstance(request.target, SocketAddress):
            request.refuse(503)
            return
        sock = self._make_socket(socket.AF_INET6 if request.target.ip.version == 6 else socket.AF_INET)
        sock.setblocking(False)

        def connected(error: OSError | None) -> None:
            if error is not None:
                sock.close()
                request.refuse(503)
                return
            tunnel = request.accept({})
            self.relays.append(relay_tunnel(self.reactor, sock, tunnel, self._on_relay_closed, sock_is="upstream"))

        connect(self.reactor, sock, request.target, CONNECT_TIMEOUT, connected)

    def _on_relay_closed(self, result: RelayResult) -> None:
        self.results.append(result)


class EgressProxy:
    """Tunnels every connection accepted on ``listener`` to ``authority``, over one HBONE link to ``peer`` that all share."""

    def __init__(
        self,
        reactor: Reactor,
        listener: socket.socket,
        context: SSL.Context,
        peer: SocketAddress,
        authority: str,
        verify_peer: Callable[[bytes], str | None] = lambda _der: None,
        make_socket: MakeSocket = socket.socket,
    ) -> None:
        self.reactor = reactor
        self._make_socket = make_socket
        self.context = context
        self.peer = peer
        self.authority = authority
        self.verify_peer = verify_peer
        self.link: HboneLink | None = None
        self.failures: list[str | None] = []
        self.refused: list[TunnelFailure] = []
        self.results: list[RelayResult] = []
        self.relays: list[Relay] = []
        self._dialling = False
        self._waiting: deque[socket.socket] = deque()
        self._listener = listen_on(reactor, listener, self._on_accept)
        self.address = socket_address(listener.getsockname())

    def close(self) -> None:
        self._listener.close()
        if self.link is not None:
            self.link.abort("proxy closed")

    def _on_accept(self, sock: socket.socket, _peer: SocketAddress) -> None:
        self._waiting.append(sock)
        if self.link is not None and self.link.usable:
            self._serve_waiting(self.link)
        elif not self._dialling:
            self._dial()

    def _dial(self) -> None:
        self._dialling = True
        sock = self._make_socket(socket.AF_INET6 if self.peer.ip.version == 6 else socket.AF_INET)
        sock.setblocking(False)

        def connected(error: OSError | None) -> None:
            if error is not None:
                sock.close()
                self._on_close(str(error))
                return
            self.link = connect_hbone(
                self.reactor, sock, self.context, verify_peer=self.verify_peer, on_ready=self._serve_waiting, on_close=self._on_close
            )
            self.link.pooled = True

        connect(self.reactor, sock, self.peer, CONNECT_TIMEOUT, connected)

    def _serve_waiting(self, link: HboneLink) -> None:
        self._dialling = False
        while self._waiting:
            self._serve(link, self._waiting.popleft())

    def _serve(self, link: HboneLink, sock: socket.socket) -> None:
        def responded(answer: Tunnel | TunnelFailure) -> None:
            if isinstance(answer, TunnelFailure):
                self.refused.append(answer)
                reset(sock)
            else:
                self.relays.append(relay_tunnel(self.reactor, sock, answer, self.results.append))

        link.open_tunnel(self.authority, {}, responded)

    def _on_close(self, reason: str | None) -> None:
        self._dialling = False
        self.failures.append(reason)
        while self._waiting:
            reset(self._waiting.popleft())


class DirectProxy:
    """Relays every connection accepted on ``listener`` to ``upstream`` as plain TCP."""

    def __init__(self, reactor: Reactor, listener: socket.socket, upstream: SocketAddress) -> None:
        self.reactor = reactor
        self.upstream = upstream
        self.results: list[RelayResult] = []
        self.relays: list[Relay] = []
        self._listener = listen_on(reactor, listener, self._on_accept)
        self.address = socket_address(listener.getsockname())

    def close(self) -> None:
        self._listener.close()
        for relay in self.relays:
            relay.abort("proxy closed")

    def _on_accept(self, sock: socket.socket, _peer: SocketAddress) -> None:
        upstream = socket.socket(socket.AF_INET6 if self.upstream.ip.version == 6 else socket.AF_INET)
        upstream.setblocking(False)

        def connected(error: OSError | None) -> None:
            if error is not None:
                upstream.close()
                reset(sock)
                return
            self.relays.append(relay_tcp(self.reactor, sock, upstream, self.results.append))

        connect(self.reactor, upstream, self.upstream, CONNECT_TIMEOUT, connected)


class Path:
    """A way from a client socket to a server socket through a proxy or two: `connect` one end, get the other."""

    def __init__(
        self, thread: ReactorThread, context_pair: tuple[SSL.Context, SSL.Context] | None, far: ReactorThread | None = None
    ) -> None:
        """Through a tunnel with ``(server, client)`` contexts, or spliced when there are none. ``far`` runs the tunnel's other end."""
        self.thread = thread
        self._far = far = far or thread
        self._opened: list[socket.socket] = []
        self._server = tcp_listener()
        self._server.settimeout(10)
        reactor, target = thread.reactor, socket_address(self._server.getsockname())
        self.ingress: IngressProxy | None = None
        self.near: EgressProxy | DirectProxy
        """The proxy the client talks to."""
        if context_pair is None:
            self.near = thread.call(lambda: DirectProxy(reactor, self._listener(), target))
        else:
            server, client = context_pair
            ingress = self.ingress = far.call(lambda: IngressProxy(far.reactor, self._listener(), server))
            self.near = thread.call(lambda: EgressProxy(reactor, self._listener(), client, ingress.address, str(target)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.thread.call(self.near.close)
        if self.ingress is not None:
            self._far.call(self.ingress.close)
        for listener in self._opened:
            listener.close()
        self._server.close()

    def connect(self) -> tuple[socket.socket, socket.socket]:
        """A client socket and the server's end of the same connection, both blocking with a timeout of 10 s."""
        client = socket.create_connection((str(self.near.address.ip), self.near.address.port), timeout=10)
        server, _ = self._server.accept()
        server.settimeout(10)
        return client, server

    def results(self, count: int = 1) -> list[RelayResult]:
        """The results of the near proxy's relays, once there are ``count``."""
        wait_until(lambda: len(self.near.results) >= count, f"{count} finished relays, there are {len(self.near.results)}")
        return self.near.results

    def _listener(self) -> socket.socket:
        sock = tcp_listener()
        self._opened.append(sock)
        return sock


def wait_until(condition: Callable[[], bool], what: str, timeout: float = 10.0) -> None:
    """Return once ``condition()`` holds; AssertionError naming ``what`` after ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout:g} s for {what}"
        time.sleep(0.002)


def read_all(sock: socket.socket) -> bytes:
    """Everything up to end of file."""
    pieces = []
    while piece := sock.recv(1 << 18):
        pieces.append(piece)
    return b"".join(pieces)


def open_descriptors() -> int:
    """How many file descriptors this process has open."""
    return len(os.listdir("/proc/self/fd"))

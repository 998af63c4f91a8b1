"""One captured pod as a mover serves it: its listeners, its sockets, its identity, its pool of tunnels."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, Self, TypeAlias, TypeVar

from OpenSSL import SSL

from mesh.linux.netns import entered
from mesh.linux.ports import LocalPorts
from mesh.linux.sockets import bind_foreign, bind_port, make_upstream_socket
from mesh.model.address import IpAddress, SocketAddress
from mesh.model.identity import SpiffeId
from mesh.model.ports import DIALLED_MARK
from mesh.model.route import Tunnel
from mesh.model.workload import Workload
from mesh.reactor.hbone import HboneLink
from mesh.reactor.loop import Timer
from mesh.reactor.pool import OnLink, PoolKey, TunnelPool, dial_error, open_link
from mesh.reactor.sharing import Share
from mesh.reactor.tcp import Listener, Pending, connect, listen_on
from mesh.tls.peer import verify_server
from mesh.wire.baggage import baggage_of
from ztunnel_py.messages import PodInfo
from ztunnel_py.mover.credentials import Credentials
from ztunnel_py.mover.plane import Plane

CONNECT_SECONDS = 10.0
"""As ztunnel: every upstream connect is bounded."""
SOCKETS_AHEAD = 16
"""To enter a pod's namespace and come back costs as much as the socket itself, so a pod that dials often has some made at once."""
AHEAD_SECONDS = 10.0
"""How long sockets that nobody needed are kept."""
WORKLOAD_SECONDS = 5.0
"""How long a connection waits for its own pod's workload to arrive over xDS (ztunnel O1)."""
LINKS_AHEAD = 1
CONNECTIONS_AHEAD = 2
"""So many more than the other movers one may have in a burst."""
_POOL_KEYS_KEPT = 256

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PodSockets:
    """Descriptors of a pod, owned by the mover: its network namespace, its three listeners, and those of its DNS, if it has any."""

    netns: int
    outbound: int
    inbound_plaintext: int
    inbound_hbone: int
    dns: tuple[int, ...] = ()

    @classmethod
    def of(cls, descriptors: Sequence[int]) -> Self:
        """From a message."""
        netns, outbound, inbound_plaintext, inbound_hbone, *dns = descriptors
        return cls(netns, outbound, inbound_plaintext, inbound_hbone, tuple(dns))

    def all(self) -> tuple[int, ...]:
        """As they travel in a message."""
        return (self.netns, self.outbound, self.inbound_plaintext, self.inbound_hbone, *self.dns)


class NameServing(Protocol):
    """The pod's DNS at work."""

    @property
    def under_way(self) -> int:
        """Look-ups that are not answered yet."""

    def listen(self, descriptors: Sequence[int]) -> None:
        """Take look-ups from these sockets, which stay the pod's. Raises OSError, then `stop` it."""

    def look_again(self) -> None:
        """Somebody else who took look-ups from the same sockets has died."""

    def stop(self) -> None:
        """Take what waits, then no more."""

    def close(self) -> None:
        """Give up what is left."""


class Dialling:
    """A connect under way, and the socket it is for; or a failure that is still to be told."""

    __slots__ = ("_pending", "_sock")

    def __init__(self, pending: Pending | Timer | None = None) -> None:
        self._pending = pending
        self._sock: socket.socket | None = None

    def wait_for(self, pending: Pending | Timer, sock: socket.socket | None = None) -> None:
        """What `cancel` ends from now on."""
        self._pending = pending
        self._sock = sock

    def cancel(self) -> None:
        """Give the connection up; nobody is called back."""
        if self._pending is not None:
            self._pending.cancel()
        if self._sock is not None:
            self._sock.close()


class Pod:
    """Sockets made here are the pod's own: they live in its network namespace and carry the mark that its rules let through."""

    def __init__(self, plane: Plane, info: PodInfo, sockets: PodSockets) -> None:
        self.plane = plane
        self.info = info
        self.sockets = sockets
        self.releasing = False
        self.closed = False
        self.pool = TunnelPool(plane.reactor, self._dial_hbone, plane.pool)
        self.links: set[HboneLink] = set()
        """Connections of peers to port 15008."""
        self._listening: list[tuple[socket.socket, Listener]] = []
        self._ahead: dict[int, list[socket.socket]] = {socket.AF_INET: [], socket.AF_INET6: []}
        """Sockets for the next dials, by family."""
        self._made_at_once = 1
        self._ports: LocalPorts | None = None
        """The namespace's, to connect from; not looked up yet."""
        self._trimmer: Timer | None = None
        self._described: tuple[Workload, str] | None = None
        self._name_server: NameServing | None = None
        self._pool_keys: dict[tuple[int, int, int], tuple[Tunnel, Workload, IpAddress, PoolKey]] = {}
        """By the ids of what the key is made of, which is held here so that no id gets another meaning."""
        self._identity: SpiffeId | None = None
        self._known: tuple[int, Workload | None] = -1, None
        """The pod's workload at a version of the state."""

    @property
    def uid(self) -> str:
        return self.info.uid

    def find_workload(self) -> Workload | None:
        """This pod in the mesh's state: by name and service account, never by address. None while the state is incomplete."""
        if not self.plane.synced:
            return None
        state = self.plane.state
        if self._known[0] != state.version:
            self._known = state.version, state.find_local_workload(self.info.namespace, self.info.name, self.info.service_account)
        return self._known[1]

    def when_workload_known(self, on_workload: Callable[[Workload | None], None]) -> None:
        """Call back with the pod's workload, now or when it has come; with None after `WORKLOAD_SECONDS`."""
        workload = self.find_workload()
        if workload is not None:
            on_workload(workload)
            return

        deadline = self.plane.reactor.now() + WORKLOAD_SECONDS

        def look_again() -> None:
            found = self.find_workload()
            left = deadline - self.plane.reactor.now()
            if found is not None or left <= 0:
                on_workload(found)
            else:
                self.plane.workloads_wanted.wait(self.uid, left, look_again, look_again)

        look_again()

    def baggage(self, workload: Workload) -> str:
        """What the pod's tunnels say of its workload; put together anew only when that has changed."""
        if self._described is None or self._described[0] is not workload:
            self._described = workload, baggage_of(workload)
        return self._described[1]

    def pool_key(self, route: Tunnel, workload: Workload, client: IpAddress) -> PoolKey:
        """By which a tunnel of the pod's ``workload`` shares a connection: the same object for the same objects."""
        by = id(route), id(workload), id(client)
        kept = self._pool_keys.get(by)
        if kept is None:
            if len(self._pool_keys) >= _POOL_KEYS_KEPT:
                self._pool_keys.clear()
            key = PoolKey(workload.identity, route.identities, route.next_hop, client)
            kept = self._pool_keys[by] = route, workload, client, key
        return kept[3]

    def unknown_workload(self) -> str:
        """ztunnel's words for a pod that the control plane has not described."""
        info = self.info
        return f"failed to fetch information about local workload: {info.service_account}.{info.namespace} ({info.name})"

    def identity(self) -> SpiffeId:
        """The pod's identity, also before its workload is known."""
        workload = self.find_workload()
        trust_domain = workload.trust_domain if workload is not None else self.plane.trust_domain
        if self._identity is None or self._identity.trust_domain != trust_domain:
            self._identity = SpiffeId(trust_domain, self.info.namespace, self.info.service_account)
        return self._identity

    def listen(self, *, outbound: Serve, inbound_plaintext: Serve, inbound_hbone: Serve, dns: ServeNames | None = None) -> None:
        """Accept on the three listeners: each connection becomes an object that serves it. Raises OSError; then `close` the pod."""
        sockets = self.sockets
        for fd, serve in (
            (sockets.outbound, outbound),
            (sockets.inbound_plaintext, inbound_plaintext),
            (sockets.inbound_hbone, inbound_hbone),
        ):
            # The descriptor stays in `sockets`: a new brain asks for it.
            listening = socket.socket(fileno=os.dup(fd))
            share = self._share_of(serve is inbound_hbone)
            self._listening.append((listening, listen_on(self.plane.reactor, listening, self._serving(serve), share)))

        if dns is not None and sockets.dns:
            self._name_server = self._name_server or dns(self)
            self._name_server.listen(sockets.dns)

    def _share_of(self, links: bool) -> Share | None:
        """Of a listener for connections or, ``links``, for those of peers, of which each counts: whoever has one has all that it brings."""
        shares = self.plane.shares
        if shares is None:
            return None
        return Share(shares.links.lead, LINKS_AHEAD) if links else Share(shares.connections.lead, CONNECTIONS_AHEAD)

    @property
    def lookups(self) -> int:
        """Look-ups of names that are not answered yet."""
        return self._name_server.under_way if self._name_server is not None else 0

    def _serving(self, serve: Serve) -> Callable[[socket.socket, SocketAddress], None]:
        def accepted(sock: socket.socket, peer: SocketAddress) -> None:
            serve(self, sock, peer)

        return accepted

    def dial(
        self, address: SocketAddress, on_done: Callable[[socket.socket | OSError], None], *, source: IpAddress | None = None
    ) -> Dialling:
        """Connect from the pod's namespace, as ``source`` if given (only where the application must see its client's address)."""
        dialling = Dialling()
        if source is not None and source == address.ip:  # not None to be compared with: `ipaddress` makes an exception of that
            source = None
        self._dial(dialling, address, on_done, source, self._next_port())
        return dialling

    def _dial(
        self,
        dialling: Dialling,
        address: SocketAddress,
        on_done: Callable[[socket.socket | OSError], None],
        source: IpAddress | None,
        port: int,
    ) -> None:
        """``port``: to connect from, 0 for one of the kernel's choice."""
        try:
            sock = self._make_socket(address, source, port)
        except OSError as exc:
            failure = exc  # told later, as every other: whoever dials has more to do first
            dialling.wait_for(self.plane.reactor.call_later(0, lambda: on_done(failure)))
            return

        def connected(error: OSError | None) -> None:
            if error is None:
                on_done(sock)
                return
            sock.close()
            if port and error.errno == errno.EADDRNOTAVAIL:  # a living connection to there has it
                self._dial(dialling, address, on_done, source, 0)
            else:
                on_done(error)

        dialling.wait_for(connect(self.plane.reactor, sock, address, CONNECT_SECONDS, connected), sock)

    def _next_port(self) -> int:
        """To connect from; 0 if the kernel is to choose."""
        if self._ports is None:
            try:
                self._ports = self.inside(LocalPorts.here)
            except OSError:
                return 0
        return self._ports.take()

    def _make_socket(self, address: SocketAddress, source: IpAddress | None, port: int) -> socket.socket:
        family = socket.AF_INET6 if address.ip.version == 6 else socket.AF_INET
        ahead = self._ahead[family]
        if not ahead:
            self.inside(lambda: self._make_ahead(ahead, family))
        sock = ahead.pop()
        try:
            if source is not None:
                bind_foreign(sock, source, port)
            elif port:
                bind_port(sock, port)
        except OSError:
            sock.close()
            raise
        return sock

    def _make_ahead(self, ahead: list[socket.socket], family: int) -> None:
        """One socket at first, twice as many each time they were used up. Raises OSError if not even one can be made."""
        try:
            for _ in range(self._made_at_once):
                ahead.append(make_upstream_socket(family, mark=DIALLED_MARK))
        except OSError:
            if not ahead:
                raise
        self._made_at_once = min(2 * self._made_at_once, SOCKETS_AHEAD)
        if self._trimmer is not None:
            self._trimmer.cancel()
        self._trimmer = self.plane.reactor.call_later(AHEAD_SECONDS, self._trim)

    def _trim(self) -> None:
        """Nobody has used the last ones up for a while."""
        self._trimmer = None
        self._made_at_once = 1
        for ahead in self._ahead.values():
            while ahead:
                ahead.pop().close()

    def inside(self, function: Callable[[], T]) -> T:
        """Call ``function``, which must neither wait nor call back, in the pod's network namespace. Raises OSError."""
        if self.closed:
            # The numbers of its descriptors may be another pod's by now.
            raise OSError(errno.ENETDOWN, "the pod is no longer served")
        with entered(self.sockets.netns, self.plane.home):
            return function()

    @property
    def accepts(self) -> bool:
        return bool(self._listening)

    def look_again(self) -> None:
        """Somebody else who accepted on these listeners has died."""
        for _, listener in self._listening:
            listener.look_again()
        if self._name_server is not None:
            self._name_server.look_again()

    def stop_listening(self) -> None:
        if self._name_server is not None:
            self._name_server.stop()
        for listening, listener in self._listening:
            listener.close()
            listening.close()
        self._listening = []

    def drain(self) -> None:
        """Take what waits, then no new connections or tunnels; those that live go on."""
        for _, listener in self._listening:
            listener.finish()
        self.stop_listening()
        self.pool.close(gracefully=True)
        for link in list(self.links):
            link.close_gracefully()

    def close(self) -> None:
        """Give back every descriptor. Connections must have been ended before; what still waits for something finds the pod closed."""
        self.closed = True
        self.stop_listening()
        if self._name_server is not None:
            self._name_server.close()
            self._name_server = None  # it has us: together we would wait for the garbage collector, which comes seldom
        self.pool.close(gracefully=False)
        for link in list(self.links):
            link.abort("pod dropped")
        if self._trimmer is not None:
            self._trimmer.cancel()
        self._trim()
        for fd in self.sockets.all():
            os.close(fd)

    def _dial_hbone(self, key: PoolKey, on_link: OnLink[HboneLink], on_closed: Callable[[HboneLink], None]) -> None:
        """What the pool calls: certificate, TCP, TLS with the peer's identity proved, HTTP/2."""

        def with_credentials(credentials: Credentials | str) -> None:
            if isinstance(credentials, str):
                on_link(credentials)
                return
            self.dial(key.peer, partial(self._speak_hbone, key, credentials.context, on_link, on_closed))

        self.plane.credentials.when_available(key.source, with_credentials)

    # Not a function within `_dial_hbone`, by whose name the other there would know it: compiled, such two are a cycle, which keeps the pod.
    def _speak_hbone(
        self,
        key: PoolKey,
        context: SSL.Context,
        on_link: OnLink[HboneLink],
        on_closed: Callable[[HboneLink], None],
        result: socket.socket | OSError,
    ) -> None:
        if isinstance(result, OSError):
            on_link(dial_error(result))
            return
        open_link(
            self.plane.reactor,
            result,
            context,
            verify_peer=lambda der: verify_server(der, key.expected),
            on_link=on_link,
            on_closed=on_closed,
        )


Serve: TypeAlias = Callable[[Pod, socket.socket, SocketAddress], object]
"""Takes a pod, an accepted connection and its peer; the object it returns lives by its own callbacks."""
ServeNames: TypeAlias = Callable[[Pod], NameServing]
"""Makes the DNS of a pod."""

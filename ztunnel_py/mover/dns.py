"""Port 15053 of a pod: the names that its application looks up.

Addresses of the mesh's services are answered from what the mover knows. Every other message goes, byte for byte, to the server that the
application asked, from a socket in the pod's namespace, and what comes back goes to the application: nothing is kept, nothing repeated,
so that a pod's look-ups end as they would without us. ztunnel asks its own pod's servers instead; ours do where nothing was redirected.
"""

from __future__ import annotations

import os
import random
import select
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final, Literal, Protocol, TypeAlias

import trio

from mesh.linux.conntrack import original_udp_destination
from mesh.linux.sockets import local_address, make_datagram_socket, original_destination
from mesh.model.address import SocketAddress
from mesh.model.ports import DNS, PROXY_MARK
from mesh.model.workload import Workload
from mesh.reactor.loop import Reactor, Timer
from mesh.reactor.relay import Relay, relay_tcp
from mesh.reactor.tcp import Listener, listen_on, reset, sockaddr, socket_address
from mesh.state.names import Addresses, Naming, addresses_of, find_named_service
from mesh.telemetry import log
from mesh.telemetry.metrics import DnsMetrics, DnsSeries
from mesh.wire import dns
from mesh.wire.errors import RemoteProtocolError
from ztunnel_py.mover.pod import Dialling, Pod

TTL: Final = 30
"""Seconds, as ztunnel."""
LOOKUP_SECONDS: Final = 5.0
"""How long other servers have for an answer, all together; the default of resolvers, so that nobody who asked still waits after it."""
TCP_IDLE_SECONDS: Final = 5.0
"""As ztunnel's: how long a TCP client may be silent, or leave its answers unread."""
MOST_LOOKUPS: Final = 512
"""Look-ups of one pod that may wait for something at once; each holds a socket. More are answered with a failure."""
MOST_OF_ALL: Final = 4096
"""Look-ups and TCP clients of all pods of a mover: pods without servers must not take the descriptors of the others' connections."""
MOST_CLIENTS: Final = 128
"""TCP clients of one pod at once."""
MOST_PIPELINED: Final = 32
"""Look-ups of one TCP client that may be under way; the next are read when one of them has ended."""
_BATCH: Final = 32
"""Datagrams taken from one socket per wake-up, so that a burst does not hold up connections."""
_MOST_KNOWN: Final = 256
"""Names of one pod whose meaning is kept until the mesh changes."""
_MOST_UNREAD: Final = 2 * (2 + dns.MAX_MESSAGE)
_READ: Final = 1 << 16

_Protocol = Literal["udp", "tcp"]

_log = log.get_logger("dns")
_Peer: TypeAlias = tuple[str, int] | tuple[str, int, int, int]
"""As ``recvfrom`` gives it: IPv6 with flow label and zone."""

_scratch = memoryview(bytearray(_READ))


@dataclass(slots=True)
class NameService:
    """What the name servers of all pods share. ``on_count`` is told when a pod has more or fewer look-ups under way."""

    naming: Naming
    metrics: DnsMetrics
    nameservers: Callable[[], Sequence[SocketAddress]]
    """Whom to ask for what was not on its way to any server."""
    on_count: Callable[[str], None] = lambda pod: None
    under_way: int = 0
    _idle: trio.Event = field(default_factory=trio.Event)

    def count(self, change: int, pod: str) -> None:
        self.under_way += change
        if not self.under_way:
            self._idle.set()
        self.on_count(pod)

    def idle(self) -> trio.Event:
        """Set as soon as no look-up is under way."""
        self._idle = trio.Event()
        if not self.under_way:
            self._idle.set()
        return self._idle


@dataclass(slots=True)
class _Known:
    """What a name means to this pod. ``found`` None: it is not the mesh's."""

    found: Addresses | None
    service: str
    kept: int
    records: list[bytes]
    udp: DnsSeries
    tcp: DnsSeries


class _Asker(Protocol):
    """Who waits for an answer, and how to reach it. Gets exactly one."""

    protocol: _Protocol

    def limit(self, query: dns.Query) -> int:
        """How many bytes an answer may have."""

    def send(self, answer: bytes) -> None: ...

    def open(self, lookup: _Lookup) -> _Upstream:
        """Begin to ask other servers. Raises OSError."""


class _Upstream(Protocol):
    def close(self) -> None: ...


class NameServer:
    """The DNS of one pod, at work from `listen` to `stop`, any number of times, until `close`."""

    def __init__(self, pod: Pod, service: NameService) -> None:
        self.pod = pod
        self.service = service
        self.reactor: Reactor = pod.plane.reactor
        self.closed = False
        self.lookups: set[_Lookup] = set()
        self._waiting = 0
        self._clients: set[_TcpClient] = set()
        self._workload: Workload | None = None
        self._generation = -1
        self._known: dict[tuple[bytes, int], _Known] = {}
        self._repeated: dict[bytes, tuple[bytes, DnsSeries]] = {}
        """Datagrams without their ids, to answers without theirs: a program asks for the same again in the same bytes."""
        self._series: dict[tuple[str, _Protocol], DnsSeries] = {}
        self._listening: dict[socket.socket, SocketAddress] = {}
        """Sockets for datagrams that are listened on, and where they are bound."""
        self._silent: list[socket.socket] = []
        """Those that are not any more: answers to what came by them still go out."""
        self._streams: list[tuple[socket.socket, Listener]] = []

    @property
    def under_way(self) -> int:
        """Look-ups and TCP clients that are not done."""
        return len(self.lookups) + self._waiting + len(self._clients)

    def listen(self, descriptors: Sequence[int]) -> None:
        """Serve UDP and TCP sockets bound to port 15053 in the pod; they stay the caller's. Raises OSError, then `stop`."""
        for fd in descriptors:
            sock = socket.socket(fileno=os.dup(fd))
            if sock.type == socket.SOCK_STREAM:
                self._streams.append((sock, listen_on(self.reactor, sock, self._accepted)))
            else:
                sock.setblocking(False)
                local = self._listening[sock] = local_address(sock)
                self._watch(sock, local)

    def _watch(self, sock: socket.socket, local: SocketAddress) -> None:
        # Exclusive and level-triggered, as listeners are: of the movers that share the socket one wakes.
        self.reactor.add(sock.fileno(), select.EPOLLIN | select.EPOLLEXCLUSIVE, partial(self._on_datagrams, sock, local))

    def stop(self) -> None:
        """Take what waits, then no new look-ups over UDP and no new TCP clients; those that are there go on."""
        for sock, local in self._listening.items():
            # Out of the loop first: whatever comes later wakes another mover, which was not woken for what waits already.
            self.reactor.remove(sock.fileno())
            self._on_datagrams(sock, local, select.EPOLLIN)
            self._silent.append(sock)
        self._listening = {}
        for stream, listener in self._streams:
            listener.finish()
            stream.close()
        self._streams = []
        self._forget_silent()

    def look_again(self) -> None:
        """Somebody else who took look-ups from these sockets has died, and may have been the one that was woken for what waits."""
        for sock, local in self._listening.items():
            self.reactor.remove(sock.fileno())
            self._watch(sock, local)  # the kernel looks at the queue when a socket enters an epoll set
        for _, listener in self._streams:
            listener.look_again()

    def close(self) -> None:
        """Give back every descriptor; who still waits for an answer gets none."""
        self.closed = True
        self.stop()
        for lookup in list(self.lookups):
            lookup.give_up()
        for client in list(self._clients):
            client.close()
        self._forget_silent()

    def _forget_silent(self) -> None:
        """Nobody waits for an answer any more: the sockets may go."""
        if not self.under_way:
            for sock in self._silent:
                sock.close()
            self._silent = []

    # Listening

    def _on_datagrams(self, sock: socket.socket, local: SocketAddress, _events: int) -> None:
        for _ in range(_BATCH):
            try:
                size, peer = sock.recvfrom_into(_scratch)
            except OSError:  # none is left; or an error that belongs to an earlier answer
                return
            try:
                self._on_datagram(sock, local, bytes(_scratch[:size]), peer)
            except Exception as exc:
                self.reactor.report(exc, f"look-up from {peer}")

    def _on_datagram(self, sock: socket.socket, local: SocketAddress, data: bytes, peer: _Peer) -> None:
        repeated = self._repeated.get(data[2:])
        if repeated is not None and self._generation == self.pod.plane.state.generation and not log.wants("dns", "debug"):
            rest, series = repeated
            series.requests.value += 1
            _send_datagram(sock, data[:2] + rest, peer)
            return
        try:
            query = dns.parse_query(data)
        except RemoteProtocolError:
            refusal = dns.write_format_error(data)
            if refusal is not None:
                _send_datagram(sock, refusal, peer)
            return
        workload = self._find_workload()
        answer = self._answer(query, workload, "udp") if workload is not None else None
        if answer is not None:
            _send_datagram(sock, answer, peer)
            known = self._known.get((query.name.lower(), query.type))
            # More than one record change places; and a pod may pad its look-ups to 64 KiB each.
            if known is not None and len(known.records) < 2 and len(data) <= dns.LEAST_UDP_PAYLOAD:
                if len(self._repeated) >= _MOST_KNOWN:
                    self._repeated.clear()
                self._repeated[data[2:]] = answer[2:], known.udp
        else:
            self.go_on(query, data, _Datagram(self, sock, local, peer))

    def _accepted(self, sock: socket.socket, peer: SocketAddress) -> None:
        if len(self._clients) >= MOST_CLIENTS or self.service.under_way >= MOST_OF_ALL:
            reset(sock)
            return
        self._clients.add(_TcpClient(self, sock))
        self.count(1)

    def forget(self, client: _TcpClient) -> None:
        if client in self._clients:
            self._clients.remove(client)
            self.count(-1)
            self._forget_silent()

    def count(self, change: int) -> None:
        """There are more or fewer look-ups and clients under way."""
        self.service.count(change, self.pod.uid)

    # Answering

    def take(self, data: bytes, asker: _Asker) -> None:
        """One message of a client; it gets one answer, whatever becomes of it, unless the message is none. Raises RemoteProtocolError."""
        query = dns.parse_query(data)
        workload = self._find_workload()
        answer = self._answer(query, workload, asker.protocol) if workload is not None else None
        if answer is not None:
            asker.send(answer)
        else:
            self.go_on(query, data, asker)

    def go_on(self, query: dns.Query, data: bytes, asker: _Asker) -> None:
        """With a look-up that cannot be answered at once: the pod is not known yet, or another server must be asked."""
        if len(self.lookups) + self._waiting >= MOST_LOOKUPS or self.service.under_way >= MOST_OF_ALL:
            asker.send(dns.write_error(query, dns.SERVFAIL))
            self.note(query, "forwarding failed (too many look-ups at once)", 0)
        elif self._workload is None:
            self._wait(query, data, asker)
        else:
            self._forward(query, data, asker)

    def _wait(self, query: dns.Query, data: bytes, asker: _Asker) -> None:
        self._waiting += 1
        self.count(1)

        def known(workload: Workload | None) -> None:
            self._waiting -= 1
            self.count(-1)
            if self.closed:
                return
            if workload is None:
                self._series_of(query, asker.protocol).requests.value += 1
                asker.send(dns.write_error(query, dns.SERVFAIL))
                self.note(query, "unknown source", 0)
            else:
                self.take(data, asker)
            self._forget_silent()

        self.pod.when_workload_known(known)

    def _find_workload(self) -> Workload | None:
        """The pod's workload; all that was found out for another one, or before a change of the mesh, is forgotten."""
        generation = self.pod.plane.state.generation
        if self._workload is None or self._generation != generation:
            workload = self.pod.find_workload()
            if workload is not self._workload:
                self._workload = workload
                self._series.clear()
            self._generation = generation
            self._known.clear()
            self._repeated.clear()
        return self._workload

    def _answer(self, query: dns.Query, workload: Workload, protocol: _Protocol) -> bytes | None:
        """Our own answer; None if there is none, and another server must be asked."""
        if not query.simple or query.class_ != dns.IN or query.type not in (dns.A, dns.AAAA):
            self._series_of(query, protocol).requests.value += 1
            return None
        key = (query.name.lower(), query.type)
        known = self._known.get(key)
        if known is None:
            known = self._learn(query, workload)
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            self._known[key] = known
        (known.udp if protocol == "udp" else known.tcp).requests.value += 1
        found = known.found
        if found is None:
            return None
        if query.edns is not None and query.edns.version:
            return dns.write_error(query, dns.BADVERS)
        if log.wants("dns", "debug"):
            self.note(query, found.because, len(found.ips), known.service)
        records = known.records
        if len(records) > 1:
            self.pod.plane.rng.shuffle(records)
        alias = dns.leading_labels(query.name, known.kept) if known.kept and records else b""
        return dns.write_answer(query, records, TTL, query.udp_limit if protocol == "udp" else dns.MAX_MESSAGE, alias=alias)

    def _learn(self, query: dns.Query, workload: Workload) -> _Known:
        state, naming = self.pod.plane.state, self.service.naming
        udp, tcp = self._series_of(query, "udp"), self._series_of(query, "tcp")
        name = dns.host_name(query.name)
        named = find_named_service(state, name, workload.namespace, naming) if name is not None else None
        if named is None:
            return _Known(None, "", 0, [], udp, tcp)
        found = addresses_of(state, named.service, workload, 4 if query.type == dns.A else 6, naming)
        return _Known(found, str(named.service.key), named.kept, [dns.address_record(ip, TTL) for ip in found.ips], udp, tcp)

    def _series_of(self, query: dns.Query, protocol: _Protocol) -> DnsSeries:
        kind = dns.type_name(query.type) if dns.is_known_type(query.type) else "unknown"
        series = self._series.get((kind, protocol))
        if series is None:
            series = self._series[kind, protocol] = self.service.metrics.series(kind, protocol, self._workload)
        return series

    def _forward(self, query: dns.Query, data: bytes, asker: _Asker) -> None:
        _Lookup(self, query, data, asker, self._series_of(query, asker.protocol)).begin()

    def ended(self, query: dns.Query, asker: _Asker, answer: bytes, result: str, endpoints: int) -> None:
        """A forwarded look-up has its answer."""
        asker.send(answer)
        self.note(query, result, endpoints)
        self._forget_silent()

    def note(self, query: dns.Query, result: str, endpoints: int, service: str = "") -> None:
        """Log what became of a look-up."""
        if not log.wants("dns", "debug"):
            return
        fields: dict[str, object] = {"src.workload": self.pod.info.name, "src.namespace": self.pod.info.namespace}
        if query.name:
            fields |= {"query": dns.type_name(query.type), "domain": dns.shown_name(query.name)}
        fields |= {"result": result, "endpoints": endpoints}
        if service:
            fields["dst.service"] = service
        _log.debug("lookup", **fields)


class _Lookup:
    """A message that goes to other servers, one after the other, until one answers. Ends once, with an answer or by `give_up`."""

    __slots__ = ("_asker", "_series", "_server", "_started", "_timer", "_upstream", "because", "data", "query")

    def __init__(self, server: NameServer, query: dns.Query, data: bytes, asker: _Asker, series: DnsSeries) -> None:
        self.query = query
        self.data = data
        self.because = "no server is known"
        self._server = server
        self._asker = asker
        self._series = series
        self._started = server.reactor.now()
        self._timer: Timer | None = None
        self._upstream: _Upstream | None = None

    def begin(self) -> None:
        self._series.forwarded()
        self._server.lookups.add(self)
        self._server.count(1)
        self._timer = self._server.reactor.call_later(LOOKUP_SECONDS, lambda: self.fail(self.because))
        try:
            self._upstream = self._asker.open(self)
        except OSError as exc:
            self.fail(exc.strerror or str(exc))

    def succeed(self, response: bytes) -> None:
        """``response`` answers the query; its id may be another."""
        if self._end(failed=False):
            query = self.query
            answer = dns.with_id(response, query.id) if len(response) <= self._asker.limit(query) else dns.truncated(response, query)
            self._server.ended(query, self._asker, answer, "forwarded", dns.answer_count(response))

    def fail(self, because: str) -> None:
        if self._end(failed=True):
            answer = dns.write_error(self.query, dns.SERVFAIL)
            self._server.ended(self.query, self._asker, answer, f"forwarding failed ({because})", 0)

    def hand_over(self) -> None:
        """Somebody else brings the answers."""
        if self._end(failed=False):
            self._server.note(self.query, "forwarded", 0)

    def give_up(self) -> None:
        """Without an answer."""
        self._end(failed=True)

    def _end(self, *, failed: bool) -> bool:
        """False if it was over already."""
        server = self._server
        if self not in server.lookups:
            return False
        server.lookups.remove(self)
        if self._timer is not None:
            self._timer.cancel()
        if self._upstream is not None:
            self._upstream.close()
            self._upstream = None
        self._series.ended(server.reactor.now() - self._started, failed=failed)
        server.count(-1)
        return True


class _Datagram:
    """Who asked over UDP."""

    __slots__ = ("_local", "_peer", "_server", "_sock")

    protocol: _Protocol = "udp"

    def __init__(self, server: NameServer, sock: socket.socket, local: SocketAddress, peer: _Peer) -> None:
        self._server = server
        self._sock = sock
        self._local = local
        self._peer = peer

    def limit(self, query: dns.Query) -> int:
        return query.udp_limit

    def send(self, answer: bytes) -> None:
        _send_datagram(self._sock, answer, self._peer)

    def open(self, lookup: _Lookup) -> _Upstream:
        original, sock = self._server.pod.inside(self._find_original)
        try:
            servers = _servers(self._server, original)
        except OSError:
            sock.close()
            raise
        return _DatagramUpstream(self._server, lookup, servers, sock)

    def _find_original(self) -> tuple[SocketAddress | None, socket.socket]:
        """Where it was going, and a socket to go on there: both have to be had in the pod's namespace, and to enter it costs."""
        original = original_udp_destination(self._local, socket_address(self._peer))
        return original, make_datagram_socket(self._sock.family, mark=PROXY_MARK)


class _DatagramUpstream:
    """Asks over UDP. A new socket for every server, so with a port of its own, and a new id: whoever wants to forge an answer must guess
    both, and the address (RFC 5452). Connected, so the kernel drops what comes from elsewhere and tells of a closed port."""

    __slots__ = ("_id", "_lookup", "_server", "_servers", "_share", "_sock", "_spare", "_timer")

    def __init__(self, server: NameServer, lookup: _Lookup, servers: Sequence[SocketAddress], spare: socket.socket) -> None:
        """``spare`` is a socket made for the first server; it is closed if it is of another family. Raises OSError."""
        self._server = server
        self._lookup = lookup
        self._servers: Iterator[SocketAddress] = iter(servers)
        # The only one has all the time there is; the look-up's own timer sees to that.
        self._share = LOOKUP_SECONDS / len(servers) if len(servers) > 1 else None
        self._spare: socket.socket | None = spare
        self._sock: socket.socket | None = None
        self._timer: Timer | None = None
        self._id = 0
        if not self._ask_next():
            raise OSError(0, self._lookup.because)

    def close(self) -> None:
        if self._sock is not None:
            self._server.reactor.remove(self._sock.fileno())
            self._sock.close()
            self._sock = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _ask_next(self) -> bool:
        """False if there is nobody left to ask."""
        self.close()
        for address in self._servers:
            try:
                self._ask(address)
                return True
            except OSError as exc:
                self.close()
                self._lookup.because = f"{address}: {exc.strerror or exc}"
        return False

    def _ask(self, address: SocketAddress) -> None:
        family = socket.AF_INET6 if address.ip.version == 6 else socket.AF_INET
        spare, self._spare = self._spare, None
        if spare is not None and spare.family != family:
            spare.close()
            spare = None
        sock = self._sock = spare or self._server.pod.inside(lambda: make_datagram_socket(family, mark=PROXY_MARK))
        sock.connect(sockaddr(family, address))
        self._id = _random.getrandbits(16)
        sock.send(dns.with_id(self._lookup.data, self._id))
        self._server.reactor.add(sock.fileno(), select.EPOLLIN, self._on_readable, self._lookup.fail)
        self._lookup.because = f"{address}: timed out"
        if self._share is not None:
            self._timer = self._server.reactor.call_later(self._share, self._go_on)

    def _go_on(self) -> None:
        if not self._ask_next():
            self._lookup.fail(self._lookup.because)

    def _on_readable(self, _events: int) -> None:
        for _ in range(_BATCH):
            sock = self._sock
            if sock is None:
                return
            try:
                size = sock.recv_into(_scratch)
            except BlockingIOError:
                return
            except OSError as exc:  # a port that nobody listens on, a network that is not there
                self._lookup.because = exc.strerror or str(exc)
                self._go_on()
                return
            response = bytes(_scratch[:size])
            if dns.answers(response, self._lookup.query, self._id):
                self._lookup.succeed(response)
                return
            # Forged or garbled: the true one may still come.


class _TcpClient:
    """A client over TCP: any number of messages, answered as soon as each can be (RFC 7766).

    With a zone transfer it and the server are left to each other: that has any number of answers, and the client nothing more to ask.
    """

    __slots__ = (
        "_at_work", "_buffer", "_ended", "_fd", "_last", "_original", "_out", "_relay", "_server", "_sock", "_timer", "_transferring",
        "_under_way",
    )  # fmt: skip

    protocol: _Protocol = "tcp"

    def __init__(self, server: NameServer, sock: socket.socket) -> None:
        self._server = server
        self._sock = sock
        self._fd = sock.fileno()
        self._original = original_destination(sock)
        self._buffer = dns.MessageBuffer()
        self._out = bytearray()
        self._under_way = 0
        self._ended = False
        self._at_work = False
        self._transferring = False
        self._relay: Relay | None = None
        self._last = server.reactor.now()
        self._timer = server.reactor.call_later(TCP_IDLE_SECONDS, self._look_idle)
        server.reactor.add(self._fd, select.EPOLLIN, self._on_event, lambda because: self.close())

    def limit(self, query: dns.Query) -> int:
        return dns.MAX_MESSAGE

    def send(self, answer: bytes) -> None:
        """An answer to one of its look-ups."""
        self._under_way -= 1
        self._transferring = False
        self._out += dns.framed(answer)
        if not self._at_work:
            self._work()

    def open(self, lookup: _Lookup) -> _Upstream:
        servers = _servers(self._server, self._original)
        if lookup.query.type in (dns.AXFR, dns.IXFR) and self._under_way == 1 and not self._out:
            self._transferring = True
            return _Transfer(self._server, lookup, servers[0], self)
        return _StreamUpstream(self._server, lookup, servers)

    def leave_to(self, upstream: socket.socket, query: bytes) -> None:
        """Let the two ends talk, beginning with ``query``; ``upstream`` is ours now."""
        unsent = dns.framed(query) + self._buffer.take_rest()
        try:
            whole = upstream.send(unsent) == len(unsent)
        except OSError:
            whole = False
        if not whole or self._sock.fileno() < 0:
            upstream.close()
            self.close()
            return
        self._timer.cancel()
        self._server.reactor.remove(self._fd)
        self._relay = relay_tcp(self._server.reactor, self._sock, upstream, lambda result: self._server.forget(self))

    def close(self) -> None:
        """Idempotent."""
        if self._relay is not None:
            self._relay.abort("closed")
            return
        if self._sock.fileno() < 0:
            return
        self._timer.cancel()
        self._server.reactor.remove(self._fd)
        self._sock.close()
        self._server.forget(self)

    def _on_event(self, events: int) -> None:
        if events & (select.EPOLLHUP | select.EPOLLERR):  # it takes no answer any more
            self.close()
            return
        if events & select.EPOLLIN:
            try:
                data = self._sock.recv(_READ)
            except BlockingIOError:
                data = None
            except OSError:
                self.close()
                return
            if data:
                self._last = self._server.reactor.now()
                self._buffer.feed(data)
            elif data is not None:
                self._ended = True
        self._work()

    def _work(self) -> None:
        """Take what may be taken, write what can be written, and wait for what comes next."""
        if self._sock.fileno() < 0:
            return
        self._at_work = True
        try:
            while not self._transferring and self._under_way < MOST_PIPELINED and (message := self._buffer.next()) is not None:
                self._under_way += 1
                self._server.take(message, self)
        except RemoteProtocolError:
            # A stream whose messages are none has lost its way; whoever writes it gets no more answers.
            self.close()
            return
        finally:
            self._at_work = False
        try:
            if self._out:
                sent = self._sock.send(self._out)
                del self._out[:sent]
                self._last = self._server.reactor.now()
        except BlockingIOError:
            pass
        except OSError:
            self.close()
            return
        if self._ended and not self._under_way and not self._out:
            self.close()
            return
        reading = not self._ended and len(self._buffer) <= _MOST_UNREAD and len(self._out) <= _MOST_UNREAD
        self._server.reactor.modify(self._fd, (select.EPOLLIN if reading else 0) | (select.EPOLLOUT if self._out else 0))

    def _look_idle(self) -> None:
        idle = self._server.reactor.now() - self._last
        if idle >= TCP_IDLE_SECONDS and (self._out or not self._under_way):
            self.close()
        else:
            self._timer = self._server.reactor.call_later(max(0.1, TCP_IDLE_SECONDS - idle), self._look_idle)


class _StreamUpstream:
    """Asks over TCP, on a connection of its own for every message and server."""

    __slots__ = ("_buffer", "_dialling", "_id", "_lookup", "_out", "_server", "_servers", "_sock")

    def __init__(self, server: NameServer, lookup: _Lookup, servers: Sequence[SocketAddress]) -> None:
        self._server = server
        self._lookup = lookup
        self._servers = iter(servers)
        self._buffer = dns.MessageBuffer()
        self._out = b""
        self._sock: socket.socket | None = None
        self._dialling: Dialling | None = None
        self._id = 0
        if not self._ask_next():
            raise OSError(0, self._lookup.because)

    def close(self) -> None:
        if self._dialling is not None:
            self._dialling.cancel()
            self._dialling = None
        if self._sock is not None:
            self._server.reactor.remove(self._sock.fileno())
            self._sock.close()
            self._sock = None

    def _ask_next(self) -> bool:
        """False if there is nobody left to ask."""
        self.close()
        address = next(self._servers, None)
        if address is None:
            return False
        self._lookup.because = f"{address}: timed out"
        self._dialling = self._server.pod.dial(address, partial(self._dialled, address))
        return True

    def _go_on(self, because: str) -> None:
        self._lookup.because = because
        if not self._ask_next():
            self._lookup.fail(because)

    def _dialled(self, address: SocketAddress, result: socket.socket | OSError) -> None:
        self._dialling = None
        if isinstance(result, OSError):
            self._go_on(f"{address}: {result.strerror or result}")
            return
        self._sock = result
        self._buffer = dns.MessageBuffer()
        self._id = _random.getrandbits(16)
        self._out = dns.framed(dns.with_id(self._lookup.data, self._id))
        self._server.reactor.add(result.fileno(), select.EPOLLIN | select.EPOLLOUT, self._on_event, self._lookup.fail)

    def _on_event(self, events: int) -> None:
        sock = self._sock
        assert sock is not None
        try:
            if self._out and events & select.EPOLLOUT:
                self._out = self._out[sock.send(self._out) :]
                if not self._out:
                    self._server.reactor.modify(sock.fileno(), select.EPOLLIN)
            if events & ~select.EPOLLOUT:
                data = sock.recv(_READ)
                if not data:
                    self._go_on("the server closed the connection")
                    return
                self._buffer.feed(data)
        except BlockingIOError:
            return
        except OSError as exc:
            self._go_on(exc.strerror or str(exc))
            return
        response = self._buffer.next()
        if response is None:
            return
        if dns.answers(response, self._lookup.query, self._id):
            self._lookup.succeed(response)
        else:
            self._go_on("the server answered something else")


class _Transfer:
    """Connects a client that asks for a whole zone with the server."""

    __slots__ = ("_client", "_dialling", "_lookup")

    def __init__(self, server: NameServer, lookup: _Lookup, address: SocketAddress, client: _TcpClient) -> None:
        self._lookup = lookup
        self._client = client
        self._dialling: Dialling | None = server.pod.dial(address, self._dialled)

    def close(self) -> None:
        if self._dialling is not None:
            self._dialling.cancel()
            self._dialling = None

    def _dialled(self, result: socket.socket | OSError) -> None:
        self._dialling = None
        if isinstance(result, OSError):
            self._lookup.fail(result.strerror or str(result))
        else:
            self._lookup.hand_over()
            self._client.leave_to(result, self._lookup.data)


def _servers(server: NameServer, original: SocketAddress | None) -> Sequence[SocketAddress]:
    """Whom to ask. Raises OSError if there is nobody."""
    found = (original,) if original is not None else server.service.nameservers()
    # To ask ourselves, as a resolver that points to the agent would have it, has no end.
    found = [address for address in found if not (address.ip.is_loopback and address.port == DNS)]
    if not found:
        raise OSError(0, "no server is known")
    return found


def _send_datagram(sock: socket.socket, answer: bytes, peer: _Peer) -> None:
    try:
        sock.sendto(answer, peer)
    except OSError:
        pass  # its buffer is full, or it is gone: whoever asked asks again


_random = random.SystemRandom()

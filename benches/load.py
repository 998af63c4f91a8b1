"""The load of the benches: a server, and a client that does the pieces of work it reads as JSON from standard input.

    python3 load.py serve PORT
    python3 load.py work

Standard library only, and run by its path, so that any pod of a lab can. One thread and one epoll loop each, no allocation a message
that can be had without: what the load itself costs is what the subject "no proxy" shows.

A connection begins with a header: ``e`` for messages of 1 KB that are answered with messages of 1 KB (the header is part of the first),
or ``b`` for bulk, with the bytes that the server is to receive and to send; the server's last byte says that it has got all.
"""

from __future__ import annotations

import gc
import json
import resource
import select
import socket
import struct
import sys
import time
from collections.abc import Callable

MESSAGE = 1024
CHUNK = 256 << 10
PORTIONS = 4
"""Chunks a connection may move before others have their turn."""
PATIENCE = 30.0
"""Seconds without any event after which a piece of work has failed."""
ECHO, BULK = b"e", b"b"

_HEADER = struct.Struct("!cQQ")
_QUERY = struct.Struct("!6H")
"""Id, flags, and how many questions, answers, authorities and additions follow (RFC 1035 4.1.1)."""
_ENDLESS = 1 << 60
_REPLY = bytes(MESSAGE)
_REQUEST = _HEADER.pack(ECHO, 0, 0).ljust(MESSAGE, b".")
_ZEROS = memoryview(bytes(CHUNK))
_scratch = memoryview(bytearray(CHUNK))


class Flow:
    """One connection's bytes, both ways, moved as far as the socket lets them. For the client and the server of bulk transfers."""

    def __init__(self, sock: socket.socket, to_send: int, to_receive: int) -> None:
        self.sock = sock
        self.to_send = to_send
        self.to_receive = to_receive

    def send(self) -> bool:
        """Send; True when all has gone."""
        for _ in range(PORTIONS):
            if not self.to_send:
                break
            try:
                self.to_send -= self.sock.send(_ZEROS[: min(CHUNK, self.to_send)])
            except BlockingIOError:
                return False
        return not self.to_send

    def receive(self) -> bool:
        """Receive; True when all has come. Raises ConnectionError."""
        for _ in range(PORTIONS):
            if not self.to_receive:
                return True
            try:
                size = self.sock.recv_into(_scratch, min(CHUNK, self.to_receive))
            except BlockingIOError:
                return False
            if not size:
                raise ConnectionError(f"ended {self.to_receive} bytes early")
            self.to_receive -= size
        return not self.to_receive


# --- the server


class Server:
    """Serves for ever."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[int], None]] = {listener.fileno(): self._accept}
        self._socks: dict[int, socket.socket] = {}
        listener.setblocking(False)
        self._epoll.register(listener.fileno(), select.EPOLLIN)

    def run(self) -> None:
        handlers, poll = self._handlers, self._epoll.poll
        while True:
            for descriptor, events in poll():
                handler = handlers.get(descriptor)
                if handler is None:
                    continue
                try:
                    handler(events)
                except OSError:
                    self._close(descriptor)  # the client broke off, which is its right

    def _accept(self, _events: int) -> None:
        for _ in range(64):
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                return
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            descriptor = sock.fileno()
            self._socks[descriptor] = sock
            self._handlers[descriptor] = lambda _events, sock=sock: self._greet(sock)  # type: ignore[misc]  # of the loop's variable
            self._epoll.register(descriptor, select.EPOLLIN)

    def _greet(self, sock: socket.socket) -> None:
        data = sock.recv(MESSAGE)
        if len(data) < _HEADER.size:  # headers are sent in one piece, so this is an end, or nobody we know
            self._close(sock.fileno())
            return
        kind, up, down = _HEADER.unpack_from(data)
        if kind == ECHO:
            self._serve_echo(sock, len(data))
        else:
            self._serve_bulk(sock, Flow(sock, to_send=down, to_receive=up - (len(data) - _HEADER.size)))

    def _serve_echo(self, sock: socket.socket, received: int) -> None:
        recv_into, send, descriptor = sock.recv_into, sock.send, sock.fileno()

        def answer(_events: int) -> None:
            nonlocal received
            size = recv_into(_scratch)
            if not size:
                self._close(descriptor)
                return
            received += size
            while received >= MESSAGE:
                received -= MESSAGE
                send(_REPLY)

        if received >= MESSAGE:
            received -= MESSAGE
            send(_REPLY)
        self._handlers[descriptor] = answer

    def _serve_bulk(self, sock: socket.socket, flow: Flow) -> None:
        descriptor = sock.fileno()

        def move(events: int) -> None:
            if events & select.EPOLLOUT and flow.send():
                self._epoll.modify(descriptor, select.EPOLLIN)
            if events & ~select.EPOLLOUT:
                flow.receive()
            if not flow.to_send and not flow.to_receive:
                sock.send(b".")
                self._epoll.modify(descriptor, select.EPOLLIN)
                self._handlers[descriptor] = lambda _events: self._close(descriptor)  # the client has seen the last byte

        self._handlers[descriptor] = move
        self._epoll.modify(descriptor, select.EPOLLIN | (select.EPOLLOUT if flow.to_send else 0))
        move(0)

    def _close(self, descriptor: int) -> None:
        del self._handlers[descriptor]
        self._socks.pop(descriptor).close()


# --- the client


class Client:
    """Does pieces of work; each method is one, and returns what it saw. Raises OSError when traffic does not pass."""

    def __init__(self) -> None:
        self._held: list[socket.socket] = []

    def bulk(self, host: str, port: int, connections: int, up: int, down: int) -> dict[str, float]:
        """Send ``up`` and receive ``down`` bytes on each of so many connections at once."""
        epoll = select.epoll()
        flows: dict[int, Flow] = {}
        for _ in range(connections):
            sock = socket.create_connection((host, port), timeout=PATIENCE)
            flows[sock.fileno()] = Flow(sock, to_send=up, to_receive=down + 1)
            epoll.register(sock.fileno(), select.EPOLLIN | (select.EPOLLOUT if up else 0))
        began = time.perf_counter()
        for flow in flows.values():
            flow.sock.sendall(_HEADER.pack(BULK, up, down))
            flow.sock.setblocking(False)
        while flows:
            for descriptor, events in wait(epoll):
                flow = flows[descriptor]
                if events & select.EPOLLOUT and flow.send():
                    epoll.modify(descriptor, select.EPOLLIN)
                if events & ~select.EPOLLOUT and flow.receive():
                    del flows[descriptor]
                    flow.sock.close()
        return {"seconds": time.perf_counter() - began}

    def connect(self, host: str, port: int, count: int, parallel: int) -> dict[str, float]:
        """So many connections, so many at a time: connect, 1 KB there, 1 KB back, close."""
        began = time.perf_counter()
        self._open(host, port, count, parallel, lambda sock: sock.close())
        return {"seconds": time.perf_counter() - began}

    def hold(self, host: str, port: int, count: int, parallel: int) -> dict[str, float]:
        """As `connect`, but the connections stay until `release`."""
        began = time.perf_counter()
        self._open(host, port, count, parallel, self._held.append)
        return {"seconds": time.perf_counter() - began}

    def release(self) -> dict[str, float]:
        """Close what is held."""
        for sock in self._held:
            sock.close()
        self._held.clear()
        return {}

    def _open(self, host: str, port: int, count: int, parallel: int, done: Callable[[socket.socket], object]) -> None:
        """Open connections and exchange a message on each; ``done`` takes them over."""
        epoll = select.epoll()
        living: dict[int, socket.socket] = {}
        received: dict[int, int] = {}
        address = (host, port)
        stream, nodelay, tcp = socket.SOCK_STREAM | socket.SOCK_NONBLOCK, socket.TCP_NODELAY, socket.IPPROTO_TCP
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        started = finished = 0
        while finished < count:
            while started < count and len(living) < parallel:
                sock = socket.socket(family, stream)
                sock.setsockopt(tcp, nodelay, 1)
                sock.connect_ex(address)
                living[sock.fileno()], received[sock.fileno()] = sock, 0
                epoll.register(sock.fileno(), select.EPOLLOUT)
                started += 1
            for descriptor, events in wait(epoll):
                sock = living[descriptor]
                if events == select.EPOLLOUT:
                    sock.send(_REQUEST)
                    epoll.modify(descriptor, select.EPOLLIN)
                    continue
                size = sock.recv_into(_scratch)  # raises what became of a connection that failed
                if not size:
                    raise ConnectionError(f"connection {finished + 1} of {count} ended without an answer")
                received[descriptor] += size
                if received[descriptor] >= MESSAGE:
                    epoll.unregister(descriptor)
                    del living[descriptor]
                    done(sock)
                    finished += 1
        epoll.close()

    def trips(self, host: str, port: int, connections: int, seconds: float, rate: float) -> dict[str, float]:
        """Round trips of 1 KB: with a rate so many a second on one connection, without as many as go on all connections at once.

        Percentiles are in seconds.
        """
        socks = [socket.create_connection((host, port), timeout=PATIENCE) for _ in range(connections)]
        try:
            for sock in socks:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.sendall(_REQUEST)
                _receive_message(sock)
            began = time.perf_counter()
            times = _paced(socks[0], seconds, rate) if rate else _saturated(socks, seconds)
            took = time.perf_counter() - began
        finally:
            for sock in socks:
                sock.close()
        return {"seconds": took, "trips": len(times), **percentiles(times)}

    def crowd(self, host: str, port: int, seconds: float) -> dict[str, float]:
        """Send as fast as it goes for so long, beside a connection whose server does the same and that nobody reads."""
        stuck, sender = (socket.create_connection((host, port), timeout=PATIENCE) for _ in range(2))
        with stuck, sender:
            stuck.sendall(_HEADER.pack(BULK, 0, _ENDLESS))
            sender.sendall(_HEADER.pack(BULK, _ENDLESS, 0))
            until, sent = time.perf_counter() + seconds, 0
            while time.perf_counter() < until:
                sent += sender.send(_ZEROS)
        return {"seconds": seconds, "bytes": sent}

    def look_up(self, host: str, port: int, name: str, count: int, parallel: int) -> dict[str, float]:
        """Ask a server for the IPv4 addresses of a name, so many times, so many at a time; a socket a query, as resolvers do it."""
        epoll = select.epoll()
        question = _QUERY.pack(1, 0x0100, 1, 0, 0, 0) + _encode_name(name) + b"\0\1\0\1"  # recursion desired; A, IN
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        asking: dict[int, socket.socket] = {}
        began = time.perf_counter()
        started = finished = 0
        while finished < count:
            while started < count and len(asking) < parallel:
                sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
                sock.connect((host, port))
                sock.send(question)
                asking[sock.fileno()] = sock
                epoll.register(sock.fileno(), select.EPOLLIN)
                started += 1
            for descriptor, _ in wait(epoll):
                sock = asking.pop(descriptor)
                _check_answer(sock.recv(MESSAGE))
                epoll.unregister(descriptor)
                sock.close()
                finished += 1
        epoll.close()
        return {"seconds": time.perf_counter() - began}


def percentiles(times: list[float]) -> dict[str, float]:
    """The median and the two that say how bad it gets, by name."""
    times = sorted(times)
    return {name: times[min(len(times) - 1, int(len(times) * share))] for name, share in (("p50", 0.5), ("p99", 0.99), ("p999", 0.999))}


def _encode_name(name: str) -> bytes:
    return b"".join(bytes([len(label)]) + label.encode() for label in name.split(".")) + b"\0"


def _check_answer(answer: bytes) -> None:
    _, flags, _, answers, _, _ = _QUERY.unpack_from(answer)
    if flags & 0xF or not answers:
        raise ConnectionError(f"answer with code {flags & 0xF} and {answers} records")


def _paced(sock: socket.socket, seconds: float, rate: float) -> list[float]:
    """A trip at a time, begun at fixed moments; one that is late delays those after it and is counted with them once only."""
    clock, send, times = time.perf_counter, sock.sendall, list[float]()
    began = clock()
    for number in range(int(seconds * rate)):
        time.sleep(max(0.0, began + number / rate - clock()))
        sent = clock()
        send(_REQUEST)
        _receive_message(sock)
        times.append(clock() - sent)
    return times


def _saturated(socks: list[socket.socket], seconds: float) -> list[float]:
    """On every connection the next trip begins when the last has ended."""
    epoll, clock, times = select.epoll(), time.perf_counter, list[float]()
    sent: dict[int, float] = {}
    got: dict[int, int] = {}
    by_descriptor = {sock.fileno(): sock for sock in socks}
    for sock in socks:
        sock.setblocking(False)
        epoll.register(sock.fileno(), select.EPOLLIN)
    deadline = clock() + seconds
    for descriptor, sock in by_descriptor.items():
        sent[descriptor], got[descriptor] = clock(), 0
        sock.send(_REQUEST)
    while sent:
        for descriptor, _ in wait(epoll):
            sock = by_descriptor[descriptor]
            size = sock.recv_into(_scratch)
            if not size:
                raise ConnectionError("ended amid round trips")
            got[descriptor] += size
            if got[descriptor] >= MESSAGE:
                now = clock()
                times.append(now - sent[descriptor])
                if now < deadline:
                    got[descriptor], sent[descriptor] = 0, now
                    sock.send(_REQUEST)
                else:
                    del sent[descriptor]
    epoll.close()
    return times


def _receive_message(sock: socket.socket) -> None:
    left = MESSAGE
    while left:
        size = sock.recv_into(_scratch, left)
        if not size:
            raise ConnectionError("ended amid a message")
        left -= size


def wait(epoll: select.epoll) -> list[tuple[int, int]]:
    events = epoll.poll(PATIENCE)
    if not events:
        raise TimeoutError(f"nothing happened for {PATIENCE:g} s")
    return events


def work(client: Client) -> None:
    """Do what standard input says, a JSON object a line with the method's name as ``do``, and print what was seen."""
    for line in sys.stdin:
        command = json.loads(line)
        try:
            seen = getattr(client, command.pop("do"))(**command)
        except OSError as exc:
            seen = {"error": f"{type(exc).__name__}: {exc}"}
        print(json.dumps(seen), flush=True)


def run(arguments: list[str], server: type[Server], client: Client) -> None:
    """What the command line says."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    gc.disable()  # a pause of ours would count as the subject's
    if arguments[0] == "serve":
        listener = socket.create_server(("::", int(arguments[1])), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
        server(listener).run()
    work(client)


if __name__ == "__main__":
    run(sys.argv[1:], Server, Client())

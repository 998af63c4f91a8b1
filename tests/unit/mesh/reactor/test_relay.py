import errno
import hashlib
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from OpenSSL import SSL

from mesh.model.identity import SpiffeId
from mesh.reactor import pipes
from mesh.reactor.relay import SpliceRelay, TunnelRelay
from mesh.testing.ca import FakeCa
from mesh.testing.proxies import Path, ReactorThread, open_descriptors, read_all, wait_until
from mesh.tls.contexts import hbone_context
from mesh.wire.errors import ErrorCode

MIB = 1 << 20
STREAM_WINDOW = 4 * MIB
RESET = (errno.ECONNRESET, errno.EPIPE)  # EPIPE: after an end of file (tcp_reset in the kernel)


@pytest.fixture(scope="module")
def contexts() -> tuple[SSL.Context, SSL.Context]:
    bundle = FakeCa().issue(SpiffeId("cluster.local", "default", "client"))
    return hbone_context(bundle), hbone_context(bundle)


@pytest.fixture(params=["tunnel", "splice"])
def path(request: pytest.FixtureRequest, contexts: tuple[SSL.Context, SSL.Context]) -> Iterator[Path]:
    with ReactorThread() as thread, Path(thread, contexts if request.param == "tunnel" else None) as path:
        yield path
    assert thread.errors == []


@pytest.fixture
def tunnel(contexts: tuple[SSL.Context, SSL.Context]) -> Iterator[Path]:
    with ReactorThread() as thread, Path(thread, contexts) as path:
        yield path
    assert thread.errors == []


def in_background(stack: ExitStack, fn: Callable[[], object]) -> None:
    thread = threading.Thread(target=fn, daemon=True)
    thread.start()
    stack.callback(thread.join, 20)


def send_and_end(sock: socket.socket, data: bytes) -> None:
    sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)


def send_until_held_back(sock: socket.socket) -> int:
    """How many bytes went off before nothing moved for a while."""
    sent = 0
    sock.settimeout(0.3)
    try:
        while True:
            sent += sock.send(b"x" * MIB)
    except TimeoutError:
        sock.settimeout(10)
        return sent


def close_with_reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def test_bulk_in_both_directions_at_once_arrives_whole(path: Path) -> None:
    up, down = os.urandom(MIB) * 24, os.urandom(MIB) * 17
    client, server = path.connect()
    with client, server, ExitStack() as stack:
        in_background(stack, lambda: send_and_end(client, up))
        in_background(stack, lambda: send_and_end(server, down))
        digests: dict[str, str] = {}
        in_background(stack, lambda: digests.update(up=hashlib.sha256(read_all(server)).hexdigest()))
        digests["down"] = hashlib.sha256(read_all(client)).hexdigest()
        stack.close()
        assert digests == {"up": hashlib.sha256(up).hexdigest(), "down": hashlib.sha256(down).hexdigest()}
    (result,) = path.results()
    assert (result.sent, result.received, result.error) == (len(up), len(down), None)


@pytest.mark.parametrize("first", ["client", "server"])
@pytest.mark.parametrize("size", [0, 1, 100_000, 3 * MIB])
def test_data_and_end_of_one_side_leave_the_other_direction_open(path: Path, first: str, size: int) -> None:
    client, server = path.connect()
    one, other = (client, server) if first == "client" else (server, client)
    data = os.urandom(size)
    with client, server, ExitStack() as stack:
        in_background(stack, lambda: send_and_end(one, data))
        assert read_all(other) == data
        for word in (b"still", b"here"):  # each crosses by itself, long after the end of the other direction
            other.sendall(word)
            assert one.recv(100) == word
        send_and_end(other, data)
        assert read_all(one) == data
    (result,) = path.results()
    assert result.error is None
    assert result.first_closed == ("downstream" if first == "client" else "upstream")


def test_both_sides_end_at_the_same_moment(path: Path) -> None:
    for _ in range(50):
        client, server = path.connect()
        with client, server:
            send_and_end(client, b"a" * 1000)
            send_and_end(server, b"b" * 1000)
            assert read_all(client) == b"b" * 1000
            assert read_all(server) == b"a" * 1000
    assert {result.error for result in path.results(50)} == {None}


def test_an_end_that_arrives_while_the_other_side_does_not_read_is_kept_for_later(path: Path) -> None:
    client, server = path.connect()
    data = os.urandom(MIB) * 16  # more than the sockets on the way hold
    with client, server, ExitStack() as stack:
        in_background(stack, lambda: send_and_end(client, data))
        send_and_end(server, b"early")
        assert read_all(client) == b"early"
        assert hashlib.sha256(read_all(server)).digest() == hashlib.sha256(data).digest()
    assert path.results()[0].error is None


def test_an_end_sent_together_with_data_is_seen_by_the_edge_triggered_loop(path: Path) -> None:
    """The FIN that an event already announced makes no further edge."""
    for size in (1, 2048, 65536, 256 * 1024 - 9, 256 * 1024, 256 * 1024 + 1, 600_000):
        client, server = path.connect()
        with client, server, ExitStack() as stack:
            data = os.urandom(size)
            in_background(stack, lambda sock=client, data=data: send_and_end(sock, data))
            assert read_all(server) == data


@pytest.mark.parametrize("who", ["client", "server"])
def test_a_reset_passes_as_a_reset(path: Path, who: str) -> None:
    client, server = path.connect()
    one, other = (client, server) if who == "client" else (server, client)
    with client, server:
        one.sendall(b"x")
        assert other.recv(1) == b"x"
        close_with_reset(one)
        with pytest.raises(ConnectionResetError):
            other.recv(1)
    (result,) = path.results()
    side = "downstream" if who == "client" else "upstream"
    assert (result.error, result.first_closed) == (f"connection reset by {side}" if side == "downstream" else result.error, side)
    assert result.error is not None


def test_a_reset_is_seen_though_the_other_side_does_not_read(path: Path) -> None:
    client, server = path.connect()
    with client, server:
        send_until_held_back(client)
        close_with_reset(client)
        path.results()  # while the server has still not read a byte


def test_a_reset_is_seen_after_the_end_of_the_same_side(path: Path) -> None:
    client, server = path.connect()
    with client, server:
        client.shutdown(socket.SHUT_WR)
        assert server.recv(1) == b""
        close_with_reset(client)
        assert path.results()[0].error == "connection reset by downstream"
        wait_until(lambda: server.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) in RESET, "the reset to reach the server")


def test_abort_resets_both_sides_and_gives_the_reason(path: Path) -> None:
    client, server = path.connect()
    with client, server:
        client.sendall(b"x")
        assert server.recv(1) == b"x"
        path.thread.call(lambda: path.near.relays[0].abort("connection closed due to policy change"))
        for sock in (client, server):
            with pytest.raises(ConnectionResetError):
                sock.recv(1)
    (result,) = path.results()
    assert (result.error, result.first_closed) == ("connection closed due to policy change", None)


def test_counters_are_live(path: Path) -> None:
    client, server = path.connect()
    with client, server:
        client.sendall(b"12345")
        assert server.recv(10) == b"12345"
        server.sendall(b"123")
        assert client.recv(10) == b"123"
        relay = path.near.relays[0]
        wait_until(lambda: (relay.sent, relay.received) == (5, 3), "both counters, while the connection lives")


def test_a_server_that_speaks_first_is_heard_at_once(path: Path) -> None:
    for _ in range(20):
        client, server = path.connect()
        with client, server:
            server.sendall(b"220 welcome")
            assert client.recv(100) == b"220 welcome"


def test_a_slow_reader_stops_its_sender_within_bounded_memory(tunnel: Path) -> None:
    client, server = tunnel.connect()
    with client, server:
        sent = send_until_held_back(client)
        assert sent < 100 * MIB
        assert tunnel.ingress is not None
        relay = tunnel.ingress.relays[0]
        assert isinstance(relay, TunnelRelay)
        assert len(relay._pending) <= STREAM_WINDOW
        client.shutdown(socket.SHUT_WR)
        assert len(read_all(server)) == sent
    assert tunnel.results()[0].error is None


def test_a_tunnel_that_nobody_reads_does_not_hold_up_its_neighbours(tunnel: Path) -> None:
    with ExitStack() as stack:
        for _ in range(6):  # six streams' windows are more than the connection's
            client, server = (stack.enter_context(sock) for sock in tunnel.connect())
            send_until_held_back(client)
        client, server = (stack.enter_context(sock) for sock in tunnel.connect())
        in_background(stack, lambda: send_and_end(client, b"y" * 32 * MIB))
        assert len(read_all(server)) == 32 * MIB


def test_an_answer_arrives_whole_though_the_far_side_stops_listening(tunnel: Path) -> None:
    """RST_STREAM(NO_ERROR), as of an Envoy whose upstream ends first: closing with the client's bytes unread would destroy the answer."""
    down = os.urandom(MIB) * 3
    client, server = tunnel.connect()
    with client, server:
        send_until_held_back(client)
        server.sendall(down)
        assert tunnel.ingress is not None
        relay = tunnel.ingress.relays[0]
        assert isinstance(relay, TunnelRelay)
        wait_until(lambda: relay.sent == len(down), "the answer to be on its way")
        tunnel.thread.call(lambda: relay._break("answered", ErrorCode.NO_ERROR))
        client.sendall(b"more that nobody wants")
        assert read_all(client) == down
        client.close()
        assert tunnel.results()[0].error is None


def test_tunnels_share_a_connection_fairly(tunnel: Path) -> None:
    """Small exchanges go on at their pace beside a bulk transfer over the same connection."""
    with ExitStack() as stack:
        bulk, sink = (stack.enter_context(sock) for sock in tunnel.connect())
        client, server = (stack.enter_context(sock) for sock in tunnel.connect())
        stop = threading.Event()
        received = [0]

        def send() -> None:
            while not stop.is_set():
                bulk.send(b"x" * MIB)
            bulk.shutdown(socket.SHUT_WR)

        def receive() -> None:
            while data := sink.recv(MIB):
                received[0] += len(data)

        in_background(stack, send)
        in_background(stack, receive)
        before = received[0]
        for _ in range(200):
            client.sendall(b"ping")
            assert server.recv(4) == b"ping"
            server.sendall(b"pong")
            assert client.recv(4) == b"pong"
        wait_until(lambda: received[0] > before, "the bulk transfer to go on")
        stop.set()


def test_many_connections_leave_no_descriptor_behind(path: Path) -> None:
    warm = path.connect()
    for sock in warm:
        sock.close()
    path.results(1)
    before = open_descriptors()
    for number in range(300):
        client, server = path.connect()
        client.sendall(b"hello")
        assert server.recv(5) == b"hello"
        if number % 3 == 0:
            close_with_reset(client)
        elif number % 3 == 1:
            close_with_reset(server)
        client.close()
        server.close()
    path.results(301)
    wait_until(lambda: path.ingress is None or len(path.ingress.results) == 301, "the far proxy's relays to finish")
    wait_until(lambda: open_descriptors() <= before, f"{before} open descriptors, there are {open_descriptors()}")


def test_idle_spliced_connections_hold_no_pipes() -> None:
    with ReactorThread() as thread, Path(thread, None) as path, ExitStack() as stack:
        for _ in range(40):
            client, server = (stack.enter_context(sock) for sock in path.connect())
            client.sendall(b"x")
            assert server.recv(1) == b"x"
        relays = [relay for relay in path.near.relays if isinstance(relay, SpliceRelay)]
        wait_until(lambda: all(relay._up.pipe is None and relay._down.pipe is None for relay in relays), "the pipes to be given back")
        assert len(relays) == 40


def test_a_bulk_transfer_reuses_its_pipe() -> None:
    before = len(pipes._free)
    with ReactorThread() as thread, Path(thread, None) as path:
        client, server = path.connect()
        with client, server, ExitStack() as stack:
            in_background(stack, lambda: send_and_end(client, b"x" * 64 * MIB))
            assert len(read_all(server)) == 64 * MIB
            send_and_end(server, b"")
            path.results()
        assert len(pipes._free) <= max(before, 2)

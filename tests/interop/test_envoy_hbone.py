"""The reactor's HBONE against Envoy's, both ways: what one frames the other reads, ends and resets included."""

import hashlib
import os
import socket
import struct
import threading
from collections.abc import Iterator

import pytest

from mesh.model.identity import SpiffeId
from mesh.testing.ca import FakeCa
from mesh.testing.envoy import RunningEnvoy, running_client, running_server
from mesh.testing.proxies import EgressProxy, IngressProxy, ReactorThread, read_all, socket_address, tcp_listener, wait_until
from mesh.tls.contexts import hbone_context

pytestmark = pytest.mark.interop

MIB = 1 << 20
CA = FakeCa()
BUNDLE = CA.issue(SpiffeId("cluster.local", "default", "peer"))


class Through:
    """A client's way to a server, with Envoy at one end of the tunnel and us at the other."""

    def __init__(self, server: socket.socket, port: int) -> None:
        self.server = server
        self.port = port

    def connect(self) -> tuple[socket.socket, socket.socket]:
        client = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        client.sendall(b"!")  # Envoy's wait for its port leaves a connection without it
        while True:
            server, _ = self.server.accept()
            server.settimeout(10)
            if server.recv(1) == b"!":
                return client, server
            server.close()


@pytest.fixture(params=["envoy serves", "envoy asks"])
def through(request: pytest.FixtureRequest) -> Iterator[Through]:
    with tcp_listener() as server, tcp_listener() as ours, ReactorThread() as thread:
        server.settimeout(10)
        target = str(socket_address(server.getsockname()))
        envoy: RunningEnvoy
        if request.param == "envoy serves":
            with running_server(BUNDLE) as envoy:
                egress = thread.call(lambda: EgressProxy(thread.reactor, ours, hbone_context(BUNDLE), envoy.address, target))
                yield Through(server, egress.address.port)
                thread.call(egress.close)
        else:
            ingress = thread.call(lambda: IngressProxy(thread.reactor, ours, hbone_context(BUNDLE)))
            with running_client(BUNDLE, ingress.address, target) as envoy:
                yield Through(server, envoy.address.port)
            thread.call(ingress.close)
        assert thread.errors == []


def send_and_end(sock: socket.socket, data: bytes) -> None:
    sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)


def test_bulk_in_both_directions_at_once_arrives_whole(through: Through) -> None:
    up, down = os.urandom(MIB) * 20, os.urandom(MIB) * 20
    client, server = through.connect()
    received: list[bytes] = []

    def serve() -> None:
        sender = threading.Thread(target=server.sendall, args=(down,))
        sender.start()
        received.append(read_all(server))
        sender.join()
        server.shutdown(socket.SHUT_WR)  # not before: Envoy stops listening to the client once its upstream has ended

    with client, server:
        threads = [threading.Thread(target=serve), threading.Thread(target=send_and_end, args=(client, up))]
        for thread in threads:
            thread.start()
        assert hashlib.sha256(read_all(client)).digest() == hashlib.sha256(down).digest()
        for thread in threads:
            thread.join()
        assert hashlib.sha256(received[0]).digest() == hashlib.sha256(up).digest()


def test_half_closed_connections_go_on_the_other_way(through: Through) -> None:
    client, server = through.connect()
    with client, server:
        client.shutdown(socket.SHUT_WR)
        assert server.recv(1) == b""
        for _ in range(3):
            server.sendall(b"still here")
            assert client.recv(100) == b"still here"
        server.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""


def test_hundred_connections_one_after_the_other(through: Through) -> None:
    for number in range(100):
        client, server = through.connect()
        with client, server:
            message = b"%d" % number
            client.sendall(message)
            assert server.recv(100) == message
            server.sendall(message)
            assert client.recv(100) == message


def test_a_reset_ends_the_other_side(through: Through) -> None:
    client, server = through.connect()
    with client, server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        server.close()
        try:
            assert client.recv(1) == b""
        except ConnectionResetError:
            pass


def test_a_certificate_of_another_ca_is_refused_by_either() -> None:
    stranger = FakeCa("other.example").issue(SpiffeId("other.example", "default", "peer"))
    with tcp_listener() as ours, ReactorThread() as thread, running_server(BUNDLE) as envoy:
        egress = thread.call(lambda: EgressProxy(thread.reactor, ours, hbone_context(stranger), envoy.address, "127.0.0.1:1"))
        try:
            with socket.create_connection(("127.0.0.1", egress.address.port), timeout=10) as sock:
                sock.recv(1)
        except ConnectionResetError:
            pass
        wait_until(lambda: bool(egress.failures), "the refusal")
        assert egress.failures[0] is not None
        assert egress.failures[0].startswith("tls handshake error: certificate verify failed")
        thread.call(egress.close)
    with tcp_listener() as ours, ReactorThread() as thread:
        ingress = thread.call(lambda: IngressProxy(thread.reactor, ours, hbone_context(BUNDLE)))
        with running_client(stranger, ingress.address, "127.0.0.1:1") as envoy, socket.create_connection(("127.0.0.1", envoy.address.port)):
            wait_until(lambda: bool(ingress.closed), "the refusal")
            assert (ingress.closed[0] or "").startswith("tls handshake error: ")
        thread.call(ingress.close)

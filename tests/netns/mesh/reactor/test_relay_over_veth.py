"""The relay where it once hung: over veth, whose timing of data and FIN differs from loopback's."""

import hashlib
import os
import socket
import threading
from collections.abc import Iterator

import pytest

from mesh.model.address import SocketAddress, parse_ip
from mesh.model.identity import SpiffeId
from mesh.testing.ca import FakeCa
from mesh.testing.netns import namespaces, wire
from mesh.testing.proxies import EgressProxy, IngressProxy, ReactorThread, read_all, wait_until
from mesh.tls.contexts import hbone_context

pytestmark = [pytest.mark.netns, pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")]

MIB = 1 << 20
BUNDLE = FakeCa().issue(SpiffeId("cluster.local", "default", "node"))
A, B = parse_ip("10.99.7.1"), parse_ip("10.99.7.2")


class Veth:
    """Client in b, egress in a, ingress in b, server in a: every connection crosses the veth, and each proxy has a thread."""

    def __init__(self, egress: EgressProxy, server: socket.socket, connect: object) -> None:
        self.egress = egress
        self.server = server
        self._connect = connect

    def connect(self) -> tuple[socket.socket, socket.socket]:
        assert callable(self._connect)
        client: socket.socket = self._connect(SocketAddress(A, self.egress.address.port))
        server, _ = self.server.accept()
        server.settimeout(15)
        return client, server


@pytest.fixture
def veth() -> Iterator[Veth]:
    with namespaces("relay-a", "relay-b") as (a, b):
        wire(a, b, (f"{A}/24",), (f"{B}/24",))
        with a.listen(0, str(A)) as server, a.listen(0, str(A)) as outer, b.listen(0, str(B)) as inner:
            server.settimeout(15)
            target = str(SocketAddress(A, server.getsockname()[1]))
            with ReactorThread() as near, ReactorThread() as far:
                ingress = far.call(
                    lambda: IngressProxy(far.reactor, inner, hbone_context(BUNDLE), lambda family: b.run(lambda: socket.socket(family)))
                )
                egress = near.call(
                    lambda: EgressProxy(
                        near.reactor,
                        outer,
                        hbone_context(BUNDLE),
                        ingress.address,
                        target,
                        make_socket=lambda family: a.run(lambda: socket.socket(family)),
                    )
                )
                yield Veth(egress, server, b.connect)
                near.call(egress.close)
                far.call(ingress.close)
            assert near.errors == []
            assert far.errors == []


def send_and_end(sock: socket.socket, data: bytes) -> None:
    sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)


def test_bulk_each_way_and_both_at_once_ends(veth: Veth) -> None:
    data = os.urandom(MIB) * 96
    digest = hashlib.sha256(data).digest()
    for up, down in ((data, b""), (b"", data), (data, data)):
        client, server = veth.connect()
        received: list[bytes] = []
        with client, server:
            threads = [threading.Thread(target=send_and_end, args=args) for args in ((client, up), (server, down))]
            threads.append(threading.Thread(target=lambda sock=server, received=received: received.append(read_all(sock))))
            for thread in threads:
                thread.start()
            received.insert(0, read_all(client))
            for thread in threads:
                thread.join()
        assert [hashlib.sha256(each).digest() == digest if each else False for each in received] == [bool(down), bool(up)]
    wait_until(lambda: [result.error for result in veth.egress.results] == [None] * 3, "three clean ends")


def test_ends_with_data_of_every_size_arrive(veth: Veth) -> None:
    for size in (1, 1447, 1448, 1449, 16384, 65536, 65537, 262135, 262144, 262145, 524288, 1 << 20):
        data = os.urandom(size)
        client, server = veth.connect()
        with client, server:
            sender = threading.Thread(target=send_and_end, args=(client, data))
            sender.start()
            assert read_all(server) == data
            sender.join()
            sender = threading.Thread(target=send_and_end, args=(server, data))
            sender.start()
            assert read_all(client) == data
            sender.join()

"""The bare data path over loopback: two proxies of `mesh.testing.proxies` in series beside two Envoys, mutual TLS HBONE between them.

No policy, capture or log: what is left is the reactor, TLS and HTTP/2. CPU is user and system time of both proxies together; subjects take
turns.
"""

from __future__ import annotations

import multiprocessing
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Final

import trio

from benches.cpu import measured
from benches.rows import ENVOY, OURS, Record, Row
from benches.stage import Say
from mesh.model.address import SocketAddress, parse_ip
from mesh.model.identity import SpiffeId
from mesh.reactor.loop import Reactor
from mesh.reactor.tcp import socket_address
from mesh.testing import traffic
from mesh.testing.ca import FakeCa
from mesh.testing.envoy import running_client, running_server
from mesh.testing.proxies import EgressProxy, IngressProxy, tcp_listener
from mesh.tls.bundle import CertificateBundle
from mesh.tls.contexts import hbone_context

LOOPBACK: Final = parse_ip("127.0.0.1")
WARM_UP: Final = 20
FIGURE: Final = "relay"
ROUNDS: Final = 3
GIGABYTES: Final = 1.0
CONNECTIONS: Final = 500
TRIPS: Final = 2000


@dataclass(frozen=True, slots=True)
class Pair:
    """Two running proxies: where clients connect, and the processes whose CPU counts."""

    name: str
    entry: SocketAddress
    pids: tuple[int, ...]


def measure(say: Say) -> list[Row]:
    """A row for each task and pair."""
    blocks = int(GIGABYTES * 1e9) // traffic.BLOCK
    tasks: dict[str, Callable[[str, int], object]] = {
        f"{GIGABYTES:g} GB to the server": lambda host, port: traffic.upload(host, port, blocks),
        f"{GIGABYTES:g} GB to the client": lambda host, port: traffic.download(host, port, blocks),
        f"{CONNECTIONS} short connections": lambda host, port: traffic.short(host, port, CONNECTIONS),
        f"{TRIPS} round trips of 100 B": lambda host, port: traffic.trips(host, port, TRIPS),
    }
    bundle = FakeCa().issue(SpiffeId("cluster.local", "bench", "proxy"))
    record = Record(FIGURE)
    with ExitStack() as stack:
        listener = stack.enter_context(traffic.listen(0, str(LOOPBACK)))
        stack.enter_context(_processes((traffic.serve, (listener,))))
        target = socket_address(listener.getsockname())
        pairs = (stack.enter_context(mesh_pair(target, bundle)), stack.enter_context(envoy_pair(target, bundle)))
        for pair in pairs:
            traffic.short(str(pair.entry.ip), pair.entry.port, WARM_UP)
        for number in range(ROUNDS):
            say(f"round {number + 1} of {ROUNDS}")
            for title, task in tasks.items():
                for pair in pairs:
                    cpu, _ = measured(pair.pids, partial(task, str(pair.entry.ip), pair.entry.port))
                    record.add(title, "cpu s", pair.name, cpu)
    return record.rows()


@contextmanager
def mesh_pair(target: SocketAddress, bundle: CertificateBundle) -> Iterator[Pair]:
    """Our two proxies, each a process."""
    with tcp_listener() as inner, tcp_listener() as outer:
        peer = socket_address(inner.getsockname())
        with _processes((_run_ingress, (inner, bundle)), (_run_egress, (outer, bundle, peer, str(target)))) as pids:
            yield Pair(OURS, socket_address(outer.getsockname()), pids)


@contextmanager
def envoy_pair(target: SocketAddress, bundle: CertificateBundle) -> Iterator[Pair]:
    """Two Envoys doing the same."""
    with running_server(bundle) as server, running_client(bundle, server.address, str(target)) as client:
        yield Pair(ENVOY, client.address, (client.pid, server.pid))


@contextmanager
def _processes(*calls: tuple[Callable[..., None], tuple[object, ...]]) -> Iterator[tuple[int, ...]]:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=target, args=args, daemon=True) for target, args in calls]
    for process in processes:
        process.start()
    try:
        yield tuple(process.pid or 0 for process in processes)
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _run_ingress(listener: socket.socket, bundle: CertificateBundle) -> None:
    _run_proxy(lambda reactor: IngressProxy(reactor, listener, hbone_context(bundle)))


def _run_egress(listener: socket.socket, bundle: CertificateBundle, peer: SocketAddress, authority: str) -> None:
    _run_proxy(lambda reactor: EgressProxy(reactor, listener, hbone_context(bundle), peer, authority))


def _run_proxy(start: Callable[[Reactor], EgressProxy | IngressProxy]) -> None:
    async def main() -> None:
        start(reactor)
        await trio.sleep_forever()

    reactor = Reactor()
    reactor.run(main)

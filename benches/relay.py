"""CPU that two proxies in series spend on traffic: client, egress, mutual TLS HBONE over loopback, ingress, server.

    python benches/relay.py [mesh] [envoy] [--gb 1] [--connections 500] [--round-trips 2000] [--rounds 3]

Each figure is CPU time (user and system, all threads) of both proxies together, the smallest of the rounds. Kinds named together run
in turns, so that a noisy machine is as noisy to one as to the other. ``mesh`` is the bare data path of `mesh.testing.proxies`: no
policy, capture or log. Nothing leaves the loopback interface.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from mesh.model.address import SocketAddress, parse_ip
from mesh.model.identity import SpiffeId
from mesh.reactor.loop import Reactor
from mesh.testing.ca import FakeCa
from mesh.testing.envoy import running_client, running_server
from mesh.testing.proxies import EgressProxy, IngressProxy, tcp_listener
from mesh.tls.bundle import CertificateBundle
from mesh.tls.contexts import client_context, server_context

LOOPBACK = parse_ip("127.0.0.1")
BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class Pair:
    """Two running proxies: where clients connect, and the processes whose CPU counts."""

    entry: SocketAddress
    pids: tuple[int, ...]

    def cpu(self) -> float:
        """Seconds of CPU both have used so far."""
        return sum(process_cpu(pid) for pid in self.pids)


def process_cpu(pid: int) -> float:
    """Seconds, user and system, of all threads alive (schedstat counts nanoseconds, stat only ticks of 10 ms)."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            total += int((task / "schedstat").read_text().split()[0])
        except (FileNotFoundError, ProcessLookupError):
            continue
    return total / 1e9


# --- the proxies


def run_proxy(start: Callable[[Reactor], EgressProxy | IngressProxy]) -> None:
    """Run one proxy until the process is terminated."""

    async def main() -> None:
        start(reactor)
        await trio.sleep_forever()

    reactor = Reactor()
    reactor.run(main)


def run_ingress(listener: socket.socket, bundle: CertificateBundle) -> None:
    run_proxy(lambda reactor: IngressProxy(reactor, listener, server_context(bundle)))


def run_egress(listener: socket.socket, bundle: CertificateBundle, peer: SocketAddress, authority: str) -> None:
    run_proxy(lambda reactor: EgressProxy(reactor, listener, client_context(bundle), peer, authority))


@contextmanager
def mesh_pair(target: SocketAddress, bundle: CertificateBundle) -> Iterator[Pair]:
    """Our two proxies, each a process."""
    with tcp_listener() as inner, tcp_listener() as outer:
        peer = SocketAddress(LOOPBACK, inner.getsockname()[1])
        context = multiprocessing.get_context("fork")
        processes = [
            context.Process(target=run_ingress, args=(inner, bundle), daemon=True),
            context.Process(target=run_egress, args=(outer, bundle, peer, str(target)), daemon=True),
        ]
        for process in processes:
            process.start()
        try:
            yield Pair(SocketAddress(LOOPBACK, outer.getsockname()[1]), tuple(process.pid or 0 for process in processes))
        finally:
            for process in processes:
                process.terminate()
                process.join()


@contextmanager
def envoy_pair(target: SocketAddress, bundle: CertificateBundle) -> Iterator[Pair]:
    """Two Envoys doing the same."""
    with running_server(bundle) as server, running_client(bundle, server.address, str(target)) as client:
        yield Pair(client.address, (client.pid, server.pid))


PAIRS = {"mesh": mesh_pair, "envoy": envoy_pair}


# --- the ends


def serve(listener: socket.socket) -> None:
    """A server process: the first byte of a connection says what it does with it (sink, source or echo)."""
    while True:
        sock, _ = listener.accept()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=serve_one, args=(sock,), daemon=True).start()


def serve_one(sock: socket.socket) -> None:
    buffer = bytearray(BLOCK)
    with sock:
        command = sock.recv(1)
        if command == b"u":
            while sock.recv_into(buffer):
                pass
            sock.sendall(b".")
        elif command == b"d":
            for _ in range(int.from_bytes(sock.recv(4))):
                sock.sendall(buffer)
            sock.recv(1)  # the client ends
        else:
            while size := sock.recv_into(buffer):
                sock.sendall(memoryview(buffer)[:size])


def dial(entry: SocketAddress) -> socket.socket:
    sock = socket.create_connection((str(entry.ip), entry.port))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def upload(entry: SocketAddress, blocks: int) -> None:
    block = bytes(BLOCK)
    with dial(entry) as sock:
        sock.sendall(b"u")
        for _ in range(blocks):
            sock.sendall(block)
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(1) == b"."


def download(entry: SocketAddress, blocks: int) -> None:
    buffer, total = bytearray(BLOCK), 0
    with dial(entry) as sock:
        sock.sendall(b"d" + blocks.to_bytes(4))
        while total < blocks * BLOCK and (size := sock.recv_into(buffer)):
            total += size
    assert total == blocks * BLOCK


def short_connections(entry: SocketAddress, count: int) -> None:
    for _ in range(count):
        with dial(entry) as sock:
            sock.sendall(b"ehello")
            assert sock.recv(100) == b"hello"


def round_trips(entry: SocketAddress, count: int) -> float:
    """Returns the median in seconds."""
    message, times = b"x" * 100, []
    with dial(entry) as sock:
        sock.sendall(b"e")
        for _ in range(count):
            start = time.perf_counter()
            sock.sendall(message)
            assert len(sock.recv(200)) == 100
            times.append(time.perf_counter() - start)
    return statistics.median(times)


@dataclass(frozen=True, slots=True)
class Figures:
    """CPU seconds of both proxies, and what the client saw."""

    up: float
    down: float
    short: float
    trips: float
    up_rate: float
    short_rate: float
    median_trip: float


def measured(pair: Pair, work: Callable[[], object]) -> tuple[float, float, object]:
    """CPU seconds, wall seconds and result of ``work``."""
    cpu, wall = pair.cpu(), time.perf_counter()
    result = work()
    wall = time.perf_counter() - wall
    time.sleep(0.05)  # ends and credit are still on their way
    return pair.cpu() - cpu, wall, result


def one_round(pair: Pair, options: argparse.Namespace) -> Figures:
    short_connections(pair.entry, 20)  # the tunnel stands
    blocks = int(options.gb * 1e9) // BLOCK
    up, up_wall, _ = measured(pair, lambda: upload(pair.entry, blocks))
    down, _, _ = measured(pair, lambda: download(pair.entry, blocks))
    short, short_wall, _ = measured(pair, lambda: short_connections(pair.entry, options.connections))
    trips, _, median = measured(pair, lambda: round_trips(pair.entry, options.round_trips))
    assert isinstance(median, float)
    return Figures(up, down, short, trips, options.gb / up_wall, options.connections / short_wall, median)


def wait_for(pair: Pair) -> None:
    deadline = time.monotonic() + 20
    while True:
        try:
            short_connections(pair.entry, 1)
            return
        except (OSError, AssertionError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", default=["mesh"])
    parser.add_argument("--gb", type=float, default=1.0)
    parser.add_argument("--connections", type=int, default=500)
    parser.add_argument("--round-trips", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    bundle = FakeCa().issue(SpiffeId("cluster.local", "bench", "proxy"))
    rounds: dict[str, list[Figures]] = {kind: [] for kind in options.kinds}
    with tcp_listener() as listener:
        server = multiprocessing.get_context("fork").Process(target=serve, args=(listener,), daemon=True)
        server.start()
        target = SocketAddress(LOOPBACK, listener.getsockname()[1])
        try:
            with ExitStack() as stack:
                pairs = {kind: stack.enter_context(PAIRS[kind](target, bundle)) for kind in options.kinds}
                for pair in pairs.values():
                    wait_for(pair)
                for _ in range(options.rounds):
                    for kind, pair in pairs.items():
                        rounds[kind].append(one_round(pair, options))
        finally:
            server.terminate()
            server.join()
    report(rounds, options)


def report(rounds: dict[str, list[Figures]], options: argparse.Namespace) -> None:
    print(f"CPU of both proxies, best of {options.rounds}; {os.cpu_count()} CPUs")
    print(f"{'':8}{'up s/GB':>10}{'down s/GB':>11}{'ms/conn':>10}{'us/trip':>10}{'up GB/s':>10}{'conn/s':>9}{'p50 us':>9}")
    for kind, figures in rounds.items():
        up, down = (min(getattr(f, name) for f in figures) / options.gb for name in ("up", "down"))
        short = min(f.short for f in figures) / options.connections * 1e3
        trip = min(f.trips for f in figures) / options.round_trips * 1e6
        rate, conns = max(f.up_rate for f in figures), max(f.short_rate for f in figures)
        p50 = min(f.median_trip for f in figures) * 1e6
        print(f"{kind:8}{up:>10.2f}{down:>11.2f}{short:>10.3f}{trip:>10.1f}{rate:>10.2f}{conns:>9.0f}{p50:>9.0f}")


if __name__ == "__main__":
    main()

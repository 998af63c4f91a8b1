"""CPU time of the HBONE cores: DATA frames received and sent, header blocks written and read, a whole tunnel, a connection."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Final

from hpack import Encoder

from benches.rows import OURS, Record, Row
from benches.stage import Say
from mesh.wire.frames import FrameType, frame_header
from mesh.wire.hbone import HboneClient, HboneServer, TunnelData, TunnelRequested
from mesh.wire.headers import HeaderReader, HeaderWriter, parse_request
from mesh.wire.traceparent import new_traceparent

FIGURE: Final = "wire"
BAGGAGE: Final = "k8s.cluster.name=Kubernetes,k8s.namespace.name=default,k8s.deployment.name=client,service.name=client,service.version=v1"


def measure(say: Say) -> list[Row]:
    """A row for each operation."""
    works: dict[str, Callable[[], float]] = {
        "receive DATA of 16 KiB, whole in the buffer": lambda: receive_data(16 << 10),
        "receive DATA of 16 KiB, buffer ends amid frames": lambda: receive_data(16 << 10, portion=100_000),
        "receive DATA of 1 MiB, in reads of 256 KiB": lambda: receive_data(1 << 20, portion=256 << 10),
        "receive DATA of 100 B": lambda: receive_data(100),
        "header of a DATA frame to send": send_data,
        "write a CONNECT's header block": write_block,
        "read and check a CONNECT's header block": read_block,
        "read and check one of a foreign peer (indexed, Huffman)": read_foreign_block,
        "a tunnel's life, both ends, no payload": tunnel,
        "a connection's beginning, both ends": connection,
    }
    record = Record(FIGURE)
    for name, work in works.items():
        say(name)
        record.add(name, "cpu us", OURS, work() * 1e6)
    return record.rows()


def _seconds_each(work: Callable[[], int], budget: float = 0.5) -> float:
    """CPU seconds per item: ``work`` does some items and says how many. The best of several rounds: others share the machine."""
    best = float("inf")
    deadline = time.process_time() + budget
    while time.process_time() < deadline:
        started = time.process_time()
        done = work()
        best = min(best, (time.process_time() - started) / done)
    return best


def _open_pair() -> tuple[HboneClient, HboneServer, int]:
    client, server = HboneClient(now=time.monotonic), HboneServer(now=time.monotonic)
    stream = client.request_tunnel("10.0.0.1:80", _headers(random.Random(0)))
    server.receive(memoryview(client.take_outgoing()))
    server.accept(stream, {"baggage": BAGGAGE})
    client.receive(memoryview(server.take_outgoing()))
    server.receive(memoryview(client.take_outgoing()))
    return client, server, stream


def _headers(rng: random.Random) -> dict[str, str]:
    forwarded = f'for="10.79.0.11:{rng.randrange(1024, 65536)}";host=server.default.svc.cluster.local'
    return {"baggage": BAGGAGE, "forwarded": forwarded, "traceparent": new_traceparent(rng)}


def receive_data(length: int, portion: int | None = None) -> float:
    _, server, stream = _open_pair()
    frames = 64 if length < 1 << 20 else 4
    wire = memoryview((frame_header(length, FrameType.DATA, 0, stream) + bytes(length)) * frames)
    step = portion or len(wire)

    def work() -> int:
        for _ in range(10):
            for at in range(0, len(wire), step):
                for event in server.receive(wire[at : at + step]):
                    assert type(event) is TunnelData
                    server.consumed(stream, len(event.data))
                server.take_outgoing()
        return 10 * frames

    return _seconds_each(work)


def send_data() -> float:
    client, _, stream = _open_pair()

    def work() -> int:
        header = client.data_header
        for _ in range(100):
            header(stream, 100)
        client.on_window_update(0, 10_000)  # what the peer would give back
        client.on_window_update(stream, 10_000)
        return 100

    return _seconds_each(work)


def _blocks(number: int) -> list[dict[str, str]]:
    rng = random.Random(1)
    return [_headers(rng) for _ in range(number)]


def write_block() -> float:
    writer = HeaderWriter()
    headers = _blocks(100)

    def work() -> int:
        for each in headers:
            writer.request("10.79.0.12:8080", each)
        return len(headers)

    return _seconds_each(work)


def read_block() -> float:
    writer, reader = HeaderWriter(), HeaderReader(65536)
    reader.read(writer.request("10.79.0.12:8080", _blocks(1)[0]))
    blocks = [writer.request("10.79.0.12:8080", each) for each in _blocks(100)]
    return _read(reader, blocks)


def read_foreign_block() -> float:
    """As ztunnel's h2 writes them: everything into the table, Huffman-coded."""
    encoder, reader = Encoder(), HeaderReader(65536)
    blocks = [encoder.encode([(":method", "CONNECT"), (":authority", "10.79.0.12:8080"), *each.items()]) for each in _blocks(1000)]
    return _read(reader, blocks)


def _read(reader: HeaderReader, blocks: list[bytes]) -> float:
    def work() -> int:
        for block in blocks:
            parse_request(reader.read(block))
        return len(blocks)

    return _seconds_each(work)


def tunnel() -> float:
    client, server, _ = _open_pair()
    headers = _blocks(100)
    answer = {"baggage": BAGGAGE}

    def work() -> int:
        for each in headers:
            stream = client.request_tunnel("10.79.0.12:8080", each)
            for event in server.receive(memoryview(client.take_outgoing())):
                if type(event) is TunnelRequested:
                    server.accept(event.stream, answer)
            client.receive(memoryview(server.take_outgoing()))
            client.end(stream)
            server.end(stream)
            server.receive(memoryview(client.take_outgoing()))
            client.receive(memoryview(server.take_outgoing()))
        return len(headers)

    return _seconds_each(work)


def connection() -> float:
    def work() -> int:
        for _ in range(10):
            client, server = HboneClient(now=time.monotonic), HboneServer(now=time.monotonic)
            server.receive(memoryview(client.take_outgoing()))
            client.receive(memoryview(server.take_outgoing()))
            server.receive(memoryview(client.take_outgoing()))
        return 10

    return _seconds_each(work)

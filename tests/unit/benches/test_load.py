"""The load against its own server, with nothing between."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benches import load
from benches.cpu import cpu_seconds, descriptors, proportional_kib, resident_kib


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with serving(str(Path(load.__file__))) as port:
        yield port


@contextmanager
def serving(*program: str) -> Iterator[int]:
    """A server of the load; its port."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        free: int = probe.getsockname()[1]
    process = subprocess.Popen([sys.executable, *program, "serve", str(free)])
    while True:
        try:
            socket.create_connection(("127.0.0.1", free)).close()
            break
        except ConnectionRefusedError:
            assert process.poll() is None
    yield free
    process.kill()
    process.wait()


@pytest.mark.parametrize(("up", "down"), [(3_000_001, 0), (0, 3_000_001), (2_000_000, 1_000_001), (1, 1)])
def test_bulk_moves_all_bytes_both_ways(port: int, up: int, down: int) -> None:
    assert load.Client().bulk("127.0.0.1", port, 3, up, down)["seconds"] > 0


def test_connections_are_counted_and_held_until_they_are_let_go(port: int) -> None:
    client = load.Client()
    client.connect("127.0.0.1", port, 40, 7)
    before = descriptors([os.getpid()])
    client.hold("127.0.0.1", port, 30, 7)
    assert descriptors([os.getpid()]) == before + 30
    client.release()
    assert descriptors([os.getpid()]) == before


def test_round_trips_are_paced_or_saturate(port: int) -> None:
    paced = load.Client().trips("127.0.0.1", port, 1, 0.1, 100)
    assert paced["trips"] == 10
    saturated = load.Client().trips("127.0.0.1", port, 5, 0.05, 0)
    assert saturated["trips"] >= 5
    assert 0 < saturated["p50"] <= saturated["p99"] <= saturated["p999"]


def test_a_crowd_moves_bytes_for_as_long_as_asked_and_leaves_nothing(port: int) -> None:
    before = descriptors([os.getpid()])
    assert load.Client().crowd("127.0.0.1", port, 0.05)["bytes"] > 0
    assert descriptors([os.getpid()]) == before


def test_a_server_that_hangs_up_is_an_error_and_no_figure() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)
        client = subprocess.Popen(
            [sys.executable, str(Path(load.__file__)), "work"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert client.stdin is not None
        client.stdin.write(f'{{"do": "connect", "host": "127.0.0.1", "port": {listener.getsockname()[1]}, "count": 1, "parallel": 1}}\n')
        client.stdin.flush()
        listener.accept()[0].close()
        answer, _ = client.communicate(timeout=30)
        assert "error" in answer


@pytest.mark.parametrize(("flags", "answers", "fine"), [(0x8180, 1, True), (0x8183, 0, False), (0x8180, 0, False)])
def test_only_an_answer_with_an_address_counts(flags: int, answers: int, fine: bool) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        server.settimeout(10)

        def answer() -> None:
            for _ in range(3):
                query, client = server.recvfrom(512)
                assert query[12:].startswith(b"\3web\4shop\0")
                server.sendto(query[:2] + struct.pack("!5H", flags, 1, answers, 0, 0) + query[12:], client)

        thread = threading.Thread(target=answer)
        thread.start()
        port = server.getsockname()[1]
        if fine:
            load.Client().look_up("127.0.0.1", port, "web.shop", 3, 3)
        else:
            with pytest.raises(ConnectionError, match="answer with code"):
                load.Client().look_up("127.0.0.1", port, "web.shop", 3, 3)
        thread.join()


def test_cpu_of_a_process_counts_what_it_does() -> None:
    before = cpu_seconds([os.getpid()])
    sum(range(300_000))
    assert cpu_seconds([os.getpid()]) > before


def test_memory_that_is_shared_counts_in_part() -> None:
    assert 0 < proportional_kib([os.getpid()]) <= resident_kib(os.getpid())

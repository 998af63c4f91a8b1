"""Byte streams over every carrier, against a real socket at the far end."""

from __future__ import annotations

import hashlib
import os
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from mesh.testing.proxies import ReactorThread, open_descriptors, read_all, wait_until
from tests.unit.waypoint_py.stage import Wire
from tests.unit.waypoint_py.streams.conftest import (
    BUNDLE,
    Collector,
    Line,
    Pipe,
    python_server_context,
    tls_client_context,
    tls_that_stands,
)
from waypoint_py.stream import HIGH_WATER, LOW_WATER
from waypoint_py.streams.tls import TRUNCATED, TlsStream
from waypoint_py.tcp import TcpProxy, _Side

MIB = 1 << 20
WINDOW = 4 * MIB


def in_background(stack: ExitStack, fn: Callable[[], object]) -> None:
    thread = threading.Thread(target=fn, daemon=True)
    thread.start()
    stack.callback(thread.join, 20)


def send_and_end(sock: socket.socket, data: bytes) -> None:
    sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)


def close_with_reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def exactly(sock: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = sock.recv(size - len(data))
        assert piece, f"end after {len(data)} of {size} bytes"
        data += piece
    return bytes(data)


def test_bytes_go_both_ways_and_both_ends_close_it(line: Line) -> None:
    sink = line.attach()
    line.write(b"hello")
    assert exactly(line.far, 5) == b"hello"
    line.far.sendall(b"there")
    wait_until(lambda: sink.received == b"there", "the answer")
    line.end()
    assert line.far.recv(1) == b""
    line.far.close()
    sink.wait_for("closed")
    assert sink.events == ["data", "ended", "closed"]
    assert sink.reason is None


@pytest.mark.parametrize("size", [1, 16 * 1024, 256 * 1024 - 9, 256 * 1024, 256 * 1024 + 1, 600_000])
def test_an_end_sent_together_with_data_comes_after_it(line: Line, size: int) -> None:
    data = os.urandom(size)
    sink = line.attach()
    with ExitStack() as stack:
        in_background(stack, lambda: send_and_end(line.far, data))
        sink.wait_for("ended")
    assert sink.received == data
    assert sink.events == ["data", "ended"]


@pytest.mark.parametrize("size", [0, 1, 100_000, 3 * MIB])
def test_our_end_leaves_the_other_direction_open(line: Line, size: int) -> None:
    data = os.urandom(size)
    sink = line.attach()
    line.do(lambda: (line.stream.write(data), line.stream.end(), line.stream.end()))
    assert read_all(line.far) == data
    for word in (b"still", b"here"):
        line.far.sendall(word)
        wait_until(lambda word=word: sink.received.endswith(word), "a word after our end")
    assert "ended" not in sink.events
    line.far.close()
    sink.wait_for("closed")
    assert sink.reason is None


@pytest.mark.parametrize("size", [0, 1, 100_000, 3 * MIB])
def test_the_peers_end_leaves_our_direction_open(line: Line, size: int) -> None:
    sink = line.attach()
    line.far.shutdown(socket.SHUT_WR)
    sink.wait_for("ended")
    data = os.urandom(size)
    line.write(b"late")
    assert exactly(line.far, 4) == b"late"
    line.do(lambda: (line.stream.write(data), line.stream.end()))
    assert read_all(line.far) == data
    sink.wait_for("closed")
    assert [event for event in sink.events if event != "drained"] == ["ended", "closed"]
    assert sink.reason is None


def test_both_ends_at_the_same_moment(line: Line) -> None:
    sink = line.attach()
    line.far.sendall(b"a" * 1000)
    line.do(lambda: (line.stream.write(b"b" * 1000), line.stream.end()))
    line.far.shutdown(socket.SHUT_WR)
    assert read_all(line.far) == b"b" * 1000
    sink.wait_for("closed")
    assert sink.received == b"a" * 1000
    assert sink.events == ["data", "ended", "closed"]


def test_bulk_in_both_directions_at_once_arrives_whole(line: Line) -> None:
    """With a writer that keeps to the water marks."""
    up, down = os.urandom(MIB) * 24, os.urandom(MIB) * 17
    sink, left, most = line.sink, memoryview(up), 0

    def write_on() -> None:
        nonlocal left, most
        while left and line.stream.unsent <= HIGH_WATER:
            line.stream.write(left[:100_000])
            left = left[100_000:]
            most = max(most, line.stream.unsent)
        if not left:
            line.stream.end()

    sink.on_drained = write_on
    line.attach()
    with ExitStack() as stack:
        in_background(stack, lambda: send_and_end(line.far, down))
        line.do(write_on)
        assert hashlib.sha256(read_all(line.far)).digest() == hashlib.sha256(up).digest()
        sink.wait_for("closed")
    assert hashlib.sha256(sink.received).digest() == hashlib.sha256(down).digest()
    assert sink.reason is None
    assert most <= HIGH_WATER + 200_000


def test_what_one_turn_writes_leaves_together(open_line: Callable[[str], Line]) -> None:
    line = open_line("tcp")
    line.do(lambda: [line.stream.write(b"x" * 10) for _ in range(100)])
    assert len(line.far.recv(10_000)) == 1000


# --- back-pressure


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


def test_a_paused_stream_holds_its_peer_back_and_a_bounded_amount(line: Line) -> None:
    sink = line.attach()
    line.do(line.stream.pause)
    sent = send_until_held_back(line.far)
    assert sink.received == b""
    held = line.thread.call(lambda: len(line.stream._held))
    assert held <= WINDOW + MIB
    line.do(line.stream.resume)
    line.far.sendall(b"end")
    wait_until(lambda: len(sink.received) == sent + 3, "all that was sent")
    assert sink.received.endswith(b"end")


def test_a_sink_that_pauses_with_every_piece_gets_all_in_order(line: Line) -> None:
    data, sink = os.urandom(2 * MIB), line.sink
    after_pause: list[bool] = []
    paused = False

    def pause_a_while() -> None:
        nonlocal paused
        after_pause.append(paused)
        paused = True
        line.stream.pause()

        def go_on() -> None:
            nonlocal paused
            paused = False
            line.stream.resume()
            line.stream.resume()

        line.thread.reactor.call_later(0.0005, go_on)

    sink.on_data = pause_a_while
    line.attach()
    with ExitStack() as stack:
        in_background(stack, lambda: send_and_end(line.far, data))
        sink.wait_for("ended")
    assert sink.received == data
    assert True not in after_pause, "no byte came while it was paused"


def test_a_peer_that_reads_late_finds_all_and_drained_comes_once(line: Line) -> None:
    data = os.urandom(20 * MIB)
    sink = line.attach()
    line.write(data)
    assert line.unsent() > HIGH_WATER
    assert "drained" not in sink.events
    assert exactly(line.far, len(data)) == data
    sink.wait_for("drained")
    assert line.unsent() < LOW_WATER
    assert sink.events == ["drained"]


def test_nothing_is_drained_that_was_never_above_the_mark(line: Line) -> None:
    sink = line.attach()
    line.write(b"x" * LOW_WATER)
    assert len(exactly(line.far, LOW_WATER)) == LOW_WATER
    assert sink.events == []


def test_resuming_after_the_end_arrived_gives_the_data_first(line: Line) -> None:
    data = os.urandom(300_000)
    sink = line.attach()
    line.do(line.stream.pause)
    with ExitStack() as stack:
        in_background(stack, lambda: send_and_end(line.far, data))
        stack.close()
    line.do(line.stream.resume)
    sink.wait_for("ended")
    assert sink.received == data
    assert sink.events == ["data", "ended"]


def test_what_came_before_a_sink_is_attached_waits_for_it(line: Line) -> None:
    line.far.sendall(b"early")
    line.far.shutdown(socket.SHUT_WR)
    line.write(b"x")
    assert line.far.recv(1) == b"x"
    sink = line.attach()
    sink.wait_for("ended")
    assert sink.events == ["data", "ended"]
    assert sink.received == b"early"


def test_a_sink_that_replaces_another_gets_the_rest_and_hears_of_the_end(line: Line) -> None:
    first, second = line.attach(), Collector()
    first.on_data = lambda: line.stream.attach(second)
    with ExitStack() as stack:
        data = os.urandom(MIB)
        in_background(stack, lambda: send_and_end(line.far, data))
        second.wait_for("ended")
    assert first.received + second.received == data
    assert "ended" not in first.events
    third = Collector()
    line.do(lambda: line.stream.attach(third))
    third.wait_for("ended")
    assert third.events == ["ended"]


# --- resets


def test_a_reset_of_the_peer_closes_with_a_reason(line: Line) -> None:
    sink = line.attach()
    line.far.sendall(b"x")
    wait_until(lambda: sink.received == b"x", "a byte")
    close_with_reset(line.far)
    sink.wait_for("closed")
    assert sink.reason is not None
    assert "ended" not in sink.events


def test_a_reset_reaches_a_sink_that_is_paused(line: Line) -> None:
    sink = line.attach()
    line.do(line.stream.pause)
    line.far.sendall(b"x" * 1000)
    line.write(b"y")
    assert line.far.recv(1) == b"y"
    close_with_reset(line.far)
    sink.wait_for("closed")
    assert sink.events == ["closed"]
    assert sink.reason is not None


def test_a_reset_after_the_peers_end_still_closes_with_a_reason(line: Line) -> None:
    sink = line.attach()
    line.far.sendall(b"all")
    line.far.shutdown(socket.SHUT_WR)
    sink.wait_for("ended")
    close_with_reset(line.far)
    line.write(b"x")
    sink.wait_for("closed")
    assert sink.events == ["data", "ended", "closed"]
    assert sink.reason is not None


def test_aborting_resets_the_peer_and_tells_the_sink_soon(line: Line) -> None:
    sink = line.attach()

    def abort() -> None:
        line.stream.write(b"never heard of" * 100_000)
        line.stream.abort("tired of it")
        line.stream.abort("twice")
        assert sink.events == [], "not from within the call"

    line.do(abort)
    sink.wait_for("closed")
    assert sink.events == ["closed"]
    assert sink.reason == "tired of it"
    with pytest.raises(ConnectionResetError):
        read_all(line.far)
    for late in (
        lambda: line.stream.write(b"x"),
        line.stream.end,
        line.stream.pause,
        line.stream.resume,
        lambda: line.stream.abort("again"),
    ):
        line.do(late)
    assert sink.events == ["closed"]


def test_aborting_from_within_data_ends_delivery(line: Line) -> None:
    sink = line.sink
    sink.on_data = lambda: line.stream.abort("enough")
    line.attach()
    with ExitStack() as stack:

        def send() -> None:
            with pytest.raises(OSError, match=r"(?i)reset|broken pipe"):
                line.far.sendall(b"x" * (64 * MIB))

        in_background(stack, send)
        sink.wait_for("closed")
    assert sink.events == ["data", "closed"]
    assert sink.reason == "enough"


def test_whoever_counts_connections_hears_once_that_it_is_gone(line: Line) -> None:
    gone: list[int] = []

    def count() -> None:
        line.stream.on_gone = lambda: gone.append(1)

    line.do(count)
    line.do(lambda: line.stream.abort("nobody listened"))
    line.do(lambda: line.stream.abort("again"))
    assert gone == [1]


def test_a_sink_that_fails_loses_its_own_stream_alone(open_line: Callable[[str], Line]) -> None:
    for kind in ("tcp", "tunnel", "tls-in-tunnel"):
        line = open_line(kind)

        def fail() -> None:
            raise ValueError("a bug")

        line.sink.on_data = fail
        line.attach()
        line.far.sendall(b"x")
        line.sink.wait_for("closed")
        assert line.sink.reason is not None
        assert "a bug" in line.sink.reason
        assert len(line.thread.errors) == 1
        line.thread.errors.clear()


# --- many at once, and what is left of them


def test_a_storm_of_resets_leaves_nothing_behind(open_line: Callable[[str], Line]) -> None:
    before = open_descriptors()
    for number in range(30):
        line = open_line("tcp")
        sink = line.attach()
        line.write(b"x" * (number * 50_000))
        if number % 3 == 0:
            line.far.sendall(b"y" * 1000)
        close_with_reset(line.far)
        sink.wait_for("closed")
    assert open_descriptors() <= before + 5  # the loop itself


def test_streams_joined_by_a_pipe_pass_everything_on(open_line: Callable[[str], Line]) -> None:
    """A TCP proxy between every two carriers, with readers slow at both ends."""
    data, back = os.urandom(6 * MIB), os.urandom(5 * MIB)
    for one, other in (("tcp", "tunnel"), ("served-tunnel", "tls-in-tunnel"), ("served-tunnel", "tunnel")):
        client, server = open_line(one), open_line(other)
        client.do(lambda client=client, server=server: Pipe(client.stream, server.stream))
        with ExitStack() as stack:
            in_background(stack, lambda sock=client.far: send_and_end(sock, data))
            in_background(stack, lambda sock=server.far: send_and_end(sock, back))
            assert read_all(server.far) == data
            assert read_all(client.far) == back
        wait_until(lambda pair=(client, server): all(line.stream.over for line in pair), "both to be over")


# --- TLS of its own


@pytest.fixture
def carried() -> Iterator[tuple[ReactorThread, Wire, TlsStream]]:
    with tls_that_stands() as found:
        yield found


def test_room_is_told_after_plaintext_that_was_written_as_the_carrier_drained(
    carried: tuple[ReactorThread, Wire, TlsStream],
) -> None:
    """The carrier has room while as much waits to be sealed: who looks then finds none, and nobody would speak of it again."""
    thread, carrier, stream = carried
    unsent: list[int] = []
    sink = Collector()
    sink.on_drained = lambda: unsent.append(stream.unsent)
    thread.call(lambda: (stream.attach(sink), stream.write(bytes(HIGH_WATER + 1))))

    def write_while_it_drains() -> None:
        assert carrier.unsent > HIGH_WATER, "sealed, and the carrier's"
        stream.write(bytes(2 * LOW_WATER))
        carrier.read(carrier.unsent - LOW_WATER + 1)
        assert unsent == [], "what waits to be sealed is not gone"

    thread.call(write_while_it_drains)
    wait_until(lambda: bool(unsent), "word of the room")
    assert len(unsent) == 1
    assert LOW_WATER < unsent[0] <= HIGH_WATER
    assert thread.call(lambda: carrier.unsent) == unsent[0], "all was sealed"


def test_a_proxy_goes_on_when_tls_has_room_again_above_the_low_mark(carried: tuple[ReactorThread, Wire, TlsStream]) -> None:
    """The carrier was never above its mark, only both together: it will not speak of what it sends."""
    thread, carrier, stream = carried

    def begin() -> tuple[Wire, _Side]:
        source = Wire(thread.reactor)
        proxy = cast(TcpProxy, SimpleNamespace(moved=lambda _side, _size: None))
        down, up = _Side(proxy, source), _Side(proxy, stream)
        down.connect(up)
        up.connect(down)
        stream.attach(up)
        down.data(memoryview(bytes(HIGH_WATER - 2 * LOW_WATER)))
        return source, down

    source, down = thread.call(begin)

    def fill() -> None:
        assert carrier.unsent > HIGH_WATER - 2 * LOW_WATER, "sealed, and the carrier's"
        down.data(memoryview(bytes(2 * LOW_WATER + 1)))
        assert source.paused
        carrier.read(LOW_WATER)

    thread.call(fill)
    wait_until(lambda: not thread.call(lambda: source.paused), "the source to go on")
    assert LOW_WATER < thread.call(lambda: carrier.unsent) <= HIGH_WATER


def accept_tls(sock: socket.socket, context: ssl.SSLContext) -> ssl.SSLSocket:
    sock.settimeout(10)
    return context.wrap_socket(sock, server_side=True)


def tls_over(line: Line, outcomes: list[str | None], **options: object) -> TlsStream:
    def start() -> TlsStream:
        stream = TlsStream(line.thread.reactor, line.stream, tls_client_context(BUNDLE), outcomes.append, **options)
        stream.attach(line.sink)
        return stream

    return line.thread.call(start)


def test_another_implementation_of_tls_is_understood(open_line: Callable[[str], Line], tmp_path: Path) -> None:
    for kind in ("tcp", "tunnel"):
        line, outcomes = open_line(kind), list[str | None]()
        stream = tls_over(line, outcomes)
        line.do(lambda stream=stream: stream.write(b"before it stands"))
        server = accept_tls(line.far, python_server_context(BUNDLE, str(tmp_path)))
        assert server.recv(100) == b"before it stands"
        data = os.urandom(MIB)
        server.sendall(data)
        wait_until(lambda line=line: len(line.sink.received) == MIB, "a megabyte")
        assert line.sink.received == data
        assert outcomes == [None]
        line.do(stream.end)
        server.unwrap()
        server.close()
        line.sink.wait_for("closed")
        assert line.sink.events == ["data", "ended", "closed"]
        assert line.sink.reason is None


def test_an_end_without_close_notify_is_a_truncation(open_line: Callable[[str], Line], tmp_path: Path) -> None:
    line, outcomes = open_line("tcp"), list[str | None]()
    tls_over(line, outcomes)
    server = accept_tls(line.far, python_server_context(BUNDLE, str(tmp_path)))
    server.sendall(b"HTTP/1.0 200 OK\r\n\r\nhalf of")
    wait_until(lambda: bool(line.sink.received), "data")
    os.close(server.detach())  # FIN alone
    line.sink.wait_for("closed")
    assert line.sink.reason == TRUNCATED
    assert "ended" not in line.sink.events


def test_a_peer_that_speaks_no_tls_fails_the_handshake(open_line: Callable[[str], Line]) -> None:
    for said in (b"HTTP/1.1 400 Bad Request\r\n\r\n", b""):
        line, outcomes = open_line("tcp"), list[str | None]()
        tls_over(line, outcomes)
        line.far.recv(10_000)
        send_and_end(line.far, said)
        line.sink.wait_for("closed")
        (reason,) = outcomes
        assert reason is not None
        assert reason.startswith("tls handshake error: ")
        assert line.sink.events == ["closed"]


def test_a_refused_certificate_is_told_to_the_peer(open_line: Callable[[str], Line], tmp_path: Path) -> None:
    line, outcomes = open_line("tunnel"), list[str | None]()
    tls_over(line, outcomes, verify_peer=lambda _der: "not who was wanted")
    with pytest.raises(ssl.SSLError, match=r"(?i)alert"):
        accept_tls(line.far, python_server_context(BUNDLE, str(tmp_path))).recv(1)
    line.sink.wait_for("closed")
    assert outcomes == ["tls handshake error: not who was wanted"]


def test_aborting_within_the_handshake_is_told_once(open_line: Callable[[str], Line]) -> None:
    line, outcomes = open_line("tcp"), list[str | None]()
    stream = tls_over(line, outcomes)
    line.far.recv(10_000)
    line.do(lambda: stream.abort("too slow"))
    line.sink.wait_for("closed")
    assert outcomes == ["too slow"]
    assert line.sink.reason == "too slow"


def test_tls_in_two_tunnels_of_one_link_does_not_mix_their_bytes(open_line: Callable[[str], Line]) -> None:
    """The link hands out what one read of it brought, tunnel after tunnel, while TLS within the first one decrypts."""
    lines = [open_line("tls-in-tunnel") for _ in range(2)]
    data = [os.urandom(3 * MIB) for _ in lines]
    with ExitStack() as stack:
        for line, noise in zip(lines, data, strict=True):
            line.attach()
            in_background(stack, lambda line=line, noise=noise: send_and_end(line.far, noise))
        for line, noise in zip(lines, data, strict=True):
            line.sink.wait_for("ended")
            assert hashlib.sha256(line.sink.received).digest() == hashlib.sha256(noise).digest()

"""The HBONE cores under bytes that nobody meant: they raise RemoteProtocolError or nothing, and their accounts stay right."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
from hpack import Encoder
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mesh.testing.hbone import StoppedClock, deliver, joined
from mesh.wire.errors import RemoteProtocolError
from mesh.wire.frames import PREFACE, FrameType, frame_header, header_frames, window_update_frame
from mesh.wire.hbone import (
    HboneClient,
    HboneConnection,
    HboneEvent,
    HboneServer,
    Limits,
    TunnelData,
    TunnelEnded,
    TunnelRequested,
    TunnelReset,
    TunnelResponded,
    WindowOpened,
)
from tests.property.http2_frames import frames, mutated

SETTINGS = frame_header(0, FrameType.SETTINGS, 0, 0)


def new_server() -> HboneServer:
    return HboneServer(now=StoppedClock())


def new_client() -> HboneClient:
    """With tunnels requested, so that there is something to answer."""
    client = HboneClient(now=StoppedClock())
    for _ in range(4):
        client.request_tunnel("10.0.0.1:80", {"baggage": "a=b"})
    return client


# --- streams of frames, mostly sensible ---------------------------------------------------------------------------------------------------

_FIELDS = [
    [(":method", "CONNECT"), (":authority", "10.0.0.1:80")],
    [(":method", "CONNECT"), (":authority", "a.b:80"), ("baggage", "service.name=x"), ("forwarded", 'for="1.2.3.4:5"')],
    [(":method", "GET"), (":scheme", "https"), (":path", "/"), (":authority", "x")],
    [(":method", "CONNECT")],
    [(":status", "200"), ("baggage", "service.name=x")],
    [(":status", "200")],
    [(":status", "100")],
    [(":status", "503")],
    [("checksum", "1")],
    [("Upper", "x"), ("connection", "close")],
]


def run(core: HboneConnection, wire: bytes, cuts: list[int]) -> tuple[list[HboneEvent], bytes, str | None]:
    """Everything a core makes of bytes cut at ``cuts``: events, outgoing bytes, and the reason it gave up."""
    events: list[HboneEvent] = []
    edges = [0, *sorted(cuts), len(wire)]
    failure = None
    for start, end in itertools.pairwise(edges):
        try:
            events += deliver(core, wire[start:end])
        except RemoteProtocolError as exc:
            failure = f"{exc.code}: {exc.reason}"
            break
    return joined(events), core.take_outgoing(), failure


def opening(*fields: tuple[str, str]) -> bytes:
    """HEADERS on streams 1 and 3 that touch no table, so that any encoder may go on after them."""
    block = Encoder().encode([(name, value, True) for name, value in fields])
    return b"".join(header_frames(stream, block, end_stream=False, max_frame_size=16384) for stream in (1, 3))


CORES = pytest.mark.parametrize(
    ("core", "start"),
    [(new_server, PREFACE + SETTINGS + opening(*_FIELDS[0])), (new_client, SETTINGS + opening((":status", "200")))],
    ids=["server", "client"],
)
FRAMES = frames(_FIELDS)
WIRES = FRAMES.map(b"".join) | mutated(FRAMES)
New = Callable[[], HboneConnection]


@CORES
@given(wire=st.binary(max_size=300))
def test_arbitrary_bytes_raise_nothing_but_the_protocol_error(core: New, start: bytes, wire: bytes) -> None:
    run(core(), wire, [])
    run(core(), start + wire, [])


@CORES
@settings(max_examples=400)
@given(wire=mutated(FRAMES))
def test_mutated_frames_raise_nothing_but_the_protocol_error(core: New, start: bytes, wire: bytes) -> None:
    run(core(), start + wire, [])


@CORES
@settings(max_examples=300)
@given(wire=WIRES, data=st.data())
def test_however_bytes_are_cut_they_mean_the_same(core: New, start: bytes, wire: bytes, data: st.DataObject) -> None:
    wire = start + wire
    cuts = data.draw(st.lists(st.integers(0, len(wire)), max_size=20))
    whole_events, whole_outgoing, whole_failure = run(core(), wire, [])
    cut_events, cut_outgoing, cut_failure = run(core(), wire, cuts)
    assert cut_failure == whole_failure
    assert cut_outgoing == whole_outgoing
    if whole_failure is None:
        assert cut_events == whole_events


@CORES
@given(wire=WIRES)
def test_byte_by_byte_is_one_way_of_cutting(core: New, start: bytes, wire: bytes) -> None:
    wire = start + wire
    events, outgoing, failure = run(core(), wire, [])
    slow_events, slow_outgoing, slow_failure = run(core(), wire, list(range(len(wire))))
    assert (slow_outgoing, slow_failure) == (outgoing, failure)
    if failure is None:
        assert slow_events == events


@CORES
@settings(max_examples=300)
@given(wire=FRAMES)
def test_events_keep_the_order_of_a_tunnels_life(core: New, start: bytes, wire: list[bytes]) -> None:
    """Request or response, payload, one end: for every stream, whatever the peer sends."""
    connection = core()
    started = {1, 3}
    closed: set[int] = set()
    reset: set[int] = set()
    deliver(connection, start)
    for frame in wire:
        try:
            events = deliver(connection, frame)
        except RemoteProtocolError:
            return
        for event in events:
            match event:
                case TunnelRequested(stream=stream) | TunnelResponded(stream=stream):
                    assert stream not in started | closed | reset
                    started.add(stream)
                case TunnelData(stream=stream, data=payload):
                    assert stream in started - closed - reset
                    assert len(payload) > 0
                case TunnelEnded(stream=stream):
                    assert stream in started - closed - reset
                    closed.add(stream)
                case TunnelReset(stream=stream):
                    assert stream not in reset
                    reset.add(stream)
                    assert connection.sendable(stream) == 0
                case _:
                    pass


@given(seed=st.integers(0, 2**32), sizes=st.lists(st.integers(1, 40_000), max_size=15), window=st.integers(1000, 100_000))
def test_payload_arrives_whole_through_any_window(seed: int, sizes: list[int], window: int) -> None:
    clock = StoppedClock()
    client = HboneClient(now=clock)
    server = HboneServer(now=clock, limits=Limits(stream_window=window, connection_window=70_000))
    rng = random.Random(seed)

    def settle() -> list[HboneEvent]:
        seen: list[HboneEvent] = []
        while (up := client.take_outgoing()) or (down := server.take_outgoing()):
            seen += deliver(server, up)
            deliver(client, server.take_outgoing() if up else down)
        return seen

    stream = client.request_tunnel("10.0.0.1:80", {})
    settle()
    server.accept(stream, {})
    settle()
    payload = rng.randbytes(sum(sizes))
    received = bytearray()
    sent = 0
    stalls = 0
    for size in sizes:
        end = sent + size
        while sent < end:
            room = min(client.sendable(stream), client.max_frame_size, end - sent)
            if room:
                wire = client.data_header(stream, room) + payload[sent : sent + room]
                sent += room
                for event in deliver(server, wire, [rng.randrange(len(wire))]):
                    assert isinstance(event, TunnelData)
                    received += event.data
                    server.consumed(stream, len(event.data))
                stalls = 0
            settle()
            stalls += 1
            assert stalls < 3, "the window never opened again"
    assert received == payload


# --- one frame that comes alone -----------------------------------------------------------------------------------------------------------

SMALL = Limits(stream_window=30_000, connection_window=65_535, max_frame_size=16384)
START = PREFACE + SETTINGS + opening(*_FIELDS[0])
_ALONE = st.builds(
    lambda stream, size: frame_header(size, FrameType.DATA, 0, stream) + bytes(size),
    st.sampled_from([1, 3] * 8 + [5]),
    st.sampled_from([1, 40, 7499, 7500, 16384] * 4 + [0, 16385]),
)
LONE_FRAMES = st.lists(_ALONE, min_size=1, max_size=12)
PIECES = st.one_of(
    LONE_FRAMES,
    st.lists(st.one_of(FRAMES.map(b"".join), LONE_FRAMES.map(b"".join)), max_size=6),
    st.lists(FRAMES, max_size=4).map(lambda several: [frame for each in several for frame in each]),
)


def accounts(core: HboneConnection) -> object:
    """What a core knows of windows and streams."""
    streams = [(each.id, each.receiving, each.sending, each.receive_window, each.owed, each.send_window) for each in core._streams.values()]
    return core._receive_window, core._send_window, core.active_streams, core.going_away, streams


@settings(max_examples=400, deadline=None)
@given(pieces=PIECES, cut=st.booleans(), data=st.data())
def test_a_frame_taken_alone_is_a_frame_received(pieces: list[bytes], cut: bool, data: st.DataObject) -> None:
    """A driver that asks `receive_lone_data` first, and one that never does: the same events, answers and credit, piece after piece."""
    quick, plain = (HboneServer(now=StoppedClock(), limits=SMALL) for _ in range(2))
    for core in (quick, plain):
        deliver(core, START)
        for stream in (1, 3):
            core.accept(stream, {})
        core.take_outgoing()
    wire = b"".join(pieces)
    edges = list(itertools.accumulate(map(len, pieces), initial=0))
    if cut and len(wire) > 1:
        edges = sorted({*edges, *data.draw(st.lists(st.integers(1, len(wire) - 1), max_size=4))})
    for start, end in itertools.pairwise(edges):
        piece = wire[start:end]
        buffer = memoryview(piece + b"what an earlier read left in the buffer")
        if data.draw(st.integers(0, 9)) == 0:
            hold = data.draw(st.booleans())
            quick.hold_credit(hold)
            plain.hold_credit(hold)
            assert quick.take_outgoing() == plain.take_outgoing()
        taken = quick.receive_lone_data(buffer, len(piece))
        quick_error = plain_error = None
        quick_events: list[HboneEvent] = []
        plain_events: list[HboneEvent] = []
        try:
            quick_events = deliver(quick, piece) if taken is None else [TunnelData(taken.id, buffer[9 : len(piece)])]
        except RemoteProtocolError as exc:
            quick_error = exc.code, exc.reason
        try:
            plain_events = deliver(plain, piece)
        except RemoteProtocolError as exc:
            plain_error = exc.code, exc.reason
        assert (quick_events, quick_error) == (plain_events, plain_error)
        if taken is not None:
            hypothesis.event("taken alone")
            assert not plain.outgoing, "what is taken alone calls for no answer"
        for each in plain_events:
            if isinstance(each, TunnelData):
                passed = data.draw(st.integers(0, len(each.data)))
                plain.consumed(each.stream, passed)
                if taken is None:
                    quick.consumed(each.stream, passed)
                else:
                    quick.consumed_at_once(taken, passed)
        assert quick.take_outgoing() == plain.take_outgoing()
        assert accounts(quick) == accounts(plain)
        if plain_error is not None:
            return


# --- flow control against a model ---------------------------------------------------------------------------------------------------------


class Accounts(RuleBasedStateMachine):
    """A client core and a bookkeeper who knows only what went over the wire: RFC 9113 section 5.2, in plain arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.client = HboneClient(now=StoppedClock(), limits=Limits(stream_window=1000, connection_window=65_535))
        self.encoder = Encoder()
        self.initial = 65_535
        self.connection = 65_535
        self.windows: dict[int, int] = {}
        self.may_send = 65_535  # the peer, on the connection
        self.may_send_on: dict[int, int] = {}
        self.waiting: dict[int, int] = {}

    @initialize()
    def greet(self) -> None:
        deliver(self.client, SETTINGS)
        self.read_credit()

    @precondition(lambda self: len(self.windows) < 5)
    @rule()
    def open(self) -> None:
        stream = self.client.request_tunnel("10.0.0.1:80", {})
        block = self.encoder.encode([(":status", "200")])
        deliver(self.client, header_frames(stream, block, end_stream=False, max_frame_size=16384))
        self.windows[stream] = self.initial
        self.may_send_on[stream] = 1000
        self.waiting[stream] = 0

    @precondition(lambda self: self.windows)
    @rule(data=st.data())
    def send(self, data: st.DataObject) -> None:
        stream = data.draw(st.sampled_from(sorted(self.windows)))
        allowed = self.client.sendable(stream)
        assert allowed == max(0, min(self.connection, self.windows[stream]))
        length = min(data.draw(st.integers(0, 70_000)), allowed, self.client.max_frame_size)
        if length:
            self.client.data_header(stream, length)
            self.connection -= length
            self.windows[stream] -= length

    @precondition(lambda self: self.windows)
    @rule(data=st.data(), increment=st.integers(1, 100_000))
    def widen(self, data: st.DataObject, increment: int) -> None:
        stream = data.draw(st.sampled_from([0, *sorted(self.windows)]))
        before = self.connection if stream == 0 else self.windows[stream]
        assume(before + increment < 2**31)
        events = deliver(self.client, window_update_frame(stream, increment))
        opened = [WindowOpened(stream or None)] if before <= 0 else []
        assert events == opened or (before + increment <= 0 and events == [])
        if stream == 0:
            self.connection += increment
        else:
            self.windows[stream] += increment

    @rule(size=st.integers(0, 200_000))
    def set_initial(self, size: int) -> None:
        deliver(self.client, frame_header(6, FrameType.SETTINGS, 0, 0) + b"\0\4" + size.to_bytes(4))
        for stream in self.windows:
            self.windows[stream] += size - self.initial
        self.initial = size

    @precondition(lambda self: self.windows)
    @rule(data=st.data(), padding=st.integers(-1, 255))
    def receive(self, data: st.DataObject, padding: int) -> None:
        stream = data.draw(st.sampled_from(sorted(self.windows)))
        overhead = padding + 1
        room = min(self.may_send, self.may_send_on[stream]) - overhead
        assume(room > 0)
        length = data.draw(st.integers(1, room))
        body = (bytes([padding]) if overhead else b"") + bytes(length) + bytes(max(0, padding))
        deliver(self.client, frame_header(len(body), FrameType.DATA, 8 if overhead else 0, stream) + body)
        self.may_send -= len(body)
        self.may_send_on[stream] -= len(body)
        self.waiting[stream] += length
        self.read_credit()

    @precondition(lambda self: any(self.waiting.values()))
    @rule(data=st.data())
    def consume(self, data: st.DataObject) -> None:
        stream = data.draw(st.sampled_from(sorted(stream for stream, waiting in self.waiting.items() if waiting)))
        length = data.draw(st.integers(1, self.waiting[stream]))
        self.client.consumed(stream, length)
        self.waiting[stream] -= length
        self.read_credit()

    @precondition(lambda self: self.windows)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        stream = data.draw(st.sampled_from(sorted(self.windows)))
        self.client.reset(stream)
        for account in (self.windows, self.may_send_on, self.waiting):
            del account[stream]

    def read_credit(self) -> None:
        """What our WINDOW_UPDATEs allow the peer."""
        outgoing = self.client.take_outgoing().removeprefix(PREFACE)
        while outgoing:
            length, kind = int.from_bytes(outgoing[:3]), outgoing[3]
            stream, payload = int.from_bytes(outgoing[5:9]), outgoing[9 : 9 + length]
            outgoing = outgoing[9 + length :]
            if kind == FrameType.WINDOW_UPDATE and stream == 0:
                self.may_send += int.from_bytes(payload)
            elif kind == FrameType.WINDOW_UPDATE and stream in self.may_send_on:
                self.may_send_on[stream] += int.from_bytes(payload)

    @invariant()
    def accounts_agree(self) -> None:
        for stream, window in self.windows.items():
            assert self.client.sendable(stream) == max(0, min(self.connection, window))
        assert 65_535 // 2 <= self.may_send <= 65_535
        for stream, window in self.may_send_on.items():
            assert 0 <= window <= 1000
            # Nothing is lost: what the peer may not send is waiting here, or held back until it makes a portion of a quarter.
            assert 0 <= 1000 - window - self.waiting[stream] < 250


TestAccounts: Any = Accounts.TestCase
TestAccounts.settings = settings(max_examples=150, stateful_step_count=40)

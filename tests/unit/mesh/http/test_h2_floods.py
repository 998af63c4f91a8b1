"""Floods by name: what costs a peer next to nothing ends its connection with the right code, and neither memory nor output grew meanwhile.

Memory is what `tracemalloc` sees, so that no container inside is forgotten. Output is counted as if the peer never read.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from itertools import count

import pytest

from mesh.http.codec import RefusedHead, RequestHead, ResponseHead
from mesh.http.h2 import MAX_BLOCK, MAX_COURTESY, MIN_STREAMS_TO_JUDGE, Http2Client
from mesh.http.message import Response
from mesh.http.options import ServerOptions
from mesh.testing.hbone import StoppedClock
from mesh.wire.errors import ErrorCode, LocalProtocolError, RemoteProtocolError
from mesh.wire.frames import (
    ACK,
    END_HEADERS,
    END_STREAM,
    MAX_WINDOW,
    PADDED,
    FrameType,
    frame_header,
    goaway_frame,
    rst_stream_frame,
    window_update_frame,
)
from mesh.wire.hbone.patience import CAPACITY, REFILL_PER_SECOND
from tests.unit.mesh.http.h2_peer import GET, POST, Peer, request

CALM = ErrorCode.ENHANCE_YOUR_CALM
ROOM = 512 * 1024
"""Bytes by which a flood may make a connection grow: heads of hundreds of small requests, and what the allocator does not give back."""

Frames = Callable[[Peer], Iterator[bytes]]


def frame(kind: FrameType | int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> bytes:
    return frame_header(len(payload), kind, flags, stream) + payload


def data(stream: int, payload: bytes = b"", flags: int = 0) -> bytes:
    return frame(FrameType.DATA, flags, stream, payload)


def always(piece: bytes) -> Frames:
    """The same again and again, beside one request that is under way (1) and one that is over (3)."""

    def frames(peer: Peer) -> Iterator[bytes]:
        peer.sends(peer.head(1, POST, end=False), peer.head(3, GET))
        peer.answers(3)
        peer.hears()
        while True:
            yield piece

    return frames


def each(make: Callable[[Peer, int], bytes], *, first: int = 1) -> Frames:
    """For one new stream after another."""

    def frames(peer: Peer) -> Iterator[bytes]:
        for stream in count(first, 2):
            yield make(peer, stream)

    return frames


def continuations(piece: bytes) -> Frames:
    def frames(peer: Peer) -> Iterator[bytes]:
        yield frame(FrameType.HEADERS, 0, 1, b"\x82\x86\x84")
        while True:
            yield frame(FrameType.CONTINUATION, 0, 1, piece)

    return frames


FLOODS: dict[str, tuple[int, Frames]] = {
    # The number is the most that may be taken at once, without any time passing.
    "rapid reset (CVE-2023-44487)": (
        MIN_STREAMS_TO_JUDGE,
        each(lambda peer, stream: peer.head(stream, GET) + rst_stream_frame(stream, ErrorCode.CANCEL)),
    ),
    "rapid reset of uploads": (
        MIN_STREAMS_TO_JUDGE,
        each(lambda peer, stream: peer.head(stream, POST, end=False) + data(stream, b"x") + rst_stream_frame(stream, ErrorCode.CANCEL)),
    ),
    "made to reset by WINDOW_UPDATE of 0 (CVE-2025-8671)": (
        201,
        each(lambda peer, stream: peer.head(stream, GET) + window_update_frame(stream, 0)),
    ),
    "made to reset by a window too wide": (
        201,
        each(lambda peer, stream: peer.head(stream, GET) + window_update_frame(stream, MAX_WINDOW)),
    ),
    "made to reset by DATA after the end": (201, each(lambda peer, stream: peer.head(stream, GET) + data(stream, b"x"))),
    "made to reset by HEADERS after the end": (201, each(lambda peer, stream: peer.head(stream, GET) * 2)),
    "made to reset by a body too long": (
        201,
        each(lambda peer, stream: peer.head(stream, [*POST, ("content-length", "0")], end=False) + data(stream, b"x")),
    ),
    "made to reset by a body too short": (
        201,
        each(lambda peer, stream: peer.head(stream, [*POST, ("content-length", "2")], end=False) + data(stream, b"x", END_STREAM)),
    ),
    "made to reset by bad trailers": (201, each(lambda peer, stream: peer.head(stream, POST, end=False) + peer.head(stream, [("X", "y")]))),
    "malformed requests": (201, each(lambda peer, stream: peer.head(stream, [*GET, ("connection", "close")]))),
    "headers without name and value (CVE-2019-9516)": (201, each(lambda peer, stream: peer.head(stream, [*GET, ("", "")]))),
    "refused requests": (401, each(lambda peer, stream: peer.head(stream, [*GET[:3], (":path", "/a b")]))),
    "CONTINUATION of nothing": (20, continuations(b"")),
    "CONTINUATION of a byte (CVE-2024-27316)": (20, continuations(b"\x84")),
    "CONTINUATION of what is never to end": (MAX_BLOCK // 16_384 + 2, continuations(b"\x00\x01a\x7f\x81\x7f" + bytes(16_378))),
    "SETTINGS (CVE-2019-9515)": (201, always(frame(FrameType.SETTINGS))),
    "SETTINGS full of what nobody knows": (201, always(frame(FrameType.SETTINGS, payload=b"\x77\x77\0\0\0\1" * 273))),
    "SETTINGS that resize the table": (201, always(frame(FrameType.SETTINGS, payload=b"\0\1\0\0\0\0\0\1\0\0\x10\0" * 136))),
    "acknowledgements of no SETTINGS": (201, always(frame(FrameType.SETTINGS, ACK))),
    "PING (CVE-2019-9512)": (2050, always(frame(FrameType.PING, payload=bytes(8)))),
    "answers to no PING": (2050, always(frame(FrameType.PING, ACK, payload=bytes(8)))),
    "DATA of nothing (CVE-2019-9518)": (2001, always(data(1))),
    "DATA of padding alone": (2001, always(data(1, b"\0", PADDED))),
    "an end again and again of a stream that is over": (2001, always(data(3, b"", END_STREAM))),
    "PRIORITY (CVE-2019-9513)": (2001, always(frame(FrameType.PRIORITY, 0, 1, bytes(5)))),
    "PRIORITY of streams to come": (2001, each(lambda peer, stream: frame(FrameType.PRIORITY, 0, stream, bytes(5)))),
    "frames nobody knows": (2001, always(frame(0x77, 0, 1, b"x"))),
    "WINDOW_UPDATE of the connection": (2050, always(window_update_frame(0, 1))),
    "WINDOW_UPDATE of a stream": (2050, always(window_update_frame(1, 1))),
    "WINDOW_UPDATE of a stream that is over": (2050, always(window_update_frame(3, 1))),
    "RST_STREAM of a stream that is over": (2001, always(rst_stream_frame(3, 8))),
    "GOAWAY": (2001, always(goaway_frame(0, 0))),
    "more streams than are allowed": (3100, each(lambda peer, stream: peer.head(stream, GET))),
}


def flood(peer: Peer, frames: Iterator[bytes], most: int) -> tuple[int, RemoteProtocolError]:
    """Send until the connection breaks: after how many frames, and how. What it says in answer is never read."""
    for number, piece in enumerate(frames):
        try:
            peer.codec.receive(piece)
        except RemoteProtocolError as exc:
            return number, exc
        assert number <= most, "this goes on for ever"
    raise AssertionError("no more frames")


@pytest.mark.parametrize(("most", "frames"), FLOODS.values(), ids=FLOODS.keys())
def test_a_flood_ends_the_connection(most: int, frames: Frames) -> None:
    peer = Peer()
    prepared = frames(peer)
    peer.codec.receive(next(prepared))
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        number, failure = flood(peer, prepared, most)
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert failure.code == CALM
    assert number > 5, "nobody is cut off for a handful of odd frames"
    assert peak < ROOM + (most if most > 2500 else 0) * 2048, "streams that are allowed may take what requests take"
    heard = peer.hears()
    assert heard[-1].type == FrameType.GOAWAY
    assert heard[-1].error_code == CALM
    assert sum(9 + frame.body_len for frame in heard) < 64 * 1024
    assert peer.codec.finished
    assert peer.codec.active_streams == 0


@pytest.mark.parametrize("frames", [FLOODS[name][1] for name in FLOODS if FLOODS[name][0] == 2001])
def test_what_was_spent_grows_back_with_time(frames: Frames) -> None:
    peer = Peer()
    prepared = frames(peer)
    for _ in range(20):
        for _ in range(int(REFILL_PER_SECOND)):
            peer.codec.receive(next(prepared))
        peer.clock.seconds += 1.0
    peer.clock.seconds += 3600.0
    number, _ = flood(peer, prepared, 10_000)
    assert number == int(CAPACITY), "all is forgiven, and an hour's rest gives no more than that"


def test_resets_of_requests_that_were_answered_are_nothing_to_blame() -> None:
    peer = Peer()
    for stream in range(1, 4001, 2):
        peer.sends(peer.head(stream, GET))
        peer.server.send_response(stream, Response(200, []), ended=False)
        peer.sends(rst_stream_frame(stream, ErrorCode.CANCEL))
    assert peer.codec.active_streams == 0


def test_fewer_than_half_of_all_requests_may_be_given_up() -> None:
    peer = Peer()
    for stream in range(1, 4001, 2):
        peer.sends(peer.head(stream, GET))
        if stream % 4 == 1:
            peer.answers(stream)
            peer.hears()
        else:
            peer.sends(rst_stream_frame(stream, ErrorCode.CANCEL))


# --- header compression -------------------------------------------------------------------------------------------------------------------


def bomb(references: int, size: int = 4000) -> bytes:
    """A block that puts one large field into the table and names it again and again, a byte each."""
    head = b"\x82\x86\x84\x01\x09shop.test"
    return head + b"\x40\x01x" + b"\x7f" + bytes([0x80 | (size - 127) & 0x7F, (size - 127) >> 7]) + b"y" * size + b"\xbe" * references


def test_a_block_that_unfolds_without_end_ends_the_connection_before_it_has_unfolded() -> None:
    peer = Peer()
    block = frame(FrameType.HEADERS, END_HEADERS | END_STREAM, 1, bomb(60_000))
    tracemalloc.start()
    try:
        failure = peer.fails(block)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert failure.code == CALM
    assert peak < ROOM


def test_heads_over_the_limit_are_answered_a_few_times_and_no_more() -> None:
    peer = Peer()
    peer.clock.seconds += 1.0

    def bombs() -> Iterator[bytes]:
        for stream in count(1, 2):
            yield frame(FrameType.HEADERS, END_HEADERS | END_STREAM, stream, bomb(50))
            peer.answers(stream, 431)

    number, failure = flood(peer, bombs(), 100)
    assert failure.code == CALM
    assert number == 40
    assert len(peer.hears()) == 41


def test_a_head_over_the_limit_is_a_431() -> None:
    (refused,) = Peer().sends(frame(FrameType.HEADERS, END_HEADERS | END_STREAM, 1, bomb(50)))
    assert isinstance(refused, RefusedHead)
    assert refused.status == 431


def test_a_field_named_often_is_kept_once() -> None:
    """What is below the limit is a request: its memory is one field's, however many requests name it."""
    peer = Peer()
    head = bomb(10)
    peer.sends(frame(FrameType.HEADERS, END_HEADERS | END_STREAM, 1, head))
    again = b"\x82\x86\x84\x01\x09shop.test" + b"\xbe" * 14
    tracemalloc.start()
    try:
        kept = [peer.codec.receive(frame(FrameType.HEADERS, END_HEADERS | END_STREAM, stream, again)) for stream in range(3, 203, 2)]
        size, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert all(isinstance(events[0], RequestHead) and len(events[0].request.headers) == 14 for events in kept)
    assert size < 100 * 4096, "less than one field each"


def test_heads_of_all_requests_under_way_are_bounded_together() -> None:
    """What comes in with a few bytes may have to go on with 60 KiB each: to an application without HPACK, or that does not read."""
    peer = Peer()
    peer.sends(frame(FrameType.HEADERS, END_HEADERS | END_STREAM, 1, bomb(10)))
    again = b"\x82\x86\x84\x01\x09shop.test" + b"\xbe" * 14
    streams = iter(range(3, 10_000, 2))
    for _ in range(200):
        peer.sends(frame(FrameType.HEADERS, END_HEADERS | END_STREAM, next(streams), again))
    taken = [event.stream for event in peer.events if isinstance(event, RequestHead)]
    assert 140 < len(taken) < 155, "8 MiB, counted as RFC 9113 section 6.5.2 has it"
    refused = [frame for frame in peer.hears() if frame.type == FrameType.RST_STREAM]
    assert {frame.error_code for frame in refused} == {ErrorCode.REFUSED_STREAM}
    assert len(taken) + len(refused) == 201
    peer.answers(taken[0])
    peer.codec.reset(taken[1], ErrorCode.CANCEL)
    peer.sends(frame(FrameType.HEADERS, END_HEADERS | END_STREAM, next(streams), again))
    assert isinstance(peer.events[-1], RequestHead), "there is room again"
    for stream in taken[2:]:
        peer.answers(stream)
    peer.answers(peer.events[-1].stream)
    assert peer.codec._heads == 0


def test_a_table_full_of_fields_is_as_large_as_was_agreed() -> None:
    peer = Peer()
    before = 0
    tracemalloc.start()
    try:
        for stream in range(1, 601, 2):
            fields = [*GET, *((f"x-{stream}-{number}", "y" * 30) for number in range(50))]
            peer.sends(peer.head(stream, fields))
            peer.answers(stream)
            peer.hears()
            peer.events.clear()
            if stream == 101:
                before = tracemalloc.get_traced_memory()[0]
        after = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert after - before < 64 * 1024


# --- windows ------------------------------------------------------------------------------------------------------------------------------


def test_a_client_that_opens_no_window_is_sent_nothing() -> None:
    peer = Peer(settings=b"\0\4\0\0\0\0")
    for stream in range(1, 201, 2):
        peer.sends(peer.head(stream, GET))
        peer.server.send_response(stream, Response(200, []), ended=False)
        assert peer.server.room(stream) == 0
        with pytest.raises(LocalProtocolError):
            peer.server.send_data(stream, b"x")
    assert {frame.type for frame in peer.hears()} == {FrameType.HEADERS}
    assert peer.codec.unsent == 0


def test_a_response_in_drips_is_ten_updates_a_drip_and_no_more() -> None:
    """CVE-2019-9511, 9517. Envoy's allowance: ten WINDOW_UPDATEs for each DATA that was sent, beside our patience."""
    peer = Peer(settings=b"\0\4\0\0\0\1")
    peer.sends(peer.head(1, GET))
    peer.server.send_response(1, Response(200, []), ended=False)
    for _ in range(3000):
        assert peer.server.room(1) == 1
        peer.server.send_data(1, b"x")
        peer.sends(window_update_frame(1, 1))
        assert peer.codec.unsent < 100
        peer.hears()
    number, failure = flood(peer, iter(lambda: window_update_frame(0, 1), None), 20_000)
    assert failure.code == CALM
    assert number <= MAX_COURTESY + CAPACITY


def test_bodies_that_do_not_move_on_are_bounded_for_all_streams_together() -> None:
    """A quarter of a MiB each; beyond 4 MiB together the connection's credit, another 4, is not renewed."""
    peer = Peer()
    number, failure = flood(peer, (peer.head(stream, POST, end=False) + data(stream, bytes(16_384)) * 16 for stream in count(1, 2)), 100)
    assert failure.code == ErrorCode.FLOW_CONTROL_ERROR
    assert 16 <= number <= 32


def test_a_client_is_forgotten_with_what_it_had_sent() -> None:
    peer = Peer(options=ServerOptions(max_streams=10))
    tracemalloc.start()
    try:
        before = after = 0
        for stream in range(1, 4001, 2):
            peer.sends(peer.head(stream, POST, end=False), data(stream, bytes(1000)))
            peer.answers(stream)  # and RST_STREAM, since the request goes on
            peer.hears()
            peer.events.clear()
            if stream == 2401:
                before = tracemalloc.get_traced_memory()[0]
            after = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert after - before < 64 * 1024
    assert len(peer.codec._reset_here) == 1024, "of the resets the latest"


# --- after our goodbye, and the other way round -------------------------------------------------------------------------------------------


def test_a_client_that_does_not_hear_our_goodbye_is_cut_off() -> None:
    peer = Peer()
    peer.sends(peer.head(1, POST, end=False))
    peer.server.go_away()
    (_, ping) = peer.hears()
    ping.flags.add("ACK")
    peer.sends(ping.serialize())
    number, failure = flood(peer, (peer.head(stream, GET) for stream in count(3, 2)), 3000)
    assert failure.code == CALM
    assert number <= CAPACITY


def serving(make: Callable[[Peer, int], bytes]) -> tuple[int, RemoteProtocolError, Peer]:
    """Our client, and a server that floods; streams 1 (asked), 3 (given up) and 5 (answered)."""
    peer = Peer(Http2Client(now=StoppedClock()))
    for _ in range(3):
        peer.client.send_request(request(), ended=True)
    peer.client.reset(3, ErrorCode.CANCEL)
    peer.sends(peer.head(5, [(":status", "200")]))
    peer.hears()
    number, failure = flood(peer, (make(peer, number) for number in count()), 20_000)
    return number, failure, peer


SERVER_FLOODS: dict[str, Callable[[Peer, int], bytes]] = {
    "informational responses": lambda peer, _: peer.head(1, [(":status", "103")], end=False),
    "HEADERS on a stream that was given up": lambda peer, _: peer.head(3, [(":status", "200")], end=False),
    "DATA of nothing on a stream that was given up": lambda _, __: data(3, b"", END_STREAM),
    "HEADERS on a stream that is over": lambda peer, _: peer.head(5, [("x", "y")]),
    "PING": lambda _, __: frame(FrameType.PING, payload=bytes(8)),
    "SETTINGS": lambda _, __: frame(FrameType.SETTINGS),
    "WINDOW_UPDATE": lambda _, __: window_update_frame(0, 1),
    "RST_STREAM": lambda _, __: rst_stream_frame(5, 0),
    "GOAWAY": lambda _, __: goaway_frame(5, 0),
    "frames nobody knows": lambda _, __: frame(0x77),
}


@pytest.mark.parametrize("make", SERVER_FLOODS.values(), ids=SERVER_FLOODS.keys())
def test_a_server_that_floods_is_cut_off_too(make: Callable[[Peer, int], bytes]) -> None:
    number, failure, peer = serving(make)
    assert failure.code == CALM
    assert number <= CAPACITY + 20
    assert peer.codec.unsent < 64 * 1024


def test_what_was_on_its_way_to_a_stream_that_we_gave_up_is_no_flood() -> None:
    """A server may have a whole window of small DATA under way when our reset reaches it."""
    peer = Peer(Http2Client(now=StoppedClock()))
    stream = peer.client.send_request(request(), ended=True)
    assert isinstance(peer.sends(peer.head(stream, [(":status", "200")], end=False))[0], ResponseHead)
    peer.client.reset(stream, ErrorCode.CANCEL)
    peer.hears()
    assert peer.sends(*[data(stream, b"x" * 10)] * 20_000, data(stream, b"", END_STREAM)) == []
    assert peer.hears() == []

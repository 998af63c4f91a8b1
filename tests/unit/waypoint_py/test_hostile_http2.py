"""A hostile end of HTTP/2 against a waypoint: it loses its own connection or request, and its neighbours notice nothing."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from itertools import count, islice

import msgspec
import pytest
import trio

from mesh.http.codec import RequestHead
from mesh.http.h2 import Http2Server
from mesh.http.message import Response
from mesh.model.l7.waypoint import Protocol
from mesh.testing.hbone import StoppedClock
from mesh.wire.errors import ErrorCode, RemoteProtocolError
from mesh.wire.frames import PREFACE, FrameType, frame_header, rst_stream_frame, window_update_frame
from tests.property.test_waypoint_exchange import ROUTE, Stage
from tests.unit.mesh.http.h2_peer import GET, POST, Peer, frames_of
from tests.unit.mesh.http.test_h2_floods import bomb
from tests.unit.waypoint_py.harness import Echo, World
from waypoint_py.downstream import TOO_MUCH_UNSENT
from waypoint_py.stream import HIGH_WATER

SETTINGS = frame_header(0, FrameType.SETTINGS, 0, 0)
PING = frame_header(8, FrameType.PING, 0, 0) + bytes(8)


def _each_stream(*parts: str, number: int = 1000) -> bytes:
    """The same on many streams: a GET or POST, and what breaks it."""
    writer = Peer()
    made = {
        "get": lambda stream: writer.head(stream, GET),
        "post": lambda stream: writer.head(stream, POST, end=False),
        "cancel": lambda stream: rst_stream_frame(stream, ErrorCode.CANCEL),
        "window": lambda stream: window_update_frame(stream, 0),
        "malformed": lambda stream: writer.head(stream, [*GET, ("connection", "close")]),
    }
    return b"".join(made[part](stream) for stream in islice(count(1, 2), number) for part in parts)


FLOODS: dict[str, bytes] = {
    "rapid reset": _each_stream("get", "cancel"),
    "rapid reset of uploads": _each_stream("post", "cancel"),
    "made to reset": _each_stream("get", "window"),
    "malformed requests": _each_stream("malformed"),
    "PING": PING * 5000,
    "SETTINGS": SETTINGS * 1000,
    "CONTINUATION": frame_header(1, FrameType.HEADERS, 0, 1) + b"\x82" + frame_header(0, FrameType.CONTINUATION, 0, 1) * 100,
    "empty DATA": _each_stream("post", number=1) + frame_header(0, FrameType.DATA, 0, 1) * 5000,
    "PRIORITY": (frame_header(5, FrameType.PRIORITY, 0, 1) + bytes(5)) * 5000,
    "WINDOW_UPDATE": window_update_frame(0, 1) * 15_000,
    "HPACK bomb": frame_header(len(bomb(60_000)[:60_000]), FrameType.HEADERS, 5, 1) + bomb(60_000)[:60_000],
}


@pytest.mark.parametrize("flood", FLOODS.values(), ids=FLOODS.keys())
def test_a_flood_ends_its_connection_and_its_neighbours_are_served(flood: bytes) -> None:
    world = World()

    async def main() -> None:
        async with world.application(Echo()) as address:
            world.describe(world.endpoint(address))
            link = await world.link()  # both in one HBONE connection, as the agent of their node has them
            neighbour = await world.h2_client(link=link)
            stream = await world.open(link=link)
            served = 0
            over = False

            async def go_on() -> None:
                nonlocal served
                while not over:
                    assert (await neighbour.get(f"/{served}")).status == 200
                    served += 1

            async def attack() -> None:
                with suppress(trio.BrokenResourceError):
                    await stream.send_all(PREFACE + SETTINGS + flood)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(go_on)
                nursery.start_soon(attack)
                heard = b""
                while data := await stream.receive_some():
                    heard += data
                before = served
                await world.until(lambda: served > before + 3)
                over = True
            last = frames_of(heard)[-1]
            assert (last.type, last.error_code) == (FrameType.GOAWAY, ErrorCode.ENHANCE_YOUR_CALM)
            assert (await neighbour.get("/after")).status == 200
            await world.until(lambda: world.plane.counts.exchanges == 0)

    world.run(main)


def test_a_malformed_request_costs_its_stream_and_no_other() -> None:
    world = World()

    async def main() -> None:
        async with world.application(Echo()) as address:
            world.describe(world.endpoint(address))
            stream = await world.open()
            writer = Peer()
            split = [*GET[:3], (":path", "/ HTTP/1.1\r\nhost: evil\r\n\r\nGET /admin")]
            wire = writer.head(1, GET) + writer.head(3, split) + writer.head(5, [*GET, ("x", "y\r\n\r\nGET /admin HTTP/1.1\r\n")])
            await stream.send_all(PREFACE + SETTINGS + wire + writer.head(7, GET))
            heard = b""
            while heard.count(b"GET /\n") < 2:
                heard += await stream.receive_some()
            resets = {frame.stream_id: frame.error_code for frame in frames_of(heard) if frame.type == FrameType.RST_STREAM}
            assert resets == {3: ErrorCode.PROTOCOL_ERROR, 5: ErrorCode.PROTOCOL_ERROR}
            assert {record.path for record in world.log.requests} == {b"/"}

    world.run(main)


async def _misbehave(stream: trio.SocketStream) -> None:
    """An application in HTTP/2 by hand: it answers as it should, or as the path says."""
    writer = Peer()
    await stream.send_all(SETTINGS)
    reader = Http2Server(now=StoppedClock())
    while data := await stream.receive_some(65536):
        try:
            events = reader.receive(data)
        except RemoteProtocolError:
            return
        for event in events:
            if isinstance(event, RequestHead):
                flaw = FLAWS[event.request.path](writer, event.stream)
                await stream.send_all(flaw)


FLAWS: dict[bytes, Callable[[Peer, int], bytes]] = {
    b"/good": lambda writer, stream: writer.head(stream, [(":status", "200")]),
    b"/split": lambda writer, stream: writer.head(stream, [(":status", "200"), ("x", "y\r\nset-cookie: z")]),
    b"/connection": lambda writer, stream: writer.head(stream, [(":status", "200"), ("connection", "close")]),
    b"/short": lambda writer, stream: writer.head(stream, [(":status", "200"), ("content-length", "4")]),
    b"/pings": lambda writer, stream: PING * 5000,
    b"/idle": lambda writer, stream: frame_header(0, FrameType.DATA, 1, stream + 100),
}


@pytest.mark.parametrize(("path", "connections"), [("/split", 1), ("/connection", 1), ("/short", 1), ("/pings", 2), ("/idle", 2)])
def test_an_application_that_breaks_the_protocol_costs_itself_one_answer(path: str, connections: int) -> None:
    """On the same connection, if what it broke was the stream alone."""
    world = World()
    made = 0

    async def application(stream: trio.SocketStream) -> None:
        nonlocal made
        made += 1
        await _misbehave(stream)

    async def main() -> None:
        async with world.application(application) as address:
            world.describe(world.endpoint(address), protocol=Protocol.HTTP2)
            client = await world.h2_client()
            assert (await client.get("/good")).status == 200
            broken = await client.get(path)
            assert broken.status == 502
            assert broken.text.endswith("reset reason: protocol error")
            assert (await client.get("/good")).status == 200
            assert made == connections

    world.run(main)


def test_connections_to_an_application_that_allows_no_request_are_not_kept() -> None:
    """Each is asked before it has said so, and would be of no use ever after: one descriptor for each request."""
    world = World()

    async def none_please(stream: trio.SocketStream) -> None:
        writer, reader = Peer(), Http2Server(now=StoppedClock())
        await stream.send_all(frame_header(6, FrameType.SETTINGS, 0, 0) + b"\0\3\0\0\0\0")
        while data := await stream.receive_some(65536):
            for event in reader.receive(data):
                if isinstance(event, RequestHead):
                    await stream.send_all(writer.head(event.stream, [(":status", "200")]))

    async def main() -> None:
        async with world.application(none_please) as address:
            world.describe(world.endpoint(address), protocol=Protocol.HTTP2)
            client = await world.h2_client()
            for number in range(10):
                assert (await client.get(f"/{number}")).status == 200
                await world.until(lambda: world.pool.connections == 0)

    world.run(main)


def _quiet_stage(settings: bytes = SETTINGS) -> Stage:
    stage = Stage(1, serial=False, route=msgspec.structs.replace(ROUTE, fault=None, mirrors=(), timeout=None, retry=None))
    stage.say(PREFACE + settings)
    return stage


def test_a_client_that_asks_and_never_reads_is_not_listened_to_for_long() -> None:
    """Heads of answers need no window; what they may pile up to is bounded, and a client that reads again has all of them."""
    stage = _quiet_stage()
    writer = Peer()
    said = 0
    while not stage.wire.paused:
        stage.say(writer.head(2 * said + 1, GET))
        said += 1
        (call,) = stage.upstreams.living
        call.opened = call.over = True
        call.on_open(call)
        call.sink.response(Response(200, [(b"x", b"y" * 10_000)]), True)
        stage.clock.turn()
        assert stage.wire.unsent < TOO_MUCH_UNSENT + 20_000
    assert said > 40
    heard = b""
    while piece := stage.wire.read(100_000):
        heard += piece
        stage.clock.turn()
    assert not stage.wire.paused
    assert len([frame for frame in frames_of(heard) if frame.type == FrameType.HEADERS]) == said
    stage.say(writer.head(2 * said + 1, GET))
    assert len(stage.upstreams.living) == 1
    stage.finish()


def test_responses_that_no_window_is_opened_for_are_held_back_at_their_source() -> None:
    stage = _quiet_stage(frame_header(6, FrameType.SETTINGS, 0, 0) + b"\0\4\0\0\0\0")
    writer = Peer()
    stage.say(b"".join(writer.head(stream, GET) for stream in range(1, 21, 2)))
    calls = stage.upstreams.living
    assert len(calls) == 10
    for call in calls:
        call.opened = True
        call.on_open(call)
        call.sink.response(Response(200, []), False)
        call.unconsumed = 100_000
        call.sink.data(bytes(100_000))
    stage.clock.turn()
    assert [call.unconsumed for call in calls] == [100_000] * 10, "none of it is taken for gone"
    assert stage.wire.unsent < 10_000
    stage.say(window_update_frame(1, 1000))
    assert [call.unconsumed for call in calls] == [99_000] + [100_000] * 9
    stage.finish()


@pytest.mark.parametrize("status", [100, 103])
def test_informational_responses_do_not_pile_up_before_a_client_that_does_not_read(status: int) -> None:
    """No window holds them back: an application and a client that are of one mind could fill a waypoint's memory with them."""
    stage = _quiet_stage()
    waits = [*POST, ("expect", "100-continue")]
    stage.say(Peer().head(1, waits, end=False))
    (call,) = stage.upstreams.living
    call.opened = True
    call.on_open(call)
    for _ in range(2000):
        call.sink.informational(status, [(b"link", b"x" * 10_000)])
        stage.clock.turn()
    assert stage.wire.unsent < HIGH_WATER + 20_000
    call.sink.response(Response(200, []), True)
    call.over = True
    stage.clock.turn()
    heard = b""
    while piece := stage.wire.read(100_000):
        heard += piece
        stage.clock.turn()
    heads = [frame for frame in frames_of(heard) if frame.type == FrameType.HEADERS]
    assert "END_STREAM" in heads[-1].flags, "the answer itself has come"
    stage.finish()


def test_a_client_that_has_much_to_read_is_told_to_continue_all_the_same() -> None:
    stage = _quiet_stage()
    writer = Peer()
    stage.say(writer.head(1, GET) + writer.head(3, [*POST, ("expect", "100-continue")], end=False))
    busy, waiting = stage.upstreams.living
    for call in (busy, waiting):
        call.opened = True
        call.on_open(call)
    while stage.wire.unsent <= HIGH_WATER:
        busy.sink.informational(103, [(b"link", b"x" * 10_000)])
        stage.clock.turn()
    before = stage.wire.unsent
    waiting.sink.informational(100, [(b"x", b"x" * 10_000)])
    stage.clock.turn()
    assert before < stage.wire.unsent < before + 100
    stage.finish()

"""Whatever a client, its upstreams and the clock do, in whatever order: a request is told of exactly once, and nothing is left of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.http.codec import BodyData
from mesh.http.h2 import Http2Client
from mesh.http.message import Request, Response, Version
from mesh.model.l7.waypoint import Assigned, PortConfig, Protocol, ServiceConfig
from mesh.state.store import Delta
from tests.unit.waypoint_py.stage import HOST, ROUTE, Stage

H1_PIECES = (
    b"GET /a HTTP/1.1\r\nHost: a\r\n\r\n",
    b"POST /b HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n",
    b"0123456789",
    b"POST /c HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n",
    b"5\r\nhello\r\n",
    b"0\r\n\r\n",
    b"HEAD /d HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /ws HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
    b"POST /e HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n" + b"y" * 30_000,
    b"POST /f HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n",
    b"garbage\r\n\r\n",
    b"GET /g HTTP/1.1\r\nHos",
    b"POST /grpc HTTP/1.1\r\nHost: a\r\nContent-Type: application/grpc\r\nContent-Length: 7\r\n\r\n\0\0\0\0\2hi",
)

ACTIONS = st.lists(st.tuples(st.integers(0, 99), st.integers(0, 200_000), st.integers(0, 7)), max_size=60)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 1 << 30), ACTIONS)
def test_http1(seed: int, actions: list[tuple[int, int, int]]) -> None:
    stage = Stage(seed, serial=True)
    for what, size, which in actions:
        _anything(stage, what, size, which, partial(stage.say, H1_PIECES[size % len(H1_PIECES)]), lambda data: None)
    stage.finish()


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 1 << 30), ACTIONS)
def test_http2(seed: int, actions: list[tuple[int, int, int]]) -> None:
    stage = Stage(seed, serial=False)
    client = Http2Client(now=stage.clock.now)
    stage.say(client.take_outgoing())
    client.receive(stage.wire.read(1 << 20))
    streams: list[int] = []

    def hear(data: bytes) -> None:
        for event in client.receive(data):
            if isinstance(event, BodyData):
                client.consumed(event.stream, len(event.data))

    def speak(size: int, which: int) -> None:
        kind = which % 6
        if kind < 2 and client.capacity:
            method = (b"GET", b"POST", b"HEAD")[size % 3]
            headers = [(b"content-type", b"application/grpc"), (b"grpc-timeout", b"3S")] if size % 5 == 0 else []
            request = Request(method, b"http", b"a", b"/%d" % size, headers, Version.HTTP_2)
            streams.append(client.send_request(request, ended=kind == 0))
        elif streams:
            stream = streams[size % len(streams)]
            if kind == 2:
                client.send_data(stream, b"x" * min(size, client.room(stream)))
            elif kind == 3:
                client.send_end(stream, None)
            elif kind == 4:
                client.reset(stream, 8)
        stage.say(client.take_outgoing())

    for what, size, which in actions:
        _anything(stage, what, size, which, partial(speak, size, which), hear)
    stage.finish()


def _anything(stage: Stage, what: int, size: int, which: int, speak: Callable[[], None], hear: Callable[[bytes], None]) -> None:
    """One thing that may happen to a connection. ``speak``: the client says something; ``hear``: it reads so many bytes."""
    if what < 35:
        speak()
    elif what < 80:
        living = stage.upstreams.living
        if living:
            stage.act(living[which % len(living)], size, size)
    elif what < 88:
        stage.clock.advance(size / 50_000)
    elif what < 94:
        if not stage.wire.over:
            stage.wire.read(size)
    elif what < 96:
        stage.plane.store.apply(
            Delta(
                l7=(
                    Assigned("shop/waypoint", ServiceConfig("shop", HOST, (PortConfig(80, Protocol.AUTO, routes=(ROUTE,) * (which % 2)),))),
                )
            )
        )
    elif what < 97:
        stage.connection.go_away()
    elif what < 98 and not stage.wire.over:
        stage.connection.ended()
    stage.clock.turn()


def test_the_stage_itself_carries_a_request() -> None:
    stage = Stage(1, serial=True, route=msgspec.structs.replace(ROUTE, fault=None, mirrors=()))
    stage.say(H1_PIECES[1] + H1_PIECES[2])
    (call,) = stage.upstreams.living
    call.window, call.opened = 100, True
    call.on_open(call)
    assert (call.received, call.ended) == (10, True)
    call.sink.response(Response(200, []), False)
    call.unconsumed = 5
    call.sink.data(b"hello")
    call.over = True
    call.sink.complete([])
    stage.clock.turn()
    assert stage.wire.read(1 << 20).endswith(b"5\r\nhello\r\n0\r\n\r\n")
    assert [record.status for record in stage.log.ended] == [200]
    stage.finish()


@pytest.mark.parametrize("serial", [True, False])
def test_nothing_said_leaves_nothing(serial: bool) -> None:
    Stage(1, serial=serial).finish()


@pytest.mark.parametrize("headers", [[(b"bad name", b"v")], [(b"x", b"a\r\nb: c")]])
def test_what_a_client_cannot_be_told_becomes_an_answer_of_ours(headers: list[tuple[bytes, bytes]]) -> None:
    stage = Stage(1, serial=True, route=msgspec.structs.replace(ROUTE, fault=None, mirrors=()))
    stage.say(H1_PIECES[0])
    (call,) = stage.upstreams.living
    call.opened = True
    call.on_open(call)
    call.sink.response(Response(200, headers), False)
    stage.clock.turn()
    assert stage.wire.read(1 << 20).startswith(b"HTTP/1.1 500 ")
    assert [(record.status, record.details) for record in stage.log.ended] == [(500, "internal_error")]
    assert len(stage.clock.errors) == 1
    stage.clock.errors.clear()
    stage.finish()

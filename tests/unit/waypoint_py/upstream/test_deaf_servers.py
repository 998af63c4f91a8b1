"""A server that lets itself be answered and does not read: its connection ends before that grows."""

from __future__ import annotations

import pytest

from mesh.http.h2 import Http2Client
from mesh.model.l7.destination import ConnectionPool
from mesh.wire.frames import FrameType, frame_header
from tests.unit.waypoint_py.stage import Clockwork, Wire
from waypoint_py.upstream.client import UNREAD_ANSWERS, Call, HttpSession

SETTINGS = frame_header(0, FrameType.SETTINGS, 0, 0)
PING = frame_header(8, FrameType.PING, 0, 0) + bytes(8)


class _Owner:
    waits = False
    limits = ConnectionPool()

    def session_free(self, session: HttpSession) -> None: ...

    def session_gone(self, session: HttpSession) -> None: ...

    def session_closed(self, session: HttpSession) -> None: ...

    def call_over(self, call: Call) -> None: ...

    def take_back(self, call: Call) -> bool:
        return False


class _Server:
    """The other end of a session, which PINGs a hundred times a second: never too often for the codec."""

    def __init__(self) -> None:
        self.clock = Clockwork()
        self.wire = Wire(self.clock.reactor)
        self.session = HttpSession(self.clock.reactor, self.wire, Http2Client(now=self.clock.now), _Owner())
        self.session.data(memoryview(SETTINGS))

    def ping(self) -> None:
        self.clock.advance(0.01)
        self.session.data(memoryview(PING))
        self.clock.turn()


def test_a_server_that_never_reads_what_it_asks_for_is_cut_off() -> None:
    server = _Server()
    for _ in range(10_000):
        server.ping()
        assert server.wire.unsent < UNREAD_ANSWERS + 1000
        if server.wire.over:
            assert server.session.closing
            return
    raise AssertionError("this goes on for ever")


@pytest.mark.parametrize("backlog", [0, 100_000])
def test_a_server_that_reads_may_ask_as_often_as_it_likes(backlog: int) -> None:
    """Also one that is always far behind with what else we send."""
    server = _Server()
    server.session._stream.write(bytes(backlog))
    server.session._written += backlog
    for _ in range(20_000):
        server.ping()
        assert not server.wire.over
        server.wire.read(17)
        if backlog:
            server.session._stream.write(bytes(100))
            server.session._written += 100
            server.wire.read(100)

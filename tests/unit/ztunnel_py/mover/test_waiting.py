"""Callbacks that wait: each is called once, by what it waits for or by its deadline, whatever the others do."""

from __future__ import annotations

import trio

from mesh.reactor.loop import Reactor
from ztunnel_py.mover.waiting import WaitingRoom


def test_who_waits_is_called_once_by_what_comes_or_by_the_deadline() -> None:
    reactor = Reactor()
    room: WaitingRoom[str] = WaitingRoom(reactor)
    called: list[str] = []

    async def main() -> None:
        assert room.wait("a", 60, lambda: called.append("a came"), lambda: called.append("a is late"))
        assert not room.wait("a", 60, lambda: called.append("a came too"), lambda: called.append("a is late"))
        assert room.wait("b", 0.01, lambda: called.append("b came"), lambda: called.append("b is late"))
        room.settle("a")
        room.settle("a")
        while "b is late" not in called:  # noqa: ASYNC110  # a timer of the reactor sets no event
            await trio.sleep(0.005)
        room.settle("b")
        assert room.waited_for() == ()

    reactor.run(main)
    reactor.close()
    assert called == ["a came", "a came too", "b is late"]


def test_one_that_fails_keeps_nobody_waiting() -> None:
    errors: list[str] = []
    reactor = Reactor(on_error=lambda error, where: errors.append(f"{type(error).__name__}: {where}"))
    room: WaitingRoom[str] = WaitingRoom(reactor)
    called: list[str] = []
    room.wait("a", 60, lambda: called.append(1 / 0), lambda: None)
    room.wait("a", 60, lambda: called.append("second"), lambda: None)
    room.settle("a")
    reactor.close()
    assert called == ["second"]
    assert errors == ["ZeroDivisionError: who waited for a"]


def test_who_waits_again_while_called_waits_for_the_next() -> None:
    reactor = Reactor()
    room: WaitingRoom[str] = WaitingRoom(reactor)
    called: list[int] = []

    def again() -> None:
        called.append(1)
        if len(called) < 3:
            room.wait("a", 60, again, again)

    again()
    room.settle("a")
    assert len(called) == 2
    room.settle("a")
    room.settle("a")
    reactor.close()
    assert len(called) == 3

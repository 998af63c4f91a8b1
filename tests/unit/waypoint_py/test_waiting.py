"""What callbacks hand to trio, and a byte stream as a task sees it."""

from __future__ import annotations

import pytest
import trio

from mesh.reactor.loop import Reactor
from tests.unit.waypoint_py.harness import World
from waypoint_py.waiting import HELD_AT_MOST, NurseryWaits, TaskStream


def test_what_is_waited_for_comes_back_in_the_loop_and_what_is_called_off_never() -> None:
    errors: list[BaseException] = []
    reactor = Reactor(on_error=lambda error, where: errors.append(error))
    waits = NurseryWaits(reactor)
    came: list[int] = []
    crashes: list[Exception] = []

    async def give(number: int) -> int:
        await trio.sleep(0.01)
        return number

    async def fail() -> int:
        raise ValueError("a defect")

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(waits.run)
            waits.wait(lambda: give(1), came.append, crashes.append)
            called_off = waits.wait(lambda: give(2), came.append, crashes.append)
            waits.wait(fail, came.append, crashes.append)
            called_off_too = waits.wait(fail, came.append, crashes.append)
            waits.wait(lambda: give(3), came.append, crashes.append)
            assert not came
            called_off.cancel()
            called_off_too.cancel()
            await trio.sleep(0.1)
            nursery.cancel_scope.cancel()

    reactor.run(main)
    reactor.close()
    assert sorted(came) == [1, 3]
    assert [str(error) for error in errors] == ["a defect"] * 2
    assert [str(error) for error in crashes] == ["a defect"]


def test_a_task_reads_and_writes_a_stream_and_is_held_back() -> None:
    world = World()
    far: list[TaskStream] = []

    async def main() -> None:
        received = bytearray()

        async def application(stream: trio.SocketStream) -> None:
            async for data in stream:
                received.extend(data)
            await stream.send_all(b"x" * 3_000_000)
            await stream.send_eof()
            await trio.sleep_forever()

        async with world.application(application) as address:
            from mesh.model.l7.waypoint import Protocol

            world.describe(world.endpoint(address), protocol=Protocol.TCP)
            stream = await world.open()
            far.append(stream)
            await stream.send_all(b"y" * 2_000_000)
            await stream.send_eof()
            await world.until(lambda: len(stream._held) > HELD_AT_MOST)
            await trio.sleep(0.1)
            held = len(stream._held)
            assert held < 3_000_000
            total = 0
            while data := await stream.receive_some(100_000):
                total += len(data)
            assert (total, len(received)) == (3_000_000, 2_000_000)
            await stream.aclose()
            with pytest.raises(trio.BrokenResourceError):
                await stream.send_all(b"z" * 1000)

    world.run(main)

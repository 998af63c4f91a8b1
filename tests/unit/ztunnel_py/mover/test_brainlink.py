"""What a mover hears from its brain, on a real reactor and a real socket."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

from mesh.reactor.loop import Reactor
from ztunnel_py import messages
from ztunnel_py.channel import Channel, ChannelClosed
from ztunnel_py.mover import brainlink
from ztunnel_py.mover.brainlink import BrainLink

Handle = Callable[[messages.ToMover, list[int]], Awaitable[None] | None]


class World:
    """A brain's end, and a mover's that is listened to."""

    def __init__(self, handle: Handle) -> None:
        self.reactor = Reactor()
        self.handle = handle
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.far = far
        self.near = near
        self.error: BaseException | None = None
        self.link: BrainLink

    def run(self, test: Callable[[World, Channel[messages.FromMover]], Awaitable[None]]) -> None:
        async def main() -> None:
            mover: Channel[messages.ToMover] = Channel(trio.socket.from_stdlib_socket(self.near), messages.ToMover)
            brain: Channel[messages.FromMover] = Channel(trio.socket.from_stdlib_socket(self.far), messages.FromMover)

            async def listen() -> None:
                try:
                    await self.link.run()
                except Exception as exc:
                    self.error = exc

            with trio.fail_after(10):
                async with trio.open_nursery() as nursery:
                    self.link = BrainLink(self.reactor, mover, self.handle, nursery)
                    nursery.start_soon(listen)
                    await test(self, brain)
                    brain.close()
            mover.close()

        try:
            self.reactor.run(main)
        finally:
            self.reactor.close()


async def until(holds: Callable[[], object]) -> None:
    while not holds():  # noqa: ASYNC110  # callbacks of the reactor tell trio nothing
        await trio.sleep(0.001)


@pytest.mark.parametrize("most", [100, 3])
def test_messages_are_handled_in_order_and_the_brains_end_is_told(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(brainlink, "MESSAGES_AT_ONCE", most)
    heard: list[messages.ToMover] = []
    world = World(lambda message, descriptors: heard.append(message))

    async def test(world: World, brain: Channel[messages.FromMover]) -> None:
        for number in range(50):
            await brain.send(messages.Ping(number))
        await until(lambda: len(heard) == 50)
        assert world.link.met

    world.run(test)
    assert heard == [messages.Ping(number) for number in range(50)]
    assert isinstance(world.error, ChannelClosed)


def test_what_takes_long_is_ended_before_the_next_message_even_if_the_brain_goes_meanwhile() -> None:
    told: list[str] = []
    go_on = trio.Event()

    async def take_long() -> None:
        await go_on.wait()
        told.append("large")

    def handle(message: messages.ToMover, descriptors: list[int]) -> Awaitable[None] | None:
        if isinstance(message, messages.Resources):
            return take_long()
        told.append("small")
        return None

    world = World(handle)

    async def test(world: World, brain: Channel[messages.FromMover]) -> None:
        await brain.send(messages.Resources(False, b""))
        for _ in range(3):
            await brain.send(messages.LookAgain())
        brain.close()
        await until(lambda: world.link.met)
        assert told == []
        go_on.set()
        await until(lambda: world.error)

    world.run(test)
    assert told == ["large", "small", "small", "small"]


def test_nothing_overtakes_what_takes_long_while_more_has_come_than_one_read_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages come by events and by calls of the loop then, in rounds of two here."""
    monkeypatch.setattr(brainlink, "MESSAGES_AT_ONCE", 2)
    told: list[int] = []

    async def take_long(number: int) -> None:
        await trio.testing.wait_all_tasks_blocked()
        told.append(number)

    def handle(message: messages.ToMover, descriptors: list[int]) -> Awaitable[None] | None:
        assert isinstance(message, messages.Resources)
        number = len(message.payload)
        if message.whole:
            return take_long(number)
        told.append(number)
        return None

    world = World(handle)
    first = 1000
    sent: list[int] = []

    async def test(world: World, brain: Channel[messages.FromMover]) -> None:
        while brain.send_now(messages.Resources((len(sent) + 1) % 9 == 0, bytes(first + len(sent)))):
            sent.append(first + len(sent))
        await until(lambda: len(told) == len(sent) or world.error)

    world.run(test)
    assert sum(sent) > 65536
    assert told == sent


def test_a_message_that_cannot_be_handled_ends_the_link_with_its_error() -> None:
    def handle(message: messages.ToMover, descriptors: list[int]) -> None:
        raise RuntimeError("a defect")

    world = World(handle)

    async def test(world: World, brain: Channel[messages.FromMover]) -> None:
        await brain.send(messages.LookAgain())
        await brain.send(messages.LookAgain())
        await until(lambda: world.error)

    world.run(test)
    assert str(world.error) == "a defect"


def test_garbage_ends_the_link() -> None:
    world = World(lambda message, descriptors: None)

    async def test(world: World, brain: Channel[messages.FromMover]) -> None:
        world.far.send(b"\xff" * 100)
        await until(lambda: world.error)
        assert not world.link.met

    world.run(test)
    assert isinstance(world.error, ChannelClosed)

"""Messages and descriptors between brain and movers, over a real socket pair."""

from __future__ import annotations

import os
import socket
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

from ztunnel_py import messages
from ztunnel_py.channel import Channel, ChannelClosed

Pair = tuple[Channel[messages.ToMover], Channel[messages.FromMover]]


def run_with_pair(body: Callable[[Channel[messages.ToMover], Channel[messages.FromMover]], Awaitable[None]]) -> None:
    async def main() -> None:
        left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        mover = Channel[messages.ToMover](trio.socket.from_stdlib_socket(left), messages.ToMover)
        brain = Channel[messages.FromMover](trio.socket.from_stdlib_socket(right), messages.FromMover)
        try:
            with trio.fail_after(10):
                await body(mover, brain)
        finally:
            mover.close()
            brain.close()

    trio.run(main)


def test_a_message_arrives_as_it_was_sent() -> None:
    async def body(mover: Channel[messages.ToMover], brain: Channel[messages.FromMover]) -> None:
        await mover.send(messages.Hello("0", 4711, 2))
        assert await brain.receive() == (messages.Hello("0", 4711, 2), [])

    run_with_pair(body)


def test_a_message_larger_than_any_socket_buffer_arrives_whole_and_in_order() -> None:
    payload = os.urandom(3_000_000)

    async def body(mover: Channel[messages.ToMover], brain: Channel[messages.FromMover]) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(brain.send, messages.Resources(False, payload))
            nursery.start_soon(brain.send, messages.ReleasePod("uid"))
            received = [(await mover.receive())[0] for _ in range(2)]
        assert messages.Resources(False, payload) in received
        assert messages.ReleasePod("uid") in received

    run_with_pair(body)


def test_descriptors_stay_with_their_message_when_several_are_on_the_way() -> None:
    async def body(mover: Channel[messages.ToMover], brain: Channel[messages.FromMover]) -> None:
        pipes = [os.pipe() for _ in range(8)]
        pod = messages.PodInfo("uid", "name", "ns", "sa")
        try:
            await brain.send(messages.Scrape(1))
            for first in (0, 4):
                await brain.send(messages.ServePod(pod), [reader for reader, _ in pipes[first : first + 4]])
                await brain.send(messages.Scrape(2))
            seen: list[int] = []
            for _ in range(5):
                message, descriptors = await mover.receive()
                assert len(descriptors) == (4 if isinstance(message, messages.ServePod) else 0)
                seen += descriptors
            for (_, writer), received in zip(pipes, seen, strict=True):
                os.write(writer, b"x")
                assert os.read(received, 1) == b"x"
                os.close(received)
        finally:
            for ends in pipes:
                os.close(ends[0])
                os.close(ends[1])

    run_with_pair(body)


@pytest.mark.parametrize(
    "frame", [b"\xff\xff\xff\xff\x00", b"\x00\x00\x00\x01\xff", b"\x00\x00\x00\x01\x00\xc1", b"\x00\x00\x00\x01\x01\x80"]
)
def test_bytes_that_are_no_message_close_the_channel(frame: bytes) -> None:
    async def main() -> None:
        left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        channel = Channel[messages.FromMover](trio.socket.from_stdlib_socket(right), messages.FromMover)
        left.sendall(frame)
        with pytest.raises(ChannelClosed):
            await channel.receive()
        left.close()
        channel.close()

    trio.run(main)


def test_the_death_of_the_other_side_is_told() -> None:
    async def body(mover: Channel[messages.ToMover], brain: Channel[messages.FromMover]) -> None:
        mover.close()
        with pytest.raises(ChannelClosed):
            await brain.receive()

    run_with_pair(body)


def test_what_can_be_sent_without_waiting_is_and_its_rest_goes_before_what_follows() -> None:
    payload = os.urandom(3_000_000)

    async def body(mover: Channel[messages.ToMover], brain: Channel[messages.FromMover]) -> None:
        assert brain.send_now(messages.Ping(1))
        assert not brain.unfinished
        assert brain.send_now(messages.Resources(False, payload)), "its beginning has gone"
        assert brain.unfinished
        assert not brain.send_now(messages.Ping(2)), "it would get into the midst of the one before"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(brain.send, messages.Ping(3))
            received = [(await mover.receive())[0] for _ in range(3)]
        assert received == [messages.Ping(1), messages.Resources(False, payload), messages.Ping(3)]
        assert not brain.unfinished
        assert brain.send_now(messages.Resources(False, payload))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(brain.finish)
            assert (await mover.receive())[0] == messages.Resources(False, payload)

    run_with_pair(body)


def test_where_there_is_no_room_nothing_is_sent_without_waiting() -> None:
    async def body(mover: Channel[messages.ToMover], brain: Channel[messages.FromMover]) -> None:
        sent = 0
        while brain.send_now(messages.Resources(False, bytes(1000))):
            sent += 1
            assert not brain.unfinished
        with trio.move_on_after(0.01):
            await brain.send(messages.Ping(1))
        for _ in range(sent):
            assert (await mover.receive())[0] == messages.Resources(False, bytes(1000))
        assert mover.receive_now() is None

    run_with_pair(body)


def test_sending_without_waiting_to_one_that_is_gone_says_so() -> None:
    async def body(mover: Channel[messages.ToMover], brain: Channel[messages.FromMover]) -> None:
        mover.close()
        with pytest.raises(ChannelClosed):
            brain.send_now(messages.Ping(1))
        brain.close()
        with pytest.raises(ChannelClosed):
            brain.send_now(messages.Ping(1))
        await trio.lowlevel.checkpoint()

    run_with_pair(body)


def test_who_closes_the_channel_wakes_who_receives_from_it() -> None:
    async def body(mover: Channel[messages.ToMover], brain: Channel[messages.FromMover]) -> None:
        async def close() -> None:
            await trio.testing.wait_all_tasks_blocked()
            mover.close()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(close)
            with pytest.raises(ChannelClosed):
                await mover.receive()

    run_with_pair(body)


def test_who_is_cancelled_while_it_receives_has_taken_no_message_and_no_descriptor() -> None:
    async def body(mover: Channel[messages.ToMover], brain: Channel[messages.FromMover]) -> None:
        pod = messages.PodInfo("uid", "name", "ns", "sa")
        reader, writer = os.pipe()
        try:
            await brain.send(messages.ServePod(pod), [reader])
            with trio.CancelScope() as scope:
                scope.cancel()
                await mover.receive()
            assert scope.cancelled_caught
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(cancel, scope)
                    message, (received,) = await mover.receive()
            assert message == messages.ServePod(pod), "what was taken before it was cancelled is given"
            os.write(writer, b"x")
            assert os.read(received, 1) == b"x"
            os.close(received)
        finally:
            os.close(reader)
            os.close(writer)

    async def cancel(scope: trio.CancelScope) -> None:
        scope.cancel()

    run_with_pair(body)

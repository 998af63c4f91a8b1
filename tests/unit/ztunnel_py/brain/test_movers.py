"""The movers as the brain keeps them: sleeping processes in their place, their side of the channel played by the test."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from math import inf
from pathlib import Path

import pytest
import trio
import trio.testing

from ztunnel_py import messages
from ztunnel_py.brain import movers as module
from ztunnel_py.brain.movers import Holding, Mover, Movers
from ztunnel_py.brain.processes import find_mover, is_mover, start_early
from ztunnel_py.channel import Channel, ChannelClosed, close_all

INFO = messages.PodInfo("uid-1", "web", "shop", "web")
SLEEP = "import sys, time; time.sleep(600)"
"""With the arguments of a mover after it, so that the brain knows it for one."""


class FollowerOfAll:
    def __init__(self) -> None:
        self.joined: list[Mover] = []
        self.left: list[Mover] = []
        self.holding: list[Holding] = []
        self.said: list[messages.FromMover] = []
        self.raises: OSError | None = None

    def mover_joined(self, mover: Mover, holding: Sequence[Holding]) -> None:
        self.holding += holding
        if self.raises is not None:
            raise self.raises
        self.joined.append(mover)

    def mover_said(self, mover: Mover, message: messages.FromMover) -> None:
        self.said.append(message)

    def mover_left(self, mover: Mover) -> None:
        self.left.append(mover)


class World:
    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch, count: int = 1) -> None:
        self.directory = directory
        self.follower = FollowerOfAll()
        self.movers = Movers(count=count, run_dir=directory, follower=self.follower, apart=["spare"])
        self.started: list[subprocess.Popen[bytes]] = []
        self.cannot_start = 0
        monkeypatch.setattr(subprocess, "Popen", self._popen)

    def _popen(self, command: list[str], **options: object) -> subprocess.Popen[bytes]:
        if self.cannot_start > 0:
            self.cannot_start -= 1
            raise OSError(errno.EAGAIN, "Resource temporarily unavailable")
        return self.process(command[-1])

    def process(self, name: str) -> subprocess.Popen[bytes]:
        process = _Popen([sys.executable, "-c", SLEEP, "ztunnel_py", "mover", name])
        self.started.append(process)
        while not is_mover(process.pid, name):
            pass  # /proc shows the arguments some microseconds after exec
        return process

    def run(self, test: Callable[[], Awaitable[None]]) -> None:
        async def main() -> None:
            with trio.fail_after(20):
                async with trio.open_nursery() as self.nursery:
                    self.nursery.start_soon(self.movers.run)
                    await test()
                    self.nursery.cancel_scope.cancel()

        before = len(os.listdir("/proc/self/fd"))
        try:
            trio.run(main)
        finally:
            for process in self.started:
                process.kill()
                process.wait()
            for held in self.follower.holding:
                close_all(held.descriptors)
        assert len(os.listdir("/proc/self/fd")) <= before, "descriptors are left over"

    async def until(self, condition: Callable[[], object]) -> None:
        while not condition():  # noqa: ASYNC110  # processes end without telling trio
            await trio.sleep(0.005)

    @asynccontextmanager
    async def joins(self, pid: int, name: str = "0", descriptors: Sequence[Sequence[int]] = ()) -> AsyncIterator[Channel[messages.ToMover]]:
        """The mover's side of a talk."""
        await self.until(lambda: (self.directory / "brain.sock").exists())
        sock = trio.socket.socket(trio.socket.AF_UNIX)
        with sock:
            await sock.connect(str(self.directory / "brain.sock"))
            channel: Channel[messages.ToMover] = Channel(sock, messages.ToMover)
            await channel.send(messages.Hello(name, pid, len(descriptors)))
            with suppress(ChannelClosed):  # it may be turned away at its first word
                for held in descriptors:
                    await channel.send(messages.Holding(INFO), held)
            try:
                yield channel
            finally:
                channel.close()

    async def first_started(self) -> subprocess.Popen[bytes]:
        await self.until(lambda: self.started)
        return self.started[0]


_Popen = subprocess.Popen


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


async def is_closed(channel: Channel[messages.ToMover]) -> bool:
    try:
        while True:
            close_all((await channel.receive())[1])
    except ChannelClosed:
        return True


def test_what_is_posted_arrives_in_order_with_its_descriptors(world: World) -> None:
    async def test() -> None:
        process = await world.first_started()
        async with world.joins(process.pid) as channel:
            await world.until(lambda: world.follower.joined)
            null = os.open("/dev/null", os.O_RDONLY)
            world.movers.post(messages.ServePod(INFO), [null] * 4)
            world.movers.post(messages.DropPod("uid-1"))
            message, descriptors = await channel.receive()
            assert (message, len(descriptors)) == (messages.ServePod(INFO), 4)
            close_all([null, *descriptors])
            assert (await channel.receive())[0] == messages.DropPod("uid-1")

    world.run(test)


def test_a_mover_that_ends_is_replaced_and_its_unread_messages_leave_nothing(world: World) -> None:
    async def test() -> None:
        process = await world.first_started()
        null = os.open("/dev/null", os.O_RDONLY)
        async with world.joins(process.pid):
            await world.until(lambda: world.follower.joined)
            for _ in range(50):
                world.movers.post(messages.Resources(True, bytes(1 << 20)))  # more than the socket takes
                world.movers.post(messages.ServePod(INFO), [null] * 4)
        await world.until(lambda: world.follower.left)
        os.close(null)
        process.kill()
        await world.until(lambda: len(world.started) == 2)
        assert not world.movers.living()

    world.run(test)


def test_a_mover_without_a_place_for_its_descriptors_comes_again(world: World) -> None:
    async def test() -> None:
        process = await world.first_started()
        world.follower.raises = OSError(errno.EMFILE, "Too many open files")
        async with world.joins(process.pid) as channel:
            assert await is_closed(channel)
        world.follower.raises = None
        async with world.joins(process.pid):
            await world.until(lambda: world.follower.joined)
        assert len(world.started) == 1, "the brain and the mover have both lived on"

    world.run(test)


def test_a_process_that_cannot_be_started_now_is_started_later(world: World) -> None:
    world.cannot_start = 2

    async def test() -> None:
        await world.first_started()

    world.run(test)


def test_a_pid_that_cannot_be_noted_down_costs_nothing_now(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "write_text", lambda *args: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))

    async def test() -> None:
        process = await world.first_started()
        async with world.joins(process.pid):
            await world.until(lambda: world.follower.joined)

    world.run(test)


def test_a_process_that_is_not_its_slots_is_drained_and_told_nothing(world: World) -> None:
    """Started by a brain that died before it could note it down; it would go on by the policies of that day."""

    async def test() -> None:
        process = await world.first_started()
        await world.until(lambda: world.movers._pids)
        orphan = world.process("0")
        null = os.open("/dev/null", os.O_RDONLY)
        async with world.joins(orphan.pid, descriptors=[[null] * 4]) as channel:
            assert await is_closed(channel)
        os.close(null)
        assert orphan.wait(10) == -signal.SIGTERM
        assert not world.follower.joined
        async with world.joins(process.pid):
            await world.until(lambda: world.follower.joined)

    world.run(test)


def test_a_number_that_is_no_movers_any_more_is_not_signalled(world: World) -> None:
    async def test() -> None:
        await world.first_started()
        await world.until(lambda: world.movers._pids)
        stranger = _Popen([sys.executable, "-c", SLEEP])
        world.started.append(stranger)
        async with world.joins(stranger.pid) as channel:
            assert await is_closed(channel)
        assert stranger.poll() is None

    world.run(test)


def test_a_mover_that_comes_again_before_its_end_was_seen_replaces_itself(world: World) -> None:
    async def test() -> None:
        process = await world.first_started()
        async with world.joins(process.pid) as first:
            await world.until(lambda: world.follower.joined)
            async with world.joins(process.pid):
                await world.until(lambda: len(world.follower.joined) == 2)
                assert world.follower.left == [world.follower.joined[0]]
                assert world.movers.living() == [world.follower.joined[1]]
                assert await is_closed(first)
                assert world.movers.living() == [world.follower.joined[1]]

    world.run(test)


@pytest.mark.parametrize("answers", [True, False])
def test_a_mover_that_answers_no_ping_is_killed_and_one_that_does_is_not(
    world: World, answers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PING_SECONDS", 0.05)

    async def test() -> None:
        process = await world.first_started()
        async with world.joins(process.pid) as channel:
            for _ in range(8):
                try:
                    message, _descriptors = await channel.receive()
                except ChannelClosed:
                    break
                assert isinstance(message, messages.Ping)
                if answers:
                    await channel.send(messages.Pong(message.number))
                elif message.number > 1:
                    await world.until(lambda: process.poll() is not None)
                    assert process.returncode == -signal.SIGKILL
                    break
        assert (process.poll() is None) is answers

    world.run(test)


def test_a_mover_that_reads_nothing_is_killed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_UNREAD", 10)

    async def test() -> None:
        process = await world.first_started()
        async with world.joins(process.pid):
            await world.until(lambda: world.follower.joined)
            for _ in range(20):
                world.movers.post(messages.Resources(True, bytes(1 << 20)))
                await trio.lowlevel.checkpoint()
            await world.until(lambda: process.poll() is not None)

    world.run(test)


def test_an_orphan_that_was_noted_down_is_met_and_keeps_what_it_serves(world: World) -> None:
    async def test() -> None:
        null = os.open("/dev/null", os.O_RDONLY)
        async with world.joins(orphan.pid, descriptors=[[null] * 4]):
            await world.until(lambda: world.follower.joined)
            assert [held.pod for held in world.follower.holding] == [INFO]
        os.close(null)
        assert world.started == [orphan], "nothing else was started"

    orphan = world.process("0")
    (world.directory / "mover-0.pid").write_text(str(orphan.pid))
    world.run(test)


@pytest.mark.parametrize("first", [messages.Drained(), None])
def test_who_does_not_introduce_itself_is_not_listened_to(world: World, first: messages.Message | None) -> None:
    async def test() -> None:
        await world.first_started()
        await world.until(lambda: (world.directory / "brain.sock").exists())
        sock = trio.socket.socket(trio.socket.AF_UNIX)
        with sock:
            await sock.connect(str(world.directory / "brain.sock"))
            channel: Channel[messages.ToMover] = Channel(sock, messages.ToMover)
            if first is None:
                await sock.send(b"\xff" * 100)
            else:
                await channel.send(first)
            assert await is_closed(channel)
            channel.close()
        assert not world.follower.joined

    world.run(test)


def test_draining_leaves_no_mover_not_even_one_that_stands_still(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SCRAPE_SECONDS", 0.1)
    world = World(tmp_path, monkeypatch, count=2)

    async def test() -> None:
        await world.until(lambda: len(world.movers._pids) == 2)
        first, second = sorted(world.started, key=lambda process: process.pid != world.movers._pids["0"])
        os.kill(second.pid, signal.SIGSTOP)
        async with world.joins(first.pid) as channel:
            await world.until(lambda: world.follower.joined)

            async def obey() -> None:
                assert (await channel.receive())[0] == messages.Drain(0.5)
                channel.close()

            world.nursery.start_soon(obey)
            await world.movers.drain(0.5)
        await world.until(lambda: first.poll() is not None and second.poll() is not None)
        await trio.sleep(0.2)
        assert len(world.started) == 2, "no other is started in their place"

    world.run(test)


def test_a_mover_that_runs_apart_is_met_and_never_signalled(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process id is of another container: here it may be anybody's."""
    monkeypatch.setattr(module, "PING_SECONDS", 0.05)

    async def test() -> None:
        process = await world.first_started()
        stranger = world.process("0")
        null = os.open("/dev/null", os.O_RDONLY)
        async with world.joins(process.pid), world.joins(stranger.pid, "spare", descriptors=[[null] * 4]) as spare:
            await world.until(lambda: len(world.follower.joined) == 2)
            assert [held.pod for held in world.follower.holding] == [INFO]
            assert await is_closed(spare), "it answers no ping"
        os.close(null)
        await world.until(lambda: any(mover.apart for mover in world.follower.left))
        assert stranger.poll() is None

    world.run(test)


@pytest.mark.parametrize("ending", [True, False])
def test_a_mover_that_runs_apart_is_drained_when_it_was_told_to_end_too(world: World, ending: bool) -> None:
    async def test() -> None:
        process = await world.first_started()
        async with world.joins(process.pid) as own, world.joins(4711, "spare") as spare:
            await world.until(lambda: len(world.follower.joined) == 2)
            if ending:
                await spare.send(messages.Ending())
                await world.until(lambda: any(mover.ending for mover in world.movers.living()))
            world.nursery.start_soon(world.movers.drain, 30.0)
            assert (await own.receive())[0] == messages.Drain(30.0)
            world.movers.post(messages.LookAgain())
            assert (await spare.receive())[0] == (messages.Drain(30.0) if ending else messages.LookAgain())

    world.run(test)


def test_those_who_are_left_look_again_when_a_mover_has_died(world: World) -> None:
    async def test() -> None:
        process = await world.first_started()
        async with world.joins(process.pid) as own:
            async with world.joins(4711, "spare"):
                await world.until(lambda: len(world.follower.joined) == 2)
            assert (await own.receive())[0] == messages.LookAgain()

    world.run(test)


@pytest.fixture
def early(world: World, monkeypatch: pytest.MonkeyPatch) -> subprocess.Popen[bytes]:
    """A mover that was started ahead of the brain, of which the brain knows."""
    for name, value in (("NODE_NAME", "n1"), ("MESH_SOURCE", "/tmp"), ("MESH_STATUS_DIR", "/tmp"), ("MOVERS", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RUN_DIR", str(world.directory.parent))
    monkeypatch.setenv("POD_NAME", world.directory.name)
    started = start_early()
    world.movers = Movers(count=1, run_dir=world.directory, follower=world.follower, early=started)
    return started["0"]


def test_movers_are_started_ahead_of_the_brain_once_and_reaped_by_it(world: World, early: subprocess.Popen[bytes]) -> None:
    assert find_mover(world.directory, "0") == early.pid
    assert start_early() == {}

    async def test() -> None:
        async with world.joins(early.pid):
            await world.until(lambda: world.follower.joined)
            assert world.started == [early]
        os.kill(early.pid, signal.SIGKILL)
        await world.until(lambda: len(world.started) == 2)
        assert not os.access(f"/proc/{early.pid}", os.F_OK), "no zombie is left"

    world.run(test)


def test_a_mover_that_was_started_ahead_may_take_its_time(
    world: World, early: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It imports as much as any: only one of the last brain, which looks for us, is stuck when it does not come."""
    monkeypatch.setattr(module, "ADOPTION_SECONDS", 0.0)

    async def test() -> None:
        await world.until(lambda: (world.directory / "brain.sock").exists())
        await trio.testing.wait_all_tasks_blocked()
        async with world.joins(early.pid):
            await world.until(lambda: world.follower.joined)
        assert world.started == [early]
        assert early.poll() is None

    world.run(test)


def test_a_mover_that_was_started_ahead_and_ended_is_waited_for_no_longer(
    world: World, early: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ADOPTION_SECONDS", inf)

    async def test() -> None:
        await world.until(lambda: "0" in world.movers._pids)
        early.kill()
        await world.until(lambda: len(world.started) == 2)

    world.run(test)


def test_whoever_is_configured_wrongly_starts_nothing_ahead(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NODE_NAME", raising=False)
    assert start_early() == {}
    assert world.started == []

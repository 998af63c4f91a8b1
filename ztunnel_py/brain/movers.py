"""The movers as the brain sees them: started, met again after a restart of the brain, replaced when they die.

A slot has a name and at most one living process. What movers must know is posted to all of them at once and in order; one that
comes later, or again, is told the whole first.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections import deque
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Protocol, TypeAlias

import trio

from mesh.telemetry.log import get_logger
from ztunnel_py import messages
from ztunnel_py.brain.processes import find_mover, is_mover, note_mover, noted_slots, slots, start_mover
from ztunnel_py.channel import Channel, ChannelClosed, close_all, listen_at

ADOPTION_SECONDS = 3.0
"""How long a new brain waits for movers of the last one: they look for it every 50 ms, so one that does not come is stuck."""
_FIRST_PAUSE = 0.05
_LONGEST_PAUSE = 5.0
_STEADY = 10.0
_SCRAPE_SECONDS = 2.0
_MOST_UNREAD = 10_000
"""Messages a mover may leave unread before it counts as stuck and is replaced: changes come a few a second."""
PING_SECONDS = 15.0
_MOST_MISSED = 2
"""Pings in a row that a mover may leave unanswered before it is replaced. One may be our own fault: this process stood still."""
_ACCEPT_PAUSE = 0.1
_LAST_BREATH = 0.1
"""Seconds between a mover's last word and its end."""
_LOOK_AGAIN = 1.0

_log = get_logger("movers")


class Follower(Protocol):
    """What the brain does about its movers; called in the movers' tasks, never concurrently."""

    def mover_joined(self, mover: Mover, holding: Sequence[Holding]) -> None:
        """A mover is there: tell it everything. ``holding`` are the pods it serves already, with descriptors that are now ours."""

    def mover_said(self, mover: Mover, message: messages.FromMover) -> None:
        """It answered or reported."""

    def mover_left(self, mover: Mover) -> None:
        """Its process has ended."""


@dataclass(frozen=True, slots=True)
class Holding:
    """A pod that a mover of the last brain goes on serving."""

    pod: messages.PodInfo
    descriptors: tuple[int, ...]


_Posted: TypeAlias = tuple[messages.Message | None, list[int]]
"""What waits to be sent: a message with descriptors of its own, or the rest of one that has begun."""


@dataclass(slots=True, eq=False)
class Mover:
    """One living mover process. `post` never blocks: the queue is the brain's memory, a mover that reads nothing is replaced."""

    name: str
    pid: int
    channel: Channel[messages.FromMover]
    apart: bool = False
    """It runs beside the agent, perhaps in another container: its pid means nothing here, and it has a supervisor of its own."""
    ending: bool = False
    """Of one that runs apart: it was told to end as well, and waits for us."""
    scrapes: dict[int, tuple[trio.Event, list[messages.Scraped]]] = field(default_factory=dict)
    pong: int = 0
    """The number of the last `Ping` that was answered."""
    _unsent: deque[_Posted] = field(default_factory=deque)
    """In order. What is being sent is the first of them until it has gone."""
    _posted: trio.lowlevel.ParkingLot = field(default_factory=trio.lowlevel.ParkingLot)
    _ended: bool = False

    @property
    def incarnation(self) -> str:
        """Names this process among all movers there ever were."""
        return f"{self.name}/{self.pid}"

    def post(self, message: messages.Message, descriptors: Sequence[int] = ()) -> None:
        """Send, in order, as soon as the mover reads. Descriptors are duplicated: the caller's stay its own. Raises OSError when there
        are none left to duplicate them."""
        if self._ended or (not self._unsent and self._send_now(message, descriptors)):
            return
        if len(self._unsent) >= _MOST_UNREAD:
            self.kill("it reads nothing")
            return
        self._unsent.append((message, _duplicate(descriptors)))
        self._posted.unpark()

    def _send_now(self, message: messages.Message, descriptors: Sequence[int]) -> bool:
        """Most often it reads, and nothing is before this message: then no task has to be woken for it."""
        try:
            if not self.channel.send_now(message, descriptors):
                return False
            if self.channel.unfinished:
                self._unsent.append((None, []))
                self._posted.unpark()
        except ChannelClosed:
            self.channel.close()  # whoever receives from it finds out
        return True

    async def send_posted(self) -> None:
        """Send what `post` could not at once, for as long as the mover is there. Raises ChannelClosed."""
        while True:
            while self._unsent:
                message, descriptors = self._unsent[0]
                try:
                    if message is not None:
                        await self.channel.send(message, descriptors)
                    else:
                        await self.channel.finish()
                finally:
                    self._unsent.popleft()
                    close_all(descriptors)
            await self._posted.park()

    def end(self) -> None:
        """It is told nothing any more."""
        self._ended = True
        while self._unsent:
            close_all(self._unsent.popleft()[1])

    def kill(self, because: str) -> None:
        """It is stuck: its slot gets another, its connections are lost."""
        _log.error("mover.stuck", mover=self.name, pid=self.pid, because=because)
        if self.apart:
            self.channel.close()  # it watches itself, and comes again if it lives
            return
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


class Movers:
    """All slots. `run` keeps every slot filled until cancelled."""

    def __init__(
        self,
        *,
        count: int,
        run_dir: Path,
        follower: Follower,
        apart: Sequence[str] = (),
        early: Mapping[str, subprocess.Popen[bytes]] = MappingProxyType({}),
    ) -> None:
        """``count``: how many to keep running. ``apart``: names of movers that somebody else keeps running. ``early``: processes that we
        started ahead, by slot."""
        self._names = slots(count)
        self._apart = frozenset(apart)
        self._run_dir = run_dir
        self._follower = follower
        self._early = early
        self._living: dict[str, Mover] = {}
        self._joined: dict[str, trio.Event] = {}
        self._pids: dict[str, int] = {}
        """Which process a slot has, once that is decided."""
        self._surplus: set[int] = set()
        self._request = 0
        self._stopping = False
        self._left = trio.Event()

    def living(self) -> list[Mover]:
        """Movers that are connected now."""
        return list(self._living.values())

    def post(self, message: messages.Message, descriptors: Sequence[int] = ()) -> None:
        """Tell all movers."""
        for mover in self._living.values():
            mover.post(message, descriptors)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Adopt what the last brain left, start what is missing (then ``started``), replace what dies."""
        listener = listen_at(self._run_dir / "brain.sock")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._accept, listener)
            async with trio.open_nursery() as starting:
                for name in self._names:
                    self._joined[name] = trio.Event()
                    nursery.start_soon(self._keep, name)
                    starting.start_soon(self._joined[name].wait)
                for name, path in noted_slots(self._run_dir).items():
                    if name not in self._names:
                        self._end_surplus(name, path)
            task_status.started()

    async def scrape(self, connections: int = 0) -> list[tuple[Mover, messages.Scraped]]:
        """Ask every mover for metrics and at most so many connections; one that does not answer in two seconds is left out."""
        self._request += 1
        request = self._request
        answers: list[tuple[Mover, messages.Scraped]] = []

        async def ask(mover: Mover) -> None:
            event, answer = mover.scrapes[request] = trio.Event(), list[messages.Scraped]()
            mover.post(messages.Scrape(request, connections))
            with trio.move_on_after(_SCRAPE_SECONDS):
                await event.wait()
                answers.append((mover, answer[0]))
            del mover.scrapes[request]

        async with trio.open_nursery() as nursery:
            for mover in self.living():
                nursery.start_soon(ask, mover)
        return answers

    async def drain(self, seconds: float) -> None:
        """Let our movers, and those apart that were told to end too, finish what lives, at most so long, and end. None is left after it,
        not even one that stands still."""
        self._stopping = True
        ending = [mover for mover in self.living() if mover.ending or not mover.apart]
        if ending:
            for mover in ending:
                mover.post(messages.Drain(seconds))
            with trio.move_on_after(seconds + _SCRAPE_SECONDS):
                while any(mover in self.living() for mover in ending):
                    await self._left.wait()
                await trio.sleep(_LAST_BREATH)
        for name, pid in self._pids.items():
            if is_mover(pid, name):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    # Connections

    async def _accept(self, listener: trio.SocketListener) -> None:
        async with trio.open_nursery() as nursery:
            while True:
                try:
                    stream = await listener.accept()
                except OSError as exc:  # no descriptors are left: others may be given back
                    _log.error("accept.failed", error=str(exc))
                    await trio.sleep(_ACCEPT_PAUSE)
                    continue
                nursery.start_soon(self._serve, stream.socket)

    async def _serve(self, sock: trio.socket.SocketType) -> None:
        """One mover's connection, from its `Hello` to its end."""
        channel: Channel[messages.FromMover] = Channel(sock, messages.FromMover)
        mover: Mover | None = None
        try:
            hello, _ = await channel.receive()
            if not isinstance(hello, messages.Hello):
                raise ChannelClosed(f"expected Hello, got {type(hello).__name__}")
            if self._is_surplus(hello):
                raise ChannelClosed("another process has its slot")
            async with _closing_unless_taken() as holding:
                for _ in range(hello.pods):
                    holding.append(await self._receive_holding(channel))
                self._replace(hello.mover)
                mover = self._living[hello.mover] = Mover(hello.mover, hello.pid, channel, apart=hello.mover in self._apart)
                self._joined.setdefault(hello.mover, trio.Event()).set()
                _log.info("mover.joined", mover=hello.mover, pid=hello.pid, pods=hello.pods)
                taken = tuple(holding)
                holding.clear()
                self._follower.mover_joined(mover, taken)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(mover.send_posted)
                nursery.start_soon(self._watch, mover)
                while True:
                    message, descriptors = await channel.receive()
                    close_all(descriptors)
                    self._said(mover, message)
        except* ChannelClosed:
            pass
        except* OSError as exc:  # no descriptors are left: the mover comes again
            _log.error("mover.not_met", error=str(exc.exceptions[0]))
        finally:
            channel.close()
            if mover is not None:
                mover.end()
                self._leave(mover)

    def _is_surplus(self, hello: messages.Hello) -> bool:
        """Whether the slot has another process, which is alive: this one was started by a brain that died before it could note it down.
        It would serve with what it last heard, so it is told to drain."""
        if hello.mover in self._apart:
            return False
        if self._pids.get(hello.mover) in (None, hello.pid) and hello.mover in self._names:
            return False
        if hello.pid not in self._surplus and is_mover(hello.pid, hello.mover):
            self._surplus.add(hello.pid)
            _log.warning("mover.surplus", mover=hello.mover, pid=hello.pid)
            with suppress(ProcessLookupError):
                os.kill(hello.pid, signal.SIGTERM)
        return True

    def _replace(self, name: str) -> None:
        """The mover has come again before we saw that its last connection was over."""
        before = self._living.get(name)
        if before is not None:
            self._leave(before)
            before.channel.close()

    def _leave(self, mover: Mover) -> None:
        if self._living.get(mover.name) is mover:
            del self._living[mover.name]
            self._left.set()
            self._left = trio.Event()
            self.post(messages.LookAgain())
            self._follower.mover_left(mover)

    async def _watch(self, mover: Mover) -> None:
        """A mover that stands still accepts connections no more, but they go on being given to it: find that out and have it replaced."""
        number = 0
        while True:
            await trio.sleep(PING_SECONDS)
            if number - mover.pong >= _MOST_MISSED:
                mover.kill(f"it has answered nothing for {(number - mover.pong) * PING_SECONDS:g} s")
                return
            number += 1
            mover.post(messages.Ping(number))

    async def _receive_holding(self, channel: Channel[messages.FromMover]) -> Holding:
        message, descriptors = await channel.receive()
        if not isinstance(message, messages.Holding) or len(descriptors) < 4:
            close_all(descriptors)
            raise ChannelClosed("expected Holding")
        return Holding(message.pod, tuple(descriptors))

    def _said(self, mover: Mover, message: messages.FromMover) -> None:
        if isinstance(message, messages.Pong):
            mover.pong = message.number
        elif isinstance(message, messages.Ending):
            mover.ending = True
        elif isinstance(message, messages.Scraped):
            waiting = mover.scrapes.get(message.request)
            if waiting is not None:
                waiting[1].append(message)
                waiting[0].set()
        else:
            self._follower.mover_said(mover, message)

    # Processes

    async def _keep(self, name: str) -> None:
        """Keep one slot filled: by what was started ahead, or an orphan of the last brain, else by a new process; again when it ends."""
        process = self._early.get(name)
        pid = process.pid if process is not None else await self._adopt(name)
        pause = _FIRST_PAUSE
        while not self._stopping:
            started = trio.current_time()
            if pid is None:
                try:
                    process = self._start(name)
                except OSError as exc:  # no memory, processes or descriptors are left
                    _log.error("mover.not_started", mover=name, error=str(exc), restart_in=pause)
                    await trio.sleep(pause)
                    pause = min(pause * 2, _LONGEST_PAUSE)
                    continue
                pid = process.pid
            self._pids[name] = pid
            await _wait_ended(pid)
            if process is not None:
                process.wait()
            if self._stopping:
                return
            if trio.current_time() - started > _STEADY:
                pause = _FIRST_PAUSE
            del self._pids[name]
            _log.warning("mover.ended", mover=name, pid=pid, status=process.returncode if process else "unknown", restart_in=pause)
            pid = process = None
            await trio.sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE)

    async def _adopt(self, name: str) -> int | None:
        """The process of this slot that outlived the last brain, once it has joined; None if there is none (any more)."""
        pid = find_mover(self._run_dir, name)
        if pid is None:
            return None
        self._pids[name] = pid
        with trio.move_on_after(ADOPTION_SECONDS):
            await self._joined[name].wait()
            return pid
        _log.error("mover.stuck", mover=name, pid=pid, because=f"it did not come within {ADOPTION_SECONDS:g} s")
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        await _wait_ended(pid)
        return None

    def _start(self, name: str) -> subprocess.Popen[bytes]:
        process = start_mover(name)
        try:
            note_mover(self._run_dir, name, process.pid)
        except OSError as exc:  # the next brain will not know it, and will have it drained: better than none now
            _log.error("mover.not_noted", mover=name, pid=process.pid, error=str(exc))
        return process

    def _end_surplus(self, name: str, path: Path) -> None:
        """A slot that this brain no longer has: its mover drains and ends."""
        pid = find_mover(self._run_dir, name)
        if pid is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        path.unlink(missing_ok=True)


@asynccontextmanager
async def _closing_unless_taken() -> AsyncGenerator[list[Holding], None]:
    """A list of what a mover hands over, whose descriptors are closed at the end: whoever takes them empties it."""
    holding: list[Holding] = []
    try:
        yield holding
    finally:
        for held in holding:
            close_all(held.descriptors)


def _duplicate(descriptors: Sequence[int]) -> list[int]:
    """All or none. Raises OSError."""
    duplicates: list[int] = []
    try:
        for descriptor in descriptors:
            duplicates.append(os.dup(descriptor))
    except OSError:
        close_all(duplicates)
        raise
    return duplicates


async def _wait_ended(pid: int) -> None:
    """Until the process has ended; works for processes that are not our children."""
    while True:
        try:
            fd = os.pidfd_open(pid)
            break
        except ProcessLookupError:
            return
        except OSError:  # no descriptors are left
            await trio.sleep(_LOOK_AGAIN)
    try:
        await trio.lowlevel.wait_readable(fd)
    finally:
        os.close(fd)

"""What a mover hears from its brain, in the loop's own callbacks.

Most of it is a change of the mesh, a few hundred bytes. Through a task of trio, which is the guest here, each would cost two switches of
threads besides, as much as all that is done about it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeAlias

import trio

from mesh.reactor.loop import IN, Reactor
from ztunnel_py import messages
from ztunnel_py.channel import Channel, ChannelClosed

Handle: TypeAlias = Callable[[messages.ToMover, list[int]], Awaitable[None] | None]
"""Do what a message says; if it takes long, return what does it: the next message is for afterwards."""

MESSAGES_AT_ONCE = 100
"""After so many the loop's other work gets its turn: connections do not wait while a large mesh comes in many messages."""


class BrainLink:
    """One channel, from now until its end."""

    def __init__(self, reactor: Reactor, channel: Channel[messages.ToMover], handle: Handle, nursery: trio.Nursery) -> None:
        """``nursery``: where what takes long runs; it must last as long as `run`."""
        self._reactor = reactor
        self._channel = channel
        self._handle = handle
        self._nursery = nursery
        self._failure: Exception | None = None
        self._paused = False
        """While something that takes long goes on: nothing may overtake it."""
        self._due = False
        """`_again` will be called."""
        self._ended = trio.Event()
        self.met = False
        """Whether anything was heard."""

    async def run(self) -> None:
        """Hand on what comes. Raises ChannelClosed when the brain has gone, and what handling a message raises."""
        self._listen()
        try:
            await self._ended.wait()
        finally:
            if self._failure is None:
                self._end(ChannelClosed("not listened to any more"))
        assert self._failure is not None
        raise self._failure

    def _listen(self) -> None:
        self._reactor.add(self._channel.fileno(), IN, self._readable)

    def _readable(self, _mask: int) -> None:
        """Level-triggered: what is left makes another event."""
        try:
            for _ in range(MESSAGES_AT_ONCE):
                received = self._channel.receive_now()
                if received is None:
                    return
                self.met = True
                rest = self._handle(*received)
                if rest is not None:
                    self._pause(rest)
                    return
                if not self._channel.has_read:
                    return
            if not self._due:
                self._due = True
                self._reactor.call_soon(self._again)  # what the channel has read already makes no event
        except Exception as exc:  # as in a task: whoever runs us ends with it
            self._end(exc)

    def _again(self) -> None:
        self._due = False
        if self._failure is None and not self._paused:
            self._readable(IN)

    def _pause(self, rest: Awaitable[None]) -> None:
        self._paused = True
        self._reactor.remove(self._channel.fileno())
        self._nursery.start_soon(self._finish, rest)

    async def _finish(self, rest: Awaitable[None]) -> None:
        await rest
        self._paused = False
        if self._failure is None:
            self._listen()
            self._readable(IN)

    def _end(self, exc: Exception) -> None:
        self._failure = exc
        self._reactor.remove(self._channel.fileno())
        self._ended.set()

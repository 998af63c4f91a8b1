"""Between the two worlds of a waypoint: what a callback hands to trio, and a byte stream as trio reads and writes one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import trio

from mesh.reactor.loop import Reactor
from waypoint_py.stream import HIGH_WATER, ByteStream
from waypoint_py.upstream.session import Cancel

T = TypeVar("T")
U = TypeVar("U")

HELD_AT_MOST: Final = 256 * 1024
"""Bytes that wait for a task to read them."""

LAST_WORDS_SECONDS: Final = 2.0
"""For what was written before a stream was closed."""
_LOOK_AGAIN: Final = 0.005


class NurseryWaits:
    """`waypoint_py.plane.Waits` by a nursery, which is there while `run` runs."""

    def __init__(self, reactor: Reactor) -> None:
        self._reactor = reactor
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """For ever."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            await trio.sleep_forever()

    def wait(self, run: Callable[[], Awaitable[T]], on_done: Callable[[T], None], on_crash: Callable[[Exception], None]) -> Cancel:
        """Run it in a task of its own. Before `run` runs, and after, nothing is ever done."""
        waiting = _Waiting()
        if self._nursery is not None:
            self._nursery.start_soon(self._run_one, run, on_done, on_crash, waiting)
        return waiting

    async def _run_one(
        self, run: Callable[[], Awaitable[T]], on_done: Callable[[T], None], on_crash: Callable[[Exception], None], waiting: _Waiting
    ) -> None:
        try:
            with waiting.scope:
                result = await run()
                self._tell(waiting, on_done, result)
        except Exception as exc:  # supervises what the callback handed over: its defect must not end everybody else's waiting
            self._reactor.report(exc, "what a request waits for")
            self._tell(waiting, on_crash, exc)

    def _tell(self, waiting: _Waiting, call: Callable[[U], None], value: U) -> None:
        if not waiting.cancelled:
            self._reactor.call_soon(lambda: None if waiting.cancelled else call(value))


class _Waiting:
    """Something that runs in trio and may be called off."""

    def __init__(self) -> None:
        self.scope = trio.CancelScope()
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True
        self.scope.cancel()


class TaskStream(trio.abc.HalfCloseableStream):
    """A `ByteStream` for one task that reads and one that writes. A `Sink`."""

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream
        self._held = bytearray()
        self._ended = False
        self._closed: str | None = None
        self._gone = False
        self._readable = trio.Event()
        self._writable = trio.Event()
        stream.attach(self)

    # --- the task's side

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        while not self._held:
            if self._ended or (self._gone and self._closed is None):
                return b""
            if self._gone:
                raise trio.BrokenResourceError(self._closed)
            self._readable = trio.Event()
            await self._readable.wait()
        data = bytes(self._held[:max_bytes])
        del self._held[: len(data)]
        if len(self._held) <= HELD_AT_MOST:
            self._stream.resume()
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        self._check()
        self._stream.write(data)
        await self.wait_send_all_might_not_block()

    async def wait_send_all_might_not_block(self) -> None:
        while not self._gone and self._stream.unsent > HIGH_WATER:
            self._writable = trio.Event()
            await self._writable.wait()
        self._check()

    async def send_eof(self) -> None:
        await trio.lowlevel.checkpoint()
        self._stream.end()

    async def aclose(self) -> None:
        try:
            self._stream.end()
            await trio.lowlevel.checkpoint()
            with trio.move_on_after(LAST_WORDS_SECONDS):
                while self._stream.unsent and not self._gone:  # noqa: ASYNC110  # told only of what was above a mark
                    await trio.sleep(_LOOK_AGAIN)
        finally:
            self._stream.abort("closed by us")

    def _check(self) -> None:
        if self._gone:
            raise trio.BrokenResourceError(self._closed or "the connection is closed")

    # --- the stream's

    def data(self, data: memoryview) -> None:
        self._held += data
        if len(self._held) > HELD_AT_MOST:
            self._stream.pause()
        self._readable.set()

    def ended(self) -> None:
        self._ended = True
        self._readable.set()

    def drained(self) -> None:
        self._writable.set()

    def closed(self, reason: str | None) -> None:
        self._gone = True
        self._closed = reason
        self._readable.set()
        self._writable.set()

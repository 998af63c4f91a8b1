"""One epoll loop per data-plane process: callbacks for bytes, timers, and trio as its guest for everything that waits.

The reactor is the host and trio the guest (``trio.lowlevel.start_guest_run``): a connection that needs nothing of trio costs
trio nothing, and a callback may still hand work to a nursery, since both run in the same thread. The other way round (the
reactor inside a trio task) cost a third of every round trip.
"""

from __future__ import annotations

import heapq
import os
import select
import sys
import time
import traceback
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias, TypeVar, cast

import outcome
import trio

IN = select.EPOLLIN
OUT = select.EPOLLOUT
PEER_CLOSED = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
"""Any of these in an event: a read must go on until EOF or an error, since no further edge will announce the end."""
CONNECTION = select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET
"""What a connection registers, once, for its life."""

BYTE_BUDGET = 256 * 1024
"""Bytes one callback may move before it must queue itself again: a bulk transfer never keeps the other connections waiting longer."""

MAX_EVENTS = 256
EXHAUSTED_AGAIN = 10.0
"""Seconds between two words about descriptors or memory that are used up: every listener of every pod tries ten times a second."""
COMPACT_TIMERS_ABOVE = 1024
"""Cancelled timers stay in the heap until they are due; above this many entries it is rebuilt when most are cancelled."""

EventCallback: TypeAlias = Callable[[int], None]
ErrorHook: TypeAlias = Callable[[BaseException, str], None]
ExhaustedHook: TypeAlias = Callable[[OSError], None]
Abort: TypeAlias = Callable[[str], None]
T = TypeVar("T")


def print_traceback(error: BaseException, where: str) -> None:
    """The error hook of a reactor that was given none: the traceback on standard error."""
    sys.stderr.write(f"reactor callback failed: {where}\n")
    traceback.print_exception(error)


def keep_silent(error: OSError) -> None:
    """The exhaustion hook of a reactor that was given none."""


class Timer:
    """A call that will be made once, unless cancelled."""

    __slots__ = ("_fn", "_reactor")

    def __init__(self, reactor: Reactor, fn: Callable[[], None]) -> None:
        self._reactor = reactor
        self._fn: Callable[[], None] | None = fn

    @property
    def active(self) -> bool:
        """Whether the call is still to come."""
        return self._fn is not None

    def cancel(self) -> None:
        """Make sure the call never comes. Free to call at any time, also from within the call or after it."""
        if self._fn is not None:
            self._fn = None
            self._reactor._timer_cancelled()

    def _take(self) -> Callable[[], None] | None:
        fn, self._fn = self._fn, None
        return fn


class _Registration:
    __slots__ = ("abort", "batch", "callback", "events")

    def __init__(self, events: int, callback: EventCallback, abort: Abort | None, batch: int) -> None:
        self.events = events
        self.callback = callback
        self.abort = abort
        self.batch = batch


class Reactor:
    """The loop. Everything but `run_soon_threadsafe` belongs to the thread that runs it.

    A callback that raises ends its own connection, never the loop: the file descriptor leaves the loop, ``on_error`` is told
    once with the exception, and the ``abort`` given with the callback is called with a reason. ``on_exhausted`` is told when connections
    wait because the process has no descriptors or no memory left for them, at once and again while that lasts.
    """

    def __init__(self, on_error: ErrorHook = print_traceback, on_exhausted: ExhaustedHook = keep_silent) -> None:
        self.now: Callable[[], float] = time.monotonic
        """Seconds on the clock of `call_later`."""
        self._epoll = select.epoll()
        self._registrations: dict[int, _Registration] = {}
        self.turns = 0
        """How many have begun."""
        self.alone = False
        """Within a callback for an event: it is the only event of this turn."""
        self._soon: deque[tuple[Callable[[], None], Abort | None]] = deque()
        self._last: deque[tuple[Callable[[], None], Abort | None]] = deque()
        self._guest_soon: deque[Callable[[], object]] = deque()
        self._timers: list[tuple[float, int, Timer]] = []
        self._timer_serial = 0
        self._cancelled_timers = 0
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.add(self._wake_fd, select.EPOLLIN, self._on_wake)
        self._on_error = on_error
        self._on_exhausted = on_exhausted
        self._exhausted_told = float("-inf")
        self._outcome: outcome.Outcome[Any] | None = None

    # --- file descriptors

    def add(self, fd: int, events: int, callback: EventCallback, abort: Abort | None = None) -> None:
        """Call ``callback(events)`` whenever one of ``events`` (epoll bits) happens on ``fd``. Raises OSError as epoll_ctl does."""
        self._epoll.register(fd, events)
        self._registrations[fd] = _Registration(events, callback, abort, self.turns)

    def modify(self, fd: int, events: int) -> None:
        """Wait for other events than before on ``fd``; the callback stays. Raises KeyError for an fd that is not added."""
        registration = self._registrations[fd]
        if registration.events != events:
            self._epoll.modify(fd, events)
            registration.events = events

    def remove(self, fd: int) -> None:
        """Forget ``fd``: no callback comes any more, not even for an event already collected. Call it before closing the fd."""
        if self._registrations.pop(fd, None) is not None:
            try:
                self._epoll.unregister(fd)
            except OSError:
                pass  # closed before it was removed: the kernel has forgotten it already

    def forget(self, fd: int) -> None:
        """`remove` for an fd that is closed at once, and is nobody else's: closing takes it out of epoll as well."""
        self._registrations.pop(fd, None)

    # --- calls

    def call_soon(self, fn: Callable[[], None], abort: Abort | None = None) -> None:
        """Call ``fn()`` after the events at hand, before waiting again."""
        self._soon.append((fn, abort))

    def call_last(self, fn: Callable[[], None], abort: Abort | None = None) -> None:
        """Call ``fn()`` when the turn has nothing else to do: for sending what all that the turn does has to say."""
        self._last.append((fn, abort))

    def call_later(self, seconds: float, fn: Callable[[], None]) -> Timer:
        """Call ``fn()`` once, ``seconds`` from now."""
        timer = Timer(self, fn)
        self._timer_serial += 1
        heapq.heappush(self._timers, (self.now() + seconds, self._timer_serial, timer))
        return timer

    def run_soon_threadsafe(self, fn: Callable[[], object]) -> None:
        """From any thread or signal handler: call ``fn()`` in the loop's thread. An exception of ``fn`` ends the loop."""
        self._guest_soon.append(fn)
        try:
            os.eventfd_write(self._wake_fd, 1)
        except OSError:
            pass  # the counter is full, so the loop wakes anyway; or it has ended

    def report(self, error: BaseException, where: str) -> None:
        """Tell the error hook of an exception that was caught short of the loop."""
        self._on_error(error, where)

    def exhausted(self, error: OSError) -> None:
        """Tell the exhaustion hook, unless it was told a moment ago."""
        now = time.monotonic()
        if now - self._exhausted_told >= EXHAUSTED_AGAIN:
            self._exhausted_told = now
            self._on_exhausted(error)

    # --- running

    def run(self, async_main: Callable[..., Awaitable[T]], *args: object) -> T:
        """Run the loop with trio as guest until ``async_main(*args)`` has finished; its result or exception is ours.

        What is still registered then is left alone: whoever opened a connection ends it before ``async_main`` returns.
        """
        self._outcome = None
        trio.lowlevel.start_guest_run(
            cast("Callable[..., Any]", async_main),
            *args,
            run_sync_soon_threadsafe=self.run_soon_threadsafe,
            run_sync_soon_not_threadsafe=self._guest_soon.append,
            done_callback=self._finished,
        )
        return cast("T", self._loop().unwrap())

    def close(self) -> None:
        """Give back the loop's own file descriptors. The loop cannot run again."""
        self._registrations.clear()
        self._epoll.close()
        os.close(self._wake_fd)
        self._wake_fd = -1

    def _finished(self, result: outcome.Outcome[Any]) -> None:
        self._outcome = result

    def _loop(self) -> outcome.Outcome[Any]:
        """Turn after turn until trio is done. Flat and on local names: it goes round once for every message that passes."""
        poll, clock, registrations = self._epoll.poll, self.now, self._registrations
        timers, soon, last, guest_soon = self._timers, self._soon, self._last, self._guest_soon
        now = clock()
        timeout: float | None
        while self._outcome is None:
            if soon or last or guest_soon:
                timeout = 0
            elif timers:
                if timers[0][2]._fn is None:
                    self._drop_cancelled()
                    continue
                timeout = timers[0][0] - now  # by the clock of the turn's beginning: late by what the turn took
                if timeout < 0:
                    timeout = 0
            else:
                timeout = None
            events = poll(timeout, MAX_EVENTS)
            self.turns = batch = self.turns + 1
            self.alone = len(events) == 1
            for fd, mask in events:
                registration = registrations.get(fd)
                # fd may have been closed and its number reused within this batch: the event is the dead one's then.
                if registration is not None and registration.batch != batch:
                    try:
                        registration.callback(mask)
                    except Exception as exc:
                        self._callback_failed(fd, registration, exc)
            now = clock()
            if timers and timers[0][0] <= now:
                self._run_timers(now)
            if soon:
                self._run_calls(soon)
            if last:
                self._run_calls(last)
            if soon:  # what these ask for, as a relay's end a log line, most often need not wait for another look at the events
                self._run_calls(soon)
            if guest_soon:
                for _ in range(len(guest_soon)):
                    guest_soon.popleft()()
        return self._outcome

    def _on_wake(self, _mask: int) -> None:
        os.eventfd_read(self._wake_fd)

    def _drop_cancelled(self) -> None:
        timers = self._timers
        while timers and timers[0][2]._fn is None:
            heapq.heappop(timers)
            self._cancelled_timers -= 1

    def _run_timers(self, now: float) -> None:
        timers = self._timers
        while timers and timers[0][0] <= now:
            fn = heapq.heappop(timers)[2]._take()
            if fn is None:
                self._cancelled_timers -= 1
                continue
            try:
                fn()
            except Exception as exc:
                self._on_error(exc, f"timer {fn!r}")

    def _run_calls(self, calls: deque[tuple[Callable[[], None], Abort | None]]) -> None:
        """Those that are there now: what they add has its turn later."""
        for _ in range(len(calls)):
            fn, abort = calls.popleft()
            try:
                fn()
            except Exception as exc:
                self._on_error(exc, f"call {fn!r}")
                self._abort(abort, exc)

    def _timer_cancelled(self) -> None:
        self._cancelled_timers += 1
        if len(self._timers) > COMPACT_TIMERS_ABOVE and self._cancelled_timers * 2 > len(self._timers):
            self._timers[:] = [entry for entry in self._timers if entry[2].active]
            heapq.heapify(self._timers)
            self._cancelled_timers = 0

    def _callback_failed(self, fd: int, registration: _Registration, error: Exception) -> None:
        self._on_error(error, f"fd {fd}, {registration.callback!r}")
        if self._registrations.get(fd) is registration:
            self.remove(fd)
        self._abort(registration.abort, error)

    def _abort(self, abort: Abort | None, error: Exception) -> None:
        if abort is None:
            return
        try:
            abort(f"internal error: {error!r}")
        except Exception as exc:
            self._on_error(exc, f"abort {abort!r}")

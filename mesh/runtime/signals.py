"""Signals: SIGTERM and SIGINT ask the program to stop; a second SIGINT makes it."""

from __future__ import annotations

import os
import signal

import trio


async def watch_signals(*, task_status: trio.TaskStatus[trio.Event] = trio.TASK_STATUS_IGNORED) -> None:
    """Run in a nursery of the main thread; ``nursery.start`` gives the event that the first SIGTERM or SIGINT sets.

    After it a second SIGINT ends the process at once with status 0, as the node proxy does: whoever presses Ctrl-C twice means it.
    Runs until cancelled; the previous signal handlers come back then.
    """
    stop = trio.Event()
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        task_status.started(stop)
        async for number in signals:
            if stop.is_set() and number == signal.SIGINT:
                os._exit(0)
            stop.set()

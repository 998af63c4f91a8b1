"""Readiness: named tasks that must be done before the program may serve, and what is still pending."""

from __future__ import annotations

from collections.abc import Callable

import trio

from mesh.runtime.http import Request, Response


class ReadinessTask:
    """One thing to wait for. It may become pending again (a stream is lost)."""

    def __init__(self, name: str, changed: Callable[[], None]) -> None:
        self.name = name
        self._ready = False
        self._changed = changed
        self._detail = ""

    @property
    def ready(self) -> bool:
        return self._ready

    @property
    def detail(self) -> str:
        """Why it is pending, in words for an operator; empty if unknown or ready."""
        return self._detail

    def done(self) -> None:
        self._ready, self._detail = True, ""
        self._changed()

    def pending(self, detail: str = "") -> None:
        self._ready, self._detail = False, detail
        self._changed()


class Readiness:
    """All tasks of a program; ready when none is pending. A program that registers none is ready."""

    def __init__(self) -> None:
        self._tasks: dict[str, ReadinessTask] = {}
        self._changed = trio.Event()

    def register(self, name: str) -> ReadinessTask:
        """A new pending task."""
        task = self._tasks[name] = ReadinessTask(name, self._notify)
        return task

    @property
    def pending(self) -> tuple[str, ...]:
        """Names of pending tasks, sorted."""
        return tuple(sorted(task.name for task in self._tasks.values() if not task.ready))

    def detail(self, name: str) -> str:
        """Why the task is pending, see `ReadinessTask.detail`."""
        return self._tasks[name].detail

    async def wait_ready(self) -> None:
        while self.pending:
            await self._changed.wait()

    def describe(self) -> str:
        """``ready``, or ``not ready, pending: a, b`` as ztunnel says it, each with its detail in parentheses if it has one."""
        pending = self.pending
        if not pending:
            return "ready"
        details = ((name, self._tasks[name].detail) for name in pending)
        return "not ready, pending: " + ", ".join(f"{name} ({detail})" if detail else name for name, detail in details)

    async def serve(self, request: Request) -> Response:
        """Handler for ``/healthz/ready``: 200 or 500 with `describe`."""
        return Response.text(self.describe(), status=500 if self.pending else 200)

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

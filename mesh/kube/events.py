"""Events on objects: what `kubectl describe` shows a user who wonders why their pod is not as it should be.

Best effort, as Kubernetes' own: written in the background, a repeated one counted up rather than written anew, dropped when the API server
can't keep up. Logs and status tell the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

import trio

from mesh.kube.api import ApiClient, ApiError, ApiUnavailable
from mesh.kube.resources import EVENTS
from mesh.telemetry.log import get_logger

QUEUE: Final = 256
"""Events that wait to be written; further ones are dropped."""
QUIET_SECONDS: Final = 30.0
"""The same event is not told more often."""
_REMEMBERED: Final = 1024
_MAX_MESSAGE: Final = 1024
"""The API server's own limit."""

_log = get_logger("events")


@dataclass(frozen=True, slots=True)
class Subject:
    """The object an event is about."""

    api_version: str
    kind: str
    namespace: str
    name: str
    uid: str


@dataclass(frozen=True, slots=True)
class ObjectEvent:
    """``reason`` is one word in CamelCase, for programs; ``message`` is for people."""

    subject: Subject
    reason: str
    message: str
    warning: bool = False

    @property
    def name(self) -> str:
        """The same for the same event, so that writing it twice is noticed."""
        identity = "\0".join((self.subject.uid, self.reason, self.message))
        return f"{self.subject.name[:220]}.{hashlib.sha256(identity.encode()).hexdigest()[:16]}"


@dataclass(slots=True)
class _Told:
    count: int
    at: float


class EventRecorder:
    """`record` from anywhere in trio's thread; `run` writes."""

    def __init__(self, client: ApiClient, component: str, host: str, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._client = client
        self._component = component
        self._host = host
        self._now = now
        self._send, self._receive = trio.open_memory_channel[ObjectEvent](QUEUE)
        self._told: dict[str, _Told] = {}

    def record(self, event: ObjectEvent) -> None:
        try:
            self._send.send_nowait(event)
        except trio.WouldBlock:
            _log.warning("event.dropped", reason=event.reason, pod=f"{event.subject.namespace}/{event.subject.name}")

    async def run(self) -> None:
        """Write events until cancelled."""
        async for event in self._receive:
            try:
                await self._write(event)
            except (ApiError, ApiUnavailable) as exc:
                _log.info("event.not_written", reason=event.reason, error=str(exc))

    async def _write(self, event: ObjectEvent) -> None:
        told = self._told.pop(event.name, None)
        if told is not None and trio.current_time() - told.at < QUIET_SECONDS:
            self._told[event.name] = told
            return
        count = told.count + 1 if told is not None else 1
        if told is not None:
            await self._count_up(event, {"count": count})
        else:
            try:
                await self._client.create(EVENTS.collection(event.subject.namespace), self._body(event))
            except ApiError as exc:
                if exc.status != 409:
                    raise
                await self._count_up(event, {})  # of our last life, which counted on its own
        while len(self._told) >= _REMEMBERED:
            del self._told[next(iter(self._told))]
        self._told[event.name] = _Told(count, trio.current_time())

    async def _count_up(self, event: ObjectEvent, also: dict[str, object]) -> None:
        path = EVENTS.path(event.subject.namespace, event.name)
        try:
            await self._client.merge_patch(path, {**also, "lastTimestamp": self._timestamp()})
        except ApiError as exc:
            if exc.status != 404:  # events live for an hour
                raise
            await self._client.create(EVENTS.collection(event.subject.namespace), self._body(event))

    def _body(self, event: ObjectEvent) -> dict[str, object]:
        subject = event.subject
        at = self._timestamp()
        involved = {"apiVersion": subject.api_version, "kind": subject.kind, "namespace": subject.namespace}
        return {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": event.name, "namespace": subject.namespace},
            "involvedObject": {**involved, "name": subject.name, "uid": subject.uid},
            "reason": event.reason,
            "message": event.message[:_MAX_MESSAGE],
            "type": "Warning" if event.warning else "Normal",
            "source": {"component": self._component, "host": self._host},
            "reportingComponent": self._component,
            "reportingInstance": self._host,
            "firstTimestamp": at,
            "lastTimestamp": at,
            "count": 1,
        }

    def _timestamp(self) -> str:
        return f"{self._now():%Y-%m-%dT%H:%M:%SZ}"

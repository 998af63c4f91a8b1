"""One collection of the API server kept in step: list, then watch from there; whatever breaks, the end is the server's state.

The rules (Kubernetes API concepts, "Efficient detection of changes"): resource versions are opaque and only ever taken from the server; a
bookmark moves the position without an object; 410 Gone means list again, and what a new list lacks was deleted meanwhile; a watch may
end at any byte and goes on from the last version seen. While nothing can be heard the last state stays.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from contextlib import aclosing
from functools import partial
from typing import Final, Protocol

import trio

from mesh.kube.api import ApiClient, ApiError, ApiUnavailable, WatchEvent, decode_object
from mesh.kube.objects import mapping_at
from mesh.kube.resources import Resource
from mesh.telemetry.log import get_logger

PAGE: Final = 500
"""Objects in one answer to a list, as client-go."""
WATCH_SECONDS: Final = (240, 480)
"""The server ends a watch after a time of our choice from this range; spread, so that watches do not all begin anew together."""
STALL: Final = 150.0
"""Seconds of silence after which a watch counts as dead: servers send a bookmark about every 60."""
SHORT: Final = 1.0
"""A watch that ended sooner and brought nothing is treated as failed: else a server that ends each at once would be asked without pause."""
FIRST_PAUSE: Final = 0.2
LONGEST_PAUSE: Final = 30.0
ABSENT_PAUSE: Final = 10.0
"""Seconds (with up to as many again) between looks for an API group that is not served: a CRD that may be installed later."""
ABSENT_ANSWERS: Final = 3
"""So many 404s in a row before objects that were there count as gone: a starting API server has not all its groups yet, and a mesh
whose policies vanish for a moment is open for that moment."""

_log = get_logger("kube")


class Sink(Protocol):
    """Where objects go. Objects are decoded JSON, whole."""

    def replace(self, objects: Sequence[dict[str, object]]) -> None:
        """These are all objects now."""

    def put(self, obj: dict[str, object]) -> None: ...

    def remove(self, namespace: str, name: str) -> None: ...

    def reduce(self, obj: dict[str, object]) -> dict[str, object]:
        """The part worth keeping, called for each object as it is read: a long list is never in memory as a whole."""

    def report(self, problem: str) -> None:
        """What keeps this collection from being followed; ``""``: nothing."""


class Reflector:
    """Keeps one sink in step; `run` it in a nursery."""

    def __init__(
        self,
        client: ApiClient,
        resource: Resource,
        sink: Sink,
        *,
        namespace: str = "",
        field_selector: str = "",
        rng: random.Random | None = None,
    ) -> None:
        self._client = client
        self._resource = resource
        self._sink = sink
        self._paths = deque(resource.at(version).collection(namespace) for version in (resource.version, *resource.older))
        """By version; the first is in use."""
        self._tried = 0
        self._query = {"fieldSelector": field_selector} if field_selector else {}
        self._rng = rng or random.Random()
        self._version = ""
        self._failures = 0
        self._absent = 0
        self._told = 0
        """What kind of failure was reported: an HTTP status, 0 where there was no answer."""
        self.synced = trio.Event()
        """Set once the sink has had a whole list, or it is certain that there is none."""

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                if not self._version:
                    await self._list()
                await self._watch()
            except (ApiError, ApiUnavailable) as exc:
                await self._recover(exc)

    async def _list(self) -> None:
        objects: list[dict[str, object]] = []
        token = ""
        while True:
            page = await self._client.list_page(self._paths[0], self._query, PAGE, token)
            objects += [self._sink.reduce(decode_object(item)) for item in page.items]
            token = page.token
            if not token:
                break
        self._sink.replace(objects)
        self._version = page.resource_version
        # Not yet a success that ends back-off: a server that gives lists and expires each at once is not to be asked without pause.
        self._sink.report("")
        self._absent = self._tried = 0
        self.synced.set()

    async def _watch(self) -> None:
        """Follow until the server ends it. Raises ApiError, ApiUnavailable."""
        seconds = self._rng.randint(*WATCH_SECONDS)
        query = {**self._query, "resourceVersion": self._version, "allowWatchBookmarks": "true", "timeoutSeconds": str(seconds)}
        started, heard = trio.current_time(), False
        opened = partial(self._sink.report, "")
        async with aclosing(self._client.watch(self._paths[0], query, stall=STALL, on_open=opened)) as events:
            async for event in events:
                self._take(event)
                if not heard:
                    heard = True
                    self._good()
        if not heard and trio.current_time() - started < SHORT:
            raise ApiUnavailable("the API server ends watches at once")
        self._good()

    def _take(self, event: WatchEvent) -> None:
        obj = decode_object(event.object)
        metadata = mapping_at(obj, "metadata")
        version = metadata.get("resourceVersion")
        match event.type:
            case "ADDED" | "MODIFIED":
                self._sink.put(obj)
            case "DELETED":
                self._sink.remove(str(metadata.get("namespace") or ""), str(metadata.get("name")))
        if isinstance(version, str) and version:
            self._version = version

    def _good(self) -> None:
        if self._failures:
            _log.info("source.recovered", resource=str(self._resource))
        self._failures = 0
        self._sink.report("")

    async def _recover(self, exc: ApiError | ApiUnavailable) -> None:
        """Note what went wrong and wait a moment; afterwards go on from the last version, or list again."""
        if isinstance(exc, ApiError):
            if exc.expired:
                self._version = ""
            elif exc.status == 404:
                self._version = ""
                self._paths.rotate(-1)
                self._tried += 1
                if self._tried % len(self._paths) == 0:
                    await self._wait_for_group()
                return
            elif 400 <= exc.status < 500 and exc.status != 429:
                # Not for the version's sake, perhaps; but nothing that a new list could not cure would be cured by asking again.
                self._version = ""
        self._failures += 1
        if self._failures == 2:
            _log.warning("source.failed", resource=str(self._resource), because=str(exc))
        kind = exc.status if isinstance(exc, ApiError) else 0
        if self._failures == 2 or (self._failures > 2 and kind != self._told):
            # A connection breaks in a dozen ways while one thing is wrong: that is told once.
            self._told = kind
            self._sink.report(f"{self._resource}: {exc}")
        longest = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(self._failures, 20))
        await trio.sleep(self._rng.uniform(longest / 2, longest))

    async def _wait_for_group(self) -> None:
        self._absent += 1
        if not self.synced.is_set() or self._absent == ABSENT_ANSWERS:
            _log.info("source.absent", resource=str(self._resource))
            self._sink.replace(())
            self.synced.set()
        self._sink.report("")
        pause = ABSENT_PAUSE if self._absent >= ABSENT_ANSWERS else ABSENT_PAUSE / 10
        await trio.sleep(self._rng.uniform(pause, 2 * pause))

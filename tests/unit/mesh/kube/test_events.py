"""Events: told once, counted when they happen again, and never in anybody's way."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from mesh.kube.api import ApiClient
from mesh.kube.events import QUEUE, QUIET_SECONDS, EventRecorder, ObjectEvent, Subject
from mesh.kube.kubeconfig import ClusterAccess
from mesh.testing.kube import FakeApiServer

EVENT = ObjectEvent(Subject("v1", "Pod", "shop", "web", "uid-1"), "NotCaptured", "no room", warning=True)


def now() -> datetime:
    return datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=trio.current_time())


def with_recorder(test: Callable[[FakeApiServer, Callable[[], EventRecorder]], Awaitable[None]]) -> None:
    async def main() -> None:
        server = FakeApiServer()
        async with trio.open_nursery() as nursery:
            await nursery.start(server.run)

            def recorder() -> EventRecorder:
                client = ApiClient(ClusterAccess("k", 443, tls=False), connect=server.connect)
                made = EventRecorder(client, "ztunnel", "n1", now)
                nursery.start_soon(made.run)
                return made

            await test(server, recorder)
            nursery.cancel_scope.cancel()

    trio.run(main, clock=MockClock(autojump_threshold=0))


def events(server: FakeApiServer) -> list[dict[str, Any]]:
    return [found for (plural, _, _), found in server.objects.items() if plural == "events"]


def test_an_event_says_who_what_and_why() -> None:
    async def test(server: FakeApiServer, recorder: Callable[[], EventRecorder]) -> None:
        recorder().record(EVENT)
        await server.wait_until(lambda: bool(events(server)))
        (found,) = events(server)
        assert found["involvedObject"] == {"apiVersion": "v1", "kind": "Pod", "namespace": "shop", "name": "web", "uid": "uid-1"}
        assert (found["reason"], found["message"], found["type"], found["count"]) == ("NotCaptured", "no room", "Warning", 1)
        assert found["source"] == {"component": "ztunnel", "host": "n1"}

    with_recorder(test)


def test_what_happens_again_is_counted_but_not_more_often_than_people_read() -> None:
    async def test(server: FakeApiServer, recorder: Callable[[], EventRecorder]) -> None:
        ours = recorder()
        ours.record(EVENT)
        ours.record(EVENT)
        await server.wait_until(lambda: bool(events(server)))
        await trio.sleep(QUIET_SECONDS + 1)
        assert len(server.requests) == 1
        ours.record(EVENT)
        await server.wait_until(lambda: events(server)[0]["count"] == 2)
        assert events(server)[0]["lastTimestamp"] > events(server)[0]["firstTimestamp"]
        ours.record(replace(EVENT, message="other"))
        await server.wait_until(lambda: len(events(server)) == 2)

    with_recorder(test)


def test_an_event_of_our_last_life_or_one_that_expired_is_no_trouble() -> None:
    async def test(server: FakeApiServer, recorder: Callable[[], EventRecorder]) -> None:
        recorder().record(EVENT)
        await server.wait_until(lambda: bool(events(server)))
        first = events(server)[0]["lastTimestamp"]
        await trio.sleep(5)
        again = recorder()
        again.record(EVENT)
        await server.wait_until(lambda: events(server)[0]["lastTimestamp"] > first)
        server.remove("Event", "shop", EVENT.name)
        await trio.sleep(QUIET_SECONDS)
        again.record(EVENT)
        await server.wait_until(lambda: bool(events(server)))

    with_recorder(test)


def test_an_api_server_that_is_away_holds_nobody_up() -> None:
    async def test(server: FakeApiServer, recorder: Callable[[], EventRecorder]) -> None:
        server.faults.down = True
        ours = recorder()
        for number in range(QUEUE + 50):
            ours.record(replace(EVENT, message=str(number)))
        await wait_all_tasks_blocked()
        server.faults.down = False
        ours.record(EVENT)
        await server.wait_until(lambda: any(event["message"] == "no room" for event in events(server)))

    with_recorder(test)

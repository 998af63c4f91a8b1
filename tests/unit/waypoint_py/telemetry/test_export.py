"""Spans on their way to a collector: batches, tries, and what is lost when nobody takes them."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from mesh.model.l7.waypoint import Tracing
from mesh.runtime.outbound import Dialler, OutboundError, Target, permit_any
from mesh.telemetry.metrics import Registry
from tests.unit.waypoint_py.telemetry.collector import Collector
from tests.unit.waypoint_py.telemetry.records import request_record
from waypoint_py.observer import RequestRecord
from waypoint_py.telemetry import export
from waypoint_py.telemetry.context import SpanContext
from waypoint_py.telemetry.export import BATCH, MAX_WAITING, SpanExporter

ENDPOINT = "http://collector.example:4318/v1/traces"


def recorded(number: int = 1) -> RequestRecord:
    record = request_record()
    record.span = SpanContext(0xABC, number, 0)
    return record


class Stage:
    """An exporter and a collector, with nothing but memory between."""

    def __init__(self) -> None:
        self.collector = Collector()
        self.settings = Tracing(ENDPOINT, 100.0, (("env", "test"),))
        self.registry = Registry()
        self.dialled: list[Target] = []
        self.unreachable = False
        self.nursery: trio.Nursery
        self.exporter = SpanExporter(
            lambda: self.settings, self.dial, self.registry, resource=[("service.name", "waypoint.shop")], version="1", rng=random.Random(1)
        )

    async def dial(self, target: Target) -> trio.abc.Stream:
        self.dialled.append(target)
        await trio.lowlevel.checkpoint()
        if self.unreachable:
            raise OutboundError("nobody there")
        ours, theirs = trio.testing.memory_stream_pair()
        self.nursery.start_soon(self.collector.serve, theirs)
        return ours

    def put(self, *numbers: int) -> None:
        for number in numbers:
            self.exporter.put(recorded(number))

    @property
    def counts(self) -> dict[str, float]:
        (family,) = [each for each in self.registry.snapshot().families if each.name == "waypoint_spans"]
        return {sample.labels[0]: sample.value for sample in family.samples}

    @property
    def spans(self) -> Sequence[int]:
        return [int.from_bytes(span.span_id, "big") for span in self.collector.spans]

    async def settled(self) -> None:
        while self.exporter.waiting:  # noqa: ASYNC110  # a number, which sets no event
            await trio.sleep(0.1)


def play(scene: Callable[[Stage], Awaitable[None]], *, running: bool = True) -> Stage:
    stage = Stage()

    async def main() -> None:
        async with trio.open_nursery() as stage.nursery:
            if running:
                await stage.nursery.start(stage.exporter.run)
            await scene(stage)
            stage.nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    return stage


def test_spans_arrive_together_with_who_sends_them() -> None:
    async def scene(stage: Stage) -> None:
        stage.put(1, 2, 3)
        await stage.settled()

    stage = play(scene)
    assert stage.spans == [1, 2, 3]
    (request,) = stage.collector.received
    assert request.resource_spans[0].resource.attributes[0].value.string_value == "waypoint.shop"
    assert "env" in [each.key for each in stage.collector.spans[0].attributes]
    (head,) = stage.collector.heads
    headers = dict(head.headers)
    assert (head.method, head.target, headers[b"host"]) == (b"POST", b"/v1/traces", b"collector.example:4318")
    assert headers[b"content-type"] == b"application/x-protobuf"
    assert stage.counts == {"sent": 3, "dropped": 0, "failed": 0}


def test_a_span_waits_for_others_but_not_long() -> None:
    async def scene(stage: Stage) -> None:
        stage.put(1)
        await trio.sleep(export.INTERVAL / 2)
        assert not stage.collector.received
        await trio.sleep(export.INTERVAL)
        assert stage.spans == [1]

    play(scene)


def test_a_full_batch_does_not_wait() -> None:
    async def scene(stage: Stage) -> None:
        stage.put(*range(1, BATCH + 6))
        await trio.sleep(export.INTERVAL / 2)
        assert len(stage.spans) == BATCH
        await stage.settled()
        assert stage.spans == list(range(1, BATCH + 6))

    play(scene)


def test_who_hurries_does_not_wait() -> None:
    async def scene(stage: Stage) -> None:
        await trio.testing.wait_all_tasks_blocked()
        stage.put(1)
        stage.exporter.hurry()
        await trio.sleep(export.INTERVAL / 2)
        assert stage.spans == [1]

    play(scene)


def test_batches_share_a_connection() -> None:
    async def scene(stage: Stage) -> None:
        for number in range(3):
            stage.put(number + 1)
            await stage.settled()

    stage = play(scene)
    assert (stage.spans, stage.collector.connections) == ([1, 2, 3], 1)


def test_a_connection_that_was_closed_meanwhile_costs_nothing() -> None:
    async def scene(stage: Stage) -> None:
        stage.collector.closes = True
        for number in range(3):
            stage.put(number + 1)
            await stage.settled()

    stage = play(scene)
    assert (stage.spans, stage.collector.connections) == ([1, 2, 3], 3)
    assert stage.counts == {"sent": 3, "dropped": 0, "failed": 0}


def test_a_full_queue_drops_the_newest_and_counts_them() -> None:
    async def scene(stage: Stage) -> None:
        await trio.lowlevel.checkpoint()
        stage.put(*range(MAX_WAITING + 10))

    stage = play(scene, running=False)
    assert stage.exporter.waiting == MAX_WAITING
    assert stage.counts["dropped"] == 10


def test_a_collector_that_is_busy_is_asked_again() -> None:
    async def scene(stage: Stage) -> None:
        stage.collector.statuses = [503, 429, 200]
        stage.put(1)
        await stage.settled()

    stage = play(scene)
    assert stage.spans == [1, 1, 1]
    assert stage.counts == {"sent": 1, "dropped": 0, "failed": 0}


@pytest.mark.parametrize(("status", "times"), [(400, 1), (404, 1), (500, 1), (301, 1), (502, export.TRIES), (503, export.TRIES)])
def test_what_a_collector_refuses_is_lost_and_counted(status: int, times: int) -> None:
    async def scene(stage: Stage) -> None:
        stage.collector.status = status
        stage.put(1, 2)
        await stage.settled()
        stage.collector.status = 200
        stage.put(3)
        await stage.settled()

    stage = play(scene)
    assert len(stage.collector.received) == times + 1
    assert stage.counts == {"sent": 1, "dropped": 0, "failed": 2}


def test_a_collector_that_is_away_is_tried_so_many_times() -> None:
    async def scene(stage: Stage) -> None:
        stage.unreachable = True
        stage.put(1)
        began = trio.current_time()
        await stage.settled()
        assert trio.current_time() - began < 20

    stage = play(scene)
    assert len(stage.dialled) == export.TRIES
    assert stage.counts == {"sent": 0, "dropped": 0, "failed": 1}


def test_a_collector_that_does_not_answer_is_not_waited_for_for_ever() -> None:
    async def scene(stage: Stage) -> None:
        stage.collector.silent = True
        stage.put(1)
        began = trio.current_time()
        await stage.settled()
        assert trio.current_time() - began < export.TRIES * (export.WITHIN + 10)

    assert play(scene).counts["failed"] == 1


def test_what_is_no_http_is_a_failure() -> None:
    class Liar(Collector):
        async def serve(self, stream: trio.abc.Stream) -> None:
            await stream.send_all(b"\x00\x01 not HTTP\r\n\r\n")
            await trio.sleep_forever()

    async def scene(stage: Stage) -> None:
        stage.collector = Liar()
        stage.put(1)
        await stage.settled()

    assert play(scene).counts["failed"] == 1


def test_an_endless_answer_is_a_failure() -> None:
    class Talker(Collector):
        async def serve(self, stream: trio.abc.Stream) -> None:
            try:
                await stream.send_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
                while True:
                    await stream.send_all(b"2000\r\n" + b"x" * 0x2000 + b"\r\n")
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass

    async def scene(stage: Stage) -> None:
        stage.collector = Talker()
        stage.put(1)
        await stage.settled()

    assert play(scene).counts["failed"] == 1


def test_tracing_that_is_switched_off_loses_what_waits() -> None:
    async def scene(stage: Stage) -> None:
        stage.put(1)
        stage.settings = Tracing()
        await stage.settled()

    stage = play(scene)
    assert (stage.dialled, stage.counts["failed"]) == ([], 1)


def test_another_collector_is_used_from_the_next_batch_on() -> None:
    async def scene(stage: Stage) -> None:
        stage.put(1)
        await stage.settled()
        stage.settings = Tracing("https://other.example/traces")
        stage.put(2)
        await stage.settled()

    stage = play(scene)
    assert [(target.secure, target.host, target.port) for target in stage.dialled] == [
        (False, "collector.example", 4318),
        (True, "other.example", 443),
    ]
    assert [head.target for head in stage.collector.heads] == [b"/v1/traces", b"/traces"]


def test_a_url_that_is_none_is_a_failure() -> None:
    async def scene(stage: Stage) -> None:
        stage.settings = Tracing("ftp://nowhere")
        stage.put(1)
        await stage.settled()

    assert play(scene).counts["failed"] == 1


def test_a_span_that_cannot_be_made_costs_its_batch_alone() -> None:
    async def scene(stage: Stage) -> None:
        broken = recorded()
        broken.span = SpanContext(1 << 200, 1, 0)
        stage.exporter.put(broken)
        await stage.settled()
        stage.put(2)
        await stage.settled()

    stage = play(scene)
    assert stage.spans == [2]
    assert stage.counts == {"sent": 1, "dropped": 0, "failed": 1}


@asynccontextmanager
async def on_loopback(collector: Collector, host: str) -> AsyncIterator[int]:
    listeners = await trio.open_tcp_listeners(0, host=host)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, collector.serve, listeners)
        yield listeners[0].socket.getsockname()[1]
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_spans_reach_a_collector_over_tcp(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "INTERVAL", 0.01)
    collector = Collector()

    async def main() -> None:
        async with on_loopback(collector, host) as port, trio.open_nursery() as nursery:
            bracketed = f"[{host}]" if ":" in host else host
            settings = Tracing(f"http://{bracketed}:{port}/v1/traces")
            exporter = SpanExporter(
                lambda: settings, Dialler(refuse=permit_any), Registry(), resource=[], version="1", rng=random.Random(1)
            )
            await nursery.start(exporter.run)
            exporter.put(recorded(5))
            with trio.fail_after(10):
                while not collector.spans or exporter.waiting:  # noqa: ASYNC110  # numbers set no events
                    await trio.sleep(0.01)
            nursery.cancel_scope.cancel()

    trio.run(main)
    assert [int.from_bytes(span.span_id, "big") for span in collector.spans] == [5]

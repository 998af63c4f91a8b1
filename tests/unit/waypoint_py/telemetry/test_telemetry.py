"""What becomes of records: through a real waypoint, between real clients and applications."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from mesh.model.l7.policy import AuthorizationPolicy, PolicyAction, PolicyRule
from mesh.model.l7.routing import Mirror, Origin, Retry
from mesh.model.l7.waypoint import AccessLogging, Protocol, Tracing, WaypointSettings
from mesh.telemetry import log
from mesh.telemetry.metrics import Number, Registry
from mesh.telemetry.output import LogOutput
from tests.unit.waypoint_py.harness import HOST, ITSELF, Echo, Echo2, Log, World, default_route
from tests.unit.waypoint_py.telemetry.records import connection, request_record
from waypoint_py.observer import ConnectionRecord, RefusalRecord, RequestRecord
from waypoint_py.policy.authorize import DryRunVerdict, Judgement
from waypoint_py.telemetry.access_log import AccessLog
from waypoint_py.telemetry.metrics import WaypointMetrics
from waypoint_py.telemetry.telemetry import Telemetry

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
SPAN = "00f067aa0ba902b7"
ENDPOINT = "http://collector:4318/v1/traces"


class Kept:
    """Spans that go nowhere."""

    def __init__(self) -> None:
        self.records: list[RequestRecord] = []

    def put(self, record: RequestRecord) -> None:
        self.records.append(record)


class Both(Telemetry):
    """The real one, told first, and what the harness looks at."""

    def __init__(self, world: World, path: Path) -> None:
        self.registry = Registry()
        self.spans = Kept()
        self.path = path
        self.fd = os.open(path, os.O_CREAT | os.O_WRONLY)
        self.inner: Log = world.log
        access_log = AccessLog(
            lambda: world.store.settings.access_log, LogOutput(self.fd), world.reactor.call_soon, wanted=lambda: log.wants("access", "info")
        )
        super().__init__(lambda: world.store.settings, WaypointMetrics(self.registry), access_log, self.spans, world.rng)
        world.plane.observer = self

    def request_began(self, record: RequestRecord) -> None:
        super().request_began(record)
        self.inner.request_began(record)

    def request_ended(self, record: RequestRecord) -> None:
        super().request_ended(record)
        self.inner.request_ended(record)

    def connection_opened(self, record: ConnectionRecord) -> None:
        super().connection_opened(record)
        self.inner.connection_opened(record)

    def connection_closed(self, record: ConnectionRecord) -> None:
        super().connection_closed(record)
        self.inner.connection_closed(record)

    def refused(self, record: RefusalRecord) -> None:
        super().refused(record)
        self.inner.refused(record)

    @property
    def lines(self) -> list[str]:
        return self.path.read_text().splitlines()

    def series(self, family: str) -> dict[tuple[str, ...], Number]:
        found = [each for each in self.registry.snapshot().families if each.name == family]
        return {sample.labels: sample.value for each in found for sample in each.samples}


def settings(*, log: AccessLogging | None = None, tracing: Tracing | None = None) -> WaypointSettings:
    return WaypointSettings("shop", "waypoint", "all", access_log=log or AccessLogging(), tracing=tracing or Tracing())


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def told(world: World, tmp_path: Path) -> Iterator[Both]:
    both = Both(world, tmp_path / "log")
    yield both
    os.close(both.fd)


def test_requests_are_logged_and_counted_and_changes_hold_at_once(world: World, told: Both) -> None:
    async def main() -> None:
        async with world.application(Echo()) as address:
            world.describe(world.endpoint(address))
            client = await world.client()
            assert (await client.get("/first")).status == 200
            await world.until(lambda: len(told.lines) == 1)
            assert '"GET /first HTTP/1.1" 200 - via_upstream - "-" 0 11 ' in told.lines[0]
            assert told.lines[0].endswith(" - default")
            world.push(settings(log=AccessLogging(as_json=True, json=(("path", "%REQ(:PATH)%"),))))
            assert (await client.get("/second")).status == 200
            world.push(settings(log=AccessLogging(enabled=False)))
            assert (await client.get("/third")).status == 200
            world.push(settings(log=AccessLogging(format="%RESPONSE_CODE% %RESPONSE_FLAGS%")))
            world.configure(routes=())
            assert (await client.get("/fourth")).status == 404
            await world.until(lambda: len(told.lines) == 3)
            assert told.lines[1:] == ['{"path":"/second"}', "404 NR"]
            assert await world.connect("10.96.0.77:80") == 404
            await world.until(lambda: len(told.lines) == 4)
            assert told.lines[3] == "404 -"
            requests = told.series("istio_requests")
            assert sorted(requests.values()) == [1, 3]
            assert all(labels[0] == "waypoint" and HOST in labels for labels in requests)
            assert list(told.series("waypoint_refused").values()) == [1]

    world.run(main)


@pytest.mark.parametrize("upstream", [1, 2])
def test_a_sampled_trace_goes_through_the_waypoint_as_its_parent(upstream: int, world: World, told: Both) -> None:
    async def main() -> None:
        echo: Echo | Echo2 = Echo() if upstream == 1 else Echo2()
        async with world.application(echo) as address:
            world.describe(world.endpoint(address), protocol=Protocol.HTTP if upstream == 1 else Protocol.HTTP2)
            world.push(settings(tracing=Tracing(ENDPOINT, 0.0), log=AccessLogging(format="%TRACE_ID%")))
            client = await world.client()
            headers = {"traceparent": f"00-{TRACE}-{SPAN}-01", "tracestate": "a=1"}
            assert (await client.get("/", headers=headers)).status == 200
            (record,) = told.spans.records
            assert record.span is not None
            assert echo.seen[0].headers["traceparent"] == f"00-{TRACE}-{record.span.span_id:016x}-01"
            assert echo.seen[0].headers["tracestate"] == "a=1"
            assert f"{record.span.parent_id:016x}" == SPAN
            await world.until(lambda: told.lines == [TRACE])

    world.run(main)


def test_without_a_collector_the_clients_trace_passes_as_it_is(world: World, told: Both) -> None:
    async def main() -> None:
        echo = Echo()
        async with world.application(echo) as address:
            world.describe(world.endpoint(address))
            world.push(settings(tracing=Tracing("", 100.0)))
            client = await world.client()
            said = {"traceparent": f"00-{TRACE}-{SPAN}-01", "tracestate": "a=1", "b3": f"{TRACE}-{SPAN}-1"}
            await client.get("/", headers=said)
            await client.get("/")
            assert {name: echo.seen[0].headers[name] for name in said} == said
            assert "traceparent" not in echo.seen[1].headers
            assert not told.spans.records

    world.run(main)


def test_the_trace_of_the_clients_agent_is_not_the_requests(world: World, told: Both) -> None:
    record = request_record(connection(traceparent=f"00-{TRACE}-{SPAN}-01"))
    world.push(settings(tracing=Tracing(ENDPOINT, 100.0)))
    told.request_began(record)
    assert record.span is not None
    assert record.span.parent_id == 0
    assert record.trace != TRACE
    world.run(trio.lowlevel.checkpoint)


def test_all_tries_and_copies_of_a_request_have_one_parent(world: World, told: Both) -> None:
    async def main() -> None:
        echo = Echo(lambda seen: (503, {}, b""))
        async with world.application(echo) as address:
            route = default_route(retry=Retry(attempts=2, on=("5xx",), backoff_base=0.001), mirrors=(Mirror(ITSELF.destination, 100.0),))
            world.describe(world.endpoint(address), routes=[route])
            world.push(settings(tracing=Tracing(ENDPOINT, 100.0)))
            assert (await (await world.client()).get("/")).status == 503
            await world.until(lambda: len(echo.seen) == 4)
            parents = {seen.headers["traceparent"] for seen in echo.seen}
            (record,) = told.spans.records
            assert record.span is not None
            assert parents == {f"00-{record.span.trace_id:032x}-{record.span.span_id:016x}-01"}

    world.run(main)


def test_what_is_refused_is_traced_too(world: World, told: Both) -> None:
    async def main() -> None:
        async with world.application(Echo()) as address:
            world.describe(world.endpoint(address))
            deny = AuthorizationPolicy(Origin("AuthorizationPolicy", "shop", "no"), PolicyAction.DENY, rules=(PolicyRule(),))
            world.push(settings(tracing=Tracing(ENDPOINT, 100.0)), deny)
            assert (await (await world.client()).get("/")).status == 403
            assert [record.status for record in told.spans.records] == [403]

    world.run(main)


def test_policies_that_are_only_tried_are_counted_and_let_through(world: World, told: Both) -> None:
    async def main() -> None:
        async with world.application(Echo()) as address:
            world.describe(world.endpoint(address))
            rules = (PolicyRule(),)
            tried = AuthorizationPolicy(Origin("AuthorizationPolicy", "shop", "tried"), PolicyAction.DENY, rules=rules, dry_run=True)
            audit = AuthorizationPolicy(Origin("AuthorizationPolicy", "shop", "seen"), PolicyAction.AUDIT, rules=rules)
            world.push(tried, audit)
            assert (await (await world.client()).get("/")).status == 200
            assert told.series("waypoint_dry_run_verdicts") == {(HOST, "ns[shop]-policy[tried]-rule[0]", "denies"): 1}
            assert told.series("waypoint_audited") == {(HOST, "ns[shop]-policy[seen]-rule[0]"): 1}

    world.run(main)


def test_connections_are_logged_and_counted(world: World, told: Both) -> None:
    async def main() -> None:
        async def answer(stream: trio.SocketStream) -> None:
            await stream.send_all(b"hello " + await stream.receive_some())

        async with world.application(answer) as address:
            world.describe(world.endpoint(address), protocol=Protocol.TCP)
            stream = await world.open()
            await stream.send_all(b"you")
            await world.until(lambda: list(told.series("istio_tcp_received_bytes").values()) == [3])
            await stream.send_eof()
            while await stream.receive_some():
                pass
            await world.until(lambda: told.lines)
            assert told.lines[0].startswith("[")
            assert '"- - -" 0 - - - "-" 3 9 ' in told.lines[0]
            assert list(told.series("istio_tcp_sent_bytes").values()) == [9]
            assert list(told.series("istio_tcp_connections_closed").values()) == [1]

    world.run(main)


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    made = io.StringIO()
    log.configure(stream=made)
    yield made
    log.configure()


@pytest.mark.parametrize(
    ("levels", "expected"), [("info", ["dry_run", "audit"]), ("debug", ["dry_run", "dry_run", "audit"]), ("policy=off,info", [])]
)
def test_verdicts_are_told_by_level(levels: str, expected: list[str], world: World, told: Both, stream: io.StringIO) -> None:
    world.run(trio.lowlevel.checkpoint)
    log.set_levels(log.LogLevels.parse(levels))
    record = request_record(path=b"/a\nb")
    tried = (DryRunVerdict(True, "p", "dry-run: would be denied by p"), DryRunVerdict(False, "q", "dry-run: would be allowed by q"))
    record.judged(Judgement("", dry_run=tried, audited=("r",)))
    told.request_ended(record)
    lines = [line.split("\t") for line in stream.getvalue().splitlines()]
    assert [line[3] for line in lines] == expected
    assert all('path="/a\\nb"' in line[4] and 'request_id="id-1"' in line[4] for line in lines)

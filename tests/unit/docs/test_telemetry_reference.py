"""Every metric, access log field and response flag is in its reference page, and no other is."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

from mesh.model.address import SocketAddress, parse_ip
from mesh.model.identity import SpiffeId
from mesh.model.l7.waypoint import Tracing
from mesh.runtime.outbound import Dialler
from mesh.telemetry.access import AccessEvent, AccessPeer, AccessRecord, format_json
from mesh.telemetry.metrics import DnsMetrics, Registry, TcpMetrics, WorkloadManagerMetrics, XdsMetrics, add_build, add_process, tcp_labels
from mesh.telemetry.operators import METADATA
from tests.unit.waypoint_py.telemetry.records import connection_record, request_record
from waypoint_py.observer import RefusalRecord
from waypoint_py.policy.authorize import DryRunVerdict, Judgement
from waypoint_py.telemetry.context import TRACE_HEADERS
from waypoint_py.telemetry.export import BATCH, MAX_WAITING, SpanExporter
from waypoint_py.telemetry.metrics import BOUNDS, MAX_SERIES, WaypointMetrics
from waypoint_py.telemetry.spans import attributes_of
from waypoint_py.verdict import Flag
from ztunnel_py.mover.ledger import Failure
from ztunnel_py.mover.outbound import flag_of

ROOT = Path(__file__).parents[3]
SECTIONS = dict(
    section.partition("\n")[::2] for section in re.split(r"^## ", (ROOT / "docs/reference/telemetry.md").read_text(), flags=re.MULTILINE)
)


def listed(text: str) -> set[str]:
    """The names in the first column of the tables."""
    cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("|")]
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def metrics_of_the_agent() -> set[str]:
    registry = Registry()
    TcpMetrics(registry).series(
        tcp_labels("source", source=None, destination=None, service=None, source_identity=None, mutual_tls=False)
    ).close("CONNECT")
    lookups = DnsMetrics(registry).series("A", "udp", None)
    lookups.forwarded()
    lookups.ended(0.1, failed=True)
    xds = XdsMetrics(registry)
    xds.terminated("Error")
    xds.received("type", 1)
    WorkloadManagerMetrics(registry)
    add_build(registry, "ztunnel", "1")
    add_process(registry)
    return {family.name for family in registry.snapshot().families}


def test_the_metrics_of_the_agent_are_listed() -> None:
    assert listed(SECTIONS["Metrics of the agent"]) == metrics_of_the_agent()


def metrics_of_a_waypoint() -> set[str]:
    """What its modules register, since the program itself needs a control plane."""
    registry = Registry()
    counted = WaypointMetrics(registry)
    judgement = Judgement("", dry_run=(DryRunVerdict(True, "p", ""),), audited=("p",))
    request = request_record(headers=[(b"content-type", b"application/grpc")])
    request.judged(judgement)
    counted.request(request)
    connection = connection_record()
    connection.add_flags(Flag.UPSTREAM_CONNECTION_FAILURE)
    counted.opened(connection)
    counted.closed(connection)
    counted.refused(RefusalRecord(0.0, None, connection.connection.destination, "", 0, ""))
    counted._merged.labelled()
    SpanExporter(Tracing, Dialler(), registry, resource=(), version="1", rng=random.Random(1))
    xds = XdsMetrics(registry)
    xds.terminated("Error")
    xds.received("type", 1)
    add_build(registry, "waypoint", "1")
    add_process(registry)
    own = set(re.findall(r'"(waypoint_[a-z_]+)"', (ROOT / "waypoint_py/admin.py").read_text()))
    return own | {family.name for family in registry.snapshot().families}


def test_the_metrics_of_a_waypoint_are_listed() -> None:
    assert listed(SECTIONS["Metrics of a waypoint"]) == metrics_of_a_waypoint()


def test_the_buckets_of_a_waypoint_are_listed() -> None:
    text = SECTIONS["Metrics of a waypoint"].partition("Upper bounds of buckets")[2].partition(":")[2]
    assert tuple(map(float, re.findall(r"[0-9.]*[0-9]", text))) == BOUNDS
    assert str(MAX_SERIES) in SECTIONS["Metrics of a waypoint"]


def test_the_attributes_of_spans_are_listed() -> None:
    record = request_record(headers=[(b"content-type", b"application/grpc")], status=500)
    record.judged(Judgement("b", "p", dry_run=(DryRunVerdict(True, "p", "b"),), audited=("p",)))
    record.grpc_status, record.attempts = 14, 2
    made = {key for key, _ in attributes_of(record, "failed", ())}
    table = SECTIONS["Traces"].partition("| attribute |")[2]
    assert listed(table) == made
    for bound in (BATCH, MAX_WAITING):
        assert str(bound) in SECTIONS["Traces"]


def test_the_headers_of_traces_are_listed() -> None:
    table = SECTIONS["Traces"].partition("| attribute |")[0]
    assert listed(table) == {name.decode() for name in TRACE_HEADERS} - {"tracestate"}
    assert "`tracestate`" in SECTIONS["Traces"]


def test_the_settings_of_a_waypoints_log_are_those_that_are_read() -> None:
    source = (ROOT / "mesh/kube/meshconfig.py").read_text()
    assert all(f"`{key}`" in SECTIONS["The access log of a waypoint"].partition("DYNAMIC_METADATA")[2] for key in METADATA)
    assert listed(SECTIONS["The access log of a waypoint"]) == set(re.findall(r'"(accessLog[A-Z][A-Za-z]+)"', source))


def test_the_metrics_of_istiod_are_listed() -> None:
    source = "".join(path.read_text() for path in (ROOT / "istiod_py").rglob("*.py"))
    built = set(re.findall(r'"((?:pilot|citadel)_[a-z_]+)"', source))
    assert listed(SECTIONS["Metrics of istiod"]) == built | {"istio_build", "process_open_fds", "process_max_fds"}


def test_the_fields_and_flags_of_the_access_log_are_listed() -> None:
    address, peer = SocketAddress(parse_ip("10.0.0.1"), 1), AccessPeer("w", "n", "c", SpiffeId("cluster.local", "n", "a"))
    record = AccessRecord(
        AccessEvent.COMPLETE, "inbound", address, peer, address, peer, 0.0, hbone_address="10.0.0.1:1", service="s", error="e",
        response_flags="DENY", policy="p", rule=0, because="b", closed_first="downstream",
    )  # fmt: skip
    fields = json.loads(format_json(record)).keys() - {"level", "time", "scope", "message"}
    reasons = ("", "connection timed out, maybe a NetworkPolicy", "identity error", "tls failed", "h2 failed")
    flags = {"DENY", Failure("broke").flags, *map(flag_of, reasons)}
    assert listed(SECTIONS["The access log"]) == fields | flags

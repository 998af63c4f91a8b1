"""What a waypoint counts, and under which labels."""

from __future__ import annotations

from ipaddress import ip_address

import pytest
from msgspec.structs import replace

from mesh.http.message import Headers
from mesh.model.address import SocketAddress
from mesh.telemetry.metrics import Number, Registry, render
from tests.unit.waypoint_py.telemetry.records import CALLER, HOST, POD, connection, connection_record, endpoint, request_record
from waypoint_py.context import REMEMBERED
from waypoint_py.observer import RefusalRecord, RequestRecord
from waypoint_py.policy.authorize import DryRunVerdict, Judgement
from waypoint_py.telemetry import metrics
from waypoint_py.telemetry.metrics import WaypointMetrics
from waypoint_py.verdict import Flag

CALLERS = "spiffe://cluster.local/ns/apps/sa/client"
GRPC: Headers = [(b"content-type", b"application/grpc")]


class Counted:
    """Metrics, and what a scrape of them says."""

    def __init__(self) -> None:
        self.registry = Registry()
        self.metrics = WaypointMetrics(self.registry)

    def series(self, family: str) -> dict[tuple[str, ...], Number]:
        found = [each for each in self.registry.snapshot().families if each.name == family]
        return {sample.labels: sample.value for each in found for sample in each.samples}

    def labels(self, family: str = "istio_requests") -> list[dict[str, str]]:
        found = [each for each in self.registry.snapshot().families if each.name == family]
        return [dict(zip(each.labels, sample.labels, strict=True)) for each in found for sample in each.samples]

    def only(self, record: RequestRecord) -> dict[str, str]:
        self.metrics.request(record)
        (labels,) = self.labels()
        return labels


def test_a_request_is_counted_under_istios_labels() -> None:
    assert Counted().only(request_record()) == {
        "reporter": "waypoint",
        "source_workload": "client",
        "source_workload_namespace": "apps",
        "source_canonical_service": "client",
        "source_canonical_revision": "v2",
        "source_principal": "spiffe://cluster.local/ns/apps/sa/client",
        "source_app": "client",
        "source_version": "v2",
        "source_cluster": "west",
        "source_region": "eu",
        "source_zone": "eu-1",
        "destination_workload": "web",
        "destination_workload_namespace": "shop",
        "destination_canonical_service": "web",
        "destination_canonical_revision": "v1",
        "destination_principal": "spiffe://cluster.local/ns/shop/sa/web",
        "destination_app": "web",
        "destination_version": "v1",
        "destination_cluster": "Kubernetes",
        "destination_region": "unknown",
        "destination_zone": "unknown",
        "destination_service": HOST,
        "destination_service_name": "web",
        "destination_service_namespace": "shop",
        "request_protocol": "http",
        "response_code": "200",
        "grpc_response_status": "",
        "response_flags": "-",
        "connection_security_policy": "mutual_tls",
    }


def refused() -> RequestRecord:
    record = request_record(status=403)
    record.upstream = None
    return record


def left() -> RequestRecord:
    record = request_record(status=None)
    record.add_flags(Flag.DOWNSTREAM_CONNECTION_TERMINATION)
    return record


def failed() -> RequestRecord:
    record = request_record(status=503)
    record.add_flags(Flag.UPSTREAM_CONNECTION_FAILURE, Flag.UPSTREAM_RETRY_LIMIT_EXCEEDED)
    return record


def called(status: int | None) -> RequestRecord:
    record = request_record(headers=GRPC, method=b"POST")
    record.grpc_status = status
    return record


def to_a_workload() -> RequestRecord:
    record = request_record(connection(service=None, target=POD), status=403)
    record.destination = record.upstream = None
    return record


def outside_the_mesh() -> RequestRecord:
    record = request_record()
    record.upstream = endpoint(None)
    return record


def rerouted() -> RequestRecord:
    """By a route, to another service than the one that was called."""
    record = request_record()
    record.upstream = endpoint(replace(POD, workload_name="api", canonical_name="api"))
    return record


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (refused(), {"response_code": "403", "destination_workload": "unknown", "destination_service": HOST}),
        (refused(), {"destination_principal": "unknown", "source_principal": CALLERS}),
        (left(), {"response_code": "0", "response_flags": "DC", "destination_workload": "web"}),
        (failed(), {"response_code": "503", "response_flags": "UF,URX"}),
        (called(0), {"request_protocol": "grpc", "grpc_response_status": "0", "response_code": "200"}),
        (called(14), {"request_protocol": "grpc", "grpc_response_status": "14"}),
        (called(None), {"request_protocol": "grpc", "grpc_response_status": ""}),
        (to_a_workload(), {"destination_service": "unknown", "destination_service_name": "unknown", "destination_workload": "web"}),
        (outside_the_mesh(), {"destination_workload": "unknown", "destination_cluster": "unknown", "destination_service": HOST}),
        (rerouted(), {"destination_workload": "api", "destination_service": HOST}),
        (request_record(connection(workload=None)), {"source_workload": "unknown", "source_principal": CALLERS}),
    ],
)
def test_labels_say_how_a_request_ended(record: RequestRecord, expected: dict[str, str]) -> None:
    found = Counted().only(record)
    assert {name: found[name] for name in expected} == expected


def test_what_a_client_writes_makes_no_label() -> None:
    counted = Counted()
    for number in range(300):
        odd = request_record(method=b"M%d" % number, path=b"/%d" % number, headers=[(b"user-agent", b"%d" % number)])
        odd.authority = b"host-%d" % number
        counted.metrics.request(odd)
    assert list(counted.series("istio_requests").values()) == [300]


def test_sizes_and_times_are_in_istios_buckets() -> None:
    counted = Counted()
    counted.metrics.request(request_record())  # 12 ms, 7 bytes in, 2000 out

    def first_bucket(family: str) -> str:
        return next(labels[-1] for labels, value in counted.series(family).items() if value == 1)

    assert first_bucket("istio_request_duration_milliseconds") == "25.0"
    assert first_bucket("istio_request_bytes") == "10.0"
    assert first_bucket("istio_response_bytes") == "2500.0"
    text = render(counted.registry.snapshot()).decode()
    assert text.count("istio_request_duration_milliseconds_bucket") == 20
    assert 'le="3600000.0"} 1\n' in text
    sums = {labels[-1]: value for labels, value in counted.series("istio_response_bytes").items()}
    assert sums["sum"] == 2000
    assert sums["+Inf"] == 1


def test_messages_are_counted_of_grpc_alone() -> None:
    counted = Counted()
    counted.metrics.request(request_record())
    assert not counted.series("istio_request_messages")
    record = called(0)
    record.request_messages, record.response_messages = 3, 5
    counted.metrics.request(record)
    counted.metrics.request(record)
    assert list(counted.series("istio_request_messages").values()) == [6]
    assert list(counted.series("istio_response_messages").values()) == [10]


def test_a_connection_looks_a_series_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted()
    looked_up: list[object] = []
    find = counted.metrics._find

    def note(labels: tuple[str, ...], *, grpc: bool) -> metrics.RequestSeries:
        looked_up.append(labels)
        return find(labels, grpc=grpc)

    monkeypatch.setattr(counted.metrics, "_find", note)
    facts = connection()
    for _ in range(10):
        counted.metrics.request(request_record(facts))
    assert len(looked_up) == 1
    counted.metrics.request(request_record(facts, status=500))
    counted.metrics.request(request_record(connection()))
    assert len(looked_up) == 3
    assert sorted(counted.series("istio_requests").values()) == [1, 11]


def test_a_workload_that_changed_is_counted_as_it_is_now() -> None:
    counted = Counted()
    facts = connection()
    for revision in ("v1", "v2"):
        record = request_record(facts)
        record.upstream = endpoint(replace(POD, canonical_revision=revision))
        counted.metrics.request(record)
    assert sorted(labels["destination_version"] for labels in counted.labels()) == ["v1", "v2"]


def test_what_a_connection_remembers_has_a_bound() -> None:
    counted = Counted()
    facts = connection()
    for number in range(1000):
        record = request_record(facts)
        record.upstream = endpoint(replace(POD, uid=str(number)))
        counted.metrics.request(record)
    assert len(facts.memo) <= REMEMBERED
    assert list(counted.series("istio_requests").values()) == [1000]


def test_beyond_so_many_combinations_the_rest_is_counted_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "MAX_SERIES", 3)
    counted = Counted()
    for number in range(10):
        counted.metrics.request(request_record(connection(workload=replace(CALLER, workload_name=f"client-{number}"))))
        record = connection_record(connection(workload=replace(CALLER, workload_name=f"client-{number}")))
        counted.metrics.opened(record)
        counted.metrics.closed(record)
    for family in ("istio_requests", "istio_tcp_connections_closed"):
        series = counted.series(family)
        assert len(series) == 4
        assert sum(series.values()) == 10
        assert next(value for labels, value in series.items() if labels[0] == "other") == 7
    assert list(counted.series("waypoint_metrics_merged").values()) == [14]


def tcp(counted: Counted) -> list[list[Number]]:
    """Opened, closed, failed; bytes received and sent; open now."""
    names = ("connections_opened", "connections_closed", "connections_failed", "received_bytes", "sent_bytes", "sockets_open")
    return [list(counted.series(f"istio_tcp_{name}").values()) for name in names]


def test_a_living_connection_is_counted_as_far_as_it_has_come() -> None:
    counted = Counted()
    record = connection_record()
    counted.metrics.opened(record)
    assert tcp(counted) == [[1], [], [], [10], [20], [1]]
    record.bytes_received, record.bytes_sent = 110, 220
    assert tcp(counted)[3] == [110]
    record.bytes_received, record.bytes_sent = 111, 222
    counted.metrics.closed(record)
    assert tcp(counted) == [[1], [1], [], [111], [222], [0]]


def test_a_connection_has_istios_labels() -> None:
    counted = Counted()
    record = connection_record()
    record.add_flags(Flag.UPSTREAM_CONNECTION_TERMINATION)
    counted.metrics.opened(record)
    counted.metrics.closed(record)
    (labels,) = counted.labels("istio_tcp_connections_failed")
    expected = {
        "reporter": "waypoint", "request_protocol": "tcp", "response_flags": "UC", "source_workload": "client",
        "destination_workload": "web", "destination_service": HOST, "connection_security_policy": "mutual_tls",
    }  # fmt: skip
    assert {name: labels[name] for name in expected} == expected


def test_a_connection_that_is_being_dialled_is_counted_when_it_is_known_where_it_goes() -> None:
    counted = Counted()
    record = connection_record()
    record.upstream_local_address = None
    counted.metrics.opened(record)
    assert tcp(counted)[0] == []
    assert tcp(counted)[5] == [1]
    record.upstream = endpoint(replace(POD, workload_name="second"))
    record.upstream_local_address = SocketAddress(ip_address("10.1.0.9"), 1)
    assert [labels["destination_workload"] for labels in counted.labels("istio_tcp_connections_opened")] == ["second"]


@pytest.mark.parametrize("kind", ["request", "connection"])
def test_verdicts_of_policies_that_decide_nothing_are_counted(kind: str) -> None:
    counted = Counted()
    verdicts = (
        DryRunVerdict(True, "ns[shop]-policy[tried]-rule[0]", "dry-run: would be denied"),
        DryRunVerdict(False, "ns[shop]-policy[tried]-rule[1]", "dry-run: would be allowed"),
        DryRunVerdict(True, "", "dry-run: none would match"),
    )
    judgement = Judgement("no policy applies", dry_run=verdicts, audited=("ns[shop]-policy[seen]-rule[0]",))
    for _ in range(2):
        if kind == "request":
            request = request_record()
            request.judged(judgement)
            counted.metrics.request(request)
        else:
            record = connection_record()
            record.judged(judgement)
            counted.metrics.opened(record)
            counted.metrics.closed(record)
    assert counted.series("waypoint_dry_run_verdicts") == {
        (HOST, "ns[shop]-policy[tried]-rule[0]", "denies"): 2,
        (HOST, "ns[shop]-policy[tried]-rule[1]", "passes"): 2,
        (HOST, "none", "denies"): 2,
    }
    assert counted.series("waypoint_audited") == {(HOST, "ns[shop]-policy[seen]-rule[0]"): 2}


def test_policies_have_a_bound_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "MAX_SERIES", 2)
    counted = Counted()
    for number in range(5):
        record = request_record()
        record.judged(Judgement("", audited=(f"policy-{number}",)))
        counted.metrics.request(record)
    assert counted.series("waypoint_audited") == {(HOST, "policy-0"): 1, (HOST, "policy-1"): 1, ("other", "other"): 3}


def test_refusals_are_counted_by_what_they_were_answered() -> None:
    counted = Counted()
    for status in (403, 403, 0):
        counted.metrics.refused(RefusalRecord(0.0, None, SocketAddress(ip_address("fd00::1"), 1), "a:1", status, "no"))
    assert counted.series("waypoint_refused") == {("403",): 2, ("0",): 1}

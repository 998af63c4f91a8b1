"""Istio's metrics of a waypoint: requests, their times and sizes, gRPC messages, connections; and what policies said that did not decide.

A request costs one look-up in what its connection remembers, by where it went and how it ended, and a few additions. Labels come from what
the mesh knows and certificates prove, never from what a client writes; still their number is bounded.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, TypeAlias, cast

from mesh.model.workload import Workload
from mesh.telemetry.metrics import (
    UNKNOWN,
    FamilySnapshot,
    Histogram,
    Registry,
    Series,
    TcpLabels,
    TcpMetrics,
    TcpSeries,
    tcp_labels,
)
from waypoint_py.observer import ConnectionRecord, RefusalRecord, RequestRecord

BOUNDS: Final = (
    0.5, 1.0, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0, 2500.0, 5000.0, 10000.0, 30000.0, 60000.0, 300000.0, 600000.0,
    1800000.0, 3600000.0,
)  # fmt: skip
"""Upper bounds of buckets, of milliseconds and of bytes alike (Istio's)."""
MAX_SERIES: Final = 5000
"""Combinations of labels, of requests and of connections each. What comes beyond is counted without telling it apart: a page of metrics
has 70 lines for each of them."""
OTHER: Final = "other"
"""Every label's value there."""
LABELS: Final = (*TcpLabels._fields, "response_code", "grpc_response_status", "response_flags")
_POLICY_LABELS: Final = ("destination_service", "policy")


class RequestSeries:
    """The counters of all requests with the same labels."""

    __slots__ = ("duration", "labels", "received", "request_messages", "requests", "response_messages", "sent")

    def __init__(self, metrics: WaypointMetrics, labels: tuple[str, ...], *, grpc: bool) -> None:
        self.labels = labels
        self.requests = metrics.requests.labelled(*labels)
        self.duration = metrics.duration.labelled(*labels)
        self.received = metrics.received.labelled(*labels)
        self.sent = metrics.sent.labelled(*labels)
        self.request_messages = metrics.request_messages.labelled(*labels) if grpc else None
        self.response_messages = metrics.response_messages.labelled(*labels) if grpc else None

    def count(self, record: RequestRecord) -> None:
        self.requests.value += 1
        ended = record.ended
        self.duration.observe(0.0 if ended is None else 1000 * (ended - record.started))
        self.received.observe(record.bytes_received)
        self.sent.observe(record.bytes_sent)
        if self.request_messages is not None and self.response_messages is not None:
            self.request_messages.value += record.request_messages
            self.response_messages.value += record.response_messages


_Remembered: TypeAlias = tuple[Workload | None, RequestSeries]
"""The workload is held so that its number, by which it is looked up, cannot become another's."""


class _Living:
    """A connection that is carried now, and what of it has been counted."""

    __slots__ = ("received", "sent", "series")

    def __init__(self) -> None:
        self.series: TcpSeries | None = None
        self.received = 0
        self.sent = 0


class WaypointMetrics:
    """All that is counted of records. Nothing here waits; `request` is called for every request."""

    def __init__(self, registry: Registry) -> None:
        self.requests = registry.counter("istio_requests", "Requests", LABELS)
        self.duration = _histogram(registry, "istio_request_duration_milliseconds", "Time from a request's head to the end of its answer")
        self.received = _histogram(registry, "istio_request_bytes", "Bytes of requests' bodies")
        self.sent = _histogram(registry, "istio_response_bytes", "Bytes of answers' bodies")
        self.request_messages = registry.counter("istio_request_messages", "Messages of gRPC clients", LABELS)
        self.response_messages = registry.counter("istio_response_messages", "Messages of gRPC servers", LABELS)
        # Before the families that are made of them: a collector that is asked earlier brings them up to date.
        registry.collect_from(self._look_at_living)
        self._tcp = TcpMetrics(registry, ("waypoint",))
        self._dry_run = registry.counter(
            "waypoint_dry_run_verdicts", "What policies that are only tried would have done", (*_POLICY_LABELS, "verdict")
        )
        self._audited = registry.counter(
            "waypoint_audited", "Requests and connections that rules of AUDIT policies matched", _POLICY_LABELS
        )
        self._refused = registry.counter("waypoint_refused", "Connections and CONNECTs that were not let in", ("response_code",))
        self._merged = registry.counter(
            "waypoint_metrics_merged", "Combinations of labels that were counted as 'other', because there are too many"
        )
        self._series: dict[tuple[str, ...], RequestSeries] = {}
        self._tcp_series: dict[TcpLabels, TcpSeries] = {}
        self._living: dict[ConnectionRecord, _Living] = {}
        self._policies: set[tuple[str, ...]] = set()

    # Requests

    def request(self, record: RequestRecord) -> None:
        """One that is over."""
        endpoint = record.upstream
        workload = record.connection.target if endpoint is None else endpoint.workload
        response = record.response
        grpc = record.grpc_status if record.is_grpc else _NO_GRPC
        key = (id(workload), response.status if response is not None else 0, grpc, record.flags)
        memo = cast("dict[object, _Remembered]", record.connection.memo)
        remembered = memo.get(key)
        if remembered is None:
            remembered = (workload, self._find(self._labels(record, workload), grpc=record.is_grpc))
            record.connection.remember(key, remembered)
        remembered[1].count(record)
        if record.dry_run or record.audited:
            self._judged(record)

    def _labels(self, record: RequestRecord, workload: Workload | None) -> tuple[str, ...]:
        connection = record.connection
        labels = tcp_labels(
            "waypoint",
            source=connection.workload,
            destination=workload,
            service=connection.service,
            source_identity=connection.peer,
            mutual_tls=True,
            protocol="grpc" if record.is_grpc else "http",
        )
        grpc = str(record.grpc_status) if record.is_grpc and record.grpc_status is not None else ""
        return (*labels, str(record.status), grpc, ",".join(record.response_flags) or "-")

    def _find(self, labels: tuple[str, ...], *, grpc: bool) -> RequestSeries:
        found = self._series.get(labels)
        if found is None:
            if len(self._series) >= MAX_SERIES:
                self._merged.labelled().value += 1
                labels = (OTHER,) * len(labels)
                grpc = True
                found = self._series.get(labels)
            if found is None:
                found = self._series[labels] = RequestSeries(self, labels, grpc=grpc)
        return found

    # Connections

    def opened(self, record: ConnectionRecord) -> None:
        self._living[record] = _Living()
        self._tcp.sockets_open["waypoint"].value += 1

    def closed(self, record: ConnectionRecord) -> None:
        living = self._living.pop(record, None)
        if living is None:
            return
        self._tcp.sockets_open["waypoint"].value -= 1
        self._bring_up_to_date(record, living).close(",".join(record.response_flags) or "-")
        if record.dry_run or record.audited:
            self._judged(record)

    def _look_at_living(self) -> Iterable[FamilySnapshot]:
        """Where a connection goes is not known when it is opened; so it is counted when somebody asks, and when it ends."""
        for record, living in self._living.items():
            if living.series is not None or record.upstream_local_address is not None:
                self._bring_up_to_date(record, living)
        return ()

    def _bring_up_to_date(self, record: ConnectionRecord, living: _Living) -> TcpSeries:
        series = living.series
        if series is None:
            series = living.series = self._find_tcp(record)
            series.opened += 1
        series.received += record.bytes_received - living.received
        series.sent += record.bytes_sent - living.sent
        living.received, living.sent = record.bytes_received, record.bytes_sent
        return series

    def _find_tcp(self, record: ConnectionRecord) -> TcpSeries:
        connection = record.connection
        labels = tcp_labels(
            "waypoint",
            source=connection.workload,
            destination=record.upstream.workload if record.upstream is not None else connection.target,
            service=connection.service,
            source_identity=connection.peer,
            mutual_tls=True,
        )
        found = self._tcp_series.get(labels)
        if found is None:
            if len(self._tcp_series) >= MAX_SERIES:
                self._merged.labelled().value += 1
                labels = TcpLabels(*(OTHER,) * len(labels))
            found = self._tcp_series[labels] = self._tcp.series(labels)
        return found

    # Policies, and whom they never saw

    def _judged(self, record: RequestRecord | ConnectionRecord) -> None:
        service = record.connection.service
        hostname = service.hostname if service is not None else UNKNOWN
        for verdict in record.dry_run:
            policy = verdict.policy or "none"
            self._of_policy(hostname, policy, "denies" if verdict.denies else "passes").value += 1
        for rule in record.audited:
            self._of_policy(hostname, rule).value += 1

    def _of_policy(self, hostname: str, policy: str, *verdict: str) -> Series:
        labels = (hostname, policy, *verdict)
        if labels not in self._policies:
            if len(self._policies) >= MAX_SERIES:
                self._merged.labelled().value += 1
                labels = (OTHER, OTHER, *verdict)
            self._policies.add(labels)
        return (self._dry_run if verdict else self._audited).labelled(*labels)

    def refused(self, record: RefusalRecord) -> None:
        self._refused.labelled(str(record.status)).value += 1


_NO_GRPC: Final = -1


def _histogram(registry: Registry, name: str, help: str) -> Histogram:
    return registry.histogram(name, help, LABELS, BOUNDS)

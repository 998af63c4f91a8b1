"""Metrics: counters that are plain attributes, families with labels, snapshots that merge over processes, OpenMetrics text.

A connection looks its series up once, by one tuple of labels, and from then on adds to attributes: no lock, no dict and no string is
touched per chunk. Everything else (families, names, text) happens when somebody asks. Names and labels of the tcp families are Istio's
and therefore a contract with dashboards.
"""

from __future__ import annotations

import os
import resource
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Final, Literal, NamedTuple

import msgspec

from mesh.model.identity import SpiffeId
from mesh.model.service import Service
from mesh.model.workload import Workload

Kind = Literal["counter", "gauge", "histogram"]
Merge = Literal["sum", "max"]
Number = int | float

OPENMETRICS: Final = "application/openmetrics-text"
UNKNOWN: Final = "unknown"
BUCKET: Final = "le"
SUM: Final = "sum"
_ANY: Final = "+Inf"


class Sample(msgspec.Struct, frozen=True, array_like=True):
    """One series: the values of its family's labels, in order, and its number."""

    labels: tuple[str, ...]
    value: Number


class FamilySnapshot(msgspec.Struct, frozen=True):
    """One family at one moment. ``name`` has no ``_total``. ``merge`` says how several processes' gauges become one; others add up.

    A histogram's last label is `BUCKET`: the samples of a series are its buckets, by upper bound, and one that is `SUM` of what was
    observed.
    """

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...]
    samples: tuple[Sample, ...]
    merge: Merge = "sum"


class Snapshot(msgspec.Struct, frozen=True):
    """All families of a process at one moment; `encode_snapshot` makes bytes of it for another process."""

    families: tuple[FamilySnapshot, ...] = ()


class InvalidSnapshot(ValueError):
    """Bytes that `encode_snapshot` did not make."""


def encode_snapshot(snapshot: Snapshot) -> bytes:
    return msgspec.msgpack.encode(snapshot)


def decode_snapshot(data: bytes) -> Snapshot:
    """Raises InvalidSnapshot."""
    try:
        return msgspec.msgpack.decode(data, type=Snapshot)
    except msgspec.DecodeError as exc:
        raise InvalidSnapshot(str(exc)) from exc


class Series:
    """One counter or gauge; whoever holds it writes ``value``."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: Number = 0


class Family:
    """A metric with labels. Series are made at first use and kept."""

    def __init__(self, name: str, kind: Kind, help: str, labels: tuple[str, ...] = (), merge: Merge = "sum") -> None:
        self.name, self.kind, self.help, self.labels, self.merge = name, kind, help, labels, merge
        self._series: dict[tuple[str, ...], Series] = {}

    def labelled(self, *values: str) -> Series:
        """The series with these label values, in the order of ``labels``."""
        series = self._series.get(values)
        if series is None:
            if len(values) != len(self.labels):
                raise ValueError(f"{self.name} has the labels {self.labels}, not {values}")
            series = self._series[values] = Series()
        return series

    def collect(self) -> Iterable[FamilySnapshot]:
        yield FamilySnapshot(
            self.name, self.kind, self.help, self.labels, tuple(Sample(k, s.value) for k, s in self._series.items()), self.merge
        )


class Observations:
    """One histogram; whoever holds it calls `observe`."""

    __slots__ = ("_bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        """How many fell into each bucket, the last for what is beyond all bounds."""
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self._bounds, value)] += 1
        self.total += value


class Histogram:
    """A metric with labels and buckets. Series are made at first use and kept."""

    def __init__(self, name: str, help: str, labels: tuple[str, ...], bounds: tuple[float, ...]) -> None:
        self.name, self.help, self.labels, self.bounds = name, help, labels, bounds
        self._series: dict[tuple[str, ...], Observations] = {}

    def labelled(self, *values: str) -> Observations:
        """The series with these label values, in the order of ``labels``."""
        series = self._series.get(values)
        if series is None:
            if len(values) != len(self.labels):
                raise ValueError(f"{self.name} has the labels {self.labels}, not {values}")
            series = self._series[values] = Observations(self.bounds)
        return series

    def collect(self) -> Iterable[FamilySnapshot]:
        bounds = [*map(str, self.bounds), _ANY]
        samples: list[Sample] = []
        for labels, series in self._series.items():
            samples += (Sample((*labels, bound), count) for bound, count in zip(bounds, accumulate(series.counts), strict=True))
            samples.append(Sample((*labels, SUM), series.total))
        yield FamilySnapshot(self.name, "histogram", self.help, (*self.labels, BUCKET), tuple(samples))


Collector = Callable[[], Iterable[FamilySnapshot]]


class Registry:
    """All families of a process. No global one: programs pass it to those who count."""

    def __init__(self) -> None:
        self._collectors: list[Collector] = []

    def counter(self, name: str, help: str, labels: tuple[str, ...] = ()) -> Family:
        """A family of counters; ``name`` without ``_total``."""
        return self._add(Family(name, "counter", help, labels))

    def gauge(self, name: str, help: str, labels: tuple[str, ...] = (), merge: Merge = "sum") -> Family:
        return self._add(Family(name, "gauge", help, labels, merge))

    def histogram(self, name: str, help: str, labels: tuple[str, ...], bounds: tuple[float, ...]) -> Histogram:
        """A family of histograms; ``bounds`` are the upper ones of its buckets, rising, without the last, infinite one."""
        histogram = Histogram(name, help, labels, bounds)
        self.collect_from(histogram.collect)
        return histogram

    def collect_from(self, collector: Collector) -> None:
        """Ask ``collector`` for families at every snapshot: for numbers that are kept elsewhere."""
        self._collectors.append(collector)

    def snapshot(self) -> Snapshot:
        return Snapshot(tuple(family for collect in self._collectors for family in collect() if family.samples))

    def _add(self, family: Family) -> Family:
        self.collect_from(family.collect)
        return family


# Merging


class Totals:
    """Sums the snapshots of several processes, living and dead, such that no counter ever falls.

    A process is named by the caller, a new incarnation by a new name (``mover-1/4711``). When one has died, `retire` keeps what its
    counters had reached; its gauges go with it.
    """

    def __init__(self) -> None:
        self._living: dict[str, Snapshot] = {}
        self._dead = Snapshot()

    def update(self, process: str, snapshot: Snapshot) -> None:
        """The newest snapshot of a living process."""
        self._living[process] = snapshot

    def retire(self, process: str) -> None:
        """The process is gone: its last snapshot's counters stay in the sum. Unknown names are ignored (it died before it reported)."""
        last = self._living.pop(process, None)
        if last is not None:
            self._dead = merge([self._dead, Snapshot(tuple(family for family in last.families if family.kind != "gauge"))])

    def merged(self, own: Snapshot | None = None) -> Snapshot:
        """One snapshot of all, ``own`` being the caller's."""
        return merge([own or Snapshot(), *self._living.values(), self._dead])


def merge(snapshots: Iterable[Snapshot]) -> Snapshot:
    """Families by name, series by labels: counters and ``sum`` gauges add up, ``max`` gauges keep the greatest."""
    families: dict[str, FamilySnapshot] = {}
    values: dict[str, dict[tuple[str, ...], Number]] = {}
    for snapshot in snapshots:
        for family in snapshot.families:
            known = families.setdefault(family.name, family)
            if known.labels != family.labels:
                continue  # another version of us with other labels: can't be added, and must not stop the scrape
            series = values.setdefault(family.name, {})
            for labels, value in ((sample.labels, sample.value) for sample in family.samples):
                before = series.get(labels)
                if before is None:
                    series[labels] = value
                else:
                    series[labels] = max(before, value) if known.merge == "max" else before + value
    return Snapshot(
        tuple(
            msgspec.structs.replace(family, samples=tuple(Sample(k, v) for k, v in values[name].items()))
            for name, family in families.items()
        )
    )


# Text


def render(snapshot: Snapshot) -> bytes:
    """OpenMetrics 1.0 text, ending ``# EOF``; families without a series are omitted."""
    return "".join(render_lines(snapshot)).encode()


def render_lines(snapshot: Snapshot) -> Iterator[str]:
    """The same line by line, for who has other things to do in between."""
    texts: dict[tuple[tuple[str, ...], tuple[str, ...]], str] = {}  # a series' labels are the same in many lines, and cost most of each
    for family in snapshot.families:
        if not family.samples:
            continue
        yield f"# HELP {family.name} {_escaped(family.help)}.\n# TYPE {family.name} {family.kind}\n"
        histogram = family.kind == "histogram"
        suffix = "_total" if family.kind == "counter" else ""
        names = family.labels[:-1] if histogram else family.labels
        for sample in family.samples:
            labels, value = sample.labels, sample.value
            own = labels[:-1] if histogram else labels
            text = texts.get((names, own))
            if text is None:
                text = texts[names, own] = ",".join([f'{name}="{_escaped(of)}"' for name, of in zip(names, own, strict=True)])
            if histogram:
                yield _render_part(family.name, text, labels[-1], value)
            else:
                yield f"{family.name}{suffix}{{{text}}} {value}\n" if text else f"{family.name}{suffix} {value}\n"
    yield "# EOF\n"


def _render_part(name: str, text: str, part: str, value: Number) -> str:
    """A bucket or the sum of a histogram; the last bucket holds all and is the count too."""
    braces = f"{{{text}}}" if text else ""
    if part == SUM:
        return f"{name}_sum{braces} {value}\n"
    bucket = f'{name}_bucket{{{text}{"," if text else ""}{BUCKET}="{part}"}} {value}\n'
    return bucket + f"{name}_count{braces} {value}\n" if part == _ANY else bucket


def content_type(accept: str) -> str:
    """Content-Type for the text: OpenMetrics if the Accept header lists it, else plain, as Istio answers."""
    if any(part.split(";")[0].strip().lower() == OPENMETRICS for part in accept.split(",")):
        return f"{OPENMETRICS};charset=utf-8;version=1.0.0"
    return "text/plain; charset=utf-8"


def _escaped(text: str) -> str:
    if "\\" in text or '"' in text or "\n" in text:
        return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return text


# Istio's tcp families


class TcpLabels(NamedTuple):
    """Istio's standard labels of a tcp connection, without ``response_flags`` (which is known only at its end)."""

    reporter: str
    source_workload: str
    source_canonical_service: str
    source_canonical_revision: str
    source_workload_namespace: str
    source_principal: str
    source_app: str
    source_version: str
    source_cluster: str
    destination_service: str
    destination_service_namespace: str
    destination_service_name: str
    destination_workload: str
    destination_canonical_service: str
    destination_canonical_revision: str
    destination_workload_namespace: str
    destination_principal: str
    destination_app: str
    destination_version: str
    destination_cluster: str
    request_protocol: str
    connection_security_policy: str
    source_region: str
    source_zone: str
    destination_region: str
    destination_zone: str


_TCP_LABELS: Final = (*TcpLabels._fields, "response_flags")


def tcp_labels(
    reporter: Literal["source", "destination", "waypoint"],
    *,
    source: Workload | None,
    destination: Workload | None,
    service: Service | None,
    source_identity: SpiffeId | None,
    mutual_tls: bool,
    protocol: Literal["tcp", "http", "grpc"] = "tcp",
) -> TcpLabels:
    """The labels of one connection, or of a request. ``source_identity`` is the proven one (the peer's, or our own when we present it);
    the destination's principal is what xDS says of it. What is not known is ``unknown``."""
    s_workload, s_namespace, s_name, s_revision, s_cluster, _, s_region, s_zone = _workload_labels(source)
    d_workload, d_namespace, d_name, d_revision, d_cluster, d_principal, d_region, d_zone = _workload_labels(destination)
    s_principal = str(source_identity) if source_identity is not None else UNKNOWN
    return TcpLabels(
        reporter,
        s_workload,
        s_name,
        s_revision,
        s_namespace,
        s_principal,
        s_name,
        s_revision,
        s_cluster,
        (service.hostname or UNKNOWN) if service is not None else UNKNOWN,
        (service.namespace or UNKNOWN) if service is not None else UNKNOWN,
        (service.name or UNKNOWN) if service is not None else UNKNOWN,
        d_workload,
        d_name,
        d_revision,
        d_namespace,
        d_principal,
        d_name,
        d_revision,
        d_cluster,
        protocol,
        "mutual_tls" if mutual_tls else UNKNOWN,
        s_region,
        s_zone,
        d_region,
        d_zone,
    )


def _workload_labels(workload: Workload | None) -> tuple[str, str, str, str, str, str, str, str]:
    if workload is None:
        return (UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN)
    locality = workload.locality
    return (
        workload.workload_name or UNKNOWN,
        workload.namespace or UNKNOWN,
        workload.canonical_name or UNKNOWN,
        workload.canonical_revision or UNKNOWN,
        workload.cluster_id or UNKNOWN,
        str(workload.identity),
        locality.region or UNKNOWN,
        locality.zone or UNKNOWN,
    )


class TcpSeries:
    """The counters of all connections with the same labels; a connection holds it and adds to its attributes.

    ``received`` is client to server, ``sent`` server to client, for both reporters (Istio's naming).
    """

    __slots__ = ("closed", "opened", "received", "sent")

    def __init__(self) -> None:
        self.opened = 0
        self.received = 0
        self.sent = 0
        self.closed: dict[str, int] = {}

    def close(self, response_flags: str = "-") -> None:
        """Count a connection's end; ``-`` is a good one, anything else also counts as failed."""
        self.closed[response_flags] = self.closed.get(response_flags, 0) + 1


class TcpMetrics:
    """Istio's tcp families over `TcpSeries`; ``sockets_open`` is counted by reporter."""

    def __init__(self, registry: Registry, reporters: Sequence[str] = ("source", "destination")) -> None:
        self._series: dict[TcpLabels, TcpSeries] = {}
        sockets = registry.gauge("istio_tcp_sockets_open", "The current number of open TCP sockets", ("reporter",))
        self.sockets_open: Final[Mapping[str, Series]] = {reporter: sockets.labelled(reporter) for reporter in reporters}
        registry.collect_from(self._collect)

    def series(self, labels: TcpLabels) -> TcpSeries:
        """The one lookup of a connection."""
        series = self._series.get(labels)
        if series is None:
            series = self._series[labels] = TcpSeries()
        return series

    def _collect(self) -> Iterable[FamilySnapshot]:
        series = self._series.items()
        good = ("-",)
        yield _tcp_family("connections_opened", "The total number of TCP connections opened", ((k + good, s.opened) for k, s in series))
        yield _tcp_family(
            "connections_closed",
            "The total number of TCP connections closed",
            (((*k, flags), n) for k, s in series for flags, n in s.closed.items()),
        )
        yield _tcp_family(
            "connections_failed",
            "The total number of TCP connections that ended with an error (unstable)",
            (((*k, flags), n) for k, s in series for flags, n in s.closed.items() if flags != "-"),
        )
        yield _tcp_family(
            "received_bytes",
            "The size of total bytes received during request in case of a TCP connection",
            ((k + good, s.received) for k, s in series),
        )
        yield _tcp_family(
            "sent_bytes",
            "The size of total bytes sent during response in case of a TCP connection",
            ((k + good, s.sent) for k, s in series),
        )


def _tcp_family(name: str, help: str, samples: Iterable[tuple[tuple[str, ...], int]]) -> FamilySnapshot:
    return FamilySnapshot(f"istio_tcp_{name}", "counter", help, _TCP_LABELS, tuple(Sample(labels, value) for labels, value in samples))


# Other families of Istio's node proxy


_DNS_LABELS: Final = ("request_query_type", "request_protocol", "source_canonical_service", "source_canonical_revision")
_DNS_SECONDS: Final = (0.0005, 0.001, 0.01, 0.1, 1.0, 5.0)


class DnsMetrics:
    """The look-ups of workloads, and those that went on to another server; holders add to the attributes of their series."""

    def __init__(self, registry: Registry) -> None:
        self._requests = registry.counter("istio_dns_requests", "Total number of DNS requests (unstable)", _DNS_LABELS)
        self._forwarded = registry.counter(
            "istio_dns_upstream_requests", "Total number of DNS requests forwarded to upstream (unstable)", _DNS_LABELS
        )
        self._failures = registry.counter(
            "istio_dns_upstream_failures", "Total number of DNS requests that failed to forward upstream (unstable)", _DNS_LABELS
        )
        self._duration = registry.histogram(
            "istio_dns_upstream_request_duration_seconds",
            "Total time in seconds Istio takes to get DNS response from upstream (unstable)",
            _DNS_LABELS,
            _DNS_SECONDS,
        )

    def series(self, query_type: str, protocol: Literal["udp", "tcp"], source: Workload | None) -> DnsSeries:
        """Where look-ups of one type over one protocol count; ``query_type`` as DNS writes it."""
        service = (source.canonical_name or UNKNOWN) if source is not None else UNKNOWN
        revision = (source.canonical_revision or UNKNOWN) if source is not None else UNKNOWN
        labels = (query_type.lower(), protocol, service, revision)
        return DnsSeries(self, labels)


class DnsSeries:
    """The counters of look-ups with the same labels. What is only needed for forwarded ones is made when one is."""

    __slots__ = ("_labels", "_metrics", "requests")

    def __init__(self, metrics: DnsMetrics, labels: tuple[str, str, str, str]) -> None:
        self._metrics = metrics
        self._labels = labels
        self.requests = metrics._requests.labelled(*labels)

    def forwarded(self) -> None:
        self._metrics._forwarded.labelled(*self._labels).value += 1

    def ended(self, seconds: float, *, failed: bool) -> None:
        """A forwarded look-up has its answer, or will get none."""
        self._metrics._duration.labelled(*self._labels).observe(seconds)
        if failed:
            self._metrics._failures.labelled(*self._labels).value += 1


class XdsMetrics:
    """How the stream to the control plane fares."""

    def __init__(self, registry: Registry) -> None:
        self._terminations = registry.counter(
            "istio_xds_connection_terminations", "The total number of completed connections to the xDS server (unstable)", ("reason",)
        )
        self._messages = registry.counter("istio_xds_message", "Total number of messages received (unstable)", ("url",))
        self._bytes = registry.counter("istio_xds_message_bytes", "Total number of bytes received (unstable)", ("url",))

    def terminated(self, reason: Literal["ConnectionError", "Error", "Reconnect", "Complete"]) -> None:
        self._terminations.labelled(reason).value += 1

    def received(self, type_url: str, size: int) -> None:
        self._messages.labelled(type_url).value += 1
        self._bytes.labelled(type_url).value += size


class WorkloadManagerMetrics:
    """How many pods the agent serves; holders write the attributes' ``value``."""

    def __init__(self, registry: Registry) -> None:
        self.active = _single(registry.gauge, "active_proxy_count", "The total number current workloads with active proxies (unstable)")
        self.pending = _single(registry.gauge, "pending_proxy_count", "The total number current workloads with pending proxies (unstable)")
        self.started = _single(registry.counter, "proxies_started", "The total number of proxies that were started (unstable)")
        self.stopped = _single(registry.counter, "proxies_stopped", "The total number of proxies that were stopped (unstable)")


def _single(make: Callable[[str, str], Family], name: str, help: str) -> Series:
    return make(f"workload_manager_{name}", help).labelled()


def add_build(registry: Registry, component: str, tag: str) -> None:
    """``istio_build 1`` with the component and version."""
    registry.gauge("istio_build", "Istio component build info", ("component", "tag"), "max").labelled(component, tag).value = 1


def add_process(registry: Registry) -> None:
    """``process_open_fds`` and ``process_max_fds`` of the calling process, read at every snapshot."""
    registry.collect_from(_collect_process)


def _collect_process() -> Iterable[FamilySnapshot]:
    yield FamilySnapshot(
        "process_open_fds", "gauge", "Number of open file descriptors", (), (Sample((), len(os.listdir("/proc/self/fd"))),)
    )
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield FamilySnapshot("process_max_fds", "gauge", "Maximum number of file descriptors", (), (Sample((), soft),), "max")

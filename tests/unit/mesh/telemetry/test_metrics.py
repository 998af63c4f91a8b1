import pytest

from mesh.model.identity import SpiffeId
from mesh.model.service import Service
from mesh.model.workload import Locality, Workload
from mesh.telemetry import metrics
from mesh.telemetry.metrics import DnsMetrics, Registry, TcpMetrics, Totals, decode_snapshot, encode_snapshot, merge, render, tcp_labels

CLIENT = Workload(
    "c//Pod/app/client-0", "client-0", "app", workload_name="client", canonical_name="client", canonical_revision="v1",
    service_account="client", locality=Locality("r1", "z1"),
)  # fmt: skip
SERVER = Workload("c//Pod/app/server-0", "server-0", "app", workload_name="server", canonical_name="server", service_account="server")
SERVICE = Service("server", "app", "server.app.svc.cluster.local")


def labels(reporter="source", **changes):
    given = {"source": CLIENT, "destination": SERVER, "service": SERVICE, "source_identity": CLIENT.identity, "mutual_tls": True}
    return tcp_labels(reporter, **(given | changes))


def values(snapshot, family, **wanted):
    found = [f for f in snapshot.families if f.name == family]
    return [
        sample.value
        for f in found
        for sample in f.samples
        if all(dict(zip(f.labels, sample.labels, strict=True)).get(k) == v for k, v in wanted.items())
    ]


def test_the_tcp_labels_are_istios():
    got = labels()._asdict()
    assert got["source_workload"] == "client"
    assert got["source_principal"] == "spiffe://cluster.local/ns/app/sa/client"
    assert got["source_app"] == got["source_canonical_service"] == "client"
    assert got["source_version"] == "v1"
    assert got["destination_version"] == "unknown"
    assert got["destination_principal"] == "spiffe://cluster.local/ns/app/sa/server"
    assert got["destination_service"] == "server.app.svc.cluster.local"
    assert got["destination_service_name"] == "server"
    assert got["connection_security_policy"] == "mutual_tls"
    assert (got["source_region"], got["source_zone"], got["destination_zone"]) == ("r1", "z1", "unknown")


def test_an_unproven_source_has_no_principal_and_an_unknown_peer_is_unknown():
    got = labels("destination", source=None, service=None, source_identity=None, mutual_tls=False)._asdict()
    assert got["source_principal"] == got["source_workload"] == got["destination_service"] == "unknown"
    assert got["connection_security_policy"] == "unknown"
    claimed = labels(source_identity=None)._asdict()
    assert claimed["source_workload"] == "client"
    assert claimed["source_principal"] == "unknown"


def test_closed_and_failed_carry_the_final_flag_and_opened_never_one():
    registry = Registry()
    tcp = TcpMetrics(registry)
    series = tcp.series(labels())
    assert tcp.series(labels()) is series
    series.opened += 3
    series.received += 11
    series.sent += 22
    series.close()
    series.close("DENY")
    series.close("DENY")
    tcp.sockets_open["source"].value += 1
    snapshot = registry.snapshot()
    assert values(snapshot, "istio_tcp_connections_opened", response_flags="-") == [3]
    assert values(snapshot, "istio_tcp_connections_closed", response_flags="-") == [1]
    assert values(snapshot, "istio_tcp_connections_closed", response_flags="DENY") == [2]
    assert values(snapshot, "istio_tcp_connections_failed") == [2]
    assert values(snapshot, "istio_tcp_received_bytes") == [11]
    assert values(snapshot, "istio_tcp_sent_bytes") == [22]
    assert values(snapshot, "istio_tcp_sockets_open", reporter="source") == [1]


def test_the_text_is_openmetrics_with_escaped_values_and_without_empty_families():
    registry = Registry()
    registry.counter("istio_xds_message", "Messages", ("url",)).labelled('a"b\\c\nd').value += 2
    registry.counter("never_used", "Nothing", ("x",))
    metrics.add_build(registry, "ztunnel", "1.0")
    assert render(registry.snapshot()).decode() == (
        "# HELP istio_xds_message Messages.\n"
        "# TYPE istio_xds_message counter\n"
        'istio_xds_message_total{url="a\\"b\\\\c\\nd"} 2\n'
        "# HELP istio_build Istio component build info.\n"
        "# TYPE istio_build gauge\n"
        'istio_build{component="ztunnel",tag="1.0"} 1\n'
        "# EOF\n"
    )


def test_content_is_negotiated_as_istio_does():
    assert metrics.content_type("application/openmetrics-text;version=1.0.0,text/plain;q=0.5").startswith("application/openmetrics-text")
    assert metrics.content_type("text/plain") == metrics.content_type("") == "text/plain; charset=utf-8"


def _process(opened):
    registry = Registry()
    TcpMetrics(registry).series(labels()).opened += opened
    metrics.add_process(registry)
    metrics.add_build(registry, "ztunnel", "1")
    return decode_snapshot(encode_snapshot(registry.snapshot()))


def test_counters_of_several_processes_add_up_and_never_fall_when_one_dies():
    totals = Totals()
    totals.update("a/1", _process(5))
    totals.update("b/2", _process(7))
    assert values(totals.merged(), "istio_tcp_connections_opened") == [12]
    totals.update("a/1", _process(6))
    totals.retire("a/1")
    assert values(totals.merged(), "istio_tcp_connections_opened") == [13]
    totals.update("a/3", _process(1))
    totals.retire("b/2")
    totals.retire("unheard-of")
    assert values(totals.merged(), "istio_tcp_connections_opened") == [14]


def test_gauges_of_a_dead_process_go_with_it_and_maxima_do_not_add_up():
    totals = Totals()
    totals.update("a", _process(1))
    totals.update("b", _process(1))
    both = totals.merged()
    assert values(both, "istio_build") == [1]
    one = values(_process(1), "process_open_fds")[0]
    assert values(both, "process_open_fds")[0] >= 2 * one - 2
    assert values(both, "process_max_fds") == values(_process(1), "process_max_fds")
    totals.retire("a")
    totals.retire("b")
    assert values(totals.merged(), "process_open_fds") == []


def test_a_family_with_other_labels_does_not_stop_the_scrape():
    one, other = Registry(), Registry()
    one.counter("x", "X", ("a",)).labelled("1").value += 1
    other.counter("x", "X", ("a", "b")).labelled("1", "2").value += 1
    assert values(merge([one.snapshot(), other.snapshot()]), "x") == [1]


def test_a_series_needs_a_value_for_every_label():
    with pytest.raises(ValueError, match="labels"):
        Registry().counter("x", "X", ("a",)).labelled()


def test_bytes_that_are_no_snapshot_are_refused():
    with pytest.raises(metrics.InvalidSnapshot):
        decode_snapshot(b"\x00nonsense")


def test_the_xds_and_workload_manager_families_have_istios_names():
    registry = Registry()
    xds = metrics.XdsMetrics(registry)
    xds.terminated("Reconnect")
    xds.received("type.googleapis.com/istio.workload.Address", 100)
    manager = metrics.WorkloadManagerMetrics(registry)
    manager.active.value += 1
    text = render(registry.snapshot()).decode()
    assert 'istio_xds_connection_terminations_total{reason="Reconnect"} 1' in text
    assert 'istio_xds_message_bytes_total{url="type.googleapis.com/istio.workload.Address"} 100' in text
    assert "workload_manager_active_proxy_count 1" in text
    assert "workload_manager_proxies_started_total 0" in text


def test_an_identity_that_differs_from_the_workloads_is_the_one_reported():
    got = labels(source_identity=SpiffeId("td", "x", "y"))
    assert got.source_principal == "spiffe://td/ns/x/sa/y"


def test_look_ups_count_by_type_protocol_and_source():
    registry = Registry()
    dns = DnsMetrics(registry)
    dns.series("AAAA", "udp", CLIENT).requests.value += 2
    dns.series("AAAA", "udp", CLIENT).requests.value += 1
    dns.series("A", "tcp", None).forwarded()
    text = render(registry.snapshot()).decode()
    assert (
        'istio_dns_requests_total{request_query_type="aaaa",request_protocol="udp",source_canonical_service="client",'
        'source_canonical_revision="v1"} 3\n' in text
    )
    assert 'source_canonical_service="unknown",source_canonical_revision="unknown"} 1\n' in text


def test_a_histogram_has_buckets_that_hold_all_below_them_and_a_sum_and_adds_up_over_processes_living_and_dead():
    totals = Totals()
    for process in ("a/1", "a/2"):
        registry = Registry()
        seconds = registry.histogram("wait_seconds", "How long", ("who",), (0.1, 1.0))
        for value in (0.1, 0.5, 7):
            seconds.labelled("x").observe(value)
        totals.update(process, decode_snapshot(encode_snapshot(registry.snapshot())))
        totals.retire("a/1")
    assert render(totals.merged()).decode().splitlines() == [
        "# HELP wait_seconds How long.",
        "# TYPE wait_seconds histogram",
        'wait_seconds_bucket{who="x",le="0.1"} 2',
        'wait_seconds_bucket{who="x",le="1.0"} 4',
        'wait_seconds_bucket{who="x",le="+Inf"} 6',
        'wait_seconds_count{who="x"} 6',
        'wait_seconds_sum{who="x"} 15.2',
        "# EOF",
    ]

"""A request as a span."""

from __future__ import annotations

import pytest

from tests.unit.waypoint_py.telemetry.records import MOMENT, connection, request_record
from waypoint_py.observer import RequestRecord
from waypoint_py.policy.authorize import DryRunVerdict, Judgement
from waypoint_py.telemetry.context import SpanContext
from waypoint_py.telemetry.spans import LONGEST, make_request, make_span
from waypoint_py.verdict import Flag

CONTEXT = SpanContext(0x4BF92F3577B34DA6A3CE929D0E0E4736, 0xA2, 0xB3, b"a=1")


def attributes(record: RequestRecord, *tags: tuple[str, str]) -> dict[str, str | int | bool]:
    span = make_span(record, CONTEXT, tags)
    found = {each.key: getattr(each.value, each.value.WhichOneof("value") or "") for each in span.attributes}
    assert len(found) == len(span.attributes)
    return found


def test_a_span_is_named_by_what_was_called_and_tells_when() -> None:
    span = make_span(request_record(), CONTEXT, ())
    assert span.name == "web.shop.svc.cluster.local:80/*"
    assert span.kind == 2
    assert abs(span.start_time_unix_nano / 1e9 - MOMENT) < 1e-5
    assert abs(span.end_time_unix_nano - span.start_time_unix_nano - 12_000_000) < 1000
    assert span.trace_id.hex() == "4bf92f3577b34da6a3ce929d0e0e4736"
    assert (span.span_id.hex(), span.parent_span_id.hex()) == ("00000000000000a2", "00000000000000b3")
    assert span.trace_state == "a=1"
    assert span.status.code == 0
    assert span.flags == 0x301


def test_a_span_that_begins_a_trace_has_no_parent() -> None:
    span = make_span(request_record(), CONTEXT._replace(parent_id=0), ())
    assert span.parent_span_id == b""
    assert span.flags == 1


def test_traffic_to_a_workload_is_named_by_its_address() -> None:
    assert make_span(request_record(connection(service=None)), CONTEXT, ()).name == "10.96.0.1:80/*"


def test_a_span_has_istios_attributes() -> None:
    assert attributes(request_record(), ("env", "test")) == {
        "component": "proxy",
        "http.method": "GET",
        "http.url": "http://web.shop/a?b=c",
        "http.protocol": "HTTP/1.1",
        "http.status_code": 200,
        "request_size": 7,
        "response_size": 2000,
        "response_flags": "-",
        "user_agent": "curl/8",
        "guid:x-request-id": "id-1",
        "upstream_cluster": "inbound-vip|80|http|web.shop.svc.cluster.local",
        "upstream_cluster.name": "inbound-vip|80|http|web.shop.svc.cluster.local",
        "upstream_address": "10.1.0.2:8080",
        "peer.address": "10.1.0.3",
        "source.principal": "spiffe://cluster.local/ns/apps/sa/client",
        "route_name": "default",
        "env": "test",
    }


def test_a_span_says_what_decided() -> None:
    record = request_record(status=403)
    record.judged(
        Judgement("denied by it", "ns[shop]-policy[a]-rule[0]", dry_run=(DryRunVerdict(True, "p", "dry-run: no"),), audited=("x", "y"))
    )
    record.attempts = 3
    record.add_flags(Flag.DELAY_INJECTED)
    found = attributes(record)
    expected = {
        "because": "denied by it", "policy": "ns[shop]-policy[a]-rule[0]", "dry_run": "dry-run: no", "audit": "x,y", "retry.count": 2,
        "response_flags": "DI",
    }  # fmt: skip
    assert {name: found[name] for name in expected} == expected
    assert "error" not in found


@pytest.mark.parametrize(
    ("status", "grpc", "failed"),
    [
        (200, None, False), (404, None, False), (500, None, True), (503, None, True), (None, None, True),
        (200, 0, False), (200, 14, True), (200, 5, False), (200, 13, True),
    ],
)  # fmt: skip
def test_what_the_server_is_to_blame_for_is_an_error(status: int | None, grpc: int | None, failed: bool) -> None:
    record = request_record(status=status, headers=[(b"content-type", b"application/grpc")] if grpc is not None else [])
    record.grpc_status = grpc
    span = make_span(record, CONTEXT, ())
    assert (span.status.code == 2, bool(span.status.message)) == (failed, failed)
    assert attributes(record).get("error", False) is failed


def test_grpc_calls_say_their_own_status() -> None:
    record = request_record(headers=[(b"content-type", b"application/grpc")], path=b"/shop.Cart/Add")
    record.grpc_status = 5
    found = attributes(record)
    assert (found["grpc.path"], found["grpc.status_code"], found["grpc.authority"]) == ("/shop.Cart/Add", "5", "web.shop")


def test_what_clients_write_is_cut_and_made_text() -> None:
    record = request_record(path=b"/" + b"a" * 5000, headers=[])
    record.method = b"\xff\xfe"
    record.because = "bad \udcff"
    found = attributes(record)
    assert len(str(found["http.url"])) == LONGEST
    assert found["http.method"] == "\ufffd\ufffd"
    assert found["because"] == "bad ?"
    make_span(record, CONTEXT, ()).SerializeToString()


def test_a_batch_says_who_sends_it() -> None:
    made = make_request([make_span(request_record(), CONTEXT, ())], {"service.name": "waypoint.shop"}, "1.2")
    (of,) = made.resource_spans
    assert [(each.key, each.value.string_value) for each in of.resource.attributes] == [("service.name", "waypoint.shop")]
    (scope,) = of.scope_spans
    assert (scope.scope.name, scope.scope.version, len(scope.spans)) == ("waypoint-py", "1.2", 1)

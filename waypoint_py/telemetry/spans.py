"""A request as a span, in OTLP's binary form. Pure.

Binary and not JSON: every receiver of OTLP over HTTP has to take the one, and need not take the other.
Names of attributes are those that Istio's proxies give.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from mesh.xds.proto import otlp_pb2 as otlp
from waypoint_py.observer import RequestRecord
from waypoint_py.telemetry.context import SpanContext

SERVER: Final = 2
ERROR: Final = 2
LONGEST: Final = 1024
"""Characters of an attribute's text: what clients write is theirs to choose."""

_SAMPLED: Final = 1
_FROM_ELSEWHERE: Final = 0x300
"""It is known where the parent ran, and that was not here."""
_SERVER_FAULTS: Final = frozenset((2, 4, 12, 13, 14, 15))
"""gRPC statuses that are an error of who serves (OpenTelemetry's conventions)."""


def make_request(spans: Iterable[otlp.Span], resource: Mapping[str, str], version: str) -> otlp.ExportTraceServiceRequest:
    """What is posted. ``resource``: attributes of who sends."""
    attributes = [_attribute(key, value) for key, value in resource.items()]
    scope = otlp.ScopeSpans(scope=otlp.Scope(name="waypoint-py", version=version), spans=spans)
    return otlp.ExportTraceServiceRequest(
        resource_spans=[otlp.ResourceSpans(resource=otlp.Resource(attributes=attributes), scope_spans=[scope])]
    )


def make_span(record: RequestRecord, context: SpanContext, tags: Iterable[tuple[str, str]]) -> otlp.Span:
    """``tags``: what is configured for every span."""
    began = int(record.start_time * 1e9)
    error = _error_of(record)
    span = otlp.Span(
        trace_id=context.trace_id.to_bytes(16, "big"),
        span_id=context.span_id.to_bytes(8, "big"),
        trace_state=_text(context.tracestate),
        parent_span_id=context.parent_id.to_bytes(8, "big") if context.parent_id else b"",
        name=name_of(record),
        kind=SERVER,
        start_time_unix_nano=began,
        end_time_unix_nano=began + int((record.duration or 0.0) * 1e9),
        attributes=[_attribute(key, value) for key, value in attributes_of(record, error, tags)],
        flags=_SAMPLED | (_FROM_ELSEWHERE if context.parent_id else 0),
    )
    if error:
        span.status.code = ERROR
        span.status.message = _clean(error)
    return span


def name_of(record: RequestRecord) -> str:
    """By what was called, never by its path, of which there are too many: ``reviews.shop.svc.cluster.local:9080/*``."""
    connection = record.connection
    service = connection.service
    where = f"{service.hostname}:{connection.destination.port}" if service is not None else str(connection.destination)
    return f"{where}/*"


def attributes_of(record: RequestRecord, error: str, tags: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str | int | bool]]:
    yield "component", "proxy"
    yield "http.method", _text(record.method)
    yield "http.url", _text(b"http://" + record.authority + record.path)
    yield "http.protocol", record.version.value
    yield "http.status_code", record.status
    yield "request_size", record.bytes_received
    yield "response_size", record.bytes_sent
    yield "response_flags", ",".join(record.response_flags) or "-"
    for key, name in (("user_agent", b"user-agent"), ("guid:x-request-id", b"x-request-id")):
        value = record.request_header(name)
        if value is not None:
            yield key, _text(value)
    yield "upstream_cluster", record.upstream_cluster or "-"
    yield "upstream_cluster.name", record.upstream_cluster or "-"
    if record.upstream_host is not None:
        yield "upstream_address", str(record.upstream_host)
    yield "peer.address", str(record.connection.peer_address.ip)
    yield "source.principal", str(record.connection.peer)
    if record.route:
        yield "route_name", record.route
    if record.attempts > 1:
        yield "retry.count", record.attempts - 1
    if record.is_grpc:
        yield "grpc.path", _text(record.path)
        yield "grpc.authority", _text(record.authority)
        if record.grpc_status is not None:
            yield "grpc.status_code", str(record.grpc_status)
    if error:
        yield "error", True
    if record.because:
        yield "because", record.because
    if record.policy:
        yield "policy", record.policy
    if record.dry_run:
        yield "dry_run", "; ".join(verdict.because for verdict in record.dry_run)
    if record.audited:
        yield "audit", ",".join(record.audited)
    yield from tags


def _error_of(record: RequestRecord) -> str:
    """Why it counts as failed; empty: it does not. That a client is refused is no error of who serves."""
    failed = not 0 < record.status < 500 or (record.is_grpc and record.grpc_status in _SERVER_FAULTS)
    return (record.details if record.details != "via_upstream" else record.because) or f"status {record.status}" if failed else ""


def _attribute(key: str, value: str | int | bool) -> otlp.KeyValue:
    if isinstance(value, bool):
        return otlp.KeyValue(key=key, value=otlp.Value(bool_value=value))
    if isinstance(value, int):
        return otlp.KeyValue(key=key, value=otlp.Value(int_value=value))
    return otlp.KeyValue(key=key, value=otlp.Value(string_value=_clean(value)))


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")


def _clean(text: str) -> str:
    """As protobuf takes it."""
    text = text[:LONGEST]
    return text if text.isascii() else text.encode("utf-8", "replace").decode()

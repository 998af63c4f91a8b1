"""Answers that are ours: which status, text, flags and details each situation has, and what they look like to a gRPC client.

Texts and flags are Envoy's, since users, dashboards and tests know them. Pure.
"""

from __future__ import annotations

from typing import Final

from mesh.http.message import Headers, Request, Response
from waypoint_py.routing.grpc import trailers_only
from waypoint_py.upstream.session import FailureKind, UpstreamFailure
from waypoint_py.verdict import Flag, LocalReply

SERVER: Final = b"istio-envoy"
"""What every answer says of its server, ours and the applications'."""

_REASONS: Final = {
    FailureKind.CONNECT: ("remote connection failure", Flag.UPSTREAM_CONNECTION_FAILURE),
    FailureKind.CONNECT_TIMEOUT: ("connection timeout", Flag.UPSTREAM_CONNECTION_FAILURE),
    FailureKind.TLS: ("remote connection failure", Flag.UPSTREAM_CONNECTION_FAILURE),
    FailureKind.REFUSED: ("remote connection failure", Flag.UPSTREAM_CONNECTION_FAILURE),
    FailureKind.TERMINATED: ("connection termination", Flag.UPSTREAM_CONNECTION_TERMINATION),
    FailureKind.RESET: ("remote reset", Flag.UPSTREAM_REMOTE_RESET),
    FailureKind.REFUSED_STREAM: ("remote refused stream reset", Flag.UPSTREAM_REMOTE_RESET),
    FailureKind.PROTOCOL: ("protocol error", Flag.UPSTREAM_PROTOCOL_ERROR),
    FailureKind.OVERFLOW: ("overflow", Flag.UPSTREAM_OVERFLOW),
}
"""The word of body and details, the flag."""
_OF_CODEC: Final = {
    400: b"Bad Request",
    426: b"Upgrade Required",
    431: b"Request Header Fields Too Large",
    501: b"Not Implemented",
}

# Situations without variables, in the order of a request's life


def bad_path(because: str) -> LocalReply:
    return LocalReply(400, b"", flags=(), details="path_normalization_failed", because=because)


def refused_head(status: int, reason: str, *, serial: bool = True) -> LocalReply:
    """A request that the codec did not let through; ``serial``: that of HTTP/1.1."""
    if status == 408:
        return LocalReply(408, b"request header timeout", details="request_header_timeout", because=reason, close=True)
    codec = "http1" if serial else "http2"
    match status:
        case 426:
            details = "low_version"
        case 431:
            details = f"{codec}.headers_too_large"
        case _:
            details = f"{codec}.codec_error.{reason.replace(' ', '_')[:100]}"
    body = _OF_CODEC.get(status, b"")
    return LocalReply(status, body, flags=(Flag.DOWNSTREAM_PROTOCOL_ERROR,), details=details, because=reason, close=True)


def upgrade_refused(what: str) -> LocalReply:
    return LocalReply(403, b"", details="upgrade_failed", because=f"{what} is not allowed here")


def no_configuration(because: str) -> LocalReply:
    """The service is not, or not yet, or no more, one that we stand before."""
    return LocalReply(503, b"", flags=(Flag.NO_CLUSTER_FOUND,), details="cluster_not_found", because=because)


def no_route(because: str) -> LocalReply:
    return LocalReply(404, b"", flags=(Flag.NO_ROUTE_FOUND,), details="route_not_found", because=because)


def no_destination(status: int, because: str) -> LocalReply:
    """A destination that cannot be used: VirtualService 503, Gateway API 500."""
    return LocalReply(status, b"", flags=(Flag.NO_CLUSTER_FOUND,), details="cluster_not_found", because=because)


def no_endpoint(because: str) -> LocalReply:
    return LocalReply(
        503,
        b"no healthy upstream",
        flags=(Flag.NO_HEALTHY_UPSTREAM,),
        details="no_healthy_upstream",
        because=f"no healthy upstream: {because}",
    )


def response_timeout(because: str) -> LocalReply:
    return LocalReply(504, b"upstream request timeout", flags=(Flag.UPSTREAM_REQUEST_TIMEOUT,), details="response_timeout", because=because)


def per_try_timeout(because: str) -> LocalReply:
    return LocalReply(
        504, b"upstream request timeout", flags=(Flag.UPSTREAM_REQUEST_TIMEOUT,), details="upstream_per_try_timeout", because=because
    )


def internal_error(because: str) -> LocalReply:
    return LocalReply(500, b"", details="internal_error", because=because)


def upstream_failed(failure: UpstreamFailure, *, retried: bool = False) -> LocalReply:
    """Before the response began, and not to be tried again. What was wrong with a certificate is for the log, not for the client."""
    word, flag = _REASONS[failure.kind]
    again = "retried and the latest " if retried else ""
    headers: Headers = [(b"x-envoy-overloaded", b"true")] if failure.kind is FailureKind.OVERFLOW else []
    reason = "|".join(text.replace(" ", "_") for text in (word, failure.transport) if text)
    return LocalReply(
        502 if failure.kind is FailureKind.PROTOCOL else 503,
        f"upstream connect error or disconnect/reset before headers. {again}reset reason: {word}".encode(),
        headers,
        flags=(flag,),
        details=f"upstream_reset_before_response_started{{{reason}}}",
        because=failure.because,
    )


def flag_of_failure(failure: UpstreamFailure) -> Flag:
    return _REASONS[failure.kind][1]


# What goes out


def render(reply: LocalReply, request: Request | None) -> tuple[Response, bytes]:
    """The response that a client of ``request`` gets, and its body. Headers of the reply itself go before those we would give."""
    if request is not None and request.is_grpc and request.method != b"HEAD":
        return trailers_only(reply), b""
    headers = list(reply.headers)
    if reply.body:
        _default(headers, b"content-type", b"text/plain")
    # A HEAD is told the length that a GET would have got; the codec leaves the body out.
    response = Response(reply.status, headers, content_length=None if _bodiless(reply.status) else len(reply.body))
    return response, b"" if _bodiless(reply.status) else reply.body


def _bodiless(status: int) -> bool:
    return status in (204, 304) or status < 200


def _default(headers: Headers, name: bytes, value: bytes) -> None:
    if all(key != name for key, _ in headers):
        headers.append((name, value))

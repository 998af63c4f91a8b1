"""Answers of ours: the table of situations, and what they look like to whoever asked."""

from __future__ import annotations

import pytest

from mesh.http.message import Request
from waypoint_py import replies
from waypoint_py.upstream.session import FailureKind, UpstreamFailure
from waypoint_py.verdict import Flag, LocalReply

BEFORE = "upstream connect error or disconnect/reset before headers. "


def _request(method: bytes = b"GET", **headers: bytes) -> Request:
    return Request(method, b"http", b"a", b"/", [(name.replace("_", "-").encode(), value) for name, value in headers.items()])


@pytest.mark.parametrize(
    ("reply", "status", "body", "flags", "details"),
    [
        (replies.no_route("x"), 404, b"", ["NR"], "route_not_found"),
        (replies.no_destination(503, "x"), 503, b"", ["NC"], "cluster_not_found"),
        (replies.no_destination(500, "x"), 500, b"", ["NC"], "cluster_not_found"),
        (replies.no_endpoint("x"), 503, b"no healthy upstream", ["UH"], "no_healthy_upstream"),
        (replies.response_timeout("x"), 504, b"upstream request timeout", ["UT"], "response_timeout"),
        (replies.per_try_timeout("x"), 504, b"upstream request timeout", ["UT"], "upstream_per_try_timeout"),
        (replies.refused_head(408, "x"), 408, b"request header timeout", [], "request_header_timeout"),
        (replies.refused_head(431, "too large"), 431, b"Request Header Fields Too Large", ["DPE"], "http1.headers_too_large"),
        (replies.refused_head(400, "bad head"), 400, b"Bad Request", ["DPE"], "http1.codec_error.bad_head"),
        (replies.refused_head(400, "bad head", serial=False), 400, b"Bad Request", ["DPE"], "http2.codec_error.bad_head"),
        (replies.refused_head(426, "HTTP/1.0"), 426, b"Upgrade Required", ["DPE"], "low_version"),
    ],
)
def test_a_situation_has_its_status_body_flag_and_details(
    reply: LocalReply, status: int, body: bytes, flags: list[str], details: str
) -> None:
    assert (reply.status, reply.body, [flag.value for flag in reply.flags], reply.details) == (status, body, flags, details)


@pytest.mark.parametrize(
    ("kind", "word", "flag"),
    [
        (FailureKind.CONNECT, "remote connection failure", Flag.UPSTREAM_CONNECTION_FAILURE),
        (FailureKind.CONNECT_TIMEOUT, "connection timeout", Flag.UPSTREAM_CONNECTION_FAILURE),
        (FailureKind.TLS, "remote connection failure", Flag.UPSTREAM_CONNECTION_FAILURE),
        (FailureKind.REFUSED, "remote connection failure", Flag.UPSTREAM_CONNECTION_FAILURE),
        (FailureKind.TERMINATED, "connection termination", Flag.UPSTREAM_CONNECTION_TERMINATION),
        (FailureKind.RESET, "remote reset", Flag.UPSTREAM_REMOTE_RESET),
        (FailureKind.REFUSED_STREAM, "remote refused stream reset", Flag.UPSTREAM_REMOTE_RESET),
        (FailureKind.PROTOCOL, "protocol error", Flag.UPSTREAM_PROTOCOL_ERROR),
        (FailureKind.OVERFLOW, "overflow", Flag.UPSTREAM_OVERFLOW),
    ],
)
def test_every_failure_upstream_has_its_words(kind: FailureKind, word: str, flag: Flag) -> None:
    reply = replies.upstream_failed(UpstreamFailure(kind, "because"))
    status = 502 if kind is FailureKind.PROTOCOL else 503
    assert (reply.status, reply.body.decode(), reply.flags) == (status, f"{BEFORE}reset reason: {word}", (flag,))
    assert reply.details == f"upstream_reset_before_response_started{{{word.replace(' ', '_')}}}"
    again = replies.upstream_failed(UpstreamFailure(kind, "because"), retried=True)
    assert again.body.decode() == f"{BEFORE}retried and the latest reset reason: {word}"
    assert (reply.headers == [(b"x-envoy-overloaded", b"true")]) is (kind is FailureKind.OVERFLOW)
    assert replies.flag_of_failure(UpstreamFailure(kind, "")) is flag


def test_all_kinds_of_failure_are_in_the_table() -> None:
    for kind in FailureKind:
        replies.upstream_failed(UpstreamFailure(kind, ""))


def test_what_was_wrong_with_a_connection_is_for_the_log_and_not_for_the_client() -> None:
    reply = replies.upstream_failed(UpstreamFailure(FailureKind.TLS, "x", "TLS_error: certificate expired"))
    assert b"certificate" not in reply.body
    assert reply.details == "upstream_reset_before_response_started{remote_connection_failure|TLS_error:_certificate_expired}"


@pytest.mark.parametrize(
    ("status", "grpc"),
    [(400, 13), (401, 16), (403, 7), (404, 12), (429, 14), (502, 14), (503, 14), (504, 14), (413, 2), (500, 2), (408, 2)],
)
def test_a_grpc_client_gets_the_status_that_means_it(status: int, grpc: int) -> None:
    reply = LocalReply(status, b"50% of\nit", [(b"x-a", b"b")])
    response, body = replies.render(reply, _request(b"POST", content_type=b"application/grpc+proto"))
    assert (response.status, body) == (200, b"")
    assert response.first(b"content-type") == b"application/grpc"
    assert response.first(b"grpc-status") == b"%d" % grpc
    assert response.first(b"grpc-message") == b"50%25 of%0Ait"
    assert response.first(b"x-a") == b"b"


def test_a_reply_may_name_its_grpc_status() -> None:
    response, _ = replies.render(LocalReply(200, grpc_status=5), _request(b"POST", content_type=b"application/grpc"))
    assert response.first(b"grpc-status") == b"5"


def test_an_ordinary_client_gets_text() -> None:
    for request in (_request(), _request(content_type=b"application/grpc-web"), None):
        response, body = replies.render(LocalReply(503, b"no"), request)
        assert (response.status, body, response.content_length) == (503, b"no", 2)
        assert response.first(b"content-type") == b"text/plain"
    json = LocalReply(403, b"{}", [(b"content-type", b"application/json")])
    response, _ = replies.render(json, _request())
    assert response.headers == [(b"content-type", b"application/json")]


def test_a_status_without_a_body_has_none() -> None:
    response, body = replies.render(LocalReply(204, b"text"), _request())
    assert (body, response.content_length) == (b"", None)

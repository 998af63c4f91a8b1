"""How long a request may take, and gRPC's statuses."""

from __future__ import annotations

import pytest

from mesh.http.message import Request, Response
from mesh.model.l7.routing import DirectResponse, Origin, Retry, Route
from mesh.wire.grpc import Status
from tests.corpus.facts import asked
from waypoint_py.routing.grpc import find_message, find_status, http_from_status, reply_status, trailers_only
from waypoint_py.routing.timeouts import Timeouts, expected, find_timeouts, told_upstream
from waypoint_py.verdict import LocalReply


def route(timeout: float | None, per_try: float | None = None) -> Route:
    retry = None if per_try is None else Retry(per_try_timeout=per_try)
    return Route(Origin("VirtualService", "shop", "a"), DirectResponse(200), timeout=timeout, retry=retry)


def call(timeout: str | None = None) -> Request:
    headers = [("content-type", "application/grpc+proto")]
    return asked("/s/m", *headers, *([] if timeout is None else [("grpc-timeout", timeout)]), method="POST")


@pytest.mark.parametrize(
    ("granted", "request_", "total", "because"),
    [
        (None, asked(), None, ""),
        (0.0, asked(), None, ""),
        (5.0, asked(), 5.0, "timeout of VirtualService shop/a"),
        (5.0, call(), 5.0, "timeout of VirtualService shop/a"),
        (5.0, call("1S"), 1.0, "the client's grpc-timeout"),
        (5.0, call("1M"), 5.0, "timeout of VirtualService shop/a"),
        (None, call("1M"), 60.0, "the client's grpc-timeout"),
        (None, call("250m"), 0.25, "the client's grpc-timeout"),
        (None, call("1n"), 0.001, "the client's grpc-timeout"),
        (None, call("0m"), 0.001, "the client's grpc-timeout"),
        (5.0, call("soon"), 5.0, "timeout of VirtualService shop/a"),
        (5.0, call("-1S"), 5.0, "timeout of VirtualService shop/a"),
        (5.0, call("123456789S"), 5.0, "timeout of VirtualService shop/a"),
        (5.0, asked("/", ("grpc-timeout", "1S")), 5.0, "timeout of VirtualService shop/a"),
    ],
)
def test_a_client_may_shorten_the_routes_timeout_only(granted: float | None, request_: Request, total: float | None, because: str) -> None:
    assert find_timeouts(route(granted), request_, grpc=request_.is_grpc) == Timeouts(total, None, because)


@pytest.mark.parametrize(
    ("total", "per_try", "effective"),
    [(5.0, 2.0, 2.0), (None, 2.0, 2.0), (5.0, 5.0, None), (5.0, 9.0, None), (5.0, None, None), (5.0, 0.0, None)],
)
def test_a_per_try_timeout_counts_if_it_is_shorter(total: float | None, per_try: float | None, effective: float | None) -> None:
    assert find_timeouts(route(total, per_try), asked(), grpc=False).per_try == effective


@pytest.mark.parametrize(
    ("total", "per_try", "elapsed", "left"),
    [(None, None, 0, None), (None, 2.0, 9, 2.0), (5.0, None, 0, 5.0), (5.0, 2.0, 1, 2.0), (5.0, 2.0, 4, 1.0), (5.0, None, 6, 0.001)],
)
def test_a_try_may_take_what_is_left(total: float | None, per_try: float | None, elapsed: float, left: float | None) -> None:
    assert expected(Timeouts(total, per_try, ""), elapsed) == left


def told(request: Request, timeouts: Timeouts, elapsed: float = 0.0) -> tuple[bytes | None, bytes | None]:
    before = list(request.headers)
    request, given = told_upstream(request, timeouts, elapsed), request
    assert given.headers == before
    assert sum(name == b"x-envoy-expected-rq-timeout-ms" for name, _ in request.headers) <= 1
    return request.first(b"x-envoy-expected-rq-timeout-ms"), request.first(b"grpc-timeout")


def test_the_upstream_is_told_how_long_it_has() -> None:
    assert told(asked(), Timeouts(5.0, 2.0, "")) == (b"2000", None)
    assert told(asked(), Timeouts(5.0, None, ""), 4.5) == (b"500", None)
    assert told(asked(), Timeouts(None, None, "")) == (None, None)


def test_a_client_cannot_tell_it_otherwise() -> None:
    forged = ("x-envoy-expected-rq-timeout-ms", "1")
    assert told(asked("/", forged), Timeouts(None, None, "")) == (None, None)
    assert told(asked("/", forged, forged), Timeouts(3.0, None, "")) == (b"3000", None)


def test_a_grpc_server_is_told_in_its_own_header() -> None:
    assert told(call("10S"), Timeouts(2.0, None, "")) == (b"2000", b"2000000u")
    assert told(call("10S"), Timeouts(None, None, "")) == (None, b"10S")


@pytest.mark.parametrize(
    ("http", "grpc"),
    [
        (400, 13),
        (401, 16),
        (403, 7),
        (404, 12),
        (429, 14),
        (500, 2),
        (501, 2),
        (502, 14),
        (503, 14),
        (504, 14),
        (408, 2),
        (413, 2),
        (431, 2),
        (200, 2),
    ],
)
def test_a_local_reply_means_a_grpc_status(http: int, grpc: int) -> None:
    assert reply_status(LocalReply(http)) == grpc
    assert reply_status(LocalReply(http, grpc_status=8)) == 8


@pytest.mark.parametrize(
    ("grpc", "http"),
    [
        (0, 200),
        (1, 499),
        (2, 500),
        (3, 400),
        (4, 504),
        (5, 404),
        (6, 409),
        (7, 403),
        (8, 429),
        (9, 400),
        (10, 409),
        (11, 400),
        (12, 501),
        (13, 500),
        (14, 503),
        (15, 500),
        (16, 401),
    ],
)
def test_a_grpc_status_means_an_http_status(grpc: int, http: int) -> None:
    assert http_from_status(Status(grpc)) == http


def test_a_reply_to_a_grpc_client() -> None:
    reply = LocalReply(403, "RBAC: access denied, 100% ü\n".encode(), [(b"x", b"1")])
    response = trailers_only(reply)
    assert response.status == 200
    assert response.headers == [
        (b"content-type", b"application/grpc"),
        (b"grpc-status", b"7"),
        (b"grpc-message", b"RBAC: access denied, 100%25 %C3%BC%0A"),
        (b"x", b"1"),
    ]
    assert find_message(response) == "RBAC: access denied, 100% ü\n"
    assert find_status(response) is Status.PERMISSION_DENIED
    assert [name for name, _ in trailers_only(LocalReply(404)).headers] == [b"content-type", b"grpc-status"]


@pytest.mark.parametrize(
    ("value", "status"),
    [(b"0", Status.OK), (b"14", Status.UNAVAILABLE), (b"99", Status.UNKNOWN), (b"\xff", Status.UNKNOWN), (b"", Status.UNKNOWN)],
)
def test_a_status_that_nobody_defined_is_unknown(value: bytes, status: Status) -> None:
    assert find_status(Response(200, [(b"grpc-status", value)])) is status


def test_a_response_without_status_has_none() -> None:
    assert find_status(Response(200, [])) is None
    assert find_message(Response(200, [])) == ""
    assert find_message(Response(200, [(b"grpc-message", b"100%zz %E4")])) == "100%zz \ufffd"

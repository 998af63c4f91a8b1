"""What external authorizers are asked, and what their answers may and may not do."""

from __future__ import annotations

import pytest
from google.protobuf.wrappers_pb2 import BoolValue
from hypothesis import given
from hypothesis import strategies as st

from mesh.http.message import Request, Response
from mesh.model.address import SocketAddress, parse_ip
from mesh.model.identity import SpiffeId
from mesh.model.l7.policy import ExtAuthzGrpc, ExtAuthzHttp
from mesh.runtime.outbound import Answer, Header
from mesh.xds.proto import ext_authz_pb2 as pb
from waypoint_py.context import Connection
from waypoint_py.policy.consult import (
    MAX_BODY,
    MAX_MUTATIONS,
    Allowed,
    Buffered,
    Denied,
    Failed,
    grpc_check,
    http_check,
    read_grpc_answer,
    read_http_answer,
)

CONNECTION = Connection(
    SpiffeId("cluster.local", "shop", "web"),
    SocketAddress(parse_ip("fd00::7"), 4000),
    SocketAddress(parse_ip("10.96.0.1"), 80),
    None,
    None,
    None,
)


def http(**fields: object) -> ExtAuthzHttp:
    return ExtAuthzHttp("auth", "auth.svc", 8000, **fields)


GRPC = ExtAuthzGrpc("auth", "auth.svc", 9000)


def request(path: bytes = b"/a?b=c", **fields: object) -> Request:
    headers = [(b"authorization", b"Bearer t"), (b"x-a", b"1"), (b"x-b", b"2"), (b"x-a", b"3"), (b"cookie", b"c=d")]
    return Request(b"POST", b"http", b"api.shop", path, headers, **fields)


# Over HTTP


def test_of_the_headers_only_the_named_ones_are_shown() -> None:
    check = http_check(http(), request(), None)
    assert (check.method, check.target, check.body) == (b"POST", b"/a?b=c", b"")
    assert check.headers == [(b"host", b"api.shop"), (b"content-length", b"0")]


def test_headers_are_named_exactly_or_by_either_end_in_any_case() -> None:
    check = http_check(http(include_request_headers=("Authorization", "x-*", "*ie")), request(), None)
    assert check.headers[2:] == [(b"authorization", b"Bearer t"), (b"x-a", b"1"), (b"x-b", b"2"), (b"x-a", b"3"), (b"cookie", b"c=d")]


def test_additional_headers_stand_in_place_of_the_clients() -> None:
    check = http_check(http(include_request_headers=("x-*",), additional_headers=(("X-A", "ours"), ("x-new", "n"))), request(), None)
    assert check.headers[2:] == [(b"x-b", b"2"), (b"x-a", b"ours"), (b"x-new", b"n")]


def test_the_path_goes_after_the_providers_prefix() -> None:
    assert http_check(http(path_prefix="/check"), request(), None).target == b"/check/a?b=c"
    assert http_check(http(), request(b"/\xff \x7f"), None).target == b"/%FF%20%7F"


def test_framing_is_ours_whatever_is_named() -> None:
    asked = request()
    asked.headers += [(b"transfer-encoding", b"chunked"), (b"content-length", b"9"), (b"x-envoy-auth-partial-body", b"false")]
    additional = (("content-length", "7"), ("host", "evil"))
    check = http_check(
        http(include_request_headers=("*",), additional_headers=additional, max_request_bytes=5), asked, Buffered(b"12345", False)
    )
    names = [name for name, _ in check.headers]
    assert (names.count(b"content-length"), names.count(b"host"), names.count(b"transfer-encoding")) == (1, 1, 0)
    assert dict(check.headers)[b"content-length"] == b"5"
    assert [value for name, value in check.headers if name == b"x-envoy-auth-partial-body"] == [b"true"]
    assert check.body == b"12345"


def answer(status: int = 200, *headers: Header, body: bytes = b"") -> Answer:
    return Answer(status, headers, body)


def test_200_lets_through_with_the_headers_that_are_named() -> None:
    provider = http(headers_upstream_on_allow=("x-user", "x-r*"), headers_downstream_on_allow=("set-cookie",))
    found = read_http_answer(
        provider,
        answer(
            200, (b"X-User", b"u"), (b"x-role", b"a"), (b"x-role", b"b"), (b"x-other", b"o"), (b"set-cookie", b"1"), (b"set-cookie", b"2")
        ),
    )
    assert isinstance(found, Allowed)
    asked = Request(b"GET", b"http", b"h", b"/", [(b"x-user", b"evil"), (b"x-role", b"evil"), (b"x-role", b"worse"), (b"x-other", b"mine")])
    found.apply(asked)
    assert sorted(asked.headers) == [(b"x-other", b"mine"), (b"x-role", b"a"), (b"x-role", b"b"), (b"x-user", b"u")]
    response = Response(200, [(b"set-cookie", b"app"), (b"a", b"b")])
    found.response.apply(response)
    assert response.headers == [(b"a", b"b"), (b"set-cookie", b"1"), (b"set-cookie", b"2")]


def test_200_without_names_changes_nothing() -> None:
    found = read_http_answer(http(), answer(200, (b"x-user", b"u"), (b"set-cookie", b"1")))
    assert isinstance(found, Allowed)
    asked, response = request(), Response(200, [(b"a", b"b")])
    found.apply(asked)
    found.response.apply(response)
    assert (asked.headers, asked.path, response.headers) == (request().headers, request().path, [(b"a", b"b")])


def test_an_authorizer_may_have_headers_removed_but_none_that_make_the_request() -> None:
    found = read_http_answer(http(), answer(200, (b"x-envoy-auth-headers-to-remove", b"Authorization, host,:path , x-a")))
    assert isinstance(found, Allowed)
    asked = request()
    found.apply(asked)
    assert [name for name, _ in asked.headers] == [b"x-b", b"cookie"]


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        ((), [b"x-why", b"set-cookie", b"location", b"www-authenticate", b"content-type"]),
        (("x-why",), [b"x-why", b"location", b"www-authenticate"]),
    ],
)
def test_another_status_is_for_the_client(names: tuple[str, ...], shown: list[bytes]) -> None:
    headers = [(name, b"v") for name in (b"x-why", b"set-cookie", b"location", b"www-authenticate", b"content-type")]
    headers += [(b"content-length", b"3"), (b"transfer-encoding", b"chunked"), (b"connection", b"x-why"), (b"host", b"h")]
    for status in (201, 302, 401, 403, 429):
        found = read_http_answer(http(headers_downstream_on_deny=names), answer(status, *headers, body=b"no!"))
        assert isinstance(found, Denied)
        assert (found.status, [name for name, _ in found.headers], found.body) == (status, shown, b"no!")


@pytest.mark.parametrize("status", [500, 502, 503, 599])
def test_5xx_is_a_failure_of_the_authorizer(status: int) -> None:
    assert isinstance(read_http_answer(http(), answer(status)), Failed)


def test_an_answer_of_odd_headers_is_a_failure() -> None:
    provider = http(headers_upstream_on_allow=("x-*",))
    assert isinstance(read_http_answer(provider, answer(200, (b"x-a", b"a\r\nb: c"))), Failed)
    assert isinstance(read_http_answer(provider, answer(200, *((b"x-%d" % number, b"") for number in range(MAX_MUTATIONS + 1)))), Failed)
    assert isinstance(read_http_answer(provider, answer(403, body=b"x" * (MAX_BODY + 1))), Failed)


# By gRPC


def test_a_check_says_who_asks_whom_for_what() -> None:
    asked = request(content_length=3)
    asked.headers.append((b"x-request-id", b"id-1"))
    message = grpc_check(GRPC, asked, CONNECTION, None, now=1.5, local="spiffe://cluster.local/ns/shop/sa/waypoint")
    attributes = pb.CheckRequest.FromString(message).attributes
    assert attributes.source.principal == "spiffe://cluster.local/ns/shop/sa/web"
    assert attributes.source.address.socket_address.address == "fd00::7"
    assert attributes.source.address.socket_address.port_value == 4000
    assert attributes.destination.principal == "spiffe://cluster.local/ns/shop/sa/waypoint"
    assert attributes.destination.address.socket_address.address == "10.96.0.1"
    assert (attributes.request.time.seconds, attributes.request.time.nanos) == (1, 500_000_000)
    http = attributes.request.http
    assert (http.id, http.method, http.path, http.host, http.scheme, http.protocol, http.size) == (
        "id-1",
        "POST",
        "/a?b=c",
        "api.shop",
        "http",
        "HTTP/1.1",
        3,
    )
    assert dict(http.headers) == {
        ":method": "POST",
        ":path": "/a?b=c",
        ":authority": "api.shop",
        ":scheme": "http",
        "authorization": "Bearer t",
        "x-a": "1,3",
        "x-b": "2",
        "cookie": "c=d",
        "x-request-id": "id-1",
    }
    assert http.body == ""


@pytest.mark.parametrize(("as_bytes", "body", "raw"), [(False, "a\ufffd", b""), (True, "", b"a\xff")])
def test_a_body_is_shown_as_text_or_as_bytes(as_bytes: bool, body: str, raw: bytes) -> None:
    provider = ExtAuthzGrpc("auth", "auth.svc", 9000, max_request_bytes=2, pack_as_bytes=as_bytes)
    asked = request()
    asked.headers.append((b"x-envoy-auth-partial-body", b"evil"))
    http = pb.CheckRequest.FromString(grpc_check(provider, asked, CONNECTION, Buffered(b"a\xff", False), now=0)).attributes.request.http
    assert (http.body, http.raw_body, http.size, http.headers["x-envoy-auth-partial-body"]) == (body, raw, 2, "true")


def test_a_connection_is_shown_without_any_http() -> None:
    attributes = pb.CheckRequest.FromString(grpc_check(GRPC, None, CONNECTION, None, now=0)).attributes
    assert attributes.source.principal
    assert not attributes.request.HasField("http")


def option(name: str, value: str, **fields: object) -> pb.HeaderValueOption:
    return pb.HeaderValueOption(header=pb.HeaderValue(key=name, value=value), **fields)


def test_status_0_lets_through_with_every_kind_of_change() -> None:
    ok = pb.OkHttpResponse(
        headers=[
            option("X-Set", "new"),
            option("x-raw", ""),
            option("x-append", "more", append=BoolValue(value=True)),
            option("x-append-none", "more", append=BoolValue(value=True)),
            option("x-replace", "new", append=BoolValue(value=False)),
            option("x-absent", "new", append_action=pb.HeaderValueOption.ADD_IF_ABSENT),
            option("x-present", "new", append_action=pb.HeaderValueOption.ADD_IF_ABSENT),
            option("x-if", "new", append_action=pb.HeaderValueOption.OVERWRITE_IF_EXISTS),
            option("x-if-none", "new", append_action=pb.HeaderValueOption.OVERWRITE_IF_EXISTS),
            option(":path", "/evil"),
            option("Host", "evil"),
            option("content-length", "0"),
        ],
        headers_to_remove=["X-Gone", ":method", "host"],
        response_headers_to_add=[option("x-r", "1"), option("x-s", "2", append=BoolValue(value=True))],
        query_parameters_to_set=[pb.QueryParameter(key="n w", value="a&b"), pb.QueryParameter(key="old", value="2")],
        query_parameters_to_remove=["gone"],
    )
    ok.headers[1].header.raw_value = b"\xff"
    found = read_grpc_answer(pb.CheckResponse(ok_response=ok).SerializeToString())
    assert isinstance(found, Allowed)
    names = (b"x-set", b"x-append", b"x-replace", b"x-present", b"x-if", b"x-gone")
    asked = Request(b"GET", b"http", b"h", b"/p?old=1&gone=1&%67one=2&kept", [(name, b"old") for name in names])
    found.apply(asked)
    assert dict(asked.headers) == {
        b"x-set": b"new",
        b"x-raw": b"\xff",
        b"x-append": b"old,more",
        b"x-replace": b"new",
        b"x-absent": b"new",
        b"x-present": b"old",
        b"x-if": b"new",
    }
    assert (asked.path, asked.authority, asked.method) == (b"/p?kept&n%20w=a%26b&old=2", b"h", b"GET")
    response = Response(200, [(b"x-r", b"0"), (b"x-s", b"1")])
    found.response.apply(response)
    assert response.headers == [(b"x-s", b"1"), (b"x-r", b"1"), (b"x-s", b"2")]


def test_any_other_status_denies_with_the_authorizers_words() -> None:
    denied = pb.DeniedHttpResponse(
        status=pb.HttpStatus(code=429), headers=[option("X-Why", "w"), option("content-length", "9")], body="slow down"
    )
    found = read_grpc_answer(pb.CheckResponse(status={"code": 7}, denied_response=denied).SerializeToString())
    assert found == Denied(429, [(b"x-why", b"w")], b"slow down")


@pytest.mark.parametrize("code", [0, 100, 199, 600, -1])
def test_a_denial_without_a_status_is_403(code: int) -> None:
    denied = pb.DeniedHttpResponse(status=pb.HttpStatus(code=code))
    found = read_grpc_answer(pb.CheckResponse(status={"code": 16}, denied_response=denied).SerializeToString())
    assert found == Denied(403, [], b"")
    assert read_grpc_answer(pb.CheckResponse(status={"code": 7}).SerializeToString()) == Denied(403, [], b"")


@pytest.mark.parametrize(
    "response",
    [
        pb.CheckResponse(ok_response=pb.OkHttpResponse(headers=[option("x-a", "a\r\nb: c")])),
        pb.CheckResponse(ok_response=pb.OkHttpResponse(headers=[option("x a", "v")])),
        pb.CheckResponse(ok_response=pb.OkHttpResponse(headers=[option("", "v")])),
        pb.CheckResponse(ok_response=pb.OkHttpResponse(response_headers_to_add=[option("x\n", "v")])),
        pb.CheckResponse(ok_response=pb.OkHttpResponse(headers=[option(f"x-{number}", "v") for number in range(MAX_MUTATIONS + 1)])),
        pb.CheckResponse(status={"code": 7}, denied_response=pb.DeniedHttpResponse(headers=[option("x", "\0")])),
        pb.CheckResponse(status={"code": 7}, denied_response=pb.DeniedHttpResponse(body="x" * (MAX_BODY + 1))),
    ],
)
def test_an_answer_that_would_break_the_message_is_a_failure(response: pb.CheckResponse) -> None:
    assert isinstance(read_grpc_answer(response.SerializeToString()), Failed)


@given(st.binary(max_size=300))
def test_no_bytes_of_an_authorizer_raise(data: bytes) -> None:
    for message in (
        data,
        b"\x1a" + bytes([len(data) & 0x7F]) + data[:127],
        b"\x0a\x02\x08\x07\x12" + bytes([len(data) & 0x7F]) + data[:127],
    ):
        found = read_grpc_answer(message)
        if isinstance(found, Allowed):
            found.apply(request())


@given(
    st.integers(200, 599),
    st.lists(st.tuples(st.binary(max_size=20), st.binary(max_size=20)), max_size=5),
    st.binary(max_size=50),
)
def test_no_answer_over_http_raises_or_breaks_a_request(status: int, headers: list[Header], body: bytes) -> None:
    provider = http(headers_upstream_on_allow=("*",), headers_downstream_on_allow=("*",))
    found = read_http_answer(provider, Answer(status, tuple(headers), body))
    if isinstance(found, Allowed):
        asked = request()
        found.apply(asked)
        for name, value in asked.headers:
            assert name
            assert not set(name + value) & set(b"\r\n\0")

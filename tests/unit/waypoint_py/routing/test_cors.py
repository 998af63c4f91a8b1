"""Cross-origin requests: the tables of VirtualService and of HTTPRouteCORS."""

from __future__ import annotations

import pytest

from mesh.http.message import Response
from mesh.model.l7.matching import Exact, Prefix, Regex
from mesh.model.l7.routing import Cors
from tests.corpus.facts import asked
from waypoint_py.routing.cors import CompiledCors, allow_response, answer_preflight, compile_cors, find_allowed_origin

POLICY = Cors(
    (Exact("http://a"), Regex("https://.*\\.bar\\.com")), methods=("POST", "GET"), headers=("x-a", "x-b"), expose=("x-e",), max_age=10
)


def preflight(cors: Cors, origin: str = "http://a", method: str = "DELETE", *headers: tuple[str, str]) -> dict[bytes, bytes] | None:
    """The headers of the answer; None: it goes to the application."""
    request = asked("/", ("origin", origin), ("access-control-request-method", method), *headers, method="OPTIONS")
    reply = answer_preflight(compile_cors(cors), request, "HTTPRoute shop/a")
    if reply is None:
        return None
    assert (reply.status, reply.body, reply.details) == (200, b"", "cors_response")
    return dict(reply.headers)


def test_a_preflight_says_what_the_policy_allows_whatever_it_asks() -> None:
    assert preflight(POLICY) == {
        b"access-control-allow-origin": b"http://a",
        b"access-control-allow-methods": b"POST,GET",
        b"access-control-allow-headers": b"x-a,x-b",
        b"access-control-expose-headers": b"x-e",
        b"access-control-max-age": b"10",
    }


@pytest.mark.parametrize("origin", ["https://www.bar.com", "https://a.b.bar.com"])
def test_an_origin_may_match_a_pattern(origin: str) -> None:
    assert (preflight(POLICY, origin) or {})[b"access-control-allow-origin"] == origin.encode()


@pytest.mark.parametrize(
    "origin", ["http://z", "https://bar.com", "http://www.bar.com", "http://A", "http://a.evil", "https://www.bar.com.evil", "null"]
)
def test_a_preflight_of_another_origin_goes_to_the_application_or_is_answered_with_nothing(origin: str) -> None:
    assert preflight(POLICY, origin) is None
    assert preflight(Cors(POLICY.origins, methods=("GET",), forward_unmatched=False), origin) == {}


def test_credentials_are_allowed_only_if_the_policy_says_so() -> None:
    assert b"access-control-allow-credentials" not in (preflight(POLICY) or {})
    assert (preflight(Cors(POLICY.origins, credentials=True)) or {})[b"access-control-allow-credentials"] == b"true"


@pytest.mark.parametrize(
    ("credentials", "expand", "methods", "headers"),
    [(False, True, b"*", b"*"), (True, True, b"PUT", b"x-one, x-two"), (True, False, b"*", b"*")],
)
def test_a_wildcard_is_what_was_asked_when_credentials_are_allowed(credentials: bool, expand: bool, methods: bytes, headers: bytes) -> None:
    cors = Cors((Regex(".*"),), methods=("*",), headers=("*",), credentials=credentials, expand_wildcards=expand)
    found = preflight(cors, "http://any", "PUT", ("access-control-request-headers", "x-one, x-two")) or {}
    assert (found[b"access-control-allow-methods"], found[b"access-control-allow-headers"]) == (methods, headers)
    assert found[b"access-control-allow-origin"] == b"http://any"


def test_nothing_is_said_of_headers_that_were_not_asked_for() -> None:
    cors = Cors((Prefix("http"),), methods=("GET",), headers=("*",), credentials=True, expand_wildcards=True)
    assert b"access-control-allow-headers" not in (preflight(cors) or {})


@pytest.mark.parametrize(
    ("method", "headers"),
    [
        ("GET", (("origin", "http://a"), ("access-control-request-method", "PUT"))),
        ("OPTIONS", (("origin", "http://a"),)),
        ("OPTIONS", (("access-control-request-method", "PUT"),)),
        ("OPTIONS", (("origin", ""), ("access-control-request-method", "PUT"))),
    ],
)
def test_other_requests_are_no_preflights(method: str, headers: tuple[tuple[str, str], ...]) -> None:
    assert answer_preflight(compile_cors(POLICY), asked("/", *headers, method=method)) is None


def test_a_response_to_an_allowed_origin_says_so_in_place_of_what_the_application_said() -> None:
    cors = compile_cors(Cors(POLICY.origins, expose=("x-e", "x-f"), credentials=True))
    origin = find_allowed_origin(cors, asked("/", ("origin", "http://a")))
    assert origin == b"http://a"
    response = Response(200, [(b"access-control-allow-origin", b"*"), (b"x", b"1")])
    allow_response(response, cors, origin)
    assert response.headers == [
        (b"x", b"1"),
        (b"access-control-allow-origin", b"http://a"),
        (b"access-control-allow-credentials", b"true"),
        (b"access-control-expose-headers", b"x-e,x-f"),
    ]


@pytest.mark.parametrize("headers", [(), (("origin", "http://z"),), (("origin", ""),)])
def test_a_response_to_others_stays_as_it_is(headers: tuple[tuple[str, str], ...]) -> None:
    assert find_allowed_origin(compile_cors(POLICY), asked("/", *headers)) is None


def test_a_pattern_that_cannot_be_compiled_allows_nobody() -> None:
    cors: CompiledCors = compile_cors(Cors((Regex("("),)))
    assert not cors.allows(b"http://a")
    assert not cors.allows(b"(")

"""Where redirects lead."""

from __future__ import annotations

import pytest

from mesh.model.l7.matching import PathKind, PathMatch
from mesh.model.l7.routing import DirectResponse, HeaderChanges, Origin, Redirect, Route
from tests.corpus.facts import Known, asked
from waypoint_py.routing.actions import answer, change_reply, compile_route, location

ORIGIN = Origin("VirtualService", "shop", "a")


def leads(
    redirect: Redirect, path: str = "/foo", *, host: str = "b", port: int = 80, scheme: str = "http", match: PathMatch | None = None
) -> str:
    return location(redirect, asked(path, authority=host, scheme=scheme), match, port).decode()


@pytest.mark.parametrize(
    ("host", "port", "to"),
    [
        ("b", 80, "http://b/foo"),
        ("b:80", 80, "http://b:80/foo"),
        ("b", 85, "http://b:85/foo"),
        ("b:85", 85, "http://b:85/foo"),
        ("b:8080", 80, "http://b:8080/foo"),
        ("b:8080", 85, "http://b:85/foo"),
        ("[fd00::1]", 80, "http://[fd00::1]/foo"),
        ("[fd00::1]:80", 80, "http://[fd00::1]:80/foo"),
        ("[fd00::1]:8080", 85, "http://[fd00::1]:85/foo"),
    ],
)
def test_redirect_to_the_request_port(host: str, port: int, to: str) -> None:
    assert leads(Redirect(path="/foo", request_port=True), "/x", host=host, port=port) == to


def test_redirect_port_and_scheme() -> None:
    assert leads(Redirect(scheme="https", request_port=True), host="host", port=80) == "https://host:80/foo"
    assert leads(Redirect(scheme="https", request_port=True), host="host", port=443) == "https://host/foo"
    assert leads(Redirect(scheme="https", request_port=True), host="host:80", port=443) == "https://host/foo"


@pytest.mark.parametrize(
    ("redirect", "host", "to"),
    [
        (Redirect(path="/x"), "b", "http://b/x"),
        (Redirect(path="/x"), "b:8080", "http://b:8080/x"),
        (Redirect(scheme="https"), "b", "https://b/foo"),
        (Redirect(scheme="https"), "b:80", "https://b/foo"),
        (Redirect(scheme="https"), "b:8080", "https://b/foo"),
        (Redirect(scheme="https"), "[::1]:80", "https://[::1]/foo"),
        (Redirect(scheme="http"), "b:80", "http://b:80/foo"),
        (Redirect(authority="new"), "b:8080", "http://new/foo"),
        (Redirect(authority="new:85"), "b", "http://new:85/foo"),
        (Redirect(authority="new:85", request_port=True), "b", "http://new:85/foo"),
        (Redirect(authority="new", port=85), "b", "http://new:85/foo"),
        (Redirect(authority="new:1", port=85), "b", "http://new:85/foo"),
        (Redirect(authority="fd00::1", port=85), "b", "http://fd00::1:85/foo"),
        (Redirect(port=80), "b:8080", "http://b/foo"),
        (Redirect(port=80), "b:80", "http://b:80/foo"),
        (Redirect(port=443, scheme="https"), "b:80", "https://b/foo"),
        (Redirect(port=443), "b", "http://b:443/foo"),
        (Redirect(path="/x", authority="new", scheme="https"), "b", "https://new/x"),
    ],
)
def test_a_redirect_keeps_of_the_request_what_it_does_not_replace(redirect: Redirect, host: str, to: str) -> None:
    assert leads(redirect, host=host) == to


# Gateway API, HTTPRouteRedirectPortAndScheme. Without a port and scheme the control plane asks for the request's port.
@pytest.mark.parametrize(
    ("listener", "scheme", "port", "to"),
    [
        (80, None, None, "http://example.org/foo"),
        (80, None, 80, "http://example.org/foo"),
        (80, None, 8080, "http://example.org:8080/foo"),
        (80, "https", None, "https://example.org/foo"),
        (80, "https", 443, "https://example.org/foo"),
        (80, "https", 8443, "https://example.org:8443/foo"),
        (8080, None, None, "http://example.org:8080/foo"),
        (8080, None, 80, "http://example.org/foo"),
        (8080, "https", None, "https://example.org/foo"),
        (8080, "https", 443, "https://example.org/foo"),
        (8080, "https", 8443, "https://example.org:8443/foo"),
        (8080, "http", None, "http://example.org/foo"),
        (8080, "http", 8080, "http://example.org:8080/foo"),
    ],
)
@pytest.mark.parametrize("host", ["example.org", "client"])
def test_gateway_api_port_and_scheme(listener: int, scheme: str | None, port: int | None, to: str, host: str) -> None:
    redirect = Redirect(302, scheme, "example.org", port, request_port=port is None and scheme is None)
    assert leads(redirect, host=host, port=listener) == to


@pytest.mark.parametrize(
    ("listener", "scheme", "port", "to"),
    [
        (443, None, None, "https://example.org/foo"),
        (443, None, 443, "https://example.org/foo"),
        (443, None, 8443, "https://example.org:8443/foo"),
        (443, "http", None, "http://example.org/foo"),
        (443, "http", 80, "http://example.org/foo"),
        (443, "http", 8080, "http://example.org:8080/foo"),
    ],
)
def test_gateway_api_port_and_scheme_of_a_secure_listener(listener: int, scheme: str | None, port: int | None, to: str) -> None:
    redirect = Redirect(302, scheme, None, port, request_port=port is None and scheme is None)
    assert leads(redirect, host="example.org", port=listener, scheme="https") == to


SEGMENTS = PathMatch(PathKind.SEGMENTS, "/original-prefix")
PLAIN = PathMatch(PathKind.PREFIX, "/foo")


@pytest.mark.parametrize(
    ("redirect", "path", "match", "to"),
    [
        (Redirect(302, prefix="/replacement-prefix"), "/original-prefix/lemon", SEGMENTS, "http://b/replacement-prefix/lemon"),
        (Redirect(302, prefix="/"), "/original-prefix/lemon?q=1", SEGMENTS, "http://b/lemon?q=1"),
        (Redirect(302, prefix="/"), "/original-prefix", SEGMENTS, "http://b/"),
        (Redirect(302, path="/full-path-replacement"), "/full/path/original?q=1&r", None, "http://b/full-path-replacement?q=1&r"),
        (Redirect(path="/new?own=1"), "/x?q=1", None, "http://b/new?own=1"),
        (Redirect(prefix="/bar"), "/foobaz?q", PLAIN, "http://b/barbaz?q"),
        (Redirect(authority="c"), "/x/y?q", None, "http://c/x/y?q"),
    ],
)
def test_the_path_of_a_redirect(redirect: Redirect, path: str, match: PathMatch | None, to: str) -> None:
    assert leads(redirect, path, match=match) == to


def test_a_redirect_of_a_request_without_host_is_relative() -> None:
    assert leads(Redirect(path="/x"), "/foo?q", host="") == "/x?q"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_answers_with_its_status_and_the_routes_response_headers(status: int) -> None:
    changes = HeaderChanges(set=(("x-from", "%REQ(:path)%"),))
    route = compile_route(Route(ORIGIN, Redirect(status, authority="example.org"), response=changes))
    request = asked("/hostname-redirect")
    reply = answer(route, request, None, 80)
    assert reply is not None
    assert (reply.status, reply.details, reply.body) == (status, "direct_response", b"")
    assert reply.headers == [(b"location", b"http://example.org/hostname-redirect")]
    changed = change_reply(reply, route, None, Known(request))
    assert changed.headers == [(b"location", b"http://example.org/hostname-redirect"), (b"x-from", b"/hostname-redirect")]
    assert reply.headers == [(b"location", b"http://example.org/hostname-redirect")]


def test_a_direct_response() -> None:
    route = compile_route(Route(ORIGIN, DirectResponse(418, b"short and stout")))
    reply = answer(route, asked(), None, 80)
    assert reply is not None
    assert (reply.status, reply.body, reply.details, reply.flags) == (418, b"short and stout", "direct_response", ())
    assert change_reply(reply, route, None, Known()) is reply

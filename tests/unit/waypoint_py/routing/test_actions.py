"""Where a request goes, and what it, its response and our own answers look like afterwards."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from mesh.http.message import Request, Response
from mesh.model.l7.matching import PathKind, PathMatch
from mesh.model.l7.routing import Destination, Forward, HeaderChanges, Origin, Rewrite, Route, WeightedDestination
from tests.corpus.facts import Known, asked
from waypoint_py.routing.actions import (
    Chosen,
    CompiledRoute,
    answer,
    change_reply,
    change_request,
    change_response,
    choose,
    compile_route,
    split_port,
)
from waypoint_py.verdict import Flag, LocalReply

ORIGIN = Origin("HTTPRoute", "shop", "reviews", 0)
NONE = HeaderChanges()


def to(name: str, weight: int = 1, **fields: object) -> WeightedDestination:
    return WeightedDestination(Destination("shop", name, 80), weight, **fields)


def forward(
    *destinations: WeightedDestination, request: HeaderChanges = NONE, response: HeaderChanges = NONE, **fields: object
) -> CompiledRoute:
    action = Forward(destinations, **fields)
    return compile_route(Route(ORIGIN, action, request=request, response=response))


def chosen(route: CompiledRoute) -> Chosen:
    picked = choose(route, random.Random(1))
    assert isinstance(picked, Chosen)
    return picked


def sent(route: CompiledRoute, request: Request, match: PathMatch | None = None) -> Request:
    """The request as its destination sees it."""
    change_request(request, route, chosen(route).destination, match, Known(request))
    return request


# Weights.


def shares(route: CompiledRoute, draws: int = 2000) -> Counter[str]:
    rng = random.Random(7)
    found: Counter[str] = Counter()
    for _ in range(draws):
        picked = choose(route, rng)
        found[picked.to.destination.hostname if isinstance(picked, Chosen) else str(picked.status)] += 1
    return found


def test_requests_are_shared_out_by_weight_and_weight_zero_gets_none() -> None:
    found = shares(forward(to("v1", 70), to("v2", 30), to("v3", 0)))
    assert found.keys() == {"v1", "v2"}
    assert abs(found["v1"] / 2000 - 0.7) < 0.05


def test_a_destination_that_cannot_be_used_keeps_its_share_and_fails_it() -> None:
    found = shares(forward(to("v1", 1), to("gone", 1, fails_with=500, because="BackendNotFound")))
    assert found.keys() == {"v1", "500"}
    assert abs(found["500"] / 2000 - 0.5) < 0.05


def test_a_share_that_fails_says_why() -> None:
    reply = choose(forward(to("gone", fails_with=500, because="Service shop/gone is not known")), random.Random(1))
    assert isinstance(reply, LocalReply)
    assert (reply.status, reply.flags, reply.details) == (500, (Flag.NO_CLUSTER_FOUND,), "cluster_not_found")
    assert reply.because == "HTTPRoute shop/reviews rule 0: Service shop/gone is not known"


@pytest.mark.parametrize("destinations", [(), (to("v1", 0),), (to("v1", 0), to("v2", 0))])
@pytest.mark.parametrize("status", [500, 503])
def test_without_any_share_the_answer_is_the_routes_status(destinations: tuple[WeightedDestination, ...], status: int) -> None:
    reply = choose(forward(*destinations, empty_status=status), random.Random(1))
    assert isinstance(reply, LocalReply)
    assert (reply.status, reply.body) == (status, b"")


def test_a_destination_at_the_requests_port_is_the_same_object_each_time() -> None:
    """By which what is worked out of a request's ends is remembered."""
    assert Destination("shop", "web", 0, "v1").at(80) is Destination("shop", "web", 0, "v1").at(80)
    assert Destination("shop", "web", 0).at(80) == Destination("shop", "web", 80)
    assert Destination("shop", "web", 81).at(80) == Destination("shop", "web", 81)


def test_a_choice_says_of_what_share() -> None:
    assert chosen(forward(to("v1"))).because == "HTTPRoute shop/reviews rule 0"
    assert chosen(forward(to("v1", 3), to("v2", 0))).because == "HTTPRoute shop/reviews rule 0"
    assert "a share of" in chosen(forward(to("v1", 3), to("v2", 1))).because


# Paths and authorities.

SEGMENTS = PathKind.SEGMENTS


@pytest.mark.parametrize(
    ("path", "prefix", "replacement", "result"),
    [
        # The table of Gateway API's ReplacePrefixMatch.
        ("/foo/bar", "/foo", "/xyz", "/xyz/bar"),
        ("/foo/bar", "/foo", "/xyz/", "/xyz/bar"),
        ("/foo/bar", "/foo/", "/xyz", "/xyz/bar"),
        ("/foo/bar", "/foo/", "/xyz/", "/xyz/bar"),
        ("/foo", "/foo", "/xyz", "/xyz"),
        ("/foo/", "/foo", "/xyz", "/xyz/"),
        ("/foo/bar", "/foo", "", "/bar"),
        ("/foo/", "/foo", "", "/"),
        ("/foo", "/foo", "", "/"),
        ("/foo/", "/foo", "/", "/"),
        ("/foo", "/foo", "/", "/"),
        # HTTPRouteRewritePath.
        ("/prefix/one/two", "/prefix/one", "/one", "/one/two"),
        ("/strip-prefix/three", "/strip-prefix", "/", "/three"),
        ("/strip-prefix", "/strip-prefix", "/", "/"),
        ("/any", "/", "/api", "/api/any"),
        ("/", "/", "/api", "/api/"),
        ("/a%2Fb/c", "/a%2Fb", "/x", "/x/c"),
    ],
)
def test_a_segment_prefix_is_replaced_as_one(path: str, prefix: str, replacement: str, result: str) -> None:
    route = forward(to("v1"), rewrite=Rewrite(prefix=replacement))
    assert sent(route, asked(path), PathMatch(SEGMENTS, prefix)).path == result.encode()
    assert sent(route, asked(f"{path}?q=/&r"), PathMatch(SEGMENTS, prefix)).path == f"{result}?q=/&r".encode()


@pytest.mark.parametrize(
    ("path", "match", "replacement", "result"),
    [
        ("/foobar", PathMatch(PathKind.PREFIX, "/foo"), "/x", "/xbar"),
        ("/foo/bar", PathMatch(PathKind.PREFIX, "/foo"), "/", "//bar"),
        ("/foo/bar", PathMatch(PathKind.PREFIX, "/foo/"), "/", "/bar"),
        ("/FOO/bar", PathMatch(PathKind.PREFIX, "/foo", ignore_case=True), "/x", "/x/bar"),
        ("/foo", PathMatch(PathKind.EXACT, "/foo"), "/x/y", "/x/y"),
        ("/re/abc/x", PathMatch(PathKind.REGEX, "/re/[a-z]+/x"), "/whole", "/whole"),
        ("/any", None, "/api", "/apiany"),
        ("/any", None, "/api/", "/api/any"),
    ],
)
def test_the_matched_part_of_other_matches_is_replaced_as_text(path: str, match: PathMatch | None, replacement: str, result: str) -> None:
    assert sent(forward(to("v1"), rewrite=Rewrite(prefix=replacement)), asked(f"{path}?q"), match).path == f"{result}?q".encode()


@pytest.mark.parametrize(
    ("regex", "substitution", "path", "result"),
    [
        ("^/service/([^/]+)(/.*)$", "\\2/instance/\\1", "/service/foo/v1/api", "/v1/api/instance/foo"),
        ("one", "two", "/xxx/one/yyy/one/zzz", "/xxx/two/yyy/two/zzz"),
        ("^(.*?)one(.*)$", "\\1two\\2", "/xxx/one/yyy/one/zzz", "/xxx/two/yyy/one/zzz"),
        ("(?i)/xxx/", "/yyy/", "/aaa/XxX/bbb", "/aaa/yyy/bbb"),
        ("x*", "-", "/rrxxabxd", "-/-r-r-a-b-d-"),
        ("(a)|b", "[\\1]", "/ab", "/[a][]"),
        ("/(.)", "\\\\\\0\\\\", "/ab", "\\/a\\b"),
        ("none", "x", "/ab", "/ab"),
        (".", "", "/ü", ""),
    ],
)
def test_a_regex_is_replaced_wherever_it_matches_outside_the_query(regex: str, substitution: str, path: str, result: str) -> None:
    route = forward(to("v1"), rewrite=Rewrite(regex=regex, substitution=substitution))
    assert route.broken == ""
    assert sent(route, asked(f"{path}?one=xxx")).path == f"{result}?one=xxx".encode()


@pytest.mark.parametrize(("regex", "substitution"), [("(", ""), ("a", "\\1"), ("a", "\\"), ("a", "\\n"), ("a" * 1025, "")])
def test_a_rewrite_that_cannot_be_done_is_answered_500(regex: str, substitution: str) -> None:
    route = forward(to("v1"), rewrite=Rewrite(regex=regex, substitution=substitution))
    reply = answer(route, asked(), None, 80)
    assert reply is not None
    assert reply.status == 500
    assert reply.because.startswith("HTTPRoute shop/reviews rule 0 cannot be carried out: ")


def test_a_full_path_replaces_all_but_the_query() -> None:
    request = sent(forward(to("v1"), rewrite=Rewrite(full="/one")), asked("/full/one/two?q=1"))
    assert (request.path, request.first(b"x-envoy-original-path")) == (b"/one?q=1", b"/full/one/two?q=1")


def test_a_request_that_is_not_rewritten_stays_as_it_is() -> None:
    request = sent(forward(to("v1")), asked("/a?b", ("x", "1"), authority="b:80"))
    assert (request.path, request.authority, request.headers) == (b"/a?b", b"b:80", [(b"x", b"1")])


def test_a_client_cannot_say_what_the_original_path_was() -> None:
    request = sent(forward(to("v1"), rewrite=Rewrite(full="/one")), asked("/two", ("x-envoy-original-path", "/forged")))
    assert [value for name, value in request.headers if name == b"x-envoy-original-path"] == [b"/two"]


HOST = HeaderChanges(set=(("host", "by-route"),))


@pytest.mark.parametrize(
    ("rewrite", "on_route", "destination", "authority"),
    [
        (None, NONE, to("v1"), "b"),
        (Rewrite(authority="new"), NONE, to("v1"), "new"),
        (Rewrite(authority="new"), HOST, to("v1", authority="dest"), "new"),
        (None, HOST, to("v1", authority="dest"), "by-route"),
        (None, HeaderChanges(add=((":authority", "added"),)), to("v1"), "added"),
        (None, HeaderChanges(set=((":authority", "set"),), add=(("host", "added"),)), to("v1"), "set"),
        (None, NONE, to("v1", authority="dest"), "dest"),
        (None, NONE, to("v1", authority="dest", request=HOST), "dest"),
        (None, NONE, to("v1", request=HOST), "by-route"),
        (Rewrite(full="/x"), HOST, to("v1"), "by-route"),
    ],
)
def test_the_authority_is_the_rewrites_the_routes_or_the_destinations(
    rewrite: Rewrite | None, on_route: HeaderChanges, destination: WeightedDestination, authority: str
) -> None:
    request = sent(forward(destination, rewrite=rewrite, request=on_route), asked())
    assert request.authority == authority.encode()
    assert request.first(b"host") is None
    assert request.first(b"x-envoy-original-host") == (None if authority == "b" else b"b")


# Headers.


def changed(changes: HeaderChanges, *headers: tuple[str, str]) -> list[tuple[bytes, bytes]]:
    return sent(forward(to("v1"), request=changes), asked("/p?q", *headers)).headers


@pytest.mark.parametrize(
    ("changes", "headers", "result"),
    [
        (HeaderChanges(set=(("x", "new"),)), [("x", "a"), ("x", "b")], [("x", "new")]),
        (HeaderChanges(set=(("x", "new"),)), [], [("x", "new")]),
        (HeaderChanges(add=(("x", "new"),)), [("x", "a")], [("x", "a"), ("x", "new")]),
        (HeaderChanges(add=(("x", "new"),)), [], [("x", "new")]),
        (HeaderChanges(remove=("x", "y")), [("x", "a"), ("z", "1"), ("y", "2"), ("x", "b")], [("z", "1")]),
        (HeaderChanges(remove=("x",), set=(("x", "s"),), add=(("x", "a"),)), [("x", "1")], [("x", "s"), ("x", "a")]),
        (HeaderChanges(remove=("x",), add=(("x", "a"),)), [("x", "1")], [("x", "a")]),
        (HeaderChanges(set=(("x", "%REQ(:path)%"), ("y", "50%%"))), [], [("x", "/p?q"), ("y", "50%")]),
        (HeaderChanges(set=(("x", "%REQ(y)%"), ("y", "2"))), [("y", "1")], [("x", "1"), ("y", "2")]),
        (HeaderChanges(remove=("y",), set=(("x", "<%REQ(y)%>"),)), [("y", "1")], [("x", "<>")]),
        (HeaderChanges(set=(("x", "%REQ(none)%"), ("y", ""))), [("x", "1"), ("y", "2")], [("x", "1"), ("y", "2")]),
        (HeaderChanges(set=(("x", "a%REQ(none)%b"),)), [], [("x", "ab")]),
        (HeaderChanges(set=(("x", "a\r\nevil: 1"),)), [], [("x", "aevil: 1")]),
        (HeaderChanges(set=((":path", "/x"), (":method", "PUT"), ("content-length", "9"), ("transfer-encoding", "chunked"))), [], []),
        (HeaderChanges(remove=("host", ":path", "content-length")), [("content-length", "3")], [("content-length", "3")]),
    ],
)
def test_header_changes(changes: HeaderChanges, headers: list[tuple[str, str]], result: list[tuple[str, str]]) -> None:
    assert changed(changes, *headers) == [(name.encode(), value.encode()) for name, value in result]


def test_a_copied_header_keeps_its_bytes() -> None:
    request = Request(b"GET", b"http", b"b", b"/", [(b"x", b"caf\xe9 \xff")])
    assert sent(forward(to("v1"), request=HeaderChanges(set=(("y", "<%REQ(x)%>"),))), request).first(b"y") == b"<caf\xe9 \xff>"


def test_the_destinations_changes_come_after_the_routes() -> None:
    mine = HeaderChanges(set=(("x", "route"),), add=(("y", "route"),))
    its = HeaderChanges(set=(("x", "destination"),), add=(("y", "destination"),), remove=("z",))
    request = sent(forward(to("v1", request=its), request=mine), asked("/", ("x", "client"), ("z", "1")))
    assert sorted(request.headers) == [(b"x", b"destination"), (b"y", b"destination"), (b"y", b"route")]


def test_operators_of_a_request_see_it_before_its_path_and_authority_are_rewritten() -> None:
    route = forward(
        to("v1"), rewrite=Rewrite(full="/new", authority="new"), request=HeaderChanges(set=(("x", "%REQ(:path)% %REQ(host)%"),))
    )
    request = asked("/old")
    change_request(request, route, chosen(route).destination, None, Known(request))
    assert request.first(b"x") == b"/old b"


def test_a_response_gets_the_changes_of_route_and_destination() -> None:
    mine = HeaderChanges(set=(("x", "route"),), remove=("server",))
    its = HeaderChanges(set=(("x", "destination"),), add=(("code", "%RESPONSE_CODE%"),))
    route = forward(to("v1", response=its), response=mine)
    response = Response(200, [(b"server", b"app"), (b"x", b"app")])
    change_response(response, route, chosen(route).destination, Known(response_code=200))
    assert response.headers == [(b"x", b"destination"), (b"code", b"200")]


def test_an_answer_of_ours_gets_them_too_and_keeps_all_else() -> None:
    mine, its = HeaderChanges(set=(("x", "route"),)), HeaderChanges(set=(("y", "destination"),))
    route = forward(to("v1", response=its), response=mine)
    reply = LocalReply(
        503, b"no healthy upstream", flags=(Flag.NO_HEALTHY_UPSTREAM,), details="no_healthy_upstream", because="b", policy="p"
    )
    before = change_reply(reply, route, None, Known())
    after = change_reply(reply, route, chosen(route).destination, Known())
    assert before.headers == [(b"x", b"route")]
    assert after.headers == [(b"x", b"route"), (b"y", b"destination")]
    assert (after.status, after.body, after.flags, after.details, after.because, after.policy) == (
        503,
        b"no healthy upstream",
        reply.flags,
        "no_healthy_upstream",
        "b",
        "p",
    )


@pytest.mark.parametrize(
    "route",
    [forward(to("v1"), request=HeaderChanges(set=(("x", "%FOO%"),))), forward(to("v1", response=HeaderChanges(add=(("x", "50%"),))))],
)
def test_a_header_value_that_is_no_format_lets_no_request_pass(route: CompiledRoute) -> None:
    reply = answer(route, asked(), None, 80)
    assert reply is not None
    assert (reply.status, "invalid header value" in reply.because) == (500, True)


@pytest.mark.parametrize(
    ("authority", "host", "port"),
    [
        ("b", "b", ""),
        ("b:80", "b", "80"),
        ("[::1]", "[::1]", ""),
        ("[::1]:80", "[::1]", "80"),
        ("::1", "::1", ""),
        ("b:", "b:", ""),
        ("b:x", "b:x", ""),
        ("", "", ""),
    ],
)
def test_host_and_port_of_an_authority(authority: str, host: str, port: str) -> None:
    assert split_port(authority.encode()) == (host.encode(), port.encode())

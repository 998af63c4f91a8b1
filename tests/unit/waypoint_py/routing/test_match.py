"""Which route a request has: the tables of the Gateway API's conformance tests and of VirtualService, by hand-made routes."""

from __future__ import annotations

import pytest

from mesh.http.message import Request
from mesh.model.l7.matching import (
    Exact,
    HeaderMatch,
    PathKind,
    PathMatch,
    Prefix,
    Present,
    QueryMatch,
    Regex,
    RouteMatch,
    Suffix,
    TextMatch,
)
from mesh.model.l7.routing import DirectResponse, Origin, Route
from tests.corpus.facts import asked
from waypoint_py.routing.actions import answer
from waypoint_py.routing.match import PortRoutes, RouteList, compile_routes, compile_table, list_tables
from waypoint_py.steps import finish


def route(name: str, *matches: RouteMatch) -> Route:
    return Route(Origin("HTTPRoute", "shop", name), DirectResponse(200), name=name, matches=matches)


def found(routes: tuple[Route, ...], request: Request) -> str | None:
    """The name of the route, looked up with files and without."""
    names = {
        None if (m := table.find(request)) is None else m.route.route.name
        for table in (compile_routes(routes, 0), compile_routes(routes, 99))
    }
    (name,) = names
    return name


def below(path: str) -> PathMatch:
    return PathMatch(PathKind.SEGMENTS, path)


def exactly(path: str) -> PathMatch:
    return PathMatch(PathKind.EXACT, path)


def header(name: str, value: str) -> HeaderMatch:
    return HeaderMatch(name, Exact(value))


def query(**parameters: str) -> tuple[QueryMatch, ...]:
    return tuple(QueryMatch(name, Exact(value)) for name, value in parameters.items())


def one(match: RouteMatch, request: Request) -> bool:
    return found((route("it", match),), request) == "it"


# Gateway API: routes in the order of precedence, as the control plane sorts them.

MATCHING = (
    route("v2", RouteMatch(path=below("/v2")), RouteMatch(path=below("/"), headers=(header("version", "two"),))),
    route("v1", RouteMatch(path=below("/"))),
)


@pytest.mark.parametrize(
    ("path", "headers", "to"),
    [
        ("/", (), "v1"),
        ("/example", (), "v1"),
        ("/", (("version", "one"),), "v1"),
        ("/v2", (), "v2"),
        ("/v2/", (), "v2"),
        ("/v2/example", (), "v2"),
        ("/v2?query=1", (), "v2"),
        ("/", (("version", "two"),), "v2"),
        ("/v2example", (), "v1"),
        ("/foo/v2/example", (), "v1"),
    ],
)
def test_http_route_matching(path: str, headers: tuple[tuple[str, str], ...], to: str) -> None:
    assert found(MATCHING, asked(path, *headers)) == to


@pytest.mark.parametrize(
    ("path", "to"),
    [("/one", "v1"), ("/two", "v2"), ("/", None), ("/one/example", None), ("/two/", None), ("/Two", None), ("/one?a=b", "v1")],
)
def test_http_route_exact_path_matching(path: str, to: str | None) -> None:
    routes = (route("v1", RouteMatch(path=exactly("/one"))), route("v2", RouteMatch(path=exactly("/two"))))
    assert found(routes, asked(path)) == to


PATH_ORDER = (
    route("v3", RouteMatch(path=exactly("/match/exact/one"))),
    route("v2", RouteMatch(path=exactly("/match/exact"))),
    route("v1", RouteMatch(path=exactly("/match"))),
    route("v2", RouteMatch(path=below("/match/prefix/one"))),
    route("v1", RouteMatch(path=below("/match/prefix"))),
    route("v3", RouteMatch(path=below("/match"))),
)


@pytest.mark.parametrize(
    ("path", "to"),
    [
        ("/match/exact/one", "v3"),
        ("/match/exact", "v2"),
        ("/match", "v1"),
        ("/match/prefix/one/any", "v2"),
        ("/match/prefix/any", "v1"),
        ("/match/any", "v3"),
        ("/matches", None),
    ],
)
def test_http_route_path_match_order(path: str, to: str | None) -> None:
    assert found(PATH_ORDER, asked(path)) == to


BY_HEADER = (
    route("v1", RouteMatch(headers=(header("version", "two"), header("color", "orange")))),
    route("v1", RouteMatch(headers=(header("version", "one"),))),
    route("v2", RouteMatch(headers=(header("version", "two"),))),
    route("v1", RouteMatch(headers=(header("color", "blue"),)), RouteMatch(headers=(header("color", "green"),))),
    route("v2", RouteMatch(headers=(header("color", "red"),)), RouteMatch(headers=(header("color", "yellow"),))),
)


@pytest.mark.parametrize(
    ("headers", "to"),
    [
        ({"version": "one"}, "v1"),
        ({"version": "two"}, "v2"),
        ({"version": "two", "color": "orange"}, "v1"),
        ({"version": "two", "color": "blue"}, "v2"),
        ({"color": "blue"}, "v1"),
        ({"color": "green"}, "v1"),
        ({"color": "red"}, "v2"),
        ({"color": "yellow"}, "v2"),
        ({"color": "orange"}, None),
        ({"color": "purple"}, None),
        ({"some-other-header": "one"}, None),
        ({}, None),
    ],
)
def test_http_route_header_matching(headers: dict[str, str], to: str | None) -> None:
    assert found(BY_HEADER, asked("/", *headers.items())) == to


def method(name: str) -> TextMatch:
    return Exact(name)


BY_METHOD = (
    route("v1", RouteMatch(path=below("/path1"), method=method("GET"))),
    route("v3", RouteMatch(path=below("/path2"), method=method("POST"), headers=(header("version", "two"),))),
    route("v1", RouteMatch(path=below("/path3"), method=method("PATCH"))),
    route("v1", RouteMatch(path=below("/path4"), method=method("DELETE"), headers=(header("version", "three"),))),
    route("v1", RouteMatch(path=below("/path5"))),
    route("v2", RouteMatch(method=method("PUT"), headers=(header("version", "one"),))),
    route("v2", RouteMatch(method=method("PATCH"))),
    route("v1", RouteMatch(method=method("POST"))),
    route("v2", RouteMatch(method=method("GET"))),
    route("v1", RouteMatch(headers=(header("version", "four"),))),
)


@pytest.mark.parametrize(
    ("verb", "path", "headers", "to"),
    [
        ("POST", "/", {}, "v1"),
        ("GET", "/", {}, "v2"),
        ("HEAD", "/", {}, None),
        ("GET", "/path1", {}, "v1"),
        ("PUT", "/", {"version": "one"}, "v2"),
        ("POST", "/path2", {"version": "two"}, "v3"),
        ("PATCH", "/path3", {}, "v1"),
        ("DELETE", "/path4", {"version": "three"}, "v1"),
        ("PUT", "/", {}, None),
        ("DELETE", "/path4", {}, None),
        ("PATCH", "/path5", {}, "v1"),
        ("PATCH", "/", {"version": "four"}, "v2"),
        ("get", "/", {}, None),
    ],
)
def test_http_route_method_matching(verb: str, path: str, headers: dict[str, str], to: str | None) -> None:
    assert found(BY_METHOD, asked(path, *headers.items(), method=verb)) == to


BY_QUERY = (
    route("v1", RouteMatch(path=below("/path5"))),
    route("v3", RouteMatch(query=query(animal="dolphin", color="blue"), headers=(header("version", "two"),))),
    route("v3", RouteMatch(query=query(animal="dolphin", color="blue"))),
    route("v2", RouteMatch(query=query(animal="dolphin"))),
    route("v1", RouteMatch(query=query(animal="whale"))),
    route("v3", RouteMatch(query=query(ANIMAL="Whale"))),
)


@pytest.mark.parametrize(
    ("path", "to"),
    [
        ("/?animal=whale", "v1"),
        ("/?animal=dolphin", "v2"),
        ("/?animal=dolphin&color=blue", "v3"),
        ("/?color=blue&animal=dolphin", "v3"),
        ("/?ANIMAL=Whale", "v3"),
        ("/?animal=whale&otherparam=irrelevant", "v1"),
        ("/?animal=dolphin&color=yellow", "v2"),
        ("/?color=blue", None),
        ("/?animal=dog", None),
        ("/?animal=whaledolphin", None),
        ("/", None),
        ("/path5?animal=whale", "v1"),
        ("/?animal=whale&animal=dolphin", "v1"),
        ("/?animal=dolphin&animal=whale", "v2"),
        ("/?animal=wh%61le", None),
        ("/?%61nimal=whale", None),
        ("/?x=&&animal=whale", "v1"),
    ],
)
def test_http_route_query_param_matching(path: str, to: str | None) -> None:
    assert found(BY_QUERY, asked(path)) == to


def test_grpc_route_exact_method_matching() -> None:
    routes = (
        route("v1", RouteMatch(path=exactly("/gateway_api_conformance.echo_basic.grpcecho.GrpcEcho/Echo"))),
        route("v2", RouteMatch(path=exactly("/gateway_api_conformance.echo_basic.grpcecho.GrpcEcho/EchoTwo"))),
        route("any", RouteMatch(path=PathMatch(PathKind.REGEX, "/[^/]+/Any"))),
    )
    service = "/gateway_api_conformance.echo_basic.grpcecho.GrpcEcho"
    assert [found(routes, asked(f"{service}/{name}", method="POST")) for name in ("Echo", "EchoTwo", "EchoThree", "Any")] == [
        "v1",
        "v2",
        None,
        "any",
    ]


# VirtualService.


@pytest.mark.parametrize(
    ("kind", "value", "ignore_case", "hits", "misses"),
    [
        (PathKind.PREFIX, "/foo", False, ["/foo", "/foobar", "/foo/bar", "/foo?x=/"], ["/", "/fo", "/Foo", "/bar/foo"]),
        (PathKind.PREFIX, "/foo/", False, ["/foo/", "/foo/bar"], ["/foo", "/foobar"]),
        (PathKind.PREFIX, "/FOO", True, ["/foo", "/Foobar"], ["/bar"]),
        (PathKind.SEGMENTS, "/foo", False, ["/foo", "/foo/", "/foo/bar", "/foo?q"], ["/foobar", "/", "/Foo"]),
        (PathKind.SEGMENTS, "/foo/", False, ["/foo", "/foo/", "/foo/bar"], ["/foobar"]),
        (PathKind.SEGMENTS, "/Foo", True, ["/foo", "/FOO/bar"], ["/foobar"]),
        (PathKind.SEGMENTS, "/", False, ["/", "/x"], ["*"]),
        (PathKind.EXACT, "/foo", False, ["/foo", "/foo?q"], ["/foo/", "/FOO"]),
        (PathKind.EXACT, "/Foo", True, ["/foo", "/FOO"], ["/fooo"]),
        (PathKind.REGEX, "/b[ao]r", False, ["/bar", "/bor?x"], ["/bars", "/x/bar", "/ber"]),
        (PathKind.REGEX, "/a|/b", False, ["/a", "/b"], ["/ab", "/a/b"]),
        (PathKind.REGEX, "(?i)/Foo.*", False, ["/foo", "/FOO/x"], ["/bar"]),
        (
            PathKind.TEMPLATE,
            "/allow/admin/{**}",
            False,
            ["/allow/admin/", "/allow/admin/temp", "/allow/admin/temp.txt", "/allow/admin/foo/temp.txt"],
            ["/allow/admin", "/allow/admin?param=value", "/allow", "/allow/user/"],
        ),
        (
            PathKind.TEMPLATE,
            "/foo/{*}/bar/{**}",
            False,
            ["/foo/buzz/bar/bat.txt", "/foo/buzz/bar/bat/fuzz.txt", "/foo/buzz/bar/bat"],
            ["/foo/bar/bat.txt", "/foo//bar/bat.txt"],
        ),
        (PathKind.TEMPLATE, "/store/{**}/cart", False, ["/store//cart", "/store/foo/cart", "/store/foo/bar/cart"], ["/store/cart"]),
        (PathKind.TEMPLATE, "/a.b/{*}", False, ["/a.b/c"], ["/axb/c", "/a.b/"]),
    ],
)
def test_paths(kind: PathKind, value: str, ignore_case: bool, hits: list[str], misses: list[str]) -> None:
    match = RouteMatch(path=PathMatch(kind, value, ignore_case))
    assert [path for path in hits + misses if one(match, asked(path))] == hits


@pytest.mark.parametrize(
    ("match", "hits", "misses"),
    [
        (Exact("v"), ["v"], ["", "V", "vv", "xv"]),
        (Exact("V", ignore_case=True), ["v", "V"], ["vv"]),
        (Prefix("v"), ["v", "vv"], ["", "xv", "V"]),
        (Prefix("V", ignore_case=True), ["vx", "Vx"], ["x"]),
        (Suffix("v"), ["v", "xv"], ["vx", ""]),
        (Suffix("V", ignore_case=True), ["xv", "xV"], ["vx"]),
        (Regex("v[0-9]"), ["v1"], ["v", "v12", "xv1", "V1"]),
        (Regex(".*"), ["", "x", "a b"], []),
        (Present(), ["", "x"], []),
        (Present(non_empty=True), ["x"], [""]),
    ],
)
def test_texts(match: TextMatch, hits: list[str], misses: list[str]) -> None:
    everything = hits + misses
    assert [text for text in everything if one(RouteMatch(headers=(HeaderMatch("h", match),)), asked("/", ("h", text)))] == hits
    inverted = RouteMatch(headers=(HeaderMatch("h", match, invert=True),))
    assert [text for text in everything if one(inverted, asked("/", ("h", text)))] == misses
    assert [text for text in everything if one(RouteMatch(query=(QueryMatch("q", match),)), asked(f"/?q={text}"))] == hits
    assert [text for text in everything if one(RouteMatch(method=match), asked("/", method=text))] == hits
    assert [text for text in everything if one(RouteMatch(authority=match), asked("/", authority=text))] == hits
    assert [text for text in everything if one(RouteMatch(scheme=match), asked("/", scheme=text))] == hits
    assert not one(RouteMatch(headers=(HeaderMatch("h", match),)), asked("/"))
    assert not one(RouteMatch(query=(QueryMatch("q", match),)), asked("/"))


@pytest.mark.parametrize(
    ("match", "absent"),
    [
        (HeaderMatch("h", Exact("v"), invert=True), True),
        (HeaderMatch("h", Prefix("v"), invert=True), True),
        (HeaderMatch("h", Present(), invert=True), True),
        (HeaderMatch("h", Regex(".*"), invert=True, absent_fails=True), False),
    ],
)
def test_without_a_header(match: HeaderMatch, absent: bool) -> None:
    assert one(RouteMatch(headers=(match,)), asked("/")) is absent


def test_an_empty_header_is_present() -> None:
    assert one(RouteMatch(headers=(HeaderMatch("h", Present()),)), asked("/", ("h", "")))
    assert not one(RouteMatch(headers=(HeaderMatch("h", Present(), invert=True),)), asked("/", ("h", "")))


@pytest.mark.parametrize("values", [("a", "b"), ("b", "a"), ("a",)])
def test_a_second_value_of_a_header_hides_no_other(values: tuple[str, ...]) -> None:
    request = asked("/", *[("h", value) for value in values])
    assert one(RouteMatch(headers=(header("h", "a"),)), request)
    assert not one(RouteMatch(headers=(HeaderMatch("h", Exact("a"), invert=True),)), request)
    assert not one(RouteMatch(headers=(header("h", "a,b"),)), request)


@pytest.mark.parametrize(
    ("name", "value"), [(":method", "PUT"), (":authority", "B:80"), (":path", "/p?q=1"), (":scheme", "https"), ("host", "B:80")]
)
def test_pseudo_headers_match(name: str, value: str) -> None:
    request = asked("/p?q=1", method="PUT", authority="B:80", scheme="https")
    assert one(RouteMatch(headers=(header(name, value),)), request)
    assert not one(RouteMatch(headers=(header(name, value.swapcase() + "x"),)), request)


def test_all_conditions_of_a_match_must_hold_and_any_match_is_enough() -> None:
    both = RouteMatch(path=below("/a"), headers=(header("x", "1"), header("y", "2")))
    routes = (route("it", both, RouteMatch(path=exactly("/other"))),)
    assert found(routes, asked("/a", ("x", "1"), ("y", "2"))) == "it"
    assert found(routes, asked("/a", ("x", "1"))) is None
    assert found(routes, asked("/other")) == "it"


def test_the_first_route_of_the_list_wins_however_special_a_later_one_is() -> None:
    routes = (route("first", RouteMatch(path=PathMatch(PathKind.PREFIX, "/"))), route("second", RouteMatch(path=exactly("/a"))))
    assert found(routes, asked("/a")) == "first"


def test_nothing_matches_and_there_is_no_other_route() -> None:
    assert compile_routes((route("it", RouteMatch(path=exactly("/a"))),)).find(asked("/b")) is None
    assert compile_routes(()).find(asked("/")) is None


def test_a_match_says_why_and_what_matched() -> None:
    routes = (
        Route(
            Origin("VirtualService", "shop", "reviews", 2),
            DirectResponse(200),
            name="r",
            matches=(RouteMatch("m", path=below("/a"), headers=(header("x", "1"),)),),
        ),
    )
    matched = compile_routes(routes).find(asked("/a/b", ("x", "1")))
    assert matched is not None
    assert matched.because == "VirtualService shop/reviews rule 2: match 'm', path below /a, header x exactly 1"
    assert (matched.name, matched.path) == ("r.m", below("/a"))


@pytest.mark.parametrize(
    "match",
    [
        RouteMatch(path=PathMatch(PathKind.REGEX, "(?<=a)b")),
        RouteMatch(headers=(HeaderMatch("h", Regex("(")),)),
        RouteMatch(headers=(HeaderMatch("h", Regex("("), invert=True),)),
        RouteMatch(query=(QueryMatch("q", Regex("a" * 1025)),)),
        RouteMatch(path=PathMatch(PathKind.TEMPLATE, "/{**}/{**}")),
        RouteMatch(path=PathMatch(PathKind.TEMPLATE, "/a{*}")),
    ],
)
def test_a_match_that_cannot_be_compiled_lets_no_later_route_have_its_requests(match: RouteMatch) -> None:
    bad = RouteMatch(path=match.path, headers=(*match.headers, header("also", "1")), query=match.query)
    table = compile_routes((route("broken", bad), route("open")))
    matched = table.find(asked("/", ("also", "1")))
    assert matched is not None
    reply = answer(matched.route, asked("/"), matched.path, 80)
    assert reply is not None
    assert reply.status == 500
    assert "HTTPRoute shop/broken cannot be carried out: match 0: " in reply.because
    other = table.find(asked("/"))
    assert other is not None
    assert other.route.route.name == "open"


def crowd(*matches: RouteMatch) -> tuple[Route, ...]:
    """So many routes of one path that they are looked up by something else; the last is for everything."""
    return (*(route(str(number), match) for number, match in enumerate(matches)), route("rest"))


@pytest.mark.parametrize("path", [None, exactly("/a"), below("/a"), PathMatch(PathKind.EXACT, "/A", ignore_case=True)])
def test_among_many_routes_of_one_path_the_header_decides(path: PathMatch | None) -> None:
    routes = crowd(*[RouteMatch(path=path, headers=(header("tenant", str(number)),)) for number in range(30)])
    assert found(routes, asked("/a", ("tenant", "17"))) == "17"
    assert found(routes, asked("/a", ("tenant", "17"), ("tenant", "3"))) == "3"
    assert found(routes, asked("/a", ("tenant", "30"))) == "rest"
    assert found(routes, asked("/a")) == "rest"


def test_among_many_routes_of_one_path_the_query_or_authority_decides() -> None:
    routes = crowd(
        *[RouteMatch(query=query(q=str(number))) for number in range(30)],
        *[RouteMatch(authority=Exact(f"h{number}")) for number in range(30)],
    )
    assert found(routes, asked("/?q=17")) == "17"
    assert found(routes, asked("/", authority="h17")) == "47"
    assert found(routes, asked("/?q=30", authority="h17")) == "47"
    assert found(routes, asked("/?q=30")) == "rest"


def test_among_many_routes_of_one_path_what_must_not_be_is_no_key() -> None:
    unwanted = [RouteMatch(headers=(HeaderMatch("tenant", Exact(str(number)), invert=True), header("also", "1"))) for number in range(30)]
    assert found(crowd(*unwanted), asked("/", ("tenant", "0"), ("also", "1"))) == "1"
    assert found(crowd(*unwanted), asked("/", ("also", "1"))) == "0"
    folded = [RouteMatch(headers=(HeaderMatch("tenant", Exact(f"T{number}", ignore_case=True)),)) for number in range(30)]
    assert found(crowd(*folded), asked("/", ("tenant", "t7"))) == "7"


def test_more_headers_than_are_looked_up_change_nothing() -> None:
    routes = crowd(*[RouteMatch(headers=(header(f"h{number % 20}", str(number)),)) for number in range(200)])
    assert [found(routes, asked("/", (f"h{number % 20}", str(number)))) for number in range(200)] == [str(number) for number in range(200)]


# Lists of several tables


def one_list(*routes: Route) -> RouteList:
    return finish(list_tables([finish(compile_table(routes))]))


def test_lists_are_tried_in_order_and_those_of_other_hosts_are_not() -> None:
    every = RouteMatch(path=PathMatch(PathKind.PREFIX, "/"))
    routes = PortRoutes(
        (
            (one_list(route("some", RouteMatch(path=exactly("/a")))), ()),
            (one_list(route("api", every)), ("api.example.com", "www.example.com")),
            (one_list(route("deep", every)), ("*.deep.example.com", "*.example.com.deep")),
            (one_list(route("b", RouteMatch(path=exactly("/b")))), ()),
            (one_list(route("late", every)), ("api.example.com",)),
        ),
        one_list(route("own")),
    )

    def at(authority: str, path: str = "/") -> str:
        matched = routes.find(Request(b"GET", b"http", authority.encode(), path.encode(), []), 80)
        assert matched is not None
        return matched.route.route.name

    assert at("api.example.com", "/a") == "some"
    assert [at(name) for name in ("api.example.com", "API.Example.com", "www.example.com:8080")] == ["api"] * 3
    assert [at(name) for name in ("x.deep.example.com", "x.y.deep.example.com:1", "a.EXAMPLE.com.deep")] == ["deep"] * 3
    others = (
        "deep.example.com",
        ".deep.example.com",
        "x..deep.example.com",
        "x/.deep.example.com",
        "x:1.deep.example.com",
        "example.com",
        "",
    )
    assert [at(name) for name in (*others, "api.example.com:", "api.example.com.evil")] == ["own"] * 9
    assert at("other", "/b") == "b"
    assert routes.size == 6


def test_a_match_may_be_for_one_port() -> None:
    routes = compile_routes((route("80", RouteMatch(port=80)), route("81", RouteMatch(path=below("/a"), port=81))))

    def at(port: int, path: str) -> str | None:
        matched = routes.find(asked(path), port)
        return None if matched is None else matched.because

    assert at(80, "/b") == "HTTPRoute shop/80: port 80"
    assert at(81, "/a") == "HTTPRoute shop/81: path below /a, port 81"
    assert (at(81, "/b"), at(82, "/a")) == (None, None)

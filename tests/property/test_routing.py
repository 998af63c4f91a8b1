"""Routing under arbitrary routes and requests: the files find what trying every route in order finds, and nothing raises."""

from __future__ import annotations

import random
import re
from urllib.parse import urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.http.message import Request, Response
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
from mesh.model.l7.routing import DirectResponse, Origin, Redirect, Retry, Rewrite, Route
from mesh.telemetry.operators import InvalidFormat, compile_format, compile_header_value
from tests.corpus.facts import Known, asked
from waypoint_py.routing.actions import compile_rewrite, location, replace_prefix
from waypoint_py.routing.match import compile_routes
from waypoint_py.routing.predicates import Seen, compile_path, parse_query, required_prefix
from waypoint_py.routing.retry import Again, RetryState

# Few values, so that they meet.
PATHS = ["/", "/a", "/a/", "/a/b", "/A/b", "/a/bc", "/ab", "/ab/c", "/b", "*", "/a/b/c/d", "/ü"]
REGEXES = ["/a/.*", "/(a|ab)(/.*)?", ".*", "/[ab]", "(?i)/A/B", "/a/b|/b", "", "/a/b?c?"]
TEXTS = ["", "a", "ab", "A", "b", "a,b"]
NAMES = ["x", "y", ":method", ":authority", "host", ":path"]

texts: st.SearchStrategy[TextMatch] = st.one_of(
    st.builds(Exact, st.sampled_from(TEXTS), st.booleans()),
    st.builds(Exact, st.sampled_from(TEXTS)),
    st.builds(Prefix, st.sampled_from(TEXTS), st.booleans()),
    st.builds(Suffix, st.sampled_from(TEXTS), st.booleans()),
    st.sampled_from([Regex("a.*"), Regex(".*"), Regex("[ab]")]),
    st.builds(Present, st.booleans()),
)
paths = st.one_of(
    st.builds(PathMatch, st.sampled_from([PathKind.EXACT, PathKind.PREFIX, PathKind.SEGMENTS]), st.sampled_from(PATHS), st.booleans()),
    st.builds(PathMatch, st.just(PathKind.REGEX), st.sampled_from(REGEXES)),
)
headers = st.builds(HeaderMatch, st.sampled_from(NAMES), texts, st.booleans(), st.booleans())
plain_headers = st.builds(
    HeaderMatch, st.sampled_from(["x", "y"]), st.builds(Exact, st.sampled_from(TEXTS)), st.sampled_from([False, False, True])
)
queries = st.builds(QueryMatch, st.sampled_from(["q", "r"]), texts)
matches = st.builds(
    RouteMatch,
    name=st.just(""),
    path=st.one_of(st.none(), paths),
    method=st.one_of(st.none(), st.none(), st.builds(Exact, st.sampled_from(["GET", "PUT"]))),
    scheme=st.none(),
    authority=st.one_of(st.none(), st.none(), texts),
    headers=st.lists(st.one_of(plain_headers, headers), max_size=2).map(tuple),
    query=st.lists(queries, max_size=1).map(tuple),
)
routes = st.lists(st.lists(matches, min_size=0, max_size=3), max_size=24).map(
    lambda found: tuple(Route(Origin("R", "n", str(number)), DirectResponse(200), matches=tuple(each)) for number, each in enumerate(found))
)
values = st.sampled_from(TEXTS)
requests = st.builds(
    lambda path, query, pairs, method, authority: asked(path + query, *pairs, method=method, authority=authority),
    st.sampled_from([*PATHS, "/a/b/c", "/A", "/AB/x"]),
    st.sampled_from(["", "?q=a", "?q=b&q=a", "?r", "?r=&q=ab", "?Q=a"]),
    st.lists(st.tuples(st.sampled_from(["x", "y"]), values), max_size=3),
    st.sampled_from(["GET", "PUT"]),
    st.sampled_from(["a", "A", "b", "ab"]),
)


@settings(max_examples=300)
@given(routes, st.lists(requests, min_size=1, max_size=4))
def test_the_route_found_is_the_first_that_matches(table: tuple[Route, ...], some: list[Request]) -> None:
    filed, tried = compile_routes(table, 0), compile_routes(table, 10_000)
    for request in some:
        wanted = next((number for number, route in enumerate(table) if route_is_true(route, request)), None)
        for each in (filed, tried):
            matched = each.find(request)
            assert (None if matched is None else int(matched.route.route.origin.name)) == wanted
            if matched is not None and matched.path is not None:
                assert path_is_true(matched.path, text(request.path_only))


# What matching means, said a second time and slowly.


def text(value: bytes) -> str:
    return value.decode()


def route_is_true(route: Route, request: Request) -> bool:
    return not route.matches or any(match_is_true(match, request) for match in route.matches)


def match_is_true(match: RouteMatch, request: Request) -> bool:
    return (
        (match.path is None or path_is_true(match.path, text(request.path_only)))
        and (match.method is None or text_is_true(match.method, text(request.method)))
        and (match.authority is None or text_is_true(match.authority, text(request.authority)))
        and all(header_is_true(each, request) for each in match.headers)
        and all(query_is_true(each, text(request.path).partition("?")[2]) for each in match.query)
    )


def text_is_true(match: TextMatch, value: str) -> bool:
    if isinstance(match, Present):
        return bool(value) or not match.non_empty
    if isinstance(match, Regex):
        return re.fullmatch(match.value, value) is not None
    ours, theirs = (match.value.lower(), value.lower()) if match.ignore_case else (match.value, value)
    if isinstance(match, Exact):
        return ours == theirs
    return theirs.startswith(ours) if isinstance(match, Prefix) else theirs.endswith(ours)


def path_is_true(match: PathMatch, path: str) -> bool:
    if match.kind is PathKind.REGEX:
        return re.fullmatch(match.value, path) is not None
    value = match.value
    if match.ignore_case:
        # ASCII letters only.
        value, path = (each.encode().lower().decode() for each in (value, path))
    if match.kind is PathKind.EXACT:
        return path == value
    if match.kind is PathKind.PREFIX:
        return path.startswith(value)
    stem = value[:-1] if value.endswith("/") else value
    return path.startswith("/") if not stem else path == stem or path.startswith(stem + "/")


def header_is_true(match: HeaderMatch, request: Request) -> bool:
    special = {":method": request.method, ":authority": request.authority, "host": request.authority, ":path": request.path}
    found = [special[match.name]] if match.name in special else [value for name, value in request.headers if text(name) == match.name]
    if not match.invert:
        return any(text_is_true(match.match, text(value)) for value in found)
    if not found:
        return not match.absent_fails
    return not any(text_is_true(match.match, text(value)) for value in found)


def query_is_true(match: QueryMatch, query: str) -> bool:
    for pair in query.split("&") if query else []:
        name, _, value = pair.partition("=")
        if name == match.name:
            return text_is_true(match.match, value)
    return False


# The rest.


@given(st.lists(st.text("ab/", max_size=8), max_size=30), st.text("ab/", max_size=12))
def test_many_prefixes_are_found_as_one_by_one(prefixes: list[str], path: str) -> None:
    table = tuple(
        Route(Origin("R", "n", str(number)), DirectResponse(200), matches=(RouteMatch(path=PathMatch(PathKind.PREFIX, prefix)),))
        for number, prefix in enumerate(prefixes)
    )
    matched = compile_routes(table, 0).find(asked("/" + path))
    wanted = next((number for number, prefix in enumerate(prefixes) if ("/" + path).startswith(prefix)), None)
    assert (None if matched is None else int(matched.route.route.origin.name)) == wanted


@given(st.from_regex(r"(/[ab]{0,2}|\(/a\|/b\)|\.\*|\[ab\]\+|/x\?){0,5}", fullmatch=True), st.text("abx/", max_size=10))
def test_what_an_expression_requires_every_path_has_that_it_matches(expression: str, path: str) -> None:
    match = PathMatch(PathKind.REGEX, expression)
    if compile_path(match).test(path.encode()):
        assert path.encode().startswith(required_prefix(match))


@given(st.text(max_size=40))
def test_any_expression_compiles_or_says_why_it_does_not(expression: str) -> None:
    compiled = compile_path(PathMatch(PathKind.REGEX, expression))
    assert isinstance(compiled.test(b"/a"), bool)
    assert not compiled.broken or compiled.test(b"/anything")


@given(st.text(max_size=40))
def test_any_template_compiles_or_says_why_it_does_not(template: str) -> None:
    compiled = compile_path(PathMatch(PathKind.TEMPLATE, "/" + template))
    assert not compiled.broken or compiled.test(b"/anything")


@given(st.binary(max_size=200))
def test_any_query_can_be_read(query: bytes) -> None:
    found = parse_query(query)
    seen = Seen(Request(b"GET", b"http", b"b", b"/?" + query, []))
    for name, value in found.items():
        assert seen.query(name) == value
        assert name + b"=" + value in query or (not value and name in query)


OPERATORS = [
    "%",
    "%%",
    "REQ",
    "(",
    ")",
    ":",
    "?",
    "START_TIME",
    "PROTOCOL",
    "x",
    "3",
    "%s",
    "%Q",
    "GRPC_STATUS",
    "NUMBER",
    " ",
    "FILTER_STATE",
]


@given(st.one_of(st.text(max_size=40), st.lists(st.sampled_from(OPERATORS), max_size=10).map("".join)))
def test_a_format_renders_or_is_refused_at_a_place_within_it(format_text: str) -> None:
    try:
        compiled = compile_format(format_text)
    except InvalidFormat as refused:
        position = refused.position
    else:
        position, facts = 0, Known(asked())
        assert isinstance(compiled.render(facts), str)
        if "%" not in format_text:
            same = (compiled.render(facts), compiled.render_line(facts), compile_header_value(format_text).render(facts))
            assert same == (format_text,) * 3
    assert 0 <= position <= len(format_text)


@given(st.text(max_size=20).filter(lambda text: "%" not in text), st.binary(max_size=60))
def test_no_header_can_forge_a_log_line(literal: str, value: bytes) -> None:
    facts = Known(Request(b"GET", b"http", b"b", b"/", [(b"x", value)]))
    line = compile_format(literal.replace("%", "") + '"%REQ(x)%"').render_line(facts)
    quoted = line[len(literal) :]
    assert quoted.count('"') == 2
    assert quoted.isprintable()


segments = st.lists(st.text("ab", max_size=2), max_size=4).map("/".join)


@given(segments, segments, segments)
def test_a_replaced_segment_prefix_leaves_a_path_with_no_slash_more_or_less(prefix: str, rest: str, replacement: str) -> None:
    match = PathMatch(PathKind.SEGMENTS, "/" + prefix)
    path = ("/" + prefix).removesuffix("/") + ("/" + rest if rest else "")
    if not compile_path(match).test(path.encode()):
        return
    new = replace_prefix(path.encode(), match, b"/" + replacement.encode()).decode()
    assert new.startswith("/")
    left = path[len(("/" + prefix).removesuffix("/")) :]
    assert new.endswith(left)
    start = ("/" + replacement).removesuffix("/")
    assert new in (start + left, "/" + replacement)


@given(
    st.builds(
        Redirect,
        st.just(302),
        st.sampled_from([None, "http", "https"]),
        st.sampled_from([None, "new", "new:81", "[::1]"]),
        st.sampled_from([None, 80, 443, 8080]),
        st.booleans(),
        st.sampled_from([None, "/x"]),
    ),
    st.sampled_from(["b", "b:80", "b:443", "b:8080", "[::1]:80", "[::1]"]),
    st.sampled_from([80, 443, 85]),
    st.sampled_from(["http", "https"]),
)
def test_a_redirect_leads_to_the_host_port_and_scheme_that_it_names(redirect: Redirect, host: str, port: int, scheme: str) -> None:
    url = urlsplit(location(redirect, asked("/p?q=1", authority=host, scheme=scheme), None, port).decode())
    assert url.scheme == (redirect.scheme or scheme)
    assert url.hostname == urlsplit("//" + (redirect.authority or host)).hostname
    assert (url.path, url.query) == (redirect.path or "/p", "q=1")
    own = {"http": 80, "https": 443}[url.scheme]
    if redirect.port is not None:
        assert (url.port or own) == redirect.port
    elif redirect.authority is None and redirect.request_port and port != own:
        assert url.port == port
    elif redirect.authority is None and redirect.scheme is not None and not redirect.request_port:
        assert (url.port or own) == own


@given(
    st.text("ab/(", max_size=12),
    st.sampled_from(["a", "a*", "(a)(b)?", "^/", "b$", "[^/]+", ".", "ü?"]),
    st.sampled_from(["", "x", "\\0", "[\\0]"]),
)
def test_a_rewrite_by_regex_equals_pythons(path: str, regex: str, substitution: str) -> None:
    rewrite = compile_rewrite(Rewrite(regex=regex, substitution=substitution))
    assert rewrite is not None
    got = rewrite(path.encode(), None)
    if regex == "a*":
        # Python replaces the empty match behind another one, RE2 does not.
        pieces = re.sub("a+|(?<!a)(?=[^a]|$)", lambda found: substitution.replace("\\0", found[0]), path)
    elif regex == "ü?":
        pieces = re.sub("ü?", lambda found: substitution.replace("\\0", found[0]), path)
    else:
        pieces = re.sub(regex, lambda found: substitution.replace("\\0", found[0]), path)
    assert got.decode() == pieces


@given(st.integers(0, 5), st.lists(st.sampled_from([200, 500, 503]), max_size=12), st.integers())
def test_a_request_is_never_sent_again_more_often_than_allowed(attempts: int, statuses: list[int], seed: int) -> None:
    rng = random.Random(seed)
    policy = Retry(attempts=attempts, on=("5xx",))
    state = RetryState(policy, asked())
    decisions = [state.after_response(Response(status, []), rng) for status in statuses]
    again = [decision for decision in decisions if isinstance(decision, Again)]
    assert len(again) == min(attempts, sum(status >= 500 for status in statuses))
    assert all(0 <= decision.delay <= policy.backoff_max for decision in again)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 100])
def test_tables_of_any_size_find_every_route(count: int) -> None:
    table = tuple(
        Route(Origin("R", "n", str(number)), DirectResponse(200), matches=(RouteMatch(path=PathMatch(PathKind.SEGMENTS, f"/s{number}")),))
        for number in range(count)
    )
    compiled = compile_routes(table)
    for number in range(count):
        matched = compiled.find(asked(f"/s{number}/x"))
        assert matched is not None
        assert matched.route.route.origin.name == str(number)
    assert compiled.find(asked("/none")) is None

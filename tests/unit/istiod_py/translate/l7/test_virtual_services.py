"""VirtualServices at a waypoint, row by row as Istio's waypoint obeys them."""

from __future__ import annotations

import pytest

from istiod_py.translate.l7.sources import RouteDefaults
from mesh.model.l7.matching import Exact, HeaderMatch, PathKind, PathMatch, Prefix, Present, QueryMatch, Regex, RouteMatch
from mesh.model.l7.routing import (
    Cors,
    Destination,
    DirectResponse,
    Fault,
    Forward,
    HeaderChanges,
    Mirror,
    Origin,
    Redirect,
    Retry,
    Rewrite,
    Route,
    WeightedDestination,
)
from mesh.model.l7.waypoint import Protocol
from tests.unit.istiod_py.translate.l7.world import REVIEWS, SERVICES, World, document, entry, service

TO = "route: [{destination: {host: v1}}]"
ORIGIN = Origin("VirtualService", "shop", "r", 0)
V1 = Destination("shop", "v1.shop.svc.cluster.local", 80)


def world(http: str, **options: object) -> World:
    return World(document("VirtualService", f"{{hosts: [reviews], http: [{http}]}}"), **options)


def only(http: str) -> Route:
    (route,) = world(f"{{{http}}}").routes()
    return route


DEFAULT = Route(
    Origin("Service", "shop", "reviews"),
    Forward((WeightedDestination(Destination("shop", REVIEWS.hostname, 80)),)),
    name="default",
    retry=Retry(),
)


def test_a_service_that_nothing_routes_has_a_default_route_with_retries_and_no_timeout() -> None:
    found = World("")
    assert found.routes() == (DEFAULT,)
    assert found.port(9000).routes == ()
    assert found.tcp() is None
    (config,) = found.told().configs
    assert [(port.port, port.protocol, port.name) for port in config.ports] == [
        (80, Protocol.HTTP, "p80"), (8080, Protocol.AUTO, "p8080"), (9000, Protocol.TCP, "p9000"),
    ]  # fmt: skip
    assert config.key == REVIEWS.key


@pytest.mark.parametrize("retry", [None, Retry(attempts=0), Retry(attempts=5)])
def test_the_meshs_retries_are_those_of_routes_that_say_nothing(retry: Retry | None) -> None:
    wanted = retry if retry is not None and retry.attempts else None
    assert World("", default_retry=retry).routes()[0].retry == wanted
    assert world(f"{{{TO}}}", default_retry=retry).routes()[0].retry == wanted


@pytest.mark.parametrize(("text", "matches"), [
    ("{uri: {exact: /a}}", RouteMatch(path=PathMatch(PathKind.EXACT, "/a"))),
    ("{uri: {prefix: /a}, ignoreUriCase: true}", RouteMatch(path=PathMatch(PathKind.PREFIX, "/a", True))),
    ("{uri: {regex: '/a+'}}", RouteMatch(path=PathMatch(PathKind.REGEX, "/a+"))),
    ("{name: m, scheme: {exact: http}, method: {prefix: P}, authority: {regex: 'a.*'}}",
     RouteMatch("m", method=Prefix("P"), scheme=Exact("http"), authority=Regex("a.*"))),
    ("{headers: {b: {exact: x}, a: {}}, method: {exact: GET}}",
     RouteMatch(method=Exact("GET"), headers=(HeaderMatch("a", Present()), HeaderMatch("b", Exact("x"))))),
    ("{headers: {':method': {exact: PUT}}}", RouteMatch(headers=(HeaderMatch(":method", Exact("PUT")),))),
    ("{queryParams: {b: {prefix: x}, a: {}}}", RouteMatch(query=(QueryMatch("a", Present()), QueryMatch("b", Prefix("x"))))),
    ("{method: {}, uri: {prefix: /a}}", RouteMatch(path=PathMatch(PathKind.PREFIX, "/a"))),
    ("{headers: {uri: {exact: /b}, method: {exact: b}}, uri: {prefix: /a}}", RouteMatch(path=PathMatch(PathKind.PREFIX, "/a"))),
])  # fmt: skip
def test_every_kind_of_match(text: str, matches: RouteMatch) -> None:
    assert only(f"match: [{text}], {TO}").matches == (matches,)


@pytest.mark.parametrize(("pattern", "match", "absent_fails"), [
    ("{}", Present(), False),
    ("{regex: '*'}", Present(), False),
    ("{exact: x}", Exact("x"), False),
    ("{exact: ''}", Exact(""), True),
    ("{regex: '.*'}", Regex(".*"), True),
    ("{regex: 'a?'}", Regex("a?"), True),
    ("{regex: 'a+'}", Regex("a+"), False),
])  # fmt: skip
def test_without_headers_takes_an_absent_header_for_an_empty_one(pattern: str, match: Present | Exact | Regex, absent_fails: bool) -> None:
    found = only(f"match: [{{withoutHeaders: {{x: {pattern}}}}}], {TO}").matches
    assert found == (RouteMatch(headers=(HeaderMatch("x", match, True, absent_fails),)),)


def test_the_matches_of_a_rule_are_alternatives_and_end_with_one_for_everything() -> None:
    found = only(f"match: [{{uri: {{prefix: /a}}, name: x}}, {{uri: {{prefix: /}}}}, {{uri: {{prefix: /b}}}}], name: n, {TO}")
    assert (found.name, found.matches) == (
        "n", (RouteMatch("x", PathMatch(PathKind.PREFIX, "/a")), RouteMatch(path=PathMatch(PathKind.PREFIX, "/"))),
    )  # fmt: skip


@pytest.mark.parametrize(("match", "field", "there"), [
    ("sourceLabels: {a: b}", "sourceLabels", False),
    ("sourceLabels: {a: b}, gateways: [mesh]", "sourceLabels", False),
    ("sourceNamespace: other", "sourceNamespace", False),
    ("sourceNamespace: shop", "", True),
    ("gateways: [gw]", "gateways", False),
    ("gateways: [gw, mesh]", "", True),
    ("gateways: [mesh], sourceNamespace: other", "", True),
    ("port: 80", "", True),
])  # fmt: skip
def test_a_match_that_a_waypoint_cannot_meet_is_left_out_and_told(match: str, field: str, there: bool) -> None:
    found = world(f"{{match: [{{{match}, uri: {{prefix: /a}}}}, {{uri: {{prefix: /b}}}}], {TO}}}")
    paths = [each.path.value for each in found.routes()[0].matches if each.path is not None]
    assert paths == (["/a", "/b"] if there else ["/b"])
    assert [problem[0] for problem in found.problems()] == ([f"spec.http[0].match[0].{field}"] if field else [])


def test_a_port_is_matched_when_the_route_is_made() -> None:
    found = world(f"{{match: [{{port: 8080}}], {TO}}}, {{route: [{{destination: {{host: v2}}}}]}}")
    assert (found.find("/", number=80), found.find("/", number=8080)) == ("v2", "v1")
    assert world(f"{{match: [{{port: 8080}}], {TO}}}").routes(80) == (DEFAULT,)


def test_a_gate_that_yields_no_route_is_open_and_that_is_told() -> None:
    found = world(f"{{match: [{{sourceLabels: {{a: b}}}}], {TO}}}")
    assert found.routes() == (DEFAULT,)
    assert ("spec.http", f"yields no route for {REVIEWS.hostname}: requests go on as if it were not there") in found.problems()


def test_where_a_route_is_and_none_matches_there_is_none() -> None:
    found = world(f"{{match: [{{uri: {{prefix: /a}}}}], {TO}}}")
    assert (found.find("/a"), found.find("/abc"), found.find("/b")) == ("v1", "v1", "404")


def test_what_is_behind_a_route_for_everything_is_left_out_and_told() -> None:
    found = world(f"{{{TO}}}, {{match: [{{uri: {{exact: /a}}}}], {TO}}}")
    assert len(found.routes()) == 1
    assert found.problems() == [("spec.http[1]", "is never reached: VirtualService shop/r rule 0 takes every request")]


def test_what_is_behind_a_route_for_everything_on_a_port_is_left_there_and_told_once() -> None:
    rules = ", ".join(
        f"{{{match}{TO}}}"
        for match in ("match: [{port: 80}], ", "match: [{port: 8080, uri: {exact: /a}}], ", "match: [{uri: {exact: /b}}], ", "")
    )
    found = world(rules)
    assert ([route.origin.rule for route in found.routes(80)], [route.origin.rule for route in found.routes(8080)]) == ([0], [1, 2, 3])
    message = "is never reached on port 80, nor is what follows: VirtualService shop/r rule 0 takes every request"
    assert found.problems() == [("spec.http[2]", message)]


@pytest.mark.parametrize(("match", "everything"), [
    ("uri: {prefix: /}", True), ("uri: {prefix: ''}", True), ("uri: {regex: '.*'}", True), ("port: 80", True), ("name: x", True),
    ("uri: {prefix: /a}", False), ("uri: {prefix: /}, headers: {a: {}}", False), ("method: {exact: GET}", False),
    ("queryParams: {a: {}}", False), ("uri: {regex: '/.*'}", False), ("uri: {exact: /}", False), ("authority: {exact: a}", False),
])  # fmt: skip
def test_what_counts_as_everything(match: str, everything: bool) -> None:
    found = world(f"{{match: [{{{match}}}], {TO}}}, {{match: [{{uri: {{exact: /z}}}}], {TO}}}")
    assert (len(found.routes()) == 1) is everything


# Destinations


@pytest.mark.parametrize(("destination", "expected"), [
    ("{host: v1}", WeightedDestination(V1)),
    ("{host: v1.shop.svc.cluster.local}", WeightedDestination(V1)),
    ("{host: V1.shop.svc.cluster.local, subset: s}", WeightedDestination(Destination("shop", "v1.shop.svc.cluster.local", 80, "s"))),
    ("{host: reviews}", WeightedDestination(Destination("shop", REVIEWS.hostname, 80))),
    ("{host: reviews, port: {number: 8080}}", WeightedDestination(Destination("shop", REVIEWS.hostname, 8080))),
    ("{host: single}", WeightedDestination(Destination("shop", "single.shop.svc.cluster.local", 7))),
    ("{host: far.other.svc.cluster.local}", WeightedDestination(Destination("other", "far.other.svc.cluster.local", 80))),
    ("{host: nowhere}", WeightedDestination(
        Destination("", "nowhere.shop.svc.cluster.local", 80), fails_with=503,
        because="no service has the hostname nowhere.shop.svc.cluster.local")),
    ("{host: far}", WeightedDestination(
        Destination("", "far.shop.svc.cluster.local", 80), fails_with=503,
        because="no service has the hostname far.shop.svc.cluster.local")),
    ("{host: v1, port: {number: 81}}", WeightedDestination(
        Destination("shop", "v1.shop.svc.cluster.local", 81), fails_with=503, because="Service shop/v1 has no port 81")),
])  # fmt: skip
def test_a_destination_is_a_service_of_the_resources_namespace_and_its_port(destination: str, expected: WeightedDestination) -> None:
    services = (*SERVICES, service("single", (7, Protocol.HTTP)), service("wide", (1, Protocol.HTTP), (2, Protocol.HTTP)))
    found = world(f"{{route: [{{destination: {destination}}}]}}", services=services)
    (route,) = found.routes()
    assert route.action == Forward((expected,))
    assert bool(found.problems()) is (expected.fails_with is not None)


def test_a_destination_of_many_ports_that_names_none_has_the_one_that_was_asked_for_and_lacks_others() -> None:
    wide = service("wide", (80, Protocol.HTTP), (81, Protocol.HTTP))
    found = world("{route: [{destination: {host: wide}}], mirror: {host: wide}}", services=(*SERVICES, wide))
    for port in (80, 8080):
        (route,) = found.routes(port)
        assert route.action == Forward((WeightedDestination(Destination("shop", wide.hostname, port)),))
        assert [mirror.destination.port for mirror in route.mirrors] == [port]
    assert found.problems() == [
        ("spec.http[0].mirror", "Service shop/wide has no port 8080: nothing is mirrored"),
        ("spec.http[0].route[0].destination", "Service shop/wide has no port 8080: its requests are answered 503"),
    ]


def test_the_weight_of_an_only_destination_says_nothing() -> None:
    (found,) = only("route: [{destination: {host: v1}, weight: 30}]").action.destinations
    assert found.weight == 1


def test_weights_are_shares_and_nothing_is_none() -> None:
    found = only(
        "route: [{destination: {host: v1}, weight: 30}, {destination: {host: v2}, weight: 0}, {destination: {host: gone}, weight: 70}]"
    ).action
    assert isinstance(found, Forward)
    assert [(each.destination.hostname.partition(".")[0], each.weight, each.fails_with) for each in found.destinations] == [
        ("v1", 30, None), ("gone", 70, 503),
    ]  # fmt: skip


# Headers


def test_headers_of_rule_and_only_destination_are_one_change_the_destinations_last() -> None:
    found = only(
        "headers: {request: {set: {b: rule, a: rule}, add: {b: rule, c: rule}, remove: [x]}, response: {add: {r: rule}}},"
        " route: [{destination: {host: v1}, headers: {request: {set: {b: own}, add: {c: own}, remove: [y]}, response: {set: {r: own}}}}]"
    )
    assert found.request == HeaderChanges(
        set=(("a", "rule"), ("b", "own")), add=(("c", "rule"), ("c", "own")), remove=("x", "y")
    )  # fmt: skip
    assert found.response == HeaderChanges(set=(("r", "own"),))


def test_headers_of_several_destinations_stay_with_them() -> None:
    found = only(
        "headers: {request: {set: {a: rule}}}, route: [{destination: {host: v1}, weight: 1, headers: {request: {set: {a: own, Host: h}},"
        " response: {remove: [B]}}}, {destination: {host: v2}, weight: 1}]"
    )
    assert isinstance(found.action, Forward)
    first, second = found.action.destinations
    assert found.request == HeaderChanges(set=(("a", "rule"),))
    assert (first.request, first.response) == (HeaderChanges(set=(("a", "own"),)), HeaderChanges(remove=("b",)))
    assert (first.authority, second.authority, found.action.rewrite) == ("h", "", None)


@pytest.mark.parametrize(("rule", "own", "authority"), [
    ("rewrite: {authority: w}", "{request: {set: {Host: d}}}", "w"),
    ("headers: {request: {set: {':authority': h}}}", "{request: {set: {Host: d}}}", "h"),
    ("name: n", "{request: {set: {Host: d}}}", "d"),
    ("name: n", "{}", None),
])  # fmt: skip
def test_the_authority_is_the_rewrites_then_the_rules_then_the_destinations(rule: str, own: str, authority: str | None) -> None:
    single = only(f"{rule}, route: [{{destination: {{host: v1}}, headers: {own}}}]").action
    assert isinstance(single, Forward)
    assert (single.rewrite.authority if single.rewrite else None) == authority
    several = only(f"{rule}, route: [{{destination: {{host: v1}}, weight: 1, headers: {own}}}, {{destination: {{host: v2}}, weight: 1}}]")
    assert isinstance(several.action, Forward)
    rewritten = several.action.rewrite.authority if several.action.rewrite else None
    assert (rewritten or several.action.destinations[0].authority or None) == authority


# Actions


@pytest.mark.parametrize(("text", "action", "path"), [
    ("match: [{uri: {prefix: /a}}], redirect: {uri: /b, redirectCode: 302}", Redirect(302, path="/b"), PathMatch(PathKind.PREFIX, "/a")),
    ("redirect: {prefixRewrite: /b}", Redirect(prefix="/b"), PathMatch(PathKind.PREFIX, "/")),
    ("directResponse: {status: 200, body: {string: hi}}", DirectResponse(200, b"hi"), None),
    (f"rewrite: {{uri: /b}}, {TO}", Forward((WeightedDestination(V1),), Rewrite(prefix="/b")), PathMatch(PathKind.PREFIX, "/")),
    (f"match: [{{uri: {{exact: /a}}}}], rewrite: {{uri: /b, authority: h}}, {TO}",
     Forward((WeightedDestination(V1),), Rewrite(prefix="/b", authority="h")), PathMatch(PathKind.EXACT, "/a")),
    (f"rewrite: {{uriRegexRewrite: {{match: '/(.)', rewrite: '/\\1\\1'}}}}, {TO}",
     Forward((WeightedDestination(V1),), Rewrite(regex="/(.)", substitution="/\\1\\1")), None),
])  # fmt: skip
def test_every_kind_of_action_and_a_prefix_to_replace_where_none_is_matched(
    text: str, action: Redirect | DirectResponse | Forward, path: PathMatch | None
) -> None:
    found = only(text)
    assert found.action == action
    assert (found.matches[0].path if found.matches else None) == path


@pytest.mark.parametrize(("uri", "name"), [
    ("prefix: api/", "prefix"), ("exact: api", "exact"), ("prefix: '?a'", "prefix"), ("exact: 'http://reviews/'", "exact"),
    ("prefix: /api", ""), ("exact: /", ""), ("exact: '*'", ""), ("prefix: ''", ""), ("regex: 'api/.*'", ""),
])  # fmt: skip
def test_a_path_that_does_not_begin_with_a_slash_is_told_for_no_request_has_it(uri: str, name: str) -> None:
    found = world(f"{{match: [{{uri: {{prefix: /a}}}}, {{uri: {{{uri}}}}}], {TO}}}")
    told = [(f"spec.http[0].match[1].uri.{name}", "no path matches that: paths begin with '/'")] if name else []
    assert found.problems() == told


def test_a_redirect_that_nobody_follows_is_left_out_and_told() -> None:
    found = world(f"{{redirect: {{uri: /b, redirectCode: 304}}}}, {{{TO}}}")
    assert found.find("/") == "v1"
    assert found.problems() == [("spec.http[0].redirect.redirectCode", "304 is no redirect that is followed: the rule is left out")]


def test_an_answer_of_its_own_has_response_headers_cors_and_faults_but_no_retries() -> None:
    found = only("directResponse: {status: 200}, headers: {request: {set: {a: b}}, response: {set: {c: d}}}, timeout: 1s")
    assert (found.request, found.response, found.timeout, found.retry) == (HeaderChanges(), HeaderChanges(set=(("c", "d"),)), None, None)


def test_everything_else_is_handed_on() -> None:
    found = only(
        f"timeout: 1.5s, retries: {{attempts: 7}}, fault: {{abort: {{httpStatus: 418, percentage: {{value: 1}}}}}}, mirror: {{host: v2}},"
        f" mirrorPercentage: {{value: 2}}, corsPolicy: {{allowOrigin: ['http://a']}}, {TO}"
    )
    assert (found.timeout, found.retry, found.fault) == (1.5, Retry(7), Fault(status=418, abort_percent=1.0))
    assert found.mirrors == (Mirror(Destination("shop", "v2.shop.svc.cluster.local", 80), 2.0),)
    assert found.cors == Cors((Exact("http://a"),))
    assert found.origin == ORIGIN


def test_no_attempts_are_no_retries() -> None:
    assert only(f"retries: {{attempts: 0}}, {TO}").retry is None


@pytest.mark.parametrize(("text", "percents"), [
    ("mirror: {host: v2}", [100.0]),
    ("mirror: {host: v2}, mirrorPercentage: {value: 0}", []),
    ("mirror: {host: v2}, mirror_percent: 0", []),
    ("mirrors: [{destination: {host: v2}}, {destination: {host: v3}, percentage: {value: 3}}]", [100.0, 3.0]),
    ("mirrors: [{destination: {host: v2}, percentage: {value: 0}}]", []),
])  # fmt: skip
def test_mirrors_and_their_shares(text: str, percents: list[float]) -> None:
    assert [mirror.percent for mirror in only(f"{text}, {TO}").mirrors] == percents


def test_a_mirror_to_nowhere_is_told_and_left_out() -> None:
    found = world(f"{{mirror: {{host: gone}}, {TO}}}")
    assert found.routes()[0].mirrors == ()
    assert found.problems() == [("spec.http[0].mirror", "no service has the hostname gone.shop.svc.cluster.local: nothing is mirrored")]


# Which VirtualServices apply


@pytest.mark.parametrize(("hosts", "applies"), [
    ("[reviews]", True), ("[reviews.shop.svc.cluster.local]", True), ("['*.shop.svc.cluster.local']", True),
    ("['*.cluster.local']", True), ("[REVIEWS.shop.svc.cluster.local]", True), ("[other, reviews]", True),
    ("[ratings]", False), ("[reviews.other]", False), ("['*.example.com']", False),
])  # fmt: skip
def test_a_host_means_the_services_hostname(hosts: str, applies: bool) -> None:
    found = World(document("VirtualService", f"{{hosts: {hosts}, http: [{{{TO}}}]}}"))
    assert (found.find("/") == "v1") is applies


@pytest.mark.parametrize(("namespace", "waypoint", "export", "applies"), [
    ("shop", "shop", "", True),
    ("shop", "way", "", True),
    ("way", "way", "", True),
    ("other", "shop", "", False),
    ("way", "shop", "", False),
    ("shop", "way", "exportTo: [.], ", False),
    ("shop", "shop", "exportTo: [.], ", True),
    ("shop", "way", "exportTo: [way], ", True),
    ("shop", "way", "exportTo: ['*'], ", True),
    ("shop", "shop", "exportTo: [way], ", False),
])  # fmt: skip
def test_the_services_namespace_and_the_waypoints_have_a_say(namespace: str, waypoint: str, export: str, applies: bool) -> None:
    text = f"{{hosts: [{REVIEWS.hostname}], {export}http: [{{route: [{{destination: {{host: v1.shop.svc.cluster.local}}}}]}}]}}"
    found = World(document("VirtualService", text, namespace=namespace), waypoint=(waypoint, "waypoint"))
    assert (found.find("/") == "v1") is applies


@pytest.mark.parametrize(("default", "applies"), [(("*",), True), ((".",), False), (("way",), True)])
def test_where_nothing_is_said_the_meshs_default_exports(default: tuple[str, ...], applies: bool) -> None:
    text = document("VirtualService", f"{{hosts: [reviews], http: [{{{TO}}}]}}")
    found = World(text, waypoint=("way", "w"), defaults=RouteDefaults(export_to=default))
    assert (found.find("/") == "v1") is applies


@pytest.mark.parametrize(("gateways", "applies"), [("[mesh]", True), ("[gw]", False), ("[gw, mesh]", True)])
def test_one_for_gateways_alone_does_not_apply(gateways: str, applies: bool) -> None:
    found = World(document("VirtualService", f"{{hosts: [reviews], gateways: {gateways}, http: [{{{TO}}}]}}"))
    assert (found.find("/") == "v1") is applies


def rule(destination: str, match: str = "") -> str:
    matches = f"match: [{{uri: {{prefix: {match}}}}}], " if match else ""
    return f"{{hosts: [reviews], http: [{{{matches}route: [{{destination: {{host: {destination}}}}}]}}]}}"


def test_all_that_apply_follow_each_other_by_age_and_an_old_one_for_everything_hides_the_rest() -> None:
    old = document("VirtualService", rule("v1"), "z", created="2024-01-01T00:00:00Z")
    new = document("VirtualService", rule("v2", "/a"), "a", created="2025-01-01T00:00:00Z")
    found = World(new + old)
    assert found.find("/a") == "v1"
    hidden = f"is never reached on port 80 of {REVIEWS.hostname}: VirtualService shop/z rule 0 takes every request"
    assert ("spec.http", hidden) in found.problems()
    newer = document("VirtualService", rule("v1"), "z", created="2026-01-01T00:00:00Z")
    found = World(new + newer)
    assert (found.find("/a"), found.find("/b"), found.problems()) == ("v2", "v1", [])


def test_without_times_the_first_name_goes_first() -> None:
    found = World(document("VirtualService", rule("v2"), "b") + document("VirtualService", rule("v1"), "a"))
    assert found.find("/") == "v1"


def test_one_that_yields_nothing_is_skipped() -> None:
    gate = document("VirtualService", f"{{hosts: [reviews], http: [{{match: [{{sourceLabels: {{a: b}}}}], {TO}}}]}}", "a")
    assert World(gate + document("VirtualService", rule("v2"), "b")).find("/") == "v2"


def test_a_narrower_host_has_its_own_requests_of_a_service_of_many_names_and_no_others() -> None:
    wide = entry("*.example.com")
    text = document(
        "VirtualService", "{hosts: [api.example.com], http: [{match: [{uri: {prefix: /a}}, {}], route: [{destination: {host: v1}}]}]}"
    )
    found = World(text, services=(*SERVICES, wide), target=wide)
    assert found.find("/", authority="api.example.com") == "v1"
    assert found.find("/", authority="API.example.com:8080") == "v1"
    assert found.find("/", authority="www.example.com") == "*"
    assert found.find("/", authority="api.example.com.evil.com") == "*"
    many = ", ".join(f"{name * 20}.example.com" for name in "abcdefghijklmnopqrstuvwxyz") + ", '*.deep.example.com'"
    several = World(text.replace("[api.example.com]", f"[{many}]"), services=(*SERVICES, wide), target=wide)
    assert [several.find("/", authority=f"{name}.example.com") for name in ("a" * 20, "z" * 20, "x.y.deep", "deep", "www")] == [
        "v1", "v1", "v1", "*", "*",
    ]  # fmt: skip
    whole = text.replace("api.example.com", "'*.example.com'")
    assert World(whole, services=(*SERVICES, wide), target=wide).find("/", authority="www.example.com") == "v1"


@pytest.mark.parametrize(("fault", "fields"), [
    ("{abort: {httpStatus: 418}}", ["abort"]),
    ("{delay: {fixedDelay: 1s}, abort: {httpStatus: 418}}", ["abort", "delay"]),
    ("{delay: {fixedDelay: 1s, percent: 5}, abort: {httpStatus: 418, percentage: {value: 0}}}", []),
])  # fmt: skip
def test_a_fault_without_a_percentage_which_no_request_has_is_told(fault: str, fields: list[str]) -> None:
    found = World(document("VirtualService", f"{{hosts: [reviews], http: [{{fault: {fault}, {TO}}}]}}")).problems()
    assert [field for field, _ in found] == [f"spec.http[0].fault.{each}" for each in fields]
    assert all(message.startswith("without 'percentage' no request is ") for _, message in found)

"""HTTPRoutes and GRPCRoutes at a waypoint: the tables of the Gateway API's conformance suite for meshes, and what is beyond them."""

from __future__ import annotations

import pytest

from mesh.model.l7.matching import PathKind, PathMatch, RouteMatch
from mesh.model.l7.routing import (
    Destination,
    Forward,
    HeaderChanges,
    Mirror,
    Origin,
    Redirect,
    Retry,
    Rewrite,
    WeightedDestination,
)
from tests.unit.istiod_py.translate.l7.world import REVIEWS, SERVICES, World, document, entry

PARENT = "parentRefs: [{group: '', kind: Service, name: reviews}]"


def to(name: str) -> str:
    return f"backendRefs: [{{name: {name}, port: 80}}]"


def route(rules: str, name: str = "r", kind: str = "HTTPRoute", parent: str = PARENT, **where: str) -> str:
    return document(kind, f"{{{parent}, rules: [{rules}]}}", name, **where)


def world(rules: str, kind: str = "HTTPRoute") -> World:
    return World(route(rules, kind=kind))


def match(text: str, name: str) -> str:
    return f"{{matches: [{text}], {to(name)}}}"


def test_a_route_replaces_the_default_one_of_every_port_that_takes_requests() -> None:
    found = world(f"{{{to('v1')}}}")
    assert (found.find("/"), found.find("/x", number=8080)) == ("v1", "v1")
    assert found.port(9000).routes == ()
    assert found.routes()[0].origin == Origin("HTTPRoute", "shop", "r", 0)
    assert found.routes()[0].name == "shop.r.0"


def test_a_parents_port_is_the_only_one_that_is_routed() -> None:
    found = World(route(f"{{{to('v1')}}}", parent=PARENT.replace("name: reviews", "name: reviews, port: 8080")))
    assert (found.find("/"), found.find("/", number=8080)) == ("reviews", "v1")


def test_a_host_does_not_choose_a_route() -> None:
    text = route(f"{{{to('v1')}}}").replace("rules:", "hostnames: [example.com], rules:")
    assert World(text).find("/", authority="whatever.example") == "v1"


@pytest.mark.parametrize(("path", "headers", "expected"), [
    ("/", {}, "v1"),
    ("/example", {}, "v1"),
    ("/", {"version": "one"}, "v1"),
    ("/v2", {}, "v2"),
    ("/v2/", {}, "v2"),
    ("/v2/example", {}, "v2"),
    ("/", {"version": "two"}, "v2"),
    ("/v2example", {}, "v1"),
    ("/foo/v2/example", {}, "v1"),
])  # fmt: skip
def test_the_conformance_table_of_matching(path: str, headers: dict[str, str], expected: str) -> None:
    found = world(
        f"{{matches: [{{path: {{value: /}}}}, {{headers: [{{name: version, value: one}}]}}], {to('v1')}}},"
        f"{{matches: [{{path: {{value: /v2}}}}, {{headers: [{{name: version, value: two}}]}}], {to('v2')}}}"
    )
    assert found.find(path, **headers) == expected


@pytest.mark.parametrize(("path", "expected"), [
    ("/one", "v1"), ("/two", "v2"), ("/", "404"), ("/one/example", "404"), ("/two/", "404"), ("/Two", "404"),
])  # fmt: skip
def test_the_conformance_table_of_exact_paths(path: str, expected: str) -> None:
    found = world(f"{match('{path: {type: Exact, value: /one}}', 'v1')}, {match('{path: {type: Exact, value: /two}}', 'v2')}")
    assert found.find(path) == expected


@pytest.mark.parametrize(("path", "expected"), [
    ("/match/exact/one", "v3"), ("/match/exact", "v2"), ("/match", "v1"), ("/match/prefix/one/any", "v2"), ("/match/prefix/any", "v1"),
    ("/match/any", "v3"),
])  # fmt: skip
def test_the_conformance_table_of_the_order_of_paths(path: str, expected: str) -> None:
    found = world(", ".join((
        match("{path: {value: /match}}", "v3"), match("{path: {value: /match/prefix/one}}", "v2"),
        match("{path: {value: /match/prefix}}", "v1"),
        match("{path: {type: Exact, value: /match/exact/one}}", "v3"), match("{path: {type: Exact, value: /match/exact}}", "v2"),
        match("{path: {type: Exact, value: /match}}", "v1"),
    )))  # fmt: skip
    assert found.find(path) == expected


@pytest.mark.parametrize(("headers", "expected"), [
    ({"version": "one"}, "v1"), ({"version": "two"}, "v2"), ({"version": "two", "color": "orange"}, "v1"),
    ({"version": "two", "color": "blue"}, "v2"), ({"color": "blue"}, "v1"), ({"color": "green"}, "v1"), ({"color": "red"}, "v2"),
    ({"color": "yellow"}, "v2"), ({"color": "orange"}, "404"), ({"color": "purple"}, "404"), ({"other": "x"}, "404"), ({}, "404"),
])  # fmt: skip
def test_the_conformance_table_of_headers(headers: dict[str, str], expected: str) -> None:
    def header(*pairs: tuple[str, str]) -> str:
        return f"{{headers: [{', '.join(f'{{name: {name}, value: {value}}}' for name, value in pairs)}]}}"

    found = world(", ".join((
        match(header(("version", "one")), "v1"), match(header(("version", "two")), "v2"),
        match(header(("version", "two"), ("color", "orange")), "v1"),
        match(f"{header(('color', 'blue'))}, {header(('color', 'green'))}", "v1"),
        match(f"{header(('color', 'red'))}, {header(('color', 'yellow'))}", "v2"),
    )))  # fmt: skip
    assert found.find("/", **headers) == expected


@pytest.mark.parametrize(("method", "path", "headers", "expected"), [
    ("POST", "/", {}, "v1"), ("GET", "/", {}, "v2"), ("HEAD", "/", {}, "404"), ("GET", "/path1", {}, "v1"),
    ("PUT", "/", {"version": "one"}, "v2"), ("POST", "/path2", {"version": "two"}, "v3"), ("PATCH", "/path3", {}, "v1"),
    ("DELETE", "/path4", {"version": "three"}, "v1"), ("PUT", "/", {}, "404"), ("DELETE", "/path4", {}, "404"),
    ("PATCH", "/path5", {}, "v1"), ("PATCH", "/", {"version": "four"}, "v2"),
])  # fmt: skip
def test_the_conformance_table_of_methods(method: str, path: str, headers: dict[str, str], expected: str) -> None:
    def version(value: str) -> str:
        return f"headers: [{{name: version, value: {value}}}]"

    found = world(", ".join((
        match("{method: POST}", "v1"), match("{method: GET}", "v2"), match("{path: {value: /path1}, method: GET}", "v1"),
        match(f"{{{version('one')}, method: PUT}}", "v2"), match(f"{{path: {{value: /path2}}, {version('two')}, method: POST}}", "v3"),
        match(f"{{path: {{value: /path3}}, method: PATCH}}, {{path: {{value: /path4}}, {version('three')}, method: DELETE}}", "v1"),
        match("{path: {value: /path5}}", "v1"), match("{method: PATCH}", "v2"), match(version("four").join("{}"), "v1"),
    )))  # fmt: skip
    assert found.find(path, method, **headers) == expected


@pytest.mark.parametrize(("path", "headers", "expected"), [
    ("/?animal=whale", {}, "v1"), ("/?animal=dolphin", {}, "v2"), ("/?animal=dolphin&color=blue", {}, "v3"), ("/?ANIMAL=Whale", {}, "v3"),
    ("/?animal=whale&otherparam=irrelevant", {}, "v1"), ("/?animal=dolphin&color=yellow", {}, "v2"), ("/?color=blue", {}, "404"),
    ("/?animal=dog", {}, "404"), ("/?animal=whaledolphin", {}, "404"), ("/", {}, "404"), ("/path5?animal=hydra", {}, "v1"),
    ("/?animal=shark", {"version": "one"}, "v2"), ("/?animal=whale&animal=dolphin", {}, "v1"),
])  # fmt: skip
def test_the_conformance_table_of_query_parameters(path: str, headers: dict[str, str], expected: str) -> None:
    def query(*pairs: tuple[str, str]) -> str:
        return f"queryParams: [{', '.join(f'{{name: {name}, value: {value}}}' for name, value in pairs)}]"

    found = world(", ".join((
        match(query(("animal", "whale")).join("{}"), "v1"), match(query(("animal", "dolphin")).join("{}"), "v2"),
        match(query(("animal", "dolphin"), ("color", "blue")).join("{}"), "v3"), match(query(("ANIMAL", "Whale")).join("{}"), "v3"),
        match("{path: {value: /path5}}", "v1"), match(query(("animal", "hydra")).join("{}"), "v3"),
        match("{headers: [{name: version, value: one}]}", "v2"), match(query(("animal", "shark")).join("{}"), "v1"),
    )))  # fmt: skip
    assert found.find(path, **headers) == expected


def test_regular_expressions_come_after_prefixes_and_match_the_whole_path() -> None:
    found = world(", ".join((
        match("{path: {type: RegularExpression, value: '/a/.*'}}", "v1"), match("{path: {value: /a}}", "v2"),
        match("{path: {type: RegularExpression, value: '/b'}}", "v3"),
    )))  # fmt: skip
    assert (found.find("/a/b"), found.find("/b"), found.find("/b/c")) == ("v2", "v3", "404")


def test_routes_of_several_objects_are_one_list() -> None:
    a = route(match("{path: {value: /a}}", "v1"), "a", created="2025-01-01T00:00:00Z")
    b = route(match("{path: {value: /a/b}}", "v2"), "b", created="2026-01-01T00:00:00Z")
    assert (World(a + b).find("/a"), World(a + b).find("/a/b")) == ("v1", "v2")


@pytest.mark.parametrize(("first", "second", "winner"), [
    (("z", "shop", "2025-01-01T00:00:00Z"), ("a", "shop", "2026-01-01T00:00:00Z"), "v1"),
    (("a", "shop", ""), ("b", "shop", ""), "v1"),
    (("z", "shop", "2026-01-01T00:00:00Z"), ("a", "shop", ""), "v1"),
    (("a", "way", ""), ("z", "shop", ""), "v2"),
])  # fmt: skip
def test_of_equal_matches_the_oldest_objects_is_first_then_the_first_name(
    first: tuple[str, str, str], second: tuple[str, str, str], winner: str
) -> None:
    parent = PARENT.replace("name: reviews", "name: reviews, namespace: shop")
    texts = [
        route(f"{{backendRefs: [{{name: {to}, namespace: shop, port: 80}}]}}", name, parent=parent, namespace=namespace, created=created)
        for to, (name, namespace, created) in (("v1", first), ("v2", second))
    ]
    for text in (texts[0] + texts[1], texts[1] + texts[0]):
        assert World(text, waypoint=("way", "w")).find("/") == winner


def test_of_equal_matches_in_one_object_the_first_rules_is_first() -> None:
    assert world(f"{{{to('v2')}}}, {{{to('v1')}}}").find("/") == "v2"


def test_the_matches_of_a_rule_that_follow_each_other_are_one_route() -> None:
    found = world(
        f"{match('{path: {value: /a}}, {path: {value: /b}}, {path: {value: /long}}', 'v1')}, {match('{path: {value: /cc}}', 'v2')}"
    )
    assert [[each.path.value for each in made.matches if each.path] for made in found.routes()] == [["/long"], ["/cc"], ["/a", "/b"]]


@pytest.mark.parametrize(("namespace", "waypoint", "applies"), [
    ("shop", "shop", True), ("client", "shop", False), ("shop", "way", True), ("way", "way", True), ("client", "way", False),
])  # fmt: skip
def test_a_route_of_a_clients_namespace_is_not_for_all_clients(namespace: str, waypoint: str, applies: bool) -> None:
    text = route(
        "{backendRefs: [{name: v1, namespace: shop, port: 80}]}",
        parent=PARENT.replace("name: reviews", "name: reviews, namespace: shop"),
        namespace=namespace,
    )
    assert (World(text, waypoint=(waypoint, "w")).find("/") == "v1") is applies


def test_a_service_entry_is_a_parent_as_well() -> None:
    out = entry("api.example.com")
    text = route(f"{{{to('v1')}}}", parent="parentRefs: [{group: networking.istio.io, kind: ServiceEntry, name: out}]")
    assert World(text, services=(*SERVICES, out), target=out).find("/") == "v1"


# Backends


@pytest.mark.parametrize(("backends", "destinations"), [
    ("[{name: v1, port: 80}]", [("v1", 1, None)]),
    ("[{name: v1, port: 80, weight: 7}]", [("v1", 1, None)]),
    ("[{name: v1, port: 80, weight: 70}, {name: v2, port: 80, weight: 30}, {name: v3, port: 80, weight: 0}]",
     [("v1", 70, None), ("v2", 30, None)]),
    ("[{name: v1, port: 80}, {name: gone, port: 80, weight: 3}]", [("v1", 1, None), ("gone", 3, 500)]),
    ("[{name: v1, port: 81}]", [("v1", 1, 500)]),
    ("[{name: v1, kind: Thing, group: example.com, port: 80}]", [("v1", 1, 500)]),
    ("[{name: far, namespace: other, port: 80}]", [("far", 1, None)]),
    ("[{name: far, port: 80}]", [("far", 1, 500)]),
    ("[{name: v1, group: multicluster.x-k8s.io, kind: ServiceImport, port: 80}]", [("v1", 1, None)]),
    ("[{name: v1.shop.svc.cluster.local, group: networking.istio.io, kind: Hostname, port: 80}]", [("v1", 1, None)]),
    ("[{name: v1.shop.svc.cluster.local, group: networking.istio.io, kind: Hostname}]", [("v1", 1, 500)]),
    ("[{name: v1.shop.svc.cluster.local, namespace: x, group: networking.istio.io, kind: Hostname, port: 80}]", [("v1", 1, 500)]),
    ("[]", []),
    ("[{name: v1, port: 80, weight: 0}]", []),
])  # fmt: skip
def test_a_backend_that_cannot_be_used_keeps_its_share_and_fails_it(backends: str, destinations: list[tuple[str, int, int | None]]) -> None:
    action = world(f"{{backendRefs: {backends}}}").routes()[0].action
    assert isinstance(action, Forward)
    assert [(d.destination.hostname.partition(".")[0], d.weight, d.fails_with) for d in action.destinations] == destinations
    assert action.empty_status == 500
    assert all(d.because for d in action.destinations if d.fails_with)


# Filters


def test_filters_of_rule_and_only_backend_are_one_change() -> None:
    (made,) = world(
        "{filters: [{type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: A, value: rule}], add: [{name: b, value: rule}]}}],"
        " backendRefs: [{name: v1, port: 80, filters: [{type: RequestHeaderModifier, requestHeaderModifier:"
        " {set: [{name: a, value: own}]}},"
        " {type: ResponseHeaderModifier, responseHeaderModifier: {remove: [C]}}]}]}"
    ).routes()
    assert (made.request, made.response) == (HeaderChanges((("a", "own"),), (("b", "rule"),)), HeaderChanges(remove=("c",)))


def test_filters_of_several_backends_stay_with_them() -> None:
    action = (
        world(
            "{backendRefs: [{name: v1, port: 80, filters: [{type: RequestHeaderModifier, requestHeaderModifier:"
            " {set: [{name: backend, value: v1},"
            " {name: Host, value: h}]}}]}, {name: v2, port: 80}]}"
        )
        .routes()[0]
        .action
    )
    assert isinstance(action, Forward)
    assert action.destinations[0].request == HeaderChanges((("backend", "v1"),))
    assert (action.destinations[0].authority, action.destinations[1].authority) == ("h", "")


@pytest.mark.parametrize(("text", "redirect"), [
    ("hostname: example.org", Redirect(302, authority="example.org", request_port=True)),
    ("hostname: example.org, statusCode: 301", Redirect(301, authority="example.org", request_port=True)),
    ("path: {type: ReplacePrefixMatch, replacePrefixMatch: /replacement-prefix}",
     Redirect(302, prefix="/replacement-prefix", request_port=True)),
    ("port: 8083", Redirect(302, port=8083)),
    ("scheme: https", Redirect(302, scheme="https")),
])  # fmt: skip
def test_a_redirect(text: str, redirect: Redirect) -> None:
    (made,) = world(
        f"{{matches: [{{path: {{value: /original-prefix}}}}], filters: [{{type: RequestRedirect, requestRedirect: {{{text}}}}}]}}"
    ).routes()
    assert made.action == redirect
    assert made.matches == (RouteMatch(path=PathMatch(PathKind.SEGMENTS, "/original-prefix")),)


def test_a_rewrite_of_a_prefix_is_of_whole_segments_even_where_every_path_is_matched() -> None:
    (made,) = world(
        "{filters: [{type: URLRewrite, urlRewrite: {hostname: one.example.org, path:"
        " {type: ReplacePrefixMatch, replacePrefixMatch: /one/}}}],"
        f" {to('v1')}}}"
    ).routes()
    assert isinstance(made.action, Forward)
    assert made.action.rewrite == Rewrite(prefix="/one", authority="one.example.org")
    assert made.matches == (RouteMatch(path=PathMatch(PathKind.SEGMENTS, "/")),)


def test_mirrors_to_nowhere_are_left_out_and_told() -> None:
    found = world(
        "{filters: [{type: RequestMirror, requestMirror: {backendRef: {name: v2, port: 80}, percent: 20}},"
        " {type: RequestMirror, requestMirror:"
        " {backendRef: {name: gone, port: 80}}}, {type: RequestMirror, requestMirror: {backendRef: {name: v3, port: 80}, percent: 0}}],"
        f" {to('v1')}}}"
    )
    assert found.routes()[0].mirrors == (Mirror(Destination("shop", "v2.shop.svc.cluster.local", 80), 20.0),)
    assert [field for field, _ in found.problems()] == ["spec.rules[0].filters[1]"]


@pytest.mark.parametrize("text", [
    "filters: [{type: ExtensionRef, extensionRef: {group: a, kind: B, name: c}}], backendRefs: [{name: v1, port: 80}]",
    "filters: [{type: ExternalAuth, externalAuth: {protocol: GRPC}}], backendRefs: [{name: v1, port: 80}]",
    "backendRefs: [{name: v1, port: 80, filters: [{type: URLRewrite, urlRewrite: {hostname: a.b}}]}]",
    "backendRefs: [{name: v1, port: 80, filters: [{type: RequestRedirect, requestRedirect: {hostname: a.b}}]}]",
])  # fmt: skip
def test_a_filter_that_is_not_supported_fails_its_rules_requests_and_no_others(text: str) -> None:
    found = world(f"{{matches: [{{path: {{value: /a}}}}], {text}}}, {{{to('v2')}}}")
    assert (found.find("/a"), found.find("/b")) == ("500", "v2")


# Times


@pytest.mark.parametrize(("text", "timeout", "per_try", "attempts"), [
    ("timeouts: {request: 500ms}", 0.5, None, 2),
    ("timeouts: {request: 0s}", None, None, 2),
    ("timeouts: {backendRequest: 500ms}", 0.5, None, 2),
    ("timeouts: {request: 2s, backendRequest: 500ms}", 0.5, None, 2),
    ("timeouts: {request: 2s, backendRequest: 0s}", 2.0, None, 2),
    ("timeouts: {request: 2s, backendRequest: 500ms}, retry: {attempts: 5}", 2.0, 0.5, 5),
    ("retry: {attempts: 5}", None, None, 5),
    ("retry: {attempts: 0}", None, None, None),
    ("name: n", None, None, 2),
])  # fmt: skip
def test_a_backends_time_is_that_of_each_attempt_where_there_are_attempts(
    text: str, timeout: float | None, per_try: float | None, attempts: int | None
) -> None:
    (made,) = world(f"{{{text}, {to('v1')}}}").routes()
    assert made.timeout == timeout
    assert (made.retry.attempts if made.retry else None) == attempts
    assert (made.retry.per_try_timeout if made.retry else None) == per_try


def test_a_rules_name_is_the_routes() -> None:
    assert world(f"{{name: n, {to('v1')}}}").routes()[0].name == "n"


# GRPCRoutes


@pytest.mark.parametrize(("path", "headers", "expected"), [
    ("/grpcecho.GrpcEcho/Echo", {}, "v1"), ("/grpcecho.GrpcEcho/EchoTwo", {}, "v2"), ("/grpcecho.GrpcEcho/EchoThree", {}, "404"),
    ("/other.Svc/Ping", {}, "v3"), ("/other.Svcs/Ping", {}, "404"), ("/any/Third", {}, "v3"), ("/a/b/Third", {}, "404"),
    ("/x/y", {"version": "two"}, "v2"),
])  # fmt: skip
def test_calls_are_routed_by_method_and_what_nothing_matches_has_no_route(path: str, headers: dict[str, str], expected: str) -> None:
    found = world(", ".join((
        match("{method: {service: grpcecho.GrpcEcho, method: Echo}}", "v1"),
        match("{method: {service: grpcecho.GrpcEcho, method: EchoTwo}}", "v2"),
        match("{method: {service: other.Svc}}", "v3"), match("{method: {method: Third}}", "v3"),
        match("{headers: [{name: version, value: two}]}", "v2"),
    )), "GRPCRoute")  # fmt: skip
    assert found.find(path, "POST", **headers) == expected


def test_a_grpc_rule_for_everything_comes_after_all_others() -> None:
    found = world(f"{{{to('v1')}}}, {match('{headers: [{name: a, value: b}]}', 'v2')}", "GRPCRoute")
    assert (found.find("/a/b", a="b"), found.find("/a/b")) == ("v2", "v1")


def test_routes_of_both_kinds_on_one_service_are_one_list() -> None:
    found = World(route(match("{method: {service: a.B, method: C}}", "v1"), "g", "GRPCRoute") + route(f"{{{to('v2')}}}", "h"))
    assert (found.find("/a.B/C", "POST"), found.find("/a.B/D", "POST")) == ("v1", "v2")


# Beside VirtualServices


@pytest.mark.parametrize(("vs", "gateway", "winner"), [
    ("2025-01-01T00:00:00Z", "2026-01-01T00:00:00Z", "v1"), ("2026-01-01T00:00:00Z", "2025-01-01T00:00:00Z", "v2"),
])  # fmt: skip
def test_a_virtual_service_and_routes_follow_each_other_by_age(vs: str, gateway: str, winner: str) -> None:
    text = document("VirtualService", "{hosts: [reviews], http: [{route: [{destination: {host: v1}}]}]}", "v", created=vs)
    # The unit of routes is as old as its oldest object.
    young = route(match("{path: {value: /young}}", "v3"), "young", created="2027-01-01T00:00:00Z")
    found = World(text + young + route(f"{{{to('v2')}}}", created=gateway))
    assert found.find("/") == winner
    assert found.find("/young") == ("v1" if winner == "v1" else "v3")


def test_what_an_old_virtual_service_does_not_match_goes_on_to_the_routes() -> None:
    text = document(
        "VirtualService", "{hosts: [reviews], http: [{match: [{uri: {prefix: /a}}], route: [{destination: {host: v1}}]}]}", "v",
        created="2025-01-01T00:00:00Z",
    )  # fmt: skip
    found = World(text + route(match("{path: {value: /b}}", "v2"), created="2026-01-01T00:00:00Z"))
    assert (found.find("/abc"), found.find("/b"), found.find("/c")) == ("v1", "v2", "404")


def test_a_destination_is_written_out() -> None:
    assert world(f"{{{to('v1')}}}").routes()[0].action == Forward(
        (WeightedDestination(Destination("shop", "v1.shop.svc.cluster.local", 80)),)
    )
    assert REVIEWS.hostname == "reviews.shop.svc.cluster.local"
    assert world(f"{{{to('v1')}}}").routes()[0].retry == Retry()

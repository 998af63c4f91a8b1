"""Which rule has a request: the translated routes, tried in order, against the Gateway API's prose, rule by rule and without any order."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cmp_to_key
from itertools import product

from hypothesis import given, settings
from hypothesis import strategies as st

from istiod_py.translate.l7.known import L7Port, L7Service, know
from istiod_py.translate.l7.routing import RouteMemory, Routing
from istiod_py.translate.l7.sources import RouteSources, Sourced
from mesh.http.message import Request
from mesh.kube.gatewayapi.filters import Filters
from mesh.kube.gatewayapi.references import BackendRef, ParentRef
from mesh.kube.gatewayapi.routes import RequestRoute, RequestRule, RuleBackend
from mesh.kube.objects import KubeObject, Layer, Origin
from mesh.kube.routeactions import Target, WeightedTarget
from mesh.kube.virtualservice import HttpMatch, HttpRule, VirtualService
from mesh.model.l7.matching import Exact, HeaderMatch, PathKind, PathMatch, Prefix, QueryMatch, Regex, RouteMatch
from mesh.model.l7.waypoint import Protocol
from tests.unit.istiod_py.translate.l7.world import find_told

HOSTNAME = "s.shop.svc.cluster.local"
SERVICE = L7Service("shop", HOSTNAME, (L7Port(80, "http", Protocol.HTTP),), "Service", "s")
PARENTS = tuple(ParentRef("", "Service", name, "shop") for name in ("s", "t", "u"))
TIMES = ("", "2025-01-01T00:00:00Z", "2026-01-01T00:00:00Z")
WORDS = st.sampled_from(["a", "ab", "b"])
PATHS = st.lists(WORDS, max_size=3).map(lambda words: "/" + "/".join(words))
MATCHES = st.builds(
    RouteMatch,
    path=st.one_of(
        PATHS.map(lambda path: PathMatch(PathKind.EXACT, path)),
        PATHS.map(lambda path: PathMatch(PathKind.SEGMENTS, path)),
        PATHS.map(lambda path: PathMatch(PathKind.REGEX, f"{path}.*")),
    ),
    method=st.none() | st.sampled_from(["GET", "PUT"]).map(Exact),
    headers=st.lists(st.sampled_from(["x", "y"]), unique=True).map(lambda names: tuple(HeaderMatch(name, Exact("1")) for name in names)),
    query=st.lists(st.sampled_from(["p", "q"]), unique=True).map(lambda names: tuple(QueryMatch(name, Exact("1")) for name in names)),
)
RULES = st.lists(st.lists(MATCHES, max_size=3).map(tuple), min_size=1, max_size=3)


@dataclass(frozen=True)
class Asked:
    path: str
    method: str
    headers: frozenset[str]
    query: frozenset[str]

    def request(self) -> Request:
        query = "&".join(f"{name}=1" for name in sorted(self.query))
        headers = [(name.encode(), b"1") for name in sorted(self.headers)]
        return Request(self.method.encode(), b"http", b"s", f"{self.path}?{query}".encode(), headers)


ASKED = st.builds(
    Asked,
    st.tuples(PATHS, st.sampled_from(["", "/"])).map("".join),
    st.sampled_from(["GET", "PUT", "HEAD"]),
    st.frozensets(st.sampled_from(["x", "y"])),
    st.frozensets(st.sampled_from(["p", "q"])),
)


def made(kind: str, name: str, namespace: str, created: str) -> KubeObject:
    raw: dict[str, object] = {"metadata": {"name": name, "namespace": namespace, "creationTimestamp": created}}
    return KubeObject("v1", kind, namespace, name, raw, (Layer(Origin("x", 0, 0), raw),))


def route_of(index: int, namespace: str, created: str, parents: int, rules: list[tuple[RouteMatch, ...]]) -> Sourced[RequestRoute]:
    name = f"r{index}"
    backend = (RuleBackend(BackendRef("", "Service", "s", "shop", 80), Filters()),)
    value = RequestRoute(
        "HTTPRoute", namespace, name, PARENTS[:parents], (), tuple(RequestRule("", matches, Filters(), backend) for matches in rules)
    )
    return Sourced(made("HTTPRoute", name, namespace, created), value)


def holds(match: RouteMatch, asked: Asked) -> bool:
    """By the book, without the code under test."""
    assert match.path is not None
    wanted, path = match.path.value, asked.path
    segments = [part for part in wanted.split("/") if part]
    fits = {
        PathKind.EXACT: path == wanted,
        PathKind.REGEX: path.startswith(wanted.removesuffix(".*")),
        PathKind.SEGMENTS: path.split("/")[1 : 1 + len(segments)] == segments,
    }[match.path.kind]
    return (
        fits
        and (match.method is None or match.method == Exact(asked.method))
        and all(header.name in asked.headers for header in match.headers)
        and all(parameter.name in asked.query for parameter in match.query)
    )


Found = tuple[RouteMatch, KubeObject, int, int]


def compare(first: Found, second: Found) -> int:
    """Negative: ``first`` goes before ``second``. The Gateway API's list of criteria, each looked at only where those before are even."""
    (a, a_obj, *a_place), (b, b_obj, *b_place) = first, second
    assert a.path is not None
    assert b.path is not None
    for kind in (PathKind.EXACT, PathKind.SEGMENTS):
        if (a.path.kind is kind) != (b.path.kind is kind):
            return -1 if a.path.kind is kind else 1
    criteria = (
        len(b.path.value) - len(a.path.value),
        (b.method is not None) - (a.method is not None),
        len(b.headers) - len(a.headers),
        len(b.query) - len(a.query),
    )
    for criterion in criteria:
        if criterion:
            return criterion
    ages = [obj.created or "9999" for obj in (a_obj, b_obj)]
    names = [f"{obj.namespace}/{obj.name}" for obj in (a_obj, b_obj)]
    for left, right in (ages, names, (a_place, b_place)):
        if left != right:
            return -1 if left < right else 1
    return 0


ROUTES = st.tuples(st.sampled_from(["shop", "way"]), st.sampled_from(TIMES), st.integers(1, 3), RULES)


@given(st.lists(ROUTES, max_size=4), ASKED, st.randoms(), st.sampled_from([1, 4, 1000]))
@settings(deadline=None, max_examples=400)
def test_a_request_has_the_rule_that_goes_before_all_others_that_match(
    routes: list[tuple[str, str, int, list[tuple[RouteMatch, ...]]]], asked: Asked, rng: object, group_from: int
) -> None:
    """Whatever else the routes are for, and whether they are told together or apart from each other."""
    sources = [route_of(index, *each) for index, each in enumerate(routes)]
    everything = RouteMatch(path=PathMatch(PathKind.SEGMENTS, "/"))
    found: list[Found] = [
        (match, route.obj, number, index)
        for route in sources
        for number, rule in enumerate(route.value.rules)
        for index, match in enumerate(rule.matches or (everything,))
        if holds(match, asked)
    ]
    rng.shuffle(sources)
    routing = Routing(RouteSources(requests=tuple(sources)), know([SERVICE]), RouteMemory(), group_from=group_from)
    chosen = find_told(routing.tell([SERVICE], "way/w", "way"), asked.request(), 80)
    if not routes:
        assert chosen is not None
        assert chosen.route.route.name == "default"
    elif not found:
        assert chosen is None
    else:
        _, obj, number, _ = min(found, key=cmp_to_key(compare))
        assert chosen is not None
        origin = chosen.route.route.origin
        assert (origin.namespace, origin.name, origin.rule) == (obj.namespace, obj.name, number)


URIS = st.none() | PATHS.map(Exact) | PATHS.map(Prefix) | PATHS.map(lambda path: Regex(f"{path}.*"))
VS_MATCHES = st.builds(
    HttpMatch, uri=URIS, method=st.none() | st.sampled_from(["GET", "PUT"]).map(Exact), port=st.sampled_from([0, 80, 81])
)


def virtual_service(index: int, created: str, rules: list[list[HttpMatch]]) -> Sourced[VirtualService]:
    name = f"v{index}"
    targets = (WeightedTarget(Target("s")),)
    http = tuple(HttpRule(matches=tuple(matches), targets=targets) for matches in rules)
    return Sourced(made("VirtualService", name, "shop", created), VirtualService("shop", name, ("s",), (), http, (), (), ()))


def vs_holds(match: HttpMatch, asked: Asked) -> bool:
    path = asked.path
    match match.uri:
        case Exact(value=value):
            fits = path == value
        case Prefix(value=value):
            fits = path.startswith(value)
        case Regex(value=value):
            fits = path.startswith(value.removesuffix(".*"))
        case _:
            fits = True
    return fits and match.method in (None, Exact(asked.method)) and match.port in (0, 80)


@given(st.lists(st.tuples(st.sampled_from(TIMES), st.lists(st.lists(VS_MATCHES, max_size=2), min_size=1, max_size=3)), max_size=3), ASKED)
@settings(deadline=None, max_examples=300)
def test_virtual_services_are_one_list_by_age_and_the_first_rule_that_matches_has_the_request(
    services: list[tuple[str, list[list[HttpMatch]]]], asked: Asked
) -> None:
    sources = [virtual_service(index, *each) for index, each in enumerate(services)]
    ordered = sorted(sources, key=lambda source: (source.obj.created or "9999", source.obj.name))
    wanted = next(
        (
            (source.obj.name, number)
            for source in ordered
            for number, rule in enumerate(source.value.http)
            if not rule.matches or any(vs_holds(match, asked) for match in rule.matches)
        ),
        None,
    )
    # Whether anything is routed on this port at all, whatever the request.
    routed = any(not rule.matches or any(match.port in (0, 80) for match in rule.matches) for each in sources for rule in each.value.http)
    routing = Routing(RouteSources(virtual_services=tuple(sources)), know([SERVICE]), RouteMemory())
    chosen = find_told(routing.tell([SERVICE], "shop/w", "shop"), asked.request(), 80)
    if wanted is not None:
        assert chosen is not None
        origin = chosen.route.route.origin
        assert (origin.name, origin.rule) == wanted
    elif routed:
        assert chosen is None
    else:
        assert chosen is not None
        assert chosen.route.route.name == "default"


def test_the_model_disagrees_with_a_wrong_order() -> None:
    """That it can fail: a longer prefix goes before a shorter one, an exact path before both."""
    obj = made("HTTPRoute", "r", "shop", "")
    kinds = [
        PathMatch(PathKind.EXACT, "/a"),
        PathMatch(PathKind.SEGMENTS, "/a/b"),
        PathMatch(PathKind.SEGMENTS, "/a"),
        PathMatch(PathKind.REGEX, "/a.*"),
    ]
    ordered: list[Found] = [(RouteMatch(path=path), obj, 0, index) for index, path in enumerate(kinds)]
    for (left, first), (right, second) in product(enumerate(ordered), repeat=2):
        assert (compare(first, second) < 0) is (left < right)

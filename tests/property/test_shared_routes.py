"""Routes are told once for all that use them: what a request gets is what it would get if every port had a list of its own."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from istiod_py.translate.l7.known import L7Port, L7Service, know
from istiod_py.translate.l7.routes import UnitUse
from istiod_py.translate.l7.routing import RouteMemory, Routing
from istiod_py.translate.l7.sources import RouteSources, Sourced
from istiod_py.translate.l7.tables import Joined, RoutesTold, cut_tables, join_small, join_uses
from istiod_py.translate.l7.units import RouteUnit
from mesh.http.message import Request
from mesh.kube.objects import KubeObject, Layer, Origin
from mesh.kube.routeactions import Target, WeightedTarget
from mesh.kube.virtualservice import HttpMatch, HttpRule, VirtualService
from mesh.model.l7.matching import Exact, PathKind, PathMatch, Prefix, RouteMatch
from mesh.model.l7.routing import DirectResponse, Forward, Route
from mesh.model.l7.routing import Origin as Made
from mesh.model.l7.waypoint import Protocol
from tests.unit.istiod_py.translate.l7.world import REVIEWS, V1, V2, WAYPOINT, World, document, find_told

PORTS = (80, 81, 82)
SUFFIX = "shop.svc.cluster.local"


def service(name: str, *ports: int, hostname: str = "") -> L7Service:
    found = tuple(L7Port(port, f"p{port}", Protocol.HTTP) for port in ports)
    return L7Service("shop", hostname or f"{name}.{SUFFIX}", found, "ServiceEntry" if hostname else "Service", name)


SERVICES = (service("a", 80, 81), service("b", 80, 82), service("c", 81), service("wide", 80, 81, hostname="*.example.com"))
HOSTS = ("a", "b", "c", f"*.{SUFFIX}", "*", "x.example.com", "*.y.example.com", "*.example.com")
AUTHORITIES = ("a", "x.example.com", "X.example.com:81", "z.y.example.com", "y.example.com", "..y.example.com", "w.example.com")
PATHS = ("/", "/a", "/ab", "/b")
MATCHES = st.builds(
    HttpMatch,
    uri=st.none() | st.sampled_from(PATHS).map(Prefix) | st.sampled_from(PATHS).map(Exact),
    port=st.sampled_from((0, 0, *PORTS)),
)
TARGETS = st.builds(Target, st.sampled_from(("a", "b", "c", "nowhere")), port=st.sampled_from((0, 80)))
RULES = st.lists(st.tuples(st.lists(MATCHES, max_size=2), TARGETS), min_size=1, max_size=3)
ROUTERS = st.lists(st.tuples(st.lists(st.sampled_from(HOSTS), min_size=1, max_size=2, unique=True), RULES), max_size=4)


@dataclass(frozen=True)
class Asked:
    service: L7Service
    port: int
    authority: str
    path: str

    def request(self) -> Request:
        return Request(b"GET", b"http", self.authority.encode(), self.path.encode(), [])


def virtual_service(index: int, hosts: list[str], rules: list[tuple[list[HttpMatch], Target]]) -> Sourced[VirtualService]:
    http = tuple(HttpRule(matches=tuple(matches), targets=(WeightedTarget(target),)) for matches, target in rules)
    raw: dict[str, object] = {"metadata": {"name": f"v{index}", "namespace": "shop"}}
    obj = KubeObject("v1", "VirtualService", "shop", f"v{index}", raw, (Layer(Origin("x", 0, 0), raw),))
    return Sourced(obj, VirtualService("shop", f"v{index}", tuple(hosts), (), http, (), (), ()))


def full(host: str) -> str:
    return host if "." in host or host == "*" else f"{host}.{SUFFIX}"


def means(host: str, name: str) -> bool:
    """Whether a VirtualService's host means a name; of a name with a star: all of its names."""
    return host == name or host == "*" or (host.startswith("*") and name.endswith(host[1:]) and len(name) > len(host[1:]))


def is_meant(hosts: list[str], asked: Asked) -> bool:
    """By the book: those of a service by its hostname, and among the names of a service of many by the request's."""
    hosts = [full(host) for host in hosts]
    own = asked.service.hostname
    if any(means(host, own) for host in hosts):
        return True
    name = asked.authority.partition(":")[0].lower()
    labels = name.split(".")
    return own.startswith("*") and "" not in labels and any(means(own, host) and means(host, name) for host in hosts)


def naive(sources: list[Sourced[VirtualService]], asked: Asked) -> tuple[str, int, int] | None:
    """The object, its rule and the port that the request is sent to; None: no rule has it."""
    for source in sources:
        if not is_meant(list(source.value.hosts), asked):
            continue
        for number, rule in enumerate(source.value.http):
            if not rule.matches or any(hits(match, asked) for match in rule.matches):
                target = rule.targets[0].target
                only = {"c": 81}.get(target.host, 0)
                return source.value.name, number, target.port or only or asked.port
    return None


def hits(match: HttpMatch, asked: Asked) -> bool:
    if match.port not in (0, asked.port):
        return False
    match match.uri:
        case Exact(value=value):
            return asked.path == value
        case Prefix(value=value):
            return asked.path.startswith(value)
    return True


def is_routed(sources: list[Sourced[VirtualService]], service: L7Service, port: int) -> bool:
    """Whether anything is routed there for all of the service's names, whatever the request: then it has no default route."""
    for source in sources:
        of_all = any(means(full(host), service.hostname) for host in source.value.hosts)
        ports = {match.port for rule in source.value.http for match in rule.matches or (HttpMatch(),)}
        if of_all and ports & {0, port}:
            return True
    return False


def route(sources: list[Sourced[VirtualService]], services: tuple[L7Service, ...] = SERVICES) -> RoutesTold:
    routing = Routing(RouteSources(virtual_services=tuple(sources)), know(SERVICES), RouteMemory())
    return routing.tell(services, "shop/w", "shop")


@given(ROUTERS, st.sampled_from([1, 8]))
@settings(deadline=None, max_examples=200)
def test_what_is_told_once_is_what_every_port_would_have_by_itself(
    routers: list[tuple[list[str], list[tuple[list[HttpMatch], Target]]]],
    most_lists: int,
) -> None:
    sources = [virtual_service(index, *each) for index, each in enumerate(routers)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("istiod_py.translate.l7.tables.MOST_LISTS", most_lists)
        told = route(sources)
    for each in SERVICES:
        for port in each.ports:
            for authority in AUTHORITIES if each.hostname.startswith("*") else ("a",):
                for path in PATHS:
                    asked = Asked(each, port.number, authority, path)
                    found = find_told(told, asked.request(), port.number, each.key)
                    expected = naive(sources, asked)
                    if expected is None:
                        assert (found is not None) is not is_routed(sources, each, port.number)
                        assert found is None or found.route.route.name == "default"
                    else:
                        assert found is not None
                        action, origin = found.route.route.action, found.route.route.origin
                        assert isinstance(action, Forward)
                        to = action.destinations[0].destination.at(port.number)
                        assert (origin.name, origin.rule, to.port) == expected


@given(ROUTERS)
@settings(deadline=None)
def test_no_route_is_told_twice_however_many_ports_use_it(routers: list[tuple[list[str], list[tuple[list[HttpMatch], Target]]]]) -> None:
    sources = [virtual_service(index, *each) for index, each in enumerate(routers)]
    told = [(route.origin.name, route.origin.rule) for table in route(sources).tables for route in table.routes]
    assert len(told) == len(set(told))


UNITS = tuple(RouteUnit(frozenset()) for _ in range(5))
USES = st.builds(UnitUse, st.sampled_from(UNITS), st.sampled_from([(), ("x",)]))


@given(st.lists(st.lists(USES, unique_by=lambda use: use.unit, max_size=5), max_size=5))
def test_lists_are_joined_of_what_always_stands_together(sequences: list[list[UnitUse]]) -> None:
    lists = join_uses(sequences)
    found: dict[RouteUnit, set[tuple[RouteUnit, ...]]] = {}
    for uses in sequences:
        joined = list(lists.split(uses))
        assert [UnitUse(unit, each.hosts) for each in joined for unit in each.units] == uses
        for each in joined:
            for unit in each.units:
                found.setdefault(unit, set()).add(each.units)
    assert all(len(each) == 1 for each in found.values())
    # And nothing stays apart that could be one.
    for uses in sequences:
        for first, second in pairwise(uses):
            if all(is_followed(first.unit, second.unit, other) for other in sequences):
                assert found[first.unit] == found[second.unit]


def is_followed(first: RouteUnit, second: RouteUnit, uses: list[UnitUse]) -> bool:
    """By the other for the same hosts, if either is there at all."""
    units = [use.unit for use in uses]
    if first not in units and second not in units:
        return True
    pairs = pairwise(uses)
    return any((one.unit, other.unit) == (first, second) and one.hosts == other.hosts for one, other in pairs)


MADE = st.builds(
    lambda paths, body: Route(
        Made("VirtualService", "shop", "v", 0),
        DirectResponse(200, bytes(body)),
        matches=tuple(RouteMatch(path=PathMatch(PathKind.EXACT, path)) for path in paths),
    ),
    st.lists(st.text("/ab", max_size=20), max_size=30),
    st.integers(0, 600),
)


@given(st.lists(MADE, max_size=10), st.sampled_from([400, 1000, 10_000]))
@settings(deadline=None)
def test_tables_are_cut_to_size_and_are_together_what_was_cut(routes: list[Route], size: int) -> None:
    unit = RouteUnit(frozenset(), tuple(routes))
    tables = cut_tables((unit,), size)

    def alternatives(made: list[Route]) -> list[tuple[object, object]]:
        return [(each.action, match) for each in made for match in each.matches or (None,)]

    assert alternatives([each for table in tables for each in table.routes]) == alternatives(routes)
    for table in tables:
        first = table.routes[0]
        whole, beside = (len(msgspec.json.encode(each)) for each in (table.routes, msgspec.structs.replace(first, matches=())))
        around = len('[,"matches":[],]')
        large = beside + around >= size // 2 and whole <= beside + around + size
        assert whole <= size + len("[]") or (len(table.routes) == 1 and (large or len(first.matches) < 2))
    assert tables == cut_tables((unit,), size)


def test_a_table_is_named_by_what_is_in_it() -> None:
    first, again = (
        route([virtual_service(0, ["*"], [([], Target("a", port=80))])]),
        route([virtual_service(0, ["*"], [([], Target("a", port=80))])]),
    )
    other = route([virtual_service(0, ["*"], [([], Target("b", port=80))])])
    assert [table.key for table in first.tables] == [table.key for table in again.tables]
    assert [table.key for table in first.tables] != [table.key for table in other.tables]


@pytest.mark.parametrize("services", [1, 3])
def test_what_a_wildcard_costs_does_not_grow_with_the_services_behind_it(services: int) -> None:
    rules = [([HttpMatch(uri=Prefix(f"/{number}"))], Target("a", port=80)) for number in range(100)]
    told = route([virtual_service(0, ["*"], rules)], SERVICES[:services])
    assert sum(len(each.matches) for table in told.tables for each in table.routes) == 100
    assert all(not port.routes for config in told.configs for port in config.ports)


def test_what_services_share_of_http_routes_is_told_once_beside_what_is_their_own() -> None:
    rules = (
        "["
        + ", ".join(f"{{matches: [{{path: {{value: /p{number}}}}}], backendRefs: [{{name: v1, port: 80}}]}}" for number in range(16))
        + "]"
    )
    shared = "[" + ", ".join(f"{{group: '', kind: Service, name: {name}}}" for name in ("reviews", "v1", "v2")) + "]"
    text = "".join(document("HTTPRoute", f"{{parentRefs: {shared}, rules: {rules}}}", f"shared{number}") for number in range(5))
    for name in ("reviews", "v1"):
        own = "[{matches: [{path: {value: /p1/own}}], backendRefs: [{name: v2, port: 80}]}]"
        text += document("HTTPRoute", f"{{parentRefs: [{{group: '', kind: Service, name: {name}}}], rules: {own}}}", f"own-{name}")
    world = World(text)
    told = world.routing.tell([REVIEWS, V1, V2], "shop/w", "shop")
    assert sum(len(table.routes) for table in told.tables) == 5 * 16 + 2
    for service, own in ((REVIEWS, "own-reviews"), (V1, "own-v1"), (V2, "shared0")):
        found = [
            find_told(told, Request(b"GET", b"http", b"a", path, []), 80, service.key) for path in (b"/p1/own", b"/p1", b"/p15/x", b"/q")
        ]
        assert [each and each.route.route.origin.name for each in found] == [own, "shared0", "shared0", None]
    fronting = {service.key: (WAYPOINT,) for service in (REVIEWS, V1, V2)}
    assert world.routing.report(fronting).problems == ()


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=12), st.integers(1, 4))
def test_small_lists_are_joined_where_there_are_many(lists: list[tuple[int, bool]], most: int) -> None:
    made = Route(Made("VirtualService", "shop", "v", 0), DirectResponse(200))
    before = [Joined((RouteUnit(frozenset(), (made,) * size),), ("x",) if narrow else ()) for size, narrow in lists]
    after = join_small(before, most)
    assert [(unit, each.hosts) for each in after for unit in each.units] == [(unit, each.hosts) for each in before for unit in each.units]
    narrow = sum(bool(each.hosts) for each in before)
    assert sum(not each.hosts for each in after) <= max(most, 2 * most + 1 + narrow)
    largest = sorted((each.size for each in before if not each.hosts), reverse=True)[:most]
    assert sorted((each.size for each in after if not each.hosts and len(each.units) == 1), reverse=True)[:most] >= largest

"""Configuration as it is served: what changes, what stays, and that a request never sees half of a change."""

from __future__ import annotations

import msgspec
import trio

from mesh.http.message import Request
from mesh.model.l7.destination import DestinationConfig, TrafficPolicy
from mesh.model.l7.matching import PathKind, PathMatch, RouteMatch
from mesh.model.l7.policy import AuthorizationPolicy, PolicyAction, PolicyRule, RequestAuthentication
from mesh.model.l7.routing import Destination, DirectResponse, Origin, Route, TcpRoute, WeightedDestination
from mesh.model.l7.waypoint import Assigned, L7Resource, PortConfig, Protocol, RouteTable, ServiceConfig, TableUse, WaypointSettings
from mesh.state.store import Delta
from mesh.xds.decode import decode_response
from mesh.xds.l7 import ROUTE_TABLE, resource_name, type_url_of
from mesh.xds.proto import discovery_pb2 as discovery
from waypoint_py.steps import finish
from waypoint_py.store import ServiceCompiler, Store, speaks_http
from waypoint_py.turns import finish_in_turns

ORIGIN = Origin("HTTPRoute", "shop", "web")
KEY = "shop/web.shop.svc"


def _put(*resources: L7Resource) -> Delta:
    return Delta(l7=tuple(Assigned("shop/w", resource) for resource in resources))


def _remove(*resources: L7Resource) -> Delta:
    return Delta(removed_l7=tuple((type_url_of(each), resource_name(Assigned("shop/w", each))) for each in resources))


def _service(*statuses: int, hostname: str = "web.shop.svc") -> ServiceConfig:
    ports = [PortConfig(80 + at, Protocol.HTTP, routes=(Route(ORIGIN, DirectResponse(status)),)) for at, status in enumerate(statuses)]
    return ServiceConfig("shop", hostname, tuple(ports))


def _policy(name: str, *targets: str) -> AuthorizationPolicy:
    return AuthorizationPolicy(Origin("AuthorizationPolicy", "shop", name), PolicyAction.DENY, targets, (PolicyRule(),))


def test_what_did_not_change_is_the_object_that_it_was() -> None:
    store = Store(WaypointSettings("shop", "w"))
    assert store.apply(_put(_service(200, 201)))
    first, second = store.find_port(KEY, 80), store.find_port(KEY, 81)
    version = store.version
    assert not store.apply(_put(_service(200, 201)))
    assert store.version == version
    assert store.apply(_put(_service(299, 201)))
    assert store.find_port(KEY, 80) is not first
    assert store.find_port(KEY, 81) is second


def test_what_is_removed_is_gone() -> None:
    store = Store(WaypointSettings("shop", "w"))
    destination = DestinationConfig("shop", "web.shop.svc", policy=TrafficPolicy(proxy_protocol=2))
    settings = WaypointSettings("shop", "w", "all")
    store.apply(_put(_service(200), destination, settings, _policy("p"), RequestAuthentication(Origin("RequestAuthentication", "a", "b"))))
    from mesh.model.address import NamespacedHostname

    host = NamespacedHostname("shop", "web.shop.svc")
    assert store.find_destination(host) is destination
    assert store.settings is settings
    assert len(store.resources()) == 5
    # A service and a destination have one name; they go one by one.
    store.apply(_remove(destination))
    assert store.find_destination(host) is None
    assert store.find_service(KEY) is not None
    store.apply(_remove(_service(200), settings, _policy("p")))
    assert store.find_service(KEY) is None
    assert store.settings.waypoint_for == "service"
    assert not store.policies_for(KEY)


def test_policies_are_for_their_targets_or_for_all() -> None:
    store = Store(WaypointSettings("shop", "w"))
    store.apply(_put(_policy("everywhere"), _policy("web", KEY), _policy("other", "shop/other.shop.svc")))
    assert [policy.origin.name for policy in store.policies_for(KEY)] == ["everywhere", "web"]
    assert [policy.origin.name for policy in store.policies_for("")] == ["everywhere"]


def test_whoever_waits_for_a_change_is_called_once_and_sees_it() -> None:
    store = Store(WaypointSettings("shop", "w"))
    seen: list[bool] = []
    store.when_changed(lambda: seen.append(store.find_service(KEY) is not None))
    assert not store.apply(Delta())
    assert not seen
    store.apply(_put(_service(200)))
    store.apply(_put(_service(201)))
    assert seen == [True]


def test_a_port_without_a_route_of_its_own_leads_to_its_service() -> None:
    compiler = ServiceCompiler()
    runtime = finish(compiler.compile(_service(200), None))
    (share,) = runtime.ports[80].tcp.destinations
    assert share.destination == Destination("shop", "web.shop.svc", 80)
    route = TcpRoute(ORIGIN, (WeightedDestination(Destination("a", "b", 1)),))
    declared = ServiceConfig("shop", "web.shop.svc", (PortConfig(80, Protocol.TCP, tcp=route),))
    assert finish(compiler.compile(declared, None)).ports[80].tcp is route


def test_who_speaks_http() -> None:
    assert [speaks_http(protocol) for protocol in Protocol] == [True, True, True, False, None]


# Routes that are told once for all that use them


def _table(key: str, *answers: tuple[str, int]) -> RouteTable:
    """A route for each path, answered with a status."""
    routes = (
        Route(ORIGIN, DirectResponse(status), matches=(RouteMatch(path=PathMatch(PathKind.EXACT, path)),)) for path, status in answers
    )
    return RouteTable(key, tuple(routes))


def _using(*tables: str, hostname: str = "web.shop.svc", ports: tuple[int, ...] = (80,)) -> ServiceConfig:
    return ServiceConfig("shop", hostname, tuple(PortConfig(port, Protocol.HTTP, tables=(TableUse(tables),)) for port in ports))


def _answers(store: Store, *paths: str, service: str = KEY, port: int = 80) -> list[int | None]:
    """The status for each path; None: no route, or no such service."""
    found = store.find_port(service, port)
    matched = [found.routes.find(Request(b"GET", b"http", b"web", path.encode(), []), port) if found else None for path in paths]
    return [None if each is None else each.route.route.action.status for each in matched]


def test_a_table_is_compiled_once_for_all_ports_that_use_it() -> None:
    store = Store(WaypointSettings("shop", "w"))
    other = "other.shop.svc"
    store.apply(_put(_table("t", ("/a", 201)), _using("t", ports=(80, 81)), _using("t", hostname=other)))
    assert [_answers(store, "/a", "/b", service=key, port=port) for key, port in ((KEY, 80), (KEY, 81), (f"shop/{other}", 80))] == [
        [201, None],
        [201, None],
        [201, None],
    ]
    matched = [
        found.routes.find(Request(b"GET", b"http", b"web", b"/a", []))
        for found in (store.find_port(KEY, 80), store.find_port(KEY, 81), store.find_port(f"shop/{other}", 80))
        if found is not None
    ]
    assert len({id(each) for each in matched}) == 1


def test_no_request_has_a_part_of_a_change_however_long_it_takes() -> None:
    store = Store(WaypointSettings("shop", "w"))
    paths = [f"/{number}" for number in range(50)]
    store.apply(_put(_table("old", *((path, 200) for path in paths)), _using("old", ports=(80, 81)), _policy("old")))
    change = Delta(
        l7=_put(
            _table("one", *((path, 201) for path in paths[:25])),
            _table("two", *((path, 201) for path in paths[25:])),
            _using("one", "two", ports=(80, 81)),
            _policy("new"),
        ).l7,
        removed_l7=_remove(_table("old"), _policy("old")).removed_l7,
    )
    seen: list[tuple[set[int | None], list[str]]] = []
    steps = store.applying(change)
    while True:
        both = {*_answers(store, *paths), *_answers(store, *paths, port=81)}
        seen.append((both, [policy.origin.name for policy in store.policies_for(KEY)]))
        try:
            next(steps)
        except StopIteration:
            break
    assert len(seen) > 50
    assert all(each == ({200}, ["old"]) for each in seen)
    assert {*_answers(store, *paths), *_answers(store, *paths, port=81)} == {201}
    assert [policy.origin.name for policy in store.policies_for(KEY)] == ["new"]


def test_a_service_stays_as_it_was_until_all_of_its_new_routes_are_there() -> None:
    store = Store(WaypointSettings("shop", "w"))
    store.apply(_put(_table("old", ("/a", 200)), _using("old")))
    store.apply(_put(_table("one", ("/a", 201)), _using("one", "two")))
    assert _answers(store, "/a", "/b") == [200, None]
    assert store.lacking == {KEY: ("two",)}
    # The old one may go meanwhile: who is served with it has it.
    store.apply(_remove(_table("old")))
    assert _answers(store, "/a", "/b") == [200, None]
    store.apply(_put(_table("two", ("/b", 201))))
    assert _answers(store, "/a", "/b") == [201, 201]
    assert store.lacking == {}


def test_a_service_that_goes_while_it_waits_for_routes_does_not_come_back() -> None:
    store = Store(WaypointSettings("shop", "w"))
    store.apply(_put(_using("t")))
    assert (store.find_service(KEY), store.lacking) == (None, {KEY: ("t",)})
    store.apply(_remove(_using("t")))
    store.apply(_put(_table("t", ("/a", 200))))
    assert (store.find_service(KEY), store.lacking) == (None, {})


def test_routes_that_cannot_be_read_leave_the_last_good_ones_in_force() -> None:
    store = Store(WaypointSettings("shop", "w"))
    store.apply(_put(_table("good", ("/a", 200)), _using("good")))
    response = discovery.DeltaDiscoveryResponse(type_url=ROUTE_TABLE, nonce="n")
    for key, body in (("bad", b'{"key": "bad", "routes": [{}]}'), ("fine", msgspec.json.encode(_table("fine", ("/b", 201))))):
        response.resources.add(name=f"shop/w|{key}", version="1", resource={"type_url": ROUTE_TABLE, "value": body})
    decoded = decode_response(response.SerializeToString())
    assert [bad.name for bad in decoded.rejected] == ["shop/w|bad"]
    store.apply(decoded.delta)
    store.apply(_put(_using("fine", "bad")))
    assert _answers(store, "/a", "/b") == [200, None]
    assert store.lacking == {KEY: ("bad",)}


def test_while_a_change_is_compiled_others_have_their_turn() -> None:
    clock = iter(range(1_000_000))
    store, turns = Store(WaypointSettings("shop", "w")), 0

    async def main() -> bool:
        async def count() -> None:
            nonlocal turns
            while True:
                turns += 1
                await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(count)
            steps = store.applying(_put(_table("t", *((f"/{number}", 200) for number in range(50))), _using("t")))
            # Time goes by a second with every look at the clock.
            changed = await finish_in_turns(steps, lambda: float(next(clock)))
            nursery.cancel_scope.cancel()
        return changed

    assert trio.run(main)
    assert turns > 25
    assert _answers(store, "/49") == [200]

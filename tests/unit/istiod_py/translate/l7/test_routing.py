"""From one translation to the next: what did not change is the same instance, and what changed is made anew."""

from __future__ import annotations

from istiod_py.translate.l7.known import L7Port, L7Service
from istiod_py.translate.l7.routing import Routing
from mesh.model.l7.waypoint import Protocol
from tests.unit.istiod_py.translate.l7.world import REVIEWS, SERVICES, V1, WAYPOINT, World, document

ROUTE = document("HTTPRoute", "{parentRefs: [{group: '', kind: Service, name: reviews}], rules: [{backendRefs: [{name: v1, port: 80}]}]}")
OTHER = document("VirtualService", "{hosts: [v2], http: [{route: [{destination: {host: v3}}]}]}", "o")


def follow(before: World, text: str, services: tuple[L7Service, ...] = SERVICES) -> World:
    memory = before.memory.next()
    after = World(text, memory=memory, services=services)
    memory.seal()
    return after


def test_routes_that_nothing_concerned_are_the_same_instance() -> None:
    before = World(ROUTE)
    assert follow(before, ROUTE + OTHER).routed is not before.routed  # objects of a directory read anew are other objects
    same = World(ROUTE, memory=before.memory.next())
    assert same.told() == before.told()


def test_a_memo_is_hit_by_the_same_sources_whatever_else_there_is() -> None:
    before = World(ROUTE)
    sources, memory = before.routing._index.sources, before.memory.next()
    new = L7Service("shop", "new.shop.svc.cluster.local", (L7Port(80, "", Protocol.HTTP),))
    after = World("", services=(*SERVICES, new))
    assert Routing(sources, after.known, memory).route(REVIEWS, "shop") is before.routed


def test_a_destination_that_goes_changes_the_routes_to_it() -> None:
    before = World(ROUTE)
    sources, memory = before.routing._index.sources, before.memory.next()
    without = World("", services=tuple(service for service in SERVICES if service is not V1))
    after = Routing(sources, without.known, memory).tell([REVIEWS], "shop/waypoint", "shop")
    assert after != before.told()


def test_every_service_that_a_waypoint_stands_before_is_routed_for_each_namespace_of_waypoints() -> None:
    found = World(ROUTE)
    fronting = {REVIEWS.key: (WAYPOINT, ("way", "canary")), V1.key: (WAYPOINT,)}
    told = [found.routing.tell(services, f"{place}/w", place) for place, services in (("shop", [REVIEWS, V1]), ("way", [REVIEWS]))]
    assert [[config.key for config in each.configs] for each in told] == [[REVIEWS.key, V1.key], [REVIEWS.key]]
    assert found.routing.report(fronting).problems == ()

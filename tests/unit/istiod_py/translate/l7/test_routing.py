"""From one translation to the next: what did not change is the same instance, and what changed is made anew."""

from __future__ import annotations

from istiod_py.translate.l7.known import L7Port, L7Service
from istiod_py.translate.l7.routing import RouteMemo, Routing, route_all
from istiod_py.translate.memo import Memo
from mesh.model.l7.waypoint import Protocol
from tests.unit.istiod_py.translate.l7.world import REVIEWS, SERVICES, V1, WAYPOINT, World, document

ROUTE = document("HTTPRoute", "{parentRefs: [{group: '', kind: Service, name: reviews}], rules: [{backendRefs: [{name: v1, port: 80}]}]}")
OTHER = document("VirtualService", "{hosts: [v2], http: [{route: [{destination: {host: v3}}]}]}", "o")


def follow(before: World, text: str, services: tuple[L7Service, ...] = SERVICES) -> World:
    memo: RouteMemo = Memo(before.memo)
    after = World(text, memo=memo, services=services)
    memo.seal()
    return after


def test_routes_that_nothing_concerned_are_the_same_instance() -> None:
    before = World(ROUTE)
    assert follow(before, ROUTE + OTHER).routed is not before.routed  # objects of a directory read anew are other objects
    same = World(ROUTE, memo=Memo(before.memo))
    assert same.routed.config == before.routed.config


def test_a_memo_is_hit_by_the_same_sources_whatever_else_there_is() -> None:
    before = World(ROUTE)
    sources, memo = before.routing._index.sources, Memo(before.memo)
    new = L7Service("shop", "new.shop.svc.cluster.local", (L7Port(80, "", Protocol.HTTP),))
    after = World("", services=(*SERVICES, new))
    assert Routing(sources, after.known, memo).route(REVIEWS, "shop") is before.routed


def test_a_destination_that_goes_changes_the_routes_to_it() -> None:
    before = World(ROUTE)
    sources, memo = before.routing._index.sources, Memo(before.memo)
    without = World("", services=tuple(service for service in SERVICES if service is not V1))
    after = Routing(sources, without.known, memo).route(REVIEWS, "shop")
    assert after.config != before.routed.config


def test_every_service_that_a_waypoint_stands_before_is_routed_for_each_namespace_of_waypoints() -> None:
    found = World(ROUTE)
    fronting = {REVIEWS.key: (WAYPOINT, ("way", "canary")), V1.key: (WAYPOINT,)}
    configs = route_all(found.routing, SERVICES, fronting)
    assert set(configs) == {(REVIEWS.key, "shop"), (REVIEWS.key, "way"), (V1.key, "shop")}
    assert found.routing.report(fronting).problems == ()

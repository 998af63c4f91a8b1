"""Configuration as it is served: what changes, what stays, and that a request never sees half of a change."""

from __future__ import annotations

from mesh.model.l7.destination import DestinationConfig, TrafficPolicy
from mesh.model.l7.policy import AuthorizationPolicy, PolicyAction, PolicyRule, RequestAuthentication
from mesh.model.l7.routing import Destination, DirectResponse, Origin, Route, TcpRoute, WeightedDestination
from mesh.model.l7.waypoint import Assigned, L7Resource, PortConfig, Protocol, ServiceConfig, WaypointSettings
from mesh.state.store import Delta
from mesh.xds.l7 import resource_name, type_url_of
from waypoint_py.store import Store, compile_service, speaks_http

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
    runtime = compile_service(_service(200))
    (share,) = runtime.ports[80].tcp.destinations
    assert share.destination == Destination("shop", "web.shop.svc", 80)
    route = TcpRoute(ORIGIN, (WeightedDestination(Destination("a", "b", 1)),))
    declared = ServiceConfig("shop", "web.shop.svc", (PortConfig(80, Protocol.TCP, tcp=route),))
    assert compile_service(declared).ports[80].tcp is route


def test_who_speaks_http() -> None:
    assert [speaks_http(protocol) for protocol in Protocol] == [True, True, True, False, None]

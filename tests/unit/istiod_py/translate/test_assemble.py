"""What each waypoint is told: what it stands before and what that leads to, and nothing of others."""

from __future__ import annotations

import pytest

from istiod_py.snapshot import diff
from istiod_py.translate import Condition, Config, ParentStatus, Translation, translate
from istiod_py.translate.l7.assemble import L7Key
from istiod_py.translate.l7.known import L7Port, L7Service
from istiod_py.translate.l7.routes import RoutedPort, RoutedService, UnitUse
from istiod_py.translate.l7.tables import tell_routes
from istiod_py.translate.l7.units import make_unit
from istiod_py.translate.l7.virtual_services import Findings
from istiod_py.translate.memo import Memo
from mesh.kube.objects import ObjectKey
from mesh.model.l7.destination import DestinationConfig
from mesh.model.l7.routing import Destination, Forward, Mirror, Origin, Route, TcpRoute, WeightedDestination
from mesh.model.l7.waypoint import Protocol, ServiceConfig, WaypointSettings
from mesh.testing.objects import objects_from_yaml
from mesh.xds.l7 import SERVICE_CONFIG

OBJECTS = """
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio.io/use-waypoint: waypoint}}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: waypoint, namespace: shop, annotations: {ambient.istio.io/xfcc-include-client-identity: "true"}}
spec: {gatewayClassName: istio-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE}]}
status: {addresses: [{type: Hostname, value: waypoint.shop.svc.cluster.local}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: next, namespace: shop}
spec: {gatewayClassName: istio-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE}]}
status: {addresses: [{type: Hostname, value: next.shop.svc.cluster.local}]}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  clusterIP: 10.96.1.1
  ports:
  - {name: http, port: 80}
  - {name: grpc-api, port: 81}
  - {name: http2, port: 82}
  - {name: tcp, port: 83}
  - {name: https, port: 84}
  - {name: what, port: 85}
---
apiVersion: v1
kind: Service
metadata: {name: own, namespace: shop, labels: {istio.io/use-waypoint: next}}
spec: {clusterIP: 10.96.1.2, ports: [{name: http, port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: bare, namespace: shop, labels: {istio.io/use-waypoint: none}}
spec: {clusterIP: 10.96.1.3, ports: [{name: http, port: 80}]}
"""
WEB, OWN = "shop/web.shop.svc.cluster.local", "shop/own.shop.svc.cluster.local"


def translated(text: str = OBJECTS, before: Translation | None = None) -> Translation:
    objects, problems = objects_from_yaml(text)
    assert problems == ()
    return translate(objects, before, Config(trust_domain="mesh.example"))


def keys_of(translation: Translation, waypoint: str, kind: str) -> set[str]:
    return {key.key for key in translation.l7 if (key.waypoint, key.kind) == (waypoint, kind)}


def test_a_waypoint_is_told_of_the_services_it_stands_before_alone() -> None:
    found = translated()
    assert keys_of(found, "shop/waypoint", "ServiceConfig") == {WEB}
    assert keys_of(found, "shop/next", "ServiceConfig") == {OWN}
    assert keys_of(found, "shop/waypoint", "DestinationConfig") == {WEB}


def test_a_waypoint_is_told_of_its_services_before_it_is_ready() -> None:
    """Else its first clients would come before it knew them."""
    unready = translated(
        OBJECTS.replace("status: {addresses: [{type: Hostname, value: waypoint", "x: {addresses: [{type: Hostname, value: waypoint")
    )
    assert unready.services[WEB].waypoint is None
    assert keys_of(unready, "shop/waypoint", "ServiceConfig") == {WEB}


def test_both_waypoints_of_a_canary_are_told() -> None:
    canary = OBJECTS.replace(
        "{istio.io/use-waypoint: waypoint}}",
        "{istio.io/use-waypoint: waypoint, istio.io/use-waypoint-canary: next}, annotations: {istio.io/use-waypoint-canary-weight: '5'}}",
    )
    found = translated(canary)
    assert keys_of(found, "shop/waypoint", "ServiceConfig") == {WEB}
    assert keys_of(found, "shop/next", "ServiceConfig") == {WEB, OWN}


def test_the_settings_are_those_of_the_gateway() -> None:
    settings = translated().l7[L7Key("shop/waypoint", "WaypointSettings", "shop/waypoint")]
    assert isinstance(settings, WaypointSettings)
    assert (settings.key, settings.waypoint_for, settings.trust_domains) == ("shop/waypoint", "service", ("mesh.example",))
    assert settings.include_client_identity


def test_a_port_is_what_it_is_declared_to_be_and_leads_to_the_service_itself() -> None:
    config = translated().l7[L7Key("shop/waypoint", "ServiceConfig", WEB)]
    assert isinstance(config, ServiceConfig)
    assert [(port.port, port.protocol) for port in config.ports] == [
        (80, Protocol.HTTP),
        (81, Protocol.GRPC),
        (82, Protocol.HTTP2),
        (83, Protocol.TCP),
        (84, Protocol.TCP),
        (85, Protocol.AUTO),
    ]
    for port in config.ports:
        destinations = [
            each.destination for route in port.routes if isinstance(route.action, Forward) for each in route.action.destinations
        ]
        itself = Destination("shop", "web.shop.svc.cluster.local", port.port)
        assert destinations == ([] if port.protocol is Protocol.TCP else [itself])


ROUTED = """
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: split, namespace: shop}
spec:
  parentRefs: [{kind: Service, group: "", name: web, port: 80}]
  rules: [{backendRefs: [{name: bare, port: 80}]}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: get, namespace: shop}
spec: {targetRefs: [{kind: Service, group: "", name: web}], rules: [{to: [{operation: {methods: [GET]}}]}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: all, namespace: shop}
spec: {targetRefs: [{kind: Gateway, group: gateway.networking.k8s.io, name: next}], rules: [{}]}
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: versions, namespace: shop}
spec: {host: bare, subsets: [{name: v1, labels: {version: v1}}]}
---
apiVersion: v1
kind: Pod
metadata: {name: bare-1, namespace: shop, labels: {app: bare, version: v1, other: x}}
spec: {nodeName: n1, containers: [{name: a}]}
status: {phase: Running, podIP: 10.244.1.9}
"""
SELECTING = OBJECTS.replace("spec: {clusterIP: 10.96.1.3,", "spec: {clusterIP: 10.96.1.3, selector: {app: bare},")


def test_routes_rules_and_policies_reach_the_waypoint_they_are_for() -> None:
    found = translated(SELECTING + ROUTED)
    assert keys_of(found, "shop/waypoint", "AuthorizationPolicy") == {"AuthorizationPolicy/shop/get"}
    assert keys_of(found, "shop/next", "AuthorizationPolicy") == {"AuthorizationPolicy/shop/all"}
    bare = "shop/bare.shop.svc.cluster.local"
    assert keys_of(found, "shop/waypoint", "DestinationConfig") == {WEB, bare}
    destination = found.l7[L7Key("shop/waypoint", "DestinationConfig", bare)]
    assert isinstance(destination, DestinationConfig)
    assert [subset.name for subset in destination.subsets] == ["v1"]
    assert destination.labels == {"Kubernetes//Pod/shop/bare-1": {"version": "v1"}}


BOTH = """
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: both, namespace: shop}
spec: {targetRefs: [{kind: Service, group: "", name: web}, {kind: Service, group: "", name: own}], rules: [{}]}
"""


def test_a_service_that_moves_to_another_waypoint_is_never_without_its_policy() -> None:
    """The old one goes on serving it until clients' agents know, and is told of policies before."""
    moved = "name: web, namespace: shop, labels: {istio.io/use-waypoint: next}"
    together = OBJECTS.replace("name: own, namespace: shop, labels: {istio.io/use-waypoint: next}", "name: own, namespace: shop") + BOTH
    before = translated(together)
    policy = L7Key("shop/waypoint", "AuthorizationPolicy", "AuthorizationPolicy/shop/both")
    assert keys_of(before, "shop/waypoint", "ServiceConfig") == {WEB, OWN}
    after = translated(together.replace("name: web, namespace: shop", moved), before)
    assert keys_of(after, "shop/waypoint", "ServiceConfig") == {OWN}
    assert after.l7[policy] == before.l7[policy]
    assert keys_of(after, "shop/next", "AuthorizationPolicy") == {"AuthorizationPolicy/shop/both"}


def test_what_becomes_of_routes_rules_and_policies_is_said_of_each() -> None:
    statuses = translated(SELECTING + ROUTED).statuses
    assert statuses[ObjectKey("AuthorizationPolicy", "shop", "get")] == (
        Condition("WaypointAccepted", True, "Accepted", "bound to shop/waypoint"),
    )
    assert statuses[ObjectKey("DestinationRule", "shop", "versions")] == (
        Condition("WaypointAccepted", True, "Accepted", "used by shop/waypoint"),
    )
    (parent,) = statuses[ObjectKey("HTTPRoute", "shop", "split")]
    assert isinstance(parent, ParentStatus)
    assert {(each.type, each.status) for each in parent.conditions} == {
        ("Accepted", True),
        ("ResolvedRefs", True),
        ("ResolvedWaypoints", True),
    }


def test_without_waypoints_and_what_speaks_of_them_nothing_is_done() -> None:
    text = "apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: shop}\nspec: {clusterIP: 10.96.1.1, ports: [{port: 80}]}\n"
    found = translated(text)
    assert (found.l7, found.statuses) == ({}, {})
    assert len(found.memory.l7.services_known) == 0


def to(hostname: str, namespace: str = "shop") -> WeightedDestination:
    return WeightedDestination(Destination(namespace, hostname, 80))


def test_all_that_routes_lead_to_is_named_and_what_nobody_knows_is_not() -> None:
    origin = Origin("HTTPRoute", "shop", "r")
    route = Route(origin, Forward((to("a"), to("b", "other"), to("unknown", ""))), mirrors=(Mirror(Destination("shop", "c", 1)),))
    port, other = L7Port(80, "", Protocol.HTTP), L7Port(81, "", Protocol.TCP)
    unit = make_unit(frozenset(), [route], Findings())
    routed = RoutedService(
        L7Service("shop", "web", (port, other)),
        "shop",
        (RoutedPort(port, (UnitUse(unit),)), RoutedPort(other, tcp=TcpRoute(origin, (to("d"), to("a"), to("unknown", ""))))),
    )
    told = tell_routes([routed], "shop/waypoint", Memo(), Memo())
    assert set(told.destinations) == {"shop/web", "shop/a", "other/b", "shop/c", "shop/d"}


def test_what_did_not_change_is_not_sent_again() -> None:
    before = translated()
    again = diff(before, translated(before=before))
    assert (again.l7, again.removed_l7) == ((), ())


@pytest.mark.parametrize("what", ["service", "waypoint"])
def test_what_goes_is_named_as_gone(what: str) -> None:
    before = translated()
    if what == "service":
        after = translated(
            OBJECTS.replace("name: own, namespace: shop, labels: {istio.io/use-waypoint: next}", "name: own, namespace: shop"), before
        )
        assert {assigned.waypoint for assigned in diff(before, after).l7} == {"shop/waypoint"}
    else:
        after = translated(OBJECTS.replace("kind: Gateway\nmetadata: {name: next", "kind: Pod2\nmetadata: {name: next"), before)
    assert (SERVICE_CONFIG, f"shop/next|{OWN}") in diff(before, after).removed_l7

"""What every route object is told: in its status, and in the list of problems."""

from __future__ import annotations

import pytest

from istiod_py.translate import Condition
from istiod_py.translate.config import ParentStatus
from istiod_py.translate.l7.route_status import RouteReport
from istiod_py.translate.l7.routing import DEFAULT_RETRY, RouteMemory, Routing
from istiod_py.translate.l7.sources import RouteSources, Sourced
from mesh.kube.objects import SourceProblem
from mesh.kube.ownership import ROUTE_CONTROLLER
from mesh.model.l7.waypoint import Protocol
from tests.unit.istiod_py.translate.l7.world import REVIEWS, SERVICES, WAYPOINT, World, document, entry, service, sources_of, status_of

TO = "route: [{destination: {host: v1}}]"
BACKEND = "rules: [{backendRefs: [{name: v1, port: 80}]}]"
VALID = Condition("Accepted", True, "Accepted", "Route was valid")
RESOLVED = Condition("ResolvedRefs", True, "ResolvedRefs", "All references resolved")
WAYPOINTS = Condition("ResolvedWaypoints", True, "ResolvedWaypoints", "All waypoints resolved")


def vs(spec: str, **where: str) -> str:
    return document("VirtualService", f"{{{spec}}}", **where)


def condition(text: str, **options: object) -> Condition:
    (found,) = status_of(World(text, **options).report(), "VirtualService", namespace=str(options.pop("namespace", "shop")))
    assert isinstance(found, Condition)
    return found


def test_a_virtual_service_that_is_obeyed_says_for_what() -> None:
    assert condition(vs(f"hosts: [reviews], http: [{{{TO}}}]")) == Condition(
        "WaypointAccepted", True, "Accepted", f"routes {REVIEWS.hostname}"
    )  # fmt: skip


def test_what_of_it_has_no_effect_is_named_by_field() -> None:
    found = condition(vs(f"hosts: [reviews], http: [{{match: [{{sourceLabels: {{a: b}}}}, {{port: 80}}], {TO}}}]"))
    assert (found.status, found.reason) == (True, "UnsupportedValue")
    assert "http[0].match[0].sourceLabels: a waypoint does not see clients' labels: this match is left out" in found.message


@pytest.mark.parametrize(("spec", "reason", "field", "message"), [
    (f"hosts: [reviews], gateways: [gw], http: [{{{TO}}}]", "UnsupportedValue", "spec.gateways", "for gateways alone"),
    (f"hosts: [gone], http: [{{{TO}}}]", "TargetNotFound", "spec.hosts[0]", "no service has the hostname gone"),
    (f"hosts: [v1], http: [{{{TO}}}]", "AncestorNotBound", "spec.hosts[0]", "no waypoint stands before v1.shop.svc.cluster.local"),
    (f"hosts: [reviews], exportTo: [other], http: [{{{TO}}}]", "UnsupportedValue", "spec.exportTo", "not exported to shop"),
    (f"hosts: [reviews], http: [{{match: [{{sourceLabels: {{a: b}}}}], {TO}}}]", "UnsupportedValue", "spec.http", "yields no route"),
])  # fmt: skip
def test_a_virtual_service_without_effect_says_why(spec: str, reason: str, field: str, message: str) -> None:
    found = World(vs(spec))
    said = condition(vs(spec))
    assert (said.status, said.reason) == (False, reason)
    assert message in said.message
    assert any(where == field and message in text for where, text in found.problems())


def test_one_of_a_clients_namespace_is_told_whose_are_obeyed() -> None:
    text = vs(f"hosts: [{REVIEWS.hostname}], http: [{{route: [{{destination: {{host: v1.shop.svc.cluster.local}}}}]}}]", namespace="client")
    (found,) = status_of(World(text).report(), "VirtualService", namespace="client")
    assert (found.status, found.reason) == (False, "UnsupportedValue")
    assert "waypoint shop/waypoint obeys VirtualServices of its own namespace and of shop" in found.message


def test_hosts_are_told_apart() -> None:
    found = World(vs(f"hosts: [reviews, gone, v1, '*.example.com'], http: [{{{TO}}}]"))
    assert [field for field, _ in found.problems()] == ["spec.hosts[1]", "spec.hosts[2]", "spec.hosts[3]"]
    (said,) = status_of(found.report(), "VirtualService")
    assert (said.status, said.reason) == (True, "UnsupportedValue")


def test_a_host_may_mean_a_wildcard_entry() -> None:
    wide = entry("*.example.com")
    text = vs(f"hosts: [api.example.com], http: [{{{TO}}}]")
    assert condition(text, services=(*SERVICES, wide), target=wide).status
    assert condition(text, services=(*SERVICES, wide)).reason == "AncestorNotBound"


# Routes of the Gateway API


def parents(spec: str, kind: str = "HTTPRoute", **options: object) -> list[ParentStatus]:
    report = World(document(kind, f"{{{spec}}}", namespace=str(options.pop("namespace", "shop"))), **options).report()
    (found,) = report.statuses.values()
    assert all(isinstance(entry, ParentStatus) for entry in found)
    return [entry for entry in found if isinstance(entry, ParentStatus)]


def one(spec: str, kind: str = "HTTPRoute", **options: object) -> dict[str, Condition]:
    (found,) = parents(spec, kind, **options)
    return {condition.type: condition for condition in found.conditions}


SERVICE = "parentRefs: [{group: '', kind: Service, name: reviews}]"


def test_a_route_that_is_obeyed() -> None:
    (found,) = parents(f"{SERVICE}, {BACKEND}")
    assert found == ParentStatus({"group": "", "kind": "Service", "name": "reviews"}, ROUTE_CONTROLLER, (VALID, RESOLVED, WAYPOINTS))


def test_each_parent_is_told_for_itself_and_gateways_are_others_to_speak_of() -> None:
    found = parents(
        "parentRefs: [{name: gw}, {group: '', kind: Service, name: reviews, port: 80}, {group: '', kind: Service, name: reviews, port: 81},"
        f" {{group: '', kind: Service, name: gone}}], {BACKEND}"
    )
    assert [(entry.parent.get("port"), entry.parent["name"]) for entry in found] == [(80, "reviews"), (81, "reviews"), (None, "gone")]
    assert [entry.conditions[0] for entry in found] == [
        VALID,
        Condition("Accepted", False, "NoMatchingParent", "port 81 not found"),
        Condition("Accepted", False, "NoMatchingParent", 'parent service: "gone" not found'),
    ]
    assert [(entry.conditions[-1].status, entry.conditions[-1].reason) for entry in found] == [
        (True, "ResolvedWaypoints"), (True, "ResolvedWaypoints"), (False, "NoMatchingParent"),
    ]  # fmt: skip


def test_a_service_entry_that_is_not_there() -> None:
    found = one(f"parentRefs: [{{group: networking.istio.io, kind: ServiceEntry, name: gone}}], {BACKEND}")
    assert found["Accepted"].message == 'parent service entry: "gone" not found'


def test_a_service_without_a_waypoint() -> None:
    found = one(f"parentRefs: [{{group: '', kind: Service, name: v1}}], {BACKEND}")
    assert found["Accepted"] == VALID
    assert (found["ResolvedWaypoints"].status, found["ResolvedWaypoints"].reason) == (False, "MissingUseWaypointLabel")


@pytest.mark.parametrize(("backends", "reason", "message"), [
    ("[{name: gone, port: 80}]", "BackendNotFound", "backend(gone.shop.svc.cluster.local) not found"),
    ("[{name: v1, port: 81}]", "BackendNotFound", "Service shop/v1 has no port 81"),
    ("[{name: v1, port: 80, group: a.b, kind: Thing}]", "InvalidKind", "backends of kind Thing (group 'a.b') are not supported"),
    ("[{name: v1, port: 80}, {name: gone, port: 80, weight: 0}]", "BackendNotFound", "backend(gone.shop.svc.cluster.local) not found"),
])  # fmt: skip
@pytest.mark.parametrize("kind", ["HTTPRoute", "GRPCRoute", "TCPRoute", "TLSRoute"])
def test_a_backend_that_cannot_be_used(kind: str, backends: str, reason: str, message: str) -> None:
    found = one(f"{SERVICE}, rules: [{{backendRefs: {backends}}}]", kind)
    assert found["Accepted"] == VALID
    assert found["ResolvedRefs"] == Condition("ResolvedRefs", False, reason, message)


@pytest.mark.parametrize("namespace", ["client"])
def test_a_route_of_a_clients_namespace(namespace: str) -> None:
    parent = "parentRefs: [{group: '', kind: Service, name: reviews, namespace: shop}]"
    spec = f"{parent}, rules: [{{backendRefs: [{{name: v1, namespace: shop, port: 80}}]}}]"
    found = one(spec, namespace=namespace)
    assert (found["Accepted"].status, found["Accepted"].reason) == (False, "UnsupportedValue")
    assert "a waypoint serves all clients" in found["Accepted"].message


def test_a_filter_that_is_not_supported() -> None:
    found = one(f"{SERVICE}, rules: [{{filters: [{{type: ExtensionRef, extensionRef: {{group: a, kind: B, name: c}}}}]}}]")
    assert found["Accepted"] == Condition(
        "Accepted", False, "UnsupportedValue",
        "rules[0].filters[0].type: filters of type ExtensionRef are not supported: the rule's requests are answered 500",
    )  # fmt: skip


def test_sticky_sessions_are_told_and_routed_without() -> None:
    found = one(f"{SERVICE}, rules: [{{sessionPersistence: {{}}, backendRefs: [{{name: v1, port: 80}}]}}]")
    assert found["Accepted"] == VALID
    assert (found["PartiallyInvalid"].status, found["PartiallyInvalid"].reason) == (True, "UnsupportedValue")


@pytest.mark.parametrize(("kind", "port", "more", "reason"), [
    ("HTTPRoute", (80, Protocol.TCP), "", "NoMatchingParent"),
    ("GRPCRoute", (80, Protocol.TCP), "", "NoMatchingParent"),
    ("TCPRoute", (80, Protocol.HTTP), "", "NoMatchingParent"),
    ("TCPRoute", (80, Protocol.AUTO), "", "Accepted"),
    ("TLSRoute", (80, Protocol.TCP), "hostnames: [a.b], ", "NoMatchingListenerHostname"),
    ("TLSRoute", (80, Protocol.TCP), f"hostnames: [{REVIEWS.hostname}], ", "Accepted"),
])  # fmt: skip
def test_a_route_and_what_its_port_takes(kind: str, port: tuple[int, Protocol], more: str, reason: str) -> None:
    target = service("reviews", port)
    found = one(f"{SERVICE}, {more}{BACKEND}", kind, services=(target, *SERVICES[1:]), target=target)
    assert found["Accepted"].reason == reason


# Mistakes


def test_what_was_never_good_says_so_and_does_nothing() -> None:
    found = World(
        vs(f"hosts: [reviews], http: [{{timeout: soon, {TO}}}]")
        + document("HTTPRoute", f"{{{SERVICE}, rules: [{{timeouts: {{request: soon}}}}]}}")
    )
    assert found.find("/") == "reviews"
    report = found.report()
    (said,) = status_of(report, "VirtualService")
    assert (said.status, said.reason) == (False, "Invalid")
    assert "objects.yaml:5: spec.http[0].timeout: expected a duration" in said.message
    (parent,) = status_of(report, "HTTPRoute")
    assert (parent.conditions[0].status, parent.conditions[0].reason) == (False, "UnsupportedValue")
    assert "spec.rules[0].timeouts.request" in parent.conditions[0].message


def test_a_last_good_version_stays_in_force_and_the_mistake_is_named() -> None:
    good = sources_of(vs(f"hosts: [reviews], http: [{{{TO}}}]") + document("HTTPRoute", f"{{{SERVICE}, {BACKEND}}}"))
    mistake = SourceProblem("a.yaml", 7, "spec.http[0].timeout", "expected a duration")
    stale = RouteSources(
        tuple(Sourced(each.obj, each.value, mistake) for each in good.virtual_services),
        tuple(Sourced(each.obj, each.value, mistake) for each in good.requests),
    )
    world = World("")
    routing = Routing(stale, world.known, RouteMemory(), default_retry=DEFAULT_RETRY)
    assert routing.route(REVIEWS, "shop").used
    report: RouteReport = routing.report({REVIEWS.key: (WAYPOINT,)})
    (said,) = status_of(report, "VirtualService")
    assert said == Condition("WaypointAccepted", False, "Invalid", f"the last good version stays in force: {mistake}")
    (parent,) = status_of(report, "HTTPRoute")
    assert parent.conditions[0] == Condition("Accepted", False, "UnsupportedValue", f"the last good version stays in force: {mistake}")


def test_a_message_is_bounded() -> None:
    matches = ", ".join("{sourceLabels: {a: b}}" for _ in range(100))
    found = condition(vs(f"hosts: [reviews], http: [{{match: [{matches}], {TO}}}, {{{TO}}}]"))
    assert len(found.message) == 4096

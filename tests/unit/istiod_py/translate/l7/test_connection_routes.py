"""TCP and TLS routes at a waypoint: TLS first, then the oldest; no look at SNI, clients or subnets."""

from __future__ import annotations

import pytest

from mesh.model.l7.routing import Destination, Origin, TcpRoute, WeightedDestination
from mesh.model.l7.waypoint import Protocol
from tests.unit.istiod_py.translate.l7.world import REVIEWS, SERVICES, World, document, service

PARENT = "parentRefs: [{group: '', kind: Service, name: reviews}]"
HOST = REVIEWS.hostname
DB = service("db", (9000, Protocol.TCP))
DB2 = service("db2", (9000, Protocol.TCP))
EVERYBODY = (*SERVICES, DB, DB2)


def world(*texts: str) -> World:
    return World("".join(texts), services=EVERYBODY)


def route(backends: str, name: str = "r", kind: str = "TCPRoute", parent: str = PARENT, created: str = "", hostnames: str = "") -> str:
    named = f", hostnames: [{hostnames}]" if hostnames else ""
    return document(kind, f"{{{parent}{named}, rules: [{{backendRefs: [{backends}]}}]}}", name, created=created)


def vs(body: str, name: str = "v", created: str = "") -> str:
    return document("VirtualService", f"{{hosts: [{HOST}, a.b], {body}}}", name, created=created)


def first(found: TcpRoute | None) -> str:
    """The first destination, if it can be used."""
    if found is None or not found.destinations or found.destinations[0].fails_with is not None:
        return str(found)
    return found.destinations[0].destination.hostname.partition(".")[0]


def shares(found: TcpRoute | None) -> list[tuple[str, int, int | None]]:
    assert found is not None
    return [(each.destination.hostname.partition(".")[0], each.weight, each.fails_with) for each in found.destinations]


TO_DB = "{name: db, port: 9000}"


def test_a_route_is_for_ports_that_are_not_known_to_take_http() -> None:
    found = world(route(TO_DB))
    expected = TcpRoute(Origin("TCPRoute", "shop", "r", 0), (WeightedDestination(Destination("shop", DB.hostname, 9000)),))
    assert (found.tcp(9000), found.tcp(8080), found.tcp(80)) == (expected, expected, None)


def test_a_parents_port_is_the_only_one() -> None:
    found = world(route(TO_DB, parent=PARENT.replace("name: reviews", "name: reviews, port: 9000")))
    assert (first(found.tcp(9000)), found.tcp(8080)) == ("db", None)


@pytest.mark.parametrize(("backends", "expected"), [
    ("{name: db, port: 9000, weight: 70}, {name: db2, port: 9000, weight: 30}", [("db", 70, None), ("db2", 30, None)]),
    ("{name: db, port: 9000, weight: 0}, {name: db2, port: 9000, weight: 30}", [("db2", 1, None)]),
    ("{name: db, port: 9000}, {name: gone, port: 1}", [("db", 1, None), ("gone", 1, 500)]),
    ("{name: db, port: 9000, weight: 0}", []),
])  # fmt: skip
def test_connections_are_shared_out_and_the_share_of_nothing_is_reset(backends: str, expected: list[tuple[str, int, int | None]]) -> None:
    assert shares(world(route(backends)).tcp()) == expected


def test_the_oldest_route_has_the_port_and_the_others_are_told() -> None:
    old, new = route(TO_DB, "z", created="2025-01-01T00:00:00Z"), route("{name: db2, port: 9000}", "a", created="2026-01-01T00:00:00Z")
    found = world(new, old)
    assert first(found.tcp()) == "db"
    assert ("spec.rules", "has no effect on port 9000: TCPRoute shop/z rule 0 goes first") in found.problems()


@pytest.mark.parametrize(("hostnames", "applies"), [
    ("", True), (HOST, True), (f"a.b, {HOST}", True), ("a.b", False), ("'*.shop.svc.cluster.local'", False),
])  # fmt: skip
def test_a_tls_route_names_the_services_own_hostname(hostnames: str, applies: bool) -> None:
    found = world(route(TO_DB, kind="TLSRoute", hostnames=hostnames)).tcp()
    assert (first(found) == "db") is applies


def test_a_tls_route_goes_before_an_older_tcp_route() -> None:
    tcp = route("{name: db2, port: 9000}", "t", created="2024-01-01T00:00:00Z")
    tls = route(TO_DB, "s", "TLSRoute", created="2026-01-01T00:00:00Z", hostnames=HOST)
    assert first(world(tcp, tls).tcp()) == "db"


@pytest.mark.parametrize(("match", "applies", "field"), [
    ("", True, ""),
    ("match: [{port: 9000}], ", True, ""),
    ("match: [{port: 9001}], ", False, ""),
    ("match: [{destinationSubnets: [10.0.0.0/8]}], ", True, ""),
    ("match: [{gateways: [mesh]}], ", True, ""),
    ("match: [{gateways: [gw]}], ", False, "gateways"),
    ("match: [{sourceLabels: {a: b}}], ", False, "sourceLabels"),
    ("match: [{sourceNamespace: shop}], ", False, "sourceNamespace"),
    ("match: [{sourceLabels: {a: b}}, {port: 9000}], ", True, "sourceLabels"),
])  # fmt: skip
def test_a_virtual_services_tcp_route_is_matched_by_port_alone(match: str, applies: bool, field: str) -> None:
    found = world(vs(f"tcp: [{{{match}route: [{{destination: {{host: db}}}}]}}]"))
    assert (first(found.tcp()) == "db") is applies
    assert [problem.rpartition(".")[2] for problem, _ in found.problems() if "match" in problem] == ([field] if field else [])


@pytest.mark.parametrize(("sni", "applies"), [(f"[{HOST}]", True), ("[a.b]", False), (f"[{HOST}, a.b]", False)])
def test_a_virtual_services_tls_route_names_the_services_hostname_and_no_other(sni: str, applies: bool) -> None:
    found = world(vs(f"tls: [{{match: [{{sniHosts: {sni}}}], route: [{{destination: {{host: db}}}}]}}]"))
    assert (first(found.tcp()) == "db") is applies
    assert any(field == "spec.tls[0].match[0].sniHosts" for field, _ in found.problems()) is not applies


def test_a_virtual_service_yields_its_first_rule_that_fits_with_all_its_destinations() -> None:
    found = world(
        vs(
            "tcp: [{match: [{port: 1}], route: [{destination: {host: db2}}]}, {route: [{destination: {host: db, subset: s}, weight: 3},"
            " {destination: {host: gone}, weight: 1}, {destination: {host: db2}, weight: 0}]}, {route: [{destination: {host: db2}}]}]"
        )
    )
    assert shares(found.tcp()) == [("db", 3, None), ("gone", 1, 503)]
    assert found.tcp().destinations[0].destination == Destination("shop", DB.hostname, 9000, "s")
    assert found.tcp().origin == Origin("VirtualService", "shop", "v", 1)
    message = "no service has the hostname gone.shop.svc.cluster.local: its connections are reset"
    assert ("spec.tcp[1].route[1].destination", message) in found.problems()


def test_virtual_services_and_routes_follow_each_other_by_age() -> None:
    old = vs("tcp: [{route: [{destination: {host: db2}}]}]", created="2025-01-01T00:00:00Z")
    assert first(world(old, route(TO_DB, created="2026-01-01T00:00:00Z")).tcp()) == "db2"
    assert first(world(old, route(TO_DB, created="2024-01-01T00:00:00Z")).tcp()) == "db"


def test_a_port_whose_protocol_is_found_out_has_both_kinds_of_route() -> None:
    found = world(vs("http: [{route: [{destination: {host: v1}}]}], tcp: [{route: [{destination: {host: db}, weight: 1}]}]"))
    assert (found.find("/", number=8080), first(found.tcp(8080))) == ("v1", "db")


@pytest.mark.parametrize(("ports", "body", "field", "message"), [
    ((80, Protocol.HTTP), "tcp: [{route: [{destination: {host: db}}]}]", "spec.tcp", f"no port of {HOST} takes anything but HTTP"),
    ((80, Protocol.TCP), "http: [{route: [{destination: {host: v1}}]}]", "spec.http", f"no port of {HOST} takes HTTP"),
])  # fmt: skip
def test_a_route_for_what_no_port_takes_is_told(ports: tuple[int, Protocol], body: str, field: str, message: str) -> None:
    target = service("reviews", ports)
    found = World(vs(body), services=(target, DB, *SERVICES[1:]), target=target)
    assert (field, message) in found.problems()

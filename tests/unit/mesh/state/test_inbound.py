"""What a CONNECT may ask of a workload."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from mesh.model.address import GatewayAddress, NamespacedHostname, NetworkAddress, SocketAddress, parse_ip
from mesh.model.service import Service, ServicePort, Visibility, WeightedWaypoint
from mesh.model.workload import ApplicationTunnel, PortMapping, TunnelApplicationProtocol, Workload
from mesh.state.inbound import InboundRefusal, InboundTarget, resolve_inbound
from mesh.state.store import Delta, MeshState

HOST = NamespacedHostname("default", "server.default.svc.cluster.local")
PROXY, PLAIN = TunnelApplicationProtocol.PROXY, TunnelApplicationProtocol.NONE


def workload(name: str, *ips: str, **fields: object) -> Workload:
    base = Workload(f"Kubernetes//Pod/default/{name}", name, "default", tuple(parse_ip(ip) for ip in ips))
    return replace(base, **fields)


def service(name: str = "server", vip: str = "10.96.0.1", **fields: object) -> Service:
    base = Service(
        name,
        "default",
        f"{name}.default.svc.cluster.local",
        (NetworkAddress("", parse_ip(vip)),),
        ports=(ServicePort(80, 8080), ServicePort(81, 0), ServicePort(82, 15008)),
    )
    return replace(base, **fields)


SERVER = workload("server", "10.0.0.2", "fd00::2", services={HOST: (PortMapping(443, 8443),)})


def ask(authority: str, *things: Workload | Service, local: Workload = SERVER, ip: str = "10.0.0.2") -> InboundTarget | InboundRefusal:
    state = MeshState()
    state.apply(
        Delta(
            (local, *(thing for thing in things if isinstance(thing, Workload))),
            tuple(thing for thing in things if isinstance(thing, Service)),
        )
    )
    return resolve_inbound(state, local, authority, parse_ip(ip))


def target(authority: str, *things: Workload | Service, local: Workload = SERVER, ip: str = "10.0.0.2") -> InboundTarget:
    found = ask(authority, *things, local=local, ip=ip)
    assert isinstance(found, InboundTarget), found
    return found


def refused(authority: str, *things: Workload | Service, local: Workload = SERVER, ip: str = "10.0.0.2") -> tuple[int, str]:
    found = ask(authority, *things, local=local, ip=ip)
    assert isinstance(found, InboundRefusal), found
    return found.status, found.because


@pytest.mark.parametrize(
    "authority", ["", "10.0.0.2", "10.0.0.2:0", "10.0.0.2:65536", "10.0.0.999:80", "fd00::2:80", "user@host:80", "a b:80", ":80"]
)
def test_an_authority_that_is_none_is_a_bad_request(authority: str) -> None:
    status, because = refused(authority)
    assert status == 400
    assert because.startswith("no valid authority pseudo header: ")


def test_our_own_address_is_taken() -> None:
    found = target("10.0.0.2:8080")
    assert (found.address, found.service, found.application_tunnel, found.proxied) == (
        SocketAddress.parse("10.0.0.2:8080"),
        None,
        None,
        None,
    )
    assert target("[fd00::2]:8080", ip="fd00::2").address == SocketAddress.parse("[fd00::2]:8080")


def test_a_mapped_spelling_of_our_own_address_is_our_own_address() -> None:
    assert target("[::ffff:10.0.0.2]:8080").address == SocketAddress.parse("10.0.0.2:8080")


@pytest.mark.parametrize(
    ("authority", "other"), [("10.0.0.3:8080", "10.0.0.3"), ("[fd00::2]:8080", "fd00::2"), ("10.96.0.1:80", "10.96.0.1")]
)
def test_another_address_is_a_mismatch(authority: str, other: str) -> None:
    assert refused(authority, workload("other", "10.0.0.3"), service()) == (400, f"ip mismatch: 10.0.0.2 != {other}")


WAYPOINT_HOST = NamespacedHostname("default", "waypoint.default.svc.cluster.local")
WAYPOINT = workload("waypoint", "10.0.0.9", services={WAYPOINT_HOST: ()})


@pytest.mark.parametrize(
    "named", [NetworkAddress("", parse_ip("10.0.0.9")), NetworkAddress("", parse_ip("10.96.0.9")), WAYPOINT_HOST], ids=str
)
def test_a_waypoint_takes_requests_for_what_names_it(named: NetworkAddress | NamespacedHostname) -> None:
    gateway = GatewayAddress(named)
    fronted = workload("fronted", "10.0.0.3", waypoint=gateway)
    others = (
        fronted,
        workload("free", "10.0.0.4"),
        service("waypoint", "10.96.0.9"),
        service("single", "10.96.0.1", waypoint=gateway),
        service("weighted", "10.96.0.2", weighted_waypoints=(WeightedWaypoint(gateway, 1),)),
        service("none", "10.96.0.3"),
    )

    def status(authority: str) -> int | SocketAddress:
        found = ask(authority, *others, local=WAYPOINT, ip="10.0.0.9")
        return found.status if isinstance(found, InboundRefusal) else found.address

    own = SocketAddress.parse("10.0.0.9:80")
    assert [status(f"{ip}:80") for ip in ("10.0.0.3", "10.96.0.1", "10.96.0.2")] == [own] * 3
    assert [status(f"{ip}:80") for ip in ("10.0.0.4", "10.96.0.3", "192.0.2.1")] == [400] * 3


def test_naming_another_waypoint_is_a_mismatch() -> None:
    fronted = workload("fronted", "10.0.0.3", waypoint=GatewayAddress(NetworkAddress("", parse_ip("10.0.0.8"))))
    assert refused("10.0.0.3:80", fronted, local=WAYPOINT, ip="10.0.0.9") == (400, "ip mismatch: 10.0.0.9 != 10.0.0.3")


@pytest.mark.parametrize(("port", "expected"), [(80, 8080), (443, None)])
def test_a_hostname_leads_to_our_own_address_on_the_services_target(port: int, expected: int | None) -> None:
    found = ask(f"{HOST.hostname}:{port}", service())
    if expected is None:
        assert found == InboundRefusal(503, f"requested service {HOST.hostname}:443 found, but cannot resolve port")
    else:
        assert isinstance(found, InboundTarget)
        assert found.address == SocketAddress.parse(f"10.0.0.2:{expected}")
        assert found.service == service()


def test_a_named_port_is_resolved_by_our_own_map() -> None:
    named = replace(SERVER, services={HOST: (PortMapping(81, 7070),)})
    assert target(f"{HOST.hostname}:81", service(), local=named).address.port == 7070
    assert refused(f"{HOST.hostname}:81", service()) == (503, f"requested service {HOST.hostname}:81 found, but cannot resolve port")


def test_an_unknown_hostname_is_unavailable() -> None:
    assert refused("nowhere.example:80", service()) == (503, "no service or workload for hostname: nowhere.example")


def test_a_service_that_we_are_no_endpoint_of_opens_no_port() -> None:
    foreign = service("foreign", "10.96.0.7")
    assert refused("foreign.default.svc.cluster.local:80", foreign, service()) == (
        503,
        "no service or workload for hostname: foreign.default.svc.cluster.local (this workload is no endpoint of it)",
    )


def test_of_services_of_one_name_ours_is_meant() -> None:
    other_key = NamespacedHostname("other", HOST.hostname)
    in_default, in_other = service(), replace(service(), namespace="other", canonical=True, ports=(ServicePort(80, 9999),))
    assert target(f"{HOST.hostname}:80", in_default, in_other).address.port == 8080
    of_other = replace(SERVER, services={other_key: ()})
    assert target(f"{HOST.hostname}:80", in_default, in_other, local=of_other).address.port == 9999


def test_a_service_hidden_from_our_namespace_is_unknown() -> None:
    hidden = replace(service(), namespace="other", visibility=Visibility.NAMESPACE)
    assert refused(f"{HOST.hostname}:80", hidden) == (503, f"no service or workload for hostname: {HOST.hostname}")


def test_a_waypoint_takes_requests_for_the_hostname_of_a_service_that_names_it() -> None:
    fronted = service("fronted", "10.96.0.1", waypoint=GatewayAddress(WAYPOINT_HOST))
    things = (fronted, service("waypoint", "10.96.0.9"))
    assert target("fronted.default.svc.cluster.local:80", *things, local=WAYPOINT, ip="10.0.0.9").address == SocketAddress.parse(
        "10.0.0.9:8080"
    )


@pytest.mark.parametrize("port", [15001, 15006, 15008])
def test_our_own_ports_are_never_dialled(port: int) -> None:
    assert refused(f"10.0.0.2:{port}") == (503, "attempted recursive call to ourselves")


def test_our_own_ports_are_never_dialled_by_another_name_either() -> None:
    assert refused(f"{HOST.hostname}:82", service()) == (503, "attempted recursive call to ourselves")
    tunnelled = replace(SERVER, application_tunnel=ApplicationTunnel(PLAIN, 15008))
    assert refused("10.0.0.2:80", local=tunnelled) == (503, "attempted recursive call to ourselves")


def test_an_application_tunnel_overrides_the_port_and_takes_any_address() -> None:
    tunnel = ApplicationTunnel(PLAIN, 15088)
    found = target("192.0.2.1:80", local=replace(SERVER, application_tunnel=tunnel))
    assert (found.address, found.application_tunnel, found.proxied) == (SocketAddress.parse("10.0.0.2:15088"), tunnel, None)


def test_an_application_tunnel_without_a_port_leaves_the_port_asked_for() -> None:
    assert target("192.0.2.1:80", local=replace(SERVER, application_tunnel=ApplicationTunnel(PLAIN, None))).address.port == 80


def test_the_proxy_protocol_names_the_address_asked_for() -> None:
    local = replace(SERVER, application_tunnel=ApplicationTunnel(PROXY, 15088))
    assert target("192.0.2.1:80", local=local).proxied == SocketAddress.parse("192.0.2.1:80")
    by_name = target(f"{HOST.hostname}:80", service(), local=local)
    assert (by_name.address.port, by_name.proxied) == (15088, SocketAddress.parse("10.96.0.1:80"))


def test_the_proxy_protocol_names_an_address_of_our_network_and_ipv4_if_it_can() -> None:
    addresses = tuple(NetworkAddress(network, parse_ip(ip)) for network, ip in (("far", "10.1.1.1"), ("", "fd96::1"), ("", "10.96.0.1")))
    local = replace(SERVER, application_tunnel=ApplicationTunnel(PROXY, 15088))
    assert target(f"{HOST.hostname}:80", service(addresses=addresses), local=local).proxied == SocketAddress.parse("10.96.0.1:80")


def test_the_proxy_protocol_needs_an_address_to_name() -> None:
    local = replace(SERVER, application_tunnel=ApplicationTunnel(PROXY, 15088))
    assert refused(f"{HOST.hostname}:80", service(addresses=()), local=local) == (
        503,
        f"requested service {HOST.hostname}:80 found, but has no IP addresses",
    )


def test_a_gateway_with_a_port_of_its_own_takes_any_port_of_a_service() -> None:
    local = replace(WAYPOINT, application_tunnel=ApplicationTunnel(PLAIN, 15088))
    assert target(f"{HOST.hostname}:9999", service(), local=local, ip="10.0.0.9").address == SocketAddress.parse("10.0.0.9:15088")

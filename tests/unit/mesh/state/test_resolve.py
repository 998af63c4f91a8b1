"""The table of outbound decisions, row by row."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from msgspec.structs import replace

from mesh.model.address import GatewayAddress, NamespacedHostname, NetworkAddress, SocketAddress, parse_ip
from mesh.model.identity import SpiffeId
from mesh.model.route import Direct, Refusal, Route, Tunnel
from mesh.model.service import (
    IpFamilies,
    LoadBalancing,
    LoadBalancingMode,
    LoadBalancingScope,
    Service,
    ServicePort,
    Visibility,
    WeightedWaypoint,
)
from mesh.model.workload import (
    ApplicationTunnel,
    HealthStatus,
    NetworkMode,
    PortMapping,
    TunnelApplicationProtocol,
    TunnelProtocol,
    Workload,
)
from mesh.state.resolve import resolve
from mesh.state.store import Delta, MeshState

HOST = NamespacedHostname("default", "server.default.svc.cluster.local")


def workload(name: str, *ips: str, **fields: object) -> Workload:
    base = Workload(
        f"Kubernetes//Pod/default/{name}",
        name,
        "default",
        tuple(parse_ip(ip) for ip in ips),
        tunnel_protocol=TunnelProtocol.HBONE,
        service_account=name,
    )
    return replace(base, **fields)


def service(name: str, *vips: str, ports: tuple[ServicePort, ...] = (ServicePort(80, 8080),), **fields: object) -> Service:
    base = Service(
        name, "default", f"{name}.default.svc.cluster.local", tuple(NetworkAddress("", parse_ip(vip)) for vip in vips), ports=ports
    )
    return replace(base, **fields)


def member(*names: str, ports: tuple[PortMapping, ...] = ()) -> dict[NamespacedHostname, tuple[PortMapping, ...]]:
    return {NamespacedHostname("default", f"{name}.default.svc.cluster.local"): ports for name in names}


def gateway(destination: str, port: int = 15008) -> GatewayAddress:
    if "/" in destination:
        return GatewayAddress(NamespacedHostname.parse(destination), port)
    return GatewayAddress(NetworkAddress("", parse_ip(destination)), port)


def addr(text: str) -> SocketAddress:
    return SocketAddress.parse(text)


def identity(name: str) -> SpiffeId:
    return SpiffeId("cluster.local", "default", name)


CLIENT = workload("client", "10.0.0.1")


def route(target: str, *things: Workload | Service, source: Workload = CLIENT, seed: int = 1) -> Route:
    state = MeshState()
    state.apply(
        Delta(
            (source, *(thing for thing in things if isinstance(thing, Workload))),
            tuple(thing for thing in things if isinstance(thing, Service)),
        )
    )
    return resolve(state, source, addr(target), random.Random(seed))


def tunnel(target: str, *things: Workload | Service, source: Workload = CLIENT) -> Tunnel:
    decided = route(target, *things, source=source)
    assert isinstance(decided, Tunnel), decided
    return decided


def refusal(target: str, *things: Workload | Service, source: Workload = CLIENT) -> str:
    decided = route(target, *things, source=source)
    assert isinstance(decided, Refusal), decided
    return decided.because


# O0, O5: nothing of ours


@pytest.mark.parametrize("port", [15001, 15006, 15008])
def test_our_own_ports_on_loopback_are_refused(port: int) -> None:
    assert refusal(f"127.0.0.1:{port}") == "attempted recursive call to ourselves"
    assert refusal(f"[::1]:{port}") == "attempted recursive call to ourselves"


@pytest.mark.parametrize("target", ["192.0.2.1:443", "[2001:db8::1]:443", "127.0.0.1:8080", "192.0.2.1:15008"])
def test_an_unknown_address_is_passed_through(target: str) -> None:
    decided = route(target)
    assert isinstance(decided, Direct)
    assert (decided.next_hop, decided.workload, decided.service) == (addr(target), None, None)
    assert decided.because.endswith("is unknown to the mesh: passed through as plain TCP")


def test_an_address_of_another_network_is_unknown() -> None:
    assert isinstance(route("10.0.0.2:80", workload("server", "10.0.0.2", network="far")), Direct)


def test_an_address_on_a_hosts_network_is_passed_through_but_its_service_is_known() -> None:
    host = workload(
        "host", "10.0.0.2", network_mode=NetworkMode.HOST_NETWORK, tunnel_protocol=TunnelProtocol.NONE, services=member("server")
    )
    server = service("server", "10.96.0.1")
    direct = route("10.0.0.2:80", host, server)
    assert isinstance(direct, Direct)
    assert direct.workload is None
    by_service = route("10.96.0.1:80", host, server)
    assert isinstance(by_service, Direct)
    assert (by_service.next_hop, by_service.workload, by_service.service) == (addr("10.0.0.2:8080"), host, server)


# O8, O9: workloads


def test_a_workload_in_the_mesh_is_reached_by_hbone() -> None:
    server = workload("server", "10.0.0.2")
    decided = tunnel("10.0.0.2:8080", server)
    assert decided == Tunnel(
        addr("10.0.0.2:15008"),
        "10.0.0.2:8080",
        frozenset({identity("server")}),
        server,
        None,
        "10.0.0.2 is workload default/server; HBONE, as the workload is in the mesh",
    )


def test_a_workload_outside_the_mesh_is_reached_by_plain_tcp() -> None:
    server = workload("server", "10.0.0.2", tunnel_protocol=TunnelProtocol.NONE)
    assert route("10.0.0.2:8080", server) == Direct(
        addr("10.0.0.2:8080"), server, None, "10.0.0.2 is workload default/server; plain TCP, as the workload is not in the mesh"
    )


def test_an_ipv6_workload_has_a_bracketed_authority() -> None:
    decided = tunnel("[fd00::2]:8080", workload("server", "fd00::2"))
    assert (str(decided.next_hop), decided.authority) == ("[fd00::2]:15008", "[fd00::2]:8080")


@pytest.mark.parametrize(("target", "ip"), [("10.0.0.2:80", "10.0.0.2"), ("[fd00::2]:80", "fd00::2")])
def test_a_dual_stack_workload_is_reached_at_the_address_that_was_dialled(target: str, ip: str) -> None:
    assert str(tunnel(target, workload("server", "10.0.0.2", "fd00::2")).next_hop.ip) == ip


# O4, O8: services


def test_a_service_leads_to_an_endpoint_and_its_port() -> None:
    endpoint = workload("pod", "10.0.0.2", services=member("server"))
    server = service(
        "server", "10.96.0.1", subject_alt_names=("spiffe://cluster.local/ns/default/sa/extra", "not-a-spiffe-id", "spiffe://x")
    )
    assert tunnel("10.96.0.1:80", endpoint, server) == Tunnel(
        addr("10.0.0.2:15008"),
        "10.0.0.2:8080",
        frozenset({identity("pod"), identity("extra")}),
        endpoint,
        server,
        "service default/server.default.svc.cluster.local, endpoint default/pod, one of 1; HBONE, as the workload is in the mesh",
    )


def test_a_service_leads_to_plain_tcp_when_its_endpoint_is_outside_the_mesh() -> None:
    endpoint = workload("pod", "10.0.0.2", tunnel_protocol=TunnelProtocol.NONE, services=member("server", ports=(PortMapping(80, 9090),)))
    decided = route("10.96.0.1:80", endpoint, service("server", "10.96.0.1"))
    assert isinstance(decided, Direct)
    assert decided.next_hop == addr("10.0.0.2:9090")
    assert decided.service is not None


def test_a_named_port_leads_only_to_the_pods_that_have_it() -> None:
    has = workload("has", "10.0.0.2", services=member("server", ports=(PortMapping(80, 7070),)))
    lacks = workload("lacks", "10.0.0.3", services=member("server"))
    named = service("server", "10.96.0.1", ports=(ServicePort(80, 0),))
    assert {tunnel("10.96.0.1:80", has, lacks, named).authority for _ in range(3)} == {"10.0.0.2:7070"}


@pytest.mark.parametrize(
    ("endpoints", "port", "why"),
    [
        ((), 80, "it has no endpoints"),
        (
            (workload("sick", "10.0.0.2", status=HealthStatus.UNHEALTHY, services=member("server")),),
            80,
            "none of its 1 endpoints is healthy",
        ),
        ((workload("well", "10.0.0.2", services=member("server")),), 81, "it has no port 81"),
    ],
)
def test_a_service_that_nobody_serves_is_refused(endpoints: tuple[Workload, ...], port: int, why: str) -> None:
    because = refusal(f"10.96.0.1:{port}", service("server", "10.96.0.1"), *endpoints)
    assert because == f"no healthy upstream: 10.96.0.1:{port} (service default/server.default.svc.cluster.local: {why})"


def test_connections_are_spread_by_capacity() -> None:
    state = MeshState()
    light, heavy = (
        workload(name, ip, capacity=capacity, services=member("server"))
        for name, ip, capacity in (("l", "10.0.0.2", 1), ("h", "10.0.0.3", 3))
    )
    state.apply(Delta((CLIENT, light, heavy), (service("server", "10.96.0.1"),)))
    rng = random.Random(3)
    counted: Counter[str] = Counter()
    for _ in range(1000):
        decided = resolve(state, CLIENT, addr("10.96.0.1:80"), rng)
        assert isinstance(decided, Tunnel)
        counted[decided.workload.name] += 1
    assert 200 < counted["l"] < 300


def test_an_address_of_service_and_workload_leads_to_the_services_endpoint_and_past_the_services_waypoint() -> None:
    both = workload("both", "10.0.0.2", services=member("server"))
    waypoint = workload("waypoint", "10.0.0.9")
    server = service("server", "10.0.0.2", waypoint=gateway("10.0.0.9"))
    decided = tunnel("10.0.0.2:80", both, waypoint, server)
    assert (decided.authority, decided.service) == ("10.0.0.2:8080", server)


def test_a_passthrough_service_leads_to_the_address_as_dialled() -> None:
    endpoint = workload("pod", "10.0.0.2", services=member("server"))
    server = service("server", "10.96.0.1", load_balancing=LoadBalancing(mode=LoadBalancingMode.PASSTHROUGH))
    decided = route("10.96.0.1:9999", endpoint, server)
    assert isinstance(decided, Direct)
    assert (decided.next_hop, decided.workload, decided.service) == (addr("10.96.0.1:9999"), None, server)


def test_a_passthrough_service_with_a_waypoint_leads_to_the_waypoint() -> None:
    server = service("server", "10.96.0.1", waypoint=gateway("10.0.0.9"), load_balancing=LoadBalancing(mode=LoadBalancingMode.PASSTHROUGH))
    assert tunnel("10.96.0.1:80", workload("waypoint", "10.0.0.9"), server).workload.name == "waypoint"


def test_a_service_that_the_client_may_not_see_is_unknown_to_it() -> None:
    server = replace(service("server", "10.96.0.1", visibility=Visibility.NAMESPACE), namespace="elsewhere")
    decided = route("10.96.0.1:80", server)
    assert isinstance(decided, Direct)
    assert decided.service is None


# O11: which address


@pytest.mark.parametrize(
    ("families", "target", "ip"),
    [
        (IpFamilies.AUTOMATIC, "10.96.0.1:80", "10.0.0.2"),
        (IpFamilies.AUTOMATIC, "[fd96::1]:80", "fd00::2"),
        (IpFamilies.DUAL, "10.96.0.1:80", "10.0.0.2"),
        (IpFamilies.DUAL, "[fd96::1]:80", "fd00::2"),
        (IpFamilies.IPV4_ONLY, "10.96.0.1:80", "10.0.0.2"),
        (IpFamilies.IPV4_ONLY, "[fd96::1]:80", "10.0.0.2"),
        (IpFamilies.IPV6_ONLY, "10.96.0.1:80", "fd00::2"),
        (IpFamilies.IPV6_ONLY, "[fd96::1]:80", "fd00::2"),
    ],
)
def test_the_services_families_decide_then_the_callers(families: IpFamilies, target: str, ip: str) -> None:
    endpoint = workload("pod", "10.0.0.2", "fd00::2", services=member("server"))
    server = service("server", "10.96.0.1", "fd96::1", ip_families=families)
    assert str(tunnel(target, endpoint, server).next_hop.ip) == ip


def test_an_endpoint_of_one_family_serves_callers_of_the_other() -> None:
    endpoint = workload("pod", "10.0.0.2", services=member("server"))
    assert str(tunnel("[fd96::1]:80", endpoint, service("server", "fd96::1")).next_hop.ip) == "10.0.0.2"


def test_an_endpoint_of_a_family_that_its_service_forbids_is_refused() -> None:
    endpoint = workload("pod", "10.0.0.2", services=member("server"))
    because = refusal("10.96.0.1:80", endpoint, service("server", "10.96.0.1", ip_families=IpFamilies.IPV6_ONLY))
    assert because == "no valid routing destination for workload: default/pod (its service allows no IP family that it has)"


def test_an_endpoint_known_by_hostname_is_refused_with_the_reason() -> None:
    endpoint = workload("db", hostname="db.example", services=member("server"))
    because = refusal("10.96.0.1:80", endpoint, service("server", "10.96.0.1"))
    assert because.startswith("no valid routing destination for workload: default/db (it is known by the hostname db.example only")


# O2, O3, O7: waypoints


def waypoint_service(name: str = "waypoint") -> Service:
    return service(name, "10.96.0.9", ports=(ServicePort(15008, 15008),), subject_alt_names=("spiffe://cluster.local/ns/default/sa/extra",))


WAYPOINT = workload("waypoint", "10.0.0.9", tunnel_protocol=TunnelProtocol.NONE, services=member("waypoint"))


@pytest.mark.parametrize(
    ("named", "identities"),
    [
        ("10.0.0.9", {"waypoint"}),
        ("10.96.0.9", {"waypoint", "extra"}),
        ("default/waypoint.default.svc.cluster.local", {"waypoint", "extra"}),
    ],
)
def test_a_services_waypoint_gets_the_connection_with_its_original_destination(named: str, identities: set[str]) -> None:
    endpoint = workload("pod", "10.0.0.2", services=member("server"))
    server = service("server", "10.96.0.1", waypoint=gateway(named))
    decided = tunnel("10.96.0.1:80", endpoint, server, WAYPOINT, waypoint_service())
    assert decided.next_hop == addr("10.0.0.9:15008")
    assert decided.authority == "10.96.0.1:80"
    assert decided.identities == {identity(name) for name in identities}
    assert (decided.workload, decided.service) == (WAYPOINT, server)
    assert decided.because.startswith("service default/server.default.svc.cluster.local has the waypoint ")


@pytest.mark.parametrize("named", ["10.0.0.9", "10.96.0.9", "default/waypoint.default.svc.cluster.local"])
def test_a_workloads_waypoint_gets_connections_to_its_address_but_not_to_its_service(named: str) -> None:
    endpoint = workload("pod", "10.0.0.2", waypoint=gateway(named), services=member("server"))
    things = (endpoint, service("server", "10.96.0.1"), WAYPOINT, waypoint_service())
    by_address = tunnel("10.0.0.2:8080", *things)
    assert (by_address.next_hop, by_address.authority) == (addr("10.0.0.9:15008"), "10.0.0.2:8080")
    by_service = tunnel("10.96.0.1:80", *things)
    assert (by_service.next_hop, by_service.authority) == (addr("10.0.0.2:15008"), "10.0.0.2:8080")


@pytest.mark.parametrize("named", ["10.0.0.9", "10.96.0.9", "default/waypoint.default.svc.cluster.local"])
def test_the_waypoint_itself_reaches_the_workload(named: str) -> None:
    endpoint = workload("pod", "10.0.0.2", waypoint=gateway(named))
    decided = tunnel("10.0.0.2:8080", endpoint, waypoint_service(), source=WAYPOINT)
    assert decided.next_hop == addr("10.0.0.2:15008")


def test_the_waypoint_of_the_source_means_nothing() -> None:
    source = replace(CLIENT, waypoint=gateway("10.0.0.9"))
    assert tunnel("10.0.0.2:8080", workload("pod", "10.0.0.2"), WAYPOINT, source=source).next_hop == addr("10.0.0.2:15008")


def test_a_waypoint_may_be_named_by_the_hostname_of_a_workload() -> None:
    named = workload("waypoint", "10.0.0.9", hostname="waypoint.example")
    server = service("server", "10.96.0.1", waypoint=gateway("other/waypoint.example"))
    assert tunnel("10.96.0.1:80", server, named).next_hop == addr("10.0.0.9:15008")


def test_a_waypoint_has_its_own_port_and_is_reached_on_its_target() -> None:
    moved = service("waypoint", "10.96.0.9", ports=(ServicePort(15009, 15008),))
    by_service = service("server", "10.96.0.1", waypoint=gateway("10.96.0.9", 15009))
    assert tunnel("10.96.0.1:80", by_service, WAYPOINT, moved).next_hop == addr("10.0.0.9:15008")
    by_workload = service("server", "10.96.0.1", waypoint=gateway("10.0.0.9", 15009))
    assert tunnel("10.96.0.1:80", by_workload, WAYPOINT).next_hop == addr("10.0.0.9:15009")


def test_a_captured_waypoint_is_reached_through_a_service_without_ports() -> None:
    sandwich = replace(WAYPOINT, application_tunnel=ApplicationTunnel(TunnelApplicationProtocol.PROXY, 15088))
    server = service("server", "10.96.0.1", waypoint=gateway("10.96.0.9"))
    assert tunnel("10.96.0.1:80", server, sandwich, service("waypoint", "10.96.0.9", ports=())).next_hop == addr("10.0.0.9:15008")


def test_an_ipv6_destination_may_have_an_ipv4_waypoint() -> None:
    server = service("server", "fd96::1", waypoint=gateway("10.0.0.9"))
    decided = tunnel("[fd96::1]:80", server, WAYPOINT)
    assert (decided.next_hop, decided.authority) == (addr("10.0.0.9:15008"), "[fd96::1]:80")


def test_an_unknown_waypoint_refuses() -> None:
    for named in ("10.0.0.77", "default/gone.example"):
        because = refusal("10.96.0.1:80", service("server", "10.96.0.1", waypoint=gateway(named)))
        assert because == f"unknown waypoint: waypoint {gateway(named).destination} not found"
        because = refusal("10.0.0.2:80", workload("pod", "10.0.0.2", waypoint=gateway(named)))
        assert because == f"unknown waypoint: waypoint {gateway(named).destination} not found"


def test_a_waypoint_without_healthy_endpoints_refuses() -> None:
    sick = replace(WAYPOINT, status=HealthStatus.UNHEALTHY)
    because = refusal("10.96.0.1:80", service("server", "10.96.0.1", waypoint=gateway("10.96.0.9")), sick, waypoint_service())
    assert because == "unknown waypoint: waypoint /10.96.0.9 has no healthy upstream (none of its 1 endpoints is healthy)"


def test_weighted_waypoints_are_sampled_by_weight() -> None:
    weighted = tuple(WeightedWaypoint(gateway(ip), weight) for ip, weight in (("10.0.0.7", 0), ("10.0.0.8", 1), ("10.0.0.9", 3)))
    waypoints = [workload(f"w{number}", f"10.0.0.{number}") for number in (7, 8, 9)]
    state = MeshState()
    state.apply(Delta((CLIENT, *waypoints), (service("server", "10.96.0.1", weighted_waypoints=weighted, waypoint=gateway("10.0.0.7")),)))
    rng = random.Random(5)
    counted: Counter[str] = Counter()
    for _ in range(1000):
        decided = resolve(state, CLIENT, addr("10.96.0.1:80"), rng)
        assert isinstance(decided, Tunnel)
        counted[decided.workload.name] += 1
    assert counted["w7"] == 0
    assert 200 < counted["w8"] < 300


def test_weighted_waypoints_without_weight_leave_the_single_one() -> None:
    nothing = (WeightedWaypoint(gateway("10.0.0.8"), 0),)
    server = service("server", "10.96.0.1", weighted_waypoints=nothing, waypoint=gateway("10.0.0.9"))
    assert tunnel("10.96.0.1:80", server, WAYPOINT, workload("other", "10.0.0.8")).workload is WAYPOINT


# O10: other networks


def test_an_endpoint_on_another_network_is_refused_with_the_reason() -> None:
    remote = workload("remote", network="far", network_gateway=gateway("10.0.0.99"), services=member("server"))
    because = refusal("10.96.0.1:80", remote, service("server", "10.96.0.1"))
    assert because == (
        "no valid routing destination for workload: default/remote "
        "(it is on network 'far', and cross-network gateways are not supported yet)"
    )


def test_an_endpoint_on_another_network_without_a_gateway_is_refused() -> None:
    remote = workload("remote", "10.0.0.2", network="far", services=member("server"))
    because = refusal("10.96.0.1:80", remote, service("server", "10.96.0.1"))
    assert because == "no valid routing destination for workload: default/remote (it is on network 'far', which has no gateway)"


def test_a_waypoint_on_another_network_is_refused() -> None:
    far = workload("waypoint", "10.0.0.9", network="far", network_gateway=gateway("10.0.0.99"), services=member("waypoint"))
    because = refusal("10.96.0.1:80", service("server", "10.96.0.1", waypoint=gateway("10.96.0.9")), far, waypoint_service())
    assert "cross-network gateways are not supported yet" in because


def test_failover_prefers_our_network_and_names_the_other_one_when_it_must() -> None:
    server = service("server", "10.96.0.1", load_balancing=LoadBalancing((LoadBalancingScope.NETWORK,), LoadBalancingMode.FAILOVER))
    here = workload("here", "10.0.0.2", services=member("server"))
    far = workload("far", network="far", network_gateway=gateway("10.0.0.99"), services=member("server"))
    assert tunnel("10.96.0.1:80", server, here, far).workload is here
    assert "network 'far'" in refusal("10.96.0.1:80", server, replace(here, status=HealthStatus.UNHEALTHY), far)


def test_what_could_not_be_reached_is_left_out() -> None:
    server = service("server", "10.96.0.1")
    state = MeshState()
    state.apply(
        Delta((CLIENT, *(workload(name, ip, services=member("server")) for name, ip in (("a", "10.0.0.2"), ("b", "10.0.0.3")))), (server,))
    )

    def decide(*unreachable: str) -> Route:
        uids = frozenset(f"Kubernetes//Pod/default/{name}" for name in unreachable)
        return resolve(state, CLIENT, addr("10.96.0.1:80"), random.Random(1), uids)

    for unreachable, left in (("a", "10.0.0.3"), ("b", "10.0.0.2")):
        decided = decide(unreachable)
        assert isinstance(decided, Tunnel)
        assert decided.next_hop == addr(f"{left}:15008")
    assert isinstance(decide("a", "b"), Refusal)


def test_a_waypoint_that_could_not_be_reached_has_another_pod_but_is_never_gone_round() -> None:
    proxies = service("waypoint", "10.96.0.9", ports=(ServicePort(15008, 15008),))
    server = service("server", "10.96.0.1", waypoint=gateway("10.96.0.9"))
    pods = [workload(name, ip, services=member("waypoint")) for name, ip in (("w1", "10.0.0.8"), ("w2", "10.0.0.9"))]
    state = MeshState()
    state.apply(Delta((CLIENT, workload("server", "10.0.0.2", services=member("server")), *pods), (server, proxies)))
    uids = [pod.uid for pod in pods]
    decided = resolve(state, CLIENT, addr("10.96.0.1:80"), random.Random(1), frozenset(uids[:1]))
    assert isinstance(decided, Tunnel)
    assert decided.next_hop == addr("10.0.0.9:15008")
    assert isinstance(resolve(state, CLIENT, addr("10.96.0.1:80"), random.Random(1), frozenset(uids)), Refusal)

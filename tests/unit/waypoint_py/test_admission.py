"""What a CONNECT to a waypoint may ask for: every row of the table, and nothing beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from ipaddress import ip_address

import pytest
from msgspec import structs

from mesh.model.address import GatewayAddress, NamespacedHostname, NetworkAddress, SocketAddress
from mesh.model.service import Service, ServicePort, Visibility, WeightedWaypoint
from mesh.model.workload import Workload
from mesh.state.store import Delta, MeshState
from mesh.wire.authority import HostPort
from waypoint_py.admission import Admission, Charge, Ourselves, Refused, ToService, ToWorkload, admit

OURS = GatewayAddress(NamespacedHostname("shop", "waypoint.shop.svc.cluster.local"))
OTHERS = GatewayAddress(NamespacedHostname("shop", "another.shop.svc.cluster.local"))
OWN_ADDRESS = ip_address("10.1.0.9")


def _service(name: str, *vips: str, waypoint: GatewayAddress | None = OURS, **changes: object) -> Service:
    made = Service(
        name,
        "shop",
        f"{name}.shop.svc.cluster.local",
        tuple(NetworkAddress("", ip_address(vip)) for vip in vips),
        ports=(ServicePort(80, 8080),),
        waypoint=waypoint,
    )
    return structs.replace(made, **changes)


def _workload(name: str, ip: str, waypoint: GatewayAddress | None = None, **changes: object) -> Workload:
    made = Workload(f"Kubernetes//Pod/shop/{name}", name, "shop", (ip_address(ip),), waypoint=waypoint)
    return structs.replace(made, **changes)


WEB = _service("web", "10.96.0.1", "fd00::96")
POD = _workload("web-1", "10.1.0.1", OURS)
MESH = Delta(
    services=(
        WEB,
        _service("elsewhere", "10.96.0.2", waypoint=OTHERS),
        _service("free", "10.96.0.3", waypoint=None),
        _service("canary", "10.96.0.4", waypoint=OTHERS, weighted_waypoints=(WeightedWaypoint(OTHERS, 90), WeightedWaypoint(OURS, 10))),
        _service("by-address", "10.96.0.5", waypoint=GatewayAddress(NetworkAddress("", ip_address("10.96.0.9")))),
        _service("by-pod", "10.96.0.6", waypoint=GatewayAddress(NetworkAddress("", OWN_ADDRESS))),
        _service("hidden", "10.96.0.7", visibility=Visibility.NAMESPACE),
        _service("waypoint", "10.96.0.9", ports=(ServicePort(15008, 15008),)),
    ),
    workloads=(POD, _workload("lonely", "10.1.0.2"), _workload("other", "10.1.0.3", OTHERS), _workload("v6", "fd00::1", OURS)),
)
OURSELVES = Ourselves(NamespacedHostname("shop", "waypoint.shop.svc.cluster.local"), "", frozenset({OWN_ADDRESS}))


def _admit(
    target: str,
    waypoint_for: str = "all",
    namespace: str = "shop",
    us: Ourselves = OURSELVES,
    is_assigned: Callable[[str], bool] = lambda service: False,
) -> Admission:
    state = MeshState()
    state.apply(MESH)
    host, _, port = target.rpartition(":")
    parsed = HostPort(host, int(port)) if host[-1].isalpha() else SocketAddress.parse(target)
    return admit(state, us, Charge(waypoint_for, is_assigned), namespace, parsed)


@pytest.mark.parametrize("target", ["10.96.0.1:80", "[fd00::96]:80", "10.96.0.4:80", "10.96.0.5:80", "10.96.0.6:80"])
def test_a_service_of_ours_is_let_through_however_it_names_us(target: str) -> None:
    admitted = _admit(target)
    assert isinstance(admitted, ToService)
    assert admitted.destination == SocketAddress.parse(target)


def test_a_hostname_of_a_service_of_ours_stands_for_its_address() -> None:
    admitted = _admit("web.shop.svc.cluster.local:80")
    assert admitted == ToService(WEB, SocketAddress(ip_address("10.96.0.1"), 80))


@pytest.mark.parametrize("target", ["10.1.0.1:8080", "[fd00::1]:8080"])
def test_a_workload_of_ours_is_let_through(target: str) -> None:
    admitted = _admit(target)
    assert isinstance(admitted, ToWorkload)
    assert admitted.destination == SocketAddress.parse(target)


@pytest.mark.parametrize(
    ("target", "status", "because"),
    [
        ("10.96.0.1:81", 404, "has no port 81"),
        ("192.0.2.1:80", 404, "nothing in the mesh"),
        ("10.96.0.2:80", 403, "does not have this waypoint"),
        ("10.96.0.3:80", 403, "does not have this waypoint"),
        ("10.1.0.2:80", 403, "does not have this waypoint"),
        ("10.1.0.3:80", 403, "does not have this waypoint"),
        ("elsewhere.shop.svc.cluster.local:80", 403, "does not have this waypoint"),
        ("nobody.shop.svc.cluster.local:80", 404, "no service has the hostname"),
        ("web.shop.svc.cluster.local:81", 404, "has no port 81"),
        ("10.1.0.9:15000", 403, "this waypoint itself"),
        ("10.1.0.9:80", 403, "this waypoint itself"),
        ("10.96.0.9:15008", 403, "this waypoint"),
        ("127.0.0.1:15000", 403, "address of the machine"),
        ("127.8.8.8:80", 403, "address of the machine"),
        ("[::1]:80", 403, "address of the machine"),
        ("0.0.0.0:80", 403, "address of the machine"),
        ("[::]:80", 403, "address of the machine"),
        ("169.254.169.254:80", 403, "address of the machine"),
        ("[fe80::1]:80", 403, "address of the machine"),
        ("224.0.0.1:80", 403, "address of the machine"),
        ("10.1.0.1:15008", 403, "the proxy's own"),
        ("10.1.0.1:15006", 403, "the proxy's own"),
        ("10.1.0.1:15001", 403, "the proxy's own"),
    ],
)
def test_whatever_is_not_ours_is_refused(target: str, status: int, because: str) -> None:
    admitted = _admit(target)
    assert isinstance(admitted, Refused)
    assert admitted.status == status
    assert because in admitted.because


@pytest.mark.parametrize(
    ("waypoint_for", "service", "workload"),
    [("service", True, False), ("workload", False, True), ("all", True, True), ("none", False, False), ("novelty", False, False)],
)
def test_a_waypoint_takes_only_the_kind_of_traffic_that_it_is_for(waypoint_for: str, service: bool, workload: bool) -> None:
    assert isinstance(_admit("10.96.0.1:80", waypoint_for), ToService) is service
    assert isinstance(_admit("10.1.0.1:80", waypoint_for), ToWorkload) is workload
    assert isinstance(_admit("web.shop.svc.cluster.local:80", waypoint_for), ToService) is service


def test_a_service_of_one_namespace_alone_is_nothing_to_the_others() -> None:
    assert isinstance(_admit("10.96.0.7:80"), ToService)
    assert isinstance(_admit("10.96.0.7:80", namespace="foreign"), Refused)
    assert isinstance(_admit("hidden.shop.svc.cluster.local:80", namespace="foreign"), Refused)


def test_our_own_workload_is_refused_also_where_it_is_said_to_have_this_waypoint() -> None:
    own = _workload("waypoint-1", "10.1.0.8", OURS)
    state = MeshState()
    state.apply(MESH)
    state.apply(Delta(workloads=(own,)))
    admitted = admit(state, replace(OURSELVES, workload=own), Charge("all"), "shop", SocketAddress(ip_address("10.1.0.8"), 80))
    assert isinstance(admitted, Refused)


def test_another_network_has_other_addresses() -> None:
    elsewhere = replace(OURSELVES, network="far")
    assert isinstance(_admit("10.96.0.1:80", us=elsewhere), Refused)
    assert isinstance(_admit("10.1.0.1:80", us=elsewhere), Refused)


def test_a_service_that_has_left_is_served_until_it_is_taken_away() -> None:
    """The control plane does that when clients' agents know; before, they still come here."""
    elsewhere = "shop/elsewhere.shop.svc.cluster.local"
    assert isinstance(_admit("10.96.0.2:80"), Refused)
    admitted = _admit("10.96.0.2:80", is_assigned=lambda service: True)
    assert isinstance(admitted, ToService)
    assert isinstance(_admit("10.96.0.2:80", is_assigned=lambda service: service != str(admitted.service.key)), Refused)
    assert isinstance(_admit("elsewhere.shop.svc.cluster.local:80", is_assigned=lambda service: service == elsewhere), ToService)
    assert isinstance(_admit("10.96.0.2:80", "workload", is_assigned=lambda service: True), Refused)
    assert isinstance(_admit("10.1.0.2:80", is_assigned=lambda service: True), Refused), "workloads are never assigned"

"""Which pods stand behind a service, and under which names."""

from __future__ import annotations

from ipaddress import ip_address

from mesh.model.address import SocketAddress
from meshctl_py.lab.assign import Assignments, assign
from meshctl_py.lab.endpoints import VirtualPort, count_endpoints, dns_names, virtual_ports
from meshctl_py.lab.spec import Cluster, Container, PodKey, PodSpec, ServiceKey, ServicePortSpec, ServiceSpec

WEB = ServiceKey("shop", "web")
A, B = PodKey("shop", "a"), PodKey("shop", "b")


def build(**service: object) -> tuple[Cluster, Assignments]:
    containers = (Container("c", ports={"http": 8080}),)
    pods = {key: PodSpec(key, hostname=key.name, labels={"app": "web"}, containers=containers) for key in (A, B)}
    fields: dict[str, object] = {"selector": {"app": "web"}, "ports": (ServicePortSpec(80, "http"),)} | service
    cluster = Cluster(("n1",), pods, {WEB: ServiceSpec(WEB, **fields)})
    return cluster, assign(cluster, Assignments(), lambda: "uid")


def addresses(*texts: str) -> tuple[SocketAddress, ...]:
    return tuple(map(SocketAddress.parse, texts))


def test_a_service_address_stands_for_the_ready_pods_of_its_family() -> None:
    table = virtual_ports(*build(), {A, B})
    assert table == (
        VirtualPort("shop/web", *addresses("10.96.1.1:80"), "TCP", addresses("10.244.1.2:8080", "10.244.1.3:8080")),
        VirtualPort("shop/web", *addresses("[fd00:10:96::101]:80"), "TCP", addresses("[fd00:10:244:1::2]:8080", "[fd00:10:244:1::3]:8080")),
    )


def test_a_pod_that_is_not_ready_gets_no_connections() -> None:
    table = virtual_ports(*build(), {B})
    assert table[0].targets == addresses("10.244.1.3:8080")


def test_nobody_ready_leaves_the_port_without_targets() -> None:
    assert [port.targets for port in virtual_ports(*build(), set())] == [(), ()]


def test_pods_that_are_not_ready_count_where_the_service_says_so() -> None:
    assert len(virtual_ports(*build(publish_not_ready=True), set())[0].targets) == 2


def test_a_port_name_that_a_pod_does_not_have_leads_nowhere() -> None:
    assert virtual_ports(*build(ports=(ServicePortSpec(80, "grpc"),)), {A})[0].targets == ()


def test_a_service_is_named_by_its_address() -> None:
    names = dns_names(*build(), {A})
    assert names == {"web.shop.svc.cluster.local": (ip_address("10.96.1.1"), ip_address("fd00:10:96::101"))}


def test_a_headless_service_is_named_by_its_ready_pods_and_they_one_by_one() -> None:
    names = dns_names(*build(headless=True), {B})
    assert names == dict.fromkeys(
        ("web.shop.svc.cluster.local", "b.web.shop.svc.cluster.local"), (ip_address("10.244.1.3"), ip_address("fd00:10:244:1::3"))
    )


def test_endpoints_are_counted_of_headless_services_too() -> None:
    assert count_endpoints(*build(headless=True), {A, B}) == {WEB: 2}
    assert count_endpoints(*build(headless=True), {A}) == {WEB: 1}
    assert count_endpoints(*build(), {A, B}) == {WEB: 2}


def test_a_pod_without_the_port_that_is_asked_for_counts_for_nothing() -> None:
    assert count_endpoints(*build(ports=(ServicePortSpec(80, "grpc"),)), {A, B}) == {WEB: 0}
    assert count_endpoints(*build(ports=(ServicePortSpec(80, "grpc"), ServicePortSpec(81, "http"))), {A, B}) == {WEB: 2}

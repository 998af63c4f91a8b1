"""Nodes, uids and addresses: what has a place keeps it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from ipaddress import ip_address

import pytest

from meshctl_py.lab.assign import CLUSTER_DNS, MAX_NODES, Assignments, Unplaced, assign
from meshctl_py.lab.spec import Cluster, Container, PodKey, PodSpec, ServiceKey, ServiceSpec


@pytest.fixture
def new_uid() -> Callable[[], str]:
    numbers = itertools.count(1)
    return lambda: f"uid-{next(numbers)}"


def pods(*specs: PodSpec) -> dict[PodKey, PodSpec]:
    return {spec.key: spec for spec in specs}


def pod(name: str, **fields: object) -> PodSpec:
    return PodSpec(PodKey("shop", name), **fields)


def service(name: str, *ips: str, **fields: object) -> ServiceSpec:
    return ServiceSpec(ServiceKey("shop", name), cluster_ips=tuple(map(ip_address, ips)), **fields)


def services(*specs: ServiceSpec) -> dict[ServiceKey, ServiceSpec]:
    return {spec.key: spec for spec in specs}


def test_pods_without_a_node_are_spread_evenly(new_uid: Callable[[], str]) -> None:
    cluster = Cluster(("n1", "n2"), pods(*(pod(f"p{number}") for number in range(4)), pod("fixed", node="n2")))
    placed = assign(cluster, Assignments(), new_uid).pods.values()
    assert sorted(item.node for item in placed) == ["n1", "n1", "n2", "n2", "n2"]


def test_a_pod_gets_an_address_of_each_family_from_its_nodes_range(new_uid: Callable[[], str]) -> None:
    placed = assign(Cluster(("n1", "n2"), pods(pod("a", node="n2"))), Assignments(), new_uid)
    assert placed.pods[PodKey("shop", "a")].ips == (ip_address("10.244.2.2"), ip_address("fd00:10:244:2::2"))
    assert placed.nodes["n2"].ips == (ip_address("10.99.0.12"), ip_address("fd99::c"))


def test_everything_keeps_its_place_when_others_come_and_go(new_uid: Callable[[], str]) -> None:
    first = assign(Cluster(("n1", "n2"), pods(pod("a"), pod("b")), services(service("x"), service("y"))), Assignments(), new_uid)
    second = assign(Cluster(("n0", "n2"), pods(pod("b"), pod("c")), services(service("w"), service("y"))), first, new_uid)
    key = PodKey("shop", "b")
    assert second.pods[key] == first.pods[key]
    assert second.nodes["n2"] == first.nodes["n2"]
    assert second.vips[ServiceKey("shop", "y")] == first.vips[ServiceKey("shop", "y")]
    assert len({ip for item in second.pods.values() for ip in item.ips}) == 4
    assert len({ip for vips in second.vips.values() for ip in vips}) == 4


def test_a_changed_command_makes_a_new_pod_and_changed_labels_do_not(new_uid: Callable[[], str]) -> None:
    key = PodKey("shop", "a")
    first = assign(Cluster(("n1",), pods(pod("a"))), Assignments(), new_uid)
    labelled = assign(Cluster(("n1",), pods(pod("a", labels={"x": "y"}))), first, new_uid)
    assert labelled.pods[key].uid == first.pods[key].uid
    assert labelled.pods[key].spec.labels == {"x": "y"}
    changed = assign(Cluster(("n1",), pods(pod("a", containers=(Container("c", ("true",)),)))), labelled, new_uid)
    assert changed.pods[key].uid != first.pods[key].uid


def test_an_address_that_a_pod_asks_for_is_given_before_others_can_get_it(new_uid: Callable[[], str]) -> None:
    wish = (ip_address("10.244.1.2"),)
    placed = assign(Cluster(("n1",), pods(pod("a"), pod("b", ips=wish))), Assignments(), new_uid)
    assert placed.pods[PodKey("shop", "b")].ips == wish
    assert placed.pods[PodKey("shop", "a")].ips[0] == ip_address("10.244.1.3")


@pytest.mark.parametrize(
    ("ips", "because"),
    [
        (("10.244.1.9", "10.244.1.10"), "a pod has at most one address of each family"),
        (("10.96.0.3",), "address 10.96.0.3 lies in a range of nodes or services"),
        (("fd99::1",), "address fd99::1 lies in a range of nodes or services"),
    ],
)
def test_addresses_that_cannot_be_a_pods_leave_it_unplaced(new_uid: Callable[[], str], ips: tuple[str, ...], because: str) -> None:
    placed = assign(Cluster(("n1",), pods(pod("a", ips=tuple(map(ip_address, ips))))), Assignments(), new_uid)
    assert placed.pods == {}
    assert placed.unplaced == (Unplaced("Pod", "shop", "a", because),)


def test_two_pods_that_ask_for_one_address_do_not_both_get_it(new_uid: Callable[[], str]) -> None:
    wish = (ip_address("10.1.1.1"),)
    placed = assign(Cluster(("n1",), pods(pod("a", ips=wish), pod("b", ips=wish))), Assignments(), new_uid)
    assert list(placed.pods) == [PodKey("shop", "a")]
    assert placed.unplaced == (Unplaced("Pod", "shop", "b", "address 10.1.1.1 belongs to another pod"),)


def test_a_pod_on_an_unknown_node_is_unplaced(new_uid: Callable[[], str]) -> None:
    placed = assign(Cluster(("n1",), pods(pod("a", node="n9"))), Assignments(), new_uid)
    assert placed.unplaced == (Unplaced("Pod", "shop", "a", "there is no node n9 (known: n1)", ("spec", "nodeName")),)


def test_pods_of_a_node_that_went_are_placed_anew(new_uid: Callable[[], str]) -> None:
    key = PodKey("shop", "a")
    first = assign(Cluster(("n1", "n2"), pods(pod("a"))), Assignments(), new_uid)
    second = assign(Cluster(("n2",), pods(pod("a"))), first, new_uid)
    assert first.pods[key].node == "n1"
    assert second.pods[key].node == "n2"
    assert second.pods[key].uid != first.pods[key].uid


def test_a_full_node_says_so(new_uid: Callable[[], str]) -> None:
    placed = assign(Cluster(("n1",), pods(*(pod(f"p{number:03}") for number in range(251)))), Assignments(), new_uid)
    assert len(placed.pods) == 250
    assert placed.unplaced == (Unplaced("Pod", "shop", "p250", "node n1 has no pod address left"),)


def test_more_nodes_than_addresses_are_unplaced(new_uid: Callable[[], str]) -> None:
    placed = assign(Cluster(tuple(f"n{number}" for number in range(MAX_NODES + 1))), Assignments(), new_uid)
    assert len({ip for node in placed.nodes.values() for ip in node.ips}) == 2 * MAX_NODES
    assert placed.unplaced == (Unplaced("Node", "", f"n{MAX_NODES}", "a lab has at most 240 nodes"),)


def test_a_pod_on_its_hosts_network_has_its_hosts_addresses(new_uid: Callable[[], str]) -> None:
    placed = assign(Cluster(("n1",), pods(pod("a", host_network=True), pod("b", host_network=True))), Assignments(), new_uid)
    assert {item.ips for item in placed.pods.values()} == {placed.nodes["n1"].ips}


def test_services_get_addresses_of_their_families_unless_headless(new_uid: Callable[[], str]) -> None:
    found = services(service("both"), service("six", families=(6,)), service("none", headless=True), service("own", "10.96.3.3"))
    vips = assign(Cluster(services=found), Assignments(), new_uid).vips
    assert [ip.version for ip in vips[ServiceKey("shop", "both")]] == [4, 6]
    assert [ip.version for ip in vips[ServiceKey("shop", "six")]] == [6]
    assert vips[ServiceKey("shop", "own")] == (ip_address("10.96.3.3"),)
    assert ServiceKey("shop", "none") not in vips


def test_two_services_cannot_have_one_address_nor_that_of_the_dns(new_uid: Callable[[], str]) -> None:
    found = services(service("a", "10.96.3.3"), service("b", "10.96.3.3"), service("dns", str(CLUSTER_DNS[0])))
    placed = assign(Cluster(services=found), Assignments(), new_uid)
    assert list(placed.vips) == [ServiceKey("shop", "a")]
    assert [(item.kind, item.name) for item in placed.unplaced] == [("Service", "b"), ("Service", "dns")]


def test_an_address_that_the_lab_chose_yields_to_a_service_that_asks_for_it(new_uid: Callable[[], str]) -> None:
    first = assign(Cluster(services=services(service("a"))), Assignments(), new_uid)
    taken = first.vips[ServiceKey("shop", "a")][0]
    second = assign(Cluster(services=services(service("a"), service("b", str(taken)))), first, new_uid)
    assert second.vips[ServiceKey("shop", "b")] == (taken,)
    assert taken not in second.vips[ServiceKey("shop", "a")]

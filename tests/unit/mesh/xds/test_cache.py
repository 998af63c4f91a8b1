"""What a change really changed, and what a name finds."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from mesh.model.address import NamespacedHostname, NetworkAddress
from mesh.model.policy import Action, Policy, Scope
from mesh.model.service import Service
from mesh.model.workload import PortMapping, Workload
from mesh.state.store import Delta
from mesh.xds.cache import ResourceCache
from mesh.xds.names import ADDRESS, AUTHORIZATION

SERVICE = Service("web", "shop", "web.shop.svc", addresses=(NetworkAddress("", ip_address("10.96.0.1")),))


def _workload(name: str, ip: str, *, of: Service | None = None, node: str = "") -> Workload:
    services = {of.key: (PortMapping(80, 8080),)} if of else {}
    return Workload(f"c//Pod/shop/{name}", name, "shop", addresses=(ip_address(ip),), services=services, node=node)


def _names(resources: object) -> list[str]:
    return [each.name for each in resources]


def test_the_same_value_again_is_no_change() -> None:
    cache = ResourceCache()
    first = Delta(workloads=(_workload("a", "10.0.0.1"),), services=(SERVICE,))
    assert {url: set(names) for url, names in cache.apply(first).items()} == {ADDRESS: {"c//Pod/shop/a", "shop/web.shop.svc"}}
    version = cache.version
    assert not cache.apply(first)
    assert cache.version == version


def test_a_changed_value_has_another_version() -> None:
    cache = ResourceCache()
    cache.apply(Delta(workloads=(_workload("a", "10.0.0.1"),)))
    before = cache.get(ADDRESS, "c//Pod/shop/a")
    assert cache.apply(Delta(workloads=(_workload("a", "10.0.0.2"),)))
    after = cache.get(ADDRESS, "c//Pod/shop/a")
    assert before is not None
    assert after is not None
    assert before.version != after.version
    assert _names(cache.find(ADDRESS, "/10.0.0.1")) == []
    assert _names(cache.find(ADDRESS, "/10.0.0.2")) == ["c//Pod/shop/a"]


def test_removing_what_is_not_there_changes_nothing() -> None:
    cache = ResourceCache()
    assert not cache.apply(Delta(removed_addresses=("nobody",), removed_policies=("ns/none",)))


def test_an_address_may_move_from_one_pod_to_another() -> None:
    cache = ResourceCache()
    cache.apply(Delta(workloads=(_workload("a", "10.0.0.1"),)))
    changes = cache.apply(Delta(workloads=(_workload("b", "10.0.0.1"),), removed_addresses=("c//Pod/shop/a",)))
    assert set(changes[ADDRESS]) == {"c//Pod/shop/a", "c//Pod/shop/b"}
    assert _names(cache.find(ADDRESS, "/10.0.0.1")) == ["c//Pod/shop/b"]


def test_a_service_found_by_name_or_address_brings_its_workloads() -> None:
    cache = ResourceCache()
    cache.apply(Delta(services=(SERVICE,), workloads=(_workload("a", "10.0.0.1", of=SERVICE), _workload("b", "10.0.0.2"))))
    for name in ("shop/web.shop.svc", "/10.96.0.1"):
        assert _names(cache.find(ADDRESS, name)) == ["shop/web.shop.svc", "c//Pod/shop/a"]


def test_a_workload_of_a_service_that_is_not_there_is_found_by_the_services_name() -> None:
    cache = ResourceCache()
    cache.apply(Delta(workloads=(_workload("a", "10.0.0.1", of=SERVICE),)))
    assert _names(cache.find(ADDRESS, str(NamespacedHostname("shop", "web.shop.svc")))) == ["c//Pod/shop/a"]


def test_a_node_s_workloads_are_found_by_its_name() -> None:
    cache = ResourceCache()
    cache.apply(Delta(workloads=(_workload("a", "10.0.0.1", node="n1"), _workload("b", "10.0.0.2", node="n2"))))
    assert _names(cache.on_node(ADDRESS, "n1")) == ["c//Pod/shop/a"]
    assert _names(cache.on_node(ADDRESS, "")) == []


def test_an_unreadable_policy_is_no_resource_and_changes_nothing() -> None:
    cache = ResourceCache()
    bad = Policy("p", "ns", Scope.NAMESPACE, Action.DENY, unreadable="why")
    with pytest.raises(ValueError, match="unreadable"):
        cache.apply(Delta(workloads=(_workload("a", "10.0.0.1"),), policies=(bad,)))
    assert not list(cache.all(ADDRESS))
    assert not list(cache.all(AUTHORIZATION))

"""Who may be chosen, and how often."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from msgspec.structs import replace

from mesh.model.address import GatewayAddress, NetworkAddress, parse_ip
from mesh.model.service import HealthPolicy, LoadBalancing, LoadBalancingMode, LoadBalancingScope, Service, ServicePort
from mesh.model.workload import (
    ApplicationTunnel,
    HealthStatus,
    Locality,
    PortMapping,
    TunnelApplicationProtocol,
    Workload,
)
from mesh.state.balance import Candidate, Endpoint, PickList, Wanted, list_picks, place_of, target_port

NETWORK, REGION, ZONE = LoadBalancingScope.NETWORK, LoadBalancingScope.REGION, LoadBalancingScope.ZONE


def workload(name: str, **fields: object) -> Workload:
    base = Workload(f"Kubernetes//Pod/default/{name}", name, "default", (parse_ip("10.0.0.1"),))
    return replace(base, **fields)


def service(mode: LoadBalancingMode = LoadBalancingMode.STANDARD, *scopes: LoadBalancingScope, target: int = 8080) -> Service:
    return Service("s", "default", "s.example", ports=(ServicePort(80, target),), load_balancing=LoadBalancing(scopes, mode))


CLIENT = workload("client", node="n1", cluster_id="c1", locality=Locality("r1", "z1", "s1"))


def names(of: Service, *workloads: Workload, port: int = 80, waypoint: bool = False) -> list[str]:
    endpoints = [Endpoint(one, one.services.get(of.key, ())) for one in workloads]
    picks = list_picks(of, endpoints, Wanted(port, waypoint), place_of(CLIENT, of))
    return [candidate.workload.name for candidate in picks.candidates]


def why(of: Service, *workloads: Workload) -> str:
    return list_picks(of, [Endpoint(one, ()) for one in workloads], Wanted(80), place_of(CLIENT, of)).because


# Who is a candidate


def test_unhealthy_endpoints_are_no_candidates_unless_the_service_allows_all() -> None:
    sick, well = workload("sick", status=HealthStatus.UNHEALTHY), workload("well")
    assert names(service(), sick, well) == ["well"]
    tolerant = replace(service(), load_balancing=LoadBalancing(health_policy=HealthPolicy.ALLOW_ALL))
    assert names(tolerant, sick, well) == ["sick", "well"]


def test_an_endpoint_without_capacity_is_never_chosen() -> None:
    assert names(service(), workload("none", capacity=0), workload("one")) == ["one"]


def test_an_endpoint_needs_an_address_or_a_hostname_or_a_gateway_of_another_network() -> None:
    gateway = GatewayAddress(NetworkAddress("", parse_ip("10.9.9.9")))
    workloads = (
        workload("nowhere", addresses=()),
        workload("by-name", addresses=(), hostname="db.example"),
        workload("remote", addresses=(), network="far", network_gateway=gateway),
        workload("remote-without-gateway", addresses=(), network="far"),
        workload("gateway-of-our-network", addresses=(), network_gateway=gateway),
    )
    assert names(service(), *workloads) == ["by-name", "remote"]


@pytest.mark.parametrize(
    ("of_service", "of_endpoint", "expected"),
    [(8080, None, 8080), (8080, 9090, 9090), (0, 9090, 9090), (0, None, None), (0, 0, None), (8080, 0, 8080)],
)
def test_the_endpoints_port_goes_before_the_services(of_service: int, of_endpoint: int | None, expected: int | None) -> None:
    own = () if of_endpoint is None else (PortMapping(80, of_endpoint),)
    assert target_port(service(target=of_service), own, 80) == expected
    assert target_port(service(target=of_service), own, 81) is None


def test_a_named_port_picks_only_endpoints_that_have_it() -> None:
    named = service(target=0)
    has = workload("has", services={named.key: (PortMapping(80, 8080),)})
    lacks = workload("lacks", services={named.key: ()})
    assert names(named, has, lacks) == ["has"]


def test_a_waypoint_is_reached_on_its_services_port_or_as_an_application_tunnel() -> None:
    tunnelled = workload("tunnelled", application_tunnel=ApplicationTunnel(TunnelApplicationProtocol.PROXY, 15088))
    plain = workload("plain")
    assert names(service(), tunnelled, plain, port=15008, waypoint=True) == ["tunnelled"]
    mesh_port = replace(service(), ports=(ServicePort(15008, 15008),))
    assert names(mesh_port, tunnelled, plain, port=15008, waypoint=True) == ["plain", "tunnelled"]


def test_no_candidates_come_with_the_reason() -> None:
    assert why(service()) == "it has no endpoints"
    assert why(service(), workload("a", status=HealthStatus.UNHEALTHY)) == "none of its 1 endpoints is healthy"
    assert why(service(target=0), workload("a")) == "none of its 1 healthy endpoints serves port 80"
    strict = service(LoadBalancingMode.STRICT, REGION, ZONE)
    assert why(strict, workload("a")) == "none of its 1 healthy endpoints is in the same region, zone, as it demands"


# By locality


def here(name: str, **fields: object) -> Workload:
    return replace(replace(CLIENT, uid=name, name=name), **fields)


def test_standard_looks_at_no_locality() -> None:
    assert set(names(service(LoadBalancingMode.STANDARD, REGION), here("near"), workload("far"))) == {"near", "far"}


def test_strict_takes_only_those_that_share_every_scope() -> None:
    strict = service(LoadBalancingMode.STRICT, REGION, ZONE)
    assert names(strict, here("both"), here("region", locality=Locality("r1", "z2")), workload("none")) == ["both"]
    assert names(strict, here("region", locality=Locality("r1", "z2")), workload("none")) == []


def test_failover_takes_those_that_share_most_leading_scopes() -> None:
    failover = service(LoadBalancingMode.FAILOVER, REGION, ZONE)
    both, region, none = here("both"), here("region", locality=Locality("r1", "z2")), here("none", locality=Locality("r2", "z1"))
    assert names(failover, both, region, none) == ["both"]
    assert names(failover, region, none) == ["region"]
    assert names(failover, none, here("other", locality=Locality("r3", "z1"))) == ["none", "other"]


def test_the_reason_speaks_of_nearness_where_there_is_a_choice() -> None:
    failover, far = service(LoadBalancingMode.FAILOVER, REGION, ZONE), workload("far", locality=Locality("r9", "z9"))
    assert why(failover, here("a")) == "one of 1"
    assert why(failover, here("a"), here("b")) == "one of 2, equally near by region, zone"
    assert why(failover, here("a"), far) == "one of the 1 nearest by region, zone of 2"


def test_failover_goes_on_when_the_nearest_is_unhealthy() -> None:
    failover = service(LoadBalancingMode.FAILOVER, REGION)
    assert names(failover, here("near", status=HealthStatus.UNHEALTHY), workload("far")) == ["far"]
    assert names(failover, here("near", capacity=0), workload("far")) == ["far"]


@pytest.mark.parametrize(
    ("scope", "fields"),
    [
        (LoadBalancingScope.REGION, {"locality": Locality("other", "z1", "s1")}),
        (LoadBalancingScope.ZONE, {"locality": Locality("r1", "other", "s1")}),
        (LoadBalancingScope.SUBZONE, {"locality": Locality("r1", "z1", "other")}),
        (LoadBalancingScope.NODE, {"node": "other"}),
        (LoadBalancingScope.CLUSTER, {"cluster_id": "other"}),
        (LoadBalancingScope.NETWORK, {"network": "other"}),
    ],
)
def test_each_scope_looks_at_its_own_field_only(scope: LoadBalancingScope, fields: dict[str, object]) -> None:
    for one in LoadBalancingScope:
        expected = [] if one is scope else ["a"]
        assert names(service(LoadBalancingMode.STRICT, one), here("a", **fields)) == expected


def test_the_network_in_first_place_outranks_all_else_and_the_rest_still_counts_beyond_it() -> None:
    failover = service(LoadBalancingMode.FAILOVER, NETWORK, REGION, ZONE)
    ranked = [
        here("on-5"),
        here("on-4", locality=Locality("r1", "z2")),
        here("on-3", locality=Locality("r2", "z1")),
        here("off-2", network="far"),
        here("off-1", network="far", locality=Locality("r1", "z2")),
        here("off-0", network="far", locality=Locality("r2", "z1")),
    ]
    for first in range(len(ranked)):
        assert names(failover, *ranked[first:]) == [ranked[first].name]


def test_strict_demands_the_network_too() -> None:
    strict = service(LoadBalancingMode.STRICT, NETWORK, REGION)
    assert names(strict, here("here"), here("far", network="far")) == ["here"]


# The choice


def picks(*capacities: int) -> PickList:
    return PickList(tuple(Candidate(workload(str(number), capacity=capacity), 80) for number, capacity in enumerate(capacities)), "")


def counts(of: PickList, times: int) -> Counter[str]:
    rng = random.Random(7)
    return Counter(chosen.workload.name for _ in range(times) if (chosen := of.pick(rng)) is not None)


def test_equal_capacities_are_chosen_equally_often() -> None:
    assert all(900 < count < 1100 for count in counts(picks(1, 1, 1), 3000).values())


def test_capacities_weigh() -> None:
    counted = counts(picks(1, 3, 6), 10_000)
    assert 900 < counted["0"] < 1100
    assert 2800 < counted["1"] < 3200
    assert 5700 < counted["2"] < 6300


def test_nothing_is_chosen_of_nothing() -> None:
    assert picks().pick(random.Random(1)) is None


def test_the_ends_of_the_random_range_choose_the_ends_of_the_list() -> None:
    class Fixed(random.Random):
        def __init__(self, value: float) -> None:
            super().__init__()
            self._value = value

        def random(self) -> float:
            return self._value

    for of in (picks(1, 1, 1), picks(5, 2, 1)):
        first, last = of.pick(Fixed(0.0)), of.pick(Fixed(1.0 - 2**-53))
        assert first is of.candidates[0]
        assert last is of.candidates[-1]

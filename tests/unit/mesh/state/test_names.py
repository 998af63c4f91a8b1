"""Which service a name means, by ztunnel's cases."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from mesh.model.address import GatewayAddress, NamespacedHostname, NetworkAddress, parse_ip
from mesh.model.service import HealthPolicy, IpFamilies, LoadBalancing, Service, Visibility
from mesh.model.workload import HealthStatus, Workload
from mesh.state.names import Naming, addresses_of, find_named_service
from mesh.state.store import Delta, MeshState

NAMING = Naming(preferred_namespace="preferred")


def service(name: str, namespace: str, *vips: str, host: str = "", network: str = "", **fields: object) -> Service:
    hostname = host or f"{name}.{namespace}.svc.cluster.local"
    addresses = tuple(NetworkAddress(network, parse_ip(vip)) for vip in vips)
    return replace(Service(name, namespace, hostname, addresses), **fields)


def workload(name: str, *ips: str, of: Service | None = None, **fields: object) -> Workload:
    services = {of.key: ()} if of is not None else {}
    base = Workload(f"Kubernetes//Pod/ns1/{name}", name, "ns1", tuple(parse_ip(ip) for ip in ips), services=services)
    return replace(base, **fields)


CLIENT = workload("client", "10.0.0.9")
HEADLESS = service("headless", "ns1")
MESH = Delta(
    services=(
        service("web", "ns1", "10.1.0.1", "fd00::1"),
        service("web", "ns2", "10.1.0.2"),
        service("pod", "ns1", "10.1.0.3", host="db-0.db.ns1.svc.cluster.local"),
        service("out", "ns1", "240.240.0.1", host="www.example.com"),
        service("wild", "ns1", "240.240.0.2", host="*.example.com"),
        service("wilder", "ns1", "240.240.0.3", host="*.com"),
        service("upper", "ns1", "240.240.0.4", host="Upper.Example.ORG"),
        service("nameless", "ns1", host="no-vip.example.net"),
        service("secret", "ns2", "240.240.0.5", host="secret.example.net", visibility=Visibility.NAMESPACE),
        *(service("many", ns, f"240.240.1.{n}", host="many.example.net") for n, ns in enumerate(("ns1", "ns2", "preferred", "zoo"))),
        *(
            service("two", ns, f"240.240.2.{n}", host="two.example.net", canonical=ns == "zoo")
            for n, ns in enumerate(("ns2", "preferred", "zoo"))
        ),
        *(service("three", ns, f"240.240.3.{n}", host="three.example.net") for n, ns in enumerate(("aaa", "preferred"))),
        HEADLESS,
    ),
    workloads=(CLIENT,),
)


@pytest.fixture
def state() -> MeshState:
    made = MeshState()
    made.apply(MESH)
    return made


def found(state: MeshState, name: str, namespace: str = "ns1") -> tuple[str, int] | None:
    named = find_named_service(state, name, namespace, NAMING)
    return (str(named.service.key), named.kept) if named is not None else None


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("web", "ns1/web.ns1.svc.cluster.local"),
        ("web.ns1", "ns1/web.ns1.svc.cluster.local"),
        ("web.ns2", "ns2/web.ns2.svc.cluster.local"),
        ("web.ns2.svc", "ns2/web.ns2.svc.cluster.local"),
        ("web.ns2.svc.cluster.local", "ns2/web.ns2.svc.cluster.local"),
        ("web.ns2.svc.cluster", None),
        ("web.svc", None),
        ("nobody", None),
        ("nobody.ns1.svc.cluster.local", None),
        ("db-0.db", "ns1/db-0.db.ns1.svc.cluster.local"),
        ("db-0.db.ns1", "ns1/db-0.db.ns1.svc.cluster.local"),
        ("db-0.db.ns1.svc", "ns1/db-0.db.ns1.svc.cluster.local"),
        ("headless", "ns1/headless.ns1.svc.cluster.local"),
        ("www.example.com", "ns1/www.example.com"),
        ("other.example.com", "ns1/*.example.com"),
        ("a.b.example.com", "ns1/*.example.com"),
        ("example.com", "ns1/*.com"),
        ("com", None),
        ("upper.example.org", "ns1/Upper.Example.ORG"),
        ("no-vip.example.net", None),
    ],
)
def test_names_mean_services(state: MeshState, name: str, key: str | None) -> None:
    assert found(state, name) == (None if key is None else (key, 0))


@pytest.mark.parametrize(
    ("name", "namespace", "key", "kept"),
    [
        # What a resolver makes of a name with ndots: without the search domain it is an alias of the name that was meant...
        ("www.example.com.ns1.svc.cluster.local", "ns1", "ns1/www.example.com", 3),
        ("www.example.com.svc.cluster.local", "ns1", "ns1/www.example.com", 3),
        ("www.example.com.cluster.local", "ns1", "ns1/www.example.com", 3),
        ("web.ns2.ns1.svc.cluster.local", "ns1", "ns2/web.ns2.svc.cluster.local", 2),
        ("web.svc.cluster.local", "ns1", "ns1/web.ns1.svc.cluster.local", 1),
        # ...a full name is none, nor is one that a wildcard answers for...
        ("web.ns1.svc.cluster.local", "ns1", "ns1/web.ns1.svc.cluster.local", 0),
        ("other.example.com.ns1.svc.cluster.local", "ns1", "ns1/*.example.com", 0),
        # ...and the search domain is the client's own.
        ("www.example.com.ns1.svc.cluster.local", "ns2", None, 0),
        ("web.ns1.svc.cluster.local", "ns2", "ns1/web.ns1.svc.cluster.local", 0),
        ("web", "ns2", "ns2/web.ns2.svc.cluster.local", 0),
        ("web", "ns3", None, 0),
    ],
)
def test_search_domains_are_seen_through(state: MeshState, name: str, namespace: str, key: str | None, kept: int) -> None:
    assert found(state, name, namespace) == (None if key is None else (key, kept))


@pytest.mark.parametrize(
    ("name", "namespace", "winner"),
    [
        ("many.example.net", "ns2", "ns2"),
        ("many.example.net", "zoo", "zoo"),
        ("many.example.net", "elsewhere", "preferred"),
        ("two.example.net", "elsewhere", "zoo"),
        ("three.example.net", "elsewhere", "preferred"),
        ("secret.example.net", "ns2", "ns2"),
        ("secret.example.net", "ns1", None),
    ],
)
def test_of_several_services_one_is_meant(state: MeshState, name: str, namespace: str, winner: str | None) -> None:
    assert found(state, name, namespace) == (None if winner is None else (f"{winner}/{name}", 0))


def test_without_a_preferred_namespace_the_first_is_meant(state: MeshState) -> None:
    named = find_named_service(state, "three.example.net", "elsewhere", Naming())
    assert named is not None
    assert named.service.namespace == "aaa"


def test_a_host_whose_endpoints_nobody_can_dial_is_left_to_the_outside(state: MeshState) -> None:
    outside = service("api", "ns1", "240.240.9.1", host="api.example.net")
    by_name = workload("api", of=outside, hostname="api.example.net")
    state.apply(Delta(services=(outside,)))
    assert found(state, "api.example.net") == ("ns1/api.example.net", 0), "without endpoints it is the mesh's to say so"
    state.apply(Delta(workloads=(by_name,)))
    assert found(state, "api.example.net") is None
    waypoint = GatewayAddress(NamespacedHostname("ns1", "waypoint.ns1.svc.cluster.local"))
    state.apply(Delta(services=(replace(outside, waypoint=waypoint),)))
    assert found(state, "api.example.net") == ("ns1/api.example.net", 0), "a waypoint looks it up"
    state.apply(Delta(services=(outside,), workloads=(workload("other", "10.0.0.1", of=outside),)))
    assert found(state, "api.example.net") == ("ns1/api.example.net", 0), "one endpoint can be dialled"


def test_another_cluster_domain() -> None:
    state = MeshState()
    state.apply(Delta(services=(service("web", "ns1", "10.1.0.1", host="web.ns1.svc.example.test"),)))
    for name in ("web", "web.ns1.svc.example.test"):
        assert find_named_service(state, name, "ns1", Naming("example.test")) is not None
        assert find_named_service(state, name, "ns1", Naming()) is None or name != "web"


def addresses(state: MeshState, named: Service, version: int, client: Workload = CLIENT, naming: Naming = NAMING) -> tuple[list[str], str]:
    answer = addresses_of(state, named, client, version, naming)
    return sorted(map(str, answer.ips)), answer.because


def test_a_service_answers_with_its_addresses_of_the_family() -> None:
    web = service("web", "ns1", "10.1.0.1", "fd00::1")
    assert addresses(MeshState(), web, 4) == (["10.1.0.1"], "success")
    assert addresses(MeshState(), web, 6) == (["fd00::1"], "success")
    assert addresses(MeshState(), service("web", "ns1", "10.1.0.1"), 6) == ([], "no records")
    assert addresses(MeshState(), web, 6, naming=Naming(ipv6=False)) == ([], "service does not support this record type")


def test_addresses_on_other_networks_are_not_told() -> None:
    two = replace(
        service("web", "ns1"), addresses=(NetworkAddress("", parse_ip("10.1.0.1")), NetworkAddress("other", parse_ip("10.1.0.2")))
    )
    assert addresses(MeshState(), two, 4) == (["10.1.0.1"], "success")
    assert addresses(MeshState(), two, 4, replace(CLIENT, network="other")) == (["10.1.0.2"], "success")
    assert addresses(MeshState(), two, 4, replace(CLIENT, network="third")) == ([], "no records")


def test_a_headless_service_answers_with_one_address_of_every_ready_endpoint(state: MeshState) -> None:
    state.apply(
        Delta(
            workloads=(
                workload("a", "10.0.0.1", "fd00::a", of=HEADLESS),
                workload("b", "10.0.0.2", "10.0.0.22", of=HEADLESS),
                workload("host", "10.0.0.2", of=HEADLESS),
                workload("sick", "10.0.0.3", of=HEADLESS, status=HealthStatus.UNHEALTHY),
                workload("elsewhere", "10.0.0.4"),
            )
        )
    )
    assert addresses(state, HEADLESS, 4) == (["10.0.0.1", "10.0.0.2"], "success")
    assert addresses(state, HEADLESS, 6) == (["fd00::a"], "success")
    single = replace(HEADLESS, ip_families=IpFamilies.IPV4_ONLY)
    assert addresses(state, single, 6) == ([], "service does not support this record type")
    assert addresses(state, replace(HEADLESS, ip_families=IpFamilies.IPV6_ONLY), 4)[0] == []
    unready = replace(HEADLESS, load_balancing=LoadBalancing(health_policy=HealthPolicy.ALLOW_ALL))
    assert addresses(state, unready, 4) == (["10.0.0.1", "10.0.0.2", "10.0.0.3"], "success")


def test_a_headless_service_without_endpoints_has_no_records(state: MeshState) -> None:
    assert addresses(state, HEADLESS, 4) == ([], "no records")


def test_every_change_that_can_change_an_answer_is_another_generation() -> None:
    state = MeshState()
    seen = {state.generation}
    web = service("web", "ns1", "10.1.0.1")
    for delta in (
        Delta(services=(web,)),
        Delta(workloads=(workload("a", "10.0.0.1", of=web),)),
        Delta(services=(replace(web, canonical=True),)),
        Delta(removed_addresses=("Kubernetes//Pod/ns1/a",)),
        Delta(removed_addresses=(str(NamespacedHostname("ns1", "web.ns1.svc.cluster.local")),)),
    ):
        state.apply(delta)
        assert state.generation not in seen
        seen.add(state.generation)
    state.apply(Delta(removed_addresses=("Kubernetes//Pod/ns1/a",)))
    assert state.generation in seen

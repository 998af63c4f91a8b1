"""The state's look-ups, by ztunnel's semantics."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from mesh.model.address import GatewayAddress, NamespacedHostname, NetworkAddress, parse_cidr, parse_ip
from mesh.model.identity import SpiffeId
from mesh.model.policy import Action, Policy, Rule, Scope
from mesh.model.service import CidrVip, Service, ServicePort, Visibility
from mesh.model.workload import NetworkMode, PortMapping, TunnelProtocol, Workload
from mesh.state.balance import Wanted
from mesh.state.store import Changes, Delta, MeshState

HOST = NamespacedHostname("default", "server.default.svc.cluster.local")


def workload(name: str, *ips: str, kind: str = "/Pod", **fields: object) -> Workload:
    base = Workload(f"Kubernetes/{kind}/default/{name}", name, "default", tuple(parse_ip(ip) for ip in ips))
    return replace(base, **fields)


def service(name: str = "server", namespace: str = "default", *vips: str, **fields: object) -> Service:
    base = Service(
        name,
        namespace,
        f"{name}.default.svc.cluster.local",
        tuple(NetworkAddress("", parse_ip(vip)) for vip in vips),
        ports=(ServicePort(80, 8080),),
    )
    return replace(base, **fields)


def policy(name: str, namespace: str = "default", scope: Scope = Scope.NAMESPACE, *rules: Rule) -> Policy:
    return Policy(name, namespace, scope, Action.ALLOW, rules)


def at(ip: str, network: str = "") -> NetworkAddress:
    return NetworkAddress(network, parse_ip(ip))


def state_of(*things: Workload | Service | Policy) -> MeshState:
    state = MeshState()
    state.apply(
        Delta(
            tuple(thing for thing in things if isinstance(thing, Workload)),
            tuple(thing for thing in things if isinstance(thing, Service)),
            tuple(thing for thing in things if isinstance(thing, Policy)),
        )
    )
    return state


# Workloads


def test_a_workload_is_found_by_uid_and_by_each_address() -> None:
    server = workload("server", "10.0.0.1", "fd00::1")
    state = state_of(server)
    assert state.find_workload(server.uid) is server
    assert state.find_workload_at(at("10.0.0.1")) is server
    assert state.find_workload_at(at("fd00::1")) is server
    assert state.find_workload_at(at("10.0.0.1", "other")) is None
    assert list(state.workloads()) == [server]


def test_of_workloads_with_one_address_a_pod_goes_first_then_hbone() -> None:
    entry = workload("a", "10.0.0.1", kind="networking.istio.io/WorkloadEntry", tunnel_protocol=TunnelProtocol.HBONE)
    plain = workload("b", "10.0.0.1")
    hbone = workload("c", "10.0.0.1", tunnel_protocol=TunnelProtocol.HBONE)
    for order in ((entry, plain, hbone), (hbone, plain, entry)):
        assert state_of(*order).find_workload_at(at("10.0.0.1")) is hbone
    assert state_of(entry, plain).find_workload_at(at("10.0.0.1")) is plain


def test_a_workload_on_the_hosts_network_is_not_found_by_its_address() -> None:
    host = workload("host", "10.0.0.1", network_mode=NetworkMode.HOST_NETWORK)
    state = state_of(host)
    assert state.find_workload_at(at("10.0.0.1")) is None
    assert state.find_workload(host.uid) is host


def test_the_local_workload_must_agree_in_all_three() -> None:
    here = workload("server", "10.0.0.1", service_account="sa", node="n1")
    there = replace(here, uid="other//Pod/default/server", node="n2")
    state = MeshState("n1")
    state.apply(Delta((here, there)))
    assert state.find_local_workload("default", "server", "sa") is here
    assert state.find_local_workload("default", "server", "default") is None
    assert state.find_local_workload("other", "server", "sa") is None
    assert state.find_local_workload("default", "client", "sa") is None


def test_without_a_node_every_workload_may_be_local() -> None:
    server = workload("server", node="n7")
    assert state_of(server).find_local_workload("default", "server", "default") is server


def test_a_peer_is_the_workload_at_its_address_that_has_its_identity() -> None:
    one = workload("one", "10.0.0.1", service_account="a")
    two = workload("two", "10.0.0.1", service_account="b")
    state = state_of(one, two)
    ip = parse_ip("10.0.0.1")
    assert state.find_workload_of_peer(ip, "", SpiffeId("cluster.local", "default", "b")) is two
    assert state.find_workload_of_peer(ip, "", SpiffeId("cluster.local", "default", "waypoint")) is None
    assert state.find_workload_of_peer(ip, "", None) is one


def test_a_workload_is_found_by_a_hostname_of_its_own() -> None:
    named = workload("named", hostname="db.example")
    state = state_of(named, workload("unnamed"))
    assert state.find_workload_by_hostname("db.example") is named
    assert state.find_workload_by_hostname("") is None


# Services


def test_a_service_is_found_by_name_and_virtual_address() -> None:
    server = service("server", "default", "10.96.0.1")
    state = state_of(server)
    assert state.find_service(HOST) is server
    assert state.find_service_at(at("10.96.0.1"), "default") is server
    assert state.find_service_at(at("10.96.0.1", "other"), "default") is None
    assert list(state.services()) == [server]


def test_a_shared_virtual_address_means_the_own_namespace_then_the_canonical_then_the_first() -> None:
    shared = [service("s", namespace, "10.96.0.1") for namespace in ("c", "a", "b")]
    canonical = service("s", "x", "10.96.0.1", canonical=True)
    plain = state_of(*shared)
    assert plain.find_service_at(at("10.96.0.1"), "b") is shared[2]
    assert plain.find_service_at(at("10.96.0.1"), "elsewhere") is shared[1]
    with_canonical = state_of(*shared, canonical)
    assert with_canonical.find_service_at(at("10.96.0.1"), "b") is shared[2]
    assert with_canonical.find_service_at(at("10.96.0.1"), "elsewhere") is canonical


def test_a_shared_hostname_has_the_same_order() -> None:
    shared = [service("s", namespace) for namespace in ("c", "a", "b")]
    canonical = service("s", "x", canonical=True)
    state = state_of(*shared, canonical)
    found = state.find_services_by_hostname("s.default.svc.cluster.local", "b")
    assert [one.namespace for one in found] == ["b", "x", "a", "c"]
    assert state.find_services_by_hostname("t.default.svc.cluster.local", "b") == []


def test_a_service_visible_in_its_namespace_does_not_exist_for_others() -> None:
    private = service("s", "a", "10.96.0.1", visibility=Visibility.NAMESPACE, canonical=True)
    public = service("s", "b", "10.96.0.1")
    state = state_of(private, public)
    assert state.find_service_at(at("10.96.0.1"), "a") is private
    assert state.find_service_at(at("10.96.0.1"), "z") is public
    assert state.find_services_by_hostname("s.default.svc.cluster.local", "z") == [public]
    assert state_of(private).find_service_at(at("10.96.0.1"), "z") is None


def ranged(name: str, namespace: str, *cidrs: str, network: str = "", **fields: object) -> Service:
    vips = tuple(CidrVip(network, parse_cidr(cidr)) for cidr in cidrs)
    return service(name, namespace, cidr_addresses=vips, **fields)


@pytest.mark.parametrize(("ip", "name"), [("10.1.2.3", "long"), ("10.2.0.1", "short"), ("11.0.0.1", None), ("fd00:1::1", "v6")])
def test_the_longest_range_is_meant(ip: str, name: str | None) -> None:
    state = state_of(ranged("short", "a", "10.0.0.0/8"), ranged("long", "a", "10.1.0.0/16"), ranged("v6", "a", "fd00::/8", "fd00:1::/32"))
    found = state.find_service_at(at(ip), "z")
    assert (found.name if found is not None else None) == name


def test_a_shorter_range_of_the_own_namespace_goes_before_a_longer_foreign_one() -> None:
    own, foreign = ranged("own", "a", "10.0.0.0/8"), ranged("foreign", "b", "10.1.0.0/16")
    state = state_of(own, foreign)
    assert state.find_service_at(at("10.1.0.1"), "a") is own
    assert state.find_service_at(at("10.1.0.1"), "z") is foreign


def test_of_equal_ranges_the_canonical_one_is_meant() -> None:
    plain, canonical = ranged("plain", "a", "10.0.0.0/8"), ranged("canonical", "b", "10.0.0.0/8", canonical=True)
    assert state_of(plain, canonical).find_service_at(at("10.1.0.1"), "z") is canonical


def test_an_exact_address_goes_before_a_range_unless_it_is_invisible() -> None:
    own_range = ranged("range", "z", "10.96.0.0/16")
    exact = service("exact", "a", "10.96.0.1")
    assert state_of(own_range, exact).find_service_at(at("10.96.0.1"), "z") is exact
    hidden = replace(exact, visibility=Visibility.NAMESPACE)
    assert state_of(own_range, hidden).find_service_at(at("10.96.0.1"), "z") is own_range
    hidden_range = replace(own_range, visibility=Visibility.NAMESPACE)
    assert state_of(hidden_range).find_service_at(at("10.96.0.1"), "a") is None


def test_a_range_belongs_to_its_network() -> None:
    state = state_of(ranged("remote", "a", "10.0.0.0/8", network="remote"))
    assert state.find_service_at(at("10.0.0.1"), "a") is None
    assert state.find_service_at(at("10.0.0.1", "remote"), "a") is not None


# Endpoints

MEMBER = {HOST: (PortMapping(80, 8080),)}


def picked(state: MeshState, source: Workload | None = None) -> list[str]:
    server = state.find_service(HOST)
    assert server is not None
    return [candidate.workload.name for candidate in state.picks(server, Wanted(80), source or workload("client")).candidates]


def test_endpoints_may_come_before_their_service() -> None:
    state = MeshState()
    state.apply(Delta((workload("server", "10.0.0.1", services=MEMBER),)))
    assert [endpoint.workload.name for endpoint in state.endpoints(HOST)] == ["server"]
    state.apply(Delta(services=(service(),)))
    assert picked(state) == ["server"]


def test_a_pick_list_is_kept_until_something_it_depends_on_changes() -> None:
    state = state_of(service(), workload("a", "10.0.0.1", services=MEMBER))
    server, client = service(), workload("client")
    before = state.picks(server, Wanted(80), client)
    state.apply(Delta((workload("stranger", "10.0.0.9"),), (service("other"),)))
    assert state.picks(server, Wanted(80), client) is before
    state.apply(Delta((workload("a", "10.0.0.1", services=MEMBER),), (service(),)))
    assert state.picks(server, Wanted(80), client) is before
    state.apply(Delta((workload("b", "10.0.0.2", services=MEMBER),)))
    assert picked(state) == ["a", "b"]
    state.apply(Delta((workload("a", "10.0.0.1"),)))
    assert picked(state) == ["b"]
    state.apply(Delta(removed_addresses=(workload("b").uid,)))
    assert picked(state) == []


def test_a_service_that_changes_makes_new_pick_lists() -> None:
    state = state_of(service(), workload("a", "10.0.0.1", services={HOST: ()}))
    client = workload("client")
    assert [one.target_port for one in state.picks(service(), Wanted(80), client).candidates] == [8080]
    moved = service("server", "default", ports=(ServicePort(80, 9090),))
    state.apply(Delta(services=(moved,)))
    assert [one.target_port for one in state.picks(moved, Wanted(80), client).candidates] == [9090]


def test_ports_that_nobody_offers_leave_nothing_behind() -> None:
    state = state_of(service(), workload("a", "10.0.0.1", services=MEMBER))
    server = state.find_service(HOST)
    assert server is not None
    one, other = (state.picks(server, Wanted(port), workload("client")) for port in (81, 82))
    assert one is not other
    assert state.picks(server, Wanted(81), workload("client")).because == "it has no port 81"


@pytest.mark.parametrize(
    ("port", "hostname", "name"),
    [
        (8080, None, "alpha"),
        (8080, "beta.default.svc.cluster.local", "beta"),
        (8080, "foreign.example", "alpha"),
        (9090, None, "beta"),
        (7070, None, None),
        (7070, "alpha.default.svc.cluster.local", "alpha"),
    ],
)
def test_the_destination_service_is_the_one_named_or_the_first_that_leads_to_the_port(
    port: int, hostname: str | None, name: str | None
) -> None:
    alpha, beta = service("alpha"), service("beta", "default", ports=(ServicePort(80, 8080), ServicePort(81, 0)))
    server = workload("server", services={alpha.key: (), beta.key: (PortMapping(81, 9090),)})
    state = state_of(alpha, beta, service("foreign"), server)
    found = state.find_destination_service(server, port, hostname)
    assert (found.name if found is not None else None) == name


@pytest.mark.parametrize(
    ("destination", "expected"),
    [
        (HOST, True),
        (NamespacedHostname("default", "other.example"), False),
        (NamespacedHostname("any", "waypoint.example"), True),
        (at("10.96.0.1"), True),
        (at("10.0.0.1"), True),
        (at("10.0.0.2"), False),
        (at("10.0.0.1", "remote"), False),
    ],
)
def test_a_gateway_is_named_by_service_or_hostname_or_either_address(
    destination: NetworkAddress | NamespacedHostname, expected: bool
) -> None:
    waypoint = workload("waypoint", "10.0.0.1", hostname="waypoint.example", services=MEMBER)
    state = state_of(waypoint, service("server", "default", "10.96.0.1"))
    assert state.is_gateway(waypoint, GatewayAddress(destination)) is expected


# Policies


def test_global_namespace_and_named_policies_apply() -> None:
    everywhere = policy("everywhere", "istio-system", Scope.GLOBAL)
    here = policy("here")
    named = policy("named", "default", Scope.WORKLOAD_SELECTOR)
    state = state_of(everywhere, here, named, policy("there", "elsewhere"), policy("unnamed", "default", Scope.WORKLOAD_SELECTOR))
    server = workload("server", authorization_policies=("default/named",))
    assert state.policies_for(server).policies == (here, named, everywhere)
    assert state.policies_for(server).unresolved == ()
    assert state.find_policy("default/named") is named
    assert len(list(state.policies())) == 5


def test_a_policy_found_twice_applies_once() -> None:
    state = state_of(policy("here"))
    server = workload("server", authorization_policies=("default/here", "default/here"))
    assert [one.key for one in state.policies_for(server).policies] == ["default/here"]


def test_a_named_policy_that_has_not_arrived_is_unresolved_until_it_does() -> None:
    state = MeshState()
    server = workload("server", authorization_policies=("default/late",))
    assert state.policies_for(server).unresolved == ("default/late",)
    late = policy("late", "default", Scope.WORKLOAD_SELECTOR)
    state.apply(Delta(policies=(late,)))
    assert state.policies_for(server).policies == (late,)
    assert state.policies_for(server).unresolved == ()
    state.apply(Delta(removed_policies=("default/late",)))
    assert state.policies_for(server).unresolved == ("default/late",)


def test_applied_policies_stay_the_same_object_until_they_change() -> None:
    state = state_of(policy("here"))
    server, other = workload("server"), replace(workload("other"), namespace="elsewhere")
    before, before_other = state.policies_for(server), state.policies_for(other)
    state.apply(Delta((workload("new", "10.0.0.9"),), policies=(policy("there", "elsewhere"), policy("here"))))
    assert state.policies_for(server) is before
    assert state.policies_for(other) is not before_other
    state.apply(Delta(policies=(policy("here", "default", Scope.NAMESPACE, Rule()),)))
    assert state.policies_for(server) is not before


def test_another_list_of_policies_gives_other_applied_policies() -> None:
    state = state_of(policy("named", "default", Scope.WORKLOAD_SELECTOR))
    server = workload("server")
    before = state.policies_for(server)
    assert state.policies_for(replace(server, authorization_policies=("default/named",))) is not before


# Change


def test_changes_name_what_really_changed() -> None:
    state = MeshState()
    server, svc, pol = workload("server", "10.0.0.1"), service(), policy("here")
    everything = Changes(frozenset({server.uid}), frozenset({HOST}), frozenset({"default/here"}))
    assert state.apply(Delta((server,), (svc,), (pol,))) == everything
    again = state.apply(Delta((workload("server", "10.0.0.1"),), (service(),), (policy("here"),)))
    assert again == Changes()
    assert not again
    assert not again.policies_changed
    assert state.find_workload(server.uid) is server
    removed = state.apply(Delta(removed_addresses=(server.uid, str(HOST), "unknown", "un/known"), removed_policies=("default/here", "x/y")))
    assert removed == everything
    assert removed.policies_changed


def test_what_is_removed_is_found_no_more() -> None:
    server = workload("server", "10.0.0.1", hostname="db.example", services=MEMBER)
    state = state_of(server, service("server", "default", "10.96.0.1"), ranged("r", "default", "10.97.0.0/16"))
    state.apply(Delta(removed_addresses=(server.uid, str(HOST), "default/r.default.svc.cluster.local")))
    assert state.find_workload_at(at("10.0.0.1")) is None
    assert state.find_workload_by_hostname("db.example") is None
    assert state.find_local_workload("default", "server", "default") is None
    assert list(state.endpoints(HOST)) == []
    assert state.find_service_at(at("10.96.0.1"), "default") is None
    assert state.find_service_at(at("10.97.0.1"), "default") is None
    assert state.find_services_by_hostname(HOST.hostname, "default") == []


def test_a_workload_that_moves_is_found_at_its_new_address_only() -> None:
    state = state_of(workload("server", "10.0.0.1"))
    moved = workload("server", "10.0.0.2")
    state.apply(Delta((moved,)))
    assert state.find_workload_at(at("10.0.0.1")) is None
    assert state.find_workload_at(at("10.0.0.2")) is moved


def test_what_is_removed_and_given_in_one_delta_is_there() -> None:
    server = workload("server", "10.0.0.1")
    state = state_of(server)
    state.apply(Delta((server,), removed_addresses=(server.uid,)))
    assert state.find_workload_at(at("10.0.0.1")) is server


def test_replacing_the_whole_set_removes_what_is_absent() -> None:
    old, kept = workload("old", "10.0.0.1"), workload("kept", "10.0.0.2")
    state = state_of(old, kept, service(), policy("old"), policy("kept"))
    new = workload("new", "10.0.0.3")
    changes = state.replace(Delta((workload("kept", "10.0.0.2"), new), policies=(policy("kept"),)), addresses=True, policies=True)
    assert changes == Changes(frozenset({old.uid, new.uid}), frozenset({HOST}), frozenset({"default/old"}))
    assert {one.name for one in state.workloads()} == {"kept", "new"}
    assert state.find_workload(kept.uid) is kept
    assert list(state.services()) == []
    assert [one.name for one in state.policies()] == ["kept"]


def test_replacing_one_kind_leaves_the_other_alone() -> None:
    state = state_of(workload("w", "10.0.0.1"), policy("p"))
    state.replace(Delta(), addresses=False, policies=True)
    assert list(state.policies()) == []
    assert [one.name for one in state.workloads()] == ["w"]
    state.replace(Delta(), addresses=True, policies=False)
    assert list(state.workloads()) == []

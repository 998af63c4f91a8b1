"""The state under arbitrary deltas: its indices equal a rebuild, and no question makes it raise."""

from __future__ import annotations

import random
from collections.abc import Hashable

from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.model.address import GatewayAddress, NamespacedHostname, NetworkAddress, SocketAddress, parse_cidr, parse_ip
from mesh.model.identity import SpiffeId
from mesh.model.policy import Action, Policy, Rule, Scope
from mesh.model.route import Direct, Refusal, Tunnel
from mesh.model.service import (
    CidrVip,
    HealthPolicy,
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
    Locality,
    NetworkMode,
    PortMapping,
    TunnelApplicationProtocol,
    TunnelProtocol,
    Workload,
)
from mesh.state.balance import Wanted
from mesh.state.inbound import InboundRefusal, InboundTarget, resolve_inbound
from mesh.state.resolve import resolve
from mesh.state.store import Changes, Delta, MeshState

# A small world, so that its parts meet: names, addresses and ports from short lists.
NAMESPACES = ["default", "other"]
NETWORKS = ["", "far"]
IPS = [parse_ip(text) for text in ("10.0.0.1", "10.0.0.2", "10.96.0.1", "fd00::1")]
HOSTS = ["s.example", "t.example", "w.example"]
KEYS = [NamespacedHostname(namespace, host) for namespace in NAMESPACES for host in HOSTS]
UIDS = ["c//Pod/default/a", "c//Pod/other/b", "c//Pod/default/c", "c/networking.istio.io/WorkloadEntry/default/d"]
POLICY_KEYS = ["default/p", "default/q", "other/p"]
PORTS = [80, 81, 15008]
TARGETS = [SocketAddress(ip, port) for ip in (*IPS, parse_ip("10.97.3.4"), parse_ip("127.0.0.1")) for port in PORTS]

network_addresses = st.builds(NetworkAddress, st.sampled_from(NETWORKS), st.sampled_from(IPS))
gateways = st.builds(GatewayAddress, st.one_of(network_addresses, st.sampled_from(KEYS)), st.sampled_from([15008, 15009]))
mappings = st.lists(st.builds(PortMapping, st.sampled_from(PORTS), st.sampled_from([0, 8080])), max_size=2).map(tuple)


def named(uid: str) -> dict[str, str]:
    namespace, name = uid.split("/")[-2:]
    return {"uid": uid, "namespace": namespace, "name": name}


workloads = st.builds(
    lambda identity, fields: Workload(**identity, **fields),
    st.sampled_from(UIDS).map(named),
    st.fixed_dictionaries(
        {
            "addresses": st.lists(st.sampled_from(IPS), max_size=2).map(tuple),
            "network": st.sampled_from(["", "", "far"]),
            "tunnel_protocol": st.sampled_from(TunnelProtocol),
        },
        optional={
            "hostname": st.sampled_from(["", "w.example"]),
            "service_account": st.sampled_from(["default", "sa"]),
            "node": st.sampled_from(["", "n1"]),
            "waypoint": st.one_of(st.none(), gateways),
            "network_gateway": st.one_of(st.none(), gateways),
            "application_tunnel": st.one_of(
                st.none(), st.builds(ApplicationTunnel, st.sampled_from(TunnelApplicationProtocol), st.sampled_from([None, 15088, 15008]))
            ),
            "authorization_policies": st.lists(st.sampled_from(POLICY_KEYS), max_size=2).map(tuple),
            "status": st.sampled_from(HealthStatus),
            "locality": st.builds(Locality, st.sampled_from(["", "r"]), st.sampled_from(["", "z"])),
            "network_mode": st.sampled_from(NetworkMode),
            "services": st.dictionaries(st.sampled_from(KEYS), mappings, max_size=2),
            "capacity": st.sampled_from([0, 1, 3]),
        },
    ),
)
services = st.builds(
    Service,
    name=st.just("svc"),
    namespace=st.sampled_from(NAMESPACES),
    hostname=st.sampled_from(HOSTS),
    addresses=st.lists(network_addresses, max_size=2).map(tuple),
    cidr_addresses=st.lists(
        st.builds(
            CidrVip, st.sampled_from(NETWORKS), st.sampled_from([parse_cidr("10.96.0.0/15"), parse_cidr("10.0.0.0/8"), parse_cidr("::/0")])
        ),
        max_size=2,
    ).map(tuple),
    ports=st.lists(st.builds(ServicePort, st.sampled_from(PORTS), st.sampled_from([0, 8080, 15008])), max_size=2).map(tuple),
    subject_alt_names=st.sampled_from([(), ("spiffe://td/ns/a/sa/b", "nonsense")]),
    waypoint=st.one_of(st.none(), gateways),
    weighted_waypoints=st.lists(st.builds(WeightedWaypoint, gateways, st.sampled_from([0, 2])), max_size=2).map(tuple),
    load_balancing=st.one_of(
        st.none(),
        st.builds(
            LoadBalancing,
            st.lists(st.sampled_from(LoadBalancingScope), max_size=3).map(tuple),
            st.sampled_from(LoadBalancingMode),
            st.sampled_from(HealthPolicy),
        ),
    ),
    ip_families=st.sampled_from(IpFamilies),
    canonical=st.booleans(),
    visibility=st.sampled_from(Visibility),
)
policies = st.builds(
    lambda key, scope, rules: Policy(key.split("/")[1], key.split("/")[0], scope, Action.ALLOW, rules),
    st.sampled_from(POLICY_KEYS),
    st.sampled_from(Scope),
    st.sampled_from([(), (Rule(),)]),
)
deltas = st.builds(
    Delta,
    st.lists(workloads, max_size=3).map(tuple),
    st.lists(services, max_size=3).map(tuple),
    st.lists(policies, max_size=2).map(tuple),
    st.lists(st.sampled_from([*UIDS, *map(str, KEYS), "unknown", "un/known", "a/b/c"]), max_size=2).map(tuple),
    st.lists(st.sampled_from([*POLICY_KEYS, "un/known"]), max_size=1).map(tuple),
)
# A delta, and whether it stands for everything.
steps = st.lists(st.tuples(deltas, st.booleans()), max_size=4)


def take(state: MeshState, step: tuple[Delta, bool]) -> Changes:
    delta, whole = step
    return state.replace(delta, addresses=True, policies=True) if whole else state.apply(delta)


def rebuilt(state: MeshState, node: str | None) -> MeshState:
    """A state that came to know everything at once, in another order."""
    fresh = MeshState(node)
    fresh.apply(Delta(tuple(state.workloads())[::-1], tuple(state.services())[::-1], tuple(state.policies())[::-1]))
    return fresh


def answers(state: MeshState) -> dict[Hashable, object]:
    """Everything that can be asked of it."""
    everything: dict[Hashable, object] = {}
    for network in NETWORKS:
        for ip in (*IPS, parse_ip("10.97.3.4"), parse_ip("fd99::")):
            address = NetworkAddress(network, ip)
            everything["workload at", address] = state.find_workload_at(address)
            for namespace in NAMESPACES:
                everything["service at", address, namespace] = state.find_service_at(address, namespace)
                for account in ("default", "sa"):
                    identity = SpiffeId("cluster.local", namespace, account)
                    everything["peer", address, identity] = state.find_workload_of_peer(ip, network, identity)
    for uid in UIDS:
        everything["workload", uid] = state.find_workload(uid)
        for account in ("default", "sa"):
            namespace, name = uid.split("/")[-2:]
            everything["local", uid, account] = state.find_local_workload(namespace, name, account)
    for host in HOSTS:
        everything["workload named", host] = state.find_workload_by_hostname(host)
        for namespace in NAMESPACES:
            everything["services named", host, namespace] = state.find_services_by_hostname(host, namespace)
    for key in KEYS:
        service = state.find_service(key)
        everything["service", key] = service
        everything["endpoints", key] = {endpoint.workload.uid: endpoint for endpoint in state.endpoints(key)}
        for workload in state.workloads() if service is not None else ():
            for port in PORTS:
                for waypoint in (False, True):
                    assert service is not None
                    everything["picks", key, workload.uid, port, waypoint] = state.picks(service, Wanted(port, waypoint), workload)
    for workload in state.workloads():
        everything["policies for", workload.uid] = state.policies_for(workload)
        everything["destination service", workload.uid] = [
            state.find_destination_service(workload, port, host) for port in (80, 8080) for host in (None, *HOSTS)
        ]
    for policy_key in POLICY_KEYS:
        everything["policy", policy_key] = state.find_policy(policy_key)
    return everything


@settings(deadline=None, max_examples=60)
@given(steps, st.sampled_from([None, "n1"]))
def test_after_any_deltas_the_indices_equal_a_rebuild(taken: list[tuple[Delta, bool]], node: str | None) -> None:
    state = MeshState(node)
    for step in taken:
        answers(state)  # what is kept for the next question must not outlive its truth
        take(state, step)
    assert answers(state) == answers(rebuilt(state, node))


@settings(deadline=None)
@given(steps, st.tuples(deltas, st.booleans()))
def test_changes_name_exactly_what_differs(taken: list[tuple[Delta, bool]], last: tuple[Delta, bool]) -> None:
    state = MeshState()
    for step in taken:
        take(state, step)
    before = contents(state)
    changes = take(state, last)
    after = contents(state)
    differing = {name for name in before | after if before.get(name) != after.get(name)}
    assert differing == {*changes.workloads, *changes.services, *(("policy", key) for key in changes.policies)}


def contents(state: MeshState) -> dict[Hashable, object]:
    return (
        {workload.uid: workload for workload in state.workloads()}
        | {service.key: service for service in state.services()}
        | {("policy", policy.key): policy for policy in state.policies()}
    )


@settings(deadline=None)
@given(steps, st.tuples(deltas, st.booleans()))
def test_applied_policies_are_the_same_object_exactly_while_they_are_equal(
    taken: list[tuple[Delta, bool]], last: tuple[Delta, bool]
) -> None:
    state = MeshState()
    for step in taken:
        take(state, step)
    before = [(workload, state.policies_for(workload)) for workload in state.workloads()]
    take(state, last)
    for workload, earlier in before:
        now = state.policies_for(workload)
        assert (earlier is now) is (earlier == now)


@settings(deadline=None)
@given(st.lists(deltas, min_size=1, max_size=3), st.integers())
def test_every_connection_gets_a_route_with_a_reason(taken: list[Delta], seed: int) -> None:
    state, rng = MeshState(), random.Random(seed)
    for delta in taken:
        state.apply(delta)
    for source in state.workloads():
        for target in TARGETS:
            route = resolve(state, source, target, rng)
            assert isinstance(route, Tunnel | Direct | Refusal)
            assert route.because
            if isinstance(route, Tunnel):
                assert route.identities
                assert route.next_hop.ip in route.workload.addresses


AUTHORITIES = st.one_of(
    st.builds("{}:{}".format, st.sampled_from([*HOSTS, *map(str, IPS), "[fd00::1]"]), st.sampled_from([*PORTS, 8080])), st.text(max_size=40)
)


@settings(deadline=None)
@given(st.lists(deltas, min_size=1, max_size=3), AUTHORITIES, st.sampled_from(IPS))
def test_every_request_gets_a_target_of_our_own_or_a_status(taken: list[Delta], authority: str, local_ip: object) -> None:
    state = MeshState()
    for delta in taken:
        state.apply(delta)
    for local in state.workloads():
        answer = resolve_inbound(state, local, authority, local_ip)
        assert answer.because
        match answer:
            case InboundTarget():
                assert answer.address.ip == local_ip
                assert answer.address.port not in (15001, 15006, 15008)
                assert (
                    answer.service is None or answer.service.key in local.services or local.application_tunnel or gateway_to(answer.service)
                )
            case InboundRefusal():
                assert answer.status in (400, 503)


def gateway_to(service: Service) -> bool:
    return service.waypoint is not None or bool(service.weighted_waypoints)

"""Messages to model values: what is refused, and what becomes a policy that denies."""

from __future__ import annotations

import gc
from functools import partial
from ipaddress import ip_address, ip_network

import pytest
import trio
from google.protobuf.any_pb2 import Any as AnyMessage

from mesh.model.address import GatewayAddress, NamespacedHostname, NetworkAddress
from mesh.model.policy import Action, Presence, Scope
from mesh.model.service import CidrVip, Service, Visibility
from mesh.model.workload import (
    ApplicationTunnel,
    HealthStatus,
    PortMapping,
    TunnelApplicationProtocol,
    TunnelProtocol,
    Workload,
    WorkloadType,
)
from mesh.wire.errors import RemoteProtocolError
from mesh.xds.client import decode, is_large
from mesh.xds.decode import InvalidResource, decode_address, decode_policy, decode_response
from mesh.xds.names import ADDRESS, AUTHORIZATION
from mesh.xds.proto import authorization_pb2 as authz
from mesh.xds.proto import discovery_pb2 as discovery
from mesh.xds.proto import workload_pb2 as wds

UNKNOWN_FIELD = b"\xf8\x07\x01"
"""Field 127, a varint."""


def _workload(**fields: object) -> Workload:
    decoded = decode_address("x", wds.Address(workload=wds.Workload(**{"uid": "u", **fields})).SerializeToString())
    assert isinstance(decoded, Workload)
    return decoded


def _service(**fields: object) -> Service:
    message = wds.Service(**{"name": "s", "namespace": "ns", "hostname": "s.ns", **fields})
    decoded = decode_address("x", wds.Address(service=message).SerializeToString())
    assert isinstance(decoded, Service)
    return decoded


def test_what_a_workload_leaves_out_has_istios_defaults() -> None:
    workload = _workload()
    assert (workload.trust_domain, workload.service_account, workload.cluster_id) == ("cluster.local", "default", "Kubernetes")
    assert (workload.capacity, workload.waypoint, workload.application_tunnel) == (1, None, None)


def test_a_workload_is_read_whole() -> None:
    workload = _workload(
        name="n",
        namespace="ns",
        addresses=[bytes([10, 0, 0, 1]), ip_address("fd00::1").packed],
        network="net",
        tunnel_protocol=1,
        workload_type=2,
        status=1,
        services={"ns/s.ns": wds.PortList(ports=[wds.Port(service_port=80, target_port=8080)])},
        application_tunnel=wds.ApplicationTunnel(protocol=1),
        waypoint=wds.GatewayAddress(address=wds.NetworkAddress(network="net", address=bytes([10, 0, 0, 9])), hbone_mtls_port=15008),
        network_gateway=wds.GatewayAddress(hostname=wds.NamespacedHostname(namespace="i", hostname="gw"), hbone_mtls_port=15009),
        capacity={"value": 7},
    )
    assert workload.addresses == (ip_address("10.0.0.1"), ip_address("fd00::1"))
    assert (workload.tunnel_protocol, workload.workload_type, workload.status) == (
        TunnelProtocol.HBONE,
        WorkloadType.POD,
        HealthStatus.UNHEALTHY,
    )
    assert workload.services == {NamespacedHostname("ns", "s.ns"): (PortMapping(80, 8080),)}
    assert workload.application_tunnel == ApplicationTunnel(TunnelApplicationProtocol.PROXY, None)
    assert workload.waypoint == GatewayAddress(NetworkAddress("net", ip_address("10.0.0.9")))
    assert workload.network_gateway == GatewayAddress(NamespacedHostname("i", "gw"), 15009)
    assert workload.capacity == 7


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"uid": ""}, "without uid"),
        ({"addresses": [b"\1\2\3"]}, "4 or 16 bytes"),
        ({"tunnel_protocol": 2}, "unknown TunnelProtocol 2"),
        ({"tunnel_protocol": 9}, "unknown TunnelProtocol 9"),
        ({"waypoint": wds.GatewayAddress(hbone_mtls_port=15008)}, "without destination"),
        ({"services": {"noslash": wds.PortList()}}, "not namespace/hostname"),
        ({"services": {"a/b": wds.PortList(ports=[wds.Port(service_port=65536)])}}, "port 65536"),
        ({"application_tunnel": wds.ApplicationTunnel(port=70000)}, "port 70000"),
    ],
)
def test_a_workload_that_cannot_be_acted_on_is_refused_by_name(fields: dict[str, object], reason: str) -> None:
    with pytest.raises(InvalidResource, match=f"^x: .*{reason}"):
        _workload(**fields)


def test_a_service_tells_addresses_from_ranges() -> None:
    service = _service(
        addresses=[
            wds.NetworkAddress(network="n", address=bytes([10, 9, 0, 1])),
            wds.NetworkAddress(network="n", address=bytes([10, 9, 0, 2]), length=32),
            wds.NetworkAddress(network="n", address=bytes([10, 9, 0, 3]), length=24),
        ]
    )
    assert service.addresses == (NetworkAddress("n", ip_address("10.9.0.1")), NetworkAddress("n", ip_address("10.9.0.2")))
    assert service.cidr_addresses == (CidrVip("n", ip_network("10.9.0.0/24")),)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"hostname": ""}, "without namespace or hostname"),
        ({"load_balancing": wds.LoadBalancing(routing_preference=[0])}, "unknown LoadBalancingScope 0"),
        ({"load_balancing": wds.LoadBalancing(mode=77)}, "unknown LoadBalancingMode 77"),
        ({"ip_families": 9}, "unknown IpFamilies 9"),
        ({"addresses": [wds.NetworkAddress(address=bytes(4), length=33)]}, "prefix length 33"),
    ],
)
def test_a_service_that_cannot_be_acted_on_is_refused_by_name(fields: dict[str, object], reason: str) -> None:
    with pytest.raises(InvalidResource, match=f"^x: .*{reason}"):
        _service(**fields)


def test_an_unknown_visibility_is_public() -> None:
    assert _service(visibility=5).visibility is Visibility.PUBLIC
    assert _service(visibility=1).visibility is Visibility.NAMESPACE


def test_an_address_of_neither_kind_is_refused() -> None:
    with pytest.raises(InvalidResource, match="neither workload nor service"):
        decode_address("x", b"")
    with pytest.raises(InvalidResource, match="not an Address"):
        decode_address("x", b"\xff\xff\xff")


def _policy_of(match: authz.Match, **fields: object) -> authz.Authorization:
    rules = [authz.Rule(clauses=[authz.Clause(matches=[match])])]
    return authz.Authorization(**{"name": "p", "namespace": "ns", "scope": 2, "rules": rules, **fields})


def test_a_readable_policy_is_itself() -> None:
    policy = decode_policy("ns/p", _policy_of(authz.Match(not_principals=[authz.StringMatch(presence={})]), action=1).SerializeToString())
    assert policy.unreadable is None
    assert (policy.key, policy.scope, policy.action) == ("ns/p", Scope.WORKLOAD_SELECTOR, Action.DENY)
    assert policy.rules[0].clauses[0].matches[0].not_principals == (Presence(),)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (_policy_of(authz.Match(source_ips=[authz.Address(address=b"\1", length=8)])), "4 or 16 bytes"),
        (_policy_of(authz.Match(not_source_ips=[authz.Address(address=bytes(4), length=33)])), "prefix length 33"),
        (_policy_of(authz.Match(destination_ports=[65536])), "port 65536"),
        (_policy_of(authz.Match(principals=[authz.StringMatch()])), "unknown kind"),
        (_policy_of(authz.Match(extensions=[wds.Extension(name="quota", config=AnyMessage())])), "a match has extension 'quota'"),
        (_policy_of(authz.Match(), extensions=[wds.Extension(name="e")]), "the policy has extension 'e'"),
        (_policy_of(authz.Match(), action=2), "unknown Action 2"),
        (_policy_of(authz.Match.FromString(UNKNOWN_FIELD)), "a match has unknown field 127"),
        (
            _policy_of(authz.Match(namespaces=[authz.StringMatch.FromString(b"\x0a\x01x" + UNKNOWN_FIELD)])),
            "string match has unknown field",
        ),
        (_policy_of(authz.Match(source_ips=[authz.Address.FromString(UNKNOWN_FIELD)])), "an address has unknown field"),
        (
            _policy_of(authz.Match(service_accounts=[authz.ServiceAccountMatch.FromString(UNKNOWN_FIELD)])),
            "account match has unknown field",
        ),
        (_policy_of(authz.Match(), rules=[authz.Rule.FromString(UNKNOWN_FIELD)]), "a rule has unknown field"),
        (_policy_of(authz.Match(), rules=[authz.Rule(clauses=[authz.Clause.FromString(UNKNOWN_FIELD)])]), "a clause has unknown field"),
        (authz.Authorization.FromString(_policy_of(authz.Match()).SerializeToString() + UNKNOWN_FIELD), "the policy has unknown field"),
    ],
)
def test_a_policy_that_cannot_be_read_whole_denies_in_its_scope(message: authz.Authorization, reason: str) -> None:
    policy = decode_policy("ns/p", message.SerializeToString())
    assert policy.unreadable is not None
    assert reason in policy.unreadable
    assert (policy.key, policy.scope) == ("ns/p", Scope.WORKLOAD_SELECTOR)


@pytest.mark.parametrize(
    "body",
    [
        b"\xff\xff\xff",
        b"",  # would say GLOBAL, which is proto3's zero
        _policy_of(authz.Match(), name="q", scope=0).SerializeToString(),
        _policy_of(authz.Match(), scope=7).SerializeToString(),
    ],
)
def test_a_policy_whose_scope_cannot_be_read_denies_in_the_namespace_of_its_name(body: bytes) -> None:
    policy = decode_policy("ns/p", body)
    assert policy.unreadable
    assert (policy.scope, policy.namespace) == (Scope.NAMESPACE, "ns")


@pytest.mark.parametrize("name", ["p", "/p", "ns/", "", "a/b/c"])
def test_a_policy_that_nothing_could_refer_to_is_refused(name: str) -> None:
    with pytest.raises(InvalidResource, match="namespace/name"):
        decode_policy(name, _policy_of(authz.Match()).SerializeToString())


def test_mapped_ranges_are_the_ipv4_ranges_they_mean() -> None:
    mapped = authz.Address(address=b"\0" * 10 + b"\xff\xff" + bytes([10, 0, 0, 0]), length=104)
    policy = decode_policy("ns/p", _policy_of(authz.Match(source_ips=[mapped])).SerializeToString())
    assert policy.rules[0].clauses[0].matches[0].source_ips == (ip_network("10.0.0.0/8"),)


def _any(type_url: str, body: bytes) -> AnyMessage:
    return AnyMessage(type_url=type_url, value=body)


def _response(type_url: str, *resources: discovery.Resource, removed: tuple[str, ...] = ()) -> bytes:
    response = discovery.DeltaDiscoveryResponse(type_url=type_url, nonce="n", resources=resources, removed_resources=removed)
    return response.SerializeToString()


def test_one_bad_resource_rejects_itself_alone() -> None:
    good = wds.Address(workload=wds.Workload(uid="good")).SerializeToString()
    bad = wds.Address(workload=wds.Workload(uid="bad", addresses=[b"1"])).SerializeToString()
    decoded = decode_response(
        _response(
            ADDRESS,
            discovery.Resource(name="good", version="1", resource=_any(ADDRESS, good)),
            discovery.Resource(name="bad", version="1", resource=_any(ADDRESS, bad)),
            removed=("gone", "ns/svc"),
        )
    )
    assert [workload.uid for workload in decoded.delta.workloads] == ["good"]
    assert decoded.delta.removed_addresses == ("gone", "ns/svc")
    assert decoded.versions == {"good": "1"}
    assert [str(each) for each in decoded.rejected] == ["bad: an IP address has 4 or 16 bytes, not 1"]


def test_an_unreadable_policy_is_taken_refused_and_asked_for_again() -> None:
    body = _policy_of(authz.Match(destination_ports=[99999])).SerializeToString()
    response = decode_response(
        _response(AUTHORIZATION, discovery.Resource(name="ns/p", version="7", resource=_any(AUTHORIZATION, body)), removed=("ns/old",))
    )
    assert response.delta.policies[0].unreadable == "port 99999"
    assert response.versions == {"ns/p": ""}  # held, so that its removal reaches us; no version, so that it is sent again
    assert str(response.rejected[0]) == "ns/p: port 99999"
    assert response.delta.removed_policies == ("ns/old",)


def test_a_resource_of_another_type_than_its_response_is_refused() -> None:
    body = _policy_of(authz.Match()).SerializeToString()
    decoded = decode_response(_response(AUTHORIZATION, discovery.Resource(name="ns/p", resource=_any(ADDRESS, body))))
    assert decoded.delta.policies[0].unreadable


def test_an_unknown_type_is_an_empty_delta_and_no_response_at_all_is_the_peers_error() -> None:
    assert decode_response(_response("type.googleapis.com/x.Y")).type_url == "type.googleapis.com/x.Y"
    with pytest.raises(RemoteProtocolError, match="DeltaDiscoveryResponse"):
        decode_response(b"\xff")


def test_replicas_share_what_is_equal_in_them() -> None:
    """At 100 000 workloads that is the difference between 100 and 200 MB, in brain and mover alike."""
    ports = wds.PortList(ports=[wds.Port(service_port=80, target_port=8080)])
    bodies = {
        name: wds.Address(workload=wds.Workload(uid=name, namespace="ns", services={"ns/web.ns.svc": ports})).SerializeToString()
        for name in ("one", "other")
    }
    raw = _response(ADDRESS, *(discovery.Resource(name=name, version="1", resource=_any(ADDRESS, body)) for name, body in bodies.items()))
    decoded = decode_response(raw)
    one, other = decoded.delta.workloads
    assert one.services == {NamespacedHostname("ns", "web.ns.svc"): (PortMapping(80, 8080),)}
    assert one.services is other.services
    with pytest.raises(TypeError):
        one.services[NamespacedHostname("ns", "other")] = ()  # nobody may change what others have too
    assert [name is workload.uid for name, workload in zip(decoded.versions, decoded.delta.workloads, strict=True)] == [True, True]


def _large_response() -> bytes:
    bodies = [wds.Address(workload=wds.Workload(uid=f"workload-{number}")).SerializeToString() for number in range(20_000)]
    raw = _response(ADDRESS, *(discovery.Resource(name=f"workload-{n}", resource=_any(ADDRESS, body)) for n, body in enumerate(bodies)))
    assert is_large(raw)
    return raw


@pytest.mark.parametrize("collecting", [True, False])
def test_a_large_response_is_decoded_as_a_small_one_is_and_collecting_goes_on_as_before(collecting: bool) -> None:
    raw = _large_response()
    taken = partial(decode, first=True)
    (gc.enable if collecting else gc.disable)()
    try:
        assert trio.run(taken, raw) == decode_response(raw)
        assert gc.isenabled() == collecting
        with pytest.raises(RemoteProtocolError):
            trio.run(taken, b"\xff" * len(raw))
        assert gc.isenabled() == collecting
    finally:
        gc.enable()
        gc.unfreeze()


def test_garbage_stays_for_ever_with_no_large_response_but_the_first() -> None:
    raw = _large_response()
    try:
        before = gc.get_freeze_count()
        trio.run(partial(decode, first=False), raw)
        assert gc.get_freeze_count() == before
        trio.run(partial(decode, first=True), raw)
        assert gc.get_freeze_count() > before
    finally:
        gc.unfreeze()

"""Whatever the bytes, only the protocol's own errors; whatever the value, the same value back."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address, ip_network

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from mesh.model.address import GatewayAddress, IpAddress, NamespacedHostname, NetworkAddress, SocketAddress, unmapped
from mesh.model.policy import Action, Clause, Exact, Match, Policy, Prefix, Presence, Rule, Scope, ServiceAccountMatch, Suffix
from mesh.model.service import (
    AppProtocol,
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
    WorkloadType,
)
from mesh.wire import grpc, proxy_protocol, zds
from mesh.wire.errors import RemoteProtocolError
from mesh.xds.decode import InvalidResource, decode_address, decode_policy, decode_response
from mesh.xds.encode import encode_policy, encode_service, encode_workload, policy_resource, service_resource, workload_resource
from mesh.xds.proto import authorization_pb2 as authz
from mesh.xds.proto import zds_pb2

names = st.text(st.characters(codec="utf-8", exclude_characters="/"), min_size=1, max_size=12)
texts = st.text(max_size=12)
ports = st.integers(0, 65535)
ips: st.SearchStrategy[IpAddress] = st.one_of(
    st.builds(IPv4Address, st.integers(0, 2**32 - 1)), st.builds(IPv6Address, st.integers(0, 2**128 - 1))
).map(unmapped)
cidrs = ips.flatmap(lambda ip: st.integers(0, ip.max_prefixlen).map(lambda length: ip_network((ip, length), strict=False))).filter(
    lambda cidr: unmapped(cidr.network_address) == cidr.network_address
)
hostnames = st.builds(NamespacedHostname, names, names)
network_addresses = st.builds(NetworkAddress, texts, ips)
gateways = st.builds(GatewayAddress, st.one_of(network_addresses, hostnames), st.integers(1, 65535))


def some(values: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    return st.lists(values, max_size=3).map(tuple)


workloads = st.builds(
    Workload,
    uid=names,
    name=texts,
    namespace=texts,
    addresses=some(ips),
    network=texts,
    hostname=texts,
    tunnel_protocol=st.sampled_from(TunnelProtocol),
    trust_domain=names,
    service_account=names,
    node=texts,
    waypoint=st.none() | gateways,
    network_gateway=st.none() | gateways,
    canonical_name=texts,
    canonical_revision=texts,
    workload_type=st.sampled_from(WorkloadType),
    workload_name=texts,
    native_tunnel=st.booleans(),
    application_tunnel=st.none()
    | st.builds(ApplicationTunnel, st.sampled_from(TunnelApplicationProtocol), st.none() | st.integers(1, 65535)),
    authorization_policies=some(texts),
    status=st.sampled_from(HealthStatus),
    cluster_id=names,
    locality=st.builds(Locality, texts, texts, texts),
    network_mode=st.sampled_from(NetworkMode),
    services=st.dictionaries(hostnames, some(st.builds(PortMapping, ports, ports)), max_size=3),
    capacity=st.integers(0, 2**32 - 1),
)
services = st.builds(
    Service,
    name=texts,
    namespace=names,
    hostname=names,
    addresses=some(network_addresses),
    cidr_addresses=some(st.builds(CidrVip, texts, cidrs.filter(lambda cidr: cidr.prefixlen < cidr.max_prefixlen))),
    ports=some(st.builds(ServicePort, ports, ports, st.sampled_from(AppProtocol))),
    subject_alt_names=some(texts),
    waypoint=st.none() | gateways,
    weighted_waypoints=some(st.builds(WeightedWaypoint, gateways, st.integers(0, 100))),
    load_balancing=st.none()
    | st.builds(
        LoadBalancing, some(st.sampled_from(LoadBalancingScope)), st.sampled_from(LoadBalancingMode), st.sampled_from(HealthPolicy)
    ),
    ip_families=st.sampled_from(IpFamilies),
    canonical=st.booleans(),
    visibility=st.sampled_from(Visibility),
)
strings = some(st.one_of(st.builds(Exact, texts), st.builds(Prefix, texts), st.builds(Suffix, texts), st.just(Presence())))
accounts = some(st.builds(ServiceAccountMatch, texts, texts))
matches = st.builds(
    Match,
    strings,
    strings,
    strings,
    strings,
    some(cidrs),
    some(cidrs),
    some(cidrs),
    some(cidrs),
    some(ports),
    some(ports),
    accounts,
    accounts,
)
policies = st.builds(
    Policy,
    name=names,
    namespace=names,
    scope=st.sampled_from(Scope),
    action=st.sampled_from(Action),
    rules=some(st.builds(Rule, some(st.builds(Clause, some(matches))))),
    dry_run=st.booleans(),
)


@given(workloads)
def test_a_workload_survives_the_wire(workload: Workload) -> None:
    resource = workload_resource(workload)
    assert decode_address(resource.name, resource.body) == workload
    assert workload_resource(workload) == resource


@given(services)
def test_a_service_survives_the_wire(service: Service) -> None:
    resource = service_resource(service)
    assert decode_address(resource.name, resource.body) == service


@given(policies)
def test_a_policy_survives_the_wire(policy: Policy) -> None:
    resource = policy_resource(policy)
    assert decode_policy(resource.name, resource.body) == policy


@given(st.dictionaries(hostnames, some(st.builds(PortMapping, ports, ports)), min_size=2, max_size=5), st.randoms())
def test_the_version_does_not_depend_on_the_order_of_a_mapping(served: dict[NamespacedHostname, object], rng: object) -> None:
    items = list(served.items())
    rng.shuffle(items)
    first = Workload("u", "n", "ns", services=served)
    second = Workload("u", "n", "ns", services=dict(items))
    assert workload_resource(first).version == workload_resource(second).version


@given(st.binary(max_size=300) | st.builds(lambda p, junk: encode_policy(p).SerializeToString() + junk, policies, st.binary(max_size=20)))
def test_a_policy_is_taken_with_all_it_says_or_it_denies(body: bytes) -> None:
    try:
        message = authz.Authorization.FromString(body)
    except DecodeError:
        assert decode_policy("ns/p", body).unreadable
        return
    try:
        policy = decode_policy(f"{message.namespace}/{message.name}", body)
    except InvalidResource:
        return
    if policy.unreadable is None:
        assert encode_policy(policy).SerializeToString(deterministic=True) == _masked(message).SerializeToString(deterministic=True)


def _masked(message: authz.Authorization) -> authz.Authorization:
    """With the host bits of every CIDR zero, the only thing that reading may change (mapped IPv6 ranges aside, which are not made here)."""
    for rule in message.rules:
        for clause in rule.clauses:
            for match in clause.matches:
                for cidr in (*match.source_ips, *match.not_source_ips, *match.destination_ips, *match.not_destination_ips):
                    cidr.address = ip_network((cidr.address, cidr.length), strict=False).network_address.packed
    return message


@given(
    st.binary(max_size=300)
    | st.builds(lambda w, junk: encode_workload(w).SerializeToString() + junk, workloads, st.binary(max_size=20))
    | st.builds(lambda s, junk: encode_service(s).SerializeToString() + junk, services, st.binary(max_size=20))
)
def test_address_bytes_raise_nothing_but_invalid_resource(body: bytes) -> None:
    for framed in (body, b"\x0a" + len(body).to_bytes(1, "big") + body if len(body) < 128 else body):
        with suppress(InvalidResource):
            decode_address("x", framed)


@given(st.binary(max_size=300))
def test_response_bytes_raise_nothing_but_the_protocol_error(raw: bytes) -> None:
    with suppress(RemoteProtocolError):
        decode_response(raw)


# --- ZDS: protobuf's own classes are the oracle ---

infos = st.builds(zds.WorkloadInfo, texts, texts, texts)
zds_requests = st.one_of(
    st.builds(zds.Add, texts, st.none() | infos), st.builds(zds.Keep, texts), st.builds(zds.Remove, texts), st.just(zds.SnapshotSent())
)


@given(zds_requests)
def test_a_zds_request_survives_the_wire_and_protobuf_agrees(request: zds.WorkloadRequest) -> None:
    packet = zds.encode_request(request)
    assert zds.parse_request(packet) == request
    assert _as_ours(zds_pb2.WorkloadRequest.FromString(packet)) == request


@given(st.binary(max_size=100) | st.lists(zds_requests.map(zds.encode_request) | st.binary(max_size=6), max_size=4).map(b"".join))
def test_zds_bytes_mean_what_protobuf_says_they_mean(packet: bytes) -> None:
    try:
        ours = zds.parse_request(packet)
    except RemoteProtocolError:
        return
    assert ours == _as_ours(zds_pb2.WorkloadRequest.FromString(packet))


@given(st.binary(max_size=60))
def test_zds_hellos_and_responses_raise_nothing_but_the_protocol_error(packet: bytes) -> None:
    parsers: list[Callable[[bytes], object]] = [zds.parse_hello, zds.parse_response]
    for parse in parsers:
        with suppress(RemoteProtocolError):
            parse(packet)


def _as_ours(message: zds_pb2.WorkloadRequest) -> zds.WorkloadRequest:
    match message.WhichOneof("payload"):
        case "add":
            info = message.add.workload_info
            known = zds.WorkloadInfo(info.name, info.namespace, info.service_account) if message.add.HasField("workload_info") else None
            return zds.Add(message.add.uid, known)
        case "del":
            return zds.Remove(getattr(message, "del").uid)
        case "keep":
            return zds.Keep(message.keep.uid)
    assert message.WhichOneof("payload") == "snapshot_sent"
    return zds.SnapshotSent()


# --- PROXY protocol, gRPC ---

endpoints = st.builds(SocketAddress, ips, ports)


@given(endpoints, endpoints, st.none() | st.text(max_size=60), st.binary(max_size=10))
def test_a_proxy_header_survives_the_wire(source: SocketAddress, destination: SocketAddress, identity: str | None, rest: bytes) -> None:
    data = proxy_protocol.encode_header(source, destination, identity)
    parsed = proxy_protocol.parse_header(data + rest)
    assert parsed is not None
    assert (parsed.size, parsed.identity) == (len(data), identity)
    said = (source, destination) if source.ip.version == destination.ip.version else (None, None)
    assert (parsed.source, parsed.destination) == said


@given(st.binary(max_size=80).map(lambda tail: proxy_protocol.SIGNATURE + tail) | st.binary(max_size=80))
def test_proxy_bytes_raise_nothing_but_the_protocol_error(data: bytes) -> None:
    with suppress(RemoteProtocolError):
        proxy_protocol.parse_header(data)


@given(st.lists(st.binary(max_size=50), max_size=6), st.randoms())
def test_grpc_messages_survive_any_cutting(messages: list[bytes], rng: object) -> None:
    wire = b"".join(grpc.message_header(len(message)) + message for message in messages)
    reader, got, position = grpc.MessageReader(50), list[bytes](), 0
    while position < len(wire):
        step = rng.randint(1, 40)
        reader.receive(wire[position : position + step])
        position += step
        while (message := reader.next_message()) is not None:
            got.append(message)
    reader.finish()
    assert got == messages


@given(st.lists(st.binary(max_size=30), max_size=5))
def test_grpc_bytes_raise_nothing_but_the_protocol_error(chunks: list[bytes]) -> None:
    reader = grpc.MessageReader(20)
    with suppress(RemoteProtocolError):
        for chunk in chunks:
            reader.receive(chunk)
        reader.finish()


@given(st.floats(1e-9, 10**9))
def test_a_grpc_timeout_is_never_shortened(seconds: float) -> None:
    text = grpc.encode_timeout(seconds)
    assert len(text) <= 9
    assert grpc.parse_timeout(text) == pytest.approx(max(seconds, grpc.parse_timeout(text)), rel=1e-6)


@given(st.text(max_size=40))
def test_grpc_header_values_raise_nothing_but_the_protocol_error(text: str) -> None:
    assert grpc.decode_status_message(grpc.encode_status_message(text)) == text
    grpc.decode_status_message(text)
    grpc.parse_status(text)
    with suppress(RemoteProtocolError):
        grpc.parse_timeout(text)

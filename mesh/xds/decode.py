"""Messages of the control plane to model values: what is wrong with a workload or service refuses it, what is wrong with a policy denies.

Rules: ztunnel's. Where ztunnel drops what it does not know of a policy (an ALLOW becomes wider, a DENY inert), the
policy here becomes `Policy(unreadable=...)`: also for unknown fields and extensions, which may be conditions.

Repeated fields are read as slices, ``[:]``, which protobuf makes a list of at once. Iterated over, they are asked for one after the other
until an exception says that there are no more; and the items of a map, by a class written in Python.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache
from ipaddress import ip_network
from sys import intern
from types import MappingProxyType
from typing import Final, TypeVar, cast

from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

from mesh.model.address import (
    Cidr,
    GatewayAddress,
    InvalidAddress,
    NamespacedHostname,
    NetworkAddress,
    ip_from_bytes,
)
from mesh.model.identity import DEFAULT_TRUST_DOMAIN
from mesh.model.l7.waypoint import Assigned
from mesh.model.policy import Action, Clause, Exact, Match, Policy, Prefix, Presence, Rule, Scope, ServiceAccountMatch, StringMatch, Suffix
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
from mesh.state.store import Delta
from mesh.wire.errors import RemoteProtocolError
from mesh.xds import names
from mesh.xds.l7 import L7_TYPES, UnreadableL7, decode_l7, unreadable_reason
from mesh.xds.proto import authorization_pb2 as authz
from mesh.xds.proto import discovery_pb2 as discovery
from mesh.xds.proto import workload_pb2 as wds

DEFAULT_HBONE_PORT = 15008
DEFAULT_CLUSTER = "Kubernetes"

_E = TypeVar("_E", bound=Enum)
_H = TypeVar("_H", bound=Hashable)


class InvalidResource(ValueError):
    """One resource of a response cannot be taken; ``str()`` is the NACK's text for it, ``name: reason``."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason


@dataclass(frozen=True, slots=True)
class DecodedResponse:
    """A DeltaDiscoveryResponse, parsed. ``delta`` holds what could be taken and every unreadable policy; ``versions`` what is held now by
    resource name (an unreadable policy with an empty version: ask for it again); ``rejected`` what to refuse, unreadable policies too.
    ``more``: it is a part, and another follows."""

    type_url: str
    nonce: str
    delta: Delta = field(default_factory=Delta)
    versions: Mapping[str, str] = field(default_factory=dict)
    removed: tuple[str, ...] = ()
    rejected: tuple[InvalidResource, ...] = ()
    more: bool = False


def decode_response(raw: bytes) -> DecodedResponse:
    """Parse the bytes of a DeltaDiscoveryResponse. Raises RemoteProtocolError when they are none; a bad resource only rejects itself.
    A type that nobody knows gives an empty delta."""
    try:
        response = discovery.DeltaDiscoveryResponse.FromString(raw)
    except DecodeError as exc:
        raise RemoteProtocolError(f"not a DeltaDiscoveryResponse: {exc}") from exc
    match response.type_url:
        case names.ADDRESS:
            return _decode_addresses(response)
        case names.AUTHORIZATION:
            return _decode_policies(response)
        case type_url if type_url in L7_TYPES:
            return _decode_l7(response)
        case _:
            return DecodedResponse(response.type_url, response.nonce, more=response.more)


def _decode_addresses(response: discovery.DeltaDiscoveryResponse) -> DecodedResponse:
    workloads: list[Workload] = []
    services: list[Service] = []
    versions: dict[str, str] = {}
    rejected: list[InvalidResource] = []
    for resource in response.resources[:]:
        try:
            name = resource.name
            match decode_address(name, _body(resource, names.ADDRESS)):
                case Workload() as workload:
                    workloads.append(workload)
                    if workload.uid == name:
                        name = workload.uid  # the same string, not another with the same letters
                case Service() as service:
                    services.append(service)
            versions[name] = resource.version
        except InvalidResource as exc:
            rejected.append(exc)
    removed = tuple(response.removed_resources[:])
    delta = Delta(workloads=tuple(workloads), services=tuple(services), removed_addresses=removed)
    return DecodedResponse(response.type_url, response.nonce, delta, versions, removed, tuple(rejected), response.more)


def _decode_policies(response: discovery.DeltaDiscoveryResponse) -> DecodedResponse:
    policies: list[Policy] = []
    versions: dict[str, str] = {}
    rejected: list[InvalidResource] = []
    for resource in response.resources[:]:
        try:
            policy = decode_policy(resource.name, _body(resource, names.AUTHORIZATION))
        except InvalidResource as exc:
            rejected.append(exc)
            continue
        policies.append(policy)
        versions[resource.name] = "" if policy.unreadable else resource.version
        if policy.unreadable is not None:
            rejected.append(InvalidResource(resource.name, policy.unreadable))
    removed = tuple(response.removed_resources[:])
    delta = Delta(policies=tuple(policies), removed_policies=removed)
    return DecodedResponse(response.type_url, response.nonce, delta, versions, removed, tuple(rejected), response.more)


def _decode_l7(response: discovery.DeltaDiscoveryResponse) -> DecodedResponse:
    type_url = response.type_url
    assigned: list[Assigned] = []
    versions: dict[str, str] = {}
    rejected: list[InvalidResource] = []
    for resource in response.resources[:]:
        try:
            decoded = decode_l7(type_url, resource.name, _body(resource, type_url))
        except UnreadableL7 as exc:
            rejected.append(InvalidResource(resource.name, str(exc)))
            continue
        assigned.append(decoded)
        reason = unreadable_reason(decoded.resource)
        versions[resource.name] = "" if reason else resource.version
        if reason:
            rejected.append(InvalidResource(resource.name, reason))
    removed = tuple(response.removed_resources[:])
    delta = Delta(l7=tuple(assigned), removed_l7=tuple((type_url, name) for name in removed))
    return DecodedResponse(type_url, response.nonce, delta, versions, removed, tuple(rejected), response.more)


def _body(resource: discovery.Resource, type_url: str) -> bytes:
    """The Any's value; of another type it is empty, which no decoder takes for a whole resource."""
    return resource.resource.value if resource.resource.type_url == type_url else b""


# --- addresses ---


def decode_address(name: str, body: bytes) -> Workload | Service:
    """An `istio.workload.Address`. Raises InvalidResource."""
    try:
        address = wds.Address.FromString(body)
        match address.WhichOneof("type"):
            case "workload":
                return _workload(address.workload)
            case "service":
                return _service(address.service)
        raise InvalidResource(name, "neither workload nor service")
    except DecodeError as exc:
        raise InvalidResource(name, f"not an Address: {exc}") from exc
    except (InvalidAddress, _Unusable) as unusable:
        raise InvalidResource(name, str(unusable)) from unusable


class _Unusable(ValueError):
    """A field has a value that we cannot act on; becomes an InvalidResource or an unreadable policy, never leaves this module."""


def _workload(message: wds.Workload) -> Workload:
    if not message.uid:
        raise _Unusable("a workload without uid")
    services = message.services
    return Workload(
        uid=message.uid,
        name=message.name,
        namespace=intern(message.namespace),
        addresses=tuple([ip_from_bytes(packed) for packed in message.addresses[:]]),
        network=intern(message.network),
        hostname=message.hostname,
        tunnel_protocol=_enum(TunnelProtocol, message.tunnel_protocol),
        trust_domain=intern(message.trust_domain or DEFAULT_TRUST_DOMAIN),
        service_account=intern(message.service_account or "default"),
        node=intern(message.node),
        waypoint=_gateway(message.waypoint) if message.HasField("waypoint") else None,
        network_gateway=_gateway(message.network_gateway) if message.HasField("network_gateway") else None,
        canonical_name=intern(message.canonical_name),
        canonical_revision=intern(message.canonical_revision),
        workload_type=_enum(WorkloadType, message.workload_type),
        workload_name=intern(message.workload_name),
        native_tunnel=message.native_tunnel,
        application_tunnel=_tunnel(message.application_tunnel) if message.HasField("application_tunnel") else None,
        authorization_policies=_shared(tuple(message.authorization_policies[:])),
        status=_enum(HealthStatus, message.status),
        cluster_id=intern(message.cluster_id or DEFAULT_CLUSTER),
        locality=_locality(message.locality) if message.HasField("locality") else _NOWHERE,
        network_mode=_enum(NetworkMode, message.network_mode),
        services=_services(tuple([(key, _pairs(services[key])) for key in services])),
        capacity=message.capacity.value if message.HasField("capacity") else 1,
    )


_Pairs = tuple[tuple[int, int], ...]
"""Service and target port of each mapping."""


def _pairs(ports: wds.PortList) -> _Pairs:
    return tuple([(each.service_port, each.target_port) for each in ports.ports[:]])


@lru_cache(maxsize=65536)
def _services(wire: tuple[tuple[str, _Pairs], ...]) -> Mapping[NamespacedHostname, tuple[PortMapping, ...]]:
    """By the key on the wire. Replicas have equal ones: they share it, as what is `_shared`."""
    return MappingProxyType({_shared(NamespacedHostname.parse(key)): _shared(_port_mappings(pairs)) for key, pairs in wire})


def _port_mappings(pairs: _Pairs) -> tuple[PortMapping, ...]:
    return tuple([PortMapping(_port(service), _port(target)) for service, target in pairs])


_NOWHERE: Final = Locality()


def _locality(at: wds.Locality) -> Locality:
    return _shared(Locality(at.region, at.zone, at.subzone))


# Replicas of a service differ in name, address and node and in little else. Sharing the equal parts, and interning the strings that
# come again and again, halves the memory of 100 000 workloads (250 to 140 MB) and takes no longer than keeping them apart.
@lru_cache(maxsize=65536)
def _shared_value(value: Hashable) -> Hashable:
    return value


def _shared(value: _H) -> _H:
    """The first value that was equal to this one. For dataclasses and tuples: they equal nothing of another type."""
    return cast(_H, _shared_value(value))


def _tunnel(message: wds.ApplicationTunnel) -> ApplicationTunnel:
    return ApplicationTunnel(_enum(TunnelApplicationProtocol, message.protocol), _port(message.port) or None)


def _service(message: wds.Service) -> Service:
    if not (message.namespace and message.hostname):
        raise _Unusable("a service without namespace or hostname")
    addresses: list[NetworkAddress] = []
    ranges: list[CidrVip] = []
    for each in message.addresses:
        if isinstance(vip := _vip(each), CidrVip):
            ranges.append(vip)
        else:
            addresses.append(vip)
    return Service(
        name=message.name,
        namespace=message.namespace,
        hostname=message.hostname,
        addresses=tuple(addresses),
        cidr_addresses=tuple(ranges),
        ports=tuple(
            ServicePort(_port(each.service_port), _port(each.target_port), _enum(AppProtocol, each.app_protocol)) for each in message.ports
        ),
        subject_alt_names=tuple(message.subject_alt_names),
        waypoint=_gateway(message.waypoint) if message.HasField("waypoint") else None,
        weighted_waypoints=tuple(WeightedWaypoint(_gateway(each.destination), each.weight) for each in message.weighted_waypoints),
        load_balancing=_load_balancing(message.load_balancing) if message.HasField("load_balancing") else None,
        ip_families=_enum(IpFamilies, message.ip_families),
        canonical=message.canonical,
        # A visibility of the future is taken for public, as the node proxy does: it only widens who may resolve the name.
        visibility=Visibility.NAMESPACE if message.visibility == Visibility.NAMESPACE.value else Visibility.PUBLIC,
    )


def _load_balancing(message: wds.LoadBalancing) -> LoadBalancing:
    return LoadBalancing(
        routing_preference=tuple(_enum(LoadBalancingScope, scope) for scope in message.routing_preference),
        mode=_enum(LoadBalancingMode, message.mode),
        health_policy=_enum(HealthPolicy, message.health_policy),
    )


def _gateway(message: wds.GatewayAddress) -> GatewayAddress:
    port = _port(message.hbone_mtls_port) or DEFAULT_HBONE_PORT
    match message.WhichOneof("destination"):
        case "hostname":
            return GatewayAddress(NamespacedHostname(message.hostname.namespace, message.hostname.hostname), port)
        case "address":
            vip = _vip(message.address)
            if isinstance(vip, CidrVip):
                raise _Unusable(f"a gateway at a range of addresses, {vip.cidr}")
            return GatewayAddress(vip, port)
    raise _Unusable("a gateway without destination")


def _vip(message: wds.NetworkAddress) -> NetworkAddress | CidrVip:
    ip = ip_from_bytes(message.address)
    if not message.HasField("length") or message.length == 8 * len(message.address):
        return NetworkAddress(message.network, ip)
    return CidrVip(message.network, _cidr(message.address, message.length))


def _port(number: int) -> int:
    if number > 65535:
        raise _Unusable(f"port {number}")
    return number


def _enum(kind: type[_E], number: int) -> _E:
    value = kind._value2member_map_.get(number)  # what ``kind(number)`` finds after a detour
    if value is None:
        raise _Unusable(f"unknown {kind.__name__} {number}")
    return cast(_E, value)


def _cidr(packed: bytes, length: int) -> Cidr:
    """Host bits are masked, as Istio takes them. A range of IPv4-mapped addresses is the IPv4 range: addresses are compared unmapped."""
    ip = ip_from_bytes(packed)
    if length > 8 * len(packed):
        raise _Unusable(f"prefix length {length} of {ip}")
    if len(packed) == 16 and ip.version == 4:
        if length < 96:
            raise _Unusable(f"prefix length {length} of an IPv4-mapped address")
        length -= 96
    return ip_network((ip, length), strict=False)


# --- policies ---


def decode_policy(name: str, body: bytes) -> Policy:
    """An `istio.security.Authorization`, by the name it came under: a policy that cannot be read whole is one that denies. Its scope is
    the message's, or, when even that cannot be read, the namespace in its name. Raises InvalidResource only for a name that is not
    ``namespace/policy``: nothing could ever refer to such a policy or remove it."""
    namespace, slash, short = name.partition("/")
    if not (slash and namespace and short) or "/" in short:
        raise InvalidResource(name, "a policy's name is namespace/name")
    unreadable = Policy(short, namespace, Scope.NAMESPACE, Action.DENY)
    try:
        message = authz.Authorization.FromString(body)
    except DecodeError as exc:
        return _with_reason(unreadable, f"not an Authorization: {exc}")
    if (message.namespace, message.name) != (namespace, short):
        return _with_reason(unreadable, f"the policy calls itself {message.namespace}/{message.name}")
    if message.scope in Scope._value2member_map_:
        unreadable = Policy(short, namespace, Scope(message.scope), Action.DENY, dry_run=message.dry_run)
    try:
        return _policy(message)
    except (_Unusable, InvalidAddress) as unusable:
        return _with_reason(unreadable, str(unusable))


def _with_reason(policy: Policy, reason: str) -> Policy:
    return Policy(policy.name, policy.namespace, policy.scope, policy.action, dry_run=policy.dry_run, unreadable=reason)


def _policy(message: authz.Authorization) -> Policy:
    _refuse_unknown(message, "the policy")
    if message.extensions:
        raise _Unusable(f"the policy has extension {message.extensions[0].name!r}")
    return Policy(
        name=message.name,
        namespace=message.namespace,
        scope=_enum(Scope, message.scope),
        action=_enum(Action, message.action),
        rules=tuple(_rule(rule) for rule in message.rules),
        dry_run=message.dry_run,
    )


def _rule(message: authz.Rule) -> Rule:
    _refuse_unknown(message, "a rule")
    return Rule(tuple(_clause(clause) for clause in message.clauses))


def _clause(message: authz.Clause) -> Clause:
    _refuse_unknown(message, "a clause")
    return Clause(tuple(_match(match) for match in message.matches))


def _match(message: authz.Match) -> Match:
    _refuse_unknown(message, "a match")
    if message.extensions:
        raise _Unusable(f"a match has extension {message.extensions[0].name!r}")
    return Match(
        namespaces=_strings(message.namespaces),
        not_namespaces=_strings(message.not_namespaces),
        principals=_strings(message.principals),
        not_principals=_strings(message.not_principals),
        source_ips=_cidrs(message.source_ips),
        not_source_ips=_cidrs(message.not_source_ips),
        destination_ips=_cidrs(message.destination_ips),
        not_destination_ips=_cidrs(message.not_destination_ips),
        destination_ports=tuple(map(_port, message.destination_ports)),
        not_destination_ports=tuple(map(_port, message.not_destination_ports)),
        service_accounts=_accounts(message.service_accounts),
        not_service_accounts=_accounts(message.not_service_accounts),
    )


def _strings(messages: Iterable[authz.StringMatch]) -> tuple[StringMatch, ...]:
    return tuple(_string(message) for message in messages)


def _string(message: authz.StringMatch) -> StringMatch:
    _refuse_unknown(message, "a string match")
    match message.WhichOneof("match_type"):
        case "exact":
            return Exact(message.exact)
        case "prefix":
            return Prefix(message.prefix)
        case "suffix":
            return Suffix(message.suffix)
        case "presence":
            return Presence()
    raise _Unusable("a string match of unknown kind")


def _cidrs(messages: Iterable[authz.Address]) -> tuple[Cidr, ...]:
    return tuple(_policy_cidr(message) for message in messages)


def _policy_cidr(message: authz.Address) -> Cidr:
    _refuse_unknown(message, "an address")
    return _cidr(message.address, message.length)


def _accounts(messages: Iterable[authz.ServiceAccountMatch]) -> tuple[ServiceAccountMatch, ...]:
    return tuple(_account(message) for message in messages)


def _account(message: authz.ServiceAccountMatch) -> ServiceAccountMatch:
    _refuse_unknown(message, "a service account match")
    return ServiceAccountMatch(message.namespace, message.serviceAccount)


def _refuse_unknown(message: Message, what: str) -> None:
    if len(unknown := UnknownFieldSet(message)):
        raise _Unusable(f"{what} has unknown field {unknown[0].field_number}")

"""Model values to the messages of the control plane, deterministically: equal values give equal bytes, so a hash of them is a version."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from mesh.model.address import Cidr, GatewayAddress, NamespacedHostname, NetworkAddress
from mesh.model.identity import DEFAULT_TRUST_DOMAIN
from mesh.model.policy import Exact, Match, Policy, Prefix, Presence, Rule, ServiceAccountMatch, StringMatch, Suffix
from mesh.model.service import CidrVip, LoadBalancing, Service, ServicePort
from mesh.model.workload import PortMapping, Workload
from mesh.xds.proto import authorization_pb2 as authz
from mesh.xds.proto import workload_pb2 as wds


@dataclass(frozen=True, slots=True)
class Resource:
    """One resource as it goes out: ``body`` is the Any's value, ``version`` its content's hash."""

    name: str
    version: str
    body: bytes
    aliases: tuple[str, ...] = ()
    """Other names that find it: ``network/ip`` of each address."""
    groups: tuple[str, ...] = ()
    """Services it is an endpoint of: whoever asks for one on demand gets this too."""
    node: str = ""
    """The node it runs on: that node's agent gets it without asking."""
    audience: str = ""
    """The waypoint that alone may have it; empty: everybody."""


def version_of(body: bytes) -> str:
    """Opaque to clients; 64 bits, as istiod's."""
    return hashlib.blake2b(body, digest_size=8).hexdigest()


def workload_resource(workload: Workload) -> Resource:
    """Named by its uid."""
    body = wds.Address(workload=encode_workload(workload)).SerializeToString(deterministic=True)
    return Resource(
        name=workload.uid,
        version=version_of(body),
        body=body,
        aliases=tuple(f"{workload.network}/{ip}" for ip in workload.addresses),
        groups=tuple(str(service) for service in workload.services),
        node=workload.node,
    )


def service_resource(service: Service) -> Resource:
    """Named ``namespace/hostname``."""
    body = wds.Address(service=encode_service(service)).SerializeToString(deterministic=True)
    ranges = (f"{vip.network}/{vip.cidr}" for vip in service.cidr_addresses)
    return Resource(str(service.key), version_of(body), body, (*map(str, service.addresses), *ranges))


def policy_resource(policy: Policy) -> Resource:
    """Named ``namespace/name``. Raises ValueError for an unreadable policy: it has no faithful message."""
    body = encode_policy(policy).SerializeToString(deterministic=True)
    return Resource(policy.key, version_of(body), body)


def encode_workload(workload: Workload) -> wds.Workload:
    message = wds.Workload(
        uid=workload.uid,
        name=workload.name,
        namespace=workload.namespace,
        addresses=[ip.packed for ip in workload.addresses],
        network=workload.network,
        hostname=workload.hostname,
        tunnel_protocol=_number(workload.tunnel_protocol),
        trust_domain="" if workload.trust_domain == DEFAULT_TRUST_DOMAIN else workload.trust_domain,
        service_account=workload.service_account,
        node=workload.node,
        waypoint=_gateway(workload.waypoint),
        network_gateway=_gateway(workload.network_gateway),
        canonical_name=workload.canonical_name,
        canonical_revision=workload.canonical_revision,
        workload_type=_number(workload.workload_type),
        workload_name=workload.workload_name,
        native_tunnel=workload.native_tunnel,
        authorization_policies=workload.authorization_policies,
        status=_number(workload.status),
        cluster_id=workload.cluster_id,
        network_mode=_number(workload.network_mode),
    )
    if (tunnel := workload.application_tunnel) is not None:
        message.application_tunnel.CopyFrom(wds.ApplicationTunnel(protocol=_number(tunnel.protocol), port=tunnel.port or 0))
    if (at := workload.locality) and (at.region or at.zone or at.subzone):
        message.locality.CopyFrom(wds.Locality(region=at.region, zone=at.zone, subzone=at.subzone))
    if workload.capacity != 1:
        message.capacity.value = workload.capacity
    for service, ports in workload.services.items():
        message.services[str(service)].ports.extend(_mapping(port) for port in ports)
    return message


def encode_service(service: Service) -> wds.Service:
    return wds.Service(
        name=service.name,
        namespace=service.namespace,
        hostname=service.hostname,
        addresses=[*map(_network_address, service.addresses), *map(_range, service.cidr_addresses)],
        ports=[_service_port(port) for port in service.ports],
        subject_alt_names=service.subject_alt_names,
        waypoint=_gateway(service.waypoint),
        weighted_waypoints=[
            wds.WeightedWaypoint(destination=_gateway(each.waypoint), weight=each.weight) for each in service.weighted_waypoints
        ],
        load_balancing=_load_balancing(service.load_balancing),
        ip_families=_number(service.ip_families),
        canonical=service.canonical,
        visibility=_number(service.visibility),
    )


def encode_policy(policy: Policy) -> authz.Authorization:
    """Raises ValueError for an unreadable policy."""
    if policy.unreadable is not None:
        raise ValueError(f"policy {policy.key} is unreadable: {policy.unreadable}")
    return authz.Authorization(
        name=policy.name,
        namespace=policy.namespace,
        scope=_number(policy.scope),
        action=_number(policy.action),
        rules=[_rule(rule) for rule in policy.rules],
        dry_run=policy.dry_run,
    )


def _number(value: Enum) -> Any:
    """A wire number. The generated stubs want enum classes that do not exist at run time."""
    return value.value


def _rule(rule: Rule) -> authz.Rule:
    return authz.Rule(clauses=[authz.Clause(matches=[_match(match) for match in clause.matches]) for clause in rule.clauses])


def _match(match: Match) -> authz.Match:
    return authz.Match(
        namespaces=_strings(match.namespaces),
        not_namespaces=_strings(match.not_namespaces),
        principals=_strings(match.principals),
        not_principals=_strings(match.not_principals),
        source_ips=_cidrs(match.source_ips),
        not_source_ips=_cidrs(match.not_source_ips),
        destination_ips=_cidrs(match.destination_ips),
        not_destination_ips=_cidrs(match.not_destination_ips),
        destination_ports=match.destination_ports,
        not_destination_ports=match.not_destination_ports,
        service_accounts=_accounts(match.service_accounts),
        not_service_accounts=_accounts(match.not_service_accounts),
    )


def _strings(matches: Iterable[StringMatch]) -> list[authz.StringMatch]:
    return [_string(match) for match in matches]


def _string(match: StringMatch) -> authz.StringMatch:
    match match:
        case Exact(value):
            return authz.StringMatch(exact=value)
        case Prefix(value):
            return authz.StringMatch(prefix=value)
        case Suffix(value):
            return authz.StringMatch(suffix=value)
        case Presence():
            return authz.StringMatch(presence={})


def _cidrs(cidrs: Iterable[Cidr]) -> list[authz.Address]:
    return [authz.Address(address=cidr.network_address.packed, length=cidr.prefixlen) for cidr in cidrs]


def _accounts(accounts: Iterable[ServiceAccountMatch]) -> list[authz.ServiceAccountMatch]:
    return [authz.ServiceAccountMatch(namespace=each.namespace, serviceAccount=each.service_account) for each in accounts]


def _gateway(gateway: GatewayAddress | None) -> wds.GatewayAddress | None:
    match gateway:
        case None:
            return None
        case GatewayAddress(NamespacedHostname(namespace, hostname), port):
            return wds.GatewayAddress(hostname=wds.NamespacedHostname(namespace=namespace, hostname=hostname), hbone_mtls_port=port)
        case GatewayAddress(NetworkAddress() as address, port):
            return wds.GatewayAddress(address=_network_address(address), hbone_mtls_port=port)
    raise AssertionError(gateway)


def _network_address(address: NetworkAddress) -> wds.NetworkAddress:
    return wds.NetworkAddress(network=address.network, address=address.ip.packed)


def _range(vip: CidrVip) -> wds.NetworkAddress:
    return wds.NetworkAddress(network=vip.network, address=vip.cidr.network_address.packed, length=vip.cidr.prefixlen)


def _service_port(port: ServicePort) -> wds.Port:
    return wds.Port(service_port=port.service_port, target_port=port.target_port, app_protocol=_number(port.app_protocol))


def _mapping(port: PortMapping) -> wds.Port:
    return wds.Port(service_port=port.service_port, target_port=port.target_port)


def _load_balancing(balancing: LoadBalancing | None) -> wds.LoadBalancing | None:
    if balancing is None:
        return None
    return wds.LoadBalancing(
        routing_preference=[_number(scope) for scope in balancing.routing_preference],
        mode=_number(balancing.mode),
        health_policy=_number(balancing.health_policy),
    )

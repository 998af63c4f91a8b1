"""``/config_dump``: the brain's state as JSON, in the keys and forms of ztunnel, so that its readers read ours."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from mesh.model.address import GatewayAddress
from mesh.model.policy import Exact, Match, Policy, Prefix, Presence, ServiceAccountMatch, StringMatch, Suffix
from mesh.model.service import HealthPolicy, IpFamilies, LoadBalancing, LoadBalancingMode, Service, Visibility
from mesh.model.workload import Locality, TunnelProtocol, Workload
from mesh.runtime.inspection import LivingConnection
from mesh.state.store import MeshState
from ztunnel_py.config import AgentConfig

Json = dict[str, Any]


def dump_state(state: MeshState) -> Json:
    """``workloads`` by uid, ``services`` by hostname, ``policies`` by key."""
    return {
        "workloads": [dump_workload(w) for w in sorted(state.workloads(), key=lambda w: w.uid)],
        "services": [dump_service(s, state) for s in sorted(state.services(), key=lambda s: (s.hostname, s.namespace))],
        "policies": [dump_policy(p) for p in sorted(state.policies(), key=lambda p: p.key)],
    }


def dump_workload(workload: Workload) -> Json:
    """Default-valued optional fields are left out, as ztunnel does."""
    always: Json = {
        "workloadIps": [str(ip) for ip in workload.addresses],
        "protocol": "HBONE" if workload.tunnel_protocol is TunnelProtocol.HBONE else "TCP",
        "networkMode": _title(workload.network_mode),
        "uid": workload.uid,
        "name": workload.name,
        "namespace": workload.namespace,
        "status": _title(workload.status),
        "clusterId": workload.cluster_id,
    }
    tunnel = workload.application_tunnel
    optional: Json = {
        "trustDomain": workload.trust_domain,
        "serviceAccount": workload.service_account,
        "network": workload.network,
        "waypoint": _gateway(workload.waypoint),
        "networkGateway": _gateway(workload.network_gateway),
        "workloadName": workload.workload_name,
        "workloadType": workload.workload_type.name.lower(),
        "canonicalName": workload.canonical_name,
        "canonicalRevision": workload.canonical_revision,
        "hostname": workload.hostname,
        "node": workload.node,
        "nativeTunnel": workload.native_tunnel,
        "applicationTunnel": {"protocol": tunnel.protocol.name, "port": tunnel.port} if tunnel is not None else None,
        "authorizationPolicies": list(workload.authorization_policies),
        "locality": dataclasses.asdict(workload.locality) if workload.locality != Locality() else None,
        "services": [str(key) for key in workload.services],
        "capacity": workload.capacity if workload.capacity != 1 else None,
    }
    return always | {key: value for key, value in optional.items() if value}


def dump_service(service: Service, state: MeshState) -> Json:
    """With its endpoints, healthy or not."""
    endpoints = {
        endpoint.workload.uid: {
            "workloadUid": endpoint.workload.uid,
            "port": {str(mapping.service_port): mapping.target_port for mapping in endpoint.ports},
            "status": _title(endpoint.workload.status),
        }
        for endpoint in state.endpoints(service.key)
    }
    always: Json = {
        "name": service.name,
        "namespace": service.namespace,
        "hostname": service.hostname,
        "vips": [str(address) for address in service.addresses],
        "ports": {str(port.service_port): port.target_port for port in service.ports},
        "endpoints": endpoints,
        "subjectAltNames": list(service.subject_alt_names),
        "canonical": service.canonical,
        "visibility": "Namespace" if service.visibility is Visibility.NAMESPACE else "Public",
    }
    optional: Json = {
        "cidrVips": [{"network": vip.network, "cidr": str(vip.cidr)} for vip in service.cidr_addresses],
        "waypoint": _gateway(service.waypoint),
        "weightedWaypoints": [{"destination": _gateway(w.waypoint), "weight": w.weight} for w in service.weighted_waypoints],
        "loadBalancer": _load_balancer(service.load_balancing),
        "ipFamilies": _FAMILIES.get(service.ip_families),
    }
    return always | {key: value for key, value in optional.items() if value}


def dump_policy(policy: Policy) -> Json:
    """ztunnel's form, and ``unreadable`` with the reason where a policy could not be read and therefore denies."""
    dumped: Json = {
        "name": policy.name,
        "namespace": policy.namespace,
        "scope": "".join(part.title() for part in policy.scope.name.split("_")),
        "action": policy.action.name.title(),
        "dryRun": policy.dry_run,
        "rules": [[[_match(match) for match in clause.matches] for clause in rule.clauses] for rule in policy.rules],
    }
    return dumped if policy.unreadable is None else dumped | {"unreadable": policy.unreadable}


def dump_connection(living: LivingConnection) -> Json:
    """ztunnel's form, and ours with what it lacks."""
    dumped: Json = {"src": living.source, "actualDst": living.destination, "protocol": living.protocol}
    optional: Json = {"originalDst": living.service, "authority": living.authority, "because": living.because}
    return dumped | {key: value for key, value in optional.items() if value}


def dump_config(config: AgentConfig) -> Json:
    """The agent's configuration in camelCase; the token's file is named, the token is not read."""
    return {_camel(field.name): _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def _gateway(gateway: GatewayAddress | None) -> Json | None:
    return None if gateway is None else {"destination": str(gateway.destination), "hboneMtlsPort": gateway.hbone_mtls_port}


_FAMILIES: Mapping[IpFamilies, str] = {IpFamilies.DUAL: "Dual", IpFamilies.IPV4_ONLY: "IPv4", IpFamilies.IPV6_ONLY: "IPv6"}


def _load_balancer(balancing: LoadBalancing | None) -> Json | None:
    if balancing is None:
        return None
    return {
        "routingPreferences": [scope.name.title() for scope in balancing.routing_preference],
        "mode": LoadBalancingMode(balancing.mode).name.title(),
        "healthPolicy": "AllowAll" if balancing.health_policy is HealthPolicy.ALLOW_ALL else "OnlyHealthy",
    }


def _match(match: Match) -> Json:
    dumped = {_camel(field.name): [_match_value(value) for value in getattr(match, field.name)] for field in dataclasses.fields(match)}
    return {key: values for key, values in dumped.items() if values}


def _match_value(value: object) -> object:
    match value:
        case Exact() | Prefix() | Suffix() | Presence():
            return _string_match(value)
        case ServiceAccountMatch():
            return {"namespace": value.namespace, "serviceAccount": value.service_account}
        case int():
            return value
        case _:
            return str(value)


def _string_match(value: StringMatch) -> Json:
    return {"Presence": []} if isinstance(value, Presence) else {type(value).__name__: value.value}


def _title(value: Enum) -> str:
    return "".join(part.title() for part in value.name.split("_"))


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(part.title() for part in rest)


def _plain(value: object) -> object:
    match value:
        case Path():
            return str(value)
        case tuple():
            return [_plain(part) for part in value]
        case _ if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return dataclasses.asdict(value)
        case _:
            return value

"""Which service a name means to a workload that looks it up, and the addresses to answer with. Pure; never raises.

A look-up tries the name as it is, as a short name of Kubernetes, and without each of the search domains that the workload's resolver may
have put behind it; each of these as it is and as the wildcards above it. All are exact look-ups: the number of services does not matter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mesh.model.address import IpAddress
from mesh.model.service import IpFamilies, LoadBalancing, Service
from mesh.model.workload import Workload
from mesh.state.balance import takes_connections
from mesh.state.store import MeshState


@dataclass(frozen=True, slots=True)
class Naming:
    """How the mesh's names are made. ``preferred_namespace``: whose service is meant where nothing else says so. ``ipv6`` False: no
    address of that family is ever told."""

    cluster_domain: str = "cluster.local"
    preferred_namespace: str = ""
    ipv6: bool = True


@dataclass(frozen=True, slots=True)
class NamedService:
    """``kept``: of how many of its leading labels the name is an alias, since a search domain was behind them; 0: of none."""

    service: Service
    kept: int


@dataclass(frozen=True, slots=True)
class Addresses:
    """What to answer; without addresses the name exists and has none of this kind. ``because`` is ztunnel's word for the result."""

    ips: tuple[IpAddress, ...]
    because: str


def find_named_service(state: MeshState, name: str, namespace: str, naming: Naming) -> NamedService | None:
    """The service that ``name`` (lower case, no final dot) means to clients of a namespace; None if it is not the mesh's to answer."""
    cluster_services = f".svc.{naming.cluster_domain}"
    for candidate, kept in _candidates(name, namespace, naming.cluster_domain):
        for searched in _with_wildcards(candidate):
            services = [
                service
                for service in state.find_services_by_hostname(searched, namespace)
                # Without an address of its own only a headless service of the cluster is answered for; others are the outside's.
                if (service.addresses and _leads_somewhere(state, service)) or service.hostname.endswith(cluster_services)
            ]
            if services:
                service = min(services, key=lambda service: _closeness(service, namespace, naming.preferred_namespace))
                return NamedService(service, kept if searched is candidate else 0)
    return None


def addresses_of(state: MeshState, service: Service, client: Workload, version: int, naming: Naming) -> Addresses:
    """The addresses of one family (4 or 6) under which ``client`` reaches a service."""
    if version not in _VERSIONS[service.ip_families] or (version == 6 and not naming.ipv6):
        return Addresses((), "service does not support this record type")
    if service.addresses:
        found = [vip.ip for vip in service.addresses if vip.ip.version == version and vip.network == client.network]
    else:
        found = _endpoint_addresses(state, service, version)
    return Addresses(tuple(dict.fromkeys(found)), "success" if found else "no records")


_VERSIONS = {IpFamilies.AUTOMATIC: (4, 6), IpFamilies.DUAL: (4, 6), IpFamilies.IPV4_ONLY: (4,), IpFamilies.IPV6_ONLY: (6,)}


def _endpoint_addresses(state: MeshState, service: Service, version: int) -> list[IpAddress]:
    """Of a headless service: one of every endpoint that takes connections."""
    balancing = service.load_balancing or LoadBalancing()
    ready = (endpoint.workload for endpoint in state.endpoints(service.key) if takes_connections(endpoint.workload, balancing))
    own = (next((ip for ip in workload.addresses if ip.version == version), None) for workload in ready)
    return [ip for ip in own if ip is not None]


def _leads_somewhere(state: MeshState, service: Service) -> bool:
    """Whether connections to the service's addresses can be carried. Endpoints that are known by a hostname only cannot be dialled yet:
    whoever was told such an address would be refused, and by the name's true address is let through as without the mesh. A waypoint
    may know better."""
    if service.waypoint is not None or service.weighted_waypoints:
        return True
    known = False
    for endpoint in state.endpoints(service.key):
        if endpoint.workload.addresses or endpoint.workload.network_gateway is not None:
            return True
        known = True
    return not known


def _candidates(name: str, namespace: str, cluster_domain: str) -> Iterator[tuple[str, int]]:
    """What the name may stand for, in order, with the number of labels it has without the search domain; each once."""
    seen: set[str] = set()
    for candidate, kept in _all_candidates(name, namespace, cluster_domain):
        if candidate not in seen:
            seen.add(candidate)
            yield candidate, kept


def _all_candidates(name: str, namespace: str, cluster_domain: str) -> Iterator[tuple[str, int]]:
    yield name, 0
    for expanded in _expansions(name, namespace, cluster_domain):
        yield expanded, 0
    for domain in (f"{namespace}.svc.{cluster_domain}", f"svc.{cluster_domain}", cluster_domain):
        if name.endswith(f".{domain}"):
            stripped = name[: -len(domain) - 1]
            kept = stripped.count(".") + 1
            yield stripped, kept
            for expanded in _expansions(stripped, namespace, cluster_domain):
                yield expanded, kept


def _expansions(name: str, namespace: str, cluster_domain: str) -> Iterator[str]:
    """The full names that a short one of Kubernetes may mean: of a service, or of a pod with hostname and subdomain."""
    labels = name.count(".") + 1
    of_services = name.endswith(".svc")
    if labels == 1:
        yield f"{name}.{namespace}.svc.{cluster_domain}"
    elif labels == 2:
        yield f"{name}.svc.{cluster_domain}"
        yield f"{name}.{namespace}.svc.{cluster_domain}"
    elif labels == 3:
        if of_services:
            yield f"{name}.{cluster_domain}"
        yield f"{name}.svc.{cluster_domain}"
    elif labels == 4 and of_services:
        yield f"{name}.{cluster_domain}"


def _with_wildcards(name: str) -> Iterator[str]:
    yield name
    _, dot, rest = name.partition(".")
    while dot:
        yield f"*.{rest}"
        _, dot, rest = rest.partition(".")


def _closeness(service: Service, namespace: str, preferred: str) -> tuple[bool, bool, bool, str]:
    return service.namespace != namespace, not service.canonical, service.namespace != preferred, service.namespace

"""Which pods stand behind which service, and under which names: the one table that VIPs and DNS are made from. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from mesh.model.address import IpAddress, SocketAddress
from meshctl_py.lab.assign import Assignments, PodAssignment
from meshctl_py.lab.spec import Cluster, PodKey, ServiceKey, ServicePortSpec, ServiceSpec

CLUSTER_DOMAIN = "cluster.local"


@dataclass(frozen=True, slots=True)
class VirtualPort:
    """One address and port that stands for several; no targets: nobody is ready."""

    service: str
    """``namespace/name``, for whoever reads the rules."""
    address: SocketAddress
    protocol: str
    targets: tuple[SocketAddress, ...]


def virtual_ports(cluster: Cluster, assignments: Assignments, ready: Collection[PodKey]) -> tuple[VirtualPort, ...]:
    """Every service address and port with the ready endpoints of its own family, in a stable order."""
    table: list[VirtualPort] = []
    for key, vips in assignments.vips.items():
        service = cluster.services[key]
        pods = _endpoints(service, assignments, ready)
        for vip in vips:
            for port in service.ports:
                if port.protocol != "SCTP":
                    table.append(VirtualPort(str(key), SocketAddress(vip, port.port), port.protocol, _targets(pods, port, vip.version)))
    return tuple(table)


def count_endpoints(cluster: Cluster, assignments: Assignments, ready: Collection[PodKey]) -> Mapping[ServiceKey, int]:
    """Of each service, how many pods have the port that most have; of a headless one, whose ports nobody translates, how many there are."""
    counts: dict[ServiceKey, int] = {}
    for key, service in cluster.services.items():
        pods = _endpoints(service, assignments, ready)
        serving = (sum(pod.spec.find_port(port.target) is not None for pod in pods) for port in service.ports)
        counts[key] = len(pods) if service.headless else max(serving, default=0)
    return counts


def dns_names(cluster: Cluster, assignments: Assignments, ready: Collection[PodKey]) -> Mapping[str, tuple[IpAddress, ...]]:
    """Addresses by absolute lower-case name without the final dot. A headless service has those of its ready pods, named one by one too."""
    names: dict[str, tuple[IpAddress, ...]] = {}
    for key, service in cluster.services.items():
        host = service_host(key)
        if not service.headless:
            names[host] = assignments.vips.get(key, ())
            continue
        pods = _endpoints(service, assignments, ready)
        names[host] = tuple(ip for pod in pods for ip in pod.ips)
        for pod in pods:
            names[f"{pod.spec.hostname}.{host}".lower()] = pod.ips
    return names


def service_host(key: ServiceKey) -> str:
    return f"{key.name}.{key.namespace}.svc.{CLUSTER_DOMAIN}".lower()


def _endpoints(service: ServiceSpec, assignments: Assignments, ready: Collection[PodKey]) -> list[PodAssignment]:
    return [
        pod
        for key, pod in assignments.pods.items()
        if service.selects(key.namespace, pod.spec.labels) and (service.publish_not_ready or key in ready)
    ]


def _targets(pods: Iterable[PodAssignment], port: ServicePortSpec, family: int) -> tuple[SocketAddress, ...]:
    found: list[SocketAddress] = []
    for pod in pods:
        number = pod.spec.find_port(port.target)
        if number is not None:
            found.extend(SocketAddress(ip, number) for ip in pod.ips if ip.version == family)
    return tuple(found)

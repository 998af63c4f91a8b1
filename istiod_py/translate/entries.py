"""ServiceEntries and WorkloadEntries as proxies see them: services, and workloads outside Kubernetes (reference: Istio's ambient index)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from istiod_py.translate.config import Config
from istiod_py.translate.services import distribution_balancing, protocol_named, service_key
from istiod_py.translate.surroundings import Surroundings
from istiod_py.translate.traits import canonical_name, canonical_revision, speaks_hbone, tunnel_protocol
from mesh.kube.service import KubeService
from mesh.kube.serviceentry import EntryPort, KubeServiceEntry
from mesh.kube.workloadentry import EntryEndpoint, KubeWorkloadEntry
from mesh.model.address import GatewayAddress, IpAddress, NamespacedHostname, NetworkAddress
from mesh.model.labels import AUTO_REGISTRATION_GROUP, WORKLOAD_NAME
from mesh.model.service import CidrVip, HealthPolicy, LoadBalancing, LoadBalancingMode, Service, ServicePort, Visibility, WeightedWaypoint
from mesh.model.workload import Locality, PortMapping, Workload, WorkloadType

_GROUP = "networking.istio.io"
_AS_DIALLED = LoadBalancing(mode=LoadBalancingMode.PASSTHROUGH, health_policy=HealthPolicy.ALLOW_ALL)


def endpoint_uid(entry: KubeServiceEntry, endpoint: EntryEndpoint, config: Config) -> str:
    return f"{config.cluster_id}/{_GROUP}/ServiceEntry/{entry.namespace}/{entry.name}/{endpoint.address}"


def workload_entry_uid(entry: KubeWorkloadEntry, config: Config) -> str:
    return f"{config.cluster_id}/{_GROUP}/WorkloadEntry/{entry.namespace}/{entry.name}"


def visibility(entry: KubeServiceEntry) -> Visibility | None:
    """Who sees its hosts; None: nobody. (Istio decides this by a setting of the mesh alone.)

    The protocol of node proxies knows everybody and the own namespace. A list of namespaces can't be said, and becomes the own one if
    that is listed: never more than was asked for.
    """
    exported = set(entry.export_to) or {"*"}
    if "*" in exported:
        return Visibility.PUBLIC
    return Visibility.NAMESPACE if exported & {".", entry.namespace} else None


def misses_out(entry: KubeServiceEntry) -> list[str]:
    """The namespaces that ``exportTo`` names in vain."""
    if "*" in entry.export_to:
        return []
    return [name for name in entry.export_to if name not in (".", "~", entry.namespace)]


def translate_host(
    entry: KubeServiceEntry,
    host: str,
    *,
    vips: tuple[IpAddress, ...],
    canonical: bool,
    namespace_annotations: Mapping[str, str],
    network: str,
    waypoint: GatewayAddress | None = None,
    weighted: tuple[WeightedWaypoint, ...] = (),
) -> Service:
    """One host of a ServiceEntry. ``vips``: its automatic addresses, for an entry without addresses of its own."""
    visible = visibility(entry)
    assert visible is not None, "an entry that nobody sees owns no host"
    single = [cidr.network_address for cidr in entry.addresses if cidr.num_addresses == 1]
    return Service(
        name=entry.name,
        namespace=entry.namespace,
        hostname=host,
        addresses=tuple(NetworkAddress(network, ip) for ip in (*single, *vips)),
        cidr_addresses=tuple(CidrVip(network, cidr) for cidr in entry.addresses if cidr.num_addresses > 1),
        ports=tuple(ServicePort(port.port, port.target or port.port, protocol_named(port.protocol)) for port in entry.ports),
        subject_alt_names=entry.subject_alt_names,
        waypoint=waypoint,
        weighted_waypoints=weighted,
        load_balancing=_AS_DIALLED if entry.resolution == "NONE" else distribution_balancing(entry.annotations, namespace_annotations),
        canonical=canonical,
        visibility=visible,
    )


def translate_service_entry(
    entry: KubeServiceEntry,
    hosts: tuple[str, ...],
    *,
    around: Surroundings,
    config: Config,
    waypoints: Sequence[GatewayAddress | None] = (),
) -> tuple[Workload, ...]:
    """The workloads that a ServiceEntry brings along, for those of its hosts that are its own: its endpoints, or, where names are
    looked up and no endpoints are given, each host itself.

    Who they are and which policies they name is the entry's matter. ``waypoints``: those of the endpoints, one each; what stands for a
    host has none, since nobody dials it but through the service. (In Istio an endpoint's network holds for those after it too.)
    """
    if not hosts:
        return ()
    if entry.endpoints:
        mapped = {
            endpoint.address: {_key(entry, host): _map_own_ports(endpoint, entry.ports) for host in hosts} for endpoint in entry.endpoints
        }
        found = waypoints or [None] * len(entry.endpoints)
        return tuple(
            _endpoint_of(entry, endpoint, mapped[endpoint.address], around, config, waypoint)
            for endpoint, waypoint in zip(entry.endpoints, found, strict=True)
        )
    if not entry.resolves_names or entry.selector is not None:
        return ()
    implied = [(host, EntryEndpoint(host, None, {}, {}, "", "", 0, "")) for host in hosts]
    return tuple(
        _endpoint_of(entry, endpoint, {_key(entry, host): _map_own_ports(endpoint, entry.ports)}, around, config)
        for host, endpoint in implied
    )


def _endpoint_of(
    entry: KubeServiceEntry,
    endpoint: EntryEndpoint,
    services: Mapping[NamespacedHostname, tuple[PortMapping, ...]],
    around: Surroundings,
    config: Config,
    waypoint: GatewayAddress | None = None,
) -> Workload:
    return _workload(
        waypoint=waypoint,
        uid=endpoint_uid(entry, endpoint, config),
        name=entry.name,
        workload_name=entry.name,
        namespace=entry.namespace,
        labels=entry.labels,
        annotations=entry.annotations,
        endpoint=endpoint,
        services=services,
        around=around,
        config=config,
    )


def translate_workload_entry(
    entry: KubeWorkloadEntry, *, around: Surroundings, config: Config, waypoint: GatewayAddress | None = None
) -> Workload:
    """Selected by the Services and ServiceEntries of its namespace, as a pod is. Nothing says whether it is healthy, so it is."""
    services = {service_key(s, config): _map_service_ports(entry.endpoint, s) for s in around.services if s.selects(entry.labels)}
    for selecting in around.entries:
        if selecting.entry.selects(entry.labels):
            ports = _map_own_ports(entry.endpoint, selecting.entry.ports)
            services |= {_key(selecting.entry, host): ports for host in selecting.hosts}
    return _workload(
        waypoint=waypoint,
        uid=workload_entry_uid(entry, config),
        name=entry.name,
        workload_name=entry.annotations.get(AUTO_REGISTRATION_GROUP) or entry.labels.get(WORKLOAD_NAME) or entry.name,
        namespace=entry.namespace,
        labels=entry.labels,
        annotations=entry.annotations,
        endpoint=entry.endpoint,
        services=services,
        around=around,
        config=config,
    )


def _workload(
    *,
    waypoint: GatewayAddress | None,
    uid: str,
    name: str,
    workload_name: str,
    namespace: str,
    labels: Mapping[str, str],
    annotations: Mapping[str, str],
    endpoint: EntryEndpoint,
    services: Mapping[NamespacedHostname, tuple[PortMapping, ...]],
    around: Surroundings,
    config: Config,
) -> Workload:
    return Workload(
        uid=uid,
        name=name,
        waypoint=waypoint,
        namespace=namespace,
        addresses=(endpoint.ip,) if endpoint.ip is not None else (),
        hostname=endpoint.address if endpoint.ip is None else "",
        network=endpoint.network or around.network,
        tunnel_protocol=tunnel_protocol(labels, annotations),
        native_tunnel=speaks_hbone(labels),
        trust_domain=config.trust_domain,
        service_account=endpoint.service_account,
        canonical_name=canonical_name(labels, workload_name),
        canonical_revision=canonical_revision(labels),
        workload_type=WorkloadType.POD,
        workload_name=workload_name,
        authorization_policies=around.policies_for(labels),
        cluster_id=config.cluster_id,
        locality=_locality(endpoint.locality),
        services=services,
        capacity=endpoint.weight or 1,
    )


def _key(entry: KubeServiceEntry, host: str) -> NamespacedHostname:
    return NamespacedHostname(entry.namespace, host)


def _locality(text: str) -> Locality:
    region, zone, subzone, *_ = (*text.split("/"), "", "", "")
    return Locality(region, zone, subzone)


def _map_own_ports(endpoint: EntryEndpoint, ports: Iterable[EntryPort]) -> tuple[PortMapping, ...]:
    """A ServiceEntry's ports: the endpoint's own number for the port's name goes before the ServiceEntry's."""
    return tuple(PortMapping(port.port, endpoint.ports.get(port.name) or port.target or port.port) for port in ports)


def _map_service_ports(endpoint: EntryEndpoint, service: KubeService) -> tuple[PortMapping, ...]:
    """A Service's ports: a named target must have a number here, else the port is left out; a number may be overridden by the
    Service's name for the port."""
    mappings: dict[int, PortMapping] = {}
    for port in service.ports:
        target = endpoint.ports.get(port.target) if isinstance(port.target, str) else endpoint.ports.get(port.name, port.target)
        if target is not None and (port.protocol == "TCP" or port.port not in mappings):
            mappings[port.port] = PortMapping(port.port, target)
    return tuple(mappings.values())

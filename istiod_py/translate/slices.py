"""EndpointSlices as proxies see them: endpoints that are no pods become workloads (reference: Istio's ambient index). Pods that a slice
lists for a Service without selector are that Service's as if it had selected them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from istiod_py.translate.config import Config
from istiod_py.translate.services import service_key
from mesh.kube.endpointslice import KubeEndpointSlice, SliceEndpoint
from mesh.kube.pod import KubePod
from mesh.kube.service import KubeService
from mesh.model.address import NamespacedHostname
from mesh.model.workload import HealthStatus, Locality, NetworkMode, PortMapping, Workload


class ListedPods:
    """The pods that slices list for Services without selector."""

    def __init__(self, slices: Iterable[KubeEndpointSlice], find_service: Mapping[tuple[str, str], KubeService]) -> None:
        self._by_name: dict[tuple[str, str], list[tuple[str, KubeService]]] = {}
        for found in slices:
            service = find_service.get((found.namespace, found.service))
            if service is not None and not service.selector:
                for pod in found.pods:
                    self._by_name.setdefault((pod.namespace, pod.name), []).append((pod.uid, service))

    def services_of(self, pod: KubePod) -> tuple[KubeService, ...]:
        """In order of name. A reference with a uid means that pod only, and none that came after it under its name."""
        listed = self._by_name.get((pod.namespace, pod.name))
        if listed is None:
            return ()
        meant = {(s.namespace, s.name): s for uid, s in listed if not uid or uid == pod.uid}
        return tuple(meant[key] for key in sorted(meant))


def translate_slice(
    found: KubeEndpointSlice, service: KubeService, *, localities: Mapping[str, Locality], network: str, config: Config
) -> tuple[Workload, ...]:
    """A workload for each endpoint that is no pod. Nothing is known of it but its address, which may be that of a host with other things
    on it: it is no destination by itself, names no policies, and has no identity."""
    services = {service_key(service, config): tuple(_map_ports(found, service))}
    workloads: dict[str, Workload] = {}
    for endpoint in found.endpoints:
        uid = f"{config.cluster_id}/discovery.k8s.io/EndpointSlice/{found.namespace}/{found.name}/{endpoint.addresses[0]}"
        locality = localities.get(endpoint.node, _NOWHERE)
        workloads.setdefault(uid, _workload(uid, found, endpoint, services, locality, network, config))
    return tuple(workloads.values())


_NOWHERE = Locality()


def _workload(
    uid: str,
    found: KubeEndpointSlice,
    endpoint: SliceEndpoint,
    services: Mapping[NamespacedHostname, tuple[PortMapping, ...]],
    locality: Locality,
    network: str,
    config: Config,
) -> Workload:
    return Workload(
        uid=uid,
        name=found.name,
        namespace=found.namespace,
        addresses=endpoint.addresses,
        network=network,
        trust_domain=config.trust_domain,
        service_account="",
        node=endpoint.node,
        status=HealthStatus.HEALTHY if endpoint.ready else HealthStatus.UNHEALTHY,
        cluster_id=config.cluster_id,
        locality=locality,
        network_mode=NetworkMode.HOST_NETWORK,
        services=services,
    )


def _map_ports(found: KubeEndpointSlice, service: KubeService) -> Iterator[PortMapping]:
    """A slice has the Service's ports by name, and the numbers that its endpoints serve them on."""
    numbers = {port.name: port.port for port in found.ports if port.port and port.protocol == "TCP"}
    for port in service.ports:
        if port.protocol == "TCP" and port.name in numbers:
            yield PortMapping(port.port, numbers[port.name])

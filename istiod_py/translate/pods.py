"""A Kubernetes Pod as proxies see it: a workload (reference: Istio's ambient workload index)."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from istiod_py.translate.config import Config
from istiod_py.translate.services import service_key
from istiod_py.translate.surroundings import Surroundings
from istiod_py.translate.traits import canonical_name, canonical_revision, speaks_hbone, tunnel_protocol
from mesh.kube.pod import KubePod
from mesh.kube.service import KubeService, KubeServicePort
from mesh.kube.serviceentry import EntryPort
from mesh.model.address import GatewayAddress, NamespacedHostname
from mesh.model.labels import AGENT_LABELS, CAPTURED_BY, REGION, SUBZONE, WORKLOAD_NAME, ZONE
from mesh.model.workload import ApplicationTunnel, HealthStatus, Locality, NetworkMode, PortMapping, Workload, WorkloadType

_CRON_JOB_RUN = re.compile(r"(.+)-\d{8,10}\Z")
"""A Job made by a CronJob is named after it and its scheduled minute."""


def pod_uid(pod: KubePod, config: Config) -> str:
    """The API group of pods is empty, hence the two slashes."""
    return f"{config.cluster_id}//Pod/{pod.namespace}/{pod.name}"


def locality_of_node(labels: Mapping[str, str]) -> Locality:
    return Locality(labels.get(REGION, ""), labels.get(ZONE, ""), labels.get(SUBZONE, ""))


def find_captors(pods: Iterable[KubePod], root_namespace: str) -> dict[str, set[str]]:
    """By node, the uids of the DaemonSets that its agents belong to."""
    captors: dict[str, set[str]] = {}
    for pod in pods:
        if pod.namespace == root_namespace and pod.controller is not None and AGENT_LABELS.items() <= pod.labels.items():
            captors.setdefault(pod.node, set()).add(pod.controller.uid)
    return captors


def is_forsaken(pod: KubePod, captors: Mapping[str, Collection[str]]) -> bool:
    """Whether the pod is said to be captured by agents of a DaemonSet that is gone, since all that its node has are another's. While a node
    has no agent nothing is known: the word stands, and traffic that nobody receives fails rather than go out in plain text."""
    captor = pod.annotations.get(CAPTURED_BY)
    present = captors.get(pod.node, ())
    return captor is not None and len(present) > 0 and captor not in present


def translate_pod(
    pod: KubePod,
    *,
    around: Surroundings,
    listed: Iterable[KubeService],
    locality: Locality,
    config: Config,
    waypoint: GatewayAddress | None = None,
    tunnel: ApplicationTunnel | None = None,
    forsaken: bool = False,
) -> Workload | None:
    """None when there is nothing to reach: the pod has finished, or has no address yet. One that is pending with an address counts,
    its init containers talk already. ``listed``: Services without selector whose EndpointSlices name the pod. ``tunnel``: the pod is a
    waypoint's, and how it is handed connections. ``forsaken``: agents of a former installation said that they captured it.
    """
    if pod.finished or not pod.ips:
        return None
    name = workload_name(pod)
    return Workload(
        uid=pod_uid(pod, config),
        name=pod.name,
        namespace=pod.namespace,
        addresses=pod.ips,
        network=around.network,
        tunnel_protocol=tunnel_protocol(pod.labels, {} if forsaken else pod.annotations),
        native_tunnel=speaks_hbone(pod.labels),
        trust_domain=config.trust_domain,
        service_account=pod.service_account,
        node=pod.node,
        waypoint=waypoint,
        canonical_name=canonical_name(pod.labels, name),
        canonical_revision=canonical_revision(pod.labels),
        workload_type=WorkloadType.POD,
        workload_name=name,
        application_tunnel=tunnel,
        authorization_policies=around.policies_for(pod.labels),
        status=HealthStatus.HEALTHY if pod.ready and not pod.deleting else HealthStatus.UNHEALTHY,
        cluster_id=config.cluster_id,
        locality=locality,
        network_mode=NetworkMode.HOST_NETWORK if pod.host_network else NetworkMode.STANDARD,
        services=_services_of(pod, around, listed, config),
    )


def _services_of(
    pod: KubePod, around: Surroundings, listed: Iterable[KubeService], config: Config
) -> dict[NamespacedHostname, tuple[PortMapping, ...]]:
    services = {service_key(s, config): map_ports(pod, s.ports) for s in around.services if s.selects(pod.labels)}
    for service in listed:
        services[service_key(service, config)] = map_ports(pod, service.ports)
    for selecting in around.entries:
        if selecting.entry.selects(pod.labels):
            ports = map_entry_ports(pod, selecting.entry.ports)
            for host in selecting.hosts:
                services[NamespacedHostname(pod.namespace, host)] = ports
    return services


def workload_name(pod: KubePod) -> str:
    """The label, else the name of what made the pod (a Deployment through its ReplicaSet, a CronJob through its Job), else the pod's."""
    label = pod.labels.get(WORKLOAD_NAME)
    if label:
        return label
    if not pod.generate_name or pod.controller is None:
        return pod.name
    owner = pod.controller.name
    match pod.controller.kind:
        case "ReplicaSet":
            for template_hash in (pod.labels.get("pod-template-hash"), pod.labels.get("rollouts-pod-template-hash")):
                if template_hash and owner.endswith(f"-{template_hash}"):
                    return owner.removesuffix(f"-{template_hash}")
        case "Job":
            run = _CRON_JOB_RUN.match(owner)
            return run[1] if run else owner
        case "ReplicationController":
            return pod.labels.get("deploymentconfig") or owner
    return owner


def map_ports(pod: KubePod, ports: Iterable[KubeServicePort]) -> tuple[PortMapping, ...]:
    """The service's ports as this pod serves them; a named target that the pod does not have is left out for this pod.

    A port served over TCP and UDP is listed once, as TCP: proxies carry nothing else, and the message does not say which is which.
    """
    mappings: dict[int, PortMapping] = {}
    for port in ports:
        target = port.target if isinstance(port.target, int) else pod.find_port(port.target)
        if target is not None and (port.protocol == "TCP" or port.port not in mappings):
            mappings[port.port] = PortMapping(port.port, target)
    return tuple(mappings.values())


def map_entry_ports(pod: KubePod, ports: Iterable[EntryPort]) -> tuple[PortMapping, ...]:
    """A ServiceEntry's ports as this pod serves them: a container's port of the same name goes before the ServiceEntry's own number."""
    return tuple(PortMapping(port.port, (pod.find_port(port.name) if port.name else None) or port.target or port.port) for port in ports)

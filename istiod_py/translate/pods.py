"""A Kubernetes Pod as proxies see it: a workload (reference: Istio's ambient workload index)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from istiod_py.translate.config import Config
from istiod_py.translate.services import service_key
from mesh.kube.pod import KubePod
from mesh.kube.service import KubeService, KubeServicePort
from mesh.model.labels import CANONICAL_NAME, CANONICAL_REVISION, REDIRECTION, REGION, SUBZONE, TUNNEL, WORKLOAD_NAME, ZONE
from mesh.model.workload import HealthStatus, Locality, NetworkMode, PortMapping, TunnelProtocol, Workload, WorkloadType

_CRON_JOB_RUN = re.compile(r"(.+)-\d{8,10}\Z")
"""A Job made by a CronJob is named after it and its scheduled minute."""


def pod_uid(pod: KubePod, config: Config) -> str:
    """The API group of pods is empty, hence the two slashes."""
    return f"{config.cluster_id}//Pod/{pod.namespace}/{pod.name}"


def locality_of_node(labels: Mapping[str, str]) -> Locality:
    return Locality(labels.get(REGION, ""), labels.get(ZONE, ""), labels.get(SUBZONE, ""))


def translate_pod(
    pod: KubePod,
    *,
    services: Iterable[KubeService],
    authorization_policies: tuple[str, ...],
    locality: Locality,
    network: str,
    config: Config,
) -> Workload | None:
    """None when there is nothing to reach: the pod has finished, or has no address yet. One that is pending with an address counts,
    its init containers talk already. ``services`` are all of the pod's namespace.

    The waypoint of a workload is not looked up yet; `Workload.waypoint` is where it goes.
    """
    if pod.finished or not pod.ips:
        return None
    native = "http" in (item.strip() for item in pod.labels.get(TUNNEL, "").split(","))
    captured = pod.annotations.get(REDIRECTION) == "enabled"
    name = workload_name(pod)
    return Workload(
        uid=pod_uid(pod, config),
        name=pod.name,
        namespace=pod.namespace,
        addresses=pod.ips,
        network=network,
        tunnel_protocol=TunnelProtocol.HBONE if captured or native else TunnelProtocol.NONE,
        native_tunnel=native,
        trust_domain=config.trust_domain,
        service_account=pod.service_account,
        node=pod.node,
        canonical_name=_first_label(pod, CANONICAL_NAME, "app.kubernetes.io/name", "app") or name,
        canonical_revision=_first_label(pod, CANONICAL_REVISION, "app.kubernetes.io/version", "version") or "latest",
        workload_type=WorkloadType.POD,
        workload_name=name,
        authorization_policies=authorization_policies,
        status=HealthStatus.HEALTHY if pod.ready and not pod.deleting else HealthStatus.UNHEALTHY,
        cluster_id=config.cluster_id,
        locality=locality,
        network_mode=NetworkMode.HOST_NETWORK if pod.host_network else NetworkMode.STANDARD,
        services={service_key(s, config): map_ports(pod, s.ports) for s in services if s.type != "ExternalName" and s.selects(pod.labels)},
    )


def _first_label(pod: KubePod, *names: str) -> str:
    return next((pod.labels[name] for name in names if pod.labels.get(name)), "")


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

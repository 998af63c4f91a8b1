"""What the waypoint reads from its environment. Names are those of Istio's proxy where it has one; the rest is marked ours."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from mesh.model.address import NamespacedHostname
from mesh.model.identity import SpiffeId
from mesh.runtime.controlplane import ControlPlaneConfig
from mesh.runtime.env import (
    domain,
    from_environment,
    integer,
    nonempty,
    text,
    variable,
)


@dataclass(frozen=True, slots=True)
class WaypointConfig(ControlPlaneConfig):
    """The whole configuration; a field without a reader does not exist."""

    gateway_name: str = variable("GATEWAY_NAME", parse=nonempty, doc="the Gateway that this waypoint is, in POD_NAMESPACE (ours)")
    pod_name: str = variable("POD_NAME", parse=nonempty, doc="this waypoint's own pod")
    pod_namespace: str = variable("POD_NAMESPACE", parse=nonempty, doc="namespace of the pod, and of the Gateway")
    service_account: str = variable(
        "SERVICE_ACCOUNT", "ISTIO_META_SERVICE_ACCOUNT", parse=nonempty, doc="the pod's service account: the waypoint's identity"
    )
    node_name: str = variable("NODE_NAME", "ISTIO_META_NODE_NAME", parse=text, default="", doc="the node the pod runs on")
    instance_ip: str = variable("INSTANCE_IP", parse=nonempty, doc="an address of the pod")
    network: str = variable("ISTIO_META_NETWORK", parse=text, default="", doc="the network of the pod, until the control plane tells it")
    trust_domain: str = variable("TRUST_DOMAIN", parse=nonempty, default="cluster.local", doc="trust domain of the waypoint's identity")
    cluster_domain: str = variable("CLUSTER_DOMAIN", parse=domain, default="cluster.local", doc="domain of the cluster's services")
    drain: float = variable(
        "TERMINATION_DRAIN_DURATION_SECONDS",
        parse=integer(0, 86_400),
        default="45",
        doc="seconds that connections may go on after SIGTERM before they are ended",
    )
    max_streams: int = variable(
        "MAX_CONCURRENT_STREAMS",
        parse=integer(1, 65_535),
        default="100",
        doc="connections that one HBONE connection carries at a time (ours)",
    )
    hbone_address: str = variable("HBONE_ADDR", parse=nonempty, default="[::]:15008", doc="where connections come in (ours)")
    admin_address: str = variable(
        "ADMIN_ADDR", parse=nonempty, default="localhost:15000", doc="where config_dump, why and logging are served"
    )
    stats_address: str = variable("STATS_ADDR", parse=nonempty, default="[::]:15020", doc="where metrics are served")
    readiness_address: str = variable("READINESS_ADDR", parse=nonempty, default="[::]:15021", doc="where /healthz/ready is served")

    @property
    def identity(self) -> SpiffeId:
        return SpiffeId(self.trust_domain, self.pod_namespace, self.service_account)

    @property
    def key(self) -> str:
        """``namespace/name`` of the Gateway."""
        return f"{self.pod_namespace}/{self.gateway_name}"

    @property
    def service(self) -> NamespacedHostname:
        """The service by which the mesh names this waypoint."""
        return NamespacedHostname(self.pod_namespace, f"{self.gateway_name}.{self.pod_namespace}.svc.{self.cluster_domain}")


def read_config(environ: Mapping[str, str] = os.environ) -> WaypointConfig:
    """Raises mesh.runtime.env.InvalidEnvironment, naming every mistake."""
    return from_environment(WaypointConfig, environ)

"""What the agent reads from its environment. Names are ztunnel's where it has one; the rest is marked ours.

Brain and movers read the same environment, so a mover needs no configuration message. `docs/reference/ztunnel.md` is tested against it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mesh.runtime.controlplane import ControlPlaneConfig
from mesh.runtime.env import (
    EnvProblem,
    InvalidEnvironment,
    boolean,
    domain,
    duration,
    from_environment,
    integer,
    nonempty,
    optional,
    path,
    paths,
    text,
    variable,
)
from ztunnel_py.supervisor import DEFAULT_RUN_DIR

if TYPE_CHECKING:
    from mesh.kube.kubeconfig import ClusterAccess


def mover_count(value: str) -> int:
    """A number of processes, or ``auto``: one per CPU, at most 4."""
    if value == "auto":
        return max(1, min(4, len(os.sched_getaffinity(0))))
    return integer(1, 64)(value)


DEFAULT_DRAIN = 5.0
"""As ztunnel."""
SPARE = "spare"
"""Name of the mover that runs apart from the agent, in a container of its own, and outlives it: `ztunnel-py mover spare`."""


@dataclass(frozen=True, slots=True)
class AgentConfig(ControlPlaneConfig):
    """The whole configuration; a field without a reader does not exist."""

    node_name: str = variable("NODE_NAME", parse=nonempty, doc="the node this agent runs on: it serves the pods of this node")
    source_paths: tuple[Path, ...] | None = optional(
        "MESH_SOURCE", parse=paths, doc="directories of Kubernetes YAML, separated by colons: the user's, then status overlays (ours)"
    )
    status_dir: Path | None = optional(
        "MESH_STATUS_DIR", parse=path, doc="with MESH_SOURCE: overlay directory in which the agent reports captured pods (ours)"
    )
    kubeconfig: Path | None = optional(
        "KUBECONFIG", parse=path, doc="without MESH_SOURCE: kubeconfig file of the API server that knows the node's pods"
    )
    api_host: str | None = optional(
        "KUBERNETES_SERVICE_HOST",
        parse=nonempty,
        doc="without MESH_SOURCE and KUBECONFIG: the cluster's API server, as our own service account",
    )
    proc: Path = variable(
        "HOST_PROC", parse=path, default="/proc", doc="where the node's /proc is mounted; shows which network namespace a pod has (ours)"
    )
    netns_dir: Path = variable(
        "NETNS_DIR", parse=path, default="/var/run/netns", doc="where the node's named network namespaces are mounted (ours)"
    )
    probe_netns: Path | None = optional(
        "PROBE_NETNS",
        parse=path,
        doc="the node's own network namespace, from which its kubelet reaches captured pods also under STRICT; unset: it does not (ours)",
    )
    cni_bin_dir: Path | None = optional(
        "CNI_BIN_DIR", parse=path, doc="where the node's /opt/cni/bin is mounted; unset: no CNI plugin is installed (ours)"
    )
    cni_net_dir: Path = variable(
        "CNI_NET_DIR", parse=path, default="/host/etc/cni/net.d", doc="where the node's CNI_NET_DIR_ON_NODE is mounted (ours)"
    )
    cni_net_dir_on_node: str = variable(
        "CNI_NET_DIR_ON_NODE",
        parse=nonempty,
        default="/etc/cni/net.d",
        doc="where the node's container runtime looks for CNI plugins (ours)",
    )
    cni_plugin: Path = variable(
        "CNI_PLUGIN",
        parse=path,
        default="/opt/ambient-mesh/libexec/ambient-mesh-cni",
        doc="the CNI plugin's program, to be installed (ours)",
    )
    cni_account: str = variable(
        "CNI_SERVICE_ACCOUNT",
        parse=nonempty,
        default="ztunnel-cni",
        doc="the service account, in POD_NAMESPACE, that the CNI plugin asks the API server as (ours)",
    )
    cni_socket: Path = variable(
        "CNI_SOCKET",
        parse=path,
        default="/var/run/ambient-mesh/cni.sock",
        doc="where CNI plugins ask for pods to be captured; the same path on the node (ours)",
    )
    run_dir: Path = variable(
        "RUN_DIR",
        parse=path,
        default=DEFAULT_RUN_DIR,
        doc="directory that all agents of the node share: their sockets, and the lock that says who is in charge (ours)",
    )
    movers: int = variable(
        "MOVERS", parse=mover_count, default="auto", doc="number of data plane processes; auto: one per CPU, at most 4 (ours)"
    )
    spare_mover: bool = variable(
        "SPARE_MOVER",
        parse=boolean,
        default="false",
        doc="true: one of these is not started by the agent but beside it, as `ztunnel-py mover spare`, and outlives it (ours)",
    )
    trust_domain: str = variable(
        "TRUST_DOMAIN", parse=nonempty, default="cluster.local", doc="trust domain of pods that xDS has not described yet"
    )
    pod_name: str = variable("POD_NAME", parse=text, default="ztunnel", doc="this agent's own pod, for the xDS node id")
    pod_namespace: str = variable("POD_NAMESPACE", parse=nonempty, default="istio-system", doc="namespace of this agent's own pod")
    instance_ip: str = variable(
        "INSTANCE_IP", parse=nonempty, default="1.1.1.1", doc="address of this agent's own pod, for the xDS node id"
    )
    pool_max_streams: int = variable(
        "POOL_MAX_STREAMS_PER_CONNECTION",
        parse=integer(1, 65535),
        default="100",
        doc="connections of applications that share one HBONE connection at a time",
    )
    pool_unused_release: float = variable(
        "POOL_UNUSED_RELEASE_TIMEOUT", parse=duration, default="5m", doc="how long an HBONE connection stays that carries nothing"
    )
    drain_deadline: float | None = optional(
        "CONNECTION_TERMINATION_DEADLINE",
        parse=duration,
        doc="how long connections may go on after SIGTERM before they are ended; by default a second less than the next, or 5 s",
    )
    grace: int | None = optional(
        "TERMINATION_GRACE_PERIOD_SECONDS", parse=integer(1, 86_400), doc="terminationGracePeriodSeconds of the agent's pod"
    )
    ipv6: bool = variable("IPV6_ENABLED", parse=boolean, default="true", doc="false: listeners are IPv4 only, whatever the pod has")
    dns_proxy: bool = variable(
        "ISTIO_META_DNS_CAPTURE", parse=boolean, default="true", doc="whether the agent answers look-ups of names in pods, on port 15053"
    )
    dns_capture: bool = variable(
        "AMBIENT_DNS_CAPTURE",
        parse=boolean,
        default="true",
        doc="whether pods' look-ups are redirected to the agent; annotation `ambient.istio.io/dns-capture` of a pod goes before it",
    )
    cluster_domain: str = variable("CLUSTER_DOMAIN", parse=domain, default="cluster.local", doc="domain of the cluster's services")
    preferred_namespace: str | None = optional(
        "PREFERED_SERVICE_NAMESPACE",
        parse=nonempty,
        doc="whose service a name means when several namespaces have one and none is the caller's",
    )
    admin_address: str = variable("ADMIN_ADDR", parse=nonempty, default="localhost:15000", doc="where config_dump and logging are served")
    stats_address: str = variable("STATS_ADDR", parse=nonempty, default="[::]:15020", doc="where metrics are served")
    readiness_address: str = variable("READINESS_ADDR", parse=nonempty, default="[::]:15021", doc="where /healthz/ready is served")

    cluster: ClusterAccess | None = None
    """How to reach the API server, where that is the source."""

    @property
    def drain(self) -> float:
        """Seconds from SIGTERM to the end of the last connection. A second of the grace period is left for the end itself."""
        if self.drain_deadline is not None:
            return self.drain_deadline
        return DEFAULT_DRAIN if self.grace is None else max(self.grace - 1.0, 0.5)

    @property
    def sources(self) -> tuple[Path, ...]:
        return self.source_paths or ()

    @property
    def own_dir(self) -> Path:
        """This agent's own part of the run directory: during a roll-out a node has two agents."""
        return self.run_dir / self.pod_name

    @property
    def socket_path(self) -> Path:
        """Where the brain listens for movers."""
        return self.own_dir / "brain.sock"

    @property
    def own_movers(self) -> int:
        """How many movers the brain starts."""
        return max(1, self.movers - self.spare_mover)

    @property
    def mover_names(self) -> tuple[str, ...]:
        """Of all movers: those that the brain starts are called by numbers."""
        return (*((SPARE,) if self.spare_mover else ()), *map(str, range(self.own_movers)))


def read_config(environ: Mapping[str, str] = os.environ) -> AgentConfig:
    """Raises mesh.runtime.env.InvalidEnvironment, naming every mistake."""
    problems: tuple[EnvProblem, ...] = ()
    config: AgentConfig | None = None
    try:
        config = from_environment(AgentConfig, environ)
    except InvalidEnvironment as exc:
        problems = exc.problems
    problems += _missing_source(environ)
    if config is None or problems:
        raise InvalidEnvironment(problems)
    return config


def read_access(config: AgentConfig, environ: Mapping[str, str] = os.environ) -> AgentConfig:
    """With the way to the API server, where that is the source. For the brain: movers have no use for it. Raises KubeconfigError."""
    if config.sources:
        return config
    from mesh.kube.kubeconfig import IN_CLUSTER, find_access  # reads YAML: a fifth of what a mover takes to start, and of no use to it

    return replace(config, cluster=find_access(str(config.kubeconfig) if config.kubeconfig else IN_CLUSTER, environ))


def _missing_source(environ: Mapping[str, str]) -> tuple[EnvProblem, ...]:
    if environ.get("MESH_SOURCE"):
        needed = "a directory to report captured pods in, since MESH_SOURCE is set"
        return () if environ.get("MESH_STATUS_DIR") else (EnvProblem("MESH_STATUS_DIR", None, needed),)
    if environ.get("KUBECONFIG") or environ.get("KUBERNETES_SERVICE_HOST"):
        return ()
    return (EnvProblem("MESH_SOURCE", None, "directories of Kubernetes YAML; or KUBECONFIG or KUBERNETES_SERVICE_HOST for an API server"),)

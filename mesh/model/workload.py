"""A workload: one pod (or other endpoint) as the control plane describes it (`istio.workload.Workload`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache

import msgspec

from mesh.model.address import GatewayAddress, IpAddress, NamespacedHostname
from mesh.model.identity import DEFAULT_TRUST_DOMAIN, SpiffeId


class TunnelProtocol(Enum):
    """How a workload is reached. Values are Istio's wire numbers; LEGACY_ISTIO_MTLS (2) is refused at decoding."""

    NONE = 0
    HBONE = 1


class WorkloadType(Enum):
    DEPLOYMENT = 0
    CRONJOB = 1
    POD = 2
    JOB = 3


class HealthStatus(Enum):
    HEALTHY = 0
    UNHEALTHY = 1


class NetworkMode(Enum):
    STANDARD = 0
    HOST_NETWORK = 1


class TunnelApplicationProtocol(Enum):
    NONE = 0
    PROXY = 1


@dataclass(frozen=True, slots=True)
class ApplicationTunnel:
    """How a gateway-implementing workload takes tunnelled bytes: plain or behind a PROXY v2 header, on ``port``."""

    protocol: TunnelApplicationProtocol
    port: int | None


@dataclass(frozen=True, slots=True)
class Locality:
    region: str = ""
    zone: str = ""
    subzone: str = ""


@dataclass(frozen=True, slots=True)
class PortMapping:
    """One port of a service as one workload serves it. ``target_port`` 0 means the name did not resolve."""

    service_port: int
    target_port: int


class Workload(msgspec.Struct, frozen=True):
    """Field meanings: reference `istio.workload.Workload`; ``uid`` is the primary key, e.g. ``Kubernetes//Pod/ns/name``.

    A struct, as is a `Service`: one is made of every endpoint of the mesh, and again whenever it changes, and a frozen dataclass sets each
    of its fields by a call.
    """

    uid: str
    name: str
    namespace: str
    addresses: tuple[IpAddress, ...] = ()
    network: str = ""
    hostname: str = ""
    tunnel_protocol: TunnelProtocol = TunnelProtocol.NONE
    trust_domain: str = DEFAULT_TRUST_DOMAIN
    service_account: str = "default"
    node: str = ""
    waypoint: GatewayAddress | None = None
    network_gateway: GatewayAddress | None = None
    canonical_name: str = ""
    canonical_revision: str = ""
    workload_type: WorkloadType = WorkloadType.DEPLOYMENT
    workload_name: str = ""
    native_tunnel: bool = False
    application_tunnel: ApplicationTunnel | None = None
    authorization_policies: tuple[str, ...] = ()
    """Names ``namespace/name`` of the selector-scoped policies that apply; scope-wide ones are found by scope."""
    status: HealthStatus = HealthStatus.HEALTHY
    cluster_id: str = "Kubernetes"
    locality: Locality = Locality()
    network_mode: NetworkMode = NetworkMode.STANDARD
    services: Mapping[NamespacedHostname, tuple[PortMapping, ...]] = msgspec.field(default_factory=dict)
    capacity: int = 1

    @property
    def identity(self) -> SpiffeId:
        return _identity(self.trust_domain, self.namespace, self.service_account)


_identity = lru_cache(maxsize=8192)(SpiffeId)
"""Every connection asks for two, and a frozen dataclass sets every field by a call."""

"""A service: a hostname with virtual addresses and ports (`istio.workload.Service`). Its endpoints live in `mesh.state`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import msgspec

from mesh.model.address import Cidr, GatewayAddress, NamespacedHostname, NetworkAddress


class AppProtocol(Enum):
    UNKNOWN = 0
    HTTP11 = 1
    HTTP2 = 2
    GRPC = 3
    TCP = 4
    TLS = 5


class LoadBalancingScope(Enum):
    REGION = 1
    ZONE = 2
    SUBZONE = 3
    NODE = 4
    CLUSTER = 5
    NETWORK = 6


class LoadBalancingMode(Enum):
    STANDARD = 0
    STRICT = 1
    FAILOVER = 2
    PASSTHROUGH = 3


class HealthPolicy(Enum):
    ONLY_HEALTHY = 0
    ALLOW_ALL = 1


class IpFamilies(Enum):
    AUTOMATIC = 0
    IPV4_ONLY = 1
    IPV6_ONLY = 2
    DUAL = 3


class Visibility(Enum):
    PUBLIC = 0
    NAMESPACE = 1


@dataclass(frozen=True, slots=True)
class ServicePort:
    """``target_port`` 0: named, each workload maps it for itself."""

    service_port: int
    target_port: int
    app_protocol: AppProtocol = AppProtocol.UNKNOWN


@dataclass(frozen=True, slots=True)
class LoadBalancing:
    routing_preference: tuple[LoadBalancingScope, ...] = ()
    mode: LoadBalancingMode = LoadBalancingMode.STANDARD
    health_policy: HealthPolicy = HealthPolicy.ONLY_HEALTHY


@dataclass(frozen=True, slots=True)
class WeightedWaypoint:
    waypoint: GatewayAddress
    weight: int


@dataclass(frozen=True, slots=True)
class CidrVip:
    """A virtual address range of a ServiceEntry, within a network."""

    network: str
    cidr: Cidr


class Service(msgspec.Struct, frozen=True):
    name: str
    namespace: str
    hostname: str
    addresses: tuple[NetworkAddress, ...] = ()
    cidr_addresses: tuple[CidrVip, ...] = ()
    ports: tuple[ServicePort, ...] = ()
    subject_alt_names: tuple[str, ...] = ()
    waypoint: GatewayAddress | None = None
    weighted_waypoints: tuple[WeightedWaypoint, ...] = ()
    load_balancing: LoadBalancing | None = None
    ip_families: IpFamilies = IpFamilies.AUTOMATIC
    canonical: bool = False
    visibility: Visibility = Visibility.PUBLIC

    @property
    def key(self) -> NamespacedHostname:
        return NamespacedHostname(self.namespace, self.hostname)

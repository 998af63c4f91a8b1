"""A Kubernetes Service as proxies see it (reference: Istio's ambient service registry)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from istiod_py.translate.config import Config
from mesh.kube.service import KubeService, KubeServicePort
from mesh.model.address import GatewayAddress, NamespacedHostname, NetworkAddress
from mesh.model.labels import TRAFFIC_DISTRIBUTION
from mesh.model.service import (
    AppProtocol,
    HealthPolicy,
    IpFamilies,
    LoadBalancing,
    LoadBalancingMode,
    LoadBalancingScope,
    Service,
    ServicePort,
    WeightedWaypoint,
)

_PROTOCOLS = {
    "http": AppProtocol.HTTP11,
    "http2": AppProtocol.HTTP2,
    "grpc": AppProtocol.GRPC,
    "tls": AppProtocol.TLS,
    "https": AppProtocol.TLS,
    "tcp": AppProtocol.TCP,
}
_STANDARD_APP_PROTOCOLS = {
    "kubernetes.io/h2c": AppProtocol.HTTP2,
    "kubernetes.io/ws": AppProtocol.HTTP11,
    "kubernetes.io/wss": AppProtocol.TLS,
}
_OTHER_PROTOCOLS = frozenset({"udp", "grpc-web", "mongo", "redis", "mysql", "http_proxy", "hbone"})
"""Names that Istio knows but that say nothing a node proxy acts on; they keep a well-known port from being guessed."""
_SERVER_FIRST_PORTS = frozenset({25, 53, 3306, 27017})
"""SMTP, DNS, MySQL, MongoDB: TCP unless the port's name says otherwise."""

_CLOSE = (LoadBalancingScope.NETWORK, LoadBalancingScope.REGION, LoadBalancingScope.ZONE)
_PREFERENCES = {
    "PreferClose": _CLOSE,
    "PreferSameZone": _CLOSE,
    "PreferSameNode": (*_CLOSE, LoadBalancingScope.SUBZONE, LoadBalancingScope.NODE),
}
_FAILOVERS = {name.lower(): LoadBalancing(scopes, LoadBalancingMode.FAILOVER) for name, scopes in _PREFERENCES.items()}
_FAMILIES = {
    frozenset({"IPv4"}): IpFamilies.IPV4_ONLY,
    frozenset({"IPv6"}): IpFamilies.IPV6_ONLY,
    frozenset({"IPv4", "IPv6"}): IpFamilies.DUAL,
}


def service_key(service: KubeService, config: Config) -> NamespacedHostname:
    return NamespacedHostname(service.namespace, f"{service.name}.{service.namespace}.svc.{config.domain_suffix}")


def translate_service(
    service: KubeService,
    *,
    namespace_annotations: Mapping[str, str],
    network: str,
    config: Config,
    waypoint: GatewayAddress | None = None,
    weighted: tuple[WeightedWaypoint, ...] = (),
) -> Service | None:
    """None for ExternalName: an alias in DNS, which proxies see as the name it stands for.

    A headless service has no address: its pods are reached by their own. UDP ports are in the list as Istio has them.
    """
    if service.type == "ExternalName":
        return None
    return Service(
        name=service.name,
        namespace=service.namespace,
        hostname=service_key(service, config).hostname,
        addresses=tuple(NetworkAddress(network, ip) for ip in service.cluster_ips),
        ports=tuple(_translate_port(port) for port in service.ports),
        waypoint=waypoint,
        weighted_waypoints=weighted,
        load_balancing=_load_balancing(service, namespace_annotations),
        ip_families=_FAMILIES.get(frozenset(service.ip_families), IpFamilies.AUTOMATIC),
        canonical=True,
    )


def _translate_port(port: KubeServicePort) -> ServicePort:
    return ServicePort(
        service_port=port.port,
        target_port=port.target if isinstance(port.target, int) else 0,
        app_protocol=_app_protocol(port),
    )


def _app_protocol(port: KubeServicePort) -> AppProtocol:
    """``appProtocol``, else the port's name up to the first ``-``, else what the port number is known for."""
    if port.protocol == "UDP":
        return AppProtocol.UNKNOWN
    if port.app_protocol in _STANDARD_APP_PROTOCOLS:
        return _STANDARD_APP_PROTOCOLS[port.app_protocol]
    name = (port.app_protocol or port.name).lower()
    if name.startswith("grpc-web"):
        return AppProtocol.UNKNOWN
    prefix = name.partition("-")[0]
    if port.port in _SERVER_FIRST_PORTS and prefix not in _PROTOCOLS and prefix not in _OTHER_PROTOCOLS:
        return AppProtocol.TCP
    return protocol_named(prefix)


def protocol_named(name: str) -> AppProtocol:
    """The protocol as Istio's objects name it, in any case; UNKNOWN for those that say nothing a node proxy acts on."""
    return _PROTOCOLS.get(name.lower(), AppProtocol.UNKNOWN)


def _load_balancing(service: KubeService, namespace_annotations: Mapping[str, str]) -> LoadBalancing | None:
    health = HealthPolicy.ALLOW_ALL if service.publish_not_ready else HealthPolicy.ONLY_HEALTHY
    if service.internal_traffic_local:
        return LoadBalancing((LoadBalancingScope.NODE,), LoadBalancingMode.STRICT, health)
    if service.traffic_distribution:
        chosen: LoadBalancing | None = _FAILOVERS[service.traffic_distribution.lower()]
    else:
        chosen = distribution_balancing(service.annotations, namespace_annotations)
    if health is HealthPolicy.ONLY_HEALTHY:
        return chosen
    return replace(chosen or LoadBalancing(), health_policy=health)


def distribution_balancing(annotations: Mapping[str, str], namespace_annotations: Mapping[str, str]) -> LoadBalancing | None:
    """As the annotation on the object says, else the one on its namespace, in any case. Istio ignores a value it does not know; so
    does this."""
    for where in (annotations, namespace_annotations):
        if (chosen := _FAILOVERS.get(where.get(TRAFFIC_DISTRIBUTION, "").lower())) is not None:
            return chosen
    return None

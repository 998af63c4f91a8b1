"""The whole configuration of each waypoint: its settings, the services it stands before, all destinations that their routes name, and the
policies that are for it. Nothing else: a waypoint of ten services does not hear of the other ten thousand.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple, Protocol, TypeAlias

from istiod_py.translate.config import Config
from istiod_py.translate.memo import Memo
from istiod_py.translate.waypoints import Waypoint
from mesh.model.address import NamespacedHostname
from mesh.model.l7.destination import DestinationConfig
from mesh.model.l7.policy import AuthorizationPolicy, RequestAuthentication
from mesh.model.l7.routing import Destination, Forward, Origin, Retry, Route, WeightedDestination
from mesh.model.l7.waypoint import L7Resource, PortConfig, ServiceConfig, WaypointSettings
from mesh.model.l7.waypoint import Protocol as PortProtocol
from mesh.model.service import AppProtocol, Service

L7Policy: TypeAlias = AuthorizationPolicy | RequestAuthentication


class L7Key(NamedTuple):
    """Of one resource of one waypoint; ``kind`` is its class."""

    waypoint: str
    kind: str
    key: str


class L7Rules(Protocol):
    """What routes, rules and policies say. Each must give the same instance, or an equal one, as long as what it depends on is the same."""

    def service_config(self, service: Service) -> ServiceConfig:
        """How requests to a service are routed."""

    def destination_config(self, key: NamespacedHostname) -> DestinationConfig:
        """How endpoints of a service are chosen and reached; for one that is not known, the defaults."""

    def policies_of(self, waypoint: Waypoint, services: tuple[str, ...]) -> Iterable[L7Policy]:
        """Those attached to the waypoint, its class, or one of ``services`` (``namespace/hostname``, those it stands before)."""


Named: TypeAlias = tuple[str, ...]
"""Destinations, ``namespace/hostname``."""


class Assembler:
    """Assembles all waypoints; remembers which destinations a service's routes name as long as they are the same."""

    def __init__(self, rules: L7Rules, config: Config, named: Memo[str, Named]) -> None:
        self._rules = rules
        self._config = config
        self._named = named

    def assemble(
        self, waypoints: Iterable[Waypoint], fronted: Mapping[str, Iterable[str]], services: Mapping[str, Service]
    ) -> dict[L7Key, L7Resource]:
        """``fronted``: the services (``namespace/hostname``) by waypoint; of all that are ready, whatever runs there."""
        found: dict[L7Key, L7Resource] = {}
        for waypoint in waypoints:
            keys = tuple(dict.fromkeys(fronted.get(waypoint.key, ())))
            for resource in self._assemble_one(waypoint, [services[key] for key in keys if key in services]):
                found[L7Key(waypoint.key, type(resource).__name__, resource.key)] = resource
        return found

    def _assemble_one(self, waypoint: Waypoint, services: list[Service]) -> Iterator[L7Resource]:
        yield make_settings(waypoint, self._config)
        destinations: dict[str, None] = {}
        for service in services:
            config = self._rules.service_config(service)
            destinations |= dict.fromkeys(self._named.make(config.key, (config,), name_destinations))
            yield config
        for policy in self._rules.policies_of(waypoint, tuple(str(service.key) for service in services)):
            if isinstance(policy, AuthorizationPolicy) and policy.provider is not None:
                destinations[f"{policy.provider.namespace}/{policy.provider.hostname}"] = None
            yield policy
        for name in destinations:
            yield self._rules.destination_config(NamespacedHostname.parse(name))


def make_settings(waypoint: Waypoint, config: Config) -> WaypointSettings:
    return WaypointSettings(
        namespace=waypoint.namespace,
        name=waypoint.name,
        waypoint_for=waypoint.traffic,
        trust_domains=(config.trust_domain,),
        include_client_identity=waypoint.include_client_identity,
    )


def name_destinations(config: ServiceConfig) -> Named:
    """Of all its routes, mirrors included, and the service itself. What is unknown to the mesh (no namespace) is none."""
    named: dict[str, None] = {config.key: None}
    for destination in _destinations(config):
        if destination.namespace:
            named[f"{destination.namespace}/{destination.hostname}"] = None
    return tuple(named)


def _destinations(config: ServiceConfig) -> Iterator[Destination]:
    for port in config.ports:
        for route in port.routes:
            if isinstance(route.action, Forward):
                yield from (each.destination for each in route.action.destinations)
            yield from (mirror.destination for mirror in route.mirrors)
        for weighted in port.tcp.destinations if port.tcp is not None else ():
            yield weighted.destination


# What holds where nobody said anything


_PROTOCOLS = {
    AppProtocol.HTTP11: PortProtocol.HTTP,
    AppProtocol.HTTP2: PortProtocol.HTTP2,
    AppProtocol.GRPC: PortProtocol.GRPC,
    AppProtocol.TCP: PortProtocol.TCP,
    AppProtocol.TLS: PortProtocol.TCP,
    AppProtocol.UNKNOWN: PortProtocol.AUTO,
}


def default_service(service: Service) -> ServiceConfig:
    """Every port to the service itself."""
    ports: dict[int, PortConfig] = {}
    for port in service.ports:
        protocol = _PROTOCOLS[port.app_protocol]
        routes = () if protocol is PortProtocol.TCP else (default_route(service, port.service_port),)
        ports.setdefault(port.service_port, PortConfig(port.service_port, protocol, routes=routes))
    return ServiceConfig(service.namespace, service.hostname, tuple(ports.values()))


def default_route(service: Service, port: int) -> Route:
    """To the service itself, with the mesh's retries and no timeout, as Istio has it."""
    destination = Destination(service.namespace, service.hostname, port)
    return Route(
        Origin("Service", service.namespace, service.name), Forward((WeightedDestination(destination),)), name="default", retry=Retry()
    )


class NoRules:
    """Defaults for everything, and no policies."""

    def service_config(self, service: Service) -> ServiceConfig:
        return default_service(service)

    def destination_config(self, key: NamespacedHostname) -> DestinationConfig:
        return DestinationConfig(key.namespace, key.hostname)

    def policies_of(self, waypoint: Waypoint, services: tuple[str, ...]) -> Iterable[L7Policy]:
        return ()

"""The whole configuration of each waypoint: its settings, the services it stands before, all destinations that their routes name, and the
policies that are for it. Nothing else: a waypoint of ten services does not hear of the other ten thousand.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol, TypeAlias

from istiod_py.translate.l7.known import L7Service
from istiod_py.translate.memo import Memo
from istiod_py.translate.waypoints import Waypoint
from mesh.model.l7.destination import DestinationConfig
from mesh.model.l7.policy import AuthorizationPolicy, RequestAuthentication
from mesh.model.l7.routing import Destination, Forward
from mesh.model.l7.waypoint import L7Resource, ServiceConfig, WaypointSettings

L7Policy: TypeAlias = AuthorizationPolicy | RequestAuthentication


class L7Key(NamedTuple):
    """Of one resource of one waypoint; ``kind`` is its class."""

    waypoint: str
    kind: str
    key: str


class L7Rules(Protocol):
    """What routes, rules and policies say. Each must give the same instance, or an equal one, as long as what it depends on is the same."""

    def settings_of(self, waypoint: Waypoint) -> WaypointSettings: ...

    def service_config(self, service: L7Service, waypoint: Waypoint) -> ServiceConfig:
        """How requests to a service are routed."""

    def destination_config(self, key: str, waypoint: Waypoint) -> DestinationConfig:
        """How endpoints of a service (``namespace/hostname``) are chosen and reached; for one that is not known, the defaults."""

    def policies_of(self, waypoint: Waypoint, services: Sequence[L7Service]) -> Iterable[L7Policy]:
        """Those attached to the waypoint, its class, or one of ``services``, which it stands before."""


Named: TypeAlias = tuple[str, ...]
"""Destinations, ``namespace/hostname``."""
NamedMemo: TypeAlias = Memo[tuple[str, str], Named]
"""By service and waypoint."""


class Assembler:
    """Assembles all waypoints; remembers which destinations a service's routes name as long as they are the same."""

    def __init__(self, rules: L7Rules, named: NamedMemo) -> None:
        self._rules = rules
        self._named = named

    def assemble(
        self, waypoints: Iterable[Waypoint], fronted: Mapping[str, Iterable[str]], services: Mapping[str, L7Service]
    ) -> dict[L7Key, L7Resource]:
        """``fronted``: the services (``namespace/hostname``) by waypoint; of all waypoints, whatever runs there."""
        found: dict[L7Key, L7Resource] = {}
        for waypoint in waypoints:
            keys = dict.fromkeys(fronted.get(waypoint.key, ()))
            for resource in self._assemble_one(waypoint, [services[key] for key in keys if key in services]):
                found[L7Key(waypoint.key, type(resource).__name__, resource.key)] = resource
        return found

    def _assemble_one(self, waypoint: Waypoint, services: Sequence[L7Service]) -> Iterator[L7Resource]:
        yield self._rules.settings_of(waypoint)
        destinations: dict[str, None] = {}
        for service in services:
            config = self._rules.service_config(service, waypoint)
            destinations |= dict.fromkeys(self._named.make((config.key, waypoint.key), (config,), name_destinations))
            yield config
        for policy in self._rules.policies_of(waypoint, services):
            if isinstance(policy, AuthorizationPolicy) and policy.provider is not None:
                destinations[f"{policy.provider.namespace}/{policy.provider.hostname}"] = None
            yield policy
        for name in destinations:
            yield self._rules.destination_config(name, waypoint)


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

"""The whole configuration of each waypoint: its settings, the services it stands before and their routes, all destinations that these
name, and the policies that are for it. Nothing else: a waypoint of ten services does not hear of the other ten thousand.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol, TypeAlias

from istiod_py.translate.l7.known import L7Service
from istiod_py.translate.l7.tables import RoutesTold
from istiod_py.translate.waypoints import Waypoint
from mesh.model.l7.destination import DestinationConfig
from mesh.model.l7.policy import AuthorizationPolicy, RequestAuthentication
from mesh.model.l7.waypoint import L7Resource, WaypointSettings

L7Policy: TypeAlias = AuthorizationPolicy | RequestAuthentication


class L7Key(NamedTuple):
    """Of one resource of one waypoint; ``kind`` is its class."""

    waypoint: str
    kind: str
    key: str


class L7Rules(Protocol):
    """What routes, rules and policies say. Each must give the same instance, or an equal one, as long as what it depends on is the same."""

    def settings_of(self, waypoint: Waypoint) -> WaypointSettings: ...

    def tell_routes(self, services: Sequence[L7Service], waypoint: Waypoint) -> RoutesTold:
        """How requests to the services that a waypoint stands before are routed."""

    def destination_config(self, key: str, waypoint: Waypoint) -> DestinationConfig:
        """How endpoints of a service (``namespace/hostname``) are chosen and reached; for one that is not known, the defaults."""

    def policies_of(self, waypoint: Waypoint, services: Sequence[L7Service]) -> Iterable[L7Policy]:
        """Those attached to the waypoint, its class, or one of ``services``, which it stands before."""


def assemble(
    rules: L7Rules, waypoints: Iterable[Waypoint], fronted: Mapping[str, Iterable[str]], services: Mapping[str, L7Service]
) -> dict[L7Key, L7Resource]:
    """``fronted``: the services (``namespace/hostname``) by waypoint; of all waypoints, whatever runs there."""
    found: dict[L7Key, L7Resource] = {}
    for waypoint in waypoints:
        keys = dict.fromkeys(fronted.get(waypoint.key, ()))
        for resource in _assemble_one(rules, waypoint, [services[key] for key in keys if key in services]):
            found[L7Key(waypoint.key, type(resource).__name__, resource.key)] = resource
    return found


def _assemble_one(rules: L7Rules, waypoint: Waypoint, services: Sequence[L7Service]) -> Iterator[L7Resource]:
    yield rules.settings_of(waypoint)
    routes = rules.tell_routes(services, waypoint)
    yield from routes.tables
    yield from routes.configs
    destinations = dict.fromkeys(routes.destinations)
    for policy in rules.policies_of(waypoint, services):
        if isinstance(policy, AuthorizationPolicy) and policy.provider is not None:
            destinations[f"{policy.provider.namespace}/{policy.provider.hostname}"] = None
        yield policy
    for name in destinations:
        yield rules.destination_config(name, waypoint)

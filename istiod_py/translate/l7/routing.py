"""The routes of all services that waypoints stand before, from one translation to the next: what did not change is not made again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

from istiod_py.translate.l7.known import KnownServices, L7Service
from istiod_py.translate.l7.route_status import NOTHING_NAMED, Fronting, NamedThings, RouteReport, report_routes
from istiod_py.translate.l7.routes import RoutedService, route_service
from istiod_py.translate.l7.sources import Gathered, RouteDefaults, RouteIndex, RouteSources
from istiod_py.translate.memo import Memo
from mesh.model.l7.routing import Retry
from mesh.model.l7.waypoint import ServiceConfig

RouteMemo: TypeAlias = Memo[tuple[str, str], RoutedService]
"""By service (``namespace/hostname``) and the waypoint's namespace."""
DEFAULT_RETRY = Retry()
"""Where the mesh's configuration says nothing."""


class Routing:
    """Ask for the services that waypoints stand before, then for the `report`."""

    def __init__(
        self,
        sources: RouteSources,
        known: KnownServices,
        memo: RouteMemo,
        *,
        default_retry: Retry | None = DEFAULT_RETRY,
        defaults: RouteDefaults | None = None,
    ) -> None:
        """``default_retry``: the mesh's, for routes that say nothing; None: none. ``memo`` is that of the translation under way."""
        self._defaults = defaults or RouteDefaults()
        self._index = RouteIndex(sources, known, self._defaults)
        self._memo = memo
        self._default_retry = default_retry
        self._routed: dict[tuple[str, str], RoutedService] = {}

    def route(self, service: L7Service, waypoint_namespace: str) -> RoutedService:
        """At waypoints of ``waypoint_namespace``."""
        key = service.key, waypoint_namespace
        if key not in self._routed:
            gathered = self._index.gather(service, waypoint_namespace)
            inputs = service, waypoint_namespace, gathered, self._default_retry, self._defaults
            self._routed[key] = self._memo.make(key, inputs, _route)
        return self._routed[key]

    def service_config(self, service: L7Service, waypoint_namespace: str) -> ServiceConfig:
        return self.route(service, waypoint_namespace).config

    def report(self, fronting: Fronting, named: NamedThings = NOTHING_NAMED) -> RouteReport:
        """What is said of all route objects, after `route` was asked for all that ``fronting`` names."""
        return report_routes(self._index, fronting, self._routed.values(), named)


def _route(
    service: L7Service, waypoint_namespace: str, gathered: Gathered, default_retry: Retry | None, defaults: RouteDefaults
) -> RoutedService:
    return route_service(service, waypoint_namespace, gathered, default_retry, defaults)


def route_all(routing: Routing, services: Iterable[L7Service], fronting: Fronting) -> dict[tuple[str, str], ServiceConfig]:
    """Of all services that ``fronting`` names, by service and the waypoint's namespace."""
    found: dict[tuple[str, str], ServiceConfig] = {}
    for service in services:
        for namespace, _ in fronting.get(service.key, ()):
            found[service.key, namespace] = routing.service_config(service, namespace)
    return found

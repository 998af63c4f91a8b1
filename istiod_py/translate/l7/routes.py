"""All routes of one service behind a waypoint, from every resource that has a say.

VirtualServices and the Gateway API's routes stand beside each other, as in Istio, which turns the latter into VirtualServices: each
VirtualService is a unit, all HTTPRoutes and GRPCRoutes together are one (as old as the oldest of them), and the units follow each other by
age. The first match decides; a request that nothing matches gets 404, and only a service without any route keeps its default one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from istiod_py.translate.l7.connection_routes import route_connections
from istiod_py.translate.l7.delegates import PlacedRule, settle_rules
from istiod_py.translate.l7.gateway_routes import attaches, order_requests
from istiod_py.translate.l7.known import L7Port, L7Service
from istiod_py.translate.l7.sources import Gathered, Note, RouteDefaults, Sourced
from istiod_py.translate.l7.virtual_services import (
    Place,
    ignored_headers,
    make_default_route,
    narrow_hosts,
    route_rules,
    takes_everything,
)
from mesh.kube.gatewayapi.routes import RequestRoute
from mesh.kube.objects import ObjectKey
from mesh.kube.virtualservice import VirtualService
from mesh.model.l7.routing import Origin, Retry, Route
from mesh.model.l7.waypoint import PortConfig, ServiceConfig


@dataclass(frozen=True, slots=True)
class RoutedService:
    """What a waypoint is told of a service. ``used``: the objects that gave it a route; ``notes``: what they say in vain."""

    service: L7Service
    waypoint_namespace: str
    ports: tuple[PortConfig, ...]
    used: frozenset[ObjectKey] = frozenset()
    notes: tuple[Note, ...] = ()

    @property
    def config(self) -> ServiceConfig:
        return ServiceConfig(self.service.namespace, self.service.hostname, self.ports)


def route_service(
    service: L7Service, waypoint_namespace: str, gathered: Gathered, default_retry: Retry | None, defaults: RouteDefaults
) -> RoutedService:
    """``gathered``: by `RouteIndex.gather`. ``default_retry``: the mesh's, for routes that say nothing; None: none."""
    return _Router(service, waypoint_namespace, gathered, default_retry, defaults).route()


@dataclass(frozen=True, slots=True)
class _Unit:
    """What stands together in the order. ``keys``: the objects it is made of; ``narrow``: it is for some of the service's names alone."""

    keys: frozenset[ObjectKey]
    routes: list[Route]
    narrow: bool = False


class _Router:
    def __init__(
        self, service: L7Service, waypoint_namespace: str, gathered: Gathered, default_retry: Retry | None, defaults: RouteDefaults
    ) -> None:
        self._service = service
        self._gathered = gathered
        self._default_retry = default_retry
        self._defaults = defaults
        self._place = Place(service, 0, waypoint_namespace, gathered.known, default_retry, defaults)
        self._notes: list[Note] = []
        self._used: set[ObjectKey] = set()
        self._yielding: set[ObjectKey] = set()
        self._rules: dict[ObjectKey, list[PlacedRule]] = {}
        for root in gathered.virtual_services:
            rules, notes = settle_rules(root, gathered.delegates, defaults)
            self._rules[root.obj.key] = rules
            self._notes += notes

    def route(self) -> RoutedService:
        ports = tuple(self._route_port(port) for port in self._service.ports)
        self._lint()
        notes = tuple(dict.fromkeys(self._notes))
        return RoutedService(self._service, self._place.waypoint_namespace, ports, frozenset(self._used), notes)

    def _route_port(self, port: L7Port) -> PortConfig:
        place = replace(self._place, port=port.number)
        routes = self._route_requests(place) if port.takes_requests else ()
        tcp = route_connections(self._gathered, place, self._notes) if port.takes_connections else None
        if tcp is not None:
            self._used.add(_key_of(tcp.origin))
        return PortConfig(port.number, port.protocol, port.name, routes, tcp)

    def _route_requests(self, place: Place) -> tuple[Route, ...]:
        """Up to the first route that takes every request: those behind it are told, not sent."""
        units = [unit for unit in self._units(place) if unit.routes]
        routes: list[Route] = []
        last: Route | None = None
        for unit in units:
            self._yielding |= unit.keys
            self._used |= unit.keys if last is None else frozenset()
            for route in unit.routes:
                if last is not None:
                    self._note_hidden(route, last, place.port)
                    continue
                routes.append(route)
                last = route if takes_everything(route) else None
        if all(unit.narrow for unit in units):  # none at all, too
            routes.append(make_default_route(self._service, place.port, self._default_retry))
        return tuple(routes)

    def _units(self, place: Place) -> Iterator[_Unit]:
        """Oldest first."""
        requests = [route for route in self._gathered.requests if attaches(route.value, place)]
        waiting = bool(requests)
        for root in self._gathered.virtual_services:
            if waiting and requests[0].age < root.age:
                yield self._gateway_unit(requests, place)
                waiting = False
            yield self._virtual_service_unit(root, place)
        if waiting:
            yield self._gateway_unit(requests, place)

    def _gateway_unit(self, requests: list[Sourced[RequestRoute]], place: Place) -> _Unit:
        routes = order_requests(requests, place)
        return _Unit(frozenset(_key_of(route.origin) for route in routes), routes)

    def _virtual_service_unit(self, root: Sourced[VirtualService], place: Place) -> _Unit:
        hosts = narrow_hosts(root.value, self._service, self._defaults)
        routes = route_rules(self._rules[root.obj.key], place, self._notes, hosts)
        keys = frozenset((root.obj.key, *(_key_of(route.origin) for route in routes)))
        return _Unit(keys, routes, narrow=bool(hosts))

    def _note_hidden(self, route: Route, last: Route, port: int) -> None:
        field = "http" if route.origin.kind == "VirtualService" else "rules"
        assert route.origin.rule is not None
        message = f"is never reached on port {port} of {self._service.hostname}: {last.origin} takes every request"
        self._notes.append(Note(_key_of(route.origin), ("spec", field, route.origin.rule), message))

    def _lint(self) -> None:
        """What was meant for this service and comes to nothing; a gate that is open is worse than none."""
        takes_requests = any(port.takes_requests for port in self._service.ports)
        takes_connections = any(port.takes_connections for port in self._service.ports)
        for root in self._gathered.virtual_services:
            vs, key = root.value, root.obj.key
            if vs.http and not takes_requests:
                self._notes.append(Note(key, ("spec", "http"), f"no port of {self._service.hostname} takes HTTP"))
            elif vs.http and key not in self._yielding:
                message = f"yields no route for {self._service.hostname}: requests go on as if it were not there"
                self._notes.append(Note(key, ("spec", "http"), message))
            for field in ("tls", "tcp"):
                if getattr(vs, field) and not takes_connections:
                    self._notes.append(Note(key, ("spec", field), f"no port of {self._service.hostname} takes anything but HTTP"))
            for index, rule in enumerate(vs.http):
                for number, match in enumerate(rule.matches):
                    for field, name in ignored_headers(match):
                        path = ("spec", "http", index, "match", number, field, name)
                        self._notes.append(Note(key, path, "is no header here, and ignored: there is a field of this name beside it"))


def _key_of(origin: Origin) -> ObjectKey:
    return ObjectKey(origin.kind, origin.namespace, origin.name)

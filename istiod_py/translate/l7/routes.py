"""All routes of one service behind a waypoint, from every resource that has a say.

VirtualServices and the Gateway API's routes stand beside each other, as in Istio, which turns the latter into VirtualServices: each
VirtualService is a unit, all HTTPRoutes and GRPCRoutes together are one (as old as the oldest of them), and the units follow each other by
age. The first match decides; a request that nothing matches gets 404, and only a service without any route keeps its default one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from istiod_py.translate.l7.connection_routes import Place, route_connections
from istiod_py.translate.l7.known import L7Port, L7Service
from istiod_py.translate.l7.sources import Gathered, Note
from istiod_py.translate.l7.units import RouteUnit, key_of, rules_field
from istiod_py.translate.l7.virtual_services import Scope, make_default_route
from mesh.kube.objects import ObjectKey
from mesh.model.l7.routing import Origin, Route, TcpRoute


@dataclass(frozen=True, slots=True)
class UnitUse:
    """A unit before a service, for requests to ``hosts`` alone, if there are any. ``beside``: units that it is one list with, in the order
    of their routes' precedence."""

    unit: RouteUnit
    hosts: tuple[str, ...] = ()
    beside: tuple[RouteUnit, ...] = ()

    @property
    def units(self) -> tuple[RouteUnit, ...]:
        return (self.unit, *self.beside)

    @property
    def keys(self) -> frozenset[ObjectKey]:
        """The objects that the units are made of."""
        return self.unit.keys.union(*(unit.keys for unit in self.beside))

    def is_for(self, port: int) -> bool:
        return any(unit.is_for(port) for unit in self.units)

    def takes_all(self, port: int) -> Origin | None:
        """What lets no request for ``port`` get past them."""
        taken = (unit.takes_all(port) for unit in self.units) if not self.hosts else ()
        return next(filter(None, taken), None)


@dataclass(frozen=True, slots=True)
class RoutedPort:
    """A port's units in order, and what is tried after them: the default route, where they leave any host's requests to it."""

    port: L7Port
    uses: tuple[UnitUse, ...] = ()
    routes: tuple[Route, ...] = ()
    tcp: TcpRoute | None = None


@dataclass(frozen=True, slots=True)
class RoutedService:
    """What a waypoint is told of a service. ``units``: all that concern it, even if they come to nothing; ``used``: the objects that gave
    it a route; ``notes``: what they say in vain here, beside what they do everywhere (the units')."""

    service: L7Service
    waypoint_namespace: str
    ports: tuple[RoutedPort, ...]
    units: tuple[RouteUnit, ...] = ()
    used: frozenset[ObjectKey] = frozenset()
    notes: tuple[Note, ...] = ()


def route_service(service: L7Service, uses: Sequence[Sequence[UnitUse]], gathered: Gathered, scope: Scope) -> RoutedService:
    """``uses``: the units that concern each port, oldest first; ``gathered``: by `RouteIndex.gather`. ``scope``: with the services that
    connections may be sent to."""
    return _Router(service, uses, gathered, scope).route()


class _Router:
    def __init__(self, service: L7Service, uses: Sequence[Sequence[UnitUse]], gathered: Gathered, scope: Scope) -> None:
        self._service = service
        self._gathered = gathered
        self._uses = uses
        self._scope = scope
        self._notes: list[Note] = []
        self._used: set[ObjectKey] = set()
        self._yielding: set[ObjectKey] = set()

    def route(self) -> RoutedService:
        ports = tuple(self._route_port(port, uses) for port, uses in zip(self._service.ports, self._uses, strict=True))
        self._lint()
        units = dict.fromkeys(unit for uses in self._uses for use in uses for unit in use.units)
        notes = tuple(dict.fromkeys(self._notes))
        return RoutedService(self._service, self._scope.waypoint_namespace, ports, tuple(units), frozenset(self._used), notes)

    def _route_port(self, port: L7Port, concerning: Sequence[UnitUse]) -> RoutedPort:
        uses = self._route_requests(port.number, concerning)
        needs_default = port.takes_requests and all(use.hosts for use in uses)  # none at all, too
        default = (make_default_route(self._service, port.number, self._scope.default_retry),) if needs_default else ()
        place = Place(self._service, port.number, self._scope)
        tcp = route_connections(self._gathered, place, self._notes) if port.takes_connections else None
        if tcp is not None:
            self._used.add(key_of(tcp.origin))
        return RoutedPort(port, uses, default, tcp)

    def _route_requests(self, port: int, concerning: Sequence[UnitUse]) -> tuple[UnitUse, ...]:
        """Up to the first that takes every request: those behind it are told, not used."""
        uses: list[UnitUse] = []
        last: Origin | None = None
        for use in concerning:
            if not use.is_for(port):
                continue
            self._yielding |= use.keys
            if last is not None:
                self._note_hidden(use, last, port)
                continue
            self._used |= use.keys
            uses.append(use)
            last = use.takes_all(port)
        return tuple(uses)

    def _note_hidden(self, use: UnitUse, last: Origin, port: int) -> None:
        message = f"is never reached on port {port} of {self._service.hostname}: {last} takes every request"
        self._notes.extend(Note(key, ("spec", rules_field(key.kind)), message) for key in sorted(use.keys))

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

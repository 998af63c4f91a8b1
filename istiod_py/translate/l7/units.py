"""What stands together in the order of routes: a VirtualService with its delegates, or all HTTPRoutes and GRPCRoutes of a port.

A unit is made once for all services and ports that use it, so that what it costs is its own size. What of it depends on the port that a
request came for is asked of it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from istiod_py.translate.l7.delegates import settle_rules
from istiod_py.translate.l7.destinations import lacks_port
from istiod_py.translate.l7.gateway_routes import order_requests
from istiod_py.translate.l7.sources import Delegates, Note, Sourced
from istiod_py.translate.l7.virtual_services import Findings, Portless, Scope, ignored_headers, matches_every_request, route_rules
from mesh.kube.gatewayapi.routes import RequestRoute
from mesh.kube.objects import ObjectKey
from mesh.kube.virtualservice import VirtualService
from mesh.model.l7.routing import Forward, Origin, Route


@dataclass(frozen=True, slots=True, eq=False)
class RouteUnit:
    """``keys``: the objects that it is made of. ``routes`` end with the first that takes every request, on whichever port it comes.
    ``notes``: what the objects say in vain. Equal to itself alone: whoever has the same one has the same routes."""

    keys: frozenset[ObjectKey]
    routes: tuple[Route, ...] = ()
    notes: tuple[Note, ...] = ()
    ports: frozenset[int] | None = None
    """The only ones that its routes are for; None: any."""
    taken: Mapping[int, Origin] = field(default_factory=dict)
    """By port whose every request gets no further than that; 0: on all."""
    portless: tuple[Portless, ...] = ()
    destinations: tuple[str, ...] = ()
    """``namespace/hostname`` of all services that requests, and copies of them, are sent to."""

    def is_for(self, port: int) -> bool:
        """Whether a request for ``port`` may have one of its routes."""
        return self.ports is None or port in self.ports

    def takes_all(self, port: int) -> Origin | None:
        """What lets no request for ``port`` get past the unit; None: some may."""
        return self.taken.get(port) or self.taken.get(0)

    def find_lacking(self, ports: Collection[int]) -> Iterator[Note]:
        """What is to be said of destinations that lack one of ``ports``, where the unit is used."""
        for open_to in self.portless:
            lacking = min((port for port in ports if not open_to.service.has_port(port)), default=None)
            if lacking is not None:
                note = open_to.note
                yield Note(note.key, note.path, f"{lacks_port(open_to.service, lacking)}: {note.message}")


def make_virtual_service_unit(root: Sourced[VirtualService], delegates: Delegates, scope: Scope) -> RouteUnit:
    """``delegates``: by namespace and name, those that the VirtualService names."""
    rules, notes = settle_rules(root, delegates, scope.defaults)
    found = Findings(notes)
    routes = route_rules(rules, scope, found)
    found.notes += _note_ignored_headers(root)
    return make_unit(frozenset((root.obj.key, *(key_of(route.origin) for route in routes))), routes, found)


def make_request_unit(requests: Sequence[Sourced[RequestRoute]], scope: Scope) -> RouteUnit:
    """Of all HTTPRoutes and GRPCRoutes that attach to a port."""
    routes = order_requests(requests, scope)
    return make_unit(frozenset(key_of(route.origin) for route in routes), routes, Findings())


def key_of(origin: Origin) -> ObjectKey:
    return ObjectKey(origin.kind, origin.namespace, origin.name)


def make_unit(keys: frozenset[ObjectKey], routes: Sequence[Route], found: Findings) -> RouteUnit:
    """Up to the first route that takes every request: those behind it are told, not sent."""
    sent: list[Route] = []
    ports: set[int] = set()
    taken: dict[int, Origin] = {}
    unsaid: set[int] = set()
    for route in routes:
        if 0 in taken:
            found.notes.append(_hidden(route, "is never reached", f"{taken[0]} takes every request"))
            continue
        own = ports_of(route)
        for port in sorted(unsaid if 0 in own else unsaid & own):
            unsaid.discard(port)
            found.notes.append(
                _hidden(route, f"is never reached on port {port}, nor is what follows", f"{taken[port]} takes every request")
            )
        ports |= own
        sent.append(route)
        for match in route.matches:
            if matches_every_request(match) and match.port not in taken:
                taken[match.port] = route.origin
                unsaid |= {match.port} - {0}
        if not route.matches:
            taken[0] = route.origin
    return RouteUnit(
        keys,
        tuple(sent),
        tuple(dict.fromkeys(found.notes)),
        None if 0 in ports else frozenset(ports),
        taken,
        tuple(found.portless),
        tuple(dict.fromkeys(_name_destinations(sent))),
    )


def ports_of(route: Route) -> set[int]:
    """That its matches are for; 0: any."""
    return {match.port for match in route.matches} or {0}


def _hidden(route: Route, message: str, because: str) -> Note:
    assert route.origin.rule is not None
    return Note(key_of(route.origin), ("spec", rules_field(route.origin.kind), route.origin.rule), f"{message}: {because}")


def rules_field(kind: str) -> str:
    """Where an object of this kind has its rules, below ``spec``."""
    return "http" if kind == "VirtualService" else "rules"


def _name_destinations(routes: Iterable[Route]) -> Iterator[str]:
    """What is unknown to the mesh (no namespace) is none."""
    for route in routes:
        forwards = route.action.destinations if isinstance(route.action, Forward) else ()
        for to in (*(each.destination for each in forwards), *(mirror.destination for mirror in route.mirrors)):
            if to.namespace:
                yield f"{to.namespace}/{to.hostname}"


def _note_ignored_headers(root: Sourced[VirtualService]) -> Iterator[Note]:
    for index, rule in enumerate(root.value.http):
        for number, match in enumerate(rule.matches):
            for name_of_field, name in ignored_headers(match):
                path = ("spec", "http", index, "match", number, name_of_field, name)
                yield Note(root.obj.key, path, "is no header here, and ignored: there is a field of this name beside it")

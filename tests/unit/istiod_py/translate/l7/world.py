"""A namespace ``shop`` with some services behind a waypoint of its own, and what becomes of route objects there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from istiod_py.translate.l7.known import KnownServices, L7Port, L7Service, know
from istiod_py.translate.l7.route_status import RouteReport
from istiod_py.translate.l7.routes import RoutedPort, RoutedService
from istiod_py.translate.l7.routing import DEFAULT_RETRY, RouteMemory, Routing
from istiod_py.translate.l7.sources import RouteDefaults, RouteSources, Sourced
from istiod_py.translate.l7.tables import RoutesTold
from istiod_py.translate.l7.virtual_services import matches_every_request
from mesh.http.message import Request
from mesh.kube.gatewayapi.routes import read_grpc_route, read_http_route, read_tcp_route, read_tls_route
from mesh.kube.objects import ObjectKey
from mesh.kube.virtualservice import read_virtual_service
from mesh.model.l7.routing import Forward, Retry, Route, TcpRoute
from mesh.model.l7.waypoint import Protocol
from mesh.testing.objects import objects_from_yaml
from waypoint_py.routing.match import Matched
from waypoint_py.steps import finish
from waypoint_py.store import ServiceCompiler

_READERS: Mapping[str, Any] = {
    "VirtualService": read_virtual_service,
    "HTTPRoute": read_http_route,
    "GRPCRoute": read_grpc_route,
    "TCPRoute": read_tcp_route,
    "TLSRoute": read_tls_route,
}
_GROUPS = {"VirtualService": "networking.istio.io"}


def service(name: str, *ports: tuple[int, Protocol], namespace: str = "shop") -> L7Service:
    found = tuple(L7Port(number, f"p{number}", protocol) for number, protocol in ports or ((80, Protocol.HTTP),))
    return L7Service(namespace, f"{name}.{namespace}.svc.cluster.local", found, "Service", name)


def entry(host: str, *ports: tuple[int, Protocol], namespace: str = "shop", name: str = "out", private: bool = False) -> L7Service:
    found = tuple(L7Port(number, f"p{number}", protocol) for number, protocol in ports or ((80, Protocol.HTTP),))
    return L7Service(namespace, host, found, "ServiceEntry", name, private)


REVIEWS = service("reviews", (80, Protocol.HTTP), (8080, Protocol.AUTO), (9000, Protocol.TCP))
V1, V2, V3 = (service(f"v{number}") for number in (1, 2, 3))
FOREIGN = service("far", namespace="other")
SERVICES = (REVIEWS, V1, V2, V3, FOREIGN)
WAYPOINT = ("shop", "waypoint")


def document(kind: str, spec: str, name: str = "r", namespace: str = "shop", created: str = "") -> str:
    group = _GROUPS.get(kind, "gateway.networking.k8s.io")
    time = f", creationTimestamp: '{created}'" if created else ""
    return f"---\napiVersion: {group}/v1\nkind: {kind}\nmetadata: {{name: {name}, namespace: {namespace}{time}}}\nspec: {spec}\n"


def sources_of(text: str) -> RouteSources:
    objects, _ = objects_from_yaml(text, ("shop", "other", "way", "client"))
    good: dict[str, list[Any]] = {kind: [] for kind in _READERS}
    refused: list[Any] = []
    for obj in objects:
        value, problems = _READERS[obj.kind](obj)
        if problems:
            refused.append(Sourced(obj, value, problems[0]))
        else:
            good[obj.kind].append(Sourced(obj, value))
    return RouteSources(
        tuple(good["VirtualService"]),
        (*good["HTTPRoute"], *good["GRPCRoute"]),
        (*good["TCPRoute"], *good["TLSRoute"]),
        tuple(refused),
    )


@dataclass
class World:
    """Routes of one service at one waypoint, and what is said of all objects."""

    text: str
    services: tuple[L7Service, ...] = SERVICES
    target: L7Service = REVIEWS
    waypoint: tuple[str, str] = WAYPOINT
    default_retry: Retry | None = DEFAULT_RETRY
    defaults: RouteDefaults = field(default_factory=RouteDefaults)
    memory: RouteMemory = field(default_factory=RouteMemory)
    fronting: Mapping[str, tuple[tuple[str, str], ...]] | None = None

    def __post_init__(self) -> None:
        self.known: KnownServices = know(self.services)
        self.routing = Routing(sources_of(self.text), self.known, self.memory, default_retry=self.default_retry, defaults=self.defaults)
        self.routed: RoutedService = self.routing.route(self.target, self.waypoint[0])

    def port(self, number: int) -> RoutedPort:
        (found,) = (port for port in self.routed.ports if port.port.number == number)
        return found

    def routes(self, number: int = 80) -> tuple[Route, ...]:
        """What a request for the port may have, as if it were for that port alone."""
        return tuple(expand(self.port(number)))

    def told(self) -> RoutesTold:
        return self.routing.tell([self.target], "/".join(self.waypoint), self.waypoint[0])

    def tcp(self, number: int = 9000) -> TcpRoute | None:
        return self.port(number).tcp

    def report(self) -> RouteReport:
        fronting = {self.target.key: (self.waypoint,)} if self.fronting is None else self.fronting
        return self.routing.report(fronting)

    def problems(self) -> list[tuple[str, str]]:
        """Field and message."""
        return [(problem.field, problem.message) for problem in self.report().problems]

    def find(self, path: str, method: str = "GET", authority: str = "reviews", number: int = 80, **headers: str) -> str:
        """The first destination's service of the route that a request has, ``404`` without one; ``_`` in names of headers is ``-``."""
        pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        request = Request(method.encode(), b"http", authority.encode(), path.encode(), pairs)
        matched = find_told(self.told(), request, number)
        if matched is None:
            return "404"
        action = matched.route.route.action
        destinations = getattr(action, "destinations", ())
        if not destinations:
            return type(action).__name__
        first = destinations[0]
        return str(first.fails_with) if first.fails_with is not None else first.destination.hostname.partition(".")[0]


def expand(port: RoutedPort) -> Iterator[Route]:
    """The routes of a port, each for itself: the long form of what is told in short."""
    number = port.port.number
    for route in (*(route for use in port.uses for route in use.unit.routes), *port.routes):
        matches = [msgspec.structs.replace(match, port=0) for match in route.matches if match.port in (0, number)]
        if route.matches and not matches:
            continue
        action = route.action
        if isinstance(action, Forward):
            destinations = [msgspec.structs.replace(each, destination=each.destination.at(number)) for each in action.destinations]
            action = msgspec.structs.replace(action, destinations=tuple(destinations))
        mirrors = tuple(msgspec.structs.replace(mirror, destination=mirror.destination.at(number)) for mirror in route.mirrors)
        yield msgspec.structs.replace(route, matches=tuple(matches), action=action, mirrors=mirrors)
        if not route.matches or any(map(matches_every_request, matches)):
            return


def find_told(told: RoutesTold, request: Request, number: int, service: str = "") -> Matched | None:
    """The route that a request for a port has at a waypoint that was told this, of one service or the one that is named."""
    compiler = ServiceCompiler()
    compiler.tables.update((table.key, table) for table in told.tables)
    (config,) = (config for config in told.configs if service in ("", config.key))
    return finish(compiler.compile(config, None)).ports[number].routes.find(request, number)


def status_of(report: RouteReport, kind: str, name: str = "r", namespace: str = "shop") -> tuple[Any, ...]:
    return report.statuses[ObjectKey(kind, namespace, name)]

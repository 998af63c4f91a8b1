"""Route objects, and which of them concern one service behind a waypoint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, TypeAlias, TypeVar

from istiod_py.translate.l7.known import KnownServices, L7Service
from mesh.kube.gatewayapi.references import BackendRef, ParentRef
from mesh.kube.gatewayapi.routes import ConnectionRoute, RequestRoute
from mesh.kube.objects import FieldPath, KubeObject, ObjectKey, SourceProblem
from mesh.kube.virtualservice import HostIndex, VirtualService, patterns_of
from mesh.model.l7.routing import Destination

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Sourced(Generic[_T]):
    """An object and what it says. ``mistake``: the first in the object as it is now; ``value`` is then its last good version, or, of an
    object that never had one, what could be read of it."""

    obj: KubeObject
    value: _T
    mistake: SourceProblem | None = None

    @property
    def age(self) -> tuple[bool, str, str, str]:
        """Less is older; objects without a time (files have none) are the youngest. Ties go to the first name (Istio's order)."""
        return self.obj.created == "", self.obj.created, self.obj.name, self.obj.namespace


@dataclass(frozen=True, slots=True)
class Note:
    """What is right by itself and has no effect, or not the one it seems to have."""

    key: ObjectKey
    path: FieldPath
    message: str
    lacking: Destination | None = None
    """It holds only where no DestinationRule defines the subset of this destination."""


@dataclass(frozen=True, slots=True)
class RouteDefaults:
    """What holds for the mesh as a whole. ``export_to``: of VirtualServices that do not say."""

    domain_suffix: str = "cluster.local"
    export_to: tuple[str, ...] = ("*",)


@dataclass(frozen=True, slots=True)
class RouteSources:
    """All route objects that are good for use, and those that are not and never were: of these only the status says something."""

    virtual_services: tuple[Sourced[VirtualService], ...] = ()
    requests: tuple[Sourced[RequestRoute], ...] = ()
    connections: tuple[Sourced[ConnectionRoute], ...] = ()
    refused: tuple[Sourced[VirtualService] | Sourced[RequestRoute] | Sourced[ConnectionRoute], ...] = ()


Delegates: TypeAlias = Mapping[tuple[str, str], Sourced[VirtualService]]
"""By namespace and name."""


@dataclass(frozen=True, slots=True)
class Gathered:
    """What has a say in the routes of one service at waypoints of one namespace, oldest first."""

    virtual_services: tuple[Sourced[VirtualService], ...] = ()
    requests: tuple[Sourced[RequestRoute], ...] = ()
    connections: tuple[Sourced[ConnectionRoute], ...] = ()


@dataclass(frozen=True, slots=True)
class Named:
    """By a VirtualService: the hostnames that its own HTTP rules send to, in order, and its delegates' namespaces and names."""

    hosts: tuple[str, ...]
    delegates: tuple[tuple[str, str], ...]


class RouteIndex:
    """`RouteSources`, found by the service they concern."""

    def __init__(self, sources: RouteSources, known: KnownServices, defaults: RouteDefaults) -> None:
        self.sources = sources
        self.known = known
        self.defaults = defaults
        self._by_host: dict[str, list[Sourced[VirtualService]]] = {}
        """By host, which may be a pattern."""
        self.delegates: dict[tuple[str, str], Sourced[VirtualService]] = {}
        for found in sources.virtual_services:
            self._file(found)
        self._requests = _by_parent(sources.requests)
        self._connections = _by_parent(sources.connections)

    def _file(self, found: Sourced[VirtualService]) -> None:
        vs = found.value
        if not vs.hosts:
            self.delegates[vs.namespace, vs.name] = found
        for host in hosts_of(vs, self.defaults):
            self._by_host.setdefault(host, []).append(found)

    def virtual_services_for(self, hostname: str) -> list[Sourced[VirtualService]]:
        """Those with a host that means ``hostname``, which may be a wildcard's; oldest first."""
        hosts = self._hosts.meeting(hostname) if hostname.startswith("*") else patterns_of(hostname)
        found = {id(vs): vs for host in hosts for vs in self._by_host.get(host, ())}
        return sorted(found.values(), key=lambda vs: vs.age)

    @cached_property
    def _hosts(self) -> HostIndex:
        return HostIndex(self._by_host)

    def gather(self, service: L7Service, waypoint_namespace: str) -> Gathered:
        applied = [
            vs for vs in self.virtual_services_for(service.hostname) if applies(vs.value, service, waypoint_namespace, self.defaults)
        ]
        producers = (service.namespace, waypoint_namespace)
        requests = self._attached(self._requests, service, producers)
        connections = self._attached(self._connections, service, producers)
        return Gathered(tuple(applied), requests, connections)

    def _attached(
        self, routes: Mapping[tuple[str, str, str], list[Sourced[_T]]], service: L7Service, producers: tuple[str, str]
    ) -> tuple[Sourced[_T], ...]:
        found = routes.get((service.kind, service.namespace, service.name), ())
        return tuple(sorted((route for route in found if route.obj.namespace in producers), key=lambda route: route.age))


def _by_parent(routes: Iterable[Sourced[_T]]) -> dict[tuple[str, str, str], list[Sourced[_T]]]:
    """By kind, namespace and name of the service; each route once."""
    result: dict[tuple[str, str, str], list[Sourced[_T]]] = {}
    for route in routes:
        value = route.value
        assert isinstance(value, RequestRoute | ConnectionRoute)
        for key in dict.fromkeys(service_parent(ref, value.namespace) for ref in value.parents):
            if key is not None:
                result.setdefault(key, []).append(route)
    return result


def service_parent(ref: ParentRef, namespace: str) -> tuple[str, str, str] | None:
    """Kind, namespace and name of the service that a route of ``namespace`` attaches to; None: it is no service."""
    if (ref.group, ref.kind) in (("", "Service"), ("networking.istio.io", "ServiceEntry")):
        return ref.kind, ref.namespace or namespace, ref.name
    return None


def applies(vs: VirtualService, service: L7Service, waypoint_namespace: str, defaults: RouteDefaults) -> bool:
    """Whether a VirtualService whose hosts mean the service has a say at waypoints of ``waypoint_namespace``."""
    return vs.for_mesh and is_producer(vs, service, waypoint_namespace) and is_exported(vs, waypoint_namespace, defaults)


def is_producer(vs: VirtualService, service: L7Service, waypoint_namespace: str) -> bool:
    """A waypoint serves all clients: it obeys the service's owner and its own, not clients."""
    return vs.namespace in (service.namespace, waypoint_namespace)


def is_exported(vs: VirtualService, namespace: str, defaults: RouteDefaults) -> bool:
    exported = {vs.namespace if name == "." else name for name in vs.export_to or defaults.export_to}
    return "*" in exported or namespace in exported


def hosts_of(vs: VirtualService, defaults: RouteDefaults) -> tuple[str, ...]:
    return tuple(expand(host, vs.namespace, defaults) for host in vs.hosts)


def expand(host: str, namespace: str, defaults: RouteDefaults) -> str:
    """A short name in full: the service of that name in ``namespace``."""
    if "." in host or ":" in host or host == "*":
        return host.lower()
    return f"{host}.{namespace}.svc.{defaults.domain_suffix}".lower()


def name_hosts(vs: VirtualService, defaults: RouteDefaults) -> Named:
    targets = [each.target for rule in vs.http for each in rule.targets]
    targets += [each.target for rule in vs.http for each in rule.mirrors]
    targets += [rule.mirror for rule in vs.http if rule.mirror is not None]
    hosts = {expand(target.host, vs.namespace, defaults) for target in targets}
    delegates = [(rule.delegate.namespace or vs.namespace, rule.delegate.name) for rule in vs.http if rule.delegate is not None]
    return Named(tuple(sorted(hosts)), tuple(dict.fromkeys(delegates)))


def hosts_of_connections(gathered: Gathered, defaults: RouteDefaults) -> set[str]:
    """The hostnames that connections may be sent to."""
    found = {backend_host(ref, route.value.namespace, defaults) for route in gathered.connections for ref in backends_of(route.value)}
    for vs in gathered.virtual_services:
        for rule in (*vs.value.tls, *vs.value.tcp):
            found |= {expand(each.target.host, vs.value.namespace, defaults) for each in rule.targets}
    return found


def backends_of(route: RequestRoute | ConnectionRoute) -> Iterator[BackendRef]:
    if isinstance(route, RequestRoute):
        for rule in route.rules:
            yield from (backend.ref for backend in rule.backends)
            yield from (mirror.backend for mirror in rule.filters.mirrors)
    else:
        for each in route.rules:
            yield from each.backends


def backend_host(ref: BackendRef, namespace: str, defaults: RouteDefaults) -> str:
    """The hostname that a backend of a route in ``namespace`` means; of a kind that has none, its name."""
    if ref.kind in ("Service", "ServiceImport"):
        return f"{ref.name}.{ref.namespace or namespace}.svc.{defaults.domain_suffix}"
    return ref.name.lower()

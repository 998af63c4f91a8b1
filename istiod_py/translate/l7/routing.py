"""The routes of all services that waypoints stand before, from one translation to the next: what did not change is not made again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from istiod_py.translate.l7.gateway_routes import AttachedTo, Attachment, find_attachment
from istiod_py.translate.l7.known import KnownServices, L7Service
from istiod_py.translate.l7.route_status import NOTHING_NAMED, Fronting, NamedThings, RouteReport, report_routes
from istiod_py.translate.l7.routes import RoutedService, UnitUse, route_service
from istiod_py.translate.l7.sources import (
    Gathered,
    Named,
    RouteDefaults,
    RouteIndex,
    RouteSources,
    Sourced,
    backend_host,
    backends_of,
    hosts_of_connections,
    name_hosts,
)
from istiod_py.translate.l7.tables import RoutesTold, TableMemo, tell_routes
from istiod_py.translate.l7.units import RouteUnit, make_request_unit, make_virtual_service_unit
from istiod_py.translate.l7.virtual_services import Scope, narrow_hosts
from istiod_py.translate.memo import Memo
from mesh.kube.gatewayapi.routes import RequestRoute
from mesh.kube.objects import ObjectKey
from mesh.kube.virtualservice import VirtualService
from mesh.model.l7.routing import Retry
from mesh.model.l7.waypoint import ServiceConfig

DEFAULT_RETRY = Retry()
"""Where the mesh's configuration says nothing."""
GROUP_FROM: Final = 64
"""A look-up in one more list costs a request a microsecond; telling fewer matches again for every port costs less than that is worth."""
MOST_GROUPS: Final = 8
"""The largest; all others stay with the port's own, as if they were small."""
UnitKey: TypeAlias = tuple[tuple[ObjectKey, ...], str]
"""The objects, and the waypoint's namespace."""


@dataclass(frozen=True, slots=True)
class RouteMemory:
    """What one translation's routes leave for the next one's."""

    services: Memo[tuple[str, str], RoutedService] = field(default_factory=Memo)
    """By service (``namespace/hostname``) and the waypoint's namespace."""
    units: Memo[UnitKey, RouteUnit] = field(default_factory=Memo)
    named: Memo[ObjectKey, Named] = field(default_factory=Memo)
    tables: TableMemo = field(default_factory=Memo)
    configs: Memo[tuple[str, str], ServiceConfig] = field(default_factory=Memo)
    """By service and waypoint."""

    def next(self) -> RouteMemory:
        return RouteMemory(Memo(self.services), Memo(self.units), Memo(self.named), Memo(self.tables), Memo(self.configs))

    def seal(self) -> None:
        for memo in (self.services, self.units, self.named, self.tables, self.configs):
            memo.seal()


class Routing:
    """Ask for the services that waypoints stand before, then for the `report`."""

    def __init__(
        self,
        sources: RouteSources,
        known: KnownServices,
        memory: RouteMemory,
        *,
        default_retry: Retry | None = DEFAULT_RETRY,
        defaults: RouteDefaults | None = None,
        group_from: int = GROUP_FROM,
    ) -> None:
        """``default_retry``: the mesh's, for routes that say nothing; None: none. ``memory`` is that of the translation under way.
        ``group_from``: matches of objects that attach alike, from which on they are told apart from others."""
        self._defaults = defaults or RouteDefaults()
        self._index = RouteIndex(sources, known, self._defaults)
        self._memory = memory
        self._default_retry = default_retry
        self._routed: dict[tuple[str, str], RoutedService] = {}
        self._units: dict[UnitKey, RouteUnit] = {}
        self._attachments: dict[ObjectKey, Attachment] = {}
        self._group_from = group_from

    def tell(self, services: Iterable[L7Service], waypoint: str, waypoint_namespace: str) -> RoutesTold:
        """What a waypoint (``namespace/name``) is told of the services that it stands before."""
        routed = [self.route(service, waypoint_namespace) for service in services]
        return tell_routes(routed, waypoint, self._memory.tables, self._memory.configs)

    def route(self, service: L7Service, waypoint_namespace: str) -> RoutedService:
        """At waypoints of ``waypoint_namespace``."""
        key = service.key, waypoint_namespace
        if key not in self._routed:
            gathered = self._index.gather(service, waypoint_namespace)
            scope = self._scope(hosts_of_connections(gathered, self._defaults), waypoint_namespace)
            # Units first: where one is another nothing else is compared, and objects are long.
            inputs = service, tuple(self._list_uses(service, gathered, waypoint_namespace)), gathered, scope
            self._routed[key] = self._memory.services.make(key, inputs, route_service)
        return self._routed[key]

    def report(self, fronting: Fronting, named: NamedThings = NOTHING_NAMED) -> RouteReport:
        """What is said of all route objects, after `route` was asked for all that ``fronting`` names."""
        return report_routes(self._index, fronting, self._routed.values(), named)

    def _scope(self, hosts: Iterable[str], waypoint_namespace: str) -> Scope:
        return Scope(waypoint_namespace, self._index.known.only(sorted(hosts)), self._default_retry, self._defaults)

    # Units

    def _list_uses(self, service: L7Service, gathered: Gathered, waypoint_namespace: str) -> list[tuple[UnitUse, ...]]:
        """Of each port what concerns it, oldest first."""
        if not any(port.takes_requests for port in service.ports):
            return [()] * len(service.ports)
        roots = [
            (root.age, UnitUse(self._unit_of(root, waypoint_namespace), narrow_hosts(root.value, service, self._defaults)))
            for root in gathered.virtual_services
        ]
        listed: list[tuple[UnitUse, ...]] = []
        for port in service.ports:
            if not port.takes_requests:
                listed.append(())
                continue
            uses = [use for _, use in roots]
            requests = self._attached(service, port.number, gathered.requests)
            if requests:
                older = sum(age <= requests[0].age for age, _ in roots)
                first, *beside = [self._request_unit(group, waypoint_namespace) for group in self._group(requests)]
                uses.insert(older, UnitUse(first, beside=tuple(beside)))
            listed.append(tuple(uses))
        return listed

    def _attached(self, service: L7Service, port: int, requests: Iterable[Sourced[RequestRoute]]) -> list[Sourced[RequestRoute]]:
        own = service.kind, service.namespace, service.name
        return [each for each in requests if not self._attachment_of(each).to.isdisjoint(((own, 0), (own, port)))]

    def _group(self, requests: Iterable[Sourced[RequestRoute]]) -> Iterator[tuple[Sourced[RequestRoute], ...]]:
        """What many ports share, apart from what is the port's own: a group is the same wherever it is. Those that are small stay together,
        since a request is looked for in every group."""
        groups: dict[frozenset[AttachedTo], list[Sourced[RequestRoute]]] = {}
        for each in requests:
            groups.setdefault(self._attachment_of(each).to, []).append(each)
        own: list[Sourced[RequestRoute]] = []
        sizes = {to: sum(self._attachment_of(each).size for each in group) for to, group in groups.items()}
        for number, (to, group) in enumerate(sorted(groups.items(), key=lambda item: -sizes[item[0]])):
            if sizes[to] < self._group_from or number >= MOST_GROUPS:
                own += group
            else:
                yield tuple(group)
        if own:
            yield tuple(sorted(own, key=lambda each: each.age))

    def _attachment_of(self, route: Sourced[RequestRoute]) -> Attachment:
        found = self._attachments.get(route.obj.key)
        if found is None:
            found = self._attachments[route.obj.key] = find_attachment(route.value)
        return found

    def _unit_of(self, root: Sourced[VirtualService], waypoint_namespace: str) -> RouteUnit:
        """With its delegates."""

        def make() -> RouteUnit:
            found = self._index.delegates
            delegates = {key: found[key] for key in self._named_by(root).delegates if key in found}
            hosts = {host for each in (root, *delegates.values()) for host in self._named_by(each).hosts}
            inputs = root, delegates, self._scope(hosts, waypoint_namespace)
            return self._memory.units.make(key, inputs, make_virtual_service_unit)

        key = (root.obj.key,), waypoint_namespace
        return self._once(key, make)

    def _request_unit(self, requests: tuple[Sourced[RequestRoute], ...], waypoint_namespace: str) -> RouteUnit:
        def make() -> RouteUnit:
            hosts = {backend_host(ref, each.value.namespace, self._defaults) for each in requests for ref in backends_of(each.value)}
            return self._memory.units.make(key, (requests, self._scope(hosts, waypoint_namespace)), make_request_unit)

        key = tuple(each.obj.key for each in requests), waypoint_namespace
        return self._once(key, make)

    def _once(self, key: UnitKey, make: Callable[[], RouteUnit]) -> RouteUnit:
        """Within a translation what decides a unit is gathered once, however many services use it."""
        found = self._units.get(key)
        if found is None:
            found = self._units[key] = make()
        return found

    def _named_by(self, vs: Sourced[VirtualService]) -> Named:
        return self._memory.named.make(vs.obj.key, (vs.value, self._defaults), name_hosts)

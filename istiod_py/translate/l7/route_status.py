"""What is said of every route object: in its status, and in the control plane's list of problems.

A VirtualService has the condition ``WaypointAccepted``; the Gateway API's routes have conditions for each parent that is a service of the
mesh (reference: Istio's `conditions.go`). Parents that are Gateways are other controllers' to speak of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Final, TypeAlias

from istiod_py.translate.config import Condition, ParentStatus, StatusEntry
from istiod_py.translate.l7.connection_routes import names
from istiod_py.translate.l7.destinations import ISTIO_GROUP
from istiod_py.translate.l7.gateway_routes import find_broken, find_unsupported
from istiod_py.translate.l7.known import L7Service
from istiod_py.translate.l7.notices import names_in
from istiod_py.translate.l7.routes import RoutedService
from istiod_py.translate.l7.sources import Note, RouteIndex, Sourced, expand, is_exported, is_producer, service_parent
from istiod_py.translate.l7.units import RouteUnit
from mesh.kube.fields import did_you_mean
from mesh.kube.gatewayapi.references import GROUP, ParentRef
from mesh.kube.gatewayapi.routes import ConnectionRoute, RequestRoute
from mesh.kube.objects import FieldPath, ObjectKey, SourceProblem, format_path
from mesh.kube.ownership import ROUTE_CONTROLLER, WAYPOINT_ACCEPTED
from mesh.kube.virtualservice import HostIndex, VirtualService, patterns_of
from mesh.model.l7.routing import Destination

_LONGEST: Final = 4096
"""Characters of a message: of many problems the first are enough."""

AnyRoute: TypeAlias = Sourced[RequestRoute] | Sourced[ConnectionRoute]
Fronting: TypeAlias = Mapping[str, tuple[tuple[str, str], ...]]
"""By service (``namespace/hostname``): namespace and name of the waypoints that stand before it."""


@dataclass(frozen=True, slots=True)
class RouteReport:
    """``statuses`` of all route objects; an empty tuple where there is nothing to say."""

    statuses: Mapping[ObjectKey, tuple[StatusEntry, ...]] = field(default_factory=dict)
    problems: tuple[SourceProblem, ...] = ()


@dataclass(frozen=True, slots=True)
class NamedThings:
    """What routes may name besides services. ``gateways``: all Gateways (``namespace/name``), and whether each is a waypoint; None: not
    known. ``has_subset``: whether a DestinationRule defines the subset, seen from waypoints of a namespace."""

    gateways: Mapping[str, bool] | None = None
    has_subset: Callable[[Destination, str], bool] = lambda destination, namespace: True


NOTHING_NAMED: Final = NamedThings()


def report_routes(index: RouteIndex, fronting: Fronting, routed: Iterable[RoutedService], named: NamedThings) -> RouteReport:
    return _Reporter(index, fronting, tuple(routed), named).report()


class _Reporter:
    def __init__(self, index: RouteIndex, fronting: Fronting, routed: tuple[RoutedService, ...], named: NamedThings) -> None:
        self._index = index
        self._gateways = named.gateways
        self._fronting = fronting
        self._notes: dict[ObjectKey, dict[Note, None]] = {}
        self._served: dict[ObjectKey, list[RoutedService]] = {}
        self._has_subset = cache(named.has_subset)
        uses: dict[tuple[RouteUnit, str], set[int]] = {}
        for service in routed:
            self._take_notes(service.notes, service.waypoint_namespace)
            for key in service.used:
                self._served.setdefault(key, []).append(service)
            for unit in service.units:
                uses.setdefault((unit, service.waypoint_namespace), set())
            for port in service.ports:
                for unit in (unit for use in port.uses for unit in use.units):
                    uses[unit, service.waypoint_namespace].add(port.port.number)
        for (unit, waypoint_namespace), ports in uses.items():
            self._take_notes((*unit.notes, *unit.find_lacking(ports)), waypoint_namespace)
        self._by_object: dict[tuple[str, str, str], list[L7Service]] = {}
        for services in index.known.by_host.values():
            for found in services:
                self._by_object.setdefault((found.kind, found.namespace, found.name), []).append(found)
        self._delegated = {
            (rule.delegate.namespace or root.value.namespace, rule.delegate.name)
            for root in index.sources.virtual_services
            for rule in root.value.http
            if rule.delegate is not None
        }

    def report(self) -> RouteReport:
        statuses: dict[ObjectKey, tuple[StatusEntry, ...]] = {}
        sources = self._index.sources
        for vs in sources.virtual_services:
            statuses[vs.obj.key] = (_mark_stale(self._say_virtual_service(vs), vs.mistake),)
        routes: tuple[AnyRoute, ...] = (*sources.requests, *sources.connections)
        for route in routes:
            statuses[route.obj.key] = tuple(self._say_route(route))
        for refused in sources.refused:
            statuses[refused.obj.key] = tuple(_say_refused(refused))
        objects = {vs.obj.key: vs.obj for vs in sources.virtual_services} | {route.obj.key: route.obj for route in routes}
        problems = {objects[key].problem(note.path, note.message) for key, notes in self._notes.items() if key in objects for note in notes}
        return RouteReport(statuses, tuple(sorted(problems)))

    def _take_notes(self, notes: Iterable[Note], waypoint_namespace: str) -> None:
        for note in notes:
            if note.lacking is None or not self._has_subset(note.lacking, waypoint_namespace):
                self._note(note.key, note.path, note.message)

    def _note(self, key: ObjectKey, path: FieldPath, message: str) -> None:
        self._notes.setdefault(key, {})[Note(key, path, message)] = None

    # VirtualServices

    def _say_virtual_service(self, vs: Sourced[VirtualService]) -> Condition:
        key = vs.obj.key
        reason = self._find_unheard(vs) if vs.value.hosts else self._find_undelegated(vs)
        message = "; ".join(f"{_short(note.path)}: {note.message}" for note in self._notes.get(key, ()))
        served = self._served.get(key, ())
        if served:
            hosts = ", ".join(sorted({each.service.hostname for each in served}))
            text = f"routes {hosts}" + (f"; without effect or not as written: {message}" if message else "")
            return _condition(WAYPOINT_ACCEPTED, True, "UnsupportedValue" if message else "Accepted", text)
        return _condition(WAYPOINT_ACCEPTED, False, reason or "UnsupportedValue", message or "routes nothing")

    def _find_undelegated(self, vs: Sourced[VirtualService]) -> str:
        if (vs.value.namespace, vs.value.name) not in self._delegated:
            self._note(vs.obj.key, ("spec",), "without hosts it is a delegate, and no VirtualService delegates to it")
            return "TargetNotFound"
        return ""

    def _find_unheard(self, vs: Sourced[VirtualService]) -> str:
        """Note what keeps the VirtualService, or one of its hosts, from any effect; the reason if nothing is left."""
        value, key = vs.value, vs.obj.key
        if not value.for_mesh:
            self._note(key, ("spec", "gateways"), "without 'mesh' it is for gateways alone, and not for waypoints")
            return "UnsupportedValue"
        reasons: set[str] = set()
        for number, host in enumerate(value.hosts):
            meant = self._services_of(expand(host, value.namespace, self._index.defaults))
            fronted = [(service, place) for service in meant for place in self._fronting.get(service.key, ())]
            path = ("spec", "hosts", number)
            if not meant:
                self._note(key, path, f"no service has the hostname {host}: it has no effect")
                reasons.add("TargetNotFound")
            elif not fronted:
                self._note(key, path, f"no waypoint stands before {meant[0].hostname}: it has no effect")
                reasons.add("AncestorNotBound")
            else:
                self._find_unheeded(vs, path, fronted)
        return min(reasons, default="")

    def _find_unheeded(self, vs: Sourced[VirtualService], path: FieldPath, fronted: list[tuple[L7Service, tuple[str, str]]]) -> None:
        for service, (namespace, name) in fronted:
            if not is_producer(vs.value, service, namespace):
                message = (
                    f"waypoint {namespace}/{name} obeys VirtualServices of its own namespace and of {service.namespace}, "
                    f"the namespace of {service.hostname}, alone"
                )
                self._note(vs.obj.key, path, message)
            elif not is_exported(vs.value, namespace, self._index.defaults):
                self._note(vs.obj.key, ("spec", "exportTo"), f"it is not exported to {namespace}, where waypoint {name} is")

    def _services_of(self, host: str) -> list[L7Service]:
        by_host = self._index.known.by_host
        meant = self._known_hosts.meeting(host) if host.startswith("*") else patterns_of(host)
        return [service for name in meant for service in by_host.get(name, ())]

    @cached_property
    def _known_hosts(self) -> HostIndex:
        return HostIndex(self._index.known.by_host)

    # Routes of the Gateway API

    def _say_route(self, route: AnyRoute) -> Iterator[ParentStatus]:
        value = route.value
        resolved = self._say_references(route)
        partial = tuple(self._say_ignored(route))
        for number, ref in enumerate(value.parents):
            if service_parent(ref, value.namespace) is not None:
                accepted, waypoints = self._say_parent(route, number, ref)
                conditions = (_mark_stale(accepted, route.mistake), *partial, resolved, waypoints)
                yield ParentStatus(ref.as_object(), ROUTE_CONTROLLER, conditions)
            elif mistake := self._find_wrong_parent(ref, value.namespace):
                self._note(route.obj.key, ("spec", "parentRefs", number), mistake)

    def _find_wrong_parent(self, ref: ParentRef, namespace: str) -> str:
        """Why a parent that is no service takes no route; empty: it is another controller's to say."""
        for group, kind in (("", "Service"), (ISTIO_GROUP, "ServiceEntry")):
            if ref.kind == kind:
                return f'there is no {kind} in group {ref.group or "core"}: write group: "{group}"'
        if (ref.group, ref.kind) != (GROUP, "Gateway") or self._gateways is None:
            return ""
        place = ref.namespace or namespace
        key = f"{place}/{ref.name}"
        if key in self._gateways:
            return f'waypoint {key} takes no routes: name the Service, with group: "" and kind: Service' if self._gateways[key] else ""
        if ("Service", place, ref.name) in self._by_object:
            return f'there is no Gateway {key}; for the Service write group: "" and kind: Service'
        return f"there is no Gateway {key}" + did_you_mean(ref.name, names_in(self._gateways, place))

    def _say_parent(self, route: AnyRoute, number: int, ref: ParentRef) -> tuple[Condition, Condition]:
        value = route.value
        key = service_parent(ref, value.namespace)
        services = self._by_object.get(key, []) if key is not None else []
        places = [place for service in services for place in self._fronting.get(service.key, ())]
        denied = self._find_denial(value, ref, services, places)
        path: FieldPath = ("spec", "parentRefs", number)
        if denied:
            self._note(route.obj.key, path, denied[1])
        elif unsupported := self._note_unsupported(route):
            denied = "UnsupportedValue", unsupported
        accepted = _condition("Accepted", not denied, *(denied or ("Accepted", "Route was valid")))
        if places:
            return accepted, _condition("ResolvedWaypoints", True, "ResolvedWaypoints", "All waypoints resolved")
        if not services:
            return accepted, _condition("ResolvedWaypoints", False, "NoMatchingParent", "parent not found")
        message = f"no waypoint stands before {ref.kind} {ref.name}: the route has no effect"
        if not denied:
            self._note(route.obj.key, path, message)
        return accepted, _condition("ResolvedWaypoints", False, "MissingUseWaypointLabel", message)

    def _find_denial(
        self, route: RequestRoute | ConnectionRoute, ref: ParentRef, services: list[L7Service], places: list[tuple[str, str]]
    ) -> tuple[str, str] | None:
        """Reason and message, where the parent does not take the route."""
        parent = "service" if ref.kind == "Service" else "service entry"
        if not services:
            return "NoMatchingParent", f'parent {parent}: "{ref.name}" not found'
        ports = [port for service in services for port in service.ports if ref.port in (0, port.number)]
        if not ports:
            return "NoMatchingParent", f"port {ref.port} not found" if ref.port else f'parent {parent} "{ref.name}" has no ports'
        if isinstance(route, RequestRoute):
            if not any(port.takes_requests for port in ports):
                return "NoMatchingParent", f"no such port of {ref.kind} {ref.name} takes HTTP"
        elif not any(port.takes_connections for port in ports):
            return "NoMatchingParent", f"no such port of {ref.kind} {ref.name} takes anything but HTTP"
        elif route.kind == "TLSRoute" and not any(names(route, service.hostname) for service in services):
            message = f"a waypoint looks at no SNI: of the hostnames one must be {services[0].hostname}"
            return "NoMatchingListenerHostname", message
        producers = {service.namespace for service in services} | {namespace for namespace, _ in places}
        if route.namespace not in producers:
            message = (
                f"a route for a service of another namespace ({services[0].namespace}) is for clients of its own alone; "
                "a waypoint serves all clients, and leaves it out"
            )
            return "UnsupportedValue", message
        return None

    def _note_unsupported(self, route: AnyRoute) -> str:
        """What rules ask for that there is not."""
        if not isinstance(route.value, RequestRoute):
            return ""
        messages: list[str] = []
        for number, rule in enumerate(route.value.rules):
            for path, message in find_unsupported(rule):
                whole: FieldPath = ("spec", "rules", number, *path)
                told = f"{message}: the rule's requests are answered 500"
                self._note(route.obj.key, whole, told)
                messages.append(f"{_short(whole)}: {told}")
        return "; ".join(messages)

    def _say_ignored(self, route: AnyRoute) -> Iterator[Condition]:
        if not isinstance(route.value, RequestRoute):
            return
        sticky = [number for number, rule in enumerate(route.value.rules) if rule.sticky]
        message = "sessionPersistence is not supported: requests are routed without it"
        for number in sticky:
            self._note(route.obj.key, ("spec", "rules", number, "sessionPersistence"), message)
        if sticky:
            yield _condition("PartiallyInvalid", True, "UnsupportedValue", message)

    def _say_references(self, route: AnyRoute) -> Condition:
        broken = list(find_broken(route.value, self._index.known, self._index.defaults))
        for path, found in broken:
            self._note(route.obj.key, path, f"{found.message}: what would go there fails")
        if not broken:
            return _condition("ResolvedRefs", True, "ResolvedRefs", "All references resolved")
        messages = dict.fromkeys(found.message for _, found in broken)
        return _condition("ResolvedRefs", False, broken[0][1].reason, "; ".join(messages))


def _say_refused(
    refused: Sourced[VirtualService] | AnyRoute,
) -> Iterator[StatusEntry]:
    message = f"not in force: {refused.mistake}"
    if isinstance(refused.value, VirtualService):
        yield _condition(WAYPOINT_ACCEPTED, False, "Invalid", message)
        return
    for ref in refused.value.parents:
        if service_parent(ref, refused.value.namespace) is not None:
            yield ParentStatus(ref.as_object(), ROUTE_CONTROLLER, (_condition("Accepted", False, "UnsupportedValue", message),))


def _mark_stale(condition: Condition, mistake: SourceProblem | None) -> Condition:
    if mistake is None:
        return condition
    reason = "Invalid" if condition.type == WAYPOINT_ACCEPTED else "UnsupportedValue"
    return _condition(condition.type, False, reason, f"the last good version stays in force: {mistake}")


def _condition(kind: str, status: bool, reason: str, message: str) -> Condition:
    return Condition(kind, status, reason, message if len(message) <= _LONGEST else f"{message[: _LONGEST - 3]}...")


def _short(path: FieldPath) -> str:
    return format_path(path[1:] if path[:1] == ("spec",) and len(path) > 1 else path)

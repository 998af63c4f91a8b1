"""TCP and TLS routes of a port whose bytes mean nothing to a waypoint: TLS before TCP, the older before the younger, the first that fits.

A waypoint looks at no SNI: a TLS route is for a service when it names the service's own hostname.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import msgspec

from istiod_py.translate.l7.destinations import NO_SUCH, lacks_port, note_subset, resolve_target, weigh_backend
from istiod_py.translate.l7.gateway_routes import attaches
from istiod_py.translate.l7.known import L7Service
from istiod_py.translate.l7.sources import Gathered, Note, Sourced, expand
from istiod_py.translate.l7.virtual_services import Scope
from mesh.kube.gatewayapi.routes import ConnectionRoute
from mesh.kube.objects import FieldPath, KubeObject
from mesh.kube.routeactions import Target, WeightedTarget
from mesh.kube.virtualservice import MESH, L4Match, L4Rule, VirtualService
from mesh.model.l7.routing import Origin, TcpRoute, WeightedDestination


@dataclass(frozen=True, slots=True)
class Place:
    """A port of a service, whose connections are routed."""

    service: L7Service
    port: int
    scope: Scope


def route_connections(gathered: Gathered, place: Place, notes: list[Note]) -> TcpRoute | None:
    """None: to the service itself."""
    chosen: tuple[KubeObject, TcpRoute] | None = None
    for obj, path, route in (*_find(gathered, place, notes, tls=True), *_find(gathered, place, notes, tls=False)):
        if chosen is None:
            chosen = obj, route
        elif obj is not chosen[0]:
            message = f"has no effect on port {place.port}: {chosen[1].origin} goes first"
            notes.append(Note(obj.key, path, message))
    return None if chosen is None else chosen[1]


def _find(gathered: Gathered, place: Place, notes: list[Note], *, tls: bool) -> Iterator[tuple[KubeObject, FieldPath, TcpRoute]]:
    """The route that each object has for this port, in order of age."""
    kind = "TLSRoute" if tls else "TCPRoute"
    sources: list[Sourced[VirtualService] | Sourced[ConnectionRoute]] = [*gathered.virtual_services, *gathered.connections]
    for source in sorted(sources, key=lambda source: source.age):
        value = source.value
        if isinstance(value, VirtualService):
            found = _route_virtual_service(source.obj, value.tls if tls else value.tcp, place, notes, tls=tls)
        elif value.kind == kind and attaches(value, place.service, place.port) and (not tls or names(value, place.service.hostname)):
            found = ("spec", "rules"), _route_object(value, place)
        else:
            continue
        if found is not None:
            yield source.obj, *found


def names(route: ConnectionRoute, hostname: str) -> bool:
    """Whether a TLSRoute is for connections to ``hostname``; one without hostnames is for its parent's."""
    return not route.hostnames or hostname in route.hostnames


def _route_object(route: ConnectionRoute, place: Place) -> TcpRoute:
    """Its first rule: none has a match, so that no other is reached."""
    destinations = [
        weigh_backend(ref, route.namespace, place.scope.known, place.scope.defaults) for ref in route.rules[0].backends if ref.weight
    ]
    if len(destinations) == 1:
        destinations = [msgspec.structs.replace(destinations[0], weight=1)]
    return TcpRoute(Origin(route.kind, route.namespace, route.name, 0), tuple(destinations))


def _route_virtual_service(
    obj: KubeObject, rules: tuple[L4Rule, ...], place: Place, notes: list[Note], *, tls: bool
) -> tuple[FieldPath, TcpRoute] | None:
    field = "tls" if tls else "tcp"
    for index, rule in enumerate(rules):
        if _fits(obj, (field, index), rule, place, notes):
            path: FieldPath = ("spec", field, index)
            destinations = _resolve(obj, path, rule.targets, place, notes)
            return path, TcpRoute(Origin("VirtualService", obj.namespace, obj.name, index), destinations)
    return None


def _fits(obj: KubeObject, place_of_rule: FieldPath, rule: L4Rule, place: Place, notes: list[Note]) -> bool:
    fits = not rule.matches
    for index, match in enumerate(rule.matches):
        problem = find_unmet(match, place.service.hostname)
        if problem:
            notes.append(Note(obj.key, ("spec", *place_of_rule, "match", index, problem[0]), problem[1]))
        elif match.port in (0, place.port):
            fits = True
    return fits


def find_unmet(match: L4Match, hostname: str) -> tuple[str, str] | None:
    """Field and reason why a waypoint never meets this match for the service."""
    if match.source_labels:
        return "sourceLabels", "a waypoint does not see clients' labels: this match is left out"
    if match.source_namespace:
        return "sourceNamespace", "a waypoint does not see clients' namespaces: this match is left out"
    if match.gateways and MESH not in match.gateways:
        return "gateways", "without 'mesh' this match is for gateways alone: it is left out"
    if match.sni_hosts and match.sni_hosts != (hostname,):
        return "sniHosts", f"a waypoint looks at no SNI: a match that names more or less than {hostname} is left out"
    return None


def _resolve(
    obj: KubeObject, path: FieldPath, targets: tuple[WeightedTarget, ...], place: Place, notes: list[Note]
) -> tuple[WeightedDestination, ...]:
    made: list[WeightedDestination] = []
    for index, each in enumerate(targets):
        if len(targets) > 1 and not each.weight:
            continue
        target = replace(each.target, host=expand(each.target.host, obj.namespace, place.scope.defaults))
        found = _resolve_here(target, place)
        if found.fails_with is not None:
            message = f"{found.because}: its connections are reset"
            notes.append(Note(obj.key, (*path, "route", index, "destination"), message))
        elif target.subset:
            here = (*path, "route", index, "destination", "subset")
            notes.append(note_subset(obj.key, here, found.destination, "its connections are reset"))
        made.append(msgspec.structs.replace(found, weight=each.weight if len(targets) > 1 else 1))
    return tuple(made)


def _resolve_here(target: Target, place: Place) -> WeightedDestination:
    namespace, known = place.scope.waypoint_namespace, place.scope.known
    found = resolve_target(target, namespace, known)
    if found.destination.port:
        return found
    found = msgspec.structs.replace(found, destination=found.destination.at(place.port))
    service = known.find(target.host, namespace)
    if service is None or service.has_port(place.port):
        return found
    return msgspec.structs.replace(found, fails_with=NO_SUCH, because=lacks_port(service, place.port))

"""HTTPRoutes and GRPCRoutes as the routes of a service behind a waypoint, in the order that the Gateway API prescribes.

All routes of a service's port are one list, whichever object and kind they come from: the most specific match is tried first. (Istio sorts
so too, but keeps routes for one port apart from those for all, and objects of the waypoint's namespace apart from those of the service's.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import msgspec

from istiod_py.translate.l7.destinations import Broken, combine, failing, resolve_backend, weigh_backend
from istiod_py.translate.l7.known import KnownServices, L7Service
from istiod_py.translate.l7.sources import RouteDefaults, Sourced, service_parent
from istiod_py.translate.l7.virtual_services import Scope
from mesh.kube.gatewayapi.filters import Filters
from mesh.kube.gatewayapi.references import BackendRef
from mesh.kube.gatewayapi.routes import ConnectionRoute, ConnectionRule, RequestRoute, RequestRule
from mesh.kube.objects import FieldPath
from mesh.model.l7.matching import PathKind, PathMatch, RouteMatch
from mesh.model.l7.routing import (
    Forward,
    HeaderChanges,
    Mirror,
    Origin,
    Precedence,
    Retry,
    Rewrite,
    Route,
    WeightedDestination,
    precedence,
)

_ON_BACKENDS: Final = frozenset({"RequestHeaderModifier", "ResponseHeaderModifier"})
"""The filters that a backend may have."""
_EVERY_REQUEST: Final = RouteMatch(path=PathMatch(PathKind.SEGMENTS, "/"))


@dataclass(frozen=True, slots=True)
class _Candidate:
    """One match of a rule. ``route`` is the rule's: the same for all its matches. ``order``: less goes first."""

    order: tuple[Precedence, int, int]
    match: RouteMatch
    route: Route


def order_requests(routes: Iterable[Sourced[RequestRoute]], scope: Scope) -> list[Route]:
    """The routes of these objects, by precedence."""
    candidates = [candidate for route in routes for candidate in _candidates_of(route, scope)]
    candidates.sort(key=lambda candidate: candidate.order)
    return list(_together(candidates))


def attaches(route: RequestRoute | ConnectionRoute, service: L7Service, port: int) -> bool:
    """Whether it is for that port."""
    own = (service.kind, service.namespace, service.name)
    return any(service_parent(ref, route.namespace) == own and ref.port in (0, port) for ref in route.parents)


AttachedTo: TypeAlias = tuple[tuple[str, str, str], int]
"""A service's kind, namespace and name, and a port of it; 0: all."""


@dataclass(frozen=True, slots=True)
class Attachment:
    """What an object's routes are for. ``size``: how many matches it has."""

    to: frozenset[AttachedTo]
    size: int


def find_attachment(route: RequestRoute) -> Attachment:
    parents = ((service_parent(ref, route.namespace), ref.port) for ref in route.parents)
    found = frozenset((service, port) for service, port in parents if service is not None)
    return Attachment(found, sum(max(1, len(rule.matches)) for rule in route.rules))


def _candidates_of(route: Sourced[RequestRoute], scope: Scope) -> Iterator[_Candidate]:
    for number, rule in enumerate(route.value.rules):
        made = msgspec.structs.replace(make_route(route.value, number, scope), created=route.obj.created)
        # An HTTPRoute's rule without matches is for every path; a GRPCRoute's comes after all that say anything.
        everything = _EVERY_REQUEST if route.value.kind == "HTTPRoute" else RouteMatch()
        for index, match in enumerate(rule.matches or (everything,)):
            yield _Candidate((precedence(made, match), number, index), match, made)


def _together(candidates: Iterable[_Candidate]) -> Iterator[Route]:
    """Matches of one rule that follow each other as one route."""
    current: Route | None = None
    matches: list[RouteMatch] = []
    for candidate in candidates:
        if candidate.route is not current:
            if current is not None:
                yield msgspec.structs.replace(current, matches=tuple(matches))
            current, matches = candidate.route, []
        matches.append(candidate.match)
    if current is not None:
        yield msgspec.structs.replace(current, matches=tuple(matches))


def make_route(route: RequestRoute, number: int, scope: Scope) -> Route:
    """One rule; its matches are left out."""
    rule = route.rules[number]
    origin = Origin(route.kind, route.namespace, route.name, number)
    name = rule.name or f"{route.namespace}.{route.name}.{number}"
    if unsupported := list(find_unsupported(rule)):
        return Route(origin, _fail("; ".join(message for _, message in unsupported)), name)
    filters, edits = rule.filters, rule.filters.edits
    if filters.redirect is not None:
        return Route(origin, filters.redirect, name, response=edits.response, cors=filters.cors)
    destinations = tuple(_weigh(rule, index, route.namespace, scope) for index, backend in enumerate(rule.backends) if backend.ref.weight)
    authority = (filters.rewrite.authority if filters.rewrite else None) or edits.authority
    request, response = edits.request, edits.response
    if len(destinations) == 1:
        only = destinations[0]
        request, response, authority = combine(request, only.request), combine(response, only.response), authority or only.authority
        empty = HeaderChanges()
        destinations = (msgspec.structs.replace(only, weight=1, request=empty, response=empty, authority=""),)
    elif authority:
        destinations = tuple(msgspec.structs.replace(each, authority="") for each in destinations)
    return Route(
        origin=origin,
        action=Forward(destinations, _rewrite(filters.rewrite, authority)),
        name=name,
        request=request,
        response=response,
        timeout=_timeout(rule),
        retry=_retry(rule, scope.default_retry),
        mirrors=tuple(_mirrors(filters, route.namespace, scope.known, scope.defaults)),
        cors=filters.cors,
    )


def find_unsupported(rule: RequestRule) -> Iterator[tuple[FieldPath, str]]:
    """Filters, below the rule, that a waypoint can't apply. Its requests fail then: unfiltered is not what was asked for."""
    for index, name in rule.filters.unsupported:
        yield ("filters", index, "type"), f"filters of type {name} are not supported"
    for number, backend in enumerate(rule.backends):
        for index, name in enumerate(backend.filters.types):
            if name not in _ON_BACKENDS:
                yield ("backendRefs", number, "filters", index, "type"), f"filters of type {name} are not supported at a backend"


def find_broken(route: RequestRoute | ConnectionRoute, known: KnownServices, defaults: RouteDefaults) -> Iterator[tuple[FieldPath, Broken]]:
    """References, from ``spec``, that lead to nothing. What has no weight counts too."""
    rules: Sequence[RequestRule | ConnectionRule] = route.rules
    for number, rule in enumerate(rules):
        for path, ref in _references(rule):
            found = resolve_backend(ref, route.namespace, known, defaults)
            if isinstance(found, Broken):
                yield ("spec", "rules", number, *path), found


def _references(rule: RequestRule | ConnectionRule) -> Iterator[tuple[FieldPath, BackendRef]]:
    if isinstance(rule, ConnectionRule):
        yield from ((("backendRefs", index), ref) for index, ref in enumerate(rule.backends))
        return
    yield from ((("backendRefs", index), backend.ref) for index, backend in enumerate(rule.backends))
    places = (index for index, name in enumerate(rule.filters.types) if name == "RequestMirror")
    yield from ((("filters", index), mirror.backend) for index, mirror in zip(places, rule.filters.mirrors, strict=False))


def _fail(because: str) -> Forward:
    return Forward((failing("", 0, 1, because),))


def _weigh(rule: RequestRule, index: int, namespace: str, scope: Scope) -> WeightedDestination:
    backend = rule.backends[index]
    edits = backend.filters.edits
    found = weigh_backend(backend.ref, namespace, scope.known, scope.defaults)
    return msgspec.structs.replace(found, request=edits.request, response=edits.response, authority=edits.authority)


def _rewrite(rewrite: Rewrite | None, authority: str) -> Rewrite | None:
    if rewrite is None:
        return Rewrite(authority=authority) if authority else None
    changed = msgspec.structs.replace(rewrite, authority=authority or None)
    return None if changed == Rewrite() else changed


def _timeout(rule: RequestRule) -> float | None:
    """Of all attempts. Without a retry of its own a rule's request is meant to have one, which gets the backend's."""
    if rule.backend_timeout and rule.retry is None:
        return rule.backend_timeout
    return rule.timeout or None


def _retry(rule: RequestRule, default: Retry | None) -> Retry | None:
    if rule.retry is None:
        return default if default is not None and default.attempts else None
    if not rule.retry.attempts:
        return None
    return msgspec.structs.replace(rule.retry, per_try_timeout=rule.backend_timeout or None)


def _mirrors(filters: Filters, namespace: str, known: KnownServices, defaults: RouteDefaults) -> Iterator[Mirror]:
    for mirror in filters.mirrors:
        found = resolve_backend(mirror.backend, namespace, known, defaults)
        if not isinstance(found, Broken) and mirror.percent:
            yield Mirror(found, mirror.percent)

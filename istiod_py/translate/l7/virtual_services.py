"""A VirtualService's HTTP rules as routes of services behind a waypoint (reference: Istio's `route.go` and `listener_waypoint.go`).

They are the same for all services and ports: what depends on the port that a request came for says so (`RouteMatch.port`, a destination
without a port).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

import msgspec

from istiod_py.translate.l7.delegates import PlacedRule
from istiod_py.translate.l7.destinations import NO_SUCH, combine, note_subset, resolve_target
from istiod_py.translate.l7.known import KnownServices, L7Service
from istiod_py.translate.l7.sources import Note, RouteDefaults, hosts_of
from mesh.kube.headeredits import NO_EDITS, HeaderEdits
from mesh.kube.objects import FieldPath, ObjectKey, mapping_at
from mesh.kube.routeactions import MirrorTarget, WeightedTarget
from mesh.kube.textmatch import matches_empty, matches_everything
from mesh.kube.virtualservice import CLAIMS, MESH, HttpMatch, HttpRule, VirtualService, covers
from mesh.model.l7.matching import (
    Exact,
    HeaderMatch,
    PathKind,
    PathMatch,
    Prefix,
    Present,
    QueryMatch,
    Regex,
    RouteMatch,
    Suffix,
    TextMatch,
)
from mesh.model.l7.routing import (
    Action,
    Destination,
    Forward,
    HeaderChanges,
    Mirror,
    Origin,
    Redirect,
    Retry,
    Rewrite,
    Route,
    WeightedDestination,
)

REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_IGNORED_HEADERS: Final = frozenset({"uri", "scheme", "method", "authority"})
_EVERY_PATH: Final = PathMatch(PathKind.PREFIX, "/")


@dataclass(frozen=True, slots=True)
class Scope:
    """Where routes are for: waypoints of ``waypoint_namespace``. ``known``: the services that they may name."""

    waypoint_namespace: str
    known: KnownServices
    default_retry: Retry | None
    defaults: RouteDefaults


@dataclass(frozen=True, slots=True)
class Portless:
    """A destination in a rule that leaves the port open, of a service that has several: where a request comes for another, it fails.
    ``note``: what is to be said then."""

    service: L7Service
    note: Note


@dataclass(slots=True)
class Findings:
    """What turns up while rules become routes."""

    notes: list[Note] = field(default_factory=list)
    portless: list[Portless] = field(default_factory=list)


def route_rules(placed: Iterable[PlacedRule], scope: Scope, found: Findings) -> list[Route]:
    """The routes of a VirtualService's rules."""
    routes = (_route_rule(each, scope, found) for each in placed)
    return [route for route in routes if route is not None]


def matches_every_request(match: RouteMatch) -> bool:
    """Whether no request for ``match.port`` gets past it."""
    if match.method is not None or match.scheme is not None or match.authority is not None or match.headers or match.query:
        return False
    path = match.path
    if path is None:
        return True
    match path.kind:
        case PathKind.PREFIX | PathKind.SEGMENTS:
            return path.value in ("", "/")
        case PathKind.REGEX:
            return matches_everything(path.value)
    return False


def narrow_hosts(vs: VirtualService, service: L7Service, defaults: RouteDefaults) -> tuple[str, ...]:
    """What distinguishes the VirtualService's hosts among the names of a service that has many (``*.example.com``): one of these must
    hold; none: it is for all of them. (Istio lets such a VirtualService have requests for any name.)"""
    if not service.hostname.startswith("*"):
        return ()
    hosts = hosts_of(vs, defaults)
    if any(covers(host, service.hostname) for host in hosts):
        return ()
    return tuple(dict.fromkeys(host for host in hosts if covers(service.hostname, host)))


def _route_rule(placed: PlacedRule, scope: Scope, found: Findings) -> Route | None:
    rule = placed.rule
    found.notes.extend(_note_idle_faults(placed))
    matches = _select_matches(placed, scope, found)
    if matches is None:
        return None
    action = _make_action(placed, scope, found)
    if action is None:
        return None
    edits = rule.headers or NO_EDITS
    forwards = isinstance(action, Forward)
    if forwards and len(rule.targets) == 1:
        # As Envoy has it for a single destination: one set of changes.
        own = rule.targets[0].headers
        edits = HeaderEdits(combine(edits.request, own.request), combine(edits.response, own.response))
    by_prefix = (isinstance(action, Forward) and action.rewrite is not None and action.rewrite.prefix is not None) or (
        isinstance(action, Redirect) and action.prefix is not None
    )
    return Route(
        origin=Origin("VirtualService", placed.obj.namespace, placed.obj.name, placed.index),
        action=action,
        name=rule.name,
        matches=tuple(_convert_matches(matches, by_prefix)),
        request=edits.request if forwards else HeaderChanges(),
        response=edits.response,
        timeout=rule.timeout if forwards else None,
        retry=_choose_retry(rule, scope) if forwards else None,
        fault=rule.fault,
        mirrors=_make_mirrors(placed, scope, found) if forwards else (),
        cors=rule.cors,
    )


def _note_idle_faults(placed: PlacedRule) -> Iterator[Note]:
    """A fault without a percentage is meant for all requests, and has none."""
    raw = placed.obj.spec.get("http")
    rule = raw[placed.index] if isinstance(raw, list) and placed.index < len(raw) else None
    fault = mapping_at(rule, "fault") if isinstance(rule, Mapping) else {}
    for kind, effect in (("delay", "held up"), ("abort", "ended")):
        if kind in fault and not {"percentage", "percent"} & mapping_at(fault, kind).keys():
            path = ("spec", "http", placed.index, "fault", kind)
            yield Note(placed.obj.key, path, f"without 'percentage' no request is {effect}: for all write percentage: {{value: 100}}")


def _choose_retry(rule: HttpRule, scope: Scope) -> Retry | None:
    retry = scope.default_retry if rule.retry is None else rule.retry
    return retry if retry is not None and retry.attempts else None


# Matches


def _select_matches(placed: PlacedRule, scope: Scope, found: Findings) -> list[HttpMatch] | None:
    """Those that a waypoint can meet; none at all (an empty list) is every request. None: there were some, and it can meet none of
    them."""
    selected: list[HttpMatch] = []
    for index, match in enumerate(placed.rule.matches):
        problem = find_unmet(match, scope.waypoint_namespace)
        if problem:
            name, message = problem
            found.notes.append(Note(placed.obj.key, ("spec", "http", placed.index, "match", index, name), message))
        else:
            selected.append(match)
            found.notes.extend(_note_uri(placed, index, match.uri))
    return selected if selected or not placed.rule.matches else None


def _note_uri(placed: PlacedRule, index: int, uri: TextMatch | None) -> Iterator[Note]:
    """A beginning that no path has. The match stays: it meets nothing by itself. (``*`` is the path of an OPTIONS for the server.)"""
    match uri:
        case Exact(value=value) if not value.startswith("/") and value != "*":
            kind = "exact"
        case Prefix(value=value) if value and not value.startswith("/") and value != "*":
            kind = "prefix"
        case _:
            return
    path = ("spec", "http", placed.index, "match", index, "uri", kind)
    yield Note(placed.obj.key, path, "no path matches that: paths begin with '/'")


def find_unmet(match: HttpMatch, waypoint_namespace: str) -> tuple[str, str] | None:
    """Field and reason why a waypoint never meets this match: it stands for no single client."""
    if match.source_labels:
        return "sourceLabels", "a waypoint does not see clients' labels: this match is left out"
    if match.gateways:
        return None if MESH in match.gateways else ("gateways", "without 'mesh' this match is for gateways alone: it is left out")
    if match.source_namespace not in ("", waypoint_namespace):
        message = f"is compared with the waypoint's own namespace, {waypoint_namespace}: this match is left out"
        return "sourceNamespace", message
    return None


def _convert_matches(matches: list[HttpMatch], by_prefix: bool) -> Iterable[RouteMatch]:
    for match in matches:
        converted = _convert_match(match)
        if by_prefix and converted.path is None:
            converted = msgspec.structs.replace(converted, path=_EVERY_PATH)
        yield converted
        if not converted.port and matches_every_request(converted):
            return
    if not matches and by_prefix:
        yield RouteMatch(path=_EVERY_PATH)


def _convert_match(match: HttpMatch) -> RouteMatch:
    headers = [
        *(HeaderMatch(name, text) for name, text in match.headers.items() if _is_matched(name)),
        *(_without(name, text) for name, text in match.without_headers.items() if _is_matched(name)),
    ]
    return RouteMatch(
        name=match.name,
        path=_convert_uri(match.uri, match.ignore_case),
        method=_restricting(match.method),
        scheme=_restricting(match.scheme),
        authority=_restricting(match.authority),
        headers=tuple(sorted(headers, key=lambda header: header.name)),
        query=tuple(QueryMatch(name, text) for name, text in sorted(match.query.items())),
        port=match.port,
    )


def _is_matched(name: str) -> bool:
    return name not in _IGNORED_HEADERS and not CLAIMS.fullmatch(name)


def ignored_headers(match: HttpMatch) -> list[tuple[str, str]]:
    """Field and name of what Istio says that it ignores."""
    parts = (("headers", match.headers), ("withoutHeaders", match.without_headers))
    return [(field, name) for field, names in parts for name in names if name in _IGNORED_HEADERS]


def _without(name: str, text: TextMatch) -> HeaderMatch:
    """An absent header counts as an empty one: where the pattern matches that, it is as if the header were there."""
    return HeaderMatch(name, text, invert=True, absent_fails=not isinstance(text, Present) and matches_empty(text))


def _restricting(text: TextMatch | None) -> TextMatch | None:
    """These are always there: that they be is no restriction."""
    return None if isinstance(text, Present) else text


def _convert_uri(uri: TextMatch | None, ignore_case: bool) -> PathMatch | None:
    match uri:
        case None | Present():
            return None
        case Exact(value=value):
            return PathMatch(PathKind.EXACT, value, ignore_case)
        case Prefix(value=value):
            return PathMatch(PathKind.PREFIX, value, ignore_case)
        case Regex(value=value) | Suffix(value=value):
            return PathMatch(PathKind.REGEX, value)


# Actions


def _make_action(placed: PlacedRule, scope: Scope, found: Findings) -> Action | None:
    rule = placed.rule
    if rule.redirect is not None:
        if rule.redirect.status in REDIRECTS:
            return rule.redirect
        message = f"{rule.redirect.status} is no redirect that is followed: the rule is left out"
        found.notes.append(Note(placed.obj.key, ("spec", "http", placed.index, "redirect", "redirectCode"), message))
        return None
    if rule.direct_response is not None:
        return rule.direct_response
    authority = _route_authority(rule)
    return Forward(_make_destinations(placed, scope, found, authority), _make_rewrite(rule, authority))


def _route_authority(rule: HttpRule) -> str:
    """What the request's authority becomes wherever it is sent: ``rewrite`` goes before headers, the rule before its only destination."""
    if rule.rewrite is not None and rule.rewrite.authority:
        return rule.rewrite.authority
    if rule.headers is not None and rule.headers.authority:
        return rule.headers.authority
    return rule.targets[0].headers.authority if len(rule.targets) == 1 else ""


def _make_rewrite(rule: HttpRule, authority: str) -> Rewrite | None:
    if rule.rewrite is None:
        return Rewrite(authority=authority) if authority else None
    return msgspec.structs.replace(rule.rewrite, authority=authority or None)


def _make_destinations(placed: PlacedRule, scope: Scope, found: Findings, authority: str) -> tuple[WeightedDestination, ...]:
    targets = placed.rule.targets
    if len(targets) == 1:
        return (_make_destination(placed, 0, targets[0], scope, found),)
    made: list[WeightedDestination] = []
    for index, target in enumerate(targets):
        if target.weight:
            destination = _make_destination(placed, index, target, scope, found)
            edits = target.headers
            # Envoy lets the rule's authority have the last word here too.
            made.append(
                msgspec.structs.replace(
                    destination,
                    weight=target.weight,
                    request=edits.request,
                    response=edits.response,
                    authority="" if authority else edits.authority,
                )
            )
    return tuple(made)


def _make_destination(placed: PlacedRule, index: int, target: WeightedTarget, scope: Scope, found: Findings) -> WeightedDestination:
    made = resolve_target(target.target, scope.waypoint_namespace, scope.known)
    path: FieldPath = ("spec", "http", placed.index, "route", index, "destination")
    _note_destination(placed.obj.key, path, made, scope, found, f"its requests are answered {NO_SUCH}")
    return made


def _make_mirrors(placed: PlacedRule, scope: Scope, found: Findings) -> tuple[Mirror, ...]:
    rule = placed.rule
    one = () if rule.mirror is None else (MirrorTarget(rule.mirror, 100.0 if rule.mirror_percent is None else rule.mirror_percent),)
    made: list[Mirror] = []
    for index, mirror in enumerate((*one, *rule.mirrors)):
        to = resolve_target(mirror.target, scope.waypoint_namespace, scope.known)
        path: FieldPath = ("spec", "http", placed.index, *(("mirror",) if one else ("mirrors", index)))
        if to.fails_with is not None or mirror.percent:
            _note_destination(placed.obj.key, path, to, scope, found, "nothing is mirrored", () if one else ("destination",))
        if to.fails_with is None and mirror.percent:
            made.append(Mirror(to.destination, mirror.percent))
    return tuple(made)


def _note_destination(
    key: ObjectKey, path: FieldPath, made: WeightedDestination, scope: Scope, found: Findings, effect: str, below: FieldPath = ()
) -> None:
    """That it cannot be used, or not always. ``below``: where in ``path`` the destination itself is."""
    destination = made.destination
    if made.fails_with is not None:
        found.notes.append(Note(key, path, f"{made.because}: {effect}"))
        return
    if destination.subset:
        found.notes.append(note_subset(key, (*path, *below, "subset"), destination, effect))
    service = scope.known.find(destination.hostname, scope.waypoint_namespace) if not destination.port else None
    if service is not None:
        found.portless.append(Portless(service, Note(key, path, effect)))


def make_default_route(service: L7Service, port: int, retry: Retry | None) -> Route:
    """What a service has that no resource routes: to itself."""
    return Route(
        origin=Origin(service.kind, service.namespace, service.name),
        action=Forward((WeightedDestination(Destination(service.namespace, service.hostname, port)),)),
        name="default",
        retry=retry if retry is not None and retry.attempts else None,
    )

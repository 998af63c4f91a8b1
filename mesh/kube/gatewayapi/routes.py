"""HTTPRoute, GRPCRoute, TCPRoute and TLSRoute as their schemas define them; all versions of each are read alike."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from mesh.kube.durations import GATEWAY_DURATION, read_duration
from mesh.kube.fields import Fields, Text
from mesh.kube.gatewayapi.filters import (
    GRPC_FILTERS,
    HEADER_NAME,
    HEADER_VALUE,
    HTTP_FILTERS,
    MAX_HEADERS,
    Filters,
    read_filters,
)
from mesh.kube.gatewayapi.references import (
    MAX_BACKENDS,
    RULE_NAME,
    BackendRef,
    ParentRef,
    read_backend,
    read_hostnames,
    read_parents,
)
from mesh.kube.objects import KubeObject, SourceProblem
from mesh.kube.textmatch import find_regex_mistake
from mesh.model.l7.matching import MAX_REGEX, Exact, HeaderMatch, PathKind, PathMatch, QueryMatch, Regex, RouteMatch, TextMatch
from mesh.model.l7.routing import Retry

MAX_RULES: Final = 16
MAX_MATCHES: Final = 64
MAX_ALL_MATCHES: Final = 128
MAX_HOSTNAMES: Final = 16
MAX_SNI_HOSTNAMES: Final = 1024
METHODS: Final = ("GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH")
_MATCH_TYPES: Final = ("Exact", "RegularExpression")
_PATH_TYPES: Final = ("PathPrefix", "Exact", "RegularExpression")
_PATH: Final = re.compile(r"(?:[-A-Za-z0-9/._~!$&'()*+,;=:@]|%[0-9a-fA-F]{2})+")
_GRPC_SERVICE: Final = re.compile(r"\.?[A-Za-z_][A-Za-z_0-9]*(\.[A-Za-z_][A-Za-z_0-9]*)*")
_GRPC_METHOD: Final = re.compile("[A-Za-z_][A-Za-z_0-9]*")
_RETRIED: Final = ("connect-failure", "refused-stream", "unavailable", "cancelled", "reset")
"""What a ``retry`` adds to its codes: Istio's, and all other breaks of a connection, which the Gateway API asks for as well."""


@dataclass(frozen=True, slots=True)
class RuleBackend:
    ref: BackendRef
    filters: Filters


@dataclass(frozen=True, slots=True)
class RequestRule:
    """A rule of an HTTPRoute or GRPCRoute. ``matches`` empty: every request. Times in seconds; None: not given."""

    name: str
    matches: tuple[RouteMatch, ...]
    filters: Filters
    backends: tuple[RuleBackend, ...]
    timeout: float | None = None
    backend_timeout: float | None = None
    retry: Retry | None = None
    sticky: bool = False
    """``sessionPersistence`` is asked for."""


@dataclass(frozen=True, slots=True)
class RequestRoute:
    """An HTTPRoute or a GRPCRoute."""

    kind: str
    namespace: str
    name: str
    parents: tuple[ParentRef, ...]
    hostnames: tuple[str, ...]
    rules: tuple[RequestRule, ...]


@dataclass(frozen=True, slots=True)
class ConnectionRule:
    name: str
    backends: tuple[BackendRef, ...]


@dataclass(frozen=True, slots=True)
class ConnectionRoute:
    """A TCPRoute or a TLSRoute. ``hostnames``: of the latter alone."""

    kind: str
    namespace: str
    name: str
    parents: tuple[ParentRef, ...]
    hostnames: tuple[str, ...]
    rules: tuple[ConnectionRule, ...]


def read_http_route(obj: KubeObject) -> tuple[RequestRoute, tuple[SourceProblem, ...]]:
    """The route and every mistake in it; with a mistake it is not for use."""
    fields = Fields(obj)
    return parse_http_route(fields), tuple(fields.problems)


def read_grpc_route(obj: KubeObject) -> tuple[RequestRoute, tuple[SourceProblem, ...]]:
    fields = Fields(obj)
    return parse_grpc_route(fields), tuple(fields.problems)


def read_tcp_route(obj: KubeObject) -> tuple[ConnectionRoute, tuple[SourceProblem, ...]]:
    fields = Fields(obj)
    return parse_tcp_route(fields), tuple(fields.problems)


def read_tls_route(obj: KubeObject) -> tuple[ConnectionRoute, tuple[SourceProblem, ...]]:
    fields = Fields(obj)
    return parse_tls_route(fields), tuple(fields.problems)


def parse_http_route(fields: Fields) -> RequestRoute:
    """``fields`` of the whole object."""
    spec = _open(fields, "hostnames")
    rules = spec.mappings("rules", most=MAX_RULES)
    # What an API server fills in where there are no rules: one, for every request, with no backend.
    read = tuple(map(_read_http_rule, rules)) if rules else (RequestRule("", (), Filters(), ()),)
    return _finish(spec, "HTTPRoute", read)


def parse_grpc_route(fields: Fields) -> RequestRoute:
    """``fields`` of the whole object."""
    spec = _open(fields, "hostnames")
    return _finish(spec, "GRPCRoute", tuple(map(_read_grpc_rule, spec.mappings("rules", most=MAX_RULES))))


def parse_tcp_route(fields: Fields) -> ConnectionRoute:
    """``fields`` of the whole object."""
    return _read_connection_route(_open(fields), "TCPRoute", ())


def parse_tls_route(fields: Fields) -> ConnectionRoute:
    """``fields`` of the whole object."""
    spec = _open(fields, "hostnames")
    return _read_connection_route(spec, "TLSRoute", read_hostnames(spec, most=MAX_SNI_HOSTNAMES))


def _open(fields: Fields, *further: str) -> Fields:
    spec = fields.mapping("spec", required=True) or Fields(fields.whole, ("spec",), {}, fields.problems)
    spec.refuse_unknown("parentRefs", "rules", "useDefaultGateways", *further)
    spec.string("useDefaultGateways", choices=("All", "None"))
    return spec


def _finish(spec: Fields, kind: str, rules: tuple[RequestRule, ...]) -> RequestRoute:
    matches = sum(len(rule.matches) for rule in rules)
    if matches > MAX_ALL_MATCHES:
        spec.complain("rules", f"have {matches} matches together, of at most {MAX_ALL_MATCHES}")
    _check_names(spec, [rule.name for rule in rules])
    obj = spec.whole
    return RequestRoute(kind, obj.namespace, obj.name, read_parents(spec), read_hostnames(spec, most=MAX_HOSTNAMES), rules)


def _check_names(spec: Fields, names: list[str]) -> None:
    for index, name in enumerate(names):
        if name and name in names[:index]:
            spec.complain("rules", f"two rules have the name '{name}'", index, "name")


def _read_http_rule(rule: Fields) -> RequestRule:
    rule.refuse_unknown("name", "matches", "filters", "backendRefs", "timeouts", "retry", "sessionPersistence")
    timeouts, retry = rule.mapping("timeouts"), rule.mapping("retry")
    timeout, backend_timeout = _read_timeouts(timeouts) if timeouts else (None, None)
    found = RequestRule(
        name=rule.string("name", text=RULE_NAME),
        matches=tuple(map(_read_match, rule.mappings("matches", most=MAX_MATCHES))),
        filters=read_filters(rule, HTTP_FILTERS),
        backends=_read_backends(rule, HTTP_FILTERS),
        timeout=timeout,
        backend_timeout=backend_timeout,
        retry=_read_retry(retry) if retry else None,
        sticky=_read_persistence(rule),
    )
    _check_redirect(found, rule)
    return found


def _read_grpc_rule(rule: Fields) -> RequestRule:
    rule.refuse_unknown("name", "matches", "filters", "backendRefs", "sessionPersistence")
    return RequestRule(
        name=rule.string("name", text=RULE_NAME),
        matches=tuple(map(_read_grpc_match, rule.mappings("matches", most=MAX_MATCHES))),
        filters=read_filters(rule, GRPC_FILTERS),
        backends=_read_backends(rule, GRPC_FILTERS),
        sticky=_read_persistence(rule),
    )


def _read_persistence(rule: Fields) -> bool:
    return rule.mapping("sessionPersistence") is not None and "sessionPersistence" in rule


def _read_backends(rule: Fields, types: tuple[str, ...]) -> tuple[RuleBackend, ...]:
    return tuple(
        RuleBackend(read_backend(fields, "filters"), read_filters(fields, types))
        for fields in rule.mappings("backendRefs", most=MAX_BACKENDS)
    )


def _check_redirect(found: RequestRule, rule: Fields) -> None:
    if found.filters.redirect is not None and found.backends:
        rule.complain("backendRefs", "beside a filter of type RequestRedirect: requests go nowhere")
    for index, part in enumerate((found.filters.redirect, found.filters.rewrite)):
        if part is not None and part.prefix is not None and not _is_one_prefix(found.matches):
            name = ("RequestRedirect", "URLRewrite")[index]
            rule.complain("filters", "ReplacePrefixMatch needs exactly one match, by PathPrefix", found.filters.types.index(name))


def _is_one_prefix(matches: tuple[RouteMatch, ...]) -> bool:
    """No match at all stands for one: the prefix ``/``."""
    if not matches:
        return True
    path = matches[0].path
    return len(matches) == 1 and path is not None and path.kind is PathKind.SEGMENTS


def _read_timeouts(fields: Fields) -> tuple[float | None, float | None]:
    fields.refuse_unknown("request", "backendRequest")
    request, backend = (read_duration(fields, key, GATEWAY_DURATION) for key in ("request", "backendRequest"))
    if request and backend and backend > request:
        fields.complain("backendRequest", "is longer than 'request', which is for all attempts together")
    return request, backend


def _read_retry(fields: Fields) -> Retry:
    fields.refuse_unknown("codes", "attempts", "backoff")
    codes = _read_codes(fields)
    backoff = read_duration(fields, "backoff", GATEWAY_DURATION)
    attempts = fields.integer("attempts", 2, low=0, high=2**31 - 1)
    retry = Retry(attempts=attempts, on=(*_RETRIED, *(("retriable-status-codes",) if codes else ())), statuses=codes)
    return replace_backoff(retry, backoff) if backoff else retry


def replace_backoff(retry: Retry, seconds: float) -> Retry:
    """With a pause of ``seconds`` before the first retry, and of ten times that at most: Envoy's proportion."""
    return Retry(retry.attempts, retry.on, retry.statuses, retry.per_try_timeout, seconds, 10 * seconds)


def _read_codes(fields: Fields) -> tuple[int, ...]:
    return tuple(dict.fromkeys(fields.integers("codes", low=400, high=599)))


def _read_match(fields: Fields) -> RouteMatch:
    fields.refuse_unknown("path", "headers", "queryParams", "method")
    path = fields.mapping("path")
    method = fields.string("method", choices=METHODS)
    return RouteMatch(
        path=_read_path(path) if path else PathMatch(PathKind.SEGMENTS, "/"),
        method=Exact(method) if method else None,
        headers=_read_headers(fields),
        query=_read_query(fields),
    )


def _read_path(fields: Fields) -> PathMatch:
    fields.refuse_unknown("type", "value")
    kind = fields.string("type", "PathPrefix", choices=_PATH_TYPES)
    value = fields.string("value", "/", text=_PATH_VALUE)
    mistake = find_regex_mistake(value) if kind == "RegularExpression" else find_path_mistake(value)
    if mistake:
        fields.complain("value", mistake)
    match kind:
        case "Exact":
            return PathMatch(PathKind.EXACT, value)
        case "RegularExpression":
            return PathMatch(PathKind.REGEX, value)
    return PathMatch(PathKind.SEGMENTS, value.rstrip("/") or "/")


def find_path_mistake(path: str) -> str | None:
    """Why nothing could have this path, or prefix, once it is normalised."""
    if not path.startswith("/"):
        return f"a path begins with '/', found '{path[:80]}'"
    for part in ("//", "/./", "/../", "%2f", "%2F", "#"):
        if part in path:
            return f"'{part}' is in no path"
    if path.endswith(("/.", "/..")):
        return "no path ends like this"
    return None if _PATH.fullmatch(path) else "not a path: other characters than URLs have, or a broken escape"


def _read_headers(fields: Fields) -> tuple[HeaderMatch, ...]:
    """The first of equal names counts."""
    found: dict[str, HeaderMatch] = {}
    for header in fields.mappings("headers", most=MAX_HEADERS):
        header.refuse_unknown("name", "type", "value")
        name = header.string("name", required=True, text=HEADER_NAME).lower()
        found.setdefault(name, HeaderMatch(name, _read_text(header, HEADER_VALUE)))
    return tuple(found.values())


def _read_query(fields: Fields) -> tuple[QueryMatch, ...]:
    found: dict[str, QueryMatch] = {}
    for parameter in fields.mappings("queryParams", most=MAX_HEADERS):
        parameter.refuse_unknown("name", "type", "value")
        name = parameter.string("name", required=True, text=HEADER_NAME)
        found.setdefault(name, QueryMatch(name, _read_text(parameter, _QUERY_VALUE)))
    return tuple(found.values())


def _read_text(fields: Fields, text: Text) -> TextMatch:
    kind = fields.string("type", _MATCH_TYPES[0], choices=_MATCH_TYPES)
    value = fields.string("value", required=True, text=text)
    if kind == "Exact":
        return Exact(value)
    mistake = find_regex_mistake(value) if value else None
    if mistake:
        fields.complain("value", mistake)
    return Regex(value)


def _read_grpc_match(fields: Fields) -> RouteMatch:
    fields.refuse_unknown("method", "headers")
    method = fields.mapping("method")
    return RouteMatch(path=_read_method(method) if method else None, headers=_read_headers(fields))


def _read_method(fields: Fields) -> PathMatch | None:
    """As a path: ``/service/method``."""
    fields.refuse_unknown("type", "service", "method")
    kind = fields.string("type", _MATCH_TYPES[0], choices=_MATCH_TYPES)
    service, method = (fields.string(key, text=_GRPC_NAME) for key in ("service", "method"))
    if not (service or method):
        fields.complain(None, "'service' or 'method' is required")
        return None
    if kind == "Exact":
        for key, value, pattern in (("service", service, _GRPC_SERVICE), ("method", method, _GRPC_METHOD)):
            if value and not pattern.fullmatch(value):
                fields.complain(key, f"'{value[:80]}' is no name of a gRPC {key}")
        return _method_path(service, method)
    path = f"/{f'(?:{service})' if service else '[^/]+'}/{f'(?:{method})' if method else '.+'}"
    for key, value in (("service", service), ("method", method)):
        mistake = find_regex_mistake(value) if value else None
        if mistake:
            fields.complain(key, mistake)
    if len(path) > MAX_REGEX:
        fields.complain(None, f"has {len(path)} characters as one regular expression, of at most {MAX_REGEX}")
    return PathMatch(PathKind.REGEX, path)


def _method_path(service: str, method: str) -> PathMatch:
    if not method:
        return PathMatch(PathKind.SEGMENTS, f"/{service}")
    if not service:
        return PathMatch(PathKind.REGEX, f"/[^/]+/{method}")
    return PathMatch(PathKind.EXACT, f"/{service}/{method}")


def _read_connection_route(spec: Fields, kind: str, hostnames: tuple[str, ...]) -> ConnectionRoute:
    rules: list[ConnectionRule] = []
    for rule in spec.mappings("rules", required=True, empty="a route needs a rule", most=MAX_RULES):
        rule.refuse_unknown("name", "backendRefs")
        found = rule.mappings("backendRefs", most=MAX_BACKENDS)
        rules.append(ConnectionRule(rule.string("name", text=RULE_NAME), tuple(map(read_backend, found))))
    _check_names(spec, [rule.name for rule in rules])
    return ConnectionRoute(kind, spec.whole.namespace, spec.whole.name, read_parents(spec), hostnames, tuple(rules))


def _find_length_mistake(text: str) -> str | None:
    return None if len(text) <= 1024 else f"has {len(text)} characters, of at most 1024"


_PATH_VALUE: Final = Text(_find_length_mistake, {"maxLength": 1024})
_GRPC_NAME: Final = Text(_find_length_mistake, {"maxLength": 1024})
_QUERY_VALUE: Final = Text(lambda text: _find_length_mistake(text) if text else "an empty value", {"minLength": 1, "maxLength": 1024})

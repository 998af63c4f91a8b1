"""Filters of HTTPRoutes and GRPCRoutes, down to what a waypoint does. A kind of filter that is right but not ours is kept as such: whoever
left it out would serve requests that it was to change, or to refuse."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from mesh.kube.fields import Fields, Text
from mesh.kube.gatewayapi.references import PRECISE_HOSTNAME, BackendRef, read_backend
from mesh.kube.headeredits import NO_EDITS, HeaderEdits, find_format_mistake, is_authority, is_token, make_changes
from mesh.kube.routeactions import default_port
from mesh.model.l7.matching import Exact, Regex, TextMatch
from mesh.model.l7.routing import Cors, HeaderChanges, Redirect, Rewrite

MAX_FILTERS: Final = 16
MAX_HEADERS: Final = 16
_FIELDS: Final[Mapping[str, str]] = {
    "RequestHeaderModifier": "requestHeaderModifier",
    "ResponseHeaderModifier": "responseHeaderModifier",
    "RequestMirror": "requestMirror",
    "RequestRedirect": "requestRedirect",
    "URLRewrite": "urlRewrite",
    "CORS": "cors",
    "ExtensionRef": "extensionRef",
    "ExternalAuth": "externalAuth",
}
HTTP_FILTERS: Final = tuple(_FIELDS)
GRPC_FILTERS: Final = ("RequestHeaderModifier", "ResponseHeaderModifier", "RequestMirror", "ExtensionRef")
_REPEATED: Final = frozenset({"RequestMirror", "ExtensionRef"})
_METHODS: Final = ("GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH", "*")
_VALUE: Final = re.compile(r"[\t\x20-\x7e\x80-\U0010ffff]+")
_ORIGIN: Final = re.compile(r"\*|[a-zA-Z][a-zA-Z0-9+.-]*://((\*\.)?([a-zA-Z0-9_-]+\.)*[a-zA-Z0-9_-]+|\*)(:([0-9]{1,5}|\*))?")
_ANY_ORIGIN: Final = Regex(r"[A-Za-z][A-Za-z0-9+.-]*://[^/\s?#]+")
"""Every origin that a browser sends for a page of the web; not ``null``."""
_DEFAULT_MAX_AGE: Final = 5


@dataclass(frozen=True, slots=True)
class Mirroring:
    backend: BackendRef
    percent: float = 100.0


@dataclass(frozen=True, slots=True)
class Filters:
    """All filters of a rule or a backend. ``unsupported``: index and type of those that are not ours."""

    edits: HeaderEdits = NO_EDITS
    redirect: Redirect | None = None
    rewrite: Rewrite | None = None
    mirrors: tuple[Mirroring, ...] = ()
    cors: Cors | None = None
    types: tuple[str, ...] = ()
    unsupported: tuple[tuple[int, str], ...] = ()


def read_filters(owner: Fields, types: tuple[str, ...]) -> Filters:
    """``filters`` of a rule or a backend; ``types``: those that its kind of route knows."""
    names: list[str] = []
    request, response, authority = HeaderChanges(), HeaderChanges(), ""
    redirect: Redirect | None = None
    rewrite: Rewrite | None = None
    cors: Cors | None = None
    mirrors: list[Mirroring] = []
    for index, fields in enumerate(owner.mappings("filters", most=MAX_FILTERS)):
        parts = _read_parts(fields, types)
        name = fields.string("type", required=True, choices=types)
        _check_type(fields, name, types)
        if name in names and name not in _REPEATED:
            owner.complain("filters", f"{name} is given twice", index)
        names.append(name)
        request, authority = (parts.request, parts.authority) if name == "RequestHeaderModifier" else (request, authority)
        response = parts.response if name == "ResponseHeaderModifier" else response
        redirect = parts.redirect if name == "RequestRedirect" else redirect
        rewrite = parts.rewrite if name == "URLRewrite" else rewrite
        cors = parts.cors if name == "CORS" else cors
        if name == "RequestMirror" and parts.mirror is not None:
            mirrors.append(parts.mirror)
    if redirect is not None and rewrite is not None:
        owner.complain("filters", "RequestRedirect and URLRewrite exclude each other", names.index("URLRewrite"))
    unsupported = tuple((index, name) for index, name in enumerate(names) if name in ("ExtensionRef", "ExternalAuth"))
    edits = HeaderEdits(request, response, authority)
    return Filters(edits, redirect, rewrite, tuple(mirrors), cors, tuple(names), unsupported)


@dataclass(frozen=True, slots=True)
class _Parts:
    """What one filter says, whatever its type."""

    request: HeaderChanges
    authority: str
    response: HeaderChanges
    mirror: Mirroring | None
    redirect: Redirect | None
    rewrite: Rewrite | None
    cors: Cors | None


def _read_parts(fields: Fields, types: tuple[str, ...]) -> _Parts:
    fields.refuse_unknown("type", *(_FIELDS[name] for name in types))
    found = {name: fields.mapping(_FIELDS[name]) for name in types}
    request, authority = _read_modifier(found["RequestHeaderModifier"])
    response, _ = _read_modifier(found["ResponseHeaderModifier"])
    mirror, redirect = found["RequestMirror"], found.get("RequestRedirect")
    rewrite, cors = found.get("URLRewrite"), found.get("CORS")
    extension = found["ExtensionRef"]
    if extension is not None:
        for key in ("group", "kind", "name"):
            extension.string(key, required=True)
    return _Parts(
        request,
        authority,
        response,
        _read_mirror(mirror) if mirror else None,
        _read_redirect(redirect) if redirect else None,
        _read_rewrite(rewrite) if rewrite else None,
        _read_cors(cors) if cors else None,
    )


def _check_type(fields: Fields, name: str, types: tuple[str, ...]) -> None:
    for other in types:
        if other != name and _FIELDS[other] in fields:
            fields.complain(_FIELDS[other], f"is for filters of type {other}; this one's is {name or 'missing'}")
    if name and _FIELDS[name] not in fields:
        fields.complain(None, f"'{_FIELDS[name]}' is required for a filter of type {name}")


def _read_modifier(fields: Fields | None) -> tuple[HeaderChanges, str]:
    """Changes, and the authority that they ask for."""
    if fields is None:
        return HeaderChanges(), ""
    fields.refuse_unknown("set", "add", "remove")
    replaced, added = _read_headers(fields, "set"), _read_headers(fields, "add")
    removed = fields.strings("remove", most=MAX_HEADERS, text=_HEADER_NAME)
    wanted = [value for values in (replaced, added) for name, value in values.items() if is_authority(name)]
    return make_changes(replaced, added, removed), wanted[0] if wanted else ""


def _read_headers(fields: Fields, key: str) -> dict[str, str]:
    """The first of equal names counts. A value is meant literally, except where it is a format of Envoy's as it stands: Istio hands it on
    as one."""
    found: dict[str, str] = {}
    for header in fields.mappings(key, most=MAX_HEADERS):
        header.refuse_unknown("name", "value")
        name = header.string("name", required=True, text=_HEADER_NAME).lower()
        value = header.string("value", required=True, text=_HEADER_VALUE)
        found.setdefault(name, value if find_format_mistake(value) is None else value.replace("%", "%%"))
    return found


def _read_mirror(fields: Fields) -> Mirroring:
    fields.refuse_unknown("backendRef", "percent", "fraction")
    backend = fields.mapping("backendRef", required=True)
    percent = fields.integer("percent", 100, low=0, high=100)
    fraction = fields.mapping("fraction")
    if fraction is not None and "percent" in fields:
        fields.complain("fraction", "beside 'percent': give one of them")
    share = _read_fraction(fraction) if fraction is not None else float(percent)
    return Mirroring(read_backend(backend, weighted=False) if backend else BackendRef("", "Service", ""), share)


def _read_fraction(fields: Fields) -> float:
    fields.refuse_unknown("numerator", "denominator")
    numerator = fields.integer("numerator", required=True, low=0, high=2**31 - 1)
    denominator = fields.integer("denominator", 100, low=1, high=2**31 - 1)
    if numerator > denominator:
        fields.complain("numerator", f"{numerator} of {denominator} is more than all")
        return 100.0
    return 100.0 * numerator / denominator


def _read_redirect(fields: Fields) -> Redirect:
    fields.refuse_unknown("scheme", "hostname", "path", "port", "statusCode")
    scheme = fields.string("scheme", choices=("http", "https"))
    port = fields.integer("port", low=1, high=65535)
    full, prefix = _read_path(fields.mapping("path"))
    status = fields.integer("statusCode", 302, low=301, high=308)
    if status not in (301, 302, 303, 307, 308):
        fields.complain("statusCode", f"expected 301, 302, 303, 307 or 308, found {status}")
    return Redirect(
        status=status,
        scheme=scheme or None,
        authority=fields.string("hostname", text=PRECISE_HOSTNAME) or None,
        # Where neither port nor scheme is given the port stays what it was: the service's.
        port=None if port == default_port(scheme) else port or None,
        request_port=not port and not scheme,
        path=full,
        prefix=prefix,
    )


def _read_rewrite(fields: Fields) -> Rewrite:
    fields.refuse_unknown("hostname", "path")
    full, prefix = _read_path(fields.mapping("path"))
    return Rewrite(prefix=prefix, full=full, authority=fields.string("hostname", text=PRECISE_HOSTNAME) or None)


def _read_path(fields: Fields | None) -> tuple[str | None, str | None]:
    """The whole path, or what replaces the prefix: without a slash at its end, which counts for nothing, and ``/`` for nothing at all."""
    if fields is None:
        return None, None
    fields.refuse_unknown("type", "replaceFullPath", "replacePrefixMatch")
    kind = fields.string("type", required=True, choices=("ReplaceFullPath", "ReplacePrefixMatch"))
    full = fields.string("replaceFullPath", text=_NEW_PATH)
    prefix = fields.string("replacePrefixMatch", text=_NEW_PATH)
    for key in ("replaceFullPath", "replacePrefixMatch"):
        if kind and (key in fields) != (key.lower() == kind.lower()):
            fields.complain(key if key in fields else None, f"type {kind} goes with '{kind[0].lower()}{kind[1:]}', and with nothing else")
    if kind == "ReplaceFullPath":
        return full, None
    return None, prefix.rstrip("/") or "/"


def _read_cors(fields: Fields) -> Cors:
    fields.refuse_unknown("allowOrigins", "allowCredentials", "allowMethods", "allowHeaders", "exposeHeaders", "maxAge")
    origins = fields.strings("allowOrigins", most=64, text=_CORS_ORIGIN)
    methods = fields.strings("allowMethods", most=9, text=_CORS_METHOD)
    headers = fields.strings("allowHeaders", most=64, text=_HEADER_NAME)
    for key, values in (("allowOrigins", origins), ("allowMethods", methods), ("allowHeaders", headers)):
        if "*" in values and len(values) > 1:
            fields.complain(key, "'*' is all: there is nothing to name beside it")
    return Cors(
        origins=tuple(map(_match_origin, origins)),
        methods=methods,
        headers=headers,
        expose=fields.strings("exposeHeaders", most=64, text=_HEADER_NAME),
        max_age=fields.integer("maxAge", _DEFAULT_MAX_AGE, low=1, high=2**31 - 1),
        credentials=fields.boolean("allowCredentials"),
        forward_unmatched=False,
        expand_wildcards=True,
    )


def _match_origin(origin: str) -> TextMatch:
    """``*`` stands for whole labels of the host, any number of them, or for any port."""
    if origin == "*":
        return _ANY_ORIGIN
    if "*" not in origin:
        return Exact(origin)
    scheme, _, rest = origin.partition("://")
    host, colon, port = rest.partition(":")
    pattern = f"{re.escape(scheme)}://" + re.escape(host).replace(r"\*", r"[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*")
    return Regex(pattern + (f":{'[0-9]+' if port == '*' else port}" if colon else ""))


def _find_header_mistake(name: str) -> str | None:
    return None if len(name) <= 256 and is_token(name) else f"'{name[:80]}' is no name of a header"


def _find_value_mistake(value: str) -> str | None:
    if len(value) > 4096 or _VALUE.fullmatch(value) is None:
        return "a header's value has 1 to 4096 characters, and no control characters"
    return None


def _find_path_mistake(path: str) -> str | None:
    if len(path) > 1024:
        return f"a path of {len(path)} characters, of at most 1024"
    if not all("!" <= character <= "~" for character in path) or "#" in path:
        return "a path has no blanks, no control characters and no fragment"
    return None


def _find_origin_mistake(origin: str) -> str | None:
    if len(origin) <= 253 and _ORIGIN.fullmatch(origin):
        return None
    return f"expected '*' or an origin such as https://example.com, https://*.example.com or http://example.com:8080, found '{origin[:80]}'"


def _find_method_mistake(method: str) -> str | None:
    return None if method in _METHODS else f"expected one of {', '.join(_METHODS)}, found '{method[:80]}'"


_HEADER_NAME: Final = Text(_find_header_mistake, {"minLength": 1, "maxLength": 256})
HEADER_NAME: Final = _HEADER_NAME
_HEADER_VALUE: Final = Text(_find_value_mistake, {"minLength": 1, "maxLength": 4096})
HEADER_VALUE: Final = _HEADER_VALUE
_NEW_PATH: Final = Text(_find_path_mistake, {"maxLength": 1024})
_CORS_ORIGIN: Final = Text(_find_origin_mistake, {"minLength": 1, "maxLength": 253})
_CORS_METHOD: Final = Text(_find_method_mistake, {"enum": list(_METHODS)})

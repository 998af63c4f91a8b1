"""A VirtualService: how requests and connections to hosts are routed. Checked as Istio's webhook and CRD rules check it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from mesh.kube.addresses import CIDR
from mesh.kube.durations import read_duration
from mesh.kube.fields import Fields, Text
from mesh.kube.headeredits import HeaderEdits, is_token, read_header_edits
from mesh.kube.hostnames import is_hostname, is_wildcard
from mesh.kube.objects import KubeObject, SourceProblem
from mesh.kube.routeactions import (
    MirrorTarget,
    Target,
    WeightedTarget,
    read_cors,
    read_direct_response,
    read_fault,
    read_http_targets,
    read_l4_targets,
    read_mirrors,
    read_redirect,
    read_retry,
    read_rewrite,
)
from mesh.kube.textmatch import read_text_match
from mesh.model.address import InvalidAddress, parse_ip
from mesh.model.l7.matching import Prefix, Present, TextMatch
from mesh.model.l7.routing import Cors, DirectResponse, Fault, Redirect, Retry, Rewrite

MESH: Final = "mesh"
"""Among ``gateways``: the mesh itself, waypoints included."""
MAX_MATCHERS: Final = 512
CLAIMS: Final = re.compile(r"@request\.auth\.claims(\..+|\[.+\])", re.IGNORECASE)
"""Keys of header matches that mean a claim of the request's token."""
_PSEUDO_HEADERS: Final = frozenset({":method", ":scheme", ":authority", ":path", ":status"})
_LABEL: Final = re.compile("[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_SPEC: Final = ("hosts", "gateways", "http", "tls", "tcp", "exportTo")
_HTTP: Final = (
    "name", "match", "route", "redirect", "directResponse", "delegate", "rewrite", "timeout", "retries", "fault", "mirror", "mirrors",
    "mirrorPercentage", "mirrorPercent", "mirror_percent", "corsPolicy", "headers",
)  # fmt: skip
_MATCH: Final = (
    "name", "uri", "scheme", "method", "authority", "headers", "withoutHeaders", "queryParams", "port", "ignoreUriCase", "sourceLabels",
    "sourceNamespace", "gateways", "statPrefix",
)  # fmt: skip
_L4_MATCH: Final = ("destinationSubnets", "port", "sourceLabels", "gateways", "sourceNamespace")


@dataclass(frozen=True, slots=True)
class HttpMatch:
    """All of it must hold; None and empty do not restrict. `Present`: whatever is there. ``port`` 0: any."""

    name: str = ""
    uri: TextMatch | None = None
    ignore_case: bool = False
    scheme: TextMatch | None = None
    method: TextMatch | None = None
    authority: TextMatch | None = None
    headers: Mapping[str, TextMatch] = field(default_factory=dict)
    without_headers: Mapping[str, TextMatch] = field(default_factory=dict)
    query: Mapping[str, TextMatch] = field(default_factory=dict)
    port: int = 0
    source_labels: Mapping[str, str] = field(default_factory=dict)
    source_namespace: str = ""
    gateways: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Delegate:
    """``namespace`` empty: the VirtualService's own."""

    name: str
    namespace: str = ""


@dataclass(frozen=True, slots=True)
class HttpRule:
    """One of ``http``. None: not given, so that a delegate inherits it. ``retry`` of no attempts: none."""

    name: str = ""
    matches: tuple[HttpMatch, ...] = ()
    targets: tuple[WeightedTarget, ...] = ()
    redirect: Redirect | None = None
    direct_response: DirectResponse | None = None
    delegate: Delegate | None = None
    rewrite: Rewrite | None = None
    timeout: float | None = None
    retry: Retry | None = None
    fault: Fault | None = None
    mirror: Target | None = None
    mirror_percent: float | None = None
    mirrors: tuple[MirrorTarget, ...] = ()
    cors: Cors | None = None
    headers: HeaderEdits | None = None


@dataclass(frozen=True, slots=True)
class L4Match:
    sni_hosts: tuple[str, ...] = ()
    """Of TLS routes alone."""
    destination_subnets: tuple[str, ...] = ()
    port: int = 0
    source_labels: Mapping[str, str] = field(default_factory=dict)
    gateways: tuple[str, ...] = ()
    source_namespace: str = ""


@dataclass(frozen=True, slots=True)
class L4Rule:
    matches: tuple[L4Match, ...]
    targets: tuple[WeightedTarget, ...]


@dataclass(frozen=True, slots=True)
class VirtualService:
    namespace: str
    name: str
    hosts: tuple[str, ...]
    """As written; empty in a delegate."""
    gateways: tuple[str, ...]
    """As written; empty: the mesh."""
    http: tuple[HttpRule, ...]
    tls: tuple[L4Rule, ...]
    tcp: tuple[L4Rule, ...]
    export_to: tuple[str, ...]
    """Empty: as the mesh's default has it."""

    @property
    def for_mesh(self) -> bool:
        return not self.gateways or MESH in self.gateways


def read_virtual_service(obj: KubeObject) -> tuple[VirtualService, tuple[SourceProblem, ...]]:
    """The VirtualService and every mistake in it; with a mistake it is not for use."""
    fields = Fields(obj)
    return parse_virtual_service(fields), tuple(fields.problems)


def parse_virtual_service(fields: Fields) -> VirtualService:
    """``fields`` of the whole object."""
    obj = fields.whole
    spec = fields.mapping("spec", required=True) or Fields(obj, ("spec",), {}, fields.problems)
    spec.refuse_unknown(*_SPEC)
    hosts, gateways = spec.strings("hosts", text=_HOST), _read_gateways(spec)
    http, tls, tcp = spec.mappings("http"), spec.mappings("tls"), spec.mappings("tcp")
    found = VirtualService(
        namespace=obj.namespace,
        name=obj.name,
        hosts=tuple(host.lower() for host in hosts),
        gateways=gateways,
        http=tuple(map(_read_http, http)),
        tls=tuple(_read_l4(rule, tls=True) for rule in tls),
        tcp=tuple(_read_l4(rule, tls=False) for rule in tcp),
        export_to=spec.strings("exportTo", text=_EXPORT),
    )
    if not fields.problems:
        _check_hosts(found, spec)
        _check_exports(found, spec)
        _check_claims(found, spec)
        _check_delegation(found, spec, http)
        _check_sni(found, spec)
        if not (http or tls or tcp):
            spec.complain(None, "one of 'http', 'tls' and 'tcp' is required")
    return found


def _read_http(rule: Fields) -> HttpRule:
    rule.refuse_unknown(*_HTTP)
    redirect, response, delegate = rule.mapping("redirect"), rule.mapping("directResponse"), rule.mapping("delegate")
    rewrite, retries, fault = rule.mapping("rewrite"), rule.mapping("retries"), rule.mapping("fault")
    cors, headers = rule.mapping("corsPolicy"), rule.mapping("headers")
    mirror, percent, mirrors = read_mirrors(rule)
    found = HttpRule(
        name=rule.string("name"),
        matches=tuple(map(_read_match, rule.mappings("match"))),
        targets=read_http_targets(rule),
        redirect=read_redirect(redirect) if redirect else None,
        direct_response=read_direct_response(response) if response else None,
        delegate=_read_delegate(delegate) if delegate else None,
        rewrite=read_rewrite(rewrite) if rewrite else None,
        timeout=read_duration(rule, "timeout"),
        retry=read_retry(retries) if retries else None,
        fault=read_fault(fault) if fault else None,
        mirror=mirror,
        mirror_percent=percent,
        mirrors=mirrors,
        cors=read_cors(cors) if cors else None,
        headers=read_header_edits(headers) if headers else None,
    )
    _check_actions(found, rule)
    _check_authority(found, rule)
    return found


def _read_match(fields: Fields) -> HttpMatch:
    fields.refuse_unknown(*_MATCH)
    fields.string("statPrefix")
    uri, scheme, method, authority = (fields.mapping(key) for key in ("uri", "scheme", "method", "authority"))
    return HttpMatch(
        name=fields.string("name"),
        uri=read_text_match(uri, empty_prefix=True) if uri else None,
        ignore_case=fields.boolean("ignoreUriCase"),
        scheme=read_text_match(scheme) if scheme else None,
        method=read_text_match(method) if method else None,
        authority=read_text_match(authority) if authority else None,
        headers=fields.map_of("headers", _HEADER_KEY, _read_present, most=MAX_MATCHERS),
        without_headers=fields.map_of("withoutHeaders", _HEADER_KEY, _read_present, most=MAX_MATCHERS),
        query=fields.map_of("queryParams", _ANY, _read_present, most=MAX_MATCHERS),
        port=fields.integer("port", low=0, high=65535),
        source_labels=fields.string_map("sourceLabels"),
        source_namespace=fields.string("sourceNamespace", text=_NAMESPACE),
        gateways=_read_gateways(fields),
    )


def _read_present(fields: Fields) -> TextMatch:
    return read_text_match(fields, presence=True)


def _read_delegate(fields: Fields) -> Delegate:
    fields.refuse_unknown("name", "namespace")
    return Delegate(fields.string("name", required=True), fields.string("namespace", text=_NAMESPACE))


def _read_l4(rule: Fields, *, tls: bool) -> L4Rule:
    rule.refuse_unknown("match", "route")
    matches = rule.mappings("match", required=tls, empty="a TLS route needs a match" if tls else "")
    return L4Rule(tuple(_read_l4_match(match, tls=tls) for match in matches), read_l4_targets(rule))


def _read_l4_match(fields: Fields, *, tls: bool) -> L4Match:
    # sourceSubnet is in Istio's schema of TCP routes, and never did anything.
    fields.refuse_unknown(*_L4_MATCH, *(("sniHosts",) if tls else ()), hints={"sourceSubnet": ": it is not supported"})
    return L4Match(
        sni_hosts=tuple(host.lower() for host in _read_sni(fields)) if tls else (),
        destination_subnets=fields.strings("destinationSubnets", text=CIDR),
        port=fields.integer("port", low=0, high=65535),
        source_labels=fields.string_map("sourceLabels"),
        gateways=_read_gateways(fields),
        source_namespace=fields.string("sourceNamespace", text=_NAMESPACE),
    )


def _read_sni(fields: Fields) -> tuple[str, ...]:
    return fields.strings("sniHosts", required=True, empty="needs at least one host", text=_HOST)


def _read_gateways(fields: Fields) -> tuple[str, ...]:
    return fields.strings("gateways", text=_GATEWAY)


# Fields that are right by themselves but not with each other. A schema says nothing of these, as Istio's own does not: rules inside lists
# within lists cost API servers more than they let rules cost.


def _check_actions(rule: HttpRule, fields: Fields) -> None:
    if rule.delegate is not None:
        for key in ("redirect", "route"):
            if key in fields:
                fields.complain(key, "beside 'delegate': what happens to requests is the delegate's matter")
        return
    actions = [key for key in ("redirect", "directResponse") if key in fields]
    for key in actions[1:]:
        fields.complain(key, f"beside '{actions[0]}': a route does one of them")
    for key in ("route", "fault", "rewrite") if actions else ():
        if key in fields and (key != "route" or rule.targets):
            fields.complain(key, f"beside '{actions[0]}': requests go nowhere")
    if rule.redirect is not None and rule.redirect.prefix is not None:
        for index, match in enumerate(rule.matches):
            if match.uri is not None and not isinstance(match.uri, Prefix | Present):
                fields.complain("match", "with a redirect's prefixRewrite every uri is matched by prefix", index, "uri")


def _check_authority(rule: HttpRule, fields: Fields) -> None:
    if rule.rewrite is not None and rule.rewrite.authority and rule.headers is not None and rule.headers.authority:
        fields.complain("headers", "the authority is set in 'rewrite' already", "request")


def _check_hosts(found: VirtualService, spec: Fields) -> None:
    for index, host in enumerate(found.hosts):
        if host == "*" and found.for_mesh:
            spec.complain("hosts", "'*' is for gateways: in the mesh, name what is meant", index)
    places: dict[str, int] = {}
    for index, host in enumerate(found.hosts):
        if places.setdefault(host, index) != index:
            spec.complain("hosts", f"'{host}' is given twice", index)
    for index, host in enumerate(found.hosts):
        for pattern in patterns_of(host):
            other = places.get(pattern, index) if pattern != host else index
            if other != index:
                spec.complain("hosts", f"'{host}' and '{pattern}' overlap", max(index, other))


def _check_exports(found: VirtualService, spec: Fields) -> None:
    own = [found.namespace if name == "." else name for name in found.export_to]
    for index, name in enumerate(own):
        if name in own[:index]:
            spec.complain("exportTo", f"'{found.export_to[index]}' is named already", index)
    if "*" in own and len(own) > 1:
        spec.complain("exportTo", "'*' is everybody: there is nobody to name beside it")


def _check_claims(found: VirtualService, spec: Fields) -> None:
    if not found.for_mesh:
        return
    for rule_index, rule in enumerate(found.http):
        for index, match in enumerate(rule.matches):
            for key, matches in (("headers", match.headers), ("withoutHeaders", match.without_headers)):
                for name in filter(CLAIMS.fullmatch, matches):
                    spec.complain("http", "claims are matched at gateways alone, not in the mesh", rule_index, "match", index, key, name)


def _check_delegation(found: VirtualService, spec: Fields, http: tuple[Fields, ...]) -> None:
    if not found.hosts:
        for key in ("gateways", "tls", "tcp"):
            if getattr(found, key):
                spec.complain(key, "a VirtualService without hosts is a delegate, which has 'http' alone")
    for index, rule in enumerate(found.http):
        if rule.delegate is None:
            if not (rule.targets or rule.redirect or rule.direct_response):
                http[index].complain(None, "a route, a redirect or a directResponse is required")
        elif not found.hosts:
            spec.complain("http", "a delegate can't delegate further", index, "delegate")


def _check_sni(found: VirtualService, spec: Fields) -> None:
    hosts = set(found.hosts)
    for rule_index, rule in enumerate(found.tls):
        for index, match in enumerate(rule.matches):
            for sni_index, sni in enumerate(match.sni_hosts):
                if hosts.isdisjoint(patterns_of(sni)):
                    message = f"'{sni}' is none of the VirtualService's hosts"
                    spec.complain("tls", message, rule_index, "match", index, "sniHosts", sni_index)


def covers(pattern: str, host: str) -> bool:
    """Whether ``host``, which may be a pattern itself, is part of ``pattern``: ``*``, ``*.suffix`` or a name. Both in lower case."""
    if pattern == "*" or pattern == host:
        return True
    return pattern.startswith("*") and host.removeprefix("*").endswith(pattern[1:])


def patterns_of(host: str) -> Iterator[str]:
    """All that cover ``host``: itself, the wildcards above it and ``*``."""
    yield host
    rest = host.removeprefix("*.")
    if rest == host:
        rest = rest.partition(".")[2]
        if rest:
            yield f"*.{rest}"
    while rest := rest.partition(".")[2]:
        yield f"*.{rest}"
    if host != "*":
        yield "*"


class HostIndex:
    """Hosts, which may be patterns, found by what covers them, or what they cover."""

    def __init__(self, hosts: Iterable[str]) -> None:
        self._covered: dict[str, list[str]] = {}
        self._hosts = dict.fromkeys(hosts)
        for host in self._hosts:
            for pattern in patterns_of(host):
                self._covered.setdefault(pattern, []).append(host)

    def covered_by(self, pattern: str) -> Sequence[str]:
        return self._covered.get(pattern, ())

    def meeting(self, host: str) -> Iterable[str]:
        """Those that have some name in common with ``host``."""
        covering = (pattern for pattern in patterns_of(host) if pattern in self._hosts)
        return dict.fromkeys((*self.covered_by(host), *covering))


def _find_host_mistake(host: str) -> str | None:
    if host == "*" or is_hostname(host) or is_wildcard(host):
        return None
    try:
        parse_ip(host)
    except InvalidAddress:
        return f"expected a hostname, *.hostname or an address, found '{host[:80]}'"
    return None


def _find_gateway_mistake(name: str) -> str | None:
    namespace, slash, gateway = name.partition("/")
    right = all(map(_LABEL.fullmatch, (namespace, gateway))) if slash else is_hostname(name)
    return None if right else f"expected 'mesh', or a Gateway as 'name' or 'namespace/name', found '{name[:80]}'"


def _find_export_mistake(name: str) -> str | None:
    return None if name in ("*", ".") or _LABEL.fullmatch(name) else f"expected '*', '.' or a namespace, found '{name[:80]}'"


def _find_namespace_mistake(name: str) -> str | None:
    return None if not name or _LABEL.fullmatch(name) else f"'{name[:80]}' is no name of a namespace"


def _find_key_mistake(name: str) -> str | None:
    if name in _PSEUDO_HEADERS or CLAIMS.fullmatch(name):
        return None
    if not is_token(name):
        return f"'{name[:80]}' is no name of a header"
    return None if name == name.lower() else f"names of headers are matched in lower case: '{name.lower()[:80]}'"


_HOST: Final = Text(_find_host_mistake, {"minLength": 1, "maxLength": 255})
_GATEWAY: Final = Text(_find_gateway_mistake, {"minLength": 1})
_EXPORT: Final = Text(_find_export_mistake, {"pattern": rf"^(\*|\.|{_LABEL.pattern})$"})
_NAMESPACE: Final = Text(_find_namespace_mistake, {"pattern": f"^({_LABEL.pattern})?$"})
_HEADER_KEY: Final = Text(_find_key_mistake)
_ANY: Final = Text(lambda text: None)

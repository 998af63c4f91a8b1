"""The mesh configuration: what holds for the mesh as a whole (Istio's MeshConfig), YAML under the key ``mesh`` of the ConfigMap ``istio``
in the root namespace.

A field that is not known is told of and passed over: the ConfigMap is often another program's too. One that is known and wrong makes the
whole of it wrong, and what was good before stays.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, TypeAlias, TypeVar

import msgspec

from mesh.kube.configmap import KubeConfigMap
from mesh.kube.documents import Chunk, MalformedDocument, parse_chunk
from mesh.kube.durations import read_duration
from mesh.kube.fields import Fields, Text, describe, did_you_mean
from mesh.kube.hostnames import is_hostname
from mesh.kube.objects import FieldPath, KubeObject, Layer, Origin, SourceProblem
from mesh.kube.routeactions import read_retry
from mesh.kube.trafficpolicy import (
    LocalitySettings,
    OutlierSettings,
    PoolSettings,
    read_keepalive,
    read_locality,
    read_outlier,
    read_pool,
)
from mesh.model.l7.destination import H2Upgrade, Keepalive
from mesh.model.l7.policy import ExtAuthzGrpc, ExtAuthzHttp
from mesh.model.l7.routing import Retry
from mesh.model.l7.waypoint import AccessLogging, PathNormalization, Tracing
from mesh.telemetry.operators import InvalidFormat, compile_format

NAME: Final = "istio"
KEY: Final = "mesh"
"""The ConfigMap in the root namespace, and its key."""
CONNECT_TIMEOUT: Final = 10.0
"""Seconds, where the mesh says nothing."""
SAMPLING: Final = 1.0
"""Percent of requests that are traced, likewise."""
MOST_OF_A_BODY: Final = 16 << 20
"""Bytes that an authorizer may want to see. A waypoint keeps them for every request that waits; Istio takes up to 4 GiB."""
MAX_ITEMS: Final = 1000
_T = TypeVar("_T")

_NORMALIZATIONS: Final = {
    "DEFAULT": PathNormalization.BASE,
    "NONE": PathNormalization.NONE,
    "BASE": PathNormalization.BASE,
    "MERGE_SLASHES": PathNormalization.MERGE_SLASHES,
    "DECODE_AND_MERGE_SLASHES": PathNormalization.DECODE_AND_MERGE_SLASHES,
}

Provider: TypeAlias = ExtAuthzHttp | ExtAuthzGrpc
"""``namespace`` empty: that of the one service with this hostname."""


@dataclass(frozen=True, slots=True)
class TracingProvider:
    """``path`` None: not by HTTP, and so not by us."""

    kind: str
    hostname: str
    port: int
    path: str | None


@dataclass(frozen=True, slots=True)
class MeshConfig:
    """What is not given is Istio's default, or None where it makes a difference. Times in seconds."""

    trust_domain_aliases: tuple[str, ...] = ()
    path_normalization: PathNormalization = PathNormalization.BASE
    access_log: AccessLogging = field(default_factory=AccessLogging)
    tracing: Tracing = field(default_factory=lambda: Tracing(percent=0.0))
    connect_timeout: float = CONNECT_TIMEOUT
    keepalive: Keepalive | None = None
    h2_upgrade: H2Upgrade = H2Upgrade.NO
    retry: Retry | None = None
    """Of requests whose route says nothing of retries. None: Istio's own default; without attempts: none."""
    pool: PoolSettings | None = None
    outlier: OutlierSettings | None = None
    locality: LocalitySettings = field(default_factory=LocalitySettings)
    providers: Mapping[str, Provider] = field(default_factory=dict)
    """External authorizers by name."""
    service_export_to: tuple[str, ...] = ("*",)
    virtual_service_export_to: tuple[str, ...] = ("*",)
    destination_rule_export_to: tuple[str, ...] = ("*",)
    registry_only: bool = False


DEFAULT: Final = MeshConfig()


@dataclass(frozen=True, slots=True)
class ReadMeshConfig:
    """``mistakes``: ``config`` is not for use. ``notices``: it is, and this part of it has no effect."""

    config: MeshConfig
    mistakes: tuple[SourceProblem, ...] = ()
    notices: tuple[SourceProblem, ...] = ()


def read_mesh_config(obj: KubeObject, config_map: KubeConfigMap) -> ReadMeshConfig:
    """Of the ConfigMap `NAME`, and the object that it was read from. Without the key it says nothing."""
    text = config_map.data.get(KEY)
    if text is None:
        return ReadMeshConfig(DEFAULT)
    line, there = obj.layers[-1].line_of(("data", KEY))
    try:
        documents = parse_chunk(Chunk(text, 0, 0))
    except MalformedDocument as exc:
        return ReadMeshConfig(DEFAULT, (obj.problem(("data", KEY), f"no YAML: line {exc.line}, column {exc.column}: {exc.message}"),))
    tree = documents[0] if documents else None
    if tree is None:
        return ReadMeshConfig(DEFAULT)
    if not isinstance(tree, dict) or len(documents) > 1:
        return ReadMeshConfig(DEFAULT, (obj.problem(("data", KEY), f"expected one mapping, found {describe(tree)}"),))
    # As if the text were a file, with the lines of a block that begins below its key.
    origin = obj.layers[-1].origin
    within = KubeObject("", "", "", "", tree, (Layer(Origin(origin.file, origin.document, line + 1 if there else 0), tree),))
    notices: list[SourceProblem] = []
    fields = _Lenient(within, notices=notices)
    config = _parse(fields)
    return ReadMeshConfig(config, tuple(map(_under_key, fields.problems)), tuple(map(_under_key, notices)))


def _under_key(problem: SourceProblem) -> SourceProblem:
    return SourceProblem(problem.file, problem.line, f"data.{KEY}: {problem.field}" if problem.field else f"data.{KEY}", problem.message)


class _Lenient(Fields):
    """Unknown fields are no mistakes here, for all readers of the mesh configuration; they are told of in ``notices``."""

    __slots__ = ("notices",)

    def __init__(
        self,
        obj: KubeObject,
        path: FieldPath = (),
        values: Mapping[str, object] | None = None,
        problems: list[SourceProblem] | None = None,
        *,
        notices: list[SourceProblem],
    ) -> None:
        super().__init__(obj, path, values, problems)
        self.notices = notices

    def refuse_unknown(self, *known: str, hints: Mapping[str, str] | None = None) -> None:
        for key in self:
            if key not in known:
                self.note(key, f"unknown field, it has no effect{did_you_mean(key, known) if len(known) < 20 else ''}")

    def note(self, key: str, message: str) -> None:
        self.notices.append(self._object.problem((*self._path, key), message))

    def _child(self, path: FieldPath, values: Mapping[str, object]) -> Fields:
        return _Lenient(self._object, path, values, self.problems, notices=self.notices)


def _note(fields: Fields, key: str, message: str) -> None:
    assert isinstance(fields, _Lenient)
    fields.note(key, message)


# Fields of Istio's that are not ours to act on, or that say here what a command line says: silence is right, they are no typos.
_OTHERS: Final = (
    "ca",
    "caCertificates",
    "certificates",
    "configSources",
    "defaultInboundHttpRetryPolicy",
    "disableEnvoyListenerLog",
    "discoverySelectors",
    "dnsRefreshRate",
    "enableAutoMtls",
    "enableEnvoyAccessLogService",
    "enablePrometheusMerge",
    "hboneIdleTimeout",
    "inboundClusterStatName",
    "inboundTrafficPolicy",
    "ingressClass",
    "ingressControllerMode",
    "ingressSelector",
    "ingressService",
    "meshMTLS",
    "outboundClusterStatName",
    "protocolDetectionTimeout",
    "proxyHttpPort",
    "proxyInboundListenPort",
    "proxyListenPort",
    "rootNamespace",
    "serviceEntryVisibility",
    "serviceScopeConfigs",
    "serviceSettings",
    "tlsDefaults",
    "trustDomain",
    "verifyCertificateAtClient",
    "zoneAwareLbSetting",
)


def _parse(mesh: _Lenient) -> MeshConfig:
    mesh.refuse_unknown(
        *_OTHERS,
        "accessLogEncoding",
        "accessLogFile",
        "accessLogFormat",
        "connectTimeout",
        "defaultConfig",
        "defaultDestinationRuleExportTo",
        "defaultHttpRetryPolicy",
        "defaultProviders",
        "defaultServiceExportTo",
        "defaultTrafficPolicy",
        "defaultVirtualServiceExportTo",
        "enableTracing",
        "extensionProviders",
        "h2UpgradePolicy",
        "localityLbSetting",
        "outboundTrafficPolicy",
        "pathNormalization",
        "tcpKeepalive",
        "trustDomainAliases",
    )
    ext_authz, tracers = _read_providers(mesh)
    traffic = mesh.mapping("defaultTrafficPolicy")
    return MeshConfig(
        trust_domain_aliases=tuple(dict.fromkeys(mesh.strings("trustDomainAliases", text=_TRUST_DOMAIN))),
        path_normalization=_read_normalization(mesh),
        access_log=_read_access_log(mesh),
        tracing=_read_tracing(mesh, tracers),
        connect_timeout=read_duration(mesh, "connectTimeout") or CONNECT_TIMEOUT,
        keepalive=_read(mesh, "tcpKeepalive", read_keepalive),
        h2_upgrade=H2Upgrade.UPGRADE if mesh.string("h2UpgradePolicy", choices=_UPGRADES) == "UPGRADE" else H2Upgrade.NO,
        retry=_read(mesh, "defaultHttpRetryPolicy", read_retry),
        pool=_read(traffic, "connectionPool", read_pool),
        outlier=_read(traffic, "outlierDetection", read_outlier),
        locality=_read(mesh, "localityLbSetting", read_locality) or LocalitySettings(),
        providers=ext_authz,
        service_export_to=_read_export_to(mesh, "defaultServiceExportTo"),
        virtual_service_export_to=_read_export_to(mesh, "defaultVirtualServiceExportTo"),
        destination_rule_export_to=_read_export_to(mesh, "defaultDestinationRuleExportTo"),
        registry_only=_read_registry_only(mesh),
    )


def _read(fields: Fields | None, key: str, reader: Callable[[Fields], _T]) -> _T | None:
    found = fields.mapping(key) if fields is not None else None
    return reader(found) if found is not None else None


def _read_normalization(mesh: Fields) -> PathNormalization:
    found = mesh.mapping("pathNormalization")
    if found is None:
        return PathNormalization.BASE
    found.refuse_unknown("normalization")
    return _NORMALIZATIONS[found.string("normalization", "DEFAULT", choices=tuple(_NORMALIZATIONS))]


def _read_registry_only(mesh: Fields) -> bool:
    found = mesh.mapping("outboundTrafficPolicy")
    if found is None:
        return False
    found.refuse_unknown("mode", "tls")
    return found.string("mode", "ALLOW_ANY", choices=("REGISTRY_ONLY", "ALLOW_ANY", "ALLOW_ANY_DYNAMIC_DNS")) == "REGISTRY_ONLY"


def _read_export_to(mesh: Fields, key: str) -> tuple[str, ...]:
    """Only everywhere and nowhere else can be a default."""
    return mesh.strings(key, text=_EXPORT) or ("*",)


# Telemetry


def _read_access_log(mesh: Fields) -> AccessLogging:
    """A waypoint logs unless the file is given as empty: that it does so by default is ours, not Istio's."""
    file = mesh.string("accessLogFile", "/dev/stdout")
    text = mesh.string("accessLogFormat")
    as_json = mesh.string("accessLogEncoding", "TEXT", choices=("TEXT", "JSON")) == "JSON"
    if file not in ("", "/dev/stdout"):
        _note(mesh, "accessLogFile", "waypoints write to their standard output, and to no file")
    if not as_json:
        _check_format(mesh, text)
        return AccessLogging(enabled=bool(file), format=text)
    return AccessLogging(enabled=bool(file), as_json=True, json=_read_log_keys(mesh, text) if text else ())


def _read_log_keys(mesh: Fields, text: str) -> tuple[tuple[str, str], ...]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as exc:
        mesh.complain("accessLogFormat", f"with accessLogEncoding JSON, expected a JSON object: {exc}")
        return ()
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        mesh.complain("accessLogFormat", "with accessLogEncoding JSON, expected a JSON object of texts")
        return ()
    for value in found.values():
        _check_format(mesh, value)
    return tuple(found.items())


def _check_format(mesh: Fields, text: str) -> None:
    """Here rather than where lines are written: whoever wrote it looks here."""
    try:
        warnings = compile_format(text).warnings
    except InvalidFormat as exc:
        mesh.complain("accessLogFormat", str(exc))
        return
    for warning in warnings:
        _note(mesh, "accessLogFormat", warning)


def _read_tracing(mesh: Fields, providers: Mapping[str, TracingProvider]) -> Tracing:
    enabled = mesh.boolean("enableTracing")
    sampling, tags, older = _read_proxy_tracing(mesh)
    chosen = _read_default_provider(mesh, providers)
    if older and chosen is None and enabled:
        _note(mesh, "defaultConfig", "waypoints send spans by OTLP over HTTP alone: name a provider in defaultProviders.tracing")
    if not enabled and chosen is None:
        return Tracing(percent=0.0, tags=tags)
    endpoint = f"http://{_bracketed(chosen.hostname)}:{chosen.port}{chosen.path}" if chosen is not None and chosen.path else ""
    return Tracing(endpoint=endpoint, percent=sampling, tags=tags)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _read_default_provider(mesh: Fields, providers: Mapping[str, TracingProvider]) -> TracingProvider | None:
    """Of several the first that there is."""
    defaults = mesh.mapping("defaultProviders")
    names = defaults.strings("tracing") if defaults is not None else ()
    for name in names:
        if name in providers:
            return providers[name]
        _note(mesh, "defaultProviders", f"there is no provider '{name}' that spans could be sent to by OTLP over HTTP")
    return None


def _read_proxy_tracing(mesh: Fields) -> tuple[float, tuple[tuple[str, str], ...], bool]:
    """``defaultConfig.tracing``: percentage, tags, and whether it names a collector. The rest of ``defaultConfig`` is about sidecars."""
    proxies = mesh.mapping("defaultConfig")
    tracing = proxies.mapping("tracing") if proxies is not None else None
    if tracing is None:
        return SAMPLING, (), False
    sampling = tracing.number("sampling", SAMPLING, low=0, high=100)
    tags: list[tuple[str, str]] = []
    found = tracing.mapping("customTags")
    for name in found or ():
        assert found is not None
        tag = found.mapping(name)
        literal = tag.mapping("literal") if tag is not None else None
        if literal is not None:
            tags.append((name, literal.string("value")))
        else:
            _note(found, name, "waypoints know literal tags alone")
    named = any(key in tracing for key in ("zipkin", "lightstep", "datadog", "stackdriver", "openCensusAgent"))
    return sampling, tuple(tags), named


# Providers

_AUTHORIZERS: Final = ("envoyExtAuthzHttp", "envoyExtAuthzGrpc")
_TRACERS: Final = ("opentelemetry", "zipkin")
_NOT_OURS: Final = (
    "lightstep",
    "datadog",
    "stackdriver",
    "opencensus",
    "skywalking",
    "prometheus",
    "envoyFileAccessLog",
    "envoyHttpAls",
    "envoyTcpAls",
    "envoyOtelAls",
    "sds",
)


def _read_providers(mesh: Fields) -> tuple[dict[str, Provider], dict[str, TracingProvider]]:
    authorizers: dict[str, Provider] = {}
    tracers: dict[str, TracingProvider] = {}
    seen: set[str] = set()
    for item in mesh.mappings("extensionProviders", most=MAX_ITEMS):
        item.refuse_unknown("name", *_AUTHORIZERS, *_TRACERS, *_NOT_OURS)
        name = item.string("name", required=True, text=_SOMETHING)
        if name in seen:
            item.complain("name", f"two providers have the name '{name}'")
        seen.add(name)
        if (http := item.mapping("envoyExtAuthzHttp")) is not None:
            authorizers[name] = _read_http_authorizer(http)
        elif (grpc := item.mapping("envoyExtAuthzGrpc")) is not None:
            authorizers[name] = _read_grpc_authorizer(grpc)
        elif (otel := item.mapping("opentelemetry")) is not None:
            tracer = _read_otel(otel)
            if tracer.path is None:
                _note(item, "opentelemetry", "without 'http' spans would go by gRPC, which waypoints do not")
            else:
                tracers[name] = tracer
        elif (zipkin := item.mapping("zipkin")) is not None:
            _read_service(zipkin)
            _note(item, "zipkin", "waypoints send spans by OTLP over HTTP, which Zipkin does not take")
    return authorizers, tracers


def _read_service(provider: Fields) -> tuple[str, str, int]:
    """Namespace (may be empty), hostname and port."""
    service = provider.string("service", required=True, text=_SERVICE)
    port = provider.integer("port", required=True, low=1, high=65535)
    namespace, _, hostname = service.rpartition("/")
    return namespace, hostname.lower(), port


def _read_http_authorizer(provider: Fields) -> ExtAuthzHttp:
    provider.refuse_unknown(
        "service",
        "port",
        "timeout",
        "pathPrefix",
        "failOpen",
        "clearRouteCache",
        "statusOnError",
        "includeHeadersInCheck",
        "includeRequestHeadersInCheck",
        "includeAdditionalHeadersInCheck",
        "includeRequestBodyInCheck",
        "headersToUpstreamOnAllow",
        "headersToDownstreamOnDeny",
        "headersToDownstreamOnAllow",
    )
    namespace, hostname, port = _read_service(provider)
    older = provider.strings("includeHeadersInCheck", text=_HEADER_PATTERN)
    size, partial, _ = _read_body(provider)
    defaults = ExtAuthzHttp(namespace, hostname, port)
    return msgspec.structs.replace(
        defaults,
        path_prefix=provider.string("pathPrefix", text=_PATH_PREFIX),
        timeout=read_duration(provider, "timeout") or defaults.timeout,
        fail_open=provider.boolean("failOpen"),
        status_on_error=_read_status(provider, defaults.status_on_error),
        include_request_headers=_lower(provider.strings("includeRequestHeadersInCheck", text=_HEADER_PATTERN) or older),
        additional_headers=tuple((name.lower(), value) for name, value in provider.string_map("includeAdditionalHeadersInCheck").items()),
        max_request_bytes=size,
        allow_partial_message=partial,
        headers_upstream_on_allow=_lower(provider.strings("headersToUpstreamOnAllow", text=_HEADER_PATTERN)),
        headers_downstream_on_deny=_lower(provider.strings("headersToDownstreamOnDeny", text=_HEADER_PATTERN)),
        headers_downstream_on_allow=_lower(provider.strings("headersToDownstreamOnAllow", text=_HEADER_PATTERN)),
    )


def _read_grpc_authorizer(provider: Fields) -> ExtAuthzGrpc:
    provider.refuse_unknown("service", "port", "timeout", "failOpen", "clearRouteCache", "statusOnError", "includeRequestBodyInCheck")
    namespace, hostname, port = _read_service(provider)
    size, partial, as_bytes = _read_body(provider)
    defaults = ExtAuthzGrpc(namespace, hostname, port)
    return msgspec.structs.replace(
        defaults,
        timeout=read_duration(provider, "timeout") or defaults.timeout,
        fail_open=provider.boolean("failOpen"),
        status_on_error=_read_status(provider, defaults.status_on_error),
        max_request_bytes=size,
        allow_partial_message=partial,
        pack_as_bytes=as_bytes,
    )


def _read_body(provider: Fields) -> tuple[int, bool, bool]:
    body = provider.mapping("includeRequestBodyInCheck")
    if body is None:
        return 0, False, False
    body.refuse_unknown("maxRequestBytes", "allowPartialMessage", "packAsBytes")
    size = body.integer("maxRequestBytes", required=True, low=1, high=MOST_OF_A_BODY)
    return size, body.boolean("allowPartialMessage"), body.boolean("packAsBytes")


def _read_status(provider: Fields, default: int) -> int:
    """A number, which Istio has in a text."""
    found = provider.number_or_string("statusOnError")
    if found is None or found == "":
        return default
    if not re.fullmatch("[1-5][0-9]{2}", str(found)):
        provider.complain("statusOnError", f"expected an HTTP status, found '{found}'")
        return default
    return int(found)


def _read_otel(provider: Fields) -> TracingProvider:
    _, hostname, port = _read_service(provider)
    http = provider.mapping("http")
    path = http.string("path", "/v1/traces", text=_PATH_PREFIX) if http is not None else None
    return TracingProvider("opentelemetry", hostname, port, path)


def _lower(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.lower() for name in names))


# Texts


def _find_service_mistake(text: str) -> str | None:
    namespace, slash, hostname = text.rpartition("/")
    if not is_hostname(hostname) or (slash and not re.fullmatch("[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", namespace)):
        return f"expected the hostname of a service, or 'namespace/hostname', found '{text}'"
    return None


def _find_pattern_mistake(text: str) -> str | None:
    if not re.fullmatch(r"(\*[!#$%&'+.^_`|~0-9A-Za-z-]+|[!#$%&'+.^_`|~0-9A-Za-z-]+\*?)", text):
        return f"expected the name of a header, or the beginning or end of one with a '*', found '{text}'"
    return None


_UPGRADES: Final = ("DO_NOT_UPGRADE", "UPGRADE")
_SOMETHING: Final = Text(lambda text: None if text else "is empty")
_SERVICE: Final = Text(_find_service_mistake)
_HEADER_PATTERN: Final = Text(_find_pattern_mistake)
_PATH_PREFIX: Final = Text(
    lambda path: None if path.startswith("/") or not path else f"expected a path that begins with '/', found '{path}'"
)
_EXPORT: Final = Text(lambda place: None if place in ("*", ".") else f"expected '*' or '.', found '{place}'")
_TRUST_DOMAIN: Final = Text(lambda name: None if re.fullmatch("[a-z0-9._-]+", name) else f"expected a trust domain, found '{name}'")

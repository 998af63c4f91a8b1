"""An Envoy in a waypoint's place, configured as Istio configures one: tunnels end, their HTTP is judged and routed, new tunnels are made.

It does what ours does by itself: checks tokens of one issuer and remembers those that proved good, applies policies by caller, method and
path, routes by prefix and header with Istio's retries, and writes a line of text, counters and histograms for every request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from mesh.model.address import SocketAddress, parse_ip
from mesh.model.identity import SpiffeId
from mesh.model.ports import INBOUND_HBONE, READINESS
from mesh.telemetry.operators import DEFAULT_TEXT_FORMAT
from mesh.testing.envoy import Config, client_config, hand_in, http_filter, internal_cluster, server_config, with_internal_listeners
from mesh.tls.bundle import CertificateBundle

VERSION: Final = "x-version"
"""The header that routes ask for."""

_TYPE: Final = "type.googleapis.com/envoy.extensions"
_PEER: Final = "io.istio.peer_principal"
"""What a tunnel's end tells the inner listener of its caller."""
_INNER: Final = "inner"
_ONWARD: Final = "onward"
_APPLICATION: Final = "application"
_REMEMBERED: Final = 1000
_RETRIES: Final = {
    "retry_on": "connect-failure,refused-stream,unavailable,cancelled,retriable-status-codes",
    "num_retries": 2,
    "retriable_status_codes": [503],
}


@dataclass(frozen=True, slots=True)
class Rule:
    """A path's prefix; routes ask for the value of the header `VERSION` as well, policies for a POST of the caller."""

    prefix: str
    version: str
    caller: SpiffeId


@dataclass(frozen=True, slots=True)
class Issuer:
    """Of tokens. ``jwks``: its keys, JSON."""

    name: str
    jwks: str


def waypoint_config(
    bundle: CertificateBundle, application: SocketAddress, routes: Sequence[Rule], policies: Sequence[Rule], issuer: Issuer
) -> Config:
    """What is not routed by any of ``routes`` is by the last, which asks for nothing; all go to one application in the mesh."""
    outer = server_config(
        [SocketAddress(parse_ip(ip), INBOUND_HBONE) for ip in ("0.0.0.0", "::")], bundle, callers="spiffe://cluster.local/"
    )
    anywhere = SocketAddress(parse_ip("127.0.0.1"), 0)
    onward = client_config(anywhere, bundle, SocketAddress(application.ip, INBOUND_HBONE), str(application))
    config = outer["static_resources"]
    for listener in config["listeners"]:
        hand_in(listener, _INNER, {_PEER: ("envoy.string", "%DOWNSTREAM_PEER_URI_SAN%")})
    (leaving,) = onward["static_resources"]["listeners"]
    del leaving["address"]
    inner = {"filter_chains": [{"filters": [{"name": "hcm", "typed_config": _manager(routes, policies, issuer)}]}]}
    config["listeners"] += [
        {**inner, "name": _INNER, "internal_listener": {}},
        {**leaving, "name": _ONWARD, "internal_listener": {}},
        _ready(),
    ]
    config["clusters"] = [internal_cluster(_INNER, _INNER), _application(), *onward["static_resources"]["clusters"]]
    return with_internal_listeners(outer)


def _manager(routes: Sequence[Rule], policies: Sequence[Rule], issuer: Issuer) -> Config:
    to = {"cluster": _APPLICATION, "timeout": "0s", "retry_policy": _RETRIES}
    matches = [{"prefix": rule.prefix, "headers": [{"name": VERSION, "string_match": {"exact": rule.version}}]} for rule in routes]
    hosts = {"name": "all", "domains": ["*"], "routes": [{"match": match, "route": to} for match in (*matches, {"prefix": "/"})]}
    file = {
        "@type": f"{_TYPE}.access_loggers.file.v3.FileAccessLog",
        "path": "/dev/stdout",
        "log_format": {"text_format_source": {"inline_string": DEFAULT_TEXT_FORMAT}},
    }
    return {
        "@type": f"{_TYPE}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": _INNER,
        "normalize_path": True,
        "server_name": "istio-envoy",
        "stream_idle_timeout": "0s",
        "access_log": [{"name": "file", "typed_config": file}, {"name": "envoy.access_loggers.stats", "typed_config": _metrics()}],
        "route_config": {"virtual_hosts": [hosts]},
        "http_filters": [
            _tokens(issuer),
            _rbac(policies),
            {"name": "router", "typed_config": {"@type": f"{_TYPE}.filters.http.router.v3.Router"}},
        ],
    }


def _metrics() -> Config:
    """Istio's of a request: how many, how long, how large, by who and what came of it."""
    tags = {"source": f"%FILTER_STATE({_PEER}:PLAIN)%", "code": "%RESPONSE_CODE%", "flags": "%RESPONSE_FLAGS%", "route": "%ROUTE_NAME%"}

    def stat(name: str) -> Config:
        return {"name": name, "tags": [{"name": tag, "value_format": value} for tag, value in tags.items()]}

    sizes = {"duration": "%DURATION%", "request_bytes": "%BYTES_RECEIVED%", "response_bytes": "%BYTES_SENT%"}
    histograms = [
        {"stat": stat(name), "unit": "Milliseconds" if name == "duration" else "Bytes", "value_format": value}
        for name, value in sizes.items()
    ]
    counters = [{"stat": stat("requests"), "value_fixed": 1}]
    return {
        "@type": f"{_TYPE}.access_loggers.stats.v3.Config",
        "stats_scope": {"prefix": "mesh"},
        "counters": counters,
        "histograms": histograms,
    }


def _tokens(issuer: Issuer) -> Config:
    provider = {
        "issuer": issuer.name,
        "local_jwks": {"inline_string": issuer.jwks},
        "jwt_cache_config": {"jwt_cache_size": _REMEMBERED},
        "payload_in_metadata": "payload",
    }
    rule = {
        "match": {"prefix": "/"},
        "requires": {"requires_any": {"requirements": [{"provider_name": issuer.name}, {"allow_missing": {}}]}},
    }
    return http_filter(
        "envoy.filters.http.jwt_authn", {"providers": {issuer.name: provider}, "rules": [rule]}, "jwt_authn.v3.JwtAuthentication"
    )


def _rbac(policies: Sequence[Rule]) -> Config:
    """A policy for each rule, as Istio makes them of an AuthorizationPolicy each."""

    def policy(rule: Rule) -> Config:
        path = {"url_path": {"path": {"prefix": rule.prefix}}}
        method = {"header": {"name": ":method", "string_match": {"exact": "POST"}}}
        caller = {"filter_state": {"key": _PEER, "string_match": {"exact": str(rule.caller)}}}
        return {"permissions": [{"and_rules": {"rules": [method, path]}}], "principals": [caller]}

    allowed = {f"ns[bench]-policy[policy-{number}]-rule[0]": policy(rule) for number, rule in enumerate(policies)}
    return http_filter("envoy.filters.http.rbac", {"rules": {"action": "ALLOW", "policies": allowed}}, "rbac.v3.RBAC")


def _application() -> Config:
    """It is spoken to as the client speaks."""
    options = {
        "@type": f"{_TYPE}.upstreams.http.v3.HttpProtocolOptions",
        "use_downstream_protocol_config": {"http_protocol_options": {}, "http2_protocol_options": {}},
    }
    cluster = internal_cluster(_APPLICATION, _ONWARD)
    return {**cluster, "typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": options}}


def _ready() -> Config:
    """Answers whoever asks whether it runs."""
    route = {"match": {"prefix": "/"}, "direct_response": {"status": 200}}
    manager = {
        "@type": f"{_TYPE}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "ready",
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
        "http_filters": [{"name": "router", "typed_config": {"@type": f"{_TYPE}.filters.http.router.v3.Router"}}],
    }
    address = {"socket_address": {"address": "::", "port_value": READINESS, "ipv4_compat": True}}
    return {"name": "ready", "address": address, "filter_chains": [{"filters": [{"name": "hcm", "typed_config": manager}]}]}

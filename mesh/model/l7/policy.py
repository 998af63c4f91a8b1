"""L7 policies that a waypoint enforces: who may do what (AuthorizationPolicy), and what a token must prove (RequestAuthentication).

A policy that could not be read whole is still a value: ``unreadable`` says why, and it denies (fail closed).
"""

from __future__ import annotations

from enum import Enum

import msgspec

from mesh.model.l7.matching import PathMatch, TextMatch
from mesh.model.l7.routing import Origin


class PolicyAction(Enum):
    CUSTOM = "custom"
    DENY = "deny"
    ALLOW = "allow"
    AUDIT = "audit"


class Attribute(Enum):
    """What a predicate looks at; the value says how the resource writes it."""

    PRINCIPAL = "source.principal"
    NAMESPACE = "source.namespace"
    SERVICE_ACCOUNT = "source.serviceAccount"
    TRUST_DOMAIN = "source.trustDomain"
    SOURCE_IP = "source.ip"
    REMOTE_IP = "remote.ip"
    DESTINATION_IP = "destination.ip"
    DESTINATION_PORT = "destination.port"
    SNI = "connection.sni"
    HOST = "request.host"
    METHOD = "request.method"
    PATH = "request.path"
    HEADER = "request.headers"
    AUTH_PRINCIPAL = "request.auth.principal"
    AUDIENCE = "request.auth.audiences"
    PRESENTER = "request.auth.presenter"
    CLAIM = "request.auth.claims"
    UNKNOWN = "unknown"
    """A key that we do not know. It restricts nothing in a DENY and matches nothing in an ALLOW: neither opens anything."""


class Predicate(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One attribute: ``negated`` inverts. True when any value hits. An attribute that is absent hits nothing, so a negated predicate on it
    is true. Which field holds the values depends on the attribute: ``texts`` for most, ``paths`` for PATH, ``cidrs`` for addresses,
    ``ports`` for DESTINATION_PORT; SERVICE_ACCOUNT has ``namespace/name`` in `Exact` texts. ``key``: the header's name (lower case), or
    the claim's path."""

    attribute: Attribute
    negated: bool = False
    key: tuple[str, ...] = ()
    texts: tuple[TextMatch, ...] = ()
    paths: tuple[PathMatch, ...] = ()
    cidrs: tuple[str, ...] = ()
    ports: tuple[int, ...] = ()


class PolicyRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """AND of three parts; within ``sources`` and ``operations`` OR of conjunctions; an empty part does not restrict."""

    sources: tuple[tuple[Predicate, ...], ...] = ()
    operations: tuple[tuple[Predicate, ...], ...] = ()
    conditions: tuple[Predicate, ...] = ()


class ExtAuthzHttp(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="http", omit_defaults=True):
    """An authorizer asked over HTTP: 200 allows, anything else is the answer. Header patterns are exact, ``prefix*`` or ``*suffix``."""

    namespace: str
    hostname: str
    port: int
    path_prefix: str = ""
    timeout: float = 600.0
    fail_open: bool = False
    status_on_error: int = 403
    include_request_headers: tuple[str, ...] = ()
    additional_headers: tuple[tuple[str, str], ...] = ()
    max_request_bytes: int = 0
    allow_partial_message: bool = False
    headers_upstream_on_allow: tuple[str, ...] = ()
    headers_downstream_on_deny: tuple[str, ...] = ()
    headers_downstream_on_allow: tuple[str, ...] = ()


class ExtAuthzGrpc(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="grpc", omit_defaults=True):
    """An authorizer asked by ``envoy.service.auth.v3.Authorization/Check``."""

    namespace: str
    hostname: str
    port: int
    timeout: float = 600.0
    fail_open: bool = False
    status_on_error: int = 403
    max_request_bytes: int = 0
    allow_partial_message: bool = False
    pack_as_bytes: bool = False


class AuthorizationPolicy(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """OR over ``rules``; none never matches. ``targets``: the services (``namespace/hostname``) it is for; empty: all of this waypoint.
    ``provider`` of a CUSTOM policy; None there: it is unknown, and what the rules match is denied."""

    origin: Origin
    action: PolicyAction
    targets: tuple[str, ...] = ()
    rules: tuple[PolicyRule, ...] = ()
    provider: ExtAuthzHttp | ExtAuthzGrpc | None = None
    provider_name: str = ""
    dry_run: bool = False
    unreadable: str = ""

    @property
    def key(self) -> str:
        return f"{self.origin.kind}/{self.origin.namespace}/{self.origin.name}"


class JwtHeader(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A header that may carry the token, after ``prefix`` (compared exactly, a trailing space included)."""

    name: str
    prefix: str = ""


class JwtRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Tokens of one issuer. ``jwks``: the key set, JSON; empty: ``jwks_uri`` is fetched by the waypoint. Locations all empty: the header
    ``Authorization: Bearer`` and the query parameter ``access_token``. ``audiences`` empty: any."""

    issuer: str
    audiences: tuple[str, ...] = ()
    jwks: str = ""
    jwks_uri: str = ""
    timeout: float = 5.0
    from_headers: tuple[JwtHeader, ...] = ()
    from_params: tuple[str, ...] = ()
    from_cookies: tuple[str, ...] = ()
    forward_token: bool = False
    payload_header: str = ""
    claim_headers: tuple[tuple[str, str], ...] = ()
    """Header name (lower case) and claim (``a.b`` for nested)."""
    space_delimited: tuple[str, ...] = ()


class RequestAuthentication(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """``targets`` as of AuthorizationPolicy."""

    origin: Origin
    targets: tuple[str, ...] = ()
    rules: tuple[JwtRule, ...] = ()
    unreadable: str = ""

    @property
    def key(self) -> str:
        return f"{self.origin.kind}/{self.origin.namespace}/{self.origin.name}"

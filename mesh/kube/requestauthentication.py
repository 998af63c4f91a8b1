"""RequestAuthentication as Istio's API defines it: which tokens are believed, where they stand and what becomes of them. Read strictly,
for the same reason as other policies."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from mesh.kube.durations import read_duration
from mesh.kube.fields import Fields, Text
from mesh.kube.objects import KubeObject, SourceProblem
from mesh.kube.targets import Audience, TargetRef, read_attachment

MAX_RULES: Final = 4096
"""As Istio's schema."""
MAX_JWKS: Final = 1 << 20
"""Characters of a key set; what an API server would take as a whole object."""
MAX_URL: Final = 2048
FETCH_TIMEOUT: Final = 5.0
"""Seconds for fetching a key set, where none are given."""
_FIELDS: Final = (
    "issuer",
    "audiences",
    "jwksUri",
    "jwks_uri",
    "jwks",
    "fromHeaders",
    "fromParams",
    "fromCookies",
    "outputPayloadToHeader",
    "forwardOriginalToken",
    "outputClaimToHeaders",
    "timeout",
    "spaceDelimitedClaims",
)


@dataclass(frozen=True, slots=True)
class TokenHeader:
    """A header that may carry the token after ``prefix``."""

    name: str
    prefix: str


@dataclass(frozen=True, slots=True)
class ClaimHeader:
    header: str
    claim: str


@dataclass(frozen=True, slots=True)
class JwtRule:
    """Tokens of one issuer. Neither ``jwks`` nor ``jwks_uri``: the issuer's own discovery document says where its keys are."""

    issuer: str
    audiences: tuple[str, ...]
    jwks: str
    jwks_uri: str
    timeout: float
    from_headers: tuple[TokenHeader, ...]
    from_params: tuple[str, ...]
    from_cookies: tuple[str, ...]
    forward_token: bool
    payload_header: str
    claim_headers: tuple[ClaimHeader, ...]
    space_delimited: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RequestAuthentication:
    namespace: str
    name: str
    selector: Mapping[str, str] | None
    audience: Audience
    targets: tuple[TargetRef, ...]
    rules: tuple[JwtRule, ...]


def read_request_authentication(obj: KubeObject) -> tuple[RequestAuthentication, tuple[SourceProblem, ...]]:
    """The policy and every mistake in it."""
    fields = Fields(obj, strict=True)
    return parse_request_authentication(fields), tuple(fields.problems)


def parse_request_authentication(fields: Fields) -> RequestAuthentication:
    """``fields`` of the whole object, strict."""
    obj = fields.whole
    fields.refuse_unknown("apiVersion", "kind", "metadata", "spec", "status")
    spec = fields.mapping("spec") or Fields(obj, ("spec",), {}, fields.problems)
    spec.refuse_unknown("selector", "targetRef", "targetRefs", "jwtRules")
    attachment = read_attachment(spec)
    return RequestAuthentication(
        namespace=obj.namespace,
        name=obj.name,
        selector=attachment.selector,
        audience=attachment.audience,
        targets=attachment.targets,
        rules=tuple(_read_rule(rule) for rule in spec.mappings("jwtRules", most=MAX_RULES)),
    )


def _read_rule(rule: Fields) -> JwtRule:
    rule.refuse_unknown(*_FIELDS)
    uri = rule.string("jwksUri", text=_URL)
    older = rule.string("jwks_uri", text=_URL)
    jwks = rule.string("jwks", text=_JWKS)
    # No rules for API servers: comparing texts as long as a key set may be costs more than they let a definition cost.
    if jwks and (uri or older):
        rule.complain("jwks", "a rule takes jwks or jwksUri, not both")
    if uri and older:
        rule.complain("jwks_uri", "is the older spelling of jwksUri: give one of them")
    timeout = read_duration(rule, "timeout")
    return JwtRule(
        issuer=rule.string("issuer", required=True, text=_NOT_EMPTY),
        audiences=rule.strings("audiences", text=_NOT_EMPTY),
        jwks=jwks,
        jwks_uri=uri or older,
        timeout=FETCH_TIMEOUT if timeout is None else timeout,
        from_headers=tuple(_read_header(item) for item in rule.mappings("fromHeaders")),
        from_params=rule.strings("fromParams", text=_NOT_EMPTY),
        from_cookies=rule.strings("fromCookies", text=_NOT_EMPTY),
        forward_token=rule.boolean("forwardOriginalToken"),
        payload_header=rule.string("outputPayloadToHeader", text=_HEADER_OR_NONE),
        claim_headers=tuple(_read_claim(item) for item in rule.mappings("outputClaimToHeaders")),
        space_delimited=rule.strings("spaceDelimitedClaims", most=64, text=_NOT_EMPTY),
    )


def _read_header(item: Fields) -> TokenHeader:
    item.refuse_unknown("name", "prefix")
    return TokenHeader(item.string("name", required=True, text=_HEADER), item.string("prefix"))


def _read_claim(item: Fields) -> ClaimHeader:
    item.refuse_unknown("header", "claim")
    return ClaimHeader(item.string("header", required=True, text=_HEADER), item.string("claim", required=True, text=_NOT_EMPTY))


def _find_empty(text: str) -> str | None:
    return None if text else "is empty"


def _find_header_mistake(name: str) -> str | None:
    return None if _TOKEN.fullmatch(name) else f"expected the name of a header, found '{name}'"


def find_url_mistake(url: str) -> str | None:
    """What keeps a URL from being fetched, as far as it says itself: http or https, a host, no credentials in it."""
    if len(url) > MAX_URL:
        return f"has {len(url)} characters, of at most {MAX_URL}"
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as exc:
        return f"expected a URL, found '{url}': {exc}"
    if parts.scheme not in ("http", "https"):
        return f"expected a URL that begins with http:// or https://, found '{url}'"
    if not host or port == 0 or not _URL_CHARACTERS.fullmatch(url):
        return f"expected a URL, found '{url}'"
    return "a URL with credentials in it would be shown to everybody who reads the policy" if "@" in parts.netloc else None


def _find_jwks_mistake(text: str) -> str | None:
    if not text:
        return None
    if len(text) > MAX_JWKS:
        return f"has {len(text)} characters, of at most {MAX_JWKS}"
    return find_key_set_mistake(text)


def find_key_set_mistake(text: str | bytes) -> str | None:
    """Why this is no JSON Web Key Set, by its form. One without keys verifies nothing, and is one."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as exc:
        return f"expected a JSON Web Key Set: {exc}"
    keys = found.get("keys") if isinstance(found, dict) else None
    if not isinstance(keys, list):
        return "expected a JSON Web Key Set, an object with a list 'keys'"
    if not all(isinstance(key, dict) and isinstance(key.get("kty"), str) for key in keys):
        return "expected a JSON Web Key Set: each of its 'keys' is an object with a 'kty'"
    return None


_TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_URL_CHARACTERS: Final = re.compile(r"[!-~]+")
_NOT_EMPTY: Final = Text(_find_empty, {"minLength": 1})
_HEADER: Final = Text(_find_header_mistake, {"pattern": f"^{_TOKEN.pattern}$"})
_HEADER_OR_NONE: Final = Text(lambda name: _find_header_mistake(name) if name else None, {"pattern": f"^({_TOKEN.pattern})?$"})
_URL: Final = Text(lambda url: find_url_mistake(url) if url else None, {"maxLength": MAX_URL, "pattern": "^(https?://[!-~]+)?$"})
_JWKS: Final = Text(_find_jwks_mistake, {"maxLength": MAX_JWKS})

"""Tokens (JWT, RFC 7519) of requests: where they stand, whether they hold, what they prove, and what becomes of the request.

Statuses and texts are Envoy's, which clients see. Where it is stricter than Envoy: shared secrets (HS256 ...) and tokens that demand
extensions (``crit``) are refused, ``exp`` of 0 is long past, padding and a second spelling of the same bytes are no base64url, every value
of a parameter is looked at, a scheme stands at the beginning of its header. Verified tokens are taken out of cookies too, and the query,
where a token may be, is not told back in ``www-authenticate``. No token at all passes: whether one is needed is an AuthorizationPolicy's to
say. Pure: keys and the time are arguments.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, TypeAlias
from urllib.parse import unquote_to_bytes
from weakref import ref

import msgspec

from mesh.http.message import Headers, Request
from mesh.model.l7.policy import JwtHeader, JwtRule, RequestAuthentication
from waypoint_py.policy.facts import Json, TokenFacts
from waypoint_py.policy.keys import ALGORITHMS, InvalidKeySet, KeySet
from waypoint_py.verdict import LocalReply

MAX_TOKEN: Final = 16 * 1024
"""Bytes of a token; all headers of a request together have 60 KiB."""
MAX_TOKENS: Final = 16
"""Tokens of one request that are looked at; with more it is refused."""
MAX_REMEMBERED: Final = 1024
"""Verified tokens that are remembered with a key set: a signature costs 30 us and more to verify, a look-up nothing."""
MAX_REMEMBERED_TOKEN: Final = 4 * 1024
CLOCK_SKEW: Final = 60
"""Seconds by which clocks may differ (Envoy's)."""
SPACE_DELIMITED: Final = ("scope", "permission")
"""Claims that are lists, written as words (Istio's)."""

MALFORMED: Final = "Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections"
EXPIRED: Final = "Jwt is expired"
NOT_YET: Final = "Jwt not yet valid"
UNKNOWN_ISSUER: Final = "Jwt issuer is not configured"
WRONG_AUDIENCE: Final = "Audiences in Jwt are not allowed"
FORGED: Final = "Jwt verification fails"
NO_KEY: Final = "Jwks doesn't have key to match kid or alg from Jwt"
NO_KEYS: Final = "Jwks doesn't have any valid public key"
FETCH_FAILED: Final = "Jwks remote fetch is failed"


class KeysFailed:
    """A key set that could not be had, and why."""

    __slots__ = ("because",)

    def __init__(self, because: str) -> None:
        self.because = because


FindKeys: TypeAlias = Callable[[JwtRule], "KeySet | KeysFailed | None"]
"""The keys of a rule with ``jwks_uri``, as far as they are known; None: they have to be fetched first."""


def _never_fetched(rule: JwtRule) -> KeySet | KeysFailed | None:
    return KeysFailed("nothing fetches key sets here")


# Outcomes


@dataclass(slots=True)
class Changes:
    """What becomes of a request that passes. ``remove``: headers that only we may set, so that no client can pretend to a claim."""

    remove: tuple[bytes, ...] = ()
    places: list[tuple[_Place, bytes]] = field(default_factory=list)
    add: Headers = field(default_factory=list)

    def apply(self, request: Request) -> None:
        for place, name in self.places:
            place.remove(request, name)
        for name in self.remove:
            request.remove(name)
        request.headers += self.add


class Passed(NamedTuple):
    """``facts`` None: there was no token."""

    facts: TokenFacts | None
    changes: Changes


@dataclass(frozen=True, slots=True)
class Refused:
    """``unknown_keys``: rules whose key set, fetched before, has no such key: it may have been rotated."""

    reply: LocalReply
    unknown_keys: tuple[JwtRule, ...] = ()


@dataclass(frozen=True, slots=True)
class Wanted:
    """Keys are needed: fetch those of ``rule`` and ask again."""

    rule: JwtRule


Outcome: TypeAlias = Passed | Refused | Wanted


# Tokens


@dataclass(frozen=True, slots=True)
class Token:
    """A token taken apart; nothing is proven by it alone. Times in seconds, None where there is none."""

    text: bytes
    kid: str
    alg: str
    signed: bytes
    signature: bytes
    payload: bytes
    """base64url, as it came."""
    issuer: str
    subject: str
    audiences: tuple[str, ...]
    not_before: int | None
    expires: int | None
    claims: Mapping[str, Json]
    critical: bool
    """Its header demands extensions (``crit``), and we have none (RFC 7515 section 4.1.11)."""
    facts: dict[tuple[str, ...], TokenFacts] = field(default_factory=dict)

    def facts_of(self, rule: JwtRule) -> TokenFacts:
        facts = self.facts.get(rule.space_delimited)
        if facts is None:
            facts = self.facts[rule.space_delimited] = _facts(self, rule.space_delimited)
        return facts


def parse_token(text: bytes) -> Token | str:
    """The token, or what is wrong with it, in the order in which Envoy looks."""
    parts = text.split(b".")
    if len(text) > MAX_TOKEN or len(parts) != 3 or not all(parts):
        return MALFORMED
    if (raw := _decode(parts[0])) is None:
        return "Jwt header is an invalid Base64url encoded"
    if (header := _json_object(raw)) is None:
        return "Jwt header is an invalid JSON"
    alg, kid = header.get("alg"), header.get("kid", "")
    if not isinstance(alg, str):
        return "Jwt header [alg] field is required and must be a string"
    if alg not in ALGORITHMS:
        return "Jwt header [alg] is not supported"
    if not isinstance(kid, str):
        return "Jwt header [kid] field is not a string"
    if (raw := _decode(parts[1])) is None:
        return "Jwt payload is an invalid Base64url encoded"
    if (claims := _json_object(raw)) is None:
        return "Jwt payload is an invalid JSON"
    if (mistake := _find_mistake(claims)) is not None:
        return mistake
    if (signature := _decode(parts[2])) is None:
        return "Jwt signature is an invalid Base64url encoded"
    return Token(
        text=text,
        kid=kid,
        alg=alg,
        signed=text[: len(parts[0]) + 1 + len(parts[1])],
        signature=signature,
        payload=parts[1],
        issuer=_text(claims, "iss"),
        subject=_text(claims, "sub"),
        audiences=tuple(_list(claims.get("aud", ()))),
        not_before=_seconds(claims, "nbf"),
        expires=_seconds(claims, "exp"),
        claims=claims,
        critical="crit" in header,
    )


def _find_mistake(claims: Mapping[str, Json]) -> str | None:
    for name in ("iss", "sub"):
        if not isinstance(claims.get(name, ""), str):
            return f"Jwt payload [{name}] field is not a string"
    for name in ("iat", "nbf", "exp"):
        value = claims.get(name, 0)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return f"Jwt payload [{name}] field is not an integer"
        if not 0 <= value < 2**63:
            return f"Jwt payload [{name}] field is not a positive 64 bit integer"
    if not isinstance(claims.get("jti", ""), str):
        return "Jwt payload [jti] field is not a string"
    audiences = claims.get("aud", "")
    if not isinstance(audiences, str) and not (isinstance(audiences, list) and all(isinstance(each, str) for each in audiences)):
        return "Jwt payload [aud] field is not a string or string list"
    return None


_URL_SAFE: Final = bytes.maketrans(b"-_", b"+/")
_ALIEN: Final = frozenset(b"+/=")


# What the last character may be when it carries two or four bits (RFC 4648 section 3.5): a token has one spelling.
_LAST: Final = {2: frozenset(b"AQgw"), 3: frozenset(b"AEIMQUYcgkosw048")}


def _decode(part: bytes) -> bytes | None:
    """Unpadded base64url; None if it is not."""
    last = _LAST.get(len(part) % 4)
    if not _ALIEN.isdisjoint(part) or (last is not None and part[-1] not in last):
        return None
    try:
        return binascii.a2b_base64(part.translate(_URL_SAFE) + b"=" * (-len(part) % 4), strict_mode=True)
    except binascii.Error:
        return None


def _json_object(raw: bytes) -> dict[str, Json] | None:
    try:
        found = msgspec.json.decode(raw)
    except (msgspec.DecodeError, RecursionError, UnicodeError):
        return None
    return found if isinstance(found, dict) else None


def _text(claims: Mapping[str, Json], name: str) -> str:
    value = claims.get(name, "")
    return value if isinstance(value, str) else ""


def _list(value: object) -> Iterable[str]:
    if isinstance(value, str):
        return (value,)
    return [each for each in value if isinstance(each, str)] if isinstance(value, list) else ()


def _seconds(claims: Mapping[str, Json], name: str) -> int | None:
    value = claims.get(name)
    return int(value) if isinstance(value, int | float) else None


def _facts(token: Token, space_delimited: tuple[str, ...]) -> TokenFacts:
    claims = dict(token.claims)
    for name in (*SPACE_DELIMITED, *space_delimited):
        value = claims.get(name)
        if isinstance(value, str):
            claims[name] = list(value.split())
    presenter = claims.get("azp")
    return TokenFacts(token.issuer, token.subject, token.audiences, presenter if isinstance(presenter, str) else None, claims)


# Places


class _HeaderPlace:
    """A header, after a prefix."""

    def __init__(self, header: JwtHeader) -> None:
        self._name = header.name.lower().encode()
        self._prefix = header.prefix.encode()

    def find(self, request: Request) -> Iterable[tuple[bytes, bytes]]:
        """Tokens, each with the name by which it is removed."""
        name = self._name
        values = [value for key, value in request.headers if key == name]
        if not values:
            return ()
        if len(values) > 1 and name == b"authorization":
            values = [b",".join(values)]  # one credential a request (RFC 9110 section 11.6.2): two make one that is malformed
        return [(value[len(self._prefix) :].strip(b" "), name) for value in values if value.startswith(self._prefix)]

    def remove(self, request: Request, name: bytes) -> None:
        request.remove(name)


class _ParameterPlace:
    """A query parameter, every value of it."""

    def __init__(self, name: str) -> None:
        self._name = name.encode()

    def find(self, request: Request) -> Iterable[tuple[bytes, bytes]]:
        query = request.query
        if not query:
            return ()
        pairs = (pair.partition(b"=") for pair in query.split(b"&"))
        return [(unquote_to_bytes(value), self._name) for name, _, value in pairs if unquote_to_bytes(name) == self._name]

    def remove(self, request: Request, name: bytes) -> None:
        path, _, query = request.path.partition(b"?")
        kept = b"&".join(pair for pair in query.split(b"&") if unquote_to_bytes(pair.partition(b"=")[0]) != name)
        request.path = path + b"?" + kept if kept else path


class _CookiePlace:
    """A cookie."""

    def __init__(self, name: str) -> None:
        self._name = name.encode()

    def find(self, request: Request) -> Iterable[tuple[bytes, bytes]]:
        found = []
        for header, line in request.headers:
            if header == b"cookie":
                pairs = (pair.strip().partition(b"=") for pair in line.split(b";"))
                found += [(value.strip(b'"'), self._name) for name, _, value in pairs if name == self._name]
        return found

    def remove(self, request: Request, name: bytes) -> None:
        kept: Headers = []
        for header, line in request.headers:
            if header == b"cookie" and name in line:
                pairs = [pair.strip() for pair in line.split(b";")]
                line = b"; ".join(pair for pair in pairs if pair.partition(b"=")[0] != name)
                if not line:
                    continue
            kept.append((header, line))
        request.headers = kept


_Place: TypeAlias = _HeaderPlace | _ParameterPlace | _CookiePlace


def _places(rule: JwtRule) -> list[tuple[tuple[str, str, str], _Place]]:
    """Each with a key by which rules share it."""
    if not (rule.from_headers or rule.from_params or rule.from_cookies):
        rule = _DEFAULTS
    return [
        *((("header", header.name.lower(), header.prefix), _HeaderPlace(header)) for header in rule.from_headers),
        *((("parameter", name, ""), _ParameterPlace(name)) for name in rule.from_params),
        *((("cookie", name, ""), _CookiePlace(name)) for name in rule.from_cookies),
    ]


_DEFAULTS: Final = JwtRule("", from_headers=(JwtHeader("authorization", "Bearer "),), from_params=("access_token",))


# Decision


class _Found(NamedTuple):
    """A token at its place; ``verdicts`` by the number of each rule that the place is for: the token, if it is verified, or the status."""

    place: _Place
    name: bytes
    verdicts: dict[int, Token | str]


class _Accepted(NamedTuple):
    """A token that was the only one of its request, at a place that is for one rule: what was made of it by these keys, and is made of it
    again as long as it is timely and the rule has these."""

    rule: int
    token: Token
    keys: ref[KeySet]
    """They end when they are replaced, and all that they have verified with them, whether or not this token comes again."""
    passed: Passed


class TokenChecker:
    """The rules of one service, from all its RequestAuthentications."""

    def __init__(self, policies: Iterable[RequestAuthentication], find_keys: FindKeys = _never_fetched) -> None:
        policies = list(policies)
        self._broken = next((f"{policy.origin} could not be read: {policy.unreadable}" for policy in policies if policy.unreadable), "")
        self._rules = sorted((rule for policy in policies for rule in policy.rules), key=lambda rule: rule.issuer)
        self._inline = [_parse_inline(rule) for rule in self._rules]
        self._find_keys = find_keys
        shared: dict[tuple[str, str, str], tuple[_Place, list[int]]] = {}
        for index, rule in enumerate(self._rules):
            for key, place in _places(rule):
                shared.setdefault(key, (place, []))[1].append(index)
        self._places = tuple((place, tuple(dict.fromkeys(rules))) for place, rules in shared.values())
        self._guarded = tuple(dict.fromkeys(name for rule in self._rules for name in _set_by(rule)))
        self._accepted: dict[tuple[_Place, bytes], _Accepted] = {}

    @property
    def idle(self) -> bool:
        """There is nothing to check."""
        return not self._rules and not self._broken

    def check(self, request: Request, now: float) -> Outcome:
        """``now`` in seconds since 1970. The request is not changed: that is for `Changes.apply`."""
        if self._broken:
            return Refused(self._refuse(request, FORGED, self._broken))
        if _is_preflight(request):
            return Passed(None, Changes(self._guarded))
        present = [(place, rules, text, name) for place, rules in self._places for text, name in place.find(request)]
        if not present:
            return Passed(None, Changes(self._guarded))
        if len(present) == 1 and (passed := self._pass_again(present[0][0], present[0][2], int(now))) is not None:
            return passed
        if len(present) > MAX_TOKENS:
            return Refused(self._refuse(request, MALFORMED, f"more than {MAX_TOKENS} tokens"))
        tokens: list[_Found] = []
        unknown: list[JwtRule] = []
        for place, rules, text, name in present:
            verdicts: dict[int, Token | str] = {}
            for index in rules:
                verdict = self._verify(index, text, int(now))
                if isinstance(verdict, Wanted):
                    return verdict
                if verdict == NO_KEY and not self._rules[index].jwks:
                    unknown.append(self._rules[index])
                verdicts[index] = verdict
            tokens.append(_Found(place, name, verdicts))
        accepted = self._accept(tokens)
        if accepted is None:
            return Refused(self._refuse(request, *self._reason(tokens)), tuple(unknown))
        if len(tokens) == 1:
            self._remember(tokens[0], accepted)
        return accepted

    def _pass_again(self, place: _Place, text: bytes, now: int) -> Passed | None:
        """The outcome for a token that passed before, if nothing that could change it has changed."""
        accepted = self._accepted.get((place, text))
        if accepted is None:
            return None
        keys = self._inline[accepted.rule] or self._find_keys(self._rules[accepted.rule])
        if not isinstance(keys, KeySet) or keys is not accepted.keys():
            return None
        return accepted.passed if _find_untimely(accepted.token, now) is None else None

    def _remember(self, found: _Found, passed: Passed) -> None:
        if len(found.verdicts) != 1:
            return  # another rule may come to say something else of it
        ((index, token),) = found.verdicts.items()
        keys = self._inline[index] or self._find_keys(self._rules[index])
        if isinstance(token, Token) and isinstance(keys, KeySet) and token.text in keys.verified:
            if len(self._accepted) >= MAX_REMEMBERED:
                self._accepted.clear()
            self._accepted[found.place, token.text] = _Accepted(index, token, ref(keys), passed)

    def refuse_unfetched(self, request: Request, rule: JwtRule) -> LocalReply:
        """The keys of a rule could not be had."""
        return self._refuse(request, FETCH_FAILED, f"keys of {rule.issuer} from {rule.jwks_uri} could not be fetched")

    def _accept(self, tokens: Sequence[_Found]) -> Passed | None:
        """By the first rule that verifies a token of its own, if no token at one of its places is bad: the application might take that
        one for the one that was verified."""
        for index, rule in enumerate(self._rules):
            here = [found for found in tokens if index in found.verdicts]
            own = next((token for found in here if isinstance(token := found.verdicts[index], Token)), None)
            if own is not None and all(any(isinstance(each, Token) for each in found.verdicts.values()) for found in here):
                changes = Changes(self._guarded, [], _headers_of(rule, own))
                for found in here:
                    judge = index if isinstance(found.verdicts[index], Token) else _verified_by(found)
                    if not self._rules[judge].forward_token:
                        changes.places.append((found.place, found.name))
                return Passed(own.facts_of(rule), changes)
        return None

    def _verify(self, index: int, text: bytes, now: int) -> Token | str | Wanted:
        """The order is Envoy's: whose, when, for whom, by whose hand. Nothing costly is done for a token that is not for us."""
        rule = self._rules[index]
        keys = self._inline[index] or self._find_keys(rule)
        token: Token | str | object | None = keys.verified.get(text) if isinstance(keys, KeySet) else None
        remembered = isinstance(token, Token)
        if not isinstance(token, Token):
            token = parse_token(text)
            if isinstance(token, str):
                return token
        if token.issuer != rule.issuer:
            return UNKNOWN_ISSUER
        if (untimely := _find_untimely(token, now)) is not None:
            return untimely
        if rule.audiences and not _allows_audience(rule.audiences, token.audiences):
            return WRONG_AUDIENCE
        if remembered:
            return token
        if keys is None:
            return Wanted(rule)
        if isinstance(keys, KeysFailed):
            return NO_KEYS if rule.jwks else FETCH_FAILED
        return _verify_signature(token, keys)

    def _reason(self, tokens: Sequence[_Found]) -> tuple[str, str]:
        """The status that says most: a wrong issuer is what every rule says of the others' tokens."""
        status, issuer = UNKNOWN_ISSUER, ""
        for found in tokens:
            if any(isinstance(verdict, Token) for verdict in found.verdicts.values()):
                continue
            for index, verdict in found.verdicts.items():
                if isinstance(verdict, str) and verdict != UNKNOWN_ISSUER:
                    status, issuer = verdict, self._rules[index].issuer
        because = f"token of issuer {issuer!r} refused: {status}" if issuer else f"token refused: {status}"
        return status, because

    def _refuse(self, request: Request, status: str, because: str) -> LocalReply:
        challenge = b'Bearer realm="%b", error="invalid_token"' % _realm(request)
        return LocalReply(
            403 if status == WRONG_AUDIENCE else 401,
            status.encode(),
            [(b"www-authenticate", challenge)],
            details=f"jwt_authn_access_denied{{{status.replace(' ', '_')}}}",
            because=because,
        )


class TokenCheckers:
    """The RequestAuthentications of a waypoint, by the services they are for."""

    def __init__(self, policies: Iterable[RequestAuthentication], find_keys: FindKeys = _never_fetched) -> None:
        self._find_keys = find_keys
        self._everywhere: list[RequestAuthentication] = []
        self._by_target: dict[str, list[RequestAuthentication]] = {}
        for policy in policies:
            if not policy.targets:
                self._everywhere.append(policy)
            for target in dict.fromkeys(policy.targets):
                self._by_target.setdefault(target, []).append(policy)
        self._checkers: dict[str, TokenChecker] = {}
        self._default = TokenChecker(self._everywhere, find_keys)

    def checker_of(self, service: str) -> TokenChecker:
        """``service``: ``namespace/hostname``, empty for traffic to a workload."""
        targeted = self._by_target.get(service)
        if targeted is None:
            return self._default
        checker = self._checkers.get(service)
        if checker is None:
            checker = self._checkers[service] = TokenChecker([*self._everywhere, *targeted], self._find_keys)
        return checker


def _parse_inline(rule: JwtRule) -> KeySet | KeysFailed | None:
    if not rule.jwks:
        return None if rule.jwks_uri else KeysFailed("the rule has no keys")
    try:
        return KeySet.parse(rule.jwks)
    except InvalidKeySet as exc:
        return KeysFailed(str(exc))


def _find_untimely(token: Token, now: int) -> str | None:
    if token.not_before is not None and now + CLOCK_SKEW < token.not_before:
        return NOT_YET
    if token.expires is not None and now > token.expires + CLOCK_SKEW:
        return EXPIRED
    return None


def _allows_audience(allowed: Sequence[str], audiences: Sequence[str]) -> bool:
    # A trailing slash, and http for https, make no other audience: as Envoy, since identity providers differ in both.
    return not {_plain_audience(each) for each in audiences}.isdisjoint(map(_plain_audience, allowed))


def _plain_audience(audience: str) -> str:
    return audience.removeprefix("https://").removeprefix("http://").removesuffix("/")


def _verify_signature(token: Token, keys: KeySet) -> Token | str:
    verified = False if token.critical else keys.verify(token.kid, token.alg, token.signed, token.signature)
    if verified is None:
        return NO_KEY
    if not verified:
        return FORGED
    if len(token.text) <= MAX_REMEMBERED_TOKEN:
        if len(keys.verified) >= MAX_REMEMBERED:
            del keys.verified[next(iter(keys.verified))]
        keys.verified[token.text] = token
    return token


def _verified_by(found: _Found) -> int:
    return next(index for index, verdict in found.verdicts.items() if isinstance(verdict, Token))


def _is_preflight(request: Request) -> bool:
    """Browsers send no credentials with a CORS preflight. It reaches a policy all the same."""
    return request.method == b"OPTIONS" and bool(request.first(b"origin")) and bool(request.first(b"access-control-request-method"))


def _set_by(rule: JwtRule) -> Iterable[bytes]:
    names = [header for header, _ in rule.claim_headers]
    return [name.lower().encode() for name in (*([rule.payload_header] if rule.payload_header else ()), *names)]


def _headers_of(rule: JwtRule, token: Token) -> Headers:
    headers: Headers = []
    if rule.payload_header:
        headers.append((rule.payload_header.lower().encode(), token.payload))
    for header, claim in rule.claim_headers:
        value = _header_value(_find_nested(token.claims, claim.split(".")))
        if value:
            headers.append((header.lower().encode(), value))
    return headers


def _find_nested(claims: Mapping[str, Json], path: Sequence[str]) -> Json:
    found: Json | Mapping[str, Json] = claims
    for key in path:
        if not isinstance(found, Mapping):
            return None
        found = found.get(key)
    return found if not isinstance(found, Mapping) else dict(found)


def _header_value(claim: Json) -> bytes | None:
    """A claim as a header's value, lists and objects as base64 of their JSON; None for what cannot be one."""
    match claim:
        case None:
            return None
        case bool():
            return b"true" if claim else b"false"
        case int() | float():
            whole = int(claim)
            return b"%d" % whole if whole == claim else repr(claim).encode()
        case str():
            text = claim.encode("utf-8", "replace")
            return None if any(byte < 0x20 or byte == 0x7F for byte in text) else text.strip(b" ")
        case _:
            return base64.b64encode(msgspec.json.encode(claim))


_MAX_REALM_PATH: Final = 256


def _realm(request: Request) -> bytes:
    """``scheme://host/path`` without the query, where a token may stand; what would end the quotes is escaped."""
    text = b"%b://%b%b" % (request.scheme, request.authority, request.path_only[:_MAX_REALM_PATH])
    return b"".join(b"%c" % byte if 0x20 < byte < 0x7F and byte not in b'"\\' else b"%%%02X" % byte for byte in text)

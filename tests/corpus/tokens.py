"""Requests with tokens, and what becomes of them: for our own checker, and for Envoy's, which shall say the same."""

from __future__ import annotations

import base64
import json
import time
from dataclasses import dataclass
from typing import Any, Final

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from mesh.model.l7.policy import JwtHeader, JwtRule

NOW: Final = int(time.time())
RSA_KEY: Final = rsa.generate_private_key(public_exponent=65537, key_size=2048)
OTHER_RSA_KEY: Final = rsa.generate_private_key(public_exponent=65537, key_size=2048)
EC_KEY: Final = ec.generate_private_key(ec.SECP256R1())
EC384_KEY: Final = ec.generate_private_key(ec.SECP384R1())
EC521_KEY: Final = ec.generate_private_key(ec.SECP521R1())
ED_KEY: Final = ed25519.Ed25519PrivateKey.generate()


def jwk(key: Any, **more: object) -> dict[str, Any]:
    """The public half of a key; without ``kid`` or ``alg`` unless given."""
    kinds = ((rsa.RSAPrivateKey, RSAAlgorithm), (ec.EllipticCurvePrivateKey, ECAlgorithm), (ed25519.Ed25519PrivateKey, OKPAlgorithm))
    algorithm = next(algorithm for kind, algorithm in kinds if isinstance(key, kind))
    fields = json.loads(algorithm.to_jwk(key.public_key()))
    return {name: value for name, value in fields.items() if name != "key_ops"} | more


def key_set(*keys: object) -> str:
    return json.dumps({"keys": list(keys)})


KEYS: Final = key_set(
    jwk(RSA_KEY, kid="rsa"),
    jwk(EC_KEY, kid="ec", alg="ES256"),
    jwk(EC384_KEY, kid="ec384", alg="ES384"),
    jwk(EC521_KEY, kid="ec521", alg="ES512"),
    jwk(ED_KEY, kid="ed", alg="EdDSA"),
)


def sign(key: Any = RSA_KEY, alg: str = "RS256", headers: dict[str, Any] | None = None, **claims: Any) -> str:
    """A token of issuer ``a``, for an hour; a claim that is None is left out."""
    payload = {"iss": "a", "sub": "s", "exp": NOW + 3600, **claims}
    return jwt.encode({name: value for name, value in payload.items() if value is not None}, key, alg, headers=headers)


def unsigned(header: Any, payload: Any, signature: Any = b"x") -> str:
    """A token put together of parts: bytes as they are, text as base64url already, all else as JSON."""
    return ".".join(_part(part) for part in (header, payload, signature))


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    return base64.urlsafe_b64encode(part if isinstance(part, bytes) else json.dumps(part).encode()).rstrip(b"=").decode()


ONE: Final = (
    JwtRule(
        "a",
        audiences=("x", "y"),
        jwks=KEYS,
        payload_header="x-payload",
        claim_headers=(("x-sub", "sub"), ("x-nested", "n.m"), ("x-number", "num"), ("x-bool", "b"), ("x-list", "l")),
    ),
)
TWO: Final = (JwtRule("a", jwks=KEYS), JwtRule("b", audiences=("x",), jwks=KEYS))
PLACES: Final = (
    JwtRule(
        "a",
        jwks=KEYS,
        from_headers=(JwtHeader("x-jwt"), JwtHeader("x-pre", "Token ")),
        from_params=("token", "second"),
        from_cookies=("session",),
    ),
)
APART: Final = (
    JwtRule("a", jwks=KEYS, from_headers=(JwtHeader("x-a"),)),
    JwtRule("b", jwks=KEYS, from_headers=(JwtHeader("x-b"),), forward_token=True),
)
FORWARD: Final = (JwtRule("a", jwks=KEYS, forward_token=True),)
RULES: Final = {"one": ONE, "two": TWO, "places": PLACES, "apart": APART, "forward": FORWARD}


@dataclass(frozen=True)
class TokenCase:
    """``expected``: the body of the refusal, or "" for a request that passes; ``status`` of the refusal. ``envoy``: False where we refuse
    more, or keep more to ourselves, than Envoy."""

    name: str
    expected: str = ""
    rules: str = "one"
    headers: tuple[tuple[str, str], ...] = ()
    path: str = "/"
    method: str = "GET"
    status: int = 401
    envoy: bool = True


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


FORM: Final = "Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections"
ISSUER: Final = "Jwt issuer is not configured"
FAILS: Final = "Jwt verification fails"
NO_KEY: Final = "Jwks doesn't have key to match kid or alg from Jwt"
AUDIENCE: Final = "Audiences in Jwt are not allowed"
EXPIRED: Final = "Jwt is expired"
ALG: Final = "Jwt header [alg] is not supported"

_GOOD: Final = sign(aud="x", n={"m": "v"}, num=3, b=True, l=["q"], scope="r w")
_CLAIMS: Final = {"iss": "a", "aud": "x"}
_HEAD: Final = {"alg": "RS256"}
_PREFLIGHT: Final = (("origin", "http://o"), ("access-control-request-method", "GET"))
# Known to whoever fetches the key set: with an HMAC of it a token would be anybody's.
_PUBLIC_AS_SECRET: Final = "k" * 64


def _malformed() -> list[TokenCase]:
    parts: list[tuple[str, Any, Any, str]] = [
        ("header JSON", b"{", _CLAIMS, "Jwt header is an invalid JSON"),
        ("header list", b"[]", _CLAIMS, "Jwt header is an invalid JSON"),
        ("no alg", {}, _CLAIMS, "Jwt header [alg] field is required and must be a string"),
        ("number alg", {"alg": 1}, _CLAIMS, "Jwt header [alg] field is required and must be a string"),
        ("unknown alg", {"alg": "XX"}, _CLAIMS, ALG),
        ("alg none", {"alg": "none"}, _CLAIMS, ALG),
        ("number kid", {"alg": "RS256", "kid": 1}, _CLAIMS, "Jwt header [kid] field is not a string"),
        ("payload base64", _HEAD, "!!", "Jwt payload is an invalid Base64url encoded"),
        ("header padding", "eyJhbGciOiJSUzI1NiJ9=", _CLAIMS, "Jwt header is an invalid Base64url encoded"),
        ("payload JSON", _HEAD, b"{", "Jwt payload is an invalid JSON"),
        ("payload list", _HEAD, b"[]", "Jwt payload is an invalid JSON"),
        ("payload not UTF-8", _HEAD, b'{"iss":"a","q":"\xff"}', "Jwt payload is an invalid JSON"),
        ("number iss", _HEAD, {**_CLAIMS, "iss": 1}, "Jwt payload [iss] field is not a string"),
        ("null iss", _HEAD, {**_CLAIMS, "iss": None}, "Jwt payload [iss] field is not a string"),
        ("number sub", _HEAD, {**_CLAIMS, "sub": 1}, "Jwt payload [sub] field is not a string"),
        ("text iat", _HEAD, {**_CLAIMS, "iat": "x"}, "Jwt payload [iat] field is not an integer"),
        ("text exp", _HEAD, {**_CLAIMS, "exp": "1"}, "Jwt payload [exp] field is not an integer"),
        ("null exp", _HEAD, {**_CLAIMS, "exp": None}, "Jwt payload [exp] field is not an integer"),
        ("boolean exp", _HEAD, {**_CLAIMS, "exp": True}, "Jwt payload [exp] field is not an integer"),
        ("negative exp", _HEAD, {**_CLAIMS, "exp": -1}, "Jwt payload [exp] field is not a positive 64 bit integer"),
        ("huge exp", _HEAD, {**_CLAIMS, "exp": 1e300}, "Jwt payload [exp] field is not a positive 64 bit integer"),
        ("negative nbf", _HEAD, {**_CLAIMS, "nbf": -3}, "Jwt payload [nbf] field is not a positive 64 bit integer"),
        ("text nbf", _HEAD, {**_CLAIMS, "nbf": "x"}, "Jwt payload [nbf] field is not an integer"),
        ("number jti", _HEAD, {**_CLAIMS, "jti": 1}, "Jwt payload [jti] field is not a string"),
        ("number aud", _HEAD, {**_CLAIMS, "aud": 1}, "Jwt payload [aud] field is not a string or string list"),
        ("null aud", _HEAD, {**_CLAIMS, "aud": None}, "Jwt payload [aud] field is not a string or string list"),
        ("list of numbers aud", _HEAD, {**_CLAIMS, "aud": [1]}, "Jwt payload [aud] field is not a string or string list"),
        ("nested too deep", _HEAD, b"[" * 5000, "Jwt payload is an invalid JSON"),
    ]
    return [TokenCase(name, expected, headers=bearer(unsigned(header, payload))) for name, header, payload, expected in parts]


CASES: Final = [
    TokenCase("no token"),
    TokenCase("good", headers=bearer(_GOOD)),
    TokenCase("good, kid", headers=bearer(sign(aud="x", headers={"kid": "rsa"}))),
    TokenCase("audience in a list", headers=bearer(sign(aud=["z", "y"]))),
    TokenCase("audience with a scheme and a slash", headers=bearer(sign(aud="https://x/"))),
    TokenCase("wrong audience", AUDIENCE, headers=bearer(sign(aud="z")), status=403),
    TokenCase("no audience", AUDIENCE, headers=bearer(sign()), status=403),
    TokenCase("expired", EXPIRED, headers=bearer(sign(aud="x", exp=NOW - 3600))),
    TokenCase("expired within the skew", headers=bearer(sign(aud="x", exp=NOW - 30))),
    TokenCase("expired beyond the skew", EXPIRED, headers=bearer(sign(aud="x", exp=NOW - 62))),
    TokenCase("expired and of a wrong audience", EXPIRED, headers=bearer(sign(aud="z", exp=5))),
    TokenCase("without exp", headers=bearer(sign(aud="x", exp=None))),
    TokenCase("exp 0", EXPIRED, headers=bearer(sign(aud="x", exp=0)), envoy=False),
    TokenCase("fraction of a second in exp", headers=bearer(sign(aud="x", exp=NOW + 100.5))),
    TokenCase("not yet", "Jwt not yet valid", headers=bearer(sign(aud="x", nbf=NOW + 600))),
    TokenCase("not yet, within the skew", headers=bearer(sign(aud="x", nbf=NOW + 30))),
    TokenCase("unknown issuer", ISSUER, headers=bearer(sign(iss="z", aud="x"))),
    TokenCase("unknown issuer, expired", ISSUER, headers=bearer(sign(iss="z", aud="x", exp=4))),
    TokenCase("no issuer", ISSUER, headers=bearer(sign(iss=None, aud="x"))),
    TokenCase("issuer in another case", ISSUER, headers=bearer(sign(iss="A", aud="x"))),
    TokenCase("forged", FAILS, headers=bearer(sign(OTHER_RSA_KEY, aud="x"))),
    TokenCase("forged with a kid", FAILS, headers=bearer(sign(OTHER_RSA_KEY, aud="x", headers={"kid": "rsa"}))),
    TokenCase("unknown kid", NO_KEY, headers=bearer(sign(aud="x", headers={"kid": "nope"}))),
    TokenCase("kid of another kind of key", NO_KEY, headers=bearer(sign(aud="x", headers={"kid": "ec"}))),
    *(TokenCase(alg, headers=bearer(sign(RSA_KEY, alg, aud="x"))) for alg in ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")),
    TokenCase("ES256", headers=bearer(sign(EC_KEY, "ES256", aud="x"))),
    TokenCase("ES384", headers=bearer(sign(EC384_KEY, "ES384", aud="x"))),
    TokenCase("ES512", headers=bearer(sign(EC521_KEY, "ES512", aud="x"))),
    TokenCase("EdDSA", headers=bearer(sign(ED_KEY, "EdDSA", aud="x"))),
    TokenCase("HS256", ALG, headers=bearer(sign(_PUBLIC_AS_SECRET, "HS256", aud="x")), envoy=False),
    TokenCase("demands an extension", FAILS, headers=bearer(sign(aud="x", headers={"crit": ["exp"]})), envoy=False),
    TokenCase(
        "payload padding",
        "Jwt payload is an invalid Base64url encoded",
        headers=bearer(unsigned(_HEAD, "eyJpc3MiOiJhIn0=")),
        envoy=False,
    ),
    TokenCase("two sections", FORM, headers=bearer("a.b")),
    TokenCase("four sections", FORM, headers=bearer(f"{_GOOD}.x")),
    TokenCase("garbage", FORM, headers=bearer("garbage")),
    TokenCase("empty signature", FORM, headers=bearer(unsigned(_HEAD, _CLAIMS, ""))),
    TokenCase("signature base64", "Jwt signature is an invalid Base64url encoded", headers=bearer(unsigned(_HEAD, _CLAIMS, "!!"))),
    TokenCase("no credential after the scheme", headers=(("authorization", "Bearer"),)),
    TokenCase("another scheme", headers=(("authorization", "Basic abc"),)),
    TokenCase("scheme in lower case", headers=(("authorization", f"bearer {_GOOD}"),)),
    TokenCase("two spaces after the scheme", headers=(("authorization", f"Bearer  {_GOOD}"),)),
    TokenCase("scheme after something else", headers=(("authorization", f"Foo Bearer {_GOOD}"),), envoy=False),
    TokenCase("something after the token", "Jwt signature is an invalid Base64url encoded", headers=bearer(f"{_GOOD} foo")),
    TokenCase("two credentials", FORM, headers=bearer(_GOOD) * 2),
    TokenCase("query", path=f"/p?a=1&access_token={_GOOD}&b=2"),
    TokenCase("query alone", path=f"/p?access_token={_GOOD}"),
    TokenCase("query, empty", FORM, path="/p?access_token="),
    TokenCase("query, twice, the second bad", FORM, path=f"/p?access_token={_GOOD}&access_token=bad", envoy=False),
    TokenCase("bad query beside a good header", FORM, path="/p?access_token=bad", headers=bearer(_GOOD)),
    TokenCase("good query beside a bad header", FORM, path=f"/p?access_token={_GOOD}", headers=bearer("bad")),
    TokenCase("expired query beside a good header", EXPIRED, path=f"/p?access_token={sign(aud='x', exp=3)}", headers=bearer(_GOOD)),
    TokenCase("good query beside an expired header", EXPIRED, path=f"/p?access_token={_GOOD}", headers=bearer(sign(aud="x", exp=3))),
    TokenCase("two good tokens", path=f"/p?access_token={_GOOD}", headers=bearer(_GOOD), envoy=False),  # removed in both places
    TokenCase("claims that a client made up", headers=(("x-sub", "evil"), ("x-payload", "evil"), ("x-nested", "evil"), ("x-list", "e"))),
    TokenCase("made up beside a token", headers=(*bearer(sign(aud="x")), ("x-sub", "evil"), ("x-nested", "evil"))),
    TokenCase("preflight with an expired token", method="OPTIONS", headers=(*_PREFLIGHT, *bearer(sign(aud="x", exp=3)))),
    TokenCase("preflight with made up claims", method="OPTIONS", headers=(*_PREFLIGHT, ("x-sub", "evil"))),
    TokenCase("preflight without origin", EXPIRED, method="OPTIONS", headers=(_PREFLIGHT[1], *bearer(sign(aud="x", exp=3)))),
    TokenCase("origin without preflight", EXPIRED, headers=(*_PREFLIGHT, *bearer(sign(aud="x", exp=3)))),
    TokenCase("realm", FORM, path="/a/b", headers=bearer("bad")),
    TokenCase("long realm", FORM, path="/a/" + "b" * 400, headers=bearer("bad")),
    *_malformed(),
    TokenCase("two rules: none", rules="two"),
    TokenCase("two rules: the first", rules="two", headers=bearer(sign())),
    TokenCase("two rules: the second", rules="two", headers=bearer(sign(iss="b", aud="x"))),
    TokenCase("two rules: neither", ISSUER, rules="two", headers=bearer(sign(iss="c"))),
    TokenCase("two rules: the first, expired", EXPIRED, rules="two", headers=bearer(sign(exp=2))),
    TokenCase("two rules: the second, expired", EXPIRED, rules="two", headers=bearer(sign(iss="b", aud="x", exp=2))),
    TokenCase("two rules: the second, wrong audience", AUDIENCE, rules="two", headers=bearer(sign(iss="b")), status=403),
    TokenCase("two rules: the second, forged", FAILS, rules="two", headers=bearer(sign(OTHER_RSA_KEY, iss="b", aud="x"))),
    TokenCase("two rules: garbage", FORM, rules="two", headers=bearer("zz")),
    TokenCase("two rules: a good and a bad one", FORM, rules="two", headers=bearer(sign()), path="/?access_token=zz"),
    TokenCase("two rules: one of each", rules="two", headers=bearer(sign()), path=f"/?access_token={sign(iss='b', aud='x')}"),
    TokenCase(
        "two rules: a good one, an expired one of the other",
        EXPIRED,
        rules="two",
        headers=bearer(sign()),
        path=f"/?access_token={sign(iss='b', aud='x', exp=2)}",
    ),
    TokenCase("header without prefix", rules="places", headers=(("x-jwt", sign()),)),
    TokenCase("header with prefix", rules="places", headers=(("x-pre", f"Token {sign()}"),)),
    TokenCase("header with another prefix", rules="places", headers=(("x-pre", f"Tok {sign()}"),)),
    TokenCase("parameter", rules="places", path=f"/?token={sign()}&x=1"),
    TokenCase("second parameter", rules="places", path=f"/?second={sign()}"),
    TokenCase("expired parameter", EXPIRED, rules="places", path=f"/?second={sign(exp=2)}"),
    TokenCase("cookie", rules="places", headers=(("cookie", f"a=b; session={sign()}; c=d"),), envoy=False),  # which leaves it there
    TokenCase("bad cookie", FORM, rules="places", headers=(("cookie", "a=b; session=zz"),)),
    TokenCase("other places than the defaults", rules="places", headers=bearer(sign(exp=2)), path=f"/?access_token={sign(exp=2)}"),
    TokenCase("apart: the first", rules="apart", headers=(("x-a", sign()),)),
    TokenCase("apart: forwarded", rules="apart", headers=(("x-b", sign(iss="b")),)),
    TokenCase("apart: in the other's place", ISSUER, rules="apart", headers=(("x-a", sign(iss="b")),)),
    TokenCase("apart: a good one, a bad one of the other", rules="apart", headers=(("x-a", sign()), ("x-b", sign(iss="b", exp=2)))),
    TokenCase("apart: a bad one, a good one of the other", rules="apart", headers=(("x-a", sign(exp=2)), ("x-b", sign(iss="b")))),
    TokenCase("forwarded", rules="forward", headers=bearer(sign()), path=f"/?access_token={sign()}"),
]

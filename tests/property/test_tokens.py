"""Tokens and key sets of strangers: nothing they send raises, and nothing but what was signed passes."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from mesh.http.message import Headers, Request
from mesh.model.l7.policy import JwtHeader, JwtRule, RequestAuthentication
from mesh.model.l7.routing import Origin
from tests.corpus.tokens import EC_KEY, ED_KEY, KEYS, NOW, jwk, key_set, sign
from waypoint_py.policy.keys import InvalidKeySet, KeySet
from waypoint_py.policy.tokens import KeysFailed, Passed, Refused, Token, TokenChecker, parse_token

GOOD = sign(ED_KEY, "EdDSA", headers={"kid": "ed"}).encode()
RULE = JwtRule(
    "a",
    jwks=KEYS,
    payload_header="x-payload",
    claim_headers=(("x-sub", "sub"), ("x-nested", "a.b")),
)


def checker(rule: JwtRule = RULE) -> TokenChecker:
    return TokenChecker([RequestAuthentication(Origin("RequestAuthentication", "ns", "jwt"), rules=(rule,))])


def request(token: bytes) -> Request:
    return Request(b"GET", b"http", b"h", b"/", [(b"authorization", b"Bearer " + token)])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def encoded(value: object) -> bytes:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=")


headers = st.fixed_dictionaries(
    {},
    optional={"alg": st.sampled_from(["RS256", "ES256", "EdDSA", "none", "HS256"]) | json_values, "kid": json_values, "crit": json_values},
)
payloads = st.fixed_dictionaries({}, optional=dict.fromkeys(("iss", "sub", "aud", "exp", "nbf", "iat", "jti", "a", "scope"), json_values))
shapes = st.builds(
    lambda header, payload, end: b".".join((encoded(header), encoded(payload), end)), headers, payloads, st.binary(max_size=9)
)


@given(st.binary(max_size=200) | shapes | st.lists(st.sampled_from([b"eyJ9", b"e30", b".", b"..", b"="]), max_size=8).map(b"".join))
@example(b"." * 20_000)
@example(encoded({"alg": "RS256"}) + b"." + base64.urlsafe_b64encode(b"[" * 9000).rstrip(b"=") + b".eA")
@example(encoded({"alg": "RS256"}) + b"." + base64.urlsafe_b64encode(b'{"iss":"\\ud800"}').rstrip(b"=") + b".eA")
def test_no_token_raises_and_none_that_was_not_signed_passes(token: bytes) -> None:
    assert isinstance(parse_token(token), Token | str)
    outcome = checker().check(request(token), NOW)
    assert isinstance(outcome, Refused)
    assert outcome.reply.status in (401, 403)


@given(st.integers(0, len(GOOD) - 1), st.integers(1, 255))
def test_a_token_with_a_byte_changed_does_not_pass(position: int, change: int) -> None:
    altered = bytearray(GOOD)
    altered[position] ^= change
    assert isinstance(checker().check(request(bytes(altered)), NOW), Refused)


def test_the_token_itself_does() -> None:
    assert isinstance(checker().check(request(GOOD), NOW), Passed)


@given(payloads)
def test_whatever_a_signed_token_claims_breaks_no_header(claims: dict[str, object]) -> None:
    """An issuer may let its users choose what a claim says."""
    claims = {**claims, "iss": "a"}
    import jwt

    try:
        token = jwt.encode(claims, ED_KEY, "EdDSA", headers={"kid": "ed"})
    except (TypeError, ValueError):
        return  # PyJWT signs no such claims
    asked = request(token.encode())
    outcome = checker().check(asked, NOW)
    if isinstance(outcome, Passed):
        outcome.changes.apply(asked)
        assert outcome.facts is not None
        _ = outcome.facts.principal, outcome.facts.find_claim(("scope",)), outcome.facts.find_claim(("a", "b"))
        for name, value in asked.headers:
            assert name in (b"x-payload", b"x-sub", b"x-nested")
            assert not set(value) & {0, 10, 13, 127}


_TOKENS = [
    GOOD,
    sign(ED_KEY, "EdDSA", headers={"kid": "ed"}, exp=int(NOW) + 100).encode(),
    sign(ED_KEY, "EdDSA", headers={"kid": "ed"}, nbf=int(NOW) + 100).encode(),
    sign(ED_KEY, "EdDSA", headers={"kid": "ed"}, iss="b").encode(),
    GOOD[:-4] + b"AAAA",
]
_FETCHED = [KeySet.parse(KEYS), KeySet.parse(KEYS), KeySet.parse(key_set(jwk(EC_KEY, kid="ed"))), None, KeysFailed("nobody answers")]
_RULES = [
    RULE,
    JwtRule("a", jwks_uri="https://first", from_headers=(JwtHeader("x-token", ""),), from_params=("token",), forward_token=True),
    JwtRule("a", jwks_uri="https://second", from_headers=(JwtHeader("x-token", ""),), claim_headers=(("x-sub", "sub"),)),
    JwtRule("b", jwks_uri="https://first", from_headers=(JwtHeader("x-token", ""),), audiences=("me",)),
]
_PLACES = ["x-token", "authorization", "param", "both"]
_TIMES = [NOW, NOW + 50, NOW + 1000]


@settings(max_examples=200)
@given(
    st.sampled_from([_RULES[:1], _RULES[1:2], _RULES[1:3], _RULES[1::2], _RULES]),
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=4, max_size=20),
)
@example(_RULES[1:2], [(1, 0), (3, 2)])
@example(_RULES[1:2], [(0, 1), (2, 2)])
@example(_RULES[1:3], [(1, 0), (4, 3)])
def test_what_is_remembered_of_a_token_is_what_would_be_found_of_it(rules: list[JwtRule], changes: list[tuple[int, int]]) -> None:
    """One thing changes from request to request: the token, its place, the time, and what is known of two key sets."""
    policy = RequestAuthentication(Origin("RequestAuthentication", "ns", "jwt"), rules=tuple(rules))
    choices: tuple[Sequence[Any], ...] = (_TOKENS, _PLACES, _TIMES, _FETCHED, _FETCHED)
    numbers = [0] * len(choices)

    def find(rule: JwtRule) -> KeySet | KeysFailed | None:
        return _FETCHED[numbers[3 if rule.jwks_uri == "https://first" else 4]]

    kept = TokenChecker([policy], find)
    for which, number in changes:
        numbers[which] = number % len(choices[which])
        token, place, now, *_ = (some[number] for some, number in zip(choices, numbers, strict=True))
        outcomes: list[object] = []
        for each in (kept, TokenChecker([policy], find)):
            named: Headers = [(b"x-payload", b"a lie"), (b"x-sub", b"another")]
            if place in ("authorization", "both"):
                named.append((b"authorization", b"Bearer " + token))
            if place in ("x-token", "both"):
                named.append((b"x-token", token))
            asked = Request(b"GET", b"http", b"h", b"/?token=" + token if place == "param" else b"/", named)
            outcome = each.check(asked, now)
            if isinstance(outcome, Passed):
                outcome.changes.apply(asked)
                outcomes.append((outcome.facts, asked.headers, asked.path))
            else:
                outcomes.append(outcome)
        assert outcomes[0] == outcomes[1]


keys = st.fixed_dictionaries(
    {},
    optional={
        "kty": st.sampled_from(["RSA", "EC", "OKP", "oct"]) | json_values,
        "crv": st.sampled_from(["P-256", "P-384", "P-521", "secp256k1", "Ed25519", "Ed448", "X25519"]) | json_values,
        "use": st.sampled_from(["sig", "enc"]) | json_values,
        "key_ops": st.just(["verify"]) | json_values,
        **{
            name: st.sampled_from(["AQAB", "A" * 43, "!", "\u00e9", ""]) | json_values
            for name in ("n", "e", "x", "y", "d", "kid", "alg", "k")
        },
    },
)


@given(
    st.binary(max_size=100)
    | json_values.map(lambda value: json.dumps(value).encode())
    | st.lists(keys, max_size=4).map(lambda found: json.dumps({"keys": found}).encode())
)
def test_no_key_set_does_anything_but_be_none(text: bytes) -> None:
    try:
        found = KeySet.parse(text)
    except InvalidKeySet:
        return
    for alg in ("RS256", "ES256", "ES384", "ES512", "EdDSA", "HS256", "none"):
        assert found.verify("", alg, b"text", b"signature") in (False, None)


@given(st.lists(keys, max_size=5), st.lists(keys, max_size=5))
def test_odd_keys_around_a_good_one_take_nothing_from_it(before: list[object], after: list[object]) -> None:
    found = KeySet.parse(key_set(*before, jwk(ED_KEY, kid="ed"), *after))
    token = parse_token(GOOD)
    assert isinstance(token, Token)
    assert found.verify("ed", "EdDSA", token.signed, token.signature) is True


cookies = st.lists(st.sampled_from([b"a=b", b"session=T", b'session="T"', b" session=T", b"sessions=T", b"session", b"="]), max_size=5).map(
    b";".join
)
queries = st.lists(st.sampled_from([b"a=b", b"token=T", b"%74oken=T", b"tokens=T", b"token", b"", b"=T"]), max_size=5).map(b"&".join)


@given(st.lists(cookies, max_size=3), queries)
def test_no_copy_of_a_token_that_counted_is_left_in_its_places(lines: list[bytes], query: bytes) -> None:
    rule = JwtRule("a", jwks=KEYS, from_cookies=("session",), from_params=("token",))
    found: Headers = [(b"cookie", line.replace(b"T", GOOD)) for line in lines]
    asked = Request(b"GET", b"http", b"h", b"/?" + query.replace(b"T", GOOD), found)
    outcome = checker(rule).check(asked, NOW)
    if isinstance(outcome, Passed) and outcome.facts is not None:
        outcome.changes.apply(asked)
        again = checker(rule).check(asked, NOW)
        assert isinstance(again, Passed)
        assert again.facts is None

"""RequestAuthentication: where tokens are, what is said of bad ones, and what becomes of a request with a good one."""

from __future__ import annotations

import gc
import json
from typing import Any
from weakref import ref

import pytest

from mesh.http.message import Request
from mesh.model.l7.policy import JwtHeader, JwtRule, RequestAuthentication
from mesh.model.l7.routing import Origin
from tests.corpus.tokens import (
    CASES,
    EC_KEY,
    ED_KEY,
    KEYS,
    NOW,
    OTHER_RSA_KEY,
    RSA_KEY,
    RULES,
    TokenCase,
    bearer,
    jwk,
    key_set,
    sign,
)
from waypoint_py.policy.keys import MAX_KEYS, InvalidKeySet, KeySet
from waypoint_py.policy.tokens import (
    FETCH_FAILED,
    MAX_REMEMBERED,
    MAX_TOKENS,
    NO_KEY,
    KeysFailed,
    Passed,
    Refused,
    TokenChecker,
    TokenCheckers,
    Wanted,
)

NAME = Origin("RequestAuthentication", "shop", "jwt")


def checker(*rules: JwtRule, **more: Any) -> TokenChecker:
    return TokenChecker([RequestAuthentication(NAME, rules=rules)], **more)


def request(headers: tuple[tuple[str, str], ...] = (), path: str = "/", method: str = "GET") -> Request:
    pairs = [(name.encode(), value.encode()) for name, value in headers]
    return Request(method.encode(), b"http", b"h.example", path.encode(), pairs)


def passed(rules: TokenChecker, asked: Request, now: float = NOW) -> Passed:
    outcome = rules.check(asked, now)
    assert isinstance(outcome, Passed), outcome
    outcome.changes.apply(asked)
    return outcome


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_token_is_taken_or_refused_in_envoys_words(case: TokenCase) -> None:
    outcome = checker(*RULES[case.rules]).check(request(case.headers, case.path, case.method), NOW)
    if not case.expected:
        assert isinstance(outcome, Passed)
        return
    assert isinstance(outcome, Refused)
    reply = outcome.reply
    assert (reply.body.decode(), reply.status) == (case.expected, case.status)
    assert reply.details == f"jwt_authn_access_denied{{{case.expected.replace(' ', '_')}}}"
    realm = f"http://h.example{case.path.partition('?')[0][:256]}"
    assert reply.headers == [(b"www-authenticate", f'Bearer realm="{realm}", error="invalid_token"'.encode())]


def test_a_good_token_gives_its_facts_and_leaves_the_request() -> None:
    claims = {"n": {"m": "v"}, "num": 3, "b": True, "l": ["q"], "scope": "r w", "azp": "app", "roles": "x y"}
    asked = request((*bearer(sign(aud=["x", "z"], **claims)), ("x-sub", "evil"), ("x-else", "kept")), "/p?a=1")
    facts = passed(checker(*RULES["one"]), asked).facts
    assert facts is not None
    assert (facts.issuer, facts.subject, facts.principal) == ("a", "s", "a/s")
    assert (facts.audiences, facts.presenter) == (("x", "z"), "app")
    assert (facts.find_claim(("scope",)), facts.find_claim(("roles",)), facts.find_claim(("n", "m"))) == (["r", "w"], "x y", "v")
    headers = dict(asked.headers)
    assert b"authorization" not in headers
    assert json.loads(_unpadded(headers.pop(b"x-payload")))["sub"] == "s"
    assert headers == {
        b"x-else": b"kept",
        b"x-sub": b"s",
        b"x-nested": b"v",
        b"x-number": b"3",
        b"x-bool": b"true",
        b"x-list": b"WyJxIl0=",
    }


def _unpadded(value: bytes) -> bytes:
    import base64

    assert not value.endswith(b"=")
    return base64.urlsafe_b64decode(value + b"=" * (-len(value) % 4))


def test_headers_that_only_we_set_go_even_when_there_is_no_token() -> None:
    asked = request((("x-sub", "evil"), ("x-payload", "evil"), ("x-nested", "evil"), ("x-else", "kept")))
    assert passed(checker(*RULES["one"]), asked).facts is None
    assert asked.headers == [(b"x-else", b"kept")]


def test_a_claim_that_is_no_header_value_is_not_made_one() -> None:
    asked = request((*bearer(sign(aud="x", sub="a\r\nx-admin: yes")), ("x-sub", "evil")))
    passed(checker(*RULES["one"]), asked)
    assert b"x-sub" not in dict(asked.headers)


def test_words_of_a_rules_own_claims_are_listed() -> None:
    rule = JwtRule("a", jwks=KEYS, space_delimited=("roles",))
    facts = passed(checker(rule), request(bearer(sign(roles="x y")))).facts
    assert facts is not None
    assert facts.find_claim(("roles",)) == ["x", "y"]


@pytest.mark.parametrize(
    ("headers", "path", "headers_after", "path_after"),
    [
        ((("x-jwt", "T"), ("a", "b")), "/?q", [(b"a", b"b")], "/?q"),
        ((("x-pre", "Token T"),), "/", [], "/"),
        ((), "/p?a=%20+b&token=T&c&d=", [], "/p?a=%20+b&c&d="),
        ((), "/p?token=T", [], "/p"),
        ((), "/p?to%6ben=T&x", [], "/p?x"),
        ((("cookie", "a=b; session=T; c=d"),), "/", [(b"cookie", b"a=b; c=d")], "/"),
        ((("cookie", 'session="T"'), ("cookie", "c=d")), "/", [(b"cookie", b"c=d")], "/"),
    ],
)
def test_a_token_is_taken_out_of_its_place_and_nothing_else_is(
    headers: tuple[tuple[str, str], ...], path: str, headers_after: list[tuple[bytes, bytes]], path_after: str
) -> None:
    token = sign()
    asked = request(
        tuple((name, value.replace("T", token) if value != "Token T" else f"Token {token}") for name, value in headers),
        path.replace("=T", f"={token}"),
    )
    assert passed(checker(*RULES["places"]), asked).facts is not None
    assert (asked.headers, asked.path.decode()) == (headers_after, path_after)


def test_a_forwarded_token_stays_everywhere() -> None:
    token = sign()
    asked = request(bearer(token), f"/?access_token={token}")
    passed(checker(*RULES["forward"]), asked)
    assert (asked.headers, asked.path) == ([(b"authorization", f"Bearer {token}".encode())], f"/?access_token={token}".encode())


def test_of_two_issuers_tokens_the_first_rules_counts_and_both_are_removed() -> None:
    asked = request(bearer(sign()), f"/?access_token={sign(iss='b', aud='x', sub='other')}")
    facts = passed(checker(*RULES["two"]), asked).facts
    assert facts is not None
    assert (facts.issuer, asked.headers, asked.path) == ("a", [], b"/")


def test_rules_of_one_issuer_in_several_policies_are_alternatives() -> None:
    other = RequestAuthentication(Origin("RequestAuthentication", "shop", "b"), rules=(JwtRule("a", audiences=("z",), jwks=KEYS),))
    both = TokenChecker([RequestAuthentication(NAME, rules=(JwtRule("a", audiences=("x",), jwks=KEYS),)), other])
    assert isinstance(both.check(request(bearer(sign(aud="z"))), NOW), Passed)
    assert isinstance(both.check(request(bearer(sign(aud="x"))), NOW), Passed)
    assert isinstance(both.check(request(bearer(sign(aud="q"))), NOW), Refused)


def test_policies_are_for_the_services_they_name_or_for_all() -> None:
    everywhere = RequestAuthentication(NAME, rules=(JwtRule("a", jwks=KEYS),))
    there = RequestAuthentication(NAME, targets=("shop/a",), rules=(JwtRule("b", jwks=KEYS),))
    checkers = TokenCheckers([everywhere, there])
    asked = request(bearer(sign(iss="b")))
    assert isinstance(checkers.checker_of("shop/a").check(asked, NOW), Passed)
    assert isinstance(checkers.checker_of("shop/b").check(asked, NOW), Refused)
    assert TokenCheckers([there]).checker_of("shop/b").idle


def test_a_policy_that_could_not_be_read_refuses_all() -> None:
    outcome = TokenChecker([RequestAuthentication(NAME, unreadable="spec.jwtRules[0]: no issuer")]).check(request(), NOW)
    assert isinstance(outcome, Refused)
    assert (outcome.reply.status, "spec.jwtRules[0]: no issuer" in outcome.reply.because) == (401, True)


@pytest.mark.parametrize("jwks", ["", "{", "[]", '{"keys":[]}', '{"keys":[{"kty":"oct","k":"AAAA"}]}'])
def test_keys_that_are_none_refuse_every_token_and_no_request_without(jwks: str) -> None:
    rule = checker(JwtRule("a", jwks=jwks))
    assert isinstance(rule.check(request(bearer(sign())), NOW), Refused)
    assert isinstance(rule.check(request(bearer(sign(exp=1))), NOW), Refused)
    assert isinstance(rule.check(request(), NOW), Passed)


def test_more_tokens_than_anybody_needs_are_refused() -> None:
    asked = request(path="/?" + "&".join(["access_token=x"] * (MAX_TOKENS + 1)))
    assert isinstance(checker(*RULES["one"]).check(asked, NOW), Refused)


def test_what_ends_the_realms_quotes_is_escaped() -> None:
    outcome = checker(*RULES["one"]).check(request(bearer("bad"), '/a"b\\\x01'), NOW)
    assert isinstance(outcome, Refused)
    assert outcome.reply.headers[0][1] == b'Bearer realm="http://h.example/a%22b%5C%01", error="invalid_token"'


# Keys


def test_a_key_is_for_its_algorithm_alone() -> None:
    rule = checker(JwtRule("a", jwks=key_set(jwk(RSA_KEY, alg="RS512"))))
    assert isinstance(rule.check(request(bearer(sign(alg="RS512"))), NOW), Passed)
    outcome = rule.check(request(bearer(sign(alg="RS256"))), NOW)
    assert isinstance(outcome, Refused)
    assert outcome.reply.body == NO_KEY.encode()


def test_without_kid_every_key_is_tried() -> None:
    rule = checker(JwtRule("a", jwks=key_set(jwk(OTHER_RSA_KEY, kid="1"), jwk(EC_KEY), jwk(RSA_KEY, kid="2"))))
    assert isinstance(rule.check(request(bearer(sign())), NOW), Passed)


def test_an_odd_key_does_not_take_the_others_with_it() -> None:
    weak = {"kty": "RSA", "n": "AQAB", "e": "AQAB"}
    odd: list[object] = [
        None,
        [],
        {},
        {"kty": "oct", "k": "AAAA"},
        {"kty": "EC", "crv": "secp256k1", "x": "AA", "y": "AA"},
        {"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA"},
        {"kty": "EC", "crv": "P-256", "x": "A" * 43, "y": "A" * 43},
        {"kty": "RSA", "n": 5, "e": "AQAB"},
        {"kty": "RSA", "n": "A" * 100_000, "e": "AQAB"},
        {"kty": "RSA", "n": "\u00e9", "e": "AQAB"},
        weak,
        {"kty": "OKP", "crv": "X25519", "x": "A" * 43},
        jwk(RSA_KEY, use="enc"),
        jwk(RSA_KEY, key_ops=["sign"]),
        jwk(RSA_KEY, alg="HS256"),
    ]
    keys = KeySet.parse(key_set(*odd, jwk(ED_KEY, kid="good")))
    assert [key.kid for key in keys.keys] == ["good"]
    assert len(keys.skipped) == len(odd)


def test_a_private_key_in_a_set_is_used_as_a_public_one() -> None:
    from jwt.algorithms import RSAAlgorithm

    private = json.loads(RSAAlgorithm.to_jwk(RSA_KEY))
    del private["key_ops"]
    assert KeySet.parse(key_set(private)).verify("", "RS256", *_signed(sign())) is True


def _signed(token: str) -> tuple[bytes, bytes]:
    from waypoint_py.policy.tokens import Token, parse_token

    parsed = parse_token(token.encode())
    assert isinstance(parsed, Token)
    return parsed.signed, parsed.signature


def test_a_set_of_too_many_keys_is_none() -> None:
    with pytest.raises(InvalidKeySet, match="more than"):
        KeySet.parse(key_set(*[jwk(RSA_KEY)] * (MAX_KEYS + 1)))


# Fetched keys, and remembered tokens

REMOTE = JwtRule("a", jwks_uri="https://id/keys")


def test_keys_that_are_not_there_yet_are_wanted_only_for_a_token_that_needs_them() -> None:
    rule = checker(REMOTE, find_keys=lambda rule: None)
    assert rule.check(request(bearer(sign())), NOW) == Wanted(REMOTE)
    assert isinstance(rule.check(request(), NOW), Passed)
    for useless in (sign(iss="z"), sign(exp=1), "garbage"):
        assert isinstance(rule.check(request(bearer(useless)), NOW), Refused)


def test_keys_that_could_not_be_fetched_are_401() -> None:
    outcome = checker(REMOTE, find_keys=lambda rule: KeysFailed("no route")).check(request(bearer(sign())), NOW)
    assert isinstance(outcome, Refused)
    assert (outcome.reply.status, outcome.reply.body) == (401, FETCH_FAILED.encode())


def test_an_unknown_kid_of_fetched_keys_is_told() -> None:
    keys = KeySet.parse(KEYS)
    outcome = checker(REMOTE, find_keys=lambda rule: keys).check(request(bearer(sign(headers={"kid": "new"}))), NOW)
    assert isinstance(outcome, Refused)
    assert outcome.unknown_keys == (REMOTE,)
    inline = checker(JwtRule("a", jwks=KEYS)).check(request(bearer(sign(headers={"kid": "new"}))), NOW)
    assert isinstance(inline, Refused)
    assert inline.unknown_keys == ()


def test_a_remembered_token_expires_all_the_same() -> None:
    keys = KeySet.parse(KEYS)
    rule = checker(REMOTE, find_keys=lambda rule: keys)
    asked = request(bearer(sign(exp=NOW + 10)))
    assert isinstance(rule.check(asked, NOW), Passed)
    assert len(keys.verified) == 1
    assert isinstance(rule.check(asked, NOW + 69), Passed)
    assert isinstance(rule.check(asked, NOW + 71), Refused)


def test_a_remembered_token_is_forgotten_with_its_keys() -> None:
    sets = [KeySet.parse(KEYS)]
    rule = checker(REMOTE, find_keys=lambda rule: sets[-1])
    asked = request(bearer(sign()))
    assert isinstance(rule.check(asked, NOW), Passed)
    sets.append(KeySet.parse(key_set(jwk(OTHER_RSA_KEY))))
    assert isinstance(rule.check(asked, NOW), Refused)


def test_keys_that_were_replaced_are_not_kept_for_the_tokens_that_they_verified() -> None:
    sets = [KeySet.parse(KEYS)]
    rule = checker(REMOTE, find_keys=lambda rule: sets[-1])
    assert isinstance(rule.check(request(bearer(sign())), NOW), Passed)
    replaced = ref(sets[0])
    sets[0] = KeySet.parse(KEYS)
    gc.collect()
    assert replaced() is None
    assert isinstance(rule.check(request(bearer(sign())), NOW), Passed)


def test_a_remembered_token_is_still_not_for_another_audience() -> None:
    keys = KeySet.parse(KEYS)
    asked = request(bearer(sign(aud="x")))
    assert isinstance(checker(REMOTE, find_keys=lambda rule: keys).check(asked, NOW), Passed)
    choosy = JwtRule("a", audiences=("z",), jwks_uri="https://id/keys")
    assert isinstance(checker(choosy, find_keys=lambda rule: keys).check(asked, NOW), Refused)


def test_tokens_are_remembered_within_bounds_and_bad_ones_never() -> None:
    keys = KeySet.parse(key_set(jwk(ED_KEY)))
    rule = checker(REMOTE, find_keys=lambda rule: keys)
    for index in range(MAX_REMEMBERED + 5):
        assert isinstance(rule.check(request(bearer(sign(ED_KEY, "EdDSA", n=index))), NOW), Passed)
    rule.check(request(bearer(sign())), NOW)
    assert len(keys.verified) == MAX_REMEMBERED


def test_a_header_name_of_a_rule_may_be_in_any_case() -> None:
    rule = checker(JwtRule("a", jwks=KEYS, from_headers=(JwtHeader("X-Jwt"),), payload_header="X-Payload"))
    asked = request((("x-jwt", sign()), ("x-payload", "evil")))
    passed(rule, asked)
    assert [name for name, _ in asked.headers] == [b"x-payload"]
    assert dict(asked.headers)[b"x-payload"] != b"evil"

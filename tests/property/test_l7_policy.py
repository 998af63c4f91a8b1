"""AuthorizationPolicy at a waypoint: equal to a naive reading of its rules, and never more open for what is unknown or missing."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, replace

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from mesh.http.message import Request
from mesh.model.address import SocketAddress, parse_ip
from mesh.model.identity import SpiffeId
from mesh.model.l7.matching import Exact, PathKind, PathMatch, Prefix, Present, Suffix, TextMatch
from mesh.model.l7.policy import Attribute, AuthorizationPolicy, PolicyAction, PolicyRule, Predicate
from mesh.model.l7.routing import Origin
from waypoint_py.context import Connection
from waypoint_py.policy.authorize import Judge
from waypoint_py.policy.facts import TokenFacts
from waypoint_py.policy.predicates import HTTP_ONLY

A = Attribute

# Few values, so that policies and requests meet.
WORDS = ("a", "b", "ab", "ba")
words = st.sampled_from(WORDS)
texts: st.SearchStrategy[TextMatch] = st.one_of(
    st.builds(Exact, words, st.booleans()),
    st.builds(Prefix, words, st.booleans()),
    st.builds(Suffix, words, st.booleans()),
    st.just(Present(non_empty=True)),
)
path_values = st.lists(words | st.just("A"), max_size=3).map(lambda parts: "/" + "/".join(parts))
path_matches = st.builds(
    PathMatch,
    st.sampled_from([PathKind.EXACT, PathKind.PREFIX]),
    path_values,
    st.booleans(),
) | st.sampled_from(["/{*}", "/a/{**}", "/{**}/a", "/a/{*}/b"]).map(lambda value: PathMatch(PathKind.TEMPLATE, value))
ips = st.sampled_from(["10.0.0.1", "10.0.0.2", "10.1.0.1", "fd00::1"])
networks = st.sampled_from(["10.0.0.1", "10.0.0.0/24", "10.0.0.0/8", "fd00::/16", "::/0"])

TEXTUAL = (A.PRINCIPAL, A.NAMESPACE, A.TRUST_DOMAIN, A.SERVICE_ACCOUNT, A.HOST, A.METHOD, A.SNI, A.AUDIENCE, A.PRESENTER)
ADDRESSES = (A.SOURCE_IP, A.REMOTE_IP, A.DESTINATION_IP)


def _some(values: st.SearchStrategy[TextMatch]) -> st.SearchStrategy[tuple[TextMatch, ...]]:
    return st.lists(values, min_size=1, max_size=2).map(tuple)


predicates = st.one_of(
    st.builds(Predicate, st.sampled_from(TEXTUAL), negated=st.booleans(), texts=_some(texts)),
    st.builds(Predicate, st.just(A.HEADER), negated=st.booleans(), key=words.map(lambda name: (name,)), texts=_some(texts)),
    st.builds(Predicate, st.just(A.CLAIM), negated=st.booleans(), key=words.map(lambda name: (name,)), texts=_some(texts)),
    st.builds(Predicate, st.just(A.PATH), negated=st.booleans(), paths=st.lists(path_matches, min_size=1, max_size=2).map(tuple)),
    st.builds(Predicate, st.sampled_from(ADDRESSES), negated=st.booleans(), cidrs=st.lists(networks, min_size=1, max_size=2).map(tuple)),
    st.builds(Predicate, st.just(A.DESTINATION_PORT), negated=st.booleans(), ports=st.just((80,)) | st.just((81, 82))),
)
conjunctions = st.lists(predicates, min_size=1, max_size=3).map(tuple)
parts = st.lists(conjunctions, max_size=2).map(tuple)
rules = st.builds(PolicyRule, sources=parts, operations=parts, conditions=st.lists(predicates, max_size=2).map(tuple))


@dataclass(frozen=True)
class Case:
    """What is judged, in the words of the resource."""

    peer: SpiffeId
    source: str
    destination: str
    port: int
    host: str
    method: str
    path: str
    headers: tuple[tuple[str, str], ...]
    claims: TokenFacts | None

    @property
    def connection(self) -> Connection:
        destination = SocketAddress(parse_ip(self.destination), self.port)
        return Connection(self.peer, SocketAddress(parse_ip(self.source), 4000), destination, None, None, None)

    @property
    def request(self) -> Request:
        headers = [(name.encode(), value.encode()) for name, value in self.headers]
        return Request(self.method.encode(), b"http", self.host.encode(), self.path.encode(), headers)


tokens = st.none() | st.builds(
    TokenFacts,
    st.just("iss"),
    words,
    st.lists(words, max_size=2).map(tuple),
    st.none() | words,
    st.dictionaries(words, words | st.lists(words, max_size=2) | st.integers(), max_size=2),
)
cases = st.builds(
    Case,
    st.builds(SpiffeId, words, words, words),
    ips,
    ips,
    st.sampled_from([80, 81]),
    words | words.map(str.upper),
    words | words.map(str.upper),
    path_values,
    st.lists(st.tuples(words, words), max_size=3).map(tuple),
    tokens,
)


# The naive reading


def _text_hits(match: TextMatch, value: str) -> bool:
    if not isinstance(match, Present) and getattr(match, "ignore_case", False):
        match, value = msgspec.structs.replace(match, value=match.value.lower(), ignore_case=False), value.lower()
    match match:
        case Exact():
            return value == match.value
        case Prefix():
            return value[: len(match.value)] == match.value
        case Suffix():
            return len(value) >= len(match.value) and value[len(value) - len(match.value) :] == match.value
        case _:
            return value != ""


def _template_hits(template: list[str], path: list[str]) -> bool:
    if not template:
        return not path
    if template[0] == "{**}":
        return any(_template_hits(template[1:], path[count:]) for count in range(1, len(path) + 1))
    if not path:
        return False
    return (template[0] == path[0] or (template[0] == "{*}" and path[0] != "")) and _template_hits(template[1:], path[1:])


def _path_hits(match: PathMatch, path: str) -> bool:
    if match.ignore_case:
        match, path = PathMatch(match.kind, match.value.lower()), path.lower()
    match match.kind:
        case PathKind.EXACT:
            return path == match.value
        case PathKind.PREFIX:
            return path.startswith(match.value)
        case _:
            return _template_hits(match.value.split("/"), path.split("/"))


def _values(case: Case, predicate: Predicate) -> list[str]:
    """The attribute's values; none if it is absent."""
    match predicate.attribute:
        case A.PRINCIPAL:
            return [f"{case.peer.trust_domain}/ns/{case.peer.namespace}/sa/{case.peer.service_account}"]
        case A.NAMESPACE:
            return [case.peer.namespace]
        case A.TRUST_DOMAIN:
            return [case.peer.trust_domain]
        case A.SERVICE_ACCOUNT:
            return [f"{case.peer.namespace}/{case.peer.service_account}"]
        case A.HOST:
            return [case.host.lower()]
        case A.METHOD:
            return [case.method]
        case A.AUDIENCE:
            return list(case.claims.audiences) if case.claims else []
        case A.PRESENTER:
            return [case.claims.presenter] if case.claims and case.claims.presenter is not None else []
        case A.CLAIM:
            claim = case.claims.claims.get(predicate.key[0]) if case.claims else None
            return [each for each in (claim if isinstance(claim, list) else [claim]) if isinstance(each, str)]
        case _:
            return []


def _header_hits(case: Case, predicate: Predicate, action: PolicyAction) -> bool:
    found = [value for name, value in case.headers if name == predicate.key[0]]
    each = [any(_text_hits(match, value) for match in predicate.texts) for value in found]
    joined = bool(found) and any(_text_hits(match, ",".join(found)) for match in predicate.texts)
    in_doubt = (action is DENY) is not predicate.negated
    return joined or (any(each) if in_doubt else bool(each) and all(each))


def _predicate_is_true(case: Case, predicate: Predicate, action: PolicyAction) -> bool:
    match predicate.attribute:
        case A.HEADER:
            hit = _header_hits(case, predicate, action)
        case A.PATH:
            hit = any(_path_hits(match, case.path) for match in predicate.paths)
        case A.SOURCE_IP | A.REMOTE_IP:
            hit = any(ipaddress.ip_address(case.source) in ipaddress.ip_network(cidr) for cidr in predicate.cidrs)
        case A.DESTINATION_IP:
            hit = any(ipaddress.ip_address(case.destination) in ipaddress.ip_network(cidr) for cidr in predicate.cidrs)
        case A.DESTINATION_PORT:
            hit = case.port in predicate.ports
        case _:
            hit = any(_text_hits(match, value) for match in predicate.texts for value in _values(case, predicate))
    return hit is not predicate.negated


def _rule_is_true(case: Case, rule: PolicyRule, action: PolicyAction) -> bool:
    def part(conjunctions: tuple[tuple[Predicate, ...], ...]) -> bool:
        return not conjunctions or any(all(_predicate_is_true(case, each, action) for each in conjunction) for conjunction in conjunctions)

    return part(rule.sources) and part(rule.operations) and all(_predicate_is_true(case, each, action) for each in rule.conditions)


def policy(action: PolicyAction, *rules: PolicyRule, name: str = "p") -> AuthorizationPolicy:
    return AuthorizationPolicy(Origin("AuthorizationPolicy", "ns", name), action, (), rules)


def matches(action: PolicyAction, rule: PolicyRule, case: Case) -> bool:
    """Whether a policy of this one rule applies to the request."""
    judgement = Judge([policy(action, rule)]).judge(case.request, case.connection, case.claims)
    return (judgement.reply is None) is (action is PolicyAction.ALLOW)


def matches_connection(action: PolicyAction, rule: PolicyRule, case: Case) -> bool:
    judgement = Judge([policy(action, rule)]).judge_connection(case.connection)
    return (judgement.reply is None) is (action is PolicyAction.ALLOW)


ALLOW, DENY = PolicyAction.ALLOW, PolicyAction.DENY


@given(rules, cases)
def test_a_rule_is_true_when_a_naive_reading_says_so(rule: PolicyRule, case: Case) -> None:
    for action in (ALLOW, DENY):
        assert matches(action, rule, case) is _rule_is_true(case, rule, action)


@given(st.lists(rules, max_size=30), st.lists(rules, max_size=30), cases)
def test_many_rules_give_what_asking_each_in_turn_gives(denies: list[PolicyRule], allows: list[PolicyRule], case: Case) -> None:
    judgement = Judge([policy(DENY, *denies, name="d"), policy(ALLOW, *allows, name="a")]).judge(case.request, case.connection, case.claims)
    denied = next((index for index, rule in enumerate(denies) if _rule_is_true(case, rule, DENY)), None)
    allowed = next((index for index, rule in enumerate(allows) if _rule_is_true(case, rule, ALLOW)), None)
    allowed_by = "" if allowed is None else f"ns[ns]-policy[a]-rule[{allowed}]"
    expected = allowed_by if denied is None else f"ns[ns]-policy[d]-rule[{denied}]"
    assert judgement.policy == expected
    assert (judgement.reply is None) is (denied is None and allowed is not None)


NEVER = PolicyRule(conditions=(Predicate(A.METHOD, texts=(Exact("never"),)),))


@given(rules, cases)
def test_a_rule_among_many_is_found_as_it_is_alone(rule: PolicyRule, case: Case) -> None:
    crowd = [NEVER] * 10
    for action in (ALLOW, DENY):
        judgement = Judge([policy(action, *crowd, rule)]).judge(case.request, case.connection, case.claims)
        assert (judgement.policy == "ns[ns]-policy[p]-rule[10]") is _rule_is_true(case, rule, action)


@given(rules, cases)
def test_a_connection_is_never_judged_more_openly_than_a_request_in_it(rule: PolicyRule, case: Case) -> None:
    if matches(DENY, rule, case):
        assert matches_connection(DENY, rule, case)
    if matches_connection(ALLOW, rule, case):
        assert matches(ALLOW, rule, case)


def _with_unknown(rule: PolicyRule, position: int) -> PolicyRule:
    """The rule, one of its predicates replaced by one of an attribute that nobody knows."""
    count = -1

    def swap(predicate: Predicate) -> Predicate:
        nonlocal count
        count += 1
        return replace_attribute(predicate) if count == position else predicate

    def replace_attribute(predicate: Predicate) -> Predicate:
        return Predicate(A.UNKNOWN, predicate.negated, predicate.key, (Exact("x"),))

    def part(conjunctions: tuple[tuple[Predicate, ...], ...]) -> tuple[tuple[Predicate, ...], ...]:
        return tuple(tuple(map(swap, conjunction)) for conjunction in conjunctions)

    return PolicyRule(part(rule.sources), part(rule.operations), tuple(map(swap, rule.conditions)))


@given(rules, st.integers(0, 12), cases)
def test_what_is_not_understood_opens_nothing(rule: PolicyRule, position: int, case: Case) -> None:
    puzzling = _with_unknown(rule, position)
    if matches(DENY, rule, case):
        assert matches(DENY, puzzling, case)
    if matches(ALLOW, puzzling, case):
        assert matches(ALLOW, rule, case)


@given(rules, cases, st.sampled_from(["claims", "headers", "both"]))
def test_what_a_client_leaves_out_opens_nothing(rule: PolicyRule, case: Case, missing: str) -> None:
    """A client may drop its token and its headers. A policy that demands them lets less through then, one that forbids their absence
    denies more."""
    bare = replace(case, claims=None if missing != "headers" else case.claims, headers=() if missing != "claims" else case.headers)
    predicates = [*(each for part in (rule.sources, rule.operations) for conjunction in part for each in conjunction), *rule.conditions]
    droppable = [each for each in predicates if each.attribute in (A.HEADER, A.CLAIM, A.AUDIENCE, A.PRESENTER)]
    if not any(each.negated for each in droppable) and matches(ALLOW, rule, bare):
        assert matches(ALLOW, rule, case)
    if all(each.negated for each in droppable) and matches(DENY, rule, case):
        assert matches(DENY, rule, bare)


def test_every_attribute_that_needs_http_is_known_as_such() -> None:
    assert {A.HOST, A.METHOD, A.PATH, A.HEADER, A.AUTH_PRINCIPAL, A.AUDIENCE, A.PRESENTER, A.CLAIM} == HTTP_ONLY

"""Policy under arbitrary rules: evaluation says what the rules say, in any order, and nothing that went wrong opens a door."""

from __future__ import annotations

import random
from dataclasses import replace

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mesh.authz.evaluate import AppliedPolicies, Connection, Denial, Permit, authorize
from mesh.model.address import Cidr, IpAddress, SocketAddress, parse_cidr, parse_ip
from mesh.model.identity import SpiffeId
from mesh.model.policy import (
    Action,
    Clause,
    Exact,
    Match,
    Policy,
    Prefix,
    Presence,
    Rule,
    Scope,
    ServiceAccountMatch,
    StringMatch,
    Suffix,
)

# Few values, so that they meet.
NAMES = ["", "a", "b", "ab", "td/ns/a/sa/b", "td/ns/b/sa/a", "td/", "/sa/b"]
RANGES = [parse_cidr(text) for text in ("10.0.0.0/8", "10.0.0.1", "0.0.0.0/0", "fd00::/8", "::/0", "fd00::1", "192.0.2.0/31")]
IPS = st.sampled_from([parse_ip(text) for text in ("10.0.0.1", "10.1.0.1", "192.0.2.1", "192.0.2.2", "fd00::1", "::1")])
PORTS = st.sampled_from([80, 443])
LETTERS = st.sampled_from(["a", "b"])

strings = st.lists(
    st.one_of(*(st.sampled_from([kind(name) for name in NAMES]) for kind in (Exact, Prefix, Suffix)), st.just(Presence())), max_size=2
).map(tuple)
ranges = st.lists(st.sampled_from(RANGES), max_size=2).map(tuple)
ports = st.lists(PORTS, max_size=2).map(tuple)
accounts = st.lists(st.builds(ServiceAccountMatch, LETTERS, LETTERS), max_size=2).map(tuple)
# Most fields empty, as people write them; otherwise hardly any match would ever be true.
_FIELDS = {
    "namespaces": strings,
    "principals": strings,
    "source_ips": ranges,
    "destination_ips": ranges,
    "destination_ports": ports,
    "service_accounts": accounts,
}
matches = st.fixed_dictionaries({}, optional=_FIELDS | {f"not_{name}": values for name, values in _FIELDS.items()}).map(
    lambda fields: Match(**fields)
)
clauses = st.lists(matches, max_size=2).map(lambda found: Clause(tuple(found)))
rules = st.lists(clauses, max_size=2).map(lambda found: Rule(tuple(found)))
policies = st.lists(
    st.builds(
        Policy,
        name=st.sampled_from(["p", "q", "r", "s"]),
        namespace=st.just("default"),
        scope=st.just(Scope.NAMESPACE),
        action=st.sampled_from(Action),
        rules=st.lists(rules, max_size=2).map(tuple),
        dry_run=st.booleans(),
        unreadable=st.sampled_from([None, None, None, "bad CIDR"]),
    ),
    unique_by=lambda policy: policy.name,
    max_size=4,
).map(tuple)
connections = st.builds(
    Connection, IPS, st.one_of(st.none(), st.builds(SpiffeId, st.just("td"), LETTERS, LETTERS)), st.builds(SocketAddress, IPS, PORTS)
)
unresolved_keys = st.lists(st.sampled_from(["default/x", "default/y"]), unique=True, max_size=2).map(tuple)


@settings(deadline=None)
@given(policies, unresolved_keys, connections, st.randoms(use_true_random=False))
def test_the_verdict_does_not_depend_on_the_order_of_policies(
    applied: tuple[Policy, ...], unresolved: tuple[str, ...], connection: Connection, rng: random.Random
) -> None:
    shuffled = rng.sample(applied, len(applied))
    before = authorize(AppliedPolicies(applied, unresolved), connection)
    assert authorize(AppliedPolicies(tuple(shuffled), unresolved[::-1]), connection) == before


@settings(deadline=None)
@given(policies, connections)
def test_the_verdict_is_what_the_rules_say(applied: tuple[Policy, ...], connection: Connection) -> None:
    readable = tuple(policy for policy in applied if policy.unreadable is None)
    verdict = authorize(AppliedPolicies(readable), connection)
    assert isinstance(verdict, Permit) is permitted(readable, connection)


@settings(deadline=None)
@given(policies, unresolved_keys, connections)
def test_a_verdict_names_a_policy_and_rule_that_did_it(
    applied: tuple[Policy, ...], unresolved: tuple[str, ...], connection: Connection
) -> None:
    verdict = authorize(AppliedPolicies(applied, unresolved), connection)
    if verdict.rule is not None:
        (policy,) = (policy for policy in applied if policy.key == verdict.policy)
        assert policy.action is (Action.ALLOW if isinstance(verdict, Permit) else Action.DENY)
        assert not policy.dry_run
        assert rule_is_true(policy.rules[verdict.rule], connection)
    assert verdict.because
    assert verdict.connection is connection


@settings(deadline=None)
@given(policies, connections, st.data())
def test_a_policy_that_becomes_unreadable_lets_nobody_in(applied: tuple[Policy, ...], connection: Connection, data: st.DataObject) -> None:
    enforced = [policy for policy in applied if not policy.dry_run]
    assume(enforced)
    broken = data.draw(st.sampled_from(enforced))
    after = tuple(replace(policy, unreadable="broken") if policy is broken else policy for policy in applied)
    assert isinstance(authorize(AppliedPolicies(after), connection), Denial)


@settings(deadline=None)
@given(policies, connections, st.data())
def test_a_policy_that_is_named_and_missing_lets_nobody_in(
    applied: tuple[Policy, ...], connection: Connection, data: st.DataObject
) -> None:
    assume(applied)
    missing = data.draw(st.sampled_from(applied))
    after = AppliedPolicies(tuple(policy for policy in applied if policy is not missing), (missing.key,))
    assert isinstance(authorize(after, connection), Denial)


@settings(deadline=None)
@given(policies, connections)
def test_dry_run_policies_decide_nothing(applied: tuple[Policy, ...], connection: Connection) -> None:
    enforced = tuple(policy for policy in applied if not policy.dry_run)
    with_them = authorize(AppliedPolicies(applied), connection)
    without = authorize(AppliedPolicies(enforced), connection)
    assert replace(with_them, dry_run=()) == without


# What the rules say, written down once more: as ztunnel has it, with no thought of speed.


def permitted(readable: tuple[Policy, ...], connection: Connection) -> bool:
    enforced = [policy for policy in readable if not policy.dry_run]
    if any(policy_matches(policy, connection) for policy in enforced if policy.action is Action.DENY):
        return False
    allows = [policy for policy in enforced if policy.action is Action.ALLOW]
    return not allows or any(policy_matches(policy, connection) for policy in allows)


def policy_matches(policy: Policy, connection: Connection) -> bool:
    return any(rule_is_true(rule, connection) for rule in policy.rules)


def rule_is_true(rule: Rule, connection: Connection) -> bool:
    return all(not clause.matches or any(match_is_true(match, connection) for match in clause.matches) for clause in rule.clauses)


def match_is_true(match: Match, connection: Connection) -> bool:
    if match == Match():
        return False
    source = connection.source

    def string_hits(string: StringMatch, value: str) -> bool:
        match string:
            case Exact():
                return value == string.value
            case Prefix():
                return value.startswith(string.value)
            case Suffix():
                return value.endswith(string.value)
            case Presence():
                return value != ""

    def namespace_hits(string: StringMatch) -> bool:
        return string_hits(string, source.namespace if source is not None else "")

    def principal_hits(string: StringMatch) -> bool:
        return source is not None and string_hits(string, source.principal)

    def account_hits(account: ServiceAccountMatch) -> bool:
        return source is not None and (account.namespace, account.service_account) == (source.namespace, source.service_account)

    def contains(cidr: Cidr, ip: IpAddress) -> bool:
        return cidr.version == ip.version and ip in cidr

    hits = [
        ([namespace_hits(s) for s in match.namespaces], [namespace_hits(s) for s in match.not_namespaces]),
        ([principal_hits(s) for s in match.principals], [principal_hits(s) for s in match.not_principals]),
        ([account_hits(a) for a in match.service_accounts], [account_hits(a) for a in match.not_service_accounts]),
        ([contains(c, connection.source_ip) for c in match.source_ips], [contains(c, connection.source_ip) for c in match.not_source_ips]),
        (
            [contains(c, connection.destination.ip) for c in match.destination_ips],
            [contains(c, connection.destination.ip) for c in match.not_destination_ips],
        ),
        (
            [port == connection.destination.port for port in match.destination_ports],
            [port == connection.destination.port for port in match.not_destination_ports],
        ),
    ]
    return all((not positive or any(positive)) and not any(negative) for positive, negative in hits)

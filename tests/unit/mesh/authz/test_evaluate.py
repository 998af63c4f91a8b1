"""ztunnel's order of evaluation, and where we fail closed."""

from __future__ import annotations

from mesh.authz.evaluate import AppliedPolicies, Connection, Denial, DryRunVerdict, Permit, authorize, is_unchanged
from mesh.model.address import SocketAddress, parse_ip
from mesh.model.identity import SpiffeId
from mesh.model.policy import Action, Clause, Exact, Match, Policy, Presence, Rule, Scope

CLIENT = SpiffeId("cluster.local", "default", "client")


def connection(source: SpiffeId | None = CLIENT, port: int = 80) -> Connection:
    return Connection(parse_ip("10.0.0.1"), source, SocketAddress(parse_ip("10.0.0.2"), port))


def policy(name: str, action: Action, *matches: Match, dry_run: bool = False, unreadable: str | None = None) -> Policy:
    rules = tuple(Rule((Clause((match,)),)) for match in matches)
    return Policy(name, "default", Scope.NAMESPACE, action, rules, dry_run, unreadable)


HIT = Match(destination_ports=(80,))
MISS = Match(destination_ports=(81,))


def judge(*policies: Policy, unresolved: tuple[str, ...] = (), source: SpiffeId | None = CLIENT, port: int = 80) -> Permit | Denial:
    return authorize(AppliedPolicies(policies, unresolved), connection(source, port))


def test_without_policies_everything_is_permitted() -> None:
    assert judge() == Permit(connection(), "no allow policy applies")


def test_a_matching_deny_names_its_policy_and_rule() -> None:
    verdict = judge(policy("d", Action.DENY, MISS, HIT))
    assert verdict == Denial(connection(), "explicitly denied by: default/d", "default/d", 1)


def test_a_deny_that_does_not_match_does_nothing() -> None:
    assert isinstance(judge(policy("d", Action.DENY, MISS)), Permit)


def test_a_deny_without_rules_does_nothing() -> None:
    assert isinstance(judge(policy("d", Action.DENY)), Permit)


def test_an_allow_without_rules_refuses_everything() -> None:
    assert judge(policy("a", Action.ALLOW)) == Denial(connection(), "allow policies exist, but none allowed")


def test_a_matching_allow_names_its_policy_and_rule() -> None:
    verdict = judge(policy("a", Action.ALLOW, MISS), policy("b", Action.ALLOW, MISS, HIT))
    assert verdict == Permit(connection(), "allowed by: default/b", "default/b", 1)


def test_allow_policies_of_which_none_matches_refuse() -> None:
    assert judge(policy("a", Action.ALLOW, MISS)) == Denial(connection(), "allow policies exist, but none allowed")


def test_deny_goes_before_allow() -> None:
    verdict = judge(policy("a", Action.ALLOW, HIT), policy("d", Action.DENY, HIT))
    assert verdict == Denial(connection(), "explicitly denied by: default/d", "default/d", 0)


def test_strict_refuses_plaintext_and_lets_identities_in() -> None:
    strict = policy("istio_converted_static_strict", Action.DENY, Match(not_principals=(Presence(),)))
    assert isinstance(judge(strict), Permit)
    refused = judge(strict, source=None)
    assert refused.because == "explicitly denied by: default/istio_converted_static_strict"


def test_strict_with_a_permissive_port_lets_plaintext_in_there() -> None:
    exempt = Policy(
        "p",
        "default",
        Scope.WORKLOAD_SELECTOR,
        Action.DENY,
        (Rule((Clause((Match(not_principals=(Presence(),)),)), Clause((Match(not_destination_ports=(9000,)),)))),),
    )
    assert isinstance(judge(exempt, source=None, port=9000), Permit)
    assert isinstance(judge(exempt, source=None, port=80), Denial)


def test_a_named_policy_that_has_not_arrived_refuses() -> None:
    verdict = judge(policy("a", Action.ALLOW, HIT), unresolved=("default/late",))
    assert verdict == Denial(connection(), "policy default/late is named by the workload but has not arrived", "default/late")


def test_an_unreadable_policy_refuses_whatever_its_action() -> None:
    for action in Action:
        verdict = judge(policy("u", action, HIT, unreadable="rule 0: no such match kind"), policy("a", Action.ALLOW, HIT))
        assert verdict == Denial(connection(), "policy default/u could not be read: rule 0: no such match kind", "default/u")


def test_an_explicit_deny_is_named_before_an_unreadable_policy() -> None:
    verdict = judge(policy("a-unreadable", Action.ALLOW, unreadable="?"), policy("d", Action.DENY, HIT), unresolved=("default/late",))
    assert verdict.because == "explicitly denied by: default/d"


def test_a_dry_run_policy_that_is_unreadable_only_reports() -> None:
    verdict = judge(policy("u", Action.DENY, unreadable="bad CIDR", dry_run=True))
    assert isinstance(verdict, Permit)
    assert verdict.dry_run == (DryRunVerdict("dry-run: policy default/u could not be read: bad CIDR", "default/u", None),)


def test_a_dry_run_deny_reports_its_match_and_decides_nothing() -> None:
    verdict = judge(policy("d", Action.DENY, MISS, HIT, dry_run=True))
    assert verdict == Permit(
        connection(),
        "no allow policy applies",
        dry_run=(DryRunVerdict("dry-run: deny policy match: default/d", "default/d", 1),),
    )


def test_a_dry_run_allow_does_not_make_others_refused() -> None:
    verdict = judge(policy("a", Action.ALLOW, MISS, dry_run=True))
    assert isinstance(verdict, Permit)
    assert [str(said) for said in verdict.dry_run] == ["dry-run: no allow policies match"]


def test_a_dry_run_allow_that_matches_says_so() -> None:
    verdict = judge(policy("a", Action.ALLOW, HIT, dry_run=True), policy("b", Action.ALLOW, MISS, dry_run=True))
    assert [str(said) for said in verdict.dry_run] == ["dry-run: allow policy match: default/a"]


def test_a_dry_run_allow_opens_nothing_that_enforced_ones_refuse() -> None:
    verdict = judge(policy("a", Action.ALLOW, HIT, dry_run=True), policy("b", Action.ALLOW, MISS))
    assert isinstance(verdict, Denial)
    assert [str(said) for said in verdict.dry_run] == ["dry-run: allow policy match: default/a"]


def test_dry_run_verdicts_come_with_a_denial_too() -> None:
    verdict = judge(policy("d", Action.DENY, HIT), policy("e", Action.DENY, HIT, dry_run=True))
    assert isinstance(verdict, Denial)
    assert [said.policy for said in verdict.dry_run] == ["default/e"]


def test_service_account_decides_by_principal() -> None:
    only_client = policy("a", Action.ALLOW, Match(principals=(Exact(CLIENT.principal),)))
    assert isinstance(judge(only_client), Permit)
    assert isinstance(judge(only_client, source=SpiffeId("cluster.local", "default", "other")), Denial)
    assert isinstance(judge(only_client, source=SpiffeId("foreign.example", "default", "client")), Denial)
    assert isinstance(judge(only_client, source=None), Denial)


def test_equal_policies_need_no_second_judgement() -> None:
    before = AppliedPolicies((policy("a", Action.ALLOW, HIT),))
    authorize(before, connection())
    assert is_unchanged(before, before)
    assert is_unchanged(before, AppliedPolicies((policy("a", Action.ALLOW, HIT),)))
    assert not is_unchanged(before, AppliedPolicies((policy("a", Action.ALLOW, MISS),)))
    assert not is_unchanged(before, AppliedPolicies(before.policies, ("default/late",)))

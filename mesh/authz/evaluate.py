"""Whether policy lets a connection in, and which policy and rule said so.

The order is ztunnel's: DENY before ALLOW, no ALLOW at all permits, otherwise one must match; dry-run policies
report and decide nothing. Where ztunnel passes over what it does not have or could not read, we refuse: a policy that the workload
names but that has not arrived, and a policy that could not be parsed, deny, with that reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from mesh.authz.match import Facts, PreparedRules
from mesh.model.address import IpAddress, SocketAddress
from mesh.model.identity import SpiffeId
from mesh.model.policy import Action, Policy


@dataclass(frozen=True, slots=True)
class Connection:
    """What policy is asked about: the peer's address and proven identity (None: plaintext), and where the application will be dialled."""

    source_ip: IpAddress
    source: SpiffeId | None
    destination: SocketAddress


@dataclass(frozen=True, slots=True)
class DryRunVerdict:
    """What a dry-run policy would have done. ``policy`` is None for the sum of all of them (``no allow policies match``)."""

    because: str
    policy: str | None
    rule: int | None

    def __str__(self) -> str:
        return self.because


@dataclass(frozen=True, slots=True)
class Permit:
    """Policy lets the connection in: the authority to dial its destination."""

    connection: Connection
    because: str
    policy: str | None = None
    """Key of the ALLOW policy that matched; None where none applies."""
    rule: int | None = None
    """Index of the rule that matched, from 0."""
    dry_run: tuple[DryRunVerdict, ...] = ()


@dataclass(frozen=True, slots=True)
class Denial:
    """Policy refuses the connection. ``because`` is ztunnel's text where it has one."""

    connection: Connection
    because: str
    policy: str | None = None
    """Key of the policy that refused; None where ALLOW policies exist and none matched."""
    rule: int | None = None
    dry_run: tuple[DryRunVerdict, ...] = ()


# No slots: what evaluation derives from the fields is kept in the instance, made at the first connection that asks.
@dataclass(frozen=True)
class AppliedPolicies:
    """All policies that apply to one workload: the global ones, its namespace's, and those it names.

    `MeshState.policies_for` hands out the same object for as long as nothing in it changes, so ``is`` tells whether a connection has to
    be asked about again.
    """

    policies: tuple[Policy, ...]
    unresolved: tuple[str, ...] = ()
    """Keys that the workload names and nobody knows; each denies."""

    @cached_property
    def _prepared(self) -> _Prepared:
        return _Prepared(self)


def is_unchanged(before: AppliedPolicies, after: AppliedPolicies) -> bool:
    """Whether a connection judged by ``before`` needs no second judgement by ``after``."""
    return before is after or before == after


def authorize(applied: AppliedPolicies, connection: Connection) -> Permit | Denial:
    """Judge one connection. Never raises; the answer does not depend on the order of the policies."""
    return applied._prepared.judge(connection)


def is_undecided(applied: AppliedPolicies, verdict: Permit | Denial) -> bool:
    """Whether all that refuses the connection is a policy that has not arrived: it may yet be let in."""
    return isinstance(verdict, Denial) and verdict.policy in applied.unresolved


class _PreparedPolicy:
    __slots__ = ("action", "key", "rules")

    def __init__(self, policy: Policy) -> None:
        self.key = policy.key
        self.action = policy.action
        self.rules = PreparedRules(policy.rules)


class _Prepared:
    """The policies of a workload, sorted into the groups in which they are asked, each in the order of its keys."""

    __slots__ = ("_allows", "_denies", "_dry_allows", "_dry_denies", "_dry_unreadable", "_refusal")

    def __init__(self, applied: AppliedPolicies) -> None:
        policies = sorted(applied.policies, key=lambda policy: policy.key)
        readable = [policy for policy in policies if policy.unreadable is None]

        def group(action: Action, *, dry_run: bool) -> tuple[_PreparedPolicy, ...]:
            return tuple(_PreparedPolicy(policy) for policy in readable if policy.action is action and policy.dry_run is dry_run)

        self._denies = group(Action.DENY, dry_run=False)
        self._allows = group(Action.ALLOW, dry_run=False)
        self._dry_denies = group(Action.DENY, dry_run=True)
        self._dry_allows = group(Action.ALLOW, dry_run=True)
        self._dry_unreadable = tuple(
            DryRunVerdict(f"dry-run: {_unreadable(policy)}", policy.key, None)
            for policy in policies
            if policy.unreadable is not None and policy.dry_run
        )
        self._refusal = _refusal_of_all(policies, applied.unresolved)

    def judge(self, connection: Connection) -> Permit | Denial:
        destination = connection.destination
        facts = Facts.of(connection.source_ip, connection.source, destination.ip, destination.port)
        dry_run = self._dry_run(facts)
        for policy in self._denies:
            rule = policy.rules.find_match(facts)
            if rule is not None:
                return Denial(connection, f"explicitly denied by: {policy.key}", policy.key, rule, dry_run)
        if self._refusal is not None:
            because, key = self._refusal
            return Denial(connection, because, key, None, dry_run)
        if not self._allows:
            return Permit(connection, "no allow policy applies", dry_run=dry_run)
        for policy in self._allows:
            rule = policy.rules.find_match(facts)
            if rule is not None:
                return Permit(connection, f"allowed by: {policy.key}", policy.key, rule, dry_run)
        return Denial(connection, "allow policies exist, but none allowed", dry_run=dry_run)

    def _dry_run(self, facts: Facts) -> tuple[DryRunVerdict, ...]:
        if not (self._dry_denies or self._dry_allows or self._dry_unreadable):
            return ()
        verdicts = list(self._dry_unreadable)
        for policy in (*self._dry_denies, *self._dry_allows):
            rule = policy.rules.find_match(facts)
            if rule is not None:
                because = f"dry-run: {policy.action.name.lower()} policy match: {policy.key}"
                verdicts.append(DryRunVerdict(because, policy.key, rule))
        allowed = {verdict.policy for verdict in verdicts} & {policy.key for policy in self._dry_allows}
        if self._dry_allows and not self._allows and not allowed:
            verdicts.append(DryRunVerdict("dry-run: no allow policies match", None, None))
        return tuple(verdicts)


def _refusal_of_all(policies: list[Policy], unresolved: tuple[str, ...]) -> tuple[str, str] | None:
    """Why every connection is refused, and the policy that is to blame: one that could not be read, or one that has not arrived."""
    for policy in policies:
        if policy.unreadable is not None and not policy.dry_run:
            return _unreadable(policy), policy.key
    for key in sorted(unresolved):
        return f"policy {key} is named by the workload but has not arrived", key
    return None


def _unreadable(policy: Policy) -> str:
    return f"policy {policy.key} could not be read: {policy.unreadable}"

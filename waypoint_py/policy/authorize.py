"""Whether AuthorizationPolicies let a request, or a connection, through to a service, and which rule said so.

The order is Istio's: DENY before ALLOW, no ALLOW at all lets through, otherwise one must match; AUDIT only marks; CUSTOM comes first and
is asked apart (`Judge.find_authorizer`), since it waits. Where Istio passes over what it does not understand, we refuse: a policy that
could not be read denies, and so does one that cannot be compiled.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from typing import Final

from mesh.http.message import Request
from mesh.model.l7.policy import AuthorizationPolicy, ExtAuthzGrpc, ExtAuthzHttp, PolicyAction, PolicyRule
from waypoint_py.client_hello import ServerName
from waypoint_py.context import Connection
from waypoint_py.policy.facts import Facts, TokenFacts, TrustsForwarded
from waypoint_py.policy.predicates import Uncompilable
from waypoint_py.policy.rules import Compiled, RuleGroup, compile_rule, without_http
from waypoint_py.verdict import LocalReply

BODY: Final = b"RBAC: access denied"
STATUS: Final = 403


@dataclass(frozen=True, slots=True)
class DryRunVerdict:
    """What policies that are only tried would have done. ``policy`` is empty for all of them together: none of those that allow did."""

    denies: bool
    policy: str
    because: str


@dataclass(frozen=True, slots=True)
class Judgement:
    """``reply``: what a refused client is told, None: let through. ``policy``: the rule that decided, ``ns[shop]-policy[get]-rule[0]``.
    ``audited``: rules of AUDIT policies that matched."""

    because: str
    policy: str = ""
    reply: LocalReply | None = None
    dry_run: tuple[DryRunVerdict, ...] = ()
    audited: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Consultation:
    """A CUSTOM policy matched: this authorizer decides."""

    provider: ExtAuthzHttp | ExtAuthzGrpc
    provider_name: str
    policy: str
    because: str


UNRESTRICTED: Final = Judgement("no policy applies")
_NO_ALLOW: Final = Judgement("no allow policy applies")


def trust_nobody(peer: object) -> bool:
    """No peer's ``x-forwarded-for`` is believed."""
    return False


class Judges:
    """The policies of a waypoint, by the services they are for. A judge is made when it is first asked for: a policy that targets other
    services costs a service nothing."""

    def __init__(self, policies: Iterable[AuthorizationPolicy], *, trusts_forwarded: TrustsForwarded = trust_nobody) -> None:
        self._trusted = trusts_forwarded
        self._everywhere: list[AuthorizationPolicy] = []
        self._by_target: dict[str, list[AuthorizationPolicy]] = {}
        for policy in policies:
            if not policy.targets:
                self._everywhere.append(policy)
            for target in dict.fromkeys(policy.targets):
                self._by_target.setdefault(target, []).append(policy)
        self._judges: dict[str, Judge] = {}
        self._default: Judge | None = None

    def judge_of(self, service: str) -> Judge:
        """``service``: ``namespace/hostname``, empty for traffic to a workload."""
        targeted = self._by_target.get(service)
        if targeted is None:
            if self._default is None:
                self._default = Judge(self._everywhere, trusts_forwarded=self._trusted)
            return self._default
        judge = self._judges.get(service)
        if judge is None:
            judge = self._judges[service] = Judge([*self._everywhere, *targeted], trusts_forwarded=self._trusted)
        return judge


class Judge:
    """Everything that applies to one service. Never raises; the answer does not depend on the order of the policies."""

    def __init__(self, policies: Iterable[AuthorizationPolicy], *, trusts_forwarded: TrustsForwarded = trust_nobody) -> None:
        self._trusted = trusts_forwarded
        ordered = sorted(policies, key=lambda policy: (policy.origin.namespace, policy.origin.name, policy.origin.kind))
        self._http = _Policies(ordered, _Of.REQUESTS)
        self._tcp = _Policies(ordered, _Of.CONNECTIONS)
        asks = any(isinstance(policy.provider, ExtAuthzHttp) for policy in ordered)
        self._undeclared = _Policies(ordered, _Of.UNDECLARED) if asks else self._tcp

    def judge(self, request: Request, connection: Connection, claims: TokenFacts | None) -> Judgement:
        """One request; ``claims`` of its verified token."""
        policies = self._http
        if policies.none:
            return UNRESTRICTED
        return policies.judge(Facts(request, connection, claims, self._trusted))

    def judge_connection(self, connection: Connection, sni: ServerName = None) -> Judgement:
        """A connection in whose bytes we do not look for HTTP; ``sni``: whom it asks for, if it is TLS."""
        policies = self._tcp
        if policies.none:
            return UNRESTRICTED
        return policies.judge(Facts(None, connection, None, self._trusted, sni))

    def find_authorizer(self, request: Request, connection: Connection) -> Consultation | Judgement | None:
        """Before anything else: whom to ask about the request, if a CUSTOM policy matches; a refusal if nobody can be asked.

        Claims are not known then: tokens are verified afterwards.
        """
        return self._http.find_authorizer(Facts(request, connection, None, self._trusted)) if self._http.custom else None

    def find_connection_authorizer(
        self, connection: Connection, sni: ServerName = None, *, declared: bool = True
    ) -> Consultation | Judgement | None:
        """The same for a connection. Authorizers that are asked over HTTP know nothing of those: their policies do not apply, as in Istio,
        where the port is ``declared`` to carry no HTTP. Elsewhere it is the client who says so, with its first bytes: it is refused."""
        policies = self._tcp if declared else self._undeclared
        return policies.find_authorizer(Facts(None, connection, None, self._trusted, sni)) if policies.custom else None


class _Of(Enum):
    """What policies are asked about."""

    REQUESTS = "requests"
    CONNECTIONS = "connections"
    UNDECLARED = "connections on ports without a declared protocol"


class _Policies:
    """The policies of a service as they hold for HTTP, or for connections."""

    __slots__ = ("_allows", "_audits", "_consulted", "_default_denies", "_denies", "_marks", "_refusal", "_tried", "custom", "none")

    def __init__(self, policies: list[AuthorizationPolicy], asked_of: _Of) -> None:
        compiled = [_compile(policy, asked_of) for policy in policies]
        enforced = [policy for policy in compiled if not policy.dry_run]
        readable = [policy for policy in enforced if not policy.unreadable]
        allows = _of(readable, PolicyAction.ALLOW)
        customs = _of(readable, PolicyAction.CUSTOM)
        self.none = not compiled
        self.custom = bool(customs)
        self._refusal = next((_denial(policy.id, policy.unreadable) for policy in enforced if policy.unreadable), None)
        self._denies = RuleGroup([(rule.source, rule.compiled, rule.id) for rule in _rules(_of(readable, PolicyAction.DENY))])
        self._allows = RuleGroup([(rule.source, rule.compiled, Judgement(f"allowed by {rule.id}", rule.id)) for rule in _rules(allows)])
        self._default_denies = bool(allows)
        self._audits = tuple(_names([policy]) for policy in _of(readable, PolicyAction.AUDIT))
        self._consulted = _consultations(customs, asked_of)
        self._tried = _Tried([policy for policy in compiled if policy.dry_run], enforced_allow=bool(allows))
        self._marks = bool(self._audits) or self._tried.any

    def judge(self, facts: Facts) -> Judgement:
        judgement = self._decide(facts)
        if not self._marks:
            return judgement
        audited = tuple(rule for audit in self._audits if (rule := audit.find(facts)) is not None)
        return replace(judgement, dry_run=self._tried.verdicts(facts), audited=audited)

    def _decide(self, facts: Facts) -> Judgement:
        if not self._denies.empty and (rule := self._denies.find(facts)) is not None:
            return _fresh(_denial(rule, f"denied by {rule}"))
        if self._refusal is not None:
            return _fresh(self._refusal)
        if not self._default_denies:
            return _NO_ALLOW
        return self._allows.find(facts) or _fresh(_NONE_ALLOWED)

    def find_authorizer(self, facts: Facts) -> Consultation | Judgement | None:
        found = self._consulted.find(facts)
        return _fresh(found) if isinstance(found, Judgement) else found


class _Tried:
    """Policies that are evaluated and reported, and decide nothing."""

    __slots__ = ("_allows", "_customs", "_denies", "_none_allows", "_unreadable", "any")

    def __init__(self, policies: list[_Policy], *, enforced_allow: bool) -> None:
        readable = [policy for policy in policies if not policy.unreadable]
        allows = _of(readable, PolicyAction.ALLOW)
        self.any = bool(policies)
        self._denies = _names(_of(readable, PolicyAction.DENY))
        self._allows = _names(allows)
        self._customs = _names(_of(readable, PolicyAction.CUSTOM))
        self._none_allows = bool(allows) and not enforced_allow
        self._unreadable = tuple(
            DryRunVerdict(True, policy.id, f"dry-run: {policy.unreadable}") for policy in policies if policy.unreadable
        )

    def verdicts(self, facts: Facts) -> tuple[DryRunVerdict, ...]:
        if not self.any:
            return ()
        verdicts = list(self._unreadable)
        if (rule := self._denies.find(facts)) is not None:
            verdicts.append(DryRunVerdict(True, rule, f"dry-run: would be denied by {rule}"))
        if (rule := self._customs.find(facts)) is not None:
            verdicts.append(DryRunVerdict(False, rule, f"dry-run: the authorizer of {rule} would be asked"))
        if (rule := self._allows.find(facts)) is not None:
            verdicts.append(DryRunVerdict(False, rule, f"dry-run: would be allowed by {rule}"))
        elif self._none_allows:
            verdicts.append(DryRunVerdict(True, "", "dry-run: allow policies would exist, and none would match"))
        return tuple(verdicts)


@dataclass(frozen=True, slots=True)
class _Rule:
    id: str
    source: PolicyRule
    compiled: Compiled


@dataclass(frozen=True, slots=True)
class _Policy:
    """``id``: ``ns[shop]-policy[get]``. ``unreadable``: why the policy denies everything."""

    id: str
    action: PolicyAction
    dry_run: bool
    unreadable: str
    rules: tuple[_Rule, ...]
    provider: ExtAuthzHttp | ExtAuthzGrpc | None
    provider_name: str


def _compile(policy: AuthorizationPolicy, asked_of: _Of) -> _Policy:
    policy_id = f"ns[{policy.origin.namespace}]-policy[{policy.origin.name}]"
    rules: tuple[_Rule, ...] = ()
    unreadable = policy.unreadable and f"{policy.origin} could not be read: {policy.unreadable}"
    if not unreadable and not (asked_of is _Of.CONNECTIONS and isinstance(policy.provider, ExtAuthzHttp)):
        try:
            rules = tuple(_compile_rules(policy, policy_id, for_tcp=asked_of is not _Of.REQUESTS))
        except Uncompilable as exc:
            unreadable = f"{policy.origin} could not be read: {exc}"
    return _Policy(policy_id, policy.action, policy.dry_run, unreadable, rules, policy.provider, policy.provider_name)


def _compile_rules(policy: AuthorizationPolicy, policy_id: str, *, for_tcp: bool) -> Iterator[_Rule]:
    allows = policy.action is PolicyAction.ALLOW
    for index, written in enumerate(policy.rules):
        rule = without_http(written, allows=allows) if for_tcp else written
        if rule is not None:
            yield _Rule(f"{policy_id}-rule[{index}]", rule, compile_rule(rule, allows=allows))


def _of(policies: Iterable[_Policy], action: PolicyAction) -> list[_Policy]:
    return [policy for policy in policies if policy.action is action]


def _rules(policies: Iterable[_Policy]) -> Iterator[_Rule]:
    for policy in policies:
        yield from policy.rules


def _names(policies: Iterable[_Policy]) -> RuleGroup[str]:
    return RuleGroup([(rule.source, rule.compiled, rule.id) for rule in _rules(policies)])


def _consultations(policies: list[_Policy], asked_of: _Of) -> RuleGroup[Consultation | Judgement]:
    """Of several providers none is asked: in which order, and whether one is enough, nobody has said. As Istio, which denies then."""
    several = len({policy.provider_name for policy in policies}) > 1
    rules: list[tuple[PolicyRule, Compiled, Consultation | Judgement]] = []
    for policy in policies:
        for rule in policy.rules:
            outcome: Consultation | Judgement
            if several:
                outcome = _denial(f"{rule.id}{_BAD_CUSTOM}", f"{rule.id} is not the only CUSTOM policy: several providers for one service")
            elif policy.provider is None:
                outcome = _denial(f"{rule.id}{_BAD_CUSTOM}", f"{rule.id} names a provider that is unknown: {policy.provider_name!r}")
            elif asked_of is _Of.UNDECLARED and isinstance(policy.provider, ExtAuthzHttp):
                because = f"{rule.id} asks {policy.provider_name} of HTTP alone, and this is none: declare the port as TCP if it shall pass"
                outcome = _denial(rule.id, because)
            else:
                outcome = Consultation(policy.provider, policy.provider_name, rule.id, f"{rule.id} asks {policy.provider_name}")
            rules.append((rule.source, rule.compiled, outcome))
    return RuleGroup(rules)


_BAD_CUSTOM: Final = "-deny-due-to-bad-CUSTOM-action"


def _denial(policy: str, because: str) -> Judgement:
    details = f"rbac_access_denied_matched_policy[{policy or 'none'}]"
    return Judgement(because, policy, LocalReply(STATUS, BODY, details=details, because=because, policy=policy))


_NONE_ALLOWED: Final = _denial("", "allow policies exist, but none allowed")


def _fresh(judgement: Judgement) -> Judgement:
    """With a reply of its own: whoever sends it may add headers."""
    return judgement if judgement.reply is None else replace(judgement, reply=replace(judgement.reply, headers=[]))

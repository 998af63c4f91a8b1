"""AuthorizationPolicy for node proxies: its L4 part, such that what is left out can only make it stricter (reference: Istio's
`authorization.go`).

ALLOW: a rule with an HTTP attribute is left out whole, and a policy without rules allows nothing. DENY: the HTTP attributes are left out of
the rule, which then denies more; a match that had nothing else never matches. Unlike Istio a policy with a mistake in it is not sent
without the mistaken part: the last good version stays, and one that never was good is enforced closed (`close`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from istiod_py.translate.config import Condition, Config
from mesh.kube.objects import KubeObject, SourceProblem
from mesh.kube.ownership import ZTUNNEL_ACCEPTED
from mesh.kube.policies import AuthorizationPolicy, PolicyRule
from mesh.kube.policies import Condition as When
from mesh.model.address import parse_cidr
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

ACCEPTED = Condition(ZTUNNEL_ACCEPTED, True, "Accepted", "attached to ztunnel")

_SOURCE_FIELDS = ("principals", "namespaces", "serviceAccounts", "ipBlocks")
_L4_SOURCE = frozenset({*_SOURCE_FIELDS, *(f"not{name[0].upper()}{name[1:]}" for name in _SOURCE_FIELDS)})
_L4_OPERATION = frozenset({"ports", "notPorts"})
_L4_WHEN = frozenset({"source.ip", "source.namespace", "source.principal", "destination.ip", "destination.port"})

_TAIL_ALLOW = "Within an ALLOW policy, rules matching HTTP attributes are omitted. This will be more restrictive than requested."
_TAIL_DENY = "DENY policy with HTTP attributes is enforced without the HTTP rules. This will be more restrictive than requested."
_TAIL_DENY_NOTHING_LEFT = (
    "After omitting unsupported HTTP attributes, this DENY policy has no enforceable rules at ztunnel and will have no effect. "
    "Deploy a waypoint proxy and use a targetRef to enforce this policy."
)


@dataclass(frozen=True, slots=True)
class L4Policy:
    """``policy`` None: nothing is sent. ``selector`` None: found by scope, else workloads it matches name it."""

    policy: Policy | None
    selector: Mapping[str, str] | None
    condition: Condition | None
    """None: the policy is for waypoints alone."""


def translate_authorization(policy: AuthorizationPolicy, config: Config) -> L4Policy:
    if not policy.audience.has_agents:
        return L4Policy(None, None, None)
    if policy.action not in ("ALLOW", "DENY"):
        message = f"ztunnel does not support the {policy.action} action"
        return L4Policy(None, None, Condition(ZTUNNEL_ACCEPTED, False, "UnsupportedValue", message))
    action = Action[policy.action]
    rules = tuple(_translate_rule(rule, policy.namespace) for rule in policy.rules if action is Action.DENY or not _http_of(rule))
    http = {attribute for rule in policy.rules for attribute in _http_of(rule)}
    return L4Policy(
        policy=Policy(
            name=policy.name,
            namespace=policy.namespace,
            scope=_scope(policy.namespace, policy.selector, config),
            action=action,
            rules=rules,
            dry_run=policy.dry_run,
        ),
        selector=policy.selector,
        condition=_http_condition(action, rules, http) if http else ACCEPTED,
    )


def close(obj: KubeObject, policy: AuthorizationPolicy, problems: tuple[SourceProblem, ...], config: Config) -> L4Policy:
    """A policy with mistakes and no good version before it, enforced so that it cannot be wider than what was meant.

    An ALLOW allows nothing of its own: what other policies allow goes on, as it would beside any ALLOW. A DENY, or what cannot be told
    from one, denies everything it may have selected. When the selection itself is not certain it is the whole namespace (the whole mesh in
    the root namespace). What would not be enforced anyway (dry run, other actions, waypoint policies) is not sent; of a waypoint's policy
    nothing is said either. One that may be for waypoints or not is enforced by both.
    """
    because = str(problems[0])
    raw_action = obj.spec.get("action", "ALLOW")
    if not policy.audience.has_agents and policy.selector is None:
        return L4Policy(None, None, None)
    if policy.dry_run or raw_action in ("AUDIT", "CUSTOM"):
        return L4Policy(None, None, Condition(ZTUNNEL_ACCEPTED, False, "Invalid", f"not enforced: {because}"))
    uncertain = any(problem.field in ("", "spec") or problem.field.startswith("spec.selector") for problem in problems)
    selector = None if uncertain else policy.selector
    scope = _scope(policy.namespace, selector, config)
    readable_allow = raw_action == "ALLOW" and isinstance(obj.raw.get("spec"), Mapping)
    closed = Policy(
        name=policy.name,
        namespace=policy.namespace,
        scope=scope,
        action=Action.ALLOW if readable_allow else Action.DENY,
        rules=() if readable_allow else (Rule(),),
        unreadable=None if readable_allow else because,
    )
    effect = "allows nothing" if readable_allow else "denies everything it applies to"
    return L4Policy(closed, selector, Condition(ZTUNNEL_ACCEPTED, False, "Invalid", f"until corrected it {effect}: {because}"))


def _scope(namespace: str, selector: Mapping[str, str] | None, config: Config) -> Scope:
    if selector is not None:
        return Scope.WORKLOAD_SELECTOR
    return Scope.GLOBAL if namespace == config.root_namespace else Scope.NAMESPACE


def _http_condition(action: Action, rules: tuple[Rule, ...], http: set[str]) -> Condition:
    """True although a part is not enforced: Istio's condition says whether the policy was sent at all."""
    tail_deny = _TAIL_DENY if any(_can_match(rule) for rule in rules) else _TAIL_DENY_NOTHING_LEFT
    message = (
        f"ztunnel does not support HTTP attributes (found: {', '.join(sorted(http))}). "
        "In ambient mode you must use a waypoint proxy to enforce HTTP rules. "
        f"{_TAIL_ALLOW if action is Action.ALLOW else tail_deny}"
    )
    return Condition(ZTUNNEL_ACCEPTED, True, "UnsupportedValue", message)


def _can_match(rule: Rule) -> bool:
    """An empty match never matches, so a clause of nothing but empty matches stops its rule."""
    return all(any(match != Match() for match in clause.matches) for clause in rule.clauses)


def _http_of(rule: PolicyRule) -> set[str]:
    """The attributes of a rule that a node proxy cannot see."""
    operations = {name for operation in rule.operations for name in operation} - _L4_OPERATION
    sources = {name for source in rule.sources for name in source} - _L4_SOURCE
    return operations | sources | ({when.key for when in rule.conditions} - _L4_WHEN)


def _translate_rule(rule: PolicyRule, namespace: str) -> Rule:
    clauses = [Clause(tuple(_match_operation(operation) for operation in rule.operations))] if rule.operations else []
    if rule.sources:
        clauses.append(Clause(tuple(_match_source(source, namespace) for source in rule.sources)))
    clauses.extend(Clause((_match_when(when),)) for when in rule.conditions)
    return Rule(tuple(clauses))


def _match_operation(operation: Mapping[str, tuple[str, ...]]) -> Match:
    return Match(
        destination_ports=tuple(int(port) for port in operation.get("ports", ())),
        not_destination_ports=tuple(int(port) for port in operation.get("notPorts", ())),
    )


def _match_source(source: Mapping[str, tuple[str, ...]], namespace: str) -> Match:
    return Match(
        namespaces=_strings(source.get("namespaces", ())),
        not_namespaces=_strings(source.get("notNamespaces", ())),
        principals=_strings(source.get("principals", ())),
        not_principals=_strings(source.get("notPrincipals", ())),
        source_ips=tuple(parse_cidr(block) for block in source.get("ipBlocks", ())),
        not_source_ips=tuple(parse_cidr(block) for block in source.get("notIpBlocks", ())),
        service_accounts=tuple(_service_account(text, namespace) for text in source.get("serviceAccounts", ())),
        not_service_accounts=tuple(_service_account(text, namespace) for text in source.get("notServiceAccounts", ())),
    )


def _match_when(when: When) -> Match:
    match when.key:
        case "source.namespace":
            return Match(namespaces=_strings(when.values), not_namespaces=_strings(when.not_values))
        case "source.principal":
            return Match(principals=_strings(when.values), not_principals=_strings(when.not_values))
        case "source.ip":
            return Match(
                source_ips=tuple(parse_cidr(value) for value in when.values),
                not_source_ips=tuple(parse_cidr(value) for value in when.not_values),
            )
        case "destination.ip":
            return Match(
                destination_ips=tuple(parse_cidr(value) for value in when.values),
                not_destination_ips=tuple(parse_cidr(value) for value in when.not_values),
            )
        case "destination.port":
            return Match(
                destination_ports=tuple(int(value) for value in when.values),
                not_destination_ports=tuple(int(value) for value in when.not_values),
            )
    return Match()


def _strings(values: tuple[str, ...]) -> tuple[StringMatch, ...]:
    return tuple(_string(value) for value in values)


def _string(value: str) -> StringMatch:
    """``*`` any, ``*x`` suffix, ``x*`` prefix, else exact; a ``*`` elsewhere stands for itself, as in Istio."""
    if value == "*":
        return Presence()
    if value.startswith("*"):
        return Suffix(value[1:])
    if value.endswith("*"):
        return Prefix(value[:-1])
    return Exact(value)


def _service_account(text: str, namespace: str) -> ServiceAccountMatch:
    """``namespace/name``, or ``name`` in the policy's own namespace."""
    given, slash, name = text.partition("/")
    return ServiceAccountMatch(given, name) if slash else ServiceAccountMatch(namespace, text)

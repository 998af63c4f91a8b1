"""AuthorizationPolicies as waypoints enforce them (reference: Istio's authz builder and policy attachment).

Nothing is left out that would make a policy wider. One with a mistake in it and no good version before it denies whatever it may be for
(`unreadable`); a CUSTOM policy whose provider is not known denies what its rules match.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

import msgspec

from istiod_py.translate.l7.attachment import Fronted, find_feared_targets, find_targets
from istiod_py.translate.l7.values import expand_principal, expand_trust_domains, match_namespace, match_paths, match_text
from istiod_py.translate.reading import Read
from mesh.kube.meshconfig import Provider
from mesh.kube.objects import ObjectKey
from mesh.kube.policies import AuthorizationPolicy as KubePolicy
from mesh.kube.policies import Condition as When
from mesh.kube.policies import PolicyRule as KubeRule
from mesh.model.l7.matching import Exact, TextMatch
from mesh.model.l7.policy import Attribute, AuthorizationPolicy, ExtAuthzGrpc, ExtAuthzHttp, PolicyAction, PolicyRule, Predicate
from mesh.model.l7.routing import Origin


class KnownService(Protocol):
    @property
    def namespace(self) -> str: ...

    @property
    def hostname(self) -> str: ...


class ServiceFinder(Protocol):
    def find(self, hostname: str, namespace: str) -> KnownService | None:
        """What a hostname means in a namespace: its own service, else the mesh's."""


@dataclass(frozen=True, slots=True)
class PolicyFacts:
    """What the policies of all waypoints depend on besides themselves. ``trust_domains``: the mesh's own first, then its aliases.
    ``services`` None: no authorizer is found, and all of them deny."""

    root_namespace: str
    trust_domains: tuple[str, ...]
    providers: Mapping[str, Provider] = field(default_factory=dict)
    services: ServiceFinder | None = None


def policies_for(
    fronted: Fronted, policies: Mapping[ObjectKey, Read[KubePolicy]], facts: PolicyFacts
) -> dict[ObjectKey, AuthorizationPolicy]:
    """Of all AuthorizationPolicies those that this waypoint enforces, in order of namespace and name."""
    result: dict[ObjectKey, AuthorizationPolicy] = {}
    for key in sorted(policies):
        translated = policy_for(fronted, policies[key], facts)
        if translated is not None:
            result[key] = translated
    return result


def policy_for(fronted: Fronted, read: Read[KubePolicy], facts: PolicyFacts) -> AuthorizationPolicy | None:
    """None: this waypoint has nothing to do with it."""
    policy = read.value
    if not policy.audience.has_waypoints:
        return None
    if not read.good:
        return _close(fronted, read, facts)
    targets = find_targets(policy.targets, policy.namespace, fronted, facts.root_namespace)
    return None if targets is None else _translate(policy, targets, facts)


def origin_of(policy: KubePolicy) -> Origin:
    return Origin("AuthorizationPolicy", policy.namespace, policy.name)


def _close(fronted: Fronted, read: Read[KubePolicy], facts: PolicyFacts) -> AuthorizationPolicy | None:
    """An audit decides nothing, and with a mistake in it says nothing either."""
    policy = read.value
    raw_action = read.obj.spec.get("action", "ALLOW")
    targets = find_feared_targets(policy.targets, read.problems, policy.namespace, fronted, facts.root_namespace)
    if targets is None or raw_action == "AUDIT":
        return None
    action = next((action for action in PolicyAction if action.name == raw_action), PolicyAction.DENY)
    return AuthorizationPolicy(
        origin=origin_of(policy), action=action, targets=targets, dry_run=policy.dry_run, unreadable=str(read.problems[0])
    )


def _translate(policy: KubePolicy, targets: tuple[str, ...], facts: PolicyFacts) -> AuthorizationPolicy:
    action = PolicyAction[policy.action]
    maker = _Maker(policy.namespace, facts.trust_domains, action)
    return AuthorizationPolicy(
        origin=origin_of(policy),
        action=action,
        targets=targets,
        rules=tuple(map(maker.make_rule, policy.rules)),
        provider=find_provider(policy.provider, facts) if action is PolicyAction.CUSTOM else None,
        provider_name=policy.provider,
        dry_run=policy.dry_run,
    )


def find_provider(name: str, facts: PolicyFacts) -> ExtAuthzHttp | ExtAuthzGrpc | None:
    """None: nobody has this name, or its service is not there."""
    provider = facts.providers.get(name)
    if provider is None or facts.services is None:
        return None
    found = facts.services.find(provider.hostname, provider.namespace or facts.root_namespace)
    if found is None or provider.namespace not in ("", found.namespace):
        return None
    return msgspec.structs.replace(provider, namespace=found.namespace, hostname=found.hostname)


_SOURCES: Final = {
    "principals": Attribute.PRINCIPAL,
    "requestPrincipals": Attribute.AUTH_PRINCIPAL,
    "namespaces": Attribute.NAMESPACE,
    "ipBlocks": Attribute.SOURCE_IP,
    "remoteIpBlocks": Attribute.REMOTE_IP,
    "serviceAccounts": Attribute.SERVICE_ACCOUNT,
    "trustDomains": Attribute.TRUST_DOMAIN,
}
_OPERATIONS: Final = {
    "hosts": Attribute.HOST,
    "ports": Attribute.DESTINATION_PORT,
    "methods": Attribute.METHOD,
    "paths": Attribute.PATH,
}
_CONDITIONS: Final = {
    attribute.value: attribute
    for attribute in Attribute
    if attribute not in (Attribute.UNKNOWN, Attribute.HEADER, Attribute.CLAIM, Attribute.HOST, Attribute.METHOD, Attribute.PATH)
}


class _Maker:
    """Makes rules of one policy."""

    def __init__(self, namespace: str, trust_domains: tuple[str, ...], action: PolicyAction) -> None:
        self._namespace = namespace
        self._trust_domains = trust_domains
        self._action = action

    def make_rule(self, rule: KubeRule) -> PolicyRule:
        return PolicyRule(
            sources=tuple(self._make_part(source, _SOURCES) for source in rule.sources),
            operations=tuple(self._make_part(operation, _OPERATIONS) for operation in rule.operations),
            conditions=tuple(predicate for when in rule.conditions for predicate in self._make_condition(when)),
        )

    def _make_part(self, part: Mapping[str, tuple[str, ...]], attributes: Mapping[str, Attribute]) -> tuple[Predicate, ...]:
        predicates = []
        for name, values in part.items():
            negated = name not in attributes
            positive = f"{name[3].lower()}{name[4:]}" if negated else name
            predicates.append(self._make(attributes[positive], values, negated))
        return tuple(predicates)

    def _make_condition(self, when: When) -> tuple[Predicate, ...]:
        attribute, key = parse_key(when.key)
        if attribute is Attribute.UNKNOWN:
            return (Predicate(attribute),)
        both = ((when.values, False), (when.not_values, True))
        return tuple(self._make(attribute, values, negated, key) for values, negated in both if values)

    def _make(self, attribute: Attribute, values: tuple[str, ...], negated: bool, key: tuple[str, ...] = ()) -> Predicate:
        match attribute:
            case Attribute.PATH:
                return match_paths(values, negated=negated)
            case Attribute.SOURCE_IP | Attribute.REMOTE_IP | Attribute.DESTINATION_IP:
                return Predicate(attribute, negated, cidrs=values)
            case Attribute.DESTINATION_PORT:
                return Predicate(attribute, negated, ports=tuple(map(int, values)))
        return Predicate(attribute, negated, key, texts=tuple(dict.fromkeys(self._make_texts(attribute, values))))

    def _make_texts(self, attribute: Attribute, values: tuple[str, ...]) -> Iterable[TextMatch]:
        match attribute:
            case Attribute.PRINCIPAL:
                return (match_text(each) for value in values for each in expand_principal(value, self._trust_domains))
            case Attribute.TRUST_DOMAIN:
                return map(match_text, expand_trust_domains(values, self._trust_domains))
            case Attribute.NAMESPACE:
                return map(match_namespace, values)
            case Attribute.SERVICE_ACCOUNT:
                return (Exact(value if "/" in value else f"{self._namespace}/{value}") for value in values)
            case Attribute.HOST:
                return (match_text(value, ignore_case=True, non_empty=False) for value in values)
            case Attribute.HEADER:
                # As Envoy has it: there, be it empty.
                return (match_text(value, non_empty=False) for value in values)
        return map(match_text, values)


def parse_key(key: str) -> tuple[Attribute, tuple[str, ...]]:
    """The attribute that a ``when`` is about, and the names in its brackets."""
    if key in _CONDITIONS:
        return _CONDITIONS[key], ()
    family, bracket, rest = key.partition("[")
    names = tuple(rest.removesuffix("]").split("][")) if bracket else ()
    match family:
        case "request.headers":
            return Attribute.HEADER, tuple(name.lower() for name in names)
        case "request.auth.claims":
            return Attribute.CLAIM, names
    return Attribute.UNKNOWN, ()

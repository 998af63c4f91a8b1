"""What is right in a policy and still is hardly what was meant: told as a problem, with its field, while the policy is enforced as it
stands. Istio takes all of this without a word."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from istiod_py.translate.l7.policies import PolicyFacts, find_provider, parse_key
from mesh.kube.fields import did_you_mean
from mesh.kube.objects import FieldPath
from mesh.kube.policies import TEMPLATE_OPERATORS, AuthorizationPolicy, Condition, PolicyRule
from mesh.model.l7.policy import Attribute

_TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HTTP: Final = frozenset({"requestPrincipals", "notRequestPrincipals", "hosts", "notHosts", "methods", "notMethods", "paths", "notPaths"})
_IDENTITIES: Final = frozenset({"principals", "notPrincipals"})
_IDENTITY: Final = re.compile(r"[^/]+/ns/[^/]+/sa/[^/]+")
_NO_IDENTITY: Final = "no identity matches that: they are TRUST-DOMAIN/ns/NAMESPACE/sa/SERVICE-ACCOUNT"
_STAR_ALONE: Final = "a '*' that is neither first nor last stands for itself"
_PATTERNS: Final = frozenset({"principals", "requestPrincipals", "hosts", "methods", "paths"})
_PATTERN_KEYS: Final = frozenset(
    {
        Attribute.PRINCIPAL,
        Attribute.AUTH_PRINCIPAL,
        Attribute.AUDIENCE,
        Attribute.PRESENTER,
        Attribute.CLAIM,
        Attribute.HEADER,
        Attribute.SNI,
    }
)


@dataclass(frozen=True, slots=True)
class Notice:
    path: FieldPath
    message: str


def names_in(keys: Iterable[str], namespace: str) -> list[str]:
    """Names that one may have meant: of ``namespace/name``, those of a namespace."""
    return [key.removeprefix(f"{namespace}/") for key in keys if key.startswith(f"{namespace}/")]


def find_notices(policy: AuthorizationPolicy) -> tuple[Notice, ...]:
    """In order of its fields; of a policy for node agents alone, those that name identities."""
    look = _look_at_rule if policy.audience.has_waypoints else _look_at_identities
    return tuple(notice for index, rule in enumerate(policy.rules) for notice in look(rule, ("spec", "rules", index)))


def find_http_fields(policy: AuthorizationPolicy) -> Iterator[FieldPath]:
    """Those that mean something to requests alone."""
    for number, rule in enumerate(policy.rules):
        here: FieldPath = ("spec", "rules", number)
        for part, name, members in (("from", "source", rule.sources), ("to", "operation", rule.operations)):
            yield from ((*here, part, at, name, field) for at, member in enumerate(members) for field in member if field in _HTTP)
        yield from ((*here, "when", at, "key") for at, when in enumerate(rule.conditions) if when.key.startswith("request."))


def find_provider_notices(policy: AuthorizationPolicy, facts: PolicyFacts) -> Iterator[Notice]:
    """That nobody can be asked, and so what the rules match is refused."""
    if policy.action != "CUSTOM" or find_provider(policy.provider, facts) is not None:
        return
    known = facts.providers.get(policy.provider)
    if known is None:
        because = f"the mesh configuration has no provider '{policy.provider}'{did_you_mean(policy.provider, facts.providers)}"
    else:
        because = f"the mesh has no service {known.namespace or '*'}/{known.hostname}, at which this provider is"
    yield Notice(("spec", "provider", "name"), f"what the rules match is refused: {because}")


def _look_at_identities(rule: PolicyRule, path: FieldPath) -> Iterator[Notice]:
    for index, source in enumerate(rule.sources):
        named = {name: values for name, values in source.items() if name in _IDENTITIES}
        yield from _look_at_part(named, (*path, "from", index, "source"))
    for index, when in enumerate(rule.conditions):
        if when.key == "source.principal":
            yield from _look_at_condition(Attribute.PRINCIPAL, when, (*path, "when", index))


def _look_at_rule(rule: PolicyRule, path: FieldPath) -> Iterator[Notice]:
    for index, source in enumerate(rule.sources):
        yield from _look_at_part(source, (*path, "from", index, "source"))
    for index, operation in enumerate(rule.operations):
        yield from _look_at_part(operation, (*path, "to", index, "operation"))
    for index, when in enumerate(rule.conditions):
        attribute, _ = parse_key(when.key)
        here: FieldPath = (*path, "when", index)
        if attribute is Attribute.UNKNOWN:
            yield Notice(
                (*here, "key"), "waypoints do not know this attribute: an ALLOW rule with it never matches, a DENY rule as if without"
            )
        elif attribute in _PATTERN_KEYS:
            yield from _look_at_condition(attribute, when, here)


def _look_at_condition(attribute: Attribute, when: Condition, path: FieldPath) -> Iterator[Notice]:
    for key, values in (("values", when.values), ("notValues", when.not_values)):
        for at, value in enumerate(values):
            if _has_star_within(value):
                yield Notice((*path, key, at), _STAR_ALONE)
            elif attribute is Attribute.PRINCIPAL and _is_no_identity(value):
                yield Notice((*path, key, at), _NO_IDENTITY)


def _look_at_part(part: Mapping[str, tuple[str, ...]], path: FieldPath) -> Iterator[Notice]:
    for name, values in part.items():
        positive = f"{name[3].lower()}{name[4:]}" if name.startswith("not") else name
        for index, value in enumerate(values):
            for message in _look_at_value(positive, value):
                yield Notice((*path, name, index), message)


def _look_at_value(name: str, value: str) -> Iterator[str]:
    templated = name == "paths" and any(segment in TEMPLATE_OPERATORS for segment in value.split("/"))
    if name in _PATTERNS and not templated and _has_star_within(value):
        yield _STAR_ALONE
    match name:
        case "principals" if not _has_star_within(value) and _is_no_identity(value):
            yield _NO_IDENTITY
        case "paths":
            if not value.startswith(("/", "*")):
                yield "no path matches that: paths begin with '/'"
            if "?" in value or "#" in value:
                yield "no path matches that: paths are compared without query and fragment"
        case "methods":
            if not _TOKEN.fullmatch(value):
                yield "no method matches that"
            elif value.upper() in _METHODS and value != value.upper():
                yield f"methods are compared exactly: '{value}' is not {value.upper()}"
        case "hosts" if "/" in value:
            yield "no host matches that: a host is written without scheme and path"


def _has_star_within(value: str) -> bool:
    """A ``*`` that no pattern begins or ends with."""
    return "*" in (value[:-1] if value.endswith("*") and not value.startswith("*") else value[1:])


def _is_no_identity(principal: str) -> bool:
    """Of what is no pattern: those have a ``*`` first or last."""
    return "*" not in principal and not _IDENTITY.fullmatch(principal)


_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"})

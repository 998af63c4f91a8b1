"""AuthorizationPolicy and PeerAuthentication as Istio's API defines them, read strictly: what would make a policy wider by
accident (a typo in a field's name, an empty ``from:``, a CIDR that is none) is a mistake, never an absence.

Istio's webhook refuses the same at admission; a directory has no webhook.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mesh.kube.fields import Fields, did_you_mean
from mesh.kube.objects import KubeObject, SourceProblem
from mesh.model.address import InvalidAddress, parse_cidr
from mesh.model.labels import DRY_RUN

ACTIONS = ("ALLOW", "DENY", "AUDIT", "CUSTOM")
MTLS_MODES = ("UNSET", "DISABLE", "PERMISSIVE", "STRICT")

_SOURCE = ("principals", "requestPrincipals", "namespaces", "ipBlocks", "remoteIpBlocks", "serviceAccounts", "trustDomains")
_OPERATION = ("hosts", "ports", "methods", "paths")
_CONDITION_KEYS = (
    "source.ip",
    "source.namespace",
    "source.principal",
    "source.serviceAccount",
    "source.trustDomain",
    "remote.ip",
    "destination.ip",
    "destination.port",
    "connection.sni",
    "request.auth.principal",
    "request.auth.audiences",
    "request.auth.presenter",
)
_CONDITION_FAMILIES = re.compile(r"(request\.headers|request\.auth\.claims|experimental\.envoy\.filters\..+)(\[.+\])+\Z")


def _negated(name: str) -> str:
    return f"not{name[0].upper()}{name[1:]}"


SOURCE_ATTRIBUTES = tuple(both for name in _SOURCE for both in (name, _negated(name)))
OPERATION_ATTRIBUTES = tuple(both for name in _OPERATION for both in (name, _negated(name)))


@dataclass(frozen=True, slots=True)
class Condition:
    """One ``when``: an attribute and the values it must and must not have."""

    key: str
    values: tuple[str, ...]
    not_values: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PolicyRule:
    """One of ``rules``: AND of three parts, OR within ``sources`` and ``operations``; an empty part does not restrict.

    A source or operation is a mapping of the attributes that are given, each with at least one value.
    """

    sources: tuple[Mapping[str, tuple[str, ...]], ...]
    operations: tuple[Mapping[str, tuple[str, ...]], ...]
    conditions: tuple[Condition, ...]


@dataclass(frozen=True, slots=True)
class AuthorizationPolicy:
    namespace: str
    name: str
    selector: Mapping[str, str] | None
    """None: no selector given. An empty one selects every pod."""
    has_target_refs: bool
    action: str
    rules: tuple[PolicyRule, ...]
    dry_run: bool


@dataclass(frozen=True, slots=True)
class PeerAuthentication:
    namespace: str
    name: str
    selector: Mapping[str, str] | None
    mode: str
    """One of `MTLS_MODES`; ``UNSET`` where none is given."""
    port_modes: Mapping[int, str]


def read_authorization_policy(obj: KubeObject) -> tuple[AuthorizationPolicy, tuple[SourceProblem, ...]]:
    """The policy and every mistake in it. With a mistake, what could be read is still there, but says less than was meant."""
    fields = Fields(obj, strict=True)
    fields.refuse_unknown("apiVersion", "kind", "metadata", "spec", "status")
    spec = fields.mapping("spec") or Fields(obj, ("spec",), {}, fields.problems)
    spec.refuse_unknown("selector", "targetRef", "targetRefs", "rules", "action", "provider")
    dry_run = obj.annotations.get(DRY_RUN, "false")
    if dry_run not in ("true", "false"):
        fields.problems.append(obj.problem(("metadata", "annotations", DRY_RUN), f'expected "true" or "false", found \'{dry_run}\''))
    policy = AuthorizationPolicy(
        namespace=obj.namespace,
        name=obj.name,
        selector=_read_selector(spec),
        has_target_refs=_read_target_refs(spec),
        action=spec.string("action", "ALLOW", choices=ACTIONS),
        rules=tuple(_read_rule(rule) for rule in spec.mappings("rules")),
        dry_run=dry_run == "true",
    )
    if policy.selector is not None and policy.has_target_refs:
        spec.complain("selector", "a policy takes a selector or targetRefs, not both")
    return policy, tuple(fields.problems)


def read_peer_authentication(obj: KubeObject) -> tuple[PeerAuthentication, tuple[SourceProblem, ...]]:
    """The policy and every mistake in it."""
    fields = Fields(obj, strict=True)
    fields.refuse_unknown("apiVersion", "kind", "metadata", "spec", "status")
    spec = fields.mapping("spec") or Fields(obj, ("spec",), {}, fields.problems)
    spec.refuse_unknown("selector", "mtls", "portLevelMtls")
    selector = _read_selector(spec)
    port_modes = _read_port_modes(spec)
    if port_modes and not selector:
        spec.complain("portLevelMtls", "needs a selector: modes of single ports are for the workloads of one application")
    return PeerAuthentication(obj.namespace, obj.name, selector, _read_mode(spec, "mtls"), port_modes), tuple(fields.problems)


def _read_selector(spec: Fields) -> Mapping[str, str] | None:
    selector = spec.mapping("selector")
    if selector is None:
        return None
    selector.refuse_unknown("matchLabels")
    return selector.string_map("matchLabels")


def _read_target_refs(spec: Fields) -> bool:
    """Whether the policy is for waypoints. What it targets matters to them alone."""
    one = spec.mapping("targetRef")
    several = spec.mappings("targetRefs")
    if spec.is_empty("targetRefs"):
        spec.complain("targetRefs", "is empty: add an item, or leave 'targetRefs' out")
    return one is not None or bool(several)


def _read_mode(parent: Fields, key: str) -> str:
    mtls = parent.mapping(key)
    if mtls is None:
        return "UNSET"
    mtls.refuse_unknown("mode")
    return mtls.string("mode", "UNSET", choices=MTLS_MODES)


def _read_port_modes(spec: Fields) -> dict[int, str]:
    ports = spec.mapping("portLevelMtls")
    modes: dict[int, str] = {}
    for key in ports or ():
        assert ports is not None
        if _is_port(key):
            modes[int(key)] = _read_mode(ports, key)
        else:
            ports.complain(key, f"expected a port from 1 to 65535, found '{key}'")
    return modes


def _read_rule(rule: Fields) -> PolicyRule:
    misplaced = dict.fromkeys(("source", *SOURCE_ATTRIBUTES), "'from.source'")
    misplaced |= dict.fromkeys(("operation", *OPERATION_ATTRIBUTES), "'to.operation'")
    _refuse_misplaced(rule, misplaced, "from", "to", "when")
    return PolicyRule(
        sources=tuple(_read_attributes(item, "source", SOURCE_ATTRIBUTES) for item in _not_empty(rule, "from")),
        operations=tuple(_read_attributes(item, "operation", OPERATION_ATTRIBUTES) for item in _not_empty(rule, "to")),
        conditions=tuple(_read_condition(item) for item in _not_empty(rule, "when")),
    )


def _not_empty(rule: Fields, key: str) -> tuple[Fields, ...]:
    items = rule.mappings(key)
    if key in rule and rule.is_empty(key):
        rule.complain(key, f"is empty: add an item, or leave '{key}' out to match everything")
    return items


def _read_attributes(item: Fields, key: str, known: tuple[str, ...]) -> Mapping[str, tuple[str, ...]]:
    _refuse_misplaced(item, dict.fromkeys(known, f"'{key}'"), key)
    part = item.mapping(key, required=True)
    if part is None:
        return {}
    part.refuse_unknown(*known)
    attributes = {name: _read_values(part, name, _CHECKS.get(name)) for name in known if name in set(part)}
    if item.is_empty(key):
        item.complain(key, "is empty: name at least one attribute")
    return attributes


def _refuse_misplaced(fields: Fields, misplaced: Mapping[str, str], *known: str) -> None:
    """Unknown fields, with where they belong when they are known elsewhere: indentation is the commonest typo in a policy."""
    for key in fields:
        if key not in known:
            home = misplaced.get(key)
            fields.complain(key, f"unknown field; it belongs under {home}" if home else f"unknown field{did_you_mean(key, known)}")


def _read_condition(item: Fields) -> Condition:
    item.refuse_unknown("key", "values", "notValues")
    key = item.string("key", required=True)
    if key and key not in _CONDITION_KEYS and not _CONDITION_FAMILIES.match(key):
        item.complain("key", f"unknown attribute '{key}'{did_you_mean(key, _CONDITION_KEYS)}")
    check = {"source.ip": _check_cidr, "destination.ip": _check_cidr, "remote.ip": _check_cidr, "destination.port": _check_port}.get(key)
    if "values" not in item and "notValues" not in item:
        item.complain(None, "'values' or 'notValues' is required")
    return Condition(key, _read_values(item, "values", check), _read_values(item, "notValues", check))


def _read_values(part: Fields, key: str, check: Callable[[str], str | None] | None) -> tuple[str, ...]:
    values = part.strings(key)
    if key in part and part.is_empty(key):
        part.complain(key, f"is empty: give at least one value, or leave '{key}' out")
    for index, value in enumerate(values):
        mistake = "an empty text matches nothing" if not value else check(value) if check else None
        if mistake:
            part.complain(key, mistake, index)
    return values


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 5 and 0 < int(text) < 65536


def _check_port(text: str) -> str | None:
    return None if _is_port(text) else f"expected a port from 1 to 65535, found '{text}'"


def _check_cidr(text: str) -> str | None:
    try:
        parse_cidr(text)
    except InvalidAddress as exc:
        return str(exc)
    return None


def _check_service_account(text: str) -> str | None:
    namespace, slash, name = text.rpartition("/")
    if not name or (slash and not namespace) or "/" in namespace:
        return f"expected a service account as 'name' or 'namespace/name', found '{text}'"
    if "*" in text:
        return f"a service account is named in full, without '*', found '{text}'; 'principals' takes patterns"
    return None


def _check_principal(text: str) -> str | None:
    if text.startswith("spiffe://"):
        return "a principal is written without 'spiffe://'"
    return None


_CHECKS: Mapping[str, Callable[[str], str | None]] = {
    both: check
    for name, check in {
        "ports": _check_port,
        "ipBlocks": _check_cidr,
        "remoteIpBlocks": _check_cidr,
        "serviceAccounts": _check_service_account,
        "principals": _check_principal,
    }.items()
    for both in (name, _negated(name))
}

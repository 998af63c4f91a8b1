"""AuthorizationPolicy and PeerAuthentication as Istio's API defines them, read strictly: what would make a policy wider by
accident (a typo in a field's name, an empty ``from:``, a CIDR that is none) is a mistake, never an absence.

Istio's webhook refuses the same at admission; a directory has no webhook.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from mesh.kube.addresses import CIDR, PORT
from mesh.kube.fields import Fields, Rule, Text, did_you_mean
from mesh.kube.objects import KubeObject, SourceProblem
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
_CONDITION_FAMILIES = re.compile(r"(request\.headers|request\.auth\.claims|experimental\.envoy\.filters\..+)(\[.+\])+")
MAX_ITEMS = 512
"""Rules in a policy, and items in each part of a rule; as Istio's schema."""
MAX_PORT_MODES = 512


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
    return parse_authorization_policy(fields), tuple(fields.problems)


def parse_authorization_policy(fields: Fields) -> AuthorizationPolicy:
    """``fields`` of the whole object, strict."""
    obj = fields.whole
    fields.refuse_unknown("apiVersion", "kind", "metadata", "spec", "status")
    spec = fields.mapping("spec") or Fields(obj, ("spec",), {}, fields.problems)
    spec.refuse_unknown("selector", "targetRef", "targetRefs", "rules", "action", "provider")
    spec.mapping("provider")
    dry_run = obj.annotations.get(DRY_RUN, "false")
    if dry_run not in ("true", "false"):
        fields.complain("metadata", f'expected "true" or "false", found \'{dry_run}\'', "annotations", DRY_RUN)
    policy = AuthorizationPolicy(
        namespace=obj.namespace,
        name=obj.name,
        selector=_read_selector(spec),
        has_target_refs=_read_target_refs(spec),
        action=spec.string("action", "ALLOW", choices=ACTIONS),
        rules=tuple(_read_rule(rule) for rule in spec.mappings("rules", most=MAX_ITEMS)),
        dry_run=dry_run == "true",
    )
    spec.demand(_SELECTOR_OR_TARGETS, [("selector",)] if policy.selector is not None and policy.has_target_refs else ())
    return policy


def read_peer_authentication(obj: KubeObject) -> tuple[PeerAuthentication, tuple[SourceProblem, ...]]:
    """The policy and every mistake in it."""
    fields = Fields(obj, strict=True)
    return parse_peer_authentication(fields), tuple(fields.problems)


def parse_peer_authentication(fields: Fields) -> PeerAuthentication:
    """``fields`` of the whole object, strict."""
    obj = fields.whole
    fields.refuse_unknown("apiVersion", "kind", "metadata", "spec", "status")
    spec = fields.mapping("spec") or Fields(obj, ("spec",), {}, fields.problems)
    spec.refuse_unknown("selector", "mtls", "portLevelMtls")
    selector = _read_selector(spec)
    mtls = spec.mapping("mtls")
    port_modes = spec.map_of("portLevelMtls", PORT, _read_mode, most=MAX_PORT_MODES)
    spec.demand(_PORTS_NEED_SELECTOR, [("portLevelMtls",)] if port_modes and not selector else ())
    modes = {int(port): mode for port, mode in port_modes.items()}
    return PeerAuthentication(obj.namespace, obj.name, selector, _read_mode(mtls) if mtls else "UNSET", modes)


_SELECTOR_OR_TARGETS = Rule(
    "a policy takes a selector or targetRefs, not both",
    "!has(self.selector) || !(has(self.targetRef) || has(self.targetRefs))",
    "selector",
)
_PORTS_NEED_SELECTOR = Rule(
    "needs a selector: modes of single ports are for the workloads of one application",
    "!has(self.portLevelMtls) || size(self.portLevelMtls) == 0 || "
    "(has(self.selector) && has(self.selector.matchLabels) && size(self.selector.matchLabels) > 0)",
    "portLevelMtls",
)


def _read_selector(spec: Fields) -> Mapping[str, str] | None:
    selector = spec.mapping("selector")
    if selector is None:
        return None
    selector.refuse_unknown("matchLabels")
    return selector.string_map("matchLabels")


def _read_target_refs(spec: Fields) -> bool:
    """Whether the policy is for waypoints. What it targets matters to them alone."""
    one = spec.mapping("targetRef")
    several = spec.mappings("targetRefs", empty="is empty: add an item, or leave 'targetRefs' out")
    return one is not None or bool(several)


def _read_mode(mtls: Fields) -> str:
    mtls.refuse_unknown("mode")
    return mtls.string("mode", "UNSET", choices=MTLS_MODES)


def _read_rule(rule: Fields) -> PolicyRule:
    misplaced = dict.fromkeys(("source", *SOURCE_ATTRIBUTES), "'from.source'")
    misplaced |= dict.fromkeys(("operation", *OPERATION_ATTRIBUTES), "'to.operation'")
    _refuse_misplaced(rule, misplaced, "from", "to", "when")
    sources, operations, conditions = (rule.mappings(key, empty=_empty(key), most=MAX_ITEMS) for key in ("from", "to", "when"))
    return PolicyRule(
        sources=tuple(_read_attributes(item, "source", SOURCE_ATTRIBUTES) for item in sources),
        operations=tuple(_read_attributes(item, "operation", OPERATION_ATTRIBUTES) for item in operations),
        conditions=tuple(_read_condition(item) for item in conditions),
    )


def _empty(key: str) -> str:
    return f"is empty: add an item, or leave '{key}' out to match everything"


def _read_attributes(item: Fields, key: str, known: tuple[str, ...]) -> Mapping[str, tuple[str, ...]]:
    _refuse_misplaced(item, dict.fromkeys(known, f"'{key}'"), key)
    part = item.mapping(key, required=True, empty="is empty: name at least one attribute")
    if part is None:
        return {}
    part.refuse_unknown(*known)
    attributes = ((name, _read_values(part, name, _TEXTS.get(name, _VALUE))) for name in known)
    return {name: values for name, values in attributes if values}


def _refuse_misplaced(fields: Fields, misplaced: Mapping[str, str], *known: str) -> None:
    """Unknown fields, with where they belong when they are known elsewhere: indentation is the commonest typo in a policy."""
    hints = {key: f"; it belongs under {home}" for key, home in misplaced.items()}
    fields.refuse_unknown(*known, hints=hints)


def _read_condition(item: Fields) -> Condition:
    item.refuse_unknown("key", "values", "notValues")
    key = item.string("key", required=True, text=_CONDITION_KEY)
    item.require_one_of("values", "notValues")
    text = {"source.ip": _ADDRESS, "destination.ip": _ADDRESS, "remote.ip": _ADDRESS, "destination.port": _PORT}.get(key, _VALUE)
    return Condition(key, _read_values(item, "values", text), _read_values(item, "notValues", text))


def _read_values(part: Fields, key: str, text: Text) -> tuple[str, ...]:
    return part.strings(key, empty=f"is empty: give at least one value, or leave '{key}' out", text=text)


def _not_empty(text: Text) -> Text:
    """``text``, and something at all."""

    def find_mistake(value: str) -> str | None:
        return text.find_mistake(value) if value else "an empty text matches nothing"

    return Text(find_mistake, {"minLength": 1, **text.schema})


def _find_key_mistake(key: str) -> str | None:
    if key in _CONDITION_KEYS or _CONDITION_FAMILIES.fullmatch(key):
        return None
    return f"unknown attribute '{key}'{did_you_mean(key, _CONDITION_KEYS)}"


def _find_account_mistake(text: str) -> str | None:
    namespace, slash, name = text.rpartition("/")
    if not name or (slash and not namespace) or "/" in namespace:
        return f"expected a service account as 'name' or 'namespace/name', found '{text}'"
    if "*" in text:
        return f"a service account is named in full, without '*', found '{text}'; 'principals' takes patterns"
    return None


def _find_principal_mistake(text: str) -> str | None:
    return "a principal is written without 'spiffe://'" if text.startswith("spiffe://") else None


_CONDITION_KEY = Text(_find_key_mistake, {"pattern": f"^({'|'.join(map(re.escape, _CONDITION_KEYS))}|{_CONDITION_FAMILIES.pattern})$"})
_VALUE = _not_empty(Text(lambda value: None))
_PORT = _not_empty(PORT)
_ADDRESS = _not_empty(CIDR)
_TEXTS: Mapping[str, Text] = {
    both: text
    for name, text in {
        "ports": _PORT,
        "ipBlocks": _ADDRESS,
        "remoteIpBlocks": _ADDRESS,
        "serviceAccounts": _not_empty(Text(_find_account_mistake, {"pattern": "^([^/*]+/)?[^/*]+$"})),
        "principals": _not_empty(Text(_find_principal_mistake, {"not": {"pattern": "^spiffe://"}})),
    }.items()
    for both in (name, _negated(name))
}

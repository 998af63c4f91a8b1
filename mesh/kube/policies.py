"""AuthorizationPolicy and PeerAuthentication as Istio's API defines them, read strictly: what would make a policy wider by
accident (a typo in a field's name, an empty ``from:``, a CIDR that is none) is a mistake, never an absence.

Istio's webhook refuses the same at admission; a directory has no webhook. What Istio takes and then never matches anything is no mistake
here either: whoever translates the policy tells of it (`istiod_py.translate.l7.notices`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from mesh.kube.addresses import CIDR, PORT
from mesh.kube.fields import Fields, Rule, Text, did_you_mean
from mesh.kube.objects import FieldPath, KubeObject, SourceProblem
from mesh.kube.targets import Audience, TargetRef, read_attachment
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
_CONDITION_FAMILIES = re.compile(
    r"request\.headers\[[!#$%&'*+.^_`|~0-9A-Za-z-]+\]|request\.auth\.claims(\[[^\[\]]+\])+|experimental\.envoy\.filters\..+\[.+\]"
)
_WITHOUT_IDENTITY = ("ipBlocks", "remoteIpBlocks")
"""What a CUSTOM policy may say of a source: the authorizer is asked before identities and tokens are looked at."""
_IDENTITY_KEYS = ("source.namespace", "source.serviceAccount", "source.trustDomain", "source.principal", "request.auth.")
MAX_ITEMS = 512
"""Rules in a policy, and items in each part of a rule; as Istio's schema."""
MAX_PORT_MODES = 512
MAX_ACCOUNTS = 16
MAX_ACCOUNT = 320
"""Service accounts in a list, and characters of one; Istio's bounds."""


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
    audience: Audience
    action: str
    rules: tuple[PolicyRule, ...]
    dry_run: bool
    targets: tuple[TargetRef, ...] = ()
    provider: str = ""
    """The name of the external authorizer that a CUSTOM policy asks."""


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
    attachment = read_attachment(spec)
    dry_run = obj.annotations.get(DRY_RUN, "false")
    if dry_run not in ("true", "false"):
        fields.complain("metadata", f'expected "true" or "false", found \'{dry_run}\'', "annotations", DRY_RUN)
    policy = AuthorizationPolicy(
        namespace=obj.namespace,
        name=obj.name,
        selector=attachment.selector,
        audience=attachment.audience,
        action=spec.string("action", "ALLOW", choices=ACTIONS),
        rules=tuple(_read_rule(rule) for rule in spec.mappings("rules", most=MAX_ITEMS)),
        dry_run=dry_run == "true",
        targets=attachment.targets,
        provider=_read_provider(spec),
    )
    _check_action(policy, spec)
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


def _read_provider(spec: Fields) -> str:
    provider = spec.mapping("provider")
    if provider is None:
        return ""
    provider.refuse_unknown("name")
    return provider.string("name", required=True, text=_VALUE)


def _check_action(policy: AuthorizationPolicy, spec: Fields) -> None:
    """What some actions need and others do not take."""
    custom = policy.action == "CUSTOM"
    spec.demand(_NEVER_TRIGGERED, [("action",)] if policy.action in ("DENY", "CUSTOM") and not policy.rules else ())
    spec.demand(_CUSTOM_NEEDS_PROVIDER, [("action",)] if custom and "provider" not in spec else ())
    spec.demand(_PROVIDER_FOR_CUSTOM, [("provider",)] if not custom and "provider" in spec else ())
    for path in _identities_in(policy) if custom else ():
        spec.complain(path[0], "a CUSTOM policy is applied before the caller's identity and token are known", *path[1:])


def _identities_in(policy: AuthorizationPolicy) -> Iterator[FieldPath]:
    """Where the rules ask who the caller is; paths from ``spec``."""
    known = {*_WITHOUT_IDENTITY, *map(_negated, _WITHOUT_IDENTITY)}
    for index, rule in enumerate(policy.rules):
        for position, source in enumerate(rule.sources):
            yield from (("rules", index, "from", position, "source", name) for name in source if name not in known)
        for position, when in enumerate(rule.conditions):
            if when.key.startswith(_IDENTITY_KEYS):
                yield "rules", index, "when", position, "key"


_NEVER_TRIGGERED = Rule(
    "without rules a DENY or CUSTOM policy never matches anything: add an empty rule, {}, to match everything",
    "!has(self.action) || !(self.action in ['DENY', 'CUSTOM']) || (has(self.rules) && size(self.rules) > 0)",
    "action",
)
_CUSTOM_NEEDS_PROVIDER = Rule(
    "a CUSTOM policy needs provider.name, the external authorizer to ask",
    "!has(self.action) || self.action != 'CUSTOM' || has(self.provider)",
    "action",
)
_PROVIDER_FOR_CUSTOM = Rule(
    "only a CUSTOM policy asks a provider", "!has(self.provider) || (has(self.action) && self.action == 'CUSTOM')", "provider"
)


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
    attributes = {name: _read_values(part, name, _TEXTS.get(name, _VALUE), _MOST.get(name)) for name in known}
    if "serviceAccounts" in known:
        beside = _names_account(attributes) and any(attributes[name] for name in _NO_ACCOUNTS_BESIDE)
        if beside:
            # No rule for API servers: in a list of lists it would cost more than they let a definition cost.
            part.complain(next(name for name in _ACCOUNTS if attributes[name]), _ACCOUNTS_ALONE)
    return {name: values for name, values in attributes.items() if values}


def _names_account(attributes: Mapping[str, tuple[str, ...]]) -> bool:
    return any(attributes[name] for name in _ACCOUNTS)


_ACCOUNTS: Final = ("serviceAccounts", "notServiceAccounts")
_NO_ACCOUNTS_BESIDE: Final = ("principals", "notPrincipals", "namespaces", "notNamespaces")
_MOST: Final = dict.fromkeys(_ACCOUNTS, MAX_ACCOUNTS)
_ACCOUNTS_ALONE: Final = "service accounts can't stand beside principals or namespaces: one of them says it all"


def _refuse_misplaced(fields: Fields, misplaced: Mapping[str, str], *known: str) -> None:
    """Unknown fields, with where they belong when they are known elsewhere: indentation is the commonest typo in a policy."""
    hints = {key: f"; it belongs under {home}" for key, home in misplaced.items()}
    fields.refuse_unknown(*known, hints=hints)


def _read_condition(item: Fields) -> Condition:
    item.refuse_unknown("key", "values", "notValues")
    key = item.string("key", required=True, text=_CONDITION_KEY)
    item.require_one_of("values", "notValues")
    text = _CONDITION_TEXTS.get(key, _VALUE)
    most = MAX_ACCOUNTS if key == "source.serviceAccount" else None
    return Condition(key, _read_values(item, "values", text, most), _read_values(item, "notValues", text, most))


def _read_values(part: Fields, key: str, text: Text, most: int | None = None) -> tuple[str, ...]:
    return part.strings(key, empty=f"is empty: give at least one value, or leave '{key}' out", most=most, text=text)


def _not_empty(text: Text) -> Text:
    """``text``, and something at all."""

    def find_mistake(value: str) -> str | None:
        return text.find_mistake(value) if value else "an empty text matches nothing"

    return Text(find_mistake, {"minLength": 1, **text.schema})


def _find_key_mistake(key: str) -> str | None:
    if key in _CONDITION_KEYS or _CONDITION_FAMILIES.fullmatch(key):
        return None
    family = key.partition("[")[0]
    if family in _FAMILY_FORMS:
        return f"expected {_FAMILY_FORMS[family]}, found '{key}'"
    if family in _GONE:
        return f"'{key}' is no attribute any more: {_GONE[family]}"
    return f"unknown attribute '{key}'{did_you_mean(key, _CONDITION_KEYS)}"


_FAMILY_FORMS: Final = {
    "request.headers": "request.headers[NAME] with the name of a header",
    "request.auth.claims": "request.auth.claims[NAME], or [NAME][NAME] for a claim within a claim",
}
_GONE: Final = {
    "destination.labels": "use the policy's selector",
    "destination.namespace": "a policy is for its own namespace",
    "destination.name": "use the policy's targetRefs",
    "destination.user": "use the policy's selector or targetRefs",
}


def _find_account_mistake(text: str) -> str | None:
    namespace, slash, name = text.rpartition("/")
    if not name or (slash and not namespace) or "/" in namespace:
        return f"expected a service account as 'name' or 'namespace/name', found '{text}'"
    if "*" in text:
        return f"a service account is named in full, without '*', found '{text}'; 'principals' takes patterns"
    return f"has {len(text)} characters, of at most {MAX_ACCOUNT}" if len(text) > MAX_ACCOUNT else None


def _find_principal_mistake(text: str) -> str | None:
    return "a principal is written without 'spiffe://'" if text.startswith("spiffe://") else None


def _find_trust_domain_mistake(text: str) -> str | None:
    if "/" in text:
        return f"a trust domain has no '/', found '{text}'; 'principals' takes whole identities"
    stars = text.count("*")
    if stars > 1 or (stars == 1 and text[0] != "*" and text[-1] != "*"):
        return f"expected a trust domain with at most one '*', at its beginning or end, found '{text}'"
    return None


def _find_path_mistake(path: str) -> str | None:
    """Of templates; else anything goes, as in Istio: a ``*`` that is neither first nor last stands for itself."""
    if not ("{" in path or "}" in path):
        return None
    segments = path.strip("/").split("/")
    templated = any(segment in TEMPLATE_OPERATORS for segment in segments)
    for index, segment in enumerate(segments):
        if segment in TEMPLATE_OPERATORS:
            if "{**}" in segments[:index]:
                return f"{{**}} must be the last operator of a template, found '{path}'"
        elif "{" in segment or "}" in segment:
            return f"braces are for {{*}} and {{**}}, each a segment of its own, found '{segment}' in '{path}'"
        elif templated and not _LITERAL.fullmatch(segment):
            return f"expected a segment of letters, digits and -._~%!$&'()+,;:@= in a template, found '{segment}' in '{path}'"
    return None


TEMPLATE_OPERATORS: Final = ("{*}", "{**}")
"""In a path: one segment; and any number of characters, slashes too."""
_LITERAL: Final = re.compile(r"[a-zA-Z0-9\-._~%!$&'()+,;:@=]+")

_CONDITION_KEY = Text(_find_key_mistake, {"pattern": f"^({'|'.join(map(re.escape, _CONDITION_KEYS))}|{_CONDITION_FAMILIES.pattern})$"})
_VALUE = _not_empty(Text(lambda value: None))
_PORT = _not_empty(PORT)
_ADDRESS = _not_empty(CIDR)
_ACCOUNT = _not_empty(Text(_find_account_mistake, {"pattern": "^([^/*]+/)?[^/*]+$", "maxLength": MAX_ACCOUNT}))
_TRUST_DOMAIN = _not_empty(Text(_find_trust_domain_mistake, {"pattern": r"^(\*|\*?[^*/]+|[^*/]+\*)$"}))
_TEXTS: Mapping[str, Text] = {
    both: text
    for name, text in {
        "ports": _PORT,
        "ipBlocks": _ADDRESS,
        "remoteIpBlocks": _ADDRESS,
        "serviceAccounts": _ACCOUNT,
        "trustDomains": _TRUST_DOMAIN,
        "paths": _not_empty(Text(_find_path_mistake)),
        "principals": _not_empty(Text(_find_principal_mistake, {"not": {"pattern": "^spiffe://"}})),
    }.items()
    for both in (name, _negated(name))
}
_CONDITION_TEXTS: Mapping[str, Text] = {
    "source.ip": _ADDRESS,
    "destination.ip": _ADDRESS,
    "remote.ip": _ADDRESS,
    "destination.port": _PORT,
    "source.serviceAccount": _ACCOUNT,
    "source.trustDomain": _TRUST_DOMAIN,
}

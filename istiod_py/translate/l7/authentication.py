"""RequestAuthentications as waypoints apply them, with the key sets that the control plane has fetched (reference: Istio's JWKS resolver).

By default it is the control plane that fetches key sets: waypoints need no way to identity providers, and no waypoint asks for what another
has. Until a set is there its place is taken by one without keys, which verifies nothing: tokens are refused, requests without one pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from istiod_py.translate.l7.attachment import Fronted, find_feared_targets, find_targets
from istiod_py.translate.reading import Read
from mesh.kube.objects import ObjectKey, SourceProblem
from mesh.kube.requestauthentication import JwtRule as KubeRule
from mesh.kube.requestauthentication import RequestAuthentication as KubeAuthentication
from mesh.model.l7.policy import JwtHeader, JwtRule, RequestAuthentication
from mesh.model.l7.routing import Origin

NO_KEYS: Final = '{"keys":[]}'
"""Stands in for a key set that could not be had yet."""


@dataclass(frozen=True, slots=True, order=True)
class KeySource:
    """Where a key set comes from. ``uri`` empty: the discovery document of ``issuer`` says (OpenID Connect). Of a source with a URI the
    issuer does not matter, and is empty."""

    uri: str
    issuer: str = ""


@dataclass(frozen=True, slots=True)
class KeySets:
    """``fetched``: the key sets there are, as JSON. ``by_waypoints``: they fetch those with a URI themselves."""

    fetched: Mapping[KeySource, str] = field(default_factory=dict)
    by_waypoints: bool = False


def source_of(rule: KubeRule) -> KeySource | None:
    """None: the keys are in the rule."""
    if rule.jwks:
        return None
    return KeySource(rule.jwks_uri) if rule.jwks_uri else KeySource("", rule.issuer)


def find_wanted(authentications: Iterable[Read[KubeAuthentication]], *, by_waypoints: bool = False) -> dict[KeySource, float]:
    """The key sets that rules in use need, and how long fetching each may take, in seconds."""
    wanted: dict[KeySource, float] = {}
    for read in authentications:
        for rule in read.value.rules if read.good and read.value.audience.has_waypoints else ():
            source = source_of(rule)
            if source is not None and not (by_waypoints and source.uri):
                wanted[source] = max(rule.timeout, wanted.get(source, 0.0))
    return wanted


def find_key_problems(authentications: Iterable[Read[KubeAuthentication]], failures: Mapping[KeySource, str]) -> Iterator[SourceProblem]:
    """On the rules in use that need them, that these key sets could not be fetched, and what is used instead."""
    for read in authentications if failures else ():
        for index, rule in enumerate(read.value.rules) if read.good and read.value.audience.has_waypoints else ():
            source = source_of(rule)
            if source is not None and source in failures:
                path = ("spec", "jwtRules", index, "jwksUri" if source.uri else "issuer")
                yield read.obj.problem(path, f"key set {source.uri or source.issuer}: {failures[source]}")


def authentications_for(
    fronted: Fronted, authentications: Mapping[ObjectKey, Read[KubeAuthentication]], keys: KeySets, root_namespace: str
) -> dict[ObjectKey, RequestAuthentication]:
    """Of all RequestAuthentications those that this waypoint applies, in order of namespace and name."""
    result: dict[ObjectKey, RequestAuthentication] = {}
    for key in sorted(authentications):
        translated = authentication_for(fronted, authentications[key], keys, root_namespace)
        if translated is not None:
            result[key] = translated
    return result


def authentication_for(
    fronted: Fronted, read: Read[KubeAuthentication], keys: KeySets, root_namespace: str
) -> RequestAuthentication | None:
    """None: this waypoint has nothing to do with it."""
    policy = read.value
    if not policy.audience.has_waypoints:
        return None
    origin = Origin("RequestAuthentication", policy.namespace, policy.name)
    if not read.good:
        feared = find_feared_targets(policy.targets, read.problems, policy.namespace, fronted, root_namespace)
        return None if feared is None else RequestAuthentication(origin, feared, unreadable=str(read.problems[0]))
    targets = find_targets(policy.targets, policy.namespace, fronted, root_namespace)
    if targets is None:
        return None
    return RequestAuthentication(origin, targets, tuple(_translate(rule, keys) for rule in policy.rules))


def _translate(rule: KubeRule, keys: KeySets) -> JwtRule:
    source = source_of(rule)
    remote = keys.by_waypoints and source is not None and bool(source.uri)
    jwks = rule.jwks
    if source is not None and not remote:
        jwks = keys.fetched.get(source, NO_KEYS)
    return JwtRule(
        issuer=rule.issuer,
        audiences=rule.audiences,
        jwks=jwks,
        jwks_uri=rule.jwks_uri if remote else "",
        timeout=rule.timeout,
        from_headers=tuple(JwtHeader(header.name.lower(), header.prefix) for header in rule.from_headers),
        from_params=rule.from_params,
        from_cookies=rule.from_cookies,
        forward_token=rule.forward_token,
        payload_header=rule.payload_header.lower(),
        claim_headers=tuple((each.header.lower(), each.claim) for each in rule.claim_headers),
        space_delimited=rule.space_delimited,
    )

"""Values of AuthorizationPolicies as patterns, and trust domains that are names of one another (reference: Istio's authz builder)."""

from __future__ import annotations

from collections.abc import Iterable

import re2

from mesh.kube.policies import TEMPLATE_OPERATORS
from mesh.model.l7.matching import Exact, PathKind, PathMatch, Prefix, Present, Regex, Suffix, TextMatch
from mesh.model.l7.policy import Attribute, Predicate

DEFAULT_TRUST_DOMAIN = "cluster.local"
"""In policies it stands for the mesh's own, whatever that is called."""


def match_text(value: str, *, ignore_case: bool = False, non_empty: bool = True) -> TextMatch:
    """``*`` any, ``*x`` suffix, ``x*`` prefix, else exact; a ``*`` elsewhere stands for itself. ``non_empty``: ``*`` asks for something."""
    if value == "*":
        return Present(non_empty=non_empty)
    if value.startswith("*"):
        return Suffix(value[1:], ignore_case)
    if value.endswith("*"):
        return Prefix(value[:-1], ignore_case)
    return Exact(value, ignore_case)


def match_namespace(value: str) -> TextMatch:
    """Of namespaces a ``*`` stands for any text wherever it is."""
    if "*" in value.strip("*") or value.count("*") > 1:
        return Regex(".*".join(map(re2.escape, value.split("*"))))
    return match_text(value)


def match_paths(values: Iterable[str], *, negated: bool) -> Predicate:
    """Templates, prefixes and whole paths as paths; what asks for an end, or for anything, as texts."""
    paths: list[PathMatch] = []
    texts: list[TextMatch] = []
    for value in values:
        if any(segment in TEMPLATE_OPERATORS for segment in value.split("/")):
            paths.append(PathMatch(PathKind.TEMPLATE, value))
            continue
        match found := match_text(value):
            case Exact():
                paths.append(PathMatch(PathKind.EXACT, found.value))
            case Prefix():
                paths.append(PathMatch(PathKind.PREFIX, found.value))
            case _:
                texts.append(found)
    return Predicate(Attribute.PATH, negated, texts=tuple(texts), paths=tuple(paths))


def expand_principal(value: str, trust_domains: tuple[str, ...]) -> tuple[str, ...]:
    """A whole identity of one of the mesh's trust domains (the own one first) is meant in all of them. What is no whole identity, or leaves
    the trust domain open, stays as it is."""
    parts = value.split("/")
    if len(parts) != 5 or parts[0] == "*":
        return (value,)
    domain, rest = parts[0], "/".join(parts[1:])
    if domain != DEFAULT_TRUST_DOMAIN and not any(_is_domain(domain, known) for known in trust_domains):
        return (value,)
    return tuple(dict.fromkeys(value if _ends_alike(domain, known) else f"{known}/{rest}" for known in trust_domains))


def expand_trust_domains(values: Iterable[str], trust_domains: tuple[str, ...]) -> tuple[str, ...]:
    """A trust domain of the mesh stands for all of them."""
    return tuple(dict.fromkeys(name for value in values for name in (trust_domains if value in trust_domains else (value,))))


def _is_domain(pattern: str, domain: str) -> bool:
    """Istio's comparison of trust domains: exact, or by a ``*`` at either end."""
    if pattern.endswith("*"):
        return domain.startswith(pattern[:-1])
    return pattern == domain or _ends_alike(pattern, domain)


def _ends_alike(pattern: str, domain: str) -> bool:
    return pattern.startswith("*") and domain.endswith(pattern[1:])

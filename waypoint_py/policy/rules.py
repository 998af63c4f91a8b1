"""Rules of policies, compiled, and the first one among many that is true for a request, without asking each.

A group of rules is every rule of the policies of one action. Most rules name paths, callers or methods exactly; those are found by
look-up, so that a service with a thousand rules costs a request little more than one with ten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Generic, NamedTuple, TypeAlias, TypeVar

from mesh.model.l7.matching import Exact, PathKind
from mesh.model.l7.policy import Attribute, PolicyRule, Predicate
from waypoint_py.policy.facts import Facts
from waypoint_py.policy.predicates import HTTP_ONLY, Test, compile_predicate, cost
from waypoint_py.policy.texts import template_prefix

Tests: TypeAlias = tuple[Test, ...]


@dataclass(frozen=True, slots=True)
class Compiled:
    """A rule: any of ``sources``, any of ``operations`` and all ``conditions``; None or empty does not restrict."""

    sources: tuple[Tests, ...] | None
    operations: tuple[Tests, ...] | None
    conditions: Tests

    def is_true(self, facts: Facts) -> bool:
        # Loops rather than any() and all() of generators: this runs for every rule and request, at half the cost.
        for hits, wanted in self.conditions:
            if hits(facts) is not wanted:
                return False
        return (self.operations is None or _any(self.operations, facts)) and (self.sources is None or _any(self.sources, facts))


def _any(conjunctions: tuple[Tests, ...], facts: Facts) -> bool:
    for tests in conjunctions:
        for hits, wanted in tests:
            if hits(facts) is not wanted:
                break
        else:
            return True
    return False


def compile_rule(rule: PolicyRule, *, allows: bool) -> Compiled:
    """Raises Uncompilable. ``allows``: see `compile_predicate`."""
    return Compiled(
        _compile_part(rule.sources, allows=allows),
        _compile_part(rule.operations, allows=allows),
        _compile_all(rule.conditions, allows=allows),
    )


def without_http(rule: PolicyRule, *, allows: bool) -> PolicyRule | None:
    """The rule as it holds for a connection that carries no HTTP; None if it cannot match there.

    A rule that allows asks for more than can be known there, and is gone; of one that denies the rest remains, and it denies more.
    """
    predicates = [*(each for part in (rule.sources, rule.operations) for conjunction in part for each in conjunction), *rule.conditions]
    if not any(predicate.attribute in HTTP_ONLY for predicate in predicates):
        return rule
    if allows:
        return None
    return PolicyRule(_known_parts(rule.sources), _known_parts(rule.operations), _known(rule.conditions))


def _known(predicates: Iterable[Predicate]) -> tuple[Predicate, ...]:
    return tuple(predicate for predicate in predicates if predicate.attribute not in HTTP_ONLY)


def _known_parts(part: tuple[tuple[Predicate, ...], ...]) -> tuple[tuple[Predicate, ...], ...]:
    return tuple(_known(conjunction) for conjunction in part)


def _compile_part(part: tuple[tuple[Predicate, ...], ...], *, allows: bool) -> tuple[Tests, ...] | None:
    return tuple(_compile_all(conjunction, allows=allows) for conjunction in part) if part else None


def _compile_all(predicates: tuple[Predicate, ...], *, allows: bool) -> Tests:
    return tuple(compile_predicate(predicate, allows=allows) for predicate in sorted(predicates, key=cost))


# The index

T = TypeVar("T")

WORTH_AN_INDEX: Final = 8
"""Rules that are asked one after the other as fast as they would be looked up."""


class Ranked(NamedTuple, Generic[T]):
    """A rule and what is known of it, at its place in the order."""

    rank: int
    rule: Compiled
    what: T


class RuleGroup(Generic[T]):
    """Rules in the order in which they are asked. Each carries a ``what`` that the group does not look into."""

    __slots__ = ("_exact", "_prefixes", "_rest", "empty")

    def __init__(self, rules: Sequence[tuple[PolicyRule, Compiled, T]]) -> None:
        self.empty = not rules
        exact: dict[Attribute, dict[object, list[Ranked[T]]]] = {}
        prefixes: dict[int, dict[bytes, list[Ranked[T]]]] = {}
        rest: list[Ranked[T]] = []
        for rank, (source, compiled, what) in enumerate(rules):
            ranked = Ranked(rank, compiled, what)
            keys = _find_keys(source) if len(rules) > WORTH_AN_INDEX else None
            if keys is None:
                rest.append(ranked)
                continue
            for value in keys.values:
                exact.setdefault(keys.attribute, {}).setdefault(value, []).append(ranked)
            for prefix in keys.prefixes:
                prefixes.setdefault(len(prefix), {}).setdefault(prefix, []).append(ranked)
        self._rest = tuple(rest)
        self._exact = tuple((_KEYS[attribute], table) for attribute, table in exact.items())
        self._prefixes = tuple(prefixes.items())

    def find(self, facts: Facts) -> T | None:
        """What the first rule that is true carries."""
        best: Ranked[T] | None = None
        for key_of, table in self._exact:
            if (found := table.get(key_of(facts))) is not None:
                best = _first(found, facts, best)
        for length, prefixes in self._prefixes:
            if (found := prefixes.get(facts.path[:length])) is not None:
                best = _first(found, facts, best)
        best = _first(self._rest, facts, best)
        return None if best is None else best.what


def _first(rules: Sequence[Ranked[T]], facts: Facts, best: Ranked[T] | None) -> Ranked[T] | None:
    for ranked in rules:
        if best is not None and best.rank <= ranked.rank:
            return best
        if ranked.rule.is_true(facts):
            return ranked
    return best


@dataclass(frozen=True, slots=True)
class _Keys:
    """The rule can be true only if the attribute is one of ``values`` or, for a path, begins with one of ``prefixes``."""

    attribute: Attribute
    values: frozenset[object]
    prefixes: frozenset[bytes] = frozenset()


_KEYS: Final[dict[Attribute, Callable[[Facts], object]]] = {
    Attribute.PATH: lambda facts: facts.path,
    Attribute.PRINCIPAL: lambda facts: facts.peer.principal,
    Attribute.SERVICE_ACCOUNT: lambda facts: f"{facts.peer.namespace}/{facts.peer.service_account}",
    Attribute.NAMESPACE: lambda facts: facts.peer.namespace,
    Attribute.METHOD: lambda facts: None if facts.request is None else facts.request.method,
    Attribute.DESTINATION_PORT: lambda facts: facts.connection.destination.port,
}
"""In the order in which they tell rules apart best."""


def _find_keys(rule: PolicyRule) -> _Keys | None:
    for attribute in _KEYS:
        for part in (rule.operations, rule.sources, (rule.conditions,)):
            if (keys := _keys_of(attribute, part)) is not None:
                return keys
    return None


def _keys_of(attribute: Attribute, part: tuple[tuple[Predicate, ...], ...]) -> _Keys | None:
    """What every one of the conjunctions demands of the attribute, if each does."""
    values: set[object] = set()
    prefixes: set[bytes] = set()
    for conjunction in part:
        for predicate in conjunction:
            if predicate.attribute is attribute and not predicate.negated and _collect(predicate, values, prefixes):
                break
        else:
            return None
    return _Keys(attribute, frozenset(values), frozenset(prefixes)) if part else None


def _collect(predicate: Predicate, values: set[object], prefixes: set[bytes]) -> bool:
    """Whether all values of the predicate can be looked up; they are added then."""
    found: set[object] = set(predicate.ports)
    begins: set[bytes] = set()
    for text in predicate.texts:
        if not isinstance(text, Exact) or text.ignore_case:
            return False
        found.add(text.value.encode() if predicate.attribute in (Attribute.PATH, Attribute.METHOD) else text.value)
    for path in predicate.paths:
        prefix = (template_prefix(path.value) if path.kind is PathKind.TEMPLATE else path.value).encode()
        if path.ignore_case or not prefix:
            return False
        match path.kind:
            case PathKind.EXACT:
                found.add(prefix)
            case PathKind.PREFIX | PathKind.TEMPLATE:
                begins.add(prefix)
            case _:
                return False
    values |= found
    prefixes |= begins
    return True

"""Which route a request has: the first in order that matches, found without trying them all.

Every alternative of every route is filed under the one thing that narrows it down most: its exact path, the prefix its path must have, or
the exact value of a header or query parameter. A request then asks only those filed under what it has, and those under nothing, in order.
Filing never decides: the alternative's own predicates do, all of them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from heapq import merge
from typing import Final, NamedTuple

from mesh.model.l7.matching import Exact, PathKind, PathMatch, RouteMatch
from mesh.model.l7.routing import Route
from waypoint_py.http.message import Request
from waypoint_py.routing.actions import CompiledRoute, compile_route
from waypoint_py.routing.predicates import CompiledMatch, Seen, compile_match, describe, required_prefix, segment_prefix

FILED_FROM: Final = 8
"""Alternatives below which they are tried one by one: filing costs a request as much as that."""
CROWDED: Final = 8
"""Alternatives of one path that make it worth looking at a header or query parameter instead."""
MAX_SOURCES: Final = 8
"""Headers and parameters under whose values alternatives are filed; each costs every request a look."""


class Matched(NamedTuple):
    """``path``: what of the path matched, for rewrites and redirects. ``name``: the route's, with that of the match."""

    route: CompiledRoute
    path: PathMatch | None
    name: str
    because: str


class _Alternative(NamedTuple):
    match: CompiledMatch
    matched: Matched


class RouteTable:
    """The routes of one port of a service, in order."""

    __slots__ = ("_alternatives", "_always", "_filed", "_first", "routes")

    def __init__(self, routes: tuple[Route, ...], filed_from: int = FILED_FROM) -> None:
        self.routes = routes
        written = list(_reachable(routes))
        self._alternatives = [_compile_alternative(*each) for each in written]
        filed = len(written) >= filed_from
        self._filed = _Files([match for _, _, match in written]) if filed else None
        self._always = range(len(written))
        # The usual table: one route, for everything.
        first = self._alternatives[0] if self._alternatives else None
        self._first = first.matched if first is not None and not first.match.predicates else None

    def find(self, request: Request) -> Matched | None:
        """The first route that matches; None: there is none, and the answer is 404."""
        if self._first is not None:
            return self._first
        seen = Seen(request)
        alternatives = self._alternatives
        for index in self._always if self._filed is None else self._filed.candidates(seen):
            alternative = alternatives[index]
            if alternative.match.holds(seen):
                return alternative.matched
        return None


def compile_routes(routes: tuple[Route, ...]) -> RouteTable:
    """Ready for requests; never raises."""
    return RouteTable(routes)


def _reachable(routes: Iterable[Route]) -> Iterable[tuple[CompiledRoute, int, RouteMatch]]:
    """Every alternative with its number in its route, up to the first that takes every request."""
    for route in routes:
        compiled = compile_route(route)
        for number, match in enumerate(route.matches or (_EVERYTHING,)):
            yield compiled, number, match
            if match == RouteMatch(name=match.name):
                return


_EVERYTHING: Final = RouteMatch()


def _compile_alternative(route: CompiledRoute, number: int, match: RouteMatch) -> _Alternative:
    compiled = compile_match(match)
    if compiled.broken:
        reason = f"match {number}: {compiled.broken}" + (f"; {route.broken}" if route.broken else "")
        route = CompiledRoute(route.route, broken=reason)
    name = ".".join(filter(None, (route.route.name, match.name)))
    return _Alternative(compiled, Matched(route, match.path, name, f"{route.route.origin}: {describe(match)}"))


# Files ---------------------------------------------------------------------------------------------------------------------------------


class _Source(NamedTuple):
    """A header, or a query parameter."""

    query: bool
    name: bytes

    def values(self, seen: Seen) -> tuple[bytes, ...]:
        """Those of the request; several of a header, each of which counts."""
        if not self.query:
            values = seen.headers(self.name)
            return values if len(values) < 2 else tuple(set(values))
        value = seen.query(self.name)
        return () if value is None else (value,)


class _Under(NamedTuple):
    """What of a path an alternative is filed under."""

    exact: bool
    ignore_case: bool
    text: bytes


class _Files:
    """Numbers of alternatives, ascending in every list."""

    __slots__ = ("_always", "_exact", "_exact_folded", "_folds", "_prefixes", "_prefixes_folded", "_sources")

    def __init__(self, matches: Sequence[RouteMatch]) -> None:
        self._always: list[int] = []
        self._exact: dict[bytes, list[int]] = {}
        self._exact_folded: dict[bytes, list[int]] = {}
        self._sources: dict[_Source, dict[bytes, list[int]]] = {}
        prefixes: dict[bytes, list[int]] = {}
        folded: dict[bytes, list[int]] = {}
        under = [_path_of(match) for match in matches]
        crowd = Counter(under)
        values = [_exact_values(match) if crowd[path] > CROWDED else {} for match, path in zip(matches, under, strict=True)]
        frequent = Counter(source for each in values for source in each)
        sources = {source for source, _ in frequent.most_common(MAX_SOURCES)}
        for number, (path, named) in enumerate(zip(under, values, strict=True)):
            source = next((source for source in named if source in sources), None)
            if source is not None:
                self._sources.setdefault(source, {}).setdefault(named[source], []).append(number)
            elif path is None:
                self._always.append(number)
            elif path.exact:
                (self._exact_folded if path.ignore_case else self._exact).setdefault(path.text, []).append(number)
            else:
                (folded if path.ignore_case else prefixes).setdefault(path.text, []).append(number)
        self._prefixes = _Prefixes(prefixes)
        self._prefixes_folded = _Prefixes(folded)
        self._folds = bool(self._exact_folded or folded)

    def candidates(self, seen: Seen) -> Iterable[int]:
        """Every alternative that may match, in order; and few others."""
        lists = [self._always] if self._always else []
        path = seen.path
        if (found := self._exact.get(path)) is not None:
            lists.append(found)
        self._prefixes.find(path, lists)
        if self._folds:
            lower = path.lower()
            if (found := self._exact_folded.get(lower)) is not None:
                lists.append(found)
            self._prefixes_folded.find(lower, lists)
        for source, by_value in self._sources.items():
            for value in source.values(seen):
                if (found := by_value.get(value)) is not None:
                    lists.append(found)
        if not lists:
            return ()
        return lists[0] if len(lists) == 1 else merge(*lists)


def _path_of(match: RouteMatch) -> _Under | None:
    """None: the path says nothing, or nothing that one can look up."""
    path = match.path
    if path is None:
        return None
    fold = path.ignore_case
    if path.kind is PathKind.EXACT:
        return _Under(True, fold, _folded(path.value.encode(), fold))
    if path.kind is PathKind.PREFIX:
        prefix = path.value.encode()
    elif path.kind is PathKind.SEGMENTS:
        prefix = segment_prefix(path.value)
    else:
        prefix, fold = required_prefix(path), False
    return _Under(False, fold, _folded(prefix, fold)) if prefix else None


def _folded(text: bytes, ignore_case: bool) -> bytes:
    return text.lower() if ignore_case else text


def _exact_values(match: RouteMatch) -> dict[_Source, bytes]:
    """What headers and parameters must be, to the letter."""
    found: dict[_Source, bytes] = {}
    if isinstance(match.authority, Exact) and not match.authority.ignore_case:
        found[_Source(False, b":authority")] = match.authority.value.encode()
    for header in match.headers:
        if isinstance(header.match, Exact) and not header.match.ignore_case and not header.invert:
            found[_Source(False, header.name.encode())] = header.match.value.encode()
    for parameter in match.query:
        if isinstance(parameter.match, Exact) and not parameter.match.ignore_case:
            found[_Source(True, parameter.name.encode())] = parameter.match.value.encode()
    return found


class _Prefixes:
    """Which of many texts a path begins with. Sorted, the longest such text is the last one not after the path, or one that *that* begins
    with: so every text knows the longest other that it begins with."""

    __slots__ = ("_lists", "_parents", "_texts")

    def __init__(self, lists: dict[bytes, list[int]]) -> None:
        self._texts = sorted(lists)
        self._lists = [lists[text] for text in self._texts]
        self._parents: list[int] = []
        open_texts: list[int] = []
        for number, text in enumerate(self._texts):
            while open_texts and not text.startswith(self._texts[open_texts[-1]]):
                open_texts.pop()
            self._parents.append(open_texts[-1] if open_texts else -1)
            open_texts.append(number)

    def find(self, path: bytes, lists: list[list[int]]) -> None:
        """Add the lists of all texts that ``path`` begins with."""
        texts = self._texts
        number = bisect_right(texts, path) - 1
        while number >= 0:
            if path.startswith(texts[number]):
                lists.append(self._lists[number])
            number = self._parents[number]

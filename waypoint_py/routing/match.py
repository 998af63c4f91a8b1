"""Which route a request has: the first in order that matches, found without trying them all.

Every alternative of every route is filed under the one thing that narrows it down most: its exact path, the prefix its path must have, or
the exact value of a header or query parameter. A request then asks only those filed under what it has, and those under nothing, in order.
Filing never decides: the alternative's own predicates do, all of them. Lists that are for some hosts alone are filed under these.

What many ports share is compiled once: a table's alternatives, and a list of tables with its files. Both take their time (`Steps`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from heapq import merge
from typing import Final, NamedTuple

from mesh.http.message import Request
from mesh.model.l7.matching import Exact, PathKind, PathMatch, RouteMatch
from mesh.model.l7.routing import Precedence, Route, precedence
from waypoint_py.routing.actions import CompiledRoute, compile_route, split_port
from waypoint_py.routing.predicates import CompiledMatch, Seen, compile_match, describe, required_prefix, segment_prefix
from waypoint_py.steps import Steps, finish

FILED_FROM: Final = 8
"""Alternatives below which they are tried one by one: filing costs a request as much as that."""
CROWDED: Final = 8
"""Alternatives of one path that make it worth looking at a header or query parameter instead."""
MAX_SOURCES: Final = 8
"""Headers and parameters under whose values alternatives are filed; each costs every request a look."""
_AT_ONCE: Final = 64
"""Alternatives filed in one step."""


class Matched(NamedTuple):
    """``path``: what of the path matched, for rewrites and redirects. ``name``: the route's, with that of the match."""

    route: CompiledRoute
    path: PathMatch | None
    name: str
    because: str


class Alternative(NamedTuple):
    """One match of a route."""

    written: RouteMatch
    match: CompiledMatch
    matched: Matched


class CompiledTable:
    """Routes in order, each alternative ready. ``closed``: no request gets past them."""

    __slots__ = ("__weakref__", "alternatives", "closed", "routes")

    def __init__(self, routes: tuple[Route, ...], alternatives: list[Alternative], closed: bool) -> None:
        self.routes = routes
        self.alternatives = alternatives
        self.closed = closed


def compile_table(routes: tuple[Route, ...]) -> Steps[CompiledTable]:
    """Up to the first alternative that takes every request. Never raises."""
    alternatives: list[Alternative] = []
    for route in routes:
        compiled = compile_route(route)
        for number, match in enumerate(route.matches or (_EVERYTHING,)):
            alternatives.append(_compile_alternative(compiled, number, match))
            if match == RouteMatch(name=match.name):
                return CompiledTable(routes, alternatives, closed=True)
            yield
    return CompiledTable(routes, alternatives, closed=False)


class RouteList:
    """The routes of tables that follow each other, filed."""

    __slots__ = ("__weakref__", "_always", "_filed", "_tables", "alternatives", "first")

    def __init__(self, tables: Sequence[CompiledTable], filed: _Files | None) -> None:
        """``filed``: all alternatives, in order; None: they are few."""
        self._tables = tables
        self.alternatives = [alternative for table in tables for alternative in table.alternatives]
        self._filed = filed
        self._always = range(len(self.alternatives))
        # The usual list: one route, for everything.
        first = self.alternatives[0] if self.alternatives else None
        self.first = first.matched if first is not None and not first.match.predicates else None

    @property
    def size(self) -> int:
        """How many routes there are."""
        return sum(len(table.routes) for table in self._tables)

    def find(self, seen: Seen) -> Matched | None:
        """The first route that matches."""
        found = self.find_alternative(seen)
        return None if found is None else found.matched

    def find_alternative(self, seen: Seen) -> Alternative | None:
        alternatives = self.alternatives
        for index in self._always if self._filed is None else self._filed.candidates(seen):
            alternative = alternatives[index]
            if alternative.match.holds(seen):
                return alternative
        return None


class ListsBeside:
    """Lists of which each is in the order of precedence, as if they were one in that order."""

    __slots__ = ("_lists", "first")

    def __init__(self, lists: Sequence[RouteList]) -> None:
        self._lists = lists
        self.first: Matched | None = None

    @property
    def size(self) -> int:
        return sum(each.size for each in self._lists)

    def find(self, seen: Seen) -> Matched | None:
        """The first route that matches."""
        found = [each for routes in self._lists if (each := routes.find_alternative(seen)) is not None]
        if not found:
            return None
        return (found[0] if len(found) == 1 else min(found, key=_precedence)).matched


def _precedence(alternative: Alternative) -> Precedence:
    return precedence(alternative.matched.route.route, alternative.written)


def list_tables(tables: Sequence[CompiledTable], filed_from: int = FILED_FROM) -> Steps[RouteList]:
    """As one list, up to the first that no request gets past."""
    closed = next((number for number, table in enumerate(tables, 1) if table.closed), len(tables))
    matches = [alternative.written for table in tables[:closed] for alternative in table.alternatives]
    filed = (yield from _file(matches)) if len(matches) >= filed_from else None
    return RouteList(tables[:closed], filed)


class PortRoutes:
    """All that requests for one port are tried against: lists in order, some of them for some hosts alone, and then the port's own."""

    __slots__ = ("_always", "_by_host", "_by_suffix", "_first", "_lists", "_narrow", "_suffixes")

    def __init__(self, lists: Sequence[tuple[RouteList | ListsBeside, tuple[str, ...]]], own: RouteList) -> None:
        self._lists = [*(each for each, _ in lists), own]
        self._always: list[int] = []
        self._by_host: dict[bytes, list[int]] = {}
        self._by_suffix: dict[bytes, list[int]] = {}
        for number, (_, hosts) in enumerate((*lists, (own, ()))):
            if not hosts:
                self._always.append(number)
            for host in hosts:
                name = host.encode()
                filed, key = (self._by_suffix, name[1:]) if name.startswith(b"*") else (self._by_host, name)
                filed.setdefault(key, []).append(number)
        self._suffixes = sorted({len(suffix) for suffix in self._by_suffix})
        self._narrow = bool(self._by_host or self._by_suffix)
        self._first = self._lists[0].first if self._always[0] == 0 else None

    @property
    def size(self) -> int:
        """How many routes there are."""
        return sum(each.size for each in self._lists)

    def find(self, request: Request, port: int = 0) -> Matched | None:
        """The first route that matches a request for ``port`` of the service; None: there is none, and the answer is 404."""
        if self._first is not None:
            return self._first
        seen = Seen(request, port)
        for number in self._candidates(request) if self._narrow else self._always:
            if (found := self._lists[number].find(seen)) is not None:
                return found
        return None

    def _candidates(self, request: Request) -> Iterable[int]:
        """The lists that are for the request's host, in order."""
        host = split_port(request.authority)[0].lower()
        found = [self._always, self._by_host.get(host, [])]
        # One label or more, and none empty, in place of a star.
        if self._suffixes and not (b":" in host or b"/" in host or b".." in host or host.startswith(b".")):
            for length in self._suffixes:
                if length < len(host) and not host[:-length].endswith(b"."):
                    found.append(self._by_suffix.get(host[-length:], []))
        # A list that several of its hosts lead to is there more than once, and tried no more often than if it were not.
        return dict.fromkeys(merge(*found))


def compile_routes(routes: tuple[Route, ...], filed_from: int = FILED_FROM) -> PortRoutes:
    """A port's own routes, ready for requests; never raises."""
    return PortRoutes((), finish(list_tables([finish(compile_table(routes))], filed_from)))


_EVERYTHING: Final = RouteMatch()


def _compile_alternative(route: CompiledRoute, number: int, match: RouteMatch) -> Alternative:
    compiled = compile_match(match)
    if compiled.broken:
        reason = f"match {number}: {compiled.broken}" + (f"; {route.broken}" if route.broken else "")
        route = CompiledRoute(route.route, broken=reason)
    name = ".".join(filter(None, (route.route.name, match.name)))
    return Alternative(match, compiled, Matched(route, match.path, name, f"{route.route.origin}: {describe(match)}"))


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


class _Value(NamedTuple):
    """What one of them must be."""

    source: _Source
    value: bytes


class _Under(NamedTuple):
    """What of a path an alternative is filed under."""

    exact: bool
    ignore_case: bool
    text: bytes


class _Files:
    """Numbers of alternatives, ascending in every list."""

    __slots__ = ("_always", "_exact", "_exact_folded", "_folds", "_prefixes", "_prefixes_folded", "_sources")

    def __init__(self) -> None:
        self._always: list[int] = []
        self._exact: dict[bytes, list[int]] = {}
        self._exact_folded: dict[bytes, list[int]] = {}
        self._sources: dict[_Source, dict[bytes, list[int]]] = {}
        self._prefixes = self._prefixes_folded = _Prefixes({})
        self._folds = False

    def fill(self, under: Iterable[_Under | _Value | None]) -> Steps[None]:
        """``under``: of every alternative, what it is filed under."""
        prefixes: dict[bytes, list[int]] = {}
        folded: dict[bytes, list[int]] = {}
        for number, where in enumerate(under):
            if where is None:
                self._always.append(number)
            elif isinstance(where, _Value):
                self._sources.setdefault(where.source, {}).setdefault(where.value, []).append(number)
            elif where.exact:
                (self._exact_folded if where.ignore_case else self._exact).setdefault(where.text, []).append(number)
            else:
                (folded if where.ignore_case else prefixes).setdefault(where.text, []).append(number)
            if number % _AT_ONCE == 0:
                yield
        self._prefixes, self._prefixes_folded = _Prefixes(prefixes), _Prefixes(folded)
        yield
        yield from self._prefixes.link()
        yield from self._prefixes_folded.link()
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


def _file(matches: Sequence[RouteMatch]) -> Steps[_Files]:
    paths: list[_Under | None] = []
    crowd: Counter[_Under | None] = Counter()
    for match in matches:
        path = _path_of(match)
        paths.append(path)
        crowd[path] += 1
        yield
    values: list[dict[_Source, bytes]] = []
    for number, (match, path) in enumerate(zip(matches, paths, strict=True)):
        values.append(_exact_values(match) if crowd[path] > CROWDED else {})
        if number % _AT_ONCE == 0:
            yield
    frequent = Counter(source for each in values for source in each)
    sources = {source for source, _ in frequent.most_common(MAX_SOURCES)}
    files = _Files()
    yield from files.fill(_choose_file(path, named, sources) for path, named in zip(paths, values, strict=True))
    return files


def _choose_file(path: _Under | None, named: Mapping[_Source, bytes], sources: Collection[_Source]) -> _Under | _Value | None:
    source = next((source for source in named if source in sources), None)
    return path if source is None else _Value(source, named[source])


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

    def link(self) -> Steps[None]:
        """Find all parents. To be done before anything is found."""
        open_texts: list[int] = []
        for number, text in enumerate(self._texts):
            while open_texts and not text.startswith(self._texts[open_texts[-1]]):
                open_texts.pop()
            self._parents.append(open_texts[-1] if open_texts else -1)
            open_texts.append(number)
            if number % _AT_ONCE == 0:
                yield

    def find(self, path: bytes, lists: list[list[int]]) -> None:
        """Add the lists of all texts that ``path`` begins with."""
        texts = self._texts
        number = bisect_right(texts, path) - 1
        while number >= 0:
            if path.startswith(texts[number]):
                lists.append(self._lists[number])
            number = self._parents[number]

"""Routed services as waypoints are told them: each route once, in tables that the ports refer to.

Units that follow each other wherever they are used become one list, so that a waypoint looks for a request's route in one place; a list is
cut into tables of bounded size. A table is named by its content: whatever refers to it means these routes and no others, and a list that
changes is in force whole or not at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final, TypeAlias

import msgspec

from istiod_py.translate.l7.routes import RoutedService, UnitUse
from istiod_py.translate.l7.units import RouteUnit
from istiod_py.translate.memo import Memo
from mesh.model.l7.matching import RouteMatch
from mesh.model.l7.routing import Route
from mesh.model.l7.waypoint import PortConfig, RouteTable, ServiceConfig, TableUse

TABLE_SIZE: Final = 256 * 1024
"""Bytes of JSON at which a table ends: some hundred routes, which a waypoint decodes in two milliseconds. A route that is larger by itself
(it answers with a large body) is a table of its own."""

MOST_LISTS: Final = 8
"""Lists for all hosts that a port has apart. Each costs every request a microsecond, so that of more than these the small ones that follow
each other are one list, told for this port alone."""

TableMemo: TypeAlias = Memo[tuple[RouteUnit, ...], tuple[RouteTable, ...]]


@dataclass(frozen=True, slots=True)
class RoutesTold:
    """What one waypoint is told. ``destinations``: ``namespace/hostname`` of all that its services send to, and of the services."""

    configs: tuple[ServiceConfig, ...]
    tables: tuple[RouteTable, ...]
    destinations: tuple[str, ...]


def tell_routes(
    services: Sequence[RoutedService], waypoint: str, tables: TableMemo, configs: Memo[tuple[str, str], ServiceConfig]
) -> RoutesTold:
    """``waypoint``: its ``namespace/name``. The memos are those of the translation under way."""
    lists = join_uses(port.uses for service in services for port in service.ports)
    cut: dict[tuple[RouteUnit, ...], tuple[RouteTable, ...]] = {}

    def name_tables(units: tuple[RouteUnit, ...]) -> tuple[str, ...]:
        if units not in cut:
            cut[units] = tables.make(units, (units,), cut_tables)
        return tuple(table.key for table in cut[units])

    made: list[ServiceConfig] = []
    for routed in services:
        by_port = tuple(
            tuple(
                TableUse(name_tables(joined.units), joined.hosts, tuple(name_tables((unit,)) for unit in joined.beside))
                for joined in join_small(list(lists.split(port.uses)), MOST_LISTS)
            )
            for port in routed.ports
        )
        made.append(configs.make((routed.service.key, waypoint), (routed, by_port), _configure))
    told = {table.key: table for found in cut.values() for table in found}
    return RoutesTold(tuple(made), tuple(told.values()), tuple(dict.fromkeys(_name_destinations(services))))


def _configure(routed: RoutedService, tables: tuple[tuple[TableUse, ...], ...]) -> ServiceConfig:
    service = routed.service
    ports = tuple(
        PortConfig(each.port.number, each.port.protocol, each.port.name, uses, each.routes, each.tcp)
        for each, uses in zip(routed.ports, tables, strict=True)
    )
    return ServiceConfig(service.namespace, service.hostname, ports)


def _name_destinations(services: Iterable[RoutedService]) -> Iterator[str]:
    units: dict[RouteUnit, None] = {}
    for routed in services:
        yield routed.service.key
        for port in routed.ports:
            units.update((unit, None) for use in port.uses for unit in use.units)
            for weighted in port.tcp.destinations if port.tcp is not None else ():
                if weighted.destination.namespace:
                    yield f"{weighted.destination.namespace}/{weighted.destination.hostname}"
    for unit in units:
        yield from unit.destinations


# Lists


@dataclass(frozen=True, slots=True)
class Joined:
    """Units that are one list, the hosts that it is for, and units that are lists beside it."""

    units: tuple[RouteUnit, ...]
    hosts: tuple[str, ...]
    beside: tuple[RouteUnit, ...] = ()

    @property
    def size(self) -> int:
        """Routes."""
        return sum(len(unit.routes) for unit in self.units)

    def joins(self, other: Joined) -> bool:
        """Whether the two can be one list."""
        return self.hosts == other.hosts and not (self.beside or other.beside)


def join_small(lists: list[Joined], most: int) -> list[Joined]:
    """Where there are more than ``most`` for all hosts: with those that are not among the largest joined, as far as they follow each other.
    Lists for some hosts are found by these, however many there are."""
    every = [each for each in lists if not each.hosts]
    if len(every) <= most:
        return lists
    apart = {id(each) for each in sorted(every, key=lambda each: -each.size)[:most]}
    result: list[Joined] = []
    for each in lists:
        if result and id(each) not in apart and id(result[-1]) not in apart and result[-1].joins(each):
            result[-1] = Joined((*result[-1].units, *each.units), each.hosts)
        else:
            result.append(each)
    return result


class Lists:
    """Which units belong together. ``after``: the one that follows each wherever it is used, for the same hosts, and nothing else."""

    def __init__(self, after: Mapping[RouteUnit, RouteUnit]) -> None:
        self._after = after

    def split(self, uses: Sequence[UnitUse]) -> Iterator[Joined]:
        """A port's uses as lists."""
        units: list[RouteUnit] = []
        for use in uses:
            units.append(use.unit)
            if use.unit not in self._after:
                yield Joined(tuple(units), use.hosts, use.beside)
                units = []


def join_uses(sequences: Iterable[Sequence[UnitUse]]) -> Lists:
    """Join what stands side by side in every one of ``sequences`` that has any of it: so every unit is in one list, and none is told
    twice."""
    after: dict[RouteUnit, RouteUnit | None] = {}
    before: dict[RouteUnit, RouteUnit | None] = {}
    for uses in sequences:
        for first, second in zip((None, *uses), (*uses, None), strict=True):
            together = first is not None and second is not None and first.hosts == second.hosts and not (first.beside or second.beside)
            _agree(after, first, second.unit if second is not None and together else None)
            _agree(before, second, first.unit if first is not None and together else None)
    return Lists({first: second for first, second in after.items() if second is not None and before[second] is first})


def _agree(beside: dict[RouteUnit, RouteUnit | None], use: UnitUse | None, neighbour: RouteUnit | None) -> None:
    for unit in use.units if use is not None else ():
        if beside.setdefault(unit, neighbour) is not neighbour:
            beside[unit] = None


# Tables


def cut_tables(units: tuple[RouteUnit, ...], size: int = TABLE_SIZE) -> tuple[RouteTable, ...]:
    """The routes of these units as one list, in tables of ``size`` bytes at most, as far as they can be cut."""
    return tuple(_make_table(routes) for routes in _cut(_bounded((route for unit in units for route in unit.routes), size), size))


def _cut(sized: Iterable[tuple[Route, int]], size: int) -> Iterator[tuple[Route, ...]]:
    routes: list[Route] = []
    used = 0
    for route, bytes_ in sized:
        if routes and used + bytes_ > size:
            yield tuple(routes)
            routes, used = [], 0
        routes.append(route)
        used += bytes_
    if routes:
        yield tuple(routes)


def _bounded(routes: Iterable[Route], size: int) -> Iterator[tuple[Route, int]]:
    """With their sizes. A route of many matches becomes several, which do the same."""
    for route in routes:
        whole = _size_of(route)
        if whole <= size or len(route.matches) < 2:
            yield route, whole
            continue
        rest = whole - sum(map(_size_of, route.matches))
        # What is large beside its matches is not cut up into a part for each of them.
        for matches in _cut_matches(route.matches, size - rest if rest < size // 2 else size):
            part = msgspec.structs.replace(route, matches=matches)
            yield part, _size_of(part)


def _cut_matches(matches: Iterable[RouteMatch], size: int) -> Iterator[tuple[RouteMatch, ...]]:
    taken: list[RouteMatch] = []
    used = 0
    for match in matches:
        bytes_ = _size_of(match)
        if taken and used + bytes_ > size:
            yield tuple(taken)
            taken, used = [], 0
        taken.append(match)
        used += bytes_
    yield tuple(taken)


def _size_of(part: Route | RouteMatch) -> int:
    """In a list."""
    return len(msgspec.json.encode(part)) + len(",")


def _make_table(routes: tuple[Route, ...]) -> RouteTable:
    """``kind/namespace/name`` of the first route's object, for people, and what tells the content apart from any other."""
    origin = routes[0].origin
    digest = blake2b(msgspec.json.encode(routes), digest_size=16).hexdigest()
    return RouteTable(f"{origin.kind}/{origin.namespace}/{origin.name}/{digest}", routes)

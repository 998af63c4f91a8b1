"""The configuration as it is served: what the control plane pushed, compiled, and swapped whole.

Everything a request asks for is immutable; a change puts new objects in the place of old ones. So a request that began with one version
ends with it, and the next one on the same connection has the new one: nothing of this is kept with connections. Compiling takes its time in
steps, while the last version serves; what is ready then is put in place at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar
from weakref import WeakValueDictionary

from mesh.model.address import NamespacedHostname
from mesh.model.l7.destination import DestinationConfig
from mesh.model.l7.policy import AuthorizationPolicy, JwtRule, RequestAuthentication
from mesh.model.l7.routing import Destination, Origin, TcpRoute, WeightedDestination
from mesh.model.l7.waypoint import L7Resource, PortConfig, Protocol, RouteTable, ServiceConfig, WaypointSettings
from mesh.state.store import Delta
from mesh.xds.l7 import resource_name, type_url_of
from waypoint_py.admission import Charge
from waypoint_py.policy.authorize import Judge, Judges
from waypoint_py.policy.keys import KeySet
from waypoint_py.policy.tokens import FindKeys, KeysFailed, TokenChecker, TokenCheckers
from waypoint_py.routing.match import CompiledTable, ListsBeside, PortRoutes, RouteList, compile_table, list_tables
from waypoint_py.steps import Steps, finish

T = TypeVar("T")


def nothing_fetched(rule: JwtRule) -> KeySet | KeysFailed | None:
    """For a store that nobody fetches for."""
    return KeysFailed("nothing fetches key sets here")


@dataclass(frozen=True, slots=True)
class PortRuntime:
    """One port of a service, compiled. ``tcp``: where its connections go when they carry no HTTP; never None."""

    config: PortConfig
    routes: PortRoutes
    tcp: TcpRoute


@dataclass(frozen=True, slots=True)
class ServiceRuntime:
    """A service that we stand before, compiled."""

    config: ServiceConfig
    ports: Mapping[int, PortRuntime]


class Store:
    """Resources and what was made of them. ``default``: settings until ours have come; ``find_keys``: key sets that are not in a policy."""

    def __init__(self, default: WaypointSettings, find_keys: FindKeys = nothing_fetched) -> None:
        self._default = default
        self._find_keys = find_keys
        self._held: dict[tuple[str, str], L7Resource] = {}
        """By type URL and name on the wire."""
        self._compiler = ServiceCompiler()
        self._services: dict[str, ServiceRuntime] = {}
        self._lacking: dict[str, ServiceConfig] = {}
        """Services that name tables which have not come, or could not be read: they stay as they were."""
        self._destinations: dict[str, DestinationConfig] = {}
        self._judges = Judges(())
        self._checkers = TokenCheckers((), find_keys)
        self._settings = default
        self._waiting: list[Callable[[], None]] = []
        self.version = 0
        """Another number after every change."""

    # Change

    def apply(self, delta: Delta) -> bool:
        """`applying`, at one go."""
        return finish(self.applying(delta))

    def applying(self, delta: Delta) -> Steps[bool]:
        """Take new resources and removals; what did not really change is not compiled again. Whether anything changed.

        One at a time. Nothing has changed until the last step, which changes all of it.
        """
        changes = yield from self._find_changes(delta)
        if not changes:
            return False
        coming = [value for value in changes.values() if value is not None]
        gone = [self._held[key] for key, value in changes.items() if value is None]
        # Nobody has them as long as no service names them.
        self._compiler.tables.update((table.key, table) for table in coming if isinstance(table, RouteTable))
        compiled, lacking = yield from self._compile_services(coming, gone)
        self._put(changes)
        for resource in gone:
            if isinstance(resource, RouteTable):
                self._compiler.tables.pop(resource.key, None)
            elif isinstance(resource, ServiceConfig):
                self._services.pop(resource.key, None)
            elif isinstance(resource, DestinationConfig):
                self._destinations.pop(resource.key, None)
        self._services.update(compiled)
        self._lacking = lacking
        self._destinations.update((each.key, each) for each in coming if isinstance(each, DestinationConfig))
        self.version += 1
        waiting, self._waiting = self._waiting, []
        for call in waiting:
            call()
        return True

    def _find_changes(self, delta: Delta) -> Steps[dict[tuple[str, str], L7Resource | None]]:
        """None: it is gone."""
        changes: dict[tuple[str, str], L7Resource | None] = {key: None for key in delta.removed_l7 if key in self._held}
        for assigned in delta.l7:
            key = type_url_of(assigned.resource), resource_name(assigned)
            changes.pop(key, None)
            if self._held.get(key) != assigned.resource:
                changes[key] = assigned.resource
            yield
        return changes

    def _compile_services(
        self, coming: Iterable[L7Resource], gone: Iterable[L7Resource]
    ) -> Steps[tuple[dict[str, ServiceRuntime], dict[str, ServiceConfig]]]:
        """Those that are new, or waited for tables; and those that lack some still."""
        compiler = self._compiler
        wanted = self._lacking | {each.key: each for each in coming if isinstance(each, ServiceConfig)}
        for resource in gone:
            if isinstance(resource, ServiceConfig):
                wanted.pop(resource.key, None)
        compiled: dict[str, ServiceRuntime] = {}
        lacking: dict[str, ServiceConfig] = {}
        for key, config in wanted.items():
            yield
            if compiler.find_lacking(config):
                lacking[key] = config
            else:
                compiled[key] = yield from compiler.compile(config, self._services.get(key))
        return compiled, lacking

    def _put(self, changes: Mapping[tuple[str, str], L7Resource | None]) -> None:
        kinds = {type(self._held[key] if value is None else value) for key, value in changes.items()}
        for key, value in changes.items():
            if value is None:
                del self._held[key]
            else:
                self._held[key] = value
        if AuthorizationPolicy in kinds:
            self._judges = Judges(self._all(AuthorizationPolicy))
        if RequestAuthentication in kinds:
            self._checkers = TokenCheckers(self._all(RequestAuthentication), self._find_keys)
        if WaypointSettings in kinds:
            self._settings = next(iter(self._all(WaypointSettings)), self._default)

    def _all(self, kind: type[T]) -> list[T]:
        return [resource for resource in self._held.values() if isinstance(resource, kind)]

    def when_changed(self, call: Callable[[], None]) -> None:
        """Call once after the next change."""
        self._waiting.append(call)

    # Reading

    @property
    def settings(self) -> WaypointSettings:
        return self._settings

    @property
    def charge(self) -> Charge:
        return Charge(self._settings.waypoint_for, self._services.__contains__)

    def find_service(self, key: str) -> ServiceRuntime | None:
        """By ``namespace/hostname``."""
        return self._services.get(key)

    def find_port(self, service: str, port: int) -> PortRuntime | None:
        found = self._services.get(service)
        return found.ports.get(port) if found is not None else None

    def find_destination(self, key: NamespacedHostname) -> DestinationConfig | None:
        return self._destinations.get(str(key))

    def judge_of(self, service: str) -> Judge:
        """``service``: ``namespace/hostname``; empty for traffic to a workload."""
        return self._judges.judge_of(service)

    def policies_for(self, service: str) -> list[AuthorizationPolicy]:
        """What `judge_of` is made of, for explanations."""
        return [policy for policy in self._all(AuthorizationPolicy) if not policy.targets or service in policy.targets]

    def checker_of(self, service: str) -> TokenChecker:
        """What proves tokens for a service, named as in `judge_of`."""
        return self._checkers.checker_of(service)

    def resources(self) -> list[tuple[str, L7Resource]]:
        """Everything that is held, with its name, for operators."""
        return [(name, resource) for (_, name), resource in sorted(self._held.items(), key=lambda item: item[0])]

    @property
    def lacking(self) -> Mapping[str, tuple[str, ...]]:
        """Services (``namespace/hostname``) that are not served as they should be, and the keys of the tables that have not come."""
        return {key: self._compiler.find_lacking(config) for key, config in self._lacking.items()}

    def count(self, kind: type[L7Resource]) -> int:
        return sum(1 for resource in self._held.values() if isinstance(resource, kind))


class ServiceCompiler:
    """Makes services ready, each table and list of tables once for all that use them."""

    def __init__(self) -> None:
        self.tables: dict[str, RouteTable] = {}
        """By key: what services may name."""
        # What nobody uses any more is forgotten.
        self._compiled: WeakValueDictionary[str, CompiledTable] = WeakValueDictionary()
        self._lists: WeakValueDictionary[tuple[str, ...], RouteList] = WeakValueDictionary()

    def find_lacking(self, config: ServiceConfig) -> tuple[str, ...]:
        """The keys of tables that are named, and not known."""
        named = dict.fromkeys(key for port in config.ports for use in port.tables for keys in (use.tables, *use.beside) for key in keys)
        return tuple(key for key in named if key not in self.tables)

    def compile(self, config: ServiceConfig, before: ServiceRuntime | None) -> Steps[ServiceRuntime]:
        """A service that lacks nothing; ports that are as ``before`` are kept."""
        ports: dict[int, PortRuntime] = {}
        for port in config.ports:
            old = before.ports.get(port.port) if before is not None else None
            ports[port.port] = old if old is not None and old.config == port else (yield from self._compile_port(config, port))
        return ServiceRuntime(config, ports)

    def _compile_port(self, service: ServiceConfig, port: PortConfig) -> Steps[PortRuntime]:
        itself = Destination(service.namespace, service.hostname, port.port)
        tcp = port.tcp or TcpRoute(Origin("Service", service.namespace, service.hostname), (WeightedDestination(itself),))
        lists: list[tuple[RouteList | ListsBeside, tuple[str, ...]]] = []
        for use in port.tables:
            routes = yield from self._list(use.tables)
            beside: list[RouteList] = []
            for keys in use.beside:
                beside.append((yield from self._list(keys)))
            lists.append((ListsBeside((routes, *beside)) if beside else routes, use.hosts))
        own = yield from list_tables([(yield from compile_table(port.routes))])
        return PortRuntime(port, PortRoutes(lists, own), tcp)

    def _list(self, keys: tuple[str, ...]) -> Steps[RouteList]:
        found = self._lists.get(keys)
        if found is None:
            tables: list[CompiledTable] = []
            for key in keys:
                table = self._compiled.get(key)
                if table is None:
                    table = self._compiled[key] = yield from compile_table(self.tables[key].routes)
                tables.append(table)
            found = self._lists[keys] = yield from list_tables(tables)
        return found


def speaks_http(protocol: Protocol) -> bool | None:
    """Whether a port carries HTTP; None: look at the first bytes."""
    return {Protocol.TCP: False, Protocol.AUTO: None}.get(protocol, True)

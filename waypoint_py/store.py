"""The configuration as it is served: what the control plane pushed, compiled, and swapped whole.

Everything a request asks for is immutable; a change puts new objects in the place of old ones. So a request that began with one version
ends with it, and the next one on the same connection has the new one: nothing of this is kept with connections.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from mesh.model.address import NamespacedHostname
from mesh.model.l7.destination import DestinationConfig
from mesh.model.l7.policy import AuthorizationPolicy, JwtRule, RequestAuthentication
from mesh.model.l7.routing import Destination, Origin, TcpRoute, WeightedDestination
from mesh.model.l7.waypoint import L7Resource, PortConfig, Protocol, ServiceConfig, WaypointSettings
from mesh.state.store import Delta
from mesh.xds.l7 import resource_name, type_url_of
from waypoint_py.admission import Charge
from waypoint_py.policy.authorize import Judge, Judges
from waypoint_py.policy.keys import KeySet
from waypoint_py.policy.tokens import FindKeys, KeysFailed, TokenChecker, TokenCheckers
from waypoint_py.routing.match import RouteTable, compile_routes

T = TypeVar("T")


def nothing_fetched(rule: JwtRule) -> KeySet | KeysFailed | None:
    """For a store that nobody fetches for."""
    return KeysFailed("nothing fetches key sets here")


@dataclass(frozen=True, slots=True)
class PortRuntime:
    """One port of a service, compiled. ``tcp``: where its connections go when they carry no HTTP; never None."""

    config: PortConfig
    routes: RouteTable
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
        self._services: dict[str, ServiceRuntime] = {}
        self._destinations: dict[str, DestinationConfig] = {}
        self._judges = Judges(())
        self._checkers = TokenCheckers((), find_keys)
        self._settings = default
        self._waiting: list[Callable[[], None]] = []
        self.version = 0
        """Another number after every change."""

    # Change

    def apply(self, delta: Delta) -> bool:
        """Take new resources and removals; what did not really change is not compiled again. Whether anything changed."""
        before = dict(self._held)
        for key in delta.removed_l7:
            self._held.pop(key, None)
        for assigned in delta.l7:
            self._held[type_url_of(assigned.resource), resource_name(assigned)] = assigned.resource
        changed = [value for key, value in self._held.items() if before.get(key) != value]
        gone = [value for key, value in before.items() if key not in self._held]
        if not changed and not gone:
            return False
        kinds = {type(resource) for resource in (*changed, *gone)}
        if AuthorizationPolicy in kinds:
            self._judges = Judges(self._all(AuthorizationPolicy))
        if RequestAuthentication in kinds:
            self._checkers = TokenCheckers(self._all(RequestAuthentication), self._find_keys)
        if WaypointSettings in kinds:
            self._settings = next(iter(self._all(WaypointSettings)), self._default)
        self._take_services(changed, gone)
        for resource in gone:
            if isinstance(resource, DestinationConfig):
                self._destinations.pop(resource.key, None)
        for resource in changed:
            if isinstance(resource, DestinationConfig):
                self._destinations[resource.key] = resource
        self.version += 1
        waiting, self._waiting = self._waiting, []
        for call in waiting:
            call()
        return True

    def _take_services(self, changed: Iterable[L7Resource], gone: Iterable[L7Resource]) -> None:
        for resource in gone:
            if isinstance(resource, ServiceConfig):
                self._services.pop(resource.key, None)
        for resource in changed:
            if isinstance(resource, ServiceConfig):
                self._services[resource.key] = compile_service(resource, self._services.get(resource.key))

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

    def count(self, kind: type[L7Resource]) -> int:
        return sum(1 for resource in self._held.values() if isinstance(resource, kind))


def compile_service(config: ServiceConfig, before: ServiceRuntime | None = None) -> ServiceRuntime:
    """A service, ready; ports that are as ``before`` are kept."""
    ports: dict[int, PortRuntime] = {}
    for port in config.ports:
        old = before.ports.get(port.port) if before is not None else None
        ports[port.port] = old if old is not None and old.config == port else compile_port(config, port)
    return ServiceRuntime(config, ports)


def compile_port(service: ServiceConfig, port: PortConfig) -> PortRuntime:
    itself = Destination(service.namespace, service.hostname, port.port)
    tcp = port.tcp or TcpRoute(Origin("Service", service.namespace, service.hostname), (WeightedDestination(itself),))
    return PortRuntime(port, compile_routes(port.routes), tcp)


def speaks_http(protocol: Protocol) -> bool | None:
    """Whether a port carries HTTP; None: look at the first bytes."""
    return {Protocol.TCP: False, Protocol.AUTO: None}.get(protocol, True)

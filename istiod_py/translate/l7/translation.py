"""All that is said of waypoints, read, brought together with what the mesh has, and told to each waypoint and to whoever wrote it.

Nothing is done where there is neither a waypoint nor an object that speaks of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

from istiod_py.translate.config import AncestorStatus, Condition, Config, StatusEntry
from istiod_py.translate.hosts import Hosts
from istiod_py.translate.l7.acceptance import Targets
from istiod_py.translate.l7.assemble import L7Key, L7Policy, assemble
from istiod_py.translate.l7.attachment import ISTIO_CLASS, WaypointRef
from istiod_py.translate.l7.authentication import KeySets, KeySource
from istiod_py.translate.l7.destination_configs import Destined, Endpoint
from istiod_py.translate.l7.known import KnownServices, L7Service, know, of_host, of_service
from istiod_py.translate.l7.notices import find_http_fields
from istiod_py.translate.l7.route_status import NamedThings
from istiod_py.translate.l7.routing import DEFAULT_RETRY, RouteMemory, Routing
from istiod_py.translate.l7.rules import DestinationMemo, L7Facts, RuleReads, WaypointRules
from istiod_py.translate.l7.sources import RouteDefaults, RouteSources, Sourced
from istiod_py.translate.l7.tables import RoutesTold
from istiod_py.translate.memo import Memo
from istiod_py.translate.reading import Read, Reader, read_objects
from istiod_py.translate.waypoints import Waypoint, Waypoints
from mesh.kube.gatewayapi.gateway import GROUP, WAYPOINT_CONTROLLER
from mesh.kube.gatewayapi.routes import (
    ConnectionRoute,
    RequestRoute,
    read_grpc_route,
    read_http_route,
    read_tcp_route,
    read_tls_route,
)
from mesh.kube.objects import KubeObject, ObjectKey, SourceProblem
from mesh.kube.ownership import WAYPOINT_ACCEPTED
from mesh.kube.policies import AuthorizationPolicy as KubePolicy
from mesh.kube.service import KubeService
from mesh.kube.serviceentry import KubeServiceEntry
from mesh.kube.virtualservice import VirtualService, read_virtual_service
from mesh.model.l7.destination import DestinationConfig
from mesh.model.l7.waypoint import L7Resource, WaypointSettings
from mesh.model.labels import GATEWAY_NAME
from mesh.model.service import Service
from mesh.model.workload import Workload

_T = TypeVar("_T")
_PolicyMemo = Memo[str, tuple[L7Policy, ...]]

REQUESTS: Mapping[str, Reader[RequestRoute]] = {"HTTPRoute": read_http_route, "GRPCRoute": read_grpc_route}
CONNECTIONS: Mapping[str, Reader[ConnectionRoute]] = {"TCPRoute": read_tcp_route, "TLSRoute": read_tls_route}


@dataclass(frozen=True, slots=True)
class RouteReads:
    """All route objects; one translation hands its own to the next."""

    virtual_services: Mapping[ObjectKey, Read[VirtualService]] = field(default_factory=dict)
    requests: Mapping[ObjectKey, Read[RequestRoute]] = field(default_factory=dict)
    connections: Mapping[ObjectKey, Read[ConnectionRoute]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.virtual_services or self.requests or self.connections)

    @property
    def problems(self) -> Iterable[SourceProblem]:
        """Mistakes in the objects."""
        for reads in (self.virtual_services, self.requests, self.connections):
            for read in reads.values():
                yield from read.problems


@dataclass(frozen=True, slots=True)
class L7Memory:
    """What a translation leaves for the next one."""

    routes: RouteReads = field(default_factory=RouteReads)
    rules: RuleReads = field(default_factory=RuleReads)
    services_known: Memo[tuple[str, str], L7Service | None] = field(default_factory=Memo)
    all_known: Memo[None, KnownServices] = field(default_factory=Memo)
    routed: RouteMemory = field(default_factory=RouteMemory)
    destinations: DestinationMemo = field(default_factory=Memo)
    policies: _PolicyMemo = field(default_factory=Memo)

    def next(self, routes: RouteReads, rules: RuleReads, *, same: bool) -> L7Memory:
        """For the translation that begins. ``same``: the configuration is, so that results may be used again."""
        if not same:
            return L7Memory(routes, rules)
        return L7Memory(
            routes,
            rules,
            Memo(self.services_known),
            Memo(self.all_known),
            self.routed.next(),
            Memo(self.destinations),
            Memo(self.policies),
        )

    def seal(self) -> None:
        """The translation is done."""
        for memo in (self.services_known, self.all_known, self.routed, self.destinations, self.policies):
            memo.seal()


@dataclass(frozen=True)
class MeshFacts:
    """What the rest of translation has found. Services by ``namespace/hostname``, waypoints by ``namespace/name``."""

    services: Mapping[ObjectKey, Read[KubeService]]
    entries: Mapping[ObjectKey, Read[KubeServiceEntry]]
    hosts: Hosts
    authorizations: Mapping[ObjectKey, Read[KubePolicy]]
    classes: Mapping[str, str]
    """GatewayClasses and the names of their controllers."""
    waypoints: Waypoints
    fronted: Mapping[str, Sequence[str]]
    """By waypoint the services that it stands before, or will once it is ready."""
    bound: Mapping[ObjectKey, str]
    """Services and ServiceEntries and the waypoint that they have."""
    translated: Mapping[str, Service]
    workloads: Mapping[str, Workload]
    labels: Callable[[], Mapping[str, Mapping[str, str]]]
    """Of the objects that workloads were made of, by the workload's uid. Asked for only where somebody looks at labels."""

    @cached_property
    def endpoints(self) -> Mapping[str, Sequence[Endpoint]]:
        """By service."""
        labels = self.labels()
        found: dict[str, list[Endpoint]] = {}
        for uid, workload in self.workloads.items():
            for service in workload.services:
                found.setdefault(str(service), []).append(Endpoint(workload, labels.get(uid, {})))
        return found

    @cached_property
    def instances(self) -> Mapping[str, Sequence[Endpoint]]:
        """By namespace: the pods of its waypoints."""
        found: dict[str, list[Endpoint]] = {}
        for uid, labels in self.labels().items():
            name, workload = labels.get(GATEWAY_NAME), self.workloads.get(uid)
            if name and workload is not None and f"{workload.namespace}/{name}" in self.waypoints:
                found.setdefault(workload.namespace, []).append(Endpoint(workload, labels))
        return found

    def endpoints_of(self, key: str, namespace: str) -> Iterable[Endpoint]:
        """Of a service, and the waypoints' own of a namespace."""
        return (*self.endpoints.get(key, ()), *self.instances.get(namespace, ()))


@dataclass(frozen=True, slots=True)
class L7Outcome:
    resources: Mapping[L7Key, L7Resource] = field(default_factory=dict)
    statuses: Mapping[ObjectKey, tuple[StatusEntry, ...]] = field(default_factory=dict)
    problems: tuple[SourceProblem, ...] = ()
    wanted_keys: Mapping[KeySource, float] = field(default_factory=dict)
    """The key sets that have to be fetched, and how many seconds each may take."""


def read_routes(objects_of: Callable[[str], Iterable[KubeObject]], before: RouteReads) -> RouteReads:
    """``objects_of``: by kind."""
    requests: dict[ObjectKey, Read[RequestRoute]] = {}
    for kind, reader in REQUESTS.items():
        requests |= read_objects(objects_of(kind), reader, _of_kind(before.requests, kind))
    connections: dict[ObjectKey, Read[ConnectionRoute]] = {}
    for kind, connection_reader in CONNECTIONS.items():
        connections |= read_objects(objects_of(kind), connection_reader, _of_kind(before.connections, kind))
    virtual_services = read_objects(objects_of("VirtualService"), read_virtual_service, before.virtual_services)
    return RouteReads(virtual_services, requests, connections)


def _of_kind(reads: Mapping[ObjectKey, Read[_T]], kind: str) -> dict[ObjectKey, Read[_T]]:
    return {key: read for key, read in reads.items() if key.kind == kind}


def translate_l7(memory: L7Memory, facts: MeshFacts, config: Config, key_sets: KeySets) -> L7Outcome:
    """``memory``: of this translation (`L7Memory.next`), with all that was read."""
    speaks = bool(memory.routes) or any(read.value.audience.has_waypoints for read in facts.authorizations.values())
    if not (speaks or facts.waypoints or memory.rules.authentications or memory.rules.backend_tls):
        return L7Outcome(problems=tuple(memory.rules.problems))
    return _L7Translator(memory, facts, config, key_sets).translate()


class _L7Translator:
    """Implements `L7Rules` for `assemble`."""

    def __init__(self, memory: L7Memory, facts: MeshFacts, config: Config, key_sets: KeySets) -> None:
        self._memory = memory
        self._facts = facts
        self._config = config
        self._key_sets = key_sets
        self._services = {service.key: service for service in self._list_services()}
        canonical = frozenset(map(str, facts.hosts.canonical))
        self._known = memory.all_known.make(None, (tuple(self._services.values()), canonical), know)
        destined = _Destined(self._services)
        distribution = {key: service.load_balancing for key, service in facts.translated.items() if service.load_balancing is not None}
        l7_facts = L7Facts(self._known, destined, distribution, facts.endpoints_of, self._known.by_object)
        self._rules = WaypointRules(memory.rules, facts.authorizations, l7_facts, config, memory.destinations, key_sets)
        mesh = self._rules.mesh
        self._routing = Routing(
            _as_sources(memory.routes),
            self._known,
            memory.routed,
            default_retry=DEFAULT_RETRY if mesh.retry is None else (mesh.retry if mesh.retry.attempts else None),
            defaults=RouteDefaults(config.domain_suffix, mesh.virtual_service_export_to),
        )
        self._targeting = tuple(read for read in facts.authorizations.values() if read.value.audience.has_waypoints)

    def translate(self) -> L7Outcome:
        resources = assemble(self, self._facts.waypoints.values(), self._facts.fronted, self._services)
        report = self._routing.report(self._fronting(), NamedThings(self._list_gateways(), self._rules.has_subset))
        statuses: dict[ObjectKey, tuple[StatusEntry, ...]] = dict(report.statuses)
        targets = self._targets()
        for key, condition in self._rules.conditions(targets).items():
            statuses[key] = (condition,)
        for key, (waypoints, verdict) in self._rules.backend_verdicts().items():
            statuses[key] = tuple(_ancestor(waypoint, verdict.accepted, verdict.resolved) for waypoint in sorted(waypoints))
        for key in self._find_stale(statuses):
            statuses[key] = ()
        problems = (
            *self._memory.routes.problems,
            *self._memory.rules.problems,
            *report.problems,
            *self._rules.notices(targets),
            *self._find_unmet(),
        )
        return L7Outcome(resources, statuses, problems, self._rules.wanted_keys)

    def _find_unmet(self) -> Iterator[SourceProblem]:
        """Policies that look at requests, for services that have none."""
        for read in self._targeting:
            path = next(find_http_fields(read.value), None) if read.good and not read.problems else None
            for target in read.value.targets if path is not None else ():
                keys = self._known.by_object.get(ObjectKey(target.kind, read.value.namespace, target.name), ())
                ports = [port for key in keys for port in self._services[key].ports]
                if path is not None and ports and not any(port.takes_requests for port in ports):
                    yield read.obj.problem(path, f"looks at requests, and no port of {target.kind} {target.name} takes HTTP")

    def _list_services(self) -> Iterable[L7Service]:
        memo, config = self._memory.services_known, self._config
        for key, read in self._facts.services.items():
            if read.good:
                made = memo.make((key.namespace, f"Service {key.name}"), (read.value,), lambda value: of_service(value, config))
                if made is not None:
                    yield made
        for (namespace, name), own in self._facts.hosts.of.items():
            entry = self._facts.entries[ObjectKey("ServiceEntry", namespace, name)].value
            for host in own:
                found = memo.make((namespace, host), (entry, host), of_host)
                if found is not None:
                    yield found

    def _fronting(self) -> dict[str, tuple[tuple[str, str], ...]]:
        fronting: dict[str, tuple[tuple[str, str], ...]] = {}
        for key, services in self._facts.fronted.items():
            waypoint = self._facts.waypoints.get(key)
            if waypoint is not None:
                for service in services:
                    fronting[service] = (*fronting.get(service, ()), (waypoint.namespace, waypoint.name))
        return fronting

    def _list_gateways(self) -> dict[str, bool]:
        """And whether each is a waypoint of ours."""
        classes = {ISTIO_CLASS: WAYPOINT_CONTROLLER, **self._facts.classes}
        return {key: classes.get(each.class_name) == WAYPOINT_CONTROLLER for key, each in self._facts.waypoints.items()}

    def _targets(self) -> Targets:
        facts = self._facts

        def bound(keys: Iterable[ObjectKey]) -> dict[str, str]:
            return {f"{key.namespace}/{key.name}": facts.bound.get(key, "") for key in keys}

        return Targets(
            root_namespace=self._config.root_namespace,
            waypoints=frozenset(key for key, waypoint in facts.waypoints.items() if waypoint.address is not None),
            gateways=facts.waypoints.keys(),
            classes=facts.classes,
            services=bound(facts.services),
            service_entries=bound(facts.entries),
        )

    def _find_stale(self, statuses: Mapping[ObjectKey, tuple[StatusEntry, ...]]) -> Iterable[ObjectKey]:
        """Objects of which nothing is to be said any more, and that still say something."""
        rules = self._memory.rules
        for reads in (self._facts.authorizations, rules.authentications, rules.destination_rules):
            for key, read in reads.items():
                if key not in statuses and _says(read.obj, WAYPOINT_ACCEPTED):
                    yield key

    # What `assemble` asks

    def settings_of(self, waypoint: Waypoint) -> WaypointSettings:
        return self._rules.settings_of(
            WaypointSettings(
                namespace=waypoint.namespace,
                name=waypoint.name,
                waypoint_for=waypoint.traffic,
                include_client_identity=waypoint.include_client_identity,
            )
        )

    def tell_routes(self, services: Sequence[L7Service], waypoint: Waypoint) -> RoutesTold:
        return self._routing.tell(services, waypoint.key, waypoint.namespace)

    def destination_config(self, key: str, waypoint: Waypoint) -> DestinationConfig:
        return self._rules.destination_config(key, _reference(waypoint))

    def policies_of(self, waypoint: Waypoint, services: Sequence[L7Service]) -> Iterable[L7Policy]:
        rules = self._memory.rules
        inputs = (
            _reference(waypoint),
            tuple(services),
            self._targeting,
            tuple(rules.authentications.values()),
            rules.mesh,
            self._known,
            self._key_sets,
        )
        return self._memory.policies.make(waypoint.key, inputs, self._make_policies)

    def _make_policies(self, waypoint: WaypointRef, services: tuple[L7Service, ...], *depends_on: object) -> tuple[L7Policy, ...]:
        return tuple(self._rules.policies_of(waypoint, services))


class _Destined(Mapping[str, Destined]):
    """Services as destinations, made as they are asked for."""

    def __init__(self, services: Mapping[str, L7Service]) -> None:
        self._services = services

    def __getitem__(self, key: str) -> Destined:
        service = self._services[key]
        ports = {port.number: port.name for port in service.ports}
        return Destined(service.kind, service.namespace, service.name, service.hostname, ports)

    def __iter__(self) -> Iterator[str]:
        return iter(self._services)

    def __len__(self) -> int:
        return len(self._services)


def _reference(waypoint: Waypoint) -> WaypointRef:
    return WaypointRef(waypoint.namespace, waypoint.name, waypoint.class_name)


def _as_sources(reads: RouteReads) -> RouteSources:
    refused = tuple(
        _sourced(read) for each in (reads.virtual_services, reads.requests, reads.connections) for read in each.values() if not read.good
    )
    return RouteSources(
        tuple(_sourced(read) for read in reads.virtual_services.values() if read.good),
        tuple(_sourced(read) for read in reads.requests.values() if read.good),
        tuple(_sourced(read) for read in reads.connections.values() if read.good),
        refused,
    )


def _sourced(read: Read[_T]) -> Sourced[_T]:
    return Sourced(read.obj, read.value, read.problems[0] if read.problems else None)


def _ancestor(waypoint: str, *conditions: Condition) -> AncestorStatus:
    namespace, _, name = waypoint.partition("/")
    reference = {"group": GROUP, "kind": "Gateway", "namespace": namespace, "name": name}
    return AncestorStatus(reference, WAYPOINT_CONTROLLER, conditions)


def _says(obj: KubeObject, kind: str) -> bool:
    found = obj.status.get("conditions")
    return isinstance(found, list) and any(isinstance(item, Mapping) and item.get("type") == kind for item in found)

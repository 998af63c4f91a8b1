"""All objects of a cluster into all workloads, services and policies; what did not change since the last time is taken from there.

Everything is looked at every time, but only compared: an object that is the same instance, in surroundings that are the same (its node's
locality, its namespace's services, selectors and mTLS modes), has the same result (`Memo`). So a change costs what depends on it plus
about a microsecond an object, and the result never depends on which changes were announced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from istiod_py.translate.authorization import L4Policy, close, translate_authorization
from istiod_py.translate.config import Condition, Config, StatusEntry
from istiod_py.translate.entries import (
    endpoint_uid,
    misses_out,
    translate_host,
    translate_service_entry,
    translate_workload_entry,
    visibility,
    workload_entry_uid,
)
from istiod_py.translate.gateways import CLASS_ACCEPTED
from istiod_py.translate.hosts import Hosts, settle_hosts
from istiod_py.translate.l7.assemble import L7Key
from istiod_py.translate.l7.authentication import KeySets, KeySource, find_key_problems
from istiod_py.translate.l7.blind import find_blind
from istiod_py.translate.l7.rules import read_rules
from istiod_py.translate.l7.translation import L7Memory, MeshFacts, read_routes, translate_l7
from istiod_py.translate.memo import Memo
from istiod_py.translate.peer_authentication import MeshMtls, resolve_mtls
from istiod_py.translate.pods import find_captors, is_forsaken, locality_of_node, pod_uid, translate_pod
from istiod_py.translate.reading import Read, find_unknown_names, read_objects
from istiod_py.translate.services import translate_service
from istiod_py.translate.slices import ListedPods, translate_slice
from istiod_py.translate.surroundings import SelectingEntry, Surroundings
from istiod_py.translate.waypoints import (
    Asking,
    Binding,
    Waypoints,
    bind_service,
    bind_workload,
    find_canary_mistake,
    find_gateway_mistakes,
    find_guard,
    find_label_mistake,
    find_own,
    find_required_mistake,
    find_waypoints,
)
from mesh.kube.endpointslice import KubeEndpointSlice, read_endpoint_slice
from mesh.kube.gatewayapi.gateway import WAYPOINT_CONTROLLER, KubeGateway, KubeGatewayClass, read_gateway, read_gateway_class
from mesh.kube.objects import KubeObject, ObjectKey, SourceProblem, by_age
from mesh.kube.ownership import BOUND, ZTUNNEL_ACCEPTED
from mesh.kube.pod import KubePod, read_pod
from mesh.kube.policies import AuthorizationPolicy, PeerAuthentication, read_authorization_policy, read_peer_authentication
from mesh.kube.service import KubeService, read_service
from mesh.kube.serviceentry import KubeServiceEntry, read_service_entry
from mesh.kube.workloadentry import KubeWorkloadEntry, read_workload_entry
from mesh.model.address import GatewayAddress, IpAddress, NamespacedHostname
from mesh.model.l7.waypoint import L7Resource
from mesh.model.labels import GATEWAY_NAME, NETWORK, REVISION, USE_WAYPOINT, WAYPOINT_REQUIRED
from mesh.model.policy import Policy
from mesh.model.service import Service, Visibility, WeightedWaypoint
from mesh.model.workload import ApplicationTunnel, Locality, Workload

_T = TypeVar("_T")
_NO_KEY_SETS = KeySets()


@dataclass(frozen=True, slots=True)
class Memory:
    """What a translation leaves for the next one."""

    config: Config | None = None
    pods: Mapping[ObjectKey, Read[KubePod]] = field(default_factory=dict)
    services: Mapping[ObjectKey, Read[KubeService]] = field(default_factory=dict)
    slices: Mapping[ObjectKey, Read[KubeEndpointSlice]] = field(default_factory=dict)
    service_entries: Mapping[ObjectKey, Read[KubeServiceEntry]] = field(default_factory=dict)
    workload_entries: Mapping[ObjectKey, Read[KubeWorkloadEntry]] = field(default_factory=dict)
    authorizations: Mapping[ObjectKey, Read[AuthorizationPolicy]] = field(default_factory=dict)
    peers: Mapping[ObjectKey, Read[PeerAuthentication]] = field(default_factory=dict)
    gateways: Mapping[ObjectKey, Read[KubeGateway]] = field(default_factory=dict)
    gateway_classes: Mapping[ObjectKey, Read[KubeGatewayClass]] = field(default_factory=dict)
    surroundings: Mapping[str, Surroundings] = field(default_factory=dict)
    workloads_made: Memo[ObjectKey, tuple[Workload, ...]] = field(default_factory=Memo)
    services_made: Memo[ObjectKey, Service | None] = field(default_factory=Memo)
    hosts_made: Memo[NamespacedHostname, Service] = field(default_factory=Memo)
    settled: Memo[None, Hosts] = field(default_factory=Memo)
    waypoints: Memo[None, Waypoints] = field(default_factory=Memo)
    bindings: Memo[ObjectKey, Binding] = field(default_factory=Memo)
    l7: L7Memory = field(default_factory=L7Memory)


@dataclass(frozen=True, slots=True)
class Translation:
    """Keys are the xDS resource names: uid, ``namespace/hostname``, ``namespace/name``. A value that did not change compares equal to the
    one before, mostly by identity."""

    workloads: Mapping[str, Workload] = field(default_factory=dict)
    services: Mapping[str, Service] = field(default_factory=dict)
    policies: Mapping[str, Policy] = field(default_factory=dict)
    problems: tuple[SourceProblem, ...] = ()
    """Mistakes in the objects. A source that checks objects itself reports some of them too."""
    statuses: Mapping[ObjectKey, tuple[StatusEntry, ...]] = field(default_factory=dict)
    """An empty tuple: what the status says of us is out of date."""
    l7: Mapping[L7Key, L7Resource] = field(default_factory=dict)
    """What each waypoint is told besides."""
    wanted_keys: Mapping[KeySource, float] = field(default_factory=dict)
    """The key sets to fetch for waypoints, and how many seconds each may take."""
    memory: Memory = field(default_factory=Memory, compare=False, repr=False)

    def find_key_problems(self, failures: Mapping[KeySource, str]) -> Iterator[SourceProblem]:
        """Of ``wanted_keys`` that could not be fetched, with why, where they are wanted."""
        return find_key_problems(self.memory.l7.rules.authentications.values(), failures)


def translate(objects: Iterable[KubeObject], previous: Translation | None, config: Config, key_sets: KeySets = _NO_KEY_SETS) -> Translation:
    """Translate all ``objects``. ``previous`` (None the first time) saves work, and provides the last good version of objects that have
    mistakes now. ``key_sets``: those that were fetched of what earlier translations wanted."""
    return _Translator(objects, previous.memory if previous else Memory(), config, key_sets).translate()


class _Translator:
    def __init__(self, objects: Iterable[KubeObject], memory: Memory, config: Config, key_sets: KeySets) -> None:
        self._memory = memory
        self._config = config
        self._key_sets = key_sets
        self._problems: list[SourceProblem] = []
        self._statuses: dict[ObjectKey, tuple[StatusEntry, ...]] = {}
        self._policies: dict[str, Policy] = {}
        self._by_kind: dict[str, list[KubeObject]] = {}
        for obj in objects:
            if obj.kind not in _REVISIONED or REVISION not in obj.labels or obj.labels[REVISION] in config.revisions:
                self._by_kind.setdefault(obj.kind, []).append(obj)
        self._namespaces = {obj.name: obj for obj in self._of("Namespace")}
        self._localities = {obj.name: locality_of_node(obj.labels) for obj in self._of("Node")}
        root = self._namespaces.get(config.root_namespace)
        self._network = root.labels.get(NETWORK, "") if root else ""
        same = memory.config == config
        self._workloads: Memo[ObjectKey, tuple[Workload, ...]] = Memo(memory.workloads_made if same else None)
        self._services: Memo[ObjectKey, Service | None] = Memo(memory.services_made if same else None)
        self._hosts_made: Memo[NamespacedHostname, Service] = Memo(memory.hosts_made if same else None)
        self._settled: Memo[None, Hosts] = Memo(memory.settled if same else None)
        self._waypoints_found: Memo[None, Waypoints] = Memo(memory.waypoints if same else None)
        self._bindings: Memo[ObjectKey, Binding] = Memo(memory.bindings if same else None)
        routes, rules = read_routes(self._of, memory.l7.routes), read_rules(self._of, memory.l7.rules, config)
        self._l7 = memory.l7.next(routes, rules, same=same)
        self._waypoints: Waypoints = {}
        self._fronted: dict[str, list[str]] = {}
        """By waypoint: the services it stands before."""
        self._bound: dict[ObjectKey, str] = {}
        self._asking: dict[str, Asking] = {}
        self._inherited: dict[tuple[str, str], Binding] = {}
        """By namespace and kind of traffic: of all that say nothing themselves."""

    def translate(self) -> Translation:
        services = self._read("Service", read_service, self._memory.services)
        slices = self._read("EndpointSlice", read_endpoint_slice, self._memory.slices)
        service_entries = self._read("ServiceEntry", read_service_entry, self._memory.service_entries)
        workload_entries = self._read("WorkloadEntry", read_workload_entry, self._memory.workload_entries)
        authorizations = self._read("AuthorizationPolicy", read_authorization_policy, self._memory.authorizations)
        peers = self._read("PeerAuthentication", read_peer_authentication, self._memory.peers)
        pods = self._read("Pod", read_pod, self._memory.pods)
        gateways = self._read("Gateway", read_gateway, self._memory.gateways)
        classes = self._read("GatewayClass", read_gateway_class, self._memory.gateway_classes)
        self._waypoints = self._find_waypoints(gateways, classes)
        self._report_waypoints(gateways, classes)
        self._statuses.update({key: (CLASS_ACCEPTED,) for key, read in classes.items() if read.value.controller == WAYPOINT_CONTROLLER})
        selectors = self._translate_authorizations(authorizations)
        self._guard_services(services, selectors)
        mtls = self._resolve_mtls(peers)
        self._policies.update(mtls.policies)
        hosts = self._settle_hosts(service_entries, services)
        namespaces = {key.namespace for reads in (pods, workload_entries, service_entries) for key in reads}
        surroundings = self._survey(namespaces, _good(services), self._find_selecting(service_entries, hosts), selectors, mtls)
        workloads = (
            *self._translate_pods(pods, _list_pods(slices, services), surroundings),
            *self._translate_workload_entries(workload_entries, surroundings),
            *self._translate_service_entries(service_entries, hosts, surroundings),
            *self._translate_slices(slices, services),
        )
        translated_services = {**self._translate_services(services), **self._translate_hosts(service_entries, hosts)}
        translated_workloads = {workload.uid: workload for workload in workloads}
        self._report_blind(authorizations, translated_workloads, translated_services)
        facts = MeshFacts(
            services=services,
            entries=service_entries,
            hosts=hosts,
            authorizations=authorizations,
            classes={key.name: read.value.controller for key, read in classes.items() if read.good},
            waypoints=self._waypoints,
            fronted=self._fronted,
            bound=self._bound,
            translated=translated_services,
            workloads=translated_workloads,
            labels=lambda: self._label_workloads(pods, workload_entries, service_entries),
        )
        l7 = translate_l7(self._l7, facts, self._config, self._key_sets)
        self._problems.extend(l7.problems)
        for key, entries in l7.statuses.items():
            self._statuses[key] = (*self._statuses.get(key, ()), *entries)
        for memo in (self._workloads, self._services, self._hosts_made, self._settled, self._waypoints_found, self._bindings, self._l7):
            memo.seal()
        return Translation(
            workloads=translated_workloads,
            services=translated_services,
            policies=self._policies,
            problems=tuple(sorted(set(self._problems))),
            statuses=self._statuses,
            l7=l7.resources,
            wanted_keys=l7.wanted_keys,
            memory=Memory(
                self._config,
                pods,
                services,
                slices,
                service_entries,
                workload_entries,
                authorizations,
                peers,
                gateways,
                classes,
                surroundings,
                self._workloads,
                self._services,
                self._hosts_made,
                self._settled,
                self._waypoints_found,
                self._bindings,
                self._l7,
            ),
        )

    def _of(self, kind: str) -> list[KubeObject]:
        return self._by_kind.get(kind, [])

    def _read(
        self, kind: str, reader: Callable[[KubeObject], tuple[_T, tuple[SourceProblem, ...]]], before: Mapping[ObjectKey, Read[_T]]
    ) -> dict[ObjectKey, Read[_T]]:
        """Read all objects of a kind; one with mistakes keeps its last good version."""
        result = read_objects(self._of(kind), reader, before)
        for read in result.values():
            if read.problems:
                self._problems.extend(read.problems)
            if read.in_vain:
                self._problems.extend(read.in_vain)
        return result

    def _translate_authorizations(
        self, reads: Mapping[ObjectKey, Read[AuthorizationPolicy]]
    ) -> dict[str, list[tuple[str, Mapping[str, str]]]]:
        """Fill policies and statuses; returns the selectors by namespace."""
        selectors: dict[str, list[tuple[str, Mapping[str, str]]]] = {}
        for key, read in reads.items():
            l4 = self._translate_authorization(read)
            if l4.condition is not None:
                self._statuses[key] = (l4.condition,)
                if l4.condition.reason == "UnsupportedValue":
                    field = "rules" if l4.condition.status else "action"
                    self._problems.append(read.obj.problem(("spec", field), l4.condition.message))
            if l4.policy is not None:
                self._policies[l4.policy.key] = l4.policy
                if l4.selector is not None:
                    selectors.setdefault(key.namespace, []).append((l4.policy.key, l4.selector))
        return selectors

    def _guard_services(
        self, services: Mapping[ObjectKey, Read[KubeService]], selectors: dict[str, list[tuple[str, Mapping[str, str]]]]
    ) -> None:
        """Add the policies of those that require their waypoint strictly."""
        for key, read in services.items():
            service = read.value
            if read.good and service.selector and service.type != "ExternalName":
                asking = Asking(service.labels, service.annotations)
                guard = find_guard(key.namespace, key.name, asking, self._asking_of(key.namespace), self._waypoints, self._config)
                if guard is not None:
                    self._policies[guard.key] = guard
                    selectors.setdefault(key.namespace, []).append((guard.key, service.selector))

    def _translate_authorization(self, read: Read[AuthorizationPolicy]) -> L4Policy:
        if not read.good:
            return close(read.obj, read.value, read.problems, self._config)
        l4 = translate_authorization(read.value, self._config)
        if read.problems and l4.condition is not None:
            stays = Condition(ZTUNNEL_ACCEPTED, False, "Invalid", f"the last good version stays in force: {read.problems[0]}")
            return L4Policy(l4.policy, l4.selector, stays)
        return l4

    def _report_blind(
        self, reads: Mapping[ObjectKey, Read[AuthorizationPolicy]], workloads: Mapping[str, Workload], services: Mapping[str, Service]
    ) -> None:
        """Policies that name clients and see a waypoint instead."""
        if not self._waypoints:
            return
        by_key = {f"{key.namespace}/{key.name}": read.obj for key, read in reads.items() if read.good}
        made = [self._policies[key] for key in by_key if key in self._policies]
        for key, message in find_blind(made, workloads, services).items():
            self._problems.append(by_key[key].problem(("spec", "rules"), message))

    def _resolve_mtls(self, reads: Mapping[ObjectKey, Read[PeerAuthentication]]) -> MeshMtls:
        ordered = by_age([read.obj for read in reads.values()])
        good = [reads[obj.key].value for obj in ordered if reads[obj.key].good]
        mistaken = [_unselected_if_unsure(reads[obj.key]) for obj in ordered if not reads[obj.key].good]
        return resolve_mtls(good, mistaken, self._config)

    def _settle_hosts(self, entries: Mapping[ObjectKey, Read[KubeServiceEntry]], services: Mapping[ObjectKey, Read[KubeService]]) -> Hosts:
        def settle(entries: tuple[KubeServiceEntry, ...], services: tuple[KubeService, ...]) -> Hosts:
            return settle_hosts(entries, services, self._config)

        if not entries:
            return Hosts()
        ordered = tuple(entries[obj.key].value for obj in by_age([read.obj for read in entries.values() if read.good]))
        hosts = self._settled.make(None, (ordered, tuple(_good(services))), settle)
        self._report_hosts(entries, hosts)
        return hosts

    def _report_hosts(self, entries: Mapping[ObjectKey, Read[KubeServiceEntry]], hosts: Hosts) -> None:
        """What is right by itself and still has no effect, or not all of it, is told: else nobody would find out why."""
        for lost in hosts.lost:
            obj = entries[ObjectKey("ServiceEntry", lost.entry.namespace, lost.entry.name)].obj
            self._problems.append(obj.problem(("spec", "hosts"), f"has no effect for {lost.host}: {lost.owner} has this hostname here"))
        for key, read in entries.items():
            if not read.good:
                continue
            for host in hosts.of.get((key.namespace, key.name), ()):
                vips = hosts.vips.get(NamespacedHostname(key.namespace, host))
                if vips is not None and all(ip.version != 4 for ip in vips):
                    self._problems.append(read.obj.problem(("spec", "addresses"), f"no automatic IPv4 address is left for {host}"))
            if missing := misses_out(read.value):
                message = f"node proxies know no lists of namespaces: it is not visible in {', '.join(missing)}"
                self._problems.append(read.obj.problem(("spec", "exportTo"), message))

    def _find_selecting(self, entries: Mapping[ObjectKey, Read[KubeServiceEntry]], hosts: Hosts) -> dict[str, list[SelectingEntry]]:
        """By namespace, in order of name: the ServiceEntries that select workloads."""
        found: dict[str, list[SelectingEntry]] = {}
        for key in sorted(entries):
            entry, own = entries[key].value, hosts.of.get((key.namespace, key.name), ())
            if own and entry.selector:
                found.setdefault(key.namespace, []).append(SelectingEntry(entry, own))
        return found

    def _survey(
        self,
        namespaces: Iterable[str],
        services: Iterable[KubeService],
        entries: Mapping[str, list[SelectingEntry]],
        selectors: Mapping[str, list[tuple[str, Mapping[str, str]]]],
        mtls: MeshMtls,
    ) -> dict[str, Surroundings]:
        """The surroundings of these namespaces: the same instance as before when nothing in them changed."""
        selecting: dict[str, list[KubeService]] = {}
        for service in services:
            if service.selector and service.type != "ExternalName":
                selecting.setdefault(service.namespace, []).append(service)
        root = self._config.root_namespace
        result: dict[str, Surroundings] = {}
        for namespace in namespaces:
            found = selectors.get(namespace, []) + (selectors.get(root, []) if namespace != root else [])
            now = Surroundings(
                tuple(selecting.get(namespace, ())),
                tuple(entries.get(namespace, ())),
                tuple(sorted(found, key=_first)),
                mtls.of(namespace),
                self._network,
            )
            before = self._memory.surroundings.get(namespace)
            result[namespace] = before if before == now and before is not None else now
        return result

    # Waypoints

    def _label_workloads(
        self,
        pods: Mapping[ObjectKey, Read[KubePod]],
        workload_entries: Mapping[ObjectKey, Read[KubeWorkloadEntry]],
        service_entries: Mapping[ObjectKey, Read[KubeServiceEntry]],
    ) -> dict[str, Mapping[str, str]]:
        """By uid."""
        found = {pod_uid(read.value, self._config): read.value.labels for read in pods.values() if read.good}
        for read in workload_entries.values():
            found[workload_entry_uid(read.value, self._config)] = read.value.labels
        for entry in service_entries.values():
            for endpoint in entry.value.endpoints:
                found[endpoint_uid(entry.value, endpoint, self._config)] = endpoint.labels
        return found

    def _find_waypoints(
        self, gateways: Mapping[ObjectKey, Read[KubeGateway]], classes: Mapping[ObjectKey, Read[KubeGatewayClass]]
    ) -> Waypoints:
        def find(gateways: tuple[KubeGateway, ...], classes: tuple[KubeGatewayClass, ...], network: str) -> Waypoints:
            return find_waypoints(gateways, {each.name: each for each in classes}, network, self._config)

        return self._waypoints_found.make(None, (tuple(_good(gateways)), tuple(_good(classes)), self._network), find)

    def _report_waypoints(
        self, gateways: Mapping[ObjectKey, Read[KubeGateway]], classes: Mapping[ObjectKey, Read[KubeGatewayClass]]
    ) -> None:
        """What Gateways, and labels and annotations of Namespaces, say in vain; single objects are looked at as they are bound."""
        by_name = {each.name: each for each in _good(classes)}
        for read in gateways.values():
            if read.good:
                self._problems.extend(read.obj.problem(path, message) for path, message in find_gateway_mistakes(read.value, by_name))
        for name, obj in self._namespaces.items():
            self._problems.extend(find_unknown_names(obj))
            self._report_required(obj)
            if USE_WAYPOINT in obj.labels:
                binding = bind_service(name, Asking(), self._asking_of(name), self._waypoints, self._config)
                if binding.condition is not None and binding.condition.reason != "UnsupportedTrafficType":  # it may be for workloads
                    self._report_label(obj, name, binding)

    def _report_label(self, obj: KubeObject, namespace: str, binding: Binding) -> None:
        if USE_WAYPOINT in obj.labels:
            mistake = find_label_mistake(namespace, Asking(obj.labels, obj.annotations), binding, self._waypoints)
            if mistake:
                self._problems.append(obj.problem(("metadata", "labels", USE_WAYPOINT), mistake))
        canary = find_canary_mistake(Asking(obj.labels, obj.annotations), binding)
        if canary is not None:
            self._problems.append(obj.problem(*canary))

    def _report_required(self, obj: KubeObject) -> None:
        mistake = find_required_mistake(obj.annotations)
        if mistake:
            self._problems.append(obj.problem(("metadata", "annotations", WAYPOINT_REQUIRED), mistake))

    def _asking_of(self, namespace: str) -> Asking:
        known = self._asking.get(namespace)
        if known is None:
            obj = self._namespaces.get(namespace)
            known = self._asking[namespace] = Asking(obj.labels, obj.annotations) if obj is not None else Asking()
        return known

    def _bind_service(
        self, key: ObjectKey, labels: Mapping[str, str], annotations: Mapping[str, str], *, namespace_only: bool = False
    ) -> Binding:
        def bind(own: Asking, around: Asking, waypoints: Waypoints, namespace_only: bool) -> Binding:
            return bind_service(key.namespace, own, around, waypoints, self._config, namespace_only=namespace_only)

        own, around = Asking(labels, annotations), self._asking_of(key.namespace)
        if own.says_something:
            return self._bindings.make(key, (own, around, self._waypoints, namespace_only), bind)
        place = key.namespace, "services of its own" if namespace_only else "services"
        if place not in self._inherited:
            self._inherited[place] = bind(Asking(), around, self._waypoints, namespace_only)
        return self._inherited[place]

    def _bind_workload(self, key: ObjectKey, labels: Mapping[str, str], annotations: Mapping[str, str]) -> Binding:
        def bind(own: Asking, around: Asking, waypoints: Waypoints) -> Binding:
            return bind_workload(key.namespace, own, around, waypoints, self._config)

        own, around = Asking(labels, annotations), self._asking_of(key.namespace)
        if own.says_something:
            return self._bindings.make(key, (own, around, self._waypoints), bind)
        place = key.namespace, "workloads"
        if place not in self._inherited:
            self._inherited[place] = bind(Asking(), around, self._waypoints)
        return self._inherited[place]

    def _note_front(self, service: str, obj: KubeObject, binding: Binding) -> None:
        self._report_binding(obj, binding)
        if binding.keys and binding.condition is not None and binding.condition.status:
            self._bound[obj.key] = binding.keys[0]
        for key in binding.keys:
            self._fronted.setdefault(key, []).append(service)

    def _report_binding(self, obj: KubeObject, binding: Binding) -> None:
        """On the object; one that no longer asks for a waypoint is told as long as its status still speaks of one."""
        self._report_label(obj, obj.namespace, binding)
        self._report_required(obj)
        if binding.condition is not None:
            self._statuses[obj.key] = (binding.condition,)
        elif _has_condition(obj, BOUND):
            self._statuses[obj.key] = ()

    # Each of these yields the workloads of one kind of object.

    def _translate_pods(
        self, pods: Mapping[ObjectKey, Read[KubePod]], listed: ListedPods, surroundings: Mapping[str, Surroundings]
    ) -> Iterator[Workload]:
        def make(
            pod: KubePod,
            around: Surroundings,
            listed: tuple[KubeService, ...],
            locality: Locality,
            waypoint: GatewayAddress | None,
            tunnel: ApplicationTunnel | None,
            forsaken: bool,
        ) -> tuple[Workload, ...]:
            workload = translate_pod(
                pod,
                around=around,
                listed=listed,
                locality=locality,
                config=self._config,
                waypoint=waypoint,
                tunnel=tunnel,
                forsaken=forsaken,
            )
            return () if workload is None else (workload,)

        captors = find_captors((read.value for read in pods.values()), self._config.root_namespace)
        for key, read in pods.items():
            if read.good:
                pod = read.value
                locality = self._localities.get(pod.node, _NOWHERE)
                binding = self._bind_workload(key, pod.labels, pod.annotations)
                self._report_label(read.obj, key.namespace, binding)
                self._report_required(read.obj)
                own = find_own(key.namespace, Asking(pod.labels), self._waypoints) if GATEWAY_NAME in pod.labels else None
                tunnel = own.tunnel if own is not None else None
                forsaken = is_forsaken(pod, captors)
                inputs = pod, surroundings[key.namespace], listed.services_of(pod), locality, binding.address, tunnel, forsaken
                yield from self._workloads.make(key, inputs, make)

    def _translate_workload_entries(
        self, entries: Mapping[ObjectKey, Read[KubeWorkloadEntry]], surroundings: Mapping[str, Surroundings]
    ) -> Iterator[Workload]:
        def make(entry: KubeWorkloadEntry, around: Surroundings, waypoint: GatewayAddress | None) -> tuple[Workload, ...]:
            return (translate_workload_entry(entry, around=around, config=self._config, waypoint=waypoint),)

        for key, read in entries.items():
            if read.good:
                binding = self._bind_workload(key, read.value.labels, read.value.annotations)
                self._report_binding(read.obj, binding)
                yield from self._workloads.make(key, (read.value, surroundings[key.namespace], binding.address), make)

    def _translate_service_entries(
        self, entries: Mapping[ObjectKey, Read[KubeServiceEntry]], hosts: Hosts, surroundings: Mapping[str, Surroundings]
    ) -> Iterator[Workload]:
        def make(
            entry: KubeServiceEntry, own: tuple[str, ...], around: Surroundings, waypoints: tuple[GatewayAddress | None, ...]
        ) -> tuple[Workload, ...]:
            return translate_service_entry(entry, own, around=around, config=self._config, waypoints=waypoints)

        for key, read in entries.items():
            own = hosts.of.get((key.namespace, key.name), ())
            if own:
                waypoints = tuple(
                    self._bind_workload(ObjectKey(f"endpoint {endpoint.address} of", *key[1:]), endpoint.labels, {}).address
                    for endpoint in read.value.endpoints
                )
                yield from self._workloads.make(key, (read.value, own, surroundings[key.namespace], waypoints), make)

    def _translate_slices(
        self, slices: Mapping[ObjectKey, Read[KubeEndpointSlice]], services: Mapping[ObjectKey, Read[KubeService]]
    ) -> Iterator[Workload]:
        def make(found: KubeEndpointSlice, service: KubeService, localities: Mapping[str, Locality], network: str) -> tuple[Workload, ...]:
            return translate_slice(found, service, localities=localities, network=network, config=self._config)

        for key, read in slices.items():
            found = read.value
            if not read.good or not found.endpoints:
                continue
            service = services.get(ObjectKey("Service", key.namespace, found.service))
            if service is not None and service.good and service.value.type != "ExternalName":
                localities = {e.node: self._localities[e.node] for e in found.endpoints if e.node in self._localities}
                yield from self._workloads.make(key, (found, service.value, localities, self._network), make)

    def _translate_services(self, reads: Mapping[ObjectKey, Read[KubeService]]) -> dict[str, Service]:
        def make(
            service: KubeService,
            annotations: Mapping[str, str],
            network: str,
            waypoint: GatewayAddress | None,
            weighted: tuple[WeightedWaypoint, ...],
        ) -> Service | None:
            return translate_service(
                service, namespace_annotations=annotations, network=network, config=self._config, waypoint=waypoint, weighted=weighted
            )

        result: dict[str, Service] = {}
        for key, read in reads.items():
            if read.good:
                binding = self._bind_service(key, read.value.labels, read.value.annotations)
                inputs = read.value, self._annotations(key.namespace), self._network, binding.address, binding.weighted
                made = self._services.make(key, inputs, make)
                if made is not None:
                    result[str(made.key)] = made
                    self._note_front(str(made.key), read.obj, binding)
        return result

    def _translate_hosts(self, entries: Mapping[ObjectKey, Read[KubeServiceEntry]], hosts: Hosts) -> dict[str, Service]:
        def make(
            entry: KubeServiceEntry,
            host: str,
            vips: tuple[IpAddress, ...],
            canonical: bool,
            annotations: Mapping[str, str],
            network: str,
            waypoint: GatewayAddress | None,
            weighted: tuple[WeightedWaypoint, ...],
        ) -> Service:
            return translate_host(
                entry,
                host,
                vips=vips,
                canonical=canonical,
                namespace_annotations=annotations,
                network=network,
                waypoint=waypoint,
                weighted=weighted,
            )

        result: dict[str, Service] = {}
        for (namespace, name), own in hosts.of.items():
            read, annotations = entries[ObjectKey("ServiceEntry", namespace, name)], self._annotations(namespace)
            entry = read.value
            limited = visibility(entry) is Visibility.NAMESPACE
            binding = self._bind_service(read.obj.key, entry.labels, entry.annotations, namespace_only=limited)
            for host in own:
                key = NamespacedHostname(namespace, host)
                bound = binding.address, binding.weighted
                inputs = entry, host, hosts.vips.get(key, ()), key in hosts.canonical, annotations, self._network, *bound
                result[str(key)] = self._hosts_made.make(key, inputs, make)
                self._note_front(str(key), read.obj, binding)
        return result

    def _annotations(self, namespace: str) -> Mapping[str, str]:
        obj = self._namespaces.get(namespace)
        return obj.annotations if obj else {}


def _has_condition(obj: KubeObject, kind: str) -> bool:
    found = obj.status.get("conditions")
    return isinstance(found, list) and any(isinstance(item, Mapping) and item.get("type") == kind for item in found)


_REVISIONED = frozenset(
    {
        *("AuthorizationPolicy", "PeerAuthentication", "RequestAuthentication"),
        *("DestinationRule", "ServiceEntry", "VirtualService", "WorkloadEntry"),
    }
)
_NOWHERE = Locality()


def _good(reads: Mapping[ObjectKey, Read[_T]]) -> list[_T]:
    """In order of namespace and name."""
    return [reads[key].value for key in sorted(reads) if reads[key].good]


def _list_pods(slices: Mapping[ObjectKey, Read[KubeEndpointSlice]], services: Mapping[ObjectKey, Read[KubeService]]) -> ListedPods:
    selectorless = {(s.namespace, s.name): s for s in _good(services) if not s.selector and s.type != "ExternalName"}
    return ListedPods((read.value for read in slices.values() if read.good), selectorless)


def _first(pair: tuple[str, Mapping[str, str]]) -> str:
    return pair[0]


def _unselected_if_unsure(read: Read[PeerAuthentication]) -> PeerAuthentication:
    """A mistaken policy whose selector is part of the mistake may have meant the whole namespace."""
    peer = read.value
    if any(problem.field in ("", "spec") or problem.field.startswith("spec.selector") for problem in read.problems):
        return PeerAuthentication(peer.namespace, peer.name, None, peer.mode, peer.port_modes)
    return peer

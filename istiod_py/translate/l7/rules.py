"""Everything that is said of waypoints besides routes: policies, destination rules and the mesh's own configuration; read, found for each
waypoint, and reported on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeAlias, TypeVar

import msgspec

from istiod_py.translate.config import Condition, Config
from istiod_py.translate.l7.acceptance import Targets, acceptance_of, find_unbound
from istiod_py.translate.l7.attachment import Fronted, FrontedService, WaypointRef
from istiod_py.translate.l7.authentication import KeySets, KeySource, authentications_for, find_wanted
from istiod_py.translate.l7.destination_configs import Destined, Endpoint, configure, label_endpoints, wanted_labels
from istiod_py.translate.l7.destination_rules import DestinationRules, Merged
from istiod_py.translate.l7.effects import find_without_effect
from istiod_py.translate.l7.notices import Notice, find_notices, find_provider_notices
from istiod_py.translate.l7.policies import PolicyFacts, ServiceFinder, policies_for
from istiod_py.translate.l7.sources import RouteDefaults, expand
from istiod_py.translate.l7.traffic import TrafficFacts
from istiod_py.translate.l7.upstream_tls import BackendTls, BackendVerdict, Credentials
from istiod_py.translate.memo import Memo
from istiod_py.translate.reading import Read, read_objects
from mesh.kube.backendtlspolicy import KubeBackendTlsPolicy, read_backend_tls_policy
from mesh.kube.configmap import KubeConfigMap, read_config_map
from mesh.kube.destinationrule import KubeDestinationRule, read_destination_rule
from mesh.kube.meshconfig import DEFAULT, NAME, MeshConfig, read_mesh_config
from mesh.kube.objects import FieldPath, KubeObject, ObjectKey, SourceProblem
from mesh.kube.ownership import WAYPOINT_ACCEPTED
from mesh.kube.policies import AuthorizationPolicy as KubePolicy
from mesh.kube.requestauthentication import RequestAuthentication as KubeAuthentication
from mesh.kube.requestauthentication import read_request_authentication
from mesh.kube.secret import KubeSecret, read_secret
from mesh.kube.virtualservice import patterns_of
from mesh.model.address import NamespacedHostname
from mesh.model.l7.destination import DestinationConfig
from mesh.model.l7.policy import AuthorizationPolicy, RequestAuthentication
from mesh.model.l7.routing import Destination
from mesh.model.l7.waypoint import WaypointSettings
from mesh.model.service import LoadBalancing, LoadBalancingMode

_T = TypeVar("_T")
DestinationMemo: TypeAlias = Memo[tuple[str, str], DestinationConfig]
"""By service (``namespace/hostname``) and the waypoint's namespace."""

KINDS = ("RequestAuthentication", "DestinationRule", "BackendTLSPolicy", "ConfigMap", "Secret")
"""What `read_rules` reads."""


@dataclass(frozen=True, slots=True)
class MeshRead:
    """The mesh configuration: the last good one, and what is wrong or without effect in the one there is now."""

    obj: KubeObject | None = None
    config: MeshConfig = DEFAULT
    problems: tuple[SourceProblem, ...] = ()


@dataclass(frozen=True, slots=True)
class RuleReads:
    """All objects of the kinds in `KINDS`; one translation hands its own to the next."""

    authentications: Mapping[ObjectKey, Read[KubeAuthentication]] = field(default_factory=dict)
    destination_rules: Mapping[ObjectKey, Read[KubeDestinationRule]] = field(default_factory=dict)
    backend_tls: Mapping[ObjectKey, Read[KubeBackendTlsPolicy]] = field(default_factory=dict)
    config_maps: Mapping[ObjectKey, Read[KubeConfigMap]] = field(default_factory=dict)
    secrets: Mapping[ObjectKey, Read[KubeSecret]] = field(default_factory=dict)
    mesh: MeshRead = field(default_factory=MeshRead)

    @property
    def problems(self) -> Iterator[SourceProblem]:
        """Mistakes in the objects."""
        for reads in (self.authentications, self.destination_rules, self.backend_tls, self.config_maps, self.secrets):
            for read in reads.values():
                yield from read.problems
        yield from self.mesh.problems


def read_rules(objects_of: Callable[[str], Iterable[KubeObject]], before: RuleReads, config: Config) -> RuleReads:
    """``objects_of``: by kind."""
    config_maps = read_objects(objects_of("ConfigMap"), read_config_map, before.config_maps)
    return RuleReads(
        authentications=read_objects(objects_of("RequestAuthentication"), read_request_authentication, before.authentications),
        destination_rules=read_objects(objects_of("DestinationRule"), read_destination_rule, before.destination_rules),
        backend_tls=read_objects(objects_of("BackendTLSPolicy"), read_backend_tls_policy, before.backend_tls),
        config_maps=config_maps,
        secrets=read_objects(objects_of("Secret"), read_secret, before.secrets),
        mesh=_read_mesh(config_maps.get(ObjectKey("ConfigMap", config.root_namespace, NAME)), before.mesh),
    )


def _read_mesh(read: Read[KubeConfigMap] | None, before: MeshRead) -> MeshRead:
    """A configuration that is taken away is the default again; one with mistakes leaves the last good one in force."""
    if read is None:
        return MeshRead()
    if read.obj is before.obj:
        return before
    found = read_mesh_config(read.obj, read.value)
    if found.mistakes:
        return MeshRead(read.obj, before.config, (*found.mistakes, *found.notices))
    return MeshRead(read.obj, found.config, found.notices)


@dataclass(frozen=True, slots=True)
class L7Facts:
    """What rules and policies look at of the mesh. ``destined`` and ``distribution`` (how a service itself wants its endpoints chosen) are
    by key, ``namespace/hostname``; ``endpoints_of`` gives those of a service, and the instances of the waypoints of a namespace;
    ``by_object`` has the keys of all services by what says that they are there."""

    services: ServiceFinder
    destined: Mapping[str, Destined] = field(default_factory=dict)
    distribution: Mapping[str, LoadBalancing] = field(default_factory=dict)
    endpoints_of: Callable[[str, str], Iterable[Endpoint]] = lambda key, namespace: ()
    by_object: Mapping[ObjectKey, tuple[str, ...]] = field(default_factory=dict)


class WaypointRules:
    """Ask for every waypoint's policies, and every destination that a waypoint of a namespace has, then for the `report`."""

    def __init__(
        self,
        reads: RuleReads,
        authorizations: Mapping[ObjectKey, Read[KubePolicy]],
        facts: L7Facts,
        config: Config,
        memo: DestinationMemo,
        key_sets: KeySets | None = None,
    ) -> None:
        self._reads = reads
        self._authorizations = authorizations
        self._facts = facts
        self._config = config
        self._memo = memo
        self._key_sets = key_sets or KeySets()
        self.mesh = reads.mesh.config
        self._policy_facts = PolicyFacts(config.root_namespace, self.trust_domains, self.mesh.providers, facts.services)
        self._credentials = Credentials(_by_place(reads.secrets), _by_place(reads.config_maps))
        self._defaults = RouteDefaults(config.domain_suffix, self.mesh.destination_rule_export_to)
        self._rules = DestinationRules(reads.destination_rules.values(), self._defaults, config.root_namespace)
        self._backend = BackendTls(reads.backend_tls.values(), self._credentials)
        self._used: dict[ObjectKey, set[str]] = {}
        self._configured: set[ObjectKey] = set()
        """What says that the destinations of waypoints are there."""
        self._subsets: dict[ObjectKey, dict[str, bool]] = {}
        """Of DestinationRules that are used: whether any workload is in each subset."""

    @property
    def trust_domains(self) -> tuple[str, ...]:
        """The mesh's own first."""
        return tuple(dict.fromkeys((self._config.trust_domain, *self.mesh.trust_domain_aliases)))

    @property
    def wanted_keys(self) -> dict[KeySource, float]:
        """The key sets to fetch, and how many seconds each may take."""
        return find_wanted(self._reads.authentications.values(), by_waypoints=self._key_sets.by_waypoints)

    def settings_of(self, settings: WaypointSettings) -> WaypointSettings:
        """With what holds for the whole mesh filled in."""
        return msgspec.structs.replace(
            settings,
            trust_domains=self.trust_domains,
            path_normalization=self.mesh.path_normalization,
            access_log=self.mesh.access_log,
            tracing=self.mesh.tracing,
        )

    def policies_of(self, waypoint: WaypointRef, services: Iterable[FrontedService]) -> list[AuthorizationPolicy | RequestAuthentication]:
        """Those that a waypoint enforces; ``services``: the ones it stands before."""
        fronted = Fronted(waypoint, services, self._facts.by_object)
        authorizations = policies_for(fronted, self._authorizations, self._policy_facts)
        authentications = authentications_for(fronted, self._reads.authentications, self._key_sets, self._config.root_namespace)
        return [*authorizations.values(), *authentications.values()]

    def destination_config(self, key: str, waypoint: WaypointRef) -> DestinationConfig:
        """Of ``namespace/hostname``; the defaults for one that is not known."""
        namespace, _, hostname = key.partition("/")
        destined = self._facts.destined.get(key) or Destined("", namespace, "", hostname, {})
        merged = self._rules.find(hostname, namespace, waypoint.namespace)
        backend = self._backend.find(destined.kind, namespace, destined.name, destined.ports.values())
        self._configured.add(ObjectKey(destined.kind, namespace, destined.name))
        for used in (*merged.keys, *(policy for policy, _ in backend.values())):
            self._used.setdefault(used, set()).add(waypoint.key)
        distribution = self._facts.distribution.get(key)
        facts = TrafficFacts(
            mesh=self.mesh,
            namespace=waypoint.namespace,
            credentials=self._credentials.only(_credentials_in(merged), waypoint.namespace),
            distribution=distribution,
            as_dialled=distribution is not None and distribution.mode is LoadBalancingMode.PASSTHROUGH,
        )
        inputs = destined, merged, {section: tls for section, (_, tls) in backend.items()}, facts
        config = self._memo.make((key, waypoint.namespace), inputs, configure)
        keys = wanted_labels(config)
        if not keys:
            return config
        endpoints = tuple(self._facts.endpoints_of(key, waypoint.namespace))
        self._note_subsets(merged, [each for each in endpoints if NamespacedHostname(namespace, hostname) in each.workload.services])
        return msgspec.structs.replace(config, labels=label_endpoints(keys, endpoints))

    def _note_subsets(self, merged: Merged, endpoints: list[Endpoint]) -> None:
        """A service that has nobody at all says nothing of its subsets."""
        for subset in merged.subsets if endpoints else ():
            filled = any(subset.labels.items() <= endpoint.labels.items() for endpoint in endpoints)
            for key in merged.keys:
                found = self._subsets.setdefault(key, {})
                found[subset.name] = found.get(subset.name, False) or filled

    def has_subset(self, destination: Destination, namespace: str) -> bool:
        """Whether the destination's subset is defined, seen from waypoints of ``namespace``."""
        merged = self._rules.find(destination.hostname, destination.namespace, namespace)
        return any(subset.name == destination.subset for subset in merged.subsets)

    # What is said of the objects

    def backend_verdicts(self) -> dict[ObjectKey, tuple[frozenset[str], BackendVerdict]]:
        """Of BackendTLSPolicies: the waypoints that look at each (``namespace/name``), and what is said of it."""
        return {key: (frozenset(self._used.get(key, ())), verdict) for key, verdict in self._backend.verdicts.items()}

    def conditions(self, targets: Targets) -> dict[ObjectKey, Condition]:
        """Of policies for waypoints, and of DestinationRules that some waypoint uses."""
        found: dict[ObjectKey, Condition] = {}
        for reads in (self._authorizations, self._reads.authentications):
            for key, read in reads.items():
                condition = acceptance_of(read, targets)
                if condition is not None:
                    found[key] = condition
        for key, rule in self._reads.destination_rules.items():
            told = _condition_of_rule(rule, sorted(self._used.get(key, ())))
            if told is not None:
                found[key] = told
        return found

    def notices(self, targets: Targets) -> Iterator[SourceProblem]:
        """What has no effect though it is right, or hardly the effect that was meant."""
        for read in self._authorizations.values():
            yield from _as_problems(read.obj, find_unbound(read, targets))
            if not read.good or read.problems:
                continue
            yield from _as_problems(read.obj, find_notices(read.value))
            if read.value.audience.has_waypoints:
                yield from _as_problems(read.obj, find_provider_notices(read.value, self._policy_facts))
        for authentication in self._reads.authentications.values():
            yield from _as_problems(authentication.obj, find_unbound(authentication, targets))
            if authentication.good and not authentication.value.audience.has_waypoints:
                message = "has no effect: waypoints verify tokens, and look at targetRefs alone"
                yield authentication.obj.problem(("spec",), message)
        for key, rule in self._reads.destination_rules.items():
            if rule.good and not rule.problems and (key in self._used or rule.value.selects_workloads):
                yield from _as_problems(rule.obj, find_without_effect(rule.value))
                yield from _as_problems(rule.obj, self._find_empty_subsets(key, rule.value))
            elif rule.good and not rule.problems and self._is_unknown(rule.value):
                yield rule.obj.problem(("spec", "host"), f"no service has the hostname {rule.value.host}: it has no effect")

        for key, backend in self._reads.backend_tls.items():
            if not backend.problems:
                yield from _as_problems(backend.obj, self._find_backend_notices(key, backend.value))

    def _find_empty_subsets(self, key: ObjectKey, rule: KubeDestinationRule) -> Iterator[Notice]:
        filled = self._subsets.get(key, {})
        for index, subset in enumerate(rule.subsets):
            if filled.get(subset.name) is False:
                message = f"no workload of {rule.host} has these labels: nobody serves what goes to subset {subset.name}"
                yield Notice(("spec", "subsets", index, "labels"), message)

    def _find_backend_notices(self, key: ObjectKey, policy: KubeBackendTlsPolicy) -> Iterator[Notice]:
        """What its conditions say, and what they can't: a policy that no waypoint looks at has none."""
        verdict = self._backend.verdicts[key]
        validation: FieldPath = ("spec", "validation", "caCertificateRefs" if policy.authorities else "wellKnownCACertificates")
        conflicted = verdict.accepted.reason == "Conflicted"
        if not verdict.resolved.status:
            yield Notice(validation, verdict.resolved.message)
        elif not verdict.accepted.status:
            yield Notice(("spec", "targetRefs") if conflicted else validation, verdict.accepted.message)
        for index, target in enumerate(policy.targets):
            place = ObjectKey(target.kind, policy.namespace, target.name)
            if place not in self._facts.by_object:
                yield Notice(("spec", "targetRefs", index), f"there is no {target.kind} {policy.namespace}/{target.name}: it has no effect")
            elif place not in self._configured:
                yield Notice(("spec", "targetRefs", index), f"no waypoint stands before {target.kind} {target.name}: it has no effect")

    def _is_unknown(self, rule: KubeDestinationRule) -> bool:
        host = expand(rule.host, rule.namespace, self._defaults)
        return not host.startswith("*") and self._hostnames.isdisjoint(patterns_of(host))

    @cached_property
    def _hostnames(self) -> frozenset[str]:
        return frozenset(key.partition("/")[2] for key in self._facts.destined)


def _condition_of_rule(read: Read[KubeDestinationRule], waypoints: list[str]) -> Condition | None:
    """`WaypointAccepted` is true also where a part has no effect, as `ZtunnelAccepted` is; the reason says it then."""
    if read.problems:
        effect = "the last good version stays in force" if read.good else "not used, and no request goes where it speaks of TLS"
        return Condition(WAYPOINT_ACCEPTED, False, "Invalid", f"{effect}: {read.problems[0]}")
    if not waypoints:
        return None
    without = [f"{_dotted(notice)} {notice.message}" for notice in find_without_effect(read.value)]
    if without:
        return Condition(WAYPOINT_ACCEPTED, True, "UnsupportedValue", f"used by {', '.join(waypoints)}; {'; '.join(without)}")
    return Condition(WAYPOINT_ACCEPTED, True, "Accepted", f"used by {', '.join(waypoints)}")


def _dotted(notice: Notice) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in notice.path).removeprefix(".")


def _as_problems(obj: KubeObject, notices: Iterable[Notice]) -> Iterator[SourceProblem]:
    return (obj.problem(notice.path, notice.message) for notice in notices)


def _by_place(reads: Mapping[ObjectKey, Read[_T]]) -> dict[tuple[str, str], _T]:
    return {(key.namespace, key.name): read.value for key, read in reads.items() if read.good}


def _credentials_in(merged: Merged) -> set[str]:
    names: set[str] = set()
    for piece in merged.pieces():
        for blocks in (piece.settings.blocks, *(blocks for _, blocks in piece.settings.ports)):
            if blocks.tls is not None and blocks.tls.credential_name:
                names.add(blocks.tls.credential_name)
    return names

"""All objects of a cluster into all workloads, services and policies; what did not change since the last time is taken from there.

Everything is looked at every time, but only compared: an object that is the same instance, in surroundings that are the same (its node's
locality, its namespace's services, selectors and mTLS modes), has the same result. So a change costs what depends on it plus
about a microsecond an object, and the result never depends on which changes were announced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from istiod_py.translate.authorization import L4Policy, close, translate_authorization
from istiod_py.translate.config import Condition, Config
from istiod_py.translate.peer_authentication import MeshMtls, NamespaceMtls, resolve_mtls
from istiod_py.translate.pods import locality_of_node, translate_pod
from istiod_py.translate.services import translate_service
from mesh.kube.objects import KubeObject, ObjectKey, SourceProblem, by_age
from mesh.kube.pod import KubePod, read_pod
from mesh.kube.policies import AuthorizationPolicy, PeerAuthentication, read_authorization_policy, read_peer_authentication
from mesh.kube.service import KubeService, read_service
from mesh.model.labels import NETWORK
from mesh.model.policy import Policy
from mesh.model.service import Service
from mesh.model.workload import Locality, Workload

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Read(Generic[_T]):
    """An object and its reading."""

    obj: KubeObject
    value: _T
    """As the object is now, or its last good version where it has mistakes now."""
    problems: tuple[SourceProblem, ...]
    good: bool
    """Whether ``value`` is free of mistakes."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a pod's translation depends on besides the pod and its node."""

    services: tuple[KubeService, ...] = ()
    selectors: tuple[tuple[str, Mapping[str, str]], ...] = ()
    """(policy key, selector) of the policies that workloads of the namespace may have to name."""
    mtls: NamespaceMtls = field(default_factory=NamespaceMtls)
    network: str = ""


@dataclass(frozen=True, slots=True)
class TranslatedPod:
    obj: KubeObject
    locality: Locality
    surroundings: Surroundings
    workload: Workload | None


@dataclass(frozen=True, slots=True)
class Memory:
    """What a translation leaves for the next one."""

    config: Config | None = None
    pods: Mapping[ObjectKey, Read[KubePod]] = field(default_factory=dict)
    services: Mapping[ObjectKey, Read[KubeService]] = field(default_factory=dict)
    authorizations: Mapping[ObjectKey, Read[AuthorizationPolicy]] = field(default_factory=dict)
    peers: Mapping[ObjectKey, Read[PeerAuthentication]] = field(default_factory=dict)
    surroundings: Mapping[str, Surroundings] = field(default_factory=dict)
    translated: Mapping[ObjectKey, TranslatedPod] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Translation:
    """Keys are the xDS resource names: uid, ``namespace/hostname``, ``namespace/name``. A value that did not change compares equal to the
    one before, mostly by identity."""

    workloads: Mapping[str, Workload] = field(default_factory=dict)
    services: Mapping[str, Service] = field(default_factory=dict)
    policies: Mapping[str, Policy] = field(default_factory=dict)
    problems: tuple[SourceProblem, ...] = ()
    """Mistakes in the objects. A source that checks objects itself reports some of them too."""
    statuses: Mapping[ObjectKey, tuple[Condition, ...]] = field(default_factory=dict)
    memory: Memory = field(default_factory=Memory, compare=False, repr=False)


def translate(objects: Iterable[KubeObject], previous: Translation | None, config: Config) -> Translation:
    """Translate all ``objects``. ``previous`` (None the first time) saves work, and provides the last good version of objects that have
    mistakes now."""
    return _Translator(objects, previous.memory if previous else Memory(), config).translate()


class _Translator:
    def __init__(self, objects: Iterable[KubeObject], memory: Memory, config: Config) -> None:
        self._memory = memory
        self._config = config
        self._problems: list[SourceProblem] = []
        self._statuses: dict[ObjectKey, tuple[Condition, ...]] = {}
        self._policies: dict[str, Policy] = {}
        self._by_kind: dict[str, list[KubeObject]] = {}
        for obj in objects:
            self._by_kind.setdefault(obj.kind, []).append(obj)
        self._namespaces = {obj.name: obj for obj in self._of("Namespace")}
        root = self._namespaces.get(config.root_namespace)
        self._network = root.labels.get(NETWORK, "") if root else ""

    def translate(self) -> Translation:
        services = self._read("Service", read_service, self._memory.services)
        authorizations = self._read("AuthorizationPolicy", read_authorization_policy, self._memory.authorizations)
        peers = self._read("PeerAuthentication", read_peer_authentication, self._memory.peers)
        pods = self._read("Pod", read_pod, self._memory.pods)
        selectors = self._translate_authorizations(authorizations)
        mtls = self._resolve_mtls(peers)
        self._policies.update(mtls.policies)
        surroundings = self._survey(pods, services, selectors, mtls)
        translated = self._translate_pods(pods, surroundings)
        memory = Memory(self._config, pods, services, authorizations, peers, surroundings, translated)
        return Translation(
            workloads={t.workload.uid: t.workload for t in translated.values() if t.workload is not None},
            services=self._translate_services(services),
            policies=self._policies,
            problems=tuple(sorted(set(self._problems))),
            statuses=self._statuses,
            memory=memory,
        )

    def _of(self, kind: str) -> list[KubeObject]:
        return self._by_kind.get(kind, [])

    def _read(
        self, kind: str, reader: Callable[[KubeObject], tuple[_T, tuple[SourceProblem, ...]]], before: Mapping[ObjectKey, Read[_T]]
    ) -> dict[ObjectKey, Read[_T]]:
        """Read all objects of a kind; one with mistakes keeps its last good version."""
        result: dict[ObjectKey, Read[_T]] = {}
        for obj in self._of(kind):
            last = before.get(obj.key)
            if last is not None and last.obj is obj:
                read = last
            else:
                value, problems = reader(obj)
                problems = tuple(dict.fromkeys((*obj.problems, *problems)))
                if problems and last is not None and last.good:
                    read = Read(obj, last.value, problems, True)
                else:
                    read = Read(obj, value, problems, not problems)
            result[obj.key] = read
            self._problems.extend(read.problems)
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
            if l4.policy is not None:
                self._policies[l4.policy.key] = l4.policy
                if l4.selector is not None:
                    selectors.setdefault(key.namespace, []).append((l4.policy.key, l4.selector))
        return selectors

    def _translate_authorization(self, read: Read[AuthorizationPolicy]) -> L4Policy:
        if not read.good:
            return close(read.obj, read.value, read.problems, self._config)
        l4 = translate_authorization(read.value, self._config)
        if read.problems:
            stays = Condition("ZtunnelAccepted", False, "Invalid", f"the last good version stays in force: {read.problems[0]}")
            return L4Policy(l4.policy, l4.selector, stays)
        return l4

    def _resolve_mtls(self, reads: Mapping[ObjectKey, Read[PeerAuthentication]]) -> MeshMtls:
        ordered = by_age([read.obj for read in reads.values()])
        good = [reads[obj.key].value for obj in ordered if reads[obj.key].good]
        mistaken = [_unselected_if_unsure(reads[obj.key]) for obj in ordered if not reads[obj.key].good]
        return resolve_mtls(good, mistaken, self._config)

    def _survey(
        self,
        pods: Mapping[ObjectKey, Read[KubePod]],
        services: Mapping[ObjectKey, Read[KubeService]],
        selectors: Mapping[str, list[tuple[str, Mapping[str, str]]]],
        mtls: MeshMtls,
    ) -> dict[str, Surroundings]:
        """The surroundings of each namespace with pods: the same instance as before when nothing in them changed."""
        by_namespace: dict[str, list[KubeService]] = {}
        for key in sorted(services):
            if services[key].good:
                by_namespace.setdefault(key.namespace, []).append(services[key].value)
        root = self._config.root_namespace
        result: dict[str, Surroundings] = {}
        for namespace in {key.namespace for key in pods}:
            found = selectors.get(namespace, []) + (selectors.get(root, []) if namespace != root else [])
            now = Surroundings(tuple(by_namespace.get(namespace, ())), tuple(sorted(found, key=_first)), mtls.of(namespace), self._network)
            before = self._memory.surroundings.get(namespace)
            result[namespace] = before if before == now and before is not None else now
        return result

    def _translate_pods(
        self, pods: Mapping[ObjectKey, Read[KubePod]], surroundings: Mapping[str, Surroundings]
    ) -> dict[ObjectKey, TranslatedPod]:
        localities = {obj.name: locality_of_node(obj.labels) for obj in self._of("Node")}
        before = self._memory.translated if self._memory.config == self._config else {}
        result: dict[ObjectKey, TranslatedPod] = {}
        for key, read in pods.items():
            if not read.good:
                continue
            locality = localities.get(read.value.node, _NOWHERE)
            around = surroundings[key.namespace]
            last = before.get(key)
            if last is not None and last.obj is read.obj and last.surroundings is around and last.locality == locality:
                result[key] = last
            else:
                result[key] = TranslatedPod(read.obj, locality, around, self._translate_pod(read.value, around, locality))
        return result

    def _translate_pod(self, pod: KubePod, around: Surroundings, locality: Locality) -> Workload | None:
        selected = [key for key, selector in around.selectors if selector.items() <= pod.labels.items()]
        return translate_pod(
            pod,
            services=around.services,
            authorization_policies=tuple(sorted((*selected, *around.mtls.names_for(pod.labels)))),
            locality=locality,
            network=around.network,
            config=self._config,
        )

    def _translate_services(self, reads: Mapping[ObjectKey, Read[KubeService]]) -> dict[str, Service]:
        result: dict[str, Service] = {}
        for key, read in reads.items():
            namespace = self._namespaces.get(key.namespace)
            service = translate_service(
                read.value,
                namespace_annotations=namespace.annotations if namespace else {},
                network=self._network,
                config=self._config,
            )
            if service is not None and read.good:
                result[str(service.key)] = service
        return result


_NOWHERE = Locality()


def _first(pair: tuple[str, Mapping[str, str]]) -> str:
    return pair[0]


def _unselected_if_unsure(read: Read[PeerAuthentication]) -> PeerAuthentication:
    """A mistaken policy whose selector is part of the mistake may have meant the whole namespace."""
    peer = read.value
    if any(problem.field in ("", "spec") or problem.field.startswith("spec.selector") for problem in read.problems):
        return PeerAuthentication(peer.namespace, peer.name, None, peer.mode, peer.port_modes)
    return peer

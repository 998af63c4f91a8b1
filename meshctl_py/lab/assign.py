"""Who gets which node, uid and addresses: pure and stable (what has one keeps it); what can't be placed says why."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Final

from mesh.kube.fields import did_you_mean
from mesh.kube.objects import FieldPath
from mesh.model.address import IpAddress
from meshctl_py.lab.spec import Cluster, PodKey, PodSpec, ServiceKey, ServiceSpec

NODES_V4: Final = IPv4Network("10.99.0.0/24")
NODES_V6: Final = IPv6Network("fd99::/64")
PODS_V4: Final = IPv4Network("10.244.0.0/16")
PODS_V6: Final = IPv6Network("fd00:10:244::/48")
SERVICES_V4: Final = IPv4Network("10.96.0.0/16")
SERVICES_V6: Final = IPv6Network("fd00:10:96::/108")
"""The ranges that kubeadm and its usual networks have; they exist in the lab's own namespaces only."""

ROUTER: Final = (NODES_V4[1], NODES_V6[1])
CONTROL_PLANE: Final = (NODES_V4[2], NODES_V6[2])
CLUSTER_DNS: Final = (SERVICES_V4[10], SERVICES_V6[10])

MAX_NODES: Final = 240
MAX_PODS_PER_NODE: Final = 250
_NODES_FROM: Final = 10
_SERVICES_FROM: Final = 257
"""Below: the cluster DNS, and room for addresses that users write into their files."""
_MAX_SERVICES: Final = 60_000


@dataclass(frozen=True, slots=True)
class NodeAssignment:
    """``index`` from 1; it numbers the node's pod ranges."""

    name: str
    index: int

    @property
    def ips(self) -> tuple[IPv4Address, IPv6Address]:
        return NODES_V4[_NODES_FROM + self.index], NODES_V6[_NODES_FROM + self.index]

    @property
    def pod_ranges(self) -> tuple[IPv4Network, IPv6Network]:
        v4 = IPv4Network((int(PODS_V4.network_address) + (self.index << 8), 24))
        return v4, IPv6Network((int(PODS_V6.network_address) + (self.index << 64), 64))


@dataclass(frozen=True, slots=True)
class PodAssignment:
    """A pod that has a place. A new ``uid`` is a new pod, also under an old name."""

    spec: PodSpec
    uid: str
    node: str
    ips: tuple[IpAddress, ...]


@dataclass(frozen=True, slots=True)
class Unplaced:
    """An object that could not be given what it needs."""

    kind: str
    namespace: str
    name: str
    because: str
    path: FieldPath = ()
    """The field that asks for it, if one does."""


@dataclass(frozen=True, slots=True)
class Assignments:
    nodes: Mapping[str, NodeAssignment] = field(default_factory=dict)
    pods: Mapping[PodKey, PodAssignment] = field(default_factory=dict)
    vips: Mapping[ServiceKey, tuple[IpAddress, ...]] = field(default_factory=dict)
    """Of every service that has any, whether the lab chose them or the user."""
    unplaced: tuple[Unplaced, ...] = ()


def assign(cluster: Cluster, previous: Assignments, new_uid: Callable[[], str]) -> Assignments:
    """Places for everything in the cluster. Pods whose spec changed are new pods; what is gone frees its addresses."""
    unplaced: list[Unplaced] = []
    nodes = _assign_nodes(cluster.nodes, previous.nodes, unplaced)
    pods = _assign_pods(cluster.pods, nodes, previous.pods, unplaced, new_uid)
    vips = _assign_vips(cluster.services, previous.vips, unplaced)
    return Assignments(nodes, pods, vips, tuple(unplaced))


def _assign_nodes(names: Iterable[str], previous: Mapping[str, NodeAssignment], unplaced: list[Unplaced]) -> dict[str, NodeAssignment]:
    names = list(names)
    taken = {previous[name].index for name in names if name in previous}
    free = (index for index in range(1, MAX_NODES + 1) if index not in taken)
    nodes: dict[str, NodeAssignment] = {}
    for name in names:
        if name in previous:
            nodes[name] = previous[name]
        elif (index := next(free, None)) is not None:
            nodes[name] = NodeAssignment(name, index)
        else:
            unplaced.append(Unplaced("Node", "", name, f"a lab has at most {MAX_NODES} nodes"))
    return nodes


class _NodeAddresses:
    """Free pod addresses of one node: the n-th of both ranges, so that a pod's two addresses end alike."""

    def __init__(self, node: NodeAssignment, taken: set[IpAddress]) -> None:
        self._pairs = self._free_pairs(node, taken)

    def take(self) -> tuple[IpAddress, ...] | None:
        return next(self._pairs, None)

    @staticmethod
    def _free_pairs(node: NodeAssignment, taken: set[IpAddress]) -> Iterator[tuple[IpAddress, ...]]:
        v4, v6 = node.pod_ranges
        for number in range(2, MAX_PODS_PER_NODE + 2):
            pair = (v4[number], v6[number])
            if taken.isdisjoint(pair):
                taken.update(pair)
                yield pair


def _assign_pods(
    specs: Mapping[PodKey, PodSpec],
    nodes: Mapping[str, NodeAssignment],
    previous: Mapping[PodKey, PodAssignment],
    unplaced: list[Unplaced],
    new_uid: Callable[[], str],
) -> dict[PodKey, PodAssignment]:
    pods = {key: kept for key, spec in specs.items() if (kept := _keep(spec, previous.get(key), nodes)) is not None}
    taken = {ip for pod in pods.values() if not pod.spec.host_network for ip in pod.ips}
    load = {name: sum(pod.node == name for pod in pods.values()) for name in nodes}
    fresh = [spec for key, spec in specs.items() if key not in pods]
    addresses = {name: _NodeAddresses(node, taken) for name, node in nodes.items()}
    for spec in sorted(fresh, key=lambda spec: not spec.ips):  # whoever asks for an address gets it before others are given any
        name = spec.node or min(load, key=lambda name: load[name], default=None)
        if name is None or name not in nodes:
            because = f"there is no node {name}{did_you_mean(name, nodes)}" if name else "there is no node"
            unplaced.append(Unplaced("Pod", *spec.key, because, ("spec", "nodeName") if name else ()))
            continue
        ips = _pod_addresses(spec, nodes[name], addresses[name], taken)
        if isinstance(ips, str):
            unplaced.append(Unplaced("Pod", *spec.key, ips))
            continue
        load[name] += 1
        pods[spec.key] = PodAssignment(spec, new_uid(), name, ips)
    return {key: pods[key] for key in specs if key in pods}


def _keep(spec: PodSpec, before: PodAssignment | None, nodes: Mapping[str, NodeAssignment]) -> PodAssignment | None:
    if before is None or before.node not in nodes or not spec.runs_like(before.spec):
        return None
    return before if spec == before.spec else PodAssignment(spec, before.uid, before.node, before.ips)


def _pod_addresses(spec: PodSpec, node: NodeAssignment, addresses: _NodeAddresses, taken: set[IpAddress]) -> tuple[IpAddress, ...] | str:
    if spec.host_network:
        return node.ips
    if not spec.ips:
        return addresses.take() or f"node {node.name} has no pod address left"
    if len({ip.version for ip in spec.ips}) != len(spec.ips):
        return "a pod has at most one address of each family"
    for ip in spec.ips:
        if ip in taken:
            return f"address {ip} belongs to another pod"
        if any(ip in network for network in (NODES_V4, NODES_V6, SERVICES_V4, SERVICES_V6) if network.version == ip.version):
            return f"address {ip} lies in a range of nodes or services"
    taken.update(spec.ips)
    return spec.ips


def _assign_vips(
    services: Mapping[ServiceKey, ServiceSpec],
    previous: Mapping[ServiceKey, tuple[IpAddress, ...]],
    unplaced: list[Unplaced],
) -> dict[ServiceKey, tuple[IpAddress, ...]]:
    vips: dict[ServiceKey, tuple[IpAddress, ...]] = {}
    taken: set[IpAddress] = set(CLUSTER_DNS)
    for key, service in services.items():
        if service.headless or not service.cluster_ips:
            continue
        if clash := taken.intersection(service.cluster_ips):
            unplaced.append(Unplaced("Service", *key, f"address {min(map(str, clash))} belongs to another service"))
            continue
        vips[key] = service.cluster_ips
        taken.update(service.cluster_ips)
    fresh: list[ServiceSpec] = []
    for key, service in services.items():
        if service.headless or service.cluster_ips:
            continue
        kept = previous.get(key, ())
        if kept and tuple(ip.version for ip in kept) == service.families and taken.isdisjoint(kept):
            vips[key] = kept
            taken.update(kept)
        else:
            fresh.append(service)
    numbers = (n for n in itertools.count(_SERVICES_FROM) if SERVICES_V4[n] not in taken and SERVICES_V6[n] not in taken)
    for service in fresh:
        number = next(numbers)
        if number > _MAX_SERVICES:
            unplaced.append(Unplaced("Service", *service.key, "no service address is left"))
            continue
        vips[service.key] = tuple(SERVICES_V4[number] if family == 4 else SERVICES_V6[number] for family in service.families)
    return {key: vips[key] for key in services if key in vips}

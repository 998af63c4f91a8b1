"""The mesh as the control plane describes it, indexed so that a connection asks by look-ups and never by a scan.

One thread reads and writes it: `apply` neither waits nor fails, so a reader sees all of a delta or nothing of it. What arrives equal to
what is here changes nothing: the object that is here stays, and with it everything derived from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from mesh.authz.evaluate import AppliedPolicies
from mesh.model.address import GatewayAddress, InvalidAddress, IpAddress, NamespacedHostname, NetworkAddress
from mesh.model.identity import SpiffeId
from mesh.model.l7.waypoint import Assigned
from mesh.model.policy import Policy, Scope
from mesh.model.service import Service, Visibility
from mesh.model.workload import NetworkMode, TunnelProtocol, Workload
from mesh.state.balance import Endpoint, PickList, Place, Wanted, list_picks, place_of, target_port
from mesh.state.index import CidrIndex, Index


@dataclass(frozen=True, slots=True)
class Delta:
    """What changed. An object that is both removed and given stays as it is given; of two with one key the later counts."""

    workloads: tuple[Workload, ...] = ()
    services: tuple[Service, ...] = ()
    policies: tuple[Policy, ...] = ()
    removed_addresses: tuple[str, ...] = ()
    """xDS names: the uid of a workload, or ``namespace/hostname`` of a service. Unknown ones are passed over."""
    removed_policies: tuple[str, ...] = ()
    l7: tuple[Assigned, ...] = ()
    """What waypoints are told besides. `MeshState` keeps none of it: it passes through."""
    removed_l7: tuple[tuple[str, str], ...] = ()
    """Type URL and name (`mesh.xds.l7`)."""


def joined(parts: Iterable[Delta]) -> Delta:
    """Several as one. What one of them gives another must not remove."""
    pieces = list(parts)
    return Delta(
        tuple(workload for part in pieces for workload in part.workloads),
        tuple(service for part in pieces for service in part.services),
        tuple(policy for part in pieces for policy in part.policies),
        tuple(name for part in pieces for name in part.removed_addresses),
        tuple(name for part in pieces for name in part.removed_policies),
        tuple(assigned for part in pieces for assigned in part.l7),
        tuple(name for part in pieces for name in part.removed_l7),
    )


@dataclass(frozen=True, slots=True)
class Changes:
    """What `apply` really changed: objects that are new, gone, or differ from before."""

    workloads: frozenset[str] = frozenset()
    services: frozenset[NamespacedHostname] = frozenset()
    """Services whose own description changed; a change of their endpoints is a change of workloads."""
    policies: frozenset[str] = frozenset()

    @property
    def policies_changed(self) -> bool:
        return bool(self.policies)

    def __bool__(self) -> bool:
        return bool(self.workloads or self.services or self.policies)


# Workloads that share a namespace and a list of policies share their AppliedPolicies, so on a node there are as many as there are kinds
# of pods. The bound is for a control plane that invents a new list every time: beyond it connections are merely judged once more.
_APPLIED_KEPT = 4096


class MeshState:
    """Workloads, services and policies, and the indices over them.

    ``node`` limits `find_local_workload` to the workloads of that node; None knows those of all.
    """

    def __init__(self, node: str | None = None) -> None:
        self._node = node
        self._workloads: dict[str, Workload] = {}
        self._services: dict[NamespacedHostname, Service] = {}
        self._policies: dict[str, Policy] = {}
        self._workloads_by_address: Index[NetworkAddress, Workload] = Index(_network_addresses)
        self._workloads_by_hostname: Index[str, Workload] = Index(lambda workload: (workload.hostname,) if workload.hostname else ())
        self._workloads_by_account: Index[_Account, Workload] = Index(self._local_account)
        self._workloads_by_service: Index[NamespacedHostname, Workload] = Index(lambda workload: workload.services)
        self._services_by_vip: Index[NetworkAddress, Service] = Index(lambda service: service.addresses)
        self._services_by_cidr = CidrIndex()
        self._services_by_hostname: Index[str, Service] = Index(lambda service: (_folded(service.hostname),))
        self._policies_by_scope: Index[_ScopeKey, Policy] = Index(_scope_keys)
        self._applied: dict[tuple[str, tuple[str, ...]], AppliedPolicies] = {}
        self._picks: dict[NamespacedHostname, dict[tuple[Wanted, Place], PickList]] = {}
        self.generation = 0
        """Another number after every change of workloads or services: what was found before it may be found no more."""
        self.version = 0
        """The same after a change of policies too: what was decided before it may be decided otherwise."""

    # Change

    def apply(self, delta: Delta) -> Changes:
        """Make the change. An endpoint may come before its service, and a workload before a policy that it names."""
        workloads: dict[str, Workload | None] = {}
        services: dict[NamespacedHostname, Service | None] = {}
        for name in delta.removed_addresses:
            if name in self._workloads:
                workloads[name] = None
            elif (key := _service_name(name)) is not None:
                services[key] = None
        workloads |= {workload.uid: workload for workload in delta.workloads}
        services |= {service.key: service for service in delta.services}
        policies: dict[str, Policy | None] = dict.fromkeys(delta.removed_policies)
        policies |= {policy.key: policy for policy in delta.policies}
        changes = Changes(
            frozenset([uid for uid, workload in workloads.items() if self._put_workload(uid, workload)]),
            frozenset([key for key, service in services.items() if self._put_service(key, service)]),
            frozenset([key for key, policy in policies.items() if self._put_policy(key, policy)]),
        )
        if changes.policies:
            self._reapply_policies()
        if changes.workloads or changes.services:
            self.generation += 1
        if changes:
            self.version += 1
        return changes

    def replace(self, whole: Delta, *, addresses: bool, policies: bool) -> Changes:
        """Make the change, and remove what is absent from it: of workloads and services, of policies, or of both."""
        gone_addresses: list[str] = []
        if addresses:
            gone_addresses += self._workloads.keys() - {workload.uid for workload in whole.workloads}
            gone_addresses += map(str, self._services.keys() - {service.key for service in whole.services})
        gone_policies = self._policies.keys() - {policy.key for policy in whole.policies} if policies else ()
        return self.apply(
            Delta(
                whole.workloads,
                whole.services,
                whole.policies,
                (*whole.removed_addresses, *gone_addresses),
                (*whole.removed_policies, *gone_policies),
            )
        )

    # Each of these puts one object in or, with None, takes it out, and says whether that changed anything.

    def _put_workload(self, uid: str, new: Workload | None) -> bool:
        old = self._workloads.get(uid)
        if old == new:
            return False
        if new is None:
            del self._workloads[uid]
        else:
            self._workloads[uid] = new
        self._workloads_by_address.replace(old, new)
        self._workloads_by_hostname.replace(old, new)
        self._workloads_by_account.replace(old, new)
        self._workloads_by_service.replace(old, new)
        for workload in (old, new):
            for service in workload.services if workload is not None else ():
                self._picks.pop(service, None)
        return True

    def _put_service(self, key: NamespacedHostname, new: Service | None) -> bool:
        old = self._services.get(key)
        if old == new:
            return False
        if new is None:
            del self._services[key]
        else:
            self._services[key] = new
        self._services_by_vip.replace(old, new)
        self._services_by_cidr.replace(old, new)
        self._services_by_hostname.replace(old, new)
        self._picks.pop(key, None)
        return True

    def _put_policy(self, key: str, new: Policy | None) -> bool:
        old = self._policies.get(key)
        if old == new:
            return False
        if new is None:
            del self._policies[key]
        else:
            self._policies[key] = new
        self._policies_by_scope.replace(old, new)
        return True

    def _reapply_policies(self) -> None:
        for key, before in list(self._applied.items()):
            now = self._collect_policies(*key)
            if now != before:
                self._applied[key] = now

    # Workloads

    def workloads(self) -> Iterator[Workload]:
        """All of them."""
        return iter(self._workloads.values())

    def find_workload(self, uid: str) -> Workload | None:
        return self._workloads.get(uid)

    def find_workload_at(self, address: NetworkAddress) -> Workload | None:
        """The workload with this address. Of several a pod goes before what is no pod, then HBONE before plain TCP.

        Workloads on their host's network are not found: the address is shared by everything on that host.
        """
        workloads = self._workloads_by_address.find(address)
        return min(workloads, key=_preference) if workloads else None

    def find_workload_of_peer(self, ip: IpAddress, network: str, identity: SpiffeId | None) -> Workload | None:
        """The workload that a connection came from, for telemetry: one with this address and, if it proved one, this identity."""
        workloads = self._workloads_by_address.find(NetworkAddress(network, ip))
        if identity is not None:
            workloads = tuple(workload for workload in workloads if workload.identity == identity)
        return min(workloads, key=_preference) if workloads else None

    def find_local_workload(self, namespace: str, name: str, service_account: str) -> Workload | None:
        """The workload that a pod of this node is: all three must agree."""
        workloads = self._workloads_by_account.find((namespace, name, service_account))
        return min(workloads, key=_preference) if workloads else None

    def find_workload_by_hostname(self, hostname: str) -> Workload | None:
        """A workload known by a hostname of its own; such names are unique in the mesh (ztunnel's assumption)."""
        workloads = self._workloads_by_hostname.find(hostname)
        return min(workloads, key=_preference) if workloads else None

    def _local_account(self, workload: Workload) -> tuple[_Account, ...]:
        if self._node is not None and workload.node != self._node:
            return ()
        return ((workload.namespace, workload.name, workload.service_account),)

    # Services

    def services(self) -> Iterator[Service]:
        """All of them."""
        return iter(self._services.values())

    def find_service(self, key: NamespacedHostname) -> Service | None:
        return self._services.get(key)

    def find_service_at(self, address: NetworkAddress, client_namespace: str) -> Service | None:
        """The service with this virtual address, as clients of a namespace see it.

        Their own namespace's goes before the canonical one, that before the first by name. An exact address goes before a range; of
        ranges one of their own namespace before a longer one of another.
        """
        exact = _visible(self._services_by_vip.find(address), client_namespace)
        if exact:
            return min(exact, key=lambda service: _closeness(service, client_namespace))
        _, ranged = min(
            (
                ((service.namespace != client_namespace, -length, not service.canonical, service.key), service)
                for length, service in self._services_by_cidr.find(address.network, address.ip)
                if _is_visible(service, client_namespace)
            ),
            key=lambda ranked: ranked[0],
            default=(None, None),
        )
        return ranged

    def find_services_by_hostname(self, hostname: str, client_namespace: str) -> list[Service]:
        """The services of this name, in whatever case, that clients of a namespace see, the one meant by it first."""
        services = _visible(self._services_by_hostname.find(_folded(hostname)), client_namespace)
        return sorted(services, key=lambda service: _closeness(service, client_namespace)) if len(services) > 1 else services

    def find_destination_service(self, workload: Workload, port: int, hostname: str | None) -> Service | None:
        """The service that a client of this workload's ``port`` meant, for telemetry.

        A guess: the one the client names if the workload belongs to it, else the first by name that leads to this port.
        """
        services = sorted((service for key in workload.services if (service := self._services.get(key)) is not None), key=_service_key)
        if hostname:
            for service in services:
                if service.hostname == hostname:
                    return service
        for service in services:
            if any(target_port(service, workload.services[service.key], offered.service_port) == port for offered in service.ports):
                return service
        return None

    def endpoints(self, key: NamespacedHostname) -> Iterator[Endpoint]:
        """The endpoints of a service, healthy or not; also of one that is not known itself."""
        for workload in self._workloads_by_service.find(key):
            yield Endpoint(workload, workload.services[key])

    def picks(self, service: Service, wanted: Wanted, source: Workload) -> PickList:
        """The endpoints among which connections from ``source`` are spread; kept until the service or one of its endpoints changes."""
        if not wanted.waypoint and all(port.service_port != wanted.port for port in service.ports):
            # Not kept: what an application dials must not fill our memory.
            return PickList((), f"it has no port {wanted.port}")
        key = (wanted, place_of(source, service))
        kept = self._picks.setdefault(service.key, {})
        picks = kept.get(key)
        if picks is None:
            picks = kept[key] = list_picks(service, self.endpoints(service.key), *key)
        return picks

    def is_gateway(self, workload: Workload, gateway: GatewayAddress) -> bool:
        """Whether this workload is one that ``gateway`` names, as an endpoint of the service or by itself."""
        destination = gateway.destination
        if isinstance(destination, NamespacedHostname):
            if destination in workload.services or destination in self._services:
                return destination in workload.services
            return workload.hostname != "" and workload.hostname == destination.hostname
        if destination.network == workload.network and destination.ip in workload.addresses:
            return True
        return any(service.key in workload.services for service in self._services_by_vip.find(destination))

    # Policies

    def policies(self) -> Iterator[Policy]:
        """All of them."""
        return iter(self._policies.values())

    def find_policy(self, key: str) -> Policy | None:
        return self._policies.get(key)

    def policies_for(self, workload: Workload) -> AppliedPolicies:
        """The policies that apply to a workload; the same object until one of them changes, so that callers may compare with ``is``."""
        key = (workload.namespace, workload.authorization_policies)
        applied = self._applied.get(key)
        if applied is None:
            if len(self._applied) >= _APPLIED_KEPT:
                self._applied.clear()
            applied = self._applied[key] = self._collect_policies(*key)
        return applied

    def _collect_policies(self, namespace: str, named: tuple[str, ...]) -> AppliedPolicies:
        by_scope = (*self._policies_by_scope.find((Scope.GLOBAL, "")), *self._policies_by_scope.find((Scope.NAMESPACE, namespace)))
        policies = {policy.key: policy for policy in by_scope}
        unresolved: set[str] = set()
        for key in named:
            policy = self._policies.get(key)
            if policy is None:
                unresolved.add(key)
            else:
                policies[key] = policy
        return AppliedPolicies(tuple(policies[key] for key in sorted(policies)), tuple(sorted(unresolved)))


_Account = tuple[str, str, str]
"""Namespace, name, service account."""
_ScopeKey = tuple[Scope, str]


def _service_name(name: str) -> NamespacedHostname | None:
    try:
        return NamespacedHostname.parse(name)
    except InvalidAddress:
        return None  # the uid of a workload that we do not have


def _scope_keys(policy: Policy) -> tuple[_ScopeKey, ...]:
    match policy.scope:
        case Scope.GLOBAL:
            return ((Scope.GLOBAL, ""),)
        case Scope.NAMESPACE:
            return ((Scope.NAMESPACE, policy.namespace),)
        case Scope.WORKLOAD_SELECTOR:
            return ()  # found by its name alone, in the workloads' lists


def _network_addresses(workload: Workload) -> Iterator[NetworkAddress]:
    if workload.network_mode is not NetworkMode.HOST_NETWORK:
        for ip in workload.addresses:
            yield NetworkAddress(workload.network, ip)


def _preference(workload: Workload) -> tuple[bool, bool, str]:
    """Sorts first the workload meant by an address that several have: ztunnel's order, then by uid, to give the same answer always."""
    return "//Pod/" not in workload.uid, workload.tunnel_protocol is not TunnelProtocol.HBONE, workload.uid


def _service_key(service: Service) -> NamespacedHostname:
    return service.key


def _folded(hostname: str) -> str:
    """Names differ by case to people only. The very string where it can be, so that an index keeps no second one."""
    folded = hostname.lower()
    return hostname if folded == hostname else folded


def _is_visible(service: Service, client_namespace: str) -> bool:
    return service.visibility is Visibility.PUBLIC or service.namespace == client_namespace


def _visible(services: Iterable[Service], client_namespace: str) -> list[Service]:
    return [service for service in services if _is_visible(service, client_namespace)]


def _closeness(service: Service, client_namespace: str) -> tuple[bool, bool, NamespacedHostname]:
    return service.namespace != client_namespace, not service.canonical, service.key

"""Whose a hostname is, and which virtual addresses ServiceEntries get: what takes a look at all of them at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_network

from istiod_py.translate.config import Config
from istiod_py.translate.entries import visibility
from istiod_py.translate.services import service_key
from istiod_py.translate.vips import Wanting, allocate
from mesh.kube.service import KubeService
from mesh.kube.serviceentry import KubeServiceEntry
from mesh.model.address import Cidr, IpAddress, NamespacedHostname
from mesh.model.labels import AUTOALLOCATE_IP
from mesh.model.service import Visibility


@dataclass(frozen=True, slots=True)
class Lost:
    """A host of a ServiceEntry that is another's in its namespace."""

    entry: KubeServiceEntry
    host: str
    owner: str
    """E.g. ``Service web``."""


@dataclass(frozen=True, slots=True)
class Hosts:
    """The outcome for all ServiceEntries. A host that an entry lost is in ``lost`` alone."""

    of: Mapping[tuple[str, str], tuple[str, ...]] = field(default_factory=dict)
    """By namespace and name of the ServiceEntry."""
    canonical: frozenset[NamespacedHostname] = frozenset()
    vips: Mapping[NamespacedHostname, tuple[IpAddress, ...]] = field(default_factory=dict)
    """Only for hosts that want some."""
    lost: tuple[Lost, ...] = ()


def settle_hosts(entries: Sequence[KubeServiceEntry], services: Iterable[KubeService], config: Config) -> Hosts:
    """``entries`` oldest first. In a namespace a hostname is the Service's, else the oldest ServiceEntry's; in the mesh it stands for
    the Service's, else the oldest ServiceEntry's that everybody sees."""
    if not entries:
        return Hosts()
    of_services = {service_key(service, config): service for service in services if service.type != "ExternalName"}
    owners, lost = _find_owners(entries, of_services)
    of: dict[tuple[str, str], tuple[str, ...]] = {}
    for key, entry in owners.items():
        of[entry.namespace, entry.name] = (*of.get((entry.namespace, entry.name), ()), key.hostname)
    return Hosts(of, _find_canonical(owners, of_services), _allocate(owners, of_services.values(), entries), lost)


def _find_owners(
    entries: Iterable[KubeServiceEntry], of_services: Mapping[NamespacedHostname, KubeService]
) -> tuple[dict[NamespacedHostname, KubeServiceEntry], tuple[Lost, ...]]:
    owners: dict[NamespacedHostname, KubeServiceEntry] = {}
    lost: list[Lost] = []
    for entry in entries:
        for host in entry.hosts if visibility(entry) is not None else ():
            key = NamespacedHostname(entry.namespace, host)
            if (service := of_services.get(key)) is not None:
                lost.append(Lost(entry, host, f"Service {service.name}"))
            elif (owner := owners.setdefault(key, entry)) is not entry:
                lost.append(Lost(entry, host, f"ServiceEntry {owner.name}, which is older or comes first by name,"))
    return owners, tuple(lost)


def _find_canonical(
    owners: Mapping[NamespacedHostname, KubeServiceEntry], of_services: Iterable[NamespacedHostname]
) -> frozenset[NamespacedHostname]:
    taken = {key.hostname for key in of_services}
    canonical: list[NamespacedHostname] = []
    for key, entry in owners.items():
        if key.hostname not in taken and visibility(entry) is Visibility.PUBLIC:
            taken.add(key.hostname)
            canonical.append(key)
    return frozenset(canonical)


def _allocate(
    owners: Mapping[NamespacedHostname, KubeServiceEntry], services: Iterable[KubeService], entries: Iterable[KubeServiceEntry]
) -> dict[NamespacedHostname, tuple[IpAddress, ...]]:
    wanting = [
        Wanting(key, tuple(ip for host, ip in entry.allocated if host == key.hostname))
        for key, entry in owners.items()
        if _wants_vips(entry, key.hostname)
    ]
    return allocate(wanting, _reserved(services, entries)) if wanting else {}


def _wants_vips(entry: KubeServiceEntry, host: str) -> bool:
    """Without endpoints of its own choice (NONE) the mesh could not say where connections to such an address should go; and nobody
    connects to a wildcard, except where its names are resolved as they come."""
    if entry.addresses or entry.resolution == "NONE" or entry.labels.get(AUTOALLOCATE_IP, "").lower() == "false":
        return False
    return not host.startswith("*") or entry.resolution == "DYNAMIC_DNS"


def _reserved(services: Iterable[KubeService], entries: Iterable[KubeServiceEntry]) -> Iterator[Cidr]:
    """Addresses that somebody chose."""
    for entry in entries:
        yield from entry.addresses
    for service in services:
        for ip in service.cluster_ips:
            yield ip_network(ip)

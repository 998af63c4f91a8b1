"""Services as routes see them: what takes requests, and what requests can be sent to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from istiod_py.translate.config import Config
from istiod_py.translate.entries import visibility
from istiod_py.translate.services import service_key
from mesh.kube.objects import ObjectKey
from mesh.kube.service import KubeService
from mesh.kube.serviceentry import KubeServiceEntry
from mesh.model.l7.waypoint import Protocol
from mesh.model.service import Visibility

_PROTOCOLS: Final = {
    "http": Protocol.HTTP,
    "http_proxy": Protocol.HTTP,
    "http2": Protocol.HTTP2,
    "grpc": Protocol.GRPC,
    "grpc-web": Protocol.GRPC,
    **dict.fromkeys(("tcp", "tls", "https", "mongo", "redis", "mysql"), Protocol.TCP),
}
_STANDARD: Final = {
    "kubernetes.io/h2c": Protocol.HTTP2,
    "kubernetes.io/ws": Protocol.HTTP,
    "kubernetes.io/wss": Protocol.TCP,
}
_SERVER_FIRST: Final = frozenset({25, 53, 3306, 27017})
"""SMTP, DNS, MySQL, MongoDB: whoever waited there for the client's first bytes would wait for ever."""


@dataclass(frozen=True, slots=True)
class L7Port:
    number: int
    name: str
    protocol: Protocol

    @property
    def takes_requests(self) -> bool:
        return self.protocol is not Protocol.TCP

    @property
    def takes_connections(self) -> bool:
        """Whether bytes may be all there is to it."""
        return self.protocol in (Protocol.TCP, Protocol.AUTO)


@dataclass(frozen=True, slots=True)
class L7Service:
    """A Service, or one host of a ServiceEntry. ``kind`` and ``name`` are the object's."""

    namespace: str
    hostname: str
    ports: tuple[L7Port, ...]
    kind: str = "Service"
    name: str = ""
    private: bool = False
    """Seen in its own namespace alone."""

    @property
    def key(self) -> str:
        return f"{self.namespace}/{self.hostname}"

    def has_port(self, number: int) -> bool:
        return any(port.number == number for port in self.ports)


def protocol_of(number: int, name: str, app_protocol: str = "") -> Protocol:
    """``appProtocol``, else the port's name up to the first ``-``, else what the number is known for (Istio's rules)."""
    if app_protocol in _STANDARD:
        return _STANDARD[app_protocol]
    said = (app_protocol or name).lower()
    word = "grpc-web" if said.startswith("grpc-web") else said.partition("-")[0]
    found = _PROTOCOLS.get(word)
    if found is None:
        return Protocol.TCP if number in _SERVER_FIRST else Protocol.AUTO
    return found


def of_service(service: KubeService, config: Config) -> L7Service | None:
    """None for ExternalName, which is an alias in DNS. Ports of UDP are not a waypoint's."""
    if service.type == "ExternalName":
        return None
    ports = tuple(
        L7Port(port.port, port.name, protocol_of(port.port, port.name, port.app_protocol))
        for port in service.ports
        if port.protocol == "TCP"
    )
    return L7Service(service.namespace, service_key(service, config).hostname, ports, "Service", service.name)


def of_host(entry: KubeServiceEntry, host: str) -> L7Service:
    """One of the hosts of a ServiceEntry that somebody sees."""
    ports = tuple(
        L7Port(port.port, port.name, protocol_of(port.port, port.protocol.lower() or port.name))
        for port in entry.ports
        if port.protocol != "UDP"
    )
    private = visibility(entry) is not Visibility.PUBLIC
    return L7Service(entry.namespace, host.lower(), ports, "ServiceEntry", entry.name, private)


@dataclass(frozen=True, slots=True)
class KnownServices:
    """By hostname; of several the one that stands for it in the mesh first."""

    by_host: Mapping[str, tuple[L7Service, ...]] = field(default_factory=dict)
    by_object: Mapping[ObjectKey, tuple[str, ...]] = field(default_factory=dict, compare=False)
    """Keys (``namespace/hostname``) by what says so. Nothing of it is of its own, so that comparing it would only cost."""

    def find(self, hostname: str, namespace: str) -> L7Service | None:
        """What the hostname means in ``namespace``: its own service, else the mesh's."""
        found = self.by_host.get(hostname, ())
        own = next((service for service in found if service.namespace == namespace), None)
        return own or next((service for service in found if not service.private), None)

    def only(self, hostnames: Iterable[str]) -> KnownServices:
        return KnownServices({host: self.by_host[host] for host in hostnames if host in self.by_host})


def know(services: Iterable[L7Service], canonical: frozenset[str] = frozenset()) -> KnownServices:
    """``canonical``: keys (``namespace/hostname``) of the ServiceEntries' hosts that stand for theirs in the mesh."""
    by_host: dict[str, list[L7Service]] = {}
    by_object: dict[ObjectKey, tuple[str, ...]] = {}
    for service in services:
        by_host.setdefault(service.hostname, []).append(service)
        place = ObjectKey(service.kind, service.namespace, service.name)
        by_object[place] = (*by_object.get(place, ()), service.key)

    def rank(service: L7Service) -> tuple[bool, bool, str]:
        return service.kind != "Service", service.key not in canonical, service.namespace

    return KnownServices({host: tuple(sorted(found, key=rank)) for host, found in by_host.items()}, by_object)

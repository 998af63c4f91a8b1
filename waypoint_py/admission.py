"""What a CONNECT to a waypoint may ask for: services and workloads that it stands before, and nothing else. Pure.

The most dangerous thing that a waypoint can do is to lend its identity: whoever could have it dial any address would be let in there as
the waypoint. So a target must be named by the mesh as one of ours, every time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Final, TypeAlias

from mesh.model.address import GatewayAddress, IpAddress, NamespacedHostname, NetworkAddress, SocketAddress
from mesh.model.ports import RECURSIVE
from mesh.model.service import Service
from mesh.model.workload import Workload
from mesh.state.store import MeshState
from mesh.wire.authority import Authority, HostPort

_NOWHERE: Final = IPv4Address("0.0.0.0")
"""Stands for the address of a service that has none."""


@dataclass(frozen=True, slots=True)
class Ourselves:
    """Who we are. ``service``: the name of our own service; ``addresses``: of our pod; ``workload``: what the mesh says we are, if it
    does."""

    service: NamespacedHostname
    network: str
    addresses: Collection[IpAddress]
    workload: Workload | None = None


@dataclass(frozen=True, slots=True)
class ToService:
    """A service of ours, on a port that it has. ``destination``: as the client dialled it."""

    service: Service
    destination: SocketAddress


@dataclass(frozen=True, slots=True)
class ToWorkload:
    """A workload of ours, by its own address."""

    workload: Workload
    destination: SocketAddress


@dataclass(frozen=True, slots=True)
class Refused:
    """The CONNECT gets ``status``; ``because`` is for the log."""

    status: int
    because: str


Admission: TypeAlias = ToService | ToWorkload | Refused


@dataclass(frozen=True, slots=True)
class Charge:
    """What we are told to serve. ``waypoint_for``: ``service``, ``workload``, ``all`` or ``none``; ``is_assigned``: whether the control
    plane has given us a service (``namespace/hostname``).

    A service that leaves us is taken away only when clients' agents have been told, while the mesh says at once where it is now.
    """

    waypoint_for: str
    is_assigned: Callable[[str], bool] = lambda service: False


def admit(state: MeshState, us: Ourselves, charge: Charge, namespace: str, target: Authority) -> Admission:
    """Decide about one CONNECT. ``namespace``: of the peer's certificate, since services may be visible there alone."""
    if isinstance(target, HostPort):
        return _by_hostname(state, us, charge, namespace, target)
    if because := _never(us, target):
        return Refused(403, because)
    address = NetworkAddress(us.network, target.ip)
    service = state.find_service_at(address, namespace)
    if service is not None:
        return _to_service(state, us, charge, service, target)
    workload = state.find_workload_at(address)
    if workload is None:
        return Refused(404, f"{target.ip} is nothing in the mesh")
    return _to_workload(state, us, charge, workload, target)


def fronts(state: MeshState, us: Ourselves, service: Service) -> bool:
    """Whether the mesh sends this service's clients to us, all or some of them."""
    waypoints = [choice.waypoint for choice in service.weighted_waypoints]
    if service.waypoint is not None:
        waypoints.append(service.waypoint)
    return any(_is_us(state, us, waypoint) for waypoint in waypoints)


def _is_us(state: MeshState, us: Ourselves, waypoint: GatewayAddress) -> bool:
    named = waypoint.destination
    if isinstance(named, NamespacedHostname):
        if named == us.service:
            return True
    elif named.network == us.network and named.ip in us.addresses:
        return True
    else:
        at = state.find_service_at(named, us.service.namespace)
        if at is not None and at.key == us.service:
            return True
    return us.workload is not None and state.is_gateway(us.workload, waypoint)


def _never(us: Ourselves, target: SocketAddress) -> str:
    """Why this address is out of the question, whatever the mesh says of it."""
    ip = target.ip
    if ip.is_loopback or ip.is_unspecified or ip.is_multicast or ip.is_link_local:
        return f"{ip} is an address of the machine that dials it"
    if ip in us.addresses:
        return f"{target} is this waypoint itself"
    return ""


def _by_hostname(state: MeshState, us: Ourselves, charge: Charge, namespace: str, target: HostPort) -> Admission:
    refusal: Admission | None = None
    for service in state.find_services_by_hostname(target.host, namespace):
        found = _to_service(state, us, charge, service, SocketAddress(_address_of(us, service), target.port))
        if not isinstance(found, Refused):
            return found
        refusal = refusal or found
    return refusal or Refused(404, f"no service has the hostname {target.host}")


def _address_of(us: Ourselves, service: Service) -> IpAddress:
    """One of the service's, if possible on our network, and IPv4."""
    ranked = sorted(service.addresses, key=lambda address: (address.network != us.network, address.ip.version))
    return ranked[0].ip if ranked else _NOWHERE


def _to_service(state: MeshState, us: Ourselves, charge: Charge, service: Service, target: SocketAddress) -> Admission:
    if not fronts(state, us, service) and not charge.is_assigned(str(service.key)):
        return Refused(403, f"service {service.key} does not have this waypoint")
    if charge.waypoint_for not in ("service", "all"):
        return Refused(403, f"this waypoint takes no traffic to services (waypoint-for: {charge.waypoint_for})")
    if service.key == us.service:
        return Refused(403, f"service {service.key} is this waypoint itself")
    if all(port.service_port != target.port for port in service.ports):
        return Refused(404, f"service {service.key} has no port {target.port}")
    return ToService(service, target)


def _to_workload(state: MeshState, us: Ourselves, charge: Charge, workload: Workload, target: SocketAddress) -> Admission:
    name = f"{workload.namespace}/{workload.name}"
    if workload.waypoint is None or not _is_us(state, us, workload.waypoint):
        return Refused(403, f"workload {name} does not have this waypoint")
    if charge.waypoint_for not in ("workload", "all"):
        return Refused(403, f"this waypoint takes no traffic to workloads (waypoint-for: {charge.waypoint_for})")
    if us.workload is not None and workload.uid == us.workload.uid:
        return Refused(403, f"{target} is this waypoint itself")
    if target.port in RECURSIVE:
        return Refused(403, f"port {target.port} is the proxy's own, on {name}")
    return ToWorkload(workload, target)

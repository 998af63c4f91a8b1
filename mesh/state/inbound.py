"""What a CONNECT request to one of our workloads asks for, and whether it may ask us. Pure; never raises."""

from __future__ import annotations

from dataclasses import dataclass

from mesh.model.address import GatewayAddress, IpAddress, NetworkAddress, SocketAddress
from mesh.model.ports import RECURSIVE
from mesh.model.service import Service
from mesh.model.workload import ApplicationTunnel, TunnelApplicationProtocol, Workload
from mesh.state.balance import target_port
from mesh.state.store import MeshState
from mesh.wire.authority import HostPort, parse_authority
from mesh.wire.errors import RemoteProtocolError


@dataclass(frozen=True, slots=True)
class InboundTarget:
    """Where the application is: ``address`` is the workload's own, policy judges it and the agent dials it.

    An application that takes the PROXY protocol is dialled on the loopback address of the same family instead, as ztunnel does.
    """

    address: SocketAddress
    service: Service | None
    """The service that the request named; None if it named an address."""
    application_tunnel: ApplicationTunnel | None
    proxied: SocketAddress | None
    """With the PROXY protocol: the destination that its header names."""
    because: str


@dataclass(frozen=True, slots=True)
class InboundRefusal:
    """The request gets this HTTP status; ``because`` is the access log's ``error``."""

    status: int
    because: str


def resolve_inbound(state: MeshState, local: Workload, authority: str, local_ip: IpAddress) -> InboundTarget | InboundRefusal:
    """Decide about one request to ``local``, whose peer connected to ``local_ip``."""
    try:
        wanted = parse_authority(authority)
    except RemoteProtocolError as exc:
        return InboundRefusal(400, f"no valid authority pseudo header: {exc.reason}")
    found = _by_hostname(state, local, wanted) if isinstance(wanted, HostPort) else _by_address(state, local, wanted, local_ip)
    if isinstance(found, InboundRefusal):
        return found
    return _towards_application(local, local_ip, found)


@dataclass(frozen=True, slots=True)
class _Found:
    port: int | None
    service: Service | None
    dialled: SocketAddress | None
    """What the client wanted to reach, as an address; None if the service it named has none."""
    wanted: str
    because: str


def _by_address(state: MeshState, local: Workload, wanted: SocketAddress, local_ip: IpAddress) -> _Found | InboundRefusal:
    if wanted.ip == local_ip:
        because = "the request names our address"
    elif local.application_tunnel is not None:
        because = "the workload is a gateway: it takes requests for others"
    elif _is_waypoint_of(state, local, wanted.ip):
        because = f"the workload is the waypoint of {wanted.ip}"
    else:
        return InboundRefusal(400, f"ip mismatch: {local_ip} != {wanted.ip}")
    return _Found(wanted.port, None, wanted, str(wanted), because)


def _is_waypoint_of(state: MeshState, local: Workload, ip: IpAddress) -> bool:
    address = NetworkAddress(local.network, ip)
    workload = state.find_workload_at(address)
    if workload is not None:
        return workload.waypoint is not None and state.is_gateway(local, workload.waypoint)
    service = state.find_service_at(address, local.namespace)
    return service is not None and _serves(state, local, service)


def _serves(state: MeshState, local: Workload, service: Service) -> bool:
    return any(state.is_gateway(local, waypoint) for waypoint in _waypoints(service))


def _waypoints(service: Service) -> tuple[GatewayAddress, ...]:
    weighted = tuple(choice.waypoint for choice in service.weighted_waypoints)
    return weighted if service.waypoint is None else (service.waypoint, *weighted)


def _by_hostname(state: MeshState, local: Workload, wanted: HostPort) -> _Found | InboundRefusal:
    """The service must be ours: an endpoint of it, or a gateway to it. A name alone opens no port (ztunnel asks only that it exists)."""
    services = state.find_services_by_hostname(wanted.host, local.namespace)
    if not services:
        return InboundRefusal(503, f"no service or workload for hostname: {wanted.host}")
    for service in services:
        if service.key in local.services:
            because = f"the workload is an endpoint of service {service.key}"
            port = target_port(service, local.services[service.key], wanted.port)
        elif local.application_tunnel is not None or _serves(state, local, service):
            because = f"the workload is a gateway to service {service.key}"
            port = target_port(service, (), wanted.port)
        else:
            continue
        return _Found(port, service, _virtual_address(service, local, wanted.port), str(wanted), because)
    return InboundRefusal(503, f"no service or workload for hostname: {wanted.host} (this workload is no endpoint of it)")


def _virtual_address(service: Service, local: Workload, port: int) -> SocketAddress | None:
    """One of the service's addresses, if possible on the workload's own network, and IPv4."""
    ranked = sorted(service.addresses, key=lambda address: (address.network != local.network, address.ip.version))
    return SocketAddress(ranked[0].ip, port) if ranked else None


def _towards_application(local: Workload, local_ip: IpAddress, found: _Found) -> InboundTarget | InboundRefusal:
    tunnel = local.application_tunnel
    port = tunnel.port if tunnel is not None and tunnel.port is not None else found.port
    if port is None:
        return InboundRefusal(503, f"requested service {found.wanted} found, but cannot resolve port")
    if port in RECURSIVE:
        return InboundRefusal(503, "attempted recursive call to ourselves")
    proxied: SocketAddress | None = None
    if tunnel is not None and tunnel.protocol is TunnelApplicationProtocol.PROXY:
        if found.dialled is None:
            return InboundRefusal(503, f"requested service {found.wanted} found, but has no IP addresses")
        proxied = found.dialled
    return InboundTarget(SocketAddress(local_ip, port), found.service, tunnel, proxied, found.because)

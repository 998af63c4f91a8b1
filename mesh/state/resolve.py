"""Where an outbound connection goes, how, and why: ztunnel's table, first match wins. Pure; never raises."""

from __future__ import annotations

import random

from mesh.model.address import GatewayAddress, IpAddress, NamespacedHostname, NetworkAddress, SocketAddress
from mesh.model.identity import InvalidSpiffeId, SpiffeId
from mesh.model.ports import INBOUND_HBONE, RECURSIVE
from mesh.model.route import Direct, Refusal, Route, Tunnel
from mesh.model.service import IpFamilies, LoadBalancingMode, Service
from mesh.model.workload import TunnelProtocol, Workload
from mesh.state.balance import Candidate, PickList, Wanted
from mesh.state.store import MeshState


def resolve(
    state: MeshState, source: Workload, target: SocketAddress, rng: random.Random, unreachable: frozenset[str] = frozenset()
) -> Route:
    """Decide about one connection of ``source`` to ``target``, its original destination. ``rng`` chooses among endpoints and waypoints,
    and leaves out those with a uid in ``unreachable``.

    An address that a workload and a service both have stands for the workload when a waypoint is looked for, and for the service
    when endpoints are (ztunnel's rule, kept).
    """
    if target.port in RECURSIVE and target.ip.is_loopback:
        return Refusal("attempted recursive call to ourselves")
    address = NetworkAddress(source.network, target.ip)
    workload = state.find_workload_at(address)
    service = state.find_service_at(address, source.namespace)
    if service is not None and workload is None:
        waypoint = _choose_waypoint(service, rng)
        if waypoint is not None:
            return _Attempt(state, source, target, rng, service, unreachable).through(waypoint, f"service {service.key} has the waypoint")
    if service is not None:
        return _Attempt(state, source, target, rng, service, unreachable).to_service(service)
    if workload is None:
        return Direct(target, None, None, f"{target.ip} is unknown to the mesh: passed through as plain TCP")
    attempt = _Attempt(state, source, target, rng, None, unreachable)
    if workload.waypoint is not None and not state.is_gateway(source, workload.waypoint):
        return attempt.through(workload.waypoint, f"workload {_name(workload)} has the waypoint")
    return attempt.to_workload(Candidate(workload, target.port), f"{target.ip} is workload {_name(workload)}")


class _Attempt:
    """One connection on its way to a route; ``service`` is the one it was addressed to, if any."""

    __slots__ = ("_rng", "_service", "_source", "_state", "_target", "_unreachable")

    def __init__(
        self,
        state: MeshState,
        source: Workload,
        target: SocketAddress,
        rng: random.Random,
        service: Service | None,
        unreachable: frozenset[str],
    ) -> None:
        self._state = state
        self._source = source
        self._target = target
        self._rng = rng
        self._service = service
        self._unreachable = unreachable

    def to_service(self, service: Service) -> Route:
        """Straight to an endpoint."""
        if service.load_balancing is not None and service.load_balancing.mode is LoadBalancingMode.PASSTHROUGH:
            return Direct(self._target, None, service, f"service {service.key} asks for passthrough: plain TCP to the address as dialled")
        picks = self._picks(service, Wanted(self._target.port))
        candidate = picks.pick(self._rng)
        if candidate is None:
            return self._refuse(f"no healthy upstream: {self._target} (service {service.key}: {picks.because})")
        return self.to_workload(candidate, f"service {service.key}, endpoint {_name(candidate.workload)}, {picks.because}")

    def to_workload(self, candidate: Candidate, because: str) -> Route:
        """To this workload, in HBONE if it takes it."""
        workload = candidate.workload
        if workload.network != self._source.network:
            return self._across_networks(workload)
        ip = choose_ip(workload, self._service, self._target.ip, like=self._target.ip)
        if ip is None:
            return self._no_address(workload)
        if workload.tunnel_protocol is TunnelProtocol.NONE:
            next_hop = SocketAddress(ip, candidate.target_port)
            return Direct(next_hop, workload, self._service, f"{because}; plain TCP, as the workload is not in the mesh")
        return Tunnel(
            SocketAddress(ip, INBOUND_HBONE),
            str(SocketAddress(ip, candidate.target_port)),
            expected_identities(workload, self._service),
            workload,
            self._service,
            f"{because}; HBONE, as the workload is in the mesh",
        )

    def through(self, gateway: GatewayAddress, because: str) -> Route:
        """To a waypoint, which gets the connection with the destination that the application dialled."""
        found = self._find_gateway(gateway)
        if isinstance(found, Refusal):
            return found
        candidate, waypoint_service, how = found
        workload = candidate.workload
        if workload.network != self._source.network:
            return self._across_networks(workload)
        wanted = gateway.destination.ip if isinstance(gateway.destination, NetworkAddress) else self._target.ip
        ip = choose_ip(workload, waypoint_service, wanted, like=self._target.ip)
        if ip is None:
            return self._no_address(workload)
        return Tunnel(
            SocketAddress(ip, candidate.target_port),
            str(self._target),
            expected_identities(workload, waypoint_service),
            workload,
            self._service,
            f"{because} {gateway.destination}: {how}",
            gateway,
        )

    def _find_gateway(self, gateway: GatewayAddress) -> tuple[Candidate, Service | None, str] | Refusal:
        destination, port = gateway.destination, gateway.hbone_mtls_port
        service, workload = self._look_up(destination)
        if service is not None:
            picks = self._picks(service, Wanted(port, waypoint=True))
            candidate = picks.pick(self._rng)
            if candidate is None:
                return Refusal(
                    f"unknown waypoint: waypoint {destination} has no healthy upstream ({picks.because})", self._service, gateway
                )
            return candidate, service, f"endpoint {_name(candidate.workload)}, {picks.because}"
        if workload is not None:
            return Candidate(workload, port), None, f"workload {_name(workload)}"
        return self._refuse(f"unknown waypoint: waypoint {destination} not found")

    def _picks(self, service: Service, wanted: Wanted) -> PickList:
        picks = self._state.picks(service, wanted, self._source)
        return picks.without(self._unreachable) if self._unreachable else picks

    def _look_up(self, destination: NetworkAddress | NamespacedHostname) -> tuple[Service | None, Workload | None]:
        if isinstance(destination, NamespacedHostname):
            service = self._state.find_service(destination)
            return service, self._state.find_workload_by_hostname(destination.hostname) if service is None else None
        service = self._state.find_service_at(destination, self._source.namespace)
        return service, self._state.find_workload_at(destination) if service is None else None

    def _across_networks(self, workload: Workload) -> Refusal:
        if self._service is None:
            return self._refuse(f"no service for target address: {self._target}")
        why = "which has no gateway" if workload.network_gateway is None else "and cross-network gateways are not supported yet"
        return self._no_route(workload, f"it is on network {workload.network!r}, {why}")

    def _no_address(self, workload: Workload) -> Refusal:
        if workload.addresses:
            why = "its service allows no IP family that it has"
        elif workload.hostname:
            why = f"it is known by the hostname {workload.hostname} only, and resolving endpoints by DNS is not supported yet"
        else:
            why = "it has no address"
        return self._no_route(workload, why)

    def _no_route(self, workload: Workload, why: str) -> Refusal:
        return self._refuse(f"no valid routing destination for workload: {_name(workload)} ({why})")

    def _refuse(self, because: str) -> Refusal:
        return Refusal(because, self._service)


def _choose_waypoint(service: Service, rng: random.Random) -> GatewayAddress | None:
    """By weight among the weighted ones, if any has a weight; else the only one, if any."""
    weighted = [choice for choice in service.weighted_waypoints if choice.weight > 0]
    if not weighted:
        return service.waypoint
    (choice,) = rng.choices(weighted, [choice.weight for choice in weighted])
    return choice.waypoint


_ALLOWED = {IpFamilies.IPV4_ONLY: (4,), IpFamilies.IPV6_ONLY: (6,)}


def choose_ip(workload: Workload, service: Service | None, wanted: IpAddress, like: IpAddress) -> IpAddress | None:
    """An address to dial a workload at: the wanted one if it is the workload's, else one that the service allows, if possible of the family
    of ``like``; None if there is none."""
    if wanted in workload.addresses:
        return wanted
    versions = _ALLOWED.get(service.ip_families, (4, 6)) if service is not None else (4, 6)
    allowed = [ip for ip in workload.addresses if ip.version in versions]
    return next((ip for ip in allowed if ip.version == like.version), allowed[0] if allowed else None)


def expected_identities(workload: Workload, service: Service | None) -> frozenset[SpiffeId]:
    """Whom the peer may prove to be: the workload, or one that the service vouches for. Names that are no SPIFFE ID prove nothing."""
    identities = {workload.identity}
    for name in service.subject_alt_names if service is not None else ():
        try:
            identities.add(SpiffeId.parse(name))
        except InvalidSpiffeId:
            continue
    return frozenset(identities)


def _name(workload: Workload) -> str:
    return f"{workload.namespace}/{workload.name}"

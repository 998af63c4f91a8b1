"""Chooses an endpoint for every try of a request and every connection, and learns from how it went. No I/O; time and dice are given.

One `_Cluster` per destination (service, port, subset) that traffic has named, with its hosts, their arrangement and their health. It is
made anew from the mesh's state when the service, one of its endpoints or the destination's rules changed, and keeps what it knows of
the hosts that stay.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, NamedTuple

from mesh.http.message import Request
from mesh.model.address import IpAddress, NamespacedHostname, SocketAddress
from mesh.model.l7.destination import DestinationConfig, TrafficPolicy
from mesh.model.l7.routing import Destination
from mesh.model.service import LoadBalancing, Service
from mesh.model.workload import Workload
from mesh.state.balance import PickList, Wanted, takes_connections, target_port
from mesh.state.resolve import choose_ip
from mesh.state.store import MeshState
from waypoint_py.upstream.affinity import NO_AFFINITY, Affinity, find_affinity
from waypoint_py.upstream.algorithms import Algorithm, Host, make_algorithm
from waypoint_py.upstream.levels import Labels, Level, arrange, capacity, share_out
from waypoint_py.upstream.outlier import Health, LocalOutcome, OutlierDetector
from waypoint_py.upstream.session import Endpoint

REPICKS: Final = 5
"""How often another endpoint is drawn for a retry when the one drawn was tried already (Istio's ``hostSelectionRetryMaxAttempts``)."""
MAX_ENDPOINTS: Final = 4096
"""Remembered of one destination."""

_DEFAULTS: Final = TrafficPolicy()
_NO_LABELS: Final[Labels] = {}


@dataclass(frozen=True, slots=True)
class NoEndpoint:
    """Nobody can take the request. ``known``: the destination exists (503 ``UH``), else there is no such cluster (``NC``)."""

    because: str
    known: bool


class Wish(NamedTuple):
    """What a try asks for, beside its destination. ``client``: the downstream's address. ``like``: an address whose family is preferred.
    ``tried``: keys of endpoints that were tried. ``elsewhere``: leave out so many of the nearest levels (``retryRemoteLocalities``)."""

    affinity: Affinity = NO_AFFINITY
    like: IpAddress | None = None
    tried: Collection[str] = ()
    elsewhere: int = 0


class Balancer:
    """For the whole waypoint. ``source``: the waypoint's own workload, whose place decides what is near; None while it is unknown.
    ``version``: another value whenever ``find_config`` or, beside what the mesh's state says, ``source`` may say something else; without
    it they are asked every time."""

    def __init__(
        self,
        state: MeshState,
        find_config: Callable[[NamespacedHostname], DestinationConfig | None],
        source: Callable[[], Workload | None],
        rng: random.Random,
        version: Callable[[], int] | None = None,
    ) -> None:
        self._state = state
        self._find_config = find_config
        self._source = source
        self._rng = rng
        self._version = version
        self._clusters: dict[Destination, _Cluster] = {}

    def find_affinity(self, destination: Destination, request: Request | None, client: SocketAddress) -> Affinity:
        """Once for a request, before its first try: a cookie that is made has to stay the same."""
        cluster = self._find_current(destination)
        policy = cluster.policy if cluster is not None else policy_of(self._find_config(_key(destination)), destination)
        wanted = policy.load_balancer.hash
        return NO_AFFINITY if wanted is None else find_affinity(wanted, request, client, self._rng)

    def choose(self, destination: Destination, wish: Wish, now: float) -> Endpoint | NoEndpoint:
        """An endpoint for one try."""
        current = self._find_current(destination)
        if current is not None:
            return current.choose(wish, self._rng, now)
        service = self._state.find_service(_key(destination)) if destination.namespace else None
        if service is None:
            self._clusters.pop(destination, None)
            return NoEndpoint(f"there is no service {destination.hostname}", known=False)
        cluster = self._cluster(destination, service, now)
        if isinstance(cluster, NoEndpoint):
            return cluster
        return cluster.choose(wish, self._rng, now)

    def began(self, endpoint: Endpoint) -> None:
        """A request or connection is under way there."""
        host = endpoint.host
        if host is not None:
            host.active += 1

    def ended(self, endpoint: Endpoint) -> None:
        """It is over, however. Once for every `began`."""
        host = endpoint.host
        if host is not None:
            host.active -= 1

    def answered(self, endpoint: Endpoint, status: int, now: float) -> None:
        """The application's answer (of a gRPC call: what its grpc-status is in HTTP)."""
        if endpoint.policy.outlier is None:
            return
        cluster = self._clusters.get(endpoint.destination) if endpoint.destination is not None else None
        if cluster is not None:
            cluster.answered(endpoint, status, now)

    def happened_here(self, endpoint: Endpoint, outcome: LocalOutcome, now: float) -> None:
        """A connection to it was made, or failed, was reset or not answered in time."""
        if endpoint.policy.outlier is None:
            return
        cluster = self._clusters.get(endpoint.destination) if endpoint.destination is not None else None
        if cluster is not None:
            cluster.happened_here(endpoint, outcome, now)

    def describe(self, now: float) -> list[dict[str, object]]:
        """For operators: every destination in use, its endpoints and what is held against them."""
        return [cluster.describe(now) for _, cluster in sorted(self._clusters.items(), key=lambda item: str(item[0]))]

    def _find_current(self, destination: Destination) -> _Cluster | None:
        """One that was found to be right since anything it is made of changed last."""
        cluster = self._clusters.get(destination)
        if cluster is None or self._version is None or cluster.right_at != (self._state.version, self._version()):
            return None
        return cluster

    def _cluster(self, destination: Destination, service: Service, now: float) -> _Cluster | NoEndpoint:
        found = self._find_or_make(destination, service, now)
        if isinstance(found, _Cluster) and self._version is not None:
            found.right_at = self._state.version, self._version()
        return found

    def _find_or_make(self, destination: Destination, service: Service, now: float) -> _Cluster | NoEndpoint:
        source = self._source()
        config = self._find_config(_key(destination))
        # The list itself is not what we choose from: it is another object whenever the service or one of its endpoints is.
        seen = self._state.picks(service, Wanted(destination.port), source) if source is not None else None
        kept = self._clusters.get(destination)
        if kept is not None and kept.is_of(service, config, seen, source):
            return kept
        if all(port.service_port != destination.port for port in service.ports):
            self._clusters.pop(destination, None)
            return NoEndpoint(f"service {service.key} has no port {destination.port}", known=False)
        labels = _labels_of_subset(config, destination)
        if labels is None:
            self._clusters.pop(destination, None)
            return NoEndpoint(f"no rule defines the subset {destination.subset!r} of {service.key}", known=False)
        made = _Cluster(destination, service, config, seen, source)
        made.take_hosts(self._state, labels, kept, now, self._rng)
        self._clusters[destination] = made
        return made


def policy_of(config: DestinationConfig | None, destination: Destination) -> TrafficPolicy:
    """What holds for a port and subset: the control plane has merged what is narrower into what is wider."""
    if config is None:
        return _DEFAULTS
    if destination.subset:
        subset = next((subset for subset in config.subsets if subset.name == destination.subset), None)
        if subset is not None:
            return subset.ports.get(destination.port, subset.policy)
    return config.ports.get(destination.port, config.policy)


@lru_cache(maxsize=4096)
def _key(destination: Destination) -> NamespacedHostname:
    return NamespacedHostname(destination.namespace, destination.hostname)


def _labels_of_subset(config: DestinationConfig | None, destination: Destination) -> Mapping[str, str] | None:
    """The labels that endpoints must have; None: the subset is not defined."""
    if not destination.subset:
        return {}
    subsets = config.subsets if config is not None else ()
    return next((subset.labels for subset in subsets if subset.name == destination.subset), None)


class _Cluster:
    """One destination: its hosts, arranged, and what is known of their health."""

    def __init__(
        self, destination: Destination, service: Service, config: DestinationConfig | None, seen: PickList | None, source: Workload | None
    ) -> None:
        self._destination = destination
        self._service = service
        self._config = config
        self._seen = seen
        self._source = source
        self.policy = policy_of(config, destination)
        self.right_at: tuple[int, int] | None = None
        """The versions of the mesh and of the configuration at which it was found to be made of what there is."""
        self._detector = OutlierDetector(self.policy.outlier) if self.policy.outlier is not None else None
        self._levels: tuple[Level, ...] = ()
        self._shares: list[float] = []
        self._carrying: list[int] = []
        """Levels with a share."""
        self._algorithms: dict[tuple[int, int], Algorithm] = {}
        self._healths: list[Health] = []
        self._panics = False
        self._endpoints: dict[tuple[str, int, IpAddress], Endpoint] = {}
        """By workload, level and what address the asker would like: what is asked for again is the same object, by which others know it."""
        self._recent: dict[tuple[int, int, int], tuple[Host, IpAddress, Endpoint]] = {}
        """The same by the numbers of host and address, which are held: an address is hashed and compared in Python."""
        self.hosts: dict[str, Host] = {}

    def is_of(self, service: Service, config: DestinationConfig | None, seen: PickList | None, source: Workload | None) -> bool:
        """Whether it was made of these very values."""
        return self._service is service and self._config is config and self._seen is seen and self._source is source and seen is not None

    def take_hosts(self, state: MeshState, labels: Mapping[str, str], before: _Cluster | None, now: float, rng: random.Random) -> None:
        """Find the endpoints; those that were there before keep what was learnt of them. All that are there at the first look are old."""
        known = before.hosts if before is not None else {}
        since = now if before is not None else float("-inf")
        of_workloads = self._config.labels if self._config is not None else _NO_LABELS
        balancing = self._service.load_balancing or LoadBalancing()
        for endpoint in sorted(state.endpoints(self._service.key), key=lambda endpoint: endpoint.workload.uid):
            workload = endpoint.workload
            port = target_port(self._service, endpoint.ports, self._destination.port)
            if port is None or not workload.addresses or not takes_connections(workload, balancing):
                continue
            own = of_workloads.get(workload.uid, {}) if labels else {}
            if any(own.get(name) != value for name, value in labels.items()):
                continue
            host = known.get(workload.uid)
            if host is None:
                host = Host(workload, port, workload.capacity, since)
            host.workload, host.port, host.weight = workload, port, workload.capacity
            self.hosts[workload.uid] = host
        self._healths = [host.health for host in self.hosts.values()]
        if before is not None and before._detector is not None and self._detector is not None:
            self._detector.follow(before._detector)
        if self._detector is None:
            for health in self._healths:
                health.ejected_at = None
        source = self._source or Workload("", "", "")
        setting = self.policy.load_balancer.locality
        hosts = list(self.hosts.values())
        self._levels = arrange(hosts, setting, source, of_workloads, detects=self._detector is not None)
        self._settle()

    def choose(self, wish: Wish, rng: random.Random, now: float) -> Endpoint | NoEndpoint:
        """One of the hosts that are well, of a level and group by their shares."""
        if self._detector is not None and self._detector.sweep(self._healths, now):
            self._settle()
        if not self.hosts:
            return NoEndpoint(f"{self._name} has no healthy endpoint", known=True)
        level = self._draw_level(wish.elsewhere, rng)
        if level is None:
            ejected = "; ".join(sorted({health.because for health in self._healths if health.because}))
            return NoEndpoint(f"all {len(self.hosts)} endpoints of {self._name} are ejected ({ejected})", known=True)
        host = self._draw_host(level, wish.affinity.key, rng, now)
        endpoint = self._endpoint(host, level, wish)
        if wish.tried and self.policy.load_balancer.hash is None:
            for _ in range(REPICKS):
                if endpoint.key not in wish.tried:
                    break
                host = self._draw_host(level, None, rng, now)
                endpoint = self._endpoint(host, level, wish)
        return endpoint

    def answered(self, endpoint: Endpoint, status: int, now: float) -> None:
        host = self.hosts.get(endpoint.workload.uid) if endpoint.workload is not None else None
        if host is not None and self._detector is not None and self._detector.answered(host.health, status, self._healths, now):
            self._settle()

    def happened_here(self, endpoint: Endpoint, outcome: LocalOutcome, now: float) -> None:
        host = self.hosts.get(endpoint.workload.uid) if endpoint.workload is not None else None
        if host is not None and self._detector is not None and self._detector.happened_here(host.health, outcome, self._healths, now):
            self._settle()

    def describe(self, now: float) -> dict[str, object]:
        return {
            "destination": self._name,
            "levels": [level.because for level in self._levels],
            "endpoints": [
                {
                    "workload": f"{host.workload.namespace}/{host.workload.name}",
                    "port": host.port,
                    "active": host.active,
                    "ejected": host.health.because or None,
                    "ejectedForSeconds": None if host.health.ejected_at is None else round(now - host.health.ejected_at, 1),
                }
                for host in self.hosts.values()
            ],
        }

    @property
    def _name(self) -> str:
        subset = f" subset {self._destination.subset}" if self._destination.subset else ""
        return f"{self._service.key} port {self._destination.port}{subset}"

    def _settle(self) -> None:
        """After hosts came, went, fell ill or got well."""
        self._algorithms.clear()
        well = sum(1 for health in self._healths if health.ejected_at is None)
        outlier = self.policy.outlier
        least = outlier.min_health_percent if outlier is not None else 0
        self._panics = bool(self._healths) and least > 0 and well * 100 < least * len(self._healths)
        self._shares = share_out([(sum(map(self._is_well, level.hosts)), len(level.hosts)) for level in self._levels])
        self._carrying = [number for number, share in enumerate(self._shares) if share > 0]

    def _is_well(self, host: Host) -> bool:
        return self._panics or host.health.ejected_at is None

    def _draw_level(self, elsewhere: int, rng: random.Random) -> int | None:
        """The index of a level, by the shares; with ``elsewhere``, of those that are further away if there are any."""
        carrying = self._carrying
        if elsewhere:
            further = [n for n, level in enumerate(self._levels) if n >= elsewhere and any(map(self._is_well, level.hosts))]
            if further:
                return further[0]
        if len(carrying) < 2:
            return carrying[0] if carrying else None
        drawn = rng.random()
        for number in carrying:
            drawn -= self._shares[number]
            if drawn < 0:
                return number
        return carrying[-1]

    def _draw_host(self, level: int, key: int | None, rng: random.Random, now: float) -> Host:
        group = self._draw_group(level, rng)
        algorithm = self._algorithms.get((level, group))
        if algorithm is None:
            well = [host for host in self._levels[level].groups[group].hosts if self._is_well(host)]
            algorithm = self._algorithms[(level, group)] = make_algorithm(well, self.policy.load_balancer, rng)
        return algorithm.pick(rng, key, now)

    def _draw_group(self, level: int, rng: random.Random) -> int:
        groups = self._levels[level].groups
        if len(groups) == 1:
            return 0
        weights = [group.weight * capacity(sum(map(self._is_well, group.hosts)), len(group.hosts)) for group in groups]
        return rng.choices(range(len(groups)), weights)[0]

    def _endpoint(self, host: Host, level: int, wish: Wish) -> Endpoint:
        workload = host.workload
        like = wish.like if wish.like is not None else workload.addresses[0]
        numbers = (id(host), level, id(like))
        recent = self._recent.get(numbers)
        if recent is not None:
            return recent[2]
        key = (workload.uid, level, like)
        endpoint = self._endpoints.get(key)
        if endpoint is None:
            ip = choose_ip(workload, self._service, like, like=like)
            address = SocketAddress(workload.addresses[0] if ip is None else ip, host.port)
            because = f"{self._name}: {workload.namespace}/{workload.name}, {self._levels[level].because}"
            endpoint = Endpoint(address, workload, self._service, self._destination, self.policy, because, host)
            if len(self._endpoints) >= MAX_ENDPOINTS:
                self._endpoints.clear()
            self._endpoints[key] = endpoint
        if len(self._recent) >= MAX_ENDPOINTS:
            self._recent.clear()
        self._recent[numbers] = host, like, endpoint
        return endpoint

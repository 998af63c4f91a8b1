"""From the blocks of a trafficPolicy to how a destination is reached: what goes before what, and what holds where nothing is said.

A subset's port, the subset, the rule's port, the rule, the mesh: each block (load balancing, connection pool, outlier detection, TLS) is
taken whole from the first of these that has it; except that what is said of a port replaces all four, so that what it leaves out is not
inherited (reference: Istio's `MergeTrafficPolicy`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from istiod_py.translate.l7.destination_rules import MergedSubset, Piece
from istiod_py.translate.l7.upstream_tls import Credentials, translate_tls
from mesh.kube.meshconfig import MeshConfig
from mesh.kube.trafficpolicy import BalancerSettings, Blocks, LocalitySettings, PolicySettings, PoolSettings
from mesh.model.l7.destination import (
    Balance,
    ConnectionPool,
    H2Upgrade,
    Keepalive,
    LoadBalancer,
    Locality,
    RetryBudget,
    TlsMode,
    TrafficPolicy,
    UpstreamTls,
)
from mesh.model.labels import NETWORK, REGION, SUBZONE, ZONE
from mesh.model.service import LoadBalancing, LoadBalancingMode, LoadBalancingScope

HOSTNAME = "kubernetes.io/hostname"
CLUSTER = "topology.istio.io/cluster"
SCOPE_LABELS = {
    LoadBalancingScope.NETWORK: NETWORK,
    LoadBalancingScope.REGION: REGION,
    LoadBalancingScope.ZONE: ZONE,
    LoadBalancingScope.SUBZONE: SUBZONE,
    LoadBalancingScope.NODE: HOSTNAME,
    LoadBalancingScope.CLUSTER: CLUSTER,
}
"""What endpoints that are close in some way have in common."""


@dataclass(frozen=True, slots=True)
class Effective:
    """What was said of one port of a destination, or of one of its subsets."""

    blocks: Blocks = field(default_factory=Blocks)
    proxy_protocol: int | None = None
    retry_budget: RetryBudget | None = None
    broken: str = ""


def effective(piece: Piece, port: int | None, subset: MergedSubset | None = None) -> Effective:
    """``port`` None: of all ports that nothing is said of."""
    result = _lay_over(Effective(), piece, port)
    return result if subset is None else _lay_over(result, subset.piece, port)


def _lay_over(below: Effective, piece: Piece, port: int | None) -> Effective:
    settings = piece.settings
    alone = settings.blocks_of(port) if port is not None else None
    above = settings.blocks
    merged = Blocks(
        balancer=above.balancer or below.blocks.balancer,
        pool=above.pool or below.blocks.pool,
        outlier=above.outlier or below.blocks.outlier,
        tls=above.tls or below.blocks.tls,
    )
    return Effective(
        blocks=merged if alone is None else alone,
        proxy_protocol=settings.proxy_protocol if settings.proxy_protocol is not None else below.proxy_protocol,
        retry_budget=settings.retry_budget if settings.retry_budget is not None else below.retry_budget,
        broken=piece.broken or below.broken,
    )


def ports_of(settings: Iterable[PolicySettings]) -> set[int]:
    """The ports of which something is said."""
    return {port for each in settings for port, _ in each.ports}


@dataclass(frozen=True, slots=True)
class TrafficFacts:
    """What a destination's policy depends on besides what rules say. ``namespace``: the waypoint's; ``distribution``: how the service
    itself wants its endpoints chosen; ``as_dialled``: it has no endpoints of its own (resolution NONE)."""

    mesh: MeshConfig
    namespace: str
    credentials: Credentials
    distribution: LoadBalancing | None = None
    as_dialled: bool = False


def make_policy(said: Effective, backend: UpstreamTls | None, facts: TrafficFacts) -> TrafficPolicy:
    """``backend``: of a BackendTLSPolicy, for where no DestinationRule says anything of TLS."""
    blocks = said.blocks
    outlier = blocks.outlier or facts.mesh.outlier
    if said.broken:
        tls: UpstreamTls | None = UpstreamTls(TlsMode.SIMPLE, broken=said.broken)
    elif blocks.tls is not None:
        tls = translate_tls(blocks.tls, facts.namespace, facts.credentials)
    else:
        tls = backend
    return TrafficPolicy(
        load_balancer=_balancer(blocks.balancer or BalancerSettings(), facts),
        pool=_pool(blocks.pool or facts.mesh.pool or PoolSettings(), facts.mesh),
        outlier=outlier.detection if outlier is not None else None,
        tls=tls,
        retry_budget=said.retry_budget,
        proxy_protocol=said.proxy_protocol,
    )


def _balancer(settings: BalancerSettings, facts: TrafficFacts) -> LoadBalancer:
    simple = settings.simple or LoadBalancer().simple
    if simple is Balance.PASSTHROUGH and not facts.as_dialled:
        # The address as dialled is the service's virtual one: nobody is there.
        simple = LoadBalancer().simple
    warms = settings.hash is None and simple in (Balance.ROUND_ROBIN, Balance.LEAST_REQUEST)
    return LoadBalancer(
        simple=simple,
        hash=settings.hash,
        locality=_locality(settings.locality, facts),
        warmup=settings.warmup if warms else None,
    )


def _locality(settings: LocalitySettings | None, facts: TrafficFacts) -> Locality | None:
    """The rule's, else what the service asks for, else the mesh's. None: what an endpoint's place means by default."""
    chosen = settings
    if chosen is None:
        wanted = facts.distribution
        if wanted is not None and wanted.mode is LoadBalancingMode.FAILOVER:
            return Locality(priority=tuple(SCOPE_LABELS[scope] for scope in wanted.routing_preference), without_outlier_detection=True)
        chosen = facts.mesh.locality
    if chosen == LocalitySettings():
        return None
    if chosen.enabled is False:
        return Locality(enabled=False)
    if chosen.distribute:
        return Locality(distribute=chosen.distribute)
    return Locality(failover=chosen.failover, priority=chosen.priority)


def _pool(settings: PoolSettings, mesh: MeshConfig) -> ConnectionPool:
    defaults = ConnectionPool()
    interval, timeout = settings.h2_keepalive or (defaults.h2_keepalive_interval, defaults.h2_keepalive_timeout)
    return ConnectionPool(
        max_connections=settings.max_connections or defaults.max_connections,
        connect_timeout=settings.connect_timeout or mesh.connect_timeout,
        keepalive=_keepalive(settings.keepalive, mesh.keepalive),
        max_connection_duration=settings.max_connection_duration or defaults.max_connection_duration,
        tcp_idle_timeout=defaults.tcp_idle_timeout if settings.tcp_idle_timeout is None else settings.tcp_idle_timeout,
        max_pending=settings.max_pending or defaults.max_pending,
        max_requests=settings.max_requests or defaults.max_requests,
        max_retries=settings.max_retries or defaults.max_retries,
        max_requests_per_connection=settings.max_requests_per_connection or defaults.max_requests_per_connection,
        http_idle_timeout=_http_idle(settings, defaults),
        h2_upgrade=_upgrade(settings.h2_upgrade, mesh.h2_upgrade),
        max_concurrent_streams=settings.max_concurrent_streams or defaults.max_concurrent_streams,
        h2_keepalive_interval=interval,
        h2_keepalive_timeout=timeout,
    )


def _http_idle(settings: PoolSettings, defaults: ConnectionPool) -> float:
    """Without one of its own, that of TCP, as Istio has it."""
    for given in (settings.http_idle_timeout, settings.tcp_idle_timeout):
        if given is not None:
            return given
    return defaults.http_idle_timeout


def _keepalive(own: Keepalive | None, mesh: Keepalive | None) -> Keepalive | None:
    """Field by field."""
    if own is None or mesh is None:
        return own if own is not None else mesh
    return Keepalive(
        probes=own.probes if own.probes is not None else mesh.probes,
        time=own.time if own.time is not None else mesh.time,
        interval=own.interval if own.interval is not None else mesh.interval,
    )


def _upgrade(own: H2Upgrade | None, mesh: H2Upgrade) -> H2Upgrade:
    return mesh if own is None else own

"""How a waypoint chooses among a destination's endpoints and reaches them (DestinationRule, BackendTLSPolicy). Times in seconds.

What a destination has no rule for is in the defaults here: they are Istio's.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import TypeAlias

import msgspec

UNLIMITED = 2**32 - 1
MOST_SLOTS = 65_537
"""Of a hash ring or Maglev's table at a waypoint, whatever is asked for: one takes a fifth of a second to make, again with every change of
the endpoints, and nobody is served meanwhile. A prime; Envoy's own table."""


class Balance(Enum):
    LEAST_REQUEST = "least-request"
    """The better of two at random, by active requests; weighted."""
    ROUND_ROBIN = "round-robin"
    RANDOM = "random"
    PASSTHROUGH = "passthrough"
    """The address as dialled."""


class HashHeader(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="header"):
    name: str


class HashCookie(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="cookie", omit_defaults=True):
    """``ttl`` None: only a cookie the client sends; 0: a session cookie is made where there is none."""

    name: str
    path: str = ""
    ttl: float | None = None
    attributes: tuple[tuple[str, str], ...] = ()


class HashQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="query"):
    name: str


class HashSource(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="source"):
    """The client's IP address."""


HashKey: TypeAlias = HashHeader | HashCookie | HashQuery | HashSource


class ConsistentHash(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """``table_size`` for Maglev (a prime); None: a ring of at least ``minimum_ring_size``. Neither goes beyond `MOST_SLOTS`."""

    key: HashKey
    minimum_ring_size: int = 1024
    table_size: int | None = None


class Distribute(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """From a locality pattern (``region/zone/*``) to others, with percentages that sum to 100."""

    source: str
    to: Mapping[str, int]


class Locality(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """``distribute``, or else ``priority`` (labels, ``key`` or ``key=value``, in order), or else ``failover`` (region to region). Beside
    ``priority``, ``failover`` orders what has the same priority."""

    enabled: bool = True
    distribute: tuple[Distribute, ...] = ()
    failover: tuple[tuple[str, str], ...] = ()
    priority: tuple[str, ...] = ()
    without_outlier_detection: bool = False
    """Priorities hold though no outlier detection is on (a Service's trafficDistribution)."""


class Warmup(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    duration: float
    minimum_percent: float = 10.0
    aggression: float = 1.0


class LoadBalancer(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    simple: Balance = Balance.LEAST_REQUEST
    hash: ConsistentHash | None = None
    locality: Locality | None = None
    """None: as `Locality` without anything."""
    warmup: Warmup | None = None


class H2Upgrade(Enum):
    NO = "no"
    UPGRADE = "upgrade"
    CLIENT = "client"
    """What the client speaks (useClientProtocol)."""


class Keepalive(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """TCP keepalive; None: the system's."""

    probes: int | None = None
    time: float | None = None
    interval: float | None = None


class ConnectionPool(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Bounds of one waypoint process for one destination. 0 for a time or number of requests: no bound."""

    max_connections: int = UNLIMITED
    connect_timeout: float = 10.0
    keepalive: Keepalive | None = None
    max_connection_duration: float = 0.0
    tcp_idle_timeout: float = 3600.0
    max_pending: int = UNLIMITED
    max_requests: int = UNLIMITED
    max_retries: int = UNLIMITED
    max_requests_per_connection: int = 0
    http_idle_timeout: float = 3600.0
    h2_upgrade: H2Upgrade = H2Upgrade.NO
    max_concurrent_streams: int = UNLIMITED
    h2_keepalive_interval: float = 0.0
    h2_keepalive_timeout: float = 0.0


class RetryBudget(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    percent: float = 20.0
    min_concurrency: int = 3
    interval: float = 0.0


class OutlierDetection(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """0 switches a count off. ``error_statuses``: what counts as an error instead of 5xx; none: 5xx. Source: Istio's defaults for Envoy's
    detector."""

    consecutive_5xx: int = 5
    consecutive_gateway_errors: int = 0
    split_local_origin: bool = False
    consecutive_local_origin_failures: int = 5
    interval: float = 10.0
    base_ejection_time: float = 30.0
    max_ejection_percent: int = 10
    min_health_percent: int = 0
    error_statuses: tuple[int, ...] = ()


class TlsMode(Enum):
    SIMPLE = "simple"
    MUTUAL = "mutual"


class UpstreamTls(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """TLS towards the application, inside HBONE where the endpoint takes that. ``sni`` empty: the request's host, which the certificate
    must then name. ``names`` (DNS) and ``uris``: one of these it must have instead. ``roots``, ``certificate`` and ``key``: PEM; no roots:
    the system's. ``broken``: why it cannot be used; requests fail then and never go in plaintext."""

    mode: TlsMode
    sni: str = ""
    names: tuple[str, ...] = ()
    uris: tuple[str, ...] = ()
    roots: str | None = None
    certificate: str = ""
    key: str = ""
    skip_verify: bool = False
    broken: str = ""


class TrafficPolicy(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    load_balancer: LoadBalancer = LoadBalancer()
    pool: ConnectionPool = ConnectionPool()
    outlier: OutlierDetection | None = None
    tls: UpstreamTls | None = None
    retry_budget: RetryBudget | None = None
    proxy_protocol: int | None = None
    """1 or 2: send a PROXY header of that version first."""


class Subset(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Endpoints with all of ``labels``. ``policy`` and ``ports`` are whole: what the rule's own policy gives is merged in already."""

    name: str
    labels: Mapping[str, str]
    policy: TrafficPolicy = TrafficPolicy()
    ports: Mapping[int, TrafficPolicy] = {}


class DestinationConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Everything about one service as destination. ``policy`` for every port that ``ports`` does not name; ``labels`` of endpoints that
    subsets and priorities ask for, by workload uid (the workload API has no labels)."""

    namespace: str
    hostname: str
    origin: str = ""
    policy: TrafficPolicy = TrafficPolicy()
    ports: Mapping[int, TrafficPolicy] = {}
    subsets: tuple[Subset, ...] = ()
    labels: Mapping[str, Mapping[str, str]] = {}

    @property
    def key(self) -> str:
        return f"{self.namespace}/{self.hostname}"

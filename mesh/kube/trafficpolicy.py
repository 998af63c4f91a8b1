"""The blocks of a DestinationRule's ``trafficPolicy``, which the mesh configuration has as well. What is not given is None, so that it
can be taken from elsewhere. Checked as Istio's webhook checks it. Times in seconds.

What fields must be to each other is checked here alone: as rules of the API server, under every port of every subset, they would cost more
than it lets a definition cost.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Final

from mesh.kube.durations import DURATION, parse_duration, read_duration
from mesh.kube.fields import Fields, Text
from mesh.kube.headeredits import find_control_mistake, is_token
from mesh.kube.hostnames import is_hostname
from mesh.model.address import InvalidAddress, parse_ip
from mesh.model.l7.destination import (
    Balance,
    ConsistentHash,
    Distribute,
    H2Upgrade,
    HashCookie,
    HashHeader,
    HashKey,
    HashQuery,
    HashSource,
    Keepalive,
    OutlierDetection,
    RetryBudget,
    Warmup,
)

MAX_INT32: Final = 2**31 - 1
MAX_UINT32: Final = 2**32 - 1
MAX_RING: Final = 8 << 20
"""Envoy's largest ring."""
MAX_TABLE: Final = 5_000_010
"""Of Maglev's table, as Istio has it."""
MAX_ITEMS: Final = 512
TLS_MODES: Final = ("DISABLE", "SIMPLE", "MUTUAL", "ISTIO_MUTUAL")
_SIMPLE: Final[Mapping[str, Balance | None]] = {
    "UNSPECIFIED": None,
    "LEAST_CONN": Balance.LEAST_REQUEST,
    "RANDOM": Balance.RANDOM,
    "PASSTHROUGH": Balance.PASSTHROUGH,
    "ROUND_ROBIN": Balance.ROUND_ROBIN,
    "LEAST_REQUEST": Balance.LEAST_REQUEST,
}
_H2_UPGRADES: Final = {"DEFAULT": None, "DO_NOT_UPGRADE": H2Upgrade.NO, "UPGRADE": H2Upgrade.UPGRADE}
_TOPOLOGY: Final = ("topology.kubernetes.io/region", "topology.kubernetes.io/zone", "topology.istio.io/subzone")


@dataclass(frozen=True, slots=True)
class LocalitySettings:
    """``enabled`` None: as the mesh has it."""

    enabled: bool | None = None
    distribute: tuple[Distribute, ...] = ()
    failover: tuple[tuple[str, str], ...] = ()
    priority: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class BalancerSettings:
    simple: Balance | None = None
    hash: ConsistentHash | None = None
    locality: LocalitySettings | None = None
    warmup: Warmup | None = None
    zone_aware: bool = False
    """A zoneAwareLbSetting is given."""


@dataclass(frozen=True, slots=True)
class PoolSettings:
    max_connections: int | None = None
    connect_timeout: float | None = None
    keepalive: Keepalive | None = None
    max_connection_duration: float | None = None
    tcp_idle_timeout: float | None = None
    max_pending: int | None = None
    max_requests: int | None = None
    max_retries: int | None = None
    max_requests_per_connection: int | None = None
    http_idle_timeout: float | None = None
    h2_upgrade: H2Upgrade | None = None
    max_concurrent_streams: int | None = None
    h2_keepalive: tuple[float, float] | None = None
    """Interval and timeout."""


@dataclass(frozen=True, slots=True)
class OutlierSettings:
    """``legacy``: the counter that Istio had before the others is given, and has no effect."""

    detection: OutlierDetection
    legacy: bool = False


@dataclass(frozen=True, slots=True)
class TlsSettings:
    """``mode`` is one of `TLS_MODES`. Certificates are paths of files in the proxy."""

    mode: str
    client_certificate: str = ""
    private_key: str = ""
    ca_certificates: str = ""
    ca_crl: str = ""
    credential_name: str = ""
    sni: str = ""
    subject_alt_names: tuple[str, ...] = ()
    skip_verify: bool = False


@dataclass(frozen=True, slots=True)
class Blocks:
    """What can be said of all ports, or of one."""

    balancer: BalancerSettings | None = None
    pool: PoolSettings | None = None
    outlier: OutlierSettings | None = None
    tls: TlsSettings | None = None


@dataclass(frozen=True, slots=True)
class TunnelSettings:
    protocol: str
    host: str
    port: int


@dataclass(frozen=True, slots=True)
class PolicySettings:
    """``ports`` in the order of the list; the first for a port counts."""

    blocks: Blocks = Blocks()
    ports: tuple[tuple[int, Blocks], ...] = ()
    tunnel: TunnelSettings | None = None
    proxy_protocol: int | None = None
    retry_budget: RetryBudget | None = None

    def blocks_of(self, port: int) -> Blocks | None:
        """What is said of this port alone."""
        return next((blocks for number, blocks in self.ports if number == port), None)


_BLOCKS: Final = ("loadBalancer", "connectionPool", "outlierDetection", "tls")
_BESIDES: Final = ("portLevelSettings", "tunnel", "proxyProtocol", "retryBudget")


def read_policy(policy: Fields) -> PolicySettings:
    """``trafficPolicy`` of a rule or of a subset."""
    policy.refuse_unknown(*_BLOCKS, *_BESIDES)
    policy.require_one_of(*_BLOCKS, *_BESIDES)
    blocks = _read_blocks(policy)
    ports = [_read_port(item) for item in policy.mappings("portLevelSettings", most=MAX_ITEMS)]
    tunnel, proxy, budget = policy.mapping("tunnel"), policy.mapping("proxyProtocol"), policy.mapping("retryBudget")
    if tunnel is not None and proxy is not None:
        policy.complain("tunnel", "tunnel and proxyProtocol exclude each other")
    return PolicySettings(
        blocks=blocks,
        ports=tuple(ports),
        tunnel=_read_tunnel(tunnel) if tunnel is not None else None,
        proxy_protocol=_read_proxy(proxy) if proxy is not None else None,
        retry_budget=_read_budget(budget) if budget is not None else None,
    )


def _read_blocks(policy: Fields) -> Blocks:
    balancer, pool, outlier, tls = (policy.mapping(key) for key in _BLOCKS)
    return Blocks(
        balancer=read_balancer(balancer) if balancer is not None else None,
        pool=read_pool(pool) if pool is not None else None,
        outlier=read_outlier(outlier) if outlier is not None else None,
        tls=read_tls(tls) if tls is not None else None,
    )


def _read_port(item: Fields) -> tuple[int, Blocks]:
    item.refuse_unknown("port", *_BLOCKS)
    item.require_one_of(*_BLOCKS)
    port = item.mapping("port", required=True)
    number = 0
    if port is not None:
        port.refuse_unknown("number")
        number = port.integer("number", required=True, low=1, high=65535)
    return number, _read_blocks(item)


def _read_tunnel(tunnel: Fields) -> TunnelSettings:
    tunnel.refuse_unknown("protocol", "targetHost", "targetPort")
    return TunnelSettings(
        protocol=tunnel.string("protocol", "CONNECT", choices=("CONNECT", "POST")),
        host=tunnel.string("targetHost", required=True, text=_HOST),
        port=tunnel.integer("targetPort", required=True, low=1, high=65535),
    )


def _read_proxy(proxy: Fields) -> int:
    proxy.refuse_unknown("version")
    return 2 if proxy.string("version", "V1", choices=("V1", "V2")) == "V2" else 1


def _read_budget(budget: Fields) -> RetryBudget:
    budget.refuse_unknown("percent", "minRetryConcurrency", "budgetInterval")
    defaults = RetryBudget()
    return RetryBudget(
        percent=budget.number("percent", defaults.percent, low=0, high=100),
        min_concurrency=budget.integer("minRetryConcurrency", low=0, high=MAX_UINT32) or defaults.min_concurrency,
        interval=read_duration(budget, "budgetInterval") or defaults.interval,
    )


# Load balancing


def read_balancer(balancer: Fields) -> BalancerSettings:
    balancer.refuse_unknown("simple", "consistentHash", "localityLbSetting", "zoneAwareLbSetting", "warmupDurationSecs", "warmup")
    simple = balancer.string("simple", "UNSPECIFIED", choices=tuple(_SIMPLE))
    hashing, locality = balancer.mapping("consistentHash"), balancer.mapping("localityLbSetting")
    zones, warmup = balancer.mapping("zoneAwareLbSetting"), balancer.mapping("warmup")
    older = read_duration(balancer, "warmupDurationSecs")
    if "simple" in balancer and hashing is not None:
        balancer.complain("consistentHash", "simple and consistentHash exclude each other")
    if locality is not None and zones is not None:
        balancer.complain("zoneAwareLbSetting", "localityLbSetting and zoneAwareLbSetting exclude each other")
    if zones is not None:
        _check_zones(zones)
    return BalancerSettings(
        simple=_SIMPLE[simple],
        hash=_read_hash(hashing) if hashing is not None else None,
        locality=read_locality(locality) if locality is not None else None,
        warmup=_read_warmup(warmup) if warmup is not None else Warmup(older) if older is not None else None,
        zone_aware=zones is not None,
    )


def _read_hash(hashing: Fields) -> ConsistentHash:
    keys = ("httpHeaderName", "httpCookie", "useSourceIp", "httpQueryParameterName")
    hashing.refuse_unknown(*keys, "ringHash", "maglev", "minimumRingSize")
    header = hashing.string("httpHeaderName", text=_SOMETHING)
    cookie = hashing.mapping("httpCookie")
    source = hashing.boolean("useSourceIp")
    query = hashing.string("httpQueryParameterName", text=_SOMETHING)
    if _count(keys, hashing) != 1:
        blamed = next((key for key in keys[1:] if key in hashing), keys[0])
        hashing.complain(blamed, f"a consistent hash needs exactly one key of {', '.join(keys)}")
    key: HashKey = HashHeader(header.lower())
    if cookie is not None:
        key = _read_cookie(cookie)
    elif query:
        key = HashQuery(query)
    elif source:
        key = HashSource()
    elif "useSourceIp" in hashing:
        hashing.complain("useSourceIp", "expected true, or another key")
    return _read_algorithm(hashing, key)


def _count(keys: Iterable[str], fields: Fields) -> int:
    return sum(key in fields for key in keys)


def _read_algorithm(hashing: Fields, key: HashKey) -> ConsistentHash:
    ring, maglev = hashing.mapping("ringHash"), hashing.mapping("maglev")
    older = hashing.integer("minimumRingSize", low=0, high=MAX_RING)
    if ring is not None and maglev is not None:
        hashing.complain("maglev", "ringHash and maglev exclude each other")
    if older and (ring is not None or maglev is not None):
        hashing.complain("minimumRingSize", "is the older way to say ringHash.minimumRingSize, and excludes ringHash and maglev")
    size, table = older, None
    if ring is not None:
        ring.refuse_unknown("minimumRingSize")
        size = ring.integer("minimumRingSize", low=0, high=MAX_RING)
    if maglev is not None:
        maglev.refuse_unknown("tableSize")
        table = maglev.integer("tableSize", required=True, low=2, high=MAX_TABLE)
        if table and not _is_prime(table):
            maglev.complain("tableSize", f"expected a prime number, found {table}")
    return ConsistentHash(key, size or ConsistentHash(key).minimum_ring_size, table)


def _is_prime(number: int) -> bool:
    return number in (2, 3) or (number > 3 and number % 2 == 1 and all(number % factor for factor in range(3, isqrt(number) + 1, 2)))


def _read_cookie(cookie: Fields) -> HashCookie:
    cookie.refuse_unknown("name", "path", "ttl", "attributes")
    attributes: dict[str, str] = {}
    for item in cookie.mappings("attributes", most=MAX_ITEMS):
        item.refuse_unknown("name", "value")
        name, value = item.string("name", required=True, text=_COOKIE_ATTRIBUTE), item.string("value", text=_COOKIE_PART)
        if name in attributes:
            item.complain("name", f"the attribute '{name}' is given twice")
        attributes[name] = value
    return HashCookie(
        name=cookie.string("name", required=True, text=_COOKIE_NAME),
        path=cookie.string("path", text=_COOKIE_PART),
        ttl=_read_duration_or_zero(cookie, "ttl"),
        attributes=tuple(attributes.items()),
    )


def read_locality(locality: Fields) -> LocalitySettings:
    locality.refuse_unknown("distribute", "failover", "failoverPriority", "enabled")
    distribute = [_read_distribute(item) for item in locality.mappings("distribute", most=MAX_ITEMS)]
    failover = [_read_failover(item) for item in locality.mappings("failover", most=MAX_ITEMS)]
    priority = locality.strings("failoverPriority", most=MAX_ITEMS, text=_SOMETHING)
    enabled = locality.boolean("enabled", True)
    if distribute and failover:
        locality.complain("failover", "distribute and failover exclude each other")
    if failover:
        for index, label in enumerate(priority):
            if label in _TOPOLOGY:
                locality.complain("failoverPriority", f"'{label}' can't stand beside 'failover', which orders by it", index)
    for index, mistake in _find_overlaps([item.source for item in distribute]):
        locality.complain("distribute", mistake, index, "from")
    return LocalitySettings(enabled if "enabled" in locality else None, tuple(distribute), tuple(failover), priority)


def _read_distribute(item: Fields) -> Distribute:
    item.refuse_unknown("from", "to")
    source = item.string("from", required=True, text=_LOCALITY)
    to = item.integer_map("to", low=1, high=100)
    for _, mistake in _find_overlaps(list(to)):
        item.complain("to", mistake)
    for locality in to:
        malformed = _find_locality_mistake(locality)
        if malformed is not None:
            item.complain("to", malformed, locality)
    total = sum(to.values())
    if "from" in item and total != 100:
        item.complain("to", "the percentages must have the sum 100")
    return Distribute(source, to)


def _read_failover(item: Fields) -> tuple[str, str]:
    item.refuse_unknown("from", "to")
    source, to = item.string("from", required=True, text=_REGION), item.string("to", required=True, text=_REGION)
    if source and source == to:
        item.complain("to", "must be another region than 'from'")
    return source, to


def _check_zones(zones: Fields) -> None:
    """What Istio asks of a zoneAwareLbSetting, which waypoints have no use for."""
    zones.refuse_unknown("enabled", "failover", "failoverPriority", "minClusterSize")
    zones.boolean("enabled")
    zones.integer("minClusterSize", low=0)
    for item in zones.mappings("failover", most=MAX_ITEMS):
        _read_failover(item)
    for index, label in enumerate(zones.strings("failoverPriority", most=MAX_ITEMS, text=_SOMETHING)):
        if label in _TOPOLOGY:
            zones.complain("failoverPriority", f"'{label}' can't stand here: zones and regions are looked after already", index)


def _read_warmup(warmup: Fields) -> Warmup:
    warmup.refuse_unknown("duration", "minimumPercent", "aggression")
    text = warmup.string("duration", required=True, text=DURATION)
    duration = parse_duration(text)
    defaults = Warmup(0)
    aggression = warmup.number("aggression", defaults.aggression, low=0, high=1000)
    if aggression == 0:
        warmup.complain("aggression", "expected a number greater than 0")
    return Warmup(float(duration or 0), warmup.number("minimumPercent", defaults.minimum_percent, low=0, high=100), aggression)


# Connections


def read_pool(pool: Fields) -> PoolSettings:
    pool.refuse_unknown("tcp", "http")
    pool.require_one_of("tcp", "http")
    tcp, http = pool.mapping("tcp"), pool.mapping("http")
    values: dict[str, object] = {}
    if tcp is not None:
        values |= _read_tcp(tcp)
    if http is not None:
        values |= _read_http(http)
    return PoolSettings(**values)  # type: ignore[arg-type]  # each as its reader gives it


def _read_tcp(tcp: Fields) -> dict[str, object]:
    tcp.refuse_unknown("maxConnections", "connectTimeout", "tcpKeepalive", "maxConnectionDuration", "idleTimeout")
    keepalive = tcp.mapping("tcpKeepalive")
    return {
        "max_connections": _read_bound(tcp, "maxConnections"),
        "connect_timeout": read_duration(tcp, "connectTimeout"),
        "keepalive": read_keepalive(keepalive) if keepalive is not None else None,
        "max_connection_duration": read_duration(tcp, "maxConnectionDuration"),
        "tcp_idle_timeout": _read_duration_or_zero(tcp, "idleTimeout"),
    }


def _read_http(http: Fields) -> dict[str, object]:
    bounds = {
        "http1MaxPendingRequests": "max_pending",
        "http2MaxRequests": "max_requests",
        "maxRequestsPerConnection": "max_requests_per_connection",
        "maxRetries": "max_retries",
        "maxConcurrentStreams": "max_concurrent_streams",
    }
    http.refuse_unknown(*bounds, "idleTimeout", "h2UpgradePolicy", "useClientProtocol", "http2KeepAlive")
    upgrade = _H2_UPGRADES[http.string("h2UpgradePolicy", "DEFAULT", choices=tuple(_H2_UPGRADES))]
    client = http.boolean("useClientProtocol")
    if upgrade is H2Upgrade.UPGRADE and client:
        http.complain("useClientProtocol", "useClientProtocol and h2UpgradePolicy UPGRADE exclude each other")
    keepalive = http.mapping("http2KeepAlive")
    return {
        **{name: _read_bound(http, key) for key, name in bounds.items()},
        "http_idle_timeout": read_duration(http, "idleTimeout"),
        "h2_upgrade": H2Upgrade.CLIENT if client else upgrade,
        "h2_keepalive": _read_h2_keepalive(keepalive) if keepalive is not None else None,
    }


def _read_bound(fields: Fields, key: str) -> int | None:
    """0 says no more than nothing does, as in Istio."""
    return fields.integer(key, low=0, high=MAX_INT32) or None


def read_keepalive(keepalive: Fields) -> Keepalive:
    keepalive.refuse_unknown("probes", "time", "interval")
    return Keepalive(
        probes=keepalive.integer("probes", low=0, high=MAX_UINT32) or None,
        time=read_duration(keepalive, "time"),
        interval=read_duration(keepalive, "interval"),
    )


def _read_h2_keepalive(keepalive: Fields) -> tuple[float, float]:
    keepalive.refuse_unknown("interval", "timeout")
    interval, timeout = (parse_duration(keepalive.string(key, required=True, text=DURATION)) for key in ("interval", "timeout"))
    return float(interval or 0), float(timeout or 0)


def read_outlier(outlier: Fields) -> OutlierSettings:
    outlier.refuse_unknown(
        "consecutiveErrors",
        "splitExternalLocalOriginErrors",
        "consecutiveLocalOriginFailures",
        "consecutiveGatewayErrors",
        "consecutive5xxErrors",
        "interval",
        "baseEjectionTime",
        "maxEjectionPercent",
        "minHealthPercent",
        "outlierDetectionHttpErrorCodes",
    )
    defaults = OutlierDetection()
    split = outlier.boolean("splitExternalLocalOriginErrors")
    local = outlier.integer("consecutiveLocalOriginFailures", low=0, high=MAX_UINT32)
    if local and not split:
        outlier.complain("consecutiveLocalOriginFailures", "needs splitExternalLocalOriginErrors: true")
    detection = OutlierDetection(
        consecutive_5xx=outlier.integer("consecutive5xxErrors", defaults.consecutive_5xx, low=0, high=MAX_UINT32),
        consecutive_gateway_errors=outlier.integer("consecutiveGatewayErrors", low=0, high=MAX_UINT32),
        split_local_origin=split,
        consecutive_local_origin_failures=local or defaults.consecutive_local_origin_failures,
        interval=read_duration(outlier, "interval") or defaults.interval,
        base_ejection_time=read_duration(outlier, "baseEjectionTime") or defaults.base_ejection_time,
        max_ejection_percent=outlier.integer("maxEjectionPercent", low=0, high=100) or defaults.max_ejection_percent,
        min_health_percent=outlier.integer("minHealthPercent", low=0, high=100),
        error_statuses=_read_statuses(outlier),
    )
    return OutlierSettings(detection, outlier.integer("consecutiveErrors", low=0, high=MAX_INT32) > 0)


def _read_statuses(outlier: Fields) -> tuple[int, ...]:
    return tuple(dict.fromkeys(outlier.integers("outlierDetectionHttpErrorCodes", low=100, high=599)))


# TLS


def read_tls(tls: Fields) -> TlsSettings:
    tls.refuse_unknown(
        "mode",
        "clientCertificate",
        "privateKey",
        "caCertificates",
        "caCrl",
        "credentialName",
        "sni",
        "subjectAltNames",
        "insecureSkipVerify",
    )
    settings = TlsSettings(
        mode=tls.string("mode", TLS_MODES[0], choices=TLS_MODES),
        client_certificate=tls.string("clientCertificate"),
        private_key=tls.string("privateKey"),
        ca_certificates=tls.string("caCertificates"),
        ca_crl=tls.string("caCrl"),
        credential_name=tls.string("credentialName"),
        sni=tls.string("sni"),
        subject_alt_names=tls.strings("subjectAltNames", most=MAX_ITEMS, text=_SOMETHING),
        skip_verify=tls.boolean("insecureSkipVerify"),
    )
    _check_tls(settings, tls)
    return settings


def _check_tls(settings: TlsSettings, tls: Fields) -> None:
    ours = settings.mode in ("SIMPLE", "MUTUAL")
    given = [key for key in _FILES if key in tls]
    if ours and settings.credential_name and given:
        tls.complain("credentialName", f"credentialName excludes {', '.join(_FILES)}")
    lacking = settings.mode == "MUTUAL" and not settings.credential_name and not (settings.client_certificate and settings.private_key)
    if lacking:
        tls.complain("mode", "mode MUTUAL needs a certificate of its own: credentialName, or clientCertificate and privateKey")
    verified = settings.ca_certificates or settings.subject_alt_names or (settings.mode == "SIMPLE" and settings.credential_name)
    if ours and settings.skip_verify and verified:
        what = "caCertificates, subjectAltNames or, in mode SIMPLE, credentialName"
        tls.complain("insecureSkipVerify", f"nothing is verified with insecureSkipVerify: leave out {what}")


_FILES: Final = ("clientCertificate", "privateKey", "caCertificates", "caCrl")


# Texts


def _read_duration_or_zero(fields: Fields, key: str) -> float | None:
    """0s is a value of its own here."""
    text = fields.string(key, text=_DURATION_OR_ZERO)
    seconds = parse_duration(text)
    return None if seconds is None else float(seconds)


def _find_duration_mistake(text: str) -> str | None:
    return None if parse_duration(text) == 0 else DURATION.find_mistake(text)


def _find_host_mistake(host: str) -> str | None:
    try:
        parse_ip(host)
    except InvalidAddress:
        return None if is_hostname(host) else f"expected a hostname or an IP address, found '{host}'"
    return None


def _find_locality_mistake(locality: str) -> str | None:
    parts = locality.split("/")
    if len(parts) > 3 or not all(parts) or "*" in locality[:-1]:
        return f"expected region, region/zone or region/zone/subzone, with a '*' at most at the end, found '{locality}'"
    return None


def _find_region_mistake(region: str) -> str | None:
    return f"expected the name of a region, found '{region}'" if not region or "/" in region or "*" in region else None


def _find_overlaps(localities: list[str]) -> list[tuple[int, str]]:
    """Those that say something of a locality that one before them speaks of; of more than `MAX_ITEMS`, a mistake already, not all."""
    found = []
    for index, locality in enumerate(localities[:MAX_ITEMS]):
        for earlier in localities[:index]:
            if _covers(earlier, locality) or _covers(locality, earlier):
                found.append((index, f"'{locality}' overlaps with '{earlier}'"))
                break
    return found


def _covers(wide: str, narrow: str) -> bool:
    wide_parts = [part for part in wide.split("/") if part != "*"]
    return narrow.split("/")[: len(wide_parts)] == wide_parts


def _find_cookie_name_mistake(name: str) -> str | None:
    return None if is_token(name) else f"'{name[:80]}' is no name of a cookie"


def _find_cookie_part_mistake(text: str) -> str | None:
    return "a ';' would end it" if ";" in text else find_control_mistake(text)


_COOKIE_NAME: Final = Text(_find_cookie_name_mistake, {"minLength": 1})
_COOKIE_PART: Final = Text(_find_cookie_part_mistake)
_COOKIE_ATTRIBUTE: Final = Text(lambda text: _find_cookie_part_mistake(text) if text else "is empty", {"minLength": 1})
_SOMETHING: Final = Text(lambda text: None if text else "is empty", {"minLength": 1})
_DURATION_OR_ZERO: Final = Text(_find_duration_mistake, DURATION.schema)
_HOST: Final = Text(_find_host_mistake, {"minLength": 1, "maxLength": 253})
_LOCALITY: Final = Text(_find_locality_mistake, {"minLength": 1})
_REGION: Final = Text(_find_region_mistake, {"pattern": "^[^/*]+$"})

"""DestinationRules, field by field, and what Istio's webhook refuses of them."""

from __future__ import annotations

from typing import Any

import pytest
from ruamel.yaml import YAML

from mesh.kube.destinationrule import KubeDestinationRule, read_destination_rule
from mesh.kube.objects import KubeObject, Layer, Origin
from mesh.kube.trafficpolicy import (
    BalancerSettings,
    Blocks,
    LocalitySettings,
    OutlierSettings,
    PolicySettings,
    PoolSettings,
    TlsSettings,
    TunnelSettings,
)
from mesh.model.l7.destination import (
    Balance,
    ConsistentHash,
    Distribute,
    H2Upgrade,
    HashCookie,
    HashHeader,
    HashQuery,
    HashSource,
    Keepalive,
    OutlierDetection,
    RetryBudget,
    Warmup,
)


def read(spec: str) -> tuple[KubeDestinationRule, list[str]]:
    """The rule, and field and message of every mistake."""
    raw: dict[str, Any] = {"spec": YAML(typ="safe", pure=True).load(spec)}
    obj = KubeObject("networking.istio.io/v1", "DestinationRule", "shop", "r", raw, (Layer(Origin("x", 0, 1), raw),))
    rule, problems = read_destination_rule(obj)
    return rule, [f"{problem.field}: {problem.message}" for problem in problems]


def policy_of(text: str) -> PolicySettings:
    rule, problems = read(f"{{host: web, trafficPolicy: {text}}}")
    assert problems == []
    assert rule.policy is not None
    return rule.policy


def test_every_field_of_a_rule_is_read() -> None:
    rule, problems = read("""
host: Web
exportTo: [., other]
trafficPolicy: {proxyProtocol: {version: V2}}
subsets:
- {name: v1, labels: {version: v1}}
- {name: v2, labels: {version: v2}, trafficPolicy: {loadBalancer: {simple: RANDOM}}}
""")
    assert problems == []
    assert (rule.namespace, rule.name, rule.host, rule.export_to, rule.selects_workloads) == ("shop", "r", "web", (".", "other"), False)
    assert rule.policy == PolicySettings(proxy_protocol=2)
    v1, v2 = rule.subsets
    assert (v1.name, v1.labels, v1.policy) == ("v1", {"version": "v1"}, None)
    assert v2.policy == PolicySettings(Blocks(balancer=BalancerSettings(simple=Balance.RANDOM)))


@pytest.mark.parametrize(("text", "expected"), [
    ("{}", BalancerSettings()),
    ("{simple: UNSPECIFIED}", BalancerSettings()),
    ("{simple: LEAST_CONN}", BalancerSettings(simple=Balance.LEAST_REQUEST)),
    ("{simple: LEAST_REQUEST}", BalancerSettings(simple=Balance.LEAST_REQUEST)),
    ("{simple: ROUND_ROBIN}", BalancerSettings(simple=Balance.ROUND_ROBIN)),
    ("{simple: PASSTHROUGH}", BalancerSettings(simple=Balance.PASSTHROUGH)),
    ("{consistentHash: {httpHeaderName: X-User}}", BalancerSettings(hash=ConsistentHash(HashHeader("x-user")))),
    ("{consistentHash: {httpQueryParameterName: q, minimumRingSize: 7}}", BalancerSettings(hash=ConsistentHash(HashQuery("q"), 7))),
    ("{consistentHash: {useSourceIp: true, ringHash: {minimumRingSize: 9}}}", BalancerSettings(hash=ConsistentHash(HashSource(), 9))),
    ("{consistentHash: {useSourceIp: true, maglev: {tableSize: 65537}}}",
     BalancerSettings(hash=ConsistentHash(HashSource(), table_size=65537))),
    ("{consistentHash: {httpCookie: {name: c}}}", BalancerSettings(hash=ConsistentHash(HashCookie("c")))),
    ("{consistentHash: {httpCookie: {name: c, ttl: 0s}}}", BalancerSettings(hash=ConsistentHash(HashCookie("c", ttl=0.0)))),
    ("{consistentHash: {httpCookie: {name: c, path: /p, ttl: 1h, attributes: [{name: SameSite, value: Strict}, {name: Secure}]}}}",
     BalancerSettings(hash=ConsistentHash(HashCookie("c", "/p", 3600.0, (("SameSite", "Strict"), ("Secure", "")))))),
    ("{warmupDurationSecs: 30s}", BalancerSettings(warmup=Warmup(30.0))),
    ("{warmup: {duration: 1m, minimumPercent: 5, aggression: 1.5}}", BalancerSettings(warmup=Warmup(60.0, 5.0, 1.5))),
    ("{warmupDurationSecs: 30s, warmup: {duration: 1m}}", BalancerSettings(warmup=Warmup(60.0))),
    ("{localityLbSetting: {enabled: false}}", BalancerSettings(locality=LocalitySettings(enabled=False))),
    ("{localityLbSetting: {distribute: [{from: r1/z1/*, to: {r1/z1/*: 80, r1/z2/*: 20}}, {from: r2, to: {r2: 100}}]}}",
     BalancerSettings(locality=LocalitySettings(distribute=(Distribute("r1/z1/*", {"r1/z1/*": 80, "r1/z2/*": 20}),
                                                            Distribute("r2", {"r2": 100}))))),
    ("{localityLbSetting: {failover: [{from: r1, to: r2}]}}", BalancerSettings(locality=LocalitySettings(failover=(("r1", "r2"),)))),
    ("{localityLbSetting: {failoverPriority: [rack, version=v1]}}",
     BalancerSettings(locality=LocalitySettings(priority=("rack", "version=v1")))),
    ("{zoneAwareLbSetting: {enabled: true, minClusterSize: 3, failover: [{from: a, to: b}]}}", BalancerSettings(zone_aware=True)),
])  # fmt: skip
def test_load_balancing_is_read(text: str, expected: BalancerSettings) -> None:
    assert policy_of(f"{{loadBalancer: {text}}}").blocks.balancer == expected


@pytest.mark.parametrize(("text", "expected"), [
    ("{tcp: {}}", PoolSettings()),
    ("{tcp: {maxConnections: 0}, http: {http1MaxPendingRequests: 0}}", PoolSettings()),
    ("{tcp: {maxConnections: 1, connectTimeout: 30ms, maxConnectionDuration: 1h, idleTimeout: 0s, "
     "tcpKeepalive: {probes: 3, time: 2h, interval: 75s}}}",
     PoolSettings(max_connections=1, connect_timeout=0.03, max_connection_duration=3600.0, tcp_idle_timeout=0.0,
                  keepalive=Keepalive(3, 7200.0, 75.0))),
    ("{http: {http1MaxPendingRequests: 1, http2MaxRequests: 2, maxRequestsPerConnection: 3, maxRetries: 4, idleTimeout: 5s, "
     "h2UpgradePolicy: UPGRADE, maxConcurrentStreams: 6, http2KeepAlive: {interval: 7s, timeout: 8s}}}",
     PoolSettings(max_pending=1, max_requests=2, max_requests_per_connection=3, max_retries=4, http_idle_timeout=5.0,
                  h2_upgrade=H2Upgrade.UPGRADE, max_concurrent_streams=6, h2_keepalive=(7.0, 8.0))),
    ("{http: {h2UpgradePolicy: DO_NOT_UPGRADE}}", PoolSettings(h2_upgrade=H2Upgrade.NO)),
    ("{http: {h2UpgradePolicy: DO_NOT_UPGRADE, useClientProtocol: true}}", PoolSettings(h2_upgrade=H2Upgrade.CLIENT)),
])  # fmt: skip
def test_connection_pools_are_read(text: str, expected: PoolSettings) -> None:
    assert policy_of(f"{{connectionPool: {text}}}").blocks.pool == expected


@pytest.mark.parametrize(("text", "expected"), [
    ("{}", OutlierSettings(OutlierDetection())),
    ("{consecutive5xxErrors: 0, consecutiveGatewayErrors: 3}",
     OutlierSettings(OutlierDetection(consecutive_5xx=0, consecutive_gateway_errors=3))),
    ("{splitExternalLocalOriginErrors: true, consecutiveLocalOriginFailures: 2, interval: 1s, baseEjectionTime: 2m, "
     "maxEjectionPercent: 100, minHealthPercent: 50, outlierDetectionHttpErrorCodes: [500, 429, 500]}",
     OutlierSettings(OutlierDetection(split_local_origin=True, consecutive_local_origin_failures=2, interval=1.0, base_ejection_time=120.0,
                                      max_ejection_percent=100, min_health_percent=50, error_statuses=(500, 429)))),
    ("{maxEjectionPercent: 0}", OutlierSettings(OutlierDetection())),
    ("{consecutiveErrors: 7}", OutlierSettings(OutlierDetection(), legacy=True)),
])  # fmt: skip
def test_outlier_detection_is_read(text: str, expected: OutlierSettings) -> None:
    assert policy_of(f"{{outlierDetection: {text}}}").blocks.outlier == expected


@pytest.mark.parametrize(("text", "expected"), [
    ("{}", TlsSettings("DISABLE")),
    ("{mode: SIMPLE, sni: a.b, subjectAltNames: [a.b, 'spiffe://x'], caCertificates: system}",
     TlsSettings("SIMPLE", ca_certificates="system", sni="a.b", subject_alt_names=("a.b", "spiffe://x"))),
    ("{mode: SIMPLE, insecureSkipVerify: true}", TlsSettings("SIMPLE", skip_verify=True)),
    ("{mode: MUTUAL, clientCertificate: /c, privateKey: /k, caCertificates: /ca, caCrl: /crl}",
     TlsSettings("MUTUAL", "/c", "/k", "/ca", "/crl")),
    ("{mode: MUTUAL, credentialName: s, insecureSkipVerify: true}", TlsSettings("MUTUAL", credential_name="s", skip_verify=True)),
    ("{mode: ISTIO_MUTUAL}", TlsSettings("ISTIO_MUTUAL")),
])  # fmt: skip
def test_tls_is_read(text: str, expected: TlsSettings) -> None:
    assert policy_of(f"{{tls: {text}}}").blocks.tls == expected


def test_ports_tunnel_and_budget_are_read() -> None:
    policy = policy_of("""
{portLevelSettings: [{port: {number: 80}, loadBalancer: {simple: RANDOM}}, {port: {number: 80}, tls: {mode: SIMPLE}}],
 tunnel: {targetHost: a.b, targetPort: 443}, retryBudget: {percent: 25.5, minRetryConcurrency: 5, budgetInterval: 10s}}
""")
    first = Blocks(balancer=BalancerSettings(simple=Balance.RANDOM))
    assert policy.ports == ((80, first), (80, Blocks(tls=TlsSettings("SIMPLE"))))
    assert policy.blocks_of(80) == first
    assert policy.blocks_of(81) is None
    assert policy.tunnel == TunnelSettings("CONNECT", "a.b", 443)
    assert policy.retry_budget == RetryBudget(25.5, 5, 10.0)
    assert policy_of("{retryBudget: {}}").retry_budget == RetryBudget()


@pytest.mark.parametrize(("spec", "mistake"), [
    ("{}", "spec: 'host' is required"),
    ("{host: ''}", "spec.host: expected a hostname"),
    ("{host: a.*.b}", "spec.host: expected a hostname"),
    ("{host: web, hosts: [x]}", "spec.hosts: unknown field"),
    ("{host: web, exportTo: ['~']}", "spec.exportTo[0]: expected '.', '*' or the name"),
    ("{host: web, exportTo: ['*', a]}", "spec.exportTo[0]: '*' is everywhere"),
    ("{host: web, exportTo: [., shop]}", "spec.exportTo[1]: 'shop' is given twice"),
    ("{host: web, workloadSelector: {matchLabels: {a: b}}, exportTo: [other]}", "spec.exportTo[0]: a rule with a workloadSelector"),
    ("{host: web, subsets: [{labels: {a: b}}]}", "spec.subsets[0]: 'name' is required"),
    ("{host: web, subsets: [{name: V1}]}", "spec.subsets[0].name: expected a DNS label"),
    ("{host: web, subsets: [{name: v1}, {name: v1}]}", "spec.subsets[1].name: the subset 'v1' is given twice"),
    ("{host: web, trafficPolicy: {}}", "spec.trafficPolicy: 'loadBalancer' or"),
    ("{host: web, subsets: [{name: a, trafficPolicy: {}}]}", "spec.subsets[0].trafficPolicy: 'loadBalancer' or"),
])  # fmt: skip
def test_what_istio_refuses_of_a_rule_is_refused(spec: str, mistake: str) -> None:
    assert any(found.startswith(mistake) for found in read(spec)[1]), read(spec)[1]


@pytest.mark.parametrize(("policy", "mistake"), [
    ("{tunnel: {targetHost: a.b, targetPort: 1}, proxyProtocol: {}}", "tunnel: tunnel and proxyProtocol exclude each other"),
    ("{tunnel: {targetPort: 1}}", "tunnel: 'targetHost' is required"),
    ("{tunnel: {targetHost: 'a b', targetPort: 1}}", "tunnel.targetHost: expected a hostname or an IP address"),
    ("{tunnel: {targetHost: a.b, targetPort: 70000}}", "tunnel.targetPort: expected a number from 1 to 65535"),
    ("{tunnel: {protocol: GET, targetHost: a.b, targetPort: 1}}", "tunnel.protocol: expected one of CONNECT, POST"),
    ("{proxyProtocol: {version: V3}}", "proxyProtocol.version: expected one of V1, V2"),
    ("{portLevelSettings: [{loadBalancer: {}}]}", "portLevelSettings[0]: 'port' is required"),
    ("{portLevelSettings: [{port: {number: 80}}]}", "portLevelSettings[0]: 'loadBalancer' or"),
    ("{portLevelSettings: [{port: {number: 0}, tls: {}}]}", "portLevelSettings[0].port.number: expected a number from 1"),
    ("{portLevelSettings: [{port: {number: 80}, proxyProtocol: {}}]}", "portLevelSettings[0].proxyProtocol: unknown field"),
    ("{retryBudget: {percent: 101}}", "retryBudget.percent: expected a number from 0 to 100"),
    ("{loadBalancer: {simple: FASTEST}}", "loadBalancer.simple: expected one of"),
    ("{loadBalancer: {simple: RANDOM, consistentHash: {useSourceIp: true}}}", "loadBalancer.consistentHash: simple and consistentHash"),
    ("{loadBalancer: {localityLbSetting: {}, zoneAwareLbSetting: {}}}", "loadBalancer.zoneAwareLbSetting: localityLbSetting and"),
    ("{loadBalancer: {consistentHash: {}}}", "loadBalancer.consistentHash.httpHeaderName: a consistent hash needs exactly one key"),
    ("{loadBalancer: {consistentHash: {useSourceIp: false}}}", "loadBalancer.consistentHash.useSourceIp: expected true"),
    ("{loadBalancer: {consistentHash: {httpHeaderName: a, useSourceIp: true}}}",
     "loadBalancer.consistentHash.useSourceIp: a consistent hash needs exactly one key"),
    ("{loadBalancer: {consistentHash: {httpCookie: {}}}}", "loadBalancer.consistentHash.httpCookie: 'name' is required"),
    ("{loadBalancer: {consistentHash: {httpCookie: {name: c, ttl: soon}}}}", "loadBalancer.consistentHash.httpCookie.ttl: expected a dur"),
    ("{loadBalancer: {consistentHash: {httpCookie: {name: c, attributes: [{name: a}, {name: a}]}}}}",
     "loadBalancer.consistentHash.httpCookie.attributes[1].name: the attribute 'a' is given twice"),
    ("{loadBalancer: {consistentHash: {useSourceIp: true, ringHash: {}, maglev: {tableSize: 7}}}}",
     "loadBalancer.consistentHash.maglev: ringHash and maglev exclude each other"),
    ("{loadBalancer: {consistentHash: {useSourceIp: true, ringHash: {}, minimumRingSize: 1}}}",
     "loadBalancer.consistentHash.minimumRingSize: is the older way"),
    ('{loadBalancer: {consistentHash: {httpCookie: {name: "a b"}}}}',
     "loadBalancer.consistentHash.httpCookie.name: 'a b' is no name of a cookie"),
    ('{loadBalancer: {consistentHash: {httpCookie: {name: a, path: "/;x"}}}}',
     "loadBalancer.consistentHash.httpCookie.path: a ';' would end it"),
    ('{loadBalancer: {consistentHash: {httpCookie: {name: a, attributes: [{name: "b\\r", value: c}]}}}}',
     "loadBalancer.consistentHash.httpCookie.attributes[0].name: has a character that no header can carry"),
    ('{loadBalancer: {consistentHash: {httpCookie: {name: a, attributes: [{name: b, value: "c\\n"}]}}}}',
     "loadBalancer.consistentHash.httpCookie.attributes[0].value: has a character that no header can carry"),
    ("{loadBalancer: {consistentHash: {useSourceIp: true, maglev: {}}}}", "loadBalancer.consistentHash.maglev: 'tableSize' is required"),
    ("{loadBalancer: {consistentHash: {useSourceIp: true, maglev: {tableSize: 65536}}}}",
     "loadBalancer.consistentHash.maglev.tableSize: expected a prime number"),
    ("{loadBalancer: {consistentHash: {useSourceIp: true, maglev: {tableSize: 5000011}}}}",
     "loadBalancer.consistentHash.maglev.tableSize: expected a number from 2 to 5000010"),
    ("{loadBalancer: {localityLbSetting: {distribute: [{from: a, to: {a: 100}}], failover: [{from: a, to: b}]}}}",
     "loadBalancer.localityLbSetting.failover: distribute and failover exclude"),
    ("{loadBalancer: {localityLbSetting: {distribute: [{from: a, to: {a: 99}}]}}}",
     "loadBalancer.localityLbSetting.distribute[0].to: the percentages must have the sum 100"),
    ("{loadBalancer: {localityLbSetting: {distribute: [{from: a, to: {a: 0, b: 100}}]}}}",
     "loadBalancer.localityLbSetting.distribute[0].to.a: expected a number from 1 to 100"),
    ("{loadBalancer: {localityLbSetting: {distribute: [{from: a/*/b, to: {a: 100}}]}}}",
     "loadBalancer.localityLbSetting.distribute[0].from: expected region"),
    ("{loadBalancer: {localityLbSetting: {distribute: [{from: a, to: {a//b: 100}}]}}}",
     'loadBalancer.localityLbSetting.distribute[0].to["a//b"]: expected region'),
    ("{loadBalancer: {localityLbSetting: {distribute: [{from: a/*, to: {a: 100}}, {from: a/b, to: {a: 100}}]}}}",
     "loadBalancer.localityLbSetting.distribute[1].from: 'a/b' overlaps with 'a/*'"),
    ("{loadBalancer: {localityLbSetting: {failover: [{from: a, to: a}]}}}",
     "loadBalancer.localityLbSetting.failover[0].to: must be another region"),
    ("{loadBalancer: {localityLbSetting: {failover: [{from: a/b, to: c}]}}}",
     "loadBalancer.localityLbSetting.failover[0].from: expected the name of a region"),
    ("{loadBalancer: {localityLbSetting: {failover: [{from: a, to: b}], failoverPriority: [topology.kubernetes.io/zone]}}}",
     "loadBalancer.localityLbSetting.failoverPriority[0]: 'topology.kubernetes.io/zone' can't stand beside"),
    ("{loadBalancer: {zoneAwareLbSetting: {failoverPriority: [topology.kubernetes.io/region]}}}",
     "loadBalancer.zoneAwareLbSetting.failoverPriority[0]: 'topology.kubernetes.io/region' can't stand here"),
    ("{loadBalancer: {warmup: {}}}", "loadBalancer.warmup: 'duration' is required"),
    ("{loadBalancer: {warmup: {duration: 1s, minimumPercent: 101}}}", "loadBalancer.warmup.minimumPercent: expected a number"),
    ("{loadBalancer: {warmup: {duration: 1s, aggression: 0}}}", "loadBalancer.warmup.aggression: expected a number greater than 0"),
    ("{connectionPool: {}}", "connectionPool: 'tcp' or 'http' is required"),
    ("{connectionPool: {tcp: {maxConnections: -1}}}", "connectionPool.tcp.maxConnections: expected a number"),
    ("{connectionPool: {tcp: {connectTimeout: 0s}}}", "connectionPool.tcp.connectTimeout: expected a duration of at least 1ms"),
    ("{connectionPool: {tcp: {connectTimeout: 1500us}}}", "connectionPool.tcp.connectTimeout: durations are precise"),
    ("{connectionPool: {tcp: {connectTimeout: 5}}}", "connectionPool.tcp.connectTimeout: expected a duration such as"),
    ("{connectionPool: {http: {idleTimeout: 0s}}}", "connectionPool.http.idleTimeout: expected a duration of at least"),
    ("{connectionPool: {http: {h2UpgradePolicy: UPGRADE, useClientProtocol: true}}}", "connectionPool.http.useClientProtocol: useClient"),
    ("{connectionPool: {http: {http2KeepAlive: {interval: 1s}}}}", "connectionPool.http.http2KeepAlive: 'timeout' is required"),
    ("{outlierDetection: {consecutiveLocalOriginFailures: 1}}", "outlierDetection.consecutiveLocalOriginFailures: needs split"),
    ("{outlierDetection: {maxEjectionPercent: 101}}", "outlierDetection.maxEjectionPercent: expected a number from 0 to 100"),
    ("{outlierDetection: {minHealthPercent: -1}}", "outlierDetection.minHealthPercent: expected a number from 0 to 100"),
    ("{outlierDetection: {interval: -1s}}", "outlierDetection.interval: expected a duration"),
    ("{outlierDetection: {outlierDetectionHttpErrorCodes: [42]}}", "outlierDetection.outlierDetectionHttpErrorCodes[0]: expected a number"),
    ("{tls: {mode: TLS}}", "tls.mode: expected one of"),
    ("{tls: {mode: MUTUAL}}", "tls.mode: mode MUTUAL needs a certificate"),
    ("{tls: {mode: MUTUAL, clientCertificate: /c}}", "tls.mode: mode MUTUAL needs a certificate"),
    ("{tls: {mode: SIMPLE, credentialName: s, caCertificates: /c}}", "tls.credentialName: credentialName excludes"),
    ("{tls: {mode: SIMPLE, credentialName: s, insecureSkipVerify: true}}", "tls.insecureSkipVerify: nothing is verified"),
    ("{tls: {mode: SIMPLE, subjectAltNames: [a], insecureSkipVerify: true}}", "tls.insecureSkipVerify: nothing is verified"),
])  # fmt: skip
def test_what_istio_refuses_of_a_traffic_policy_is_refused(policy: str, mistake: str) -> None:
    for path, spec in (
        ("spec.trafficPolicy", f"{{host: web, trafficPolicy: {policy}}}"),
        ("spec.subsets[0].trafficPolicy", f"{{host: web, subsets: [{{name: a, trafficPolicy: {policy}}}]}}"),
    ):
        assert any(found.startswith(f"{path}.{mistake}") for found in read(spec)[1]), read(spec)[1]


def test_a_hostile_rule_is_read_in_no_time() -> None:
    """Comparing every item with every other would take an hour."""
    many = ", ".join(f"r{i}: 1" for i in range(2000))
    subsets = ", ".join(f"{{name: s{i}}}" for i in range(20000))
    locality = f"{{distribute: [{{from: a, to: {{{many}}}}}]}}"
    rule, problems = read(f"{{host: web, subsets: [{subsets}], trafficPolicy: {{loadBalancer: {{localityLbSetting: {locality}}}}}}}")
    assert len(rule.subsets) == 20000
    assert any("of at most 4096" in problem for problem in problems)

"""What a waypoint is told of destinations: which rule decides, what goes before what, TLS that breaks rather than opens, and what is told
of fields without effect."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from functools import cache

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from istiod_py.translate.config import Condition, Config
from istiod_py.translate.l7.acceptance import Targets
from istiod_py.translate.l7.attachment import WaypointRef
from istiod_py.translate.l7.destination_configs import Destined, Endpoint
from istiod_py.translate.l7.known import know
from istiod_py.translate.l7.rules import L7Facts, RuleReads, WaypointRules, read_rules
from istiod_py.translate.memo import Memo
from mesh.kube.objects import ObjectKey
from mesh.model.l7.destination import (
    Balance,
    ConnectionPool,
    DestinationConfig,
    Distribute,
    H2Upgrade,
    Keepalive,
    LoadBalancer,
    Locality,
    OutlierDetection,
    RetryBudget,
    TlsMode,
    TrafficPolicy,
    UpstreamTls,
    Warmup,
)
from mesh.model.l7.waypoint import AccessLogging, PathNormalization, WaypointSettings
from mesh.model.service import LoadBalancing, LoadBalancingMode, LoadBalancingScope
from mesh.model.workload import Locality as Place
from mesh.model.workload import Workload
from mesh.testing.objects import objects_from_yaml

NAMESPACES = ("shop", "web", "other")
HOST = "web.shop.svc.cluster.local"
KEY = f"shop/{HOST}"
DESTINED = {KEY: Destined("Service", "shop", "web", HOST, {80: "http", 443: "https"})}
AT_HOME = WaypointRef("shop", "waypoint")
FAILOVER = LoadBalancing((LoadBalancingScope.NETWORK, LoadBalancingScope.REGION, LoadBalancingScope.ZONE), LoadBalancingMode.FAILOVER)


def rule(name: str, spec: str, namespace: str = "shop", created: str = "") -> str:
    time = f", creationTimestamp: '{created}'" if created else ""
    return (
        f"---\napiVersion: networking.istio.io/v1\nkind: DestinationRule\n"
        f"metadata: {{name: {name}, namespace: {namespace}{time}}}\nspec: {spec}\n"
    )


def mesh_config(text: str) -> str:
    return f"---\napiVersion: v1\nkind: ConfigMap\nmetadata: {{name: istio, namespace: istio-system}}\ndata: {{mesh: '{text}'}}\n"


def read(text: str, before: RuleReads | None = None) -> RuleReads:
    objects, _ = objects_from_yaml(text, NAMESPACES)
    return read_rules(lambda kind: [obj for obj in objects if obj.kind == kind], before or RuleReads(), Config())


def rules_of(
    text: str,
    before: RuleReads | None = None,
    distribution: Mapping[str, LoadBalancing] | None = None,
    endpoints: tuple[Endpoint, ...] = (),
) -> WaypointRules:
    facts = L7Facts(know([]), DESTINED, distribution or {}, lambda key, namespace: endpoints)
    return WaypointRules(read(text, before), {}, facts, Config(), Memo())


def config_of(text: str, waypoint: WaypointRef = AT_HOME, **more: Mapping[str, LoadBalancing]) -> DestinationConfig:
    return rules_of(text, **more).destination_config(KEY, waypoint)


BALANCED = "trafficPolicy: {loadBalancer: {simple: %s}}"


def balance_of(config: DestinationConfig) -> Balance:
    return config.policy.load_balancer.simple


def test_without_rules_a_destination_has_the_defaults() -> None:
    assert config_of("") == DestinationConfig("shop", HOST)
    assert rules_of("").destination_config("x/unknown.example.com", AT_HOME) == DestinationConfig("x", "unknown.example.com")


ROUND, RANDOM = Balance.ROUND_ROBIN, Balance.RANDOM


@pytest.mark.parametrize(("rules", "viewpoint", "chosen"), [
    # The three places, in order.
    (rule("a", f"{{host: web, {BALANCED % 'RANDOM'}}}"), "shop", RANDOM),
    (rule("a", f"{{host: web, {BALANCED % 'RANDOM'}}}"), "other", RANDOM),
    (rule("a", f"{{host: {HOST}, {BALANCED % 'RANDOM'}}}", "other"), "shop", None),
    (rule("a", f"{{host: {HOST}, {BALANCED % 'RANDOM'}}}", "other"), "other", RANDOM),
    (rule("a", f"{{host: {HOST}, {BALANCED % 'RANDOM'}}}", "other") + rule("b", f"{{host: web, {BALANCED % 'ROUND_ROBIN'}}}"),
     "other", RANDOM),
    (rule("a", f"{{host: {HOST}, {BALANCED % 'RANDOM'}}}", "istio-system"), "shop", RANDOM),
    (rule("a", f"{{host: {HOST}, {BALANCED % 'RANDOM'}}}", "istio-system") + rule("b", f"{{host: web, {BALANCED % 'ROUND_ROBIN'}}}"),
     "shop", ROUND),
    # A waypoint in the root namespace does not prefer what that exports to everybody.
    (rule("a", f"{{host: {HOST}, {BALANCED % 'RANDOM'}}}", "istio-system") + rule("b", f"{{host: web, {BALANCED % 'ROUND_ROBIN'}}}"),
     "istio-system", ROUND),
    (rule("a", f"{{host: {HOST}, exportTo: [.], {BALANCED % 'RANDOM'}}}", "istio-system") +
     rule("b", f"{{host: web, {BALANCED % 'ROUND_ROBIN'}}}"), "istio-system", RANDOM),
    # exportTo.
    (rule("a", f"{{host: web, exportTo: [.], {BALANCED % 'RANDOM'}}}"), "other", None),
    (rule("a", f"{{host: web, exportTo: [shop], {BALANCED % 'RANDOM'}}}"), "shop", RANDOM),
    (rule("a", f"{{host: web, exportTo: [web, other], {BALANCED % 'RANDOM'}}}"), "other", RANDOM),
    (rule("a", f"{{host: web, exportTo: [web], {BALANCED % 'RANDOM'}}}"), "other", None),
    (rule("a", f"{{host: web, exportTo: [web], {BALANCED % 'RANDOM'}}}"), "shop", None),
    (rule("a", f"{{host: web, exportTo: [web], {BALANCED % 'RANDOM'}}}") + rule("b", f"{{host: '*', {BALANCED % 'ROUND_ROBIN'}}}"),
     "other", None),
    (mesh_config("defaultDestinationRuleExportTo: [.]") + rule("a", f"{{host: web, {BALANCED % 'RANDOM'}}}"), "other", None),
    (mesh_config("defaultDestinationRuleExportTo: [.]") + rule("a", f"{{host: web, {BALANCED % 'RANDOM'}}}"), "shop", RANDOM),
    # The most specific host.
    (rule("a", f"{{host: '*', {BALANCED % 'ROUND_ROBIN'}}}") + rule("b", f"{{host: '*.shop.svc.cluster.local', {BALANCED % 'RANDOM'}}}"),
     "shop", RANDOM),
    (rule("a", f"{{host: '*.shop.svc.cluster.local', {BALANCED % 'ROUND_ROBIN'}}}") + rule("b", f"{{host: web, {BALANCED % 'RANDOM'}}}"),
     "shop", RANDOM),
    (rule("a", f"{{host: '*.local', {BALANCED % 'RANDOM'}}}"), "shop", RANDOM),
    (rule("a", f"{{host: '*.example.com', {BALANCED % 'RANDOM'}}}"), "shop", None),
    (rule("a", f"{{host: WEB.shop.svc.cluster.local., {BALANCED % 'RANDOM'}}}"), "shop", RANDOM),
    (rule("a", f"{{host: web, {BALANCED % 'RANDOM'}}}", "other"), "other", None),
    # Rules for proxies beside workloads.
    (rule("a", f"{{host: web, workloadSelector: {{matchLabels: {{a: b}}}}, {BALANCED % 'RANDOM'}}}"), "shop", None),
])  # fmt: skip
def test_the_rule_that_decides_is_the_one_that_istio_chooses(rules: str, viewpoint: str, chosen: Balance | None) -> None:
    assert balance_of(config_of(rules, WaypointRef(viewpoint, "w"))) is (chosen or Balance.LEAST_REQUEST)


def test_of_rules_for_one_host_the_oldest_decides_and_the_others_add_subsets() -> None:
    old = rule("z", f"{{host: web, subsets: [{{name: a, labels: {{v: old}}}}], {BALANCED % 'RANDOM'}}}", created="2026-01-01T00:00:00Z")
    young = rule(
        "a",
        f"{{host: web, subsets: [{{name: a, labels: {{v: new}}}}, {{name: b, labels: {{v: b}}}}], {BALANCED % 'ROUND_ROBIN'}}}",
        created="2026-02-01T00:00:00Z",
    )
    for text in (old + young, young + old):
        config = config_of(text)
        assert balance_of(config) is RANDOM
        assert [(subset.name, subset.labels) for subset in config.subsets] == [("a", {"v": "old"}), ("b", {"v": "b"})]
        assert config.origin == "DestinationRule shop/z, DestinationRule shop/a"


def test_a_rule_without_a_policy_leaves_it_to_the_next() -> None:
    assert (
        balance_of(config_of(rule("a", "{host: web, subsets: [{name: a}]}") + rule("b", f"{{host: web, {BALANCED % 'RANDOM'}}}"))) is RANDOM
    )


def test_a_rule_is_merged_with_those_that_are_exported_as_widely_or_wider() -> None:
    narrow = rule("a", "{host: web, exportTo: [other], subsets: [{name: a}]}")
    wide = rule("b", "{host: web, exportTo: [other, web], subsets: [{name: b}]}")
    both = narrow + wide
    assert [subset.name for subset in config_of(both, WaypointRef("other", "w")).subsets] == ["a", "b"]
    assert [subset.name for subset in config_of(both, WaypointRef("web", "w")).subsets] == ["b"]
    disjoint = rule("a", "{host: web, exportTo: ['*'], subsets: [{name: a}]}") + narrow.replace("name: a,", "name: c,", 1)
    assert [subset.name for subset in config_of(disjoint, WaypointRef("other", "w")).subsets] == ["a"]


# What goes before what

FOUR = """{host: web,
 trafficPolicy: {loadBalancer: {simple: RANDOM}, connectionPool: {tcp: {maxConnections: 1}}, outlierDetection: {interval: 1s},
   tls: {mode: SIMPLE, sni: rule}, proxyProtocol: {version: V1}, retryBudget: {percent: 10},
   portLevelSettings: [{port: {number: 80}, loadBalancer: {simple: ROUND_ROBIN}}]},
 subsets: [{name: plain},
   {name: own, labels: {v: a}, trafficPolicy: {connectionPool: {tcp: {maxConnections: 2}}, proxyProtocol: {version: V2},
     portLevelSettings: [{port: {number: 443}, tls: {mode: SIMPLE, sni: subset}}]}}]}"""


def test_a_block_comes_whole_from_the_first_place_that_has_it() -> None:
    config = config_of(rule("a", FOUR))
    budget = RetryBudget(10.0)
    whole = TrafficPolicy(
        LoadBalancer(RANDOM), ConnectionPool(max_connections=1), OutlierDetection(interval=1.0), UpstreamTls(TlsMode.SIMPLE, "rule"),
        budget, 1,
    )  # fmt: skip
    of_port = TrafficPolicy(LoadBalancer(ROUND), retry_budget=budget, proxy_protocol=1)
    assert config.policy == whole
    assert config.ports == {80: of_port}
    plain, own = config.subsets
    assert (plain.policy, plain.ports) == (whole, {80: of_port})
    assert own.policy == TrafficPolicy(
        LoadBalancer(RANDOM), ConnectionPool(max_connections=2), OutlierDetection(interval=1.0), UpstreamTls(TlsMode.SIMPLE, "rule"),
        budget, 2,
    )  # fmt: skip
    assert own.ports == {
        80: TrafficPolicy(LoadBalancer(ROUND), ConnectionPool(max_connections=2), retry_budget=budget, proxy_protocol=2),
        443: TrafficPolicy(tls=UpstreamTls(TlsMode.SIMPLE, "subset"), retry_budget=budget, proxy_protocol=2),
    }


MESH = mesh_config(
    "{connectTimeout: 3s, tcpKeepalive: {probes: 9, time: 1s}, h2UpgradePolicy: UPGRADE, "
    "defaultTrafficPolicy: {connectionPool: {tcp: {maxConnections: 5}}, outlierDetection: {interval: 5s}}, "
    "localityLbSetting: {distribute: [{from: a, to: {b: 100}}]}}"
)


def test_the_mesh_fills_what_no_rule_says() -> None:
    config = config_of(MESH)
    assert config.policy.pool == ConnectionPool(5, 3.0, Keepalive(9, 1.0), h2_upgrade=H2Upgrade.UPGRADE)
    assert config.policy.outlier == OutlierDetection(interval=5.0)
    assert config.policy.load_balancer.locality == Locality(distribute=(Distribute("a", {"b": 100}),))
    own = config_of(
        MESH
        + rule(
            "a",
            """{host: web, trafficPolicy: {outlierDetection: {}, loadBalancer: {localityLbSetting: {enabled: false}},
        connectionPool: {tcp: {connectTimeout: 1s, tcpKeepalive: {probes: 2}}, http: {h2UpgradePolicy: DO_NOT_UPGRADE}}}}""",
        )
    )
    assert own.policy.pool == ConnectionPool(connect_timeout=1.0, keepalive=Keepalive(2, 1.0))
    assert own.policy.outlier == OutlierDetection()
    assert own.policy.load_balancer.locality == Locality(enabled=False)


def test_a_mesh_configuration_with_a_mistake_leaves_the_last_good_one() -> None:
    good = read(MESH)
    bad = read(mesh_config("connectTimeout: soon"), good)
    assert bad.mesh.config == good.mesh.config
    assert [problem.field for problem in bad.problems] == ["data.mesh: connectTimeout"]
    assert read(mesh_config("connectTimeout: 1s"), bad).mesh.config.connect_timeout == 1.0
    assert read("", bad).mesh.config.connect_timeout == 10.0


def test_what_holds_for_the_whole_mesh_is_in_a_waypoints_settings() -> None:
    text = mesh_config('{trustDomainAliases: [old], pathNormalization: {normalization: NONE}, accessLogFile: ""}')
    assert rules_of(text).settings_of(WaypointSettings("shop", "w", waypoint_for="all")) == WaypointSettings(
        "shop", "w", "all", ("cluster.local", "old"), PathNormalization.NONE, False, AccessLogging(enabled=False),
        rules_of("").mesh.tracing,
    )  # fmt: skip


@pytest.mark.parametrize(("spec", "distribution", "expected"), [
    ("", FAILOVER, Locality(
        priority=("topology.istio.io/network", "topology.kubernetes.io/region", "topology.kubernetes.io/zone"),
        without_outlier_detection=True)),
    ("{host: web, trafficPolicy: {loadBalancer: {localityLbSetting: {failoverPriority: [rack]}}}}", FAILOVER, Locality(priority=("rack",))),
    ("{host: web, trafficPolicy: {loadBalancer: {localityLbSetting: {failover: [{from: a, to: b}]}}}}", None,
     Locality(failover=(("a", "b"),))),
    ("{host: web, trafficPolicy: {loadBalancer: {localityLbSetting: {failover: [{from: a, to: b}], failoverPriority: [rack]}}}}", None,
     Locality(failover=(("a", "b"),), priority=("rack",))),
    ("{host: web, trafficPolicy: {loadBalancer: {simple: RANDOM}}}", None, None),
    ("", LoadBalancing((LoadBalancingScope.NODE,), LoadBalancingMode.STRICT), None),
])  # fmt: skip
def test_locality_is_the_rules_else_the_services(spec: str, distribution: LoadBalancing | None, expected: Locality | None) -> None:
    given = {KEY: distribution} if distribution is not None else {}
    assert config_of(rule("a", spec) if spec else "", distribution=given).policy.load_balancer.locality == expected


@pytest.mark.parametrize(("spec", "expected"), [
    ("{simple: PASSTHROUGH}", LoadBalancer()),
    ("{warmup: {duration: 1s}}", LoadBalancer(warmup=Warmup(1.0))),
    ("{simple: RANDOM, warmup: {duration: 1s}}", LoadBalancer(RANDOM)),
])  # fmt: skip
def test_balancing_that_means_nothing_here_is_left_out(spec: str, expected: LoadBalancer) -> None:
    assert config_of(rule("a", f"{{host: web, trafficPolicy: {{loadBalancer: {spec}}}}}")).policy.load_balancer == expected


def test_a_service_that_is_reached_as_dialled_may_be() -> None:
    text = rule("a", f"{{host: web, {BALANCED % 'PASSTHROUGH'}}}")
    assert balance_of(config_of(text, distribution={KEY: LoadBalancing(mode=LoadBalancingMode.PASSTHROUGH)})) is Balance.PASSTHROUGH


def test_an_idle_timeout_of_tcp_is_that_of_http_too() -> None:
    pool = config_of(rule("a", "{host: web, trafficPolicy: {connectionPool: {tcp: {idleTimeout: 5s}}}}")).policy.pool
    assert (pool.tcp_idle_timeout, pool.http_idle_timeout) == (5.0, 5.0)


def test_endpoints_have_the_labels_that_somebody_looks_at() -> None:
    place = Place("r1", "z1", "")
    pod = Endpoint(Workload("uid", "pod", "shop", network="n", locality=place, node="n1"), {"version": "v1", "app": "web", "rack": "7"})
    text = rule(
        "a",
        """{host: web, subsets: [{name: a, labels: {version: v1}}], trafficPolicy: {loadBalancer: {localityLbSetting:
        {failoverPriority: [topology.kubernetes.io/region, rack=7, kubernetes.io/hostname, topology.istio.io/subzone]}}}}""",
    )
    assert rules_of(text, endpoints=(pod,)).destination_config(KEY, AT_HOME).labels == {
        "uid": {"version": "v1", "topology.kubernetes.io/region": "r1", "rack": "7", "kubernetes.io/hostname": "n1"}
    }
    assert rules_of("", endpoints=(pod,)).destination_config(KEY, AT_HOME).labels == {}


# TLS


@cache
def certificate(name: str = "ca") -> str:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    made = x509.CertificateBuilder().subject_name(subject).issuer_name(subject).public_key(key.public_key()).serial_number(1)
    made = made.not_valid_before(now).not_valid_after(now + timedelta(days=1))
    return made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()


def stored(kind: str, name: str, namespace: str = "shop", **data: str) -> str:
    key = "stringData" if kind == "Secret" else "data"
    lines = "".join(
        f"  {field.replace('_', '.')}: |\n" + "".join(f"    {line}\n" for line in text.splitlines()) for field, text in data.items()
    )
    return f"---\napiVersion: v1\nkind: {kind}\nmetadata: {{name: {name}, namespace: {namespace}}}\n{key}:\n{lines}"


def tls_of(tls: str, *objects: str, waypoint: WaypointRef = AT_HOME) -> UpstreamTls | None:
    return config_of(rule("a", f"{{host: web, trafficPolicy: {{tls: {tls}}}}}") + "".join(objects), waypoint).policy.tls


CLIENT = {"tls_crt": "CERT", "tls_key": "KEY"}


@pytest.mark.parametrize("mode", ["DISABLE", "ISTIO_MUTUAL"])
def test_how_the_mesh_carries_traffic_is_not_a_rules_to_say(mode: str) -> None:
    assert tls_of(f"{{mode: {mode}}}") is None


def test_tls_with_what_the_system_trusts_needs_no_secret() -> None:
    assert tls_of("{mode: SIMPLE, caCertificates: system, subjectAltNames: [a.b, 'spiffe://x/y']}") == UpstreamTls(
        TlsMode.SIMPLE, names=("a.b",), uris=("spiffe://x/y",)
    )
    assert tls_of("{mode: SIMPLE, insecureSkipVerify: true}") == UpstreamTls(TlsMode.SIMPLE, skip_verify=True)


def test_a_credential_is_a_secret_of_the_waypoints_namespace() -> None:
    ca = certificate()
    whole = stored("Secret", "s", ca_crt=ca, **CLIENT)
    mutual = UpstreamTls(TlsMode.MUTUAL, roots=ca, certificate="CERT\n", key="KEY\n")
    for name in ("s", "kubernetes://s", "kubernetes://shop/s"):
        assert tls_of(f"{{mode: MUTUAL, credentialName: '{name}'}}", whole) == mutual
    assert tls_of("{mode: SIMPLE, credentialName: s}", whole) == UpstreamTls(TlsMode.SIMPLE, roots=ca)
    split = stored("Secret", "s", cert="CERT", key="KEY") + stored("Secret", "s-cacert", cacert=ca)
    assert tls_of("{mode: MUTUAL, credentialName: s}", split) == mutual
    assert tls_of("{mode: SIMPLE, credentialName: s}", stored("Secret", "s-cacert", ca_crt=ca)) == UpstreamTls(TlsMode.SIMPLE, roots=ca)
    assert tls_of("{mode: SIMPLE, credentialName: 'configmap://s'}", stored("ConfigMap", "s", ca_crt=ca)) == UpstreamTls(
        TlsMode.SIMPLE, roots=ca
    )
    unverified = UpstreamTls(TlsMode.MUTUAL, certificate="CERT\n", key="KEY\n", skip_verify=True)
    assert tls_of("{mode: MUTUAL, credentialName: s, insecureSkipVerify: true}", stored("Secret", "s", **CLIENT)) == unverified


@pytest.mark.parametrize(("tls", "objects", "because"), [
    ("{mode: SIMPLE, credentialName: s}", "", "there is no Secret shop/s"),
    ("{mode: SIMPLE, credentialName: s}", stored("Secret", "s", "other", ca_crt="x"), "there is no Secret shop/s"),
    ("{mode: SIMPLE, credentialName: 'kubernetes://other/s'}", stored("Secret", "s", "other", ca_crt="x"), "is not in the waypoint's"),
    ("{mode: SIMPLE, credentialName: s}", stored("Secret", "s", ca_crt="no certificate"), "no certificates in PEM"),
    ("{mode: SIMPLE, credentialName: s}", stored("Secret", "s", **CLIENT), "has no ca.crt to verify by"),
    ("{mode: MUTUAL, credentialName: s}", stored("Secret", "s-cacert", ca_crt="x"), "there is no Secret shop/s"),
    ("{mode: MUTUAL, credentialName: s}", stored("Secret", "s", ca_crt="x"), "has no tls.crt and tls.key"),
    ("{mode: MUTUAL, credentialName: s}", stored("Secret", "s", ca_crl="x", **CLIENT), "has a revocation list"),
    ("{mode: MUTUAL, credentialName: 'configmap://s'}", stored("ConfigMap", "s", ca_crt="x"), "a ConfigMap has no certificate"),
    ("{mode: SIMPLE, credentialName: 'configmap://s'}", stored("ConfigMap", "s", other="x"), "has no ca.crt"),
    ("{mode: SIMPLE, caCertificates: /etc/ca}", "", "waypoints read no files, which caCertificates names"),
    ("{mode: SIMPLE, caCrl: /etc/crl}", "", "waypoints read no files, which caCrl names"),
    ("{mode: MUTUAL, clientCertificate: /c, privateKey: /k}", "", "waypoints read no files, which clientCertificate, privateKey names"),
])  # fmt: skip
def test_tls_that_lacks_something_lets_nothing_through(tls: str, objects: str, because: str) -> None:
    found = tls_of(tls, objects)
    assert found is not None
    assert because in found.broken
    assert (found.certificate, found.key) == ("", "")


MISTAKEN_TLS = "{host: web, trafficPolicy: {tls: {mode: SIMPLEE}}}"


@pytest.mark.parametrize("spec", [
    MISTAKEN_TLS,
    "{host: web, trafficPolicy: {connectionPool: {}, tls: {mode: SIMPLE}}}",
    "{host: web, trafficPolicy: {tls: {mode: SIMPLE}}, subset: []}",
    "{host: web, trafficPolicy: {portLevelSettings: [{port: {number: 443}, tls: {mode: SIMPL}}]}}",
])  # fmt: skip
def test_a_rule_with_mistakes_that_speaks_of_tls_lets_nothing_through_until_it_was_good_once(spec: str) -> None:
    config = config_of(rule("a", spec))
    assert config.policy.tls is not None
    assert config.policy.tls.broken.startswith("DestinationRule shop/a has a mistake: objects.yaml:5: spec.")
    good = rule("a", f"{{host: web, {BALANCED % 'RANDOM'}}}")
    after = rules_of(rule("a", spec), before=read(good)).destination_config(KEY, AT_HOME)
    assert after == config_of(good)


def test_a_subset_with_mistakes_that_speaks_of_tls_is_broken_alone() -> None:
    config = config_of(rule("a", "{host: web, subsets: [{name: a, trafficPolicy: {tls: {mode: SIMPLEE}}}, {name: b}]}"))
    assert config.policy == TrafficPolicy()
    assert [(subset.name, subset.policy.tls is not None) for subset in config.subsets] == [("a", True)]


def test_a_rule_with_mistakes_that_says_nothing_of_tls_counts_for_nothing() -> None:
    assert config_of(rule("a", "{host: web, trafficPolicy: {loadBalancer: {simple: FAST}}}")) == DestinationConfig("shop", HOST)


# BackendTLSPolicy


def backend(name: str, spec: str, created: str = "") -> str:
    time = f", creationTimestamp: '{created}'" if created else ""
    head = "---\napiVersion: gateway.networking.k8s.io/v1\nkind: BackendTLSPolicy\n"
    return f"{head}metadata: {{name: {name}, namespace: shop{time}}}\nspec: {{{spec}}}\n"


TO_WEB = "targetRefs: [{group: '', kind: Service, name: web%s}]"
SYSTEM = "validation: {hostname: %s, wellKnownCACertificates: System}"


def with_roots(*names: str, kind: str = "ConfigMap") -> str:
    refs = ", ".join(f"{{group: '', kind: {kind}, name: {name}}}" for name in names)
    return f"validation: {{hostname: a.b, caCertificateRefs: [{refs}]}}"


def test_a_backend_policy_says_whom_to_expect() -> None:
    ca, other = certificate(), certificate("other")
    config = config_of(backend("p", f"{TO_WEB % ''}, {SYSTEM % 'a.b'}"))
    assert config.policy.tls == UpstreamTls(TlsMode.SIMPLE, "a.b", ("a.b",))
    assert config.ports == {}
    maps = stored("ConfigMap", "one", ca_crt=ca) + stored("ConfigMap", "two", ca_crt=other)
    assert config_of(backend("p", f"{TO_WEB % ''}, {with_roots('one', 'two')}") + maps).policy.tls == UpstreamTls(
        TlsMode.SIMPLE, "a.b", ("a.b",), roots=ca + other
    )
    named = "validation: {hostname: a.b, wellKnownCACertificates: System, subjectAltNames: [{type: URI, uri: 'spiffe://x/y'}]}"
    assert config_of(backend("p", f"{TO_WEB % ''}, {named}")).policy.tls == UpstreamTls(TlsMode.SIMPLE, "a.b", uris=("spiffe://x/y",))


def test_a_section_goes_before_the_whole_service() -> None:
    whole, section = (
        backend("a", f"{TO_WEB % ''}, {SYSTEM % 'whole'}"),
        backend("b", f"{TO_WEB % ', sectionName: https'}, {SYSTEM % 'section'}"),
    )
    config = config_of(whole + section)
    assert config.policy.tls == UpstreamTls(TlsMode.SIMPLE, "whole", ("whole",))
    assert config.ports == {443: TrafficPolicy(tls=UpstreamTls(TlsMode.SIMPLE, "section", ("section",)))}
    assert config_of(section).policy.tls is None


def test_what_a_rule_says_of_tls_goes_before_a_backend_policy() -> None:
    policy = backend("a", f"{TO_WEB % ''}, {SYSTEM % 'policy'}")
    for mode, expected in (("SIMPLE, sni: rule", UpstreamTls(TlsMode.SIMPLE, "rule")), ("DISABLE", None)):
        assert config_of(policy + rule("a", f"{{host: web, trafficPolicy: {{tls: {{mode: {mode}}}}}}}")).policy.tls == expected
    other = config_of(policy + rule("a", f"{{host: web, {BALANCED % 'RANDOM'}}}"))
    assert (balance_of(other), other.policy.tls) == (RANDOM, UpstreamTls(TlsMode.SIMPLE, "policy", ("policy",)))


def test_the_oldest_backend_policy_counts_and_the_others_say_so() -> None:
    young = backend("a", f"{TO_WEB % ''}, {SYSTEM % 'young'}", "2026-02-01T00:00:00Z")
    old = backend("b", f"{TO_WEB % ''}, {SYSTEM % 'old'}", "2026-01-01T00:00:00Z")
    rules = rules_of(young + old)
    assert rules.destination_config(KEY, AT_HOME).policy.tls == UpstreamTls(TlsMode.SIMPLE, "old", ("old",))
    verdicts = {key.name: (waypoints, verdict.accepted) for key, (waypoints, verdict) in rules.backend_verdicts().items()}
    assert verdicts["b"] == ({"shop/waypoint"}, Condition("Accepted", True, "Accepted", ""))
    message = "an older policy is in force for Service web"
    assert verdicts["a"] == (frozenset(), Condition("Accepted", False, "Conflicted", message))


@pytest.mark.parametrize(("spec", "objects", "accepted", "resolved", "broken"), [
    (f"{TO_WEB % ''}, {with_roots('one')}", "", "NoValidCACertificate", "InvalidCACertificateRef", True),
    (f"{TO_WEB % ''}, {with_roots('one')}", stored("ConfigMap", "one", other="x"), "NoValidCACertificate", "InvalidCACertificateRef", True),
    (f"{TO_WEB % ''}, {with_roots('one')}", stored("ConfigMap", "one", ca_crt="x"), "NoValidCACertificate", "InvalidCACertificateRef",
     True),
    (f"{TO_WEB % ''}, {with_roots('one', kind='Secret')}", "", "NoValidCACertificate", "InvalidKind", True),
    (f"{TO_WEB % ''}, {with_roots('one', 'two')}", stored("ConfigMap", "two", ca_crt=certificate()), "Accepted", "InvalidCACertificateRef",
     False),
    (f"{TO_WEB % ''}, validation: {{hostname: a.b, wellKnownCACertificates: example.com/x}}", "", "Invalid", "ResolvedRefs", True),
    (f"{TO_WEB % ''}, {SYSTEM % 'a.b'}, options: 7", "", "Invalid", "ResolvedRefs", True),
    (f"{TO_WEB % ''}, {SYSTEM % '-'}", "", "Invalid", "ResolvedRefs", True),
])  # fmt: skip
def test_a_backend_policy_that_cannot_be_followed_lets_nothing_through(
    spec: str, objects: str, accepted: str, resolved: str, broken: bool
) -> None:
    rules = rules_of(backend("p", spec) + objects)
    tls = rules.destination_config(KEY, AT_HOME).policy.tls
    assert tls is not None
    assert bool(tls.broken) == broken
    ((_, verdict),) = rules.backend_verdicts().values()
    assert (verdict.accepted.reason, verdict.resolved.reason) == (accepted, resolved)
    assert (verdict.accepted.status, verdict.resolved.status) == (accepted == "Accepted", resolved == "ResolvedRefs")


# What is told

RULE = ObjectKey("DestinationRule", "shop", "a")


def told(spec: str, *, use: bool = True) -> tuple[Condition | None, list[str]]:
    """Condition, and fields of the problems."""
    rules = rules_of(rule("a", spec))
    if use:
        rules.destination_config(KEY, AT_HOME)
    targets = Targets("istio-system")
    return rules.conditions(targets).get(RULE), [problem.field for problem in rules.notices(targets)]


@pytest.mark.parametrize(("spec", "fields"), [
    (f"{{host: web, {BALANCED % 'PASSTHROUGH'}}}", ["spec.trafficPolicy.loadBalancer.simple"]),
    ("{host: web, trafficPolicy: {tls: {mode: DISABLE}}}", ["spec.trafficPolicy.tls.mode"]),
    ("{host: web, subsets: [{name: a, trafficPolicy: {tls: {mode: ISTIO_MUTUAL}}}]}", ["spec.subsets[0].trafficPolicy.tls.mode"]),
    ("{host: web, trafficPolicy: {tls: {mode: MUTUAL, clientCertificate: /a, privateKey: /b, caCertificates: /c}}}",
     [f"spec.trafficPolicy.tls.{field}" for field in ("clientCertificate", "privateKey", "caCertificates")]),
    ("{host: web, trafficPolicy: {tunnel: {targetHost: a.b, targetPort: 1}}}", ["spec.trafficPolicy.tunnel"]),
    ("{host: web, trafficPolicy: {loadBalancer: {zoneAwareLbSetting: {}}}}", ["spec.trafficPolicy.loadBalancer.zoneAwareLbSetting"]),
    ("{host: web, trafficPolicy: {loadBalancer: {simple: RANDOM, warmup: {duration: 1s}}}}", ["spec.trafficPolicy.loadBalancer.warmup"]),
    ("{host: web, trafficPolicy: {loadBalancer: {consistentHash: {useSourceIp: true, ringHash: {minimumRingSize: 8000000}}}}}",
     ["spec.trafficPolicy.loadBalancer.consistentHash"]),
    ("{host: web, trafficPolicy: {loadBalancer: {consistentHash: {useSourceIp: true, maglev: {tableSize: 4999999}}}}}",
     ["spec.trafficPolicy.loadBalancer.consistentHash"]),
    ("{host: web, trafficPolicy: {outlierDetection: {consecutiveErrors: 5}}}", ["spec.trafficPolicy.outlierDetection.consecutiveErrors"]),
    ("{host: web, trafficPolicy: {loadBalancer: {localityLbSetting: {failover: [{from: a, to: b}]}}}}",
     ["spec.trafficPolicy.loadBalancer.localityLbSetting.failover"]),
    ("{host: web, trafficPolicy: {portLevelSettings: [{port: {number: 80}, tls: {}}, {port: {number: 80}, loadBalancer: {}}]}}",
     ["spec.trafficPolicy.portLevelSettings[0].tls.mode", "spec.trafficPolicy.portLevelSettings[1].port.number"]),
])  # fmt: skip
def test_a_field_without_effect_is_told_in_the_status_and_as_a_problem(spec: str, fields: list[str]) -> None:
    condition, problems = told(spec)
    assert problems == fields
    assert condition is not None
    assert (condition.type, condition.status, condition.reason) == ("WaypointAccepted", True, "UnsupportedValue")
    assert condition.message.startswith("used by shop/waypoint; ")
    assert all(field in condition.message for field in fields)
    assert told(spec, use=False) == (None, [])


def test_a_rule_that_is_followed_says_by_whom() -> None:
    assert told(f"{{host: web, {BALANCED % 'RANDOM'}}}") == (Condition("WaypointAccepted", True, "Accepted", "used by shop/waypoint"), [])
    assert told(f"{{host: other, {BALANCED % 'RANDOM'}}}")[0] is None


def test_a_rule_for_a_host_that_no_service_has_is_a_problem_and_one_that_is_not_followed_yet_is_none() -> None:
    def problems(host: str) -> list[str]:
        found = rules_of(rule("a", f"{{host: {host}}}")).notices(Targets("istio-system"))
        return [f"{problem.field}: {problem.message}" for problem in found]

    assert problems("wbe") == ["spec.host: no service has the hostname wbe: it has no effect"]
    assert problems("web") == problems(HOST) == problems("'*.svc.cluster.local'") == []


def test_a_rule_for_proxies_beside_workloads_says_that_no_waypoint_follows_it() -> None:
    spec = f"{{host: web, workloadSelector: {{matchLabels: {{a: b}}}}, {BALANCED % 'RANDOM'}}}"
    assert told(spec) == (None, ["spec.workloadSelector"])


def test_a_rule_with_a_mistake_says_so() -> None:
    condition, problems = told(MISTAKEN_TLS)
    assert problems == []
    assert condition is not None
    assert (condition.status, condition.reason) == (False, "Invalid")
    assert condition.message.startswith("not used, and no request goes where it speaks of TLS: objects.yaml:5: spec.trafficPolicy.tls.mode")

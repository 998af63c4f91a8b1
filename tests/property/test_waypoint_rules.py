"""Rules and policies of waypoints: the order of objects never matters, a mistake opens nothing, and precedence is that of a naive model."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from istiod_py.translate.config import Config
from istiod_py.translate.l7.attachment import Fronted, WaypointRef
from istiod_py.translate.l7.destination_configs import Destined
from istiod_py.translate.l7.known import L7Service, know
from istiod_py.translate.l7.policies import PolicyFacts, policies_for
from istiod_py.translate.l7.rules import L7Facts, RuleReads, WaypointRules, read_rules
from istiod_py.translate.memo import Memo
from istiod_py.translate.reading import Read, read_objects
from mesh.kube.checked import check_object
from mesh.kube.objects import KubeObject, Layer, ObjectKey, Origin
from mesh.kube.policies import AuthorizationPolicy as KubePolicy
from mesh.kube.policies import read_authorization_policy
from mesh.kube.resources import RESOURCES
from mesh.model.l7.destination import DestinationConfig, TrafficPolicy
from mesh.model.l7.policy import AuthorizationPolicy

AGES = st.sampled_from(["", "2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"])
NAMESPACES = st.sampled_from(["shop", "other", "istio-system"])
HOST = "web.shop.svc.cluster.local"
KEY = f"shop/{HOST}"
WAYPOINT = WaypointRef("shop", "waypoint")
WEB = L7Service("shop", HOST, (), "Service", "web")
FAR = L7Service("other", "far.other.svc.cluster.local", (), "Service", "web")


def made(kind: str, namespace: str, name: str, spec: Mapping[str, Any], created: str = "") -> KubeObject:
    raw = {"metadata": {"creationTimestamp": created} if created else {}, "spec": copy.deepcopy(spec)}
    return check_object(RESOURCES[kind].api_version, ObjectKey(kind, namespace, name), raw, (Layer(Origin("x", 0, 1), raw),))


def given_(**fields: Any) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if value is not None}


# Policies

REFS = st.sampled_from([
    {"kind": "Service", "name": "web"}, {"kind": "Service", "name": "nobody"},
    {"group": "gateway.networking.k8s.io", "kind": "Gateway", "name": "waypoint"},
    {"group": "gateway.networking.k8s.io", "kind": "GatewayClass", "name": "istio-waypoint"},
])  # fmt: skip
RULES = st.lists(st.sampled_from([
    {}, {"to": [{"operation": {"paths": ["/a", "/b/*"]}}]}, {"from": [{"source": {"principals": ["cluster.local/ns/a/sa/b"]}}]},
    {"when": [{"key": "request.headers[x]", "values": ["a"]}]},
]), min_size=1, max_size=2)  # fmt: skip
POLICY_SPECS = st.builds(
    lambda action, refs, rules: {"action": action, "targetRefs": refs, "rules": rules},
    st.sampled_from(["ALLOW", "DENY"]), st.lists(REFS, min_size=1, max_size=3), RULES,
)  # fmt: skip
POLICIES = st.lists(
    st.builds(lambda namespace, name, spec, age: made("AuthorizationPolicy", namespace, name, spec, age),
              NAMESPACES, st.sampled_from("abc"), POLICY_SPECS, AGES),
    max_size=6, unique_by=lambda obj: obj.key,
)  # fmt: skip
FACTS = PolicyFacts("istio-system", ("cluster.local", "old"), {}, know([WEB, FAR]))


def enforced(objects: list[KubeObject], before: Mapping[ObjectKey, Read[KubePolicy]] | None = None) -> dict[ObjectKey, AuthorizationPolicy]:
    reads = read_objects(objects, read_authorization_policy, before or {})
    return policies_for(Fronted(WAYPOINT, [WEB, FAR]), reads, FACTS)


@given(POLICIES, st.randoms(use_true_random=False))
def test_the_order_of_policies_never_matters(objects: list[KubeObject], rng: random.Random) -> None:
    shuffled = list(objects)
    rng.shuffle(shuffled)
    assert list(enforced(shuffled).items()) == list(enforced(objects).items())


def break_somewhere(spec: dict[str, Any], how: str) -> dict[str, Any]:
    broken = copy.deepcopy(spec)
    match how:
        case "rule":
            broken["rules"].append({"frm": []})
        case "value":
            broken["rules"].append({"from": [{"source": {"ipBlocks": ["10.0.0.300"]}}]})
        case "null":
            broken["rules"].append({"to": None})
        case "field":
            broken["selecter"] = {}
        case "target":
            broken["targetRefs"][0] = {**broken["targetRefs"][0], "name": ""}
        case "kind":
            broken["targetRefs"][-1] = {"kind": "Pod", "name": "web"}
        case "action":
            broken["action"] = "PERMIT"
    return broken


HOWS = st.sampled_from(["rule", "value", "null", "field", "target", "kind", "action"])


@given(NAMESPACES, POLICY_SPECS, HOWS)
def test_a_policy_with_a_mistake_denies_wherever_it_would_have_had_a_say(namespace: str, spec: dict[str, Any], how: str) -> None:
    """And where what it targets is not certain, perhaps elsewhere too; nowhere does it say less than deny."""
    right = enforced([made("AuthorizationPolicy", namespace, "p", spec)])
    wrong = enforced([made("AuthorizationPolicy", namespace, "p", break_somewhere(spec, how))])
    assert wrong.keys() >= right.keys()
    for key, policy in wrong.items():
        assert policy.unreadable
        meant = right.get(key)
        if meant is not None:
            assert not policy.targets or (meant.targets and set(policy.targets) >= set(meant.targets))


@given(NAMESPACES, POLICY_SPECS, HOWS)
def test_a_policy_that_was_good_once_stays_as_it_was(namespace: str, spec: dict[str, Any], how: str) -> None:
    good = made("AuthorizationPolicy", namespace, "p", spec)
    reads = read_objects([good], read_authorization_policy, {})
    broken = made("AuthorizationPolicy", namespace, "p", break_somewhere(spec, how))
    assert enforced([broken], reads) == enforced([good])


# Destination rules

BALANCERS = st.none() | st.sampled_from([{"simple": "RANDOM"}, {"simple": "ROUND_ROBIN"}, {}])
POOLS = st.none() | st.sampled_from([{"tcp": {"maxConnections": 1}}, {"tcp": {"maxConnections": 2}}, {"http": {}}])
OUTLIERS = st.none() | st.sampled_from([{"interval": "1s"}, {"interval": "2s"}, {}])
TLS = st.none() | st.sampled_from([{"mode": "SIMPLE", "sni": "a"}, {"mode": "SIMPLE", "sni": "b"}, {"mode": "DISABLE"}])
BLOCKS = st.builds(
    lambda balancer, pool, outlier, tls: given_(loadBalancer=balancer, connectionPool=pool, outlierDetection=outlier, tls=tls),
    BALANCERS, POOLS, OUTLIERS, TLS,
)  # fmt: skip
SOME_BLOCKS = BLOCKS.filter(bool)
PORTS = st.lists(st.builds(lambda port, blocks: {"port": {"number": port}, **blocks}, st.sampled_from([80, 443]), SOME_BLOCKS), max_size=2)
TRAFFIC = st.builds(
    lambda blocks, ports, proxy, budget: given_(**blocks, portLevelSettings=ports or None, proxyProtocol=proxy, retryBudget=budget),
    BLOCKS, PORTS, st.none() | st.sampled_from([{"version": "V1"}, {"version": "V2"}]), st.none() | st.just({"percent": 50}),
).filter(bool)  # fmt: skip
MESHES = st.sampled_from(["", "defaultTrafficPolicy: {connectionPool: {tcp: {maxConnections: 9}}}",
                          "defaultTrafficPolicy: {outlierDetection: {interval: 9s}}"])  # fmt: skip


def configure(objects: list[KubeObject], waypoint: WaypointRef = WAYPOINT) -> DestinationConfig:
    reads = read_rules(lambda kind: [obj for obj in objects if obj.kind == kind], RuleReads(), Config())
    destined = {KEY: Destined("Service", "shop", "web", HOST, {80: "http", 443: "https"})}
    return WaypointRules(reads, {}, L7Facts(know([]), destined), Config(), Memo()).destination_config(KEY, waypoint)


def mesh_object(text: str) -> KubeObject:
    raw = {"metadata": {}, "data": {"mesh": text}}
    return check_object("v1", ObjectKey("ConfigMap", "istio-system", "istio"), raw, (Layer(Origin("x", 0, 1), raw),))


NAMES = ("loadBalancer", "connectionPool", "outlierDetection", "tls")


def naive(levels: list[dict[str, Any]], port: int) -> dict[str, Any]:
    """The policy at one port, written without ports and levels. ``levels``: from the rule to the subset."""
    found: dict[str, Any] = {}
    for name in NAMES:
        for level in reversed(levels):
            alone = next((item for item in level.get("portLevelSettings", ()) if item["port"]["number"] == port), None)
            if alone is not None:
                if name in alone:
                    found[name] = alone[name]
                break  # what is said of a port leaves nothing to inherit
            if name in level:
                found[name] = level[name]
                break
    for name in ("proxyProtocol", "retryBudget"):
        for level in levels:
            if name in level:
                found[name] = level[name]
    return found


def at(config: DestinationConfig, port: int, subset: str = "") -> TrafficPolicy:
    if not subset:
        return config.ports.get(port, config.policy)
    found = next(each for each in config.subsets if each.name == subset)
    return found.ports.get(port, found.policy)


@given(st.none() | TRAFFIC, st.none() | TRAFFIC, MESHES)
def test_precedence_is_that_of_a_naive_model(whole: dict[str, Any] | None, subset: dict[str, Any] | None, mesh: str) -> None:
    spec = given_(host="web", trafficPolicy=whole, subsets=[given_(name="v1", trafficPolicy=subset)])
    config = configure([made("DestinationRule", "shop", "r", spec), mesh_object(mesh)])
    for port in (80, 443, 9999):
        for name, levels in (("", [whole or {}]), ("v1", [whole or {}, subset or {}])):
            plain = naive(levels, port)
            expected = configure(
                [*([made("DestinationRule", "shop", "r", {"host": "web", "trafficPolicy": plain})] if plain else []), mesh_object(mesh)]
            )
            assert at(config, port, name) == expected.policy


RULE_OBJECTS = st.lists(
    st.builds(
        lambda namespace, name, host, exported, policy, subsets, age: made("DestinationRule", namespace, name, given_(
            host=host, exportTo=exported, trafficPolicy=policy, subsets=[{"name": subset} for subset in subsets] or None), age),
        NAMESPACES, st.sampled_from("abcd"), st.sampled_from(["web", HOST, "*", "*.shop.svc.cluster.local"]),
        st.none() | st.sampled_from([["."], ["*"], ["other"], ["shop", "other"]]), st.none() | SOME_BLOCKS,
        st.lists(st.sampled_from(["v1", "v2"]), max_size=2, unique=True), AGES,
    ),
    max_size=6, unique_by=lambda obj: obj.key,
)  # fmt: skip


@given(RULE_OBJECTS, NAMESPACES, st.randoms(use_true_random=False))
def test_the_order_of_rules_never_matters(objects: list[KubeObject], viewpoint: str, rng: random.Random) -> None:
    shuffled = list(objects)
    rng.shuffle(shuffled)
    waypoint = WaypointRef(viewpoint, "w")
    assert configure(shuffled, waypoint) == configure(objects, waypoint)


@given(RULE_OBJECTS, NAMESPACES)
def test_the_chosen_rules_are_those_of_a_naive_model(objects: list[KubeObject], viewpoint: str) -> None:
    expected = naive_choice(objects, viewpoint)
    origin = ", ".join(f"DestinationRule {obj.namespace}/{obj.name}" for obj in expected)
    assert configure(objects, WaypointRef(viewpoint, "w")).origin == origin


def naive_choice(objects: list[KubeObject], viewpoint: str) -> list[KubeObject]:
    """By trying every place, every host and every rule, in the words of the documentation."""

    def host_of(obj: KubeObject) -> str:
        host = str(obj.spec["host"])
        return f"web.{obj.namespace}.svc.cluster.local" if host == "web" else host

    def places(obj: KubeObject) -> set[str]:
        exported = obj.spec.get("exportTo") or ["*"]
        assert isinstance(exported, list)
        return {obj.namespace if item == "." else item for item in exported}

    def seen(obj: KubeObject) -> bool:
        return bool(places(obj) & {"*", viewpoint})

    def private(obj: KubeObject) -> bool:
        return places(obj) == {obj.namespace}

    root = "istio-system"
    ordered = sorted(objects, key=lambda obj: (obj.created == "", obj.created, obj.name, obj.namespace))
    own = [obj for obj in ordered if obj.namespace == viewpoint and seen(obj) and (viewpoint != root or private(obj))]
    pools = [(own, False), *(([obj for obj in ordered if obj.namespace == place and not private(obj)], True) for place in ("shop", root))]
    for pool, filtered in pools:
        for host in (HOST, "*.shop.svc.cluster.local", "*"):
            of_host = [obj for obj in pool if host_of(obj) == host]
            if of_host:
                found = [obj for obj in of_host if seen(obj)] if filtered else of_host
                if found:
                    return [obj for obj in found if places(obj) >= places(found[0])]
                break
    return []

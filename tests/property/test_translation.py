"""Translation: the same whether it grew by changes or was made at once, and never wider for a mistake in a policy."""

from __future__ import annotations

import copy
from collections.abc import Iterator

from hypothesis import given, settings
from hypothesis import strategies as st

from istiod_py.translate import Config, Translation, translate
from mesh.authz.evaluate import AppliedPolicies, Connection, Permit, authorize
from mesh.kube.objects import KubeObject, Layer, Origin, SourceProblem
from mesh.model.address import SocketAddress, parse_ip
from mesh.model.identity import SpiffeId
from mesh.model.policy import Policy

NAMES = st.sampled_from(["a", "b", "c"])
NAMESPACES = st.sampled_from(["shop", "other", "istio-system"])
LABELS = st.dictionaries(st.sampled_from(["app", "tier"]), st.sampled_from(["x", "y"]), max_size=2)
SELECTORS = st.none() | LABELS.map(lambda labels: {"matchLabels": labels})
MODES = st.sampled_from(["UNSET", "DISABLE", "PERMISSIVE", "STRICT"])
GROUPS = {
    "AuthorizationPolicy": "security.istio.io/v1",
    "PeerAuthentication": "security.istio.io/v1",
    "EndpointSlice": "discovery.k8s.io/v1",
    "ServiceEntry": "networking.istio.io/v1",
    "WorkloadEntry": "networking.istio.io/v1",
}
HOSTS = st.lists(st.sampled_from(["x.example.com", "y.example.com", "a.shop.svc.cluster.local", "*.example.com"]), min_size=1, max_size=3)
AGES = st.sampled_from(["", "2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"])


def made(kind: str, namespace: str, name: str, raw: dict[str, object]) -> KubeObject:
    metadata = raw.get("metadata", {})
    assert isinstance(metadata, dict)
    labels, annotations = metadata.get("labels", {}), metadata.get("annotations", {})
    tree = {"apiVersion": GROUPS.get(kind, "v1"), "kind": kind, **raw}
    return KubeObject(GROUPS.get(kind, "v1"), kind, namespace, name, tree, (Layer(Origin("x", 0, 1), tree),), labels, annotations)


def without_none(value: dict[str, object]) -> dict[str, object]:
    return {key: item for key, item in value.items() if item is not None}


PODS = st.builds(
    lambda namespace, name, labels, node, ip, captured: made("Pod", namespace, name, {
        "metadata": {
            "uid": f"{name}{ip}", "labels": labels, "annotations": {"ambient.istio.io/redirection": "enabled"} if captured else {},
        },
        "spec": {"nodeName": node, "containers": [{"name": "c", "ports": [{"name": "http", "containerPort": 8080}]}]},
        "status": {"podIP": f"10.0.0.{ip}"} if ip else {},
    }), NAMESPACES, NAMES, LABELS, st.sampled_from(["n1", "n2"]), st.integers(0, 3), st.booleans(),
)  # fmt: skip
SERVICES = st.builds(
    lambda namespace, name, selector, target: made("Service", namespace, name, {
        "spec": {"clusterIP": "10.96.0.1", "selector": selector, "ports": [{"port": 80, "targetPort": target}]}
    }), NAMESPACES, NAMES, LABELS, st.sampled_from([8080, "http", "none"]),
)  # fmt: skip
SLICES = st.builds(
    lambda namespace, name, service, pod, ip, node: made("EndpointSlice", namespace, name, {
        "metadata": {"labels": {"kubernetes.io/service-name": service}},
        "addressType": "IPv4",
        "ports": [{"port": 8080}],
        "endpoints": [{"addresses": ["10.0.0.1"], "targetRef": {"kind": "Pod", "name": pod, "uid": f"{pod}{ip}"}},
                      {"addresses": [f"192.0.2.{ip}"], "nodeName": node}],
    }), NAMESPACES, NAMES, NAMES, NAMES, st.integers(0, 3), st.sampled_from(["n1", "n2", "n3"]),
)  # fmt: skip
WORKLOAD_ENTRIES = st.builds(
    lambda namespace, name, labels, address: made("WorkloadEntry", namespace, name, {
        "metadata": {"labels": labels}, "spec": {"address": address, "ports": {"http": 9090}}
    }), NAMESPACES, NAMES, LABELS, st.sampled_from(["192.0.2.9", "vm.example.com", ""]),
)  # fmt: skip
REACHED = st.one_of(
    st.fixed_dictionaries({"resolution": st.just("STATIC"), "endpoints": st.just([{"address": "192.0.2.7"}, {"address": "192.0.2.8"}])}),
    st.fixed_dictionaries({"resolution": st.just("STATIC"), "workloadSelector": LABELS.map(lambda labels: {"labels": labels})}),
    st.just({"resolution": "STATIC", "addresses": ["240.240.0.0/17"]}), st.just({"resolution": "DYNAMIC_DNS"}), st.just({}),
)  # fmt: skip
SERVICE_ENTRIES = st.builds(
    lambda namespace, name, labels, age, hosts, reached, exported: made("ServiceEntry", namespace, name, {
        "metadata": {"labels": labels, "creationTimestamp": age},
        "spec": without_none({"hosts": hosts, "ports": [{"number": 80, "name": "http"}], "exportTo": exported, **reached}),
    }), NAMESPACES, NAMES, LABELS, AGES, HOSTS, REACHED, st.sampled_from([None, ["."], ["~"], ["shop"]]),
)  # fmt: skip
NODES = st.builds(
    lambda name, zone: made("Node", "", name, {"metadata": {"labels": {"topology.kubernetes.io/zone": zone}}}),
    st.sampled_from(["n1", "n2"]), st.sampled_from(["z1", "z2"]),
)  # fmt: skip
SPACES = st.builds(
    lambda name, network: made("Namespace", "", name, {"metadata": {"labels": {"topology.istio.io/network": network}}}),
    NAMESPACES, st.sampled_from(["", "net"]),
)  # fmt: skip
SOURCES = st.fixed_dictionaries({}, optional={
    "principals": st.lists(st.sampled_from(["*", "cluster.local/ns/shop/sa/a", "*/sa/b", "cluster.local/ns/x*"]), min_size=1, max_size=2),
    "notPrincipals": st.just(["*/sa/a"]),
    "namespaces": st.lists(st.sampled_from(["shop", "o*"]), min_size=1, max_size=2),
    "ipBlocks": st.just(["10.0.0.0/24"]),
    "requestPrincipals": st.just(["x"]),
}).filter(bool)  # fmt: skip
OPERATIONS = st.fixed_dictionaries({}, optional={
    "ports": st.lists(st.sampled_from(["80", "8080"]), min_size=1, max_size=2), "notPorts": st.just(["90"]), "methods": st.just(["GET"]),
}).filter(bool)  # fmt: skip
RULES = st.fixed_dictionaries({}, optional={
    "from": st.lists(SOURCES.map(lambda source: {"source": source}), min_size=1, max_size=2),
    "to": st.lists(OPERATIONS.map(lambda operation: {"operation": operation}), min_size=1, max_size=2),
    "when": st.just([{"key": "source.namespace", "notValues": ["other"]}]),
})  # fmt: skip
AUTHORIZATIONS = st.builds(
    lambda namespace, name, selector, action, rules: made("AuthorizationPolicy", namespace, name, {
        "spec": without_none({"selector": selector, "action": action, "rules": rules if rules or action != "DENY" else [{}]})
    }), NAMESPACES, NAMES, SELECTORS, st.sampled_from(["ALLOW", "DENY", "AUDIT"]), st.lists(RULES, max_size=3),
)  # fmt: skip
PEERS = st.builds(
    lambda namespace, name, selector, mode, ports: made("PeerAuthentication", namespace, name, {
        "spec": without_none({"selector": selector, "mtls": mode and {"mode": mode},
                              "portLevelMtls": {str(port): {"mode": m} for port, m in ports.items()} if selector and ports else None})
    }), NAMESPACES, NAMES, SELECTORS.map(lambda s: s if s is None or s["matchLabels"] else None), st.none() | MODES,
    st.dictionaries(st.sampled_from([80, 90]), MODES, max_size=2),
)  # fmt: skip
NOTICES = ("has no effect for", "node proxies know no lists", "ztunnel does not support")
"""Said of objects that are right, and translated."""
OBJECTS = st.one_of(PODS, PODS, SERVICES, SLICES, SERVICE_ENTRIES, WORKLOAD_ENTRIES, NODES, SPACES, AUTHORIZATIONS, PEERS)
STEPS = st.lists(OBJECTS | st.tuples(st.just("remove"), st.integers(0, 20)), max_size=25)


def mistakes_in(translation: Translation) -> list[SourceProblem]:
    return [problem for problem in translation.problems if not problem.message.startswith(NOTICES)]


@given(STEPS)
@settings(max_examples=150, deadline=None)
def test_growing_by_changes_ends_where_translating_at_once_does(steps: list[KubeObject | tuple[str, int]]) -> None:
    objects: dict[object, KubeObject] = {}
    translation: Translation | None = None
    for step in steps:
        if isinstance(step, KubeObject):
            objects[step.key] = step
        elif objects:
            objects.pop(list(objects)[step[1] % len(objects)])
        translation = translate(objects.values(), translation, Config())
        at_once = translate(reversed(list(objects.values())), None, Config())
        assert translation == at_once
        assert not mistakes_in(translation)
        named = {name for workload in translation.workloads.values() for name in workload.authorization_policies}
        assert named <= translation.policies.keys()


@given(st.lists(OBJECTS, max_size=25), OBJECTS)
@settings(max_examples=100, deadline=None)
def test_what_a_change_does_not_concern_keeps_its_instance(objects: list[KubeObject], changed: KubeObject) -> None:
    by_key = {obj.key: obj for obj in objects}
    before = translate(by_key.values(), None, Config())
    by_key[changed.key] = changed
    after = translate(by_key.values(), before, Config())
    if changed.kind == "Pod":
        for uid, workload in after.workloads.items():
            assert before.workloads.get(uid) is workload or uid.endswith(f"/{changed.namespace}/{changed.name}")


def leaves(value: object, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    yield path
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from leaves(item, (*path, index))


def corrupted(raw: dict[str, object], path: tuple[str | int, ...], how: str) -> dict[str, object]:
    """Put something wrong at ``path``: a value of another type, nothing, or the field under a misspelt name."""
    result = copy.deepcopy(raw)
    parent: object = result
    for step in path[:-1]:
        parent = parent[step]
    last = path[-1]
    if how == "misspelt":
        if isinstance(parent, dict):
            parent[f"{last}x"] = parent.pop(last)
    else:
        parent[last] = {"empty": None, "number": 7, "list": [], "text": "\u00bfwhat?"}.get(how)
    return result


@given(
    SERVICES | SLICES | SERVICE_ENTRIES | WORKLOAD_ENTRIES | PODS,
    st.data(),
    st.sampled_from(["misspelt", "empty", "number", "list", "text"]),
)
@settings(max_examples=300, deadline=None)
def test_a_mistake_in_an_object_leaves_everything_as_it_was(obj: KubeObject, data: st.DataObject, how: str) -> None:
    body = {key: value for key, value in obj.raw.items() if key not in ("apiVersion", "kind", "metadata")}
    path = data.draw(st.sampled_from(sorted((path for path in leaves(body) if path), key=str)))
    broken = made(obj.kind, obj.namespace, obj.name, {"metadata": obj.raw.get("metadata", {}), **corrupted(body, path, how)})
    service = made("Service", obj.namespace, "a", {"spec": {"clusterIP": "10.96.0.1", "ports": [{"port": 80}]}})
    others = [] if obj.kind == "Service" else [service]
    before = translate([obj, *others], None, Config())
    after = translate([broken, *others], before, Config())
    if mistakes_in(after):
        assert (after.workloads, after.services) == (before.workloads, before.services)
        assert translate([broken, *others], None, Config()).workloads.keys() <= before.workloads.keys()
        assert all(problem.file == "x" for problem in after.problems)


CONNECTIONS = st.builds(
    Connection,
    source_ip=st.sampled_from([parse_ip("10.0.0.7"), parse_ip("10.9.9.9")]),
    source=st.none() | st.builds(SpiffeId, st.just("cluster.local"), st.sampled_from(["shop", "other", "x"]), st.sampled_from(["a", "b"])),
    destination=st.builds(SocketAddress, st.just(parse_ip("10.0.0.1")), st.sampled_from([80, 90, 8080])),
)


def policies_of(translation: Translation) -> tuple[Policy, ...]:
    """As they apply to a workload that the policy selects."""
    return tuple(translation.policies.values())


@given(AUTHORIZATIONS, st.data(), st.sampled_from(["misspelt", "empty", "number", "list", "text"]), CONNECTIONS)
@settings(max_examples=400, deadline=None)
def test_a_mistake_in_a_new_policy_lets_nothing_in_that_the_policy_would_refuse(
    policy: KubeObject, data: st.DataObject, how: str, connection: Connection
) -> None:
    spec = policy.raw["spec"]
    assert isinstance(spec, dict)
    path = data.draw(st.sampled_from(sorted((("spec", *path) for path in leaves(spec) if path), key=str)))
    broken = made("AuthorizationPolicy", policy.namespace, policy.name, corrupted({"spec": spec}, path, how))
    translation = translate([broken], None, Config())
    # Some values of another kind may be meant; these never are.
    assert (
        mistakes_in(translation)
        or how in ("list", "text")
        or (how == "misspelt" and "matchLabels" in path[:-1])
        or (how == "misspelt" and isinstance(path[-1], int))
    )
    if mistakes_in(translation) and spec["action"] != "AUDIT":
        meant = authorize(AppliedPolicies(policies_of(translate([policy], None, Config()))), connection)
        is_now = authorize(AppliedPolicies(policies_of(translation)), connection)
        assert isinstance(meant, Permit) or not isinstance(is_now, Permit)
    after = translate([broken], translate([policy], None, Config()), Config())
    if mistakes_in(after):
        assert after.policies == translate([policy], None, Config()).policies

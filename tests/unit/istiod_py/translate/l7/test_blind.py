"""Policies of node proxies that name clients, behind a waypoint: told, since they judge the waypoint instead."""

from __future__ import annotations

import pytest

from istiod_py.translate import Config, translate
from mesh.testing.objects import objects_from_yaml

NODE = """
apiVersion: v1
kind: Service
metadata: {name: waypoint, namespace: shop, labels: {gateway.istio.io/managed: istio.io-mesh-controller}}
spec: {clusterIP: 10.96.0.9, selector: {gateway.networking.k8s.io/gateway-name: waypoint}, ports: [{name: mesh, port: 15008}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: waypoint, namespace: shop}
spec: {gatewayClassName: istio-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE}]}
status: {addresses: [ADDRESS]}
---
apiVersion: v1
kind: Pod
metadata: {name: waypoint-1, namespace: shop, uid: w, labels: {gateway.networking.k8s.io/gateway-name: waypoint}}
spec: {nodeName: n1, serviceAccountName: waypoint, containers: [{name: c}]}
status: {phase: Running, podIP: 10.0.0.9}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop, labels: {istio.io/use-waypoint: USED}}
spec: {clusterIP: 10.96.0.1, selector: {app: web}, ports: [{name: http, port: 80}]}
---
apiVersion: v1
kind: Pod
metadata: {name: web-1, namespace: shop, uid: p, labels: {app: web}}
spec: {nodeName: n1, containers: [{name: c}]}
status: {phase: Running, podIP: 10.0.0.1}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: p, namespace: NAMESPACE}
spec: SPEC
"""
BY_NAME = "{type: Hostname, value: waypoint.shop.svc.cluster.local}"
BY_ADDRESS = "{type: IPAddress, value: 10.96.0.9}"
BY_POD = "{type: IPAddress, value: 10.0.0.9}"


def told(spec: str, *, namespace: str = "shop", used: str = "waypoint", address: str = BY_NAME) -> list[str]:
    text = NODE.replace("SPEC", spec).replace("NAMESPACE", namespace).replace("USED", used).replace("ADDRESS", address)
    objects, problems = objects_from_yaml(text)
    assert problems == ()
    found = translate(objects, None, Config()).problems
    return [problem.message for problem in found if problem.field == "spec.rules"]


CLIENT = "{rules: [{from: [{source: {principals: [cluster.local/ns/shop/sa/client]}}]}]}"
NONE_IN = (
    "shop/web-1 gets connections from the waypoint cluster.local/ns/shop/sa/waypoint: this policy allows none of them, whoever the client "
    "was. Give the policy targetRefs, so that the waypoint enforces it, or name the waypoint in it"
)


@pytest.mark.parametrize("address", [BY_NAME, BY_ADDRESS, BY_POD])
def test_an_allow_that_names_clients_lets_no_waypoint_through(address: str) -> None:
    assert told(CLIENT, address=address) == [NONE_IN]


@pytest.mark.parametrize(("spec", "effect"), [
    ("{rules: [{from: [{source: {namespaces: [other]}}]}]}", "allows none"),
    ("{rules: [{from: [{source: {serviceAccounts: [client]}}]}]}", "allows none"),
    ("{rules: [{from: [{source: {ipBlocks: [10.0.0.7]}}]}]}", "allows none"),
    ("{rules: [{when: [{key: source.principal, values: [cluster.local/ns/shop/sa/client]}]}]}", "allows none"),
    ("{selector: {matchLabels: {app: web}}, rules: [{from: [{source: {namespaces: [other]}}]}]}", "allows none"),
    ("{action: DENY, rules: [{from: [{source: {namespaces: [other]}}]}]}", "denies none"),
    ("{action: DENY, rules: [{from: [{source: {notPrincipals: [cluster.local/ns/shop/sa/client]}}]}]}", "denies them"),
])  # fmt: skip
def test_every_way_to_name_clients_is_noticed(spec: str, effect: str) -> None:
    (message,) = told(spec)
    assert f"this policy {effect}" in message


@pytest.mark.parametrize("spec", [
    "{rules: [{}]}",
    "{}",
    "{rules: [{to: [{operation: {ports: ['80']}}]}]}",
    "{rules: [{from: [{source: {principals: [cluster.local/ns/shop/sa/client, cluster.local/ns/shop/sa/waypoint]}}]}]}",
    "{rules: [{from: [{source: {namespaces: [other]}}]}, {from: [{source: {namespaces: [shop]}}], to: [{operation: {ports: ['80']}}]}]}",
    "{rules: [{from: [{source: {principals: ['*']}}]}]}",
    "{selector: {matchLabels: {app: other}}, rules: [{from: [{source: {namespaces: [other]}}]}]}",
    "{targetRefs: [{kind: Service, name: web}], rules: [{from: [{source: {namespaces: [other]}}]}]}",
])  # fmt: skip
def test_a_policy_that_a_waypoint_passes_is_no_news(spec: str) -> None:
    assert told(spec) == []


def test_it_is_news_only_behind_a_waypoint() -> None:
    assert told(CLIENT, used="none") == []
    assert told(CLIENT, namespace="default") == []
    assert told(CLIENT, namespace="istio-system") == [NONE_IN]

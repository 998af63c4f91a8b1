"""What is deployed for a waypoint: the golden objects, what a Gateway and overlays change in them, and what they may not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from istiod_py.translate.deployment import (
    BadParameters,
    Object,
    Template,
    is_deployed_by_us,
    make_pods,
    plan_waypoint,
    version_to_stamp,
)
from mesh.kube.gatewayapi.gateway import KubeGateway, read_gateway
from mesh.testing.objects import objects_from_yaml

GOLDEN = Path(__file__).with_name("waypoint.yaml")
TEMPLATE = Template(image="registry/ambient-mesh:1", discovery="https://istiod.istio-system.svc:15012")


def gateway(metadata: str = "", spec: str = "") -> KubeGateway:
    text = f"""
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {{name: waypoint, namespace: shop, uid: "7"{", " + metadata if metadata else ""}}}
spec: {{gatewayClassName: istio-waypoint, listeners: [{{name: mesh, port: 15008, protocol: HBONE}}]{", " + spec if spec else ""}}}
"""
    (obj,), problems = objects_from_yaml(text)
    assert problems == ()
    return read_gateway(obj)[0]


def planned(gateway: KubeGateway, template: Template = TEMPLATE, *overlays: dict[str, str]) -> dict[str, Object]:
    return {obj["kind"]: obj for obj in plan_waypoint(gateway, template, overlays)}


def at(value: Any, *path: str | int) -> Any:
    for step in path:
        value = value[step]
    return value


POD = ("spec", "template", "metadata")
CONTAINER = ("spec", "template", "spec", "containers", 0)


def test_what_is_deployed_is_the_golden_manifest() -> None:
    wanted = list(YAML(typ="safe", pure=True).load_all(GOLDEN.read_text(encoding="utf-8")))
    assert list(plan_waypoint(gateway("labels: {istio.io/waypoint-for: all}"), TEMPLATE)) == wanted


def test_everything_is_owned_by_the_gateway_and_says_who_manages_it() -> None:
    overlays = {"horizontalPodAutoscaler": "spec: {maxReplicas: 3}", "podDisruptionBudget": "spec: {minAvailable: 1}"}
    objects = plan_waypoint(gateway(), TEMPLATE, (overlays,))
    assert len(objects) == 5
    for obj in objects:
        assert obj["metadata"]["ownerReferences"] == [
            {"apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway", "name": "waypoint", "uid": "7"}
        ]
        assert obj["metadata"]["labels"]["gateway.istio.io/managed"] == "istio.io-mesh-controller"
        assert obj["metadata"]["namespace"] == "shop"


def test_names_can_be_others() -> None:
    found = planned(gateway("annotations: {gateway.istio.io/name-override: front, gateway.istio.io/service-account: robot}"))
    assert {kind: obj["metadata"]["name"] for kind, obj in found.items()} == {
        "ServiceAccount": "robot",
        "Deployment": "front",
        "Service": "front",
    }
    assert at(found["Deployment"], "spec", "template", "spec", "serviceAccountName") == "robot"
    assert at(found["Deployment"], *POD, "labels", "gateway.networking.k8s.io/gateway-name") == "waypoint"
    assert not any("override" in key for key in found["Deployment"]["metadata"]["annotations"])


def test_the_gateways_own_labels_are_copied_unless_infrastructure_has_others() -> None:
    own = planned(gateway("labels: {team: a}"))["Deployment"]
    assert (own["metadata"]["labels"]["team"], at(own, *POD, "labels", "team")) == ("a", "a")
    asked = "infrastructure: {labels: {team: b, gateway.networking.k8s.io/gateway-name: stolen}, annotations: {note: x}}"
    found = planned(gateway("labels: {team: a, other: c}", asked))
    for obj in found.values():
        assert obj["metadata"]["labels"]["team"] == "b"
        assert obj["metadata"]["labels"]["gateway.networking.k8s.io/gateway-name"] == "waypoint"
        assert "other" not in obj["metadata"]["labels"]
        assert obj["metadata"]["annotations"]["note"] == "x"


def test_the_network_of_the_mesh_is_told_unless_the_gateway_names_one() -> None:
    template = Template(image="i", discovery="d", network="n1")
    label = ("labels", "topology.istio.io/network")
    assert at(planned(gateway(), template)["Deployment"], *POD, *label) == "n1"
    own = gateway("labels: {topology.istio.io/network: n2}")
    assert at(planned(own, template)["Deployment"], *POD, *label) == "n2"


def test_a_user_may_have_waypoints_captured() -> None:
    asked = "infrastructure: {labels: {istio.io/dataplane-mode: ambient}}"
    assert at(planned(gateway(spec=asked))["Deployment"], *POD, "labels", "istio.io/dataplane-mode") == "ambient"


def test_every_listeners_port_is_the_services_once() -> None:
    listeners = "[{name: mesh, port: 15008, protocol: HBONE}, {name: Web.x, port: 80, protocol: HTTP}, {name: b, port: 80, protocol: TCP}]"
    head = "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {name: w, namespace: shop}\n"
    (obj,), _ = objects_from_yaml(f"{head}spec: {{gatewayClassName: c, listeners: {listeners}}}\n")
    ports = planned(read_gateway(obj)[0])["Service"]["spec"]["ports"]
    assert [(port["name"], port["port"], port["appProtocol"]) for port in ports] == [
        ("status-port", 15021, "tcp"),
        ("mesh", 15008, "hbone"),
        ("web-x", 80, "http"),
    ]


def test_pull_secrets_and_policy_are_our_own() -> None:
    found = planned(gateway(), Template(image="i", discovery="d", pull_policy="Always", pull_secrets=("s",)))["Deployment"]
    assert at(found, *CONTAINER, "imagePullPolicy") == "Always"
    assert at(found, "spec", "template", "spec", "imagePullSecrets") == [{"name": "s"}]


# Overlays


def test_overlays_are_merged_in_order() -> None:
    defaults = {"deployment": "spec: {replicas: 2, template: {spec: {containers: [{name: istio-proxy, image: a}]}}}"}
    own = {"deployment": "spec: {replicas: 3}", "service": "spec: {type: NodePort}", "serviceAccount": "metadata: {annotations: {role: x}}"}
    found = planned(gateway(), TEMPLATE, defaults, own)
    assert found["Deployment"]["spec"]["replicas"] == 3
    assert at(found["Deployment"], *CONTAINER, "image") == "a"
    assert at(found["Deployment"], *CONTAINER, "command") == ["waypoint-py"]
    assert found["Service"]["spec"]["type"] == "NodePort"
    assert found["ServiceAccount"]["metadata"]["annotations"]["role"] == "x"


def test_autoscaler_and_disruption_budget_come_with_their_overlays_alone() -> None:
    assert planned(gateway()).keys() == {"ServiceAccount", "Deployment", "Service"}
    found = planned(
        gateway(), TEMPLATE, {"horizontalPodAutoscaler": "spec: {maxReplicas: 5}", "podDisruptionBudget": "spec: {minAvailable: 1}"}
    )
    assert found["HorizontalPodAutoscaler"]["spec"] == {
        "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": "waypoint"},
        "maxReplicas": 5,
    }
    assert found["PodDisruptionBudget"]["spec"] == {
        "selector": {"matchLabels": {"gateway.networking.k8s.io/gateway-name": "waypoint"}},
        "minAvailable": 1,
    }


@pytest.mark.parametrize(("overlay", "because"), [
    ({"deployment": "metadata: {name: other}"}, "deployment: illegal metadata change"),
    ({"service": "metadata: {namespace: other}"}, "service: illegal metadata change"),
    ({"serviceAccount": "metadata: {ownerReferences: []}"}, "serviceAccount: illegal metadata change"),
    ({"service": "metadata: {finalizers: [x]}"}, "service: illegal metadata change"),
    ({"service": "metadata: null"}, "service: illegal metadata change"),
    ({"service": "kind: Secret"}, "service: illegal metadata change"),
    ({"service": "spec: {selector: {app: theirs}}"}, "service: spec.selector can't be changed"),
    (
        {"deployment": "spec: {template: {spec: {serviceAccountName: admin}}}"},
        "deployment: spec.template.spec.serviceAccountName can't be changed",
    ),
    ({"secret": "a: b"}, 'unsupported overlay "secret"'),
    ({"deployment": "- a"}, "deployment: expected one mapping"),
    ({"deployment": "a: [b"}, "deployment: line 1"),
    ({"deployment": "spec: {template: {spec: {containers: [{image: x}]}}}"}, r"deployment: spec.template.spec.containers\[0\]: 'name' is"),
])  # fmt: skip
def test_an_overlay_that_would_make_it_anothers_is_refused_whole(overlay: dict[str, str], because: str) -> None:
    with pytest.raises(BadParameters, match=because):
        plan_waypoint(gateway(), TEMPLATE, (overlay,))


# Whose it is


@pytest.mark.parametrize(("annotation", "stamp"), [("", True), ("4", True), ("5", False), ("6", None), ("x", None)])
def test_a_newer_controllers_gateway_is_left_alone(annotation: str, stamp: bool | None) -> None:
    annotations = f"annotations: {{gateway.istio.io/controller-version: '{annotation}'}}" if annotation else ""
    assert version_to_stamp(gateway(annotations)) is stamp


@pytest.mark.parametrize(("addresses", "ours"), [
    ("", True),
    ("addresses: [{value: 10.0.0.1}]", True),
    ("addresses: [{type: Hostname, value: mine.shop.svc.cluster.local}]", False),
    ("addresses: [{value: 10.0.0.1}, {value: 10.0.0.2}]", False),
])  # fmt: skip
def test_whoever_names_a_host_has_deployed_it(addresses: str, ours: bool) -> None:
    assert is_deployed_by_us(gateway(spec=addresses)) == ours


# Without controllers


def test_pods_are_made_of_a_deployment_by_number() -> None:
    deployment = planned(gateway(), TEMPLATE, {"deployment": "spec: {replicas: 2}"})["Deployment"]
    pods = make_pods(deployment)
    assert [(pod["kind"], pod["metadata"]["namespace"], pod["metadata"]["name"]) for pod in pods] == [
        ("Pod", "shop", "waypoint-0"),
        ("Pod", "shop", "waypoint-1"),
    ]
    assert pods[0]["spec"] == deployment["spec"]["template"]["spec"]
    assert pods[0]["metadata"]["labels"] == deployment["spec"]["template"]["metadata"]["labels"]


@pytest.mark.parametrize("replicas", ["-1", "17", "many", "1.5"])
def test_no_more_pods_than_can_be_run(replicas: str) -> None:
    with pytest.raises(BadParameters, match="expected a number from 0 to 16"):
        make_pods(planned(gateway(), TEMPLATE, {"deployment": f"spec: {{replicas: {replicas}}}"})["Deployment"])

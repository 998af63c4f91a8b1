"""A waypoint in the lab: a Gateway starts and stops it, it is itself alone, and agents send it what is bound to it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mesh.testing.lab import Lab, running_lab, wait_until

pytestmark = pytest.mark.netns

EXAMPLE = Path(__file__).parents[2] / "examples" / "two-nodes"
STANDIN = Path(__file__).with_name("standin_waypoint.py")
GATEWAY = """\
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: NAME, namespace: shop}
spec:
  gatewayClassName: istio-waypoint
  listeners: [{name: mesh, port: 15008, protocol: HBONE}]
  infrastructure: {parametersRef: {kind: ConfigMap, name: standin}}
"""
OPTIONS = """\
apiVersion: v1
kind: ConfigMap
metadata: {name: standin, namespace: shop}
data:
  deployment: |
    spec:
      template:
        spec:
          containers: [{name: istio-proxy, command: [python3, apps/standin_waypoint.py, "BACKEND"]}]
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with running_lab(EXAMPLE, tmp_path_factory.mktemp("labwaypoint")) as lab:
        shutil.copy(STANDIN, lab.source / "apps")
        server = next(ip for ip in lab.pod("shop/server")["ips"] if "." in ip)
        lab.write("standin.yaml", OPTIONS.replace("BACKEND", f"{server}:8080"))
        lab.label("shop", "istio.io/dataplane-mode=ambient")
        wait_until(lambda: len(lab.pods_in_mesh()) == 4, "the pods of the shop are captured")
        yield lab


def apply(lab: Lab, name: str = "waypoint") -> None:
    lab.write(f"{name}.yaml", GATEWAY.replace("NAME", name))
    wait_until(lambda: because(lab, name) == "", f"waypoint {name} is programmed")


def because(lab: Lab, name: str = "waypoint") -> str | None:
    """Why the waypoint is not programmed; None if there is none."""
    return next((each["because"] for each in lab.status()["waypoints"] if each["name"] == name), None)


def told(lab: Lab, name: str = "waypoint") -> list[dict[str, Any]]:
    """What the stand-in has said."""
    lines = lab.log(f"shop/{name}-0").splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


def get(lab: Lab, family: str = "4", client: str = "shop/client") -> str:
    return lab.run(client, "python3", "apps/get.py", "http://server/", family).stdout


def settle(lab: Lab, name: str, *, passes: bool) -> None:
    """Until new connections go through the waypoint, or none does any more."""

    def settled() -> bool:
        before = len([each for each in told(lab, name) if "authority" in each])
        get(lab)
        return (len([each for each in told(lab, name) if "authority" in each]) > before) == passes

    wait_until(settled, f"connections {'pass' if passes else 'do not pass'} waypoint {name}")


def test_a_gateway_starts_a_waypoint_and_stops_it_when_it_goes(lab: Lab) -> None:
    apply(lab)
    pod = lab.pod("shop/waypoint-0")
    assert (pod["ready"], pod["mesh"]) == (True, "outside")
    (service,) = [each for each in lab.status()["services"] if each["name"] == "waypoint"]
    assert (service["ports"], service["endpoints"]) == (["15021/TCP", "15008/TCP"], 1)
    overlay = json.loads((lab.home / "status" / "istiod" / "gateway_shop_waypoint.json").read_text())
    assert [each["value"] for each in overlay["status"]["addresses"]] == [*service["ips"], "waypoint.shop.svc.cluster.local"]
    assert "waypoint" in lab.meshctl("lab", "status", "--name", lab.name).stdout
    lab.remove("waypoint.yaml")
    wait_until(lambda: because(lab) is None, "the waypoint is gone")
    wait_until(lambda: not [each for each in lab.status()["pods"] if each["name"] == "waypoint-0"], "its pod is gone")
    assert not [each for each in lab.status()["services"] if each["name"] == "waypoint"]
    assert not [each for each in lab.status()["processes"] if each["name"].startswith("shop/waypoint")]


@pytest.mark.parametrize("family", ["4", "6"])
def test_what_is_bound_to_a_waypoint_passes_it_and_nothing_else_does(lab: Lab, family: str) -> None:
    apply(lab)
    lab.label("shop", "istio.io/use-waypoint=waypoint")
    try:
        settle(lab, "waypoint", passes=True)
        assert get(lab, family).startswith("200 hello")
        request = [each for each in told(lab) if "authority" in each][-1]
        vips = next(each["ips"] for each in lab.status()["services"] if each["name"] == "server")
        vip = next(ip for ip in vips if (":" in ip) == (family == "6"))
        authority = f"[{vip}]:80" if family == "6" else f"{vip}:80"
        assert request["authority"] == authority
        assert request["peer"] == "spiffe://cluster.local/ns/shop/sa/client"
        wait_until(lambda: lab.access("n1", authority, "waypoint-0"), "the access log names the waypoint's pod")
    finally:
        lab.label("shop", "istio.io/use-waypoint-")
    settle(lab, "waypoint", passes=False)
    assert get(lab, family).startswith("200 hello")


def test_a_waypoint_is_itself_alone_and_is_told_of_its_own_alone(lab: Lab) -> None:
    apply(lab)
    apply(lab, "other")
    lab.label("shop", "istio.io/use-waypoint=waypoint")
    try:

        def services(name: str) -> set[str]:
            return {each["key"] for each in told(lab, name) if each.get("told") == "ServiceConfig"}

        wait_until(lambda: "shop/server.shop.svc.cluster.local" in services("waypoint"), "the waypoint is told of its services")
        assert {"identity": "spiffe://cluster.local/ns/shop/sa/waypoint"} in told(lab)
        assert not [each for each in told(lab) if "mistake" in each]
        assert {each["waypoint"] for each in told(lab) if "told" in each} == {"shop/waypoint"}
        assert services("other") == set()
        assert {each["waypoint"] for each in told(lab, "other") if "told" in each} == {"shop/other"}
        lab.label("shop", "istio.io/use-waypoint=other")
        gone = "shop/waypoint|shop/server.shop.svc.cluster.local"
        wait_until(lambda: any(each.get("gone") == gone for each in told(lab)), "the waypoint is told that a service is no longer its own")
        wait_until(lambda: "shop/server.shop.svc.cluster.local" in services("other"), "the other waypoint is told of it")
    finally:
        lab.label("shop", "istio.io/use-waypoint-")
        lab.remove("other.yaml")


def test_connections_are_shared_out_between_a_waypoint_and_its_canary(lab: Lab) -> None:
    apply(lab)
    apply(lab, "next")
    shop = (lab.source / "shop.yaml").read_text()
    canary = "istio.io/use-waypoint: waypoint, istio.io/use-waypoint-canary: next"
    service = "  name: server\n  namespace: shop\nspec:\n  selector:"
    assert service in shop
    bound = service.replace("spec:", f"  labels: {{{canary}}}\n  annotations: {{istio.io/use-waypoint-canary-weight: '50'}}\nspec:")
    try:
        lab.write("shop.yaml", shop.replace(service, bound))
        settle(lab, "next", passes=True)
        for _ in range(10):
            assert get(lab).startswith("200 hello")
        assert all([each for each in told(lab, name) if "authority" in each] for name in ("waypoint", "next"))
    finally:
        lab.write("shop.yaml", shop)
        lab.remove("next.yaml")


def test_a_waypoint_that_is_required_and_not_there_refuses_with_that_reason(lab: Lab) -> None:
    lab.remove("waypoint.yaml")
    wait_until(lambda: because(lab) is None, "the waypoint is gone")
    shop = (lab.source / "shop.yaml").read_text()
    namespace = "kind: Namespace\nmetadata:\n  name: shop\n"
    assert namespace in shop
    required = "  annotations: {ambient.mesh/waypoint-required: 'true'}\n"
    try:
        lab.label("shop", "istio.io/use-waypoint=waypoint")
        assert get(lab).startswith("200 hello"), "as Istio has it, traffic goes directly"
        labelled = (lab.source / "shop.yaml").read_text()
        lab.write("shop.yaml", labelled.replace(namespace, namespace + required))
        wait_until(lambda: not get(lab).startswith("200"), "connections are refused")
        reason = "unknown waypoint: waypoint shop/waypoint.shop.svc.cluster.local not found"
        wait_until(lambda: lab.access("n1", reason), "the access log says why")
        apply(lab)
        settle(lab, "waypoint", passes=True)
    finally:
        lab.write("shop.yaml", shop)

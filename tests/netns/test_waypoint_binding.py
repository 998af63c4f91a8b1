"""Whose traffic passes which waypoint: several of them in one lab, told apart by what each has logged."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest

from mesh.testing.lab import Lab, wait_until
from mesh.testing.waypoints import ask, ask_often, problems_of, running_shop

pytestmark = pytest.mark.netns

GATEWAY = """\
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: NAME, namespace: NAMESPACE, labels: {LABELS}}
spec: {gatewayClassName: istio-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE, ALLOWED}]}
"""
SERVICE = """\
---
apiVersion: v1
kind: Service
metadata: {name: NAME, namespace: shop, labels: {LABELS}, annotations: {istio.io/use-waypoint-canary-weight: "50"}}
spec: {selector: {app: web}, ports: [{name: http, port: 80, targetPort: 8080}]}
"""
BARE_POD = """\
---
apiVersion: v1
kind: Pod
metadata: {name: NAME, namespace: shop, labels: {istio.io/use-waypoint: WAYPOINT}}
spec:
  nodeName: n2
  serviceAccountName: server
  containers: [{name: web, command: [python3, apps/versioned_web.py, "8080", pod], readinessProbe: {tcpSocket: {port: 8080}}}]
"""


def gateway(name: str, namespace: str = "shop", waypoint_for: str = "service", allowed: str = "") -> str:
    """YAML of a waypoint. ``allowed``: from which namespaces it may be used."""
    routes = f"allowedRoutes: {{namespaces: {{from: {allowed}}}}}" if allowed else ""
    text = GATEWAY.replace("NAMESPACE", namespace).replace("NAME", name).replace("LABELS", f"istio.io/waypoint-for: {waypoint_for}")
    return text.replace(", ALLOWED", f", {routes}" if routes else "")


def service(name: str, **labels: str) -> str:
    """YAML of a service for both versions; of labels the part behind ``istio.io/``, with ``_`` for ``-``."""
    found = ", ".join(f"istio.io/{label.replace('_', '-')}: {value}" for label, value in labels.items())
    return SERVICE.replace("NAME", name).replace("LABELS", found)


WAYPOINTS = (
    "apiVersion: v1\nkind: Namespace\nmetadata: {name: infra}\n"
    + gateway("next")
    + gateway("pods", waypoint_for="workload")
    + gateway("everything", waypoint_for="all")
    + gateway("shared", "infra", allowed="All")
    + gateway("closed", "infra")
)
SERVICES = (
    service("own", use_waypoint="next")
    + service("free", use_waypoint="none")
    + service("halved", use_waypoint_canary="next")
    + service("far", use_waypoint="shared", use_waypoint_namespace="infra")
    + service("both", use_waypoint="everything")
    + BARE_POD.replace("NAME", "lone").replace("WAYPOINT", "pods")
    + BARE_POD.replace("NAME", "any").replace("WAYPOINT", "everything")
)
REFUSED = (
    service("denied", use_waypoint="closed", use_waypoint_namespace="infra")
    + service("mistyped", use_waypoint="waypiont")
    + service("unfit", use_waypoint="pods")
)
EVERY = ("shop/waypoint-0", "shop/next-0", "shop/pods-0", "shop/everything-0", "infra/shared-0", "infra/closed-0")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with running_shop(tmp_path_factory.mktemp("waypointbinding"), waypoints=WAYPOINTS, services=SERVICES, refused=REFUSED) as lab:
        wait_until(lambda: not [each for each in lab.status()["waypoints"] if each["because"]], "all waypoints are programmed")
        wait_until(lambda: not problems_of(lab, "services.yaml"), "nothing waits for its waypoint")
        yield lab


def passed(lab: Lab, path: str) -> set[str]:
    """The waypoints that a request for this path has passed."""
    logs = {waypoint: lab.home / "logs" / f"{waypoint.replace('/', '_')}_istio-proxy.log" for waypoint in EVERY}
    return {waypoint for waypoint, log in logs.items() if f" {path} HTTP" in log.read_text()}


@pytest.mark.parametrize(
    ("name", "waypoints"),
    [
        ("web", {"shop/waypoint-0"}),
        ("own", {"shop/next-0"}),
        ("free", set()),
        ("far", {"infra/shared-0"}),
        ("both", {"shop/everything-0"}),
        ("denied", set()),
        ("mistyped", set()),
        ("unfit", set()),
    ],
)
@pytest.mark.parametrize("family", ["-4", "-6"])
def test_a_service_has_the_waypoint_that_its_label_names_or_its_namespaces(lab: Lab, name: str, waypoints: set[str], family: str) -> None:
    path = f"/{name}{family}"

    def settled() -> bool:
        """Agents may be a moment behind the control plane."""
        assert ask(lab, f"http://{name}{path}", family).status == 200
        return passed(lab, path) == waypoints

    wait_until(settled, f"{name} has {waypoints}")


def test_connections_are_shared_out_between_a_waypoint_and_its_canary(lab: Lab) -> None:
    # That one of them gets none of forty has a chance of one in 10^12.
    assert {answer.status for answer in ask_often(lab, 40, "http://halved/halved")} == {200}
    wait_until(lambda: passed(lab, "/halved") == {"shop/waypoint-0", "shop/next-0"}, "both have logged some")


@pytest.mark.parametrize(("pod", "waypoints"), [("lone", {"shop/pods-0"}), ("any", {"shop/everything-0"}), ("web-v1", set())])
@pytest.mark.parametrize("version", [4, 6])
def test_traffic_to_a_pods_address_passes_a_waypoint_for_workloads(lab: Lab, pod: str, waypoints: set[str], version: int) -> None:
    address = next(ip for ip in lab.pod(f"shop/{pod}")["ips"] if (":" in ip) == (version == 6))
    host, path = f"[{address}]" if version == 6 else address, f"/{pod}/{version}"
    assert ask(lab, f"http://{host}:8080{path}").status == 200
    wait_until(lambda: passed(lab, path) == waypoints, f"{pod} has {waypoints}")


def test_a_label_that_asks_in_vain_is_told_with_its_reason(lab: Lab) -> None:
    found = wait_until(partial(problems_of, lab, "refused.yaml"), "the lab's status tells")
    assert [problem.partition(": ")[2] for problem in found] == [
        'no effect: we are not permitted to attach to waypoint "infra/closed" (missing allowedRoutes?)',
        "there is no Gateway shop/waypiont, and traffic goes directly; did you mean 'waypoint'?",
        'no effect: attempting to bind to traffic type "service" which the waypoint "shop/pods" does not support',
    ]

"""A Gateway on a real cluster: deployed, owned, told of, bound to, and gone."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import suppress
from http import HTTPStatus

import pytest

from mesh.kube.ownership import DEPLOYED
from mesh.kube.resources import DEPLOYMENTS, RESOURCES, Resource
from mesh.model.labels import USE_WAYPOINT
from meshctl_py.lab.demo.report import Report
from meshctl_py.lab.demo.requests import RequestClaims, visiting
from tests.cluster.harness.api import ApiRefused, Object
from tests.cluster.harness.client import Cluster, wait_until
from tests.cluster.mesh import meshctl, wait_captured
from tests.cluster.shop import ClusterShop, open_shop
from tests.cluster.waypoints import apply, conditions_of, gateway, of, overlay, rules, status_of
from tests.cluster.workloads import apply_pods, echo_pod

BOUND = {
    "Service": {"istio.io/WaypointBound": ("True", "WaypointAccepted")},
    "ServiceEntry": {"istio.io/WaypointBound": ("True", "WaypointAccepted")},
    "HTTPRoute": {"Accepted": ("True", "Accepted"), "ResolvedRefs": ("True", "ResolvedRefs")},
    "GRPCRoute": {"Accepted": ("True", "Accepted"), "ResolvedRefs": ("True", "ResolvedRefs")},
    "TCPRoute": {"Accepted": ("True", "Accepted"), "ResolvedRefs": ("True", "ResolvedRefs")},
    "TLSRoute": {"Accepted": ("True", "Accepted"), "ResolvedRefs": ("True", "ResolvedRefs")},
    "RequestAuthentication": {"WaypointAccepted": ("True", "Accepted")},
    "DestinationRule": {"WaypointAccepted": ("True", "Accepted")},
}
SERVE = """
import http.server
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("content-length", "2")
        self.end_headers()
        self.wfile.write(b"ok")
http.server.HTTPServer(("", 80), Handler).serve_forever()
"""
ASK = """
import http.client, sys
connection = http.client.HTTPConnection("web", 80, timeout=5)
connection.request("GET", sys.argv[1])
print(connection.getresponse().status)
"""


@pytest.fixture
def shop(mesh: Cluster) -> Iterator[str]:
    labels = {"istio.io__dataplane-mode": "ambient", "istio.io__use-waypoint": "waypoint"}
    with mesh.namespace("waypoints", **labels) as namespace:
        yield namespace


def web_pod(name: str, node: str) -> Object:
    """Serves HTTP on port 80."""
    pod = echo_pod(name, node, probe=False)
    pod["spec"]["containers"][0]["command"] = ["python3", "-c", SERVE]
    return pod


def there(cluster: Cluster, resource: Resource, namespace: str, name: str) -> Object | None:
    try:
        return cluster.api.get(resource.path(namespace, name))
    except ApiRefused as exc:
        if exc.status == HTTPStatus.NOT_FOUND:
            return None
        raise


def tell(cluster: Cluster, objects: list[Object]) -> dict[str, dict[str, tuple[str, str]]]:
    return {obj["kind"]: conditions_of(cluster.api, obj) for obj in objects if obj["kind"] in BOUND}


def programmed(cluster: Cluster, waypoint: Object) -> tuple[str, str]:
    return conditions_of(cluster.api, waypoint).get("Programmed", ("", ""))


def test_a_gateway_is_deployed_told_of_bound_to_and_goes_with_all_that_is_its(mesh: Cluster, shop: str) -> None:
    waypoint = gateway("waypoint", shop, "more")
    objects = rules(shop)
    apply(mesh.api, overlay("more", shop, podDisruptionBudget={"spec": {"minAvailable": 1}}, horizontalPodAutoscaler={}))
    for obj in (waypoint, *objects):
        apply(mesh.api, obj)
    wait_until(lambda: programmed(mesh, waypoint) == ("True", "Programmed"), "the waypoint is programmed")
    service = there(mesh, RESOURCES["Service"], shop, "waypoint")
    assert service is not None
    hostname = f"waypoint.{shop}.svc.cluster.local"
    assert {each["value"] for each in status_of(mesh.api, waypoint)["addresses"]} == {*service["spec"]["clusterIPs"], hostname}
    assert "istio-waypoint" in mesh.kubectl("get", "gatewayclass")
    for resource in DEPLOYED:
        found = there(mesh, resource, shop, "waypoint")
        assert found is not None
        assert found["metadata"]["ownerReferences"][0]["kind"] == "Gateway"
    with suppress(AssertionError):
        wait_until(lambda: all(BOUND[kind].items() <= told.items() for kind, told in tell(mesh, objects).items()), "all are told", 30)
    for kind, told in tell(mesh, objects).items():
        assert BOUND[kind].items() <= told.items(), (kind, told)
    mesh.api.delete(RESOURCES["Gateway"].path(shop, "waypoint"))
    wait_until(lambda: all(there(mesh, resource, shop, "waypoint") is None for resource in DEPLOYED), "all of it is gone")
    wait_until(lambda: conditions_of(mesh.api, objects[0])["istio.io/WaypointBound"] == ("False", "WaypointIsNotReady"), "nothing is bound")


def test_what_somebody_else_made_is_left_alone(mesh: Cluster, shop: str) -> None:
    theirs = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "waypoint", "namespace": shop}}
    mesh.api.apply(theirs)
    waypoint = gateway("waypoint", shop)
    apply(mesh.api, waypoint)
    wait_until(lambda: programmed(mesh, waypoint) == ("False", "Invalid"), "the Gateway says that something is in its way")
    assert there(mesh, DEPLOYMENTS, shop, "waypoint") is None
    found = there(mesh, RESOURCES["ServiceAccount"], shop, "waypoint")
    assert found is not None
    assert "ownerReferences" not in found["metadata"]


def test_requests_pass_the_waypoint_and_are_judged_by_it(mesh: Cluster, shop: str) -> None:
    waypoint = gateway("waypoint", shop)
    apply(mesh.api, waypoint)
    apply(mesh.api, of("Service", "web", shop, {"ports": [{"name": "http", "port": 80}], "selector": {"app": "web"}}))
    denied = {"targetRefs": [{"group": "", "kind": "Service", "name": "web"}], "action": "DENY"}
    denied["rules"] = [{"to": [{"operation": {"paths": ["/secret"]}}]}]
    apply(mesh.api, of("AuthorizationPolicy", "web", shop, denied))
    apply_pods(mesh, shop, web_pod("web", "n1"), echo_pod("client", "n2"))
    wait_captured(mesh, shop, 2)
    wait_until(lambda: programmed(mesh, waypoint) == ("True", "Programmed"), "the waypoint is programmed")

    def ask(path: str) -> str:
        return mesh.exec(shop, "client", "python3", "-c", ASK, path, check=False).strip()

    wait_until(lambda: ask("/secret") == "403", "the policy holds")
    assert ask("/") == "200"


def test_requests_are_treated_as_the_demo_claims_also_when_the_waypoint_comes_is_replaced_and_goes(mesh: Cluster) -> None:
    with open_shop(mesh) as shop:
        assert "waypoint shop/waypoint is ready!" in meshctl(mesh, "waypoint", "apply", "-n", "shop", "--enroll-namespace", "--wait").stdout
        wait_until(lambda: passes(shop), "requests pass the waypoint")
        report = Report()
        RequestClaims(shop, report).run()
        assert report.failed == 0, "the output says which claims failed, and what was seen"
        with visiting(shop) as visitors:
            mesh.kubectl("label", "namespace", "shop", f"{USE_WAYPOINT}-")
            wait_until(lambda: not passes(shop), "requests go directly")
            meshctl(mesh, "waypoint", "delete", "waypoint", "-n", "shop")
            wait_until(lambda: not shop.waypoints(), "the waypoint's pods are gone")
            print(visitors.check())


def passes(shop: ClusterShop) -> bool:
    """Whether a request is in the waypoint's access log: it has a path of its own."""
    path = f"/pass-{uuid.uuid4()}"
    answer = shop.run("client", "python3", "apps/ask.py", f"http://web.shop{path}")
    assert '"status": 200' in answer, answer
    return shop.settle(lambda: any(path in line for lines in shop.waypoint_logs().values() for line in lines), 2)

"""The mesh after a node's reboot, and with two control planes of which one dies."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from tests.cluster.harness.api import Object, condition, path_of
from tests.cluster.harness.client import Cluster, wait_until
from tests.cluster.harness.keeper import all_ready
from tests.cluster.mesh import SYSTEM, captured, label, wait_captured, wait_rolled_out
from tests.cluster.workloads import addresses, apply_pods, attempt, echo_pod

NAMESPACE = "faults"
LEASE = f"/apis/coordination.k8s.io/v1/namespaces/{SYSTEM}/leases/istiod-py-leader"


@pytest.fixture(scope="module")
def pods(mesh: Cluster) -> Iterator[dict[str, Object]]:
    with mesh.namespace(NAMESPACE) as namespace:
        made = apply_pods(mesh, namespace, echo_pod("client", "n1"), echo_pod("server", "n2"))
        label(mesh, namespace)
        wait_captured(mesh, namespace, 2)
        yield made


def istiods(cluster: Cluster) -> dict[str, Object]:
    return {pod["metadata"]["name"]: pod for pod in cluster.api.list("Pod", SYSTEM, labelSelector="app=istiod")}


def leader(cluster: Cluster) -> str:
    """The pod that holds the lease; empty for none."""
    return str(cluster.api.get(LEASE)["spec"].get("holderIdentity") or "").rpartition("_")[0]


@pytest.fixture
def two_control_planes(mesh: Cluster, pods: dict[str, Object]) -> Iterator[None]:
    scale = path_of("Deployment", "istiod", SYSTEM)
    mesh.api.patch(scale, {"spec": {"replicas": 2}})
    wait_rolled_out(mesh)
    yield
    mesh.api.patch(scale, {"spec": {"replicas": 1}})
    wait_rolled_out(mesh)


def test_of_two_control_planes_the_other_goes_on_when_the_leader_dies(
    mesh: Cluster, pods: dict[str, Object], two_control_planes: None
) -> None:
    first = wait_until(lambda: leader(mesh) in istiods(mesh) and leader(mesh), "one of the two leads")
    dead = istiods(mesh)[first]
    mesh.api.delete(path_of("Pod", first, SYSTEM), gracePeriodSeconds=0)
    for pid in mesh.node_of(dead).pod_processes(dead["metadata"]["uid"]):
        os.kill(pid, signal.SIGKILL)
    apply_pods(mesh, NAMESPACE, echo_pod("later", "n1"))
    (later,) = (pod for pod in wait_captured(mesh, NAMESPACE, 3) if pod["metadata"]["name"] == "later")
    wait_until(lambda: attempt(mesh, later, addresses(pods["server"])[0]) == "hello", "a pod that came meanwhile speaks")
    wait_until(lambda: leader(mesh) not in ("", first), "another leads")
    path = f"/apis/security.istio.io/v1/namespaces/{NAMESPACE}/authorizationpolicies"
    spec = {"action": "DENY", "rules": [{"from": [{"source": {"namespaces": ["nowhere"]}}]}]}
    body = {"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": {"name": "nobody"}, "spec": spec}
    mesh.api.create(path, body)
    wait_until(lambda: condition(mesh.api.get(f"{path}/nobody"), "ZtunnelAccepted"), "the new leader writes statuses")
    mesh.api.delete(f"{path}/nobody")
    mesh.api.delete(path_of("Pod", "later", NAMESPACE))


def test_pods_of_a_rebooted_node_are_captured_anew(mesh: Cluster, pods: dict[str, Object]) -> None:
    mesh.stop("n2")
    mesh.start("n2")

    def server() -> Object:
        found = mesh.api.find("Pod", "server", NAMESPACE)
        assert found is not None
        return found

    wait_until(lambda: server()["status"]["containerStatuses"][0]["restartCount"] > 0 and condition(server(), "Ready"), "it runs again")
    wait_until(lambda: all_ready(mesh.api, len(mesh.nodes)), "the node is ready")
    wait_rolled_out(mesh)
    wait_until(lambda: captured(server()) and "table inet istio-ambient-nat" in tables(mesh, server()), "its pod is captured")
    for address in addresses(server()):
        wait_until(lambda address=address: attempt(mesh, pods["client"], address) == "hello", f"{address} answers")


def tables(cluster: Cluster, pod: Object) -> str:
    return cluster.in_pod(pod, "nft", "list", "tables")

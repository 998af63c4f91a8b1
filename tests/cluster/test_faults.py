"""The mesh after a node's reboot, with two control planes of which one dies, and with processes that have no descriptors left."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cluster.harness.api import Object, condition, path_of
from tests.cluster.harness.client import Cluster, wait_until
from tests.cluster.harness.keeper import all_ready
from tests.cluster.mesh import SYSTEM, agent_of, captured, label, processes, wait_captured, wait_rolled_out
from tests.cluster.workloads import addresses, apply_pods, attempt, echo_pod, loading

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
    start = len(status_writers(mesh))
    with deny_nobody(mesh):
        wait_until(lambda: len(status_writers(mesh)) > start, "the audit log tells who wrote")
    assert set(status_writers(mesh)[start:]) == {first}
    dead = istiods(mesh)[first]
    mesh.api.delete(path_of("Pod", first, SYSTEM), gracePeriodSeconds=0)
    for pid in mesh.node_of(dead).pod_processes(dead["metadata"]["uid"]):
        os.kill(pid, signal.SIGKILL)
    apply_pods(mesh, NAMESPACE, echo_pod("later", "n1"))
    (later,) = (pod for pod in wait_captured(mesh, NAMESPACE, 3) if pod["metadata"]["name"] == "later")
    wait_until(lambda: attempt(mesh, later, addresses(pods["server"])[0]) == "hello", "a pod that came meanwhile speaks")
    second = wait_until(lambda: leader(mesh) not in ("", first) and leader(mesh), "another leads")
    start = len(status_writers(mesh))
    with deny_nobody(mesh):
        wait_until(lambda: len(status_writers(mesh)) > start, "the audit log tells who wrote")
    assert set(status_writers(mesh)[start:]) == {second}
    mesh.api.delete(path_of("Pod", "later", NAMESPACE))


@contextmanager
def deny_nobody(cluster: Cluster) -> Iterator[None]:
    """A policy that is in force, as its status says."""
    path = f"/apis/security.istio.io/v1/namespaces/{NAMESPACE}/authorizationpolicies"
    spec = {"action": "DENY", "rules": [{"from": [{"source": {"namespaces": ["nowhere"]}}]}]}
    body = {"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": {"name": "nobody"}, "spec": spec}
    cluster.api.create(path, body)
    try:
        wait_until(lambda: condition(cluster.api.get(f"{path}/nobody"), "ZtunnelAccepted"), "the leader writes the status")
        yield
    finally:
        cluster.api.delete(f"{path}/nobody")


def status_writers(cluster: Cluster) -> list[str]:
    """The control plane's pod that wrote it, for every status of an AuthorizationPolicy so far."""
    found = []
    for line in cluster.home.audit.read_text().splitlines():
        event = json.loads(line) if line.endswith("}") else {}
        reference = event.get("objectRef", {})
        if (reference.get("resource"), reference.get("subresource")) == ("authorizationpolicies", "status"):
            found += event["user"]["extra"]["authentication.kubernetes.io/pod-name"]
    return found


# Processes without descriptors. Nothing of theirs may end for it, nor may they turn in circles.


@contextmanager
def exhausted(pids: list[int], user: int = 0) -> Iterator[None]:
    """While the block runs these processes, of this user, get no new descriptor."""
    before = {pid: limit_of(pid) for pid in pids}
    try:
        for pid, (_, hard) in before.items():
            set_limit(pid, lowest_free(pid), hard, user)
        yield
    finally:
        for pid, (soft, hard) in before.items():
            set_limit(pid, soft, hard, user)


def lowest_free(pid: int) -> int:
    """The lowest number that no descriptor has for long: with it as limit the process gets no other."""
    found = []
    for _ in range(20):
        taken = {int(number) for number in os.listdir(f"/proc/{pid}/fd")}
        found.append(next(number for number in itertools.count() if number not in taken))
        time.sleep(0.05)
    return min(found)


def limit_of(pid: int) -> tuple[int, int]:
    (line,) = (line for line in Path(f"/proc/{pid}/limits").read_text().splitlines() if line.startswith("Max open files"))
    soft, hard = line.split()[3:5]
    return int(soft), int(hard)


def set_limit(pid: int, soft: int, hard: int, user: int) -> None:
    """As the process's own user: a container's root may not change the limits of others' processes without CAP_SYS_RESOURCE."""
    become = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"] if user else []
    subprocess.run([*become, "prlimit", f"--pid={pid}", f"--nofile={soft}:{hard}"], check=True, capture_output=True)


def share_of_cpu(pids: list[int], during: Callable[[], None]) -> float:
    """What the processes took of one CPU meanwhile."""
    began, before = time.monotonic(), sum(map(cpu_seconds, pids))
    during()
    return (sum(map(cpu_seconds, pids)) - before) / (time.monotonic() - began)


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_movers_without_descriptors_let_new_connections_wait_and_say_so(mesh: Cluster, pods: dict[str, Object]) -> None:
    movers = processes(mesh, "n1", "mover", spare=True)
    agent = agent_of(mesh, "n1")["metadata"]["name"]
    with loading(mesh, pods["client"], addresses(pods["server"])[0], held=20) as load:
        load.go_on()
        with exhausted(movers):
            wait_until(lambda: "accept.failed" in mesh.logs(SYSTEM, agent, "--all-containers", "--since=10s"), "the log says it")
            answered = load.answered
            share = share_of_cpu(movers, lambda: time.sleep(2))
            assert load.answered == answered, "none is served meanwhile, or this would show nothing"
        load.go_on(80)
        assert (load.lost, load.refused) == ([], []), "what came meanwhile waited"
    assert share < 0.5 * len(movers)
    assert processes(mesh, "n1", "mover", spare=True) == movers


def test_a_control_plane_without_descriptors_comes_back(mesh: Cluster, pods: dict[str, Object]) -> None:
    ((name, pod),) = istiods(mesh).items()
    pids = [
        pid for pid in mesh.node_of(pod).pod_processes(pod["metadata"]["uid"]) if b"istiod" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    user = Path(f"/proc/{pids[0]}").stat().st_uid
    with loading(mesh, pods["client"], addresses(pods["server"])[0], held=20) as load:
        load.go_on()
        with exhausted(pids, user):
            wait_until(lambda: "accept.failed" in mesh.logs(SYSTEM, name, "--since=10s"), "the log says it")
            share = share_of_cpu(pids, lambda: time.sleep(2))
            wait_until(lambda: not condition(istiods(mesh)[name], "Ready"), "it is not ready")
        wait_rolled_out(mesh)
        with deny_nobody(mesh):
            load.go_on()
        assert (load.lost, load.refused) == ([], [])
    assert share < 0.5
    (after,) = istiods(mesh).values()
    assert [status["restartCount"] for status in after["status"]["containerStatuses"]] == [0]


# The last one: the pods have other addresses after it.


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

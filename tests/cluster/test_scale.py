"""Many pods at once, and what the mesh takes of time and memory."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from tests.cluster.figures import Figures
from tests.cluster.harness.api import Object, condition
from tests.cluster.harness.client import Cluster, wait_until
from tests.cluster.harness.images import PAUSE
from tests.cluster.mesh import SYSTEM, apply, captured, label, remove, wait_captured, wait_released
from tests.cluster.workloads import apply_pods, echo_pod, tunnelled

HUNDRED = 100
TWO_HUNDRED = 200


def idle(name: str, namespace: str, replicas: int) -> Object:
    """So many pods that do nothing."""
    pod = {"terminationGracePeriodSeconds": 0, "containers": [{"name": "pause", "image": PAUSE, "imagePullPolicy": "Never"}]}
    template = {"metadata": {"labels": {"app": name}}, "spec": pod}
    spec = {"replicas": replicas, "selector": {"matchLabels": {"app": name}}, "template": template}
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name, "namespace": namespace}, "spec": spec}


def wait_gone(cluster: Cluster, namespace: str) -> None:
    wait_until(lambda: cluster.api.find("Namespace", namespace) is None, f"{namespace} is gone", 180)


def test_a_labelled_namespace_speaks_mutual_tls_soon_after_the_installation(cluster: Cluster, figures: Figures, tmp_path: Path) -> None:
    remove(cluster, tmp_path)
    with cluster.namespace("early") as namespace:
        label(cluster, namespace)
        pods = apply_pods(cluster, namespace, echo_pod("client", "n1"), echo_pod("server", "n2"))
        began = time.monotonic()
        apply(cluster, tmp_path)
        wait_until(lambda: all(map(captured, cluster.api.list("Pod", namespace))), "its pods are captured")
        wait_until(lambda: tunnelled(cluster, pods["client"], pods["server"]), "traffic is tunnelled")
        figures.note("kubectl apply -k deploy/ to the first mutual TLS", f"{time.monotonic() - began:.1f} s")


def test_one_pod_and_a_hundred_are_captured_soon_after_the_label(mesh: Cluster, figures: Figures) -> None:
    with mesh.namespace("few") as namespace:
        apply_pods(mesh, namespace, echo_pod("one", "n1"))
        figures.note("label to capture, 1 pod", f"{time_capture(mesh, namespace, 1):.2f} s")
    with mesh.namespace("many") as namespace:
        mesh.api.apply(idle("idle", namespace, HUNDRED))
        mesh.wait_ready(namespace, patience=240)
        wait_until(lambda: sum(condition(pod, "Ready") for pod in mesh.api.list("Pod", namespace)) == HUNDRED, "a hundred are ready", 240)
        figures.note("label to capture, 100 pods", f"{time_capture(mesh, namespace, HUNDRED):.2f} s")
        note_memory(mesh, figures, f"{HUNDRED} captured pods")
        label(mesh, namespace, None)
        wait_released(mesh, namespace)
    wait_gone(mesh, "many")


def time_capture(cluster: Cluster, namespace: str, count: int) -> float:
    """Seconds until so many pods say that they are captured."""
    began = time.monotonic()
    label(cluster, namespace)
    wait_captured(cluster, namespace, count)
    return time.monotonic() - began


def test_two_hundred_pods_made_at_once_are_all_captured(mesh: Cluster, figures: Figures) -> None:
    with mesh.namespace("crowd") as namespace:
        label(mesh, namespace)
        began = time.monotonic()
        mesh.api.apply(idle("idle", namespace, TWO_HUNDRED))

        def all_there() -> list[Object]:
            pods = mesh.api.list("Pod", namespace)
            return pods if sum(condition(pod, "Ready") and captured(pod) for pod in pods) == TWO_HUNDRED else []

        pods = wait_until(all_there, "two hundred pods are ready and captured", 280)
        figures.note("200 pods made at once, all ready and captured", f"{time.monotonic() - began:.1f} s")
        note_memory(mesh, figures, f"{TWO_HUNDRED} captured pods")
        assert sum(status["restartCount"] for pod in pods for status in pod["status"]["containerStatuses"]) == 0
    wait_gone(mesh, "crowd")


def note_memory(cluster: Cluster, figures: Figures, when: str) -> None:
    for pod in cluster.api.list("Pod", SYSTEM):
        shares = {}
        for pid in cluster.node_of(pod).pod_processes(pod["metadata"]["uid"]):
            with contextlib.suppress(OSError):
                rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
                shares[pid] = next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
        name, node = pod["metadata"]["labels"]["app"], pod["spec"]["nodeName"]
        figures.note(f"memory of {name} on {node}, {when}", f"{sum(shares.values()) / 1024:.0f} MB in {len(shares)} processes")

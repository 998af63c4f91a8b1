"""The mesh on a test cluster: installed from deploy/ as users do it, and what tests ask of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mesh.model.labels import DATAPLANE_MODE, REDIRECTION
from meshctl_py.lab.wiretap import Segment, decode_segments
from tests.cluster.harness.api import Object, condition, path_of
from tests.cluster.harness.client import Cluster, Node, wait_until
from tests.cluster.harness.images import PROJECT

REPOSITORY = Path(__file__).resolve().parents[2]
SYSTEM = "istio-system"
WORKERS = (("Deployment", "istiod"), ("DaemonSet", "ztunnel"))


def overlay(directory: Path, base: Path = REPOSITORY / "deploy", **images: str) -> Path:
    """A kustomization in ``directory`` of what ``base`` has, with images of the test cluster; ``images`` adds to the project's."""
    directory.mkdir(parents=True, exist_ok=True)
    chosen = {"ambient-mesh": PROJECT, **{name.replace("_", "/"): image for name, image in images.items()}}
    entries = [dict(zip(("newName", "newTag"), image.rsplit(":", 1), strict=True)) | {"name": name} for name, image in chosen.items()]
    # JSON is YAML. Kustomize takes directories outside its own by relative paths only.
    relative = os.path.relpath(base, directory.resolve())
    (directory / "kustomization.yaml").write_text(json.dumps({"resources": [relative], "images": entries}))
    return directory


def install(cluster: Cluster, directory: Path) -> None:
    """``kubectl apply -k``, and wait until it is rolled out."""
    cluster.kubectl("apply", "-k", str(overlay(directory)))
    wait_rolled_out(cluster)


def uninstall(cluster: Cluster, directory: Path) -> None:
    cluster.kubectl("delete", "-k", str(overlay(directory)), "--ignore-not-found", "--wait=true", timeout=180)


def wait_rolled_out(cluster: Cluster, patience: float = 120) -> None:
    """Until every replica and every node's agent is of the present template, ready, and no other is left."""
    wait_until(lambda: all(rolled_out(cluster, kind, name) for kind, name in WORKERS), "the mesh is rolled out", patience)


def rolled_out(cluster: Cluster, kind: str, name: str) -> bool:
    found = cluster.api.find(kind, name, SYSTEM)
    if found is None or found["status"].get("observedGeneration") != found["metadata"]["generation"]:
        return False
    status = found["status"]
    if kind == "DaemonSet":
        wanted = status["desiredNumberScheduled"]
        done = {status.get("updatedNumberScheduled", 0), status.get("numberReady", 0), status.get("numberAvailable", 0)}
    else:
        wanted = found["spec"]["replicas"]
        done = {status.get(each, 0) for each in ("replicas", "updatedReplicas", "readyReplicas", "availableReplicas")}
    selector = ",".join(f"{key}={value}" for key, value in found["spec"]["selector"]["matchLabels"].items())
    return (
        done == {wanted} and (kind != "DaemonSet" or wanted > 0) and len(cluster.api.list("Pod", SYSTEM, labelSelector=selector)) == wanted
    )


def label(cluster: Cluster, namespace: str, mode: str | None = "ambient") -> None:
    """Label a namespace for the mesh, or with None take the label away."""
    cluster.api.patch(path_of("Namespace", namespace), {"metadata": {"labels": {DATAPLANE_MODE: mode}}})


def captured(pod: Object) -> bool:
    return pod["metadata"].get("annotations", {}).get(REDIRECTION) == "enabled"


def wait_captured(cluster: Cluster, namespace: str, count: int, patience: float = 60) -> list[Object]:
    """Until so many pods of a namespace say that they are captured; all of them."""

    def all_captured() -> list[Object]:
        pods = [pod for pod in cluster.api.list("Pod", namespace) if captured(pod)]
        return pods if len(pods) >= count else []

    return wait_until(all_captured, f"{count} pods of {namespace} are captured", patience)


def wait_released(cluster: Cluster, namespace: str, patience: float = 60) -> None:
    wait_until(lambda: not any(map(captured, cluster.api.list("Pod", namespace))), f"no pod of {namespace} is captured", patience)


def agent_of(cluster: Cluster, node: str) -> Object:
    """The agent's pod on a node: the ready one, of several."""
    found = cluster.api.list("Pod", SYSTEM, labelSelector="app=ztunnel", fieldSelector=f"spec.nodeName={node}")
    return next(pod for pod in found if condition(pod, "Ready"))


def access_log(cluster: Cluster, node: str) -> list[str]:
    """What the node's agent wrote of connections, a line each."""
    lines = cluster.logs(SYSTEM, agent_of(cluster, node)["metadata"]["name"]).splitlines()
    return [line for line in lines if "\taccess\t" in line]


class Tap:
    """Listens on the wire of a node from the time it is made."""

    def __init__(self, node: Node, interface: str = "eth0") -> None:
        command = ["nsenter", f"--net=/proc/{node.pid}/ns/net", sys.executable, "-m", "meshctl_py.lab.wiretap", interface]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "listening\n"

    def heard(self) -> list[Segment]:
        """The segments since the last time."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return decode_segments(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()


@contextmanager
def tapping(node: Node) -> Iterator[Tap]:
    tap = Tap(node)
    try:
        yield tap
    finally:
        tap.close()

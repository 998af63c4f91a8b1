"""The mesh on a test cluster: installed from deploy/ as users do it, and what tests ask of it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from mesh.model.labels import DATAPLANE_MODE, REDIRECTION
from meshctl_py.lab.wiretap import Segment, decode_segments
from tests.cluster.harness.api import Object, condition, path_of
from tests.cluster.harness.build import build_parts
from tests.cluster.harness.client import Cluster, Node, wait_until
from tests.cluster.harness.images import PROJECT

REPOSITORY = Path(__file__).resolve().parents[2]
SYSTEM = "istio-system"
Key = tuple[str, str, str]
WORKERS = (("Deployment", "istiod"), ("DaemonSet", "ztunnel"))


def objects(text: str) -> dict[Key, dict[str, Any]]:
    """Manifests by kind, namespace and name. Fails if two have the same."""
    found: dict[Key, dict[str, Any]] = {}
    for item in YAML(typ="safe", pure=True).load_all(text):
        if item is not None:
            key = (item["kind"], item["metadata"].get("namespace", ""), item["metadata"]["name"])
            assert key not in found
            found[key] = item
    return found


def kustomized() -> dict[Key, dict[str, Any]]:
    """What ``kubectl apply -k deploy/`` applies."""
    command = [str(build_parts().kubectl), "kustomize", str(REPOSITORY / "deploy")]
    return objects(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


PROJECT_IMAGE = {"ambient-mesh": PROJECT}


Patch = tuple[str, str, Sequence[tuple[str, Any]]]
"""Kind and name of an object, and what is to be added at which places of it."""


def overlay(
    directory: Path, base: Path = REPOSITORY / "deploy", images: Mapping[str, str] = PROJECT_IMAGE, patches: Sequence[Patch] = ()
) -> Path:
    """A kustomization in ``directory`` of what ``base`` has, with images of the test cluster."""
    directory.mkdir(parents=True, exist_ok=True)
    entries = [dict(zip(("newName", "newTag"), image.rsplit(":", 1), strict=True)) | {"name": name} for name, image in images.items()]
    # JSON is YAML. Kustomize takes directories outside its own by relative paths only.
    relative = os.path.relpath(base, directory.resolve())
    changes = [
        {
            "target": {"kind": kind, "name": name},
            "patch": json.dumps([{"op": "add", "path": path, "value": value} for path, value in additions]),
        }
        for kind, name, additions in patches
    ]
    (directory / "kustomization.yaml").write_text(json.dumps({"resources": [relative], "images": entries, "patches": changes}))
    return directory


def apply(cluster: Cluster, directory: Path, patches: Sequence[Patch] = ()) -> None:
    """``kubectl apply -k``. What is there already stays as it is."""
    wait_until(lambda: not _ending(cluster), "the last mesh is gone")
    cluster.kubectl("apply", "-k", str(overlay(directory, patches=patches)))


def install(cluster: Cluster, directory: Path) -> None:
    """`apply`, and wait until it is rolled out."""
    apply(cluster, directory)
    wait_rolled_out(cluster)


def _ending(cluster: Cluster) -> bool:
    namespace = cluster.api.find("Namespace", SYSTEM)
    return namespace is not None and "deletionTimestamp" in namespace["metadata"]


def remove(cluster: Cluster, directory: Path) -> None:
    """`uninstall` for those whom the way of it does not concern, and in half the time: a namespace whose agents take a while to end is not
    looked at again for as long as they may take."""
    workers = [f"{kind.lower()}/{name}" for kind, name in WORKERS]
    cluster.kubectl("delete", "-n", SYSTEM, *workers, "--cascade=foreground", "--ignore-not-found", "--wait=true", timeout=180)
    uninstall(cluster, directory)


def uninstall(cluster: Cluster, directory: Path) -> None:
    """``kubectl delete -k``, as its users do."""
    cluster.kubectl("delete", "-k", str(overlay(directory)), "--ignore-not-found", "--wait=true", timeout=180)


def meshctl(cluster: Cluster, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """``meshctl`` as the cluster's user runs it, with its output as text."""
    command = [sys.executable, "-m", "meshctl_py", *arguments, "--kubeconfig", str(cluster.kubeconfig)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL, cwd=REPOSITORY)
    assert not check or done.returncode == 0, f"meshctl {' '.join(arguments)}: {done.stdout}{done.stderr}"
    return done


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
    """The agent's pod on a node: a ready one, if there is any."""
    found = cluster.api.list("Pod", SYSTEM, labelSelector="app=ztunnel", fieldSelector=f"spec.nodeName={node}")
    assert found, f"there is no agent on {node}"
    return max(found, key=lambda pod: condition(pod, "Ready"))


def processes(cluster: Cluster, node: str, kind: str = "", *, spare: bool = False) -> list[int]:
    """The processes of a node's agent, as the host counts: brain, movers, supervisor, or all of its container; ``spare``: with the mover
    that runs beside it."""
    pod = agent_of(cluster, node)
    found = {}
    for pid in cluster.node(node).pod_processes(pod["metadata"]["uid"]):
        with contextlib.suppress(OSError):
            found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    return [pid for pid, argv in found.items() if argv[0] != "/pause" and (spare or "spare" not in argv) and (not kind or kind in argv)]


def access_log(cluster: Cluster, node: str) -> list[str]:
    """What the node's agent wrote of connections, a line each."""
    lines = cluster.logs(SYSTEM, agent_of(cluster, node)["metadata"]["name"], "--all-containers").splitlines()
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

"""The shop of examples/two-nodes on a test cluster, where the claims of ``make demo`` about requests are tried too."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from mesh.model.labels import DATAPLANE_MODE, GATEWAY_NAME
from meshctl_py.lab.client import Popen
from meshctl_py.lab.demo.examples import EXAMPLES, read_example
from meshctl_py.lab.demo.report import Unmet
from tests.cluster.harness.api import Object, condition
from tests.cluster.harness.client import PATIENCE, Cluster
from tests.cluster.harness.images import PROJECT
from tests.cluster.mesh import objects, wait_captured

NAMESPACE = "shop"
REPLACED_WITHIN = 180.0
"""Seconds: two pods start, and two may take half a minute each to end."""
_PLACE = "/srv"
_APPS = "apps"
"""A directory in the example, a ConfigMap on the cluster; beside it programs of the example run."""


class ClusterShop:
    """A `meshctl_py.lab.demo.requests.Shop`."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def run(self, pod: str, *command: str) -> str:
        return self._cluster.exec(NAMESPACE, pod, *command, check=False).strip()

    def start(self, pod: str, *command: str) -> Popen:
        exec_there = self._cluster.kubectl_command("exec", "-i", "-n", NAMESPACE, pod, "--", *command)
        return subprocess.Popen(exec_there, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    @contextmanager
    def applied(self, file: str, **values: str) -> Iterator[None]:
        text = read_example(file, **values)
        self._cluster.apply(text)
        try:
            yield
        finally:
            self._cluster.kubectl("delete", "-f", "-", "--ignore-not-found", stdin=text)

    def settle(self, seen: Callable[[], bool], patience: float = PATIENCE) -> bool:
        deadline = time.monotonic() + patience
        while not seen():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.2)
        return True

    def waypoint_logs(self) -> Mapping[str, Sequence[str]]:
        return {name: self._cluster.logs(NAMESPACE, name).splitlines() for name in self._names(self.waypoints(), ready=True)}

    def replace_waypoints(self) -> str:
        """As an upgrade does."""
        before = self._names(self.waypoints())
        self._cluster.kubectl("rollout", "restart", "deployment/waypoint", "-n", NAMESPACE)

        def replaced() -> bool:
            pods = self.waypoints()
            now = self._names(pods)
            return not now & before and len(now) == len(before) and self._names(pods, ready=True) == now

        if not self.settle(replaced, REPLACED_WITHIN):
            raise Unmet(f"instead of {before} there are {self._names(self.waypoints())}")
        return f"{len(before)} pods rolled out anew"

    def waypoints(self) -> list[Object]:
        """Pods of the waypoint, those that end too."""
        return self._cluster.api.list("Pod", NAMESPACE, labelSelector=f"{GATEWAY_NAME}=waypoint")

    @staticmethod
    def _names(pods: list[Object], *, ready: bool = False) -> set[str]:
        return {str(pod["metadata"]["name"]) for pod in pods if not ready or (condition(pod, "Ready") and not _ends(pod))}


def _ends(pod: Object) -> bool:
    return "deletionTimestamp" in pod["metadata"]


@contextmanager
def open_shop(cluster: Cluster) -> Iterator[ClusterShop]:
    """The shop and its versions, in the mesh."""
    with cluster.namespace(NAMESPACE, **{DATAPLANE_MODE.replace("/", "__"): "ambient"}):
        apps = {path.name: path.read_text() for path in (EXAMPLES / "two-nodes" / _APPS).glob("*.py")}
        cluster.api.apply({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": _APPS, "namespace": NAMESPACE}, "data": apps})
        pods = 0
        for file in ("two-nodes/shop.yaml", "two-nodes-waypoint/versions.yaml"):
            for (kind, _, _), obj in objects(read_example(file)).items():
                if kind == "Pod":
                    _equip(obj)
                    pods += 1
                if kind != "Namespace":
                    cluster.api.apply(obj)
        cluster.wait_ready(NAMESPACE)
        wait_captured(cluster, NAMESPACE, pods)
        yield ClusterShop(cluster)


def _equip(pod: dict[str, Any]) -> None:
    """With the image that has all that the programs need, and the programs where the lab's pods find them."""
    spec = pod["spec"]
    spec["terminationGracePeriodSeconds"] = 0
    spec["volumes"] = [{"name": _APPS, "configMap": {"name": _APPS}}]
    for container in spec["containers"]:
        container |= {"image": PROJECT, "imagePullPolicy": "Never", "workingDir": _PLACE}
        container["volumeMounts"] = [{"name": _APPS, "mountPath": f"{_PLACE}/{_APPS}"}]

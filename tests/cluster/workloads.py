"""Pods for tests, and the load that runs between them."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mesh.model.ports import INBOUND_HBONE
from tests.cluster.harness.api import Object
from tests.cluster.harness.client import PATIENCE, Cluster, wait_until
from tests.cluster.harness.images import PYTHON
from tests.cluster.mesh import access_log

LOAD = Path(__file__).with_name("load.py")
PORT = 7000
ATTEMPT = """
import socket, sys
try:
    with socket.create_connection((sys.argv[1], int(sys.argv[2])), 3) as sock:
        sock.sendall(b"hello")
        print(sock.recv(5).decode() or "closed")
except OSError as exc:
    print(type(exc).__name__)
"""
"""One connection: ``hello`` when it was echoed, ``closed`` or the error when not."""


def echo_pod(name: str, node: str, *, probe: bool = True, account: str = "default", **labels: str) -> Object:
    """A pod that echoes on PORT, IPv4 and IPv6; `apply_pods` gives it its namespace. The same program can drive a load from it."""
    container: Object = {
        "name": "echo",
        "image": PYTHON,
        "imagePullPolicy": "Never",
        "command": ["python3", "-c", LOAD.read_text(), "serve", str(PORT)],
    }
    if probe:
        container["readinessProbe"] = {"tcpSocket": {"port": PORT}, "periodSeconds": 1}
    metadata = {"name": name, "labels": {"app": name, **labels}}
    spec = {"nodeName": node, "serviceAccountName": account, "terminationGracePeriodSeconds": 0, "containers": [container]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def apply_pods(cluster: Cluster, namespace: str, *pods: Object) -> dict[str, Object]:
    """Make them and wait until they are ready; by name, as they are then."""
    for pod in pods:
        cluster.api.apply({**pod, "metadata": {**pod["metadata"], "namespace": namespace}})
    ready = cluster.wait_ready(namespace, *(pod["metadata"]["name"] for pod in pods))
    return {pod["metadata"]["name"]: pod for pod in ready}


def service(name: str, namespace: str, port: int = PORT) -> Object:
    """A Service of the pods whose label ``app`` is its name, on both families."""
    spec = {"selector": {"app": name}, "ipFamilyPolicy": "PreferDualStack", "ports": [{"port": port, "targetPort": PORT}]}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": namespace}, "spec": spec}


def addresses(pod: Object) -> list[str]:
    """IPv4 first."""
    return [entry["ip"] for entry in pod["status"]["podIPs"]]


def attempt(cluster: Cluster, pod: Object, host: str, port: int = PORT) -> str:
    """What comes of one connection from a pod; see `ATTEMPT`."""
    return cluster.in_pod(pod, sys.executable, "-c", ATTEMPT, host, str(port)).strip()


def tunnelled(cluster: Cluster, client: Object, server: Object) -> bool:
    """Whether a connection from one pod to the other, which is made here, comes through a tunnel."""
    node = server["spec"]["nodeName"]
    before = _tunnels(cluster, node)
    return attempt(cluster, client, addresses(server)[0]) == "hello" and _tunnels(cluster, node) > before


def _tunnels(cluster: Cluster, node: str) -> int:
    """How many the node's agent wrote of that came in."""
    return sum(f":{INBOUND_HBONE}" in line and 'direction="inbound"' in line for line in access_log(cluster, node))


class Load:
    """``load.py drive`` in a pod's network namespace. Run by the host: neither kubelet nor API server are needed for it."""

    def __init__(self, cluster: Cluster, pod: Object, host: str, *, port: int = PORT, held: int = 50, rate: float = 20) -> None:
        command = cluster.pod_command(pod, sys.executable, str(LOAD), "drive", host, str(port), str(held), str(rate))
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.lost: list[dict[str, Any]] = []
        self.refused: list[dict[str, Any]] = []
        self.last: dict[str, Any] = {}
        self.began: dict[str, Any] = {}
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        wait_until(lambda: self.began or not self._reader.is_alive(), "the load's connections are open")
        assert self.began == {"held": held, "lost_early": 0}, (self.began, self.lost)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            event = json.loads(line)
            if "lost_early" in event:
                self.began = event
            elif "tick" in event:
                self.last = event
            elif "refused" in event:
                self.refused.append(event)
            else:
                self.lost.append(event)

    @property
    def alive(self) -> int:
        """Held connections that live."""
        return int(self.began["held"]) - len(self.lost)

    @property
    def answered(self) -> int:
        """New connections that were served so far."""
        return int(self.last.get("answered", 0))

    def go_on(self, answers: int = 40, patience: float = PATIENCE) -> None:
        """Until so many more new connections were answered: two seconds' worth, if all is well."""
        start = self.answered
        wait_until(lambda: self.answered >= start + answers, f"{answers} more connections are answered", patience)

    def refused_for(self) -> float:
        """Seconds from the first refused connection to the last one's answer, 0 for none."""
        return max((r["refused"] + r["took"] for r in self.refused), default=0.0) - min((r["refused"] for r in self.refused), default=0.0)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()


@contextmanager
def loading(cluster: Cluster, pod: Object, host: str, *, port: int = PORT, held: int = 50, rate: float = 20) -> Iterator[Load]:
    load = Load(cluster, pod, host, port=port, held=held, rate=rate)
    try:
        yield load
    finally:
        load.close()


def now() -> float:
    """Comparable with the times of a load."""
    return time.time()

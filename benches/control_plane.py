"""``python -m benches.control_plane``: the control plane on an API server with 10 000 pods and 1 000 services.

Prints how long it takes to be ready, what it weighs, and how long one changed pod takes to an agent. The API server is the fake of the
tests, in a process of its own, with objects of real size: what is measured is ours, not how fast a real one is filled.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any, Final

import trio

from mesh.rpc.tls import client_tls
from mesh.testing.kube import FakeApiServer
from mesh.xds.client import AdsClientConfig, AdsUpdate, connect_tls, run_ads_client
from mesh.xds.names import node_id

PODS: Final = 10_000
SERVICES: Final = 1_000
CHANGES: Final = 20
_WITHIN: Final = 300.0
_PORT: Final = 25012


def make_pod(index: int, address: str) -> dict[str, Any]:
    """About 9 KB of JSON: a pod of a Deployment with two containers, as a kubelet and three controllers leave it."""
    app = f"app-{index % SERVICES}"
    container = {
        "image": f"registry.example.com/team/{app}@sha256:" + "0123456789abcdef" * 4,
        "env": [{"name": f"SETTING_{number}", "value": "x" * 40} for number in range(20)],
        "ports": [{"name": "http", "containerPort": 8080, "protocol": "TCP"}],
        "resources": {"requests": {"cpu": "100m", "memory": "128Mi"}, "limits": {"memory": "256Mi"}},
        "volumeMounts": [{"name": "kube-api-access", "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount", "readOnly": True}],
        "readinessProbe": {"httpGet": {"path": "/ready", "port": 8080, "scheme": "HTTP"}, "periodSeconds": 10, "timeoutSeconds": 1},
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": f"{app}-5d8f7c9b6d-{index:05x}",
            "generateName": f"{app}-5d8f7c9b6d-",
            "namespace": f"team-{index % 50}",
            "labels": {"app": app, "version": "v1", "pod-template-hash": "5d8f7c9b6d"},
            "annotations": {"prometheus.io/scrape": "true", "ambient.istio.io/redirection": "enabled"},
            "ownerReferences": [
                {"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": f"{app}-5d8f7c9b6d", "uid": "u", "controller": True}
            ],
            "managedFields": [
                {"manager": f"manager-{number}", "fieldsV1": {f"f:{field}": {} for field in range(60)}} for number in range(3)
            ],
        },
        "spec": {
            "nodeName": f"node-{index % 100}",
            "serviceAccountName": app,
            "containers": [{"name": "main", **container}, {"name": "side", **container}],
            "tolerations": [{"key": f"key-{number}", "operator": "Exists", "effect": "NoExecute"} for number in range(4)],
        },
        "status": {
            "phase": "Running",
            "podIP": address,
            "podIPs": [{"ip": address}],
            "conditions": [
                {"type": kind, "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"}
                for kind in ("Initialized", "Ready", "ContainersReady", "PodScheduled")
            ],
            "containerStatuses": [{"name": name, "ready": True, "imageID": "sha256:" + "f" * 64} for name in ("main", "side")],
        },
    }


def make_service(index: int) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": f"app-{index}", "namespace": f"team-{index % 50}"},
        "spec": {
            "clusterIP": f"10.96.{index // 250}.{index % 250 + 1}",
            "selector": {"app": f"app-{index}"},
            "ports": [{"name": "http", "port": 80, "targetPort": "http"}],
        },
    }


def address_of(index: int) -> str:
    return f"10.{index >> 16}.{index >> 8 & 255}.{index & 255}"


async def serve_api(directory: Path) -> None:
    """The API server's process: a line on standard input changes the pod of that number."""
    api = FakeApiServer()
    for namespace in ("istio-system", *(f"team-{index}" for index in range(50))):
        api.put({"kind": "Namespace", "metadata": {"name": namespace}})
    for index in range(SERVICES):
        api.put(make_service(index))
    for index in range(PODS):
        api.put(make_pod(index, address_of(index)))
    extra = {"authentication.kubernetes.io/pod-name": ["ztunnel"], "authentication.kubernetes.io/pod-uid": ["uid-ztunnel"]}
    user = {"username": "system:serviceaccount:istio-system:ztunnel", "groups": ["system:serviceaccounts"], "extra": extra}
    api.tokens["agent"] = {"authenticated": True, "audiences": ["istio-ca"], "user": user}
    agent = make_pod(0, "10.255.0.1")
    agent["metadata"] |= {"name": "ztunnel", "namespace": "istio-system", "uid": "uid-ztunnel", "labels": {"app": "ztunnel"}}
    agent["spec"]["serviceAccountName"] = "ztunnel"
    api.put(agent)
    async with trio.open_nursery() as nursery:
        access = await nursery.start(api.run_tcp)
        text = "{current-context: c, contexts: [{name: c, context: {cluster: c}}], clusters: [{name: c, cluster: {server: SERVER}}]}"
        (directory / "draft").write_text(text.replace("SERVER", f"'http://127.0.0.1:{access.port}'"))
        (directory / "draft").rename(directory / "kubeconfig")
        async for data in trio.lowlevel.FdStream(os.dup(0)):
            for number in data.split():
                api.put(make_pod(int(number), "10.200.0." + str(int(number) % 250 + 1)))
        nursery.cancel_scope.cancel()


def memory(pid: int, what: str) -> int:
    """MB of a process: ``VmRSS`` now, or ``VmHWM``, the most there has been."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith(what))


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wait_exists(path: Path) -> None:
    deadline = time.monotonic() + _WITHIN
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} does not come"
        time.sleep(0.05)


class Heard:
    """What the agent was told."""

    def __init__(self) -> None:
        self.workloads = 0
        self._news = trio.Event()

    def take(self, update: AdsUpdate) -> None:
        self.workloads += len(update.delta.workloads)
        self._news.set()
        self._news = trio.Event()

    async def wait_more(self, count: int) -> None:
        with trio.fail_after(_WITHIN):
            while self.workloads < count:
                await self._news.wait()


async def measure(root: str, pid: int, changes: IO[bytes], started: float) -> None:
    heard = Heard()
    connect = connect_tls("127.0.0.1", _PORT, lambda: client_tls(root), server_hostname="localhost")
    config = AdsClientConfig(connect, lambda: {"authorization": "Bearer agent"}, node_id("", "ztunnel", "istio-system"), {})
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run_ads_client, config, heard.take)
        await heard.wait_more(PODS + 1)
        print(f"{PODS} pods, {SERVICES} services: an agent has them {time.monotonic() - started:.1f} s after the start")
        print(f"memory: {memory(pid, 'VmRSS')} MB, {memory(pid, 'VmHWM')} MB at most; CPU: {cpu_seconds(pid):.1f} s")
        times: list[float] = []
        before = cpu_seconds(pid)
        for index in range(CHANGES):
            wanted, began = heard.workloads + 1, time.monotonic()
            changes.write(f"{index}\n".encode())
            changes.flush()
            await heard.wait_more(wanted)
            times.append((time.monotonic() - began) * 1000)
            assert heard.workloads == wanted, "only the changed pod is pushed"
            await trio.sleep(0.2)  # the next is a change of its own
        cpu = (cpu_seconds(pid) - before) / CHANGES * 1000
        spread = f"{min(times):.0f} to {max(times):.0f} ms, median {statistics.median(times):.0f} ms"
        print(f"one changed pod to an agent: {spread}; CPU {cpu:.0f} ms each")
        print(f"memory afterwards: {memory(pid, 'VmRSS')} MB, {memory(pid, 'VmHWM')} MB at most")
        nursery.cancel_scope.cancel()


def run(directory: Path) -> None:
    api = subprocess.Popen([sys.executable, "-m", "benches.control_plane", str(directory)], stdin=subprocess.PIPE)
    istiod: subprocess.Popen[bytes] | None = None
    try:
        assert api.stdin is not None
        wait_exists(directory / "kubeconfig")
        started = time.monotonic()
        command = [sys.executable, "-m", "istiod_py", f"--kubeconfig={directory}/kubeconfig", f"--state-dir={directory}/state"]
        with (directory / "log").open("wb") as log:
            istiod = subprocess.Popen([*command, f"--listen=127.0.0.1:{_PORT}", "--monitoring=127.0.0.1:0"], stderr=log, stdout=log)
        wait_exists(directory / "state/root-cert.pem")
        trio.run(measure, (directory / "state/root-cert.pem").read_text(), istiod.pid, api.stdin, started)
    finally:
        for process in (istiod, api):
            if process is not None:
                process.kill()
                process.wait()


def main() -> None:
    if len(sys.argv) > 1:
        trio.run(serve_api, Path(sys.argv[1]))
        return
    with tempfile.TemporaryDirectory() as directory:
        run(Path(directory))


if __name__ == "__main__":
    main()

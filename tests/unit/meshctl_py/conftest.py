"""A cluster for the command line: an API server on the loopback, with a mesh on it that answers as the test says."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import h11
import msgspec
import pytest
import trio
from click.testing import CliRunner, Result

from mesh.kube.resources import Resource
from mesh.runtime.inspection import ControlPlanePage, Page, StatusPage
from mesh.testing.kube import FakeApiServer
from meshctl_py.__main__ import main

RBAC = "rbac.authorization.k8s.io"
MORE = (
    Resource(RBAC, "v1", "clusterroles", "ClusterRole", namespaced=False),
    Resource(RBAC, "v1", "clusterrolebindings", "ClusterRoleBinding", namespaced=False),
    Resource(RBAC, "v1", "roles", "Role"),
    Resource(RBAC, "v1", "rolebindings", "RoleBinding"),
    Resource("", "v1", "events", "Event"),
    Resource("apiextensions.k8s.io", "v1", "customresourcedefinitions", "CustomResourceDefinition", namespaced=False),
)
READY = [{"type": "Ready", "status": "True"}]


class Cluster:
    """``server`` may be looked at and changed while no command runs."""

    def __init__(self, server: FakeApiServer, kubeconfig: Path) -> None:
        self.server = server
        self.kubeconfig = kubeconfig
        self.asked: list[str] = []
        """What agents and control plane were asked for."""

    def run(self, *arguments: str) -> Result:
        return CliRunner().invoke(main, [*arguments, "--kubeconfig", str(self.kubeconfig)])

    def labels(self, kind: str, namespace: str, name: str) -> Mapping[str, str]:
        found = self.server.find(kind, namespace, name)
        assert found is not None
        labels: Mapping[str, str] = found["metadata"].get("labels", {})
        return labels

    def add_mesh(self, *nodes: str) -> None:
        """A mesh that is installed and well, with agents on these nodes."""
        ours = {"app.kubernetes.io/part-of": "ambient-mesh"}
        done: dict[str, Any] = {"observedGeneration": 1, "replicas": 1, "updatedReplicas": 1, "readyReplicas": 1, "availableReplicas": 1}
        count = len(nodes)
        agents = {"desiredNumberScheduled": count, "updatedNumberScheduled": count, "numberReady": count, "numberAvailable": count}
        place = {"namespace": "istio-system", "labels": ours}
        self.server.put({"kind": "Deployment", "metadata": {"name": "istiod", **place}, "spec": {"replicas": 1}, "status": done})
        self.server.put(
            {"kind": "DaemonSet", "metadata": {"name": "ztunnel", **place}, "spec": {}, "status": {**agents, "observedGeneration": 1}}
        )
        self.add_pod("istiod-1", "istiod", nodes[0], {15014: {"status": ControlPlanePage("0.1.0", True, workloads=3)}})
        for node in nodes:
            self.server.put({"kind": "Node", "metadata": {"name": node}})
            self.add_pod(f"ztunnel-{node}", "ztunnel", node, {15000: {"status": status_page(node)}})

    def add_pod(self, name: str, app: str, node: str, pages: Mapping[int, Mapping[str, Page]], *, ready: bool = True) -> None:
        status: dict[str, Any] = {"phase": "Running", "conditions": READY if ready else [], "containerStatuses": [{"name": app}]}
        metadata = {"name": name, "namespace": "istio-system", "labels": {"app": app}}
        self.server.put({"kind": "Pod", "metadata": metadata, "spec": {"nodeName": node}, "status": status})
        for port, answers in pages.items():
            self.serve(name, port, answers)

    def serve(self, pod: str, port: int, pages: Mapping[str, Page]) -> None:
        """What the pages below /debug/ answer."""

        async def answer(stream: trio.abc.Stream) -> None:
            http = h11.Connection(h11.SERVER)
            while not isinstance(event := http.next_event(), h11.Request):
                http.receive_data(bytes(await stream.receive_some(65536)))
            name = event.target.decode().removeprefix("/debug/").partition("?")[0]
            self.asked.append(event.target.decode())
            body = msgspec.json.encode(pages[name]) if name in pages else b"not found\n"
            head = h11.Response(status_code=200 if name in pages else 404, headers=[("content-length", str(len(body)))])
            await stream.send_all((http.send(head) or b"") + (http.send(h11.Data(data=body)) or b""))
            await stream.aclose()

        self.server.ports["istio-system", pod, port] = answer


def status_page(node: str, **fields: Any) -> StatusPage:
    page = StatusPage(node, "0.1.0", f"ztunnel-{node}", "istio-system", ready=True, connected=True, synced=True, pods={"captured": 2})
    return msgspec.structs.replace(page, **fields)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    server = FakeApiServer()
    server.served += MORE
    started = threading.Event()
    ended: list[trio.CancelScope] = []
    token: list[trio.lowlevel.TrioToken] = []
    port: list[int] = []

    async def serve() -> None:
        token.append(trio.lowlevel.current_trio_token())
        async with trio.open_nursery() as nursery:
            access = await nursery.start(server.run_tcp)
            port.append(access.port)
            ended.append(nursery.cancel_scope)
            started.set()

    thread = threading.Thread(target=trio.run, args=(serve,))
    thread.start()
    assert started.wait(10)
    kubeconfig = tmp_path / "kubeconfig"
    kubeconfig.write_text(
        f"""\
current-context: fake
contexts: [{{name: fake, context: {{cluster: fake, user: "", namespace: shop}}}}]
clusters: [{{name: fake, cluster: {{server: "http://127.0.0.1:{port[0]}"}}}}]
"""
    )
    yield Cluster(server, kubeconfig)
    token[0].run_sync_soon(ended[0].cancel)
    thread.join(10)

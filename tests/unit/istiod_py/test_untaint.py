"""A node's taint goes when the agent on it is ready; other taints, and other people's pods, count for nothing."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from istiod_py.untaint import TAINT, NodeUntainter
from mesh.kube.api import ApiClient
from mesh.kube.cluster import ClusterStore
from mesh.kube.kubeconfig import ClusterAccess
from mesh.testing.kube import FakeApiServer

OURS = {"key": TAINT, "effect": "NoSchedule"}
OTHER = {"key": "disk", "value": "full", "effect": "NoSchedule"}


def node(name: str, *taints: dict[str, str]) -> dict[str, Any]:
    return {"kind": "Node", "metadata": {"name": name}, "spec": {"podCIDR": "10.0.0.0/24", "taints": list(taints)}}


def agent(node: str, *, ready: bool = True, namespace: str = "istio-system", app: str = "ztunnel") -> dict[str, Any]:
    condition = {"type": "Ready", "status": "True" if ready else "False"}
    return {
        "kind": "Pod",
        "metadata": {"name": f"{app}-{node}", "namespace": namespace, "labels": {"app": app}},
        "spec": {"nodeName": node, "containers": [{"name": "c"}]},
        "status": {"phase": "Running", "podIP": "10.0.0.1", "conditions": [condition]},
    }


def with_untainter(server: FakeApiServer, test: Callable[[NodeUntainter], Awaitable[None]]) -> None:
    async def main() -> None:
        client = ApiClient(ClusterAccess("k", 443, tls=False), connect=server.connect)
        store = ClusterStore(client, ("Node", "Pod"))
        untainter = NodeUntainter(client, store, "istio-system")

        async def follow() -> None:
            while True:
                await store.wait_changed()
                untainter.notify()

        async with trio.open_nursery() as nursery:
            await nursery.start(server.run)
            nursery.start_soon(store.run)
            await store.wait_synced()
            nursery.start_soon(untainter.run)
            nursery.start_soon(follow)
            with trio.fail_after(100):
                await test(untainter)
            nursery.cancel_scope.cancel()

    trio.run(main, clock=MockClock(autojump_threshold=0))


def taints(server: FakeApiServer, name: str) -> list[dict[str, str]]:
    found = server.find("Node", "", name)
    assert found is not None
    assert found["spec"]["podCIDR"], "the rest of the node is left as it is"
    return found["spec"].get("taints") or []


def test_a_node_is_freed_once_its_agent_is_ready_and_keeps_its_other_taints() -> None:
    server = FakeApiServer()
    server.put(node("n1", OTHER, OURS, {"key": TAINT, "effect": "NoExecute"}))
    server.put(node("n2", OURS))
    server.put(agent("n1", ready=False))

    async def test(untainter: NodeUntainter) -> None:
        await wait_all_tasks_blocked()
        assert len(taints(server, "n1")) == 3
        server.put(agent("n1"))
        await server.wait_until(lambda: taints(server, "n1") == [OTHER])
        assert taints(server, "n2") == [OURS], "there is no agent"
        server.put(agent("n2"))
        await server.wait_until(lambda: taints(server, "n2") == [])

    with_untainter(server, test)


def test_a_pod_that_only_looks_like_an_agent_frees_no_node() -> None:
    server = FakeApiServer()
    server.put(node("n1", OURS))
    server.put(agent("n1", namespace="shop"))
    server.put(agent("n1", app="other"))

    async def test(untainter: NodeUntainter) -> None:
        await wait_all_tasks_blocked()
        assert taints(server, "n1") == [OURS]
        assert not [seen for seen in server.requests if seen.method == "PATCH"]

    with_untainter(server, test)


def test_an_api_server_that_refuses_is_asked_again() -> None:
    server = FakeApiServer()
    server.put(node("n1", OURS))

    async def test(untainter: NodeUntainter) -> None:
        server.faults.refusals.append((409, "Conflict", {}))
        server.put(agent("n1"))
        await server.wait_until(lambda: taints(server, "n1") == [])

    with_untainter(server, test)

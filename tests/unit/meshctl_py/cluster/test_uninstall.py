"""Agents are waited for until they have let go, and what they could not release is said."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import pytest
import trio
from trio.testing import MockClock

from mesh.kube.api import ApiClient
from mesh.kube.kubeconfig import ClusterAccess
from mesh.testing.kube import FakeApiServer
from meshctl_py.cluster.errors import ClusterProblem
from meshctl_py.cluster.manifests import PART_OF, PROJECT
from meshctl_py.cluster.uninstall import release_pods


def run(test: Callable[[FakeApiServer, ApiClient], Awaitable[None]]) -> None:
    async def main() -> None:
        server = FakeApiServer()
        server.put({"kind": "DaemonSet", "metadata": {"name": "ztunnel", "namespace": "istio-system", "labels": {PART_OF: PROJECT}}})
        agent = {"name": "ztunnel-n1", "namespace": "istio-system", "labels": {"app": "ztunnel"}}
        server.put({"kind": "Pod", "metadata": agent, "spec": {"nodeName": "n1"}})
        captured = {"name": "web", "namespace": "shop", "annotations": {"ambient.istio.io/redirection": "enabled"}}
        server.put({"kind": "Pod", "metadata": captured, "spec": {"nodeName": "n1"}})
        client = ApiClient(ClusterAccess("kubernetes", 443, tls=False), connect=server.connect)
        async with trio.open_nursery() as nursery:
            await nursery.start(server.run)
            await test(server, client)
            nursery.cancel_scope.cancel()

    trio.run(main, clock=MockClock(autojump_threshold=0))


def test_it_is_waited_until_the_last_agent_is_gone() -> None:
    async def check(server: FakeApiServer, client: ApiClient) -> None:
        shown: list[str] = []

        async def end_agent() -> None:
            await trio.sleep(20)
            server.put({"kind": "Pod", "metadata": {"name": "web", "namespace": "shop"}, "spec": {"nodeName": "n1"}})
            server.remove("Pod", "istio-system", "ztunnel-n1")

        def show(pending: Sequence[tuple[str, str]]) -> None:
            shown.extend(name for name, _ in pending)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(end_agent)
            assert await release_pods(client, 60, show) == []
        assert trio.current_time() >= 20
        assert set(shown) == {"agent of n1"}
        assert server.find("DaemonSet", "istio-system", "ztunnel") is None

    run(check)


def test_a_pod_that_nobody_released_is_named() -> None:
    async def check(server: FakeApiServer, client: ApiClient) -> None:
        server.remove("Pod", "istio-system", "ztunnel-n1")
        assert await release_pods(client, 60, lambda pending: None) == [
            "pod shop/web still says that it is captured: its node n1 is gone; restart the pod"
        ]

    run(check)


def test_an_agent_that_does_not_end_stops_the_uninstallation_before_anything_else_goes() -> None:
    async def check(server: FakeApiServer, client: ApiClient) -> None:
        with pytest.raises(ClusterProblem, match=r"agents do not end within 60 s: ztunnel-n1 on n1\. The control plane is left as it is"):
            await release_pods(client, 60, lambda pending: None)

    run(check)

"""Who is believed, and what he may have: the real API server's tokens and reviews."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from istiod_py.authenticate import CONFIRM_EVERY
from mesh.model.identity import SpiffeId
from mesh.rpc import RpcError, Status
from mesh.rpc.tls import client_tls
from tests.cluster.control import SYSTEM, Agent, Control, config_for, request_token, run_pod, running, wait_for
from tests.cluster.harness.api import Object, path_of
from tests.cluster.harness.client import Cluster
from tests.cluster.harness.images import PYTHON

SHOP = "trust-shop"
WEB, DB = SpiffeId("cluster.local", SHOP, "web"), SpiffeId("cluster.local", SHOP, "db")


@dataclass
class Nodes:
    """An agent on each node, an application on each."""

    cluster: Cluster
    state: Path
    agents: dict[str, Object]
    web: Object

    def token(self, node: str = "n1") -> str:
        return request_token(self.cluster, SYSTEM, "ztunnel", self.agents[node])

    def run(self, check: Callable[[Control], Awaitable[None]]) -> None:
        async def main() -> None:
            async with running(config_for(self.cluster, self.state)) as control:
                await check(control)

        trio.run(main)


@pytest.fixture(scope="module")
def nodes(control_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    cluster = control_cluster
    with cluster.namespace(SYSTEM), cluster.namespace(SHOP):
        agents = {node: idle(cluster, SYSTEM, f"ztunnel-{node}", "ztunnel", node) for node in ("n1", "n2")}
        web = idle(cluster, SHOP, "web", "web", "n1")
        idle(cluster, SHOP, "db", "db", "n2")
        yield Nodes(cluster, tmp_path_factory.mktemp("state"), agents, web)


def idle(cluster: Cluster, namespace: str, name: str, account: str, node: str) -> Object:
    return run_pod(cluster, namespace, name, account, node, PYTHON, "sleep", "infinity")


def test_an_agent_gets_certificates_of_its_own_nodes_pods_and_of_no_others(nodes: Nodes) -> None:
    async def check(control: Control) -> None:
        for node, own, other in (("n1", WEB, DB), ("n2", DB, WEB)):
            chain = await control.request(own, nodes.token(node))
            assert chain[-1] == control.root
            with pytest.raises(RpcError, match="request impersonation authentication failure"):
                await control.request(other, nodes.token(node))

    nodes.run(check)


def test_a_projected_token_of_a_pod_is_believed_as_one_that_was_requested(nodes: Nodes) -> None:
    cluster = nodes.cluster
    projected = {"serviceAccountToken": {"path": "token", "audience": "istio-ca", "expirationSeconds": 3600}}
    main = {"name": "main", "image": PYTHON, "imagePullPolicy": "Never", "command": ["sleep", "infinity"]}
    main |= {"volumeMounts": [{"name": "token", "mountPath": "/token"}]}
    spec = {"nodeName": "n1", "serviceAccountName": "ztunnel", "terminationGracePeriodSeconds": 0, "containers": [main]}
    spec |= {"volumes": [{"name": "token", "projected": {"sources": [projected]}}]}
    cluster.api.apply({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "projected", "namespace": SYSTEM}, "spec": spec})
    cluster.wait_ready(SYSTEM, "projected")
    token = cluster.exec(SYSTEM, "projected", "cat", "/token/token")

    async def check(control: Control) -> None:
        assert await control.request(WEB, token)

    nodes.run(check)


def test_tokens_that_prove_no_agent_are_refused(nodes: Nodes) -> None:
    cluster, agent = nodes.cluster, nodes.agents["n1"]
    head = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "bound", "namespace": SYSTEM}}
    secret = cluster.api.apply(head)
    tokens = {
        "nonsense": "nonsense",
        "of an application": request_token(cluster, SHOP, "web", nodes.web),
        "for the API server": request_token(cluster, SYSTEM, "ztunnel", agent, audience=""),
        "for somebody else": request_token(cluster, SYSTEM, "ztunnel", agent, audience="vault"),
        "bound to nothing": request_token(cluster, SYSTEM, "ztunnel"),
        "bound to a Secret": request_token(cluster, SYSTEM, "ztunnel", {**secret, "kind": "Secret"}),
        "with another signature": nodes.token()[:-6] + "AAAAAA",
    }

    async def check(control: Control) -> None:
        for name, token in tokens.items():
            with pytest.raises(RpcError, match="request authenticate failure") as refusal:
                await control.request(WEB, token)
            assert refusal.value.status is Status.UNAUTHENTICATED, name

    nodes.run(check)


def test_a_stolen_token_dies_with_its_pod_and_so_does_the_stream_it_opened(nodes: Nodes) -> None:
    cluster = nodes.cluster

    async def check(control: Control) -> None:
        thief = await trio.to_thread.run_sync(idle, cluster, SYSTEM, "short-lived", "ztunnel", "n1")
        token = request_token(cluster, SYSTEM, "ztunnel", thief)
        assert await control.request(WEB, token)
        agent = Agent()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(agent.run, control, lambda: token)
            await agent.until(lambda: agent.synced, "the agent is told everything")
            cluster.api.delete(path_of("Pod", "short-lived", SYSTEM))
            began = trio.current_time()
            await agent.until(lambda: bool(agent.failures), "its stream ends")
            assert "request authenticate failure" in agent.failures[0]
            # The pod has to be gone first, then a review and the moment that a pod is given to appear.
            assert trio.current_time() - began < CONFIRM_EVERY + 30
            with pytest.raises(RpcError, match="request authenticate failure"):
                await control.request(WEB, token)
            nursery.cancel_scope.cancel()

    nodes.run(check)


def test_an_account_that_is_deleted_takes_its_tokens_with_it(nodes: Nodes) -> None:
    cluster = nodes.cluster
    config = config_for(cluster, nodes.state, trusted_node_accounts=frozenset({f"{SYSTEM}/passing"}))

    async def main() -> None:
        async with running(config) as control:
            pod = await trio.to_thread.run_sync(idle, cluster, SYSTEM, "passing", "passing", "n1")
            token = request_token(cluster, SYSTEM, "passing", pod)
            assert await control.request(WEB, token)
            agent = Agent()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(agent.run, control, lambda: token)
                await agent.until(lambda: agent.synced, "the agent is told everything")
                cluster.api.delete(path_of("ServiceAccount", "passing", SYSTEM))
                await agent.until(lambda: bool(agent.failures), "its stream ends")
                assert "request authenticate failure" in agent.failures[0]
                nursery.cancel_scope.cancel()

    trio.run(main)


def test_the_key_is_kept_in_a_secret_and_the_root_published_and_mended(nodes: Nodes) -> None:
    cluster = nodes.cluster

    def published() -> str:
        found = cluster.api.find("ConfigMap", "istio-ca-root-cert", SHOP)
        return str(found["data"]["root-cert.pem"]) if found else ""

    async def main() -> None:
        async with running(config_for(cluster, nodes.state)) as control:
            root = control.root
            await wait_for(lambda: published() == root, "the root is published")
            path = path_of("ConfigMap", "istio-ca-root-cert", SHOP)
            cluster.api.patch(path, {"data": {"root-cert.pem": "forged"}})
            await wait_for(lambda: published() == root, "the forged root is mended")
            cluster.api.delete(path)
            await wait_for(lambda: published() == root, "the deleted root is back")
            secret = cluster.api.find("Secret", "istio-ca-secret", SYSTEM)
            assert secret is not None
            assert secret["type"] == "istio.io/ca-root"
        async with running(config_for(cluster, nodes.state, "another")) as control:
            assert control.root == root, "another replica has the same"
            assert client_tls(root)

    trio.run(main)

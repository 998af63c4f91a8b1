"""A whole control plane on an API server: who gets which certificate, what is published, and what a second replica does."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio

from istiod_py.app import run_istiod
from istiod_py.config import Config
from mesh.model.identity import SpiffeId
from mesh.rpc import RpcError, open_channel
from mesh.rpc.tls import client_tls
from mesh.testing.kube import FakeApiServer, Object
from mesh.tls.csr import make_request
from mesh.xds.client import AdsClientConfig, AdsState, Phase, connect_tls, run_ads_client
from mesh.xds.names import CREATE_CERTIFICATE_METHOD, node_id
from mesh.xds.proto.ca_pb2 import IstioCertificateRequest, IstioCertificateResponse

SHOP = "shop"


def pod(name: str, node: str, account: str, namespace: str = SHOP) -> Object:
    metadata = {"name": name, "namespace": namespace, "uid": f"uid-{name}"}
    spec = {"nodeName": node, "serviceAccountName": account, "containers": [{"name": "c", "image": "i"}]}
    return {"kind": "Pod", "apiVersion": "v1", "metadata": metadata, "spec": spec, "status": {"phase": "Running", "podIP": "10.0.0.1"}}


def review(name: str, account: str = "ztunnel", namespace: str = "istio-system", **changes: Any) -> Object:
    extra = {"authentication.kubernetes.io/pod-name": [name], "authentication.kubernetes.io/pod-uid": [f"uid-{name}"]}
    user = {"username": f"system:serviceaccount:{namespace}:{account}", "groups": ["system:serviceaccounts"], "extra": extra}
    return {"authenticated": True, "audiences": ["istio-ca"], "user": user, **changes}


@dataclass
class Cluster:
    api: FakeApiServer
    directory: Path
    kubeconfig: Path
    agents: str = ""

    def config(self, replica: str = "one", **changes: Any) -> Config:
        return Config(
            None,
            self.directory / replica,
            listen="127.0.0.1:0",
            monitoring="127.0.0.1:0",
            debounce=0.02,
            kubeconfig=str(self.kubeconfig),
            replica=replica,
            **changes,
        )

    def root(self, namespace: str = SHOP) -> str:
        found = self.api.find("ConfigMap", namespace, "istio-ca-root-cert")
        return found["data"]["root-cert.pem"] if found else ""

    async def wait_until(self, holds: Callable[[], bool]) -> None:
        with trio.fail_after(15):
            await self.api.wait_until(holds)

    async def request(self, account: str, token: str) -> list[str]:
        """Ask for a certificate of ``shop/account``."""
        identity = SpiffeId("cluster.local", SHOP, account)
        message = IstioCertificateRequest(csr=make_request(identity).csr_pem.decode(), validity_duration=3600)
        message.metadata.update({"ImpersonatedIdentity": str(identity)})
        host, port = self.agents.rsplit(":", 1)
        root = (self.directory / "one" / "root-cert.pem").read_text()
        async with open_channel(host, int(port), ssl_context=client_tls(root), server_hostname="localhost") as channel:
            metadata = {"authorization": f"Bearer {token}"}
            answer = await channel.unary(CREATE_CERTIFICATE_METHOD, message.SerializeToString(), metadata=metadata, timeout=10)
        return list(IstioCertificateResponse.FromString(answer).cert_chain)


@asynccontextmanager
async def running(cluster: Cluster, config: Config | None = None) -> AsyncIterator[trio.Nursery]:
    async with trio.open_nursery() as nursery:
        with trio.fail_after(15):
            started = await nursery.start(run_istiod, config or cluster.config())
        (cluster.agents,) = started.agents
        yield nursery
        nursery.cancel_scope.cancel()


def run(directory: Path, check: Callable[[Cluster], Awaitable[None]]) -> None:
    async def main() -> None:
        api = FakeApiServer()
        async with trio.open_nursery() as nursery:
            access = await nursery.start(api.run_tcp)
            kubeconfig = directory / "config"
            kubeconfig.write_text(
                "{current-context: c, contexts: [{name: c, context: {cluster: c}}], "
                f"clusters: [{{name: c, cluster: {{server: 'http://127.0.0.1:{access.port}'}}}}]}}"
            )
            for namespace in ("istio-system", SHOP, "kube-public"):
                api.put({"kind": "Namespace", "metadata": {"name": namespace}})
            api.put(pod("agent-1", "n1", "ztunnel", "istio-system"))
            api.put(pod("web", "n1", "web"))
            api.put(pod("db", "n2", "db"))
            api.tokens["agent-1"] = review("agent-1")
            await check(Cluster(api, directory, kubeconfig))
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_an_agent_gets_certificates_of_its_own_nodes_pods_only(tmp_path: Path) -> None:
    async def check(cluster: Cluster) -> None:
        async with running(cluster):
            chain = await cluster.request("web", "agent-1")
            assert chain[-1] == (tmp_path / "one" / "root-cert.pem").read_text()
            with pytest.raises(RpcError, match="impersonation"):
                await cluster.request("db", "agent-1")

    run(tmp_path, check)


def test_only_the_living_pod_of_a_trusted_account_is_believed(tmp_path: Path) -> None:
    async def check(cluster: Cluster) -> None:
        bound = review("agent-1")
        cluster.api.tokens |= {
            "application": review("web", "web", SHOP),
            "replaced": review(
                "agent-1", user={**bound["user"], "extra": {**bound["user"]["extra"], "authentication.kubernetes.io/pod-uid": ["old"]}}
            ),
            "unbound": review("agent-1", user={**bound["user"], "extra": {}}),
            "of-another-pod": review("web"),
            "elsewhere": review(
                "agent-1", user={**bound["user"], "extra": {**bound["user"]["extra"], "authentication.kubernetes.io/node-name": ["n2"]}}
            ),
            "for-the-api": review("agent-1", audiences=["api"]),
            "person": review("agent-1", user={**bound["user"], "username": "admin"}),
        }
        async with running(cluster):
            for token in ("nonsense", *cluster.api.tokens.keys() - {"agent-1"}):
                with pytest.raises(RpcError, match="request authenticate failure"):
                    await cluster.request("web", token)
            cluster.api.remove("Pod", "istio-system", "agent-1")
            with trio.fail_after(15):
                await wait_refused(cluster)

    async def wait_refused(cluster: Cluster) -> None:
        while True:
            try:
                await cluster.request("web", "agent-1")
            except RpcError:
                return

    run(tmp_path, check)


def test_a_token_is_reviewed_once_for_many_requests(tmp_path: Path) -> None:
    async def check(cluster: Cluster) -> None:
        async with running(cluster):
            for _ in range(3):
                await cluster.request("web", "agent-1")
            (asked,) = [seen for seen in cluster.api.requests if seen.path.endswith("tokenreviews")]
            assert asked.body["spec"]["audiences"] == ["istio-ca"]

    run(tmp_path, check)


def test_a_revoked_token_ends_its_living_stream_but_an_api_server_that_is_away_ends_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("istiod_py.app.CONFIRM_EVERY", 0.05)

    def reviews(cluster: Cluster) -> int:
        return len([seen for seen in cluster.api.requests if seen.path.endswith("tokenreviews")])

    async def check(cluster: Cluster) -> None:
        states: list[AdsState] = []
        refused = trio.Event()

        def take(state: AdsState) -> None:
            states.append(state)
            if "authenticate failure" in state.reason:
                refused.set()

        async with running(cluster) as nursery:
            host, port = cluster.agents.rsplit(":", 1)
            root = (tmp_path / "one" / "root-cert.pem").read_text()
            connect = connect_tls(host, int(port), lambda: client_tls(root), server_hostname="localhost")
            config = AdsClientConfig(connect, lambda: {"authorization": "Bearer agent-1"}, node_id("", "ztunnel-1", "istio-system"), {})
            nursery.start_soon(run_ads_client, config, lambda update: None, take)
            await cluster.wait_until(lambda: reviews(cluster) > 3)
            cluster.api.faults.refusals += [(503, "ServiceUnavailable", {})] * 40
            cluster.api.cut_watches()
            await cluster.wait_until(lambda: not cluster.api.faults.refusals)
            assert not [state for state in states if state.phase is Phase.FAILED]
            del cluster.api.tokens["agent-1"]
            with trio.fail_after(15):
                await refused.wait()

    run(tmp_path, check)


def test_the_root_is_published_in_every_namespace_and_mended(tmp_path: Path) -> None:
    async def check(cluster: Cluster) -> None:
        async with running(cluster):
            await cluster.wait_until(lambda: bool(cluster.root() and cluster.root("istio-system")))
            assert cluster.root() == (tmp_path / "one" / "root-cert.pem").read_text()
            assert not cluster.root("kube-public")
            cluster.api.put({"kind": "Namespace", "metadata": {"name": "new"}})
            await cluster.wait_until(lambda: cluster.root("new") == cluster.root())
            drifted = {"name": "istio-ca-root-cert", "namespace": SHOP}
            cluster.api.put({"kind": "ConfigMap", "metadata": drifted, "data": {"root-cert.pem": "forged"}})
            await cluster.wait_until(lambda: cluster.root() == cluster.root("new"))
            cluster.api.remove("ConfigMap", SHOP, "istio-ca-root-cert")
            await cluster.wait_until(lambda: cluster.root() == cluster.root("new"))

    run(tmp_path, check)


def test_replicas_and_restarts_share_one_root_and_one_leader(tmp_path: Path) -> None:
    async def check(cluster: Cluster) -> None:
        async with running(cluster, cluster.config("one")), running(cluster, cluster.config("two")):
            roots = {(tmp_path / replica / "root-cert.pem").read_text() for replica in ("one", "two")}
            assert len(roots) == 1
            await cluster.wait_until(lambda: bool(cluster.root()))
            lease = cluster.api.find("Lease", "istio-system", "istiod-py-leader")
            assert lease is not None
            assert lease["spec"]["holderIdentity"].startswith("one_")
        lease = cluster.api.find("Lease", "istio-system", "istiod-py-leader")
        assert lease is not None
        assert lease["spec"]["holderIdentity"] == ""
        async with running(cluster, cluster.config("three")):
            assert (tmp_path / "three" / "root-cert.pem").read_text() in roots

    run(tmp_path, check)


def test_key_sets_are_in_a_secret_for_replicas_and_restarts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fetch(url: str, *, limit: int, within: float) -> bytes:
        await trio.lowlevel.checkpoint()
        return b'{"keys":[]}'

    monkeypatch.setattr("istiod_py.jwks.fetch", fetch)

    async def check(cluster: Cluster) -> None:
        rule = {"issuer": "https://issuer.test", "jwksUri": "https://issuer.test/keys"}
        spec = {"targetRefs": [{"kind": "Service", "group": "", "name": "web"}], "jwtRules": [rule]}
        cluster.api.put({"kind": "RequestAuthentication", "metadata": {"name": "tokens", "namespace": SHOP}, "spec": spec})
        async with running(cluster):
            await cluster.wait_until(lambda: cluster.api.find("Secret", "istio-system", "istiod-py-key-sets") is not None)
        cluster.api.requests.clear()
        async with running(cluster, cluster.config("two")):
            seen = [request.method for request in cluster.api.requests if request.path.endswith("/secrets/istiod-py-key-sets")]
            assert seen[:1] == ["GET"], "read before it serves"

    run(tmp_path, check)


def test_policies_say_whether_agents_enforce_them(tmp_path: Path) -> None:
    def put(cluster: Cluster, **rule: Any) -> None:
        metadata = {"name": "p", "namespace": SHOP}
        spec = {"action": "DENY", "rules": [rule]}
        cluster.api.put({"kind": "AuthorizationPolicy", "apiVersion": "security.istio.io/v1", "metadata": metadata, "spec": spec})

    def conditions(cluster: Cluster) -> list[Object]:
        found = cluster.api.find("AuthorizationPolicy", SHOP, "p")
        return found.get("status", {}).get("conditions", []) if found else []

    async def check(cluster: Cluster) -> None:
        put(cluster, **{"from": [{"source": {"namespaces": ["a"]}}]})
        async with running(cluster):
            await cluster.wait_until(lambda: bool(conditions(cluster)))
            (condition,) = conditions(cluster)
            assert condition.pop("lastTransitionTime")
            wanted = {
                "type": "ZtunnelAccepted",
                "status": "True",
                "reason": "Accepted",
                "message": "attached to ztunnel",
                "observedGeneration": 1,
            }
            assert condition == wanted
            put(cluster, form=[])
            await cluster.wait_until(lambda: bool(conditions(cluster)) and conditions(cluster)[0]["reason"] == "Invalid")
            writes = len([seen for seen in cluster.api.requests if seen.path.endswith("/authorizationpolicies/p/status")])
            put(cluster, **{"from": [{"source": {"namespaces": ["b"]}}]})
            await cluster.wait_until(lambda: bool(conditions(cluster)) and conditions(cluster)[0]["reason"] == "Accepted")
            assert writes == 2

    run(tmp_path, check)


def test_while_the_api_server_is_away_agents_go_on_being_served(tmp_path: Path) -> None:
    async def check(cluster: Cluster) -> None:
        async with running(cluster):
            await cluster.request("web", "agent-1")
            cluster.api.faults.down = True
            cluster.api.cut_watches()
            assert await cluster.request("web", "agent-1")

    run(tmp_path, check)

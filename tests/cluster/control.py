"""A control plane of this process on a test cluster's API server, and node agents as it sees them: tokens, streams, requests."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import trio

from istiod_py.app import Started, run_istiod
from istiod_py.config import Config
from mesh.model.identity import SpiffeId
from mesh.rpc import open_channel
from mesh.rpc.tls import client_tls
from mesh.tls.csr import make_request
from mesh.xds.client import AdsClientConfig, AdsState, AdsUpdate, Phase, connect_tls, run_ads_client
from mesh.xds.names import CREATE_CERTIFICATE_METHOD, node_id
from mesh.xds.proto.ca_pb2 import IstioCertificateRequest, IstioCertificateResponse
from tests.cluster.harness.api import Object, path_of
from tests.cluster.harness.client import Cluster

SYSTEM = "control"
"""Namespace of everything that belongs to the control plane; it takes no part in a mesh that is installed beside it."""
PATIENCE = 60.0


def config_for(cluster: Cluster, state: Path, replica: str = "one", **changes: Any) -> Config:
    found = Config(
        None,
        state / replica,
        listen="127.0.0.1:0",
        monitoring="127.0.0.1:0",
        root_namespace=SYSTEM,
        debounce=0.1,
        kubeconfig=str(cluster.kubeconfig),
        trusted_node_accounts=frozenset({f"{SYSTEM}/ztunnel"}),
        replica=replica,
    )
    return replace(found, **changes)


@dataclass
class Control:
    """A running control plane."""

    config: Config
    started: Started

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.started.agents[0].rsplit(":", 1)
        return host, int(port)

    @property
    def root(self) -> str:
        return (self.config.state_dir / "root-cert.pem").read_text()

    async def get(self, path: str) -> str:
        """A page of the monitoring port."""
        host, port = self.started.monitoring[0].rsplit(":", 1)
        async with await trio.open_tcp_stream(host, int(port)) as stream:
            await stream.send_all(f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
            answer = b"".join([data async for data in stream])
        return answer.partition(b"\r\n\r\n")[2].decode()

    async def problems(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(await self.get("/debug/problems"))
        return found

    async def request(self, identity: SpiffeId, token: str) -> list[str]:
        """A certificate's chain. Raises RpcError."""
        message = IstioCertificateRequest(csr=make_request(identity).csr_pem.decode(), validity_duration=3600)
        message.metadata.update({"ImpersonatedIdentity": str(identity)})
        async with open_channel(*self.address, ssl_context=client_tls(self.root), server_hostname="localhost") as channel:
            metadata = {"authorization": f"Bearer {token}"}
            answer = await channel.unary(CREATE_CERTIFICATE_METHOD, message.SerializeToString(), metadata=metadata, timeout=20)
        return list(IstioCertificateResponse.FromString(answer).cert_chain)


@asynccontextmanager
async def running(config: Config) -> AsyncIterator[Control]:
    async with trio.open_nursery() as nursery:
        with trio.fail_after(PATIENCE):
            started = await nursery.start(run_istiod, config)
        yield Control(config, started)
        nursery.cancel_scope.cancel()


@dataclass
class Agent:
    """What a node agent hears."""

    updates: list[AdsUpdate] = field(default_factory=list)
    states: list[AdsState] = field(default_factory=list)
    _news: trio.Event = field(default_factory=trio.Event)

    async def run(self, control: Control, token: Callable[[], str]) -> None:
        """Until cancelled."""
        connect = connect_tls(*control.address, lambda: client_tls(control.root), server_hostname="localhost")
        config = AdsClientConfig(connect, lambda: {"authorization": f"Bearer {token()}"}, node_id("", "ztunnel", SYSTEM), {})
        await run_ads_client(config, self._take, self._note)

    @property
    def synced(self) -> bool:
        return bool(self.states) and self.states[-1].synced and self.states[-1].phase is Phase.CONNECTED

    @property
    def failures(self) -> list[str]:
        return [state.reason for state in self.states if state.phase is Phase.FAILED]

    def names(self) -> set[str]:
        """Of all workloads that were heard of and not removed."""
        found: set[str] = set()
        for update in self.updates:
            found |= {f"{workload.namespace}/{workload.name}" for workload in update.delta.workloads}
            found -= {"/".join(uid.split("/")[-2:]) for uid in update.delta.removed_addresses}
        return found

    async def until(self, holds: Callable[[], bool], what: str) -> None:
        with trio.move_on_after(PATIENCE):
            while not holds():
                await self._news.wait()
            return
        raise AssertionError(f"not within {PATIENCE:g} s: {what}; failures: {self.failures}")

    def _take(self, update: AdsUpdate) -> None:
        self.updates.append(update)
        self._tell()

    def _note(self, state: AdsState) -> None:
        self.states.append(state)
        self._tell()

    def _tell(self) -> None:
        self._news.set()
        self._news = trio.Event()


async def wait_for(holds: Callable[[], Any], what: str) -> Any:
    """The first true value of a function that may block."""
    deadline = trio.current_time() + PATIENCE
    while True:
        value = await trio.to_thread.run_sync(holds)
        if value:
            return value
        assert trio.current_time() < deadline, f"not within {PATIENCE:g} s: {what}"
        await trio.sleep(0.1)


def run_pod(cluster: Cluster, namespace: str, name: str, account: str, node: str, image: str, *command: str) -> Object:
    """A pod of one container, once it is ready."""
    cluster.api.apply({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": account, "namespace": namespace}})
    main = {"name": "main", "image": image, "imagePullPolicy": "Never", "command": list(command)}
    spec = {"nodeName": node, "serviceAccountName": account, "terminationGracePeriodSeconds": 0, "containers": [main]}
    cluster.api.apply({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": namespace}, "spec": spec})
    return {**cluster.wait_ready(namespace, name)[0], "kind": "Pod"}


def request_token(
    cluster: Cluster, namespace: str, account: str, bound: Object | None = None, audience: str = "istio-ca", seconds: int = 3600
) -> str:
    """A token as a kubelet projects it. ``bound``: to this object, a Pod or a Secret."""
    spec: dict[str, Any] = {"audiences": [audience] if audience else [], "expirationSeconds": seconds}
    if bound is not None:
        metadata: Mapping[str, Any] = bound["metadata"]
        spec["boundObjectRef"] = {"apiVersion": "v1", "kind": bound["kind"], "name": metadata["name"], "uid": metadata["uid"]}
    body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}
    token: str = cluster.api.create(f"{path_of('ServiceAccount', account, namespace)}/token", body)["status"]["token"]
    return token

"""The control plane's source on a real API server: the same messages as from files, and what it does while the API server is troubled."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from mesh.kube.api import ApiClient
from mesh.kube.cluster import ClusterStore
from mesh.kube.kubeconfig import ClusterAccess, find_access
from mesh.kube.objects import KubeObject
from mesh.kube.resources import RESOURCES
from tests.cluster.control import PATIENCE, SYSTEM, Agent, Control, config_for, request_token, run_pod, running, wait_for
from tests.cluster.harness.api import ApiRefused, Object
from tests.cluster.harness.client import Cluster, wait_until
from tests.cluster.harness.images import PYTHON
from tests.cluster.test_crds import DEFINITIONS, install_definitions, served
from tests.corpus import MESH, read_manifests
from tests.corpus.messages import load_directory, make_messages

SHOP = "source-shop"


def path_of(manifest: Object, subresource: str = "") -> str:
    metadata = manifest["metadata"]
    return RESOURCES[manifest["kind"]].path(metadata.get("namespace", ""), metadata["name"], subresource)


def create(cluster: Cluster, manifest: Object) -> Object:
    """With its status, and being deleted if it says so."""
    metadata = {key: value for key, value in manifest["metadata"].items() if key != "deletionTimestamp"}
    collection = RESOURCES[manifest["kind"]].collection(metadata.get("namespace", ""))
    made = cluster.api.create(collection, {**manifest, "metadata": metadata})
    if "status" in manifest:
        made = cluster.api.patch(path_of(manifest, "status"), {"status": manifest["status"]})
    if "deletionTimestamp" in manifest["metadata"]:
        made = cluster.api.delete(path_of(manifest))
    return made


def remove(cluster: Cluster, manifest: Object) -> None:
    try:
        if manifest["metadata"].get("finalizers"):
            cluster.api.patch(path_of(manifest), {"metadata": {"finalizers": None}})
        cluster.api.delete(path_of(manifest), gracePeriodSeconds=0)
    except ApiRefused as exc:
        if exc.status != 404:
            raise


@pytest.fixture
def corpus(control_cluster: Cluster) -> Iterator[Cluster]:
    """The corpus, and nobody who would make something of its pods and nodes."""
    cluster = control_cluster
    install_definitions(cluster)
    cluster.stop("kube-controller-manager")
    manifests = read_manifests(MESH)
    namespaces = [manifest for manifest in manifests if manifest["kind"] == "Namespace"]
    accounts = [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default", "namespace": namespace["metadata"]["name"]}}
        for namespace in namespaces
    ]
    first = ("Node", "Namespace", "ServiceAccount")
    ordered = sorted(manifests, key=lambda manifest: (manifest["kind"] not in first, str(manifest["metadata"]["name"])))
    ordered = [*namespaces, *accounts, *(manifest for manifest in ordered if manifest["kind"] != "Namespace")]
    try:
        for manifest in ordered:
            create(cluster, manifest)
        yield cluster
    finally:
        for manifest in reversed(ordered):
            remove(cluster, manifest)
        cluster.start("kube-controller-manager")


def test_an_api_server_gives_the_same_messages_as_files(corpus: Cluster) -> None:
    async def read() -> list[KubeObject]:
        async with trio.open_nursery() as nursery:
            client = ApiClient(find_access(str(corpus.kubeconfig)))
            store = ClusterStore(client)
            nursery.start_soon(store.run)
            with trio.fail_after(60):
                await store.wait_synced()
            assert store.problems == ()
            objects = store.objects()
            nursery.cancel_scope.cancel()
        await client.aclose()
        return objects

    found, wanted = make_messages(trio.run(read)), make_messages(load_directory(MESH))
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if found[name] != wanted[name]] == []


# A whole control plane


class Shop:
    """A namespace with an agent that follows the control plane."""

    def __init__(self, cluster: Cluster, state: Path, agent_pod: Object) -> None:
        self.cluster = cluster
        self.state = state
        self.agent_pod = agent_pod

    def token(self) -> str:
        return request_token(self.cluster, SYSTEM, "ztunnel", self.agent_pod)

    def run(self, check: Callable[[Control, Agent], Awaitable[None]], **changes: Any) -> None:
        token = self.token()

        async def main() -> None:
            async with running(config_for(self.cluster, self.state, **changes)) as control, trio.open_nursery() as nursery:
                agent = Agent()
                nursery.start_soon(agent.run, control, lambda: token)
                await agent.until(lambda: agent.synced, "the agent is told everything")
                await check(control, agent)
                nursery.cancel_scope.cancel()

        trio.run(main)

    def policy(self, name: str, spec: Any) -> None:
        head = {"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": {"name": name, "namespace": SHOP}}
        path = f"{RESOURCES['AuthorizationPolicy'].path(SHOP, name)}?fieldManager=tests&force=true"
        self.cluster.api.request("PATCH", path, {**head, "spec": spec}, "application/apply-patch+yaml")

    def condition(self, name: str) -> dict[str, Any]:
        found = self.cluster.api.get(RESOURCES["AuthorizationPolicy"].path(SHOP, name))
        conditions = found.get("status", {}).get("conditions") or [{}]
        condition: dict[str, Any] = conditions[0]
        return condition

    def entry(self, name: str) -> Object:
        """A WorkloadEntry: the cheapest thing that agents are told of."""
        head = {"apiVersion": "networking.istio.io/v1", "kind": "WorkloadEntry", "metadata": {"name": name, "namespace": SHOP}}
        return self.cluster.api.create(RESOURCES["WorkloadEntry"].collection(SHOP), {**head, "spec": {"address": "192.0.2.99"}})


@pytest.fixture
def shop(control_cluster: Cluster, tmp_path: Path) -> Iterator[Shop]:
    install_definitions(control_cluster)
    with control_cluster.namespace(SYSTEM), control_cluster.namespace(SHOP):
        agent = run_pod(control_cluster, SYSTEM, "ztunnel", "ztunnel", "n1", PYTHON, "sleep", "infinity")
        yield Shop(control_cluster, tmp_path, agent)


def test_while_the_api_server_is_away_the_last_state_is_served_and_nothing_is_pushed_twice(shop: Shop) -> None:
    cluster = shop.cluster

    async def check(control: Control, agent: Agent) -> None:
        shop.entry("before")
        await agent.until(lambda: f"{SHOP}/before" in agent.names(), "a new entry is told")
        told = ours(agent)
        heard = len(agent.updates)
        cluster.stop("kube-apiserver")
        await wait_troubled(control, True)
        late, token = Agent(), shop_token
        async with trio.open_nursery() as nursery:
            # Nobody can say who it is, so it waits; the one that is connected stays.
            nursery.start_soon(late.run, control, lambda: token)
            await late.until(lambda: bool(late.failures), "a newcomer is told to wait")
            assert "can't be authenticated now" in late.failures[0]
            assert agent.failures == []
            await trio.to_thread.run_sync(cluster.start, "kube-apiserver")
            await late.until(lambda: late.synced, "the newcomer is served")
            assert ours(late) == told
            await wait_troubled(control, False)
            shop.entry("after")
            await agent.until(lambda: f"{SHOP}/after" in agent.names(), "a change after it is told")
            nursery.cancel_scope.cancel()
        assert agent.failures == []
        # The API server takes its own address away when it ends, and pods become unready and ready again.
        news = [workload.name for update in agent.updates[heard:] for workload in update.delta.workloads if workload.namespace == SHOP]
        assert news == ["after"]
        removed = [uid for update in agent.updates[heard:] for uid in update.delta.removed_addresses if SHOP in uid]
        assert removed == []
        assert len(agent.updates) - heard < 10

    shop_token = shop.token()
    try:
        shop.run(check)
    finally:
        if cluster.programs()["kube-apiserver"].pid is None:
            cluster.start("kube-apiserver")


class Freezer:
    """Between a client and the API server. What is frozen stays open and carries nothing more, as when a firewall forgets a connection."""

    def __init__(self, host: str, port: int) -> None:
        self._server = host, port
        self._era = 0
        self.connections = 0

    async def run(self, *, task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled; started with the port."""
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        task_status.started(listener.socket.getsockname()[1])
        await trio.serve_listeners(self._serve, [listener])

    def freeze(self) -> None:
        """All connections there are; later ones pass."""
        self._era += 1

    async def _serve(self, client: trio.SocketStream) -> None:
        self.connections += 1
        server = await trio.open_tcp_stream(*self._server)
        async with client, server, trio.open_nursery() as nursery:
            nursery.start_soon(self._pass_on, client, server, self._era, nursery.cancel_scope)
            nursery.start_soon(self._pass_on, server, client, self._era, nursery.cancel_scope)

    async def _pass_on(self, source: trio.SocketStream, target: trio.SocketStream, era: int, scope: trio.CancelScope) -> None:
        try:
            async for data in source:
                if era != self._era:
                    await trio.sleep_forever()
                await target.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # either end went away
        scope.cancel()


def test_a_watch_that_has_silently_stalled_is_found_out_and_what_it_missed_is_told_once(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mesh.kube.reflector.STALL", 4.0)  # two and a half minutes, to bear an API server that sends bookmarks seldom
    admin = find_access(str(shop.cluster.kubeconfig))
    token = shop.token()

    async def main() -> None:
        freezer, agent = Freezer(admin.host, admin.port), Agent()
        async with trio.open_nursery() as nursery:
            port = await nursery.start(freezer.run)
            text = shop.cluster.kubeconfig.read_text().replace(f"{admin.host}:{admin.port}", f"127.0.0.1:{port}")
            (shop.state / "frozen.kubeconfig").write_text(text)
            config = config_for(shop.cluster, shop.state, kubeconfig=str(shop.state / "frozen.kubeconfig"))
            async with running(config) as control:
                nursery.start_soon(agent.run, control, lambda: token)
                shop.entry("staying")
                shop.entry("going")
                await agent.until(lambda: {f"{SHOP}/staying", f"{SHOP}/going"} <= agent.names(), "new entries are told")
                heard, before = len(agent.updates), freezer.connections
                assert before > len(RESOURCES) / 2, "watches pass here, or nothing is frozen"
                freezer.freeze()
                shop.entry("missed")
                shop.cluster.api.delete(RESOURCES["WorkloadEntry"].path(SHOP, "going"))
                await agent.until(lambda: f"{SHOP}/missed" in agent.names() and f"{SHOP}/going" not in agent.names(), "both are told")
                news = [workload.name for update in agent.updates[heard:] for workload in update.delta.workloads]
                assert news == ["missed"]
                assert agent.failures == []
                nursery.cancel_scope.cancel()

    trio.run(main)


def ours(agent: Agent) -> set[str]:
    return {name for name in agent.names() if name.startswith(SHOP)}


async def wait_troubled(control: Control, troubled: bool) -> None:
    """Until the control plane says that it can't follow the API server, or that it can."""
    with trio.fail_after(PATIENCE):
        while True:
            found = [problem for problem in await control.problems() if problem["file"] == "Kubernetes API"]
            if bool(found) == troubled:
                return
            await trio.sleep(0.1)


def test_groups_that_are_absent_may_appear_later(shop: Shop) -> None:
    cluster = shop.cluster
    resource = RESOURCES["WorkloadEntry"]
    cluster.api.delete(f"{DEFINITIONS}/{resource}")
    wait_until(lambda: not served(cluster.api, "WorkloadEntry"), "the kind is gone")

    async def check(control: Control, agent: Agent) -> None:
        assert await control.problems() == []
        await trio.to_thread.run_sync(install_definitions, cluster)
        shop.entry("late")
        await agent.until(lambda: f"{SHOP}/late" in agent.names(), "an entry of a kind that came later is told")

    shop.run(check)


def test_policies_say_whether_they_are_enforced_and_mistakes_keep_the_last_good_version(shop: Shop) -> None:
    shop.policy("good", {"rules": [{"from": [{"source": {"namespaces": ["a"]}}]}]})
    shop.policy("http", {"rules": [{"to": [{"operation": {"methods": ["GET"]}}]}]})
    mistaken = {"rules": [{"when": [{"key": "source.ip", "values": ["10.0.0.300"]}]}]}  # no schema can say that

    async def check(control: Control, agent: Agent) -> None:
        accepted = await wait_for(lambda: shop.condition("good"), "a condition is written")
        assert (accepted["type"], accepted["status"], accepted["reason"]) == ("ZtunnelAccepted", "True", "Accepted")
        refused = await wait_for(lambda: shop.condition("http"), "a condition is written")
        assert refused["reason"] == "UnsupportedValue"
        heard = len(agent.updates)
        shop.policy("good", mistaken)
        await wait_for(lambda: shop.condition("good")["reason"] == "Invalid", "the mistake is told")
        message = shop.condition("good")["message"]
        assert "the last good version stays in force" in message
        assert f"AuthorizationPolicy {SHOP}/good" in message
        assert "spec.rules[0].when[0].values[0]" in message
        (problem,) = [found for found in await control.problems() if found["file"].endswith("/good")]
        assert problem["field"] == "spec.rules[0].when[0].values[0]"
        assert not [update for update in agent.updates[heard:] if any(policy.name == "good" for policy in update.delta.policies)]
        shop.policy("good", {"action": "DENY", "rules": [{}]})
        await wait_for(lambda: shop.condition("good")["reason"] == "Accepted", "it is right again")
        observed, found = (
            shop.condition("good")["observedGeneration"],
            shop.cluster.api.get(RESOURCES["AuthorizationPolicy"].path(SHOP, "good")),
        )
        assert str(observed) == str(found["metadata"]["generation"])
        assert {entry["manager"] for entry in found["metadata"]["managedFields"]} == {"tests", "istio-ambient-ztunnel-policy"}

    shop.run(check)


def test_of_two_control_planes_one_leads_and_when_it_is_killed_the_other_does(shop: Shop) -> None:
    cluster = shop.cluster

    def holder() -> str:
        try:
            lease = cluster.api.get(f"/apis/coordination.k8s.io/v1/namespaces/{SYSTEM}/leases/istiod-py-leader")
        except ApiRefused:
            return ""
        return str(lease["spec"].get("holderIdentity") or "").partition("_")[0]

    replicas: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name in ("one", "two"):
            config = config_for(cluster, shop.state, name)
            command = [sys.executable, "-m", "istiod_py", f"--kubeconfig={config.kubeconfig}", f"--state-dir={config.state_dir}"]
            command += [f"--root-namespace={SYSTEM}", "--listen=127.0.0.1:0", "--monitoring=127.0.0.1:0"]
            with (shop.state / f"{name}.log").open("wb") as log:
                replicas[name] = subprocess.Popen(command, env={**os.environ, "POD_NAME": name}, stdout=log, stderr=log)
        first = wait_until(holder, "somebody leads")
        shop.policy("one", {"rules": [{}]})
        wait_until(lambda: shop.condition("one").get("reason") == "Accepted", "the leader writes a condition")
        replicas[first].send_signal(signal.SIGKILL)
        (second,) = replicas.keys() - {first}
        wait_until(lambda: holder() == second, "the other leads")
        shop.policy("two", {"rules": [{}]})
        wait_until(lambda: shop.condition("two").get("reason") == "Accepted", "it writes conditions")
        assert (shop.state / "one" / "root-cert.pem").read_text() == (shop.state / "two" / "root-cert.pem").read_text()
    finally:
        for process in replicas.values():
            process.kill()
            process.wait()


def test_a_token_that_is_refused_is_read_anew(shop: Shop) -> None:
    """Bound to a Secret, a token dies with it: the moment is ours to choose."""
    cluster = shop.cluster
    cluster.apply(
        "{apiVersion: rbac.authorization.k8s.io/v1, kind: ClusterRoleBinding, metadata: {name: source-reader},"
        " roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: view},"
        f" subjects: [{{kind: ServiceAccount, name: default, namespace: {SHOP}}}]}}"
    )
    file = shop.state / "token"

    def renew(name: str) -> None:
        head = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name, "namespace": SHOP}}
        file.write_text(request_token(cluster, SHOP, "default", {**cluster.api.apply(head), "kind": "Secret"}, audience=""))

    async def main() -> None:
        renew("first")
        admin = find_access(str(cluster.kubeconfig))
        access = ClusterAccess(admin.host, admin.port, ca_pem=admin.ca_pem, token_file=file)
        client = ApiClient(access)
        path = RESOURCES["Pod"].collection(SHOP)
        assert await client.get(path)
        renew("second")
        cluster.api.delete(f"/api/v1/namespaces/{SHOP}/secrets/first")
        for _ in range(3):
            assert await client.get(path)
        await client.aclose()

    try:
        trio.run(main)
    finally:
        cluster.kubectl("delete", "clusterrolebinding", "source-reader")

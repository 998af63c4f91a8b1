import json
import socket
from collections.abc import Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import msgspec
import pytest
import trio

from istiod_py.app import StartFailed, run_istiod
from istiod_py.ca import CertificateAuthority
from istiod_py.config import Config
from istiod_py.translate.l7.authentication import NO_KEYS
from mesh.model.identity import SpiffeId
from mesh.model.l7.policy import RequestAuthentication
from mesh.rpc import RpcError, Status, open_channel
from mesh.rpc.tls import client_tls
from mesh.runtime.inspection import ControlPlanePage
from mesh.runtime.outbound import OutboundError
from mesh.tls.bundle import CertificateBundle
from mesh.tls.csr import make_request
from mesh.xds.client import AdsClientConfig, AdsState, AdsUpdate, bearer_metadata, connect_tls, run_ads_client
from mesh.xds.l7 import L7_TYPES
from mesh.xds.names import ADDRESS, AUTHORIZATION, CREATE_CERTIFICATE_METHOD, node_id, pod_of_node_id, waypoint_node_id
from mesh.xds.proto.ca_pb2 import IstioCertificateRequest, IstioCertificateResponse

CLUSTER = """\
apiVersion: v1
kind: Node
metadata: {name: n1}
---
apiVersion: v1
kind: Node
metadata: {name: n2}
---
apiVersion: v1
kind: Namespace
metadata: {name: app, labels: {istio.io/dataplane-mode: ambient}}
"""
POD = """\
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: app, labels: {{app: {name}}}}}
spec:
  nodeName: {node}
  serviceAccountName: {name}
  containers: [{{name: main, command: [sleep, inf]}}]
status:
  phase: Running
  podIP: {ip}
  podIPs: [{{ip: {ip}}}]
  conditions: [{{type: Ready, status: "True"}}]
"""
SERVICE = """\
apiVersion: v1
kind: Service
metadata: {name: server, namespace: app}
spec:
  clusterIP: 10.96.0.10
  selector: {app: server}
  ports: [{name: http, port: 80, targetPort: 8080}]
"""
POLICY = """\
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: only-client, namespace: app}
spec:
  action: ALLOW
  rules:
  - from:
    - source: {principals: [cluster.local/ns/app/sa/client]}
"""
CLIENT, SERVER = SpiffeId("cluster.local", "app", "client"), SpiffeId("cluster.local", "app", "server")


@dataclass
class World:
    """A control plane on a directory, and what a node's agent would do with it."""

    directory: Path
    listen: str = "127.0.0.1:0"
    agents: str = ""
    monitoring: str = ""
    updates: list[AdsUpdate] = field(default_factory=list)
    news: trio.Event = field(default_factory=trio.Event)

    @property
    def source(self) -> Path:
        return self.directory / "source"

    @property
    def config(self) -> Config:
        return Config(self.source, self.directory / "state", listen=self.listen, monitoring="127.0.0.1:0", debounce=0.02)

    def write(self, name: str, text: str) -> None:
        draft = self.source / f".{name}"
        draft.write_text(text)
        draft.rename(self.source / name)

    def token(self, node: str) -> str:
        return (self.directory / "state" / "tokens" / f"{node}.token").read_text()

    def tls(self):
        return client_tls((self.directory / "state" / "root-cert.pem").read_text())

    async def follow(self, node: str = "n1") -> None:
        """Be that node's agent, for ever."""
        host, port = self.agents.rsplit(":", 1)

        def take(update: AdsUpdate) -> None:
            self.updates.append(update)
            self.news.set()
            self.news = trio.Event()

        metadata = bearer_metadata(self.directory / "state" / "tokens" / f"{node}.token", cluster_id="Kubernetes")
        connect = connect_tls(host, int(port), self.tls, server_hostname="istiod.istio-system.svc")
        await run_ads_client(AdsClientConfig(connect, metadata, node_id("", f"ztunnel-{node}", "istio-system"), {"NODE_NAME": node}), take)

    async def wait_for(self, holds):
        """The updates, once ``holds`` of them is true."""
        with trio.fail_after(10):
            while not holds(self.updates):
                await self.news.wait()
        return self.updates

    async def request(self, identity: object, *, token: str, csr: bytes | None = None, ttl: int = 3600) -> tuple[bytes, list[str]]:
        """Ask for a certificate: the key and the chain."""
        made = make_request(identity if isinstance(identity, SpiffeId) else CLIENT)
        message = IstioCertificateRequest(csr=(csr or made.csr_pem).decode(), validity_duration=ttl)
        message.metadata.update({"ImpersonatedIdentity": str(identity)})
        host, port = self.agents.rsplit(":", 1)
        async with open_channel(host, int(port), ssl_context=self.tls(), server_hostname="localhost") as channel:
            metadata = {"authorization": f"Bearer {token}"}
            answer = await channel.unary(CREATE_CERTIFICATE_METHOD, message.SerializeToString(), metadata=metadata, timeout=10)
        return made.key_pem, list(IstioCertificateResponse.FromString(answer).cert_chain)

    async def get(self, path: str) -> tuple[int, str]:
        host, port = self.monitoring.rsplit(":", 1)
        async with await trio.open_tcp_stream(host, int(port)) as stream:
            await stream.send_all(f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
            answer = b"".join([data async for data in stream])
        head, _, body = answer.partition(b"\r\n\r\n")
        return int(head.split()[1]), body.decode()

    async def wait_problems(self, count: int) -> list[dict[str, object]]:
        with trio.fail_after(10):
            while True:
                problems = json.loads((await self.get("/debug/problems"))[1])
                if len(problems) == count:
                    return problems
                await trio.sleep(0.02)


@asynccontextmanager
async def running(world: World):
    async with trio.open_nursery() as nursery:
        started = await nursery.start(run_istiod, world.config)
        (world.agents,), (world.monitoring,) = started.agents, started.monitoring
        yield nursery
        nursery.cancel_scope.cancel()


@pytest.fixture
def world(tmp_path):
    world = World(tmp_path)
    world.source.mkdir()
    world.write("cluster.yaml", CLUSTER)
    world.write("client.yaml", POD.format(name="client", node="n1", ip="10.0.1.2"))
    world.write("server.yaml", POD.format(name="server", node="n2", ip="10.0.2.2"))
    world.write("service.yaml", SERVICE)
    return world


def _uids(update):
    return sorted(workload.uid for workload in update.delta.workloads)


def test_an_agent_is_told_workloads_services_and_policies(world):
    world.write("policy.yaml", POLICY)

    async def main():
        async with running(world) as nursery:
            nursery.start_soon(world.follow)
            updates = await world.wait_for(lambda updates: len(updates) == 2)
            addresses, policies = sorted(updates, key=lambda update: update.type_url != ADDRESS)
            assert _uids(addresses) == ["Kubernetes//Pod/app/client", "Kubernetes//Pod/app/server"]
            (server,) = [workload for workload in addresses.delta.workloads if workload.name == "server"]
            assert (str(server.addresses[0]), server.node, server.identity) == ("10.0.2.2", "n2", SERVER)
            assert [str(service.key) for service in addresses.delta.services] == ["app/server.app.svc.cluster.local"]
            assert [policy.key for policy in policies.delta.policies] == ["app/only-client"]

    trio.run(main)


def test_an_edit_pushes_only_what_changed(world):
    async def main():
        async with running(world) as nursery:
            nursery.start_soon(world.follow)
            await world.wait_for(lambda updates: len(updates) == 2)
            world.write("server.yaml", POD.format(name="server", node="n2", ip="10.0.2.3"))
            update = (await world.wait_for(lambda updates: len(updates) == 3))[-1]
            assert (update.type_url, _uids(update), update.delta.services) == (ADDRESS, ["Kubernetes//Pod/app/server"], ())
            world.write("policy.yaml", POLICY)
            update = (await world.wait_for(lambda updates: len(updates) == 4))[-1]
            assert (update.type_url, len(update.delta.policies)) == (AUTHORIZATION, 1)
            (world.source / "server.yaml").unlink()
            update = (await world.wait_for(lambda updates: len(updates) == 5))[-1]
            assert update.delta.removed_addresses == ("Kubernetes//Pod/app/server",)
            world.write("cluster.yaml", CLUSTER + "# a comment changes nothing\n")
            world.write("policy.yaml", POLICY.replace("ALLOW", "DENY"))
            update = (await world.wait_for(lambda updates: len(updates) == 6))[-1]
            assert update.type_url == AUTHORIZATION

    trio.run(main)


def test_a_mistake_keeps_the_last_good_version_and_is_shown_with_file_line_and_field(world):
    world.write("policy.yaml", POLICY)

    async def main():
        async with running(world) as nursery:
            nursery.start_soon(world.follow)
            await world.wait_for(lambda updates: len(updates) == 2)
            assert await world.wait_problems(0) == []
            world.write("policy.yaml", POLICY.replace("principals: [cluster.local/ns/app/sa/client]", "ipBlocks: [10.0.0.0/99]"))
            (problem,) = await world.wait_problems(1)
            assert (problem["file"], problem["line"]) == ("policy.yaml", 8)
            assert str(problem["field"]).startswith("spec.rules[0].from[0].source.ipBlocks")
            world.write("server.yaml", "apiVersion: v1\nkind: Pod\n  metadata: {")
            both = await world.wait_problems(2)
            assert {problem["file"] for problem in both} == {"policy.yaml", "server.yaml"}
            page = msgspec.json.decode((await world.get("/debug/status"))[1], type=ControlPlanePage)
            assert page.problems == 2
            assert page.mistakes[0].startswith("policy.yaml:8: spec.rules[0].from[0].source.ipBlocks")
            # A change that is good reaches the agents meanwhile; what was kept is not pushed.
            world.write("client.yaml", POD.format(name="client", node="n1", ip="10.0.1.9"))
            update = (await world.wait_for(lambda updates: len(updates) == 3))[-1]
            assert _uids(update) == ["Kubernetes//Pod/app/client"]
            world.write("policy.yaml", POLICY)
            await world.wait_problems(1)
            assert len(world.updates) == 3

    trio.run(main)


def test_a_policy_that_was_never_readable_reaches_agents_as_one_that_denies(world):
    world.write("policy.yaml", POLICY.replace("ALLOW", "DENY").replace("principals", "princpals"))

    async def main():
        async with running(world) as nursery:
            nursery.start_soon(world.follow)
            updates = await world.wait_for(lambda updates: len(updates) == 2)
            (policy,) = [policy for update in updates for policy in update.delta.policies]
            assert (policy.action.name, len(policy.rules), policy.rules[0].clauses) == ("DENY", 1, ())

    trio.run(main)


def test_a_certificate_for_a_pod_of_the_callers_node_verifies(world):
    async def main():
        async with running(world):
            key, chain = await world.request(CLIENT, token=world.token("n1"))
            bundle = CertificateBundle.parse(key_pem=key, chain_pem=[pem.encode() for pem in chain[:-1]], roots_pem=chain[-1].encode())
            assert bundle.identity == CLIENT
            assert chain[-1] == (world.directory / "state" / "root-cert.pem").read_text()

    trio.run(main)


def test_requests_that_may_not_be_granted_are_refused_with_their_status(world):
    async def refused(status, identity, **arguments):
        with pytest.raises(RpcError) as caught:
            await world.request(identity, **arguments)
        assert caught.value.status is status, caught.value

    async def main():
        async with running(world):
            n1, n2 = world.token("n1"), world.token("n2")
            await refused(Status.UNAUTHENTICATED, CLIENT, token="wrong")
            await refused(Status.UNAUTHENTICATED, CLIENT, token=n2)
            await refused(Status.UNAUTHENTICATED, "spiffe://example.org/ns/app/sa/client", token=n1)
            await refused(Status.INVALID_ARGUMENT, CLIENT, token=n1, csr=b"no request")
            await refused(Status.INVALID_ARGUMENT, CLIENT, token=n1, ttl=100 * 86400)
            assert (await world.get("/ready")) == (200, "ready\n")

    trio.run(main)


def test_a_pod_that_moves_takes_its_identity_to_the_other_node(world):
    async def main():
        async with running(world):
            world.write("client.yaml", POD.format(name="client", node="n2", ip="10.0.2.9"))
            await world.request(CLIENT, token=world.token("n2"))
            with pytest.raises(RpcError):
                await world.request(CLIENT, token=world.token("n1"))

    trio.run(main)


def test_without_a_token_the_mesh_is_not_shown(world):
    async def main():
        async with running(world):
            host, port = world.agents.rsplit(":", 1)
            async with open_channel(host, int(port), ssl_context=world.tls(), server_hostname="localhost") as channel:
                with pytest.raises(RpcError) as caught:
                    async with channel.stream("/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources") as stream:
                        await stream.receive()
            assert caught.value.status is Status.UNAUTHENTICATED

    trio.run(main)


def test_tokens_come_and_go_with_their_nodes(world):
    async def main():
        async with running(world):
            old = world.token("n1")
            world.write("cluster.yaml", CLUSTER.replace("{name: n1}", "{name: n3}"))
            with trio.fail_after(10):
                while not (world.directory / "state" / "tokens" / "n3.token").exists():  # noqa: ASYNC110 - it is another's file
                    await trio.sleep(0.01)
            assert not (world.directory / "state" / "tokens" / "n1.token").exists()
            with pytest.raises(RpcError) as caught:
                await world.request(CLIENT, token=old)
            assert caught.value.message == "request authenticate failure"

    trio.run(main)


def test_a_restart_keeps_root_and_tokens_and_a_connected_agent_gets_nothing_twice(world):
    world.write("policy.yaml", POLICY)

    async def main():
        async with trio.open_nursery() as agent:
            async with running(world):
                root, token = (world.directory / "state" / "root-cert.pem").read_bytes(), world.token("n1")
                agent.start_soon(world.follow)
                await world.wait_for(lambda updates: len(updates) == 2)
                world.listen = world.agents
            world.write("server.yaml", POD.format(name="server", node="n2", ip="10.0.2.99"))
            async with running(world):
                assert (world.directory / "state" / "root-cert.pem").read_bytes() == root
                assert world.token("n1") == token
                await world.request(CLIENT, token=token)
                addresses, policies = sorted(
                    (await world.wait_for(lambda updates: len(updates) == 4))[2:], key=lambda u: u.type_url != ADDRESS
                )
                assert _uids(addresses) == ["Kubernetes//Pod/app/server"]
                assert (addresses.delta.services, policies.delta.policies) == ((), ())
                agent.cancel_scope.cancel()

    trio.run(main)


def test_operators_see_metrics_and_the_state_without_secrets(world):
    async def main():
        async with running(world) as nursery:
            nursery.start_soon(world.follow)
            await world.wait_for(lambda updates: len(updates) == 2)
            status, text = await world.get("/metrics")
            assert status == 200
            assert text.endswith("# EOF\n")
            assert "\npilot_workloads 2\n" in text
            assert "\npilot_xds 1\n" in text
            dump = json.loads((await world.get("/debug/config_dump"))[1])
            assert [workload["name"] for workload in dump["workloads"]] == ["client", "server"]
            assert dump["agents"][0]["node_id"].startswith("ztunnel~")
            assert "PRIVATE" not in json.dumps(dump)
            assert world.token("n1") not in json.dumps(dump)

    trio.run(main)


def test_the_state_in_short_names_every_agent_and_what_it_has_not_taken(world):
    async def main():
        async with running(world) as nursery:
            nursery.start_soon(world.follow)
            await world.wait_for(lambda updates: len(updates) == 2)
            while True:
                status, text = await world.get("/debug/status")
                page = msgspec.json.decode(text, type=ControlPlanePage)
                if page.agents and not page.agents[0].stale:  # its answer may still be on its way to us
                    break
                assert page.agents[0].stale.keys() <= {"Address", "Authorization"}
            assert (status, page.ready, page.workloads, page.problems, len(page.agents)) == (200, True, 2, 0, 1)
            assert page.authority_expires is not None
            assert page.authority_expires > datetime.now(UTC).timestamp()

    trio.run(main)


def test_a_node_id_names_the_agents_pod():
    assert pod_of_node_id(node_id("10.0.0.1", "ztunnel-x2", "istio-system")) == ("istio-system", "ztunnel-x2")
    assert pod_of_node_id("what is this") == ("", "what is this")


def test_an_authority_of_the_operators_signs_instead_of_our_own(world, tmp_path):
    cacerts = tmp_path / "cacerts"
    CertificateAuthority.self_signed(cacerts, "example.org", datetime.now(UTC))
    (cacerts / "root-cert.pem").write_bytes((cacerts / "ca-cert.pem").read_bytes())

    async def main():
        async with trio.open_nursery() as nursery:
            started = await nursery.start(run_istiod, replace(world.config, cacerts=cacerts))
            world.agents = started.agents[0]
            _, chain = await world.request(CLIENT, token=world.token("n1"))
            assert chain[-1] == (cacerts / "root-cert.pem").read_text() == (world.directory / "state" / "root-cert.pem").read_text()
            assert not (world.directory / "state" / "ca-key.pem").exists()
            nursery.cancel_scope.cancel()

    trio.run(main)


def _failure(config):
    async def main():
        async with trio.open_nursery() as nursery:
            await nursery.start(run_istiod, config)
            nursery.cancel_scope.cancel()

    with pytest.raises(ExceptionGroup) as caught:
        trio.run(main)
    assert caught.group_contains(StartFailed)
    return str(caught.value.exceptions[0])


def test_an_address_in_use_a_missing_source_and_a_broken_authority_are_clear_errors(world, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert f"failed to bind to address {address}" in _failure(replace(world.config, monitoring=address))
        assert f"failed to bind to address {address}" in _failure(replace(world.config, listen=address))
    assert "is not a directory" in _failure(replace(world.config, source=tmp_path / "nowhere"))
    assert "ca-key.pem: No such file" in _failure(replace(world.config, cacerts=tmp_path))


WAYPOINT = """\
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: waypoint, namespace: app}
spec: {gatewayClassName: istio-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE}]}
status: {addresses: [{type: Hostname, value: waypoint.app.svc.cluster.local}]}
---
apiVersion: v1
kind: Pod
metadata:
  name: waypoint-0
  namespace: app
  labels: {gateway.networking.k8s.io/gateway-name: waypoint, gateway.istio.io/managed: istio.io-mesh-controller}
spec: {nodeName: n1, serviceAccountName: waypoint, containers: [{name: main}]}
status: {phase: Running, podIP: 10.244.1.9}
"""


async def until(holds: Callable[[], bool]) -> None:
    with trio.fail_after(10):
        while not holds():  # noqa: ASYNC110 - several things make it true
            await trio.sleep(0.01)


async def follow_as_waypoint(
    world: World,
    told: list[str],
    gateway: str = "waypoint",
    state: list[AdsState] | None = None,
    on_update: Callable[[AdsUpdate], None] = lambda _: None,
) -> None:
    host, port = world.agents.rsplit(":", 1)
    token = world.directory / "state" / "tokens" / "pod_app_waypoint-0.token"
    connect = connect_tls(host, int(port), world.tls, server_hostname="istiod.istio-system.svc")
    metadata = bearer_metadata(token, cluster_id="Kubernetes")
    node = waypoint_node_id("", "waypoint-0", "app")
    config = AdsClientConfig(connect, metadata, node, {"GATEWAY_NAME": gateway}, types=(*L7_TYPES, ADDRESS))

    def take(update: AdsUpdate) -> None:
        told.extend(f"waypoint: {type(each.resource).__name__} {each.resource.key}" for each in update.delta.l7)
        told.extend(f"waypoint: gone {name}" for _, name in update.delta.removed_l7)
        on_update(update)

    await run_ads_client(config, take, state.append if state is not None else lambda _: None)


def test_a_waypoint_knows_a_service_before_agents_send_to_it_and_until_they_no_longer_do(world):
    """Else connections would be refused in between."""

    async def main() -> None:
        told: list[str] = []
        world.write("waypoint.yaml", WAYPOINT)
        service = "app/server.app.svc.cluster.local"
        async with running(world) as nursery:
            nursery.start_soon(follow_as_waypoint, world, told)
            nursery.start_soon(world.follow)
            await world.wait_for(lambda updates: any(update.type_url == ADDRESS for update in updates))
            await until(lambda: bool(told))
            told.clear()
            world.updates.clear()

            def has_waypoint(updates: list[AdsUpdate], has: bool) -> bool:
                found = [each for update in updates for each in update.delta.services if each.name == "server"]
                return bool(found) and (found[-1].waypoint is not None) == has

            world.write("service.yaml", SERVICE.replace("namespace: app}", "namespace: app, labels: {istio.io/use-waypoint: waypoint}}"))
            await world.wait_for(lambda updates: has_waypoint(updates, True))
            assert f"waypoint: ServiceConfig {service}" in told
            world.updates.clear()
            told.clear()
            gone = f"waypoint: gone app/waypoint|{service}"
            world.write("service.yaml", SERVICE)
            await world.wait_for(lambda updates: has_waypoint(updates, False))
            assert gone not in told
            known = trio.current_time()
            await until(lambda: gone in told)
            assert trio.current_time() - known >= 0.8, "connections under way have a request to send"
            world.write("service.yaml", SERVICE.replace("namespace: app}", "namespace: app, labels: {istio.io/use-waypoint: waypoint}}"))
            await until(lambda: f"waypoint: ServiceConfig {service}" in told)
            told.clear()
            world.write("service.yaml", SERVICE)
            await world.wait_for(lambda updates: has_waypoint(updates, False))
            world.write("service.yaml", SERVICE.replace("namespace: app}", "namespace: app, labels: {istio.io/use-waypoint: waypoint}}"))
            await world.wait_for(lambda updates: has_waypoint(updates, True))
            await trio.sleep(1.2)
            assert gone not in told, "what came back in time was never away"

    trio.run(main)


GUARD = """\
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: guard, namespace: app}
spec: {targetRefs: [{kind: Service, group: "", name: server}], rules: [{to: [{operation: {methods: [GET]}}]}]}
"""
TOKENS = """\
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {name: tokens, namespace: app}
spec: {targetRefs: [{kind: Service, group: "", name: server}], jwtRules: [{issuer: i, jwks: '{"keys":[]}'}]}
"""


def test_a_waypoint_has_a_service_only_while_it_has_the_policies_for_it(world):
    async def main() -> None:
        told: list[str] = []
        world.write("waypoint.yaml", WAYPOINT)
        world.write("policies.yaml", f"{GUARD}---\n{TOKENS}")
        service = "app/server.app.svc.cluster.local"
        policies = ("AuthorizationPolicy/app/guard", "RequestAuthentication/app/tokens")
        async with running(world) as nursery:
            nursery.start_soon(follow_as_waypoint, world, told)
            nursery.start_soon(world.follow)
            await until(lambda: bool(told))
            told.clear()
            world.write("service.yaml", SERVICE.replace("namespace: app}", "namespace: app, labels: {istio.io/use-waypoint: waypoint}}"))
            came = f"waypoint: ServiceConfig {service}"
            await until(lambda: came in told)
            before = told[: told.index(came)]
            assert {f"waypoint: {key.partition('/')[0]} {key}" for key in policies} <= {*before}
            told.clear()
            world.write("service.yaml", SERVICE)
            await until(lambda: all(f"waypoint: gone app/waypoint|{key}" in told for key in policies))
            after = told[told.index(f"waypoint: gone app/waypoint|{service}") :]
            assert {f"waypoint: gone app/waypoint|{key}" for key in policies} <= {*after}

    trio.run(main)


FETCHED = TOKENS.replace("jwks: '{\"keys\":[]}'", "jwksUri: https://issuer.test/keys").replace("name: tokens", "name: fetched")


def key_sets_in(update: AdsUpdate) -> list[str]:
    found = (each.resource for each in update.delta.l7 if isinstance(each.resource, RequestAuthentication))
    return [rule.jwks for authentication in found for rule in authentication.rules]


def test_a_key_set_is_fetched_for_waypoints_and_pushed_when_it_came(world, monkeypatch):
    """Before it came, tokens are refused."""
    asked: list[str] = []
    answered = trio.Event()

    async def fetch(url: str, *, limit: int, within: float) -> bytes:
        asked.append(url)
        await answered.wait()
        return b'{"keys":[{"kty":"oct","kid":"one","k":"c2VjcmV0"}]}'

    monkeypatch.setattr("istiod_py.jwks.fetch", fetch)
    monkeypatch.setattr("istiod_py.app.FIRST_KEYS", 0.05)

    async def main() -> None:
        sets: list[str] = []
        world.write("waypoint.yaml", WAYPOINT)
        world.write("service.yaml", SERVICE.replace("namespace: app}", "namespace: app, labels: {istio.io/use-waypoint: waypoint}}"))
        world.write("tokens.yaml", FETCHED)
        async with running(world) as nursery:
            nursery.start_soon(follow_as_waypoint, world, [], "waypoint", None, lambda update: sets.extend(key_sets_in(update)))
            await until(lambda: bool(sets))
            assert (sets, asked) == ([NO_KEYS], ["https://issuer.test/keys"])
            answered.set()
            await until(lambda: len(sets) == 2)
            assert '"kid":"one"' in sets[1]

    trio.run(main)


def test_a_control_plane_that_starts_has_its_key_sets_before_it_serves(world, monkeypatch):
    """Waypoints have them from the one before, and would refuse good tokens."""

    async def fetch(url: str, *, limit: int, within: float) -> bytes:
        await trio.sleep(0.05)
        return b'{"keys":[{"kty":"oct","kid":"one","k":"c2VjcmV0"}]}'

    monkeypatch.setattr("istiod_py.jwks.fetch", fetch)

    async def main() -> None:
        sets: list[str] = []
        world.write("waypoint.yaml", WAYPOINT)
        world.write("service.yaml", SERVICE.replace("namespace: app}", "namespace: app, labels: {istio.io/use-waypoint: waypoint}}"))
        world.write("tokens.yaml", FETCHED)
        async with running(world) as nursery:
            nursery.start_soon(follow_as_waypoint, world, [], "waypoint", None, lambda update: sets.extend(key_sets_in(update)))
            await until(lambda: bool(sets))
            assert ['"kid":"one"' in each for each in sets] == [True]

    trio.run(main)


def note_key_sets(sets: list[str], update: AdsUpdate) -> None:
    sets.extend(key_sets_in(update))


def test_a_control_plane_that_starts_while_a_provider_is_away_has_the_keys_of_the_one_before(world, monkeypatch):
    """Else waypoints would lose keys that they have, and refuse good tokens."""
    away = False

    async def fetch(url: str, *, limit: int, within: float) -> bytes:
        await trio.lowlevel.checkpoint()
        if away:
            raise OutboundError("nobody there")
        return b'{"keys":[{"kty":"oct","kid":"one","k":"c2VjcmV0"}]}'

    monkeypatch.setattr("istiod_py.jwks.fetch", fetch)

    async def main() -> None:
        nonlocal away
        world.write("waypoint.yaml", WAYPOINT)
        world.write("service.yaml", SERVICE.replace("namespace: app}", "namespace: app, labels: {istio.io/use-waypoint: waypoint}}"))
        world.write("tokens.yaml", FETCHED)
        async with running(world):
            await until((world.directory / "state" / "key-sets.json").exists)
        away = True
        for written in (True, True, False):
            if not written:
                (world.directory / "state" / "key-sets.json").unlink()
            sets: list[str] = []
            async with running(world) as nursery:
                take = partial(note_key_sets, sets)
                nursery.start_soon(follow_as_waypoint, world, [], "waypoint", None, take)
                await until(partial(bool, sets))
                assert ['"kid":"one"' in each for each in sets] == [written]
                told: list[dict[str, object]] = []
                while not told:
                    told = json.loads((await world.get("/debug/problems"))[1])
                (problem,) = told
                assert (problem["file"], problem["field"]) == ("tokens.yaml", "spec.jwtRules[0].jwksUri")
                assert problem["message"].startswith("key set https://issuer.test/keys: ")
                assert ("stay in use" in problem["message"]) == written

    trio.run(main)


def test_a_waypoint_that_says_it_is_another_is_refused(world):
    async def main() -> None:
        told: list[str] = []
        states: list[AdsState] = []
        world.write("waypoint.yaml", WAYPOINT)
        async with running(world) as nursery:
            nursery.start_soon(follow_as_waypoint, world, told, "other", states)
            await until(lambda: any("not a waypoint of this Gateway" in state.reason for state in states))
            assert told == []

    trio.run(main)


def test_waypoints_are_no_agents_of_nodes(world):
    async def main() -> None:
        world.write("waypoint.yaml", WAYPOINT)
        async with running(world) as nursery:
            told: list[str] = []
            nursery.start_soon(follow_as_waypoint, world, told)
            await until(lambda: bool(told))
            page = msgspec.json.decode((await world.get("/debug/status"))[1], type=ControlPlanePage)
            assert (page.agents, [each.pod for each in page.waypoints]) == ([], ["waypoint-0"])
            dump = json.loads((await world.get("/debug/config_dump"))[1])
            assert list(dump["waypoints"]) == ["app/waypoint"]

    trio.run(main)

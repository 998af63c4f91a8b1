"""Envoy as a peer of captured pods in a lab: real agents on two nodes, certificates of the lab's authority, traffic of applications.

Envoy runs in pods outside the mesh. As server it stands in pods that say they speak HBONE themselves (``networking.istio.io/tunnel``); as
client it dials captured pods.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mesh.model.address import SocketAddress, parse_ip
from mesh.model.identity import SpiffeId
from mesh.model.ports import INBOUND_HBONE
from mesh.testing import traffic
from mesh.testing.ca import FakeCa
from mesh.testing.envoy import Config, Observed, client_config, command, is_listening, server_config
from mesh.testing.lab import Lab, running_lab, wait_until
from meshctl_py.lab.home import own_labs

pytestmark = [pytest.mark.interop, pytest.mark.netns]

EXAMPLE = Path(__file__).parents[2] / "examples" / "two-nodes"
TRAFFIC = Path(traffic.__file__)
TRAFFIC_PORT = 7100
DATABASE_PORT = 3306
FAMILIES = (4, 6)
MANY = 60
ENTRY = 9000
"""Where an Envoy that dials captured pods accepts, on its pod's loopback."""
ADMIN = 9901

CONTAINER = json.dumps(
    {
        "name": "traffic",
        "command": [sys.executable, str(TRAFFIC), "serve", str(TRAFFIC_PORT)],
        "readinessProbe": {"tcpSocket": {"port": TRAFFIC_PORT}},
    }
)
"""YAML, as all JSON is."""
FOREIGN = f"""
apiVersion: v1
kind: Namespace
metadata: {{name: foreign}}
---
apiVersion: v1
kind: Pod
metadata: {{name: envoy, namespace: foreign, labels: {{networking.istio.io/tunnel: http}}}}
spec:
  nodeName: n2
  serviceAccountName: envoy
  containers:
  - {CONTAINER}
  - {{name: database, command: [python3, apps/database.py, "{DATABASE_PORT}"]}}
---
apiVersion: v1
kind: Pod
metadata: {{name: impostor, namespace: foreign, labels: {{networking.istio.io/tunnel: http}}}}
spec:
  nodeName: n2
  serviceAccountName: impostor
  containers:
  - {CONTAINER}
---
apiVersion: v1
kind: Pod
metadata: {{name: caller, namespace: foreign}}
spec:
  nodeName: n1
  serviceAccountName: caller
  containers:
  - {{name: shell, command: [sleep, infinity]}}
---
apiVersion: v1
kind: Pod
metadata: {{name: target, namespace: shop, labels: {{app: target}}}}
spec:
  nodeName: n2
  serviceAccountName: server
  containers:
  - {CONTAINER}
"""

DENY_ENVOY = """
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: no-envoy, namespace: shop}
spec:
  action: DENY
  rules: [{from: [{source: {principals: [cluster.local/ns/foreign/sa/caller]}}]}]
"""


def identity(namespace: str, service_account: str) -> SpiffeId:
    return SpiffeId("cluster.local", namespace, service_account)


@dataclass(slots=True)
class Mesh:
    """The lab, its authority, and its pods' addresses."""

    lab: Lab
    ca: FakeCa
    directory: Path
    ips: dict[tuple[str, int], str] = field(default_factory=dict)
    envoys: int = 0

    def address(self, pod: str, family: int, port: int) -> SocketAddress:
        return SocketAddress(parse_ip(self.ips[pod, family]), port)

    def traffic(self, pod: str, client: str, host: str, port: int, *numbers: int) -> dict[str, object]:
        """Run a client of `mesh.testing.traffic` in a pod."""
        done = self.lab.run(pod, sys.executable, str(TRAFFIC), client, host, str(port), *map(str, numbers), timeout=120)
        assert done.returncode == 0, done.stderr
        seen: dict[str, object] = json.loads(done.stdout)
        return seen

    def observed(self) -> Observed:
        self.envoys += 1
        return Observed(ADMIN, self.directory / f"access-{self.envoys}.log")

    @contextmanager
    def envoy(self, pod: str, config: Config, port: int) -> Iterator[None]:
        """Run Envoy in a pod until it accepts on a port."""
        path = self.directory / f"envoy-{self.envoys}.json"
        path.write_text(json.dumps(config))
        process = self.lab.start(pod, *command(path))
        try:
            wait_until(lambda: process.poll() is not None or is_listening(process.pid, port), f"Envoy in {pod} accepts on {port}")
            assert process.poll() is None, process.communicate()
            yield
        finally:
            process.kill()
            process.communicate()

    @contextmanager
    def envoy_dialling(
        self, target: SocketAddress, *, expected: SpiffeId, ca: FakeCa | None = None, caller: str = "caller"
    ) -> Iterator[Observed]:
        """Envoy in the caller's pod: what connects to `ENTRY` there reaches ``target``, over HBONE."""
        observed = self.observed()
        bundle = (ca or self.ca).issue(identity("foreign", caller))
        peer = SocketAddress(target.ip, INBOUND_HBONE)
        here = SocketAddress(parse_ip("127.0.0.1"), ENTRY)
        config = client_config(here, bundle, peer, str(target), expected=expected, observed=observed)
        with self.envoy("foreign/caller", config, ENTRY):
            yield observed

    def stat(self, pod: str, name: str) -> int:
        """A counter of the Envoy in a pod."""
        answer = self.lab.curl(pod, f"http://127.0.0.1:{ADMIN}/stats?format=json&filter=^{name}$")
        stats = json.loads(answer.stdout)["stats"]
        return int(stats[0]["value"]) if stats else 0


def records(observed: Observed) -> list[dict[str, object]]:
    """An Envoy's access log, once it has something."""
    log = observed.access_log
    wait_until(lambda: log.exists() and log.read_text().endswith("\n"), "Envoy's access log")
    return [json.loads(line) for line in log.read_text().splitlines()]


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    directory = tmp_path_factory.mktemp("foreign")
    shutil.copytree(EXAMPLE, directory / "example")
    (directory / "example" / "foreign.yaml").write_text(FOREIGN)
    with running_lab(directory / "example", directory, "--movers", "1") as lab:
        lab.label("shop", "istio.io/dataplane-mode=ambient")
        wait_until(lambda: {"shop/client", "shop/target", "shop/server"} <= lab.pods_in_mesh(), "the shop's pods are captured")
        mesh = Mesh(lab, FakeCa.with_key_of(own_labs() / lab.name / "istiod"), directory)
        for pod in lab.status()["pods"]:
            for ip in pod["ips"]:
                mesh.ips[f"{pod['namespace']}/{pod['name']}", parse_ip(ip).version] = ip
        yield mesh


# --- Envoy is the server of our outbound


@pytest.fixture(scope="module")
def server(mesh: Mesh) -> Iterator[Observed]:
    """Envoys serve HBONE in ``foreign/envoy`` and in ``foreign/impostor``, both with the former's certificate."""
    bundle = mesh.ca.issue(identity("foreign", "envoy"))
    with ExitStack() as stack:
        for pod in ("foreign/impostor", "foreign/envoy"):
            observed = mesh.observed()
            listen = [mesh.address(pod, family, INBOUND_HBONE) for family in FAMILIES]
            config = server_config(listen, bundle, callers="spiffe://cluster.local/ns/shop/", observed=observed)
            stack.enter_context(mesh.envoy(pod, config, INBOUND_HBONE))
        yield observed


@pytest.mark.parametrize("family", FAMILIES)
def test_a_captured_pod_reaches_a_server_behind_envoy(mesh: Mesh, server: Observed, family: int) -> None:
    target = mesh.ips["foreign/envoy", family]
    seen = mesh.traffic("shop/client", "echo", target, TRAFFIC_PORT, 16)
    assert seen["received"] == seen["sent"]
    assert mesh.traffic("shop/client", "endfirst", target, TRAFFIC_PORT, 3) == {"same": True}
    assert "ready" in str(mesh.traffic("shop/client", "hear", target, DATABASE_PORT)["heard"])


@pytest.mark.parametrize("family", FAMILIES)
def test_tunnels_of_one_pod_share_a_connection_to_envoy(mesh: Mesh, server: Observed, family: int) -> None:
    target = mesh.ips["foreign/envoy", family]
    mesh.traffic("shop/client", "attempt", target, TRAFFIC_PORT)
    requests, connections = (mesh.stat("foreign/envoy", f"http.hbone.downstream_{what}_total") for what in ("rq", "cx"))
    assert mesh.traffic("shop/client", "many", target, TRAFFIC_PORT, MANY, 50_000) == {"echoed": MANY}
    assert mesh.stat("foreign/envoy", "http.hbone.downstream_rq_total") == requests + MANY
    assert mesh.stat("foreign/envoy", "http.hbone.downstream_cx_total") == connections


@pytest.mark.parametrize("family", FAMILIES)
def test_envoy_is_told_who_calls_whom_for_whom(mesh: Mesh, server: Observed, family: int) -> None:
    target = mesh.address("foreign/envoy", family, TRAFFIC_PORT)
    assert mesh.traffic("shop/client", "attempt", str(target.ip), TRAFFIC_PORT) == {"outcome": "echo"}
    client = mesh.ips["shop/client", family]
    shown = f'for="{f"[{client}]" if family == 6 else client}:'

    def ours() -> list[dict[str, object]]:
        """Envoy writes a record some time after the stream has ended: that of an earlier test may come first."""
        return [r for r in records(server) if str(r["forwarded"]).startswith(shown) and r[":authority"] == str(target)]

    record = wait_until(ours, "the tunnel's record")[-1]
    assert record["peer"] == str(identity("shop", "client"))
    assert "k8s.namespace.name=shop,k8s.pod.name=client" in str(record["baggage"])
    assert str(record["traceparent"]).startswith("00-")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_server_that_shows_anothers_certificate_is_refused(mesh: Mesh, server: Observed, family: int) -> None:
    target = mesh.ips["foreign/impostor", family]
    before = mesh.stat("foreign/impostor", "http.hbone.downstream_rq_total")
    assert mesh.traffic("shop/client", "attempt", target, TRAFFIC_PORT)["outcome"] in ("closed", "ConnectionResetError")
    assert mesh.stat("foreign/impostor", "http.hbone.downstream_rq_total") == before
    wait_until(lambda: mesh.lab.access("n1", f"{target}", "expected SAN", "sa/impostor", "sa/envoy"), "the reason in the access log")


# --- Envoy is the client of our inbound


@pytest.mark.parametrize("family", FAMILIES)
def test_envoy_reaches_a_captured_pod(mesh: Mesh, family: int) -> None:
    target = mesh.address("shop/target", family, TRAFFIC_PORT)
    with mesh.envoy_dialling(target, expected=identity("shop", "server")):
        seen = mesh.traffic("foreign/caller", "echo", "127.0.0.1", ENTRY, 16)
        assert seen["received"] == seen["sent"]
        for order in ("endfirst", "endlast", "noise"):
            assert mesh.traffic("foreign/caller", order, "127.0.0.1", ENTRY, 3) == {"same": True}
        requests = mesh.stat("foreign/caller", "cluster.peer.upstream_rq_total")
        assert mesh.traffic("foreign/caller", "many", "127.0.0.1", ENTRY, MANY, 50_000) == {"echoed": MANY}
        assert mesh.stat("foreign/caller", "cluster.peer.upstream_rq_total") == requests + MANY
        assert mesh.stat("foreign/caller", "cluster.peer.upstream_cx_total") == 1
    principal = str(identity("foreign", "caller"))
    wait_until(lambda: mesh.lab.access("n2", "inbound", principal, f"{target}", "connection complete"), "the access log names the caller")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_captured_server_that_speaks_first_is_heard_by_envoy(mesh: Mesh, family: int) -> None:
    target = mesh.address("shop/database", family, DATABASE_PORT)
    with mesh.envoy_dialling(target, expected=identity("shop", "server")):
        assert "ready" in str(mesh.traffic("foreign/caller", "hear", "127.0.0.1", ENTRY)["heard"])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_captured_server_sees_the_address_of_envoys_pod(mesh: Mesh, family: int) -> None:
    target = mesh.address("shop/server", family, 8080)
    with mesh.envoy_dialling(target, expected=identity("shop", "server")) as observed:
        answer = mesh.lab.curl("foreign/caller", f"http://127.0.0.1:{ENTRY}/")
        response = json.dumps(records(observed)[0]["response"])  # as long as it runs: an Envoy that ends may leave its last line out
    assert answer.stdout.startswith(f"hello {mesh.ips['foreign/caller', family]},")
    assert "k8s.pod.name=server" in response


@pytest.mark.parametrize("family", FAMILIES)
def test_policy_answers_envoy_401_and_nobody_reaches_the_server(mesh: Mesh, family: int) -> None:
    target = mesh.address("shop/target", family, TRAFFIC_PORT)
    mesh.lab.write("policy.yaml", DENY_ENVOY)
    try:
        with mesh.envoy_dialling(target, expected=identity("shop", "server")) as observed:
            refused = ("closed", "ConnectionResetError")
            wait_until(lambda: mesh.traffic("foreign/caller", "attempt", "127.0.0.1", ENTRY)["outcome"] in refused, "the refusal")
            wait_until(lambda: mesh.lab.access("n2", str(target), "explicitly denied by: shop/no-envoy"), "its reason in the access log")
            wait_until(lambda: any('"401"' in json.dumps(record) for record in records(observed)), "status 401 in Envoy's log")
    finally:
        mesh.lab.remove("policy.yaml")


def test_envoy_with_a_certificate_of_a_foreign_root_is_refused(mesh: Mesh) -> None:
    foreign = FakeCa()
    foreign.root_pem = mesh.ca.root_pem  # it trusts the mesh; the mesh does not trust it
    target = mesh.address("shop/target", 4, TRAFFIC_PORT)
    with mesh.envoy_dialling(target, expected=identity("shop", "server"), ca=foreign):
        assert mesh.traffic("foreign/caller", "attempt", "127.0.0.1", ENTRY)["outcome"] in ("closed", "ConnectionResetError")
    wait_until(lambda: mesh.lab.access("n2", mesh.ips["foreign/caller", 4], "connection failed", "certificate"), "the reason")


def test_envoy_refuses_a_captured_pod_that_is_not_whom_it_dialled(mesh: Mesh) -> None:
    target = mesh.address("shop/target", 4, TRAFFIC_PORT)
    with mesh.envoy_dialling(target, expected=identity("shop", "client")):
        assert mesh.traffic("foreign/caller", "attempt", "127.0.0.1", ENTRY)["outcome"] in ("closed", "ConnectionResetError")
        assert mesh.stat("foreign/caller", "cluster.peer.ssl.fail_verify_san") > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_nghttp_is_told_by_a_captured_pod_that_only_connect_is_served(mesh: Mesh, family: int) -> None:
    bundle = mesh.ca.issue(identity("foreign", "caller"))
    certificate, key = mesh.directory / "nghttp-cert.pem", mesh.directory / "nghttp-key.pem"
    certificate.write_bytes(b"".join(bundle.chain_pem))
    key.write_bytes(bundle.key_pem)
    url = f"https://{mesh.address('shop/target', family, INBOUND_HBONE)}/"
    done: subprocess.CompletedProcess[str] = mesh.lab.run(
        "foreign/caller", "nghttp", "-v", "-n", f"--cert={certificate}", f"--key={key}", url
    )
    assert ":status: 400" in done.stdout
    wait_until(lambda: mesh.lab.access("n2", "expected method CONNECT, got GET"), "the reason in the access log")

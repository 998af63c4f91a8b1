"""Handshakes that must not fail: while the authority is replaced, and between clocks that differ. Every connection makes one here."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from istiod_py.ca import BACKDATE, DEFAULT_TTL, CertificateAuthority
from tests.cluster.harness.api import Object
from tests.cluster.harness.client import Cluster, wait_until
from tests.cluster.mesh import (
    SYSTEM,
    access_log,
    agent_of,
    apply,
    label,
    meshctl,
    remove,
    wait_captured,
    wait_rolled_out,
)
from tests.cluster.workloads import addresses, apply_pods, attempt, echo_pod, loading, tunnelled

NAMESPACE = "certificates"
NODES = ("n1", "n2")
ALONE = {"POOL_UNUSED_RELEASE_TIMEOUT": "50ms"}
"""A connection between agents that has no tunnel goes: the next application that connects has one made."""
SHORT = {"SECRET_TTL": "140s"}
"""Certificates are renewed within half a minute: at half of their life, of which two minutes are over when they are made."""
RUN = "/run/ambient-mesh"
"""On a node; its agents have it as /var/run/ambient-mesh."""
LIBRARY, CLOCK = "libfaketimeMT.so.1", "clock"
FAKED = {
    "LD_PRELOAD": f"/var{RUN}/{LIBRARY}",
    "FAKETIME_TIMESTAMP_FILE": f"/var{RUN}/{CLOCK}",
    "FAKETIME_NO_CACHE": "1",
    "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    "FAKETIME_DISABLE_SHM": "1",
}


@dataclass(frozen=True)
class Authority:
    """By ``name`` its root is known here."""

    name: str
    files: dict[str, bytes]

    @classmethod
    def make(cls, directory: Path, name: str) -> Authority:
        CertificateAuthority.self_signed(directory / name, name, datetime.now(UTC))
        return cls(name, {file: (directory / name / file).read_bytes() for file in ("ca-key.pem", "ca-cert.pem")})

    @property
    def root(self) -> bytes:
        return self.files["ca-cert.pem"]


@dataclass(frozen=True)
class World:
    """A mesh of this module's own: ``first`` is plugged in, and agents keep no connection that is not in use."""

    cluster: Cluster
    first: Authority
    client: Object
    server: Object


@pytest.fixture(scope="module")
def world(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    directory = tmp_path_factory.mktemp("deploy")
    remove(cluster, directory)
    wait_until(lambda: cluster.api.find("Namespace", SYSTEM) is None, "the last mesh is gone")
    cluster.api.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": SYSTEM}})
    first = Authority.make(directory, "first.example")
    plug_in(cluster, first, first)
    apply(cluster, directory, patches=[("DaemonSet", "ztunnel", environment(ALONE | SHORT))])
    wait_rolled_out(cluster)
    with cluster.namespace(NAMESPACE) as namespace:
        made = apply_pods(cluster, namespace, echo_pod("client", "n1"), echo_pod("server", "n2"))
        label(cluster, namespace)
        wait_captured(cluster, namespace, 2)
        yield World(cluster, first, made["client"], made["server"])
    remove(cluster, directory)
    for node in cluster.nodes:
        node.run("rm", "-f", f"{RUN}/{LIBRARY}", f"{RUN}/{CLOCK}")


def environment(variables: dict[str, str]) -> list[tuple[str, Any]]:
    """What gives them to both containers of an agent."""
    return [
        (f"/spec/template/spec/containers/{number}/env/-", {"name": name, "value": value})
        for number in (0, 1)
        for name, value in variables.items()
    ]


def plug_in(cluster: Cluster, signer: Authority, *trusted: Authority) -> None:
    files = {**signer.files, "root-cert.pem": b"".join(authority.root for authority in trusted)}
    data = {name: base64.b64encode(content).decode() for name, content in files.items()}
    cluster.api.apply({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "cacerts", "namespace": SYSTEM}, "data": data})


# The authority


def certificates(cluster: Cluster) -> list[list[dict[str, Any]]]:
    """The chain that each agent has of its pod here, with the roots that came with it; empty while it has none."""
    found = []
    for node, pod in (("n1", "client"), ("n2", "server")):
        told = meshctl(cluster, "node", node, "certificates", "--pod", f"{NAMESPACE}/{pod}", "-o", "json", check=False)
        items = json.loads(told.stdout)["items"] if told.returncode == 0 else []
        found.append([part for item in items for part in item["chain"]])
    return found


def in_use(cluster: Cluster, signer: Authority, trusted: tuple[Authority, ...]) -> bool:
    """Whether it has signed what agents have, and these are whom they trust: with each certificate, and when they talk to istiod."""
    for chain in certificates(cluster):
        signers = {part["issuer"] for part in chain if part["type"] == "Leaf"}
        roots = {part["subject"] for part in chain if part["type"] == "Root"}
        if signers != {f"O={signer.name}"} or roots != {f"O={authority.name}" for authority in trusted}:
            return False
    return all(mounted(cluster, node) == {authority.root for authority in trusted} for node in NODES)


def mounted(cluster: Cluster, node: str) -> set[bytes]:
    """The roots in the agent's volume."""
    volume = f"/var/lib/kubelet/pods/{agent_of(cluster, node)['metadata']['uid']}/volumes/kubernetes.io~configmap/istio-ca-root-cert"
    text = cluster.node(node).run("cat", f"{volume}/root-cert.pem")
    return {certificate.public_bytes(Encoding.PEM) for certificate in x509.load_pem_x509_certificates(text.encode())}


def test_one_authority_follows_another_without_a_failed_handshake(world: World, tmp_path: Path) -> None:
    """As the reference of istiod has it: both roots are given before the key changes, and after it until all certificates are new."""
    cluster, first = world.cluster, world.first
    second = Authority.make(tmp_path, "second.example")
    wait_until(lambda: in_use(cluster, first, (first,)), "the first authority signs")
    wait_until(lambda: tunnelled(cluster, world.client, world.server), "traffic is tunnelled")
    with loading(cluster, world.client, addresses(world.server)[0], held=0, rate=10) as load:
        load.go_on()
        for signer, *trusted in ((first, first, second), (second, first, second), (second, second)):
            plug_in(cluster, signer, *trusted)
            cluster.kubectl("rollout", "restart", "-n", SYSTEM, "deployment/istiod")
            wait_rolled_out(cluster)
            wait_until(lambda signer=signer, trusted=trusted: in_use(cluster, signer, tuple(trusted)), f"{signer.name} signs")
            load.go_on()
        assert load.refused == []
    assert not [line for line in access_log(cluster, "n1") if "error=" in line and f"{NAMESPACE}/" in line]


# Clocks


@pytest.fixture
def clocks(world: World) -> Clocks:
    clocks = Clocks(world.cluster)
    for node in world.cluster.nodes:
        clocks.set(node.name, timedelta())
        library = node.run("find", "/usr/lib", "-name", LIBRARY).strip()
        assert library, "the node's root file system has libfaketime"
        node.run("cp", library, f"{RUN}/{LIBRARY}")
    variables = [f"{name}={value}" for name, value in FAKED.items()]
    world.cluster.kubectl("set", "env", "-n", SYSTEM, "daemonset/ztunnel", *variables, *(f"{name}-" for name in SHORT))
    wait_rolled_out(world.cluster)
    soon = datetime.now(UTC).timestamp() + DEFAULT_TTL.total_seconds() / 2
    wait_until(lambda: all(chain and chain[0]["notAfter"] > soon for chain in certificates(world.cluster)), "certificates last a day again")
    return clocks


class Clocks:
    """Of the nodes' agents."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def set(self, node: str, fast: timedelta) -> None:
        """How far it is before the true time."""
        text = f"{fast.total_seconds():+.0f}"
        self._cluster.node(node).run("sh", "-c", f"echo '{text}' >{RUN}/{CLOCK}.new && mv {RUN}/{CLOCK}.new {RUN}/{CLOCK}")


def fresh(cluster: Cluster, name: str, node: str) -> Object:
    """A pod with an identity of its own, and so with a certificate that was made this moment."""
    cluster.api.apply({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name, "namespace": NAMESPACE}})
    return apply_pods(cluster, NAMESPACE, echo_pod(name, node, account=name))[name]


def test_clocks_may_differ_by_what_certificates_are_back_dated_and_more_refuses_until_they_are_right(world: World, clocks: Clocks) -> None:
    cluster = world.cluster
    slow, fast, none = -0.75 * BACKDATE, 5 * BACKDATE, timedelta()
    # Both nodes slow, or fast, is the control plane's clock that is off.
    for number, (one, other) in enumerate(((none, slow), (slow, none), (slow, slow), (none, fast), (fast, none), (fast, fast))):
        clocks.set("n1", one)
        clocks.set("n2", other)
        client, server = fresh(cluster, f"client-{number}", "n1"), fresh(cluster, f"server-{number}", "n2")
        assert attempt(cluster, client, addresses(server)[0]) == "hello", (one, other)
        assert tunnelled(cluster, client, server), (one, other)
    for name, off, because in (("early", -5 * BACKDATE, "not yet valid"), ("late", DEFAULT_TTL + BACKDATE, "expired")):
        clocks.set("n1", none)
        clocks.set("n2", none)
        client = fresh(cluster, name, "n1")
        clocks.set("n2", off)
        wait_until(lambda client=client: attempt(cluster, client, addresses(world.server)[0]) != "hello", f"{name}: refused")
        agent = agent_of(cluster, "n2")["metadata"]["name"]
        wait_until(lambda agent=agent, because=because: because in cluster.logs(SYSTEM, agent, "--all-containers"), because)
        clocks.set("n2", none)
        wait_until(lambda client=client: attempt(cluster, client, addresses(world.server)[0]) == "hello", f"{name}: let in again")
        assert tunnelled(cluster, client, world.server)

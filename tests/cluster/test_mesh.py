"""What users of a cluster see: a label turns plaintext into mutual TLS, and policies decide who may speak."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mesh.model.ports import INBOUND_HBONE
from meshctl_py.lab.wiretap import Segment, is_tls, join_segments
from tests.cluster.harness.api import Object
from tests.cluster.harness.client import Cluster, wait_until
from tests.cluster.mesh import access_log, label, tapping, wait_captured, wait_released
from tests.cluster.workloads import PORT, addresses, apply_pods, attempt, echo_pod, service

NAMESPACE = "shop"


@pytest.fixture(scope="module")
def pods(mesh: Cluster) -> Iterator[dict[str, Object]]:
    """A client and a server on different nodes, and a stranger outside the mesh; none is labelled."""
    with mesh.namespace(NAMESPACE) as namespace, mesh.namespace("outside") as outside:
        mesh.api.apply({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "client", "namespace": namespace}})
        made = apply_pods(mesh, namespace, echo_pod("client", "n1", account="client"), echo_pod("server", "n2"), echo_pod("other", "n1"))
        mesh.api.create(f"/api/v1/namespaces/{namespace}/services", service("server", namespace))
        yield made | apply_pods(mesh, outside, echo_pod("stranger", "n1"))


@pytest.fixture
def enrolled(mesh: Cluster, pods: dict[str, Object]) -> dict[str, Object]:
    """All of the shop is in the mesh and its traffic is tunnelled; no policy is left."""
    label(mesh, NAMESPACE)
    wait_captured(mesh, NAMESPACE, 3)
    wait_until(lambda: tunnelled(mesh, pods), "traffic is tunnelled")
    return pods


def tunnelled(cluster: Cluster, pods: dict[str, Object]) -> bool:
    before = len(received(cluster))
    assert attempt(cluster, pods["client"], addresses(pods["server"])[0]) == "hello"
    return len(received(cluster)) > before


def received(cluster: Cluster) -> list[str]:
    """What the server's agent wrote of tunnels that came in."""
    return [line for line in access_log(cluster, "n2") if f":{INBOUND_HBONE}" in line and 'direction="inbound"' in line]


@pytest.mark.parametrize("family", [0, 1], ids=["IPv4", "IPv6"])
def test_plaintext_becomes_mutual_tls_by_a_label_and_plaintext_again_without_it(
    mesh: Cluster, pods: dict[str, Object], family: int
) -> None:
    host = addresses(pods["server"])[family]
    label(mesh, NAMESPACE, None)
    wait_released(mesh, NAMESPACE)
    with tapping(mesh.node("n2")) as tap:
        assert attempt(mesh, pods["client"], host) == "hello"
        streams = join_segments(tap.heard())
        assert [stream.data for stream in streams if stream.destination.port == PORT and str(stream.destination.ip) == host] == [b"hello"]

        label(mesh, NAMESPACE)
        wait_captured(mesh, NAMESPACE, 3)
        wait_until(lambda: tunnelled(mesh, pods), "traffic is tunnelled")
        tap.heard()
        assert attempt(mesh, pods["client"], host) == "hello"
        streams = join_segments(tap.heard())
        mine = [stream for stream in streams if host in (str(stream.source.ip), str(stream.destination.ip))]
        assert mine
        assert all(INBOUND_HBONE in (stream.source.port, stream.destination.port) and is_tls(stream) for stream in mine)
        assert not any(b"hello" in stream.data for stream in streams)

        label(mesh, NAMESPACE, None)
        wait_released(mesh, NAMESPACE)
        wait_until(lambda: attempt(mesh, pods["client"], host) == "hello" and heard_plain(tap.heard(), host), "plaintext again")


def heard_plain(segments: list[Segment], host: str) -> bool:
    return any(stream.data == b"hello" for stream in join_segments(segments) if str(stream.destination.ip) == host)

"""What users of a cluster see: a label turns plaintext into mutual TLS, and policies decide who may speak."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mesh.model.ports import INBOUND_HBONE
from meshctl_py.lab.wiretap import Segment, is_tls, join_segments
from tests.cluster.harness.api import Object, condition, path_of
from tests.cluster.harness.client import Cluster, wait_until
from tests.cluster.mesh import captured, label, tapping, wait_captured, wait_released
from tests.cluster.workloads import ATTEMPT, PORT, addresses, apply_pods, attempt, echo_pod, service, tunnelled

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
    wait_until(lambda: tunnelled(mesh, pods["client"], pods["server"]), "traffic is tunnelled")
    return pods


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
        wait_until(lambda: tunnelled(mesh, pods["client"], pods["server"]), "traffic is tunnelled")
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


# Policies


@pytest.fixture
def policies(mesh: Cluster) -> Iterator[Policies]:
    """Made by a test and taken away after it."""
    made = Policies(mesh)
    yield made
    made.clear()


class Policies:
    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._paths: list[str] = []

    def authorize(self, name: str, spec: Object) -> None:
        self._make("authorizationpolicies", {"kind": "AuthorizationPolicy", "metadata": {"name": name}, "spec": spec})

    def require_tls(self) -> None:
        self._make(
            "peerauthentications", {"kind": "PeerAuthentication", "metadata": {"name": "default"}, "spec": {"mtls": {"mode": "STRICT"}}}
        )

    def _make(self, plural: str, body: Object) -> None:
        path = f"/apis/security.istio.io/v1/namespaces/{NAMESPACE}/{plural}"
        self._cluster.api.create(path, {"apiVersion": "security.istio.io/v1", **body})
        self._paths.append(f"{path}/{body['metadata']['name']}")

    def find(self, number: int = 0) -> Object:
        """The policy that was made at this place in the order, as the API server has it now."""
        return self._cluster.api.get(self._paths[number])

    def clear(self) -> None:
        while self._paths:
            self._cluster.api.delete(self._paths.pop())


def says(cluster: Cluster, client: Object, server: Object, wanted: bool) -> bool:
    """Whether the client gets its echo, or not, at all addresses of the server."""
    return all((attempt(cluster, client, host) == "hello") is wanted for host in addresses(server))


@pytest.mark.parametrize(
    ("action", "account", "client", "other"), [("ALLOW", "client", True, False), ("DENY", "client", False, True)], ids=["ALLOW", "DENY"]
)
def test_a_policy_decides_by_identity(
    mesh: Cluster, enrolled: dict[str, Object], policies: Policies, action: str, account: str, client: bool, other: bool
) -> None:
    principal = f"cluster.local/ns/{NAMESPACE}/sa/{account}"
    selector = {"matchLabels": {"app": "server"}}
    policies.authorize("who", {"selector": selector, "action": action, "rules": [{"from": [{"source": {"principals": [principal]}}]}]})
    wait_until(lambda: says(mesh, enrolled["client"], enrolled["server"], client), f"the client is {'let in' if client else 'refused'}")
    wait_until(lambda: says(mesh, enrolled["other"], enrolled["server"], other), f"the other is {'let in' if other else 'refused'}")
    if action == "ALLOW":
        assert says(mesh, enrolled["stranger"], enrolled["server"], False), "plaintext bears no identity"
    assert says(mesh, enrolled["client"], enrolled["other"], True), "who is not selected is not concerned"
    policies.clear()
    for name in ("client", "other"):
        wait_until(lambda name=name: says(mesh, enrolled[name], enrolled["server"], True), "without the policy all are let in")


def test_status_of_a_policy_says_that_it_is_in_force(mesh: Cluster, enrolled: dict[str, Object], policies: Policies) -> None:
    policies.authorize("who", {"action": "DENY", "rules": [{"from": [{"source": {"namespaces": ["nowhere"]}}]}]})
    wait_until(lambda: condition(policies.find(), "ZtunnelAccepted"), "the condition is True")


def test_strict_refuses_plaintext_and_nobody_in_the_mesh(mesh: Cluster, enrolled: dict[str, Object], policies: Policies) -> None:
    assert says(mesh, enrolled["stranger"], enrolled["server"], True)
    policies.require_tls()
    wait_until(lambda: says(mesh, enrolled["stranger"], enrolled["server"], False), "plaintext is refused")
    assert says(mesh, enrolled["client"], enrolled["server"], True)


def test_probes_of_the_kubelet_pass_under_strict(mesh: Cluster, enrolled: dict[str, Object], policies: Policies) -> None:
    """A pod that becomes ready after STRICT is in force was let in by nothing else."""
    policies.require_tls()
    wait_until(lambda: says(mesh, enrolled["stranger"], enrolled["server"], False), "plaintext is refused")
    late = apply_pods(mesh, NAMESPACE, echo_pod("late", "n2"))
    try:
        assert captured(late["late"])
    finally:
        mesh.api.delete(path_of("Pod", "late", NAMESPACE))


def test_names_services_and_the_api_server_work_for_captured_pods(mesh: Cluster, enrolled: dict[str, Object]) -> None:
    assert attempt_by_name(mesh, "client", f"server.{NAMESPACE}.svc.cluster.local") == "hello"
    assert attempt_by_name(mesh, "client", "kubernetes.default", 443) != "ConnectionRefusedError"
    service_addresses = mesh.api.get(path_of("Service", "server", NAMESPACE))["spec"]["clusterIPs"]
    assert len(service_addresses) == 2
    for address in service_addresses:
        assert attempt(mesh, enrolled["client"], address) == "hello"


def attempt_by_name(cluster: Cluster, pod: str, host: str, port: int = PORT) -> str:
    """In the pod itself, which has the cluster's DNS."""
    return cluster.exec(NAMESPACE, pod, "python3", "-c", ATTEMPT, host, str(port)).strip()

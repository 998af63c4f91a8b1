"""Istio's own node proxy in our mesh: it takes configuration and certificates from our control plane, and tunnels to and from our agents
and waypoints.

ZTUNNEL_BIN names one that was built outside the repository; there is none in a package to be had.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from mesh.testing.lab import Lab, running_lab, wait_until
from tests.interop.istio_ztunnel import IstioZtunnel, Served, serving

BINARY = os.environ.get("ZTUNNEL_BIN")
pytestmark = [
    pytest.mark.interop,
    pytest.mark.netns,
    pytest.mark.skipif(BINARY is None, reason="ZTUNNEL_BIN names no Rust ztunnel"),
]

EXAMPLE = Path(__file__).parents[2] / "examples" / "two-nodes"
FAMILIES = (4, 6)

THEIRS = """
apiVersion: v1
kind: Namespace
metadata: {name: theirs}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: web, namespace: theirs}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: caller, namespace: theirs}
---
apiVersion: v1
kind: Pod
metadata:
  name: web
  namespace: theirs
  labels: {app: web}
  annotations: {ambient.istio.io/redirection: enabled}
spec:
  nodeName: n2
  serviceAccountName: web
  containers:
    - {name: web, command: [python3, apps/server.py], args: ["8080"], readinessProbe: {tcpSocket: {port: 8080}}}
---
apiVersion: v1
kind: Pod
metadata:
  name: caller
  namespace: theirs
  annotations: {ambient.istio.io/redirection: enabled}
spec:
  nodeName: n2
  serviceAccountName: caller
  containers:
    - {name: shell, command: [sleep, infinity]}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: theirs}
spec:
  selector: {app: web}
  ipFamilyPolicy: PreferDualStack
  ports: [{name: http, port: 80, targetPort: 8080}]
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with running_lab(EXAMPLE, tmp_path_factory.mktemp("istio")) as lab:
        lab.label("shop", "istio.io/dataplane-mode=ambient")
        lab.write("theirs.yaml", THEIRS)
        wait_until(lambda: {"shop/client", "shop/server"} <= lab.pods_in_mesh(), "the shop's pods are captured by our agents")
        wait_until(lambda: lab.pod("theirs/web")["ready"], "the pods of Istio's proxy run")
        yield lab


@pytest.fixture(scope="module")
def theirs(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[IstioZtunnel]:
    pods = [Served("theirs", "web"), Served("theirs", "caller")]
    with serving(lab, Path(BINARY or ""), "n2", pods, tmp_path_factory.mktemp("ztunnel")) as ztunnel:
        wait_until(lambda: answers(lab, "shop/client", "http://web.theirs/"), "our agent reaches its pods")
        wait_until(lambda: answers(lab, "theirs/caller", "http://server.shop/"), "it reaches ours")
        yield ztunnel


@pytest.fixture(autouse=True)
def no_rules_are_left(lab: Lab) -> Iterator[None]:
    yield
    lab.remove("rules.yaml")


def answers(lab: Lab, where: str, url: str, *options: str) -> bool:
    return lab.curl(where, url, *options).returncode == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_our_agent_reaches_its_pods_by_mutual_tls(lab: Lab, theirs: IstioZtunnel, family: int) -> None:
    words = ('src.identity="spiffe://cluster.local/ns/shop/sa/client"', 'direction="inbound"', ":15008")
    before = len(theirs.access(*words))
    assert answers(lab, "shop/client", "http://web.theirs/", f"-{family}")
    wait_until(lambda: len(theirs.access(*words)) > before, "its log has the client's identity")
    ours = lab.access("n1", 'dst.identity="spiffe://cluster.local/ns/theirs/sa/web"', 'direction="outbound"')
    assert ours
    assert "error=" not in ours[-1]


@pytest.mark.parametrize("family", FAMILIES)
def test_it_reaches_our_pods_by_mutual_tls(lab: Lab, theirs: IstioZtunnel, family: int) -> None:
    words = ('src.identity="spiffe://cluster.local/ns/theirs/sa/caller"', 'direction="inbound"', ":15008")
    before = len(lab.access("n2", *words))
    assert answers(lab, "theirs/caller", "http://server.shop/", f"-{family}")
    wait_until(lambda: len(lab.access("n2", *words)) > before, "our log has the caller's identity")
    (last,) = theirs.access('dst.identity="spiffe://cluster.local/ns/shop/sa/server"', 'direction="outbound"')[-1:]
    assert "error=" not in last


@pytest.mark.parametrize(("namespace", "server"), [("theirs", "web.theirs"), ("shop", "server.shop")])
def test_who_proves_no_identity_is_refused_where_that_is_asked_for(lab: Lab, theirs: IstioZtunnel, namespace: str, server: str) -> None:
    assert answers(lab, "outside/caller", f"http://{server}/")
    lab.write(
        "rules.yaml",
        f"""
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {{name: strict, namespace: {namespace}}}
spec: {{mtls: {{mode: STRICT}}}}
""",
    )
    wait_until(lambda: not answers(lab, "outside/caller", f"http://{server}/"), "plain text is refused")
    for member in ("shop/client", "theirs/caller"):
        assert answers(lab, member, f"http://{server}/")


@pytest.mark.parametrize(("namespace", "app", "server"), [("theirs", "web", "web.theirs"), ("shop", "server", "server.shop")])
def test_a_policy_tells_callers_apart(lab: Lab, theirs: IstioZtunnel, namespace: str, app: str, server: str) -> None:
    lab.write(
        "rules.yaml",
        f"""
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: callers, namespace: {namespace}}}
spec:
  selector: {{matchLabels: {{app: {app}}}}}
  action: ALLOW
  rules: [{{from: [{{source: {{principals: [cluster.local/ns/shop/sa/client, cluster.local/ns/theirs/sa/caller]}}}}]}}]
""",
    )
    wait_until(lambda: not answers(lab, "shop/stranger", f"http://{server}/"), "the stranger is refused")
    for member in ("shop/client", "theirs/caller"):
        assert answers(lab, member, f"http://{server}/")
    if namespace == "theirs":
        assert theirs.access("shop/sa/stranger", "policy rejection")


@pytest.mark.parametrize(("namespace", "server"), [("theirs", "web.theirs"), ("shop", "server.shop")])
def test_our_waypoint_stands_between(lab: Lab, theirs: IstioZtunnel, namespace: str, server: str) -> None:
    lab.meshctl("waypoint", "apply", "-n", namespace, "--enroll-namespace", "--lab", lab.name)
    try:
        for member in ("shop/client", "theirs/caller"):
            wait_until(lambda member=member: "x-envoy-upstream-service-time" in lab.curl(member, f"http://{server}/", "-i").stdout,
                       f"{member} goes through the waypoint")  # fmt: skip
            assert answers(lab, member, f"http://{server}/", "-f")
    finally:
        lab.meshctl("label", "namespace", namespace, "istio.io/use-waypoint-", "--lab", lab.name)
        lab.meshctl("waypoint", "delete", "-n", namespace, "--all", "--lab", lab.name)
    # What the waypoint keeps open for requests to come is logged when the waypoint has gone.
    end = 'src.identity="spiffe://cluster.local/ns/theirs/sa/waypoint"' if namespace == "theirs" else 'dst.workload="waypoint-0"'
    wait_until(lambda: theirs.access(end), "its log has the waypoint")

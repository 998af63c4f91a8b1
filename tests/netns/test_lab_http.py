"""A lab with a waypoint of the mesh's own: requests are routed and judged by what they say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mesh.testing.lab import Lab, running_lab, wait_until

pytestmark = pytest.mark.netns

EXAMPLE = Path(__file__).parents[2] / "examples" / "two-nodes"
WAYPOINT = """\
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: waypoint, namespace: shop}
spec:
  gatewayClassName: istio-waypoint
  listeners: [{name: mesh, port: 15008, protocol: HBONE}]
"""
RULES = """\
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: no-secrets, namespace: shop}
spec:
  targetRefs: [{group: "", kind: Service, name: server}]
  action: DENY
  rules: [{to: [{operation: {paths: [/secret]}}]}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: server, namespace: shop}
spec:
  parentRefs: [{group: "", kind: Service, name: server, port: 80}]
  rules:
  - matches: [{path: {value: /moved}}]
    filters: [{type: RequestRedirect, requestRedirect: {statusCode: 302}}]
  - matches: [{path: {value: /}}]
    backendRefs: [{name: server, port: 80}]
"""
ASK = """
import http.client, sys
connection = http.client.HTTPConnection("server", 80, timeout=5)
connection.request("GET", sys.argv[1])
answer = connection.getresponse()
print(answer.status, answer.read().decode()[:60])
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with running_lab(EXAMPLE, tmp_path_factory.mktemp("labhttp")) as lab:
        lab.label("shop", "istio.io/dataplane-mode=ambient")
        wait_until(lambda: len(lab.pods_in_mesh()) == 4, "the pods of the shop are captured")
        lab.write("waypoint.yaml", WAYPOINT)
        wait_until(lambda: [each["because"] for each in lab.status()["waypoints"]] == [""], "the waypoint is programmed")
        lab.label("shop", "istio.io/use-waypoint=waypoint")
        lab.write("rules.yaml", RULES)
        yield lab


def ask(lab: Lab, path: str) -> str:
    return lab.run("shop/client", "python3", "-c", ASK, path).stdout.strip()


def test_requests_are_routed_and_judged_by_what_they_say(lab: Lab) -> None:
    wait_until(lambda: ask(lab, "/secret").startswith("403"), "the policy holds")
    assert ask(lab, "/moved").startswith("302")
    assert ask(lab, "/").startswith("200 hello")

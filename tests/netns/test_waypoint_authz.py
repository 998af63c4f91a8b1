"""External authorizers in the lab, configured as Istio has it: the mesh configuration names them, CUSTOM policies ask them."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from mesh.testing.lab import Lab, wait_until
from mesh.testing.waypoints import CLIENT, DENIED, Answer, ask, lines_of, objects, problems_of, running_shop

pytestmark = pytest.mark.netns

AUTHORIZER = """\
apiVersion: v1
kind: Pod
metadata: {name: authorizer, namespace: shop, labels: {app: authorizer}}
spec:
  nodeName: n2
  serviceAccountName: server
  containers:
    - name: authorizer
      command: [python3, apps/authorizer.py, "8080", "9090"]
      readinessProbe: {tcpSocket: {port: 8080}}
---
apiVersion: v1
kind: Service
metadata: {name: authorizer, namespace: shop}
spec:
  selector: {app: authorizer}
  ports: [{name: http, port: 8080}, {name: grpc, port: 9090}, {name: http-closed, port: 8081}]
---
apiVersion: v1
kind: Service
metadata: {name: nobody, namespace: shop}
spec: {selector: {app: nobody}, ports: [{name: http, port: 8080}]}
"""
MESH = """\
apiVersion: v1
kind: ConfigMap
metadata: {name: istio, namespace: istio-system}
data:
  mesh: |
    extensionProviders:
      - name: by-http
        envoyExtAuthzHttp:
          service: authorizer.shop.svc.cluster.local
          port: 8080
          timeout: 1s
          pathPrefix: /check
          includeRequestHeadersInCheck: [x-token]
          includeAdditionalHeadersInCheck: {x-from: waypoint}
          headersToUpstreamOnAllow: [x-user]
          headersToDownstreamOnDeny: [x-seen]
          headersToDownstreamOnAllow: [x-seen]
      - name: by-grpc
        envoyExtAuthzGrpc:
          service: shop/authorizer.shop.svc.cluster.local
          port: 9090
          timeout: 1s
          includeRequestBodyInCheck: {maxRequestBytes: 16, allowPartialMessage: true}
      - name: closed
        envoyExtAuthzHttp: {service: authorizer.shop.svc.cluster.local, port: 8081}
      - name: closed-503
        envoyExtAuthzHttp: {service: authorizer.shop.svc.cluster.local, port: 8081, statusOnError: "503"}
      - name: closed-open
        envoyExtAuthzHttp: {service: authorizer.shop.svc.cluster.local, port: 8081, failOpen: true}
      - name: nobody
        envoyExtAuthzGrpc: {service: nobody.shop.svc.cluster.local, port: 8080}
      - name: nobody-503
        envoyExtAuthzGrpc: {service: nobody.shop.svc.cluster.local, port: 8080, statusOnError: 503}
      - name: nobody-open
        envoyExtAuthzGrpc: {service: nobody.shop.svc.cluster.local, port: 8080, failOpen: true}
"""
CUSTOM = """\
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: asked, namespace: shop}
spec:
  targetRefs: [{group: "", kind: Service, name: web}]
  action: CUSTOM
  provider: {name: PROVIDER}
  rules: [{to: [{operation: {paths: ["/asked*"]}}]}]
"""
GOOD, SLOW, BROKEN = (("-H", f"x-token: {token}") for token in ("good", "slow", "broken"))


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    directory = tmp_path_factory.mktemp("waypointauthz")
    with running_shop(directory, programs=("authorizer.py",), authorizer=AUTHORIZER, mesh=MESH) as lab:
        assert problems_of(lab, "mesh.yaml") == []
        yield lab


def test_an_authorizer_is_asked_by_http(lab: Lab) -> None:
    with objects(lab, CUSTOM.replace("PROVIDER", "by-http")):
        told = ask(lab, "http://web/asked?a=b", *GOOD).told["headers"]
        assert told["x-user"] == "ann"
        assert "x-secret" not in told
        assert ask(lab, "http://web/asked?a=b") == Answer(418, "no entry for GET /check/asked?a=b")
        assert ask(lab, "http://web/asked", "-X", "PUT", "-d", "x").text == "no entry for PUT /check/asked"
        assert ask(lab, "http://web/else").status == 200, "what the policy does not match is not asked about"
        shown = lab.curl(CLIENT, "http://web/asked", "-D", "-", "-H", "x-other: 1").stdout.lower()
        assert "x-seen: x-from" in shown
        assert "x-other" not in shown, "the authorizer is shown what it is configured to see"
        assert "x-secret" not in shown
        began = time.monotonic()
        assert ask(lab, "http://web/asked", *SLOW).status == 403
        assert time.monotonic() - began >= 1, "the authorizer has its time"
        assert ask(lab, "http://web/asked", *BROKEN).status == 403


def test_an_authorizer_is_asked_by_grpc(lab: Lab) -> None:
    with objects(lab, CUSTOM.replace("PROVIDER", "by-grpc")):
        told = ask(lab, "http://web/asked", *GOOD, "-d", "a body of more than 16 bytes").told
        assert told["headers"]["x-peer"] == "spiffe://cluster.local/ns/shop/sa/client"
        assert told["headers"]["x-body"] == "a body of more t"
        assert "x-token" not in told["headers"]
        assert told["received"] == 28, "the application gets all of the body"
        assert ask(lab, "http://web/asked?a=b") == Answer(418, "no entry for GET /asked?a=b")
        assert ask(lab, "http://web/else").status == 200
        assert ask(lab, "http://web/asked", *SLOW).status == 403
        assert ask(lab, "http://web/asked", *BROKEN).status == 403


@pytest.mark.parametrize("provider", ["closed", "nobody"])
def test_an_authorizer_that_cannot_be_reached_refuses_as_it_is_configured(lab: Lab, provider: str) -> None:
    """``closed``: by HTTP, nobody listens there. ``nobody``: by gRPC, the service has no pods."""
    cases = {"web": (provider, 403), "web-v1": (f"{provider}-503", 503), "web-v2": (f"{provider}-open", 200)}
    policies = [
        CUSTOM.replace("PROVIDER", name).replace("name: web}", f"name: {service}}}").replace("name: asked", f"name: asked-{service}")
        for service, (name, _) in cases.items()
    ]
    with objects(lab, "---\n".join(policies)):
        for service, (name, status) in cases.items():
            assert ask(lab, f"http://{service}/asked/{name}", *GOOD).status == status
            assert ask(lab, f"http://{service}/else").status == 200
            assert lines_of(lab, f"/asked/{name} ", f" {status} ")


def test_an_authorizer_that_nobody_knows_denies_and_status_says_so(lab: Lab) -> None:
    with objects(lab, CUSTOM.replace("PROVIDER", "nowhere"), mistaken=True):
        assert ask(lab, "http://web/asked", *GOOD) == DENIED
        assert ask(lab, "http://web/else").status == 200
        (problem,) = problems_of(lab, "tested.yaml")
        assert problem.startswith("spec.provider.name: what the rules match is refused: the mesh configuration has no provider 'nowhere'")


def test_a_policy_whose_targets_are_no_list_denies_at_the_waypoint_and_says_where_it_is_wrong(lab: Lab) -> None:
    for_waypoints = """\
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: mistaken, namespace: shop}
spec:
  targetRefs: {group: "", kind: Service, name: web}
  rules: [{}]
"""
    with objects(lab, for_waypoints, mistaken=True):
        assert [problem.partition(":")[0] for problem in problems_of(lab, "tested.yaml")] == ["spec.targetRefs"]
        assert ask(lab).status == 403
        assert lab.run(CLIENT, "python3", "apps/get.py", f"http://{lab.pod('shop/web-v1')['ips'][0]}:8080/", "4").stdout.startswith(
            "200"
        ), "node agents do not enforce what is for waypoints"
        lab.write("tested.yaml", for_waypoints.replace("{group", "[{group").replace("web}", "web}]"))
        wait_until(lambda: ask(lab).status == 200, "the policy that was mended allows")
        lab.write("tested.yaml", for_waypoints)
        wait_until(lambda: problems_of(lab, "tested.yaml"), "the mistake is told again")
        assert ask(lab).status == 200, "the last good version stays"

"""A waypoint in the lab, with nothing left out: agents of two nodes, the waypoint between them, and what routes and policies do there."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from functools import partial

import pytest

from mesh.testing.lab import Lab, wait_until
from mesh.testing.waypoints import (
    CLIENT,
    DENIED,
    STRANGER,
    WAYPOINT,
    Answer,
    access_lines,
    ask,
    ask_often,
    denial,
    lines_of,
    objects,
    passes,
    running_shop,
    virtual_service,
)
from meshctl_py.lab.demo.examples import read_example
from meshctl_py.lab.demo.tokens import Issuer

pytestmark = pytest.mark.netns


REQUIRED = "ambient.mesh/waypoint-required"


def example(name: str, **values: str) -> str:
    return read_example(f"two-nodes-waypoint/{name}.yaml", **values)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with running_shop(tmp_path_factory.mktemp("waypoint")) as lab:
        yield lab


# The way


@pytest.mark.parametrize("family", ["4", "6"])
def test_a_request_passes_the_waypoint_which_is_itself_towards_the_server(lab: Lab, family: str) -> None:
    path = f"/close?over={family}"
    answer = ask(lab, f"http://web{path}", f"-{family}")
    assert answer.status == 200
    assert (answer.told["method"], answer.told["headers"]["host"]) == ("GET", "web")
    (line,) = wait_until(partial(lines_of, lab, path), "the waypoint's access log has the request")
    assert "200" in line
    wait_until(lambda: lab.access("n1", "shop/sa/client", WAYPOINT, "web.shop.svc.cluster.local", "outbound"), "the client's agent says so")
    wait_until(lambda: lab.access("n2", f'src.identity="{WAYPOINT}"', "web-v", "inbound"), "the server's agent sees the waypoint")


def test_what_goes_to_a_port_that_is_not_http_passes_as_it_is(lab: Lab) -> None:
    """The server speaks first."""
    done = lab.run(CLIENT, "python3", "apps/greet.py", "database", "3306")
    assert done.returncode == 0, done.stdout + done.stderr


def test_bodies_pass_in_both_directions(lab: Lab) -> None:
    body = "".join(f"{number:09}\n" for number in range(10_000))
    (lab.source / "apps" / "body.txt").write_text(body)
    for framing in ("transfer-encoding: chunked", f"content-length: {len(body)}"):
        answer = ask(lab, "http://web/echo", "-H", framing, "-H", "expect: 100-continue", "--data-binary", "@apps/body.txt")
        assert (answer.status, answer.told["method"]) == (200, "POST")
        assert answer.told["body"] == body
    assert ask(lab, "http://web/", "-I").status == 200


# Routes


def test_an_http_route_splits_and_matches_headers(lab: Lab) -> None:
    with objects(lab, example("split")):
        split = Counter(answer.told["version"] for answer in ask_often(lab, 200))
        # 20 are expected; five standard deviations are 21.
        assert 2 <= split["v2"] <= 41
        assert split["v1"] == 200 - split["v2"]
        chosen = Counter(answer.told["version"] for answer in ask_often(lab, 20, "http://web/", "-H", "x-version: v2"))
        assert chosen == {"v2": 20}


ROWS = """\
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: rows, namespace: shop}
spec:
  parentRefs: [{group: "", kind: Service, name: web}]
  rules:
    - matches: [{path: {type: Exact, value: /exact}}]
      backendRefs: [{name: web-v2, port: 80}]
    - matches: [{path: {value: /redirect}}]
      filters: [{type: RequestRedirect, requestRedirect: {hostname: example.org, statusCode: 301}}]
    - matches: [{path: {value: /strip-prefix}}]
      filters:
        - {type: URLRewrite, urlRewrite: {hostname: one.example.org, path: {type: ReplacePrefixMatch, replacePrefixMatch: /}}}
        - {type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: X-Set, value: set}], remove: [x-remove]}}
        - {type: ResponseHeaderModifier, responseHeaderModifier: {set: [{name: X-Header-Set, value: answered}]}}
      backendRefs: [{name: web-v1, port: 80}]
    - matches: [{path: {value: /slow}}]
      timeouts: {request: 200ms}
      backendRefs: [{name: web-v1, port: 80}]
    - matches: [{path: {value: /nobody}}]
    - matches: [{path: {value: /partly}, method: GET}]
      backendRefs: [{name: nobody, port: 80}]
"""


def test_rows_of_the_conformance_suite(lab: Lab) -> None:
    """What the suite's client sees and its echo server; the rows themselves are unit tests."""
    with objects(lab, ROWS, mistaken=True):
        assert {answer.told["version"] for answer in ask_often(lab, 5, "http://web/exact")} == {"v2"}
        assert ask(lab, "http://web/exact/").status == 404
        redirected = ask(lab, "http://web/redirect/x?y=1", "-w", "%{redirect_url}\n%{http_code}")
        assert redirected == Answer(301, "http://example.org/redirect/x?y=1")
        rewritten = ask(lab, "http://web/strip-prefix/a?b=c", "-H", "x-set: old", "-H", "x-remove: it", "-H", "host: whatever.example")
        headers = rewritten.told["headers"]
        assert (rewritten.told["path"], headers["host"], headers["x-set"]) == ("/a?b=c", "one.example.org", "set")
        assert "x-remove" not in headers
        assert "x-header-set: answered" in ask(lab, "http://web/strip-prefix", "-D", "-", "-o", "/dev/null").text
        assert ask(lab, "http://web/slow") == Answer(504, "upstream request timeout")
        assert [ask(lab, f"http://web/{path}").status for path in ("nobody", "partly", "else")] == [500, 500, 404]


def test_a_virtual_service_makes_faults_and_hides_those_of_the_application(lab: Lab) -> None:
    with objects(lab, example("faults")):
        assert ask(lab, "http://web/", "-H", "x-fault: abort") == Answer(418, "fault filter abort")
        began = time.monotonic()
        assert ask(lab, "http://web/", "-H", "x-fault: delay").status == 200
        assert time.monotonic() - began >= 1
        seen = [answer.status for answer in ask_often(lab, 6, "http://web/flaky", "-H", "x-retry: none")]
        assert seen == [503, 200] * 3
        assert [answer.status for answer in ask_often(lab, 6, "http://web/flaky")] == [200] * 6
        assert ask(lab, "http://web/slow") == Answer(504, "upstream request timeout")


SUBSETS = """\
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: web, namespace: shop}
spec:
  host: web
  subsets: [{name: old, labels: {version: v1}}, {name: new, labels: {version: v2}}, {name: none, labels: {version: v3}}]
""" + virtual_service(
    "web",
    "match: [{headers: {x-subset: {exact: new}}}], route: [{destination: {host: web, subset: new}}]",
    "match: [{headers: {x-subset: {exact: none}}}], route: [{destination: {host: web, subset: none}}]",
    "route: [{destination: {host: web, subset: old}}]",
)


def test_a_subset_is_the_pods_with_its_labels(lab: Lab) -> None:
    with objects(lab, SUBSETS, mistaken=True):  # nobody is in one of them
        assert {answer.told["version"] for answer in ask_often(lab, 20)} == {"v1"}
        assert {answer.told["version"] for answer in ask_often(lab, 20, "http://web/", "-H", "x-subset: new")} == {"v2"}
        assert ask(lab, "http://web/", "-H", "x-subset: none") == Answer(503, "no healthy upstream")


# Policies

READERS = example("readers")


def test_a_principal_may_read_and_not_write_and_another_may_neither(lab: Lab) -> None:
    with objects(lab, READERS):
        assert ask(lab).status == 200
        assert ask(lab, "http://web/", "-X", "POST", "-d", "x") == DENIED
        assert ask(lab, client=STRANGER) == DENIED
        assert ask(lab, "http://web-v1/", client=STRANGER).status == 200, "the policy is for another service"
    assert ask(lab, "http://web/", "-X", "POST", "-d", "x").status == 200


def test_a_policy_for_the_gateway_is_for_all_its_services(lab: Lab) -> None:
    gateway = READERS.replace('{group: "", kind: Service, name: web}', "{group: gateway.networking.k8s.io, kind: Gateway, name: waypoint}")
    with objects(lab, gateway):
        assert ask(lab, "http://web-v1/").status == 200
        assert ask(lab, "http://web-v1/", client=STRANGER) == DENIED


DENY_ALL = """\
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: nobody, namespace: shop}
spec:
  targetRefs: [{group: gateway.networking.k8s.io, kind: Gateway, name: waypoint}]
  action: DENY
  rules: [{}]
"""
ONLY_BY_WAYPOINT = """\
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: only-by-waypoint, namespace: shop}
spec:
  selector: {matchLabels: {app: web}}
  rules: [{from: [{source: {principals: [cluster.local/ns/shop/sa/waypoint]}}]}]
"""


def test_what_comes_past_the_waypoint_is_held_to_no_policy_there_and_agents_can_refuse_it(lab: Lab) -> None:
    """As the reference says (`docs/reference/waypoints.md`)."""
    pod = next(ip for ip in lab.pod("shop/web-v1")["ips"] if "." in ip)
    past = f"http://{pod}:8080/"
    with objects(lab, DENY_ALL):
        assert ask(lab) == DENIED
        assert ask(lab, past).status == 200, "the waypoint is for services alone"
        assert ask(lab, past, client="outside/caller").status == 200
        assert ask(lab, "http://web.shop/", client="outside/caller").status == 200
    lab.write("only.yaml", ONLY_BY_WAYPOINT)
    try:
        wait_until(lambda: ask(lab, past).status == 0, "the pod's agent refuses who does not come by the waypoint")
        for url in (past, "http://web.shop/"):
            assert ask(lab, url, client="outside/caller").status == 0
        assert ask(lab).status == 200
    finally:
        lab.remove("only.yaml")
        wait_until(lambda: ask(lab, past).status == 200, "the policy is gone")


def test_pods_of_a_service_that_requires_its_waypoint_strictly_let_in_nobody_else(lab: Lab) -> None:
    web = (lab.source / "web.yaml").read_text()
    plain, strict = (f"metadata: {{name: web, namespace: shop{more}}}" for more in ("", f", annotations: {{{REQUIRED}: strict}}"))
    assert plain in web
    past = [f"http://{f'[{ip}]' if ':' in ip else ip}:8080/" for ip in lab.pod("shop/web-v1")["ips"]]
    assert len(past) == 2
    lab.write("web.yaml", web.replace(plain, strict))
    try:
        wait_until(lambda: {ask(lab, url).status for url in past} == {0}, "the pod's agent refuses who does not come by the waypoint")
        assert {ask(lab, url, client="outside/caller").status for url in (*past, "http://web.shop/")} == {0}
        assert ask(lab).status == 200
        wait_until(lambda: lab.access("n2", "shop/sa/client", "waypoint_required_by_web"), "its log says why")
        assert all(pod["ready"] for pod in lab.status()["pods"]), "probes are none of it"
    finally:
        lab.write("web.yaml", web)
        wait_until(lambda: {ask(lab, url).status for url in past} == {200}, "it is required no more")


def test_a_policy_that_cannot_be_understood_denies_until_it_can(lab: Lab) -> None:
    with objects(lab, READERS.replace("methods: [GET]", "methds: [GET]"), mistaken=True):
        assert ask(lab).status == 403
        assert ask(lab, "http://web-v1/").status == 200
        lab.write("tested.yaml", READERS)
        wait_until(lambda: ask(lab).status == 200, "the policy that was mended allows")


ISSUER = Issuer()
AUTHENTICATION = example("tokens", JWKS=ISSUER.key_set)
BUYERS = """\
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: buyers, namespace: shop}
spec:
  targetRefs: [{group: "", kind: Service, name: web}]
  rules:
    - from: [{source: {requestPrincipals: ["https://issuer.test/*"]}}]
      when: [{key: "request.auth.claims[group]", values: [buyers]}]
"""
BY_CLAIM = "---\n" + example("by-claim")


def bearer(issuer: Issuer = ISSUER, **claims: object) -> tuple[str, str]:
    """Options of curl that present a token."""
    return "-H", f"authorization: Bearer {issuer.sign(**claims)}"


def test_tokens_are_proved_and_refused_with_what_is_wrong(lab: Lab) -> None:
    with objects(lab, AUTHENTICATION):
        valid = ask(lab, "http://web/", *bearer())
        assert (valid.status, valid.told["headers"]["x-group"]) == (200, "buyers")
        assert "authorization" not in valid.told["headers"]
        assert ask(lab, "http://web/", *bearer(Issuer())) == Answer(401, "Jwt verification fails")
        assert ask(lab, "http://web/", *bearer(exp=int(time.time()) - 600)) == Answer(401, "Jwt is expired")
        assert ask(lab, "http://web/", *bearer(aud="bank")) == Answer(403, "Audiences in Jwt are not allowed")
        assert ask(lab).status == 200, "who has none passes"
        forged = ask(lab, "http://web/", "-H", "x-group: buyers")
        assert "x-group" not in forged.told["headers"], "what tokens say is said by nobody else"


def test_a_policy_asks_for_a_token_and_its_claims_and_routes_follow_them(lab: Lab) -> None:
    with objects(lab, AUTHENTICATION + BUYERS + BY_CLAIM):
        wait_until(lambda: ask(lab) == DENIED, "who has no token is denied")
        assert {answer.told["version"] for answer in ask_often(lab, 12, "http://web/", *bearer())} == {"v2"}
        assert ask(lab, "http://web/", *bearer(group="sellers")) == DENIED
        assert ask(lab, "http://web/", "-H", "x-group: buyers") == DENIED
    with objects(lab, AUTHENTICATION + BY_CLAIM):
        for options in ((), bearer(group="sellers"), ("-H", "x-group: buyers")):
            assert {answer.told["version"] for answer in ask_often(lab, 12, "http://web/", *options)} == {"v1"}


# The life of a waypoint


def test_a_waypoint_that_is_killed_is_started_again_and_nothing_passes_meanwhile(lab: Lab) -> None:
    with objects(lab, READERS):
        began = lab.log("shop/waypoint-0").count("\tserving\t")
        assert ask(lab, client=STRANGER) == DENIED
        lab.meshctl("lab", "kill", "shop/waypoint-0", "--name", lab.name)
        seen: list[Answer] = []

        def is_back() -> bool:
            # Who must not pass does not pass either while there is nobody who says so.
            seen.append(ask(lab, client=STRANGER))
            return ask(lab).status == 200

        wait_until(is_back, "requests pass again")
        assert {answer.status for answer in seen} <= {0, 403, 503}
        assert lab.log("shop/waypoint-0").count("\tserving\t") == began + 1
        assert ask(lab, client=STRANGER) == DENIED


WRITERS_ARE_DENIED = denial("no-writers", "methods: [POST]", "web", "web-v1")


UNTIL_ENOUGH = "until [ -e apps/enough ]; do curl -sS -m 5 -o /dev/null -w '%{http_code}\\n' METHOD http://web/ 2>&1; done"
"""One connection after the other, with what came of each."""


def method_of(line: str) -> str:
    """Of the request that a line of the access log is about."""
    return line.split('"')[1].split()[0]


def test_a_service_that_moves_to_another_waypoint_loses_no_request_and_no_policy(lab: Lab) -> None:
    web = (lab.source / "web.yaml").read_text()
    bound = "metadata: {name: web, namespace: shop, labels: {istio.io/use-waypoint: other}}"
    lab.meshctl("waypoint", "apply", "-n", "shop", "--name", "other", "--wait", "--lab", lab.name, timeout=120)
    try:
        with objects(lab, WRITERS_ARE_DENIED):
            before = Counter(method_of(line) for line in access_lines(lab, "shop/waypoint-0"))
            readers, writers = (lab.start(CLIENT, "sh", "-c", UNTIL_ENOUGH.replace("METHOD", each)) for each in ("-XGET", "-XPOST -dx"))
            one_connection = ("--rate", "20/s", "-o", "/dev/null", "-w", "%{http_code}\\n", "http://web/?number=[1-120]")
            keeper = lab.start(CLIENT, "curl", "-sS", "-m", "30", *one_connection)
            wait_until(
                lambda: {"GET", "POST"} <= {*(Counter(method_of(line) for line in access_lines(lab, "shop/waypoint-0")) - before)},
                "both ask",
            )
            for text in (web.replace("metadata: {name: web, namespace: shop}", bound), web) * 3:
                lab.write("web.yaml", text)
                time.sleep(1)
            (lab.source / "apps" / "enough").touch()
            read, written, kept = (Counter(each.communicate(timeout=30)[0].splitlines()) for each in (readers, writers, keeper))
        assert [*read] == ["200"], read
        assert kept == {"200": 120}
        assert [*written] == ["403"], written
        assert len(access_lines(lab, "shop/other-0")) > 10
    finally:
        lab.write("web.yaml", web)
        lab.remove("apps/enough")
        lab.meshctl("waypoint", "delete", "other", "-n", "shop", "--lab", lab.name)


def test_a_namespace_leaves_its_waypoint_before_that_is_deleted_and_loses_no_request(lab: Lab) -> None:
    asking = lab.start(CLIENT, "sh", "-c", UNTIL_ENOUGH.replace("METHOD", "-XGET"))
    try:
        assert passes(lab)
        lab.label("shop", "istio.io/use-waypoint-")
        assert lab.meshctl("waypoint", "delete", "waypoint", "-n", "shop", "--lab", lab.name).stdout == "waypoint shop/waypoint deleted\n"
        wait_until(lambda: not [each for each in lab.status()["pods"] if each["name"] == "waypoint-0"], "the waypoint's pod is gone")
        assert not passes(lab)
        lab.meshctl("waypoint", "apply", "-n", "shop", "--enroll-namespace", "--wait", "--lab", lab.name, timeout=120)
        wait_until(lambda: passes(lab), "connections pass the waypoint again")
    finally:
        (lab.source / "apps" / "enough").touch()
        answers = Counter(asking.communicate(timeout=30)[0].splitlines())
        lab.remove("apps/enough")
    assert [*answers] == ["200"], answers


LATER = """\
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: later, namespace: shop}
spec:
  gatewayClassName: istio-waypoint
  listeners: [{name: mesh, port: 15008, protocol: HBONE}]
  infrastructure: {parametersRef: {kind: ConfigMap, name: later}}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: later, namespace: shop}
data:
  deployment: "spec: {replicas: REPLICAS}"
"""


def test_a_service_that_requires_its_waypoint_is_not_reached_before_that_is_ready(lab: Lab) -> None:
    web = (lab.source / "web.yaml").read_text()
    bound = "metadata: {name: web, namespace: shop, labels: {istio.io/use-waypoint: later}"
    assert "metadata: {name: web, namespace: shop}" in web

    def reason() -> str | None:
        return next((each["because"] for each in lab.status()["waypoints"] if each["name"] == "later"), None)

    try:
        lab.write("later.yaml", LATER.replace("REPLICAS", "0"))
        wait_until(reason, "there is a waypoint that is not ready")
        required = f"{bound}, annotations: {{ambient.mesh/waypoint-required: 'true'}}}}"
        lab.write("web.yaml", web.replace("metadata: {name: web, namespace: shop}", required))
        wait_until(lambda: ask(lab).status == 0, "connections are refused")
        wait_until(lambda: lab.access("n1", "later.shop.svc.cluster.local", "error="), "the access log names the waypoint")
        assert ask(lab, "http://web-v1/").status == 200, "other services are not affected"
        lab.write("web.yaml", web.replace("metadata: {name: web, namespace: shop}", f"{bound}}}"))
        wait_until(lambda: ask(lab).status == 200, "without the annotation connections go directly")
        assert not passes(lab)
        lab.write("web.yaml", web.replace("metadata: {name: web, namespace: shop}", required))
        lab.write("later.yaml", LATER.replace("REPLICAS", "1"))
        wait_until(lambda: reason() == "", "the waypoint is ready")
        wait_until(lambda: passes(lab), "connections pass the waypoint")
    finally:
        lab.write("web.yaml", web)
        lab.remove("later.yaml")

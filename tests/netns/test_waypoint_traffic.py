"""What a waypoint does to real traffic of many kinds, in one lab whose objects are all there from the start."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mesh.testing.lab import Lab, wait_until
from mesh.testing.serving import write_serving_certificate
from mesh.testing.waypoints import (
    CLIENT,
    Answer,
    ask,
    ask_often,
    lines_of,
    memory_of,
    page_of,
    problems_of,
    running_shop,
    service,
    virtual_service,
)

pytestmark = pytest.mark.netns

PLACES = """\
apiVersion: v1
kind: Node
metadata: {name: n1, labels: {topology.kubernetes.io/region: r, topology.kubernetes.io/zone: z1}}
---
apiVersion: v1
kind: Node
metadata: {name: n2, labels: {topology.kubernetes.io/region: r, topology.kubernetes.io/zone: z2}}
"""
POD = """\
---
apiVersion: v1
kind: Pod
metadata: {name: NAME, namespace: shop, labels: {app: APP, version: VERSION}}
spec:
  nodeName: NODE
  serviceAccountName: server
  containers: [{name: app, command: [python3, COMMAND], readinessProbe: {tcpSocket: {port: PORT}}}]
"""


def pod(name: str, app: str, version: str, port: int, command: str, node: str = "n2") -> str:
    """YAML of a pod whose one container runs a Python program."""
    values = {"NAME": name, "APP": app, "VERSION": version, "NODE": node, "COMMAND": command, "PORT": str(port)}
    return re.sub("|".join(values), lambda found: values[found[0]], POD)


def route(kind: str, parent: str, *rules: str, more: str = "") -> str:
    """YAML of a route of the Gateway API for all ports of a service."""
    listed = "".join(f"    - {{{rule}}}\n" for rule in rules)
    head = f"---\napiVersion: gateway.networking.k8s.io/v1\nkind: {kind}\nmetadata: {{name: {parent}, namespace: shop}}\n"
    return f'{head}spec:\n  parentRefs: [{{group: "", kind: Service, name: {parent}}}]\n{more}  rules:\n{listed}'


def destination_rule(host: str, policy: str) -> str:
    head = "---\napiVersion: networking.istio.io/v1\nkind: DestinationRule\n"
    return f"{head}metadata: {{name: {host.partition('.')[0]}, namespace: shop}}\nspec: {{host: {host}, trafficPolicy: {{{policy}}}}}\n"


def backends(*shares: tuple[str, int]) -> str:
    return f"backendRefs: [{', '.join(f'{{name: {name}, port: 80, weight: {weight}}}' for name, weight in shares)}]"


V1, V2, BOTH = backends(("web-v1", 1)), backends(("web-v2", 1)), backends(("web-v1", 50), ("web-v2", 50))
C1, C2, CATALOGS = backends(("catalog-v1", 1)), backends(("catalog-v2", 1)), backends(("catalog-v1", 50), ("catalog-v2", 50))
MODIFIERS = (
    "{type: RequestHeaderModifier, requestHeaderModifier: "
    "{set: [{name: x-set, value: a}], add: [{name: x-add, value: b}], remove: [x-gone]}}, "
    "{type: ResponseHeaderModifier, responseHeaderModifier: {set: [{name: x-back, value: c}]}}"
)
PREFIX = "path: {type: ReplacePrefixMatch, replacePrefixMatch: /new}"
ROUTES = (
    "".join(service(name, "app: web") for name in ("direct", "filtered", "plain", "sticky", "cookied", "narrow"))
    + route(
        "HTTPRoute",
        "filtered",
        "matches: [{path: {value: /mirrored}}], "
        f"filters: [{{type: RequestMirror, requestMirror: {{backendRef: {{name: web-v2, port: 80}}}}}}], {V1}",
        "matches: [{path: {value: /moved}}], filters: [{type: RequestRedirect, requestRedirect: "
        f"{{scheme: https, hostname: a.example.com, port: 8443, statusCode: 301, {PREFIX}}}}}]",
        "matches: [{path: {value: /old}}], "
        f"filters: [{{type: URLRewrite, urlRewrite: {{hostname: b.example.com, {PREFIX}}}}}, {MODIFIERS}], {V1}",
        f"matches: [{{path: {{value: /slow}}}}], timeouts: {{request: 300ms}}, {V1}",
        f"matches: [{{path: {{type: Exact, value: /exact}}, method: POST, queryParams: [{{name: q, value: '1'}}]}}], {V2}",
        V1,
    )
    + virtual_service(
        "direct",
        "match: [{uri: {prefix: /teapot}}], directResponse: {status: 418, body: {string: no tea}}",
        "match: [{uri: {prefix: /moved}}], redirect: {uri: /there, authority: c.example.com, redirectCode: 307}",
        "match: [{uri: {prefix: /old/}}], rewrite: {uri: /, authority: d.example.com}, route: [{destination: {host: web-v1}}]",
        "route: [{destination: {host: web-v2}}]",
    )
    + service("raw", "app: web", protocol="tcp")
    + route("TCPRoute", "raw", BOTH)
    + pod("catalog-v1", "catalog", "v1", 9090, "apps/grpc_server.py, '9090', v1")
    + pod("catalog-v2", "catalog", "v2", 9090, "apps/grpc_server.py, '9090', v2")
    + service("catalog", "app: catalog", 9090, "grpc")
    + service("catalog-v1", "app: catalog, version: v1", 9090, "grpc")
    + service("catalog-v2", "app: catalog, version: v2", 9090, "grpc")
    + route(
        "GRPCRoute",
        "catalog",
        f"matches: [{{method: {{service: shop.Catalog, method: Fail}}}}], {C2}",
        f"matches: [{{method: {{service: shop.Split}}}}], {CATALOGS}",
        f"matches: [{{headers: [{{name: x-version, value: v2}}]}}], filters: [{MODIFIERS}], {C2}",
        C1,
    )
    + pod("socket", "socket", "v1", 8088, "apps/websocket.py, serve, '8088'")
    + service("socket", "app: socket", 8088)
)
BALANCING = (
    destination_rule("sticky", "loadBalancer: {consistentHash: {httpHeaderName: x-user}}")
    + destination_rule("cookied", "loadBalancer: {consistentHash: {httpCookie: {name: who, ttl: 60s}}}")
    + destination_rule("narrow", "connectionPool: {tcp: {maxConnections: 1}, http: {http1MaxPendingRequests: 1}}")
    + pod("sound", "partly", "sound", 8080, "apps/versioned_web.py, '8080', sound")
    + pod("broken", "partly", "broken", 8080, "apps/versioned_web.py, '8080', broken")
    + service("partly", "app: partly")
    + destination_rule(
        "partly", "outlierDetection: {consecutive5xxErrors: 3, interval: 1s, baseEjectionTime: 60s, maxEjectionPercent: 100}"
    )
    + pod("placed-n1", "placed", "n1", 8080, "apps/versioned_web.py, '8080', n1", "n1")
    + pod("placed-n2", "placed", "n2", 8080, "apps/versioned_web.py, '8080', n2", "n2")
    + service("placed", "app: placed")
    + destination_rule(
        "placed", "outlierDetection: {consecutive5xxErrors: 1, interval: 1s, baseEjectionTime: 60s, maxEjectionPercent: 100}"
    )
)
NAMES = "secure.shop.svc.cluster.local", "api.example.com"
ROOTS = "credentialName: configmap://roots"


def secured(directory: Path) -> str:
    """Servers with certificates of their own, and what is said of reaching them."""
    made = write_serving_certificate(directory, *NAMES)
    roots = directory / "roots.pem"
    roots.write_text(made.root_pem)
    pems = {"ca.crt": made.root_pem, "tls.crt": made.chain.read_text(), "tls.key": made.key.read_text()}
    simple = f"apps/tls_web.py, '8443', simple, {made.chain}, {made.key}"
    material = (
        f"---\napiVersion: v1\nkind: ConfigMap\nmetadata: {{name: roots, namespace: shop}}\ndata: {json.dumps({'ca.crt': made.root_pem})}\n"
    )
    material += f"---\napiVersion: v1\nkind: Secret\nmetadata: {{name: client, namespace: shop}}\nstringData: {json.dumps(pems)}\n"
    verified = """\
---
apiVersion: gateway.networking.k8s.io/v1
kind: BackendTLSPolicy
metadata: {name: NAME, namespace: shop}
spec:
  targetRefs: [{group: "", kind: Service, name: NAME}]
  validation: {hostname: HOST, caCertificateRefs: [{group: "", kind: ConfigMap, name: roots}]}
"""
    return (
        material
        + pod("secure", "secure", "simple", 8443, simple)
        + pod("mutual", "secure", "mutual", 8443, f"{simple.replace('simple', 'mutual')}, {roots}")
        + "".join(service(name, "app: secure, version: simple", 8443) for name in ("secure", "misnamed", "policed", "mispoliced"))
        + service("mutual", "app: secure, version: mutual", 8443)
        + service("anonymous", "app: secure, version: mutual", 8443)
        + service("opaque", "app: secure, version: simple", 8443, "tls")
        + service("front", "app: nobody", 8443, "tls")
        + route("TLSRoute", "front", backends(("opaque", 1)), more="  hostnames: [front.shop.svc.cluster.local]\n")
        + destination_rule("secure", f"tls: {{mode: SIMPLE, {ROOTS}, sni: {NAMES[0]}, subjectAltNames: [{NAMES[0]}]}}")
        + destination_rule("misnamed", f"tls: {{mode: SIMPLE, {ROOTS}, subjectAltNames: [wrong.example.com]}}")
        + destination_rule("mutual", f"tls: {{mode: MUTUAL, credentialName: client, sni: {NAMES[1]}}}")
        + destination_rule("anonymous", f"tls: {{mode: SIMPLE, {ROOTS}, sni: {NAMES[1]}}}")
        + verified.replace("NAME", "policed").replace("HOST", NAMES[1])
        + verified.replace("NAME", "mispoliced").replace("HOST", "wrong.example.com")
        + pod("api", "api", "outside", 8443, simple.replace("simple", "outside"))
        .replace("namespace: shop", "namespace: outside")
        .replace("  serviceAccountName: server\n", "")
    )


EXTERNAL = """\
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: api, namespace: shop}
spec:
  hosts: [api.example.com]
  location: MESH_EXTERNAL
  ports: [{number: 80, name: http, protocol: HTTP, targetPort: 8443}]
  resolution: STATIC
  endpoints: [{address: ADDRESS}]
"""
PROGRAMS = ("grpc_server.py", "grpc_client.py", "tls_web.py", "websocket.py")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    directory = tmp_path_factory.mktemp("waypointtraffic")
    files = {"nodes": PLACES, "routes": ROUTES, "balancing": BALANCING, "secured": secured(directory)}
    with running_shop(directory, programs=PROGRAMS, **files) as lab:
        address = next(ip for ip in lab.pod("outside/api")["ips"] if "." in ip)
        lab.write(
            "external.yaml", EXTERNAL.replace("ADDRESS", address) + destination_rule("api.example.com", f"tls: {{mode: SIMPLE, {ROOTS}}}")
        )
        wait_until(lambda: "shop/api.example.com" in page_of(lab, "config_dump"), "the waypoint is told of all")
        assert [problem for file in (*files, "external") for problem in problems_of(lab, f"{file}.yaml")] == []
        yield lab


# Routes


def test_an_http_route_mirrors_redirects_and_rewrites(lab: Lab) -> None:
    assert ask(lab, "http://filtered/mirrored").told["version"] == "v1"
    (shadow,) = wait_until(lambda: mirrored(lab), "the mirror has it")
    assert shadow["headers"]["host"] == "filtered-shadow"
    moved = lab.curl(CLIENT, "http://filtered/moved/a", "-o", "/dev/null", "-w", "%{http_code} %header{location}").stdout
    assert moved == "301 https://a.example.com:8443/new/a"
    old = ask(lab, "http://filtered/old/b?c=d", "-H", "x-gone: 1", "-H", "x-set: 1").told
    assert (old["path"], old["headers"]["host"], old["headers"]["x-set"], old["headers"]["x-add"]) == (
        "/new/b?c=d",
        "b.example.com",
        "a",
        "b",
    )
    assert "x-gone" not in old["headers"]
    assert "x-back: c" in lab.curl(CLIENT, "http://filtered/old", "-D", "-").stdout
    assert ask(lab, "http://filtered/slow") == Answer(504, "upstream request timeout")
    assert ask(lab, "http://filtered/exact?q=1", "-X", "POST").told["version"] == "v2"
    assert ask(lab, "http://filtered/exact?q=2", "-X", "POST").told["version"] == "v1"


def mirrored(lab: Lab) -> list[dict[str, Any]]:
    """What the second version was asked at this path."""
    lines = lab.log("shop/web-v2/web").splitlines()
    return [told for told in map(json.loads, lines) if told["path"] == "/mirrored"]


def test_a_virtual_service_answers_redirects_and_rewrites(lab: Lab) -> None:
    assert ask(lab, "http://direct/teapot") == Answer(418, "no tea")
    moved = lab.curl(CLIENT, "http://direct/moved", "-o", "/dev/null", "-w", "%{http_code} %header{location}").stdout
    assert moved == "307 http://c.example.com/there"
    old = ask(lab, "http://direct/old/x").told
    assert (old["version"], old["path"], old["headers"]["host"]) == ("v1", "/x", "d.example.com")
    assert ask(lab, "http://direct/").told["version"] == "v2"


def test_connections_are_shared_out_by_a_tcp_route(lab: Lab) -> None:
    # The chance that one of them gets none of forty is one in 10^12.
    assert set(Counter(answer.told["version"] for answer in ask_often(lab, 40, "http://raw/"))) == {"v1", "v2"}
    assert "x-request-id" not in ask(lab, "http://raw/").told["headers"], "bytes are bytes"


def test_tls_passes_as_it_is_and_a_tls_route_leads_it_elsewhere(lab: Lab) -> None:
    for name in ("opaque", "front", "front.shop.svc.cluster.local"):
        assert ask(lab, f"https://{name}:80/", "-k").told == {"version": "simple", "sni": name, "client": []}
    assert lines_of(lab, " front.shop.svc.cluster.local ", "outbound|80||opaque.shop")


# gRPC


def call(lab: Lab, *calls: dict[str, Any]) -> list[dict[str, Any]]:
    """The calls on one channel."""
    done = lab.run(CLIENT, "python3", "apps/grpc_client.py", "catalog:80", *map(json.dumps, calls), timeout=60)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_grpc_route_leads_by_method_and_metadata_and_by_weight(lab: Lab) -> None:
    plain, chosen, failed = call(
        lab,
        {"method": "/shop.Catalog/Get"},
        {"method": "/shop.Catalog/Get", "metadata": {"x-version": "v2"}},
        {"method": "/shop.Catalog/Fail"},
    )
    assert plain["trailers"] == {"x-served-by": "v1"}
    assert chosen["trailers"] == {"x-served-by": "v2"}
    assert json.loads(chosen["messages"][0])["metadata"]["x-set"] == "a"
    assert failed == {"code": "NOT_FOUND", "details": "v2 has no such thing: 100% gone", "messages": []}, "trailers alone"
    split = Counter(each["trailers"]["x-served-by"] for each in call(lab, {"method": "/shop.Split/Get", "times": 60}))
    assert min(split["v1"], split["v2"]) >= 8  # 30 are expected; five and a half standard deviations are 22


def test_grpc_streams_in_both_directions_and_ends_as_the_server_says_or_the_deadline(lab: Lab) -> None:
    chatted, broken, late, unknown = call(
        lab,
        {"method": "/shop.Catalog/Chat", "body": 20},
        {"method": "/shop.Catalog/Break"},
        {"method": "/shop.Catalog/Wait", "body": 60, "deadline": 0.5},
        {"method": "/shop.Catalog/Nothing"},
    )
    assert chatted == {"code": "OK", "messages": [str(number) for number in range(20)]}
    assert broken == {"code": "ABORTED", "details": "in the middle", "messages": ["1", "2"]}
    # The waypoint keeps the same deadline; if the client's timer is the later one, it hears of a 504, which is UNAVAILABLE, as Envoy's is.
    assert (late["code"], late["details"]) in {("DEADLINE_EXCEEDED", "Deadline Exceeded"), ("UNAVAILABLE", "upstream request timeout")}
    assert unknown["code"] == "UNIMPLEMENTED"
    wait_until(lambda: "cancelled" in lab.log("shop/catalog-v1"), "the server learns that nobody waits any more")


# TLS to applications


def test_tls_is_spoken_to_applications_that_have_certificates(lab: Lab) -> None:
    assert ask(lab, "http://secure/").told == {"version": "simple", "sni": NAMES[0], "client": []}
    assert ask(lab, "http://mutual/").told == {"version": "mutual", "sni": NAMES[1], "client": [NAMES[0]]}
    assert ask(lab, "http://policed/").told == {"version": "simple", "sni": NAMES[1], "client": []}
    assert ask(lab, "http://api.example.com/").told == {"version": "outside", "sni": "api.example.com", "client": []}


@pytest.mark.parametrize("name", ["misnamed", "mispoliced"])
def test_an_application_with_another_certificate_gets_no_request(lab: Lab, name: str) -> None:
    answer = ask(lab, f"http://{name}/")
    assert answer.status == 503
    assert "wrong.example.com" not in answer.text, "what is wrong with a certificate is not for clients"
    assert lines_of(lab, f'"{name}"', "UF", "not_wrong.example.com")


def test_an_application_that_wants_a_certificate_gets_no_request_without(lab: Lab) -> None:
    assert ask(lab, "http://anonymous/").status == 503


# HTTP


@pytest.mark.parametrize("family", ["-4", "-6"])
def test_http_2_by_prior_knowledge_and_uploads_that_wait_for_leave(lab: Lab, family: str) -> None:
    shown = lab.curl(CLIENT, "http://plain/", family, "--http2-prior-knowledge", "-D", "-").stdout
    assert shown.startswith("HTTP/2 200")
    told = lab.curl(CLIENT, "http://plain/echo", family, "-v", "-H", "expect: 100-continue", "-d", "a body")
    assert "< HTTP/1.1 100 Continue" in told.stderr
    assert json.loads(told.stdout)["body"] == "a body"


@pytest.mark.parametrize("address", ["socket", "socket-6"])
def test_a_websocket_passes_messages_of_any_size(lab: Lab, address: str) -> None:
    host = address
    if address == "socket-6":
        services = lab.status()["services"]
        host = next(ip for each in services if each["name"] == "socket" for ip in each["ips"] if ":" in ip)
    done = lab.run(CLIENT, "python3", "apps/websocket.py", "talk", host, "80", "/chat", timeout=60)
    assert done.returncode == 0, done.stderr
    accepted, *echoed, closed = map(json.loads, done.stdout.splitlines())
    assert accepted == {"accepted": "echo"}
    assert [each["same"] for each in echoed] == [True] * 3
    assert closed == {"closed": 1000}


UPLOAD = 96 << 20


@pytest.mark.parametrize("version", ["--http1.1", "--http2-prior-knowledge"])
def test_a_large_upload_waits_for_an_application_that_reads_late(lab: Lab, version: str) -> None:
    before = memory_of(lab)
    script = f"head -c {UPLOAD} /dev/zero | curl -sS -m 60 {version} -T - http://plain/late"
    sending = lab.start(CLIENT, "sh", "-c", script)
    most = before
    while sending.poll() is None:
        most = max(most, memory_of(lab))
    answer, failure = sending.communicate()
    assert not failure
    assert json.loads(answer)["received"] == UPLOAD
    assert most - before < UPLOAD // 4, "the waypoint keeps little of it"


def test_thousands_of_requests_at_once_and_none_fails(lab: Lab) -> None:
    """10 000 take half a minute on a machine with nothing else to do; see the how-to."""
    done = lab.run(CLIENT, "h2load", "-n", "2000", "-c", "20", "-m", "10", "http://plain/", timeout=120)
    assert "2000 succeeded, 0 failed, 0 errored, 0 timeout" in done.stdout, done.stdout
    assert "status codes: 2000 2xx" in done.stdout


# Balancing


def test_who_hashes_alike_is_served_alike(lab: Lab) -> None:
    for user in ("ann", "bob"):
        assert len({answer.told["version"] for answer in ask_often(lab, 8, "http://sticky/", "-H", f"x-user: {user}")}) == 1
    users = " ".join(f"user{number}" for number in range(40))
    script = f'for u in {users}; do curl -sS -m 15 -H "x-user: $u" http://sticky/; echo; done'
    served = Counter(json.loads(line)["version"] for line in lab.run(CLIENT, "sh", "-c", script, timeout=60).stdout.splitlines())
    assert set(served) == {"v1", "v2"}
    shown = lab.curl(CLIENT, "http://cookied/", "-D", "-", "-o", "/dev/null").stdout
    found = re.search("set-cookie: (who=[0-9a-f]+); Max-Age=60", shown)
    assert found is not None, shown
    assert len({answer.told["version"] for answer in ask_often(lab, 12, "http://cookied/", "-b", found[1])}) == 1


def test_an_endpoint_that_fails_is_ejected_and_shown_to_be(lab: Lab) -> None:
    assert {answer.status for answer in ask_often(lab, 30, "http://partly/only/broken")} <= {200, 503}
    assert [answer.told["version"] for answer in ask_often(lab, 10, "http://partly/only/broken")] == ["sound"] * 10
    ejected = {each["workload"]: each["ejected"] for each in cluster(lab, "partly")["endpoints"]}
    assert ejected == {"shop/broken": "3 answers in a row were 5xx", "shop/sound": None}


def cluster(lab: Lab, name: str) -> dict[str, Any]:
    """Of the waypoint's page: a destination."""
    clusters = json.loads(page_of(lab, "clusters"))["clusters"]
    found: dict[str, Any] = next(each for each in clusters if each["destination"].startswith(f"shop/{name}."))
    return found


def test_near_endpoints_are_asked_until_they_fail(lab: Lab) -> None:
    near = lab.pod("shop/waypoint-0")["node"]
    far = "n2" if near == "n1" else "n1"
    assert {answer.told["version"] for answer in ask_often(lab, 12, "http://placed/")} == {near}
    ask(lab, f"http://placed/only/{near}")
    assert {answer.told["version"] for answer in ask_often(lab, 12, "http://placed/")} == {far}


def test_what_a_full_pool_has_no_room_for_is_refused(lab: Lab) -> None:
    script = "for i in 1 2 3 4 5 6; do curl -sS -m 20 -o /dev/null -w '%{http_code}\\n' http://narrow/slow & done; wait"
    answers = Counter(lab.run(CLIENT, "sh", "-c", script, timeout=60).stdout.split())
    assert set(answers) == {"200", "503"}
    assert lines_of(lab, '"narrow"', " 503 UO ")

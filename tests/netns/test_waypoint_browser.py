"""A browser's page through a waypoint: pictures, scripts, JSON, a preflight that the waypoint answers, events, a WebSocket."""

from __future__ import annotations

import html
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mesh.testing.lab import Lab, wait_until
from mesh.testing.waypoints import CLIENT, ask, denial, lines_of, problems_of, running_shop, service

BROWSER = next((path for name in ("chromium-headless-shell", "chromium") if (path := shutil.which(name))), None)
pytestmark = [
    pytest.mark.netns,
    pytest.mark.interop,
    # 100 MB to fetch and 220 MB on disk for one test, so nobody's `make test` installs it.
    pytest.mark.skipif(BROWSER is None, reason="no browser here: apt-get install --no-install-recommends chromium-headless-shell"),
]

PAGE = """\
apiVersion: v1
kind: Pod
metadata: {name: front, namespace: shop, labels: {app: front}}
spec:
  nodeName: n2
  serviceAccountName: server
  containers:
    - {name: page, command: [python3, apps/page_server.py, "8080"], readinessProbe: {tcpSocket: {port: 8080}}}
    - {name: socket, command: [python3, apps/websocket.py, serve, "8081"], readinessProbe: {tcpSocket: {port: 8081}}}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: front, namespace: shop}
spec:
  parentRefs: [{group: "", kind: Service, name: front}]
  rules:
    - {matches: [{path: {value: /chat}}], backendRefs: [{name: socket, port: 80}]}
    - backendRefs: [{name: front, port: 80}]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: web, namespace: shop}
spec:
  hosts: [web]
  http:
    - corsPolicy:
        allowOrigins: [{exact: http://front}]
        allowMethods: [GET, PUT]
        allowHeaders: [content-type, x-cart]
        exposeHeaders: [x-served]
      headers: {response: {set: {x-served: by the waypoint}}}
      route: [{destination: {host: web-v1}}]
"""
PAGE += service("front", "app: front", more="ipFamilyPolicy: PreferDualStack") + service("socket", "app: front", 8081)
PAGE += denial("readers", "methods: [POST]", "front")
TOLD = {
    "style": "rgb(240, 250, 240)",
    "items": {"status": 200, "served": None, "text": '{"cart": "7", "path": "/items?from=2"}'},
    "order": {"status": 403, "served": None, "text": "RBAC: access denied"},
    "another origin": {"status": 200, "served": "by the waypoint", "text": '{"item":"tea","number":2}'},
    "another origin, method not allowed": {"failure": "TypeError"},
    "another origin that allows nobody": {"failure": "TypeError"},
    "events": ["event 1", "event 2", "event 3", "event 4"],
    "socket": ["echo", "hello", (1 << 20) + 5, 1000],
    "pictures": [10, 20, 30, 40],
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with running_shop(tmp_path_factory.mktemp("waypointbrowser"), programs=("page_server.py", "websocket.py"), page=PAGE) as lab:
        assert problems_of(lab, "page.yaml") == []
        wait_until(lambda: ask(lab, "http://front/", "-X", "POST").status == 403, "the policy is in force")
        yield lab


def browse(lab: Lab, url: str, directory: Path) -> dict[str, Any]:
    """What the page's script has told. Its picture is left in ``directory``."""
    assert BROWSER is not None
    command = [
        *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"),
        *(f"--user-data-dir={directory / 'profile'}", "--window-size=900,600", "--timeout=30000"),
        *(f"--screenshot={directory / 'page.png'}", "--dump-dom", url),
    ]
    done = lab.run(CLIENT, *command, timeout=60)
    rows = re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td></tr>", done.stdout)
    assert rows, done.stdout + done.stderr
    return {html.unescape(what): json.loads(html.unescape(came)) for what, came in rows}


def test_a_page_with_all_that_it_asks_for(lab: Lab, tmp_path: Path) -> None:
    assert browse(lab, "http://front/", tmp_path) == TOLD
    assert (tmp_path / "page.png").stat().st_size > 5000
    seen = [json.loads(line) for line in lab.log("shop/front/page").splitlines() if line.startswith("{")]
    browsers = [each for each in seen if "Chrome" in each["headers"].get("user-agent", "")]
    files = {"/", "/style.css", "/page.js", "/tell.js", *(f"/{number}.svg" for number in (1, 2, 3, 4)), "/last.svg"}
    assert files <= {each["path"] for each in browsers}
    assert all("x-request-id" in each["headers"] for each in browsers), "all of it has passed the waypoint"
    assert {each["method"] for each in browsers} == {"GET"}, "what is denied reaches nobody"
    assert [each["headers"].get("last-event-id") for each in browsers if each["path"] == "/events"] == [None, "2"]
    others = [json.loads(line) for line in lab.log("shop/web-v1/web").splitlines() if line.startswith("{") and "Chrome" in line]
    assert {each["method"] for each in others} == {"PUT", "GET"}, "the waypoint answers preflights"
    assert lines_of(lab, '"OPTIONS /echo HTTP/1.1" 200 ')
    assert lines_of(lab, '"GET /chat HTTP/1.1" 101 ')


def test_the_page_by_ipv6(lab: Lab, tmp_path: Path) -> None:
    ip = next(ip for each in lab.status()["services"] if each["name"] == "front" for ip in each["ips"] if ":" in ip)
    told = browse(lab, f"http://[{ip}]/", tmp_path)
    # Its origin is another now, and nobody has allowed that.
    assert told.pop("another origin") == {"failure": "TypeError"}
    assert told == {what: came for what, came in TOLD.items() if what != "another origin"}

"""Names in captured pods, as programs look them up: dig and the C library, real rules, a real agent."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mesh.testing.lab import Lab, running_lab, wait_until

pytestmark = pytest.mark.netns

EXAMPLE = Path(__file__).parents[2] / "examples" / "two-nodes"
SHOP = {"shop/client", "shop/stranger", "shop/server", "shop/database"}
NAMES = """\
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: outside, namespace: shop}
spec:
  hosts: [www.example.com, "*.wild.example.com"]
  addresses: [203.0.113.7, "2001:db8::7"]
  ports: [{number: 80, name: http, protocol: HTTP}]
  resolution: STATIC
  endpoints: [{address: 10.244.1.2}]
---
apiVersion: v1
kind: Service
metadata: {name: headless, namespace: shop}
spec:
  clusterIP: None
  selector: {app: server}
  ports: [{port: 80}]
"""

SERVER = """
import socket, sys, threading
def answer(query):
    end = query.index(0, 12) + 5
    record = b"\\xc0\\x0c\\0\\1\\0\\1\\0\\0\\0\\x3c\\0\\4" + bytes([192, 0, 2, 53])
    return query[:2] + b"\\x81\\x80\\0\\1\\0\\1\\0\\0\\0\\0" + query[12:end] + record
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.bind(("0.0.0.0", 53))
tcp = socket.create_server(("0.0.0.0", 53))
def serve():
    while True:
        stream, peer = tcp.accept()
        query = stream.recv(1000)[2:]
        reply = answer(query)
        stream.sendall(len(reply).to_bytes(2, "big") + reply)
        stream.close()
threading.Thread(target=serve, daemon=True).start()
print("ready", flush=True)
while True:
    query, peer = udp.recvfrom(1000)
    print(peer[0], flush=True)
    udp.sendto(answer(query), peer)
"""

LOOK_UP = """
import socket, sys
# One socket for all, as resolvers that keep theirs, and one for each, as the C library.
kept = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
kept.settimeout(3)
kept.connect(("10.96.0.10", 53))
number = failed = 0
def ask(sock, name):
    global number, failed
    number += 1
    id = (number % 65536).to_bytes(2, "big")
    sock.send(id + b"\\1\\0\\0\\1\\0\\0\\0\\0\\0\\0" + b"".join(bytes([len(l)]) + l.encode() for l in name.split(".")) + b"\\0\\0\\1\\0\\1")
    try:
        while (data := sock.recv(2000))[:2] != id:
            pass
        assert data[3] & 15 in (0, 3), data
    except (OSError, AssertionError) as exc:
        failed += 1
        print("failed", number, name, repr(exc), flush=True)
print("started", flush=True)
while True:
    for name in ("server.shop.svc.cluster.local", "nobody.shop.svc.cluster.local"):
        ask(kept, name)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as fresh:
            fresh.settimeout(3)
            fresh.connect(("10.96.0.10", 53))
            ask(fresh, name)
    if number % 100 == 0:
        print("asked", number, failed, flush=True)
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with running_lab(EXAMPLE, tmp_path_factory.mktemp("dns")) as lab:
        lab.write("names.yaml", NAMES)
        yield lab


@pytest.fixture
def captured(lab: Lab) -> Lab:
    lab.label("shop", "istio.io/dataplane-mode=ambient")
    wait_until(lambda: lab.pods_in_mesh() == SHOP, "every pod of the shop is captured")
    wait_until(lambda: "203.0.113.7" in dig(lab, "www.example.com"), "the agents know the names")
    return lab


def dig(lab: Lab, *words: str, where: str = "shop/client") -> str:
    """What dig prints: comments and answers."""
    return lab.run(where, "dig", "+noall", "+comments", "+answer", "+tries=1", "+time=10", *words).stdout


def addresses(text: str) -> list[str]:
    return sorted(re.findall(r"IN\s+A{1,4}\s+(\S+)", text))


def pod_addresses(lab: Lab, pod: str) -> list[str]:
    found: list[str] = lab.pod(pod)["ips"]
    return found


@contextmanager
def nameserver(lab: Lab) -> Iterator[subprocess.Popen[str]]:
    """A server of a pod outside the mesh that answers everything with 192.0.2.53."""
    process = lab.start("outside/caller", "python3", "-c", SERVER)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("transport", ["+notcp", "+tcp"])
@pytest.mark.parametrize("resolver", ["@10.96.0.10", "@fd00:10:96::a"])
def test_services_have_their_addresses_whatever_server_is_asked(captured: Lab, transport: str, resolver: str) -> None:
    vips = next(item for item in captured.status()["services"] if item["name"] == "server")["ips"]
    v4, v6 = [ip for ip in vips if ":" not in ip], [ip for ip in vips if ":" in ip]
    for name in ("server.shop.svc.cluster.local", "server.shop", "server"):
        found = dig(captured, transport, resolver, name)
        assert addresses(found) == v4
        assert re.search(r"flags: qr aa rd ra;", found)
    assert addresses(dig(captured, transport, resolver, "server", "AAAA")) == v6


def test_outside_names_of_the_mesh_have_theirs(captured: Lab) -> None:
    assert addresses(dig(captured, "www.example.com", "AAAA")) == ["2001:db8::7"]
    assert addresses(dig(captured, "anything.wild.example.com")) == ["203.0.113.7"]
    assert "status: NXDOMAIN" in dig(captured, "www.example.net")
    assert re.search(r"IN\s+CNAME\s+www\.example\.com\.", dig(captured, "www.example.com.shop.svc.cluster.local"))


def test_a_headless_service_has_those_of_its_pods(captured: Lab) -> None:
    ips = pod_addresses(captured, "shop/server")
    wait_until(lambda: addresses(dig(captured, "headless")) == [ip for ip in ips if ":" not in ip], "the pod's address is told")
    assert "status: NOERROR" in dig(captured, "headless", "AAAA")


def test_the_c_library_finds_names(captured: Lab) -> None:
    for name in ("server", "server.shop", "server.shop.svc.cluster.local", "www.example.com"):
        done = captured.run("shop/client", "getent", "ahosts", name)
        assert done.returncode == 0, done
    assert captured.run("shop/client", "getent", "ahosts", "nobody").returncode == 2
    assert captured.curl("shop/client", "http://server/").returncode == 0


@pytest.mark.parametrize("transport", ["+notcp", "+tcp"])
def test_other_look_ups_reach_the_server_that_was_asked_as_the_pod(captured: Lab, transport: str) -> None:
    caller = next(ip for ip in pod_addresses(captured, "outside/caller") if ":" not in ip)
    client = next(ip for ip in pod_addresses(captured, "shop/client") if ":" not in ip)
    with nameserver(captured) as process:
        assert addresses(dig(captured, transport, f"@{caller}", "www.example.net")) == ["192.0.2.53"]
        assert addresses(dig(captured, transport, f"@{caller}", "server.shop")) != ["192.0.2.53"], "the mesh's own are the mesh's"
        assert process.stdout is not None
        if transport == "+notcp":
            assert process.stdout.readline() == f"{client}\n"
    assert "status: SERVFAIL" in dig(captured, transport, f"@{caller}", "www.example.net"), "and nobody at its port is a failure at once"


def test_an_annotation_switches_a_pods_look_ups_while_it_runs(captured: Lab) -> None:
    text = (captured.source / "shop.yaml").read_text()

    def rules() -> str:
        return captured.run("shop/client", "nft", "--stateless", "list", "ruleset").stdout

    def annotate(value: str) -> None:
        pod = "kind: Pod\nmetadata:\n  name: client\n"
        assert pod in text
        captured.write("shop.yaml", text.replace(pod, f'{pod}  annotations: {{ambient.istio.io/dns-capture: "{value}"}}\n'))

    try:
        assert "15053" in rules()
        annotate("false")
        wait_until(lambda: "15053" not in rules() and "ct zone set" not in rules(), "the rules for look-ups are gone")
        assert "15001" in rules()
        assert "status: NXDOMAIN" in dig(captured, "www.example.com"), "the cluster's server does not know it"
        assert captured.run("shop/client", "getent", "ahosts", "server").returncode == 0
        annotate("true")
        wait_until(lambda: addresses(dig(captured, "www.example.com")) == ["203.0.113.7"], "the agent answers again")
    finally:
        captured.write("shop.yaml", text)
    assert captured.pods_in_mesh() == SHOP


def test_no_look_up_is_lost_when_pods_enter_and_leave_the_mesh_and_the_brain_dies(captured: Lab) -> None:
    process = captured.start("shop/client", "python3", "-c", LOOK_UP)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"

        def more() -> None:
            """Until some hundred more have been answered."""
            for _ in range(5):
                line = process.stdout.readline() if process.stdout else ""
                assert re.fullmatch(r"asked \d+ 0\n", line), line

        more()
        for pid in captured.agent("n1", "brain"):
            os.kill(pid, signal.SIGKILL)
        more()
        captured.label("shop", "istio.io/dataplane-mode=none")
        wait_until(lambda: captured.pods_not_outside() == set(), "every pod has left")
        more()
        assert "15053" not in captured.run("shop/client", "nft", "list", "ruleset").stdout
        captured.label("shop", "istio.io/dataplane-mode=ambient")
        wait_until(lambda: captured.pods_in_mesh() == SHOP, "every pod is back")
        more()
    finally:
        process.kill()
        process.communicate()


def test_look_ups_are_logged_and_counted(captured: Lab) -> None:
    captured.run("n1", "curl", "-sS", "-X", "POST", "localhost:15000/logging?level=dns=debug,info")

    def logged(*words: str) -> bool:
        return any("\tdns\t" in line and all(word in line for word in words) for line in captured.log("ztunnel-n1").splitlines())

    def looked_up(name: str, kind: str, *words: str) -> bool:
        dig(captured, name, kind)  # again: movers hear of the level a little later
        return logged(*words)

    own = ('src.workload="client"', 'query="AAAA"', 'domain="server.shop."', 'result="success"', "endpoints=1", "dst.service")
    wait_until(lambda: looked_up("server.shop", "AAAA", *own), "the look-up of the service is logged")
    foreign = ('query="TXT"', 'domain="www.example.net."', 'result="forwarded"')
    wait_until(lambda: looked_up("www.example.net", "TXT", *foreign), "so is the other")
    metrics = captured.run("n1", "curl", "-sS", "localhost:15020/metrics").stdout
    labels = 'request_query_type="txt",request_protocol="udp",source_canonical_service="client"'
    assert f"istio_dns_requests_total{{{labels}" in metrics
    assert f"istio_dns_upstream_requests_total{{{labels}" in metrics
    assert f"istio_dns_upstream_request_duration_seconds_bucket{{{labels}" in metrics


def test_nothing_of_it_is_left_when_pods_have_left(captured: Lab) -> None:
    before = captured.descriptors("n1")
    captured.label("shop", "istio.io/dataplane-mode=none")
    wait_until(lambda: captured.run("shop/client", "nft", "list", "ruleset").stdout == "", "the rules are gone")
    wait_until(lambda: "15053" not in captured.run("shop/client", "ss", "-lntu").stdout, "nobody listens any more")
    wait_until(lambda: captured.descriptors("n1")["socket"] < before["socket"], "the sockets are given back")

"""The node agent in a lab: real pods, real nftables, real mutual TLS, and processes killed under traffic."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from mesh.testing.lab import Lab, running_lab, wait_until

pytestmark = pytest.mark.netns

EXAMPLE = Path(__file__).parents[2] / "examples" / "two-nodes"
SHOP = {"shop/client", "shop/stranger", "shop/server", "shop/database"}

HOLD = """
import socket, sys, time
host, port, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
held = [socket.create_connection((host, port), 10) for _ in range(count)]
print("held", flush=True)
number = 0
while held:
    number += 1
    time.sleep(0.05)
    for sock in list(held):
        try:
            sock.settimeout(15)
            sock.sendall(b"%08d" % number)
            got = b""
            while len(got) < 8:
                more = sock.recv(8 - len(got))
                if not more:
                    raise EOFError("closed by the peer")
                got += more
            assert got == b"%08d" % number, got
        except (OSError, EOFError) as exc:
            print("lost", time.time(), type(exc).__name__, exc, flush=True)
            held.remove(sock)
    if number % 10 == 0:
        print("alive", len(held), flush=True)
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with running_lab(EXAMPLE, tmp_path_factory.mktemp("agent")) as lab:
        yield lab


@pytest.fixture
def enrolled(lab: Lab) -> Iterator[Lab]:
    """The shop is in the mesh, and no policy of an earlier test is left."""
    lab.remove("policy.yaml")
    lab.label("shop", "istio.io/dataplane-mode=ambient")
    wait_until(lambda: lab.pods_in_mesh() == SHOP, "every pod of the shop is captured")
    wait_until(lambda: _mutual(lab), "traffic between them is mutual TLS")
    yield lab
    lab.remove("policy.yaml")


def _mutual(lab: Lab) -> bool:
    before = len(lab.access("n1", "15008"))
    assert lab.curl("shop/client", "http://server.shop/").returncode == 0
    return len(lab.access("n1", "15008")) > before


HURRY = """
import socket, sys
host, port, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
for number in range(count):
    with socket.create_connection((host, port), 10) as sock:
        sock.sendall(b"%08d" % number)
        assert sock.recv(8) == b"%08d" % number, number
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(1) == b"", number
"""


class Holder:
    """Connections held in a pod, with a message to and fro twenty times a second."""

    def __init__(self, process: subprocess.Popen[str], count: int) -> None:
        self._process = process
        self.count = count
        self.lost: list[str] = []
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n", process.stderr and process.stderr.read()

    def lost_within(self, seconds: float) -> list[str]:
        """What was lost until some rounds after ``seconds``."""
        assert self._process.stdout is not None
        lost: list[str] = []
        deadline = time.monotonic() + seconds
        for line in self._process.stdout:
            if line.startswith("lost"):
                lost.append(line.strip())
            elif time.monotonic() > deadline:
                break
        return lost


@contextmanager
def holding(lab: Lab, where: str, host: str, port: int = 7000, count: int = 10) -> Iterator[Holder]:
    process = lab.start(where, "python3", "-c", HOLD, host, str(port), str(count))
    try:
        yield Holder(process, count)
    finally:
        process.kill()
        process.communicate()


@contextmanager
def local_ports(lab: Lab, where: str, local_range: str) -> Iterator[None]:
    """What a pod may connect from. The probes of its readiness need some as well."""
    path = "/proc/sys/net/ipv4/ip_local_port_range"

    def set_to(wanted: str) -> str:
        """What it was."""
        done = lab.run(where, "sh", "-c", f"cat {path} && echo {wanted} > {path}")
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    before = set_to(local_range)
    try:
        yield
    finally:
        assert set_to(before).split() == local_range.split()


def agent_processes(lab: Lab, node: str, kind: str) -> list[int]:
    """Process ids, as the node's own /proc has them, of an agent's brain or movers."""
    pattern = f"ztunnel_py {kind}"
    script = (
        "import os\n"
        "for pid in filter(str.isdigit, os.listdir('/proc')):\n"
        "    try: line = open(f'/proc/{pid}/cmdline').read().replace('\\0', ' ')\n"
        "    except OSError: continue\n"
        "    try: node = dict(v.split('=', 1) for v in open(f'/proc/{pid}/environ').read().split('\\0') if '=' in v).get('NODE_NAME')\n"
        "    except OSError: continue\n"
        f"    if {pattern!r} in line and node == {node!r}: print(pid)\n"
    )
    return [int(pid) for pid in lab.run(node, "python3", "-c", script).stdout.split()]


def kill_in(lab: Lab, node: str, *pids: int, signal: str = "KILL") -> None:
    done = lab.run(node, "kill", f"-{signal}", *map(str, pids))
    assert done.returncode == 0, done.stderr


POLICY = """
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata:
  name: {name}
  namespace: shop
spec:
{spec}
"""


def allow(principal: str, name: str = "callers", selector: str = "") -> str:
    spec = f"{selector}  action: ALLOW\n  rules:\n  - from:\n    - source:\n        principals: [{principal}]"
    return POLICY.format(name=name, spec=spec)


SELECT_SERVER = "  selector:\n    matchLabels:\n      app: server\n"
CLIENT = "cluster.local/ns/shop/sa/client"
STRANGER = "cluster.local/ns/shop/sa/stranger"


@pytest.mark.parametrize("family", ["-4", "-6"])
def test_captured_traffic_is_mutual_tls_and_the_server_sees_its_client(enrolled: Lab, family: str) -> None:
    done = enrolled.curl("shop/client", "http://server.shop/", family)
    pod = next(pod for pod in enrolled.status()["pods"] if pod["name"] == "client")
    wanted = next(ip for ip in pod["ips"] if (":" in ip) == (family == "-6"))
    assert f"hello {wanted}," in done.stdout
    line = enrolled.access("n2", 'direction="inbound"', wanted)[-1]
    assert 'src.identity="spiffe://cluster.local/ns/shop/sa/client"' in line
    assert 'dst.identity="spiffe://cluster.local/ns/shop/sa/server"' in line


def test_the_pod_address_is_reached_like_the_service(enrolled: Lab) -> None:
    pod = next(pod for pod in enrolled.status()["pods"] if pod["name"] == "server")
    for ip in pod["ips"]:
        url = f"http://[{ip}]:8080/" if ":" in ip else f"http://{ip}:8080/"
        assert enrolled.curl("shop/client", url).returncode == 0
    assert len(enrolled.access("n1", ":15008", "bytes_sent")) >= 2


def test_a_server_that_speaks_first_is_heard_at_once(enrolled: Lab) -> None:
    script = "import socket; s = socket.create_connection(('database.shop', 3306), 5); s.settimeout(5); print(s.recv(100))"
    done = enrolled.run("shop/client", "python3", "-c", script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() not in ("", "b''")


def test_a_port_nobody_listens_on_is_a_reset_with_its_reason(enrolled: Lab) -> None:
    pod = next(pod for pod in enrolled.status()["pods"] if pod["name"] == "server")
    assert (
        enrolled.curl(
            "shop/client", f"http://{pod['ips'][0]}:9/" if ":" not in pod["ips"][0] else f"http://[{pod['ips'][0]}]:9/"
        ).returncode
        != 0
    )
    assert wait_until(lambda: enrolled.access("n2", 'error="connection failed'), "the server's agent logs why")


def test_killing_the_brain_interrupts_nothing_and_another_takes_over(enrolled: Lab) -> None:
    with holding(enrolled, "shop/client", "server.shop") as held:
        (brain,) = agent_processes(enrolled, "n2", "brain")
        kill_in(enrolled, "n2", brain)
        assert enrolled.curl("shop/client", "http://server.shop/").returncode == 0, "new connections need no brain"
        wait_until(lambda: [pid for pid in agent_processes(enrolled, "n2", "brain") if pid != brain], "another brain runs")
        movers = enrolled.log("n2").count("mover.joined")
        wait_until(lambda: enrolled.log("n2").count("pods=2") >= 2, f"the movers tell it what they serve ({movers} joined)")
        assert held.lost_within(1.0) == []
    enrolled.write("policy.yaml", allow(STRANGER))
    wait_until(lambda: enrolled.curl("shop/client", "http://server.shop/").returncode != 0, "the new brain passes policies on")


def test_a_killed_mover_costs_its_own_connections_and_is_replaced(enrolled: Lab) -> None:
    movers = agent_processes(enrolled, "n1", "mover")
    assert len(movers) == 2, "the test needs two movers"
    dies, stays = movers
    with ExitStack() as stack:

        def hold_on(other: int) -> Holder:
            """Connections of the mover that is left when the other is stopped meanwhile."""
            kill_in(enrolled, "n1", other, signal="STOP")
            try:
                return stack.enter_context(holding(enrolled, "shop/client", "server.shop"))
            finally:
                kill_in(enrolled, "n1", other, signal="CONT")

        kept, lost = hold_on(other=dies), hold_on(other=stays)
        kill_in(enrolled, "n1", dies)
        wait_until(lambda: _all_lost(lost), "the dead mover's connections end")
        wait_until(lambda: len(agent_processes(enrolled, "n1", "mover")) == 2, "the mover is replaced")
        assert enrolled.curl("shop/client", "http://server.shop/").returncode == 0
        assert kept.lost_within(0.5) == []


@pytest.mark.parametrize("family", [4, 6])
def test_a_client_that_closes_its_connections_first_has_more_of_them_in_a_minute_than_the_server_has_ports(
    enrolled: Lab, family: int
) -> None:
    with local_ports(enrolled, "shop/server", "40000 40199"):
        kill_in(enrolled, "n2", *(movers := agent_processes(enrolled, "n2", "mover")))  # those that come look again
        wait_until(lambda: len(set(agent_processes(enrolled, "n2", "mover")) - set(movers)) >= 2, "others have come")
        wait_until(lambda: _mutual(enrolled), "they serve the pod")
        address = next(ip for ip in enrolled.pod("shop/server")["ips"] if (":" in ip) == (family == 6))
        done = enrolled.run("shop/client", "python3", "-c", HURRY, address, "7000", "250")
        assert done.returncode == 0, done.stderr


def test_an_allow_policy_lets_its_principal_in_and_resets_others(enrolled: Lab) -> None:
    enrolled.write("policy.yaml", allow(CLIENT))
    wait_until(lambda: enrolled.curl("shop/stranger", "http://server.shop/").returncode == 56, "the stranger is reset")
    assert enrolled.curl("shop/client", "http://server.shop/").returncode == 0
    line = enrolled.access("n2", "sa/stranger", "DENY")[-1]
    assert "connection closed due to policy rejection: allow policies exist, but none allowed" in line
    assert "http status: 401" in enrolled.access("n1", "sa/stranger", "DENY")[-1]


@pytest.mark.parametrize("selector", ["", SELECT_SERVER], ids=["by namespace", "by the workload's list of policies"])
def test_a_policy_ends_the_living_connections_it_refuses_and_no_others(enrolled: Lab, selector: str) -> None:
    with holding(enrolled, "shop/client", "server.shop") as refused, holding(enrolled, "shop/stranger", "server.shop") as kept:
        written = time.time()
        enrolled.write("policy.yaml", allow(STRANGER, selector=selector))
        lost = wait_until(lambda: _all_lost(refused), "every connection of the client is ended")
        print(f"the last one ended {max(float(line.split()[1]) for line in lost) - written:.2f} s after the policy was written")
        assert kept.lost_within(0.5) == []
    assert enrolled.access("n2", "connection closed due to policy change", 'response_flags="DENY"')


def _all_lost(held: Holder) -> list[str]:
    held.lost += held.lost_within(0.2)
    return held.lost if len(held.lost) == held.count else []


def test_strict_refuses_plaintext_and_permissive_takes_it(enrolled: Lab) -> None:
    strict = (
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: default, namespace: shop}\nspec: {mtls: {mode: %s}}\n"
    )
    enrolled.write("policy.yaml", strict % "STRICT")
    wait_until(lambda: enrolled.curl("outside/caller", "http://server.shop/").returncode != 0, "STRICT refuses the caller outside")
    assert enrolled.curl("shop/client", "http://server.shop/").returncode == 0
    assert enrolled.access("n2", 'response_flags="DENY"', "istio_converted_static_strict")
    enrolled.write("policy.yaml", strict % "PERMISSIVE")
    wait_until(lambda: enrolled.curl("outside/caller", "http://server.shop/").returncode == 0, "PERMISSIVE lets it in")


def test_a_broken_policy_keeps_the_last_good_version_and_is_reported(enrolled: Lab) -> None:
    enrolled.write("policy.yaml", allow(CLIENT))
    wait_until(lambda: enrolled.curl("shop/stranger", "http://server.shop/").returncode != 0, "the stranger is refused")
    enrolled.write("policy.yaml", allow(CLIENT).replace("principals: [", "ipBlocks: [10.0.0.0/99, "))
    problem = wait_until(lambda: enrolled.status()["problems"], "the mistake is shown")[0]
    assert problem["file"] == "policy.yaml"
    assert problem["line"] > 1
    assert "ipBlocks" in problem["field"]
    assert enrolled.curl("shop/stranger", "http://server.shop/").returncode != 0
    assert enrolled.curl("shop/client", "http://server.shop/").returncode == 0
    enrolled.write("policy.yaml", "apiVersion: v1\nkind: [")
    wait_until(lambda: "line" in json.dumps(enrolled.status()["problems"]), "malformed YAML is shown")
    assert enrolled.curl("shop/stranger", "http://server.shop/").returncode != 0


@pytest.mark.parametrize("where", ["shop/client", "outside/caller"])
def test_labelling_and_unlabelling_lose_no_connection(enrolled: Lab, where: str) -> None:
    with holding(enrolled, where, "server.shop", count=25) as held:
        for _ in range(2):
            enrolled.label("shop", "istio.io/dataplane-mode-")
            wait_until(lambda: not enrolled.pods_not_outside(), "the pods leave the mesh")
            assert enrolled.curl("shop/client", "http://server.shop/").returncode == 0
            assert held.lost_within(0.5) == []
            enrolled.label("shop", "istio.io/dataplane-mode=ambient")
            wait_until(lambda: enrolled.pods_in_mesh() == SHOP, "the pods are back")
            assert held.lost_within(0.5) == []


def test_a_pod_that_left_the_mesh_for_good_has_no_rule_left(enrolled: Lab) -> None:
    rules = ("nft", "list", "ruleset")
    assert "istio-ambient" in enrolled.run("shop/client", *rules).stdout
    enrolled.label("shop", "istio.io/dataplane-mode-")
    wait_until(lambda: "istio-ambient" not in enrolled.run("shop/client", *rules).stdout, "the tables go when all connections have ended")
    assert "fwmark" not in enrolled.run("shop/client", "ip", "rule").stdout
    ports = enrolled.run("shop/client", "ss", "-Hltn").stdout
    assert not re.search(r":150(01|06|08)\b", ports)


def test_traffic_goes_on_without_a_control_plane_and_a_restarted_one_is_found(enrolled: Lab) -> None:
    with holding(enrolled, "shop/client", "server.shop") as held:
        enrolled.meshctl("lab", "kill", "--name", enrolled.name, "istiod", "--signal", "STOP")
        try:
            assert enrolled.curl("shop/client", "http://server.shop/").returncode == 0
            assert held.lost_within(0.5) == []
        finally:
            enrolled.meshctl("lab", "kill", "--name", enrolled.name, "istiod", "--signal", "CONT")
        enrolled.meshctl("lab", "kill", "--name", enrolled.name, "istiod", "--signal", "KILL")
        enrolled.write("policy.yaml", allow(STRANGER))
        wait_until(lambda: _all_lost(held), "the new control plane's push reaches the agents")

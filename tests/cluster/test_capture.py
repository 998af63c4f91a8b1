"""Capture as kubelets see it: pods are in the mesh before they start, wait when they can't be, and are probed as ever."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mesh.model.labels import DATAPLANE_MODE
from mesh.model.ports import INBOUND_HBONE, PROBE_SOURCE_V4, PROBE_SOURCE_V6
from meshctl_py.lab.wiretap import is_tls, join_segments
from tests.cluster.harness.api import Object, condition, path_of
from tests.cluster.harness.client import Cluster, Node, wait_until
from tests.cluster.harness.images import PYTHON
from tests.cluster.mesh import SYSTEM, agent_of, captured, tapping, uninstall, wait_captured, wait_rolled_out
from tests.cluster.workloads import ATTEMPT, PORT, addresses, apply_pods, attempt, echo_pod, service

NET_DIR = "/etc/cni/net.d"
PLUGIN = "ambient-mesh-cni"
AMBIENT = {DATAPLANE_MODE: "ambient"}


@pytest.fixture(scope="module")
def server(mesh: Cluster) -> Iterator[Object]:
    """A pod that was captured as it started, on n2."""
    with mesh.namespace("there", **AMBIENT) as namespace:
        (pod,) = apply_pods(mesh, namespace, echo_pod("server", "n2")).values()
        mesh.api.create(f"/api/v1/namespaces/{namespace}/services", service("server", namespace))
        wait_captured(mesh, namespace, 1)
        yield pod


def chain(node: Node) -> list[str]:
    return [plugin["type"] for plugin in json.loads(node.run("cat", f"{NET_DIR}/10-pods.conflist"))["plugins"]]


def host_table(node: Node) -> str:
    return node.run("nft", "list", "table", "inet", "ambient-mesh-host", check=False)


def probe_sets(node: Node) -> dict[str, str]:
    """The uid by address, of the pods that the node's kubelet may probe."""
    found = json.loads(node.run("nft", "-j", "list", "table", "inet", "ambient-mesh-host"))
    elements = [element["elem"] for entry in found["nftables"] if "set" in entry for element in entry["set"].get("elem", ())]
    return {element["val"]: element["comment"] for element in elements}


def events(cluster: Cluster, namespace: str, pod: str) -> list[str]:
    found = [event for event in cluster.api.list("Event", namespace) if event["involvedObject"]["name"] == pod]
    return [f"{event['reason']}: {event['message']}" for event in found]


def from_node(node: Node, host: str, port: int) -> str:
    """What comes of one connection of root's on the node; see `ATTEMPT`."""
    command = ["nsenter", f"--net=/proc/{node.pid}/ns/net", sys.executable, "-c", ATTEMPT, host, str(port)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()


def starting(name: str, node: str, script: str, *arguments: str) -> Object:
    """A pod whose first container runs a script of Python."""
    pod = echo_pod(name, node)
    first = {"name": "first", "image": PYTHON, "imagePullPolicy": "Never", "command": ["python3", "-c", script, *arguments]}
    pod["spec"]["initContainers"] = [first]
    return pod


def test_the_first_connection_of_a_new_pods_first_container_is_mutual_tls(mesh: Cluster, server: Object) -> None:
    host = addresses(server)[0]
    with tapping(mesh.node("n2")) as tap:
        with mesh.namespace("new", **AMBIENT) as namespace:
            (pod,) = apply_pods(mesh, namespace, starting("starter", "n1", ATTEMPT, host, str(PORT))).values()
            assert mesh.logs(namespace, "starter", "-c", "first").strip() == "hello"
            mine = set(addresses(pod))
        streams = [
            s
            for s in join_segments(tap.heard())
            if {str(s.source.ip), str(s.destination.ip)} & mine and host in (str(s.source.ip), str(s.destination.ip))
        ]
        assert any(stream.destination.port == INBOUND_HBONE and is_tls(stream) for stream in streams)
        assert not any(b"hello" in stream.data or stream.destination.port == PORT for stream in streams)


def test_a_pod_outside_the_mesh_starts_without_rules(mesh: Cluster, server: Object) -> None:
    with mesh.namespace("plain") as namespace:
        (pod,) = apply_pods(mesh, namespace, echo_pod("plain", "n2")).values()
        assert not captured(pod)
        assert mesh.in_pod(pod, "nft", "list", "ruleset").strip() == ""


def test_probes_of_every_kind_pass_under_strict_and_strangers_do_not(mesh: Cluster, server: Object) -> None:
    strict = {
        "apiVersion": "security.istio.io/v1",
        "kind": "PeerAuthentication",
        "metadata": {"name": "default"},
        "spec": {"mtls": {"mode": "STRICT"}},
    }
    probes: dict[str, dict[str, Any]] = {
        "tcp": {"tcpSocket": {"port": PORT}},
        "http": {"httpGet": {"port": 8080, "path": "/"}},
        "exec": {"exec": {"command": ["true"]}},
        "grpc": {"grpc": {"port": 9090}},
    }
    with mesh.namespace("strict", **AMBIENT) as namespace, mesh.namespace("strangers") as outside:
        mesh.kubectl("apply", "-n", namespace, "-f", "-", stdin=json.dumps(strict))
        pod = echo_pod("probed", "n2", probe=False)
        own = pod["spec"]["containers"][0]
        own["readinessProbe"] = own["livenessProbe"] = probes["tcp"] | {"periodSeconds": 1}
        web = {
            "name": "web",
            "image": PYTHON,
            "imagePullPolicy": "Never",
            "command": ["python3", "-m", "http.server", "--bind", "::", "8080"],
        }
        health = {"name": "health", "image": PYTHON, "imagePullPolicy": "Never", "command": ["python3", "-c", HEALTH]}
        for container, kinds in ((web, ("http", "exec")), (health, ("grpc",))):
            container["readinessProbe"] = probes[kinds[0]] | {"periodSeconds": 1}
            container["livenessProbe"] = probes[kinds[-1]] | {"periodSeconds": 1}
            pod["spec"]["containers"].append(container)
        (made,) = apply_pods(mesh, namespace, pod).values()
        (stranger,) = apply_pods(mesh, outside, echo_pod("stranger", "n2")).values()
        wait_until(lambda: attempt(mesh, stranger, addresses(made)[0]) != "hello", "strangers are refused")
        for host in addresses(made):
            assert from_node(mesh.node("n2"), host, PORT) == "hello", "root on the pod's own node is taken for its kubelet"
            assert from_node(mesh.node("n1"), host, PORT) != "hello", "root on another node is a stranger"
        since = len(events(mesh, namespace, "probed"))
        table = host_table(mesh.node("n2"))
        assert PROBE_SOURCE_V4 in table
        assert PROBE_SOURCE_V6 in table
        wait_until(lambda: counted(mesh.node("n2")) > 20, "probes go through the node's rule")
        found = mesh.api.find("Pod", "probed", namespace)
        assert found is not None
        assert condition(found, "Ready"), events(mesh, namespace, "probed")[since:]
        assert all(status["restartCount"] == 0 for status in found["status"]["containerStatuses"])


HEALTH = """
# The least that grpc.health.v1.Health/Check answers to: h2 frames by hand, SERVING whatever is asked.
import socket, struct, threading
def frame(kind, flags, stream, payload=b""):
    return struct.pack("!I", len(payload))[1:] + bytes([kind, flags]) + struct.pack("!I", stream) + payload
def literal(name, value):
    return b"\\0" + bytes([len(name)]) + name + bytes([len(value)]) + value
def exactly(sock, count):
    data = b""
    while len(data) < count:
        more = sock.recv(count - len(data))
        if not more:
            raise EOFError
        data += more
    return data
def serve(sock):
    try:
        exactly(sock, 24)
        sock.sendall(frame(4, 0, 0))
        while True:
            head = exactly(sock, 9)
            payload = exactly(sock, int.from_bytes(head[:3], "big"))
            kind, flags, stream = head[3], head[4], int.from_bytes(head[5:], "big")
            if kind == 4 and not flags & 1:
                sock.sendall(frame(4, 1, 0))
            elif kind == 6 and not flags & 1:
                sock.sendall(frame(6, 1, 0, payload))
            elif kind == 0 and flags & 1:
                head = frame(1, 4, stream, b"\\x88" + literal(b"content-type", b"application/grpc"))
                body = frame(0, 0, stream, b"\\0\\0\\0\\0\\2\\x08\\1")
                sock.sendall(head + body + frame(1, 5, stream, literal(b"grpc-status", b"0")))
    except (OSError, EOFError):
        pass
listener = socket.create_server(("::", 9090), family=socket.AF_INET6, dualstack_ipv6=True)
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
"""


def counted(node: Node) -> int:
    """Connections that the node's rules gave another address."""
    found = json.loads(node.run("nft", "-j", "list", "table", "inet", "ambient-mesh-host"))
    rules = [entry["rule"] for entry in found["nftables"] if "rule" in entry]
    return sum(part["counter"]["packets"] for rule in rules for part in rule["expr"] if "counter" in part)


def test_the_node_itself_and_node_ports_and_names_go_on_working(mesh: Cluster, server: Object) -> None:
    for node in mesh.nodes:
        for host in addresses(server):
            assert from_node(node, host, PORT) == "hello", node.name
    exposed = service("server", "there")
    exposed["metadata"]["name"] = "exposed"
    exposed["spec"] |= {"type": "NodePort", "ports": [{"port": PORT, "targetPort": PORT, "nodePort": 30700}]}
    mesh.api.create("/api/v1/namespaces/there/services", exposed)
    for node in mesh.nodes:
        address = next(a["address"] for a in mesh.api.find("Node", node.name)["status"]["addresses"] if a["type"] == "InternalIP")
        for other in mesh.nodes:
            wait_until(
                lambda node=other, host=address: from_node(node, host, 30700) == "hello", f"node port of {node.name} from {other.name}"
            )
    names = "import socket; print(socket.gethostbyname('server.there.svc.cluster.local'))"
    found = mesh.api.find("Service", "server", "there")
    assert found is not None
    assert mesh.exec("there", "server", "python3", "-c", names).strip() == found["spec"]["clusterIP"]


def test_a_chain_that_the_primary_plugin_rewrites_is_mended(mesh: Cluster, server: Object) -> None:
    node = mesh.node("n1")
    assert chain(node) == ["ptp", PLUGIN]
    original = json.loads(node.run("cat", f"{NET_DIR}/10-pods.conflist"))
    original["plugins"] = original["plugins"][:-1]
    for _ in range(3):
        node.run("sh", "-c", f"cat >{NET_DIR}/10-pods.conflist <<'END'\n{json.dumps(original)}\nEND")
        wait_until(lambda: chain(node) == ["ptp", PLUGIN], "the chain is mended")
    node.run("rm", f"/opt/cni/bin/{PLUGIN}", f"{NET_DIR}/{PLUGIN}-kubeconfig")
    wait_until(lambda: node.run("ls", f"/opt/cni/bin/{PLUGIN}", f"{NET_DIR}/{PLUGIN}-kubeconfig", check=False), "its files are back")
    assert node.run("stat", "-c", "%a %u", f"{NET_DIR}/{PLUGIN}-kubeconfig").split() == ["600", "0"]


def test_a_restarted_agent_finds_its_pods_again(mesh: Cluster, server: Object) -> None:
    before = agent_of(mesh, "n2")["metadata"]["name"]
    mesh.kubectl("delete", "pod", "-n", SYSTEM, before, "--wait=true", timeout=180)
    wait_rolled_out(mesh)
    after = agent_of(mesh, "n2")["metadata"]["name"]
    assert after != before
    wait_until(lambda: 'pod.captured\tpod="there/server"' in mesh.logs(SYSTEM, after), "the pod is captured again")
    uid = server["metadata"]["uid"]
    assert {ip: owner for ip, owner in probe_sets(mesh.node("n2")).items() if owner == uid} == dict.fromkeys(addresses(server), uid)
    with mesh.namespace("later", **AMBIENT) as namespace:
        (client,) = apply_pods(mesh, namespace, echo_pod("client", "n1")).values()
        assert attempt(mesh, client, addresses(server)[0]) == "hello"


def test_without_an_agent_pods_of_the_mesh_wait_and_say_why_and_others_start(mesh: Cluster, server: Object) -> None:
    image = container_of(mesh)["image"]
    put_image(mesh, "localhost/nothing:1", {"type": "OnDelete", "rollingUpdate": None})
    mesh.kubectl("delete", "pod", "-n", SYSTEM, agent_of(mesh, "n1")["metadata"]["name"], "--wait=true", timeout=180)
    assert chain(mesh.node("n1")) == ["ptp", PLUGIN], "it was not uninstalled"
    with mesh.namespace("waiting", **AMBIENT) as namespace, mesh.namespace("not-waiting") as outside:
        apply_pods(mesh, outside, echo_pod("free", "n1"))
        pod = echo_pod("held", "n1")
        mesh.api.apply({**pod, "metadata": {**pod["metadata"], "namespace": namespace}})
        reason = "the pod waits because it belongs to the mesh (namespace label istio.io/dataplane-mode=ambient)"
        found: list[str] = []
        wait_until(lambda: found.extend(events(mesh, namespace, "held")) or any(reason in event for event in found), reason)
        assert "the node's agent does not answer" in next(event for event in found if reason in event)
        put_image(mesh, image, {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}})
        wait_rolled_out(mesh)
        (started,) = mesh.wait_ready(namespace, "held")
        wait_captured(mesh, namespace, 1)
        assert attempt(mesh, started, addresses(server)[0]) == "hello"


def container_of(cluster: Cluster) -> Object:
    found = cluster.api.find("DaemonSet", "ztunnel", SYSTEM)
    assert found is not None
    container: Object = found["spec"]["template"]["spec"]["containers"][0]
    return container


def put_image(cluster: Cluster, image: str, strategy: Object) -> None:
    template = {"spec": {"containers": [{**container_of(cluster), "image": image}]}}
    cluster.api.patch(path_of("DaemonSet", "ztunnel", SYSTEM), {"spec": {"updateStrategy": strategy, "template": template}})


def test_a_labelled_pod_on_the_hosts_network_is_left_alone_and_told(mesh: Cluster, server: Object) -> None:
    with mesh.namespace("host", **AMBIENT) as namespace:
        pod = echo_pod("exporter", "n1", probe=False)
        pod["spec"]["hostNetwork"] = True
        (made,) = apply_pods(mesh, namespace, pod).values()
        wait_until(lambda: any("on the host's network" in event for event in events(mesh, namespace, "exporter")), "an event says so")
        assert not captured(made)
        assert "istio-ambient-nat" not in mesh.node("n1").run("nft", "list", "tables")


def test_a_tainted_node_is_freed_when_its_agent_is_ready(mesh: Cluster) -> None:
    mesh.kubectl("taint", "node", "n2", "cni.istio.io/not-ready=:NoSchedule")
    wait_until(lambda: "taints" not in mesh.api.find("Node", "n2")["spec"], "the taint is gone")


def test_a_rebooted_nodes_pods_are_captured_before_they_start_again(mesh: Cluster, server: Object) -> None:
    host = addresses(server)[0]
    with mesh.namespace("rebooted", **AMBIENT) as namespace:
        apply_pods(mesh, namespace, starting("starter", "n1", ATTEMPT, host, str(PORT)))
        mesh.stop("n1")
        mesh.start("n1")
        wait_until(lambda: restarts(mesh, namespace, "starter"), "its containers are started again", 180)
        wait_rolled_out(mesh)
        (pod,) = mesh.wait_ready(namespace, "starter")
        assert mesh.logs(namespace, "starter", "-c", "first").strip() == "hello"
        owners = probe_sets(mesh.node("n1"))
        assert {owners.get(address) for address in addresses(pod)} == {pod["metadata"]["uid"]}
        assert attempt(mesh, pod, host) == "hello"


def restarts(cluster: Cluster, namespace: str, name: str) -> bool:
    found = cluster.api.find("Pod", name, namespace)
    statuses = found["status"].get("containerStatuses", []) if found is not None else []
    return any(status["restartCount"] and status["ready"] for status in statuses)


def test_pods_deleted_while_they_start_leave_nothing(mesh: Cluster, server: Object) -> None:
    with mesh.namespace("hasty", **AMBIENT) as namespace:
        for number in range(10):
            pod = echo_pod(f"hasty-{number}", "n2", probe=False)
            mesh.api.apply({**pod, "metadata": {**pod["metadata"], "namespace": namespace}})
            wait_until(lambda number=number: begun(mesh, namespace, f"hasty-{number}", number), "it has begun to start")
            mesh.kubectl("delete", "pod", "-n", namespace, f"hasty-{number}", "--grace-period=0", "--force", "--wait=false")
        wait_until(lambda: not mesh.api.list("Pod", namespace), "all are gone")
        wait_until(lambda: not set(probe_sets(mesh.node("n2")).values()) - uids(mesh), "nothing is left on the node")
        agent = agent_of(mesh, "n2")["metadata"]["name"]
        wait_until(lambda: "hasty-" not in config_dump(mesh, agent), "nothing is left in the agent")
        (after,) = apply_pods(mesh, namespace, echo_pod("after", "n2")).values()
        assert attempt(mesh, after, addresses(server)[0]) == "hello"


def begun(cluster: Cluster, namespace: str, name: str, number: int) -> bool:
    """At another moment of its start for every pod."""
    found = cluster.api.find("Pod", name, namespace)
    if number % 3 == 0:
        return found is not None
    if number % 3 == 1:
        return found is not None and bool(events(cluster, namespace, name))
    return found is not None and captured(found)


def uids(cluster: Cluster) -> set[str]:
    return {pod["metadata"]["uid"] for pod in cluster.api.list("Pod")}


def config_dump(cluster: Cluster, agent: str) -> str:
    script = "import urllib.request; print(urllib.request.urlopen('http://localhost:15000/config_dump').read().decode())"
    return json.dumps(json.loads(cluster.exec(SYSTEM, agent, "python3", "-c", script))["workloadState"])


def test_uninstalled_nothing_of_the_plugin_is_left_and_pods_start_as_before(mesh: Cluster, tmp_path: Path) -> None:
    uninstall(mesh, tmp_path)
    for node in mesh.nodes:
        wait_until(lambda node=node: chain(node) == ["ptp"], f"the plugin is out of the chain of {node.name}")
        wait_until(lambda node=node: PLUGIN not in node.run("ls", "/opt/cni/bin", NET_DIR), f"its files are gone from {node.name}")
        wait_until(lambda node=node: not host_table(node), f"the table of {node.name} is gone")
    with mesh.namespace("after", **AMBIENT) as namespace:
        apply_pods(mesh, namespace, echo_pod("after", "n1"))

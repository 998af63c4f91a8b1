"""``meshctl`` on a real cluster, as its user: install, look, enrol, look inside, and take it out so that nothing is left."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mesh.kube.ownership import DEPLOYED
from mesh.kube.resources import RESOURCES
from mesh.model.labels import DATAPLANE_MODE, GATEWAY_MANAGED, USE_WAYPOINT
from tests.cluster.harness.api import Object, path_of
from tests.cluster.harness.client import PATIENCE, Cluster, wait_until
from tests.cluster.harness.images import PROJECT
from tests.cluster.mesh import meshctl, remove, wait_captured
from tests.cluster.waypoints import apply, conditions_of, gateway, of, overlay, rules, status_of
from tests.cluster.workloads import addresses, apply_pods, attempt, echo_pod, loading

NAMESPACE = "meshctl"
PASSING = ("events", "endpoints", "leases", "controllerrevisions", "apiservices", "pods.metrics.k8s.io", "nodes.metrics.k8s.io")
"""Kinds whose objects come and go by themselves: the API server's own record of its groups follows definitions some time later."""
DEFINED = re.compile(r"\.(istio\.io|gateway\.networking\.k8s\.io)$", re.MULTILINE)
"""Kinds that the mesh brings, as ``kubectl api-resources`` writes them."""


@dataclass(frozen=True)
class World:
    """``before``: what was there before the mesh."""

    cluster: Cluster
    pods: dict[str, Object]
    before: dict[str, object]

    def meshctl(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return meshctl(self.cluster, *arguments, check=check)

    def ask(self, node: str, what: str, *arguments: str) -> list[dict[str, Any]]:
        """The items that ``meshctl node`` prints as JSON."""
        items: list[dict[str, Any]] = json.loads(self.meshctl("node", node, what, "-o", "json", *arguments).stdout)["items"]
        return items


def snapshot(cluster: Cluster, pods: dict[str, Object]) -> dict[str, object]:
    """Every object, the files where agents and CNI plugins put theirs, and the rules of nodes and pods."""
    kinds = cluster.kubectl("api-resources", "--verbs=list", "-o", "name").split()
    wanted = ",".join(kind for kind in kinds if kind not in PASSING and kind.partition(".")[0] not in PASSING)
    columns = "custom-columns=KIND:.kind,NS:.metadata.namespace,NAME:.metadata.name"
    found: dict[str, object] = {"objects": set(cluster.kubectl("get", wanted, "-A", "--no-headers", "-o", columns).splitlines())}
    # Not the directories themselves: the kubelet makes the last for its mount, and a mount point can't be removed from inside.
    files = "find /etc/cni/net.d /opt/cni/bin /run/ambient-mesh -mindepth 1 -exec ls -ld {} + 2>/dev/null | awk '{print $1, $NF}'"
    routes = "ip rule; ip -6 rule; ip route show table all; ip -6 route show table all"
    for node in cluster.nodes:
        found[f"files of {node.name}"] = node.run("sh", "-c", files)
        # What it says, not how it is laid out: the plugin is taken out of the chain that it was put into.
        found[f"CNI chain of {node.name}"] = json.loads(node.run("sh", "-c", "cat /etc/cni/net.d/*.conflist"))
        found[f"tables of {node.name}"] = node.run("nft", "list", "tables")
    for name, pod in pods.items():
        found[f"rules of {name}"] = cluster.in_pod(pod, "nft", "--stateless", "list", "ruleset")
        found[f"routes of {name}"] = cluster.in_pod(pod, "sh", "-c", routes)
    return found


def difference(world: World) -> dict[str, tuple[object, object]]:
    """What is not as it was before the mesh: for every part what there was and what there is, of sets only what the other lacks."""
    changed: dict[str, tuple[object, object]] = {}
    for key, now in snapshot(world.cluster, world.pods).items():
        before = world.before[key]
        if isinstance(before, set) and isinstance(now, set) and before != now:
            changed[key] = (before - now, now - before)
        elif before != now:
            changed[key] = (before, now)
    return changed


def wait_forgotten(cluster: Cluster) -> None:
    """The API server goes on offering kinds for a while whose definitions are gone, and has none to show when asked for them."""
    wait_until(lambda: not DEFINED.search(cluster.kubectl("api-resources", "-o", "name")), "no kind of the mesh is offered")


@pytest.fixture(scope="module")
def world(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    remove(cluster, tmp_path_factory.mktemp("deploy"))  # what another test may have left, which is not meshctl's
    meshctl(cluster, "uninstall", "-y", "--purge", check=False)
    wait_until(
        lambda: not any("deletionTimestamp" in each["metadata"] for each in cluster.api.list("Namespace")), "former namespaces are gone"
    )
    # What 'kubectl delete -k' leaves, since no file names it.
    cluster.kubectl("delete", "configmap", "-A", "--field-selector", "metadata.name=istio-ca-root-cert")
    wait_forgotten(cluster)
    with cluster.namespace(NAMESPACE) as namespace:
        pods = apply_pods(cluster, namespace, echo_pod("client", "n1"), echo_pod("server", "n2"))
        before = snapshot(cluster, pods)
        meshctl(cluster, "install", "--image", PROJECT)
        yield World(cluster, pods, before)
        meshctl(cluster, "uninstall", "-y", "--purge", check=False)


@pytest.fixture
def enrolled(world: World) -> World:
    world.meshctl("label", "namespace", NAMESPACE, f"{DATAPLANE_MODE}=ambient")
    wait_captured(world.cluster, NAMESPACE, 2)
    return world


def test_installing_again_changes_nothing(world: World) -> None:
    agents = world.cluster.kubectl("get", "pods", "-n", "istio-system", "-o", "name")
    done = world.meshctl("install")
    assert "keeping the values of the last installation" in done.stdout
    assert not [line for line in done.stdout.splitlines() if line.endswith((" created", " configured"))]
    assert world.cluster.kubectl("get", "pods", "-n", "istio-system", "-o", "name") == agents
    told = world.meshctl("install", "--dry-run", "server", "--set", "istiod.replicas=2").stdout
    assert "deployment.apps/istiod would be changed\n" in told
    assert "daemonset.apps/ztunnel unchanged\n" in told


def test_the_status_tells_of_every_node_and_of_all_versions(world: World) -> None:
    def well() -> dict[str, Any]:
        report: dict[str, Any] = json.loads(world.meshctl("status", "-o", "json", check=False).stdout)
        return report if not report["wrong"] else {}

    report = wait_until(well, "all is well")
    assert [agent["node"] for agent in report["agents"]] == [node.name for node in world.cluster.nodes]
    assert {agent["configuration"] for agent in report["agents"]} == {"in sync"}
    assert report["controlPlane"][0]["agents"] == len(world.cluster.nodes)
    lines = world.meshctl("version").stdout.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["client version", "control plane version", "data plane version"]
    assert lines[2].endswith(f"({len(world.cluster.nodes)} agents)")


def test_a_pod_that_is_enrolled_alone_is_captured_alone(world: World) -> None:
    world.meshctl("label", "pod", "server", f"{DATAPLANE_MODE}=ambient", "-n", NAMESPACE)
    wait_captured(world.cluster, NAMESPACE, 1)
    assert [pod["name"] for pod in world.ask("n2", "pods", "-n", NAMESPACE)] == ["server"]
    assert not world.ask("n1", "pods", "-n", NAMESPACE)
    world.meshctl("label", "pod", "server", f"{DATAPLANE_MODE}-", "-n", NAMESPACE)


def test_an_agent_tells_who_talks_to_whom_and_what_its_rules_are(enrolled: World) -> None:
    client, server = enrolled.pods["client"], enrolled.pods["server"]
    host = addresses(server)[0]

    def tunnelled() -> bool:
        with loading(enrolled.cluster, client, host, held=3, rate=5):
            inbound = [item["connection"] for item in enrolled.ask("n2", "connections", "--pod", f"{NAMESPACE}/server")]
            proven = [living for living in inbound if living["sourceIdentity"] == f"spiffe://cluster.local/ns/{NAMESPACE}/sa/default"]
            return len(proven) >= 3 and all(living["because"] for living in proven)

    wait_until(tunnelled, "held connections are shown with the client's identity")
    (rules,) = enrolled.ask("n1", "rules", "--pod", f"{NAMESPACE}/client")
    assert (rules["phase"], rules["differences"], rules["error"]) == ("captured", [], "")
    assert sum(rule["packets"] or 0 for chain in rules["chains"] for rule in chain["rules"]) > 0
    (certificate,) = enrolled.ask("n1", "certificates", "--pod", f"{NAMESPACE}/client")
    assert [part["type"] for part in certificate["chain"]] == ["Leaf", "Root"]
    assert "pod.captured" in enrolled.meshctl("node", "n1", "logs", "--tail", "200").stdout


def test_without_the_control_plane_an_agent_still_answers(enrolled: World) -> None:
    cluster = enrolled.cluster
    cluster.kubectl("scale", "-n", "istio-system", "deployment/istiod", "--replicas=0")
    try:
        wait_until(lambda: not cluster.api.list("Pod", "istio-system", labelSelector="app=istiod"), "the control plane is gone")
        assert [pod["phase"] for pod in enrolled.ask("n1", "pods", "-n", NAMESPACE)] == ["captured"]
        status = enrolled.meshctl("status", check=False)
        assert status.returncode == 1
        assert "0 of 0 replicas ready" in status.stdout
    finally:
        enrolled.meshctl("install")


def test_on_its_node_an_agent_is_reached_without_the_api_server(enrolled: World) -> None:
    node = enrolled.cluster.node("n1")
    path = Path("/proc", str(node.pid), "root", "run/ambient-mesh/admin.sock")  # /var/run is a link, and its target would be looked up here
    assert path.stat().st_mode & 0o777 == 0o600
    command = [sys.executable, "-m", "meshctl_py", "node", "n1", "pods", "-o", "json", "--socket", str(path)]
    told = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "KUBECONFIG": "/none"}).stdout)
    assert {"client"} <= {pod["name"] for pod in told["items"]}


def put_waypoint(cluster: Cluster, namespace: str) -> list[Object]:
    """A Gateway that is deployed with all there can be, and one of everything that has a status because of it; those that have one."""
    cluster.api.patch(path_of("Namespace", namespace), {"metadata": {"labels": {USE_WAYPOINT: "waypoint"}}})
    apply(cluster.api, overlay("more", namespace, podDisruptionBudget={"spec": {"minAvailable": 1}}, horizontalPodAutoscaler={}))
    objects = [gateway("waypoint", namespace, "more"), *rules(namespace)]
    for obj in objects:
        apply(cluster.api, obj)
    wait_until(lambda: conditions_of(cluster.api, objects[0]).get("Programmed") == ("True", "Programmed"), "the waypoint is programmed")
    wait_until(lambda: all(conditions_of(cluster.api, obj) for obj in objects), "everything has a status")
    return objects


def deployed(cluster: Cluster) -> set[str]:
    """The kinds of all that runs waypoints, in any namespace."""
    return {kind.kind for kind in DEPLOYED if cluster.api.get(kind.collection(), labelSelector=GATEWAY_MANAGED)["items"]}


def test_the_status_names_routes_that_are_mistaken_and_is_well_without_them(world: World) -> None:
    cluster = world.cluster
    parent = {"group": "", "kind": "Service", "name": "nowhere"}
    rule = {"backendRefs": [{"name": "gone", "port": 80}]}
    host = "nobody.example.com"
    http = [{"route": [{"destination": {"host": host}}]}]
    objects = [
        of("HTTPRoute", "astray", NAMESPACE, {"parentRefs": [parent], "rules": [rule]}),
        of("VirtualService", "astray", NAMESPACE, {"hosts": [host], "http": http}),
    ]
    for obj in objects:
        apply(cluster.api, obj)
    wanted = {
        f"configuration: HTTPRoute {NAMESPACE}/astray: spec.parentRefs[0]: ": "not found",
        f"configuration: HTTPRoute {NAMESPACE}/astray: spec.rules[0].backendRefs[0]": "what would go there fails",
        f"configuration: VirtualService {NAMESPACE}/astray: spec.hosts[0]: ": f"no service has the hostname {host}: it has no effect",
    }

    def named(lines: list[str]) -> bool:
        return all(any(line.startswith(start) and line.endswith(end) for line in lines) for start, end in wanted.items())

    def told() -> list[str]:
        lines: list[str] = json.loads(world.meshctl("status", "-o", "json", check=False).stdout)["wrong"]
        return lines

    wait_until(lambda: named(told()), "each is named with its field")
    shown = world.meshctl("status", check=False)
    assert shown.returncode == 1
    assert named([line.strip() for line in shown.stdout.splitlines()]), shown.stdout
    for obj in objects:
        cluster.api.delete(RESOURCES[obj["kind"]].path(NAMESPACE, "astray"))
    wait_until(lambda: told() == [], "all is well")
    assert world.meshctl("status").stdout.endswith("all is well\n")


def test_uninstalling_leaves_pods_running_and_nothing_of_ours(enrolled: World) -> None:
    cluster = enrolled.cluster
    objects = put_waypoint(cluster, NAMESPACE)
    assert deployed(cluster) == {kind.kind for kind in DEPLOYED}
    done = enrolled.meshctl("uninstall", "-y")
    assert "namespace/istio-system deleted" in done.stdout
    labels = cluster.api.find("Namespace", NAMESPACE)
    assert labels is not None
    assert labels["metadata"]["labels"][DATAPLANE_MODE] == "ambient"
    for name, pod in enrolled.pods.items():
        now = cluster.api.find("Pod", name, NAMESPACE)
        assert now is not None
        assert now["metadata"]["uid"] == pod["metadata"]["uid"]
        assert now["status"]["containerStatuses"][0]["restartCount"] == 0
    assert attempt(cluster, enrolled.pods["client"], addresses(enrolled.pods["server"])[0]) == "hello"
    assert deployed(cluster) == set()
    assert cluster.kubectl("get", "gatewayclass", "-o", "name") == ""
    said = {obj["kind"]: status_of(cluster.api, obj) for obj in objects}
    assert said.pop("Service") == {"loadBalancer": {}}
    assert said == {kind: {} for kind in said}
    assert "the mesh is not installed" in enrolled.meshctl("uninstall", "-y").stdout
    for kind, name in (("Gateway", "waypoint"), ("Service", "web"), ("ConfigMap", "more")):
        cluster.api.delete(RESOURCES[kind].path(NAMESPACE, name))
    enrolled.meshctl("uninstall", "-y", "--purge")
    wait_forgotten(cluster)
    deadline = time.monotonic() + PATIENCE
    while (left := difference(enrolled)) and time.monotonic() < deadline:  # what follows others goes after them
        time.sleep(1.0)
    assert left == {}
    assert "the mesh is not installed" in enrolled.meshctl("status", check=False).stdout

"""Agents that come and go on a real cluster: what their ends leave behind, and what they must not."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mesh.model.labels import CAPTURED_BY, REDIRECTION
from tests.cluster.harness.api import Object, path_of
from tests.cluster.harness.client import Cluster, wait_until
from tests.cluster.mesh import SYSTEM, agent_of, install, label, uninstall, wait_captured, wait_rolled_out
from tests.cluster.workloads import addresses, apply_pods, echo_pod, loading

NAMESPACE = "rollout"


@pytest.fixture
def pods(mesh: Cluster) -> Iterator[dict[str, Object]]:
    with mesh.namespace(NAMESPACE) as namespace:
        made = apply_pods(mesh, namespace, echo_pod("client", "n1"), echo_pod("server", "n2"))
        label(mesh, namespace)
        wait_captured(mesh, namespace, 2)
        yield made


def redirected(cluster: Cluster, pod: Object) -> bool:
    return "istio-ambient" in cluster.in_pod(pod, "nft", "list", "tables")


def test_an_agents_pod_that_is_deleted_serves_until_its_successor_does(mesh: Cluster, pods: dict[str, Object]) -> None:
    with loading(mesh, pods["client"], addresses(pods["server"])[0]) as load:
        load.go_on()
        name = agent_of(mesh, "n2")["metadata"]["name"]
        began = time.time()
        mesh.api.delete(path_of("Pod", name, SYSTEM))
        wait_until(lambda: agent_of_or_none(mesh, "n2") not in (None, name), "another agent is ready", 120)
        wait_rolled_out(mesh, 120)
        load.go_on()
        assert load.refused == []
        assert all(lost["lost"] - began > 25 for lost in load.lost), load.lost[:3]


def agent_of_or_none(cluster: Cluster, node: str) -> str | None:
    try:
        return str(agent_of(cluster, node)["metadata"]["name"])
    except AssertionError:
        return None


def test_the_end_of_the_daemon_set_leaves_no_rule_in_any_pod_and_another_refuses_no_connection(
    mesh: Cluster, pods: dict[str, Object], tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory: Path = tmp_path_factory.mktemp("uninstall")
    assert all(redirected(mesh, pod) for pod in pods.values())
    said = {name: annotations(mesh, pod) for name, pod in pods.items()}
    assert all({REDIRECTION, CAPTURED_BY} <= each.keys() for each in said.values())
    try:
        with loading(mesh, pods["client"], addresses(pods["server"])[0], held=0) as load:
            load.go_on()
            uninstall(mesh, directory)
            wait_until(lambda: not mesh.api.list("Pod", SYSTEM, labelSelector="app=ztunnel"), "the agents are gone", 90)
            assert not any(redirected(mesh, pod) for pod in pods.values())
            load.go_on()
            assert load.refused == []
            for node in ("n1", "n2"):
                assert mesh.node(node).run("ls", "-A", "/var/run/ambient-mesh").split() == []
            # What stays when rights go before the agents, which is a matter of chance.
            for name, pod in pods.items():
                mesh.api.patch(f"{path_of('Pod', name, NAMESPACE)}/status", {"metadata": {"annotations": said[name]}})
                assert annotations(mesh, pod) == said[name]
            install(mesh, directory)
            wait_until(lambda: all(annotations(mesh, pod) not in ({}, said[name]) for name, pod in pods.items()), "captured again")
            load.go_on()
            assert load.refused == []
    finally:
        install(mesh, directory)
    assert all(redirected(mesh, pod) for pod in pods.values())


def annotations(cluster: Cluster, pod: Object) -> dict[str, str]:
    """What is said of its capture."""
    found = cluster.api.find("Pod", pod["metadata"]["name"], NAMESPACE)
    assert found is not None
    return {key: value for key, value in found["metadata"].get("annotations", {}).items() if key in (REDIRECTION, CAPTURED_BY)}


def test_an_agent_killed_while_it_takes_over_leaves_the_old_one_in_charge(mesh: Cluster, pods: dict[str, Object]) -> None:
    """The new pod's agent is killed as soon as it has the sockets, again and again; the roll-out succeeds when that ends."""
    with loading(mesh, pods["client"], addresses(pods["server"])[0]) as load:
        load.go_on()
        old = agent_of(mesh, "n2")["metadata"]["name"]
        stamp = {"kubectl.kubernetes.io/restartedAt": str(time.time())}
        mesh.api.patch(path_of("DaemonSet", "ztunnel", SYSTEM), {"spec": {"template": {"metadata": {"annotations": stamp}}}})
        new = wait_until(lambda: younger(mesh, "n2", old), "the new agent's pod is there", 120)
        killed = [kill_container(mesh, new)]
        load.go_on()
        wait_rolled_out(mesh, 300)
        load.go_on()
        # What a mover had accepted when it died is lost with it.
        assert [each for each in load.refused if not any(each["refused"] <= at <= each["refused"] + each["took"] for at in killed)] == []


def younger(cluster: Cluster, node: str, old: str) -> Object | None:
    """The pod beside the old one, once its agent runs."""
    found = cluster.api.list("Pod", SYSTEM, labelSelector="app=ztunnel", fieldSelector=f"spec.nodeName={node}")
    pods = [pod for pod in found if pod["metadata"]["name"] != old]
    return next((pod for pod in pods if brains(cluster, pod)), None)


def brains(cluster: Cluster, pod: Object) -> list[int]:
    found: list[int] = []
    for pid in cluster.node_of(pod).pod_processes(pod["metadata"]["uid"]):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if b"\0brain\0" in command:
            found.append(pid)
    return found


def kill_container(cluster: Cluster, pod: Object) -> float:
    for pid in brains(cluster, pod):
        parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(parent, signal.SIGKILL)  # process 1 of its container: the kernel kills the rest
    return time.time()

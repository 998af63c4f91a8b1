"""Nothing living is lost: what fifty held connections and twenty new ones a second see of each event, beside what Istio's did."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator

import pytest

from tests.cluster.figures import Figures
from tests.cluster.harness.api import Object, path_of
from tests.cluster.harness.client import Cluster, wait_until
from tests.cluster.harness.keeper import all_ready
from tests.cluster.mesh import SYSTEM, access_log, label, processes, rolled_out, wait_captured, wait_released, wait_rolled_out
from tests.cluster.workloads import Load, addresses, apply_pods, echo_pod, loading, tunnelled

NAMESPACE = "events"
HELD = 50
DRAIN = 29.0
"""A second less than terminationGracePeriodSeconds of the manifests."""


@pytest.fixture(scope="module")
def pods(mesh: Cluster) -> Iterator[dict[str, Object]]:
    with mesh.namespace(NAMESPACE) as namespace:
        made = apply_pods(mesh, namespace, echo_pod("client", "n1"), echo_pod("server", "n2"))
        label(mesh, namespace)
        wait_captured(mesh, namespace, 2)
        yield made


@pytest.fixture
def load(mesh: Cluster, pods: dict[str, Object]) -> Iterator[Load]:
    """Under way, and all of it through the mesh."""
    wait_rolled_out(mesh)
    wait_until(lambda: tunnelled(mesh, pods["client"], pods["server"]), "traffic is tunnelled")
    with loading(mesh, pods["client"], addresses(pods["server"])[0], held=HELD) as load:
        load.go_on()
        yield load


def restart_agents(cluster: Cluster) -> None:
    stamp = {"kubectl.kubernetes.io/restartedAt": str(time.time())}
    cluster.api.patch(path_of("DaemonSet", "ztunnel", SYSTEM), {"spec": {"template": {"metadata": {"annotations": stamp}}}})
    wait_until(lambda: not rolled_out(cluster, "DaemonSet", "ztunnel"), "the roll-out begins")
    wait_rolled_out(cluster, 240)


def test_rollout_of_the_daemon_set_refuses_no_connection_and_ends_none_before_the_deadline(
    mesh: Cluster, load: Load, figures: Figures
) -> None:
    began = time.time()
    restart_agents(mesh)
    load.go_on()
    figures.event("rollout restart ds/ztunnel", load, "50 of 50, at the end of the 30 s drain", "0 of 1197")
    assert load.refused == []
    assert all(lost["lost"] - began > DRAIN - 1 for lost in load.lost), load.lost[:3]


def test_sigkill_of_the_brains_costs_nothing(mesh: Cluster, load: Load, figures: Figures) -> None:
    for node in ("n1", "n2"):
        (brain,) = processes(mesh, node, "brain")
        os.kill(brain, signal.SIGKILL)
        wait_until(lambda node=node, brain=brain: processes(mesh, node, "brain") not in ([], [brain]), "another brain is there")
    load.go_on()
    figures.event("SIGKILL of the brains", load)
    assert (load.lost, load.refused) == ([], [])


def test_sigkill_of_a_whole_agent_is_over_soon(mesh: Cluster, load: Load, figures: Figures) -> None:
    killed = time.time()
    for pid in processes(mesh, "n2"):
        with contextlib.suppress(ProcessLookupError):  # with process 1 of a container the kernel ends the others
            os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not rolled_out(mesh, "DaemonSet", "ztunnel"), "the kill is felt")
    load.go_on()
    wait_rolled_out(mesh)
    load.go_on()
    figures.event("SIGKILL of an agent", load, "50 of 50 at once", "16, for 0.8 s")
    # What a mover had accepted when it died is lost with it, as what it holds.
    assert [each for each in load.refused if each["refused"] > killed + 0.5] == []


def test_sigkill_of_an_agent_and_of_the_mover_beside_it_is_over_when_they_are_back(mesh: Cluster, load: Load, figures: Figures) -> None:
    """Nobody is left who holds the sockets, so connections are refused until kubelet and agent have done their parts. Not on the node of
    the test before: a container that has just ended once the kubelet starts again after ten seconds only."""
    killed = time.time()
    for pid in processes(mesh, "n1", spare=True):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not rolled_out(mesh, "DaemonSet", "ztunnel"), "the kill is felt")
    wait_rolled_out(mesh)
    back = time.time()
    load.go_on()
    figures.event("SIGKILL of an agent and the mover beside it", load)
    assert [each for each in load.refused if not killed - 0.5 < each["refused"] < back] == []


def test_taking_the_label_away_and_giving_it_again_costs_nothing(mesh: Cluster, load: Load, figures: Figures) -> None:
    label(mesh, NAMESPACE, None)
    wait_released(mesh, NAMESPACE)
    load.go_on(120)  # six seconds' worth
    label(mesh, NAMESPACE)
    wait_captured(mesh, NAMESPACE, 2)
    load.go_on()
    figures.event("label taken away, given again 6 s later", load, "50 of 50 at once", "1")
    assert (load.lost, load.refused) == ([], [])


def test_a_policy_that_denies_by_selector_ends_what_lives_within_a_second(mesh: Cluster, load: Load, figures: Figures) -> None:
    path = f"/apis/security.istio.io/v1/namespaces/{NAMESPACE}/authorizationpolicies"
    selector = {"matchLabels": {"app": "server"}}
    spec = {"selector": selector, "action": "DENY", "rules": [{"from": [{"source": {"namespaces": [NAMESPACE]}}]}]}
    made = {"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": {"name": "nobody"}, "spec": spec}
    began = time.time()
    mesh.api.create(path, made)
    try:
        wait_until(lambda: load.alive == 0 and load.refused, "all that lived has ended, and nobody new is let in")
        figures.event("DENY by selector (all should be lost)", load, "0 of 50: they go on against the policy", "refused within 0.1 s")
        figures.note("DENY applied to the last of 50 held connections ended", f"{max(each['lost'] for each in load.lost) - began:.2f} s")
        figures.note("DENY applied to the first new connection refused", f"{min(each['refused'] for each in load.refused) - began:.2f} s")
        said = [line for line in access_log(mesh, "n2") if "nobody" in line and "policy" in line]
        assert len(said) >= HELD, "the reason is in the log"
    finally:
        mesh.api.delete(f"{path}/nobody")
    load.go_on()


def test_istiod_scaled_to_zero_costs_nothing(mesh: Cluster, load: Load, figures: Figures) -> None:
    scale = path_of("Deployment", "istiod", SYSTEM)
    mesh.api.patch(scale, {"spec": {"replicas": 0}})
    wait_until(lambda: not mesh.api.list("Pod", SYSTEM, labelSelector="app=istiod"), "istiod is gone")
    load.go_on(100)
    mesh.api.patch(scale, {"spec": {"replicas": 1}})
    wait_rolled_out(mesh)
    load.go_on()
    figures.event("istiod scaled to zero", load, "0", "0")
    assert (load.lost, load.refused) == ([], [])


def test_restart_of_the_api_server_and_etcd_costs_nothing(mesh: Cluster, load: Load, figures: Figures) -> None:
    for name in ("kube-apiserver", "etcd"):
        mesh.stop(name)
    load.go_on(100)
    for name in ("etcd", "kube-apiserver"):
        mesh.start(name)
    wait_until(lambda: all_ready(mesh.api, len(mesh.nodes)), "the cluster is ready again")
    wait_rolled_out(mesh)
    load.go_on()
    figures.event("API server and etcd restarted", load)
    assert (load.lost, load.refused) == ([], [])


def test_an_api_server_that_stands_still_costs_nothing(mesh: Cluster, load: Load, figures: Figures) -> None:
    """Longer than a leader may go without renewing its lease. Connections to it stay open, and nothing comes."""
    mesh.signal("kube-apiserver", signal.SIGSTOP)
    try:
        load.go_on(300)
    finally:
        mesh.signal("kube-apiserver", signal.SIGCONT)
    wait_until(lambda: all_ready(mesh.api, len(mesh.nodes)), "the cluster is ready again")
    wait_rolled_out(mesh)
    load.go_on()
    figures.event("API server stands still for 15 s", load)
    assert (load.lost, load.refused) == ([], [])

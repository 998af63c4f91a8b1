"""``meshctl install``, ``status``, ``version`` and ``uninstall``: what is written, what is said, what is left alone."""

from __future__ import annotations

import json
from typing import Any

import pytest
from ruamel.yaml import YAML

from mesh.runtime.inspection import ControlPlanePage, PendingTask, PodPage
from meshctl_py.cluster.inventory import NAME
from tests.unit.meshctl_py.conftest import Cluster, status_page

PART_OF = {"app.kubernetes.io/part-of": "ambient-mesh"}
STRANGER = {"kind": "Deployment", "metadata": {"name": "istiod", "namespace": "istio-system", "labels": {"app": "istiod"}}}


def installed(cluster: Cluster) -> set[tuple[str, str]]:
    return {(plural, name) for plural, _, name in cluster.server.objects if plural != "configmaps"}


def installation(cluster: Cluster) -> dict[str, Any]:
    found = cluster.server.find("ConfigMap", "istio-system", NAME)
    assert found is not None
    noted: dict[str, Any] = json.loads(found["data"]["installation.json"])
    return noted


def test_everything_is_applied_once_and_changes_nothing_the_second_time(cluster: Cluster) -> None:
    first = cluster.run("install", "--no-wait", "--image", "reg/mesh:1")
    assert first.exit_code == 0, first.output
    assert "namespace/istio-system created\n" in first.output
    assert "daemonset.apps/ztunnel created\n" in first.output
    assert installed(cluster) >= {("deployments", "istiod"), ("daemonsets", "ztunnel"), ("clusterroles", "ambient-mesh-istiod")}
    order = [seen.path for seen in cluster.server.requests if seen.method == "PATCH"]
    assert order[0] == "/api/v1/namespaces/istio-system"
    assert order[-2].endswith("/daemonsets/ztunnel")  # the last is the note of what was installed
    assert all(seen.query["fieldManager"] == "meshctl" for seen in cluster.server.requests if seen.method == "PATCH")
    agent = cluster.server.find("DaemonSet", "istio-system", "ztunnel")
    assert agent is not None
    assert agent["spec"]["template"]["spec"]["containers"][0]["image"] == "reg/mesh:1"
    second = cluster.run("install", "--no-wait", "--image", "reg/mesh:1")
    assert "created" not in second.output
    assert "configured" not in second.output


def test_values_of_the_last_installation_are_kept_unless_others_are_given(cluster: Cluster) -> None:
    cluster.run("install", "--no-wait", "--image", "reg/mesh:1", "--set", "istiod.replicas=2")
    result = cluster.run("install", "--no-wait", "--set", "logAsJson=true,image.tag=2")
    assert "keeping the values of the last installation" in result.output
    deployment = cluster.server.find("Deployment", "istio-system", "istiod")
    assert deployment is not None
    assert deployment["spec"]["replicas"] == 2
    assert deployment["spec"]["template"]["spec"]["containers"][0]["image"] == "reg/mesh:2"
    cluster.run("install", "--no-wait", "--reset-values", "--set", "istiod.replicas=3")
    assert installation(cluster)["values"] == {"istiod": {"replicas": "3"}}


def test_what_an_older_version_had_and_this_one_has_not_is_removed(cluster: Cluster) -> None:
    cluster.run("install", "--no-wait")
    noted = installation(cluster)
    cluster.server.put({"kind": "ClusterRole", "metadata": {"name": "ambient-mesh-former", "labels": PART_OF}})
    former = {"api_version": "rbac.authorization.k8s.io/v1", "plural": "clusterroles", "kind": "ClusterRole", "name": "ambient-mesh-former"}
    noted["entries"].append({**former, "namespaced": False})
    metadata = {"name": NAME, "namespace": "istio-system"}
    cluster.server.put({"kind": "ConfigMap", "metadata": metadata, "data": {"installation.json": json.dumps(noted)}})
    assert "clusterrole.rbac.authorization.k8s.io/ambient-mesh-former removed" in cluster.run("install", "--no-wait").output
    assert cluster.server.find("ClusterRole", "", "ambient-mesh-former") is None


def test_another_mesh_is_not_overwritten(cluster: Cluster) -> None:
    cluster.server.put(STRANGER)
    before = set(cluster.server.objects)
    result = cluster.run("install", "--no-wait")
    assert (result.exit_code, "that is not ours" in result.output) == (1, True)
    assert set(cluster.server.objects) == before


def test_a_cluster_that_is_too_old_is_refused(cluster: Cluster) -> None:
    cluster.server.version = {"major": "1", "minor": "27+", "gitVersion": "v1.27.9"}
    assert "the cluster is Kubernetes v1.27.9; the mesh needs 1.28 or newer" in cluster.run("install").output


def test_dry_runs_change_nothing(cluster: Cluster) -> None:
    printed = cluster.run("install", "--dry-run", "--set", "istiod.replicas=3").output
    kinds = {obj["kind"]: obj for obj in YAML(typ="safe").load_all(printed)}
    assert kinds["Deployment"]["spec"]["replicas"] == 3
    asked = cluster.run("install", "--dry-run", "server")
    assert "would be created" in asked.output
    assert all(seen.query.get("dryRun") == "All" for seen in cluster.server.requests if seen.method == "PATCH")


def test_when_time_is_up_it_is_said_what_is_not_ready_and_why(cluster: Cluster) -> None:
    cluster.run("install", "--no-wait")
    cluster.add_mesh("n1", "n2")
    cluster.add_pod("ztunnel-n2", "ztunnel", "n2", {}, ready=False)
    cluster.serve("ztunnel-n2", 15000, {"status": status_page("n2", ready=False, pending=[PendingTask("state manager", "no route")])})
    agents = cluster.server.find("DaemonSet", "istio-system", "ztunnel")
    assert agents is not None
    cluster.server.put(
        {**agents, "status": {**agents["status"], "numberAvailable": 1, "observedGeneration": agents["metadata"]["generation"]}}
    )
    result = cluster.run("install", "--timeout", "1")
    assert result.exit_code == 1
    assert "not ready after 1 s" in result.output
    assert "ztunnel-n2 on n2" in result.output
    assert "waits for state manager: no route" in result.output


def test_the_status_of_a_mesh_that_is_well(cluster: Cluster) -> None:
    cluster.add_mesh("n1", "n2")
    result = cluster.run("status")
    assert (result.exit_code, "all is well" in result.output) == (0, True), result.output
    told = json.loads(cluster.run("status", "-o", "json").output)
    assert [(agent["node"], agent["configuration"], agent["captured"]) for agent in told["agents"]] == [
        ("n1", "in sync", 2),
        ("n2", "in sync", 2),
    ]
    assert told["wrong"] == []


def test_the_status_names_everything_that_is_wrong(cluster: Cluster) -> None:
    cluster.add_mesh("n1", "n2")
    cluster.server.put({"kind": "Node", "metadata": {"name": "n3"}})
    pod = PodPage("u", "shop", "web", "spiffe://x", "pending", "no network namespace")
    cluster.serve("ztunnel-n1", 15000, {"status": status_page("n1", troubled=[pod], pods={"pending": 1}, next_expiry=1.0)})
    cluster.serve("ztunnel-n2", 15000, {"status": status_page("n2", version="0.0.9", connected=False, configuration="failed: no route")})
    mistake = "HTTPRoute shop/web: spec.rules[0].backendRefs[0]: there is no Service 'gone' in namespace 'shop'"
    control_plane = ControlPlanePage("0.1.0", True, problems=3, mistakes=[mistake], authority_expires=1.0)
    cluster.serve("istiod-1", 15014, {"status": control_plane})
    result = cluster.run("status")
    assert result.exit_code == 1
    for text in (
        "pod shop/web on n1 is pending: no network namespace",
        "agent of n1: a certificate ends within the hour",
        "agent of n2: configuration: failed: no route",
        "the certificate authority's root ends in 0 days",
        f"configuration: {mistake}",
        "2 more mistakes in the configuration: the objects' status and the log of istiod tell of all",
        "several versions run: 0.0.9, 0.1.0",
        "no agent runs on n3",
    ):
        assert text in result.output, result.output


def test_a_cluster_without_the_mesh_says_so(cluster: Cluster) -> None:
    result = cluster.run("status")
    assert (result.exit_code, "the mesh is not installed in this cluster: 'meshctl install'" in result.output) == (1, True)
    assert "the mesh is not installed" in cluster.run("version").output
    assert cluster.run("uninstall", "-y").output == "the mesh is not installed in this cluster\n"


def test_versions_of_all_are_told(cluster: Cluster) -> None:
    cluster.add_mesh("n1", "n2")
    assert cluster.run("version").output.splitlines()[1:] == ["control plane version: 0.1.0", "data plane version: 0.1.0 (2 agents)"]
    assert cluster.run("version", "--client").output.count("\n") == 1


@pytest.fixture
def leaving(cluster: Cluster) -> Cluster:
    """An installed mesh without agents' pods, with what a control plane makes at run time, and things of the user's."""
    cluster.run("install", "--no-wait")
    put = cluster.server.put
    put({"kind": "Namespace", "metadata": {"name": "shop", "labels": {"istio.io/dataplane-mode": "ambient"}}})
    for namespace in ("shop", "istio-system"):
        owner = [{"manager": "istiod-py", "operation": "Apply"}]
        put({"kind": "ConfigMap", "metadata": {"name": "istio-ca-root-cert", "namespace": namespace, "managedFields": owner}})
    put({"kind": "ConfigMap", "metadata": {"name": "istio-ca-root-cert", "namespace": "istios", "managedFields": [{"manager": "pilot"}]}})
    put({"kind": "Secret", "metadata": {"name": "istio-ca-secret", "namespace": "istio-system"}})
    put({"kind": "Lease", "metadata": {"name": "istiod-py-leader", "namespace": "istio-system"}})
    put({"kind": "ServiceAccount", "metadata": {"name": "default", "namespace": "istio-system"}})
    return cluster


def test_uninstalling_leaves_only_what_is_the_users(leaving: Cluster) -> None:
    result = leaving.run("uninstall", "-y")
    assert result.exit_code == 0, result.output
    definitions = "customresourcedefinitions"  # which stay unless they are purged: policies hang on them
    left = {key for key in leaving.server.objects if key[2] != "default" and key[0] != definitions}
    assert left == {("namespaces", "", "shop"), ("configmaps", "istios", "istio-ca-root-cert")}
    assert leaving.labels("Namespace", "", "shop") == {"istio.io/dataplane-mode": "ambient"}
    assert "configmap/istio-ca-root-cert deleted in 2 namespaces" in result.output


def test_agents_go_first_and_the_control_plane_after_them(leaving: Cluster) -> None:
    leaving.run("uninstall", "-y")
    deleted = [seen for seen in leaving.server.requests if seen.method == "DELETE"]
    assert deleted[0].path.endswith("/daemonsets/ztunnel")
    assert deleted[0].query == {"propagationPolicy": "Foreground"}
    assert [seen.path.rpartition("/")[2] for seen in deleted].index("istiod") > 0


def test_a_namespace_with_something_of_the_users_in_it_stays(leaving: Cluster) -> None:
    leaving.server.put({"kind": "Secret", "metadata": {"name": "cacerts", "namespace": "istio-system"}})
    result = leaving.run("uninstall", "-y")
    assert result.exit_code == 1
    assert "namespace istio-system stays, since there is more in it than ours: Secret cacerts" in result.output
    assert leaving.server.find("Secret", "istio-system", "cacerts") is not None
    assert not leaving.labels("Namespace", "", "istio-system")
    assert leaving.run("uninstall", "-y").output == "the mesh is not installed in this cluster\n"


def test_a_namespace_that_was_there_before_stays(cluster: Cluster) -> None:
    cluster.server.put({"kind": "Namespace", "metadata": {"name": "istio-system"}})
    cluster.run("install", "--no-wait")
    assert cluster.run("uninstall", "-y").exit_code == 0
    assert cluster.server.find("Namespace", "", "istio-system") is not None
    assert not cluster.labels("Namespace", "", "istio-system")


def test_what_is_left_when_the_manifests_were_deleted_goes_too(leaving: Cluster) -> None:
    for kind, namespace, name in (("Deployment", "istio-system", "istiod"), ("DaemonSet", "istio-system", "ztunnel")):
        leaving.server.remove(kind, namespace, name)
    for key in [key for key in leaving.server.objects if key[1] == "istio-system" or key[0].startswith(("clusterrole", "customres"))]:
        del leaving.server.objects[key]
    leaving.server.remove("Namespace", "", "istio-system")
    assert "give -y" in leaving.run("uninstall").output
    result = leaving.run("uninstall", "-y")
    assert result.exit_code == 0, result.output
    assert "configmap/istio-ca-root-cert deleted in 1 namespaces" in result.output
    assert set(leaving.server.objects) == {("namespaces", "", "shop"), ("configmaps", "istios", "istio-ca-root-cert")}
    assert leaving.run("uninstall", "-y").output == "the mesh is not installed in this cluster\n"


def test_nobody_is_uninstalled_by_mistake(leaving: Cluster) -> None:
    before = set(leaving.server.objects)
    result = leaving.run("uninstall")
    assert (result.exit_code, "give -y" in result.output) == (1, True)
    assert "Labels of namespaces stay as they are (shop)." in result.output
    assert set(leaving.server.objects) == before


def test_another_mesh_is_not_uninstalled(cluster: Cluster) -> None:
    cluster.server.put(STRANGER)
    assert cluster.run("uninstall", "-y").output == "the mesh is not installed in this cluster\n"
    assert cluster.server.find("Deployment", "istio-system", "istiod") is not None

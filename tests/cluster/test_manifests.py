"""The manifests of deploy/: kustomize and Helm make the same of them, and they give the rights that are used and no others."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.harness.api import path_of
from tests.cluster.harness.build import build_helm
from tests.cluster.harness.client import Cluster, wait_until
from tests.cluster.harness.images import PROJECT
from tests.cluster.mesh import (
    REPOSITORY,
    SYSTEM,
    WORKERS,
    Key,
    kustomized,
    label,
    objects,
    remove,
    wait_captured,
    wait_rolled_out,
)
from tests.cluster.workloads import addresses, apply_pods, attempt, echo_pod

CHART = REPOSITORY / "deploy/chart"


@pytest.fixture(scope="module")
def helm() -> Path:
    return build_helm()


def rendered(helm: Path, *options: str, namespace: str = SYSTEM) -> dict[Key, dict[str, Any]]:
    command = [str(helm), "template", "mesh", str(CHART), "--namespace", namespace, "--include-crds", "--kube-version=1.34", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return objects(done.stdout)


def test_the_chart_makes_what_kustomize_makes_but_for_the_namespace_that_helm_makes_itself(helm: Path) -> None:
    wanted = kustomized()
    del wanted["Namespace", "", SYSTEM]
    found = rendered(helm)
    assert found.keys() == wanted.keys()
    for key, item in found.items():
        assert item == wanted[key], key


def test_values_of_the_chart_reach_what_they_are_for(helm: Path) -> None:
    values = (
        *("--set", "image.repository=registry.example/mesh", "--set-string", "image.tag=9", "--set", "image.pullPolicy=Always"),
        *("--set", "imagePullSecrets[0].name=pull", "--set", "logLevel=debug", "--set", "logAsJson=true"),
        *("--set", "trustDomain=example.org", "--set", "clusterID=west", "--set", "istiod.replicas=3"),
        *("--set", "ztunnel.maxSurge=10%", "--set", "ztunnel.terminationGracePeriodSeconds=120", "--set-string", "ztunnel.env.MOVERS=8"),
        *("--set", "ztunnel.seLinuxOptions.type=spc_t", "--set", "ztunnel.nodeSelector.pool=a", "--set", "ztunnel.podLabels.team=net"),
        *("--set", "istiod.resources.requests.memory=1Gi", "--set", "istiod.podAnnotations.a=b"),
        *("--set", "ztunnel.cniBinDir=/k3s/cni", "--set", "ztunnel.cniConfDir=/k3s/net.d"),
    )
    found = rendered(helm, *values)
    istiod, ztunnel = (found[kind, SYSTEM, name]["spec"] for kind, name in (("Deployment", "istiod"), ("DaemonSet", "ztunnel")))
    for workload in (istiod, ztunnel):
        pod = workload["template"]["spec"]
        assert pod["imagePullSecrets"] == [{"name": "pull"}]
        for container in pod["containers"]:
            assert container["image"] == "registry.example/mesh:9"
            assert container["imagePullPolicy"] == "Always"
        assert {"RUST_LOG": "debug", "LOG_FORMAT": "json"}.items() <= environment(workload).items()
    assert istiod["replicas"] == 3
    assert istiod["template"]["spec"]["containers"][0]["resources"] == {"requests": {"memory": "1Gi"}}
    assert istiod["template"]["metadata"]["annotations"]["a"] == "b"
    assert {"--trust-domain=example.org", "--cluster-id=west"} <= set(istiod["template"]["spec"]["containers"][0]["args"])
    wanted = {"TRUST_DOMAIN": "example.org", "CLUSTER_ID": "west", "MOVERS": "8", "TERMINATION_GRACE_PERIOD_SECONDS": "120"}
    wanted["CNI_NET_DIR_ON_NODE"] = "/k3s/net.d"
    assert wanted.items() <= environment(ztunnel).items()
    assert ztunnel["updateStrategy"]["rollingUpdate"]["maxSurge"] == "10%"
    assert ztunnel["template"]["metadata"]["labels"] == {"app": "ztunnel", "istio.io/dataplane-mode": "none", "team": "net"}
    pod = ztunnel["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] == 120
    assert pod["nodeSelector"] == {"kubernetes.io/os": "linux", "pool": "a"}
    paths = {volume["name"]: volume["hostPath"]["path"] for volume in pod["volumes"] if "hostPath" in volume}
    assert (paths["cni-bin"], paths["cni-net"]) == ("/k3s/cni", "/k3s/net.d")
    agent, mover = pod["containers"]
    assert agent["securityContext"]["seLinuxOptions"] == mover["securityContext"]["seLinuxOptions"] == {"type": "spc_t"}
    assert mover["env"] == agent["env"], "they meet in one directory"


def environment(workload: dict[str, Any]) -> dict[str, str]:
    entries = workload["template"]["spec"]["containers"][0]["env"]
    assert len({entry["name"] for entry in entries}) == len(entries)
    return {entry["name"]: entry.get("value", "") for entry in entries}


def test_the_chart_in_another_namespace_names_no_object_of_the_usual_one(helm: Path) -> None:
    found = rendered(helm, namespace="elsewhere")
    assert {namespace for _, namespace, _ in found} == {"", "elsewhere"}
    assert SYSTEM not in json.dumps(list(found.values()))


@pytest.mark.parametrize(
    ("option", "complaint"),
    [
        ("ztunnel.maxSurges=2", "maxSurges"),
        ("image.pullPolicy=Often", "pullPolicy"),
        ("istiod.replicas=-1", "replicas"),
        ("lgoLevel=x", "lgoLevel"),
    ],
)
def test_a_value_that_the_chart_does_not_know_is_refused_by_name(helm: Path, option: str, complaint: str) -> None:
    command = [str(helm), "template", "mesh", str(CHART), "--set", option]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert complaint in done.stderr


def test_the_chart_installs_a_mesh_that_captures_and_is_uninstalled_without_a_trace(cluster: Cluster, helm: Path, tmp_path: Path) -> None:
    remove(cluster, tmp_path)
    wait_until(lambda: cluster.api.find("Namespace", SYSTEM) is None, "the last mesh is gone")
    repository, tag = PROJECT.rsplit(":", 1)
    values = ("--set", f"image.repository={repository}", "--set", f"image.tag={tag}", "--set", "image.pullPolicy=Never")
    run(cluster, helm, "install", "mesh", str(CHART), "--create-namespace", *values)
    try:
        wait_rolled_out(cluster)
        with cluster.namespace("chart") as namespace:
            label(cluster, namespace)
            pods = apply_pods(cluster, namespace, echo_pod("client", "n1"), echo_pod("server", "n2"))
            wait_captured(cluster, namespace, 2)
            assert attempt(cluster, pods["client"], addresses(pods["server"])[0]) == "hello"
    finally:
        run(cluster, helm, "uninstall", "mesh", "--wait")
    for kind, name in WORKERS:
        assert cluster.api.find(kind, name, SYSTEM) is None
    cluster.api.delete(path_of("Namespace", SYSTEM))


def run(cluster: Cluster, helm: Path, *arguments: str) -> None:
    command = [str(helm), f"--kubeconfig={cluster.kubeconfig}", "--namespace", SYSTEM, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=180)
    assert done.returncode == 0, done.stderr

"""Pods of a node from a directory: who they are, whether they are enrolled, what they wait for."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import aclosing
from ipaddress import ip_address
from pathlib import Path

import pytest
import trio

from mesh.kube.directory import DirectoryStore, edit_label, write_overlay
from ztunnel_py.pods.facts import PodFacts
from ztunnel_py.pods.source import read_node_pods, watch_node_pods

CLUSTER = """\
apiVersion: v1
kind: Namespace
metadata:
  name: shop
  labels: {istio.io/dataplane-mode: ambient}
---
apiVersion: v1
kind: Namespace
metadata: {name: plain}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop}
spec:
  serviceAccountName: web
  containers: [{name: c, image: i}]
---
apiVersion: v1
kind: Pod
metadata: {name: tool, namespace: plain}
spec:
  containers: [{name: c, image: i}]
"""


DUAL_STACK = ("10.0.0.5", "fd00::5")


def place(overlay: Path, namespace: str, name: str, *, node: str = "n1", ips: tuple[str, ...] = DUAL_STACK, **annotations: str) -> None:
    metadata: dict[str, object] = {"uid": f"uid-{name}", "annotations": annotations}
    status = {"phase": "Running", "podIPs": [{"ip": ip} for ip in ips]}
    write_overlay(overlay, "Pod", namespace, name, {"metadata": metadata, "spec": {"nodeName": node}, "status": status})


@pytest.fixture
def directories(tmp_path: Path) -> tuple[Path, Path]:
    source, overlay = tmp_path / "source", tmp_path / "overlay"
    source.mkdir()
    overlay.mkdir()
    (source / "cluster.yaml").write_text(CLUSTER)
    return source, overlay


def pods_of(directories: tuple[Path, Path], node: str = "n1") -> dict[str, PodFacts]:
    store = DirectoryStore(directories)
    store.load()
    return read_node_pods(store, node)


NETNS = {"ambient.mesh/netns": "/run/netns/web"}


def test_a_pod_is_what_its_object_and_the_overlays_say(directories: tuple[Path, Path]) -> None:
    place(directories[1], "shop", "web", **NETNS, **{"ambient.istio.io/redirection": "enabled"})
    pod = pods_of(directories)["uid-web"]
    assert pod.enrolment.because == "namespace label istio.io/dataplane-mode=ambient"
    assert pod == PodFacts(
        uid="uid-web",
        name="web",
        namespace="shop",
        service_account="web",
        enrolment=pod.enrolment,
        ips=(ip_address("10.0.0.5"), ip_address("fd00::5")),
        netns_path="/run/netns/web",
        redirection="enabled",
    )


def test_pods_of_other_nodes_and_of_none_are_not_ours(directories: tuple[Path, Path]) -> None:
    place(directories[1], "shop", "web", node="n2", **NETNS)
    assert pods_of(directories) == {}
    assert list(pods_of(directories, "n2")) == ["uid-web"]


def test_pods_outside_the_mesh_are_listed_too_so_that_they_can_be_released(directories: tuple[Path, Path]) -> None:
    place(directories[1], "plain", "tool", **NETNS)
    pod = pods_of(directories)["uid-tool"]
    assert not pod.enrolment
    assert "neither pod nor namespace" in pod.enrolment.because


def test_a_pod_without_an_address_waits(directories: tuple[Path, Path]) -> None:
    place(directories[1], "shop", "web", ips=(), **NETNS)
    assert pods_of(directories)["uid-web"].waiting_for == "the pod has no IP address yet"


def test_a_pod_without_a_namespace_waits(directories: tuple[Path, Path]) -> None:
    place(directories[1], "shop", "web")
    assert pods_of(directories)["uid-web"].waiting_for == "the pod's network namespace is not known yet (annotation ambient.mesh/netns)"


@pytest.mark.parametrize(("value", "bypass"), [("true", True), ("1", True), ("T", True), ("false", False), ("yes", False), ("", False)])
def test_the_bypass_annotation_is_read_as_istio_reads_it(directories: tuple[Path, Path], value: str, bypass: bool) -> None:
    place(directories[1], "shop", "web", **NETNS, **{"ambient.istio.io/bypass-inbound-capture": value})
    assert pods_of(directories)["uid-web"].bypass_inbound is bypass


@pytest.mark.parametrize(("value", "dns"), [("true", True), ("T", True), ("0", False), ("False", False), ("yes", None), ("", None)])
def test_the_dns_annotation_is_read_as_istio_reads_it(directories: tuple[Path, Path], value: str, dns: bool | None) -> None:
    place(directories[1], "shop", "web", **NETNS, **{"ambient.istio.io/dns-capture": value})
    assert pods_of(directories)["uid-web"].dns is dns


def test_a_pod_that_cannot_be_read_at_start_is_not_there(directories: tuple[Path, Path]) -> None:
    (directories[0] / "cluster.yaml").write_text(CLUSTER.replace("serviceAccountName: web", "serviceAccountName: [web]"))
    place(directories[1], "shop", "web", **NETNS)
    assert pods_of(directories) == {}


def test_a_label_on_the_namespace_changes_the_pods_and_other_changes_do_not(directories: tuple[Path, Path]) -> None:
    source, overlay = directories
    place(overlay, "shop", "web", **NETNS)
    seen: list[Mapping[str, PodFacts]] = []

    async def main() -> None:
        with trio.fail_after(30):
            async with aclosing(watch_node_pods(DirectoryStore(directories), "n1")) as changes:
                async for pods in changes:
                    seen.append(pods)
                    if len(seen) == 1:
                        (source / "extra.yaml").write_text("apiVersion: v1\nkind: Namespace\nmetadata: {name: extra}\n")
                        edit_label(source, "Namespace", "shop", "istio.io/dataplane-mode", None)
                    else:
                        return

    trio.run(main)
    assert [bool(pods["uid-web"].enrolment) for pods in seen] == [True, False]

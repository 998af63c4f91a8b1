"""Pods, services and nodes as the lab reads them."""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path
from typing import TypeAlias

import pytest

from mesh.kube.directory import DirectoryStore
from meshctl_py.lab.spec import (
    Cluster,
    EnvVar,
    ExecCheck,
    HttpCheck,
    PodKey,
    Probe,
    ServiceKey,
    ServicePortSpec,
    TcpCheck,
    read_cluster,
)

Read: TypeAlias = Callable[[str], Cluster]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    def from_yaml(text: str) -> Cluster:
        (tmp_path / "cluster.yaml").write_text(text)
        store = DirectoryStore([tmp_path])
        store.load()
        return read_cluster(store.objects())

    return from_yaml


POD = """
apiVersion: v1
kind: Pod
metadata: {name: web, labels: {app: web}}
spec:
  nodeName: n1
  serviceAccountName: seller
  containers:
    - name: main
      command: [python3]
      args: [server.py, "80"]
      workingDir: apps
      env:
        - {name: COLOUR, value: blue}
        - {name: ME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
      ports: [{name: http, containerPort: 8080}]
"""


def test_a_pod_is_read_with_its_containers(read: Read) -> None:
    cluster = read(POD)
    pod = cluster.pods[PodKey("default", "web")]
    assert (pod.node, pod.service_account, pod.hostname, pod.restart_policy) == ("n1", "seller", "web", "Always")
    (container,) = pod.containers
    assert container.argv == ("python3", "server.py", "80")
    assert container.directory == "apps"
    assert container.environment == (EnvVar("COLOUR", "blue"), EnvVar("ME", field_path="metadata.name"))
    assert pod.find_port("http") == 8080
    assert pod.find_port(99) == 99
    assert pod.find_port("grpc") is None
    assert cluster.problems == ()


def test_a_container_without_a_command_has_nothing_to_run_even_with_args(read: Read) -> None:
    cluster = read("apiVersion: v1\nkind: Pod\nmetadata: {name: web}\nspec: {containers: [{name: a, image: nginx, args: [x]}]}\n")
    assert cluster.pods[PodKey("default", "web")].containers[0].argv == ()


@pytest.mark.parametrize(
    ("text", "check"),
    [
        ("tcpSocket: {port: 80}", TcpCheck(80)),
        ("httpGet: {port: http, path: /healthz}", HttpCheck("http", "/healthz")),
        ("httpGet: {port: '8080'}", HttpCheck(8080)),
        ("exec: {command: [test, -f, x]}", ExecCheck(("test", "-f", "x"))),
    ],
)
def test_a_readiness_probe_is_read(read: Read, text: str, check: TcpCheck | HttpCheck | ExecCheck) -> None:
    cluster = read(POD + f"      readinessProbe: {{{text}, periodSeconds: 5}}\n")
    assert cluster.pods[PodKey("default", "web")].containers[0].readiness == Probe(check, period=5)


def test_a_probe_that_the_lab_does_not_know_is_a_problem_with_its_place(read: Read) -> None:
    cluster = read(POD + "      readinessProbe: {grpc: {port: 80}}\n")
    (problem,) = cluster.problems
    assert problem.field == "spec.containers[0].readinessProbe"
    assert problem.line == 17


@pytest.mark.parametrize("check", ["tcpSocket", "httpGet"])
def test_a_probe_of_a_port_that_the_container_does_not_name_is_told_with_the_names_it_has(read: Read, check: str) -> None:
    (problem,) = read(POD + f"      readinessProbe: {{{check}: {{port: htpp}}}}\n").problems
    assert problem.field == f"spec.containers[0].readinessProbe.{check}.port"
    assert problem.message == "no port of this container is named 'htpp'; did you mean 'http'?"


def test_labels_do_not_make_another_pod_but_a_command_does(read: Read) -> None:
    key = PodKey("default", "web")
    pod = read(POD).pods[key]
    assert read(POD.replace("app: web", "app: shop")).pods[key].runs_like(pod)
    assert not read(POD.replace("server.py", "other.py")).pods[key].runs_like(pod)


SERVICE = """
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  selector: {app: web}
  ports: [{name: http, port: 80, targetPort: http}, {port: 53, protocol: UDP}]
"""


def test_a_service_is_read_with_both_families(read: Read) -> None:
    service = read(SERVICE).services[ServiceKey("default", "web")]
    assert service.ports == (ServicePortSpec(80, "http", "http"), ServicePortSpec(53, 53, protocol="UDP"))
    assert service.families == (4, 6)
    assert service.selects("default", {"app": "web", "x": "y"})
    assert not service.selects("other", {"app": "web"})
    assert not service.selects("default", {"app": "shop"})


@pytest.mark.parametrize(
    ("text", "headless", "ips", "families"),
    [
        ("clusterIP: None", True, (), (4, 6)),
        ("clusterIP: 10.96.0.77", False, ("10.96.0.77",), (4, 6)),
        ("clusterIPs: ['fd00:10:96::77', 10.96.0.77]", False, ("fd00:10:96::77", "10.96.0.77"), (4, 6)),
        ("ipFamilyPolicy: SingleStack", False, (), (4,)),
        ("ipFamilies: [IPv6]", False, (), (6,)),
    ],
)
def test_a_services_own_wishes_for_addresses_count(
    read: Read, text: str, headless: bool, ips: tuple[str, ...], families: tuple[int, ...]
) -> None:
    service = read(SERVICE + f"  {text}\n").services[ServiceKey("default", "web")]
    assert (service.headless, service.cluster_ips, service.families) == (headless, tuple(map(ip_address, ips)), families)


def test_a_service_without_selector_selects_nobody(read: Read) -> None:
    service = read(SERVICE.replace("  selector: {app: web}\n", "")).services[ServiceKey("default", "web")]
    assert not service.selects("default", {})


def test_enrolment_follows_the_labels_of_namespace_and_pod(read: Read) -> None:
    labelled = "apiVersion: v1\nkind: Namespace\nmetadata: {name: default, labels: {istio.io/dataplane-mode: ambient}}\n---"
    cluster = read(labelled + POD)
    assert cluster.enrolment_of(cluster.pods[PodKey("default", "web")])
    outside = read(labelled + POD.replace("app: web", "istio.io/dataplane-mode: none"))
    assert not outside.enrolment_of(outside.pods[PodKey("default", "web")])

"""EndpointSlices: endpoints that are no pods, and pods that no selector found."""

from __future__ import annotations

import pytest

from istiod_py.translate import Config, Translation, translate
from mesh.model.address import NamespacedHostname, parse_ip
from mesh.model.workload import HealthStatus, Locality, NetworkMode, PortMapping, Workload
from mesh.testing.objects import objects_from_yaml

PORTS = "{name: pg, port: 5432, targetPort: 9}, {name: admin, port: 80}, {name: pg-udp, port: 5433, protocol: UDP}"
SERVICE = """
apiVersion: v1
kind: Service
metadata: {name: db, namespace: shop}
spec: {clusterIP: 10.96.0.1, ports: [PORTS]}
""".replace("PORTS", PORTS)
SLICE = """---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: db-1, namespace: shop, labels: {kubernetes.io/service-name: db}}
addressType: IPv4
ports: [{name: pg, port: 15432}, {name: pg-udp, port: 1, protocol: UDP}, {name: unknown, port: 2}]
endpoints:
- {addresses: [192.0.2.1], nodeName: n1}
"""
NODE = "---\napiVersion: v1\nkind: Node\nmetadata: {name: n1, labels: {topology.kubernetes.io/zone: z}}\n"
POD = """---
apiVersion: v1
kind: Pod
metadata: {name: p, namespace: shop, uid: u1}
spec: {containers: [{name: c, ports: [{name: pg, containerPort: 5555}]}]}
status: {podIP: 10.0.0.1}
"""
LISTED = "endpoints:\n- {addresses: [10.0.0.1], targetRef: {kind: Pod, name: p, namespace: shop, uid: u1}}\n"
DB = NamespacedHostname("shop", "db.shop.svc.cluster.local")


def translation_of(text: str) -> Translation:
    objects, problems = objects_from_yaml(text, ["shop", "other"])
    assert problems == ()
    return translate(objects, None, Config())


def workload_of(text: str) -> Workload:
    (workload,) = translation_of(text).workloads.values()
    return workload


def with_endpoints(endpoints: str) -> str:
    return SLICE[: SLICE.index("endpoints:")] + endpoints


def test_a_manual_endpoint() -> None:
    assert workload_of(SERVICE + SLICE + NODE) == Workload(
        uid="Kubernetes/discovery.k8s.io/EndpointSlice/shop/db-1/192.0.2.1",
        name="db-1",
        namespace="shop",
        addresses=(parse_ip("192.0.2.1"),),
        service_account="",
        node="n1",
        locality=Locality(zone="z"),
        network_mode=NetworkMode.HOST_NETWORK,
        services={DB: (PortMapping(5432, 15432),)},
    )


def test_no_policy_selects_it() -> None:
    policy = "---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: p, namespace: shop}\n"
    policy += "spec: {mtls: {mode: STRICT}}\n"
    assert workload_of(SERVICE + SLICE + policy).authorization_policies == ()


@pytest.mark.parametrize(("conditions", "healthy"), [
    ("", True), (", conditions: {}", True), (", conditions: {ready: true}", True), (", conditions: {ready: false}", False),
    (", conditions: {ready: false, serving: true, terminating: true}", False),
])  # fmt: skip
def test_an_endpoint_is_healthy_unless_it_says_it_is_not_ready(conditions: str, healthy: bool) -> None:
    text = with_endpoints(f"endpoints: [{{addresses: [192.0.2.1]{conditions}}}]\n")
    assert (workload_of(SERVICE + text).status is HealthStatus.HEALTHY) is healthy


def test_a_port_without_name_belongs_to_the_port_without_name() -> None:
    service = SERVICE.replace(PORTS, "{port: 80}")
    text = SLICE.replace("{name: pg, port: 15432}", "{port: 8080}")
    assert workload_of(service + text).services == {DB: (PortMapping(80, 8080),)}


@pytest.mark.parametrize("text", [
    SERVICE.replace("name: db", "name: x") + SLICE,
    SERVICE.replace("namespace: shop", "namespace: other") + SLICE,
    SERVICE.replace("clusterIP: 10.96.0.1", "type: ExternalName, externalName: a.b") + SLICE,
    SERVICE + SLICE.replace("kubernetes.io/service-name", "something-else"),
    SERVICE + SLICE.replace("addressType: IPv4", "addressType: FQDN").replace("192.0.2.1", "a.b"),
    SERVICE + with_endpoints(LISTED),
])  # fmt: skip
def test_slices_that_bring_no_workload(text: str) -> None:
    assert translation_of(text).workloads == {}


def test_both_families_are_two_slices_and_one_address_is_one_workload() -> None:
    six = with_endpoints("endpoints: [{addresses: ['2001:db8::1']}, {addresses: ['2001:db8::1']}]\n")
    workloads = translation_of(SERVICE + SLICE + six.replace("db-1", "db-2").replace("IPv4", "IPv6")).workloads
    assert [uid.rpartition("/")[2] for uid in workloads] == ["192.0.2.1", "2001:db8::1"]


KUBERNETES = """
apiVersion: v1
kind: Service
metadata: {name: kubernetes}
spec: {clusterIP: 10.96.0.1, ports: [{name: https, port: 443}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: kubernetes, labels: {kubernetes.io/service-name: kubernetes}}
addressType: IPv4
ports: [{name: https, port: 6443, protocol: TCP}]
endpoints: [{addresses: [172.18.0.2], conditions: {ready: true}}]
"""


def test_the_api_servers_own_service() -> None:
    workload = workload_of(KUBERNETES)
    assert workload.services == {NamespacedHostname("default", "kubernetes.default.svc.cluster.local"): (PortMapping(443, 6443),)}


# Pods that a slice lists


def test_a_listed_pod_serves_the_service_as_if_selected() -> None:
    workload = workload_of(SERVICE.replace("targetPort: 9", "targetPort: pg") + with_endpoints(LISTED) + POD)
    assert workload.uid == "Kubernetes//Pod/shop/p"
    assert workload.services == {DB: (PortMapping(5432, 5555), PortMapping(80, 80), PortMapping(5433, 5433))}


@pytest.mark.parametrize(("old", "new", "listed"), [
    ("uid: u1}}", "uid: u2}}", False),
    (", uid: u1}}", "}}", True),
    ("namespace: shop, uid: u1}}", "namespace: other, uid: u1}}", False),
    (", namespace: shop, uid: u1}}", ", uid: u1}}", True),
    ("name: p,", "name: q,", False),
    ("clusterIP: 10.96.0.1", "selector: {a: b}", False),
    ("clusterIP: 10.96.0.1", "type: ExternalName, externalName: a.b", False),
])  # fmt: skip
def test_which_pod_a_reference_means(old: str, new: str, listed: bool) -> None:
    text = SERVICE + with_endpoints(LISTED)
    assert old in text
    assert bool(workload_of(text.replace(old, new) + POD).services) is listed


def test_a_pod_that_was_replaced_under_its_name_is_not_listed_any_more() -> None:
    """A StatefulSet's: the slice follows a moment later."""
    before = translation_of(SERVICE + with_endpoints(LISTED) + POD)
    objects, _ = objects_from_yaml(SERVICE + with_endpoints(LISTED) + POD.replace("uid: u1", "uid: u2"))
    after = translate(objects, before, Config())
    assert [bool(workload.services) for workload in (*before.workloads.values(), *after.workloads.values())] == [True, False]

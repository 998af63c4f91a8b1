"""EndpointSlices as read."""

from __future__ import annotations

import pytest

from mesh.kube.endpointslice import KubeEndpointSlice, PodReference, SlicePort, read_endpoint_slice
from mesh.model.address import parse_ip
from mesh.testing.objects import objects_from_yaml

HEAD = (
    "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n"
    "metadata: {name: s, namespace: shop, labels: {kubernetes.io/service-name: web}}\n"
)


def read(text: str) -> KubeEndpointSlice:
    objects, problems = objects_from_yaml(f"{HEAD}{text}\n")
    assert problems == ()
    found, problems = read_endpoint_slice(objects[0])
    assert problems == ()
    return found


def test_pods_are_kept_by_name_and_others_by_address() -> None:
    found = read(
        "addressType: IPv4\n"
        "ports: [{name: http, port: 80}, {port: 53, protocol: UDP}, {name: all}]\n"
        "endpoints:\n"
        "- {addresses: [10.0.0.1], targetRef: {kind: Pod, name: a, uid: u}}\n"
        "- {addresses: [10.0.0.2], targetRef: {kind: Pod, namespace: other, name: b}}\n"
        "- {addresses: [10.0.0.3], nodeName: n1, conditions: {ready: false}}\n"
        "- {addresses: [10.0.0.4], targetRef: {kind: VirtualMachine, name: c}, conditions: {serving: true}}\n"
    )
    assert found.service == "web"
    assert found.pods == (PodReference("shop", "a", "u"), PodReference("other", "b", ""))
    assert [(e.addresses, e.ready, e.node) for e in found.endpoints] == [
        ((parse_ip("10.0.0.3"),), False, "n1"), ((parse_ip("10.0.0.4"),), True, ""),
    ]  # fmt: skip
    assert found.ports == (SlicePort("http", 80, "TCP"), SlicePort("", 53, "UDP"), SlicePort("all", 0, "TCP"))


def test_a_slice_of_hostnames_has_nothing_in_it() -> None:
    assert read("addressType: FQDN\nendpoints: [{addresses: [a.example.com]}]").endpoints == ()


@pytest.mark.parametrize(("text", "field"), [
    ("endpoints: []", ""),
    ("addressType: IPv5", "addressType"),
    ("addressType: IPv4\nendpoints: [{addresses: ['fd00::1']}]", "endpoints[0].addresses[0]"),
    ("addressType: IPv4\nendpoints: [{addresses: [a.b]}]", "endpoints[0].addresses[0]"),
    ("addressType: IPv4\nendpoints: [{addresses: []}]", "endpoints[0].addresses"),
    ("addressType: IPv4\nendpoints: [{}]", "endpoints[0]"),
    ("addressType: IPv4\nendpoints: [{addresses: [10.0.0.1], conditions: {ready: maybe}}]", "endpoints[0].conditions.ready"),
    ("addressType: IPv4\nports: [{port: 0}]", "ports[0].port"),
])  # fmt: skip
def test_a_mistake_names_its_field(text: str, field: str) -> None:
    objects, problems = objects_from_yaml(f"{HEAD}{text}\n")
    assert objects == []
    assert {p.field for p in problems} == {field}

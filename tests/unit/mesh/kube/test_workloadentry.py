"""WorkloadEntries as read."""

from __future__ import annotations

import pytest

from mesh.kube.workloadentry import KubeWorkloadEntry, read_workload_entry
from mesh.model.address import parse_ip
from mesh.testing.objects import objects_from_yaml

HEAD = (
    "apiVersion: networking.istio.io/v1beta1\nkind: WorkloadEntry\nmetadata: {name: vm, namespace: shop, labels: {a: object, c: object}}\n"
)


def read(spec: str) -> KubeWorkloadEntry:
    objects, problems = objects_from_yaml(f"{HEAD}spec: {spec}\n")
    assert problems == ()
    entry, problems = read_workload_entry(objects[0])
    assert problems == ()
    return entry


def test_the_labels_of_the_spec_go_before_those_of_the_object() -> None:
    assert read("{address: 10.1.1.1, labels: {a: spec, b: spec}}").labels == {"a": "spec", "b": "spec", "c": "object"}


@pytest.mark.parametrize(("address", "ip"), [
    ("10.1.1.1", "10.1.1.1"), ("'2001:db8::1'", "2001:db8::1"), ("'::ffff:10.1.1.1'", "10.1.1.1"), ("vm.example.com", None), ("''", None),
])  # fmt: skip
def test_the_address_may_be_a_hostname_or_unknown(address: str, ip: str | None) -> None:
    assert read(f"{{address: {address}, network: n}}").endpoint.ip == (parse_ip(ip) if ip else None)


@pytest.mark.parametrize(("spec", "field"), [
    ("{address: '*.example.com'}", "spec.address"),
    ("{address: 'unix:///var/run/x'}", "spec.address"),
    ("{address: 10.1.1.1, ports: {http: 70000}}", "spec.ports.http"),
    ("{address: 10.1.1.1, ports: [80]}", "spec.ports"),
    ("{address: 10.1.1.1, weight: lots}", "spec.weight"),
    ("{address: 10.1.1.1, serviceaccount: x}", "spec.serviceaccount"),
    ("[]", "spec"),
])  # fmt: skip
def test_a_mistake_names_its_field(spec: str, field: str) -> None:
    objects, problems = objects_from_yaml(f"{HEAD}spec: {spec}\n")
    assert objects == []
    assert {p.field for p in problems} == {field}

"""ServiceEntries: every mistake names its field, and what is right is read as it was meant."""

from __future__ import annotations

from ipaddress import ip_network

import pytest

from mesh.kube.objects import KubeObject, SourceProblem
from mesh.kube.serviceentry import EntryPort, KubeServiceEntry, read_service_entry
from mesh.model.address import parse_ip
from mesh.testing.objects import objects_from_yaml

HEAD = "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {name: out, namespace: shop, labels: {a: b}}\n"


def read(spec: str, status: str = "{}") -> KubeServiceEntry:
    objects, problems = objects_from_yaml(f"{HEAD}spec: {spec}\nstatus: {status}\n")
    assert problems == ()
    entry, problems = read_service_entry(one(objects))
    assert problems == ()
    return entry


def one(objects: list[KubeObject]) -> KubeObject:
    (obj,) = objects
    return obj


def test_everything_that_can_be_said() -> None:
    entry = read(
        "{hosts: [api.example.com, '*.example.com', api.example.com], addresses: [192.0.2.1, 198.51.100.77/24, '2001:db8::1'],"
        " ports: [{number: 443, name: https, protocol: https, targetPort: 8443}, {number: 80, name: http}],"
        " location: MESH_INTERNAL, resolution: STATIC, endpoints: [{address: 10.1.1.1, ports: {https: 9443}, labels: {v: w},"
        " network: n, locality: r/z/s, weight: 7, serviceAccount: sa}], exportTo: [.], subjectAltNames: ['spiffe://x/ns/y/sa/z']}"
    )
    assert (entry.hosts, entry.location, entry.resolution) == (("api.example.com", "*.example.com"), "MESH_INTERNAL", "STATIC")
    assert entry.addresses == tuple(map(ip_network, ("192.0.2.1/32", "198.51.100.0/24", "2001:db8::1/128")))
    assert entry.ports == (EntryPort("https", 443, 8443, "HTTPS"), EntryPort("http", 80, 0, ""))
    (endpoint,) = entry.endpoints
    assert (endpoint.address, endpoint.ip, endpoint.ports, endpoint.labels) == (
        "10.1.1.1",
        parse_ip("10.1.1.1"),
        {"https": 9443},
        {"v": "w"},
    )
    assert (endpoint.network, endpoint.locality, endpoint.weight, endpoint.service_account) == ("n", "r/z/s", 7, "sa")
    assert (entry.export_to, entry.subject_alt_names) == ((".",), ("spiffe://x/ns/y/sa/z",))


def test_little_need_be_said() -> None:
    entry = read("{hosts: [a.example.com]}")
    assert (entry.location, entry.resolution, entry.selector, entry.export_to) == ("MESH_EXTERNAL", "NONE", None, ())


def test_an_empty_selector_selects_nothing() -> None:
    assert not read("{hosts: [a.example.com], workloadSelector: {}}").selects({"a": "b"})
    assert read("{hosts: [a.example.com], workloadSelector: {labels: {a: b}}}").selects({"a": "b", "c": "d"})


def test_addresses_given_before_are_read_from_the_status_and_nothing_there_is_a_mistake() -> None:
    status = "{addresses: [{value: 240.240.3.4, host: a.example.com}, {value: what, host: a.example.com}, {value: '2001:2::5'}]}"
    assert read("{hosts: [a.example.com]}", status).allocated == (
        ("a.example.com", parse_ip("240.240.3.4")), ("", parse_ip("2001:2::5")),
    )  # fmt: skip


@pytest.mark.parametrize(("spec", "field", "message"), [
    ("{}", "spec", "'hosts' is required"),
    ("{hosts: []}", "spec.hosts", "at least one host"),
    ("{hosts: ['*']}", "spec.hosts[0]", "found '*'"),
    ("{hosts: [a.example.com, 'b c']}", "spec.hosts[1]", "found 'b c'"),
    ("{hosts: [a.*.com]}", "spec.hosts[0]", "expected a hostname"),
    (f"{{hosts: ['{'a.' * 130}com']}}", "spec.hosts[0]", "expected a hostname"),
    ("{hosts: [a.b], address: [10.0.0.1]}", "spec.address", "did you mean 'addresses'?"),
    ("{hosts: [a.b], addresses: [a.b]}", "spec.addresses[0]", "not an IP address or CIDR"),
    ("{hosts: [a.b], addresses: [10.0.0.0/33]}", "spec.addresses[0]", "not an IP address or CIDR"),
    ("{hosts: [a.b], resolution: STATICC}", "spec.resolution", "did you mean 'STATIC'?"),
    ("{hosts: [a.b], location: OUT}", "spec.location", "MESH_EXTERNAL"),
    ("{hosts: [a.b], ports: [{number: 80}]}", "spec.ports[0]", "'name' is required"),
    ("{hosts: [a.b], ports: [{name: x}]}", "spec.ports[0]", "'number' is required"),
    ("{hosts: [a.b], ports: [{name: x, number: 0}]}", "spec.ports[0].number", "from 1 to 65535"),
    ("{hosts: [a.b], ports: [{name: x, number: 80, targetPort: http}]}", "spec.ports[0].targetPort", "whole number"),
    ("{hosts: [a.b], ports: [{name: x, number: 80, protocol: SCTP}]}", "spec.ports[0].protocol", "found 'SCTP'"),
    ("{hosts: [a.b], ports: [{name: x, number: 80}, {name: y, number: 80}]}", "spec.ports[1].number", "given twice"),
    ("{hosts: [a.b], ports: [{name: x, number: 80}, {name: x, number: 81}]}", "spec.ports[1].name", "two ports have this name"),
    ("{hosts: [a.b], resolution: STATIC, endpoints: [{address: a.b}]}", "spec.endpoints[0].address", "must be an IP address"),
    ("{hosts: [a.b], resolution: STATIC, endpoints: [{address: 'unix:///x'}]}", "spec.endpoints[0].address", "Unix socket"),
    ("{hosts: [a.b], resolution: DNS, endpoints: [{address: 'a b'}]}", "spec.endpoints[0].address", "hostname"),
    ("{hosts: [a.b], resolution: STATIC, endpoints: [{address: 10.0.0.1}, {address: 10.0.0.1}]}", "spec.endpoints[1].address", "twice"),
    ("{hosts: [a.b], resolution: STATIC, endpoints: [{address: 10.0.0.1, ports: {http: x}}]}", "spec.endpoints[0].ports.http", "number"),
    ("{hosts: [a.b], resolution: STATIC, endpoints: [{address: 10.0.0.1, weight: -1}]}", "spec.endpoints[0].weight", "from 0"),
    ("{hosts: [a.b], resolution: STATIC, endpoints: [{adress: 10.0.0.1}]}", "spec.endpoints[0].adress", "did you mean 'address'?"),
    ("{hosts: [a.b], endpoints: [{address: 10.0.0.1}]}", "spec.endpoints", "resolution NONE"),
    ("{hosts: [a.b], resolution: STATIC, workloadSelector: {labels: {a: b}}, endpoints: [{address: 10.0.0.1}]}",
     "spec.workloadSelector", "not both"),
    ("{hosts: [a.b], workloadSelector: {matchLabels: {a: b}}}", "spec.workloadSelector.matchLabels", "unknown field"),
    ("{hosts: [a.b], resolution: DNS, addresses: [10.0.0.0/8]}", "spec.addresses", "NONE or STATIC"),
    ("{hosts: ['*.a.b'], resolution: DNS}", "spec.hosts[0]", "wildcard"),
    ("{hosts: [a.b], resolution: DNS_ROUND_ROBIN, endpoints: [{address: a.b}, {address: c.d}]}", "spec.endpoints", "only one endpoint"),
])  # fmt: skip
def test_a_mistake_names_its_line_and_field(spec: str, field: str, message: str) -> None:
    objects, problems = objects_from_yaml(f"{HEAD}spec: {spec}\n")
    assert objects == []
    assert [(p.line, p.field) for p in problems] == [(4, field)]
    assert message in problems[0].message


def test_several_mistakes_are_told_at_once() -> None:
    _, problems = objects_from_yaml(f"{HEAD}spec:\n  hosts: ['*']\n  addresses:\n  - x\n  resolution: MAYBE\n")
    assert [isinstance(p, SourceProblem) and p.line for p in problems] == [5, 7, 8]

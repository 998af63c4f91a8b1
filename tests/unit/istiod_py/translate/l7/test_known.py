"""What a port speaks, and what a hostname means."""

from __future__ import annotations

import pytest

from istiod_py.translate import Config
from istiod_py.translate.l7.known import L7Port, know, of_host, of_service, protocol_of
from mesh.kube.service import read_service
from mesh.kube.serviceentry import read_service_entry
from mesh.model.l7.waypoint import Protocol
from mesh.testing.objects import objects_from_yaml
from tests.unit.istiod_py.translate.l7.world import entry, service


@pytest.mark.parametrize(("number", "name", "app_protocol", "protocol"), [
    (80, "", "", Protocol.AUTO),
    (80, "web", "", Protocol.AUTO),
    (80, "http", "", Protocol.HTTP),
    (80, "HTTP-web", "", Protocol.HTTP),
    (80, "http2-web", "", Protocol.HTTP2),
    (80, "grpc-web", "", Protocol.GRPC),
    (80, "grpc-web-x", "", Protocol.GRPC),
    (80, "grpc", "", Protocol.GRPC),
    (80, "http", "tcp", Protocol.TCP),
    (80, "tcp", "http", Protocol.HTTP),
    (80, "", "kubernetes.io/h2c", Protocol.HTTP2),
    (80, "tcp", "kubernetes.io/ws", Protocol.HTTP),
    (80, "", "kubernetes.io/wss", Protocol.TCP),
    (80, "http", "example.com/own", Protocol.AUTO),
    (443, "https", "", Protocol.TCP),
    (443, "tls-x", "", Protocol.TCP),
    (6379, "redis", "", Protocol.TCP),
    (3306, "", "", Protocol.TCP),
    (3306, "http", "", Protocol.HTTP),
    (3306, "db", "", Protocol.TCP),
])  # fmt: skip
def test_a_ports_protocol_is_declared_or_its_numbers_or_found_out(number: int, name: str, app_protocol: str, protocol: Protocol) -> None:
    assert protocol_of(number, name, app_protocol) is protocol


def test_udp_is_not_a_waypoints_and_an_external_name_is_no_service() -> None:
    objects, _ = objects_from_yaml("""
apiVersion: v1
kind: Service
metadata: {name: a, namespace: shop}
spec: {ports: [{name: http, port: 80}, {name: dns, port: 53, protocol: UDP}, {port: 443, appProtocol: https}]}
---
apiVersion: v1
kind: Service
metadata: {name: b, namespace: shop}
spec: {type: ExternalName, externalName: x.y}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: out, namespace: shop}
spec:
  hosts: [Api.example.com]
  ports: [{number: 80, name: web, protocol: HTTP}, {number: 81, name: http-x}, {number: 82, name: u, protocol: UDP}]
  exportTo: [.]
""")
    a, b, out = objects[0], objects[1], objects[2]
    made = of_service(read_service(a)[0], Config())
    assert made is not None
    assert (made.key, made.ports) == (
        "shop/a.shop.svc.cluster.local", (L7Port(80, "http", Protocol.HTTP), L7Port(443, "", Protocol.TCP)),
    )  # fmt: skip
    assert of_service(read_service(b)[0], Config()) is None
    host = of_host(read_service_entry(out)[0], "Api.example.com")
    assert (host.hostname, host.private, host.ports) == (
        "api.example.com", True, (L7Port(80, "web", Protocol.HTTP), L7Port(81, "http-x", Protocol.HTTP)),
    )  # fmt: skip


def test_a_hostname_is_the_own_namespaces_then_the_services_then_that_which_stands_for_it() -> None:
    first, second = entry("a.b", namespace="one"), entry("a.b", namespace="two")
    hidden = entry("a.b", namespace="three", private=True)
    known = know([first, second, hidden], frozenset({"two/a.b"}))
    assert known.find("a.b", "one") is first
    assert known.find("a.b", "three") is hidden
    assert known.find("a.b", "four") is second
    assert known.find("x.y", "one") is None
    assert know([hidden]).find("a.b", "four") is None
    own = service("a")
    assert know([entry(own.hostname, namespace="one"), own]).find(own.hostname, "four") is own

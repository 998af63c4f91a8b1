"""Kubernetes Services as services of the mesh."""

from __future__ import annotations

import pytest

from istiod_py.translate import Config, translate
from mesh.model.address import NetworkAddress, parse_ip
from mesh.model.service import (
    AppProtocol,
    HealthPolicy,
    IpFamilies,
    LoadBalancing,
    LoadBalancingMode,
    LoadBalancingScope,
    Service,
    ServicePort,
)
from mesh.testing.objects import objects_from_yaml

NETWORK, REGION, ZONE, SUBZONE, NODE = (
    LoadBalancingScope.NETWORK,
    LoadBalancingScope.REGION,
    LoadBalancingScope.ZONE,
    LoadBalancingScope.SUBZONE,
    LoadBalancingScope.NODE,
)


def services_of(spec: str, metadata: str = "", namespace: str = "") -> list[Service]:
    text = f"apiVersion: v1\nkind: Service\nmetadata: {{name: web, namespace: shop{metadata}}}\nspec: {spec}\n"
    text += f"---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: shop{namespace}}}\n"
    objects, problems = objects_from_yaml(text)
    assert problems == ()
    return list(translate(objects, None, Config()).services.values())


def service_of(spec: str, metadata: str = "", namespace: str = "") -> Service:
    (service,) = services_of(spec, metadata, namespace)
    return service


def test_a_service_with_addresses_of_both_families() -> None:
    assert service_of(
        '{clusterIP: 10.96.0.1, clusterIPs: [10.96.0.1, "fd01::1"], ipFamilies: [IPv6, IPv4], ports: [{port: 80}]}'
    ) == Service(
        name="web",
        namespace="shop",
        hostname="web.shop.svc.cluster.local",
        addresses=(NetworkAddress("", parse_ip("10.96.0.1")), NetworkAddress("", parse_ip("fd01::1"))),
        ports=(ServicePort(80, 80),),
        ip_families=IpFamilies.DUAL,
        canonical=True,
    )


@pytest.mark.parametrize("spec", ["{clusterIP: None}", "{clusterIPs: [None]}", "{}", "{clusterIP: ''}"])
def test_a_service_without_address_is_one_all_the_same(spec: str) -> None:
    assert service_of(spec.replace("None", '"None"')).addresses == ()


def test_an_external_name_is_no_service() -> None:
    assert services_of("{type: ExternalName, externalName: example.com}") == []


@pytest.mark.parametrize(("families", "expected"), [
    ("[IPv4]", IpFamilies.IPV4_ONLY), ("[IPv6]", IpFamilies.IPV6_ONLY), ("[]", IpFamilies.AUTOMATIC),
])  # fmt: skip
def test_address_families(families: str, expected: IpFamilies) -> None:
    assert service_of(f"{{ipFamilies: {families}}}").ip_families is expected


@pytest.mark.parametrize(("addresses", "expected"), [
    ("[10.0.0.1]", IpFamilies.IPV4_ONLY), ("['fd00::1']", IpFamilies.IPV6_ONLY), ("[10.0.0.1, 'fd00::1']", IpFamilies.DUAL),
])  # fmt: skip
def test_address_families_that_are_not_given_are_those_of_the_addresses(addresses: str, expected: IpFamilies) -> None:
    assert service_of(f"{{clusterIPs: {addresses}}}").ip_families is expected


@pytest.mark.parametrize(("port", "target", "protocol"), [
    ("{port: 80, targetPort: 8080}", 8080, AppProtocol.UNKNOWN),
    ("{port: 80, targetPort: web}", 0, AppProtocol.UNKNOWN),
    ("{port: 80, name: http}", 80, AppProtocol.HTTP11),
    ("{port: 80, name: http-web}", 80, AppProtocol.HTTP11),
    ("{port: 80, name: httpweb}", 80, AppProtocol.UNKNOWN),
    ("{port: 80, name: HTTP2-x}", 80, AppProtocol.HTTP2),
    ("{port: 80, name: grpc}", 80, AppProtocol.GRPC),
    ("{port: 80, name: grpc-web}", 80, AppProtocol.UNKNOWN),
    ("{port: 80, name: https}", 80, AppProtocol.TLS),
    ("{port: 80, name: tls-x}", 80, AppProtocol.TLS),
    ("{port: 80, name: tcp}", 80, AppProtocol.TCP),
    ("{port: 80, name: http, appProtocol: kubernetes.io/h2c}", 80, AppProtocol.HTTP2),
    ("{port: 80, appProtocol: kubernetes.io/ws}", 80, AppProtocol.HTTP11),
    ("{port: 80, appProtocol: kubernetes.io/wss}", 80, AppProtocol.TLS),
    ("{port: 80, name: http, appProtocol: tcp}", 80, AppProtocol.TCP),
    ("{port: 3306}", 3306, AppProtocol.TCP),
    ("{port: 3306, name: db}", 3306, AppProtocol.TCP),
    ("{port: 3306, name: mysql}", 3306, AppProtocol.UNKNOWN),
    ("{port: 25, name: http}", 25, AppProtocol.HTTP11),
    ("{port: 53, protocol: UDP, name: http}", 53, AppProtocol.UNKNOWN),
])  # fmt: skip
def test_ports(port: str, target: int, protocol: AppProtocol) -> None:
    ((translated),) = service_of(f"{{ports: [{port}]}}").ports
    assert (translated.target_port, translated.app_protocol) == (target, protocol)


CLOSE = LoadBalancing((NETWORK, REGION, ZONE), LoadBalancingMode.FAILOVER)
SAME_NODE = LoadBalancing((NETWORK, REGION, ZONE, SUBZONE, NODE), LoadBalancingMode.FAILOVER)


def annotated(value: str) -> str:
    return f", annotations: {{networking.istio.io/traffic-distribution: {value}}}"


@pytest.mark.parametrize(("spec", "metadata", "namespace", "expected"), [
    ("{}", "", "", None),
    ("{trafficDistribution: PreferClose}", "", "", CLOSE),
    ("{trafficDistribution: PreferSameZone}", "", "", CLOSE),
    ("{trafficDistribution: PreferSameNode}", "", "", SAME_NODE),
    ("{}", annotated("PreferClose"), "", CLOSE),
    ("{}", "", annotated("PreferSameNode"), SAME_NODE),
    ("{}", annotated("PreferClose"), annotated("PreferSameNode"), CLOSE),
    ("{trafficDistribution: PreferSameNode}", annotated("PreferClose"), "", SAME_NODE),
    ("{}", annotated("Any"), "", None),
    ("{}", annotated("preferclose"), "", CLOSE),
    ("{internalTrafficPolicy: Local, trafficDistribution: PreferClose}", "", "", LoadBalancing((NODE,), LoadBalancingMode.STRICT)),
    ("{publishNotReadyAddresses: true}", "", "", LoadBalancing(health_policy=HealthPolicy.ALLOW_ALL)),
    ("{publishNotReadyAddresses: true, trafficDistribution: PreferClose}", "", "",
     LoadBalancing((NETWORK, REGION, ZONE), LoadBalancingMode.FAILOVER, HealthPolicy.ALLOW_ALL)),
])  # fmt: skip
def test_load_balancing(spec: str, metadata: str, namespace: str, expected: LoadBalancing | None) -> None:
    assert service_of(spec, metadata, namespace).load_balancing == expected

"""WorkloadEntries as workloads of the mesh."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from istiod_py.translate import Config, Translation, translate
from mesh.model.address import NamespacedHostname, parse_ip
from mesh.model.workload import HealthStatus, Locality, NetworkMode, PortMapping, TunnelProtocol, Workload, WorkloadType
from mesh.testing.objects import objects_from_yaml

ENTRY = """
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: vm-1, namespace: shop, labels: {app: web}}
spec:
  address: 192.0.2.1
  ports: {http: 8080}
"""
WEB = NamespacedHostname("shop", "web.shop.svc.cluster.local")
API = NamespacedHostname("shop", "api.example.com")


def translation_of(text: str, config: Config | None = None) -> Translation:
    objects, problems = objects_from_yaml(text, ["shop", "other"])
    assert problems == ()
    return translate(objects, None, config or Config())


def workload_of(text: str, config: Config | None = None) -> Workload:
    (workload,) = translation_of(text, config).workloads.values()
    return workload


def test_an_entry_by_itself() -> None:
    text = ENTRY + "  locality: r/z\n  weight: 5\n  serviceAccount: vm\n  labels: {version: v1}\n"
    assert workload_of(text, Config(trust_domain="td", cluster_id="c1")) == Workload(
        uid="c1/networking.istio.io/WorkloadEntry/shop/vm-1",
        name="vm-1",
        namespace="shop",
        addresses=(parse_ip("192.0.2.1"),),
        trust_domain="td",
        service_account="vm",
        canonical_name="web",
        canonical_revision="v1",
        workload_type=WorkloadType.POD,
        workload_name="vm-1",
        cluster_id="c1",
        locality=Locality("r", "z"),
        capacity=5,
    )


@pytest.mark.parametrize(("old", "new", "check"), [
    ("address: 192.0.2.1", "address: vm.example.com", lambda w: (w.addresses, w.hostname) == ((), "vm.example.com")),
    ("address: 192.0.2.1", "network: n", lambda w: (w.addresses, w.hostname, w.network) == ((), "", "n")),
    ("address: 192.0.2.1", "address: '2001:db8::1'", lambda w: w.addresses == (parse_ip("2001:db8::1"),)),
    ("app: web", "service.istio.io/workload-name: wl", lambda w: (w.workload_name, w.canonical_name) == ("wl", "wl")),
    ("namespace: shop,", "namespace: shop, annotations: {istio.io/autoRegistrationGroup: group},", lambda w: w.workload_name == "group"),
    ("app: web", "networking.istio.io/tunnel: 'x, http'",
     lambda w: (w.tunnel_protocol, w.native_tunnel) == (TunnelProtocol.HBONE, True)),
    ("namespace: shop,", "namespace: shop, annotations: {ambient.istio.io/redirection: enabled},",
     lambda w: (w.tunnel_protocol, w.native_tunnel) == (TunnelProtocol.HBONE, False)),
    ("spec:", "spec:", lambda w: (w.service_account, w.status, w.network_mode) == ("", HealthStatus.HEALTHY, NetworkMode.STANDARD)),
])  # fmt: skip
def test_one_difference_in_the_entry(old: str, new: str, check: Callable[[Workload], bool]) -> None:
    assert old in ENTRY
    assert check(workload_of(ENTRY.replace(old, new)))


def test_the_network_is_the_root_namespaces_unless_it_says_another() -> None:
    root = "---\napiVersion: v1\nkind: Namespace\nmetadata: {name: istio-system, labels: {topology.istio.io/network: net1}}\n"
    assert workload_of(ENTRY + root).network == "net1"
    assert workload_of(ENTRY + "  network: other\n" + root).network == "other"


@pytest.mark.parametrize(("ports", "mapped"), [
    ("{port: 80, targetPort: http}", ((80, 8080),)),
    ("{port: 80, targetPort: https}", ()),
    ("{port: 80, targetPort: 9, name: http}", ((80, 8080),)),
    ("{port: 80, targetPort: 9, name: x}", ((80, 9),)),
    ("{port: 80}", ((80, 80),)),
    ("{port: 80, targetPort: https}, {name: b, port: 81}", ((81, 81),)),
    ("{port: 53, protocol: UDP, targetPort: 5}, {name: b, port: 53, targetPort: 6}", ((53, 6),)),
])  # fmt: skip
def test_a_service_maps_its_ports_to_the_entry(ports: str, mapped: tuple[tuple[int, int], ...]) -> None:
    service = "---\napiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: shop}\n"
    service += f"spec: {{selector: {{app: web}}, ports: [{ports}]}}\n"
    assert workload_of(ENTRY + service).services == {WEB: tuple(PortMapping(*pair) for pair in mapped)}


@pytest.mark.parametrize(("ports", "mapped"), [
    ("{number: 80, name: http, targetPort: 9}", (80, 8080)),
    ("{number: 80, name: x, targetPort: 9}", (80, 9)),
    ("{number: 80, name: x}", (80, 80)),
])  # fmt: skip
def test_a_service_entry_maps_its_ports_to_the_entry(ports: str, mapped: tuple[int, int]) -> None:
    text = "---\napiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {name: out, namespace: shop}\n"
    text += f"spec: {{hosts: [api.example.com], resolution: STATIC, ports: [{ports}], workloadSelector: {{labels: {{app: web}}}}}}\n"
    assert workload_of(ENTRY + text).services == {API: (PortMapping(*mapped),)}
    assert workload_of(ENTRY + text.replace("app: web", "app: x")).services == {}
    assert workload_of(ENTRY + text.replace("namespace: shop", "namespace: other")).services == {}


def test_policies_select_by_the_labels_of_spec_and_object() -> None:
    policy = "---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: p, namespace: shop}\n"
    policy += "spec: {selector: {matchLabels: {app: web, tier: db}}, mtls: {mode: STRICT}}\n"
    assert workload_of(ENTRY + "  labels: {tier: db}\n" + policy).authorization_policies == ("istio-system/istio_converted_static_strict",)
    assert workload_of(ENTRY + policy).authorization_policies == ()

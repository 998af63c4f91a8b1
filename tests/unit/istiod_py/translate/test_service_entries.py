"""ServiceEntries as services and workloads of the mesh."""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import ip_network

import pytest

from istiod_py.translate import Config, Translation, translate
from mesh.model.address import NamespacedHostname, NetworkAddress, parse_ip
from mesh.model.service import (
    AppProtocol,
    CidrVip,
    HealthPolicy,
    LoadBalancing,
    LoadBalancingMode,
    LoadBalancingScope,
    Service,
    ServicePort,
    Visibility,
)
from mesh.model.workload import HealthStatus, Locality, NetworkMode, PortMapping, TunnelProtocol, Workload, WorkloadType
from mesh.testing.objects import objects_from_yaml

CLOSE = (LoadBalancingScope.NETWORK, LoadBalancingScope.REGION, LoadBalancingScope.ZONE)
API = NamespacedHostname("shop", "api.example.com")


def entry(spec: str, name: str = "out", namespace: str = "shop", metadata: str = "") -> str:
    head = f"---\napiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: {name}, namespace: {namespace}{metadata}}}\n"
    return f"{head}spec: {spec}\n"


def service(name: str, spec: str, namespace: str = "shop") -> str:
    return f"---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec: {spec}\n"


def pod(labels: str, ports: str = "[{name: http, containerPort: 8080}]") -> str:
    head = f"---\napiVersion: v1\nkind: Pod\nmetadata: {{name: p, namespace: shop, labels: {labels}}}\n"
    return f"{head}spec: {{containers: [{{name: c, ports: {ports}}}]}}\nstatus: {{podIP: 10.0.0.1}}\n"


def namespace(name: str, metadata: str) -> str:
    return f"---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: {name}, {metadata}}}\n"


def translation_of(text: str, config: Config | None = None) -> Translation:
    objects, problems = objects_from_yaml(text, ["shop", "other"])
    assert problems == ()
    return translate(objects, None, config or Config())


def service_of(text: str) -> Service:
    (found,) = translation_of(text).services.values()
    return found


def workload_of(text: str) -> Workload:
    (found,) = translation_of(text).workloads.values()
    return found


# Services


def test_a_service_for_each_host() -> None:
    text = entry(
        "{hosts: [api.example.com, www.example.com], addresses: [192.0.2.1, 192.0.2.77/28, '2001:db8::1', '2001:db8:1::/64'],"
        " ports: [{number: 443, name: x, protocol: HTTPS, targetPort: 8443}, {number: 80, name: y, protocol: HTTP}],"
        " resolution: STATIC, subjectAltNames: ['spiffe://td/ns/a/sa/b']}"
    )
    services = translation_of(text).services
    assert list(services) == ["shop/api.example.com", "shop/www.example.com"]
    assert services["shop/api.example.com"] == Service(
        name="out",
        namespace="shop",
        hostname="api.example.com",
        addresses=(NetworkAddress("", parse_ip("192.0.2.1")), NetworkAddress("", parse_ip("2001:db8::1"))),
        cidr_addresses=(CidrVip("", ip_network("192.0.2.64/28")), CidrVip("", ip_network("2001:db8:1::/64"))),
        ports=(ServicePort(443, 8443, AppProtocol.TLS), ServicePort(80, 80, AppProtocol.HTTP11)),
        subject_alt_names=("spiffe://td/ns/a/sa/b",),
        canonical=True,
    )


@pytest.mark.parametrize(("protocol", "expected"), [
    ("HTTP", AppProtocol.HTTP11), ("HTTP2", AppProtocol.HTTP2), ("GRPC", AppProtocol.GRPC), ("HTTPS", AppProtocol.TLS),
    ("TLS", AppProtocol.TLS), ("tcp", AppProtocol.TCP), ("MONGO", AppProtocol.UNKNOWN), ("GRPC-WEB", AppProtocol.UNKNOWN),
    ("UDP", AppProtocol.UNKNOWN), ("''", AppProtocol.UNKNOWN),
])  # fmt: skip
def test_protocols(protocol: str, expected: AppProtocol) -> None:
    ports = f"[{{number: 80, name: http, protocol: {protocol}}}]"
    assert service_of(entry(f"{{hosts: [a.b], ports: {ports}}}")).ports[0].app_protocol is expected


@pytest.mark.parametrize(("spec", "metadata", "of_namespace", "expected"), [
    ("resolution: NONE", "", "", LoadBalancing((), LoadBalancingMode.PASSTHROUGH, HealthPolicy.ALLOW_ALL)),
    ("resolution: NONE", "PreferClose", "", LoadBalancing((), LoadBalancingMode.PASSTHROUGH, HealthPolicy.ALLOW_ALL)),
    ("resolution: STATIC", "", "", None),
    ("resolution: STATIC", "PreferClose", "", LoadBalancing(CLOSE, LoadBalancingMode.FAILOVER)),
    ("resolution: DNS", "", "PreferSameZone", LoadBalancing(CLOSE, LoadBalancingMode.FAILOVER)),
    ("resolution: DNS", "Anything", "", None),
])  # fmt: skip
def test_load_balancing(spec: str, metadata: str, of_namespace: str, expected: LoadBalancing | None) -> None:
    def annotations(value: str) -> str:
        return f"annotations: {{networking.istio.io/traffic-distribution: {value}}}" if value else "labels: {}"

    text = entry(f"{{hosts: [a.b], {spec}}}", metadata=f", {annotations(metadata)}") + namespace("shop", annotations(of_namespace))
    assert service_of(text).load_balancing == expected


def test_the_network_is_the_root_namespaces() -> None:
    root = namespace("istio-system", "labels: {topology.istio.io/network: net1}")
    found = translation_of(
        entry("{hosts: [a.b], addresses: [10.0.0.1, 10.1.0.0/16], resolution: STATIC, endpoints: [{address: 1.1.1.1}]}") + root
    )
    assert str(found.services["shop/a.b"].addresses[0]) == "net1/10.0.0.1"
    assert found.services["shop/a.b"].cidr_addresses[0].network == "net1"
    assert [workload.network for workload in found.workloads.values()] == ["net1"]


# Automatic addresses


@pytest.mark.parametrize(("spec", "labels", "has_some"), [
    ("{hosts: [a.b], resolution: STATIC}", "{}", True),
    ("{hosts: [a.b], resolution: DNS}", "{}", True),
    ("{hosts: [a.b], resolution: NONE}", "{}", False),
    ("{hosts: [a.b], resolution: DNS}", "{networking.istio.io/enable-autoallocate-ip: 'false'}", False),
    ("{hosts: [a.b], resolution: DNS}", "{networking.istio.io/enable-autoallocate-ip: 'False'}", False),
    ("{hosts: [a.b], resolution: DNS}", "{networking.istio.io/enable-autoallocate-ip: 'true'}", True),
    ("{hosts: ['*.b'], resolution: STATIC}", "{}", False),
    ("{hosts: ['*.b'], resolution: DYNAMIC_DNS}", "{}", True),
])  # fmt: skip
def test_who_gets_addresses(spec: str, labels: str, has_some: bool) -> None:
    addresses = service_of(entry(spec, metadata=f", labels: {labels}")).addresses
    assert [address.ip.version for address in addresses] == ([4, 6] if has_some else [])
    assert all(str(address.ip).startswith(("240.240.", "2001:2:")) for address in addresses)


def test_whoever_has_addresses_gets_no_others() -> None:
    assert [str(a.ip) for a in service_of(entry("{hosts: [a.b], resolution: STATIC, addresses: [192.0.2.1]}")).addresses] == ["192.0.2.1"]
    assert service_of(entry("{hosts: [a.b], resolution: STATIC, addresses: [192.0.2.0/24]}")).addresses == ()


def test_hosts_get_the_same_addresses_whatever_else_there_is() -> None:
    alone = service_of(entry("{hosts: [a.b], resolution: DNS}")).addresses
    others = "".join(entry(f"{{hosts: [h{n}.b, i{n}.b], resolution: DNS}}", name=f"e{n}") for n in range(50))
    among = translation_of(others + entry("{hosts: [a.b], resolution: DNS}"))
    assert among.services["shop/a.b"].addresses == alone
    everybodys = [address for found in among.services.values() for address in found.addresses]
    assert len(everybodys) == len(set(everybodys)) == 202


def test_an_address_that_somebody_chose_is_not_given_away() -> None:
    (v4, v6) = service_of(entry("{hosts: [a.b], resolution: DNS}")).addresses
    taken = entry(f"{{hosts: [c.d], resolution: STATIC, addresses: [{v4.ip}, '{v6.ip}']}}", name="z")
    found = translation_of(entry("{hosts: [a.b], resolution: DNS}") + taken)
    assert set(found.services["shop/a.b"].addresses).isdisjoint(found.services["shop/c.d"].addresses)
    of_service = service("web", f"{{clusterIP: {v4.ip}}}")
    assert v4 not in translation_of(entry("{hosts: [a.b], resolution: DNS}") + of_service).services["shop/a.b"].addresses


def test_an_address_in_the_status_is_kept() -> None:
    text = entry("{hosts: [a.b, c.d], resolution: DNS}") + "status: {addresses: [{value: 240.240.9.9, host: c.d}]}\n"
    services = translation_of(text).services
    assert str(services["shop/c.d"].addresses[0].ip) == "240.240.9.9"
    assert str(services["shop/a.b"].addresses[0].ip) != "240.240.9.9"


def test_when_the_pool_is_used_up_the_entry_is_told() -> None:
    text = entry("{hosts: [c.d], resolution: STATIC, addresses: [240.240.0.0/16]}", name="z") + entry("{hosts: [a.b], resolution: DNS}")
    translation = translation_of(text)
    assert [address.ip.version for address in translation.services["shop/a.b"].addresses] == [6]
    assert [(p.field, p.message) for p in translation.problems] == [("spec.addresses", "no automatic IPv4 address is left for a.b")]


# Whose a hostname is

OLD, NEW = ", creationTimestamp: '2026-01-01T00:00:00Z'", ", creationTimestamp: '2026-02-01T00:00:00Z'"
STATIC = "resolution: STATIC, endpoints: [{address: 192.0.2.1}]"


def test_in_a_namespace_a_hostname_is_the_oldest_entrys() -> None:
    text = entry(f"{{hosts: [a.b, c.d], {STATIC}}}", "new", metadata=NEW) + entry(f"{{hosts: [a.b], {STATIC}}}", "old", metadata=OLD)
    translation = translation_of(text)
    assert {key: found.name for key, found in translation.services.items()} == {"shop/a.b": "old", "shop/c.d": "new"}
    assert {w.name: [k.hostname for k in w.services] for w in translation.workloads.values()} == {"old": ["a.b"], "new": ["c.d"]}
    (problem,) = translation.problems
    assert (problem.line, problem.field) == (5, "spec.hosts")
    assert problem.message.startswith("has no effect for a.b: ServiceEntry old, which is older")


def test_an_entry_that_lost_all_its_hosts_has_no_workloads() -> None:
    text = entry(f"{{hosts: [a.b], {STATIC}}}", "new", metadata=NEW) + entry("{hosts: [a.b], resolution: STATIC}", "old", metadata=OLD)
    assert translation_of(text).workloads == {}


def test_in_a_namespace_a_service_goes_before_entries() -> None:
    host = "web.shop.svc.cluster.local"
    text = entry(f"{{hosts: [{host}], {STATIC}}}", metadata=OLD) + service("web", "{clusterIP: 10.96.0.1}")
    translation = translation_of(text)
    assert [str(found.addresses[0].ip) for found in translation.services.values()] == ["10.96.0.1"]
    assert translation.workloads == {}
    alias = service("web", "{type: ExternalName, externalName: x}")
    assert translation_of(entry(f"{{hosts: [{host}], {STATIC}}}") + alias).services[f"shop/{host}"].name == "out"


@pytest.mark.parametrize(("text", "canonical"), [
    (entry("{hosts: [a.b]}", "x", "shop", OLD) + entry("{hosts: [a.b]}", "y", "other", NEW), ["shop"]),
    (entry("{hosts: [a.b]}", "x", "shop", NEW) + entry("{hosts: [a.b]}", "y", "other", OLD), ["other"]),
    (entry("{hosts: [a.b]}", "x", "shop") + entry("{hosts: [a.b]}", "y", "other", NEW), ["other"]),
    (entry("{hosts: [a.b]}", "x", "shop") + entry("{hosts: [a.b]}", "y", "other"), ["other"]),
    (entry("{hosts: [a.b], exportTo: [.]}", "x", "shop", OLD) + entry("{hosts: [a.b]}", "y", "other", NEW), ["other"]),
    (entry("{hosts: [a.b], exportTo: [.]}", "x", "shop"), []),
    (entry("{hosts: [web.shop.svc.cluster.local]}", "x", "other", OLD) + service("web", "{}"), ["shop"]),
])  # fmt: skip
def test_in_the_mesh_a_hostname_stands_for_one_service(text: str, canonical: list[str]) -> None:
    assert [found.namespace for found in translation_of(text).services.values() if found.canonical] == canonical


@pytest.mark.parametrize(("export", "visible"), [
    ("", Visibility.PUBLIC), ("exportTo: []", Visibility.PUBLIC), ("exportTo: ['*']", Visibility.PUBLIC),
    ("exportTo: [., '*']", Visibility.PUBLIC), ("exportTo: [.]", Visibility.NAMESPACE), ("exportTo: [shop, other]", Visibility.NAMESPACE),
    ("exportTo: [other]", None), ("exportTo: ['~']", None),
])  # fmt: skip
def test_who_sees_it(export: str, visible: Visibility | None) -> None:
    translation = translation_of(entry(f"{{hosts: [a.b], {STATIC}, {export}}}"))
    assert [found.visibility for found in translation.services.values()] == ([visible] if visible else [])
    assert bool(translation.workloads) == bool(visible)
    assert [(p.field, p.message) for p in translation.problems] == (
        [("spec.exportTo", "node proxies know no lists of namespaces: it is not visible in other")]
        if "other" in export else []
    )  # fmt: skip


def test_entries_and_policies_for_another_control_plane_are_passed_over() -> None:
    policy = "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n"
    policy += "metadata: {name: p, namespace: shop, labels: {istio.io/rev: R}}\n"
    text = entry("{hosts: [a.b]}", metadata=", labels: {istio.io/rev: R}") + policy
    for revision, expected in (("default", 1), ("canary", 0)):
        translation = translation_of(text.replace("R}", f"{revision}}}"))
        assert (len(translation.services), len(translation.policies)) == (expected, expected)
    assert translation_of(text.replace("R}", "canary}"), Config(revisions=frozenset({"canary"}))).policies.keys() == {"shop/p"}


# Workloads


def test_an_inline_endpoint() -> None:
    text = entry(
        "{hosts: [api.example.com], ports: [{number: 80, name: http}, {number: 443, name: tls, targetPort: 8443}, {number: 9, name: x}],"
        " resolution: STATIC, endpoints: [{address: 192.0.2.1, ports: {http: 8080, tls: 9443}, labels: {app: not-this},"
        " locality: r/z/s, weight: 3, serviceAccount: sa}]}",
        metadata=", labels: {app: api, version: v2}",
    )
    assert workload_of(text) == Workload(
        uid="Kubernetes/networking.istio.io/ServiceEntry/shop/out/192.0.2.1",
        name="out",
        namespace="shop",
        addresses=(parse_ip("192.0.2.1"),),
        service_account="sa",
        canonical_name="api",
        canonical_revision="v2",
        workload_type=WorkloadType.POD,
        workload_name="out",
        locality=Locality("r", "z", "s"),
        services={API: (PortMapping(80, 8080), PortMapping(443, 9443), PortMapping(9, 9))},
        capacity=3,
    )


@pytest.mark.parametrize(("spec", "metadata", "check"), [
    ("{address: 192.0.2.1}", "", lambda w: (w.service_account, w.capacity, w.canonical_name) == ("", 1, "out")),
    ("{address: 192.0.2.1}", "", lambda w: (w.node, w.network_mode, w.status) == ("", NetworkMode.STANDARD, HealthStatus.HEALTHY)),
    ("{address: 192.0.2.1, locality: r}", "", lambda w: w.locality == Locality("r")),
    ("{address: 192.0.2.1, locality: r/z/s/more}", "", lambda w: w.locality == Locality("r", "z", "s")),
    ("{address: 192.0.2.1, network: elsewhere}", "", lambda w: w.network == "elsewhere"),
    ("{address: '2001:db8::1'}", "", lambda w: w.addresses == (parse_ip("2001:db8::1"),)),
    ("{address: 192.0.2.1}", ", labels: {networking.istio.io/tunnel: http}",
     lambda w: (w.tunnel_protocol, w.native_tunnel) == (TunnelProtocol.HBONE, True)),
    ("{address: 192.0.2.1, labels: {networking.istio.io/tunnel: http}}", "", lambda w: w.tunnel_protocol is TunnelProtocol.NONE),
    ("{address: 192.0.2.1}", ", annotations: {ambient.istio.io/redirection: enabled}",
     lambda w: (w.tunnel_protocol, w.native_tunnel) == (TunnelProtocol.HBONE, False)),
])  # fmt: skip
def test_one_difference_in_the_endpoint(spec: str, metadata: str, check: Callable[[Workload], bool]) -> None:
    assert check(workload_of(entry(f"{{hosts: [a.b], resolution: STATIC, endpoints: [{spec}]}}", metadata=metadata)))


def test_an_endpoints_network_is_its_own() -> None:
    """In Istio it holds for the endpoints after it too."""
    endpoints = "[{address: 192.0.2.1, network: n}, {address: 192.0.2.2}]"
    workloads = translation_of(entry(f"{{hosts: [a.b], resolution: STATIC, endpoints: {endpoints}}}")).workloads
    assert [workload.network for workload in workloads.values()] == ["n", ""]


def test_every_endpoint_serves_every_host() -> None:
    text = entry("{hosts: [a.b, c.d], resolution: STATIC, endpoints: [{address: 192.0.2.1}, {address: 192.0.2.2}]}")
    assert [[key.hostname for key in workload.services] for workload in translation_of(text).workloads.values()] == [["a.b", "c.d"]] * 2


@pytest.mark.parametrize(("spec", "workloads"), [
    ("resolution: DNS", {"a.b": ["a.b"], "c.d": ["c.d"]}),
    ("resolution: DNS_ROUND_ROBIN", {"a.b": ["a.b"], "c.d": ["c.d"]}),
    ("resolution: DYNAMIC_DNS", {"a.b": ["a.b"], "c.d": ["c.d"]}),
    ("resolution: DNS, endpoints: [{address: e.f}]", {"e.f": ["a.b", "c.d"]}),
    ("resolution: DNS, endpoints: [{address: 192.0.2.1}]", {"": ["a.b", "c.d"]}),
    ("resolution: DNS, workloadSelector: {labels: {a: b}}", {}),
    ("resolution: STATIC", {}),
    ("resolution: NONE", {}),
])  # fmt: skip
def test_where_names_are_looked_up_a_host_is_its_own_endpoint(spec: str, workloads: dict[str, list[str]]) -> None:
    found = translation_of(entry(f"{{hosts: [a.b, c.d], {spec}}}")).workloads.values()
    assert {workload.hostname: [key.hostname for key in workload.services] for workload in found} == workloads


def test_policies_of_the_entrys_labels_are_named() -> None:
    policy = "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p, namespace: shop}\n"
    policy += "spec: {selector: {matchLabels: {app: api}}}\n"
    spec = "{hosts: [a.b], resolution: STATIC, endpoints: [{address: 192.0.2.1, labels: {app: other}}]}"
    (workload,) = translation_of(policy + entry(spec, metadata=", labels: {app: api}")).workloads.values()
    assert workload.authorization_policies == ("shop/p",)


# Selected pods

SELECTING = "{{hosts: [api.example.com], ports: [{ports}], resolution: STATIC, workloadSelector: {{labels: {{app: web}}}}}}"


@pytest.mark.parametrize(("ports", "mapped"), [
    ("{number: 80, name: http}", (80, 8080)),
    ("{number: 80, name: http, targetPort: 9}", (80, 8080)),
    ("{number: 80, name: web, targetPort: 9}", (80, 9)),
    ("{number: 80, name: web}", (80, 80)),
    ("{number: 80, name: dns}", (80, 80)),
])  # fmt: skip
def test_a_pod_that_an_entry_selects_serves_its_hosts(ports: str, mapped: tuple[int, int]) -> None:
    containers = "[{name: http, containerPort: 8080}, {name: dns, containerPort: 53, protocol: UDP}]"
    workload = workload_of(pod("{app: web}", containers) + entry(SELECTING.format(ports=ports)))
    assert workload.services == {API: (PortMapping(*mapped),)}


@pytest.mark.parametrize("text", [
    pod("{app: other}") + entry(SELECTING.format(ports="")),
    pod("{app: web}") + entry(SELECTING.format(ports=""), namespace="other"),
    pod("{app: web}") + entry("{hosts: [a.b], workloadSelector: {}, resolution: STATIC}"),
    pod("{app: web}") + entry("{hosts: [a.b], workloadSelector: {labels: {app: web}}, resolution: STATIC, exportTo: ['~']}"),
])  # fmt: skip
def test_pods_that_no_entry_selects(text: str) -> None:
    assert workload_of(text).services == {}


# Mistakes


def test_a_mistake_keeps_the_last_good_version_of_that_entry_only() -> None:
    objects, _ = objects_from_yaml(entry(f"{{hosts: [a.b], {STATIC}}}") + entry("{hosts: [c.d]}", "two"))
    before = translate(objects, None, Config())
    (obj,) = [o for o in objects if o.name == "out"]
    broken = type(obj)(obj.api_version, obj.kind, obj.namespace, obj.name, {"spec": {"hosts": ["x y"]}}, obj.layers)
    after = translate([o if o is not obj else broken for o in objects], before, Config())
    assert (after.services, after.workloads) == (before.services, before.workloads)
    assert [(p.file, p.field) for p in after.problems] == [("objects.yaml", "spec.hosts[0]")]
    assert translate([broken], None, Config()).services == {}

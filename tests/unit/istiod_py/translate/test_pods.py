"""Pods as workloads."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from istiod_py.translate import Config, Translation, translate
from mesh.model.address import NamespacedHostname, parse_ip
from mesh.model.workload import HealthStatus, Locality, NetworkMode, PortMapping, TunnelProtocol, Workload, WorkloadType
from mesh.testing.objects import objects_from_yaml

POD = """
apiVersion: v1
kind: Pod
metadata: {name: web-1, namespace: shop, labels: {app: web}}
spec:
  nodeName: n1
  serviceAccountName: web
  initContainers:
  - {name: sidecar, restartPolicy: Always, ports: [{name: admin, containerPort: 9000}]}
  - {name: setup, ports: [{name: once, containerPort: 9001}]}
  containers:
  - {name: main, ports: [{name: http, containerPort: 8080}, {name: dns, containerPort: 5353, protocol: UDP}]}
status:
  phase: Running
  podIPs: [{ip: 10.0.0.1}, {ip: "fd00::1"}]
  conditions: [{type: PodScheduled, status: "True"}, {type: Ready, status: "True"}]
---
apiVersion: v1
kind: Node
metadata:
  name: n1
  labels: {topology.kubernetes.io/region: r, topology.kubernetes.io/zone: z, topology.istio.io/subzone: s}
"""
SERVICE = """---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec: {selector: {app: web}, ports: [PORTS]}
"""
WEB = NamespacedHostname("shop", "web.shop.svc.cluster.local")


def translation_of(text: str, config: Config | None = None) -> Translation:
    objects, problems = objects_from_yaml(text, ["shop", "other"])
    assert problems == ()
    return translate(objects, None, config or Config())


def workload_of(text: str, config: Config | None = None) -> Workload:
    (workload,) = translation_of(text, config).workloads.values()
    return workload


def test_a_running_pod() -> None:
    assert workload_of(POD) == Workload(
        uid="Kubernetes//Pod/shop/web-1",
        name="web-1",
        namespace="shop",
        addresses=(parse_ip("10.0.0.1"), parse_ip("fd00::1")),
        service_account="web",
        node="n1",
        canonical_name="web",
        canonical_revision="latest",
        workload_type=WorkloadType.POD,
        workload_name="web-1",
        locality=Locality("r", "z", "s"),
    )


def test_the_mesh_gives_names() -> None:
    workload = workload_of(POD, Config(trust_domain="td", cluster_id="c1"))
    assert (workload.uid, workload.trust_domain, workload.cluster_id) == ("c1//Pod/shop/web-1", "td", "c1")


def test_the_network_is_the_root_namespaces() -> None:
    root = "---\napiVersion: v1\nkind: Namespace\nmetadata: {name: istio-system, labels: {topology.istio.io/network: net1}}\n"
    translation = translation_of(POD + SERVICE.replace("ports: [PORTS]", "clusterIP: 10.96.0.1") + root)
    assert [workload.network for workload in translation.workloads.values()] == ["net1"]
    assert [str(service.addresses[0]) for service in translation.services.values()] == ["net1/10.96.0.1"]


@pytest.mark.parametrize(("old", "new"), [
    ("phase: Running", "phase: Succeeded"),
    ("phase: Running", "phase: Failed"),
    ('podIPs: [{ip: 10.0.0.1}, {ip: "fd00::1"}]', "podIPs: []"),
])  # fmt: skip
def test_what_cannot_be_reached_is_no_workload(old: str, new: str) -> None:
    assert translation_of(POD.replace(old, new)).workloads == {}


@pytest.mark.parametrize(("old", "new", "check"), [
    ("phase: Running", "phase: Pending", lambda w: w.addresses),
    ('podIPs: [{ip: 10.0.0.1}, {ip: "fd00::1"}]', "podIP: 10.0.0.9", lambda w: w.addresses == (parse_ip("10.0.0.9"),)),
    ("serviceAccountName: web", "hostNetwork: true",
     lambda w: (w.service_account, w.network_mode) == ("default", NetworkMode.HOST_NETWORK)),
    ('type: Ready, status: "True"', 'type: Ready, status: "False"', lambda w: w.status is HealthStatus.UNHEALTHY),
    ("name: web-1,", "name: web-1, deletionTimestamp: '2026-01-01T00:00:00Z',", lambda w: w.status is HealthStatus.UNHEALTHY),
    ("name: web-1,", "name: web-1, annotations: {ambient.istio.io/redirection: enabled},",
     lambda w: (w.tunnel_protocol, w.native_tunnel) == (TunnelProtocol.HBONE, False)),
    ("name: web-1,", "name: web-1, annotations: {ambient.istio.io/redirection: pending},",
     lambda w: w.tunnel_protocol is TunnelProtocol.NONE),
    ("app: web", "networking.istio.io/tunnel: http", lambda w: (w.tunnel_protocol, w.native_tunnel) == (TunnelProtocol.HBONE, True)),
    ("app: web", "networking.istio.io/tunnel: https", lambda w: not w.native_tunnel),
    ("nodeName: n1", "nodeName: n2", lambda w: w.locality == Locality()),
    ("app: web", "app: web, app.kubernetes.io/name: k, version: v1", lambda w: (w.canonical_name, w.canonical_revision) == ("k", "v1")),
    ("app: web", "app: web, service.istio.io/canonical-name: c, service.istio.io/canonical-revision: r, app.kubernetes.io/version: v",
     lambda w: (w.canonical_name, w.canonical_revision) == ("c", "r")),
    ("app: web", "a: b", lambda w: w.canonical_name == "web-1"),
    ("app: web", "service.istio.io/workload-name: wl", lambda w: (w.workload_name, w.canonical_name) == ("wl", "wl")),
])  # fmt: skip
def test_one_difference_in_the_pod(old: str, new: str, check: Callable[[Workload], bool]) -> None:
    assert old in POD
    assert check(workload_of(POD.replace(old, new)))


@pytest.mark.parametrize(("labels", "kind", "owner", "name"), [
    ("pod-template-hash: abc", "ReplicaSet", "web-abc", "web"),
    ("pod-template-hash: abc", "ReplicaSet", "webabc", "webabc"),
    ("a: b", "ReplicaSet", "web-abc", "web-abc"),
    ("rollouts-pod-template-hash: abc", "ReplicaSet", "web-abc", "web"),
    ("a: b", "Job", "backup-28123456", "backup"),
    ("a: b", "Job", "backup-1234", "backup-1234"),
    ("deploymentconfig: dc", "ReplicationController", "dc-1", "dc"),
    ("a: b", "StatefulSet", "db", "db"),
])  # fmt: skip
def test_the_workload_is_named_after_what_made_the_pod(labels: str, kind: str, owner: str, name: str) -> None:
    made = f"name: web-1, generateName: x-, ownerReferences: [{{kind: X, name: y}}, {{kind: {kind}, name: {owner}, controller: true}}],"
    text = POD.replace("name: web-1,", made, 1).replace("app: web", labels)
    assert workload_of(text).workload_name == name
    assert workload_of(text.replace("generateName: x-,", "")).workload_name == "web-1"


@pytest.mark.parametrize(("ports", "mapped"), [
    ("{port: 80, targetPort: 8080}", ((80, 8080),)),
    ("{port: 80}", ((80, 80),)),
    ("{port: 80, targetPort: http}", ((80, 8080),)),
    ("{port: 80, targetPort: admin}", ((80, 9000),)),
    ("{port: 80, targetPort: once}, {name: b, port: 81}", ((81, 81),)),
    ("{port: 80, targetPort: nowhere}", ()),
    ("{port: 80, targetPort: dns}", ()),
    ("{port: 53, protocol: UDP, targetPort: 5353}, {port: 53, targetPort: 5300}", ((53, 5300),)),
    ("{port: 53, targetPort: 5300}, {port: 53, protocol: UDP, targetPort: 5353}", ((53, 5300),)),
    ("{port: 53, protocol: UDP}", ((53, 53),)),
])  # fmt: skip
def test_a_service_maps_its_ports_to_the_pods(ports: str, mapped: tuple[tuple[int, int], ...]) -> None:
    assert workload_of(POD + SERVICE.replace("PORTS", ports)).services == {WEB: tuple(PortMapping(*pair) for pair in mapped)}


@pytest.mark.parametrize("change", [
    ("selector: {app: web}", "selector: {app: other}"),
    ("selector: {app: web}", "selector: {app: web, x: y}"),
    ("selector: {app: web}", "selector: {}"),
    ("selector: {app: web}, ", ""),
    ("namespace: shop}\nspec: {selector", "namespace: other}\nspec: {selector"),
    ("spec: {selector", "spec: {type: ExternalName, externalName: x, selector"),
])  # fmt: skip
def test_services_that_do_not_select_the_pod(change: tuple[str, str]) -> None:
    text = SERVICE.replace("PORTS", "{port: 80}")
    assert change[0] in text
    assert workload_of(POD + text.replace(*change)).services == {}


def test_policies_that_select_the_pod_are_named_in_order() -> None:
    def policy(name: str, namespace: str, selector: str, kind: str = "ALLOW") -> str:
        head = "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n"
        return f"{head}metadata: {{name: {name}, namespace: {namespace}}}\nspec: {{action: {kind}{selector}}}\n"

    text = "".join((
        policy("z", "shop", ", selector: {matchLabels: {app: web}}"),
        policy("a", "shop", ", selector: {}"),
        policy("root", "istio-system", ", selector: {matchLabels: {app: web}}"),
        policy("all", "shop", ""),
        policy("mesh", "istio-system", ""),
        policy("not-it", "shop", ", selector: {matchLabels: {app: x}}"),
        policy("audit", "shop", ", selector: {matchLabels: {app: web}}", "AUDIT"),
        policy("elsewhere", "other", ", selector: {matchLabels: {app: web}}"),
    ))  # fmt: skip
    assert workload_of(POD + text).authorization_policies == ("istio-system/root", "shop/a", "shop/z")


AGENT = """---
apiVersion: v1
kind: Pod
metadata:
  name: NAME
  namespace: istio-system
  labels: {app: ztunnel}
  ownerReferences: [{kind: DaemonSet, name: ztunnel, uid: OWNER, controller: true}]
spec: {nodeName: NODE, containers: [{name: c}]}
"""


def agent(owner: str, node: str = "n1", namespace: str = "istio-system") -> str:
    text = AGENT.replace("NAME", f"ztunnel-{owner}-{node}").replace("OWNER", owner).replace("NODE", node)
    return text.replace("namespace: istio-system", f"namespace: {namespace}")


@pytest.mark.parametrize(
    ("agents", "believed"),
    [
        ("", True),
        (agent("first"), True),
        (agent("second"), False),
        (agent("first") + agent("second"), True),
        (agent("second", node="n2"), True),
        (agent("second", namespace="shop"), True),
    ],
    ids=["no agent", "its own", "only another's", "both, while one ends", "on another node", "somebody else's pod"],
)
def test_the_word_of_agents_of_a_former_installation_is_not_taken_once_others_are_there(agents: str, believed: bool) -> None:
    annotations = "annotations: {ambient.istio.io/redirection: enabled, ambient.mesh/captured-by: first}"
    text = POD.replace("labels: {app: web}", f"labels: {{app: web}}, {annotations}")
    objects, problems = objects_from_yaml(text + agents, ["shop", "other", "istio-system"])
    assert problems == ()
    before = translate(objects_from_yaml(text + agent("first"), ["shop", "other", "istio-system"])[0], None, Config())
    for previous in (None, before):
        workload = translate(objects, previous, Config()).workloads["Kubernetes//Pod/shop/web-1"]
        assert (workload.tunnel_protocol is TunnelProtocol.HBONE) is believed


def test_who_does_not_say_whose_agent_captured_a_pod_is_believed() -> None:
    text = POD.replace("labels: {app: web}", "labels: {app: web}, annotations: {ambient.istio.io/redirection: enabled}")
    objects, _ = objects_from_yaml(text + agent("second"), ["shop", "other", "istio-system"])
    assert translate(objects, None, Config()).workloads["Kubernetes//Pod/shop/web-1"].tunnel_protocol is TunnelProtocol.HBONE

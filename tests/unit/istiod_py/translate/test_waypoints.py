"""Which waypoint stands before a service or workload: the table of Istio's `waypoints.go`, row by row, and what a change of it costs."""

from __future__ import annotations

from ipaddress import ip_address
from itertools import count

import pytest

from istiod_py.translate import Condition, Config, Translation, translate
from mesh.kube.objects import ObjectKey
from mesh.model.address import GatewayAddress, NamespacedHostname, NetworkAddress
from mesh.model.policy import Action, Exact, Match, Scope
from mesh.model.service import WeightedWaypoint
from mesh.model.workload import ApplicationTunnel, TunnelApplicationProtocol
from mesh.testing.objects import objects_from_yaml

_UIDS = count()


def gateway(
    name: str = "waypoint", namespace: str = "shop", *, ready: bool = True, metadata: str = "", listener: str = "", addresses: str = ""
) -> str:
    assigned = addresses or f"[{{type: IPAddress, value: 10.96.0.9}}, {{type: Hostname, value: {name}.{namespace}.svc.cluster.local}}]"
    return f"""
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {{name: {name}, namespace: {namespace}{", " + metadata if metadata else ""}}}
spec:
  gatewayClassName: istio-waypoint
  listeners: [{{name: mesh, port: 15008, protocol: HBONE{", " + listener if listener else ""}}}]
status: {{addresses: {assigned if ready else "[]"}}}
"""


def namespace(name: str = "shop", metadata: str = "") -> str:
    return f"\n---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: {name}{', ' + metadata if metadata else ''}}}\n"


def service(name: str = "web", metadata: str = "", namespace: str = "shop") -> str:
    return f"""
---
apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: {namespace}{", " + metadata if metadata else ""}}}
spec: {{clusterIP: 10.96.1.1, selector: {{app: web}}, ports: [{{name: http, port: 80}}]}}
"""


def pod(name: str = "web-1", metadata: str = "", namespace: str = "shop") -> str:
    return f"""
---
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: {namespace}{", " + metadata if metadata else ""}}}
spec: {{nodeName: n1, containers: [{{name: a}}]}}
status: {{phase: Running, podIP: 10.244.1.{next(_UIDS) % 250 + 2}, conditions: [{{type: Ready, status: "True"}}]}}
"""


def told(*texts: str, before: Translation | None = None) -> Translation:
    objects, problems = objects_from_yaml("".join(texts), namespaces=("shop", "infra", "istio-system"))
    assert problems == ()
    return translate(objects, before, Config())


def at(name: str = "waypoint", namespace: str = "shop") -> GatewayAddress:
    return GatewayAddress(NamespacedHostname(namespace, f"{name}.{namespace}.svc.cluster.local"), 15008)


def waypoint_of(translation: Translation, name: str = "web") -> GatewayAddress | None:
    return translation.services[f"shop/{name}.shop.svc.cluster.local"].waypoint


def condition_of(translation: Translation, kind: str = "Service", name: str = "web") -> Condition | None:
    entries = translation.statuses.get(ObjectKey(kind, "shop", name), ())
    assert all(isinstance(entry, Condition) for entry in entries)
    return next((entry for entry in entries if isinstance(entry, Condition)), None)


USE = "labels: {istio.io/use-waypoint: waypoint}"
REQUIRED = 'annotations: {ambient.mesh/waypoint-required: "true"}'


# 1: the set


def test_without_a_label_nothing_has_a_waypoint() -> None:
    found = told(namespace(), gateway(), service(), pod())
    assert waypoint_of(found) is None
    assert all(workload.waypoint is None for workload in found.workloads.values())
    assert condition_of(found) is None


def test_a_labelled_service_has_the_waypoint_by_its_hostname() -> None:
    found = told(namespace(), gateway(), service(metadata=USE))
    assert waypoint_of(found) == at()
    assert condition_of(found) == Condition(
        "istio.io/WaypointBound", True, "WaypointAccepted", "Successfully attached to waypoint shop/waypoint"
    )


def test_a_gateway_of_any_class_is_a_waypoint_once_it_has_an_address() -> None:
    found = told(namespace(), gateway().replace("istio-waypoint", "somebody-elses"), service(metadata=USE))
    assert waypoint_of(found) == at()


@pytest.mark.parametrize("there", ["", gateway(ready=False)], ids=["missing", "without an address"])
def test_a_waypoint_that_is_not_ready_is_passed_by(there: str) -> None:
    found = told(namespace(), there, service(metadata=USE))
    assert waypoint_of(found) is None
    assert condition_of(found) == Condition("istio.io/WaypointBound", False, "WaypointIsNotReady", 'waypoint "shop/waypoint" is not ready')


def test_a_label_that_asks_in_vain_is_a_problem_where_it_stands_and_once() -> None:
    waiting = 'metadata.labels["istio.io/use-waypoint"]: there is no Gateway shop/waypoint, and traffic goes directly'
    (own,) = told(namespace(), service(metadata=USE)).problems
    (inherited,) = told(namespace(metadata=USE), service(), service("other").replace("10.96.1.1", "10.96.1.2")).problems
    assert [str(problem).partition(": ")[2] for problem in (own, inherited)] == [waiting] * 2
    assert inherited.line < own.line, "the namespace stands first"
    workloads_alone = gateway(metadata="labels: {istio.io/waypoint-for: workload}")
    assert told(namespace(metadata=USE), workloads_alone, service()).problems == ()
    assert told(namespace(), workloads_alone, service(metadata=USE)).problems != ()


# 2: traffic type


@pytest.mark.parametrize(
    ("label", "services", "workloads"),
    [
        ("", True, False),
        ("service", True, False),
        ("workload", False, True),
        ("all", True, True),
        ("none", False, False),
        ("x", False, False),
    ],
)
def test_a_waypoint_takes_the_traffic_it_is_for(label: str, services: bool, workloads: bool) -> None:
    metadata = f"labels: {{istio.io/waypoint-for: {label}}}" if label else ""
    found = told(namespace(), gateway(metadata=metadata), service(metadata=USE), pod(metadata=USE))
    assert waypoint_of(found) == (at() if services else None)
    assert found.workloads["Kubernetes//Pod/shop/web-1"].waypoint == (at() if workloads else None)
    if not services:
        message = 'attempting to bind to traffic type "service" which the waypoint "shop/waypoint" does not support'
        assert condition_of(found) == Condition("istio.io/WaypointBound", False, "UnsupportedTrafficType", message)


CLASS = """
---
apiVersion: gateway.networking.k8s.io/v1
kind: GatewayClass
metadata: {name: istio-waypoint, labels: {istio.io/waypoint-for: workload}}
spec: {controllerName: istio.io/mesh-controller}
"""


def test_the_class_says_what_a_waypoint_is_for_where_it_does_not_itself() -> None:
    assert waypoint_of(told(namespace(), CLASS, gateway(), service(metadata=USE))) is None
    of_its_own = gateway(metadata="labels: {istio.io/waypoint-for: service}")
    assert waypoint_of(told(namespace(), CLASS, of_its_own, service(metadata=USE))) == at()


# 3: address


@pytest.mark.parametrize(("address", "expected"), [
    ("[{type: IPAddress, value: 10.96.0.9}]", GatewayAddress(NetworkAddress("", ip_address("10.96.0.9")), 15008)),
    ("[{type: IPAddress, value: 'fd00::9'}, {value: 10.96.0.9}]", GatewayAddress(NetworkAddress("", ip_address("fd00::9")), 15008)),
    ("[{value: 10.96.0.9}, {type: Hostname, value: gw.example}]", GatewayAddress(NamespacedHostname("shop", "gw.example"), 15008)),
    ("[{type: IPAddress, value: rubbish}]", None),
    ("[{type: example.com/other, value: here}]", None),
])  # fmt: skip
def test_a_hostname_is_used_before_addresses_and_what_is_neither_is_none(address: str, expected: GatewayAddress | None) -> None:
    assert waypoint_of(told(namespace(), gateway(addresses=address), service(metadata=USE))) == expected


# 4, 6: who may attach


SELECTOR = "allowedRoutes: {namespaces: {from: Selector, selector: "


@pytest.mark.parametrize(("allowed", "labels", "admitted"), [
    ("", "", False),
    ("allowedRoutes: {namespaces: {from: Same}}", "", False),
    ("allowedRoutes: {namespaces: {from: None}}", "", False),
    ("allowedRoutes: {namespaces: {from: All}}", "", True),
    (SELECTOR + "{matchLabels: {team: a}}}}", "team: a", True),
    (SELECTOR + "{matchLabels: {team: a}}}}", "team: b", False),
    (SELECTOR + "{matchExpressions: [{key: team, operator: In, values: [a, b]}]}}}", "team: b", True),
    (SELECTOR + "{matchExpressions: [{key: team, operator: NotIn, values: [a]}]}}}", "", True),
    (SELECTOR + "{matchExpressions: [{key: team, operator: Exists}]}}}", "", False),
    (SELECTOR + "{matchExpressions: [{key: team, operator: DoesNotExist}]}}}", "", True),
    ("allowedRoutes: {namespaces: {from: Selector}}", "team: a", False),
])  # fmt: skip
@pytest.mark.parametrize("level", ["service", "namespace"])
def test_the_listener_says_from_which_namespaces_something_may_attach(allowed: str, labels: str, admitted: bool, level: str) -> None:
    use = "istio.io/use-waypoint: waypoint, istio.io/use-waypoint-namespace: infra"
    on_namespace = ", ".join(filter(None, [labels, use if level == "namespace" else ""]))
    found = told(
        namespace(metadata=f"labels: {{{on_namespace}}}"),
        namespace("infra"),
        gateway(namespace="infra", listener=allowed),
        service(metadata=f"labels: {{{use}}}" if level == "service" else ""),
    )
    assert waypoint_of(found) == (at(namespace="infra") if admitted else None)
    if not admitted:
        message = 'we are not permitted to attach to waypoint "infra/waypoint" (missing allowedRoutes?)'
        assert condition_of(found) == Condition("istio.io/WaypointBound", False, "AttachmentDenied", message)


BOUND = """
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: waypoint, namespace: infra, annotations: {ambient.istio.io/waypoint-inbound-binding: BINDING}}
spec:
  gatewayClassName: sandwich
  listeners:
  - {name: mesh, port: 15008, protocol: HBONE, allowedRoutes: {namespaces: {from: Same}}}
  - {name: proxy, port: 15088, protocol: istio.io/PROXY, allowedRoutes: {namespaces: {from: All}}}
  - {name: plain, port: 8080, protocol: HTTP, allowedRoutes: {namespaces: {from: All}}}
status: {addresses: [{type: Hostname, value: waypoint.infra.svc.cluster.local}]}
"""


@pytest.mark.parametrize(("binding", "admitted", "tunnel"), [
    ("PROXY", True, ApplicationTunnel(TunnelApplicationProtocol.PROXY, None)),
    ("PROXY/15088", True, ApplicationTunnel(TunnelApplicationProtocol.PROXY, 15088)),
    ("NONE/8080", True, ApplicationTunnel(TunnelApplicationProtocol.NONE, 8080)),
    ("NONE", False, ApplicationTunnel(TunnelApplicationProtocol.NONE, None)),
    ("PROXY/99999", False, None),
    ("TLS/1", False, None),
])  # fmt: skip
def test_the_bound_listener_decides_and_the_pods_are_handed_connections_as_it_says(
    binding: str, admitted: bool, tunnel: ApplicationTunnel | None
) -> None:
    use = "labels: {istio.io/use-waypoint: waypoint, istio.io/use-waypoint-namespace: infra}"
    own = pod("gw", "labels: {gateway.networking.k8s.io/gateway-name: waypoint}", "infra")
    found = told(namespace(), namespace("infra"), BOUND.replace("BINDING", binding), service(metadata=use), own)
    assert waypoint_of(found) == (at(namespace="infra") if admitted else None)
    assert found.workloads["Kubernetes//Pod/infra/gw"].application_tunnel == tunnel


# 5: precedence

NAMESPACE_USES = "labels: {istio.io/use-waypoint: waypoint}"


def test_a_namespace_lends_its_waypoint_to_all_its_services() -> None:
    found = told(namespace(metadata=NAMESPACE_USES), gateway(), service(), service("other"))
    assert waypoint_of(found) == waypoint_of(found, "other") == at()


def test_the_objects_own_label_goes_before_its_namespaces() -> None:
    own = "labels: {istio.io/use-waypoint: own}"
    found = told(namespace(metadata=NAMESPACE_USES), gateway(), gateway("own"), service(metadata=own), service("other"))
    assert (waypoint_of(found), waypoint_of(found, "other")) == (at("own"), at())


def test_none_opts_out_and_is_no_mistake() -> None:
    found = told(namespace(metadata=NAMESPACE_USES), gateway(), service(metadata="labels: {istio.io/use-waypoint: none}"))
    assert waypoint_of(found) is None
    assert condition_of(found) is None


def test_what_the_object_names_is_not_replaced_by_what_its_namespace_names() -> None:
    own = "labels: {istio.io/use-waypoint: missing}"
    found = told(namespace(metadata=NAMESPACE_USES), gateway(), service(metadata=own))
    assert waypoint_of(found) is None
    assert condition_of(found) == Condition("istio.io/WaypointBound", False, "WaypointIsNotReady", 'waypoint "shop/missing" is not ready')


def test_a_namespaces_waypoint_for_services_alone_is_no_mistake_of_its_workloads() -> None:
    entry = """
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: vm, namespace: shop}
spec: {address: 192.0.2.7}
"""
    found = told(namespace(metadata=NAMESPACE_USES), gateway(), entry)
    assert condition_of(found, "WorkloadEntry", "vm") is None
    labelled = entry.replace("namespace: shop", "namespace: shop, labels: {istio.io/use-waypoint: waypoint}")
    message = 'attempting to bind to traffic type "workload" which the waypoint "shop/waypoint" does not support'
    found = told(namespace(metadata=NAMESPACE_USES), gateway(), labelled)
    assert condition_of(found, "WorkloadEntry", "vm") == Condition("istio.io/WaypointBound", False, "UnsupportedTrafficType", message)
    found = told(namespace(), gateway(metadata="labels: {istio.io/waypoint-for: all}"), labelled)
    assert found.workloads["Kubernetes/networking.istio.io/WorkloadEntry/shop/vm"].waypoint == at()
    assert condition_of(found, "WorkloadEntry", "vm") == Condition(
        "istio.io/WaypointBound", True, "WaypointAccepted", "Successfully attached to waypoint shop/waypoint"
    )


def test_an_endpoint_of_a_service_entry_is_bound_by_its_own_labels() -> None:
    entry = """
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: out, namespace: shop, labels: {istio.io/use-waypoint: none}}
spec:
  hosts: [out.example]
  ports: [{number: 80, name: http, protocol: HTTP}]
  resolution: STATIC
  endpoints:
  - {address: 192.0.2.1, labels: {istio.io/use-waypoint: waypoint}}
  - {address: 192.0.2.2}
"""
    found = told(namespace(), gateway(metadata="labels: {istio.io/waypoint-for: workload}"), entry)
    uid = "Kubernetes/networking.istio.io/ServiceEntry/shop/out"
    assert found.workloads[f"{uid}/192.0.2.1"].waypoint == at()
    assert found.workloads[f"{uid}/192.0.2.2"].waypoint is None


# 7: waypoints themselves


@pytest.mark.parametrize("manager", ["istio.io-mesh-controller", "istio.io-eastwest-controller"])
def test_a_gateway_of_the_mesh_has_no_waypoint(manager: str) -> None:
    managed = f"labels: {{gateway.istio.io/managed: {manager}, istio.io/use-waypoint: waypoint}}"
    all_traffic = gateway(metadata="labels: {istio.io/waypoint-for: all}")
    found = told(namespace(metadata=NAMESPACE_USES), all_traffic, service(metadata=managed), pod(metadata=managed), pod("web-2"))
    assert waypoint_of(found) is None
    assert found.workloads["Kubernetes//Pod/shop/web-1"].waypoint is None
    assert found.workloads["Kubernetes//Pod/shop/web-2"].waypoint == at()


def test_a_pod_of_somebodys_own_waypoint_has_none_either() -> None:
    mine = pod(metadata="labels: {gateway.networking.k8s.io/gateway-name: waypoint}")
    found = told(namespace(metadata=NAMESPACE_USES), gateway(metadata="labels: {istio.io/waypoint-for: all}"), mine)
    assert found.workloads["Kubernetes//Pod/shop/web-1"].waypoint is None


# 8: canaries


def canary(weight: str | None = "30", name: str = "next", use: str = "waypoint") -> str:
    annotations = f", annotations: {{istio.io/use-waypoint-canary-weight: '{weight}'}}" if weight is not None else ""
    primary = f"istio.io/use-waypoint: {use}, " if use else ""
    return f"labels: {{{primary}istio.io/use-waypoint-canary: {name}}}{annotations}"


def weights(translation: Translation, name: str = "web") -> tuple[WeightedWaypoint, ...]:
    return translation.services[f"shop/{name}.shop.svc.cluster.local"].weighted_waypoints


@pytest.mark.parametrize(("weight", "share"), [("30", 30), ("0", 0), ("100", 100), (None, 0)])
def test_a_canary_gets_its_share(weight: str | None, share: int) -> None:
    found = told(namespace(), gateway(), gateway("next"), service(metadata=canary(weight)))
    assert weights(found) == (WeightedWaypoint(at(), 100 - share), WeightedWaypoint(at("next"), share))
    assert waypoint_of(found) == at()


@pytest.mark.parametrize("level", ["own", "inherited", "inherited with a canary of its own", "own beside the namespace's canary"])
def test_a_canary_counts_at_the_level_of_its_primary(level: str) -> None:
    on_namespace = canary() if level != "own" else ""
    on_service = {
        "own": canary(),
        "inherited": "",
        "inherited with a canary of its own": canary("10", "other", use=""),
        "own beside the namespace's canary": USE,
    }[level]
    found = told(namespace(metadata=on_namespace), gateway(), gateway("next"), gateway("other"), service(metadata=on_service))
    expected = {
        "own": (WeightedWaypoint(at(), 70), WeightedWaypoint(at("next"), 30)),
        "inherited": (WeightedWaypoint(at(), 70), WeightedWaypoint(at("next"), 30)),
        "inherited with a canary of its own": (WeightedWaypoint(at(), 90), WeightedWaypoint(at("other"), 10)),
        "own beside the namespace's canary": (),
    }[level]
    assert weights(found) == expected


@pytest.mark.parametrize(("metadata", "because"), [
    (canary("101"), 'canary waypoint "shop/next" has an invalid weight; must be an integer in [0,100]'),
    (canary("-1"), 'canary waypoint "shop/next" has an invalid weight; must be an integer in [0,100]'),
    (canary("1.5"), 'canary waypoint "shop/next" has an invalid weight; must be an integer in [0,100]'),
    (canary("30", "waypoint"), 'canary waypoint "shop/waypoint" must differ from the primary waypoint'),
    (canary("30", "missing"), 'waypoint "shop/missing" is not ready'),
])  # fmt: skip
def test_a_canary_that_cannot_be_leaves_all_to_the_primary(metadata: str, because: str) -> None:
    found = told(namespace(), gateway(), gateway("next"), service(metadata=metadata))
    assert weights(found) == ()
    assert waypoint_of(found) == at()
    message = f"Successfully attached to waypoint shop/waypoint. Canary waypoint not attached: {because}"
    assert condition_of(found) == Condition("istio.io/WaypointBound", True, "WaypointAccepted", message)


# 9: what is seen in its own namespace alone


def test_an_entry_seen_in_its_own_namespace_alone_has_no_waypoint_elsewhere() -> None:
    entry = """
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata:
  {name: out, namespace: shop, labels: {istio.io/use-waypoint: waypoint, istio.io/use-waypoint-namespace: infra}}
spec: {hosts: [out.example], exportTo: ['.'], ports: [{number: 80, name: http, protocol: HTTP}], resolution: DNS}
"""
    elsewhere = gateway(namespace="infra", listener="allowedRoutes: {namespaces: {from: All}}")
    found = told(namespace(), namespace("infra"), elsewhere, entry)
    assert found.services["shop/out.example"].waypoint is None
    message = (
        'cannot bind to waypoint "infra/waypoint" in another namespace: cross-namespace waypoint binding is not permitted for a '
        "ServiceEntry with NAMESPACE visibility"
    )
    expected = Condition("istio.io/WaypointBound", False, "CrossNamespaceWaypointForbidden", message)
    assert condition_of(found, "ServiceEntry", "out") == expected
    public = entry.replace("exportTo: ['.'], ", "")
    assert told(namespace(), namespace("infra"), elsewhere, public).services["shop/out.example"].waypoint == at(namespace="infra")


# 2.11: the words


@pytest.mark.parametrize(("label", "tail"), [
    ("istio.io/ingress-use-waypoint: 'true'", ". Ingress traffic will traverse the waypoint"),
    (
        "istio.io/ingress-use-waypoint: 'yes'",
        ". Ingress traffic is not using the waypoint, set the istio.io/ingress-use-waypoint label to true if desired.",
    ),
])  # fmt: skip
@pytest.mark.parametrize("level", ["service", "namespace"])
def test_the_condition_says_what_becomes_of_ingress_where_somebody_asked(label: str, tail: str, level: str) -> None:
    labels = f"labels: {{istio.io/use-waypoint: waypoint, {label}}}"
    found = told(
        namespace(metadata=labels if level == "namespace" else ""), gateway(), service(metadata=labels if level == "service" else "")
    )
    condition = condition_of(found)
    assert condition is not None
    assert condition.message == f"Successfully attached to waypoint shop/waypoint{tail}"


def test_a_condition_that_no_longer_applies_is_withdrawn() -> None:
    stale = service() + "status: {conditions: [{type: istio.io/WaypointBound, status: 'True'}]}\n"
    assert told(namespace(), gateway(), stale).statuses == {ObjectKey("Service", "shop", "web"): ()}


# Ours: required


@pytest.mark.parametrize("there", ["", gateway(ready=False)], ids=["missing", "without an address"])
@pytest.mark.parametrize("level", ["service", "namespace"])
def test_traffic_that_must_pass_a_waypoint_is_sent_to_it_though_it_is_not_ready(there: str, level: str) -> None:
    on_service = f"{USE}, {REQUIRED}" if level == "service" else ""
    on_namespace = f"{NAMESPACE_USES}, {REQUIRED}" if level == "namespace" else ""
    found = told(namespace(metadata=on_namespace), there, service(metadata=on_service))
    assert waypoint_of(found) == at()
    condition = condition_of(found)
    assert condition is not None
    assert (condition.status, condition.reason) == (False, "WaypointIsNotReady")
    assert condition.message == 'waypoint "shop/waypoint" is not ready. Traffic is refused, as ambient.mesh/waypoint-required asks for'


def test_what_may_never_be_used_is_named_so_that_it_can_become_nobodys_service() -> None:
    use = "labels: {istio.io/use-waypoint: waypoint, istio.io/use-waypoint-namespace: infra}"
    found = told(namespace(), namespace("infra"), gateway(namespace="infra"), service(metadata=f"{use}, {REQUIRED}"))
    assert waypoint_of(found) == GatewayAddress(NamespacedHostname("infra", "attachment-denied.waypoint.infra.invalid"), 15008)


def test_an_object_may_do_without_what_its_namespace_requires() -> None:
    found = told(
        namespace(metadata=f"{NAMESPACE_USES}, {REQUIRED}"),
        service(metadata="annotations: {ambient.mesh/waypoint-required: 'false'}"),
        service("out", "labels: {istio.io/use-waypoint: none}"),
    )
    assert (waypoint_of(found), waypoint_of(found, "out")) == (None, None)


def test_a_namespace_that_requires_a_waypoint_for_services_does_not_cut_off_its_pods() -> None:
    found = told(namespace(metadata=f"{NAMESPACE_USES}, {REQUIRED}"), pod())
    assert found.workloads["Kubernetes//Pod/shop/web-1"].waypoint is None


STRICTLY = REQUIRED.replace('"true"', "strict")
GUARD = "shop/waypoint_required_by_web"
WEB_POD = "labels: {app: web}"


def guard(found: Translation) -> list[str] | None:
    """Whom the pods let in, where they let in nobody else."""
    named = found.workloads["Kubernetes//Pod/shop/web-1"].authorization_policies
    assert (GUARD in named) is (GUARD in found.policies)
    if GUARD not in named:
        return None
    policy = found.policies[GUARD]
    assert (policy.action, policy.scope, policy.dry_run) == (Action.DENY, Scope.WORKLOAD_SELECTOR, False)
    ((match,),) = [clause.matches for clause in policy.rules[0].clauses]
    assert match == Match(not_principals=match.not_principals)
    return [each.value for each in match.not_principals if isinstance(each, Exact)]


@pytest.mark.parametrize("level", ["service", "namespace"])
@pytest.mark.parametrize("ready", [True, False])
def test_who_requires_its_waypoint_strictly_lets_nobody_else_in(level: str, ready: bool) -> None:
    on_service = f"{USE}, {STRICTLY}" if level == "service" else ""
    on_namespace = f"{NAMESPACE_USES}, {STRICTLY}" if level == "namespace" else ""
    found = told(namespace(metadata=on_namespace), gateway(ready=ready), service(metadata=on_service), pod(metadata=WEB_POD), pod("b"))
    assert guard(found) == ["cluster.local/ns/shop/sa/waypoint"]
    assert waypoint_of(found) == at(), "and clients go there, as always where it is required"
    assert found.workloads["Kubernetes//Pod/shop/b"].authorization_policies == ()


@pytest.mark.parametrize("metadata", [USE, f"{USE}, {REQUIRED}", STRICTLY, f"labels: {{istio.io/use-waypoint: none}}, {STRICTLY}"])
def test_who_does_not_require_one_strictly_lets_in_whom_it_did(metadata: str) -> None:
    assert guard(told(namespace(), gateway(), service(metadata=metadata), pod(metadata=WEB_POD))) is None


def test_a_canary_and_a_service_account_of_another_name_are_let_in() -> None:
    named = gateway().replace("metadata: {", "metadata: {annotations: {gateway.istio.io/service-account: way}, ")
    metadata = canary().replace("annotations: {", "annotations: {ambient.mesh/waypoint-required: strict, ")
    found = told(namespace(), named, gateway("next"), service(metadata=metadata), pod(metadata=WEB_POD))
    assert guard(found) == ["cluster.local/ns/shop/sa/way", "cluster.local/ns/shop/sa/next"]


UNCLEAR = REQUIRED.replace("true", "True")
UNCLEAR_IS_TOLD = (
    "metadata.annotations[\"ambient.mesh/waypoint-required\"]: expected 'true', 'strict' or 'false', found 'True': it counts as 'true'"
)


@pytest.mark.parametrize("level", ["service", "namespace"])
def test_a_requirement_that_is_neither_true_nor_false_holds_and_is_told(level: str) -> None:
    texts = (
        namespace(metadata=f"{NAMESPACE_USES}, {UNCLEAR}" if level == "namespace" else ""),
        gateway(ready=False),
        service(metadata=f"{USE}, {UNCLEAR}" if level == "service" else ""),
    )
    assert waypoint_of(told(*texts)) == at()
    assert problems_of(*texts) == [UNCLEAR_IS_TOLD]


@pytest.mark.parametrize("level", ["namespace", "pod"])
def test_an_unclear_requirement_is_told_where_no_label_asks_for_a_waypoint(level: str) -> None:
    texts = namespace(metadata=UNCLEAR if level == "namespace" else ""), pod(metadata=UNCLEAR if level == "pod" else "")
    assert problems_of(*texts) == [UNCLEAR_IS_TOLD]


@pytest.mark.parametrize("kind", ["Namespace", "Service", "Pod", "WorkloadEntry", "ServiceEntry", "Gateway"])
def test_a_misspelt_annotation_of_ours_is_told_and_harms_nothing(kind: str) -> None:
    misspelt = "annotations: {ambient.mesh/waypoint-requierd: 'true', ambient.mesh/netns: /run/netns/web, else.mesh/x: a}"
    texts = {
        "Namespace": namespace(metadata=misspelt),
        "Service": service(metadata=misspelt),
        "Pod": pod(metadata=misspelt),
        "WorkloadEntry": (
            f"---\napiVersion: networking.istio.io/v1\nkind: WorkloadEntry\nmetadata: {{name: vm, namespace: shop, {misspelt}}}\n"
            "spec: {address: 10.9.9.9}\n"
        ),
        "ServiceEntry": (
            f"---\napiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: out, namespace: shop, {misspelt}}}\n"
            "spec: {hosts: [out.test], ports: [{number: 80, name: http, protocol: HTTP}], resolution: DNS}\n"
        ),
        "Gateway": gateway(metadata=misspelt),
    }
    found = told(texts[kind])
    assert [f"{problem.field}: {problem.message}" for problem in found.problems] == [
        'metadata.annotations["ambient.mesh/waypoint-requierd"]: no effect: there is no such annotation; '
        "did you mean 'ambient.mesh/waypoint-required'?"
    ]
    assert told(texts[kind], before=found).problems == found.problems, "as long as it is there"


@pytest.mark.parametrize("name", ["foo", "enabled"])
def test_an_annotation_that_is_like_none_is_told_with_those_there_are(name: str) -> None:
    (problem,) = told(gateway(metadata=f"annotations: {{ambient.mesh/{name}: a}}")).problems
    assert "did you mean" not in problem.message
    assert "(known: " in problem.message


@pytest.mark.parametrize(("name", "message"), [("waypoint-required", "it is an annotation, no label"), ("mode", "there is no such label")])
def test_a_label_of_ours_is_told_for_there_are_none(name: str, message: str) -> None:
    text = service(metadata=f"labels: {{ambient.mesh/{name}: a}}")
    assert problems_of(namespace(), text) == [f'metadata.labels["ambient.mesh/{name}"]: no effect: {message}']


# What a change costs


def test_a_change_of_a_waypoint_remakes_what_it_stands_before_and_nothing_else() -> None:
    objects = namespace(), gateway(), gateway("next"), service(metadata=USE), service("other"), pod()
    before = told(*objects, namespace("infra"))
    again = translate(objects_from_yaml("".join(objects), namespaces=("infra",))[0], before, Config())
    assert again.services == before.services
    moved = gateway().replace("10.96.0.9", "10.96.0.10").replace("svc.cluster.local", "example")
    after = told(namespace(), moved, *objects[2:], before=before)
    assert waypoint_of(after) != waypoint_of(before)
    changed = {key for key in after.services if after.services[key] != before.services[key]}
    assert changed == {"shop/web.shop.svc.cluster.local"}


# What is told of labels that lead nowhere


def problems_of(*texts: str) -> list[str]:
    return [f"{problem.field}: {problem.message}" for problem in told(*texts).problems]


LABEL = 'metadata.labels["istio.io/use-waypoint"]: '
WRONG = "labels: {istio.io/use-waypoint: waypiont}"


@pytest.mark.parametrize(
    "texts",
    [
        (namespace(metadata=WRONG), gateway(), service(), service("other"), pod()),
        (namespace(), gateway(), service(metadata=WRONG), pod()),
        (namespace(), gateway(), service(), pod(metadata=WRONG)),
    ],
    ids=["namespace", "service", "pod"],
)
def test_a_label_that_names_no_gateway_is_told_once_where_it_stands(texts: tuple[str, ...]) -> None:
    message = "there is no Gateway shop/waypiont, and traffic goes directly; did you mean 'waypoint'?"
    assert problems_of(*texts) == [LABEL + message]


def test_a_label_that_names_no_gateway_says_that_traffic_is_refused_where_it_is() -> None:
    both = f"{USE}, {REQUIRED}"
    assert problems_of(namespace(metadata=both), service()) == [f"{LABEL}there is no Gateway shop/waypoint, and traffic is refused"]


def test_a_waypoint_of_another_namespace_that_the_label_may_have_meant_is_named() -> None:
    message = (
        "there is no Gateway shop/waypoint, and traffic goes directly; there is one in namespace infra, which the label "
        "istio.io/use-waypoint-namespace would name"
    )
    assert problems_of(namespace(metadata=USE), gateway(namespace="infra"), service()) == [LABEL + message]


def test_a_waypoint_that_does_not_let_the_namespace_in_is_a_mistake_of_the_label() -> None:
    there = "labels: {istio.io/use-waypoint: waypoint, istio.io/use-waypoint-namespace: infra}"
    message = 'no effect: we are not permitted to attach to waypoint "infra/waypoint" (missing allowedRoutes?)'
    assert problems_of(namespace(metadata=there), gateway(namespace="infra"), service()) == [LABEL + message]


def test_a_waypoint_for_other_traffic_is_a_mistake_of_a_service_and_none_of_a_namespace() -> None:
    workloads = gateway(metadata="labels: {istio.io/waypoint-for: workload}")
    message = 'no effect: attempting to bind to traffic type "service" which the waypoint "shop/waypoint" does not support'
    assert problems_of(namespace(), workloads, service(metadata=USE)) == [LABEL + message]
    assert problems_of(namespace(metadata=USE), workloads, service(), pod()) == []


def test_a_waypoint_that_is_on_its_way_is_no_mistake() -> None:
    assert problems_of(namespace(metadata=USE), gateway(ready=False), service(), pod()) == []


def test_a_gateway_of_a_class_that_nobody_has_is_told() -> None:
    message = "there is no GatewayClass istio-waypiont: nobody makes anything of this Gateway; did you mean 'istio-waypoint'?"
    assert problems_of(gateway().replace("istio-waypoint", "istio-waypiont")) == [f"spec.gatewayClassName: {message}"]
    assert problems_of(gateway()) == []


def test_a_waypoint_for_a_traffic_that_is_none_is_told() -> None:
    message = "'servce' is no type of traffic: the waypoint gets none; did you mean 'service'?"
    labelled = gateway(metadata="labels: {istio.io/waypoint-for: servce}")
    assert problems_of(labelled) == [f'metadata.labels["istio.io/waypoint-for"]: {message}']


CANARY = 'metadata.labels["istio.io/use-waypoint-canary"]: no effect: '
WEIGHT = 'metadata.annotations["istio.io/use-waypoint-canary-weight"]: no effect: '


@pytest.mark.parametrize(("metadata", "problem"), [
    (canary("101"), WEIGHT + 'canary waypoint "shop/next" has an invalid weight; must be an integer in [0,100]'),
    (canary("30", "waypoint"), CANARY + 'canary waypoint "shop/waypoint" must differ from the primary waypoint'),
    (canary("30", "missing"), CANARY + 'waypoint "shop/missing" is not ready'),
    (canary(), None),
])  # fmt: skip
def test_a_canary_that_cannot_be_is_told_where_it_is_asked_for(metadata: str, problem: str | None) -> None:
    expected = [problem] if problem is not None else []
    gateways = gateway(), gateway("next")
    assert problems_of(namespace(), *gateways, service(metadata=metadata)) == expected
    assert problems_of(namespace(metadata=metadata), *gateways, service()) == expected

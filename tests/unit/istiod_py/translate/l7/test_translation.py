"""The whole of translation for waypoints: objects in, what each waypoint is told and what is said of each object out."""

from __future__ import annotations

import textwrap
from typing import TypeVar

import pytest

from istiod_py.snapshot import diff
from istiod_py.translate import AncestorStatus, Condition, Config, Translation, translate
from istiod_py.translate.l7.assemble import L7Key
from istiod_py.translate.l7.authentication import NO_KEYS, KeySets, KeySource
from mesh.kube.objects import ObjectKey
from mesh.model.l7.destination import DestinationConfig
from mesh.model.l7.policy import AuthorizationPolicy, ExtAuthzHttp, PolicyAction, RequestAuthentication
from mesh.model.l7.routing import Forward, Retry
from mesh.model.l7.waypoint import PathNormalization, ServiceConfig, WaypointSettings
from mesh.testing.objects import objects_from_yaml

T = TypeVar("T")

SERVICES = """
apiVersion: v1
kind: Namespace
metadata: {name: gates}
---
apiVersion: v1
kind: Namespace
metadata: {name: istio-system}
---
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio.io/use-waypoint: waypoint}}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: waypoint, namespace: shop}
spec: {gatewayClassName: istio-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE}]}
status: {addresses: [{type: Hostname, value: waypoint.shop.svc.cluster.local}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: common, namespace: gates}
spec:
  gatewayClassName: istio-waypoint
  listeners: [{name: mesh, port: 15008, protocol: HBONE, allowedRoutes: {namespaces: {from: All}}}]
status: {addresses: [{type: Hostname, value: common.gates.svc.cluster.local}]}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec: {clusterIP: 10.96.1.1, selector: {app: web}, ports: [{name: http, port: 80}]}
---
apiVersion: v1
kind: Service
metadata:
  name: far
  namespace: shop
  labels: {istio.io/use-waypoint: common, istio.io/use-waypoint-namespace: gates}
spec: {clusterIP: 10.96.1.2, ports: [{name: http, port: 80}]}
---
apiVersion: v1
kind: Pod
metadata: {name: web-1, namespace: shop, labels: {app: web, version: v1}}
spec: {nodeName: n1, containers: [{name: a}]}
status: {phase: Running, podIP: 10.244.1.9}
---
apiVersion: v1
kind: Pod
metadata: {name: waypoint-0, namespace: shop, labels: {gateway.networking.k8s.io/gateway-name: waypoint, rack: r7}}
spec: {nodeName: n1, containers: [{name: a}]}
status: {phase: Running, podIP: 10.244.1.8}
"""
WEB, FAR = "shop/web.shop.svc.cluster.local", "shop/far.shop.svc.cluster.local"
WAYPOINT, COMMON = "shop/waypoint", "gates/common"
TO_WEB = '[{kind: Service, group: "", name: web}]'


def translated(*texts: str, before: Translation | None = None, key_sets: KeySets | None = None) -> Translation:
    objects, problems = objects_from_yaml("\n---\n".join((SERVICES, *texts)))
    assert not [problem for problem in problems if not problem.field.startswith("spec.")]
    return translate(objects, before, Config(), key_sets or KeySets())


def mesh_config(text: str) -> str:
    indented = textwrap.indent(textwrap.dedent(text).strip(), "    ")
    return f"apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: istio, namespace: istio-system}}\ndata:\n  mesh: |\n{indented}\n"


def istio(kind: str, spec: str, name: str = "it", namespace: str = "shop") -> str:
    group = "networking" if kind in ("DestinationRule", "VirtualService") else "security"
    return f"apiVersion: {group}.istio.io/v1\nkind: {kind}\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec: {spec}\n"


def told(found: Translation, kind: type[T], key: str, waypoint: str = WAYPOINT) -> T:
    resource = found.l7[L7Key(waypoint, kind.__name__, key)]
    assert isinstance(resource, kind)
    return resource


def retry_of(found: Translation) -> Retry | None:
    (port,) = told(found, ServiceConfig, WEB).ports
    (route,) = port.routes
    assert isinstance(route.action, Forward)
    return route.retry


# The mesh's configuration


def test_the_meshs_retries_are_those_of_routes_that_say_nothing() -> None:
    usual = retry_of(translated())
    assert usual is not None
    assert usual.attempts == 2
    more = retry_of(translated(mesh_config("defaultHttpRetryPolicy: {attempts: 5, retryOn: 5xx}")))
    assert more is not None
    assert more.attempts == 5
    assert retry_of(translated(mesh_config("defaultHttpRetryPolicy: {attempts: 0}"))) is None


def test_a_waypoint_is_told_what_holds_for_the_whole_mesh_and_the_last_good_of_it_with_a_mistake() -> None:
    good = translated(mesh_config("pathNormalization: {normalization: MERGE_SLASHES}\ntrustDomainAliases: [old.example]"))
    settings = told(good, WaypointSettings, WAYPOINT)
    assert settings.path_normalization is PathNormalization.MERGE_SLASHES
    assert settings.trust_domains == ("cluster.local", "old.example")
    bad = translated(mesh_config("pathNormalization: {normalization: SOMETIMES}"), before=good)
    assert told(bad, WaypointSettings, WAYPOINT) == settings
    assert any("pathNormalization" in problem.field for problem in bad.problems)
    gone = translated(before=bad)
    assert told(gone, WaypointSettings, WAYPOINT).path_normalization is PathNormalization.BASE


def test_rules_are_seen_from_where_the_mesh_exports_them_to() -> None:
    rule = istio("DestinationRule", "{host: far.shop.svc.cluster.local, subsets: [{name: v1, labels: {version: v1}}]}")
    assert told(translated(rule), DestinationConfig, FAR, COMMON).subsets
    assert not told(translated(rule, mesh_config('defaultDestinationRuleExportTo: ["."]')), DestinationConfig, FAR, COMMON).subsets


def test_an_authorizer_of_the_mesh_is_named_by_policies_and_told_as_a_destination() -> None:
    providers = mesh_config("extensionProviders: [{name: guard, envoyExtAuthzHttp: {service: shop/far.shop.svc.cluster.local, port: 80}}]")
    policy = istio("AuthorizationPolicy", f"{{targetRefs: {TO_WEB}, action: CUSTOM, provider: {{name: guard}}, rules: [{{}}]}}")
    found = translated(providers, policy)
    made = told(found, AuthorizationPolicy, "AuthorizationPolicy/shop/it")
    assert isinstance(made.provider, ExtAuthzHttp)
    assert (made.action, made.provider.hostname) == (PolicyAction.CUSTOM, "far.shop.svc.cluster.local")
    assert told(found, DestinationConfig, FAR)
    without = translated(policy, before=found)
    assert told(without, AuthorizationPolicy, "AuthorizationPolicy/shop/it").provider is None


# Destinations


def test_a_rule_of_the_waypoints_own_namespace_goes_before_that_of_the_service() -> None:
    def rule(subset: str, namespace: str) -> str:
        spec = f"{{host: far.shop.svc.cluster.local, subsets: [{{name: {subset}, labels: {{version: v1}}}}]}}"
        return istio("DestinationRule", spec, namespace=namespace)

    near, there = rule("near", "gates"), rule("there", "shop")
    to_far = istio("VirtualService", "{hosts: [web], http: [{route: [{destination: {host: far}}]}]}")
    found = translated(near, there, to_far)
    assert [subset.name for subset in told(found, DestinationConfig, FAR, COMMON).subsets] == ["near"]
    assert [subset.name for subset in told(found, DestinationConfig, FAR, WAYPOINT).subsets] == ["there"]
    assert found.statuses[ObjectKey("DestinationRule", "gates", "it")] == (
        Condition("WaypointAccepted", True, "Accepted", "used by gates/common"),
    )
    assert found.statuses[ObjectKey("DestinationRule", "shop", "it")] == (
        Condition("WaypointAccepted", True, "Accepted", "used by shop/waypoint"),
    )


def test_where_labels_matter_the_waypoints_own_are_told_too() -> None:
    """What is near is found by comparing with them."""
    policy = "{loadBalancer: {localityLbSetting: {failoverPriority: [rack]}}, outlierDetection: {}}"
    found = translated(istio("DestinationRule", f"{{host: web, trafficPolicy: {policy}}}"))
    labels = told(found, DestinationConfig, WEB).labels
    assert labels["Kubernetes//Pod/shop/waypoint-0"] == {"rack": "r7"}
    assert labels["Kubernetes//Pod/shop/web-1"] == {}
    assert told(translated(), DestinationConfig, WEB).labels == {}


def test_a_backend_policy_says_of_each_waypoint_that_looks_at_it_what_came_of_it() -> None:
    spec = "{targetRefs: [{group: '', kind: Service, name: web}], validation: {hostname: a.b, wellKnownCACertificates: System}}"
    head = "apiVersion: gateway.networking.k8s.io/v1\nkind: BackendTLSPolicy\nmetadata: {name: it, namespace: shop}\n"
    found = translated(f"{head}spec: {spec}\n")
    tls = told(found, DestinationConfig, WEB).policy.tls
    assert tls is not None
    assert tls.sni == "a.b"
    (entry,) = found.statuses[ObjectKey("BackendTLSPolicy", "shop", "it")]
    assert isinstance(entry, AncestorStatus)
    assert entry.ancestor == {"group": "gateway.networking.k8s.io", "kind": "Gateway", "namespace": "shop", "name": "waypoint"}
    assert {(each.type, each.status) for each in entry.conditions} == {("Accepted", True), ("ResolvedRefs", True)}


def backend_policy(validation: str, name: str = "it", targets: tuple[str, ...] = ("web",)) -> str:
    head = f"apiVersion: gateway.networking.k8s.io/v1\nkind: BackendTLSPolicy\nmetadata: {{name: {name}, namespace: shop}}\n"
    refs = ", ".join(f"{{group: '', kind: Service, name: {target}}}" for target in targets)
    return f"{head}spec: {{targetRefs: [{refs}], validation: {{hostname: a.b, {validation}}}}}\n"


SYSTEM = "wellKnownCACertificates: System"
ROOTS = "caCertificateRefs: [{group: '', kind: ConfigMap, name: roots}]"
LONELY = """
apiVersion: v1
kind: Service
metadata: {name: lonely, namespace: shop, labels: {istio.io/use-waypoint: none}}
spec: {clusterIP: 10.96.1.9, ports: [{name: http, port: 80}]}
"""


@pytest.mark.parametrize(("texts", "problems"), [
    ((backend_policy(SYSTEM),), []),
    ((backend_policy(ROOTS),), ["spec.validation.caCertificateRefs: there is no ConfigMap shop/roots"]),
    ((backend_policy("wellKnownCACertificates: Mine"),),
     ["spec.validation.wellKnownCACertificates: wellKnownCACertificates Mine is not known here, only System"]),
    ((backend_policy(SYSTEM), backend_policy(SYSTEM, "later")), ["spec.targetRefs: an older policy is in force for Service web"]),
    ((backend_policy(SYSTEM, targets=("wbe",)),), ["spec.targetRefs[0]: there is no Service shop/wbe: it has no effect"]),
    ((LONELY, backend_policy(SYSTEM, targets=("lonely",))),
     ["spec.targetRefs[0]: no waypoint stands before Service lonely: it has no effect"]),
    ((LONELY, backend_policy(SYSTEM, targets=("web", "lonely"))),
     ["spec.targetRefs[1]: no waypoint stands before Service lonely: it has no effect"]),
])  # fmt: skip
def test_a_backend_policy_without_its_effect_is_told(texts: tuple[str, ...], problems: list[str]) -> None:
    assert problems_of(*texts) == problems


# Policies

TOKENS = istio("RequestAuthentication", f"{{targetRefs: {TO_WEB}, jwtRules: [{{issuer: i, jwksUri: 'https://a.test/keys'}}]}}")
AUTHENTICATION = "RequestAuthentication/shop/it"
SOURCE = KeySource("https://a.test/keys")
KEYS = '{"keys":[{"kty":"oct","k":"AA"}]}'


def test_key_sets_are_asked_for_and_change_nothing_but_what_needs_them() -> None:
    before = translated(TOKENS)
    assert [*before.wanted_keys] == [SOURCE]
    assert [rule.jwks for rule in told(before, RequestAuthentication, AUTHENTICATION).rules] == [NO_KEYS]
    after = translated(TOKENS, before=before, key_sets=KeySets({SOURCE: KEYS}))
    assert [rule.jwks for rule in told(after, RequestAuthentication, AUTHENTICATION).rules] == [KEYS]
    assert [assigned.resource.key for assigned in diff(before, after).l7] == [AUTHENTICATION]
    assert translated(before=after).wanted_keys == {}


def test_what_becomes_of_token_rules_is_said() -> None:
    key = ObjectKey("RequestAuthentication", "shop", "it")
    assert translated(TOKENS).statuses[key] == (Condition("WaypointAccepted", True, "Accepted", "bound to shop/waypoint"),)
    (lost,) = translated(TOKENS.replace("name: web}", "name: nobody}")).statuses[key]
    assert isinstance(lost, Condition)
    assert not lost.status


def test_what_a_policy_no_longer_says_of_waypoints_is_withdrawn() -> None:
    said = "status: {conditions: [{type: WaypointAccepted, status: 'True', reason: Accepted, message: ''}]}\n"
    unbound = istio("AuthorizationPolicy", "{rules: [{}]}") + said
    entries = translated(unbound).statuses[ObjectKey("AuthorizationPolicy", "shop", "it")]
    assert not any(isinstance(entry, Condition) and entry.type == "WaypointAccepted" for entry in entries)


@pytest.mark.parametrize("mistake", ["{methds: [GET]}", "{methods: GET}"])
def test_a_policy_with_a_mistake_denies_at_the_waypoint_and_says_so(mistake: str) -> None:
    spec = f"{{targetRefs: {TO_WEB}, rules: [{{to: [{{operation: {mistake}}}]}}]}}"
    found = translated(istio("AuthorizationPolicy", spec))
    made = told(found, AuthorizationPolicy, "AuthorizationPolicy/shop/it")
    assert made.unreadable
    assert made.targets == (WEB,)
    (condition,) = found.statuses[ObjectKey("AuthorizationPolicy", "shop", "it")]
    assert isinstance(condition, Condition)
    assert (condition.type, condition.status) == ("WaypointAccepted", False)
    assert found.problems


def test_what_can_hardly_be_meant_is_a_problem_of_the_mesh() -> None:
    found = translated(istio("AuthorizationPolicy", f"{{targetRefs: {TO_WEB}, rules: [{{to: [{{operation: {{methods: [get]}}}}]}}]}}"))
    assert any("'get' is not GET" in problem.message for problem in found.problems)


def test_a_policy_without_targets_is_no_waypoints() -> None:
    found = translated(istio("AuthorizationPolicy", "{action: DENY, rules: [{}]}"))
    assert not [key for key in found.l7 if key.kind == "AuthorizationPolicy"]
    assert found.policies


# What routes name and there is not


def problems_of(*texts: str) -> list[str]:
    return [f"{problem.field}: {problem.message}" for problem in translated(*texts).problems]


def virtual_service(spec: str, host: str = "web") -> str:
    return istio("VirtualService", f"{{hosts: [{host}], {spec}}}")


def subsets(*names: str) -> str:
    defined = ", ".join(f"{{name: {name}, labels: {{version: {name}}}}}" for name in names)
    return istio("DestinationRule", f"{{host: web, subsets: [{defined}]}}")


TO_V2 = "destination: {host: web, subset: v2}"
V2 = """
apiVersion: v1
kind: Pod
metadata: {name: web-2, namespace: shop, labels: {app: web, version: v2}}
spec: {nodeName: n1, containers: [{name: a}]}
status: {phase: Running, podIP: 10.244.1.10}
"""


@pytest.mark.parametrize(("spec", "field", "effect"), [
    (f"http: [{{route: [{{{TO_V2}}}]}}]", "spec.http[0].route[0].destination.subset", "its requests are answered 503"),
    (f"http: [{{route: [{{destination: {{host: far}}, weight: 1}}, {{{TO_V2}, weight: 1}}]}}]",
     "spec.http[0].route[1].destination.subset", "its requests are answered 503"),
    ("http: [{route: [{destination: {host: far}}], mirror: {host: web, subset: v2}}]", "spec.http[0].mirror.subset", "nothing is mirrored"),
    (f"http: [{{route: [{{destination: {{host: far}}}}], mirrors: [{{{TO_V2}}}]}}]",
     "spec.http[0].mirrors[0].destination.subset", "nothing is mirrored"),
])  # fmt: skip
def test_a_subset_that_no_rule_defines_is_told_until_one_does(spec: str, field: str, effect: str) -> None:
    message = f"no DestinationRule defines subset v2 of web.shop.svc.cluster.local: {effect}"
    assert problems_of(virtual_service(spec)) == problems_of(virtual_service(spec), subsets("v1")) == [f"{field}: {message}"]
    assert problems_of(virtual_service(spec), subsets("v1", "v2"), V2) == []
    (said,) = translated(virtual_service(spec)).statuses[ObjectKey("VirtualService", "shop", "it")]
    assert isinstance(said, Condition)
    assert message in said.message


def test_a_subset_that_nobody_is_in_is_told() -> None:
    message = "spec.subsets[1].labels: no workload of web has these labels: nobody serves what goes to subset v2"
    assert problems_of(subsets("v1", "v2")) == [message]
    assert problems_of(subsets("v1", "v2"), V2) == []
    waypoints_own = subsets("r7").replace("version: r7", "rack: r7")
    assert len(problems_of(waypoints_own)) == 1, "the waypoint's instances are none of the service"
    nobody = istio("DestinationRule", "{host: far, subsets: [{name: v1, labels: {version: v1}}]}")
    assert problems_of(nobody) == [], "there is nobody at all, which its requests say"
    everywhere = istio("DestinationRule", "{host: '*.svc.cluster.local', subsets: [{name: v1, labels: {version: v1}}]}", namespace="shop")
    other = V2.replace("web-2", "far-1").replace("app: web", "app: far").replace("10.244.1.10", "10.244.1.11")
    assert problems_of(everywhere, FAR_SELECTS, other) == [], "it is in one of the services"


FAR_SELECTS = """
apiVersion: v1
kind: Service
metadata: {name: beside, namespace: shop}
spec: {clusterIP: 10.96.1.9, selector: {app: far}, ports: [{name: http, port: 80}]}
"""


def test_a_subset_of_connections_that_no_rule_defines_is_told() -> None:
    database = """
apiVersion: v1
kind: Service
metadata: {name: db, namespace: shop}
spec: {clusterIP: 10.96.1.3, ports: [{name: tcp-db, port: 3306}]}
"""
    route = virtual_service("tcp: [{route: [{destination: {host: db, subset: v2}}]}]", "db")
    message = "no DestinationRule defines subset v2 of db.shop.svc.cluster.local: its connections are reset"
    assert problems_of(database, route) == [f"spec.tcp[0].route[0].destination.subset: {message}"]


@pytest.mark.parametrize(("parent", "message"), [
    ("name: web", 'there is no Gateway shop/web; for the Service write group: "" and kind: Service'),
    ("kind: Service, name: web", 'there is no Service in group gateway.networking.k8s.io: write group: ""'),
    ("name: waypoint", 'waypoint shop/waypoint takes no routes: name the Service, with group: "" and kind: Service'),
    ("name: waypiont", "there is no Gateway shop/waypiont; did you mean 'waypoint'?"),
    ("name: common", "there is no Gateway shop/common (known: ingress, waypoint)"),
    ("name: ingress", ""),
    ("group: example.com, kind: Thing, name: web", ""),
])  # fmt: skip
def test_a_parent_that_takes_no_route_is_told_and_what_was_probably_meant(parent: str, message: str) -> None:
    ingress = """
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: ingress, namespace: shop}
spec: {gatewayClassName: foreign, listeners: [{name: http, port: 80, protocol: HTTP}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: GatewayClass
metadata: {name: foreign}
spec: {controllerName: example.com/gateways}
"""
    route = f"""
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: r, namespace: shop}}
spec: {{parentRefs: [{{{parent}}}], rules: [{{backendRefs: [{{name: web, port: 80}}]}}]}}
"""
    assert problems_of(ingress, route) == ([f"spec.parentRefs[0]: {message}"] if message else [])


def test_an_identity_that_there_cannot_be_is_told_of_a_policy_for_node_agents_too() -> None:
    policy = istio(
        "AuthorizationPolicy", "{selector: {matchLabels: {app: a}}, action: DENY, rules: [{from: [{source: {principals: [a]}}]}]}"
    )
    (found,) = problems_of(policy)
    assert found.startswith("spec.rules[0].from[0].source.principals[0]: no identity matches that")


@pytest.mark.parametrize(("rule", "field"), [
    ("to: [{operation: {ports: ['3306'], methods: [GET]}}]", "to[0].operation.methods"),
    ("from: [{source: {principals: [a/ns/b/sa/c]}}, {source: {notRequestPrincipals: [a]}}]", "from[1].source.notRequestPrincipals"),
    ("when: [{key: source.ip, values: [10.0.0.1]}, {key: 'request.headers[a]', values: [b]}]", "when[1].key"),
    ("from: [{source: {principals: [a/ns/b/sa/c]}}], to: [{operation: {ports: ['3306']}}]", ""),
])  # fmt: skip
def test_a_policy_that_looks_at_requests_of_a_service_without_any_is_told(rule: str, field: str) -> None:
    database = """
apiVersion: v1
kind: Service
metadata: {name: db, namespace: shop}
spec: {clusterIP: 10.96.1.3, ports: [{name: tcp-db, port: 3306}]}
"""
    policy = istio(
        "AuthorizationPolicy", f"{{targetRefs: [{{kind: Service, name: web}}, {{kind: Service, name: db}}], rules: [{{{rule}}}]}}"
    )
    message = "looks at requests, and no port of Service db takes HTTP"
    assert problems_of(database, policy) == ([f"spec.rules[0].{field}: {message}"] if field else [])

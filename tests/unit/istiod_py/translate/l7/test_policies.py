"""Policies at waypoints: which waypoint each is for, what it says there, and that one with mistakes opens nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest

from istiod_py.translate.config import Condition
from istiod_py.translate.l7.acceptance import Targets, acceptance_of, find_unbound
from istiod_py.translate.l7.attachment import Fronted, WaypointRef
from istiod_py.translate.l7.authentication import KeySets, KeySource, authentications_for, find_key_problems, find_wanted
from istiod_py.translate.l7.known import KnownServices, L7Port, L7Service, know
from istiod_py.translate.l7.notices import find_notices, find_provider_notices
from istiod_py.translate.l7.policies import PolicyFacts, policies_for
from istiod_py.translate.l7.values import match_text
from istiod_py.translate.reading import Read, read_objects
from mesh.kube.meshconfig import Provider
from mesh.kube.objects import ObjectKey
from mesh.kube.policies import AuthorizationPolicy as KubePolicy
from mesh.kube.policies import read_authorization_policy
from mesh.kube.requestauthentication import RequestAuthentication as KubeAuthentication
from mesh.kube.requestauthentication import read_request_authentication
from mesh.model.l7.matching import Exact, PathKind, PathMatch, Prefix, Present, Regex, Suffix
from mesh.model.l7.policy import (
    Attribute,
    AuthorizationPolicy,
    ExtAuthzGrpc,
    ExtAuthzHttp,
    JwtHeader,
    JwtRule,
    PolicyAction,
    PolicyRule,
    Predicate,
    RequestAuthentication,
)
from mesh.model.l7.routing import Origin
from mesh.model.l7.waypoint import Protocol
from mesh.testing.objects import objects_from_yaml

NAMESPACES = ("shop", "other")
WAYPOINT = WaypointRef("shop", "waypoint")
PORTS = (L7Port(80, "http", Protocol.HTTP),)
WEB = L7Service("shop", "web.shop.svc.cluster.local", PORTS, "Service", "web")
FAR = L7Service("other", "far.other.svc.cluster.local", PORTS, "Service", "far")
APIS = tuple(L7Service("shop", host, PORTS, "ServiceEntry", "apis") for host in ("a.example.com", "b.example.com"))
FRONTED = Fronted(WAYPOINT, [WEB, FAR, *APIS])


@dataclass
class Mesh:
    """What else is known."""

    trust_domains: tuple[str, ...] = ("cluster.local",)
    providers: Mapping[str, Provider] = field(default_factory=dict)
    services: KnownServices = field(default_factory=lambda: know([WEB, FAR, *APIS]))

    def facts(self) -> PolicyFacts:
        return PolicyFacts("istio-system", self.trust_domains, self.providers, self.services)


def reads_of(text: str, previous: str = "") -> dict[ObjectKey, Read[KubePolicy]]:
    """``previous``: the objects as they were before."""
    before = reads_of(previous) if previous else {}
    objects, _ = objects_from_yaml(text, NAMESPACES)
    return read_objects((obj for obj in objects if obj.kind == "AuthorizationPolicy"), read_authorization_policy, before)


def policy(spec: str, namespace: str = "shop", annotations: str = "{}") -> str:
    return (
        f"apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n"
        f"metadata: {{name: p, namespace: {namespace}, annotations: {annotations}}}\nspec: {spec}\n"
    )


def translated(text: str, fronted: Fronted = FRONTED, mesh: Mesh | None = None, previous: str = "") -> AuthorizationPolicy | None:
    found = policies_for(fronted, reads_of(text, previous), (mesh or Mesh()).facts())
    return next(iter(found.values()), None)


CLASS = "{group: gateway.networking.k8s.io, kind: GatewayClass, name: %s}"
GATEWAY = "{group: gateway.networking.k8s.io, kind: Gateway, name: %s}"
ENTRY = "{group: networking.istio.io, kind: ServiceEntry, name: %s}"
SERVICE = "{kind: Service, name: %s}"


@pytest.mark.parametrize(("namespace", "attached", "targets"), [
    # The column W of the attachment table.
    ("shop", "", None),
    ("istio-system", "", None),
    ("shop", "selector: {matchLabels: {gateway.networking.k8s.io/gateway-name: waypoint}}", None),
    ("istio-system", "selector: {}", None),
    ("shop", f"targetRef: {GATEWAY % 'waypoint'}", ()),
    ("shop", f"targetRefs: [{GATEWAY % 'else'}]", None),
    ("other", f"targetRefs: [{GATEWAY % 'waypoint'}]", None),
    ("istio-system", f"targetRefs: [{GATEWAY % 'waypoint'}]", None),
    ("istio-system", f"targetRefs: [{CLASS % 'istio-waypoint'}]", ()),
    ("istio-system", f"targetRefs: [{CLASS % 'ours'}]", ()),
    ("istio-system", f"targetRefs: [{CLASS % 'istio'}]", None),
    ("shop", f"targetRefs: [{CLASS % 'istio-waypoint'}]", None),
    ("shop", f"targetRefs: [{SERVICE % 'web'}]", (WEB.key,)),
    ("other", f"targetRefs: [{SERVICE % 'far'}]", (FAR.key,)),
    ("shop", f"targetRefs: [{SERVICE % 'far'}]", None),
    ("istio-system", f"targetRefs: [{SERVICE % 'web'}]", None),
    ("shop", f"targetRefs: [{SERVICE % 'elsewhere'}]", None),
    ("shop", f"targetRefs: [{SERVICE % 'apis'}]", None),
    ("shop", f"targetRefs: [{ENTRY % 'apis'}]", tuple(service.key for service in APIS)),
    ("shop", f"targetRefs: [{SERVICE % 'web'}, {ENTRY % 'apis'}, {SERVICE % 'nobody'}]",
     (*(service.key for service in APIS), WEB.key)),
    ("shop", f"targetRefs: [{SERVICE % 'web'}, {GATEWAY % 'waypoint'}]", ()),
    ("shop", f"targetRefs: [{SERVICE % 'web'}, {GATEWAY % 'else'}]", (WEB.key,)),
])  # fmt: skip
def test_a_policy_is_for_what_it_targets_and_for_nothing_else(namespace: str, attached: str, targets: tuple[str, ...] | None) -> None:
    fronted = Fronted(WaypointRef("shop", "waypoint", "ours"), [WEB, FAR, *APIS])
    spec = f"{{{', '.join(filter(None, (attached, 'rules: [{}]')))}}}"
    found = translated(policy(spec, namespace), fronted)
    assert (None if found is None else found.targets) == targets
    authentication = policy(f"{{{attached}}}", namespace).replace("AuthorizationPolicy", "RequestAuthentication")
    objects, _ = objects_from_yaml(authentication, NAMESPACES)
    reads = read_objects((obj for obj in objects if obj.kind == "RequestAuthentication"), read_request_authentication, {})
    same = next(iter(authentications_for(fronted, reads, KeySets(), "istio-system").values()), None)
    assert (None if same is None else same.targets) == targets


def test_every_attribute_has_its_predicate() -> None:
    found = translated(
        policy("""
  targetRef: {kind: Service, name: web}
  action: DENY
  rules:
  - from:
    - source:
        principals: [cluster.local/ns/a/sa/b]
        notPrincipals: ["*"]
        requestPrincipals: ["*", https://id.example.com/*, "*/sub", iss/sub]
        namespaces: [a, "b*", "a*b", "*"]
        ipBlocks: [1.2.3.4, "fd00::/8"]
        notRemoteIpBlocks: [10.0.0.0/8]
        trustDomains: ["*.example.com"]
    - source: {serviceAccounts: [own, other/sa]}
    to:
    - operation:
        hosts: [A.com, "*.b.com", "*"]
        notPorts: ["80"]
        methods: [GET, "*"]
        paths: ["/a", "/b/*", "*/c", "*", "/d/{*}", "/e/{**}/f"]
    when:
    - {key: "request.headers[X-A]", values: [a, "*"], notValues: [b]}
    - {key: "request.auth.claims[a][b]", values: [c]}
    - {key: source.ip, values: [1.2.3.4]}
    - {key: remote.ip, notValues: [1.2.3.4]}
    - {key: source.namespace, values: [a]}
    - {key: source.principal, values: [a]}
    - {key: source.serviceAccount, values: [a]}
    - {key: source.trustDomain, values: [a]}
    - {key: destination.ip, values: [1.2.3.4]}
    - {key: destination.port, values: ["90"]}
    - {key: connection.sni, values: [a]}
    - {key: request.auth.principal, values: [a]}
    - {key: request.auth.audiences, values: [a]}
    - {key: request.auth.presenter, values: [a]}
    - {key: "experimental.envoy.filters.x[y]", values: [a]}
""")
    )
    a = (Exact("a"),)
    assert found == AuthorizationPolicy(
        Origin("AuthorizationPolicy", "shop", "p"),
        PolicyAction.DENY,
        (WEB.key,),
        (PolicyRule(
            sources=(
                (
                    Predicate(Attribute.PRINCIPAL, texts=(Exact("cluster.local/ns/a/sa/b"),)),
                    Predicate(Attribute.PRINCIPAL, True, texts=(Present(True),)),
                    Predicate(Attribute.AUTH_PRINCIPAL,
                              texts=(Present(True), Prefix("https://id.example.com/"), Suffix("/sub"), Exact("iss/sub"))),
                    Predicate(Attribute.NAMESPACE, texts=(Exact("a"), Prefix("b"), Regex("a.*b"), Present(True))),
                    Predicate(Attribute.SOURCE_IP, cidrs=("1.2.3.4", "fd00::/8")),
                    Predicate(Attribute.REMOTE_IP, True, cidrs=("10.0.0.0/8",)),
                    Predicate(Attribute.TRUST_DOMAIN, texts=(Suffix(".example.com"),)),
                ),
                (Predicate(Attribute.SERVICE_ACCOUNT, texts=(Exact("shop/own"), Exact("other/sa"))),),
            ),
            operations=((
                Predicate(Attribute.HOST, texts=(Exact("A.com", True), Suffix(".b.com", True), Present(False))),
                Predicate(Attribute.DESTINATION_PORT, True, ports=(80,)),
                Predicate(Attribute.METHOD, texts=(Exact("GET"), Present(True))),
                Predicate(Attribute.PATH, texts=(Suffix("/c"), Present(True)), paths=(
                    PathMatch(PathKind.EXACT, "/a"), PathMatch(PathKind.PREFIX, "/b/"), PathMatch(PathKind.TEMPLATE, "/d/{*}"),
                    PathMatch(PathKind.TEMPLATE, "/e/{**}/f"))),
            ),),
            conditions=(
                Predicate(Attribute.HEADER, key=("x-a",), texts=(Exact("a"), Present(False))),
                Predicate(Attribute.HEADER, True, ("x-a",), (Exact("b"),)),
                Predicate(Attribute.CLAIM, key=("a", "b"), texts=(Exact("c"),)),
                Predicate(Attribute.SOURCE_IP, cidrs=("1.2.3.4",)),
                Predicate(Attribute.REMOTE_IP, True, cidrs=("1.2.3.4",)),
                Predicate(Attribute.NAMESPACE, texts=a),
                Predicate(Attribute.PRINCIPAL, texts=a),
                Predicate(Attribute.SERVICE_ACCOUNT, texts=(Exact("shop/a"),)),
                Predicate(Attribute.TRUST_DOMAIN, texts=a),
                Predicate(Attribute.DESTINATION_IP, cidrs=("1.2.3.4",)),
                Predicate(Attribute.DESTINATION_PORT, ports=(90,)),
                Predicate(Attribute.SNI, texts=a),
                Predicate(Attribute.AUTH_PRINCIPAL, texts=a),
                Predicate(Attribute.AUDIENCE, texts=a),
                Predicate(Attribute.PRESENTER, texts=a),
                Predicate(Attribute.UNKNOWN),
            ),
        ),),
    )  # fmt: skip


@pytest.mark.parametrize(("spec", "action", "rules"), [
    ("{targetRef: {kind: Service, name: web}}", PolicyAction.ALLOW, ()),
    ("{targetRef: {kind: Service, name: web}, rules: []}", PolicyAction.ALLOW, ()),
    ("{targetRef: {kind: Service, name: web}, rules: [{}]}", PolicyAction.ALLOW, (PolicyRule(),)),
    ("{targetRef: {kind: Service, name: web}, action: DENY, rules: [{}]}", PolicyAction.DENY, (PolicyRule(),)),
    ("{targetRef: {kind: Service, name: web}, action: AUDIT, rules: [{}]}", PolicyAction.AUDIT, (PolicyRule(),)),
])  # fmt: skip
def test_actions_and_empty_rules_stay_what_they_are(spec: str, action: PolicyAction, rules: tuple[PolicyRule, ...]) -> None:
    found = translated(policy(spec))
    assert found is not None
    assert (found.action, found.rules, found.dry_run, found.unreadable) == (action, rules, False, "")


def test_a_dry_run_stays_one() -> None:
    found = translated(policy("{targetRef: {kind: Service, name: web}}", annotations="{istio.io/dry-run: 'true'}"))
    assert found is not None
    assert found.dry_run


@pytest.mark.parametrize(("value", "expanded"), [
    ("td1/ns/a/sa/b", ("td1/ns/a/sa/b", "td2/ns/a/sa/b")),
    ("td2/ns/a/sa/b", ("td1/ns/a/sa/b", "td2/ns/a/sa/b")),
    ("cluster.local/ns/a/sa/b", ("td1/ns/a/sa/b", "td2/ns/a/sa/b")),
    ("td1/ns/a/sa/*", ("td1/ns/a/sa/*", "td2/ns/a/sa/*")),
    ("foreign/ns/a/sa/b", ("foreign/ns/a/sa/b",)),
    ("*d1/ns/a/sa/b", ("*d1/ns/a/sa/b", "td2/ns/a/sa/b")),
    ("*/ns/a/sa/b", ("*/ns/a/sa/b",)),
    ("*", ("*",)),
    ("td1/ns/a", ("td1/ns/a",)),
])  # fmt: skip
@pytest.mark.parametrize("name", ["principals", "notPrincipals"])
def test_a_trust_domain_means_its_aliases_too(name: str, value: str, expanded: tuple[str, ...]) -> None:
    spec = f"{{targetRef: {SERVICE % 'web'}, rules: [{{from: [{{source: {{{name}: ['{value}']}}}}]}}]}}"
    found = translated(policy(spec), mesh=Mesh(("td1", "td2")))
    assert found is not None
    assert found.rules[0].sources[0][0].texts == tuple(map(match_text, expanded))


def test_a_trust_domain_attribute_means_its_aliases_too() -> None:
    spec = "{targetRef: {kind: Service, name: web}, rules: [{from: [{source: {trustDomains: [td1, foreign, 't*']}}]}]}"
    found = translated(policy(spec), mesh=Mesh(("td1", "td2")))
    assert found is not None
    assert found.rules[0].sources[0][0].texts == (Exact("td1"), Exact("td2"), Exact("foreign"), Prefix("t"))


CUSTOM = "{targetRef: {kind: Service, name: web}, action: CUSTOM, provider: {name: x}, rules: [{}]}"


@pytest.mark.parametrize(("provider", "found"), [
    (ExtAuthzHttp("", WEB.hostname, 80), ExtAuthzHttp("shop", WEB.hostname, 80)),
    (ExtAuthzGrpc("other", FAR.hostname, 80, fail_open=True), ExtAuthzGrpc("other", FAR.hostname, 80, fail_open=True)),
    (ExtAuthzHttp("other", WEB.hostname, 80), None),
    (ExtAuthzHttp("", "nobody.example.com", 80), None),
])  # fmt: skip
def test_an_authorizer_is_the_service_that_its_hostname_means(provider: Provider, found: Provider | None) -> None:
    policy_ = translated(policy(CUSTOM), mesh=Mesh(providers={"x": provider}))
    assert policy_ is not None
    assert (policy_.provider, policy_.provider_name) == (found, "x")


def test_an_authorizer_that_nobody_has_defined_denies() -> None:
    found = translated(policy(CUSTOM))
    assert found is not None
    assert (found.action, found.provider, found.provider_name) == (PolicyAction.CUSTOM, None, "x")


BAD_RULE = "rules: [{frm: [{source: {namespaces: [a]}}]}]"


@pytest.mark.parametrize(("spec", "namespace", "targets"), [
    (f"targetRef: {SERVICE % 'web'}, {BAD_RULE}", "shop", (WEB.key,)),
    (f"targetRef: {GATEWAY % 'waypoint'}, {BAD_RULE}", "shop", ()),
    (f"targetRef: {SERVICE % 'elsewhere'}, {BAD_RULE}", "shop", None),
    ("targetRef: {kind: Service}, rules: [{}]", "shop", ()),
    ("targetRefs: [{kind: Service, name: far, namespace: other}], rules: [{}]", "other", (FAR.key,)),
    ("targetRefs: [{kind: Pod, name: x}], rules: [{}]", "istio-system", ()),
    (f"targetRefs: [{SERVICE % 'web'}, 7], rules: [{{}}]", "shop", ()),
    ("targetRefs: [], rules: [{}]", "shop", ()),
    ("targetRefs: , rules: [{}]", "other", (FAR.key,)),
    ("targetRefs: {kind: Service, name: web}, rules: [{}]", "shop", ()),
    (f"targetrefs: [{SERVICE % 'web'}], rules: [{{}}]", "shop", ()),
    ("slector: {}, rules: [{}]", "shop", None),
    (f"selector: {{}}, targetRef: {SERVICE % 'web'}, rules: [{{}}]", "shop", (WEB.key,)),
])  # fmt: skip
@pytest.mark.parametrize("action", ["ALLOW", "DENY", "CUSTOM", "PERMIT"])
def test_a_policy_that_never_was_good_denies_all_it_may_be_for(
    action: str, spec: str, namespace: str, targets: tuple[str, ...] | None
) -> None:
    found = translated(policy(f"{{action: {action}, {spec}}}", namespace))
    assert (None if found is None else found.targets) == targets
    if found is not None:
        assert found.unreadable.startswith("objects.yaml:4: spec.")
        assert found.action is (PolicyAction[action] if action != "PERMIT" else PolicyAction.DENY)


def test_what_would_not_be_enforced_anyway_is_not_enforced_for_its_mistakes() -> None:
    assert translated(policy(f"{{action: AUDIT, targetRef: {SERVICE % 'web'}, {BAD_RULE}}}")) is None
    dry = translated(policy(f"{{targetRef: {SERVICE % 'web'}, {BAD_RULE}}}", annotations="{istio.io/dry-run: 'true'}"))
    assert dry is not None
    assert dry.dry_run
    unsure = translated(policy(f"{{targetRef: {SERVICE % 'web'}}}", annotations="{istio.io/dry-run: 'yes'}"))
    assert unsure is not None
    assert unsure.unreadable
    assert not unsure.dry_run


def test_a_policy_that_goes_bad_keeps_its_last_good_version() -> None:
    good = policy(f"{{targetRef: {SERVICE % 'web'}, rules: [{{}}]}}")
    bad = policy(f"{{targetRef: {SERVICE % 'web'}, {BAD_RULE}}}")
    assert translated(bad, previous=good) == translated(good)


# What its status says

TARGETS = Targets(
    "istio-system",
    frozenset({"shop/waypoint"}),
    {"istio-waypoint": "istio.io/mesh-controller", "ours": "istio.io/mesh-controller", "istio": "istio.io/gateway-controller"},
    {"shop/web": "shop/waypoint", "shop/free": ""},
    {"shop/apis": "shop/waypoint", "shop/loose": ""},
    {"shop/slow", "other/else"},
)


def accepted(spec: str, namespace: str = "shop", previous: str = "", annotations: str = "{}") -> Condition | None:
    (read,) = reads_of(policy(spec, namespace, annotations), previous).values()
    return acceptance_of(read, TARGETS)


@pytest.mark.parametrize(("refs", "namespace", "status", "reason", "message"), [
    (GATEWAY % "waypoint", "shop", True, "Accepted", "bound to shop/waypoint"),
    (GATEWAY % "else", "shop", False, "TargetNotFound", "not bound"),
    (SERVICE % "web", "shop", True, "Accepted", "bound to shop/waypoint"),
    (SERVICE % "free", "shop", False, "AncestorNotBound", "Service shop/free is not bound to a waypoint"),
    (SERVICE % "nobody", "shop", False, "TargetNotFound", "Service shop/nobody was not found"),
    (ENTRY % "apis", "shop", True, "Accepted", "bound to shop/waypoint"),
    (ENTRY % "loose", "shop", False, "AncestorNotBound", "ServiceEntry shop/loose is not bound to a waypoint"),
    (ENTRY % "nobody", "shop", False, "TargetNotFound", "ServiceEntry shop/nobody was not found"),
    (CLASS % "istio-waypoint", "istio-system", True, "Accepted", "bound to istio-waypoint"),
    (CLASS % "ours", "istio-system", True, "Accepted", "bound to ours"),
    (CLASS % "istio", "istio-system", False, "Invalid", "GatewayClass must use controller name `istio.io/mesh-controller` for waypoints"),
    (CLASS % "nobody", "istio-system", False, "TargetNotFound", "not bound"),
    (CLASS % "istio-waypoint", "shop", False, "Invalid",
     "AuthorizationPolicy must be in the root namespace `istio-system` when referencing a GatewayClass"),
    (f"{SERVICE % 'web'}, {ENTRY % 'apis'}", "shop", True, "Accepted", ""),
    (f"{SERVICE % 'web'}, {SERVICE % 'free'}, {ENTRY % 'nobody'}", "shop", True, "PartiallyInvalid",
     "Invalid targetRefs: Service.core:shop/free, ServiceEntry.networking.istio.io:shop/nobody"),
    (f"{SERVICE % 'free'}, {GATEWAY % 'else'}", "shop", False, "Invalid",
     "Invalid targetRefs: Service.core:shop/free, Gateway.gateway.networking.k8s.io:shop/else"),
])  # fmt: skip
def test_the_status_says_what_each_target_came_to(refs: str, namespace: str, status: bool, reason: str, message: str) -> None:
    assert accepted(f"{{targetRefs: [{refs}], rules: [{{}}]}}", namespace) == Condition("WaypointAccepted", status, reason, message)


@pytest.mark.parametrize(("refs", "notices"), [
    (f"targetRefs: [{SERVICE % 'web'}]", []),
    (f"targetRefs: [{SERVICE % 'web'}, {SERVICE % 'free'}, {ENTRY % 'nobody'}]",
     [(("spec", "targetRefs", 1), "no effect for Service free: Service shop/free is not bound to a waypoint"),
      (("spec", "targetRefs", 2), "no effect for ServiceEntry nobody: ServiceEntry shop/nobody was not found")]),
    (f"targetRef: {GATEWAY % 'else'}",
     [(("spec", "targetRef"), "no effect for Gateway else: there is no Gateway shop/else (known: slow)")]),
    (f"targetRef: {GATEWAY % 'slwo'}",
     [(("spec", "targetRef"), "no effect for Gateway slwo: there is no Gateway shop/slwo; did you mean 'slow'?")]),
    (f"targetRef: {GATEWAY % 'slow'}", [(("spec", "targetRef"), "no effect for Gateway slow: waypoint shop/slow is not ready")]),
    ("selector: {}", []),
    (f"targetRef: {SERVICE % 'free'}, {BAD_RULE}", []),
])  # fmt: skip
def test_a_target_at_which_a_policy_does_nothing_is_a_problem(refs: str, notices: list[tuple[tuple[str | int, ...], str]]) -> None:
    rules = "" if "rules" in refs else ", rules: [{}]"
    (read,) = reads_of(policy(f"{{{refs}{rules}}}")).values()
    assert [(notice.path, notice.message) for notice in find_unbound(read, TARGETS)] == notices


@pytest.mark.parametrize(("spec", "providers", "messages"), [
    (CUSTOM, {"x": ExtAuthzHttp("", WEB.hostname, 80)}, []),
    (CUSTOM, {"xy": ExtAuthzHttp("", WEB.hostname, 80)},
     ["what the rules match is refused: the mesh configuration has no provider 'x'; did you mean 'xy'?"]),
    (CUSTOM, {"x": ExtAuthzHttp("other", WEB.hostname, 80)},
     [f"what the rules match is refused: the mesh has no service other/{WEB.hostname}, at which this provider is"]),
    (f"{{targetRef: {SERVICE % 'web'}, rules: [{{}}]}}", {}, []),
])  # fmt: skip
def test_an_authorizer_that_cannot_be_asked_is_told(spec: str, providers: Mapping[str, Provider], messages: list[str]) -> None:
    (read,) = reads_of(policy(spec)).values()
    found = find_provider_notices(read.value, Mesh(providers=providers).facts())
    assert [(notice.path, notice.message) for notice in found] == [(("spec", "provider", "name"), message) for message in messages]


def test_a_policy_that_is_not_for_waypoints_says_nothing_of_them() -> None:
    assert accepted("{rules: [{}]}") is None


@pytest.mark.parametrize(("spec", "annotations", "effect"), [
    (f"{{targetRef: {SERVICE % 'web'}, {BAD_RULE}}}", "{}", "until corrected everything it applies to is refused: objects.yaml:4: "),
    (f"{{action: AUDIT, targetRef: {SERVICE % 'web'}, {BAD_RULE}}}", "{}", "not enforced: objects.yaml:4: "),
    (f"{{targetRef: {SERVICE % 'web'}, {BAD_RULE}}}", "{istio.io/dry-run: 'true'}", "not enforced: objects.yaml:4: "),
])  # fmt: skip
def test_a_mistake_stands_in_the_status(spec: str, annotations: str, effect: str) -> None:
    condition = accepted(spec, annotations=annotations)
    assert condition is not None
    assert (condition.status, condition.reason) == (False, "Invalid")
    assert condition.message.startswith(effect)
    good = policy(f"{{targetRef: {SERVICE % 'web'}, rules: [{{}}]}}")
    condition = accepted(spec, previous=good, annotations=annotations)
    assert condition is not None
    assert condition.message.startswith("the last good version stays in force: ")


@pytest.mark.parametrize(("rule", "notices"), [
    ("{to: [{operation: {paths: [/a, '/a*', '*a', '*', '/a/{*}']}}]}", []),
    ("{to: [{operation: {paths: ['/a*b', a, '/a?b=c', '/a#b']}}]}",
     [(("to", 0, "operation", "paths", 0), "a '*' that is neither"), (("to", 0, "operation", "paths", 1), "no path matches that: paths b"),
      (("to", 0, "operation", "paths", 2), "no path matches that: paths are compared"),
      (("to", 0, "operation", "paths", 3), "no path matches that: paths are compared")]),
    ("{to: [{operation: {notMethods: [get, 'GET,PUT', PURGE]}}]}",
     [(("to", 0, "operation", "notMethods", 0), "methods are compared exactly: 'get' is not GET"),
      (("to", 0, "operation", "notMethods", 1), "no method matches that")]),
    ("{to: [{operation: {hosts: ['http://a', 'a:*']}}]}", [(("to", 0, "operation", "hosts", 0), "no host matches that")]),
    ("{from: [{source: {principals: ['a*b'], namespaces: ['a*b']}}]}", [(("from", 0, "source", "principals", 0), "a '*' that is neither")]),
    ("{when: [{key: 'request.headers[x]', values: [a, 'a*b'], notValues: ['*a*']}]}",
     [(("when", 0, "values", 1), "a '*' that is neither"), (("when", 0, "notValues", 0), "a '*' that is neither")]),
    ("{when: [{key: 'experimental.envoy.filters.x[y]', values: [a]}]}", [(("when", 0, "key"), "waypoints do not know this attribute")]),
    ("{from: [{source: {principals: [web, td/ns/a/web, td/ns/a/sa/b, 'td/*', '*/b', '*'], notPrincipals: [td/ns/a/sa/]}}]}",
     [(("from", 0, "source", "principals", 0), "no identity matches that"), (("from", 0, "source", "principals", 1), "no identity matches"),
      (("from", 0, "source", "notPrincipals", 0), "no identity matches that")]),
    ("{when: [{key: source.principal, values: [web, td/ns/a/sa/b], notValues: ['a*b']}]}",
     [(("when", 0, "values", 0), "no identity matches that"), (("when", 0, "notValues", 0), "a '*' that is neither")]),
])  # fmt: skip
def test_what_can_hardly_be_meant_is_told(rule: str, notices: list[tuple[tuple[str | int, ...], str]]) -> None:
    (read,) = reads_of(policy(f"{{targetRef: {SERVICE % 'web'}, rules: [{rule}]}}")).values()
    found = find_notices(read.value)
    assert [notice.path for notice in found] == [("spec", "rules", 0, *path) for path, _ in notices]
    assert all(notice.message.startswith(message) for notice, (_, message) in zip(found, notices, strict=True))


def test_of_a_policy_for_node_agents_alone_the_identities_are_looked_at() -> None:
    rule = """{from: [{source: {principals: [web], requestPrincipals: ['a*b']}}], to: [{operation: {methods: [get]}}],
      when: [{key: source.principal, values: [web]}, {key: 'request.headers[x]', values: ['a*b']}]}"""
    (read,) = reads_of(policy(f"{{selector: {{matchLabels: {{app: a}}}}, action: DENY, rules: [{rule}]}}")).values()
    assert [notice.path[3:] for notice in find_notices(read.value)] == [("from", 0, "source", "principals", 0), ("when", 0, "values", 0)]


# Tokens


def authentications(rules: str, previous: str = "", refs: str = SERVICE % "web") -> dict[ObjectKey, Read[KubeAuthentication]]:
    def read(rules: str, before: Mapping[ObjectKey, Read[KubeAuthentication]]) -> dict[ObjectKey, Read[KubeAuthentication]]:
        text = policy(f"{{targetRefs: [{refs}], jwtRules: [{rules}]}}").replace("AuthorizationPolicy", "RequestAuthentication")
        objects, _ = objects_from_yaml(text, NAMESPACES)
        return read_objects((obj for obj in objects if obj.kind == "RequestAuthentication"), read_request_authentication, before)

    return read(rules, read(previous, {}) if previous else {})


def token_rules(rules: str, keys: KeySets, previous: str = "") -> RequestAuthentication:
    (found,) = authentications_for(FRONTED, authentications(rules, previous), keys, "istio-system").values()
    return found


def test_every_field_of_a_token_rule_arrives() -> None:
    found = token_rules(
        """{issuer: i, audiences: [a], jwks: '{"keys": []}', fromHeaders: [{name: X-T, prefix: "B "}], fromParams: [p],
        fromCookies: [c], outputPayloadToHeader: X-P, forwardOriginalToken: true, outputClaimToHeaders: [{header: X-C, claim: a.b}],
        timeout: 2s, spaceDelimitedClaims: [s]}""",
        KeySets(),
    )
    assert found.rules == (JwtRule(
        "i", ("a",), '{"keys": []}', "", 2.0, (JwtHeader("x-t", "B "),), ("p",), ("c",), True, "x-p", (("x-c", "a.b"),), ("s",),
    ),)  # fmt: skip


URI = "{issuer: i, jwksUri: 'https://id.example.com/keys'}"
DISCOVERED = "{issuer: 'https://id.example.com'}"
INLINE = "{issuer: i, jwks: '{\"keys\": []}'}"


def test_keys_that_were_fetched_are_put_in_place_and_others_verify_nothing() -> None:
    source = KeySource("https://id.example.com/keys")
    found = token_rules(f"{URI}, {DISCOVERED}", KeySets({source: '{"keys": [1]}'}))
    assert [(rule.jwks, rule.jwks_uri) for rule in found.rules] == [('{"keys": [1]}', ""), ('{"keys":[]}', "")]


def test_waypoints_fetch_what_they_are_told_to() -> None:
    found = token_rules(f"{URI}, {DISCOVERED}", KeySets(by_waypoints=True))
    assert [(rule.jwks, rule.jwks_uri) for rule in found.rules] == [("", "https://id.example.com/keys"), ('{"keys":[]}', "")]


def test_what_is_wanted_is_what_rules_in_use_name() -> None:
    slow = URI.replace("i,", "j, timeout: 9s,")
    reads = authentications(f"{URI}, {slow}, {DISCOVERED}, {INLINE}").values()
    uri, discovered = KeySource("https://id.example.com/keys"), KeySource("", "https://id.example.com")
    assert find_wanted(reads) == {uri: 9.0, discovered: 5.0}
    assert find_wanted(reads, by_waypoints=True) == {discovered: 5.0}
    assert find_wanted(authentications("{jwksUri: 'https://id.example.com/keys'}").values()) == {}


def test_a_key_set_that_could_not_be_fetched_is_told_of_where_it_is_named() -> None:
    reads = authentications(f"{URI}, {INLINE}, {DISCOVERED}, {URI}").values()
    uri, discovered = KeySource("https://id.example.com/keys"), KeySource("", "https://id.example.com")
    told = [(problem.field, problem.message) for problem in find_key_problems(reads, {uri: "nobody there", discovered: "no keys"})]
    assert told == [
        ("spec.jwtRules[0].jwksUri", "key set https://id.example.com/keys: nobody there"),
        ("spec.jwtRules[2].issuer", "key set https://id.example.com: no keys"),
        ("spec.jwtRules[3].jwksUri", "key set https://id.example.com/keys: nobody there"),
    ]
    assert [*find_key_problems(reads, {})] == []


def test_a_token_rule_with_a_mistake_refuses_requests_until_it_was_good_once() -> None:
    bad = "{issuer: i, audience: [a]}"
    assert token_rules(bad, KeySets()).unreadable.startswith("objects.yaml:4: spec.jwtRules[0].audience: unknown field")
    assert token_rules(bad, KeySets(), previous=INLINE) == token_rules(INLINE, KeySets())

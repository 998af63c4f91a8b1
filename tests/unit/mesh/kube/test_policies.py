"""AuthorizationPolicies and RequestAuthentications: what they are attached to, and what Istio's webhook refuses of them."""

from __future__ import annotations

from typing import Any

import pytest
from ruamel.yaml import YAML

from mesh.kube.checked import check_object
from mesh.kube.objects import KubeObject, Layer, ObjectKey, Origin
from mesh.kube.policies import read_authorization_policy
from mesh.kube.requestauthentication import ClaimHeader, JwtRule, TokenHeader, read_request_authentication
from mesh.kube.targets import Audience, TargetRef


def made(kind: str, spec: str) -> KubeObject:
    raw: dict[str, Any] = {"spec": YAML(typ="safe", pure=True).load(spec)}
    return check_object("security.istio.io/v1", ObjectKey(kind, "shop", "p"), raw, (Layer(Origin("x", 0, 1), raw),))


def mistakes(kind: str, spec: str) -> list[str]:
    return [f"{problem.field}: {problem.message}" for problem in made(kind, spec).problems]


@pytest.mark.parametrize(("refs", "targets"), [
    ("targetRef: {kind: Service, name: web}", (TargetRef("Service", "web"),)),
    ("targetRef: {group: core, kind: Service, name: web}", (TargetRef("Service", "web"),)),
    ("targetRefs: [{group: '', kind: Service, name: a}, {group: networking.istio.io, kind: ServiceEntry, name: b}]",
     (TargetRef("Service", "a"), TargetRef("ServiceEntry", "b"))),
    ("targetRefs: [{group: gateway.networking.k8s.io, kind: Gateway, name: w, namespace: ''}, "
     "{group: gateway.networking.k8s.io, kind: GatewayClass, name: istio-waypoint}]",
     (TargetRef("Gateway", "w"), TargetRef("GatewayClass", "istio-waypoint"))),
    ("targetRefs: [{kind: Service, name: a}, {kind: Service, name: a}]", (TargetRef("Service", "a"),)),
])  # fmt: skip
@pytest.mark.parametrize("kind", ["AuthorizationPolicy", "RequestAuthentication"])
def test_targets_are_read(kind: str, refs: str, targets: tuple[TargetRef, ...]) -> None:
    obj = made(kind, f"{{{refs}}}")
    assert obj.problems == ()
    read = read_authorization_policy(obj)[0] if kind == "AuthorizationPolicy" else read_request_authentication(obj)[0]
    assert (read.targets, read.audience, read.selector) == (targets, Audience.WAYPOINTS, None)


@pytest.mark.parametrize(("refs", "mistake"), [
    ("targetRef: {kind: Service}", "spec.targetRef: 'name' is required"),
    ("targetRef: {kind: Service, name: ''}", "spec.targetRef.name: names what the policy is for"),
    ("targetRef: {name: web}", "spec.targetRef: 'kind' is required"),
    ("targetRef: {kind: Deployment, name: web}", "spec.targetRef.kind: expected one of"),
    ("targetRef: {kind: Gateway, name: w}", "spec.targetRef.group: the group of"),
    ("targetRef: {kind: ServiceEntry, group: core, name: w}", "spec.targetRef.group: the group of"),
    ("targetRef: {kind: Service, name: web, namespace: shop}", "spec.targetRef.namespace: must be left out"),
    ("targetRef: {kind: Service, name: web, sectionName: http}", "spec.targetRef.sectionName: unknown field; policies are for all"),
    ("targetRefs: []", "spec.targetRefs: is empty"),
    ("targetRef: {kind: Service, name: a}, targetRefs: [{kind: Service, name: b}]", "spec.targetRef: a policy takes targetRef or"),
    ("selector: {matchLabels: {a: b}}, targetRef: {kind: Service, name: a}", "spec.selector: a policy takes a selector or targetRefs"),
    (f"targetRefs: [{', '.join(f'{{kind: Service, name: s{i}}}' for i in range(17))}]", "spec.targetRefs: has 17 items, of at most 16"),
])  # fmt: skip
@pytest.mark.parametrize("kind", ["AuthorizationPolicy", "RequestAuthentication"])
def test_a_target_that_is_none_is_a_mistake_and_still_no_policy_for_node_proxies(kind: str, refs: str, mistake: str) -> None:
    assert any(found.startswith(mistake) for found in mistakes(kind, f"{{{refs}}}")), mistakes(kind, f"{{{refs}}}")
    if refs != "targetRefs: []":
        obj = made(kind, f"{{{refs}}}")
        read = read_authorization_policy(obj)[0] if kind == "AuthorizationPolicy" else read_request_authentication(obj)[0]
        assert read.audience is Audience.WAYPOINTS


@pytest.mark.parametrize(("raw", "audience"), [
    ("{}", Audience.AGENTS),
    ("{spec: {}, status: {}}", Audience.AGENTS),
    ("{spec: {selector: {}}}", Audience.AGENTS),
    ("{spec: {slector: {}}}", Audience.AGENTS),
    ("{spec: {targetRefs: web}}", Audience.WAYPOINTS),
    ("{spec: {targetRef: [web]}}", Audience.WAYPOINTS),
    ("{spec: {targetRefs: {kind: Service, name: web}}}", Audience.WAYPOINTS),
    ("{spec: {targetRefs: []}}", Audience.EITHER),
    ("{spec: {targetRefs: }}", Audience.EITHER),
    ("{spec: {targetref: {kind: Service, name: web}}}", Audience.EITHER),
    ("{spec: {}, targetRefs: [{kind: Service, name: web}]}", Audience.EITHER),
    ("{spec: }", Audience.EITHER),
    ("{spec: []}", Audience.EITHER),
    ("{spce: {targetRefs: [{kind: Service, name: web}]}}", Audience.EITHER),
])  # fmt: skip
@pytest.mark.parametrize("kind", ["AuthorizationPolicy", "RequestAuthentication"])
def test_a_policy_of_which_nobody_can_tell_for_whom_it_is_has_a_mistake(kind: str, raw: str, audience: Audience) -> None:
    tree = YAML(typ="safe", pure=True).load(raw)
    obj = check_object("security.istio.io/v1", ObjectKey(kind, "shop", "p"), tree, (Layer(Origin("x", 0, 1), tree),))
    read, found = read_authorization_policy(obj) if kind == "AuthorizationPolicy" else read_request_authentication(obj)
    assert read.audience is audience
    if audience is Audience.EITHER:
        assert found


@pytest.mark.parametrize("spec", [
    "{action: CUSTOM, provider: {name: x}, rules: [{}]}",
    "{action: CUSTOM, provider: {name: x}, rules: [{from: [{source: {ipBlocks: [1.2.3.4], notRemoteIpBlocks: [1.2.3.4]}}], "
    "to: [{operation: {paths: [/a]}}], when: [{key: 'request.headers[x]', values: [a]}]}]}",
    "{action: AUDIT}",
    "{action: ALLOW}",
    "{rules: [{to: [{operation: {paths: ['/a*b', '*', '/x/{*}/y/{**}', '/store/{**}/cart', '/{**}']}}]}]}",
    "{rules: [{from: [{source: {trustDomains: ['*', a.b, 'a*', '*b']}}]}]}",
    "{rules: [{when: [{key: 'request.auth.claims[a][b]', values: [x]}, {key: 'experimental.envoy.filters.a.b[c]', values: [x]}]}]}",
])  # fmt: skip
def test_what_istio_takes_of_a_policy_is_taken(spec: str) -> None:
    assert mistakes("AuthorizationPolicy", spec) == []


@pytest.mark.parametrize(("spec", "mistake"), [
    ("{action: DENY}", "spec.action: without rules a DENY"),
    ("{action: DENY, rules: []}", "spec.action: without rules a DENY"),
    ("{action: CUSTOM, provider: {name: x}}", "spec.action: without rules a DENY or CUSTOM"),
    ("{action: CUSTOM, rules: [{}]}", "spec.action: a CUSTOM policy needs provider.name"),
    ("{action: CUSTOM, provider: {}, rules: [{}]}", "spec.provider: 'name' is required"),
    ("{action: CUSTOM, provider: {name: ''}, rules: [{}]}", "spec.provider.name: an empty text"),
    ("{action: CUSTOM, provider: {name: x, url: y}, rules: [{}]}", "spec.provider.url: unknown field"),
    ("{provider: {name: x}, rules: [{}]}", "spec.provider: only a CUSTOM policy"),
    *((f"{{action: CUSTOM, provider: {{name: x}}, rules: [{{}}, {{from: [{{source: {{{name}: [a]}}}}]}}]}}",
       f"spec.rules[1].from[0].source.{name}: a CUSTOM policy is applied before")
      for name in ("principals", "notPrincipals", "requestPrincipals", "notRequestPrincipals", "namespaces", "notNamespaces",
                   "serviceAccounts", "notServiceAccounts", "trustDomains", "notTrustDomains")),
    *((f"{{action: CUSTOM, provider: {{name: x}}, rules: [{{when: [{{key: '{key}', values: [a]}}]}}]}}",
       "spec.rules[0].when[0].key: a CUSTOM policy is applied before")
      for key in ("source.namespace", "source.principal", "source.serviceAccount", "source.trustDomain", "request.auth.principal",
                  "request.auth.audiences", "request.auth.presenter", "request.auth.claims[a]")),
    *((f"{{rules: [{{from: [{{source: {{serviceAccounts: [a], {name}: [b]}}}}]}}]}}",
       "spec.rules[0].from[0].source.serviceAccounts: service accounts can't stand beside")
      for name in ("principals", "notPrincipals", "namespaces", "notNamespaces")),
    (f"{{rules: [{{from: [{{source: {{serviceAccounts: [{', '.join(f's{i}' for i in range(17))}]}}}}]}}]}}",
     "spec.rules[0].from[0].source.serviceAccounts: has 17 items"),
    (f"{{rules: [{{from: [{{source: {{serviceAccounts: [{'a' * 321}]}}}}]}}]}}", "spec.rules[0].from[0].source.serviceAccounts[0]: has"),
    ("{rules: [{from: [{source: {trustDomains: [a/b]}}]}]}", "spec.rules[0].from[0].source.trustDomains[0]: a trust domain has no '/'"),
    ("{rules: [{from: [{source: {trustDomains: ['a*b']}}]}]}", "spec.rules[0].from[0].source.trustDomains[0]: expected a trust domain"),
    ("{rules: [{from: [{source: {notTrustDomains: ['*a*']}}]}]}", "spec.rules[0].from[0].source.notTrustDomains[0]: expected a trust"),
    ("{rules: [{to: [{operation: {paths: ['/{**}/{*}']}}]}]}", "spec.rules[0].to[0].operation.paths[0]: {**} must be the last"),
    ("{rules: [{to: [{operation: {notPaths: ['/{**}/{**}']}}]}]}", "spec.rules[0].to[0].operation.notPaths[0]: {**} must be the last"),
    ("{rules: [{to: [{operation: {paths: ['/a{*}']}}]}]}", "spec.rules[0].to[0].operation.paths[0]: braces are for"),
    ("{rules: [{to: [{operation: {paths: ['/{id}/a']}}]}]}", "spec.rules[0].to[0].operation.paths[0]: braces are for"),
    ("{rules: [{to: [{operation: {paths: ['/{*}/a*']}}]}]}", "spec.rules[0].to[0].operation.paths[0]: expected a segment of"),
    ("{rules: [{to: [{operation: {paths: ['/{*}//a']}}]}]}", "spec.rules[0].to[0].operation.paths[0]: expected a segment of"),
    ("{rules: [{when: [{key: 'request.headers', values: [a]}]}]}", "spec.rules[0].when[0].key: expected request.headers[NAME]"),
    ("{rules: [{when: [{key: 'request.headers[a][b]', values: [a]}]}]}", "spec.rules[0].when[0].key: expected request.headers[NAME]"),
    ("{rules: [{when: [{key: 'request.auth.claims[]', values: [a]}]}]}", "spec.rules[0].when[0].key: expected request.auth.claims[NAME]"),
    ("{rules: [{when: [{key: 'destination.labels[a]', values: [a]}]}]}", "spec.rules[0].when[0].key: 'destination.labels[a]' is no attr"),
    ("{rules: [{when: [{key: source.trustDomain, values: [a/b]}]}]}", "spec.rules[0].when[0].values[0]: a trust domain has no"),
    ("{rules: [{when: [{key: source.serviceAccount, notValues: ['*']}]}]}", "spec.rules[0].when[0].notValues[0]: a service account is"),
])  # fmt: skip
def test_what_istio_refuses_of_a_policy_is_refused(spec: str, mistake: str) -> None:
    assert any(found.startswith(mistake) for found in mistakes("AuthorizationPolicy", spec)), mistakes("AuthorizationPolicy", spec)


def test_every_field_of_a_request_authentication_is_read() -> None:
    obj = made(
        "RequestAuthentication",
        """
jwtRules:
- issuer: https://id.example.com
  audiences: [a, b]
  jwksUri: https://id.example.com/keys
  fromHeaders: [{name: X-Token, prefix: "Bearer "}, {name: plain}]
  fromParams: [token]
  fromCookies: [session]
  outputPayloadToHeader: x-payload
  forwardOriginalToken: true
  outputClaimToHeaders: [{header: X-Sub, claim: sub}, {header: x-deep, claim: a.b}]
  timeout: 1s
  spaceDelimitedClaims: [roles]
- issuer: testing@secure.istio.io
  jwks: '{"keys": [{"kty": "RSA", "n": "x", "e": "AQAB"}]}'
""",
    )
    assert obj.problems == ()
    whole, plain = read_request_authentication(obj)[0].rules
    assert whole == JwtRule(
        issuer="https://id.example.com",
        audiences=("a", "b"),
        jwks="",
        jwks_uri="https://id.example.com/keys",
        timeout=1.0,
        from_headers=(TokenHeader("X-Token", "Bearer "), TokenHeader("plain", "")),
        from_params=("token",),
        from_cookies=("session",),
        forward_token=True,
        payload_header="x-payload",
        claim_headers=(ClaimHeader("X-Sub", "sub"), ClaimHeader("x-deep", "a.b")),
        space_delimited=("roles",),
    )
    assert (plain.timeout, plain.jwks_uri, plain.forward_token) == (5.0, "", False)


@pytest.mark.parametrize(("rule", "mistake"), [
    ("{}", "'issuer' is required"),
    ("{issuer: ''}", "issuer: is empty"),
    ("{issuer: a, jwksUri: 'https://x', jwks: '{\"keys\": []}'}", "jwks: a rule takes jwks or jwksUri"),
    ("{issuer: a, jwksUri: 'https://x', jwks_uri: 'https://y'}", "jwks_uri: is the older spelling"),
    ("{issuer: a, jwksUri: 'ftp://x'}", "jwksUri: expected a URL that begins with"),
    ("{issuer: a, jwksUri: 'https:///keys'}", "jwksUri: expected a URL"),
    ("{issuer: a, jwksUri: 'https://a b/'}", "jwksUri: expected a URL"),
    ("{issuer: a, jwksUri: 'https://[::1/'}", "jwksUri: expected a URL"),
    ("{issuer: a, jwksUri: 'https://x:99999/'}", "jwksUri: expected a URL"),
    ("{issuer: a, jwksUri: 'https://u:p@x/'}", "jwksUri: a URL with credentials"),
    ("{issuer: a, jwks: 'no'}", "jwks: expected a JSON Web Key Set"),
    ("{issuer: a, jwks: '{}'}", "jwks: expected a JSON Web Key Set, an object"),
    ("{issuer: a, jwks: '{\"keys\": [{}]}'}", "jwks: expected a JSON Web Key Set: each"),
    ("{issuer: a, audiences: ['']}", "audiences[0]: is empty"),
    ("{issuer: a, fromHeaders: [{prefix: x}]}", "fromHeaders[0]: 'name' is required"),
    ("{issuer: a, fromHeaders: [{name: 'a b'}]}", "fromHeaders[0].name: expected the name of a header"),
    ("{issuer: a, fromParams: ['']}", "fromParams[0]: is empty"),
    ("{issuer: a, fromCookies: [1]}", "fromCookies[0]: expected a string"),
    ("{issuer: a, outputPayloadToHeader: 'x:y'}", "outputPayloadToHeader: expected the name of a header"),
    ("{issuer: a, outputClaimToHeaders: [{header: x}]}", "outputClaimToHeaders[0]: 'claim' is required"),
    ("{issuer: a, outputClaimToHeaders: [{header: 'x y', claim: a}]}", "outputClaimToHeaders[0].header: expected the name"),
    ("{issuer: a, timeout: 0s}", "timeout: expected a duration of at least 1ms"),
    ("{issuer: a, forwardOriginalToken: 'yes'}", "forwardOriginalToken: expected true or false"),
    ("{issuer: a, audience: [x]}", "audience: unknown field; did you mean 'audiences'?"),
    ("{issuer: a, audiences: null}", "audiences: is empty"),
])  # fmt: skip
def test_what_istio_refuses_of_a_token_rule_is_refused(rule: str, mistake: str) -> None:
    found = mistakes("RequestAuthentication", f"{{targetRef: {{kind: Service, name: web}}, jwtRules: [{rule}]}}")
    assert any(each.removeprefix("spec.jwtRules[0]").lstrip(".: ").startswith(mistake) for each in found), found

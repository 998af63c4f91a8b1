"""AuthorizationPolicy for node proxies, case by case as Istio converts them."""

from __future__ import annotations

from ipaddress import ip_network

import pytest

from istiod_py.translate import Condition, Config, Translation, translate
from mesh.model.policy import (
    Action,
    Clause,
    Exact,
    Match,
    Policy,
    Prefix,
    Presence,
    Rule,
    Scope,
    ServiceAccountMatch,
    Suffix,
)
from mesh.testing.objects import objects_from_yaml

HEAD = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p, namespace: shop}\n"
KEY = ("AuthorizationPolicy", "shop", "p")


def translation_of(text: str, previous: Translation | None = None) -> Translation:
    objects, _ = objects_from_yaml(text)
    return translate(objects, previous, Config())


def translated(spec: str) -> Policy:
    translation = translation_of(HEAD + spec)
    assert translation.problems == ()
    return translation.policies["shop/p"]


def condition_of(translation: Translation) -> Condition:
    """What node agents make of it."""
    ((condition, *others),) = translation.statuses.values()
    assert {other.type for other in others if isinstance(other, Condition)} <= {"WaypointAccepted"}
    return condition


def test_every_l4_attribute_has_its_place() -> None:
    policy = translated("""
spec:
  selector: {matchLabels: {app: web}}
  action: DENY
  rules:
  - from:
    - source:
        principals: ["*", "*/sa/a", "cluster.local/*", "cluster.local/ns/a/sa/b", "a*b"]
        notPrincipals: [x]
        namespaces: [ns*]
        notNamespaces: ["*"]
        ipBlocks: [1.2.3.4, 10.1.2.3/8, "fd00::1/64"]
        notIpBlocks: [2.0.0.0/8]
    - source: {serviceAccounts: [other/sa, own], notServiceAccounts: [x/y]}
    to:
    - operation: {ports: ["80", "443"], notPorts: ["81"]}
    when:
    - {key: source.ip, values: [9.0.0.0/8], notValues: [9.9.0.0/16]}
    - {key: source.namespace, values: [n], notValues: [m]}
    - {key: source.principal, values: [p*], notValues: ["*q"]}
    - {key: destination.ip, values: [8.8.8.8], notValues: [8.8.4.4]}
    - {key: destination.port, values: ["1"], notValues: ["2"]}
""")
    source = Match(
        principals=(Presence(), Suffix("/sa/a"), Prefix("cluster.local/"), Exact("cluster.local/ns/a/sa/b"), Exact("a*b")),
        not_principals=(Exact("x"),),
        namespaces=(Prefix("ns"),),
        not_namespaces=(Presence(),),
        source_ips=(ip_network("1.2.3.4/32"), ip_network("10.0.0.0/8"), ip_network("fd00::/64")),
        not_source_ips=(ip_network("2.0.0.0/8"),),
    )
    accounts = Match(
        service_accounts=(ServiceAccountMatch("other", "sa"), ServiceAccountMatch("shop", "own")),
        not_service_accounts=(ServiceAccountMatch("x", "y"),),
    )
    assert policy == Policy(
        "p",
        "shop",
        Scope.WORKLOAD_SELECTOR,
        Action.DENY,
        (
            Rule(
                (
                    Clause((Match(destination_ports=(80, 443), not_destination_ports=(81,)),)),
                    Clause((source, accounts)),
                    Clause((Match(source_ips=(ip_network("9.0.0.0/8"),), not_source_ips=(ip_network("9.9.0.0/16"),)),)),
                    Clause((Match(namespaces=(Exact("n"),), not_namespaces=(Exact("m"),)),)),
                    Clause((Match(principals=(Prefix("p"),), not_principals=(Suffix("q"),)),)),
                    Clause((Match(destination_ips=(ip_network("8.8.8.8"),), not_destination_ips=(ip_network("8.8.4.4"),)),)),
                    Clause((Match(destination_ports=(1,), not_destination_ports=(2,)),)),
                )
            ),
        ),
    )


@pytest.mark.parametrize(("spec", "rules"), [
    ("spec: {}", ()),
    ("", ()),
    ("spec: {rules: []}", ()),
    ("spec: {rules: [{}]}", (Rule(),)),
    ("spec: {rules: [{to: [{operation: {ports: ['1']}}]}, {to: [{operation: {ports: ['2']}}]}]}",
     (Rule((Clause((Match(destination_ports=(1,)),)),)), Rule((Clause((Match(destination_ports=(2,)),)),)))),
])  # fmt: skip
def test_rules_are_groups(spec: str, rules: tuple[Rule, ...]) -> None:
    """No rules allow nothing; an empty rule allows everything."""
    assert translated(spec).rules == rules


@pytest.mark.parametrize(("namespace", "selector", "scope"), [
    ("shop", "", Scope.NAMESPACE),
    ("istio-system", "", Scope.GLOBAL),
    ("shop", "selector: {matchLabels: {a: b}}", Scope.WORKLOAD_SELECTOR),
    ("shop", "selector: {}", Scope.WORKLOAD_SELECTOR),
    ("istio-system", "selector: {matchLabels: {a: b}}", Scope.WORKLOAD_SELECTOR),
])  # fmt: skip
def test_scope_comes_from_selector_and_namespace(namespace: str, selector: str, scope: Scope) -> None:
    translation = translation_of(HEAD.replace("shop", namespace) + f"spec: {{{selector}}}\n")
    assert translation.policies[f"{namespace}/p"].scope is scope


HTTP = "ztunnel does not support HTTP attributes (found: %s). In ambient mode you must use a waypoint proxy to enforce HTTP rules. "
ALLOW_TAIL = "Within an ALLOW policy, rules matching HTTP attributes are omitted. This will be more restrictive than requested."
DENY_TAIL = "DENY policy with HTTP attributes is enforced without the HTTP rules. This will be more restrictive than requested."
NOTHING_LEFT_TAIL = (
    "After omitting unsupported HTTP attributes, this DENY policy has no enforceable rules at ztunnel and will have no effect. "
    "Deploy a waypoint proxy and use a targetRef to enforce this policy."
)
PORT_80 = Rule((Clause((Match(destination_ports=(80,)),)),))


@pytest.mark.parametrize(("spec", "rules", "found", "tail"), [
    ("{rules: [{to: [{operation: {methods: [GET], ports: ['80']}}]}]}", (), "methods", ALLOW_TAIL),
    ("{rules: [{to: [{operation: {methods: [GET]}}]}, {to: [{operation: {ports: ['80']}}]}]}", (PORT_80,), "methods", ALLOW_TAIL),
    ("{rules: [{to: [{operation: {ports: ['80']}}], from: [{source: {requestPrincipals: [x], notRemoteIpBlocks: [1.2.3.4]}}]}]}", (),
     "notRemoteIpBlocks, requestPrincipals", ALLOW_TAIL),
    ("{rules: [{to: [{operation: {ports: ['1']}}], when: [{key: 'request.headers[x]', values: [b]}, {key: connection.sni, values: [c]}]}]}",
     (), "connection.sni, request.headers[x]", ALLOW_TAIL),
    ("{rules: [{from: [{source: {principals: [a], trustDomains: [x]}}]}]}", (), "trustDomains", ALLOW_TAIL),
    ("{action: DENY, rules: [{to: [{operation: {methods: [GET], ports: ['80']}}]}]}", (PORT_80,), "methods", DENY_TAIL),
    ("{action: DENY, rules: [{to: [{operation: {paths: [/a], notHosts: [b]}}]}]}", (Rule((Clause((Match(),)),)),), "notHosts, paths",
     NOTHING_LEFT_TAIL),
    ("{action: DENY, rules: [{to: [{operation: {ports: ['80']}}], when: [{key: remote.ip, values: [1.2.3.4]}]}]}",
     (Rule((*PORT_80.clauses, Clause((Match(),)))),), "remote.ip", NOTHING_LEFT_TAIL),
    ("{action: DENY, rules: [{to: [{operation: {paths: [/a]}}]}, {}]}", (Rule((Clause((Match(),)),)), Rule()), "paths", DENY_TAIL),
])  # fmt: skip
def test_http_attributes_leave_a_policy_stricter(spec: str, rules: tuple[Rule, ...], found: str, tail: str) -> None:
    translation = translation_of(f"{HEAD}spec: {spec}\n")
    assert translation.policies["shop/p"].rules == rules
    assert condition_of(translation) == Condition("ZtunnelAccepted", True, "UnsupportedValue", HTTP % found + tail)
    assert [(problem.field, problem.message) for problem in translation.problems] == [("spec.rules", HTTP % found + tail)]


def test_an_accepted_policy_says_so() -> None:
    assert condition_of(translation_of(HEAD)) == Condition("ZtunnelAccepted", True, "Accepted", "attached to ztunnel")


@pytest.mark.parametrize("action", ["AUDIT", "CUSTOM"])
def test_other_actions_are_not_sent(action: str) -> None:
    provider = ", provider: {name: x}" if action == "CUSTOM" else ""
    translation = translation_of(f"{HEAD}spec: {{action: {action}, rules: [{{}}]{provider}}}\n")
    assert translation.policies == {}
    assert condition_of(translation) == Condition(
        "ZtunnelAccepted", False, "UnsupportedValue", f"ztunnel does not support the {action} action"
    )
    assert [problem.field for problem in translation.problems] == ["spec.action"]


def test_a_policy_for_waypoints_is_not_sent() -> None:
    translation = translation_of(f"{HEAD}spec: {{targetRefs: [{{kind: Service, name: x}}], rules: [{{}}]}}\n")
    assert translation.policies == {}
    (condition,) = translation.statuses.values()
    assert condition == (Condition("WaypointAccepted", False, "TargetNotFound", "Service shop/x was not found"),)


def test_a_dry_run_is_sent_as_one() -> None:
    translation = translation_of(HEAD.replace("namespace: shop", "namespace: shop, annotations: {istio.io/dry-run: 'true'}"))
    assert translation.policies["shop/p"].dry_run


GOOD = "spec:\n  rules:\n  - from: [{source: {ipBlocks: [10.0.0.0/8]}}]\n"


def test_a_policy_that_goes_bad_keeps_its_last_good_version() -> None:
    """Also from a source that checks nothing itself."""
    objects, _ = objects_from_yaml(HEAD + GOOD)
    bad, _ = objects_from_yaml(HEAD + GOOD.replace("10.0.0.0/8", "10.0.0.0/99"))
    first = translate(objects, None, Config())
    second = translate(bad, first, Config())
    assert second.policies == first.policies
    assert [str(problem) for problem in second.problems] == [
        "objects.yaml:6: spec.rules[0].from[0].source.ipBlocks[0]: not an IP address or CIDR: '10.0.0.0/99'"
    ]
    assert condition_of(second).message.startswith("the last good version stays in force: objects.yaml:6: ")
    assert translate(bad, second, Config()).policies == first.policies
    assert translate(objects, second, Config()) == first


ALLOW_NOTHING = Policy("p", "shop", Scope.NAMESPACE, Action.ALLOW)


@pytest.mark.parametrize(("spec", "action", "scope"), [
    ("{rules: [{from: [{source: {ipBlocks: [x]}}]}]}", Action.ALLOW, Scope.NAMESPACE),
    ("{selector: {matchLabels: {app: web}}, rules: [{from: [{source: {ipBlocks: [x]}}]}]}", Action.ALLOW, Scope.WORKLOAD_SELECTOR),
    ("{selector: {matchLabels: {app: [web]}}, rules: [{}]}", Action.ALLOW, Scope.NAMESPACE),
    ("{selecter: {matchLabels: {app: web}}, rules: [{}]}", Action.ALLOW, Scope.NAMESPACE),
    ("{action: DENY, selector: {matchLabels: {app: web}}, rules: [{to: [{operation: {ports: ['99999']}}]}]}", Action.DENY,
     Scope.WORKLOAD_SELECTOR),
    ("{action: DENYY, rules: []}", Action.DENY, Scope.NAMESPACE),
    ("[]", Action.DENY, Scope.NAMESPACE),
    ("{targetRefs: [], rules: [{}]}", Action.ALLOW, Scope.NAMESPACE),
    ("{targetRefs: , rules: [{}]}", Action.ALLOW, Scope.NAMESPACE),
    ("{targetrefs: [{kind: Service, name: x}], action: DENY, rules: [{}]}", Action.DENY, Scope.NAMESPACE),
])  # fmt: skip
def test_a_policy_that_never_was_good_is_enforced_closed(spec: str, action: Action, scope: Scope) -> None:
    translation = translation_of(f"{HEAD}spec: {spec}\n")
    policy = translation.policies["shop/p"]
    assert (policy.action, policy.scope) == (action, scope)
    if action is Action.ALLOW:
        assert (policy.rules, policy.unreadable) == ((), None)
    else:
        assert policy.rules == (Rule(),)
        assert policy.unreadable is not None
        assert policy.unreadable.startswith("objects.yaml:4: spec")
    assert translation.problems
    assert not condition_of(translation).status
    assert condition_of(translation).reason == "Invalid"


@pytest.mark.parametrize("text", [
    f"{HEAD}spec: {{action: AUDIT, rules: [{{frm: x}}]}}\n",
    f"{HEAD}spec: {{targetRefs: [{{kind: Service, name: x}}], rules: [{{frm: x}}]}}\n",
    f"{HEAD}spec: {{targetRefs: {{kind: Service, name: x}}, rules: [{{}}]}}\n",
    f"{HEAD}spec: {{targetRefs: [x], rules: [{{}}]}}\n",
    HEAD.replace("namespace: shop", "namespace: shop, annotations: {istio.io/dry-run: 'true'}") + "spec: {rules: [{frm: x}]}\n",
])  # fmt: skip
def test_a_mistake_in_what_is_not_enforced_here_enforces_nothing(text: str) -> None:
    translation = translation_of(text)
    assert translation.policies == {}
    assert translation.problems

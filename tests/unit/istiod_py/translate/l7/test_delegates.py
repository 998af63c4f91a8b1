"""Delegation: what both match, done as the delegate says; contradictions are left out and told."""

from __future__ import annotations

import pytest

from istiod_py.translate.l7.delegates import MOST_MERGED, merge_matches, merge_rules, texts_contradict
from mesh.kube.headeredits import HeaderEdits
from mesh.kube.routeactions import MirrorTarget, Target, WeightedTarget
from mesh.kube.virtualservice import HttpMatch, HttpRule
from mesh.model.l7.matching import Exact, Prefix, Present, Regex, TextMatch
from mesh.model.l7.routing import Cors, DirectResponse, Fault, HeaderChanges, Origin, Retry, Rewrite
from tests.unit.istiod_py.translate.l7.world import World, document, status_of

ROOT = "{hosts: [reviews], http: [{name: root, match: [{uri: {prefix: /a}}], delegate: {name: d}}, {route: [{destination: {host: v3}}]}]}"


@pytest.mark.parametrize(("root", "leaf", "contradict"), [
    (Exact("/a"), Exact("/a"), False),
    (Exact("/a"), Exact("/b"), True),
    (Exact("/a"), Prefix("/a"), True),
    (Prefix("/a"), Prefix("/a/b"), False),
    (Prefix("/a"), Exact("/a/b"), False),
    (Prefix("/a/b"), Prefix("/a"), True),
    (Prefix("/a"), Exact("/b"), True),
    (Regex("/a.*"), Exact("/a"), True),
    (Prefix("/a"), Regex("/a.*"), True),
    (Regex("/a"), Regex("/a"), True),
    (Present(), Exact("/a"), True),
    (Exact("/a"), Present(), True),
])  # fmt: skip
def test_a_delegate_stays_within_what_it_was_given(root: TextMatch, leaf: TextMatch, contradict: bool) -> None:
    assert texts_contradict(root, leaf) is contradict


A, B, AB = (HttpMatch(uri=Prefix(prefix)) for prefix in ("/a", "/b", "/a/b"))


@pytest.mark.parametrize(("root", "delegate", "merged"), [
    ((), (A,), (A,)),
    ((A,), (), (A,)),
    ((), (), ()),
    ((A,), (AB,), (AB,)),
    ((AB,), (A,), None),
    ((A, B), (AB,), (AB,)),
    ((A, B), (HttpMatch(port=1),), (HttpMatch(uri=Prefix("/a"), port=1), HttpMatch(uri=Prefix("/b"), port=1))),
    ((A,), (AB, B), None),
    ((A,), (HttpMatch(uri=Prefix("/a"), ignore_case=True),), None),
    ((HttpMatch(port=1),), (HttpMatch(port=2),), None),
    ((HttpMatch(port=1),), (HttpMatch(),), (HttpMatch(port=1),)),
    ((HttpMatch(source_namespace="a"),), (HttpMatch(),), None),
    ((HttpMatch(source_namespace="a"),), (HttpMatch(source_namespace="a"),), (HttpMatch(source_namespace="a"),)),
    ((HttpMatch(),), (HttpMatch(source_namespace="a"),), (HttpMatch(source_namespace="a"),)),
    ((HttpMatch(source_labels={"a": "1"}),), (HttpMatch(source_labels={"b": "2"}),), (HttpMatch(source_labels={"a": "1", "b": "2"}),)),
    ((HttpMatch(source_labels={"a": "1"}),), (HttpMatch(source_labels={"a": "2"}),), None),
    ((HttpMatch(gateways=("g", "mesh")),), (HttpMatch(gateways=("g",)),), (HttpMatch(gateways=("g",)),)),
    ((HttpMatch(gateways=("g",)),), (HttpMatch(gateways=("g", "mesh")),), None),
    ((HttpMatch(gateways=("g",)),), (HttpMatch(),), (HttpMatch(gateways=("g",)),)),
    ((HttpMatch(headers={"a": Exact("1")}),), (HttpMatch(headers={"b": Exact("2")}),),
     (HttpMatch(headers={"a": Exact("1"), "b": Exact("2")}),)),
    ((HttpMatch(headers={"a": Prefix("1")}),), (HttpMatch(headers={"a": Exact("12")}),), (HttpMatch(headers={"a": Exact("12")}),)),
    ((HttpMatch(headers={"a": Exact("1")}),), (HttpMatch(headers={"a": Exact("2")}),), None),
    ((HttpMatch(without_headers={"a": Exact("1")}),), (HttpMatch(without_headers={"a": Exact("2")}),), None),
    ((HttpMatch(query={"a": Exact("1")}),), (HttpMatch(query={"a": Regex("1")}),), None),
    ((HttpMatch(method=Exact("GET"), scheme=Exact("http")),), (HttpMatch(authority=Exact("a")),),
     (HttpMatch(method=Exact("GET"), scheme=Exact("http"), authority=Exact("a")),)),
    ((HttpMatch(method=Exact("GET")),), (HttpMatch(method=Exact("PUT")),), None),
    ((HttpMatch(name="r"),), (HttpMatch(name="d"),), (HttpMatch(name="r-d"),)),
    ((HttpMatch(),), (HttpMatch(name="d"),), (HttpMatch(name="d"),)),
])  # fmt: skip
def test_matches_are_met_together(
    root: tuple[HttpMatch, ...], delegate: tuple[HttpMatch, ...], merged: tuple[HttpMatch, ...] | None
) -> None:
    assert merge_matches(root, delegate) == merged


TARGET = (WeightedTarget(Target("x")),)
FULL = HttpRule(
    name="f",
    direct_response=DirectResponse(200),
    rewrite=Rewrite(prefix="/f"),
    timeout=1.0,
    retry=Retry(1),
    fault=Fault(status=400),
    mirror=Target("f"),
    mirror_percent=1.0,
    mirrors=(MirrorTarget(Target("f")),),
    cors=Cors((Exact("f"),)),
    headers=HeaderEdits(HeaderChanges(remove=("f",))),
)


def test_what_the_delegate_leaves_open_is_the_roots() -> None:
    merged = merge_rules(FULL, HttpRule(targets=TARGET))
    assert merged is not None
    for field in ("direct_response", "rewrite", "timeout", "retry", "fault", "mirror", "mirror_percent", "mirrors", "cors", "headers"):
        assert getattr(merged, field) == getattr(FULL, field), field
    assert (merged.name, merged.targets) == ("f", TARGET)


def test_what_the_delegate_says_goes_before_the_root() -> None:
    own = HttpRule(
        name="d",
        direct_response=DirectResponse(201),
        rewrite=Rewrite(prefix="/d"),
        timeout=2.0,
        retry=Retry(0),
        fault=Fault(status=401),
        mirror=Target("d"),
        mirror_percent=0.0,
        mirrors=(MirrorTarget(Target("d")),),
        cors=Cors((Exact("d"),)),
        headers=HeaderEdits(),
        targets=TARGET,
    )
    merged = merge_rules(FULL, own)
    assert merged is not None
    for field in ("direct_response", "rewrite", "timeout", "retry", "fault", "mirror", "mirror_percent", "mirrors", "cors", "headers"):
        assert getattr(merged, field) == getattr(own, field), field
    assert merged.name == "f-d"


def delegate(http: str, namespace: str = "shop", more: str = "") -> str:
    return document("VirtualService", f"{{{more}http: [{http}]}}", "d", namespace)


def test_a_delegates_rules_stand_in_for_the_roots() -> None:
    found = World(
        document("VirtualService", ROOT)
        + delegate("{name: x, match: [{uri: {prefix: /a/1}}], route: [{destination: {host: v1}}]}, {route: [{destination: {host: v2}}]}")
    )
    assert [route.name for route in found.routes()] == ["root-x", "root", ""]
    assert (found.find("/a/1"), found.find("/a/2"), found.find("/b")) == ("v1", "v2", "v3")
    assert [route.origin for route in found.routes()] == [
        Origin("VirtualService", "shop", "d", 0), Origin("VirtualService", "shop", "d", 1), Origin("VirtualService", "shop", "r", 1),
    ]  # fmt: skip
    assert found.problems() == []
    for name in ("r", "d"):
        (condition,) = status_of(found.report(), "VirtualService", name)
        assert (condition.status, condition.reason) == (True, "Accepted"), name


def test_short_names_are_those_of_the_namespace_that_wrote_them() -> None:
    root = ROOT.replace("delegate: {name: d}", "delegate: {name: d, namespace: other}, mirror: {host: v1}")
    found = World(document("VirtualService", root) + delegate("{route: [{destination: {host: far}}]}", "other"))
    assert found.find("/a") == "far"
    assert found.routes()[0].mirrors[0].destination.hostname == "v1.shop.svc.cluster.local"


@pytest.mark.parametrize(("text", "field", "message"), [
    ("", "spec.http[0].delegate", "there is no delegate VirtualService shop/d: the rule is left out"),
    (delegate("{route: [{destination: {host: v1}}]}", more="exportTo: [other], "), "spec.http[0].delegate",
     "VirtualService shop/d is not exported to shop: the rule is left out"),
    (delegate("{match: [{uri: {prefix: /b}}], route: [{destination: {host: v1}}]}"), "spec.http[0].match",
     "matches nothing of what VirtualService shop/r delegates: left out there"),
])  # fmt: skip
def test_a_rule_without_its_delegate_is_left_out_and_the_others_stay(text: str, field: str, message: str) -> None:
    found = World(document("VirtualService", ROOT) + text)
    assert (found.find("/a"), found.find("/b")) == ("v3", "v3")
    assert (field, message) in found.problems()


def test_a_virtual_service_with_hosts_is_no_delegate() -> None:
    other = document("VirtualService", "{hosts: [ratings], http: [{route: [{destination: {host: v1}}]}]}", "d")
    found = World(document("VirtualService", ROOT) + other)
    assert any("there is no delegate" in message for _, message in found.problems())


def test_a_delegate_that_nobody_names_is_told() -> None:
    found = World(delegate("{route: [{destination: {host: v1}}]}"))
    (condition,) = status_of(found.report(), "VirtualService", "d")
    assert (condition.status, condition.reason) == (False, "TargetNotFound")
    assert found.problems() == [("spec", "without hosts it is a delegate, and no VirtualService delegates to it")]


@pytest.mark.parametrize("rules", [1, 100])
def test_delegation_does_not_multiply_without_end(rules: int) -> None:
    """Two objects of some kilobytes would be more than any memory holds, in the control plane and in every waypoint."""
    matches = ", ".join(f"{{headers: {{NAME-{number}: {{exact: a}}}}}}" for number in range(10_000 // rules))
    root = f"{{match: [{matches.replace('NAME', 'r')}], delegate: {{name: d}}}}"
    leaf = f"{{match: [{matches.replace('NAME', 'd')}], route: [{{destination: {{host: v1}}}}]}}"
    last = "{route: [{destination: {host: v2}}]}"
    found = World(
        document("VirtualService", f"{{hosts: [reviews], http: [{', '.join([root] * rules)}, {last}]}}")
        + delegate(", ".join([leaf] * rules))
    )
    assert sum(len(route.matches) for route in found.routes()) <= MOST_MERGED
    assert found.find("/") == "v2", "what is not delegated stays"
    fields = {field for field, message in found.problems() if "more than 4096 matches" in message}
    assert "spec.http[0].delegate" in fields

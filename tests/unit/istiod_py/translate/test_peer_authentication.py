"""PeerAuthentication as policies, and which of them a workload names."""

from __future__ import annotations

import pytest

from istiod_py.translate import Config, Translation, translate
from mesh.model.policy import Action, Clause, Match, Policy, Presence, Rule, Scope
from mesh.testing.objects import objects_from_yaml

NO_IDENTITY = (Presence(),)
ANONYMOUS = Clause((Match(not_principals=NO_IDENTITY),))
STATIC = "istio-system/istio_converted_static_strict"
CONVERTED = "shop/converted_peer_authentication_own"

POD = """
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, labels: {app: web}}
spec: {containers: [{name: a}]}
status: {podIP: 10.0.0.1}
"""


def peer(name: str, namespace: str, mode: str | None, selector: str = "", ports: dict[int, str] | None = None, created: str = "") -> str:
    spec = [f"mtls: {{mode: {mode}}}"] if mode else []
    spec += [f"selector: {{matchLabels: {{{selector}}}}}"] if selector else []
    spec += [f"portLevelMtls: {{{', '.join(f'{port}: {{mode: {port_mode}}}' for port, port_mode in ports.items())}}}"] if ports else []
    stamp = f", creationTimestamp: '{created}'" if created else ""
    return (
        "---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication\n"
        f"metadata: {{name: {name}, namespace: {namespace}{stamp}}}\nspec: {{{', '.join(spec)}}}\n"
    )


def mesh(mode: str | None) -> str:
    return peer("default", "istio-system", mode)


def namespace(mode: str | None) -> str:
    return peer("default", "shop", mode)


def own(mode: str | None, ports: dict[int, str] | None = None) -> str:
    return peer("own", "shop", mode, "app: web", ports)


def translation_of(*texts: str) -> Translation:
    objects, problems = objects_from_yaml("".join((POD, *texts)))
    assert problems == ()
    return translate(objects, None, Config())


def names(translation: Translation) -> tuple[str, ...]:
    (workload,) = translation.workloads.values()
    return workload.authorization_policies


def test_without_peer_authentication_there_is_no_policy() -> None:
    assert translation_of().policies == {}


def test_with_any_peer_authentication_the_static_policy_is_published() -> None:
    policies = translation_of(mesh("PERMISSIVE")).policies
    assert policies == {
        STATIC: Policy(
            "istio_converted_static_strict", "istio-system", Scope.WORKLOAD_SELECTOR, Action.DENY, (Rule((ANONYMOUS,)),)
        )
    }  # fmt: skip


@pytest.mark.parametrize(("policies", "strict"), [
    ((mesh("STRICT"),), True),
    ((mesh("PERMISSIVE"),), False),
    ((mesh("DISABLE"),), False),
    ((mesh("UNSET"),), False),
    ((mesh(None),), False),
    ((namespace("STRICT"),), True),
    ((mesh("STRICT"), namespace("PERMISSIVE")), False),
    ((mesh("STRICT"), namespace("DISABLE")), False),
    ((mesh("STRICT"), namespace("UNSET")), True),
    ((mesh("STRICT"), namespace(None)), True),
    ((mesh("PERMISSIVE"), namespace("STRICT")), True),
    ((own("STRICT"),), True),
    ((mesh("STRICT"), own("PERMISSIVE")), False),
    ((mesh("STRICT"), own("UNSET")), True),
    ((mesh("STRICT"), namespace("PERMISSIVE"), own("STRICT")), True),
    ((mesh("PERMISSIVE"), namespace("STRICT"), own("DISABLE")), False),
    ((mesh("PERMISSIVE"), namespace("STRICT"), own(None)), True),
    ((peer("root-selector", "istio-system", "STRICT", "app: web"),), False),
    ((peer("elsewhere", "other", "STRICT"),), False),
    ((peer("not-it", "shop", "STRICT", "app: other"),), False),
])  # fmt: skip
def test_the_nearest_mode_that_is_set_decides(policies: tuple[str, ...], strict: bool) -> None:
    objects, problems = objects_from_yaml("".join((POD, *policies)), ["shop", "other"])
    assert problems == ()
    assert names(translate(objects, None, Config())) == ((STATIC,) if strict else ())


def exempt_rule(*ports: int, first: bool) -> tuple[Rule, ...]:
    exempt = tuple(Clause((Match(not_destination_ports=(port,)),)) for port in ports)
    return (Rule((ANONYMOUS, *exempt) if first else (*exempt, ANONYMOUS)),)


def strict_rules(*ports: int) -> tuple[Rule, ...]:
    return tuple(Rule((Clause((Match(destination_ports=(port,), not_principals=NO_IDENTITY),)),)) for port in ports)


@pytest.mark.parametrize(("above", "mode", "ports", "rules", "named"), [
    # own STRICT
    ((), "STRICT", {80: "STRICT"}, None, (STATIC,)),
    ((), "STRICT", {80: "UNSET"}, None, (STATIC,)),
    ((), "STRICT", {90: "DISABLE", 80: "PERMISSIVE", 70: "STRICT"}, exempt_rule(80, 90, first=True), (CONVERTED,)),
    ((), "STRICT", {80: "DISABLE"}, exempt_rule(80, first=True), (CONVERTED,)),
    ((mesh("PERMISSIVE"), namespace("PERMISSIVE")), "STRICT", {80: "PERMISSIVE"}, exempt_rule(80, first=True), (CONVERTED,)),
    # mode not set, STRICT inherited
    ((mesh("STRICT"),), "UNSET", {80: "PERMISSIVE", 70: "STRICT"}, exempt_rule(80, first=False), (CONVERTED,)),
    ((mesh("STRICT"),), None, {80: "PERMISSIVE"}, exempt_rule(80, first=False), (CONVERTED,)),
    ((namespace("STRICT"),), None, {80: "PERMISSIVE", 90: "DISABLE"}, exempt_rule(80, 90, first=False), (CONVERTED,)),
    ((mesh("STRICT"), namespace(None)), None, {80: "PERMISSIVE"}, exempt_rule(80, first=False), (CONVERTED,)),
    ((mesh("STRICT"),), None, {80: "STRICT"}, None, (STATIC,)),
    ((mesh("STRICT"),), None, {80: "DISABLE"}, exempt_rule(80, first=False), (STATIC,)),
    # not STRICT
    ((), "PERMISSIVE", {90: "STRICT", 80: "STRICT", 70: "PERMISSIVE"}, strict_rules(80, 90), (CONVERTED,)),
    ((), "DISABLE", {80: "STRICT"}, strict_rules(80), (CONVERTED,)),
    ((), None, {80: "STRICT", 90: "PERMISSIVE"}, strict_rules(80), (CONVERTED,)),
    ((mesh("PERMISSIVE"), namespace("UNSET")), "UNSET", {80: "STRICT"}, strict_rules(80), (CONVERTED,)),
    ((mesh("STRICT"), namespace("PERMISSIVE")), None, {80: "STRICT", 90: "DISABLE"}, strict_rules(80), (CONVERTED,)),
    ((mesh("STRICT"),), "PERMISSIVE", {80: "STRICT"}, strict_rules(80), (CONVERTED,)),
    ((), "PERMISSIVE", {80: "PERMISSIVE", 90: "DISABLE"}, None, ()),
    ((), None, {80: "PERMISSIVE"}, None, ()),
])  # fmt: skip
def test_modes_of_ports(
    above: tuple[str, ...], mode: str | None, ports: dict[int, str], rules: tuple[Rule, ...] | None, named: tuple[str, ...]
) -> None:
    translation = translation_of(*above, own(mode, ports))
    converted = translation.policies.get(CONVERTED)
    assert (converted.rules if converted else None) == rules
    assert converted is None or (converted.action, converted.scope) == (Action.DENY, Scope.WORKLOAD_SELECTOR)
    assert names(translation) == named
    assert set(names(translation)) <= set(translation.policies)


def test_of_several_the_oldest_holds() -> None:
    younger = peer("a", "shop", "STRICT", created="2026-02-02T00:00:00Z")
    older = peer("b", "shop", "PERMISSIVE", created="2026-01-01T00:00:00Z")
    without_time = peer("0a", "shop", "STRICT")
    assert names(translation_of(younger, older, without_time)) == ()
    assert names(translation_of(younger, without_time)) == (STATIC,)
    first, second = peer("a", "shop", "STRICT", "app: web"), peer("b", "shop", "PERMISSIVE", "app: web")
    assert names(translation_of(second, first)) == (STATIC,)


@pytest.mark.parametrize(("spec", "strict"), [
    ("{mtls: {mode: strict}}", True),
    ("{mtls: PERMISSIVE}", True),
    ("{mtl: {mode: STRICT}}", True),
    ("{selector: {matchLabels: {app: web}}, mtls: {mode: X}}", True),
    ("{selector: {matchLabels: {app: other}}, mtls: {mode: X}}", False),
    ("{selector: {app: other}, mtls: {mode: STRICT}}", True),
])  # fmt: skip
def test_a_mistake_counts_as_strict_for_what_it_may_have_selected(spec: str, strict: bool) -> None:
    text = f"{POD}---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: x, namespace: shop}}\nspec: {spec}\n"
    objects, problems = objects_from_yaml(text + own("PERMISSIVE"))
    assert problems
    translation = translate(objects, None, Config())
    assert names(translation) == ((STATIC,) if strict else ())
    assert STATIC in translation.policies

from dataclasses import replace

from msgspec import structs

from istiod_py.snapshot import closed, diff
from istiod_py.translate import Translation
from mesh.model.policy import Action, Policy, Rule, Scope
from mesh.model.service import Service
from mesh.model.workload import Workload

A, B = Workload("c//Pod/app/a", "a", "app"), Workload("c//Pod/app/b", "b", "app")
SERVICE = Service("s", "app", "s.app.svc.cluster.local")
POLICY = Policy("p", "app", Scope.NAMESPACE, Action.ALLOW)


def _translation(*workloads, services=(), policies=()):
    return Translation(
        workloads={w.uid: w for w in workloads}, services={str(s.key): s for s in services}, policies={p.key: p for p in policies}
    )


def test_only_what_is_new_different_or_gone_is_in_the_delta():
    delta = diff(_translation(A, B, services=[SERVICE]), _translation(structs.replace(A), structs.replace(B, node="n1"), policies=[POLICY]))
    assert [workload.node for workload in delta.workloads] == ["n1"]
    assert delta.services == ()
    assert delta.policies == (POLICY,)
    assert delta.removed_addresses == ("app/s.app.svc.cluster.local",)
    assert delta.removed_policies == ()


def test_from_nothing_everything_is_new_and_the_same_again_is_nothing():
    full = _translation(A, B, services=[SERVICE], policies=[POLICY])
    delta = diff(Translation(), full)
    assert (len(delta.workloads), len(delta.services), len(delta.policies)) == (2, 1, 1)
    assert diff(full, full) == diff(Translation(), Translation())


def test_an_unreadable_policy_goes_out_as_one_that_denies_everything_it_applies_to():
    sent = closed(replace(POLICY, dry_run=True, unreadable="what is this"))
    assert (sent.action, sent.rules, sent.dry_run, sent.unreadable) == (Action.DENY, (Rule(),), False, None)
    assert (sent.key, sent.scope) == (POLICY.key, POLICY.scope)
    assert closed(POLICY) is POLICY

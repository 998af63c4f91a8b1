"""Answers that are kept equal fresh ones, whatever changes in between and in whatever order things are asked."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.authz.evaluate import Connection, authorize
from mesh.model.address import IpAddress
from mesh.model.identity import SpiffeId
from mesh.model.policy import Action, Clause, Exact, Match, Policy, Rule, Scope
from mesh.state.inbound import InboundRefusal, resolve_inbound
from mesh.state.memo import PEERS_KEPT, Admission, AdmissionMemo, PeerMemo, RouteMemo
from mesh.state.resolve import resolve
from mesh.state.store import Delta, MeshState
from mesh.wire.forwarded import parse_forwarded_host
from tests.property.test_mesh_state import IPS, POLICY_KEYS, TARGETS, deltas, take

CALLER = SpiffeId("cluster.local", "default", "default")
AUTHORITIES = [*map(str, TARGETS[:6]), "s.example:80", "t.example:81", "nonsense"]
FORWARDED = ["", "host=s.example", "for=1.2.3.4;host=t.example"]

policies = st.builds(
    lambda key, scope, action, rules, dry_run: Policy(key.split("/")[1], key.split("/")[0], scope, action, rules, dry_run=dry_run),
    st.sampled_from(POLICY_KEYS),
    st.sampled_from(Scope),
    st.sampled_from(Action),
    st.sampled_from([(), (Rule(),), (Rule((Clause((Match(principals=(Exact(CALLER.principal),)),)),)),)]),
    st.booleans(),
)
policy_deltas = st.builds(
    Delta,
    policies=st.lists(policies, max_size=2).map(tuple),
    removed_policies=st.lists(st.sampled_from(POLICY_KEYS), max_size=1).map(tuple),
)
steps = st.lists(st.tuples(st.one_of(deltas, policy_deltas), st.booleans()), min_size=2, max_size=5)


@given(steps, st.integers())
@settings(max_examples=80, deadline=None)
def test_a_kept_route_is_the_one_that_resolving_anew_gives(steps: list[tuple[Delta, bool]], seed: int) -> None:
    state = MeshState("n1")
    memo = RouteMemo(state)
    kept, fresh = random.Random(seed), random.Random(seed)
    for step in steps:
        take(state, step)
        for source, target in [(source, target) for source in state.workloads() for target in TARGETS] * 2:
            assert memo.resolve(source, target, kept) == resolve(state, source, target, fresh)
        assert kept.getstate() == fresh.getstate()  # what is answered from memory threw no dice, and would not have


@given(steps, st.sampled_from(IPS), st.sampled_from(FORWARDED), st.lists(st.booleans(), min_size=3, max_size=6))
@settings(max_examples=80, deadline=None)
def test_a_kept_admission_is_the_one_that_judging_anew_gives(
    steps: list[tuple[Delta, bool]], local: IpAddress, forwarded: str, turns: list[bool]
) -> None:
    """Of two peers: connections come by turns, some live on while the mesh changes."""
    state = MeshState("n1")
    memo = PeerMemo(state)
    living: dict[tuple[str, bool], AdmissionMemo] = {}
    for step in steps:
        take(state, step)
        for workload, authority, known in [
            (workload, authority, known) for workload in state.workloads() for authority in AUTHORITIES for known in turns
        ]:
            client, caller = (IPS[1], CALLER) if known else (IPS[2], None)
            one = memo.of(client, caller, local)
            answer = one.judge(workload, authority, forwarded)
            assert living.setdefault((workload.uid, known), one).judge(workload, authority, forwarded) == answer
            target = resolve_inbound(state, workload, authority, local)
            if isinstance(target, InboundRefusal):
                assert answer == target
                continue
            facts = Connection(client, caller, target.address)
            applied = state.policies_for(workload)
            assert isinstance(answer, Admission)
            assert answer == Admission(
                target,
                state.find_workload_of_peer(client, workload.network, caller),
                target.service or state.find_destination_service(workload, target.address.port, parse_forwarded_host(forwarded)),
                facts,
                applied,
                authorize(applied, facts),
            )
            assert answer.applied is applied  # the ledger tells by identity whether a connection must be asked about again


def test_a_peer_comes_back_to_what_was_decided_and_a_crowd_of_peers_is_not_kept() -> None:
    memo = PeerMemo(MeshState("n1"))
    first = memo.of(IPS[0], CALLER, IPS[1])
    assert memo.of(IPS[0], CALLER, IPS[1]) is first
    others = {id(memo.of(IPS[0], other, IPS[1])) for other in (None, SpiffeId("cluster.local", "default", "other"))}
    others |= {id(memo.of(IPS[2], CALLER, IPS[1])), id(memo.of(IPS[0], CALLER, IPS[2])), id(first)}
    assert len(others) == 5
    for number in range(PEERS_KEPT):
        memo.of(IPS[0], SpiffeId("cluster.local", "default", str(number)), IPS[1])
    assert memo.of(IPS[0], CALLER, IPS[1]) is not first


@given(steps)
@settings(max_examples=100, deadline=None)
def test_every_effective_change_makes_another_version(steps: list[tuple[Delta, bool]]) -> None:
    state = MeshState("n1")
    for step in steps:
        before = state.version, (list(state.workloads()), list(state.services()), list(state.policies()))
        take(state, step)
        after = state.version, (list(state.workloads()), list(state.services()), list(state.policies()))
        assert (before[0] == after[0]) == (before[1] == after[1])

"""The mesh that state is measured with."""

from __future__ import annotations

import random

from benches import synthetic
from mesh.model.route import Tunnel
from mesh.state.resolve import resolve
from mesh.state.store import Delta, MeshState


def test_every_service_leads_to_its_ten_endpoints_and_every_policy_is_named_by_somebody() -> None:
    delta = synthetic.mesh(1000)
    state = MeshState()
    state.apply(delta)
    source = delta.workloads[0]
    for number, service in enumerate(delta.services):
        assert len(list(state.endpoints(service.key))) == synthetic.PER_SERVICE
        assert isinstance(resolve(state, source, synthetic.virtual_address(number), random.Random(0)), Tunnel)
    assert {policy.key for policy in delta.policies} == {name for workload in delta.workloads for name in workload.authorization_policies}
    assert all(not state.policies_for(workload).unresolved for workload in delta.workloads)


def test_a_moved_endpoint_is_a_change_every_time() -> None:
    state = MeshState()
    state.apply(synthetic.mesh(100))
    for turn in range(1, 4):
        assert state.apply(Delta(workloads=(synthetic.moved(3, turn),)))

"""At no time do two replicas lead, and soon after a leader is gone another does."""

from __future__ import annotations

import random

import trio
from trio.testing import MockClock

from mesh.kube.api import ApiClient
from mesh.kube.kubeconfig import ClusterAccess
from mesh.kube.lease import DURATION, RENEW_WITHIN, LeaderElection, Observation, may_take
from mesh.testing.kube import FakeApiServer


def test_a_lease_is_taken_only_when_it_is_free_ours_or_ran_out_under_our_eyes() -> None:
    held = Observation("other", "t", 15, since=100)
    assert may_take(None, "me", 0)
    assert may_take(Observation("", "t", 15, since=100), "me", 100)
    assert may_take(Observation("me", "t", 15, since=100), "me", 100)
    assert not may_take(held, "me", 115)
    assert may_take(held, "me", 115.1)


class Replica:
    def __init__(self, server: FakeApiServer, name: str) -> None:
        self.reachable = True
        self.name = name

        async def connect() -> trio.abc.Stream:
            if not self.reachable:
                raise ConnectionRefusedError(111, "Connection refused")
            return await server.connect()

        self.client = ApiClient(ClusterAccess("kubernetes", 443, tls=False), connect=connect)
        self.election = LeaderElection(self.client, "istio-system", "lease", name, rng=random.Random(name))

    async def cut_off(self) -> None:
        self.reachable = False
        await self.client.aclose()

    async def run(self, leading: list[str]) -> None:
        async def lead() -> None:
            leading.append(self.name)
            assert len(leading) == 1, leading
            try:
                await trio.sleep_forever()
            finally:
                leading.remove(self.name)

        await self.election.run(lead)


def test_leadership_goes_from_hand_to_hand_and_is_never_in_two() -> None:
    async def main() -> None:
        server = FakeApiServer()
        leading: list[str] = []
        replicas = {name: Replica(server, name) for name in ("a", "b", "c")}
        async with trio.open_nursery() as nursery:
            await nursery.start(server.run)
            for replica in replicas.values():
                nursery.start_soon(replica.run, leading)
            await trio.sleep(60)
            (first,) = leading
            await replicas[first].cut_off()
            await trio.sleep(RENEW_WITHIN + 1)
            assert first not in leading
            await trio.sleep(DURATION)
            (second,) = leading
            assert second != first
            replicas[first].reachable = True
            server.faults.down = True
            for replica in replicas.values():
                await replica.client.aclose()
            await trio.sleep(120)
            assert leading == []
            server.faults.down = False
            await trio.sleep(60)
            assert len(leading) == 1
            lease = server.find("Lease", "istio-system", "lease")
            assert lease is not None
            assert lease["spec"]["holderIdentity"] == leading[0]
            assert lease["spec"]["leaseTransitions"] >= 1
            nursery.cancel_scope.cancel()

    trio.run(main, clock=MockClock(autojump_threshold=0))

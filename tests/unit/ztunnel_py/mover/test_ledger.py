"""The ledger: who lives, who is ended by a change of policy, and the one record each leaves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio
import trio.testing

from mesh.authz.evaluate import AppliedPolicies, Connection
from mesh.model.address import SocketAddress, parse_ip
from mesh.model.identity import SpiffeId
from mesh.model.policy import Action, Clause, Exact, Match, Policy, Rule, Scope
from mesh.reactor.relay import RelayResult
from mesh.telemetry.access import AccessEvent, AccessRecord
from mesh.telemetry.metrics import Registry, TcpMetrics
from ztunnel_py.mover.ledger import DRAINED, POLICY_CHANGED, Failure, Ledger, Living

CLIENT = SocketAddress(parse_ip("10.0.0.1"), 40000)
SERVER = SocketAddress(parse_ip("10.0.0.2"), 8080)
FRIEND = SpiffeId("cluster.local", "shop", "friend")
STRANGER = SpiffeId("cluster.local", "shop", "stranger")
NONE = AppliedPolicies(())


def allow(*principals: SpiffeId) -> Policy:
    matches = tuple(Match(principals=(Exact(str(principal).removeprefix("spiffe://")),)) for principal in principals)
    return Policy("only", "shop", Scope.NAMESPACE, Action.ALLOW, (Rule((Clause(matches),)),))


class Log:
    def __init__(self) -> None:
        self.records: list[AccessRecord] = []

    def wants(self, level: str) -> bool:
        return level != "debug"

    def write(self, record: AccessRecord) -> None:
        self.records.append(record)


class Relay:
    def __init__(self, on_abort: Callable[[str], None]) -> None:
        self.sent, self.received = 0, 0
        self._on_abort = on_abort

    def abort(self, reason: str) -> None:
        self._on_abort(reason)


class Books:
    """A ledger with connections that end as real ones do: by their stop or their relay, which call finish."""

    def __init__(self) -> None:
        self.log = Log()
        self.ledger = Ledger(TcpMetrics(Registry()), self.log, lambda: 5.0)
        self.counts: list[tuple[str, int]] = []
        self.ledger.on_count = lambda pod, living: self.counts.append((pod, living))

    def inbound(self, identity: SpiffeId | None = FRIEND, pod: str = "uid", *, relayed: bool = True) -> Living:
        living = Living(pod, "inbound", CLIENT, SERVER, 1.0, source_identity=identity)
        living.facts = Connection(CLIENT.ip, identity, SERVER)
        living.stop = lambda because: self.ledger.finish(living, failure=Failure(because))
        self.ledger.open(living)
        if relayed:
            living.relay = Relay(lambda because: self.ledger.finish(living, RelayResult(7, 9, because, None)))
        return living

    @property
    def endings(self) -> list[str | None]:
        return [record.error for record in self.log.records if record.event is AccessEvent.COMPLETE]


def test_a_change_of_policy_ends_whom_it_refuses_and_nobody_else() -> None:
    books = Books()
    kept, refused, dialling = books.inbound(), books.inbound(STRANGER), books.inbound(STRANGER, relayed=False)
    plaintext, elsewhere = books.inbound(None), books.inbound(STRANGER, "other")
    only = AppliedPolicies((allow(FRIEND),))
    outcome = books.ledger.reauthorize({"uid": only, "other": NONE}.get, final=False)
    assert outcome == (3, 0)
    assert set(books.ledger.living()) == {kept, elsewhere}
    assert books.endings == [POLICY_CHANGED] * 3
    assert all(record.response_flags == "DENY" for record in books.log.records)
    for gone in (refused, dialling, plaintext):
        assert gone.ended_by is not None


def test_the_same_policies_are_not_asked_twice() -> None:
    books = Books()
    living = books.inbound(STRANGER)
    only = AppliedPolicies((allow(FRIEND),))
    living.applied = only  # as when it was admitted by them; were it asked again it would be ended
    assert books.ledger.reauthorize(lambda pod: only, final=True) == (0, 0)


def test_connections_of_a_pod_whose_workload_is_unknown_stay() -> None:
    books = Books()
    books.inbound(STRANGER)
    assert books.ledger.reauthorize(lambda pod: None, final=True) == (0, 0)
    assert books.ledger.count("uid") == 1


def test_a_policy_that_has_not_arrived_ends_nobody_until_the_grace_is_over() -> None:
    books = Books()
    books.inbound()
    missing = AppliedPolicies((), ("shop/later",))
    assert books.ledger.reauthorize(lambda pod: missing, final=False) == (0, 1)
    assert books.ledger.count("uid") == 1
    assert books.ledger.reauthorize(lambda pod: missing, final=True) == (1, 0)
    assert books.endings == [POLICY_CHANGED]


def test_a_connection_denied_whatever_arrives_does_not_wait_for_the_grace() -> None:
    """A DENY that matches decides even while another policy is missing: waiting could only let it live longer."""
    books = Books()
    books.inbound(STRANGER)
    deny = Policy("no", "shop", Scope.NAMESPACE, Action.DENY, allow(STRANGER).rules)
    outcome = books.ledger.reauthorize(lambda pod: AppliedPolicies((deny,), ("shop/later",)), final=False)
    assert outcome == (1, 0)


def test_outbound_connections_are_not_asked() -> None:
    books = Books()
    living = Living("uid", "outbound", CLIENT, SERVER, 1.0)
    books.ledger.open(living)
    deny_all = AppliedPolicies((), ("shop/missing",))
    assert books.ledger.reauthorize(lambda pod: deny_all, final=True) == (0, 0)
    assert books.ledger.count("uid") == 1


def test_a_connection_leaves_one_record_and_one_count_however_often_it_is_finished() -> None:
    books = Books()
    living = books.inbound()
    for _ in range(3):
        books.ledger.finish(living, RelayResult(7, 9, None, "upstream"))
    assert books.endings == [None]
    assert books.counts == [("uid", 1), ("uid", 0)]
    assert living.ends is not None
    assert (living.ends.series.received, living.ends.series.sent) == (7, 9)


def test_what_we_ended_it_for_wins_over_what_the_relay_saw() -> None:
    books = Books()
    books.ledger.end(books.inbound(), Failure(DRAINED, "-"))
    assert books.endings == [DRAINED]


def test_ending_all_of_a_pod_spares_the_others() -> None:
    books = Books()
    books.inbound()
    books.inbound(pod="other")
    books.ledger.end_all("uid", Failure(DRAINED, "-"))
    assert [books.ledger.count("uid"), books.ledger.count("other")] == [0, 1]


def test_a_step_that_raises_ends_its_connection_alone() -> None:
    books = Books()
    broken, other = books.inbound(relayed=False), books.inbound()

    def step(value: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        books.ledger.guarded(broken, step)(1)
    assert list(books.ledger.living()) == [other]
    assert books.endings == ["internal error: ZeroDivisionError()"]


def test_a_finished_connection_holds_nobody_who_holds_it() -> None:
    books = Books()
    living = books.inbound()
    books.ledger.finish(living)
    refused = Living("uid", "inbound", CLIENT, SERVER, 1.0, stop=lambda because: None)
    books.ledger.refuse(refused, "because")
    assert living.stop is None
    assert refused.stop is None


def test_waiting_until_nobody_lives_ends_with_the_last() -> None:
    async def main() -> None:
        books = Books()
        first, last = books.inbound(), books.inbound()
        done: list[str] = []

        async def wait() -> None:
            await books.ledger.empty().wait()
            done.append("empty")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            books.ledger.finish(first)
            await trio.testing.wait_all_tasks_blocked()
            assert not done
            books.ledger.finish(last)
        assert done

    trio.run(main)

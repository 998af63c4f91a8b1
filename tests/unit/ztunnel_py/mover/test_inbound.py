"""What comes to a captured pod: who calls, what do they want, may they; and what every early end gives back."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
import trio

from mesh.model.address import SocketAddress
from mesh.model.identity import SpiffeId
from mesh.model.policy import Action, Clause, Exact, Match, Policy, Presence, Rule, Scope
from mesh.reactor.hbone import HboneLink, Tunnel, TunnelFailure, connect_hbone
from mesh.state.store import Delta
from mesh.testing.ca import FakeCa
from mesh.tls.contexts import hbone_context
from tests.unit.ztunnel_py.mover.conftest import ip_of
from ztunnel_py.mover import inbound
from ztunnel_py.mover.ledger import DRAINED, Failure

if TYPE_CHECKING:
    from mesh.tls.bundle import CertificateBundle
    from tests.unit.ztunnel_py.mover.conftest import World
    from ztunnel_py.mover.pod import Pod

PEER = SpiffeId("cluster.local", "shop", "peer")
STRICT = Policy("strict", "shop", Scope.WORKLOAD_SELECTOR, Action.DENY, (Rule((Clause((Match(not_principals=(Presence(),)),)),)),))


def only(principal: str, name: str = "only", scope: Scope = Scope.NAMESPACE) -> Policy:
    return Policy(name, "shop", scope, Action.ALLOW, (Rule((Clause((Match(principals=(Exact(principal),)),)),)),))


class Peer:
    """Another agent, with one connection to the pod's HBONE port."""

    def __init__(self, link: HboneLink) -> None:
        self.link = link
        self.answers: list[Tunnel | TunnelFailure] = []

    def ask(self, authority: object, headers: dict[str, str] | None = None) -> Tunnel:
        return self.link.open_tunnel(str(authority), headers or {}, self.answers.append)

    @property
    def statuses(self) -> list[int | None]:
        """200 for a tunnel; None where it was reset."""
        return [200 if isinstance(answer, Tunnel) else answer.status for answer in self.answers]


@asynccontextmanager
async def peer_of(world: World, server: Pod, bundle: CertificateBundle | None = None) -> AsyncIterator[Peer]:
    stream = await trio.open_tcp_stream(str(ip_of(server)), 15008)
    sock = stream.socket
    raw = sock._sock  # the reactor takes the socket over
    ready, ends = list[HboneLink](), list[str | None]()
    made = connect_hbone(
        world.reactor,
        raw,
        hbone_context(bundle or world.ca.issue(PEER)),
        verify_peer=lambda der: None,
        on_ready=ready.append,
        on_close=ends.append,
    )
    await world.until(lambda: ready or ends)
    try:
        yield Peer(made)
    finally:
        made.abort("the test is over")
        await world.until(lambda: not server.links)


def test_a_proved_peer_reaches_the_application_as_itself(world: World) -> None:
    async def main() -> None:
        server = world.pod("server")
        async with world.application(server) as app, peer_of(world, server) as peer:
            peer.ask(app)
            await world.until(lambda: peer.answers)
            assert peer.statuses == [200]
            (living,) = world.plane.ledger.living()
            assert living.source_identity == PEER
        assert len(world.log.records) == 1

    world.run(main)


def test_who_is_refused_is_told_and_nothing_is_dialled(world: World) -> None:
    async def main() -> None:
        server = world.pod("server")
        world.change(Delta(policies=(only("cluster.local/ns/shop/sa/other"),)))
        async with world.application(server) as app, peer_of(world, server) as peer:
            peer.ask(app)
            await world.until(lambda: peer.answers)
            assert peer.statuses == [401]
            (record,) = world.log.records
            assert record.response_flags == "DENY"
            assert record.error == "connection closed due to policy rejection: allow policies exist, but none allowed"
        assert not world.network.dialled
        assert world.idle

    world.run(main)


def test_strict_refuses_plaintext_and_nobody_else(world: World) -> None:
    async def main() -> None:
        server = world.pod("server")
        world.change(Delta(policies=(STRICT,)))
        world.describe(server, STRICT.key)
        async with world.application(server) as app, peer_of(world, server) as peer:
            peer.ask(app)
            await world.until(lambda: peer.answers)
            assert peer.statuses == [200]
            async with await world.dial(server, app, plaintext=True) as stream:
                with pytest.raises(trio.BrokenResourceError):
                    await stream.receive_some(1)

    world.run(main)


def test_a_policy_on_its_way_is_waited_for_and_decides(world: World) -> None:
    async def main() -> None:
        server = world.pod("server")
        world.describe(server, "shop/later")
        async with world.application(server) as app, peer_of(world, server) as peer:
            peer.ask(app)
            await world.until(lambda: list(world.plane.ledger.living()))
            assert not peer.answers
            world.change(Delta(policies=(only("cluster.local/ns/shop/sa/peer", "later", Scope.WORKLOAD_SELECTOR),)))
            await world.until(lambda: peer.answers)
            assert peer.statuses == [200]

    world.run(main)


def test_a_policy_that_never_comes_refuses(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbound, "POLICY_GRACE_SECONDS", 0.05)

    async def main() -> None:
        server = world.pod("server")
        world.describe(server, "shop/never")
        async with world.application(server) as app, peer_of(world, server) as peer:
            peer.ask(app)
            await world.until(lambda: peer.answers)
            assert peer.statuses == [401]
            assert "policy shop/never is named by the workload but has not arrived" in str(world.errors_logged)

    world.run(main)


def test_a_peer_that_a_policy_denies_outright_does_not_wait_for_another(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbound, "POLICY_GRACE_SECONDS", 3600)

    async def main() -> None:
        server = world.pod("server")
        world.change(Delta(policies=(Policy("no", "shop", Scope.NAMESPACE, Action.DENY, only("cluster.local/ns/shop/sa/peer").rules),)))
        world.describe(server, "shop/never")
        async with world.application(server) as app, peer_of(world, server) as peer:
            peer.ask(app)
            await world.until(lambda: peer.answers)
            assert peer.statuses == [401]
            assert "explicitly denied by: shop/no" in str(world.errors_logged)

    world.run(main)


def test_a_policy_that_changes_while_the_application_is_dialled_is_heeded(world: World) -> None:
    async def main() -> None:
        server = world.pod("server")
        with world.silent_application(server) as app:
            async with peer_of(world, server) as peer:
                peer.ask(app)
                await world.until(lambda: world.network.dialled)
                world.change(Delta(policies=(only("cluster.local/ns/shop/sa/other"),)))
                outcome = world.plane.ledger.reauthorize(lambda uid: world.state.policies_for(living_target(world)), final=False)
                assert outcome.ended == 1
                await world.until(lambda: peer.answers)
                assert peer.statuses == [401]
        assert world.errors_logged == ["connection closed due to policy change"]

    world.run(main)


def living_target(world: World) -> object:
    (living,) = world.plane.ledger.living()
    assert living.target is not None
    return living.target


@pytest.mark.parametrize("waits_for", ["workload", "policy", "application"])
def test_a_peer_that_goes_while_it_waits_leaves_nothing(world: World, waits_for: str) -> None:
    async def main() -> None:
        server = world.pod("server", known=waits_for != "workload")
        if waits_for == "policy":
            world.describe(server, "shop/later")
        async with world.application(server) as app, peer_of(world, server) as peer:
            with world.silent_application(server) as silent:
                tunnel = peer.ask(silent if waits_for == "application" else app)
                if waits_for == "application":
                    await world.until(lambda: world.network.dialled)
                await trio.sleep(0.05)
                tunnel.reset()
                await trio.sleep(0.05)
                dialled = len(world.network.dialled)
                world.change(Delta(policies=(only("cluster.local/ns/shop/sa/peer", "later", Scope.WORKLOAD_SELECTOR),)))
                world.describe(server)
                await world.until(lambda: world.idle)
                assert len(world.network.dialled) == dialled, "it is dialled for a peer that has gone"

    world.run(main)


def test_a_dial_that_cannot_even_begin_is_answered_503(world: World) -> None:
    async def main() -> None:
        server = world.pod("server")
        async with world.application(server) as app, peer_of(world, server) as peer:
            world.network.broken[server.uid] = OSError(errno.EMFILE, "Too many open files")
            peer.ask(app)
            await world.until(lambda: peer.answers)
            assert peer.statuses == [503]
            assert world.errors_logged == ["connection failed: [Errno 24] Too many open files"]
            async with await world.dial(server, app, plaintext=True) as stream:
                with pytest.raises(trio.BrokenResourceError):
                    await stream.receive_some(1)
            assert world.idle
            world.network.broken.clear()
            peer.ask(app)
            await world.until(lambda: len(peer.answers) == 2)
            assert peer.statuses == [503, 200]

    world.run(main)


@pytest.mark.parametrize("waits_for", ["certificate", "workload"])
def test_a_pod_dropped_under_a_peer_that_waits_is_not_dialled_in(world: World, waits_for: str) -> None:
    async def main() -> None:
        server = world.pod("server", known=waits_for != "workload", certified=waits_for != "certificate")
        if waits_for == "certificate":
            stream = await trio.open_tcp_stream(str(ip_of(server)), 15008)
            await world.until(lambda: world.asked)
            drop(world, server)
            world.certify(server)
            with pytest.raises(trio.BrokenResourceError):
                await stream.receive_some(1)
            await stream.aclose()
            return
        async with world.application(server) as app, peer_of(world, server) as peer:
            peer.ask(app)
            async with await world.dial(server, app, plaintext=True) as stream:
                await world.until(lambda: world.plane.workloads_wanted.waited_for())
                drop(world, server)
                await world.until(lambda: peer.answers)
                assert peer.statuses == [None]
                world.describe(server)
                with pytest.raises(trio.BrokenResourceError):
                    await stream.receive_some(1)
        await world.until(lambda: world.idle)

    world.run(main)


def drop(world: World, server: Pod) -> None:
    """As the mover does it."""
    server.stop_listening()
    world.plane.ledger.end_all(server.uid, Failure(DRAINED, "-"))
    server.close()


def test_a_certificate_of_another_trust_domain_proves_nothing(world: World) -> None:
    async def main() -> None:
        server = world.pod("server")
        async with world.application(server), peer_of(world, server, world.ca.issue(SpiffeId("evil.example", "shop", "peer"))):
            await world.until(lambda: world.log.records)
        (record,) = world.log.records
        assert "is not of trust domain cluster.local" in str(record.error)
        assert record.source.identity is None

    world.run(main)


def test_an_expired_certificate_of_ours_is_not_served_with(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        server = world.pod("server", certified=False)
        world.certify(server, lifetime=timedelta(seconds=-1))
        world.plane.credentials.refuse(server.identity(), "the authority is away")
        monkeypatch.setattr("ztunnel_py.mover.credentials.FIRST_CERTIFICATE_SECONDS", 0.05)
        stream = await trio.open_tcp_stream(str(ip_of(server)), 15008)
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_some(1)
        await stream.aclose()
        (error,) = world.errors_logged
        assert str(error).startswith("identity error: the certificate expired at ")
        assert str(error).endswith("the authority is away")

    world.run(main)


def test_a_foreign_authority_proves_nothing(world: World) -> None:
    async def main() -> None:
        server = world.pod("server")
        async with world.application(server), peer_of(world, server, replace(FakeCa().issue(PEER), roots_pem=world.ca.root_pem)):
            await world.until(lambda: world.log.records)
        (error,) = world.errors_logged
        assert str(error).startswith("tls handshake error: certificate verify failed")

    world.run(main)


def test_a_step_that_raises_costs_its_tunnel_alone(world: World) -> None:
    async def main() -> None:
        server = world.pod("server")
        async with world.application(server) as app, peer_of(world, server) as peer:
            world.network.relays_fail = True
            peer.ask(app)
            await world.until(lambda: peer.answers)
            await world.until(lambda: world.idle)
            world.network.relays_fail = False
            peer.ask(app)
            await world.until(lambda: len(peer.answers) == 2)
            assert peer.statuses[1] == 200
            world.network.relays_fail = True
            async with await world.dial(server, app, plaintext=True) as stream:
                with pytest.raises(trio.BrokenResourceError):
                    await stream.receive_some(1)
        assert world.errors_logged.count("internal error: MemoryError()") == 2
        assert {type(error) for error in world.errors} == {MemoryError}
        world.errors.clear()

    world.run(main)


def test_a_plaintext_caller_is_relayed_as_itself(world: World) -> None:
    async def main() -> None:
        server = world.pod("server")
        async with world.application(server) as app:
            async with await world.dial(server, app, plaintext=True) as stream:
                await stream.send_all(b"hello")
                assert bytes(await stream.receive_some(100)) == b"hello"
            await world.until(lambda: world.idle)
        (record,) = world.log.records
        assert record.source.identity is None
        assert record.error is None

    world.run(main)


@pytest.mark.parametrize("destination", [None, 15001, 15006, 15008])
def test_plaintext_to_our_own_ports_is_refused(world: World, destination: int | None) -> None:
    async def main() -> None:
        server = world.pod("server")
        target = None if destination is None else SocketAddress(ip_of(server), destination)
        async with await world.dial(server, target, plaintext=True) as stream:
            with pytest.raises(trio.BrokenResourceError):
                await stream.receive_some(1)
        assert world.errors_logged == ["attempted recursive call to ourselves"]

    world.run(main)

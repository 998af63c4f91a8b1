import itertools
import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
import trio
import trio.testing

from mesh.model.identity import SpiffeId
from mesh.testing.ca import FakeCa
from mesh.tls import rotation
from mesh.tls.bundle import CertificateBundle
from mesh.tls.rotation import CertificateFetchFailed, CertificateManager, CertificateUnavailable, Priority, Stage, Unavailable

START = datetime(2026, 1, 1, tzinfo=UTC)
DAY = timedelta(hours=24)
ALICE, BOB, CAROL = (SpiffeId("cluster.local", "app", name) for name in ("alice", "bob", "carol"))


def now() -> datetime:
    return START + timedelta(seconds=trio.current_time() - _epoch)


_epoch = 0.0


class Authority:
    """The injected fetch: counts calls, and can be down, slow or held."""

    def __init__(self, lifetime: timedelta = DAY) -> None:
        self.calls: list[tuple[float, SpiffeId]] = []
        self.lifetime = lifetime
        self.down: str | None = None
        self.gate: trio.Event | None = None
        self.together = self.most_together = 0

    async def __call__(self, identity: SpiffeId) -> CertificateBundle:
        self.calls.append((trio.current_time() - _epoch, identity))
        self.together += 1
        self.most_together = max(self.most_together, self.together)
        try:
            await trio.lowlevel.checkpoint()
            if self.gate is not None:
                await self.gate.wait()
        finally:
            self.together -= 1
        if self.down is not None:
            raise CertificateFetchFailed(self.down)
        return CertificateBundle(identity, b"key", (b"leaf",), b"root", now(), now() + self.lifetime)

    @property
    def times(self) -> list[float]:
        return [time for time, _ in self.calls]


def run(test: Callable[..., object], **settings) -> None:
    """Run ``test(manager, authority)`` beside a running manager on a clock that jumps."""

    async def main() -> None:
        global _epoch
        _epoch = trio.current_time()
        authority = Authority()
        manager = CertificateManager(authority, now=now, rng=random.Random(1), **settings)
        async with trio.open_nursery() as nursery:
            await nursery.start(manager.run)
            await test(manager, authority)
            nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_connections_that_wait_for_one_identity_share_one_fetch():
    async def test(manager, authority):
        got = []

        async def wait():
            got.append(await manager.wait_bundle(ALICE))

        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(wait)
        assert len(got) == 10
        assert len(authority.calls) == 1
        assert manager.find_bundle(ALICE) is got[0]
        assert await manager.wait_bundle(ALICE) is got[0]

    run(test)


def test_a_certificate_is_renewed_about_half_life_for_ever():
    async def test(manager, authority):
        news = []
        manager.subscribe(news.append)
        await manager.wait_bundle(ALICE)
        await trio.sleep(DAY.total_seconds() * 5)
        times = authority.times
        assert 8 <= len(times) <= 12
        half = DAY.total_seconds() / 2
        gaps = [b - a for a, b in itertools.pairwise(times)]
        assert all(0.9 * half <= gap <= 1.1 * half + 60 for gap in gaps)
        assert len({round(gap) for gap in gaps}) > 1, "renewals are spread"
        assert len(news) == len(times)
        assert manager.find_bundle(ALICE) is news[-1]

    run(test)


def test_a_valid_certificate_is_kept_while_renewal_fails_until_it_expires():
    async def test(manager, authority):
        news = []
        manager.subscribe(news.append)
        first = await manager.wait_bundle(ALICE)
        authority.down = "signing gRPC error (UNAVAILABLE): gone"
        await trio.sleep(DAY.total_seconds() - 1)
        assert await manager.wait_bundle(ALICE) is first
        (state,) = manager.states()
        assert (state.stage, state.because) == (Stage.AVAILABLE, authority.down)
        assert news == [first]
        await trio.sleep(10)
        assert manager.find_bundle(ALICE) is None
        with pytest.raises(CertificateUnavailable, match="gone"):
            await manager.wait_bundle(ALICE)
        assert news[-1] == Unavailable(ALICE, authority.down)
        authority.down = None
        await trio.sleep(rotation.LONGEST_BACKOFF * 1.2)
        assert manager.states()[0].stage is Stage.AVAILABLE
        assert isinstance(news[-1], CertificateBundle)

    run(test)


def test_after_a_failure_requests_fail_at_once_and_only_the_back_off_asks_again():
    async def test(manager, authority):
        authority.down = "no"
        for _ in range(5):
            with pytest.raises(CertificateUnavailable, match="no"):
                await manager.wait_bundle(ALICE)
        assert len(authority.calls) == 1
        await trio.sleep(3600)
        gaps = [b - a for a, b in zip(authority.times, authority.times[1:], strict=False)]
        for number, gap in enumerate(gaps):
            middle = min(150.0, 2.0**number)
            assert 0.79 * middle <= gap <= min(1.21 * middle, 150.1)
        authority.down = None
        await trio.sleep(200)
        authority.down = "no"
        await trio.sleep(DAY.total_seconds() * 0.6)
        after = [time for time in authority.times if time > 3600 + 200]
        assert 0.79 <= after[1] - after[0] <= 1.21, "a success starts the back-off anew"

    run(test)


def test_when_the_authority_is_back_failed_identities_are_tried_at_once_on_request():
    async def test(manager, authority):
        authority.down = "no"
        with pytest.raises(CertificateUnavailable):
            await manager.wait_bundle(ALICE)
        await trio.sleep(2000)
        authority.down = None
        before = trio.current_time()
        manager.retry_failed()
        await trio.testing.wait_all_tasks_blocked()
        assert manager.find_bundle(ALICE) is not None
        assert trio.current_time() == before

    run(test)


def test_at_most_eight_fetches_run_together_and_the_urgent_go_first():
    async def test(manager, authority):
        authority.gate = trio.Event()
        identities = [SpiffeId("cluster.local", "app", f"sa-{number}") for number in range(20)]
        for identity in identities:
            manager.request(identity, Priority.WARMUP)
        await trio.testing.wait_all_tasks_blocked()
        assert authority.most_together == rotation.CONCURRENT_FETCHES
        manager.request(ALICE, Priority.BACKGROUND)
        manager.request(BOB)
        manager.request(identities[-1])  # a connection waits for it now
        authority.gate.set()
        authority.gate = None
        await trio.sleep(1)
        order = [identity for _, identity in authority.calls]
        assert len(order) == 22
        # Within a wave of eight trio starts tasks in any order.
        assert {BOB, identities[-1]} < set(order[8:16])
        assert set(order[8:16]) - {BOB, identities[-1]} == set(identities[8:14])
        assert ALICE in order[16:]
        assert authority.most_together == rotation.CONCURRENT_FETCHES

    run(test)


def test_a_forgotten_identity_is_no_longer_renewed_and_its_waiters_are_told():
    async def test(manager, authority):
        authority.gate = trio.Event()
        news, errors = [], []
        manager.subscribe(news.append)

        async def wait():
            with pytest.raises(CertificateUnavailable) as caught:
                await manager.wait_bundle(ALICE)
            errors.append(str(caught.value))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            manager.forget(ALICE)
        assert errors == [rotation.NO_LONGER_NEEDED]
        await trio.testing.wait_all_tasks_blocked()
        assert authority.together == 0, "the fetch in flight was cancelled"
        authority.gate = None
        await manager.wait_bundle(BOB)
        manager.forget(BOB)
        manager.forget(CAROL)
        await trio.sleep(DAY.total_seconds() * 3)
        assert [identity for _, identity in authority.calls] == [ALICE, BOB]
        assert manager.states() == []
        assert news == [Unavailable(ALICE, rotation.NO_LONGER_NEEDED), news[1], Unavailable(BOB, rotation.NO_LONGER_NEEDED)]

    run(test)


def test_an_identity_forgotten_and_wanted_again_is_fetched_again():
    async def test(manager, authority):
        authority.gate = trio.Event()
        manager.request(ALICE)
        await trio.testing.wait_all_tasks_blocked()
        manager.forget(ALICE)
        authority.gate = None
        assert (await manager.wait_bundle(ALICE)).identity == ALICE
        assert len(authority.calls) == 2

    run(test)


def test_a_fetch_that_hangs_ends_at_its_deadline_as_a_failure():
    async def test(manager, authority):
        authority.gate = trio.Event()
        with pytest.raises(CertificateUnavailable, match="within 20 s"):
            await manager.wait_bundle(ALICE)
        assert trio.current_time() - _epoch == pytest.approx(20)

    run(test)


def test_a_certificate_of_another_identity_or_already_expired_is_refused():
    async def test(manager, authority):
        authority.lifetime = timedelta(seconds=-1)
        with pytest.raises(CertificateUnavailable, match="had expired when it came"):
            await manager.wait_bundle(ALICE)

    run(test)

    async def impostor(identity: SpiffeId) -> CertificateBundle:
        return CertificateBundle(BOB, b"", (), b"", START, START + DAY)

    async def main() -> None:
        manager = CertificateManager(impostor, now=lambda: START)
        async with trio.open_nursery() as nursery:
            await nursery.start(manager.run)
            with pytest.raises(CertificateUnavailable, match=f"did not find expected SAN: {ALICE}"):
                await manager.wait_bundle(ALICE)
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_a_defect_of_the_fetch_is_a_failure_of_that_identity_alone():
    async def crash(identity: SpiffeId) -> CertificateBundle:
        if identity == ALICE:
            raise KeyError("oops")
        return CertificateBundle(identity, b"", (), b"", START, START + DAY)

    async def main() -> None:
        manager = CertificateManager(crash, now=lambda: START)
        async with trio.open_nursery() as nursery:
            await nursery.start(manager.run)
            with pytest.raises(CertificateUnavailable, match="KeyError"):
                await manager.wait_bundle(ALICE)
            await manager.wait_bundle(BOB)
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_a_machine_that_slept_renews_when_it_wakes():
    async def test(manager, authority):
        first = await manager.wait_bundle(ALICE)
        manager._now = lambda: now() + 2 * DAY  # the wall clock went on, the monotonic one did not
        authority.lifetime = DAY * 4
        assert manager.find_bundle(ALICE) is None
        await trio.sleep(rotation._CLOCK_CHECK + 1)
        assert len(authority.calls) == 2
        assert first is not manager.states()[0].bundle

    run(test)


def test_a_connection_that_finds_an_expired_certificate_waits_for_its_renewal():
    async def test(manager, authority):
        first = await manager.wait_bundle(ALICE)
        ahead = DAY * 1.1
        manager._now = lambda: now() + ahead
        authority.lifetime = DAY * 3
        before = trio.current_time()
        assert await manager.wait_bundle(ALICE) is not first
        assert trio.current_time() == before

    run(test)


def test_a_subscription_can_be_ended():
    async def test(manager, authority):
        news = []
        end = manager.subscribe(news.append)
        await manager.wait_bundle(ALICE)
        end()
        await manager.wait_bundle(BOB)
        assert [bundle.identity for bundle in news] == [ALICE]

    run(test)


def test_config_dump_shows_chain_and_state_but_no_key():
    bundle = FakeCa().issue(ALICE)

    async def fetch(identity: SpiffeId) -> CertificateBundle:
        if identity == ALICE:
            return bundle
        raise CertificateFetchFailed("signing gRPC error (UNAVAILABLE): gone")

    async def main() -> None:
        manager = CertificateManager(fetch)
        async with trio.open_nursery() as nursery:
            await nursery.start(manager.run)
            await manager.wait_bundle(ALICE)
            with pytest.raises(CertificateUnavailable):
                await manager.wait_bundle(BOB)
            alice, bob = rotation.describe_certificates(manager.states())
            assert (alice["identity"], alice["state"]) == (str(ALICE), "Available")
            (leaf,) = alice["certChain"]
            assert leaf["expirationTime"] == f"{bundle.not_after:%Y-%m-%dT%H:%M:%SZ}"
            assert leaf["serialNumber"].isdecimal()
            assert len(alice["rootCerts"]) == 1
            assert bob["state"] == "Unavailable: signing gRPC error (UNAVAILABLE): gone"
            assert "PRIVATE" not in repr((alice, bob, manager.states()))
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_a_certificate_that_another_holds_already_spares_the_fetch():
    async def test(manager, authority):
        held = await authority(ALICE)
        authority.calls.clear()
        manager.request(ALICE, Priority.WARMUP)
        manager.adopt(held)
        assert manager.find_bundle(ALICE) is held
        await trio.sleep(60)
        assert authority.calls == []
        await trio.sleep(DAY.total_seconds())
        assert authority.calls, "it is renewed as any other"
        manager.adopt(await authority(BOB))
        assert manager.find_bundle(BOB) is None, "nobody asked for it"

    run(test)


def test_a_certificate_that_has_expired_is_not_adopted():
    async def test(manager, authority):
        authority.lifetime = timedelta(seconds=-1)
        expired = await authority(ALICE)
        authority.gate = trio.Event()
        manager.request(ALICE)
        manager.adopt(expired)
        assert manager.find_bundle(ALICE) is None

    run(test)

"""How long connections wait for a waypoint that nobody answers for."""

from __future__ import annotations

from mesh.model.address import GatewayAddress, NamespacedHostname
from ztunnel_py.mover.missed import AWAITED_SECONDS, MissedWaypoints

ONE, OTHER = (GatewayAddress(NamespacedHostname("shop", name)) for name in ("one", "other"))


def test_all_wait_until_the_same_moment_and_who_comes_after_it_does_not() -> None:
    missed = MissedWaypoints()
    assert missed.miss(ONE, 100.0) == 100.0 + AWAITED_SECONDS
    assert missed.miss(ONE, 103.0) == 100.0 + AWAITED_SECONDS
    assert missed.miss(ONE, 111.0) == 100.0 + AWAITED_SECONDS
    assert missed.miss(OTHER, 111.0) == 111.0 + AWAITED_SECONDS


def test_one_that_was_reached_is_waited_for_anew() -> None:
    missed = MissedWaypoints()
    missed.miss(ONE, 100.0)
    missed.reach(ONE)
    missed.reach(OTHER)
    assert missed.miss(ONE, 103.0) == 103.0 + AWAITED_SECONDS


def test_one_that_nobody_looked_for_in_a_while_is_waited_for_anew() -> None:
    missed = MissedWaypoints()
    missed.miss(ONE, 100.0)
    assert missed.miss(ONE, 200.0) == 200.0 + AWAITED_SECONDS


def test_what_is_kept_is_bounded() -> None:
    missed = MissedWaypoints()
    for number in range(10_000):
        missed.miss(GatewayAddress(NamespacedHostname("shop", str(number))), 100.0)
    assert len(missed._missed) <= 1024

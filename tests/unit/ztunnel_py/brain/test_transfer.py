"""Which movers are told the whole state, and when."""

from __future__ import annotations

from ztunnel_py.brain.transfer import Newcomers


def test_a_mover_that_joins_while_the_first_configuration_arrives_is_told_all_once_it_is_there() -> None:
    newcomers: Newcomers[str] = Newcomers()
    assert not newcomers.joined("early"), "it hears all as it comes"
    newcomers.came()
    assert not newcomers.joined("between")
    newcomers.came()
    assert newcomers.synced() == ["between"]
    assert newcomers.joined("late")
    assert newcomers.synced() == [], "each is told once"


def test_a_mover_that_left_meanwhile_is_told_nothing() -> None:
    newcomers: Newcomers[str] = Newcomers()
    newcomers.came()
    newcomers.joined("between")
    newcomers.left("between")
    newcomers.left("another")
    assert newcomers.synced() == []

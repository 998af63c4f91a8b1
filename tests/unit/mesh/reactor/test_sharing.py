"""Who takes what waits at a listener that several processes accept on."""

from __future__ import annotations

from array import array

import pytest

from mesh.reactor.sharing import AGAIN, BURST_OVER, LONGEST, PATIENCE, Counts, Share


class Others:
    lead = 0.0

    def ask(self) -> float:
        return self.lead


@pytest.fixture
def others() -> Others:
    return Others()


@pytest.fixture
def share(others: Others) -> Share:
    return Share(others.ask, 2)


def test_a_connection_that_comes_alone_is_taken_however_far_ahead_one_is(share: Share, others: Others) -> None:
    others.lead = 1000.0
    assert share.allowance(5.0, batch=8) == 1
    share.took(5.0)
    assert share.allowance(5.0 + 2 * BURST_OVER, batch=8) == 1


def test_in_a_burst_nobody_takes_more_than_brings_it_so_far_ahead(share: Share, others: Others) -> None:
    share.took(5.0)
    assert share.allowance(5.0, batch=8) == 2
    others.lead = -4.0
    assert share.allowance(5.0, batch=8) == 6
    assert share.allowance(5.0, batch=3) == 3


def test_who_is_ahead_lets_others_go_first_for_a_while_and_then_takes_what_they_left(share: Share, others: Others) -> None:
    others.lead = 2.0
    share.took(5.0)
    assert share.allowance(5.0, batch=8) == 0
    assert share.allowance(5.0 + PATIENCE / 2, batch=8) == 0
    assert share.allowance(5.0 + 1.01 * PATIENCE, batch=8) == 8


def test_others_that_take_something_meanwhile_are_waited_for_again_but_not_for_ever(share: Share, others: Others) -> None:
    began = now = 5.0
    others.lead = 1000.0
    share.took(now)
    while share.allowance(now, batch=8) == 0:
        others.lead -= 1
        share.took(now)
        now += PATIENCE / 2
    assert LONGEST <= now - began <= LONGEST + PATIENCE


def test_for_others_that_do_not_come_nobody_waits_at_every_batch(share: Share, others: Others) -> None:
    others.lead = 50.0
    now, waited = 5.0, 0
    while now < 5.0 + 10 * AGAIN:
        share.took(now)
        waited += share.allowance(now, batch=8) == 0
        now += 0.001
    assert waited <= 10 * (PATIENCE / 0.001 + 1)


def test_the_next_is_anothers_when_one_is_ahead(share: Share, others: Others) -> None:
    assert not share.took(5.0)
    others.lead = 2.0
    assert share.took(5.0)


def test_the_lead_is_over_the_average_of_the_others() -> None:
    with memoryview(array("q", [7, 0, 4])) as column:
        own = Counts(column, 1)
        own.set(10)
        own.change(-1)
        assert list(column) == [7, 9, 4]
        assert own.lead() == 9 - 5.5


def test_what_the_process_before_had_is_forgotten() -> None:
    with memoryview(array("q", [7, 3])) as column:
        assert Counts(column, 1).lead() == -7
        assert list(column) == [7, 0]


def test_alone_nobody_is_ahead() -> None:
    with memoryview(array("q", [0])) as column:
        own = Counts(column, 0)
        own.set(5)
        assert own.lead() == 0

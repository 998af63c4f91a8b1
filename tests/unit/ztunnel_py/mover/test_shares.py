"""What movers know of each other."""

from __future__ import annotations

from pathlib import Path

import pytest

from ztunnel_py.mover.shares import join_shares


def test_movers_see_each_others_connections_and_links_apart(tmp_path: Path) -> None:
    one, two = (join_shares(tmp_path / "shares", 2, own) for own in (0, 1))
    one.connections.set(5)
    two.links.change(1)
    assert (one.connections.lead(), two.connections.lead()) == (5, -5)
    assert (one.links.lead(), two.links.lead()) == (-1, 1)


def test_a_mover_in_the_place_of_another_begins_with_none(tmp_path: Path) -> None:
    one, two = (join_shares(tmp_path / "shares", 2, own) for own in (0, 1))
    one.connections.set(5)
    join_shares(tmp_path / "shares", 2, 0)
    assert two.connections.lead() == 0


def test_movers_that_were_told_of_other_numbers_of_them_share_what_they_have_in_common(tmp_path: Path) -> None:
    older = join_shares(tmp_path / "shares", 2, 0)
    younger = join_shares(tmp_path / "shares", 3, 2)
    older.connections.set(4)
    assert younger.connections.lead() == -2
    older.links.change(2)
    assert younger.links.lead() == -1


def test_where_the_file_cannot_be_made_it_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        join_shares(tmp_path / "gone" / "shares", 2, 0)

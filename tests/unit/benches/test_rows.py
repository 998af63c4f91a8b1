"""Samples to rows."""

from __future__ import annotations

import json

import pytest

from benches.rows import ENVOY, NO_PROXY, OURS, InvalidRows, Record, dump, load


def test_a_ratio_is_the_median_of_the_turns_ratios_not_the_ratio_of_medians() -> None:
    record = Record("bulk")
    for ours, envoy in ((1.0, 1.0), (10.0, 10.0), (3.0, 1.0)):
        record.add("up", "cpu s/GB", OURS, ours)
        record.add("up", "cpu s/GB", ENVOY, envoy)
    row, envoy_row = record.rows()
    assert (row.median, row.low, row.high) == (3.0, 1.0, 10.0)
    assert (row.ratio_to_envoy, row.ratio_low, row.ratio_high) == (1.0, 1.0, 3.0)
    assert envoy_row.ratio_to_envoy == 1.0


def test_who_took_no_turns_with_envoy_has_no_ratio() -> None:
    record = Record("bulk")
    record.add("up", "GB/s", NO_PROXY, 2.0)
    record.add("down", "GB/s", OURS, 2.0)
    record.add("down", "GB/s", OURS, 2.0)
    record.add("down", "GB/s", ENVOY, 2.0)
    assert [row.ratio_to_envoy for row in record.rows() if row.subject != ENVOY] == [None, None]


def test_a_ratio_to_nothing_is_none() -> None:
    record = Record("bulk")
    record.add("up", "cpu s/GB", OURS, 1.0)
    record.add("up", "cpu s/GB", ENVOY, 0.0)
    assert record.rows()[0].ratio_to_envoy is None


def test_rows_stand_in_the_order_in_which_they_were_expected_and_subjects_in_theirs() -> None:
    record = Record("bulk")
    record.expect("up", "cpu s/GB")
    record.add("up", "GB/s", NO_PROXY, 1.0)
    record.add("up", "cpu s/GB", ENVOY, 1.0)
    record.add("up", "cpu s/GB", OURS, 1.0)
    assert [(row.unit, row.subject) for row in record.rows()] == [("cpu s/GB", OURS), ("cpu s/GB", ENVOY), ("GB/s", NO_PROXY)]


def test_rows_come_back_from_their_file_with_the_fields_that_readers_count_on() -> None:
    record = Record("bulk")
    record.add("up", "cpu s/GB", OURS, 1.5)
    text = dump(record.rows())
    assert load(text) == record.rows()
    (found,) = json.loads(text)
    assert {"figure", "case", "subject", "unit", "median", "low", "high", "ratio_to_envoy"} <= found.keys()


@pytest.mark.parametrize(("text", "complaint"), [("{", "not JSON"), ("{}", "not a list"), ('[{"figure": "bulk"}]', "row 1")])
def test_a_file_of_something_else_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(InvalidRows, match=complaint):
        load(text)

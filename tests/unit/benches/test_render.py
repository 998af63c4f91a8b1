"""What documents show of rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benches import render
from benches.__main__ import FIGURES
from benches.machine import Machine
from benches.marks import MARKS
from benches.rows import ENVOY, OURS, OURS_TWO, InvalidRows, Record, Row
from benches.table import cells, markdown_table, number, text_table

REPOSITORY = Path(__file__).parents[3]
RAN_ON = Machine(
    "2026-01-01T00:00+00:00", "abc", "a CPU", 2, 8, 0.5, "6.1", "3.11.2", "built somehow", "compiled", "OpenSSL 4.0", "1.40", ""
)
SVG = "{http://www.w3.org/2000/svg}"


def rows(*samples: tuple[str, str, str, str, float]) -> list[Row]:
    records: dict[str, Record] = {}
    for figure, case, unit, subject, value in samples:
        records.setdefault(figure, Record(figure)).add(case, unit, subject, value)
    return [row for record in records.values() for row in record.rows()]


BULK = rows(
    ("bulk", "up", "cpu s/GB", OURS, 1.2),
    ("bulk", "up", "cpu s/GB", ENVOY, 1.0),
    ("bulk", "down", "cpu s/GB", OURS, 0.9),
    ("bulk", "down", "cpu s/GB", ENVOY, 1.0),
)


def test_a_table_has_a_line_for_each_quantity_and_a_column_for_each_subject() -> None:
    assert cells(BULK) == [
        ["case", "unit", OURS, ENVOY],
        ["up", "cpu s/GB", "1.20 1.20x", "1.00"],
        ["down", "cpu s/GB", "0.90 0.90x", "1.00"],
    ]
    assert text_table(BULK).splitlines()[2].startswith("up    cpu s/GB")
    assert markdown_table(BULK).splitlines()[1] == "| --- | --- | --: | --: |"


def test_a_quantity_that_a_subject_has_not_stays_empty() -> None:
    found = cells(rows(("bulk", "up", "GB/s", OURS, 1.0), ("bulk", "down", "GB/s", ENVOY, 1.0)))
    assert found[1:] == [["up", "GB/s", "1.00", ""], ["down", "GB/s", "", "1.00"]]


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.01234, "0.012"), (0.5, "0.50"), (1.234, "1.23"), (12.34, "12.3"), (1234.5, "1234")]
)
def test_numbers_have_about_three_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_only_blocks_are_replaced_and_all_text_around_them_stays() -> None:
    text = "before\n<!-- bench: bulk -->\nold\n<!-- /bench -->\nbetween\n<!-- bench: marks -->\n<!-- /bench -->\nafter\n"
    assert render.replace_blocks(text, {"bulk": "new", "marks": "m"}) == (
        "before\n<!-- bench: bulk -->\nnew\n<!-- /bench -->\nbetween\n<!-- bench: marks -->\nm\n<!-- /bench -->\nafter\n"
    )


def test_a_document_that_wants_more_than_was_measured_is_not_written() -> None:
    with pytest.raises(InvalidRows, match="idle"):
        render.replace_blocks("<!-- bench: idle -->\n<!-- /bench -->", render.make_blocks(BULK, RAN_ON))


def test_a_mark_is_reached_only_if_every_case_reaches_it() -> None:
    table = render.make_blocks(BULK, RAN_ON)["marks"]
    assert "| bulk | CPU of a gigabyte | at most 1.00 x | 0.90 to 1.20 | no |" in table
    assert "yes" in render.make_blocks(BULK[2:], RAN_ON)["marks"]


def test_a_rate_must_be_at_least_its_mark() -> None:
    slow = rows(("connections", "1", "connections/s", OURS, 900.0), ("connections", "1", "connections/s", ENVOY, 1000.0))
    assert "at least 1.00 x | 0.90 | no |" in render.make_blocks(slow, RAN_ON)["marks"]


def test_two_movers_are_compared_with_one() -> None:
    up = rows(("movers", "up", "GB/s", OURS, 1.0), ("movers", "up", "GB/s", OURS_TWO, 1.8))
    down = rows(("movers", "down", "GB/s", OURS, 1.0), ("movers", "down", "GB/s", OURS_TWO, 1.6))
    assert "at least 1.70 times | 1.80 | yes |" in render.make_blocks(up, RAN_ON)["marks"]
    assert "at least 1.70 times | 1.60 to 1.80 | no |" in render.make_blocks(up + down, RAN_ON)["marks"]


def test_where_movers_could_not_be_limited_the_page_says_so() -> None:
    assert "needs the CPU controller" in render.make_blocks(BULK, RAN_ON)["movers"]


def test_growth_is_that_of_the_largest_over_the_smallest_mesh() -> None:
    found = rows(
        *(("state", f"resolve one connection, {size} workloads", "cpu us", OURS, cost) for size, cost in ((100, 10.0), (10_000, 12.0)))
    )
    assert "at most 1.50 times | 1.20 | yes |" in render.make_blocks(found, RAN_ON)["marks"]


def test_headlines_are_ratios_over_all_cases() -> None:
    assert "| CPU of a gigabyte | 0.90 to 1.20 |" in render.make_blocks(BULK, RAN_ON)["headlines"]


def test_a_plot_of_ratios_places_ours_right_of_envoy_when_it_costs_more() -> None:
    svg = ElementTree.fromstring(render.make_plots(BULK)["performance-bulk.svg"])
    _, more, less = [float(dot.get("cx", "")) for dot in svg.iter(f"{SVG}circle")]
    (one,) = [float(text.get("x", "")) for text in svg.iter(f"{SVG}text") if text.text == "1x"]
    assert less < one < more


def test_the_longest_label_of_a_plot_is_on_the_page() -> None:
    long = [replace(row, case="10000 routes, 1000 policies: HTTP/1.1, 16 at a time") for row in BULK]
    drawn = [render.make_plots(long)["performance-bulk.svg"]]
    shown = [path.read_text() for path in (REPOSITORY / render.PLOTS).glob("performance-*.svg")]
    for svg in map(ElementTree.fromstring, drawn + shown):
        left = float(svg.get("viewBox", "").split()[0])
        for label in svg.iter(f"{SVG}text"):
            if label.get("text-anchor") == "end":
                assert float(label.get("x", "")) - 6.6 * len(label.text or "") >= left, label.text


def test_a_curve_has_a_point_for_each_size() -> None:
    found = rows(
        *(("pods", case, "MB", OURS, value) for case, value in (("no pod", 90.0), ("50 pods", 110.0), ("50 pods more than none", 20.0)))
    )
    svg = ElementTree.fromstring(render.make_plots(found)["performance-pods.svg"])
    (line,) = svg.iter(f"{SVG}polyline")
    assert len(line.get("points", "").split()) == 2


def test_what_was_not_measured_is_not_drawn() -> None:
    assert list(render.make_plots(BULK)) == ["performance-bulk.svg"]


def test_documents_show_every_figure_and_every_plot_they_show_is_there() -> None:
    text = "".join((REPOSITORY / path).read_text() for path in render.DOCUMENTS)
    for block in ("machine", "marks", "headlines", *FIGURES):
        assert f"<!-- bench: {block} -->" in text
    for figure in {mark.figure for mark in MARKS}:
        assert figure in FIGURES
    for plot in (REPOSITORY / render.PLOTS).glob("performance-*.svg"):
        assert plot.name in text

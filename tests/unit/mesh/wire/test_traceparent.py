import random

import pytest

from mesh.wire.traceparent import Traceparent, new_traceparent, parse_traceparent


def test_a_new_one_has_55_characters_and_reads_back() -> None:
    rng = random.Random(7)
    seen = {new_traceparent(rng) for _ in range(100)}
    assert len(seen) == 100
    for text in seen:
        assert len(text) == 55
        assert str(parse_traceparent(text)) == text


def test_flags_are_kept() -> None:
    assert parse_traceparent("00-" + "a" * 32 + "-" + "b" * 16 + "-01") == Traceparent(int("a" * 32, 16), int("b" * 16, 16), 1)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("00-" + "0" * 52, id="55 characters and one dash: brings ztunnel down"),
        pytest.param("0" * 55, id="no dash"),
        pytest.param("-" * 55, id="only dashes"),
        pytest.param("00-" + "1" * 49 + "-00", id="two dashes"),
        pytest.param("00-" + "0" * 32 + "-" + "1" * 16 + "-00", id="trace id zero"),
        pytest.param("00-" + "1" * 32 + "-" + "0" * 16 + "-00", id="parent id zero"),
        pytest.param("ff-" + "1" * 32 + "-" + "1" * 16 + "-00", id="version ff"),
        pytest.param("00-" + "A" * 32 + "-" + "1" * 16 + "-00", id="upper case"),
        pytest.param("00-" + "g" * 32 + "-" + "1" * 16 + "-00", id="no hex"),
        pytest.param("00-" + "١" * 32 + "-" + "1" * 16 + "-00", id="digits that are not ASCII"),
        pytest.param("00-" + "1" * 32 + "-" + "1" * 16 + "-00\n", id="56 characters"),
        pytest.param("", id="nothing"),
    ],
)
def test_anything_else_is_none(text: str) -> None:
    assert parse_traceparent(text) is None

"""Whatever a client asks for: one spelling, which nothing that normalises after us reads differently, and which the policies saw."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mesh.http.path import BadPath, normalise
from mesh.model.l7.waypoint import PathNormalization

MODES = list(PathNormalization)
MERGING = [PathNormalization.MERGE_SLASHES, PathNormalization.DECODE_AND_MERGE_SLASHES]
UNRESERVED = b"-._~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"

anything = st.binary(max_size=60).map(lambda rest: b"/" + rest)
PIECES = [b"%", b"%2", b"%25", b"%2e", b"%2E", b"%2f", b"%5C", b"%30", b"%34", b"%66", b"%00", b"%c0", b"%3b", b"%3f", b"%23"]
PIECES += [b"2", b"5", b"e", b"f", b"1", b"/", b"//", b".", b"..", b";", b"\\", b"|", b'"', b"^", b"a", b"?", b"#", b"admin", b"/../"]
percents = st.lists(st.sampled_from(PIECES), max_size=24).map(lambda pieces: b"/" + b"".join(pieces))
paths = st.one_of(anything, percents)


def only(path: bytes) -> bytes:
    return path.partition(b"?")[0]


@given(st.binary(max_size=60), st.sampled_from(MODES))
def test_nothing_makes_it_raise(path: bytes, how: PathNormalization) -> None:
    normalise(path, how)


@given(paths, st.sampled_from(MODES))
@example(b'/%41"', PathNormalization.BASE)
@example(b"/%%341|", PathNormalization.BASE)
@example(b"/%%30%30^", PathNormalization.MERGE_SLASHES)
def test_normalising_twice_changes_nothing_more(path: bytes, how: PathNormalization) -> None:
    once = normalise(path, how)
    if not isinstance(once, BadPath):
        assert normalise(once, how) == once


@given(paths, st.sampled_from([mode for mode in MODES if mode is not PathNormalization.NONE]))
def test_no_dot_segment_and_no_escape_of_an_unreserved_character_is_left(path: bytes, how: PathNormalization) -> None:
    made = normalise(path, how)
    if isinstance(made, BadPath):
        return
    segments = [segment.partition(b";")[0] for segment in only(made).split(b"/")]
    assert not {b".", b".."}.intersection(segments)
    assert b"\\" not in only(made)
    assert not any(b"%%%02x" % byte in only(made).replace(b"%%%02X" % byte, b"%%%02x" % byte) for byte in UNRESERVED)
    assert b"%00" not in only(made)


@given(paths, st.sampled_from(MERGING))
def test_no_double_slash_is_left_where_they_are_merged(path: bytes, how: PathNormalization) -> None:
    made = normalise(path, how)
    assert isinstance(made, BadPath) or b"//" not in only(made)


@given(paths)
def test_no_escaped_slash_is_left_where_they_are_decoded(path: bytes) -> None:
    made = normalise(path, PathNormalization.DECODE_AND_MERGE_SLASHES)
    assert isinstance(made, BadPath) or not any(escape in only(made).lower() for escape in (b"%2f", b"%5c"))


@given(paths, st.sampled_from(MODES))
def test_a_query_is_never_touched_and_a_fragment_never_kept(path: bytes, how: PathNormalization) -> None:
    made = normalise(path, how)
    if not isinstance(made, BadPath):
        assert made.partition(b"?")[1:] == path.partition(b"#")[0].partition(b"?")[1:]
        assert b"#" not in made


@pytest.mark.parametrize("how", MODES)
@pytest.mark.parametrize("unit", [b"%", b"%%341", b"%2", b"%25", b"/..", b"//", b'%41"', b"\\", b"/.;", b"%2e%2f", b"%%"])
def test_a_path_as_long_as_a_head_may_be_is_spelt_like_a_short_one(unit: bytes, how: PathNormalization) -> None:
    made = normalise(b"/" + unit * (60 * 1024 // len(unit)), how)
    assert isinstance(made, bytes)
    assert normalise(made, how) == made

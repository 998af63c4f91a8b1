"""Header blocks that a waypoint writes, read by another HPACK: whatever was indexed before, wherever in a block something is inserted."""

from __future__ import annotations

import pytest
from hpack import Decoder
from hypothesis import given
from hypothesis import strategies as st

from mesh.http.blocks import BlockWriter
from mesh.http.message import Headers
from mesh.wire.errors import LocalProtocolError

VALUES = [b"", b"GET", b"/", b"1", b"2", b"x" * 400]
PSEUDO = st.lists(st.tuples(st.sampled_from([b":method", b":path", b":status"]), st.sampled_from(VALUES)), max_size=3)
NAMES = st.sampled_from([b"accept", b"x-a", b"x-b", b"authorization", b"cookie"])
HEADERS = st.lists(st.tuples(NAMES, st.sampled_from(VALUES)), max_size=6)
FLAWED = [(b":path", b"/"), (b"X", b"1"), (b"", b"1"), (b"x-a", b"1\r\nx-b: 2"), (b"x-c\x00", b"1")]


@given(st.lists(st.tuples(PSEUDO, HEADERS), max_size=12), st.sampled_from([0, 100, 4096]))
def test_blocks_are_read_as_they_were_written(blocks: list[tuple[Headers, Headers]], size: int) -> None:
    writer, reader = BlockWriter(), Decoder()
    writer.resize(size)
    for pseudo, headers in blocks:
        read = [(bytes(name), bytes(value)) for name, value in reader.decode(writer.write(pseudo, headers), raw=True)]
        assert read == [*pseudo, *headers]


@given(st.lists(st.tuples(PSEUDO, HEADERS), max_size=6), PSEUDO, HEADERS, st.sampled_from(FLAWED), st.integers(0, 6))
def test_a_block_that_is_refused_leaves_nothing_behind(
    before: list[tuple[Headers, Headers]], pseudo: Headers, headers: Headers, flawed: tuple[bytes, bytes], place: int
) -> None:
    writer, reader = BlockWriter(), Decoder()
    for block in before:
        reader.decode(writer.write(*block), raw=True)
    with pytest.raises(LocalProtocolError):
        writer.write(pseudo, [*headers[:place], flawed, *headers[place:]])
    for _ in range(2):
        read = [(bytes(name), bytes(value)) for name, value in reader.decode(writer.write(pseudo, headers), raw=True)]
        assert read == [*pseudo, *headers]

"""HPACK, ours against the library's, and the fields that may come out of it."""

from collections.abc import Callable

from hpack import Decoder, Encoder
from hpack.exceptions import HPACKError
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.testing.hbone import StoppedClock, deliver
from mesh.wire.errors import RemoteProtocolError
from mesh.wire.frames import PREFACE, FrameType, frame_header, header_frames
from mesh.wire.hbone import HboneServer, TunnelRequested
from mesh.wire.headers import HeaderReader, HeaderWriter, MalformedHeaders, check_trailers, parse_request, parse_response

_NAMES = st.sampled_from(["baggage", "forwarded", "traceparent", "x-forwarded-network", "accept", "x"]) | st.text(
    "abcxyz-", min_size=1, max_size=9
)
_VALUES = st.text(max_size=300).map(lambda text: "".join(char for char in text if char.isprintable()).strip())
_HEADERS = st.dictionaries(_NAMES, _VALUES, max_size=5)


@given(blocks=st.lists(st.tuples(_HEADERS, st.sampled_from([None, 0, 64, 4096, 2**32 - 1])), max_size=6))
def test_what_is_written_reads_back_and_the_library_agrees(blocks: list[tuple[dict[str, str], int | None]]) -> None:
    writer, reader, library = HeaderWriter(), HeaderReader(65536), Decoder()
    for headers, table_size in blocks:
        if table_size is not None:
            writer.resize(table_size)
        block = writer.request("10.0.0.1:80", headers)
        fields = reader.read(block)
        assert [tuple(field) for field in library.decode(block, raw=True)] == fields
        assert parse_request(fields) == ("CONNECT", "10.0.0.1:80", headers)


_REPRESENTATION = st.one_of(
    st.integers(0x80, 0xFF).map(lambda byte: bytes([byte])),
    st.tuples(st.sampled_from([b"\x40", b"\x00", b"\x10"]), st.binary(max_size=30), st.binary(max_size=30)).map(
        lambda parts: parts[0] + bytes([len(parts[1])]) + parts[1] + bytes([len(parts[2])]) + parts[2]
    ),
    st.tuples(st.sampled_from([0x40, 0x00, 0x10]), st.integers(1, 14), st.binary(max_size=30)).map(
        lambda parts: bytes([parts[0] | parts[1], len(parts[2])]) + parts[2]
    ),
    st.integers(0x20, 0x3F).map(lambda byte: bytes([byte])),
    st.integers(60, 126).map(lambda length: b"\x40\x01a" + bytes([length]) + bytes(length)),
    st.binary(max_size=6),
)


@settings(max_examples=500)
@given(blocks=st.lists(st.lists(_REPRESENTATION, max_size=25).map(b"".join), max_size=4))
def test_any_block_means_to_us_what_it_means_to_the_library(blocks: list[bytes]) -> None:
    reader, library = HeaderReader(2000), Decoder(2000)
    for block in blocks:
        try:
            fields = reader.read(block)
        except RemoteProtocolError as exc:
            if "table size update" in exc.reason:  # we are stricter: two of them, both before the first field
                return
            try:
                library.decode(block, raw=True)
            except HPACKError:
                return
            raise AssertionError(f"the library reads {block.hex()}, we say {exc.reason}") from exc
        assert [tuple(field) for field in library.decode(block, raw=True)] == fields


_FEW = [
    b"\x40\x01a\x01b",
    b"\x40\x01c\x01d",
    b"\xbe",
    b"\xbf",
    b"\xbe\xbf",
    b"\x82\xbe",
    b"\x00\x01a\x01b",
    b"\x20\x3f\xe1\x1f\x82",
    b"\x3f\x11\x82",
]
"""Blocks that insert, that name what was inserted last, and that change the table's size."""


@settings(max_examples=500)
@given(blocks=st.lists(st.sampled_from(_FEW), min_size=4, max_size=40))
def test_a_block_that_is_remembered_means_what_it_would_mean_without_memory(blocks: list[bytes]) -> None:
    reader, forgetful = HeaderReader(2000, remembers=True), HeaderReader(2000)
    for block in (_FEW[0], _FEW[1], *blocks):
        try:
            expected = forgetful.read(block)
        except RemoteProtocolError:
            return
        found = reader.read(block)
        assert found == expected
        if reader.steady:
            assert reader.read(block) is found


_TAILS = [
    b"\x00\x09forwarded" + bytes([len(one)]) + one + b"\x00\x0btraceparent" + bytes([len(other)]) + other
    for one in (b"", b"x", b" x", b"\xc3\xa9", b"y" * 30)
    for other in (b"z", b"\x00", b"z" * 8)
]
_INSERTING = [b"\x42\x07CONNECT\x01\x011", b"\x48\x03200\x40\x01a\x01b", b"\x02\x07CONNECT\x01\x011\x40\x01c\x01d"]
_LASTING = [
    b"\x02\x07CONNECT\x01\x011",
    b"\xbe\x01\x011",
    b"\xbf\x01\x011",
    b"\x02\x07CONNECT\x01\x011\xbe",
    b"\x02\x07CONNECT\x01\x011\xbf",
    b"\x02\x07CONNECT\x01\x011" + _TAILS[3],
    b"\x02\x07CONNECT\x01\x011\x10\x09forwarded\x01x",
    b"\x02\x07CONNECT\x01",  # ends amid a field, and goes on with the name of the next
    b"\x88\xbe",
    b"\x88\xbf",
    b"\x88\xc0",
    b"\x08\x03200\x00\x01x\x01y",
    b"\x20\x3f\xe1\x1f\x88",  # empties the table
]
_BLOCK = st.one_of(
    st.sampled_from([head + tail for head in _LASTING[:8] for tail in _TAILS]),
    st.sampled_from(_LASTING),
    st.sampled_from([*_INSERTING, *(head + tail for head in _INSERTING for tail in _TAILS)]),
    st.tuples(st.sampled_from(_LASTING[:5]), st.sampled_from(_TAILS), st.sampled_from([b"\x88", b"\x00", b"\x00\x01a\x01b"])).map(b"".join),
    st.tuples(st.sampled_from(_LASTING[:5]), st.sampled_from(_TAILS), st.integers(1, 30)).map(lambda cut: (cut[0] + cut[1])[: -cut[2]]),
    st.lists(_REPRESENTATION, max_size=4).map(b"".join),
)


@settings(max_examples=500)
@given(blocks=st.lists(_BLOCK, max_size=16), most=st.sampled_from([180, 200, 2000]))
def test_what_is_known_of_blocks_means_what_reading_them_anew_gives(blocks: list[bytes], most: int) -> None:
    def outcome(read: Callable[[HeaderReader, bytes], object], reader: HeaderReader, block: bytes) -> object:
        try:
            return read(reader, block)
        except (RemoteProtocolError, MalformedHeaders) as exc:
            return type(exc), str(exc)

    ways: list[tuple[Callable[[HeaderReader, bytes], object], Callable[[HeaderReader, bytes], object]]] = [
        (HeaderReader.read_request, lambda reader, block: parse_request(reader.read(block))),
        (HeaderReader.read_response, lambda reader, block: parse_response(reader.read(block))),
    ]
    for kept, anew in ways:
        quick, slow = HeaderReader(most), HeaderReader(most)
        taken: list[bytes] = []
        for block in [*_INSERTING[:2], *blocks]:  # so that there is something to refer to
            expected = outcome(anew, slow, block)
            assert outcome(kept, quick, block) == expected
            if isinstance(expected, tuple) and expected[0] is RemoteProtocolError:
                quick, slow = HeaderReader(most), HeaderReader(most)  # the table is lost; go on as if that block had not come
                for earlier in taken:
                    outcome(kept, quick, earlier)
                    outcome(anew, slow, earlier)
            else:
                taken.append(block)


def test_requests_that_differ_in_their_last_fields_only_are_read_from_what_is_known_of_the_others() -> None:
    writer, reader = HeaderWriter(), HeaderReader(65536)
    headers = {"baggage": "a=b", "forwarded": 'for="10.0.0.1:1"', "traceparent": "00-1"}
    for number in range(4):
        headers["forwarded"] = f'for="10.0.0.1:{number}"'
        assert reader.read_request(writer.request("10.0.0.1:80", headers)) == ("CONNECT", "10.0.0.1:80", headers)
    (known,) = reader._heads
    reader._heads[known] = reader._heads[known]._replace(method="KNOWN")  # so that it shows where the method comes from
    assert reader.read_request(writer.request("10.0.0.1:80", headers)) == ("KNOWN", "10.0.0.1:80", headers)


@given(
    fields=st.lists(
        st.tuples(st.binary(max_size=12) | st.sampled_from([b":method", b":authority", b":status"]), st.binary(max_size=12)), max_size=6
    )
)
def test_any_fields_are_parsed_or_malformed(fields: list[tuple[bytes, bytes]]) -> None:
    for parse in (parse_request, parse_response, check_trailers):
        try:
            parse(fields)
        except MalformedHeaders as exc:
            str(exc).encode()


@given(headers=_HEADERS, fragment=st.integers(20, 200), huffman=st.booleans(), padding=st.integers(0, 255), data=st.data())
def test_a_block_may_come_in_fragments_and_portions(
    headers: dict[str, str], fragment: int, huffman: bool, padding: int, data: st.DataObject
) -> None:
    fields = [(":method", "CONNECT"), (":authority", "10.0.0.1:80"), *headers.items()]
    block = Encoder().encode(fields, huffman=huffman)
    frames = header_frames(1, block, end_stream=False, max_frame_size=max(fragment, len(block) // 16 + 1))
    first = 9 + int.from_bytes(frames[:3])
    padded = bytes([padding]) + frames[9:first] + bytes(padding)
    wire = PREFACE + frame_header(0, FrameType.SETTINGS, 0, 0) + frame_header(len(padded), FrameType.HEADERS, frames[4] | 8, 1) + padded
    wire += frames[first:]
    (event,) = deliver(HboneServer(now=StoppedClock()), wire, data.draw(st.lists(st.integers(1, 50), max_size=30)))
    assert isinstance(event, TunnelRequested)
    assert event.headers == headers

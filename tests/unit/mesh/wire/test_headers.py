import inspect
import sys

import hpack
import pytest

from mesh.wire.errors import ErrorCode, RemoteProtocolError
from mesh.wire.headers import (
    MAX_TABLE_SIZE,
    HeaderReader,
    HeaderWriter,
    MalformedHeaders,
    check_trailers,
    parse_request,
    parse_response,
    write_integer,
)

HEADERS = {
    "baggage": "k8s.cluster.name=Kubernetes",
    "forwarded": 'for="10.0.0.1:4000"',
    "traceparent": "00-" + "1" * 32 + "-" + "2" * 16 + "-00",
}
CONNECT = [(b":method", b"CONNECT"), (b":authority", b"10.0.0.1:80")]


def test_a_request_reads_as_it_was_written() -> None:
    writer, reader = HeaderWriter(), HeaderReader(65536)
    for _ in range(3):
        request = parse_request(reader.read(writer.request("10.0.0.1:80", HEADERS)))
        assert (request.method, request.authority, request.headers) == ("CONNECT", "10.0.0.1:80", HEADERS)


def test_a_response_reads_as_it_was_written() -> None:
    writer, reader = HeaderWriter(), HeaderReader(65536)
    for status in (200, 401, 503, 200, 401):
        response = parse_response(reader.read(writer.response(status, {"baggage": "a=b"})))
        assert (response.status, response.headers) == (status, {"baggage": "a=b"})


def test_stable_headers_cost_a_byte_from_the_second_block_on_and_changing_ones_never_enter_the_table() -> None:
    writer = HeaderWriter()
    first, second = (writer.request("10.0.0.1:80", HEADERS) for _ in range(2))
    assert len(first) - len(second) > len(HEADERS["baggage"])
    literals = sum(len(HEADERS[name]) + len(name) + 3 for name in ("forwarded", "traceparent")) + len("10.0.0.1:80") + 2
    assert len(second) == 2 + literals
    decoder = hpack.Decoder()
    decoder.decode(first)
    assert {name for name, _ in decoder.header_table.dynamic_entries} == {b":method", b"baggage"}


def test_a_new_stable_header_shifts_the_ones_before_it() -> None:
    writer, decoder = HeaderWriter(), hpack.Decoder()
    for value in ("one", "two", "one", "three", "two"):
        fields = dict(decoder.decode(writer.response(200, {"baggage": value, "x-forwarded-network": "n"})))
        assert fields == {":status": "200", "baggage": value, "x-forwarded-network": "n"}


def test_a_shrunk_table_is_told_to_the_peer_once_even_if_it_is_shrunk_twice() -> None:
    writer, decoder = HeaderWriter(), hpack.Decoder()
    decoder.decode(writer.request("a:1", HEADERS))
    decoder.max_allowed_table_size = 0
    writer.resize(0)
    writer.resize(0)
    for _ in range(2):
        assert dict(decoder.decode(writer.request("a:1", HEADERS)))["baggage"] == HEADERS["baggage"]
    decoder.max_allowed_table_size = MAX_TABLE_SIZE
    writer.resize(2**32 - 1)
    for _ in range(2):
        assert dict(decoder.decode(writer.request("a:1", HEADERS)))["baggage"] == HEADERS["baggage"]


def test_the_next_block_tells_the_least_size_that_the_table_had_and_the_one_it_has() -> None:
    writer = HeaderWriter()
    for sizes, told in (((100,), [100]), ((50, 0, 100, 60), [0, 60]), ((70, 60), [60])):
        for size in sizes:
            writer.resize(size)
        block = writer.response(200, {})
        assert block == b"".join(write_integer(size, 5, 0x20) for size in told) + b"\x88"
        assert writer.response(200, {}) == b"\x88"


def test_a_peer_that_changes_its_settings_for_ever_costs_a_connection_without_blocks_nothing() -> None:
    writer = HeaderWriter()
    names = [name for name, of in vars(HeaderWriter).items() if inspect.ismemberdescriptor(of) or inspect.isgetsetdescriptor(of)]
    assert "_entries" in names, "slots, or what stands for them in a compiled class"

    def size() -> int:
        return sum(sys.getsizeof(getattr(writer, name)) for name in names)

    writer.resize(1)
    before = size()
    for number in range(10_000):
        writer.resize(number % 2)
    assert size() < before + 100
    assert writer.response(200, {}) == b"\x20\x21\x88"


def test_blocks_that_mean_much_for_their_length_are_not_remembered() -> None:
    """By indices a few bytes ask for one large field again and again."""
    reader, encoder = HeaderReader(1 << 18, remembers=True), hpack.Encoder()
    crumb = (b"cookie", b"a" * 3000)
    reader.read(encoder.encode([crumb]))
    for number in range(100):
        fields = reader.read(encoder.encode([crumb] * (3 + number % 20)))
        assert fields[-1] == crumb
        assert not reader.steady
    small = encoder.encode([crumb, crumb])
    reader.read(small)
    assert reader.steady
    assert list(reader._blocks) == [small]


def test_long_values_are_written() -> None:
    reader = HeaderReader(65536)
    for length in (126, 127, 128, 10_000):
        fields = reader.read(HeaderWriter().request("a:1", {"forwarded": "f" * length, "baggage": "b" * length}))
        assert fields[2:] == [(b"forwarded", b"f" * length), (b"baggage", b"b" * length)]


@pytest.mark.parametrize(
    ("code", "block"),
    [
        pytest.param(ErrorCode.COMPRESSION_ERROR, b"\x80", id="index 0"),
        pytest.param(ErrorCode.COMPRESSION_ERROR, b"\xbe", id="an index beyond the table"),
        pytest.param(ErrorCode.COMPRESSION_ERROR, b"\x00\x05ab", id="the block ends amid a name"),
        pytest.param(ErrorCode.COMPRESSION_ERROR, b"\x00\x01a", id="the block ends before a value"),
        pytest.param(ErrorCode.COMPRESSION_ERROR, b"\x7f", id="the block ends amid an integer"),
        pytest.param(ErrorCode.COMPRESSION_ERROR, b"\x7f" + b"\xff" * 9 + b"\x01", id="an endless integer"),
        pytest.param(ErrorCode.COMPRESSION_ERROR, b"\x00\x81\xff\x00", id="Huffman padding of eight bits"),
        pytest.param(ErrorCode.COMPRESSION_ERROR, b"\x00\x84\xff\xff\xff\xff\x00", id="the end of string symbol"),
        pytest.param(ErrorCode.COMPRESSION_ERROR, b"\x3f\xe2\x1f", id="a table larger than allowed"),
        pytest.param(ErrorCode.COMPRESSION_ERROR, b"\x88\x20", id="a size update after a field"),
        pytest.param(ErrorCode.COMPRESSION_ERROR, b"\x20\x20\x20", id="three size updates"),
        pytest.param(ErrorCode.ENHANCE_YOUR_CALM, b"\x00\x01a\x00" * 40, id="many small fields"),
        pytest.param(ErrorCode.ENHANCE_YOUR_CALM, b"\x40\x01a\x7f\x81\x07" + b"x" * 1024, id="one large field"),
        pytest.param(ErrorCode.ENHANCE_YOUR_CALM, b"\x40\x01a\x7f\x81\x03" + b"x" * 512 + b"\xbe" * 10, id="a bomb of references"),
    ],
)
def test_a_broken_or_oversized_block_ends_the_connection(code: ErrorCode, block: bytes) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        HeaderReader(1000).read(block)
    assert caught.value.code == code


def test_a_request_that_begins_as_another_may_not_be_larger_than_any_other() -> None:
    writer, reader = HeaderWriter(), HeaderReader(400)
    for length in (10, 20, 30):
        reader.read_request(writer.request("a:1", HEADERS | {"forwarded": "f" * length}))
    assert len(reader._heads) == 1
    with pytest.raises(RemoteProtocolError, match="over 400 bytes"):
        reader.read_request(writer.request("a:1", HEADERS | {"forwarded": "f" * 126}))


def test_a_field_that_is_repeated_at_the_end_is_joined_every_time() -> None:
    reader = HeaderReader(65536)
    ending = b"\x00\x09forwarded\x01y\x00\x0btraceparent\x01z"
    for _ in range(3):
        request = reader.read_request(b"\x02\x07CONNECT\x01\x03a:1\x10\x09forwarded\x01x" + ending)
        assert request.headers == {"forwarded": "x,y", "traceparent": "z"}


def test_a_peer_may_shrink_and_widen_our_table() -> None:
    encoder, reader = hpack.Encoder(), HeaderReader(65536)
    for size in (4096, 0, 100, 4096):
        encoder.header_table_size = size
        fields = [(b"baggage", b"x" * 50), (b"server", b"y")]
        assert reader.read(encoder.encode(fields)) == fields
        assert reader.read(encoder.encode(fields)) == fields


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param([], id="nothing"),
        pytest.param([(b":authority", b"a:1")], id="no method"),
        pytest.param([*CONNECT, (b":method", b"CONNECT")], id="method twice"),
        pytest.param([*CONNECT, (b":authority", b"b:1")], id="authority twice"),
        pytest.param([(b"a", b"b"), *CONNECT], id="pseudo-header after a regular one"),
        pytest.param([*CONNECT, (b":path", b"/")], id="CONNECT with path"),
        pytest.param([*CONNECT, (b":scheme", b"https")], id="CONNECT with scheme"),
        pytest.param([*CONNECT, (b":protocol", b"websocket")], id="extended CONNECT, which was not offered"),
        pytest.param([*CONNECT, (b":status", b"200")], id="a response's pseudo-header"),
        pytest.param([*CONNECT, (b"", b"x")], id="empty name"),
        pytest.param([*CONNECT, (b"Baggage", b"x")], id="upper case"),
        pytest.param([*CONNECT, (b"bag gage", b"x")], id="blank in a name"),
        pytest.param([*CONNECT, (b"bag:gage", b"x")], id="colon in a name"),
        pytest.param([*CONNECT, (b"bagg\xc3\xa9", b"x")], id="no ASCII in a name"),
        pytest.param([*CONNECT, (b"baggage", b"x\r\ny")], id="line break in a value"),
        pytest.param([*CONNECT, (b"baggage", b"x\0")], id="NUL in a value"),
        pytest.param([*CONNECT, (b"baggage", b" x")], id="leading blank"),
        pytest.param([*CONNECT, (b"baggage", b"x\t")], id="trailing tab"),
        pytest.param([(b":method", b"CONNECT"), (b":authority", b"a\nb:1")], id="line break in the authority"),
        *(
            pytest.param([*CONNECT, (name, b"x")], id=name.decode())
            for name in (b"connection", b"transfer-encoding", b"upgrade", b"keep-alive", b"te")
        ),
        pytest.param([*CONNECT, (b"proxy-connection", b"close")], id="proxy-connection"),
    ],
)
def test_a_malformed_request_is_none(fields: list[tuple[bytes, bytes]]) -> None:
    with pytest.raises(MalformedHeaders):
        parse_request(fields)


def test_other_methods_are_well_formed_and_an_authority_may_be_missing() -> None:
    get = [(b":method", b"GET"), (b":scheme", b"https"), (b":path", b"/"), (b"te", b"trailers")]
    assert parse_request(get)[:2] == ("GET", "")


def test_repeated_headers_are_joined() -> None:
    request = parse_request([*CONNECT, (b"baggage", b"a=1"), (b"x", b"y"), (b"baggage", b"b=2")])
    assert request.headers == {"baggage": "a=1,b=2", "x": "y"}


def test_values_that_are_no_utf8_can_still_be_printed() -> None:
    assert parse_request([*CONNECT, (b"baggage", b"a=\xff\xfe")]).headers["baggage"] == "a=\ufffd\ufffd"
    assert parse_request([*CONNECT, (b"baggage", "a=é".encode())]).headers["baggage"] == "a=é"


@pytest.mark.parametrize("status", [b"", b"20", b"2000", b"2x0", b"099", b"+20", "٢٠٠".encode()])
def test_a_response_without_a_status_of_three_digits_is_malformed(status: bytes) -> None:
    with pytest.raises(MalformedHeaders):
        parse_response([(b":status", status)])


def test_trailers_have_no_pseudo_headers() -> None:
    check_trailers([(b"grpc-status", b"0")])
    with pytest.raises(MalformedHeaders):
        check_trailers([(b":status", b"200")])

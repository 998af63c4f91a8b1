"""The PROXY protocol as Istio's node proxy writes it."""

from __future__ import annotations

import pytest

from mesh.model.address import SocketAddress
from mesh.wire.errors import RemoteProtocolError
from mesh.wire.proxy_protocol import MAX_HEADER, SIGNATURE, ProxyHeader, encode_header, encode_local, encode_text, parse_header

IDENTITY = "spiffe://cluster.local/ns/default/sa/client"
SOURCE, DESTINATION = SocketAddress.parse("10.0.0.1:1234"), SocketAddress.parse("10.0.0.2:8080")
GOLDEN = bytes.fromhex(
    "0d0a0d0a000d0a515549540a2111003a0a0000010a00000204d21f90d0002b"
    "7370696666653a2f2f636c75737465722e6c6f63616c2f6e732f64656661756c742f73612f636c69656e74"
)


def test_the_header_with_identity_is_istios_bytes_both_ways() -> None:
    assert encode_header(SOURCE, DESTINATION, IDENTITY) == GOLDEN
    assert parse_header(GOLDEN + b"hello") == ProxyHeader(SOURCE, DESTINATION, IDENTITY, len(GOLDEN))


def test_ipv6_has_longer_addresses() -> None:
    source, destination = SocketAddress.parse("[fd00::1]:1"), SocketAddress.parse("[fd00::2]:65535")
    header = encode_header(source, destination)
    assert (header[13], len(header)) == (0x21, 16 + 36)
    assert parse_header(header) == ProxyHeader(source, destination, None, 52)


def test_addresses_of_two_families_are_left_unsaid() -> None:
    header = encode_header(SOURCE, SocketAddress.parse("[fd00::2]:80"), IDENTITY)
    assert header[12:14] == b"\x21\x00"
    assert parse_header(header) == ProxyHeader(None, None, IDENTITY, len(header))


@pytest.mark.parametrize("size", range(len(GOLDEN)))
def test_a_part_of_a_header_waits_for_the_rest(size: int) -> None:
    assert parse_header(GOLDEN[:size]) is None


def test_local_connections_and_families_we_do_not_take_have_no_addresses() -> None:
    assert parse_header(SIGNATURE + bytes.fromhex("20000000")) == ProxyHeader(None, None, None, 16)
    assert parse_header(SIGNATURE + bytes.fromhex("21310002ffff")) == ProxyHeader(None, None, None, 18)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"GET / HTTP/1.1\r\n", "no PROXY"),
        (SIGNATURE + bytes.fromhex("11110000"), "version and command 0x11"),
        (SIGNATURE + bytes.fromhex("21110000"), "without room"),
        (SIGNATURE + bytes.fromhex("2111ffff"), "header of 65551 bytes"),
        (SIGNATURE + bytes.fromhex("2111000f") + bytes(12) + b"\xd0\x00\x05", "within a TLV"),
        (SIGNATURE + bytes.fromhex("2111000e") + bytes(12) + b"\xd0\x00", "within a TLV"),
        (SIGNATURE + bytes.fromhex("21110010") + bytes(12) + b"\xd0\x00\x01\xff", "not UTF-8"),
    ],
)
def test_malformed_headers_are_refused(data: bytes, reason: str) -> None:
    with pytest.raises(RemoteProtocolError, match=reason):
        parse_header(data)


def test_no_header_makes_us_wait_for_more_than_the_limit() -> None:
    assert parse_header(SIGNATURE + b"\x21\x11" + (MAX_HEADER - 16).to_bytes(2, "big")) is None


def test_a_connection_of_our_own_says_local() -> None:
    assert encode_local() == SIGNATURE + bytes.fromhex("20000000")
    assert parse_header(encode_local()) == ProxyHeader(None, None, None, 16)


@pytest.mark.parametrize(
    ("source", "destination", "line"),
    [
        ("192.168.0.1:56324", "192.168.0.11:443", b"PROXY TCP4 192.168.0.1 192.168.0.11 56324 443\r\n"),
        ("[fd00::1]:1", "[fd00::2]:65535", b"PROXY TCP6 fd00::1 fd00::2 1 65535\r\n"),
        ("10.0.0.1:1", "[fd00::2]:65535", b"PROXY UNKNOWN\r\n"),
    ],
)
def test_version_1_is_one_line(source: str, destination: str, line: bytes) -> None:
    """As in the examples of section 2.1 of the specification."""
    assert encode_text(SocketAddress.parse(source), SocketAddress.parse(destination)) == line


def test_version_1_says_when_it_knows_no_client() -> None:
    assert encode_text(None, None) == b"PROXY UNKNOWN\r\n"

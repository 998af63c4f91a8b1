"""What is heard on a wire, and whether it is TLS 1.3."""

from __future__ import annotations

import ssl
import struct
import tempfile
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.model.address import SocketAddress
from mesh.model.identity import SpiffeId
from mesh.testing.ca import FakeCa
from meshctl_py.lab.wiretap import Segment, Stream, decode_segments, encode_segments, is_tls, is_tls_1_3, join_segments, parse_packet

CLIENT, SERVER = SocketAddress.parse("10.0.0.1:1234"), SocketAddress.parse("10.0.0.2:15008")
IP, IPV6 = 0x0800, 0x86DD


def tcp(payload: bytes) -> bytes:
    return struct.pack(">HHIIBBHHH", 1234, 80, 1000, 0, 5 << 4, 0, 0, 0, 0) + payload


def packet_v4(payload: bytes, *, protocol: int = 6, fragment: int = 0, padding: bytes = b"") -> bytes:
    body = tcp(payload)
    addresses = ip_address("10.0.0.1").packed + ip_address("10.0.0.2").packed
    return struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(body), 0, fragment, 64, protocol, 0) + addresses + body + padding


def packet_v6(payload: bytes) -> bytes:
    body = tcp(payload)
    return struct.pack(">IHBB", 6 << 28, len(body), 6, 64) + ip_address("fd00::1").packed + ip_address("fd00::2").packed + body


def test_a_segment_is_read_from_either_family_without_padding() -> None:
    expected = Segment(SocketAddress.parse("10.0.0.1:1234"), SocketAddress.parse("10.0.0.2:80"), 1000, b"hello")
    assert parse_packet(IP, packet_v4(b"hello", padding=b"\0" * 6)) == expected
    found = parse_packet(IPV6, packet_v6(b"hello"))
    assert found is not None
    assert (str(found.source), str(found.destination), found.payload) == ("[fd00::1]:1234", "[fd00::2]:80", b"hello")


@pytest.mark.parametrize("packet", [packet_v4(b""), packet_v4(b"x", protocol=17), packet_v4(b"x", fragment=0x2000), packet_v4(b"x")[:30]])
def test_what_is_no_segment_with_data_is_left_out(packet: bytes) -> None:
    assert parse_packet(IP, packet) is None
    assert parse_packet(0x0806, packet) is None


@given(st.sampled_from([IP, IPV6]), st.binary(max_size=200))
def test_no_packet_makes_it_raise(protocol: int, packet: bytes) -> None:
    parse_packet(protocol, packet)


def segment(sequence: int, payload: bytes) -> Segment:
    return Segment(CLIENT, SERVER, sequence, payload)


def test_segments_join_in_order_of_sequence_and_what_came_twice_counts_once() -> None:
    heard = [segment(100, b"ab"), segment(104, b"ef"), segment(102, b"cd"), segment(100, b"ab"), segment(103, b"def")]
    assert join_segments(heard) == (Stream(CLIENT, SERVER, b"abcdef"),)


def test_sequence_numbers_may_wrap() -> None:
    assert join_segments([segment(0xFFFFFFFE, b"ab"), segment(0, b"cd")])[0].data == b"abcd"


def test_segments_survive_the_way_through_json() -> None:
    heard = [segment(1, b"\x00\xff"), Segment(SocketAddress.parse("[fd00::1]:1"), SERVER, 2, b"x")]
    assert decode_segments(encode_segments(heard)) == heard


def handshake(version: ssl.TLSVersion) -> tuple[bytes, bytes]:
    """The bytes of both directions of a handshake and a message."""
    bundle = FakeCa().issue(SpiffeId("cluster.local", "shop", "server"))
    with tempfile.NamedTemporaryFile() as file:  # the ssl module reads certificates from files only
        file.write(bundle.key_pem + b"".join(bundle.chain_pem))
        file.flush()
        server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server_context.load_cert_chain(file.name)
    client_context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client_context.check_hostname, client_context.verify_mode = False, ssl.CERT_NONE
    client_context.maximum_version = version
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_context.wrap_bio(to_client, to_server)
    server = server_context.wrap_bio(to_server, to_client, server_side=True)
    sent, received = b"", b""
    for step in range(6):
        for side, output in ((client, to_server), (server, to_client)):
            try:
                side.do_handshake()
                if step == 5 and side is client:
                    side.write(b"secret")
            except ssl.SSLWantReadError:
                pass
            data = output.read()
            output.write(data)
            sent, received = (sent + data, received) if side is client else (sent, received + data)
    return sent, received


def test_tls_1_3_is_told_from_tls_1_2_and_from_plain_text() -> None:
    sent, received = handshake(ssl.TLSVersion.TLSv1_3)
    assert is_tls_1_3(Stream(SERVER, CLIENT, received))
    assert is_tls(Stream(CLIENT, SERVER, sent))
    _, older = handshake(ssl.TLSVersion.TLSv1_2)
    assert is_tls(Stream(SERVER, CLIENT, older))
    assert not is_tls_1_3(Stream(SERVER, CLIENT, older))
    assert not is_tls(Stream(CLIENT, SERVER, b"GET / HTTP/1.1\r\n\r\n"))
    assert not is_tls(Stream(CLIENT, SERVER, b""))


def test_plain_text_after_a_handshake_is_noticed() -> None:
    _, received = handshake(ssl.TLSVersion.TLSv1_3)
    assert not is_tls_1_3(Stream(SERVER, CLIENT, received + b"GET / HTTP/1.1\r\n\r\n"))


@given(st.binary(max_size=300))
def test_no_stream_makes_it_raise(data: bytes) -> None:
    is_tls_1_3(Stream(SERVER, CLIENT, data))
    is_tls_1_3(Stream(SERVER, CLIENT, b"\x16\x03\x03" + struct.pack(">H", len(data)) + data))

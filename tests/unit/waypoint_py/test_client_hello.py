"""The name in a ClientHello, and that nothing in its place does harm."""

from __future__ import annotations

import ssl

import pytest
from hypothesis import given
from hypothesis import strategies as st

from waypoint_py.client_hello import NotYet, find_server_name


def _hello(name: str | None) -> bytes:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    outgoing = ssl.MemoryBIO()
    connection = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        connection.do_handshake()
    return outgoing.read()


@pytest.mark.parametrize(("name", "found"), [("Shop.Example", "shop.example"), (None, None)])
def test_a_hello_of_a_real_client_is_read_once_it_is_whole(name: str | None, found: str | None) -> None:
    hello = _hello(name)
    assert find_server_name(hello + b"more") == found
    for length in range(len(hello)):
        with pytest.raises(NotYet):
            find_server_name(hello[:length])


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\n", b"\x16\x02\x00\x00\x01\x01", b"\x16\x03\x01\xff\xff", b"\x16\x03\x01\x00\x01\x02"])
def test_what_is_no_hello_has_no_name(data: bytes) -> None:
    assert find_server_name(data) is None


@given(st.binary(max_size=400), st.integers(0, 1000), st.integers(0, 255))
def test_it_takes_whatever_comes(data: bytes, at: int, byte: int) -> None:
    changed = bytearray(_HELLO)
    changed[at % len(changed)] = byte
    for each in (data, b"\x16\x03\x01" + len(data).to_bytes(2, "big") + data, bytes(changed)):
        try:
            find_server_name(each)
        except NotYet:
            pass


_HELLO = _hello("shop.example")

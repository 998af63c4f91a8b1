"""The name in a ClientHello, and that nothing in its place does harm."""

from __future__ import annotations

import ssl

import pytest
from hypothesis import given
from hypothesis import strategies as st

from waypoint_py.client_hello import HIDDEN, NotYet, find_server_name


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


def in_records(hello: bytes, size: int) -> bytes:
    """The same hello, spread over records of so many bytes: as RFC 8446 section 5.1 allows."""
    message = hello[5:]
    pieces = [message[at : at + size] for at in range(0, len(message), size)]
    return b"".join(b"\x16\x03\x01" + len(piece).to_bytes(2, "big") + piece for piece in pieces)


@pytest.mark.parametrize("size", [40, 100, 200])
def test_a_hello_that_is_spread_over_records_names_the_same(size: int) -> None:
    hello = in_records(_HELLO, size)
    assert find_server_name(hello) == "shop.example"
    for length in range(len(hello)):
        with pytest.raises(NotYet):
            find_server_name(hello[:length])


@pytest.mark.parametrize("data", [
    b"GET / HTTP/1.1\r\n", b"\x16\x02\x00\x00\x01\x01", b"\x16\x03\x01\xff\xff", b"\x16\x03\x01\x00\x00",
    b"\x16\x03\x01\x00\x04\x01\x00\x00\x00", b"\x15\x03\x01\x00\x02\x01\x5a" + b"\x16\x03\x01", b"\x16\x03\x01\x00\x01\x02",
    b"\x16\x03\x01\x00\x01\x01" + b"\x16\x03\x01\x00\x01\x00" * 70,
])  # fmt: skip
def test_the_name_in_what_cannot_be_read_is_hidden(data: bytes) -> None:
    """A server may understand it."""
    assert find_server_name(data) is HIDDEN


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

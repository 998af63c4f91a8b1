"""What a connection carries by its first bytes, in whatever pieces they come."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from waypoint_py.sniff import MAX_SNIFFED, PREFACE, Carries, sniff


@pytest.mark.parametrize(
    ("data", "carries"),
    [
        (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", Carries.HTTP1),
        (b"POST http://a/b?c=d HTTP/1.1\n", Carries.HTTP1),
        (b"PROPFIND /x HTTP/1.1\r\n", Carries.HTTP1),
        (b"OPTIONS * HTTP/1.1\r\n", Carries.HTTP1),
        (PREFACE, Carries.HTTP2),
        (PREFACE + b"\0\0\0\4\0\0\0\0\0", Carries.HTTP2),
        (b"GET / HTTP/1.0\r\n", Carries.BYTES),
        (b"GET /\r\n", Carries.BYTES),
        (b"GET / HTTP/2.0\r\n", Carries.BYTES),
        (b"\x16\x03\x01\x02\x00\x01", Carries.BYTES),
        (b"*1\r\n$4\r\nPING\r\n", Carries.BYTES),
        (b"EHLO mail.example\r\n", Carries.BYTES),
        (b"SSH-2.0-OpenSSH\r\n", Carries.BYTES),
        (b"\0\0\0\x25\0\3", Carries.BYTES),
        (b"PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n", Carries.BYTES),
        (b"\r\n", Carries.BYTES),
        (b"G" * 100, Carries.BYTES),
        (b"GET /" + b"a" * MAX_SNIFFED, Carries.BYTES),
    ],
)
def test_first_bytes(data: bytes, carries: Carries) -> None:
    assert sniff(data) is carries
    # Byte by byte it never says anything else on the way.
    seen = {sniff(data[:length]) for length in range(min(len(data), 300))}
    assert seen <= {None, carries}


@pytest.mark.parametrize("data", [b"", b"G", b"GET", b"GET ", b"GET /a", b"GET /a HTT", b"PRI * HTTP/2.0\r\n\r\nSM", b"P"])
def test_a_beginning_says_nothing_yet_and_is_bytes_when_no_more_comes(data: bytes) -> None:
    assert sniff(data) is None
    assert sniff(data, ended=True) is Carries.BYTES


@given(st.binary(max_size=200), st.booleans())
def test_it_takes_whatever_comes(data: bytes, ended: bool) -> None:
    found = sniff(data, ended=ended)
    assert found is not None or not ended

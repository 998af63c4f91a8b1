"""Paths as Istio's four modes spell them."""

from __future__ import annotations

import pytest

from mesh.http.path import BadPath, normalise
from mesh.model.l7.waypoint import PathNormalization

NONE, BASE = PathNormalization.NONE, PathNormalization.BASE
MERGE, DECODE = PathNormalization.MERGE_SLASHES, PathNormalization.DECODE_AND_MERGE_SLASHES
MODES = (NONE, BASE, MERGE, DECODE)


@pytest.mark.parametrize(
    ("path", "base", "merge", "decode"),
    [
        # As Istio's tests/integration/security/normalization_test.go has them.
        (b"/app/../admin", b"/admin", b"/admin", b"/admin"),
        (b"/app//", b"/app//", b"/app/", b"/app/"),
        (b"/app/%2f", b"/app/%2f", b"/app/%2f", b"/app/"),
        (b"/app%2f/", b"/app%2f/", b"/app%2f/", b"/app/"),
        (b"/xyz%30..//abc", b"/xyz0..//abc", b"/xyz0../abc", b"/xyz0../abc"),
        (b"/app/%2E./admin", b"/admin", b"/admin", b"/admin"),
        (b"/app\\admin", b"/app/admin", b"/app/admin", b"/app/admin"),
        (b"/app/\\/\\/\\admin", b"/app//////admin", b"/app/admin", b"/app/admin"),
        (b"/%2Fapp%5cadmin%5Cabc", b"/%2Fapp%5cadmin%5Cabc", b"/%2Fapp%5cadmin%5Cabc", b"/app/admin/abc"),
        (
            b"/%5Capp%2f%5c%2F%2e%2e%2fadmin%5c\\abc",
            b"/%5Capp%2f%5c%2F..%2fadmin%5c/abc",
            b"/%5Capp%2f%5c%2F..%2fadmin%5c/abc",
            b"/app/admin/abc",
        ),
        (b"/app//../admin", b"/app/admin", b"/app/admin", b"/app/admin"),
        (b"/app//../../admin", b"/admin", b"/admin", b"/admin"),
        (b"/%c0%2fadmin", b"/%c0%2fadmin", b"/%c0%2fadmin", b"/%c0/admin"),
        (b"/%252e%252e/admin", b"/%252e%252e/admin", b"/%252e%252e/admin", b"/%252e%252e/admin"),
        (b"/%c0%ae/admin", b"/%c0%ae/admin", b"/%c0%ae/admin", b"/%c0%ae/admin"),
        (b"/Admin;a=b", b"/Admin;a=b", b"/Admin;a=b", b"/Admin;a=b"),
        # Percent signs that begin no escape.
        (b"/100%", b"/100%", b"/100%", b"/100%"),
        (b"/%%%", b"/%%%", b"/%%%", b"/%%%"),
        (b"/%zz%4", b"/%zz%4", b"/%zz%4", b"/%zz%4"),
        (b"/%%341", b"/%2541", b"/%2541", b"/%2541"),
        (b"/%%34%31", b"/%2541", b"/%2541", b"/%2541"),
        (b"/%4%31", b"/%2541", b"/%2541", b"/%2541"),
        (b"/%%%341", b"/%%2541", b"/%%2541", b"/%%2541"),
        (b"/%%32f", b"/%252f", b"/%252f", b"/%252f"),
        (b"/%%300", b"/%2500", b"/%2500", b"/%2500"),
        (b"/%2%65%2%65/", b"/%252e%252e/", b"/%252e%252e/", b"/%252e%252e/"),
        (b'/%41"', b"/A%22", b"/A%22", b"/A%22"),
        (b"/%%32%2f", b"/%2%2f", b"/%2%2f", b"/%2/"),
    ],
)
def test_each_mode_spells_it_in_its_way(path: bytes, base: bytes, merge: bytes, decode: bytes) -> None:
    assert [normalise(path, how) for how in MODES] == [path, base, merge, decode]


@pytest.mark.parametrize("how", MODES)
def test_an_escape_of_a_reserved_or_other_character_stays_as_it_came(how: PathNormalization) -> None:
    unreserved = b"-._~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    for byte in range(1, 256):
        path = b"/admin%%%02x" % byte
        kept = how is NONE or (byte not in unreserved and not (how is DECODE and byte in b"/\\"))
        made = b"/admin/" if byte in b"/\\" else b"/admin%c" % byte
        assert normalise(path, how) == (path if kept else made)


@pytest.mark.parametrize("how", MODES)
@pytest.mark.parametrize("path", [b"", b"admin", b"/a b", b"/a\tb", b"/a\0", b"/a%00", b"/\xc3\xa9", b"/a\r\n", b"?a", b"**"])
def test_what_is_no_path_is_refused(path: bytes, how: PathNormalization) -> None:
    assert isinstance(normalise(path, how), BadPath)


@pytest.mark.parametrize("how", MODES)
def test_a_query_stays_and_a_fragment_goes(how: PathNormalization) -> None:
    assert normalise(b"/app?a=../%2e//%00\\#foo?b", how) == b"/app?a=../%2e//%00\\"
    assert normalise(b"/app#foo", how) == b"/app"
    assert normalise(b"*", how) == b"*"

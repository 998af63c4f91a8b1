"""Whom a server's certificate must name, and which TLS cannot be begun at all."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st

from mesh.model.identity import SpiffeId
from mesh.model.l7.destination import TlsMode, UpstreamTls
from mesh.testing.ca import FakeCa
from mesh.testing.serving import write_serving_certificate
from waypoint_py.upstream.session import UpstreamProtocol
from waypoint_py.upstream.tls import UnusableTls, judge_names, plan_tls, server_name_of

SIMPLE = UpstreamTls(TlsMode.SIMPLE)
HTTP1 = UpstreamProtocol.HTTP1


def certificate_for(directory: Path, *names: str) -> bytes:
    pem = write_serving_certificate(directory, *names).chain.read_bytes()
    return x509.load_pem_x509_certificates(pem)[0].public_bytes(Encoding.DER)


@pytest.mark.parametrize(
    ("held", "wanted", "fits"),
    [
        ("reviews.shop", "reviews.shop", True),
        ("Reviews.Shop", "reviews.SHOP", True),
        ("reviews.shop", "ratings.shop", False),
        ("reviews.shop", "shop", False),
        ("*.shop.example", "reviews.shop.example", True),
        ("*.shop.example", "a.reviews.shop.example", False),
        ("*.shop.example", "shop.example", False),
        ("*.shop.example", ".shop.example", False),
        ("r*.shop.example", "reviews.shop.example", False),
        ("*", "reviews", False),
        ("10.0.0.1", "10.0.0.1", True),
        ("10.0.0.1", "10.0.0.2", False),
        ("fd00::1", "fd00:0::1", True),
        ("10.0.0.1.example", "10.0.0.1", False),
    ],
)
def test_a_name_fits_a_certificate_as_the_rfc_says(tmp_path: Path, held: str, wanted: str, fits: bool) -> None:
    refusal = judge_names(certificate_for(tmp_path, held), (wanted,), ())
    assert (refusal is None) == fits
    if refusal is not None:
        assert wanted in refusal


def test_one_of_several_names_or_uris_is_enough() -> None:
    identity = SpiffeId("cluster.local", "shop", "reviews")
    der = x509.load_pem_x509_certificate(FakeCa().issue(identity).chain_pem[0]).public_bytes(Encoding.DER)
    assert judge_names(der, ("reviews.shop",), (str(identity),)) is None
    assert judge_names(der, ("reviews.shop",), ("spiffe://cluster.local/ns/shop/sa/other",)) is not None
    assert judge_names(der, (), ()) is not None


@given(st.binary(max_size=300))
def test_bytes_that_are_no_certificate_are_refused(der: bytes) -> None:
    assert judge_names(der, ("reviews.shop",), ()) is not None


@pytest.mark.parametrize(
    ("sni", "host", "name"),
    [
        ("", "reviews.shop", "reviews.shop"),
        ("", "Reviews.Shop:8443", "reviews.shop"),
        ("", "reviews.shop.", "reviews.shop"),
        ("", "[fd00::1]:8443", "fd00::1"),
        ("", "fd00::1", "fd00::1"),
        ("", "10.0.0.1:80", "10.0.0.1"),
        ("api.example.com", "reviews.shop:80", "api.example.com"),
        ("", "", ""),
    ],
)
def test_the_name_asked_for_is_the_rules_or_the_requests(sni: str, host: str, name: str) -> None:
    assert server_name_of(UpstreamTls(TlsMode.SIMPLE, sni=sni), host) == name


@pytest.mark.parametrize("host", ["10.0.0.1:80", "[fd00::1]", "a\0b", "x" * 300, "\xff.example", "a b"])
def test_what_is_no_hostname_is_not_said_as_sni(host: str) -> None:
    assert plan_tls(SIMPLE, HTTP1, host).server_name == ""


def test_a_server_that_cannot_be_known_is_not_talked_to() -> None:
    with pytest.raises(UnusableTls, match="name is not known"):
        plan_tls(SIMPLE, UpstreamProtocol.TCP, "")
    assert plan_tls(UpstreamTls(TlsMode.SIMPLE, names=("reviews.shop",)), HTTP1, "").judge is not None
    assert plan_tls(UpstreamTls(TlsMode.SIMPLE, skip_verify=True), HTTP1, "").judge is None


@pytest.mark.parametrize(
    ("tls", "reason"),
    [
        (UpstreamTls(TlsMode.SIMPLE, broken="secret shop/client not found"), "secret shop/client not found"),
        (UpstreamTls(TlsMode.SIMPLE, roots="nonsense"), "root certificates"),
        (UpstreamTls(TlsMode.SIMPLE, roots=""), "root certificates"),
        (UpstreamTls(TlsMode.MUTUAL), "client certificate"),
    ],
)
def test_tls_that_cannot_be_used_says_why(tls: UpstreamTls, reason: str) -> None:
    for _ in range(2):
        with pytest.raises(UnusableTls, match=reason):
            plan_tls(tls, HTTP1, "reviews.shop")


def test_a_key_that_is_not_the_certificates_is_not_used() -> None:
    one, other = (FakeCa().issue(SpiffeId("cluster.local", "shop", "client")) for _ in range(2))
    certificate = one.chain_pem[0].decode()
    for key in (other.key_pem.decode(), "nonsense"):
        with pytest.raises(UnusableTls, match="private key"):
            plan_tls(UpstreamTls(TlsMode.MUTUAL, certificate=certificate, key=key), HTTP1, "reviews.shop")
    plan_tls(UpstreamTls(TlsMode.MUTUAL, certificate=certificate, key=one.key_pem.decode()), HTTP1, "reviews.shop")

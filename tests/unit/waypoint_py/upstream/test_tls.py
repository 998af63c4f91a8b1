"""Whom a server's certificate must name, and which TLS cannot be begun at all."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st
from OpenSSL import SSL

from mesh.model.identity import SpiffeId
from mesh.model.l7.destination import TlsMode, UpstreamTls
from mesh.reactor.tls import LIBRARY, TlsError, scratch, tls_engine
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


OPENSSL_ONLY = not LIBRARY.startswith("AWS-LC")


@pytest.mark.parametrize(
    ("make_key", "version", "taken"),
    [
        (lambda: ec.generate_private_key(ec.SECP384R1()), SSL.TLS1_2_VERSION, True),
        (lambda: rsa.generate_private_key(65537, 2048), SSL.TLS1_2_VERSION, True),
        (lambda: ec.generate_private_key(ec.SECP521R1()), SSL.TLS1_2_VERSION, OPENSSL_ONLY),
        (lambda: ec.generate_private_key(ec.SECP521R1()), SSL.TLS1_3_VERSION, True),
        (ed25519.Ed25519PrivateKey.generate, SSL.TLS1_2_VERSION, OPENSSL_ONLY),
        (ed25519.Ed25519PrivateKey.generate, SSL.TLS1_3_VERSION, OPENSSL_ONLY),
    ],
    ids=["P-384", "RSA", "P-521 in TLS 1.2", "P-521", "Ed25519 in TLS 1.2", "Ed25519"],
)
def test_on_aws_lc_servers_with_keys_of_ed25519_are_refused_and_of_p_521_in_tls_1_2(
    make_key: Callable[[], ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey], version: int, taken: bool
) -> None:
    context, certificate = server_with(make_key(), version)
    plan = plan_tls(UpstreamTls(TlsMode.SIMPLE, roots=certificate), HTTP1, "reviews.shop")
    client = tls_engine(plan.context, server_side=False, verify_peer=plan.judge, server_name=plan.server_name)
    server = tls_engine(context, server_side=True)
    reason = ""
    try:
        client.handshake()
        for source, sink in ((client, server), (server, client)) * 2:
            size = source.take()
            scratch().cipher_in[:size] = scratch().cipher_out[:size]
            sink.feed(size)
            if not sink.established:
                sink.handshake()
    except TlsError as exc:
        reason = exc.reason
    assert client.established == taken, reason
    assert taken or reason in ("no common signature algorithms", "bad ecc cert")


def server_with(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey, version: int) -> tuple[SSL.Context, str]:
    """A server of one version of TLS, and its certificate: signed by itself, for reviews.shop."""
    name, now = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "reviews")]), datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, now - timedelta(hours=1), now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("reviews.shop")]), critical=False)
        .sign(key, None if isinstance(key, ed25519.Ed25519PrivateKey) else SHA256())
    )
    context = SSL.Context(SSL.TLS_METHOD)
    context.set_min_proto_version(version)
    context.set_max_proto_version(version)
    context.use_certificate(certificate)
    context.use_privatekey(key)
    return context, certificate.public_bytes(Encoding.PEM).decode()

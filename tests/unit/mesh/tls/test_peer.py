from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from mesh.model.identity import SpiffeId
from mesh.testing.ca import FakeCa
from mesh.tls.peer import peer_identities, verify_client, verify_server

CA = FakeCa()
A = SpiffeId("cluster.local", "default", "a")
B = SpiffeId("cluster.local", "default", "b")


def der(*uris: str) -> bytes:
    return x509.load_pem_x509_certificate(CA.issue(A, uris=uris or None).chain_pem[0]).public_bytes(Encoding.DER)


def test_every_spiffe_id_is_found_and_other_uris_are_passed_over() -> None:
    assert peer_identities(der(str(A), "https://example.com/", "spiffe://td/other", str(B))) == (A, B)
    assert peer_identities(der("https://example.com/")) == ()


def test_unreadable_certificates_prove_nothing() -> None:
    assert peer_identities(b"") == ()
    assert peer_identities(b"\x30\x03garbage") == ()
    assert isinstance(verify_client(b"garbage", "cluster.local"), str)
    assert verify_server(b"garbage", frozenset({A})) is not None


def test_a_server_proves_any_of_the_identities_expected() -> None:
    assert verify_server(der(), frozenset({A})) is None
    assert verify_server(der(), frozenset({A, B})) is None
    assert verify_server(der(str(B), str(A)), frozenset({A})) is None


def test_a_server_of_another_identity_is_refused_with_both_named() -> None:
    reason = verify_server(der(), frozenset({B}))
    assert reason == f"peer did not present the expected SAN ({B}), got {A}"


def test_no_expectation_is_met_by_nobody() -> None:
    assert verify_server(der(), frozenset()) is not None


def test_a_client_of_our_trust_domain_has_its_identity() -> None:
    assert verify_client(der(), "cluster.local") == A
    assert verify_client(der("spiffe://other/ns/x/sa/y", str(B)), "cluster.local") == B


def test_a_client_of_a_foreign_trust_domain_is_refused() -> None:
    assert verify_client(der(), "other.example") == f"client identity {A} is not of trust domain other.example"
    assert verify_client(der("https://example.com/"), "cluster.local") == "client certificate holds no SPIFFE identity"

import pytest

from mesh.model.identity import SpiffeId
from mesh.testing.ca import FakeCa
from mesh.tls.bundle import CertificateBundle, InvalidBundle

CA = FakeCa()
ID = SpiffeId("cluster.local", "default", "a")
GOOD = CA.issue(ID)


def test_parse_finds_identity_and_validity() -> None:
    bundle = CertificateBundle.parse(key_pem=GOOD.key_pem, chain_pem=GOOD.chain_pem, roots_pem=GOOD.roots_pem)
    assert bundle == GOOD
    assert bundle.not_before < bundle.not_after
    assert bundle.not_before.tzinfo is not None


def test_a_chain_element_may_hold_several_certificates() -> None:
    together = GOOD.chain_pem[0] + CA.root_pem
    bundle = CertificateBundle.parse(key_pem=GOOD.key_pem, chain_pem=[together], roots_pem=CA.root_pem + FakeCa().root_pem)
    assert bundle.chain_pem == (GOOD.chain_pem[0], CA.root_pem)


def test_the_key_is_in_no_repr() -> None:
    assert "PRIVATE" not in repr(GOOD)


OTHER = CA.issue(ID)
TWO = CA.issue(ID, uris=(str(ID), "spiffe://cluster.local/ns/default/sa/b"))
NONE = CA.issue(ID, uris=("https://example.com/",))


@pytest.mark.parametrize(
    ("key", "chain", "roots", "reason"),
    [
        (OTHER.key_pem, GOOD.chain_pem, GOOD.roots_pem, "the private key is not the leaf certificate's"),
        (b"nonsense", GOOD.chain_pem, GOOD.roots_pem, "the private key is unreadable"),
        (GOOD.key_pem, (), GOOD.roots_pem, "certificate chain"),
        (GOOD.key_pem, (b"nonsense",), GOOD.roots_pem, "certificate chain"),
        (GOOD.key_pem, GOOD.chain_pem, b"", "root certificates"),
        (TWO.key_pem, TWO.chain_pem, GOOD.roots_pem, "2 SPIFFE IDs instead of one"),
        (NONE.key_pem, NONE.chain_pem, GOOD.roots_pem, "0 SPIFFE IDs instead of one"),
    ],
)
def test_what_does_not_fit_together_is_refused(key: bytes, chain: tuple[bytes, ...], roots: bytes, reason: str) -> None:
    with pytest.raises(InvalidBundle, match=reason):
        CertificateBundle.parse(key_pem=key, chain_pem=chain, roots_pem=roots)

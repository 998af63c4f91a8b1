from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from mesh.model.identity import SpiffeId
from mesh.tls.csr import make_request

ALICE = SpiffeId("cluster.local", "app", "alice")


def test_a_request_has_an_empty_subject_and_the_identity_in_a_critical_san():
    request = make_request(ALICE)
    csr = x509.load_pem_x509_csr(request.csr_pem)
    assert csr.is_signature_valid
    assert list(csr.subject) == []
    (extension,) = csr.extensions
    assert extension.critical
    assert [(type(name), name.value) for name in extension.value] == [(x509.UniformResourceIdentifier, str(ALICE))]
    assert isinstance(csr.public_key().curve, ec.SECP256R1)


def test_the_key_belongs_to_the_request_and_is_never_printed_nor_used_twice():
    first, second = make_request(ALICE), make_request(ALICE)
    assert first.key_pem.startswith(b"-----BEGIN PRIVATE KEY-----")
    key = serialization.load_pem_private_key(first.key_pem, None)
    assert key.public_key() == x509.load_pem_x509_csr(first.csr_pem).public_key()
    assert first.key_pem != second.key_pem
    assert "PRIVATE" not in repr(first)

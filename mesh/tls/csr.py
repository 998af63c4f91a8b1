"""The certificate request of a workload: a fresh P-256 key and a PKCS#10 request that names one SPIFFE ID, as ztunnel sends it."""

from __future__ import annotations

from dataclasses import dataclass, field

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from mesh.model.identity import SpiffeId


@dataclass(frozen=True, slots=True)
class CertificateRequest:
    """``key_pem`` is PKCS#8, unencrypted, and never printed; ``csr_pem`` goes to the certificate authority."""

    identity: SpiffeId
    key_pem: bytes = field(repr=False)
    csr_pem: bytes


def make_request(identity: SpiffeId) -> CertificateRequest:
    """A new key, and its request: empty subject, the identity as the only URI of a critical SAN (RFC 5280 4.2.1.6), SHA-256.

    A key lives as long as its certificate: every renewal makes another.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    san = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(str(identity))])
    csr = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).add_extension(san, critical=True).sign(key, hashes.SHA256())
    pkcs8 = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return CertificateRequest(identity, pkcs8, csr.public_bytes(serialization.Encoding.PEM))

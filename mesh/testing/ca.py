"""A certificate authority for tests: issues workload certificates in Istio's form from a root made in memory."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from mesh.model.identity import DEFAULT_TRUST_DOMAIN, SpiffeId
from mesh.tls.bundle import CertificateBundle

BACKDATE = timedelta(minutes=2)


class FakeCa:
    """Its own self-signed P-256 root; two of them do not trust each other."""

    def __init__(self, trust_domain: str = DEFAULT_TRUST_DOMAIN) -> None:
        self.trust_domain = trust_domain
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, trust_domain)])
        self._root = self._self_sign()
        self.root_pem = self._root.public_bytes(Encoding.PEM)

    @classmethod
    def with_key_of(cls, directory: Path, trust_domain: str = DEFAULT_TRUST_DOMAIN) -> Self:
        """Signs as the control plane does that keeps its root in ``directory`` (``ca-key.pem``, ``ca-cert.pem``)."""
        ca = cls(trust_domain)
        key = load_pem_private_key((directory / "ca-key.pem").read_bytes(), password=None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        ca._key = key
        ca._root = x509.load_pem_x509_certificate((directory / "ca-cert.pem").read_bytes())
        ca._name = ca._root.subject
        ca.root_pem = ca._root.public_bytes(Encoding.PEM)
        return ca

    def issue(
        self,
        identity: SpiffeId,
        lifetime: timedelta = timedelta(hours=1),
        *,
        not_before: datetime | None = None,
        uris: tuple[str, ...] | None = None,
    ) -> CertificateBundle:
        """A certificate for ``identity``, valid from two minutes ago (or ``not_before``) for ``lifetime`` from now on.

        A negative ``lifetime`` gives an expired one. ``uris`` replaces the URI SANs for tests of bad certificates.
        """
        now = datetime.now(UTC)
        key = ec.generate_private_key(ec.SECP256R1())
        start = not_before or min(now, now + lifetime) - BACKDATE
        leaf = self._sign(key.public_key(), uris or (str(identity),), start, now + lifetime)
        return CertificateBundle(
            identity=identity,
            key_pem=key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
            chain_pem=(leaf.public_bytes(Encoding.PEM),),
            roots_pem=self.root_pem,
            not_before=leaf.not_valid_before_utc,
            not_after=leaf.not_valid_after_utc,
        )

    def sign(self, csr_pem: bytes, identity: SpiffeId, lifetime: timedelta = timedelta(hours=1)) -> bytes:
        """The certificate, PEM, that a request for ``identity`` gets; the key is the requester's."""
        now = datetime.now(UTC)
        key = x509.load_pem_x509_csr(csr_pem).public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        return self._sign(key, (str(identity),), now - BACKDATE, now + lifetime).public_bytes(Encoding.PEM)

    def _sign(self, key: ec.EllipticCurvePublicKey, uris: tuple[str, ...], start: datetime, end: datetime) -> x509.Certificate:
        names = [x509.UniformResourceIdentifier(uri) for uri in uris]
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(start)
            .not_valid_after(end)
            .add_extension(x509.SubjectAlternativeName(names), critical=True)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
            .sign(self._key, hashes.SHA256())
        )

    def _self_sign(self) -> x509.Certificate:
        now = datetime.now(UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(self._name)
            .issuer_name(self._name)
            .public_key(self._key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - BACKDATE)
            .not_valid_after(now + timedelta(days=3650))
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(self._key, hashes.SHA256())
        )


def trusting_context(bundle: CertificateBundle | None, *, alpn: tuple[str, ...] = ("h2",)) -> ssl.SSLContext:
    """A client of the standard library's ssl that trusts every server and shows ``bundle``: for bytes that are written by hand."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if alpn:
        context.set_alpn_protocols(list(alpn))
    if bundle is not None:
        with NamedTemporaryFile(suffix=".pem") as file:  # ssl takes certificates from files alone
            file.write(bundle.key_pem + b"".join(bundle.chain_pem))
            file.flush()
            context.load_cert_chain(file.name)
    return context

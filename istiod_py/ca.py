"""The certificate authority: a root of its own, made once and kept, or one that the operator plugged in; it signs workloads' requests.

The own root is EC P-256, where Istio makes RSA 2048: the leaf of every handshake carries its signature, and verifying and making P-256
signatures is what our proxies do all day anyway; every peer that takes ztunnel's P-256 leaves takes it. Ten years, re-issued with the
same key when a fifth of them is left, so that everything signed before stays valid under either certificate. How one authority follows
another: `istiod_py.succession`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Final, Self

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from istiod_py.files import PUBLIC_MODE, SECRET_MODE, UnsafeFile, locked, make_private_directory, read_secret, write_atomically
from istiod_py.succession import DEFAULT_TTL, Material, SigningKey, Succession
from mesh.model.identity import SpiffeId

BACKDATE: Final = timedelta(minutes=2)
"""Leaves are valid from so long ago, for nodes whose clocks are slow; as Istio."""
MAX_TTL: Final = timedelta(days=90)
ROOT_LIFETIME: Final = timedelta(days=3650)
ROOT_GRACE: Final = 0.2
"""Share of the root's lifetime that is left when it is re-issued."""
_ROOT_BACKDATE: Final = timedelta(hours=1)
_MAX_CSR: Final = 64 * 1024
_MAX_CHAIN: Final = 10


class CaError(Exception):
    """The authority's own files are missing, unsafe, damaged or expired; the text names file and remedy. The operator must act."""


class BadRequest(Exception):
    """The request can't be signed as it is: malformed, badly signed, weak key, lifetime too long. The caller must act."""


@dataclass(frozen=True, slots=True)
class ServingCertificate:
    """A TLS server certificate: key, and chain with the leaf first."""

    key_pem: bytes = field(repr=False)
    chain_pem: bytes
    not_before: datetime
    not_after: datetime


class CertificateAuthority:
    """Signs. ``now`` is given with every call; the only state is what signs and who trusts it."""

    def __init__(self, material: Material, now: datetime, *, reload: Callable[[datetime], Material] | None = None) -> None:
        """``reload``: what there is to sign with by now; raises CaError. None: somebody else calls `adopt`."""
        self._succession = Succession(material, now)
        self._reload = reload
        self._told = self._succession.roots

    @classmethod
    def self_signed(cls, state: Path, trust_domain: str, now: datetime) -> Self:
        """The root kept in ``state`` (``ca-key.pem`` 0600, ``ca-cert.pem``), made first if there is none. Raises CaError."""
        return cls._reloading(partial(_load_or_create, state, trust_domain), now)

    @classmethod
    def plugged_in(cls, directory: Path, now: datetime) -> Self:
        """The operator's authority, in Istio's files ``ca-key.pem ca-cert.pem root-cert.pem cert-chain.pem``. Raises CaError."""
        return cls._reloading(partial(load_plugged_in, directory), now)

    @classmethod
    def _reloading(cls, reload: Callable[[datetime], Material], now: datetime) -> Self:
        return cls(reload(now), now, reload=reload)

    @property
    def roots_pem(self) -> bytes:
        """What peers must trust."""
        return b"".join(map(_pem, self._succession.roots))

    @property
    def expires(self) -> datetime:
        return self._succession.signer.expires

    @property
    def waits_until(self) -> datetime | None:
        """When the authority that follows begins to sign; None: there is none."""
        return self._succession.waits_until

    def sign_workload(self, csr_pem: bytes, identity: SpiffeId, lifetime: timedelta, now: datetime) -> tuple[bytes, ...]:
        """A certificate for ``identity``: leaf, each intermediate, and last the bundle of roots, all PEM.

        Of the request only the key counts; its names are ignored (``identity`` was authorized, they were not). ``lifetime`` zero means
        24 h; the result never outlives the signer. Raises BadRequest, CaError.
        """
        key = _requested_key(csr_pem)
        san = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(str(identity))])
        leaf = self._sign(key, x509.Name([]), san, _lifetime(lifetime), now)
        return (_pem(leaf), *map(_pem, self._succession.signer.intermediates), self.roots_pem)

    def issue_serving(self, dns_names: Sequence[str], now: datetime, lifetime: timedelta = DEFAULT_TTL) -> ServingCertificate:
        """A certificate for our own TLS server, with a new key. Raises CaError."""
        key = ec.generate_private_key(ec.SECP256R1())
        san = x509.SubjectAlternativeName([x509.DNSName(name) for name in dns_names])
        leaf = self._sign(key.public_key(), x509.Name([]), san, lifetime, now)
        chain = b"".join(map(_pem, (leaf, *self._succession.signer.intermediates)))
        return ServingCertificate(_key_pem(key), chain, leaf.not_valid_before_utc, leaf.not_valid_after_utc)

    def adopt(self, material: Material, now: datetime) -> bool:
        """Sign with this as soon as everybody trusts its root; says whether what peers must trust is different from the last time."""
        self._succession.adopt(material, now)
        before, self._told = self._told, self._succession.roots
        return before != self._told

    def refresh(self, now: datetime) -> bool:
        """Look at the files again: the own root is re-issued with the same key once its grace period has begun, a plugged-in authority
        may be another by now. Says whether what peers must trust changes. Raises CaError; what signed before goes on then."""
        return self.adopt(self._reload(now), now) if self._reload is not None else False

    def _sign(
        self, key: CertificatePublicKeyTypes, subject: x509.Name, san: x509.SubjectAlternativeName, lifetime: timedelta, now: datetime
    ) -> x509.Certificate:
        self._succession.advance(now)
        material = self._succession.signer
        signer = material.certificate
        ends = min(now + lifetime, material.expires)
        if ends <= now:
            raise CaError(f"the certificate authority expired at {material.expires:%Y-%m-%dT%H:%M:%SZ}")
        usage = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(signer.subject)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(max(now - BACKDATE, signer.not_valid_before_utc))
            .not_valid_after(ends)
            .add_extension(_key_usage(ca=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usage), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_authority_key_identifier(signer), critical=False)
            # Critical, since the subject is empty (RFC 5280 4.2.1.6).
            .add_extension(san, critical=True)
        )
        self._succession.note_signed(ends)
        return builder.sign(material.key, hashes.SHA256())


# The request


def _requested_key(csr_pem: bytes) -> CertificatePublicKeyTypes:
    if len(csr_pem) > _MAX_CSR:
        raise BadRequest(f"the certificate request has {len(csr_pem)} bytes (at most {_MAX_CSR})")
    try:
        csr = x509.load_pem_x509_csr(csr_pem)
        signed = csr.is_signature_valid
        key = csr.public_key()
    except (ValueError, UnsupportedAlgorithm, InvalidSignature, x509.InvalidVersion) as exc:
        raise BadRequest(f"not a certificate request: {exc}") from exc
    if not signed:
        raise BadRequest("the certificate request's signature does not verify")
    match key:
        case ec.EllipticCurvePublicKey(curve=ec.SECP256R1() | ec.SECP384R1() | ec.SECP521R1()) | ed25519.Ed25519PublicKey():
            return key
        case rsa.RSAPublicKey(key_size=size) if 2048 <= size <= 8192:
            return key
    raise BadRequest("the key must be EC P-256, P-384 or P-521, Ed25519, or RSA of 2048 to 8192 bits")


def _lifetime(requested: timedelta) -> timedelta:
    if requested < timedelta(0):
        raise BadRequest("the requested lifetime is negative")
    if requested > MAX_TTL:
        raise BadRequest(f"the requested lifetime {requested} is greater than the maximum {MAX_TTL}")
    return requested or DEFAULT_TTL


# The own root


@dataclass(frozen=True, slots=True)
class RootFiles:
    """An own root as it is kept: PEM of key and certificate."""

    key_pem: bytes = field(repr=False)
    certificate_pem: bytes


def new_root(trust_domain: str, now: datetime, key_pem: bytes | None = None, where: str = "") -> RootFiles:
    """A root with a new key, or anew with this one (of ``where``). Raises CaError."""
    key = _load_key(Path(where), key_pem) if key_pem is not None else ec.generate_private_key(ec.SECP256R1())
    return RootFiles(key_pem if key_pem is not None else _key_pem(key), _pem(_make_root(key, trust_domain, now)))


def read_root(root: RootFiles, where: str) -> Material:
    """Ready to sign; ``where`` it was kept is for messages. Raises CaError."""
    key = _load_key(Path(where), root.key_pem)
    try:
        certificate = x509.load_pem_x509_certificate(root.certificate_pem)
    except (ValueError, x509.InvalidVersion) as exc:
        raise CaError(f"{where}: no certificate in PEM: {exc}") from exc
    if not _belong_together(key, certificate):
        raise CaError(f"{where}: key and certificate do not belong together")
    return _self_signing(key, certificate)


def _self_signing(key: SigningKey, certificate: x509.Certificate) -> Material:
    return Material(key, certificate, (), certificate, (certificate,), certificate.not_valid_after_utc)


def is_due(material: Material, now: datetime) -> bool:
    """Whether a root is to be issued anew."""
    return _in_grace(material.certificate, now)


def _load_or_create(state: Path, trust_domain: str, now: datetime) -> Material:
    try:
        make_private_directory(state)
        with locked(state):
            return _load_or_create_locked(state, trust_domain, now)
    except (OSError, UnsafeFile) as exc:
        raise CaError(f"can't keep the certificate authority in {state}: {exc}") from exc


def _load_or_create_locked(state: Path, trust_domain: str, now: datetime) -> Material:
    """The key is written first and the certificate completes it: a crash between leaves a key, which the next start certifies."""
    key_file, certificate_file = state / "ca-key.pem", state / "ca-cert.pem"
    if not key_file.exists():
        if certificate_file.exists():
            raise CaError(f"{key_file} is missing while {certificate_file} is there: restore the key, or remove both to start a new root")
        write_atomically(key_file, _key_pem(ec.generate_private_key(ec.SECP256R1())), SECRET_MODE)
    key = _load_key(key_file, read_secret(key_file))
    certificate = _load_one(certificate_file) if certificate_file.exists() else None
    if certificate is not None and not _belong_together(key, certificate):
        raise CaError(f"{key_file} is not the key of {certificate_file}: restore the one that belongs, or remove both to start a new root")
    if certificate is None or _in_grace(certificate, now):
        certificate = _make_root(key, trust_domain, now)
        write_atomically(certificate_file, _pem(certificate), PUBLIC_MODE)
    return _self_signing(key, certificate)


def _in_grace(certificate: x509.Certificate, now: datetime) -> bool:
    lifetime = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    return now > certificate.not_valid_after_utc - lifetime * ROOT_GRACE


def _make_root(key: SigningKey, trust_domain: str, now: datetime) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, trust_domain[:64])])
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _ROOT_BACKDATE)
        .not_valid_after(now + ROOT_LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(_key_usage(ca=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )


# The plugged-in authority

MOUNTED: Final = Path("/etc/cacerts")
"""Where deploy/control-plane mounts Secret ``cacerts``, as Istio does; without a file if there is none."""
_OF_KUBELET: Final = ".."
"""How the names begin that a kubelet keeps for itself in a volume. They are there also for a Secret that is not."""


def find_plugged_in(given: Path | None, mounted: Path = MOUNTED) -> Path | None:
    """The directory of the operator's authority; None: there is none. One that is given must hold it, what is mounted need not."""
    if given is not None:
        return given
    holds = mounted.is_dir() and any(not file.name.startswith(_OF_KUBELET) for file in mounted.iterdir())
    return mounted if holds else None


def load_plugged_in(directory: Path, now: datetime) -> Material:
    """Read and verify Istio's ``cacerts`` files: the key is the certificate's, and a path of valid CAs leads to a root. Raises CaError."""
    # A kubelet changes all files of a volume at once, by changing where this link leads: follow it once, not once a file.
    current = directory / "..data"
    directory = current.resolve() if current.is_symlink() else directory
    key_file, certificate_file = directory / "ca-key.pem", directory / "ca-cert.pem"
    key = _load_key(key_file, _read(key_file))
    certificate = _load_one(certificate_file)
    if not _belong_together(key, certificate):
        raise CaError(f"{key_file} is not the key of {certificate_file}")
    roots = _load_all(directory / "root-cert.pem")
    chain_file = directory / "cert-chain.pem"
    chain = _load_all(chain_file) if chain_file.exists() and _read(chain_file).strip() else []
    path = _find_path(certificate, chain, roots, directory)
    for member in path:
        _require_valid_ca(member, directory, now)
    intermediates = tuple(member for member in path if member not in roots)
    expires = min(member.not_valid_after_utc for member in path)
    return Material(key, certificate, intermediates, path[-1], tuple(roots), expires)


def _find_path(
    signer: x509.Certificate, chain: Sequence[x509.Certificate], roots: Sequence[x509.Certificate], directory: Path
) -> list[x509.Certificate]:
    """From the signer to a root, by who signed whom; both ends included."""
    path = [signer]
    while path[-1] not in roots:
        issuer = next((candidate for candidate in (*roots, *chain) if candidate not in path and _issued(path[-1], candidate)), None)
        if issuer is None or len(path) > _MAX_CHAIN:
            name = path[-1].subject.rfc4514_string()
            raise CaError(f"{directory}: no path from ca-cert.pem to a root: neither cert-chain.pem nor root-cert.pem issued {name!r}")
        path.append(issuer)
    return path


def _issued(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _require_valid_ca(certificate: x509.Certificate, directory: Path, now: datetime) -> None:
    name = certificate.subject.rfc4514_string()
    try:
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    except (x509.ExtensionNotFound, ValueError):
        constraints = None
    if constraints is None or not constraints.ca:
        raise CaError(f"{directory}: {name!r} is not a CA certificate (basicConstraints CA:true is missing)")
    try:
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
    except x509.ExtensionNotFound:
        usage = None
    if usage is not None and not usage.key_cert_sign:
        raise CaError(f"{directory}: {name!r} may not sign certificates (keyUsage keyCertSign is missing)")
    if now >= certificate.not_valid_after_utc:
        raise CaError(f"{directory}: {name!r} expired at {certificate.not_valid_after_utc:%Y-%m-%dT%H:%M:%SZ}")
    if now < certificate.not_valid_before_utc:
        raise CaError(f"{directory}: {name!r} is not valid before {certificate.not_valid_before_utc:%Y-%m-%dT%H:%M:%SZ}")


# PEM


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.PEM)


def _key_pem(key: SigningKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as exc:
        raise CaError(f"{path}: {exc.strerror}") from exc


def _load_key(path: Path, pem: bytes) -> SigningKey:
    try:
        key = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as exc:
        raise CaError(f"{path}: not an unencrypted private key in PEM") from exc
    if not isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey):
        raise CaError(f"{path}: the key must be EC or RSA")
    return key


def _load_all(path: Path) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(_read(path))
    except (ValueError, x509.InvalidVersion) as exc:
        raise CaError(f"{path}: no certificate in PEM: {exc}") from exc


def _load_one(path: Path) -> x509.Certificate:
    return _load_all(path)[0]


def _belong_together(key: SigningKey, certificate: x509.Certificate) -> bool:
    return _spki(key.public_key()) == _spki(certificate.public_key())


def _spki(key: CertificatePublicKeyTypes) -> bytes:
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _key_usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        key_encipherment=not ca,
        key_cert_sign=ca,
        crl_sign=ca,
        content_commitment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _authority_key_identifier(signer: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    try:
        ski = signer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    except x509.ExtensionNotFound:
        return x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())  # type: ignore[arg-type]  # EC or RSA, as the key
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(ski)

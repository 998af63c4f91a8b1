"""A workload's certificate with its key, chain and roots, parsed and checked against each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Self

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from mesh.model.identity import SpiffeId
from mesh.tls.peer import spiffe_ids_of


class InvalidBundle(ValueError):
    """Key, chain and roots do not make a usable workload certificate."""


@dataclass(frozen=True, slots=True)
class CertificateBundle:
    """What one workload needs to speak mutual TLS. All PEM; ``chain_pem`` leaf first; times are the leaf's, aware, UTC."""

    identity: SpiffeId
    key_pem: bytes = field(repr=False)
    chain_pem: tuple[bytes, ...]
    roots_pem: bytes
    not_before: datetime
    not_after: datetime

    @classmethod
    def parse(cls, *, key_pem: bytes, chain_pem: Sequence[bytes], roots_pem: bytes) -> Self:
        """Read key, chain (leaf first; an element may hold several PEM blocks) and roots. Raises InvalidBundle.

        Checked: the leaf holds exactly one SPIFFE ID and belongs to the key; there is at least one root. Neither validity now
        nor the chain up to a root is: that is the peer's judgement, and a clock's.
        """
        chain = _certificates(b"\n".join(chain_pem), "certificate chain")
        _certificates(roots_pem, "root certificates")
        leaf = chain[0]
        identities = spiffe_ids_of(leaf)
        if len(identities) != 1:
            raise InvalidBundle(f"the leaf certificate holds {len(identities)} SPIFFE IDs instead of one")
        if _key_of(key_pem) != leaf.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo):
            raise InvalidBundle("the private key is not the leaf certificate's")
        return cls(
            identity=identities[0],
            key_pem=key_pem,
            chain_pem=tuple(certificate.public_bytes(Encoding.PEM) for certificate in chain),
            roots_pem=roots_pem,
            not_before=leaf.not_valid_before_utc,
            not_after=leaf.not_valid_after_utc,
        )


def _certificates(pem: bytes, what: str) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError as exc:
        raise InvalidBundle(f"{what}: {exc}") from exc


def _key_of(pem: bytes) -> bytes:
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as exc:
        raise InvalidBundle("the private key is unreadable") from exc
    return key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)

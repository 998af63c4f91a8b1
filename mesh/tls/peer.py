"""Who a peer is: the SPIFFE IDs of its certificate, and whether they are the ones wanted.

The chain has been verified by OpenSSL before any of this is asked (`mesh.tls.contexts`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import lru_cache

from cryptography import x509

from mesh.model.identity import InvalidSpiffeId, SpiffeId


def spiffe_ids_of(certificate: x509.Certificate) -> tuple[SpiffeId, ...]:
    """Every URI SAN that is an identity in Istio's form; others are passed over, as ztunnel does."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError):
        return ()
    identities = []
    for uri in names.get_values_for_type(x509.UniformResourceIdentifier):
        try:
            identities.append(SpiffeId.parse(uri))
        except InvalidSpiffeId:
            continue
    return tuple(identities)


def _peer_identities(der: bytes) -> tuple[SpiffeId, ...]:
    try:
        return spiffe_ids_of(x509.load_der_x509_certificate(der))
    except ValueError:
        return ()


peer_identities: Callable[[bytes], tuple[SpiffeId, ...]] = lru_cache(maxsize=4096)(_peer_identities)
"""The SPIFFE IDs of a certificate (DER); none for one that cannot be read. Remembered, since peers come back."""


def verify_server(der: bytes, expected: frozenset[SpiffeId]) -> str | None:
    """None if the server's certificate proves one of ``expected``, else why it is refused (ztunnel's wording)."""
    presented = peer_identities(der)
    if any(identity in expected for identity in presented):
        return None
    wanted, got = (", ".join(sorted(map(str, ids))) or "none" for ids in (expected, presented))
    return f"peer did not present the expected SAN ({wanted}), got {got}"


def verify_client(der: bytes, trust_domain: str) -> SpiffeId | str:
    """The client's identity, which must be of ``trust_domain``; else why it is refused.

    Namespace and service account are not judged here: policy does that.
    """
    presented = peer_identities(der)
    for identity in presented:
        if identity.trust_domain == trust_domain:
            return identity
    if not presented:
        return "client certificate holds no SPIFFE identity"
    return f"client identity {presented[0]} is not of trust domain {trust_domain}"


def verify_sole_client(der: bytes, trust_domains: Collection[str]) -> SpiffeId | str:
    """The client's identity, which must be of one of ``trust_domains`` and the only URI in its certificate; else why it is refused.

    Stricter than `verify_client`: whoever is let through here is acted for, so nothing about who it is may be left to choose.
    """
    identity = _sole_identity(der)
    if isinstance(identity, SpiffeId) and identity.trust_domain not in trust_domains:
        return f"client identity {identity} is of no trust domain of the mesh ({', '.join(sorted(trust_domains))})"
    return identity


@lru_cache(maxsize=4096)
def _sole_identity(der: bytes) -> SpiffeId | str:
    try:
        names = x509.load_der_x509_certificate(der).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError):
        uris = []
    if len(uris) != 1:
        return f"client certificate holds {len(uris)} URIs instead of one SPIFFE identity"
    try:
        return SpiffeId.parse(uris[0])
    except InvalidSpiffeId as exc:
        return f"client certificate: {exc}"

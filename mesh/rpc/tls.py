"""TLS contexts of the control channel: the standard library's ssl, since gRPC moves few bytes (the data path has `mesh.tls`)."""

from __future__ import annotations

import ssl
from pathlib import Path


class InvalidTlsMaterial(ValueError):
    """Roots, certificate or key that OpenSSL does not take; the text says which and why."""


def verifying_context(roots_pem: str | None) -> ssl.SSLContext:
    """Of a client that verifies the server's chain up to any of these certificates (None: the system's) and its name, by the same measure
    whatever Python is used, and as Go does: so kubectl and Istio accept what we do. Raises ssl.SSLError, ValueError."""
    if roots_pem is not None and not roots_pem:
        raise ValueError("there are none")  # Python would take the system's
    context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cadata=roots_pem)
    # Python 3.13 asks for extensions that authorities of clusters have done without for years.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    # Older ones do not take an intermediate authority for an anchor.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context


def client_tls(roots_pem: str | None) -> ssl.SSLContext:
    """`verifying_context` for gRPC. Raises InvalidTlsMaterial."""
    try:
        context = verifying_context(roots_pem)
    except (ssl.SSLError, ValueError) as exc:
        raise InvalidTlsMaterial(f"root certificates: {exc}") from exc
    return _for_http2(context)


def server_tls(certificate_chain: Path, key: Path, *, client_roots_pem: str | None = None) -> ssl.SSLContext:
    """Serve with this PEM chain and key. With client roots a client may show a certificate, and then it must verify. Raises
    InvalidTlsMaterial."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate_chain, key)
        if client_roots_pem is not None:
            context.load_verify_locations(cadata=client_roots_pem)
            context.verify_mode = ssl.CERT_OPTIONAL
    except (OSError, ValueError) as exc:
        raise InvalidTlsMaterial(f"{certificate_chain}, {key}: {exc}") from exc
    return _for_http2(context)


def _for_http2(context: ssl.SSLContext) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["h2"])
    return context

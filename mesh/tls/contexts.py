"""OpenSSL contexts for HBONE: mutual TLS 1.3, ALPN h2, chain verified against the workload's own roots."""

from __future__ import annotations

from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from OpenSSL import SSL, crypto

from mesh.reactor.tls import verify_peers
from mesh.tls.bundle import CertificateBundle

CIPHER_SUITES = b"TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384"
"""Both are what ztunnel allows; the first costs 5-10 % less. On OpenSSL the server's order decides, on AWS-LC the client's."""

ALPN = b"h2"

_MODE_ENABLE_PARTIAL_WRITE = 0x1
"""SSL_MODE_ENABLE_PARTIAL_WRITE, which pyOpenSSL sets: return after each record. Into memory there is always room for all of them."""
_MODE_NO_AUTO_CHAIN = 0x8
"""SSL_MODE_NO_AUTO_CHAIN: send the chain we were given, instead of building one with the root in it for every handshake."""


def hbone_context(bundle: CertificateBundle) -> SSL.Context:
    """For accepting HBONE and for dialling it: one for both, since it is 27 KiB, and a node may have an identity for each of its pods.

    Accepting, a client certificate is required, and a client that offers no ALPN at all is served (as ztunnel does). Dialling, there is no
    SNI and no resumption; groups are the library's default, which in OpenSSL and in AWS-LC prefers X25519MLKEM768.
    """
    context = SSL.Context(SSL.TLS_METHOD)
    context.set_min_proto_version(SSL.TLS1_3_VERSION)
    context.set_tls13_ciphersuites(CIPHER_SUITES)
    context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
    context.set_options(SSL.OP_CIPHER_SERVER_PREFERENCE | SSL.OP_NO_TICKET)
    verify_peers(context, SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT)
    context.set_alpn_select_callback(_select_alpn)
    context.set_alpn_protos([ALPN])
    # Idle connections hold no record buffers: 16 KiB less each, for an allocation per wake-up.
    context.set_mode(SSL.MODE_RELEASE_BUFFERS | _MODE_NO_AUTO_CHAIN)
    context.clear_mode(_MODE_ENABLE_PARTIAL_WRITE)
    leaf, *intermediates = (x509.load_pem_x509_certificate(pem) for pem in bundle.chain_pem)
    context.use_certificate(leaf)
    for intermediate in intermediates:
        context.add_extra_chain_cert(intermediate)
    context.use_privatekey(load_pem_private_key(bundle.key_pem, password=None))
    store = context.get_cert_store()
    for root in x509.load_pem_x509_certificates(bundle.roots_pem):
        store.add_cert(crypto.X509.from_cryptography(root))
    # Any configured root is an anchor, also an intermediate handed out as one (rustls and so ztunnel take it so).
    store.set_flags(crypto.X509StoreFlags.PARTIAL_CHAIN)
    return context


def _select_alpn(_connection: SSL.Connection, offered: list[bytes]) -> bytes:
    if ALPN in offered:
        return ALPN
    # Ends the handshake with the alert no_application_protocol; in the form in which pyOpenSSL reports OpenSSL's own errors.
    names = ", ".join(name.decode("ascii", "backslashreplace") for name in offered[:4])
    raise SSL.Error([("mesh", "select_alpn", f"no protocol in common: the peer offers {names[:100]}")])

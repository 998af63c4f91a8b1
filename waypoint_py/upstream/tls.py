"""TLS towards the application as a DestinationRule or BackendTLSPolicy asks for it: contexts, and whom a server's certificate must name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from OpenSSL import SSL, crypto

from mesh.model.address import InvalidAddress, IpAddress, parse_ip
from mesh.model.l7.destination import TlsMode, UpstreamTls
from mesh.reactor.tls import verify_peers
from waypoint_py.upstream.session import UpstreamProtocol

_MODE_NO_AUTO_CHAIN: Final = 0x8
"""SSL_MODE_NO_AUTO_CHAIN: send the chain we were given."""

_HOSTNAME: Final = re.compile(r"[a-z0-9._-]{1,253}")
"""What may be said as SNI; a request's host may be anything."""

_ALPN: Final = {UpstreamProtocol.HTTP1: b"http/1.1", UpstreamProtocol.HTTP2: b"h2"}


class UnusableTls(Exception):
    """TLS as configured cannot be begun: certificates that cannot be read, or nothing to know the server by. For the operator."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class TlsPlan:
    """One handshake: ``server_name`` is SNI, empty for none; ``judge`` says why a verified certificate (DER) is not the server's."""

    context: SSL.Context
    server_name: str
    judge: Callable[[bytes], str | None] | None


def server_name_of(tls: UpstreamTls, host: str) -> str:
    """The name that a connection for ``host`` asks for, by which connections may also be told apart. May be an IP address."""
    return (tls.sni or _without_port(host)).rstrip(".").lower()


def plan_tls(tls: UpstreamTls, protocol: UpstreamProtocol, host: str) -> TlsPlan:
    """How to begin. ``host``: the request's, with or without a port. Raises UnusableTls."""
    if tls.broken:
        raise UnusableTls(tls.broken)
    name = server_name_of(tls, host)
    address = _find_ip(name)
    context = _context(tls, _ALPN.get(protocol))
    sni = name if address is None and _HOSTNAME.fullmatch(name) else ""
    if tls.skip_verify:
        return TlsPlan(context, sni, None)
    if tls.names or tls.uris:
        return TlsPlan(context, sni, lambda der: judge_names(der, tls.names, tls.uris))
    if not name:
        raise UnusableTls("the server's name is not known: neither sni nor subjectAltNames are set, and there is no host")
    return TlsPlan(context, sni, lambda der: judge_names(der, (name,), ()))


def judge_names(der: bytes, names: Iterable[str], uris: Iterable[str]) -> str | None:
    """None if the certificate has one of the names (DNS, wildcards of one label included, or IP addresses) or of the URIs; else why it is
    refused."""
    try:
        certificate = x509.load_der_x509_certificate(der)
        alternatives = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return "certificate holds no subject alternative name"
    except (x509.DuplicateExtension, ValueError):
        return "certificate is unreadable"
    dns = [name.lower() for name in alternatives.get_values_for_type(x509.DNSName)]
    held_uris = alternatives.get_values_for_type(x509.UniformResourceIdentifier)
    addresses = alternatives.get_values_for_type(x509.IPAddress)
    wanted_names, wanted_uris = list(names), list(uris)
    if any(uri in held_uris for uri in wanted_uris):
        return None
    for name in wanted_names:
        address = _find_ip(name)
        if address in addresses if address is not None else any(_covers(pattern, name.lower()) for pattern in dns):
            return None
    wanted = ", ".join([*wanted_names, *wanted_uris])
    got = ", ".join([*dns, *held_uris, *map(str, addresses)])[:300]
    return f"certificate names {got or 'nobody'}, not {wanted}"


def _covers(pattern: str, name: str) -> bool:
    """RFC 6125 section 6.4.3: ``*`` stands for the whole first label, and for one label only."""
    if not pattern.startswith("*."):
        return pattern == name
    first, dot, rest = name.partition(".")
    return bool(first and dot) and rest == pattern[2:]


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdigit() and ":" not in name else host


def _find_ip(name: str) -> IpAddress | None:
    try:
        return parse_ip(name)
    except InvalidAddress:
        return None


@lru_cache(maxsize=256)
def _context(tls: UpstreamTls, alpn: bytes | None) -> SSL.Context:
    """Made once for every configuration: reading certificates costs more than a handshake. Raises UnusableTls."""
    context = SSL.Context(SSL.TLS_METHOD)
    context.set_min_proto_version(SSL.TLS1_2_VERSION)
    context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
    context.set_options(SSL.OP_NO_RENEGOTIATION)
    context.set_mode(SSL.MODE_RELEASE_BUFFERS | _MODE_NO_AUTO_CHAIN)
    if alpn is not None:
        context.set_alpn_protos([alpn])
    if tls.skip_verify:
        context.set_verify(SSL.VERIFY_NONE, lambda *_: True)
    else:
        verify_peers(context, SSL.VERIFY_PEER)
        _trust(context, tls.roots)
    if tls.mode is TlsMode.MUTUAL:
        _use_certificate(context, tls)
    return context


def _trust(context: SSL.Context, roots: str | None) -> None:
    if roots is None:
        context.set_default_verify_paths()
        return
    store = context.get_cert_store()
    for root in _certificates(roots, "root certificates"):
        store.add_cert(crypto.X509.from_cryptography(root))
    # What was given as a root is an anchor, also an intermediate.
    store.set_flags(crypto.X509StoreFlags.PARTIAL_CHAIN)


def _use_certificate(context: SSL.Context, tls: UpstreamTls) -> None:
    leaf, *intermediates = _certificates(tls.certificate, "client certificate")
    try:
        key = load_pem_private_key(tls.key.encode(), password=None)
        context.use_certificate(leaf)
        for intermediate in intermediates:
            context.add_extra_chain_cert(intermediate)
        context.use_privatekey(key)
        context.check_privatekey()
    except (ValueError, TypeError, UnsupportedAlgorithm, SSL.Error) as exc:
        raise UnusableTls("the client's private key is unreadable or not its certificate's") from exc


def _certificates(pem: str, what: str) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem.encode())
    except ValueError as exc:
        raise UnusableTls(f"{what}: {exc}") from exc

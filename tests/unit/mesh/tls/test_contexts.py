"""What the contexts agree on and refuse is tested with engines in tests/unit/mesh/reactor/test_tls.py."""

import ssl
from dataclasses import replace
from pathlib import Path

from mesh.model.identity import SpiffeId
from mesh.reactor.tls import TlsEngine, scratch, tls_engine
from mesh.testing.ca import FakeCa
from mesh.tls.bundle import CertificateBundle
from mesh.tls.contexts import CIPHER_SUITES, hbone_context

ID = SpiffeId("cluster.local", "default", "a")


def test_a_bundle_of_several_roots_trusts_peers_of_each() -> None:
    old, new = FakeCa("old.example"), FakeCa("new.example")
    both = old.root_pem + new.root_pem
    for ca in (old, new):
        server = tls_engine(hbone_context(_with_roots(old, both)), server_side=True)
        client = tls_engine(hbone_context(_with_roots(ca, both)), server_side=False)
        client.handshake()
        for source, sink in ((client, server), (server, client), (client, server)):
            _carry(source, sink)
        assert server.established


def test_one_context_is_for_both_ends_even_of_one_connection() -> None:
    context = hbone_context(FakeCa().issue(ID))
    server, client = tls_engine(context, server_side=True), tls_engine(context, server_side=False)
    client.handshake()
    for source, sink in ((client, server), (server, client), (client, server)):
        _carry(source, sink)
    assert (client.established, server.established) == (True, True)


def test_no_server_name_and_only_tls_1_3_is_offered() -> None:
    client = tls_engine(hbone_context(FakeCa().issue(ID)), server_side=False)
    client.handshake()
    hello = bytes(scratch().cipher_out[: client.take()])
    assert b"\x00\x2b\x00\x03\x02\x03\x04" in hello  # supported_versions: TLS 1.3 alone
    assert b"cluster.local" not in hello


def test_pythons_own_ssl_is_a_peer_we_get_on_with(tmp_path: Path) -> None:
    """Another OpenSSL, without X25519MLKEM768: both sides fall back to a group it has."""
    ca = FakeCa()
    bundle = ca.issue(ID)
    pem = tmp_path / "bundle.pem"
    pem.write_bytes(bundle.key_pem + bundle.chain_pem[0])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_cert_chain(pem)
    context.load_verify_locations(cadata=ca.root_pem.decode())
    context.set_alpn_protocols(["h2"])
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(incoming, outgoing)
    server = tls_engine(hbone_context(bundle), server_side=True)
    for _ in range(3):
        try:
            client.do_handshake()
        except ssl.SSLWantReadError:
            pass
        data = outgoing.read()
        if data:
            scratch().cipher_in[: len(data)] = data
            server.feed(len(data))
            server.handshake()
        incoming.write(bytes(scratch().cipher_out[: server.take()]))
    assert server.established
    assert client.version() == "TLSv1.3"
    assert client.selected_alpn_protocol() == "h2"
    assert server.cipher_suite in CIPHER_SUITES.decode().split(":")


def _with_roots(ca: FakeCa, roots: bytes) -> CertificateBundle:
    return replace(ca.issue(ID), roots_pem=roots)


def _carry(source: TlsEngine, sink: TlsEngine) -> None:
    size = source.take()
    scratch().cipher_in[:size] = scratch().cipher_out[:size]
    sink.feed(size)
    sink.handshake()

"""Whom a client believes: the same whatever Python runs it."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from mesh.rpc.tls import InvalidTlsMaterial, client_tls
from mesh.testing.serving import write_serving_certificate


def shake_hands(client: ssl.SSLContext, server: ssl.SSLContext, name: str) -> None:
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (
        client.wrap_bio(to_client, to_server, server_hostname=name),
        server.wrap_bio(to_server, to_client, server_side=True),
    )
    for _ in range(3):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                pass


@pytest.fixture
def strict_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """As 3.13 and later are, with whatever Python this is."""
    make = ssl.create_default_context

    def make_strict(*args: Any, **options: Any) -> ssl.SSLContext:
        context = make(*args, **options)
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        return context

    monkeypatch.setattr(ssl, "create_default_context", make_strict)


@pytest.mark.usefixtures("strict_python")
def test_an_authority_that_lacks_extensions_is_believed_as_by_go(tmp_path: Path) -> None:
    """The root of these tests does not say what its key is for, as those of many clusters do not."""
    serving = write_serving_certificate(tmp_path, "istiod.test")
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(serving.chain, serving.key)
    shake_hands(client_tls(serving.root_pem), server, "istiod.test")
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        shake_hands(client_tls(serving.root_pem), server, "other.test")
    other = write_serving_certificate(tmp_path, "istiod.test")
    with pytest.raises(ssl.SSLCertVerificationError, match=r"signature failure|unable to get local issuer"):
        shake_hands(client_tls(other.root_pem), server, "istiod.test")


def test_an_anchor_need_not_have_signed_itself(tmp_path: Path) -> None:
    """An intermediate authority, handed out as root, is one; here the server's own certificate stands for it."""
    serving = write_serving_certificate(tmp_path, "istiod.test")
    leaf = x509.load_pem_x509_certificate(serving.chain.read_bytes())
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(serving.chain, serving.key)
    shake_hands(client_tls(leaf.public_bytes(Encoding.PEM).decode()), server, "istiod.test")


@pytest.mark.parametrize("roots", ["", "\n", "no certificate"])
def test_a_file_without_roots_does_not_make_everybody_believed_whom_the_system_believes(roots: str) -> None:
    with pytest.raises(InvalidTlsMaterial, match="root certificates: "):
        client_tls(roots)

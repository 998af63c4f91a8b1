"""Asks the certificate authority for certificates (`IstioCertificateService.CreateCertificate`), for ourselves or for pods of a node."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from google.protobuf.message import DecodeError
from google.protobuf.struct_pb2 import Struct

from mesh.model.identity import SpiffeId
from mesh.rpc.client import open_channel
from mesh.rpc.errors import RpcError
from mesh.rpc.tls import client_tls
from mesh.tls.bundle import CertificateBundle, InvalidBundle
from mesh.tls.csr import make_request
from mesh.tls.rotation import CertificateFetchFailed
from mesh.xds.names import CREATE_CERTIFICATE_METHOD
from mesh.xds.proto import ca_pb2

RPC_SECONDS: Final = 15.0
"""ztunnel has no deadline here and can wait for ever; the authority itself may wait a few seconds for a new pod to be known."""


@dataclass(frozen=True, slots=True)
class Authority:
    """Whom to ask and as whom. ``hostname``: what its certificate must name instead of ``host``; ``token`` and ``root`` are files, read
    anew for every call; ``lifetime`` asked for, in seconds. ``impersonate``: certificates are for others, and the request names them."""

    host: str
    port: int
    hostname: str | None
    root: Path
    token: Path
    cluster_id: str
    lifetime: float
    impersonate: bool


async def request_certificate(authority: Authority, identity: SpiffeId) -> CertificateBundle:
    """One certificate for ``identity``, with a fresh key. Raises CertificateFetchFailed with the reason."""
    request = make_request(identity)
    metadata = Struct()
    if authority.impersonate:
        metadata.update({"ImpersonatedIdentity": str(identity)})
    body = ca_pb2.IstioCertificateRequest(
        csr=request.csr_pem.decode(), validity_duration=int(authority.lifetime), metadata=metadata
    ).SerializeToString()
    try:
        answer = await _call(authority, body)
    except RpcError as exc:
        raise CertificateFetchFailed(f"signing gRPC error ({exc.status.name}): {exc.message}") from exc
    except (OSError, ValueError) as exc:  # a token or root certificate that is not there, or not one
        raise CertificateFetchFailed(f"can't ask the certificate authority: {exc}") from exc
    try:
        chain = list(ca_pb2.IstioCertificateResponse.FromString(answer).cert_chain)
    except DecodeError as exc:
        raise CertificateFetchFailed(f"the authority's answer is unreadable: {exc}") from exc
    return _parse_chain(identity, request.key_pem, chain)


async def _call(authority: Authority, body: bytes) -> bytes:
    context = client_tls(authority.root.read_text())
    metadata = {"authorization": f"Bearer {authority.token.read_text().strip()}", "clusterid": authority.cluster_id}
    async with open_channel(authority.host, authority.port, ssl_context=context, server_hostname=authority.hostname) as channel:
        return await channel.unary(CREATE_CERTIFICATE_METHOD, body, metadata=metadata, timeout=RPC_SECONDS)


def _parse_chain(identity: SpiffeId, key_pem: bytes, chain: list[str]) -> CertificateBundle:
    """The answer is leaf, intermediates, and last the roots."""
    if not chain:
        raise CertificateFetchFailed(f"chain returned from CA is empty for: {identity}")
    if len(chain) == 1:
        raise CertificateFetchFailed("invalid root certificate: no root certificate present")
    try:
        return CertificateBundle.parse(key_pem=key_pem, chain_pem=[part.encode() for part in chain[:-1]], roots_pem=chain[-1].encode())
    except InvalidBundle as exc:
        raise CertificateFetchFailed(f"the authority's answer is unusable: {exc}") from exc

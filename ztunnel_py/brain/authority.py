"""Asks the certificate authority for the certificates of this node's pods (`IstioCertificateService.CreateCertificate`)."""

from __future__ import annotations

from google.protobuf.message import DecodeError
from google.protobuf.struct_pb2 import Struct

from mesh.model.identity import SpiffeId
from mesh.rpc.client import open_channel
from mesh.rpc.errors import RpcError
from mesh.rpc.tls import InvalidTlsMaterial, client_tls
from mesh.tls.bundle import CertificateBundle, InvalidBundle
from mesh.tls.csr import make_request
from mesh.tls.rotation import CertificateFetchFailed
from mesh.xds.proto import ca_pb2
from ztunnel_py.config import AgentConfig

METHOD = "/istio.v1.auth.IstioCertificateService/CreateCertificate"
RPC_SECONDS = 15.0
"""ztunnel has no deadline here and can wait for ever; the authority itself may wait a few seconds for a new pod to be known."""


async def fetch_certificate(config: AgentConfig, identity: SpiffeId) -> CertificateBundle:
    """One certificate for ``identity``, with a fresh key. Raises CertificateFetchFailed with the reason."""
    request = make_request(identity)
    metadata = Struct()
    metadata.update({"ImpersonatedIdentity": str(identity)})
    body = ca_pb2.IstioCertificateRequest(
        csr=request.csr_pem.decode(), validity_duration=int(config.secret_ttl), metadata=metadata
    ).SerializeToString()
    try:
        answer = await _call(config, body)
    except RpcError as exc:
        raise CertificateFetchFailed(f"signing gRPC error ({exc.status.name}): {exc.message}") from exc
    except (OSError, InvalidTlsMaterial) as exc:
        raise CertificateFetchFailed(f"can't ask the certificate authority: {exc}") from exc
    try:
        chain = list(ca_pb2.IstioCertificateResponse.FromString(answer).cert_chain)
    except DecodeError as exc:
        raise CertificateFetchFailed(f"the authority's answer is unreadable: {exc}") from exc
    return _parse_chain(identity, request.key_pem, chain)


async def _call(config: AgentConfig, body: bytes) -> bytes:
    context = client_tls(config.ca_root.read_text())
    address = config.ca_address
    async with open_channel(address.host, address.port, ssl_context=context, server_hostname=config.ca_hostname) as channel:
        return await channel.unary(METHOD, body, metadata=call_metadata(config), timeout=RPC_SECONDS)


def call_metadata(config: AgentConfig) -> dict[str, str]:
    """Who we are, read anew for every call: tokens rotate. Raises OSError."""
    return {"authorization": f"Bearer {config.token.read_text().strip()}", "clusterid": config.cluster_id}


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

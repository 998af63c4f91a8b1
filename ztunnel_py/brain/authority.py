"""Asks the certificate authority for the certificates of this node's pods."""

from __future__ import annotations

from mesh.model.identity import SpiffeId
from mesh.tls.bundle import CertificateBundle
from mesh.xds.authority import Authority, request_certificate
from ztunnel_py.config import AgentConfig


async def fetch_certificate(config: AgentConfig, identity: SpiffeId) -> CertificateBundle:
    """One certificate for ``identity``, with a fresh key. Raises CertificateFetchFailed with the reason."""
    address = config.ca_address
    authority = Authority(
        address.host,
        address.port,
        config.ca_hostname,
        config.ca_root,
        config.token,
        config.cluster_id,
        config.secret_ttl,
        impersonate=True,
    )
    return await request_certificate(authority, identity)

"""The clients by which a proxy has its configuration and its certificates from the control plane."""

from __future__ import annotations

from collections.abc import Mapping

from mesh.rpc.tls import client_tls
from mesh.runtime.controlplane import ControlPlaneConfig
from mesh.xds.authority import Authority
from mesh.xds.client import AdsClientConfig, bearer_metadata, connect_tls


def ads_client(config: ControlPlaneConfig, node_id: str, pod: Mapping[str, str]) -> AdsClientConfig:
    """For what all node agents ask for; ``pod``: the proxy's own metadata. Roots and token are read for every connection."""
    address = config.xds_address
    return AdsClientConfig(
        connect=connect_tls(
            address.host, address.port, lambda: client_tls(config.xds_root.read_text()), server_hostname=config.xds_hostname
        ),
        metadata=bearer_metadata(config.token, cluster_id=config.cluster_id),
        node_id=node_id,
        node_metadata={**pod, "CLUSTER_ID": config.cluster_id},
    )


def authority(config: ControlPlaneConfig, *, impersonate: bool) -> Authority:
    """Whom to ask for certificates; ``impersonate``: for those of other pods, as a node agent does."""
    address = config.ca_address
    return Authority(
        address.host,
        address.port,
        config.ca_hostname,
        config.ca_root,
        config.token,
        config.cluster_id,
        config.secret_ttl,
        impersonate=impersonate,
    )

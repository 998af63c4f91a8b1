"""How a proxy reaches the control plane: the variables that node agents and waypoints share. Names are ztunnel's.

Apart from `mesh.runtime.clients`, which makes clients of it: movers read the same environment, and never speak to the control plane.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mesh.runtime.env import ControlPlaneAddress, control_plane, duration, nonempty, optional, path, variable


@dataclass(frozen=True, slots=True)
class ControlPlaneConfig:
    """What a proxy's own configuration begins with."""

    xds_address: ControlPlaneAddress = variable(
        "XDS_ADDRESS", parse=control_plane, default="https://istiod.istio-system.svc:15012", doc="where configuration comes from"
    )
    ca_address: ControlPlaneAddress = variable(
        "CA_ADDRESS", "CA_ADDR", parse=control_plane, default="https://istiod.istio-system.svc:15012", doc="where certificates come from"
    )
    xds_root: Path = variable(
        "XDS_ROOT_CA", parse=path, default="./var/run/secrets/istio/root-cert.pem", doc="PEM file of the roots that XDS_ADDRESS must prove"
    )
    ca_root: Path = variable(
        "CA_ROOT_CA", parse=path, default="./var/run/secrets/istio/root-cert.pem", doc="PEM file of the roots that CA_ADDRESS must prove"
    )
    xds_hostname: str | None = optional(
        "ALT_XDS_HOSTNAME", parse=nonempty, doc="name to expect in the XDS server's certificate instead of the host"
    )
    ca_hostname: str | None = optional(
        "ALT_CA_HOSTNAME", parse=nonempty, doc="name to expect in the CA server's certificate instead of the host"
    )
    token: Path = variable(
        "AUTH_TOKEN",
        parse=path,
        default="./var/run/secrets/tokens/istio-token",
        doc="file with the token that proves this proxy to the control plane",
    )
    secret_ttl: float = variable(
        "SECRET_TTL", parse=duration, default="24h", doc="lifetime asked for certificates; they are renewed at half of it"
    )
    cluster_id: str = variable(
        "ISTIO_META_CLUSTER_ID", "CLUSTER_ID", parse=nonempty, default="Kubernetes", doc="sent as metadata clusterid"
    )

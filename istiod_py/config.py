"""What the control plane is told at start, as one value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from mesh.model.identity import DEFAULT_TRUST_DOMAIN

LONGEST_DEBOUNCE: Final = 10.0
"""Seconds after which a push happens although changes keep coming (Istio's PILOT_DEBOUNCE_MAX)."""


@dataclass(frozen=True, slots=True)
class Config:
    """``source`` is the user's directory, ``overlays`` those of status; None: the API server of ``kubeconfig`` is the source. Times in
    seconds. Addresses to listen on are ``host:port``."""

    source: Path | None
    state_dir: Path
    overlays: tuple[Path, ...] = ()
    listen: str = ":15012"
    monitoring: str = ":15014"
    token_dir: Path | None = None
    cacerts: Path | None = None
    trust_domain: str = DEFAULT_TRUST_DOMAIN
    cluster_id: str = "Kubernetes"
    root_namespace: str = "istio-system"
    debounce: float = 0.1
    jwks_refresh: float = 20 * 60.0
    """Until a key set that was fetched is fetched again. Istio's default."""
    kubeconfig: str = ""
    """``in-cluster``, or the path of a kubeconfig; instead of ``source``."""
    trusted_node_accounts: frozenset[str] = frozenset({"istio-system/ztunnel"})
    """``namespace/serviceaccount`` of node agents on Kubernetes: these may ask for identities of the pods on their node."""
    read_secrets: bool = False
    """On Kubernetes: Secrets of all namespaces are read, for the credentials that DestinationRules name."""
    deploy_dir: Path | None = None
    """Beside a directory: where what is deployed for Gateways goes, for whoever runs pods there. None: nothing is deployed."""
    status_dir: Path | None = None
    """Beside a directory: where the status of Gateways goes, one of ``overlays`` or below one."""
    waypoint_image: str = ""
    """On Kubernetes; empty: our own pod's."""
    waypoint_environment: Mapping[str, str] = field(default_factory=dict)
    """What waypoints are told besides: how to log."""
    replica: str = "istiod-py"
    """This replica's name, for the leader's Lease."""

    @property
    def tokens(self) -> Path:
        """Where the nodes' tokens are: by default in the state directory."""
        return self.token_dir or self.state_dir / "tokens"

    @property
    def serving_names(self) -> tuple[str, ...]:
        """DNS names in our serving certificate."""
        service = f"istiod.{self.root_namespace}.svc"
        return (service, f"{service}.cluster.local", "localhost")

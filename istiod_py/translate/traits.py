"""What labels and annotations say of any workload, whatever kind of object describes it."""

from __future__ import annotations

from collections.abc import Mapping

from mesh.model.labels import CANONICAL_NAME, CANONICAL_REVISION, REDIRECTION, TUNNEL
from mesh.model.workload import TunnelProtocol


def canonical_name(labels: Mapping[str, str], default: str) -> str:
    return _first(labels, CANONICAL_NAME, "app.kubernetes.io/name", "app") or default


def canonical_revision(labels: Mapping[str, str]) -> str:
    return _first(labels, CANONICAL_REVISION, "app.kubernetes.io/version", "version") or "latest"


def _first(labels: Mapping[str, str], *names: str) -> str:
    return next((labels[name] for name in names if labels.get(name)), "")


def speaks_hbone(labels: Mapping[str, str]) -> bool:
    """Whether the workload takes HBONE by itself (``native_tunnel``), with no node proxy in front."""
    return "http" in (item.strip() for item in labels.get(TUNNEL, "").split(","))


def tunnel_protocol(labels: Mapping[str, str], annotations: Mapping[str, str]) -> TunnelProtocol:
    """HBONE if a node proxy has captured the workload, or it speaks it by itself."""
    captured = annotations.get(REDIRECTION) == "enabled"
    return TunnelProtocol.HBONE if captured or speaks_hbone(labels) else TunnelProtocol.NONE

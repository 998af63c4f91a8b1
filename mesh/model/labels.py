"""Names of Istio's labels and annotations that we read or write."""

from typing import Final

DATAPLANE_MODE: Final = "istio.io/dataplane-mode"
USE_WAYPOINT: Final = "istio.io/use-waypoint"
USE_WAYPOINT_NAMESPACE: Final = "istio.io/use-waypoint-namespace"
NETWORK: Final = "topology.istio.io/network"
REGION: Final = "topology.kubernetes.io/region"
ZONE: Final = "topology.kubernetes.io/zone"
SUBZONE: Final = "topology.istio.io/subzone"
TUNNEL: Final = "networking.istio.io/tunnel"
CANONICAL_NAME: Final = "service.istio.io/canonical-name"
CANONICAL_REVISION: Final = "service.istio.io/canonical-revision"
WORKLOAD_NAME: Final = "service.istio.io/workload-name"

REDIRECTION: Final = "ambient.istio.io/redirection"
"""Written by the agent on a pod: ``enabled`` once capture works, ``pending`` while it is retried, absent otherwise."""
SIDECAR_STATUS: Final = "sidecar.istio.io/status"
BYPASS_INBOUND_CAPTURE: Final = "ambient.istio.io/bypass-inbound-capture"
DRY_RUN: Final = "istio.io/dry-run"
TRAFFIC_DISTRIBUTION: Final = "networking.istio.io/traffic-distribution"

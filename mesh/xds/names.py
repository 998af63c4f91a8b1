"""Names of the control plane's protocol: resource types, methods, nodes."""

from __future__ import annotations

from typing import Final

ADDRESS: Final = "type.googleapis.com/istio.workload.Address"
AUTHORIZATION: Final = "type.googleapis.com/istio.security.Authorization"
ADS_METHOD: Final = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources"
WAYPOINT: Final = "waypoint"
"""The role that a waypoint introduces itself with."""
GATEWAY_NAME: Final = "GATEWAY_NAME"
"""Node metadata of a waypoint: the name of its Gateway, which is in the pod's namespace."""
TAKES_PARTS: Final = "AMBIENT_TAKES_PARTS"
"""Node metadata, true: of a client that knows of responses in parts (`DeltaDiscoveryResponse.more`)."""
CREATE_CERTIFICATE_METHOD: Final = "/istio.v1.auth.IstioCertificateService/CreateCertificate"


def node_id(instance_ip: str, pod: str, namespace: str) -> str:
    """A node proxy's ``node.id``; an unknown address is sent as 1.1.1.1, as ztunnel does."""
    return f"ztunnel~{instance_ip or '1.1.1.1'}~{pod}.{namespace}~{namespace}.svc.cluster.local"


def waypoint_node_id(instance_ip: str, pod: str, namespace: str) -> str:
    """A waypoint's ``node.id``."""
    return f"{WAYPOINT}~{instance_ip or '1.1.1.1'}~{pod}.{namespace}~{namespace}.svc.cluster.local"


def role_of_node_id(node_id: str) -> str:
    """``ztunnel`` or ``waypoint``; what else a client says it is."""
    return node_id.partition("~")[0]


def pod_of_node_id(node_id: str) -> tuple[str, str]:
    """Namespace and name of the pod in a proxy's ``node.id``; what is none gives the whole as name."""
    parts = node_id.split("~")
    name, dot, namespace = parts[2].rpartition(".") if len(parts) == 4 else ("", "", "")
    return (namespace, name) if dot else ("", node_id)

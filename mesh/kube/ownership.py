"""What the control plane writes to objects all over a cluster, and as whom: so that whoever takes the mesh away finds all of it again.

Field managers are Istio's names where Istio has one, so that each finds its own after a change of either to the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from mesh.kube.gatewayapi.gateway import WAYPOINT_CONTROLLER
from mesh.kube.resources import AUTOSCALERS, DEPLOYMENTS, DISRUPTION_BUDGETS, RESOURCES, Resource

ROOT_MAP: Final = "istio-ca-root-cert"
"""The ConfigMap of every namespace with the root certificate."""
ROOT_MAP_MANAGER: Final = "istiod-py"
"""Ours alone: by it a root map is told from Istio's."""

DEPLOYER: Final = WAYPOINT_CONTROLLER
"""Field manager of all that is deployed for a Gateway, and of the Gateway's status."""
DEPLOYED: Final[tuple[Resource, ...]] = (
    RESOURCES["ServiceAccount"],
    DEPLOYMENTS,
    RESOURCES["Service"],
    AUTOSCALERS,
    DISRUPTION_BUDGETS,
)
"""What is deployed for a Gateway can be one of these; all of it has the label `GATEWAY_MANAGED`."""

WAYPOINT_ACCEPTED: Final = "WaypointAccepted"
ZTUNNEL_ACCEPTED: Final = "ZtunnelAccepted"
BOUND: Final = "istio.io/WaypointBound"
ROUTE_CONTROLLER: Final = "istio.io/gateway-controller"
"""As whom Istio speaks of routes."""
CONTROLLERS: Final = frozenset({ROUTE_CONTROLLER, WAYPOINT_CONTROLLER})
"""Who speaks of routes and of waypoints in `LISTS`."""

_ZTUNNEL_POLICY: Final = "istio-ambient-ztunnel-policy"
_WAYPOINT_POLICY: Final = "istio-ambient-waypoint-policy"
_SERVICE: Final = "istio-ambient-service"
_WORKLOAD_ENTRY: Final = "istio-ambient-workloadentry"
_OTHERS: Final = "istio-status"

CONDITIONS: Final[Mapping[str, Mapping[str, str]]] = {
    "AuthorizationPolicy": {ZTUNNEL_ACCEPTED: _ZTUNNEL_POLICY, WAYPOINT_ACCEPTED: _WAYPOINT_POLICY},
    "RequestAuthentication": {WAYPOINT_ACCEPTED: _WAYPOINT_POLICY},
    "DestinationRule": {WAYPOINT_ACCEPTED: _WAYPOINT_POLICY},
    "VirtualService": {WAYPOINT_ACCEPTED: _WAYPOINT_POLICY},
    "Service": {BOUND: _SERVICE},
    "ServiceEntry": {BOUND: _SERVICE},
    "WorkloadEntry": {BOUND: _WORKLOAD_ENTRY},
    "GatewayClass": {"Accepted": _OTHERS},
}
"""By kind the types of the conditions that its status has of us, and who owns each."""
LISTS: Final[Mapping[str, str]] = {
    "HTTPRoute": "parents",
    "GRPCRoute": "parents",
    "TCPRoute": "parents",
    "TLSRoute": "parents",
    "BackendTLSPolicy": "ancestors",
}
"""By kind the field of its status where controllers speak of other objects. The list has one owner, whoever its items are of."""
LISTS_MANAGER: Final = _OTHERS

STATUS_MANAGERS: Final[Mapping[str, frozenset[str]]] = {
    **{kind: frozenset(owners.values()) for kind, owners in CONDITIONS.items()},
    **dict.fromkeys(LISTS, frozenset({LISTS_MANAGER})),
    "Gateway": frozenset({DEPLOYER}),
}
"""By kind as whom we write to its status; of all other kinds to none."""

"""Where each kind is found in the API: group, version and plural, and the paths they make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from mesh.kube.kinds import KINDS


@dataclass(frozen=True, slots=True)
class Resource:
    """One collection of the API server."""

    group: str
    """``""``: the core group."""
    version: str
    plural: str
    kind: str
    namespaced: bool = True
    older: tuple[str, ...] = ()
    """Versions that say the same, in order of preference, for API servers that do not serve ``version`` yet."""

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    def collection(self, namespace: str = "") -> str:
        """The path of all objects, or of those of one namespace."""
        root = f"/apis/{self.group}/{self.version}" if self.group else f"/api/{self.version}"
        return f"{root}/namespaces/{namespace}/{self.plural}" if namespace else f"{root}/{self.plural}"

    def path(self, namespace: str, name: str, subresource: str = "") -> str:
        """The path of one object, or of a part of it such as ``status``."""
        base = f"{self.collection(namespace)}/{name}"
        return f"{base}/{subresource}" if subresource else base

    def __str__(self) -> str:
        return f"{self.plural}.{self.group}" if self.group else self.plural

    def at(self, version: str) -> Resource:
        return replace(self, version=version)


def _read(kind: str, plural: str, version: str = "v1", older: tuple[str, ...] = ()) -> Resource:
    return Resource(KINDS[kind].group, version, plural, kind, KINDS[kind].namespaced, older)


RESOURCES: Final[Mapping[str, Resource]] = {
    resource.kind: resource
    for resource in (
        _read("Namespace", "namespaces"),
        _read("Node", "nodes"),
        _read("Pod", "pods"),
        _read("Service", "services"),
        _read("ServiceAccount", "serviceaccounts"),
        _read("EndpointSlice", "endpointslices"),
        _read("HTTPRoute", "httproutes", older=("v1beta1",)),
        _read("GRPCRoute", "grpcroutes", older=("v1alpha2",)),
        _read("TCPRoute", "tcproutes", older=("v1alpha2",)),
        _read("TLSRoute", "tlsroutes", older=("v1alpha3", "v1alpha2")),
        _read("VirtualService", "virtualservices"),
        _read("Gateway", "gateways"),
        _read("GatewayClass", "gatewayclasses"),
        _read("ServiceEntry", "serviceentries"),
        _read("WorkloadEntry", "workloadentries"),
        _read("AuthorizationPolicy", "authorizationpolicies"),
        _read("RequestAuthentication", "requestauthentications"),
        _read("BackendTLSPolicy", "backendtlspolicies", older=("v1alpha3",)),
        _read("DestinationRule", "destinationrules"),
        _read("ReferenceGrant", "referencegrants", "v1beta1"),
        _read("ConfigMap", "configmaps"),
        _read("Secret", "secrets"),
        _read("PeerAuthentication", "peerauthentications"),
    )
}
"""Of every kind that is read as configuration (`mesh.kube.kinds`)."""

SECRETS: Final = RESOURCES["Secret"]
CONFIG_MAPS: Final = RESOURCES["ConfigMap"]
LEASES: Final = Resource("coordination.k8s.io", "v1", "leases", "Lease")
DEPLOYMENTS: Final = Resource("apps", "v1", "deployments", "Deployment")
AUTOSCALERS: Final = Resource("autoscaling", "v2", "horizontalpodautoscalers", "HorizontalPodAutoscaler")
DISRUPTION_BUDGETS: Final = Resource("policy", "v1", "poddisruptionbudgets", "PodDisruptionBudget")
DAEMON_SETS: Final = Resource("apps", "v1", "daemonsets", "DaemonSet")
EVENTS: Final = Resource("", "v1", "events", "Event")
TOKEN_REVIEWS: Final = Resource("authentication.k8s.io", "v1", "tokenreviews", "TokenReview", namespaced=False)

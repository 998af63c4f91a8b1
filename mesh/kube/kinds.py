"""The kinds that are read: their API group, whether they live in a namespace, and the check of their structure."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from mesh.kube.backendtlspolicy import read_backend_tls_policy
from mesh.kube.configmap import read_config_map
from mesh.kube.destinationrule import read_destination_rule
from mesh.kube.endpointslice import read_endpoint_slice
from mesh.kube.fields import Fields
from mesh.kube.gatewayapi.gateway import read_gateway, read_gateway_class
from mesh.kube.gatewayapi.routes import read_grpc_route, read_http_route, read_tcp_route, read_tls_route
from mesh.kube.objects import KubeObject, SourceProblem
from mesh.kube.pod import read_pod
from mesh.kube.policies import read_authorization_policy, read_peer_authentication
from mesh.kube.referencegrant import read_reference_grant
from mesh.kube.requestauthentication import read_request_authentication
from mesh.kube.secret import read_secret
from mesh.kube.service import read_service
from mesh.kube.serviceentry import read_service_entry
from mesh.kube.virtualservice import read_virtual_service
from mesh.kube.workloadentry import read_workload_entry


@dataclass(frozen=True, slots=True)
class Kind:
    group: str
    namespaced: bool
    check: Callable[[KubeObject], tuple[SourceProblem, ...]]
    fails_closed: bool = False
    """An object with a mistake and no good version before it is handed on with its problems, to be enforced closed."""
    reports: bool = False
    """Such an object is handed on with its problems: nothing is made of it, but its status says why."""

    @property
    def hands_on_mistakes(self) -> bool:
        return self.fails_closed or self.reports

    def serves(self, api_version: str) -> bool:
        return group_of(api_version) == self.group


def group_of(api_version: str) -> str:
    """Empty for ``v1``."""
    group, slash, _ = api_version.rpartition("/")
    return group if slash else ""


def _check_metadata_only(obj: KubeObject) -> tuple[SourceProblem, ...]:
    fields = Fields(obj)
    fields.mapping("spec")
    fields.mapping("status")
    return tuple(fields.problems)


def _check_service_account(obj: KubeObject) -> tuple[SourceProblem, ...]:
    return ()


KINDS: Mapping[str, Kind] = {
    "Namespace": Kind("", False, _check_metadata_only),
    "Node": Kind("", False, _check_metadata_only),
    "Pod": Kind("", True, lambda obj: read_pod(obj)[1]),
    "Service": Kind("", True, lambda obj: read_service(obj)[1]),
    "ServiceAccount": Kind("", True, _check_service_account),
    "EndpointSlice": Kind("discovery.k8s.io", True, lambda obj: read_endpoint_slice(obj)[1]),
    "HTTPRoute": Kind("gateway.networking.k8s.io", True, lambda obj: read_http_route(obj)[1], reports=True),
    "GRPCRoute": Kind("gateway.networking.k8s.io", True, lambda obj: read_grpc_route(obj)[1], reports=True),
    "TCPRoute": Kind("gateway.networking.k8s.io", True, lambda obj: read_tcp_route(obj)[1], reports=True),
    "TLSRoute": Kind("gateway.networking.k8s.io", True, lambda obj: read_tls_route(obj)[1], reports=True),
    "VirtualService": Kind("networking.istio.io", True, lambda obj: read_virtual_service(obj)[1], reports=True),
    "Gateway": Kind("gateway.networking.k8s.io", True, lambda obj: read_gateway(obj)[1]),
    "GatewayClass": Kind("gateway.networking.k8s.io", False, lambda obj: read_gateway_class(obj)[1]),
    "ServiceEntry": Kind("networking.istio.io", True, lambda obj: read_service_entry(obj)[1]),
    "WorkloadEntry": Kind("networking.istio.io", True, lambda obj: read_workload_entry(obj)[1]),
    "AuthorizationPolicy": Kind("security.istio.io", True, lambda obj: read_authorization_policy(obj)[1], fails_closed=True),
    "RequestAuthentication": Kind("security.istio.io", True, lambda obj: read_request_authentication(obj)[1], fails_closed=True),
    "BackendTLSPolicy": Kind("gateway.networking.k8s.io", True, lambda obj: read_backend_tls_policy(obj)[1], fails_closed=True),
    "DestinationRule": Kind("networking.istio.io", True, lambda obj: read_destination_rule(obj)[1], reports=True),
    "ReferenceGrant": Kind("gateway.networking.k8s.io", True, lambda obj: read_reference_grant(obj)[1]),
    "ConfigMap": Kind("", True, lambda obj: read_config_map(obj)[1]),
    "Secret": Kind("", True, lambda obj: read_secret(obj)[1]),
    "PeerAuthentication": Kind("security.istio.io", True, lambda obj: read_peer_authentication(obj)[1], fails_closed=True),
}

_NAMESAKES: Final = frozenset({("networking.istio.io", "Gateway"), ("gateway.networking.k8s.io", "BackendLBPolicy")})
"""Groups and kinds that are not read, and no slip of what is."""
_CLOSE: Final = 0.85


def find_slip(api_version: str, kind: str) -> tuple[str, str] | None:
    """Of an object that nobody reads: the field and what is wrong, where it was surely meant to be of a kind that is read. An API server
    would refuse it; a policy that is passed over in silence guards nothing."""
    group = group_of(api_version)
    if (group, kind) in _NAMESAKES:
        return None
    known = KINDS.get(kind)
    if known is not None:
        theirs = group and not group.endswith(("istio.io", "k8s.io"))  # a Service of knative, say
        return None if theirs else ("apiVersion", f"{kind} is of group '{known.group}', not of '{group}'")
    names = {name.casefold(): name for name, each in KINDS.items() if each.group == group}
    close = difflib.get_close_matches(kind.casefold(), names, n=1, cutoff=_CLOSE)
    return ("kind", f"'{kind}' is no kind of {group or 'v1'}; did you mean '{names[close[0]]}'?") if close else None

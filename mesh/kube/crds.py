"""The CustomResourceDefinitions of Istio's kinds and the Gateway API's that we read, made from their parsers, and whether to install one.

Names, versions, short names and columns are those of the originals, so that objects and habits outlast a change of either to the other.
``python -m mesh.kube.crds DIRECTORY`` writes them as files.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

from ruamel.yaml import YAML

from mesh.kube.backendtlspolicy import parse_backend_tls_policy
from mesh.kube.destinationrule import parse_destination_rule
from mesh.kube.fields import Fields
from mesh.kube.gatewayapi.gateway import parse_gateway, parse_gateway_class
from mesh.kube.gatewayapi.routes import parse_grpc_route, parse_http_route, parse_tcp_route, parse_tls_route
from mesh.kube.kinds import KINDS
from mesh.kube.objects import mapping_at
from mesh.kube.outline import Outline, Schema
from mesh.kube.policies import parse_authorization_policy, parse_peer_authentication
from mesh.kube.referencegrant import parse_reference_grant
from mesh.kube.requestauthentication import parse_request_authentication
from mesh.kube.resources import RESOURCES
from mesh.kube.serviceentry import parse_service_entry
from mesh.kube.virtualservice import parse_virtual_service
from mesh.kube.workloadentry import parse_workload_entry

MANAGED_BY: Final = "app.kubernetes.io/managed-by"
OURS: Final = "ambient-mesh"
"""The value of `MANAGED_BY` on every definition of ours."""

Column: TypeAlias = tuple[str, str, str]
"""Heading, path and type of a column of ``kubectl get``."""
_AGE: Final[Column] = ("Age", ".metadata.creationTimestamp", "date")
_TYPE_META: Final[Mapping[str, Schema]] = {
    "apiVersion": {"type": "string"},
    "kind": {"type": "string"},
    "metadata": {"type": "object"},
}


@dataclass(frozen=True, slots=True)
class _Custom:
    parse: Callable[[Fields], object]
    """Asks for all fields of the whole object."""
    description: str
    short: str
    """``""``: none."""
    columns: tuple[Column, ...]
    older: tuple[str, ...] = ("v1beta1",)
    """Versions beside the one that is read and stored; all have one schema, so that conversion changes the name alone."""
    lists: tuple[tuple[str, str], ...] = ()
    """Of status: lists that several write to, each item its writer's own, and the field that tells items apart."""


_CUSTOM: Final[Mapping[str, _Custom]] = {
    "Gateway": _Custom(
        parse_gateway,
        "A waypoint, or another gateway of the mesh.",
        "gtw",
        (
            ("Class", ".spec.gatewayClassName", "string"),
            ("Address", ".status.addresses[*].value", "string"),
            ("Programmed", '.status.conditions[?(@.type=="Programmed")].status', "string"),
            _AGE,
        ),
        lists=(("listeners", "name"),),
    ),
    "GatewayClass": _Custom(
        parse_gateway_class,
        "Who looks after Gateways of this class.",
        "gc",
        (
            ("Controller", ".spec.controllerName", "string"),
            ("Accepted", '.status.conditions[?(@.type=="Accepted")].status', "string"),
            _AGE,
        ),
    ),
    "AuthorizationPolicy": _Custom(
        parse_authorization_policy,
        "Who may talk to the workloads of a namespace, or to some of them.",
        "ap",
        (("Action", ".spec.action", "string"), _AGE),
    ),
    "GRPCRoute": _Custom(
        parse_grpc_route,
        "How gRPC calls to a service are routed.",
        "",
        (("Hostnames", ".spec.hostnames", "string"), _AGE),
        older=("v1alpha2",),
    ),
    "HTTPRoute": _Custom(
        parse_http_route,
        "How HTTP requests to a service are routed.",
        "",
        (("Hostnames", ".spec.hostnames", "string"), _AGE),
    ),
    "RequestAuthentication": _Custom(parse_request_authentication, "Which tokens of requests are believed.", "ra", (_AGE,)),
    "DestinationRule": _Custom(
        parse_destination_rule,
        "How endpoints of a host are chosen and reached.",
        "dr",
        (("Host", ".spec.host", "string"), _AGE),
        older=("v1alpha3", "v1beta1"),
    ),
    "BackendTLSPolicy": _Custom(
        parse_backend_tls_policy, "How to speak TLS with the endpoints of a service.", "btlspolicy", (_AGE,), older=("v1alpha3",)
    ),
    "ReferenceGrant": _Custom(
        parse_reference_grant, "What objects of other namespaces may refer to in this one.", "refgrant", (_AGE,), older=("v1alpha2",)
    ),
    "PeerAuthentication": _Custom(
        parse_peer_authentication,
        "Whether workloads take connections without mutual TLS.",
        "pa",
        (("Mode", ".spec.mtls.mode", "string"), _AGE),
    ),
    "ServiceEntry": _Custom(
        parse_service_entry,
        "Hosts outside Kubernetes as services of the mesh.",
        "se",
        (
            ("Hosts", ".spec.hosts", "string"),
            ("Location", ".spec.location", "string"),
            ("Resolution", ".spec.resolution", "string"),
            _AGE,
        ),
        older=("v1alpha3", "v1beta1"),
    ),
    "TCPRoute": _Custom(
        parse_tcp_route,
        "How TCP connections to a service are routed.",
        "",
        (_AGE,),
        older=("v1alpha2",),
    ),
    "TLSRoute": _Custom(
        parse_tls_route,
        "How TLS connections to a service are routed, still encrypted.",
        "",
        (_AGE,),
        older=("v1alpha3", "v1alpha2"),
    ),
    "VirtualService": _Custom(
        parse_virtual_service,
        "How requests and connections to hosts are routed.",
        "vs",
        (("Gateways", ".spec.gateways", "string"), ("Hosts", ".spec.hosts", "string"), _AGE),
        older=("v1alpha3", "v1beta1"),
    ),
    "WorkloadEntry": _Custom(
        parse_workload_entry,
        "A workload that is no pod.",
        "we",
        (_AGE, ("Address", ".spec.address", "string")),
        older=("v1alpha3", "v1beta1"),
    ),
}

_CONDITION: Final[Schema] = {
    "type": "object",
    "required": ["type", "status"],
    "x-kubernetes-preserve-unknown-fields": True,
    "properties": {
        **{key: {"type": "string"} for key in ("type", "status", "reason", "message")},
        "lastTransitionTime": {"type": "string", "format": "date-time"},
        # Istio's types print 64-bit numbers as strings.
        "observedGeneration": {"x-kubernetes-int-or-string": True},
    },
}
_CONDITIONS: Final[Schema] = {
    "type": "array",
    "items": _CONDITION,
    # Each writer has its own: server-side apply of one leaves the others'.
    "x-kubernetes-list-type": "map",
    "x-kubernetes-list-map-keys": ["type"],
}


_UNAPPROVED: Final = "unapproved, what ambient-mesh reads of it; the Gateway API's own definition knows more"
"""API servers want to know of definitions in groups of Kubernetes' own who approved them."""


def find_schema(kind: str) -> Schema:
    """OpenAPI of a whole object. Raises KeyError for a kind that is not custom."""
    custom = _CUSTOM[kind]
    outline = Outline(strict=KINDS[kind].fails_closed)
    custom.parse(outline)
    found = outline.schema()
    properties: Schema = found["properties"]
    status = properties.get("status", {}).get("properties", {})
    return {
        "type": "object",
        "description": custom.description,
        **({"required": found["required"]} if "required" in found else {}),
        "properties": {
            **_TYPE_META,
            "spec": properties["spec"],
            "status": {
                "type": "object",
                "x-kubernetes-preserve-unknown-fields": True,
                "properties": {"conditions": _CONDITIONS, **{name: _list_by(key) for name, key in custom.lists}, **status},
            },
        },
    }


def _list_by(key: str) -> Schema:
    item = {"type": "object", "required": [key], "properties": {key: {"type": "string"}}, "x-kubernetes-preserve-unknown-fields": True}
    return {"type": "array", "items": item, "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": [key]}


def make_definition(kind: str) -> Schema:
    """The CustomResourceDefinition as JSON. Raises KeyError for a kind that is not custom."""
    custom, resource = _CUSTOM[kind], RESOURCES[kind]
    schema = find_schema(kind)
    columns = [{"name": name, "jsonPath": path, "type": type} for name, path, type in custom.columns]
    metadata: Schema = {"name": str(resource), "labels": {MANAGED_BY: OURS, "app.kubernetes.io/part-of": OURS}}
    if resource.group.endswith(".k8s.io"):
        metadata["annotations"] = {"api-approved.kubernetes.io": _UNAPPROVED}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": metadata,
        "spec": {
            "group": resource.group,
            "scope": "Namespaced" if resource.namespaced else "Cluster",
            "names": {
                "kind": kind,
                "listKind": f"{kind}List",
                "plural": resource.plural,
                "singular": kind.lower(),
                **({"shortNames": [custom.short]} if custom.short else {}),
                "categories": _categories(resource.group),
            },
            "conversion": {"strategy": "None"},
            "versions": [
                {
                    "name": version,
                    "served": True,
                    "storage": version == resource.version,
                    "schema": {"openAPIV3Schema": schema},
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": columns,
                }
                for version in (resource.version, *custom.older)
            ],
        },
    }


def _categories(group: str) -> list[str]:
    return ["istio-io", f"{group.split('.')[0]}-istio-io"] if group.endswith("istio.io") else ["gateway-api"]


def make_definitions() -> dict[str, Schema]:
    """All, by the name of their object."""
    return {str(RESOURCES[kind]): make_definition(kind) for kind in _CUSTOM}


def is_ours(found: Mapping[str, object] | None) -> bool:
    """Whether to apply our definition, given the one that the API server has (None: none) by its name.

    Istio's, the Gateway API's, or anybody's who did not put our label on it, is theirs: it takes all that we read, and may take more.
    """
    return found is None or mapping_at(mapping_at(found, "metadata"), "labels").get(MANAGED_BY) == OURS


def render_files() -> dict[str, str]:
    """Content by file name: one definition a file, and the kustomization of all."""
    files = {f"{name}.yaml": _HEAD + _dump(definition) for name, definition in make_definitions().items()}
    head = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization"}
    return {**files, "kustomization.yaml": _HEAD + _dump({**head, "resources": sorted(files)})}


_HEAD: Final = "# Made from mesh/kube by `make crds`.\n"


def _dump(value: Schema) -> str:
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.width = 1000  # no trailing blanks where a line would be folded
    yaml.representer.ignore_aliases = lambda _: True
    out = io.StringIO()
    yaml.dump(value, out)
    return out.getvalue()


def main(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in render_files().items():
        (directory / name).write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""What is deployed for a waypoint's Gateway: service account, Deployment, Service, and on request an autoscaler and a disruption budget
(reference: Istio's deployment controller and its template for waypoints). Pure.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from istiod_py.translate.overlay import BadPatch, merge
from istiod_py.translate.waypoints import account_name, deployed_name
from mesh.kube.documents import MalformedDocument, parse_chunk, split_documents
from mesh.kube.gatewayapi.gateway import GROUP, KubeGateway, Listener
from mesh.kube.ownership import ROOT_MAP
from mesh.model import ports
from mesh.model.labels import (
    CANONICAL_NAME,
    CANONICAL_REVISION,
    DATAPLANE_MODE,
    GATEWAY_CLASS_NAME,
    GATEWAY_CONTROLLER_VERSION,
    GATEWAY_MANAGED,
    GATEWAY_NAME,
    GATEWAY_NAME_OVERRIDE,
    GATEWAY_SERVICE_ACCOUNT,
    MESH_CONTROLLER,
    NETWORK,
    REVISION,
    TRAFFIC_DISTRIBUTION,
)

Object: TypeAlias = dict[str, Any]
"""A Kubernetes object as JSON."""

CONTROLLER_VERSION: Final = 5
"""Stamped on the Gateway; the number is that of Istio's controller, whose work this does: the larger number has it."""
CONTAINER: Final = "istio-proxy"
"""Its name in Istio, which people's overlays have."""
PROGRAM: Final = "waypoint-py"
USER: Final = 1337
_SERVICE_TYPE: Final = "networking.istio.io/service-type"
_NOT_COPIED: Final = frozenset(
    {
        "kubectl.kubernetes.io/last-applied-configuration",
        GATEWAY_NAME_OVERRIDE,
        GATEWAY_SERVICE_ACCOUNT,
        GATEWAY_CONTROLLER_VERSION,
    }
)
_OWN_PREFIX: Final = "gateway.networking.k8s.io/"
DRAIN_SECONDS: Final = 25
"""Connections of a waypoint that ends have so long to end by themselves; the kubelet gives five more."""
_TERMINATION_SECONDS: Final = 30


@dataclass(frozen=True, slots=True)
class Template:
    """What is the same for all waypoints of a control plane. ``discovery``: ``https://host:port`` of it."""

    image: str
    discovery: str
    pull_policy: str = ""
    pull_secrets: tuple[str, ...] = ()
    trust_domain: str = "cluster.local"
    cluster_id: str = "Kubernetes"
    network: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Beside what every waypoint has: how to log."""


Overlay: TypeAlias = Mapping[str, str]
"""A ConfigMap's data: YAML to merge onto what is deployed, by key (`OVERLAYS`)."""


class BadParameters(Exception):
    """What is to be merged onto the deployment can't be; the user must act, and nothing is deployed until then."""


def is_deployed_by_us(gateway: KubeGateway) -> bool:
    """Whoever asks for a hostname has deployed something there."""
    return all(address.type != "Hostname" for address in gateway.addresses) and len(gateway.addresses) <= 1


def version_to_stamp(gateway: KubeGateway) -> bool | None:
    """Whether our version is to be written on the Gateway; None: a newer controller has it, or one that we can't read."""
    text = gateway.annotations.get(GATEWAY_CONTROLLER_VERSION)
    if text is None:
        return True
    if not (text.isascii() and text.isdigit()) or int(text) > CONTROLLER_VERSION:
        return None
    return int(text) < CONTROLLER_VERSION


def plan_waypoint(gateway: KubeGateway, template: Template, overlays: tuple[Overlay, ...] = ()) -> tuple[Object, ...]:
    """All objects, in the order in which they are to be applied. Raises BadParameters."""
    for overlay in overlays:
        for key in overlay:
            if key not in OVERLAYS:
                raise BadParameters(f'unsupported overlay "{key}" (supported: {", ".join(OVERLAYS)})')
    return tuple(_overlaid(gateway, template, overlays))


def _overlaid(gateway: KubeGateway, template: Template, overlays: tuple[Overlay, ...]) -> Iterator[Object]:
    for key, (make, always) in OVERLAYS.items():
        made = make(gateway, template)
        given = [overlay[key] for overlay in overlays if key in overlay]
        if not given and not always:
            continue
        planned = made
        for text in given:
            planned = _merge(planned, text, key)
        _check_untouched(made, planned, key)
        yield planned


def _merge(base: Object, text: str, key: str) -> Object:
    try:
        values = [value for chunk in split_documents(text) for value in parse_chunk(chunk) if value is not None]
        if len(values) > 1 or not all(isinstance(value, Mapping) for value in values):
            raise BadParameters(f"{key}: expected one mapping")
        return merge(base, _plain(values[0])) if values else base
    except MalformedDocument as exc:
        raise BadParameters(f"{key}: line {exc.line}: {exc.message}") from exc
    except BadPatch as exc:
        raise BadParameters(f"{key}: {exc}") from exc


def _check_untouched(made: Object, planned: Object, key: str) -> None:
    """What ties the object to its Gateway, and whatever would make it another's."""
    allowed = {"labels", "annotations"}
    metadata = planned.get("metadata")
    changed = not isinstance(metadata, Mapping) or any(
        made["metadata"].get(name) != metadata.get(name) for name in (made["metadata"].keys() | metadata.keys()) - allowed
    )
    if changed or any(made.get(name) != planned.get(name) for name in ("apiVersion", "kind")):
        raise BadParameters(f"{key}: illegal metadata change")
    for path in _TIES[key]:
        if _at(made, path) != _at(planned, path):
            raise BadParameters(f"{key}: {'.'.join(path)} can't be changed")


def _at(value: Any, path: tuple[str, ...]) -> object:
    for step in path:
        value = value.get(step) if isinstance(value, Mapping) else None
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


# The objects


def _metadata(gateway: KubeGateway, template: Template, name: str, annotations: Mapping[str, str] | None = None) -> Object:
    return {
        "name": name,
        "namespace": gateway.namespace,
        "annotations": {**(annotations or {}), **_infrastructure_annotations(gateway)},
        "labels": {**_infrastructure_labels(gateway, template), **_own_labels(gateway)},
        "ownerReferences": [{"apiVersion": f"{GROUP}/v1", "kind": "Gateway", "name": gateway.name, "uid": gateway.uid}],
    }


def _own_labels(gateway: KubeGateway) -> dict[str, str]:
    return {GATEWAY_NAME: gateway.name, GATEWAY_CLASS_NAME: gateway.class_name, GATEWAY_MANAGED: MESH_CONTROLLER}


def _infrastructure_labels(gateway: KubeGateway, template: Template) -> dict[str, str]:
    """Those that are asked for, else the Gateway's own."""
    asked = gateway.infrastructure.labels if gateway.infrastructure and gateway.infrastructure.labels else None
    labels = gateway.labels if asked is None else {key: value for key, value in asked.items() if not key.startswith(_OWN_PREFIX)}
    network = {NETWORK: template.network} if template.network and NETWORK not in gateway.labels else {}
    return {**network, **labels}


def _infrastructure_annotations(gateway: KubeGateway) -> dict[str, str]:
    asked = gateway.infrastructure.annotations if gateway.infrastructure and gateway.infrastructure.annotations else None
    found = gateway.annotations if asked is None else {key: value for key, value in asked.items() if not key.startswith(_OWN_PREFIX)}
    return {key: value for key, value in found.items() if key not in _NOT_COPIED}


def _make_service_account(gateway: KubeGateway, template: Template) -> Object:
    return {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": _metadata(gateway, template, account_name(gateway))}


def _make_deployment(gateway: KubeGateway, template: Template) -> Object:
    """Without a number of replicas: an autoscaler's word, or the user's, is not taken back."""
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": _metadata(gateway, template, deployed_name(gateway)),
        "spec": {
            "selector": {"matchLabels": {GATEWAY_NAME: gateway.name}},
            "template": {"metadata": _pod_metadata(gateway, template), "spec": _pod_spec(gateway, template)},
        },
    }


def _pod_metadata(gateway: KubeGateway, template: Template) -> Object:
    labels = {
        "sidecar.istio.io/inject": "false",
        # It is the mesh's own end of its connections: a node proxy that took them from it would stand in between.
        DATAPLANE_MODE: "none",
        CANONICAL_NAME: deployed_name(gateway),
        CANONICAL_REVISION: "latest",
    }
    scraped = {"prometheus.io/path": "/stats/prometheus", "prometheus.io/port": str(ports.STATS), "prometheus.io/scrape": "true"}
    return {
        "annotations": {**_infrastructure_annotations(gateway), REVISION: gateway.labels.get(REVISION, "default"), **scraped},
        "labels": {**labels, **_infrastructure_labels(gateway, template), **_own_labels(gateway)},
    }


def _pod_spec(gateway: KubeGateway, template: Template) -> Object:
    spec: Object = {
        "serviceAccountName": account_name(gateway),
        "terminationGracePeriodSeconds": _TERMINATION_SECONDS,
        "nodeSelector": {"kubernetes.io/os": "linux"},
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(gateway, template)],
        "volumes": [
            {
                "name": "istio-token",
                "projected": {
                    "sources": [{"serviceAccountToken": {"audience": "istio-ca", "expirationSeconds": 43200, "path": "istio-token"}}]
                },
            },
            {"name": "istiod-ca-cert", "configMap": {"name": ROOT_MAP}},
            {"name": "scratch", "emptyDir": {"medium": "Memory", "sizeLimit": "16Mi"}},
        ],
    }
    if template.pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in template.pull_secrets]
    return spec


def _container(gateway: KubeGateway, template: Template) -> Object:
    ready = {"path": "/healthz/ready", "port": ports.READINESS, "scheme": "HTTP"}
    container: Object = {
        "name": CONTAINER,
        "image": template.image,
        "command": [PROGRAM],
        "env": list(_environment(gateway, template)),
        "ports": [
            {"name": "hbone", "containerPort": ports.INBOUND_HBONE, "protocol": "TCP"},
            {"name": "metrics", "containerPort": ports.STATS, "protocol": "TCP"},
            {"name": "status-port", "containerPort": ports.READINESS, "protocol": "TCP"},
        ],
        "startupProbe": {"httpGet": ready, "initialDelaySeconds": 1, "periodSeconds": 1, "timeoutSeconds": 1, "failureThreshold": 30},
        "readinessProbe": {"httpGet": ready, "periodSeconds": 15, "timeoutSeconds": 1, "failureThreshold": 4},
        "resources": {"requests": {"cpu": "100m", "memory": "128Mi"}, "limits": {"cpu": "2", "memory": "1Gi"}},
        "securityContext": {
            "privileged": False,
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            {"name": "istiod-ca-cert", "mountPath": "/var/run/secrets/istio", "readOnly": True},
            {"name": "istio-token", "mountPath": "/var/run/secrets/tokens", "readOnly": True},
            {"name": "scratch", "mountPath": "/tmp"},
        ],
    }
    if template.pull_policy:
        container["imagePullPolicy"] = template.pull_policy
    return container


def _environment(gateway: KubeGateway, template: Template) -> Iterator[Object]:
    for name, path in _FIELDS.items():
        yield {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}
    told = {
        "GATEWAY_NAME": gateway.name,
        "TRUST_DOMAIN": template.trust_domain,
        "CLUSTER_ID": template.cluster_id,
        "XDS_ADDRESS": template.discovery,
        "CA_ADDRESS": template.discovery,
        "XDS_ROOT_CA": "/var/run/secrets/istio/root-cert.pem",
        "CA_ROOT_CA": "/var/run/secrets/istio/root-cert.pem",
        "AUTH_TOKEN": "/var/run/secrets/tokens/istio-token",
        "TERMINATION_DRAIN_DURATION_SECONDS": str(DRAIN_SECONDS),
        **({"ISTIO_META_NETWORK": template.network} if template.network else {}),
        **template.environment,
    }
    for name, value in told.items():
        yield {"name": name, "value": value}


_FIELDS: Final[Mapping[str, str]] = {
    "POD_NAME": "metadata.name",
    "POD_NAMESPACE": "metadata.namespace",
    "INSTANCE_IP": "status.podIP",
    "SERVICE_ACCOUNT": "spec.serviceAccountName",
    "NODE_NAME": "spec.nodeName",
}


def _make_service(gateway: KubeGateway, template: Template) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(gateway, template, deployed_name(gateway), {TRAFFIC_DISTRIBUTION: "PreferClose"}),
        "spec": {
            "type": gateway.annotations.get(_SERVICE_TYPE, "ClusterIP"),
            "ipFamilyPolicy": "PreferDualStack",
            "selector": {GATEWAY_NAME: gateway.name},
            "ports": list(_service_ports(gateway.listeners)),
        },
    }


def _service_ports(listeners: tuple[Listener, ...]) -> Iterator[Object]:
    yield {"name": "status-port", "port": ports.READINESS, "protocol": "TCP", "appProtocol": "tcp"}
    seen = {ports.READINESS}
    for listener in listeners:
        if listener.port not in seen:
            seen.add(listener.port)
            protocol = listener.protocol.lower()
            name = listener.name.lower().replace(".", "-")[:63] or f"{protocol}-{listener.port}"
            yield {"name": name, "port": listener.port, "protocol": "TCP", "appProtocol": protocol}


def _make_autoscaler(gateway: KubeGateway, template: Template) -> Object:
    name = deployed_name(gateway)
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": _metadata(gateway, template, name),
        "spec": {"scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": name}, "maxReplicas": 1},
    }


def _make_disruption_budget(gateway: KubeGateway, template: Template) -> Object:
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": _metadata(gateway, template, deployed_name(gateway)),
        "spec": {"selector": {"matchLabels": {GATEWAY_NAME: gateway.name}}},
    }


OVERLAYS: Final = {
    "serviceAccount": (_make_service_account, True),
    "deployment": (_make_deployment, True),
    "service": (_make_service, True),
    "horizontalPodAutoscaler": (_make_autoscaler, False),
    "podDisruptionBudget": (_make_disruption_budget, False),
}
"""By the key of its overlay what makes the object, and whether it is made without one."""
_TIES: Final[Mapping[str, tuple[tuple[str, ...], ...]]] = {
    "serviceAccount": (),
    "deployment": (
        ("spec", "selector"),
        ("spec", "template", "metadata", "labels", GATEWAY_NAME),
        ("spec", "template", "metadata", "labels", GATEWAY_MANAGED),
        ("spec", "template", "spec", "serviceAccountName"),
    ),
    "service": (("spec", "selector"),),
    "horizontalPodAutoscaler": (("spec", "scaleTargetRef"),),
    "podDisruptionBudget": (("spec", "selector"),),
}
"""What makes it work at all."""


# Where there is nothing that makes pods of a Deployment


MOST_PODS: Final = 16


def make_pods(deployment: Object) -> tuple[Object, ...]:
    """The pods that it asks for, numbered from 0. Raises BadParameters."""
    spec = deployment["spec"]
    replicas = spec.get("replicas", 1)
    if not isinstance(replicas, int) or not 0 <= replicas <= MOST_PODS:
        raise BadParameters(f"deployment: spec.replicas: expected a number from 0 to {MOST_PODS}, found {replicas}")
    found: list[Object] = []
    for number in range(replicas):
        pod = copy.deepcopy(spec["template"])
        name = f"{deployment['metadata']['name']}-{number}"
        metadata = {**pod["metadata"], "name": name, "namespace": deployment["metadata"]["namespace"]}
        found.append({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pod["spec"]})
    return tuple(found)

"""What is kept of an object from the API server: what somebody here reads. A pod shrinks from some 10 KB of JSON to 1 KB.

Less kept is also less noticed: a node's heartbeat or a pod's probe that changes nothing we know is no change.
"""

from __future__ import annotations

from collections.abc import Mapping
from sys import intern
from typing import Final

from mesh.model.labels import OWN_DOMAIN

_METADATA: Final = ("name", "namespace", "uid", "generateName", "creationTimestamp", "deletionTimestamp")
_OWNER: Final = ("kind", "name", "uid", "controller")
_POD_SPEC: Final = ("nodeName", "serviceAccountName", "serviceAccount", "hostNetwork", "hostname", "subdomain")
_CONTAINER: Final = ("name", "ports", "restartPolicy")
_POD_STATUS: Final = ("phase", "podIP", "podIPs")
_CONDITION: Final = ("type", "status")
_OURS: Final = ("istio.io/", OWN_DOMAIN)
"""Annotations of these domains (and their subdomains) are kept; what others write there is long and changes often."""
_WITHOUT_SPEC: Final = frozenset({"Namespace", "Node", "ServiceAccount"})
_ROUTES: Final = frozenset({"HTTPRoute", "GRPCRoute", "TCPRoute", "TLSRoute", "VirtualService"})
_RULES: Final = frozenset({"AuthorizationPolicy", "RequestAuthentication", "DestinationRule", "BackendTLSPolicy"})
_WITH_STATUS: Final = frozenset({"ServiceEntry", "WorkloadEntry", "Gateway", "GatewayClass"}) | _ROUTES | _RULES
_TEXTS: Final[Mapping[str, frozenset[str]]] = {
    "ConfigMap": frozenset({"ca.crt", "mesh", "deployment", "service", "serviceAccount", "horizontalPodAutoscaler", "podDisruptionBudget"}),
    "Secret": frozenset({"tls.crt", "tls.key", "ca.crt", "ca.crl", "cert", "key", "cacert", "crl"}),
}
"""The keys of ``data`` that are kept: what else is in there, of other programs, can be long and is nobody's business here."""

_TOKEN: Final = "kubernetes.io/service-account-token"
"""The type of Secrets whose ``ca.crt`` is the API server's."""


def prune(kind: str, raw: Mapping[str, object]) -> dict[str, object]:
    """A new object; what has not the expected type is kept as it is, for the check of its kind to complain about."""
    kept: dict[str, object] = {"metadata": _prune_metadata(kind, raw.get("metadata"))}
    if kind == "Pod":
        kept["spec"] = _prune_pod_spec(raw.get("spec"))
        kept["status"] = _prune_pod_status(raw.get("status"))
        return kept
    if kind in _TEXTS:
        return _prune_texts(kept, raw, _TEXTS[kind])
    status = raw.get("status")
    if kind == "Service" and isinstance(status, Mapping) and "conditions" in status:
        kept["status"] = {"conditions": status["conditions"]}
    spec = raw.get("spec")
    if kind == "Node" and isinstance(spec, Mapping) and spec.get("taints"):
        kept["spec"] = {"taints": spec["taints"]}
    if kind not in _WITHOUT_SPEC:
        dropped = {"apiVersion", "kind", "metadata"} if kind in _WITH_STATUS else {"apiVersion", "kind", "metadata", "status"}
        kept |= {key: value for key, value in raw.items() if key not in dropped}
    return kept


def _prune_texts(kept: dict[str, object], raw: Mapping[str, object], keys: frozenset[str]) -> dict[str, object]:
    data = raw.get("data")
    if data is not None and raw.get("type") != _TOKEN:
        kept["data"] = {key: data[key] for key in data if key in keys} if isinstance(data, Mapping) else data
    return kept


def _prune_metadata(kind: str, metadata: object) -> object:
    if not isinstance(metadata, Mapping):
        return metadata
    kept = _pick(metadata, _METADATA)
    if kind in _WITH_STATUS and "generation" in metadata:
        kept["generation"] = metadata["generation"]
    if "labels" in metadata:
        kept["labels"] = _intern(metadata["labels"])
    annotations = metadata.get("annotations")
    if isinstance(annotations, Mapping):
        ours = {key: value for key, value in annotations.items() if any(domain in key for domain in _OURS)}
        if ours:
            kept["annotations"] = _intern(ours)
    owners = metadata.get("ownerReferences")
    if kind == "Pod" and isinstance(owners, list):
        kept["ownerReferences"] = [_pick(owner, _OWNER) if isinstance(owner, Mapping) else owner for owner in owners]
    return kept


def _prune_pod_spec(spec: object) -> object:
    if not isinstance(spec, Mapping):
        return spec
    kept = _pick(spec, _POD_SPEC)
    for key in ("containers", "initContainers"):
        containers = spec.get(key)
        if isinstance(containers, list):
            kept[key] = [_pick(container, _CONTAINER) if isinstance(container, Mapping) else container for container in containers]
    return kept


def _prune_pod_status(status: object) -> object:
    if not isinstance(status, Mapping):
        return status
    kept = _pick(status, _POD_STATUS)
    conditions = status.get("conditions")
    if isinstance(conditions, list):
        kept["conditions"] = [
            _pick(condition, _CONDITION) for condition in conditions if isinstance(condition, Mapping) and condition.get("type") == "Ready"
        ]
    return kept


def _pick(source: Mapping[str, object], keys: tuple[str, ...]) -> dict[str, object]:
    return {key: _intern_one(source[key]) for key in keys if key in source}


def _intern(texts: object) -> object:
    """The same labels and names stand on thousands of objects; one copy of each will do."""
    if not isinstance(texts, Mapping):
        return texts
    return {intern(key) if type(key) is str else key: _intern_one(value) for key, value in texts.items()}


def _intern_one(value: object) -> object:
    return intern(value) if type(value) is str and len(value) < 64 else value

"""Whether a pod belongs to the mesh, by Istio's precedence of labels. Pure; the reason comes with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mesh.model.labels import DATAPLANE_MODE, SIDECAR_STATUS

EXCLUDED_NAMESPACES = frozenset({"kube-system"})


@dataclass(frozen=True, slots=True)
class Enrolment:
    enrolled: bool
    because: str

    def __bool__(self) -> bool:
        return self.enrolled


def decide_enrolment(
    *,
    namespace: str,
    namespace_labels: Mapping[str, str],
    pod_labels: Mapping[str, str],
    pod_annotations: Mapping[str, str],
    host_network: bool,
    phase: str,
    excluded_namespaces: frozenset[str] = EXCLUDED_NAMESPACES,
) -> Enrolment:
    """Istio's order: hard exclusions first, then the pod's label, then its namespace's."""
    if host_network:
        return Enrolment(False, "the pod is on the host's network")
    if SIDECAR_STATUS in pod_annotations:
        return Enrolment(False, "the pod has a sidecar")
    if namespace in excluded_namespaces:
        return Enrolment(False, f"namespace {namespace} is excluded")
    if phase in ("Succeeded", "Failed"):
        return Enrolment(False, f"the pod is {phase}")
    pod_mode = pod_labels.get(DATAPLANE_MODE)
    if pod_mode == "ambient":
        return Enrolment(True, f"pod label {DATAPLANE_MODE}=ambient")
    if pod_mode == "none":
        return Enrolment(False, f"pod label {DATAPLANE_MODE}=none")
    namespace_mode = namespace_labels.get(DATAPLANE_MODE)
    if namespace_mode == "ambient":
        return Enrolment(True, f"namespace label {DATAPLANE_MODE}=ambient")
    return Enrolment(False, _why_outside(pod_mode, namespace_mode))


def _why_outside(pod_mode: str | None, namespace_mode: str | None) -> str:
    """A mode that is misspelt is no mode, and whoever wrote it must be able to see that."""
    for kind, mode in (("pod", pod_mode), ("namespace", namespace_mode)):
        if mode == "none":
            return f"{kind} label {DATAPLANE_MODE}=none"
        if mode is not None:
            return f"{kind} label {DATAPLANE_MODE}={mode} is neither ambient nor none"
    return f"neither pod nor namespace is labelled {DATAPLANE_MODE}=ambient"

"""Which label decides whether a pod belongs to the mesh, and what its owner is told."""

from __future__ import annotations

import pytest

from mesh.model.enrolment import decide_enrolment
from mesh.model.labels import DATAPLANE_MODE

NOBODY = f"neither pod nor namespace is labelled {DATAPLANE_MODE}=ambient"


@pytest.mark.parametrize(
    ("pod", "namespace", "enrolled", "because"),
    [
        (None, None, False, NOBODY),
        (None, "ambient", True, f"namespace label {DATAPLANE_MODE}=ambient"),
        (None, "none", False, f"namespace label {DATAPLANE_MODE}=none"),
        (None, "ambiant", False, f"namespace label {DATAPLANE_MODE}=ambiant is neither ambient nor none"),
        (None, "", False, f"namespace label {DATAPLANE_MODE}= is neither ambient nor none"),
        ("none", "ambient", False, f"pod label {DATAPLANE_MODE}=none"),
        ("ambient", "none", True, f"pod label {DATAPLANE_MODE}=ambient"),
        ("Ambient", None, False, f"pod label {DATAPLANE_MODE}=Ambient is neither ambient nor none"),
        ("off", "ambient", True, f"namespace label {DATAPLANE_MODE}=ambient"),
    ],
)
def test_the_pods_mode_counts_before_its_namespaces_and_a_misspelt_one_is_named(
    pod: str | None, namespace: str | None, enrolled: bool, because: str
) -> None:
    decision = decide_enrolment(
        namespace="shop",
        namespace_labels={} if namespace is None else {DATAPLANE_MODE: namespace},
        pod_labels={} if pod is None else {DATAPLANE_MODE: pod},
        pod_annotations={},
        host_network=False,
        phase="Running",
    )
    assert (decision.enrolled, decision.because) == (enrolled, because)

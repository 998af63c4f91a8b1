"""The `baggage` header: which workload speaks, for the other side's telemetry (W3C Baggage, with ztunnel's keys).

It is a claim of the peer, not an identity: nothing may be allowed or denied by it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from mesh.model.workload import Workload, WorkloadType

# A legitimate one has 7 members; what comes after these is not looked at.
MAX_MEMBERS: Final = 64

_WORKLOAD_KEYS: Final = {f"k8s.{kind.name.lower()}.name": kind for kind in WorkloadType}
_KEY_OF: Final = {kind: key for key, kind in _WORKLOAD_KEYS.items()}
_FIELDS: Final = {
    "k8s.cluster.name": "cluster",
    "k8s.namespace.name": "namespace",
    "service.name": "service_name",
    "service.version": "service_version",
    "cloud.region": "region",
    "cloud.availability_zone": "zone",
}
# What would begin another member or break the header. No Kubernetes name or label holds any of it; a foreign control plane might.
_UNWRITABLE: Final = re.compile(r'[\x00-\x20\x7f",;\\]')


@dataclass(frozen=True, slots=True)
class Baggage:
    """What a peer says of its workload; ``""`` is unknown."""

    cluster: str = ""
    namespace: str = ""
    workload_type: WorkloadType | None = None
    workload_name: str = ""
    service_name: str = ""
    service_version: str = ""
    region: str = ""
    zone: str = ""


def baggage_of(workload: Workload) -> str:
    """What we say of a workload of ours, in ztunnel's order. Empty fields are left out; the whole may be empty and is sent all the same."""
    members = (
        ("k8s.cluster.name", workload.cluster_id),
        ("k8s.namespace.name", workload.namespace),
        (_KEY_OF[workload.workload_type], workload.workload_name),
        ("service.name", workload.canonical_name),
        ("service.version", workload.canonical_revision),
        ("cloud.region", workload.locality.region),
        ("cloud.availability_zone", workload.locality.zone),
    )
    return ",".join([f"{key}={value}" for key, value in members if value and not _UNWRITABLE.search(value)])


def parse_baggage(value: str) -> Baggage:
    """Read a value (repeated headers joined by commas). Never fails: unknown and malformed members are passed over, the last one wins."""
    fields: dict[str, str] = {}
    workload_type: WorkloadType | None = None
    for member in value.split(",", MAX_MEMBERS)[:MAX_MEMBERS]:
        key, equals, text = member.partition("=")
        if not equals:
            continue
        key, text = key.strip(), text.strip()
        if key in _FIELDS:
            fields[_FIELDS[key]] = text
        elif key in _WORKLOAD_KEYS:
            workload_type, fields["workload_name"] = _WORKLOAD_KEYS[key], text
    return Baggage(workload_type=workload_type, **fields)

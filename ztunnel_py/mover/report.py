"""What a mover tells of its living connections. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from mesh.model.workload import Workload
from mesh.runtime.inspection import LivingConnection
from ztunnel_py.mover.ledger import Living


def describe_living(living: Iterable[Living], now: float, most: int) -> tuple[list[LivingConnection], int]:
    """At most ``most`` of them, and how many were left out. ``now`` is the clock they started by."""
    rest = iter(living)
    told = [_describe(connection, now) for connection in islice(rest, most)]
    return told, sum(1 for _ in rest)


def _describe(living: Living, now: float) -> LivingConnection:
    to_server, to_client = living.counted
    outbound = living.direction == "outbound"
    verdict = living.verdict
    return LivingConnection(
        pod=living.pod,
        direction=living.direction,
        protocol=living.protocol,
        source=str(living.client),
        destination=str(living.destination),
        service=living.service.hostname if living.service is not None else "",
        authority=living.authority,
        source_workload=_name(living.source),
        destination_workload=_name(living.target),
        source_identity=str(living.source_identity or ""),
        destination_identity=str(living.target_identity or ""),
        sent=to_server if outbound else to_client,
        received=to_client if outbound else to_server,
        age=round(now - living.started, 3),
        opening=living.relay is None,
        policy=verdict.policy or "" if verdict is not None else "",
        rule=verdict.rule if verdict is not None else None,
        because=verdict.because if verdict is not None else living.because,
    )


def _name(workload: Workload | None) -> str:
    if workload is None:
        return ""
    name = workload.name or workload.canonical_name
    return f"{workload.namespace}/{name}" if workload.namespace else name

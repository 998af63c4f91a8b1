"""Injected faults: a delay, then perhaps an answer of ours instead of the application's (behaviour: Envoy's fault filter)."""

from __future__ import annotations

import random
from dataclasses import dataclass

from mesh.model.l7.routing import Fault
from waypoint_py.verdict import Flag, LocalReply

BODY = b"fault filter abort"


@dataclass(frozen=True, slots=True)
class Injection:
    """What happens to one request, in this order: it waits ``delay`` seconds (``DELAY_INJECTED`` in the log), then gets ``reply``."""

    delay: float
    reply: LocalReply | None


def draw_fault(fault: Fault, rng: random.Random, because: str = "") -> Injection | None:
    """None: this request is spared. Delay and abort are drawn by themselves, so both, either or none may hit."""
    delayed = fault.delay > 0 and _hits(fault.delay_percent, rng)
    aborts = (fault.status is not None or fault.grpc_status is not None) and _hits(fault.abort_percent, rng)
    if not delayed and not aborts:
        return None
    return Injection(fault.delay if delayed else 0.0, _abort(fault, delayed, because) if aborts else None)


def _abort(fault: Fault, delayed: bool, because: str) -> LocalReply:
    flags = (Flag.DELAY_INJECTED, Flag.FAULT_INJECTED) if delayed else (Flag.FAULT_INJECTED,)
    # A gRPC status travels with an HTTP status that says nothing.
    status = 200 if fault.status is None or fault.grpc_status is not None else fault.status
    because = f"{because}: injected fault" if because else "injected fault"
    return LocalReply(status, BODY, flags=flags, details="fault_filter_abort", because=because, grpc_status=fault.grpc_status)


def _hits(percent: float, rng: random.Random) -> bool:
    return percent > 0 and rng.random() * 100 < percent

"""What the status of a waypoint's Gateway says: whether we look after it, whether it works, and where it is reached (reference: Istio's
conversion of Gateways). Pure.

Addresses appear with the first pod that is ready and stay: what is bound to a waypoint must not go around it because the waypoint fails.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from istiod_py.translate.config import Condition
from mesh.kube.gatewayapi.gateway import GatewayAddress, KubeGateway, Listener
from mesh.kube.service import KubeService
from mesh.model import ports

ACCEPTED: Final = "Accepted"
PROGRAMMED: Final = "Programmed"
CLASS_ACCEPTED: Final = Condition(ACCEPTED, True, "Accepted", "Handled by Istio controller")


@dataclass(frozen=True, slots=True)
class ListenerStatus:
    name: str
    conditions: tuple[Condition, ...]


@dataclass(frozen=True, slots=True)
class GatewayStatus:
    conditions: tuple[Condition, ...]
    addresses: tuple[GatewayAddress, ...]
    listeners: tuple[ListenerStatus, ...]


@dataclass(frozen=True, slots=True)
class Facts:
    """What is there of what was deployed. ``rejected``: why its parameters can't be used; ``trouble``: why it can't be deployed."""

    service: KubeService | None = None
    ready: bool = False
    """At least one of its pods."""
    rejected: str = ""
    trouble: str = ""


def takes_hbone(gateway: KubeGateway) -> bool:
    """Whether it has the listener that a waypoint is reached by."""
    return any(map(_is_right, gateway.listeners))


def describe_gateway(gateway: KubeGateway, hostname: str, facts: Facts) -> GatewayStatus:
    accepted = _judge_acceptance(gateway, facts)
    programmed = _judge_programming(hostname, facts) if accepted.status else _NOT_ACCEPTED
    listeners = tuple(_describe_listener(listener, programmed) for listener in gateway.listeners)
    return GatewayStatus((accepted, programmed), _choose_addresses(gateway, hostname, facts, programmed), listeners)


_NOT_ACCEPTED: Final = Condition(PROGRAMMED, False, "Invalid", "Resource not accepted")
_EXPECTED: Final = f'Expected a single listener on port {ports.INBOUND_HBONE} with protocol "HBONE"'


def _judge_acceptance(gateway: KubeGateway, facts: Facts) -> Condition:
    if facts.rejected:
        return Condition(ACCEPTED, False, "InvalidParameters", facts.rejected)
    if not takes_hbone(gateway):
        return Condition(ACCEPTED, False, "ListenersNotValid", _EXPECTED)
    return Condition(ACCEPTED, True, "Accepted", "Resource accepted")


def _judge_programming(hostname: str, facts: Facts) -> Condition:
    if facts.trouble:
        return Condition(PROGRAMMED, False, "Invalid", facts.trouble)
    failed = "Failed to assign to any requested addresses: "
    if facts.service is None:
        return Condition(PROGRAMMED, False, "AddressNotUsable", f'{failed}hostname "{hostname}" not found')
    if not facts.service.cluster_ips and not facts.service.headless:
        return Condition(PROGRAMMED, False, "AddressNotAssigned", f'{failed}address pending for hostname "{hostname}"')
    if not facts.ready:
        return Condition(PROGRAMMED, False, "AddressNotUsable", f'{failed}no instances found for hostname "{hostname}"')
    where = f"{hostname}:{ports.INBOUND_HBONE}"
    return Condition(PROGRAMMED, True, "Programmed", f"Resource programmed, assigned to service(s) {where}")


def _choose_addresses(gateway: KubeGateway, hostname: str, facts: Facts, programmed: Condition) -> tuple[GatewayAddress, ...]:
    """Those of the service, once it works; later too, as long as there is one."""
    if not programmed.status and not gateway.assigned:
        return ()
    ips: Sequence[object] = facts.service.cluster_ips if facts.service is not None else ()
    if not programmed.status and not ips:
        return gateway.assigned
    return (*(GatewayAddress("IPAddress", str(ip)) for ip in ips), GatewayAddress("Hostname", hostname))


def _is_right(listener: Listener) -> bool:
    return listener.protocol == "HBONE" and listener.port == ports.INBOUND_HBONE


def _describe_listener(listener: Listener, programmed: Condition) -> ListenerStatus:
    if not _is_right(listener):
        accepted = Condition(ACCEPTED, False, "UnsupportedProtocol", _EXPECTED)
        works = Condition(PROGRAMMED, False, "Invalid", _EXPECTED)
    else:
        accepted = Condition(ACCEPTED, True, "Accepted", "No errors found")
        works = (
            Condition(PROGRAMMED, True, "Programmed", "No errors found")
            if programmed.status
            else Condition(PROGRAMMED, False, "Pending", programmed.message)
        )
    conflicted = Condition("Conflicted", False, "NoConflicts", "No errors found")
    resolved = Condition("ResolvedRefs", True, "ResolvedRefs", "No errors found")
    return ListenerStatus(listener.name, (accepted, conflicted, works, resolved))

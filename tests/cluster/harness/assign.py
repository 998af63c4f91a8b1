"""Which address each part of a test cluster has. Pure.

A routed network, nothing bridged: the cluster's own namespace is the router and has the control plane in it; each node hangs on a wire of
its own, each pod on its node. Addresses repeat from cluster to cluster, since no cluster sees another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

CONTROL_PLANE: Final = ("172.30.0.1", "fd00:30::1")
GATEWAY_V6: Final = "fe80::1"
"""What a node knows its wire's other end by: neighbour discovery answers for addresses of the interface alone."""
API_PORT: Final = 6443
POD_RANGES: Final = ("10.244.0.0/16", "fd00:244::/48")
SERVICE_RANGES: Final = ("10.96.0.0/16", "fd00:96::/112")
API_SERVICE: Final = "10.96.0.1"
DNS_SERVICE: Final = "10.96.0.10"
DOMAIN: Final = "cluster.local"
MAX_NODES: Final = 16


@dataclass(frozen=True, slots=True)
class NodeAssignment:
    """Node ``number`` counts from 1. Addresses and pod ranges: IPv4 first, then IPv6 when the cluster has both."""

    number: int
    dual_stack: bool

    @property
    def name(self) -> str:
        return f"n{self.number}"

    @property
    def addresses(self) -> tuple[str, ...]:
        return (f"172.30.0.{10 + self.number}", f"fd00:30::{10 + self.number}")[: 1 + self.dual_stack]

    @property
    def pod_ranges(self) -> tuple[str, ...]:
        return (f"10.244.{self.number}.0/24", f"fd00:244:0:{self.number}::/64")[: 1 + self.dual_stack]


def assign_nodes(count: int, *, dual_stack: bool) -> tuple[NodeAssignment, ...]:
    return tuple(NodeAssignment(number, dual_stack) for number in range(1, count + 1))

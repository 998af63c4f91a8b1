"""Service addresses for whoever is outside the mesh: nftables rules of a node, as kube-proxy would write them. `plan_services` is pure."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Final

from mesh.linux.netns import run_in_netns
from mesh.linux.nft import (
    Chain,
    ChainType,
    Hook,
    HookPoint,
    Rule,
    Statement,
    Table,
    daddr,
    dnat_to_random,
    drop,
    jump,
    reject_with_tcp_reset,
    saddr,
    snat,
    tcp_dport,
    udp_dport,
)
from mesh.linux.nft_apply import replace_tables
from meshctl_py.lab.endpoints import VirtualPort
from meshctl_py.lab.network import building, inside

_TABLE: Final = "lab-services"
_DNAT: Final = -100
_SNAT: Final = 100
_FILTER: Final = 0


def plan_services(table: tuple[VirtualPort, ...], node: tuple[IPv4Address, IPv6Address]) -> Table:
    """Connections to a service address go to one of its endpoints, chosen at random; where there is none, they are refused at once.

    They are translated where they enter the node, from a pod or from the node itself. A pod that is sent to itself would see its own
    address as the sender and drop the packet: for it the node stands in as the sender.
    """
    open_ports = [port for port in table if port.targets]
    closed_ports = [port for port in table if not port.targets]
    translate = tuple(Rule((*_matches(port), dnat_to_random(port.targets)), port.service) for port in open_ports)
    refuse = tuple(Rule((*_matches(port), _refusal(port)), port.service) for port in closed_ports)
    return Table(
        _TABLE,
        (
            Chain("services", translate),
            Chain("nobody", refuse),
            Chain("prerouting", (Rule((jump("services"),)),), Hook(ChainType.NAT, HookPoint.PREROUTING, _DNAT)),
            Chain("output", (Rule((jump("services"),)),), Hook(ChainType.NAT, HookPoint.OUTPUT, _DNAT)),
            Chain("postrouting", tuple(_hairpins(open_ports, node)), Hook(ChainType.NAT, HookPoint.POSTROUTING, _SNAT)),
            Chain("forward-filter", (Rule((jump("nobody"),)),), Hook(ChainType.FILTER, HookPoint.FORWARD, _FILTER)),
            Chain("output-filter", (Rule((jump("nobody"),)),), Hook(ChainType.FILTER, HookPoint.OUTPUT, _FILTER)),
        ),
    )


def apply_services(netns: Path, planned: Table) -> None:
    """Make the node at ``netns`` have these rules, in one transaction. Blocks. Raises CannotBuild."""
    with building("service addresses"), inside(netns) as namespace:
        run_in_netns(namespace, lambda: replace_tables([planned]))


def _matches(port: VirtualPort) -> tuple[Statement, Statement]:
    number = port.address.port
    return daddr(port.address.ip), tcp_dport(number) if port.protocol == "TCP" else udp_dport(number)


def _refusal(port: VirtualPort) -> Statement:
    return reject_with_tcp_reset() if port.protocol == "TCP" else drop()


def _hairpins(open_ports: list[VirtualPort], node: tuple[IPv4Address, IPv6Address]) -> Iterator[Rule]:
    for ip in dict.fromkeys(target.ip for port in open_ports for target in port.targets):
        yield Rule((saddr(ip), daddr(ip), snat(node[0] if ip.version == 4 else node[1])), "a pod sent to itself")

"""What the node's own network namespace needs so that its kubelet reaches captured pods whatever is asked of peers.

A kubelet has no identity of the mesh, so under STRICT its probes would be refused. Its connections to captured pods therefore get a source
address that nobody else has, which the rules in the pods let pass. Only sockets of the node itself, of the kubelet's user, are meant:
what is forwarded, from pods or from outside, keeps its address and is judged as ever. The table is ours alone; the pods' addresses stand in
its sets, each with the pod's uid as comment, so that an address which another pod has by now is not taken away from it.

The functions enter the namespace in a thread of their own and block for some milliseconds; all are idempotent.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Collection, Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Final

from mesh.linux.nft import AddressSet, Chain, ChainType, Hook, HookPoint, Rule, Table, counter, daddr_in, l4proto, skuid, snat
from mesh.linux.nft_apply import change_sets, delete_tables, find_differences, read_sets, replace_tables
from mesh.model.address import IpAddress
from mesh.model.ports import PROBE_SOURCE_V4, PROBE_SOURCE_V6
from ztunnel_py.redirect.apply import attempt

HOST_TABLE: Final = "ambient-mesh-host"
_SRCNAT: Final = 100
_KUBELETS: Final = frozenset({"kubelet", "kubelite", "k3s", "k3s-server", "rke2"})
"""Names of processes that are, or contain, a node's kubelet."""
_SOURCES: Final = ((4, ip_address(PROBE_SOURCE_V4)), (6, ip_address(PROBE_SOURCE_V6)))


def plan_host(kubelet_user: int) -> Table:
    """The table, with its sets empty."""
    sets = {version: AddressSet(f"captured-v{version}", version) for version, _ in _SOURCES}
    rules = tuple(
        Rule((l4proto(socket.IPPROTO_TCP), skuid(kubelet_user), daddr_in(sets[version]), counter(), snat(source)), "probes of the kubelet")
        for version, source in _SOURCES
    )
    chain = Chain("postrouting", rules, Hook(ChainType.NAT, HookPoint.POSTROUTING, _SRCNAT))
    return Table(HOST_TABLE, (chain,), sets=tuple(sets.values()))


def admission(present: Mapping[IpAddress, str], uid: str, ips: Collection[IpAddress]) -> tuple[list[IpAddress], dict[IpAddress, str]]:
    """What to remove and what to add so that these addresses, and no others, are the pod's. Pure."""
    remove = [ip for ip, owner in present.items() if (owner == uid and ip not in ips) or (owner != uid and ip in ips)]
    return remove, {ip: uid for ip in ips if present.get(ip) != uid}


def find_kubelet_user(proc: Path) -> int:
    """The user that the node's kubelet runs as; root where none is seen."""
    with os.scandir(proc) as entries:
        for entry in entries:
            if entry.name.isdecimal():
                try:
                    if (proc / entry.name / "comm").read_text().strip() in _KUBELETS:
                        return (proc / entry.name).stat().st_uid
                except OSError:
                    continue  # it has ended
    return 0


def admit_probes(netns_fd: int, table: Table, uid: str, ips: Collection[IpAddress]) -> None:
    """Let the kubelet's connections to these addresses pass; the table is made, or mended, where needed. Raises CaptureFailed."""

    def inside() -> None:
        _mend(table)
        remove, add = admission(read_sets(table), uid, ips)
        if remove or add:
            change_sets(table, remove=remove, add=add)

    attempt(netns_fd, "let the kubelet's probes pass", inside)


def find_probe_differences(netns_fd: int, table: Table, uid: str, ips: Collection[IpAddress]) -> list[str]:
    """What is not as `admit_probes` left it, one sentence each. Raises CaptureFailed."""

    def inside() -> list[str]:
        found = find_differences((table,))
        if found:
            return [f"node: {difference}" for difference in found]
        present = read_sets(table)
        return [f"node: {ip} is not in table {table.name}" for ip in ips if present.get(ip) != uid]

    return attempt(netns_fd, "read the node's rules back", inside)


def refuse_probes(netns_fd: int, table: Table, uid: str) -> None:
    """Forget the pod's addresses, but none that belongs to another pod by now. Raises CaptureFailed."""
    keep_probes(netns_fd, table, lambda owner: owner != uid)


def keep_probes(netns_fd: int, table: Table, wanted: Callable[[str], bool]) -> None:
    """Forget the addresses of all pods whose uid is not wanted. Raises CaptureFailed."""

    def inside() -> None:
        if find_differences((table,)):
            return  # not there, or not ours any more: nothing is let pass by it
        remove = [ip for ip, owner in read_sets(table).items() if not wanted(owner)]
        if remove:
            change_sets(table, remove=remove)

    attempt(netns_fd, "forget addresses of pods", inside)


def remove_host_table(netns_fd: int) -> None:
    """As if there had never been a mesh. Raises CaptureFailed."""
    attempt(netns_fd, "remove the node's rules", lambda: delete_tables((HOST_TABLE,)))


def _mend(table: Table) -> None:
    """The table as planned, with the addresses that are in it."""
    differences = find_differences((table,))
    if not differences:
        return
    try:
        present = read_sets(table)
    except OSError:  # there is none, or not with these sets
        present = {}
    replace_tables((table,))
    change_sets(table, add=present)

"""Finding pods' network namespaces through /proc: a process whose cgroup names the pod and whose addresses are the pod's
(reference istio 1.5). Parsing is pure; `scan` reads /proc and blocks."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Final, NamedTuple

from mesh.model.address import IpAddress

_POD: Final = re.compile(
    r"[-_./:]pod([0-9a-fA-F]{8}[-_.:][0-9a-fA-F]{4}[-_.:][0-9a-fA-F]{4}[-_.:][0-9a-fA-F]{4}[-_.:][0-9a-fA-F]{12})(?=[-_./:]|\Z)"
)
_PUNCTUATION: Final = re.compile(r"[_.:]")
_HEX: Final = re.compile(r"[0-9a-f]{32}", re.ASCII)
_MAX_FILE: Final = 1 << 20


class Netns(NamedTuple):
    """Which network namespace: inode and device of its file."""

    inode: int
    device: int


class Found(NamedTuple):
    """A process in a pod's network namespace."""

    started: int
    """Field 22 of /proc/PID/stat: the oldest process is the sandbox, whose namespace is the pod's."""
    path: Path


def pod_of_cgroups(text: str) -> str | None:
    """The pod uid in /proc/PID/cgroup, of systemd's or cgroupfs' form; None for no pod, or where lines name different ones."""
    uids = {_PUNCTUATION.sub("-", match[1]).lower() for line in text.splitlines() for match in _POD.finditer(line.rpartition(":")[2])}
    return uids.pop() if len(uids) == 1 else None


def start_time(stat: str) -> int | None:
    """Field 22 of /proc/PID/stat. The name in the second field is the process' own choice: parentheses, spaces, digits."""
    fields = stat.rpartition(")")[2].split()
    return int(fields[19]) if len(fields) > 19 and fields[19].isdecimal() else None


def local_addresses(fib_trie: str, if_inet6: str) -> frozenset[IpAddress]:
    """The namespace's own addresses, from /proc/PID/net/fib_trie and if_inet6."""
    found: set[IpAddress] = set()
    address = ""
    for line in fib_trie.splitlines():
        text = line.strip()
        if text.startswith("|-- "):
            address = text[4:]
        elif text == "/32 host LOCAL":
            found.add(IPv4Address(address))
    found.update(IPv6Address(int(line[:32], 16)) for line in if_inet6.splitlines() if _HEX.match(line))
    return frozenset(found)


def scan(proc: Path, wanted: Mapping[str, tuple[IpAddress, ...]]) -> dict[str, Path]:
    """Path of the network namespace by pod uid, as far as there are processes; ``wanted``: pods' addresses by uid. Blocks."""
    host = _netns(proc / "1")
    if host is None:
        return {}
    found: dict[str, Found] = {}
    claimed: dict[Netns, str] = {}
    for process in _processes(proc):
        netns = _netns(process)
        uid = pod_of_cgroups(_read(process / "cgroup"))
        started = start_time(_read(process / "stat"))
        if netns is None or netns == host or uid is None or uid not in wanted or started is None or claimed.get(netns, uid) != uid:
            continue
        if uid in found and found[uid].started <= started:
            continue
        # Whoever runs under a pod's cgroup need not be in its network: a process of the host entered by exec, say.
        addresses = local_addresses(_read(process / "net" / "fib_trie"), _read(process / "net" / "if_inet6"))
        if addresses.isdisjoint(wanted[uid]):
            continue
        claimed[netns] = uid
        found[uid] = Found(started, process / "ns" / "net")
    return {uid: process.path for uid, process in found.items()}


def _processes(proc: Path) -> Iterator[Path]:
    with os.scandir(proc) as entries:
        yield from sorted(Path(entry.path) for entry in entries if entry.name.isdecimal())


def _netns(process: Path) -> Netns | None:
    try:
        found = (process / "ns" / "net").stat()
    except OSError:
        return None  # it has ended, or is none of our business
    return Netns(found.st_ino, found.st_dev)


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(_MAX_FILE).decode("utf-8", "replace")
    except OSError:
        return ""

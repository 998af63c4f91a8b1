"""Finding pods' network namespaces: through /proc, by a process whose cgroup names the pod and whose addresses are the pod's;
else by name, among those that the container runtime mounts in /var/run/netns, by the pod's addresses. Parsing is pure; the
scans read files, enter namespaces, and block."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Final, NamedTuple

from mesh.linux.netns import NotANetworkNamespace, netns_identity, open_netns, run_in_netns
from mesh.model.address import IpAddress

_POD: Final = re.compile(
    r"[-_./:]pod([0-9a-fA-F]{8}[-_.:][0-9a-fA-F]{4}[-_.:][0-9a-fA-F]{4}[-_.:][0-9a-fA-F]{4}[-_.:][0-9a-fA-F]{12})(?=[-_./:]|\Z)"
)
_PUNCTUATION: Final = re.compile(r"[_.:]")
_HEX: Final = re.compile(r"[0-9a-f]{32}", re.ASCII)
_MAX_FILE: Final = 1 << 20
_LOOPBACK: Final = frozenset({IPv4Address("127.0.0.1"), IPv6Address("::1")})


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


def scan_names(directory: Path, wanted: Mapping[str, tuple[IpAddress, ...]], host: Netns | None) -> dict[str, Path]:
    """Path of the network namespace by pod uid, of those whose addresses exactly one named namespace has, which is not ``host``. Blocks."""
    owners: dict[str, set[Path]] = {}
    for path in _named(directory):
        addresses = _addresses_in(path, host)
        for uid, ips in wanted.items():
            if not addresses.isdisjoint(ips):
                owners.setdefault(uid, set()).add(path)
    return {uid: paths.pop() for uid, paths in owners.items() if len(paths) == 1}


def here(path: str, *, proc: Path, names: Path) -> Path:
    """Where the agent sees a namespace that the container runtime names by a path of the node."""
    parts = Path(path).parts
    if parts[:4] == ("/", "var", "run", "netns") and len(parts) == 5:
        return names / parts[4]
    if parts[:3] == ("/", "run", "netns") and len(parts) == 4:
        return names / parts[3]
    if parts[:2] == ("/", "proc"):
        return proc.joinpath(*parts[2:])
    return Path(path)


def netns_at(path: Path) -> Netns | None:
    """Which namespace a path leads to; None for none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return Netns(found.st_ino, found.st_dev)


def _named(directory: Path) -> list[Path]:
    try:
        with os.scandir(directory) as entries:
            return sorted(Path(entry.path) for entry in entries)
    except OSError:
        return []  # not every container runtime has it


def _addresses_in(path: Path, host: Netns | None) -> frozenset[IpAddress]:
    try:
        netns = open_netns(path)
    except (OSError, NotANetworkNamespace):
        return frozenset()
    try:
        found = netns_identity(netns)
        if host is not None and tuple(found) == tuple(host):
            return frozenset()
        return run_in_netns(netns, _own_addresses)
    except OSError:
        return frozenset()
    finally:
        os.close(netns)


def _own_addresses() -> frozenset[IpAddress]:
    """Of the calling thread's namespace; /proc/self would be the main thread's."""
    own = Path("/proc/thread-self/net")
    return local_addresses(_read(own / "fib_trie"), _read(own / "if_inet6")) - _LOOPBACK


def _processes(proc: Path) -> Iterator[Path]:
    with os.scandir(proc) as entries:
        yield from sorted(Path(entry.path) for entry in entries if entry.name.isdecimal())


def _netns(process: Path) -> Netns | None:
    """None where it has ended, or is none of our business."""
    return netns_at(process / "ns" / "net")


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(_MAX_FILE).decode("utf-8", "replace")
    except OSError:
        return ""

"""The lab's wires: a router, nodes joined to it, pods joined to their nodes, all network namespaces of this process's mount namespace.

Everything is routed, nothing bridged: a node's only neighbour is the router, a pod's only neighbour its node, so whatever passes between
nodes passes the router, where it can be watched. Addresses are /32 and /128 with explicit routes, as Calico does it.
All functions block (netlink) and enter namespaces on threads of their own; call them from worker threads.
"""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import IPv6Address
from pathlib import Path

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from mesh.linux.netns import NotANetworkNamespace, create_named_netns, delete_named_netns, open_netns, run_in_netns
from mesh.linux.nft_apply import NftRefused
from mesh.model.address import IpAddress
from meshctl_py.lab.assign import CLUSTER_DNS, CONTROL_PLANE, ROUTER, NodeAssignment, PodAssignment

_NODAD = 0x02
"""IFA_F_NODAD: an address is usable at once, not after a second of duplicate address detection."""
_ONLINK = 0x04
"""RTNH_F_ONLINK: the gateway is this wire's other end, whatever the addresses say."""
_SCOPE_LINK = 253
_GATEWAY_V6 = IPv6Address("fe80::1")
_PERMANENT = 0x80
"""NUD_PERMANENT."""
_LAST_RESORT = 65535


class CannotBuild(Exception):
    """The kernel refused a part of the network; the text says which, and why."""


@contextmanager
def building(what: str) -> Iterator[None]:
    """Turns what netlink, mounts and sysctls raise into `CannotBuild`."""
    try:
        yield
    except (NetlinkError, OSError, NotANetworkNamespace, NftRefused) as exc:
        raise CannotBuild(f"{what}: {exc}") from exc


@dataclass(frozen=True, slots=True)
class Wires:
    """The directory of namespace handles, and what is in it."""

    directory: Path

    @property
    def control_plane(self) -> Path:
        return self.directory / "control-plane"

    def node(self, name: str) -> Path:
        return self.directory / f"node_{name}"

    def pod(self, pod: PodAssignment) -> Path:
        """A pod on the host's network has its node's namespace. ``_`` occurs in no name, so no two pods share a path."""
        if pod.spec.host_network:
            return self.node(pod.node)
        return self.directory / f"pod_{pod.spec.key.namespace}_{pod.spec.key.name}_{pod.uid[:8]}"


@building("router")
def build_router() -> None:
    """Make the calling process's own namespace the router. Raises CannotBuild, like all functions here."""
    _forward()
    with IPRoute() as ip:
        _raise_loopback(ip, (*ROUTER, *CLUSTER_DNS))


@building("control plane's namespace")
def add_control_plane(wires: Wires) -> None:
    """The namespace that the control plane runs in."""
    _join_to_router(wires.control_plane, "to-istiod", CONTROL_PLANE)


@building("node")
def add_node(wires: Wires, node: NodeAssignment) -> None:
    """A node: joined to the router, which sends it the node's ranges of pod addresses."""
    path = wires.node(node.name)
    _join_to_router(path, interface_name(node.name), node.ips)
    with inside(path) as namespace:
        run_in_netns(namespace, lambda: _become_node(node))
    with IPRoute() as ip:
        index = _index(interface_name(node.name))
        for network, via in zip(node.pod_ranges, node.ips, strict=True):
            ip.route("replace", dst=str(network), gateway=str(via), oif=index, flags=_ONLINK)


@building("node")
def remove_node(wires: Wires, name: str) -> None:
    """The namespace goes, and with it both ends of its veth."""
    _remove_link(interface_name(name))
    delete_named_netns(wires.node(name))


@building("pod")
def add_pod(wires: Wires, pod: PodAssignment, node: NodeAssignment) -> None:
    """A pod's namespace with ``eth0``, routed by its node; addresses beyond the node's ranges get routes of their own on the router."""
    if pod.spec.host_network:
        return
    create_named_netns(wires.directory, wires.pod(pod).name)
    with inside(wires.pod(pod)) as namespace, inside(wires.node(pod.node)) as node_namespace:
        wire = _Wire.between(pod.uid)
        run_in_netns(node_namespace, lambda: _wire_pod(pod, node, namespace, wire))
        run_in_netns(namespace, lambda: _become_pod(pod, node, wire))
    if foreign := _foreign(pod, node):
        index = _index(interface_name(node.name))
        with IPRoute() as ip:
            for address in foreign:
                via = node.ips[0] if address.version == 4 else node.ips[1]
                ip.route("replace", dst=_host(address), gateway=str(via), oif=index, flags=_ONLINK)


@building("pod")
def remove_pod(wires: Wires, pod: PodAssignment, node: NodeAssignment) -> None:
    """The pod's wire and namespace. Its processes must be gone already."""
    if pod.spec.host_network:
        return
    if wires.node(pod.node).exists():
        with inside(wires.node(pod.node)) as namespace:
            run_in_netns(namespace, lambda: _remove_link(_pod_interface(pod)))
    delete_named_netns(wires.pod(pod))
    with IPRoute() as ip:
        for address in _foreign(pod, node):
            try:
                ip.route("del", dst=_host(address))
            except NetlinkError:
                continue  # it went with the node


def interface_name(of: str) -> str:
    """The near end's name of a veth: ``to-n1``; longer names are cut, with a hash so that they stay different (15 bytes at most)."""
    name = f"to-{of}"
    return name if len(name) <= 15 else f"{name[:9]}-{hashlib.sha256(of.encode()).hexdigest()[:5]}"


def _pod_interface(pod: PodAssignment) -> str:
    return f"{pod.spec.key.name[:8]}-{hashlib.sha256(pod.uid.encode()).hexdigest()[:5]}"


def _foreign(pod: PodAssignment, node: NodeAssignment) -> tuple[IpAddress, ...]:
    return tuple(ip for ip in pod.ips if not any(ip in network for network in node.pod_ranges))


@contextmanager
def inside(path: Path) -> Iterator[int]:
    """A descriptor of the namespace bound at ``path``, for as long as the context lasts."""
    descriptor = open_netns(path)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@dataclass(frozen=True, slots=True)
class _Wire:
    """A veth whose ends know each other from the start: the first packet need not wait for an answer to who is there."""

    near: str
    far: str

    @classmethod
    def between(cls, what: str) -> _Wire:
        """Hardware addresses made from a name (locally administered: second bit of the first byte)."""
        digest = hashlib.sha256(what.encode()).hexdigest()
        octets = ":".join(digest[index : index + 2] for index in range(0, 10, 2))
        return cls(f"02:{octets}", f"06:{octets}")

    def lay(self, ip: IPRoute, interface: str, namespace: int) -> int:
        """Make it: ``interface`` here, ``eth0`` there. The index of the near end."""
        peer = {"ifname": "eth0", "net_ns_fd": namespace, "address": self.far}
        ip.link("add", ifname=interface, kind="veth", address=self.near, peer=peer)
        return _index(interface)

    def introduce_near(self, ip: IPRoute, index: int, address: IpAddress) -> None:
        """At the far end: this address is at the near end."""
        ip.neigh("replace", dst=str(address), lladdr=self.near, ifindex=index, state=_PERMANENT)

    def introduce_far(self, ip: IPRoute, index: int, address: IpAddress) -> None:
        """At the near end: this address is at the far end."""
        ip.neigh("replace", dst=str(address), lladdr=self.far, ifindex=index, state=_PERMANENT)


def _join_to_router(path: Path, interface: str, ips: tuple[IpAddress, ...]) -> None:
    create_named_netns(path.parent, path.name)
    with inside(path) as namespace:
        wire = _Wire.between(interface)
        with IPRoute() as ip:
            index = wire.lay(ip, interface, namespace)
            ip.link("set", index=index, state="up")
            for address in ROUTER:
                _add_address(ip, index, address)
        run_in_netns(namespace, lambda: _become_leaf(ips, wire))
        with IPRoute() as ip:
            for address in ips:
                ip.route("replace", dst=_host(address), oif=index)
                wire.introduce_far(ip, index, address)


def _become_leaf(ips: tuple[IpAddress, ...], wire: _Wire) -> None:
    """Inside a namespace that hangs on the router by ``eth0``."""
    _quiet()
    with IPRoute() as ip:
        _raise_loopback(ip, ())
        index = _index("eth0")
        for address in ips:
            _add_address(ip, index, address)
        ip.link("set", index=index, state="up")
        for gateway in ROUTER:
            wire.introduce_near(ip, index, gateway)
            ip.route("replace", dst="default" if gateway.version == 4 else "::/0", gateway=str(gateway), oif=index, flags=_ONLINK)


def _become_node(node: NodeAssignment) -> None:
    _forward()
    with IPRoute() as ip:
        # The pods' gateway; on the loopback, because a node has one and many wires to pods.
        _add_address(ip, _index("lo"), node.pod_ranges[0][1])
        for network in node.pod_ranges:
            # An address that no pod has goes nowhere, instead of back and forth between router and node.
            ip.route("replace", dst=str(network), type="unreachable", priority=_LAST_RESORT)


def _wire_pod(pod: PodAssignment, node: NodeAssignment, namespace: int, wire: _Wire) -> None:
    with IPRoute() as ip:
        index = wire.lay(ip, _pod_interface(pod), namespace)
        ip.addr("add", index=index, address=str(_GATEWAY_V6), prefixlen=64, flags=_NODAD)
        ip.link("set", index=index, state="up")
        for address in pod.ips:
            ip.route("replace", dst=_host(address), oif=index, prefsrc=str(node.ips[0] if address.version == 4 else node.ips[1]))
            wire.introduce_far(ip, index, address)


def _become_pod(pod: PodAssignment, node: NodeAssignment, wire: _Wire) -> None:
    _quiet()
    # A container may listen on port 80 whatever user it runs as, as under Kubernetes' runtimes.
    _sysctl("net/ipv4/ip_unprivileged_port_start", "0")
    with IPRoute() as ip:
        _raise_loopback(ip, ())
        index = _index("eth0")
        for address in pod.ips:
            _add_address(ip, index, address)
        ip.link("set", index=index, state="up")
        if any(address.version == 4 for address in pod.ips):
            gateway = node.pod_ranges[0][1]
            ip.route("replace", dst=_host(gateway), oif=index, scope=_SCOPE_LINK)
            ip.route("replace", dst="default", gateway=str(gateway), oif=index)
            wire.introduce_near(ip, index, gateway)
        if any(address.version == 6 for address in pod.ips):
            ip.route("replace", dst="::/0", gateway=str(_GATEWAY_V6), oif=index)
            wire.introduce_near(ip, index, _GATEWAY_V6)


def _raise_loopback(ip: IPRoute, addresses: tuple[IpAddress, ...]) -> None:
    index = _index("lo")
    ip.link("set", index=index, state="up")
    for address in addresses:
        _add_address(ip, index, address)


def _add_address(ip: IPRoute, index: int, address: IpAddress) -> None:
    ip.addr(
        "add", index=index, address=str(address), prefixlen=address.max_prefixlen, **({} if address.version == 4 else {"flags": _NODAD})
    )


def _remove_link(interface: str) -> None:
    with IPRoute() as ip:
        for index in ip.link_lookup(ifname=interface):
            ip.link("del", index=index)


def _index(interface: str) -> int:
    """In the calling thread's namespace, as everything here."""
    return socket.if_nametoindex(interface)


def _host(address: IpAddress) -> str:
    return f"{address}/{address.max_prefixlen}"


def _forward() -> None:
    _quiet()
    _sysctl("net/ipv4/ip_forward", "1")
    _sysctl("net/ipv6/conf/all/forwarding", "1")


def _quiet() -> None:
    """No address detection delays, no source address filter: answers may take another way than the question when traffic is redirected.
    No pacing: the host's congestion control may be BBR, whose timers cost twice what it costs to carry bytes through memory. Of those that
    do not pace, Reno is there on every Linux and free for every namespace; on wires that lose nothing it does what Cubic does.

    Interfaces that are there already keep what was the default when they were made, so each is told. While the detection of its link-local
    address lasts, an interface asks for no neighbours (RFC 4862 5.4), and what is forwarded over it is unreachable for three seconds.
    """
    _sysctl("net/ipv4/tcp_congestion_control", "reno")
    for scope in ("all", "default", *(name for _, name in socket.if_nameindex())):
        _sysctl(f"net/ipv4/conf/{scope}/rp_filter", "0")
        _sysctl(f"net/ipv6/conf/{scope}/accept_dad", "0")
        _sysctl(f"net/ipv6/conf/{scope}/accept_ra", "0")


def _sysctl(name: str, value: str) -> None:
    Path("/proc/sys", name).write_text(value)

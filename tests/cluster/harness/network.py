"""The cluster's wires, by `ip` of iproute2: a router, and a node on each wire."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.cluster.harness.assign import CONTROL_PLANE, GATEWAY_V6, NodeAssignment


class CannotWire(Exception):
    """`ip` refused; the text is its own."""


def build_router() -> None:
    """Make the calling process's network namespace the router. Raises CannotWire."""
    _forward()
    ipv4, ipv6 = CONTROL_PLANE
    _ip(["link set lo up", f"address add {ipv4}/32 dev lo", f"address add {ipv6}/128 dev lo"])


def wire_node(node: NodeAssignment, pid: int) -> None:
    """Join the network namespace of process ``pid`` to this one, which is the router. Raises CannotWire."""
    name = node.name
    _ip([f"link add {name} type veth peer name eth0 netns {pid}"])
    inside = ["link set lo up", "link set eth0 up", f"address add {node.addresses[0]}/32 dev eth0"]
    inside += [f"route add {CONTROL_PLANE[0]} dev eth0 scope link", f"route add default via {CONTROL_PLANE[0]} dev eth0"]
    outside = [f"link set {name} up", f"route add {node.addresses[0]} dev {name} scope link"]
    outside += [f"route add {node.pod_ranges[0]} via {node.addresses[0]} dev {name} onlink"]
    for address, pods in zip(node.addresses[1:], node.pod_ranges[1:], strict=True):
        inside += [f"address add {address}/128 dev eth0 nodad", f"route add default via {GATEWAY_V6} dev eth0"]
        outside += [f"address add {GATEWAY_V6}/64 dev {name} nodad", f"route add {address} dev {name}"]
        outside += [f"route add {pods} via {address} dev {name} onlink"]
    _ip(outside)
    namespace = f"/proc/{pid}/ns/net"
    _ip(inside, ("nsenter", f"--net={namespace}"))
    subprocess.run(["nsenter", f"--net={namespace}", "sysctl", "-qw", *_FORWARDING], check=True)


def unwire_node(node: NodeAssignment) -> None:
    """Forget the wire of a node that ended; its own end is gone, or the kernel is about to take it."""
    subprocess.run(["ip", "link", "delete", node.name], capture_output=True, check=False)


_FORWARDING = ("net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")


def _forward() -> None:
    for setting in _FORWARDING:
        name, _, value = setting.partition("=")
        Path("/proc/sys", *name.split(".")).write_text(value)


def _ip(lines: Sequence[str], entering: tuple[str, ...] = ()) -> None:
    done = subprocess.run([*entering, "ip", "-batch", "-"], input="\n".join(lines) + "\n", capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CannotWire(f"ip: {done.stderr.strip()}")

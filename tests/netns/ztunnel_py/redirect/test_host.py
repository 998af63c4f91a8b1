"""The kubelet's connections to captured pods come from the address that the pods let pass; nobody else's do."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path

import pytest

from mesh.linux.nft import render
from mesh.linux.nft_apply import list_tables, read_sets
from mesh.model.address import IpAddress, SocketAddress
from mesh.model.ports import PROBE_SOURCE_V4, PROBE_SOURCE_V6
from mesh.testing.netns import EchoServer, Netns, echoes, namespaces, wire
from ztunnel_py.redirect.host import (
    HOST_TABLE,
    admission,
    admit_probes,
    find_kubelet_user,
    find_probe_differences,
    keep_probes,
    plan_host,
    refuse_probes,
    remove_host_table,
)

pytestmark = [pytest.mark.netns, pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")]

POD, POD6 = ip_address("10.78.0.2"), ip_address("fd78::2")
OTHER = ip_address("10.78.1.2")
NODE, NODE6 = ip_address("10.78.0.1"), ip_address("fd78::1")
TABLE = plan_host(0)
PORT = 8080


@contextmanager
def node_with_pods() -> Iterator[tuple[Netns, Netns, Netns]]:
    """A node and two pods behind it, joined by it as by a primary plugin."""
    with namespaces("node", "pod", "other") as (node, pod, other):
        wire(pod, node, ("10.78.0.2/24", "fd78::2/64"), ("10.78.0.1/24", "fd78::1/64"))
        wire(other, node, ("10.78.1.2/24",), ("10.78.1.1/24",))
        node.output("sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
        yield node, pod, other


def came_from(server: EchoServer, client: Netns, target: IpAddress) -> IpAddress:
    before = len(server.clients)
    with client.connect(SocketAddress(target, PORT)) as sock:
        assert echoes(sock, b"probe")
    (address,) = server.clients[before:]
    return address.ip


def test_the_nodes_own_connections_to_captured_pods_and_no_others_come_from_the_probe_address() -> None:
    with node_with_pods() as (node, pod, other), EchoServer(pod.listen(PORT)) as server, EchoServer(other.listen(PORT)) as bystander:
        admit_probes(node.fd, TABLE, "uid-1", {POD, POD6})
        assert came_from(server, node, POD) == ip_address(PROBE_SOURCE_V4)
        assert came_from(server, node, POD6) == ip_address(PROBE_SOURCE_V6)
        assert came_from(server, other, POD) == OTHER, "what is forwarded keeps its address"
        assert came_from(bystander, node, OTHER) != ip_address(PROBE_SOURCE_V4), "not captured"
        refuse_probes(node.fd, TABLE, "uid-1")
        assert came_from(server, node, POD) == NODE
        assert came_from(server, node, POD6) == NODE6


def test_other_users_of_the_node_are_not_taken_for_the_kubelet() -> None:
    with node_with_pods() as (node, pod, _), EchoServer(pod.listen(PORT)) as server:
        admit_probes(node.fd, TABLE, "uid-1", {POD})
        say = f"import socket; s = socket.create_connection(('{POD}', {PORT}), 10); s.send(b'x'); s.recv(1)"
        node.run(lambda: subprocess.run(["python3", "-c", say], user=65534, check=True, timeout=15))
        assert [client.ip for client in server.clients] == [NODE]


def test_the_table_is_what_nft_reads_back() -> None:
    with namespaces("node") as (node,):
        admit_probes(node.fd, TABLE, "uid-1", ())
        assert node.output("nft", "--stateless", "list", "ruleset").split() == render((TABLE,)).split()
        admit_probes(node.fd, TABLE, "uid-1", {POD, POD6})
        assert f'{POD} comment "uid-1"' in node.output("nft", "list", "ruleset")
        assert f'{POD6} comment "uid-1"' in node.output("nft", "list", "ruleset")
        assert find_probe_differences(node.fd, TABLE, "uid-1", {POD, POD6}) == []


def elements(node: Netns) -> dict[IpAddress, str]:
    return node.run(lambda: read_sets(TABLE))


def test_an_address_that_another_pod_has_by_now_is_left_to_it() -> None:
    with namespaces("node") as (node,):
        admit_probes(node.fd, TABLE, "old", {POD, POD6})
        admit_probes(node.fd, TABLE, "new", {POD})
        refuse_probes(node.fd, TABLE, "old")
        assert elements(node) == {POD: "new"}
        admit_probes(node.fd, TABLE, "new", {OTHER})
        assert elements(node) == {OTHER: "new"}, "a pod's addresses are those it has now"


def test_pods_that_ended_while_nobody_looked_are_forgotten_and_the_others_kept() -> None:
    with namespaces("node") as (node,):
        keep_probes(node.fd, TABLE, lambda uid: False)
        assert node.run(list_tables) == []
        admit_probes(node.fd, TABLE, "gone", {POD, POD6})
        many = {ip_address(f"10.99.{number >> 8}.{number & 255}") for number in range(700)}  # more than one message holds
        admit_probes(node.fd, TABLE, "many", many)
        keep_probes(node.fd, TABLE, lambda uid: uid == "many")
        assert elements(node) == dict.fromkeys(many, "many")
        remove_host_table(node.fd)
        assert node.run(list_tables) == []
        remove_host_table(node.fd)


@pytest.mark.parametrize(
    "spoil",
    [
        ("nft", "flush", "ruleset"),
        ("nft", "flush", "chain", "inet", HOST_TABLE, "postrouting"),
        ("nft", "add", "rule", "inet", HOST_TABLE, "postrouting", "drop"),
    ],
)
def test_a_spoilt_table_is_noticed_and_mended_and_the_addresses_in_it_stay(spoil: tuple[str, ...]) -> None:
    with namespaces("node") as (node,):
        admit_probes(node.fd, TABLE, "uid-1", {POD})
        admit_probes(node.fd, TABLE, "uid-2", {OTHER})
        node.output(*spoil)
        assert find_probe_differences(node.fd, TABLE, "uid-1", {POD})
        admit_probes(node.fd, TABLE, "uid-1", {POD})
        assert find_probe_differences(node.fd, TABLE, "uid-1", {POD}) == []
        gone = spoil[2] == "ruleset"
        assert bool(find_probe_differences(node.fd, TABLE, "uid-2", {OTHER})) == gone, "its own check will find it"


def test_a_table_of_another_users_kubelet_is_replaced() -> None:
    with namespaces("node") as (node,):
        admit_probes(node.fd, TABLE, "uid-1", {POD})
        admit_probes(node.fd, plan_host(12), "uid-2", {OTHER})
        assert "skuid 12" in node.output("nft", "list", "ruleset")
        assert elements(node) == {POD: "uid-1", OTHER: "uid-2"}


def test_the_kubelet_is_known_by_its_name(tmp_path: Path) -> None:
    for pid, name in ((1, "systemd"), (7, "k3s-server")):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "comm").write_text(f"{name}\n")
    (tmp_path / "7" / "comm").parent.chmod(0o755)
    os.chown(tmp_path / "7", 123, 123)
    assert find_kubelet_user(tmp_path) == 123
    (tmp_path / "7" / "comm").write_text("other\n")
    assert find_kubelet_user(tmp_path) == 0


def test_admission_touches_nothing_that_is_as_wanted() -> None:
    assert admission({POD: "a", OTHER: "b"}, "a", {POD}) == ([], {})
    assert admission({POD: "a", OTHER: "b"}, "a", {OTHER}) == ([POD, OTHER], {OTHER: "a"})

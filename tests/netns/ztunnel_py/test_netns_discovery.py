"""Pods' network namespaces by name: told by their addresses, and only where there is no doubt."""

from __future__ import annotations

import os
from ipaddress import ip_address

import pytest

from mesh.testing.netns import namespaces, wire
from ztunnel_py.pods.netns_discovery import netns_at, scan_names

pytestmark = [pytest.mark.netns, pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")]

WEB, DATABASE = ip_address("10.79.0.2"), ip_address("fd79::2")


def test_namespaces_are_told_by_their_pods_addresses() -> None:
    with namespaces("node", "web", "database") as (node, web, database):
        wire(web, node, ("10.79.0.2/24",), ("10.79.0.1/24",))
        wire(database, node, ("fd79::2/64",), ("fd79::1/64",))
        (node.path.parent / "not-a-namespace").touch()
        wanted = {"web": (WEB,), "database": (ip_address("10.79.0.9"), DATABASE), "other": (ip_address("10.79.0.7"),)}
        assert scan_names(node.path.parent, wanted, None) == {"web": web.path, "database": database.path}


def test_the_nodes_own_namespace_and_loopback_are_no_pods() -> None:
    with namespaces("node", "web") as (node, web):
        wire(web, node, ("10.79.0.2/24",), ("10.79.0.1/24",))
        assert scan_names(node.path.parent, {"x": (ip_address("10.79.0.1"),)}, netns_at(node.path)) == {}
        assert scan_names(node.path.parent, {"x": (ip_address("127.0.0.1"),)}, None) == {}
        assert scan_names(node.path.parent / "nowhere", {"x": (WEB,)}, None) == {}


def test_an_address_in_two_namespaces_is_nobodys() -> None:
    with namespaces("node", "web", "old") as (node, web, old):
        wire(web, node, ("10.79.0.2/24",), ("10.79.0.1/24",))
        wire(old, node, ("10.79.0.2/24",), ("10.79.0.3/24",))
        assert scan_names(node.path.parent, {"web": (WEB,)}, None) == {}

"""Automatic addresses: what they are, and what happens when there are none left."""

from __future__ import annotations

from ipaddress import ip_network

from istiod_py.translate.vips import POOL_V4, POOL_V6, Wanting, allocate
from mesh.model.address import NamespacedHostname, parse_ip


def host(name: str) -> NamespacedHostname:
    return NamespacedHostname("shop", name)


def test_addresses_are_the_same_in_every_release() -> None:
    """Applications and DNS caches hold on to them across an upgrade."""
    assert allocate([Wanting(host("api.example.com"))], [])[host("api.example.com")] == (
        parse_ip("240.240.87.188"), parse_ip("2001:2:0:6134:34e4:ee72:73e4:d596"),
    )  # fmt: skip


def test_a_thousand_hosts_have_a_thousand_addresses_in_any_order() -> None:
    wanting = [Wanting(host(f"h{n}.example.com")) for n in range(1000)]
    found = allocate(wanting, [])
    assert len({ip for ips in found.values() for ip in ips}) == 2000
    assert all(v4 in POOL_V4 and v6 in POOL_V6 for v4, v6 in found.values())


def test_what_the_status_says_is_kept_and_the_other_family_is_added() -> None:
    kept = parse_ip("240.240.9.9")
    v4, v6 = allocate([Wanting(host("a.b"), (kept,))], [])[host("a.b")]
    assert v4 == kept
    assert v6 in POOL_V6


def test_of_two_that_say_they_have_an_address_the_first_has_it() -> None:
    ip = parse_ip("240.240.9.9")
    found = allocate([Wanting(host("a.b"), (ip,)), Wanting(host("c.d"), (ip,))], [])
    assert found[host("a.b")][0] == ip
    assert found[host("c.d")][0] != ip


def test_an_address_from_the_status_goes_before_one_that_hashing_would_give() -> None:
    (hashed, _) = allocate([Wanting(host("a.b"))], [])[host("a.b")]
    found = allocate([Wanting(host("a.b")), Wanting(host("c.d"), (hashed,))], [])
    assert found[host("c.d")][0] == hashed
    assert found[host("a.b")][0] != hashed


def test_a_pool_that_somebody_reserved_gives_nothing() -> None:
    assert allocate([Wanting(host("a.b"))], [ip_network("240.0.0.0/4"), ip_network("2001::/16")]) == {host("a.b"): ()}


def test_more_hosts_than_addresses_leave_the_last_without() -> None:
    wanting = [Wanting(host(f"h{n}.example.com")) for n in range(4)]
    reserved = [cidr for cidr in POOL_V4.subnets(new_prefix=30) if cidr != ip_network("240.240.7.8/30")]
    counts = [len([ip for ip in ips if ip.version == 4]) for ips in allocate([*wanting, Wanting(host("late.b"))], reserved).values()]
    assert counts == [1, 1, 1, 1, 0]

"""The indices as such: what goes in is found, what goes out leaves nothing behind."""

from __future__ import annotations

from dataclasses import dataclass

from msgspec.structs import replace

from mesh.model.address import parse_cidr, parse_ip
from mesh.model.service import CidrVip, Service
from mesh.state.index import CidrIndex, Index


@dataclass(frozen=True)
class Value:
    name: str
    keys: tuple[str, ...]


def index_by_keys() -> Index[str, Value]:
    return Index(lambda value: value.keys)


def test_values_are_found_by_each_of_their_keys() -> None:
    index = index_by_keys()
    a, b = Value("a", ("x", "y")), Value("b", ("y", "z"))
    index.replace(None, a)
    index.replace(None, b)
    assert index.find("x") == (a,)
    assert set(index.find("y")) == {a, b}
    assert index.find("z") == (b,)
    assert index.find("w") == ()
    assert len(index) == 3


def test_a_key_that_a_value_gives_twice_counts_once() -> None:
    index = index_by_keys()
    a = Value("a", ("x", "x"))
    index.replace(None, a)
    assert index.find("x") == (a,)
    index.replace(a, None)
    assert index.find("x") == ()


def test_what_is_replaced_leaves_no_key_behind() -> None:
    index = index_by_keys()
    values = [Value(str(number), ("shared", str(number))) for number in range(5)]
    for value in values:
        index.replace(None, value)
    moved = Value("moved", ("elsewhere",))
    index.replace(values[0], moved)
    assert set(index.find("shared")) == set(values[1:])
    assert index.find("0") == ()
    assert index.find("elsewhere") == (moved,)
    for value in [*values[1:], moved]:
        index.replace(value, None)
    assert len(index) == 0


def test_a_value_that_keeps_its_keys_takes_the_place_of_the_one_before() -> None:
    index = index_by_keys()
    a, b = Value("a", ("shared", "own")), Value("b", ("shared",))
    index.replace(None, a)
    index.replace(None, b)
    changed = Value("changed", ("shared", "own"))
    index.replace(a, changed)
    assert index.find("own") == (changed,)
    assert set(index.find("shared")) == {changed, b}
    index.replace(changed, None)
    index.replace(b, None)
    assert len(index) == 0


def test_equal_values_are_two() -> None:
    index = index_by_keys()
    one, other = Value("same", ("x",)), Value("same", ("x",))
    index.replace(None, one)
    index.replace(None, other)
    index.replace(one, None)
    (left,) = index.find("x")
    assert left is other


def service(name: str, *cidrs: str, network: str = "") -> Service:
    vips = tuple(CidrVip(network, parse_cidr(cidr)) for cidr in cidrs)
    return Service(name, "default", f"{name}.example", cidr_addresses=vips)


def found(index: CidrIndex, ip: str, network: str = "") -> list[tuple[int, str]]:
    return sorted((length, service.name) for length, service in index.find(network, parse_ip(ip)))


def test_every_range_around_an_address_is_found_with_its_length() -> None:
    index = CidrIndex()
    for wide_or_narrow in (service("wide", "10.0.0.0/8"), service("narrow", "10.1.0.0/16"), service("v6", "fd00::/8", "fd00::/64")):
        index.replace(None, wide_or_narrow)
    assert found(index, "10.1.2.3") == [(8, "wide"), (16, "narrow")]
    assert found(index, "10.2.0.0") == [(8, "wide")]
    assert found(index, "11.0.0.0") == []
    assert found(index, "fd00::1") == [(8, "v6"), (64, "v6")]
    assert found(index, "10.1.2.3", network="other") == []


def test_ranges_of_a_replaced_service_are_gone() -> None:
    index = CidrIndex()
    before = service("s", "10.0.0.0/8", "10.0.0.0/8", "192.0.2.0/24")
    index.replace(None, before)
    after = replace(before, cidr_addresses=(CidrVip("", parse_cidr("192.0.2.0/25")),))
    index.replace(before, after)
    assert found(index, "10.0.0.1") == []
    assert found(index, "192.0.2.1") == [(25, "s")]
    assert found(index, "192.0.2.200") == []
    index.replace(after, None)
    assert found(index, "192.0.2.1") == []

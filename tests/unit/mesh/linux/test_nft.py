"""Statements: their text, and the expressions that nft itself makes of that text (``nft --debug=netlink``)."""

from __future__ import annotations

import struct
from ipaddress import ip_address, ip_network

import pytest

from mesh.linux import nft
from mesh.linux.netlink import NetlinkError, attribute, parse_attributes
from mesh.linux.nft import Expression, Rule
from mesh.model.address import SocketAddress


def shown(expression: Expression) -> str:
    """``name type=hex ...``: one line a reader can check against linux/netfilter/nf_tables.h."""
    return " ".join([expression.name, *(f"{kind}={value.hex()}" for kind, value in expression.attributes)])


def lines(*statements: nft.Statement) -> list[str]:
    return [shown(expression) for expression in Rule(statements).expressions()]


ADDRESS_FAMILY_TEST = ["meta 2=0000000f 1=00000001", "cmp 1=00000001 2=00000000 3=0500010002000000"]
TCP_TEST = ["meta 2=00000010 1=00000001", "cmp 1=00000001 2=00000000 3=0500010006000000"]


def test_an_address_is_compared_after_its_family() -> None:
    # [ payload load 4b @ network header + 16 => reg 1 ] [ cmp neq reg 1 0x0100007f ]
    assert lines(nft.daddr(ip_address("127.0.0.1"), negate=True)) == [
        *ADDRESS_FAMILY_TEST,
        "payload 1=00000001 2=00000001 3=00000010 4=00000004",
        "cmp 1=00000001 2=00000001 3=080001007f000001",
    ]


def test_a_prefix_of_whole_bytes_loads_only_these() -> None:
    assert lines(nft.saddr(ip_network("10.0.0.0/8")))[2:] == [
        "payload 1=00000001 2=00000001 3=0000000c 4=00000001",
        "cmp 1=00000001 2=00000000 3=050001000a000000",
    ]


def test_another_prefix_is_masked() -> None:
    statement = nft.daddr(ip_network("10.9.0.0/19"))
    assert statement.text == "ip daddr 10.9.0.0/19"
    assert lines(statement)[3] == "bitwise 1=00000001 2=00000001 3=00000004 4=08000100ffffe000 5=0800010000000000"


def test_everything_is_a_prefix_too() -> None:
    statement = nft.daddr(ip_network("0.0.0.0/0"))
    assert lines(statement)[2:] == [
        "payload 1=00000001 2=00000001 3=00000010 4=00000004",
        "bitwise 1=00000001 2=00000001 3=00000004 4=0800010000000000 5=0800010000000000",
        "cmp 1=00000001 2=00000000 3=0800010000000000",
    ]


def test_the_protocol_is_tested_once_however_many_statements_need_it() -> None:
    made = lines(nft.l4proto(6), nft.tcp_dport(80), nft.tcp_flags(("syn",), ("syn", "ack")))
    assert made[:2] == TCP_TEST
    assert sum(line.startswith("meta 2=00000010") for line in made) == 1


def test_flags_are_masked_and_compared() -> None:
    # [ payload load 1b @ transport header + 13 => reg 1 ] [ bitwise reg 1 = ( reg 1 & 0x17 ) ^ 0 ] [ cmp eq reg 1 0x02 ]
    statement = nft.tcp_flags(("syn",), ("fin", "syn", "rst", "ack"))
    assert statement.text == "tcp flags syn / fin,syn,rst,ack"
    assert lines(statement) == [
        *TCP_TEST,
        "payload 1=00000001 2=00000002 3=0000000d 4=00000001",
        "bitwise 1=00000001 2=00000001 3=00000001 4=0500010017000000 5=0500010000000000",
        "cmp 1=00000001 2=00000000 3=0500010002000000",
    ]


def test_marks_are_in_the_machines_byte_order() -> None:
    value = struct.pack("=I", 0x539).hex()
    mask = struct.pack("=I", 0xFFF).hex()
    assert lines(nft.mark(0x539, 0xFFF, negate=True)) == [
        "meta 2=00000003 1=00000001",
        f"bitwise 1=00000001 2=00000001 3=00000004 4=08000100{mask} 5=0800010000000000",
        f"cmp 1=00000001 2=00000001 3=08000100{value}",
    ]


def test_setting_bits_of_the_connection_mark_keeps_the_others() -> None:
    keep, value = struct.pack("=I", 0xFFFFF000).hex(), struct.pack("=I", 0x111).hex()
    assert lines(nft.set_ct_mark(0x111, 0xFFF)) == [
        "ct 2=00000003 1=00000001",
        f"bitwise 1=00000001 2=00000001 3=00000004 4=08000100{keep} 5=08000100{value}",
        "ct 2=00000003 4=00000001",
    ]


def test_a_redirect_takes_its_port_from_a_register() -> None:
    assert lines(nft.redirect(15006)) == ["immediate 1=00000001 2=060001003a9e0000", "redir 1=00000001"]


def test_a_jump_names_its_chain() -> None:
    verdict = attribute(1, struct.pack("!i", -3)) + attribute(2, b"there\0")
    assert lines(nft.jump("there")) == [f"immediate 1=00000000 2={attribute(2, verdict).hex()}"]


def test_one_endpoint_needs_no_dice() -> None:
    endpoint = SocketAddress.parse("10.0.0.1:80")
    assert nft.dnat_to_random([endpoint]) == nft.dnat(endpoint)


def test_several_endpoints_are_chosen_from_a_map() -> None:
    statement = nft.dnat_to_random([SocketAddress.parse("10.0.0.1:80"), SocketAddress.parse("10.0.0.2:81")])
    assert statement.text == "dnat ip to numgen random mod 2 map { 0 : 10.0.0.1 . 80, 1 : 10.0.0.2 . 81 }"
    assert [shown(expression) for expression in statement.expressions] == [
        "numgen 1=00000001 2=00000002 3=00000001",
        f"lookup 1={nft.UNNAMED_MAP.hex()} 2=00000001 3=00000001",
        "nat 1=00000001 2=00000002 3=00000001 5=00000009",
    ]
    assert nft.choice_value(statement.choices[1]).hex() == "0a00000200510000"


@pytest.mark.parametrize("endpoints", [[], ["10.0.0.1:80", "[fd00::1]:80"]])
def test_endpoints_of_no_or_of_two_families_are_refused(endpoints: list[str]) -> None:
    with pytest.raises(ValueError, match="all of one address family"):
        nft.dnat_to_random([SocketAddress.parse(text) for text in endpoints])


def test_an_impossible_interface_name_is_refused() -> None:
    with pytest.raises(ValueError, match="not an interface name"):
        nft.iifname("sixteen-bytes-xx")


def test_attributes_survive_the_way_there_and_back() -> None:
    pairs = [(1, b"a"), (3, b""), (2, b"12345")]
    assert parse_attributes(b"".join(attribute(kind, value) for kind, value in pairs)) == pairs


@pytest.mark.parametrize("data", [b"\x03\x00\x01\x00", b"\x09\x00\x01\x00abcd"])
def test_attributes_of_impossible_length_are_an_error(data: bytes) -> None:
    with pytest.raises(NetlinkError):
        parse_attributes(data)


def test_the_source_port_is_the_first_of_the_transport_header() -> None:
    # [ payload load 2b @ transport header + 0 => reg 1 ] [ cmp eq reg 1 0x00003500 ]
    statement = nft.udp_sport(53)
    assert statement.text == "udp sport 53"
    assert lines(statement)[2:] == [
        "payload 1=00000001 2=00000002 3=00000000 4=00000002",
        "cmp 1=00000001 2=00000000 3=0600010000350000",
    ]


def test_a_zone_is_a_short_number_in_the_machines_byte_order() -> None:
    # [ immediate reg 1 0x00000001 ] [ ct set zone with reg 1 ]
    statement = nft.set_ct_zone(1)
    assert statement.text == "ct zone set 1"
    assert lines(statement) == [
        f"immediate 1=00000001 2=06000100{struct.pack('=H', 1).hex()}0000",
        "ct 2=00000011 4=00000001",
    ]


def test_a_zone_of_one_direction_names_the_direction() -> None:
    # [ immediate reg 1 0x00000002 ] [ ct set zone with reg 1 , dir original ]
    statement = nft.set_ct_original_zone(2)
    assert statement.text == "ct original zone set 2"
    assert lines(statement) == [
        f"immediate 1=00000001 2=06000100{struct.pack('=H', 2).hex()}0000",
        "ct 2=00000011 3=00 4=00000001",
    ]

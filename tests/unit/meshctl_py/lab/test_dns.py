"""The cluster's DNS answers."""

from __future__ import annotations

import struct
from ipaddress import ip_address

import dns.flags
import dns.message
import dns.opcode
import dns.rcode
import dns.rdatatype
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshctl_py.lab.dns import answer

ZONE = {
    "web.shop.svc.cluster.local": (ip_address("10.96.1.1"), ip_address("fd00:10:96::101")),
    "old.shop.svc.cluster.local": (ip_address("10.96.1.2"),),
    "many.shop.svc.cluster.local": tuple(ip_address(f"10.244.1.{number}") for number in range(2, 202)),
}


def ask(name: str, kind: str, *, over_tcp: bool = False) -> dns.message.Message:
    response = answer(dns.message.make_query(name, kind).to_wire(), ZONE, over_tcp=over_tcp)
    assert response is not None
    return dns.message.from_wire(response)


def texts(response: dns.message.Message) -> list[str]:
    return sorted(str(record) for rrset in response.answer for record in rrset)


@pytest.mark.parametrize(("kind", "addresses"), [("A", ["10.96.1.1"]), ("AAAA", ["fd00:10:96::101"])])
def test_a_service_has_an_address_of_each_family(kind: str, addresses: list[str]) -> None:
    response = ask("web.shop.svc.cluster.local.", kind)
    assert texts(response) == addresses
    assert response.flags & dns.flags.AA


def test_case_does_not_matter_and_comes_back_as_it_was_asked() -> None:
    response = ask("WEB.Shop.svc.cluster.local.", "A")
    assert texts(response) == ["10.96.1.1"]
    assert str(response.answer[0].name) == "WEB.Shop.svc.cluster.local."


def test_a_family_that_a_service_lacks_is_no_record_rather_than_no_name() -> None:
    response = ask("old.shop.svc.cluster.local.", "AAAA")
    assert response.rcode() == dns.rcode.NOERROR
    assert response.answer == []
    assert response.authority[0].rdtype == dns.rdatatype.SOA


@pytest.mark.parametrize("name", ["nobody.shop.svc.cluster.local.", "example.com.", "web.shop.", "."])
def test_everything_else_does_not_exist(name: str) -> None:
    response = ask(name, "A")
    assert (response.rcode(), response.answer) == (dns.rcode.NXDOMAIN if name != "." else response.rcode(), [])


@pytest.mark.parametrize("name", ["shop.svc.cluster.local.", "svc.cluster.local.", "cluster.local."])
def test_a_name_above_a_service_exists_without_records(name: str) -> None:
    assert ask(name, "A").rcode() == dns.rcode.NOERROR


def test_a_long_answer_is_cut_over_udp_and_whole_over_tcp() -> None:
    cut = ask("many.shop.svc.cluster.local.", "A")
    assert cut.flags & dns.flags.TC
    assert texts(cut) == []
    assert len(texts(ask("many.shop.svc.cluster.local.", "A", over_tcp=True))) == 200


def test_other_operations_are_not_implemented() -> None:
    query = dns.message.make_query("web.shop.svc.cluster.local.", "A")
    query.set_opcode(dns.opcode.STATUS)
    response = answer(query.to_wire(), ZONE)
    assert response is not None
    assert dns.message.from_wire(response).rcode() == dns.rcode.NOTIMP


def test_an_answer_is_not_answered() -> None:
    response = dns.message.make_response(dns.message.make_query("web.shop.svc.cluster.local.", "A"))
    assert answer(response.to_wire(), ZONE) is None


def test_a_header_with_nothing_behind_it_is_a_format_error() -> None:
    response = answer(struct.pack(">HHHHHH", 77, 0, 1, 0, 0, 0), ZONE)
    assert response is not None
    assert response[:2] == struct.pack(">H", 77)
    assert response[3] & 0x0F == dns.rcode.FORMERR


@given(st.binary(max_size=600), st.booleans())
def test_no_bytes_make_it_raise_or_answer_an_answer(query: bytes, over_tcp: bool) -> None:
    response = answer(query, ZONE, over_tcp=over_tcp)
    if response is not None:
        assert response[:2] == query[:2]
        assert response[2] & 0x80
        assert not query[2] & 0x80


@given(st.data())
def test_no_damage_to_a_query_makes_it_raise(data: st.DataObject) -> None:
    query = bytearray(dns.message.make_query("web.shop.svc.cluster.local.", "AAAA", use_edns=True).to_wire())
    for _ in range(data.draw(st.integers(1, 4))):
        query[data.draw(st.integers(0, len(query) - 1))] = data.draw(st.integers(0, 255))
    answer(bytes(query), ZONE)

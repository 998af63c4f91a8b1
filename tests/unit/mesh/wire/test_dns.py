"""DNS messages: dnspython writes the queries and reads our answers."""

from __future__ import annotations

import dns.edns
import dns.flags
import dns.message
import dns.opcode
import dns.rcode
import dns.rdatatype
import dns.rrset
import dns.tsig
import dns.update
import pytest

from mesh.model.address import parse_ip
from mesh.wire.dns import (
    BADVERS,
    MAX_MESSAGE,
    SERVFAIL,
    Edns,
    MessageBuffer,
    address_record,
    answers,
    framed,
    host_name,
    leading_labels,
    parse_query,
    shown_name,
    truncated,
    type_name,
    with_id,
    write_answer,
    write_error,
    write_format_error,
)
from mesh.wire.errors import RemoteProtocolError

NAME = "Web.shop.svc.cluster.local."


def asked(name: str = NAME, kind: str = "A", **options: object) -> dns.message.Message:
    return dns.message.make_query(name, kind, **options)


def records(*ips: str) -> list[bytes]:
    return [address_record(parse_ip(ip), 30) for ip in ips]


def response_to(message: dns.message.Message, *ips: str, limit: int = MAX_MESSAGE, alias: bytes = b"") -> dns.message.Message:
    return dns.message.from_wire(write_answer(parse_query(message.to_wire()), records(*ips), 30, limit, alias=alias))


@pytest.mark.parametrize("kind", ["A", "AAAA", "SRV", "HTTPS", "ANY", "TYPE4711"])
def test_a_question_is_read_as_it_was_written(kind: str) -> None:
    message = asked(kind=kind)
    query = parse_query(message.to_wire())
    assert (query.id, query.opcode, query.type, query.class_) == (message.id, dns.opcode.QUERY, dns.rdatatype.from_text(kind), 1)
    assert query.question == message.question[0].name.to_wire() + query.question[-4:]
    assert (query.simple, query.edns, query.udp_limit) == (True, None, 512)


def test_what_a_client_says_by_edns_is_read() -> None:
    query = parse_query(asked(use_edns=0, payload=1400, want_dnssec=True).to_wire())
    assert (query.edns, query.simple, query.udp_limit) == (Edns(1400, 0, True), True, 1400)


def test_a_payload_below_512_means_512() -> None:
    assert parse_query(asked(use_edns=0, payload=100).to_wire()).udp_limit == 512


def test_options_within_edns_are_passed_over() -> None:
    cookie = dns.edns.GenericOption(dns.edns.OptionType.COOKIE, b"12345678")
    assert parse_query(asked(use_edns=0, payload=1232, options=[cookie]).to_wire()).edns == Edns(1232, 0, False)


def test_an_answer_has_the_addresses_the_question_and_the_authority() -> None:
    message = asked(use_edns=0, payload=1232)
    response = response_to(message, "10.0.0.1", "10.0.0.2")
    assert (response.id, response.rcode(), response.question) == (message.id, dns.rcode.NOERROR, message.question)
    assert dns.flags.to_text(response.flags) == "QR AA RD RA"
    assert [str(line) for line in response.answer] == [
        "Web.shop.svc.cluster.local. 30 IN A 10.0.0.1\nWeb.shop.svc.cluster.local. 30 IN A 10.0.0.2"
    ]
    assert (response.edns, response.payload) == (0, 1232)


def test_without_recursion_desired_the_answer_says_so_too() -> None:
    message = asked(flags=dns.flags.CD)
    assert dns.flags.to_text(response_to(message, "10.0.0.1").flags) == "QR AA RA CD"


def test_addresses_of_ipv6_are_aaaa() -> None:
    assert str(response_to(asked(kind="AAAA"), "fd00::1").answer[0][0]) == "fd00::1"


def test_no_address_is_no_error() -> None:
    response = response_to(asked())
    assert (response.rcode(), response.answer, response.flags & dns.flags.AA) == (dns.rcode.NOERROR, [], dns.flags.AA)


def test_an_alias_leads_to_the_addresses() -> None:
    message = asked("www.Example.com.shop.svc.cluster.local.")
    alias = leading_labels(parse_query(message.to_wire()).name, 3)
    response = response_to(message, "10.0.0.1", alias=alias)
    assert [str(line) for line in response.answer] == [
        "www.Example.com.shop.svc.cluster.local. 30 IN CNAME www.Example.com.",
        "www.Example.com. 30 IN A 10.0.0.1",
    ]


@pytest.mark.parametrize("edns", [False, True])
@pytest.mark.parametrize("limit", [512, 513, 1232])
def test_an_answer_that_is_too_long_is_cut_between_records_and_says_so(limit: int, edns: bool) -> None:
    message = asked(use_edns=0 if edns else False, payload=limit)
    wire = write_answer(parse_query(message.to_wire()), records(*(f"10.0.0.{n}" for n in range(200))), 30, limit)
    assert limit - 16 < len(wire) <= limit
    response = dns.message.from_wire(wire)
    assert response.flags & dns.flags.TC
    assert len(response.answer[0]) > 20


def test_an_error_repeats_the_question() -> None:
    message = asked(use_edns=0, payload=1232)
    response = dns.message.from_wire(write_error(parse_query(message.to_wire()), SERVFAIL))
    assert (response.rcode(), response.question, response.flags & dns.flags.AA) == (dns.rcode.SERVFAIL, message.question, 0)


def test_another_version_of_edns_is_refused_in_ours() -> None:
    response = dns.message.from_wire(write_error(parse_query(asked(use_edns=1, payload=1232).to_wire()), BADVERS))
    assert (response.rcode(), response.edns) == (dns.rcode.BADVERS, 0)


def test_an_update_is_no_question_of_ours() -> None:
    update = dns.update.UpdateMessage("example.com")
    update.add("host", 300, "A", "10.0.0.1")
    query = parse_query(update.to_wire())
    assert (query.opcode, query.question, query.simple, query.udp_limit) == (dns.opcode.UPDATE, b"", False, MAX_MESSAGE)
    assert dns.message.from_wire(write_error(query, SERVFAIL)).rcode() == dns.rcode.SERVFAIL


def test_a_signed_query_is_not_simple() -> None:
    message = asked()
    message.use_tsig(dns.tsig.Key("key.", "AAAA"))
    assert not parse_query(message.to_wire()).simple


@pytest.mark.parametrize(
    ("wire", "reason"),
    [
        (b"", "a DNS message has at least 12 bytes, not 0"),
        (bytes(11), "a DNS message has at least 12 bytes, not 11"),
        (b"\0\1\x80\0\0\1\0\0\0\0\0\0\0\0\1\0\1", "a DNS response where a query was expected"),
        (b"\0\1\0\0\0\1\0\0\0\0\0\0", "the DNS question ends early"),
        (b"\0\1\0\0\0\1\0\0\0\0\0\0\3we", "the DNS question ends early"),
        (b"\0\1\0\0\0\1\0\0\0\0\0\0\0\0\1\0", "the DNS question ends early"),
        (b"\0\1\0\0\0\1\0\0\0\0\0\0\xc0\x0c\0\1\0\1", "a compressed or unknown label in a DNS question"),
        (b"\0\1\0\0\0\1\0\0\0\0\0\0\x40\0\0\1\0\1", "a compressed or unknown label in a DNS question"),
        (b"\0\1\0\0\0\1\0\0\0\0\0\0" + b"\x3f" * 64 * 4 + b"\0\0\1\0\1", "a DNS name has at most 255 bytes, not 257"),
        (b"\0\1\0\0\0\1\0\0\0\0\0\1\0\0\1\0\1", "the DNS message ends early"),
        (b"\0\1\0\0\0\1\0\0\0\0\0\1\0\0\1\0\1\0\0\x29\x10\0\0\0\0\0\0\5", "the OPT record ends early"),
    ],
)
def test_what_is_no_query_is_refused_with_the_reason(wire: bytes, reason: str) -> None:
    with pytest.raises(RemoteProtocolError) as refusal:
        parse_query(wire)
    assert refusal.value.reason == reason


def test_garbage_behind_a_header_gets_a_format_error_under_its_id() -> None:
    answer = write_format_error(b"\x12\x34\x01\0\0\1\0\0\0\0\0\0\xff")
    assert answer is not None
    response = dns.message.from_wire(answer)
    assert (response.id, response.rcode(), dns.flags.to_text(response.flags)) == (0x1234, dns.rcode.FORMERR, "QR RD")


@pytest.mark.parametrize("wire", [b"", bytes(11), b"\x12\x34\x81\0\0\1\0\0\0\0\0\0\xff"])
def test_what_has_no_header_or_is_a_response_gets_no_answer(wire: bytes) -> None:
    assert write_format_error(wire) is None


@pytest.mark.parametrize(
    ("wire", "text"),
    [
        (b"\3WEB\4shop\0", "web.shop"),
        (b"\0", None),
        (b"\7web.shop\0"[:8] + b"\0", None),
        (b"\3w\xc3b\0", None),
        (b"\3w b\0", None),
        (b"\1*\3com\0", "*.com"),
        (b"\5_http\4_tcp\0", "_http._tcp"),
    ],
)
def test_only_names_that_a_host_can_have_become_text(wire: bytes, text: str | None) -> None:
    assert host_name(wire) == text


def test_any_name_can_be_shown() -> None:
    assert shown_name(b"\3w.b\2\\\x07\0") == "w\\046b.\\092\\007."


def test_types_have_names() -> None:
    assert (type_name(28), type_name(4711)) == ("AAAA", "TYPE4711")


def response_wire(message: dns.message.Message) -> bytes:
    response = dns.message.make_response(message)
    response.answer.append(dns.rrset.from_text(message.question[0].name, 60, "IN", "A", "192.0.2.1"))
    return response.to_wire()


def test_the_true_response_is_known_by_id_and_question() -> None:
    message = asked()
    query = parse_query(message.to_wire())
    true = response_wire(message)
    assert answers(with_id(true, 7), query, 7)
    assert answers(with_id(true.replace(b"Web", b"wEB"), 7), query, 7), "servers may change the case"
    assert not answers(with_id(true, 8), query, 7), "another id"
    assert not answers(with_id(true, 7)[:2] + b"\x01" + true[3:], query, 7), "a query"
    assert not answers(with_id(true, 7)[:2] + b"\xa8" + true[3:], query, 7), "another opcode"
    assert not answers(with_id(true.replace(b"Web", b"Bad"), 7), query, 7), "another name"
    assert not answers(with_id(response_wire(asked(kind="MX")), 7), query, 7), "another type"
    assert not answers(with_id(true, 7)[:11], query, 7), "no header"
    assert not answers(b"\0\7\x80\0" + bytes(8), query, 7), "no question, and no error either"
    assert answers(b"\0\7\x80\1" + bytes(8), query, 7), "a server that understood nothing"


def test_a_response_that_is_too_large_becomes_the_advice_to_ask_over_tcp() -> None:
    message = asked()
    cut = dns.message.from_wire(truncated(response_wire(message), parse_query(message.to_wire())))
    assert (cut.id, cut.question, cut.answer, cut.flags & dns.flags.TC) == (message.id, message.question, [], dns.flags.TC)


def test_messages_are_cut_out_of_a_stream_wherever_it_is_cut() -> None:
    stream = b"".join(framed(bytes([n]) * (n * 40)) for n in range(5))
    for step in (1, 3, len(stream)):
        buffer, found = MessageBuffer(), []
        for at in range(0, len(stream), step):
            buffer.feed(stream[at : at + step])
            while (message := buffer.next()) is not None:
                found.append(message)
        assert found == [bytes([n]) * (n * 40) for n in range(5)]
        assert len(buffer) == 0

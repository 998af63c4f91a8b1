"""Anything is a query or refused; what we answer, dnspython reads; what no mesh knows passes unchanged."""

from __future__ import annotations

from ipaddress import ip_address

import dns.exception
import dns.message
import dns.name
from hypothesis import given
from hypothesis import strategies as st

from mesh.wire.dns import (
    MAX_MESSAGE,
    MessageBuffer,
    address_record,
    answers,
    framed,
    host_name,
    leading_labels,
    parse_query,
    shown_name,
    with_id,
    write_answer,
    write_error,
    write_format_error,
)
from mesh.wire.errors import RemoteProtocolError

_LABELS = st.binary(min_size=1, max_size=63)
_NAMES = st.lists(_LABELS, min_size=1, max_size=6).filter(lambda labels: sum(map(len, labels)) + len(labels) < 255)
_WIRE_NAMES = _NAMES.map(lambda labels: b"".join(bytes([len(label)]) + label for label in labels) + b"\0")
_NUMBERS = st.integers(0, 65535)


@st.composite
def mutated_queries(draw: st.DrawFn) -> bytes:
    """A query with a few bytes changed, cut or added: nearer to harm than mere noise."""
    wire = bytearray(dns.message.make_query("web.shop.svc.cluster.local.", "A", use_edns=draw(st.sampled_from([False, 0]))).to_wire())
    for at, value in draw(st.lists(st.tuples(st.integers(0, len(wire) - 1), st.integers(0, 255)), max_size=4)):
        wire[at] = value
    return bytes(wire[: draw(st.integers(0, len(wire)))]) if draw(st.booleans()) else bytes(wire) + draw(st.binary(max_size=8))


@given(data=st.binary(max_size=600) | mutated_queries(), limit=st.integers(512, MAX_MESSAGE), id=_NUMBERS)
def test_any_bytes_are_a_query_or_refused_and_what_is_answered_is_well_formed(data: bytes, limit: int, id: int) -> None:
    try:
        query = parse_query(data)
    except RemoteProtocolError:
        refusal = write_format_error(data)
        assert refusal is None or dns.message.from_wire(refusal).id == int.from_bytes(data[:2], "big")
        return
    assert len(query.question) <= len(data)
    ours = [write_answer(query, [address_record(ip_address("10.0.0.1"), 30)] * 9, 30, limit)] if query.simple else []
    for answer in (*ours, write_error(query, 2)):
        assert len(answer) <= limit
        # An UPDATE's zone is not read, so an answer to one has no question; dnspython takes that only in what it asked for itself.
        if query.opcode != 5:
            assert dns.message.from_wire(answer).id == query.id
        assert answers(with_id(answer, id), query, id)
    if query.name:
        host_name(query.name)
        shown_name(query.name)


@given(data=st.binary(max_size=600))
def test_any_bytes_are_a_response_or_not(data: bytes) -> None:
    query = parse_query(dns.message.make_query("web.shop.", "A").to_wire())
    if answers(data, query, 7):
        assert int.from_bytes(data[:2], "big") == 7


@given(name=_WIRE_NAMES, kind=_NUMBERS, count=st.integers(0, 6))
def test_names_are_read_as_dnspython_reads_them(name: bytes, kind: int, count: int) -> None:
    wire = b"\0\1\1\0\0\1\0\0\0\0\0\0" + name + kind.to_bytes(2, "big") + b"\0\1"
    query = parse_query(wire)
    theirs, _ = dns.name.from_wire(wire, 12)
    assert (query.name, query.type) == (theirs.to_wire(), kind)
    text = host_name(query.name)
    if text is not None:
        assert dns.name.from_text(text.replace("\\", "\\\\").replace('"', '\\"')) == theirs
    labels = len(theirs.labels) - 1
    if count <= labels:
        assert dns.name.from_wire(leading_labels(query.name, count), 0)[0].labels == (*theirs.labels[:count], b"")


@given(messages=st.lists(st.binary(max_size=300), max_size=8), cuts=st.lists(st.integers(1, 100), min_size=1))
def test_a_stream_gives_back_its_messages(messages: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(map(framed, messages))
    buffer, found = MessageBuffer(), list[bytes]()
    number = 0
    while stream:
        cut = cuts[number % len(cuts)]
        buffer.feed(stream[:cut])
        stream = stream[cut:]
        number += 1
        while (message := buffer.next()) is not None:
            found.append(message)
    assert found == messages

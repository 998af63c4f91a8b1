"""HTTP/1.1, whatever comes in whatever pieces: the same events, nothing raised, bounded memory, and one meaning for whoever reads on."""

from __future__ import annotations

from typing import Any

import h11
from hypothesis import example, given
from hypothesis import strategies as st

from mesh.http.codec import BodyData, BodyEnd, Event, RefusedHead, RequestHead, ResponseHead
from mesh.http.h1 import Http1Client, Http1Server
from mesh.http.headers import FRAMING, TOKEN
from mesh.http.message import Headers, Request, Response
from mesh.http.options import HeadLimits, ServerOptions
from mesh.model.l7.waypoint import PathNormalization
from tests.unit.mesh.http.through import Through

LIMITS = HeadLimits(size=300, count=8)  # so that what is too much is found soon
OPTIONS = ServerOptions(paths=PathNormalization.NONE, http10=True, default_host=b"d", limits=LIMITS)

# Pieces of requests, some of them none

LINES = [b"GET / HTTP/1.1", b"POST /a?b HTTP/1.1", b"HEAD * HTTP/1.1", b"OPTIONS * HTTP/1.1", b"GET http://b/x HTTP/1.1"]
LINES += [b"GET / HTTP/1.0", b"PRI * HTTP/2.0", b"GET  / HTTP/1.1", b"GET /", b"CONNECT a:1 HTTP/1.1", b"post / HTTP/1.1"]
FIELDS = [b"Host: a", b"Host: b", b"Content-Length: 3", b"Content-Length: 30", b"content-length: 0", b"Content-Length: 3, 3"]
FIELDS += [b"Transfer-Encoding: chunked", b"Transfer-Encoding:\tchunked ", b"Transfer-Encoding: x", b"Connection: close", b"Connection: x"]
FIELDS += [
    b"Connection: upgrade",
    b"Upgrade: websocket",
    b"Expect: 100-continue",
    b"X: y",
    b" folded",
    b"X : y",
    b"TE: trailers",
    b"X: " + b"z" * 200,
]
FIELDS += [b"Content-Type: application/grpc", b"Connection: keep-alive", b":", b"X", b"X: \xff"]
CHUNKS = [
    b"3\r\nabc\r\n",
    b"0\r\n\r\n",
    b"0\r\nT: u\r\n\r\n",
    b"a;x=y\r\n0123456789\r\n",
    b"3\r\nabcd\r\n",
    b"-1\r\n",
    b"0\r\n\n",
    b"ffffffffffffffff\r\n",
]
OTHERS = [b"\r\n", b"\n", b"\r", b"\0", b" ", b"abc", b"abc" * 20, b"x" * 700]

heads = st.builds(
    lambda line, fields, end: b"\r\n".join([line, *fields]) + end,
    st.sampled_from(LINES),
    st.lists(st.sampled_from(FIELDS), max_size=5).map(lambda fields: [b"Host: a", *fields]) | st.lists(st.sampled_from(FIELDS), max_size=9),
    st.sampled_from([b"\r\n\r\n"] * 6 + [b"\n\n", b"\r\n", b"\r\n\n"]),
)
whole = st.sampled_from(
    [
        b"GET /g HTTP/1.1\r\nHost: a\r\n\r\n",
        b"POST /p HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc",
        b"POST /c HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n1;x\r\nd\r\n0\r\n\r\n",
        b"POST /t HTTP/1.1\r\nHost: a\r\nContent-Type: application/grpc\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nT: u\r\n\r\n",
        b"POST /e HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\nabc",
        b"GET /u HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
    ]
)
requests = st.lists(whole | whole | heads | st.sampled_from(CHUNKS + OTHERS) | st.binary(max_size=12), max_size=8).map(b"".join)
cuts = st.lists(st.integers(1, 40), max_size=40)


def pieces(data: bytes, sizes: list[int]) -> list[bytes]:
    cut, at = [], 0
    for size in sizes:
        cut.append(data[at : at + size])
        at += size
    return [*cut, data[at:]]


def chunks_joined(raw: bytes) -> bytes:
    """A forwarded request without what chunks its body was cut into."""
    head, _, rest = raw.partition(b"\r\n\r\n")
    if b"transfer-encoding: chunked" not in head:
        return raw
    body = b""
    while rest:
        line, _, rest = rest.partition(b"\r\n")
        size = int(line, 16)
        if not size:
            return head + b"\r\n\r\n" + body + b"|" + rest
        body, rest = body + rest[:size], rest[size + 2 :]
    return head + b"\r\n\r\n" + body


@given(requests, cuts)
@example(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n\n", [27])
@example(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\n", [58])
@example(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n GET", [27])
def test_a_clients_bytes_mean_the_same_however_they_are_cut(data: bytes, sizes: list[int]) -> None:
    at_once, cut, one_by_one = Through(OPTIONS), Through(OPTIONS), Through(OPTIONS)
    at_once.feed(data)
    for piece in pieces(data, sizes):
        cut.feed(piece)
    one_by_one.feed(data, 1)
    for other in (cut, one_by_one):
        assert other.events == at_once.events
        assert other.answers == at_once.answers
        assert other.closed == at_once.closed
        assert [chunks_joined(each.raw) for each in other.forwarded] == [chunks_joined(each.raw) for each in at_once.forwarded]


class Forgetful(dict[bytes, Any]):
    """What a codec remembers nothing in."""

    def __setitem__(self, key: bytes, value: object) -> None:
        pass


class Spoiling(Through):
    """Does to requests what whoever gets them may do."""

    def _take(self, event: Event) -> bool:
        answered = super()._take(event)
        if isinstance(event, RequestHead):
            event.request.headers.append((b"x-spoilt", b"by the driver"))
            event.request.remove(b"x")
        return answered


@given(st.lists(st.lists(whole | heads | st.sampled_from(CHUNKS), max_size=4), max_size=3))
def test_a_head_means_the_same_however_often_it_has_come_and_whatever_became_of_it(rounds: list[list[bytes]]) -> None:
    ours, forgetful = Spoiling(OPTIONS), Spoiling(OPTIONS)
    forgetful.server._known = Forgetful()
    for each in rounds:
        for data in [*each, *each]:
            ours.feed(data)
            forgetful.feed(data)
    assert ours.events == forgetful.events
    assert ours.answers == forgetful.answers
    assert ours.closed == forgetful.closed
    assert [each.raw for each in ours.forwarded] == [each.raw for each in forgetful.forwarded]


@given(requests)
def test_another_reader_finds_in_what_goes_on_the_requests_that_we_found(data: bytes) -> None:
    through = Through(OPTIONS)
    through.feed(data)
    forwarded = [each for each in through.forwarded if each.whole]
    for each in through.forwarded:
        fields = [line.partition(b":")[0] for line in each.raw.partition(b"\r\n\r\n")[0].split(b"\r\n")[1:]]
        assert len({b"content-length", b"transfer-encoding"}.intersection(fields)) <= 1
        assert all(fields.count(name) <= 1 for name in FRAMING | {b"expect"})
        assert fields.count(b"host") == 1
    bodies = read_by_h11(b"".join(each.raw for each in forwarded))
    assert bodies == [each.body for each in forwarded][: len(bodies)]
    assert len(bodies) == len(forwarded) or b"\r\nupgrade: " in forwarded[len(bodies) - 1].raw


def read_by_h11(data: bytes) -> list[bytes]:
    """The bodies of requests, until one asks for an upgrade: behind that h11 reads nothing before it is answered."""
    reader = h11.Connection(h11.SERVER)
    bodies: list[bytes] = []
    if not data:  # which would tell it of the end
        return bodies
    reader.receive_data(data)
    while not isinstance(event := reader.next_event(), type):  # NEED_DATA, PAUSED
        if isinstance(event, h11.Request):
            bodies.append(b"")
        elif isinstance(event, h11.Data):
            bodies[-1] += bytes(event.data)
        elif isinstance(event, h11.EndOfMessage):
            reader.send(h11.Response(status_code=200, headers=[("content-length", "0")]))
            reader.send(h11.EndOfMessage())
            if reader.their_state is h11.DONE:
                reader.start_next_cycle()
        else:
            raise AssertionError(event)
    return bodies


# Responses

STATUSES = [
    b"HTTP/1.1 200 OK",
    b"HTTP/1.1 204 No",
    b"HTTP/1.1 304 N",
    b"HTTP/1.1 100 C",
    b"HTTP/1.1 103 E",
    b"HTTP/1.1 101 S",
    b"HTTP/1.0 200 OK",
]
STATUSES += [b"HTTP/1.1 200", b"HTTP/1.1 20 OK", b"HTTP/1.1 999 X", b"HTTP/1.1  200 OK", b"ICY 200 OK"]
responses = st.lists(
    st.builds(
        lambda line, fields: b"\r\n".join([line, *fields, b"", b""]),
        st.sampled_from(STATUSES),
        st.lists(st.sampled_from(FIELDS), max_size=3),
    )
    | st.sampled_from(CHUNKS + OTHERS)
    | st.binary(max_size=8),
    max_size=6,
).map(b"".join)


def listen(parts: list[bytes], method: bytes, *, upgrade: bool) -> tuple[list[object], bool, bool]:
    client = Http1Client(LIMITS, websocket_nonce=lambda: bytes(16))
    request = Request(method, b"http", b"a", b"/", [(b"te", b"trailers")], upgrade=b"websocket" if upgrade else None)
    client.send_request(request, ended=not upgrade)
    told: list[object] = []

    def take(events: list[Event]) -> None:
        for event in events:
            if isinstance(event, BodyData):
                client.consumed(event.stream, len(event.data))
                if told and isinstance(told[-1], bytes):
                    told[-1] += bytes(event.data)
                else:
                    told.append(bytes(event.data))
            elif isinstance(event, ResponseHead):
                told.append((event.response.status, tuple(event.response.headers), event.response.content_length, event.ended))
            elif isinstance(event, BodyEnd):
                told.append(("end", tuple(event.trailers)))
            else:
                told.append(repr(event))

    for part in parts:
        take(list(client.receive(part)))
    usable = client.reusable and client.capacity > 0
    take(list(client.receive_eof()))
    return told, usable, client.finished


@given(responses, cuts, st.sampled_from([b"GET", b"HEAD"]), st.booleans())
def test_an_applications_bytes_mean_the_same_however_they_are_cut(data: bytes, sizes: list[int], method: bytes, upgrade: bool) -> None:
    at_once = listen([data], method, upgrade=upgrade)
    assert listen(pieces(data, sizes), method, upgrade=upgrade) == at_once
    assert listen([data[at : at + 1] for at in range(len(data))], method, upgrade=upgrade) == at_once


ANSWERS = [
    b"\r\n".join([line, *fields, b"", b"ok" if b"Content-Length: 2" in fields else b""])
    for line in STATUSES[:6]
    for fields in (
        [b"Content-Length: 2", b"X: y"],
        [b"Content-Length: 2", b"Connection: keep-alive"],
        [b"content-length: 0"],
        [b"X: y"],
    )
]


@given(st.lists(st.tuples(st.sampled_from(ANSWERS), st.sampled_from([b"GET", b"GET", b"HEAD"]), st.booleans()), max_size=12))
def test_an_answer_means_the_same_however_often_it_has_come_and_whatever_became_of_it(turns: list[tuple[bytes, bytes, bool]]) -> None:
    clients = [Http1Client(LIMITS, websocket_nonce=lambda: bytes(16)) for _ in range(2)]
    clients[1]._known = Forgetful()
    for answer, method, upgrade in turns:
        told = []
        for client in clients:
            if not client.capacity:
                return
            client.send_request(Request(method, b"http", b"a", b"/", [], upgrade=b"websocket" if upgrade else None), ended=not upgrade)
            events = client.receive(answer)
            told.append(
                [
                    (each.response.status, list(each.response.headers), each.response.content_length, each.ended)
                    if isinstance(each, ResponseHead)
                    else bytes(each.data)
                    if isinstance(each, BodyData)
                    else each
                    for each in events
                ]
            )
            for each in events:
                if isinstance(each, ResponseHead):
                    each.response.headers.append((b"x-spoilt", b"by the driver"))
                    each.response.remove(b"x")
        assert told[0] == told[1]
        assert clients[0].reusable == clients[1].reusable
        assert clients[0].finished == clients[1].finished


# Serialising and parsing

tokens = st.text(st.sampled_from(TOKEN.decode()), min_size=1, max_size=12).map(str.encode)
names = tokens.map(bytes.lower).filter(lambda name: name not in FRAMING | {b"te", b"expect", b"trailer"})
text = st.binary(max_size=20).map(lambda value: bytes(byte for byte in value if byte == 9 or 32 <= byte != 127).strip(b" \t"))
headers = st.lists(st.tuples(names, text), max_size=6)
targets = st.binary(max_size=30).map(
    lambda path: b"/" + bytes(byte for byte in path if 0x21 <= byte < 0x7F and byte != 0x23).replace(b"%00", b"")
)
bodies = st.lists(st.binary(min_size=1, max_size=50), max_size=5)
WIDE = ServerOptions(paths=PathNormalization.NONE)


def body_of(events: list[Event]) -> bytes:
    return b"".join(bytes(event.data) for event in events if isinstance(event, BodyData))


@given(tokens.filter(lambda method: method != b"CONNECT"), targets.filter(lambda path: b"%00" not in path), headers, bodies, st.booleans())
def test_a_request_that_is_written_is_read_as_the_same(
    method: bytes, path: bytes, fields: Headers, parts: list[bytes], declared: bool
) -> None:
    body = b"".join(parts)
    client = Http1Client()
    request = Request(method, b"http", b"a:80", path, list(fields), content_length=len(body) if declared else None)
    stream = client.send_request(request, ended=False)
    for part in parts:
        client.send_data(stream, part)
    client.send_end(stream)
    events = list(Http1Server(WIDE).receive(client.take_outgoing()))
    head = events[0]
    assert isinstance(head, RequestHead)
    read = head.request
    assert (read.method, read.authority, read.path) == (method, b"a:80", path)
    assert [pair for pair in read.headers if pair[0] != b"content-length"] == fields
    assert read.content_length == (len(body) if declared else None)
    assert body_of(events) == body
    assert head.ended or isinstance(events[-1], BodyEnd)


@given(st.integers(200, 599).filter(lambda status: status not in (204, 304)), headers, bodies, st.booleans())
def test_a_response_that_is_written_is_read_as_the_same(status: int, fields: Headers, parts: list[bytes], declared: bool) -> None:
    body = b"".join(parts)
    server, client = Http1Server(WIDE), Http1Client()
    stream = client.send_request(Request(b"GET", b"http", b"a", b"/", []), ended=True)
    server.receive(client.take_outgoing())
    server.send_response(stream, Response(status, list(fields), content_length=len(body) if declared else None), ended=False)
    for part in parts:
        server.send_data(stream, part)
    server.send_end(stream)
    events = list(client.receive(server.take_outgoing()))
    head = events[0]
    assert isinstance(head, ResponseHead)
    assert head.response.status == status
    assert [pair for pair in head.response.headers if pair[0] != b"content-length"] == fields
    assert body_of(events) == body
    assert client.reusable
    assert client.capacity == 1


# Memory

endless = st.sampled_from([b"x", b"X: y\r\n", b"0", b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", b"1\r\na\r\n", b"\r\n", b"5;", b"a:b"])
beginnings = st.sampled_from(
    [
        b"",
        b"GET / HTTP/1.1\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3;",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 999999999\r\n\r\n",
    ]
)


@given(beginnings, endless, st.sampled_from([11, 1000, 65536]))
def test_a_client_that_never_comes_to_an_end_is_not_listened_to_for_ever(beginning: bytes, unit: bytes, size: int) -> None:
    """Nobody answers and nothing moves on: what is kept is bounded by what the driver is told to read."""
    server = Http1Server(WIDE)
    piece = (unit * (size // len(unit) + 1))[:size]
    server.receive(beginning)
    read = 0
    while server.wants_data and not server.finished and read < 1 << 19:
        events = server.receive(piece)
        read += size
        if any(isinstance(event, RefusedHead) for event in events):
            break
        assert len(server._buffer) <= 64 * 1024 + 4 + size

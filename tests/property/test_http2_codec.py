"""The waypoint's HTTP/2 under bytes that nobody meant, its messages as others read them, and what becomes of them in HTTP/1.1."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import hyperframe.frame
import pytest
from hpack import Decoder, Encoder
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mesh.http.codec import BodyData, BodyEnd, Event, RefusedHead, RequestHead, ResponseHead, StreamReset
from mesh.http.h1 import Http1Client, Http1Server
from mesh.http.h2 import CONNECTION_WINDOW, Http2Client, Http2Server
from mesh.http.message import Headers, Response
from mesh.http.options import ServerOptions
from mesh.model.l7.waypoint import PathNormalization
from mesh.testing.hbone import StoppedClock
from mesh.wire.errors import LocalProtocolError, RemoteProtocolError
from mesh.wire.frames import PREFACE, FrameType, frame_header, header_frames
from tests.property.http2_frames import frames, mutated
from tests.unit.mesh.http.h2_peer import deliver, frames_of, plain, request

Codec = Http2Client | Http2Server
New = Callable[[], Codec]
SETTINGS = frame_header(0, FrameType.SETTINGS, 0, 0)
GET = [(":method", "GET"), (":scheme", "http"), (":authority", "shop.test"), (":path", "/")]
POST = [(":method", "POST"), *GET[1:]]


def new_server() -> Http2Server:
    return Http2Server(ServerOptions(max_streams=3), now=StoppedClock())


def new_client() -> Http2Client:
    """With requests under way, so that there is something to answer."""
    client = Http2Client(now=StoppedClock())
    for method in (b"GET", b"HEAD", b"POST", b"PUT"):
        client.send_request(request(method), ended=method in (b"GET", b"HEAD"))
    return client


# --- streams of frames, mostly sensible ---------------------------------------------------------------------------------------------------

FRAMES = frames(
    [
        GET,
        POST,
        [*POST, ("content-length", "40"), ("cookie", "a=b"), ("cookie", "c=d")],
        [*POST, ("expect", "100-continue"), ("te", "trailers")],
        [*GET, ("x-common", "y" * 40), ("accept", "*/*")],
        [*GET[:3], (":path", "/a b")],
        [(":method", "CONNECT"), *GET[1:], (":protocol", "websocket")],
        [(":method", "HEAD"), *GET[1:], ("host", "shop.test")],
        [(":status", "200"), ("content-length", "40")],
        [(":status", "200"), ("server", "x")],
        [(":status", "103"), ("link", "</a>")],
        [(":status", "304"), ("content-length", "4")],
        [("grpc-status", "0")],
        [("Upper", "x"), ("connection", "close")],
    ]
)
WIRES = FRAMES.map(b"".join) | mutated(FRAMES)


def opening(*fields: tuple[str, str]) -> bytes:
    """HEADERS on streams 1 and 3 that touch no table, so that any encoder may go on after them."""
    block = Encoder().encode([(name, value, True) for name, value in fields])
    return b"".join(header_frames(stream, block, end_stream=False, max_frame_size=16384) for stream in (1, 3))


CODECS = pytest.mark.parametrize(
    ("new", "start"),
    [(new_server, PREFACE + SETTINGS + opening(*POST)), (new_client, SETTINGS + opening((":status", "200")))],
    ids=["server", "client"],
)


def meaning(events: Iterable[Event]) -> dict[int, list[object]]:
    """Events by stream, in order, a body's pieces put together. Of a stream that was reset nobody may rely on how much had come."""
    streams: dict[int, list[object]] = {}
    for event in events:
        stream = getattr(event, "stream", 0)
        told = streams.setdefault(stream, [])
        match event:
            case RequestHead(request=message) | ResponseHead(response=message):
                told.append((type(event), plain(message), event.ended))
            case RefusedHead():
                told.append((event.status, event.reason))
            case BodyData(data=data):
                if told and isinstance(told[-1], bytes):
                    told[-1] += bytes(data)
                else:
                    told.append(bytes(data))
            case StreamReset():
                streams[stream] = [each for each in told if not isinstance(each, bytes)] + [event]
            case _:
                told.append(event)
    return streams


def run(codec: Codec, wire: bytes, cuts: Iterable[int]) -> tuple[dict[int, list[object]], bytes, str | None]:
    """Everything a codec makes of bytes cut at ``cuts``: events, outgoing bytes, and the reason it gave up."""
    events: list[Event] = []
    failure = None
    for start, end in itertools.pairwise([0, *sorted(cuts), len(wire)]):
        try:
            events += deliver(codec, wire[start:end])
        except RemoteProtocolError as exc:
            failure = f"{exc.code}: {exc.reason}"
            break
    return meaning(events), codec.take_outgoing(), failure


@CODECS
@given(wire=st.binary(max_size=300))
def test_arbitrary_bytes_raise_nothing_but_the_protocol_error(new: New, start: bytes, wire: bytes) -> None:
    run(new(), wire, [])
    run(new(), start + wire, [])


def spoil(event: Event) -> None:
    """What a driver may do to a message that it was given."""
    match event:
        case RequestHead(request=message) | ResponseHead(response=message):
            message.append(b"x-spoilt", b"by the driver")
            message.remove(b"x-common")
            message.content_length = 7
        case BodyEnd(trailers=trailers):
            trailers.append((b"x-spoilt", b"by the driver"))


REPEATED = st.lists(
    st.tuples(
        st.sampled_from(
            [
                GET,
                [*POST, ("content-length", "2"), ("te", "trailers"), ("x-common", "y"), ("cookie", "a=b"), ("cookie", "c=d")],
                [*GET, ("x-common", "y" * 40)],
                [(":method", "CONNECT"), *GET[1:], (":protocol", "websocket")],
                [*GET, ("connection", "close")],
                [*GET, ("expect", "200-maybe")],
                [(":status", "200"), ("x-common", "y"), ("content-length", "2")],
                [(":status", "204")],
                [(":status", "103"), ("link", "</a>")],
                [("grpc-status", "0"), ("x-common", "y")],
                [("grpc-status", "0"), (":status", "200")],
            ]
        ),
        st.sampled_from([0, 0, 0, 64, 4096]),
        st.booleans(),
        st.sampled_from([b"", b"ok"]),
    ),
    min_size=4,
    max_size=24,
)
"""Blocks, most of which have come before: fields, the table's size, whether they end their stream, and the DATA behind them."""


@pytest.mark.parametrize("new", [new_server, new_client], ids=["server", "client"])
@settings(max_examples=300)
@given(blocks=REPEATED, stay=st.integers(1, 3))
def test_a_block_means_the_same_however_often_it_has_come_and_whatever_became_of_it(
    new: New, blocks: list[tuple[list[tuple[str, str]], int, bool, bytes]], stay: int
) -> None:
    """``stay``: how many blocks come on a stream before the next one."""
    ours, forgetful = new(), new()
    forgetful._reader._remembers = False
    encoder = Encoder()
    wire = (PREFACE if new is new_server else b"") + SETTINGS
    for number, (fields, table, end, data) in enumerate(blocks):
        stream = 2 * (number // stay) + 1
        if table:
            encoder.header_table_size = table
        wire += header_frames(stream, encoder.encode(fields), end_stream=end, max_frame_size=16384)
        if data and not end:
            wire += frame_header(len(data), FrameType.DATA, 0, stream) + data
        told = []
        for codec in (ours, forgetful):
            try:
                told.append(deliver(codec, wire))
            except RemoteProtocolError as exc:
                told.append(exc.reason)
        mine, theirs = told
        assert ours.take_outgoing() == forgetful.take_outgoing()
        if isinstance(mine, str) or isinstance(theirs, str):
            assert mine == theirs
            return
        assert meaning(mine) == meaning(theirs)
        for event in mine:
            spoil(event)
        wire = b""
    assert not forgetful._reader._blocks


@CODECS
@settings(max_examples=300)
@given(wire=mutated(FRAMES))
def test_mutated_frames_raise_nothing_but_the_protocol_error_and_are_answered_in_frames(new: New, start: bytes, wire: bytes) -> None:
    _, outgoing, failure = run(new(), start + wire, [])
    heard = frames_of(outgoing)
    assert (failure is None) == (not heard or heard[-1].type != FrameType.GOAWAY)


@CODECS
@settings(max_examples=200)
@given(wire=WIRES, data=st.data())
def test_however_bytes_are_cut_they_mean_the_same(new: New, start: bytes, wire: bytes, data: st.DataObject) -> None:
    wire = start + wire
    whole_events, whole_outgoing, whole_failure = run(new(), wire, [])
    for cuts in (data.draw(st.lists(st.integers(0, len(wire)), max_size=20)), range(len(wire))):
        cut_events, cut_outgoing, cut_failure = run(new(), wire, cuts)
        assert cut_failure == whole_failure
        assert cut_outgoing == whole_outgoing
        if whole_failure is None:
            assert cut_events == whole_events


@CODECS
@settings(max_examples=200)
@given(wire=FRAMES)
def test_events_keep_the_order_of_an_exchange(new: New, start: bytes, wire: list[bytes]) -> None:
    """A head, a body, one end: for every stream, whatever the peer sends."""
    codec = new()
    begun: set[int] = set()
    over: set[int] = set()
    for piece in (start, *wire):
        try:
            events = deliver(codec, piece)
        except RemoteProtocolError:
            assert codec.active_streams == 0
            return
        for event in events:
            match event:
                case RequestHead(stream=stream):
                    assert stream not in begun | over
                    begun.add(stream)
                    over |= {stream} if event.ended else set()
                case ResponseHead(stream=stream):
                    assert stream not in begun | over
                    if event.response.status == 101 or event.response.status >= 200:
                        begun.add(stream)
                    over |= {stream} if event.ended else set()
                case BodyData(stream=stream):
                    assert stream in begun - over
                    assert event.data
                case BodyEnd(stream=stream):
                    assert stream in begun - over
                    over.add(stream)
                case RefusedHead(stream=stream):
                    assert stream not in begun | over
                    over.add(stream)
                case StreamReset(stream=stream):
                    over.add(stream)
                    assert codec.room(stream) == 0
                case _:
                    pass


# --- messages, as others read them --------------------------------------------------------------------------------------------------------

NAMES = st.sampled_from([b"accept", b"x-common", b"authorization", b"cookie", b"etag"]) | st.text(
    "abcdefghijklmnopqrstuvwxyz0123456789-_.!#$%&'*+^`|~", min_size=1, max_size=9
).map(str.encode).filter(lambda name: name not in (b"te", b"host", b"expect", b"upgrade", b"connection"))
VALUES = st.sampled_from([b"", b"y" * 30, b"y" * 600]) | st.binary(max_size=40).map(
    lambda value: bytes(byte for byte in value if byte == 9 or (byte >= 32 and byte != 127)).strip(b" \t")
)
HEADERS = st.lists(st.tuples(NAMES, VALUES), max_size=8)
TOKENS = st.sampled_from([b"GET", b"POST", b"HEAD", b"M-SEARCH"])
PATHS = st.text("abc/%?=&.;-", max_size=20).map(lambda text: b"/" + text.encode())


@settings(max_examples=150)
@given(
    messages=st.lists(st.tuples(TOKENS, PATHS, HEADERS, st.binary(max_size=30), HEADERS), max_size=6), table=st.sampled_from([None, 0, 100])
)
def test_what_our_client_writes_is_what_others_read(
    messages: list[tuple[bytes, bytes, Headers, bytes, Headers]], table: int | None
) -> None:
    """hyperframe and hpack, and our server after them."""
    client, server, decoder = (
        Http2Client(now=StoppedClock()),
        Http2Server(ServerOptions(paths=PathNormalization.NONE), now=StoppedClock()),
        Decoder(),
    )
    resize = b"" if table is None else b"\0\1" + table.to_bytes(4)
    if table is not None:
        decoder.max_allowed_table_size = table
    client.receive(frame_header(len(resize), FrameType.SETTINGS, 0, 0) + resize)
    for method, path, headers, body, trailers in messages:
        stream = client.send_request(request(method, path, headers), ended=False)
        client.send_data(stream, body)
        client.send_end(stream, trailers)
        outgoing = client.take_outgoing()
        blocks = [frame for frame in frames_of(outgoing) if isinstance(frame, hyperframe.frame.HeadersFrame)]
        expected = [(b":method", method), (b":scheme", b"http"), (b":authority", b"shop.test"), (b":path", path), *headers]
        assert decoder.decode(blocks[0].data, raw=True) == expected
        sent = [pair for block in blocks[1:] for pair in decoder.decode(block.data, raw=True)]
        data = [frame for frame in frames_of(outgoing) if isinstance(frame, hyperframe.frame.DataFrame)]
        assert b"".join(frame.data for frame in data) == body
        events = deliver(server, outgoing)
        head, *rest = events
        if isinstance(head, RefusedHead):  # %00
            assert b"%00" in path
            return
        assert isinstance(head, RequestHead)
        cookies = [value for name, value in headers if name == b"cookie"]
        assert sorted(head.request.headers) == sorted(
            [pair for pair in headers if pair[0] != b"cookie"] + ([(b"cookie", b"; ".join(cookies))] if cookies else [])
        )
        assert (head.request.method, head.request.path.partition(b"#")[0]) == (method, path)
        assert b"".join(bytes(event.data) for event in rest if isinstance(event, BodyData)) == body
        assert [event.trailers for event in rest if isinstance(event, BodyEnd)] == [sent]


# --- in HTTP/1.1 --------------------------------------------------------------------------------------------------------------------------

HOSTILE = st.one_of(
    st.sampled_from(
        [
            b"",
            b" ",
            b"x",
            b"shop.test",
            b"/",
            b"/ HTTP/1.1\r\nhost: evil\r\n\r\nGET /",
            b"a\r\ntransfer-encoding: chunked",
            b"\r\n\r\n",
            b"0",
            b"5",
            b"GET",
            b"http",
            b"chunked",
            b"\n",
            b"a\tb",
            b"\xff\x85\xa0",
            b"%0d%0a",
        ]
    ),
    st.binary(max_size=12),
)
HOSTILE_NAMES = st.one_of(
    st.sampled_from(
        [b"x", b"host", b"content-length", b"transfer-encoding", b"te", b"expect", b"cookie", b"connection", b"x-y", b"upgrade"]
    ),
    HOSTILE,
)
HOSTILE_PSEUDO = st.fixed_dictionaries(
    {
        b":method": st.sampled_from([b"GET", b"POST"]) | HOSTILE,
        b":scheme": st.sampled_from([b"http", b"https"]) | HOSTILE,
        b":authority": st.just(b"shop.test") | HOSTILE,
        b":path": st.just(b"/") | HOSTILE.map(lambda path: b"/" + path) | HOSTILE,
    }
)
PATH_MODES = st.sampled_from(PathNormalization)


@settings(max_examples=300)
@given(
    pseudo=HOSTILE_PSEUDO,
    headers=st.lists(st.tuples(HOSTILE_NAMES, HOSTILE), max_size=4),
    body=st.binary(max_size=20),
    trailers=st.lists(st.tuples(HOSTILE_NAMES, HOSTILE), max_size=2),
    paths=PATH_MODES,
)
def test_a_request_that_goes_on_as_http1_is_one_request(
    pseudo: dict[bytes, bytes], headers: Headers, body: bytes, trailers: Headers, paths: PathNormalization
) -> None:
    """Whatever a client puts into HTTP/2, the next hop reads the message that was judged here, and no second one."""
    server = Http2Server(ServerOptions(paths=paths), now=StoppedClock())
    encoder = Encoder()
    wire = header_frames(1, encoder.encode([*pseudo.items(), *headers]), end_stream=False, max_frame_size=16384)
    wire += frame_header(len(body), FrameType.DATA, 0, 1) + body
    wire += header_frames(1, encoder.encode(trailers), end_stream=True, max_frame_size=16384)
    head, *rest = deliver(server, PREFACE + SETTINGS + wire)
    if not isinstance(head, RequestHead) or not isinstance(rest[-1], BodyEnd):
        return
    asked = head.request
    assert (asked.method, asked.authority.lower()) == (pseudo[b":method"], (pseudo[b":authority"] or asked.authority).lower())
    client, reader = Http1Client(), Http1Server(ServerOptions(paths=PathNormalization.NONE))
    client.send_request(asked, ended=False)
    client.send_data(1, body)
    client.send_end(1, rest[-1].trailers)
    read, *more = deliver(reader, client.take_outgoing())
    assert isinstance(read, RequestHead), read
    assert (read.request.method, read.request.path, read.request.authority) == (asked.method, asked.path, asked.authority)
    framing = (b"content-length", b"te")
    assert [pair for pair in read.request.headers if pair[0] not in framing] == [pair for pair in asked.headers if pair[0] not in framing]
    assert b"".join(bytes(event.data) for event in more if isinstance(event, BodyData)) == body
    assert read.ended or isinstance(more[-1], BodyEnd)
    reader.send_response(1, Response(200, []), ended=True)
    assert not reader.receive(b""), "a second request came out of one"


@settings(max_examples=300)
@given(
    status=st.sampled_from([b"200", b"204", b"304", b"404"]) | HOSTILE,
    headers=st.lists(st.tuples(HOSTILE_NAMES | st.just(b"location"), HOSTILE), max_size=4),
    body=st.binary(max_size=20),
    method=st.sampled_from([b"GET", b"HEAD"]),
)
def test_a_response_that_goes_on_as_http1_is_one_response(status: bytes, headers: Headers, body: bytes, method: bytes) -> None:
    client = Http2Client(now=StoppedClock())
    stream = client.send_request(request(method), ended=True)
    wire = header_frames(stream, Encoder().encode([(b":status", status), *headers]), end_stream=not body, max_frame_size=16384)
    wire += frame_header(len(body), FrameType.DATA, 1, stream) + body if body else b""
    events = deliver(client, SETTINGS + wire)
    if not events or not isinstance(events[0], ResponseHead) or any(isinstance(event, StreamReset) for event in events):
        return
    head, *rest = events
    assert isinstance(head, ResponseHead)
    server, reader = Http1Server(), Http1Client()
    reader.send_request(request(method), ended=True)
    deliver(server, reader.take_outgoing())
    server.send_response(1, head.response, ended=head.ended)
    for event in rest:
        if isinstance(event, BodyData):
            server.send_data(1, event.data)
        else:
            server.send_end(1, [])
    read, *more = deliver(reader, server.take_outgoing())
    assert isinstance(read, ResponseHead), read
    assert (read.response.status, bytes(status)) == (head.response.status, b"%d" % read.response.status)
    length = (b"content-length",)
    assert [pair for pair in read.response.headers if pair[0] not in length] == [
        pair for pair in head.response.headers if pair[0] not in length
    ]
    assert b"".join(bytes(event.data) for event in more if isinstance(event, BodyData)) == body
    assert reader.reusable, "nothing is left over that the next response would begin with"


# --- both ends of ours, with drivers that do as they please -------------------------------------------------------------------------------


ALL = 1 << 22
PORTIONS = st.sampled_from([ALL, ALL, ALL, 40_000, 100, 9, 1, 0])


class Exchanges(RuleBasedStateMachine):
    """Our client and our server, a wire between them that cuts where it likes, and drivers who call in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.client = Http2Client(now=StoppedClock(), stream_window=70_000)
        self.server = Http2Server(ServerOptions(stream_window=66_000, max_streams=4), now=StoppedClock())
        self.up = self.down = b""
        self.sent: dict[tuple[str, int], bytes] = {}
        self.got: dict[tuple[str, int], bytes] = {}
        self.ended: set[tuple[str, int]] = set()
        self.arrived: set[tuple[str, int]] = set()
        self.asked: list[int] = []
        self.lost: set[int] = set()

    @initialize()
    def begin(self) -> None:
        """With exchanges in full swing: what is of interest comes after that."""
        self.carry(ALL, ALL)
        for _ in range(3):
            self.ask(False, [])
        self.carry(ALL, ALL)
        for stream in self.asked[:2]:
            self.server.send_response(stream, Response(200, []), ended=False)
            self.sent["client", stream] = b""
        self.carry(ALL, ALL)

    def take(self, side: str, codec: Codec, wire: bytes) -> None:
        for event in deliver(codec, wire):
            stream = getattr(event, "stream", 0)
            match event:
                case RequestHead() | ResponseHead():
                    self.got[side, stream] = b""
                case BodyData():
                    self.got[side, stream] += bytes(event.data)
                case BodyEnd():
                    self.arrived.add((side, stream))
                case StreamReset():
                    self.lost.add(stream)
                case _:
                    raise AssertionError(event)

    @rule(up=PORTIONS, down=PORTIONS)
    def carry(self, up: int, down: int) -> None:
        self.up += self.client.take_outgoing()
        self.down += self.server.take_outgoing()
        up_piece, self.up = self.up[:up], self.up[up:]
        down_piece, self.down = self.down[:down], self.down[down:]
        self.take("server", self.server, up_piece)
        self.take("client", self.client, down_piece)

    @precondition(lambda self: self.client.capacity)
    @rule(ended=st.booleans(), headers=HEADERS)
    def ask(self, ended: bool, headers: Headers) -> None:
        stream = self.client.send_request(request(b"POST", headers=headers), ended=ended)
        self.asked.append(stream)
        self.sent["server", stream] = b""
        if ended:
            self.ended.add(("server", stream))

    def streams(self, side: str) -> list[int]:
        return [stream for to, stream in self.sent if to == side and (side, stream) not in self.ended and stream not in self.lost]

    @rule(status=st.sampled_from([200, 404]), data=st.data())
    def answer(self, status: int, data: st.DataObject) -> None:
        free = [stream for side, stream in self.got if side == "server" and ("client", stream) not in self.sent and stream not in self.lost]
        if free:
            stream = data.draw(st.sampled_from(free))
            self.server.send_response(stream, Response(status, []), ended=False)
            self.sent["client", stream] = b""

    @rule(to=st.sampled_from(["client", "server"]), size=st.sampled_from([1, 20_000, 30_000, 200_000]), data=st.data())
    def send(self, to: str, size: int, data: st.DataObject) -> None:
        codec: Codec = self.server if to == "client" else self.client
        free = self.streams(to)
        if free:
            stream = data.draw(st.sampled_from(free))
            room = codec.room(stream)
            if size > room:
                if room or codec._streams.get(stream):  # else the stream is over, and nothing can be wrong
                    with pytest.raises(LocalProtocolError):
                        codec.send_data(stream, bytes(room + 1))
                size = room
            payload = bytes([len(self.sent[to, stream]) % 251]) * size
            codec.send_data(stream, payload)
            self.sent[to, stream] += payload

    @rule(to=st.sampled_from(["client", "server"]), trailers=HEADERS, data=st.data())
    def end(self, to: str, trailers: Headers, data: st.DataObject) -> None:
        free = self.streams(to)
        if free:
            stream = data.draw(st.sampled_from(free))
            (self.server if to == "client" else self.client).send_end(stream, trailers)
            self.ended.add((to, stream))

    @rule(by=st.sampled_from(["client", "server"]), data=st.data())
    def reset(self, by: str, data: st.DataObject) -> None:
        if self.asked:
            stream = data.draw(st.sampled_from(self.asked))
            (self.client if by == "client" else self.server).reset(stream, 8)
            self.lost.add(stream)

    @rule(side=st.sampled_from(["client", "server"]), whole=st.booleans(), data=st.data())
    def consume(self, side: str, whole: bool, data: st.DataObject) -> None:
        codec: Codec = self.client if side == "client" else self.server
        free = [stream for stream, state in codec._streams.items() if codec._stream_window - state.receive_window - state.owed > 0]
        if free:
            stream = data.draw(st.sampled_from(free))
            state = codec._streams[stream]
            waiting = codec._stream_window - state.receive_window - state.owed
            codec.consumed(stream, waiting if whole else data.draw(st.integers(1, waiting)))

    @invariant()
    def bodies_arrive_as_they_were_sent(self) -> None:
        for key, body in self.got.items():
            assert self.sent[key].startswith(body)
            if key in self.arrived:
                assert key in self.ended
                assert self.sent[key] == body or key[1] in self.lost

    @invariant()
    def accounts_are_right(self) -> None:
        for codec in (self.client, self.server):
            waiting = sum(codec._stream_window - state.receive_window - state.owed for state in codec._streams.values())
            assert codec._waiting == waiting
            assert 0 <= codec._receive_window <= CONNECTION_WINDOW
            assert codec.unsent == sum(map(len, codec._parts))

    def teardown(self) -> None:
        for stream in self.asked:
            self.client.reset(stream, 8)
        while self.up or self.down or self.client.unsent or self.server.unsent:
            self.carry(ALL, ALL)
        for codec in (self.client, self.server):
            assert codec.active_streams == 0
            assert codec._waiting == 0


TestExchanges = Exchanges.TestCase
TestExchanges.settings = settings(max_examples=60, stateful_step_count=40)

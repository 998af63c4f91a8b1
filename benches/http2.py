"""CPU time of HTTP/2 in a waypoint, an exchange at either end: by `mesh.http.h2`, and by the h2 library doing the same.

An exchange is a GET with the headers that requests have in a mesh, and 1 KiB of answer. Both subjects read the same bytes, a message at a
time; an h2 client and an h2 server wrote them. The library's events become the waypoint's messages, or nobody could go on with them.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Final

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, RequestReceived, ResponseReceived

from benches.rows import OURS, Record, Row
from benches.stage import Say
from mesh.http.codec import BodyData, RequestHead, ResponseHead
from mesh.http.h2 import Http2Client, Http2Server
from mesh.http.message import Headers, Request, Response, Version

FIGURE: Final = "http2"
ROUNDS: Final = 40
EXCHANGES: Final = 200
"""Of one connection; each round has a new one."""
BODY: Final = bytes(1024)

_COMMON: Final = [
    (b"user-agent", b"Go-http-client/2.0"),
    (b"accept", b"application/json"),
    (b"accept-encoding", b"gzip"),
    (b"x-forwarded-proto", b"http"),
    (b"authorization", b"Bearer " + b"x" * 300),
]
_ANSWER: Final = [
    (b"content-type", b"application/json"),
    (b"date", b"Mon, 01 Jan 2024 00:00:00 GMT"),
    (b"server", b"istio-envoy"),
    (b"x-envoy-upstream-service-time", b"3"),
    (b"content-length", b"1024"),
]


def measure(say: Say) -> list[Row]:
    """For each end and both together: CPU time, and how many times ours is h2's. All in one run, the subjects in turns."""
    subjects: dict[str, tuple[Callable[[], float], Callable[[], float]]] = {
        "mesh.http.h2": (_our_server, _our_client),
        "h2 library": (lambda: _h2_server(checked=True), lambda: _h2_client(checked=True)),
        "h2 library, its validation off": (lambda: _h2_server(checked=False), lambda: _h2_client(checked=False)),
    }
    say(f"{ROUNDS} rounds of {EXCHANGES} exchanges")
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in subjects}
    for _ in range(ROUNDS):
        for name, (server, client) in subjects.items():
            times[name].append((server(), client()))
    record = Record(FIGURE)
    ours = times["mesh.http.h2"]
    for name, samples in times.items():
        for sample, mine in zip(samples, ours, strict=True):
            for end, took, base in zip(("server", "client", "both"), (*sample, sum(sample)), (*mine, sum(mine)), strict=True):
                record.add(f"GET of 1 KiB, {end}: {name}", "cpu us", OURS, took * 1e6)
                if samples is not ours:
                    record.add(f"GET of 1 KiB, {end}: {name}", "times ours", OURS, took / base)
    return record.rows()


def _requests() -> list[Headers]:
    rng = random.Random(1)
    return [
        [
            *_COMMON,
            (b"x-request-id", rng.randbytes(16).hex().encode()),
            (b"traceparent", b"00-%b-%b-01" % (rng.randbytes(16).hex().encode(), rng.randbytes(8).hex().encode())),
        ]
        for _ in range(EXCHANGES)
    ]


def _pseudo(number: int) -> Headers:
    return [(b":method", b"GET"), (b":scheme", b"http"), (b":authority", b"shop.test"), (b":path", b"/items/%d" % number)]


def _connection(*, client: bool, checked: bool = True) -> H2Connection:
    config = H2Configuration(
        client_side=client,
        header_encoding=None,
        validate_inbound_headers=checked,
        validate_outbound_headers=checked,
        normalize_inbound_headers=checked,
        normalize_outbound_headers=checked,
    )
    connection = H2Connection(config)
    connection.initiate_connection()
    return connection


class _Recorded:
    """What either side of a connection says, message by message; the first ones are the prefaces."""

    def __init__(self) -> None:
        client, server = _connection(client=True), _connection(client=False)
        self.questions, self.answers = [client.data_to_send()], [server.data_to_send()]
        server.receive_data(self.questions[0])
        client.receive_data(self.answers[0])
        server.receive_data(client.data_to_send())
        client.receive_data(server.data_to_send())
        for number, headers in enumerate(_requests()):
            stream = 2 * number + 1
            client.send_headers(stream, [*_pseudo(number), *headers], end_stream=True)
            self.questions.append(client.data_to_send())
            server.receive_data(self.questions[-1])
            server.send_headers(stream, [(b":status", b"200"), *_ANSWER])
            server.send_data(stream, BODY, end_stream=True)
            self.answers.append(server.data_to_send())
            client.receive_data(self.answers[-1])
            client.acknowledge_received_data(len(BODY), stream)
            server.receive_data(client.data_to_send())


_RECORDED: Final = _Recorded()


def _timed(work: Callable[[], None]) -> float:
    """CPU seconds per exchange."""
    started = time.process_time()
    work()
    return (time.process_time() - started) / EXCHANGES


def _our_server() -> float:
    server = Http2Server(now=time.monotonic)
    preface, *questions = _RECORDED.questions
    server.receive(preface)
    server.take_outgoing()

    def work() -> None:
        for question in questions:
            for event in server.receive(memoryview(question)):
                if type(event) is RequestHead:
                    server.send_response(event.stream, Response(200, _ANSWER, content_length=len(BODY)), ended=False)
                    if server.room(event.stream) >= len(BODY):
                        server.send_data(event.stream, BODY)
                    server.send_end(event.stream)
            server.take_outgoing()
            server._send_window += len(BODY)  # what the client gives back now and then, which the recording has not

    return _timed(work)


def _our_client() -> float:
    client = Http2Client(now=time.monotonic)
    settings, *answers = _RECORDED.answers
    client.receive(settings)
    client.take_outgoing()
    requests = _requests()

    def work() -> None:
        for number, answer in enumerate(answers):
            client.send_request(Request(b"GET", b"http", b"shop.test", b"/items/%d" % number, requests[number]), ended=True)
            client.take_outgoing()
            for event in client.receive(memoryview(answer)):
                if type(event) is BodyData:
                    client.consumed(event.stream, len(event.data))
                elif type(event) is ResponseHead:
                    assert event.response.status == 200

    return _timed(work)


def _h2_server(*, checked: bool) -> float:
    server = _connection(client=False, checked=checked)
    preface, *questions = _RECORDED.questions
    server.receive_data(preface)
    server.data_to_send()

    def work() -> None:
        for question in questions:
            for event in server.receive_data(question):
                if type(event) is RequestReceived:
                    _request_of(event.headers)
                    server.send_headers(event.stream_id, [(b":status", b"200"), *_ANSWER])
                    if server.local_flow_control_window(event.stream_id) >= len(BODY):
                        server.send_data(event.stream_id, BODY)
                    server.end_stream(event.stream_id)
            server.data_to_send()
            server.outbound_flow_control_window += len(BODY)

    return _timed(work)


def _h2_client(*, checked: bool) -> float:
    client = _connection(client=True, checked=checked)
    settings, *answers = _RECORDED.answers
    client.receive_data(settings)
    client.data_to_send()
    requests = _requests()

    def work() -> None:
        for number, answer in enumerate(answers):
            client.send_headers(2 * number + 1, [*_pseudo(number), *requests[number]], end_stream=True)
            client.data_to_send()
            for event in client.receive_data(answer):
                if type(event) is DataReceived:
                    client.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                elif type(event) is ResponseReceived:
                    assert _response_of(event.headers).status == 200

    return _timed(work)


def _request_of(fields: Headers) -> Request:
    pseudo = dict(fields[:4])
    return Request(pseudo[b":method"], pseudo[b":scheme"], pseudo[b":authority"], pseudo[b":path"], fields[4:], Version.HTTP_2)


def _response_of(fields: Headers) -> Response:
    return Response(int(fields[0][1]), fields[1:])

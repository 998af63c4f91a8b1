"""HTTP's load against its own server, and against those who answer otherwise; what it writes is read by the library that knows HTTP/2."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, Event, RequestReceived, ResponseReceived, StreamEnded, TrailersReceived

from benches import http_load
from benches.http_load import GRPC, HTTP1, HttpClient
from benches.load import MESSAGE
from tests.unit.benches.test_load import serving

PATH = "/bench.Echo/Unary"
FIELDS = {"authorization": "Bearer " + "t" * 700, "x-version": "v1"}
WHOLE = b"\0\0\0\x04\0" + bytes(MESSAGE)


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with serving("-m", http_load.__name__) as port:
        yield port


@pytest.mark.parametrize("protocol", [HTTP1, GRPC])
@pytest.mark.parametrize("parallel", [1, 16])
def test_requests_saturate_or_are_paced_on_connections_that_stay(port: int, protocol: str, parallel: int) -> None:
    client = HttpClient()
    for _ in range(2):
        seen = client.ask("127.0.0.1", port, protocol, PATH, FIELDS, parallel, 0.05)
        assert seen["requests"] >= parallel
        assert 0 < seen["p50"] <= seen["p99"] <= seen["p999"]
    assert client.ask("127.0.0.1", port, protocol, PATH, FIELDS, 1, 0.1, rate=100)["requests"] == 10


@contextmanager
def answering(serve: Callable[[socket.socket], None]) -> Iterator[int]:
    """A server of one connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            sock, _ = listener.accept()
            with sock:
                serve(sock)

        thread = threading.Thread(target=accept)
        thread.start()
        yield listener.getsockname()[1]
        thread.join()


def grpc_server(asked: list[dict[bytes, bytes]], message: bytes) -> Callable[[socket.socket], None]:
    """Answers every call with a message, as the library writes it."""

    def serve(sock: socket.socket) -> None:
        connection = H2Connection(H2Configuration(client_side=False))
        connection.initiate_connection()
        sock.sendall(connection.data_to_send())
        received = 0
        while data := sock.recv(65536):
            for event in connection.receive_data(data):
                if isinstance(event, RequestReceived):
                    asked.append(dict(event.headers))
                elif isinstance(event, DataReceived):
                    received += len(event.data)
                    connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                elif isinstance(event, StreamEnded):
                    assert received == len(asked) * len(WHOLE)
                    connection.send_headers(event.stream_id, [(":status", "200"), ("content-type", "application/grpc")])
                    connection.send_data(event.stream_id, message)
                    connection.send_headers(event.stream_id, [("grpc-status", "0")], end_stream=True)
            sock.sendall(connection.data_to_send())

    return serve


def test_calls_are_what_the_library_takes_for_calls() -> None:
    asked: list[dict[bytes, bytes]] = []
    with answering(grpc_server(asked, WHOLE)) as port:
        client = HttpClient()
        seen = client.ask("127.0.0.1", port, GRPC, PATH, FIELDS, 1, 0.2, rate=50)
        client.close()
    assert seen["requests"] == 10
    assert len(asked) == 11, "one to begin with"
    assert all(each == asked[0] for each in asked)
    assert (asked[0][b":method"], asked[0][b":path"], asked[0][b"te"]) == (b"POST", PATH.encode(), b"trailers")
    assert asked[0][b"authorization"] == FIELDS["authorization"].encode()


def test_the_server_answers_calls_of_the_library(port: int) -> None:
    connection = H2Connection()
    connection.initiate_connection()
    events: list[Event] = []
    with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
        for _ in range(2):
            stream = connection.get_next_available_stream_id()
            fields = {":method": "POST", ":scheme": "http", ":authority": "a", ":path": PATH, "content-type": "application/grpc"}
            connection.send_headers(stream, list(fields.items()))
            connection.send_data(stream, WHOLE, end_stream=True)
            sock.sendall(connection.data_to_send())
            while not any(isinstance(event, StreamEnded) and event.stream_id == stream for event in events):
                events += connection.receive_data(sock.recv(65536))
    told = [dict(event.headers) for event in events if isinstance(event, ResponseReceived | TrailersReceived)]
    assert told == [{b":status": b"200", b"content-type": b"application/grpc"}, {b"grpc-status": b"0"}] * 2
    assert b"".join(event.data for event in events if isinstance(event, DataReceived)) == WHOLE * 2


def test_a_refusal_is_an_error_and_no_figure() -> None:
    refusal = b"HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\n\r\n"

    def refuse(sock: socket.socket) -> None:
        sock.recv(65536)
        sock.sendall(refusal)

    with answering(refuse) as port, pytest.raises(ConnectionError, match="403"):
        HttpClient().ask("127.0.0.1", port, HTTP1, PATH, {}, 1, 0.0)
    with answering(grpc_server([], b"")) as port:
        client = HttpClient()
        with pytest.raises(ConnectionError, match="without its message"):
            client.ask("127.0.0.1", port, GRPC, PATH, {}, 1, 0.0)

"""A gRPC server fed any bytes ends its connection by itself, quietly; a client fed any bytes raises RpcError and nothing else."""

from __future__ import annotations

import h2.config
import h2.connection
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.rpc import Call, Handler, RpcError, Unary, open_channel_on, serve_connection

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
GRPC_REQUEST = [
    (":method", "POST"),
    (":scheme", "http"),
    (":path", "/t/echo"),
    (":authority", "t"),
    ("content-type", "application/grpc"),
    ("te", "trailers"),
]


async def _echo(request: bytes, call: Call) -> bytes:
    return request


HANDLERS: dict[str, Handler] = {"/t/echo": Unary(_echo)}


def _valid_request() -> bytes:
    client = h2.connection.H2Connection()
    client.initiate_connection()
    client.send_headers(1, GRPC_REQUEST)
    client.send_data(1, b"\0\0\0\0\5hello", end_stream=True)
    return client.data_to_send()


frames = st.builds(
    lambda kind, flags, stream, body: len(body).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + body,
    st.integers(0, 11),
    st.integers(0, 255),
    st.integers(0, 5),
    st.binary(max_size=40),
)
hostile = st.one_of(
    st.binary(max_size=200),
    st.lists(frames, max_size=8).map(lambda some: PREFACE + b"\0\0\0\4\0\0\0\0\0" + b"".join(some)),
    st.lists(frames, max_size=8).map(lambda some: _valid_request() + b"".join(some)),
    st.tuples(st.integers(0, 250), st.binary(min_size=1, max_size=3)).map(
        lambda change: (lambda wire: wire[: change[0]] + change[1] + wire[change[0] + len(change[1]) :])(_valid_request())
    ),
)


@settings(max_examples=300)
@given(hostile, st.integers(1, 300))
def test_no_bytes_make_the_server_raise_or_hang(wire: bytes, step: int) -> None:
    async def main() -> None:
        near, far = trio.testing.memory_stream_pair()
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(serve_connection, far, HANDLERS)
                try:
                    for start in range(0, len(wire), step):
                        await near.send_all(wire[start : start + step])
                    await near.send_eof()
                except trio.BrokenResourceError:
                    pass  # it has had enough
                while await near.receive_some():
                    pass

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def _valid_response(status: str, grpc_status: str) -> bytes:
    server = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, validate_outbound_headers=False))
    server.initiate_connection()
    server.receive_data(_valid_request())
    server.clear_outbound_data_buffer()
    server.initiate_connection()
    server.send_headers(1, [(":status", status), ("content-type", "application/grpc")])
    server.send_data(1, b"\0\0\0\0\5hello")
    server.send_headers(1, [("grpc-status", grpc_status)], end_stream=True)
    return server.data_to_send()


responses = st.builds(_valid_response, st.sampled_from(["200", "503", "abc", "", "١"]), st.sampled_from(["0", "5", "x", "", "99999"]))


@settings(max_examples=300)
@given(
    st.one_of(
        st.binary(max_size=200),
        responses,
        st.tuples(responses, st.lists(frames, max_size=4)).map(lambda both: both[0] + b"".join(both[1])),
        st.tuples(responses, st.integers(0, 120), st.binary(min_size=1, max_size=3)).map(
            lambda change: change[0][: change[1]] + change[2] + change[0][change[1] + len(change[2]) :]
        ),
    ),
    st.integers(1, 300),
)
def test_no_bytes_make_the_client_raise_anything_but_its_own_error(wire: bytes, step: int) -> None:
    async def main() -> None:
        near, far = trio.testing.memory_stream_pair()
        async with trio.open_nursery() as nursery:

            async def answer() -> None:
                await trio.testing.wait_all_tasks_blocked()  # the request is out: its stream exists
                try:
                    for start in range(0, len(wire), step):
                        await far.send_all(wire[start : start + step])
                    await far.send_eof()
                except trio.BrokenResourceError:
                    pass  # it has had enough

            nursery.start_soon(answer)
            with trio.fail_after(60):
                async with open_channel_on(near) as channel:
                    try:
                        await channel.unary("/t/echo", b"hello")  # the bytes may well make an answer
                    except RpcError:
                        pass

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_the_response_that_is_mutilated_above_is_a_good_one() -> None:
    async def main() -> None:
        near, far = trio.testing.memory_stream_pair()
        async with trio.open_nursery() as nursery:

            async def answer() -> None:
                await trio.testing.wait_all_tasks_blocked()
                await far.send_all(_valid_response("200", "0"))

            nursery.start_soon(answer)
            async with open_channel_on(near) as channel:
                assert await channel.unary("/t/echo", b"hello") == b"hello"

    trio.run(main)

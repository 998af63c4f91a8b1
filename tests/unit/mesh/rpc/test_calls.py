"""Our client and our server over streams in memory, and what each does with a peer that misbehaves."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager

import h2.config
import h2.connection
import h2.events
import h2.settings
import pytest
import trio
import trio.testing

from mesh.http.message import Request
from mesh.rpc import Bidi, Call, Channel, Handler, Limits, Peer, RpcError, ServerStream, Status, Unary, open_channel_on, serve_connection
from mesh.rpc.connection import RESET_BURST, ClientConnection
from mesh.rpc.metadata import to_headers
from mesh.wire.frames import MAX_STREAM_ID, FrameType, frame_header, goaway_frame, rst_stream_frame

PATIENCE = 20.0
SMALL = Limits(max_message=1024 * 1024, stream_window=65535)


async def _echo(request: bytes, call: Call) -> bytes:
    return request


async def _echo_stream(stream: ServerStream) -> None:
    while (message := await stream.receive()) is not None:
        await stream.send(message)


ECHO: dict[str, Handler] = {"/t/echo": Unary(_echo), "/t/stream": Bidi(_echo_stream)}


@asynccontextmanager
async def _connected(
    handlers: Mapping[str, Handler], *, client: Limits = SMALL, server: Limits = SMALL
) -> AsyncIterator[tuple[Channel, trio.CancelScope]]:
    """A channel to our own server, and the scope to end the server with."""
    near, far = trio.testing.memory_stream_pair()
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            scope = trio.CancelScope()

            async def run_server() -> None:
                with scope:
                    await serve_connection(far, handlers, peer=Peer("test"), limits=server)

            nursery.start_soon(run_server)
            async with open_channel_on(near, limits=client) as channel:
                yield channel, scope
            nursery.cancel_scope.cancel()


def _run(test: Callable[[], Awaitable[None]], clock: trio.abc.Clock | None = None) -> None:
    trio.run(test, clock=clock)


def test_a_message_larger_than_every_window_passes() -> None:
    async def main() -> None:
        async with _connected(ECHO) as (channel, _):
            message = bytes(range(256)) * 4000
            assert await channel.unary("/t/echo", message) == message

    _run(main)


def test_many_calls_share_a_connection_beyond_the_stream_limit() -> None:
    async def main() -> None:
        answers: list[bytes] = []

        async def ask(channel: Channel, number: int) -> None:
            answers.append(await channel.unary("/t/echo", b"%d" % number * 2000))

        limits = Limits(max_message=64 * 1024, max_streams=3)
        async with _connected(ECHO, server=limits) as (channel, _):
            await channel.unary("/t/echo", b"")  # the server's SETTINGS are here now
            async with trio.open_nursery() as nursery:
                for number in range(50):
                    nursery.start_soon(ask, channel, number)
            assert sorted(answers) == sorted(b"%d" % number * 2000 for number in range(50))

    _run(main)


def test_a_stream_nobody_reads_holds_no_more_than_its_window_and_does_not_stop_others() -> None:
    async def main() -> None:
        sent = 0

        async def pour(stream: ServerStream) -> None:
            nonlocal sent
            while True:
                await stream.send(b"x" * 1024)
                sent += 1024

        async with (
            _connected({**ECHO, "/t/pour": Bidi(pour)}) as (channel, _),
            channel.stream("/t/pour") as stuck,
        ):
            assert await stuck.receive() == b"x" * 1024
            for _ in range(20):
                assert await channel.unary("/t/echo", b"y" * 80_000) == b"y" * 80_000
            assert sent <= 4 * SMALL.stream_window

    _run(main)


def test_a_message_beyond_the_limit_is_refused_before_it_is_kept() -> None:
    async def main() -> None:
        async with _connected(ECHO) as (channel, _):
            with pytest.raises(RpcError, match="larger than 1048576") as refused:
                await channel.unary("/t/echo", b"x" * 2_000_000)
            assert refused.value.status is Status.RESOURCE_EXHAUSTED
            assert await channel.unary("/t/echo", b"after") == b"after"

    _run(main)


def test_a_method_may_have_a_limit_of_its_own() -> None:
    async def main() -> None:
        handlers = {"/t/big": Unary(_echo, max_message=200_000), "/t/small": Unary(_echo, max_message=10)}
        async with _connected(handlers, client=Limits(max_message=200_000)) as (channel, _):
            assert len(await channel.unary("/t/big", b"x" * 100_000)) == 100_000
            with pytest.raises(RpcError, match="RESOURCE_EXHAUSTED"):
                await channel.unary("/t/small", b"x" * 11)

    _run(main)


def test_a_deadline_reaches_the_handler_and_ends_it() -> None:
    async def main() -> None:
        cancelled = trio.Event()
        deadlines: list[float] = []

        async def hang(request: bytes, call: Call) -> bytes:
            deadlines.append(call.deadline - trio.current_time())
            try:
                await trio.sleep_forever()
            finally:
                cancelled.set()
            raise AssertionError

        async with _connected({"/t/hang": Unary(hang)}) as (channel, _):
            with pytest.raises(RpcError) as late:
                await channel.unary("/t/hang", b"", timeout=5)
            assert late.value.status is Status.DEADLINE_EXCEEDED
            await cancelled.wait()
            assert 4.9 < deadlines[0] <= 5.001

    _run(main, trio.testing.MockClock(autojump_threshold=0.01))


def test_a_status_that_comes_before_the_request_is_whole_is_the_call_s() -> None:
    async def main() -> None:
        async def refuse(stream: ServerStream) -> None:
            raise RpcError(Status.UNAUTHENTICATED, "who?")

        async def answer(stream: ServerStream) -> None:
            await stream.send(b"enough")

        async with _connected({"/t/refuse": Bidi(refuse), "/t/answer": Bidi(answer)}) as (channel, _):
            with pytest.raises(RpcError, match=r"UNAUTHENTICATED: who\?"):
                await channel.unary("/t/refuse", b"x" * 1_000_000)
            assert await channel.unary("/t/answer", b"x" * 1_000_000) == b"enough"
            async with channel.stream("/t/answer") as call:
                assert await call.receive() == b"enough"
                assert await call.receive() is None
                with pytest.raises(RpcError, match="the server has ended the call"):
                    await call.send(b"more")

    _run(main)


def test_a_status_message_may_begin_and_end_with_blanks() -> None:
    async def main() -> None:
        async def refuse(request: bytes, call: Call) -> bytes:
            raise RpcError(Status.NOT_FOUND, " 100 % of caf\xe9s\n ")

        async def refuse_at_length(request: bytes, call: Call) -> bytes:
            raise RpcError(Status.NOT_FOUND, "x" * 1023 + " x")

        async with _connected({"/t/refuse": Unary(refuse), "/t/long": Unary(refuse_at_length)}) as (channel, _):
            with pytest.raises(RpcError) as refused:
                await channel.unary("/t/refuse", b"")
            assert str(refused.value) == "NOT_FOUND: 100 % of caf\xe9s\n"
            with pytest.raises(RpcError) as refused:
                await channel.unary("/t/long", b"")
            assert str(refused.value) == "NOT_FOUND: " + "x" * 1023

    _run(main)


def test_a_client_that_leaves_cancels_the_handler() -> None:
    async def main() -> None:
        started, cancelled = trio.Event(), trio.Event()

        async def hang(stream: ServerStream) -> None:
            started.set()
            try:
                await trio.sleep_forever()
            finally:
                cancelled.set()

        async with _connected({"/t/hang": Bidi(hang)}) as (channel, _):
            async with channel.stream("/t/hang"):
                await started.wait()
            await cancelled.wait()

    _run(main)


def test_a_handler_s_bug_ends_its_call_alone_and_tells_the_client_nothing_of_it() -> None:
    async def main() -> None:
        async def fail(request: bytes, call: Call) -> bytes:
            raise KeyError("a secret")

        async with _connected({**ECHO, "/t/fail": Unary(fail)}) as (channel, _):
            with pytest.raises(RpcError) as failed:
                await channel.unary("/t/fail", b"")
            assert str(failed.value) == "UNKNOWN: internal error"
            assert await channel.unary("/t/echo", b"after") == b"after"

    _run(main)


def test_calls_of_a_lost_connection_fail_with_unavailable() -> None:
    async def main() -> None:
        async with _connected(ECHO) as (channel, server), channel.stream("/t/stream") as call:
            await call.send(b"x")
            assert await call.receive() == b"x"
            server.cancel()
            with pytest.raises(RpcError) as lost:
                await call.receive()
            assert lost.value.status is Status.UNAVAILABLE
            assert not channel.usable
            with pytest.raises(RpcError, match="UNAVAILABLE"):
                await channel.unary("/t/echo", b"")

    _run(main)


def test_a_connection_without_numbers_left_is_of_no_more_use_and_says_so() -> None:
    async def main() -> None:
        async with _connected(ECHO) as (channel, _):
            channel._connection._client._next_stream = MAX_STREAM_ID
            assert await channel.unary("/t/echo", b"the last") == b"the last"
            assert not channel.usable
            await channel.wait_unusable()
            with pytest.raises(RpcError, match="UNAVAILABLE"):
                await channel.unary("/t/echo", b"one too many")

    _run(main)


@pytest.mark.parametrize("name", ["connection", "keep-alive", "transfer-encoding", "expect", "host", "te", "grpc-status"])
def test_metadata_that_http_has_a_meaning_for_is_refused(name: str) -> None:
    with pytest.raises(RpcError, match=f"metadata name '{name}' cannot be sent"):
        to_headers({name: "x"})


def test_a_newline_in_metadata_is_refused_here_and_never_sent() -> None:
    async def main() -> None:
        async with _connected(ECHO) as (channel, _):
            with pytest.raises(RpcError, match="'authorization' has characters") as refused:
                await channel.unary("/t/echo", b"", metadata={"authorization": "Bearer abc\n"})
            assert "abc" not in str(refused.value)
            with pytest.raises(RpcError, match="cannot be sent"):
                await channel.unary("/t/echo", b"", metadata={"X-Upper": "x"})

    _run(main)


def test_the_caller_s_own_exception_comes_out_of_channel_and_stream_as_it_was() -> None:
    async def main() -> None:
        near, far = trio.testing.memory_stream_pair()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve_connection, far, ECHO)
            caught: Exception | None = None
            try:
                async with open_channel_on(near) as channel, channel.stream("/t/stream"):
                    raise LookupError("mine")
            except Exception as exc:
                caught = exc
        assert repr(caught) == "LookupError('mine')"

    _run(main)


def test_a_peer_that_answers_no_ping_is_given_up() -> None:
    async def main() -> None:
        near, far = trio.testing.memory_stream_pair()
        async with open_channel_on(near, limits=SMALL) as channel:
            with pytest.raises(RpcError, match="no answer to a keepalive PING"):
                await channel.unary("/t/echo", b"")
            assert trio.current_time() == pytest.approx(started + SMALL.keepalive_interval + SMALL.keepalive_timeout)
        del far

    clock = trio.testing.MockClock(autojump_threshold=0)
    started = clock.current_time()
    _run(main, clock)


class _Sink(trio.abc.Stream):
    """A transport that takes everything at once, from a peer that reads everything and never says more than how much it takes."""

    def __init__(self) -> None:
        peer = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
        peer.local_settings = h2.settings.Settings(client=False, initial_values={h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 1 << 30})
        peer.initiate_connection()
        peer.increment_flow_control_window(1 << 30)
        self._said: bytes | None = peer.data_to_send()

    def send_now(self, data: bytes) -> bool:
        return True

    async def flush(self) -> None:
        raise AssertionError("nothing is ever left")

    async def send_all(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        said, self._said = self._said, None
        if said is None:
            await trio.sleep_forever()
        return said or b""

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


def test_who_waits_for_room_goes_on_when_another_message_has_taken_along_what_was_in_the_way() -> None:
    """As one does that fails, or is cancelled, when it had filled the output: before the writer had its turn."""

    async def main() -> None:
        request = Request(b"POST", b"http", b"t", b"/t/stream", [])
        with trio.fail_after(PATIENCE):
            async with trio.open_nursery() as nursery:
                connection = ClientConnection(_Sink(), limits=SMALL)
                await nursery.start(connection.run)
                await trio.testing.wait_all_tasks_blocked()  # the peer has said what it takes
                full = False
                while not full:  # until the one that waits had its turn before us
                    filling, waiting = await connection.open_stream(request), await connection.open_stream(request)
                    await trio.testing.wait_all_tasks_blocked()
                    while (room := connection._room(filling)) > 0:
                        await connection.send_data(filling, memoryview(bytes(room)), end=False)
                    async with trio.open_nursery() as senders:
                        senders.start_soon(waiting.send_message, b"x")
                        await trio.lowlevel.checkpoint()
                        full = connection._progress.statistics().tasks_waiting > 0
                        connection.send_queued()
                nursery.cancel_scope.cancel()

    _run(main, trio.testing.MockClock(autojump_threshold=0))


# --- against a server's frames ---


async def _call_answered_with(*wire: bytes) -> tuple[Channel, RpcError]:
    """What becomes of a call whose server says this, piece by piece."""
    near, far = trio.testing.memory_stream_pair()
    failures: list[RpcError] = []

    async def answer() -> None:
        await trio.testing.wait_all_tasks_blocked()  # the call is out
        for piece in (frame_header(0, FrameType.SETTINGS, 0, 0), *wire):
            await far.send_all(piece)
            await trio.testing.wait_all_tasks_blocked()
        await far.send_eof()

    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery, open_channel_on(near) as channel:
            nursery.start_soon(answer)
            try:
                await channel.unary("/t/echo", b"")
            except RpcError as exc:
                failures.append(exc)
            nursery.cancel_scope.cancel()
    return channel, failures[0]


@pytest.mark.parametrize(
    ("wire", "failure"),
    [
        ([goaway_frame(1, 0xB, b"too_many_pings")], "UNAVAILABLE: received GOAWAY ENHANCE_YOUR_CALM: too_many_pings"),
        ([goaway_frame(1, 0xFF)], "UNAVAILABLE: received GOAWAY code 255"),
        ([goaway_frame(1, 0), goaway_frame(1, 2)], "UNAVAILABLE: received GOAWAY INTERNAL_ERROR"),
        ([goaway_frame(0, 0)], "UNAVAILABLE: the server went away before the request (REFUSED_STREAM)"),
        ([goaway_frame(1, 0)], "UNAVAILABLE: closed by the peer"),
        ([rst_stream_frame(1, 8)], "CANCELLED: the peer reset the stream (CANCEL)"),
        ([rst_stream_frame(1, 0x77)], "INTERNAL: the peer reset the stream (code 119)"),
        ([b"HTTP/1.1 400 Bad Request\r\n"], "UNAVAILABLE: protocol error: frame of 4740180 bytes, over the 65536 agreed"),
    ],
)
def test_what_ended_a_call_is_said(wire: list[bytes], failure: str) -> None:
    async def main() -> None:
        _, failed = await _call_answered_with(*wire)
        assert str(failed) == failure

    _run(main)


async def _bare_server(stream: trio.abc.Stream) -> h2.connection.H2Connection:
    """HTTP/2 by hand against our client, which has opened its first stream."""
    server = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
    server.initiate_connection()
    while not server.open_inbound_streams:
        server.receive_data(bytes(await stream.receive_some()))
    return server


def test_a_call_that_the_server_had_taken_goes_on_after_goodbye() -> None:
    async def main() -> None:
        near, far = trio.testing.memory_stream_pair()
        with trio.fail_after(PATIENCE):
            async with open_channel_on(near) as channel, channel.stream("/t/stream") as call:
                server = await _bare_server(far)
                await far.send_all(server.data_to_send() + goaway_frame(1, 0))
                await channel.wait_unusable()
                with pytest.raises(RpcError, match="the peer is going away"):
                    await channel.unary("/t/echo", b"")
                server.send_headers(1, [(":status", "200"), ("content-type", "application/grpc")])
                server.send_data(1, b"\0\0\0\0\2hi")
                server.send_headers(1, [("grpc-status", "0")], end_stream=True)
                await far.send_all(server.data_to_send())
                assert [await call.receive(), await call.receive()] == [b"hi", None]

    _run(main)


def test_informational_responses_are_passed_over() -> None:
    async def main() -> None:
        near, far = trio.testing.memory_stream_pair()
        with trio.fail_after(PATIENCE):
            async with open_channel_on(near) as channel, channel.stream("/t/stream") as call:
                server = await _bare_server(far)
                server.send_headers(1, [(":status", "103"), ("link", "</x>")])
                server.send_headers(1, [(":status", "200"), ("content-type", "application/grpc"), ("x-a", "1")])
                await far.send_all(server.data_to_send())
                assert (await call.response_metadata())["x-a"] == "1"

    _run(main)


# --- against a bare h2 peer ---


class _BareClient:
    """HTTP/2 by hand against our server."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding="utf-8"))
        self._stream = stream
        self.h2.initiate_connection()

    async def flush(self) -> None:
        if data := self.h2.data_to_send():
            await self._stream.send_all(data)

    async def wait_for(self, kind: type[h2.events.Event]) -> h2.events.Event:
        await self.flush()
        while data := await self._stream.receive_some():
            for event in self.h2.receive_data(bytes(data)):
                if isinstance(event, kind):
                    return event
            await self.flush()
        raise EOFError


def _request(**changes: str) -> list[tuple[str, str]]:
    headers = {
        ":method": "POST",
        ":scheme": "http",
        ":path": "/t/echo",
        ":authority": "t",
        "content-type": "application/grpc",
        "te": "trailers",
    } | {name.replace("_", "-"): value for name, value in changes.items()}
    return [(":method", headers.pop("method", headers.pop(":method"))), *headers.items()]


@asynccontextmanager
async def _bare_client() -> AsyncIterator[_BareClient]:
    near, far = trio.testing.memory_stream_pair()
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: serve_connection(far, ECHO, limits=SMALL))
            yield _BareClient(near)
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (_request(content_type="text/html"), "415"),
        (_request(grpc_timeout="soon"), "400"),
        ([(":method", "GET"), *_request()[1:]], "405"),
    ],
)
def test_what_is_no_grpc_request_gets_an_http_status(headers: list[tuple[str, str]], status: str) -> None:
    async def main() -> None:
        async with _bare_client() as client:
            client.h2.send_headers(1, [(name, value) for name, value in headers if name != ":method" or value], end_stream=False)
            event = await client.wait_for(h2.events.ResponseReceived)
            assert isinstance(event, h2.events.ResponseReceived)
            assert dict(event.headers or ())[":status"] == status

    _run(main)


def test_a_client_that_resets_stream_after_stream_is_sent_away() -> None:
    async def main() -> None:
        async with _bare_client() as client:
            for number in range(1, 1001, 2):
                client.h2.send_headers(number, _request())
                client.h2.reset_stream(number)
            event = await client.wait_for(h2.events.ConnectionTerminated)
            assert isinstance(event, h2.events.ConnectionTerminated)
            assert event.error_code == 0xB

    _run(main)


def test_calls_that_are_answered_between_do_not_pay_for_those_given_up() -> None:
    async def main() -> None:
        async with _bare_client() as client:
            for number in range(1, 4 * (int(RESET_BURST) + 1), 4):
                client.h2.send_headers(number, [(":method", "GET"), *_request()[1:]], end_stream=True)
                client.h2.send_headers(number + 2, _request())
                client.h2.reset_stream(number + 2)
                await client.flush()
                await trio.testing.wait_all_tasks_blocked()
            event = await client.wait_for(h2.events.ConnectionTerminated)
            assert isinstance(event, h2.events.ConnectionTerminated)
            assert event.error_code == 0xB

    _run(main, trio.testing.MockClock())  # no call is forgiven meanwhile


def test_a_call_given_up_in_the_read_that_brought_it_never_reaches_its_handler() -> None:
    async def main() -> None:
        called: list[bytes] = []

        async def note(request: bytes, call: Call) -> bytes:
            called.append(request)
            return request

        near, far = trio.testing.memory_stream_pair()
        with trio.fail_after(PATIENCE):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(serve_connection, far, {"/t/echo": Unary(note)})
                client = _BareClient(near)
                client.h2.send_headers(1, _request())
                client.h2.send_data(1, b"\0\0\0\0\1a", end_stream=True)
                client.h2.reset_stream(1)
                client.h2.send_headers(3, _request())
                client.h2.send_data(3, b"\0\0\0\0\1b", end_stream=True)
                await client.wait_for(h2.events.TrailersReceived)
                nursery.cancel_scope.cancel()
        assert called == [b"b"]

    _run(main)


def test_a_server_that_ends_says_which_calls_it_had_taken() -> None:
    async def main() -> None:
        near, far = trio.testing.memory_stream_pair()
        with trio.fail_after(PATIENCE):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(serve_connection, far, ECHO)
                client = _BareClient(near)
                client.h2.send_headers(1, _request())
                client.h2.send_data(1, b"\0\0\0\0\1a", end_stream=True)
                await client.wait_for(h2.events.TrailersReceived)
                nursery.cancel_scope.cancel()
                with trio.CancelScope(shield=True):
                    event = await client.wait_for(h2.events.ConnectionTerminated)
        assert isinstance(event, h2.events.ConnectionTerminated)
        assert (event.error_code, event.last_stream_id) == (0, 1)

    _run(main)


def test_a_header_list_beyond_the_limit_is_refused_and_one_beyond_reason_ends_the_connection() -> None:
    async def main() -> None:
        async with _bare_client() as client:
            client.h2.send_headers(1, _request(x_big="x" * 100_000))
            answer = await client.wait_for(h2.events.ResponseReceived)
            assert isinstance(answer, h2.events.ResponseReceived)
            assert dict(answer.headers or ())[":status"] == "431"
            client.h2.send_headers(3, _request(x_big="x" * 150_000))
            await client.wait_for(h2.events.ConnectionTerminated)

    _run(main)


def test_what_is_no_grpc_request_and_given_up_at_once_harms_no_other() -> None:
    async def main() -> None:
        async with _bare_client() as client:
            client.h2.send_headers(1, [(":method", "GET"), *_request()[1:]])
            client.h2.reset_stream(1)
            client.h2.send_headers(3, _request())
            client.h2.send_data(3, b"\0\0\0\0\0", end_stream=True)
            trailers = await client.wait_for(h2.events.TrailersReceived)
            assert isinstance(trailers, h2.events.TrailersReceived)
            assert dict(trailers.headers or ())["grpc-status"] == "0"

    _run(main)


def test_garbage_instead_of_http2_ends_the_connection() -> None:
    async def main() -> None:
        near, far = trio.testing.memory_stream_pair()
        with trio.fail_after(PATIENCE):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(serve_connection, far, ECHO)
                await near.send_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                while await near.receive_some():
                    pass

    _run(main)


def test_a_peer_that_asks_and_never_reads_is_dropped_before_its_answers_pile_up() -> None:
    async def main() -> None:
        near, far = trio.testing.memory_stream_pair()
        blocked = trio.testing.MemorySendStream(send_all_hook=trio.sleep_forever)
        with trio.fail_after(PATIENCE):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(serve_connection, trio.StapledStream(blocked, far.receive_stream), ECHO)
                client = h2.connection.H2Connection()
                client.initiate_connection()
                for _ in range(100_000):
                    client.ping(b"12345678")
                await near.send_all(client.data_to_send())

    _run(main, trio.testing.MockClock(autojump_threshold=0))


def test_a_header_that_is_no_text_harms_nobody() -> None:
    async def main() -> None:
        async with _bare_client() as client:
            client.h2.config.validate_outbound_headers = False
            client.h2.send_headers(1, [*((name.encode(), value.encode()) for name, value in _request()), (b"x-bad", b"\xff\xfe")])
            client.h2.send_data(1, b"\0\0\0\0\0", end_stream=True)
            trailers = await client.wait_for(h2.events.TrailersReceived)
            assert isinstance(trailers, h2.events.TrailersReceived)
            assert dict(trailers.headers or ())["grpc-status"] == "0"

    _run(main)

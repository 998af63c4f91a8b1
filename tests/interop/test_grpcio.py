"""gRPC with grpcio as the other side, over TLS on loopback."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent import futures
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import grpc
import pytest
import trio

from mesh.rpc import Bidi, Call, Handler, RpcError, ServerStream, Status, Unary, open_channel, serve
from mesh.rpc.client import Channel
from mesh.rpc.tls import client_tls, server_tls
from mesh.testing.serving import ServingCertificate, write_serving_certificate

pytestmark = pytest.mark.interop

PATIENCE = 60.0
BIG = 24 * 1024 * 1024


@pytest.fixture
def certificate(tmp_path: Path) -> ServingCertificate:
    return write_serving_certificate(tmp_path, "localhost")


# --- grpcio as client ---


async def _echo(request: bytes, call: Call) -> bytes:
    return request


async def _tell_metadata(request: bytes, call: Call) -> bytes:
    return call.metadata[request.decode()].encode()


async def _refuse(request: bytes, call: Call) -> bytes:
    raise RpcError(Status.PERMISSION_DENIED, "not you: 100 % sure, ungültig")


async def _hang(request: bytes, call: Call) -> bytes:
    await trio.sleep_forever()
    raise AssertionError


async def _echo_stream(stream: ServerStream) -> None:
    stream.send_metadata({"x-initial": "yes"})
    while (message := await stream.receive()) is not None:
        await stream.send(message)


async def _first_then_fail(stream: ServerStream) -> None:
    await stream.send(await stream.receive() or b"")
    raise RpcError(Status.ABORTED, "enough")


async def _send_much(stream: ServerStream) -> None:
    await stream.send(b"x" * BIG)


HANDLERS: dict[str, Handler] = {
    "/t/echo": Unary(_echo),
    "/t/metadata": Unary(_tell_metadata),
    "/t/refuse": Unary(_refuse),
    "/t/hang": Unary(_hang),
    "/t/stream": Bidi(_echo_stream),
    "/t/fail": Bidi(_first_then_fail),
    "/t/much": Bidi(_send_much),
}


def _with_foreign_client(certificate: ServingCertificate, use: Callable[[grpc.Channel], None]) -> None:
    """Our server on trio; ``use`` in a thread."""

    def call(port: int) -> None:
        credentials = grpc.ssl_channel_credentials(certificate.root_pem.encode())
        with grpc.secure_channel(f"localhost:{port}", credentials, [("grpc.max_receive_message_length", -1)]) as channel:
            use(channel)

    async def main() -> None:
        with trio.fail_after(PATIENCE):
            listeners = await trio.open_tcp_listeners(0, host="localhost")
            port = listeners[0].socket.getsockname()[1]
            async with trio.open_nursery() as nursery:
                await nursery.start(_serve, listeners[:1], certificate)
                await trio.to_thread.run_sync(call, port)
                nursery.cancel_scope.cancel()

    async def _serve(listeners: list[trio.SocketListener], certificate: ServingCertificate, *, task_status: trio.TaskStatus[None]) -> None:
        context = server_tls(certificate.chain, certificate.key)
        await serve(listeners, HANDLERS, tls=lambda: context, task_status=task_status)

    trio.run(main)


def test_a_foreign_client_gets_its_unary_answer(certificate: ServingCertificate) -> None:
    def use(channel: grpc.Channel) -> None:
        assert channel.unary_unary("/t/echo")(b"hello", timeout=20) == b"hello"
        assert channel.unary_unary("/t/echo")(b"", timeout=20) == b""
        assert channel.unary_unary("/t/metadata")(b"x-token", metadata=[("x-token", "Bearer abc")], timeout=20) == b"Bearer abc"

    _with_foreign_client(certificate, use)


def test_a_foreign_client_sees_status_and_message_of_a_refusal(certificate: ServingCertificate) -> None:
    def use(channel: grpc.Channel) -> None:
        with pytest.raises(grpc.RpcError) as refused:
            channel.unary_unary("/t/refuse")(b"", timeout=20)
        assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
        assert refused.value.details() == "not you: 100 % sure, ungültig"
        with pytest.raises(grpc.RpcError) as unknown:
            channel.unary_unary("/t/nothing")(b"", timeout=20)
        assert unknown.value.code() is grpc.StatusCode.UNIMPLEMENTED

    _with_foreign_client(certificate, use)


def test_a_foreign_client_may_stream_a_thousand_messages_both_ways(certificate: ServingCertificate) -> None:
    def use(channel: grpc.Channel) -> None:
        messages = [b"%d" % number * 37 for number in range(1000)]
        call = channel.stream_stream("/t/stream")(iter(messages), timeout=40)
        assert list(call) == messages
        assert ("x-initial", "yes") in call.initial_metadata()

    _with_foreign_client(certificate, use)


def test_a_foreign_client_gets_messages_and_then_the_error(certificate: ServingCertificate) -> None:
    def use(channel: grpc.Channel) -> None:
        call = channel.stream_stream("/t/fail")(iter([b"one", b"two"]), timeout=20)
        assert next(call) == b"one"
        with pytest.raises(grpc.RpcError) as failed:
            next(call)
        assert (failed.value.code(), failed.value.details()) == (grpc.StatusCode.ABORTED, "enough")

    _with_foreign_client(certificate, use)


def test_a_foreign_client_s_deadline_ends_the_call_here_too(certificate: ServingCertificate) -> None:
    def use(channel: grpc.Channel) -> None:
        with pytest.raises(grpc.RpcError) as late:
            channel.unary_unary("/t/hang")(b"", timeout=0.3)
        assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED

    _with_foreign_client(certificate, use)


def test_a_foreign_client_takes_a_big_message_through_the_windows(certificate: ServingCertificate) -> None:
    def use(channel: grpc.Channel) -> None:
        assert [len(message) for message in channel.stream_stream("/t/much")(iter(()), timeout=40)] == [BIG]

    _with_foreign_client(certificate, use)


def test_a_foreign_client_s_too_big_message_is_refused(certificate: ServingCertificate) -> None:
    def use(channel: grpc.Channel) -> None:
        with pytest.raises(grpc.RpcError) as refused:
            channel.unary_unary("/t/echo")(b"x" * (5 * 1024 * 1024), timeout=20)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert channel.unary_unary("/t/echo")(b"after", timeout=20) == b"after"

    _with_foreign_client(certificate, use)


# --- grpcio as server ---


class _Foreign(grpc.GenericRpcHandler):
    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        metadata = dict(details.invocation_metadata)
        match details.method:
            case "/t/echo":
                return grpc.unary_unary_rpc_method_handler(lambda request, context: request)
            case "/t/metadata":
                return grpc.unary_unary_rpc_method_handler(lambda request, context: metadata[request.decode()].encode())
            case "/t/refuse":
                return grpc.unary_unary_rpc_method_handler(self._refuse)
            case "/t/hang":
                return grpc.unary_unary_rpc_method_handler(self._hang)
            case "/t/stream":
                return grpc.stream_stream_rpc_method_handler(self._echo)
            case "/t/much":
                return grpc.unary_unary_rpc_method_handler(lambda request, context: b"x" * BIG)
        return None

    def _refuse(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        context.abort(grpc.StatusCode.UNAUTHENTICATED, "wer ist da? ü%")
        raise AssertionError

    def _hang(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        gone = threading.Event()
        context.add_callback(gone.set)
        gone.wait(PATIENCE)
        return b""

    def _echo(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        context.send_initial_metadata((("x-initial", "yes"),))
        yield from requests
        context.set_trailing_metadata((("x-trailing", "also"),))


@contextmanager
def _foreign_server(certificate: ServingCertificate) -> Iterator[tuple[grpc.Server, int]]:
    server = grpc.server(
        futures.ThreadPoolExecutor(8),
        handlers=[_Foreign()],
        options=[("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)],
    )
    credentials = grpc.ssl_server_credentials([(certificate.key.read_bytes(), certificate.chain.read_bytes())])
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    try:
        yield server, port
    finally:
        server.stop(None).wait(PATIENCE)


@asynccontextmanager
async def _channel_to_foreign(certificate: ServingCertificate) -> AsyncIterator[tuple[Channel, grpc.Server]]:
    with trio.fail_after(PATIENCE), _foreign_server(certificate) as (server, port):
        tls = client_tls(certificate.root_pem)
        async with open_channel("127.0.0.1", port, ssl_context=tls, server_hostname="localhost") as channel:
            yield channel, server


def test_a_foreign_server_answers_us(certificate: ServingCertificate) -> None:
    async def main() -> None:
        async with _channel_to_foreign(certificate) as (channel, _):
            assert await channel.unary("/t/echo", b"hello") == b"hello"
            assert await channel.unary("/t/echo", b"") == b""
            assert await channel.unary("/t/metadata", b"authorization", metadata={"authorization": "Bearer abc"}) == b"Bearer abc"

    trio.run(main)


def test_a_foreign_server_s_refusal_has_its_status_and_message(certificate: ServingCertificate) -> None:
    async def main() -> None:
        async with _channel_to_foreign(certificate) as (channel, _):
            with pytest.raises(RpcError) as refused:
                await channel.unary("/t/refuse", b"")
            assert (refused.value.status, refused.value.message) == (Status.UNAUTHENTICATED, "wer ist da? ü%")
            with pytest.raises(RpcError) as unknown:
                await channel.unary("/t/nothing", b"")
            assert unknown.value.status is Status.UNIMPLEMENTED

    trio.run(main)


def test_we_stream_a_thousand_messages_both_ways_with_a_foreign_server(certificate: ServingCertificate) -> None:
    async def main() -> None:
        messages = [b"%d" % number * 37 for number in range(1000)]

        async with _channel_to_foreign(certificate) as (channel, _), channel.stream("/t/stream") as call, trio.open_nursery() as nursery:

            async def send() -> None:
                for message in messages:
                    await call.send(message)
                call.finish_sending()

            nursery.start_soon(send)
            assert [await call.receive() for _ in messages] == messages
            assert await call.receive() is None
            assert (await call.response_metadata())["x-initial"] == "yes"
            assert call.trailing_metadata["x-trailing"] == "also"

    trio.run(main)


def test_our_deadline_ends_a_call_that_a_foreign_server_never_answers(certificate: ServingCertificate) -> None:
    async def main() -> None:
        async with _channel_to_foreign(certificate) as (channel, _):
            with pytest.raises(RpcError) as late:
                await channel.unary("/t/hang", b"", timeout=0.3)
            assert late.value.status is Status.DEADLINE_EXCEEDED
            assert await channel.unary("/t/echo", b"after") == b"after"

    trio.run(main)


def test_we_send_and_take_big_messages_through_a_foreign_server_s_windows(certificate: ServingCertificate) -> None:
    async def main() -> None:
        async with _channel_to_foreign(certificate) as (channel, _):
            assert len(await channel.unary("/t/much", b"")) == BIG
            assert await channel.unary("/t/echo", b"y" * BIG) == b"y" * BIG

    trio.run(main)


def test_a_call_outlives_the_foreign_server_s_goaway(certificate: ServingCertificate) -> None:
    async def main() -> None:
        async with _channel_to_foreign(certificate) as (channel, server), channel.stream("/t/stream") as call:
            await call.send(b"before")
            assert await call.receive() == b"before"
            stopped = server.stop(PATIENCE)  # graceful: GOAWAY, then wait for calls
            await channel.wait_unusable()
            await call.send(b"after")
            assert await call.receive() == b"after"
            with pytest.raises(RpcError, match="going away"):
                await channel.unary("/t/echo", b"")
            call.finish_sending()
            assert await call.receive() is None
            await trio.to_thread.run_sync(stopped.wait)

    trio.run(main)


def test_a_foreign_server_with_another_name_is_not_talked_to(certificate: ServingCertificate) -> None:
    async def main() -> None:
        with trio.fail_after(PATIENCE), _foreign_server(certificate) as (_, port):
            with pytest.raises(RpcError, match="TLS with istiod") as refused:
                async with open_channel("127.0.0.1", port, ssl_context=client_tls(certificate.root_pem), server_hostname="istiod"):
                    pass
            assert refused.value.status is Status.UNAVAILABLE

    trio.run(main)

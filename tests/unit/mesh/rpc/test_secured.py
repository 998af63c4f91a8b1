"""TLS over a real socket, beside the standard library's own at the other end."""

from __future__ import annotations

import os
import socket
import ssl
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial

import pytest
import trio
import trio.testing

from mesh.rpc.secured import MAX_ANSWERS, SecuredStream
from mesh.rpc.tls import client_tls, server_tls
from mesh.testing.serving import write_serving_certificate


@pytest.fixture(scope="module")
def contexts(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A client's and a server's."""
    certificate = write_serving_certificate(tmp_path_factory.mktemp("tls"), "localhost", "with_underscore.example")
    return client_tls(certificate.root_pem), server_tls(certificate.chain, certificate.key)


Contexts = tuple[ssl.SSLContext, ssl.SSLContext]


@contextmanager
def peer(work: Callable[[socket.socket], None]) -> Iterator[trio.SocketStream]:
    """Our end of a connection whose other end is worked by a thread."""
    near, far = socket.socketpair()

    def run() -> None:
        with far, suppress(OSError):
            far.settimeout(10)
            work(far)

    thread = threading.Thread(target=run)
    thread.start()
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(near))
    try:
        yield stream
    finally:
        stream.socket.close()
        thread.join()


@contextmanager
def server(contexts: Contexts, work: Callable[[ssl.SSLSocket], None], name: str = "localhost") -> Iterator[SecuredStream]:
    """Ours as the client of a server that does this once hands were shaken."""

    def run(sock: socket.socket) -> None:
        with contexts[1].wrap_socket(sock, server_side=True) as secured:
            work(secured)

    with peer(run) as stream:
        yield SecuredStream(stream, contexts[0], server_hostname=name)


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        with trio.fail_after(20):
            await test()

    trio.run(main)


async def read_all(stream: SecuredStream) -> bytes:
    chunks: list[bytes] = []
    while chunk := await stream.receive_some():
        chunks.append(chunk)
    return b"".join(chunks)


def echo(sock: ssl.SSLSocket) -> None:
    while data := sock.recv(65536):
        sock.sendall(data)


@pytest.mark.parametrize("name", ["localhost", "with_underscore.example"])
def test_bytes_pass_both_ways_and_the_protocol_is_agreed_on(contexts: Contexts, name: str) -> None:
    async def test() -> None:
        with server(contexts, echo, name) as stream:
            await stream.do_handshake()
            assert stream.selected_alpn_protocol == "h2"
            assert stream.peer_certificate is not None
            for data in (b"a", b"b" * 10_000):
                await stream.send_all(data)
                got = b""
                while len(got) < len(data):
                    got += await stream.receive_some(7000)
                assert got == data

    run(test)


def test_as_a_server_it_does_the_same(contexts: Contexts) -> None:
    def client(sock: socket.socket) -> None:
        with contexts[0].wrap_socket(sock, server_hostname="localhost") as secured:
            secured.sendall(b"hello")
            secured.recv(100)

    async def test() -> None:
        with peer(client) as transport:
            stream = SecuredStream(transport, contexts[1], server_side=True)
            await stream.do_handshake()
            assert (stream.selected_alpn_protocol, stream.peer_certificate) == ("h2", None)
            assert await stream.receive_some() == b"hello"
            await stream.send_all(b"bye")
            assert await stream.receive_some() == b""

    run(test)


def test_more_than_any_buffer_holds_passes_while_as_much_comes_back(contexts: Contexts) -> None:
    data = os.urandom(3_000_000)

    def work(sock: ssl.SSLSocket) -> None:
        """Sends all before it reads anything: who waited for room without reading would wait for ever."""
        sender = threading.Thread(target=partial(sock.sendall, data))
        sender.start()
        sender.join()
        left = len(data)
        while left:
            left -= len(sock.recv(65536))

    async def test() -> None:
        with server(contexts, work) as stream:
            await stream.do_handshake()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.send_all, data)
                assert await read_all(stream) == data

    run(test)


@pytest.mark.parametrize("goodbye", [True, False])
def test_the_peers_end_is_the_end_with_and_without_a_goodbye(contexts: Contexts, goodbye: bool) -> None:
    def work(sock: ssl.SSLSocket) -> None:
        sock.sendall(b"last words")
        if goodbye:
            sock.settimeout(0)  # says it, and does not wait for the answer
            sock.unwrap()

    async def test() -> None:
        with server(contexts, work) as stream:
            await stream.do_handshake()
            assert await read_all(stream) == b"last words"
            assert await stream.receive_some() == b""

    run(test)


def test_a_goodbye_right_behind_the_last_words_is_the_end_though_the_connection_stays_open(contexts: Contexts) -> None:
    said, over = threading.Event(), threading.Event()

    def work(sock: ssl.SSLSocket) -> None:
        sock.sendall(b"last words")
        sock.settimeout(0)
        with suppress(ssl.SSLError):
            sock.unwrap()
        said.set()
        over.wait(30)

    async def test() -> None:
        with server(contexts, work) as stream:
            try:
                await stream.do_handshake()
                assert await trio.to_thread.run_sync(said.wait, 10)
                assert await read_all(stream) == b"last words"
                assert await stream.receive_some() == b""
            finally:
                over.set()

    run(test)


def test_a_peer_that_is_another_than_it_should_be_is_told_so(contexts: Contexts) -> None:
    heard: list[str] = []

    def work(sock: socket.socket) -> None:
        try:
            contexts[1].wrap_socket(sock, server_side=True).recv(1)
        except ssl.SSLError as exc:
            heard.append(str(exc))

    async def test() -> None:
        with peer(work) as transport:
            stream = SecuredStream(transport, contexts[0], server_hostname="somebody.else")
            with pytest.raises(trio.BrokenResourceError) as caught:
                await stream.do_handshake()
            assert "not valid for 'somebody.else'" in str(caught.value.__cause__)

    run(test)
    assert "alert" in heard[0].lower()


@pytest.mark.parametrize("garbage", [b"", b"SSH-2.0-OpenSSH\r\n", b"\x16\x03\x01\xff\xff" + b"\0" * 70000])
def test_a_peer_that_speaks_something_else_is_a_failure_with_a_reason(contexts: Contexts, garbage: bytes) -> None:
    async def test() -> None:
        with peer(lambda sock: sock.sendall(garbage)) as transport:
            stream = SecuredStream(transport, contexts[0], server_hostname="localhost")
            with pytest.raises(trio.BrokenResourceError) as caught:
                await stream.do_handshake()
            assert str(caught.value.__cause__ or caught.value)

    run(test)


def test_a_record_that_was_changed_on_its_way_breaks_the_stream(contexts: Contexts) -> None:
    def work(sock: ssl.SSLSocket) -> None:
        sock.sendall(b"fine")
        sock.recv(1)
        os.write(sock.fileno(), b"\x17\x03\x03\x00\x20" + b"\0" * 32)

    async def test() -> None:
        with server(contexts, work) as stream:
            await stream.do_handshake()
            assert await stream.receive_some() == b"fine"
            await stream.send_all(b"x")
            with pytest.raises(trio.BrokenResourceError) as caught:
                await read_all(stream)
            assert isinstance(caught.value.__cause__, ssl.SSLError)

    run(test)


def test_a_peer_that_has_answers_made_and_reads_none_is_given_up(contexts: Contexts) -> None:
    enough, over = threading.Event(), threading.Event()

    def work(sock: ssl.SSLSocket) -> None:
        sock.sendall(b"one")
        enough.wait(10)
        sock.sendall(b"two")
        over.wait(10)

    async def test() -> None:
        with server(contexts, work) as stream:
            await stream.do_handshake()
            assert not stream.send_now(bytes(4_000_000))
            stream._outgoing.write(bytes(MAX_ANSWERS))  # as changes of keys would; Python's ssl has no way to ask for one
            assert await stream.receive_some() == b"one"
            stream._outgoing.write(b"x")
            enough.set()
            with pytest.raises(trio.BrokenResourceError, match="does not read"):
                await stream.receive_some()
            over.set()

    run(test)


def test_a_reader_learns_that_the_stream_was_closed_here(contexts: Contexts) -> None:
    async def test() -> None:
        with server(contexts, echo) as stream:
            await stream.do_handshake()

            async def close() -> None:
                await trio.testing.wait_all_tasks_blocked()
                await stream.aclose()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(close)
                with pytest.raises(trio.ClosedResourceError):
                    await read_all(stream)
            for call in (stream.receive_some, partial(stream.send_all, b"x")):
                with pytest.raises(trio.ClosedResourceError):
                    await call()

    run(test)

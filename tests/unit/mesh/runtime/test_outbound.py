"""Requests to servers that configuration names: where they may go, and what a hostile answer costs."""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import h11
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock, memory_stream_pair

from mesh.model.address import parse_ip
from mesh.rpc.tls import verifying_context
from mesh.runtime.outbound import Dialler, HttpConnection, OutboundError, Target, fetch, permit_any, refuse_address
from mesh.testing.serving import write_serving_certificate

Serve = Callable[[trio.abc.Stream], Awaitable[None]]


@pytest.mark.parametrize(
    ("url", "target", "authority"),
    [
        ("https://id.example/keys", Target(True, "id.example", 443, "/keys"), "id.example"),
        ("http://id.example", Target(False, "id.example", 80, "/"), "id.example"),
        ("http://ID.example:8080/k?a=b", Target(False, "id.example", 8080, "/k?a=b"), "id.example:8080"),
        ("https://[fd00::1]:8443/k", Target(True, "fd00::1", 8443, "/k"), "[fd00::1]:8443"),
        ("https://10.0.0.1:443/", Target(True, "10.0.0.1", 443, "/"), "10.0.0.1"),
    ],
)
def test_a_url_is_taken_apart(url: str, target: Target, authority: str) -> None:
    assert Target.parse(url) == target
    assert target.authority == authority


@pytest.mark.parametrize(
    "url",
    [
        "",
        "id.example/keys",
        "file:///etc/passwd",
        "ftp://id.example/",
        "gopher://id.example/",
        "http://",
        "http:///keys",
        "http://user@id.example/",
        "http://user:pass@id.example/",
        "http://id.example:0/",
        "http://id.example:99999/",
        "http://id.example:x/",
        "http://[fd00::1/",
        "http://id.example/a b",
        "http://id.example/a\r\nx: y",
        "http://good.example\\@evil.example/",
        "http://\u0131d.example/",
        "http://id.example/" + "a" * 3000,
    ],
)
def test_what_is_no_url_of_a_server_is_refused(url: str) -> None:
    with pytest.raises(OutboundError):
        Target.parse(url)


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1", "::127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::1"),
        *("0.0.0.0", "0.1.2.3", "::", "::ffff:0.0.0.0"),
        *("169.254.169.254", "169.254.0.1", "fe80::1", "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "2002:a9fe:a9fe::"),
        *("fd00:ec2::254", "fd20:ce::254", "100.100.100.200", "168.63.129.16", "192.0.0.192"),
        *("224.0.0.1", "ff02::1", "255.255.255.255"),
    ],
)
def test_a_machines_own_and_its_clouds_addresses_are_never_asked(address: str) -> None:
    assert refuse_address(parse_ip(address)) is not None


@pytest.mark.parametrize(
    "address", ["10.0.0.1", "172.16.0.1", "192.168.1.1", "100.64.0.1", "1.1.1.1", "fd00::1", "2001:db8::1", "64:ff9b::a00:1"]
)
def test_addresses_of_the_mesh_and_the_world_are(address: str) -> None:
    assert refuse_address(parse_ip(address)) is None


# Answers


def fetched(serve: Serve, *, limit: int = 1000, within: float = 5.0, url: str = "http://id.example/keys") -> bytes:
    """What a server's end of a connection makes of a fetch."""

    async def main() -> bytes:
        ours, theirs = memory_stream_pair()

        async def dial(target: Target) -> trio.abc.Stream:
            return ours

        async def run() -> None:
            try:
                await serve(theirs)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            try:
                return await fetch(url, limit=limit, within=within, dial=dial)
            finally:
                nursery.cancel_scope.cancel()

    try:
        return trio.run(main, clock=MockClock(autojump_threshold=0))
    except ExceptionGroup as group:  # not except*, out of which Python 3.11.2 raises nothing but groups
        matched, rest = group.split(OutboundError)
        if matched is None or rest is not None:
            raise
        raise matched.exceptions[0] from None


def answering(data: bytes, *, close: bool = True) -> Serve:
    async def serve(stream: trio.abc.Stream) -> None:
        await stream.receive_some(65536)
        await stream.send_all(data)
        if close:
            await stream.aclose()
        else:
            await trio.sleep_forever()

    return serve


OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"


def test_a_body_is_fetched_with_a_plain_request() -> None:
    requests: list[bytes] = []

    async def serve(stream: trio.abc.Stream) -> None:
        requests.append(bytes(await stream.receive_some(65536)))
        await stream.send_all(OK)

    assert fetched(serve, url="http://id.example:8080/keys?a=b") == b"{}"
    head = requests[0].split(b"\r\n")
    assert head[0] == b"GET /keys?a=b HTTP/1.1"
    assert b"Host: id.example:8080" in head or b"host: id.example:8080" in head


def test_chunks_and_bodies_up_to_the_end_are_read() -> None:
    assert fetched(answering(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n")) == b"{}"
    assert fetched(answering(b"HTTP/1.0 200 OK\r\n\r\n{}")) == b"{}"
    assert fetched(answering(b"HTTP/1.1 103 Early\r\n\r\n" + OK)) == b"{}"


@pytest.mark.parametrize(
    ("serve", "reason"),
    [
        (answering(b"HTTP/1.1 302 Found\r\nlocation: http://169.254.169.254/\r\ncontent-length: 0\r\n\r\n"), "302.*not followed"),
        (answering(b"HTTP/1.1 500 No\r\ncontent-length: 0\r\n\r\n"), "500"),
        (answering(b"HTTP/1.1 204 No\r\n\r\n"), "204"),
        (answering(b"garbage\r\n\r\n"), "no HTTP"),
        (answering(b""), "no HTTP"),
        (answering(b"HTTP/1.1 200 OK\r\ncontent-length: 50\r\n\r\n{}"), "no HTTP"),
        (answering(b"HTTP/1.1 200 OK\r\ncontent-length: 5000\r\n\r\n" + b"x" * 5000), "larger than 1000"),
        (
            answering(
                b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + b"1f4\r\n" + b"x" * 500 + b"\r\n" + b"fff\r\n" + b"x" * 4095
            ),
            "larger than 1000",
        ),
        (answering(b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 20_000), "no HTTP"),
        (answering(b"HTTP/1.1 103 Early\r\n\r\n" * 50), "without end"),
        (answering(OK[:20], close=False), "within 5 s"),
        (answering(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n{}", close=False), "within 5 s"),
    ],
)
def test_an_answer_that_is_none_ends_in_its_reason(serve: Serve, reason: str) -> None:
    with pytest.raises(OutboundError, match=reason):
        fetched(serve)


def test_a_server_that_dribbles_is_given_up_in_time() -> None:
    async def serve(stream: trio.abc.Stream) -> None:
        await stream.send_all(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n")
        for _ in range(1000):
            await trio.sleep(1)
            await stream.send_all(b"x")

    with pytest.raises(OutboundError, match="within 5 s"):
        fetched(serve)


@given(st.binary(max_size=200))
@settings(max_examples=60)
def test_no_bytes_of_a_server_do_anything_but_fail(data: bytes) -> None:
    for answer in (
        data,
        b"HTTP/1.1 " + data,
        b"HTTP/1.1 200 OK\r\n" + data,
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + data,
    ):
        try:
            fetched(answering(answer))
        except OutboundError:
            pass


def test_a_connection_is_used_again_only_when_nothing_is_left_on_it() -> None:
    async def main() -> list[bool]:
        reusable = []
        for extra in (b"", b"HTTP/1.1 200 OK\r\n", b"x"):
            ours, theirs = memory_stream_pair()
            await theirs.send_all(OK + extra)
            connection = HttpConnection(ours)
            await connection.exchange(b"GET", b"/", [(b"host", b"a")], b"", 100)
            reusable.append(connection.reuse())
        return reusable

    assert trio.run(main) == [True, False, False]


def test_a_header_that_cannot_be_written_is_not_sent() -> None:
    async def main() -> None:
        ours, _ = memory_stream_pair()
        with pytest.raises(h11.LocalProtocolError):
            await HttpConnection(ours).exchange(b"GET", b"/", [(b"host", b"a"), (b"x", b"a\r\nb: c")], b"", 100)

    trio.run(main)


# Dialling


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "localhost", "0.0.0.0", "127.1", "2130706433", "0x7f000001"])
def test_a_loopback_server_is_not_reached_by_any_name(host: str) -> None:
    async def main() -> None:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listeners[0].socket.getsockname()[1]
        with pytest.raises(OutboundError, match=r"loopback|unspecified|resolved|address"):
            await fetch(f"http://{host}:{port}/", limit=10, within=5)
        with trio.move_on_after(0.05) as scope:
            await listeners[0].accept()
        assert scope.cancelled_caught
        await listeners[0].aclose()

    trio.run(main)


def test_a_name_that_means_nothing_is_said_so() -> None:
    with pytest.raises(OutboundError, match=r"no-such-name\.invalid"):
        trio.run(lambda: Dialler()(Target(False, "no-such-name.invalid", 80, "/")))


def test_nobody_listening_is_said_so() -> None:
    async def main() -> None:
        with pytest.raises(OutboundError, match="no connection to 127"):
            await Dialler(refuse=permit_any)(Target(False, "127.0.0.1", 1, "/"))

    trio.run(main)


@pytest.mark.parametrize(("name", "trusted"), [("localhost", True), ("localhost", False), ("other.example", True)])
def test_a_certificate_must_verify_and_name_the_server(tmp_path: Path, name: str, trusted: bool) -> None:
    serving = write_serving_certificate(tmp_path, name)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(serving.chain, serving.key)
    roots = verifying_context(serving.root_pem) if trusted else None

    async def serve(stream: trio.SSLStream[trio.SocketStream]) -> None:
        try:
            await stream.receive_some(65536)
            await stream.send_all(OK)
        except (trio.BrokenResourceError, ssl.SSLError):
            pass

    async def main() -> bytes:
        async with trio.open_nursery() as nursery:
            listeners = await nursery.start(partial(trio.serve_ssl_over_tcp, serve, 0, server, host="127.0.0.1"))
            port = listeners[0].transport_listener.socket.getsockname()[1]
            try:
                dial = Dialler(refuse=permit_any, tls=roots)
                return await fetch(f"https://localhost:{port}/", limit=10, within=5, dial=dial)
            finally:
                nursery.cancel_scope.cancel()

    if name == "localhost" and trusted:
        assert trio.run(main) == b"{}"
        return
    with pytest.RaisesGroup(pytest.RaisesExc(OutboundError, match="certificate")):
        trio.run(main)

import json
import socket

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.linux.unix_sockets import unix_address
from mesh.runtime import http
from mesh.runtime.http import BindError, Request, Response, Route, bound_addresses, open_listeners, serve_admin, unix_listener


async def _echo(request: Request) -> Response:
    return Response.json({"method": request.method, "query": dict(request.query), "body": request.body.decode()})


async def _broken(request: Request) -> Response:
    raise RuntimeError("boom")


ROUTES = {
    "/echo": Route(_echo, frozenset({"GET", "HEAD", "POST"})),
    "/logging": Route(_echo, frozenset({"POST"}), usage="usage: POST /logging?level=debug"),
    "/broken": Route(_broken),
}


def _converse(*chunks: bytes, clock=None) -> bytes:
    """All that one connection answers to these bytes, up to the server's close (or ours, once it has answered everything)."""

    async def main() -> bytes:
        client, server = trio.testing.memory_stream_pair()
        received = bytearray()

        async def serve() -> None:
            with trio.CancelScope():
                try:
                    await http._Connection(server, ROUTES).serve()
                except (trio.TooSlowError, trio.BrokenResourceError):
                    pass
                await server.aclose()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            for chunk in chunks:
                await client.send_all(chunk)
                await trio.testing.wait_all_tasks_blocked()
            if clock is None:
                await client.send_stream.aclose()
            async for data in client.receive_stream:
                received.extend(data)
        return bytes(received)

    return trio.run(main, clock=clock)


def _parts(answer: bytes) -> tuple[int, dict[str, str], bytes]:
    head, _, body = answer.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    return int(lines[0].split()[1]), dict(line.lower().split(": ", 1) for line in lines[1:]), body


def test_a_request_is_routed_with_its_decoded_query():
    status, headers, body = _parts(_converse(b"GET /echo?level=a%3Ddebug&reset HTTP/1.1\r\nhost: x\r\n\r\n"))
    assert status == 200
    assert headers["content-type"] == "application/json"
    assert json.loads(body) == {"method": "GET", "query": {"level": "a=debug", "reset": ""}, "body": ""}


def test_a_head_request_is_answered_without_body():
    status, headers, body = _parts(_converse(b"HEAD /echo HTTP/1.1\r\nhost: x\r\n\r\n"))
    assert (status, body) == (200, b"")
    assert int(headers["content-length"]) > 0


def test_an_unknown_path_is_404_and_a_wrong_method_405_with_its_usage():
    assert _parts(_converse(b"GET /nothing HTTP/1.1\r\nhost: x\r\n\r\n"))[0] == 404
    status, headers, body = _parts(_converse(b"GET /logging HTTP/1.1\r\nhost: x\r\n\r\n"))
    assert (status, headers["allow"], body) == (405, "post", b"usage: POST /logging?level=debug\n")


def test_a_defect_of_a_page_is_500_and_the_connection_serves_on():
    answer = _converse(b"GET /broken HTTP/1.1\r\nhost: x\r\n\r\n", b"POST /echo HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\nhi")
    assert answer.count(b"HTTP/1.1 500") == 1
    assert answer.count(b"HTTP/1.1 200") == 1
    assert b"boom" not in answer


def test_pipelined_requests_are_answered_in_order():
    answer = _converse(b"GET /echo?n=1 HTTP/1.1\r\nhost: x\r\n\r\nGET /echo?n=2 HTTP/1.1\r\nhost: x\r\n\r\n")
    assert answer.index(b'"n": "1"') < answer.index(b'"n": "2"')


def test_a_header_that_is_too_large_and_a_body_that_is_too_large_are_refused():
    assert _parts(_converse(b"GET /echo HTTP/1.1\r\nhost: x\r\nx: " + b"a" * 3 * http.MAX_HEADER + b"\r\n\r\n"))[0] == 431
    large = b"POST /echo HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n" + b"a" * (http.MAX_BODY + 1)
    assert _parts(_converse(large))[0] == 413


def test_a_header_that_does_not_come_to_its_end_is_given_up_after_two_seconds():
    clock = trio.testing.MockClock(autojump_threshold=0.01)
    assert _converse(b"GET /echo HTTP/1.1\r\nhost", clock=clock) == b""
    assert clock.current_time() >= http.HEADER_TIMEOUT


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200))
def test_noise_is_answered_with_a_client_error_or_nothing(noise):
    answer = _converse(noise)
    assert answer == b"" or answer.startswith((b"HTTP/1.1 4", b"HTTP/1.1 501", b"HTTP/1.1 505"))


async def _get(address: str) -> bytes:
    host, port = address.rsplit(":", 1)
    async with await trio.open_tcp_stream(host.strip("[]"), int(port)) as stream:
        await stream.send_all(b"GET /echo HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        return b"".join([data async for data in stream])


def test_localhost_is_served_in_both_families_and_a_wildcard_in_one_socket():
    async def main():
        for address in ("localhost:0", "127.0.0.1:0", "[::]:0", ":0"):
            listeners = await open_listeners(address)
            async with trio.open_nursery() as nursery:
                await nursery.start(serve_admin, ROUTES, listeners)
                for bound in bound_addresses(listeners):
                    assert b" 200 " in await _get(bound.replace("[::]", "127.0.0.1"))
                nursery.cancel_scope.cancel()

    trio.run(main)


def test_an_address_in_use_or_malformed_is_an_error_that_names_it():
    async def main():
        with socket.create_server(("127.0.0.1", 0)) as taken:
            address = f"127.0.0.1:{taken.getsockname()[1]}"
            with pytest.raises(BindError, match=rf"failed to bind to address {address}: .*in use"):
                await open_listeners(address)
        for bad in ("127.0.0.1", "::1:80", "host:port", ":99999"):
            with pytest.raises(BindError, match="not an address"):
                await open_listeners(bad)
        with pytest.raises(BindError, match=r"no\.such\.host\.invalid"):
            await open_listeners("no.such.host.invalid:80")

    trio.run(main)


def test_a_client_that_disappears_leaves_no_descriptor(tmp_path):
    import os

    async def main():
        listeners = await open_listeners("127.0.0.1:0")
        (address,) = bound_addresses(listeners)
        async with trio.open_nursery() as nursery:
            await nursery.start(serve_admin, ROUTES, listeners)
            await _get(address)
            before = len(os.listdir("/proc/self/fd"))
            for _ in range(20):
                async with await trio.open_tcp_stream("127.0.0.1", int(address.rsplit(":", 1)[1])) as stream:
                    await stream.send_all(b"GET /ec")
            with trio.fail_after(10):
                while len(os.listdir("/proc/self/fd")) > before:  # noqa: ASYNC110 - nothing tells when a descriptor is closed
                    await trio.sleep(0.01)
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_a_socket_file_is_its_owners_alone_and_goes_with_its_server(tmp_path):
    path = tmp_path / "run" / ("x" * 90) / "admin.sock"  # longer than the kernel's addresses

    async def main():
        with unix_listener(path) as listener:
            assert path.stat().st_mode & 0o777 == 0o600
            async with trio.open_nursery() as nursery:
                await nursery.start(serve_admin, ROUTES, [listener])
                sock = socket.socket(socket.AF_UNIX)
                with unix_address(path) as address:
                    sock.connect(address)
                sock.setblocking(False)
                async with trio.SocketStream(trio.socket.from_stdlib_socket(sock)) as stream:
                    await stream.send_all(b"GET /echo HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
                    assert b" 200 " in b"".join([data async for data in stream])
                nursery.cancel_scope.cancel()
        assert list(path.parent.iterdir()) == []

    trio.run(main)


def test_a_server_that_ends_leaves_its_successors_socket_file_alone(tmp_path):
    path = tmp_path / "admin.sock"

    async def main():
        with unix_listener(path), unix_listener(tmp_path / "other.sock") as successor:
            (tmp_path / "other.sock").rename(path)
            del successor
        assert path.exists()

    trio.run(main)


def test_a_place_without_room_for_a_socket_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BindError, match=r"failed to listen at .*/file/admin.sock: "), unix_listener(tmp_path / "file" / "admin.sock"):
        pass

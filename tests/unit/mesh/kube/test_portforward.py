"""A port of a pod is reached through the API server as if it were next door, and every way to fail says what happened."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing
from wsproto import ConnectionType, WSConnection
from wsproto.events import BytesMessage

from mesh.kube.api import ApiClient, ApiError, ApiUnavailable
from mesh.kube.kubeconfig import ClusterAccess
from mesh.kube.portforward import MAX_MESSAGE, PodPort, open_port
from mesh.testing.kube import FakeApiServer


async def echo(stream: trio.abc.Stream) -> None:
    """Says everything back, in capitals, until it has heard a full stop."""
    while data := await stream.receive_some(65536):
        await stream.send_all(bytes(data).upper())
        if b"." in data:
            break
    await stream.aclose()


def run(test: Callable[[FakeApiServer, ApiClient], Awaitable[None]], token: str = "") -> None:
    async def main() -> None:
        server = FakeApiServer()
        server.put({"kind": "Pod", "metadata": {"name": "web", "namespace": "shop"}})
        server.ports["shop", "web", 80] = echo
        client = ApiClient(ClusterAccess("kubernetes", 443, tls=False, token=token), connect=server.connect)
        async with trio.open_nursery() as nursery:
            await nursery.start(server.run)
            with trio.fail_after(20):
                await test(server, client)
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_bytes_go_both_ways_and_the_end_is_seen() -> None:
    async def check(server: FakeApiServer, client: ApiClient) -> None:
        async with await open_port(client, "shop", "web", 80) as stream:
            await stream.send_all(b"hello")
            assert await stream.receive_some(2) == b"HE"
            assert await stream.receive_some() == b"LLO"
            await stream.send_all(b"x" * 200_000 + b".")
            received = b""
            while data := await stream.receive_some():
                received += data
            assert received == b"X" * 200_000 + b"."
        assert server.requests[-1].path == "/api/v1/namespaces/shop/pods/web/portforward"
        assert server.requests[-1].query == {"ports": "80"}

    run(check)


def test_the_request_proves_who_we_are() -> None:
    async def check(server: FakeApiServer, client: ApiClient) -> None:
        server.accepted_tokens = {"secret"}
        async with await open_port(client, "shop", "web", 80) as stream:
            await stream.send_all(b".")
            assert await stream.receive_some() == b"."

    run(check, token="secret")


def test_a_port_nobody_listens_on_is_told_with_the_kubelets_words() -> None:
    async def check(server: FakeApiServer, client: ApiClient) -> None:
        async with await open_port(client, "shop", "web", 81) as stream:
            with pytest.raises(trio.BrokenResourceError, match="error forwarding port 81: connection refused"):
                await stream.receive_some()

    run(check)


def test_a_refusal_keeps_the_api_servers_words() -> None:
    async def check(server: FakeApiServer, client: ApiClient) -> None:
        with pytest.raises(ApiError, match='pods "nobody" not found') as caught:
            await open_port(client, "shop", "nobody", 80)
        assert caught.value.status == 404
        server.accepted_tokens = set()
        with pytest.raises(ApiError, match="Unauthorized"):
            await open_port(client, "shop", "web", 80)

    run(check)


@pytest.mark.parametrize("cut", [1, 20, 80])
def test_a_server_that_breaks_off_is_unavailable_and_leaves_no_connection(cut: int) -> None:
    async def check(server: FakeApiServer, client: ApiClient) -> None:
        server.accepted_tokens = set()
        server.faults.cuts = [cut]
        with pytest.raises(ApiUnavailable):
            await open_port(client, "shop", "web", 80)

    run(check)


def test_messages_of_unknown_channels_and_endless_ones_end_the_connection() -> None:
    async def check() -> None:
        ours, _ = trio.testing.memory_stream_pair()
        port = PodPort(ours, WSConnection(ConnectionType.CLIENT))
        with pytest.raises(trio.BrokenResourceError, match="channel 7"):
            await port._take(BytesMessage(data=bytearray(b"\x07xx"), message_finished=True))
        await port._take(BytesMessage(data=bytearray(MAX_MESSAGE), message_finished=False))
        with pytest.raises(trio.BrokenResourceError, match="more than 4 MiB"):
            await port._take(BytesMessage(data=bytearray(b"x"), message_finished=False))

    trio.run(check)

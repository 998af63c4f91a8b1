"""The client against an API server of our own: verbs, errors in the server's words, tokens, pauses, broken connections, bounds."""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from functools import partial
from pathlib import Path

import h11
import pytest
import trio
from trio.testing import MockClock, memory_stream_pair

from mesh.kube import api
from mesh.kube.api import ApiClient, ApiError, ApiUnavailable, decode_object
from mesh.kube.kubeconfig import ClusterAccess
from mesh.kube.resources import CONFIG_MAPS, RESOURCES
from mesh.testing.kube import FakeApiServer
from mesh.testing.serving import write_serving_certificate

ACCESS = ClusterAccess("kubernetes", 443, tls=False)
PODS = RESOURCES["Pod"]


def run(test: Callable[[FakeApiServer, ApiClient], Awaitable[None]], access: ClusterAccess = ACCESS) -> None:
    async def main() -> None:
        server = FakeApiServer()
        async with trio.open_nursery() as nursery:
            await nursery.start(server.run)
            client = ApiClient(access, connect=server.connect)
            with trio.fail_after(1000):
                await test(server, client)
            await client.aclose()
            nursery.cancel_scope.cancel()

    trio.run(main, clock=MockClock(autojump_threshold=0))


async def watch_to_the_end(client: ApiClient, version: str) -> None:
    async with aclosing(client.watch(CONFIG_MAPS.collection(), {"resourceVersion": version}, stall=60)) as events:
        async for _ in events:
            pass


def config_map(name: str = "one") -> dict[str, object]:
    return {"kind": "ConfigMap", "apiVersion": "v1", "metadata": {"name": name, "namespace": "shop"}, "data": {"a": "b"}}


def test_an_object_is_made_read_changed_and_deleted() -> None:
    async def check(server: FakeApiServer, client: ApiClient) -> None:
        path = CONFIG_MAPS.path("shop", "one")
        assert await client.find(path) is None
        made = await client.create(CONFIG_MAPS.collection("shop"), config_map())
        assert made["data"] == {"a": "b"}
        with pytest.raises(ApiError, match="already exists") as caught:
            await client.create(CONFIG_MAPS.collection("shop"), config_map())
        assert (caught.value.status, caught.value.reason) == (409, "AlreadyExists")
        await client.merge_patch(path, {"data": {"a": None, "c": "d"}})
        assert (await client.get(path))["data"] == {"c": "d"}
        with pytest.raises(ApiError, match="modified"):
            await client.replace(path, made)
        await client.apply(path, config_map(), manager="m")
        assert server.requests[-1].query == {"fieldManager": "m", "force": "true"}
        await client.delete(path)
        with pytest.raises(ApiError, match=r'configmaps "one" not found \(404 NotFound\)'):
            await client.get(path)

    run(check)


def test_a_long_list_comes_in_pages_of_one_moment() -> None:
    async def check(server: FakeApiServer, client: ApiClient) -> None:
        for index in range(5):
            server.put(config_map(f"m{index}"))
        first = await client.list_page(CONFIG_MAPS.collection(), {}, 2)
        server.remove("ConfigMap", "shop", "m4")
        second = await client.list_page(CONFIG_MAPS.collection(), {}, 2, first.token)
        third = await client.list_page(CONFIG_MAPS.collection(), {}, 2, second.token)
        names = [decode_object(item)["metadata"]["name"] for page in (first, second, third) for item in page.items]
        assert names == ["m0", "m1", "m2", "m3", "m4"]
        assert third.token == ""

    run(check)


def test_connections_are_used_again_and_replaced_when_the_server_closed_them() -> None:
    async def check(server: FakeApiServer, client: ApiClient) -> None:
        connections = 0

        async def connect() -> trio.abc.Stream:
            nonlocal connections
            connections += 1
            return await server.connect()

        client = ApiClient(ACCESS, connect=connect)
        for _ in range(5):
            await client.find(CONFIG_MAPS.path("shop", "one"))
        assert connections == 1
        server.faults.hangs_up = True
        for _ in range(3):
            await client.find(CONFIG_MAPS.path("shop", "one"))
        assert connections == 3

    run(check)


def test_a_refused_token_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("old")

    async def check(server: FakeApiServer, client: ApiClient) -> None:
        server.accepted_tokens = {"old"}
        await client.find(CONFIG_MAPS.path("shop", "one"))
        file.write_text("new")
        server.accepted_tokens = {"new"}
        await client.find(CONFIG_MAPS.path("shop", "one"))
        server.accepted_tokens = set()
        with pytest.raises(ApiError, match="Unauthorized"):
            await client.find(CONFIG_MAPS.path("shop", "one"))

    run(check, ClusterAccess("kubernetes", 443, tls=False, token_file=file))


def test_too_many_requests_wait_as_long_as_the_server_says() -> None:
    async def check(server: FakeApiServer, client: ApiClient) -> None:
        server.faults.refusals = [(429, "TooManyRequests", {"retry-after": "7"}), (429, "TooManyRequests", {"retry-after": "99999"})]
        before = trio.current_time()
        await client.find(CONFIG_MAPS.path("shop", "one"))
        assert trio.current_time() - before == 7 + api.MAX_WAIT

    run(check)


@pytest.mark.parametrize("answer", [b"SSH-2.0\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n[[[", b"HTTP/1.1 200 OK\r\n", b""])
def test_what_is_no_api_server_is_said_to_be_unavailable(answer: bytes) -> None:
    async def check(server: FakeApiServer, client: ApiClient) -> None:
        async def connect() -> trio.abc.Stream:
            ours, theirs = memory_stream_pair()
            await ours.send_all(answer)
            await ours.send_eof()
            return theirs

        with pytest.raises(ApiUnavailable):
            await ApiClient(ACCESS, connect=connect).get("/api/v1/pods")

    run(check)


def test_a_silent_server_is_given_up() -> None:
    async def check(server: FakeApiServer, client: ApiClient) -> None:
        async def connect() -> trio.abc.Stream:
            return kept.setdefault("stream", memory_stream_pair())[1]  # our end stays open

        kept: dict[str, tuple[trio.abc.Stream, trio.abc.Stream]] = {}
        with pytest.raises(ApiUnavailable, match="in time"):
            await ApiClient(ACCESS, connect=connect).get("/api/v1/pods")
        server.faults.down = True
        with pytest.raises(ApiUnavailable, match="can't be reached"):
            await client.get("/api/v1/pods")

    run(check)


def test_a_watch_brings_events_and_an_expired_one_says_so() -> None:
    async def check(server: FakeApiServer, client: ApiClient) -> None:
        version = server.put(config_map())["metadata"]["resourceVersion"]
        server.put(config_map("two"))
        server.remove("ConfigMap", "shop", "one")
        types = []
        async with aclosing(client.watch(CONFIG_MAPS.collection(), {"resourceVersion": version}, stall=60)) as events:
            async for event in events:
                types.append(event.type)
                if len(types) == 2:
                    break
        assert types == ["ADDED", "DELETED"]
        server.compact()
        with pytest.raises(ApiError) as caught:
            await watch_to_the_end(client, version)
        assert caught.value.expired

    run(check)


def test_an_endless_line_of_a_watch_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "MAX_EVENT", 1000)

    async def check(server: FakeApiServer, client: ApiClient) -> None:
        server.put(config_map("x" * 2000))
        with pytest.raises(ApiUnavailable, match="larger than"):
            await watch_to_the_end(client, "100")

    run(check)


def test_over_tls_the_server_must_prove_its_name(tmp_path: Path) -> None:
    serving = write_serving_certificate(tmp_path, "127.0.0.1")

    async def main() -> None:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(serving.chain, serving.key)
        listeners = await trio.open_ssl_over_tcp_listeners(0, context, host="127.0.0.1", https_compatible=True)
        port = listeners[0].transport_listener.socket.getsockname()[1]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(trio.serve_listeners, _answer_once, listeners))
            good = ClusterAccess("127.0.0.1", port, ca_pem=serving.root_pem.encode())
            with trio.fail_after(20):
                assert await ApiClient(good).get("/version") == {}
                other = ClusterAccess("127.0.0.1", port, ca_pem=serving.root_pem.encode(), server_name="kubernetes.default")
                with pytest.raises(ApiUnavailable, match="Hostname mismatch"):
                    await ApiClient(other).get("/version")
            nursery.cancel_scope.cancel()

    trio.run(main)


async def _answer_once(stream: trio.abc.Stream) -> None:
    http = h11.Connection(h11.SERVER)
    try:
        while not isinstance(event := http.next_event(), h11.EndOfMessage):
            if event is h11.NEED_DATA:
                http.receive_data(bytes(await stream.receive_some()))
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
    except (trio.BrokenResourceError, h11.ProtocolError):
        pass

"""Clients and servers that others wrote, through a waypoint: curl, h2load, nghttpd, grpcio."""

from __future__ import annotations

import re
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from concurrent import futures
from contextlib import asynccontextmanager
from functools import partial

import grpc
import pytest
import trio

from mesh.model.address import SocketAddress
from mesh.model.l7.matching import Exact, PathKind, PathMatch, RouteMatch
from mesh.model.l7.policy import Attribute, AuthorizationPolicy, PolicyAction, PolicyRule, Predicate
from mesh.model.l7.routing import Origin
from mesh.model.l7.waypoint import Protocol
from mesh.testing.proxies import EgressProxy
from mesh.tls.contexts import hbone_context
from tests.unit.waypoint_py.harness import CA, CLIENT, HOST, VIP, Echo, Echo2, World, default_route, loopback

pytestmark = pytest.mark.interop


def _agent(world: World, target: str = str(VIP)) -> EgressProxy:
    """A client pod's agent: what connects to its address is in the waypoint's hands."""
    listening = socket.create_server((str(loopback()), 0))
    world._agents.append(listening)
    return EgressProxy(world.reactor, listening, hbone_context(CA.issue(CLIENT)), world.address, target)


async def _run(*command: str) -> str:
    done = await trio.run_process(command, capture_stdout=True, stderr=subprocess.STDOUT, check=False)
    return done.stdout.decode()


@pytest.mark.parametrize("version", ["--http1.1", "--http2-prior-knowledge"])
def test_curl(version: str) -> None:
    world = World()

    async def main() -> None:
        async with world.application(Echo()) as address:
            world.describe(world.endpoint(address))
            deny = PolicyRule(operations=((Predicate(Attribute.METHOD, texts=(Exact("DELETE"),)),),))
            world.push(AuthorizationPolicy(Origin("AuthorizationPolicy", "shop", "deny"), PolicyAction.DENY, rules=(deny,)))
            agent = _agent(world)
            url = f"http://{agent.address}"
            curl = partial(_run, "curl", "-s", version, "--max-time", "10")
            # curl 7.88 fails with a second request by HTTP/2 with prior knowledge, whoever serves it.
            urls = [f"{url}/a", f"{url}/b"] if version == "--http1.1" else [f"{url}/a"]
            assert await curl(*urls) == "".join(f"GET /{each[-1]}\n" for each in urls)
            assert await curl("-d", "x" * 100_000, f"{url}/post") == "POST /post\n" + "x" * 100_000
            assert await curl("-X", "DELETE", f"{url}/a") == "RBAC: access denied"
            head = await curl("-I", f"{url}/a")
            assert "server: istio-envoy" in head
            expect = await curl("-H", "Expect: 100-continue", "-d", "y" * 10, f"{url}/expect")
            assert expect == "POST /expect\n" + "y" * 10
            agent.close()

    world.run(main)


@pytest.mark.parametrize("upstream", [1, 2])
def test_h2load_loses_nothing(upstream: int) -> None:
    world = World()

    async def main() -> None:
        echo: Echo | Echo2 = Echo() if upstream == 1 else Echo2()
        async with world.application(echo) as address:
            world.describe(world.endpoint(address), protocol=Protocol.HTTP if upstream == 1 else Protocol.HTTP2)
            agent = _agent(world)
            report = await _run("h2load", "-n", "1000", "-c", "10", "-m", "10", f"http://{agent.address}/load")
            assert "1000 succeeded, 0 failed, 0 errored, 0 timeout" in report
            report = await _run("h2load", "--h1", "-n", "500", "-c", "10", f"http://{agent.address}/load")
            assert "500 succeeded, 0 failed, 0 errored, 0 timeout" in report
            assert len(world.log.requests) == 1500
            agent.close()

    world.run(main)


class _Cart(grpc.GenericRpcHandler):
    """A gRPC service whose messages are bytes."""

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        def double(request: bytes, context: grpc.ServicerContext) -> bytes:
            context.set_trailing_metadata((("x-trailer", "t"),))
            return request * 2

        def count(request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
            for number in range(int(request)):
                yield b"%d" % number

        def chat(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
            for request in requests:
                yield b"re: " + request

        def fails(request: bytes, context: grpc.ServicerContext) -> bytes:
            context.abort(grpc.StatusCode.NOT_FOUND, "no such cart: 50%")
            raise AssertionError

        def total(requests: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
            return b"%d" % sum(map(len, requests))

        match details.method:
            case "/shop.Cart/Double":
                return grpc.unary_unary_rpc_method_handler(double)
            case "/shop.Cart/Count":
                return grpc.unary_stream_rpc_method_handler(count)
            case "/shop.Cart/Chat":
                return grpc.stream_stream_rpc_method_handler(chat)
            case "/shop.Cart/Fails":
                return grpc.unary_unary_rpc_method_handler(fails)
            case "/shop.Cart/Total":
                return grpc.stream_unary_rpc_method_handler(total)
        return None


@asynccontextmanager
async def _grpc_server() -> AsyncIterator[SocketAddress]:
    server = grpc.server(futures.ThreadPoolExecutor(8))
    server.add_generic_rpc_handlers((_Cart(),))
    ip = loopback()
    port = server.add_insecure_port(f"{ip}:0")
    server.start()
    try:
        yield SocketAddress(ip, port)
    finally:
        await trio.to_thread.run_sync(server.stop(None).wait)


def test_grpcio_at_both_ends() -> None:
    world = World()

    def talk(target: str) -> None:
        with grpc.insecure_channel(target, options=(("grpc.default_authority", HOST),)) as channel:
            double = channel.unary_unary("/shop.Cart/Double")
            answer, call = double.with_call(b"ab" * 50_000, timeout=10)
            assert answer == b"ab" * 100_000
            assert dict(call.trailing_metadata())["x-trailer"] == "t"
            assert [*channel.unary_stream("/shop.Cart/Count")(b"500", timeout=10)] == [b"%d" % number for number in range(500)]
            assert [*channel.stream_stream("/shop.Cart/Chat")(iter([b"a", b"b"]), timeout=10)] == [b"re: a", b"re: b"]
            assert channel.stream_unary("/shop.Cart/Total")(iter([b"x" * 100_000] * 20), timeout=10) == b"2000000"
            for method, status, details in (
                ("/shop.Cart/Fails", grpc.StatusCode.NOT_FOUND, "no such cart: 50%"),
                ("/shop.Cart/Secret", grpc.StatusCode.PERMISSION_DENIED, "RBAC: access denied"),
                ("/other.Service/Any", grpc.StatusCode.UNIMPLEMENTED, ""),
            ):
                with pytest.raises(grpc.RpcError) as caught:
                    channel.unary_unary(method)(b"", timeout=10)
                assert (caught.value.code(), caught.value.details()) == (status, details)  # a call is its error

    async def main() -> None:
        async with _grpc_server() as address:
            match = RouteMatch(path=PathMatch(PathKind.PREFIX, "/shop.Cart/"))
            world.describe(world.endpoint(address), protocol=Protocol.GRPC, routes=[default_route(matches=(match,))])
            paths = (PathMatch(PathKind.EXACT, "/shop.Cart/Secret"),)
            rule = PolicyRule(operations=((Predicate(Attribute.PATH, paths=paths),),))
            world.push(AuthorizationPolicy(Origin("AuthorizationPolicy", "shop", "secret"), PolicyAction.DENY, rules=(rule,)))
            agent = _agent(world)
            await trio.to_thread.run_sync(talk, str(agent.address))
            by_method = {record.path: record for record in world.log.requests}
            assert by_method[b"/shop.Cart/Count"].response_messages == 500
            assert by_method[b"/shop.Cart/Total"].request_messages == 20
            assert by_method[b"/shop.Cart/Fails"].grpc_status == 5
            assert by_method[b"/other.Service/Any"].details == "route_not_found"
            agent.close()

    world.run(main)


def test_nghttpd_is_an_application_like_any() -> None:
    world = World()

    async def main() -> None:
        ip = loopback()
        with socket.create_server((str(ip), 0)) as free:
            port = free.getsockname()[1]
        async with trio.open_nursery() as nursery:
            command = ["nghttpd", "--no-tls", "-a", str(ip), "-d", "/etc", str(port)]
            process = await nursery.start(partial(trio.run_process, command, check=False, capture_stdout=True))
            world.describe(world.endpoint(SocketAddress(ip, port)), protocol=Protocol.HTTP2)
            agent = _agent(world)
            await trio.sleep(0.3)
            text = await _run("curl", "-s", "--max-time", "10", f"http://{agent.address}/passwd")
            assert re.search(r"^root:", text, re.MULTILINE)
            process.terminate()
            agent.close()

    world.run(main)

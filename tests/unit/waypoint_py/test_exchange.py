"""Requests through a waypoint, from a client's tunnel to an application and back."""

from __future__ import annotations

import gc
import re

import pytest
import trio
from msgspec.structs import replace

from mesh.model.l7.matching import Exact, PathKind, PathMatch, RouteMatch
from mesh.model.l7.policy import Attribute, AuthorizationPolicy, PolicyAction, PolicyRule, Predicate
from mesh.model.l7.routing import (
    Cors,
    Destination,
    DirectResponse,
    Fault,
    Forward,
    HeaderChanges,
    Mirror,
    Origin,
    Redirect,
    Retry,
    Rewrite,
    WeightedDestination,
)
from mesh.model.l7.waypoint import PathNormalization, Protocol, WaypointSettings
from mesh.state.store import Delta
from mesh.xds.l7 import SERVICE_CONFIG
from tests.unit.waypoint_py.harness import (
    CLIENT,
    HANDSHAKE,
    HOST,
    ITSELF,
    KEY,
    Answer,
    Echo,
    Echo2,
    H1Client,
    Seen,
    World,
    default_route,
    loopback,
    websocket_echo,
)
from waypoint_py.attempt import Attempt
from waypoint_py.exchange import Exchange
from waypoint_py.upstream.client import Call
from waypoint_py.verdict import Flag

BEFORE_HEADERS = "upstream connect error or disconnect/reset before headers."
GRPC = {"content-type": "application/grpc", "te": "trailers"}


def _message(data: bytes) -> bytes:
    return b"\0" + len(data).to_bytes(4, "big") + data


# Versions of HTTP on both sides


def test_requests_follow_each_other_on_one_connection_and_share_one_upstream() -> None:
    world = World()

    async def main() -> None:
        echo = Echo()
        async with world.application(echo) as address:
            world.describe(world.endpoint(address))
            client = await world.client()
            for number in range(5):
                answer = await client.get(f"/{number}", "POST", b"hello")
                assert (answer.status, answer.text) == (200, f"POST /{number}\nhello")
            assert echo.connections == 1
            assert [record.status for record in world.log.requests] == [200] * 5
            record = world.log.requests[0]
            assert (record.bytes_received, record.bytes_sent, record.details, record.attempts) == (5, 13, "via_upstream", 1)
            assert record.upstream_cluster == f"inbound-vip|80|http|{HOST}"
            assert record.upstream_host == address

    world.run(main)


@pytest.mark.parametrize("upstream", [1, 2])
@pytest.mark.parametrize("downstream", [1, 2])
def test_either_version_is_carried_by_either(downstream: int, upstream: int) -> None:
    world = World()

    async def main() -> None:
        echo: Echo | Echo2 = Echo() if upstream == 1 else Echo2()
        async with world.application(echo) as address:
            world.describe(world.endpoint(address), protocol=Protocol.HTTP if upstream == 1 else Protocol.HTTP2)
            for body in (b"", b"hello", b"x" * 3_000_000):
                if downstream == 1:
                    answer = await (await world.client()).get("/a?b", "PUT", body)
                else:
                    answer = await (await world.h2_client()).get("/a?b", "PUT", body)
                assert answer.status == 200
                assert answer.body == b"PUT /a?b\n" + body
            assert [len(seen.body) for seen in echo.seen] == [0, 5, 3_000_000]
            assert {record.version.value for record in world.log.requests} == {"HTTP/2" if downstream == 2 else "HTTP/1.1"}
            assert {record.upstream_protocol for record in world.log.requests} == {"HTTP/2" if upstream == 2 else "HTTP/1.1"}

    world.run(main)


def test_a_thousand_requests_may_come_at_once_and_be_refused() -> None:
    world = World()

    async def main() -> None:
        async with world.application(Echo()) as address:
            world.describe(world.endpoint(address))
            world.push(_deny("GET"))
            link = await world.link()
            stream, other = await world.open(link=link), await world.client(link=link)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.send_all, b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" * 1000)
                received = b""
                while received.count(b"RBAC: access denied") < 1000:
                    received += await stream.receive_some()
            assert (await other.get("/", "POST", b"x")).status == 200, "others of the same peer go on"

    world.run(main)


def test_many_requests_share_a_connection_of_http2() -> None:
    world = World()

    async def main() -> None:
        echo = Echo2()
        async with world.application(echo) as address:
            world.describe(world.endpoint(address), protocol=Protocol.GRPC)
            client = await world.h2_client()
            streams = [await client.send(f"/{number}", "POST", b"x" * number) for number in range(200)]
            for number, stream in enumerate(streams):
                answer = await client.answer(stream)
                assert answer.body == b"POST /%d\n" % number + b"x" * number
            assert echo.connections <= 2

    world.run(main)


@pytest.mark.parametrize("protocol", [Protocol.AUTO, Protocol.HTTP])
def test_a_client_of_http2_is_understood_wherever_http_is_spoken(protocol: Protocol) -> None:
    world = World()

    async def main() -> None:
        echo: Echo | Echo2 = Echo2() if protocol is Protocol.AUTO else Echo()
        async with world.application(echo) as address:
            world.describe(world.endpoint(address), protocol=protocol)
            assert (await (await world.h2_client()).get("/")).status == 200

    world.run(main)


def test_the_destinations_agent_gets_the_request_in_a_tunnel_with_the_waypoints_own_identity() -> None:
    world = World()

    async def main() -> None:
        echo = Echo()
        async with world.application(echo) as address:
            requests = world.agent(address.ip)
            world.describe(world.endpoint(address, hbone=True))
            client = await world.client()
            assert (await client.get("/")).status == 200
            assert (await client.get("/")).status == 200
            assert [request.authority for request in requests] == [str(address)]
            assert requests[0].headers["x-istio-source"] == "waypoint"

    world.run(main)


def test_a_workload_of_ours_is_reached_by_its_own_address() -> None:
    world = World()

    async def main() -> None:
        echo = Echo()
        async with world.application(echo) as address:
            from tests.unit.waypoint_py.harness import GATEWAY

            # Loopback addresses are out of the question for a real client: the pod has one that is not, and is dialled at it all the same.
            world.describe(world.endpoint(address, "pod", waypoint=GATEWAY))
            assert await world.connect(str(address)) == 403

    world.run(main)


# Headers


def test_a_request_gets_what_every_request_gets_and_loses_what_no_client_may_say() -> None:
    world = World()

    async def main() -> None:
        echo = Echo()
        async with world.application(echo) as address:
            world.describe(world.endpoint(address))
            client = await world.client()
            answer = await client.get(
                headers={
                    "x-envoy-max-retries": "100",
                    "x-envoy-upstream-rq-timeout-ms": "1",
                    "x-forwarded-client-cert": "URI=spiffe://cluster.local/ns/shop/sa/boss",
                    "x-forwarded-for": "192.0.2.1",
                    "forwarded": "for=192.0.2.1",
                    "x-envoy-internal": "true",
                }
            )
            headers = echo.seen[0].headers
            assert re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", headers["x-request-id"])
            assert headers["x-forwarded-proto"] == "http"
            assert headers["host"] == HOST
            assert (headers["x-forwarded-for"], headers["forwarded"]) == ("192.0.2.1", "for=192.0.2.1")
            assert not [name for name in headers if name.startswith("x-envoy-")]
            assert "x-forwarded-client-cert" not in headers
            assert answer.headers["server"] == "istio-envoy"
            assert answer.headers["date"].endswith("GMT")
            assert answer.headers["x-envoy-upstream-service-time"].isdigit()
            await client.get(headers={"x-request-id": "mine", "x-forwarded-proto": "https"})
            assert echo.seen[1].headers["x-request-id"] == "mine"
            assert echo.seen[1].headers["x-forwarded-proto"] == "https"
            world.push(WaypointSettings("shop", "waypoint", "all", include_client_identity=True))
            await client.get(headers={"x-forwarded-client-cert": "URI=spiffe://cluster.local/ns/shop/sa/boss"})
            assert echo.seen[2].headers["x-forwarded-client-cert"] == f"By=spiffe://cluster.local/ns/shop/sa/waypoint;URI={CLIENT}"

    world.run(main)


def test_the_path_is_normalised_before_anybody_looks_at_it() -> None:
    world = World()

    async def main() -> None:
        echo = Echo()
        async with world.application(echo) as address:
            admin = default_route(matches=(RouteMatch(path=PathMatch(PathKind.EXACT, "/admin")),), action=DirectResponse(299, b"admin"))
            world.describe(world.endpoint(address), routes=[admin, default_route()])
            client = await world.client()
            assert (await client.get("/app/%2E./admin?a=%2E.")).status == 299
            await client.get("/app//x#y")
            assert echo.seen[-1].target == "/app//x"
            await client.get("/app//x?y=//")
            assert echo.seen[-1].target == "/app//x?y=//"
            world.push(WaypointSettings("shop", "waypoint", "all", path_normalization=PathNormalization.DECODE_AND_MERGE_SLASHES))
            await client.get("/app%2f/x?y=//")
            assert echo.seen[-1].target == "/app/x?y=//"
            assert (await client.get("/a%00b")).status == 400

    world.run(main)


@pytest.mark.parametrize(
    "raw",
    [
        b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost : a\r\n\r\n",
        b"GET / HTTP/1.1\nHost: a\n\n",
        b"GET /\0 HTTP/1.1\r\nHost: a\r\n\r\n",
        b"CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.0\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"y" * 70_000 + b"\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01",
    ],
)
def test_what_is_no_request_reaches_nobody_and_closes(raw: bytes) -> None:
    world = World()

    async def main() -> None:
        echo = Echo()
        async with world.application(echo) as address:
            world.describe(world.endpoint(address))
            stream = await world.open()
            await stream.send_all(raw)
            received = b""
            while data := await stream.receive_some():
                received += data
            assert re.match(rb"HTTP/1\.1 4[0-9][0-9] ", received)
            assert b"connection: close" in received
            assert not echo.seen
            (record,) = world.log.requests
            assert record.flags == (Flag.DOWNSTREAM_PROTOCOL_ERROR,)
            assert record.status == int(received[9:12])

    world.run(main)


# Bodies


def test_answers_without_a_body_have_none() -> None:
    world = World()

    def respond(seen: Seen) -> tuple[int, dict[str, str], bytes]:
        return int(seen.target[1:]), {"x-a": "b"}, b"body" if seen.target == "/200" else b""

    async def main() -> None:
        async with world.application(Echo(respond)) as address:
            world.describe(world.endpoint(address))
            client = await world.client()
            head = await client.get("/200", "HEAD")
            assert (head.status, head.body, head.headers["content-length"]) == (200, b"", "4")
            assert (await client.get("/204")).body == b""
            assert (await client.get("/304")).body == b""
            assert (await client.get("/200")).body == b"body"
            second = await world.h2_client()
            assert (await second.get("/200", "HEAD")).body == b""
            assert (await second.get("/204")).status == 204

    world.run(main)


def test_chunks_come_out_as_they_went_in_whatever_they_are_cut_into() -> None:
    world = World()

    async def main() -> None:
        echo = Echo()
        async with world.application(echo) as address:
            world.describe(world.endpoint(address))
            client = await world.client()
            answer = await client.get("/", "POST", b"hello", {"transfer-encoding": "chunked"})
            assert answer.text == "POST /\nhello"
            assert echo.seen[0].headers["transfer-encoding"] == "chunked"
            stream = await world.open()
            whole = b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3;x=y\r\nabc\r\nA\r\n0123456789\r\n0\r\n\r\n"
            for at in range(len(whole)):
                await stream.send_all(whole[at : at + 1])
            answer = await H1Client(_asked(stream)).answer()
            assert answer.text == "POST /x\nabc0123456789"

    world.run(main)


def _asked(stream: trio.abc.Stream) -> trio.abc.Stream:
    return stream


def test_a_client_that_waits_for_100_gets_the_applications() -> None:
    world = World()

    async def main() -> None:
        echo = Echo()
        async with world.application(echo) as address:
            world.describe(world.endpoint(address))
            stream = await world.open()
            await stream.send_all(b"POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n")
            assert (await stream.receive_some()).startswith(b"HTTP/1.1 100 ")
            await stream.send_all(b"hello")
            assert (await stream.receive_some()).startswith(b"HTTP/1.1 200 ")
            assert echo.seen[0].body == b"hello"
            world.push(_deny("POST"))
            stream = await world.open()
            await stream.send_all(b"POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n")
            received = await stream.receive_some()
            assert received.startswith(b"HTTP/1.1 403 ")
            assert b"connection: close" in received

    world.run(main)


def test_a_refused_upload_costs_neither_the_connection_nor_the_next_request() -> None:
    world = World()

    async def main() -> None:
        echo = Echo()
        async with world.application(echo) as address:
            world.describe(world.endpoint(address))
            world.push(_deny("POST"))
            client = await world.client()
            assert (await client.get("/", "POST", b"x" * 1000)).status == 403
            assert (await client.get("/")).status == 200
            second = await world.h2_client()
            assert (await second.get("/", "POST", b"x" * 1000)).status == 403
            stream = await second.send("/", "POST", b"x" * 1000, ended=False)
            assert (await second.answer(stream)).status == 403
            assert (await second.get("/")).status == 200

    world.run(main)


# gRPC


def test_grpc_passes_with_its_trailers() -> None:
    world = World()

    def respond(seen: Seen) -> tuple[int, dict[str, str], bytes, dict[str, str] | None]:
        return 200, {"content-type": "application/grpc"}, _message(seen.body[5:]), {"grpc-status": "0", "x-t": "1"}

    async def main() -> None:
        echo = Echo2(respond)
        async with world.application(echo) as address:
            world.describe(world.endpoint(address), protocol=Protocol.GRPC)
            client = await world.h2_client()
            answer = await client.get("/shop.Cart/Add", "POST", _message(b"hello"), GRPC)
            assert (answer.status, answer.body, answer.trailers) == (200, _message(b"hello"), {"grpc-status": "0", "x-t": "1"})
            (record,) = world.log.requests
            assert (record.is_grpc, record.grpc_status, record.request_messages, record.response_messages) == (True, 0, 1, 1)
            stream = await client.send("/shop.Cart/Add", "POST", _message(b"a"), GRPC, trailers={"x-end": "2"})
            await client.answer(stream)
            assert echo.seen[-1].trailers == {"x-end": "2"}

    world.run(main)


def test_a_grpc_client_is_answered_in_grpc() -> None:
    world = World()

    async def main() -> None:
        world.describe(protocol=Protocol.GRPC)
        client = await world.h2_client()
        nobody = await client.get("/shop.Cart/Add", "POST", _message(b"hello"), GRPC)
        assert (nobody.status, nobody.headers["grpc-status"], nobody.headers["grpc-message"]) == (200, "14", "no healthy upstream")
        assert nobody.body == b""
        world.push(_deny("POST"))
        denied = await client.get("/shop.Cart/Add", "POST", _message(b"hello"), GRPC)
        assert (denied.status, denied.headers["grpc-status"], denied.headers["grpc-message"]) == (200, "7", "RBAC: access denied")
        assert [record.grpc_status for record in world.log.requests] == [14, 7]

    world.run(main)


def test_the_clients_grpc_timeout_holds() -> None:
    world = World()

    async def silent(stream: trio.SocketStream) -> None:
        await stream.send_all(b"\0\0\0\4\0\0\0\0\0")
        await trio.sleep_forever()

    async def main() -> None:
        async with world.application(silent) as address:
            world.describe(world.endpoint(address), protocol=Protocol.GRPC)
            client = await world.h2_client()
            answer = await client.get("/shop.Cart/Add", "POST", _message(b"hello"), {**GRPC, "grpc-timeout": "50m"})
            assert (answer.headers["grpc-status"], answer.headers["grpc-message"]) == ("14", "upstream request timeout")

    world.run(main)


# WebSockets


@pytest.mark.parametrize("upstream", [1, 2])
def test_a_websocket_of_http1_is_carried(upstream: int) -> None:
    world = World()

    async def main() -> None:
        handler = websocket_echo if upstream == 1 else Echo2(extended_connect=True)
        async with world.application(handler) as address:
            route = default_route(timeout=0.2)
            world.describe(world.endpoint(address), protocol=Protocol.HTTP if upstream == 1 else Protocol.HTTP2, routes=[route])
            stream = await world.open()
            await stream.send_all(HANDSHAKE)
            head = bytes(await stream.receive_some())
            assert head.startswith(b"HTTP/1.1 101 ")
            assert b"sec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=" in head
            await trio.sleep(0.3)  # longer than the route's time, which is no more
            for number in range(3):
                await stream.send_all(b"frame %d" % number)
                assert await stream.receive_some() == b"frame %d" % number
            await stream.send_eof()
            assert await stream.receive_some() == b""
            await world.until(lambda: world.log.requests)
            assert world.log.requests[0].status == 101

    world.run(main)


@pytest.mark.parametrize("size", [10, 200_000])  # the second is more than is held back before the application has agreed
@pytest.mark.parametrize("upstream", [1, 2])
def test_frames_that_came_with_the_handshake_are_carried_too(upstream: int, size: int) -> None:
    world = World()

    async def main() -> None:
        handler = websocket_echo if upstream == 1 else Echo2(extended_connect=True)
        async with world.application(handler) as address:
            world.describe(world.endpoint(address), protocol=Protocol.HTTP if upstream == 1 else Protocol.HTTP2)
            stream = await world.open()
            frames = b"f" * size
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.send_all, HANDSHAKE + frames)
                received = b""
                while len(received.partition(b"\r\n\r\n")[2]) < len(frames):
                    received += await stream.receive_some()
            assert received.startswith(b"HTTP/1.1 101 ")
            assert received.partition(b"\r\n\r\n")[2] == frames

    world.run(main)


@pytest.mark.parametrize("upstream", [1, 2])
def test_a_websocket_of_http2_is_carried(upstream: int) -> None:
    world = World()

    async def main() -> None:
        handler = websocket_echo if upstream == 1 else Echo2(extended_connect=True)
        async with world.application(handler) as address:
            world.describe(world.endpoint(address), protocol=Protocol.HTTP if upstream == 1 else Protocol.HTTP2)
            client = await world.h2_client()
            stream = await client.send("/chat", "CONNECT", b"", {"sec-websocket-version": "13"}, ended=False, protocol="websocket")
            await world.until(lambda: stream in client.answers)
            assert client.answers[stream].status == 200
            await client.data(stream, b"frame", ended=False)
            await world.until(lambda: client.answers[stream].body == b"frame")
            await client.data(stream, b"", ended=True)
            await client.answer(stream)
            await world.until(lambda: world.log.requests)
            assert world.log.requests[0].status == 101

    world.run(main)


def test_an_upgrade_is_judged_as_any_request() -> None:
    world = World()

    async def main() -> None:
        async with world.application(websocket_echo) as address:
            world.describe(world.endpoint(address))
            world.push(_deny("GET"))
            stream = await world.open()
            await stream.send_all(HANDSHAKE)
            assert (await stream.receive_some()).startswith(b"HTTP/1.1 403 ")

    world.run(main)


def test_an_upgrade_to_something_else_is_an_ordinary_request() -> None:
    world = World()

    async def main() -> None:
        echo = Echo()
        async with world.application(echo) as address:
            world.describe(world.endpoint(address))
            client = await world.client()
            assert (await client.get("/", headers={"connection": "upgrade", "upgrade": "h2c"})).status == 200
            assert "upgrade" not in echo.seen[0].headers

    world.run(main)


# Policy


def _deny(method: str, name: str = "deny") -> AuthorizationPolicy:
    rule = PolicyRule(operations=((Predicate(Attribute.METHOD, texts=(Exact(method),)),),))
    return AuthorizationPolicy(Origin("AuthorizationPolicy", "shop", name), PolicyAction.DENY, rules=(rule,))


def _allow(principal: str) -> AuthorizationPolicy:
    rule = PolicyRule(sources=((Predicate(Attribute.PRINCIPAL, texts=(Exact(principal),)),),))
    return AuthorizationPolicy(Origin("AuthorizationPolicy", "shop", "allow"), PolicyAction.ALLOW, rules=(rule,))


def test_policies_decide_by_who_and_what() -> None:
    world = World()

    async def main() -> None:
        echo = Echo()
        async with world.application(echo) as address:
            world.describe(world.endpoint(address))
            world.push(_allow(CLIENT.principal), _deny("POST"))
            client = await world.client()
            assert (await client.get("/")).status == 200
            denied = await client.get("/", "POST", b"x")
            assert (denied.status, denied.text, denied.headers["content-type"]) == (403, "RBAC: access denied", "text/plain")
            from mesh.model.identity import SpiffeId

            stranger = await world.client(identity=SpiffeId("cluster.local", "shop", "stranger"))
            assert (await stranger.get("/")).status == 403
            assert [record.policy for record in world.log.requests] == [
                "ns[shop]-policy[allow]-rule[0]",
                "ns[shop]-policy[deny]-rule[0]",
                "",
            ]
            assert world.log.requests[1].details == "rbac_access_denied_matched_policy[ns[shop]-policy[deny]-rule[0]]"
            assert len(echo.seen) == 1

    world.run(main)


def test_a_policy_that_cannot_be_read_denies() -> None:
    world = World()

    async def main() -> None:
        async with world.application(Echo()) as address:
            world.describe(world.endpoint(address))
            client = await world.client()
            assert (await client.get("/")).status == 200
            world.push(AuthorizationPolicy(Origin("AuthorizationPolicy", "shop", "x"), PolicyAction.ALLOW, unreadable="gibberish"))
            assert (await client.get("/")).status == 403
            assert "gibberish" in world.log.requests[-1].because

    world.run(main)


def test_a_change_holds_for_the_next_request_of_a_living_connection() -> None:
    world = World()

    async def main() -> None:
        async with world.application(Echo()) as address:
            world.describe(world.endpoint(address))
            client, second = await world.client(), await world.h2_client()
            assert (await client.get("/")).status == 200
            assert (await second.get("/")).status == 200
            world.push(_deny("GET"))
            assert (await client.get("/")).status == 403
            assert (await second.get("/")).status == 403
            world.store.apply(Delta(removed_l7=(_name_of(_deny("GET")),)))
            assert (await client.get("/")).status == 200
            world.configure(routes=[default_route(action=DirectResponse(418, b"short"))])
            assert (await client.get("/")).status == 418
            assert (await second.get("/")).status == 418
            from mesh.model.l7.waypoint import ServiceConfig

            world.push(ServiceConfig("shop", HOST))
            assert (await client.get("/")).status == 503
            assert world.log.requests[-1].flags == (Flag.NO_CLUSTER_FOUND,)

    world.run(main)


def _name_of(resource: object) -> tuple[str, str]:
    from mesh.model.l7.waypoint import Assigned
    from mesh.xds.l7 import resource_name, type_url_of

    return type_url_of(resource), resource_name(Assigned("shop/waypoint", resource))


# Routes


def test_a_request_that_no_route_takes_is_not_found() -> None:
    world = World()

    async def main() -> None:
        async with world.application(Echo()) as address:
            match = RouteMatch(path=PathMatch(PathKind.EXACT, "/known"))
            world.describe(world.endpoint(address), routes=[default_route(matches=(match,))])
            client = await world.client()
            assert (await client.get("/known")).status == 200
            answer = await client.get("/unknown")
            assert (answer.status, answer.body) == (404, b"")
            assert (world.log.requests[-1].flags, world.log.requests[-1].details) == ((Flag.NO_ROUTE_FOUND,), "route_not_found")

    world.run(main)


def test_routes_answer_themselves() -> None:
    world = World()

    async def main() -> None:
        large = b"x" * (1 << 20)
        world.describe(
            routes=[
                default_route(matches=(RouteMatch(path=PathMatch(PathKind.PREFIX, "/old")),), action=Redirect(302, path="/new")),
                default_route(
                    matches=(RouteMatch(path=PathMatch(PathKind.PREFIX, "/large")),),
                    action=DirectResponse(200, large),
                    response=HeaderChanges(set=(("x-set", "%REQ(:METHOD)%"),)),
                ),
                default_route(action=Forward((WeightedDestination(Destination("", "none", 80), fails_with=500, because="no such thing"),))),
            ]
        )
        client = await world.client()
        redirect = await client.get("/old?a=b")
        assert (redirect.status, redirect.headers["location"]) == (302, f"http://{HOST}/new?a=b")
        direct = await client.get("/large")
        assert (direct.body, direct.headers["x-set"]) == (large, "GET")
        second = await world.h2_client()
        assert (await second.get("/large")).body == large
        failed = await client.get("/other")
        assert (failed.status, failed.body) == (500, b"")
        assert "no such thing" in world.log.requests[-1].because

    world.run(main)


def test_a_request_and_its_response_are_changed_as_the_route_says() -> None:
    world = World()

    async def main() -> None:
        echo = Echo(lambda seen: (200, {"x-remove": "1", "x-app": "2"}, b""))
        async with world.application(echo) as address:
            destination = WeightedDestination(
                ITSELF.destination, request=HeaderChanges(set=(("x-dest", "d"),)), response=HeaderChanges(add=(("x-app", "3"),))
            )
            route = default_route(
                matches=(RouteMatch(path=PathMatch(PathKind.SEGMENTS, "/api")),),
                action=Forward((destination,), rewrite=Rewrite(prefix="/v2", authority="inner.example")),
                request=HeaderChanges(set=(("x-route", "%REQ(x-user)%"),), remove=("x-gone",)),
                response=HeaderChanges(remove=("x-remove",)),
                timeout=5.0,
            )
            world.describe(world.endpoint(address), routes=[route])
            client = await world.client()
            answer = await client.get("/api/a?b", headers={"x-user": "ann", "x-gone": "1"})
            seen = echo.seen[0]
            assert (seen.target, seen.headers["host"]) == ("/v2/a?b", "inner.example")
            assert (seen.headers["x-route"], seen.headers["x-dest"]) == ("ann", "d")
            assert "x-gone" not in seen.headers
            assert seen.headers["x-envoy-original-path"] == "/api/a?b"
            assert 4900 <= int(seen.headers["x-envoy-expected-rq-timeout-ms"]) <= 5000
            assert "x-remove" not in answer.headers
            assert world.log.requests[0].path == b"/api/a?b"

    world.run(main)


def test_weights_share_requests_out() -> None:
    world = World()

    async def main() -> None:
        from mesh.model.l7.destination import DestinationConfig, Subset

        one, two = Echo(name="one"), Echo(name="two")
        async with world.application(one) as first, world.application(two) as other:
            endpoints = world.endpoint(first, "first"), world.endpoint(other, "other")
            shares = tuple(WeightedDestination(Destination("shop", HOST, 80, name), weight) for name, weight in (("v1", 90), ("v2", 10)))
            world.describe(*endpoints, routes=[default_route(action=Forward(shares))])
            world.push(
                DestinationConfig(
                    "shop",
                    HOST,
                    subsets=(Subset("v1", {"version": "v1"}), Subset("v2", {"version": "v2"})),
                    labels={endpoints[0].uid: {"version": "v1"}, endpoints[1].uid: {"version": "v2"}},
                )
            )
            client = await world.client()
            for _ in range(200):
                assert (await client.get("/")).status == 200
            assert len(one.seen) + len(two.seen) == 200
            assert 5 <= len(two.seen) <= 40
            assert world.log.requests[0].upstream_cluster in (f"inbound-vip|80|http/v1|{HOST}", f"inbound-vip|80|http/v2|{HOST}")

    world.run(main)


def test_faults_delay_and_abort() -> None:
    world = World()

    async def main() -> None:
        async with world.application(Echo()) as address:
            world.describe(
                world.endpoint(address),
                routes=[
                    default_route(
                        matches=(RouteMatch(path=PathMatch(PathKind.EXACT, "/slow")),), fault=Fault(delay=0.15, delay_percent=100.0)
                    ),
                    default_route(fault=Fault(status=555, abort_percent=100.0)),
                ],
            )
            client = await world.client()
            began = trio.current_time()
            assert (await client.get("/slow")).status == 200
            assert trio.current_time() - began >= 0.15
            aborted = await client.get("/")
            assert (aborted.status, aborted.text) == (555, "fault filter abort")
            assert [record.flags for record in world.log.requests] == [(Flag.DELAY_INJECTED,), (Flag.FAULT_INJECTED,)]

    world.run(main)


def test_cross_origin_requests_are_answered_and_allowed() -> None:
    world = World()

    async def main() -> None:
        echo = Echo()
        async with world.application(echo) as address:
            cors = Cors((Exact("https://shop.example"),), methods=("GET",), credentials=True)
            world.describe(world.endpoint(address), routes=[default_route(cors=cors)])
            client = await world.client()
            asks = {"origin": "https://shop.example", "access-control-request-method": "GET"}
            preflight = await client.get("/", "OPTIONS", headers=asks)
            assert (preflight.status, preflight.headers["access-control-allow-origin"]) == (200, "https://shop.example")
            assert not echo.seen
            answer = await client.get("/", headers={"origin": "https://shop.example"})
            assert answer.headers["access-control-allow-origin"] == "https://shop.example"
            foreign = await client.get("/", headers={"origin": "https://evil.example"})
            assert "access-control-allow-origin" not in foreign.headers

    world.run(main)


def test_a_mirror_gets_a_copy_and_holds_nobody_up() -> None:
    world = World()

    async def stuck(stream: trio.SocketStream) -> None:
        await trio.sleep_forever()

    async def main() -> None:
        echo, copy = (Echo(lambda seen: (200, {}, b"")) for _ in range(2))
        from mesh.model.address import NamespacedHostname, NetworkAddress, parse_ip
        from mesh.model.service import Service, ServicePort

        async with world.application(echo) as address, world.application(copy) as second, world.application(stuck, buffer=65536) as third:
            mirrors = tuple(Mirror(Destination("shop", f"{name}.shop.svc", 80)) for name in ("copy", "stuck", "nobody"))
            world.describe(world.endpoint(address), routes=[default_route(mirrors=mirrors)])
            for name, where in (("copy", second), ("stuck", third)):
                key = NamespacedHostname("shop", f"{name}.shop.svc")
                service = Service(
                    name, "shop", key.hostname, (NetworkAddress("", parse_ip("10.96.1.1")),), ports=(ServicePort(80, where.port),)
                )
                world.state.apply(Delta(services=(service,), workloads=(world.endpoint(where, name, services={key: ()}),)))
            client = await world.client()
            body = b"x" * 500_000
            assert (await client.get("/m", "POST", body)).status == 200
            await world.until(lambda: copy.seen)
            assert (copy.seen[0].target, len(copy.seen[0].body)) == ("/m", len(body))
            assert copy.seen[0].headers["host"] == f"{HOST}-shadow"
            assert world.plane.counts.mirrors_dropped == 0
            assert (await client.get("/m", "POST", b"x" * 8_000_000)).status == 200
            assert world.plane.counts.mirrors_dropped >= 1
            assert len(world.log.requests) == 2

    world.run(main)


# Failures


def test_nobody_to_serve_it_is_said_so() -> None:
    world = World()

    async def main() -> None:
        world.describe()
        client = await world.client()
        answer = await client.get("/")
        assert (answer.status, answer.text) == (503, "no healthy upstream")
        assert (world.log.requests[0].flags, world.log.requests[0].details) == ((Flag.NO_HEALTHY_UPSTREAM,), "no_healthy_upstream")

    world.run(main)


def test_a_refused_connection_is_tried_elsewhere() -> None:
    world = World()

    async def main() -> None:
        from mesh.model.address import SocketAddress

        echo = Echo()
        async with world.application(echo) as address:
            dead = [world.endpoint(SocketAddress(loopback(), 9), f"dead-{number}") for number in range(2)]
            world.describe(world.endpoint(address, "alive"), *dead)
            client = await world.client()
            for _ in range(10):
                assert (await client.get("/")).status == 200
            assert any(record.attempts > 1 for record in world.log.requests)
            assert all(record.flags == () for record in world.log.requests)

    world.run(main)


def test_a_connection_refused_everywhere_is_told_with_its_reason() -> None:
    world = World()

    async def main() -> None:
        from mesh.model.address import SocketAddress

        world.describe(world.endpoint(SocketAddress(loopback(), 9)), routes=[default_route(retry=Retry(attempts=1))])
        client = await world.client()
        answer = await client.get("/")
        assert answer.status == 503
        assert answer.text == f"{BEFORE_HEADERS} retried and the latest reset reason: remote connection failure"
        record = world.log.requests[0]
        assert record.flags == (Flag.UPSTREAM_RETRY_LIMIT_EXCEEDED, Flag.UPSTREAM_CONNECTION_FAILURE)
        assert record.attempts == 2
        assert record.details.endswith("|delayed_connect_error:_Connection_refused}")

    world.run(main)


def test_a_request_that_was_seen_is_not_one_that_was_reset_before() -> None:
    world = World()
    seen: list[bytes] = []

    async def closes(stream: trio.SocketStream) -> None:
        seen.append(bytes(await stream.receive_some(65536)))

    async def main() -> None:
        async with world.application(closes) as address:
            retry = Retry(attempts=2, on=("reset-before-request",), backoff_base=0.001, previous_hosts=True)
            world.describe(world.endpoint(address), routes=[default_route(retry=retry)])
            assert (await (await world.client()).get("/", "POST", b"pay")).status == 503
            assert len(seen) == 1

    world.run(main)


def _closes_after(data: bytes) -> object:
    async def handler(stream: trio.SocketStream) -> None:
        await stream.receive_some(65536)
        if data:
            await stream.send_all(data)
        await stream.aclose()

    return handler


@pytest.mark.parametrize(
    ("said", "status", "broken", "flag"),
    [
        (b"", 503, False, Flag.UPSTREAM_CONNECTION_TERMINATION),
        (b"HTTP/1.1 200 OK\r\nContent-", 503, False, Flag.UPSTREAM_CONNECTION_TERMINATION),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n", 200, True, Flag.UPSTREAM_CONNECTION_TERMINATION),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc", 200, True, Flag.UPSTREAM_CONNECTION_TERMINATION),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n", 200, True, Flag.UPSTREAM_CONNECTION_TERMINATION),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 200, True, Flag.UPSTREAM_PROTOCOL_ERROR),
        (b"gibberish\r\n\r\n", 502, False, Flag.UPSTREAM_PROTOCOL_ERROR),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\na", 502, False, Flag.UPSTREAM_PROTOCOL_ERROR),
    ],
)
@pytest.mark.parametrize("downstream", [1, 2])
def test_an_upstream_that_breaks_off_is_never_taken_for_one_that_has_ended(
    downstream: int, said: bytes, status: int, broken: bool, flag: Flag
) -> None:
    world = World()

    async def main() -> None:
        async with world.application(_closes_after(said)) as address:
            world.describe(world.endpoint(address))
            answer: Answer
            if downstream == 1:
                answer = await (await world.client()).get("/")
            else:
                answer = await (await world.h2_client()).get("/")
            assert answer.status == status
            assert bool(answer.broken) is broken
            (record,) = world.log.requests
            assert record.flags == (flag,)
            assert record.details.startswith("upstream_reset_after" if broken else "upstream_reset_before")

    world.run(main)


def test_a_5xx_is_tried_again_where_the_route_says_so_and_the_body_comes_again() -> None:
    world = World()

    async def main() -> None:
        answers = iter([503, 500, 200])
        echo = Echo(lambda seen: (next(answers), {}, seen.body))
        async with world.application(echo) as address:
            retry = Retry(attempts=3, on=("5xx",), backoff_base=0.001, previous_hosts=True)
            world.describe(world.endpoint(address), routes=[default_route(retry=retry)])
            client = await world.client()
            answer = await client.get("/", "POST", b"x" * 500_000)
            assert (answer.status, len(answer.body)) == (200, 500_000)
            assert [len(seen.body) for seen in echo.seen] == [500_000] * 3
            assert world.log.requests[0].attempts == 3

    world.run(main)


def test_a_request_that_was_sent_is_not_tried_again_where_only_unsent_ones_are() -> None:
    world = World()

    async def main() -> None:
        async with world.application(_closes_after(b"")) as address:
            retry = Retry(attempts=2, on=("reset-before-request",), backoff_base=0.001, previous_hosts=True)
            world.describe(world.endpoint(address), routes=[default_route(retry=retry)])
            assert (await (await world.client()).get("/")).status == 503
            assert world.log.requests[0].attempts == 1

    world.run(main)


@pytest.mark.parametrize("downstream", [1, 2])
def test_nothing_of_a_request_is_left_to_the_collector_of_cycles(downstream: int) -> None:
    world = World()

    async def main() -> None:
        async with world.application(Echo()) as address:
            world.describe(world.endpoint(address))
            client = await world.client() if downstream == 1 else await world.h2_client()
            gc.collect()  # of other tests
            gc.disable()
            try:
                for _ in range(3):
                    assert (await client.get("/", "POST", b"hello")).status == 200
                await world.until(lambda: not world.plane.counts.exchanges)
                left = [type(each).__name__ for each in gc.get_objects() if isinstance(each, Exchange | Attempt | Call)]
            finally:
                gc.enable()
            assert left == []

    world.run(main)


def test_a_body_that_is_too_large_to_keep_is_sent_once() -> None:
    world = World()

    async def main() -> None:
        echo = Echo(lambda seen: (503, {}, b"no"))
        async with world.application(echo) as address:
            retry = Retry(attempts=3, on=("5xx",), backoff_base=0.001, previous_hosts=True)
            world.describe(world.endpoint(address), routes=[default_route(retry=retry)])
            client = await world.client()
            answer = await client.get("/", "POST", b"x" * 3_000_000)
            assert (answer.status, answer.body) == (503, b"no")
            assert len(echo.seen) == 1

    world.run(main)


async def _silent(stream: trio.SocketStream) -> None:
    while await stream.receive_some(65536):
        pass


@pytest.mark.parametrize("downstream", [1, 2])
def test_a_route_gives_its_time_and_no_more(downstream: int) -> None:
    world = World()

    async def main() -> None:
        async with world.application(_silent) as address:
            world.describe(world.endpoint(address), routes=[default_route(timeout=0.1)])
            if downstream == 1:
                answer = await (await world.client()).get("/", "POST", b"abc")
            else:
                answer = await (await world.h2_client()).get("/", "POST", b"abc")
            assert (answer.status, answer.text) == (504, "upstream request timeout")
            assert (world.log.requests[0].flags, world.log.requests[0].details) == ((Flag.UPSTREAM_REQUEST_TIMEOUT,), "response_timeout")

    world.run(main)


def test_a_try_that_takes_too_long_gives_way_to_the_next() -> None:
    world = World()

    async def main() -> None:
        async with world.application(_silent) as slow, world.application(Echo()) as quick:
            retry = Retry(attempts=5, on=("gateway-error",), per_try_timeout=0.05, backoff_base=0.001)
            world.describe(world.endpoint(slow, "slow"), world.endpoint(quick, "quick"), routes=[default_route(retry=retry)])
            client = await world.client()
            for _ in range(6):
                assert (await client.get("/")).status == 200
            assert any(record.attempts > 1 for record in world.log.requests)

    world.run(main)


def test_tries_that_all_take_too_long_end_with_504() -> None:
    world = World()

    async def main() -> None:
        async with world.application(_silent) as slow:
            retry = Retry(attempts=1, on=("5xx",), per_try_timeout=0.05, backoff_base=0.001, previous_hosts=True)
            world.describe(world.endpoint(slow), routes=[default_route(retry=retry)])
            answer = await (await world.client()).get("/")
            assert answer.status == 504
            record = world.log.requests[0]
            assert record.flags == (Flag.UPSTREAM_RETRY_LIMIT_EXCEEDED, Flag.UPSTREAM_REQUEST_TIMEOUT)
            assert (record.attempts, record.details) == (2, "upstream_per_try_timeout")

    world.run(main)


@pytest.mark.parametrize("downstream", [1, 2])
def test_a_client_that_goes_takes_its_request_with_it(downstream: int) -> None:
    world = World()
    ended = trio.Event()

    async def application(stream: trio.SocketStream) -> None:
        try:
            while await stream.receive_some(65536):
                pass
        finally:
            ended.set()

    async def main() -> None:
        async with world.application(application) as address:
            world.describe(world.endpoint(address))
            if downstream == 1:
                stream = await world.open()
                await stream.send_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
                await world.until(lambda: world.plane.counts.exchanges)
                await stream.aclose()
            else:
                client = await world.h2_client()
                number = await client.send("/")
                await world.until(lambda: world.plane.counts.exchanges)
                await client.reset(number)
            await ended.wait()
            await world.until(lambda: world.log.requests)
            record = world.log.requests[0]
            assert (record.status, record.flags) == (0, (Flag.DOWNSTREAM_CONNECTION_TERMINATION,))

    world.run(main)


# Back-pressure


@pytest.mark.parametrize("downstream", [1, 2])
def test_a_client_that_does_not_read_stops_the_application(downstream: int) -> None:
    world = World()
    sent = 0

    async def pours(stream: trio.SocketStream) -> None:
        nonlocal sent
        await stream.receive_some(65536)
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 200000000\r\n\r\n")
        while sent < 200_000_000:
            await stream.send_all(b"x" * 100_000)
            sent += 100_000

    async def main() -> None:
        async with world.application(pours) as address:
            world.describe(world.endpoint(address))
            if downstream == 1:
                stream = await world.open()
                stream._stream.pause()
                await stream.send_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            else:
                client = await world.h2_client()
                number = client.http.get_next_available_stream_id()
                client.hold.add(number)
                await client.send("/")
            before = -1
            while before != sent or not sent:
                before = sent
                await trio.sleep(0.2)
            assert sent < 30_000_000  # windows and kernel buffers
            assert world.plane.counts.exchanges == 1

    world.run(main)


def test_an_application_that_does_not_read_stops_the_client() -> None:
    world = World()

    async def deaf(stream: trio.SocketStream) -> None:
        await trio.sleep_forever()

    async def main() -> None:
        async with world.application(deaf) as address:
            world.describe(world.endpoint(address))
            client = await world.h2_client()
            sent = 0

            async def upload() -> None:
                nonlocal sent
                stream = await client.send("/", "POST", b"", ended=False)
                while True:
                    await client.data(stream, b"x" * 16384, ended=False)
                    sent += 16384

            async with trio.open_nursery() as nursery:
                nursery.start_soon(upload)
                before = -1
                while before != sent or not sent:
                    before = sent
                    await trio.sleep(0.2)
                assert sent < 30_000_000
                nursery.cancel_scope.cancel()

    world.run(main)


# The end


def test_draining_lets_requests_end_and_takes_no_more() -> None:
    world = World()
    release = trio.Event()

    async def slow(stream: trio.SocketStream) -> None:
        while await stream.receive_some(65536):
            await release.wait()
            await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    async def main() -> None:
        async with world.application(slow) as address:
            world.describe(world.endpoint(address))
            link = await world.link()
            client = await world.client(link=link)
            second = await world.codec_client(link=link)
            idle = await world.client(link=link)
            await client.send("/")
            stream = await second.send()
            await world.until(lambda: world.plane.counts.exchanges == 2)
            world.listener.drain()
            await world.until(lambda: second.going_away)
            assert not link.usable
            release.set()
            answer = await client.answer()
            assert (answer.body, answer.headers["connection"]) == (b"ok", "close")
            await world.until(lambda: stream in second.ended)
            assert second.bodies[stream] == b"ok"
            assert await idle.stream.receive_some() == b""
            await world.until(lambda: not world.listener.links)

    world.run(main)


@pytest.mark.parametrize("leaves", ["the waypoint", "the service"])
def test_clients_are_told_to_go_with_an_answer_before_they_are_cut_off(leaves: str) -> None:
    """Who asks at the moment when an idle connection is closed gets no answer at all."""
    world = World()

    async def main() -> None:
        async with world.application(Echo()) as address:
            world.describe(world.endpoint(address))
            link = await world.link()
            kept, unused = await world.client(link=link), await world.client(link=link)
            await kept.send("/a")
            assert "connection" not in (await kept.answer()).headers
            if leaves == "the waypoint":
                world.listener.wind_down()
            else:
                (service,) = world.state.find_services_by_hostname(HOST, "shop")
                world.state.apply(Delta(services=(replace(service, waypoint=None),)))
                world.listener.wind_down_leavers()
            late = await world.client(link=link)
            for client in (kept, unused, late):
                await client.send("/b")
                answer = await client.answer()
                assert (answer.status, answer.headers["connection"]) == (200, "close")
                assert await client.stream.receive_some() == b""

    world.run(main)


def test_clients_of_a_service_that_stays_are_not_told_to_go() -> None:
    world = World()

    async def main() -> None:
        async with world.application(Echo()) as address:
            world.describe(world.endpoint(address))
            client = await world.client()
            for _ in range(2):
                world.listener.wind_down_leavers()
                await client.send("/")
                assert "connection" not in (await client.answer()).headers

    world.run(main)


def test_slow_heads_are_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("waypoint_py.downstream.HEAD_SECONDS", 0.2)
    world = World()

    async def main() -> None:
        async with world.application(Echo()) as address:
            world.describe(world.endpoint(address))
            stream = await world.open()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_drip, stream, b"GET / HTTP/1.1\r\nHost: a\r\n" * 100)
                received = await stream.receive_some()
                nursery.cancel_scope.cancel()
            assert received.startswith(b"HTTP/1.1 408 ")
            assert [record.status for record in world.log.requests] == [408]
            client = await world.client()
            await client.get("/")
            await trio.sleep(0.3)  # an idle connection is no slow head
            assert (await client.get("/")).status == 200

    world.run(main)


async def _drip(stream: trio.abc.Stream, data: bytes) -> None:
    for byte in data:
        await stream.send_all(bytes([byte]))
        await trio.sleep(0.01)


def test_a_client_of_a_service_that_has_left_is_sent_away_and_not_refused() -> None:
    world = World()
    release = trio.Event()

    async def slow(stream: trio.SocketStream) -> None:
        while await stream.receive_some(65536):
            await release.wait()
            await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    async def main() -> None:
        async with world.application(slow) as address:
            world.describe(world.endpoint(address))
            link = await world.link()
            client, second, idle = await world.client(link=link), await world.codec_client(link=link), await world.client(link=link)
            await client.send("/")
            stream = await second.send()
            await world.until(lambda: world.plane.counts.exchanges == 2)
            world.push(WaypointSettings("shop", "waypoint", "all"))
            assert not second.going_away, "another change is none of theirs"
            world.store.apply(Delta(removed_l7=((SERVICE_CONFIG, f"shop/waypoint|{KEY}"),)))
            await world.until(lambda: second.going_away)
            assert await idle.stream.receive_some() == b""
            release.set()
            answer = await client.answer()
            assert (answer.body, answer.headers["connection"]) == (b"ok", "close")
            await world.until(lambda: stream in second.ended)
            assert link.usable, "other services may be asked for"
            await world.until(lambda: not world.listener.carried)

    world.run(main)

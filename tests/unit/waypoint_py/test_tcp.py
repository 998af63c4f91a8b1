"""Connections that carry no HTTP, through a waypoint."""

from __future__ import annotations

import pytest
import trio

from mesh.model.address import SocketAddress
from mesh.model.l7.destination import ConnectionPool, DestinationConfig, TrafficPolicy
from mesh.model.l7.matching import Exact
from mesh.model.l7.policy import Attribute, AuthorizationPolicy, PolicyAction, PolicyRule, Predicate
from mesh.model.l7.routing import Destination, Origin, TcpRoute, WeightedDestination
from mesh.model.l7.waypoint import Protocol
from tests.unit.waypoint_py.harness import CLIENT, HOST, ITSELF, ORIGIN, World, loopback
from waypoint_py.verdict import Flag


async def _echo(stream: trio.SocketStream) -> None:
    async for data in stream:
        await stream.send_all(data)
    await stream.send_eof()


def test_bytes_go_both_ways_and_ends_pass_one_by_one() -> None:
    world = World()

    async def counts(stream: trio.SocketStream) -> None:
        total = 0
        async for data in stream:
            total += len(data)
        await stream.send_all(b"%d" % total)

    async def main() -> None:
        async with world.application(counts) as address:
            world.describe(world.endpoint(address), protocol=Protocol.TCP)
            stream = await world.open()
            await stream.send_all(b"x" * 2_000_000)
            await stream.send_eof()
            received = b""
            while data := await stream.receive_some():
                received += data
            assert received == b"2000000"
            await world.until(lambda: world.log.connections)
            (record,) = world.log.connections
            assert (record.bytes_received, record.bytes_sent, record.flags) == (2_000_000, 7, ())
            assert record.upstream_cluster == f"inbound-vip|80|tcp|{HOST}"
            assert record.upstream_local_address is not None

    world.run(main)


def test_a_server_that_speaks_first_is_heard() -> None:
    world = World()

    async def greets(stream: trio.SocketStream) -> None:
        await stream.send_all(b"220 hello\r\n")
        assert await stream.receive_some() == b"QUIT\r\n"

    async def main() -> None:
        async with world.application(greets) as address:
            world.describe(world.endpoint(address), protocol=Protocol.TCP)
            stream = await world.open()
            assert await stream.receive_some() == b"220 hello\r\n"
            await stream.send_all(b"QUIT\r\n")
            assert await stream.receive_some() == b""

    world.run(main)


@pytest.mark.parametrize("first", [b"\x16\x03\x01\x00\xa5\x01", b"GET / HTTP/1.0\r\n\r\n", b"*1\r\n$4\r\nPING\r\n"])
def test_what_is_no_http_is_carried_where_nothing_is_declared(first: bytes) -> None:
    world = World()

    async def main() -> None:
        async with world.application(_echo) as address:
            world.describe(world.endpoint(address), protocol=Protocol.AUTO)
            stream = await world.open()
            await stream.send_all(first)
            assert await stream.receive_some() == first
            await stream.send_eof()
            assert await stream.receive_some() == b""
            await world.until(lambda: world.log.connections)
            assert not world.log.requests

    world.run(main)


def test_a_client_that_only_ends_is_carried_too() -> None:
    world = World()

    async def main() -> None:
        async with world.application(_echo) as address:
            world.describe(world.endpoint(address), protocol=Protocol.AUTO)
            stream = await world.open()
            await stream.send_eof()
            assert await stream.receive_some() == b""

    world.run(main)


def test_through_the_destinations_agent() -> None:
    world = World()

    async def main() -> None:
        async with world.application(_echo) as address:
            requests = world.agent(address.ip)
            world.describe(world.endpoint(address, hbone=True), protocol=Protocol.TCP)
            stream = await world.open()
            await stream.send_all(b"hello")
            assert await stream.receive_some() == b"hello"
            assert requests[0].authority == str(address)
            assert "for=" in requests[0].headers["forwarded"]

    world.run(main)


def test_a_policy_that_denies_resets_the_connection_before_anybody_is_dialled() -> None:
    world = World()
    dialled = 0

    async def application(stream: trio.SocketStream) -> None:
        nonlocal dialled
        dialled += 1

    async def main() -> None:
        async with world.application(application) as address:
            world.describe(world.endpoint(address), protocol=Protocol.TCP)
            rule = PolicyRule(sources=((Predicate(Attribute.PRINCIPAL, texts=(Exact(CLIENT.principal),)),),))
            world.push(AuthorizationPolicy(Origin("AuthorizationPolicy", "shop", "no"), PolicyAction.DENY, rules=(rule,)))
            stream = await world.open()
            with pytest.raises(trio.BrokenResourceError):
                await stream.receive_some()
            (record,) = world.log.connections
            assert record.policy == "ns[shop]-policy[no]-rule[0]"
            assert not dialled

    world.run(main)


def test_weights_share_connections_out_and_a_share_of_nobody_fails() -> None:
    world = World()

    async def main() -> None:
        async with world.application(_echo) as address:
            broken = WeightedDestination(Destination("shop", "gone.shop.svc", 80), 1, fails_with=500, because="there is no such service")
            world.describe(world.endpoint(address), protocol=Protocol.TCP, routes=[], tcp=TcpRoute(ORIGIN, (ITSELF, broken)))
            good = bad = 0
            link = await world.link()
            for _ in range(40):
                stream = await world.open(link=link)
                try:
                    await stream.send_all(b"a")
                    good += await stream.receive_some() == b"a"
                except trio.BrokenResourceError:
                    bad += 1
                await stream.aclose()
            assert good + bad == 40
            assert good > 5
            assert bad > 5
            assert any("there is no such service" in record.because for record in world.log.connections)

    world.run(main)


def test_all_shares_nought_resets() -> None:
    world = World()

    async def main() -> None:
        async with world.application(_echo) as address:
            nobody = TcpRoute(ORIGIN, (WeightedDestination(ITSELF.destination, 0),))
            world.describe(world.endpoint(address), protocol=Protocol.TCP, routes=[], tcp=nobody)
            stream = await world.open()
            with pytest.raises(trio.BrokenResourceError):
                await stream.receive_some()

    world.run(main)


def test_nobody_who_serves_it_resets_with_the_reason() -> None:
    world = World()

    async def main() -> None:
        world.describe(protocol=Protocol.TCP)
        stream = await world.open()
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_some()
        assert world.log.connections[0].flags == (Flag.NO_HEALTHY_UPSTREAM,)
        world.describe(world.endpoint(SocketAddress(loopback(), 9)), protocol=Protocol.TCP)
        stream = await world.open()
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_some()
        assert world.log.connections[1].flags == (Flag.UPSTREAM_CONNECTION_FAILURE,)

    world.run(main)


def test_a_reset_of_the_application_is_a_reset_for_the_client() -> None:
    world = World()

    async def resets(stream: trio.SocketStream) -> None:
        import socket
        import struct

        await stream.receive_some()
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        stream.socket.close()

    async def main() -> None:
        async with world.application(resets) as address:
            world.describe(world.endpoint(address), protocol=Protocol.TCP)
            stream = await world.open()
            await stream.send_all(b"a")
            with pytest.raises(trio.BrokenResourceError):
                await stream.receive_some()
            assert world.log.connections[0].flags == (Flag.UPSTREAM_CONNECTION_TERMINATION,)

    world.run(main)


def test_a_client_that_goes_takes_the_connection_with_it() -> None:
    world = World()
    gone = trio.Event()

    async def waits(stream: trio.SocketStream) -> None:
        try:
            await stream.receive_some()
        finally:
            gone.set()

    async def main() -> None:
        async with world.application(waits) as address:
            world.describe(world.endpoint(address), protocol=Protocol.TCP)
            stream = await world.open()
            await world.until(lambda: world.log.opened)
            await trio.sleep(0.05)
            stream._stream.abort("gone")
            await gone.wait()
            assert world.log.connections[0].flags == (Flag.DOWNSTREAM_CONNECTION_TERMINATION,)

    world.run(main)


@pytest.mark.parametrize("pool", [ConnectionPool(tcp_idle_timeout=0.1), ConnectionPool(max_connection_duration=0.1)])
def test_a_connection_ends_when_its_time_is_over(pool: ConnectionPool) -> None:
    world = World()

    async def main() -> None:
        async with world.application(_echo) as address:
            world.describe(world.endpoint(address), protocol=Protocol.TCP)
            world.push(DestinationConfig("shop", HOST, policy=TrafficPolicy(pool=pool)))
            stream = await world.open()
            await stream.send_all(b"a")
            assert await stream.receive_some() == b"a"
            with pytest.raises(trio.BrokenResourceError):
                await stream.receive_some()
            assert "0.1 s" in world.log.connections[0].because

    world.run(main)


@pytest.mark.parametrize("slow", ["client", "application"])
def test_who_does_not_read_stops_who_sends(slow: str) -> None:
    world = World()
    sent = 0

    async def pours(stream: trio.abc.Stream) -> None:
        nonlocal sent
        while True:
            await stream.send_all(b"x" * 50_000)
            sent += 50_000

    async def deaf(stream: trio.SocketStream) -> None:
        await trio.sleep_forever()

    async def main() -> None:
        async with world.application(pours if slow == "client" else deaf) as address:
            world.describe(world.endpoint(address), protocol=Protocol.TCP)
            stream = await world.open()
            async with trio.open_nursery() as nursery:
                if slow == "client":
                    stream._stream.pause()
                else:
                    nursery.start_soon(pours, stream)
                before = -1
                while before != sent or not sent:
                    before = sent
                    await trio.sleep(0.2)
                assert sent < 30_000_000
                nursery.cancel_scope.cancel()

    world.run(main)

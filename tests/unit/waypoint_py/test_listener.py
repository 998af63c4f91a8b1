"""Who gets into a waypoint, and what a CONNECT is answered: the table, over real TLS."""

from __future__ import annotations

import socket

import pytest
import trio
from OpenSSL import SSL

from mesh.model.identity import SpiffeId
from mesh.model.l7.waypoint import PortConfig, Protocol, ServiceConfig, WaypointSettings
from mesh.reactor.hbone import HboneLink, connect_hbone
from mesh.testing.ca import FakeCa
from mesh.tls.contexts import hbone_context
from tests.unit.waypoint_py.harness import CA, CLIENT, GATEWAY, HOST, KEY, VIP, Echo, Led, World, default_route
from waypoint_py.listener import open_sockets


@pytest.mark.parametrize(
    ("target", "status"),
    [
        (str(VIP), 200),
        (f"{HOST}:80", 200),
        ("10.96.0.1:82", 404),
        ("10.96.0.200:80", 404),
        ("10.1.0.1:80", 404),
        ("nobody.shop.svc.cluster.local:80", 404),
        ("127.0.0.1:15000", 403),
        ("[::1]:80", 403),
        ("169.254.169.254:80", 403),
    ],
)
def test_connect_is_answered_by_what_is_ours(target: str, status: int) -> None:
    world = World()

    async def main() -> None:
        async with world.application(Echo()) as address:
            world.describe(world.endpoint(address))
            answered = await world.connect(target)
            assert (200 if not isinstance(answered, int) else answered) == status
            assert [refusal.status for refusal in world.log.refusals] == ([] if status == 200 else [status])
            if status != 200:
                assert world.log.refusals[0].authority == target
                assert world.log.refusals[0].peer == CLIENT

    world.run(main)


def test_the_waypoint_itself_is_no_target() -> None:
    world = World()

    async def main() -> None:
        world.describe()
        own = str(world.us.addresses[0])
        for port in (15000, 15008, 15020, 80):
            assert await world.connect(f"{own}:{port}") == 403

    world.run(main)


@pytest.mark.parametrize(
    "target", ["10.0.0.1:0", "10.0.0.1:65536", "10.0.0.1", "user@10.0.0.1:80", "10.0.0.1:80/path", "a" * 300 + ":80", ""]
)
def test_an_authority_that_is_none_is_a_bad_request(target: str) -> None:
    world = World()

    async def main() -> None:
        world.describe()
        assert await world.connect(target) == 400

    world.run(main)


def test_only_connect_is_a_method_here() -> None:
    world = World()

    async def main() -> None:
        link = await world.link()
        core = link._core
        fields = [(":method", "GET"), (":scheme", "https"), (":path", "/"), (":authority", "10.96.0.1:80")]
        block = __import__("hpack").Encoder().encode(fields)
        frame = len(block).to_bytes(3, "big") + b"\x01\x05" + (1).to_bytes(4, "big") + block
        core.outgoing += frame
        link._schedule_pump()
        await world.until(lambda: world.log.refusals)
        assert world.log.refusals[0].status == 405

    world.run(main)


async def _shake_hands(world: World, context: SSL.Context) -> str | None:
    """Why a connection with this client's context ended."""
    sock = socket.create_connection((str(world.address.ip), world.address.port))
    sock.setblocking(False)
    ended = trio.Event()
    reasons: list[str | None] = []

    def closed(reason: str | None) -> None:
        reasons.append(reason)
        ended.set()

    links: list[HboneLink] = []
    connect_hbone(world.reactor, sock, context, verify_peer=lambda der: None, on_ready=links.append, on_close=closed)
    await ended.wait()
    return reasons[0]


@pytest.mark.parametrize("kind", ["other-ca", "other-domain", "two-uris", "no-spiffe", "expired"])
def test_a_certificate_that_proves_nobody_of_the_mesh_is_refused(kind: str) -> None:
    world = World()

    async def main() -> None:
        from datetime import timedelta

        match kind:
            case "other-ca":
                bundle = FakeCa().issue(CLIENT)
            case "other-domain":
                bundle = CA.issue(SpiffeId("evil.example", "shop", "client"))
            case "two-uris":
                bundle = CA.issue(CLIENT, uris=(str(CLIENT), "spiffe://cluster.local/ns/shop/sa/boss"))
            case "no-spiffe":
                bundle = CA.issue(CLIENT, uris=("https://client.example",))
            case _:
                bundle = CA.issue(CLIENT, timedelta(hours=-1))
        from dataclasses import replace

        reason = await _shake_hands(world, hbone_context(replace(bundle, roots_pem=CA.root_pem)))
        assert reason is not None
        assert "refused by peer" in reason
        await world.until(lambda: world.log.refusals)
        assert world.log.refusals[0].status == 0

    world.run(main)


def test_a_client_without_a_certificate_is_refused() -> None:
    world = World()

    async def main() -> None:
        context = SSL.Context(SSL.TLS_METHOD)
        context.set_verify(SSL.VERIFY_NONE, lambda *_: True)
        context.set_alpn_protos([b"h2"])
        reason = await _shake_hands(world, context)
        assert reason is not None
        assert "certificate required" in reason or "refused by peer" in reason

    world.run(main)


def test_an_alias_of_the_trust_domain_comes_in_and_what_was_ours_does_not_stay_so() -> None:
    world = World()

    async def main() -> None:
        async with world.application(Echo()) as address:
            world.describe(world.endpoint(address))
            world.push(WaypointSettings("shop", "waypoint", "all", trust_domains=("old.local",)))
            client = await world.client(identity=SpiffeId("old.local", "shop", "client"))
            assert (await client.get("/")).status == 200
            reason = await _shake_hands(world, hbone_context(CA.issue(CLIENT)))
            assert reason is not None

    world.run(main)


def test_without_a_certificate_of_our_own_nobody_is_served() -> None:
    world = World()

    async def main() -> None:
        from waypoint_py.credentials import Credentials

        world.listener.credentials = Credentials(world.credentials.identity)
        sock = socket.create_connection((str(world.address.ip), world.address.port))  # the kernel takes it, whatever follows
        sock.setblocking(False)
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_some(1)
        await stream.aclose()
        assert "no certificate" in world.log.refusals[0].because

    world.run(main)


def test_more_connections_than_allowed_on_one_link_are_refused_and_may_go_elsewhere() -> None:
    world = World()

    async def main() -> None:
        async with world.application(Echo()) as address:
            world.describe(world.endpoint(address))
            link = await world.link()
            clients = [await world.open(link=link) for _ in range(100)]
            assert not link.usable
            assert await world.connect(link=link) == 0
            for stream in clients:
                await stream.aclose()
            client = await world.client()
            assert (await client.get("/")).status == 200

    world.run(main)


def test_before_the_first_configuration_nobody_is_let_through() -> None:
    world = World()

    async def main() -> None:
        world.describe()
        world.synced = False
        assert await world.connect() == 503

    world.run(main)


def test_a_service_whose_configuration_is_on_its_way_waits_for_it() -> None:
    world = World()

    async def main() -> None:
        async with world.application(Echo()) as address:
            world.describe(world.endpoint(address))
            from mesh.state.store import Delta
            from mesh.xds.l7 import SERVICE_CONFIG

            world.store.apply(Delta(removed_l7=((SERVICE_CONFIG, f"shop/waypoint|{KEY}"),)))
            async with trio.open_nursery() as nursery:
                answers: list[object] = []

                async def connect() -> None:
                    answers.append(await world.connect())

                nursery.start_soon(connect)
                await trio.sleep(0.1)
                assert not answers
                world.push(ServiceConfig("shop", "other.shop.svc"))
                await trio.sleep(0.05)
                assert not answers
                world.configure()
            assert not isinstance(answers[0], int)

    world.run(main)


def test_a_service_whose_configuration_does_not_come_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("waypoint_py.listener.CONFIG_GRACE_SECONDS", 0.1)
    world = World()

    async def main() -> None:
        world.describe()
        assert await world.connect("10.96.0.1:81") == 503
        assert "nothing is configured" in world.log.refusals[0].because

    world.run(main)


def test_a_client_that_withdraws_while_its_service_waits_for_configuration_costs_nothing() -> None:
    world = World()

    async def main() -> None:
        world.describe()
        link = await world.link()
        tunnel = link.open_tunnel("10.96.0.1:81", {}, lambda answer: None)
        await trio.sleep(0.05)
        tunnel.reset()
        await trio.sleep(0.05)
        world.push(ServiceConfig("shop", HOST, (PortConfig(81, Protocol.HTTP, routes=(default_route(),)),)))
        await trio.sleep(0.05)
        assert world.plane.counts.connections == 0

    world.run(main)


def test_what_is_told_of_a_connection_is_proved() -> None:
    world = World()

    async def main() -> None:
        async with world.application(Echo()) as address:
            from ipaddress import ip_address

            from msgspec.structs import replace

            from mesh.state.store import Delta

            world.describe(world.endpoint(address))
            source = replace(world.endpoint(address, "caller"), addresses=(ip_address("127.0.0.1"),), service_account="client", services={})
            world.state.apply(Delta(workloads=(source,)))
            client = await world.client()
            await client.get("/", headers={"x-forwarded-for": "192.0.2.9", "baggage": "k8s.namespace.name=evil"})
            connection = world.log.requests[0].connection
            assert connection.peer == CLIENT
            assert str(connection.peer_address.ip) == "127.0.0.1"
            assert connection.destination == VIP
            assert connection.service_key == KEY
            assert connection.workload == source

    world.run(main)


def test_a_port_without_a_protocol_takes_what_the_client_speaks() -> None:
    world = World()

    async def main() -> None:
        echo = Echo()
        async with world.application(echo) as address:
            world.describe(world.endpoint(address), protocol=Protocol.AUTO)
            client = await world.client()
            assert (await client.get("/")).status == 200
            stream = await world.open()
            for byte in b"GET / HTTP/1.1\r\nHost: a\r\n\r\n":
                await stream.send_all(bytes([byte]))
            assert (await stream.receive_some()).startswith(b"HTTP/1.1 200 ")
            assert len(world.log.requests) == 2

    world.run(main)


def test_a_client_that_says_nothing_where_no_protocol_is_declared_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("waypoint_py.listener.STALL_SECONDS", 0.05)
    world = World()

    async def main() -> None:
        async with world.application(Echo()) as address:
            world.describe(world.endpoint(address), protocol=Protocol.AUTO)
            client = await world.client()
            await world.until(lambda: world.plane.counts.stalled_sniffs == 1)
            assert (await client.get("/")).status == 200

    world.run(main)


def test_traffic_to_a_workload_is_judged_and_sent_to_it() -> None:
    world = World()

    async def main() -> None:
        from ipaddress import ip_address

        from msgspec.structs import replace

        from mesh.model.address import SocketAddress
        from mesh.state.store import Delta

        echo = Echo()
        async with world.application(echo) as address:
            # No loopback address is ever let through, so the pod is announced at another, and the dial is led to where it is.
            pod = replace(world.endpoint(address, "pod"), addresses=(ip_address("10.1.0.1"),), waypoint=GATEWAY, services={})
            world.describe()
            world.state.apply(Delta(workloads=(pod,)))

            world.plane.connections = Led(world.pool, address)
            client = await world.client(target=str(SocketAddress(ip_address("10.1.0.1"), address.port)))
            assert (await client.get("/")).status == 200
            (record,) = world.log.requests
            assert record.upstream_cluster == "encap"
            assert record.connection.target == pod
            assert record.connection.service is None

    world.run(main)


@pytest.mark.parametrize(("address", "reached_by"), [("[::]", "127.0.0.1"), ("[::]", "::1"), ("0.0.0.0", "127.0.0.1"), ("[::1]", "::1")])
def test_listening_sockets_take_both_families_where_there_are_both(address: str, reached_by: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (sock,) = open_sockets(f"{address}:{port}")
    with sock, socket.create_connection((reached_by, port)):
        pass

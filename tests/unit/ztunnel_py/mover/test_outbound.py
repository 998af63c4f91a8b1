"""Connections of captured applications, from accept to record; what is refused, and what every early end gives back."""

from __future__ import annotations

import errno
import select
import socket
from typing import TYPE_CHECKING

import pytest
import trio
from msgspec.structs import replace

from mesh.model.address import GatewayAddress, NamespacedHostname, NetworkAddress, SocketAddress, parse_ip
from mesh.model.service import Service, ServicePort
from mesh.model.workload import HealthStatus, PortMapping, TunnelProtocol, Workload
from mesh.reactor.hbone import HboneLink, TunnelRequest, serve_hbone
from mesh.reactor.relay import relay_tunnel
from mesh.reactor.tcp import Listener, listen_on, socket_address
from mesh.state.store import Delta
from mesh.testing.ca import FakeCa
from mesh.tls.contexts import hbone_context
from mesh.wire.errors import ErrorCode
from tests.unit.ztunnel_py.mover.conftest import CA, ip_of
from ztunnel_py.mover import credentials, missed, outbound, pod
from ztunnel_py.mover.inbound import InboundHbone, InboundPlaintext
from ztunnel_py.mover.ledger import DRAINED, Failure
from ztunnel_py.mover.outbound import LOOK_AGAIN_SECONDS, MOST_ENDPOINTS, MOST_RETRIES, Outbound

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.unit.ztunnel_py.mover.conftest import World
    from ztunnel_py.mover.pod import Pod, Serve


async def is_echoed(stream: trio.SocketStream) -> bool:
    try:
        await stream.send_all(b"hello")
        return bytes(await stream.receive_some(100)) == b"hello"
    except trio.BrokenResourceError:
        return False


async def is_reset(stream: trio.SocketStream) -> bool:
    """Ended without a byte."""
    try:
        return bytes(await stream.receive_some(100)) == b""
    except trio.BrokenResourceError:
        return True


def test_a_peer_in_the_mesh_is_reached_by_mutual_tls(world: World) -> None:
    async def main() -> None:
        client, server = world.pod("client"), world.pod("server")
        async with world.application(server) as app:
            async with await world.dial(client, app) as stream:
                assert await is_echoed(stream)
                assert {living.direction for living in world.plane.ledger.living()} == {"outbound", "inbound"}
            await world.until(lambda: world.idle)
        inbound, outbound = sorted(world.log.records, key=lambda record: record.direction)
        assert inbound.source.identity == outbound.source.identity == client.identity()
        assert outbound.destination.identity == server.identity()
        assert outbound.hbone_address == str(app)
        assert (outbound.bytes_sent, outbound.bytes_recv) == (5, 5)
        assert world.errors_logged == [None, None]

    world.run(main)


def test_an_address_unknown_to_the_mesh_is_reached_as_it_was_dialled(world: World) -> None:
    async def main() -> None:
        client, other = world.pod("client"), world.pod("other", known=False)
        async with world.application(other) as app:
            async with await world.dial(client, app) as stream:
                assert await is_echoed(stream)
            await world.until(lambda: world.idle)
        (record,) = world.log.records
        assert record.hbone_address == ""
        assert "unknown to the mesh" in str(record.because)

    world.run(main)


@pytest.mark.parametrize("destination", [None, *(SocketAddress(parse_ip("127.0.0.1"), port) for port in (15001, 15006, 15008))])
def test_what_would_come_back_to_us_is_refused(world: World, destination: SocketAddress | None) -> None:
    async def main() -> None:
        async with await world.dial(world.pod("client"), destination) as stream:
            assert await is_reset(stream)
        assert world.errors_logged == ["attempted recursive call to ourselves"]

    world.run(main)


def test_what_was_for_our_own_port_at_an_address_of_the_pod_is_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not redirected, so conntrack says of it where it went. Its own workload need not be known to take HBONE, or at all."""
    ours = SocketAddress(parse_ip("10.9.9.9"), 15001)
    monkeypatch.setattr(outbound, "local_address", lambda sock: ours)

    async def main() -> None:
        async with await world.dial(world.pod("client"), ours) as stream:
            assert await is_reset(stream)
        assert world.errors_logged == ["attempted recursive call to ourselves"]

    world.run(main)


def test_a_pod_that_is_not_described_yet_waits_and_then_goes_by_what_came(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        client, server = world.pod("client", known=False), world.pod("server")
        async with world.application(server) as app:
            async with await world.dial(client, app) as stream:
                await stream.send_all(b"hello")
                await trio.sleep(0.05)
                assert world.idle, "nothing is dialled for a pod nobody knows"
                world.describe(client)
                assert bytes(await stream.receive_some(100)) == b"hello"
                assert all(living.protocol == "HBONE" for living in world.plane.ledger.living())
            await world.until(lambda: world.idle)
            world.change(Delta(removed_addresses=("Kubernetes//Pod/shop/client",)))
            monkeypatch.setattr(pod, "WORKLOAD_SECONDS", 0.05)
            async with await world.dial(client, app) as stream:
                assert await is_reset(stream)
        assert "failed to fetch information about local workload: client.shop (client)" in world.errors_logged

    world.run(main)


def test_before_all_state_has_come_nobody_is_served(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        monkeypatch.setattr(pod, "WORKLOAD_SECONDS", 0.05)
        client, server = world.pod("client"), world.pod("server")
        world.plane.synced = False
        async with world.application(server) as app:
            for plaintext in (False, True):
                async with await world.dial(server if plaintext else client, app, plaintext=plaintext) as stream:
                    assert await is_reset(stream)
        assert all("failed to fetch information about local workload" in str(error) for error in world.errors_logged)

    world.run(main)


def test_a_dial_that_cannot_even_begin_is_an_ending_like_any_other(world: World) -> None:
    async def main() -> None:
        client, server = world.pod("client"), world.pod("server")
        world.network.broken[client.uid] = OSError(errno.EMFILE, "Too many open files")
        async with world.application(server) as app:
            for protocol in (TunnelProtocol.HBONE, TunnelProtocol.NONE):
                world.describe(server, protocol=protocol)
                async with await world.dial(client, app) as stream:
                    assert await is_reset(stream)
            world.network.broken.clear()
            async with await world.dial(client, app) as stream:
                assert await is_echoed(stream), "and the next connection is none the worse"
            await world.until(lambda: world.idle)
        assert world.errors_logged[:2] == ["connection failed: [Errno 24] Too many open files"] * 2

    world.run(main)


def test_a_peer_that_proves_another_identity_gets_nothing(world: World) -> None:
    async def main() -> None:
        client, server = world.pod("client"), world.pod("server", certified=False)
        impostor = FakeCa()
        async with world.application(server) as app:
            world.plane.credentials.put(impostor.issue(server.identity()))
            async with await world.dial(client, app) as stream:
                assert await is_reset(stream)
            await world.until(lambda: world.idle)
        record = next(record for record in world.log.records if record.direction == "outbound")
        assert str(record.error).startswith("tls handshake error: certificate verify failed")
        assert record.response_flags == "TLS_FAILURE"

    world.run(main)


def test_without_a_certificate_the_reason_is_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        client, server = world.pod("client", certified=False), world.pod("server")
        async with world.application(server) as app:
            async with await world.dial(client, app) as stream:
                await world.until(lambda: world.asked)
                world.plane.credentials.refuse(client.identity(), "signing gRPC error (UNAVAILABLE): no")
                assert await is_reset(stream)
            monkeypatch.setattr(credentials, "FIRST_CERTIFICATE_SECONDS", 0.05)
            async with await world.dial(client, app) as stream:
                assert await is_reset(stream)
        assert world.errors_logged == ["identity error: signing gRPC error (UNAVAILABLE): no"] * 2
        assert {record.response_flags for record in world.log.records} == {"IDENTITY_ERROR"}

    world.run(main)


@pytest.mark.parametrize("waits_for", ["workload", "certificate", "dial"])
def test_a_pod_dropped_under_a_connection_that_waits_is_dialled_for_no_more(world: World, waits_for: str) -> None:
    """The numbers of its descriptors may be another pod's by then."""

    async def main() -> None:
        client = world.pod("client", known=waits_for != "workload", certified=waits_for != "certificate")
        server = world.pod("server")
        async with world.application(server) as app, await world.dial(client, app) as stream:
            if waits_for != "workload":
                await world.until(lambda: list(world.plane.ledger.living()))
            if waits_for == "dial":
                await world.until(lambda: client.pool._shelves)
            await trio.sleep(0.02)
            client.stop_listening()
            world.plane.ledger.end_all(client.uid, Failure(DRAINED, "-"))
            client.close()
            world.describe(client)
            world.plane.credentials.put(FakeCa().issue(client.identity()))
            assert await is_reset(stream)
            await world.until(lambda: world.idle)
            await world.until(lambda: not server.links)
            assert client.pool.connections() == 0

    world.run(main)


def test_a_connection_ended_while_it_is_dialled_for_costs_the_others_nothing(world: World) -> None:
    async def main() -> None:
        client, server = world.pod("client", certified=False), world.pod("server")
        async with world.application(server) as app:
            async with await world.dial(client, app) as ended, await world.dial(client, app) as kept:
                await world.until(lambda: len(list(world.plane.ledger.living())) == 2)
                first = min(world.plane.ledger.living(), key=lambda living: living.started)
                world.plane.ledger.end(first, Failure(DRAINED, "-"))
                assert await is_reset(ended)
                world.certify(client)
                assert await is_echoed(kept)
            await world.until(lambda: world.idle)
        assert DRAINED in world.errors_logged

    world.run(main)


def asking_first(may: Callable[[HboneLink, TunnelRequest], bool]) -> Serve:
    """Serves a pod's peers as ever, but asks ``may`` before each of their requests."""

    def serve(pod: Pod, sock: socket.socket, client: SocketAddress) -> InboundHbone:
        inbound = InboundHbone(pod, sock, client)
        link = inbound._link
        assert link is not None
        real = link._on_request
        assert real is not None
        link._on_request = lambda request: real(request) if may(link, request) else None
        return inbound

    return serve


def test_a_request_that_a_dying_connection_never_took_is_tried_again_but_not_for_ever(world: World) -> None:
    asked: list[str] = []
    failing = {1, 3, 4, 5, 6}

    def request(link: HboneLink, request: TunnelRequest) -> bool:
        asked.append(request.authority)
        if len(asked) not in failing:
            return True
        request._tunnel.reset(ErrorCode.REFUSED_STREAM)
        return False

    async def main() -> None:
        client, server = world.pod("client"), world.pod("server", inbound_hbone=asking_first(request))
        async with world.application(server) as app:
            async with await world.dial(client, app) as stream:
                assert await is_echoed(stream)
            async with await world.dial(client, app) as stream:
                assert await is_reset(stream)
            await world.until(lambda: world.idle)
        assert len(asked) == 2 + 1 + MOST_RETRIES

    world.run(main)


def test_a_pod_that_leaves_new_connections_to_another_agent_keeps_the_old_ones_and_may_take_new_ones_again(world: World) -> None:
    async def main() -> None:
        client, server = world.pod("client"), world.pod("server")
        async with world.application(server) as app, await world.dial(client, app) as kept:
            assert await is_echoed(kept)
            for of in (client, server):
                of.drain()
                assert not of.accepts
            async with await world.dial(client, app) as waiting:  # in the queue, for whoever takes it
                assert await is_echoed(kept)
                for of in (client, server):
                    of.listen(outbound=Outbound, inbound_plaintext=InboundPlaintext, inbound_hbone=InboundHbone)
                assert await is_echoed(waiting)
                assert await is_echoed(kept)

    world.run(main)


def test_a_peer_that_dies_before_it_answers_costs_nothing(world: World) -> None:
    asked: list[TunnelRequest] = []

    def request(link: HboneLink, request: TunnelRequest) -> bool:
        asked.append(request)
        if len(asked) != 2:
            return True
        link.abort("killed")
        return False

    async def main() -> None:
        client, server = world.pod("client"), world.pod("server", inbound_hbone=asking_first(request))
        async with world.application(server) as app:
            for _ in range(2):
                async with await world.dial(client, app) as stream:
                    assert await is_echoed(stream)
            await world.until(lambda: world.idle)
        assert len(asked) == 3

    world.run(main)


VIP = SocketAddress(parse_ip("10.96.0.1"), 80)


def service_of(port: int) -> Service:
    """At `VIP`, its endpoints serving it on ``port``."""
    return Service("shop", "shop", "shop.shop.svc.cluster.local", (NetworkAddress("", VIP.ip),), ports=(ServicePort(VIP.port, port),))


@pytest.mark.parametrize("protocol", [TunnelProtocol.HBONE, TunnelProtocol.NONE])
def test_an_endpoint_that_is_not_there_any_more_costs_nothing_while_the_service_has_another(world: World, protocol: TunnelProtocol) -> None:
    async def main() -> None:
        client, gone, server = world.pod("client"), world.pod("gone"), world.pod("server")
        async with world.application(server) as app:
            for of in (gone, server):
                world.describe(of, protocol=protocol, service=service_of(app.port))
            gone.close()
            for _ in range(20):
                async with await world.dial(client, VIP) as stream:
                    assert await is_echoed(stream)
            await world.until(lambda: world.idle)
        tried = [record for record in world.log.records if record.direction == "outbound"]
        failed = [record for record in tried if record.error is not None]
        assert len(tried) == 20 + len(failed)
        assert failed
        for record in failed:
            assert record.destination.workload == "gone"
            assert record.error is not None
            assert record.error.endswith("; another endpoint is tried")
        assert sum((record.because or "").endswith("; 1 not reached before") for record in tried if record.error is None) == len(failed)

    world.run(main)


def test_a_service_of_many_dead_endpoints_is_given_up_after_some(world: World) -> None:
    async def main() -> None:
        client = world.pod("client")
        for number in range(MOST_ENDPOINTS + 1):
            gone = world.pod(f"gone-{number}")
            world.describe(gone, service=service_of(8080))
            gone.close()
        async with await world.dial(client, VIP) as stream:
            assert await is_reset(stream)
        await world.until(lambda: world.idle)
        assert len({record.destination.workload for record in world.log.records}) == len(world.log.records) == MOST_ENDPOINTS

    world.run(main)


WAYPOINT = NamespacedHostname("shop", "waypoint.shop.svc.cluster.local")


class Waypoint:
    """One instance, whose process may be away; it sends back what comes."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.pod = world.pod("waypoint", known=False)
        self.pod.close()
        self._links: list[HboneLink] = []
        self._listening: tuple[socket.socket, Listener] | None = None

    def describe(self, *, ready: bool = True) -> None:
        """The mesh: a service that has this waypoint, and the instance."""
        named = Service("waypoint", "shop", WAYPOINT.hostname, ports=(ServicePort(15008, 15008),))
        fronted = replace(service_of(8080), waypoint=GatewayAddress(WAYPOINT))
        instance = Workload(
            *("waypoint", "waypoint", "shop", (ip_of(self.pod),)),
            service_account="waypoint",
            services={WAYPOINT: (PortMapping(15008, 15008),)},
            status=HealthStatus.HEALTHY if ready else HealthStatus.UNHEALTHY,
        )
        self.world.change(Delta(workloads=(instance,), services=(named, fronted)))

    def start(self) -> None:
        sock = socket.create_server((str(ip_of(self.pod)), 15008))
        context = hbone_context(CA.issue(self.pod.identity()))
        reactor = self.world.reactor

        def requested(request: TunnelRequest) -> None:
            ours, theirs = socket.socketpair()
            ours.setblocking(False)
            relay_tunnel(reactor, ours, request.accept({}), lambda result: theirs.close(), sock_is="upstream")
            theirs.setblocking(False)
            reactor.add(theirs.fileno(), select.EPOLLIN, lambda events: theirs.send(theirs.recv(100)) or reactor.remove(theirs.fileno()))

        def accepted(sock: socket.socket, address: SocketAddress) -> None:
            link = serve_hbone(reactor, sock, context, on_handshake=lambda der: None, on_request=requested, on_close=lambda reason: None)
            self._links.append(link)

        self._listening = sock, listen_on(reactor, sock, accepted)

    def stop(self) -> None:
        if self._listening is not None:
            sock, listener = self._listening
            listener.close()
            sock.close()
            self._listening = None
        for link in self._links:
            link.abort("killed")
        self._links.clear()


@pytest.mark.parametrize("missing", ["its process", "its process, and the mesh knows"])
def test_a_connection_waits_for_a_waypoint_that_is_being_restarted(world: World, missing: str) -> None:
    async def main() -> None:
        client, waypoint = world.pod("client"), Waypoint(world)
        waypoint.describe(ready=missing == "its process")
        async with await world.dial(client, VIP) as stream:
            await stream.send_all(b"hello")
            await trio.sleep(2.5 * LOOK_AGAIN_SECONDS)
            assert not world.log.records
            waypoint.start()
            waypoint.describe()
            assert bytes(await stream.receive_some(100)) == b"hello"
        waypoint.stop()
        await world.until(lambda: world.idle)
        (record,) = world.log.records
        assert str(record.because).endswith("; it was waited for")
        assert record.destination.workload == "waypoint"

    world.run(main)


def test_a_waypoint_that_does_not_come_back_is_waited_for_once_and_not_by_everybody(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(missed, "AWAITED_SECONDS", 3 * LOOK_AGAIN_SECONDS)

    async def main() -> None:
        client, waypoint = world.pod("client"), Waypoint(world)
        for ready in (True, False):
            waypoint.describe(ready=ready)
            async with await world.dial(client, VIP) as stream:
                assert await is_reset(stream)
        assert [str(record.because).endswith("; it was waited for") for record in world.log.records] == [True, False]
        assert [str(error).partition(":")[0] for error in world.errors_logged] == ["connection failed", "unknown waypoint"]

    world.run(main)


def test_a_pod_that_goes_while_a_waypoint_is_waited_for_leaves_nothing(world: World) -> None:
    async def main() -> None:
        client, waypoint = world.pod("client"), Waypoint(world)
        waypoint.describe()
        async with await world.dial(client, VIP) as stream:
            await trio.sleep(1.5 * LOOK_AGAIN_SECONDS)
            world.plane.ledger.end_all(client.uid, Failure(DRAINED))
            assert await is_reset(stream)
        assert world.errors_logged == [DRAINED]
        client.close()
        await trio.sleep(2 * LOOK_AGAIN_SECONDS)
        assert len(world.log.records) == 1

    world.run(main)


def test_an_endpoint_that_proves_another_identity_sends_nobody_elsewhere(world: World) -> None:
    async def main() -> None:
        client, impostor, server = world.pod("client"), world.pod("impostor", certified=False), world.pod("server")
        world.plane.credentials.put(FakeCa().issue(impostor.identity()))
        async with world.application(server) as app:
            for of in (impostor, server):
                world.describe(of, service=service_of(app.port))
            refused = 0
            for _ in range(20):
                async with await world.dial(client, VIP) as stream:
                    refused += not await is_echoed(stream)
            await world.until(lambda: world.idle)
        assert refused
        assert len([record for record in world.log.records if record.direction == "outbound"]) == 20

    world.run(main)


class UnusableSocket(socket.socket):
    def fileno(self) -> int:
        raise MemoryError


def test_a_step_that_raises_costs_its_connection_alone(world: World) -> None:
    async def main() -> None:
        client, server = world.pod("client"), world.pod("server")
        async with world.application(server) as app:
            with socket.create_server(("127.0.0.1", 0)) as listener:
                stream = await trio.open_tcp_stream(*listener.getsockname())
                accepted, address = listener.accept()
            sock = UnusableSocket(fileno=accepted.detach())
            sock.setblocking(False)
            world.destinations.append(app)
            Outbound(client, sock, socket_address(address))
            del sock
            async with stream:
                assert await is_reset(stream)
            await world.until(lambda: world.idle)
            async with await world.dial(client, app) as stream:
                assert await is_echoed(stream)
            await world.until(lambda: world.idle)
        assert "internal error: MemoryError()" in world.errors_logged
        assert [type(error) for error in world.errors] == [MemoryError]
        world.errors.clear()

    world.run(main)

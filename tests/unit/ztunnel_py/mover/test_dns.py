"""A pod's look-ups: what is the mesh's is answered, everything else reaches the server that was asked, and nothing hostile gets through."""

from __future__ import annotations

import os
import random
import select
import socket
import struct
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import dns.edns
import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset
import dns.update
import pytest
import trio

from mesh.model.address import NetworkAddress, SocketAddress, parse_ip
from mesh.model.service import Service
from mesh.reactor.tcp import socket_address
from mesh.state.names import Naming
from mesh.state.store import Delta
from mesh.telemetry.metrics import DnsMetrics, Registry
from mesh.testing.proxies import wait_until
from mesh.wire.dns import framed
from tests.unit.ztunnel_py.mover.conftest import ip_of
from ztunnel_py.mover import dns as module
from ztunnel_py.mover import pod as pod_module
from ztunnel_py.mover.dns import NameServer, NameService
from ztunnel_py.mover.nameservers import ResolvConf, parse_resolv_conf

if TYPE_CHECKING:
    from tests.unit.ztunnel_py.mover.conftest import World
    from ztunnel_py.mover.pod import Pod

OWN = "web.shop.svc.cluster.local."
OTHER = "www.example.net."
Handle = Callable[[bytes], bytes | list[bytes] | None]


def service(name: str, *vips: str) -> Service:
    return Service(name, "shop", f"{name}.shop.svc.cluster.local", tuple(NetworkAddress("", parse_ip(vip)) for vip in vips))


def echo_address(wire: bytes) -> bytes:
    """What a true server answers."""
    query = dns.message.from_wire(wire)
    response = dns.message.make_response(query)
    response.answer.append(dns.rrset.from_text(query.question[0].name, 60, "IN", "A", "192.0.2.1"))
    return response.to_wire()


class Resolver:
    """A server of the outside: remembers what it is asked, over UDP and TCP, and answers what ``handle`` makes of it."""

    def __init__(self, handle: Handle) -> None:
        self.handle = handle
        self.asked: list[bytes] = []
        self.peers: list[tuple[str, int]] = []
        self.udp = trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.address: SocketAddress

    async def start(self, nursery: trio.Nursery) -> None:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")  # first: of TCP far more ports are taken on a busy machine
        self.address = socket_address(listeners[0].socket.getsockname())
        await self.udp.bind(("127.0.0.1", self.address.port))
        nursery.start_soon(self._serve_udp)
        nursery.start_soon(trio.serve_listeners, self._serve_tcp, listeners)

    async def _serve_udp(self) -> None:
        with self.udp:
            while True:
                wire, peer = await self.udp.recvfrom(65535)
                self.asked.append(wire)
                self.peers.append(peer)
                answers = self.handle(wire)
                for answer in [answers] if isinstance(answers, bytes) else answers or []:
                    await self.udp.sendto(answer, peer)

    async def _serve_tcp(self, stream: trio.SocketStream) -> None:
        async with stream:
            wire = await read_message(stream)
            self.asked.append(wire)
            answers = self.handle(wire)
            for answer in [answers] if isinstance(answers, bytes) else answers or []:
                await stream.send_all(framed(answer))
            if answers is None:
                await trio.sleep_forever()


async def read_message(stream: trio.SocketStream) -> bytes:
    data = b""
    while len(data) < 2 or len(data) < 2 + int.from_bytes(data[:2], "big"):
        more = await stream.receive_some(65536)
        if not more:
            raise EOFError(data)
        data += more
    return data[2:]


class Names:
    """A pod whose look-ups are served. ``goes_to`` is where the next ones were going before they were redirected."""

    def __init__(self, world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        self.world = world
        self.registry = Registry()
        self.goes_to: SocketAddress | None = None
        self.resolv_conf: list[SocketAddress] = []
        self.counted: list[str] = []
        self.service = NameService(Naming(), DnsMetrics(self.registry), lambda: self.resolv_conf, self.counted.append)
        self.pod: Pod
        self.server: NameServer
        self.udp: SocketAddress
        self.tcp: SocketAddress
        monkeypatch.setattr(module, "original_udp_destination", lambda local, peer: self.goes_to)
        monkeypatch.setattr(module, "original_destination", lambda sock: self.goes_to)
        monkeypatch.setattr(
            module, "make_datagram_socket", lambda family, mark: socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        )

    def run(self, test: Callable[[], Awaitable[None]], *, known: bool = True) -> None:
        async def main() -> None:
            self.serve(known=known)
            await test()
            self.close()

        self.world.run(main)

    def serve(self, *, known: bool = True) -> None:
        self.pod = self.world.pod("client", known=known)
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        udp.bind((str(ip_of(self.pod)), 0))
        tcp = socket.create_server((str(ip_of(self.pod)), 0))
        self.udp, self.tcp = socket_address(udp.getsockname()), socket_address(tcp.getsockname())
        self.server = NameServer(self.pod, self.service)
        self.sockets = udp, tcp
        self.listen()
        self.world.change(Delta(services=(service("web", "10.1.0.1", "fd00::1"),)))

    def listen(self) -> None:
        self.server.listen([sock.fileno() for sock in self.sockets])

    def close(self) -> None:
        self.server.close()
        for sock in self.sockets:
            sock.close()

    @asynccontextmanager
    async def resolver(self, handle: Handle = echo_address) -> AsyncIterator[Resolver]:
        """The server that the pod asks."""
        made = Resolver(handle)
        async with trio.open_nursery() as nursery:
            await made.start(nursery)
            self.goes_to = made.address
            yield made
            nursery.cancel_scope.cancel()

    async def exchange(self, wire: bytes) -> bytes:
        with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            await sock.connect((str(self.udp.ip), self.udp.port))
            await sock.send(wire)
            return await sock.recv(65535)

    async def connect(self) -> trio.SocketStream:
        stream = await trio.open_tcp_stream(str(self.tcp.ip), self.tcp.port)
        assert isinstance(stream, trio.SocketStream)
        return stream

    async def ask(self, name: str, kind: str = "A", *, tcp: bool = False, payload: int = 0) -> dns.message.Message:
        query = dns.message.make_query(name, kind, use_edns=0 if payload else False, payload=payload)
        if tcp:
            async with await self.connect() as stream:
                await stream.send_all(framed(query.to_wire()))
                response = dns.message.from_wire(await read_message(stream))
        else:
            response = dns.message.from_wire(await self.exchange(query.to_wire()))
        assert query.is_response(response)
        return response

    def metric(self, name: str, **labels: str) -> float:
        families = {family.name: family for family in self.registry.snapshot().families}
        family = families.get(f"istio_dns_{name}")
        return sum(
            sample.value
            for sample in (family.samples if family is not None else ())
            if family is not None and labels.items() <= dict(zip(family.labels, sample.labels, strict=True)).items()
        )


@pytest.fixture
def names(world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Names:
    return Names(world, monkeypatch, tmp_path)


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has five seconds."""
    monkeypatch.setattr(module, "LOOKUP_SECONDS", 0.3)
    monkeypatch.setattr(module, "TCP_IDLE_SECONDS", 0.3)
    monkeypatch.setattr(pod_module, "WORKLOAD_SECONDS", 0.3)


def texts(response: dns.message.Message) -> list[str]:
    return [str(record) for rrset in response.answer for record in rrset]


both = pytest.mark.parametrize("tcp", [False, True], ids=["udp", "tcp"])


@both
def test_names_of_the_mesh_are_answered_without_asking_anybody(names: Names, tcp: bool) -> None:
    async def test() -> None:
        async with names.resolver() as resolver:
            assert texts(await names.ask(OWN, tcp=tcp)) == ["10.1.0.1"]
            assert texts(await names.ask("web.", "AAAA", tcp=tcp)) == ["fd00::1"]
            assert (await names.ask("WEB.shop.", tcp=tcp)).answer[0].name.to_text() == "WEB.shop."
            assert resolver.asked == []

    names.run(test)
    assert names.metric("requests", request_query_type="a", request_protocol="tcp" if tcp else "udp") == 2
    assert names.metric("upstream_requests") == 0


def test_a_change_of_the_mesh_changes_the_answer_at_once(names: Names) -> None:
    async def test() -> None:
        async with names.resolver():
            assert texts(await names.ask(OWN)) == ["10.1.0.1"]
            names.world.change(Delta(services=(service("web", "10.1.0.2"),)))
            assert texts(await names.ask(OWN)) == ["10.1.0.2"]
            names.world.change(Delta(removed_addresses=("shop/web.shop.svc.cluster.local",)))
            assert texts(await names.ask(OWN)) == ["192.0.2.1"]

    names.run(test)


def test_the_same_again_is_answered_the_same_under_its_own_id_and_counts(names: Names) -> None:
    query = dns.message.make_query(OWN, "A", use_edns=0, payload=1232).to_wire()

    async def test() -> None:
        answers = [await names.exchange(bytes([0, number]) + query[2:]) for number in range(5)]
        assert [answer[:2] for answer in answers] == [bytes([0, number]) for number in range(5)]
        assert len({answer[2:] for answer in answers}) == 1
        other = await names.exchange(dns.message.make_query(OWN.upper(), "A", use_edns=0, payload=1232).to_wire())
        assert OWN.upper().encode()[:3] in other, "and in another spelling in that"
        names.world.change(Delta(services=(service("web", "10.1.0.2"),)))
        assert texts(dns.message.from_wire(await names.exchange(query))) == ["10.1.0.2"]

    names.run(test)
    assert names.metric("requests") == 7


def test_of_padded_look_ups_nothing_is_kept(names: Names) -> None:
    """A pod could fill the memory of the agent that serves all of the node's."""

    async def test() -> None:
        for size, kept in ((60_000, 0), (100, 1)):
            query = dns.message.make_query(OWN, "A", use_edns=0, options=[dns.edns.GenericOption(65001, bytes(size))])
            wire = query.to_wire(max_size=65535)
            assert texts(dns.message.from_wire(await names.exchange(wire))) == ["10.1.0.1"]
            assert len(names.server._repeated) == kept

    names.run(test)


def test_the_addresses_come_in_changing_order(names: Names) -> None:
    many = [f"10.1.0.{number}" for number in range(1, 7)]

    async def test() -> None:
        names.world.change(Delta(services=(service("web", *many),)))
        orders = {tuple(texts(await names.ask(OWN))) for _ in range(20)}
        assert len(orders) > 1
        assert {tuple(sorted(order)) for order in orders} == {tuple(many)}

    names.run(test)


@both
def test_a_search_domain_is_seen_through(names: Names, tcp: bool) -> None:
    async def test() -> None:
        outside = Service("out", "shop", "www.example.com", (NetworkAddress("", parse_ip("240.240.0.1")),))
        names.world.change(Delta(services=(outside,)))
        response = await names.ask("www.example.com.shop.svc.cluster.local.", tcp=tcp)
        assert [line.to_text() for line in response.answer] == [
            "www.example.com.shop.svc.cluster.local. 30 IN CNAME www.example.com.",
            "www.example.com. 30 IN A 240.240.0.1",
        ]

    names.run(test)


def test_more_addresses_than_udp_takes_are_had_over_tcp(names: Names) -> None:
    async def test() -> None:
        names.world.change(Delta(services=(service("web", *(f"10.1.{n >> 8}.{n & 255}" for n in range(1, 257))),)))
        short, longer, whole = await names.ask(OWN), await names.ask(OWN, payload=1232), await names.ask(OWN, tcp=True)
        assert [bool(response.flags & 0x0200) for response in (short, longer, whole)] == [True, True, False]
        assert len(texts(short)) < len(texts(longer)) < len(texts(whole)) == 256

    names.run(test)


@both
@pytest.mark.parametrize(
    "wire",
    [
        dns.message.make_query(OTHER, "A").to_wire(),
        dns.message.make_query(OWN, "SRV", use_edns=0, payload=1232).to_wire(),
        dns.message.make_query(OWN, "TYPE4711", want_dnssec=True).to_wire(),
        dns.message.make_query(OWN, "A", "CH").to_wire(),
        dns.message.make_query(OTHER, "A").to_wire()[:-4] + b"\0\1\0\1",
        dns.update.UpdateMessage("example.net").to_wire(),
        b"\1\2\1\0\0\1\0\0\0\0\0\0\5a.b\xffc\0\0\1\0\1",
    ],
    ids=["unknown name", "SRV", "unknown type", "class CH", "plain", "update", "odd label"],
)
def test_everything_else_passes_unchanged_but_for_its_id(names: Names, tcp: bool, wire: bytes) -> None:
    received = b""

    async def test() -> None:
        nonlocal received
        async with names.resolver(lambda asked: asked[:2] + bytes([asked[2] | 0x80]) + asked[3:] + b"tail") as resolver:
            if tcp:
                async with await names.connect() as stream:
                    await stream.send_all(framed(wire))
                    received = await read_message(stream)
            else:
                received = await names.exchange(wire)
            assert [asked[2:] for asked in resolver.asked] == [wire[2:]]

    names.run(test)
    assert received == wire[:2] + bytes([wire[2] | 0x80]) + wire[3:] + b"tail"
    assert (names.metric("requests"), names.metric("upstream_requests"), names.metric("upstream_failures")) == (1, 1, 0)
    assert names.metric("upstream_request_duration_seconds", le="5.0") == 1


def test_a_thousand_spoilt_messages_are_answered_by_the_server_refused_or_the_meshs_own(names: Names) -> None:
    rng = random.Random(53)
    good = [
        dns.message.make_query(name, kind, use_edns=edns).to_wire()
        for name in (OWN, OTHER, "web.")
        for kind in ("A", "AAAA", "SRV")
        for edns in (False, 0)
    ]

    def spoilt() -> bytes:
        wire = bytearray(rng.choice(good))
        for _ in range(rng.randrange(4)):
            wire[rng.randrange(2, len(wire))] = rng.randrange(256)
        return bytes(wire[: rng.randrange(12, len(wire))]) if rng.random() < 0.2 else bytes(wire)

    async def test() -> None:
        seen = {"own": 0, "refused": 0, "server": 0}
        async with names.resolver(lambda wire: wire[:2] + bytes([wire[2] | 0x80]) + wire[3:] + b"server"):
            with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                await sock.connect((str(names.udp.ip), names.udp.port))
                for number in range(1000):
                    wire = number.to_bytes(2, "big") + spoilt()[2:]
                    if wire[2] & 0x80:
                        continue  # a response, which gets no answer
                    await sock.send(wire)
                    answer = await sock.recv(2000)
                    assert answer[:2] == wire[:2]
                    if answer == wire[:2] + bytes([wire[2] | 0x80]) + wire[3:] + b"server":
                        seen["server"] += 1
                    else:
                        read = dns.message.from_wire(answer)
                        own = read.rcode() == dns.rcode.NOERROR and read.flags & dns.flags.AA
                        assert own or read.rcode() in (dns.rcode.FORMERR, dns.rcode.BADVERS), read
                        seen["own" if own else "refused"] += 1
        assert all(count > 50 for count in seen.values()), seen

    names.run(test)


def test_every_look_up_has_an_id_and_a_port_of_its_own(names: Names) -> None:
    async def test() -> None:
        async with names.resolver() as resolver:
            for _ in range(50):
                await names.ask(OTHER)
            assert len({wire[:2] for wire in resolver.asked}) > 45
            assert len({port for _, port in resolver.peers}) > 25

    names.run(test)


@pytest.mark.parametrize(
    "forge",
    [
        lambda true: bytes([true[0] ^ 1]) + true[1:],
        lambda true: true[:2] + b"\x01" + true[3:],
        lambda true: true.replace(b"\3www", b"\3bad"),
        lambda true: true[:11],
        lambda true: b"",
    ],
    ids=["id", "query", "question", "short", "empty"],
)
def test_a_forged_answer_is_passed_over_and_the_true_one_taken(names: Names, forge: Callable[[bytes], bytes]) -> None:
    def handle(wire: bytes) -> list[bytes]:
        true = echo_address(wire)
        return [forge(true.replace(bytes([192, 0, 2, 1]), bytes([6, 6, 6, 6])))] * 40 + [true]

    async def test() -> None:
        async with names.resolver(handle):
            assert texts(await names.ask(OTHER)) == ["192.0.2.1"]

    names.run(test)


def test_an_answer_from_elsewhere_is_passed_over(names: Names) -> None:
    async def test() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:

            def handle(wire: bytes) -> bytes:
                stranger.sendto(echo_address(wire).replace(bytes([192, 0, 2, 1]), bytes([6, 6, 6, 6])), resolver.peers[-1])
                return echo_address(wire)

            async with names.resolver(handle) as resolver:
                assert texts(await names.ask(OTHER)) == ["192.0.2.1"]

    names.run(test)


def test_an_answer_larger_than_the_client_takes_sends_it_to_tcp(names: Names) -> None:
    async def test() -> None:
        async with names.resolver(lambda wire: echo_address(wire) + bytes(1300)):
            response = await names.ask(OTHER, payload=1232)
            assert (response.answer, bool(response.flags & 0x0200)) == ([], True)
            assert len(await names.exchange(dns.message.make_query(OTHER, "A", use_edns=0, payload=4096).to_wire())) > 1300

    names.run(test)


@both
def test_nobody_at_the_servers_port_is_a_failure_at_once(names: Names, tcp: bool) -> None:
    async def test() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as unused:
            unused.bind(("127.0.0.1", 0))
            names.goes_to = socket_address(unused.getsockname())
        assert (await names.ask(OTHER, tcp=tcp)).rcode() == dns.rcode.SERVFAIL

    names.run(test)
    assert (names.metric("upstream_requests"), names.metric("upstream_failures")) == (1, 1)


@both
@pytest.mark.usefixtures("hurry")
def test_a_silent_server_is_a_failure_in_the_end(names: Names, tcp: bool) -> None:
    async def test() -> None:
        async with names.resolver(lambda wire: None):
            assert (await names.ask(OTHER, tcp=tcp)).rcode() == dns.rcode.SERVFAIL
            assert texts(await names.ask(OWN, tcp=tcp)) == ["10.1.0.1"]

    names.run(test)
    assert names.metric("upstream_failures") == 1


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"garbage", id="no message"),
        pytest.param(dns.message.make_response(dns.message.make_query("bad.", "A")).to_wire(), id="to another question"),
    ],
)
def test_garbage_over_tcp_is_a_failure(names: Names, answer: bytes) -> None:
    async def test() -> None:
        async with names.resolver(lambda wire: [answer]):
            assert (await names.ask(OTHER, tcp=True)).rcode() == dns.rcode.SERVFAIL

    names.run(test)


def test_a_pods_namespace_that_is_gone_is_a_failure(names: Names) -> None:
    async def test() -> None:
        async with names.resolver():
            names.world.network.broken[names.pod.uid] = OSError(24, "Too many open files")
            assert (await names.ask(OTHER)).rcode() == dns.rcode.SERVFAIL
            assert texts(await names.ask(OWN)) == ["10.1.0.1"]

    names.run(test)


@both
def test_what_nothing_redirected_goes_to_the_agents_own_servers_in_turn(names: Names, tcp: bool) -> None:
    async def test() -> None:
        async with names.resolver() as resolver:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as unused:
                unused.bind(("127.0.0.1", 0))
                dead = socket_address(unused.getsockname())
            names.goes_to = None
            assert (await names.ask(OTHER, tcp=tcp)).rcode() == dns.rcode.SERVFAIL
            names.resolv_conf = [SocketAddress(parse_ip("127.0.0.1"), 15053), dead, resolver.address]
            assert texts(await names.ask(OTHER, tcp=tcp)) == ["192.0.2.1"]

    names.run(test)


def test_a_pod_that_is_not_known_yet_gets_its_answer_when_it_is(names: Names) -> None:
    async def test() -> None:
        async with names.resolver(), trio.open_nursery() as nursery:
            found: list[list[str]] = []

            async def look_up(name: str, tcp: bool) -> None:
                found.append(texts(await names.ask(name, tcp=tcp)))

            for name in (OWN, OTHER):
                nursery.start_soon(look_up, name, False)
                nursery.start_soon(look_up, name, True)
            await names.world.until(lambda: names.server.under_way == 6)  # two of them TCP clients
            names.world.describe(names.pod)
        assert sorted(found) == [["10.1.0.1"]] * 2 + [["192.0.2.1"]] * 2

    names.run(test, known=False)


@both
@pytest.mark.usefixtures("hurry")
def test_a_pod_that_stays_unknown_gets_failures(names: Names, tcp: bool) -> None:
    async def test() -> None:
        assert (await names.ask(OWN, tcp=tcp)).rcode() == dns.rcode.SERVFAIL

    names.run(test, known=False)
    assert names.metric("requests", source_canonical_service="unknown") == 1


@pytest.mark.parametrize("bound", ["MOST_LOOKUPS", "MOST_OF_ALL"])
def test_look_ups_beyond_a_bound_fail_and_the_mesh_is_answered_still(names: Names, monkeypatch: pytest.MonkeyPatch, bound: str) -> None:
    monkeypatch.setattr(module, bound, 3)

    async def test() -> None:
        async with names.resolver(lambda wire: None):
            with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                await sock.connect((str(names.udp.ip), names.udp.port))
                for _ in range(3):
                    await sock.send(dns.message.make_query(OTHER, "A").to_wire())
                await names.world.until(lambda: len(names.server.lookups) == 3)
                assert (await names.ask(OTHER)).rcode() == dns.rcode.SERVFAIL
                assert texts(await names.ask(OWN)) == ["10.1.0.1"]

    names.run(test)


def test_garbage_is_refused_and_responses_are_not_answered(names: Names) -> None:
    async def test() -> None:
        with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            await sock.connect((str(names.udp.ip), names.udp.port))
            for silent in (b"", b"short", dns.message.make_response(dns.message.make_query(OWN, "A")).to_wire()):
                await sock.send(silent)
            await sock.send(b"\x12\x34\x01\0\0\1\0\0\0\0\0\0\xff")
            assert (await sock.recv(100))[:4] == b"\x12\x34\x81\x01"

    names.run(test)


def test_a_tcp_client_may_ask_many_things_at_once_and_stop_speaking(names: Names) -> None:
    async def test() -> None:
        async with names.resolver(), await names.connect() as stream:
            queries = [dns.message.make_query(OTHER if number % 3 else OWN, "A") for number in range(100)]
            await stream.send_all(b"".join(framed(query.to_wire()) for query in queries))
            await stream.send_eof()
            data = b"".join([part async for part in stream])
            ids = []
            while data:
                end = 2 + int.from_bytes(data[:2], "big")
                ids.append(struct.unpack_from("!H", data, 2)[0])
                data = data[end:]
            assert sorted(ids) == sorted(query.id for query in queries)

    names.run(test)


def test_a_zone_is_transferred_whole_however_many_messages_it_takes(names: Names) -> None:
    async def test() -> None:
        zone = [dns.message.make_response(dns.message.make_query(OTHER, "AXFR")).to_wire() for _ in range(300)]
        async with names.resolver(lambda wire: [wire[:2] + part[2:] for part in zone]) as resolver:
            query = dns.message.make_query(OTHER, "AXFR").to_wire()
            async with await names.connect() as stream:
                await stream.send_all(framed(dns.message.make_query(OWN, "A").to_wire()))
                assert texts(dns.message.from_wire(await read_message(stream))) == ["10.1.0.1"]
                await stream.send_all(framed(query))
                data = b"".join([part async for part in stream])
            assert data == b"".join(framed(query[:2] + part[2:]) for part in zone)
            assert resolver.asked == [query]
            await names.world.until(lambda: names.server.under_way == 0)

    names.run(test)


def test_a_zone_of_a_server_that_is_not_there_is_a_failure_and_the_client_may_go_on(names: Names) -> None:
    async def test() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as unused:
            unused.bind(("127.0.0.1", 0))
            names.goes_to = socket_address(unused.getsockname())
        async with await names.connect() as stream:
            queries = [dns.message.make_query(OTHER, "AXFR"), dns.message.make_query(OWN, "A")]
            await stream.send_all(b"".join(framed(query.to_wire()) for query in queries))
            await stream.send_eof()
            data = b"".join([part async for part in stream])
        assert (data[5] & 0xF, data[-4:]) == (dns.rcode.SERVFAIL, bytes([10, 1, 0, 1]))

    names.run(test)


def test_a_transfer_ends_with_its_pod(names: Names) -> None:
    async def test() -> None:
        async with names.resolver(lambda wire: None) as resolver, await names.connect() as stream:
            await stream.send_all(framed(dns.message.make_query(OTHER, "AXFR").to_wire()))
            await names.world.until(lambda: resolver.asked)
            assert names.server.under_way == 1
            names.server.close()
            with pytest.raises(trio.BrokenResourceError):
                await stream.receive_some(1)
            assert names.server.under_way == 0

    names.run(test)


@pytest.mark.usefixtures("hurry")
def test_a_silent_tcp_client_is_let_go(names: Names) -> None:
    async def test() -> None:
        async with await names.connect() as stream:
            await stream.send_all(b"\0\x20half")
            assert await stream.receive_some(1) == b""

    names.run(test)


def test_a_tcp_client_that_sends_no_messages_is_let_go(names: Names) -> None:
    async def test() -> None:
        async with await names.connect() as stream:
            await stream.send_all(framed(b"garbage"))
            assert await stream.receive_some(1) == b""

    names.run(test)


@pytest.mark.parametrize("bound", ["MOST_CLIENTS", "MOST_OF_ALL"])
def test_tcp_clients_beyond_a_bound_are_refused(names: Names, monkeypatch: pytest.MonkeyPatch, bound: str) -> None:
    monkeypatch.setattr(module, bound, 1)

    async def test() -> None:
        async with await names.connect() as first:
            await names.world.until(lambda: names.server.under_way == 1)
            with pytest.raises((trio.BrokenResourceError, OSError)):
                async with await names.connect() as second:
                    await second.receive_some(1)
            await first.send_all(framed(dns.message.make_query(OWN, "A").to_wire()))
            assert texts(dns.message.from_wire(await read_message(first))) == ["10.1.0.1"]

    names.run(test)


def test_a_client_that_resets_while_it_waits_does_no_harm(names: Names) -> None:
    async def test() -> None:
        async with names.resolver(lambda wire: None):
            stream = await names.connect()
            await stream.send_all(framed(dns.message.make_query(OTHER, "A").to_wire()))
            await names.world.until(lambda: names.server.lookups)
            stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            stream.socket.close()
            await names.world.until(lambda: names.server.under_way == len(names.server.lookups))

    names.run(test)


def test_a_server_that_is_closed_gives_everything_back(names: Names) -> None:
    async def test() -> None:
        async with names.resolver(lambda wire: None), await names.connect() as stream:
            await stream.send_all(framed(dns.message.make_query(OTHER, "A").to_wire()))
            with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                await sock.connect((str(names.udp.ip), names.udp.port))
                await sock.send(dns.message.make_query(OTHER, "A").to_wire())
                await names.world.until(lambda: len(names.server.lookups) == 2)
                names.server.close()
                assert (names.server.under_way, names.service.under_way) == (0, 0)
                with trio.fail_after(1):
                    await names.service.idle().wait()

    names.run(test)  # which sees that no descriptor is left


def test_a_server_that_stops_answers_what_it_has(names: Names) -> None:
    async def test() -> None:
        go_on = trio.Event()
        asked: list[bytes] = []
        async with names.resolver(lambda wire: asked.append(wire)) as resolver, trio.open_nursery() as nursery:

            async def look_up() -> None:
                assert texts(await names.ask(OTHER)) == ["192.0.2.1"]
                go_on.set()

            nursery.start_soon(look_up)
            await names.world.until(lambda: asked)
            names.server.stop()
            assert names.counted
            await resolver.udp.sendto(echo_address(asked[0]), resolver.peers[0])
            await go_on.wait()
            await names.service.idle().wait()

    names.run(test)


def test_a_server_that_stops_takes_what_waits_and_begins_again(names: Names) -> None:
    async def test() -> None:
        async with names.resolver():
            with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                await sock.connect((str(names.udp.ip), names.udp.port))
                for name in (OWN, OTHER):
                    await sock.send(dns.message.make_query(name, "A").to_wire())
                names.server.stop()
                found = [texts(dns.message.from_wire(await sock.recv(1000))) for _ in range(2)]
                assert found == [["10.1.0.1"], ["192.0.2.1"]]
                await sock.send(dns.message.make_query(OWN, "A").to_wire())
                names.listen()
                assert texts(dns.message.from_wire(await sock.recv(1000))) == ["10.1.0.1"]
            assert texts(await names.ask(OWN, tcp=True)) == ["10.1.0.1"]

    names.run(test)


def test_a_server_that_stops_takes_tcp_clients_that_wait(names: Names) -> None:
    async def test() -> None:
        sock = socket.create_connection((str(names.tcp.ip), names.tcp.port))  # without a turn of the loop, so nobody accepts it yet
        sock.sendall(framed(dns.message.make_query(OWN, "A").to_wire()))
        names.server.stop()
        sock.setblocking(False)
        async with trio.SocketStream(trio.socket.from_stdlib_socket(sock)) as stream:
            assert texts(dns.message.from_wire(await read_message(stream))) == ["10.1.0.1"]

    names.run(test)


@pytest.mark.parametrize("tcp", [False, True])
def test_what_waits_for_somebody_who_has_died_is_taken(names: Names, tcp: bool) -> None:
    """Of those who share a socket the kernel wakes one, here an epoll set that never looks at it."""

    async def test() -> None:
        names.server.stop()
        query = dns.message.make_query(OWN, "A").to_wire()
        with select.epoll() as dead, socket.socket(type=socket.SOCK_STREAM if tcp else socket.SOCK_DGRAM) as sock:
            dead.register(names.sockets[tcp], select.EPOLLIN | select.EPOLLEXCLUSIVE)  # first in the queue of those who wait
            names.listen()
            woken: list[object] = []
            waiter = threading.Thread(target=lambda: woken.append(dead.poll(10)))
            waiter.start()
            wait_until(lambda: "epoll" in Path(f"/proc/self/task/{waiter.native_id}/wchan").read_text() or woken, "the other waits")
            address = names.tcp if tcp else names.udp
            sock.connect((str(address.ip), address.port))
            sock.sendall(framed(query) if tcp else query)
            waiter.join()
            assert woken != [[]], "the kernel woke the other"
            names.pod._name_server = names.server
            names.pod.look_again()
            sock.setblocking(False)
            with trio.socket.from_stdlib_socket(sock.dup()) as ours:
                answer = await ours.recv(1000)
            assert texts(dns.message.from_wire(answer[2:] if tcp else answer)) == ["10.1.0.1"]

    names.run(test)


def test_one_look_up_whose_answer_raises_does_not_end_the_service(names: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        with monkeypatch.context() as broken:
            broken.setattr(module, "addresses_of", lambda *args: 1 / 0)
            with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                await sock.connect((str(names.udp.ip), names.udp.port))
                await sock.send(dns.message.make_query(OWN, "A").to_wire())
                await names.world.until(lambda: names.world.errors)
        assert [type(error) for error in names.world.errors] == [ZeroDivisionError]
        names.world.errors.clear()
        assert texts(await names.ask(OWN)) == ["10.1.0.1"]

    names.run(test)


def test_resolv_conf_is_read_as_resolvers_read_it(tmp_path: Path) -> None:
    text = "# comment\nnameserver 10.0.0.1\nnameserver\nnameserver fe80::1%eth0\nnameserver nonsense\n  nameserver fd00::1 # x\nsearch a\n"
    assert [str(server) for server in parse_resolv_conf(text)] == ["10.0.0.1:53", "[fd00::1]:53"]
    assert len(parse_resolv_conf("nameserver 10.0.0.1\n" * 9)) == 3


def test_resolv_conf_is_read_anew_when_it_has_changed(tmp_path: Path) -> None:
    path = tmp_path / "resolv.conf"
    servers = ResolvConf(path)
    assert servers() == ()
    for number, text in enumerate(("nameserver 10.0.0.1\n", "nameserver 10.0.0.2\n")):
        path.write_text(text)
        os.utime(path, (number, number))
        assert [str(server.ip) for server in servers()] == [text.split()[1]]
    path.unlink()
    assert servers() == ()

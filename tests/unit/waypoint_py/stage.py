"""An HTTP connection, its exchanges and a clock moved by hand: no sockets. The test plays the client, its network and the upstreams."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any

from mesh.http.h1 import Http1Server
from mesh.http.h2 import Http2Server
from mesh.http.message import Request, Response
from mesh.model.address import GatewayAddress, NamespacedHostname, NetworkAddress, SocketAddress
from mesh.model.identity import SpiffeId
from mesh.model.l7.routing import Destination, Fault, Forward, Mirror, Origin, Retry, Route, WeightedDestination
from mesh.model.l7.waypoint import Assigned, PortConfig, Protocol, ServiceConfig, WaypointSettings
from mesh.model.service import Service, ServicePort
from mesh.model.workload import PortMapping, Workload
from mesh.reactor.loop import Reactor, Timer
from mesh.state.store import Delta, MeshState
from waypoint_py.admission import Ourselves
from waypoint_py.context import Connection
from waypoint_py.downstream import HttpConnection
from waypoint_py.listener import SERVER_OPTIONS
from waypoint_py.observer import ConnectionRecord, Local, RefusalRecord, RequestRecord
from waypoint_py.plane import Plane
from waypoint_py.policy.ext_authz import ExtAuthz, connect_plainly
from waypoint_py.policy.jwks import Authenticator, KeyStore
from waypoint_py.store import Store
from waypoint_py.stream import HIGH_WATER, LOW_WATER, Sink
from waypoint_py.upstream.balancer import Balancer
from waypoint_py.upstream.session import Endpoint, FailureKind, ResponseSink, UpstreamFailure, UpstreamProtocol, UpstreamStream

HOST = "web.shop.svc.cluster.local"
ITSELF = Destination("shop", HOST, 80)
ROUTE = Route(
    Origin("HTTPRoute", "shop", "web"),
    Forward((WeightedDestination(ITSELF),)),
    retry=Retry(attempts=3, on=("5xx",), per_try_timeout=2.0, backoff_base=0.1, previous_hosts=True),
    timeout=5.0,
    mirrors=(Mirror(ITSELF, 50.0),),
    fault=Fault(delay=0.5, delay_percent=20.0, status=500, abort_percent=5.0),
)


class Clockwork:
    """A reactor that waits for nothing, moved by hand. What a callback raises is the test's; ``errors``: what was reported."""

    def __init__(self) -> None:
        self.time = 0.0
        self.errors: list[BaseException] = []
        self.reactor = Reactor(self._failed)
        self.reactor.now = self.now
        self.reactor.close()  # it needs no descriptors

    def _failed(self, error: BaseException, where: str) -> None:
        if where.startswith(("call ", "timer ")):
            raise error
        self.errors.append(error)

    def now(self) -> float:
        return self.time

    def step(self) -> None:
        """The calls that are due now."""
        self.reactor.turns += 1
        self.reactor._run_calls(self.reactor._soon)

    def turn(self) -> None:
        """All calls, and what they call for."""
        self.reactor.turns += 1
        while self.reactor._soon:
            self.reactor._run_calls(self.reactor._soon)

    def advance(self, seconds: float) -> None:
        until, timers = self.time + seconds, self.reactor._timers
        while timers and timers[0][0] <= until:
            self.time = timers[0][0]
            self.reactor._run_timers(self.time)
            self.turn()
        self.time = until

    @property
    def timers(self) -> list[Timer]:
        """Those that are still to come."""
        return [timer for _, _, timer in self.reactor._timers if timer.active]


class Wire:
    """A byte stream whose peer reads when told."""

    def __init__(self, reactor: Reactor) -> None:
        self.reactor = reactor
        self.sink: Sink | None = None
        self.out = bytearray()
        self.paused = False
        self.ending = self.over = self.above = False
        self.local_address = None

    @property
    def unsent(self) -> int:
        return len(self.out)

    @property
    def unseen(self) -> int:
        return len(self.out)

    def attach(self, sink: Sink) -> None:
        self.sink = sink

    def write(self, data: bytes | bytearray | memoryview) -> None:
        assert not self.over
        self.out += data
        self.above = self.above or len(self.out) > HIGH_WATER

    def end(self) -> None:
        self.ending = True

    def abort(self, reason: str) -> None:
        self.close(reason)

    def close(self, reason: str | None) -> None:
        if not self.over:
            self.over = True
            self.reactor.call_soon(lambda: self.sink.closed(reason) if self.sink is not None else None)

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False

    def read(self, most: int) -> bytes:
        """The peer takes some."""
        taken = bytes(self.out[:most])
        del self.out[:most]
        if self.above and len(self.out) < LOW_WATER and not self.over:
            self.above = False
            assert self.sink is not None
            self.sink.drained()
        return taken


@dataclass
class Call:
    """One try at an upstream that the test plays (`UpstreamStream`, `Cancel`)."""

    request: Request
    ended: bool
    sink: ResponseSink
    on_open: Callable[[UpstreamStream], None]
    opened: bool = False
    over: bool = False
    responded: bool = False
    window: int = 0
    received: int = 0
    local_address: SocketAddress | None = None
    unconsumed: int = 0

    def room(self) -> int:
        return 0 if self.over else self.window

    def send_data(self, data: bytes | memoryview) -> None:
        assert self.opened
        assert not self.ended
        if not self.over:
            assert len(data) <= self.window
            self.window -= len(data)
            self.received += len(data)

    def send_end(self, trailers: object = None) -> None:
        assert not self.ended
        self.ended = True

    def consumed(self, size: int) -> None:
        if not self.over:
            self.unconsumed -= size
            assert self.unconsumed >= 0

    def reset(self) -> None:
        self.over = True

    def cancel(self) -> None:
        self.over = True


@dataclass
class Upstreams:
    calls: list[Call] = field(default_factory=list)

    def request(
        self,
        endpoint: Endpoint,
        protocol: UpstreamProtocol,
        request: Request,
        ended: bool,
        sink: ResponseSink,
        on_open: Callable[[UpstreamStream], None],
        *,
        client: Connection | None = None,
    ) -> Call:
        call = Call(request, ended, sink, on_open)
        self.calls.append(call)
        return call

    def connect(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("no connection of its own is wanted")

    @property
    def living(self) -> list[Call]:
        return [call for call in self.calls if not call.over]


class Nobody:
    def wait(self, run: Callable[[], Awaitable[Any]], on_done: Callable[[Any], None], on_crash: Callable[[Exception], None]) -> Any:
        raise AssertionError("nothing waits here")


class Log:
    def __init__(self) -> None:
        self.ended: list[RequestRecord] = []

    def request_began(self, record: RequestRecord) -> None:
        pass

    def request_ended(self, record: RequestRecord) -> None:
        assert all(record is not other for other in self.ended)
        assert record.ended is not None
        assert record.details
        self.ended.append(record)

    def connection_opened(self, record: ConnectionRecord) -> None:
        raise AssertionError

    def connection_closed(self, record: ConnectionRecord) -> None:
        raise AssertionError

    def refused(self, record: RefusalRecord) -> None:
        raise AssertionError


class Stage:
    def __init__(self, seed: int, *, serial: bool, route: Route = ROUTE) -> None:
        self.clock = Clockwork()
        self.log = Log()
        self.upstreams = Upstreams()
        state = MeshState()
        gateway = GatewayAddress(NamespacedHostname("shop", "waypoint.shop.svc.cluster.local"))
        vip = SocketAddress(ip_address("10.96.0.1"), 80)
        service = Service("web", "shop", HOST, (NetworkAddress("", vip.ip),), ports=(ServicePort(80, 80),), waypoint=gateway)
        pods = [
            Workload(
                f"c//Pod/shop/{number}",
                str(number),
                "shop",
                (ip_address(f"10.1.0.{number}"),),
                services={service.key: (PortMapping(80, 80),)},
            )
            for number in (1, 2)
        ]
        us = Workload("c//Pod/shop/us", "us", "shop", (ip_address("10.1.0.9"),))
        state.apply(Delta(services=(service,), workloads=(*pods, us)))
        rng = random.Random(seed)
        store = Store(WaypointSettings("shop", "waypoint"))
        port = PortConfig(80, Protocol.AUTO, routes=(route,))
        store.apply(Delta(l7=(Assigned("shop/waypoint", ServiceConfig("shop", HOST, (port,))),)))
        self.plane = Plane(
            reactor=self.clock.reactor,
            state=state,
            store=store,
            connections=self.upstreams,
            balancer=Balancer(state, store.find_destination, lambda: us, rng),
            observer=self.log,
            waits=Nobody(),
            authenticator=Authenticator(KeyStore()),
            ext_authz=ExtAuthz(connect_plainly),
            us=lambda: Ourselves(gateway.destination, "", (), us),
            local=Local("us", SpiffeId("cluster.local", "shop", "waypoint")),
            rng=rng,
            wall=lambda: 1_700_000_000 + self.clock.time,
        )
        self.facts = Connection(SpiffeId("cluster.local", "shop", "client"), vip, vip, service, None, None)
        self.wire = Wire(self.clock.reactor)
        self.gone = 0
        codec = Http1Server(SERVER_OPTIONS) if serial else Http2Server(SERVER_OPTIONS, now=self.clock.now)
        self.connection = HttpConnection(self.plane, self.wire, codec, self.facts, serial=serial, on_gone=self._gone)
        self.connection.start()

    def _gone(self) -> None:
        self.gone += 1

    def say(self, data: bytes) -> None:
        """Of the client; what is paused is not read."""
        if not self.wire.over and not self.wire.paused:
            self.connection.data(memoryview(data))
            self.clock.turn()

    def finish(self) -> None:
        """The client is gone, and time passes."""
        self.wire.close("gone")
        self.clock.turn()
        self.clock.advance(7200)
        assert not self.clock.errors, self.clock.errors
        assert self.gone == 1
        assert self.plane.counts.exchanges == 0
        assert self.connection.active == 0
        assert not self.upstreams.living
        assert not self.plane.loads._loads
        for cluster in self.plane.balancer._clusters.values():
            assert all(host.active == 0 for host in cluster.hosts.values())
        assert not self.clock.timers

    # What an upstream may do

    def act(self, call: Call, what: int, size: int) -> None:
        if call.over:
            return
        if not call.opened:
            if what % 4 == 0:
                self._fail(call, size)
            else:
                call.opened = True
                call.window = size
                call.on_open(call)
        elif what % 8 == 0:
            self._fail(call, size)
        elif what % 8 == 1:
            call.window += size
            call.sink.writable()
        elif what % 8 == 2 and not call.responded:
            call.sink.informational(100, [])
        elif not call.responded:
            call.responded = True
            ended = what % 8 == 3
            call.over = ended
            status = (200, 503, 404, 500)[size % 4]
            call.sink.response(Response(status, [(b"x", b"y")], content_length=0 if ended else None), ended)
        elif what % 8 in (4, 5):
            call.over = True
            call.sink.complete([(b"t", b"u")] if size % 2 else [])
        elif call.unconsumed < 1 << 20:
            call.unconsumed += size
            call.sink.data(b"x" * size)
        self.clock.turn()

    def _fail(self, call: Call, size: int) -> None:
        call.over = True
        kinds = list(FailureKind)
        call.sink.failed(UpstreamFailure(kinds[size % len(kinds)], "played"))

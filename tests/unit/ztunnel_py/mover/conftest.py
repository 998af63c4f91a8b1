"""A mover without its processes: real reactor, TLS, HBONE and loopback sockets; no namespaces, no nat, no brain."""

from __future__ import annotations

import itertools
import os
import random
import socket
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

import pytest
import trio

from mesh.model.address import IpAddress, SocketAddress, parse_ip
from mesh.model.identity import SpiffeId
from mesh.model.service import Service
from mesh.model.workload import TunnelProtocol, Workload
from mesh.reactor.loop import Reactor
from mesh.reactor.pool import PoolLimits
from mesh.state.store import Delta, MeshState
from mesh.telemetry.access import AccessLog, AccessRecord
from mesh.telemetry.metrics import Registry, TcpMetrics
from mesh.telemetry.output import LogOutput
from mesh.testing.ca import FakeCa
from ztunnel_py.messages import PodInfo
from ztunnel_py.mover import inbound, outbound
from ztunnel_py.mover.credentials import CredentialStore
from ztunnel_py.mover.inbound import InboundHbone, InboundPlaintext
from ztunnel_py.mover.ledger import Ledger
from ztunnel_py.mover.outbound import Outbound
from ztunnel_py.mover.plane import Plane
from ztunnel_py.mover.pod import Pod, PodSockets
from ztunnel_py.mover.waiting import WaitingRoom

CA = FakeCa()
PATIENCE = 15.0
_ADDRESSES = itertools.count(1)
T = TypeVar("T")


class Log(AccessLog):
    def __init__(self) -> None:
        super().__init__(lambda call: None, LogOutput(2), wanted=lambda level: level != "debug")
        self.records: list[AccessRecord] = []

    def write(self, record: AccessRecord) -> None:
        self.records.append(record)


class LoopbackPod(Pod):
    """Its "namespace" is an address of the loopback network. ``broken`` is raised instead of making a socket."""

    broken: OSError | None = None

    def _make_socket(self, address: SocketAddress, source: IpAddress | None) -> socket.socket:
        if self.broken is not None:
            raise self.broken
        if self.closed:
            return super()._make_socket(address, source)
        sock = socket.socket()
        sock.setblocking(False)
        sock.bind((str(source or self.ip), 0))
        return sock

    def inside(self, function: Callable[[], T]) -> T:
        if self.broken is not None:
            raise self.broken
        return super().inside(function) if self.closed else function()

    @property
    def ip(self) -> IpAddress:
        return parse_ip(self.info.uid)


class World:
    def __init__(self) -> None:
        self.errors: list[BaseException] = []
        self.reactor = Reactor(on_error=lambda error, where: self.errors.append(error))
        self.log = Log()
        self.asked: list[SpiffeId] = []
        self.state = MeshState("n1")
        self.plane = Plane(
            reactor=self.reactor,
            state=self.state,
            credentials=CredentialStore(self.reactor, self.asked.append),
            ledger=Ledger(TcpMetrics(Registry()), self.log, self.reactor.now),
            workloads_wanted=WaitingRoom(self.reactor),
            policies_awaited=WaitingRoom(self.reactor),
            synced=True,
            trust_domain="cluster.local",
            home=-1,
            rng=random.Random(1),
            pool=PoolLimits(max_streams=100, unused_release=300.0),
        )
        self.destinations: deque[SocketAddress | None] = deque()
        self.ca = CA
        self._pods: list[Pod] = []

    def run(self, main: Callable[[], Awaitable[None]]) -> None:
        """Run a test within the loop; no descriptor may be left over, and no callback have failed."""

        async def bounded() -> None:
            with trio.fail_after(PATIENCE):
                await main()
                for pod in self._pods:
                    if not pod.closed:
                        pod.close()

        before = descriptors()
        self.reactor.run(bounded)
        self.reactor.close()
        assert not self.errors, self.errors
        assert descriptors() <= before

    def pod(self, name: str, *, known: bool = True, certified: bool = True) -> LoopbackPod:
        """A served pod in the mesh; its application listens where a test lets it."""
        ip = f"127.84.{os.getpid() % 251}.{next(_ADDRESSES)}"
        fds = [os.open("/dev/null", os.O_RDONLY)]
        for port in (0, 0, 15008):
            fds.append(socket.create_server((ip, port)).detach())
        pod = LoopbackPod(self.plane, PodInfo(ip, name, "shop", name), PodSockets(*fds))
        pod.listen(outbound=Outbound, inbound_plaintext=InboundPlaintext, inbound_hbone=InboundHbone)
        self._pods.append(pod)
        if known:
            self.describe(pod)
        if certified:
            self.certify(pod)
        return pod

    def forget(self, pod: LoopbackPod) -> None:
        """The test closes it, and nothing here has it any more."""
        self._pods.remove(pod)

    def certify(self, pod: LoopbackPod, **options: Any) -> None:
        """The brain hands over the certificate of the pod's identity."""
        self.plane.credentials.put(CA.issue(pod.identity(), **options))

    def describe(
        self, pod: LoopbackPod, *policies: str, protocol: TunnelProtocol = TunnelProtocol.HBONE, service: Service | None = None
    ) -> None:
        """The control plane tells what there is to know about the pod, and of the service that it is an endpoint of."""
        info = pod.info
        workload = Workload(
            f"Kubernetes//Pod/shop/{info.name}",
            info.name,
            "shop",
            (pod.ip,),
            tunnel_protocol=protocol,
            service_account=info.service_account,
            node="n1",
            authorization_policies=policies,
            services={service.key: ()} if service is not None else {},
        )
        self.change(Delta(workloads=(workload,), services=(service,) if service is not None else ()))

    def change(self, delta: Delta) -> None:
        """As the mover does it."""
        self.state.apply(delta)
        for uid in self.plane.workloads_wanted.waited_for():
            self.plane.workloads_wanted.settle(uid)
        self.plane.policies_awaited.settle(None)

    async def dial(self, pod: LoopbackPod, destination: SocketAddress | None, *, plaintext: bool = False) -> trio.SocketStream:
        """A connection that nat redirected: of the pod's application, or to it in plaintext. None: nothing redirected it."""
        self.destinations.append(destination)
        fd = pod.sockets.inbound_plaintext if plaintext else pod.sockets.outbound
        with socket.socket(fileno=os.dup(fd)) as listener:
            where = listener.getsockname()
        # Blocking: the kernel's queue takes it before the reactor can refuse it.
        sock = socket.create_connection(where)
        sock.setblocking(False)
        await trio.lowlevel.checkpoint()
        return trio.SocketStream(trio.socket.from_stdlib_socket(sock))

    @asynccontextmanager
    async def application(self, pod: LoopbackPod, port: int = 0) -> AsyncIterator[SocketAddress]:
        """An echo server in the pod."""

        async def serve(stream: trio.SocketStream) -> None:
            with suppress(trio.BrokenResourceError):
                async for data in stream:
                    await stream.send_all(data)
                await stream.aclose()

        listeners = await trio.open_tcp_listeners(port, host=str(pod.ip))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, serve, listeners)
            yield SocketAddress(pod.ip, listeners[0].socket.getsockname()[1])
            nursery.cancel_scope.cancel()
        await trio.lowlevel.checkpoint()

    async def until(self, condition: Callable[[], object]) -> None:
        while not condition():  # noqa: ASYNC110  # callbacks of the reactor set no events
            await trio.sleep(0.005)

    @property
    def errors_logged(self) -> list[str | None]:
        return [record.error for record in self.log.records]

    @property
    def idle(self) -> bool:
        return not list(self.plane.ledger.living())


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    made = World()

    def original(sock: socket.socket) -> SocketAddress | None:
        return made.destinations.popleft()

    monkeypatch.setattr(outbound, "original_destination", original)
    monkeypatch.setattr(inbound, "original_destination", original)
    return made

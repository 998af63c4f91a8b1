"""A mover without its processes: real reactor, TLS, HBONE and loopback sockets; no namespaces, no nat, no brain."""

from __future__ import annotations

import errno
import itertools
import os
import random
import socket
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

import pytest
import trio

from mesh.model.address import IpAddress, SocketAddress, parse_ip
from mesh.model.identity import SpiffeId
from mesh.model.service import Service
from mesh.model.workload import TunnelProtocol, Workload
from mesh.reactor.loop import Reactor
from mesh.reactor.pool import PoolLimits
from mesh.state.store import Delta, MeshState
from mesh.telemetry.access import AccessRecord
from mesh.telemetry.metrics import Registry, TcpMetrics
from mesh.testing.ca import FakeCa
from ztunnel_py.messages import PodInfo
from ztunnel_py.mover import inbound, outbound
from ztunnel_py.mover import pod as pods
from ztunnel_py.mover.credentials import CredentialStore
from ztunnel_py.mover.inbound import InboundHbone, InboundPlaintext
from ztunnel_py.mover.ledger import Ledger
from ztunnel_py.mover.outbound import Outbound
from ztunnel_py.mover.plane import Plane
from ztunnel_py.mover.pod import Pod, PodSockets, Serve
from ztunnel_py.mover.waiting import WaitingRoom

CA = FakeCa()
PATIENCE = 15.0
_ADDRESSES = itertools.count(1)


class Log:
    def __init__(self) -> None:
        self.records: list[AccessRecord] = []

    def wants(self, level: str) -> bool:
        return level != "debug"

    def write(self, record: AccessRecord) -> None:
        self.records.append(record)


class Network:
    """Stands for the namespaces of the pods, by what enters one and makes sockets there: each "is" an address of the loopback network."""

    def __init__(self) -> None:
        self.places: dict[int, str] = {}
        """By the descriptor of the namespace."""
        self.broken: dict[str, OSError] = {}
        """Raised instead of entering that pod's."""
        self.dialled: list[str] = []
        """Which pods have dialled."""
        self.relays_fail = False
        """Whether a socket that has been connected raises MemoryError in the hands of a relay."""
        self.visits = 0
        self._within = ""

    @contextmanager
    def enter(self, netns: int, home: int) -> Iterator[None]:
        self._within = self.places[netns]
        if self._within in self.broken:
            raise self.broken[self._within]
        self.visits += 1
        yield

    def make_socket(self, family: int, *, mark: int | None) -> socket.socket:
        return LoopbackSocket(self, self._within)


class LoopbackSocket(socket.socket):
    """Has the address of its pod where nobody gave it another."""

    def __init__(self, network: Network, ip: str) -> None:
        super().__init__()
        self.setblocking(False)
        self._network = network
        self._ip = ip
        self._dials = False
        self._connected = False

    def connect_ex(self, address: Any) -> int:
        if self.getsockname()[1] == 0:
            self.bind((self._ip, 0))
        if not self._dials:
            self._dials = True
            self._network.dialled.append(self._ip)
        code = super().connect_ex(address)
        self._connected = code in (0, errno.EALREADY)
        return code

    def fileno(self) -> int:
        if self._connected and self._network.relays_fail:
            raise MemoryError
        return super().fileno()


def bind_to(sock: socket.socket, source: IpAddress, port: int) -> None:
    sock.bind((str(source), 0))


def ip_of(pod: Pod) -> IpAddress:
    return parse_ip(pod.uid)


class World:
    def __init__(self) -> None:
        self.errors: list[BaseException] = []
        self.reactor = Reactor(on_error=lambda error, where: self.errors.append(error))
        self.log = Log()
        self.network = Network()
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

    def pod(self, name: str, *, known: bool = True, certified: bool = True, inbound_hbone: Serve = InboundHbone) -> Pod:
        """A served pod in the mesh; its application listens where a test lets it."""
        ip = f"127.84.{os.getpid() % 251}.{next(_ADDRESSES)}"
        fds = [os.open("/dev/null", os.O_RDONLY)]
        for port in (0, 0, 15008):
            fds.append(socket.create_server((ip, port)).detach())
        self.network.places[fds[0]] = ip
        pod = Pod(self.plane, PodInfo(ip, name, "shop", name), PodSockets(*fds))
        pod.listen(outbound=Outbound, inbound_plaintext=InboundPlaintext, inbound_hbone=inbound_hbone)
        self._pods.append(pod)
        if known:
            self.describe(pod)
        if certified:
            self.certify(pod)
        return pod

    def forget(self, pod: Pod) -> None:
        """The test closes it, and nothing here has it any more."""
        self._pods.remove(pod)

    def certify(self, pod: Pod, **options: Any) -> None:
        """The brain hands over the certificate of the pod's identity."""
        self.plane.credentials.put(CA.issue(pod.identity(), **options))

    def describe(self, pod: Pod, *policies: str, protocol: TunnelProtocol = TunnelProtocol.HBONE, service: Service | None = None) -> None:
        """The control plane tells what there is to know about the pod, and of the service that it is an endpoint of."""
        info = pod.info
        workload = Workload(
            f"Kubernetes//Pod/shop/{info.name}",
            info.name,
            "shop",
            (ip_of(pod),),
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

    async def dial(self, pod: Pod, destination: SocketAddress | None, *, plaintext: bool = False) -> trio.SocketStream:
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
    async def application(self, pod: Pod, port: int = 0) -> AsyncIterator[SocketAddress]:
        """An echo server in the pod."""

        async def serve(stream: trio.SocketStream) -> None:
            with suppress(trio.BrokenResourceError):
                async for data in stream:
                    await stream.send_all(data)
                await stream.aclose()

        listeners = await trio.open_tcp_listeners(port, host=str(ip_of(pod)))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, serve, listeners)
            yield SocketAddress(ip_of(pod), listeners[0].socket.getsockname()[1])
            nursery.cancel_scope.cancel()
        await trio.lowlevel.checkpoint()

    async def until(self, condition: Callable[[], object]) -> None:
        while not condition():  # noqa: ASYNC110  # callbacks of the reactor set no events
            await trio.sleep(0.005)

    @property
    def errors_logged(self) -> list[str | None]:
        return [record.error for record in self.log.records]

    @contextmanager
    def silent_application(self, pod: Pod) -> Iterator[SocketAddress]:
        """One in the pod that no connection to is ever complete: its queue is full."""
        with socket.create_server((str(ip_of(pod)), 0), backlog=0) as listener, socket.create_connection(listener.getsockname()):
            yield SocketAddress(ip_of(pod), listener.getsockname()[1])

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

    monkeypatch.setattr(pods, "entered", made.network.enter)
    monkeypatch.setattr(pods, "make_upstream_socket", made.network.make_socket)
    monkeypatch.setattr(pods, "bind_foreign", bind_to)
    monkeypatch.setattr(outbound, "original_destination", original)
    monkeypatch.setattr(inbound, "original_destination", original)
    return made

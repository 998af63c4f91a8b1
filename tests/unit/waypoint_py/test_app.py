"""The waypoint as a process: what it asks of the control plane, when it is ready, what its pages say, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest
import trio

from mesh.model.address import SocketAddress
from mesh.model.l7.matching import PathKind, PathMatch, RouteMatch
from mesh.model.l7.policy import AuthorizationPolicy, PolicyAction, PolicyRule
from mesh.model.l7.routing import DirectResponse, Origin, Route
from mesh.model.l7.waypoint import (
    AccessLogging,
    Assigned,
    PortConfig,
    Protocol,
    RouteTable,
    ServiceConfig,
    TableUse,
    Tracing,
    WaypointSettings,
)
from mesh.model.service import Service, ServicePort
from mesh.model.workload import PortMapping
from mesh.rpc import Call, RpcError, Status, Unary, serve
from mesh.rpc.tls import server_tls
from mesh.state.store import Delta
from mesh.testing.serving import write_serving_certificate
from mesh.xds.cache import ResourceCache
from mesh.xds.l7 import AUTHORIZATION_POLICY, ROUTE_TABLE, resource_name
from mesh.xds.names import CREATE_CERTIFICATE_METHOD, role_of_node_id
from mesh.xds.proto.ca_pb2 import IstioCertificateRequest, IstioCertificateResponse
from mesh.xds.server import AdsServer, Introduction
from tests.unit.waypoint_py.harness import CA, CLIENT, HOST, VIP, WAYPOINT, Echo, World, default_route, loopback
from tests.unit.waypoint_py.telemetry.collector import Collector

OWNER = "shop/waypoint"


class ControlPlane:
    """As much of one as a waypoint talks to."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.material = write_serving_certificate(directory, "localhost")
        (directory / "root.pem").write_text(self.material.root_pem)
        (directory / "token").write_text("good")
        self.cache = ResourceCache()
        self.server = AdsServer(self.cache, authenticate=self._authenticate, assign=self._assign)
        self.signs = True
        self.introduced: list[Introduction] = []
        self.port = 0

    async def _authenticate(self, call: Call) -> object:
        if call.metadata.get("authorization") != "Bearer good":
            raise RpcError(Status.UNAUTHENTICATED, "no token")
        return "waypoint"

    def _assign(self, introduction: Introduction) -> str:
        self.introduced.append(introduction)
        return OWNER if role_of_node_id(introduction.node_id) == "waypoint" and introduction.gateway == "waypoint" else ""

    async def _sign(self, body: bytes, call: Call) -> bytes:
        await self._authenticate(call)
        if not self.signs:
            raise RpcError(Status.UNAVAILABLE, "not now")
        request = IstioCertificateRequest.FromString(body)
        assert not request.metadata.fields  # it asks for itself
        leaf = CA.sign(request.csr.encode(), WAYPOINT)
        return IstioCertificateResponse(cert_chain=[leaf.decode(), CA.root_pem.decode()]).SerializeToString()

    def change(self, delta: Delta) -> None:
        self.server.publish(self.cache.apply(delta))

    def push(self, *resources: object) -> None:
        self.change(Delta(l7=tuple(Assigned(OWNER, resource) for resource in resources)))

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.port = listeners[0].socket.getsockname()[1]
        tls = server_tls(self.material.chain, self.material.key)
        handlers = {**self.server.handlers(), CREATE_CERTIFICATE_METHOD: Unary(self._sign)}
        async with trio.open_nursery() as nursery:
            await nursery.start(lambda task_status: serve(listeners, handlers, tls=lambda: tls, task_status=task_status))
            yield
            nursery.cancel_scope.cancel()


T = TypeVar("T")


async def eventually(ask: Callable[[], Awaitable[T]], enough: Callable[[T], bool]) -> T:
    """Ask again and again, of another process, until the answer will do."""
    while not enough(answer := await ask()):  # noqa: ASYNC110  # nothing here is told of it
        await trio.sleep(0.02)
    return answer


class Process:
    """The program, on addresses of its own."""

    def __init__(self, plane: ControlPlane, *, drain: int = 5) -> None:
        self.ip = loopback()
        self.environment = {
            **os.environ,
            "GATEWAY_NAME": "waypoint",
            "POD_NAME": "waypoint-1",
            "POD_NAMESPACE": "shop",
            "SERVICE_ACCOUNT": "waypoint",
            "INSTANCE_IP": str(self.ip),
            "XDS_ADDRESS": f"https://localhost:{plane.port}",
            "CA_ADDRESS": f"https://localhost:{plane.port}",
            "XDS_ROOT_CA": str(plane.directory / "root.pem"),
            "CA_ROOT_CA": str(plane.directory / "root.pem"),
            "AUTH_TOKEN": str(plane.directory / "token"),
            "TERMINATION_DRAIN_DURATION_SECONDS": str(drain),
            "HBONE_ADDR": f"{self.ip}:15008",
            "ADMIN_ADDR": f"{self.ip}:15000",
            "STATS_ADDR": f"{self.ip}:15020",
            "READINESS_ADDR": f"{self.ip}:15021",
        }
        self.process: trio.Process

    @asynccontextmanager
    async def running(self, output: Path | None = None) -> AsyncIterator[trio.Process]:
        """``output``: where its standard output goes; by default where ours does."""
        async with trio.open_nursery() as nursery:
            command = [sys.executable, "-m", "waypoint_py", "proxy"]
            with ExitStack() as files:
                stdout = files.enter_context(output.open("wb")) if output is not None else None
                self.process = await nursery.start(partial(trio.run_process, command, env=self.environment, check=False, stdout=stdout))
            yield self.process
            nursery.cancel_scope.cancel()

    async def page(self, path: str, port: int = 15000, method: str = "GET") -> tuple[int, str]:
        try:
            stream = await trio.open_tcp_stream(str(self.ip), port)
        except OSError:
            return 0, ""
        async with stream:
            await stream.send_all(f"{method} {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode())
            received = b""
            while data := await stream.receive_some(65536):
                received += data
        head, _, body = received.partition(b"\r\n\r\n")
        return int(head.split(b" ")[1]), body.decode()

    async def wait_ready(self) -> None:
        await eventually(lambda: self.page("/healthz/ready", 15021), lambda page: page[0] == 200)

    async def wait_unready(self) -> None:
        await eventually(lambda: self.page("/healthz/ready", 15021), lambda page: page[0] == 500)

    async def wait_busy(self) -> None:
        """Until a request is under way."""
        await eventually(lambda: self.page("/clusters"), lambda page: json.loads(page[1])["counts"]["exchanges"] > 0)


def _deny() -> AuthorizationPolicy:
    return AuthorizationPolicy(Origin("AuthorizationPolicy", "shop", "no"), PolicyAction.DENY, rules=(PolicyRule(),))


def _mesh(world: World, plane: ControlPlane, address: SocketAddress) -> None:
    world.describe(world.endpoint(address))
    plane.change(Delta(services=tuple(world.state.services()), workloads=tuple(world.state.workloads())))
    plane.push(
        WaypointSettings("shop", "waypoint"), ServiceConfig("shop", HOST, (PortConfig(80, Protocol.HTTP, routes=(default_route(),)),))
    )


def test_a_waypoint_serves_what_it_is_told_and_follows_changes(tmp_path: Path) -> None:
    world, plane = World(), ControlPlane(tmp_path)

    async def main() -> None:
        async with world.application(Echo()) as address, plane.running():
            _mesh(world, plane, address)
            process = Process(plane)
            async with process.running():
                await process.wait_ready()
                assert plane.introduced[0].node_id == f"waypoint~{process.ip}~waypoint-1.shop~shop.svc.cluster.local"
                world.address = SocketAddress(process.ip, 15008)
                client = await world.client()
                assert (await client.get("/hello")).text == "GET /hello\n"
                plane.push(_deny())
                await eventually(lambda: client.get("/"), lambda answer: answer.status == 403)
                plane.change(Delta(removed_l7=((AUTHORIZATION_POLICY, resource_name(Assigned(OWNER, _deny()))),)))
                await eventually(lambda: client.get("/"), lambda answer: answer.status == 200)
                await _look_at_pages(process)
                process.process.send_signal(signal.SIGTERM)
                assert await process.process.wait() == 0

    world.run(main)


def _answering(status: int, count: int) -> tuple[RouteTable, ...]:
    """Tables of routes that all answer this, by a path of each one's own."""
    tables = []
    for number in range(4):
        paths = [PathMatch(PathKind.EXACT, f"/{number}/{index}") for index in range(count)]
        origin = Origin("VirtualService", "shop", "v")
        routes = tuple(Route(origin, DirectResponse(status), matches=(RouteMatch(path=path),)) for path in paths)
        tables.append(RouteTable(f"{status}/{number}", routes))
    return tuple(tables)


def _naming(tables: tuple[RouteTable, ...]) -> ServiceConfig:
    use = TableUse(tuple(table.key for table in tables))
    return ServiceConfig("shop", HOST, (PortConfig(80, Protocol.HTTP, tables=(use,)),))


def test_while_many_routes_change_every_request_has_all_of_the_old_ones_or_all_of_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mesh.xds.server.PART_SIZE", 4096)
    world, plane, count = World(), ControlPlane(tmp_path), 300
    old, new = _answering(201, count), _answering(202, count)

    async def main() -> None:
        async with world.application(Echo()) as address, plane.running():
            _mesh(world, plane, address)
            plane.push(*old, _naming(old))
            process = Process(plane)
            async with process.running():
                # Ready with the last part of the first answer: nobody is told that there is no route.
                await process.wait_ready()
                world.address = SocketAddress(process.ip, 15008)
                client = await world.client()
                seen: list[int] = []

                async def ask() -> int:
                    seen.append((await client.get(f"/{len(seen) % 4}/{len(seen) % count}")).status)
                    return seen[-1]

                await ask()
                gone = tuple((ROUTE_TABLE, resource_name(Assigned(OWNER, table))) for table in old)
                plane.change(Delta(l7=tuple(Assigned(OWNER, each) for each in (*new, _naming(new))), removed_l7=gone))
                while await ask() == 201:
                    pass
                for _ in range(4 * count):
                    await ask()
                assert seen == sorted(seen)
                assert set(seen) == {201, 202}
                await plane.server.wait_taken(waypoints=True)
                process.process.send_signal(signal.SIGTERM)
                assert await process.process.wait() == 0

    world.run(main)


async def _look_at_pages(process: Process) -> None:
    status, text = await process.page("/config_dump")
    dumped = json.loads(text)
    assert status == 200
    assert dumped["resources"]["ServiceConfig"][f"{OWNER}|shop/{HOST}"]["hostname"] == HOST
    assert dumped["certificates"][0]["identity"] == str(WAYPOINT)
    assert "PRIVATE KEY" not in text
    status, text = await process.page(f"/why?destination={VIP}&peer={CLIENT}&method=GET&path=/a")
    assert (status, json.loads(text)["outcome"].startswith("forwarded")) == (200, True)
    assert (await process.page("/why?destination=nonsense&peer=x"))[0] == 400
    clusters = json.loads((await process.page("/clusters"))[1])
    assert clusters["clusters"]
    assert clusters["counts"]["connections"] >= 1
    status, text = await process.page("/stats/prometheus", 15020)
    assert status == 200
    assert "waypoint_hbone_connections 1" in text
    assert 'istio_requests_total{reporter="waypoint",' in text
    assert (await process.page("/logging?level=debug", method="POST"))[0] == 200


def test_a_waypoint_logs_to_standard_output_and_sends_its_spans_through_the_mesh(tmp_path: Path) -> None:
    world, plane, collector = World(), ControlPlane(tmp_path), Collector()
    name = "collector.shop.svc.cluster.local"

    async def main() -> None:
        async with world.application(Echo()) as address, world.application(collector.serve) as at, plane.running():
            _mesh(world, plane, address)
            service = Service("collector", "shop", name, ports=(ServicePort(4318, at.port),))
            pod = world.endpoint(at, "collector-1", services={service.key: (PortMapping(4318, at.port),)})
            plane.change(Delta(services=(service,), workloads=(pod,)))
            tracing = Tracing(f"http://{name}:4318/v1/traces", 100.0)
            plane.push(WaypointSettings("shop", "waypoint", access_log=AccessLogging(format="%REQ(:PATH)% %TRACE_ID%"), tracing=tracing))
            process = Process(plane)
            async with process.running(tmp_path / "log"):
                await process.wait_ready()
                world.address = SocketAddress(process.ip, 15008)
                client = await world.client()
                assert (await client.get("/hello")).status == 200
                await world.until(lambda: "/hello " in (tmp_path / "log").read_text())
                assert (await client.get("/last")).status == 200
                process.process.send_signal(signal.SIGTERM)
                assert await process.process.wait() == 0
            lines = (tmp_path / "log").read_text().splitlines()
            traces = [f"/{path} {span.trace_id.hex()}" for path, span in zip(("hello", "last"), collector.spans, strict=True)]
            assert [line for line in lines if line.startswith("/")] == traces
            (said,) = {each.resource_spans[0].resource.attributes[0].value.string_value for each in collector.received}
            assert said == "waypoint.shop"

    world.run(main)


def test_a_waypoint_is_not_ready_without_configuration_or_certificate(tmp_path: Path) -> None:
    world, plane = World(), ControlPlane(tmp_path)
    plane.signs = False

    async def main() -> None:
        async with plane.running():
            process = Process(plane)
            async with process.running():

                def says_why(page: tuple[int, str]) -> bool:
                    assert page[0] in (0, 500)
                    return "certificate" in page[1] and "not now" in page[1] and "configuration" not in page[1]

                await eventually(lambda: process.page("/healthz/ready", 15021), says_why)
                plane.signs = True
                await process.wait_ready()
                status, _ = await process.page("/quitquitquit", method="POST")
                assert status == 200
                assert await process.process.wait() == 0

    world.run(main)


def test_draining_lets_a_request_end_and_then_the_process(tmp_path: Path) -> None:
    world, plane = World(), ControlPlane(tmp_path)
    release = trio.Event()

    async def slow(stream: trio.SocketStream) -> None:
        while await stream.receive_some(65536):
            await release.wait()
            await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    async def main() -> None:
        async with world.application(slow) as address, plane.running():
            _mesh(world, plane, address)
            process = Process(plane)
            async with process.running():
                await process.wait_ready()
                world.address = SocketAddress(process.ip, 15008)
                link = await world.link()
                client = await world.client(link=link)
                await client.send("/")
                await process.wait_busy()
                process.process.send_signal(signal.SIGTERM)
                await process.wait_unready()
                late = await world.client()  # of an agent that has not heard of it yet
                await late.send("/")
                await world.until(lambda: not link.usable)
                with socket.socket() as refused:
                    assert refused.connect_ex((str(process.ip), 15008)) != 0
                release.set()
                assert (await client.answer()).body == b"ok"
                assert (await late.answer()).body == b"ok"
                assert await process.process.wait() == 0

    world.run(main)


def test_a_connection_that_does_not_end_is_cut_off_when_the_time_is_over(tmp_path: Path) -> None:
    world, plane = World(), ControlPlane(tmp_path)

    async def silent(stream: trio.SocketStream) -> None:
        await trio.sleep_forever()

    async def main() -> None:
        async with world.application(silent) as address, plane.running():
            _mesh(world, plane, address)
            process = Process(plane, drain=1)
            async with process.running():
                await process.wait_ready()
                world.address = SocketAddress(process.ip, 15008)
                client = await world.client()
                await client.send("/")
                await process.wait_busy()
                began = trio.current_time()
                process.process.send_signal(signal.SIGTERM)
                assert await process.process.wait() == 0
                assert 0.9 < trio.current_time() - began < 4

    world.run(main)


def _run(arguments: list[str], environment: Mapping[str, str]) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "waypoint_py", *arguments], env=dict(environment), capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout + done.stderr


def test_every_mistake_in_the_environment_is_told_at_once() -> None:
    status, text = _run([], {"PATH": os.environ["PATH"], "PYTHONPATH": os.environ.get("PYTHONPATH", "."), "MAX_CONCURRENT_STREAMS": "0"})
    assert status == 78
    for name in ("GATEWAY_NAME", "POD_NAME", "POD_NAMESPACE", "SERVICE_ACCOUNT", "INSTANCE_IP", "MAX_CONCURRENT_STREAMS"):
        assert name in text


def test_the_command_says_what_it_is() -> None:
    assert _run(["version"], os.environ)[1].startswith("waypoint-py ")
    assert _run(["help"], os.environ)[0] == 0
    status, text = _run(["nonsense"], os.environ)
    assert (status, "unknown command: nonsense" in text) == (1, True)

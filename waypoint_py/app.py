"""The waypoint: wires the reactor to configuration, certificates and pages; the only file that does.

The reactor is the host loop and trio its guest, in one thread. Requests are served in callbacks; what waits for something else is trio's.
"""

from __future__ import annotations

import random
import resource
import socket
import sys
import time
from collections.abc import Awaitable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from typing import Final

import trio
from OpenSSL import SSL

from mesh.http.codec import ClientCodec
from mesh.http.h1 import Http1Client
from mesh.http.h2 import Http2Client
from mesh.model.address import parse_ip
from mesh.model.l7.routing import Destination
from mesh.model.l7.waypoint import WaypointSettings
from mesh.model.workload import Workload
from mesh.reactor.loop import Reactor
from mesh.runtime.clients import ads_client, authority
from mesh.runtime.env import InvalidEnvironment
from mesh.runtime.garbage import collect_seldom
from mesh.runtime.http import BindError, Routes, open_listeners, serve_admin
from mesh.runtime.hugepages import keep_in_huge_pages
from mesh.runtime.outbound import Dialler as Outbound
from mesh.runtime.outbound import OutboundError, Target
from mesh.runtime.readiness import Readiness
from mesh.runtime.signals import watch_signals
from mesh.state.store import MeshState
from mesh.telemetry import log
from mesh.telemetry.metrics import Registry, XdsMetrics, add_build, add_process
from mesh.telemetry.output import LogOutput
from mesh.tls.bundle import CertificateBundle
from mesh.tls.rotation import CertificateManager, CertificateNews
from mesh.xds.authority import request_certificate
from mesh.xds.client import AdsState, AdsUpdate, Phase, run_ads_client
from mesh.xds.l7 import L7_TYPES
from mesh.xds.names import ADDRESS, GATEWAY_NAME, waypoint_node_id
from waypoint_py.admin import Admin
from waypoint_py.admission import Ourselves
from waypoint_py.config import WaypointConfig, read_config
from waypoint_py.credentials import Credentials
from waypoint_py.listener import DRAINED, HboneListener, open_sockets
from waypoint_py.observer import Local
from waypoint_py.plane import Plane
from waypoint_py.policy.ext_authz import ExtAuthz, Unreachable
from waypoint_py.policy.jwks import Authenticator, KeyStore
from waypoint_py.reach import reach
from waypoint_py.store import Store
from waypoint_py.telemetry.access_log import SCOPE, AccessLog
from waypoint_py.telemetry.export import SpanExporter
from waypoint_py.telemetry.metrics import WaypointMetrics
from waypoint_py.telemetry.telemetry import Telemetry
from waypoint_py.turns import finish_in_turns
from waypoint_py.upstream.announce import announce
from waypoint_py.upstream.balancer import Balancer
from waypoint_py.upstream.dial import Dialler
from waypoint_py.upstream.pool import Pool
from waypoint_py.upstream.session import Endpoint, UpstreamProtocol
from waypoint_py.waiting import NurseryWaits

EXIT_CONFIG: Final = 78
"""As configured it cannot start, and a restart would not help (sysexits.h, EX_CONFIG)."""
_LOG_AGAIN: Final = 0.2
"""Seconds until a reader of the log that stood still is tried again."""
_LAST_WORDS: Final = 0.05
_LAST_SPANS: Final = 2.0
"""For a collector, when all else has ended."""
_STILL_TAKEN: Final = 3.0
"""Seconds in which connections are taken after SIGTERM, if there is that much time: agents hear of a pod that ends within one."""
_DRAIN_LOOKS: Final = 0.05
_NAMED: Final = 4
"""Tables of routes that a line of the log names."""
_ABLE_WITHIN: Final = 5.0
"""Seconds after the start in which nobody is accepted before somebody can be served: until then connections wait in the kernel's queue, and
agents for the handshake. After it they are refused, with the reason."""

_log = log.get_logger("waypoint")


def run_waypoint() -> int:
    """Process entry: serve until told to stop. Returns the exit status."""
    try:
        output = LogOutput()
        log.configure_from(stream=output)
        config = read_config()
    except (log.InvalidLogSettings, InvalidEnvironment) as exc:
        print(exc, file=sys.stderr)
        return EXIT_CONFIG
    _raise_descriptor_limit()
    reactor = Reactor(
        on_error=lambda error, where: _log.error("callback.failed", where=where, exc_info=error),
        on_exhausted=lambda error: _log.error("accept.failed", error=str(error), because="new connections wait until others end"),
    )
    output.when_blocked = lambda: reactor.call_later(_LOG_AGAIN, output.try_again)
    collect_seldom()
    try:
        reactor.run(Waypoint(config, reactor, output).run)
    except BindError as exc:
        _log.error("start.failed", error=str(exc))
        return EXIT_CONFIG
    return 0


def _raise_descriptor_limit() -> None:
    """As many descriptors as we are allowed: connections need them."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def make_client_codec(kind: UpstreamProtocol) -> ClientCodec:
    """What speaks to an application."""
    return Http2Client(now=time.monotonic) if kind is UpstreamProtocol.HTTP2 else Http1Client()


class Whereabouts:
    """Who we are in the mesh, looked up anew when the mesh has changed."""

    def __init__(self, config: WaypointConfig, state: MeshState) -> None:
        self._config = config
        self._state = state
        self._generation = -1
        self._ourselves: Ourselves | None = None

    def find(self) -> Ourselves:
        if self._ourselves is None or self._generation != self._state.generation:
            self._generation = self._state.generation
            config = self._config
            workload = self._state.find_local_workload(config.pod_namespace, config.pod_name, config.service_account)
            addresses = {parse_ip(config.instance_ip), *(workload.addresses if workload is not None else ())}
            network = workload.network if workload is not None else config.network
            self._ourselves = Ourselves(config.service, network, frozenset(addresses), workload)
        return self._ourselves

    def workload(self) -> Workload:
        """Ours, or what we know of it ourselves until the mesh tells."""
        us = self.find()
        if us.workload is not None:
            return us.workload
        config = self._config
        return Workload(
            "", config.pod_name, config.pod_namespace, tuple(us.addresses), us.network, node=config.node_name, cluster_id=config.cluster_id
        )


class Waypoint:
    """Everything of one process, and its life."""

    def __init__(self, config: WaypointConfig, reactor: Reactor, output: LogOutput) -> None:
        self._config = config
        self._reactor = reactor
        self._output = output
        self._registry = Registry()
        self._xds_metrics = XdsMetrics(self._registry)
        add_build(self._registry, "waypoint", version("ambient-mesh"))
        add_process(self._registry)
        rng = random.Random()
        self._state = MeshState()
        self._where = Whereabouts(config, self._state)
        self._credentials = Credentials(config.identity)
        self._certificates = CertificateManager(partial(request_certificate, authority(config, impersonate=False)))
        self._certificates.subscribe(self._certificate_news)
        self._keys = KeyStore()
        store = Store(WaypointSettings(config.pod_namespace, config.gateway_name), self._keys.find)
        self._waits = NurseryWaits(reactor)
        dialler = Dialler(reactor, self._credentials, lambda endpoint, client: announce(self._where.find().workload, endpoint, client, rng))
        self._pool = Pool(reactor, dialler, make_client_codec)
        self._ext_authz = ExtAuthz(self._reach, identity=str(config.identity))
        self._outbound = Outbound()
        self._spans = SpanExporter(
            lambda: store.settings.tracing,
            self._dial_collector,
            self._registry,
            resource=_describe(config),
            version=version("ambient-mesh"),
            rng=rng,
        )
        access_log = AccessLog(lambda: store.settings.access_log, output, reactor.call_soon, wanted=lambda: log.wants(SCOPE, "info"))
        self._plane = Plane(
            reactor=reactor,
            state=self._state,
            store=store,
            connections=self._pool,
            balancer=Balancer(self._state, store.find_destination, self._where.workload, rng, lambda: store.version),
            observer=Telemetry(lambda: store.settings, WaypointMetrics(self._registry), access_log, self._spans, rng),
            waits=self._waits,
            authenticator=Authenticator(self._keys),
            ext_authz=self._ext_authz,
            us=self._where.find,
            local=Local(config.pod_name, config.identity),
            rng=rng,
            wall=time.time,
        )
        self._readiness = Readiness()
        self._configured = self._readiness.register("configuration")
        self._certified = self._readiness.register("certificate")
        self._serving = self._readiness.register("listener")
        self._ads_state = AdsState(Phase.CONNECTING, synced=False)
        self._stop = trio.Event()
        self._able = trio.Event()
        """A certificate and a whole configuration have come once."""
        self.listener = HboneListener(self._plane, self._credentials, max_streams=config.max_streams, synced=lambda: self._ads_state.synced)
        self._admin = Admin(
            config, self._plane, self.listener, self._certificates, self._registry, lambda: str(self._ads_state), stop=self._stop
        )

    async def run(self) -> None:
        """Until SIGTERM or ``/quitquitquit``, and then until it has drained. Raises BindError when a port is taken."""
        config, admin = self._config, self._admin
        try:
            sockets = open_sockets(config.hbone_address)
        except (OSError, ValueError) as exc:
            raise BindError(f"failed to bind to address {config.hbone_address}: {exc}") from exc
        try:
            ports = [
                (admin.routes(), await open_listeners(config.admin_address)),
                (admin.metrics_routes(), await open_listeners(config.stats_address)),
                (admin.readiness_routes(self._readiness), await open_listeners(config.readiness_address)),
            ]
            await self._serve(sockets, ports)
        finally:
            for sock in sockets:
                sock.close()

    async def _serve(self, sockets: Sequence[socket.socket], ports: Sequence[tuple[Routes, Sequence[trio.SocketListener]]]) -> None:
        async with trio.open_nursery() as nursery:
            for routes, listeners in ports:
                nursery.start_soon(serve_admin, routes, listeners)
            nursery.start_soon(self._watch_signals)
            nursery.start_soon(keep_in_huge_pages)
            async with trio.open_nursery() as working:
                await working.start(self._waits.run)
                await working.start(self._keys.run)
                await working.start(self._ext_authz.run)
                await working.start(self._spans.run)
                working.start_soon(self._certificates.run)
                self._certificates.request(self._config.identity)
                working.start_soon(self._run_xds)
                with trio.move_on_after(_ABLE_WITHIN):
                    await self._able.wait()
                for sock in sockets:
                    self.listener.listen(sock)
                self._serving.done()
                _log.info("serving", gateway=self._config.key, addresses=", ".join(str(sock.getsockname()[:2]) for sock in sockets))
                await self._stop.wait()
                await self._drain(sockets)
                await self._send_last_spans()
                working.cancel_scope.cancel()
            nursery.cancel_scope.cancel()

    def _look_if_able(self) -> None:
        if self._ads_state.synced and isinstance(self._credentials.context(), SSL.Context):
            self._able.set()

    async def _drain(self, sockets: Sequence[socket.socket]) -> None:
        """Not ready from now on, and closed once agents know of it; what lives goes on until it has ended or its time is over."""
        self._serving.pending("draining")
        seconds = float(self._config.drain)
        _log.info("draining", seconds=seconds, connections=self._plane.counts.connections)
        # Agents go on sending here until the control plane has told them of another waypoint; to close now would refuse those connections.
        self.listener.wind_down()
        await trio.sleep(min(_STILL_TAKEN, seconds / 5))
        self.listener.drain()
        for sock in sockets:
            sock.close()
        with trio.move_on_after(seconds):
            while self.listener.links or self._plane.counts.connections:  # noqa: ASYNC110 - one look at two numbers, while ending
                await trio.sleep(_DRAIN_LOOKS)
        if self._plane.counts.connections:
            _log.warning("drain.cut_off", connections=self._plane.counts.connections)
        self.listener.abort(DRAINED)
        self._pool.close(gracefully=False)
        await trio.sleep(_LAST_WORDS)  # lets the last records and frames out
        self._output.flush()

    async def _watch_signals(self) -> None:
        async with trio.open_nursery() as nursery:
            stop = await nursery.start(watch_signals)
            await stop.wait()
            self._stop.set()
            self._able.set()  # whoever comes is taken and told to go

    # Configuration

    async def _run_xds(self) -> None:
        config = self._config
        pod = {
            "NAME": config.pod_name,
            "NAMESPACE": config.pod_namespace,
            "INSTANCE_IPS": config.instance_ip,
            "NODE_NAME": config.node_name,
            "SERVICE_ACCOUNT": config.service_account,
            GATEWAY_NAME: config.gateway_name,
        }
        client = ads_client(config, waypoint_node_id(config.instance_ip, config.pod_name, config.pod_namespace), pod)
        await run_ads_client(replace(client, types=(*L7_TYPES, ADDRESS), gather=False), self._xds_update, self._xds_state)

    def _xds_update(self, update: AdsUpdate) -> Awaitable[None] | None:
        self._xds_metrics.received(update.type_url, len(update.raw))
        if update.type_url != ADDRESS:
            return self._configure(update)
        changes = self._state.apply(update.delta)
        if changes.services:
            self.listener.wind_down_leavers()
        if changes.workloads:
            self._pool.forget(self._is_gone)
        return None

    async def _configure(self, update: AdsUpdate) -> None:
        """Acknowledged when it is in force; requests are served all the while."""
        store = self._plane.store
        if await finish_in_turns(store.applying(update.delta), self._reactor.now):
            _log.info(
                "configured", type=update.type_url.rpartition(".")[2], resources=len(update.delta.l7), removed=len(update.delta.removed_l7)
            )
            for service, tables in store.lacking.items():
                _log.warning("service.lacks_routes", service=service, tables=", ".join(tables[:_NAMED]))

    def _is_gone(self, endpoint: Endpoint) -> bool:
        return endpoint.workload is not None and self._state.find_workload(endpoint.workload.uid) is None

    def _xds_state(self, state: AdsState) -> None:
        self._ads_state = state
        self._look_if_able()
        if state.synced:
            self._configured.done()
        else:
            self._configured.pending(str(state))
        if state.phase is Phase.CONNECTED:
            self._certificates.retry_failed()
        elif state.phase is Phase.FAILED:
            self._xds_metrics.terminated("ConnectionError")

    # Certificates

    def _certificate_news(self, news: CertificateNews) -> None:
        if not isinstance(news, CertificateBundle):
            self._credentials.refuse(news.because)
            self._certified.pending(news.because)
            return
        try:
            self._credentials.put(news)
        except SSL.Error as exc:
            # OpenSSL refuses what parses, such as an intermediate with a weak key.
            _log.error("certificate.unusable", error=str(exc))
            self._credentials.refuse(f"the certificate is unusable: {exc}")
            return
        self._certified.done()
        self._look_if_able()

    # For others

    async def _reach(self, namespace: str, hostname: str, port: int) -> trio.abc.Stream:
        """A connection to a service of the mesh, with our own identity: for authorizers. Raises Unreachable."""
        plane = self._plane
        return await reach(plane.balancer, plane.connections, plane.reactor.now, Destination(namespace, hostname, port))

    async def _dial_collector(self, target: Target) -> trio.abc.Stream:
        """To where spans go: if the mesh knows the name, as to any service of it. Raises OutboundError, OSError."""
        found = () if target.secure else self._state.find_services_by_hostname(target.host, self._config.pod_namespace)
        for service in found:
            try:
                return await self._reach(service.namespace, service.hostname, target.port)
            except Unreachable as exc:
                raise OutboundError(str(exc)) from exc
        return await self._outbound(target)

    async def _send_last_spans(self) -> None:
        self._spans.hurry()
        with trio.move_on_after(_LAST_SPANS):
            while self._spans.waiting:  # noqa: ASYNC110 - one look at two numbers, while ending
                await trio.sleep(_DRAIN_LOOKS)


def _describe(config: WaypointConfig) -> Iterator[tuple[str, str]]:
    """Us, as who reads traces knows whoever sends spans."""
    yield "service.name", f"{config.gateway_name}.{config.pod_namespace}"
    yield "k8s.pod.name", config.pod_name
    yield "k8s.namespace.name", config.pod_namespace
    yield "k8s.cluster.name", config.cluster_id
    if config.node_name:
        yield "k8s.node.name", config.node_name
    yield "host.name", config.pod_name

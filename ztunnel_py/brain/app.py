"""The brain: wires xDS, certificates, pods, movers and the admin pages together; the only file of the brain that does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path

import trio

from mesh.kube.api import ApiClient
from mesh.kube.kubeconfig import KubeconfigError
from mesh.model.identity import InvalidSpiffeId, SpiffeId
from mesh.model.workload import TunnelProtocol
from mesh.runtime.clients import ads_client, authority
from mesh.runtime.env import InvalidEnvironment
from mesh.runtime.http import BindError, Routes, has_listener, open_listeners, serve_admin, unix_listener
from mesh.runtime.inspection import ADMIN_SOCKET
from mesh.runtime.readiness import Readiness
from mesh.runtime.signals import watch_signals
from mesh.state.store import MeshState
from mesh.telemetry import log
from mesh.telemetry.metrics import Registry, Totals, WorkloadManagerMetrics, XdsMetrics, add_build, add_process
from mesh.tls.bundle import CertificateBundle
from mesh.tls.rotation import CertificateManager, CertificateNews
from mesh.xds.authority import request_certificate
from mesh.xds.client import AdsState, AdsUpdate, Phase, run_ads_client
from mesh.xds.names import AUTHORIZATION, node_id
from ztunnel_py import messages
from ztunnel_py.brain.admin import Admin
from ztunnel_py.brain.charge import Charge, certificate_message
from ztunnel_py.brain.cni import CNI_BACKLOG, PluginKeeper, cni_routes
from ztunnel_py.brain.movers import Holding, Mover, Movers
from ztunnel_py.brain.pages import Pages
from ztunnel_py.brain.pods import PodKeeper
from ztunnel_py.brain.processes import raise_descriptor_limit
from ztunnel_py.brain.transfer import Newcomers, transfer_state, unreadable_bodies
from ztunnel_py.config import SPARE, AgentConfig, read_access, read_config
from ztunnel_py.pods.departure import ClusterDepartures, Departures, DirectoryDepartures, settle
from ztunnel_py.supervisor import EXIT_CONFIG, LIFELINE

THREADS = 8
"""For what blocks, above all captures. They wait for each other anyway, for the interpreter and for the kernel's lock of namespaces; a
hundred pods at once in trio's forty only took the memory of forty threads, each with a heap of its own."""
_SPARE_SECONDS = 0.5
"""How long after SIGTERM it takes at most until we hear whether the mover that runs apart was told to end too."""
_LISTEN_AGAIN = 5.0
"""Seconds until we try again to listen at a socket file."""
_BELIEVED = 0.25
"""Of the drain time: how long the API server must say that what we belong to is gone before we let the pods go for it."""
_FAREWELL = 0.4
"""Of the drain time: what is left for connections when pods had to be released, or a successor waited for."""

_log = log.get_logger("brain")


def open_departures(config: AgentConfig) -> Departures:
    """Where this agent learns whether another one will follow it."""
    if config.cluster is not None:
        return ClusterDepartures(ApiClient(config.cluster), config.pod_namespace, config.node_name, _BELIEVED * config.drain)
    return DirectoryDepartures(config.run_dir)


def run_brain(early: Mapping[str, subprocess.Popen[bytes]]) -> int:
    """Process entry. ``early``: movers that were started ahead. Returns the exit status; `EXIT_CONFIG` when a restart would not help."""
    try:
        log.configure_from()
        config = read_access(read_config())
    except (log.InvalidLogSettings, InvalidEnvironment, KubeconfigError) as exc:
        print(exc, file=sys.stderr)
        return EXIT_CONFIG
    raise_descriptor_limit()
    try:
        trio.run(Brain(config, early).run)
    except BindError as exc:
        _log.error("start.failed", error=str(exc))
        return EXIT_CONFIG
    return 0


class Brain:
    """Everything of the agent that waits for something. Implements `ztunnel_py.brain.movers.Follower`."""

    def __init__(self, config: AgentConfig, early: Mapping[str, subprocess.Popen[bytes]]) -> None:
        self._config = config
        self._registry = Registry()
        self._totals = Totals()
        self._xds_metrics = XdsMetrics(self._registry)
        workloads = WorkloadManagerMetrics(self._registry)
        add_build(self._registry, "ztunnel", version("ambient-mesh"))
        add_process(self._registry)
        self._state = MeshState(config.node_name)
        self._unreadable: dict[str, bytes] = {}
        """Policies that could not be read, as they came: joining movers get them so."""
        self._certificates = CertificateManager(partial(request_certificate, authority(config, impersonate=True)))
        self._certificates.subscribe(self._certificate_news)
        apart = (SPARE,) if config.spare_mover else ()
        self._movers = Movers(count=config.own_movers, run_dir=config.own_dir, follower=self, apart=apart, early=early)
        self._pods = PodKeeper(config, self._movers, self._certificates, workloads, self._is_announced)
        self._charge = Charge(config, self._pods, self._certificates)
        self._departures = open_departures(config)
        self._plugin: PluginKeeper | None = None
        if config.cluster is not None and config.cni_bin_dir is not None:
            self._plugin = PluginKeeper(config, lambda: self._pods.began.is_set())
        self._plugin_kept = trio.Event()
        """The plugin is not looked after any more."""
        self._ads_state = AdsState(Phase.CONNECTING, synced=False)
        self._readiness = Readiness()
        self._state_ready = self._readiness.register("state manager")
        self._movers_ready = self._readiness.register("movers")
        self._pods_ready = self._readiness.register("workload proxy manager")
        self._synced = trio.Event()
        self._newcomers: Newcomers[Mover] = Newcomers()
        self._movers_started = trio.Event()
        self._stop = trio.Event()
        self._orphaned = False
        self._leaving = False

    async def run(self) -> None:
        """Until SIGTERM, ``/quitquitquit`` or the supervisor's death; then `_end`. Raises BindError when a port is taken."""
        config = self._config
        trio.to_thread.current_default_thread_limiter().total_tokens = THREADS
        pages = Pages(config, self._state, self._certificates, self._movers, self._pods, self._readiness, ads_state=lambda: self._ads_state)
        admin = Admin(
            config,
            self._state,
            self._certificates,
            self._movers,
            self._pods,
            self._registry,
            self._totals,
            pages,
            stop=self._stop,
        )
        ports = [
            (admin.routes(), await open_listeners(config.admin_address)),
            (admin.metrics_routes(), await open_listeners(config.stats_address)),
            (admin.readiness_routes(self._readiness), await open_listeners(config.readiness_address)),
        ]
        async with trio.open_nursery() as nursery:
            for routes, listeners in ports:
                nursery.start_soon(serve_admin, routes, listeners)
            nursery.start_soon(self._listen_at, config.run_dir / ADMIN_SOCKET, admin.routes())
            nursery.start_soon(self._watch_signals)
            nursery.start_soon(self._watch_lifeline)
            async with trio.open_nursery() as working:
                working.start_soon(self._certificates.run)
                working.start_soon(self._run_movers)
                working.start_soon(self._run_xds)
                working.start_soon(self._run_pods)
                working.start_soon(self._departures.run)
                if self._plugin is not None:
                    working.start_soon(self._serve_cni)
                    working.start_soon(self._keep_plugin, self._plugin)
                await self._stop.wait()
                await self._end(trio.current_time() + config.drain)
                working.cancel_scope.cancel()
            nursery.cancel_scope.cancel()

    # The end

    async def _end(self, deadline: float) -> None:
        """Leave nobody without an agent: release all pods when no other will come, else hand over to who comes. Then drain."""
        for_good = False
        if not self._orphaned:
            farewell = deadline - _FAREWELL * self._config.drain
            departure = await settle(self._departures, farewell, lambda: self._charge.has_successor)
            for_good = departure.for_good
            _log.info("ending", for_good=for_good, because=departure.because)
            if for_good:
                await self._release_all(farewell, departure.because)
                if self._plugin is not None:
                    await self._plugin_kept.wait()
                    await self._plugin.remove()
            else:
                self._charge.end()
                with trio.move_on_at(farewell):
                    await self._wait_replaced()
        seconds = max(deadline - trio.current_time(), 0.0)
        _log.info("draining", seconds=round(seconds, 1))
        whole = all(mover.ending or not mover.apart for mover in self._movers.living())
        await self._movers.drain(seconds)
        if whole or for_good:
            await trio.to_thread.run_sync(remove_traces, self._config, for_good)

    async def _release_all(self, until: float, because: str) -> None:
        self._leaving = True
        self._synced.set()  # what is to be let go needs no configuration
        with trio.move_on_at(until):
            await self._charge.wait_acting()
        if self._charge.in_charge:
            await self._pods.release_all(max(until - trio.current_time(), 0.0), because)

    async def _wait_replaced(self) -> None:
        """Until somebody else accepts the node's new connections: another agent, or the mover that runs apart and goes on without us.
        Where nobody else can come there is nothing to wait for."""
        if self._config.spare_mover:
            await trio.sleep(_SPARE_SECONDS)
            if any(mover.apart and not mover.ending for mover in self._movers.living()):
                return
        if self._config.cluster is not None and self._charge.in_charge:
            await self._charge.wait_handed_over()

    # What runs

    async def _run_movers(self) -> None:
        self._movers_ready.pending("starting")
        async with trio.open_nursery() as nursery:
            await nursery.start(self._movers.run)
            self._movers_ready.done()
            await nursery.start(self._charge.serve)
            self._movers_started.set()

    async def _run_pods(self) -> None:
        # Capturing before the mesh is known would only make a pod's connections wait and fail; what movers of the last brain serve
        # already goes on meanwhile.
        self._pods_ready.pending("waiting for the first configuration")
        await self._movers_started.wait()
        await self._synced.wait()
        await self._charge.run(lambda: self._pods.run(on_change=self._pods_changed), waiting=self._pods_ready.pending)

    async def _serve_cni(self) -> None:
        """Answer CNI plugins until we are to stop: from then on nobody new would be served."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._listen_for_cni)
            await self._stop.wait()
            nursery.cancel_scope.cancel()

    async def _listen_for_cni(self) -> None:
        await self._listen_at(self._config.cni_socket, cni_routes(self._pods), CNI_BACKLOG)

    async def _listen_at(self, path: Path, routes: Routes, backlog: int = 16) -> None:
        """Serve at a socket file that the node's agents share: the one in charge has it, and its elder again when that one has died."""
        if await has_listener(path):
            await self._pods.began.wait()  # the agent we succeed answers better until then
        while True:
            try:
                with unix_listener(path, backlog) as listener:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(serve_admin, routes, [listener])
                        await self._pods.began.wait()
                        await self._pods.yielded.wait()
                        await self._pods.began.wait()  # in charge again: our successor had put its socket in the place of ours
                        nursery.cancel_scope.cancel()
            except BindError as exc:  # a full disk, no descriptors: who would ask here waits until it is over
                _log.error("socket.not_served", error=str(exc))
                await trio.sleep(_LISTEN_AGAIN)

    async def _keep_plugin(self, plugin: PluginKeeper) -> None:
        """Until we are to stop. What is installed then stays, unless `_end` takes it away."""
        ready = self._readiness.register("cni plugin")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(plugin.run, lambda because: ready.pending(because) if because else ready.done())
            await self._stop.wait()
            nursery.cancel_scope.cancel()
        self._plugin_kept.set()

    async def _run_xds(self) -> None:
        config = self._config
        pod = {
            "NAME": config.pod_name,
            "NAMESPACE": config.pod_namespace,
            "INSTANCE_IPS": config.instance_ip,
            "NODE_NAME": config.node_name,
        }
        client = ads_client(config, node_id(config.instance_ip, config.pod_name, config.pod_namespace), pod)
        await run_ads_client(client, self._xds_update, self._xds_state)

    async def _watch_signals(self) -> None:
        async with trio.open_nursery() as nursery:
            stop = await nursery.start(watch_signals)
            await stop.wait()
            self._stop.set()

    async def _watch_lifeline(self) -> None:
        number = os.environ.get(LIFELINE)
        if number is not None:
            await trio.lowlevel.wait_readable(int(number))
            _log.error("supervisor.gone")
            self._orphaned = True
            self._stop.set()

    # What comes

    def _xds_update(self, update: AdsUpdate) -> None:
        self._xds_metrics.received(update.type_url, len(update.raw))
        if update.whole:
            policies = update.type_url == AUTHORIZATION
            self._state.replace(update.delta, addresses=not policies, policies=policies)
        else:
            self._state.apply(update.delta)
        if update.type_url == AUTHORIZATION:
            self._keep_unreadable(update)
        self._pods.mesh_changed()
        self._movers.post(messages.Resources(update.whole, update.raw))
        self._newcomers.came()

    def _is_announced(self, pod: messages.PodInfo) -> bool:
        if self._leaving and self._ads_state.phase is not Phase.CONNECTED:
            return False  # the control plane is being taken down too: nobody will be told anything any more
        workload = self._state.find_local_workload(pod.namespace, pod.name, pod.service_account)
        return workload is not None and workload.tunnel_protocol is TunnelProtocol.HBONE

    def _keep_unreadable(self, update: AdsUpdate) -> None:
        for key in (*(policy.key for policy in update.delta.policies), *update.delta.removed_policies):
            self._unreadable.pop(key, None)
        broken = [policy.key for policy in update.delta.policies if policy.unreadable is not None]
        if broken:
            self._unreadable |= unreadable_bodies(update.raw, broken)

    def _xds_state(self, state: AdsState) -> None:
        self._ads_state = state
        self._pods.mesh_changed()
        if state.synced:
            self._state_ready.done()
            for mover in self._newcomers.synced():
                self._inform(mover)
            if not self._synced.is_set():
                self._synced.set()
                self._pods.serve_everywhere()
        else:
            self._state_ready.pending(str(state))
        if state.phase is Phase.CONNECTED:
            self._certificates.retry_failed()
        elif state.phase is Phase.FAILED:
            self._xds_metrics.terminated("ConnectionError")

    def _certificate_news(self, news: CertificateNews) -> None:
        if isinstance(news, CertificateBundle):
            self._movers.post(certificate_message(news))
        else:
            self._movers.post(messages.CertificateUnavailable(str(news.identity), news.because))

    def _pods_changed(self, pending: Sequence[str]) -> None:
        if pending:
            self._pods_ready.pending(", ".join(pending))
        else:
            self._pods_ready.done()

    # Movers

    def mover_joined(self, mover: Mover, holding: Sequence[Holding]) -> None:
        if self._newcomers.joined(mover):
            self._inform(mover)
        for state in self._certificates.states():
            if state.bundle is not None:
                mover.post(certificate_message(state.bundle))
        self._pods.mover_joined(mover, holding, informed=self._synced.is_set())

    def _inform(self, mover: Mover) -> None:
        for message in transfer_state(self._state, self._unreadable):
            mover.post(message)

    def mover_said(self, mover: Mover, message: messages.FromMover) -> None:
        if isinstance(message, messages.CertificateWanted):
            self._certificate_wanted(message.identity)
        else:
            self._pods.mover_said(mover, message)

    def mover_left(self, mover: Mover) -> None:
        self._newcomers.left(mover)
        self._totals.retire(mover.incarnation)
        self._pods.mover_left(mover)

    def _certificate_wanted(self, text: str) -> None:
        try:
            identity = SpiffeId.parse(text)
        except InvalidSpiffeId:
            return
        self._certificates.request(identity)
        bundle = self._certificates.find_bundle(identity)
        if bundle is not None:
            self._movers.post(certificate_message(bundle))


def remove_traces(config: AgentConfig, for_good: bool) -> None:
    """This agent's part of the run directory; ``for_good`` all of it, but for the directory, which may be a mount. Blocks."""
    for path in [*config.run_dir.iterdir()] if for_good else [config.own_dir]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

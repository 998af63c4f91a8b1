"""The brain: wires xDS, certificates, pods, movers and the admin pages together; the only file of the brain that does."""

from __future__ import annotations

import os
import resource
import ssl
import sys
from collections.abc import Sequence
from importlib.metadata import version

import trio

from mesh.kube.api import ApiClient
from mesh.kube.kubeconfig import KubeconfigError
from mesh.model.identity import InvalidSpiffeId, SpiffeId
from mesh.model.workload import TunnelProtocol
from mesh.rpc.tls import client_tls
from mesh.runtime.env import InvalidEnvironment
from mesh.runtime.http import BindError, Routes, open_listeners, serve_admin, unix_listener
from mesh.runtime.inspection import ADMIN_SOCKET
from mesh.runtime.readiness import Readiness
from mesh.runtime.signals import watch_signals
from mesh.state.store import MeshState
from mesh.telemetry import log
from mesh.telemetry.metrics import Registry, Totals, WorkloadManagerMetrics, XdsMetrics, add_build, add_process
from mesh.tls.bundle import CertificateBundle
from mesh.tls.rotation import CertificateManager, CertificateNews
from mesh.xds.client import AdsClientConfig, AdsState, AdsUpdate, Phase, bearer_metadata, connect_tls, run_ads_client
from mesh.xds.names import AUTHORIZATION, node_id
from ztunnel_py import messages
from ztunnel_py.brain.admin import Admin
from ztunnel_py.brain.authority import fetch_certificate
from ztunnel_py.brain.cni import CNI_BACKLOG, PluginKeeper, cni_routes, has_listener
from ztunnel_py.brain.movers import Holding, Mover, Movers
from ztunnel_py.brain.pages import Pages
from ztunnel_py.brain.pods import PodKeeper
from ztunnel_py.brain.transfer import transfer_state, unreadable_bodies
from ztunnel_py.config import AgentConfig, read_access, read_config
from ztunnel_py.pods.departure import ClusterDepartures
from ztunnel_py.supervisor import EXIT_CONFIG, LIFELINE

ASK_AGAIN_SECONDS = 1.0
"""When the API server did not say whether another agent follows."""

_log = log.get_logger("brain")


def run_brain() -> int:
    """Process entry. Returns the exit status; `EXIT_CONFIG` when a restart would not help."""
    try:
        log.configure_from()
        config = read_access(read_config())
    except (log.InvalidLogSettings, InvalidEnvironment, KubeconfigError) as exc:
        print(exc, file=sys.stderr)
        return EXIT_CONFIG
    _raise_descriptor_limit()
    try:
        trio.run(Brain(config).run)
    except BindError as exc:
        _log.error("start.failed", error=str(exc))
        return EXIT_CONFIG
    return 0


class Brain:
    """Everything of the agent that waits for something. Implements `ztunnel_py.brain.movers.Follower`."""

    def __init__(self, config: AgentConfig) -> None:
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
        self._certificates = CertificateManager(lambda identity: fetch_certificate(config, identity))
        self._certificates.subscribe(self._certificate_news)
        self._movers = Movers(count=config.movers, run_dir=config.run_dir, follower=self)
        self._pods = PodKeeper(config, self._movers, self._certificates, workloads, self._is_announced)
        self._ads_state = AdsState(Phase.CONNECTING, synced=False)
        self._readiness = Readiness()
        self._state_ready = self._readiness.register("state manager")
        self._movers_ready = self._readiness.register("movers")
        self._pods_ready = self._readiness.register("workload proxy manager")
        self._synced = trio.Event()
        self._stop = trio.Event()
        self._left = trio.Event()
        """What we put on the node is gone, or is to stay."""

    async def run(self) -> None:
        """Until SIGTERM, ``/quitquitquit`` or the supervisor's death; then drain. Raises BindError when a port is taken."""
        config = self._config
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
        with unix_listener(config.run_dir / ADMIN_SOCKET) as admin_socket:
            await self._run_serving([*ports, (admin.routes(), [admin_socket])])

    async def _run_serving(self, ports: Sequence[tuple[Routes, Sequence[trio.SocketListener]]]) -> None:
        config = self._config
        async with trio.open_nursery() as nursery:
            for routes, listeners in ports:
                nursery.start_soon(serve_admin, routes, listeners)
            nursery.start_soon(self._watch_signals)
            nursery.start_soon(self._watch_lifeline)
            async with trio.open_nursery() as working:
                working.start_soon(self._certificates.run)
                working.start_soon(self._run_movers)
                working.start_soon(self._run_xds)
                working.start_soon(self._run_pods)
                if config.cluster is not None and config.cni_bin_dir is not None:
                    working.start_soon(self._serve_cni)
                    departures = ClusterDepartures(ApiClient(config.cluster), config.pod_namespace, config.node_name)
                    working.start_soon(self._keep_plugin, PluginKeeper(config, self._pods.began.is_set), departures)
                else:
                    self._left.set()
                await self._stop.wait()
                _log.info("draining", seconds=config.drain)
                await self._movers.drain(config.drain)
                await self._left.wait()
                working.cancel_scope.cancel()
            nursery.cancel_scope.cancel()

    # What runs

    async def _run_movers(self) -> None:
        self._movers_ready.pending("starting")
        async with trio.open_nursery() as nursery:
            await nursery.start(self._movers.run)
            self._movers_ready.done()

    async def _run_pods(self) -> None:
        # Capturing before the mesh is known would only make a pod's connections wait and fail; what movers of the last brain serve
        # already goes on meanwhile.
        self._pods_ready.pending("waiting for the first configuration")
        await self._synced.wait()
        await self._pods.run(on_change=self._pods_changed)

    async def _serve_cni(self) -> None:
        """Answer CNI plugins until we are to stop: from then on nobody new would be served."""
        config = self._config
        if await has_listener(config):
            await self._pods.began.wait()  # the agent we succeed answers better until then
        try:
            with unix_listener(config.cni_socket, CNI_BACKLOG) as listener:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(serve_admin, cni_routes(self._pods), [listener])
                    await self._stop.wait()
                    nursery.cancel_scope.cancel()
        except BindError as exc:
            _log.error("cni.not_served", error=str(exc))

    async def _keep_plugin(self, plugin: PluginKeeper, departures: ClusterDepartures) -> None:
        """Installed while we run, and after us if another agent will follow."""
        ready = self._readiness.register("cni plugin")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(plugin.run, lambda because: ready.pending(because) if because else ready.done())
            nursery.start_soon(departures.run)
            await self._stop.wait()
            nursery.cancel_scope.cancel()
        departure = await departures.find()
        with trio.move_on_after(self._config.drain):
            while not departure.certain:  # what is left on the node now nobody will take away
                await trio.sleep(ASK_AGAIN_SECONDS)
                departure = await departures.find()
        _log.info("leaving", for_good=departure.for_good, because=departure.because)
        if departure.for_good:
            await plugin.remove()
        self._left.set()

    async def _run_xds(self) -> None:
        config = self._config
        address = config.xds_address
        client = AdsClientConfig(
            connect=connect_tls(address.host, address.port, self._xds_tls, server_hostname=config.xds_hostname),
            metadata=bearer_metadata(config.token, cluster_id=config.cluster_id),
            node_id=node_id(config.instance_ip, config.pod_name, config.pod_namespace),
            node_metadata={
                "NAME": config.pod_name,
                "NAMESPACE": config.pod_namespace,
                "INSTANCE_IPS": config.instance_ip,
                "NODE_NAME": config.node_name,
                "CLUSTER_ID": config.cluster_id,
            },
        )
        await run_ads_client(client, self._xds_update, self._xds_state)

    def _xds_tls(self) -> ssl.SSLContext:
        return client_tls(self._config.xds_root.read_text())

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

    def _is_announced(self, pod: messages.PodInfo) -> bool:
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
        if state.synced:
            self._state_ready.done()
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
            self._movers.post(_certificate_message(news))
        else:
            self._movers.post(messages.CertificateUnavailable(str(news.identity), news.because))

    def _pods_changed(self, pending: Sequence[str]) -> None:
        if pending:
            self._pods_ready.pending(", ".join(pending))
        else:
            self._pods_ready.done()

    # Movers

    def mover_joined(self, mover: Mover, holding: Sequence[Holding]) -> None:
        if self._synced.is_set():
            for message in transfer_state(self._state, self._unreadable):
                mover.post(message)
        for state in self._certificates.states():
            if state.bundle is not None:
                mover.post(_certificate_message(state.bundle))
        self._pods.mover_joined(mover, holding, informed=self._synced.is_set())

    def mover_said(self, mover: Mover, message: messages.FromMover) -> None:
        if isinstance(message, messages.CertificateWanted):
            self._certificate_wanted(message.identity)
        else:
            self._pods.mover_said(mover, message)

    def mover_left(self, mover: Mover) -> None:
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
            self._movers.post(_certificate_message(bundle))


def _certificate_message(bundle: CertificateBundle) -> messages.Certificate:
    return messages.Certificate(str(bundle.identity), bundle.key_pem, list(bundle.chain_pem), bundle.roots_pem)


def _raise_descriptor_limit() -> None:
    """As many descriptors as we are allowed: a connection needs several, and movers inherit the limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

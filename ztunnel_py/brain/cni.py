"""The CNI plugin's counterpart: answers whether a pod may start, keeps the plugin installed, and takes it away with the DaemonSet."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

import trio

from mesh.kube.api import ApiClient
from mesh.linux.netns import NotANetworkNamespace, open_netns
from mesh.model.enrolment import EXCLUDED_NAMESPACES
from mesh.runtime.http import Request, Response, Route, Routes
from mesh.telemetry.log import get_logger
from ztunnel_py.brain.pods import CannotServe, NotYet, PodKeeper
from ztunnel_py.cni.install import Installation, Installer, PluginToken, request_token
from ztunnel_py.cni.request import BadRequest, parse_added
from ztunnel_py.config import AgentConfig
from ztunnel_py.pods.departure import DAEMONSET
from ztunnel_py.redirect.apply import CaptureFailed
from ztunnel_py.redirect.host import remove_host_table

CNI_BACKLOG: Final = 1024
"""How many plugins may wait to be heard: as many as pods that a busy node starts at once."""

_log = get_logger("cni")


def cni_routes(pods: PodKeeper) -> Routes:
    """For the plugin's socket. 200: the pod may start; 503: nobody can say yet; else it may not, and the body says why."""

    async def add(request: Request) -> Response:
        try:
            added = parse_added(request.body)
        except BadRequest as exc:
            return Response.text(str(exc), 400)
        began = trio.current_time()
        try:
            because = await pods.hold(added)
        except NotYet as exc:
            return Response.text(str(exc), 503)
        except CannotServe as exc:
            _log.warning("pod.held_back", pod=f"{added.namespace}/{added.name}", because=str(exc))
            return Response.text(str(exc), 500)
        _log.debug("pod.may_start", pod=f"{added.namespace}/{added.name}", because=because, seconds=round(trio.current_time() - began, 3))
        return Response.text(because)

    return {"/cmdadd": Route(add, frozenset({"POST"}))}


class PluginKeeper:
    """The plugin on this node, for as long as the agent's DaemonSet wants it there."""

    def __init__(self, config: AgentConfig, in_charge: Callable[[], bool]) -> None:
        """``in_charge``: whether this agent is the one that captures the node's pods."""
        assert config.cluster is not None
        assert config.cni_bin_dir is not None
        self._config = config
        self._client = ApiClient(config.cluster)
        installation = Installation(
            program=config.cni_plugin,
            bin_dir=config.cni_bin_dir,
            net_dir=config.cni_net_dir,
            net_dir_on_node=config.cni_net_dir_on_node,
            socket=str(config.cni_socket),
            excluded_namespaces=EXCLUDED_NAMESPACES,
            agent_namespace=config.pod_namespace,
            daemon_set=DAEMONSET,
        )
        self._installer = Installer(installation, config.cluster, self._fetch_token, in_charge)

    async def run(self, on_change: Callable[[str], None]) -> None:
        """Keep it installed until cancelled; see `Installer.run`."""
        await self._installer.run(on_change)

    async def remove(self) -> None:
        """Take away all that is on the node, the table for its kubelet too: no agent comes after us. `run` must have ended."""
        await trio.to_thread.run_sync(self._remove)

    async def _fetch_token(self) -> PluginToken:
        return await request_token(self._client, self._config.pod_namespace, self._config.cni_account, datetime.now(UTC))

    def _remove(self) -> None:
        try:
            self._installer.remove()
            if self._config.probe_netns is not None:
                netns = open_netns(self._config.probe_netns)
                try:
                    remove_host_table(netns)
                finally:
                    os.close(netns)
        except (OSError, CaptureFailed, NotANetworkNamespace) as exc:
            _log.error("uninstalling.failed", error=str(exc))

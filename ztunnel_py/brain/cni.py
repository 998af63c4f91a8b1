"""The CNI plugin's counterpart: answers whether a pod may start, keeps the plugin installed, and takes it away with the DaemonSet."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

import trio

from mesh.kube.api import ApiClient
from mesh.linux.netns import NotANetworkNamespace, open_netns
from mesh.linux.unix_sockets import unix_address
from mesh.model.enrolment import EXCLUDED_NAMESPACES
from mesh.runtime.http import Request, Response, Route, Routes
from mesh.telemetry.log import get_logger
from ztunnel_py.brain.pods import CannotServe, NotYet, PodKeeper
from ztunnel_py.cni.install import Installation, Installer, PluginToken, find_reason_to_leave, may_look, request_token
from ztunnel_py.cni.request import BadRequest, parse_added
from ztunnel_py.config import AgentConfig
from ztunnel_py.redirect.apply import CaptureFailed
from ztunnel_py.redirect.host import remove_host_table

LEAVING_SECONDS: Final = 5.0
"""For asking whether we are uninstalled, and acting on it, while connections drain."""

_log = get_logger("cni")


def cni_routes(pods: PodKeeper) -> Routes:
    """For the plugin's socket. 200: the pod may start; 503: nobody can say yet; else it may not, and the body says why."""

    async def add(request: Request) -> Response:
        try:
            added = parse_added(request.body)
        except BadRequest as exc:
            return Response.text(str(exc), 400)
        try:
            return Response.text(await pods.hold(added))
        except NotYet as exc:
            return Response.text(str(exc), 503)
        except CannotServe as exc:
            _log.warning("pod.held_back", pod=f"{added.namespace}/{added.name}", because=str(exc))
            return Response.text(str(exc), 500)

    return {"/cmdadd": Route(add, frozenset({"POST"}))}


async def has_listener(config: AgentConfig) -> bool:
    """Whether somebody, the agent before us, answers plugins now."""
    try:
        with unix_address(config.cni_socket) as address:
            stream = await trio.open_unix_socket(address)
    except OSError:
        return False
    await stream.aclose()
    return True


class PluginKeeper:
    """The plugin on this node, for as long as the agent's DaemonSet wants it there."""

    def __init__(self, config: AgentConfig) -> None:
        assert config.cluster is not None
        assert config.cni_bin_dir is not None
        self._config = config
        self._client = ApiClient(config.cluster)
        self._was_allowed = False
        installation = Installation(
            program=config.cni_plugin,
            bin_dir=config.cni_bin_dir,
            net_dir=config.cni_net_dir,
            net_dir_on_node=config.cni_net_dir_on_node,
            socket=str(config.cni_socket),
            excluded_namespaces=EXCLUDED_NAMESPACES,
            agent_namespace=config.pod_namespace,
            daemon_set=config.daemon_set,
        )
        self._installer = Installer(installation, config.cluster, self._fetch_token)

    async def run(self, on_change: Callable[[str], None]) -> None:
        """Keep it installed until cancelled; see `Installer.run`."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._installer.run, on_change)
            self._was_allowed = await may_look(self._client, self._config.pod_namespace, self._config.daemon_set)

    async def _fetch_token(self) -> PluginToken:
        return await request_token(self._client, self._config.pod_namespace, self._config.cni_account, datetime.now(UTC))

    async def leave(self) -> None:
        """The agent ends. Take away what is on the node, but only if no agent comes after us. `run` must have ended."""
        with trio.move_on_after(LEAVING_SECONDS) as limit:
            config = self._config
            because = await find_reason_to_leave(self._client, config.pod_namespace, config.daemon_set, was_allowed=self._was_allowed)
            if because:
                _log.info("uninstalling", because=because)
                await trio.to_thread.run_sync(self._remove)
        if limit.cancelled_caught:
            _log.warning("uninstalling.unknown", because="the API server did not answer in time")

    def _remove(self) -> None:
        try:
            self._installer.remove()
        except OSError as exc:
            _log.error("uninstalling.failed", error=str(exc))
        if self._config.probe_netns is not None:
            try:
                netns = open_netns(self._config.probe_netns)
                try:
                    remove_host_table(netns)
                finally:
                    os.close(netns)
            except (OSError, CaptureFailed, NotANetworkNamespace) as exc:
                _log.error("uninstalling.failed", error=str(exc))

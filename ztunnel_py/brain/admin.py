"""The agent's pages: config_dump, log levels, stop, metrics, readiness."""

from __future__ import annotations

from importlib.metadata import version

import trio

from mesh.runtime.build import BUILD_STATUS
from mesh.runtime.http import Request, Response, Route, Routes
from mesh.runtime.inspection import MAX_LIMIT
from mesh.runtime.levels import LevelsPage
from mesh.runtime.readiness import Readiness
from mesh.state.store import MeshState
from mesh.telemetry import log
from mesh.telemetry.metrics import InvalidSnapshot, Registry, Totals, content_type, decode_snapshot, render
from mesh.tls.rotation import CertificateManager, describe_certificates
from ztunnel_py import messages
from ztunnel_py.brain.dump import Json, dump_config, dump_connection, dump_state
from ztunnel_py.brain.movers import Movers
from ztunnel_py.brain.pages import Pages
from ztunnel_py.brain.pods import PodKeeper
from ztunnel_py.config import AgentConfig
from ztunnel_py.pods.lifecycle import Phase

_INDEX = """<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>ztunnel-py</title></head><body>
<h1>ztunnel-py</h1><ul>
<li><a href="config_dump">config_dump</a>: state, certificates, pods and connections</li>
<li><a href="debug/status">debug/status</a>, <a href="debug/pods">pods</a>, <a href="debug/connections">connections</a>,
<a href="debug/certificates">certificates</a>, <a href="debug/policies">policies</a>, <a href="debug/workloads">workloads</a>,
<a href="debug/services">services</a>, <a href="debug/rules">rules</a>: one thing each, for <code>meshctl node</code></li>
<li><code>POST logging?level=debug</code>: log levels</li>
<li><code>POST quitquitquit</code>: drain and stop</li>
</ul></body></html>
"""


class Admin:
    """Answers from what the brain holds; connections and traffic metrics are asked of the movers."""

    def __init__(
        self,
        config: AgentConfig,
        state: MeshState,
        certificates: CertificateManager,
        movers: Movers,
        pods: PodKeeper,
        registry: Registry,
        totals: Totals,
        pages: Pages,
        *,
        stop: trio.Event,
    ) -> None:
        self._config = config
        self._state = state
        self._certificates = certificates
        self._movers = movers
        self._pods = pods
        self._registry = registry
        self._totals = totals
        self._pages = pages
        self._stop = stop
        self._levels = LevelsPage(self._set_levels)

    def routes(self) -> Routes:
        """For the admin port and socket."""
        return {
            "/": Route(self._index),
            "/config_dump": Route(self._config_dump),
            "/logging": self._levels.route(),
            "/quitquitquit": Route(self._quit, frozenset({"POST"})),
            **self._pages.routes(),
        }

    def metrics_routes(self) -> Routes:
        return {"/metrics": Route(self._metrics), "/stats/prometheus": Route(self._metrics)}

    def readiness_routes(self, readiness: Readiness) -> Routes:
        return {"/healthz/ready": Route(readiness.serve)}

    async def _index(self, request: Request) -> Response:
        return Response(200, _INDEX.encode(), "text/html; charset=utf-8")

    async def _config_dump(self, request: Request) -> Response:
        dumped = dump_state(self._state)
        dumped["certificates"] = describe_certificates(self._certificates.states())
        dumped["config"] = dump_config(self._config)
        dumped["version"] = {"version": version("ambient-mesh"), "buildStatus": BUILD_STATUS}
        dumped["movers"] = [{"name": mover.name, "pid": mover.pid} for mover in self._movers.living()]
        dumped["workloadState"] = await self._workload_state()
        return Response.json(dumped)

    async def _workload_state(self) -> Json:
        states: Json = {
            uid: {
                "state": "Up" if status.phase is Phase.CAPTURED else "Pending",
                "phase": status.phase.value,
                "because": status.because,
                "connections": {"inbound": [], "outbound": []},
                "info": {"name": pod.name, "namespace": pod.namespace, "serviceAccount": pod.service_account},
            }
            for uid, (pod, status) in self._pods.statuses().items()
        }
        for _, scraped in await self._movers.scrape(MAX_LIMIT):
            for living in scraped.connections:
                if living.pod in states:
                    states[living.pod]["connections"][living.direction].append(dump_connection(living))
        return states

    def _set_levels(self, levels: log.LogLevels) -> None:
        log.set_levels(levels)
        self._movers.post(messages.SetLogLevels(str(levels)))

    async def _quit(self, request: Request) -> Response:
        self._stop.set()
        return Response.text("shutdown now")

    async def _metrics(self, request: Request) -> Response:
        for mover, scraped in await self._movers.scrape():
            try:
                self._totals.update(mover.incarnation, decode_snapshot(scraped.metrics))
            except InvalidSnapshot:
                continue
        body = render(self._totals.merged(self._registry.snapshot()))
        return Response(200, body, content_type(request.headers.get("accept", "")))

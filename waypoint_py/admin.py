"""The waypoint's pages: what it was told, what it does with it, and why it would do what with a request."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import trio

from mesh.model.l7.destination import DestinationConfig
from mesh.model.l7.policy import AuthorizationPolicy, RequestAuthentication
from mesh.model.l7.waypoint import RouteTable, ServiceConfig
from mesh.runtime.build import BUILD_STATUS
from mesh.runtime.http import Request, Response, Route, Routes
from mesh.runtime.levels import LevelsPage
from mesh.runtime.readiness import Readiness
from mesh.telemetry.metrics import FamilySnapshot, Registry, Sample, content_type, render_lines
from mesh.tls.rotation import CertificateManager, describe_certificates
from waypoint_py.config import WaypointConfig
from waypoint_py.explain import Explainer, InvalidQuestion, Question
from waypoint_py.listener import HboneListener
from waypoint_py.plane import Plane

Json = dict[str, Any]

_INDEX = """<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>waypoint-py</title></head><body>
<h1>waypoint-py</h1><ul>
<li><a href="config_dump">config_dump</a>: what the control plane has told</li>
<li><a href="clusters">clusters</a>: destinations in use, their endpoints and their health</li>
<li><code>why?destination=10.0.0.1:80&amp;peer=spiffe://cluster.local/ns/shop/sa/web&amp;method=GET&amp;path=/&amp;header.x-user=a</code>:
what would happen to a request, and why</li>
<li><code>POST logging?level=debug</code>: log levels</li>
<li><code>POST quitquitquit</code>: drain and stop</li>
</ul></body></html>
"""
_LINES_AT_A_TIME = 500
_WHY_USAGE = (
    "usage: /why?destination=IP:PORT|HOST:PORT&peer=spiffe://...[&peer_address=IP:PORT][&method=][&path=][&authority=][&header.NAME=]\n"
)


class Admin:
    """Answers from what the waypoint holds."""

    def __init__(
        self,
        config: WaypointConfig,
        plane: Plane,
        listener: HboneListener,
        certificates: CertificateManager,
        registry: Registry,
        control_plane: Callable[[], str],
        *,
        stop: trio.Event,
    ) -> None:
        self._config = config
        self._plane = plane
        self._listener = listener
        self._certificates = certificates
        self._registry = registry
        self._control_plane = control_plane
        self._stop = stop
        self._levels = LevelsPage()
        registry.collect_from(self._collect)

    def routes(self) -> Routes:
        """For the admin port."""
        return {
            "/": Route(self._index),
            "/config_dump": Route(self._config_dump),
            "/clusters": Route(self._clusters),
            "/why": Route(self._why),
            "/logging": self._levels.route(),
            "/quitquitquit": Route(self._quit, frozenset({"POST"})),
        }

    def metrics_routes(self) -> Routes:
        return {"/metrics": Route(self._metrics), "/stats/prometheus": Route(self._metrics)}

    def readiness_routes(self, readiness: Readiness) -> Routes:
        return {"/healthz/ready": Route(readiness.serve)}

    async def _index(self, request: Request) -> Response:
        return Response(200, _INDEX.encode(), "text/html; charset=utf-8")

    async def _config_dump(self, request: Request) -> Response:
        store, state = self._plane.store, self._plane.state
        resources: dict[str, Json] = {}
        for name, resource in store.resources():
            shown = msgspec.to_builtins(resource, str_keys=True)
            resources.setdefault(type(resource).__name__, {})[name] = _without_secrets(shown)
            await trio.lowlevel.checkpoint()  # requests are served in the same thread
        # In a thread: thousands of routes take a while to write down.
        return await trio.to_thread.run_sync(
            Response.json,
            {
                "version": version("ambient-mesh"),
                "buildStatus": BUILD_STATUS,
                "config": {field.name: _plain(getattr(self._config, field.name)) for field in dataclasses.fields(self._config)},
                "controlPlane": self._control_plane(),
                "settings": msgspec.to_builtins(store.settings),
                "resources": resources,
                "servicesLackingRoutes": store.lacking,
                "workloads": sum(1 for _ in state.workloads()),
                "services": sum(1 for _ in state.services()),
                "certificates": describe_certificates(self._certificates.states()),
            },
        )

    async def _clusters(self, request: Request) -> Response:
        plane = self._plane
        counts = dataclasses.asdict(plane.counts)
        balancer = plane.balancer.describe(plane.reactor.now())
        return Response.json({"clusters": balancer, "hboneConnections": self._listener.links, "counts": counts})

    async def _why(self, request: Request) -> Response:
        try:
            question = Question.parse(request.query)
        except InvalidQuestion as exc:
            return Response.text(f"{exc}\n{_WHY_USAGE}", 400)
        plane = self._plane
        explainer = Explainer(plane.state, plane.store, plane.us(), plane.local.identity, plane.balancer, plane.reactor.now())
        return Response.json(explainer.explain(question))

    async def _quit(self, request: Request) -> Response:
        self._stop.set()
        return Response.text("shutdown now")

    async def _metrics(self, request: Request) -> Response:
        text: list[str] = []
        for number, line in enumerate(render_lines(self._registry.snapshot()), 1):
            text.append(line)
            if number % _LINES_AT_A_TIME == 0:
                await trio.lowlevel.checkpoint()  # requests are served in the same thread
        return Response(200, "".join(text).encode(), content_type(request.headers.get("accept", "")))

    def _collect(self) -> list[FamilySnapshot]:
        plane = self._plane
        counts, store = plane.counts, plane.store
        gauges = (
            ("waypoint_hbone_connections", "HBONE connections of clients", self._listener.links),
            ("waypoint_connections", "Client connections carried now", counts.connections),
            ("waypoint_requests_active", "Requests under way", counts.exchanges),
            ("waypoint_services", "Services that this waypoint stands before", store.count(ServiceConfig)),
            ("waypoint_route_tables", "Tables of routes held", store.count(RouteTable)),
            ("waypoint_services_lacking_routes", "Services that stay as they were, for routes that have not come", len(store.lacking)),
            ("waypoint_destinations", "Destinations with rules of their own", store.count(DestinationConfig)),
            ("waypoint_authorization_policies", "Authorization policies held", store.count(AuthorizationPolicy)),
            ("waypoint_request_authentications", "Request authentications held", store.count(RequestAuthentication)),
        )
        counters = (
            ("waypoint_stalled_sniffs", "Connections on undeclared ports that said nothing at first", counts.stalled_sniffs),
            ("waypoint_mirrors_dropped", "Mirrored requests given up because their destination was too slow", counts.mirrors_dropped),
        )
        families = [FamilySnapshot(name, "gauge", text, (), (Sample((), value),)) for name, text, value in gauges]
        return families + [FamilySnapshot(name, "counter", text, (), (Sample((), value),)) for name, text, value in counters]


def _plain(value: object) -> object:
    """A configuration value for JSON. Files are named, never read."""
    if isinstance(value, Path):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return value


_SECRET = frozenset({"key"})
"""Fields of resources that hold private keys (`mesh.model.l7.destination.UpstreamTls`); texts alone, since others have that name too."""


def _without_secrets(value: Any) -> Any:
    """The same without what nobody may read on a page."""
    if isinstance(value, dict):
        return {
            name: "<hidden>" if name in _SECRET and isinstance(inner, str) and "PRIVATE KEY" in inner else _without_secrets(inner)
            for name, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [_without_secrets(inner) for inner in value]
    return value

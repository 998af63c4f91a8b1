"""The control plane put together: source, translation, push, certificates, and what operators ask. The only file that wires."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from typing import Final

import msgspec
import trio

from istiod_py.authenticate import CONFIRM_EVERY, Caller, NodeAuthorizer
from istiod_py.ca import CaError, CertificateAuthority
from istiod_py.config import LONGEST_DEBOUNCE, Config
from istiod_py.debounce import Debounce
from istiod_py.dump import describe
from istiod_py.files import PUBLIC_MODE, make_private_directory, write_atomically
from istiod_py.jwks import KeySetKeeper
from istiod_py.keyarchive import ArchiveFailed, find_sets, merge
from istiod_py.problems import ProblemLog
from istiod_py.serving import ServingTls
from istiod_py.signing import SigningMetrics, SigningService, require_caller
from istiod_py.snapshot import diff
from istiod_py.sources import Source
from istiod_py.sources.directory import DirectorySource
from istiod_py.sources.kubernetes import KubernetesSource
from istiod_py.translate import Config as TranslateConfig
from istiod_py.translate import Translation, translate
from istiod_py.translate.l7.authentication import KeySets
from mesh.kube.kubeconfig import KubeconfigError
from mesh.rpc import Handler, RpcError, Status, Unary, serve
from mesh.runtime import inspection
from mesh.runtime.http import BindError, Request, Response, Route, Routes, bound_addresses, open_listeners, serve_admin
from mesh.runtime.readiness import Readiness
from mesh.telemetry.log import get_logger
from mesh.telemetry.metrics import FamilySnapshot, Registry, Sample, add_build, add_process, content_type, render
from mesh.xds.cache import Changes, Encoded, ResourceCache, encode_delta
from mesh.xds.l7 import L7_TYPES, SERVICE_CONFIG
from mesh.xds.names import CREATE_CERTIFICATE_METHOD, WAYPOINT, pod_of_node_id, role_of_node_id
from mesh.xds.server import AdsServer, ConnectionStatus, Introduction

UPKEEP_INTERVAL: Final = 60.0
"""Seconds between looks at our own certificates, by the wall clock."""
UPKEEP_SPREAD: Final = 10.0
PRECEDENCE: Final = 0.5
"""Seconds at most that agents wait for waypoints to take what they have to know first, and waypoints for agents to let go of them."""
LINGER: Final = 1.0
"""Seconds that a waypoint keeps a service that has left it, when agents know: connections that came just before have a request to send."""
MISTAKES_TOLD: Final = 10
"""On the status page; all are in ``/debug/problems``."""
LONGEST_MISTAKE: Final = 500
"""Characters of one there."""
FIRST_KEYS: Final = 5.0
"""Seconds at most that a control plane which starts waits for what was written down, and after that for first answers, before it serves."""
ARCHIVE_EVERY: Final = 3600.0
"""Seconds until key sets that did not change are noted as fetched anew."""
ARCHIVE_RETRY: Final = 10.0

_log = get_logger("istiod")


class StartFailed(Exception):
    """The control plane can't start as configured; the text says why. The operator must act."""


@dataclass(frozen=True, slots=True)
class Started:
    """Where a running control plane listens, with real ports."""

    agents: tuple[str, ...]
    monitoring: tuple[str, ...]


def now() -> datetime:
    return datetime.now(UTC)


async def run_istiod(config: Config, *, task_status: trio.TaskStatus[Started] = trio.TASK_STATUS_IGNORED) -> None:
    """Run until cancelled. Raises StartFailed before anything serves; ``nursery.start`` returns once everything does."""
    agents, monitoring = await _listen(config)
    try:
        source = await open_source(config, now())
        istiod = await trio.to_thread.run_sync(Istiod, config, source)
    except (CaError, KubeconfigError, OSError) as exc:
        for listener in (*agents, *monitoring):
            await listener.aclose()
        raise StartFailed(str(exc)) from exc
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(serve_admin, istiod.routes(), monitoring))
        nursery.start_soon(source.run)
        nursery.start_soon(istiod.run_key_sets)
        await source.wait_synced()
        await istiod.push_first()
        await nursery.start(partial(serve, agents, istiod.handlers(), tls=istiod.serving.context))
        nursery.start_soon(istiod.watch_source)
        nursery.start_soon(istiod.run_pushes)
        nursery.start_soon(istiod.run_departures)
        nursery.start_soon(istiod.follow_key_sets)
        nursery.start_soon(istiod.run_key_archive)
        nursery.start_soon(istiod.run_upkeep)
        istiod.ready.done()
        started = Started(tuple(bound_addresses(agents)), tuple(bound_addresses(monitoring)))
        _log.info("serving", agents=", ".join(started.agents), monitoring=", ".join(started.monitoring))
        task_status.started(started)


async def _listen(config: Config) -> tuple[list[trio.SocketListener], list[trio.SocketListener]]:
    try:
        agents = await open_listeners(config.listen)
        try:
            return agents, await open_listeners(config.monitoring)
        except BindError:
            for listener in agents:
                await listener.aclose()
            raise
    except BindError as exc:
        raise StartFailed(str(exc)) from exc


class Istiod:
    """The parts and how they hang together. Making one writes our own certificate (and so blocks for a moment)."""

    def __init__(self, config: Config, source: Source) -> None:
        """Raises CaError, OSError."""
        self._config = config
        self._source = source
        self._store = source.store
        self._ca = source.ca
        self._pods = source.pods
        self._publish_root()
        self.serving = ServingTls(self._ca, config.serving_names, config.state_dir, now)
        self._problems = ProblemLog()
        self._ignored: set[str] = set()
        self._debounce = Debounce(config.debounce, LONGEST_DEBOUNCE)
        self._translating = TranslateConfig(config.trust_domain, config.cluster_id, config.root_namespace)
        self._readiness = Readiness()
        self.ready = self._readiness.register("first push")
        self._registry = Registry()
        self._authenticator = source.authenticator
        self._cache = ResourceCache()
        confirm = partial(require_caller, self._authenticator, fresh=True)
        self._ads = AdsServer(
            self._cache,
            authenticate=partial(require_caller, self._authenticator),
            confirm=confirm,
            confirm_every=CONFIRM_EVERY,
            assign=assign_waypoint,
        )
        self._signing = SigningMetrics(self._registry)
        self._failures = self._registry.counter("pilot_push_failures", "Translations or pushes that ended in a defect").labelled()
        self._pushed = self._registry.counter("pilot_xds_pushes", "Pushes that changed a type", ("type",))
        self._add_metrics()
        self._translation = Translation()
        self._keys = KeySetKeeper(refresh=config.jwks_refresh)
        self._leaving, self._departures = trio.open_memory_channel[tuple[float, Changes]](math.inf)

    # Source to push

    async def push_first(self) -> None:
        """Have something to serve: agents take what a control plane that just started does not name as removed."""
        self._pods.update(self._store.objects("Pod"))
        objects = self._store.objects()
        translation = await trio.to_thread.run_sync(translate, objects, None, self._translating)
        if translation.wanted_keys:
            # Waypoints that are connected again would take a set that we do not have yet for one that is empty, and refuse good tokens.
            with trio.move_on_after(FIRST_KEYS):
                await self._recall_key_sets()
            self._keys.want(translation.wanted_keys)
            with trio.move_on_after(FIRST_KEYS):
                await self._keys.wait_tried()
            key_sets = KeySets(self._keys.key_sets)
            translation = await trio.to_thread.run_sync(translate, objects, translation, self._translating, key_sets)
        await self._publish(translation)

    async def _publish(self, translation: Translation) -> None:
        """Hand what changed to agents and waypoints and report what is wrong with the source."""
        # In a thread as well: thousands of routes take a while to encode.
        changes = self._cache.take(await trio.to_thread.run_sync(_encode_changes, self._translation, translation))
        self._translation = translation
        self._keys.want(translation.wanted_keys)
        await self._tell(changes)
        for type_url, names in changes.items():
            self._pushed.labelled(type_url).value += 1
            _log.info("pushed", type=type_url, resources=len(names), agents=len(self._ads.connections()))
        self._source.report(translation.statuses)
        self._report_problems()

    async def _tell(self, changes: Changes) -> None:
        """A waypoint knows a service before agents send to it, and until they no longer do: connections would be refused in between."""
        gone = {url: [name for name in names if self._cache.get(url, name) is None] for url, names in changes.items() if url in L7_TYPES}
        first = {url: [name for name in names if name not in gone.get(url, ())] for url, names in changes.items()}
        for_agents = {url: names for url, names in first.items() if url not in L7_TYPES}
        self._ads.publish(first, waypoints=True)
        if any(for_agents.values()):
            if any(names for url, names in first.items() if url in L7_TYPES):
                await self._wait_taken(waypoints=True)
            self._ads.publish(for_agents, waypoints=False)
            if any(gone.values()):
                await self._wait_taken(waypoints=False)
        if gone.get(SERVICE_CONFIG):
            # The policies that go with a service must not go before it.
            self._leaving.send_nowait((trio.current_time() + LINGER, gone))
        else:
            self._ads.publish(gone, waypoints=True)

    async def run_departures(self) -> None:
        """Take from waypoints what has left them, a moment later. What came back meanwhile is sent as it is then."""
        async for due, gone in self._departures:
            await trio.sleep_until(due)
            self._ads.publish(gone, waypoints=True)

    async def _wait_taken(self, *, waypoints: bool) -> None:
        with trio.move_on_after(PRECEDENCE) as waiting:
            await self._ads.wait_taken(waypoints=waypoints)
        if waiting.cancelled_caught:
            _log.warning("push.not_taken_in_time", by="waypoints" if waypoints else "agents")

    async def run_key_sets(self) -> None:
        """Fetch what waypoints verify tokens with."""
        await self._keys.run()

    async def follow_key_sets(self) -> None:
        """Translate anew when a key set was fetched, or could not be."""
        while True:
            await self._keys.wait_changed()
            self._debounce.notify()

    async def _recall_key_sets(self) -> None:
        """What the control plane before us had. One that cannot be asked at the moment is asked again."""
        while True:
            try:
                sets = find_sets(await self._source.key_archive.read(), now().timestamp())
                break
            except ArchiveFailed as exc:
                _log.warning("key_sets.not_recalled", because=str(exc))
                await trio.sleep(1)
        self._keys.recall(sets)

    async def run_key_archive(self) -> None:
        """Write down the key sets that there are, for the control plane after us."""
        written: object = {}
        while True:
            kept = self._keys.kept
            if kept == written:
                with trio.move_on_after(ARCHIVE_EVERY):
                    await self._keys.wait_changed()
                continue
            try:
                await self._source.key_archive.update(partial(merge, kept, now=now().timestamp()))
                written = kept
            except ArchiveFailed as exc:
                _log.warning("key_sets.not_archived", because=str(exc))
                await trio.sleep(ARCHIVE_RETRY)

    async def watch_source(self) -> None:
        """Follow the source. Tokens and assignments follow at once, what is translated after the debounce."""
        async with aclosing(self._store.watch()) as changes_seen:
            async for changes in changes_seen:
                kinds = {key.kind for key in changes.changed}
                if "Pod" in kinds:
                    self._pods.update(self._store.objects("Pod"))
                self._source.follow(kinds)
                self._debounce.notify()

    async def run_pushes(self) -> None:
        """Translate and push after changes, one push at a time."""
        while True:
            await self._debounce.wait()
            objects, before = self._store.objects(), self._translation
            try:
                # In a thread: a large mesh takes seconds to translate, and agents' connections must stay alive meanwhile.
                key_sets = KeySets(self._keys.key_sets)
                await self._publish(await trio.to_thread.run_sync(translate, objects, before, self._translating, key_sets))
            except Exception:  # supervisor: a defect that one object sets off must not take the mesh's control plane down
                _log.exception("push.failed")
                self._failures.value += 1

    def _report_problems(self) -> None:
        fetching = self._translation.find_key_problems(self._keys.problems)
        self._problems.update((*self._store.problems, *self._translation.problems, *fetching))
        for kind, origin in self._store.ignored_kinds.items():
            if kind not in self._ignored:
                self._ignored.add(kind)
                _log.info("kind.ignored", kind=kind, file=origin.file, line=origin.line)

    # Certificates

    async def run_upkeep(self) -> None:
        """Keep our own root and serving certificate from expiring."""
        while True:
            await trio.sleep(UPKEEP_INTERVAL + random.uniform(-UPKEEP_SPREAD, UPKEEP_SPREAD))
            try:
                if await self._source.renew_root(now()):
                    self._publish_root()
                    waits = self._ca.waits_until
                    _log.info("roots.changed", expires=self._ca.expires.isoformat(), new_signer_from=waits.isoformat() if waits else "now")
                if self.serving.due:
                    self.serving.renew()
                    _log.info("serving_certificate.renewed")
            except (CaError, OSError) as exc:
                _log.error("upkeep.failed", error=str(exc))

    def _publish_root(self) -> None:
        write_atomically(self._config.state_dir / "root-cert.pem", self._ca.roots_pem, PUBLIC_MODE)

    # What is served

    def handlers(self) -> dict[str, Handler]:
        """The port for agents: configuration and certificates."""
        authorizer = NodeAuthorizer(self._config.trust_domain, self._pods)
        signing = SigningService(self._ca, self._authenticator, authorizer, self._signing)
        return {**self._ads.handlers(), CREATE_CERTIFICATE_METHOD: Unary(signing.create_certificate)}

    def routes(self) -> Routes:
        """The port for operators, probes and scrapers."""
        return {
            "/ready": Route(self._readiness.serve),
            "/metrics": Route(self._serve_metrics),
            "/debug/problems": Route(self._serve_problems),
            "/debug/config_dump": Route(self._serve_config_dump),
            "/debug/status": Route(self._serve_status),
        }

    async def _serve_metrics(self, request: Request) -> Response:
        return Response(200, render(self._registry.snapshot()), content_type(request.headers.get("accept", "")))

    async def _serve_problems(self, request: Request) -> Response:
        return Response.json(self._problems.describe())

    async def _serve_config_dump(self, request: Request) -> Response:
        # In a thread: all of a large mesh takes a while to write down, and pushes must not wait for it.
        translation, agents = self._translation, self._ads.connections()
        return await trio.to_thread.run_sync(lambda: Response.json(describe_state(translation, self._ca, agents)))

    async def _serve_status(self, request: Request) -> Response:
        page = inspection.ControlPlanePage(
            version=version("ambient-mesh"),
            ready=not self._readiness.pending,
            pending=list(self._readiness.pending),
            workloads=len(self._translation.workloads),
            services=len(self._translation.services),
            policies=len(self._translation.policies),
            problems=len(self._problems.current),
            mistakes=[str(problem)[:LONGEST_MISTAKE] for problem in self._problems.current[:MISTAKES_TOLD]],
            authority_expires=self._ca.expires.timestamp(),
            agents=self._describe_clients(waypoints=False),
            waypoints=self._describe_clients(waypoints=True),
        )
        return Response(200, msgspec.json.encode(page), "application/json")

    def _describe_clients(self, *, waypoints: bool) -> list[inspection.ConnectedAgent]:
        found = (each for each in self._ads.connections() if (isinstance(each.caller, Caller) and bool(each.caller.gateway)) == waypoints)
        return sorted(map(describe_agent, found), key=lambda agent: (agent.namespace, agent.pod))

    def _add_metrics(self) -> None:
        add_build(self._registry, "pilot", version("ambient-mesh"))
        add_process(self._registry)
        self._registry.collect_from(self._collect)

    def _collect(self) -> list[FamilySnapshot]:
        gauges = (
            ("pilot_services", "Total services known to pilot", len(self._translation.services)),
            ("pilot_workloads", "Total workloads known to pilot", len(self._translation.workloads)),
            ("pilot_policies", "Total L4 policies known to pilot", len(self._translation.policies)),
            ("pilot_xds", "Number of endpoints connected to this pilot using XDS", len(self._ads.connections())),
            ("pilot_source_problems", "Mistakes in the configuration now", len(self._problems.current)),
            ("citadel_server_root_cert_expiry_timestamp", "The unix timestamp at which the CA expires", int(self._ca.expires.timestamp())),
        )
        return [FamilySnapshot(name, "gauge", help, (), (Sample((), value),)) for name, help, value in gauges]


def _encode_changes(before: Translation, after: Translation) -> Encoded:
    return encode_delta(diff(before, after))


def assign_waypoint(client: Introduction) -> str:
    """Which waypoint's resources a client gets: those of the Gateway that it was proved to be a waypoint of. What it says of itself may
    only agree. Raises RpcError."""
    caller = client.caller
    proved = caller.waypoint if isinstance(caller, Caller) else ""
    claims_to_be_one = role_of_node_id(client.node_id) == WAYPOINT
    namespace, _ = pod_of_node_id(client.node_id)
    if claims_to_be_one and (not proved or proved != f"{namespace}/{client.gateway or proved.partition('/')[2]}"):
        _log.warning("waypoint.refused", node=client.node_id, gateway=client.gateway, caller=str(caller))
        raise RpcError(Status.PERMISSION_DENIED, "not a waypoint of this Gateway")
    return proved


async def open_source(config: Config, at: datetime) -> Source:
    """Where objects, identities and the authority come from. Raises CaError, KubeconfigError, OSError."""
    make_private_directory(config.state_dir)
    if config.source is None:
        return await KubernetesSource.open(config, at)
    return await trio.to_thread.run_sync(DirectorySource, config, config.source, at)


def describe_agent(connection: ConnectionStatus) -> inspection.ConnectedAgent:
    """What a connected agent has of what it was sent."""
    namespace, pod = pod_of_node_id(connection.node_id)
    behind = {url: status for url, status in connection.types.items() if status.error or status.sent != status.acked}
    stale = {url.rpartition(".")[2]: status.error or "sent, not taken yet" for url, status in behind.items()}
    return inspection.ConnectedAgent(pod, namespace, str(connection.peer), stale)


def describe_waypoints(translation: Translation) -> dict[str, dict[str, object]]:
    """By Gateway and kind what each waypoint is told. Keys of upstream TLS are left out."""
    found: dict[str, dict[str, object]] = {}
    for key, resource in sorted(translation.l7.items()):
        kinds = found.setdefault(key.waypoint, {})
        listed = kinds.setdefault(key.kind, [])
        assert isinstance(listed, list)
        listed.append(without_secrets(msgspec.to_builtins(resource, str_keys=True)))
    return dict(found)


def without_secrets(value: object) -> object:
    """JSON without what is under ``key`` beside ``certificate``."""
    if isinstance(value, dict):
        secret = "key" if "certificate" in value else None
        return {name: "..." if name == secret and item else without_secrets(item) for name, item in value.items()}
    return [without_secrets(item) for item in value] if isinstance(value, list) else value


def describe_state(translation: Translation, ca: CertificateAuthority, agents: Sequence[ConnectionStatus]) -> dict[str, object]:
    """JSON of ``/debug/config_dump``: what agents are told, who they are, and what objects' status would say. No secret is in it."""
    return {
        "workloads": [describe(workload) for _, workload in sorted(translation.workloads.items())],
        "services": [describe(service) for _, service in sorted(translation.services.items())],
        "policies": [describe(policy) for _, policy in sorted(translation.policies.items())],
        "waypoints": describe_waypoints(translation),
        "statuses": {str(key): describe(conditions) for key, conditions in sorted(translation.statuses.items())},
        "agents": [describe(agent) for agent in sorted(agents, key=lambda agent: agent.node_id)],
        "certificateAuthority": {
            "expires": f"{ca.expires:%Y-%m-%dT%H:%M:%SZ}",
            "roots": ca.roots_pem.decode("ascii"),
            **({"newSignerFrom": f"{ca.waits_until:%Y-%m-%dT%H:%M:%SZ}"} if ca.waits_until else {}),
        },
    }

"""A control plane in a cluster: objects by watch, callers by TokenReview, the key in a Secret, reports written by one leader."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from datetime import datetime
from importlib.metadata import version
from typing import Final, Self

import trio

from istiod_py.ca import CaError, CertificateAuthority, find_plugged_in
from istiod_py.config import Config
from istiod_py.deploy import GatewayController
from istiod_py.deploy.cluster import ClusterPlace, make_template
from istiod_py.deploy.controller import Unreachable
from istiod_py.keyarchive import SecretArchive
from istiod_py.pods import AssignedPods
from istiod_py.review import ReviewAuthenticator
from istiod_py.rootmap import RootMaps
from istiod_py.secret import RootSecret
from istiod_py.status import StatusWriter
from istiod_py.translate import Condition, StatusEntry
from istiod_py.translate import Config as TranslateConfig
from istiod_py.translate.deployment import Template
from istiod_py.untaint import NodeUntainter
from mesh.kube.api import ApiClient, ApiUnavailable, Connect
from mesh.kube.cluster import ClusterStore
from mesh.kube.kubeconfig import find_access
from mesh.kube.lease import LeaderElection
from mesh.kube.objects import ObjectKey, SourceProblem
from mesh.kube.resources import RESOURCES
from mesh.model.labels import NETWORK
from mesh.telemetry.log import get_logger

LEASE: Final = "istiod-py-leader"
_REMIND: Final = 10.0
"""Seconds between lines that say what we wait for."""

_log = get_logger("istiod")


class KubernetesSource:
    """Made by `open`."""

    def __init__(self, config: Config, client: ApiClient, ca: CertificateAuthority, secret: RootSecret | None) -> None:
        self.ca = ca
        self.pods = AssignedPods()
        self.key_archive = SecretArchive(client, config.root_namespace)
        self.store = ClusterStore(client, [kind for kind in RESOURCES if kind != "Secret" or config.read_secrets])
        self.authenticator = ReviewAuthenticator(client, self.store, self.pods, config.trusted_node_accounts)
        self._secret = secret
        self._maps = RootMaps(client)
        self._statuses = StatusWriter(client, self.store)
        self._untainter = NodeUntainter(client, self.store, config.root_namespace)
        self._client = client
        self._config = config
        self._template = _make_template(config)
        place = ClusterPlace(client, self.store)
        translating = TranslateConfig(config.trust_domain, config.cluster_id, config.root_namespace)
        self._waypoints = GatewayController(self.store, place, self._make_template, translating)
        # Of each start: a replica that restarts must not take itself for the one before, whose writes may still be under way.
        identity = f"{config.replica}_{secrets.token_hex(4)}"
        self.election = LeaderElection(client, config.root_namespace, LEASE, identity)

    @classmethod
    async def open(cls, config: Config, now: datetime, *, connect: Connect | None = None) -> Self:
        """Raises KubeconfigError; CaError. Waits for an API server that is not up yet. ``connect`` is for tests."""
        client = ApiClient(find_access(config.kubeconfig), connect=connect)
        if (cacerts := find_plugged_in(config.cacerts)) is not None:
            return cls(config, client, CertificateAuthority.plugged_in(cacerts, now), None)
        secret = RootSecret(client, config.root_namespace, config.trust_domain)
        while True:
            try:
                return cls(config, client, CertificateAuthority(await secret.load(now), now), secret)
            except CaError as exc:
                if not isinstance(exc.__cause__, ApiUnavailable):
                    raise
                _log.warning("waiting", because=str(exc))
                await trio.sleep(1)

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.store.run)
            nursery.start_soon(self._maps.reflector.run)
            nursery.start_soon(self.election.run, self._lead)

    async def wait_synced(self) -> None:
        while True:
            with trio.move_on_after(_REMIND):
                await self.store.wait_synced()
                return
            problems = "; ".join(problem.message for problem in self.store.problems)
            _log.warning("waiting", kinds=", ".join(self.store.unsynced), because=problems)

    def follow(self, kinds: Collection[str]) -> None:
        if "Namespace" in kinds:
            self._maps.wake()
        if not {"Node", "Pod"}.isdisjoint(kinds):
            self._untainter.notify()
        self._waypoints.notify(kinds)

    def report(self, statuses: Mapping[ObjectKey, tuple[StatusEntry, ...]]) -> None:
        self._statuses.want(note_stale(statuses, self.store.problems))

    async def renew_root(self, now: datetime) -> bool:
        """Read the files or the Secret again: another replica may have renewed it, or the operator."""
        if self._secret is None:
            await trio.lowlevel.checkpoint()
            changed = self.ca.refresh(now)
        else:
            changed = self.ca.adopt(await self._secret.load(now), now)
        if changed:
            self._maps.wake()
        return changed

    async def _lead(self) -> None:
        await self.store.wait_synced()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._maps.run, self._namespaces, lambda: self.ca.roots_pem)
            nursery.start_soon(self._statuses.run)
            nursery.start_soon(self._untainter.run)
            nursery.start_soon(self._deploy)

    async def _deploy(self) -> None:
        """Waypoints run the image that we run ourselves, unless we were told of another."""
        while not self._config.waypoint_image:
            try:
                self._template = await make_template(self._client, self._template, self._config.root_namespace, self._config.replica)
                break
            except Unreachable as exc:
                _log.warning("waiting", because=str(exc))
                await trio.sleep(1)
        await self._waypoints.run()

    def _make_template(self) -> Template:
        root = self.store.find("Namespace", "", self._config.root_namespace)
        return replace(self._template, network=root.labels.get(NETWORK, "") if root is not None else "")

    def _namespaces(self) -> list[str]:
        return [obj.name for obj in self.store.objects("Namespace")]


def _make_template(config: Config) -> Template:
    return Template(
        image=config.waypoint_image or f"ambient-mesh:{version('ambient-mesh')}",
        discovery=f"https://istiod.{config.root_namespace}.svc:15012",
        trust_domain=config.trust_domain,
        cluster_id=config.cluster_id,
        environment=config.waypoint_environment,
    )


def note_stale(
    statuses: Mapping[ObjectKey, tuple[StatusEntry, ...]], problems: Iterable[SourceProblem]
) -> dict[ObjectKey, tuple[StatusEntry, ...]]:
    """The conditions, with those of unreadable policies said to be out of date: translation sees the last good version."""
    first: dict[str, SourceProblem] = {}
    for problem in problems:
        first.setdefault(problem.file, problem)
    told = dict(statuses)
    for key, conditions in statuses.items():
        found = first.get(str(key))
        if found is not None:
            stale = f"the last good version stays in force: {found}"
            told[key] = tuple(
                Condition(c.type, False, "Invalid", stale) if isinstance(c, Condition) and c.reason != "Invalid" else c for c in conditions
            )
    return told

"""A control plane beside a directory of YAML: tokens of our own, the key in the state directory."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import datetime
from pathlib import Path

import trio

from istiod_py.authenticate import TokenAuthenticator
from istiod_py.ca import CertificateAuthority
from istiod_py.config import Config
from istiod_py.deploy import GatewayController
from istiod_py.deploy.directory import DirectoryPlace
from istiod_py.keyarchive import FileArchive
from istiod_py.pods import AssignedPods
from istiod_py.tokens import PodName, TokenStore
from istiod_py.translate import Config as TranslateConfig
from istiod_py.translate import StatusEntry
from istiod_py.translate.deployment import Template
from mesh.kube.directory import IMPLICIT_NAMESPACES, DirectoryStore
from mesh.kube.objects import ObjectKey
from mesh.model.labels import GATEWAY_MANAGED, MESH_CONTROLLER
from mesh.telemetry.log import get_logger

_log = get_logger("istiod")


class DirectorySource:
    """Reads the directory and the authority's files when made, and so blocks for a moment."""

    def __init__(self, config: Config, directory: Path, now: datetime) -> None:
        """Raises CaError, OSError."""
        if not directory.is_dir():
            raise NotADirectoryError(f"the source {directory} is not a directory")
        self._directory = config.tokens
        self.ca = open_authority(config, now)
        self.pods = AssignedPods()
        self.key_archive = FileArchive(config.state_dir)
        self._tokens = TokenStore(config.tokens)
        # The root namespace needs no Namespace object: without one, policies of the whole mesh would be passed over.
        implicit = IMPLICIT_NAMESPACES | {config.root_namespace}
        bases = [directory] if config.deploy_dir is None else [directory, config.deploy_dir]
        self.store = DirectoryStore([*bases, *config.overlays], bases=len(bases), implicit_namespaces=implicit)
        self.store.load()
        self.authenticator = TokenAuthenticator(self._tokens, config.root_namespace, self.store)
        self._reconcile_tokens()
        self._controller = _make_controller(config, self.store)

    async def run(self) -> None:
        if self._controller is not None:
            await self._controller.run()
        await trio.lowlevel.checkpoint()

    async def wait_synced(self) -> None:
        await trio.lowlevel.checkpoint()

    def follow(self, kinds: Collection[str]) -> None:
        """A Node or waypoint that comes gets a token, one that goes takes its own with it."""
        if self._controller is not None:
            self._controller.notify(kinds)
        if {"Node", "Pod"}.isdisjoint(kinds):
            return
        try:
            self._reconcile_tokens()
        except OSError as exc:
            _log.error("tokens.failed", directory=str(self._directory), error=str(exc))

    def _reconcile_tokens(self) -> None:
        waypoints = (pod for pod in self.store.objects("Pod") if pod.labels.get(GATEWAY_MANAGED) == MESH_CONTROLLER)
        self._tokens.reconcile((node.name for node in self.store.objects("Node")), (PodName(pod.namespace, pod.name) for pod in waypoints))

    def report(self, statuses: Mapping[ObjectKey, tuple[StatusEntry, ...]]) -> None:
        """The user's files are not ours to write to; ``/debug/config_dump`` has the conditions."""

    async def renew_root(self, now: datetime) -> bool:
        await trio.lowlevel.checkpoint()
        return self.ca.refresh(now)


def _make_controller(config: Config, store: DirectoryStore) -> GatewayController | None:
    if config.deploy_dir is None or config.status_dir is None:
        return None
    # Where to find us, and what proves it, is told by whoever runs the pods: nobody else knows.
    template = Template(image="", discovery="", trust_domain=config.trust_domain, cluster_id=config.cluster_id)
    place = DirectoryPlace(store, config.deploy_dir, config.status_dir)
    return GatewayController(store, place, lambda: template, TranslateConfig(config.trust_domain, config.cluster_id, config.root_namespace))


def open_authority(config: Config, at: datetime) -> CertificateAuthority:
    """The operator's authority if there is one, else our own in the state directory. Raises CaError."""
    if config.cacerts is not None:
        return CertificateAuthority.plugged_in(config.cacerts, at)
    return CertificateAuthority.self_signed(config.state_dir, config.trust_domain, at)

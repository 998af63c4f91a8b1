"""Where a control plane lives: what gives it objects, proves its callers, keeps its key and takes its reports."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import datetime
from typing import Protocol

from istiod_py.authenticate import Authenticator
from istiod_py.ca import CertificateAuthority
from istiod_py.keyarchive import Archive
from istiod_py.pods import AssignedPods
from istiod_py.translate import StatusEntry
from mesh.kube.objects import ObjectKey
from mesh.kube.store import ObjectStore


class Source(Protocol):
    """Implementations: a directory of YAML (the lab), and a Kubernetes API server."""

    @property
    def store(self) -> ObjectStore: ...

    @property
    def ca(self) -> CertificateAuthority: ...

    @property
    def pods(self) -> AssignedPods: ...

    @property
    def authenticator(self) -> Authenticator: ...

    @property
    def key_archive(self) -> Archive: ...

    async def run(self) -> None:
        """What goes on in the background; returns early or never."""

    async def wait_synced(self) -> None:
        """Until ``store`` has everything."""

    def follow(self, kinds: Collection[str]) -> None:
        """Objects of these kinds changed."""

    def report(self, statuses: Mapping[ObjectKey, tuple[StatusEntry, ...]]) -> None:
        """What objects' status should say now."""

    async def renew_root(self, now: datetime) -> bool:
        """Look after the authority; whether what peers must trust changed. Raises CaError."""

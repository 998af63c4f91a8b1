"""Where the agent learns of its node's pods and reports which it captured: a directory of YAML, or the API server."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final, Protocol

import trio

from mesh.kube.api import ApiClient, ApiError, ApiUnavailable
from mesh.kube.cluster import ClusterStore
from mesh.kube.directory import DirectoryStore
from mesh.kube.objects import ObjectKey
from mesh.kube.overlay import overlay_path, remove_overlay, write_overlay
from mesh.kube.resources import RESOURCES
from mesh.model.labels import REDIRECTION
from ztunnel_py.pods.facts import PodFacts
from ztunnel_py.pods.netns_discovery import scan
from ztunnel_py.pods.source import read_node_pods, watch_node_pods

SCAN_SECONDS: Final = 1.0
"""How often /proc is searched while pods with addresses have no known network namespace."""


class Place(Protocol):
    async def run(self) -> None:
        """What goes on in the background; returns early or never."""

    def watch(self) -> AsyncGenerator[Mapping[str, PodFacts], None]:
        """The pods of the node by uid, at once and whenever they change. Use with `contextlib.aclosing`."""

    async def annotate(self, facts: PodFacts, redirection: str) -> None:
        """Show on the pod what became of it; ``""`` withdraws it. Raises OSError: PermissionError where we have no right (any more)."""

    async def is_annotated(self, facts: PodFacts) -> bool:
        """Whether what `annotate` showed is still there."""


class DirectoryPlace:
    """Reports go to an overlay directory of our own."""

    def __init__(self, node: str, sources: tuple[Path, ...], status: Path) -> None:
        self._node = node
        self._store = DirectoryStore(sources)
        self._status = status

    async def run(self) -> None:
        await trio.lowlevel.checkpoint()

    def watch(self) -> AsyncGenerator[Mapping[str, PodFacts], None]:
        return watch_node_pods(self._store, self._node)

    async def annotate(self, facts: PodFacts, redirection: str) -> None:
        await trio.to_thread.run_sync(self._write, facts, redirection)

    async def is_annotated(self, facts: PodFacts) -> bool:
        return await trio.to_thread.run_sync(overlay_path(self._status, ObjectKey("Pod", facts.namespace, facts.name)).exists)

    def _write(self, facts: PodFacts, redirection: str) -> None:
        if redirection:
            write_overlay(self._status, "Pod", facts.namespace, facts.name, {"metadata": {"annotations": {REDIRECTION: redirection}}})
        else:
            remove_overlay(self._status, "Pod", facts.namespace, facts.name)


class ClusterPlace:
    """Reports are annotations, written through the pods' status: an agent needs no right to change pods."""

    def __init__(self, node: str, client: ApiClient, proc: Path = Path("/proc")) -> None:
        self._node = node
        self._client = client
        self._store = ClusterStore(client, ("Namespace", "Pod"), field_selectors={"Pod": f"spec.nodeName={node}"})
        self._proc = proc
        self._paths: dict[str, Path] = {}

    async def run(self) -> None:
        await self._store.run()

    async def watch(self) -> AsyncGenerator[Mapping[str, PodFacts], None]:
        await self._store.wait_synced()
        told: Mapping[str, PodFacts] | None = None
        while True:
            now = await self._look()
            if now != told:
                told = now
                yield now
            with trio.move_on_after(SCAN_SECONDS if _lacking(now) else float("inf")):
                await self._store.wait_changed()

    async def annotate(self, facts: PodFacts, redirection: str) -> None:
        body = {"metadata": {"uid": facts.uid, "annotations": {REDIRECTION: redirection or None}}}
        try:
            # The uid makes it a conflict to write onto a younger pod of the same name.
            await self._client.merge_patch(RESOURCES["Pod"].path(facts.namespace, facts.name, "status"), body)
        except ApiError as exc:
            if exc.status in (401, 403):
                raise PermissionError(f"can't annotate the pod: {exc}") from exc
            if exc.status not in (404, 409):
                raise OSError(f"can't annotate the pod: {exc}") from exc
        except ApiUnavailable as exc:
            raise OSError(f"can't annotate the pod: {exc}") from exc

    async def is_annotated(self, facts: PodFacts) -> bool:
        await trio.lowlevel.checkpoint()
        pod = self._store.find("Pod", facts.namespace, facts.name)
        return pod is None or pod.uid != facts.uid or REDIRECTION in pod.annotations

    async def _look(self) -> Mapping[str, PodFacts]:
        """The pods, with the network namespaces that /proc shows of those nobody told us."""
        pods = read_node_pods(self._store, self._node)
        lacking = _lacking(pods)
        self._paths = {uid: path for uid, path in self._paths.items() if uid in lacking}
        unknown = {uid: pods[uid].ips for uid in lacking - self._paths.keys()}
        if unknown:
            self._paths |= await trio.to_thread.run_sync(scan, self._proc, unknown)
        known = {uid: replace(pods[uid], netns_path=str(path), waiting_for="") for uid, path in self._paths.items()}
        return {**pods, **known}


def _lacking(pods: Mapping[str, PodFacts]) -> set[str]:
    """Enrolled pods that run and whose network namespace is not known."""
    return {uid for uid, facts in pods.items() if facts.enrolment and facts.ips and not facts.netns_path}

"""Where the agent learns of its node's pods and reports which it captured: a directory of YAML, or the API server."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Protocol

import trio

from mesh.kube.api import ApiClient, ApiError, ApiUnavailable
from mesh.kube.cluster import ClusterStore
from mesh.kube.directory import DirectoryStore
from mesh.kube.events import EventRecorder, ObjectEvent, Subject
from mesh.kube.objects import ObjectKey
from mesh.kube.overlay import overlay_path, remove_overlay, write_overlay
from mesh.kube.pod import read_pod
from mesh.kube.resources import RESOURCES
from mesh.model.address import IpAddress
from mesh.model.labels import CAPTURED_BY, REDIRECTION
from ztunnel_py.pods.facts import PodFacts
from ztunnel_py.pods.netns_discovery import Netns, here, netns_at, scan, scan_names
from ztunnel_py.pods.source import NO_ADDRESS, read_node_pods, watch_node_pods

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

    def learn(self, uid: str, netns_path: str, ips: tuple[IpAddress, ...]) -> str:
        """The container runtime made this namespace, with these addresses, for a pod. Returns its path as the agent sees it; `watch` tells
        of it."""

    def forget(self, uid: str) -> None:
        """What was found, or learnt, of the pod's namespace is not so any more: look again."""

    def note(self, facts: PodFacts, reason: str, message: str, *, warning: bool) -> None:
        """Tell the pod's owner, where there is a way to. ``reason``: a word in CamelCase."""


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

    def learn(self, uid: str, netns_path: str, ips: tuple[IpAddress, ...]) -> str:
        return netns_path  # nobody makes pods for a directory but who writes the directory

    def forget(self, uid: str) -> None:
        """The annotation is all there is to know."""

    def note(self, facts: PodFacts, reason: str, message: str, *, warning: bool) -> None:
        """The log tells it."""

    def _write(self, facts: PodFacts, redirection: str) -> None:
        if redirection:
            write_overlay(self._status, "Pod", facts.namespace, facts.name, {"metadata": {"annotations": {REDIRECTION: redirection}}})
        else:
            remove_overlay(self._status, "Pod", facts.namespace, facts.name)


@dataclass(frozen=True, slots=True)
class NodePaths:
    """Where the agent sees what belongs to the node. ``netns``: the node's own network namespace, which is no pod's."""

    proc: Path = Path("/proc")
    names: Path = Path("/var/run/netns")
    netns: Path | None = None


@dataclass(frozen=True, slots=True)
class _Known:
    """A pod's network namespace. ``ips`` are the container runtime's, which the API will show later; empty where it did not tell."""

    path: Path
    netns: Netns | None
    ips: tuple[IpAddress, ...] = ()


class ClusterPlace:
    """Reports are annotations, written through the pods' status: an agent needs no right to change pods."""

    def __init__(self, node: str, client: ApiClient, paths: NodePaths = NodePaths(), *, agent: tuple[str, str] = ("", "")) -> None:
        """``agent``: namespace and name of this agent's own pod."""
        self._node = node
        self._agent = agent
        self._client = client
        self._store = self._open_store()
        self._events = EventRecorder(client, "ztunnel", node)
        self._paths = paths
        self._known: dict[str, _Known] = {}
        self._learnt = trio.Event()

    def _open_store(self) -> ClusterStore:
        return ClusterStore(self._client, ("Namespace", "Pod"), field_selectors={"Pod": f"spec.nodeName={self._node}"})

    async def run(self) -> None:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._events.run)
                nursery.start_soon(self._store.run)
        finally:
            # Whoever is in charge again must not act on what was so before: a pod enrolled since then would be released.
            self._store, self._known = self._open_store(), {}

    async def watch(self) -> AsyncGenerator[Mapping[str, PodFacts], None]:
        await self._store.wait_synced()
        told: Mapping[str, PodFacts] | None = None
        while True:
            self._learnt = trio.Event()
            now = await self._look()
            if now != told:
                told = now
                yield now
            with trio.move_on_after(SCAN_SECONDS if _lacking(now) else float("inf")):
                await _wait_either(self._store.wait_changed, self._learnt.wait)

    async def annotate(self, facts: PodFacts, redirection: str) -> None:
        annotations = {REDIRECTION: redirection or None, CAPTURED_BY: (self._captor() or None) if redirection else None}
        body = {"metadata": {"uid": facts.uid, "annotations": annotations}}
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
        if pod is None or pod.uid != facts.uid:
            return True
        return REDIRECTION in pod.annotations and pod.annotations.get(CAPTURED_BY, "") in ("", self._captor())

    def _captor(self) -> str:
        """The uid of the DaemonSet that this agent belongs to now: one that was made anew may have adopted it. Empty for none."""
        own = self._store.find("Pod", *self._agent)
        controller = read_pod(own)[0].controller if own is not None else None
        return controller.uid if controller is not None else ""

    def learn(self, uid: str, netns_path: str, ips: tuple[IpAddress, ...]) -> str:
        path = here(netns_path, proc=self._paths.proc, names=self._paths.names)
        found = netns_at(path)
        known = self._known.get(uid)
        if known is not None and found is not None and known.netns == found:
            path = known.path  # found already, by another name: what was done there goes on
        self._known[uid] = _Known(path, found, ips)
        self._learnt.set()
        return str(path)

    def forget(self, uid: str) -> None:
        if self._known.pop(uid, None) is not None:
            self._learnt.set()

    def note(self, facts: PodFacts, reason: str, message: str, *, warning: bool) -> None:
        subject = Subject("v1", "Pod", facts.namespace, facts.name, facts.uid)
        self._events.record(ObjectEvent(subject, reason, message, warning))

    async def _look(self) -> Mapping[str, PodFacts]:
        """The pods, with what the API server does not tell of their network. The annotation with a namespace is for directories: on a
        cluster everybody who makes pods could write it, and name the namespace of somebody else."""
        pods = {uid: _unplaced(facts) for uid, facts in read_node_pods(self._store, self._node).items()}
        self._known = {uid: known for uid, known in self._known.items() if uid in pods}
        wanted = {uid: pods[uid].ips for uid in _lacking(pods) - self._known.keys()}
        if wanted:
            found = await trio.to_thread.run_sync(_scan_all, self._paths, wanted)
            # What was learnt meanwhile is surer.
            self._known = {**{uid: _Known(path, netns_at(path)) for uid, path in found.items()}, **self._known}
        return {uid: self._complete(facts) for uid, facts in pods.items()}

    def _complete(self, facts: PodFacts) -> PodFacts:
        known = self._known.get(facts.uid)
        if known is None:
            return facts
        ips = facts.ips or known.ips
        return replace(facts, ips=ips, netns_path=str(known.path), waiting_for="" if ips else NO_ADDRESS)


def _scan_all(paths: NodePaths, wanted: Mapping[str, tuple[IpAddress, ...]]) -> dict[str, Path]:
    """By process where one is seen, which proves the pod; else by name."""
    found = scan(paths.proc, wanted)
    missing = {uid: ips for uid, ips in wanted.items() if uid not in found}
    if missing:
        found |= scan_names(paths.names, missing, netns_at(paths.netns) if paths.netns is not None else None)
    return found


def _unplaced(facts: PodFacts) -> PodFacts:
    return replace(facts, netns_path="", waiting_for="the pod's network namespace is not found yet" if facts.ips else NO_ADDRESS)


async def _wait_either(*waits: Callable[[], Awaitable[object]]) -> None:
    async with trio.open_nursery() as nursery:

        async def wait_one(wait: Callable[[], Awaitable[object]]) -> None:
            await wait()
            nursery.cancel_scope.cancel()

        for wait in waits:
            nursery.start_soon(wait_one, wait)


def _lacking(pods: Mapping[str, PodFacts]) -> set[str]:
    """Pods that run, whose network namespace is not known and something is to be done in: enrolled ones, and those with rules to remove."""
    return {uid for uid, facts in pods.items() if (facts.enrolment or facts.redirection) and facts.ips and not facts.netns_path}

"""Takes the taint of a node that waits for its agent away once the agent is ready, as Istio's CNI agent has it.

Whoever makes nodes can give them the taint, so that no pod starts there before the CNI plugin is in place. The control plane removes it,
not the agent: removing takes the right to change nodes, all of them, and an agent runs on every node.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import trio

from mesh.kube.api import ApiClient, ApiError, ApiUnavailable
from mesh.kube.objects import KubeObject
from mesh.kube.pod import read_pod
from mesh.kube.resources import RESOURCES
from mesh.kube.store import ObjectStore
from mesh.model.labels import AGENT_LABELS
from mesh.telemetry.log import get_logger

TAINT: Final = "cni.istio.io/not-ready"
"""The key; any value and effect."""
RETRY_SECONDS: Final = 5.0

_log = get_logger("untaint")


def find_ready_nodes(nodes: Sequence[KubeObject], pods: Sequence[KubeObject], namespace: str) -> list[str]:
    """Nodes that have the taint and a ready agent. Pure."""
    tainted = {node.name for node in nodes if any(_is_ours(taint) for taint in _taints(node.raw))}
    if not tainted:
        return []
    return sorted(tainted & set(_nodes_of_ready_agents(pods, namespace)))


class NodeUntainter:
    """`run` while leading; `notify` when nodes or pods changed."""

    def __init__(self, client: ApiClient, store: ObjectStore, namespace: str) -> None:
        """``namespace``: where agents are believed to be agents; elsewhere anybody may use their label."""
        self._client = client
        self._store = store
        self._namespace = namespace
        self._changed = trio.Event()

    def notify(self) -> None:
        self._changed.set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            self._changed = trio.Event()
            failed = False
            for name in find_ready_nodes(self._store.objects("Node"), self._store.objects("Pod"), self._namespace):
                try:
                    await self._untaint(name)
                except (ApiError, ApiUnavailable) as exc:
                    failed = True
                    _log.warning("node.still_tainted", node=name, error=str(exc))
            with trio.move_on_after(RETRY_SECONDS if failed else float("inf")):
                await self._changed.wait()

    async def _untaint(self, name: str) -> None:
        path = RESOURCES["Node"].path("", name)
        node = await self._client.find(path)
        if node is None:
            return
        taints = _taints(node)
        kept = [taint for taint in taints if not _is_ours(taint)]
        if len(kept) == len(taints):
            return
        metadata = node.get("metadata")
        version = metadata.get("resourceVersion") if isinstance(metadata, Mapping) else None
        # The version makes it a conflict to undo what somebody else did to the list meanwhile.
        await self._client.merge_patch(path, {"metadata": {"resourceVersion": version}, "spec": {"taints": kept or None}})
        _log.info("node.untainted", node=name, taint=TAINT)


def _nodes_of_ready_agents(pods: Sequence[KubeObject], namespace: str) -> Iterator[str]:
    for obj in pods:
        if obj.namespace == namespace and AGENT_LABELS.items() <= obj.labels.items():
            pod, problems = read_pod(obj)
            if not problems and pod.ready and not pod.deleting:
                yield pod.node


def _taints(node: Mapping[str, object]) -> list[object]:
    spec = node.get("spec")
    taints = spec.get("taints") if isinstance(spec, Mapping) else None
    return taints if isinstance(taints, list) else []


def _is_ours(taint: object) -> bool:
    return isinstance(taint, Mapping) and taint.get("key") == TAINT

"""Which service accounts run on which node, counted from the source's pods: what the node authorizer asks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import trio

from mesh.kube.objects import KubeObject


class Place(NamedTuple):
    """A service account on a node."""

    node: str
    namespace: str
    service_account: str


class AssignedPods:
    """Service accounts by node; brought up to date with every change of the source, before anything is translated or pushed."""

    def __init__(self) -> None:
        self._places: dict[KubeObject, Place | None] = {}
        self._running: Counter[Place] = Counter()
        self._changed = trio.Event()

    def update(self, pods: Iterable[KubeObject]) -> None:
        """These are all Pod objects now."""
        known = self._places
        # An object that did not change is the same instance: of ten thousand, all but a few.
        self._places = {pod: known[pod] if pod in known else _find_place(pod) for pod in pods}
        self._running = Counter(place for place in self._places.values() if place is not None)
        self._changed.set()
        self._changed = trio.Event()

    def runs_on(self, node: str, namespace: str, service_account: str) -> bool:
        return Place(node, namespace, service_account) in self._running

    async def wait_changed(self) -> None:
        await self._changed.wait()


def _find_place(pod: KubeObject) -> Place | None:
    """None while the pod is not assigned, and once it has ended. The source has checked the fields' types."""
    node = pod.spec.get("nodeName")
    if not node or pod.status.get("phase") in ("Succeeded", "Failed"):
        return None
    account = pod.spec.get("serviceAccountName") or pod.spec.get("serviceAccount") or "default"
    return Place(str(node), pod.namespace, str(account))

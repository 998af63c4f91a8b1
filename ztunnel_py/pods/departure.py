"""Whether an agent that is told to end will be followed by another, or the mesh is being taken down.

Istio's CNI agent asks the same about its DaemonSet. In doubt another will follow: rules that stay keep traffic from
leaving unencrypted, and the next agent finds them; what was released by mistake would go out in plain text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import msgspec
import trio

from mesh.kube.api import ApiClient, ApiError, ApiUnavailable

DAEMONSET: Final = "ztunnel"
ORDER: Final = "uninstall"
"""Name of the file in the run directory that says the same where there is no API server."""
ASK_AGAIN_SECONDS: Final = 1.0
_ANSWER_SECONDS: Final = 3.0
_AGAIN_SECONDS: Final = (1.0, 30.0)
"""Between the first answers that were none, and at most: an agent may be told to end soon after it began."""
_GONE: Final = {404: f"DaemonSet {DAEMONSET} is gone", 401: "our rights are gone", 403: "our rights are gone"}
"""What gave us the right to ask is part of the installation, and goes with it, perhaps before us. But a starting API server answers so
too, as it does for a moment when what was deleted is made anew; and 401 when our pod was deleted by force, and another is on its way."""


@dataclass(frozen=True, slots=True)
class Departure:
    """``for_good``: no agent will follow on this node, so nothing may be left behind. ``certain``: somebody who knows has said so."""

    for_good: bool
    because: str
    certain: bool = True


class _Metadata(msgspec.Struct):
    deletionTimestamp: str | None = None
    labels: dict[str, str] = {}


class _PodSpec(msgspec.Struct):
    nodeSelector: dict[str, str] = {}


class _Template(msgspec.Struct):
    spec: _PodSpec


class _DaemonSetSpec(msgspec.Struct):
    template: _Template


class _DaemonSet(msgspec.Struct):
    metadata: _Metadata
    spec: _DaemonSetSpec


class _Named(msgspec.Struct):
    """A node or a namespace."""

    metadata: _Metadata


Json = Mapping[str, object]


def judge(daemonset: Json | ApiError, node: Json | ApiError, namespace: Json | ApiError, *, allowed_before: bool, sure: bool) -> Departure:
    """From what the API server answered about our DaemonSet, its namespace and our node. ``allowed_before``: it has answered this agent
    before. ``sure``: that the DaemonSet, or our right to ask, is gone it has said for long enough.

    A namespace that is deleted takes its pods with it in no order: they may be told to end while the DaemonSet is still there.
    """
    if isinstance(daemonset, ApiError):
        if allowed_before and daemonset.status in _GONE:
            because = f"{_GONE[daemonset.status]}: {daemonset}"
            return Departure(True, because) if sure else Departure(False, f"not for long enough yet, {because}", certain=False)
        return Departure(False, f"the API server does not say: {daemonset}", certain=False)
    try:
        ours = msgspec.convert(daemonset, _DaemonSet)
        labels = {} if isinstance(node, ApiError) else msgspec.convert(node, _Named).metadata.labels
        emptied = not isinstance(namespace, ApiError) and msgspec.convert(namespace, _Named).metadata.deletionTimestamp is not None
    except msgspec.ValidationError as exc:
        return Departure(False, f"the API server's answer is not understood: {exc}", certain=False)
    if ours.metadata.deletionTimestamp is not None:
        return Departure(True, f"DaemonSet {DAEMONSET} is being deleted")
    if emptied:
        return Departure(True, f"the namespace of DaemonSet {DAEMONSET} is being deleted")
    unmet = {key: value for key, value in ours.spec.template.spec.nodeSelector.items() if labels.get(key) != value}
    if unmet and not isinstance(node, ApiError):
        selector = ", ".join(f"{key}={value}" for key, value in sorted(unmet.items()))
        return Departure(True, f"DaemonSet {DAEMONSET} no longer selects this node ({selector})")
    if isinstance(namespace, ApiError) and namespace.status in _GONE:
        return Departure(False, f"DaemonSet {DAEMONSET} is there, but of its namespace we are not told: {namespace}", certain=False)
    return Departure(False, f"DaemonSet {DAEMONSET} is there")


class Departures(Protocol):
    async def run(self) -> None:
        """What goes on in the background; returns early or never."""

    async def find(self) -> Departure:
        """What to expect, now that we were told to end."""


async def settle(departures: Departures, until: float, is_followed: Callable[[], bool]) -> Departure:
    """Ask until the answer is certain, another agent of the node has taken over, or it is too late (trio's clock)."""
    departure = await departures.find()
    with trio.move_on_at(until):
        while not departure.certain and not is_followed():  # what is left on the node now nobody will take away
            await trio.sleep(ASK_AGAIN_SECONDS)
            departure = await departures.find()
    return departure


class ClusterDepartures:
    """Asks the API server about the DaemonSet that this agent's pod belongs to."""

    def __init__(self, client: ApiClient, namespace: str, node: str, sure_after: float) -> None:
        """``sure_after``: for so many seconds the API server must say that there is no DaemonSet, or that we may not ask."""
        self._client = client
        self._sure_after = sure_after
        self._gone_since: float | None = None
        self._daemonset = f"/apis/apps/v1/namespaces/{namespace}/daemonsets/{DAEMONSET}"
        self._namespace = f"/api/v1/namespaces/{namespace}"
        self._node = f"/api/v1/nodes/{node}"
        self._allowed = False

    async def run(self) -> None:
        """Ask once while all is well: no answer later means something only if there was one before."""
        pause, longest = _AGAIN_SECONDS
        while True:
            with suppress(ApiUnavailable):
                self._allowed = not isinstance(await self._get(self._daemonset), ApiError)
            if self._allowed:
                return
            await trio.sleep(pause)
            pause = min(2 * pause, longest)

    async def find(self) -> Departure:
        gone_since, self._gone_since = self._gone_since, None
        with trio.move_on_after(_ANSWER_SECONDS):
            try:
                daemonset = await self._get(self._daemonset)
                node = await self._get(self._node)
                namespace = await self._get(self._namespace)
            except ApiUnavailable as exc:
                return Departure(False, f"the API server can't be asked: {exc}", certain=False)
            now = trio.current_time()
            if isinstance(daemonset, ApiError) and daemonset.status in _GONE:
                self._gone_since = now if gone_since is None else gone_since
            sure = self._gone_since is not None and now - self._gone_since >= self._sure_after
            return judge(daemonset, node, namespace, allowed_before=self._allowed, sure=sure)
        return Departure(False, f"the API server did not answer within {_ANSWER_SECONDS:g} s", certain=False)

    async def _get(self, path: str) -> Json | ApiError:
        try:
            return await self._client.get(path)
        except ApiError as exc:
            return exc


class DirectoryDepartures:
    """Whoever takes a mesh down that has no API server says so in the run directory."""

    def __init__(self, run_dir: Path) -> None:
        self._order = run_dir / ORDER

    async def run(self) -> None:
        await trio.lowlevel.checkpoint()

    async def find(self) -> Departure:
        if await trio.to_thread.run_sync(self._order.exists):
            return Departure(True, f"{self._order} says so")
        return Departure(False, f"there is no {self._order}")

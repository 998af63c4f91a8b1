"""Conditions written onto objects' status by server-side apply; by the leader alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Final

import trio

from istiod_py.translate import Condition
from mesh.kube.api import ApiClient, ApiError, ApiUnavailable
from mesh.kube.objects import KubeObject, ObjectKey
from mesh.kube.resources import RESOURCES
from mesh.kube.store import ObjectStore
from mesh.telemetry.log import get_logger

MANAGER: Final = "istio-ambient-ztunnel-policy"
RETRY: Final = 5.0

_log = get_logger("status")


def plan_conditions(obj: KubeObject, wanted: Sequence[Condition], now: str) -> list[dict[str, object]] | None:
    """The list to write, None if it stands there already. A time moves only with its condition's status, as Kubernetes has it."""
    found = obj.status.get("conditions")
    before = {str(item.get("type")): item for item in found if isinstance(item, Mapping)} if isinstance(found, list) else {}
    planned, same = [], True
    for condition in wanted:
        status = "True" if condition.status else "False"
        fields = {"type": condition.type, "status": status, "reason": condition.reason, "message": condition.message}
        generation = obj.metadata.get("generation")
        if isinstance(generation, int):
            fields["observedGeneration"] = generation  # type: ignore[assignment]  # beside the texts
        old = before.get(condition.type, {})
        same &= all(_agree(old.get(key), value) for key, value in fields.items())
        moved = old.get("lastTransitionTime") if old.get("status") == status else None
        planned.append({**fields, "lastTransitionTime": moved or now})
    return None if same else planned


def _agree(found: object, wanted: object) -> bool:
    """Istio's types print 64-bit numbers as strings."""
    return found == wanted or str(found) == str(wanted)


class StatusWriter:
    """Told what conditions are wanted; `run` writes those that differ."""

    def __init__(self, client: ApiClient, store: ObjectStore) -> None:
        self._client = client
        self._store = store
        self._wanted: Mapping[ObjectKey, tuple[Condition, ...]] = {}
        self._changed = trio.Event()
        self._written: dict[ObjectKey, tuple[KubeObject, tuple[Condition, ...]]] = {}
        """What was written last, for which object: one whose last good version stays in use never shows the status we gave it."""

    def want(self, statuses: Mapping[ObjectKey, tuple[Condition, ...]]) -> None:
        self._wanted = statuses
        self._written = {key: value for key, value in self._written.items() if key in statuses}
        self._changed.set()
        self._changed = trio.Event()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            changed = self._changed
            failed = False
            for key, conditions in list(self._wanted.items()):
                failed |= not await self._write(key, conditions)
            if failed:
                await trio.sleep(RETRY)
            else:
                await changed.wait()

    async def _write(self, key: ObjectKey, wanted: tuple[Condition, ...]) -> bool:
        obj, before = self._store.find(*key), self._written.get(key)
        if obj is None or (before is not None and before[0] is obj and before[1] == wanted):
            return True
        conditions = plan_conditions(obj, wanted, f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}")
        if conditions is None:
            return True
        resource = RESOURCES[key.kind]
        metadata = {"name": key.name, "namespace": key.namespace}
        body = {"apiVersion": resource.api_version, "kind": key.kind, "metadata": metadata, "status": {"conditions": conditions}}
        try:
            await self._client.apply(resource.path(key.namespace, key.name, "status"), body, manager=MANAGER)
        except (ApiError, ApiUnavailable) as exc:
            _log.warning("write.failed", object=str(key), because=str(exc))
            return isinstance(exc, ApiError) and exc.status == 404
        self._written[key] = (obj, wanted)
        return True

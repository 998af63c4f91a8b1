"""Conditions and parents written onto objects' status by server-side apply; by the leader alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, NamedTuple

import trio

from istiod_py.translate import AncestorStatus, Condition, ParentStatus, StatusEntry
from mesh.kube.api import ApiClient, ApiError, ApiUnavailable
from mesh.kube.objects import KubeObject, ObjectKey
from mesh.kube.ownership import CONDITIONS, CONTROLLERS, LISTS_MANAGER
from mesh.kube.resources import RESOURCES
from mesh.kube.store import ObjectStore
from mesh.telemetry.log import get_logger

RETRY: Final = 5.0

_log = get_logger("status")


@dataclass(frozen=True, slots=True)
class StatusPatch:
    """What one owner applies."""

    manager: str
    status: Mapping[str, object]


def plan_status(obj: KubeObject, wanted: Sequence[StatusEntry], now: str) -> list[StatusPatch]:
    """What has to be written so that the status says all that is wanted, and no more of ours."""
    patches: list[StatusPatch] = []
    owners = CONDITIONS.get(obj.kind, {})
    by_owner: dict[str, list[Condition]] = {}
    for entry in wanted:
        if isinstance(entry, Condition):
            by_owner.setdefault(owners[entry.type], []).append(entry)
    for found in _types(obj.status.get("conditions")) & owners.keys():
        by_owner.setdefault(owners[found], [])
    for owner, conditions in by_owner.items():
        planned = plan_conditions(obj, conditions, now)
        stale = any(owners[found] == owner for found in _stale(obj, conditions))
        if planned is not None or stale:
            # What an owner no longer names goes, so all of it is named.
            whole = planned if planned is not None else plan_conditions(obj, conditions, now, always=True)
            patches.append(StatusPatch(owner, {"conditions": whole or []}))
    parents = [_Listed(entry.parent, entry.controller, entry.conditions) for entry in wanted if isinstance(entry, ParentStatus)]
    ancestors = [_Listed(entry.ancestor, entry.controller, entry.conditions) for entry in wanted if isinstance(entry, AncestorStatus)]
    for name, reference, listed in (("parents", "parentRef", parents), ("ancestors", "ancestorRef", ancestors)):
        whole_list = _plan_list(obj, name, reference, listed, now)
        if whole_list is not None:
            patches.append(StatusPatch(LISTS_MANAGER, {name: whole_list}))
    return patches


class _Listed(NamedTuple):
    """What a controller says of an object that this one refers to."""

    reference: Mapping[str, object]
    controller: str
    conditions: tuple[Condition, ...]


def plan_conditions(
    obj: KubeObject, wanted: Sequence[Condition], now: str, *, found: object = None, always: bool = False
) -> list[dict[str, object]] | None:
    """The list to write, None if it stands there already (unless ``always``). A time moves only with its condition's status, as
    Kubernetes has it. ``found``: the conditions there are, by default those of the object as a whole."""
    before = _by_type(obj.status.get("conditions") if found is None else found)
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
    return None if same and not always else planned


def _plan_list(obj: KubeObject, name: str, reference: str, wanted: Sequence[_Listed], now: str) -> list[object] | None:
    """The whole list, None if it stands there already. It has no owners of its items: what other controllers say is kept by writing it
    again."""
    listed = obj.status.get(name)
    found = [item for item in listed if isinstance(item, Mapping)] if isinstance(listed, list) else []
    ours = {entry.controller for entry in wanted} | CONTROLLERS  # with nothing left to say our items go
    result: list[object] = [item for item in found if item.get("controllerName") not in ours]
    same = len(found) == len(result) + len(wanted)
    for entry in wanted:
        old = next(
            (item for item in found if item.get("controllerName") == entry.controller and item.get(reference) == entry.reference), {}
        )
        conditions = plan_conditions(obj, entry.conditions, now, found=old.get("conditions", []))
        same &= bool(old) and conditions is None and _types(old.get("conditions")) == {each.type for each in entry.conditions}
        whole = plan_conditions(obj, entry.conditions, now, found=old.get("conditions", []), always=True)
        result.append({reference: dict(entry.reference), "controllerName": entry.controller, "conditions": whole})
    return None if same else result


def _stale(obj: KubeObject, wanted: Sequence[Condition]) -> set[str]:
    """Types of ours that stand there and are no longer wanted."""
    return (_types(obj.status.get("conditions")) & CONDITIONS.get(obj.kind, {}).keys()) - {condition.type for condition in wanted}


def _types(conditions: object) -> set[str]:
    return set(_by_type(conditions))


def _by_type(conditions: object) -> dict[str, Mapping[str, object]]:
    return {str(item.get("type")): item for item in conditions if isinstance(item, Mapping)} if isinstance(conditions, list) else {}


def _agree(found: object, wanted: object) -> bool:
    """Istio's types print 64-bit numbers as strings."""
    return found == wanted or str(found) == str(wanted)


def utc_now() -> str:
    """As Kubernetes writes times."""
    return f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"


class StatusWriter:
    """Told what is wanted; `run` writes what differs."""

    def __init__(self, client: ApiClient, store: ObjectStore) -> None:
        self._client = client
        self._store = store
        self._wanted: Mapping[ObjectKey, tuple[StatusEntry, ...]] = {}
        self._changed = trio.Event()
        self._settled: dict[ObjectKey, tuple[KubeObject, tuple[StatusEntry, ...]]] = {}
        """What needs no second look: it stood there, or was written. An object whose last good version stays in use never shows the
        status we gave it."""

    def want(self, statuses: Mapping[ObjectKey, tuple[StatusEntry, ...]]) -> None:
        """These, and of all other objects nothing."""
        self._wanted = statuses
        self._settled = {key: value for key, value in self._settled.items() if key in statuses}
        self._changed.set()
        self._changed = trio.Event()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            changed = self._changed
            failed = False
            for key, entries in list(self._wanted.items()):
                failed |= not await self._write(key, entries)
            if failed:
                await trio.sleep(RETRY)
            else:
                await changed.wait()

    async def _write(self, key: ObjectKey, wanted: tuple[StatusEntry, ...]) -> bool:
        obj, before = self._store.find(*key), self._settled.get(key)
        if obj is None or (before is not None and before[0] is obj and before[1] == wanted):
            return True
        for patch in plan_status(obj, wanted, utc_now()):
            try:
                await apply_status(self._client, key, patch)
            except (ApiError, ApiUnavailable) as exc:
                _log.warning("write.failed", object=str(key), because=str(exc))
                return isinstance(exc, ApiError) and exc.status == 404
        self._settled[key] = (obj, wanted)
        return True


async def apply_status(client: ApiClient, key: ObjectKey, patch: StatusPatch) -> None:
    """Raises ApiError, ApiUnavailable."""
    resource = RESOURCES[key.kind]
    metadata = {"name": key.name, **({"namespace": key.namespace} if resource.namespaced else {})}
    body = {"apiVersion": resource.api_version, "kind": key.kind, "metadata": metadata, "status": patch.status}
    await client.apply(resource.path(key.namespace, key.name, "status"), body, manager=patch.manager)

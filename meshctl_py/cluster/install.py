"""Putting the objects of the mesh into a cluster, by server-side apply: again and again with the same result, an older version upgraded in
place."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Final

import trio

from mesh.kube.api import ApiClient, ApiError
from mesh.kube.resources import RESOURCES, Resource
from meshctl_py.cluster.discovery import Discovery
from meshctl_py.cluster.errors import ClusterProblem
from meshctl_py.cluster.inventory import MANAGER, Entry, Installation, read_installation, write_installation
from meshctl_py.cluster.manifests import CRD_KIND, PART_OF, PROJECT, Object
from meshctl_py.cluster.objects import SYSTEM_NAMESPACE, Named, find_one
from meshctl_py.cluster.traces import Tell, find_other_mesh
from meshctl_py.cluster.values import Given

OLDEST: Final = (1, 28)
"""What the manifests need; the oldest that they are said to work with."""
_ORDER: Final = ("Namespace", CRD_KIND, "PriorityClass", "ServiceAccount", "ConfigMap", "Secret")
_LAST: Final = ("Service", "Deployment", "DaemonSet")
_KEPT: Final = frozenset({"Namespace", CRD_KIND})
_OWNERS: Final = {"gateway.networking.k8s.io": "the Gateway API"}
"""Whose definitions of a group are where they are not ours; of others: Istio's."""
"""What an upgrade never removes, since users' own objects hang on it."""
CRD_SECONDS: Final = 30.0
_POLL: Final = 0.2


@dataclass(frozen=True, slots=True)
class Plan:
    """``objects`` in the order in which they are applied."""

    objects: tuple[Object, ...]
    values: Given


def in_order(objects: Sequence[Object]) -> tuple[Object, ...]:
    """What others need first; workloads last, so that nothing is missing when they start."""

    def rank(obj: Object) -> int:
        kind = obj["kind"]
        if kind in _ORDER:
            return _ORDER.index(kind)
        return len(_ORDER) + (1 + _LAST.index(kind) if kind in _LAST else 0)

    return tuple(sorted(objects, key=rank))


async def check_cluster(client: ApiClient) -> None:
    """That it is new enough, and that nobody else's mesh is in the way. Raises ClusterProblem, ApiError, ApiUnavailable."""
    found = await client.get("/version")
    numbers = tuple(int(re.sub(r"\D.*", "", str(found.get(key, "0"))) or 0) for key in ("major", "minor"))
    if numbers < OLDEST:
        raise ClusterProblem(f"the cluster is Kubernetes {found.get('gitVersion')}; the mesh needs {OLDEST[0]}.{OLDEST[1]} or newer")
    other = await find_other_mesh(client)
    if other:
        raise ClusterProblem(
            f"there is a {other} that is not ours: another mesh, Istio itself perhaps, is installed. "
            "Two can't share a cluster; uninstall that one first"
        )


async def apply_plan(client: ApiClient, plan: Plan, tell: Tell, *, dry_run: bool = False) -> None:
    """Apply all, remove what an earlier version had beyond it, and note it down. Nothing is waited for but that kinds are served.

    Raises ClusterProblem, ApiError, ApiUnavailable; applying again goes on from there.
    """
    discovery = Discovery(client)
    before = await read_installation(client)
    made_namespace = before.made_namespace if before is not None else not await _is_there(client, RESOURCES["Namespace"], SYSTEM_NAMESPACE)
    entries: list[Entry] = []
    for obj in plan.objects:
        if obj["kind"] == CRD_KIND and not await _is_our_crd(client, discovery, obj):
            tell(
                f"{obj['kind'].lower()}/{obj['metadata']['name']}", f"left alone: it is {_OWNERS.get(obj['spec']['group'], 'Istio')}'s own"
            )
            continue
        resource = await discovery.resource_of(obj)
        entry = Entry.of(resource, obj)
        tell(str(entry), await _apply(client, entry, obj, dry_run=dry_run))
        entries.append(entry)
        if obj["kind"] == CRD_KIND and not dry_run:
            await _wait_served(client, entry)
    gone = [entry for entry in (before.entries if before is not None else ()) if entry not in entries and entry.kind not in _KEPT]
    for entry in gone:
        if not dry_run:
            await _delete(client, entry)
        tell(str(entry), "removed: it is no longer part of the mesh")
    if not dry_run:
        values = dict(plan.values)
        await write_installation(client, Installation(version("ambient-mesh"), values, entries, made_namespace))


async def _is_there(client: ApiClient, resource: Resource, name: str) -> bool:
    return await find_one(client, resource, Named, "", name) is not None


async def _is_our_crd(client: ApiClient, discovery: Discovery, obj: Object) -> bool:
    """Whether there is none yet, or one that we made: those of Istio say more than ours and are its installation's to change."""
    found = await find_one(client, await discovery.resource_of(obj), Named, "", obj["metadata"]["name"])
    return found is None or found.metadata.labels.get(PART_OF) == PROJECT


async def _apply(client: ApiClient, entry: Entry, obj: Object, *, dry_run: bool) -> str:
    before = await client.find(entry.path)
    try:
        after = await client.apply(entry.path, obj, manager=MANAGER, dry_run=dry_run)
    except ApiError as exc:
        if dry_run and exc.status == 404 and entry.namespaced:
            return "would be created"  # in a namespace that a dry run does not make
        raise ClusterProblem(f"{entry}: {exc.message}") from exc
    if before is None:
        return "would be created" if dry_run else "created"
    same = _without_noise(before) == _without_noise(after)
    return "unchanged" if same else "would be changed" if dry_run else "configured"


def _without_noise(obj: Object) -> Object:
    metadata = {key: value for key, value in obj["metadata"].items() if key not in ("managedFields", "resourceVersion", "generation")}
    return {key: value for key, value in obj.items() if key != "status"} | {"metadata": metadata}


async def _wait_served(client: ApiClient, entry: Entry) -> None:
    with trio.move_on_after(CRD_SECONDS):
        while True:
            found = await client.get(entry.path)
            status = found.get("status")
            # A definition that was just made has null there.
            conditions = (status.get("conditions") or ()) if isinstance(status, dict) else ()
            if any(item.get("type") == "Established" and item.get("status") == "True" for item in conditions):
                return
            await trio.sleep(_POLL)
    raise ClusterProblem(f"{entry} was not taken into service within {CRD_SECONDS:g} s: kubectl describe {entry}")


async def _delete(client: ApiClient, entry: Entry) -> None:
    try:
        await client.delete(entry.path)
    except ApiError as exc:
        if exc.status != 404:
            raise

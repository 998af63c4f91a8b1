"""What the commands do, as istioctl does it: the same checks in the same order, the same words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import trio

from mesh.model.labels import DATAPLANE_MODE, USE_WAYPOINT
from meshctl_py.cluster.errors import ClusterProblem
from meshctl_py.waypoints.gateway import Found, InvalidWaypoint, list_table, make_gateway, status_table
from meshctl_py.waypoints.place import WaypointPlace

POLL: Final = 1.0
"""Seconds between looks at a waypoint that is waited for."""
_NONE: Final = "No waypoints found."

Tell: TypeAlias = Callable[[str], None]
"""Takes a line for the user."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A waypoint to apply; empty texts: not said."""

    name: str
    namespace: str
    traffic: str = ""
    revision: str = ""
    enroll: bool = False
    overwrite: bool = False
    wait: bool = False
    timeout: float = 90.0


async def apply_waypoint(place: WaypointPlace, wanted: Wanted, tell: Tell) -> None:
    """Raises ClusterProblem; on a cluster also ApiError, ApiUnavailable."""
    namespace = wanted.namespace or place.namespace
    try:
        labels = await place.namespace_labels(namespace)
    except ClusterProblem as exc:
        if wanted.namespace:
            raise
        raise ClusterProblem(f"{exc}; name yours with -n") from exc
    gateway = build(wanted.name, namespace, wanted.traffic, wanted.revision)
    name = gateway["metadata"]["name"]
    if wanted.enroll:
        # Unlike istioctl not where it is this very waypoint: a command that is repeated is to do what it did.
        if labels.get(USE_WAYPOINT, name) not in ("", name) and not wanted.overwrite:
            tell(
                f"⚠️ Warning: namespace ({namespace}) already has an enrolled Waypoint. Consider adding the `--overwrite` flag to your "
                "apply command."
            )
            return
        if labels.get(DATAPLANE_MODE) != "ambient":
            command = f"`{place.label_command} namespace {namespace} {DATAPLANE_MODE}=ambient`"
            tell(f"⚠️ Warning: namespace is not enrolled in ambient. Consider running\t{command}")
    await place.apply(gateway)
    tell(f"✅ waypoint {namespace}/{name} applied")
    if wanted.wait:
        await _wait_programmed(place, namespace, name, trio.current_time() + wanted.timeout, "timed out while waiting for waypoint")
        tell(f"✅ waypoint {namespace}/{name} is ready!")
    if wanted.enroll:
        await place.label_namespace(namespace, USE_WAYPOINT, name)
        tell(f'✅ namespace {namespace} labeled with "{USE_WAYPOINT}: {name}"')


def build(name: str, namespace: str, traffic: str, revision: str) -> dict[str, dict[str, str]]:
    """The Gateway. Raises ClusterProblem."""
    try:
        return make_gateway(name, namespace, traffic, revision)
    except InvalidWaypoint as exc:
        raise ClusterProblem(f"failed to create gateway: {exc}") from exc


async def _wait_programmed(place: WaypointPlace, namespace: str, name: str, deadline: float, failure: str) -> Found:
    """Raises ClusterProblem with ``failure`` and the reason at ``deadline``, or at once where nobody is at work."""
    found = None
    with trio.move_on_at(deadline):
        while True:
            found = await place.find(namespace, name)
            if found is not None and found.is_programmed:
                return found
            if not place.is_tended:
                break
            await trio.sleep(POLL)
    told = found.told() if found is not None else {}
    because = told.get("message", "") if told.get("status") == "False" else ""
    if not place.is_tended:
        because = because or "no lab follows this directory, so nobody programs it"
    raise ClusterProblem(f"{failure}\t{namespace}/{name}" + (f": {because}" if because else ""))


async def delete_waypoints(
    place: WaypointPlace, namespace: str, names: Sequence[str], tell: Tell, *, everything: bool = False, revision: str = ""
) -> None:
    """Those of these names, or all of the namespace, or of a revision in it."""
    namespace = namespace or place.namespace
    there = [each.name for each in await place.list(namespace, revision)]
    chosen = there if everything or revision else names
    if not chosen:
        tell(_NONE)
    for name in chosen:
        if name in there and await place.delete(namespace, name):
            tell(f"waypoint {namespace}/{name} deleted")
        else:
            tell(f"waypoint {namespace}/{name} not found")


async def list_waypoints(place: WaypointPlace, namespace: str, tell: Tell, *, everywhere: bool) -> None:
    found = await place.list("" if everywhere else namespace or place.namespace)
    tell(list_table(found, namespaces=everywhere) if found else _none(place, namespace, everywhere=everywhere))


def _none(place: WaypointPlace, namespace: str, *, everywhere: bool) -> str:
    """istioctl's words, and where else to look."""
    return _NONE if everywhere else f"{_NONE} That is in namespace {namespace or place.namespace}: -A looks in all."


async def show_status(place: WaypointPlace, namespace: str, tell: Tell, *, everywhere: bool, wait_within: float | None) -> None:
    """Once all are programmed, unless ``wait_within`` is None."""
    found = await place.list("" if everywhere else namespace or place.namespace)
    if not found:
        tell(_none(place, namespace, everywhere=everywhere))
        return
    if wait_within is not None:
        deadline = trio.current_time() + wait_within
        failure = "failed to print waypoint status: timed out while retrieving status for waypoint"
        found = [await _wait_programmed(place, each.namespace, each.name, deadline, failure) for each in found]
    tell(status_table(found, namespaces=everywhere))

"""From one translation to the next: what changed, as the delta that agents are sent. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

from istiod_py.translate import Translation
from mesh.model.l7.waypoint import Assigned
from mesh.model.policy import Action, Policy, Rule
from mesh.state.store import Delta
from mesh.xds.l7 import resource_name, type_url_of

_T = TypeVar("_T")


def diff(before: Translation, after: Translation) -> Delta:
    """What is new, different or gone."""
    return Delta(
        workloads=_changed(before.workloads, after.workloads),
        services=_changed(before.services, after.services),
        policies=tuple(map(closed, _changed(before.policies, after.policies))),
        removed_addresses=(*_removed(before.workloads, after.workloads), *_removed(before.services, after.services)),
        removed_policies=_removed(before.policies, after.policies),
        l7=tuple(
            Assigned(key.waypoint, resource)
            for key, resource in after.l7.items()
            if (old := before.l7.get(key)) is not resource and old != resource
        ),
        removed_l7=tuple(
            (type_url_of(resource), resource_name(Assigned(key.waypoint, resource)))
            for key, resource in before.l7.items()
            if key not in after.l7
        ),
    )


def closed(policy: Policy) -> Policy:
    """An unreadable policy as one that every agent enforces as it must be, also one that knows nothing of "unreadable": deny everything."""
    if policy.unreadable is None:
        return policy
    return replace(policy, action=Action.DENY, rules=(Rule(),), dry_run=False, unreadable=None)


def _changed(before: Mapping[str, _T], after: Mapping[str, _T]) -> tuple[_T, ...]:
    # Translation keeps the instance of what did not change: comparing by identity first makes an unchanged mesh cheap.
    return tuple(value for key, value in after.items() if (old := before.get(key)) is not value and old != value)


def _removed(before: Mapping[str, _T], after: Mapping[str, _T]) -> tuple[str, ...]:
    return tuple(key for key in before if key not in after)

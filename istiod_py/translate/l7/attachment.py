"""Which waypoint a policy is for: by what it targets, and by nothing else.

A selector chooses workloads and a policy without both is for a namespace of them; node proxies enforce those. At a waypoint such a policy
would either be passed over or deny what it never spoke of, so that it counts for nothing there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Protocol

from mesh.kube.objects import SourceProblem
from mesh.kube.targets import TargetRef

ISTIO_CLASS: Final = "istio-waypoint"
"""A policy for this GatewayClass is for waypoints of every class: it says "all waypoints" in Istio, whatever ours are called."""


@dataclass(frozen=True, slots=True)
class WaypointRef:
    """A waypoint's Gateway, and the name of its class."""

    namespace: str
    name: str
    class_name: str = ISTIO_CLASS

    @property
    def key(self) -> str:
        return f"{self.namespace}/{self.name}"


class FrontedService(Protocol):
    """A Service, or one host of a ServiceEntry: ``kind`` and ``name`` are the object's, ``key`` is ``namespace/hostname``."""

    @property
    def kind(self) -> str: ...

    @property
    def namespace(self) -> str: ...

    @property
    def name(self) -> str: ...

    @property
    def key(self) -> str: ...


class Fronted:
    """The services that a waypoint stands before, found by their objects."""

    def __init__(self, waypoint: WaypointRef, services: Iterable[FrontedService]) -> None:
        self.waypoint = waypoint
        self._by_object: dict[tuple[str, str, str], list[str]] = {}
        for service in services:
            self._by_object.setdefault((service.kind, service.namespace, service.name), []).append(service.key)

    def keys_of(self, kind: str, namespace: str, name: str) -> tuple[str, ...]:
        return tuple(self._by_object.get((kind, namespace, name), ()))

    def keys_in(self, namespace: str) -> tuple[str, ...]:
        return tuple(key for (_, place, _), keys in self._by_object.items() if place == namespace for key in keys)


def find_targets(targets: Iterable[TargetRef], namespace: str, fronted: Fronted, root_namespace: str) -> tuple[str, ...] | None:
    """Of a policy in ``namespace``: the services behind this waypoint that it is for (their keys, in order); empty: all that goes through
    it; None: it is not for this waypoint."""
    keys: set[str] = set()
    for target in targets:
        match target.kind:
            case "Gateway" if (namespace, target.name) == (fronted.waypoint.namespace, fronted.waypoint.name):
                return ()
            case "GatewayClass" if namespace == root_namespace and target.name in (ISTIO_CLASS, fronted.waypoint.class_name):
                return ()
            case "Service" | "ServiceEntry":
                keys.update(fronted.keys_of(target.kind, namespace, target.name))
    return tuple(sorted(keys)) or None


def find_feared_targets(
    targets: Iterable[TargetRef], problems: Iterable[SourceProblem], namespace: str, fronted: Fronted, root_namespace: str
) -> tuple[str, ...] | None:
    """The same of a policy with mistakes, for all that it may have meant: where what it targets is part of the mistake, everything that a
    policy of its namespace can target."""
    if not any(problem.field in ("", "spec") or problem.field.startswith("spec.targetRef") for problem in problems):
        return find_targets(targets, namespace, fronted, root_namespace)
    if namespace in (root_namespace, fronted.waypoint.namespace):
        return ()
    return tuple(sorted(fronted.keys_in(namespace))) or None

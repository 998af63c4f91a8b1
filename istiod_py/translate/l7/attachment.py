"""Which waypoint a policy is for: by what it targets, and by nothing else.

A selector chooses workloads and a policy without both is for a namespace of them; node proxies enforce those. At a waypoint such a policy
would either be passed over or deny what it never spoke of, so that it counts for nothing there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from mesh.kube.objects import ObjectKey, SourceProblem
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
    """The services that a waypoint stands before, found by their objects.

    A policy that is for one of them names others of its targets too, if they are in ``known``, all services of the mesh: then it stays
    what it is while services come to the waypoint and leave it, and none is served without it in between.
    """

    def __init__(
        self, waypoint: WaypointRef, services: Iterable[FrontedService], known: Mapping[ObjectKey, tuple[str, ...]] | None = None
    ) -> None:
        self.waypoint = waypoint
        self._by_object: dict[ObjectKey, tuple[str, ...]] = {}
        for service in services:
            place = ObjectKey(service.kind, service.namespace, service.name)
            self._by_object[place] = (*self._by_object.get(place, ()), service.key)
        self._known = self._by_object if known is None else known

    def keys_of(self, objects: Iterable[ObjectKey]) -> tuple[str, ...]:
        """Of the services that these objects are; none if the waypoint stands before none of them."""
        asked = list(objects)
        if not any(each in self._by_object for each in asked):
            return ()
        return tuple(sorted({key for each in asked for key in (*self._known.get(each, ()), *self._by_object.get(each, ()))}))

    def keys_in(self, namespace: str) -> tuple[str, ...]:
        """The same of all objects of a namespace."""
        return self.keys_of(each for each in self._known.keys() | self._by_object.keys() if each.namespace == namespace)


def find_targets(targets: Iterable[TargetRef], namespace: str, fronted: Fronted, root_namespace: str) -> tuple[str, ...] | None:
    """Of a policy in ``namespace``: the services that it is for (their keys, in order), one of which at least is behind this waypoint;
    empty: all that goes through it; None: it is not for this waypoint."""
    objects: list[ObjectKey] = []
    for target in targets:
        match target.kind:
            case "Gateway" if (namespace, target.name) == (fronted.waypoint.namespace, fronted.waypoint.name):
                return ()
            case "GatewayClass" if namespace == root_namespace and target.name in (ISTIO_CLASS, fronted.waypoint.class_name):
                return ()
            case "Service" | "ServiceEntry":
                objects.append(ObjectKey(target.kind, namespace, target.name))
    return fronted.keys_of(objects) or None


def find_feared_targets(
    targets: Collection[TargetRef], problems: Iterable[SourceProblem], namespace: str, fronted: Fronted, root_namespace: str
) -> tuple[str, ...] | None:
    """The same of a policy with mistakes, for all that it may have meant: where what it targets is part of the mistake, or nothing of it
    can be read, everything that a policy of its namespace can target."""
    if targets and not any(problem.field in ("", "spec") or problem.field.startswith("spec.targetRef") for problem in problems):
        return find_targets(targets, namespace, fronted, root_namespace)
    if namespace in (root_namespace, fronted.waypoint.namespace):
        return ()
    return fronted.keys_in(namespace) or None

"""The control plane's resources as they go out: encoded once, found by name, alias or service; says what a change really changed."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Protocol, TypeAlias

from mesh.state.store import Delta
from mesh.xds.encode import Resource, policy_resource, service_resource, workload_resource
from mesh.xds.l7 import L7_TYPES, l7_resource, type_url_of
from mesh.xds.names import ADDRESS, AUTHORIZATION

Changes: TypeAlias = Mapping[str, Collection[str]]
"""Names that are new, different or gone, by type URL."""

_NOTHING: Final[Mapping[str, Resource]] = MappingProxyType({})


class ResourceSource(Protocol):
    """What the server serves: the present state, read synchronously, so that one response is of one state."""

    @property
    def version(self) -> str:
        """Of the state as a whole; changes with every change. For nonces and humans."""

    def all(self, type_url: str) -> Iterable[Resource]:
        """Everything of a type; nothing for an unknown one."""

    def get(self, type_url: str, name: str) -> Resource | None:
        """By its own name."""

    def find(self, type_url: str, name: str) -> Iterable[Resource]:
        """By its own name or an alias; a service brings its workloads."""

    def on_node(self, type_url: str, node: str) -> Iterable[Resource]:
        """What runs on a node: its agent gets that without asking."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A change as it goes out: new resources and the names of those that are gone, by type."""

    resources: Mapping[str, Sequence[Resource]]
    removed: Mapping[str, Sequence[str]]


def encode_delta(delta: Delta) -> Encoded:
    """Raises ValueError for an unreadable policy. Pure: a large change may be encoded in a thread."""
    resources: dict[str, list[Resource]] = {
        ADDRESS: [*map(workload_resource, delta.workloads), *map(service_resource, delta.services)],
        AUTHORIZATION: [policy_resource(policy) for policy in delta.policies],
    }
    removed: dict[str, list[str]] = {ADDRESS: list(delta.removed_addresses), AUTHORIZATION: list(delta.removed_policies)}
    for assigned in delta.l7:
        resources.setdefault(type_url_of(assigned.resource), []).append(l7_resource(assigned))
    for type_url, name in delta.removed_l7:
        removed.setdefault(type_url, []).append(name)
    return Encoded(resources, removed)


class ResourceCache:
    """A ResourceSource fed with model values. `take` is synchronous and returns what to publish."""

    def __init__(self) -> None:
        self._types: dict[str, dict[str, Resource]] = {type_url: {} for type_url in (ADDRESS, AUTHORIZATION, *L7_TYPES)}
        self._by_key: dict[str, dict[str, None]] = {}
        """Alias, service or node to names, of addresses."""
        self._changes = 0

    @property
    def version(self) -> str:
        return str(self._changes)

    def all(self, type_url: str) -> Iterable[Resource]:
        return self._types.get(type_url, _NOTHING).values()

    def get(self, type_url: str, name: str) -> Resource | None:
        return self._types.get(type_url, _NOTHING).get(name)

    def find(self, type_url: str, name: str) -> Iterable[Resource]:
        resources = self._types.get(type_url, _NOTHING)
        names = dict.fromkeys([name] if name in resources else [])
        if type_url == ADDRESS:
            for found in [*self._by_key.get(name, ())]:
                names[found] = None
                names.update(self._by_key.get(found, {}))  # found by its VIP, a service brings its workloads too
        return [resources[found] for found in names]

    def on_node(self, type_url: str, node: str) -> Iterable[Resource]:
        resources = self._types.get(type_url, _NOTHING)
        return [resources[name] for name in self._by_key.get(_node_key(node), ())] if type_url == ADDRESS and node else []

    def apply(self, delta: Delta) -> Changes:
        """Take new values and removals. Raises ValueError for an unreadable policy, before anything is changed."""
        return self.take(encode_delta(delta))

    def take(self, encoded: Encoded) -> Changes:
        """A resource that is what is there already is no change."""
        changed = {
            type_url: self._update(type_url, encoded.resources.get(type_url, ()), encoded.removed.get(type_url, ()))
            for type_url in self._types
        }
        self._changes += any(changed.values())
        return {type_url: names for type_url, names in changed.items() if names}

    def _update(self, type_url: str, resources: Iterable[Resource], removed: Iterable[str]) -> list[str]:
        held = self._types[type_url]
        changed: dict[str, None] = {}
        for name in removed:
            if (gone := held.pop(name, None)) is not None:
                self._unlink(gone)
                changed[name] = None
        for resource in resources:
            old = held.get(resource.name)
            if old == resource:
                continue
            if old is not None:
                self._unlink(old)
            held[resource.name] = resource
            for key in _keys(resource):
                self._by_key.setdefault(key, {})[resource.name] = None
            changed[resource.name] = None
        return list(changed)

    def _unlink(self, resource: Resource) -> None:
        for key in _keys(resource):
            names = self._by_key.get(key, {})
            names.pop(resource.name, None)
            if not names:
                self._by_key.pop(key, None)


def _keys(resource: Resource) -> Iterable[str]:
    yield from resource.aliases
    yield from resource.groups
    if resource.node:
        yield _node_key(resource.node)


def _node_key(node: str) -> str:
    return f"node {node}"  # a space: no alias, uid or hostname has one

"""What every source of objects offers: the objects now, what is wrong with them, and word of every change."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Protocol

from mesh.kube.objects import KubeObject, ObjectKey, Origin, SourceProblem


@dataclass(frozen=True, slots=True)
class Changes:
    """What is different since the last look. ``changed`` also names removed objects, and objects that only moved in their file."""

    changed: frozenset[ObjectKey] = frozenset()
    problems_changed: bool = False

    def __bool__(self) -> bool:
        return bool(self.changed) or self.problems_changed


class ObjectStore(Protocol):
    """Implementations: `mesh.kube.directory.DirectoryStore`, `mesh.kube.cluster.ClusterStore`."""

    @property
    def problems(self) -> tuple[SourceProblem, ...]:
        """Every mistake in the source now, sorted."""

    @property
    def ignored_kinds(self) -> Mapping[str, Origin]:
        """``apiVersion/kind`` of objects that were found and are not read, with the first place of each."""

    def objects(self, *kinds: str) -> list[KubeObject]:
        """All objects of these kinds (none given: of all), by namespace and name within a kind."""

    def find(self, kind: str, namespace: str, name: str) -> KubeObject | None: ...

    def watch(self) -> AsyncGenerator[Changes, None]:
        """Changes as they happen, for ever. One task may watch; use with `contextlib.aclosing`."""

"""A Kubernetes API server as a source of objects: `DirectoryStore`'s interface and rules, with the objects' names in place of files.

An object that the API server took and we cannot read keeps its last good version; a policy that never had one is handed on with its
problems, to be enforced closed.
"""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

import trio

from mesh.kube.api import ApiClient
from mesh.kube.checked import check_object
from mesh.kube.kinds import KINDS
from mesh.kube.objects import KubeObject, Layer, ObjectKey, Origin, SourceProblem, mapping_at
from mesh.kube.prune import prune
from mesh.kube.reflector import Reflector
from mesh.kube.resources import RESOURCES
from mesh.kube.store import Changes

_Note: TypeAlias = Callable[[ObjectKey | None], None]


class ClusterStore:
    """The objects of a cluster. `run` follows the API server; reading methods answer from memory."""

    def __init__(
        self,
        client: ApiClient,
        kinds: Iterable[str] = tuple(RESOURCES),
        *,
        field_selectors: Mapping[str, str] | None = None,
        rng: random.Random | None = None,
    ) -> None:
        """``field_selectors``: by kind, which objects of it are asked for (``{"Pod": "spec.nodeName=n1"}``)."""
        selectors = field_selectors or {}
        self._changed: set[ObjectKey] = set()
        self._problems_changed = False
        self._news = trio.Event()
        self._collections = {kind: _Collection(kind, self._note) for kind in sorted(kinds)}
        self._reflectors = {
            kind: Reflector(client, RESOURCES[kind], collection, field_selector=selectors.get(kind, ""), rng=rng)
            for kind, collection in self._collections.items()
        }

    async def run(self) -> None:
        """Follow the API server until cancelled."""
        async with trio.open_nursery() as nursery:
            for reflector in self._reflectors.values():
                nursery.start_soon(reflector.run)

    async def wait_synced(self) -> None:
        """Until every collection was read once, or is known not to exist."""
        for reflector in self._reflectors.values():
            await reflector.synced.wait()

    @property
    def unsynced(self) -> list[str]:
        """Kinds that were not read yet."""
        return [kind for kind, reflector in self._reflectors.items() if not reflector.synced.is_set()]

    @property
    def problems(self) -> tuple[SourceProblem, ...]:
        """Mistakes in objects, and collections that cannot be followed now."""
        return tuple(sorted({problem for collection in self._collections.values() for problem in collection.list_problems()}))

    @property
    def ignored_kinds(self) -> Mapping[str, Origin]:
        """None: only what is read is asked for."""
        return {}

    def objects(self, *kinds: str) -> list[KubeObject]:
        """All objects of these kinds (none given: of all), by namespace and name within a kind."""
        chosen = (collection for kind, collection in self._collections.items() if not kinds or kind in kinds)
        return [obj for collection in chosen for obj in collection.in_order()]

    def find(self, kind: str, namespace: str, name: str) -> KubeObject | None:
        collection = self._collections.get(kind)
        return collection.objects.get(ObjectKey(kind, namespace, name)) if collection else None

    async def watch(self) -> AsyncGenerator[Changes, None]:
        """Yield changes as they happen, for ever; the first time, everything since the store was made."""
        while True:
            yield await self.wait_changed()

    async def wait_changed(self) -> Changes:
        """What changed since the last time; unlike `watch` it may be cancelled and called again."""
        await self._news.wait()
        self._news = trio.Event()
        changes = Changes(frozenset(self._changed), self._problems_changed)
        self._changed.clear()
        self._problems_changed = False
        return changes

    def _note(self, key: ObjectKey | None) -> None:
        """The object changed; None: only problems did."""
        if key is None:
            self._problems_changed = True
        else:
            self._changed.add(key)
        self._news.set()


class _Collection:
    """The objects of one kind; a `Sink`."""

    def __init__(self, kind: str, note: _Note) -> None:
        self._kind = kind
        self._note = note
        self._trouble = ""
        self._bad: dict[ObjectKey, KubeObject] = {}
        """Objects as they are now that cannot be read as their kind."""
        self._sorted: list[KubeObject] | None = []
        self.objects: dict[ObjectKey, KubeObject] = {}
        """Those to use: the present, or the last good version."""

    def in_order(self) -> list[KubeObject]:
        if self._sorted is None:
            self._sorted = [obj for _, obj in sorted(self.objects.items())]
        return self._sorted

    def list_problems(self) -> list[SourceProblem]:
        problems = [problem for obj in self._bad.values() for problem in obj.problems]
        if self._trouble:
            problems.append(SourceProblem("Kubernetes API", 0, "", self._trouble))
        return problems

    # Sink

    def reduce(self, obj: dict[str, object]) -> dict[str, object]:
        return prune(self._kind, obj)

    def replace(self, objects: Sequence[dict[str, object]]) -> None:
        kept = {self._adopt(raw) for raw in objects}
        for key in (self.objects.keys() | self._bad.keys()) - kept:
            self._forget(key)

    def put(self, obj: dict[str, object]) -> None:
        self._adopt(self.reduce(obj))

    def remove(self, namespace: str, name: str) -> None:
        self._forget(ObjectKey(self._kind, namespace if KINDS[self._kind].namespaced else "", name))

    def report(self, problem: str) -> None:
        if problem != self._trouble:
            self._trouble = problem
            self._note(None)

    def _adopt(self, raw: dict[str, object]) -> ObjectKey:
        """``raw`` is pruned already. The API server vouches for names and namespaces."""
        metadata = mapping_at(raw, "metadata")
        namespace = str(metadata.get("namespace") or "") if KINDS[self._kind].namespaced else ""
        key = ObjectKey(self._kind, namespace, str(metadata.get("name")))
        known = self._bad.get(key) or self.objects.get(key)
        if known is not None and known.raw == raw:
            return key
        layer = Layer(Origin(str(key), 0, 0), raw)
        obj = check_object(RESOURCES[self._kind].api_version, key, raw, (layer,))
        if self._bad.pop(key, None) is not None or obj.problems:
            self._note(None)
        if obj.problems:
            self._bad[key] = obj
            last = self.objects.get(key)
            if (last is not None and not last.problems) or not KINDS[self._kind].hands_on_mistakes:
                return key
        self.objects[key] = obj
        self._sorted = None
        self._note(key)
        return key

    def _forget(self, key: ObjectKey) -> None:
        if self._bad.pop(key, None) is not None:
            self._note(None)
        if self.objects.pop(key, None) is not None:
            self._sorted = None
            self._note(key)

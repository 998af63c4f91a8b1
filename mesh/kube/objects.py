"""A Kubernetes object as a source of configuration handed it over, with the file and line of every field for messages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

FieldPath: TypeAlias = tuple[str | int, ...]
"""Keys and list indices from the object's root, e.g. ``("spec", "containers", 0, "command")``."""


class ObjectKey(NamedTuple):
    """What makes an object one object. ``namespace`` is ``""`` for cluster-scoped kinds. The API group is not part: we read no
    two kinds of one name."""

    kind: str
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.namespace}/{self.name}" if self.namespace else f"{self.kind} {self.name}"


@dataclass(frozen=True, slots=True, order=True)
class SourceProblem:
    """A mistake in the user's configuration. ``line`` is 1-based, 0 where a file as a whole is meant; ``field`` may be empty."""

    file: str
    line: int
    field: str
    message: str

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}" if self.line else self.file
        return f"{where}: {self.field}: {self.message}" if self.field else f"{where}: {self.message}"


class SourceMapping(dict[str, object]):
    """A YAML mapping that remembers its lines: ``line`` of itself, ``lines`` of its keys; 0-based within its document."""

    __slots__ = ("line", "lines")

    def __init__(self, line: int) -> None:
        super().__init__()
        self.line = line
        self.lines: dict[str, int] = {}


class SourceSequence(list[object]):
    """A YAML sequence that remembers its lines: ``line`` of itself, ``lines`` of its items; 0-based within its document."""

    __slots__ = ("line", "lines")

    def __init__(self, line: int) -> None:
        super().__init__()
        self.line = line
        self.lines: list[int] = []


@dataclass(frozen=True, slots=True)
class Origin:
    """Where an object stands: a file, the index of the document in it, and the document's first line (1-based)."""

    file: str
    document: int
    line: int


@dataclass(frozen=True, slots=True)
class Layer:
    """One document that contributed to an object: the user's own, or an overlay's. ``tree`` has lines relative to ``origin``."""

    origin: Origin
    tree: Mapping[str, object]

    def line_of(self, path: FieldPath) -> tuple[int, bool]:
        """The line (1-based) of the deepest part of ``path`` that is present, and whether that is all of it."""
        line, node = 0, self.tree
        if isinstance(node, SourceMapping):
            line = node.line
        step: str | int
        current: object = node
        for step in path:
            if isinstance(current, Mapping) and step in current:
                line = current.lines[str(step)] if isinstance(current, SourceMapping) else line
                current = current[step]
            elif isinstance(current, list) and isinstance(step, int) and step < len(current):
                line = current.lines[step] if isinstance(current, SourceSequence) else line
                current = current[step]
            else:
                return self.origin.line + line, False
        return self.origin.line + line, True


@dataclass(frozen=True, slots=True, eq=False)
class KubeObject:
    """One object, overlays already merged in. Identity is change: a store hands out the same instance until something about the
    object changed, so caches compare with ``is``. ``raw`` is never modified."""

    api_version: str
    kind: str
    namespace: str
    name: str
    raw: Mapping[str, object]
    layers: tuple[Layer, ...]
    """The user's document first, then the overlays in order."""
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    problems: tuple[SourceProblem, ...] = ()
    """Not empty: the object cannot be read as its kind, and no earlier version could. Only policies are handed on like this, so
    that they can be enforced closed; a policy that is silently missing would be an open door."""

    @property
    def key(self) -> ObjectKey:
        return ObjectKey(self.kind, self.namespace, self.name)

    @property
    def origin(self) -> Origin:
        return self.layers[0].origin

    @property
    def line(self) -> int:
        """The line the object starts at, 1-based."""
        return self.layers[0].line_of(())[0]

    @property
    def uid(self) -> str:
        """``metadata.uid``, or ``""``: files written by hand have none."""
        uid = self.metadata.get("uid")
        return uid if isinstance(uid, str) else ""

    @property
    def created(self) -> str:
        """``metadata.creationTimestamp`` (RFC 3339 in UTC sorts as text), or ``""``."""
        created = self.metadata.get("creationTimestamp")
        return created if isinstance(created, str) else ""

    @property
    def metadata(self) -> Mapping[str, object]:
        return mapping_at(self.raw, "metadata")

    @property
    def spec(self) -> Mapping[str, object]:
        return mapping_at(self.raw, "spec")

    @property
    def status(self) -> Mapping[str, object]:
        return mapping_at(self.raw, "status")

    def problem(self, path: FieldPath, message: str) -> SourceProblem:
        """A problem at a field: the line comes from the last document that sets the field, else from the nearest one above it."""
        for layer in reversed(self.layers):
            line, complete = layer.line_of(path)
            if complete:
                return SourceProblem(layer.origin.file, line, format_path(path), message)
        line, _ = self.layers[0].line_of(path)
        return SourceProblem(self.origin.file, line, format_path(path), message)


def mapping_at(parent: Mapping[str, object], key: str) -> Mapping[str, object]:
    """The mapping under ``key``, or an empty one."""
    value = parent.get(key)
    return value if isinstance(value, Mapping) else {}


def format_path(path: FieldPath) -> str:
    """``spec.containers[0].command``; a key that would read wrongly is quoted: ``metadata.labels["istio.io/rev"]``."""
    return "".join(_format_steps(path)).removeprefix(".")


def _format_steps(path: FieldPath) -> Iterator[str]:
    for step in path:
        if isinstance(step, int):
            yield f"[{step}]"
        elif step.replace("-", "").replace("_", "").isalnum():
            yield f".{step}"
        else:
            yield f'["{step}"]'


def by_age(objects: Sequence[KubeObject]) -> list[KubeObject]:
    """Oldest first, as Istio breaks ties; objects without a time (files have none) come after, then by namespace and name."""
    return sorted(objects, key=lambda o: (o.created == "", o.created, o.namespace, o.name))

"""Objects and what they say: one with mistakes keeps its last good version."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar

from mesh.kube.objects import KubeObject, ObjectKey, SourceProblem

_T = TypeVar("_T")

Reader: TypeAlias = Callable[[KubeObject], tuple[_T, tuple[SourceProblem, ...]]]


@dataclass(frozen=True, slots=True)
class Read(Generic[_T]):
    """An object and its reading."""

    obj: KubeObject
    value: _T
    """As the object is now, or its last good version where it has mistakes now."""
    problems: tuple[SourceProblem, ...]
    good: bool
    """Whether ``value`` is free of mistakes."""


def read_object(obj: KubeObject, reader: Reader[_T], last: Read[_T] | None) -> Read[_T]:
    """``last``: the reading before this one, of the same object."""
    value, problems = reader(obj)
    problems = tuple(dict.fromkeys((*obj.problems, *problems)))
    if problems and last is not None and last.good:
        return Read(obj, last.value, problems, True)
    return Read(obj, value, problems, not problems)


def read_objects(objects: Iterable[KubeObject], reader: Reader[_T], before: Mapping[ObjectKey, Read[_T]]) -> dict[ObjectKey, Read[_T]]:
    """All objects of a kind."""
    # By identity, since making and hashing ten thousand keys is most of what an unchanged object would cost.
    known = {read.obj: (key, read) for key, read in before.items()}
    result: dict[ObjectKey, Read[_T]] = {}
    for obj in objects:
        same = known.get(obj)
        key, read = same if same is not None else (obj.key, read_object(obj, reader, before.get(obj.key)))
        result[key] = read
    return result

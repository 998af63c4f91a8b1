"""Objects and what they say: one with mistakes keeps its last good version."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Generic, TypeAlias, TypeVar

from mesh.kube.fields import did_you_mean
from mesh.kube.objects import KubeObject, ObjectKey, SourceProblem
from mesh.model.labels import OWN_ANNOTATIONS, OWN_DOMAIN

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
    in_vain: tuple[SourceProblem, ...] = ()
    """What the object says besides, and nobody reads: its value is none the worse."""


_CLOSE: Final = 0.8
"""How alike annotations must be to be mistaken for each other: more than any two are by their common domain."""


def read_object(obj: KubeObject, reader: Reader[_T], last: Read[_T] | None) -> Read[_T]:
    """``last``: the reading before this one, of the same object."""
    value, problems = reader(obj)
    problems = tuple(dict.fromkeys((*obj.problems, *problems)))
    if problems and last is not None and last.good:
        return Read(obj, last.value, problems, True, find_unknown_names(obj))
    return Read(obj, value, problems, not problems, find_unknown_names(obj))


def find_unknown_names(obj: KubeObject) -> tuple[SourceProblem, ...]:
    """Labels and annotations of our own domain that there are not: misspelt, most often."""
    found: list[SourceProblem] = []
    for name in obj.annotations:
        if name.startswith(OWN_DOMAIN) and name not in OWN_ANNOTATIONS:
            hint = did_you_mean(name, OWN_ANNOTATIONS, closeness=_CLOSE)
            message = f"no effect: there is no such annotation{hint}"
            found.append(obj.problem(("metadata", "annotations", name), message))
    for name in obj.labels:
        if name.startswith(OWN_DOMAIN):
            message = "it is an annotation, no label" if name in OWN_ANNOTATIONS else "there is no such label"
            found.append(obj.problem(("metadata", "labels", name), f"no effect: {message}"))
    return tuple(found)


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

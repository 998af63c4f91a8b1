"""Reading fields of an object: every mistake becomes a problem that names file, line and field, and reading goes on."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from mesh.kube.objects import FieldPath, KubeObject, SourceProblem

_T = TypeVar("_T")


def describe(value: object) -> str:
    """What a reader of a message would call the value's type."""
    match value:
        case None:
            return "nothing"
        case bool():
            return f"a boolean ({str(value).lower()})"
        case int() | float():
            return f"a number ({value})"
        case str():
            return "a string"
        case list():
            return "a list"
        case Mapping():
            return "a mapping"
    return type(value).__name__


def did_you_mean(word: str, known: Collection[str], *, closeness: float = 0.6) -> str:
    """``; did you mean 'principals'?`` when a known word is close, else the known words. ``closeness``: from 0 to 1, as difflib has it."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=closeness)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f" (known: {', '.join(sorted(known))})" if known else ""


@dataclass(frozen=True, slots=True)
class Text:
    """What a text must be. ``find_mistake`` decides; ``schema`` is what OpenAPI can say of it, and never refuses what is right."""

    find_mistake: Callable[[str], str | None]
    schema: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Rule:
    """What fields must be to each other: for people, and in Kubernetes' CEL for its API server, where ``self`` is the mapping and
    ``field`` the one of it that is blamed."""

    message: str
    cel: str
    field: str


class Fields:
    """A mapping somewhere in an object. Readers return what is there or the default; problems go to ``problems``, shared by all
    readers of the object. ``null`` counts as absent, as Kubernetes has it, unless ``strict``: in a policy an empty ``from:`` is
    no restriction at all, and surely not what was meant.

    What is asked here is also what the kind's schema says (`mesh.kube.outline`): of a custom kind, ask for every field whatever the
    others are, and give demands as arguments rather than as code around them.
    """

    __slots__ = ("_object", "_path", "_values", "problems", "strict")

    def __init__(
        self,
        obj: KubeObject,
        path: FieldPath = (),
        values: Mapping[str, object] | None = None,
        problems: list[SourceProblem] | None = None,
        *,
        strict: bool = False,
    ) -> None:
        self._object = obj
        self._path = path
        self._values: Mapping[str, object] = obj.raw if values is None else values
        self.problems: list[SourceProblem] = [] if problems is None else problems
        self.strict = strict

    @property
    def whole(self) -> KubeObject:
        """The object this is a part of."""
        return self._object

    def __contains__(self, key: str) -> bool:
        return self._values.get(key) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __bool__(self) -> bool:
        return True

    def is_empty(self, key: str) -> bool:
        """Whether the list or mapping under ``key`` is there and has nothing in it."""
        value = self._values.get(key)
        return isinstance(value, list | dict) and not value

    def complain(self, key: str | int | None, message: str, *further: str | int) -> None:
        """Note a problem at ``key`` (None: at this mapping), or deeper with ``further``."""
        path = self._path if key is None else (*self._path, key, *further)
        self.problems.append(self._object.problem(path, message))

    def refuse_unknown(self, *known: str, hints: Mapping[str, str] | None = None) -> None:
        """A key that is not known is a problem: a typo in a policy must not leave out a restriction. ``hints``: what to say of a key
        instead of which is meant."""
        for key in self._values:
            if key not in known:
                self.complain(key, f"unknown field{(hints or {}).get(key) or did_you_mean(key, known)}")

    def require_one_of(self, *keys: str) -> None:
        """At least one of them has to be there."""
        if not any(key in self for key in keys):
            self.complain(None, f"{' or '.join(map(repr, keys))} is required")

    def demand(self, rule: Rule, broken: Iterable[FieldPath]) -> None:
        """``broken``: the paths from here at which the rule does not hold; none when it does."""
        for path in broken:
            self.complain(path[0], rule.message, *path[1:])

    def string(
        self, key: str, default: str = "", *, required: bool = False, choices: Collection[str] = (), text: Text | None = None
    ) -> str:
        bare = self._values.get(key)
        if text and isinstance(bare, int | float) and not isinstance(bare, bool) and (mistake := text.find_mistake(str(bare))):
            self.complain(key, mistake)  # quotes would not mend it
            return default
        value = self._take(key, str, "a string", required)
        if value is None:
            return default
        mistake = text.find_mistake(value) if text else None
        if mistake:
            self.complain(key, mistake)
        if choices and value not in choices:
            self.complain(key, f"expected one of {', '.join(choices)}, found '{value}'{self._hint(value, choices)}")
            return default
        return value

    def integer(self, key: str, default: int = 0, *, required: bool = False, low: int | None = None, high: int | None = None) -> int:
        value = self._take(key, int, "a whole number", required)
        if value is None:
            return default
        if (low is not None and value < low) or (high is not None and value > high):
            self.complain(key, f"expected a number from {low} to {high}, found {value}")
            return default
        return value

    def number(self, key: str, default: float = 0.0, *, low: float, high: float) -> float:
        """A finite number, whole or not."""
        value = self._values.get(key)
        if value is None:
            return self._take(key, float, "a number", False) or default
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.complain(key, f"expected a number, found {describe(value)}")
            return default
        if not low <= value <= high:  # nor is NaN
            self.complain(key, f"expected a number from {low:g} to {high:g}, found {value}")
            return default
        return float(value)

    def boolean(self, key: str, default: bool = False) -> bool:
        value = self._take(key, bool, "true or false", False)
        return default if value is None else value

    def number_or_string(self, key: str) -> int | str | None:
        """Kubernetes' IntOrString; absent gives None."""
        value = self._values.get(key)
        if value is None or (isinstance(value, int | str) and not isinstance(value, bool)):
            return value
        self.complain(key, f"expected a number or a string, found {describe(value)}")
        return None

    def mapping(self, key: str, *, required: bool = False, empty: str = "") -> Fields | None:
        """``empty``: the complaint when nothing is in it; ``""`` where that is no mistake."""
        value = self._take(key, dict, "a mapping", required)
        if value is None:
            return None
        if empty and not value:
            self.complain(key, empty)
        return self._child((*self._path, key), value)

    def mappings(self, key: str, *, required: bool = False, empty: str = "", most: int | None = None) -> tuple[Fields, ...]:
        """The list of mappings under ``key``; items that are no mappings are problems and left out. ``empty`` as for `mapping`."""
        result: list[Fields] = []
        for index, item in enumerate(self._take_list(key, required, empty, most)):
            if isinstance(item, dict):
                result.append(self._child((*self._path, key, index), item))
            else:
                self.complain(key, f"expected a mapping, found {describe(item)}", index)
        return tuple(result)

    def strings(
        self, key: str, *, required: bool = False, empty: str = "", most: int | None = None, text: Text | None = None
    ) -> tuple[str, ...]:
        """The list of strings under ``key``; items that are no strings are problems and left out. ``empty`` as for `mapping`."""
        result: list[str] = []
        for index, item in enumerate(self._take_list(key, required, empty, most)):
            if isinstance(item, str):
                result.append(item)
                mistake = text.find_mistake(item) if text else None
                if mistake:
                    self.complain(key, mistake, index)
            else:
                quote = "; put it in quotes" if isinstance(item, bool | int | float) else ""
                self.complain(key, f"expected a string, found {describe(item)}{quote}", index)
        return tuple(result)

    def integers(self, key: str, *, low: int, high: int) -> tuple[int, ...]:
        """The list of whole numbers under ``key``; items that are none, or out of range, are problems and left out."""
        result: list[int] = []
        for index, item in enumerate(self._take_list(key, False, "", None)):
            if not isinstance(item, int) or isinstance(item, bool):
                self.complain(key, f"expected a whole number, found {describe(item)}", index)
            elif not low <= item <= high:
                self.complain(key, f"expected a number from {low} to {high}, found {item}", index)
            else:
                result.append(item)
        return tuple(result)

    def string_map(self, key: str) -> dict[str, str]:
        """The mapping of strings to strings under ``key``, as labels and selectors are."""
        value = self._take(key, dict, "a mapping", False)
        result: dict[str, str] = {}
        for name, item in (value or {}).items():
            if isinstance(item, str):
                result[name] = item
            elif item is not None or self.strict:
                quote = "; put it in quotes" if isinstance(item, bool | int | float) else ""
                self.complain(key, f"expected a string, found {describe(item)}{quote}", name)
            else:
                result[name] = ""
        return result

    def integer_map(self, key: str, *, low: int, high: int) -> dict[str, int]:
        """The mapping of strings to whole numbers under ``key``."""
        found = self.mapping(key)
        return {name: found.integer(name, low=low, high=high) for name in found} if found else {}

    def map_of(self, key: str, names: Text, read: Callable[[Fields], _T], *, most: int) -> dict[str, _T]:
        """The mapping under ``key`` whose values are mappings, each read by ``read``; those with a mistake in the name are left out. An
        API server knows of ``names`` what their pattern says; without one it takes any."""
        found = self.mapping(key)
        result: dict[str, _T] = {}
        if found is not None and len(found) > most:
            self.complain(key, f"has {len(found)} entries, of at most {most}")
        for name in found or ():
            assert found is not None
            mistake = names.find_mistake(name)
            if mistake:
                found.complain(name, mistake)
            elif (value := found.mapping(name)) is not None:
                result[name] = read(value)
        return result

    def _child(self, path: FieldPath, values: Mapping[str, object]) -> Fields:
        return Fields(self._object, path, values, self.problems, strict=self.strict)

    def _take_list(self, key: str, required: bool, empty: str, most: int | None) -> list[object]:
        value = self._take(key, list, "a list", required)
        if value is None:
            return []
        if empty and not value:
            self.complain(key, empty)
        if most is not None and len(value) > most:
            self.complain(key, f"has {len(value)} items, of at most {most}")
        return value

    def _take(self, key: str, kind: type[_T], what: str, required: bool) -> _T | None:
        value = self._values.get(key)
        if value is None:
            if required:
                self.complain(key if key in self._values else None, f"'{key}' is required")
            elif self.strict and key in self._values:
                self.complain(key, f"is empty: expected {what}, or leave '{key}' out")
            return None
        if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
            return value
        quote = "; put it in quotes" if kind is str and isinstance(value, bool | int | float) else ""
        self.complain(key, f"expected {what}, found {describe(value)}{quote}")
        return None

    @staticmethod
    def _hint(value: str, choices: Collection[str]) -> str:
        close = difflib.get_close_matches(value.upper(), choices, n=1)
        return f"; did you mean '{close[0]}'?" if close else ""

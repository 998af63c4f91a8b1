"""The OpenAPI schema of a kind, found by letting its parser ask for every field and writing down what it asks.

So a schema and the parser behind it cannot disagree. What a parser decides by code of its own the schema does not know: it is the wider
of the two, and what only the parser refuses is told in the object's status.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Final, TypeAlias, TypeVar

from mesh.kube.fields import Fields, Rule, Text
from mesh.kube.objects import FieldPath, KubeObject

_T = TypeVar("_T")

Schema: TypeAlias = dict[str, Any]
"""As in a CustomResourceDefinition: structural OpenAPI v3."""

_KEEP_UNKNOWN: Final = "x-kubernetes-preserve-unknown-fields"
_NOTHING: Final = KubeObject("", "", "", "", {}, ())


class Outline(Fields):
    """Answers as if nothing were given, and remembers the questions."""

    __slots__ = ("_closed", "_one_of", "_properties", "_required", "_rules", "_smallest")

    def __init__(self, *, strict: bool = False) -> None:
        super().__init__(_NOTHING, strict=strict)
        self._properties: dict[str, Callable[[], Schema]] = {}
        self._required: list[str] = []
        self._one_of: list[str] = []
        self._rules: list[Rule] = []
        self._closed = False
        self._smallest = 0

    def schema(self) -> Schema:
        """Of the mapping, from what was asked so far."""
        result: Schema = {"type": "object"}
        if self._properties:
            result["properties"] = {key: make() for key, make in sorted(self._properties.items())}
        if self._required:
            result["required"] = self._required
        if self._one_of:
            result["anyOf"] = [{"required": [key]} for key in self._one_of]
        if self._smallest:
            result["minProperties"] = self._smallest
        if not self._closed:
            result[_KEEP_UNKNOWN] = True
        if self._rules:
            result["x-kubernetes-validations"] = [
                {"message": rule.message, "rule": rule.cel, "fieldPath": f".{rule.field}"} for rule in self._rules
            ]
        return result

    # Questions

    def complain(self, key: str | int | None, message: str, *further: str | int) -> None:
        """Nothing was given, so nothing is wrong."""

    def refuse_unknown(self, *known: str, hints: Mapping[str, str] | None = None) -> None:
        self._closed = True

    def require_one_of(self, *keys: str) -> None:
        self._one_of += keys

    def demand(self, rule: Rule, broken: Iterable[FieldPath]) -> None:
        self._rules.append(rule)

    def string(
        self, key: str, default: str = "", *, required: bool = False, choices: Collection[str] = (), text: Text | None = None
    ) -> str:
        self._note(key, lambda: {**_string(text), **({"enum": list(choices)} if choices else {})}, required)
        return default

    def integer(self, key: str, default: int = 0, *, required: bool = False, low: int | None = None, high: int | None = None) -> int:
        self._note(key, lambda: _integer(low, high), required)
        return default

    def number(self, key: str, default: float = 0.0, *, low: float, high: float) -> float:
        self._note(key, lambda: {"type": "number", "minimum": low, "maximum": high})
        return default

    def boolean(self, key: str, default: bool = False) -> bool:
        self._note(key, lambda: {"type": "boolean"})
        return default

    def number_or_string(self, key: str) -> int | str | None:
        self._note(key, lambda: {"x-kubernetes-int-or-string": True})
        return None

    def mapping(self, key: str, *, required: bool = False, empty: str = "") -> Outline:
        child = self._make_child(empty)
        self._note(key, child.schema, required)
        return child

    def mappings(self, key: str, *, required: bool = False, empty: str = "", most: int | None = None) -> tuple[Fields, ...]:
        child = self._make_child()
        self._note(key, lambda: _array(child.schema(), empty, most), required)
        return (child,)

    def strings(
        self, key: str, *, required: bool = False, empty: str = "", most: int | None = None, text: Text | None = None
    ) -> tuple[str, ...]:
        self._note(key, lambda: _array(_string(text), empty, most), required)
        return ()

    def integers(self, key: str, *, low: int, high: int) -> tuple[int, ...]:
        self._note(key, lambda: _array(_integer(low, high), "", None))
        return ()

    def string_map(self, key: str) -> dict[str, str]:
        self._note(key, lambda: {"type": "object", "additionalProperties": {"type": "string"}})
        return {}

    def integer_map(self, key: str, *, low: int, high: int) -> dict[str, int]:
        self._note(key, lambda: {"type": "object", "additionalProperties": _integer(low, high)})
        return {}

    def map_of(self, key: str, names: Text, read: Callable[[Fields], _T], *, most: int) -> dict[str, _T]:
        child = self._make_child()
        read(child)
        limits: Schema = {"maxProperties": most}
        if "pattern" in names.schema:
            # Structural schemas have no word for what a key must look like.
            rule = f"self.all(key, key.matches('{names.schema['pattern']}'))"
            limits["x-kubernetes-validations"] = [{"message": "a name here is not of the form it must have", "rule": rule}]
        self._note(key, lambda: {"type": "object", "additionalProperties": {**child.schema(), **self._nullable}, **limits})
        return {}

    @property
    def _nullable(self) -> Schema:
        """API servers drop a null that is not nullable, and with it what its author meant to restrict. No rule of theirs could refuse it
        either: to CEL it is absent. So where it matters it is kept, for the parser to refuse."""
        return {"nullable": True} if self.strict else {}

    def _make_child(self, empty: str = "") -> Outline:
        child = Outline(strict=self.strict)
        child._smallest = 1 if empty else 0
        return child

    def _note(self, key: str, make: Callable[[], Schema], required: bool = False) -> None:
        assert key not in self._properties, f"{key} is asked for twice"
        self._properties[key] = lambda: {**make(), **self._nullable}
        if required:
            self._required.append(key)


def _string(text: Text | None) -> Schema:
    return {"type": "string", **(text.schema if text else {})}


def _integer(low: int | None, high: int | None) -> Schema:
    limits = {"minimum": low, "maximum": high}
    return {"type": "integer", **{name: limit for name, limit in limits.items() if limit is not None}}


def _array(items: Schema, empty: str, most: int | None) -> Schema:
    result: Schema = {"type": "array", "items": items}
    if empty:
        result["minItems"] = 1
    if most is not None:
        result["maxItems"] = most
    return result

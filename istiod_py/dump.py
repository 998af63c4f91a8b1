"""The model's values as JSON for ``/debug/config_dump``: what is at its default is left out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from enum import Enum
from typing import Any

import msgspec


def describe(value: object) -> Any:
    """Dataclasses and structs as objects, enums by name, addresses and names as text, mappings sorted by key."""
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, str | int | float | bool | None):
        return value
    if isinstance(value, Mapping):
        return {str(key): describe(item) for key, item in sorted(value.items(), key=lambda entry: str(entry[0]))}
    if type(value).__str__ is not object.__str__:
        return str(value)  # addresses, CIDRs, SPIFFE IDs, service names: their text is what users know
    if dataclasses.is_dataclass(value) or isinstance(value, msgspec.Struct):
        fields = msgspec.structs.fields(value) if isinstance(value, msgspec.Struct) else dataclasses.fields(value)
        return {field.name: describe(getattr(value, field.name)) for field in fields if getattr(value, field.name) != _default(field)}
    if isinstance(value, tuple | list | frozenset):
        return [describe(item) for item in value]
    return str(value)


def _default(field: dataclasses.Field[Any] | msgspec.structs.FieldInfo) -> object:
    return field.default_factory() if callable(field.default_factory) else field.default

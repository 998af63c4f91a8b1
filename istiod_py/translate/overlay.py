"""Kubernetes' strategic merge, as far as a Gateway's deployment needs it: mappings merge, some lists merge by a key, the rest replaces.

Facts: Kubernetes' API conventions, "strategic merge patch"; the keys are those of the types' ``patchMergeKey``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

Object = dict[str, Any]

_KEYS: Final[Mapping[str, str]] = {
    "containers": "name",
    "initContainers": "name",
    "env": "name",
    "volumes": "name",
    "volumeMounts": "mountPath",
    "volumeDevices": "devicePath",
    "imagePullSecrets": "name",
    "hostAliases": "ip",
    "topologySpreadConstraints": "topologyKey",
    "conditions": "type",
}
"""The field that tells the items of a list apart, by the list's name."""
_PORT_KEYS: Final = ("containerPort", "port")
_DIRECTIVE: Final = "$patch"


class BadPatch(ValueError):
    """The patch can't be merged; the text says where."""


def merge(base: Object, patch: Mapping[str, Any]) -> Object:
    """``base`` with the patch on it; neither is changed. ``null`` removes, as does ``$patch: delete``; ``$patch: replace`` merges nothing.
    Raises BadPatch."""
    return _merge(base, patch, "")


def _merge(base: Mapping[str, Any], patch: Mapping[str, Any], path: str) -> Object:
    if patch.get(_DIRECTIVE) == "replace":
        return {key: value for key, value in patch.items() if key != _DIRECTIVE}
    merged = dict(base)
    for key, value in patch.items():
        if key == _DIRECTIVE:
            continue
        where = f"{path}.{key}" if path else key
        if value is None or (isinstance(value, Mapping) and value.get(_DIRECTIVE) == "delete"):
            merged.pop(key, None)
        elif isinstance(value, Mapping):
            before = merged.get(key)
            merged[key] = _merge(before if isinstance(before, Mapping) else {}, value, where)
        elif isinstance(value, list):
            before = merged.get(key)
            merged[key] = _merge_lists(key, before if isinstance(before, list) else [], value, where)
        else:
            merged[key] = value
    return merged


def _merge_lists(name: str, base: list[Any], patch: list[Any], path: str) -> list[Any]:
    key = _key_of(name, [*base, *patch])
    if key is None:
        return list(patch)
    if any(isinstance(item, Mapping) and item.get(_DIRECTIVE) == "replace" and len(item) == 1 for item in patch):
        return [item for item in patch if not (isinstance(item, Mapping) and item.get(_DIRECTIVE) == "replace" and len(item) == 1)]
    merged = {item[key]: item for item in base}
    fresh: dict[Any, Object] = {}
    for index, item in enumerate(patch):
        if not isinstance(item, Mapping) or not isinstance(item.get(key), str | int):
            raise BadPatch(f"{path}[{index}]: '{key}' is required: it tells which item is meant")
        identity = item[key]
        if item.get(_DIRECTIVE) == "delete":
            merged.pop(identity, None)
        elif identity in merged:
            merged[identity] = _merge(merged[identity], item, f"{path}[{index}]")
        else:
            fresh[identity] = _merge({}, item, f"{path}[{index}]")
    # As API servers have it: what a patch adds stands first.
    return [*fresh.values(), *merged.values()]


def _key_of(name: str, items: list[Any]) -> str | None:
    if name == "ports":
        return next((key for key in _PORT_KEYS if any(isinstance(item, Mapping) and key in item for item in items)), None)
    return _KEYS.get(name)

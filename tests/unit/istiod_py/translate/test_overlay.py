"""Kubernetes' strategic merge, where people's overlays of a deployment need it."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from istiod_py.translate.overlay import BadPatch, merge

BASE: dict[str, Any] = {
    "metadata": {"labels": {"a": "1", "b": "2"}},
    "spec": {
        "containers": [{"name": "x", "image": "i", "env": [{"name": "A", "value": "1"}], "args": ["a"], "ports": [{"containerPort": 1}]}],
        "volumes": [{"name": "v", "emptyDir": {}}],
        "ports": [{"name": "status", "port": 15021}, {"name": "mesh", "port": 15008}],
        "tolerations": [{"key": "a"}],
    },
}


def container(**changes: Any) -> dict[str, Any]:
    return {"spec": {"containers": [{"name": "x", **changes}]}}


@pytest.mark.parametrize(("patch", "path", "expected"), [
    ({"metadata": {"labels": {"c": "3"}}}, ("metadata", "labels"), {"a": "1", "b": "2", "c": "3"}),
    ({"metadata": {"labels": {"a": None}}}, ("metadata", "labels"), {"b": "2"}),
    ({"metadata": {"labels": {"$patch": "replace", "z": "9"}}}, ("metadata", "labels"), {"z": "9"}),
    ({"metadata": {"labels": {"$patch": "delete"}}}, ("metadata",), {}),
    ({"spec": {"replicas": 3}}, ("spec", "replicas"), 3),
    (container(image="j"), ("spec", "containers", 0, "image"), "j"),
    (container(image="j"), ("spec", "containers", 0, "args"), ["a"]),
    (container(args=["b", "c"]), ("spec", "containers", 0, "args"), ["b", "c"]),
    (container(env=[{"name": "A", "value": "2"}]), ("spec", "containers", 0, "env"), [{"name": "A", "value": "2"}]),
    (
        container(env=[{"name": "B", "value": "2"}]),
        ("spec", "containers", 0, "env"),
        [{"name": "B", "value": "2"}, {"name": "A", "value": "1"}],
    ),
    (container(env=[{"name": "A", "$patch": "delete"}]), ("spec", "containers", 0, "env"), []),
    (container(env=[{"$patch": "replace"}, {"name": "C"}]), ("spec", "containers", 0, "env"), [{"name": "C"}]),
    (container(ports=[{"containerPort": 1, "name": "p"}]), ("spec", "containers", 0, "ports"), [{"containerPort": 1, "name": "p"}]),
    ({"spec": {"ports": [{"port": 15008, "nodePort": 9}]}}, ("spec", "ports", 1), {"name": "mesh", "port": 15008, "nodePort": 9}),
    ({"spec": {"tolerations": [{"key": "b"}]}}, ("spec", "tolerations"), [{"key": "b"}]),
    ({"spec": {"volumes": [{"name": "w"}]}}, ("spec", "volumes"), [{"name": "w"}, {"name": "v", "emptyDir": {}}]),
])  # fmt: skip
def test_mappings_merge_some_lists_merge_by_a_key_and_the_rest_is_replaced(
    patch: dict[str, Any], path: tuple[str | int, ...], expected: object
) -> None:
    before = copy.deepcopy(BASE)
    found: Any = merge(BASE, patch)
    for step in path:
        found = found[step]
    assert found == expected
    assert before == BASE


@pytest.mark.parametrize("item", [{"image": "j"}, {"name": None}, "x"])
def test_an_item_that_does_not_say_which_it_is_cannot_be_merged(item: Any) -> None:
    with pytest.raises(BadPatch, match=r"spec.containers\[0\]: 'name' is required"):
        merge(BASE, {"spec": {"containers": [item]}})

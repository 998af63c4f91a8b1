"""A ConfigMap: texts by key. Certificates of authorities are in some, and the mesh's own configuration in one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mesh.kube.fields import Fields
from mesh.kube.objects import KubeObject, SourceProblem


@dataclass(frozen=True, slots=True)
class KubeConfigMap:
    namespace: str
    name: str
    data: Mapping[str, str]


def read_config_map(obj: KubeObject) -> tuple[KubeConfigMap, tuple[SourceProblem, ...]]:
    """The map and every mistake in it."""
    fields = Fields(obj)
    config_map = KubeConfigMap(obj.namespace, obj.name, fields.string_map("data"))
    fields.mapping("binaryData")
    return config_map, tuple(fields.problems)

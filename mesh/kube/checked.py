"""From a decoded object to a `KubeObject` with every mistake in it found: the same for every source of objects."""

from __future__ import annotations

from collections.abc import Mapping

from mesh.kube.fields import Fields
from mesh.kube.kinds import KINDS
from mesh.kube.objects import KubeObject, Layer, ObjectKey


def check_object(api_version: str, key: ObjectKey, raw: Mapping[str, object], layers: tuple[Layer, ...]) -> KubeObject:
    """``raw`` is the layers merged. Its ``problems`` are those of metadata and of its kind's structure."""
    kind_name, namespace, name = key
    draft = KubeObject(api_version, kind_name, namespace, name, raw, layers)
    fields = Fields(draft)
    metadata = fields.mapping("metadata")
    labels = metadata.string_map("labels") if metadata else {}
    annotations = metadata.string_map("annotations") if metadata else {}
    if metadata:
        metadata.string("uid")
        metadata.string("creationTimestamp")
    problems = (*fields.problems, *KINDS[kind_name].check(draft))
    return KubeObject(api_version, kind_name, namespace, name, raw, layers, labels, annotations, problems)

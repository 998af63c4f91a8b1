"""What agents are told of objects."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from istiod_py.snapshot import diff
from istiod_py.translate import Config, Translation, translate
from mesh.kube.directory import DirectoryStore
from mesh.kube.objects import KubeObject
from mesh.xds.cache import ResourceCache
from mesh.xds.names import ADDRESS, AUTHORIZATION
from mesh.xds.proto.workload_pb2 import Address

CONFIG: Final = Config(root_namespace="corpus-root")
OURS: Final = "corpus-"
"""Namespaces of the corpus begin so: an API server has more."""


def make_messages(objects: Sequence[KubeObject]) -> dict[str, bytes]:
    """The messages of the corpus's namespaces as they go to agents, and conditions as they go to objects, by kind and name."""
    cache = ResourceCache()
    translation = translate(objects, None, CONFIG)
    cache.apply(diff(Translation(), translation))
    found = {f"condition {key}": repr(conditions).encode() for key, conditions in translation.statuses.items()}
    for resource in cache.all(ADDRESS):
        address = Address.FromString(resource.body)
        kind = str(address.WhichOneof("type"))
        if getattr(address, kind).namespace.startswith(OURS):
            found[f"{kind} {resource.name}"] = resource.body
    found |= {f"policy {each.name}": each.body for each in cache.all(AUTHORIZATION) if each.name.startswith(OURS)}
    return found


def load_directory(*files: Path) -> list[KubeObject]:
    """The files as a source of their own. Raises AssertionError if there is a mistake in them."""
    with tempfile.TemporaryDirectory() as directory:
        for file in files:
            Path(directory, file.name).write_text(file.read_text())
        store = DirectoryStore([Path(directory)])
        store.load()
        assert store.problems == (), store.problems
        return store.objects()

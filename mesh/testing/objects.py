"""Kubernetes objects for tests, written as YAML."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

from mesh.kube.directory import IMPLICIT_NAMESPACES, DirectoryStore
from mesh.kube.objects import KubeObject, SourceProblem


def objects_from_yaml(text: str, namespaces: Iterable[str] = ("shop",)) -> tuple[list[KubeObject], tuple[SourceProblem, ...]]:
    """The objects of a directory with ``objects.yaml`` alone, and its problems. ``namespaces`` need no Namespace object."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "objects.yaml").write_text(text, encoding="utf-8")
        store = DirectoryStore([Path(directory)], implicit_namespaces=IMPLICIT_NAMESPACES | frozenset(namespaces))
        store.load()
        return store.objects(), store.problems

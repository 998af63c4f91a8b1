"""The objects of an installation: the YAML of ``deploy/``, which travels in the distribution, put together as kustomize does it.

Only what our own kustomizations use is understood; anything else is an error, and a test reads them all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any, Final

from mesh.kube.documents import parse_chunk, split_documents

IMAGE: Final = "ambient-mesh"
"""The name by which manifests call the project's image."""
PART_OF: Final = "app.kubernetes.io/part-of"
PROJECT: Final = "ambient-mesh"
"""Value of `PART_OF` on every object of ours."""
CRD_KIND: Final = "CustomResourceDefinition"
CRDS: Final = "crds"
_UNDERSTOOD: Final = frozenset({"apiVersion", "kind", "resources", "images", "labels"})

Object = dict[str, Any]
"""A Kubernetes object as JSON."""


class BrokenManifest(Exception):
    """A defect of the distribution."""


@dataclass(frozen=True, slots=True)
class Manifests:
    """``objects`` in the order of the files, labelled as ours; containers with our image have `IMAGE` without a tag."""

    objects: tuple[Object, ...]
    tag: str
    """Of the image that this version is meant to run with."""


def load_manifests(root: Traversable | None = None) -> Manifests:
    """``root`` None: what travels in the distribution. Raises BrokenManifest."""
    root = root if root is not None else files("meshctl_py") / "manifests"
    top = _kustomization(root)
    objects = list(_objects(root, top))
    if not any(obj["kind"] == CRD_KIND for obj in objects) and (root / CRDS / "kustomization.yaml").is_file():
        objects += _objects(root / CRDS, _kustomization(root / CRDS))
    for obj in objects:
        obj["metadata"].setdefault("labels", {})[PART_OF] = PROJECT
    tags = [image.get("newTag", "") for image in top.get("images", ()) if image.get("name") == IMAGE]
    return Manifests(tuple(objects), str(tags[0]) if tags else "")


def _kustomization(directory: Traversable) -> Mapping[str, Any]:
    (found,) = _documents(directory / "kustomization.yaml")
    unknown = found.keys() - _UNDERSTOOD
    if unknown:
        raise BrokenManifest(f"{directory}/kustomization.yaml: {sorted(unknown)[0]} is not understood")
    labels = found.get("labels", [])
    if any(entry.keys() != {"pairs"} or entry["pairs"] != {PART_OF: PROJECT} for entry in labels):
        raise BrokenManifest(f"{directory}/kustomization.yaml: labels other than {PART_OF} are not understood")
    return found


def _objects(directory: Traversable, kustomization: Mapping[str, Any]) -> Iterator[Object]:
    for name in kustomization.get("resources", ()):
        place = directory / name
        if place.is_dir():
            yield from _objects(place, _kustomization(place))
        else:
            yield from _documents(place)


def _documents(file: Traversable) -> Iterator[Object]:
    for chunk in split_documents(file.read_text(encoding="utf-8")):
        for value in parse_chunk(chunk):
            if not isinstance(value, Mapping):
                raise BrokenManifest(f"{file}: not a mapping")
            yield plain(value)


def plain(value: Any) -> Any:
    """Parsed YAML as dicts and lists that can be changed and encoded."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value

"""Manifests that several tests hold against each other: what parsers, schemas and API servers make of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ruamel.yaml import YAML

from mesh.kube.resources import RESOURCES

HOME: Final = Path(__file__).parent
MESH: Final = HOME / "mesh.yaml"
EXAMPLES: Final = HOME.parents[1] / "examples"


@dataclass(frozen=True)
class Mistake:
    """An object with a mistake at ``field``; ``api_field``: the path in an API server's refusal, ``""`` where it takes the object."""

    kind: str
    spec: Any
    field: str
    api_field: str

    @property
    def manifest(self) -> dict[str, Any]:
        head = {"apiVersion": RESOURCES[self.kind].api_version, "kind": self.kind}
        return {**head, "metadata": {"name": "mistaken", "namespace": "shop"}, "spec": self.spec}

    def __str__(self) -> str:
        return f"{self.kind} {self.spec}"


def read_mistakes() -> list[Mistake]:
    by_kind = YAML(typ="safe", pure=True).load((HOME / "mistakes.yaml").read_text())
    return [
        Mistake(kind, item["spec"], item["field"], "" if item.get("by") == "parser" else item.get("api", item["field"]))
        for kind, items in by_kind.items()
        for item in items
    ]


def read_manifests(*paths: Path) -> list[dict[str, Any]]:
    """The objects of files."""
    return [found for path in paths for found in YAML(typ="safe", pure=True).load_all(path.read_text()) if found]

"""The manifests that travel in the distribution are those of deploy/, whole, and nothing in them is passed over."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from meshctl_py.cluster.manifests import PART_OF, PROJECT, BrokenManifest, load_manifests

ROOT = Path(__file__).parents[4]
TOP = "kind: Kustomization\nresources: [a.yaml, part]\nimages: [{name: ambient-mesh, newTag: '7'}]\n"


def test_everything_that_is_installed_travels_in_the_distribution() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["meshctl_py"]
    packed = {path for pattern in patterns for path in (ROOT / "meshctl_py").glob(pattern)}
    read = {path for directory in ("", "control-plane", "daemonset", "crds") for path in (ROOT / "deploy" / directory).glob("*.yaml")}
    assert {path.resolve() for path in packed} == read
    named = {(obj["kind"], obj["metadata"]["name"]) for obj in load_manifests().objects}
    assert named >= {("Namespace", "istio-system"), ("Deployment", "istiod"), ("DaemonSet", "ztunnel")}


def test_all_objects_are_labelled_as_ours() -> None:
    assert all(obj["metadata"]["labels"][PART_OF] == PROJECT for obj in load_manifests().objects)


def lay_out(path: Path, top: str = TOP, part: str = "kind: Kustomization\nresources: [b.yaml]\n") -> Path:
    (path / "part").mkdir()
    (path / "kustomization.yaml").write_text(top)
    (path / "a.yaml").write_text("kind: A\nmetadata: {name: a}\n---\nkind: A\nmetadata: {name: c}\n")
    (path / "part" / "kustomization.yaml").write_text(part)
    (path / "part" / "b.yaml").write_text("kind: B\nmetadata: {name: b, labels: {x: y}}\n")
    return path


def test_files_and_directories_are_read_in_the_order_they_are_named(tmp_path: Path) -> None:
    found = load_manifests(lay_out(tmp_path))
    assert [obj["metadata"]["name"] for obj in found.objects] == ["a", "c", "b"]
    assert found.tag == "7"
    assert found.objects[2]["metadata"]["labels"] == {"x": "y", PART_OF: PROJECT}


def test_definitions_beside_the_kustomization_are_installed_too(tmp_path: Path) -> None:
    lay_out(tmp_path)
    (tmp_path / "crds").mkdir()
    (tmp_path / "crds" / "kustomization.yaml").write_text("kind: Kustomization\nresources: [c.yaml]\n")
    (tmp_path / "crds" / "c.yaml").write_text("kind: CustomResourceDefinition\nmetadata: {name: crd}\n")
    assert load_manifests(tmp_path).objects[-1]["metadata"]["name"] == "crd"


@pytest.mark.parametrize("extra", ["patches: []", "labels: [{pairs: {a: b}}]", "labels: [{pairs: {}, includeSelectors: true}]"])
def test_what_kustomize_would_do_and_we_do_not_is_an_error(tmp_path: Path, extra: str) -> None:
    with pytest.raises(BrokenManifest, match="not understood"):
        load_manifests(lay_out(tmp_path, part=f"kind: Kustomization\nresources: [b.yaml]\n{extra}\n"))

"""``meshctl label`` says what kubectl says."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from meshctl_py.__main__ import main

YAML = """\
# the shop
apiVersion: v1
kind: Namespace
metadata:
  name: shop  # sells coffee
  labels:
    tier: gold
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop}
spec: {containers: [{name: a}]}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec: {ports: [{port: 80}]}
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "shop.yaml").write_text(YAML)
    return tmp_path


def label(source: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["label", *arguments, "-f", str(source)])


def test_a_namespace_is_labelled_and_its_comments_stay(source: Path) -> None:
    result = label(source, "namespace", "shop", "istio.io/dataplane-mode=ambient")
    assert (result.output, result.exit_code) == ("namespace/shop labeled\n", 0)
    text = (source / "shop.yaml").read_text()
    assert "istio.io/dataplane-mode: ambient\n" in text
    assert "# the shop\n" in text
    assert "name: shop  # sells coffee\n" in text


def test_a_mode_that_means_nothing_is_warned_of(source: Path) -> None:
    result = label(source, "namespace", "shop", "istio.io/dataplane-mode=ambeint")
    warning = "warning: istio.io/dataplane-mode=ambeint is neither ambient nor none, so it means nothing"
    assert (result.output.splitlines(), result.exit_code) == (["namespace/shop labeled", warning], 0)


def test_the_same_label_again_changes_nothing(source: Path) -> None:
    assert label(source, "ns", "shop", "tier=gold").output == "namespace/shop not labeled\n"
    assert (source / "shop.yaml").read_text() == YAML


def test_another_value_needs_overwrite(source: Path) -> None:
    result = label(source, "namespace", "shop", "tier=silver")
    assert result.exit_code == 1
    assert "'tier' already has a value (gold), and --overwrite is false" in result.output
    assert (source / "shop.yaml").read_text() == YAML
    assert label(source, "namespace", "shop", "tier=silver", "--overwrite").output == "namespace/shop labeled\n"


def test_a_label_is_removed(source: Path) -> None:
    assert label(source, "namespace", "shop", "tier-").output == "namespace/shop unlabeled\n"
    assert "tier" not in (source / "shop.yaml").read_text()
    assert label(source, "namespace", "shop", "tier-").output == 'label "tier" not found.\nnamespace/shop not labeled\n'


def test_a_service_is_labelled_and_the_pod_of_its_name_is_not(source: Path) -> None:
    assert label(source, "svc", "web", "-n", "shop", "istio.io/use-waypoint=none").output == "service/web labeled\n"
    text = (source / "shop.yaml").read_text()
    assert text.count("use-waypoint") == 1
    assert "use-waypoint" in text.partition("kind: Service")[2]
    assert "there is no Service default/web" in label(source, "service/web", "a=b").output


def test_a_pod_is_found_in_its_namespace(source: Path) -> None:
    assert label(source, "pod", "web", "-n", "shop", "a=b").output == "pod/web labeled\n"
    result = label(source, "pod", "web", "a=b")
    assert result.exit_code == 1
    assert "there is no Pod default/web" in result.output
    assert "there is one in namespace shop (-n)" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("namespace", "shop", "nonsense"), "'nonsense' is neither KEY=VALUE nor KEY-"),
        (("namespace", "shop", "a=b", "a-"), "label 'a' is given twice"),
        (("namespace", "shp", "a=b"), "did you mean 'shop'?"),
        (("namespace", "shop", "a=b c"), "'b c'"),
    ],
)
def test_mistakes_are_explained_and_nothing_is_written(source: Path, arguments: tuple[str, ...], message: str) -> None:
    result = label(source, *arguments)
    assert result.exit_code != 0
    assert message in result.output
    assert (source / "shop.yaml").read_text() == YAML


def test_a_directory_that_is_not_there_is_not_searched(tmp_path: Path) -> None:
    result = label(tmp_path / "nowhere", "namespace", "shop", "a=b")
    assert "does not exist" in result.output

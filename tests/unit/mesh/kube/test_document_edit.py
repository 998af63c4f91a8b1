"""Taking an object out of the user's YAML leaves every other byte as it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from mesh.kube.document_edit import EditError, remove_object
from mesh.kube.objects import ObjectKey

WAYPOINT = ObjectKey("Gateway", "shop", "waypoint")
FIRST = "# the shop\napiVersion: v1\nkind: Namespace\nmetadata: {name: shop}   # sells coffee\n"
GATEWAY = "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata:\n  name: waypoint\n  namespace: shop\n"
LAST = "kind:   Service\nmetadata: {name: waypoint, namespace: shop}\n"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((FIRST, GATEWAY, LAST), (FIRST, LAST)),
        ((GATEWAY, FIRST, LAST), (FIRST, LAST)),
        ((FIRST, LAST, GATEWAY), (FIRST, LAST)),
    ],
    ids=["between", "first", "last"],
)
def test_its_document_goes(tmp_path: Path, before: tuple[str, ...], after: tuple[str, ...]) -> None:
    file = tmp_path / "shop.yaml"
    file.write_text("---\n".join(before))
    assert remove_object(tmp_path, WAYPOINT) == file
    assert file.read_text() in ("---\n".join(after), "---\n".join((*after, "")))


def test_with_the_last_document_goes_the_file(tmp_path: Path) -> None:
    (tmp_path / "waypoint.yaml").write_text(GATEWAY)
    (tmp_path / "other.yaml").write_text(FIRST)
    assert remove_object(tmp_path, WAYPOINT) == tmp_path / "waypoint.yaml"
    assert [file.name for file in tmp_path.iterdir()] == ["other.yaml"]


def test_what_is_not_there_changes_nothing(tmp_path: Path) -> None:
    text = GATEWAY.replace("namespace: shop", "namespace: bank") + "---\n" + LAST + "---\n{ no YAML: [ waypoint Gateway\n"
    (tmp_path / "waypoint.yaml").write_text(text)
    assert remove_object(tmp_path, WAYPOINT) is None
    assert (tmp_path / "waypoint.yaml").read_text() == text


def test_an_object_without_a_namespace_is_in_default(tmp_path: Path) -> None:
    (tmp_path / "waypoint.yaml").write_text("kind: Gateway\nmetadata: {name: waypoint}\n")
    assert remove_object(tmp_path, WAYPOINT) is None
    assert remove_object(tmp_path, ObjectKey("Gateway", "default", "waypoint")) is not None


def test_one_of_a_list_is_left_to_the_user(tmp_path: Path) -> None:
    text = "kind: List\nitems:\n- kind: Gateway\n  metadata: {name: waypoint, namespace: shop}\n"
    (tmp_path / "list.yaml").write_text(text)
    with pytest.raises(EditError, match="Gateway shop/waypoint is part of a List"):
        remove_object(tmp_path, WAYPOINT)
    assert (tmp_path / "list.yaml").read_text() == text


def test_a_file_that_is_no_text_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"\xff Gateway waypoint")
    (tmp_path / "b.yaml").write_text(GATEWAY)
    assert remove_object(tmp_path, WAYPOINT) == tmp_path / "b.yaml"

"""Label edits: only the bytes of the label change, whatever the user's hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from mesh.kube.directory import DirectoryStore
from mesh.kube.label_edit import LabelError, edit_label, edit_labels

MODE = "istio.io/dataplane-mode"

TIDY = """\
apiVersion: v1
kind: Namespace
metadata:
  name: shop
"""
COMMENTED = """\
# The shop.
---
apiVersion: v1   # core
kind: Namespace
metadata:
    name:   "shop"      # do not rename
    # team labels
    labels:
        team:   'payments'   # who to call

        # what it costs
        cost-centre: "0042"
    annotations:
        note: >-
            a long text that a library would wrap at eighty columns, although the user did not want that to happen at all
---

apiVersion: v1
kind: Pod
metadata: {name: shop, namespace: shop}
spec:
  containers:
  - name: a
    command: [ "a",   'b' ]
"""
FLOW = "{apiVersion: v1, kind: Namespace, metadata: {name: shop , annotations: {a: b}}}\n"
FLOW_LABELS = "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop, labels: { a: b , c: d }}\n"
JSON = '{\n  "apiVersion": "v1",\n  "kind": "Namespace",\n  "metadata": {\n    "name": "shop",\n    "labels": {"team": "x"}\n  }\n}\n'
LIST = """\
apiVersion: v1
kind: List
items:
- apiVersion: v1
  kind: Namespace
  metadata:
    name: other
    labels:
      a: b
- apiVersion: v1
  kind: Namespace
  metadata:
    name: shop
    labels:
      a: b
"""
NO_FINAL_NEWLINE = "apiVersion: v1\nkind: Namespace\nmetadata:\n  labels:\n    a: b\n  name: shop"
HEAD = "apiVersion: v1\nkind: Namespace\n"
NASTY = {
    "tidy": TIDY,
    "commented": COMMENTED,
    "flow": FLOW,
    "flow labels": FLOW_LABELS,
    "list": LIST,
    "no final newline": NO_FINAL_NEWLINE,
    "no final newline, name last": TIDY.rstrip("\n"),
    "windows": COMMENTED.replace("\n", "\r\n"),
    "windows without final newline": TIDY.replace("\n", "\r\n").removesuffix("\r\n"),
    "byte order mark": "\ufeff" + COMMENTED,
    "label value not written": HEAD + "metadata:\n  name: shop\n  labels:\n    x:\n    y: z\n",
    "last label value not written": HEAD + "metadata:\n  name: shop\n  labels:\n    x:\nspec: {}\n",
    "one space": HEAD + "metadata:\n name: shop\n labels:\n  a: b\n",
    "emoji before it": "# 🚀 é\napiVersion: v1\nkind: Namespace\nmetadata:\n  annotations: {é: 🚀}\n  name: shop\n",
    "flow over lines": HEAD + "metadata: {\n  name: shop,\n  labels: {\n    a: b,\n  },\n}\n",
    "comment under labels": HEAD + "metadata:\n  name: shop\n  labels:\n    # none but this\n    a: b\n    # after\n",
    "directive and end": "%YAML 1.2\n---\napiVersion: v1\nkind: Namespace\nmetadata:\n  name: shop\n...\n",
    "plain value over lines": HEAD + "metadata:\n  name: shop\n  labels:\n    a: 'b'\n  annotations:\n    x: y\n      z\n",
}


def directory_with(tmp_path: Path, text: str, name: str = "shop.yaml") -> Path:
    (tmp_path / name).write_bytes(text.encode())
    return tmp_path / name


def label_of(tmp_path: Path, key: str = MODE) -> str | None:
    store = DirectoryStore([tmp_path])
    store.load()
    namespace = store.find("Namespace", "", "shop")
    assert namespace is not None, store.problems
    return namespace.labels.get(key)


@pytest.mark.parametrize("text", NASTY.values(), ids=NASTY.keys())
def test_a_label_that_is_set_and_removed_again_leaves_the_file_as_it_was(tmp_path: Path, text: str) -> None:
    path = directory_with(tmp_path, text)
    assert edit_label(tmp_path, "Namespace", "shop", MODE, "ambient") == path
    assert label_of(tmp_path) == "ambient"
    assert edit_label(tmp_path, "Namespace", "shop", MODE, None) == path
    assert path.read_bytes() == text.encode()


@pytest.mark.parametrize("text", NASTY.values(), ids=NASTY.keys())
def test_setting_a_label_changes_nothing_but_inserts_it(tmp_path: Path, text: str) -> None:
    path = directory_with(tmp_path, text)
    edit_label(tmp_path, "Namespace", "shop", MODE, "ambient")
    before, after = text.encode(), path.read_bytes()
    same_start = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), len(before))
    inserted = after[same_start : same_start + len(after) - len(before)]
    assert before == after[:same_start] + after[same_start + len(inserted) :]
    assert len(inserted) < 60


@pytest.mark.parametrize("text", NASTY.values(), ids=NASTY.keys())
def test_a_label_can_be_changed_where_it_stands(tmp_path: Path, text: str) -> None:
    path = directory_with(tmp_path, text)
    edit_label(tmp_path, "Namespace", "shop", MODE, "ambient")
    with_ambient = path.read_bytes()
    edit_label(tmp_path, "Namespace", "shop", MODE, "none")
    assert label_of(tmp_path) == "none"
    assert path.read_bytes() == with_ambient.replace(b"ambient", b"none")


def test_json_stays_json(tmp_path: Path) -> None:
    path = directory_with(tmp_path, JSON, "shop.json")
    edit_label(tmp_path, "Namespace", "shop", MODE, "ambient")
    assert path.read_text() == JSON.replace('"team": "x"', f'"team": "x", "{MODE}": "ambient"')
    edit_label(tmp_path, "Namespace", "shop", MODE, None)
    assert path.read_text() == JSON


def test_setting_what_is_set_writes_nothing(tmp_path: Path) -> None:
    path = directory_with(tmp_path, TIDY)
    edit_label(tmp_path, "Namespace", "shop", MODE, "ambient")
    before = path.stat()
    assert edit_label(tmp_path, "Namespace", "shop", MODE, "ambient") is None
    assert edit_label(tmp_path, "Namespace", "shop", "never-there", None) is None
    assert path.stat().st_ino == before.st_ino


@pytest.mark.parametrize("value", ["true", "on", "1", "0042", "1e3", "null", "n", "", "v1.2"])
def test_a_value_that_would_read_as_something_else_is_quoted(tmp_path: Path, value: str) -> None:
    directory_with(tmp_path, TIDY)
    edit_label(tmp_path, "Namespace", "shop", "x", value)
    assert label_of(tmp_path, "x") == value


def test_an_empty_labels_field_is_used(tmp_path: Path) -> None:
    for written in ("labels:", "labels: {}", "labels: { }", "labels: ~", "labels:   # none yet"):
        path = directory_with(tmp_path, f"apiVersion: v1\nkind: Namespace\nmetadata:\n  name: shop\n  {written}\n")
        edit_label(tmp_path, "Namespace", "shop", MODE, "ambient")
        assert label_of(tmp_path) == "ambient"
        assert path.read_text().count("labels") == 1


def test_several_labels_change_in_one_write(tmp_path: Path) -> None:
    path = directory_with(tmp_path, FLOW_LABELS)
    edit_labels(tmp_path, "Namespace", "shop", {"a": None, "c": "e", "f": "g"})
    assert path.read_text() == "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop, labels: { c: e, f: g }}\n"


def test_a_pod_is_found_by_namespace_and_name(tmp_path: Path) -> None:
    path = directory_with(tmp_path, COMMENTED)
    edit_label(tmp_path, "Pod", "shop", MODE, "none", namespace="shop")
    assert f"metadata: {{name: shop, labels: {{{MODE}: none}}, namespace: shop}}" in path.read_text()


def test_an_unknown_namespace_is_an_error_that_names_the_known(tmp_path: Path) -> None:
    directory_with(tmp_path, LIST)
    with pytest.raises(LabelError, match=r"there is no Namespace shpo in .*; did you mean 'shop'\?"):
        edit_label(tmp_path, "Namespace", "shpo", MODE, "ambient")
    with pytest.raises(LabelError, match=r"there is no Namespace kitchen in .* \(known: other, shop\)"):
        edit_label(tmp_path, "Namespace", "kitchen", MODE, "ambient")


def test_a_missing_object_beside_a_malformed_file_says_so(tmp_path: Path) -> None:
    directory_with(tmp_path, "kind: Namespace\nmetadata: {name: shop\n")
    with pytest.raises(LabelError, match=r"shop.yaml:3 cannot be read"):
        edit_label(tmp_path, "Namespace", "shop", MODE, "ambient")


@pytest.mark.parametrize("text", [
    "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: shop\n  annotations: &both {a: b}\n  labels: *both\n",
    "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: shop\n  labels: &both\n    a: b\n  annotations: *both\n",
    "apiVersion: v1\nkind: Namespace\nmetadata:\n  <<: {labels: {a: b}}\n  name: shop\n",
    f"apiVersion: v1\nkind: Namespace\nmetadata:\n  name: shop\n  labels:\n    {MODE}: |\n      none\n",
])  # fmt: skip
def test_labels_that_cannot_be_changed_safely_are_left_to_the_user(tmp_path: Path, text: str) -> None:
    path = directory_with(tmp_path, text)
    with pytest.raises(LabelError, match="by hand"):
        edit_label(tmp_path, "Namespace", "shop", MODE, "ambient")
    assert path.read_text() == text


def test_what_is_no_label_is_refused(tmp_path: Path) -> None:
    directory_with(tmp_path, TIDY)
    for key, value in (("a b", "x"), ("a\nb: c", "x"), ("x/y/z", "x"), ("a", "b c"), ("a", "x: y"), ("a", "x" * 64)):
        with pytest.raises(LabelError, match="is no "):
            edit_label(tmp_path, "Namespace", "shop", key, value)


def test_a_symbolic_link_stays_one_and_the_mode_stays(tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.mkdir()
    path = directory_with(real, TIDY)
    path.chmod(0o640)
    source = tmp_path / "source"
    source.mkdir()
    (source / "shop.yaml").symlink_to(path)
    edit_label(source, "Namespace", "shop", MODE, "ambient")
    assert (source / "shop.yaml").is_symlink()
    assert path.stat().st_mode & 0o7777 == 0o640
    assert label_of(source) == "ambient"

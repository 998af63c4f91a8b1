"""Whatever stands in a file, reading it ends in objects and problems, never in another exception."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from hypothesis import example, given, settings
from hypothesis import strategies as st

from mesh.kube.directory import DirectoryStore
from mesh.kube.documents import Chunk, MalformedDocument, is_plain, parse_chunk, parse_with, split_documents
from mesh.kube.kinds import KINDS
from mesh.kube.objects import KubeObject, Layer, Origin, SourceMapping, SourceSequence

PIECES = st.sampled_from([
    "a", "b: ", "- ", "  ", "\n", "\r\n", "\t", "---", "...", "--- ", "%YAML 1.1", "%TAG ! x", "&a ", "*a", "<<: ", "!!str ", "!t ",
    "? ", ": ", "[", "]", "{", "}", ",", "'", '"', "\\", "\\UFFFFFFFF", "\\ud800", "|", ">", "|2-", "# c", "@", "`", "1", "~",
    "\u2028", "\x85", "\ufeff", "\0", "é", "\U0001f680",
])  # fmt: skip
YAMLISH = st.lists(PIECES | st.text(max_size=5), max_size=40).map("".join)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
WORDS = st.sampled_from([
    "spec", "selector", "matchLabels", "rules", "from", "to", "when", "source", "operation", "principals", "ports", "ipBlocks", "key",
    "values", "action", "mtls", "mode", "portLevelMtls", "containers", "name", "status", "podIPs", "ip", "conditions", "type",
    "clusterIP", "targetRefs", "metadata", "labels", "ownerReferences", "80", "ALLOW", "STRICT", "10.0.0.1",
])  # fmt: skip
TREES = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 70000) | WORDS | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=25,
)


@given(YAMLISH)
@example("%YAML 1.1.1\n---\n")
@example("%TAG ! \n--- !x\n")
@example("a: !<tag:yaml.org,2002:int> x")
@example("a: !!float x")
@example('"\\UFFFFFFFF"')
@example('"\\ud800"')
@settings(max_examples=400, deadline=None)
def test_a_document_is_values_or_malformed(text: str) -> None:
    for chunk in split_documents(text):
        malformed = None
        try:
            parse_chunk(chunk)
        except MalformedDocument as exc:
            malformed = exc
        assert malformed is None or (malformed.line >= 1 and malformed.column >= 1 and malformed.message)


def with_lines(value: object) -> object:
    """The value and the line of everything in it."""
    match value:
        case SourceMapping():
            return value.line, value.lines, {key: with_lines(item) for key, item in value.items()}
        case SourceSequence():
            return value.line, value.lines, [with_lines(item) for item in value]
    return type(value), value


@given(YAMLISH)
@settings(max_examples=400, deadline=None)
def test_libyaml_reads_what_the_parser_in_python_reads(text: str) -> None:
    for chunk in filter(is_plain, split_documents(text)):
        try:
            fast, sure = (parse_with(chunk, pure=pure) for pure in (False, True))
        except MalformedDocument:
            continue
        assert [with_lines(value) for value in fast] == [with_lines(value) for value in sure]


@given(YAMLISH)
@settings(deadline=None)
def test_cutting_a_file_loses_nothing_but_what_says_nothing(text: str) -> None:
    chunks = list(split_documents(text))
    for chunk in chunks:
        assert text[chunk.offset : chunk.offset + len(chunk.text)] == chunk.text
        assert chunk.offset == 0 or chunk.text.startswith("---")
    rest = text
    for chunk in reversed(chunks):
        rest = rest[: chunk.offset] + "\n" + rest[chunk.offset + len(chunk.text) :]
    assert all(line.removeprefix("---").lstrip()[:1] in ("", "#", "%") for line in rest.splitlines())


@given(JSON)
@settings(deadline=None)
def test_json_reads_as_itself(value: object) -> None:
    """Escaped to ASCII: JSON allows characters that YAML does not, such as U+FFFE."""
    text = json.dumps(value)
    if "<<" not in text and "\\ud" not in text:
        assert parse_chunk(Chunk(text)) == [value]


@given(st.sampled_from(sorted(KINDS)), TREES, TREES, TREES)
@settings(max_examples=400, deadline=None)
def test_any_tree_can_be_checked_as_any_kind(kind: str, metadata: object, spec: object, status: object) -> None:
    raw = {"kind": kind, "metadata": metadata, "spec": spec, "status": status}
    obj = KubeObject("v1", kind, "ns", "name", raw, (Layer(Origin("x.yaml", 0, 1), raw),))
    for problem in KINDS[kind].check(obj):
        assert str(problem).startswith("x.yaml:1: ")


@given(st.binary(max_size=200) | YAMLISH.map(lambda text: text.encode("utf-8", "surrogatepass")))
@settings(max_examples=100, deadline=None)
def test_a_file_gone_bad_removes_nothing_it_cannot_be_told_to_remove(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "a.yaml")
        path.write_text("apiVersion: v1\nkind: Namespace\nmetadata: {name: shop}\n")
        store = DirectoryStore([Path(directory)])
        store.load()
        path.write_bytes(content + b"\n" * 64)
        store.load()
        unread = any("cannot be read" in str(problem) or "column" in str(problem) for problem in store.problems)
        assert store.find("Namespace", "", "shop") is not None or not unread

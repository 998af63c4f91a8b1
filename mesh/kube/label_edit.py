"""Setting and removing a label in the user's YAML, so that no byte changes but those of the label.

A YAML library that loads and writes again keeps comments but not all of the user's hand: it re-wraps long texts, re-indents lists and
evens out quotes. So the parser is only asked *where* things stand, the text is changed there, and the result is read again and must say
exactly what was wanted; otherwise nothing is written and the user is told.
"""

from __future__ import annotations

import re
from codecs import BOM_UTF8
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from mesh.kube.documents import MAX_FILE_SIZE, Chunk, MalformedDocument, parse_chunk, resolve_plain, split_documents
from mesh.kube.fields import did_you_mean
from mesh.kube.files import files_under
from mesh.kube.overlay import replace_file

_PREFIX = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?\Z")
_NAME = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?\Z")
_PLAIN = re.compile(r"[A-Za-z][-A-Za-z0-9_./]*\Z")


class LabelError(Exception):
    """The label could not be set; the message is for the user, and nothing was written."""


@dataclass(frozen=True, slots=True)
class _Target:
    kind: str
    namespace: str
    name: str

    def is_(self, value: object) -> bool:
        if not isinstance(value, Mapping) or value.get("kind") != self.kind:
            return False
        metadata = value.get("metadata")
        if not isinstance(metadata, Mapping) or metadata.get("name") != self.name:
            return False
        return not self.namespace or metadata.get("namespace", "default") == self.namespace

    def __str__(self) -> str:
        return f"{self.kind} {self.namespace}/{self.name}" if self.namespace else f"{self.kind} {self.name}"


def edit_label(directory: Path, kind: str, name: str, key: str, value: str | None, *, namespace: str = "") -> Path | None:
    """Set one label of an object, or remove it (``value`` None). See `edit_labels`."""
    return edit_labels(directory, kind, name, {key: value}, namespace=namespace)


def edit_labels(directory: Path, kind: str, name: str, labels: Mapping[str, str | None], *, namespace: str = "") -> Path | None:
    """Set labels of an object (value None: remove). Returns the file that was rewritten, None when all was so already.

    ``namespace`` is for namespaced kinds. Raises LabelError when there is no such object (naming those there are), when the text cannot
    be changed safely, or when a key or value is no label; OSError when the file cannot be written.
    """
    for key, value in labels.items():
        check_label(key, value)
    target = _Target(kind, namespace, name)
    for file in _files(directory):
        for chunk in split_documents(file.text):
            # Most documents need no parsing to see that they are not the one.
            if name in chunk.text and kind in chunk.text and any(target.is_(obj) for obj in _objects(_parse(chunk))):
                edited = _edit_chunk(chunk, target, labels, file.path)
                if edited == chunk.text:
                    return None
                file.write(file.text[: chunk.offset] + edited + file.text[chunk.offset + len(chunk.text) :])
                return file.path
    raise _not_found(directory, target)


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    text: str
    byte_order_mark: bytes

    def write(self, text: str) -> None:
        """Through a symbolic link to the file it names, so that the link stays one. Raises OSError."""
        replace_file(self.path.resolve(), self.byte_order_mark + text.encode())


def _files(directory: Path) -> Iterator[_File]:
    for path in files_under(directory):
        try:
            if not path.is_file() or path.stat().st_size > MAX_FILE_SIZE:
                continue
            content = path.read_bytes()
            mark = BOM_UTF8 if content.startswith(BOM_UTF8) else b""
            yield _File(path, content.removeprefix(mark).decode("utf-8"), mark)
        except (OSError, UnicodeDecodeError):
            continue


def _parse(chunk: Chunk) -> list[object]:
    try:
        return parse_chunk(chunk)
    except MalformedDocument:
        return []


def _not_found(directory: Path, target: _Target) -> LabelError:
    """Names what there is, and what could not be read: the object may be in there."""
    known: set[str] = set()
    unread = ""
    for file in _files(directory):
        for chunk in split_documents(file.text):
            try:
                known.update(_name_of(obj) for obj in _objects(parse_chunk(chunk)) if obj.get("kind") == target.kind)
            except MalformedDocument as exc:
                unread = unread or f"; {file.path}:{exc.line} cannot be read: {exc.message}"
    return LabelError(f"there is no {target} in {directory}{did_you_mean(target.name, known)}{unread}")


def check_label(key: str, value: str | None) -> None:
    """Raises LabelError when Kubernetes would not take it."""
    prefix, slash, name = key.rpartition("/")
    if not _NAME.match(name) or (slash and not _PREFIX.match(prefix)):
        raise LabelError(f"'{key}' is no key for a label: letters, digits, '-', '_' and '.', after an optional DNS name and '/'")
    if value and not _NAME.match(value):
        raise LabelError(f"'{value}' is no value for a label: at most 63 letters, digits, '-', '_' and '.'")


def _objects(values: list[object]) -> Iterator[Mapping[str, object]]:
    for value in values:
        if isinstance(value, Mapping):
            items = value.get("items")
            if str(value.get("kind", "")).endswith("List") and isinstance(items, list):
                yield from _objects(items)
            else:
                yield value


def _name_of(obj: Mapping[str, object]) -> str:
    metadata = obj.get("metadata")
    return str(metadata.get("name")) if isinstance(metadata, Mapping) else ""


def _edit_chunk(chunk: Chunk, target: _Target, labels: Mapping[str, str | None], path: Path) -> str:
    text = chunk.text
    for key, value in labels.items():
        text = _Editor(text, target, quoted=path.suffix == ".json").edit(key, value)
    if _with_labels(_parse(replace(chunk, text=text)), target, {}) != _with_labels(parse_chunk(chunk), target, labels):
        raise LabelError(f"{path}: the labels of {target} are written in a way that cannot be changed safely; please edit them by hand")
    return text


def _with_labels(value: object, target: _Target, labels: Mapping[str, str | None]) -> object:
    """``value`` with the labels of the target changed; no labels at all, empty and ``null`` are one."""
    if isinstance(value, list):
        return [_with_labels(item, target, labels) for item in value]
    if not isinstance(value, Mapping):
        return value
    if not target.is_(value):
        return {**value, "items": _with_labels(value["items"], target, labels)} if "items" in value else dict(value)
    metadata = value["metadata"]
    assert isinstance(metadata, Mapping)
    before = metadata.get("labels")
    merged = {**(before if isinstance(before, Mapping) else {}), **labels}
    after = {key: item for key, item in merged.items() if item is not None}
    rest = {key: item for key, item in metadata.items() if key != "labels"}
    return {**value, "metadata": {**rest, "labels": after} if after else rest}


class _Editor:
    """One change in the text of one document (or of the List that holds the object)."""

    def __init__(self, text: str, target: _Target, *, quoted: bool) -> None:
        self._text = text
        self._quoted = quoted
        self._newline = "\r\n" if "\r\n" in text else "\n"
        self._metadata = self._find_metadata(target)

    def edit(self, key: str, value: str | None) -> str:
        """The text with the label set or removed. Raises LabelError where the text shares parts by aliases."""
        entry = _entry(self._metadata, "labels")
        if entry is None:
            return self._text if value is None else self._add_labels(key, value)
        labels_key, labels = entry
        if not isinstance(labels, MappingNode):
            return self._text if value is None else self._fill_null(labels_key, labels, key, value)
        self._refuse_alias(labels_key, labels)
        found = _entry(labels, key)
        if found is None:
            return self._text if value is None else self._add(labels, key, value)
        self._refuse_alias(*found)
        if value is None:
            return self._remove(labels_key, labels, *found)
        return self._set_value(*found, value)

    def _find_metadata(self, target: _Target) -> MappingNode:
        for document in YAML(typ="safe", pure=True).compose_all(self._text):
            for node in _object_nodes(document):
                metadata = _entry(node, "metadata")
                if (
                    metadata
                    and _scalar(node, "kind") == target.kind
                    and isinstance(metadata[1], MappingNode)
                    and _names(metadata[1], target)
                ):
                    self._refuse_alias(*metadata)
                    return metadata[1]
        raise LabelError(f"{target} is written in a way that cannot be changed safely; please edit it by hand")

    def _refuse_alias(self, key: Node, value: Node) -> None:
        """An alias is composed into the very node it names, which stands before it."""
        if value.anchor is not None or value.start_mark.index < key.end_mark.index:
            raise LabelError("the labels share parts by YAML anchors; please edit them by hand")

    def _add_labels(self, key: str, value: str) -> str:
        """After the name, which every object has: a line of its own in block style, an entry in flow style."""
        name = _entry(self._metadata, "name")
        assert name is not None
        if self._metadata.flow_style:
            at = name[1].end_mark.index
            return self._insert(at, f", {self._plain('labels')}: {{{self._pair(key, value)}}}")
        indent = " " * name[0].start_mark.column
        step = self._step()
        return self._insert_lines(name[1].end_mark.index, f"{indent}labels:", f"{indent}{step}{self._pair(key, value)}")

    def _fill_null(self, labels_key: Node, labels: Node, key: str, value: str) -> str:
        """``labels:`` with nothing, or with ``~``."""
        colon = self._text.index(":", labels_key.end_mark.index) + 1
        written = isinstance(labels, ScalarNode) and labels.value != ""
        if written:
            return self._text[: labels.start_mark.index] + f"{{{self._pair(key, value)}}}" + self._text[labels.end_mark.index :]
        if self._metadata.flow_style:
            return self._insert(colon, f" {{{self._pair(key, value)}}}")
        indent = " " * labels_key.start_mark.column
        return self._insert_lines(colon, f"{indent}{self._step()}{self._pair(key, value)}")

    def _add(self, labels: MappingNode, key: str, value: str) -> str:
        if labels.flow_style:
            if not labels.value:
                end = self._text.index("}", labels.start_mark.index)
                return self._text[: labels.start_mark.index + 1] + self._pair(key, value) + self._text[end:]
            return self._insert(self._end_of(*labels.value[-1]), f", {self._pair(key, value)}")
        first, last = labels.value[0][0], labels.value[-1]
        return self._insert_lines(self._end_of(*last), " " * first.start_mark.column + self._pair(key, value))

    def _set_value(self, key: Node, node: Node, value: str) -> str:
        if not isinstance(node, ScalarNode):
            raise LabelError(f"the value of label '{key.value}' is not a text; please edit it by hand")
        if node.value == value and (node.style or isinstance(resolve_plain(value), str)):
            return self._text
        end = self._end_of(key, node)
        if self._is_unwritten(node):
            return self._insert(end, f" {self._scalar(value)}")
        written = f"{node.style}{value}{node.style}" if node.style in ("'", '"') else self._scalar(value)
        return self._text[: node.start_mark.index] + written + self._text[end:]

    def _remove(self, labels_key: Node, labels: MappingNode, key: Node, value: Node) -> str:
        if labels.flow_style:
            return self._remove_from_flow(labels, key, value)
        text = self._cut_lines(key.start_mark.index, self._end_of(key, value))
        if len(labels.value) > 1:
            return text
        # The last label goes with the line that announces them: "labels:" alone would be a leftover of ours.
        start = labels_key.start_mark.index
        if self._line_of(start).strip() != f"{labels_key.value}:" or self._metadata.value[0][0] is labels_key:
            return text
        return self._cut_lines_of(text, start, start)

    def _remove_from_flow(self, labels: MappingNode, key: Node, value: Node) -> str:
        index = next(i for i, (node, _) in enumerate(labels.value) if node is key)
        if index > 0:
            start, end = self._end_of(*labels.value[index - 1]), self._end_of(key, value)
        elif len(labels.value) > 1:
            start, end = key.start_mark.index, labels.value[1][0].start_mark.index
        elif self._stands_alone_after_name(labels):
            name = _entry(self._metadata, "name")
            assert name is not None
            start, end = name[1].end_mark.index, labels.end_mark.index
        else:
            start, end = key.start_mark.index, self._end_of(key, value)
        return self._text[:start] + self._text[end:]

    def _stands_alone_after_name(self, labels: MappingNode) -> bool:
        """``{name: x, labels: {only: one}}``, as `_add_labels` writes it: then all of it goes again."""
        pairs = self._metadata.value
        if not self._metadata.flow_style:
            return False
        return any(pairs[i][0].value == "name" and pairs[i + 1][1] is labels for i in range(len(pairs) - 1))

    def _is_unwritten(self, node: Node) -> bool:
        return isinstance(node, ScalarNode) and node.start_mark.index == node.end_mark.index

    def _end_of(self, key: Node, value: Node) -> int:
        """Where an entry ends. The mark of a value that is not there stands at whatever comes next."""
        if self._is_unwritten(value):
            return self._text.index(":", key.end_mark.index) + 1
        if isinstance(value, ScalarNode) and value.style in ("|", ">"):
            raise LabelError("a label is written as a block of text; please edit the labels by hand")
        return int(value.end_mark.index)

    def _step(self) -> str:
        """How far the user indents: as metadata's entries stand from ``metadata`` itself."""
        line_start = self._text.rfind("\n", 0, self._metadata.value[0][0].start_mark.index) + 1
        own = self._metadata.value[0][0].start_mark.index - line_start
        above = next((column for column in self._columns_before(line_start) if column < own), 0)
        return " " * (own - above if 0 < own - above <= 8 else 2)

    def _columns_before(self, index: int) -> Iterator[int]:
        for line in reversed(self._text[:index].splitlines()):
            stripped = line.lstrip(" ")
            if stripped and not stripped.startswith("#"):
                yield len(line) - len(stripped.removeprefix("- ").lstrip(" "))

    def _line_of(self, index: int) -> str:
        return self._text[self._text.rfind("\n", 0, index) + 1 :].split("\n", 1)[0]

    def _insert(self, at: int, what: str) -> str:
        return self._text[:at] + what + self._text[at:]

    def _insert_lines(self, after: int, *lines: str) -> str:
        """New lines below the one that ``after`` stands in, with the file's line ends; a last line without one keeps it so."""
        end = self._text.find("\n", after)
        if end < 0:
            return self._text + "".join(self._newline + line for line in lines)
        return self._insert(end + 1, "".join(line + self._newline for line in lines))

    def _cut_lines(self, start: int, end: int) -> str:
        return self._cut_lines_of(self._text, start, end)

    def _cut_lines_of(self, text: str, start: int, end: int) -> str:
        """Without the lines from the one with ``start`` to the one with ``end``."""
        line_start = text.rfind("\n", 0, start) + 1
        line_end = text.find("\n", end)
        if line_end >= 0:
            return text[:line_start] + text[line_end + 1 :]
        return text[:line_start].removesuffix("\n").removesuffix("\r")

    def _pair(self, key: str, value: str) -> str:
        return f"{self._scalar(key)}: {self._scalar(value)}"

    def _plain(self, text: str) -> str:
        return f'"{text}"' if self._quoted else text

    def _scalar(self, text: str) -> str:
        """Quoted where the text alone would read as a number, a boolean or nothing, in any version of YAML."""
        if not self._quoted and _PLAIN.match(text) and isinstance(resolve_plain(text), str):
            return text
        return f'"{text}"'


def _object_nodes(node: Node | None) -> Iterator[MappingNode]:
    if not isinstance(node, MappingNode):
        return
    items = _entry(node, "items")
    if items is not None and isinstance(items[1], SequenceNode) and (_scalar(node, "kind") or "").endswith("List"):
        for item in items[1].value:
            yield from _object_nodes(item)
    else:
        yield node


def _entry(mapping: MappingNode, key: str) -> tuple[Node, Node] | None:
    return next(((k, v) for k, v in mapping.value if isinstance(k, ScalarNode) and k.value == key), None)


def _scalar(mapping: MappingNode, key: str) -> str | None:
    entry = _entry(mapping, key)
    return str(entry[1].value) if entry is not None and isinstance(entry[1], ScalarNode) else None


def _names(metadata: MappingNode, target: _Target) -> bool:
    if _scalar(metadata, "name") != target.name:
        return False
    return not target.namespace or (_scalar(metadata, "namespace") or "default") == target.namespace

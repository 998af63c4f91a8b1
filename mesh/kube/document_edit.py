"""Taking an object out of the user's YAML, so that no other byte changes: its document goes, and with the last one the file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from mesh.kube.documents import MAX_FILE_SIZE, Chunk, MalformedDocument, parse_chunk, split_documents
from mesh.kube.files import files_under
from mesh.kube.objects import ObjectKey
from mesh.kube.overlay import replace_file


class EditError(Exception):
    """The object could not be removed; the message is for the user, and nothing was written."""


def remove_object(directory: Path, key: ObjectKey) -> Path | None:
    """The file that was rewritten or removed; None if the object is not there. Raises EditError, OSError."""
    for path in files_under(directory):
        text = _read(path)
        chunks = list(split_documents(text))
        for chunk in chunks:
            if key.name in chunk.text and key.kind in chunk.text:
                values = _values(chunk)
                if any(_is(value, key) for value in values):
                    _cut(path, text, chunk, alone=len(chunks) == 1 and len(values) == 1)
                    return path
                if any(_is(item, key) for value in values for item in _items(value)):
                    raise EditError(f"{key} is part of a List in {path}; please remove it by hand")
    return None


def _read(path: Path) -> str:
    try:
        if path.is_file() and path.stat().st_size <= MAX_FILE_SIZE:
            return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        pass
    return ""


def _values(chunk: Chunk) -> list[object]:
    try:
        return parse_chunk(chunk)
    except MalformedDocument:
        return []


def _items(value: object) -> Iterator[object]:
    items = value.get("items") if isinstance(value, Mapping) else None
    yield from items if isinstance(items, list) else ()


def _is(value: object, key: ObjectKey) -> bool:
    if not isinstance(value, Mapping) or value.get("kind") != key.kind:
        return False
    metadata = value.get("metadata")
    if not isinstance(metadata, Mapping) or metadata.get("name") != key.name:
        return False
    return not key.namespace or metadata.get("namespace", "default") == key.namespace


def _cut(path: Path, text: str, chunk: Chunk, *, alone: bool) -> None:
    if alone:
        path.unlink()
        return
    kept = text[: chunk.offset] + text[chunk.offset + len(chunk.text) :]
    # The separator stands before what it begins: with the first document goes the one of the second.
    replace_file(path.resolve(), (kept.removeprefix("---\n") if chunk.offset == 0 else kept).encode())

"""YAML text into documents with line numbers, within bounds: no anchors that explode, no deep nesting, no key given twice.

ruamel.yaml scans and parses, through libyaml where that reads alike; the values are built here from its events, because a constructor
that only builds plain data, counts as it goes and never recurses is easier to trust than one that is told what to leave out. Scalars
resolve as kubectl resolves them (YAML 1.1 through go-yaml: ``yes`` and ``on`` are booleans), so a file means here what it means there.

A file is cut at its ``---`` lines before it is parsed (as kubectl does): a mistake is confined to its document, and a document whose
text did not change is not parsed again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, StringMark, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    NodeEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)

from mesh.kube.objects import SourceMapping, SourceSequence

try:
    from _ruamel_yaml import CParser
except ImportError:  # a platform that ruamel.yaml.clib is not built for
    CParser = None

MAX_DEPTH = 64
"""Nesting of a document. Kubernetes objects stay under 20."""
MAX_NODES = 200_000
"""Values in one document after expansion of aliases; etcd refuses objects of more than 1.5 MB anyway."""
MAX_FILE_SIZE = 32 << 20
"""Bytes of one file. A file of 10 000 pods is about 6 MB."""

_SEPARATOR = re.compile(r"^---(?=[ \t\r\n]|\Z)", re.MULTILINE)
_SURROGATE = re.compile("[\ud800-\udfff]")
_DIRECTIVE = re.compile(r"^%", re.MULTILINE)
_UNLIKE = re.compile("[\x85\u2028\u2029\ufeff]")
_LINE_BREAK = re.compile(r"\r\n|[\r\n\x85\u2028\u2029]")


class MalformedDocument(Exception):
    """A document that is no YAML, or YAML beyond the bounds. ``line`` and ``column`` are 1-based and counted in its file."""

    def __init__(self, message: str, line: int, column: int) -> None:
        super().__init__(message)
        self.message = message
        self.line = line
        self.column = column


@dataclass(frozen=True, slots=True)
class Chunk:
    """The text between two separators; ``line`` (0-based) and ``offset`` (in characters) are where it starts in its file."""

    text: str
    line: int = 0
    offset: int = 0


def split_documents(text: str) -> Iterator[Chunk]:
    """Cut at lines that start with ``---``; parts of nothing but blanks, comments and directives are left out.

    A line ``---`` in column 0 ends a document even inside a scalar (YAML 1.2, 9.1.2), so no look inside is needed.
    """
    starts = [0, *(match.start() for match in _SEPARATOR.finditer(text) if match.start() > 0), len(text)]
    line = 0
    for start, end in pairwise(starts):
        part = text[start:end]
        if not all(_says_nothing(text_line) for text_line in part.splitlines()):
            yield Chunk(part, line, start)
        line += len(_LINE_BREAK.findall(part))


def _says_nothing(line: str) -> bool:
    return line.startswith("%") or line.removeprefix("---").lstrip()[:1] in ("", "#")


def parse_json(text: str) -> object:
    """A JSON document, as overlays are written: ten times faster than YAML, without lines. Raises MalformedDocument."""
    try:
        value: object = json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as exc:
        raise MalformedDocument(exc.msg, exc.lineno, exc.colno) from exc
    except (ValueError, RecursionError) as exc:
        raise MalformedDocument(str(exc), 1, 1) from exc
    return value


def parse_chunk(chunk: Chunk) -> list[object]:
    """The values of a chunk, normally one; lines are relative to the chunk. Raises MalformedDocument, and nothing else."""
    if is_plain(chunk):
        try:
            return parse_with(chunk, pure=False)
        except MalformedDocument:
            pass  # the parser in Python has the last word, and better ones
    return parse_with(chunk, pure=True)


def is_plain(chunk: Chunk) -> bool:
    """Whether libyaml, which is several times as fast as the parser in Python, reads it alike if it can: it follows YAML 1.1, where more
    characters end a line, and directives may change the version."""
    return not (_DIRECTIVE.search(chunk.text) or (not chunk.text.isascii() and _UNLIKE.search(chunk.text)))


def parse_with(chunk: Chunk, *, pure: bool) -> list[object]:
    """`parse_chunk` by one parser: ``pure`` is the one in Python, else libyaml if it is there. Raises MalformedDocument."""
    builder = _Builder(chunk.line)
    try:
        for event in YAML(typ="safe", pure=True).parse(chunk.text) if pure or CParser is None else _parse_fast(chunk.text):
            if isinstance(event, NodeEvent):
                builder.add(event)
            elif isinstance(event, SequenceEndEvent | MappingEndEvent):
                builder.close()
            elif isinstance(event, DocumentStartEvent):
                builder.start_document()
    except MarkedYAMLError as exc:
        mark = exc.problem_mark or exc.context_mark
        message = " ".join(part for part in (exc.problem, exc.context) if part)
        raise _malformed(message, mark, chunk.line) from exc
    except YAMLError as exc:
        raise MalformedDocument(str(exc).splitlines()[0], chunk.line + 1, 1) from exc
    except (ValueError, LookupError, TypeError, AttributeError, AssertionError, ArithmeticError) as exc:
        # ruamel.yaml 0.19 lets some malformed directives and escapes ("\\UFFFFFFFF") out as Python's own errors.
        raise MalformedDocument(f"not YAML: {exc}", chunk.line + 1, 1) from exc
    return builder.documents


def _parse_fast(text: str) -> Iterator[Event]:
    # Not through YAML(): it looks for plug-ins in the file system each time.
    parser = CParser(text)
    while parser.check_event():
        yield parser.get_event()


def _malformed(message: str, mark: StringMark | None, first_line: int) -> MalformedDocument:
    if mark is None:
        return MalformedDocument(message, first_line + 1, 1)
    return MalformedDocument(message, first_line + mark.line + 1, mark.column + 1)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key '{next(n for n in names if names.count(n) > 1)}' is given twice")
    return result


@dataclass(slots=True)
class _Open:
    """A collection whose end has not come yet."""

    value: SourceMapping | SourceSequence
    anchor: str | None
    key: str | None = None
    """In a mapping: the key whose value comes next."""
    key_line: int = 0
    nodes: int = 1
    height: int = 1
    """Levels of nesting below and with this one, aliases included."""
    merged: list[SourceMapping] = field(default_factory=list)
    merging: bool = False


@dataclass(frozen=True, slots=True)
class _Anchored:
    value: object
    nodes: int
    height: int


class _Builder:
    def __init__(self, first_line: int) -> None:
        self.documents: list[object] = []
        self._first_line = first_line
        self._open: list[_Open] = []
        self._anchors: dict[str, _Anchored | None] = {}
        self._event: NodeEvent | None = None

    def start_document(self) -> None:
        self._anchors.clear()

    def add(self, event: NodeEvent) -> None:
        self._event = event
        line = event.start_mark.line
        if isinstance(event, AliasEvent):
            anchored = self._anchors.get(event.anchor, _UNKNOWN)
            if anchored is None:
                raise self._refuse(f"alias *{event.anchor} stands inside the value it names")
            if anchored is _UNKNOWN:
                raise self._refuse(f"alias *{event.anchor} names no anchor")
            self._place(anchored, line)
        elif isinstance(event, ScalarEvent):
            if self._takes_key():
                self._set_key(event)
                return
            anchored = _Anchored(self._resolve(event), 1, 0)
            if event.anchor is not None:
                self._anchors[event.anchor] = anchored
            self._place(anchored, line)
        elif isinstance(event, MappingStartEvent | SequenceStartEvent):
            if self._takes_key():
                raise self._refuse("a key must be a plain value, not a list or mapping")
            if event.tag not in (None, "!", "tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"):
                raise self._refuse(f"the tag {event.tag} is not understood")
            if len(self._open) >= MAX_DEPTH:
                raise self._refuse(f"nested deeper than {MAX_DEPTH} levels")
            if event.anchor is not None:
                self._anchors[event.anchor] = None
            is_mapping = isinstance(event, MappingStartEvent)
            self._open.append(_Open(SourceMapping(line) if is_mapping else SourceSequence(line), event.anchor))

    def close(self) -> None:
        closed = self._open.pop()
        if isinstance(closed.value, SourceMapping):
            _merge(closed.value, closed.merged)
        anchored = _Anchored(closed.value, closed.nodes, closed.height)
        if closed.anchor is not None:
            self._anchors[closed.anchor] = anchored
        self._place(anchored, closed.value.line)

    def _takes_key(self) -> bool:
        return bool(self._open) and isinstance(self._open[-1].value, SourceMapping) and self._open[-1].key is None

    def _set_key(self, event: ScalarEvent) -> None:
        parent = self._open[-1]
        assert isinstance(parent.value, SourceMapping)
        key = str(event.value)
        if not key.isascii() and _SURROGATE.search(key):
            raise self._refuse("half a surrogate pair is no character")
        if event.anchor is not None:
            self._anchors[event.anchor] = _Anchored(key, 1, 0)
        parent.merging = key == "<<" and bool(event.implicit[0])
        if key in parent.value and not parent.merging:
            first = self._first_line + parent.value.lines[key] + 1
            raise self._refuse(f"key '{key}' is given twice, first in line {first}")
        parent.key, parent.key_line = key, event.start_mark.line

    def _place(self, anchored: _Anchored, line: int) -> None:
        """Put a finished value where it belongs."""
        if not self._open:
            self.documents.append(anchored.value)
            return
        parent = self._open[-1]
        parent.nodes += anchored.nodes
        parent.height = max(parent.height, anchored.height + 1)
        if parent.nodes > MAX_NODES:
            raise self._refuse(f"more than {MAX_NODES} values (with aliases expanded)")
        if len(self._open) + anchored.height > MAX_DEPTH:
            raise self._refuse(f"nested deeper than {MAX_DEPTH} levels")
        if isinstance(parent.value, SourceSequence):
            parent.value.append(anchored.value)
            parent.value.lines.append(line)
        elif parent.key is None:
            raise self._refuse("a key must be a plain value, not an alias")
        else:
            self._set_value(parent, parent.key, anchored.value)
            parent.key = None

    def _set_value(self, parent: _Open, key: str, value: object) -> None:
        assert isinstance(parent.value, SourceMapping)
        if not parent.merging:
            parent.value[key] = value
            parent.value.lines[key] = parent.key_line
            return
        sources = value if isinstance(value, SourceSequence) else [value]
        for source in sources:
            if not isinstance(source, SourceMapping):
                raise self._refuse("'<<' takes a mapping or a list of mappings")
            parent.merged.append(source)

    def _resolve(self, event: ScalarEvent) -> object:
        tag, text = event.tag, str(event.value)
        if not text.isascii() and _SURROGATE.search(text):
            raise self._refuse("half a surrogate pair is no character")
        if event.implicit[0]:
            return resolve_plain(text)
        if tag in (None, "!", "tag:yaml.org,2002:str"):
            return text
        if tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float", "tag:yaml.org,2002:null"):
            return resolve_plain(text)
        raise self._refuse(f"the tag {tag} is not understood")

    def _refuse(self, message: str) -> MalformedDocument:
        return _malformed(message, self._event.start_mark if self._event else None, self._first_line)


_UNKNOWN = _Anchored(None, 0, 0)


def _merge(target: SourceMapping, sources: list[SourceMapping]) -> None:
    """YAML 1.1 merge keys: what the mapping says itself wins, then earlier sources over later ones."""
    for source in sources:
        for key, value in source.items():
            if key not in target:
                target[key] = value
                target.lines[key] = source.lines[key]


_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_TRUE = frozenset({"true", "True", "TRUE", "yes", "Yes", "YES", "on", "On", "ON"})
_FALSE = frozenset({"false", "False", "FALSE", "no", "No", "NO", "off", "Off", "OFF"})
_INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9]{0,18})\Z")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]{1,3})?\Z")


def resolve_plain(text: str) -> bool | int | float | str | None:
    """What an unquoted scalar stands for. Octal, hexadecimal and binary notations and dates stay text."""
    if text in _NULL:
        return None
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    if _INTEGER.match(text):
        return int(text)
    if len(text) <= 64 and _FLOAT.match(text):
        return float(text)
    return text

"""A directory of Kubernetes YAML as a source of objects: watched, forgiving of mistakes, the last good version kept.

The first path is the user's, perhaps with one beside it for what programs deploy; the others hold status overlays (`mesh.kube.overlay`)
that are merged onto these objects. What goes wrong is never an exception but a `SourceProblem`, and costs as little as possible: a
malformed document keeps what its file defined, an object with a mistake keeps its last good version, a policy with a mistake that never had
one is handed on with its problems, to be enforced closed.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Self

import trio

from mesh.kube.checked import check_object
from mesh.kube.documents import MAX_FILE_SIZE, MalformedDocument, parse_chunk, parse_json, split_documents
from mesh.kube.fields import Fields, describe, did_you_mean
from mesh.kube.files import directories_under, files_under
from mesh.kube.kinds import KINDS, Kind, find_slip
from mesh.kube.label_edit import LabelError, edit_label, edit_labels
from mesh.kube.objects import KubeObject, Layer, ObjectKey, Origin, SourceProblem, SourceSequence
from mesh.kube.overlay import merge_patch, remove_overlay, write_overlay
from mesh.kube.store import Changes
from mesh.linux.inotify import DirectoryWatch

__all__ = [
    "IMPLICIT_NAMESPACES",
    "Changes",
    "DirectoryStore",
    "LabelError",
    "SourceProblem",
    "edit_label",
    "edit_labels",
    "remove_overlay",
    "write_overlay",
]

IMPLICIT_NAMESPACES = frozenset({"default", "kube-system", "kube-public", "kube-node-lease", "istio-system"})
"""Namespaces that need no Namespace object: Kubernetes makes the first four itself, the last is the mesh's own."""

RESCAN_INTERVAL = 2.0
"""Seconds between looks at the directory when the kernel reports nothing: inotify misses what happens in a directory between its creation
and the watch on it, on some network and overlay file systems everything, and its watches are a limited resource."""
_QUIET = 0.02
"""Seconds. An editor's save is several events: this long without a further one ends it."""
_DEBOUNCE = 0.2
"""...but a directory that never comes to rest is looked at this often."""

_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?\Z")
_NAMESPACE = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?\Z")


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A document that names an object of a kind we read; whether its fields are right is found out after merging."""

    key: ObjectKey
    api_version: str
    layer: Layer


@dataclass(frozen=True, slots=True)
class _File:
    """What was found in a file, to be used again while the file does not change."""

    signature: tuple[int, int, int, int]
    candidates: tuple[_Candidate, ...] = ()
    problems: tuple[SourceProblem, ...] = ()
    malformed: bool = False
    """A part could not be attributed to an object: whatever the file defined before may have been it, and stays."""
    ignored: Mapping[str, Origin] = field(default_factory=dict)
    chunks: Mapping[str, tuple[object, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Verdict:
    """What became of an object's layers; the same layers need no second look."""

    layers: tuple[Layer, ...]
    built: KubeObject | None
    problems: tuple[SourceProblem, ...]


@dataclass(frozen=True, slots=True)
class _State:
    files: Mapping[tuple[int, str], _File] = field(default_factory=dict)
    verdicts: Mapping[ObjectKey, _Verdict] = field(default_factory=dict)
    objects: Mapping[ObjectKey, KubeObject] = field(default_factory=dict)
    problems: tuple[SourceProblem, ...] = ()
    ignored_kinds: Mapping[str, Origin] = field(default_factory=dict)


class DirectoryStore:
    """The objects of a directory. Reading methods answer from memory; `load` and `watch` bring it up to date.

    For one task at a time: neither `load` beside a running `watch`, nor two watches, of one store.
    """

    def __init__(self, paths: Sequence[Path], *, bases: int = 1, implicit_namespaces: Iterable[str] = IMPLICIT_NAMESPACES) -> None:
        """``bases``: so many of the paths, the first of them, hold objects: the user's, and what programs deploy beside them. Of two
        objects of one name the first path's counts."""
        if not 1 <= bases <= len(paths):
            raise ValueError("a DirectoryStore needs at least the user's directory")
        self._roots = _Roots(tuple(Path(path) for path in paths), bases)
        self._implicit = frozenset(implicit_namespaces)
        self._state = _State()

    @property
    def problems(self) -> tuple[SourceProblem, ...]:
        """Every mistake in the directory as it is now, in order of file and line."""
        return self._state.problems

    @property
    def ignored_kinds(self) -> Mapping[str, Origin]:
        """``apiVersion/kind`` of objects that are not read, with the first place of each."""
        return self._state.ignored_kinds

    def objects(self, *kinds: str) -> list[KubeObject]:
        """All objects of these kinds (none given: of all), by namespace and name within a kind."""
        return [obj for key, obj in self._state.objects.items() if not kinds or key.kind in kinds]

    def find(self, kind: str, namespace: str, name: str) -> KubeObject | None:
        return self._state.objects.get(ObjectKey(kind, namespace, name))

    def load(self) -> Changes:
        """Look at the directory now; blocks on the file system. What the first look finds is all reported as changed."""
        return self._adopt(_look(self._roots, self._state, self._implicit))

    async def watch(self) -> AsyncGenerator[Changes, None]:
        """Yield changes as they happen, for ever, from what `load` saw last; files are read in a thread.

        Consume it in one task, and close it (`contextlib.aclosing`) when leaving early.
        """
        with _Attention(self._roots.paths) as attention:
            while True:
                # Watching comes before looking, so that nothing falls between the two.
                await trio.to_thread.run_sync(attention.renew)
                state = await trio.to_thread.run_sync(_look, self._roots, self._state, self._implicit, abandon_on_cancel=True)
                changes = self._adopt(state)
                if changes:
                    yield changes
                await attention.wait()

    def _adopt(self, state: _State) -> Changes:
        before, self._state = self._state, state
        if state is before:
            return Changes()
        keys = before.objects.keys() | state.objects.keys()
        changed = frozenset(key for key in keys if before.objects.get(key) is not state.objects.get(key))
        return Changes(changed, before.problems != state.problems)


class _Roots(NamedTuple):
    paths: tuple[Path, ...]
    bases: int
    """How many of them hold objects; the others hold overlays."""


class _Attention:
    """Knows when it is worth looking at the directories again: when the kernel says so, or after `RESCAN_INTERVAL`."""

    def __init__(self, roots: Sequence[Path]) -> None:
        self._roots = roots
        self._watch: DirectoryWatch | None
        try:
            self._watch = DirectoryWatch()
        except OSError:
            self._watch = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._watch is not None:
            self._watch.close()

    def renew(self) -> None:
        """Watch every directory there is now."""
        if self._watch is None:
            return
        self._watch.drain()
        for root in self._roots:
            for directory, _ in directories_under(root):
                try:
                    self._watch.add(Path(directory))
                except OSError:
                    continue

    async def wait(self) -> None:
        with trio.move_on_after(RESCAN_INTERVAL):
            if self._watch is None:
                await trio.sleep_forever()
            await trio.lowlevel.wait_readable(self._watch)
        with trio.move_on_after(_DEBOUNCE):
            await self._wait_for_quiet()

    async def _wait_for_quiet(self) -> None:
        while self._watch is not None:
            self._watch.drain()
            with trio.move_on_after(_QUIET) as quiet:
                await trio.lowlevel.wait_readable(self._watch)
            if quiet.cancelled_caught:
                return


def _look(roots: _Roots, before: _State, implicit: frozenset[str]) -> _State:
    """The state of the directories now, sharing everything that did not change."""
    files: dict[tuple[int, str], _File] = {}
    for index, root in enumerate(roots.paths):
        failures: list[OSError] = []
        for path in files_under(root, failures.append):
            key = (index, str(path))
            files[key] = _read_file(path, _display(path, root, index), before.files.get(key), overlay=index >= roots.bases)
        for failure in failures:
            files |= _keep_unlisted(failure, root, index, before)
    if files.keys() == before.files.keys() and all(files[key] is before.files[key] for key in files):
        return before
    return _Assembly(files, before, implicit, roots.bases).finish()


def _keep_unlisted(failure: OSError, root: Path, index: int, before: _State) -> dict[tuple[int, str], _File]:
    """What was in a directory that can't be listed now, and that it can't: a volume that is away for a moment deletes nothing. The user's
    whole directory does not go by itself either; any other directory may."""
    directory = Path(str(failure.filename))
    if failure.errno == errno.ENOENT and (index > 0 or directory != root):
        return {}
    kept = {key: file for key, file in before.files.items() if key[0] == index and Path(key[1]).is_relative_to(directory)}
    if not kept:
        return {}
    problem = SourceProblem(_display(directory, root, index), 0, "", f"cannot be listed: {failure.strerror}; what it defined stays")
    key = (index, str(directory))
    known = kept.get(key)
    return {**kept, key: known if known is not None and known.problems == (problem,) else _File((0, 0, 0, 0), problems=(problem,))}


def _display(path: Path, root: Path, index: int) -> str:
    """Users know their files by the name within their directory; overlays are named in full."""
    return str(path.relative_to(root)) if index == 0 else str(path)


def _read_file(path: Path, display: str, before: _File | None, *, overlay: bool) -> _File:
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            info = os.fstat(file.fileno())
            signature = (info.st_mtime_ns, info.st_size, info.st_ino, info.st_ctime_ns)
            if before is not None and before.signature == signature:
                return before
            if not stat.S_ISREG(info.st_mode):
                return _unreadable(signature, before, display, "not a regular file")
            if info.st_size == 0 and before is not None and before.candidates:
                # Being written, or cut off by accident; a file meant to go away is deleted.
                return _unreadable(signature, before, display, "empty; what it defined stays until it is deleted or has content again")
            if info.st_size > MAX_FILE_SIZE:
                return _unreadable(signature, before, display, f"larger than {MAX_FILE_SIZE >> 20} MiB")
            content = file.read(MAX_FILE_SIZE + 1)
        text = content.decode("utf-8-sig")
    except OSError as exc:
        return _unreadable((0, 0, 0, 0), before, display, exc.strerror or str(exc))
    except UnicodeDecodeError as exc:
        return _unreadable(signature, before, display, f"not UTF-8 text (byte {exc.start})")
    return _FileReader(display, before, overlay=overlay).read(text, signature, as_json=overlay and path.suffix == ".json")


def _unreadable(signature: tuple[int, int, int, int], before: _File | None, display: str, message: str) -> _File:
    kept = before.candidates if before else ()
    return _File(signature, kept, (SourceProblem(display, 0, "", f"cannot be read: {message}"),), malformed=True)


class _FileReader:
    """Takes one file apart into candidates."""

    def __init__(self, display: str, before: _File | None, *, overlay: bool) -> None:
        self._display = display
        self._before = before
        self._overlay = overlay
        self._candidates: dict[ObjectKey, _Candidate] = {}
        self._problems: list[SourceProblem] = []
        self._ignored: dict[str, Origin] = {}
        self._malformed = False

    def read(self, text: str, signature: tuple[int, int, int, int], *, as_json: bool) -> _File:
        chunks: dict[str, tuple[object, ...]] = {}
        if as_json:
            self._parse_json(text)
        else:
            known = self._before.chunks if self._before else {}
            for index, chunk in enumerate(split_documents(text)):
                try:
                    values = known[chunk.text] if chunk.text in known else tuple(parse_chunk(chunk))
                except MalformedDocument as exc:
                    self._complain_malformed(exc)
                    continue
                chunks[chunk.text] = values
                for value in values:
                    self._take(value, Origin(self._display, index, chunk.line + 1))
        if self._malformed and self._before:
            for candidate in self._before.candidates:
                self._candidates.setdefault(candidate.key, candidate)
        return _File(signature, tuple(self._candidates.values()), tuple(self._problems), self._malformed, self._ignored, chunks)

    def _parse_json(self, text: str) -> None:
        try:
            self._take(parse_json(text), Origin(self._display, 0, 1))
        except MalformedDocument as exc:
            self._complain_malformed(exc)

    def _complain_malformed(self, exc: MalformedDocument) -> None:
        self._malformed = True
        self._problems.append(SourceProblem(self._display, exc.line, "", f"column {exc.column}: {exc.message}"))

    def _take(self, value: object, origin: Origin) -> None:
        if value is None:
            return
        if not isinstance(value, dict):
            self._malformed = True
            line = origin.line + (value.line if isinstance(value, SourceSequence) else 0)
            self._problems.append(SourceProblem(self._display, line, "", f"expected an object (a mapping), found {describe(value)}"))
            return
        items = value.get("items")
        if isinstance(value.get("kind"), str) and str(value["kind"]).endswith("List") and isinstance(items, list):
            for item in items:
                self._take(item, origin)
            return
        self._take_object(Layer(origin, value))

    def _take_object(self, layer: Layer) -> None:
        draft = KubeObject("", "", "", "", layer.tree, (layer,))
        fields = Fields(draft)
        api_version = fields.string("apiVersion", required=not self._overlay)
        kind_name = fields.string("kind", required=True)
        kind = KINDS.get(kind_name)
        if not fields.problems and (kind is None or not (self._overlay or kind.serves(api_version))):
            slip = None if self._overlay else find_slip(api_version, kind_name)
            if slip is None:
                self._ignored.setdefault(f"{api_version}/{kind_name}", layer.origin)
                return
            fields.complain(*slip)
        metadata = fields.mapping("metadata", required=True)
        if metadata is not None and kind is not None:
            key = _read_key(metadata, kind_name, kind)
            if not fields.problems:
                self._add(_Candidate(key, api_version, layer), draft)
                return
        # Which object this was meant to be is not known.
        self._malformed = True
        self._problems.extend(fields.problems)

    def _add(self, candidate: _Candidate, draft: KubeObject) -> None:
        first = self._candidates.setdefault(candidate.key, candidate)
        if first is not candidate:
            self._problems.append(_duplicate(draft, candidate.key, first.layer))


def find_name_mistake(name: str) -> str | None:
    """What an API server would not take as an object's name."""
    return None if _NAME.match(name) else f"'{name[:80]}' is no name for an object: lower case letters, digits, '-' and '.' only"


def _read_key(metadata: Fields, kind_name: str, kind: Kind) -> ObjectKey:
    name = metadata.string("name", required=True)
    if name and (mistake := find_name_mistake(name)):
        metadata.complain("name", mistake)
    namespace = metadata.string("namespace", "default") if kind.namespaced else ""
    if kind.namespaced and not _NAMESPACE.match(namespace):
        metadata.complain("namespace", f"'{namespace[:80]}' is no name for a namespace: lower case letters, digits and '-' only")
    return ObjectKey(kind_name, namespace, name)


def _duplicate(draft: KubeObject, key: ObjectKey, first: Layer) -> SourceProblem:
    line, _ = first.line_of(())
    return draft.problem(("metadata", "name"), f"{key} is already defined at {first.origin.file}:{line}; that one is used")


class _Assembly:
    """Objects out of files: overlays merged, mistakes found, last good versions kept."""

    def __init__(self, files: Mapping[tuple[int, str], _File], before: _State, implicit: frozenset[str], bases: int) -> None:
        self._files = files
        self._bases = bases
        self._before = before
        self._implicit = implicit
        self._problems: list[SourceProblem] = []
        self._ignored: dict[str, Origin] = {}

    def finish(self) -> _State:
        bases, overlays = self._gather()
        verdicts = {base.key: self._judge(base, overlays.get(base.key, ())) for base in bases}
        objects: dict[ObjectKey, KubeObject] = {}
        known = {key.name for key, verdict in verdicts.items() if key.kind == "Namespace" and self._choose(key, verdict)}
        for key in sorted(verdicts):
            verdict = verdicts[key]
            self._problems.extend(verdict.problems)
            chosen = self._choose(key, verdict)
            if chosen is not None and self._in_known_namespace(chosen, known):
                objects[key] = chosen
        return _State(self._files, verdicts, objects, tuple(sorted(set(self._problems))), self._ignored)

    def _gather(self) -> tuple[list[_Candidate], dict[ObjectKey, tuple[Layer, ...]]]:
        bases: dict[ObjectKey, _Candidate] = {}
        overlays: dict[ObjectKey, tuple[Layer, ...]] = {}
        for (index, _), file in self._files.items():
            self._problems.extend(file.problems)
            for kind, origin in file.ignored.items():
                self._ignored.setdefault(kind, origin)
            for candidate in file.candidates:
                if index >= self._bases:
                    overlays[candidate.key] = (*overlays.get(candidate.key, ()), candidate.layer)
                elif (first := bases.setdefault(candidate.key, candidate)) is not candidate:
                    draft = KubeObject("", "", "", "", candidate.layer.tree, (candidate.layer,))
                    self._problems.append(_duplicate(draft, candidate.key, first.layer))
        return list(bases.values()), overlays

    def _judge(self, base: _Candidate, overlays: tuple[Layer, ...]) -> _Verdict:
        layers = (base.layer, *overlays)
        known = self._before.verdicts.get(base.key)
        if known is not None and _same_layers(known.layers, layers):
            return known
        raw: object = base.layer.tree
        for overlay in overlays:
            raw = merge_patch(raw, overlay.tree)
        assert isinstance(raw, Mapping)
        built = check_object(base.api_version, base.key, raw, layers)
        return _Verdict(layers, built if not built.problems or KINDS[base.key.kind].hands_on_mistakes else None, built.problems)

    def _choose(self, key: ObjectKey, verdict: _Verdict) -> KubeObject | None:
        """The object as it is now, if it is good, else the last good one, else whatever may stand in for it."""
        if verdict.problems:
            last = self._before.objects.get(key)
            if last is not None and not last.problems:
                return last
        return verdict.built

    def _in_known_namespace(self, obj: KubeObject, known: set[str]) -> bool:
        if not obj.namespace or obj.namespace in known or obj.namespace in self._implicit:
            return True
        hint = did_you_mean(obj.namespace, known)
        self._problems.append(obj.problem(("metadata", "namespace"), f"there is no Namespace '{obj.namespace}' in this directory{hint}"))
        return obj.key in self._before.objects


def _same_layers(before: Sequence[Layer], now: Sequence[Layer]) -> bool:
    return len(before) == len(now) and all(a.tree is b.tree and a.origin == b.origin for a, b in zip(before, now, strict=True))

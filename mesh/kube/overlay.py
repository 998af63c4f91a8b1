"""Overlays: status that programs write beside the user's files, merged onto objects of the same kind, namespace and name."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from mesh.kube.objects import ObjectKey


def merge_patch(target: object, patch: object) -> object:
    """RFC 7386: mappings merge, ``null`` removes, anything else replaces. Neither argument is changed; what is not touched is shared."""
    if not isinstance(patch, Mapping):
        return patch
    merged: dict[str, object] = dict(target) if isinstance(target, Mapping) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = merge_patch(merged.get(key), value)
    return merged


def overlay_path(directory: Path, key: ObjectKey) -> Path:
    """One file per object: ``pod_shop_web-1.json``. ``_`` cannot occur in names of Kubernetes, so no two objects share a file."""
    return directory / f"{key.kind.lower()}_{key.namespace}_{key.name}.json"


def write_overlay(directory: Path, kind: str, namespace: str, name: str, patch: Mapping[str, object]) -> None:
    """Make ``patch`` (e.g. ``{"status": {...}}``) this directory's overlay of the object, replacing an earlier one.

    Readers see the old or the new file, never a part: a hidden file is written and renamed. Nothing is written when nothing changes.
    Not fsynced: status is written again by whoever knows it. Raises OSError.
    """
    metadata = {"name": name, "namespace": namespace} if namespace else {"name": name}
    head: dict[str, object] = {"kind": kind, "metadata": metadata}
    text = json.dumps(merge_patch(patch, head), indent=1) + "\n"
    path = overlay_path(directory, ObjectKey(kind, namespace, name))
    try:
        if path.read_text(encoding="utf-8") == text:
            return
    except (FileNotFoundError, UnicodeDecodeError):
        pass
    directory.mkdir(parents=True, exist_ok=True)
    replace_file(path, text.encode())


def remove_overlay(directory: Path, kind: str, namespace: str, name: str) -> None:
    """Withdraw this directory's overlay of the object, if there is one. Raises OSError."""
    overlay_path(directory, ObjectKey(kind, namespace, name)).unlink(missing_ok=True)


def replace_file(path: Path, content: bytes) -> None:
    """Write ``path`` so that readers see all of the old or all of the new content; mode and owner of an existing file stay."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            try:
                before = path.stat()
            except FileNotFoundError:
                pass
            else:
                os.fchmod(file.fileno(), before.st_mode & 0o7777)
                if (before.st_uid, before.st_gid) != (os.geteuid(), os.getegid()) and os.geteuid() == 0:
                    os.fchown(file.fileno(), before.st_uid, before.st_gid)
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise

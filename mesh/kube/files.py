"""Which files of a directory are read: YAML and JSON by suffix, hidden ones left out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

_SUFFIXES = (".yaml", ".yml", ".json")


OnError: TypeAlias = Callable[[OSError], None]
"""Told of a directory that can't be listed (``filename``); it is passed over."""


def directories_under(root: Path, on_error: OnError | None = None) -> Iterator[tuple[str, list[str]]]:
    """Each directory that is read, with the names of its files; nothing for a root that is not there."""
    for directory, names, files in os.walk(root, onerror=on_error):
        names[:] = sorted(name for name in names if not name.startswith("."))
        yield directory, files


def files_under(root: Path, on_error: OnError | None = None) -> Iterator[Path]:
    """The files in path order. Hidden files and directories are left out: editors and atomic writers keep their drafts there."""
    for directory, files in directories_under(root, on_error):
        for name in sorted(files):
            if name.endswith(_SUFFIXES) and not name.startswith("."):
                yield Path(directory, name)

"""Setting and removing a label in the user's YAML, so that no byte changes but those of the label."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


class LabelError(Exception):
    """The label could not be set; the message is for the user, and nothing was written."""


def edit_label(directory: Path, kind: str, name: str, key: str, value: str | None, *, namespace: str = "") -> Path | None:
    """Set one label of an object, or remove it (``value`` None). See `edit_labels`."""
    return edit_labels(directory, kind, name, {key: value}, namespace=namespace)


def edit_labels(directory: Path, kind: str, name: str, labels: Mapping[str, str | None], *, namespace: str = "") -> Path | None:
    """Set labels of an object (value None: remove). Returns the file that was rewritten, None when all was so already.

    ``namespace`` is for namespaced kinds. Raises LabelError when there is no such object (naming those there are), when the file
    cannot be parsed, or when the key or value is not a label.
    """
    raise LabelError("not yet")

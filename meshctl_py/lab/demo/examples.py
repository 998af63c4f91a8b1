"""The files that the demo shows, and that tests on a real cluster apply too."""

from __future__ import annotations

from pathlib import Path
from typing import Final

EXAMPLES: Final = Path(__file__).resolve().parents[3] / "examples"


def read_example(file: str, **values: str) -> str:
    """The text of a file there; each of ``values`` takes the place of the word that is its name."""
    text = (EXAMPLES / file).read_text()
    for word, value in values.items():
        text = text.replace(word, value)
    return text

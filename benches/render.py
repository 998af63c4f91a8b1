"""Placeholder written next."""

from pathlib import Path

ROWS = Path("bench.json")


def render() -> None: ...

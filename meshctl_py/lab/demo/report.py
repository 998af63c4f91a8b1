"""Claims, each with what was seen: printed a line each, and counted."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from functools import partial

from rich.text import Text

from meshctl_py.lab.home import LabError
from meshctl_py.table import OUT


class Unmet(Exception):
    """A claim that does not hold; the text is what was seen instead."""


def expect(beginning: str, answer: str) -> str:
    """The answer as evidence. Raises Unmet if it begins otherwise."""
    if not answer.startswith(beginning):
        raise Unmet(f"expected {beginning!r}, got {answer!r}")
    return f'"{answer}"'


class Report:
    """Prints a line a claim, and counts."""

    def __init__(self) -> None:
        self.passed = self.failed = 0
        self._began = time.monotonic()

    def step(self, text: str) -> None:
        """What is being done now."""
        OUT.print(Text(f"[{time.monotonic() - self._began:5.1f} s] {text}", style="dim"))

    def claim(self, text: str, check: Callable[[], str]) -> None:
        """Try a claim: ``check`` returns its evidence, or raises what speaks against it."""
        try:
            evidence = check()
        except (Unmet, LabError, OSError, ValueError, subprocess.SubprocessError) as exc:
            self.failed += 1
            OUT.print(Text.assemble(("FAILED", "red"), f" {text}: {exc}"))
        else:
            self.passed += 1
            OUT.print(Text.assemble(("ok", "green"), f"     {text}: {evidence}"))

    def claim_both(self, text: str, check: Callable[[str], str]) -> None:
        """Try a claim over IPv4 and over IPv6; ``check`` is given "4" or "6"."""
        for family in ("4", "6"):
            self.claim(f"{text}, IPv{family}", partial(check, family))

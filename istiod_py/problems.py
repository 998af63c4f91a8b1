"""Mistakes in the user's configuration: each is logged once when it appears and once when it is gone, and listed while it lasts."""

from __future__ import annotations

from collections.abc import Iterable

from mesh.kube.objects import SourceProblem
from mesh.telemetry.log import get_logger

_log = get_logger("source")


class ProblemLog:
    """Knows the current problems. A problem is the same when file, field and message are: a line that moved is no news."""

    def __init__(self) -> None:
        self._current: dict[tuple[str, str, str], SourceProblem] = {}

    @property
    def current(self) -> list[SourceProblem]:
        """In order of file and line."""
        return sorted(self._current.values())

    def update(self, problems: Iterable[SourceProblem]) -> None:
        """These are all problems now."""
        now = {(problem.file, problem.field, problem.message): problem for problem in problems}
        for key in now.keys() - self._current.keys():
            problem = now[key]
            _log.error("problem", file=problem.file, line=problem.line, field=problem.field, message=problem.message)
        for key in self._current.keys() - now.keys():
            problem = self._current[key]
            _log.info("problem.gone", file=problem.file, field=problem.field, message=problem.message)
        self._current = now

    def describe(self) -> list[dict[str, object]]:
        """JSON of ``/debug/problems``."""
        return [{"file": p.file, "line": p.line, "field": p.field, "message": p.message} for p in self.current]

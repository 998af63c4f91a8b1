"""The page that shows and changes a program's log levels, as ztunnel's and Envoy's ``/logging`` does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from mesh.runtime.http import Request, Response, Route
from mesh.telemetry import log

_USAGE: Final = "usage: POST /logging (show), POST /logging?level=debug, POST /logging?level=access=debug,info, POST /logging?reset\n"


class LevelsPage:
    """``reset`` goes back to the levels at the time this is made. ``set_levels`` may tell other processes too."""

    def __init__(self, set_levels: Callable[[log.LogLevels], None] = log.set_levels) -> None:
        self._set_levels = set_levels
        self._first = log.current_levels()

    def route(self) -> Route:
        return Route(self._serve, frozenset({"POST"}), usage=_USAGE)

    async def _serve(self, request: Request) -> Response:
        if "reset" in request.query:
            self._set_levels(self._first)
        if "level" in request.query:
            try:
                self._set_levels(log.LogLevels.parse(request.query["level"]))
            except log.InvalidLogSettings as exc:
                return Response.text(f"{exc}\n{_USAGE}", 400)
        return Response.text(f"current log level is {log.current_levels()}")

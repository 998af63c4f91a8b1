"""Logging of all programs: structlog, one line an event, in the node proxy's plain format or as JSON; levels by scope.

Plain: ``<RFC 3339, microseconds>Z\\t<level>\\t<scope>\\t<event>\\t<k=v ...>``.
JSON: ``level``, ``time``, ``scope``, ``message``, then the fields.
Events are names, not sentences (``log.info("xds.connected", address=...)``); whatever a peer or a file gave is escaped, so that no
value can start a line or forge a field.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final, TextIO, TypeAlias, cast

import msgspec
import structlog

from mesh.telemetry.output import LogOutput

Logger: TypeAlias = structlog.typing.FilteringBoundLogger

LEVELS: Final[Mapping[str, int]] = {"trace": 5, "debug": 10, "info": 20, "warn": 30, "error": 40, "off": 100}
_SEVERITY: Final[Mapping[str, int]] = {**LEVELS, "warning": 30, "exception": 40, "critical": 50}
_SHOWN: Final[Mapping[str, str]] = {"warning": "warn", "exception": "error", "critical": "error"}


class InvalidLogSettings(ValueError):
    """The text names no level, or no format."""


@dataclass(frozen=True, slots=True)
class LogLevels:
    """The level of every scope: ``default``, and in ``scopes`` of single ones (``xds`` covers ``xds.client`` too)."""

    default: str = "info"
    scopes: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(cls, text: str) -> LogLevels:
        """Parse ``info`` or ``access=debug,info`` (the syntax of RUST_LOG that users of the node proxy know). Raises InvalidLogSettings."""
        default, scopes = "info", dict[str, str]()
        for directive in filter(None, (part.strip() for part in text.split(","))):
            scope, equals, level = directive.rpartition("=")
            level = level.lower()
            if level not in LEVELS or (equals and not scope):
                raise InvalidLogSettings(f"not a log level: {directive!r} (expected {', '.join(LEVELS)}, or SCOPE=LEVEL)")
            if equals:
                scopes[scope] = level
            else:
                default = level
        return cls(default, tuple(scopes.items()))

    def threshold(self, scope: str) -> int:
        """The number an event of this scope must reach: that of the longest scope named that covers it."""
        best, level = -1, self.default
        for name, its_level in self.scopes:
            if len(name) > best and (scope == name or scope.startswith(name + ".")):
                best, level = len(name), its_level
        return LEVELS[level]

    def __str__(self) -> str:
        return ",".join([*(f"{scope}={level}" for scope, level in self.scopes), self.default])


class _Sink:
    """Where lines go and which do; one a process, replaced as a whole by `configure` and `set_levels`."""

    def __init__(self, levels: LogLevels, *, as_json: bool, stream: TextIO | LogOutput) -> None:
        self.levels = levels
        self.as_json = as_json
        self.stream = stream
        self._thresholds: dict[str, int] = {}

    def wants(self, scope: str, severity: int) -> bool:
        threshold = self._thresholds.get(scope)
        if threshold is None:
            threshold = self._thresholds[scope] = self.levels.threshold(scope)
        return severity >= threshold


_sink = _Sink(LogLevels(), as_json=False, stream=sys.stdout)


def configure(levels: LogLevels | None = None, *, as_json: bool = False, stream: TextIO | LogOutput | None = None) -> None:
    """Set up logging of this process; called once by a program's entry point. Without ``stream`` lines go to standard output."""
    global _sink
    _sink = _Sink(levels or LogLevels(), as_json=as_json, stream=stream or sys.stdout)
    structlog.configure(
        processors=[_drop_below_level, structlog.processors.format_exc_info, _render],
        wrapper_class=structlog.make_filtering_bound_logger(0),
        logger_factory=_LineLogger,
        cache_logger_on_first_use=False,
    )


def configure_from(environ: Mapping[str, str] = os.environ, *, stream: LogOutput | None = None) -> None:
    """`configure` from ``RUST_LOG`` (levels) and ``LOG_FORMAT`` (``plain`` or ``json``). Raises InvalidLogSettings."""
    form = environ.get("LOG_FORMAT", "plain")
    if form not in ("plain", "json"):
        raise InvalidLogSettings(f"invalid env var LOG_FORMAT={form!r} (expected plain or json)")
    configure(LogLevels.parse(environ.get("RUST_LOG", "info")), as_json=form == "json", stream=stream)


def set_levels(levels: LogLevels) -> None:
    """Change the levels of the running process (admin ``POST /logging``)."""
    global _sink
    _sink = _Sink(levels, as_json=_sink.as_json, stream=_sink.stream)


def current_levels() -> LogLevels:
    return _sink.levels


def writes_json() -> bool:
    """Whether this process logs JSON; the access log follows."""
    return _sink.as_json


def wants(scope: str, level: str) -> bool:
    """Whether an event of this scope and level would be written: asked before building a costly one."""
    return _sink.wants(scope, _SEVERITY[level])


def get_logger(scope: str, **bound: object) -> Logger:
    """The logger of a scope, with fields that all its events carry."""
    return cast(Logger, structlog.get_logger(scope=scope, **bound))


def timestamp(seconds: float | None = None) -> str:
    """A Unix time, by default now, as every line begins: RFC 3339 in UTC with microseconds."""
    micros = round((time.time() if seconds is None else seconds) * 1_000_000)
    return f"{_second(micros // 1_000_000)}.{micros % 1_000_000:06}Z"


@lru_cache(maxsize=16)
def _second(seconds: int) -> str:
    """Lines come many to the second."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def quoted(text: str) -> str:
    """The text in double quotes, with quotes, backslashes and everything unprintable escaped as in JSON."""
    if text.isprintable() and '"' not in text and "\\" not in text:
        return f'"{text}"'
    return json.dumps(text)


class _LineLogger:
    """Structlog's innermost logger: writes a rendered line, whatever the method. ``scope`` is what ``structlog.get_logger`` was given."""

    def __init__(self, scope: str = "") -> None:
        self.scope = scope

    def msg(self, line: str) -> None:
        stream = _sink.stream
        try:
            stream.write(line)
            stream.flush()
        except OSError:
            pass  # a full disk, a closed pipe: costs the line, never what was being done

    debug = info = warning = error = exception = critical = msg


def _drop_below_level(logger: _LineLogger, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    scope = event.setdefault("scope", logger.scope)
    if not _sink.wants(scope, _SEVERITY[method]):
        raise structlog.DropEvent
    return event


def _render(logger: object, method: str, event: MutableMapping[str, Any]) -> str:
    scope, message = event.pop("scope", ""), event.pop("event", "")
    level = _SHOWN.get(method, method)
    if _sink.as_json:
        fields = {"level": level, "time": timestamp(), "scope": scope, "message": message, **event}
        return msgspec.json.encode(fields, enc_hook=str).decode() + "\n"
    text = str(message)
    line = f"{timestamp()}\t{level}\t{scope}\t{text if text.isprintable() else quoted(text)}"
    if not event:
        return line + "\n"
    return f"{line}\t{' '.join(f'{key}={_plain(value)}' for key, value in event.items())}\n"


def _plain(value: object) -> str:
    if value is None or isinstance(value, bool | int | float):
        return str(value).lower() if isinstance(value, bool) else str(value)
    return quoted(str(value))

"""The access log of a waypoint: a line for each request, connection and refusal, as Envoy would write it or as it is configured.

What is configured is looked at for every line, and compiled when it is another than before: a change holds from the next line on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeAlias

import msgspec

from mesh.model.l7.waypoint import AccessLogging
from mesh.telemetry.log import get_logger
from mesh.telemetry.operators import DEFAULT_JSON_FORMAT, DEFAULT_TEXT_FORMAT, Facts, InvalidFormat, compile_format
from mesh.telemetry.output import LogOutput

SCOPE: Final = "access"
"""Lines are written at the level ``info`` of this scope."""

Render: TypeAlias = Callable[[Facts], str]
"""One line with its newline."""

_log = get_logger("access_log")


def compile_lines(logging: AccessLogging) -> tuple[Render, tuple[str, ...]]:
    """What makes lines, and what in the format has no effect. Raises InvalidFormat."""
    return _compile_json(logging) if logging.as_json else _compile_text(logging)


def _compile_text(logging: AccessLogging) -> tuple[Render, tuple[str, ...]]:
    text = logging.format or DEFAULT_TEXT_FORMAT
    compiled = compile_format(text if text.endswith("\n") else text + "\n")
    return compiled.render_line, compiled.warnings


def _compile_json(logging: AccessLogging) -> tuple[Render, tuple[str, ...]]:
    keys = logging.json or tuple(DEFAULT_JSON_FORMAT.items())
    values = [(key, compile_format(text)) for key, text in keys]
    encode = msgspec.json.Encoder().encode

    def render(facts: Facts) -> str:
        return encode({key: value.value(facts) for key, value in values}).decode() + "\n"

    return render, tuple(dict.fromkeys(warning for _, value in values for warning in value.warnings))


class AccessLog:
    """Writes lines: those of one turn of the event loop leave in one write, none later than that turn's end.

    ``call_soon`` is the loop's own; ``wanted`` says whether lines are written at all, whatever is configured.
    """

    def __init__(
        self,
        settings: Callable[[], AccessLogging],
        output: LogOutput,
        call_soon: Callable[[Callable[[], None]], object],
        *,
        wanted: Callable[[], bool],
    ) -> None:
        self._settings = settings
        self._output = output
        self._call_soon = call_soon
        self._wanted = wanted
        self._compiled_of = AccessLogging()
        self._render, _ = compile_lines(self._compiled_of)
        self._lines: list[str] = []

    def write(self, facts: Facts) -> None:
        """One line, if there is to be any."""
        logging = self._settings()
        if not logging.enabled or not self._wanted():
            return
        if logging is not self._compiled_of:
            self._compile(logging)
        if not self._lines:
            self._call_soon(self.flush)
        self._lines.append(self._render(facts))

    def flush(self) -> None:
        """Write what is buffered. A log that can't be written costs its lines, never the requests."""
        lines, self._lines = self._lines, []
        self._output.write("".join(lines))
        self._output.flush()

    def _compile(self, logging: AccessLogging) -> None:
        if logging != self._compiled_of:
            try:
                self._render, warnings = compile_lines(logging)
            except InvalidFormat as exc:
                # No line would be worse than a line of another form.
                self._render, _ = compile_lines(AccessLogging(as_json=logging.as_json))
                _log.error("format.refused", error=str(exc), used="the default format")
            else:
                for warning in warnings:
                    _log.warning("format.without_effect", reason=warning)
        self._compiled_of = logging

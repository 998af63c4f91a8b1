"""Durations as Istio's and the Gateway API's objects write them: Go's notation."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Final

from mesh.kube.fields import Fields, Text

_UNITS: Final = {
    "ns": Fraction(1, 10**9),
    "us": Fraction(1, 10**6),
    "µs": Fraction(1, 10**6),
    "ms": Fraction(1, 1000),
    "s": Fraction(1),
    "m": Fraction(60),
    "h": Fraction(3600),
}
_GO_PATTERN: Final = r"(([0-9]+(\.[0-9]*)?|\.[0-9]+)(ns|us|µs|ms|s|m|h))+"
_GO: Final = re.compile(_GO_PATTERN)
_PART: Final = re.compile(r"([0-9.]+)(ns|us|µs|ms|s|m|h)")
_GEP_2257_PATTERN: Final = "([0-9]{1,5}(h|m|s|ms)){1,4}"
_GEP_2257: Final = re.compile(_GEP_2257_PATTERN)
_MILLISECOND: Final = Fraction(1, 1000)
_LONGEST: Final = Fraction(315_576_000_000)
"""Seconds that protobuf's Duration can say: 10 000 years."""
_MAX_LENGTH: Final = 64


def parse_duration(text: str) -> Fraction | None:
    """Seconds of ``1h2m3.5s``; None where it is no duration."""
    if len(text) > _MAX_LENGTH or _GO.fullmatch(text) is None:
        return None
    seconds = sum((Fraction(number.rstrip(".")) * _UNITS[unit] for number, unit in _PART.findall(text)), Fraction(0))
    return seconds if seconds <= _LONGEST else None


def _find_mistake(text: str) -> str | None:
    seconds = parse_duration(text)
    if seconds is None:
        return f"expected a duration such as 500ms, 1.5s or 1h30m, found '{text[:_MAX_LENGTH]}'"
    if seconds < _MILLISECOND:
        return f"expected a duration of at least 1ms, found '{text}'"
    if seconds % _MILLISECOND:
        return f"durations are precise to the millisecond, found '{text}'"
    return None


def _find_gateway_mistake(text: str) -> str | None:
    if _GEP_2257.fullmatch(text):
        return None
    return f"expected a duration such as 500ms, 10s or 1h30m (no fractions), found '{text[:_MAX_LENGTH]}'"


DURATION: Final = Text(_find_mistake, {"pattern": f"^{_GO_PATTERN}$", "maxLength": _MAX_LENGTH})
"""Istio's: at least a millisecond, and whole ones."""
GATEWAY_DURATION: Final = Text(_find_gateway_mistake, {"pattern": f"^{_GEP_2257_PATTERN}$"})
"""The Gateway API's (GEP-2257); 0s is one."""


def read_duration(fields: Fields, key: str, text: Text = DURATION) -> float | None:
    """Seconds; None where there is none, or one that is mistaken."""
    seconds = parse_duration(fields.string(key, text=text))
    return None if seconds is None else float(seconds)

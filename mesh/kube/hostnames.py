"""Hostnames as ServiceEntries and WorkloadEntries may give them."""

from __future__ import annotations

import re

_LABEL = r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
HOSTNAME_PATTERN = rf"{_LABEL}(\.{_LABEL})*\.?"
_HOSTNAME = re.compile(HOSTNAME_PATTERN)
MAX_LENGTH = 253


def is_hostname(text: str) -> bool:
    """RFC 1123, and underscores as Istio takes them; no wildcard."""
    return len(text) <= MAX_LENGTH and _HOSTNAME.fullmatch(text) is not None


def is_wildcard(text: str) -> bool:
    """``*.example.com``; a bare ``*`` would be every name there is, and is none."""
    return text.startswith("*.") and is_hostname(text[2:])

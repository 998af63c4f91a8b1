"""Hostnames as ServiceEntries and WorkloadEntries may give them."""

from __future__ import annotations

import re

_LABEL = r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_HOSTNAME = re.compile(rf"{_LABEL}(\.{_LABEL})*\.?\Z")
MAX_LENGTH = 253


def is_hostname(text: str) -> bool:
    """RFC 1123, and underscores as Istio takes them; no wildcard."""
    return len(text) <= MAX_LENGTH and _HOSTNAME.match(text) is not None


def is_wildcard(text: str) -> bool:
    """``*.example.com``; a bare ``*`` would be every name there is, and is none."""
    return text.startswith("*.") and is_hostname(text[2:])

"""Texts that must be addresses or ports, for whoever reads them and for schemas."""

from __future__ import annotations

import re

from mesh.kube.fields import Text
from mesh.model.address import InvalidAddress, parse_cidr

_PORT_PATTERN = "0*([1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5])"
_PORT = re.compile(_PORT_PATTERN)


def _find_port_mistake(text: str) -> str | None:
    return None if _PORT.fullmatch(text) else f"expected a port from 1 to 65535, found '{text}'"


def _find_cidr_mistake(text: str) -> str | None:
    try:
        parse_cidr(text)
    except InvalidAddress as exc:
        return str(exc)
    return None


PORT = Text(_find_port_mistake, {"pattern": f"^{_PORT_PATTERN}$"})
CIDR = Text(_find_cidr_mistake, {"maxLength": 64, "anyOf": [{"format": "ipv4"}, {"format": "ipv6"}, {"format": "cidr"}]})
"""An address, or a range of them."""

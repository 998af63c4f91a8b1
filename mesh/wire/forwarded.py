"""The `forwarded` header (RFC 7239), as far as HBONE uses it: the client's address and the service it asked for.

Like baggage it is a claim for telemetry; policy looks at the certificate and the connection.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mesh.model.address import InvalidAddress, SocketAddress

_LONGEST_HOST = 253


@dataclass(frozen=True, slots=True)
class Forwarded:
    client: SocketAddress | None = None
    """``for``: whose connection the tunnel carries."""
    host: str | None = None
    """``host``: hostname of the service that the client addressed, if it was one."""


def write_forwarded(client: SocketAddress, host: str | None) -> str:
    """The value as ztunnel writes it: ``for="10.0.0.1:4000";host=reviews.default.svc.cluster.local``, the host only if there is one."""
    return f'for="{client}"' if host is None else f'for="{client}";host={host}'


def parse_forwarded(value: str) -> Forwarded:
    """Read a value. Never fails: what cannot be read is absent, the first ``for`` and the first ``host`` count, in whatever element.

    A value that is not ASCII is ignored whole, as ztunnel does.
    """
    client = next((found for text in _texts_of("for", value) if (found := _find_address(text)) is not None), None)
    return Forwarded(client, parse_forwarded_host(value))


def parse_forwarded_host(value: str) -> str | None:
    """The service that the client addressed, if the header names one. What is too long for a hostname is none: it is kept, and a peer may
    send 64 KiB."""
    if "host" not in value.lower():  # most connections are to an address
        return None
    return next((text for text in _texts_of("host", value) if len(text) <= _LONGEST_HOST), None)


def _texts_of(wanted: str, value: str) -> Iterator[str]:
    if wanted not in value.lower() or not value.isascii():
        return
    for pair in value.replace(",", ";").split(";"):
        name, _, text = pair.partition("=")
        text = text.strip().strip('"')
        if text and name.strip().lower() == wanted:
            yield text


def _find_address(text: str) -> SocketAddress | None:
    try:
        return SocketAddress.parse(text)
    except InvalidAddress:
        return None

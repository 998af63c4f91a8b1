"""The `forwarded` header (RFC 7239), as far as HBONE uses it: the client's address and the service it asked for.

Like baggage it is a claim for telemetry; policy looks at the certificate and the connection.
"""

from __future__ import annotations

from dataclasses import dataclass

from mesh.model.address import InvalidAddress, SocketAddress


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
    client: SocketAddress | None = None
    host: str | None = None
    if not value.isascii():
        return Forwarded()
    for pair in value.replace(",", ";").split(";"):
        name, equals, text = pair.partition("=")
        text = text.strip().strip('"')
        match name.strip().lower() if equals and text else "":
            case "for" if client is None:
                client = _find_address(text)
            case "host" if host is None:
                host = text
    return Forwarded(client, host)


def parse_forwarded_host(value: str) -> str | None:
    """The service that the client addressed, if the header names one."""
    return parse_forwarded(value).host


def _find_address(text: str) -> SocketAddress | None:
    try:
        return SocketAddress.parse(text)
    except InvalidAddress:
        return None

"""What policies look at: one request on one connection, with what its token proved, or a connection alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from mesh.http.message import Request
from mesh.model.address import InvalidAddress, IpAddress, parse_ip
from mesh.model.identity import SpiffeId
from waypoint_py.client_hello import ServerName
from waypoint_py.context import Connection

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
TrustsForwarded: TypeAlias = Callable[[SpiffeId], bool]
"""Whether a peer's ``x-forwarded-for`` is believed: a gateway's."""


@dataclass(frozen=True, slots=True)
class TokenFacts:
    """What a verified token says. ``principal`` is ``issuer/subject``, None for a token without subject. In ``claims`` the top-level
    claims that are lists written with spaces (``scope``, ``permission``, and what the rule adds) are lists."""

    issuer: str
    subject: str
    audiences: tuple[str, ...]
    presenter: str | None
    claims: Mapping[str, Json]

    @property
    def principal(self) -> str | None:
        return f"{self.issuer}/{self.subject}" if self.issuer and self.subject else None

    def find_claim(self, path: tuple[str, ...]) -> Json:
        """The claim at a path of keys; None if there is none."""
        found: Json | Mapping[str, Json] = self.claims
        for key in path:
            if not isinstance(found, Mapping) or key not in found:
                return None
            found = found[key]
        return found if not isinstance(found, Mapping) else None


class Facts:
    """Made for every request, so only what nearly every policy asks for is taken apart."""

    __slots__ = ("claims", "connection", "path", "peer", "request", "sni", "trusted")

    def __init__(
        self,
        request: Request | None,
        connection: Connection,
        claims: TokenFacts | None,
        trusted: TrustsForwarded,
        sni: ServerName = None,
    ) -> None:
        self.request = request
        self.connection = connection
        self.peer = connection.peer
        self.claims = claims
        self.trusted = trusted
        self.sni = sni
        self.path = b"" if request is None else request.path_only

    def find_headers(self, name: bytes) -> Sequence[bytes]:
        """The values of a header, and what a request has as attributes under the names by which HTTP writes them."""
        request = self.request
        if request is None:
            return ()
        found = [value for key, value in request.headers if key == name]
        if not found and name in _ATTRIBUTES and (value := _ATTRIBUTES[name](request)) is not None:
            found.append(value)
        return found

    def remote_ip(self) -> IpAddress:
        """The client's address: the last one that a believed peer's ``x-forwarded-for`` names, else the peer's own."""
        connection = self.connection
        if self.request is not None and self.trusted(connection.peer):
            forwarded = self.request.find(b"x-forwarded-for")
            if forwarded is not None:
                try:
                    return parse_ip(forwarded.rpartition(b",")[2].strip().decode("ascii"))
                except (InvalidAddress, UnicodeDecodeError):
                    pass  # as Envoy: what is no address is as if it were not there
        return connection.peer_address.ip


_ATTRIBUTES: dict[bytes, Callable[[Request], bytes | None]] = {
    b":authority": lambda request: request.authority,
    b":method": lambda request: request.method,
    b":path": lambda request: request.path,
    b":scheme": lambda request: request.scheme,
    b"content-length": lambda request: None if request.content_length is None else b"%d" % request.content_length,
    b"expect": lambda request: b"100-continue" if request.expect_continue else None,
    b"host": lambda request: request.authority,
    b"upgrade": lambda request: request.upgrade,
}
"""What codecs keep out of the list of headers. A policy that names them must not be blind to them."""

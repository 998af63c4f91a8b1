"""HTTP/1.1 requests of ours to servers that somebody's configuration names: key sets, authorizers. h11 on trio.

Such a server is a stranger, and so may be who named it. Everything is bounded in size and time, redirects are not followed, certificates
are always verified, and `fetch` does not go where only this machine or its cloud answers (SSRF): a resource that names the metadata
server must not make us read it.
"""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Final, TypeAlias
from urllib.parse import urlsplit

import h11
import trio

from mesh.model.address import IpAddress, unmapped
from mesh.rpc.tls import verifying_context

CONNECT_TIMEOUT: Final = 5.0
MAX_HEADER: Final = 64 << 10
MAX_URL: Final = 2048
_READ: Final = 64 << 10

Header: TypeAlias = tuple[bytes, bytes]
Dial: TypeAlias = Callable[["Target"], Awaitable[trio.abc.Stream]]


class OutboundError(Exception):
    """The request failed; the text says why, for the log of whoever configured it."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where a URL leads. ``path`` with its query."""

    secure: bool
    host: str
    port: int
    path: str

    @classmethod
    def parse(cls, url: str) -> Target:
        """``http`` or ``https``, no user information, no fragment. Raises OutboundError."""
        if len(url) > MAX_URL or not url.isascii() or any(char <= " " or char == "\x7f" for char in url):
            raise OutboundError("not a URL")
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as exc:
            raise OutboundError(f"not a URL: {exc}") from exc
        if parts.scheme not in _PORTS:
            raise OutboundError(f"scheme {parts.scheme!r} is not http or https")
        if not parts.hostname or "@" in parts.netloc or "\\" in parts.netloc or port == 0:
            raise OutboundError("not a URL of a server: HTTP(S)://HOST[:PORT]/PATH")
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        return cls(parts.scheme == "https", parts.hostname, port or _PORTS[parts.scheme], path)

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS["https" if self.secure else "http"] else f"{host}:{self.port}"


_PORTS: Final = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: tuple[Header, ...]
    """Names in lower case."""
    body: bytes


# Where requests may go

_METADATA: Final = frozenset(
    map(
        ip_address,
        (
            "100.100.100.200",  # Alibaba
            "168.63.129.16",  # Azure's host agent
            "192.0.0.192",  # Oracle
            "fd00:ec2::254",  # Amazon
            "fd20:ce::254",  # Google
        ),
    )
)
"""Servers of cloud providers that hand credentials to whoever asks. 169.254.169.254 is link-local."""
_EMBEDDING: Final = (
    (ip_network("64:ff9b::/96"), 0),
    (ip_network("64:ff9b:1::/48"), 0),
    (ip_network("2002::/16"), 80),
    (ip_network("::/96"), 0),
)
"""IPv6 addresses that stand for IPv4 ones (NAT64, 6to4, compatible), and how far right of their end that one begins, in bits."""
_THIS_NETWORK: Final = ip_network("0.0.0.0/8")


def refuse_address(ip: IpAddress) -> str | None:
    """Why a request must not go to an address; None if it may. Private addresses may: the mesh is made of them."""
    ip = unmapped(ip)
    if isinstance(ip, IPv6Address):
        for network, shift in _EMBEDDING:
            if ip in network and not ip.is_loopback and not ip.is_unspecified:
                return refuse_address(IPv4Address((int(ip) >> shift) & 0xFFFF_FFFF))
    if ip in _METADATA:
        return "a metadata server's address"
    if ip.is_loopback:
        return "a loopback address"
    if ip.is_unspecified or ip in _THIS_NETWORK:
        return "an unspecified address"
    if ip.is_link_local:
        return "a link-local address"
    if ip.is_multicast or ip == IPv4Address("255.255.255.255"):
        return "not one host's address"
    return None


def permit_any(ip: IpAddress) -> str | None:
    """Every address may be asked: for tests."""
    return None


class Dialler:
    """Connects to a URL's server, at an address that was looked at: the name is resolved once, so that it cannot mean another one later."""

    def __init__(self, *, refuse: Callable[[IpAddress], str | None] = refuse_address, tls: ssl.SSLContext | None = None) -> None:
        """``tls``: verifies servers; the system's roots by default."""
        self._refuse = refuse
        self._tls = tls

    async def __call__(self, target: Target) -> trio.abc.Stream:
        """Raises OutboundError, OSError, trio.BrokenResourceError."""
        stream = await self._connect(target)
        if not target.secure:
            return stream
        secured = trio.SSLStream(stream, self._context(), server_hostname=target.host, https_compatible=True)
        try:
            await secured.do_handshake()
        except BaseException:
            await trio.aclose_forcefully(secured)
            raise
        return secured

    async def _connect(self, target: Target) -> trio.SocketStream:
        failure: Exception = OutboundError(f"{target.host} has no address")
        for family, address in await self._find_addresses(target):
            ip = unmapped(ip_address(str(address[0]).partition("%")[0]))
            if (reason := self._refuse(ip)) is not None:
                failure = OutboundError(f"{target.host} is {ip}: {reason}")
                continue
            sock = trio.socket.socket(family, trio.socket.SOCK_STREAM)
            try:
                with trio.fail_after(CONNECT_TIMEOUT):
                    await sock.connect(address)
                return trio.SocketStream(sock)
            except (OSError, trio.TooSlowError) as exc:
                sock.close()
                failure = exc
            except BaseException:
                sock.close()
                raise
        raise OutboundError(f"no connection to {target.host}:{target.port}: {failure or type(failure).__name__}") from failure

    async def _find_addresses(self, target: Target) -> Sequence[tuple[int, tuple[object, ...]]]:
        try:
            found = await trio.socket.getaddrinfo(target.host, target.port, type=trio.socket.SOCK_STREAM)
        except (OSError, UnicodeError) as exc:
            raise OutboundError(f"{target.host} cannot be resolved: {exc}") from exc
        return [(entry[0], entry[4]) for entry in found if entry[0] in (trio.socket.AF_INET, trio.socket.AF_INET6)]

    def _context(self) -> ssl.SSLContext:
        if self._tls is None:
            self._tls = verifying_context(None)
            self._tls.minimum_version = ssl.TLSVersion.TLSv1_2
        return self._tls


# Requests


class HttpConnection:
    """One HTTP/1.1 connection, one request at a time."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEADER)

    async def exchange(self, method: bytes, target: bytes, headers: Sequence[Header], body: bytes, limit: int) -> Answer:
        """``headers`` with host and framing. Raises OutboundError for an answer of more than ``limit`` bytes, h11.ProtocolError for one
        that is no HTTP, trio.BrokenResourceError, trio.ClosedResourceError. The caller bounds the time."""
        data = self._http.send(h11.Request(method=method, target=target, headers=list(headers))) or b""
        if body:
            data += self._http.send(h11.Data(data=body)) or b""
        data += self._http.send(h11.EndOfMessage()) or b""
        try:
            await self._stream.send_all(data)
        except trio.BrokenResourceError:
            pass  # it may have answered before it had read all, and closed: then the answer says why
        response = await self._read_head()
        answer = bytearray()
        while isinstance(event := await self._next_event(), h11.Data):
            answer += event.data
            if len(answer) > limit:
                raise OutboundError(f"the answer is larger than {limit} bytes")
        if not isinstance(event, h11.EndOfMessage):
            raise h11.RemoteProtocolError("closed within the answer")
        return Answer(response.status_code, tuple(response.headers), bytes(answer))

    def reuse(self) -> bool:
        """Make it ready for another request; False if it can't be."""
        if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE or self._http.trailing_data[0]:
            return False
        self._http.start_next_cycle()
        return True

    async def discard(self) -> None:
        """Close without ceremony: nothing is owed to the server."""
        await trio.aclose_forcefully(self._stream)

    async def _read_head(self) -> h11.Response:
        for _ in range(_MAX_INFORMATIONAL):
            event = await self._next_event()
            if isinstance(event, h11.Response):
                return event
            if not isinstance(event, h11.InformationalResponse):
                raise h11.RemoteProtocolError("closed before an answer")
        raise h11.RemoteProtocolError("informational responses without end")

    async def _next_event(self) -> h11.Event:
        while True:
            event = self._http.next_event()
            if isinstance(event, h11.Event):
                return event
            if event is not h11.NEED_DATA:
                raise h11.RemoteProtocolError("unexpected data")
            self._http.receive_data(bytes(await self._stream.receive_some(_READ)))


_MAX_INFORMATIONAL: Final = 16


async def fetch(url: str, *, limit: int, within: float, dial: Dial | None = None) -> bytes:
    """The body of a GET that is answered with 200: at most ``limit`` bytes, ``within`` so many seconds in all. Raises OutboundError."""
    target = Target.parse(url)
    headers = [
        (b"host", target.authority.encode()),
        (b"user-agent", b"ambient-mesh"),
        (b"accept", b"application/json"),
        (b"connection", b"close"),
    ]
    try:
        with trio.fail_after(within):
            connection = HttpConnection(await (dial or Dialler())(target))
            try:
                answer = await connection.exchange(b"GET", target.path.encode(), headers, b"", limit)
            finally:
                with trio.CancelScope(shield=True):
                    await connection.discard()
    except trio.TooSlowError as exc:
        raise OutboundError(f"no whole answer within {within:g} s") from exc
    except h11.ProtocolError as exc:
        raise OutboundError(f"no HTTP: {exc}") from exc
    except ssl.SSLError as exc:
        raise OutboundError(f"TLS: {exc}") from exc
    except (trio.BrokenResourceError, trio.ClosedResourceError, OSError) as exc:
        raise OutboundError(f"the connection broke: {exc.__cause__ or exc}") from exc
    if answer.status != 200:
        redirect = " (redirects are not followed)" if 300 <= answer.status < 400 else ""
        raise OutboundError(f"answered with {answer.status}{redirect}")
    return answer.body

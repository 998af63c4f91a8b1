"""One shape for a request and a response, whatever protocol carried it. Bytes stay bytes: what came in is what goes out.

Header names are lower case (as HTTP/2 has them). Pseudo-headers are attributes, never in the list. Hop-by-hop headers, ``host`` and the
framing (``content-length`` apart) are gone when a codec hands a message out, and are added by the codec that sends it.
"""

from __future__ import annotations

from enum import Enum
from typing import TypeAlias

Headers: TypeAlias = list[tuple[bytes, bytes]]


class Version(Enum):
    """``value`` as the access log and `%PROTOCOL%` print it."""

    HTTP_1_0 = "HTTP/1.0"
    HTTP_1_1 = "HTTP/1.1"
    HTTP_2 = "HTTP/2"


class Message:
    """Headers in order, names in lower case; several with one name are allowed."""

    __slots__ = ("headers",)

    def __init__(self, headers: Headers) -> None:
        self.headers = headers

    def find(self, name: bytes) -> bytes | None:
        """The values of a header joined by ``,`` (RFC 9110 section 5.3); None if it is absent.

        For who wants one text. Routes compare each value by itself (`waypoint_py.routing.predicates`) and policies each as well as the
        joined text (`waypoint_py.policy.predicates`): joined alone, a second value would hide the first from an exact match.
        """
        found: bytes | None = None
        for key, value in self.headers:
            if key == name:
                found = value if found is None else b"%b,%b" % (found, value)
        return found

    def first(self, name: bytes) -> bytes | None:
        """The first value of a header; None if it is absent."""
        for key, value in self.headers:
            if key == name:
                return value
        return None

    def replace(self, name: bytes, value: bytes) -> None:
        """One header of this name, with this value."""
        self.remove(name)
        self.headers.append((name, value))

    def append(self, name: bytes, value: bytes) -> None:
        """One header more."""
        self.headers.append((name, value))

    def remove(self, name: bytes) -> None:
        """No header of this name."""
        kept = [pair for pair in self.headers if pair[0] != name]
        if len(kept) != len(self.headers):
            self.headers = kept


class Request(Message):
    """``path`` is what is routed, judged and forwarded: normalised, with its query. ``authority`` as the client wrote it, or rewritten.

    ``upgrade``: the protocol that HTTP/1.1's Upgrade or HTTP/2's extended CONNECT asks for (RFC 8441), lower case; None: none.
    ``content_length`` as declared; None: not declared (a body may come all the same). ``expect_continue``: the client waits for 100.
    """

    __slots__ = ("authority", "content_length", "expect_continue", "method", "path", "scheme", "upgrade", "version")

    def __init__(
        self,
        method: bytes,
        scheme: bytes,
        authority: bytes,
        path: bytes,
        headers: Headers,
        version: Version = Version.HTTP_1_1,
        *,
        content_length: int | None = None,
        upgrade: bytes | None = None,
        expect_continue: bool = False,
    ) -> None:
        super().__init__(headers)
        self.method = method
        self.scheme = scheme
        self.authority = authority
        self.path = path
        self.version = version
        self.content_length = content_length
        self.upgrade = upgrade
        self.expect_continue = expect_continue

    @property
    def path_only(self) -> bytes:
        """The path without its query."""
        return self.path.partition(b"?")[0]

    @property
    def query(self) -> bytes:
        """What follows the ``?``; empty if nothing does."""
        return self.path.partition(b"?")[2]

    @property
    def is_grpc(self) -> bool:
        """Whether ``content-type`` is ``application/grpc`` or ``application/grpc+something`` (gRPC-Web is not)."""
        content_type = self.first(b"content-type")
        return content_type is not None and (content_type == b"application/grpc" or content_type.startswith(b"application/grpc+"))

    def copy(self) -> Request:
        """One that can be changed by itself: a retry's, a mirror's."""
        return Request(
            self.method,
            self.scheme,
            self.authority,
            self.path,
            self.headers.copy(),
            self.version,
            content_length=self.content_length,
            upgrade=self.upgrade,
            expect_continue=self.expect_continue,
        )


class Response(Message):
    """``status`` 100-599. Codecs know from the request whether a body may follow."""

    __slots__ = ("content_length", "status")

    def __init__(self, status: int, headers: Headers, *, content_length: int | None = None) -> None:
        super().__init__(headers)
        self.status = status
        self.content_length = content_length

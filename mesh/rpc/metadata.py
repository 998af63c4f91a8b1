"""Metadata of a call: lower-case names and ASCII values, as HTTP/2 headers carry them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final

from mesh.http.headers import FRAMING
from mesh.http.message import Headers
from mesh.rpc.errors import RpcError
from mesh.wire.grpc import Status

_NAME: Final = re.compile(r"[0-9a-z_.-]+", re.ASCII)
_VALUE: Final = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]*[\x21-\x7e])?|", re.ASCII)
_RESERVED: Final = frozenset({"te", "expect", "content-type", "user-agent", *(name.decode() for name in FRAMING)})


def to_headers(metadata: Mapping[str, str]) -> Headers:
    """Headers of custom metadata. Raises RpcError INTERNAL for what HTTP/2 cannot carry: a token file's newline ends here, unsent."""
    headers: Headers = []
    for name, value in metadata.items():
        if not _NAME.fullmatch(name) or name.startswith("grpc-") or name in _RESERVED:
            raise RpcError(Status.INTERNAL, f"metadata name {name!r} cannot be sent")
        if not _VALUE.fullmatch(value):
            raise RpcError(Status.INTERNAL, f"the value of metadata {name!r} has characters that cannot be sent")
        headers.append((name.encode(), value.encode()))
    return headers


def from_headers(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """Values of one name given several times are joined with a comma. What is no UTF-8 becomes U+FFFD, which equals nothing we expect."""
    metadata: dict[str, str] = {}
    for field in headers:
        name, value = field[0].decode("utf-8", "replace"), field[1].decode("utf-8", "replace")
        metadata[name] = f"{metadata[name]},{value}" if name in metadata else value
    return metadata

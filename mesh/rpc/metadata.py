"""Metadata of a call: lower-case names and ASCII values, as HTTP/2 headers carry them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TypeAlias, cast

from hpack import NeverIndexedHeaderTuple

from mesh.rpc.errors import RpcError
from mesh.wire.grpc import Status

Header: TypeAlias = tuple[str, str]

_NAME = re.compile(r"[0-9a-z_.-]+", re.ASCII)
_VALUE = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]*[\x21-\x7e])?|", re.ASCII)
_SECRET = frozenset({"authorization", "cookie"})
_RESERVED = frozenset({"te", "content-type", "content-length", "host", "connection", "user-agent"})


def to_headers(metadata: Mapping[str, str]) -> list[Header]:
    """Headers of custom metadata. Raises RpcError INTERNAL for what HTTP/2 cannot carry: a token file's newline ends here, unsent."""
    headers: list[Header] = []
    for name, value in metadata.items():
        if not _NAME.fullmatch(name) or name.startswith("grpc-") or name in _RESERVED:
            raise RpcError(Status.INTERNAL, f"metadata name {name!r} cannot be sent")
        if not _VALUE.fullmatch(value):
            raise RpcError(Status.INTERNAL, f"the value of metadata {name!r} has characters that cannot be sent")
        headers.append(cast("Header", NeverIndexedHeaderTuple(name, value)) if name in _SECRET else (name, value))
    return headers


def from_headers(headers: Iterable[Header]) -> dict[str, str]:
    """Everything but pseudo-headers; values of one name given several times are joined with a comma."""
    metadata: dict[str, str] = {}
    for name, value in headers:
        if not name.startswith(":"):
            metadata[name] = f"{metadata[name]},{value}" if name in metadata else value
    return metadata

"""What a connection's first bytes say it carries. Pure."""

from __future__ import annotations

import re
from enum import Enum
from typing import Final

MAX_SNIFFED: Final = 64 * 1024
"""Bytes of a first line that is still no line: what is longer is no HTTP that anybody would take."""

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_METHOD: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,64}")
_LINE: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,64} [^\x00-\x20\x7f]+ HTTP/1\.1\r?")
"""HTTP/1.0 is carried as bytes: only what was declared as HTTP is told to upgrade."""


class Carries(Enum):
    HTTP1 = "http1"
    HTTP2 = "http2"
    BYTES = "bytes"
    """Anything else."""


def sniff(data: bytes, *, ended: bool = False) -> Carries | None:
    """None: the bytes may still become either. ``ended``: no more will come."""
    if data.startswith(PREFACE):
        return Carries.HTTP2
    if PREFACE.startswith(data):
        return Carries.BYTES if ended else None
    line, newline, _ = data.partition(b"\n")
    if newline:
        return Carries.HTTP1 if _LINE.fullmatch(line) else Carries.BYTES
    if ended or len(data) > MAX_SNIFFED:
        return Carries.BYTES
    return None if _may_begin(line) else Carries.BYTES


def _may_begin(line: bytes) -> bool:
    """Whether a request line may begin so."""
    method, space, rest = line.partition(b" ")
    if not space:
        return len(method) <= 64 and (not method or _METHOD.fullmatch(method) is not None)
    if _METHOD.fullmatch(method) is None:
        return False
    target, space, version = rest.partition(b" ")
    if any(byte <= 0x20 or byte == 0x7F for byte in target):
        return False
    if not space:
        return True
    return bool(target) and b"HTTP/1.1\r".startswith(version)

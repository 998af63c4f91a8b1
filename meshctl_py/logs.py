"""Log files on this machine, shown as they are and as they grow."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

_FOLLOW_POLL: Final = 0.1
_CRI_FIELDS: Final = 3


def show_log(
    path: Path, lines: int | None, *, follow: Callable[[], bool] = lambda: False, clean: Callable[[bytes], bytes] = lambda text: text
) -> None:
    """Write a file to standard output: all of it or the last ``lines``, and what comes while ``follow`` says so. Raises OSError.

    ``clean`` is given whole lines.
    """
    with path.open("rb") as file:
        content = file.read()
        whole, rest = _cut(content)
        if lines is not None:
            whole = b"".join(whole.splitlines(keepends=True)[-lines:] if lines else [])
        _write(clean(whole))
        while follow():
            part = file.read()
            whole, rest = _cut(rest + part)
            _write(clean(whole))
            if not part:
                time.sleep(_FOLLOW_POLL)
        _write(clean(rest))


def _cut(content: bytes) -> tuple[bytes, bytes]:
    end = content.rfind(b"\n") + 1
    return content[:end], content[end:]


def _write(content: bytes) -> None:
    sys.stdout.buffer.write(content)
    sys.stdout.buffer.flush()


def without_cri(content: bytes) -> bytes:
    """Lines of a container runtime's log, ``TIME STREAM TAG TEXT``, without what the runtime put in front; TAG P is a line in parts."""
    out = bytearray()
    for line in content.splitlines():
        parts = line.split(b" ", _CRI_FIELDS)
        if len(parts) <= _CRI_FIELDS:
            out += line + b"\n"
        else:
            out += parts[3] + (b"" if parts[2] == b"P" else b"\n")
    return bytes(out)


def tail(path: Path, lines: int) -> list[str]:
    """The last lines of a file, of its last 64 KiB; nothing if it is not there."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 65536))
            return file.read().decode(errors="replace").splitlines()[-lines:]
    except FileNotFoundError:
        return []

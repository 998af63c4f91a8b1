"""Unix sockets at paths of any length."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def unix_address(path: Path) -> Iterator[str]:
    """An address to bind or connect a socket at ``path``, good within the context. Raises OSError.

    The kernel's addresses hold 107 bytes (sun_path of unix(7)), and a home directory of a long name uses them up. Through a descriptor of
    the directory only the file's own name counts.
    """
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)

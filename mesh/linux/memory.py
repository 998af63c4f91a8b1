"""What a process does about the memory it has: give back what malloc keeps for nobody, and have the rest in huge pages."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

_libc = ctypes.CDLL(None, use_errno=True)
_TRIM: Final[Callable[[int], int] | None] = getattr(_libc, "malloc_trim", None)
"""Of glibc; others give back by themselves or not at all."""
_MADV_COLLAPSE: Final = 25
"""madvise(2), Linux 6.1."""
_PAGE: Final = mmap.PAGESIZE
_TRANSPARENT: Final = Path("/sys/kernel/mm/transparent_hugepage")
_DENSE: Final = 0.75
"""Of a huge page's place, so much must be in use: the rest would be memory spent on nothing."""


def return_free_memory() -> None:
    """Give it back to the kernel. Takes up to some ten milliseconds, in which other threads may run.

    For when something large has passed: its buffers lay below what stayed of it, and free places in the middle of the heap are given back
    only when asked for.
    """
    if _TRIM is not None:
        _TRIM(0)


def gather_in_huge_pages() -> int:
    """Have the kernel move heap and other anonymous memory of this process into huge pages where it fills them; the bytes that are in
    some now. Raises OSError where the process may not look at its own memory.

    Call it in a thread of its own: each 2 MiB that is moved takes one to eight milliseconds, in which other threads run unless they need
    memory. Nothing is done where the machine's owner wants no transparent huge pages (``never``), and nothing comes of it before Linux 6.1.
    """
    size = _huge_page_size()
    if not size:
        return 0
    gathered = 0
    for start, end in _anonymous_memory():
        first, last = -(-start // size) * size, end // size * size
        for page in _dense_places(_resident_pages(first, last - first), size // _PAGE):
            # It may be gone by now, or the kernel may have no such page to give: both cost nothing but the gain.
            if _libc.madvise(ctypes.c_void_p(first + page * _PAGE), ctypes.c_size_t(size), _MADV_COLLAPSE) == 0:
                gathered += size
    return gathered


def _huge_page_size() -> int:
    """In bytes; 0 where there are none to be had."""
    try:
        if "[never]" in (_TRANSPARENT / "enabled").read_text():
            return 0
        return int((_TRANSPARENT / "hpage_pmd_size").read_text())
    except (OSError, ValueError):
        return 0


def _anonymous_memory() -> Iterator[tuple[int, int]]:
    """Begin and end of what the process can write and no file stands behind, stacks left out (proc_pid_maps(5))."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, rights, _, _, inode, *name = line.split(maxsplit=5)
        if rights == "rw-p" and inode == "0" and (not name or name[0].startswith(("[heap]", "[anon"))):
            start, _, end = span.partition("-")
            yield int(start, 16), int(end, 16)


def _resident_pages(start: int, length: int) -> bytes:
    """A byte for each page, 1 where it is in memory (mincore(2)); none where the memory has gone."""
    if length <= 0:
        return b""
    pages = (ctypes.c_ubyte * (length // _PAGE))()
    return bytes(pages) if _libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(length), pages) == 0 else b""


def _dense_places(pages: bytes, huge: int) -> Iterator[int]:
    """The first page of every place of ``huge`` pages that is filled well enough."""
    return (at for at in range(0, len(pages), huge) if pages.count(1, at, at + huge) >= _DENSE * huge)

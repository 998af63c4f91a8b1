"""What malloc keeps goes back when asked for, and what is in use goes into huge pages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mesh.linux import memory

WORK = """
from pathlib import Path
from mesh.linux.memory import return_free_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

blocks = [b"x" * 100_000 for _ in range(1000)]  # zeros might never have been written
kept = blocks[::10]
del blocks
before = resident()
return_free_memory()
assert before - resident() > 60_000_000, (before, resident())
assert all(block == b"x" * 100_000 for block in kept)
"""


def test_places_between_what_is_still_used_are_given_back() -> None:
    """In a process of its own: another's heap has its own past."""
    subprocess.run([sys.executable, "-c", WORK], check=True)


GATHER = """
import mmap, re
from pathlib import Path
from mesh.linux.memory import gather_in_huge_pages

def total(field):
    return sum(int(size) for size in re.findall(rf"^{field}: +(\\d+) kB", Path("/proc/self/smaps").read_text(), re.MULTILINE)) << 10

text = bytes(range(256)) * (64 << 12)
blocks = [bytes([number % 251]) * 300 for number in range(100_000)]
sparse = mmap.mmap(-1, 64 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for at in range(0, len(sparse), 1 << 20):
    sparse[at] = 1
before, resident = total("AnonHugePages"), total("Rss")
gathered = gather_in_huge_pages()
print(gathered, total("AnonHugePages") - before, total("Rss") - resident)
assert gather_in_huge_pages() >= gathered, "what is gathered stays so"
assert text == bytes(range(256)) * (64 << 12)
assert all(block == bytes([number % 251]) * 300 for number, block in enumerate(blocks))
"""


def test_what_is_in_use_goes_into_huge_pages_and_keeps_what_is_in_it() -> None:
    """64 MiB of one piece, 33 MB of small ones, and as much room again that is hardly touched."""
    done = subprocess.run([sys.executable, "-c", GATHER], check=True, capture_output=True, text=True)
    gathered, huge, grown = map(int, done.stdout.split())
    if not gathered:
        pytest.skip("this kernel gives no huge pages when asked (before Linux 6.1, or told never to)")
    assert gathered >= 70 << 20
    assert huge >= 70 << 20
    assert grown < 20 << 20, "what is hardly touched stays as it is"


def test_where_the_machines_owner_wants_none_nothing_is_gathered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_TRANSPARENT", tmp_path)
    assert memory.gather_in_huge_pages() == 0
    (tmp_path / "hpage_pmd_size").write_text("2097152\n")
    (tmp_path / "enabled").write_text("always madvise [never]\n")
    assert memory.gather_in_huge_pages() == 0


@pytest.mark.parametrize(
    ("pages", "places"),
    [("", []), ("1111", [0]), ("0111 1110 0011 1111", [0, 4, 12]), ("0000 1111", [4]), ("1100 0011", [])],
)
def test_places_that_are_well_filled_are_gathered(pages: str, places: list[int]) -> None:
    resident = bytes(int(page) for page in pages.replace(" ", ""))
    assert list(memory._dense_places(resident, 4)) == places

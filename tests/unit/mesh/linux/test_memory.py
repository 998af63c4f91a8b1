"""What malloc keeps goes back when asked for."""

from __future__ import annotations

import subprocess
import sys

WORK = """
from pathlib import Path
from mesh.linux.memory import return_free_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

blocks = [bytes(100_000) for _ in range(1000)]
kept = blocks[::10]
del blocks
before = resident()
return_free_memory()
assert before - resident() > 60_000_000, (before, resident())
assert all(block == bytes(100_000) for block in kept)
"""


def test_places_between_what_is_still_used_are_given_back() -> None:
    """In a process of its own: another's heap has its own past."""
    subprocess.run([sys.executable, "-c", WORK], check=True)

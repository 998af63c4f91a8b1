"""How seldom garbage is looked for."""

from __future__ import annotations

import subprocess
import sys

WORK = """
import gc
from mesh.runtime.garbage import collect_seldom

gc.disable()  # as while modules are made
collect_seldom()
assert gc.isenabled()
assert gc.get_freeze_count() > 1000, "modules are not looked through"

found = []
gc.callbacks.append(lambda phase, info: found.append(phase))
kept = [[] for _ in range(40_000)]
assert not found
kept += [[] for _ in range(40_000)]
assert found, "they are looked for all the same"
"""


def test_garbage_is_looked_for_seldom_and_never_in_what_is_there_from_the_start() -> None:
    """In a process of its own: this one's habits are to stay."""
    subprocess.run([sys.executable, "-c", WORK], check=True)

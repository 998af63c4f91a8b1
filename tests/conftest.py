"""What holds for a whole run of tests: how properties are tried, and that no lab is left behind.

Hypothesis' deadline is a timed assertion: on a machine shared with other work it fails by chance, so no property has one. CI tries the
same examples every time, so that what it says of a change is about the change; everywhere else they are new ones each run.

A run that is interrupted leaves no lab: a worker of pytest-xdist that is cut off does not end what it brought up.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

from meshctl_py.lab.home import find_labs

settings.register_profile("mesh", deadline=None, derandomize=os.environ.get("CI") == "true")
settings.load_profile("mesh")

_OF_A_TEST = re.compile(r"test-(\d+)-.*")


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # the run itself, whose workers have ended
        for name in find_orphans([lab.name for lab in find_labs()]):
            with contextlib.suppress(subprocess.TimeoutExpired):  # the next run tries it again
                subprocess.run([sys.executable, "-m", "meshctl_py", "lab", "down", "--name", name], capture_output=True, timeout=60)


def find_orphans(labs: list[str]) -> list[str]:
    """Labs of test processes that are no more."""
    return [name for name in labs if (made := _OF_A_TEST.fullmatch(name)) and not Path("/proc", made[1]).exists()]

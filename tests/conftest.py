"""A run that is interrupted leaves no lab behind: a worker of pytest-xdist that is cut off does not end what it brought up."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from meshctl_py.lab.home import find_labs

_OF_A_TEST = re.compile(r"test-(\d+)-.*")


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # the run itself, whose workers have ended
        for name in find_orphans([lab.name for lab in find_labs()]):
            with contextlib.suppress(subprocess.TimeoutExpired):  # the next run tries it again
                subprocess.run([sys.executable, "-m", "meshctl_py", "lab", "down", "--name", name], capture_output=True, timeout=60)


def find_orphans(labs: list[str]) -> list[str]:
    """Labs of test processes that are no more."""
    return [name for name in labs if (made := _OF_A_TEST.fullmatch(name)) and not Path("/proc", made[1]).exists()]

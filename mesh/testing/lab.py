"""A lab for tests: a real mesh in network namespaces, driven as a user would, by ``meshctl``.

Tests change the YAML in `Lab.source` and look at what applications see, what the access log says and what ``meshctl lab status`` shows.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

PATIENCE = 30.0
"""Seconds a condition may take on a busy machine before the test fails."""


def wait_until(condition: Callable[[], T], what: str, patience: float = PATIENCE) -> T:
    """The first true value of ``condition``. Raises AssertionError naming ``what`` when patience ends."""
    deadline = time.monotonic() + patience
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {patience:g} s: {what} (last: {value!r})")
        time.sleep(0.05)


class Lab:
    """A running lab. ``source`` is the test's own copy of the example's directory."""

    def __init__(self, name: str, source: Path) -> None:
        self.name = name
        self.source = source

    def meshctl(self, *arguments: str, timeout: float = 60, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run meshctl as a user would; its output as text."""
        command = [sys.executable, "-m", "meshctl_py", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL)
        assert not check or done.returncode == 0, f"meshctl {' '.join(arguments)}: {done.stdout}{done.stderr}"
        return done

    def command(self, where: str, *command: str) -> list[str]:
        """The command line that runs ``command`` in ``namespace/pod``, a node or the router."""
        namespace, slash, pod = where.partition("/")
        place = ["-n", namespace, pod] if slash else [where]
        return [sys.executable, "-m", "meshctl_py", "lab", "exec", "--name", self.name, *place, "--", *command]

    def run(self, where: str, *command: str, timeout: float = 30) -> subprocess.CompletedProcess[str]:
        """Run a command there to its end."""
        return subprocess.run(self.command(where, *command), capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL)

    def start(self, where: str, *command: str) -> subprocess.Popen[str]:
        """Start a command there; its standard streams are pipes."""
        pipe = subprocess.PIPE
        return subprocess.Popen(self.command(where, *command), stdin=pipe, stdout=pipe, stderr=pipe, text=True)

    def curl(self, where: str, url: str, *options: str) -> subprocess.CompletedProcess[str]:
        return self.run(where, "curl", "-sS", "-m", "5", *options, url)

    def status(self) -> dict[str, Any]:
        """``meshctl lab status -o json``."""
        found: dict[str, Any] = json.loads(self.meshctl("lab", "status", "--name", self.name, "-o", "json").stdout)
        return found

    def log(self, process: str) -> str:
        """All that a process has logged."""
        return self.meshctl("lab", "logs", "--name", self.name, process).stdout

    def access(self, node: str, *words: str) -> list[str]:
        """Lines of a node's access log that hold all the words."""
        lines = (line for line in self.log(node).splitlines() if "\taccess\t" in line)
        return [line for line in lines if all(word in line for word in words)]

    def label(self, namespace: str, label: str) -> None:
        self.meshctl("label", "namespace", namespace, label, "--overwrite", "-f", str(self.source))

    def write(self, file: str, text: str) -> None:
        """Write or change a file of the source, in one step as editors do."""
        temporary = self.source / f".{file}.tmp"
        temporary.write_text(text)
        temporary.rename(self.source / file)

    def remove(self, *files: str) -> None:
        for file in files:
            (self.source / file).unlink(missing_ok=True)

    def pods_in_mesh(self) -> set[str]:
        """``namespace/name`` of every pod that is captured."""
        return {f"{pod['namespace']}/{pod['name']}" for pod in self.status()["pods"] if pod["mesh"] == "captured"}


@contextmanager
def running_lab(example: Path, directory: Path, *options: str) -> Iterator[Lab]:
    """Bring up a lab on a copy of an example; it is gone afterwards, whatever happened. ``options`` are those of ``meshctl lab up``."""
    source = directory / "cluster"
    shutil.copytree(example, source)
    lab = Lab(f"test-{os.getpid()}-{directory.name}"[:40], source)
    try:
        lab.meshctl("lab", "up", str(source), "--name", lab.name, *options, timeout=120)
        yield lab
    finally:
        lab.meshctl("lab", "down", "--name", lab.name, check=False)

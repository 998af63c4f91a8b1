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
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from mesh.linux.netns import open_netns
from mesh.testing.netns import Netns

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
        return self.run(where, "curl", "-sS", "-m", "15", *options, url)

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

    def pod(self, where: str) -> dict[str, Any]:
        """The status of ``namespace/name``."""
        return next(pod for pod in self.status()["pods"] if f"{pod['namespace']}/{pod['name']}" == where)

    def pods_in_mesh(self) -> set[str]:
        """``namespace/name`` of every pod that is captured."""
        return {f"{pod['namespace']}/{pod['name']}" for pod in self.status()["pods"] if pod["mesh"] == "captured"}

    def pods_not_outside(self) -> set[str]:
        """``namespace/name`` of every pod that an agent has not let go of: captured, pending or leaving."""
        return {f"{pod['namespace']}/{pod['name']}" for pod in self.status()["pods"] if pod["mesh"] != "outside"}

    # What follows looks at the lab from the machine it runs on, past meshctl; needs root.

    @cached_property
    def home(self) -> Path:
        """The lab's own directory: control plane's state, tokens, logs."""
        return Path(self.status()["logs"]).parent

    @contextmanager
    def inside(self, where: str) -> Iterator[Netns]:
        """A pod's or node's network namespace, for sockets of this very process."""
        process = self.start(where, "sh", "-c", "echo inside; exec cat")
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "inside\n"
            path = Path(f"/proc/{process.pid}/ns/net")
            fd = open_netns(path)
            try:
                yield Netns(where, path, fd)
            finally:
                os.close(fd)
        finally:
            process.kill()
            process.communicate()

    def agent(self, node: str, *part: str) -> list[int]:
        """This machine's process ids of a node's agent: its supervisor (no part), ``brain``, ``mover`` or one mover (``mover``, ``0``)."""
        wanted = b"\0".join([b"ztunnel_py", *(word.encode() for word in part or ("proxy",))]) + b"\0"
        run_dir = f"RUN_DIR={self.home}/run/{node}\0".encode()
        found: list[int] = []
        for process in Path("/proc").iterdir():
            if process.name.isdecimal():
                try:
                    ours = wanted in (process / "cmdline").read_bytes() and run_dir in (process / "environ").read_bytes()
                except OSError:
                    continue
                if ours:
                    found.append(int(process.name))
        return sorted(found)

    def descriptors(self, node: str, *part: str) -> Counter[str]:
        """Open descriptors of the node's movers, or of another part, by kind. Pipes are left out: idle ones are kept for the next relay."""
        kinds: Counter[str] = Counter()
        for pid in self.agent(node, *(part or ("mover",))):
            for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                try:
                    kind = os.readlink(descriptor).partition(":")[0]
                except OSError:
                    continue  # closed while we looked
                if kind != "pipe":
                    kinds[kind] += 1
        return kinds


@contextmanager
def running_lab(example: Path, directory: Path, *options: str) -> Iterator[Lab]:
    """Bring up a lab on a copy of an example; it is gone afterwards, whatever happened. ``options`` are those of ``meshctl lab up``."""
    source = directory / "cluster"
    shutil.copytree(example, source)
    lab = Lab(f"test-{os.getpid()}-{directory.name}"[:32], source)
    try:
        lab.meshctl("lab", "up", str(source), "--name", lab.name, *options, timeout=120)
        yield lab
    finally:
        lab.meshctl("lab", "down", "--name", lab.name, check=False)

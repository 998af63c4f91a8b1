"""What the demo stands on: a running lab to try claims in, and a tap on its wire."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Final

from meshctl_py.commands.label import apply_labels, labels_of
from meshctl_py.lab.assign import PODS_V4, PODS_V6
from meshctl_py.lab.client import Lab, Popen
from meshctl_py.lab.demo.examples import read_example
from meshctl_py.lab.demo.loads import close
from meshctl_py.lab.demo.report import Report, Unmet
from meshctl_py.lab.network import interface_name
from meshctl_py.lab.wiretap import Segment, decode_segments

SETTLE: Final = 10.0
"""Seconds in which a change of configuration must have taken effect; it takes a fraction of one."""
_COMMAND_WITHIN: Final = 20.0
_OWN_GROUP: Final = 0
"""``process_group`` of what the demo starts: Ctrl-C in the terminal is the demo's own to act on, which ends them all."""


class Tap:
    """Hears all that passes between the router and a node."""

    def __init__(self, lab: Lab, node: str) -> None:
        command = [sys.executable, "-m", "meshctl_py.lab.wiretap", interface_name(node)]
        self._process = lab.open_command("router", command).start(stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=_OWN_GROUP)
        self._ask("")

    def hear(self) -> list[Segment]:
        """What passed between pods since the last time."""
        return [segment for segment in decode_segments(self._ask("\n")) if _between_pods(segment)]

    def close(self) -> None:
        close(self._process)

    def _ask(self, text: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(text)
        self._process.stdin.flush()
        return self._process.stdout.readline()


@dataclass(frozen=True, slots=True)
class Stage:
    """Where the claims are tried: a running lab of a copy of the example."""

    lab: Lab
    source: Path
    report: Report

    def run(self, pod: str, *command: str, namespace: str = "shop") -> str:
        """The output of a command in a pod, whatever its exit status."""
        process = self.lab.open_command(pod, command, namespace=namespace).start(
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, process_group=_OWN_GROUP
        )
        output, _ = process.communicate(timeout=_COMMAND_WITHIN)
        return output.strip()

    def get(self, pod: str, path: str, family: str, *, namespace: str = "shop") -> str:
        """What a pod gets from the server."""
        return self.run(pod, "python3", "apps/get.py", f"http://server.shop{path}", family, namespace=namespace)

    def is_labelled(self, key: str) -> bool:
        """Whether the namespace shop has this label."""
        return key in labels_of(self.source, "Namespace", "", "shop")

    def label(self, text: str) -> None:
        """``meshctl label namespace shop TEXT``."""
        key, equals, value = text.partition("=")
        wanted = {key: value} if equals else {text.removesuffix("-"): None}
        self.report.step(f"meshctl label namespace shop {text}")
        apply_labels(self.source, "Namespace", "", "shop", wanted, overwrite=True)

    def settle(self, seen: Callable[[], bool]) -> bool:
        """Try until something has come true; False if it has not in a time that is more than enough."""
        deadline = time.monotonic() + SETTLE
        while not _comes_true(seen):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    def wait_captured(self) -> None:
        """Until the agents have captured all pods of the shop, or a time has passed: the claims that follow tell."""
        self.settle(lambda: all(pod.mesh == "captured" for pod in self.lab.status().pods if pod.namespace == "shop"))

    @contextmanager
    def applied(self, file: str, **values: str) -> Iterator[None]:
        """A file of the examples is in force as long as the context lasts; see `read_example`."""
        name = Path(file).name
        self.report.step(f"{name} applied")
        target = self.source / name
        temporary = target.with_name(f".{name}")  # no half of it shall be read
        temporary.write_text(read_example(file, **values))
        temporary.rename(target)
        try:
            yield
        finally:
            target.unlink()

    def meshctl(self, *arguments: str) -> str:
        """What ``meshctl`` says, run as a user would. Raises Unmet if it fails."""
        self.report.step(f"meshctl {' '.join(arguments)}")
        command = [sys.executable, "-m", "meshctl_py", *arguments, "--lab", self.lab.home.name]
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_COMMAND_WITHIN, process_group=_OWN_GROUP
        )
        if done.returncode != 0:
            raise Unmet(f"meshctl fails: {done.stderr.strip()}")
        return done.stdout.strip()

    def start(self, pod: str, *command: str) -> Popen:
        """A command in a pod of the shop; its input and output are pipes."""
        return self.lab.open_command(pod, command, namespace="shop").start(
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=_OWN_GROUP
        )

    def address(self, pod: str, family: str) -> str:
        """A pod's address."""
        found = next(item for item in self.lab.status().pods if item.name == pod)
        return next(ip for ip in found.ips if ip_address(ip).version == int(family))

    def sees_own_address(self, family: str) -> str:
        """Evidence that the server sees the client itself. Raises Unmet."""
        answer, own = self.get("client", "/", family), self.address("client", family)
        if not answer.startswith(f"200 hello {own},"):
            raise Unmet(f"the client is {own}, the server says {answer!r}")
        return f'"{answer[4:]}"'

    def log_lines(self, node: str) -> list[str]:
        """The log of a node's agent."""
        return self.read_log(f"ztunnel-{node}")

    def read_log(self, name: str) -> list[str]:
        """Lines that a process of the lab has logged; ``name`` is that of the file."""
        return (self.lab.home.logs / f"{name}.log").read_text(errors="replace").splitlines()


def _comes_true(seen: Callable[[], bool]) -> bool:
    try:
        return seen()
    except (Unmet, ValueError, subprocess.TimeoutExpired):
        return False  # what cannot even be asked for is not there yet


def _between_pods(segment: Segment) -> bool:
    return all(end.ip in PODS_V4 or end.ip in PODS_V6 for end in (segment.source, segment.destination))
